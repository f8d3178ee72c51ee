"""Margins that are worked out instead of measured."""

from __future__ import annotations

from typing import Any

import pytest

from layerwatch.dashboard.figures.margins import framed, text_width


def margin(data: list[dict[str, Any]] | None = None, **layout: Any) -> dict[str, float]:
    return framed({"data": data or [], "layout": layout})["layout"]["margin"]


def test_long_names_get_room_and_short_ones_do_not_take_it() -> None:
    names = ["encoder.layers.10.attention.query.weight", "head"]
    long = margin(yaxis={"type": "category", "categoryarray": names})
    short = margin(yaxis={"type": "category", "categoryarray": ["head"]})
    assert long["l"] >= text_width(names[0])
    assert short["l"] < 0.3 * long["l"]
    assert short["r"] == 12


def test_names_never_take_the_whole_figure() -> None:
    assert margin(yaxis={"type": "category", "categoryarray": ["n" * 10_000]})["l"] < 300


def test_what_is_written_counts_not_what_it_stands_for() -> None:
    axis = {"tickvals": ["a" * 80], "ticktext": ["a…"], "type": "category", "categoryarray": ["a" * 80]}
    assert margin(yaxis=axis)["l"] < 40


def test_numbers_get_room_by_their_digits() -> None:
    def of(low: float, high: float, **axis: Any) -> float:
        trace = {"x": [0, 1], "y": [low, high]}
        return margin([trace], xaxis={}, yaxis=axis)["l"]

    assert of(0, 1) == of(0, 3)
    assert of(0.0001, 0.0002) > of(0, 1)
    assert of(-54321, 12345) > of(0, 1)
    assert of(0, 1, title={"text": "loss"}) > of(0, 1) + 20
    assert of(0, 1, tickformat=".0%") >= of(0, 1) - 5


@pytest.mark.parametrize("values", [[], [None, float("nan")], ["a"], [5.0, 5.0], [1e300, -1e300]])
def test_any_values_will_do(values: list[Any]) -> None:
    assert 30 < margin([{"x": [1] * len(values), "y": values}], yaxis={}, xaxis={})["l"] < 120


def test_inner_panels_take_no_margin() -> None:
    names = {"type": "category", "categoryarray": ["n" * 60]}
    assert margin(xaxis={"domain": [0.5, 1]}, yaxis=names | {"anchor": "x"})["l"] == 8
    assert margin(xaxis={"anchor": "y2"}, yaxis2={"domain": [0.6, 1], "visible": False})["b"] == 8


def test_sides_and_titles_and_dates() -> None:
    assert margin(yaxis={"side": "right"}, xaxis={"visible": False})["r"] > 30
    assert margin(xaxis={"title": {"text": "optimizer step"}})["b"] > margin(xaxis={})["b"] + 15
    assert margin(xaxis={"type": "date"})["b"] > margin(xaxis={})["b"] + 10
    assert margin(xaxis={}, margin={"b": 90, "t": 0}) == {"l": 8, "r": 12, "t": 0, "b": 90}


def test_marks_of_the_text_have_no_width() -> None:
    assert text_width("10<sup>−4</sup>") < text_width("10−4") < text_width("10000")
    assert text_width("a &amp; b") == text_width("a & b")
