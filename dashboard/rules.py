"""What each problem code means and what proves it: the rule in a sentence, the quantity, its map.

A line here for every code; `docs/detectors.md` has the whole rules with their guards and sources.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..monitor.detectors.rates import update_ratios
from . import proofs
from .excerpt import Case, anything, column, of_layers, of_scalar, quotient
from .figures.evidence import Evidence


@dataclass(frozen=True)
class Rule:
    """A problem code's entry."""

    text: str
    metric: str  # of the gradient-flow page, where it can be seen beside all other layers
    read: Callable[[Case], Evidence]


RULES: dict[str, Rule] = {
    "nonfinite": Rule(
        "NaN or infinity in a loss or a weight once, or in gradients at three captures in a row.",
        "nonfinite",
        proofs.nonfinite,
    ),
    "exploding_gradients": Rule(
        "Leverage (by how much the loss changes for a small change of the weights) above 300 at three "
        "captures in a row, a gradient norm 100 times its usual size while the loss diverges, or first "
        "layers with 70 times the leverage of the last.",
        "gradient_norm",
        proofs.exploding,
    ),
    "vanishing_gradients": Rule(
        "The first third of the layers has less than 1/1000 of the leverage of the last third, falling "
        "with depth, at three captures in a row.",
        "gradient_norm",
        proofs.vanishing,
    ),
    "dead_units": Rule(
        "More than half of a layer's units put out zero for every sample of the last captures.",
        "dead_units",
        of_layers(
            "share of units that are silent",
            proofs.dead,
            log=False,
            limit="limit",
            default=0.5,
            typical=False,
        ),
    ),
    "saturated_units": Rule(
        "The mean square of a tanh or sigmoid output is at least 0.9 of what is possible in most "
        "captures, from the start on or with a bad outcome.",
        "activation_rms",
        of_layers(
            "mean square, share of possible",
            proofs.at_ends,
            log=False,
            limit="limit",
            default=0.9,
            typical=False,
        ),
    ),
    "symmetric_units": Rule(
        "The gradient of a hidden layer's bias is the same for all its units, to 0.1 % of its size, at "
        "nine of ten captures.",
        "gradient_norm",
        of_layers(
            "spread of the bias's gradient over the units",
            proofs.spread_over_units,
            limit="limit",
            default=1e-3,
            typical=False,
        ),
    ),
    "unused_parameters": Rule(
        "No gradient at any capture, or one of exactly zero at all of them.",
        "gradient_norm",
        proofs.standing_still,
    ),
    "frozen_parameters": Rule(
        "A gradient arrives, and no update ever does.", "update_ratio", proofs.standing_still
    ),
    "learning_rate_too_high": Rule(
        "The typical weight changes by a tenth of its size or more per step at three captures in a row, "
        "and the loss diverges, stalls or is not finite.",
        "update_ratio",
        proofs.update_too_large,
    ),
    "learning_rate_too_low": Rule(
        "The typical weight changes by less than 1/10,000 of its size per step at nine of ten captures, "
        "and the loss fell by less than a tenth.",
        "update_ratio",
        of_layers("update ratio", update_ratios, limit="limit", default=1e-4),
    ),
    "schedule_fault": Rule(
        "The learning rate rises more than tenfold in one step after the start, or is zero for the last "
        "tenth of the run and more.",
        "update_ratio",
        proofs.schedule,
    ),
    "over_clipping": Rule(
        "Clipping leaves less than a tenth of the gradient norm in the typical step, and the loss hardly "
        "falls.",
        "gradient_norm",
        of_scalar("clip_ratio", "clip_ratio", log=True, limit="limit", default=0.1),
    ),
    "adam_epsilon": Rule(
        "Adam's eps is more than three times the typical gradient in the first half of the run.",
        "gradient_norm",
        proofs.epsilon,
    ),
    "layer_imbalance": Rule(
        "The update ratios of two matrices differ by more than 100 times in most captures.",
        "update_ratio",
        proofs.imbalance,
    ),
    "weight_growth": Rule(
        "A weight matrix reaches ten times its first norm.",
        "weight_norm",
        of_layers("weight norm ÷ first", proofs.growth, limit="limit", default=10),
    ),
    "low_precision_stall": Rule(
        "More than half of the numbers of a half-precision matrix keep their bits in the typical step "
        "although their gradient is not zero.",
        "update_ratio",
        of_layers(
            "share of updates lost to rounding", proofs.swallowed, log=False, limit="limit", default=0.5
        ),
    ),
    "gradient_underflow": Rule(
        "From the start a quarter of the gradient is exactly zero in most matrices, and the rest is below "
        "the smallest normal float16.",
        "zeros",
        of_layers(
            "share of the gradient that is zero",
            quotient(column("gradient", "zeros"), column("gradient", "count")),
            log=False,
            limit="limit",
            default=0.25,
        ),
    ),
    "loss_scale_collapse": Rule(
        "The loss scale ends at 1 or below, or more than a fifth of the captured steps are skipped.",
        "nonfinite",
        proofs.loss_scale,
    ),
    "bad_init_scale": Rule(
        "The first predictions are of size 5 and more and make the first loss; or the typical hidden "
        "matrix has a gain below 0.1 and the loss has stalled.",
        "activation_rms",
        proofs.init_scale,
    ),
    "data_fault": Rule(
        "Inputs of size 30 and more that make the first loss, one batch ten times the usual size while "
        "the loss jumps, or batches of nearly one class.",
        "activation_rms",
        proofs.inputs,
    ),
    "stale_gradients": Rule(
        "The gradient of a softmax output's bias leaves [-1, 1], which one batch cannot do: gradients "
        "pile up.",
        "gradient_norm",
        proofs.pile_up,
    ),
    "logit_drift": Rule(
        "The predictions' root mean square is above 10 and three times that of a quarter of the run, with "
        "a bad outcome.",
        "activation_rms",
        proofs.predictions,
    ),
    "attention_collapse": Rule(
        "The median entropy of a module's attention is below a tenth of what is possible from the start "
        "on, or until the end of a run that fails.",
        "activation_rms",
        proofs.attention,
    ),
    "over_regularised": Rule(
        "The weight decay pulls with 0.3 of the gradient's strength and more, the weights shrank, and the "
        "loss stays high.",
        "weight_norm",
        of_layers("weight decay ÷ gradient", proofs.decay_pull, limit="limit", default=0.3),
    ),
    "not_learning": Rule(
        "The training loss fell by less than 5 %, or the validation loss never got below the level of a "
        "guess.",
        "gradient_norm",
        proofs.learning,
    ),
    "overfitting": Rule(
        "The validation loss is 5 % above its best over the last three evaluations, beyond its noise, "
        "while the training loss went on falling.",
        "weight_norm",
        proofs.turned_back,
    ),
    "loss_spike": Rule(
        "The loss jumps more than eight robust standard deviations above the last hundred and loses half "
        "of its progress at once.",
        "gradient_norm",
        proofs.spike,
    ),
    "regression": Rule(
        "The last three evaluations are worse than those of the baseline runs by more than their spread.",
        "gradient_norm",
        proofs.against_baselines,
    ),
    "excessive_drift": Rule(
        "A layer moved from its pretrained state by more than the limit: half of its size, unless one was "
        "given.",
        "update_ratio",
        of_layers(
            "drift: |w - reference| ÷ |reference|", proofs.moved, log=False, limit="limit", default=0.5
        ),
    ),
}

#: For the problems of detectors that somebody added.
UNKNOWN = Rule("", "gradient_norm", anything)


def rule_of(problem: str) -> Rule:
    """The entry of a code; a fallback that plots norms for a code of somebody else's."""
    return RULES.get(problem, UNKNOWN)
