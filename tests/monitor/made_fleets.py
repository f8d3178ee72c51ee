"""A few runs below one folder, made without torch: healthy ones, sick ones, and what is no run."""

from __future__ import annotations

import math
from pathlib import Path

from layerwatch.monitor import LogWriter
from tests.monitor.made_logs import PERIOD, START, info, make_run, stats_batch


def make_sick(path: Path, steps: int = 8, first: int = 4, *, close: bool = True) -> Path:
    """A run whose loss is NaN from step `first` on."""
    log = LogWriter(path, info(name=path.name))
    for step in range(steps):
        log.stats(stats_batch([step]))
        log.scalars(step, START + step * PERIOD, {"train_loss": math.nan if step >= first else 1.0})
    if close:
        log.close()
    return path


def make_fleet(root: Path) -> Path:
    """good, group/other and sick; a folder of notes; a run.json that is none."""
    make_run(root / "good", name="good", owner="ana", tags=["base"], config={"optimizer": {"lr": 0.1}})
    make_run(root / "group" / "other", 3, name="other", note="with warmup")
    make_sick(root / "sick")
    (root / "notes").mkdir()
    (root / "notes" / "readme.txt").write_text("no run")
    (root / "torn").mkdir()
    (root / "torn" / "run.json").write_text('{"schema_ver')
    return root
