"""Digests of files and tensors: what the standard tools say, the same in every container."""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from test_weight_files import some_state, write

from layerwatch.hooks.torch_file import TorchFile
from layerwatch.monitor.errors import WeightsError
from layerwatch.monitor.weights import digests
from layerwatch.monitor.weights.digests import (
    FileDigest,
    digests_of,
    sha256_of_file,
    sha256_of_files,
    sha256_of_set,
    weight_files,
)
from layerwatch.weights import open_weights

State = dict[str, torch.Tensor]


def slowly(tensor: torch.Tensor) -> str:
    """The definition: type, shape, elements one after the other."""
    head = f"{str(tensor.dtype).removeprefix('torch.')} {','.join(map(str, tensor.shape))}\n".encode()
    flat = tensor.contiguous().reshape(-1)
    elements = b"".join(bytes(element.reshape(1).view(torch.uint8).tolist()) for element in flat)
    return hashlib.sha256(head + elements).hexdigest()


@pytest.mark.parametrize("kind", ["state_dict", ".pt", "trainer.ckpt", ".safetensors", "sharded"])
def test_tensors_have_the_same_digests_in_every_container(kind: str, tmp_path: Path) -> None:
    state = some_state()
    wanted = {name: slowly(tensor) for name, tensor in state.items()}
    with open_weights(write(kind, state, tmp_path)) as weights:
        found, problems = digests_of(weights)
    assert problems == {}
    assert {name: digest.sha256 for name, digest in found.items()} == wanted
    with open_weights(state) as weights:
        assert sha256_of_set(found) == sha256_of_set(digests_of(weights)[0])


def test_the_set_tells_everything_but_wrappers_and_order() -> None:
    def of(state: State) -> str:
        return sha256_of_set(digests_of(open_weights(state))[0])

    state = {"a": torch.randn(3, 4), "b": torch.randn(3, 4)}
    one = of(state)
    assert of({f"module.{name}": state[name] for name in ("b", "a")}) == one
    others = [
        {"a": state["b"], "b": state["a"]}, {"a": state["a"]}, {**state, "c": torch.zeros(1)},
        {**state, "a": state["a"].reshape(4, 3)}, {**state, "a": state["a"].view(torch.int32)},
    ]  # fmt: skip
    assert len({of(other) for other in others} | {one}) == 1 + len(others)


def test_several_files_have_the_digest_that_the_usual_tool_gives(tmp_path: Path) -> None:
    folder = write("sharded", some_state(), tmp_path)
    (folder / "optimizer.pt").write_bytes(b"no weights")
    files = weight_files(folder)
    assert {p.name for p in files} == {p.name for p in folder.iterdir()} - {"optimizer.pt"}
    found = []
    for path in files:
        with path.open("rb", buffering=0) as file:
            sha256, size = sha256_of_file(file)
        assert size == path.stat().st_size
        found.append(FileDigest(path.name, size, sha256))
    names = sorted(p.name for p in files)
    lines = subprocess.run(["sha256sum", *names], cwd=folder, capture_output=True, check=True).stdout
    assert sha256_of_files(found) == hashlib.sha256(lines).hexdigest()
    assert sha256_of_files(found[:1]) == found[0].sha256


def test_which_files_are_the_weights(tmp_path: Path) -> None:
    assert weight_files(tmp_path / "nothing.pt") == []
    (tmp_path / "a.pt").write_bytes(b"")
    (tmp_path / "b.ckpt").write_bytes(b"")
    (tmp_path / "config.json").write_text("{}")
    assert [p.name for p in weight_files(tmp_path)] == ["a.pt", "b.ckpt"]
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert [p.name for p in weight_files(tmp_path)] == ["model.safetensors"]
    (tmp_path / "model.safetensors.index.json").write_text("no JSON")
    assert [p.name for p in weight_files(tmp_path)] == ["model.safetensors.index.json"]
    other = tmp_path / "distributed"
    (other / "part").mkdir(parents=True)
    for name in (".metadata", "part/__0_0.distcp"):
        (other / name).write_bytes(b"")
    assert weight_files(other) == [other / ".metadata", other / "part/__0_0.distcp"]


def test_a_folder_that_is_no_checkpoint_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(digests, "MOST_FILES", 3)
    for number in range(4):
        (tmp_path / f"{number}.jpg").write_bytes(b"")
    with pytest.raises(OSError, match="at most 3 files"):
        weight_files(tmp_path)


def test_reading_can_be_stopped(tmp_path: Path) -> None:
    (tmp_path / "a.bin").write_bytes(bytes(1 << 21))
    with (tmp_path / "a.bin").open("rb", buffering=0) as file, pytest.raises(InterruptedError):
        sha256_of_file(file, lambda: True)
    with pytest.raises(InterruptedError):
        digests_of(open_weights({"a": torch.ones(3)}), lambda: True)


def odd_state() -> State:
    """What a state_dict may hold besides whole tensors: views of all sorts."""
    base = torch.arange(24.0)
    return some_state() | {
        "transposed": torch.randn(5, 7).t(), "transposed_bf16": torch.randn(4, 6).bfloat16().t(),
        "transposed_complex": torch.randn(3, 4, dtype=torch.complex64).t(),
        "expanded": torch.ones(1, 3).expand(4, 3), "sliced": base[3:20:5],
        "shared": base, "block": base.reshape(4, 6)[1:3, 2:5],
    }  # fmt: skip


def test_a_file_of_torch_is_read_without_mapping_it(tmp_path: Path) -> None:
    state = odd_state()
    torch.save({"state_dict": state, "optimizer": {"step": torch.tensor(3.0)}}, tmp_path / "a.ckpt")
    with TorchFile(tmp_path / "a.ckpt") as weights:
        assert weights.problems == {}
        assert str(tmp_path) not in Path("/proc/self/maps").read_text()
        for name, tensor in state.items():
            parts = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            found = np.concatenate(list(weights.blocks(name, size=4)))
            assert found.tolist() == parts.to(torch.float64).reshape(-1).tolist(), name
        found_digests = digests_of(weights)[0]
    assert {name: digest.sha256 for name, digest in found_digests.items()} == {
        name: slowly(tensor) for name, tensor in state.items()
    }


def test_a_file_of_torch_that_is_written_over_gives_an_error(tmp_path: Path) -> None:
    """Where a mapping would end the process."""
    path = tmp_path / "a.pt"
    torch.save({"a": torch.randn(300, 300), "odd": torch.eye(3).to_sparse()}, path)
    with TorchFile(path) as weights:
        assert list(weights.entries) == ["a"]
        assert "packed" in weights.problems["odd"]
        path.write_bytes(b"short")
        with pytest.raises(WeightsError, match="has become shorter"):
            weights.stored("a", 50_000, 90_000)


class _Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (print, ("this ran",))


@pytest.mark.parametrize("kind", ["missing", "text", "legacy", "code", "cut", "empty"])
def test_what_is_no_file_of_torch_is_told(
    kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "a.pt"
    if kind == "text":
        path.write_text("x")
    elif kind in ("legacy", "cut", "empty", "code"):
        state: dict[str, object] = {"a": torch.randn(30, 30)} if kind != "empty" else {"epoch": 3}
        if kind == "code":
            state["b"] = _Evil()
        torch.save(state, path, _use_new_zipfile_serialization=kind != "legacy")
        if kind == "cut":
            path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(WeightsError, match=r"a\.pt"):
        TorchFile(path)
    assert capsys.readouterr().out == ""


def test_shards_that_lack_are_problems(tmp_path: Path) -> None:
    state = {f"layers.{i}.weight": torch.randn(4, 4) for i in range(6)}
    folder = write("sharded", state, tmp_path)
    (folder / "model-00002-of-00003.safetensors").unlink()
    with open_weights(folder) as weights:
        found, problems = digests_of(weights)
    assert len(found) == 4
    assert problems["layers.1.weight"] == "this shard is missing"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    assert len(weight_files(folder)) == len(set(index["weight_map"].values()))  # two shards and the index


def test_a_damaged_tensor_is_a_problem_and_the_others_are_not(tmp_path: Path) -> None:
    path = tmp_path / "cut.safetensors"
    safetensors.torch.save_file({name: torch.randn(50, 50) for name in ("a", "b", "c")}, path)
    path.write_bytes(path.read_bytes()[:-6000])
    with open_weights(path) as weights:
        found, problems = digests_of(weights)
    assert set(found) == {"a", "b"}
    assert "cut short" in problems["c"]
