"""Many runs below one folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from made_logs import make_run

from layerwatch.monitor import RunError, StoreError, open_runs, scan_runs
from layerwatch.monitor.description import write_json
from layerwatch.monitor.mirror import Mirror
from tests.object_server import ObjectServer


def test_every_run_below_a_folder_newest_first(tmp_path: Path) -> None:
    for created, name in [(100.0, "old"), (300.0, "group/new"), (200.0, "group/deep/er/middle")]:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        make_run(tmp_path / name, 1, created=created)
    (tmp_path / "empty").mkdir()
    assert [r.path.relative_to(tmp_path).as_posix() for r in open_runs(tmp_path)] == [
        "group/new",
        "group/deep/er/middle",
        "old",
    ]


def test_the_folder_may_be_a_run_itself(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 1)
    assert [r.path for r in open_runs(path)] == [path]


def test_runs_of_a_newer_version_are_left_out_and_named(tmp_path: Path) -> None:
    make_run(tmp_path / "good", 1)
    write_json(make_run(tmp_path / "bad", 1) / "run.json", {"schema_version": 99})
    runs, broken = scan_runs(tmp_path)
    assert [r.name for r in runs] == ["good"]
    assert list(broken) == [str(tmp_path / "bad")]
    assert "log format 99" in broken[str(tmp_path / "bad")]
    assert [r.name for r in open_runs(tmp_path)] == ["good"]


def test_hidden_folders_and_a_runs_own_are_not_searched(tmp_path: Path) -> None:
    path = make_run(tmp_path / "a", 1)
    make_run(tmp_path / ".trash" / "b", 1)
    make_run(path / "stats" / "c", 1)
    assert [r.name for r in open_runs(tmp_path)] == ["a"]


@pytest.mark.parametrize("name", ["missing", "file"])
def test_the_root_must_be_a_folder(tmp_path: Path, name: str) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(RunError, match="expected a folder that holds runs"):
        open_runs(tmp_path / name)


def test_no_run_is_no_error(tmp_path: Path) -> None:
    assert scan_runs(tmp_path) == ([], {})


def test_runs_on_an_object_store(object_server: ObjectServer, tmp_path: Path) -> None:
    bucket = object_server.make_bucket()
    for created, name in [(100.0, "old"), (300.0, "group/new"), (200.0, "group/deep/er/middle")]:
        Mirror(make_run(tmp_path / str(created), 2, created=created), f"{bucket}/{name}").send()
    found = open_runs(bucket + "/")
    assert [r.url for r in found] == [f"{bucket}/{n}" for n in ("group/new", "group/deep/er/middle", "old")]
    assert [r.last_step for r in found] == [1, 1, 1]
    assert [r.name for r in open_runs(f"{bucket}/group/deep")] == ["middle"]
    assert open_runs(f"{bucket}/nothing") == []
    assert not any(r.live for r in found)
    with pytest.raises(StoreError, match="no such bucket"):
        open_runs("s3://other/")
