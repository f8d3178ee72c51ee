"""What a log must hold so that silence means health: else a note says what was not judged, and why.

Only what the user can change is worth a note: a loss that was not logged, captures, kinds that are off.
"""

from __future__ import annotations

from collections.abc import Callable

from .history import MATRICES, History
from .outcome import LEAST_POINTS, LEAST_STEPS, finite, outcome
from .overfitting import VAL_ACCURACY

#: Says what is missing; "" when nothing is.
Need = Callable[[History], str]


def _captures(least: int) -> Need:
    def lacking(history: History) -> str:
        n = history.captures
        many = {0: "no step was", 1: "only 1 step was"}.get(n, f"only {n} steps were")
        return "" if n >= least else f"{many} captured"

    return lacking


def _matrices(history: History) -> str:
    return "" if history.names(*MATRICES) else "no trainable weight matrix is watched"


def _kind(kind: str, words: str) -> Need:
    return lambda history: "" if history.measured(kind) else words


def _loss(history: History) -> str:
    return outcome(history).lack


def _course(history: History) -> str:
    """Long enough that a loss which stands still means something."""
    facts, steps = outcome(history), history.train_loss.step
    if facts.lack or facts.broken_step is not None:
        return facts.lack
    if facts.points < LEAST_POINTS or steps[-1] - steps[0] < LEAST_STEPS:
        return f"whether anything is learnt shows in {LEAST_POINTS} training losses over {LEAST_STEPS} steps"
    return ""


def _rate(history: History) -> str:
    names = history.source.scalar_names()
    return "" if any(n == "lr" or n.startswith("lr/") for n in names) else "no learning rate was logged (lr)"


def _validation(history: History) -> str:
    if finite(history.val_loss).step.size or finite(history.scalar(*VAL_ACCURACY)).step.size:
        return ""
    return "no validation loss was logged (val_loss or eval_loss)"


_GRADIENTS = _kind("gradient", "gradients were not captured")
_UPDATES = _kind("update", "updates were not captured (updates=True)")
_WEIGHTS = _kind("weight", "weights were not captured")
_ACTIVATIONS = _kind("activation", "activations were not captured (activations=True)")
#: problem -> what it takes to exclude it. Problems that only some trainings can have (clipping, Adam's eps,
#: half precision, attention, fine-tuning) are left out: where they do not apply there is nothing to say.
NEEDS: dict[str, tuple[Need, ...]] = {
    "exploding_gradients": (_captures(3), _matrices, _GRADIENTS, _loss),
    "vanishing_gradients": (_captures(3), _matrices, _GRADIENTS, _loss),
    "symmetric_units": (_captures(5), _GRADIENTS),
    "saturated_units": (_captures(5), _ACTIVATIONS),
    "unused_parameters": (_captures(3), _WEIGHTS),
    "frozen_parameters": (_captures(3), _WEIGHTS, _GRADIENTS),
    "learning_rate_too_high": (_captures(3), _matrices, _loss),
    "learning_rate_too_low": (_captures(5), _matrices, _UPDATES, _course),
    "layer_imbalance": (_captures(5), _matrices, _UPDATES),
    "weight_growth": (_captures(5), _matrices, _WEIGHTS),
    "gradient_underflow": (_captures(5), _matrices, _GRADIENTS),
    "bad_init_scale": (_captures(1), _matrices, _ACTIVATIONS, _course),
    "data_fault": (_captures(1), _matrices, _ACTIVATIONS, _course),
    "schedule_fault": (_rate,),
    "not_learning": (_course,),
    "loss_spike": (_course,),
    "overfitting": (_validation,),
}


def lacking(problem: str, history: History) -> str:
    """Why silence about a problem does not mean that it is absent; "" when it does."""
    return next((reason for need in NEEDS.get(problem, ()) if (reason := need(history))), "")
