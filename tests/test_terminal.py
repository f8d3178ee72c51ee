"""Names and texts of a log, in what the commands print: none steers the terminal, none begins a line."""

from __future__ import annotations

import json
import math
import unicodedata
from pathlib import Path

import pyarrow as pa
import pytest

from layerwatch import Run
from layerwatch.cli import main
from layerwatch.monitor import LogWriter
from layerwatch.monitor.schema import STATS
from tests.monitor.made_logs import PERIOD, START, info, stats_batch

ESCAPES = "\x1b]0;title\x07\x9b2J\r\u202e"
NAME = f"a{ESCAPES}\nruns: 9 healthy [bold]"


def hostile(path: Path) -> Path:
    """A sick run; whatever has a name or is a text may move the cursor."""
    about = info(
        name=path.name, note=ESCAPES, owner=ESCAPES, tags=[ESCAPES], model=[ESCAPES], notes=[ESCAPES],
        config={f"lr{ESCAPES}": f"{path.name}"},
    )  # fmt: skip
    for tensor in about["tensors"]:
        tensor["tensor"] += ESCAPES
    log = LogWriter(path, about)
    for step in range(8):
        rows = stats_batch([step]).to_pylist()
        for row in rows:
            row["tensor"] += ESCAPES
            row["pos_infs"] = int(step > 3)
        log.stats(pa.RecordBatch.from_pylist(rows, STATS))
        log.scalars(step, START + step * PERIOD, {"train_loss": math.nan if step > 3 else 1.0, ESCAPES: 1.0})
    log.event(5, "resume", ESCAPES)
    log.close()
    return path


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    hostile(root / NAME)
    hostile(root / "b[/x]")
    (root / f"torn{NAME}").mkdir()
    (root / f"torn{NAME}" / "run.json").write_text("{")
    return root


COMMANDS = {
    "check": "check {run} {torn}",
    "check for a pull request": "check {run} {torn} --format markdown",
    "check on GitHub": "check {run} {torn} --format github",
    "check --follow": "check {run} --follow",
    "runs": "runs {root}",
    "runs that fit": "runs {root} --where -is:live",
    "label": "label {run} {torn}",
    "scan": "scan {root} --out {out}/t.parquet",
    "scan again": "scan {root} --out {out}/t.parquet --since 9000d",
    "compare": "compare {run} {root}/b[/x]",
    "compare for a pull request": "compare {run} {root}/b[/x] --format markdown",
    "drift": "drift {run}@0 {run}",
    "calibrate": "calibrate {root} --out {out}/normal.json",
    "what cannot be read": "export {torn} {out}/a.csv",
}


@pytest.mark.parametrize("case", COMMANDS)
def test_no_text_of_a_log_steers_a_terminal(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.delenv("GITHUB_STEP_SUMMARY", raising=False)
    places = {"root": root, "run": root / NAME, "torn": root / f"torn{NAME}", "out": tmp_path}
    main([part.format(**places) for part in COMMANDS[case].split()])
    out, err = capsys.readouterr()
    said = out + err
    assert not {c for c in said if unicodedata.category(c) == "Cc"} - {"\n"}
    assert "\u202e" not in said
    assert "\ufffd" in said


@pytest.mark.parametrize("case", ["check", "check on GitHub", "check --follow", "scan", "compare"])
def test_no_name_begins_a_line(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], case: str
) -> None:
    places = {"root": root, "run": root / NAME, "torn": root / f"torn{NAME}", "out": tmp_path}
    main([part.format(**places) for part in COMMANDS[case].split()])
    out, err = capsys.readouterr()
    assert "runs: 9 healthy [bold]" in out + err
    assert not [line for line in (out + err).splitlines() if line.startswith("runs: 9 healthy")]


def test_json_has_the_names_as_they_are(root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(root / NAME), "--format", "json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["runs"] == [Run(root / NAME).name] == [NAME]
    assert any(ESCAPES in layer for finding in found["findings"] for layer in finding["layers"])
