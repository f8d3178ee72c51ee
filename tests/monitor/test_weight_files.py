"""Weight files of all kinds, read block by block; damaged ones say what is wrong and give what is left."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from layerwatch.monitor.errors import WeightsError
from layerwatch.monitor.weights import SafetensorsFile, Weights, matched, open_path
from layerwatch.monitor.weights.source import Entry
from layerwatch.weights import open_weights

DTYPES = (
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int8, torch.uint8, torch.bool,
)  # fmt: skip


def some_state() -> dict[str, torch.Tensor]:
    """One tensor of every type, odd sizes, an empty one and a scalar."""
    torch.manual_seed(0)
    state = {}
    for dtype in DTYPES:
        values = torch.randn(7, 5, dtype=torch.complex64 if dtype.is_complex else torch.float64) * 40
        state[f"layers.{str(dtype).removeprefix('torch.')}.weight"] = values.to(dtype)
    return state | {"empty": torch.zeros(0, 3), "scalar": torch.tensor(2.5)}


def numbers(tensor: torch.Tensor) -> np.ndarray:
    """What torch says the elements are."""
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor)
    return tensor.to(torch.float64).reshape(-1).numpy()


def assert_holds(weights: Weights, state: dict[str, torch.Tensor]) -> None:
    assert weights.problems == {}
    assert set(weights.entries) == set(state)
    for name, tensor in state.items():
        entry = weights.entries[name]
        assert (entry.shape, entry.elements) == (tuple(tensor.shape), tensor.numel())
        found = np.concatenate(list(weights.blocks(name, size=4)))
        assert found.tolist() == numbers(tensor).tolist()
        if entry.shape and entry.elements:
            rows = np.concatenate([block for _, block in weights.rows(name, most=11)])
            assert rows.reshape(-1).tolist() == numbers(tensor).tolist()


def write(kind: str, state: dict[str, torch.Tensor], folder: Path) -> Any:
    if kind == "state_dict":
        return state
    if kind in (".pt", ".bin"):
        torch.save(state, folder / f"a{kind}")
        return folder / f"a{kind}"
    if kind == "legacy.pt":
        torch.save(state, folder / kind, _use_new_zipfile_serialization=False)
        return folder / kind
    if kind == "trainer.ckpt":
        torch.save({"epoch": 3, "state_dict": state}, folder / kind)
        return folder / kind
    if kind in (".safetensors", "folder"):
        safetensors.torch.save_file(state, folder / "model.safetensors")
        return folder if kind == "folder" else folder / "model.safetensors"
    assert kind == "sharded"
    names = list(state)
    places = {name: f"model-0000{1 + i % 3}-of-00003.safetensors" for i, name in enumerate(names)}
    for file in set(places.values()):
        safetensors.torch.save_file({n: state[n] for n in names if places[n] == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder


KINDS = ("state_dict", ".pt", ".bin", "legacy.pt", "trainer.ckpt", ".safetensors", "folder", "sharded")


@pytest.mark.parametrize("kind", KINDS)
def test_every_format_gives_every_element_of_every_type(kind: str, tmp_path: Path) -> None:
    state = some_state()
    if kind == "legacy.pt":  # torch's old format knows no float8
        state = {name: tensor for name, tensor in state.items() if "float8" not in name}
    with open_weights(write(kind, state, tmp_path)) as weights:
        assert_holds(weights, state)


def test_arrays_and_modules_are_weights_too() -> None:
    module = torch.nn.Linear(3, 2)
    with open_weights(module) as weights:
        assert_holds(weights, dict(module.state_dict()))
    arrays = {"a": np.arange(6.0).reshape(2, 3), "b": np.array([1 + 2j])}
    with open_weights(arrays) as weights:
        assert np.concatenate(list(weights.blocks("b"))).tolist() == [1, 2]


def test_a_file_cut_short_gives_what_it_still_holds(tmp_path: Path) -> None:
    state = {name: torch.randn(50, 50) for name in ("a", "b", "c")}
    path = tmp_path / "cut.safetensors"
    safetensors.torch.save_file(state, path)
    path.write_bytes(path.read_bytes()[:-6000])
    with SafetensorsFile(path) as weights:
        assert set(weights.entries) == {"a", "b"}
        assert "cut short" in weights.problems["c"]


def test_a_file_that_shrinks_while_it_is_read_is_an_error_and_no_crash(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    safetensors.torch.save_file({"a": torch.randn(500, 500)}, path)
    with SafetensorsFile(path) as weights:
        next(weights.blocks("a", 1000))
        with path.open("r+b") as file:
            file.truncate(5000)
        with pytest.raises(WeightsError, match="has become shorter"):
            weights.stored("a", 200_000, 250_000)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "does not begin with the size"),
        (b"\x00" * 100, "does not begin with the size"),
        ((10**6).to_bytes(8, "little") + b"{}", "ends within its header"),
        ((4).to_bytes(8, "little") + b"oops", "no JSON"),
        (b"PK\x03\x04" + b"\x01" * 50, "does not begin with the size"),
    ],
)
def test_damaged_headers_are_told(content: bytes, words: str, tmp_path: Path) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(WeightsError, match=words):
        SafetensorsFile(path)


def test_damaged_entries_leave_the_others(tmp_path: Path) -> None:
    header = {
        "good": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]},
        "packed": {"dtype": "F4", "shape": [16], "data_offsets": [8, 16]},
        "wrong": {"dtype": "F32", "shape": [3], "data_offsets": [8, 16]},
        "none": {"dtype": "F32"},
    }
    text = json.dumps(header).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(text).to_bytes(8, "little") + text + np.array([1, 2, 3, 4], "<f4").tobytes())
    with SafetensorsFile(path) as weights:
        assert list(weights.entries) == ["good"]
        assert "packed" in weights.problems["packed"]
        assert "damaged" in weights.problems["wrong"]
        assert "damaged" in weights.problems["none"]
        assert weights.values("good", 0, 2).tolist() == [1, 2]


def test_a_missing_shard_costs_its_tensors_only(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.randn(4, 4) for i in range(6)}
    folder = write("sharded", state, tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with open_weights(folder) as weights:
        assert set(weights.entries) == {f"layers.{i}.weight" for i in (0, 2, 3, 5)}
        assert weights.problems["layers.1.weight"] == weights.problems["layers.4.weight"]
        assert weights.problems["layers.1.weight"] == "this shard is missing"


class _Evil:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("this ran",))


def test_a_pickle_with_code_is_refused_and_does_not_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save({"a": torch.ones(2), "b": _Evil()}, tmp_path / "evil.pt")
    with pytest.raises(WeightsError, match="print"):
        open_weights(tmp_path / "evil.pt")
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("left", [0, 700])
def test_a_torch_file_cut_short_is_told(left: int, tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(30, 30).state_dict(), tmp_path / "a.pt")
    (tmp_path / "a.pt").write_bytes((tmp_path / "a.pt").read_bytes()[:left])
    with pytest.raises(WeightsError, match="cut short or damaged"):
        open_weights(tmp_path / "a.pt")


def test_what_is_no_weight_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(WeightsError, match="expected a weight file"):
        open_weights(tmp_path / "notes.txt")
    with pytest.raises(WeightsError, match="does not exist"):
        open_weights(tmp_path / "nothing.safetensors")
    with pytest.raises(WeightsError, match="holds no"):
        open_path(tmp_path)
    with pytest.raises(WeightsError, match="got int"):
        open_weights(3)


@pytest.mark.filterwarnings("ignore:torch.quantize_per_tensor:UserWarning")  # old, and still in files
def test_packed_tensors_and_those_without_data_are_told() -> None:
    state = {
        "w": torch.ones(2),
        "q": torch.quantize_per_tensor(torch.ones(4), 0.1, 0, torch.qint8),
        "meta": torch.ones(3, device="meta"),
        "sparse": torch.eye(3).to_sparse(),
    }
    with open_weights(state) as weights:
        assert list(weights.entries) == ["w"]
        assert set(weights.problems) == {"q", "meta", "sparse"}


def entries(*names: str, shape: tuple[int, ...] = (4, 4)) -> dict[str, Entry]:
    return {name: Entry(name, shape, "float32") for name in names}


def test_names_match_through_wrappers_and_prefixes() -> None:
    bare = entries("embeddings.weight", "encoder.layer.0.weight", "encoder.layer.1.weight", "pooler.weight")
    inside = entries(
        "0.auto_model.embeddings.weight", "0.auto_model.encoder.layer.0.weight",
        "0.auto_model.encoder.layer.1.weight", "1.head.weight",
    )  # fmt: skip
    found = matched(bare, inside)
    assert found.pairs == {
        name: (name, f"0.auto_model.{name}")
        for name in ("embeddings.weight", "encoder.layer.0.weight", "encoder.layer.1.weight")
    }
    assert (found.only_in_a, found.only_in_b) == (["pooler.weight"], ["1.head.weight"])
    wrapped = entries("module._orig_mod.encoder.layer.0.weight", "module._orig_mod.new.weight")
    assert matched(bare, wrapped).pairs == {
        "encoder.layer.0.weight": ("encoder.layer.0.weight", "module._orig_mod.encoder.layer.0.weight")
    }


def test_layers_of_other_depth_are_not_taken_for_each_other() -> None:
    """`a.0.weight` is not `a.1.weight`: numbers are no prefixes of their own."""
    found = matched(entries("a.0.weight", "a.2.weight"), entries("a.1.weight", "a.2.weight"))
    assert found.pairs == {"a.2.weight": ("a.2.weight", "a.2.weight")}


def test_a_layer_more_is_not_matched_to_another_one() -> None:
    a = entries("enc.layers.0.mlp.weight", "enc.layers.1.mlp.weight")
    b = entries("enc.layers.0.mlp.weight", "enc.layers.2.mlp.weight")
    found = matched(a, b)
    assert list(found.pairs) == ["enc.layers.0.mlp.weight"]
    assert found.only_in_b == ["enc.layers.2.mlp.weight"]


def test_both_sides_may_have_prefixes_of_their_own() -> None:
    names = [f"layers.{i}.attention.weight" for i in range(4)]
    found = matched(
        entries(*(f"bert.{n}" for n in names)), entries(*(f"0.auto.{n}" for n in names), "new.weight")
    )
    assert list(found.pairs.values()) == [(f"bert.{n}", f"0.auto.{n}") for n in names]
    assert found.only_in_b == ["new.weight"]


def test_a_mixture_of_thousands_of_experts_is_matched_in_seconds() -> None:
    """15,360 tensors of one shape under another prefix: nothing here may look at all pairs."""
    names = [
        f"layers.{i}.experts.{j}.{part}.weight"
        for i in range(20) for j in range(256) for part in ("gate", "up", "down")
    ]  # fmt: skip
    found = matched(entries(*names), entries(*(f"model.{n}" for n in names)))
    assert (len(found.pairs), found.only_in_a, found.only_in_b) == (len(names), [], [])
