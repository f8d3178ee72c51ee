"""Overfitting: found where validation turned back, silent on noise, and honest without validation data."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from layerwatch import Run, watch
from layerwatch.monitor.detectors import Arrays, History
from layerwatch.monitor.detectors.overfitting import overfitting
from layerwatch.monitor.detectors.registry import Unjudged
from layerwatch.monitor.detectors.validation import course
from layerwatch.monitor.findings import Finding

STEPS = 600
EVALUATED = np.arange(19, STEPS, 20)


def falling(steps: int = STEPS) -> np.ndarray:
    return 2.3 * np.exp(-np.arange(steps) / 200)


def turned(at: int = 200, slope: float = 0.002) -> np.ndarray:
    """A validation loss that is at its best at a step and rises from there."""
    return 0.4 + 0.6 * np.exp(-EVALUATED * 10 / at / 2) + slope * np.maximum(EVALUATED - at, 0)


def history(
    val: Any = None, train: Any = None, rows: Any = None, layers: Any = (), **scalars: Any
) -> History:
    """A history of losses alone, or with rows of layers."""
    train = falling() if train is None else train
    losses: dict[str, Any] = {"train_loss": (np.arange(len(train)), train)}
    if val is not None:
        losses["val_loss"] = (EVALUATED[: len(val)], val)
    losses |= {name: (EVALUATED[: len(values)], values) for name, values in scalars.items()}
    return History(Arrays(losses=losses, rows=rows or {}, layers=layers))


def judged(*args: Any, **kwargs: Any) -> Finding | None:
    return overfitting(history(*args, **kwargs))


def found(*args: Any, **kwargs: Any) -> Finding:
    finding = judged(*args, **kwargs)
    assert finding is not None
    return finding


def test_it_begins_at_the_best_evaluation_and_says_what_early_stopping_would_have_done() -> None:
    finding = found(turned())
    assert finding.severity == "critical"
    assert finding.first_step in (199, 219)
    assert "rising since step" in finding.summary
    said = finding.evidence
    assert said["generalisation_loss"] == pytest.approx(100 * (turned()[-2] / turned().min() - 1), rel=0.05)
    best = int(finding.first_step)
    assert (said["patience_3_keeps"], said["patience_3_stops_at"]) == (best, best + 3 * 20)
    assert (said["patience_5_keeps"], said["patience_5_stops_at"]) == (best, best + 5 * 20)
    assert said["patience_3_value"] == pytest.approx(turned().min(), rel=1e-3)
    assert str(best) in finding.advice


def test_impatient_early_stopping_would_have_missed_the_best() -> None:
    val = turned()
    val[2:6] += 0.3  # three worse in a row, then on to the best
    finding = found(val)
    assert finding.evidence["patience_3_keeps"] == EVALUATED[1]
    assert finding.evidence["patience_5_keeps"] == finding.first_step


@pytest.mark.parametrize("slope", [0.0, 0.00002, 0.00004])
def test_a_rise_of_a_few_percent_is_no_alarm(slope: float) -> None:
    finding = judged(turned(slope=slope))
    assert finding is None or finding.severity == "info"


def test_a_small_rise_that_goes_on_is_a_remark() -> None:
    finding = found(turned(slope=0.00004))
    assert finding.severity == "info"
    assert 1 < float(finding.evidence["generalisation_loss"]) < 5
    assert int(finding.evidence["rising_strips"]) >= 3


def test_a_moderate_rise_is_a_warning() -> None:
    assert found(turned(slope=0.00015)).severity == "warning"


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize("spread", [0.02, 0.1, 0.2])
def test_noisy_validation_is_silent(seed: int, spread: float) -> None:
    noise = np.random.default_rng(seed).standard_normal(EVALUATED.size)
    val = 0.5 + 1.5 * np.exp(-EVALUATED / 80) + 0.5 * spread * noise
    assert judged(np.maximum(val, 0.01)) is None


@pytest.mark.parametrize("evaluations", [10, 30, 100, 300])
def test_many_noisy_evaluations_do_not_add_up_to_alarms(evaluations: int) -> None:
    """What three standard deviations alone would do: with 300 evaluations in 17 % of healthy runs."""
    rng, alarms = np.random.default_rng(evaluations), 0
    steps = np.arange(evaluations)
    for _ in range(300):
        spread, tau = rng.choice([0.05, 0.1, 0.2]), evaluations * rng.choice([0.05, 0.15, 0.3])
        val = 1 + 2 * np.exp(-steps / tau) + spread * rng.standard_normal(evaluations)
        went = course(steps, np.maximum(val, 1e-3))
        assert went is not None
        alarms += went.turned and went.since >= 3 and went.generalisation_loss > 5
    assert alarms <= 6  # 2 %


def test_the_same_rise_is_found_beyond_the_noise_it_has() -> None:
    noise = np.random.default_rng(0).standard_normal(EVALUATED.size)
    assert judged(turned(slope=0.0003) + 0.004 * noise) is not None
    assert judged(turned(slope=0.0003) + 0.1 * np.abs(noise)) is None


def test_a_lucky_first_evaluation_is_no_best() -> None:
    val = 0.5 + 1.5 * np.exp(-EVALUATED / 80)
    val[0] = 0.3
    assert judged(val) is None


def test_a_new_best_later_takes_it_back() -> None:
    """Double descent: critical while it rose, a remark while it comes back, silent with a new best."""
    rise = turned(at=100, slope=0.003)[:15]
    before = history(rise, train=falling()[:320])
    coming_back = np.concatenate([rise, np.linspace(rise[-1], 0.55, 10)])
    new_best = np.concatenate([rise, np.linspace(rise[-1], 0.2, 15)])
    while_rising = overfitting(before)
    assert while_rising is not None
    assert while_rising.severity == "critical"
    remark = found(coming_back)
    assert remark.severity == "info"
    assert "coming back" in remark.summary
    assert judged(new_best) is None


def test_validation_below_training_is_no_matter() -> None:
    """Dropout and label smoothing keep training above validation, an easier validation set too."""
    level = 0.2 + 1.0 * np.exp(-EVALUATED / 100)
    assert judged(level, train=falling() + 0.8) is None


def test_divergence_is_not_called_overfitting() -> None:
    train = np.concatenate([falling()[:200], np.linspace(0.9, 4.0, 400)])
    assert judged(turned(), train=train) is None


def test_training_must_have_gone_on_falling() -> None:
    flat = np.concatenate([falling()[:200], np.full(400, falling()[199])])
    assert judged(turned(), train=flat) is None


def test_without_a_training_loss_validation_alone_decides() -> None:
    losses: dict[str, Any] = {"val_loss": (EVALUATED, turned())}
    made = History(Arrays(losses=losses))
    finding = overfitting(made)
    assert finding is not None
    assert "no training loss" in finding.summary


def test_an_accuracy_as_good_as_ever_makes_it_a_warning() -> None:
    kept = 0.9 - 0.5 * np.exp(-EVALUATED / 60)
    lost = np.where(EVALUATED < 200, kept, kept[9] - 0.0006 * (EVALUATED - 200))
    assert found(turned(), val_accuracy=kept).severity == "warning"
    assert "too sure" in found(turned(), val_accuracy=kept).summary
    assert found(turned(), val_accuracy=lost).severity == "critical"


@pytest.mark.parametrize("name", ["val_accuracy", "eval_acc", "val/acc"])
@pytest.mark.parametrize("top", [1.0, 100.0])
def test_an_accuracy_alone_can_show_it(name: str, top: float) -> None:
    rng = np.random.default_rng(1)
    accuracy = np.where(EVALUATED < 200, 0.5 + 0.002 * EVALUATED, 0.9 - 0.0004 * (EVALUATED - 200))
    finding = found(**{name: top * np.round(accuracy + 0.003 * rng.standard_normal(EVALUATED.size), 2)})
    assert finding.severity == "critical"
    assert abs(finding.first_step - 199) <= 40
    assert float(finding.evidence["accuracy_lost"]) == pytest.approx(0.15, abs=0.03)
    steady = np.round(
        np.minimum(0.5 + 0.002 * EVALUATED, 0.9) + 0.01 * rng.standard_normal(EVALUATED.size), 2
    )
    assert judged(**{name: top * steady}) is None


def test_too_few_evaluations_are_silent_and_negative_losses_a_note() -> None:
    assert judged(turned()[8:13]) is None
    with pytest.raises(Unjudged, match="not positive"):
        judged(turned() - 1.0)


def grown(names: tuple[str, ...], factors: tuple[float, ...], since: int = 200) -> tuple[Any, Any]:
    """Layers, and rows of their weight norms: level until a step, then growing to so many times that."""
    steps = np.arange(0, STEPS, 10)
    late = np.clip((steps - since) / (STEPS - since), 0, None)
    ones = np.ones(steps.size)
    rows = {
        kind: {
            name: {"step": steps, "norm": 5 * (1 + (factor - 1) * late), "skipped": ones * 0}
            for name, factor in zip(names, factors, strict=True)
        }
        for kind in ("weight", "gradient")
    }
    layers = [{"tensor": n, "role": "matrix", "module": n, "shape": [8, 8]} for n in names]
    return rows, layers


def test_the_layers_that_grew_since_the_best_step_are_named_worst_first() -> None:
    rows, layers = grown(("a", "b", "c"), (1.1, 2.0, 1.0))
    finding = found(turned(), rows=rows, layers=layers)
    assert finding.layers == ("b", "a")
    assert float(finding.evidence["largest_change"]) == pytest.approx(1.0, rel=0.05)
    whole = math.sqrt((1.1**2 + 2.0**2 + 1.0) / 3)
    assert float(finding.evidence["weight_growth"]) == pytest.approx(whole, rel=0.05)
    still, moved = np.full(60, 0.1), np.linspace(0.1, 0.9, 60)
    steps = np.arange(0, STEPS, 10)
    rows["drift"] = {
        name: {"step": steps, "relative_l2": moved if name == "c" else still} for name in ("a", "b", "c")
    }
    assert found(turned(), rows=rows, layers=layers).layers == ("c",)


def test_without_validation_there_is_a_remark_at_most() -> None:
    memorised = 2.3 * np.exp(-np.arange(STEPS) / 40)
    rows, layers = grown(("a", "b"), (1.5, 1.6), since=100)
    finding = found(train=memorised, rows=rows, layers=layers)
    assert (finding.severity, finding.problem) == ("info", "overfitting")
    assert "val_loss" in finding.advice
    still, _ = grown(("a", "b"), (1.0, 1.0))
    assert judged(train=memorised, rows=still, layers=layers) is None
    assert judged(train=memorised + 0.5, rows=rows, layers=layers) is None
    assert judged(train=memorised, rows=rows, layers=layers, test_score=np.ones(5)) is None


# ---- real trainings


def train(
    path: Path,
    *,
    samples: int,
    dropout: float,
    decay: float,
    smoothing: float = 0.0,
    accuracy_only: bool = False,
) -> Run:
    """Noisy two-class data: 40 samples are learnt by heart, 2,000 are not."""
    torch.manual_seed(0)
    x, other = torch.randn(samples, 20), torch.randn(400, 20)
    target, truth = ((v[:, :3].sum(1) + 0.5 * torch.randn(len(v)) > 0).long() for v in (x, other))
    model = nn.Sequential(
        nn.Linear(20, 64), nn.ReLU(), nn.Dropout(dropout), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2)
    )
    optimizer = torch.optim.AdamW(model.parameters(), 3e-3, weight_decay=decay)
    watcher = watch(model, optimizer, run=path, every=10)
    for step in range(400):
        batch = torch.randint(samples, (32,))
        loss = F.cross_entropy(model(x[batch]), target[batch], label_smoothing=smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watcher.log(train_loss=loss)
        if step % 20 == 19:
            model.eval()
            with torch.no_grad():
                out = model(other)
            model.train()
            hits = (out.argmax(1) == truth).float().mean()
            if accuracy_only:
                watcher.log(val_accuracy=hits)
            else:
                watcher.log(val_loss=F.cross_entropy(out, truth), val_accuracy=hits)
    watcher.close()
    return Run(path)


def test_a_real_network_that_learns_40_samples_by_heart(tmp_path: Path) -> None:
    run = train(tmp_path / "few", samples=40, dropout=0.0, decay=0.0)
    alarms = [f for f in run.findings() if f.alarm]
    assert [f.problem for f in alarms] == ["overfitting"]
    val = run.scalars("val_loss")
    assert alarms[0].first_step == val["step"].iloc[int(val["value"].argmin())]
    assert set(alarms[0].layers) <= {"0.weight", "3.weight", "5.weight"}
    assert alarms[0].layers
    assert float(alarms[0].evidence["weight_growth"]) > 1.05
    weights = run.stats("weight")
    whole = weights[weights["tensor"].isin(["0.weight", "3.weight", "5.weight"])]
    norms = whole.groupby("step")["norm"].apply(lambda n: float(np.sqrt((n**2).sum())))
    before = norms[norms.index <= alarms[0].first_step].iloc[-1]
    assert float(alarms[0].evidence["weight_growth"]) == pytest.approx(norms.iloc[-1] / before, rel=1e-3)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_a_real_network_with_enough_data_is_healthy(tmp_path: Path, smoothing: float) -> None:
    run = train(tmp_path / "many", samples=4000, dropout=0.3, decay=0.05, smoothing=smoothing)
    assert [f for f in run.findings() if f.alarm] == []
