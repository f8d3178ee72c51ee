"""`watch`: the user's one call. Checks its arguments, describes the run and attaches a `Watcher`."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn
from torch.optim import Optimizer

from ..monitor.budgets import Limit, checked
from ..monitor.labels import default_owner, given_labels
from .alerting import Alerts, chosen
from .cadence import Cadence, Every
from .checkpoint import Source, load_state
from .distributed import Share, job, joined, world
from .environment import describe_environment, describe_optimizers
from .place import Place
from .reference import Reference
from .resume import check, first_step, starts
from .settings import Settings
from .shards import is_sharded
from .sketch import AnchorSketches
from .system import sampler_of
from .tensors import Patterns, Tensors, WatchedTensor, is_opaque, leaf_modules
from .watcher import Watcher, refuse_a_second
from .wrappers import inner_model, inner_optimizer, takes_hooks

if TYPE_CHECKING:
    from ..monitor import Finding

logger = logging.getLogger("layerwatch")

Models = nn.Module | Sequence[nn.Module]
Optimizers = Optimizer | Sequence[Optimizer] | None


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
    resume: bool | int = False,
    keep: str = "full",
    drift_limit: Limit | None = None,
    reference_memory: int | None = None,
    anchors: int | Sequence[int] | None = None,
    step_norms: bool = False,
    sync_seconds: float = 5.0,
    live: bool = True,
    log_loss: bool = False,
    local_gradients: bool = False,
    tags: str | Sequence[str] | None = None,
    owner: str | None = None,
    note: str | None = None,
    system: bool = True,
    alerts: Alerts = None,
) -> Watcher:
    """Attach to a training and log it to a run folder.

    Args:
        model: a module, or several (a GAN).
        optimizer: one, several, or None: found when they step, through torch's global optimizer hooks.
        run: the run folder; None makes one below ./runs.
        every: capture every N-th optimizer step, or "auto": as often as `budget` allows.
        budget: for "auto": the share of the training's time that monitoring may take, without judging (see
            `live`).
        reference: what drift is measured from: "start", a state_dict, a checkpoint (.safetensors, .pt, the
            index of a sharded one, or a folder with either), or None.
        include, exclude: regular expressions on tensor names; a tensor is watched when any of `include` (all
            when None) and none of `exclude` is found in it.
        activations: summarise the outputs of leaf modules on captured steps.
        updates: log the true change of each weight; takes one transient copy of the weights around a captured
            step.
        config: hyperparameters to show beside the run.
        on_finding: called in the training process with each problem that the detectors notice, and again
            when it has become worse. When it raises `StopTraining`, the training ends with that.
        resume: continue an existing run: True at the step that the optimizer's loaded state tells (Adam and
            its relatives count), else after the last step; or the number of the first step, where a
            checkpoint was saved. Steps that are done again are superseded; nothing is removed.
        keep: "full": every capture is kept. "rollup": of captures older than the newest 2,048 only what
            merging 16, 256, ... of them leaves, so that the log stays bounded however long the training is.
        drift_limit: a relative L2 distance from the reference that must not be passed; the detectors alarm
            beyond it. Or a budget for some parts of the names: {"layers.0-5": 0.01, "embeddings": 0.005}.
        reference_memory: bytes that the copy of the reference may take. None: tensors up to 65,536 elements
            in full precision, larger ones in bfloat16. With a budget: as exact as fits, down to sketches;
            run.json states the form and the error of each tensor. Files are mapped, and take none.
        anchors: steps (up to 64), or N for every N-th (until there are 64), at which a linear sketch of every
            tensor is stored: `Run.drift_between` measures the drift between any two of them, or two runs.
        step_norms: log the gradient norm of every tensor at every step (one more pass over the gradients).
        sync_seconds: how often the log is forced to the disk: what a power cut may take. A killed process
            loses nothing that was captured.
        live: judge the run while it trains, every ten seconds at most and for 1 % of the time at most: each
            new alarm is one line of the logger `layerwatch`, and an event `finding` in the log.
        local_gradients: among several ranks that average their gradients, each also logs the norm of its own,
            as scalar `local_grad_norm`: what `Run.noise_scale` needs.
        log_loss: log what backward is called on as `train_loss`: the sum over a step's passes, and for each
            optimizer that trains one of several models as `train_loss/<model>`.
        tags: words to find the run by, such as "baseline". note: what is worth knowing about it.
        owner: whose run it is; None: LAYERWATCH_OWNER, else the login name. "" stores none. A resumed run
            keeps the labels that are not given; `layerwatch label` edits them later.
        system: log what the machine does, every ten seconds: processors, memory, disk, network and NVIDIA
            GPUs, as scalars `system/...`. Needs psutil, and nvidia-ml-py for GPUs.
        alerts: who is told of findings: the path of a settings file, or the content of its table [alerts]
            (docs/alerts.md). None: the layerwatch.toml in the nearest folder above the run, else in the
            working directory, if there is one; True: there must be one; False: nobody is told.

    Returns:
        A `Watcher`: log scalars with `log`, end with `close` (or use it as a context manager; it is closed at
        exit).

    Raises:
        ValueError, TypeError: an argument is not as described, the model has no trainable parameter, or the
            optimizer owns none of the model's, or another watcher, not closed yet, watches it.
        RunError: the run exists already (and `resume` is off), or its folder cannot be used.
    """
    models = _models(model)
    optimizers = _optimizers(optimizer)
    anchored = None if anchors is None else AnchorSketches(anchors)
    cadence = Cadence(every, budget, anchored, aligned=world().several)
    if keep not in ("full", "rollup"):
        raise ValueError(f'expected keep="full" or keep="rollup", got keep={keep!r}')
    if not sync_seconds > 0:
        raise ValueError(f"expected sync_seconds above 0, got {sync_seconds!r}")
    check(resume)
    if config is not None and not isinstance(config, Mapping):
        raise TypeError(
            f"expected config as a mapping, got {type(config).__name__}: of a Namespace pass vars(...)"
        )
    labels = given_labels(tags, owner, note)
    tensors = Tensors(models, include, exclude)
    _check_parameters(models, tensors, optimizers)
    limit = checked(drift_limit, [name for t in tensors for name in t.names])
    measured_from = _reference(reference, reference_memory)
    here, resumes = world(), resume is not False  # 0 is the number of a step
    place = Place.of(run, resume=resumes, here=here)
    told, remarks = (None, []) if here.rank else chosen(alerts, place)
    judged = (live or on_finding is not None or bool(alerts)) and not here.rank
    told = told if judged else None
    sampler, unsampled = sampler_of(place.folder, here) if system else (None, None)
    settings = Settings(
        activations=activations,
        updates=updates,
        reference=measured_from,
        anchors=anchored,
        step_norms=step_norms,
        log_loss=log_loss,
        local_gradients=local_gradients,
        system=sampler,
    )
    modules = list(leaf_modules(models)) if activations else []
    if not resumes:
        labels = {"owner": default_owner(), **labels}
    info = {
        "name": place.name,
        **labels,
        **describe_environment(),
        "config": {str(name): value for name, value in (config or {}).items()},
        "model": [type(m).__name__ for m in models],
        "every": every,
        "budget": budget if every == "auto" else None,
        "reference": _describe(reference),
        "drift_limit": limit,
        "optimizers": describe_optimizers(optimizers),
        "tensors": [t.entry() for t in tensors],
        "modules": [{"module": name, "type": type(m).__name__} for name, m in modules],
        "alerts": list(told.channels) if told is not None else [],
        "notes": [
            *_notes(models, tensors, activations, anchors is not None),
            *([unsampled] if unsampled else []),
            *remarks,
        ],
    }
    refuse_a_second(tensors)
    if here.several and keep != "full":
        keep = "full"
        info["notes"].append(
            "every capture is kept: old ones cannot be merged before all ranks are read together"
        )
    if here.several:
        info |= {"rank": here.rank, "world": here.size, "job": job()}
    if here.rank and place.is_remote:
        return Watcher(None, place, models, tensors, optimizers, cadence, settings, on_finding, 0, live=live)
    session, begun = (joined(place.folder, here) if resumes else (0, None)) if here.several else (None, None)
    start, note = first_step(place.source, resume, optimizers, session) if resumes else (0, None)
    start = start if begun is None else begun
    info["notes"] += [note] if note else []
    if start and reference == "start":
        info["notes"].append(
            f"resumed at step {start}: drift from there on is measured from the weights at that step"
        )
    info["starts"] = starts(place.source, resume, start, optimizers)
    joins: dict[str, Any] = {"writer": here.writer, "session": session} if here.several else {}
    log = place.writer(info, resume=resumes, keep=keep, sync_seconds=sync_seconds, **joins)
    share = Share(place.folder, here) if here.several else None
    return Watcher(
        log, place, models, tensors, optimizers, cadence, settings, on_finding, start,
        live=judged, share=share, alerts=told,
    )  # fmt: skip


def _models(model: Models) -> list[nn.Module]:
    models: list[nn.Module] = list(model) if isinstance(model, list | tuple) else [model]  # type: ignore[list-item]
    for m in models:
        if not isinstance(m, nn.Module):
            raise TypeError(f"expected a torch.nn.Module or a list of them as model, got {type(m).__name__}")
    if not models:
        raise ValueError("expected at least one model, got an empty list")
    return [inner_model(m) for m in models]


def _optimizers(optimizer: Optimizers) -> list[Optimizer]:
    if optimizer is None:
        return []
    optimizers = [optimizer] if not isinstance(optimizer, Sequence) else list(optimizer)
    for o in optimizers:
        if not isinstance(o, Optimizer):
            raise TypeError(
                f"expected a torch.optim.Optimizer or a list of them as optimizer, got {type(o).__name__}"
            )
    optimizers = [inner_optimizer(o) for o in optimizers]
    hidden = [type(o).__name__ for o in optimizers if not takes_hooks(o)]
    if not hidden:
        return optimizers
    logger.warning("%s takes no hooks: optimizers are found when they step", ", ".join(hidden))
    return []


def _check_parameters(
    models: list[nn.Module], tensors: Sequence[WatchedTensor], optimizers: list[Optimizer]
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


def _notes(
    models: list[nn.Module], tensors: Sequence[WatchedTensor], activations: bool, anchors: bool
) -> list[str]:
    notes = []
    if activations and any(is_opaque(m) for model in models for m in model.modules()):
        notes.append("activations inside compiled or scripted modules cannot be seen and are not captured")
    empty = [t.name for t in tensors if t.parameter.device.type == "meta"]
    if empty:
        some = ", ".join(empty[:3])
        notes.append(f"{len(empty)} tensors on the meta device have no values to capture: {some} ...")
    if any(is_sharded(t.parameter) for t in tensors) and anchors:
        notes.append("sharded tensors have no anchors: `drift_between` leaves them out")
    return notes


def _reference(source: Source, memory: int | None) -> Reference | None:
    if source is None:
        return None
    return Reference(None if isinstance(source, str) and source == "start" else load_state(source), memory)


def _describe(reference: Source) -> str | None:
    if reference is None:
        return None
    return "state_dict" if isinstance(reference, Mapping) else str(reference)
