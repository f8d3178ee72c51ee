"""Data that a network cannot use: huge inputs, broken batches, batches in order, targets that do not fit."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .gradients import softmax_bias
from .history import History, nanmedian
from .outcome import finite, outcome, smooth
from .registry import detector
from .scales import HUGE_INPUT, first_outputs, input_size, made_by_output

#: A batch whose inputs are so many times larger than usual (catalogue of data faults: 4; here 10, on one
#: capture).
INPUT_JUMP = 10.0
#: A batch whose mean of prediction - label is below -SURPRISED holds mostly one class that was not expected;
#: it happens in so many captures at least.
SURPRISED, OFTEN = 0.5, 0.1
#: A training loss that stays above so much of the level of a guess; the validation loss over it.
UNFIT, BELOW = 0.4, 0.75
#: Less than so much of a change is none: validation rests, training goes on.
RESTS = 0.03


@detector("data_fault")
def data_fault(history: History) -> Finding | None:
    """Data that a network cannot use: huge inputs, a broken batch, batches in order, targets that do not fit.

    Inputs (estimated from the first layer's output) with a root mean square above 30 that make the first
    loss; a batch whose inputs are ten times their usual size while the loss jumps; for a classifier, batches
    that keep holding nearly one class: the gradient of the output's bias is the mean of prediction minus
    label, and its minimum is below -0.5 in a tenth of the captures of each half of the run; or training
    targets with much more noise than those of validation: the training loss stays above 40 % of the level of
    a guess and the validation loss is 25 % lower than it, and rests while training goes on (it learns the
    noise by heart), or is half of it in a regression. Told apart: large inputs that a normalisation layer
    takes care of, imbalanced classes (which are learnt early), small batches, dropout and augmentation (whose
    validation loss goes on falling with the training loss).
    """
    return _huge_inputs(history) or _odd_batch(history) or _sorted_batches(history) or _noisy_targets(history)


_NORMALISE = "Normalise the inputs (subtract the mean, divide by the standard deviation of the training set)."


def _huge_inputs(history: History) -> Finding | None:
    module, size = input_size(history)
    facts = outcome(history)
    early = nanmedian(size[:3]) if size.size else math.nan
    if module is None or not early > HUGE_INPUT or not made_by_output(facts, first_outputs(history)):
        return None
    return history.finding(
        "data_fault",
        "critical" if facts.bad else "warning",
        f"The inputs of {module} are of size {early:.3g} instead of about 1: they make the first loss "
        f"({facts.initial:.4g}).",
        first=history.steps[0],
        layers=[module],
        evidence={"input_rms": early, "threshold": HUGE_INPUT, "loss_start": facts.initial},
        advice=_NORMALISE,
        confidence=0.8,
    )


def _odd_batch(history: History) -> Finding | None:
    module, size = input_size(history)
    losses = history.train_loss
    if module is None or history.captures < 12 or losses.step.size < 20:
        return None
    course = smooth(losses)
    for row in range(10, history.captures):
        usual = nanmedian(size[max(0, row - 50) : row])
        if not size[row] > INPUT_JUMP * usual:
            continue
        step = int(history.steps[row])
        at = int(np.searchsorted(losses.step, step))
        if at == 0 or at >= losses.step.size or not losses.value[at] > 3 * course[at - 1] > 0:
            continue
        facts = outcome(history)
        return history.finding(
            "data_fault",
            "critical" if facts.diverged else "warning",
            f"The batch of step {step} has inputs {size[row] / usual:.3g} times as large as usual, the "
            "loss jumps from "
            f"{course[at - 1]:.4g} to {losses.value[at]:.4g}, and {facts.words()}.",
            first=step,
            last=step,
            layers=[module],
            evidence={"input_over_usual": float(size[row] / usual), "threshold": INPUT_JUMP},
            advice="Look at this batch: broken records, another unit, missing normalisation; clip inputs "
            "and gradients.",
            confidence=0.9,
        )
    return None


def _sorted_batches(history: History) -> Finding | None:
    bias = softmax_bias(history)
    if bias is None or outcome(history).diverged or history.captures < 20:
        return None
    samples = nanmedian(history.table("activation", "samples", (history.of(bias, "module"),)))
    lowest = np.nan_to_num(history.table("gradient", "min", (bias,))[:, 0])
    if (
        samples < 16 or lowest.min() < -1.05
    ):  # chance in small batches; gradients that are no mean over a batch
        return None
    surprise = lowest < -SURPRISED
    half = history.captures // 2
    if min(surprise[:half].mean(), surprise[half:].mean()) < OFTEN:
        return None
    return history.finding(
        "data_fault",
        "warning",
        f"Batches hold nearly one class at a time: in {surprise.mean():.0%} of the captured steps more "
        "than half of a batch "
        f"is of one class that the network did not expect.",
        first=history.steps[0],
        evidence={"share_of_captures": float(surprise.mean()), "threshold": OFTEN},
        advice="Shuffle the training data (DataLoader(shuffle=True)).",
        confidence=0.8,
    )


def _noisy_targets(history: History) -> Finding | None:
    facts = outcome(history)
    steps, values = finite(history.val_loss)
    level = facts.trivial if math.isfinite(facts.trivial) else facts.initial
    if values.size < 8 or facts.points < 40 or facts.diverged or not facts.end > UNFIT * level > 0:
        return None
    quarter = values.size // 4
    third, last = float(np.median(values[-2 * quarter : -quarter])), float(np.median(values[-quarter:]))
    train = finite(history.train_loss)
    marks = np.searchsorted(train.step, [steps[-2 * quarter], steps[-quarter]])
    if not 0 < marks[0] < marks[1] < train.step.size:
        return None
    then, now = float(np.median(train.value[marks[0] : marks[1]])), float(np.median(train.value[marks[1] :]))
    if not 0 < values[-2 * quarter :].max() < now or not 0 < last < BELOW * now:
        return None
    by_heart = last > (1 - RESTS) * third and now < (1 - RESTS) * then
    regression = not math.isfinite(facts.trivial) and last < 0.5 * now
    if not by_heart and not regression:
        return None
    return history.finding(
        "data_fault",
        "warning",
        f"The training loss stays at {now:.4g}, where validation has {last:.4g}"
        f"{' and gets no better' if by_heart else ''}: part of the training targets seems to be wrong.",
        first=history.steps[0],
        evidence={
            "val_over_train": last / now,
            "threshold": BELOW,
            "train_loss": now,
            "level_of_a_guess": level,
        },
        advice="Look at the training samples of the highest loss for wrong labels. With strong augmentation, "
        "mixup or dropout such a gap may be meant.",
        confidence=0.5,
    )
