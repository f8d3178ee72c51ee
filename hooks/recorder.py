"""The flight recorder: what every step costs nothing to know, kept until an accident asks for it."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..monitor import LogWriter
from .jumps import Jumps
from .origin import Origin
from .scalars import Arrivals

#: Steps that are kept.
SIZE = 200
#: A loss must rise by this factor, a gradient norm by that one, to count as a jump at all (see `Jumps`).
LOSS_FACTOR, NORM_FACTOR = 1.4, 10.0
#: The recent past no longer compares when the learning rate has risen by this factor: warm-up, restarts.
RATE_FACTOR = 1.5
#: Steps until a second accident of the same kind is told; doubled by each one, so that a million broken steps
#: are some thirteen events.
COOL_DOWN = 100
#: Steps after an accident that are written as they happen.
AFTERWARDS = 10


@dataclass(slots=True)
class Record:
    """One step; None: unknown. `coming`: numbers that are still on their way from an accelerator."""

    step: int = -1
    time: float = 0.0
    loss: float | None = None
    grad_norm: float | None = None
    lr: float | None = None
    loss_scale: float | None = None
    coming: int = 0

    def scalars(self) -> dict[str, float]:
        """For the log: what is known."""
        numbers = {name: getattr(self, name) for name in ("loss", "grad_norm", "lr", "loss_scale")}
        return {f"recorder/{name}": value for name, value in numbers.items() if value is not None}


@dataclass(frozen=True)
class Accident:
    """What a step is worth a capture for.

    `kind`: "nonfinite_loss", "nonfinite_gradient", "loss_spike" or "gradient_jump"; `usual`: the median
    before a jump; `words`: one sentence without its end.
    """

    step: int
    kind: str
    value: float
    usual: float | None
    words: str


class Recorder:
    """Keeps the last `SIZE` steps and tells accidents.

    Numbers are given with the step that they belong to. Those on the host are judged at once; those on an
    accelerator when their copies have arrived, which may be some steps later: nothing waits for them.
    """

    def __init__(self, log: LogWriter) -> None:
        self._log = log
        self._ring: deque[Record] = deque(maxlen=SIZE)
        self._open = Record()  # the step under way
        self._jumps = {"loss": Jumps(LOSS_FACTOR), "grad_norm": Jumps(NORM_FACTOR)}
        self._rate, self._lowest_rate = math.nan, math.inf
        self._arrivals: Arrivals[tuple[Record, str]] = Arrivals()
        self._quiet: dict[str, tuple[int, int]] = {}  # kind -> quiet until this step, cool-down in steps
        self._accidents: list[dict[str, Any]] = list(log.info.get("accidents", []))
        self._written = self._write_until = -1

    def loss(self, step: int, value: float | Tensor, *, logged: bool = False) -> Accident | None:
        """Backward is called on this loss, or the user has `logged` it, which takes its place.

        Of several in a step (micro-batches, two losses of a GAN) the last one is kept; each is judged.
        """
        record = self._at(step)
        if not logged and isinstance(value, float) and self._jumps["loss"].passes(value):  # nearly always
            record.loss = value
            return None
        return self._see(record, "loss", value, judge=not logged or record.loss is None)

    def norm(self, step: int, value: float | Tensor, *, scaled: bool = False) -> Accident | None:
        """The gradients' total norm, before clipping.

        `scaled`: a loss scaler is at work. One that is not finite is its way of finding the right scale.
        """
        return self._see(self._at(step), "grad_norm", value, judge=not scaled)

    def captured(self, step: int, norm: float | None, *, scaled: bool) -> Accident | None:
        """The gradients' norm, from the rows of a captured step: complements what clipping did not tell."""
        record = self._at(step)
        if norm is None or record.grad_norm is not None or record.coming:
            return None
        record.grad_norm = norm
        return None if scaled or math.isfinite(norm) else self._judge(record, "grad_norm", norm)

    def _at(self, step: int) -> Record:
        if self._ring and self._ring[-1].step >= step:  # what a device has sent may be of an earlier one
            return next((r for r in reversed(self._ring) if r.step == step), self._ring[-1])
        self._open.step = step
        return self._open

    def _see(self, record: Record, name: str, value: float | Tensor, *, judge: bool) -> Accident | None:
        if isinstance(value, Tensor):
            record.coming += 1
            self._arrivals.send((record, name), value)
            return None
        setattr(record, name, value)
        if judge or (name == "loss" and not math.isfinite(value)):
            return self._judge(record, name, value)
        return None

    def _judge(self, record: Record, name: str, value: float) -> Accident | None:
        jumps = self._jumps[name]
        if math.isfinite(value) and not jumps.add(value):
            return None
        words = "loss" if name == "loss" else "gradient norm"
        if math.isfinite(value):
            kind = "loss_spike" if name == "loss" else "gradient_jump"
            told = f"the {words} jumped to {value:.4g}; the usual was {jumps.usual:.4g}"
            return self._unless_quiet(Accident(record.step, kind, value, jumps.usual, told))
        if name == "loss":
            kind = "nonfinite_loss"
        elif record.loss is not None and not math.isfinite(record.loss):
            return None  # it follows from the loss
        else:
            kind = "nonfinite_gradient"
        return self._unless_quiet(Accident(record.step, kind, value, None, f"the {words} is {value}"))

    def _unless_quiet(self, accident: Accident) -> Accident | None:
        until, cool_down = self._quiet.get(accident.kind, (-1, COOL_DOWN))
        if accident.step < until:
            return None
        self._quiet[accident.kind] = accident.step + cool_down, 2 * cool_down
        return accident

    @property
    def pending(self) -> Arrivals:
        """Numbers that have not arrived; false when there is none."""
        return self._arrivals

    def arrived(self, *, wait: bool = False) -> Accident | None:
        """What has come from an accelerator: the first accident among it."""
        found = None
        if not self._arrivals:
            return None
        for (record, name), value in self._arrivals.take(wait=wait):
            record.coming -= 1
            found = self._see(record, name, value, judge=name != "loss_scale") or found
        return found

    def report(self, accident: Accident, origin: Origin | None) -> str:
        """Write the event and what was kept; the steps that follow are written as they end."""
        message = accident.words if origin is None else f"{accident.words}: {origin.words}"
        self._log.event(accident.step, "accident", message)
        self._accidents.append(
            {
                "step": accident.step,
                "kind": accident.kind,
                "value": accident.value if math.isfinite(accident.value) else None,
                "usual": accident.usual,
                "layer": origin.layer if origin else None,
                "where": origin.where if origin else "unknown",
                "layers": list(origin.layers[:100]) if origin else [],
            }
        )
        self._log.update_info(accidents=self._accidents)
        self._write_until = accident.step + AFTERWARDS
        self._write()
        return message

    def finish(self, step: int, rates: Sequence[Any], loss_scale: Tensor | None) -> None:
        """The step is over: its learning rates, and the scale of its loss."""
        record = self._at(step)
        if record is not self._open:
            return
        record.time = time.time()
        if loss_scale is not None:
            scale = float(loss_scale) if loss_scale.is_cpu else loss_scale
            self._see(record, "loss_scale", scale, judge=False)
        rate = rates[0] if rates else None
        if isinstance(rate, float | int):
            record.lr = rate = float(rate)
            if rate != self._rate:
                self._follow(rate)
        self._ring.append(record)
        self._open = Record()
        if self._written < self._write_until:
            self._write()

    def _follow(self, rate: float) -> None:
        self._rate = rate
        if rate > RATE_FACTOR * self._lowest_rate:
            for jumps in self._jumps.values():
                jumps.reset()
            self._lowest_rate = rate
        elif rate < self._lowest_rate:
            self._lowest_rate = rate

    def _write(self) -> None:
        """Each step at most once, in order."""
        for record in self._ring:
            if record.step > self._write_until or record.coming:
                return
            if record.step > self._written:
                self._log.scalars(record.step, record.time, record.scalars())
                self._written = record.step

    def close(self) -> None:
        """Write what an accident is still waiting for."""
        self.arrived(wait=True)
        self._write()
