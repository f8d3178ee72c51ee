"""What proves each problem code: the quantity, and its map. What a code means is said by its page."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from ..monitor.detectors.quantising import outliers
from ..monitor.detectors.rates import update_ratios
from . import proofs
from .excerpt import Case, anything, column, of_layers, of_scalar, quotient
from .figures.evidence import Evidence


@dataclass(frozen=True)
class Rule:
    """A problem code's entry."""

    metric: str  # of the gradient-flow page, where it can be seen beside all other layers
    read: Callable[[Case], Evidence]


RULES: dict[str, Rule] = {
    "nonfinite": Rule("nonfinite", proofs.nonfinite),
    "exploding_gradients": Rule("gradient_norm", proofs.exploding),
    "vanishing_gradients": Rule("gradient_norm", proofs.vanishing),
    "dead_units": Rule(
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
        "gradient_norm",
        of_layers(
            "spread of the bias's gradient over the units",
            proofs.spread_over_units,
            limit="limit",
            default=1e-3,
            typical=False,
        ),
    ),
    "unused_parameters": Rule("gradient_norm", proofs.standing_still),
    "frozen_parameters": Rule("update_ratio", proofs.standing_still),
    "learning_rate_too_high": Rule("update_ratio", proofs.update_too_large),
    "learning_rate_too_low": Rule(
        "update_ratio",
        of_layers("update ratio", update_ratios, limit="limit", default=1e-4),
    ),
    "schedule_fault": Rule("update_ratio", proofs.schedule),
    "over_clipping": Rule(
        "gradient_norm",
        of_scalar("clip_ratio", "clip_ratio", log=True, limit="limit", default=0.1),
    ),
    "adam_epsilon": Rule("gradient_norm", proofs.epsilon),
    "layer_imbalance": Rule("update_ratio", proofs.imbalance),
    "weight_growth": Rule(
        "weight_norm",
        of_layers("weight norm ÷ first", proofs.growth, limit="limit", default=10),
    ),
    "replica_desync": Rule("weight_norm", proofs.copies),
    "quantisation_risk": Rule(
        "weight_norm",
        of_layers("largest weight ÷ root mean square", outliers, limit="limit", default=44),
    ),
    "low_precision_stall": Rule(
        "update_ratio",
        of_layers(
            "share of updates lost to rounding", proofs.swallowed, log=False, limit="limit", default=0.5
        ),
    ),
    "gradient_underflow": Rule(
        "zeros",
        of_layers(
            "share of the gradient that is zero",
            quotient(column("gradient", "zeros"), column("gradient", "count")),
            log=False,
            limit="limit",
            default=0.25,
        ),
    ),
    "loss_scale_collapse": Rule("nonfinite", proofs.loss_scale),
    "bad_init_scale": Rule("activation_rms", proofs.init_scale),
    "data_fault": Rule("activation_rms", proofs.inputs),
    "stale_gradients": Rule("gradient_norm", proofs.pile_up),
    "logit_drift": Rule("activation_rms", proofs.predictions),
    "attention_collapse": Rule("activation_rms", proofs.attention),
    "over_regularised": Rule(
        "weight_norm",
        of_layers("weight decay ÷ gradient", proofs.decay_pull, limit="limit", default=0.3),
    ),
    "not_learning": Rule("gradient_norm", proofs.learning),
    "overfitting": Rule("weight_norm", proofs.turned_back),
    "loss_spike": Rule("gradient_norm", proofs.spike),
    "regression": Rule("gradient_norm", proofs.against_baselines),
    "excessive_drift": Rule(
        "update_ratio",
        of_layers(
            "drift: |w - reference| ÷ |reference|", proofs.moved, log=False, limit="limit", default=0.5
        ),
    ),
}

#: For the problems of detectors that somebody added.
UNKNOWN = Rule("gradient_norm", anything)


def rule_of(problem: str) -> Rule:
    """The entry of a code; a fallback that plots norms for a code of somebody else's."""
    return RULES.get(problem, UNKNOWN)
