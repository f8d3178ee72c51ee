"""Which roll-up levels answer a question: coarse bins where few points are wanted, finer rows at the edges.

A level is named by its factor: 1 is the `stats` table, 16 and up are the roll-ups. Captures are ordinals
within a writer and a session, its *stream*. Bins nest, and a file's name tells which it holds, so what to
read of which level is known before anything is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from .derive import codes_of
from .intervals import ENDLESS, EVERYTHING, Intervals, intersection, subtract, union, widened
from .reader import LogReader
from .rollup import roll_up
from .scan import Between, Where, coded, encoded, select
from .schema import FACTORS, ROLLUP, SCHEMAS, SORT_KEYS, rollup_table
from .sessions import Cut

LEVELS = (1, *FACTORS)
#: Rows that are merged at a time: with all columns of a roll-up they take ten times the bytes that were read.
POOLED_ROWS = 50_000
Stream = tuple[str, int]  # writer, session
Held = Mapping[int, Mapping[Stream, Intervals]]  # level -> stream -> captures

#: What a row of level 1 has for the columns of a roll-up.
_OF_ONE = {"last_step": "step", "sum_sq_min": "sum_sq", "sum_sq_max": "sum_sq"}


def table_of(level: int) -> str:
    return "stats" if level == 1 else rollup_table(level)


def rows(
    log: LogReader, columns: Sequence[str], where: Where, factor: int, steps: Between | None = None
) -> pa.Table:
    """Rows of `schema.ROLLUP`, one for each tensor and bin of `factor` captures; strings as dictionaries.

    Bins that are not complete hold fewer captures. Where the log holds nothing finer, rows are coarser. A bin
    that reaches into steps that a later session has done again is replaced by finer rows if there are any.

    Args:
        columns: which are wanted; tensor and step are added.
        where: conditions on kind and tensor. steps: only bins with a capture in this range.
    """
    streams = ["session", "capture"] if factor > 1 else []
    names: list[str] = list(dict.fromkeys([*columns, "tensor", "step", *streams]))
    target = encoded(ROLLUP, names)
    whole, partial = [target.empty_table()], []
    for level, found in _gather(log, names, where, factor, steps):
        (whole if level >= factor else partial).append(found.select(names).cast(target))
    if partial:
        whole.append(_pooled(pa.concat_tables(partial), factor).select(names).cast(target))
    return pa.concat_tables(whole)


def factor_for(log: LogReader, where: Where, steps: Between | None, max_points: int) -> int:
    """The finest level with at most `max_points` rows of a tensor (and one of each session), judged by one
    tensor."""
    names = ["captures", "session", "capture", "step"]
    probe = _gather(log, names, where, LEVELS[-1], steps)
    rough = max((level for level, _ in probe), default=1)
    if rough > 1 and 0 < _captures_in(probe) - max_points <= 2 * rough:
        probe = _gather(log, names, where, 1, steps)  # bins reach out of the range on both sides
    first: dict[int, int] = {}
    last: dict[int, int] = {}
    for level, found in probe:
        session, capture = found["session"].to_numpy(), _captures(found)
        for s in np.unique(session):
            here = capture[session == s]
            first[s] = min(int(here.min()), first.get(s, ENDLESS))
            last[s] = max(int(here.max()) // level * level + level - 1, last.get(s, 0))
    total = _captures_in(probe)
    for level in LEVELS:
        bins = sum(last[s] // level - first[s] // level + 1 for s in first)
        if (total if level == 1 else min(total, bins)) <= max_points:
            return level
    return LEVELS[-1]


def _captures_in(gathered: list[tuple[int, pa.Table]]) -> int:
    return sum(int(pc.sum(found["captures"]).as_py() or 0) for _, found in gathered)  # type: ignore[attr-defined]


def _gather(
    log: LogReader, names: Sequence[str], where: Where, factor: int, steps: Between | None
) -> list[tuple[int, pa.Table]]:
    """Rows of every level that is needed, each capture in one of them."""
    while True:
        known = log.problems
        found = _gather_once(log, names, where, factor, steps)
        if log.problems == known:
            return found  # else a file turned out to be damaged: other levels may hold its captures


def _gather_once(
    log: LogReader, names: Sequence[str], where: Where, factor: int, steps: Between | None
) -> list[tuple[int, pa.Table]]:
    levels = held(log)
    if not levels:
        return [(1, found) for _, found in _read(log, 1, None, names, where, steps)]
    streams = {stream for level in levels.values() for stream in level}
    coarse = {level: {} for level in LEVELS if level > factor}
    need = {stream: _without_coarse(levels, stream, factor, coarse) for stream in streams}
    if factor == 1 and all(captures == EVERYTHING for captures in need.values()):
        return [(1, found) for _, found in _read(log, 1, None, names, where, steps)]
    cut = log.cut
    found = [
        (level, rows) for level in coarse for _, rows in _read(log, level, coarse[level], names, where, steps)
    ]
    for level in sorted((level for level in LEVELS if level <= factor), reverse=True):
        # What is left in the end is read of level 1 whatever is said to be there: of damaged parts, the rest.
        here = {s: intersection(need[s], levels[level].get(s, [])) if level > 1 else need[s] for s in streams}
        need = {s: subtract(need[s], here[s]) for s in streams}
        for writer, rows in _read(log, level, here, names, where, steps):
            if level > 1 and cut is not None:
                rows, again = _without_straddling(rows, cut, level, levels, writer)
                need |= {s: union(need[s], bins) for s, bins in again.items()}
            found.append((level, rows))
    return [(level, rows) for level, rows in found if rows.num_rows]


def held(log: LogReader) -> Held:
    """The captures that each level holds; damaged ones do not count. Empty when there are no roll-ups.

    So it is where parts of tensors have to be put together first.
    """
    if log.joint is not None and log.joint.sharded:
        return {}
    found: dict[int, dict[Stream, Intervals]] = {}
    for level in FACTORS:
        streams = found[level] = {}
        for span, file in log.files(table_of(level)).items():
            writer, _, session = span.writer.rpartition("-s")
            if session.isdigit() and f"{table_of(level)}/{file}" not in log.problems:
                stream = writer, int(session)
                captures = span.first * level, (span.last + 1) * level
                streams[stream] = union(streams.get(stream, []), [captures])
    if not any(found.values()):
        return {}
    found[1] = _held_in_full(log, found[FACTORS[0]])
    return found


def _held_in_full(log: LogReader, bins: Mapping[Stream, Intervals]) -> dict[Stream, Intervals]:
    """The captures of level 1. Where rows before or behind were removed, the bin in between is rolled up."""
    found: dict[Stream, Intervals] = {}
    latest = max(log.starts, default=0)
    for writer, stretches in log.ranges("stats").items():
        for first, last in stretches:
            for session in range(first[0] if first else 0, (last[0] if last else latest) + 1):
                stream = writer, session
                low = first[1] if first and session == first[0] else 0
                high = last[1] + 1 if last and session == last[0] else ENDLESS
                found[stream] = union(found.get(stream, []), [(low, high)])
    return {stream: subtract(there, _edges(there, bins.get(stream, []))) for stream, there in found.items()}


def _edges(there: Intervals, bins: Intervals) -> Intervals:
    """The bins that hold the first or last capture of a stretch: some of their rows may be gone."""
    ends = [x for low, high in there for x in (low, high - 1) if 0 < x < ENDLESS - 1]
    return intersection(widened([(x, x + 1) for x in ends], FACTORS[0]), bins)


def _without_coarse(
    levels: Held, stream: Stream, factor: int, coarse: Mapping[int, dict[Stream, Intervals]]
) -> Intervals:
    """Takes what only coarser levels hold from those; returns what is left to the finer ones."""
    missing, need = EVERYTHING, EVERYTHING
    for level in (level for level in LEVELS if level <= factor):
        missing = subtract(missing, levels[level].get(stream, []))
    for level, taken in coarse.items():
        taken[stream] = intersection(widened(missing, level), levels[level].get(stream, []))
        missing, need = subtract(missing, taken[stream]), subtract(need, taken[stream])
    return need


def _read(
    log: LogReader,
    level: int,
    streams: Mapping[Stream, Intervals] | None,
    names: Sequence[str],
    where: Where,
    steps: Between | None,
) -> list[tuple[str, pa.Table]]:
    """Rows of one level by writer, of these captures of each stream (None: all), shaped as a roll-up's."""
    wanted = [interval for found in (streams or {}).values() for interval in found]
    if streams is not None and not wanted:
        return []
    conditions: dict[str, Any] = dict(where)
    if steps is not None and level == 1:
        conditions["step"] = steps
    elif steps is not None:
        conditions |= {"step": Between(None, steps.high), "last_step": Between(steps.low, None)}
    low, high = min((p for p, _ in wanted), default=0), max((q for _, q in wanted), default=ENDLESS)
    if low > 0 or high < ENDLESS:  # format version 1 has no captures: such rows are of a whole stream
        conditions["capture"] = Between(low, high - 1)
    stored = SCHEMAS[table_of(level)]
    columns = [
        _OF_ONE.get(n, n) if n not in stored.names else n for n in names if n != "ratio_sq_max" or level > 1
    ]
    if "ratio_sq_max" in names and level == 1:
        columns += ["sum_sq", "ref_sum_sq"]
    if level > 1:
        columns += ["last_step"]
    found = []
    columns += ["session", "capture"] if streams is not None else []
    for name, rows in log.pieces(table_of(level), list(dict.fromkeys(columns)), conditions):
        writer = name if level == 1 else name.rpartition("-s")[0]
        if streams is not None:
            rows = _of_streams(rows, writer, streams)
        found.append((writer, rows if level > 1 else _shaped(rows, names)))
    return found


def _of_streams(rows: pa.Table, writer: str, streams: Mapping[Stream, Intervals]) -> pa.Table:
    session, capture = rows["session"].to_numpy(), _captures(rows)
    mask = np.zeros(rows.num_rows, bool)
    for (owner, number), captures in streams.items():
        if owner == writer:
            for low, high in captures:
                mask |= (session == number) & (capture >= low) & (capture < high)
    return select(rows, mask)


def _captures(rows: pa.Table) -> NDArray[np.int64]:
    """Ordinals of the captures; of format version 1, which has none, of the steps."""
    if rows["capture"].null_count == 0:
        return rows["capture"].to_numpy()
    missing = rows["capture"].is_null().to_numpy()
    _, places = np.unique(rows["step"].to_numpy(), return_inverse=True)
    return np.where(missing, places, rows["capture"].fill_null(0).to_numpy())


def _shaped(rows: pa.Table, names: Sequence[str]) -> pa.Table:
    """Rows of level 1 with the columns of a roll-up, as far as they are among `names`."""
    for name in names:
        if name in rows.column_names:
            continue
        if name == "ratio_sq_max":
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = rows["sum_sq"].to_numpy() / rows["ref_sum_sq"].to_numpy()
            column = pa.chunked_array([pa.array(ratio, mask=np.isnan(ratio))])
        else:
            column = rows[_OF_ONE[name]]
        rows = rows.append_column(ROLLUP.field(name), column)
    return rows


def _without_straddling(
    rows: pa.Table, cut: Cut, level: int, levels: Held, writer: str
) -> tuple[pa.Table, dict[Stream, Intervals]]:
    """Leaves out bins that reach into steps that were done again, if finer levels hold them; names those."""
    session, capture = rows["session"].to_numpy(), rows["capture"].to_numpy()
    beyond = rows["last_step"].to_numpy() >= cut.at(session)
    again: dict[Stream, Intervals] = {}
    mask = np.ones(rows.num_rows, bool)
    for s in np.unique(session[beyond]):
        stream = writer, int(s)
        for number in np.unique(capture[beyond & (session == s)] // level):
            interval = [(int(number) * level, (int(number) + 1) * level)]
            left = interval
            for finer in (finer for finer in LEVELS if finer < level):
                left = subtract(left, levels[finer].get(stream, []))
            if not left:
                again[stream] = union(again.get(stream, []), interval)
                mask &= ~((session == s) & (capture // level == number))
    return select(rows, mask), again


def _pooled(rows: pa.Table, factor: int) -> pa.Table:
    """Rows finer than `factor` merged into bins, some tensors at a time; see `_pooled_block`."""
    codes, words = codes_of(rows["tensor"])
    block = np.cumsum(np.bincount(codes, minlength=len(words))) // POOLED_ROWS
    place = block[codes]
    found = [_pooled_block(select(rows, place == number), factor) for number in np.unique(place)]
    return pa.concat_tables(found or [_pooled_block(rows, factor)])


def _pooled_block(rows: pa.Table, factor: int) -> pa.Table:
    """Rows merged into bins; columns that they lack are null, empty or 0."""
    rows = rows.set_column(rows.schema.get_field_index("capture"), "capture", pa.array(_captures(rows)))
    for field in ROLLUP:
        if field.name not in rows.column_names:
            rows = rows.append_column(field, _nothing(field, rows.num_rows))
    plain = rows.select(ROLLUP.names).cast(ROLLUP).sort_by(SORT_KEYS["stats"])
    return coded(roll_up(plain, factor))


def _nothing(field: pa.Field, rows: int) -> pa.Array:
    if field.nullable:
        return pa.nulls(rows, field.type)
    if pa.types.is_list(field.type):
        return pa.ListArray.from_arrays(
            pa.array(np.zeros(rows + 1, np.int32)), pa.array([], field.type.value_type)
        )
    return pa.array(np.full(rows, "" if pa.types.is_string(field.type) else 0)).cast(field.type)
