"""Roll-ups: several captures in one row, checked against `summary.merge`."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from layerwatch.monitor import Summary, merge, summarise
from layerwatch.monitor.merging import merged, order
from layerwatch.monitor.rollup import roll_up
from layerwatch.monitor.schema import ROLLUP, SORT_KEYS, TABLES

STATS = TABLES["stats"]
KEYS = [name for name, _ in SORT_KEYS["stats"]]
OPTIONAL = ("ref_sum_sq", "dot", "residual_sq", "sign_flips", "lost", "samples", "units", "active")


def captured(
    rng: np.random.Generator, capture: int, tensor: str, kind: str, session: int = 0
) -> dict[str, Any]:
    """One row with everything in it that a row may hold."""
    x = rng.standard_normal(int(rng.integers(0, 40))) * 10.0 ** rng.integers(-45, 30)
    x[rng.random(x.size) < 0.2] = rng.choice([0.0, np.nan, np.inf, -np.inf])
    s = summarise(x)
    row = {name: getattr(s, name) for name in STATS.names if hasattr(s, name)}
    for name in ("ref_sum_sq", "dot", "residual_sq"):
        row[name] = None if rng.random() < 0.05 else float(rng.choice([0.0, 1.0, rng.random()]))
    for name in ("sign_flips", "lost", "samples"):
        row[name] = None if rng.random() < 0.05 else int(rng.integers(0, 9))
    units = 9 if tensor == "a" else int(rng.integers(9, 11)) if tensor == "b" else None
    row |= {"units": units, "active": None if units is None else rng.bytes((units + 7) // 8)}
    row |= {"step": 10 * capture + 3, "time": float(capture), "tensor": tensor, "kind": kind}
    row |= {
        "stage": None,
        "state": str(rng.choice(["trainable", "frozen"])),
        "skipped": bool(rng.random() < 0.02),
    }
    return {**row, "session": session, "capture": capture}


def made(captures: range = range(70), seed: int = 0) -> tuple[pa.Table, list[dict[str, Any]]]:
    """Sorted rows of several tensors, kinds and sessions."""
    rng = np.random.default_rng(seed)
    rows = [
        captured(rng, c, t, k, session)
        for session in (0, 1) for c in captures for t in ("a", "b", "é") for k in ("activation", "update")
    ]  # fmt: skip
    rows.sort(key=lambda r: tuple(r[k] for k in KEYS))
    for row in rows:  # as they are written
        row["min"], row["max"] = (row["min"], row["max"]) if np.isfinite(row["min"]) else (None, None)
    return pa.Table.from_pylist(rows, STATS), rows


def expected(rows: list[dict[str, Any]], factor: int) -> list[dict[str, Any]]:
    """By `summary.merge`, one bin after the other."""
    bins: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for row in rows:
        bins.setdefault((row["kind"], row["tensor"], row["session"], row["capture"] // factor), []).append(
            row
        )
    return [bin_of(members) for members in bins.values()]


def bin_of(members: list[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in STATS.names if name in Summary.__slots__]
    parts = [
        Summary(**{n: m[n] for n in names if not (n in ("min", "max") and m[n] is None)}) for m in members
    ]
    for part in parts:
        part.buckets, part.counts = np.asarray(part.buckets, np.int16), np.asarray(part.counts, np.int64)
    s = merge(parts, captures=True)
    first, last = members[0], members[-1]
    ratios = [
        m["sum_sq"] / m["ref_sum_sq"] if m["ref_sum_sq"] else np.inf
        for m in members if m["ref_sum_sq"] is not None and (m["ref_sum_sq"] or m["sum_sq"])
    ]  # fmt: skip
    return {
        **first, **{n: getattr(s, n) for n in names},
        "min": s.min if np.isfinite(s.min) else None, "max": s.max if np.isfinite(s.max) else None,
        "state": last["state"], "stage": last["stage"], "skipped": any(m["skipped"] for m in members),
        "last_step": last["step"],
        "sum_sq_min": min(m["sum_sq"] for m in members), "sum_sq_max": max(m["sum_sq"] for m in members),
        "ratio_sq_max": max(ratios, default=None),
    }  # fmt: skip


def assert_same(found: pa.Table, wanted: list[dict[str, Any]]) -> None:
    assert found.schema.equals(ROLLUP)
    assert found.num_rows == len(wanted)
    for row, other in zip(found.to_pylist(), wanted, strict=True):
        for name in ROLLUP.names:
            a, b = row[name], other[name]
            if name in ("sum", "sum_sq", "ref_sum_sq", "dot", "residual_sq") and None not in (a, b):
                assert a == pytest.approx(b, rel=1e-12, abs=1e-12 * max(1.0, abs(other["max"] or 0.0))), name
            elif name in ("buckets", "counts"):
                assert a == list(b), name
            else:
                assert a == b, (name, row["tensor"], row["capture"])


@pytest.mark.parametrize("factor", [1, 16, 256])
def test_a_bin_is_what_merging_its_captures_gives(factor: int) -> None:
    table, rows = made()
    assert_same(roll_up(table, factor), expected(rows, factor))


def test_a_level_may_be_made_from_the_level_before() -> None:
    table, rows = made()
    assert_same(roll_up(roll_up(table, 4), 16), expected(rows, 16))


def test_no_rows_give_no_rows() -> None:
    assert roll_up(STATS.empty_table(), 16).equals(ROLLUP.empty_table())


def test_the_start_of_a_slice_does_not_matter() -> None:
    table, rows = made()
    places = [i for i, row in enumerate(rows) if row["tensor"] != "a"]
    assert_same(roll_up(table.slice(places[0]), 16), expected(rows[places[0] :], 16))


# Streams that are merged ------------------------------------------------------------------------------------


def pieces(table: pa.Table, size: int) -> list[pa.Table]:
    return [table.slice(start, size) for start in range(0, table.num_rows, size)]


@pytest.mark.parametrize("sources", [1, 2, 7])
def test_merged_streams_are_the_sorted_whole(sources: int) -> None:
    table, _ = made(range(30))
    shares = np.random.default_rng(sources).integers(0, sources, table.num_rows)
    streams = [pieces(table.filter(pa.array(shares == s)), 11) for s in range(sources)]
    found = pa.concat_tables(merged(streams, KEYS))
    assert found.combine_chunks().equals(table.combine_chunks())


def test_equal_rows_stay_in_the_order_of_the_sources() -> None:
    first = pa.table({"name": ["a", "a", "b"], "step": [1, 2, 1], "of": [0, 0, 0]})
    second = pa.table({"name": ["a", "a", "b"], "step": [1, 1, 1], "of": [1, 1, 1]})
    found = pa.concat_tables(merged([pieces(first, 1), [], pieces(second, 2)], ["name", "step"]))
    assert found["of"].to_pylist() == [0, 1, 1, 0, 0, 1]
    assert order(pa.concat_tables([first, second]), ["name", "step"]).tolist() == [0, 3, 4, 1, 2, 5]
