"""Envelopes of good runs: their limits, their file, and which runs are good ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_logs import make_run
from made_seeds import history, scaled

from layerwatch.monitor import RunError
from layerwatch.monitor.calibration import calibrate
from layerwatch.monitor.courses import better, courses, smooth
from layerwatch.monitor.detectors import Arrays, History
from layerwatch.monitor.detectors.regression import regression
from layerwatch.monitor.envelopes import LEAST_LIMIT, LIMIT_ALONE, student
from layerwatch.monitor.normal import Normal, departures, learn
from layerwatch.monitor.normal_file import VERSION, read_normal, write_normal


@pytest.fixture(scope="module")
def normal() -> Normal:
    return learn([courses(history(seed, steps=120, layers=3)) for seed in range(4)])


@pytest.fixture
def written(normal: Normal, tmp_path: Path) -> Path:
    write_normal(normal, tmp_path / "normal.json")
    return tmp_path / "normal.json"


# ---- courses


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        ("val_loss", -1),
        ("eval/wer", -1),
        ("val_acc", 1),
        ("test/f1", 1),
        ("lr", 0),
        ("certainty", 0),
        ("macro", 0),
    ],
)
def test_which_way_a_scalar_is_better(name: str, direction: int) -> None:
    assert better(name) == direction


def test_smoothing_drops_single_captures_and_keeps_jumps_where_they_are() -> None:
    values = np.where(np.arange(100) < 40, 0.0, 1.0)[:, None]
    values[10] = 9.0
    smoothed = smooth(values)
    np.testing.assert_array_equal(smoothed, np.where(np.arange(100) < 40, 0.0, 1.0)[:, None])


def test_clocks_and_counters_are_not_compared() -> None:
    steps = np.arange(20)
    names = ("step_time", "gpu memory", "epoch", "recorder/loss", "val_loss")
    values = steps.tolist(), (1.0 + steps).tolist()
    source = Arrays(losses=dict.fromkeys(names, values))
    assert list(courses(History(source)).scalars) == ["val_loss"]


# ---- envelopes


@pytest.mark.parametrize(
    ("level", "free", "expected"),
    [(0.995, 2, 9.9248), (0.995, 4, 4.6041), (0.99, 10, 2.7638), (0.999, 30, 3.3852), (0.975, 1e6, 1.96)],
)
def test_quantiles_of_student(level: float, free: float, expected: float) -> None:
    assert student(level, free) == pytest.approx(expected, rel=2e-3)


def test_the_envelope_holds_its_own_runs_and_its_limits_are_calibrated(normal: Normal) -> None:
    assert set(normal.layers) == {
        f"{what}{of}"
        for what in ("gradient norm", "update ratio", "weight norm")
        for of in ("", " of vectors")
    } | {"activation rms"}
    assert set(normal.scalars) == {"train_loss", "val_loss"}
    for envelope in (*normal.layers.values(), *normal.scalars.values()):
        assert envelope.limit >= LEAST_LIMIT
        assert (envelope.spread > 0).all()
        assert (np.diff(envelope.steps) > 0).all()
    for seed in range(4):
        assert departures(normal, courses(history(seed, steps=120, layers=3))) == []
    alone = learn([courses(history(0, steps=120, layers=3))])
    assert {e.limit for e in alone.layers.values()} == {LIMIT_ALONE}


def test_baselines_that_differ_more_have_wider_limits_of_the_loss(normal: Normal) -> None:
    wild = [
        courses(history(s, steps=120, layers=3, change=scaled("weight", "1.weight", 60, 1 + s)))
        for s in range(4)
    ]
    own = courses(history(20, steps=120, layers=3, change=scaled("weight", "1.weight", 60, 3.0)))
    assert [d.name for d in departures(normal, own)] == ["1.weight"]
    assert departures(learn(wild), own) == []


def test_a_tensor_of_several_shapes_is_taken_with_the_most_frequent() -> None:
    widths = (16, 32, 32)
    mixed = learn([courses(history(i, steps=60, layers=2, width=w)) for i, w in enumerate(widths)])
    assert set(mixed.shapes.values()) == {(32, 32), (32,)}


# ---- the file


def test_a_file_says_the_same_as_its_runs(normal: Normal, written: Path) -> None:
    again = read_normal(written)
    assert (again.runs, again.shapes, again.last_step) == (normal.runs, normal.shapes, normal.last_step)
    own = history(30, steps=120, layers=3, change=scaled("update", "1.weight", 50, 4.0))
    found = []
    for known in (normal, again):
        own.normal = known
        found.append(regression(own))
    assert found[0] is not None
    assert found[1] is not None
    assert (found[1].layers, found[1].first_step) == (found[0].layers, found[0].first_step)
    for key, value in found[0].evidence.items():
        expected = pytest.approx(value, rel=1e-3) if not isinstance(value, str) else value
        assert found[1].evidence[key] == expected


def test_the_file_can_be_read_by_people(written: Path) -> None:
    text = written.read_text()
    document = json.loads(text)
    assert (document["format"], document["version"]) == ("layerwatch-normal", VERSION)
    assert document["shapes"]["0.weight"] == [16, 16]
    assert max(len(line) for line in text.splitlines()) < 1500
    assert len(text.splitlines()) < 250  # a list is one line


def broken(change: Any) -> Any:
    def make(document: dict[str, Any]) -> dict[str, Any]:
        change(document)
        return document

    return make


def first(document: dict[str, Any]) -> dict[str, Any]:
    return document["layers"]["update ratio"]


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda d: d.update(version=VERSION + 1), "update layerwatch"),
        (lambda d: d.update(version="two"), "version"),
        (lambda d: d.pop("format"), "format"),
        (lambda d: d.pop("layers"), "damaged"),
        (lambda d: d.update(layers=[1]), "damaged"),
        (lambda d: d.update(runs=[]), "no runs"),
        (lambda d: d["layers"].update(smell=first(d)), "unknown signals"),
        (lambda d: first(d)["steps"].reverse(), "ascend"),
        (lambda d: first(d)["layers"]["0.weight"]["centre"].pop(), "numbers"),
        (lambda d: first(d)["layers"]["0.weight"]["spread"].__setitem__(0, -1.0), "above zero"),
        (lambda d: first(d).update(limit=0), "limit"),
        (lambda d: first(d).update(layers={}), "damaged"),
        (lambda d: d["scalars"]["val_loss"].update(runs=[]), "damaged"),
        (lambda d: d["scalars"]["val_loss"].update(scale=0), "scale"),
    ],
)
def test_a_damaged_file_is_refused(written: Path, change: Any, why: str) -> None:
    document = json.loads(written.read_text())
    change(document)
    written.write_text(json.dumps(document))
    with pytest.raises(RunError, match=why):
        read_normal(written)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff\xfe\x00", b"null"])
def test_what_is_no_such_file_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(RunError, match="expected a file of `layerwatch calibrate`"):
        read_normal(tmp_path / "x.json")


# ---- which runs


def test_runs_that_cannot_teach_are_left_out_with_the_reason(tmp_path: Path) -> None:
    for name in ("a", "b"):
        make_run(tmp_path / name, 12)
    make_run(tmp_path / "empty", 0)
    make_run(tmp_path / "live", 6, close=False, host="", pid=0)
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "run.json").write_text("{")
    found = calibrate([str(tmp_path)])
    assert found.normal.runs == ("a", "b")
    reasons = {Path(path).name: reason for path, reason in found.left_out.items()}
    assert reasons["empty"] == "it is empty"
    assert reasons["live"] == "it is still being written"
    assert "torn" in reasons
    again = calibrate([str(tmp_path / name) for name in ("a", "b", "a")])
    assert (again.normal.runs, again.left_out) == (("a", "b"), {})
