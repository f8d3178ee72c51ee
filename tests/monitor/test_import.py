"""TensorBoard's event files as runs: what the writers of torch, TensorFlow 2 and Keras leave behind."""

from __future__ import annotations

import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboard.compat.proto import event_pb2
from tensorboard.plugins.histogram.summary_v2 import histogram_pb
from tensorboard.plugins.scalar.summary_v2 import scalar_pb
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from torch.utils.tensorboard.writer import SummaryWriter

from layerwatch.dashboard.pages import PAGES
from layerwatch.dashboard.plots import draw
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import RUN_PAGES, View
from layerwatch.monitor import Run, RunError, RunExistsError, plain, quantiles, summarise
from layerwatch.monitor.event_files import EventFile, masked
from layerwatch.monitor.kernels import crc32c
from layerwatch.monitor.rebin import rebinned
from layerwatch.monitor.tags import Names, default_histogram, default_scalar, rules
from layerwatch.monitor.tensorboard import PRECISION, described, import_tensorboard
from layerwatch.monitor.wal import Frame, WalWriter
from tests.dashboard.test_pages import controls

RNG = np.random.default_rng(0)
SHARES = ("p01", "p05", "p25", "p50", "p75", "p95", "p99")


@contextmanager
def torch_writer(folder: Path, **more: Any) -> Iterator[SummaryWriter]:
    with SummaryWriter(str(folder), **more) as writer:
        yield writer


@contextmanager
def tf2_writer(folder: Path) -> Iterator[Callable[[int, Any], None]]:
    """As TensorFlow 2 writes, and Keras with it: every value is a tensor of a plugin."""
    writer = EventFileWriter(str(folder))
    when = iter(range(1_700_000_000, 1_800_000_000))
    yield lambda step, summary: writer.add_event(
        event_pb2.Event(wall_time=next(when), step=step, summary=summary)  # type: ignore[attr-defined]
    )
    writer.close()


def events(folder: Path) -> list[Path]:
    return sorted(folder.glob("*tfevents*"))


def scalar_values(run: Run, name: str) -> dict[int, float]:
    frame = run.scalars(name)
    return dict(zip(frame["step"], frame["value"], strict=True))


# What comes out ---------------------------------------------------------------------------------------------


def samples(step: int, kind: str) -> np.ndarray:
    """Weights, and gradients of a ReLU network: many exact zeros, heavy tails."""
    rng = np.random.default_rng([step, len(kind)])
    if kind == "weight":
        return rng.standard_normal(20_000) * 0.02 + 0.001 * step
    return np.maximum(rng.standard_t(3, 20_000), 0) * 1e-4 * (1 + step)


@pytest.fixture(scope="module")
def torch_run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """What torch's SummaryWriter has logged of two tensors and two numbers."""
    root = tmp_path_factory.mktemp("torch")
    with torch_writer(root / "logs") as writer:
        for step in range(0, 50, 10):
            for name in ("fc.weight", "fc.bias"):
                size = 10 if name == "fc.bias" else 20_000
                writer.add_histogram(name, samples(step, "weight")[:size], step)
                writer.add_histogram(name + ".grad", samples(step, "gradient")[:size], step)
            writer.add_scalar("Loss/train", 1 / (1 + step), step)
            writer.add_scalar("accuracy", 0.01 * step, step)
    (made,) = import_tensorboard(root / "logs", root / "run")
    assert (made.path, made.scalars, made.histograms) == (root / "run", 10, 20)
    return Run(made.path)


def test_scalars_come_over_as_they_are(torch_run: Run) -> None:
    assert torch_run.scalar_names() == ["accuracy", "train_loss"]
    wanted = {step: float(np.float32(1 / (1 + step))) for step in range(0, 50, 10)}
    assert scalar_values(torch_run, "train_loss") == wanted


def true_quantiles(x: np.ndarray) -> dict[str, float]:
    """As `Run` tells them of a histogram that was counted in our own buckets."""
    true = summarise(x)
    buckets, counts = np.append(true.buckets, 0).astype(int), np.append(true.counts, true.zeros)
    order = np.argsort(buckets)
    shares = [int(name[1:]) / 100 for name in SHARES]
    found = quantiles(np.zeros(buckets.size, int), buckets[order], counts[order], 1, shares)[0]
    return dict(zip(SHARES, np.clip(found, x.min(), x.max()), strict=True))


@pytest.mark.parametrize("kind", ["weight", "gradient"])
def test_moments_are_exact_and_quantiles_within_stated_bounds(torch_run: Run, kind: str) -> None:
    """docs/log-format.md states this bound: 2 % of what our own buckets tell; near zero, 2 % of std."""
    frame = torch_run.stats(kind, "fc.weight")
    assert frame["step"].tolist() == [0, 10, 20, 30, 40]
    for row in frame.to_dict("records"):
        x = samples(row["step"], kind)
        assert row["count"] == x.size
        assert row["zeros"] == (x == 0).sum()
        assert row["norm"] == pytest.approx(np.linalg.norm(x), rel=1e-12)
        assert row["mean"] == pytest.approx(x.mean(), rel=1e-9)
        assert row["std"] == pytest.approx(x.std(), rel=1e-9)
        assert (row["min"], row["max"]) == (x.min(), x.max())
        for name, true in true_quantiles(x).items():
            assert row[name] == pytest.approx(true, rel=0.02, abs=0.02 * x.std()), name


def test_nothing_is_lost_in_the_histogram(torch_run: Run) -> None:
    for step in range(0, 50, 10):
        mine, true = torch_run.histogram("gradient", "fc.weight", step), summarise(samples(step, "gradient"))
        assert mine["count"].sum() == true.count
        # At no edge of a bucket are more than 2 % of the elements on the other side.
        edges = mine["high"].to_numpy()
        share = np.array([(samples(step, "gradient") < edge).mean() for edge in edges[1:]])
        assert np.abs(mine["count"].cumsum().to_numpy()[1:] / true.count - share).max() < 0.02


def test_the_run_says_where_it_comes_from_and_what_was_lost(torch_run: Run) -> None:
    assert PRECISION in torch_run.info["notes"]
    assert torch_run.info["imported_from"].endswith("logs")
    assert not torch_run.live
    assert torch_run.info["closed"]
    assert torch_run.info["ended"] >= torch_run.info["created"]
    tensors = torch_run.tensors().set_index("tensor")
    assert tensors.loc["fc.weight", "elements"] == 20_000
    assert tensors.loc["fc.weight", "shape"] == [10, 2000]  # ten rows, as the bias has ten elements
    assert tensors["role"].to_dict() == {"fc.weight": "matrix", "fc.bias": "bias"}
    assert torch_run.problems == {}
    assert torch_run.events()["event"].tolist() == ["start"]


def test_detectors_judge_an_imported_run(tmp_path: Path) -> None:
    with torch_writer(tmp_path / "logs") as writer:
        for step in range(30):
            for depth in range(4):
                rng = np.random.default_rng([step, depth])
                size = 1000.0 if depth == 2 and step >= 10 else 0.01
                writer.add_histogram(f"{depth}.weight", rng.standard_normal(500) * 0.1, step)
                writer.add_histogram(f"{depth}.weight.grad", rng.standard_normal(500) * size, step)
            writer.add_scalar("train/loss", 2.3 + 0.001 * np.sin(step), step)
    import_tensorboard(tmp_path / "logs", tmp_path / "run")
    finding = Run(tmp_path / "run").findings()[0]
    assert (finding.problem, finding.layers[0]) == ("exploding_gradients", "2.weight")
    assert finding.first_step == 10


def test_the_dashboard_shows_an_imported_run(torch_run: Run) -> None:
    library, screen = Library(torch_run.path.parent), {"theme": "light", "narrow": False}
    for page in RUN_PAGES:
        _, _, body = open_page(library, View(page, "run", {}), screen)
        assert body
        values = controls(body)
        for plot in PAGES[page].PLOTS:
            drawn = draw(plot, library, {"run": "run"}, screen, [values.get(key) for key in plot.controls])
            assert drawn is not None, plot.id


# TensorFlow 2, Keras ----------------------------------------------------------------------------------------


def test_tensorflow_2_and_keras(tmp_path: Path) -> None:
    x = RNG.standard_normal(10_000) * 0.05 + 0.2
    for part, factor in (("train", 1.0), ("validation", 2.0)):
        with tf2_writer(tmp_path / "logs" / part) as write:
            for epoch in range(4):
                write(epoch, scalar_pb("epoch_loss", factor / (1 + epoch)))
                write(epoch, scalar_pb("epoch_accuracy", 0.5))
                if part == "train":
                    write(epoch, histogram_pb("dense/kernel/histogram", x))
                    write(epoch, histogram_pb("dense/bias/histogram", np.zeros(10)))
    (made,) = import_tensorboard(tmp_path / "logs", tmp_path / "run")
    run = Run(tmp_path / "run")
    assert run.scalars("train_loss")["value"].tolist() == pytest.approx([1 / (1 + e) for e in range(4)])
    assert run.scalars("val_loss")["value"].tolist() == pytest.approx([2 / (1 + e) for e in range(4)])
    assert run.scalar_names() == [
        "train/epoch_accuracy",
        "train_loss",
        "val_loss",
        "validation/epoch_accuracy",
    ]
    row = run.stats("weight", "dense/kernel").iloc[0]
    assert (row["count"], row["min"], row["max"]) == (x.size, x.min(), x.max())
    # 30 linear bins: sums are estimates.
    assert row["mean"] == pytest.approx(x.mean(), rel=0.01)
    assert row["norm"] == pytest.approx(np.linalg.norm(x), rel=0.01)
    assert row["p50"] == pytest.approx(np.median(x), rel=0.1)
    bias = run.stats("weight", "dense/bias").iloc[0]
    assert (bias["zeros"], bias["norm"]) == (10, 0.0)
    assert any("estimates" in note for note in made.notes)


def test_numbers_that_are_not_finite(tmp_path: Path) -> None:
    cases = {
        "nan": [1.0, np.nan, np.nan],
        "up": [1.0, np.inf],
        "down": [-np.inf, 2.0, 3.0],
        "far": [1.0, 3e25],
    }
    with torch_writer(tmp_path / "logs") as writer:
        for name, x in cases.items():
            with np.errstate(all="ignore"):
                writer.add_histogram(name, np.array(x), 0)
        writer.add_scalar("loss", float("nan"), 0)
    import_tensorboard(tmp_path / "logs", tmp_path / "run")
    run = Run(tmp_path / "run")
    frame = run.stats("weight").set_index("tensor")
    assert frame["count"].to_dict() == {name: len(x) for name, x in cases.items()}
    assert frame["nans"].to_dict() == {"nan": 2, "up": 0, "down": 0, "far": 0}
    assert frame["infs"].to_dict() == {"nan": 0, "up": 1, "down": 1, "far": 0}
    assert frame.loc["far", "max"] == 3e25
    assert np.isnan(run.scalars("train_loss")["value"]).all()


def test_other_plugins_are_counted_not_taken(tmp_path: Path) -> None:
    with torch_writer(tmp_path / "logs") as writer:
        writer.add_text("note", "hello", 0)
        writer.add_image("picture", np.zeros((3, 4, 4)), 0)
        writer.add_scalar("loss", 1.0, 0, new_style=True)
    (made,) = import_tensorboard(tmp_path / "logs", tmp_path / "run")
    assert made.scalars == 1
    assert "1 values of the plugin text were left out" in made.notes
    assert "1 values of type image were left out" in made.notes


# Which run, which name --------------------------------------------------------------------------------------


def test_several_trainings_become_several_runs(tmp_path: Path) -> None:
    for name in ("a", "b", "deep/c"):
        with torch_writer(tmp_path / "logs" / name) as writer:
            writer.add_scalar("loss", float(len(name)), 3)
    made = import_tensorboard(tmp_path / "logs", tmp_path / "runs")
    assert [m.path.relative_to(tmp_path).as_posix() for m in made] == ["runs/a", "runs/b", "runs/deep/c"]
    for one in made:
        run = Run(one.path)
        assert run.name == run.info["name"] == one.path.name
        assert run.scalars("train_loss")["value"].item() == len(str(one.path.relative_to(tmp_path / "runs")))


def test_folders_of_add_scalars_belong_to_their_training(tmp_path: Path) -> None:
    with torch_writer(tmp_path / "logs") as writer:
        for step in range(3):
            writer.add_scalars("loss", {"train": 1.0 * step, "val": 2.0 * step}, step)
            writer.add_scalars("my/norm", {"a": 0.5}, step)
    (made,) = import_tensorboard(tmp_path / "logs", tmp_path / "run")
    run = Run(made.path)
    assert run.scalar_names() == ["my/norm/a", "train_loss", "val_loss"]
    assert run.scalars("val_loss")["value"].tolist() == [0.0, 2.0, 4.0]


def test_one_event_file(tmp_path: Path) -> None:
    with torch_writer(tmp_path / "logs") as writer:
        writer.add_scalar("loss", 1.0, 0)
    (file,) = events(tmp_path / "logs")
    assert import_tensorboard(file, tmp_path / "run")[0].scalars == 1


HISTOGRAMS = {
    "fc1.weight": ("fc1.weight", "weight"),
    "fc1.weight.grad": ("fc1.weight", "gradient"),
    "fc1.weight/grad": ("fc1.weight", "gradient"),
    "fc1.weight_grad": ("fc1.weight", "gradient"),
    "grad/fc1.weight": ("fc1.weight", "gradient"),
    "gradients/fc1.weight": ("fc1.weight", "gradient"),
    "Gradients/layers.0.weight": ("layers.0.weight", "gradient"),
    "weights/fc1.weight": ("fc1.weight", "weight"),
    "params/fc1/kernel": ("fc1/kernel", "weight"),
    "dense/kernel/histogram": ("dense/kernel", "weight"),
    "dense/kernel:0": ("dense/kernel", "weight"),
    "activations/relu1": ("relu1", "activation"),
    "relu1/activation": ("relu1", "activation"),
    "relu1/outputs": ("relu1", "activation"),
    "conv1_activations": ("conv1", "activation"),
    "encoder.layer.0.attention.output.dense.weight": (
        "encoder.layer.0.attention.output.dense.weight", "weight"
    ),
    "upgrade.weight": ("upgrade.weight", "weight"),
    "weights/": ("weights/", "weight"),
    "grad": ("grad", "gradient"),
}  # fmt: skip


@pytest.mark.parametrize("tag", HISTOGRAMS)
def test_which_tensor_and_kind_a_tag_is(tag: str) -> None:
    assert default_histogram(tag) == HISTOGRAMS[tag]


SCALARS = {
    "loss": "train_loss", "Loss/train": "train_loss", "train/loss": "train_loss",
    "training_loss": "train_loss",
    "train/epoch_loss": "train_loss", "val_loss": "val_loss", "Loss/val": "val_loss", "eval/loss": "val_loss",
    "validation/epoch_loss": "val_loss", "lr": "lr", "train/learning_rate": "lr",
    "Loss/test": "Loss/test", "train/train_loss": "train_loss", "grad_norm": "grad_norm",
    "lr-Adam": "lr-Adam",
    "loss/discriminator": "loss/discriminator", "valid/accuracy": "valid/accuracy",
}  # fmt: skip


@pytest.mark.parametrize("tag", SCALARS)
def test_what_a_scalar_is_called(tag: str) -> None:
    assert default_scalar(tag) == SCALARS[tag]


def test_two_tags_never_share_a_name() -> None:
    names = Names()
    assert names.scalar("", "loss") == "train_loss"
    assert names.scalar("", "Loss/train") == "Loss/train"
    assert names.scalar("", "train_loss") == "train_loss (2)"
    assert names.scalar("", "loss") == "train_loss"
    assert names.histogram("", "fc.weight") == ("fc.weight", "weight")
    assert names.histogram("", "weights/fc.weight") == ("weights/fc.weight", "weight")
    assert names.histogram("", "fc.weight.grad") == ("fc.weight", "gradient")
    assert names.histogram("eval", "fc.weight") == ("eval/fc.weight", "weight")


def test_rules_of_the_user_come_first(tmp_path: Path) -> None:
    with torch_writer(tmp_path / "logs") as writer:
        for tag in ("g:fc1", "w:fc1", "noise"):
            writer.add_histogram(tag, np.ones(3), 0)
        writer.add_scalar("metrics/ce_dev", 1.0, 0)
    import_tensorboard(
        tmp_path / "logs",
        tmp_path / "run",
        histograms=[(r"^g:(?P<tensor>.+)", "gradient"), (r"^w:(?P<tensor>.+)", "weight"), ("noise", "skip")],
        scalars=[(r"^metrics/(\w+)_dev", r"val_\1")],
    )
    run = Run(tmp_path / "run")
    assert run.stats("gradient")["tensor"].tolist() == run.stats("weight")["tensor"].tolist() == ["fc1"]
    assert run.scalar_names() == ["val_ce"]


def test_roles_and_shapes_are_inferred_from_sizes() -> None:
    sizes = {
        "a.weight": 60,
        "a.bias": 6,
        "bn.weight": 6,
        "bn.bias": 6,
        "head.weight": 50,
        "tok_embed.weight": 40,
    }
    found = {
        e["tensor"]: (e["role"], e["shape"]) for e in described({(t, "weight"): n for t, n in sizes.items()})
    }
    assert found == {
        "a.weight": ("matrix", [6, 10]), "a.bias": ("bias", [6]), "bn.weight": ("norm_gain", [6]),
        "bn.bias": ("bias", [6]), "head.weight": ("matrix", [50]), "tok_embed.weight": ("embedding", [40]),
    }  # fmt: skip


# Restarts and damage ----------------------------------------------------------------------------------------


def test_a_restarted_training_overlaps(tmp_path: Path) -> None:
    """The later file counts from where it begins, tag by tag; what only the first one has stays."""
    logs = tmp_path / "logs"
    for attempt, steps in ((1.0, range(10)), (2.0, range(6, 12))):
        with torch_writer(logs, filename_suffix=f".{attempt}") as writer:
            for step in steps:
                writer.add_scalar("loss", attempt, step)
                writer.add_histogram("w", np.full(5, attempt), step)
                if attempt == 1:
                    writer.add_scalar("only/first", 7.0, step)
    assert len(events(logs)) == 2
    (made,) = import_tensorboard(logs, tmp_path / "run")
    run = Run(made.path)
    assert run.scalars("train_loss")["value"].tolist() == [1.0] * 6 + [2.0] * 6
    assert run.scalars("train_loss")["step"].tolist() == list(range(12))
    assert run.scalars("only/first")["step"].tolist() == list(range(10))
    weights = run.stats("weight", "w")
    assert weights["step"].tolist() == list(range(12))
    assert weights["max"].tolist() == [1.0] * 6 + [2.0] * 6
    assert any(note.startswith("8 values were left out, as a later event file") for note in made.notes)


def test_a_restart_that_purges(tmp_path: Path) -> None:
    with torch_writer(tmp_path / "logs", filename_suffix=".1") as writer:
        for step in range(10):
            writer.add_scalar("loss", 1.0, step)
            writer.add_scalar("gone", 1.0, step)
    with torch_writer(tmp_path / "logs", filename_suffix=".2", purge_step=4) as writer:
        writer.add_scalar("loss", 2.0, 8)
    import_tensorboard(tmp_path / "logs", tmp_path / "run")
    run = Run(tmp_path / "run")
    assert scalar_values(run, "train_loss") == {0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0, 8: 2.0}
    assert run.scalars("gone")["step"].tolist() == [0, 1, 2, 3]


def test_writers_side_by_side_are_no_restart(tmp_path: Path) -> None:
    first = SummaryWriter(str(tmp_path / "logs"), filename_suffix=".1")
    second = SummaryWriter(str(tmp_path / "logs"), filename_suffix=".2")
    for step in range(20):
        first.add_histogram("a", np.ones(3), step)
        second.add_histogram("b", np.ones(3), step)
    first.close()
    second.close()
    import_tensorboard(tmp_path / "logs", tmp_path / "run")
    run = Run(tmp_path / "run")
    for tensor in ("a", "b"):
        assert run.stats("weight", tensor)["step"].tolist() == list(range(20))


def test_a_histogram_of_a_step_that_was_reached_before_is_left_out(tmp_path: Path) -> None:
    with torch_writer(tmp_path / "logs") as writer:
        for step in (0, 1, 1, 0, 2):
            writer.add_histogram("w", np.ones(3), step)
    (made,) = import_tensorboard(tmp_path / "logs", tmp_path / "run")
    assert Run(made.path).stats("weight")["step"].tolist() == [0, 1, 2]
    assert any(note.startswith("2 histograms were left out") for note in made.notes)


@pytest.fixture
def logged(tmp_path: Path) -> Path:
    """One event file of ten scalars."""
    with torch_writer(tmp_path / "logs") as writer:
        for step in range(10):
            writer.add_scalar("loss", float(step), step)
    (file,) = events(tmp_path / "logs")
    return file


def imported(file: Path, tmp_path: Path) -> tuple[list[int], list[str]]:
    (made,) = import_tensorboard(file, tmp_path / "run")
    return Run(made.path).scalars("train_loss")["step"].tolist(), made.notes


@pytest.mark.parametrize("cut", [1, 4, 20, 30])
def test_a_truncated_last_record(logged: Path, tmp_path: Path, cut: int) -> None:
    logged.write_bytes(logged.read_bytes()[:-cut])
    steps, notes = imported(logged, tmp_path)
    assert steps == list(range(9))
    assert any("ends within a record" in note for note in notes)


def test_a_record_with_a_flipped_bit_is_skipped(logged: Path, tmp_path: Path) -> None:
    data = bytearray(logged.read_bytes())
    position = data.index(b"loss", data.index(b"loss") + 1)  # in the second scalar
    data[position] ^= 0x10
    logged.write_bytes(data)
    steps, notes = imported(logged, tmp_path)
    assert steps == [0, *range(2, 10)]
    assert sum("damaged at byte" in note for note in notes) == 1


def test_after_a_damaged_length_nothing_is_guessed(logged: Path, tmp_path: Path) -> None:
    data = bytearray(logged.read_bytes())
    data[data.index(b"loss", len(data) // 2) - 60] ^= 0xFF
    logged.write_bytes(data)
    steps, notes = imported(logged, tmp_path)
    assert steps == list(range(len(steps)))
    assert len(steps) < 10
    assert any("damaged at byte" in note for note in notes)


def test_a_record_that_is_no_event(logged: Path, tmp_path: Path) -> None:
    head = struct.pack("<Q", 3)
    body = b"\xff\xff\xff"
    record = head + struct.pack("<I", masked(head)) + body + struct.pack("<I", masked(body))
    logged.write_bytes(logged.read_bytes() + record)
    steps, notes = imported(logged, tmp_path)
    assert steps == list(range(10))
    assert any("no event at byte" in note for note in notes)


def test_it_reads_what_the_package_reads(logged: Path) -> None:
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    theirs = list(LegacyEventFileLoader(str(logged)).Load())
    assert list(EventFile(logged)) == theirs
    assert len(theirs) == 11


@given(st.binary(max_size=100))
def test_checksums(data: bytes) -> None:
    array = np.frombuffer(data, np.uint8)
    assert int(crc32c(array)) == plain.crc32c(array)


def test_the_checksum_of_the_standard() -> None:
    assert plain.crc32c(np.frombuffer(b"123456789", np.uint8)) == 0xE3069283


# Rebinning --------------------------------------------------------------------------------------------------


@given(
    st.lists(
        st.floats(-1e6, 1e6).filter(lambda x: x == 0 or abs(x) > 1e-6), min_size=2, max_size=40, unique=True
    ),
    st.data(),
)
def test_totals_are_exact_whatever_the_bins(edges: list[float], data: st.DataObject) -> None:
    at = np.sort(np.array(edges))
    counts = np.array(
        data.draw(st.lists(st.integers(0, 1000), min_size=at.size - 1, max_size=at.size - 1)), np.float64
    )
    found = rebinned(at[:-1], at[1:], counts)
    assert found.count == counts.sum()
    assert found.counts.sum() + found.zeros + found.subnormals == found.count
    assert (found.counts > 0).all()
    assert (np.diff(found.buckets.astype(int)) > 0).all()


def test_single_values_go_where_they_belong() -> None:
    values = np.array([-3.0, -1.0, -1e-39, 0.0, 1e-39, 1.0, 1.25, 7.5, 1e150])
    found, true = rebinned(values, values, np.ones(values.size)), summarise(values)
    assert found.buckets.tolist() == true.buckets.tolist()
    assert found.counts.tolist() == true.counts.tolist()
    assert (found.zeros, found.subnormals, found.min, found.max) == (1, 2, -3.0, 1e150)


def test_even_spread_inside_a_bin() -> None:
    found = rebinned(np.array([1.0]), np.array([2.0]), np.array([8.0]))
    assert (found.buckets.tolist(), found.counts.tolist()) == ([508, 509, 510, 511], [2, 2, 2, 2])
    found = rebinned(np.array([-1.0]), np.array([1.0]), np.array([8.0]))
    assert found.counts[found.buckets >= 504].sum() == 2  # [0.5, 1) is a quarter of the bin
    assert found.counts[found.buckets < 0].sum() == 4


# Mistakes ---------------------------------------------------------------------------------------------------


def test_mistakes_are_explained(tmp_path: Path, logged: Path) -> None:
    logs = logged.parent
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    for arguments, error in (
        ((tmp_path / "gone", tmp_path / "r"), "does not exist"),
        ((tmp_path / "empty", tmp_path / "r"), "holds none"),
        ((logs, tmp_path / "gone" / "r"), "expected an existing folder"),
    ):
        with pytest.raises(RunError, match=error):
            import_tensorboard(*arguments)
    with pytest.raises(RunExistsError, match="choose another name"):
        import_tensorboard(logs, tmp_path / "taken")
    for option in ({"histograms": [("(", "weight")]}, {"scalars": [("x", r"\2")]}):
        with pytest.raises(RunError, match="expected a regular expression"):
            import_tensorboard(logs, tmp_path / "r", **option)
    with pytest.raises(RunError, match=r"expected one of weight, .* got 'wieght'"):
        import_tensorboard(logs, tmp_path / "r", histograms=[("x", "wieght")])
    assert sorted(p.name for p in tmp_path.iterdir()) == ["empty", "logs", "taken"]


def test_logs_without_anything_to_import(tmp_path: Path) -> None:
    with torch_writer(tmp_path / "logs") as writer:
        writer.add_text("note", "hello")
    with pytest.raises(RunError, match="neither scalars nor histograms"):
        import_tensorboard(tmp_path / "logs", tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def test_an_import_that_fails_leaves_nothing(
    logged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: EventFile) -> Iterator[Any]:
        raise OSError(5, "Input/output error")
        yield

    monkeypatch.setattr(EventFile, "__iter__", fail)
    with pytest.raises(OSError, match="Input/output"):
        import_tensorboard(logged, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def test_a_full_disk_leaves_nothing(logged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write = WalWriter.write

    def full(self: WalWriter, *frames: Frame) -> int:
        if frames[0][0] == "scalars" and b"[4," in bytes(frames[0][1]):
            raise OSError(28, "No space left on device")
        return write(self, *frames)

    monkeypatch.setattr(WalWriter, "write", full)
    with pytest.raises(RunError, match="could not be written whole: make room"):
        import_tensorboard(logged, tmp_path / "run")
    assert [p.name for p in tmp_path.iterdir()] == ["logs"]


def test_without_the_package(logged: Path, checkout: Path) -> None:
    code = (
        "import sys\nsys.modules['tensorboard'] = None\nfrom layerwatch.cli import main\n"
        f"raise SystemExit(main(['import-tensorboard', {str(logged.parent)!r}, 'run']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=checkout, check=False
    )
    assert done.returncode == 2
    assert "pip install 'layerwatch[tensorboard]'" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert rules([], "histograms") == []
