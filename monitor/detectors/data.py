"""Data that a network cannot use: huge inputs, broken batches, batches in order, targets that do not fit."""

from __future__ import annotations

import math

import numpy as np

from ..findings import Finding
from .gradients import piling, softmax_bias
from .history import History, nanmedian
from .outcome import finite, outcome, smooth
from .registry import detector
from .scales import HUGE_INPUT, input_size, made_by_output

#: A batch whose inputs are so many times larger than usual (catalogue of data faults: 4; here 10, on one
#: capture).
INPUT_JUMP = 10.0
#: A batch whose mean of prediction - label is below -SURPRISED holds mostly one class that was not expected;
#: it happens in so many captures at least.
SURPRISED, OFTEN = 0.5, 0.1
#: A training loss that ends above so much of the level of a guess; validation below so much of that loss.
UNFIT, BELOW = 0.6, 0.75


@detector("data_fault")
def data_fault(history: History) -> Finding | None:
    """Data that a network cannot use: huge inputs, a broken batch, batches in order, targets that do not fit.

    Inputs (estimated from the first layer's output) with a root mean square above 30 that make the first
    loss; a batch whose inputs are ten times their usual size while the loss jumps; for a classifier, batches
    that keep holding nearly one class: the gradient of the output's bias is the mean of prediction minus
    label, and its minimum is below -0.5 in a tenth of the captures of each half of the run; or training
    targets with much more noise than those of validation: the training loss ends above 60 % of the level of a
    guess, and over the second half the validation loss is at least 25 % lower. Told apart: large inputs that
    a normalisation layer takes care of, imbalanced classes (which are learnt early), small batches, the usual
    dropout and augmentation, which leave the training loss nearer to validation's or far below a guess.
    """
    return _huge_inputs(history) or _odd_batch(history) or _sorted_batches(history) or _noisy_targets(history)


_NORMALISE = "Normalise the inputs (subtract the mean, divide by the standard deviation of the training set)."


def _huge_inputs(history: History) -> Finding | None:
    module, size = input_size(history)
    facts = outcome(history)
    early = nanmedian(size[:3]) if size.size else math.nan
    if module is None or not early > HUGE_INPUT or not made_by_output(history):
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
    if min(surprise[:half].mean(), surprise[half:].mean()) < OFTEN or piling(history):
        return None  # sums over many batches are no mean over one
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
    values = finite(history.val_loss).value
    level = facts.trivial if math.isfinite(facts.trivial) else facts.initial
    if values.size < 8 or facts.points < 20 or facts.diverged or not facts.end > UNFIT * level > 0:
        return None
    late = values[values.size // 2 :]
    value = float(np.median(late))
    if not 0 < value < BELOW * facts.end or late.max() > facts.end:
        return None
    return history.finding(
        "data_fault",
        "warning",
        f"The training loss stays at {facts.end:.4g} ({facts.end / level:.0%} of the level of a guess) where "
        f"validation has {value:.4g}: part of the training targets seems to be wrong.",
        first=history.steps[0],
        evidence={
            "val_over_train": value / facts.end,
            "threshold": BELOW,
            "train_over_guess": facts.end / level,
        },
        advice="Look for wrong labels among the training samples of the highest loss. Very strong "
        "augmentation, mixup or dropout leave such a gap too.",
        confidence=0.5,
    )
