"""Critical means a bad outcome: one contract over all registered detectors and all problem codes."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest

from layerwatch.monitor.detectors import History, registered
from layerwatch.monitor.detectors.outcome import finite, outcome
from layerwatch.monitor.findings import judge
from tests.monitor.test_detectors import (
    LAYERS,
    UNITS,
    Made,
    N,
    large_steps,
    pretrained,
    tiny_steps,
    vanishing,
)


def _exploding(made: Made) -> None:
    made.rows["gradient"]["1.weight"]["norm"][50:] = 1e5


def _stale(made: Made) -> None:
    size = np.minimum(0.1 * (1 + np.arange(N)), 15.0)
    made.rows["gradient"]["5.bias"] |= {"min": -size, "max": size, "rms": size / 3}


def _symmetric(made: Made) -> None:
    for i in (1, 2):
        made.rows["gradient"][f"{i}.bias"]["std"][:] = 1e-9


def _saturated(made: Made) -> None:
    for leaf in made.leaves:
        leaf["type"] = {"ReLU": "Tanh"}.get(leaf["type"], leaf["type"])
    for module in ("act0", "act1", "act2"):
        made.rows["activation"][module]["std"][:] = 0.97


def _unused(made: Made) -> None:
    del made.rows["gradient"]["2.weight"]
    made.rows["weight"]["2.weight"]["state"] = np.full(N, "unused", object)


def _frozen(made: Made) -> None:
    made.rows["weight"]["3.weight"]["state"] = np.full(N, "no_optimizer", object)
    del made.rows["update"]["3.weight"]


def _rounded(made: Made) -> None:
    for entry in made.layers:
        entry["dtype"] = "bfloat16"
    made.rows["update"]["1.weight"]["lost"] = 0.8 * made.rows["update"]["1.weight"]["count"]


def _underflow(made: Made) -> None:
    for row in made.rows["gradient"].values():
        row["zeros"] = 0.6 * row["count"]
        row["p01"], row["p99"] = np.full(N, -1e-6), np.full(N, 1e-6)


def _scale(made: Made) -> None:
    made.extra["loss_scale"] = (made.all, 2.0 ** np.maximum(16 - made.all, -8))


def _jump(made: Made) -> None:
    made.lr[100:] = 4.0


def _clipped(made: Made) -> None:
    made.extra["clip_ratio"] = (made.all, np.full(N, 0.004))


def _epsilon(made: Made) -> None:
    made.info["optimizers"] = [{"class": "AdamW", "groups": [{"lr": 0.1, "eps": 10.0}]}]


def _uneven(made: Made) -> None:
    made.rows["update"]["1.weight"]["ratio"] *= 1e-3


def _grown(made: Made) -> None:
    made.rows["weight"]["2.weight"]["norm"] = np.geomspace(5, 100, N)


def _decay(made: Made) -> None:
    made.info["optimizers"] = [{"class": "SGD", "groups": [{"lr": 0.1, "weight_decay": 0.02}]}]
    for row in made.rows["weight"].values():
        row["norm"] = np.linspace(5, 2, N)
    for row in made.rows["gradient"].values():
        row["norm"] = np.full(N, 0.05)


def _spike(made: Made) -> None:
    made.loss[150:] += 3.0 * np.exp(-np.arange(50) / 200)


def _overfit(made: Made) -> None:
    made.val = made.val + np.maximum(np.arange(made.val.size) - 4, 0) * 0.2


def _nan_weights(made: Made) -> None:
    made.rows["weight"]["3.weight"]["nans"][150:] = 4


def _nan_losses(made: Made) -> None:
    made.loss[100:104] = np.nan


def _collapsed(made: Made) -> None:
    made.rows["attention_entropy"] = {"0": {"step": made.steps, "p50": np.full(N, 0.02)}}


def _logits(made: Made) -> None:
    made.rows["activation"]["5"]["rms"] = np.geomspace(1, 300, N)


def _huge(made: Made) -> None:
    made.rows["activation"]["0"]["rms"][:] = 300 * 5.0 / UNITS**0.5
    made.rows["activation"]["5"]["rms"][0] = 30.0
    made.loss[:10] = np.linspace(900, 2.0, 10)


def _wide(made: Made) -> None:
    made.rows["activation"]["5"]["rms"][0] = 40.0
    made.loss[:5] = 40.0


def _dead(made: Made) -> None:
    made.active["activation", "act1"][1][20:, :20] = False


def _drifted(made: Made) -> None:
    pretrained(made)


def _slow(made: Made) -> None:
    for row in made.rows["update"].values():
        row["ratio"] *= 1e-3


def _large(made: Made) -> None:
    large_steps(made)
    for row in made.rows["weight"].values():
        row["norm"] = np.full(N, 60.0)


def _vanishing(made: Made) -> None:
    vanishing(made)


MECHANISMS: dict[str, Callable[[Made], None]] = {
    "exploding_gradients": _exploding, "vanishing_gradients": _vanishing, "stale_gradients": _stale,
    "dead_units": _dead, "saturated_units": _saturated, "symmetric_units": _symmetric,
    "unused_parameters": _unused, "frozen_parameters": _frozen, "low_precision_stall": _rounded,
    "gradient_underflow": _underflow, "loss_scale_collapse": _scale, "schedule_fault": _jump,
    "over_clipping": _clipped, "adam_epsilon": _epsilon, "layer_imbalance": _uneven,
    "weight_growth": _grown, "over_regularised": _decay, "loss_spike": _spike, "overfitting": _overfit,
    "nonfinite": _nan_weights, "attention_collapse": _collapsed, "logit_drift": _logits,
    "data_fault": _huge, "bad_init_scale": _wide, "excessive_drift": _drifted,
    "learning_rate_too_low": _slow, "learning_rate_too_high": _large,
}  # fmt: skip


def _well(made: Made) -> None:
    """The loss falls as it should."""


def _flat(made: Made) -> None:
    made.loss[:] = 2.3 + 0.005 * np.sin(made.all)
    made.val[:] = 2.31


def _rising(made: Made) -> None:
    made.loss[60:] = 8.0 + 0.1 * np.sin(made.all[60:])
    made.val[3:] = 8.0


OUTCOMES = (_well, _flat, _rising)


def symptom(history: History) -> bool:
    """Training stalled, diverged or broke; weights are lost; or validation regresses or never got better."""
    facts, val = outcome(history), finite(history.val_loss).value
    names = tuple(history.tensors.index)
    lost = np.nansum(history.table("weight", "nans", names)[-1:]) > 0
    worse = val.size > 0 and float(np.median(val[-3:])) > min(1.05 * float(val.min()), 0.97 * float(val[0]))
    return facts.bad or bool(lost) or worse or not np.isfinite(history.val_loss.value).all()


@pytest.mark.parametrize("becomes", OUTCOMES)
def test_critical_only_with_a_symptom_in_the_outcome(becomes: Callable[[Made], None]) -> None:
    detectors, _ = registered()
    criticals = 0
    for mechanism in (*MECHANISMS.values(), _nan_losses):
        made = Made()
        becomes(made)
        mechanism(made)
        history = made.history()
        bad = symptom(history)
        for problem, detector in detectors:
            finding = detector(history)
            if finding is not None and finding.severity == "critical":
                criticals += 1
                assert bad, f"{problem} of {mechanism.__name__} is critical in a training that does well"
    assert criticals > 5 * (becomes is not _well)


@pytest.mark.parametrize("problem", MECHANISMS)
def test_each_mechanism_is_found_in_some_outcome(problem: str) -> None:
    found = set()
    for becomes in OUTCOMES:
        made = Made()
        becomes(made)
        MECHANISMS[problem](made)
        history = made.history()
        for code, detector in registered()[0]:
            if code == problem and detector(history) is not None:
                found.add(becomes.__name__)
    assert found, f"no history shows {problem}"


def test_folding_keeps_the_worst_severity_and_only_that() -> None:
    made = tiny_steps()
    _clipped(made)
    findings = judge(made.history())[0]
    assert findings[0].problem == "over_clipping"
    assert findings[0].severity == "critical"
    assert len(made.layers) == 2 * LAYERS
