"""The commands on an object store."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from layerwatch.cli import main
from layerwatch.monitor.mirror import Mirror
from layerwatch.monitor.spool import spool_of
from tests.object_server import ObjectServer
from tests.test_cli import train


@pytest.fixture
def bucket(object_server: ObjectServer, tmp_path: Path) -> str:
    """With a healthy and a broken run."""
    bucket = object_server.make_bucket()
    for name, broken in (("good", False), ("group/bad", True)):
        Mirror(train(tmp_path / name, broken=broken, steps=15), f"{bucket}/{name}").send()
    return bucket


def test_reading_commands_take_urls(bucket: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["runs", bucket + "/"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert {row[0]: row[1:3] for row in rows if row and row[0] in ("good", "group/bad")} == {
        "good": ["healthy", "closed"],
        "group/bad": ["nonfinite", "closed"],
    }
    assert main(["check", f"{bucket}/group/bad", "--fail-on", "critical"]) == 1
    assert "nonfinite" in capsys.readouterr().out
    assert main(["check", f"{bucket}/good", "--baseline", str(tmp_path / "good")]) == 0
    assert main(["export", f"{bucket}/good", "there.parquet"]) == 0
    assert main(["export", str(tmp_path / "good"), "here.parquet"]) == 0
    pd.testing.assert_frame_equal(pd.read_parquet("there.parquet"), pd.read_parquet("here.parquet"))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["check", "s3://other/exp1"], "no such bucket"),
        (["runs", "s3://other/"], "no such bucket"),
        (["dashboard", "s3://other/", "--port", "0"], "no such bucket"),
        (["check", "s3://bucket/nothing"], "expected a run folder with a run.json"),
        (["compact", "s3://bucket/good"], "expected a local run folder"),
        (["upload", "s3://bucket/good"], "found none: kept there is nothing"),
        (["upload", "--to", "s3://bucket/good"], "expected the URL of one run with --to"),
    ],
)
def test_what_cannot_be_is_one_line(
    bucket: str, capsys: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    assert main(command) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_upload_sends_what_is_left(object_server: ObjectServer, capsys: pytest.CaptureFixture[str]) -> None:
    bucket = object_server.make_bucket()
    assert main(["upload"]) == 0
    assert "nothing is left to send" in capsys.readouterr().out
    for name in ("one", "two", "three"):
        train(spool_of(f"{bucket}/{name}"), steps=5, close=name != "one")
    assert main(["upload", f"{bucket}/three", "--to", f"{bucket}/third"]) == 0
    assert f"{bucket}/third: " in capsys.readouterr().out
    object_server.stop()
    assert main(["upload"]) == 2
    assert capsys.readouterr().err.count("cannot be reached") == 2
    object_server.start()
    assert main(["upload"]) == 0
    assert capsys.readouterr().out.count("files sent") == 2
    assert main(["runs", bucket]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ("one", "two", "third", "interrupted"))
