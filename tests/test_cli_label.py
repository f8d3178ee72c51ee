"""`layerwatch label`, and where labels show: `runs`, `compare`, `run`."""

from __future__ import annotations

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from layerwatch import Run
from layerwatch.cli import main
from layerwatch.monitor import LogWriter
from layerwatch.monitor.mirror import Mirror
from tests.monitor.made_logs import info, make_run, write_step
from tests.object_server import ObjectServer


def labels(path: str | Path) -> dict[str, Any]:
    return {key: Run(path).info.get(key) for key in ("tags", "owner", "note")}


def test_label_adds_removes_replaces_and_shows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "exp1", tags=["old", "kept"], owner="ana")
    given = (run / "run.json").read_bytes()
    edits = ["--tag", "new", "--tag", "kept", "--untag", "old", "--untag", "never", "--note"]
    assert main(["label", str(run), *edits, "[bold] as it is"]) == 0
    assert labels(run) == {"tags": ["kept", "new"], "owner": "ana", "note": "[bold] as it is"}
    assert "kept new" in capsys.readouterr().out
    assert (run / "run.json").read_bytes() == given
    assert json.loads((run / "labels.json").read_text()).keys() == {"tags", "note"}  # not the owner

    assert main(["label", str(run)]) == 0
    shown = capsys.readouterr().out
    assert all(text in shown for text in ("exp1", "ana", "kept new", "[bold] as it is"))
    assert main(["label", str(run), "--untag", "kept", "--untag", "new", "--owner", "", "--note", ""]) == 0
    assert labels(run) == {"tags": [], "owner": "", "note": ""}


def test_showing_writes_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "exp1", owner="ana")
    assert main(["label", str(run), "--untag", "never"]) == 0
    assert not (run / "labels.json").exists()


def test_a_live_run_is_labelled_and_rewrites_nothing_of_it(tmp_path: Path) -> None:
    log = LogWriter(tmp_path / "live", info(tags=["given"]))
    write_step(log, 0)
    assert main(["label", str(tmp_path / "live"), "--tag", "watched"]) == 0
    log.update_info(notes=["more"])
    write_step(log, 1)
    log.close()
    found = Run(tmp_path / "live")
    assert (found.info["tags"], found.info["notes"]) == (["given", "watched"], ["more"])
    assert found.problems == {}


def test_a_run_on_an_object_store_is_labelled_while_it_is_sent(
    object_server: ObjectServer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"{object_server.make_bucket()}/exp1"
    log = LogWriter(tmp_path / "spool" / "exp1", info(owner="ana"))
    write_step(log, 0)
    mirror = Mirror(log.path, url)
    mirror.send()
    assert main(["label", url, "--tag", "sweep", "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told == {
        "version": 1,
        "runs": [{"run": url, "tags": ["sweep"], "owner": "ana", "note": ""}],
        "failed": [],
    }
    write_step(log, 1)
    log.close()
    mirror.send()
    assert mirror.finish()
    assert labels(url) == {"tags": ["sweep"], "owner": "ana", "note": None}
    assert Run(url).last_step == 1


def test_one_bad_run_stops_no_other(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, none = make_run(tmp_path / "good"), tmp_path / "none"
    damaged = make_run(tmp_path / "damaged")
    (damaged / "labels.json").write_text("{half")
    assert main(["label", str(none), str(damaged), str(good), "--tag", "x", "--format", "json"]) == 2
    out, err = capsys.readouterr()
    told = json.loads(out)
    assert [one["run"] for one in told["runs"]] == [str(good)]
    assert [one["run"] for one in told["failed"]] == [str(none), str(damaged)]
    assert "does not exist" in err
    assert "labels.json, but it is damaged" in err
    assert err.count("\n") == 2
    assert Run(good).info["tags"] == ["x"]
    assert (damaged / "labels.json").read_text() == "{half"  # somebody may mend it


def test_what_has_no_run_json_is_not_labelled(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = make_run(tmp_path / "exp1")
    (run / "run.json").write_text("{half")
    assert main(["label", str(run), "--tag", "x"]) == 2
    assert "whose run.json can be read" in capsys.readouterr().err
    assert not (run / "labels.json").exists()


@pytest.mark.parametrize(
    ("edit", "words"),
    [
        (["--tag", "two words"], "words without spaces"),
        (["--owner", "x" * 101], "at most 100 characters"),
        (["--note", "\x07"], "without control characters"),
    ],
)
def test_a_label_that_is_none_changes_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], edit: list[str], words: str
) -> None:
    run = make_run(tmp_path / "exp1")
    assert main(["label", str(run), "--tag", "fine", *edit]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1
    assert not (run / "labels.json").exists()


def test_a_folder_that_cannot_be_written_is_told_and_keeps_its_labels(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = make_run(tmp_path / "exp1")
    assert main(["label", str(run), "--tag", "old"]) == 0

    def read_only(*_: Any) -> int:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_bytes", read_only)
    assert main(["label", str(run), "--tag", "new"]) == 2
    error = capsys.readouterr().err
    assert "cannot be written (Read-only file system)" in error
    assert error.count("\n") == 1
    assert Run(run).info["tags"] == ["old"]


def test_runs_show_labels_where_there_are_any_and_can_be_narrowed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_run(tmp_path / "plain")
    assert main(["runs", str(tmp_path)]) == 0
    assert "owner" not in capsys.readouterr().out
    make_run(tmp_path / "both", tags=["a", "b"], owner="ana")
    make_run(tmp_path / "one", tags=["a"], owner="bo")

    def listed(*options: str) -> list[str]:
        assert main(["runs", str(tmp_path), *options]) == 0
        out = capsys.readouterr().out
        assert ("owner" in out) == ("ana" in out or "bo " in out)
        return sorted(name for name in ("plain", "both", "one") if f"{name} " in out)

    assert listed() == ["both", "one", "plain"]
    assert listed("--tag", "a") == ["both", "one"]
    assert listed("--tag", "a", "--tag", "b") == ["both"]
    assert listed("--owner", "bo", "--tag", "a") == ["one"]
    assert listed("--owner", "") == ["plain"]
    assert main(["runs", str(tmp_path), "--tag", "none"]) == 0
    assert "No runs that fit below" in capsys.readouterr().out


def test_compare_tells_labels_that_differ(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a = make_run(tmp_path / "a", tags=["baseline"], owner="ana", note="warm-up of 500 steps")
    b = make_run(tmp_path / "b", tags=["baseline", "no-warm-up"], owner="ana")
    assert main(["compare", str(a), str(b), "--format", "json"]) == 0
    told = json.loads(capsys.readouterr().out)["settings"]
    rows = {row["setting"]: [row["a"], row["b"]] for row in told}
    assert rows["tags"] == ["baseline", "baseline no-warm-up"]
    assert rows["note"][0] == "warm-up of 500 steps"
    assert "owner" not in rows


def test_runs_are_listed_by_a_filter(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "a" / "one", tags=["base"], owner="ana", config={"optimizer": {"lr": 0.1}})
    make_run(tmp_path / "a" / "two", tags=["base"], config={"optimizer": {"lr": 0.001}})

    def listed(text: str) -> set[str]:
        assert main(["runs", str(tmp_path), "--where", text]) == 0
        out = capsys.readouterr().out
        return {name for name in ("a/one", "a/two") if name in out}

    assert listed("") == listed("tag:base lr>0") == {"a/one", "a/two"}
    assert listed("lr>0.01") == listed("owner:ana") == listed("name:a/one") == {"a/one"}
    assert listed("lr>0.01 -owner:ana") == set()
    assert main(["runs", str(tmp_path), "--where", "onwer:ana"]) == 2
    assert "did you mean owner?" in capsys.readouterr().err
