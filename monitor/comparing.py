"""Two runs compared in depth: settings, results against seed noise, where they part, layers, findings."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

from .findings import plain
from .parting import TOLERANCE, Pair, Parting, pair, part
from .results import Metric, metrics, to_dict
from .wording import MISSING, integer, number

if TYPE_CHECKING:
    from .findings import Finding
    from .frames import Overview
    from .run import Run

#: Captures of all layers that are compared; of longer runs each holds several.
POINTS = 1024
#: Layers that are listed.
LAYERS = 10


class Layer(NamedTuple):
    """How far apart a layer is in both runs, and the numbers that tells it; None of sketches."""

    tensor: str
    a: float | None
    b: float | None
    apart: float


@dataclass(frozen=True)
class Comparison:
    """What `compare_runs` found; `comparison_text.markdown` writes it down.

    Attributes:
        a, b, repeats: names of the runs. settings: (setting, of A, of B), those that differ;
        same_settings: how many do not. sentence, matching: `parting` and what was compared, in words.
        layers: those furthest apart, furthest first; measure: of what.
        findings: (in A, in B), each None or its finding, where a problem is not of one severity in both.
    """

    a: str
    b: str
    repeats: tuple[str, ...]
    settings: list[tuple[str, ...]]
    same_settings: int
    metrics: list[Metric]
    parting: Parting
    sentence: str
    matching: str
    layers: list[Layer]
    measure: str
    findings: list[tuple[Finding | None, Finding | None]]
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """For JSON: plain types, None where a number is not finite."""
        found = {
            "version": 1,
            "a": self.a,
            "b": self.b,
            "repeats": list(self.repeats),
            "settings": [dict(zip(("setting", "a", "b"), row, strict=True)) for row in self.settings],
            "same_settings": self.same_settings,
            "metrics": [to_dict(one) for one in self.metrics],
            "parting": {**self.parting._asdict(), "sentence": self.sentence, "matching": self.matching},
            "layers": [layer._asdict() for layer in self.layers],
            "layers_measure": self.measure,
            "findings": [
                {"a": one and one.to_dict(), "b": other and other.to_dict()} for one, other in self.findings
            ],
            "notes": self.notes,
        }
        return plain(found)


def compare_runs(a: Run, b: Run, repeats: Sequence[Run] = ()) -> Comparison:
    """Everything in which two runs differ.

    Args:
        repeats: further runs of A's configuration with other seeds: what makes it possible to tell a
            difference from seed noise, by `results.prediction_interval`.
    """
    own = [settings(run) for run in (a, b)]
    differing, same = differences(own)
    tables = {kind: (_norms(a, kind), _norms(b, kind)) for kind in ("weight", "gradient")}
    parted, both = part(tables), pair(*tables["weight"])
    layers, measure = _far_layers(a, b, both)
    return Comparison(
        a.name,
        b.name,
        tuple(run.name for run in repeats),
        differing,
        same,
        metrics(a, b, repeats),
        parted,
        parting_sentence(parted, a.name, b.name),
        matching_note(both, a.name, b.name),
        layers,
        measure,
        _findings(a, b),
        _no_repeats(a, b, repeats),
    )


# Settings ---------------------------------------------------------------------------------------------------


def settings(run: Run) -> dict[str, str]:
    """What was chosen for a run, flattened: config, optimizers, seed, versions, labels, size."""
    info = run.info
    flat: dict[str, str] = {}
    for prefix, value in (("config", info.get("config")), ("optimizer", info.get("optimizers"))):
        _flatten(flat, prefix, value)
    for key in ("seed", "every", "git_commit", "host", "owner", "note"):
        if info.get(key) not in (None, ""):
            flat[key] = str(info[key])
    if info.get("tags"):
        flat["tags"] = " ".join(info["tags"])
    _flatten(flat, "version", info.get("versions"))
    tensors = run.tensors()
    flat["parameters"] = integer(tensors["elements"].sum()) if len(tensors) else "0"
    flat["tensors"] = str(len(tensors))
    return flat


def _flatten(flat: dict[str, str], prefix: str, value: Any) -> None:
    if isinstance(value, dict):
        for key, inner in value.items():
            _flatten(flat, f"{prefix}.{key}", inner)
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        for i, inner in enumerate(value):
            _flatten(flat, prefix if len(value) == 1 else f"{prefix}.{i}", inner)
    elif value is not None:
        flat[prefix] = value if isinstance(value, str) else json.dumps(value, default=str)


def differences(runs: Sequence[dict[str, str]]) -> tuple[list[tuple[str, ...]], int]:
    """(key, value in each run) where they differ, and how many are the same in all."""
    keys = list(dict.fromkeys(key for run in runs for key in run))
    rows = [
        (key, *(run.get(key, MISSING) for run in runs))
        for key in keys
        if len({run.get(key) for run in runs}) > 1
    ]
    return rows, len(keys) - len(rows)


def _no_repeats(a: Run, b: Run, repeats: Sequence[Run]) -> list[str]:
    """Which repeats are none: their configuration is not A's."""
    own = {key: value for key, value in settings(a).items() if _chosen(key)}
    notes = []
    for run in repeats:
        other = {key: value for key, value in settings(run).items() if _chosen(key)}
        rows, _ = differences([own, other])
        if rows:
            what = ", ".join(f"{key} ({one} against {two})" for key, one, two in rows[:3])
            more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
            notes.append(f"{run.name} is taken as a repeat of {a.name}, but differs in {what}{more}.")
    if str(b.path) in {str(run.path) for run in repeats}:
        notes.append(f"{b.name} is compared with runs that it is one of: leave it out of the repeats.")
    return notes


def _chosen(key: str) -> bool:
    """A repeat has this setting as A has it; not so its seed."""
    return key.startswith(("config.", "optimizer.")) and "seed" not in key.lower()


# Layers -----------------------------------------------------------------------------------------------------


def _norms(run: Run, kind: str) -> Overview:
    return run.overview(kind, "norm", POINTS)


def _far_layers(a: Run, b: Run, both: Pair) -> tuple[list[Layer], str]:
    """The layers that differ most at the end, by the best that both runs have logged: sketches of the weights
    at the same step, drift from one reference, norms."""
    common = sorted(set(a.anchors()) & set(b.anchors()))
    if common and common[-1] >= 0.9 * min(a.last_step, b.last_step):
        frame = a.drift_between(common[-1], common[-1], b)
        layers = [Layer(n, None, None, x) for n, x in zip(frame["tensor"], frame["relative_l2"], strict=True)]
        measure = f"distance of the weights at step {integer(common[-1])}, as a share of A's norm"
    elif a.info.get("reference") == b.info.get("reference") and (moved := _drifts(a, b)):
        layers, measure = moved, "drift from the reference at the end, |w − reference| ÷ |reference|"
    elif both.tensors and len(both.steps):
        ends = zip(both.tensors, both.a[:, -1].tolist(), both.b[:, -1].tolist(), strict=True)
        layers = [Layer(n, x, y, abs(x - y) / max(x, y)) for n, x, y in ends if x > 0 or y > 0]
        measure = f"weight norms at step {integer(both.steps[-1])}, apart as a share of the larger"
    else:
        return [], "no layer of one name was captured at about the same step"
    known = [layer for layer in layers if math.isfinite(layer.apart) and layer.apart > 0]
    return sorted(known, key=lambda layer: -layer.apart)[:LAYERS], measure


def _drifts(a: Run, b: Run) -> list[Layer]:
    ends = [
        run.drift(steps=(int(0.9 * run.last_step), None)).groupby("tensor", sort=False)["relative_l2"].last()
        for run in (a, b)
    ]
    one, two = (dict(zip(end.index, end.astype(float), strict=True)) for end in ends)
    return [Layer(str(n), one[n], two[n], abs(one[n] - two[n])) for n in one if n in two]


def parting_sentence(found: Parting, a: str, b: str) -> str:
    """What was found, in words."""
    if not found.compared:
        return (
            f"{a} and {b} have no layer of one name that was captured at about the same step, "
            "so where they part cannot be said."
        )
    if found.identical:
        return (
            f"{a} and {b} are identical: every weight norm and gradient norm is the same at all "
            f"{integer(found.compared)} common captures, until step {integer(found.identical_until)}."
        )
    limit = f"{number(100 * TOLERANCE)} %"
    if found.identical_until is None:
        start = f"{a} and {b} differ from the first common capture on."
    else:
        start = f"{a} and {b} are identical until step {integer(found.identical_until)}."
    if found.step is None:
        return f"{start} No norm of a layer differs by more than {limit} for good."
    return (
        f"{start} They part at step {integer(found.step)}, in {found.tensor}: from there on its {found.kind} "
        f"norm differs by more than {limit} for good ({number(found.a)} against {number(found.b)})."
    )


def matching_note(both: Pair, a: str, b: str) -> str:
    """Which layers have no counterpart, and how captures were matched."""
    parts = [f"{integer(len(both.tensors))} layers are in both."]
    for run, names in ((a, both.only_a), (b, both.only_b)):
        if names:
            more = f" and {integer(len(names) - 3)} more" if len(names) > 3 else ""
            parts.append(f"Only in {run}: {', '.join(names[:3])}{more}.")
    if len(both.steps) and not both.exact:
        pairs = integer(len(both.steps))
        parts.append(f"The runs were captured at different steps: {pairs} nearest pairs are compared.")
    return " ".join(parts)


# Findings ---------------------------------------------------------------------------------------------------


def _findings(a: Run, b: Run) -> list[tuple[Finding | None, Finding | None]]:
    """What only one of them has, or with another severity; B's first, as they are what is new."""
    one, two = ({f.problem: f for f in run.findings()} for run in (a, b))
    problems = [*two, *(p for p in one if p not in two)]
    found = [(one.get(problem), two.get(problem)) for problem in problems]
    return [(x, y) for x, y in found if x is None or y is None or x.severity != y.severity]
