"""The language of filters: what each term means, what it does not find, and the words for a wrong one."""

from __future__ import annotations

from typing import Any

import pytest

from layerwatch.monitor.fleet.search import SearchError, number, parse

NOW = 1_800_000_000.0
DAY = 86400.0


def row(**more: Any) -> dict[str, Any]:
    """A row of a scan table."""
    found = {
        "problem": "dead_units",
        "severity": "warning",
        "layers": ["blocks.1.fc"],
        "summary": "",
        "noticed": NOW,
    }
    remark = {**found, "problem": "loss_spike", "severity": "info"}
    plain = {
        "run": "sweep/resnet-7", "owner": "ana", "tags": ["baseline", "Final run"], "note": "after the fix",
        "model": "ResNet50", "host": "gpu-7", "health": "warning", "health_before": "healthy",
        "problem": "dead_units", "findings": [found, remark],
        "config": '{"optimizer.lr": 0.003, "optimizer.name": "AdamW", "nesterov": true}',
        "scalars": [{"name": "val_acc", "last": 0.91, "best": None, "best_step": None}],
        "steps": 1000, "parameters": 25_000_000, "val_loss": 0.5, "drift": None, "closed": True,
        "live": False, "created": NOW - 10 * DAY, "ended": NOW - 9 * DAY, "wrote": NOW - 8 * DAY,
        "worse": NOW - 3600, "copy_of": None, "error": None,
    }  # fmt: skip
    return plain | more


@pytest.mark.parametrize(
    "text",
    [
        "",
        "resnet",
        "RESNET sweep",
        "adamw",
        "dead_units",
        '"dead units"',
        '"after the fix"',
        "tag:baseline",
        "tag:BASE*",
        'tag:"final run"',
        "tag:x,baseline",
        'tag:x,"Final run"',
        "owner:ana",
        "owner:*a*",
        "health:warning,critical",
        "problem:dead_units",
        "finding:loss_spike",
        "layer:blocks.1.*",
        "model:resnet",
        "model=resnet50",
        "name:sweep/",
        "host:gpu",
        "lr>0.001",
        "lr<=3e-3",
        "optimizer.lr=0.003",
        "optimizer.name=adamw",
        "name!=adamw",  # the run's name, which is another one
        "nesterov=true",
        "val_acc>0.9",
        "steps>=1k",
        "parameters>20M",
        "val<0.6",
        "age<10d",
        "age>8d",
        "worse<2h",
        "created>2026-01-01",
        "is:closed",
        "is:live,worse",
        "-tag:sweep",
        "-is:copy",
        "-missing",
        "lr!=0.1",
        "lr>0 tag:baseline resnet",
    ],
)
def test_a_run_fits(text: str) -> None:
    assert parse(text, now=NOW).fits(row())


@pytest.mark.parametrize(
    "text",
    [
        "transformer",
        "resnet transformer",
        "-resnet",
        "tag:base",  # the tag itself
        "tag:none",
        "owner:bo",
        "health:critical",
        "problem:loss_spike",  # a remark is no alarm
        "model=resnet",
        "lr>0.003",
        "lr<0.003",
        "momentum>0",  # no such setting
        "momentum!=0",
        "drift>0",
        "drift<1e9",
        "age<9d",
        "worse>2h",
        "created<2026-01-01",
        "is:live",
        "is:new",
        "-is:worse",
        "tag:baseline -tag:baseline",
    ],
)
def test_a_run_does_not_fit(text: str) -> None:
    assert not parse(text, now=NOW).fits(row())


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tga:x", "there is no field tga.*did you mean tag"),
        ("lr>", "expected a value after lr>"),
        ("owner:", "expected a value after owner:"),
        ("lr>fast", "expected a number after lr>, got fast"),
        ("age<7", "age<: expected how long ago, such as 12h or 7d"),
        ("age:7d", "expected age< or age>"),
        ("health:ciritcal", "expected health: and one of critical.*did you mean critical"),
        ("is:lively", "expected is: and one of live.*did you mean live"),
        ("tag>5", "expected tag:5, because tag is no number"),
        ('"no end', "expected a closing quote"),
        ("http://x", "put them in quotes"),
    ],
)
def test_a_wrong_term_is_explained(text: str, words: str) -> None:
    with pytest.raises(SearchError, match=words):
        parse(f"fine {text}")


def test_what_a_run_lacks_is_none() -> None:
    bare = {"run": "x", "health": "unreadable", "error": "run.json is empty"}
    assert parse("tag:none owner:none model:none problem:none health:unreadable").fits(bare)
    assert not any(
        parse(text).fits(bare) for text in ("lr>0", "age>0s", "tag:x", "is:interrupted", "val_loss<9")
    )
    assert parse("error:empty run.json").fits(bare)


def test_a_setting_is_found_by_its_last_word_and_by_all_of_them() -> None:
    config = {"model.depth": 24, "depth": 3, "data": {"x": 1}}
    assert parse("depth=3").fits({"config": config})
    assert not parse("depth=24").fits({"config": config})  # the whole name is there
    assert parse("model.depth=24").fits({"config": config})
    assert not parse("epth=3").fits({"config": config})
    assert not parse("lr>0").fits({"config": "{broken"})


@pytest.mark.parametrize(
    ("text", "value"), [("3e-4", 3e-4), ("7B", 7e9), ("1.5k", 1500.0), (".5", 0.5), ("x", None), ("1e", None)]
)
def test_numbers_as_people_write_them(text: str, value: float | None) -> None:
    assert number(text) == value


def test_terms_say_what_they_are() -> None:
    first, second = parse('-tag:a,"b c" two').terms
    assert (first.key, first.sign, first.values, first.wanted) == ("tag", ":", ("a", "b c"), False)
    assert (second.key, second.values, second.wanted) == ("", ("two",), True)
