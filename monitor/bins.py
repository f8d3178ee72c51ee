"""The roll-ups of a run: writing them as captures come in, and removing what a coarser level holds.

Level f has one row for each tensor and bin of f captures of one writer and session: bin = capture // f. Each
level is made from the one before. The files of a level are named after the bins they hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pyarrow as pa

from .parts import PartWriter
from .rollup import bin_starts, roll_up
from .schema import FACTORS, rollup_table
from .spans import Span, spans
from .tiers import FAN_IN, FULL_CAPTURES, Part, Stop, UnreadableError, check, parts_of, remove, sorted_rows

#: With keep="rollup": rows of a level that are kept, in captures or bins.
KEPT = 2048
_LEVELS = ("stats", *(rollup_table(factor) for factor in FACTORS))
#: How many rows of a level the next one merges.
_STEP = 16


def roll_up_run(
    run: Path,
    writer: str,
    complete: Mapping[int, int],
    *,
    over: bool,
    keep: str,
    stop: Stop,
    only: int | None = None,
) -> None:
    """Write the bins that are complete and not written yet, of all levels and sessions of a writer.

    Args:
        complete: session -> captures, from the first, that have all their rows; of other sessions all have.
        over: the current session has ended, as all others have. Of what has ended the last, partial bins are
            written, too, so that overviews need no finer rows: of levels that have a complete one, or of
            all where full rows are not kept.
        only: leave other sessions than this alone: not all that they wrote is in parts.

    Raises:
        Stopped, OSError: nothing is lost.
    """
    parts = parts_of(run, "stats", writer)
    ends: dict[int, int] = {}
    for part in parts:
        for session, (_, last) in part.captures.items():
            ends[session] = max(ends.get(session, 0), last + 1)
    sessions = sorted({*ends, *_sessions(run, writer)})
    for session in [s for s in sessions if only in (None, s)]:
        ended = over or session < max([*sessions, *complete])
        known = ends.get(session, 0)
        available = min(known, complete.get(session, known))
        for level in range(1, len(_LEVELS)):
            partial = ended and available % _STEP > 0 and (available > _STEP or keep == "rollup")
            count = available // _STEP + partial
            available = _fill(run, writer, session, level, count, stop)


def _sessions(run: Path, writer: str) -> Iterator[int]:
    for span in spans(run / _LEVELS[1], ".parquet"):
        name, found, session = span.writer.rpartition("-s")
        if found and name == writer and session.isdigit():
            yield int(session)


def _written(run: Path, writer: str, session: int, level: int) -> int:
    """Bins of a level, from the first, that are on disk."""
    name = f"{writer}-s{session}"
    return max((s.last + 1 for s in spans(run / _LEVELS[level], ".parquet") if s.writer == name), default=0)


def _fill(run: Path, writer: str, session: int, level: int, count: int, stop: Stop) -> int:
    """Write bins up to `count`, as far as they are missing; returns how many there are."""
    done = _written(run, writer, session, level)
    while done < count:
        bins = Span(f"{writer}-s{session}", done, min(count, done + FULL_CAPTURES // _STEP) - 1)
        while len(parts := _finer_parts(run, bins, level)) > FAN_IN and bins.last > done:
            bins = bins._replace(last=(done + bins.last) // 2)  # few at once need little memory
        try:
            _write_bins(run, bins, level, parts, stop)
        except UnreadableError:
            continue  # once more, without the damaged part
        done = bins.last + 1
    return done


def _captures(bins: Span, level: int) -> tuple[int, int]:
    factor = FACTORS[level - 1]
    return bins.first * factor, (bins.last + 1) * factor - 1


def _finer_parts(run: Path, bins: Span, level: int) -> list[Part]:
    """The parts of the level before that hold captures of these bins."""
    writer, _, session = bins.writer.rpartition("-s")
    name = writer if level == 1 else bins.writer
    first, last = _captures(bins, level)
    found = []
    for part in parts_of(run, _LEVELS[level - 1], name):
        begin, end = part.captures.get(int(session), (0, -1))
        if part.usable and begin <= last and end >= first:
            found.append(part)
    return found


def _write_bins(run: Path, bins: Span, level: int, parts: Sequence[Part], stop: Stop) -> None:
    session, factor = int(bins.writer.rpartition("-s")[2]), FACTORS[level - 1]
    first, last = _captures(bins, level)
    folder = run / _LEVELS[level]
    folder.mkdir(exist_ok=True)
    held: list[pa.Table] = []  # of the bin that is not whole yet
    with PartWriter(folder / f"{bins.stem}.parquet", folder.name) as out:
        for rows in sorted_rows(parts, _LEVELS[level - 1]):
            check(stop)
            wanted = _chosen(rows, session, first, last)
            if wanted.num_rows:
                wanted = pa.concat_tables([*held, wanted])
                begun = int(bin_starts(wanted, factor)[-2])
                out.write(roll_up(wanted.slice(0, begun), factor))
                held = [wanted.slice(begun)]
        for rest in held:
            out.write(roll_up(rest, factor))


def _chosen(rows: pa.Table, session: int, first: int, last: int) -> pa.Table:
    capture = rows["capture"].fill_null(-1).to_numpy()
    return rows.filter(
        pa.array((rows["session"].to_numpy() == session) & (first <= capture) & (capture <= last))
    )


def thin_out(run: Path, writer: str) -> None:
    """Remove the oldest parts of a level that the next one holds; the newest `KEPT` captures or bins stay."""
    _thin_level(parts_of(run, "stats", writer), run, writer, 0)
    for level in range(1, len(FACTORS)):
        parts = [
            part
            for session in sorted(set(_sessions(run, writer)))
            for part in parts_of(run, _LEVELS[level], f"{writer}-s{session}")
        ]
        _thin_level(parts, run, writer, level)


def _thin_level(parts: list[Part], run: Path, writer: str, level: int) -> None:
    newer = sum(part.width for part in parts)
    removed = []
    for part in parts:
        newer -= part.width
        if not part.usable or not part.captures:
            continue
        if newer < KEPT or not _held(part, run, writer, level):
            break
        removed.append(part.path)
    remove(iter(removed))


def _held(part: Part, run: Path, writer: str, level: int) -> bool:
    """Whether the next level holds all of a part."""
    if level == 0:
        ends = {session: last for session, (_, last) in part.captures.items()}
    else:
        ends = {int(part.span.writer.rpartition("-s")[2]): part.span.last}
    return all(_written(run, writer, session, level + 1) * _STEP > last for session, last in ends.items())
