"""Units that contribute nothing: dead, saturated, or copies of each other."""

from __future__ import annotations

import numpy as np

from ..findings import Finding
from .history import MATRICES, Bools, History, Ints, lasting, nanmedian
from .outcome import AGENT, outcome
from .registry import Unjudged, detector

#: Activation functions that put out exactly zero for whole half-lines.
ZERO_FLOOR = ("ReLU", "ReLU6", "Threshold", "Hardswish")
#: A layer is dead when more than half of its units are (SageMaker Debugger DeadRelu, TheDeepChecker).
DEAD = 0.5
#: A unit is dead when it was silent at so many captures at least, over so many samples: a unit that fires for
#: 1 % of the
#: samples (SageMaker Debugger's limit) is missed by 256 of them with a chance of 8 %.
LEAST_CAPTURES, LEAST_SAMPLES = 5, 256
#: Steps for which units must have been silent when the training does well: they may wake up again.
ASLEEP = 50


@detector("dead_units")
def dead_units(history: History) -> Finding | None:
    """More than half of a layer's units never fire any more.

    With activations: units of ReLU-like modules (by type) that put out zero for every sample of at least the
    last five captures and 256 samples, taken together: a sparse layer, whose units fire for some samples, is
    not dead. Without: rows of a matrix whose gradient is exactly zero at every one of those captures, while
    the layer after it does receive gradient; weaker evidence, because other things silence a row.
    `first_step` is where the dead half fell silent. Told apart: sparse layers, activation functions without
    an exact zero (GELU, LeakyReLU), a layer that is cut off, agents (a remark: their states are few).
    """
    if history.captures < LEAST_CAPTURES:
        return None
    modules = [m for m, kind in history.modules.items() if kind in ZERO_FLOOR]
    found = {m: dead for m in modules if (dead := _silent(history, "activation", m)) is not None}
    by_rows = not found
    if by_rows:
        found = _silent_rows(history)
    worst = {m: (share, step) for m, (share, step) in found.items() if share > DEAD}
    if not worst:
        if by_rows and modules and not found:
            raise Unjudged("neither activations nor gradient rows were captured often enough")
        return None
    facts = outcome(history)
    if not facts.bad:  # units that are silent for a while may wake up in a training that does well
        worst = {m: (share, since) for m, (share, since) in worst.items() if _long_ago(history, since)}
    if not worst or (by_rows and not facts.bad):
        return None
    return _dead_finding(history, worst, by_rows)


def _long_ago(history: History, step: int) -> bool:
    return history.last_step - step >= ASLEEP


def _dead_finding(history: History, worst: dict[str, tuple[float, int]], by_rows: bool) -> Finding:
    facts = outcome(history)
    # Forward, what comes after a dead layer may fall silent; backward, what comes before it. Whoever began it
    # is the first in the order of modules, but the last in the order of matrices.
    place = {m: -i if by_rows else i for i, m in enumerate(worst)}
    order = sorted(worst, key=lambda m: (worst[m][1], place[m] if by_rows else -worst[m][0], place[m]))
    share, step = worst[order[0]]
    weaker = (
        " (judged by gradient rows that are always zero: activations were not captured)" if by_rows else ""
    )
    return history.finding(
        "dead_units",
        "critical" if facts.bad else "info" if facts.lack == AGENT else "warning",
        f"{share:.0%} of the units of {order[0]} have been dead since step {step}, and "
        f"{facts.words()}{weaker}.",
        first=step,
        layers=order,
        evidence={"dead_share": share, "threshold": DEAD, "layers": len(order)},
        advice="Lower the learning rate, check for large negative biases, use LeakyReLU or GELU, or "
        "re-initialise the dead units.",
        confidence=0.6 if by_rows else 0.95,
    )


def _silent(history: History, kind: str, name: str) -> tuple[float, int] | None:
    """Share of units that are silent at the end, and the step since when more than half of the units are.

    None when there are too few captures or samples.
    """
    # Most layers are alive, which the last count of active units shows without reading which units they were.
    units, alive = (history.table(kind, column, (name,))[:, 0] for column in ("units", "active_units"))
    seen = np.flatnonzero(np.isfinite(alive))
    if (
        seen.size >= LEAST_CAPTURES
        and units[seen[-1]] >= 4
        and alive[seen[-1]] > (1 - DEAD) * units[seen[-1]]
    ):
        return float(1 - alive[seen[-1]] / units[seen[-1]]), int(history.steps[seen[-1]])
    steps, active = history.source.activity(kind, name)
    if steps.size < LEAST_CAPTURES or active.shape[1] < 4:
        return None
    window = max(LEAST_CAPTURES, min(20, steps.size // 4))
    if kind == "activation":
        samples = np.nan_to_num(history.table("activation", "samples", (name,))[:, 0])
        samples = samples[np.isin(history.steps, steps)]
        if samples.size == steps.size:
            enough = np.flatnonzero(np.cumsum(samples[::-1]) >= LEAST_SAMPLES)
            if not enough.size and active.any():  # a layer that never fired at all needs no statistics
                return None
            window = max(window, int(enough[0]) + 1) if enough.size else steps.size
    dead: Bools = ~np.any(active[-window:], axis=0)
    return float(dead.mean()), _since(steps, active, dead)


def _since(steps: Ints, active: Bools, dead: Bools) -> int:
    """The first step after which half of all units have fired for the last time."""
    if not dead.any():
        return int(steps[-1])
    ever = active[:, dead]
    last = np.where(ever.any(axis=0), active.shape[0] - np.argmax(ever[::-1], axis=0), 0)
    middle = np.sort(last)[min(last.size - 1, int(DEAD * active.shape[1]))]
    return int(steps[min(int(middle), steps.size - 1)])


def _silent_rows(history: History) -> dict[str, tuple[float, int]]:
    """Hidden matrices with silent rows. The first matrix after it that receives gradient must exist: else it
    is cut off.
    """
    names = history.names("matrix", "conv")
    found = {}
    for name in names:
        dead = _silent(history, "gradient", name)
        if dead is not None and (dead[0] < 1.0 or _bias_alive_after(history, name)):
            found[name] = dead
    return found


def _bias_alive_after(history: History, name: str) -> bool:
    """Some parameter defined after this matrix receives gradient: the layer is dead rather than cut off."""
    later = tuple(n for n in history.names() if history.of(n, "depth") > history.of(name, "depth") + 1)
    norms = history.table("gradient", "norm", later)[-LEAST_CAPTURES:]
    return bool((np.nan_to_num(norms) > 0).any())


#: Relative spread of a bias's gradient over the units below which all units learn the same.
SAME = 1e-3


@detector("symmetric_units")
def symmetric_units(history: History) -> Finding | None:
    """The units of a hidden layer are copies: they receive the same gradient and can never differ.

    A hidden layer's bias (at least four units) whose gradient is the same for every unit (relative spread
    below 1e-3) at every capture from the first on and still at the end. A layer without such a bias, when its
    weights started constant: every bucket of the histogram of its weights at the end holds a multiple of the
    number of units, as it does when all rows are the same. Told apart: zero-initialised branches (LoRA's B,
    last layers, zero-gamma) and constant layers whose units differ after the first steps.
    """
    if history.captures < LEAST_CAPTURES:
        return None
    spread = _equal_gradients(history)
    layers = {_matrix_of(history, bias): value for bias, value in spread.items()}
    for name in _constant_at_start(history):
        if name not in layers and _copied_rows(history, name):
            layers[name] = 0.0
    if not layers:
        return None
    facts = outcome(history)
    order = [n for n in history.names() if n in layers]
    by_rows = not spread
    how = "they started alike and are still alike" if by_rows else "all of them receive the same gradient"
    return history.finding(
        "symmetric_units",
        "critical" if facts.bad else "warning",
        f"The units of {order[0]} are copies of each other: {how} at every captured step, "
        f"and {facts.words()}.",
        first=history.steps[0],
        layers=order,
        evidence={
            "relative_spread": float(nanmedian(np.array(list(layers.values())))),
            "threshold": SAME,
            "layers": len(layers),
        },
        advice="Initialise the weights at random (the default of torch.nn), not with a constant.",
        confidence=0.85 if by_rows else 0.95,
    )


def _equal_gradients(history: History) -> dict[str, float]:
    """Biases whose gradient is the same for all units throughout, and its typical relative spread."""
    names = tuple(n for n in history.names("bias") if history.of(n, "elements") >= 4)
    if not names:
        return {}
    spread = history.table("gradient", "std", names)
    size = history.table("gradient", "rms", names)
    with np.errstate(divide="ignore", invalid="ignore"):
        relative = np.where(size > 0, spread / size, np.nan)
    same = np.nan_to_num(relative, nan=1.0) < SAME
    copies = [i for i in range(len(names)) if same[:, i].mean() > 0.9 and lasting(same[:, i]) is not None]
    return {names[i]: float(nanmedian(relative[:, i])) for i in copies}


def _constant_at_start(history: History) -> list[str]:
    """Matrices, but the last, that started at one number other than zero and take part in the training."""
    names = tuple(
        n for n in history.names(*MATRICES) if n != history.output and history.of(n, "shape")[0] >= 4
    )
    std, rms = (history.initial(column, names) for column in ("std", "rms"))
    reached = ~np.isnan(history.table("gradient", "norm", names)).all(axis=0)
    return [n for n, s, r, hit in zip(names, std, rms, reached, strict=True) if hit and s < SAME * r]


def _copied_rows(history: History, name: str) -> bool:
    """Whether the counts of the weights' last histogram are multiples of the number of units (of each gate).

    Rounding may part copies by their last bits, so that a few cross a bucket's edge: 2 % are forgiven, where
    chance would leave a quarter of a multiple in each bucket.
    """
    read = getattr(getattr(history.source, "run", history.source), "histogram", None)
    if read is None:
        return False
    counts = read("weight", name)["count"].to_numpy(np.int64)
    rows = int(history.of(name, "shape")[0])
    for units in (rows, rows // 3, rows // 4):  # GRU and LSTM stack three and four gates
        if units >= 4 and rows % units == 0 and counts.sum() > units:
            rest = np.minimum(counts % units, -counts % units)
            if rest.sum() <= 0.02 * counts.sum() and rest.mean() <= 0.05 * units:
                return True
    return False


def _matrix_of(history: History, bias: str) -> str:
    table = history.tensors
    same = table.index[(table["module"] == history.of(bias, "module")) & table["role"].isin(MATRICES)]
    return str(same[0]) if len(same) else bias


#: Mean square of tanh (or of 2 sigmoid - 1) above which most outputs sit at the ends: at least half of them
#: beyond 0.95.
SATURATED = 0.9


@detector("saturated_units")
def saturated_units(history: History) -> Finding | None:
    """tanh or sigmoid layers whose outputs sit at the ends, where no gradient passes.

    E[y^2] of a tanh, or of 2 y - 1 of a sigmoid, at least 0.9 in most captures from the first tenth of the
    run on, in at least half of the hidden tanh and sigmoid layers; or in any one of them when the training
    fails. Told apart: an output or a gate that becomes confident late in a good training, and the layer that
    makes the prediction.
    """
    last = list(history.modules)[-1:]
    modules = tuple(m for m, kind in history.modules.items() if kind in ("Tanh", "Sigmoid") and m not in last)
    if not modules or history.captures < LEAST_CAPTURES:
        return None
    index = _end_share(history, modules)
    known = ~np.isnan(index).all(axis=0)
    high = np.nan_to_num(index) >= SATURATED
    early = np.arange(history.captures) < max(LEAST_CAPTURES, history.captures // 10)
    facts = outcome(history)
    steady = high.mean(axis=0) > 0.5
    from_start = steady & (high[early].mean(axis=0) > 0.5)
    if not known.any() or not (from_start.sum() >= 0.5 * known.sum() or (facts.bad and steady.any())):
        return None
    chosen = np.flatnonzero(from_start if from_start.sum() >= 0.5 * known.sum() else steady)
    typical = nanmedian(index, axis=0)
    order = sorted(chosen, key=lambda i: -typical[i])
    first = min(int(history.steps[np.flatnonzero(high[:, i])[0]]) for i in order)
    return history.finding(
        "saturated_units",
        "critical" if facts.bad else "warning",
        f"{len(order)} of {int(known.sum())} tanh and sigmoid layers are saturated, first "
        f"{modules[order[0]]}: the mean square of "
        f"their outputs is {typical[order[0]]:.2f} of what is possible, and {facts.words()}.",
        first=first,
        layers=[modules[i] for i in order],
        evidence={"mean_square": float(typical[order[0]]), "threshold": SATURATED, "layers": len(order)},
        advice="Scale the initial weights down (Xavier), normalise the inputs, lower the learning rate, "
        "or use ReLU or GELU.",
    )


def _end_share(history: History, modules: tuple[str, ...]) -> np.ndarray:
    """E[y^2] for tanh and E[(2 y - 1)^2] for sigmoid, per capture and module."""
    mean, std = history.table("activation", "mean", modules), history.table("activation", "std", modules)
    sigmoid = np.array([history.modules[m] == "Sigmoid" for m in modules])
    return np.where(sigmoid, 4 * (std**2 + (mean - 0.5) ** 2), std**2 + mean**2)
