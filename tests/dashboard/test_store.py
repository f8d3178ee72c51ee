"""The library over an object store that fails and comes back."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from layerwatch.dashboard.queries import Library
from layerwatch.monitor import StoreError
from layerwatch.monitor.fleet import TABLE, scan, write_table
from layerwatch.monitor.mirror import Mirror
from tests.object_server import ObjectServer


def test_known_runs_stay_while_the_store_cannot_be_reached(
    object_server: ObjectServer, runs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwatch.dashboard.roots.SCAN_SECONDS", 0.0)
    bucket = object_server.make_bucket()
    library, late = Library(f"{bucket}/"), Library(bucket)
    assert library.runs() == {}
    Mirror(runs_root / "healthy", f"{bucket}/group/healthy").send()
    assert list(library.runs()) == ["group/healthy"]
    assert list(Library(f"{bucket}/group/healthy").runs()) == ["healthy"]
    assert library.run("group/healthy").last_step > 0
    judged = library.judgement("group/healthy", wait=150)
    assert judged is not None
    assert judged.error == ""

    object_server.stop()
    assert list(library.runs()) == ["group/healthy"]
    assert "cannot be reached" in library.broken()[bucket]
    with pytest.raises(StoreError, match="cannot be reached"):
        late.runs()
    object_server.start()
    assert list(late.runs()) == list(library.runs()) == ["group/healthy"]
    assert library.broken() == {}


def test_a_scan_table_in_a_bucket_stands_for_its_runs(object_server: ObjectServer, runs_root: Path) -> None:
    bucket = object_server.make_bucket()
    for name in ("healthy", "finetune"):
        Mirror(runs_root / name, f"{bucket}/group/{name}").send()
    write_table(scan(f"{bucket}/"), f"{bucket}/{TABLE}")
    Mirror(runs_root / "vanishing", f"{bucket}/late").send()
    beside, alone = Library(f"{bucket}/"), Library(f"{bucket}/{TABLE}")
    for library in (beside, alone):
        assert {"group/healthy", "group/finetune"} <= set(library.runs())
        assert library.asleep("group/finetune")
        assert library.run("group/healthy").last_step == 59
    deadline = time.monotonic() + 30
    while "late" not in beside.runs():  # found behind the table
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert beside.newer() == 1
    assert set(alone.runs()) == {"group/healthy", "group/finetune"}
