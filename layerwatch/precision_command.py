"""`layerwatch precision`: what fewer bits would do to each layer's weights."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .terminal import new_table, plain, say

if TYPE_CHECKING:
    from .monitor.weights.precision import PrecisionReport
    from .monitor.weights.precision_facts import TensorPrecision

#: Formats whose signal to noise the table shows, and their headings.
_SHOWN = {
    "fp8_e4m3 per tensor": "fp8", "int8 per tensor": "int8", "int8 per channel": "int8/ch",
    "int4 per channel": "int4/ch", "int4 per group": "int4/128",
}  # fmt: skip
#: So many reasons are printed.
REASONS = 12


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source", metavar="RUN|FILE",
        help="run folder (RUN@STEP, RUN@start: at a step; estimates), or a weight file, the index "
        "of a sharded one, or a folder with one: every element is rounded",
    )  # fmt: skip
    parser.add_argument("--format", choices=("text", "json"), default="text", help="(default: %(default)s)")
    parser.add_argument(
        "--by", choices=("layer", "block", "role"), default="layer",
        help="a line for each tensor, each block or each role (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument(
        "--least-snr", type=float, default=20.0, metavar="DB",
        help="signal to noise that an advised format leaves (default: %(default)g)",
    )  # fmt: skip


def precision(options: argparse.Namespace) -> int:
    import json

    from .weights import precision as report_of

    report = report_of(options.source, least_snr=options.least_snr)
    if options.format == "json":
        print(json.dumps(report.to_dict(options.by), indent=1, allow_nan=False))
    else:
        _print(report, options.by)
    return 0


def _print(report: PrecisionReport, by: str) -> None:
    from rich.markup import escape

    at = "" if report.step is None else f" at step {report.step}"
    say(f"\n[bold]{plain(report.source)}[/]{at} · {len(report.tensors)} tensors")
    if by == "layer":
        narrow = [heading.replace("/", "\n/") for heading in _SHOWN.values()]  # room for the names
        table = new_table("tensor", "kurtosis", "fp16\nlost", "bf16\nlost", *narrow, "advised")
        for tensor in report.tensors:
            table.add_row(*map(escape, _line(tensor)))
    else:
        headings = ("fp16", "bf16", *_SHOWN.values())
        table = new_table(by, "tensors", "numbers", *headings, "advised")
        for group in report.groups(by):
            table.add_row(*map(escape, _group_line(group)))
    for column in table.columns[1:]:
        column.no_wrap = True
    if report.tensors:
        say(table)
    for line in _below(report):
        say(plain(line))


def _line(tensor: TensorPrecision) -> Iterator[str]:
    from .monitor.weights.precision import snr_of

    yield tensor.name
    yield "" if tensor.kurtosis != tensor.kurtosis else f"{tensor.kurtosis:.3g}"
    for label in ("fp16", "bf16"):
        yield _lost(tensor, label)
    for label in _SHOWN:
        snr = snr_of(tensor, label)
        yield "" if snr is None else "all" if snr == float("inf") else f"{snr:.1f}"
    advice = tensor.recommendation
    yield advice.label if advice else ""


def _lost(tensor: TensorPrecision, label: str) -> str:
    """Values that become zero or overflow, as a number, or between which two."""
    found = next(r for s, r in tensor.roundings.items() if s.label == label) if tensor.roundings else None
    if found is None:
        return ""
    ends = [found.between.get(name, (getattr(found, name),) * 2) for name in ("zeroed", "overflow")]
    least, most = sum(low for low, _ in ends), sum(high for _, high in ends)
    return f"{most:,}" if least == most else f"{least:,} to {most:,}"


def _group_line(group: dict[str, Any]) -> Iterator[str]:
    found = {entry["label"]: entry["snr_db"] for entry in group["formats"]}
    yield from (group["name"], f"{group['tensors']}", f"{group['count']:,}")
    for label in ("fp16", "bf16", *_SHOWN):
        snr = found.get(label, "")
        yield "all" if snr is None else f"{snr:.1f}" if isinstance(snr, float) else ""
    yield "\n".join(f"{label}: {n}" for label, n in group["recommended"].items())


def _below(report: PrecisionReport) -> Iterator[str]:
    stored, advised = report.bytes()
    yield (
        "dB: signal to noise of the whole tensor with one scale; /ch: with a scale for each output channel; "
        f"/128: for each 128 inputs; all: nothing changes. As stored {_size(stored)}, as advised "
        f"{_size(advised)}, without scales."
    )
    told = [t for t in report.tensors if t.roundings and _strain(t) < report.least_snr]
    told.sort(key=_strain)
    for tensor in told[:REASONS]:
        if advice := tensor.recommendation:
            yield f"{tensor.name}: {advice.label}: {advice.reason}"
    if len(told) > REASONS:
        yield f"... and {len(told) - REASONS} more: --format json has all reasons"
    for note in report.notes:
        yield f"note: {note}"
    for name, why in report.left_out.items():
        yield f"left out: {name}: {why}"


def _strain(tensor: TensorPrecision) -> float:
    """dB that one scale leaves a matrix, overall or in 99 of 100 channels: what rounds worst comes first."""
    from .monitor.weights.precision_advice import ONE_SCALE

    found = tensor.roundings[ONE_SCALE]
    if len(tensor.shape) < 2:
        return float("inf")
    return min(found.snr_db, found.snr_db if found.channel_snr_db is None else found.channel_snr_db)


def _size(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.2f} MB"
