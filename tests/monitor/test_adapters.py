"""Adapters from files: the change without the product, against the product and against what PEFT merges."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from numpy.typing import NDArray
from peft import IA3Config, LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers.pytorch_utils import Conv1D

from layerwatch import open_adapted
from layerwatch.monitor.errors import WeightsError
from layerwatch.monitor.weights import Adapted, LowRank, Weights, adapter_of, effective
from layerwatch.weights import open_weights

pytestmark = pytest.mark.filterwarnings("ignore:.*:UserWarning:peft")  # it tells its settings' side effects


class Net(nn.Module):
    """A layer of every kind that PEFT adapts, odd sizes; one that is square, one that is trained whole."""

    def __init__(self) -> None:
        super().__init__()
        self.emb, self.lin, self.square = nn.Embedding(11, 6), nn.Linear(6, 5), nn.Linear(6, 6)
        self.conv, self.line, self.point = nn.Conv2d(4, 8, 3), nn.Conv1d(4, 8, 3), nn.Conv2d(4, 8, 1)
        self.attn, self.head = nn.MultiheadAttention(6, 2), nn.Linear(5, 2)


class Turned(nn.Module):
    """Layers that store (in, out), as GPT-2 does."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.square = Conv1D(7, 6), Conv1D(6, 6)


class Both(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.turned, self.straight, self.square = Conv1D(7, 6), nn.Linear(6, 5), nn.Linear(6, 6)


LAYERS = ["emb", "lin", "square", "conv", "line", "point", "attn"]
CASES: dict[str, tuple[type[nn.Module], dict[str, Any]]] = {
    "every kind": (Net, {"target_modules": LAYERS, "modules_to_save": ["head"]}),
    "rank-stabilised": (Net, {"target_modules": ["lin", "conv"], "use_rslora": True, "lora_alpha": 5}),
    "patterns": (Net, {
        "target_modules": ["lin", "square", "attn"], "rank_pattern": {"lin": 4},
        "alpha_pattern": {"s.*e": 30, "^lin": 3},
    }),
    "biases": (Net, {"target_modules": ["lin"], "bias": "lora_only", "lora_bias": True}),
    "all biases": (Net, {"target_modules": ["lin"], "bias": "all"}),
    "turned": (Turned, {"target_modules": ["wide", "square"], "fan_in_fan_out": True}),
    "turned, untold": (Turned, {"target_modules": ["wide", "square"]}),
    "straight and turned": (Both, {"target_modules": ["turned", "straight", "square"]}),
    "dora": (Net, {"target_modules": ["lin", "square", "conv", "line"], "use_dora": True}),
    "a parameter": (Net, {"target_modules": [], "target_parameters": ["lin.weight"]}),
}  # fmt: skip


def trained(case: str) -> tuple[nn.Module, PeftModel]:
    """A base model and the same one with an adapter whose tensors are all random."""
    kind, settings = CASES[case]
    torch.manual_seed(0)
    base, model = kind(), kind()
    model.load_state_dict(base.state_dict())
    model = get_peft_model(model, LoraConfig(r=3, lora_alpha=7, **settings) if "lora_alpha" not in settings
                           else LoraConfig(r=3, **settings))  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.rand_like(parameter))
    return base, model


def whole(weights: Weights, name: str, size: int = 7) -> NDArray[np.floating]:
    """In blocks whose edges are no rows' edges."""
    return np.concatenate(list(weights.blocks(name, size)))


def assert_is(weights: Weights, state: dict[str, torch.Tensor], names: Callable[[str], str] = str) -> None:
    for name in weights.entries:
        expected = state[names(name)].double().reshape(-1).numpy()
        for size in (7, 1 << 20):
            assert whole(weights, name, size) == pytest.approx(expected, rel=2e-6, abs=2e-6), name


@pytest.mark.parametrize("case", CASES)
def test_an_adapter_is_what_peft_merges(case: str, tmp_path: Path) -> None:
    base, model = trained(case)
    model.save_pretrained(str(tmp_path))
    merged = model.merge_and_unload().state_dict()
    with open_adapted(base, tmp_path) as found:
        assert found.problems == {}
        assert set(found.entries) == set(merged)
        assert_is(found, merged)
        changed = {
            name for name, tensor in merged.items() if not torch.equal(tensor, base.state_dict()[name])
        }
        assert changed
        assert set(found.adapted) <= changed


@pytest.mark.parametrize("case", [case for case in CASES if case not in ("a parameter", "patterns")])
def test_a_checkpoint_that_holds_base_and_adapter(case: str) -> None:
    """`base_layer.weight` and `lora_A.default.weight` side by side; alpha is not in there."""
    base, model = trained(case)
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    config = model.peft_config["default"]
    assert isinstance(config, LoraConfig)
    merged = {**base.state_dict(), **model.merge_and_unload().state_dict()}
    with open_weights(state) as weights:
        adapter = adapter_of(weights)
        assert adapter is not None
        assert adapter.holds_base
        assert not adapter.pairs
        assert all("adapter_config.json" in why for why in adapter.problems.values())
        weights.metadata["adapter_config"] = json.loads(json.dumps(config.to_dict(), default=list))
        found = effective(weights)
        assert isinstance(found, Adapted)
        assert found.problems == {}
        assert not any("lora" in name or "original_module" in name for name in found.entries)
        assert_is(found, merged, _plain)


def _plain(name: str) -> str:
    for part in ("base_model.model.", "base_layer.", "modules_to_save.default."):
        name = name.replace(part, "")
    return name


def loralib(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {"block.lin.lora_A": a, "block.lin.lora_B": b}


def kohya(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    owner = "lora_unet_block_lin"
    return {f"{owner}.lora_down.weight": a, f"{owner}.lora_up.weight": b, f"{owner}.alpha": torch.tensor(8.0)}


def diffusers(a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    owner = "unet.block.lin"
    return {f"{owner}.lora.down.weight": a * 4, f"{owner}.lora.up.weight": b}


@pytest.mark.parametrize(("layout", "alpha"), [(loralib, 8.0), (kohya, None), (diffusers, None)])
def test_other_layouts(
    layout: Callable[[torch.Tensor, torch.Tensor], dict[str, torch.Tensor]], alpha: float | None
) -> None:
    torch.manual_seed(0)
    base = {"block.lin.weight": torch.randn(5, 6), "block.other.weight": torch.randn(3)}
    a, b = torch.randn(2, 6), torch.randn(5, 2)
    with open_adapted(base, layout(a, b), alpha=alpha) as found:
        assert found.problems == {}
        assert_is(found, base | {"block.lin.weight": base["block.lin.weight"] + 4 * b @ a})
    together = base | loralib(a, b)
    with open_adapted(together, together, alpha=8) as found:  # loralib's own checkpoints
        assert list(found.entries) == list(base)
        assert_is(found, base | {"block.lin.weight": base["block.lin.weight"] + 4 * b @ a})


def products() -> Iterator[LowRank]:
    draw = np.random.default_rng(0)
    for n, m, r in ((7, 5, 2), (5, 9, 5), (3, 4, 6), (40, 30, 1)):
        for dtype in (np.float32, np.float64):
            left, right = draw.normal(size=(n, r)).astype(dtype), draw.normal(size=(r, m)).astype(dtype)
            yield LowRank(left, right, -1.7)
    yield LowRank(np.zeros((4, 2), np.float32), draw.normal(size=(2, 3)), 2.0)
    same = draw.normal(size=(4, 1))
    yield LowRank(np.hstack([same, same]), draw.normal(size=(2, 3)), 2.0)  # of rank 1


@pytest.mark.parametrize("product", list(products()))
def test_closed_forms_are_those_of_the_product(product: LowRank) -> None:
    truth = -1.7 * product.left.astype(np.float64) @ product.right.astype(np.float64)
    truth *= product.scale / -1.7
    values = np.linalg.svd(truth, compute_uv=False)
    assert product.shape == truth.shape
    assert product.norm == pytest.approx(np.linalg.norm(truth), rel=1e-12)
    found = product.singular_values
    assert found == pytest.approx(values[: len(found)], rel=1e-10, abs=1e-13 * values.max())
    assert values[len(found) :] == pytest.approx(0.0, abs=1e-12)
    assert product.rank == np.linalg.matrix_rank(truth, rtol=1e-6)
    if values[0] > 0:
        assert product.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-10)
    weight = np.random.default_rng(1).normal(size=truth.shape)
    dot, squares = product.dot((i, weight[i : i + 2]) for i in range(0, len(weight), 2))
    assert dot == pytest.approx((weight * truth).sum(), rel=1e-10, abs=1e-12)
    assert squares == pytest.approx((weight**2).sum())
    flat = truth.reshape(-1)
    for start, stop in (
        (0, flat.size),
        (1, flat.size - 1),
        (2, 3),
        (4, 4),
        (product.shape[1] - 1, product.shape[1] + 1),
    ):
        expected = flat[start:stop]
        assert product.part(start, stop) == pytest.approx(expected, rel=1e-5, abs=1e-5 * values[0] + 1e-300)


def test_the_change_relative_to_the_base() -> None:
    """|BA|, <W0, BA>, cosine and ranks without the product, for every kind of layer."""
    base, model = trained("every kind")
    state = base.state_dict()
    state = {name: tensor.double() for name, tensor in state.items()}
    adapter = model.state_dict()
    adapter = {name: tensor.double() for name, tensor in adapter.items() if "lora_" in name}
    with open_adapted(state, adapter, alpha=7) as found:
        assert len(found.adapted) == len(LAYERS) + 1  # attention has two
        for name in found.adapted:
            change, entry = found.change(name), found.entries[name]
            assert change is not None
            w0 = state[name].reshape(-1).numpy()
            moved = whole(found, name) - w0
            assert change.norm == pytest.approx(np.linalg.norm(moved), rel=1e-9)
            assert change.dot == pytest.approx(w0 @ moved, rel=1e-8, abs=1e-9)
            assert change.relative_l2 == pytest.approx(np.linalg.norm(moved) / np.linalg.norm(w0), rel=1e-9)
            both = np.linalg.norm(w0) * np.linalg.norm(w0 + moved)
            assert change.cosine == pytest.approx(w0 @ (w0 + moved) / both, rel=1e-9)
            values = np.linalg.svd(moved.reshape(entry.shape[0], -1), compute_uv=False)
            assert change.singular_values == pytest.approx(values[:3], rel=1e-8)
            assert change.stable_rank == pytest.approx((values**2).sum() / values[0] ** 2, rel=1e-8)
            assert change.rank == 3


def test_values_are_as_precise_as_a_merge_in_float32() -> None:
    """Also of a base in half the bits, which a merge in its own type would round."""
    torch.manual_seed(0)
    base = torch.randn(50, 60).bfloat16()
    a, b = torch.randn(2, 60), 1e-3 * torch.randn(50, 2)
    with open_adapted({"w.weight": base}, {"w.lora_A": a, "w.lora_B": b}, alpha=2) as found:
        values = whole(found, "w.weight")
        assert (found.entries["w.weight"].dtype, values.dtype) == ("bfloat16", np.float32)
        truth = (base.double() + b.double() @ a.double()).flatten().numpy()
        assert np.abs(values - truth).max() <= 2.0**-22
    with open_adapted({"w.weight": base.double()}, {"w.lora_A": a, "w.lora_B": b}, alpha=2) as found:
        assert whole(found, "w.weight").dtype == np.float64


def test_no_large_matrix_is_made(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a large adapted weight: never more rows of the product than a block touches."""
    sizes = []
    part = LowRank.part

    def spied(product: LowRank, start: int, stop: int) -> NDArray[np.floating]:
        sizes.append(stop - start)
        return part(product, start, stop)

    monkeypatch.setattr(LowRank, "part", spied)
    base = {"w.weight": np.zeros((300, 400), np.float32)}
    adapter = {"w.lora_A": np.ones((2, 400), np.float32), "w.lora_B": np.ones((300, 2), np.float32)}
    with open_adapted(base, adapter, alpha=2) as found:
        assert whole(found, "w.weight", 1000).tolist() == [2.0] * 120_000
        assert max(sizes) == 1000
        rows = dict(found.rows("w.weight", 800))
        assert {block.shape for block in rows.values()} == {(2, 400)}


def folder(tmp_path: Path, config: dict[str, Any], state: dict[str, torch.Tensor] | None = None) -> Path:
    state = state or {"base_model.model.lin.lora_A.weight": torch.ones(2, 6),
                      "base_model.model.lin.lora_B.weight": torch.ones(5, 2)}  # fmt: skip
    safetensors.torch.save_file(state, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "lora_alpha": 4} | config))
    return tmp_path


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"peft_type": "LOHA"}, "got type LOHA: merge it"),
        ({"use_qalora": True}, "got use_qalora: merge it"),
        ({"init_lora_weights": "pissa_niter_4"}, "changed the base weights before training"),
        ({"init_lora_weights": "olora"}, "changed the base weights before training"),
    ],
)
def test_what_is_not_covered_is_told(config: dict[str, Any], words: str, tmp_path: Path) -> None:
    with open_weights(folder(tmp_path, config)) as weights:
        adapter = adapter_of(weights)
    assert adapter is not None
    assert adapter.pairs == {}
    assert words in adapter.problems["adapter_config.json"]
    with pytest.raises(WeightsError, match="cannot be applied"):
        open_adapted({"lin.weight": torch.ones(5, 6)}, tmp_path)


def test_other_methods_of_peft_are_told(tmp_path: Path) -> None:
    config: PeftConfig = IA3Config(target_modules=["lin"], feedforward_modules=[])
    get_peft_model(Net(), config).save_pretrained(str(tmp_path))
    with pytest.raises(WeightsError, match="type IA3"):
        open_adapted(Net(), tmp_path)


def test_what_does_not_fit_is_told_and_the_rest_applied(tmp_path: Path) -> None:
    base, model = trained("every kind")
    state = {n: t.clone() for n, t in base.state_dict().items()}
    model.save_pretrained(str(tmp_path))
    file = tmp_path / "adapter_model.safetensors"
    tensors = safetensors.torch.load_file(file)
    del tensors["base_model.model.conv.lora_B.weight"]
    tensors["base_model.model.square.lora_B.weight"] = torch.ones(6, 4)
    tensors["base_model.model.line.lora_A.weight"] = torch.ones(3, 4, 3, dtype=torch.int32)
    tensors["base_model.model.gone.lora_A.weight"] = torch.ones(3, 4)
    tensors["base_model.model.gone.lora_B.weight"] = torch.ones(4, 3)
    safetensors.torch.save_file(tensors, file)
    state["point.weight"] = torch.ones(8, 2, dtype=torch.uint8)
    state["emb.weight"] = torch.ones(12, 6)
    with open_adapted(state, tmp_path) as found:
        assert {name: why.split(",")[0] for name, why in found.problems.items()} == {
            "conv": "its factor B is missing or cannot be read",
            "square": "expected factors of (r",
            "line": "expected factors of floating-point numbers",
            "gone": "the base has no tensor that it changes",
            "point": "the base weight is packed or quantised (uint8): give the base as it was before that",
            "emb": "it changes a weight of (6",
        }
        assert set(found.adapted) == {"lin.weight", "attn.in_proj_weight", "attn.out_proj.weight"}
        assert whole(found, "conv.weight").tolist() == state["conv.weight"].reshape(-1).tolist()
        with pytest.raises(WeightsError, match="ask for its values"):
            found.stored("lin.weight", 0, 1)


def test_damaged_files(tmp_path: Path) -> None:
    (folder(tmp_path, {}) / "adapter_config.json").write_text("{oops")
    with pytest.raises(WeightsError, match=r"adapter_config\.json"):
        open_adapted({"lin.weight": torch.ones(5, 6)}, tmp_path)
    file = folder(tmp_path, {}) / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-8])
    with pytest.raises(WeightsError, match="cut short"):
        open_adapted({"lin.weight": torch.ones(5, 6)}, tmp_path)


def test_several_adapters_are_chosen_by_name() -> None:
    state = {f"lin.lora_{p}.{who}.weight": torch.full((2, 2), v)
             for who, v in (("one", 1.0), ("two", 2.0)) for p in "AB"}  # fmt: skip
    base = {"lin.weight": torch.zeros(2, 2)}
    with pytest.raises(WeightsError, match="one of the adapters one, two, got None: pass name="):
        open_adapted(base, state, alpha=2)
    with pytest.raises(WeightsError, match="got three"):
        open_adapted(base, state, alpha=2, name="three")
    with open_adapted(base, state, alpha=2, name="two") as found:
        assert whole(found, "lin.weight").tolist() == [8.0] * 4
        assert found.problems == {"lin (one)": "another adapter than two: not applied"}


def test_zeros_and_what_is_not_finite_have_no_ratio() -> None:
    adapter = {"w.lora_A": torch.ones(2, 3), "w.lora_B": torch.zeros(4, 2)}
    with open_adapted({"w.weight": torch.zeros(4, 3)}, adapter, alpha=1) as found:
        change = found.change("w.weight")
    assert change is not None
    assert (change.norm, change.rank, change.stable_rank) == (0.0, 0, None)
    assert (change.relative_l2, change.cosine) == (None, None)
    adapter["w.lora_B"][1, 1] = float("nan")
    with open_adapted({"w.weight": torch.ones(4, 3)}, adapter, alpha=1) as found:
        change = found.change("w.weight")
        assert np.isnan(whole(found, "w.weight")).sum() == 3
    assert change is not None
    assert (change.relative_l2, change.cosine, change.stable_rank) == (None, None, None)


def test_what_holds_no_adapter_is_as_it_is() -> None:
    with open_weights({"a": torch.ones(2)}) as weights:
        assert adapter_of(weights) is None
        assert effective(weights) is weights
    with pytest.raises(WeightsError, match="expected an adapter"):
        open_adapted({"a": torch.ones(2)}, {"a": torch.ones(2)})
    alone = open_weights({"w.lora_A": torch.ones(2, 3), "w.lora_B": torch.ones(4, 2)})
    with pytest.raises(WeightsError, match="expected the weights of its base model"):
        effective(alone)
