"""Roots as they are after a year: half-copied runs, old and newer formats, other clocks, copies, stores that
refuse. The scan says what it could not read, and reads the rest."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from layerwatch.cli import main
from layerwatch.monitor.description import write_json
from layerwatch.monitor.fleet import scan_and_keep, scan_run
from layerwatch.monitor.fleet.scanning import scan
from layerwatch.monitor.fleet.table import TABLE, read_table
from layerwatch.monitor.store import Store
from tests.monitor.made_logs import make_run
from tests.monitor.rights import without_rights
from tests.object_server import CREDENTIALS, ObjectServer

DATA = Path(__file__).parents[1] / "data"
GOOD = ("good", "odd [bold] <b> %41", "v1-closed", "v1-interrupted", "v2-closed", "v2-interrupted")
#: run -> what is said of it.
UNREADABLE = {"newer": "upgrade layerwatch", "empty": "damaged"}


@pytest.fixture
def messy(tmp_path: Path) -> Path:
    """A root with everything in it."""
    root = tmp_path / "runs"
    for name in GOOD[:2]:
        make_run(root / name)
    for version in ("v1", "v2"):
        for state in ("closed", "interrupted"):
            shutil.copytree(DATA / version / state, root / f"{version}-{state}")
    (make_run(root / "newer") / "run.json").write_text('{"schema_version": 99}')
    (root / "empty").mkdir()
    (root / "empty" / "run.json").write_text("")
    make_run(root / "half")
    for place in ("scalars", "run.json"):
        victim = root / "half" / place
        shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    cut = next((make_run(root / "cut") / "stats").glob("*.parquet"))
    cut.write_bytes(cut.read_bytes()[:-40])
    shutil.copytree(root / "good", root / "archive" / "good")
    tomorrow = time.time() + 86400
    for file in make_run(root / "ahead", created=tomorrow).rglob("*"):
        os.utime(file, (tomorrow, tomorrow))
    (root / "notes.txt").write_text("no run")
    (root / "figures").mkdir()
    return root


def scanned(
    root: Path | str, capsys: pytest.CaptureFixture[str], *more: str
) -> tuple[int, dict[str, Any], str]:
    """Exit code, the runs by name, stderr."""
    code = main(["scan", str(root), "--format", "json", *more])
    out = capsys.readouterr()
    runs = json.loads(out.out)["runs"] if out.out else []
    return code, {row["run"]: row for row in runs}, out.err


def assert_messy(rows: dict[str, Any]) -> None:
    """What can be read is read, and the rest is a row with the reason."""
    assert set(rows) == {*GOOD, *UNREADABLE, "half", "cut", "archive/good", "ahead"}
    for name in GOOD:
        assert rows[name]["error"] is None
        assert rows[name]["steps"] > 0
    for name, words in UNREADABLE.items():
        assert (rows[name]["health"], words in rows[name]["error"]) == ("unreadable", True), rows[name][
            "error"
        ]
    assert any("run.json" in note for note in rows["half"]["notes"])
    assert any("stats/" in note for note in rows["cut"]["notes"])
    copies = [rows[name]["copy_of"] for name in ("good", "archive/good")]
    assert copies in ([None, "good"], ["archive/good", None])  # nothing tells which was first


def test_a_messy_root(messy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, err = scanned(messy, capsys)
    assert (code, err) == (0, "")
    assert_messy(rows)
    table = read_table(messy / TABLE)
    assert any("ahead" in note and "clocks" in note for note in table.notes)
    assert main(["scan", str(messy)]) == 0  # and as text
    text = capsys.readouterr().out
    assert "newer: " in text
    assert "could not be read" in text
    damaged = text[text.index("partly damaged") :].splitlines()
    assert damaged[1].startswith("  cut: stats/r0-000001.parquet: ")
    assert damaged[2].startswith("  half: run.json: is missing")


def test_odd_names_links_and_pipes_neither_loop_nor_hang(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = tmp_path / "runs"
    make_run(root / "good")
    make_run(root / "two\nlines")
    (root / "loop").symlink_to(root)
    (root / "nowhere").symlink_to(root / "gone")
    os.mkfifo(make_run(root / "piped") / "wal" / "r0-000099.wal")
    os.mkfifo(make_run(root / "pipe") / "pipe")
    (root / "pipe" / "run.json").unlink()
    os.mkfifo(root / "pipe" / "run.json")
    code, rows, err = scanned(root, capsys)
    assert (code, err) == (0, "")
    assert set(rows) == {"good", "two\nlines", "piped", "pipe"}
    assert rows["good"]["error"] is None
    assert rows["piped"]["steps"] == rows["two\nlines"]["steps"] == 5


@pytest.mark.parametrize(
    ("told", "error"),
    [
        ({"owner": "\ud800"}, "surrogates"),
        ({"tensors": [{"tensor": "a", "elements": 10**30}]}, "too large"),
        ({"world": 2**40}, None),  # nor are so many processes looked for
        ({"world": "many"}, None),
    ],
)
def test_a_run_that_no_table_can_hold_takes_no_other_along(
    tmp_path: Path, told: dict[str, Any], error: str | None
) -> None:
    for name in ("good", "odd"):
        make_run(tmp_path / name)
    info = json.loads((tmp_path / "odd" / "run.json").read_text())
    del info["checksum"]
    write_json(tmp_path / "odd" / "run.json", info | told)
    rows = {row["run"]: row for row in scan_and_keep(tmp_path).rows}
    assert rows["good"]["health"] == "healthy"
    assert rows["odd"]["error"] is None if error is None else error in rows["odd"]["error"]
    assert rows["odd"]["world"] == (1 if error is None else None)
    assert len(scan_run(tmp_path / "odd")) == 1
    assert len(read_table(tmp_path / TABLE).rows) == 2


def test_names_that_are_no_utf8(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path / "good")
    for name in (b"odd\xff", b"odd\xfe"):
        os.rename(make_run(tmp_path / "odd"), os.fsencode(tmp_path) + b"/" + name)
    for _ in range(2):
        code, rows, err = scanned(tmp_path, capsys)
        assert (code, err, set(rows)) == (0, "", {"good", "odd\\udcff", "odd\\udcfe"})
        assert rows["good"]["steps"] == 5
        assert all(row["error"] or row["notes"] for name, row in rows.items() if name != "good")


def test_a_folder_that_cannot_be_listed_leaves_the_table_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A share that is not there for a moment, and a folder that others keep to themselves."""
    for name in ("a", "b/c"):
        make_run(tmp_path / name)
    scan_and_keep(tmp_path)
    list_folder, trouble = os.scandir, dict[str, OSError]()

    def scandir(path: Any) -> Any:
        if error := trouble.get(os.path.basename(path)):
            error.filename = path
            raise error
        return list_folder(path)

    monkeypatch.setattr(os, "scandir", scandir)
    for name, kind in (("b", OSError), (tmp_path.name, OSError), (tmp_path.name, PermissionError)):
        trouble = {name: kind(errno.EIO, "it does not answer")}
        with pytest.raises(OSError, match="it does not answer"):
            scan_and_keep(tmp_path)
        assert len(read_table(tmp_path / TABLE).rows) == 2


def test_a_folder_that_others_keep_to_themselves_is_named_and_its_known_runs_stay() -> None:
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for name in ("a", "team/b", "team/c"):
            make_run(root / name)
        for place in (root / "lost+found", root / "figures"):
            place.mkdir()
            place.chmod(0)
        root.chmod(0o777)
        team, told = root / "team", "1 folder may not be listed, figures for one"
        with without_rights():
            first = scan_and_keep(root)
        assert {row["run"]: row["error"] for row in first.rows} == {"a": None, "team/b": None, "team/c": None}
        assert [told in note for note in first.notes] == [True]
        read = {row["run"]: row["scanned"] for row in first.rows}
        for mode in (0o711, 0):  # what is known can be read, and cannot
            team.chmod(mode)
            with without_rights():
                table = scan_and_keep(root)
            rows = {row["run"]: row for row in table.rows}
            assert {run: row["steps"] for run, row in rows.items()} == {"a": 5, "team/b": 5, "team/c": 5}
            health = "healthy" if mode else "unreadable"
            assert {run: row["health"] for run, row in rows.items()} == {
                "a": "healthy", "team/b": health, "team/c": health,
            }  # fmt: skip
            refused = {run for run, row in rows.items() if "Permission denied" in (row["error"] or "")}
            assert refused == (set() if mode else {"team/b", "team/c"})
            assert "2 folders may not be listed, figures for one" in table.notes[0]
            if mode:  # by its own listing: read again when it has changed, and gone when it has gone
                assert {run: row["scanned"] for run, row in rows.items()} == read
        team.chmod(0o711)
        (root / "team" / "b" / "note.txt").write_text("it has changed")
        shutil.rmtree(root / "team" / "c")
        table = read_table(root / TABLE)
        table.rows.append(table.rows[0] | {"run": "team/../../outside"})
        with without_rights():
            rows = {row["run"]: row for row in scan(root, before=table).rows}
        assert {run: row["error"] for run, row in rows.items()} == {"a": None, "team/b": None}
        assert rows["team/b"]["scanned"] > read["team/b"]
        team.chmod(0o755)
        with without_rights():
            assert [row["error"] for row in scan_and_keep(root).rows] == [None] * 2


def test_a_table_from_before_a_column_was_there_is_read(messy: Path) -> None:
    scan_and_keep(messy)
    found = pq.read_table(messy / TABLE)
    pq.write_table(found.drop_columns(["damaged", "notes", "cost"]), messy / TABLE)
    for row in read_table(messy / TABLE).rows:
        assert (row["damaged"], row["notes"], row["cost"]) == ([], [], None)
    assert scan_and_keep(messy, since=time.time() + 1e6).rows


def test_what_a_scan_leaves_in_a_root_that_is_a_run_is_no_sign_of_life(tmp_path: Path) -> None:
    make_run(tmp_path, close=False, host="elsewhere")
    for file in tmp_path.rglob("*"):
        os.utime(file, (1.7e9, 1.7e9))
    for _ in range(2):
        [row] = scan_and_keep(tmp_path).rows
        assert (row["wrote"], row["live"]) == (1.7e9, False)


def test_what_cannot_be_put_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken" / "inside").mkdir(parents=True)
    with pytest.raises(OSError, match="taken"):
        Store(tmp_path).put("taken", b"x")
    assert [path.name for path in tmp_path.iterdir()] == ["taken"]


# Object stores ----------------------------------------------------------------------------------------------


@pytest.fixture
def bucket(messy: Path, object_server: ObjectServer) -> str:
    """The same on S3."""
    url = object_server.make_bucket()
    store = object_server.files()
    for file in messy.rglob("*"):
        if file.is_file():
            with store.open_output_stream(f"bucket/runs/{file.relative_to(messy).as_posix()}") as sink:
                sink.write(file.read_bytes())
    return f"{url}/runs"


def test_a_messy_bucket(bucket: str, capsys: pytest.CaptureFixture[str]) -> None:
    code, rows, err = scanned(bucket, capsys)
    assert (code, err) == (0, "")
    assert_messy(rows)
    assert read_table(f"{bucket}/{TABLE}").root == bucket


def test_a_store_that_goes_away_in_the_middle_keeps_what_was_read(
    bucket: str, object_server: ObjectServer
) -> None:
    before = scan(bucket)
    unread = [row | {"key": "another"} for row in before.rows[:3]]
    before.rows[:3] = unread
    table = scan(bucket, before=before, progress=lambda done, _: object_server.stop() if done == 1 else None)
    rows = {row["run"]: row for row in table.rows}
    assert len(rows) == len(before.rows)
    lost = [row for row in rows.values() if row["error"] and row["run"] not in UNREADABLE]
    assert 1 <= len(lost) <= 2
    assert all("cannot be reached" in row["error"] for row in lost)
    assert all(row["steps"] for row in lost)  # what was known is kept
    object_server.start()
    again = {row["run"]: row for row in scan(bucket, before=table).rows}
    assert {run for run, row in again.items() if row["error"]} == set(UNREADABLE)


@pytest.fixture(autouse=True)
def _no_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    """On stderr, when the machine is slow."""
    monkeypatch.setattr("layerwatch.scan_command.LINE_SECONDS", 1e9)


def refused(url: str, capsys: pytest.CaptureFixture[str], *more: str) -> str:
    """The one line that is said."""
    began = time.monotonic()
    code, rows, err = scanned(url, capsys, *more)
    assert (code, rows) == (2, {})
    assert len(err.splitlines()) == 1
    assert time.monotonic() - began < 40
    assert CREDENTIALS["AWS_SECRET_ACCESS_KEY"] not in err
    return err


def test_buckets_that_cannot_be_read_are_one_line(
    object_server: ObjectServer, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "no such bucket" in refused("s3://gone/runs", capsys)
    assert "no credentials in the URL" in refused("s3://key:not-to-be-shown@bucket/runs", capsys)
    with ObjectServer(unchecked=0) as strict:
        monkeypatch.setenv("AWS_ENDPOINT_URL_S3", strict.endpoint)
        said = refused("s3://bucket/runs", capsys)
        assert "access" in said
    assert "cannot be reached" in refused("s3://bucket/runs", capsys)  # that server has ended


def test_a_table_that_cannot_be_written_costs_no_row(
    messy: Path, object_server: ObjectServer, capsys: pytest.CaptureFixture[str]
) -> None:
    code, rows, err = scanned(messy, capsys, "--out", "s3://gone/scan.parquet")
    assert code == 2
    assert len(err.splitlines()) == 1
    assert "no such bucket" in err
    assert_messy(rows)
