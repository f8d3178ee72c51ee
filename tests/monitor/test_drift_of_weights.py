"""`layerwatch.drift` of weight files: every number against a slow float64 twin, nothing dropped."""

from __future__ import annotations

import json
import math
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import layerwatch
from layerwatch.cli import main
from layerwatch.monitor import kernels
from layerwatch.monitor.errors import WeightsError
from layerwatch.monitor.weights import spectrum as spectral
from layerwatch.monitor.weights.moving import Change, change_of
from layerwatch.monitor.weights.report import Drift
from layerwatch.monitor.weights.yardstick import judge

State = dict[str, torch.Tensor]
PLAIN = np.empty(0, np.float32)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2)


def network(layers: int = 6, width: int = 12, seed: int = 0) -> State:
    """A small network of repeated blocks with an embedding, norms and an output layer."""
    torch.manual_seed(seed)
    state = {"embed_tokens.weight": torch.randn(40, width)}
    for i in range(layers):
        state[f"layers.{i}.mlp.weight"] = torch.randn(width, width)
        state[f"layers.{i}.mlp.bias"] = torch.randn(width)
        state[f"layers.{i}.norm.weight"] = torch.ones(width)
    return state | {"lm_head.weight": torch.randn(5, width), "lm_head.bias": torch.zeros(5)}


def moved(state: State, by: float = 0.01) -> State:
    torch.manual_seed(9)
    return {name: t + by * torch.randn(t.shape).to(t.dtype) for name, t in state.items()}


def twin(a: torch.Tensor, b: torch.Tensor) -> dict[str, Any]:
    """The same numbers as they are defined."""
    x, y = a.double().numpy().ravel(), b.double().numpy().ravel()
    whole = np.isfinite(x) & np.isfinite(y)
    x, y = x[whole], y[whole]
    return {
        "relative_l2": np.linalg.norm(y - x) / np.linalg.norm(x),
        "distance": np.linalg.norm(y - x),
        "cosine": x @ y / np.linalg.norm(x) / np.linalg.norm(y),
        "max_abs_change": np.abs(y - x).max(),
        "sign_flips": ((x < 0) & (y > 0) | (x > 0) & (y < 0)).sum(),
        "share_changed": (x != y).mean(),
        "norm_a": np.linalg.norm(x), "norm_b": np.linalg.norm(y),
        "mean_a": x.mean(), "mean_b": y.mean(), "std_a": x.std(), "std_b": y.std(),
        "not_finite": (~whole).sum(),
    }  # fmt: skip


def row_of(drift: Drift, tensor: str) -> dict[str, Any]:
    return next(row for row in drift.rows if row["tensor"] == tensor)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("other", [None, torch.float32])
def test_every_number_agrees_with_float64(dtype: torch.dtype, other: torch.dtype | None) -> None:
    torch.manual_seed(0)
    a = (torch.randn(90, 71, dtype=torch.float64) * 0.3).to(dtype)
    b = (a.double() + 0.02 * torch.randn(90, 71, dtype=torch.float64)).to(other or dtype)
    found = row_of(layerwatch.drift({"w": a}, {"w": b}), "w")
    for name, value in twin(a, b).items():
        assert found[name] == pytest.approx(float(value), rel=1e-9, abs=1e-12), name


@given(
    st.lists(st.floats(width=32), min_size=1, max_size=40),
    st.lists(st.floats(width=32), min_size=40, max_size=40),
    st.integers(0, 40),
)
@settings(max_examples=60, deadline=None)
def test_the_compiled_loop_agrees_with_numpy_and_parts_add(a: list, b: list, cut: int) -> None:
    x, y = np.array(a, np.float32), np.array(b[: len(a)], np.float32)
    assert kernels.available()
    fast, slow = (
        change_of((x, PLAIN), (y, PLAIN)),
        change_of((x.astype(float), PLAIN), (y.astype(float), PLAIN)),
    )
    parts = change_of((x[:cut], PLAIN), (y[:cut], PLAIN)) + change_of((x[cut:], PLAIN), (y[cut:], PLAIN))
    for one in (fast, parts):
        assert one.counters.tolist() == slow.counters.tolist()
        assert one.histogram.tolist() == slow.histogram.tolist()
        # The largest change is that of the changes as float32.
        np.testing.assert_allclose(one.numbers, slow.numbers, rtol=1e-6, atol=1e-40)


def test_the_histogram_counts_every_change_once() -> None:
    torch.manual_seed(0)
    a = torch.randn(3000)
    b = a.clone()
    b[:2000] += torch.randn(2000) * torch.logspace(-6, 1, 2000)
    b[5], b[7] = math.nan, a[7] + 2**-140
    drift = layerwatch.drift({"w": a}, {"w": b})
    frame = drift.histogram("w")
    d = (b.double() - a.double()).numpy()
    d = d[np.isfinite(d)]
    assert frame["count"].sum() == 2999
    assert frame.loc[frame["low"] == frame["high"], "count"].item() == (d == 0).sum()
    for low, high, count in frame[["low", "high", "count"]].to_numpy():
        if low < high and abs(low) > 1e-30 and abs(high) > 1e-30:
            inside = (d >= low) & (d < high) if low > 0 else (d > low) & (d <= high)
            assert abs(inside.sum() - count) <= 1  # the change is rounded to float32 before
    assert (frame["low"].diff().dropna() > 0).all()


def test_names_that_differ_and_what_has_no_counterpart_are_told() -> None:
    a = network()
    b = {f"module.model.{name}": t for name, t in moved(a).items()}
    b["module.model.lm_head.weight"] = torch.randn(7, 12)
    b["module.model.layers.2.mlp.weight"] = b["module.model.layers.2.mlp.weight"].half()
    b["module.extra.weight"] = torch.randn(3, 3)
    del b["module.model.lm_head.bias"]
    drift = layerwatch.drift(a | {"ids": torch.arange(4)}, b | {"module.ids": torch.tensor([0, 1, 2, 9])})
    assert {row["tensor"] for row in drift.rows} == set(a) - {"lm_head.weight", "lm_head.bias"}
    assert (drift.only_in_a, drift.only_in_b) == (["lm_head.bias"], ["module.extra.weight"])
    grown = drift.reshaped[0]
    first = twin(a["lm_head.weight"], b["module.model.lm_head.weight"][:5])["relative_l2"]
    assert (grown["tensor"], grown["shape_a"], grown["shape_b"], grown["rows"]) == (
        "lm_head.weight", [5, 12], [7, 12], 5,
    )  # fmt: skip
    assert grown["relative_l2"] == pytest.approx(float(first))
    assert drift.retyped == [{"tensor": "layers.2.mlp.weight", "dtype_a": "float32", "dtype_b": "float16"}]
    assert [(row["tensor"], row["differ"]) for row in drift.not_compared] == [("ids", 1)]


def test_groups_are_their_tensors_together() -> None:
    a = network()
    b = moved(a)
    drift = layerwatch.drift(a, b)
    blocks = {group["block"]: group for group in drift.groups("block")}
    assert list(blocks) == ["embed_tokens", *(f"layers.{i}" for i in range(6)), "lm_head"]
    names = [name for name in a if name.startswith("layers.3.")]
    whole = twin(torch.cat([a[n].ravel() for n in names]), torch.cat([b[n].ravel() for n in names]))
    for name in ("relative_l2", "cosine", "sign_flips", "max_abs_change", "std_b"):
        assert blocks["layers.3"][name] == pytest.approx(float(whole[name]), rel=1e-9)
    assert {g["role"] for g in drift.groups("role")} == {"embedding", "matrix", "bias", "norm_gain", "output"}
    assert {g["layer"]: g["tensors"] for g in drift.groups("layer")}["layers.0.mlp"] == 2
    with pytest.raises(ValueError, match="expected by as one of"):
        drift.groups("colour")


def test_zeros_nan_and_empty_tensors_give_null_and_no_nan(tmp_path: Path) -> None:
    a = {
        "zero": torch.zeros(4), "nan": torch.full((3,), math.nan), "empty": torch.zeros(0, 2),
        "some": torch.tensor([1.0, math.inf, 2.0]), "same": torch.ones(3),
    }  # fmt: skip
    b = a | {"zero": torch.ones(4), "some": torch.tensor([2.0, 3.0, 2.0])}
    drift = layerwatch.drift(a, b)
    found = json.loads(drift.to_json(by="block", histograms=True), parse_constant=lambda c: pytest.fail(c))
    rows = {row["tensor"]: row for row in found["tensors"]}
    assert rows["zero"]["relative_l2"] is None
    assert rows["zero"]["distance"] == 2
    assert rows["nan"]["not_finite"] == 3
    assert rows["nan"]["distance"] is None
    assert rows["empty"]["elements"] == 0
    assert (rows["some"]["not_finite"], rows["some"]["distance"]) == (1, 1.0)
    assert rows["same"] | {"cosine": 1.0, "share_changed": 0.0, "relative_l2": 0.0} == rows["same"]
    assert "NaN or infinite elements: 1" in rows["some"]["unusual"]


def test_one_layer_that_moved_further_than_its_like_is_unusual_with_the_reason() -> None:
    a = network(layers=12)
    b = moved(a, 0.01)
    assert [row["tensor"] for row in layerwatch.drift(a, b).rows if row["unusual"]] == []
    b["layers.4.mlp.weight"] = a["layers.4.mlp.weight"] + 0.3 * torch.randn(12, 12)
    b["layers.7.mlp.bias"] = a["layers.7.mlp.bias"]
    unusual = {r["tensor"]: r["unusual"] for r in layerwatch.drift(a, b).rows if r["unusual"]}
    assert set(unusual) == {"layers.4.mlp.weight", "layers.7.mlp.bias"}
    assert (
        "times as far as the median of the 11 others of layers.*.mlp.weight" in unusual["layers.4.mlp.weight"]
    )
    assert "did not move at all" in unusual["layers.7.mlp.bias"]


def test_one_expert_of_thousands_is_told_quickly() -> None:
    """The same rule for many likes as for few."""
    names = [f"layers.{i}.experts.{j}.weight" for i in range(12) for j in range(250)]
    rows = [
        {"tensor": n, "role": "matrix", "relative_l2": 0.01 * (1 + i % 7 / 10)} for i, n in enumerate(names)
    ]
    rows[700]["relative_l2"] = 0.2
    judge(rows)
    assert [row["tensor"] for row in rows if row["unusual"]] == [names[700]]
    few = rows[690:710]
    judge(few)
    assert [row["tensor"] for row in few if row["unusual"]] == [names[700]]


def test_drift_that_grows_with_depth_is_not_unusual() -> None:
    a = network(layers=12)
    b = {name: t.clone() for name, t in a.items()}
    for name in b:
        if name.startswith("layers."):
            b[name] += 0.001 * 1.4 ** int(name.split(".")[1]) * torch.randn(b[name].shape)
    assert [row["unusual"] for row in layerwatch.drift(a, b).rows if row["unusual"]] == []


def test_a_moved_output_bias_is_told_as_a_class_prior() -> None:
    a = network()
    prior = torch.tensor([0.5, 0.2, 0.1, 0.1, 0.1])
    found = layerwatch.drift(a, a | {"lm_head.bias": prior.log() + 3.0}).output
    assert [layer["tensor"] for layer in found] == ["lm_head.bias"]
    assert found[0]["kl"] == pytest.approx(float((prior * (prior / 0.2).log()).sum()), rel=1e-5)
    first = found[0]["moved"][0]
    assert first == {"class": 0, "shift": pytest.approx(float(first["shift"])), "prior_a": pytest.approx(0.2),
                     "prior_b": pytest.approx(0.5, rel=1e-5)}  # fmt: skip
    shifts = {m["class"]: m["shift"] for m in found[0]["moved"]}
    assert sum(shifts.values()) == pytest.approx(0.0, abs=1e-6)  # what all logits share changes nothing


def test_the_last_layer_of_an_encoder_is_no_output_layer() -> None:
    """Without a name that tells, the last matrix is taken, unless each block has one like it."""
    torch.manual_seed(0)
    encoder = {
        f"layer.{i}.output.{leaf}": torch.randn(*shape)
        for i in range(3) for leaf, shape in (("weight", (4, 9)), ("bias", (4,)))
    }  # fmt: skip
    assert layerwatch.drift(encoder, moved(encoder)).output == []
    plain = dict(
        torch.nn.Sequential(torch.nn.Linear(9, 8), torch.nn.ReLU(), torch.nn.Linear(8, 4)).state_dict()
    )
    assert [layer["tensor"] for layer in layerwatch.drift(plain, moved(plain)).output] == ["2.bias"]


@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (12, 5, 2, 2)])
@pytest.mark.parametrize("exact", [True, False])
def test_ranks_and_directions_agree_with_numpy(
    shape: tuple[int, ...], exact: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not exact:
        monkeypatch.setattr(spectral, "EXACT", 4)
    generator = np.random.default_rng(0)
    a = generator.standard_normal(shape)
    flat = a.reshape(shape[0], -1)
    step = generator.standard_normal((shape[0], 3)) @ generator.standard_normal((3, flat.shape[1]))
    b = (flat + 0.9 * step).reshape(shape)
    row = layerwatch.drift({"w": a}, {"w": b}, spectrum=True).rows[0]
    values = np.linalg.svd(0.9 * step, compute_uv=False)
    shares = values[:3] / values[:3].sum()
    assert row["stable_rank_change"] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-6)
    assert row["effective_rank_change"] == pytest.approx(np.exp(-(shares * np.log(shares)).sum()), rel=1e-4)
    assert row["effective_rank_exact"] is exact
    one, two = np.linalg.svd(flat), np.linalg.svd(b.reshape(flat.shape))
    assert row["stable_rank_b"] == pytest.approx((two[1] ** 2).sum() / two[1][0] ** 2, rel=1e-6)
    tall = flat.shape[0] >= flat.shape[1]
    old, new = (one[2].T, two[2].T) if tall else (one[0], two[0])
    count = min(10, min(flat.shape))
    cosines = old.T @ new[:, :count]
    assert row["overlap"] == pytest.approx((cosines[:count] ** 2).sum() / count, rel=1e-3)
    side = min(flat.shape)
    assert row["intruders"] == (np.abs(cosines[:side]).max(axis=0) < 0.5).sum()
    assert row["intruders_undecided"] == 0  # all singular values are among the leading ones here


def test_what_was_not_computed_in_time_is_told() -> None:
    a = network()
    drift = layerwatch.drift(a, moved(a), spectrum=True, seconds=0.0)
    assert "not computed within 0 s" in drift.notes[0]
    assert len(drift.rows) == len(a)


def save(state: State, path: Path) -> str:
    safetensors.torch.save_file({name: t.contiguous() for name, t in state.items()}, path)
    return str(path)


def test_the_command_prints_the_contract(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = network()
    one, two = save(a, tmp_path / "a.safetensors"), save(moved(a), tmp_path / "b.safetensors")
    assert main(["drift", one, two, "--format", "json", "--by", "role"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {"version", "tensors", "only_in_a", "only_in_b", "reshaped", "retyped", "groups"} <= set(found)
    assert {"tensor", "relative_l2", "cosine", "max_abs_change", "sign_flips", "share_changed"} <= set(
        found["tensors"][0]
    )
    assert len(found["tensors"]) == len(a)
    assert main(["drift", one, two, "--format", "parquet", "--out", str(tmp_path / "d.parquet")]) == 0
    table = pq.read_table(tmp_path / "d.parquet").to_pylist()
    assert [r["tensor"] for r in table] == [r["tensor"] for r in found["tensors"]]
    assert sum(table[0]["count"]) == table[0]["elements"]
    schema = pq.read_schema(tmp_path / "d.parquet")
    assert [str(schema.field(name).type) for name in ("unusual", "random_walk")] == ["string", "double"]
    capsys.readouterr()
    assert main(["drift", one, two, "--by", "layer", "--spectrum"]) == 0
    text = capsys.readouterr().out
    assert "layers.3.mlp" in text
    assert f"{len(a)} tensors" in text


def test_the_command_says_what_is_wrong_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = save(network(), tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"no weights")
    for arguments in (
        [good, str(tmp_path / "b.safetensors")],
        [good, str(tmp_path / "none.safetensors")],
        [good, good, "--format", "parquet"],
    ):
        assert main(["drift", *arguments]) == 2
        error = capsys.readouterr().err
        assert error.startswith("layerwatch drift: expected")
        assert error.count("\n") == 1


def test_architectures_with_nothing_in_common_give_lists_and_no_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = save(network(), tmp_path / "a.safetensors")
    two = save(
        {"conv1.weight": torch.randn(3, 3, 3, 3), "fc.bias": torch.ones(2)}, tmp_path / "b.safetensors"
    )
    assert main(["drift", one, two]) == 0
    text = capsys.readouterr().out
    assert "0 tensors" in text
    assert "only in A: 21" in text
    assert "only in B: 2: conv1.weight, fc.bias" in text


def test_a_truncated_file_keeps_partial_results(tmp_path: Path) -> None:
    a = network()
    one, two = save(a, tmp_path / "a.safetensors"), save(moved(a), tmp_path / "b.safetensors")
    Path(two).write_bytes(Path(two).read_bytes()[:-3000])
    drift = layerwatch.drift(one, two)
    cut = {row["tensor"] for row in drift.not_compared}
    assert cut
    assert cut | {row["tensor"] for row in drift.rows} == set(a)
    assert all("cut short" in row["why"] for row in drift.not_compared)
    assert drift.only_in_a == []


def test_an_adapter_is_compared_as_if_merged(tmp_path: Path) -> None:
    """With the numbers of the merged weights, and the rank of what it adds."""
    base = network()
    torch.manual_seed(3)
    adapter, merged = {}, {name: t.clone() for name, t in base.items()}
    for i in range(6):
        down, up = torch.randn(2, 12), torch.randn(12, 2) * 0.1
        adapter[f"base_model.model.layers.{i}.mlp.lora_A.weight"] = down
        adapter[f"base_model.model.layers.{i}.mlp.lora_B.weight"] = up
        merged[f"layers.{i}.mlp.weight"] += 4.0 * up @ down
    save(adapter, tmp_path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    one, two = layerwatch.drift(base, tmp_path), layerwatch.drift(base, merged)
    assert len(one.rows) == len(two.rows) == len(base)
    for row, true in zip(one.rows, two.rows, strict=True):
        for name in ("relative_l2", "cosine", "norm_b", "max_abs_change"):
            known = true[name]
            assert row[name] == (None if known is None else pytest.approx(known, rel=1e-5, abs=1e-12))
    assert row_of(one, "layers.3.mlp.weight")["rank_change"] == 2
    assert row_of(one, "lm_head.weight")["relative_l2"] == 0
    with pytest.raises(WeightsError, match="its base model"):
        layerwatch.drift(tmp_path, base)


MEASURE = """
import resource, sys
import layerwatch, layerwatch.monitor.weights.report, layerwatch.monitor.weights.pair_loops
layerwatch.drift({"w": __import__("numpy").ones(3, "f4")}, {"w": __import__("numpy").ones(3, "f4")})
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
found = layerwatch.drift(sys.argv[1], sys.argv[2])
print(len(found.rows), before, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_files_are_not_held_in_memory(suffix: str, tmp_path: Path) -> None:
    """Two files of 200 MB: comparing them takes less than 80 MB more than comparing two numbers."""
    state = {f"layers.{i}.weight": torch.randn(2500, 5000) for i in range(4)}
    paths = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}{suffix}"
        if suffix == ".pt":
            torch.save(state, path)
        else:
            save(state, path)
        paths.append(str(path))
    prefix = "import torch\n" if suffix == ".pt" else ""
    out = subprocess.run(
        [sys.executable, "-c", prefix + MEASURE, *paths], check=True, capture_output=True, text=True
    )
    rows, before, after = map(int, out.stdout.split())
    assert rows == 4
    assert (after - before) / 1024 < 80


def test_an_empty_change_has_no_facts() -> None:
    assert Change().facts()["relative_l2"] is None


@pytest.mark.soak
def test_gigabytes_stay_within_the_promised_memory() -> None:
    """Two sharded checkpoints of 4 GB each: at most the two largest tensors and 200 MB."""
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run(
        [sys.executable, str(root / "benchmarks" / "drift.py"), "--gigabytes", "4", "--rounds", "1"],
        check=True, capture_output=True, text=True, cwd=root,
    ).stdout  # fmt: skip
    found = re.findall(r"peak (\d+) MB, promised (\d+) MB", out)
    assert len(found) == 2, out
    assert all(int(peak) <= int(promised) for peak, promised in found), out
