"""Many readers and one writer, each a process of its own: nobody ever sees half a capture."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from made_logs import TENSORS, info, make_session

from layerwatch.monitor import LogWriter, Run, compact

HERE = Path(__file__).parent

WRITER = """
import sys, time
sys.path.insert(0, sys.argv[1])
from made_logs import info, make_session
from layerwatch.monitor import LogWriter, log, tiers
log.SEGMENT_BYTES = 60_000
tiers.FULL_CAPTURES = 64
from pathlib import Path
path, upto, reads = Path(sys.argv[2]), int(sys.argv[3]), [Path(name) for name in sys.argv[4:]]
writer = LogWriter(path, info())
for begin in range(0, upto, 20):
    while min(file.stat().st_size for file in reads) < min(begin // 20, 3):  # else a slow one comes too late
        time.sleep(0.01)
    make_session(writer, range(begin, begin + 20))
    writer.update_info(progress=begin)
writer.close()
writer = LogWriter(path, info(), resume=True)
make_session(writer, range(upto - 30, upto + 10), scale=2.0)
writer.close()
"""

READER = """
import atexit, json, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from made_logs import TENSORS
from layerwatch.monitor import Run
path, upto, stop, seen = Path(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]), Path(sys.argv[5])
atexit.register(lambda: seen.write_text(1000 * "x"))  # nobody waits for a reader that has failed
while not (path / "run.json").exists():
    time.sleep(0.01)
run, reads, last, done = Run(path), 0, 0, False
while not done:
    done = stop.exists()
    run.refresh()
    frame = run.stats("weight", columns=["step", "tensor", "norm"])
    update = run.stats("update", columns=["step", "tensor", "ratio"])
    losses, (value_steps, _) = run.scalars("train_loss"), run.values("0.bias")
    steps = sorted(set(frame["step"]))
    assert steps == list(range(len(steps))), "a step is missing"
    assert len(frame) == len(steps) * len(TENSORS), "a capture is there in part, or twice"
    restarted = len(run.sessions()) > 1
    assert restarted or len(steps) >= last, "what was seen has gone"
    for other in (sorted(set(update["step"])), losses["step"].tolist(), value_steps.tolist()):
        assert other == list(range(len(other))), "a step is missing"
    few = run.stats("weight", TENSORS[0], ["captures", "step", "last_step"], max_points=20)
    assert (few["step"][1:].to_numpy() == few["last_step"][:-1].to_numpy() + 1).all(), "bins do not follow"
    assert run.problems == {}, run.problems
    last, reads = len(steps), reads + 1
    seen.write_text("x" * reads)
print(json.dumps({"reads": reads, "steps": last, "sums": float(frame["norm"].sum())}))
"""


def processes(tmp_path: Path, upto: int, readers: int) -> list[dict[str, float]]:
    path, stop = tmp_path / "a", tmp_path / "stop"
    reads = [tmp_path / f"reads{number}" for number in range(readers)]
    for file in reads:
        file.touch()
    common = [str(HERE), str(path), str(upto)]
    started = [
        subprocess.Popen(
            [sys.executable, "-c", READER, *common, str(stop), str(file)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for file in reads
    ]  # fmt: skip
    try:
        subprocess.run([sys.executable, "-c", WRITER, *common, *map(str, reads)], check=True, timeout=600)
        stop.touch()
        answers = [p.communicate(timeout=120) for p in started]
    finally:
        stop.touch()
        for process in started:
            process.kill()
            process.wait()
    assert [p.returncode for p in started] == [0] * readers, [error for _, error in answers]
    return [json.loads(out) for out, _ in answers]


@pytest.mark.parametrize(
    ("upto", "readers"),
    [(160, 3), pytest.param(4000, 6, marks=[pytest.mark.soak, pytest.mark.timeout(1800)])],
)
def test_readers_see_whole_captures_in_order(tmp_path: Path, upto: int, readers: int) -> None:
    answers = processes(tmp_path, upto, readers)
    run = Run(tmp_path / "a")
    total = run.stats("weight", columns=["norm"])["norm"].sum()
    for answer in answers:
        assert answer["steps"] == upto + 10
        assert answer["sums"] == pytest.approx(total)
        assert answer["reads"] >= 3


def test_what_a_reader_saw_stays_readable_after_merging(tmp_path: Path) -> None:
    """A reader that does not look at the disk again finds its rows in the parts that replaced its files."""
    path = tmp_path / "a"
    make_session(LogWriter(path, info()), range(30)).close(quick=True)
    compact(path)
    make_session(LogWriter(path, info(), resume=True), range(30, 60)).close(quick=True)
    run = Run(path)
    compact(path)
    for tensor in TENSORS:
        assert run.stats("weight", tensor)["step"].tolist() == list(range(60))
    assert run.problems == {}
    assert run.refresh()
