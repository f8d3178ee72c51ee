"""What the map of Gradient flow can show: the quantities, and how each is read from a run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa

from .figures.depth import he, xavier
from .figures.grid import Grid, build
from .figures.profile import Guide

if TYPE_CHECKING:
    from ..monitor import Run
    from .queries import Library

Read = Callable[[pd.DataFrame], np.ndarray]
#: At most about so many rows of the log are read for a map; more captures come as roll-ups.
ROWS, LEAST_POINTS, MOST_POINTS = 600_000, 600, 20_000
#: Families of roles: mixing them hides what depth does to one of them.
ROLES = {
    "matrix": ("matrix", "conv", "output", "lora_a", "lora_b"),
    "bias": ("bias",),
    "norm": ("norm_gain", "norm_bias"),
    "embedding": ("embedding",),
}
ROLE_WORDS = {
    "all": "All",
    "matrix": "Matrices",
    "bias": "Biases",
    "norm": "Norms",
    "embedding": "Embeddings",
}


@dataclass(frozen=True)
class Quantity:
    """A quantity of the heat map.

    `kind` names the rows it is read from, `columns` those of `Run.stats`, `read` makes one number of a row.
    `over`: the norm of that kind divides it. `stored`: it is not in `stats` but among the values per unit.
    `flow`: its slope over depth means something, "back" from the output to the input.
    """

    title: str
    group: str
    kind: str
    columns: tuple[str, ...]
    read: Read
    explain: str
    log: bool = True
    over: str = ""
    stored: bool = False
    flow: str = ""
    guides: str = ""
    good: tuple[float, ...] = ()


def _column(name: str) -> Read:
    return lambda frame: frame[name].to_numpy(dtype=float)


def _dead(frame: pd.DataFrame) -> np.ndarray:
    with np.errstate(divide="ignore", invalid="ignore"):
        return 1 - frame["active_units"].to_numpy(dtype=float) / frame["units"].to_numpy(dtype=float)


def _share(*names: str) -> Read:
    return lambda frame: (
        sum((frame[name] for name in names), start=0.0 * frame["count"]).to_numpy(float)
        / frame["count"].to_numpy(float)
    )


def _rms(frame: pd.DataFrame) -> np.ndarray:
    """The largest root mean square of one capture."""
    finite = (frame["count"] - frame["nans"] - frame["infs"]).to_numpy(float) / frame["captures"].to_numpy(
        float
    )
    return frame["norm_max"].to_numpy(float) / np.sqrt(np.where(finite > 0, finite, np.nan))


def _decay(frame: pd.DataFrame) -> np.ndarray:
    """The share of the update's squared length that points against the weight."""
    along, rest = (frame[name].to_numpy(float) for name in ("parallel", "perpendicular"))
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.where(along < 0, along**2, 0.0 * along) / (along**2 + rest**2)


def _stats(
    title: str, group: str, kind: str, columns: str, read: Read, explain: str, **more: Any
) -> Quantity:
    return Quantity(title, group, kind, tuple(columns.split()), read, explain, **more)


QUANTITIES = {
    "gradient_norm": _stats(
        "gradient norm", "Gradient", "gradient", "norm_max", _column("norm_max"),
        "A healthy network changes slowly from top to bottom.", flow="back",
    ),
    "gradient_rms": _stats(
        "gradient scale", "Gradient", "gradient", "norm_max captures", _rms,
        "Root mean square of the elements: does not grow with the size of a layer.", flow="back",
    ),
    "gradient_share": _stats(
        "gradient over weight", "Gradient", "gradient", "norm_max", _column("norm_max"),
        "|gradient| ÷ |weight|: what layers of different scale have in common.", over="weight",
    ),
    "zeros": _stats(
        "zero gradient share", "Gradient", "gradient", "zeros", _share("zeros"),
        "Elements whose gradient is exactly zero.", log=False,
    ),
    "nonfinite": _stats(
        "non-finite gradient share", "Gradient", "gradient", "", _share("nans", "infs"),
        "NaN and infinite elements.", log=False,
    ),
    "update_ratio": _stats(
        "update ratio", "Update", "update", "ratio_max", _column("ratio_max"),
        "|update| ÷ |weight|: about 10⁻³ is customary (the dotted line).", guides="ratio",
    ),
    "update_norm": _stats(
        "update norm", "Update", "update", "norm_max", _column("norm_max"),
        "How far a step moves each tensor.",
    ),
    "decay_share": _stats(
        "decay share of the update", "Update", "update", "parallel perpendicular", _decay,
        "The share of the update's squared length that only shrinks the weight: weight decay, mostly.",
        log=False,
    ),
    "lost_share": _stats(
        "update lost to rounding", "Update", "update", "lost_share", _column("lost_share"),
        "Elements that did not change although their gradient is not zero: the step is below the weight's "
        "precision.",
        log=False,
    ),
    "weight_norm": _stats(
        "weight norm", "Weight", "weight", "norm_max", _column("norm_max"),
        "Steady growth can end in instability. Dotted: He's, dashed: Xavier's expectation for the start.",
        guides="norm",
    ),
    "weight_rms": _stats(
        "weight scale", "Weight", "weight", "norm_max captures", _rms,
        "Root mean square of the elements. Dotted: He's √(2/inputs), dashed: Xavier's √(2/(inputs+outputs)), "
        "both for the start.", guides="rms",
    ),
    "activation_rms": _stats(
        "activation rms", "Activation", "activation", "norm_max captures", _rms,
        "Should neither shrink nor grow with depth: 1 (the dotted line) is what initialisation aims at.",
        flow="forward", guides="one",
    ),
    "dead_units": _stats(
        "dead unit share", "Activation", "activation", "units active_units", _dead,
        "Units whose output was zero for every sample of the capture, or of all captures of a cell.",
        log=False,
    ),
    "activation_zeros": _stats(
        "zero activation share", "Activation", "activation", "zeros", _share("zeros"),
        "Outputs that are exactly zero: about half behind a ReLU.", log=False,
    ),
    "saturated": Quantity(
        "saturated share", "Activation", "saturated_share", (), _column("value"),
        "Outputs at the flat ends of tanh, sigmoid and their like, where no gradient passes.", log=False,
        stored=True,
    ),
    "activation_nonfinite": _stats(
        "non-finite activation share", "Activation", "activation", "", _share("nans", "infs"),
        "NaN and infinite outputs.", log=False,
    ),
    "attention_entropy": _stats(
        "attention entropy", "Attention", "attention_entropy", "mean", _column("mean"),
        "From 0 (every query looks at one key) to 1 (at all alike).", log=False,
    ),
    "attention_logit": _stats(
        "largest attention logit", "Attention", "attention_logit", "max", _column("max"),
        "Growth without end comes before attention collapses.",
    ),
    "rms_ratio": _stats(
        "gradient over Adam's divisor", "Optimizer", "second_moment", "rms_ratio", _column("rms_ratio"),
        "√mean(g² ÷ v): about 1. Far more: the second moment lags behind the gradient; far less: it "
        "remembers a larger one.", guides="one",
    ),
    "below_epsilon": _stats(
        "share below Adam's epsilon", "Optimizer", "second_moment", "below_epsilon", _column("below_epsilon"),
        "Elements with √v < ε: there Adam is plain gradient descent, with steps too small.", log=False,
    ),
    "momentum_norm": _stats(
        "momentum norm", "Optimizer", "momentum", "norm_max", _column("norm_max"),
        "The optimizer's running mean of the gradient.", flow="back",
    ),
}  # fmt: skip
DEFAULT = "gradient_norm"
#: Why a run may hold no rows of a kind.
ABSENT = {
    "activation": "no activations were captured",
    "saturated_share": "no tanh, sigmoid or the like was seen",
    "update": "updates were not captured",
    "attention_entropy": "no attention was seen",
    "attention_logit": "no attention was seen",
    "second_moment": "no Adam-like optimizer",
    "momentum": "no momentum",
}


def known(key: str) -> str:
    """The key of a quantity; the default for anything else (a URL is user input)."""
    return key if key in QUANTITIES else DEFAULT


def absent(run: Run, key: str) -> str:
    """Why this run cannot show a quantity; "" when it can."""
    quantity = QUANTITIES[key]
    held = run.kinds()
    if quantity.stored:
        return "" if quantity.kind in run.stored_kinds() else ABSENT[quantity.kind]
    missing = [kind for kind in (quantity.kind, quantity.over) if kind and kind not in held]
    return ABSENT.get(missing[0], f"no {missing[0]} rows") if missing else ""


def read(library: Library, run: Run, key: str, steps: tuple[float, float] | None = None) -> Grid:
    """The matrix of a quantity over the whole run or a range of steps, remembered until the run grows.

    Full resolution as long as that takes no more than about `ROWS` rows: a narrower range shows more.
    """
    whole = library.memo(run, ("map", key, None), lambda: _read(run, QUANTITIES[key], None))
    if steps is None or not whole.coarse:
        return whole
    span = whole.steps[-1] - whole.steps[0] if len(whole.steps) else 0
    if steps[0] <= whole.steps[0] and steps[1] >= whole.steps[0] + span:
        return whole
    pad = 0.02 * (steps[1] - steps[0])
    wanted = (max(int(steps[0] - pad), 0), int(steps[1] + pad) + 1)
    part = library.memo(run, ("map", key, wanted), lambda: _read(run, QUANTITIES[key], wanted))
    return part.aligned(whole.names)


def _read(run: Run, quantity: Quantity, steps: tuple[int, int] | None) -> Grid:
    if quantity.stored:
        frame = run.unit_means(quantity.kind)
        if steps is not None:
            frame = frame[frame["step"].between(*steps)]
        return build(frame, frame["value"].to_numpy(float))
    rows = max(len(run.tensors()), len(run.modules()), 1)
    points = min(max(ROWS // rows, LEAST_POINTS), MOST_POINTS)
    wanted = list(dict.fromkeys(["step", "tensor", "count", "nans", "infs", "captures", *quantity.columns]))
    frame = run.stats(quantity.kind, None, wanted, steps=steps, max_points=points)
    if frame.empty:
        return build(frame, np.array([]))
    lost = (frame["nans"] + frame["infs"]).to_numpy()
    values, bad = quantity.read(frame), lost > 0
    nothing = quantity.log & (lost >= frame["count"].to_numpy())  # a norm of no finite element is no norm
    values = np.where(np.isfinite(values) & ~nothing, values, np.nan)
    pa.default_memory_pool().release_unused()  # tens of megabytes that the next read may be minutes away from
    grid = replace(build(frame, values, bad), coarse=bool((frame["captures"] > 1).any()))
    return _divided(grid, _read(run, QUANTITIES[f"{quantity.over}_norm"], steps)) if quantity.over else grid


def _divided(top: Grid, bottom: Grid) -> Grid:
    """One grid over another, at the steps of the first."""
    if top.empty or bottom.empty:
        return top.rows([])
    below = bottom.aligned(top.names)
    column = np.clip(np.searchsorted(below.steps, top.steps, side="right") - 1, 0, None)
    with np.errstate(divide="ignore", invalid="ignore"):
        values = top.values / below.values[:, column]
    return replace(
        top, values=np.where(np.isfinite(values), values, np.nan), bad=top.bad | below.bad[:, column]
    )


def guides(run: Run, key: str, names: list[str]) -> list[Guide]:
    """The lines that a profile of these rows is compared with."""
    which = QUANTITIES[key].guides
    if which in ("ratio", "one"):
        value, name = (1e-3, "10⁻³") if which == "ratio" else (1.0, "1")
        return [Guide(name, np.full(len(names), value))]
    if not which:
        return []
    table = run.tensors().drop_duplicates("tensor").set_index("tensor").reindex(names)
    matrices = table["role"].isin(["matrix", "conv", "output"])
    size = np.sqrt(table["elements"].to_numpy(float)) if which == "norm" else np.ones(len(names))
    found = []
    for name, rule, dash in (("He", he, "dot"), ("Xavier", xavier, "dash")):
        std = [
            rule(shape) if is_matrix else np.nan
            for shape, is_matrix in zip(table["shape"], matrices, strict=True)
        ]
        found.append(Guide(name, np.array(std, dtype=float) * size, dash))
    return found


def of_role(run: Run, names: list[str], family: str) -> list[int]:
    """Positions of the names whose role is of this family. Names of modules have none: all of them."""
    roles = dict(zip(run.tensors()["tensor"], run.tensors()["role"], strict=True))
    if family not in ROLES or not any(name in roles for name in names):
        return list(range(len(names)))
    return [i for i, name in enumerate(names) if roles.get(name) in ROLES[family]]


def families(run: Run) -> dict[str, str]:
    """The families of roles that this run has, for a control."""
    roles = set(run.tensors()["role"])
    return {key: word for key, word in ROLE_WORDS.items() if key == "all" or roles & set(ROLES[key])}
