"""`layerwatch drift`: how far each layer has moved from one state of a model to another."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .terminal import console, new_table, plain

if TYPE_CHECKING:
    from .monitor.weights.report import Drift

#: Rows of a table of text; of more the ones that moved most are shown.
SHOWN = 40
#: Names of a list of text.
NAMED = 6
BAR = 16


def add_arguments(parser: argparse.ArgumentParser) -> None:
    state = "a weight file, a sharded one's index or folder, or RUN, RUN@STEP, RUN@start, RUN@reference"
    parser.add_argument("a", metavar="A", help=f"the state before: {state}")
    parser.add_argument("b", metavar="B", help="the state after: the same; an adapter's folder changes A")
    parser.add_argument(
        "--format", choices=("text", "json", "parquet"), default="text", help="(default: %(default)s)"
    )
    parser.add_argument(
        "--by", choices=("layer", "block", "role"), help="tensors that are taken together (default: block)"
    )
    parser.add_argument("--out", type=Path, metavar="FILE", help="write there; --format parquet needs it")
    parser.add_argument(
        "--run", metavar="RUN", help="the training between A and B: could its updates reach so far?"
    )
    parser.add_argument(
        "--alpha", type=float, help="of LoRA, where no adapter_config.json is beside the adapter"
    )
    parser.add_argument(
        "--spectrum",
        action="store_true",
        help="also stable and effective ranks, and leading singular vectors that are like none of A's",
    )
    parser.add_argument(
        "--seconds", type=float, default=60.0, help="time for --spectrum (default: %(default)g)"
    )
    parser.add_argument(
        "--histograms", action="store_true", help="with --format json: each tensor's histogram of the change"
    )


def drift(options: argparse.Namespace) -> int:
    from .monitor.errors import WeightsError
    from .weights import drift as measure

    if options.format == "parquet" and options.out is None:
        raise WeightsError("expected --out FILE with --format parquet: where to write it")
    with _Progress() as progress:
        found = measure(
            options.a, options.b, run=options.run, alpha=options.alpha, spectrum=options.spectrum,
            seconds=options.seconds, advance=progress,
        )  # fmt: skip
    if options.format == "parquet":
        found.write_parquet(options.out)
    elif options.format == "json":
        _write(found.to_json(options.by, options.histograms), options.out)
    else:
        _write(as_text(found, options.by or "block"), options.out)
    return 0


class _Progress:
    """One line on a terminal: which tensor was compared last."""

    def __init__(self) -> None:
        self._shown = sys.stderr.isatty()
        self._count = 0

    def __enter__(self) -> _Progress:
        return self

    def __call__(self, tensor: str) -> None:
        self._count += 1
        if self._shown:
            from .monitor.wording import printable

            sys.stderr.write(f"\r\033[K{self._count} tensors compared: {printable(tensor):.60}")

    def __exit__(self, *_: object) -> None:
        if self._shown:
            sys.stderr.write("\r\033[K")


def _write(text: str, out: Path | None) -> None:
    if out is None:
        print(text)
    else:
        out.write_text(text + "\n", encoding="utf-8")


def as_text(drift: Drift, by: str = "block") -> str:
    """What `--format text` prints: the whole, a table by layer, block or role, what is unusual, the output
    layer, singular values where they were asked for, and all that was not compared."""

    screen = console(120)
    with screen.capture() as capture:
        screen.print(_headline(drift))
        if drift.rows:
            screen.print(_table_of(drift, by))
        for line in _remarks(drift):
            screen.print(line, soft_wrap=False)
    return capture.get().rstrip()


def _headline(drift: Drift) -> str:

    elements = sum(row["elements"] for row in drift.rows)
    still = sum(row["relative_l2"] == 0 for row in drift.rows)
    whole = _whole(drift)
    moved = f" · together they moved {percent(whole)} of their norm" if whole is not None else ""
    unmoved = f" · {still} did not move" if still else ""
    return (
        f"\n[bold]{plain(drift.a)}[/] → [bold]{plain(drift.b)}[/]\n"
        f"{len(drift.rows)} tensors, {elements:,} elements{moved}{unmoved}"
    )


def _whole(drift: Drift) -> float | None:
    known = [row for row in drift.rows if row["distance"] is not None and row["norm_a"]]
    squares = sum(row["norm_a"] ** 2 for row in known)
    return (sum(row["distance"] ** 2 for row in known) / squares) ** 0.5 if squares else None


def _table_of(drift: Drift, by: str) -> Any:
    from rich.markup import escape

    groups = drift.groups(by)
    if len(groups) > SHOWN:
        most = sorted(groups, key=lambda g: -(g["relative_l2"] or 0.0))[:SHOWN]
        groups = [group for group in groups if group in most]
    largest = max((group["relative_l2"] or 0.0 for group in groups), default=0.0)
    table = new_table(by, "tensors", "elements", "moved", "", "cosine", "signs flipped", "changed")
    for column in table.columns[1:4] + table.columns[5:]:
        column.justify = "right"
    for group in groups:
        far = group["relative_l2"]
        bar = "━" * max(round(BAR * far / largest), 1 if far else 0) if far is not None and largest else ""
        cosine, flips, changed = group.get("cosine"), group.get("sign_flips"), group.get("share_changed")
        table.add_row(
            escape(str(group[by])),
            str(group["tensors"]),
            f"{group['elements']:,}",
            percent(far),
            f"[cyan]{bar}[/]",
            "–" if cosine is None else f"{cosine:.6f}",
            "–" if flips is None else percent(flips / max(group["elements"], 1)),
            percent(changed),
        )
    return table


def percent(share: float | None) -> str:
    """
    >>> percent(0.0321), percent(0.00000123), percent(0.0), percent(None)
    ('3.21 %', '0.000123 %', '0 %', '–')
    """
    if share is None:
        return "–"
    return "0 %" if share == 0 else f"{100 * share:.3g} %"


def _remarks(drift: Drift) -> list[str]:
    lines = []
    for row in drift.rows:
        if row["unusual"]:
            lines.append(f"[yellow]unusual[/] {plain(row['tensor'])}: {plain(row['unusual'])}")
    lines += [_spectral(row) for row in drift.rows if row.get("intruders")]
    lines += [_prior(layer) for layer in drift.output if layer["largest_shift"] > 0]
    for row in drift.reshaped:
        lines.append(
            f"reshaped: {plain(row['tensor'])} {row['shape_a']} → {row['shape_b']}".replace("[", "\\[")
            + (f", its first {row['rows']} rows moved {percent(row['relative_l2'])}" if "rows" in row else "")
        )
    kinds: dict[str, list[str]] = {}
    left = {row["tensor"] for row in drift.not_compared}
    for row in (row for row in drift.retyped if row["tensor"] not in left):
        kinds.setdefault(f"retyped, compared by value, {row['dtype_a']} → {row['dtype_b']}", []).append(
            row["tensor"]
        )
    for row in drift.not_compared:
        same = row.get("differ") == 0
        kinds.setdefault("integers, equal" if same else f"not compared, {row['why']}", []).append(
            row["tensor"] + (f" ({row['differ']:,} elements differ)" if row.get("differ") else "")
        )
    if drift.only_in_a:
        kinds["only in A"] = drift.only_in_a
    if drift.only_in_b:
        kinds["only in B"] = drift.only_in_b
    lines += [f"{plain(why)}: {plain(_names(names))}" for why, names in kinds.items()]
    return lines + [f"[dim]note: {plain(note)}[/]" for note in drift.notes]


def _spectral(row: dict[str, Any]) -> str:
    return (
        f"[yellow]intruders[/] {plain(row['tensor'])}: {row['intruders']} of its 10 leading singular "
        f"vectors are like none of A's; the change has stable rank {row['stable_rank_change']:.3g}"
    )


def _prior(layer: dict[str, Any]) -> str:
    moved = ", ".join(
        f"class {m['class']} {percent(m['prior_a'])} → {percent(m['prior_b'])}" for m in layer["moved"][:3]
    )
    return (
        f"output bias {plain(layer['tensor'])}: logits shifted by up to {layer['largest_shift']:.3g}; "
        f"the prior that it implies: {moved}"
    )


def _names(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return f"{len(names)}: " + ", ".join(names[:NAMED]) + more
