"""The library over an object store that fails and comes back."""

from __future__ import annotations

from pathlib import Path

import pytest

from layerwatch.dashboard.queries import Library
from layerwatch.monitor import StoreError
from layerwatch.monitor.mirror import Mirror
from tests.object_server import ObjectServer


def test_known_runs_stay_while_the_store_cannot_be_reached(
    object_server: ObjectServer, runs_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("layerwatch.dashboard.queries.SCAN_SECONDS", 0.0)
    bucket = object_server.make_bucket()
    library, late = Library(f"{bucket}/"), Library(bucket)
    assert library.runs() == {}
    Mirror(runs_root / "healthy", f"{bucket}/group/healthy").send()
    assert list(library.runs()) == ["group/healthy"]
    assert list(Library(f"{bucket}/group/healthy").runs()) == ["healthy"]
    assert library.run("group/healthy").last_step > 0
    judged = library.judgement("group/healthy", wait=60.0)
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
