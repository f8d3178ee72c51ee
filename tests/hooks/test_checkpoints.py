"""`Watcher.checkpoint`: what is recorded of saved weights, whatever happens to the files afterwards."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from test_lightning import Net, loader
from test_lightning import trainer as lightning_trainer
from test_transformers import language_model
from test_transformers import trainer as hf_trainer
from torch import nn
from trainings import failures, mlp, train

from layerwatch import Run, Watcher, lineage, verify, watch
from layerwatch.hooks import checkpoints
from layerwatch.hooks.lightning import LayerwatchCallback as LightningCallback
from layerwatch.hooks.transformers import LayerwatchCallback as TrainerCallback
from layerwatch.monitor.lineage import Checkpoint, Records
from tests.object_server import ObjectServer

pytestmark = [
    # what these frameworks do is none of ours; see test_lightning.py and test_transformers.py
    pytest.mark.filterwarnings(r"ignore:`isinstance\(treespec, LeafSpec\)` is deprecated"),
    pytest.mark.filterwarnings(r"ignore:.*does not have many workers"),
    pytest.mark.filterwarnings(r"ignore:The `srun` command is available"),
    pytest.mark.filterwarnings(r"ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:.*gradient_checkpointing.* is deprecated:FutureWarning"),
]

Training = tuple[nn.Module, torch.optim.Optimizer]


def training(seed: int = 0) -> Training:
    model = mlp(seed)
    return model, torch.optim.Adam(model.parameters(), 0.01)


def watched(run: Path | str, made: Training, **options: Any) -> Watcher:
    options = {"every": 2, "activations": False, **options}
    return watch(*made, run=run, **options)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def records(*runs: Path | str) -> list[Checkpoint]:
    found = Records(runs)
    everything = list(found)
    assert found.problems == {}
    return everything


def told(run: Path | str) -> list[tuple[int, str]]:
    """The events of checkpoints: step, message."""
    events = Run(run).events()
    rows = events.loc[events["event"] == "checkpoint", ["step", "message"]]
    return list(rows.itertuples(index=False, name=None))


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], None]]:
    """Files are opened, and not read before this is called."""
    gate = threading.Event()
    read = checkpoints.Opened.digests

    def wait(self: checkpoints.Opened, stop: Callable[[], bool]) -> dict[str, Any]:
        while not gate.wait(0.01):
            if stop():
                raise InterruptedError
        return read(self, stop)

    monkeypatch.setattr(checkpoints.Opened, "digests", wait)
    yield gate.set
    gate.set()


def git(*words: str) -> str:
    return subprocess.run(["git", *words], capture_output=True, text=True, check=True).stdout.strip()


def test_what_is_recorded(tmp_path: Path, checkout: Path) -> None:
    git("init", "-q", ".")
    git("-c", "user.name=a", "-c", "user.email=b", "commit", "-q", "--allow-empty", "-m", "x")
    commit = git("rev-parse", "HEAD")
    made = training(7)
    torch.save(made[0].state_dict(), "base.pt")
    with watched("exp", made, reference="base.pt", config={"lr": 0.01, "odd": float("nan")}) as watcher:
        train(*made, 3)
        safetensors.torch.save_file(made[0].state_dict(), tmp_path / "a.safetensors", {"made": "by hand"})
        watcher.checkpoint("a.safetensors", data="corpus v3")
        train(*made, 2)
        torch.save({"model": made[0].state_dict(), "optimizer": made[1].state_dict()}, "b.pt")
        watcher.checkpoint(tmp_path / "b.pt", data={"name": "corpus", "version": 4})
    first, second = (checkpoint.record for checkpoint in records("exp"))
    a, b = tmp_path / "a.safetensors", tmp_path / "b.pt"
    assert [(r["step"], r["next_step"], r["path"]) for r in (first, second)] == [
        (2, 3, str(a)),
        (4, 5, str(b)),
    ]
    for record, path in ((first, a), (second, b)):
        assert record["files"] == [{"name": path.name, "size": path.stat().st_size, "sha256": sha256(path)}]
        assert (record["sha256"], record["size"]) == (sha256(path), path.stat().st_size)
        assert record["dtypes"] == {"float32": sum(p.numel() for p in made[0].parameters())}
        assert set(record["tensors"]) == set(made[0].state_dict())
        assert (record["git_commit"], record["seed"], record["session"]) == (commit, 7, 0)
        assert record["config"] == {"lr": 0.01, "odd": None}  # no NaN in JSON
        assert abs(record["time"] - time.time()) < 60
    assert (first["data"], second["data"]) == ("corpus v3", {"name": "corpus", "version": 4})
    assert first["parent"]["how"] == "reference"
    assert first["parent"]["sha256"] == sha256(tmp_path / "base.pt")
    assert second["parent"]["how"] == "before"
    assert [second["parent"][k] for k in ("sha256", "weights_sha256", "step")] == [
        first["sha256"], first["weights_sha256"], 2,
    ]  # fmt: skip
    page = (
        (checkout / "docs" / "log-format.md")
        .read_text()
        .partition("## lineage")[2]
        .partition("## run.json")[0]
    )
    for key in {*first, *first["parent"], *second["parent"]}:
        assert f"`{key}`" in page, key
    assert {p.name for p in tmp_path.iterdir()} == {".git", "exp", "base.pt", "a.safetensors", "b.pt"}
    assert [step for step, _ in told("exp")] == [2, 4]
    assert "corpus v3" in told("exp")[0][1]


def test_a_checkpoint_that_is_rotated_away_is_still_told_right(
    tmp_path: Path, held: Callable[[], None]
) -> None:
    made = training()
    with watched("run", made) as watcher:
        train(*made, 2)
        for name in ("a.pt", "a.safetensors"):
            (torch.save if name == "a.pt" else safetensors.torch.save_file)(made[0].state_dict(), name)
        digests = [sha256(tmp_path / name) for name in ("a.pt", "a.safetensors")]
        (tmp_path / "folder").mkdir()
        shutil.copy("a.safetensors", "folder/model.safetensors")
        for path in ("a.pt", "a.safetensors", "folder"):
            watcher.checkpoint(path)
        os.remove("a.pt")
        os.replace("a.safetensors", "moved")
        Path("a.safetensors").write_bytes(b"another one")
        shutil.rmtree("folder")
        held()
    found = [c.record for c in records("run")]
    assert [r["sha256"] for r in found] == [*digests, digests[1]]
    assert len({r["weights_sha256"] for r in found}) == 1
    assert found[0]["unread"] == {}


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_checkpoint_that_is_written_over_is_reported_and_does_no_harm(
    suffix: str, held: Callable[[], None], caplog: pytest.LogCaptureFixture
) -> None:
    """Into the same file, as torch.save does: a mapped file would end the process here."""
    made = training()
    path = f"last{suffix}"
    save = torch.save if suffix == ".pt" else safetensors.torch.save_file
    with watched("run", made) as watcher:
        train(*made, 1)
        save(made[0].state_dict(), path)
        watcher.checkpoint(path)
        with open(path, "r+b") as file:
            file.truncate(200)
        held()
        watcher._checkpoints._jobs.put(None)  # type: ignore[union-attr]
        watcher._checkpoints._thread.join()  # type: ignore[union-attr]
        train(*made, 1)
    assert failures(watcher) == ""
    assert records("run") == []
    (_, (step, why)) = told("run")
    assert step == 0
    assert "not recorded" in why
    assert "written to" in why or "shorter" in why
    assert "not recorded" in caplog.text


def full_disk(*_: object) -> None:
    raise OSError(28, "disk full")


def test_what_cannot_be_recorded_is_told_and_the_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = training()
    (tmp_path / "empty").mkdir()
    with watched("run", made) as watcher:
        train(*made, 1)
        for path in ("nothing.pt", "empty"):
            watcher.checkpoint(path)
        for wrong in ({"path": 3}, {"path": "a", "data": 3}, {"path": "a", "data": {"a": [1]}},
                      {"path": "a", "parent": 3}):  # fmt: skip
            with pytest.raises(TypeError, match=r"expected (path|data|parent) as"):
                watcher.checkpoint(**wrong)  # type: ignore[arg-type]
        train(*made, 1)
        torch.save(made[0].state_dict(), "a.pt")
        monkeypatch.setattr(checkpoints, "write_record", full_disk)
        watcher.checkpoint("a.pt")
    assert failures(watcher) == ""
    watcher.checkpoint("a.pt")
    assert "call checkpoint() earlier" in caplog.text
    assert [message for _, message in told("run") if "not recorded" in message] == [
        "nothing.pt: not recorded: there is no weight file at nothing.pt",
        "empty: not recorded: there is no weight file at empty",
        f"{tmp_path / 'a.pt'}: not recorded: [Errno 28] disk full",
    ]
    assert Run("run").stats("weight")["step"].tolist()[-1] == 1


def test_files_of_other_formats_are_known_by_their_own_digest(tmp_path: Path) -> None:
    made = training()
    with watched("run", made) as watcher:
        train(*made, 1)
        Path("model.weights.h5").write_bytes(b"some other format")
        watcher.checkpoint("model.weights.h5")
        (tmp_path / "sharded").mkdir()
        (tmp_path / "sharded" / "__0_0.distcp").write_bytes(b"x")
        watcher.checkpoint("sharded")
    first, second = (c.record for c in records("run"))
    assert first["weights_sha256"] is None
    assert first["tensors"] == {}
    assert "format" in first["unread"]["model.weights.h5"]
    assert second["files"][0]["name"] == "__0_0.distcp"
    assert verify("model.weights.h5", ["run"]).status == "identical"
    Path("model.weights.h5").write_bytes(b"some other formaT")
    assert verify("model.weights.h5", ["run"]).status == "unknown"


def test_parents_are_those_that_the_user_names(tmp_path: Path) -> None:
    made = training()
    torch.save(made[0].state_dict(), "base.pt")
    safetensors.torch.save_file(
        {k: v + 1 for k, v in made[0].state_dict().items()}, tmp_path / "other.safetensors"
    )
    digest = "ab" * 32
    with watched("run", made, reference="base.pt") as watcher:
        train(*made, 1)
        for number, parent in enumerate(("other.safetensors", digest, "gone.pt", None)):
            torch.save({**made[0].state_dict(), "n": torch.tensor(number)}, f"{number}.pt")
            watcher.checkpoint(f"{number}.pt", parent=parent)
    given, by_digest, gone, before = (c.record["parent"] for c in records("run"))
    assert (given["how"], given["sha256"]) == ("given", sha256(tmp_path / "other.safetensors"))
    assert (by_digest["how"], by_digest["sha256"]) == ("given", digest)
    assert gone["sha256"] is None
    assert "no weight file" in gone["problem"]
    assert (before["how"], before["sha256"]) == ("before", sha256(tmp_path / "2.pt"))


def test_the_reference_is_the_one_that_was_there_at_the_start(tmp_path: Path) -> None:
    """A training may save over the file that it began with."""
    made = training()
    torch.save(made[0].state_dict(), "model.pt")
    began = sha256(tmp_path / "model.pt")
    with watched("run", made, reference="model.pt") as watcher:
        train(*made, 1)
        torch.save(made[0].state_dict(), "new.pt")
        os.replace("new.pt", "model.pt")
        watcher.checkpoint("model.pt")
    (record,) = (c.record for c in records("run"))
    assert (record["parent"]["how"], record["parent"]["sha256"]) == ("reference", began)
    assert record["sha256"] == sha256(tmp_path / "model.pt") != began


def test_a_resumed_run_goes_on_from_its_checkpoint(tmp_path: Path) -> None:
    made = training()
    with watched("run", made) as watcher:
        for step in (2, 4):
            train(*made, 2)
            torch.save({"model": made[0].state_dict(), "optimizer": made[1].state_dict()}, f"{step}.pt")
            watcher.checkpoint(f"{step}.pt")
    again = training(1)
    for one, key in zip(again, ("model", "optimizer"), strict=True):
        one.load_state_dict(torch.load("2.pt", weights_only=True)[key])
    with watched("run", again, resume=True) as watcher:
        assert watcher.step == 2
        train(*again, 1)
        torch.save(again[0].state_dict(), "3.pt")
        watcher.checkpoint("3.pt")
    with watched("run", again, resume=7) as watcher:
        train(*again, 1)
        torch.save(again[0].state_dict(), "8.pt")
        watcher.checkpoint("8.pt")
    *_, third, last = (c.record for c in records("run"))
    assert (third["session"], third["step"]) == (1, 2)
    assert (third["parent"]["how"], third["parent"]["sha256"]) == ("resumed", sha256(tmp_path / "2.pt"))
    assert [c.record["path"][-4:] for c in lineage("3.pt", ["run"]).chain] == ["3.pt", "2.pt"]
    assert "went on at step 7" in last["parent"]["problem"]
    assert "went on at step 7" in lineage("8.pt", ["run"]).end


def test_tied_weights_that_a_file_holds_once(tmp_path: Path) -> None:
    model = language_model()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run="run", activations=False) as watcher:
        torch.save(model.state_dict(), "both.pt")
        watcher.checkpoint("both.pt")
    state = model.state_dict()
    tied = state.pop("lm_head.weight")
    safetensors.torch.save_file(state, tmp_path / "once.safetensors")
    verdict = verify("once.safetensors", ["run"])
    assert (verdict.status, verdict.difference and verdict.difference.aliases) == (
        "same_weights",
        ["lm_head.weight"],
    )
    safetensors.torch.save_file(
        {**state, "model.embed_tokens.weight": tied + 1}, tmp_path / "not.safetensors"
    )
    verdict = verify("not.safetensors", ["run"])
    assert verdict.difference is not None
    assert (verdict.difference.altered, verdict.difference.missing) == (
        ["model.embed_tokens.weight"], ["lm_head.weight"],
    )  # fmt: skip


def test_a_run_on_an_object_store(object_server: ObjectServer, tmp_path: Path) -> None:
    object_server.make_bucket()
    url = "s3://bucket/group/exp1"
    made = training()
    with watched(url, made) as watcher:
        train(*made, 2)
        torch.save({"model": made[0].state_dict(), "optimizer": made[1].state_dict()}, "a.pt")
        watcher.checkpoint("a.pt")
    verdict = verify("a.pt", ["s3://bucket/"])
    assert verdict.checkpoint is not None
    assert (verdict.status, verdict.checkpoint.run, verdict.checkpoint.step) == ("identical", url, 1)
    with watched(url, made, resume=True) as watcher:
        train(*made, 1)
        torch.save(made[0].state_dict(), "b.pt")
        watcher.checkpoint("b.pt")
    assert [c.step for c in lineage("b.pt", ["s3://bucket/group"]).chain] == [2, 1]
    assert told(url)[0][0] == 1


CHILD = """
import os, signal, sys, threading, torch
from layerwatch import watch
from layerwatch.hooks import checkpoints, termination
termination.GRACE_SECONDS = 100.0  # a slow machine may take long to finish a log
def endless(self, stop):
    while True:
        if stop():
            raise InterruptedError
        threading.Event().wait(0.01)
if sys.argv[1] == "slow":
    checkpoints.Opened.digests = endless
model = torch.nn.Linear(8, 3)
optimizer = torch.optim.SGD(model.parameters(), 0.1)
watcher = watch(model, optimizer, run="run", activations=False)
model(torch.randn(4, 8)).sum().backward()
optimizer.step()
torch.save(model.state_dict(), "a.pt")
watcher.checkpoint("a.pt")
if sys.argv[1] == "slow":
    termination.GRACE_SECONDS = 1.0  # half of it is waited for the file
os.kill(os.getpid(), signal.SIGTERM)
threading.Event().wait(60)
"""


@pytest.mark.parametrize("how", ["quick", "slow"])
def test_at_sigterm_it_is_finished_or_told(how: str, checkout: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHILD, how], env={**os.environ, "PYTHONPATH": str(checkout)}, timeout=120,
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == -15, done.stderr
    assert len(records("run")) == (how != "slow")
    assert [message for _, message in told("run") if "asked to end" in message][:1] == (
        [f"{Path('a.pt').absolute()}: not recorded: the process was asked to end before it had been read"]
        if how == "slow"
        else []
    )


def test_lightning_checkpoints_are_recorded_by_themselves(tmp_path: Path) -> None:
    callback = LightningCallback("run", every=2)
    keeping = ModelCheckpoint(tmp_path / "kept", every_n_train_steps=2, save_top_k=-1)
    training = lightning_trainer(tmp_path, callback, keeping, enable_checkpointing=True, max_epochs=1)
    training.fit(Net(), loader())
    assert "save_checkpoint" not in vars(training)
    found = [c.record for c in records("run")]
    assert [r["step"] for r in found] == [1, 3]
    assert {r["path"]: r["sha256"] for r in found} == {
        str(p): sha256(p) for p in (tmp_path / "kept").iterdir()
    }
    assert all(r["tensors"].keys() == Net().state_dict().keys() for r in found)
    training.fit(Net(), loader())  # another model: another run
    assert isinstance(training, pl.Trainer)


def test_trainer_checkpoints_are_recorded_by_themselves(tmp_path: Path) -> None:
    """Those that the Trainer removes are, too."""
    callback = TrainerCallback(tmp_path / "run", every=2)
    how: dict[str, Any] = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    hf_trainer(language_model(), tmp_path, callback, **how).train()
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["checkpoint-4"]
    found = [c.record for c in records(tmp_path / "run")]
    assert [(r["step"], Path(r["path"]).name) for r in found] == [(1, "checkpoint-2"), (3, "checkpoint-4")]
    assert found[1]["files"][0]["name"] == "model.safetensors"
    kept = tmp_path / "out" / "checkpoint-4"
    assert [c.step for c in lineage(kept, [tmp_path / "run"]).chain] == [3, 1]
    assert verify(kept / "model.safetensors", [tmp_path / "run"]).status == "identical"


def test_the_training_thread_hardly_works_and_does_not_wait(tmp_path: Path, held: Callable[[], None]) -> None:
    """A large file takes the thread what opening it takes, in processor time."""
    made = training()
    large = tmp_path / "large.safetensors"
    safetensors.torch.save_file({"w": torch.zeros(64 << 18)}, large)  # 64 MiB
    with watched("run", made) as watcher:
        train(*made, 1)
        began = time.thread_time()
        watcher.checkpoint(large)
        took = time.thread_time() - began
        held()
    began = time.thread_time()
    sha256(large)
    reading = time.thread_time() - began
    logging.getLogger(__name__).info("%.1f ms, reading takes %.1f ms", 1e3 * took, 1e3 * reading)
    assert took < reading / 2  # it is read twice
    (record,) = (c.record for c in records("run"))
    assert json.dumps(record["dtypes"]) == json.dumps({"float32": 64 << 18})
