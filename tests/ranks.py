"""A run of three ranks that hold copies of two tensors."""

from __future__ import annotations

from pathlib import Path

from layerwatch.monitor import LogWriter, Run


def parted_run(
    path: Path, *, healed: bool = False, until: dict[int, int] | None = None, last: int = 200,
    close: bool = True,
) -> Run:  # fmt: skip
    """At step 100 rank 2 holds another `w` than the others, and unless `healed` at step 200 as well.

    Args:
        until: rank -> its last step. last: that of all others.
    """
    tensors = [
        {
            "tensor": name, "names": [name], "role": "matrix", "shape": [2, 2], "elements": 4,
            "dtype": "float32", "module": name, "module_type": "Linear", "trainable": True,
            "state": "trainable",
        }
        for name in ("v", "w")
    ]  # fmt: skip
    logs = [
        LogWriter(
            path,
            {"tensors": tensors, "rank": r, "world": 3, "shards": {"0": {}}, "host": "made"},
            writer=f"r{r}",
        )
        for r in range(3)
    ]
    for rank, log in enumerate(logs):
        log.begin(0)
        for step in range(0, min(last, (until or {}).get(rank, last)) + 1, 100):
            other = rank == 2 and (step == 100 or (step > 100 and not healed))
            rows = [("v", 7.0), ("w", 9.0 + other)]
            log.values([(step, float(step), name, "checksum", [value]) for name, value in rows])
        if close:
            log.close()
        else:
            log._background.stop()
            log._journal.close()
    return Run(path)
