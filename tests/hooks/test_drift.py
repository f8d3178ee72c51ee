"""Distance from the reference, wherever it comes from, against plain float64 numbers."""

from __future__ import annotations

import copy
import gc
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from trainings import Weights, batch, column, mlp, train, watched_training, weights_of

from layerwatch import Run, watch
from layerwatch.hooks.checkpoint import load_state
from layerwatch.hooks.reference import Reference, options, plan
from layerwatch.hooks.tensors import watched_tensors

#: Of these no bfloat16 copy is made: half precision is kept as it is, in as many bytes.
EXACT = (torch.bfloat16, torch.float16, torch.float64)


def assert_drift(run: Run, reference: Weights, now: list[Weights], rel: float = 1e-9) -> None:
    for tensor, r in reference.items():
        frame = run.drift(tensor)
        assert frame["step"].tolist() == list(range(len(now)))
        r64 = r.double().flatten()
        for line, weights in zip(frame.to_dict("records"), now, strict=True):
            w64 = weights[tensor].double().flatten()
            assert line["distance"] == pytest.approx(float((w64 - r64).norm()), rel=rel, abs=1e-12)
            assert line["relative_l2"] == pytest.approx(
                float((w64 - r64).norm() / r64.norm()), rel=rel, abs=1e-12
            )
            cosine = torch.nn.functional.cosine_similarity(w64, r64, dim=0)
            assert line["cosine"] == pytest.approx(float(cosine), abs=max(1e-9, rel * 1e-2))
            assert line["sign_flips"] == int((w64 * r64 < 0).sum())
            assert line["count"] == r.numel()


def saved(source: str, reference: Weights, folder: Path) -> Any:
    path = folder / f"reference{source}"
    if source == ".safetensors":
        safetensors.torch.save_file(reference, path)
    elif source == "legacy.pt":
        torch.save(reference, path, _use_new_zipfile_serialization=False)
    elif source == "trainer.pt":
        torch.save({"epoch": 3, "state_dict": {f"module.{k}": v for k, v in reference.items()}}, path)
    elif source == "model.pt":
        torch.save({"model": reference, "optimizer": {}}, path)
    elif source in (".pt", ".bin"):
        torch.save(reference, path)
    else:
        return {"state_dict": reference, "start": "start"}[source]
    return path if source != ".bin" else str(path)


@pytest.mark.parametrize(
    "source", ["start", "state_dict", ".safetensors", ".pt", ".bin", "trainer.pt", "model.pt", "legacy.pt"]
)
def test_drift_from_every_kind_of_reference(tmp_path: Path, source: str) -> None:
    reference = weights_of(mlp(1))
    model = mlp(2)
    start = weights_of(model)
    now: list[Weights] = []
    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.5), 4,
        watching={"reference": saved(source, reference, tmp_path)},
        after_step=lambda _: now.append(weights_of(model)),
    )  # fmt: skip
    assert_drift(run, start if source == "start" else reference, now)
    assert run.drift()["sign_flips"].sum() > 0


def test_without_a_reference_there_is_no_drift(tmp_path: Path) -> None:
    model = mlp()
    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), watching={"reference": None}
    )
    assert run.drift().empty
    assert run.info["reference"] is None
    assert len(run.stats("weight", "0.weight")) == 4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_large_tensor_is_as_exact_without_a_full_copy(tmp_path: Path, dtype: torch.dtype) -> None:
    """More than 65,536 elements: the reference is kept in bfloat16, and its rounding subtracted."""
    torch.manual_seed(0)
    model = nn.Linear(300, 300, bias=False, dtype=dtype)
    start = weights_of(model)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    now: list[Weights] = []
    run = watched_training(
        tmp_path / "run", model, optimizer, 5,
        data=lambda s: batch(s, 64, 300).to(dtype), after_step=lambda _: now.append(weights_of(model)),
    )  # fmt: skip
    frame = run.drift("weight")
    reference = start["weight"].double()
    for line, weights in zip(frame.to_dict("records"), now, strict=True):
        true = float((weights["weight"].double() - reference).norm())
        assert 0 < true < 0.5 * float(reference.norm())
        assert line["distance"] == pytest.approx(true, rel=1e-9 if dtype in EXACT else 0.01)
        assert line["reference_norm"] == pytest.approx(float(reference.norm()), rel=1e-3)
    entry = run.info["references"]["weight"]
    assert entry["bytes"] == 90_000 * (8 if dtype == torch.float64 else 2)
    assert (entry["form"], entry["error"]) == ("full" if dtype in EXACT else "bfloat16", 0)
    assert (entry["floor"] == 0) == (dtype in EXACT)
    # Without the correction the rounding alone would be taken for a distance.
    rounding = float((reference - reference.bfloat16().double()).norm())
    assert dtype is not torch.float32 or rounding > 0.01 * float(
        (now[0]["weight"].double() - reference).norm()
    )


def test_a_large_tensor_that_does_not_move_has_no_drift(tmp_path: Path) -> None:
    model = nn.Linear(300, 300)
    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.0), data=lambda s: batch(s, 4, 300)
    )
    assert run.drift("weight")["distance"].max() <= 1e-6 * run.drift("weight")["reference_norm"].max()


def test_the_reference_is_a_copy(tmp_path: Path) -> None:
    """Training in place must not move what drift is measured from."""
    model = mlp()
    reference = dict(model.state_dict())  # shares memory with the model
    start = copy.deepcopy(reference)
    now: list[Weights] = []
    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.5),
        watching={"reference": reference}, after_step=lambda _: now.append(weights_of(model)),
    )  # fmt: skip
    assert_drift(run, start, now)
    assert run.drift()["distance"].min() > 0


def test_names_are_matched_by_their_endings_and_the_rest_is_said(tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model = nn.ModuleDict({"backbone": nn.ModuleDict({"encoder": encoder}), "head": nn.Linear(8, 2)})
    bare = {f"encoder.{k}": torch.randn_like(v) for k, v in encoder.state_dict().items()}
    bare["encoder.1.bias"] = torch.zeros(3)  # of another shape
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1, reference=bare):
        model["head"](encoder(batch(0))).sum().backward()
        optimizer.step()
    run = Run(tmp_path / "run")
    assert run.drift()["tensor"].tolist() == [
        f"backbone.encoder.{n}" for n in ("0.weight", "0.bias", "1.weight")
    ]
    (note,) = run.info["notes"]
    assert note.startswith("3 of 6 tensors have no counterpart")
    assert "head.weight" in note
    weight = weights_of(model)["backbone.encoder.0.weight"]
    assert column_of(run, "backbone.encoder.0.weight") == pytest.approx(
        float((weight - bare["encoder.0.weight"]).double().norm()), rel=1e-6
    )


def column_of(run: Run, tensor: str) -> float:
    return float(run.drift(tensor)["distance"].iloc[-1])


def test_a_broken_weight_does_not_hide(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def break_it(step: int) -> None:
        if step == 1:
            with torch.no_grad():
                model.get_parameter("0.weight")[0, 0] = float("nan")

    run = watched_training(tmp_path / "run", model, optimizer, 3, after_backward=break_it)
    assert column(run, "weight", "nans", "0.weight")[1] == 1
    assert np.isnan(run.drift("0.weight")["distance"].iloc[1])


def test_a_resumed_run_says_where_its_start_is(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    first = weights_of(model)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        train(model, optimizer, 3)
    middle = weights_of(model)
    with watch(model, optimizer, run=tmp_path / "run", every=1, resume=True):
        train(model, optimizer, 3)
    run = Run(tmp_path / "run")
    last: Tensor = weights_of(model)["0.weight"]
    from_first = float((last - first["0.weight"]).double().norm())
    from_middle = float((last - middle["0.weight"]).double().norm())
    found = column_of(run, "0.weight")
    if found == pytest.approx(from_middle, rel=1e-6):
        assert any("resum" in note and "drift" in note for note in run.info["notes"])
    else:
        assert found == pytest.approx(from_first, rel=1e-6)


def test_an_unmoved_large_tensor_has_no_drift(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 1))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model[1].parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        for _ in range(3):
            model(torch.randn(4, 300)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    run = Run(tmp_path / "run")
    assert run.drift("0.weight")["relative_l2"].tolist() == [0.0, 0.0, 0.0]
    assert (run.drift("1.weight")["relative_l2"] > 0).all()


def test_a_tensor_that_starts_at_zero_has_a_distance_but_no_relative_one(tmp_path: Path) -> None:
    model = nn.Linear(3, 3)
    nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", every=1):
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    last = Run(tmp_path / "run").drift("bias").iloc[-1]
    assert np.isnan(last["relative_l2"])
    assert np.isnan(last["cosine"])
    assert last["distance"] == pytest.approx(float(model.bias.detach().norm()))


# Memory -----------------------------------------------------------------------------------------------------

SIZES = {
    "0.weight": 480_000,
    "0.bias": 600,
    "2.weight": 180_000,
    "2.bias": 300,
    "4.weight": 6_000,
    "4.bias": 20,
}
KIB = 1024


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(800, 600), nn.ReLU(), nn.Linear(600, 300), nn.ReLU(), nn.Linear(300, 20))


def budgeted(
    path: Path, memory: int | None, steps: int = 6, **watching: Any
) -> tuple[Run, Weights, list[Weights]]:
    model = network()
    start, now = weights_of(model), []
    run = watched_training(
        path, model, torch.optim.AdamW(model.parameters(), 1e-3), steps,
        data=lambda s: batch(s, 16, 800), after_step=lambda _: now.append(weights_of(model)),
        watching={"reference_memory": memory, "activations": False, **watching},
    )  # fmt: skip
    return run, start, now


def assert_as_stated(run: Run, start: Weights, now: list[Weights]) -> None:
    """Every distance is as exact as run.json says, within one and a half times of two standard deviations."""
    for name, stated in run.info["references"].items():
        frame = run.drift(name)
        assert len(frame) == len(now)
        r = start[name].double().flatten()
        for line, weights in zip(frame.to_dict("records"), now, strict=True):
            w = weights[name].double().flatten()
            true = float((w - r).norm() / r.norm())
            allowed = 1.5 * stated["error"] * true + stated["floor"] + 1e-9
            assert line["relative_l2"] == pytest.approx(true, abs=allowed)
            assert line["reference_norm"] == pytest.approx(float(r.norm()), rel=1e-4)
            cosine = float(nn.functional.cosine_similarity(w, r, dim=0))
            assert line["cosine"] == pytest.approx(cosine, abs=3 * stated["error"] * (1 - cosine) + 1e-5)
            if stated["form"].startswith("sketch"):
                assert np.isnan(line["sign_flips"])
            else:
                assert line["sign_flips"] == int((w * r < 0).sum())


@pytest.mark.parametrize(
    ("memory", "forms"),
    [
        (None, ["bfloat16", "full", "bfloat16", "full", "full", "full"]),
        (4 << 20, ["full"] * 6),
        (2 << 20, ["bfloat16", "full", "full", "full", "full", "full"]),
        (1 << 20, ["sketch of 16384", "full", "full", "full", "full", "full"]),
        (512 * KIB, ["sketch of 16384", "full", "bfloat16", "full", "full", "full"]),
        (160 * KIB, ["sketch of 16384", "full", "sketch of 16384", "full", "full", "full"]),
        (120 * KIB, ["sketch of 4096", "full", "sketch of 16384", "full", "full", "full"]),
        (60 * KIB, ["sketch of 4096", "full", "sketch of 4096", "full", "full", "full"]),
    ],
)
def test_the_budget_is_kept_and_the_error_is_as_stated(
    tmp_path: Path, memory: int | None, forms: list[str]
) -> None:
    run, start, now = budgeted(tmp_path / "run", memory)
    stated = run.info["references"]
    assert {name: entry["form"] for name, entry in stated.items()} == dict(zip(SIZES, forms, strict=True))
    assert sum(entry["bytes"] for entry in stated.values()) <= (memory or 4 << 20)
    width = {"full": 4, "bfloat16": 2}
    for name, entry in stated.items():
        counters = entry["form"].removeprefix("sketch of ")
        size = width[counters] * SIZES[name] if counters in width else 4 * int(counters)
        assert entry["bytes"] == size
    assert_as_stated(run, start, now)


def test_a_budget_that_holds_not_even_sketches_says_what_is_left_out(tmp_path: Path) -> None:
    run, start, now = budgeted(tmp_path / "run", 20_000)
    assert run.info["references"].keys() == {"0.bias", "2.bias", "4.bias", "4.weight"}
    assert set(run.drift()["tensor"]) == run.info["references"].keys()
    (note,) = run.info["notes"]
    assert note == (
        "reference_memory=20000 holds not even a sketch of 2 of 6 tensors: their drift is not measured: "
        "0.weight, 2.weight"
    )
    assert note in run.events()["message"].tolist()
    assert_as_stated(run, start, now)


def test_more_memory_is_never_less_exact() -> None:
    choices = {name: options(torch.empty(size)) for name, size in SIZES.items()}
    before, chosen = dict.fromkeys(SIZES, -1), {}
    for memory in range(0, 3_000_000, 10_007):
        chosen = plan(choices, memory)
        costs = {n: 0 if f is None else next(c for c, o in choices[n] if o == f) for n, f in chosen.items()}
        assert sum(costs.values()) <= memory
        if memory > 100_000:
            assert sum(costs.values()) >= sum(before.values())
        before = costs
    assert set(chosen.values()) == {"full"}


def test_the_memory_that_is_kept_is_the_memory_that_is_stated() -> None:
    """Counted in the storages that the reference holds, not in what it says of itself."""
    tensors = watched_tensors([network()])
    for memory in (None, 1 << 20, 100 * KIB):
        reference = Reference(memory=memory)
        reference.take(tensors)
        held = sum(k.values.untyped_storage().nbytes() for k in reference._kept.values())
        assert held == reference.nbytes == sum(e["bytes"] for e in reference.describe().values())
        assert held <= (memory or 2 * 666_920 + 2 * 6920)


def test_a_sketch_of_what_does_not_move_is_no_distance_and_nan_does_not_hide(tmp_path: Path) -> None:
    model = network()
    model[0].requires_grad_(False)

    def break_it(step: int) -> None:
        if step == 1:
            with torch.no_grad():
                model.get_parameter("2.weight")[0, 0] = float("nan")

    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), 3, data=lambda s: batch(s, 4, 800),
        after_backward=break_it, watching={"reference_memory": 60 * KIB},
    )  # fmt: skip
    assert {run.info["references"][n]["form"] for n in ("0.weight", "2.weight")} == {"sketch of 4096"}
    assert run.drift("0.weight")["relative_l2"].tolist() == [0.0] * 3
    assert run.drift("0.weight")["cosine"].tolist() == pytest.approx([1.0] * 3)
    assert run.drift("2.weight")["distance"].isna().tolist() == [False, True, True]


@pytest.mark.parametrize("memory", [None, 1 << 20])
def test_the_users_state_is_let_go_once_it_is_copied(tmp_path: Path, memory: int | None) -> None:
    model, other = network(), network()
    state = {name: p.detach().clone() for name, p in other.named_parameters()}
    alive = [weakref.ref(t) for t in state.values()]
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watcher = watch(model, optimizer, run=tmp_path / "run", reference=state, reference_memory=memory)
    del state
    assert all(t() is not None for t in alive)
    train(model, optimizer, 1, data=lambda s: batch(s, 4, 800))
    gc.collect()
    assert [t() for t in alive] == [None] * len(alive)
    watcher.close()
    assert len(Run(tmp_path / "run").drift()) == 6


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "64MB"])
def test_a_memory_that_is_none_is_refused(tmp_path: Path, value: Any) -> None:
    model = mlp()
    with pytest.raises(ValueError, match="expected reference_memory as a whole number of bytes above 0"):
        watch(model, torch.optim.SGD(model.parameters(), 0.1), run=tmp_path / "run", reference_memory=value)
    assert not (tmp_path / "run").exists()


# Mapped files -----------------------------------------------------------------------------------------------


def saved_network(path: Path, dtype: torch.dtype = torch.float32) -> Weights:
    torch.manual_seed(5)
    state = {n: torch.randn_like(p).mul(0.1).to(dtype) for n, p in network().named_parameters()}
    safetensors.torch.save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
    return state


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_mapped_file_is_exact_and_takes_no_memory(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    """However small the budget."""
    path = tmp_path / f"reference{suffix}"
    reference = saved_network(path, dtype)
    run, _, now = budgeted(tmp_path / "run", 1, 2, reference=path)
    entry = {"form": "mapped", "bytes": 0, "error": 0.0, "floor": 0.0}
    assert run.info["references"] == dict.fromkeys(SIZES, entry)
    assert_drift(run, reference, now)


def test_the_mapped_tensors_are_kept_themselves(tmp_path: Path) -> None:
    saved_network(tmp_path / "a.safetensors")
    state = load_state(tmp_path / "a.safetensors")
    reference = Reference(state)
    reference.take(watched_tensors([network()]))
    assert reference.nbytes == 0
    for name, tensor in state.tensors.items():
        kept, residual = reference.stored(name)
        assert kept is not None
        assert kept.data_ptr() == tensor.data_ptr()
        assert residual is None


def test_a_file_that_is_written_to_is_not_read_any_more(tmp_path: Path) -> None:
    """Reading behind the end of a mapped file would kill the training."""
    path = tmp_path / "model.pt"
    saved_network(path)
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def overwrite(step: int) -> None:
        if step == 1:
            path.write_bytes(b"short")

    watching = {"reference": path, "activations": False}
    run = watched_training(
        tmp_path / "run", model, optimizer, 4, data=lambda s: batch(s, 4, 800), after_step=overwrite,
        watching=watching,
    )  # fmt: skip
    assert set(run.drift()["step"]) == {0, 1}
    assert run.stats("weight")["step"].nunique() == 4
    (note,) = run.info["notes"]
    assert note.endswith("was written to during the training: drift is not measured any more")
    assert not (run.path / "errors.log").exists()


def test_a_file_that_is_replaced_stays_mapped_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    reference = saved_network(path)

    def replace(step: int) -> None:
        if step == 1:
            safetensors.torch.save_file({"0.bias": torch.zeros(600)}, tmp_path / "new")
            (tmp_path / "new").replace(path)

    model = network()
    now: list[Weights] = []

    def after(step: int) -> None:
        now.append(weights_of(model))
        replace(step)

    run = watched_training(
        tmp_path / "run", model, torch.optim.SGD(model.parameters(), 0.1), 4, data=lambda s: batch(s, 4, 800),
        after_step=after, watching={"reference": path, "activations": False},
    )  # fmt: skip
    assert_drift(run, reference, now)
    assert run.info["notes"] == []
