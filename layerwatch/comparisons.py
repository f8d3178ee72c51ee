"""Two versions compared: runs by all that they logged, weight files by how far each layer moved."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from .monitor import Run, RunError
from .monitor.comparing import Comparison, compare_runs
from .weights import drift, is_run

if TYPE_CHECKING:
    from .monitor.weights.report import Drift


def compare(a: Any, b: Any, repeats: Sequence[Any] = ()) -> Comparison | Drift:
    """Compare two versions of a model or training.

    Args:
        a: the earlier or better known one: a run (its folder, URL or `Run`), or weights as `layerwatch.drift`
            takes them.
        b: the other one, of the same kind; if only one of them is a run, their weights are compared.
        repeats: runs of A's configuration with other seeds. With two or more of them it is said which
            differences of results are larger than seed noise; without, that this cannot be told.

    Returns:
        of two runs a `Comparison`, else what `layerwatch.drift` returns.

    Raises:
        RunError: a run is empty or none. WeightsError: weights cannot be read.
        ValueError: repeats were given, but A and B are not both runs.
    """
    if is_run(a) and is_run(b):
        return compare_runs(_open(a), _open(b), [_open(run) for run in repeats])
    if repeats:
        raise ValueError(
            f"expected two runs beside repeats, got {a} and {b}: seed noise is judged by what runs log"
        )
    return drift(a, b)


def _open(source: Any) -> Run:
    run = source if isinstance(source, Run) else Run(source)
    if run.last_step < 0:
        raise RunError(
            f"the run {source} is empty: nothing is captured yet, "
            "wait for its first steps or check the training"
        )
    return run
