"""What the losses themselves say: nothing is learnt, a spike."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .history import History, Series
from .outcome import AT_TRIVIAL, STALLED, finite, outcome, smooth
from .registry import detector

#: Spread of log loss that a healthy run does not leave (robust z; six healthy language-model runs stayed
#: below 4.5).
SPIKE = 8.0


@detector("not_learning")
def not_learning(history: History) -> Finding | None:
    """The loss has not left the level of a trivial predictor, and no mechanism explains why.

    The training loss has fallen by less than 5 % (TheDeepChecker), or is still at log(classes); or the
    validation loss never got below the trivial level while training went on (labels or validation data that
    do not fit the inputs). At least 20 losses over 100 steps. Told apart: a validation loss that still
    improves, a model that starts well below the trivial level (fine-tuning), several optimizers (the losses
    of a GAN or an actor-critic need not fall), losses that change sign, a warm-up that has just ended.
    """
    facts = outcome(history)
    if facts.points < 20 or _need_not_fall(history) or facts.broken_step is not None:
        return None
    if _warming_up(history):
        return None
    level = facts.trivial if math.isfinite(facts.trivial) else facts.initial
    if _validation_improves(history):
        return None
    if facts.stalled or (facts.diverged and facts.end > facts.initial - STALLED * abs(facts.initial)):
        return history.finding(
            "not_learning",
            "critical",
            f"Nothing is learnt: {facts.words()} in {history.last_step + 1} "
            f"steps{_trivial_words(facts.trivial)}.",
            first=(facts.diverged_step or 0) if facts.best < 0.9 * facts.initial else 0,
            evidence={"loss_start": facts.initial, "loss_end": facts.end, "threshold": STALLED},
            advice="Try to overfit a single batch; check labels, learning rate, zero_grad(), detach() and "
            "requires_grad.",
            confidence=0.8,
        )
    return _memorises(history, level)


def _validation_improves(history: History) -> bool:
    """The validation loss fell by 2 % from its first third to its last: a little is learnt."""
    values = finite(history.val_loss).value
    if values.size < 6 or (values <= 0).any():
        return False
    third = values.size // 3
    return bool(np.median(values[-third:]) < 0.98 * np.median(values[:third]) and values[-1] < values[0])


def _trivial_words(trivial: float) -> str:
    return f" (a guess at random has {trivial:.4g})" if math.isfinite(trivial) else ""


def _memorises(history: History, level: float) -> Finding | None:
    """The training loss falls, the validation loss never does."""
    facts = outcome(history)
    values = finite(history.val_loss).value
    if values.size < 5 or not values[0] < 1.3 * max(facts.initial, level) or not values[0] > 0.8 * level:
        return None
    third = max(2, values.size // 3)
    rising = np.median(values[-third:]) >= 0.98 * np.median(values[:third])
    if not rising or values.min() < (1 - AT_TRIVIAL) * min(level, facts.initial):
        return None
    return history.finding(
        "not_learning",
        "critical",
        f"Nothing is learnt that holds on validation data: val_loss never got below {values.min():.4g}"
        f"{_trivial_words(facts.trivial) or f' (the training started at {facts.initial:.4g})'}, while the "
        "training loss went "
        f"to {facts.end:.4g}.",
        first=0,
        evidence={"best_val_loss": float(values.min()), "trivial": level, "threshold": 1 - AT_TRIVIAL},
        advice="Check that inputs and labels belong together (shuffled alike), in both data sets.",
        confidence=0.85,
    )


def _need_not_fall(history: History) -> bool:
    series = finite(history.train_loss).value
    return len(history.info.get("optimizers") or []) > 1 or bool(series.size and (series < 0).any())


def _warming_up(history: History) -> bool:
    """The learning rate reached its highest value only in the last fifth of the run."""
    from .rates import largest_rate

    rate = largest_rate(history)
    if rate.step.size < 3:
        return False
    return int(rate.step[np.argmax(rate.value)]) > 0.8 * history.last_step


@detector("loss_spike")
def loss_spike(history: History) -> Finding | None:
    """A sudden jump of the loss that undoes much of the training.

    log(loss) more than 8 robust standard deviations above the last 100 losses, and at least half of all
    progress lost at once. A spike that is gone within 50 steps, and was no higher than the start, is a
    remark. Told apart: divergence, the heavy tail of a loss that is almost zero (half of the progress is not
    lost by one odd batch).
    """
    series = finite(history.train_loss)
    facts = outcome(history)
    if series.value.size < 40 or (series.value <= 0).any():
        return None
    logs = np.log(series.value)
    best = np.minimum.accumulate(smooth(series))
    rise = series.value[30:] - best[29:-1]
    high = rise > 0.5 * np.maximum(facts.initial - best[29:-1], 0.1 * abs(facts.initial))
    for at in 30 + np.flatnonzero(high):
        window = logs[max(0, at - 100) : at]
        middle = float(np.median(window))
        spread = max(1.4826 * float(np.median(np.abs(window - middle))), 0.02)
        z = (logs[at] - middle) / spread
        if z > SPIKE:
            if at + 10 < logs.size and np.median(logs[at + 10 : at + 50]) > np.max(logs[at : at + 5]) + 1.0:
                return None  # it goes on rising: divergence, not a spike
            return _spike(history, series, at, z)
    return None


def _spike(history: History, series: Series, at: int, z: float) -> Finding:
    facts = outcome(history)
    before = float(np.median(series.value[max(0, at - 20) : at]))
    height = float(series.value[at : at + 5].max())
    after = series.value[at + 10 : at + 50]
    progress = max(facts.initial - before, 0.1 * abs(facts.initial))
    recovered = after.size > 0 and bool(np.median(after) < before + 0.3 * progress)
    harmless = recovered and height < facts.initial
    return history.finding(
        "loss_spike",
        "info" if harmless else "critical" if facts.diverged else "warning",
        f"The loss jumps from {before:.4g} to {height:.4g} at step {series.step[at]}"
        f"{' and comes back' if recovered else ' and does not come back soon'}.",
        first=series.step[at],
        last=series.step[min(at + 50, series.step.size - 1)] if recovered else None,
        evidence={"robust_z": z, "threshold": SPIKE, "height": height},
        advice="Look at the batch of that step; clip the gradient norm, lower Adam's beta2 to 0.95, skip "
        "such batches.",
        confidence=0.85,
    )
