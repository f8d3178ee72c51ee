"""The maps of Gradient flow and Drift: cells, pooling, quantities against a slow twin."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import peft
import pytest
import torch

from layerwatch.dashboard import drifting, quantities
from layerwatch.dashboard.figures import cells, depth, grid, layermap
from layerwatch.dashboard.figures.theme import Style
from layerwatch.dashboard.pages import drift, gradient_flow
from layerwatch.dashboard.plots import Scene
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.urls import View
from layerwatch.hooks import watch
from layerwatch.monitor import Run

RANDOM = np.random.default_rng(0)


@pytest.mark.parametrize("each", [False, True])
@pytest.mark.parametrize("log", [False, True])
def test_cells_give_back_what_they_were_made_of(log: bool, each: bool) -> None:
    values = 10 ** RANDOM.normal(-4, 2, (7, 30))
    trace = cells.cells(values, log=log, what="gradient norm", unit=" %", each=each)
    got = cells.values_of(trace)
    close = np.allclose(got, values, rtol=2e-3) if log else np.abs(got - values).max() < values.max() / 1e4
    assert close
    with_gap = values.copy()
    with_gap[2, 3], with_gap[4, 4] = np.nan, np.inf
    trace = cells.cells(with_gap, log=log, what="x", each=each)
    assert trace["z"]["dtype"] == "f4"  # int16 has no empty cell
    assert np.argwhere(np.isnan(cells.values_of(trace))).tolist() == [[2, 3], [4, 4]]
    assert trace["meta"]["log"] is log


def test_cells_take_two_bytes_unless_an_outlier_would_hide_the_others() -> None:
    values = RANDOM.random((5, 40))
    assert cells.cells(values, log=False, what="x")["z"]["dtype"] == "i2"
    values[0, 0] = 1e6
    spiked = cells.cells(values, log=False, what="x")
    assert spiked["z"]["dtype"] == "f4"
    assert np.allclose(cells.values_of(spiked), values, rtol=1e-6)


def test_cells_of_one_value_and_of_zeros() -> None:
    for value in (0.0, 0.3, -7.0, 1e-30):
        trace = cells.cells(np.full((2, 3), value), log=False, what="x")
        assert trace["z"]["dtype"] == "i2"
        assert np.allclose(cells.values_of(trace), value, rtol=1e-3, atol=0)
    trace = cells.cells(np.array([[0.0, 0.7, 0.1], [0.0, 0.2, 0.9]]), log=False, what="x")
    assert (cells.values_of(trace)[:, 0] == 0).all()  # zero stays exactly zero


def test_old_cells_stay_when_a_run_grows() -> None:
    values = 10 ** RANDOM.normal(-3, 1, (5, 60))
    before, after = (cells.cells(values[:, :n], log=True, what="x") for n in (50, 51))
    assert before["meta"] == after["meta"]


def test_limits_in_cells() -> None:
    values = 10 ** RANDOM.normal(-3, 1, (5, 60))
    trace = cells.cells(values, log=True, what="x")
    z = cells.to_z(trace["meta"], -3.0)
    assert trace["meta"]["offset"] + trace["meta"]["factor"] * z == pytest.approx(-3)


# Pooling ----------------------------------------------------------------------------------------------------


def made(rows: int, columns: int, seed: int = 0) -> grid.Grid:
    values = 10 ** np.random.default_rng(seed).normal(-3, 1, (rows, columns))
    steps = np.arange(columns) * 10
    return grid.Grid([f"b.{i}.w" for i in range(rows)], steps, values, np.zeros((rows, columns), bool))


def test_no_spike_and_no_red_cell_is_lost_by_pooling() -> None:
    whole = made(1000, 3000)
    whole.values[637, 2111] = 1e9
    whole.bad[12, 7] = True
    small = grid.pool(whole)
    assert small.values.shape[0] <= grid.MAX_ROWS
    assert grid.MAX_COLUMNS / 2 < small.values.shape[1] <= grid.MAX_COLUMNS
    row, column = np.unravel_index(np.nanargmax(small.values), small.values.shape)
    assert small.values[row, column] == 1e9
    assert small.names[row] == "b.636.w … b.638.w"
    assert small.steps[column] <= 21110 < small.steps[column + 1]
    assert np.argwhere(small.bad).tolist() == [[4, 0]]
    for i, name in enumerate(small.names):  # the plain definition
        part = whole.values[i * small.width : (i + 1) * small.width]
        assert name.startswith(whole.names[i * small.width])
        assert small.values[i].max() == part.max()


def test_a_run_that_grows_changes_its_last_column_only() -> None:
    whole = made(5, 2000)
    for first in (0, 37):
        for count in (601, 1100, 1999):
            before = grid.pool(replace(grid_until(whole, count), first=first))
            after = grid.pool(replace(grid_until(whole, count + 1), first=first))
            kept = len(before.steps) - 1
            assert before.steps[:kept].tolist() == after.steps[:kept].tolist()
            np.testing.assert_array_equal(before.values[:, :kept], after.values[:, :kept])


def grid_until(whole: grid.Grid, count: int) -> grid.Grid:
    return replace(whole, steps=whole.steps[:count], values=whole.values[:, :count], bad=whole.bad[:, :count])


def test_a_part_is_pooled_in_the_bins_of_the_whole() -> None:
    whole = made(2, 4096)
    part = whole.between((10_007, 40_000))
    assert part.first == 1000
    assert set(grid.pool(part).steps[1:]) <= set(whole.steps[::8])


def test_rows_are_aligned_by_name() -> None:
    other = made(3, 4).aligned(["b.2.w", "new", "b.0.w"])
    np.testing.assert_array_equal(other.values[[0, 2]], made(3, 4).values[[2, 0]])
    assert np.isnan(other.values[1]).all()


# Slope ------------------------------------------------------------------------------------------------------


def test_the_slope_is_the_median_of_all_pairs() -> None:
    values = 10.0 ** (-0.5 * np.arange(12))
    values[5] = 1e12  # one layer that is far off
    values[8] = np.nan
    x = np.flatnonzero(np.isfinite(values))
    y = np.log10(values[x])
    twin = np.median([(y[j] - y[i]) / (x[j] - x[i]) for i in range(len(x)) for j in range(i + 1, len(x))])
    found = depth.slope(values)
    assert found.per_layer == pytest.approx(twin)
    assert found.per_layer == pytest.approx(-0.5)


def test_a_slope_is_named_by_its_direction() -> None:
    falling = depth.slope(10.0 ** (-0.5 * np.arange(12)))
    assert "shrinks from input to output by 0.5 decades a layer" in depth.slope_sentence(
        falling, "x", 7, False
    )
    assert depth.slope_sentence(falling, "x", 7, False).endswith("vanishing.")
    assert "grows from output to input" in depth.slope_sentence(falling, "x", 7, True)
    scattered = 10.0 ** np.array([4, 0, 7, 2, 8, 1, 5, 3, 6])
    for calm in (
        np.ones(12),
        np.array([1.0, 1e9]),
        np.array([1.0, 2.0, 1.0, 2.0, 1.5]),
        np.array([]),
        scattered,
    ):
        assert depth.slope_sentence(depth.slope(calm), "x", 7, False) == ""


def test_expected_scales_of_weights() -> None:
    assert depth.he((64, 32)) == pytest.approx((2 / 32) ** 0.5)
    assert depth.he((64, 3, 5, 5)) == pytest.approx((2 / 75) ** 0.5)
    assert depth.xavier((64, 32)) == pytest.approx((2 / 96) ** 0.5)
    assert np.isnan(depth.he((64,)))


# Figures ----------------------------------------------------------------------------------------------------


def test_a_map_of_a_thousand_layers_stays_readable() -> None:
    names = [f"transformer.h.{i // 8}.mlp.part{i % 8}.weight" for i in range(1000)]
    whole = replace(made(1000, 50), names=names)
    figure = layermap.layer_map(whole, "gradient norm", Style(), against=0)
    heat, axis = figure["data"][0], figure["layout"]["yaxis"]
    assert len(heat["y"]) == len(set(heat["y"])) <= grid.MAX_ROWS
    assert len(axis["tickvals"]) <= layermap.LABELS
    assert set(axis["tickvals"]) <= set(heat["y"])
    assert axis["ticktext"][0] == "transformer.h.0"
    assert heat["meta"]["layers"] == names
    assert heat["meta"]["width"] == 3
    assert layermap.height(1000) <= 760
    at, against = figure["data"][-1], figure["data"][-2]
    assert [len(at["x"]), len(against["x"])] == [len(heat["y"])] * 2
    assert at["x"][0] == pytest.approx(whole.values[:3, -1].max(), rel=1e-3)
    few = layermap.layer_map(whole.rows(list(range(24))), "x", Style())
    assert len(few["layout"]["yaxis"]["tickvals"]) == 24
    assert len([s for s in few["layout"]["shapes"] if s["yref"] == "y"]) == 2  # between three blocks


def test_hostile_names_are_text() -> None:
    names = ["<img src=x onerror=alert(1)>", "a" * 10_000, "‮evil", "🔥.weight", "&lt;b&gt;", "4"]
    whole = replace(made(6, 3), names=names)
    figure = layermap.layer_map(whole, "x", Style())
    shown = figure["layout"]["yaxis"]["ticktext"]
    assert not any("<" in text for text in shown)
    assert shown[4] == "&amp;lt;b&amp;gt;"
    assert all(len(text) < 60 for text in shown)
    assert figure["data"][0]["y"] == names
    assert grid.matching(names, "(a+)+$")[0] == [1]


@pytest.mark.parametrize("colors", ["robust", "full", "layer"])
@pytest.mark.parametrize("log", [False, True])
def test_colours_span_what_they_promise(colors: str, log: bool) -> None:
    whole = made(20, 50)
    whole.values[3, 3] = 1e5
    heat = layermap.layer_map(whole, "x", Style(), log=log, colors=colors)["data"][0]
    np.testing.assert_allclose(cells.values_of(heat), whole.values, rtol=3e-3, atol=0 if log else 1)
    if colors == "layer":
        assert (heat["zmin"], heat["zmax"]) == (cells.LOW, cells.HIGH)
        return
    meta = heat["meta"]
    low, high = (meta["offset"] + meta["factor"] * heat[key] for key in ("zmin", "zmax"))
    values = np.log10(whole.values) if log else whole.values
    wanted = np.percentile(values, (2, 98)) if colors == "robust" else (values.min(), values.max())
    np.testing.assert_allclose((low, high), wanted)


# Pages ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["healthy", "vanishing", "nested/blow-up"])
def test_quantities_are_those_of_the_log(library: Library, name: str) -> None:
    run = library.run(name)
    twins = {
        "gradient_norm": run.stats("gradient").eval("norm"),
        "gradient_rms": run.stats("gradient").eval("rms"),
        "update_ratio": run.stats("update").eval("ratio"),
        "weight_norm": run.stats("weight").eval("norm"),
        "activation_rms": run.stats("activation").eval("rms"),
        "zeros": run.stats("gradient").eval("zeros / count"),
        "nonfinite": run.stats("gradient").eval("(nans + infs) / count"),
        "lost_share": run.stats("update").eval("lost / count"),
        "dead_units": run.stats("activation").eval("1 - active_units / units"),
        "decay_share": run.stats("update")["along"].clip(upper=0) ** 2,
        "gradient_share": run.stats("gradient")["norm"] / run.stats("weight")["norm"],
    }
    for key, values in twins.items():
        quantity = quantities.QUANTITIES[key]
        stats = run.stats(quantity.kind)
        nothing = (stats["nans"] + stats["infs"] == stats["count"]) & quantity.log  # of no finite element
        rows = stats[["tensor", "step"]].assign(value=values.where(~nothing).to_numpy(float))
        table = rows.pivot_table(
            index="tensor", columns="step", values="value", sort=False, dropna=False, aggfunc="first"
        )
        got = quantities.read(library, run, key)
        wanted = table.to_numpy(float)
        finite = np.isfinite(wanted)
        assert got.names == list(table.index), key
        assert got.steps.tolist() == list(table.columns), key
        np.testing.assert_allclose(got.values[finite], wanted[finite], rtol=1e-6, atol=1e-12, err_msg=key)
        assert not np.isfinite(got.values[~finite]).any(), key


def test_a_zoom_reads_again_only_where_the_log_holds_more(library: Library) -> None:
    run = library.run("healthy")
    whole = quantities.read(library, run, "gradient_norm")
    assert not whole.coarse
    assert quantities.read(library, run, "gradient_norm", (10, 20)) is whole


def test_what_a_run_does_not_hold_is_disabled_with_the_reason(library: Library) -> None:
    view = View("gradient-flow", "healthy")
    _, control = gradient_flow.metric_choice(view, library.run("healthy")).children  # pyright: ignore[reportGeneralTypeIssues]
    items = {item["value"]: item for group in control.data for item in group["items"]}
    assert items.keys() == quantities.QUANTITIES.keys()
    assert not items["gradient_norm"]["disabled"]
    assert items["attention_entropy"] == {
        "value": "attention_entropy",
        "label": "Attention entropy: no attention was seen",
        "disabled": True,
    }


def scene(library: Library, name: str, **values: Any) -> Scene:
    return Scene(library, name, library.run(name), Style(), values)


def said(figure: dict[str, Any]) -> str:
    return figure["layout"].get("meta", {}).get("said", "")


def test_roles_and_filters_choose_rows(library: Library) -> None:
    def rows(**values: Any) -> list[str]:
        return gradient_flow.draw(scene(library, "vanishing", **values))["data"][0]["y"]

    weights = rows(role="matrix")
    assert len(weights) == 10
    assert all(name.endswith("weight") for name in weights)
    assert len(rows(role="bias")) == 10
    assert rows(role="matrix", filter=r"^0\.") == ["0.weight"]
    assert len(rows(metric="activation_rms", role="matrix")) == 19  # modules have no role
    assert "No layer of the biases matches" in said(
        gradient_flow.draw(scene(library, "vanishing", role="bias", filter="weight"))
    )
    assert "attention" in said(gradient_flow.draw(scene(library, "vanishing", metric="attention_logit")))


def test_the_page_names_the_slope(library: Library) -> None:
    run = library.run("vanishing")
    note, slope = gradient_flow.notes(library, run, {})
    assert note.endswith("20 layers.")
    assert "gradient norm shrinks from output to input" in slope
    assert gradient_flow.notes(library, library.run("healthy"), {})[1] == ""
    assert "10 of 20 layers" in gradient_flow.notes(library, run, {"role": "bias"})[0]
    assert "not a regular expression" in gradient_flow.notes(library, run, {"filter": "("})[0]


def test_reference_lines_of_weights(library: Library) -> None:
    run = library.run("healthy")
    he, xavier = quantities.guides(run, "weight_norm", ["0.weight", "0.bias"])
    assert he.values[0] == pytest.approx(np.sqrt(2 / 12 * 16 * 12))
    assert xavier.values[0] == pytest.approx(np.sqrt(2 / 28 * 16 * 12))
    assert np.isnan(he.values[1])
    assert quantities.guides(run, "update_ratio", ["a"])[0].values.tolist() == [1e-3]
    assert quantities.guides(run, "gradient_norm", ["a"]) == []


def test_profiles_at_two_steps(library: Library) -> None:
    run = library.run("healthy")
    norms = run.stats("gradient").pivot_table(index="tensor", columns="step", values="norm", sort=False)
    drawn = gradient_flow.draw(scene(library, "healthy", at="20", against="5"))["data"]
    named = {trace["name"]: trace["x"] for trace in drawn}
    np.testing.assert_allclose(named["at step 20"], norms[20], rtol=1e-3)
    np.testing.assert_allclose(named["at step 5"], norms[5], rtol=1e-3)
    drawn = gradient_flow.draw(scene(library, "healthy"))["data"]
    assert [trace["name"] for trace in drawn[-2:]] == ["at step 0", "at step 59"]


def test_drift_by_layer_block_and_role(library: Library) -> None:
    run = library.run("healthy")
    frame = run.drift()
    last = frame[frame["step"] == 59].set_index("tensor")
    got = drifting.read(library, run, "relative_l2", "reference", "layer")
    np.testing.assert_allclose(got.values[:, -1], last["relative_l2"], rtol=1e-12)
    block = last.loc[["0.weight", "0.bias"]]
    wanted = np.sqrt((block["distance"] ** 2).sum() / (block["reference_norm"] ** 2).sum())
    blocks = drifting.read(library, run, "relative_l2", "reference", "block")
    assert blocks.names == ["0", "2", "4"]
    assert blocks.values[0, -1] == pytest.approx(wanted)
    flips = drifting.read(library, run, "flipped", "reference", "role")
    assert flips.names == ["matrix", "bias", "output"]
    bias = last.loc[["0.bias", "2.bias", "4.bias"]]
    assert flips.values[1, -1] == pytest.approx(bias["sign_flips"].sum() / bias["count"].sum())
    turned = drifting.read(library, run, "turned", "reference", "layer")
    np.testing.assert_allclose(turned.values[:, -1], 1 - last["cosine"])


def test_who_moved_most_among_its_like(library: Library) -> None:
    run = library.run("vanishing")
    got = drifting.read(library, run, "relative_l2", "reference", "layer")
    found = drifting.ranks(run, got, -1)
    roles = run.tensors().set_index("tensor")["role"]
    assert [rank.score for rank in found] == sorted((rank.score for rank in found), reverse=True)
    for rank in found[:5]:
        like = [i for i, name in enumerate(got.names) if roles[name] == rank.role and got.values[i, -1] > 0]
        x = np.log10(got.values[like, -1])
        middle = np.median(x)
        z = 0.6745 * (np.log10(rank.moved) - middle) / max(np.median(np.abs(x - middle)), 0.02)
        assert rank.score == pytest.approx(z)
    assert {rank.role for rank in found} == {"matrix", "bias"}  # one output layer has nobody to compare with
    sentence, ranked, none = drift.compared(library, run, {})
    assert "the last blocks" in sentence
    assert len(ranked) == drift.SHOWN
    assert none == ""


def test_frozen_layers_are_named(library: Library) -> None:
    still = drift.still_layers(library.run("finetune"))
    assert still["Frozen (requires_grad is off)"] == ["0.weight", "0.bias"]


def test_drift_between_anchors(tmp_path: Path) -> None:
    torch.manual_seed(0)
    first = torch.nn.Linear(8, 16)
    net = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Linear(16, 4))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    watcher = watch(net, optimizer, run=tmp_path / "run", every=1, anchors=[4, 9, 14])
    kept = {}
    for step in range(15):
        net(torch.randn(32, 8)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        kept[step] = first.weight.detach().numpy().astype(float).copy()
    watcher.close()
    library = Library(tmp_path)
    run = library.run("run")
    assert [value for value, _ in drifting.sources(run)] == ["reference", "initial", "4", "9"]
    got = drifting.read(library, run, "relative_l2", "4", "layer")
    assert got.steps.tolist() == [9, 14]
    wanted = [np.linalg.norm(kept[s] - kept[4]) / np.linalg.norm(kept[4]) for s in (9, 14)]
    np.testing.assert_allclose(got.values[0], wanted, rtol=1e-5)
    assert drifting.read(library, run, "relative_l2", "initial", "block").names == ["0", "2"]
    figure = drift.draw(scene(library, "run", **{"from": "4"}))
    assert figure["data"][0]["x"] == [9, 14]
    assert "signs" in said(drift.draw(scene(library, "run", **{"from": "4", "metric": "flipped"})))


def test_what_has_moved_does_not_stand_still(tmp_path: Path) -> None:
    """A frozen weight that an adapter moves, and a layer whose learning rate has decayed to zero."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
    model[0].bias.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for rate in (0.1, 0.0):
            optimizer.param_groups[0]["lr"] = rate
            model(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()
    assert drift.still_layers(Run(tmp_path / "run")) == {"Frozen (requires_grad is off)": ["0.bias"]}
    weights = torch.nn.Linear(4, 4, bias=False).requires_grad_(False)
    adapted = peft.get_peft_model(torch.nn.Sequential(weights), peft.LoraConfig(target_modules=["0"], r=2))
    optimizer = torch.optim.SGD([p for p in adapted.parameters() if p.requires_grad], lr=0.1)
    with watch(adapted, optimizer, run=tmp_path / "lora", every=1):
        for _ in range(2):
            adapted(torch.randn(8, 4)).square().sum().backward()
            optimizer.step()
    assert drift.still_layers(Run(tmp_path / "lora")) == {}
