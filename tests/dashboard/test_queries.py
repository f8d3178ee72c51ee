"""Runs summed up and judged: once for each state of a log, also over restarts, never in a page's thread."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from layerwatch.dashboard import judging, queries, remembered
from layerwatch.dashboard.judging import Judgement, Judges, from_plain, judge, to_plain
from layerwatch.dashboard.queries import Library
from layerwatch.dashboard.remembered import Shelf
from layerwatch.monitor import LogWriter, Run
from layerwatch.monitor.findings import Finding
from layerwatch.monitor.fleet.numbers import flat


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder for what is remembered."""
    monkeypatch.setenv("LAYERWATCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def library_of(runs_root: Path, cache: Path) -> Iterator[Callable[[], Library]]:
    made: list[Library] = []

    def make() -> Library:
        made.append(Library(runs_root))
        return made[-1]

    yield make
    for library in made:
        library.close()


def until(condition: Callable[[], bool], seconds: float = 30) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_summary_holds_the_numbers_of_the_log(library_of: Callable[[], Library], runs_root: Path) -> None:
    summary, run = library_of().summary("healthy"), Run(runs_root / "healthy")
    assert summary.get("read") is True
    assert summary.get("step") == run.last_step
    assert summary.get("train") == run.scalars("train_loss")["value"].iloc[-1]
    assert summary.get("val") == run.scalars("val_loss")["value"].iloc[-1]
    drift = run.drift()
    last = drift[drift["step"] == drift["step"].max()].set_index("tensor")["relative_l2"]
    assert summary.get("drift") == last.max()
    assert summary.get("drift_layer") == last.idxmax()
    assert summary.get("config") == {"lr": 0.1, "depth": 5}
    assert summary.get("closed") is True
    assert summary.get("live") is False
    frozen = library_of().summary("finetune")
    assert frozen.get("val") is None
    assert frozen.get("gap") is None
    blown = library_of().summary("nested/blow-up")
    assert not np.isfinite(blown.get("train") or 0.0)


def test_configurations_become_one_level() -> None:
    nested = {"lr": 0.1, "optimizer": {"name": "adam", "betas": [0.9, 0.99]}, "empty": {}}
    assert flat(nested) == {
        "lr": 0.1, "optimizer.name": "adam", "optimizer.betas": "[0.9, 0.99]", "empty": "{}",
    }  # fmt: skip


def test_summaries_do_not_keep_a_page_waiting(library_of: Callable[[], Library]) -> None:
    library = library_of()
    before = library.cursor("")
    found = library.summaries(patience=0.0)
    assert set(found) == {"healthy", "vanishing", "nested/blow-up", "finetune"}
    assert not any(summary.get("read") for summary in found.values())
    assert all(summary.get("created") for summary in found.values())
    until(lambda: all(summary.get("read") for summary in library.summaries(patience=0.0).values()))
    assert library.cursor("") != before


def test_a_run_is_never_away_while_another_thread_looks_for_new_ones(
    library_of: Callable[[], Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = library_of()
    before = set(library.summaries(patience=30))
    seen: list[set[str]] = []
    opened = Library._opened

    def slowly(self: Library, folder: str, known: Any) -> Any:
        reader = threading.Thread(target=lambda: seen.append(set(self._runs)))  # as a page that is being read
        reader.start()
        reader.join()
        return opened(self, folder, known)

    monkeypatch.setattr(Library, "_opened", slowly)
    library._scanned = float("-inf")
    assert set(library.runs()) == before
    assert seen == [before] * len(before)


def test_the_cursor_of_all_runs_follows_one_that_grows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "REFRESH_SECONDS", 0.0)
    writer = LogWriter(tmp_path / "run", {"host": socket.gethostname(), "pid": os.getpid()})
    writer.scalars(1, 1.0, {"train_loss": 1.0})
    library = Library(tmp_path)
    before = library.cursor("")
    assert library.cursor("") == before
    writer.scalars(2, 2.0, {"train_loss": 0.5})
    assert library.cursor("") != before
    writer.close()


def test_nothing_is_computed_again_for_unchanged_runs(
    library_of: Callable[[], Library], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = library_of()
    summary, judged = first.summary("vanishing"), first.judgement("vanishing", wait=150)
    assert judged is not None
    assert judged.alarms

    def never(*_: object) -> None:
        raise AssertionError("computed again")

    monkeypatch.setattr(queries, "summarise", never)
    monkeypatch.setattr(Judges, "ask", never)
    for library in (first, library_of()):  # this server, and the next one
        assert library.summary("vanishing") == summary
        again = library.judgement("vanishing")
        assert again is not None
        assert (again.stamp, again.findings, again.notes) == (judged.stamp, judged.findings, judged.notes)


def test_a_damaged_cache_is_ignored(library_of: Callable[[], Library], cache: Path) -> None:
    judged = library_of().judgement("healthy", wait=150)
    assert judged is not None
    files = list((cache / "judgements").iterdir())
    assert len(files) == 1
    kept = files[0].read_text()
    for content in ("", "[]", "\x00", json.dumps(json.loads(kept) | {"answer": {"stamp": 1}})):
        files[0].write_text(content)
        again = library_of().judgement("healthy", wait=150)
        assert again is not None
        assert again.findings == judged.findings
        assert files[0].read_text() == kept  # whole again


def test_what_is_remembered_is_of_one_state(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shelf = Shelf("x")
    shelf.put("/runs/a", "1", {"n": 1})
    assert shelf.get("/runs/a", "1") == {"n": 1}
    assert shelf.get("/runs/a", "2") is None
    assert shelf.get("/runs/b", "1") is None
    monkeypatch.setattr(remembered, "engine", lambda: "another")
    assert shelf.get("/runs/a", "1") is None


def test_the_cache_is_bounded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remembered, "MOST", 50)
    shelf = Shelf("x")
    for number in range(250):
        shelf.put(f"/runs/{number}", "1", {})
    assert len(list((cache / "x").iterdir())) <= 150


def test_a_cache_that_cannot_be_written_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LAYERWATCH_CACHE", str(tmp_path / "file"))
    shelf = Shelf("x")
    shelf.put("/runs/a", "1", {})
    assert shelf.get("/runs/a", "1") is None


def test_a_judgement_survives_the_way_through_json() -> None:
    finding = Finding(
        "r", "nonfinite", "critical", ("a", "b"), 3, 9, "s", {"value": float("inf"), "n": 2}, "do"
    )
    judged = Judgement("stamp", [finding], ["note"], "")
    assert from_plain(json.loads(json.dumps(to_plain(judged)))) == judged


def test_detectors_that_fail_become_an_error(runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> list[object]:
        raise KeyError("norm")

    monkeypatch.setattr(Run, "findings", broken)
    judged = judge(str(runs_root / "healthy"), OrderedDict())
    assert judged.health == "unknown"
    assert "KeyError" in judged.error


def test_the_worker_is_another_process_and_comes_back_when_it_dies(runs_root: Path) -> None:
    heard: list[str] = []
    judges = Judges(lambda url, _: heard.append(url))
    url = str(runs_root / "vanishing")
    assert judges.ask(url).result(150).alarms
    first = judges.pid
    assert first is not None
    assert first != os.getpid()
    assert os.getpriority(os.PRIO_PROCESS, first) > os.getpriority(os.PRIO_PROCESS, 0)
    os.kill(first, signal.SIGKILL)
    os.waitid(os.P_PID, first, os.WEXITED | os.WNOWAIT)  # nobody reads the next question
    assert judges.ask(url).result(150).alarms
    second = judges.pid
    assert second not in (None, first)
    assert heard == [url, url]
    judges.close()
    assert judges.pid is None
    until(lambda: not Path(f"/proc/{second}").exists())


def test_a_worker_that_was_being_made_ends_with_the_others(
    runs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judges, made = Judges(lambda *_: None), []

    class Slow(subprocess.Popen[str]):
        """Closed at the worst moment: there is a process, and nobody knows of it yet."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)
            judges._closed = True

    monkeypatch.setattr(subprocess, "Popen", Slow)
    assert "ended without an answer" in judges.ask(str(runs_root / "healthy")).result(150).error
    until(lambda: judges.pid is None)
    assert [process.returncode for process in made] == [-signal.SIGKILL]


def test_a_worker_that_has_grown_is_replaced(runs_root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(judging, "resident", lambda: judging.MOST_BYTES + 1)
    answers, questions = runs_root.parent / "answers", runs_root.parent / "questions"
    questions.write_text(json.dumps({"url": str(runs_root / "healthy")}) + "\n")
    with open(questions) as wishes, open(answers, "w") as out:
        judging._listen(wishes, out)
    assert json.loads(answers.read_text())["last"] is True


def test_the_worker_ends_with_its_server(runs_root: Path, tmp_path: Path) -> None:
    code = (
        "import sys, os, layerwatch.dashboard.judging as j\n"
        "judges = j.Judges(lambda *_: None)\n"
        "judges.ask(sys.argv[1]).result(150)\n"
        "print(judges.pid, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    done = subprocess.run(
        [sys.executable, "-c", code, str(runs_root / "healthy")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    worker = int(done.stdout)
    until(lambda: not Path(f"/proc/{worker}/cmdline").exists() or not _cmdline(worker))


def _cmdline(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""
