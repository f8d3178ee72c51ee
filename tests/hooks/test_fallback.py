"""Where compiled loops cannot be had numpy does the same; compiling is announced, and only if it happens."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from layerwatch import Run
from layerwatch.monitor import kernels, plain
from layerwatch.monitor.reader import LogReader
from layerwatch.monitor.summary import summarise

#: Every storage type and route: a bf16 reference (above 65,536 elements), counting by pairs (above 131,072),
#: half precision, double precision, sparse gradients, a convolution, attention, Adam's state, anchors.
TRAINING = """
import sys
from pathlib import Path
import torch
from torch import nn
from layerwatch import watch

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU()
        self.squash = nn.Sigmoid()
        self.wide = nn.Linear(8 * 36, 500)
        self.attention = nn.MultiheadAttention(20, 2, batch_first=True)
        self.brain = nn.Linear(500, 16).bfloat16()
        self.narrow = nn.Linear(16, 16).half()
        self.exact = nn.Linear(16, 16).double()
        self.table = nn.Embedding(30, 16, sparse=True)

    def forward(self, x, words):
        h = self.squash(self.wide(self.act(self.conv(x)).flatten(1)))
        a = h.view(-1, 25, 20)
        h = self.attention(a, a, a, need_weights=False)[0].flatten(1)
        h = self.brain(h.bfloat16()).half()
        return self.exact(self.narrow(h).double()).float() + self.table(words)

torch.manual_seed(0)
torch.set_num_threads(1)
model = Model()
model.conv.to(memory_format=torch.channels_last)
dense = [p for n, p in model.named_parameters() if not n.startswith("table")]
optimizers = [torch.optim.Adam(dense, 1e-3, eps=1e-4), torch.optim.SparseAdam(model.table.parameters())]
options = {"every": 2, "anchors": 2, "step_norms": True, "system": False}
with watch(model, optimizers, run=Path(sys.argv[1]), **options) as watcher:
    for step in range(5):
        loss = nn.functional.cross_entropy(model(torch.randn(8, 3, 6, 6), torch.randint(0, 30, (8,))),
                                           torch.randint(0, 16, (8,)))
        loss.backward()
        if step == 2:
            nn.utils.clip_grad_norm_(dense, 0.01)
        for optimizer in optimizers:
            optimizer.step()
        for optimizer in optimizers:
            optimizer.zero_grad()
        watcher.log(train_loss=loss)
"""


def train(path: Path, before: str = "", **environment: str) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", before + TRAINING, str(path)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert not (path / "errors.log").exists(), (path / "errors.log").read_text()
    return done


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("compiled") / "run"
    train(path)
    return path


MISSING = """
import sys
class Missing:
    def find_spec(self, name, *_):
        if name == "numba":
            raise ImportError("no numba here")
sys.meta_path.insert(0, Missing())
"""
BROKEN = """
from numba.core.typed_passes import NopythonTypeInference
def fail(*_):
    raise AssertionError("no compiler today")
NopythonTypeInference.run_pass = fail
"""


def rows(path: Path, table: str) -> pd.DataFrame:
    """A table as it was logged, without times and without what merely costs time."""
    found = LogReader(path).table(table).to_pandas().drop(columns="time")
    if table == "scalars":
        return found[found["name"] != "overhead"].sort_values(["step", "name"]).reset_index(drop=True)
    return found.sort_values(["step", "tensor", "kind"]).reset_index(drop=True)


def assert_same(a: pd.DataFrame, b: pd.DataFrame) -> None:
    assert len(a)
    assert a.columns.equals(b.columns)
    for column in a:
        if column in ("buckets", "counts", "values"):
            for x, y in zip(a[column], b[column], strict=True):
                np.testing.assert_allclose(x, y, rtol=1e-6 if column == "values" else 0, err_msg=column)
        elif column in ("sum", "dot"):  # what cancels is as exact as what was added
            scale = a["sum_sq"] * (a["count"] if column == "sum" else a["ref_sum_sq"].fillna(1))
            apart = (a[column] - b[column]).abs()[a[column].notna() | b[column].notna()]
            assert (apart <= 1e-12 * np.sqrt(scale[apart.index]) + 1e-9 * a[column].abs()[apart.index]).all()
        elif a[column].dtype.kind == "f":
            np.testing.assert_allclose(a[column], b[column], rtol=1e-10, err_msg=str(column))
        else:
            pd.testing.assert_series_equal(a[column], b[column])


@pytest.mark.parametrize("how", ["switched off", "missing", "broken"])
def test_numpy_writes_the_same_rows(tmp_path: Path, compiled: Path, how: str) -> None:
    path = tmp_path / "run"
    if how == "switched off":
        done, reason = train(path, NUMBA_DISABLE_JIT="1"), "NUMBA_DISABLE_JIT is set"
    elif how == "missing":
        done, reason = train(path, MISSING), "no numba here"
    else:
        done, reason = train(path, BROKEN, NUMBA_CACHE_DIR=str(tmp_path / "cache")), "no compiler today"
    assert (Run(path).info["kernels"], Run(compiled).info["kernels"]) == ("numpy", "compiled")
    assert sum(reason in note for note in Run(path).info["notes"]) == 1
    assert done.stderr.count("plain numpy runs instead") == 1
    assert reason in done.stderr
    wanted = rows(compiled, "stats")
    assert set(wanted["kind"]) >= {
        "initial_weight", "weight", "gradient", "update", "drift", "activation", "second_moment", "momentum",
        "attention_entropy", "attention_logit", "gradient_norm",
    }  # fmt: skip
    assert wanted.loc[wanted["kind"] == "second_moment", "dot"].gt(0).any()
    assert set(wanted["stage"].dropna()) == {"at_step", "before_clip"}
    assert wanted["residual_sq"].notna().any()
    assert wanted["lost"].gt(0).any()
    assert wanted["sign_flips"].gt(0).any()
    assert wanted["active"].notna().any()
    assert_same(wanted, rows(path, "stats"))
    kinds = set(rows(compiled, "values")["kind"])
    assert kinds >= {"sketch", "initial_sketch", "dead_share", "saturated_share"}
    assert_same(rows(compiled, "values"), rows(path, "values"))
    assert_same(rows(compiled, "scalars"), rows(path, "scalars"))


def test_quantiles_in_numpy() -> None:
    rng = np.random.default_rng(0)
    arrays = [rng.normal(size=n) for n in (1, 9, 500)] + [
        np.zeros(4),
        np.empty(0),
        np.array([-1.0, 0.0, 2.0]),
    ]
    parts = [summarise(a) for a in arrays]
    offsets = np.cumsum([0, *(p.buckets.size for p in parts)]).astype(np.int32)
    buckets, counts = (np.concatenate([getattr(p, name) for p in parts]) for name in ("buckets", "counts"))
    small = np.array([p.zeros + p.subnormals for p in parts])
    shares = np.array([0.01, 0.25, 0.5, 0.99])
    found, wanted = np.empty((2, len(parts), shares.size))
    plain.histogram_quantiles(offsets, buckets, counts, small, shares, found)
    kernels.histogram_quantiles(offsets, buckets, counts, small, shares, wanted)
    np.testing.assert_allclose(found, wanted, rtol=1e-12)
    assert np.isnan(found).any(axis=1).tolist() == [False, False, False, False, True, False]


COMPILE = """
import numpy as np
from layerwatch.monitor import kernels, sweep
source, target = np.arange(3), np.zeros(3, np.int64)
numbers = source.ctypes.data, target.ctypes.data, source.nbytes
for _ in range(2):
    sweep.copy_all(*(np.array([n], np.int64) for n in numbers))
assert (target == source).all() and kernels.available(), kernels.describe()
"""
NO_FOLDER = """
from numba.core import caching
caching.CacheImpl._locator_classes = []
caching.CompileResultCacheImpl._locator_classes = []
"""
FULL_DISK = """
from numba.core import caching
def fail(*_):
    raise OSError("no space left on device")
caching.IndexDataCacheFile.save = fail
"""


def compile_in(cache: Path, before: str = "") -> str:
    """What a process that needs a compiled loop says."""
    done = subprocess.run(
        [sys.executable, "-c", before + COMPILE],
        env={**os.environ, "NUMBA_CACHE_DIR": str(cache)}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_compiling_is_announced_when_it_happens(tmp_path: Path) -> None:
    assert compile_in(tmp_path).count("compiling layerwatch's kernels, once on this machine") == 1
    assert compile_in(tmp_path) == ""


def test_without_a_folder_for_the_cache_every_process_compiles(tmp_path: Path) -> None:
    for _ in range(2):
        assert compile_in(tmp_path, NO_FOLDER).count("kernels, in every process") == 1


def test_a_cache_that_cannot_be_written_costs_no_compiled_loop(tmp_path: Path) -> None:
    assert "plain numpy" not in compile_in(tmp_path, FULL_DISK)
