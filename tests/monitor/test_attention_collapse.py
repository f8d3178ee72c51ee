"""Attention that collapsed, by its entropy: found where it began; silent where heads learn to be sharp."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_detectors import Made, alarms
from torch import Tensor, nn

from layerwatch import Run, watch
from layerwatch.monitor.detectors.attention import attention_collapse

MODULES = [f"blocks.{i}.attn" for i in range(4)]


def made(every: int = 1) -> Made:
    """A healthy training whose attention begins spread out and grows a little sharper."""
    made = Made(every)
    n = made.steps.size
    noise = 0.02 * np.random.default_rng(1).standard_normal((len(MODULES), n))
    made.rows["attention_entropy"] = {
        m: {"step": made.steps, "p50": np.linspace(0.98, 0.6, n) + e}
        for m, e in zip(MODULES, noise, strict=True)
    }
    made.rows["attention_logit"] = {m: {"step": made.steps, "max": np.linspace(1, 9, n)} for m in MODULES}
    return made


def median(made: Made, module: str) -> np.ndarray:
    return made.rows["attention_entropy"][module]["p50"]


@pytest.mark.parametrize("every", [1, 10])
def test_collapsed_from_the_start(every: int) -> None:
    run = made(every)
    for module in MODULES[1:3]:
        median(run, module)[:] = 0.01
    median(run, MODULES[2])[:] = 0.005
    run.rows["attention_logit"][MODULES[2]]["max"][:] = 200.0
    (found,) = alarms(run)
    assert (found.problem, found.severity) == ("attention_collapse", "warning")
    assert found.layers == (MODULES[2], MODULES[1])
    assert found.first_step == 0
    assert found.evidence["median_entropy"] == pytest.approx(0.005)
    assert found.evidence["largest_logit"] == 200


def test_heads_that_learn_to_be_sharp_are_healthy() -> None:
    run = made()
    n = run.steps.size
    for module in MODULES:
        median(run, module)[n // 5 :] = 0.03
    assert alarms(run) == []


def test_a_few_sharp_captures_are_no_collapse() -> None:
    run = made()
    median(run, MODULES[0])[:2] = 0.01
    median(run, MODULES[1])[::4] = 0.01
    median(run, MODULES[2])[:] = np.nan
    assert alarms(run) == []


def test_collapse_while_the_training_fails_begins_where_it_began() -> None:
    run = made()
    n = run.steps.size
    run.loss[n // 2 :] = 3.0
    for module, begin in ((MODULES[3], n // 2 + 4), (MODULES[0], n // 2 + 9)):
        median(run, module)[begin:] = 0.02
    median(run, MODULES[1])[10:20] = 0.02  # it came back
    found = attention_collapse(run.history())
    assert found is not None
    assert found.severity == "critical"
    assert found.layers == (MODULES[3], MODULES[0])
    assert found.first_step == n // 2 + 4


def test_a_pretrained_model_may_be_sharp() -> None:
    run = made()
    median(run, MODULES[0])[:] = 0.01
    assert attention_collapse(run.history()) is not None
    run.info["reference"] = "model.safetensors"
    assert attention_collapse(run.history()) is None


class Reader(nn.Module):
    """Which token came with the query, by attention."""

    def __init__(self, sharpness: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(12, 32)
        self.attn = nn.MultiheadAttention(32, 4, batch_first=True)
        self.head = nn.Linear(32, 8)
        with torch.no_grad():
            self.attn.in_proj_weight[:64] *= sharpness

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        return self.head(x + self.attn(x, x, x, need_weights=False)[0]).mean(1)


@pytest.mark.parametrize(("sharpness", "collapsed"), [(1.0, False), (25.0, True)])
@pytest.mark.parametrize("every", [1, 5])
def test_a_real_training(tmp_path: Path, sharpness: float, collapsed: bool, every: int) -> None:
    model = Reader(sharpness)
    optimizer = torch.optim.Adam(model.parameters(), 1e-3)
    generator = torch.Generator().manual_seed(1)
    truth = torch.randn(12, 8, generator=generator)
    with watch(model, optimizer, run=tmp_path / "run", every=every) as watcher:
        for _ in range(120):
            x = torch.randn(32, 10, 12, generator=generator)
            loss = nn.functional.cross_entropy(model(x), (x.mean(1) @ truth).argmax(1))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            watcher.log(train_loss=loss)
    found = [f for f in Run(tmp_path / "run").findings() if f.alarm]
    assert [(f.problem, f.layers, f.first_step) for f in found] == (
        [("attention_collapse", ("attn",), 0)] if collapsed else []
    )
