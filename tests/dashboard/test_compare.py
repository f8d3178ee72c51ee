"""The Compare page without a browser: its numbers against slow twins, its words against known runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from layerwatch.dashboard.figures import compare as figure_of
from layerwatch.dashboard.figures.cells import values_of
from layerwatch.dashboard.figures.histogram import density
from layerwatch.dashboard.figures.theme import DARK, LIGHT
from layerwatch.dashboard.pages import compare_facts, compare_tables
from layerwatch.dashboard.pages.compare_facts import chosen, pair_of
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.shell import open_page
from layerwatch.dashboard.urls import View
from layerwatch.monitor import LogWriter
from layerwatch.monitor.comparing import differences, matching_note, parting_sentence, settings
from layerwatch.monitor.results import Ending, direction, ending
from tests.dashboard.made_runs import (
    HOSTILE,
    LAST_EQUAL,
    LAYERS,
    PARTS_AT,
    STEPS,
    drift_of,
    write_run,
    write_runs,
)
from tests.dashboard.made_runs import values_of as logged
from tests.dashboard.test_pages import SCREENS, controls, figures, text, walk

CSS = Path(figure_of.__file__).parents[1] / "assets" / "compare.css"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return Library(write_runs(tmp_path_factory.mktemp("made")))


def drawn(library: Library, **params: str) -> dict[str, Any]:
    return figures(library, "compare", "base", SCREENS[0], **params)


def sentence(library: Library, a: str, b: str) -> str:
    found, _ = compare_facts.parting(library, library.run(a), library.run(b))
    return parting_sentence(found, a, b)


# Which runs -------------------------------------------------------------------------------------------------


def test_the_runs_come_from_the_address_and_unknown_ones_are_named(made: Library) -> None:
    assert chosen("twin,gone,base,twin", made, "base") == (["base", "twin"], ["gone"])
    assert chosen(["other", "twin"], made, "base")[0] == ["base", "other", "twin"]
    assert chosen(None, made, "base") == (["base"], [])
    assert pair_of(["a", "b", "c"], "c", "b") == ("c", "b")
    assert pair_of(["a", "b", "c"], "b", "b") == ("b", "a")
    assert pair_of(["a", "b"], "x", "") == ("a", "b")
    _, _, body = open_page(made, View("compare", "base", {"with": "twin,gone"}), {})
    assert "There is no run named gone" in text(body)
    assert controls(body)["with"] == ["twin"]


def test_a_name_with_a_comma_is_one_run(tmp_path: Path) -> None:
    for name in ("base", "a,b"):
        write_run(tmp_path, name)
    assert chosen("a,b", Library(tmp_path), "base") == (["base", "a,b"], [])


def test_no_more_than_eight_runs(made: Library) -> None:
    class Many:
        def runs(self) -> dict[str, None]:
            return dict.fromkeys([f"r{i}" for i in range(20)])

    names, unknown = chosen([f"r{i}" for i in range(20)], Many(), "r3")  # pyright: ignore[reportArgumentType]
    assert names == ["r3", "r0", "r1", "r2", "r4", "r5", "r6", "r7"]
    assert unknown == []


@pytest.mark.parametrize("palette", [LIGHT, DARK], ids=["light", "dark"])
def test_every_run_has_a_colour_of_its_own_the_same_in_plots_and_tables(palette: Any) -> None:
    runs = [f"run {i}" for i in range(8)]
    colors = figure_of.colors_of(runs, palette)
    assert len(set(colors.values())) == 8
    css = CSS.read_text(encoding="utf-8").splitlines()[1 if palette is LIGHT else 2]
    for place, run in enumerate(runs, start=1):
        assert f"--run-{place}: {colors[run]};" in css


# Curves -----------------------------------------------------------------------------------------------------


def test_curves_are_those_of_the_log_and_say_whose_they_are(made: Library) -> None:
    params = {"with": f"twin,{HOSTILE}", "scalar": "accuracy", "smoothing": "0.5"}
    traces = drawn(made, **params)["compare-plot"]["data"]
    names = ["base", "twin", HOSTILE]
    assert [trace["meta"]["run"] for trace in traces] == [name for name in names for _ in range(2)]
    for trace, name in zip(traces[::2], names, strict=True):
        frame = made.run(name).scalars("accuracy")
        assert trace["x"] == frame["step"].tolist()
        np.testing.assert_allclose(trace["y"], frame["value"])
    assert traces[-1]["name"] == "&lt;img src=x onerror=window.hacked=1&gt;"
    assert traces[1]["line"]["color"] != traces[3]["line"]["color"]


def test_all_scalars_are_drawn_only_when_asked_for(made: Library) -> None:
    assert "Choose All" in drawn(made, **{"with": "twin"})["compare-scalars"]["layout"]["meta"]["said"]
    figure = drawn(made, **{"with": "twin", "show": "all"})["compare-scalars"]
    assert [note["text"] for note in figure["layout"]["annotations"]] == ["train_loss", "accuracy"]
    assert len(figure["data"]) == 4


def test_without_scalars_there_are_words(tmp_path: Path) -> None:
    for name in ("base", "b"):
        LogWriter(tmp_path / name, {"name": name, "tensors": [], "modules": []}).close()
    library = Library(tmp_path)
    found = drawn(library, **{"with": "b"})
    assert "logged" in found["compare-plot"]["layout"]["meta"]["said"]
    assert "no layer of one name" in found["compare-gradient"]["layout"]["meta"]["said"]
    assert "None of these runs" in text([compare_tables.values_table(library, ["base", "b"])[0]])
    assert "cannot be said" in sentence(library, "base", "b")


# Tables -----------------------------------------------------------------------------------------------------


def test_only_what_differs_is_shown(library: Library, made: Library) -> None:
    rows, same = differences([settings(library.run(name)) for name in ("healthy", "vanishing")])
    assert ("config.lr", "0.1", "0.05") in rows
    assert same > 0
    assert all(one != two for _, one, two in rows)
    three, _ = differences([settings(made.run(name)) for name in ("base", "twin", "other")])
    assert {key: values for key, *values in three}["config.depth"] == ["3", "3", "9"]
    table, note, _ = compare_tables.settings_table(made, ["base", "twin", "other"])
    changed = [item.children for item in walk(table) if getattr(item, "className", "") == "changed"]
    assert "9" in changed
    assert "3" not in changed
    assert "are the same in all" in note


def test_endings_are_the_last_and_the_best_values(made: Library) -> None:
    last = STEPS[-1]
    assert ending(made.run("base"), "train_loss") == Ending(1 / (1 + last), 1 / (1 + last), last)
    assert ending(made.run("base"), "accuracy") == Ending(last / 200, last / 200, last)
    assert ending(made.run("base"), "nothing") == Ending(None)
    assert [direction(name) for name in ("val_loss", "eval/acc", "lr", "map", "bitmap")] == [-1, 1, 0, 1, 0]
    assert compare_tables.best_of("val_loss", [Ending(2.0, 1.0, 3), Ending(1.5, 1.5, 4), Ending(None)]) == [0]
    assert compare_tables.best_of("val_accuracy", [Ending(0.1, 0.1, 3), Ending(0.4, 0.5, 4)]) == [1]
    assert compare_tables.best_of("val_loss", [Ending(1.0, 1.0, 3), Ending(1.0, 1.0, 4)]) == []
    assert compare_tables.best_of("lr", [Ending(1.0), Ending(2.0)]) == []


# Where they part --------------------------------------------------------------------------------------------


def test_parting_is_said_with_step_layer_and_numbers(made: Library) -> None:
    norm = np.linalg.norm(logged(PARTS_AT, LAYERS[1], "gradient"))
    said = sentence(made, "base", "twin")
    assert said.startswith(
        f"base and twin are identical until step {LAST_EQUAL}. They part at step {PARTS_AT}, in {LAYERS[1]}"
    )
    assert f"({norm:.3g} against {3 * norm * (1 + 1e-9):.3g})" in said
    assert "gradient norm" in said


def test_identical_different_and_incomparable_runs_are_called_so(made: Library) -> None:
    assert "are identical: every weight norm" in sentence(made, "base", HOSTILE)
    assert "cannot be said" in sentence(made, "base", "other")
    shifted = sentence(made, "base", "shifted")
    assert shifted.startswith("base and shifted differ from the first common capture on.")
    _, both = compare_facts.parting(made, made.run("base"), made.run("shifted"))
    assert "nearest pairs" in matching_note(both, "base", "shifted")
    _, both = compare_facts.parting(made, made.run("base"), made.run(HOSTILE))
    note = matching_note(both, "base", "bad")
    assert note.startswith("3 layers are in both. Only in bad: ")


# A against B ------------------------------------------------------------------------------------------------


def test_the_maps_are_the_differences_of_the_logs(made: Library) -> None:
    found = drawn(made, **{"with": "twin"})
    trace = found["compare-gradient"]["data"][0]
    assert (trace["y"], trace["x"]) == (list(LAYERS), list(STEPS))
    expected = np.zeros((3, len(STEPS)))
    expected[1, [step >= PARTS_AT for step in STEPS]] = -np.log10(3)
    np.testing.assert_allclose(values_of(trace), expected, atol=2e-3)
    moved = np.array(
        [[_relative(step, layer) - _relative(2 * step, layer) for step in STEPS] for layer in LAYERS]
    )
    np.testing.assert_allclose(values_of(found["compare-drift"]["data"][0]), moved, atol=1e-3)
    swapped = drawn(made, **{"with": "twin", "one": "twin", "two": "base"})["compare-gradient"]["data"][0]
    np.testing.assert_allclose(values_of(swapped), -expected, atol=2e-3)
    assert swapped["colorscale"] == [
        trace["colorscale"][i][:1] + trace["colorscale"][2 - i][1:] for i in range(3)
    ]


def _relative(step: int, layer: str) -> float:
    summary = drift_of(step, layer)
    return float(np.sqrt(summary.sum_sq / (summary.ref_sum_sq or np.nan)))


def test_maps_of_what_cannot_be_matched_say_why(made: Library) -> None:
    said = drawn(made, **{"with": "other"})["compare-gradient"]["layout"]["meta"]["said"]
    assert "base and other have no layer of one name" in said


@given(st.integers(0, 2**32 - 1), st.integers(1, 900), st.integers(1, 30), st.booleans())
def test_pooled_cells_hold_the_largest_difference_with_its_sign(
    seed: int, long: int, short: int, tall: bool
) -> None:
    rng = np.random.default_rng(seed)
    rows, columns = (long, short) if tall else (short, long)
    values = np.where(rng.random((rows, columns)) < 0.3, np.nan, rng.normal(size=(rows, columns)))
    names, at, pooled = figure_of.pool([str(i) for i in range(rows)], np.arange(columns), values)
    assert len(names) == len(pooled) <= figure_of.ROWS
    assert len(at) == pooled.shape[1] <= figure_of.COLUMNS
    high, wide = -(-rows // len(names)), int(at[1]) if len(at) > 1 else columns
    for i in range(len(names)):
        for j in range(len(at)):
            part = values[i * high : (i + 1) * high, j * wide : (j + 1) * wide]
            known = part[~np.isnan(part)]
            if not len(known):
                assert np.isnan(pooled[i, j])
            else:
                assert pooled[i, j] == known[np.abs(known).argmax()]


def test_histograms_of_runs_lie_over_each_other(made: Library) -> None:
    params = {"with": "twin,other", "tensor": LAYERS[1], "kind": "gradient", "at": "187"}
    traces = drawn(made, **params)["compare-histogram"]["data"]
    assert [trace["meta"]["run"] for trace in traces] == ["base", "twin"]
    assert traces[0]["name"] == "base, step 180"
    parts = [
        made.run(name).histogram("gradient", LAYERS[1], 180).assign(step=i)
        for i, name in enumerate(("base", "twin"))
    ]
    _, _, shares = density(pd.concat(parts))
    for trace, column in zip(traces, shares.T, strict=True):
        np.testing.assert_allclose(trace["y"], column, rtol=1e-5, atol=1e-12)


def test_a_page_without_a_second_run_says_so(tmp_path: Path) -> None:
    write_run(tmp_path, "base")
    _, _, body = open_page(Library(tmp_path), View("compare", "base"), {})
    assert "Only one run" in text(body)


def test_the_first_layer_offered_is_one_that_all_runs_have(made: Library) -> None:
    _, _, body = open_page(made, View("compare", "other", {"with": HOSTILE}), {})
    assert controls(body)["tensor"] == f"{HOSTILE}.weight"
