"""The stored values of small tensors: exact, thinned to a share of the log, first and last kept."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from trainings import batch, mlp, watched_training, weights_of

from layerwatch import Run

MODELS = {
    "mlp": (lambda: nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(32, 32), nn.ReLU())]), 32),
    "wide": (lambda: nn.Sequential(nn.Linear(64, 1000), nn.ReLU(), nn.Linear(1000, 1000)), 64),
    "tiny": (lambda: nn.Linear(3, 2), 3),
}


def bytes_of(run: Path, table: str) -> int:
    """Compressed bytes of the columns of a compacted table; files' footers not counted."""
    groups = [pq.read_metadata(p) for p in (run / table).glob("*.parquet")]
    columns = [
        m.row_group(g).column(c)
        for m in groups
        for g in range(m.num_row_groups)
        for c in range(m.num_columns)
    ]
    return sum(c.total_compressed_size for c in columns)


@pytest.mark.parametrize("name", MODELS)
def test_values_take_about_a_tenth_of_the_log(tmp_path: Path, name: str) -> None:
    torch.manual_seed(0)
    build, features = MODELS[name]
    model = build()
    steps = 80 if name == "wide" else 200
    run = watched_training(
        tmp_path / "run", model, torch.optim.AdamW(model.parameters(), 1e-3), steps,
        data=lambda s: batch(s, 8, features),
    )  # fmt: skip
    values, stats = bytes_of(tmp_path / "run", "values"), bytes_of(tmp_path / "run", "stats")
    small = [n for n, p in model.named_parameters() if p.numel() <= 1024]
    kept, _ = run.values(small[0])
    assert (kept[0], kept[-1]) == (0, steps - 1)
    must = 3 / len(kept)  # before, after the first, after the last step: kept whatever they cost
    assert values / (values + stats) <= max(0.13, 0.13 + must)
    if must < 0.1:
        assert values / (values + stats) >= 0.04  # the allowance is used


def test_stored_values_are_the_weights(tmp_path: Path) -> None:
    model = mlp()
    weights: list[dict[str, Tensor]] = []
    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), 80,
        after_step=lambda _: weights.append(weights_of(model)),
    )  # fmt: skip
    for tensor in weights[0]:
        steps, values = run.values(tensor)
        assert len(steps) > 2
        assert len(set(steps.tolist())) == len(steps)
        for step, row in zip(steps.tolist(), values, strict=True):
            assert np.array_equal(row, weights[step][tensor].double().numpy().ravel())


def test_the_last_values_are_those_of_the_last_step(tmp_path: Path) -> None:
    """Also when it is none of the captured ones."""
    model = mlp()
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), 8, every=5)
    steps, values = run.values("2.bias")
    assert steps[-1] == 7
    assert np.array_equal(values[-1], model.get_parameter("2.bias").detach().double().numpy())


def test_large_tensors_have_no_values(tmp_path: Path) -> None:
    model = nn.Linear(32, 33)
    run = watched_training(
        tmp_path / "run",
        model,
        torch.optim.SGD(model.parameters(), 0.1),
        data=lambda s: batch(s, features=32),
    )
    assert run.values("weight")[0].size == 0
    assert run.values("bias")[0].size > 1


def test_one_step_is_stored_once(tmp_path: Path) -> None:
    model = mlp()
    run = watched_training(tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), 1)
    table = pq.read_table(tmp_path / "run" / "values")
    keys = list(
        zip(table["tensor"].to_pylist(), table["kind"].to_pylist(), table["step"].to_pylist(), strict=True)
    )
    keys = [key for key in keys if key[1] in ("weight", "initial_weight")]
    assert len(keys) == len(set(keys)) == 8  # four tensors, before and after
    assert Run(tmp_path / "run").values("0.bias")[0].tolist() == [0]
    assert run.last_step == 0


def test_a_bounded_log_has_bounded_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is merged later leaves little that could pay for values."""
    from layerwatch.hooks import values

    monkeypatch.setattr(values, "KEPT", 10)
    kept = {}
    for keep in ("full", "rollup"):
        model = nn.Sequential(*[m for _ in range(8) for m in (nn.Linear(64, 64), nn.ReLU())])
        run = watched_training(
            tmp_path / keep, model, torch.optim.SGD(model.parameters(), 0.01), 300, watching={"keep": keep},
            data=lambda s: batch(s, 8, 64),
        )  # fmt: skip
        steps, _ = run.values("0.bias")
        kept[keep] = steps.tolist()
        assert (steps[0], steps[-1]) == (0, 299)
    early = [step for step in kept["full"] if step < 10]
    assert kept["rollup"][: len(early)] == early
    assert len(kept["full"]) > 20
    assert len(kept["rollup"]) < len(kept["full"]) / 4
