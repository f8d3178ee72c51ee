"""`layerwatch verify` and `layerwatch lineage`: where weights come from, and what was done to them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from layerwatch import lineage, verify
from layerwatch.cli import main
from layerwatch.monitor.lineage import Records, write_record
from layerwatch.monitor.weights.digests import digests_of, sha256_of_file, sha256_of_set
from layerwatch.weights import open_weights

State = dict[str, torch.Tensor]


def state(seed: int) -> State:
    """An embedding, two layers and a head."""
    drawn = torch.Generator().manual_seed(seed)
    shapes = {
        "embed.weight": (40, 8), "layers.0.weight": (8, 8), "layers.0.bias": (8,), "layers.1.weight": (8, 8),
        "head.weight": (3, 8),
    }  # fmt: skip
    return {name: torch.randn(*shape, generator=drawn) for name, shape in shapes.items()}


def record(
    run: str, step: int, path: str, parent: Mapping[str, Any] | None = None, **facts: Any
) -> dict[str, Any]:
    """What a training records of this file; the run need hold nothing else."""
    Path(run).mkdir(parents=True, exist_ok=True)
    (Path(run) / "run.json").write_text("{}")
    with Path(path).open("rb", buffering=0) as file:
        sha256, size = sha256_of_file(file)
    with open_weights(path) as weights:
        tensors, unread = digests_of(weights)
    found = {
        "version": 1, "run": Path(run).name, "run_created": 1.0, "session": 0, "step": step,
        "next_step": step + 1, "time": 1e9 + step, "path": str(Path(path).absolute()), "sha256": sha256,
        "size": size,
        "files": [{"name": Path(path).name, "size": size, "sha256": sha256}],
        "weights_sha256": sha256_of_set(tensors), "dtypes": {}, "unread": unread,
        "tensors": {name: str(digest) for name, digest in tensors.items()}, "tied": [],
        "git_commit": "c0ffee" * 6, "seed": 7, "config": {}, "data": "corpus v3", "parent": parent, **facts,
    }  # fmt: skip
    write_record(Path(run), found, f"s0-{step:06d}")
    return found


def parent_of(found: Mapping[str, Any], how: str = "before") -> dict[str, Any]:
    return {"how": how, "run": found["run"], **{k: found[k] for k in ("path", "sha256", "weights_sha256")}}


@pytest.fixture
def chain() -> list[dict[str, Any]]:
    """pretrained (not recorded) -> runs/a at steps 5 and 9 -> runs/b at step 2; an unrelated runs/c."""
    for seed, name in enumerate(("base", "a5", "a9", "b2", "other")):
        torch.save(state(seed), f"{name}.pt")
    reference = {"how": "reference", "path": "base.pt", "sha256": "0" * 64, "weights_sha256": None}
    a5 = record("runs/a", 5, "a5.pt", reference)
    a9 = record("runs/a", 9, "a9.pt", parent_of(a5))
    b2 = record("runs/group/b", 2, "b2.pt", parent_of(a9, "reference"), time=2e9)
    return [a5, a9, b2, record("runs/c", 1, "other.pt")]


def asked(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, Any]:
    code = main([*words, "--format", "json"])
    return code, json.loads(capsys.readouterr().out)


def said(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str]:
    code = main(words)
    return code, " ".join(capsys.readouterr().out.split())


def test_the_very_file(chain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copy("a9.pt", "renamed.bin")
    code, found = asked(capsys, "verify", "renamed.bin")
    assert (code, found["status"]) == (0, "identical")
    assert (found["checkpoint"]["run"], found["checkpoint"]["step"]) == ("runs/a", 9)
    assert found["checkpoint"]["sha256"] == found["sha256"] == chain[1]["sha256"]
    assert "tensors" not in found["checkpoint"]
    assert found["searched"] == {"runs": 3, "checkpoints": 4}
    code, text = said(capsys, "verify", "renamed.bin")
    assert code == 0
    assert "renamed.bin: identical to the checkpoint of step 9 of runs/a" in text
    for fact in ("corpus v3", "c0ffee", chain[1]["sha256"], "a5.pt (before)"):
        assert fact in text


@pytest.mark.parametrize("container", [".safetensors", "sharded", ".ckpt", "prefix", "memory"])
def test_the_same_weights_elsewhere(
    container: str, chain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    weights, path = state(2), "copy" + container
    if container == ".safetensors":
        safetensors.torch.save_file(weights, path, {"note": "exported"})
    elif container == ".ckpt":
        torch.save({"state_dict": {f"module.{k}": v for k, v in weights.items()}, "epoch": 3}, path)
    elif container == "prefix":
        path = "prefix.pt"
        torch.save({f"model.encoder.{k}": v for k, v in weights.items()}, path)
    elif container == "sharded":
        Path(path).mkdir()
        places = {name: f"{number % 2}.safetensors" for number, name in enumerate(weights)}
        for file in set(places.values()):
            part = {name: weights[name] for name in weights if places[name] == file}
            safetensors.torch.save_file(part, f"{path}/{file}")
        (Path(path) / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))
    if container == "memory":
        verdict = verify(weights)
        assert (verdict.status, verdict.sha256) == ("same_weights", None)
        assert verdict.checkpoint is not None
        assert verdict.checkpoint.step == 9
        return
    code, found = asked(capsys, "verify", path)
    assert (code, found["status"], found["checkpoint"]["step"]) == (0, "same_weights", 9)
    code, text = said(capsys, "verify", path)
    assert "the same weights as the checkpoint of step 9 of runs/a" in text


def test_exactly_what_was_altered(chain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    weights = state(2)
    weights["layers.0.weight"][3, 3] += 1e-6
    weights["layers.1.weight"] = weights["layers.1.weight"].half()
    weights["head.weight"] = torch.zeros(5, 8)
    del weights["layers.0.bias"]
    torch.save(weights | {"new.bias": torch.zeros(2)}, "edited.pt")
    code, found = asked(capsys, "verify", "edited.pt")
    assert (code, found["status"], found["checkpoint"]["step"]) == (1, "altered", 9)
    difference = found["difference"]
    numbers = sum(v.numel() for v in state(2).values())
    assert difference.pop("share") == pytest.approx(320 / numbers)
    assert difference == {
        "equal": 1, "altered": ["layers.0.weight"], "retyped": {"layers.1.weight": ["float32", "float16"]},
        "reshaped": {"head.weight": [[3, 8], [5, 8]]}, "missing": ["layers.0.bias"], "added": ["new.bias"],
        "aliases": [], "unread": {},
    }  # fmt: skip
    code, text = said(capsys, "verify", "edited.pt")
    assert code == 1
    for words in (
        "edited.pt: altered: the checkpoint of step 9 of runs/a, of which 1 of 5 tensors, with 66.7% of the",
        "layers.0.weight altered", "layers.1.weight type float32 became float16", "layers.0.bias missing",
        "head.weight shape (3, 8) became (5, 8)", "new.bias added",
    ):  # fmt: skip
        assert words in text


def test_a_single_flipped_bit_is_found(
    chain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.torch.save_file(state(2), "copy.safetensors")
    content = bytearray(Path("copy.safetensors").read_bytes())
    content[-1] ^= 1
    Path("copy.safetensors").write_bytes(content)
    with safetensors.safe_open("copy.safetensors", "pt") as file:
        last = list(file.offset_keys())[-1]
    code, found = asked(capsys, "verify", "copy.safetensors")
    assert (code, found["difference"]["altered"], found["difference"]["equal"]) == (1, [last], 4)


def test_damaged_files_are_compared_as_far_as_they_can_be_read(
    chain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    safetensors.torch.save_file(state(2), "cut.safetensors")
    Path("cut.safetensors").write_bytes(Path("cut.safetensors").read_bytes()[:-100])
    code, found = asked(capsys, "verify", "cut.safetensors")
    assert (code, found["status"]) == (1, "altered")
    (lost,) = found["difference"]["unread"]
    assert "cut short" in found["difference"]["unread"][lost]
    assert lost not in found["difference"]["missing"]
    Path("a9.pt").write_bytes(Path("a9.pt").read_bytes()[:-100])  # where it was recorded
    code, found = asked(capsys, "verify", "a9.pt")
    assert (code, found["status"], found["checkpoint"]["step"]) == (1, "unknown", 9)
    assert "cannot be read" in found["unread"]["a9.pt"]


def test_unknown_weights(chain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    torch.save(state(99), "mine.pt")
    code, found = asked(capsys, "verify", "mine.pt")
    assert (code, found["status"], found["checkpoint"], found["difference"]) == (1, "unknown", None, None)
    code, text = said(capsys, "verify", "mine.pt")
    assert "unknown: 4 checkpoints of 3 runs were searched, and none has a tensor of it" in text
    torch.save(state(99) | {"head.weight": state(2)["head.weight"]}, "head.pt")
    code, found = asked(capsys, "verify", "head.pt")
    assert (code, found["status"], found["checkpoint"]["step"]) == (1, "unknown", 9)  # the nearest
    code, text = said(capsys, "lineage", "head.pt")
    assert code == 1
    assert "no run that was searched has recorded these weights" in text


def test_the_chain_of_parents(chain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    safetensors.torch.save_file(state(3), "b.safetensors")
    code, found = asked(capsys, "lineage", "b.safetensors")
    assert (code, found["status"]) == (0, "same_weights")
    wanted = [("runs/group/b", 2), ("runs/a", 9), ("runs/a", 5)]
    assert [(c["run"], c["step"]) for c in found["chain"]] == wanted
    assert all(c["data"] == "corpus v3" and c["seed"] == 7 for c in found["chain"])
    assert "base.pt" in found["end"]
    assert "no run that was searched has recorded it" in found["end"]
    code, text = said(capsys, "lineage", "b.safetensors")
    assert code == 0
    rows = ("this runs/group/b 2", "reference runs/a 9", "before runs/a 5")
    assert sorted(rows, key=text.index) == list(rows)
    assert "The chain ends here: base.pt" in text


def test_a_missing_run_is_told(chain: list[dict[str, Any]]) -> None:
    found = lineage("b2.pt", ["runs/group"])
    assert [c.step for c in found.chain] == [2]
    assert "run a recorded it, which is not among the runs that were searched" in found.end
    assert [c.step for c in lineage("b2.pt", ["runs/group", "runs/a"]).chain] == [2, 9, 5]


def test_runs_that_were_moved_are_found(chain: list[dict[str, Any]]) -> None:
    shutil.move("runs", "archive")
    found = lineage("b2.pt", ["archive"])
    assert [c.run for c in found.chain] == ["archive/group/b", "archive/a", "archive/a"]
    assert verify("a5.pt", ["archive/a"]).known


def test_a_training_from_scratch_ends_the_chain(chain: list[dict[str, Any]]) -> None:
    assert "no parent is recorded" in lineage("other.pt").end


def test_a_cycle_is_told_and_ends(chain: list[dict[str, Any]]) -> None:
    record("runs/a", 5, "a5.pt", parent_of(chain[2], "given"))
    found = lineage("b2.pt")
    assert [c.step for c in found.chain][:3] == [2, 9, 5]
    assert len(found.chain) == 3
    assert "a cycle: its parent is step 2 of runs/group/b again" in found.end


def test_steps_that_change_nothing_are_no_cycle() -> None:
    torch.save(state(1), "same.pt")
    parent = None
    for step in range(4):
        parent = parent_of(record("runs/a", step, "same.pt", parent))
    found = lineage("same.pt")
    assert [c.step for c in found.verdict.also] == [1, 2, 3]
    assert [c.step for c in found.chain] == [0]
    torch.save(state(2), "next.pt")
    record("runs/a", 4, "next.pt", parent)
    assert [c.step for c in lineage("next.pt").chain] == [4, 3, 2, 1, 0]


def test_damaged_records_are_left_out_and_told(
    chain: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    paths = sorted(Path("runs/a/lineage").iterdir())
    paths[0].write_text(paths[0].read_text().replace('"step": 5', '"step": 6'))
    paths[1].write_text("{")
    newer = next(Path("runs/c/lineage").iterdir())
    newer.write_text(newer.read_text().replace('"version": 1', '"version": 2'))
    (Path("runs/c/lineage") / "notes.txt").write_text("mine")
    code, found = asked(capsys, "verify", "a9.pt")
    assert (code, found["status"]) == (1, "unknown")
    assert set(found["problems"]) == {str(paths[0]), str(paths[1]), str(newer)}
    assert "checksum" in found["problems"][str(paths[0])]
    assert asked(capsys, "verify", "b2.pt")[0] == 0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("verify", "nothing.pt", "--runs", "."), "expected a weight file or a folder with one, but"),
        (("lineage", "empty", "--runs", "."), "expected a weight file or a folder with one, but"),
        (("verify", "a.pt"), "expected a folder of runs, but runs is none: name it with --runs"),
        (("verify", "a.pt", "--runs", "ftp"), "expected a folder of runs, but ftp is none"),
    ],
)
def test_wrong_input_is_one_line(
    words: tuple[str, ...], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(state(0), "a.pt")
    Path("empty").mkdir()
    assert main(words) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_search_by_digest_reads_few_records(
    chain: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = Records(["runs"])
    read: list[str] = []
    opened = Records._open
    monkeypatch.setattr(Records, "_open", lambda self, *file: (read.append(file[2]), opened(self, *file))[1])
    assert [c.step for c in records.of(chain[1]["sha256"])] == [9]
    assert len(read) == 1
