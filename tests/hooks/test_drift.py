"""Distance from the reference, wherever it comes from, against plain float64 numbers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from trainings import Weights, batch, column, mlp, train, watched_training, weights_of

from layerwatch import Run, watch

#: A bfloat16 copy of these rounds nothing away, or none is made.
EXACT = (torch.bfloat16, torch.float64)


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
        assert line["distance"] == pytest.approx(true, rel=1e-3 if dtype in EXACT else 0.01)
        assert line["reference_norm"] == pytest.approx(float(reference.norm()), rel=1e-3)
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
