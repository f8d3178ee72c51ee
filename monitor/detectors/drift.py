"""How far training moved from where it started, where that matters: fine-tuning."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping

import numpy as np

from ..budgets import covers
from ..findings import Finding
from .history import MATRICES, History, nanmedian, portion
from .registry import detector

#: A layer that moved by half of its size has lost much of what it knew.
FAR = 0.5
#: A layer that moved ten times as far as the typical layer.
UNEVEN = 10.0


ADVICE = (
    "Lower the learning rate (of these layers), freeze them, add L2-SP (a pull towards the reference) or use "
    "LoRA."
)


@detector("excessive_drift")
def excessive_drift(history: History) -> Finding | None:
    """Fine-tuning moved layers far from the pretrained weights.

    Relative distance |w - w0| / |w0| above `drift_limit` when the user gave one, for all layers or by name;
    else above 0.5 for a layer that is not the last one and was pretrained, when most layers moved so far, or
    this one ten times as far as the typical layer. Judged only when the reference is a pretrained state:
    given by the user, or a start whose weights are those of no usual initialisation. Told apart: training
    from scratch (drift is its purpose), a new head, LoRA's factors (of the weights that they adapt the
    effective change counts), resumed runs. When nobody named the reference and even the last layer was
    trained before, the run may simply go on with its own training: a remark.
    """
    limit = history.info.get("drift_limit")
    if not isinstance(limit, dict):
        return _all_alike(history, None if limit is None else float(limit), ())
    budgets = _budgets(history, limit)
    return _over_budget(history, limit, budgets) or _all_alike(history, None, budgets)


def _all_alike(history: History, limit: float | None, without: Collection[str]) -> Finding | None:
    names = tuple(
        n
        for n in _weights(history)
        if n not in without and (history.role(n) != "output" or limit is not None)
    )
    drift = history.table("drift", "relative_l2", names)
    if not names or not np.isfinite(drift).any():
        return None
    if limit is None:
        names, drift = _pretrained(history, names, drift)
        if not names:
            return None
    last = _last_known(drift)
    threshold = limit if limit is not None else FAR
    usual = float(nanmedian(last))
    over = [int(i) for i in np.argsort(-np.nan_to_num(last)) if last[i] > threshold]
    if not over:
        return None
    if limit is None and usual <= FAR and last[over[0]] < UNEVEN * usual:
        return None
    begin = int(np.flatnonzero((np.nan_to_num(drift[:, over]) > threshold).any(axis=1))[0])
    worst = over[0]
    goes_on = limit is None and history.info.get("reference") == "start" and _head_trained(history)
    return history.finding(
        "excessive_drift",
        "info" if goes_on else "warning",
        f"{names[worst]} moved by {portion(last[worst])} its size from the reference (typical layer: "
        f"{usual:.0%}); "
        f"{len(over)} of {len(names)} layers passed {threshold:.0%}, the first at step "
        f"{history.steps[begin]}.",
        first=_start_of(history, drift[:, worst], threshold),
        layers=[names[i] for i in over],
        evidence={"drift": float(last[worst]), "typical": usual, "threshold": threshold},
        advice=ADVICE,
        confidence=0.95 if limit is not None else 0.8,
    )


def _weights(history: History) -> tuple[str, ...]:
    """Matrices and embeddings that can move: the trainable ones, and frozen ones that an adapter moves."""
    table = history.tensors
    frozen = tuple(
        table.index[table["role"].isin([*MATRICES, "embedding"]) & ~table["trainable"].astype(bool)]
    )
    moved = (np.nan_to_num(history.table("drift", "relative_l2", frozen)) > 0).any(axis=0)
    return (
        *history.names(*MATRICES, "embedding"),
        *(name for name, hit in zip(frozen, moved, strict=True) if hit),
    )


def _budgets(history: History, limit: Mapping[str, float]) -> dict[str, str]:
    """Tensor -> the strictest budget that names it. A budget is that of matrices and embeddings where it
    names any: next to them biases and gains are small and move far."""
    main = set(_weights(history))
    found: dict[str, str] = {}
    for part in sorted(limit, key=lambda p: float(limit[p])):
        named = [
            str(tensor)
            for tensor, names in zip(history.tensors.index, history.tensors["names"], strict=True)
            if any(covers(part, name) for name in {str(tensor), *names})
        ]
        for name in [n for n in named if n in main] or named:
            found.setdefault(name, part)
    return found


def _over_budget(history: History, limit: Mapping[str, float], budgets: Mapping[str, str]) -> Finding | None:
    names = tuple(budgets)
    allowed = np.array([float(limit[part]) for part in budgets.values()])
    drift = history.table("drift", "relative_l2", names)
    if not names or not np.isfinite(drift).any():
        return None
    used = drift / allowed
    last = _last_known(used)
    over = [int(i) for i in np.argsort(-np.nan_to_num(last)) if last[i] > 1]
    if not over:
        return None
    worst = over[0]
    name, threshold, moved = names[worst], float(allowed[worst]), float(last[worst] * allowed[worst])
    since = int(history.steps[np.flatnonzero(np.nan_to_num(used[:, worst]) > 1)[0]])
    return history.finding(
        "excessive_drift",
        "warning",
        f"{name} moved by {moved:.2%} of its size from the reference, beyond its budget of {threshold:.2%} "
        f"({budgets[name]}) since step {since}; {len(over)} of {len(names)} tensors are beyond theirs.",
        first=_start_of(history, drift[:, worst], threshold),
        layers=[names[i] for i in over],
        evidence={"drift": moved, "threshold": threshold, "budget": budgets[name], "since": since},
        advice=ADVICE,
        confidence=0.95,
    )


def _last_known(drift: np.ndarray) -> np.ndarray:
    known = np.isfinite(drift)
    at = drift.shape[0] - 1 - np.argmax(known[::-1], axis=0)
    return np.where(known.any(axis=0), drift[at, np.arange(drift.shape[1])], math.nan)


def _start_of(history: History, course: np.ndarray, threshold: float) -> int:
    """The first capture at a tenth of the limit: where the layer set out, not where it passed the limit."""
    return int(history.steps[np.flatnonzero(np.nan_to_num(course) > 0.1 * threshold)[0]])


def _pretrained(
    history: History, names: tuple[str, ...], drift: np.ndarray
) -> tuple[tuple[str, ...], np.ndarray]:
    """The layers whose reference is a pretrained state."""
    reference = history.info.get("reference")
    if reference not in (None, "start"):
        return names, drift
    if reference is None or history.resumed:
        return (), drift
    modules = trained_modules(history)
    # A model is pretrained when most of its layers are; one odd initialisation is not enough.
    if not modules or np.mean(list(modules.values())) < 0.5:
        return (), drift
    fresh = {m for m, trained in modules.items() if not trained}
    keep = [i for i, n in enumerate(names) if history.of(n, "module") not in fresh]
    return tuple(names[i] for i in keep), drift[:, keep]


def trained_modules(history: History) -> dict[str, bool]:
    """Module -> its weights before the first step come from a training.

    Judged by what every initialisation leaves behind.
    torch starts a bias constant or within 1 / sqrt(fan_in), and the gains and biases of a normalisation
    constant. Training leaves neither so. Modules without a bias, and the last layer, are not judged.
    """
    table, found = history.tensors, {}
    names = tuple(table.index[table["role"].isin(["bias", "norm_gain", "norm_bias"])])
    low, high, std = (history.initial(column, names) for column in ("min", "max", "std"))
    facts = dict(zip(table.index, zip(table["module"], table["role"], strict=True), strict=True))
    outputs = set(table.loc[table["role"] == "output", "module"])
    shapes: dict[str, list] = {}
    for module, shape in zip(table["module"], table["shape"], strict=True):
        shapes.setdefault(module, []).append(shape)
    for i, name in enumerate(names):
        module, role = facts[name]
        if module in outputs or not np.isfinite(std[i]):
            continue
        trained = high[i] > low[i]
        if role == "bias" and trained:
            fans = [math.prod(shape[1:]) for shape in shapes[module] if len(shape) >= 2]
            trained = bool(fans) and max(-low[i], high[i]) > 1.01 / math.sqrt(max(min(fans), 1))
        found[module] = found.get(module, False) or bool(trained)
    return found


def _head_trained(history: History) -> bool:
    """The last matrix's bias comes from a training too, or cannot be told (then it is taken as trained)."""
    table = history.tensors
    module = table.loc[table["role"] == "output", "module"]
    if module.empty:
        return True
    mates = table[table["module"] == module.iloc[-1]]
    biases = tuple(mates.index[mates["role"] == "bias"])
    if not biases:
        return True
    bound = 1.01 / math.sqrt(max(1, math.prod(mates.loc[mates["role"] == "output", "shape"].iloc[-1][1:])))
    low, high = history.initial("min", biases)[0], history.initial("max", biases)[0]
    return bool(high > low and max(-low, high) > bound)
