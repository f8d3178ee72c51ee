"""What fewer bits do to weights: against torch's own rounding, float64, and what a run tells of them."""

from __future__ import annotations

import json
import math
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import layerwatch
from layerwatch import Run, watch
from layerwatch.monitor import kernels
from layerwatch.monitor.detectors.quantising import LEAST_SQNR
from layerwatch.monitor.weights import ArrayWeights, precision_exact
from layerwatch.monitor.weights.formats import FORMATS, GROUP, SCHEMES, Scheme, limited, quantised, scheme_of
from layerwatch.monitor.weights.precision import PrecisionReport, weights_report
from layerwatch.monitor.weights.precision_advice import LEAST_SNR
from layerwatch.monitor.weights.precision_facts import TensorPrecision

CASTS = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip


def awkward(rows: int = 24, width: int = 300) -> NDArray[np.float32]:
    """Weights with a row and a column that stand out, a row of zeros, tiny values, ties and subnormals."""
    x = np.random.default_rng(0).standard_normal((rows, width)).astype(np.float32) * np.float32(0.02)
    x[3] *= 40
    x[:, 7] *= 9
    x[5] = 0
    x[6, :40] = np.ldexp(1.0, np.arange(-149, -109)).astype(np.float32)
    x[8, :3] = 2.0**-25, 2.0**-10, 1.5 * 2.0**-24
    return x


def by_torch(x: NDArray[np.float32], scheme: Scheme) -> Tensor:
    """The same rounding by torch's own casts and fake quantisation."""
    form, rows = FORMATS[scheme.format], torch.from_numpy(x)
    if scheme.scale == "cast":
        return rows.to(CASTS[scheme.format]).float()
    if scheme.scale == "group":
        pad = -rows.shape[1] % GROUP
        parts = nn.functional.pad(rows, (0, pad)).reshape(-1, GROUP)
        found = by_torch(parts.numpy(), Scheme(scheme.format, "channel"))
        return found.reshape(len(rows), -1)[:, : rows.shape[1]]
    tops = rows.abs().amax(1) if scheme.scale == "channel" else rows.abs().max()[None]
    scale = tops / form.largest
    if form.mantissa is not None:
        scale = scale[:, None] if scheme.scale == "channel" else scale
        some = torch.where(scale > 0, scale, 1)
        return (rows * (1 / some)).to(CASTS[scheme.format]).float() * scale
    top = int(form.largest)
    if scheme.scale == "tensor":
        return torch.fake_quantize_per_tensor_affine(rows, float(scale), 0, -top, top)
    some = torch.where(scale > 0, scale, 1)
    return torch.fake_quantize_per_channel_affine(rows, some, torch.zeros_like(some).int(), 0, -top, top)


@pytest.mark.parametrize("scheme", SCHEMES, ids=lambda s: s.label)
def test_every_scheme_is_what_torch_itself_makes_of_the_values(scheme: Scheme) -> None:
    x = awkward()
    found, beyond = quantised(x, scheme)
    assert not beyond.any()
    assert np.array_equal(found, by_torch(x, scheme).numpy())


@pytest.mark.parametrize("name", CASTS)
def test_casts_agree_with_torch_on_bits_of_all_kinds(name: str) -> None:
    bits = np.random.default_rng(1).integers(0, 2**32, 100_000, np.uint32)
    edges = np.array([448, 464, 464.1, 65504, 65519, 65520, 57344, 61439, 61440, 3.3961e38], np.float32)
    x = np.concatenate([bits.view(np.float32), edges, -edges])
    x = x[np.isfinite(x)][None]
    scheme = scheme_of(name)
    found, beyond = quantised(x, scheme)
    truth = torch.from_numpy(x).to(CASTS[name]).float().numpy()
    assert np.array_equal(limited(found, scheme)[~beyond], truth[~beyond])
    assert (~np.isfinite(truth[beyond]) | (np.abs(truth[beyond]) == FORMATS[name].largest)).all()
    assert np.isfinite(truth[~beyond]).all()
    if name != "fp8_e4m3":
        assert np.array_equal(limited(found, scheme), truth)


def judged(x: NDArray, name: str = "layer.weight") -> TensorPrecision:
    report = weights_report(ArrayWeights({name: x}))
    assert report.left_out == {}
    return report.tensors[0]


def db(signal: float, error: float) -> float:
    return 10 * math.log10(signal / error) if error else math.inf


@pytest.mark.parametrize("way", ["compiled", "numpy", "float64"])
def test_the_report_is_what_a_slow_float64_twin_finds(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = awkward()
    x[9, 0] = 500.0  # overflows e4m3
    if way == "numpy":
        monkeypatch.setattr(kernels, "_reason", "as if numba were missing")
    found = judged(x.astype(np.float64) if way == "float64" else x)
    exact = x.astype(np.float64)
    for scheme, rounding in found.roundings.items():
        y = by_torch(x, scheme).double().numpy()
        beyond = (np.abs(exact) > 464) if scheme.label == "fp8_e4m3" else np.zeros(x.shape, bool)
        error = np.where(beyond, 0, y - exact)
        assert rounding.overflow == beyond.sum()
        assert rounding.zeroed == ((y == 0) & (exact != 0)).sum()
        assert rounding.max_error == pytest.approx(np.abs(error).max(), rel=1e-5)
        assert rounding.snr_db == pytest.approx(db((exact**2).sum(), (error**2).sum()), abs=1e-4)
        rows = [db((a**2).sum(), (e**2).sum()) for a, e in zip(exact, error, strict=True) if a.any()]
        power = np.where(exact.any(axis=1), (exact**2).sum(axis=1), 1)
        columns = [
            db((a**2 / power).sum(), (e**2 / power).sum()) for a, e in zip(exact.T, error.T, strict=True)
        ]
        assert rounding.channel_snr_db == pytest.approx(min(min(rows), sorted(columns)[3]), abs=1e-3)
        normal = FORMATS[scheme.format].smallest_normal
        if scheme.scale == "cast":
            assert rounding.subnormal == ((np.abs(exact) < normal) & (y != 0)).sum()
    centred = exact - exact.mean()
    assert found.kurtosis == pytest.approx((centred**4).mean() / (centred**2).mean() ** 2, rel=1e-9)
    assert found.rms == pytest.approx(math.sqrt((exact**2).mean()), rel=1e-9)
    assert (found.largest, found.zeros) == (500.0, (exact == 0).sum())


def test_blocks_add_up_to_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    arrays = {"m.weight": awkward(), "c.weight": awkward().reshape(24, 3, 10, 10), "b.bias": awkward()[0]}
    whole = weights_report(ArrayWeights(arrays))
    monkeypatch.setattr(precision_exact, "BLOCK", 700)
    pieces = weights_report(ArrayWeights(arrays))
    a, b = pieces.frame(), whole.frame()
    counted = ["tensor", "format", "zeroed", "subnormal", "overflow", "max_error", "recommended"]
    assert a[counted].equals(b[counted])
    for column in ("snr_db", "channel_snr_db", "kurtosis"):
        assert a[column].to_numpy() == pytest.approx(b[column].to_numpy(), rel=1e-9, nan_ok=True)


def test_what_stands_out_is_named() -> None:
    x = np.random.default_rng(2).standard_normal((50, 60)).astype(np.float32)
    x[11] *= 20
    x[:, 33] *= 50
    found = judged(x)
    assert found.outlier_channels
    assert found.outlier_inputs
    assert found.outlier_inputs[0][0] == 33
    tops = np.abs(x).max(0)
    assert found.outlier_inputs[0][1] == pytest.approx(tops[33] / np.median(tops), rel=1e-6)
    plain = judged(np.random.default_rng(2).standard_normal((50, 60)).astype(np.float32))
    assert (plain.outlier_channels, plain.outlier_inputs) == ([], [])


# Advice -----------------------------------------------------------------------------------------------------


def advice(x: NDArray, name: str = "layer.weight") -> tuple[str, str]:
    found = judged(x, name).recommendation
    assert found
    return found.label, found.reason


def test_each_tensor_gets_the_fewest_bits_that_leave_enough() -> None:
    rng = np.random.default_rng(3)
    x = rng.standard_normal((64, 256)).astype(np.float32) * np.float32(0.02)
    label, reason = advice(x)
    assert label == "int8 per channel"
    assert "int4 per group" in reason
    assert "with one scale" not in reason
    assert advice(rng.uniform(-1, 1, (64, 256)).astype(np.float32))[0] == "int4 per channel"
    row, column = x.copy(), x.copy()
    row[4] *= 100
    column[:, 4] *= 3000
    label, reason = advice(row)
    assert label == "int8 per channel"
    assert "with one scale" in reason
    assert "row 4" in reason
    label, reason = advice(column)
    assert label == "fp8_e4m3 per channel"
    assert "int8 per channel" in reason
    assert "column 4" in reason
    assert advice(x, "encoder.bias")[0] == "fp16"
    assert advice(x, "lm_head.weight")[0] == "fp16"
    assert advice(x[0] * np.float32(1e10), "norm.weight")[0] == "bf16"  # beyond float16
    assert advice(x[0] * np.float32(1e-9), "norm.weight")[0] == "bf16"  # below it
    assert advice(np.full((3, 3), 3.4e38, np.float32), "lm_head.weight")[0] == "as stored"


def test_advice_can_ask_for_more(tmp_path: Path) -> None:
    x = np.random.default_rng(3).standard_normal((64, 256)).astype(np.float32)
    assert layerwatch.precision({"w": x}, least_snr=15).recommended() == {"w": "int4 per channel"}
    assert layerwatch.precision({"w": x}, least_snr=40).recommended() == {"w": "int8 per channel"}
    assert layerwatch.precision({"w": x}, least_snr=50).recommended() == {"w": "fp16"}
    for wrong in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="least_snr in decibels above 0"):
            layerwatch.precision({"w": x}, least_snr=wrong)


def test_it_never_contradicts_the_problem_quantisation_risk() -> None:
    """Where the detector remarks on a matrix, the report says that one scale will not do, too."""
    assert LEAST_SNR == LEAST_SQNR
    rng = np.random.default_rng(4)
    remarked = 0
    for times in np.geomspace(1, 1000, 30):
        x = rng.standard_normal((32, 64)).astype(np.float32)
        x[0, 0] *= times
        if 12 * (127 * math.sqrt((x.astype(float) ** 2).mean()) / np.abs(x).max()) ** 2 < 10 ** (
            LEAST_SQNR / 10
        ):
            remarked += 1
            label, reason = advice(x)
            assert not label.endswith("per tensor")
            assert "with one scale" in reason
    assert 0 < remarked < 30


# Bad input --------------------------------------------------------------------------------------------------


def test_what_cannot_be_judged_is_listed_with_the_reason() -> None:
    state = {
        "ids": torch.arange(5), "packed": torch.zeros(4, 4, dtype=torch.uint8), "mask": torch.ones(3).bool(),
        "eight": torch.ones(3, 3).to(torch.float8_e4m3fn), "waves": torch.ones(2, dtype=torch.complex64),
        "none": torch.zeros(0, 4), "good": torch.randn(8, 8), "half": torch.randn(8, 8).half(),
        "one": torch.tensor(0.3), "wide": torch.randn(4, 4).double(),
    }  # fmt: skip
    report = layerwatch.precision(state)
    assert {t.name for t in report.tensors} == {"good", "half", "one", "wide"}
    assert set(report.left_out) == set(state) - {"good", "half", "one", "wide"}
    assert "quantised already" in report.left_out["packed"]
    assert "float8_e4m3fn already" in report.left_out["eight"]
    assert "no elements" in report.left_out["none"]
    half = next(t for t in report.tensors if t.name == "half")
    assert half.roundings[scheme_of("fp16")].lossless
    assert json.dumps(report.to_dict(), allow_nan=False)


def test_zeros_and_what_is_not_finite_are_told() -> None:
    x = awkward()
    x[0, :3] = np.nan, np.inf, -np.inf
    found = judged(x)
    assert (found.nans, found.infs) == (1, 2)
    clean = np.where(np.isfinite(x), x, 0)
    for scheme, rounding in judged(clean).roundings.items():
        assert found.roundings[scheme].snr_db == pytest.approx(rounding.snr_db)
    assert found.recommendation
    assert "3 elements are NaN or infinite" in found.recommendation.reason
    kept = x[np.isfinite(x)].astype(np.float64)
    kept -= kept.mean()
    assert found.kurtosis == pytest.approx((kept**4).mean() / (kept**2).mean() ** 2, rel=1e-9)
    for x in (np.zeros((4, 4), np.float32), np.full((4, 4), np.nan, np.float32)):
        report = weights_report(ArrayWeights({"a": x}))
        assert report.tensors[0].recommendation
        assert report.recommended() == {}
        assert json.dumps(report.to_dict(), allow_nan=False)


def test_a_file_cut_short_gives_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.randn(50, 50), "b": torch.randn(50, 50)}, path)
    path.write_bytes(path.read_bytes()[:-100])
    report = layerwatch.precision(path)
    assert [t.name for t in report.tensors] == ["a"]
    assert "cut short" in report.left_out["b"]


def test_memory_is_that_of_a_block_not_of_the_tensor(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.zeros(2048, 4096, dtype=torch.bfloat16)}, path)
    layerwatch.precision({"warm": torch.zeros(4, 4)})
    tracemalloc.start()
    report = layerwatch.precision(path)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert report.tensors[0].zeros == 2048 * 4096
    assert peak < 8e6  # 16.8 MB in the file, 33.6 MB as float32


# Runs -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Run, dict[str, Tensor]]:
    """A run and its last weights, some of them far too small or large for few bits."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 300), nn.LayerNorm(300), nn.Linear(300, 100))
    with torch.no_grad():
        model.get_parameter("0.weight")[:60] *= 1e-6
        model.get_parameter("2.weight")[3, 3] = 70_000.0
        model.get_parameter("2.bias")[:7] = 1e-40
        model.get_parameter("2.bias")[7:9] = 3.402e38
    optimizer = torch.optim.SGD(model.parameters(), 1e-12)
    path = tmp_path_factory.mktemp("runs") / "r"
    with watch(model, optimizer, run=path, every=1, live=False, activations=False):
        for _ in range(2):
            torch.stack([p.sum() for p in model.parameters()]).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return Run(path), {name: p.detach().clone() for name, p in model.named_parameters()}


def test_a_run_counts_what_casts_lose_as_the_weights_themselves_do(
    trained: tuple[Run, dict[str, Tensor]],
) -> None:
    run, state = trained
    told, truth = layerwatch.precision(run), layerwatch.precision(state)
    assert (told.kind, told.step, truth.kind) == ("run", 1, "file")
    assert [t.name for t in told.tensors] == [t.name for t in truth.tensors]
    bounded = 0
    for ours, theirs in zip(told.tensors, truth.tensors, strict=True):
        for label in ("fp16", "bf16", "fp8_e4m3", "fp8_e5m2"):
            a, b = ours.roundings[scheme_of(label)], theirs.roundings[scheme_of(label)]
            assert (a.exact_counts, a.exact_errors) == (True, False)
            for name in ("zeroed", "subnormal", "overflow"):
                low, high = a.between.get(name, (getattr(a, name),) * 2)
                assert low <= getattr(b, name) <= high, (ours.name, label, name)
                bounded += low < high
    assert bounded < 20
    first = told.tensors[0].roundings[scheme_of("fp16")]
    truth_first = truth.tensors[0].roundings[scheme_of("fp16")]
    assert first.zeroed == truth_first.zeroed > 500  # no weight is exactly the tie
    assert first.between["zeroed"][0] == first.zeroed


def test_a_run_estimates_what_rounding_costs(trained: tuple[Run, dict[str, Tensor]]) -> None:
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(128, 256), nn.LayerNorm(256), nn.Linear(256, 64, bias=False))
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    with watch(model, optimizer, run="r", every=1, live=False, activations=False):
        model(torch.randn(8, 128)).square().mean().backward()
        optimizer.step()
    told, truth = layerwatch.precision("r"), layerwatch.precision(model)
    off: dict[str, float] = {}
    for ours, theirs in zip(told.tensors, truth.tensors, strict=True):
        if len(ours.shape) < 2:
            continue
        assert ours.kurtosis == pytest.approx(theirs.kurtosis, rel=0.05)
        for scheme, rounding in ours.roundings.items():
            exact = theirs.roundings[scheme]
            off[scheme.label] = max(off.get(scheme.label, 0), abs(rounding.snr_db - exact.snr_db))
            assert rounding.zeroed == pytest.approx(exact.zeroed, abs=0.01 * ours.count)
            assert exact.max_error <= rounding.max_error * 1.001
    assert max(off.values()) < 0.5, off
    assert "estimates" in told.notes[0]


def test_weights_that_are_stored_in_16_bits_lose_nothing_in_the_same(tmp_path: Path) -> None:
    model = nn.Linear(32, 32).bfloat16()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    with watch(model, optimizer, run="r", every=1, live=False, activations=False):
        model(torch.randn(4, 32).bfloat16()).float().square().mean().backward()
        optimizer.step()
    told, truth = layerwatch.precision("r").tensors[0], layerwatch.precision(model).tensors[0]
    for tensor in (told, truth):
        assert tensor.roundings[scheme_of("bf16")].lossless
        assert not tensor.roundings[scheme_of("fp8_e4m3")].lossless


def test_adapters_are_judged_as_if_merged() -> None:
    torch.manual_seed(2)
    base, a, b = torch.randn(24, 32), torch.randn(4, 32), torch.randn(24, 4)
    state = {"q.weight": base, "q.lora_down.weight": a, "q.lora_up.weight": b, "q.alpha": torch.tensor(8.0)}
    merged = layerwatch.precision({"q.weight": base + 2 * b @ a}).frame()
    found = layerwatch.precision(state).frame()
    assert not found["tensor"].str.contains("lora").any()
    ours = found.loc[found["tensor"] == "q.weight", "snr_db"].to_numpy()
    assert ours == pytest.approx(merged["snr_db"].to_numpy(), abs=0.05)


def test_reports_can_be_grouped_and_framed() -> None:
    x = awkward()
    report = layerwatch.precision(
        {"layers.0.a.weight": x, "layers.0.b.weight": x / 3, "layers.1.a.bias": x[0]}
    )
    groups = {g["name"]: g for g in report.groups("block")}
    assert set(groups) == {"layers.0", "layers.1"}
    both = {f["label"]: f for f in groups["layers.0"]["formats"]}
    found = [t.roundings[scheme_of("int8 per tensor")] for t in report.tensors[:2]]
    assert both["int8 per tensor"]["snr_db"] == pytest.approx(
        db(sum(r.signal for r in found), sum(r.error for r in found))
    )
    assert sum(groups["layers.0"]["recommended"].values()) == 2
    assert {g["name"] for g in report.groups("role")} == {"matrix", "bias"}
    with pytest.raises(ValueError, match="block or role"):
        report.groups("colour")
    frame = report.frame()
    assert len(frame) == sum(len(t.roundings) for t in report.tensors)
    assert frame["recommended"].sum() == len(report.recommended())
    assert report.bytes()[0] == 4 * sum(t.count for t in report.tensors)
    assert isinstance(report, PrecisionReport)
