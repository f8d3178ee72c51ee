"""Where weights of all kinds come in: files, folders, state_dicts, arrays, models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .monitor import Run
from .monitor.errors import WeightsError
from .monitor.spool import is_url
from .monitor.weights import Adapted, ArrayWeights, Weights, adapter_of, applied, effective, open_path

if TYPE_CHECKING:
    from .monitor.weights.from_runs import RunAt
    from .monitor.weights.precision import PrecisionReport
    from .monitor.weights.report import Drift

_TORCH = (".pt", ".pth", ".bin", ".ckpt")


def open_weights(source: Any) -> Weights:
    """Weights to be read block by block; use it in a `with` statement, or `close` it.

    Args:
        source: a .safetensors file; a .pt, .pth, .bin or .ckpt file (read with weights_only=True: code in it
            never runs); the index of a sharded checkpoint; a folder as Hugging Face saves it; a state_dict;
            a torch module; a mapping of names to numpy arrays.

    Raises:
        WeightsError: nothing of it can be read. What can be is opened, and `problems` lists the rest.
        ModuleNotFoundError: torch is needed and not installed.
    """
    if isinstance(source, Weights):
        return source
    if isinstance(source, str | Path):
        return open_path(source, dict.fromkeys(_TORCH, _torch_file))
    if hasattr(source, "state_dict"):
        source = source.state_dict()
    if not isinstance(source, Mapping):
        raise WeightsError(
            "expected a path, a state_dict, a module or a mapping of names to arrays, "
            f"got {type(source).__name__}"
        )
    if any(type(value).__module__.partition(".")[0] == "numpy" for value in source.values()):
        return ArrayWeights(source)
    from .hooks.weights import StateWeights

    return StateWeights(source)


def open_adapted(base: Any, adapter: Any, *, alpha: float | None = None, name: str | None = None) -> Adapted:
    """A base model and its LoRA adapter as one state: W0 + scale * B A, computed where it is asked for.

    Args:
        base, adapter: as `open_weights` takes them; a PEFT folder; a checkpoint that holds both, given twice.
        alpha: LoRA's alpha, where no adapter_config.json is beside the adapter: the scale is alpha / r.
        name: which adapter, where a checkpoint holds several.

    Raises:
        WeightsError: one of them cannot be read, or nothing of the adapter can be applied. What can be is
            applied, and `problems` lists the rest.
    """
    with ExitStack() as opened:
        trained = opened.enter_context(open_weights(adapter))
        found = adapter_of(trained, alpha=alpha, name=name)
        if found is None:
            raise WeightsError(
                f"expected an adapter (lora_A and lora_B, or lora_down and lora_up), got {trained.label}"
            )
        whole = trained if base is adapter else opened.enter_context(open_weights(base))
        together = applied(whole, found)
        opened.pop_all()  # they stay open as long as what they are together
    return together


def drift(
    a: Any,
    b: Any,
    *,
    run: Run | str | Path | None = None,
    alpha: float | None = None,
    spectrum: bool = False,
    seconds: float = 60.0,
    advance: Callable[[str], None] | None = None,
) -> Drift:
    """How far has each layer moved from `a` to `b`?

    Args:
        a, b: anything that `open_weights` takes; b may be an adapter of a, compared as if merged; or a run:
            its folder, its URL, a `Run`, or one at a step: "runs/exp1@500", "runs/exp1@start",
            "runs/exp1@reference", (run, 500). A run alone is taken at its last capture.
        run: the training that made b of a: its logged updates tell how far they could reach.
        alpha: LoRA's, where neither a file nor the adapter_config.json beside it tells it.
        spectrum: also the singular values and vectors of matrices, for at most so many `seconds`.
        advance: called with the name of each tensor that is done.

    Raises:
        WeightsError, RunError: one of them cannot be read at all. What cannot be read of the others is
            listed in `not_compared`.

    Examples:
        >>> import numpy as np
        >>> before = {"fc.weight": np.array([[3.0, 4.0]])}
        >>> drift(before, {"fc.weight": np.array([[3.0, 4.5]])}).tensors["relative_l2"].tolist()
        [0.1]
    """
    from .monitor.weights.from_runs import RunAt, compare_runs
    from .monitor.weights.report import compare_weights
    from .monitor.weights.yardstick import reaches

    with ExitStack() as opened:
        one, two = _state(a, opened), _state(b, opened)
        reached = None if run is None else reaches(run if isinstance(run, Run) else Run(run))
        if isinstance(one, RunAt) or isinstance(two, RunAt):
            found = compare_runs(one, two, reached)
            if spectrum:
                found.notes.append("singular values take weight files: a run's log holds no matrices")
            return found
        one = effective(one, alpha=alpha)
        two = effective(two, one, alpha=alpha)
        return compare_weights(one, two, spectrum=spectrum, seconds=seconds, reaches=reached, advance=advance)


def _state(source: Any, opened: ExitStack) -> RunAt | Weights:
    from .monitor.weights.from_runs import RunAt

    if is_run(source):
        return RunAt.of(source if isinstance(source, Run) else Run(source))
    if isinstance(source, tuple) and len(source) == 2 and isinstance(source[0], Run | str | Path):
        run, step = source
        return RunAt.of(run if isinstance(run, Run) else Run(run), step)
    if isinstance(source, str | Path):
        path, at, step = str(source).rpartition("@")
        if at and is_run(path):
            return RunAt.of(Run(path), step)
    if isinstance(source, Weights):  # whoever opened it closes it
        return source
    return opened.enter_context(open_weights(source))


def is_run(source: Any) -> bool:
    """A run, its URL or the folder of one; not one at a step, RUN@STEP."""
    if isinstance(source, str | Path):
        url = is_url(str(source)) and "@" not in str(source)
        return url or (Path(source) / "run.json").is_file()
    return isinstance(source, Run)


def precision(source: Any, *, least_snr: float = 20.0) -> PrecisionReport:
    """What fewer bits would do to the weights of a network: fp16, bf16, fp8, int8 and int4, tensor by tensor.

    Args:
        source: what `open_weights` takes: every element is rounded; a checkpoint that carries adapters is
            judged as if merged. Or a run, also at a step, as `drift` takes it: estimates, said so.
        least_snr: signal to noise, in dB, that an advised format leaves, overall and in 99 of 100 channels.

    Raises:
        WeightsError, RunError: nothing of it can be read. What cannot be judged is in `left_out`.
        ValueError: `least_snr` is no number above 0.

    Examples:
        >>> import numpy as np
        >>> precision({"fc.weight": np.array([[1.0, 0.5]])}).recommended()
        {'fc.weight': 'int8 per channel'}
    """
    from .monitor.weights.from_runs import RunAt
    from .monitor.weights.precision import weights_report
    from .monitor.weights.precision_run import run_report

    with ExitStack() as opened:
        state = _state(source, opened)
        if isinstance(state, RunAt):
            return run_report(state, least_snr=least_snr)
        return weights_report(effective(state), least_snr=least_snr)


def _torch_file(path: Path) -> Weights:
    try:
        from .hooks.weights import open_torch
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{path} is a file of PyTorch's, which reading takes torch: pip install 'layerwatch[torch]'"
        ) from error
    return open_torch(path)
