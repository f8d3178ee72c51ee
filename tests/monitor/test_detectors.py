"""Every detector on made-up histories: silent on healthy ones and their look-alikes, right on faulty ones."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from layerwatch.monitor.courses import courses
from layerwatch.monitor.detectors import Arrays, History, registered
from layerwatch.monitor.detectors.history import lasting, persistent
from layerwatch.monitor.detectors.outcome import outcome
from layerwatch.monitor.findings import Finding, judge
from layerwatch.monitor.normal import learn

N, LAYERS, UNITS = 200, 6, 32
DETECTORS = dict(registered()[0])


class Made:
    """A healthy training of six linear layers with ReLU, ten classes; tests change what they want to be
    wrong.
    """

    def __init__(self, every: int = 1, steps: int = N):
        rng = np.random.default_rng(0)
        self.every, self.steps = every, np.arange(0, steps, every)
        self.all = np.arange(steps)
        n = self.steps.size
        self.loss = 0.1 + 2.2 * np.exp(-self.all / 30) + 0.02 * rng.standard_normal(steps)
        self.val = 0.2 + 2.1 * np.exp(-self.all[19::20] / 30)
        self.lr = np.full(steps, 0.1)
        self.info: dict[str, Any] = {
            "reference": "start",
            "drift_limit": None,
            "optimizers": [{"class": "SGD", "groups": [{"lr": 0.1}]}],
        }
        self.extra: dict[str, tuple[Any, Any]] = {}
        self.layers = [
            {
                "tensor": f"{i}.{part}",
                "module": f"{i}",
                "role": role if part == "weight" else "bias",
                "shape": (
                    [UNITS if i < LAYERS - 1 else 10, UNITS]
                    if part == "weight"
                    else [UNITS if i < LAYERS - 1 else 10]
                ),
            }
            for i in range(LAYERS)
            for role in ("output" if i == LAYERS - 1 else "matrix",)
            for part in ("weight", "bias")
        ]
        self.leaves = [{"module": str(i), "type": "Linear"} for i in range(LAYERS)]
        self.leaves += [{"module": f"act{i}", "type": "ReLU"} for i in range(LAYERS - 1)]
        self.rows: dict[str, dict[str, dict[str, Any]]] = {
            k: {} for k in ("weight", "initial_weight", "gradient", "update", "activation", "drift")
        }
        ones, zeros = np.ones(n), np.zeros(n)
        falling = self.loss[self.steps] / self.loss[0]
        for entry in self.layers:
            name, count = entry["tensor"], int(np.prod(entry["shape"]))
            noise = np.exp(0.1 * rng.standard_normal(n))
            common = {
                "step": self.steps,
                "count": count * ones,
                "zeros": zeros.copy(),
                "nans": zeros.copy(),
                "infs": zeros.copy(),
                "skipped": zeros.astype(bool),
                "state": np.full(n, "trainable", object),
            }
            small = 0.05 if entry["role"] == "bias" else 0.5
            gradient = small * noise * falling
            self.rows["gradient"][name] = {
                **{k: v.copy() for k, v in common.items()},
                "norm": gradient,
                "rms": gradient / count**0.5,
                "std": gradient / count**0.5,
                "mean": zeros.copy(),
                "min": -gradient / 3,
                "max": gradient / 3,
                "p01": -gradient / 4,
                "p99": gradient / 4,
            }
            self.rows["weight"][name] = {
                **common,
                "norm": np.linspace(5, 8, n),
                "rms": np.linspace(5, 8, n) / count**0.5,
            }
            self.rows["initial_weight"][name] = {
                "step": [0],
                "norm": [5.0],
                "rms": [5.0 / count**0.5],
                "mean": [0.0],
                "std": [0.1],
                "min": [-0.17],
                "max": [0.17],
            }
            self.rows["update"][name] = {
                **{k: v.copy() for k, v in common.items()},
                "ratio": 0.005 * noise,
                "along": zeros.copy(),
                "lost": zeros.copy(),
                "norm": 0.03 * noise,
            }
            self.rows["drift"][name] = {"step": self.steps, "relative_l2": np.linspace(0, 1.2, n)}
        self.active = {}
        for leaf in self.leaves:
            self.rows["activation"][leaf["module"]] = {
                "step": self.steps,
                "mean": zeros.copy(),
                "std": 0.7 * ones,
                "rms": 0.7 * ones,
                "nans": zeros.copy(),
                "infs": zeros.copy(),
                "samples": 64 * ones,
                "count": 64 * UNITS * ones,
                "skipped": zeros.astype(bool),
            }
            if leaf["type"] == "ReLU":
                self.active["activation", leaf["module"]] = (self.steps, rng.random((n, UNITS)) < 0.6)
        for i in range(LAYERS):
            self.active["gradient", f"{i}.weight"] = (self.steps, rng.random((n, UNITS)) < 0.9)

    def without_activations(self) -> Made:
        self.rows["activation"] = {}
        self.active = {k: v for k, v in self.active.items() if k[0] == "gradient"}
        return self

    def history(self) -> History:
        losses: dict[str, tuple[Any, Any]] = {
            "train_loss": (self.all[: self.loss.size], self.loss),
            "val_loss": (self.all[19::20], self.val),
            "lr": (self.all, self.lr),
            **self.extra,
        }
        return History(
            Arrays(
                name="made",
                info=self.info,
                losses=losses,
                layers=self.layers,
                leaves=self.leaves,
                rows=self.rows,
                active=self.active,
            )
        )


def alarms(made: Made) -> list[Finding]:
    return [f for f in judge(made.history())[0] if f.alarm]


def only(made: Made, problem: str) -> Finding:
    """The one alarm, which must be of this problem."""
    found = alarms(made)
    assert [f.problem for f in found] == [problem]
    return found[0]


# ---- the contract of every detector


def one_capture() -> Made:
    return Made(steps=1)


def all_nan() -> Made:
    made = Made()
    made.loss[:] = np.nan
    made.val[:] = np.nan
    for kind in made.rows.values():
        for columns in kind.values():
            for name, values in columns.items():
                if isinstance(values, np.ndarray) and values.dtype == float and name not in ("count", "nans"):
                    values[:] = np.nan
            if "nans" in columns:
                columns["nans"][:] = columns["count"]
    return made


def no_rows() -> Made:
    made = Made()
    made.rows, made.active = {}, {}
    return made


def no_losses() -> Made:
    made = Made()
    made.loss, made.val = np.empty(0), np.empty(0)
    made.extra = {"train_loss": ([], []), "val_loss": ([], [])}
    return made


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("problem", DETECTORS)
def test_silent_on_a_healthy_history(problem: str, every: int) -> None:
    assert DETECTORS[problem](Made(every, steps=500).history()) is None
    assert DETECTORS[problem](Made(every, steps=500).without_activations().history()) is None


@pytest.mark.parametrize("make", [one_capture, all_nan, no_rows, no_losses, lambda: None])
def test_thin_and_broken_histories_neither_crash_nor_leave_json(make: Callable[[], Made | None]) -> None:
    made = make()
    found, notes = judge(made.history() if made else History(Arrays()))
    assert not [n for n in notes if "failed" in n]
    json.dumps([f.to_dict() for f in found], allow_nan=False)
    if make not in (all_nan,):
        assert [f for f in found if f.alarm] == []


@pytest.mark.parametrize("problem", DETECTORS)
def test_each_detector_says_what_it_tells_apart(problem: str) -> None:
    assert "Told apart" in " ".join((DETECTORS[problem].__doc__ or "").split()) or problem == "regression"


def test_persistence_is_about_consecutive_captures() -> None:
    assert persistent(np.array([True, True, False, True, True])) is None
    assert persistent(np.array([False, True, True, True, False])) == 1
    assert lasting(np.array([True, True, True, False])) is None
    assert lasting(np.array([False, True, True, True])) == 1


def test_all_nan_is_nonfinite_from_the_start() -> None:
    finding = next(f for f in alarms(all_nan()) if f.problem == "nonfinite")
    assert (finding.severity, finding.first_step) == ("critical", 0)


# ---- nonfinite


def test_nonfinite_names_the_first_module_and_step() -> None:
    made = Made()
    made.loss[120:] = np.nan
    for module in ("act2", "3", "act3", "4"):
        made.rows["activation"][module]["nans"][120:] = 5
    for entry in made.layers:
        made.rows["gradient"][entry["tensor"]]["nans"][120:] = 1
        made.rows["weight"][entry["tensor"]]["nans"][120:] = 1
    finding = only(made, "nonfinite")
    assert finding.first_step == 120
    assert finding.layers[0] == "3"  # in order of definition, which is how torch lists modules
    assert finding.severity == "critical"


def test_infinite_gradients_of_skipped_steps_and_masks_are_healthy() -> None:
    made = Made()
    for entry in made.layers:
        row = made.rows["gradient"][entry["tensor"]]
        row["infs"][[0, 1, 2, 100]] = 9
        row["skipped"] = np.isin(made.steps, [0, 1, 2, 100])
    made.rows["activation"]["0"]["infs"][:] = 10  # a mask of -inf
    assert alarms(made) == []


# ---- gradients


def test_exploding_leverage_is_found_at_its_first_step_and_layer() -> None:
    made = Made()
    made.rows["gradient"]["1.weight"]["norm"][50:] = 1e5
    made.loss[60:] = 5.0
    finding = only(made, "exploding_gradients")
    assert finding.layers[0] == "1.weight"
    assert finding.first_step == 50


def test_scaling_the_loss_changes_nothing() -> None:
    made = Made()
    made.loss *= 1e6
    made.val *= 1e6
    for row in made.rows["gradient"].values():
        for column in ("norm", "rms", "std", "min", "max", "p01", "p99"):
            row[column] *= 1e6
    assert alarms(made) == []


def vanishing(made: Made) -> Made:
    for i in range(LAYERS):
        made.rows["gradient"][f"{i}.weight"]["norm"] *= 10.0 ** (-1.2 * (LAYERS - 1 - i))
    return made


def test_vanishing_gradients_that_stall_the_loss_are_critical() -> None:
    made = vanishing(Made())
    made.loss[:] = 2.3 + 0.001 * np.sin(made.all)
    made.val[:] = 2.3
    finding = only(made, "vanishing_gradients")
    assert finding.severity == "critical"
    assert finding.layers[0] == "0.weight"


def test_small_first_gradients_that_adam_makes_up_for_are_healthy() -> None:
    assert alarms(vanishing(Made())) == []


def test_one_layer_with_little_gradient_is_no_trend() -> None:
    made = Made()
    made.rows["gradient"]["2.weight"]["norm"] *= 1e-6
    assert alarms(made) == []


def test_gradients_that_pile_up_are_stale() -> None:
    made = Made()
    size = np.minimum(0.1 * (1 + np.arange(N)), 15.0)
    row = made.rows["gradient"]["5.bias"]
    row["min"], row["max"], row["rms"] = -size, size, size / 3
    assert only(made, "stale_gradients").first_step <= 12


# ---- units


def test_dead_units_begin_where_they_fell_silent() -> None:
    made = Made()
    made.active["activation", "act1"][1][100:, :20] = False
    finding = only(made, "dead_units")
    assert finding.layers == ("act1",)
    assert finding.first_step == 100
    assert finding.severity == "warning"  # the loss still falls
    assert finding.evidence["dead_share"] == pytest.approx(20 / 32)


def test_sparse_layers_whose_units_take_turns_are_healthy() -> None:
    made = Made()
    _, active = made.active["activation", "act1"]
    active[:] = np.random.default_rng(1).random(active.shape) < 0.3
    assert alarms(made) == []


def test_dead_rows_without_activations_need_a_bad_outcome() -> None:
    made = Made().without_activations()
    made.active["gradient", "2.weight"][1][:, :24] = False
    assert alarms(made) == []
    made.loss[:] = 2.3 + 0.001 * np.sin(made.all)
    made.val[:] = 2.3
    finding = only(made, "dead_units")
    assert "activations were not captured" in finding.summary
    assert finding.confidence < 0.7


def test_gradients_that_repeat_themselves_are_stale_without_a_softmax() -> None:
    made = Made(every=5)
    rng = np.random.default_rng(3)
    for name, row in made.rows["gradient"].items():
        row["mean"] = rng.standard_normal(made.steps.size)
        row["norm"] = 0.5 * np.minimum(1 + made.steps, 12.0)
        row["std"] = row["rms"] = row["norm"] / made.rows["gradient"][name]["count"] ** 0.5
    assert alarms(made) == []  # gradients that grow, of fresh batches
    for row in made.rows["gradient"].values():
        row["mean"] = np.sin(made.steps / 30) * row["norm"]
    assert alarms(made) == []  # raw targets, epochs over one batch: they repeat, and the training works
    made.loss = made.loss[::-1].copy()
    finding = only(made, "stale_gradients")
    assert finding.confidence < 0.9
    assert float(finding.evidence["autocorrelation"]) > 0.5


def test_gradients_of_fresh_batches_that_explode_are_not_stale() -> None:
    """The few largest values have an autocorrelation of their own."""
    made = Made(every=5)
    rng = np.random.default_rng(3)
    for name, row in made.rows["gradient"].items():
        row["norm"] = 0.5 * np.minimum(1 + made.steps, 12.0)
        row["norm"][-8:] *= 1e4
        row["mean"] = (1 + 0.3 * rng.standard_normal(made.steps.size)) * row["norm"]
        row["std"] = row["rms"] = row["norm"] / made.rows["gradient"][name]["count"] ** 0.5
    made.loss = made.loss[::-1].copy()
    found = alarms(made)
    assert found
    assert "stale_gradients" not in [finding.problem for finding in found]


def test_training_targets_much_noisier_than_validation_are_a_data_fault() -> None:
    made = Made()
    made.loss = 1.7 + 0.6 * np.exp(-made.all / 30)
    made.val = 1.0 + 1.2 * np.exp(-made.all[19::20] / 30)
    assert only(made, "data_fault").confidence <= 0.5
    made.val = made.val + 0.5  # validation as noisy as training
    assert alarms(made) == []


def test_equal_bias_gradients_are_copies() -> None:
    made = Made()
    for i in (1, 2):
        made.rows["gradient"][f"{i}.bias"]["std"][:] = 1e-9
    assert only(made, "symmetric_units").layers == ("1.weight", "2.weight")


def test_units_that_differ_after_the_first_steps_are_healthy() -> None:
    made = Made()
    made.rows["gradient"]["1.bias"]["std"][:5] = 1e-9
    assert alarms(made) == []


def test_saturated_tanh_from_the_start() -> None:
    made = Made()
    for leaf in made.leaves:
        leaf["type"] = {"ReLU": "Tanh"}.get(leaf["type"], leaf["type"])
    assert alarms(made) == []
    for module in ("act0", "act1", "act2"):
        made.rows["activation"][module]["std"][:] = 0.97
    assert only(made, "saturated_units").layers[0] == "act0"


# ---- parameters


def test_a_parameter_without_gradient_is_unused() -> None:
    made = Made()
    del made.rows["gradient"]["2.weight"], made.rows["gradient"]["2.bias"]
    for name in ("2.weight", "2.bias"):
        made.rows["weight"][name]["state"] = np.full(N, "unused", object)
    finding = only(made, "unused_parameters")
    assert finding.layers == ("2.weight", "2.bias")


def test_one_gradient_is_enough_and_frozen_on_purpose_is_healthy() -> None:
    made = Made()
    state = np.full(N, "unused", object)
    state[150] = "trainable"  # a branch that is used now and then
    made.rows["weight"]["2.weight"]["state"] = state
    made.layers[0]["trainable"] = False
    made.rows["weight"]["0.weight"]["state"] = np.full(N, "frozen", object)
    del made.rows["gradient"]["0.weight"], made.rows["update"]["0.weight"]
    assert alarms(made) == []


def test_a_negligible_unused_part_is_a_remark() -> None:
    made = Made()
    made.layers.append({"tensor": "pool.weight", "module": "pool", "role": "matrix", "shape": [2, 4]})
    made.rows["weight"]["pool.weight"] = {
        "step": made.steps,
        "norm": np.ones(N),
        "state": np.full(N, "unused", object),
    }
    found = judge(made.history())[0]
    assert [(f.problem, f.severity) for f in found] == [("unused_parameters", "info")]


@pytest.mark.parametrize("outside", [True, False])
def test_gradient_without_update_is_frozen(outside: bool) -> None:
    made = Made()
    if outside:
        made.rows["weight"]["3.weight"]["state"] = np.full(N, "no_optimizer", object)
        del made.rows["update"]["3.weight"]
    else:
        made.rows["update"]["3.weight"]["zeros"] = made.rows["update"]["3.weight"]["count"].copy()
    assert only(made, "frozen_parameters").layers == ("3.weight",)


@pytest.mark.parametrize("state", ["lr_zero", "zero_gradient"])
def test_no_update_at_rate_zero_is_no_frozen_parameter(state: str) -> None:
    made = Made()
    made.rows["update"]["3.weight"]["zeros"] = made.rows["update"]["3.weight"]["count"].copy()
    made.rows["weight"]["3.weight"]["state"][:] = "lr_zero"
    made.rows["weight"]["3.weight"]["state"][10:20] = state
    assert alarms(made) == []


def test_bfloat16_updates_lost_to_rounding() -> None:
    made = Made()
    for entry in made.layers:
        entry["dtype"] = "bfloat16"
    made.rows["update"]["1.weight"]["lost"] = 0.8 * made.rows["update"]["1.weight"]["count"]
    assert only(made, "low_precision_stall").layers == ("1.weight",)


# ---- rates


def large_steps(made: Made) -> Made:
    for row in made.rows["update"].values():
        row["ratio"][2:30] = 0.4
    return made


def test_large_steps_with_a_diverging_loss_are_a_rate_too_high() -> None:
    made = large_steps(Made())
    made.loss[5:] = 8.0 + 0.1 * np.sin(made.all[5:])
    made.val[:] = 8.0
    finding = only(made, "learning_rate_too_high")
    assert finding.severity == "critical"
    assert finding.first_step == 2
    assert finding.evidence["lr"] == pytest.approx(0.1)


def test_large_steps_of_a_training_that_works_are_healthy() -> None:
    assert alarms(large_steps(Made())) == []


def test_nan_after_explosion_after_a_high_rate_is_one_alarm() -> None:
    made = large_steps(Made())
    made.loss[5:20] = np.linspace(8, 1e3, 15)
    made.loss[20:] = np.nan
    made.val[1:] = np.nan
    for entry in made.layers:
        made.rows["gradient"][entry["tensor"]]["norm"][8:20] = 1e6
        made.rows["gradient"][entry["tensor"]]["nans"][20:] = 1
        made.rows["weight"][entry["tensor"]]["nans"][20:] = 1
    finding = only(made, "learning_rate_too_high")
    assert finding.evidence["led_to"] == "exploding_gradients, nonfinite"
    assert "it led to exploding gradients (step 8), nonfinite (step 20)" in finding.summary


def tiny_steps() -> Made:
    made = Made()
    for row in made.rows["update"].values():
        row["ratio"] *= 1e-3
    made.loss[:] = 2.3 - 1e-4 * made.all
    made.val[:] = 2.3
    return made


def test_tiny_steps_that_learn_nothing_are_a_rate_too_low() -> None:
    assert float(only(tiny_steps(), "learning_rate_too_low").evidence["update_ratio"]) < 1e-4


def test_clipping_explains_tiny_steps() -> None:
    made = tiny_steps()
    made.extra["clip_ratio"] = (made.all, np.full(N, 0.004))
    finding = only(made, "over_clipping")
    assert "learning_rate_too_low" in str(finding.evidence["led_to"])


def test_adams_eps_explains_tiny_steps() -> None:
    made = tiny_steps()
    made.info["optimizers"] = [{"class": "AdamW", "groups": [{"lr": 0.1, "eps": 10.0}]}]
    only(made, "adam_epsilon")


@pytest.mark.parametrize(("share", "fault"), [(0.9, True), (0.1, False)])
def test_adams_second_moments_have_the_last_word_on_eps(share: float, fault: bool) -> None:
    made = tiny_steps()
    made.info["optimizers"] = [{"class": "AdamW", "groups": [{"lr": 0.1, "eps": 10.0}]}]
    some = made.steps[::10]
    made.rows["second_moment"] = {
        name: {"step": some, "below_epsilon": np.full(len(some), share)} for name in made.rows["gradient"]
    }
    if fault:
        assert only(made, "adam_epsilon").evidence["below_eps"] == share
    else:
        assert "adam_epsilon" not in [f.problem for f in alarms(made)]


@pytest.mark.parametrize(("factor", "fault"), [(40.0, True), (1.0, False)])
def test_a_jump_of_the_schedule_is_a_fault_but_a_restart_is_not(factor: float, fault: bool) -> None:
    made = Made()
    made.lr[:100] = 0.1 * np.linspace(1, 0.01, 100)
    made.lr[100:] = 0.1 * factor
    assert [f.problem for f in alarms(made)] == (["schedule_fault"] if fault else [])


@pytest.mark.parametrize(("ends", "fault"), [(90, True), (195, False)])
def test_a_schedule_that_ends_long_before_the_run(ends: int, fault: bool) -> None:
    made = Made()
    made.lr = np.maximum(0.1 * (1 - made.all / ends), 0.0)
    found = alarms(made)
    assert [f.problem for f in found] == (["schedule_fault"] if fault else [])
    assert not fault or found[0].first_step == 90


def test_a_layer_that_moves_a_thousand_times_slower() -> None:
    made = Made()
    made.rows["update"]["1.weight"]["ratio"] *= 1e-3
    assert only(made, "layer_imbalance").layers == ("1.weight",)


def test_a_weight_that_grows_twentyfold() -> None:
    made = Made()
    made.rows["weight"]["2.weight"]["norm"] = np.geomspace(5, 100, N)
    finding = only(made, "weight_growth")
    assert finding.layers == ("2.weight",)
    assert 60 < finding.first_step < 90  # where it passed a third of the limit


# ---- losses


def test_a_flat_loss_is_not_learning() -> None:
    made = Made()
    made.loss[:] = 2.3 + 0.01 * np.sin(made.all)
    made.val[:] = 2.31
    assert only(made, "not_learning").severity == "critical"


def test_memorising_without_ever_generalising_is_not_learning() -> None:
    made = Made()
    made.loss = np.linspace(2.4, 1.5, N)
    made.val = np.linspace(2.33, 2.6, made.val.size)
    assert "validation" in only(made, "not_learning").summary


@pytest.mark.parametrize("optimizers", [1, 2])
def test_the_losses_of_a_gan_need_not_fall(optimizers: int) -> None:
    made = Made()
    made.loss[:] = 2.3 + 0.05 * np.sin(made.all / 9)
    made.val = np.empty(0)
    made.extra["val_loss"] = ([], [])
    made.info["optimizers"] = [{"class": "Adam", "groups": [{}]}] * optimizers
    assert len(alarms(made)) == (1 if optimizers == 1 else 0)


def test_a_model_that_knows_its_task_has_little_to_learn() -> None:
    made = Made()
    made.loss[:] = 0.80 - 0.01 * made.all / N  # log(10) is 2.3
    made.val[:] = 0.8
    assert [f.problem for f in alarms(made)] == ["not_learning"]  # a fresh network: the loss has other units
    assert np.isnan(outcome(made.history()).trivial)
    made.rows["initial_weight"]["2.bias"]["max"] = [0.4]  # beyond every initialisation: it was trained before
    assert alarms(made) == []


def test_weights_that_blow_up_were_not_near_zero_before() -> None:
    """The rate was too high from the first step on, not from when the weights had grown."""
    made = Made()
    made.loss = made.loss[::-1].copy()
    for columns in made.rows["weight"].values():
        columns["norm"] = np.where(made.steps < 12, columns["norm"], 1000.0)
        columns["rms"] = columns["norm"] / 32
    for columns in made.rows["update"].values():
        columns["ratio"] = np.where(made.steps < 15, 0.5, 0.01)
    found = alarms(made)[0]
    assert (found.problem, found.first_step) == ("learning_rate_too_high", 0)


def test_overfitting_begins_where_validation_turned() -> None:
    made = Made(steps=600)
    made.loss = 2.3 * np.exp(-made.all / 200)
    steps = made.all[19::20]
    made.val = np.where(steps < 200, 1.0 - 0.003 * steps, 0.4 + 0.002 * (steps - 200))
    finding = only(made, "overfitting")
    assert finding.first_step in (179, 199, 219)
    assert finding.severity == "critical"


def test_noise_on_validation_is_no_overfitting() -> None:
    made = Made(steps=600)
    made.val = 0.5 + 0.05 * np.random.default_rng(2).standard_normal(made.val.size)
    assert alarms(made) == []


def test_a_spike_that_stays_alarms_and_one_that_passes_is_a_remark() -> None:
    made = Made(steps=400)
    made.loss[250:] += 3.0 * np.exp(-np.arange(150) / 200)
    assert "loss_spike" in [f.problem for f in alarms(made)]
    made = Made(steps=400)
    made.loss[250:253] += 1.8
    found = judge(made.history())[0]
    assert [(f.problem, f.severity) for f in found] == [("loss_spike", "info")]


def test_worse_than_the_baselines_is_a_regression() -> None:
    baselines = []
    for seed in range(5):
        other = Made()
        other.val = other.val + 0.01 * np.random.default_rng(seed).standard_normal(other.val.size)
        baselines.append(courses(other.history()))
    assert judge(Made().history(), learn(baselines))[0] == []
    worse = Made()
    worse.val[4:] += 0.3
    found = judge(worse.history(), learn(baselines))[0]
    assert [f.problem for f in found] == ["regression"]
    assert found[0].first_step in (79, 99)


# ---- sizes and drift


def test_inputs_far_too_large_are_a_data_fault() -> None:
    made = Made()
    gain = 5.0 / (UNITS * UNITS) ** 0.5 * UNITS**0.5
    made.rows["activation"]["0"]["rms"][:] = 300 * gain
    made.rows["activation"]["5"]["rms"][0] = 30.0
    made.loss = 900 * np.exp(-made.all / 20) + 1
    assert only(made, "data_fault").layers == ("0",)


def test_one_broken_batch_is_a_data_fault_at_its_step() -> None:
    made = Made()
    made.rows["activation"]["0"]["rms"][130] = 400.0
    made.loss[130] = 50.0
    found = alarms(made)
    assert found[0].problem == "data_fault"
    assert found[0].first_step == 130


def test_large_first_predictions_are_a_bad_start() -> None:
    made = Made()
    made.rows["activation"]["5"]["rms"][0] = 40.0
    made.loss[:5] = 40.0
    made.loss[5:] = 2.3 * np.exp(-made.all[5:] / 50) + 0.5
    assert only(made, "bad_init_scale").first_step == 0


def pretrained(made: Made) -> Made:
    """Biases as no initialisation leaves them, but for the new head."""
    for i in range(LAYERS - 1):
        made.rows["initial_weight"][f"{i}.bias"].update(min=[-0.5], max=[0.6])
    return made


def test_drift_matters_only_from_a_pretrained_state() -> None:
    assert alarms(Made()) == []  # 120 % from a random start
    finding = only(pretrained(Made()), "excessive_drift")
    assert finding.evidence["drift"] == pytest.approx(1.2)
    near = pretrained(Made())
    for row in near.rows["drift"].values():
        row["relative_l2"] *= 0.2
    assert alarms(near) == []


def test_the_users_drift_limit_counts() -> None:
    made = Made()
    made.info["drift_limit"] = 0.9
    assert only(made, "excessive_drift").evidence["threshold"] == 0.9


def test_a_budget_for_some_layers() -> None:
    """Names the budget, the layer, how far it moved and since when; the strictest one counts."""
    made = Made()
    for name, row in made.rows["drift"].items():
        row["relative_l2"] = 0.02 * made.steps / made.steps[-1] * (2.0 if name.startswith("3.") else 1.0)
    made.info["drift_limit"] = {"0-4": 0.05}
    assert alarms(made) == []
    made.info["drift_limit"] = {"0-4": 0.03, "3": 1.0, "4": 0.3}
    finding = only(made, "excessive_drift")
    assert finding.layers == ("3.weight",)  # and not its bias
    since = int(made.steps[np.flatnonzero(made.rows["drift"]["3.weight"]["relative_l2"] > 0.03)[0]])
    assert finding.evidence == {"drift": 0.04, "threshold": 0.03, "budget": "0-4", "since": since}
    assert "3.weight moved by 4.00% of its size from the reference" in finding.summary
    assert f"beyond its budget of 3.00% (0-4) since step {since}" in finding.summary
    made.info["drift_limit"] = {"3.bias": 0.03}
    assert only(made, "excessive_drift").layers == ("3.bias",)


def test_layers_without_a_budget_are_judged_as_ever() -> None:
    made = pretrained(Made())
    made.info["drift_limit"] = {"0": 5.0}
    assert "0.weight" not in only(made, "excessive_drift").layers
    made.info["drift_limit"] = {"0-9": 5.0}
    assert alarms(made) == []


def test_frozen_weights_that_an_adapter_moves_count() -> None:
    made = Made()
    made.info["drift_limit"] = {"0-9": 2.0}
    for entry in made.layers:
        entry["trainable"] = entry["tensor"] in ("1.weight", "5.weight")
    for name, row in made.rows["drift"].items():
        row["relative_l2"] = row["relative_l2"] * {"2.weight": 3.0, "1.weight": 1.0}.get(name, 0.0)
    assert only(made, "excessive_drift").layers == ("2.weight",)


def test_going_on_with_ones_own_training_is_a_remark() -> None:
    made = pretrained(Made())
    made.rows["initial_weight"]["5.bias"].update(min=[-0.5], max=[0.6])
    assert [(f.problem, f.severity) for f in judge(made.history())[0]] == [("excessive_drift", "info")]


def test_outcome_of_a_healthy_training() -> None:
    facts = outcome(Made().history())
    assert not facts.bad
    assert facts.trivial == pytest.approx(np.log(10))


@pytest.mark.parametrize(
    "name", ["episode_return", "charts/episodic_return", "rollout/ep_rew_mean", "reward"]
)
def test_the_loss_of_an_agent_is_no_outcome(name: str) -> None:
    made = Made()
    made.loss = 30 + 0.2 * made.all + made.loss
    made.extra["clip_ratio"] = (made.all, np.full(N, 0.01))
    assert "over_clipping" in [f.problem for f in alarms(made)]
    made.extra[name] = (made.all, 20 + 2.0 * made.all)
    assert alarms(made) == []
    assert "an agent" in outcome(made.history()).lack


def test_preference_tuning_is_no_agent() -> None:
    made = Made()
    made.extra["rewards/margins"] = (made.all, 0.01 * made.all)
    assert outcome(made.history()).lack == ""


def raw_targets() -> Made:
    """A regression on numbers far from 1: losses of thousands."""
    made = Made()
    made.loss, made.val = 1000 * made.loss, 1000 * made.val
    for row in made.rows["gradient"].values():
        row["norm"] = 1000 * row["norm"]
    return made


def test_a_last_layer_that_grows_to_the_size_of_raw_targets_is_silent() -> None:
    made = raw_targets()
    made.rows["weight"][f"{LAYERS - 1}.weight"]["norm"] = np.linspace(5, 150, N)
    assert alarms(made) == []
    made.loss = made.loss[::-1].copy()
    assert "weight_growth" in [f.problem for f in alarms(made)]


def test_a_classifiers_last_layer_has_no_reason_to_grow() -> None:
    made = Made()
    made.rows["weight"][f"{LAYERS - 1}.weight"]["norm"] = np.linspace(5, 150, N)
    assert only(made, "weight_growth").layers == (f"{LAYERS - 1}.weight",)


def test_large_first_steps_towards_raw_targets_are_silent() -> None:
    made = raw_targets()
    made.rows["update"] = {
        n: {**c, "ratio": np.where(made.steps < 6, 0.2, 0.005)} for n, c in made.rows["update"].items()
    }
    names = [n for n in made.rows["weight"] if n.endswith("weight")]
    for name in names[1:-1]:  # two matrices are left: one of them makes the predictions
        made.layers = [e for e in made.layers if e["tensor"] != name]
    made.rows["weight"][names[-1]]["norm"] = np.linspace(100, 150, N)
    assert alarms(made) == []
    made.rows["weight"][names[0]]["norm"] = np.linspace(45, 48, N)  # the hidden one lost what it started from
    assert [f.problem for f in alarms(made)] == ["learning_rate_too_high"]


def test_dead_units_of_an_agent_are_a_remark() -> None:
    made = Made()
    made.active["activation", "act2"] = (made.steps, np.zeros((N, UNITS), bool))
    assert only(made, "dead_units").severity == "warning"
    made.extra["episode_return"] = (made.all, 20 + 2.0 * made.all)
    assert alarms(made) == []
    assert [f.problem for f in judge(made.history())[0]] == ["dead_units"]
