"""Sizes that are wrong from the start or drift away: inputs, initial weights, logits, penalties."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .history import MATRICES, Floats, History, nanmedian
from .outcome import outcome, predictor, sums_to_zero
from .rates import held, largest_rate
from .registry import detector

#: Inputs whose root mean square is this far above 1 are not normalised.
HUGE_INPUT = 30.0
#: Logits of a fresh network are of order 1; beyond this they make the first loss.
LARGE_OUTPUT = 5.0
#: A first loss so many times what the training reaches.
FALLEN = 20.0
#: Gain of a layer, rms(w) sqrt(fan_in): about 0.6 (torch's default) to 1.4 (He). Below this a stack of layers
#: is mute.
SMALL_GAIN = 0.1
#: A typical gain above this is large: it counts where activations were not captured.
LARGE_GAIN = 3.0
#: A first cross-entropy so many times log(classes) is made by the weights (TheDeepChecker: 2).
START_OVER_TRIVIAL = 2.5
#: Logits of this size, and so many times that of a quarter of the run, run away.
LARGE_LOGITS, LOGITS_GREW = 10.0, 3.0
#: A mean of all logits of this size: healthy ones stay near 0, where they began.
LARGE_OFFSET = 3.0
#: Weight decay over gradient; what is left of the weights' first size; and of the first loss.
PULL, SHRUNK, STILL_HIGH = 0.3, 0.7, 0.4


def input_size(history: History) -> tuple[str | None, Floats]:
    """The first linear or convolutional layer, and the root mean square of its inputs at every capture.

    Estimated from sums: rms(output) / (rms(weight) sqrt(fan_in)), exact for weights that are independent of
    the inputs.
    """
    depth = history.tensors["depth"]
    embedded = history.names("embedding")
    if not history.captures:
        return None, np.empty(0)
    for name in history.names(*MATRICES):
        module = history.of(name, "module")
        shape = history.of(name, "shape")
        if history.modules.get(module) not in ("Linear", "Conv1d", "Conv2d", "Conv3d"):
            return None, np.full(history.captures, np.nan)
        if any(depth[e] < depth[name] for e in embedded):
            return None, np.full(history.captures, np.nan)
        weight = history.table("weight", "rms", (name,))[:, 0].copy()
        weight[1:], weight[0] = (
            weight[:-1].copy(),
            history.initial("rms", (name,))[0],
        )  # the forward pass came before the step
        with np.errstate(divide="ignore", invalid="ignore"):
            moved, ratio = (history.table("update", column, (name,))[:, 0] for column in ("rms", "ratio"))
            before = np.where(
                ratio > 0, moved / ratio, weight
            )  # exact; the capture before may be many steps ago
            weight = np.where(np.isfinite(before), before, weight)
            size = history.table("activation", "rms", (module,))[:, 0] / (
                weight * math.sqrt(math.prod(shape[1:]))
            )
        return module, size
    return None, np.full(history.captures, np.nan)


def first_outputs(history: History) -> list[float]:
    """Root mean squares, before the first step, of what may be predictions; empty without activations.

    The layer that makes the predictions as far as the log tells, and those with the fewest units: a head may
    be defined anywhere, and there may be several.
    """
    last = predictor(history)
    if last is None or history.captures == 0 or history.steps[0] > 0:
        return []
    shapes = {n: history.of(n, "shape") for n in history.names(*MATRICES)}
    rows = {n: int(shape[0]) for n, shape in shapes.items() if len(shape)}
    heads = [last, *(n for n in rows if n != last and rows[n] == min(rows.values()))]
    sizes = history.table("activation", "rms", tuple(history.of(n, "module") for n in heads))[0]
    return [float(v) for v in sizes if np.isfinite(v)]


def starts_far_above(history: History) -> tuple[bool, bool]:
    """Whether the first loss is a cross-entropy far above that of a guess, and whether it is far above what
    the training reaches.
    """
    facts, last = outcome(history), predictor(history)
    level = facts.trivial
    if math.isnan(level) and last is not None and sums_to_zero(history, last):
        level = math.log(max(int(history.of(last, "shape")[0]), 2))  # a cross-entropy that starts far above
    return facts.initial > START_OVER_TRIVIAL * level, facts.best < facts.initial / FALLEN


def made_by_output(history: History) -> float:
    """The size of the first predictions when they make the first loss, which is far too large; else 0."""
    facts = outcome(history)
    guess, fell = starts_far_above(history)
    for size in first_outputs(history) if facts.points >= 20 else ():
        fits = size > LARGE_OUTPUT and (
            0.3 < facts.initial / (size * size) < 3 or 0.3 < facts.initial / size < 3
        )
        if size > LARGE_OUTPUT and (guess or (fits and fell)):
            return size
    return 0.0


@detector("bad_init_scale")
def bad_init_scale(history: History) -> Finding | None:
    """Initial weights so large, or so small, that training has to undo them first.

    Too large: the predictions before the first step have a root mean square above 5 and make the first loss:
    it is 2.5 times log(classes) (TheDeepChecker: |L0 - log C| > log C), or as large as the predictions (or
    their square) and 20 times what is reached. Without activations: the typical gain rms(w)
    sqrt(fan_in) is above 3 and the first loss so large; weaker evidence. Too small: the typical hidden matrix
    has a gain below 0.1, and the loss has stalled. Told apart: inputs that are far too large
    (`data_fault`), targets that are not normalised (the predictions are small), small weights between
    normalisation layers (they train well), pretrained models.
    """
    if history.resumed:
        return None
    names = history.names(*MATRICES)
    shapes = [history.of(n, "shape") for n in names]
    fan = np.array([math.prod(s[1:]) if len(s) > 1 else math.nan for s in shapes])  # unknown in imported runs
    gain = history.initial("rms", names) * np.sqrt(fan)
    return _too_large(history, names, gain) or _too_small(history, names, gain)


def _too_large(history: History, names: tuple[str, ...], gain: Floats) -> Finding | None:
    facts = outcome(history)
    size = made_by_output(history)
    seen = bool(first_outputs(history))
    by_gain = (
        not seen and facts.points >= 20 and nanmedian(gain) > LARGE_GAIN and any(starts_far_above(history))
    )
    module, inputs = input_size(history)
    if not (size or by_gain) or (module is not None and inputs.size and inputs[0] > HUGE_INPUT):
        return None
    order = [int(i) for i in np.argsort(-np.nan_to_num(gain))]
    what = f"the first predictions are of size {size:.3g}" if seen else "activations were not captured"
    return history.finding(
        "bad_init_scale",
        "critical" if facts.bad else "warning",
        f"The initial weights are too large: {what} and the first loss is {facts.initial:.4g}; the largest "
        f"is {names[order[0]]} with a gain of {gain[order[0]]:.3g}.",
        first=history.steps[0],
        layers=[names[i] for i in order if gain[i] > 2],
        evidence={
            **({"first_output": size} if seen else {"typical_gain": nanmedian(gain)}),
            "threshold": LARGE_OUTPUT if seen else LARGE_GAIN,
            "loss_start": facts.initial,
            "gain": float(gain[order[0]]),
        },
        advice="Use He initialisation (ReLU) or Xavier (tanh), a gain of about 1 to 1.4; scale residual "
        "branches by 1/sqrt(2 depth).",
        confidence=0.85 if seen else 0.6,
    )


def _too_small(history: History, names: tuple[str, ...], gain: Floats) -> Finding | None:
    facts = outcome(history)
    hidden = [i for i, n in enumerate(names) if history.role(n) != "output" and gain[i] > 0]
    if len(hidden) < 2 or not facts.stalled or not np.median(gain[hidden]) < SMALL_GAIN:
        return None
    order = sorted(hidden, key=lambda i: gain[i])
    return history.finding(
        "bad_init_scale",
        "critical",
        "The initial weights are too small: the typical gain of a hidden matrix is "
        f"{np.median(gain[hidden]):.2g} (the smallest "
        f"is {names[order[0]]}), so that signals and gradients fade with depth, and {facts.words()}.",
        first=history.steps[0],
        layers=[names[i] for i in order if gain[i] < SMALL_GAIN],
        evidence={"gain": float(np.median(gain[hidden])), "threshold": SMALL_GAIN},
        advice="Use He initialisation (ReLU) or Xavier (tanh), a gain of about 1 to 1.4.",
        confidence=0.8,
    )


@detector("logit_drift")
def logit_drift(history: History) -> Finding | None:
    """The logits of a classifier run away.

    While the loss diverges or is back at its start: root mean square of the predictions above 10 and three
    times what it was at a quarter of the run; or, for a softmax, which does not feel what is added to all its
    logits, their mean above 3, larger than their spread and three times that of a quarter (z-loss keeps log Z
    near 0, arXiv 2309.14322). Told apart: a classifier that grows confident, whose loss falls.
    """
    facts = outcome(history)
    name = predictor(history)
    if name is None or not facts.bad or not math.isfinite(facts.trivial) or history.captures < 8:
        return None
    module = history.of(name, "module")
    size, mean, spread = (
        np.abs(history.table("activation", column, (module,))[:, 0]) for column in ("rms", "mean", "std")
    )
    grown = _grown(history, size, LARGE_LOGITS)
    if grown is None:
        quarter = max(3, history.captures // 8)
        if not nanmedian(mean[-quarter:]) > nanmedian(spread[-quarter:]):
            return None
        size = mean
        grown = _grown(history, mean, LARGE_OFFSET)
    if grown is None:
        return None
    early, late = grown
    begin = int(np.flatnonzero(np.nan_to_num(size) > 2 * early)[0]) if early > 0 else 0
    shifted = size is mean
    return history.finding(
        "logit_drift",
        "critical",
        f"The predictions of {module} {'were all shifted' if shifted else 'grew'} from {early:.3g} to "
        f"{late:.3g}, and {facts.words()}.",
        first=history.steps[begin],
        layers=[name],
        evidence={
            "logit_mean" if shifted else "logit_rms": late,
            "threshold": LARGE_OFFSET if shifted else LARGE_LOGITS,
            "at_a_quarter": early,
        },
        advice="Add a z-loss (1e-4), check the signs of penalty terms, use weight decay on the last "
        "layer, lower the learning rate.",
        confidence=0.7,
    )


def _grown(history: History, size: Floats, least: float) -> tuple[float, float] | None:
    """The size at a quarter of the run and at its end, when it has grown beyond `least` and threefold."""
    quarter = history.captures // 4
    early, late = nanmedian(size[max(0, quarter - 2) : quarter + 3]), nanmedian(size[-max(3, quarter // 2) :])
    return (early, late) if late > least and late > LOGITS_GREW * early else None


@detector("over_regularised")
def over_regularised(history: History) -> Finding | None:
    """Weight decay holds the weights so small that the training loss stays high.

    The decay is at least 0.3 of the gradient (an L2 penalty: decay x |w| over |g|) or of the update (AdamW:
    rate x decay x |w| over |dw|) in most matrices over the second half of the run, the weights have shrunk
    (median below 0.7 of their first size), and the loss is still above 40 % of its start. Told apart: strong
    decay in a training that succeeds, and decay that is all that moves a layer (no gradient arrives).
    """
    facts = outcome(history)
    names = history.names(*MATRICES)
    decay, pull = _pull(history, names)
    if not decay > 0 or facts.points < 20 or facts.end > 1.2 * facts.initial or history.captures < 8:
        return None
    half = history.captures // 2
    ratio = nanmedian(pull[half:], axis=0)
    weight = nanmedian(history.table("weight", "norm", names)[half:], axis=0)
    with np.errstate(divide="ignore", invalid="ignore"):
        shrunk = weight / history.initial("norm", names)
    pulled = np.nan_to_num(ratio)
    if (
        np.mean((pulled > PULL) & (pulled < 10)) < 0.6
        or not nanmedian(shrunk) < SHRUNK
        or facts.end < STILL_HIGH * facts.initial
    ):
        return None
    return history.finding(
        "over_regularised",
        "warning",
        f"Weight decay {decay:.3g} pulls with {nanmedian(ratio):.2g} of the strength of the gradient: "
        "the weights shrank to "
        f"{nanmedian(shrunk):.2g} of their first size, and the loss is still {facts.end:.4g} (start "
        f"{facts.initial:.4g}).",
        first=history.steps[0],
        evidence={
            "decay_over_gradient": float(nanmedian(ratio)),
            "threshold": PULL,
            "weights": float(nanmedian(shrunk)),
        },
        advice="Divide the weight decay by 10.",
        confidence=0.75,
    )


def _pull(history: History, names: tuple[str, ...]) -> tuple[float, Floats]:
    """The largest weight decay, and its strength against the gradient (or AdamW's update) per capture and
    tensor.
    """
    groups = [
        (str(o.get("class")), g) for o in history.info.get("optimizers") or [] for g in o.get("groups", [])
    ]
    found = [
        (float(g["weight_decay"]), kind)
        for kind, g in groups
        if isinstance(g.get("weight_decay"), int | float)
    ]
    decay, kind = max(found, default=(0.0, ""))
    weight = history.table("weight", "norm", names)
    if kind == "AdamW":
        rate = largest_rate(history)
        against = history.table("update", "norm", names)
        weight = weight * (held(rate, history.steps)[:, None] if rate.step.size else np.nan)
    else:
        against = history.table("gradient", "norm", names)
    with np.errstate(divide="ignore", invalid="ignore"):
        return decay, np.where(against > 0, decay * weight / against, np.nan)
