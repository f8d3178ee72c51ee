"""Numbers, times and addresses as people read them."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwatch.dashboard.text import age, duration, number, rounded, share, short, words
from layerwatch.dashboard.urls import RUN_PAGES, View, fraction, href, parse, step_range


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (0, "0"), (0.031249, "0.0312"), (1.5, "1.5"), (999.4, "999"), (1234, "1,234"), (12345, "12.3k"),
        (5.1e6, "5.1M"), (3.2e-7, "3.2e-7"), (-0.25, "-0.25"), (1e20, "1e+20"), (999_999, "1M"),
        (math.nan, "NaN"), (None, "–"), (math.inf, "∞"), (np.float32(0.5), "0.5"), ("adam", "adam"),
    ],
)  # fmt: skip
def test_numbers_have_three_digits(value: object, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.5, "0.5 s"),
        (45, "45 s"),
        (200, "3 min 20 s"),
        (7500, "2 h 5 min"),
        (273600, "3 d 4 h"),
        (None, "–"),
    ],
)
def test_durations_have_two_units(seconds: float | None, shown: str) -> None:
    assert duration(seconds) == shown


def test_ages_shares_words_and_short_names() -> None:
    assert age(100.0, now=102.0) == "just now"
    assert age(100.0, now=400.0) == "5 min ago"
    assert share(0.0123) == "1.23 %"
    assert words("dead_units") == "Dead units"
    assert short("encoder.layer.11.attention.self.query.weight", 24) == "…self.query.weight"
    assert short("head.weight") == "head.weight"


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_rounding_for_the_browser_keeps_seven_digits(value: float) -> None:
    (shown,) = rounded(np.array([value]))
    assert shown == pytest.approx(value, rel=1e-6, abs=1e-290)


def test_what_is_not_finite_becomes_a_gap() -> None:
    assert rounded(np.array([1.0, np.nan, np.inf])) == [1.0, None, None]


@pytest.mark.parametrize("run", ["exp1", "group/exp 1", "ä/b%c", "overview", "a/overview", "100%", "x?y#z"])
@pytest.mark.parametrize("page", RUN_PAGES)
def test_an_address_leads_back_to_its_view(page: str, run: str) -> None:
    path, _, query = href(page, run, tensor="a.b/c d").partition("?")
    assert parse(path, "?" + query) == View(page, run, {"tensor": "a.b/c d"})


def test_short_addresses() -> None:
    assert parse("/") == View("runs")
    assert parse("/run/exp1") == View("overview", "exp1")
    assert parse("/run/exp1/") == View("overview", "exp1")
    assert parse("/other").page == "missing"
    assert href("runs") == "/"


@pytest.mark.parametrize("text", ["", None, "1", "a:b", "5:1", "nan:3", "1:inf", "1:2:3"])
def test_a_step_range_that_makes_no_sense_is_none(text: str | None) -> None:
    assert step_range(text) is None


def test_step_ranges_and_fractions() -> None:
    assert step_range("10:20") == (10.0, 20.0)
    assert fraction("0.5") == 0.5
    assert fraction("7") == 0.99
    assert fraction("x") == 0.0
    assert fraction("-1") == 0.0
