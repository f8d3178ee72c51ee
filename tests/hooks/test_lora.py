"""Drift of weights that LoRA adapts while it trains: as if merged; against the product itself."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from trainings import batch
from transformers import Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from layerwatch import Run, watch
from layerwatch.hooks import measure
from layerwatch.hooks.transformers import LayerwatchCallback

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")  # it tells its settings' side effects

LAYERS = ["emb", "lin", "turned", "conv"]
WEIGHTS = [f"{layer}.weight" for layer in LAYERS]


class Net(nn.Module):
    """A layer of every kind; `other` is frozen and not adapted."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.emb, self.lin, self.turned = nn.Embedding(11, width), nn.Linear(width, width), Conv1D(7, width)
        self.conv, self.other = nn.Conv2d(1, 3, 2), nn.Linear(18, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.turned(self.lin(self.emb(x)))  # (n, 4, 7)
        return self.other(self.conv(h[:, None, :, :]).mean(2).flatten(1))


def adapted(base: nn.Module, layers: list[str] | None = None, **settings: Any) -> PeftModel:
    settings = {"r": 3, "lora_alpha": 6, "target_modules": layers or LAYERS} | settings
    return get_peft_model(base, LoraConfig(**settings))  # type: ignore[return-value]


def layers_of(model: nn.Module) -> dict[str, Any]:
    """PEFT's layer of each adapted weight."""
    found = {n: m for n, m in model.named_modules() if hasattr(m, "lora_A")}
    return {name.removeprefix("base_model.model.") + ".weight": layer for name, layer in found.items()}


def effective(model: nn.Module) -> dict[str, Tensor]:
    """Every adapted weight as its forward pass has it, in double precision."""
    model = copy.deepcopy(model).double()
    found = {}
    for name, layer in layers_of(model).items():
        weight = layer.get_base_layer().weight.detach().clone()
        if not layer.merged and not layer.disable_adapters:
            for active in layer.active_adapters:
                weight += layer.get_delta_weight(active).detach() if active in layer.scaling else 0.0
        found[name] = weight
    return found


class Course:
    """A training; what every adapted weight really was after each step."""

    def __init__(self, model: nn.Module, path: Path, **watching: Any) -> None:
        self.model, self.path = model, path
        self.start = effective(model)
        self.now: list[dict[str, Tensor]] = []
        self._optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.3)
        self._watcher = watch(model, self._optimizer, run=path, every=1, **watching)

    def steps(self, count: int) -> None:
        for _ in range(count):
            x = torch.randint(0, 11, (16, 4), generator=torch.Generator().manual_seed(len(self.now)))
            (self.model(x) - 1).square().mean().backward()
            self._optimizer.step()
            self._optimizer.zero_grad()
            self.now.append(effective(self.model))

    def close(self) -> Run:
        self._watcher.close()
        assert not (self.path / "errors.log").exists()
        return Run(self.path)


def assert_drift(
    run: Run, reference: dict[str, Tensor], now: list[dict[str, Tensor]], rel: float = 1e-5
) -> None:
    for name, start in reference.items():
        r = start.double().flatten().numpy()
        frame = run.drift(name)
        assert frame["step"].tolist() == list(range(len(now)))
        for line, weights in zip(frame.to_dict("records"), now, strict=True):
            w = weights[name].flatten().numpy()
            norm = np.linalg.norm(r)
            floor = 1e-7 * norm
            assert line["distance"] == pytest.approx(np.linalg.norm(w - r), rel=rel, abs=floor)
            assert line["relative_l2"] == pytest.approx(np.linalg.norm(w - r) / norm, rel=rel, abs=1e-7)
            assert line["reference_norm"] == pytest.approx(norm, rel=1e-6)
            assert line["cosine"] == pytest.approx(w @ r / norm / np.linalg.norm(w), abs=1e-6 * rel / 1e-5)


def assert_ranks(run: Run, reference: dict[str, Tensor], now: list[dict[str, Tensor]]) -> None:
    found = run.unit_means("adapter_stable_rank").set_index(["tensor", "step"])["value"]
    count = 0
    for name, start in reference.items():
        for step, weights in enumerate(now):
            change = (weights[name] - start.double()).flatten(1)
            values = np.linalg.svd(change.numpy(), compute_uv=False)
            if values[0] > 1e-5:
                assert found[name, step] == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-3)
                count += 1
    assert count == len(found)


@pytest.mark.parametrize(
    ("reference", "route"),
    [(reference, measure.SWEEP) for reference in ("start", "file", "state_dict", "another", "half")]
    + [
        (reference, route) for reference in ("start", "another") for route in (measure.SINGLE, measure.DEVICE)
    ],
)
def test_drift_is_that_of_the_effective_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reference: str, route: str
) -> None:
    torch.manual_seed(0)
    base = Net()
    given: Any = {name: weight.clone() for name, weight in base.state_dict().items()}
    if reference == "another":
        given = {name: weight + 0.1 * torch.randn_like(weight) for name, weight in given.items()}
    if reference == "half":  # a checkpoint of half the bytes, whose rounding is a distance, too
        given = {name: weight.half() for name, weight in given.items()}
    there = {name: given[name].double() for name in WEIGHTS}
    if reference == "file":
        torch.save(given, tmp_path / "base.pt")
    if route != measure.SWEEP:
        monkeypatch.setattr(measure, "route_of", lambda _: route)
    how = {"start": "start", "file": tmp_path / "base.pt"}.get(reference, given)
    course = Course(adapted(base), tmp_path / "run", reference=how)
    course.steps(4)
    run = course.close()
    assert_drift(run, there, course.now)
    assert run.drift(WEIGHTS)["relative_l2"].max() > 0.1
    if reference == "start":
        assert_ranks(run, there, course.now)
        assert run.drift("other.weight")["distance"].max() == 0.0
        assert len(run.drift("lin.lora_A.default.weight")) == 4  # the factors have their own
    assert run.drift(WEIGHTS)["sign_flips"].isna().all()


def merge(model: PeftModel) -> None:
    model.merge_adapter()


def unmerge(model: PeftModel) -> None:
    model.unmerge_adapter()


def disable(model: PeftModel) -> None:
    model.base_model.disable_adapter_layers()  # type: ignore[operator]


def second(model: PeftModel) -> None:
    """One more adapter, not zero, beside the first."""
    model.add_adapter("second", LoraConfig(r=2, target_modules=["lin", "turned"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "second"])  # type: ignore[operator]


def other_alone(model: PeftModel) -> None:
    second(model)
    model.set_adapter("second")


def unload(model: PeftModel) -> None:
    """The base's own modules are in the network again, with the change in them."""
    for name, layer in layers_of(model).items():
        layer.merge()
        setattr(model.base_model.model, name.removesuffix(".weight"), layer.get_base_layer())


@pytest.mark.parametrize("actions", [[merge, unmerge], [disable], [second], [other_alone]])
def test_what_is_at_work_counts(tmp_path: Path, actions: list[Callable[[PeftModel], None]]) -> None:
    torch.manual_seed(0)
    model = adapted(Net())
    model.get_submodule("base_model.model.other").requires_grad_(True)
    course = Course(model, tmp_path / "run")
    course.steps(2)
    for action in actions:
        action(model)
        course.steps(2)
    run = course.close()
    assert_drift(run, course.start, course.now)
    assert all("not measured" not in note for note in run.info["notes"])


def test_merged_for_good(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(Net())
    model.get_submodule("base_model.model.other").requires_grad_(True)
    course = Course(model, tmp_path / "run")
    course.steps(3)
    merged = course.now[-1]
    unload(model)
    course.steps(2)
    run = course.close()
    assert_drift(run, course.start, [*course.now[:3], merged, merged])


@pytest.mark.parametrize("begin", ["gaussian", False, "pissa", "olora"])
def test_an_adapter_that_is_not_zero_at_the_start(tmp_path: Path, begin: Any) -> None:
    """Drift from the start counts from the effective weights at the start; from a file from those there."""
    torch.manual_seed(0)
    base = Net()
    given = {name: weight.clone() for name, weight in base.state_dict().items()}
    layers = ["lin"] if begin == "olora" else ["lin", "turned"]  # PEFT's OLoRA knows no Conv1D
    for reference in ("start", given):
        model = adapted(copy.deepcopy(base), layers, init_lora_weights=begin)
        course = Course(model, tmp_path / f"run{type(reference).__name__}", reference=reference)
        course.steps(3)
        run = course.close()
        there = (
            course.start if reference == "start" else {f"{n}.weight": given[f"{n}.weight"] for n in layers}
        )
        assert_drift(run, there, course.now)
        if reference == "start":
            assert_ranks(run, there, course.now)


class Cast(nn.Module):
    """A layer of another precision than the adapter."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.lin = nn.Linear(300, 300, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(x.to(self.lin.weight.dtype)).float()


@pytest.mark.parametrize(
    ("dtype", "memory", "form"),
    [
        (torch.float32, None, "bfloat16"), (torch.float32, 60_000, "sketch of 4096"),
        (torch.bfloat16, None, "full"), (torch.float64, None, "full"),
    ],
)  # fmt: skip
def test_precisions_and_large_weights(
    tmp_path: Path, dtype: torch.dtype, memory: int | None, form: str
) -> None:
    """However the reference is kept: a frozen weight is its own, exactly."""
    torch.manual_seed(0)
    model = adapted(Cast(dtype), ["lin"])
    start, now = effective(model), []
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 3.0)
    with watch(model, optimizer, run=tmp_path / "run", every=1, reference_memory=memory):
        for step in range(3):
            (model(batch(step, 16, 300)) - 1).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            now.append(effective(model))
    run = Run(tmp_path / "run")
    assert run.info["references"]["lin.weight"]["form"] == form
    assert_drift(run, start, now)
    assert_ranks(run, start, now)


def test_what_is_not_covered_is_said_once_and_has_no_drift(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(Net(), ["lin"], use_dora=True)
    course = Course(model, tmp_path / "dora")
    course.steps(3)
    run = course.close()
    notes = [note for note in run.info["notes"] if "not measured" in note]
    assert notes == [
        "drift of 1 adapted weights is not measured, as it is not plain LoRA (DoraLinearVariant): lin.weight"
    ]
    assert run.drift("lin.weight").empty
    assert len(run.drift("other.weight")) == 3
    other = get_peft_model(Net(), IA3Config(target_modules=["lin"], feedforward_modules=[]))
    course = Course(other, tmp_path / "ia3")
    course.now = []
    course.steps(2)
    run = course.close()
    assert [note for note in run.info["notes"] if "not measured" in note] == [
        "drift of 1 adapted weights is not measured, as ia3 is not LoRA: lin.weight"
    ]


def test_watching_does_not_change_the_training(tmp_path: Path) -> None:
    def trained(path: Path | None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model = adapted(Net())
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 0.01)
        watcher = watch(model, optimizer, run=path, every=1) if path else None
        for step in range(5):
            x = torch.randint(0, 11, (16, 4), generator=torch.Generator().manual_seed(step))
            model(x).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        if watcher:
            watcher.close()
        return model.state_dict()

    plain, watched = trained(None), trained(tmp_path / "run")
    assert all(torch.equal(plain[name], watched[name]) for name in plain)


class Scored(nn.Module):
    """What the Trainer asks of a model."""

    def __init__(self) -> None:
        super().__init__()
        self.net = Net()

    def forward(self, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        return {"loss": (self.net(x) - labels[:, None]).square().mean()}


def test_hugging_face_trainer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = adapted(Scored())
    start = effective(model)
    rows: Any = [{"x": row, "labels": 1.0} for row in torch.randint(0, 11, (32, 4))]
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=4, per_device_train_batch_size=8, learning_rate=0.05, use_cpu=True,
        report_to=[], save_strategy="no", disable_tqdm=True, label_names=["labels"],
    )  # fmt: skip
    callback = LayerwatchCallback(run=tmp_path / "run", every=1)
    Trainer(model, arguments, train_dataset=rows, callbacks=[callback]).train()
    run = Run(tmp_path / "run")
    now = effective(model)
    for name in (f"net.{weight}" for weight in WEIGHTS):
        last = run.drift(name).iloc[-1]
        expected = float((now[name] - start[name]).norm() / start[name].norm())
        assert expected > 0.01
        assert last["relative_l2"] == pytest.approx(expected, rel=1e-5)


def test_the_effective_change_has_a_budget(tmp_path: Path) -> None:
    torch.manual_seed(0)
    course = Course(adapted(Net()), tmp_path / "run", drift_limit={"lin": 0.005, "turned": 100.0})
    course.steps(6)
    run = course.close()
    moved = run.drift("lin.weight")
    roles = run.tensors().set_index("tensor")["role"]
    assert (roles["emb.lora_embedding_A.default"], roles["emb.lora_embedding_B.default"]) == (
        "lora_a",
        "lora_b",
    )
    finding = next(f for f in run.findings() if f.problem == "excessive_drift")
    assert finding.layers == ("lin.weight",)
    assert finding.evidence["budget"] == "lin"
    assert finding.evidence["drift"] == pytest.approx(moved["relative_l2"].iloc[-1], rel=1e-3)
    assert finding.evidence["since"] == moved.loc[moved["relative_l2"] > 0.005, "step"].iloc[0]
