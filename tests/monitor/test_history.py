"""What detectors see of a run is what the run says, read at once or as it grows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch import nn

from layerwatch.hooks import watch
from layerwatch.monitor import Run, log
from layerwatch.monitor.detectors import History, thinned
from layerwatch.monitor.detectors.growing import Growing
from layerwatch.monitor.detectors.history import nanmedian
from layerwatch.monitor.detectors.matrices import FIRST, Matrix
from tests.dashboard.tiny import batch, mlp

Look = Callable[[], object]


def training(
    folder: Path,
    net: nn.Module,
    lr: float,
    steps: int,
    *,
    start: int | None = None,
    every: int = 1,
    look_every: int = 1,
    break_at: int | None = None,
) -> Iterator[int]:
    """A training that stops now and then, to be looked at while its log is open. It ends closed."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(start or 0)
    held = batch(128, generator)
    optimizer = torch.optim.SGD(net.parameters(), lr)
    resume = False if start is None else start
    with watch(net, optimizer, run=folder, every=every, resume=resume) as watcher:
        for step in range(start or 0, (start or 0) + steps):
            x, y = batch(32, generator)
            loss = nn.functional.cross_entropy(net(x), y)
            if step == break_at:
                loss = loss * float("nan")
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            watcher.log(train_loss=loss)
            if step % 10 == 9:
                with torch.no_grad():
                    watcher.log(val_loss=nn.functional.cross_entropy(net(held[0]), held[1]))
            if step % look_every == look_every - 1:
                yield step


def assert_same(growing: Growing) -> list[str]:
    """The findings of a run that is opened anew; what they are."""
    found, notes = growing.find()
    fresh = Run(growing.run.path)
    assert [f.to_dict() for f in found] == [f.to_dict() for f in fresh.findings()]
    assert set(notes) <= set(fresh.notes())
    return [f.problem for f in found if f.alarm]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every third step of 60 is captured."""
    folder = tmp_path_factory.mktemp("history") / "run"
    torch.manual_seed(0)
    list(training(folder, mlp(nn.ReLU, 3), 0.1, 60, every=3))
    return folder


@pytest.mark.parametrize("kind", [*FIRST, "gradient_norm", "second_moment"])
def test_tables_are_the_columns_of_the_run(finished: Path, kind: str) -> None:
    run = Run(finished)
    history = History(run)
    frame = run.drift() if kind == "drift" else run.stats(kind)
    assert set(history.measured(kind)) == set(frame["tensor"])
    names = tuple(dict.fromkeys(frame["tensor"]))[::-1]
    columns = [c for c in frame.columns if c not in ("step", "time", "tensor", "stage", "state")]
    for column in columns if names else ():
        expected = frame.pivot(index="step", columns="tensor", values=column).astype(float)
        expected = expected.reindex(index=history.steps, columns=list(names)).to_numpy()
        np.testing.assert_array_equal(history.table(kind, column, names), expected, err_msg=column)


def test_tensors_without_rows_and_columns_without_numbers_are_nan(finished: Path) -> None:
    history = History(Run(finished))
    table = history.table("gradient", "norm", ("no such", "0.weight"))
    assert np.isnan(table[:, 0]).all()
    assert np.isfinite(table[:, 1]).all()
    assert np.isnan(history.table("gradient", "no such", ("0.weight",))).all()
    assert np.isnan(history.table("no such", "norm", ("0.weight",))).all()


def test_tables_cannot_be_changed_by_a_detector(finished: Path) -> None:
    history = History(Run(finished))
    with pytest.raises(ValueError, match="read-only"):
        history.table("gradient", "norm", history.names())[0] = 0


def test_states(finished: Path) -> None:
    history = History(Run(finished))
    names = history.names()
    assert (history.states(names) == "trainable").all()
    assert history.has_state(names).all()
    assert history.has_state(names, "trainable", "unused").all()
    assert not history.has_state(names, "unused").any()


@pytest.mark.parametrize("axis", [0, 1])
def test_nanmedian_is_numpys_of_the_finite_values(axis: int) -> None:
    rng = np.random.default_rng(0)
    values = rng.standard_normal((9, 8))
    values[rng.random(values.shape) < 0.4] = np.nan
    values[3] = np.inf
    values[:, 5] = np.nan
    before = values.copy()
    finite = pd.DataFrame(np.where(np.isfinite(values), values, np.nan))
    expected = (finite if axis == 0 else finite.T).median().to_numpy()
    np.testing.assert_allclose(nanmedian(values, axis), expected)
    np.testing.assert_array_equal(values, before)


def test_a_matrix_grows_as_if_it_had_been_made_at_once() -> None:
    rng = np.random.default_rng(0)
    for constant in (True, False):
        whole = np.full((4, 50), 7.0) if constant else rng.standard_normal((4, 50))
        whole[3, :31] = np.nan  # a tensor that comes later
        matrix = Matrix(whole[:3, :5].copy())
        for since, end, tensors in ((5, 9, 3), (7, 20, 3), (20, 20, 3), (18, 40, 4), (38, 50, 4)):
            matrix.replace(since, whole[:tensors, since:end].copy())
        np.testing.assert_array_equal(matrix.take(slice(None)), whole.T)
        if constant:
            assert Matrix(whole[:3].copy()).take(slice(None)).strides[0] == 0  # kept once


# ---- while it grows

CASES: dict[str, tuple[float, int | None]] = {
    "healthy": (0.1, None),
    "breaks": (0.1, 45),
    "too fast": (40.0, None),
}


@pytest.mark.parametrize("case", CASES)
def test_findings_while_it_grows_are_those_of_a_fresh_run(tmp_path: Path, case: str) -> None:
    lr, break_at = CASES[case]
    torch.manual_seed(0)
    growing, alarms = None, []
    for _ in training(tmp_path / "run", mlp(nn.ReLU, 4), lr, 120, look_every=15, break_at=break_at):
        growing = growing or Growing(Run(tmp_path / "run"))
        alarms = assert_same(growing)
    assert growing is not None
    assert assert_same(growing) == alarms  # closed, with the rows after the last step
    assert bool(alarms) == (case != "healthy")


def test_a_log_that_is_compacted_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "SEGMENT_SECONDS", 0.01)
    torch.manual_seed(0)
    growing, parts = None, set()
    for _ in training(tmp_path / "run", mlp(nn.Sigmoid, 8), 0.05, 150, look_every=25):
        growing = growing or Growing(Run(tmp_path / "run"))
        assert_same(growing)
        parts |= {p.name for p in (tmp_path / "run/stats").glob("*.parquet")}
    assert growing is not None
    assert len(parts) > 1
    assert assert_same(growing)


def test_a_training_that_is_resumed_at_an_earlier_step(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = mlp(nn.ReLU, 4)
    growing = None
    for _ in training(tmp_path / "run", net, 0.1, 60, look_every=20):
        growing = growing or Growing(Run(tmp_path / "run"))
        assert_same(growing)
    assert growing is not None
    for _ in training(tmp_path / "run", net, 60.0, 80, start=40, look_every=20):
        assert_same(growing)
    assert assert_same(growing)


def test_only_new_rows_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[int] = []
    stored = Run.sums

    def counted(run: Run, *arguments: object) -> object:
        table = stored(run, *arguments)  # type: ignore[arg-type]
        read.append(table.num_rows)
        return table

    monkeypatch.setattr(Run, "sums", counted)
    torch.manual_seed(0)
    net, growing, looks = mlp(nn.ReLU, 4), None, []
    for _ in training(tmp_path / "run", net, 0.1, 100, look_every=20):
        growing = growing or Growing(Run(tmp_path / "run"))
        read.clear()
        growing.find()
        looks.append(sum(read))
    assert max(looks[2:]) < 1.7 * looks[0]  # the captures that may have got late rows are read again


def test_old_rows_that_are_merged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that becomes too long is judged as a fresh one is."""
    monkeypatch.setattr(thinned, "MOST_ROWS", 8 * 40)
    monkeypatch.setattr(thinned, "LEAST_POINTS", 10)
    torch.manual_seed(0)
    growing, notes = None, []
    for _ in training(tmp_path / "run", mlp(nn.ReLU, 4), 0.1, 120, look_every=20):
        growing = growing or Growing(Run(tmp_path / "run"))
        assert_same(growing)
        notes.append(any("the log is long" in note for note in growing.find()[1]))
    assert not notes[0]
    assert notes[-1]
