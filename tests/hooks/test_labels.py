"""Tags, owner and note that `watch` stores; the run's id."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from trainings import batch, loss_of, mlp, watched_training

from layerwatch import Run, watch
from layerwatch.monitor.labels import edit_labels
from layerwatch.monitor.store import store_of


def trained(path: Path, **watching: Any) -> dict[str, Any]:
    model = mlp()
    return watched_training(path, model, torch.optim.SGD(model.parameters(), 0.1), 2, watching=watching).info


def labels(info: dict[str, Any]) -> dict[str, Any]:
    return {key: info.get(key) for key in ("tags", "owner", "note")}


def test_what_is_given_is_stored_once_and_in_order(tmp_path: Path) -> None:
    info = trained(tmp_path / "run", tags=["b", "a", "b"], owner=" Ana ", note="warm-up\nof 500 steps")
    assert labels(info) == {"tags": ["b", "a"], "owner": "Ana", "note": "warm-up\nof 500 steps"}
    stored = json.loads((tmp_path / "run" / "run.json").read_text())
    assert labels(stored) == labels(info)


def test_one_tag_may_be_given_as_it_is(tmp_path: Path) -> None:
    assert trained(tmp_path / "run", tags="baseline")["tags"] == ["baseline"]


def test_the_owner_is_the_login_unless_the_environment_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LAYERWATCH_OWNER", "LOGNAME", "USER", "LNAME", "USERNAME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("LOGNAME", "login")
    assert trained(tmp_path / "a")["owner"] == "login"
    monkeypatch.setenv("LAYERWATCH_OWNER", "team\x1b[31m-vision")
    assert trained(tmp_path / "b")["owner"] == "team[31m-vision"  # nothing that a terminal would obey
    assert trained(tmp_path / "c", owner="ana")["owner"] == "ana"
    monkeypatch.setenv("LAYERWATCH_OWNER", "")
    assert trained(tmp_path / "d")["owner"] == ""


def test_a_user_without_a_name_trains_all_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody() -> str:
        raise KeyError("getpwuid(): uid not found: 1234")

    monkeypatch.delenv("LAYERWATCH_OWNER", raising=False)
    monkeypatch.setattr("getpass.getuser", nobody)
    assert trained(tmp_path / "run")["owner"] == ""


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tags": ["lr sweep"]}, "words without spaces"),
        ({"tags": "a,b"}, "words without spaces"),
        ({"tags": [""]}, "words without spaces"),
        ({"tags": ["x" * 65]}, "at most 64 characters"),
        ({"tags": [1]}, "expected a tag as text, got int"),
        ({"owner": "two\nlines"}, "one line"),
        ({"note": "a\x1b[2J"}, "control characters"),
        ({"note": "\ud800"}, "control characters"),
        ({"note": 3}, "expected note as text, got int"),
    ],
)
def test_what_cannot_be_stored_is_refused_before_anything_is_written(
    tmp_path: Path, given: dict[str, Any], words: str
) -> None:
    with pytest.raises((TypeError, ValueError), match=words):
        watch(mlp(), run=tmp_path / "run", **given)
    assert not (tmp_path / "run").exists()


def test_a_resumed_run_keeps_its_id_and_labels_that_are_not_given_anew(tmp_path: Path) -> None:
    before = trained(tmp_path / "run", tags=["first"], owner="ana", note="as it was")
    after = trained(tmp_path / "run", resume=True, tags=["second"])
    assert labels(after) == {"tags": ["second"], "owner": "ana", "note": "as it was"}
    assert after["id"] == before["id"]
    assert len(after["id"]) == 32
    assert trained(tmp_path / "other")["id"] != after["id"]


def test_edits_during_a_training_are_not_lost_when_it_goes_on_and_when_it_is_resumed(tmp_path: Path) -> None:
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with watch(model, optimizer, run=tmp_path / "run", tags=["given"], note="given") as watcher:
        loss_of(model(batch(0))).backward()
        optimizer.step()
        run = Run(tmp_path / "run")
        edit_labels(store_of(tmp_path / "run"), run.info, add=["edited"])
        watcher.configure({"lr": 0.1})  # rewrites run.json
        assert run.refresh()
        assert run.info["tags"] == ["given", "edited"]
        assert run.info["config"] == {"lr": 0.1}
    again = trained(tmp_path / "run", resume=True, tags=["resumed"], note="resumed")
    assert again["tags"] == ["given", "edited"]  # edited: that counts
    assert again["note"] == "resumed"  # was not


def test_damaged_labels_leave_those_of_the_training_and_are_told(tmp_path: Path) -> None:
    trained(tmp_path / "run", tags=["given"], owner="ana")
    path = tmp_path / "run" / "labels.json"
    path.write_text('{"tags": ["half')
    run = Run(tmp_path / "run")
    assert labels(run.info) == {"tags": ["given"], "owner": "ana", "note": None}
    assert run.problems == {"labels.json": run.problems["labels.json"]}
    assert any(note.startswith("labels.json: is damaged") for note in run.notes())
    path.write_text('{"tags": ["one", 2], "owner": "b\\u001bob"}')
    assert run.refresh()
    assert labels(run.info) == {"tags": ["given"], "owner": "bob", "note": None}
    assert "tags cannot be read" in run.problems["labels.json"]
    path.unlink()
    assert run.refresh()
    assert run.problems == {}
