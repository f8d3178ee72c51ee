"""Watches whatever this process trains, without a line in its code: `layerwatch run`."""

from __future__ import annotations

import functools
import os
import shutil
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from . import backward, optimizers, scaler
from .joining import join
from .models import find_models, owned_by, reached_by
from .resume import steps_made
from .watch import watch
from .watcher import Watcher, _watching

#: Runs that one process may begin: one that makes a new model for every task would make thousands.
MAX_RUNS = 20
#: Looking for models may take this share of the process's time, and so many seconds besides.
LOOK_SHARE, LOOK_SECONDS = 0.02, 5.0


class AutoWatch:
    """Begins to watch when the first backward pass, or else the first optimizer step, begins.

    Watched are the outermost modules that hold what the process's optimizers train; where there is no
    optimizer, what the backward pass reaches. All that are found together are one run. Models that are
    trained later are a run of their own, `<run>-2` and so on. A framework's trainer is given our callback.
    A program that calls `watch` itself decides alone: then nothing is added.

    Args:
        options: of `watch`. say: tells the user one line. Its errors are not ours.
    """

    def __init__(self, options: Mapping[str, Any], say: Callable[[str], None]) -> None:
        self._options, self._say = dict(options), say
        self._watchers: list[Watcher] = []  # that are open
        #: The runs that hold something, of watchers that are closed; how many have begun.
        self.runs: list[Path | str] = []
        self._begun = 0
        self._callbacks: list[Any] = []  # that frameworks' trainers were given
        self._optimizers: list[weakref.ref[Optimizer]] = []
        self._news = True  # an optimizer that was not looked at
        self._passes, self._next_look = 0, 1
        self._steps: weakref.WeakKeyDictionary[Watcher, int] = weakref.WeakKeyDictionary()
        self._rested: weakref.WeakSet[Optimizer] = weakref.WeakSet()  # whose watchers are closed
        self._looking, self._began = 0.0, time.perf_counter()
        self._process = os.getpid()
        self._scaling = scaler.Scaling(lambda *_: None)
        #: See `BackwardListener`: the watcher that begins in a pass hears of its end.
        self.backward_ended: Callable[[], None] | None = self._pass_ended
        #: Watching was left to the program. Optimizers trained tensors that are in no module.
        self.left, self.loose = False, False

    def start(self) -> None:
        """Listen."""
        backward.listen(self)
        scaler.listen(self._scaling)
        self._listening = optimizers.Listening(self._step_begins, lambda _: None)
        self._init = Optimizer.__init__
        Optimizer.__init__ = self._noting(self._init)  # type: ignore[method-assign]

    def stop(self) -> None:
        """Listen no more; what is watched stays so."""
        backward.unlisten(self)
        scaler.unlisten(self._scaling)
        self._listening.remove()
        if getattr(Optimizer.__init__, "_layerwatch", False):
            Optimizer.__init__ = self._init  # type: ignore[method-assign]

    def _noting(self, init: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(init)
        def noted(optimizer: Optimizer, *args: Any, **kwargs: Any) -> None:
            init(optimizer, *args, **kwargs)
            self._optimizers.append(weakref.ref(optimizer))
            self._news = True

        noted._layerwatch = True  # type: ignore[attr-defined]
        return noted

    # What happens

    def backward_begins(self, root: Tensor | None) -> None:
        self._passes += 1
        looked = self._passes < self._next_look or any(w._open for w in self._watchers)
        if looked and not self._news:
            return
        self._next_look = 2 * self._passes
        scaled = self._scaling.take_loss()
        watcher = self._look(root)
        if watcher is not None:
            if scaled is not None and self._scaling.scaler is not None:
                self._scaling.scaling(self._scaling.scaler, scaled)
            watcher._follower.catch_up(self._scaling, root)

    def _pass_ended(self) -> None:
        if self._watchers:
            self.backward_ended = None

    def _step_begins(self, optimizer: Optimizer) -> None:
        if self._news or (self._rested and optimizer in self._rested):
            self._look(None)

    def _look(self, root: Tensor | None) -> Watcher | None:
        """Begin to watch what is trained and not watched yet."""
        if self._looking > LOOK_SHARE * (time.perf_counter() - self._began) + LOOK_SECONDS:
            return None  # and look at the news later
        self._news = False
        try:
            if os.getpid() != self._process:  # a forked worker
                self.stop()
                return None
            self._follow_callbacks()
            if any(w not in self._watchers for w in _watching):
                self._leave()
            else:
                return self._watch_new(root)
        except Exception as error:  # whatever it is, the training goes on
            self.stop()
            self._say(f"not watched: {' '.join(str(error).split()) or repr(error)}")
        return None

    def _follow_callbacks(self) -> None:
        """A framework's callback begins and ends watchers of its own."""
        for callback in self._callbacks:
            if callback.watcher._open and callback.watcher not in self._watchers:
                self._watchers.append(callback.watcher)
        for watcher in list(self._watchers):
            if watcher._log is not None and not watcher._open:
                self._close(watcher)

    def _watch_new(self, root: Tensor | None) -> Watcher | None:
        alive = [o for o in (ref() for ref in self._optimizers) if o is not None]
        self._optimizers = [weakref.ref(o) for o in alive]
        known = {id(t.parameter) for w in self._watchers for t in w._tensors}
        wanted = owned_by(alive) or (reached_by(root) if not self._watchers else {})
        wanted = {i: place for i, place in wanted.items() if i not in known}
        if not wanted:
            return None
        if self._begun >= MAX_RUNS:
            self.stop()
            self._say(f"{MAX_RUNS} runs have begun in this process: models that come later are not watched")
            return None
        options = dict(self._options)
        if self._begun and options.get("run") is not None:
            options["run"] = f"{options['run']}-{self._begun + 1}"
        start = time.thread_time()
        callback = join(options)
        models = find_models(wanted) if callback is None else []
        self._looking += time.thread_time() - start
        if callback is not None:
            self._callbacks.append(callback)
            if root is not None and hasattr(callback, "backward_begins"):  # it listens since this pass began
                callback.backward_begins(root)
            return self._begin(callback.watcher)
        self.loose = self.loose or (bool(alive) and not models)
        if not models:
            return None
        self._close_idle(models)
        if options.get("resume") and (made := steps_made(alive)) is not None:
            options["resume"] = made
        return self._begin(watch(models, log_loss=True, **options))

    def _begin(self, watcher: Watcher) -> Watcher | None:
        watcher.give_way = self._leave
        self._watchers.append(watcher)
        self._begun += 1
        if not watcher._open:
            return None
        names = ", ".join(watcher._log.info["model"]) if watcher._log else ""
        self._say(f"watching {names} ({len(watcher._tensors)} tensors) in {watcher.run}")
        return watcher

    def _close_idle(self, models: list[nn.Module]) -> None:
        """End the runs of models that are parts of these, or that rested since another one began to train."""
        owned = {id(p) for m in models for p in m.parameters()}
        for watcher in list(self._watchers):
            idle = self._steps.get(watcher) == watcher.step
            if idle or any(id(t.parameter) in owned for t in watcher._tensors):
                self._close(watcher)
            self._steps[watcher] = watcher.step

    def _close(self, watcher: Watcher) -> None:
        """Remove the run if it is empty."""
        self._watchers.remove(watcher)
        watcher.close()
        if watcher._log is None:
            return
        self._rested.update(watcher._follower._optimizers)
        if not watcher._follower.without_steps:
            self.runs.append(watcher.run)
        elif isinstance(watcher.run, Path):
            shutil.rmtree(watcher.run, ignore_errors=True)

    # The end

    def _leave(self) -> None:
        """The program watches for itself."""
        self.left = True
        self.finish()

    def finish(self) -> None:
        """Stop to look, and close what is open."""
        if os.getpid() == self._process:
            self.stop()
            self._follow_callbacks()
            for watcher in list(self._watchers):
                self._close(watcher)
