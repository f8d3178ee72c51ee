"""Step sizes: too large, too small, scheduled wrongly, or throttled."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .history import MATRICES, PERSISTENT, Floats, History, Series, nanmedian, persistent, portion
from .outcome import outcome
from .registry import detector

#: A step that changes a weight by a tenth of its size is too large (torchmortem, TheDeepChecker: 1e-1).
LARGE_UPDATE = 0.1
#: A step that changes no weight by 1/10,000 of its size hardly trains (TheDeepChecker: 1e-4).
SMALL_UPDATE = 1e-4
#: A typical matrix that changes by its own size between two captures, or reaches five times its size within
#: the first tenth of the run, has lost what it started from.
LEAPED, OVERGROWN = 1.0, 5.0
#: A loss that fell by less than a tenth: the training is slow.
SLOW = 0.1
#: A rate that rises tenfold in one step jumps; one that is zero for a tenth of the run (20 steps at least)
#: ended too early.
JUMP, IDLE, LEAST_IDLE = 10.0, 0.1, 20
#: Share of the gradient norm that clipping leaves.
CLIPPED = 0.1
#: Adam's eps over the root mean square gradient.
EPS_OVER_GRADIENT = 3.0


def update_ratios(history: History, names: tuple[str, ...]) -> Floats:
    """|update| / |weight before| per capture and tensor.

    Weights that are still near zero (LoRA's B, zero-initialised layers) are NaN: their ratio says nothing.
    They are below a tenth of their usual size, and small for their shape: weights that blow up were neither.
    """
    ratio = history.table("update", "ratio", names).copy()
    norm = history.table("weight", "norm", names)
    gain = history.table("weight", "rms", names) * np.sqrt(fan_in(history, names))
    ratio[(norm < 0.1 * nanmedian(norm, axis=0)) & ~(gain > 0.1)] = np.nan
    ratio[~np.isfinite(ratio)] = np.nan
    ratio[history.skipped] = np.nan
    return ratio


def fan_in(history: History, names: tuple[str, ...]) -> Floats:
    """Inputs that each output of a matrix sums over, (names,); at least 1."""
    shapes = [history.of(n, "shape") if n in history.tensors.index else [] for n in names]
    return np.array([max(1.0, float(np.prod(shape[1:]))) for shape in shapes])


def largest_rate(history: History) -> Series:
    """The learning rate of the fastest group at every step where it was logged (when one changes)."""
    names = [n for n in history.source.scalar_names() if n == "lr" or n.startswith("lr/")]
    series = [history.scalar(n) for n in names]
    if not series:
        return Series(np.empty(0, np.int64), np.empty(0))
    steps = np.unique(np.concatenate([s.step for s in series]))
    filled = np.stack([held(s, steps) for s in series])
    return Series(steps, np.nanmax(np.where(np.isfinite(filled), filled, 0.0), axis=0))


def held(series: Series, steps: np.ndarray) -> Floats:
    """The last value at or before each step; NaN before the first."""
    at = np.searchsorted(series.step, steps, side="right") - 1
    return np.where(at >= 0, series.value[np.maximum(at, 0)], np.nan)


@detector("learning_rate_too_high")
def learning_rate_too_high(history: History) -> Finding | None:
    """Steps so large that the training fails.

    The update ratio |dw| / |w| of the typical matrix is at least 0.1 at three consecutive captures (or the
    weights moved by more than their own size between two captures), and the loss diverges, does not fall, or
    is no longer finite. Large steps alone are no alarm: Adam's first steps on small weights are large and
    harmless. Told apart: a run that learnt well for long and breaks without a change of the learning rate
    (`loss_spike`, `exploding_gradients`), a jump of the schedule (`schedule_fault`).
    """
    facts = outcome(history)
    names = history.names(*MATRICES)
    if not names or history.captures < 3 or not (facts.bad or _blown_up(history, names)):
        return None
    ratio = update_ratios(history, names)
    typical = nanmedian(ratio, axis=1)
    begin = persistent(np.nan_to_num(typical) >= LARGE_UPDATE)
    what, value = "update_ratio", float(np.nanmax(typical, initial=0.0))
    leap, change = _leap(history, names)
    went_well = facts.initial - facts.best > SLOW * abs(facts.initial)
    if leap is not None and (begin is None or (leap < begin and not went_well)):
        begin, value, what = leap, change, "relative_change_between_captures"
    if begin is None:
        return None
    first = int(history.steps[begin])
    onset = _onset(facts.diverged_step, facts.broken_step)
    if onset is not None and first > onset + 2 * history.slack:
        return None  # the loss broke first: large steps are the consequence
    late = onset is not None and first > max(20, 0.1 * history.last_step)
    if late and went_well and not _rate_rose(history, first):
        return None  # all went well for long at this learning rate
    order = np.argsort(-np.nan_to_num(nanmedian(ratio[begin : begin + 20], axis=0)))
    rate = largest_rate(history)
    lr = float(held(rate, np.array([first]))[0]) if rate.step.size else math.nan
    shown = f" (learning rate {lr:.3g})" if math.isfinite(lr) else ""
    return history.finding(
        "learning_rate_too_high",
        "critical" if facts.bad else "warning",
        f"Steps are too large from step {first} on{shown}: the weights change by up to "
        f"{portion(value)} their size {'per step' if what == 'update_ratio' else 'between two captures'}, "
        f"and {facts.words()}.",
        first=first,
        layers=[names[i] for i in order[:5]],
        evidence={what: value, "threshold": LARGE_UPDATE if what == "update_ratio" else LEAPED, "lr": lr},
        advice="Divide the learning rate by 10, or warm it up over the first few percent of the steps; "
        "clip the gradient norm.",
        confidence=0.9 if what == "update_ratio" else 0.7,
    )


def _blown_up(history: History, names: tuple[str, ...]) -> bool:
    """Within the first tenth of the run the typical matrix grew to five times its size: what it started from
    is lost.
    """
    early = history.steps <= max(20, 0.1 * history.last_step)
    names = tuple(n for n in names if n != history.output)  # it grows to the size of raw targets
    growth = history.table("weight", "norm", names)[early] / history.initial("norm", names)
    return bool(growth.size and nanmedian(nanmedian(growth[-3:], axis=0)) >= OVERGROWN)


def _onset(*steps: int | None) -> int | None:
    known = [s for s in steps if s is not None]
    return min(known, default=None)


def _rate_rose(history: History, first: int) -> bool:
    """The learning rate reached its highest value so far within the tenth of the run before `first`."""
    rate = largest_rate(history)
    before = rate.step <= first
    if before.sum() < 2:
        return False
    peak = int(rate.step[before][np.argmax(rate.value[before])])
    return first - peak <= max(20, 0.1 * history.last_step) and peak > 0


def _leap(history: History, names: tuple[str, ...]) -> tuple[int | None, float]:
    """The capture after which most matrices changed size by more than half of themselves at once, early in
    the run.
    """
    norm = np.vstack([history.initial("norm", names)[None, :], history.table("weight", "norm", names)])
    with np.errstate(divide="ignore", invalid="ignore"):
        change = np.abs(np.diff(norm, axis=0)) / norm[:-1]
    typical = nanmedian(change, axis=1)
    early = max(2, history.captures // 10)
    hits = np.flatnonzero(np.nan_to_num(typical[:early]) >= LEAPED)
    return (max(0, int(hits[0]) - 1), float(typical[hits[0]])) if hits.size else (None, math.nan)


@detector("learning_rate_too_low")
def learning_rate_too_low(history: History) -> Finding | None:
    """Steps so small that hardly anything is learnt.

    The typical matrix changes by less than 1/10,000 of its size per step (TheDeepChecker) at almost all
    captures, while the loss is still within 10 % of its start, although gradients arrive (leverage above
    0.01). Told apart: clipping, Adam's eps or rounding that throttle the steps (their own codes), warm-up, a
    pretrained model that has little left to learn.
    """
    facts = outcome(history)
    names = history.names(*MATRICES)
    enough = facts.points >= 20 and history.last_step >= 100 and history.captures >= 5
    if not enough or not names or facts.diverged or facts.broken_step is not None:
        return None
    # The first three losses tell the start no better than their noise allows.
    unsure = 2 * facts.noise / math.sqrt(3)
    fell = facts.initial - facts.end > max(SLOW * abs(facts.initial), unsure)
    if fell or _knows_already(facts.trivial, facts.initial):
        return None
    from .gradients import leverage

    typical = nanmedian(update_ratios(history, names), axis=1)
    small = (typical > 0) & (typical < SMALL_UPDATE)
    if small.mean() < 0.9 or nanmedian(leverage(history, names)) < 0.01:
        return None
    value = float(nanmedian(typical))
    return history.finding(
        "learning_rate_too_low",
        "critical" if facts.stalled else "warning",
        f"Steps are too small: the typical weight changes by {value:.2g} of its size per step, and the "
        "loss only went from "
        f"{facts.initial:.4g} to {facts.end:.4g} in {history.last_step + 1} steps.",
        first=history.steps[0],
        evidence={
            "update_ratio": value,
            "threshold": SMALL_UPDATE,
            "loss_start": facts.initial,
            "loss_end": facts.end,
        },
        advice="Multiply the learning rate by 10, or find it with a range test.",
        confidence=0.9,
    )


def _knows_already(trivial: float, initial: float) -> bool:
    return math.isfinite(trivial) and initial < 0.8 * trivial


@detector("schedule_fault")
def schedule_fault(history: History) -> Finding | None:
    """A learning rate that jumps far above all that came before, or stays at zero before the end.

    A rise by more than 10 times in one step to more than twice the highest rate so far (a warm restart
    returns to it); or a rate of at most 1e-6 of the highest over the last tenth of the run and more (at least
    20 steps). Told apart: warm-up, warm restarts, decay that reaches zero at the end.
    """
    rate = largest_rate(history)
    if rate.step.size < 2:
        return None
    top = float(rate.value.max())
    peak = np.maximum.accumulate(rate.value)
    jump = (
        (rate.value[1:] > JUMP * rate.value[:-1]) & (rate.value[1:] > 2 * peak[:-1]) & (rate.value[:-1] > 0)
    )
    jump &= rate.step[:-1] > max(20, 0.05 * history.last_step)  # a coarse warm-up comes earlier
    if jump.any():
        at = int(np.flatnonzero(jump)[0]) + 1
        factor = float(rate.value[at] / rate.value[at - 1])
        facts = outcome(history)
        return history.finding(
            "schedule_fault",
            "critical" if facts.bad else "warning",
            f"The learning rate jumps by {factor:.3g} times to {rate.value[at]:.3g} at step "
            f"{rate.step[at]}, and {facts.words()}.",
            first=rate.step[at],
            evidence={"jump": factor, "threshold": JUMP},
            advice="Check the schedule's boundaries and that scheduler.step() is called once per step (or "
            "epoch, as it expects).",
        )
    live = np.flatnonzero(rate.value > 1e-6 * top)
    begin = int(live[-1]) + 1 if live.size else rate.step.size
    if begin >= rate.step.size:
        return None
    idle = history.last_step - int(rate.step[begin]) + 1
    share = idle / (history.last_step + 1)
    if idle < LEAST_IDLE or share < IDLE:
        return None
    return history.finding(
        "schedule_fault",
        "warning",
        f"The learning rate is zero from step {rate.step[begin]} on: the last {idle} steps ({share:.0%} of "
        "the run) train nothing.",
        first=rate.step[begin],
        evidence={"idle_steps": idle, "share": share, "threshold": IDLE},
        advice="Give the schedule the true number of steps, or stop the training where it ends.",
    )


@detector("over_clipping")
def over_clipping(history: History) -> Finding | None:
    """Gradient clipping that takes away nine tenths of the gradient, in a training that gets nowhere.

    The median ratio of the norm after and before clipping is below 0.1 after the first fifth of the run. Told
    apart: clipping this hard is harmless with Adam, which rescales gradients, and an intended normalisation
    elsewhere; only a loss that fell by less than a tenth makes it an alarm.
    """
    steps, ratio = history.scalar("clip_ratio")
    late = ratio[steps >= 0.2 * history.last_step] if steps.size else ratio
    if late.size < PERSISTENT or not np.nanmedian(late) < CLIPPED:
        return None
    facts = outcome(history)
    value = float(np.nanmedian(late))
    slow = facts.points >= 20 and facts.initial - facts.end < SLOW * abs(facts.initial)
    return history.finding(
        "over_clipping",
        "critical" if facts.stalled else "warning" if slow else "info",
        f"Clipping leaves {value:.2g} of the gradient norm in the typical step, and {facts.words()}.",
        first=steps[np.flatnonzero(ratio < CLIPPED)[0]],
        evidence={"clip_ratio": value, "threshold": CLIPPED},
        advice="Raise max_norm to about the usual gradient norm (see the scalar grad_norm), or raise the "
        "learning rate.",
        confidence=0.9 if slow else 0.6,
    )


@detector("adam_epsilon")
def adam_epsilon(history: History) -> Finding | None:
    """Adam's eps is larger than the gradients, so that it shrinks the steps instead of guarding a division.

    eps is above 3 times the root mean square gradient of most matrices in the first half of the run, and the
    loss has fallen by less than half (small-scale proxies, arXiv 2309.14322: updates die when RMS(g) falls to
    eps). Where the optimizer's second moments were captured they must confirm it: eps is larger than the root
    of most of them. Told apart: gradients that fall to eps late, in a training that has learnt.
    """
    values = [
        float(g["eps"])
        for o in history.info.get("optimizers") or [] if "adam" in str(o.get("class", "")).lower()
        for g in o.get("groups", []) if isinstance(g.get("eps"), int | float)
    ]  # fmt: skip
    names = history.names(*MATRICES)
    facts = outcome(history)
    if not values or not names or history.captures < 5 or facts.points < 20:
        return None
    half = slice(0, max(5, history.captures // 2))
    below = nanmedian(history.table("second_moment", "below_epsilon", names)[half], axis=0)
    below = below[np.isfinite(below)]
    if below.size and np.mean(below > 0.5) < 0.5:
        return None
    rms = nanmedian(history.table("gradient", "rms", names)[half], axis=0)
    rms = rms[np.nan_to_num(rms) > 0]
    eps = min(values)
    if (
        not rms.size
        or np.mean(eps > EPS_OVER_GRADIENT * rms) < 0.5
        or facts.initial - facts.end > 0.5 * abs(facts.initial)
    ):
        return None
    return history.finding(
        "adam_epsilon",
        "critical" if facts.stalled else "warning",
        f"Adam's eps {eps:.3g} is {eps / float(np.median(rms)):.3g} times the typical gradient, which "
        "shrinks every step, and "
        f"{facts.words()}.",
        first=history.steps[0],
        evidence={
            "eps": eps,
            "rms_gradient": float(np.median(rms)),
            "threshold": EPS_OVER_GRADIENT,
            **({"below_eps": float(np.median(below))} if below.size else {}),
        },
        advice="Set eps to 1e-8 (or smaller than the smallest layer's RMS gradient).",
    )
