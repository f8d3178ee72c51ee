"""How far weights have moved: from the reference or between anchors, by layer, block or role."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import pandas as pd

from ..monitor.weights.names import block_of
from .figures.grid import Grid, build, natural
from .quantities import LEAST_POINTS, MOST_POINTS, ROWS
from .text import integer, number, share

if TYPE_CHECKING:
    from ..monitor import Run
    from .queries import Library

REFERENCE = "reference"
#: A role is judged from so many layers on; a spread below this many decades is taken for this.
LEAST_OF_ROLE, LEAST_SPREAD = 5, 0.02


@dataclass(frozen=True)
class Metric:
    """A measure of drift: its column in the frames of this module, and how it is called."""

    title: str
    word: str
    explain: str


METRICS = {
    "relative_l2": Metric("relative L2", "Relative L2", "|w − reference| ÷ |reference|"),
    "turned": Metric("1 − cosine", "Cosine", "of the angle to the reference: 0 is the same direction"),
    "flipped": Metric("sign flips", "Sign flips", "share of the elements whose sign has changed"),
}
GROUPS = {"layer": "Layers", "block": "Blocks", "role": "Roles"}


def sources(run: Run) -> list[tuple[str, str]]:
    """What drift can be measured from: (value, word)."""
    word = "Start of the run" if run.info.get("reference") == "start" else "Reference"
    anchors = run.anchors()
    found = [(REFERENCE, word)] if "drift" in run.kinds() else []
    if anchors and "initial_sketch" in run.stored_kinds():
        found.append(("initial", "Initial weights (sketch)"))
    found += [(str(step), f"Anchor at step {integer(step)}") for step in anchors[:-1]]
    return found or [(REFERENCE, word)]


def frame_of(library: Library, run: Run, source: str, steps: tuple[int, int] | None = None) -> pd.DataFrame:
    """step, tensor, relative_l2, turned, flipped, distance, reference_norm, count; by tensor, then step."""
    if source == REFERENCE:
        points = min(max(ROWS // max(len(run.tensors()), 1), LEAST_POINTS), MOST_POINTS)
        frame = run.drift(steps=steps, max_points=points)
        flipped = frame["sign_flips"] / frame["count"]
        return frame.assign(turned=1 - frame["cosine"], flipped=flipped)
    return library.memo(run, ("between anchors", source), lambda: _between(run, source))


def _between(run: Run, source: str) -> pd.DataFrame:
    """Distances from one anchor to every later one."""
    start: int | str = source if source == "initial" else int(source)
    ends = [step for step in run.anchors() if start == "initial" or step > int(start)]
    found = [run.drift_between(start, step).assign(step=step) for step in ends]
    columns = ["tensor", "relative_l2", "distance", "cosine", "step"]
    frame = pd.concat(found) if found else pd.DataFrame(columns=columns)
    reference = frame["distance"] / frame["relative_l2"]
    sizes = run.tensors().set_index("tensor")["elements"]
    return frame.assign(
        turned=1 - frame["cosine"],
        flipped=np.nan,
        reference_norm=reference,
        count=frame["tensor"].map(sizes),
    )


def grouped(frame: pd.DataFrame, groups: dict[str, str]) -> pd.DataFrame:
    """Rows added up by group (tensor -> group), in `tensor` then.

    Squares of distances and norms add, and so do flips; the cosine is the mean over elements of the tensors'.
    """
    known = frame[frame["tensor"].map(groups).notna()]
    count = known["count"].astype(float)
    parts = pd.DataFrame(
        {
            "tensor": known["tensor"].map(groups).astype(object),
            "step": known["step"],
            "distance": known["distance"] ** 2,
            "reference_norm": known["reference_norm"] ** 2,
            "turned": known["turned"] * count,
            "turning": np.where(known["turned"].notna(), count, 0.0),
            "flipped": known["flipped"] * count,
            "flipping": np.where(known["flipped"].notna(), count, 0.0),
        }
    )
    total = parts.groupby(["tensor", "step"], sort=False).sum().reset_index()

    def divided(top: str, bottom: str) -> pd.Series:
        return (total[top] / total[bottom].where(total[bottom] > 0)).astype(float)

    return total.assign(
        relative_l2=np.sqrt(divided("distance", "reference_norm")),
        turned=divided("turned", "turning"),
        flipped=divided("flipped", "flipping"),
    )


def groups_of(run: Run, group: str, names: list[str]) -> dict[str, str]:
    """Tensor -> the block or the role that it belongs to."""
    if group == "role":
        roles = dict(zip(run.tensors()["tensor"], run.tensors()["role"], strict=True))
        return {name: str(roles.get(name, "unknown")) for name in names}
    return {name: block_of(name) for name in names}


def read(
    library: Library,
    run: Run,
    metric: str,
    source: str,
    group: str,
    steps: tuple[float, float] | None = None,
) -> Grid:
    """Layers (or blocks, or roles) x steps of a measure of drift, remembered until the run grows."""
    span = None if steps is None or source != REFERENCE else (max(int(steps[0]), 0), int(steps[1]) + 1)

    def make() -> Grid:
        frame = frame_of(library, run, source, span)
        if len(frame) and group != "layer":
            frame = grouped(frame, groups_of(run, group, list(frame["tensor"].unique())))
        if frame.empty:
            return build(frame, np.array([]))
        values = frame[metric].to_numpy(dtype=float)
        bad = ~np.isfinite(frame["distance"].to_numpy(dtype=float))
        return build(frame, np.where(np.isfinite(values), values, np.nan), bad)

    return library.memo(run, ("drift", metric, source, group, span), make)


class Rank(NamedTuple):
    """A layer against those of its role: `score` is a robust z, `times` in medians of the role."""

    tensor: str
    role: str
    moved: float
    median: float
    times: float
    score: float


def ranks(run: Run, grid: Grid, column: int) -> list[Rank]:
    """Layers that moved at one step, the one furthest above its role first.

    The score is 0.6745 (x - median) / MAD of log10 relative L2 within a role (Iglewicz and Hoaglin 1993).
    """
    table = run.tensors().drop_duplicates("tensor").set_index("tensor")["role"].reindex(grid.names)
    moved = pd.Series(grid.values[:, column], grid.names)
    found: list[Rank] = []
    for role, names in table.groupby(table, sort=False).groups.items():
        values = moved[list(names)]
        values = values[values > 0]
        if len(values) < LEAST_OF_ROLE:
            continue
        x = np.log10(values)
        spread = max(float(np.median(np.abs(x - np.median(x)))), LEAST_SPREAD)
        scores = 0.6745 * (x - np.median(x)) / spread
        middle = float(values.median())
        found += [
            Rank(str(name), str(role), float(value), middle, float(value) / middle, float(score))
            for name, value, score in zip(values.index, values, scores, strict=True)
        ]
    return sorted(found, key=lambda rank: -rank.score)


def block_sentence(blocks: Grid, column: int) -> str:
    """How far early, middle and late blocks have moved, in words; "" with fewer than three blocks."""
    numbered = [i for i, name in enumerate(blocks.names) if name.rpartition(".")[2].isdigit()]
    moved = {i: blocks.values[i, column] for i in numbered if np.isfinite(blocks.values[i, column])}
    if len(moved) < 3:
        return ""
    rows = sorted(moved, key=lambda i: natural(blocks.names[i]))
    third = max(len(rows) // 3, 1)
    early, late = rows[:third], rows[-third:]
    first, last = (float(np.median([moved[i] for i in part])) for part in (early, late))
    most = max(rows, key=lambda i: moved[i])

    def named(part: list[int]) -> str:
        ends = blocks.names[part[0]], blocks.names[part[-1]]
        return ends[0] if ends[0] == ends[1] else f"{ends[0]} to {ends[1].rpartition('.')[2]}"

    return (
        f"At step {integer(blocks.steps[column])} the last blocks ({named(late)}) moved by {share(last)} "
        f"of their reference's length, the first ones ({named(early)}) by {share(first)}; furthest: "
        f"{blocks.names[most]}, {share(moved[most])}."
    )


def rank_cells(rank: Rank) -> tuple[str, str, str, str]:
    """Role, how far, how many times the role's median, score: as text."""
    return rank.role, share(rank.moved), f"{number(rank.times)} ×", f"{rank.score:+.1f}".replace("-", "−")
