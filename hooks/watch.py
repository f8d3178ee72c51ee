"""`watch`: the user's one call, and the `Watcher` it returns."""

from __future__ import annotations

import atexit
import functools
import logging
import os
import re
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp.grad_scaler import GradScaler
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from ..monitor import LogWriter, Run, RunError
from . import gradients, scaler
from .cadence import Cadence, Every
from .capture import Capture
from .environment import describe_environment, describe_optimizers
from .reference import Source, load_state
from .scalars import PendingScalars, number
from .scaler import still_scaled
from .statistics import warm_up
from .tensors import WatchedTensor, is_opaque, is_sharded, leaf_modules, watched_tensors

if TYPE_CHECKING:
    from ..monitor import Finding

logger = logging.getLogger("layerwatch")

Models = nn.Module | Sequence[nn.Module]
Optimizers = Optimizer | Sequence[Optimizer] | None
Patterns = str | Sequence[str] | None

#: Detectors run in the training process (for `on_finding`) at most this share of its time, and not more often
#: than this.
CHECK_SHARE, CHECK_SECONDS = 0.01, 10.0


def watch(
    model: Models,
    optimizer: Optimizers = None,
    *,
    run: str | Path | None = None,
    every: Every = "auto",
    budget: float = 0.02,
    reference: str | Path | Mapping[str, Any] | None = "start",
    include: Patterns = None,
    exclude: Patterns = None,
    activations: bool = True,
    updates: bool = True,
    config: Mapping[str, Any] | None = None,
    on_finding: Callable[[Finding], None] | None = None,
    resume: bool = False,
    keep: str = "full",
    drift_limit: float | None = None,
) -> Watcher:
    """Attach to a training and log it to a run folder.

    Args:
        model: a module, or several (a GAN).
        optimizer: one, several, or None: found when they step, through torch's global optimizer hooks.
        run: the run folder; None makes one below ./runs.
        every: capture every N-th optimizer step, or "auto": as often as `budget` allows.
        budget: for "auto": the share of the training's time that monitoring may take.
        reference: what drift is measured from: "start", a state_dict, a checkpoint (.safetensors, .pt), or
            None.
        include, exclude: regular expressions on tensor names; a tensor is watched when any of `include` (all
            when None) and none of `exclude` is found in it.
        activations: summarise the outputs of leaf modules on captured steps.
        updates: log the true change of each weight; takes one transient copy of the weights around a captured
            step.
        config: hyperparameters to show beside the run.
        on_finding: called in the training process with each new finding.
        resume: continue an existing run after its last step.
        keep: "full": every capture is kept.
        drift_limit: a relative L2 distance from the reference that must not be passed; the detectors alarm
            beyond it.

    Returns:
        A `Watcher`: log scalars with `log`, end with `close` (or use it as a context manager; it is closed at
        exit).

    Raises:
        ValueError, TypeError: an argument is not as described, the model has no trainable parameter, or the
            optimizer owns none of the model's.
        RunError: the run exists already (and `resume` is off), or its folder cannot be used.
    """
    models = _models(model)
    optimizers = _optimizers(optimizer)
    cadence = Cadence(every, budget)
    if keep != "full":
        raise ValueError(f'expected keep="full", got keep={keep!r}')
    if drift_limit is not None and not drift_limit > 0:
        raise ValueError(f"expected a drift_limit above 0 (a relative L2 distance), got {drift_limit!r}")
    tensors = _select(watched_tensors(models), include, exclude)
    _check_parameters(models, tensors, optimizers)
    state = load_state(reference) if reference is not None and reference != "start" else None
    path = Path(run) if run is not None else _new_run()
    if "://" in str(run):
        raise RunError(
            f"expected a local folder for the run, got {str(run)!r}: object stores are not supported yet"
        )
    modules = list(leaf_modules(models)) if activations else []
    info = {
        "name": path.name,
        **describe_environment(),
        "config": dict(config or {}),
        "model": [type(m).__name__ for m in models],
        "every": every,
        "budget": budget if every == "auto" else None,
        "reference": _describe(reference),
        "drift_limit": drift_limit,
        "optimizers": describe_optimizers(optimizers),
        "tensors": [t.entry() for t in tensors],
        "modules": [{"module": name, "type": type(m).__name__} for name, m in modules],
        "notes": _notes(models, tensors, activations),
    }
    if _rank() != 0:
        info["notes"].append("this is not rank 0: nothing is logged from here")
    log = LogWriter(path, info, resume=resume) if _rank() == 0 else None
    first_step = Run(path).last_step + 1 if resume and log is not None else 0
    return Watcher(
        log, path, tensors, modules, optimizers, cadence, state, reference, updates, on_finding, first_step
    )


class Watcher:
    """A training under watch; made by `watch`. Attributes: run (the folder), step (the optimizer step, from
    0)."""

    def __init__(
        self, log: LogWriter | None, run: Path, tensors: list[WatchedTensor],
        modules: list[tuple[str, nn.Module]],
        optimizers: list[Optimizer], cadence: Cadence, state: Mapping[str, Tensor] | None, reference: Source,
        updates: bool, on_finding: Callable[[Finding], None] | None, first_step: int,
    ) -> None:  # fmt: skip
        self.run, self.step = run, first_step
        self._first_step = first_step
        self._optimizers = list(optimizers)
        self._discover = not optimizers
        self._owned = {id(t.parameter) for t in tensors}
        self._counted: set[int] = set()  # optimizers whose step of this number has begun
        self._stepped: set[int] = set()  # and ended
        self._completed = -1
        self._begun = False
        self._scaler: GradScaler | None = None
        self._scaler_let_step = True
        self._cadence = cadence
        self._on_finding = on_finding
        self._reported: set[str] = set()
        self._checked, self._check_cost = time.perf_counter(), 0.0
        self._handles: list[Any] = []
        self._open = log is not None
        self._failed = False
        self._log = log
        if log is None:
            return
        warm_up()
        self._scalars = PendingScalars(log)
        self._capture = Capture(log, tensors, modules, state, reference == "start", updates, self._guard)
        self._attach()
        log.event(self.step, "restart" if first_step else "start", f"process {os.getpid()}")
        atexit.register(self.close)

    def _attach(self) -> None:
        before, after = self._guard(self._before_step), self._guard(self._after_step)
        if self._discover:
            self._handles = [
                register_optimizer_step_pre_hook(before),
                register_optimizer_step_post_hook(after),
            ]
        for optimizer in self._optimizers:
            self._handles += [
                optimizer.register_step_pre_hook(before),
                optimizer.register_step_post_hook(after),
            ]
        self._clip_listener = self._guard(self._before_clip)
        gradients.listen(self._clip_listener)
        scaler.listen(self)
        if self._cadence.wants(self.step):
            self._capture.tap.arm()

    def _guard(self, work: Callable[..., None]) -> Callable[..., None]:
        """Time the work, and turn any error in it into a log entry: training goes on without us."""

        @functools.wraps(work)
        def guarded(*args: Any, **kwargs: Any) -> None:
            if self._failed:
                return
            self._cadence.enter()
            try:
                work(*args, **kwargs)
            except Exception as error:  # whatever it is, it must not reach the training
                self._fail(error)
            finally:
                self._cadence.leave()

        return guarded

    def _fail(self, error: Exception) -> None:
        self._failed = True
        self._detach()
        logger.warning("layerwatch stopped watching %s after an error; training goes on: %r", self.run, error)
        try:
            with (self.run / "errors.log").open("a") as file:
                file.write(f"step {self.step}\n{traceback.format_exc()}\n")
            if self._log is not None:
                self._log.event(self.step, "error", f"watching stopped: {error!r}; see errors.log")
        except OSError:
            logger.warning("the error could not be written to %s", self.run)

    def _detach(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._capture.tap.disarm()
        gradients.unlisten(self._clip_listener)
        scaler.unlisten(self)

    # The optimizer's step

    def _watches(self, optimizer: Optimizer) -> bool:
        if not self._discover or any(o is optimizer for o in self._optimizers):
            return True
        if any(id(p) in self._owned for g in optimizer.param_groups for p in g["params"]):
            self._optimizers.append(optimizer)
            return True
        return False

    def _before_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._watches(optimizer):
            return
        if id(optimizer) in self._counted:
            self._complete_step()
            self.step += 1
            self._counted.clear()
            self._stepped.clear()
        self._counted.add(id(optimizer))
        if not self._begun:
            self._begun = True
            self._capture.begin(self.step, self._optimizers, initial=self._first_step == 0)
        if self._cadence.wants(self.step):
            self._capture.before_step(optimizer)

    def _after_step(self, optimizer: Optimizer, *_: Any) -> None:
        if not self._watches(optimizer):
            return
        self._stepped.add(id(optimizer))
        self._scaler_let_step = True
        rates = self._capture.learning_rates(self.step, self._optimizers)
        captured = self._cadence.wants(self.step)
        # Fused optimizers under a scaler step without a change. Asking an accelerator costs a synchronisation.
        overflow = getattr(optimizer, "found_inf", None)
        if overflow is not None and (captured or overflow.device.type == "cpu") and float(overflow) > 0:
            self._capture.mark_skipped(self.step)
        if captured:
            self._capture.after_step(self.step, optimizer, rates)
        if all(id(o) in self._stepped for o in self._optimizers):
            self._complete_step()

    def _complete_step(self) -> None:
        """All optimizers of this step have stepped: write what is left and plan the next capture."""
        if self._completed == self.step:
            return
        self._completed = self.step
        self._scalars.flush()
        if self._cadence.wants(self.step):
            cost = self._capture.complete(self.step, self._optimizers, self._cadence.overhead)
            self._cadence.captured(self.step, cost)
            self._check_live()
        if self._cadence.wants(self.step + 1):
            self._capture.tap.arm()
        else:
            self._capture.tap.disarm()

    def _before_clip(self, clipped: list[Tensor]) -> None:
        coming = self.step + (self._completed == self.step)
        if self._cadence.wants(coming):
            self._capture.before_clip(clipped, still_scaled(self._scaler, self._optimizers))

    # Mixed precision: see scaler.ScalerListener

    def scaling(self, scaler: GradScaler) -> None:
        self._scaler = scaler

    def scaler_steps(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self._scaler_let_step = False

    def scaler_stepped(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        self._guard(self._after_scaler)(scaler, optimizer)

    def _after_scaler(self, scaler: GradScaler, optimizer: Optimizer) -> None:
        if not scaler.is_enabled() or not self._watches(optimizer):
            return
        skipped = not self._scaler_let_step
        if skipped:  # the optimizer's own hooks did not fire
            self._before_step(optimizer)
        if (scale := scaler._scale) is not None:
            self._capture.loss_scale(self.step, scale, self._scalars)
        if skipped:
            self._capture.mark_skipped(self.step)
            self._after_step(optimizer)

    # What the user calls

    def log(self, **scalars: Any) -> None:
        """Log named numbers at the current step.

        Args:
            scalars: numbers, or tensors with one element (one on an accelerator is not synchronised on the
                spot).
                NaN and infinite values are data.

        Raises:
            TypeError: a value is no number.
        """
        values = {name: number(name, value) for name, value in scalars.items()}
        if not self._open or not values:
            return
        try:
            self._scalars.add(self.step, values)
        except OSError as error:
            self._open = False
            self._fail(error)

    def close(self) -> None:
        """Write the last weights, turn the log into Parquet, detach. Safe to call twice; also called at
        exit."""
        if not self._open or self._log is None:
            return
        self._open = False
        atexit.unregister(self.close)
        final = self._guard(self._capture.final)
        if self._begun and not self._failed:
            if self._completed != self.step:
                self._guard(self._complete_step)()
            final(self.step, self._optimizers)
        if not self._failed:
            self._detach()
        try:
            self._scalars.flush(wait=True)
            self._log.event(
                self.step, "close", f"monitoring took {100 * self._cadence.overhead:.2g} % of the time"
            )
            self._log.close()
        except OSError as error:
            self._fail(error)
        self._report_findings()

    def __enter__(self) -> Watcher:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Findings
    # ---------------------------------------------------------------------------------------------------

    def _check_live(self) -> None:
        since = time.perf_counter() - self._checked
        if self._on_finding is not None and since > max(CHECK_SECONDS, self._check_cost / CHECK_SHARE):
            start = time.perf_counter()
            self._report_findings()
            self._checked = time.perf_counter()
            self._check_cost = self._checked - start

    def _report_findings(self) -> None:
        if self._on_finding is None:
            return
        try:
            for finding in Run(self.run).findings():
                if finding.problem not in self._reported:
                    self._reported.add(finding.problem)
                    self._on_finding(finding)
        except Exception as error:  # a detector or the user's callback: neither may stop the training
            logger.warning("on_finding failed and is not called again: %r", error)
            self._on_finding = None


def _models(model: Models) -> list[nn.Module]:
    models = (
        [model] if isinstance(model, nn.Module) else list(model) if isinstance(model, Sequence) else [model]
    )
    for m in models:
        if not isinstance(m, nn.Module):
            raise TypeError(f"expected a torch.nn.Module or a list of them as model, got {type(m).__name__}")
    if not models:
        raise ValueError("expected at least one model, got an empty list")
    return models


def _optimizers(optimizer: Optimizers) -> list[Optimizer]:
    if optimizer is None:
        return []
    optimizers = [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise TypeError(
                f"expected a torch.optim.Optimizer or a list of them as optimizer, got {type(o).__name__}"
            )
    return optimizers


def _select(tensors: list[WatchedTensor], include: Patterns, exclude: Patterns) -> list[WatchedTensor]:
    def matches(patterns: Patterns, name: str) -> bool:
        several = [patterns] if isinstance(patterns, str) else list(patterns or ())
        return any(re.search(p, name) for p in several)

    chosen = [
        t for t in tensors if (include is None or matches(include, t.name)) and not matches(exclude, t.name)
    ]
    if tensors and not chosen:
        names = ", ".join(t.name for t in tensors[:3])
        raise ValueError(
            f"include={include!r}, exclude={exclude!r} leave no tensor to watch: names are like {names}"
        )
    return chosen


def _check_parameters(
    models: list[nn.Module], tensors: list[WatchedTensor], optimizers: list[Optimizer]
) -> None:
    names = ", ".join(type(m).__name__ for m in models)
    if not any(p.requires_grad for m in models for p in m.parameters()):
        raise ValueError(
            f"expected a model with at least one trainable parameter, got {names} with none: "
            "is requires_grad off everywhere?"
        )
    owned = {id(p) for m in models for p in m.parameters()}
    for optimizer in optimizers:
        if not any(id(p) in owned for group in optimizer.param_groups for p in group["params"]):
            raise ValueError(
                "expected an optimizer of the model's parameters, "
                f"but this {type(optimizer).__name__} owns none of those of "
                f"{names}: was it made for another model, or before the model was moved or rebuilt?"
            )


def _notes(models: list[nn.Module], tensors: list[WatchedTensor], activations: bool) -> list[str]:
    notes = []
    if activations and any(is_opaque(m) for model in models for m in model.modules()):
        notes.append("activations inside compiled or scripted modules cannot be seen and are not captured")
    sharded = [t.name for t in tensors if is_sharded(t.parameter)]
    if sharded:
        notes.append(f"{len(sharded)} sharded tensors are not captured: {', '.join(sharded[:3])} ...")
    return notes


def _describe(reference: Source) -> str | None:
    if reference is None:
        return None
    return "state_dict" if isinstance(reference, Mapping) else str(reference)


def _rank() -> int:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0") or 0)


def _new_run() -> Path:
    stamp = time.strftime("%Y-%m-%d-%H%M%S")
    numbers = (Path("runs") / (stamp if i == 0 else f"{stamp}-{i}") for i in range(int(1e6)))
    return next(path for path in numbers if not path.exists())
