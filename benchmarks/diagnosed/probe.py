"""Is the fault really there? An independent measurement of a training, compared with that of its twin.

`Probe` stands where a watcher stands and measures gradients, steps, units and losses directly; it shares no
code with the detectors. `PROOFS` say of each problem code whether two measurements show it. Their limits are
choices: a proof asks that the mechanism is there and that the healthy twin lacks it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .networks import SelfAttention

FLOORED = (nn.ReLU, nn.ReLU6)
SQUASHED = (nn.Tanh, nn.Sigmoid)
#: Every so many steps everything is measured, besides the first few.
EVERY = 5


class Probe:
    """Measures a run: see `PROOFS` for what is made of it."""

    def __init__(self, model: Any, optimizer: Any) -> None:
        models = model if isinstance(model, list | tuple) else [model]
        self.optimizers = list(optimizer) if isinstance(optimizer, list | tuple) else [optimizer]
        self.parameters = {f"{i}{n}": p for i, m in enumerate(models) for n, p in m.named_parameters()}
        if len(models) == 1:
            self.parameters = dict(models[0].named_parameters())
        self.start = {n: p.detach().clone().float() for n, p in self.parameters.items()}
        self.trainable = [n for n, p in self.parameters.items() if p.requires_grad]
        self.matrices = [n for n in self.trainable if self.parameters[n].dim() >= 2]
        self.step, self.taken = 0, 0
        self.losses: list[float] = []
        self.validation: list[float] = []
        self.scales: list[float] = []
        self.rates: list[float] = []
        self.norms: list[tuple[float, float]] = []  # of the gradient, before and after clipping
        self.cosines: list[float] = []
        self.rows: dict[str, list[dict[str, float]]] = {n: [] for n in self.trainable}
        self.active: dict[str, list[Tensor]] = {}
        self.saturated: dict[str, list[float]] = {}
        self.entropy: dict[str, list[float]] = {}
        self.sizes: dict[str, float] = {}  # root mean square of the first output of each module
        self.inputs = 0.0
        self.logits: list[float] = []
        self._whole: dict[str, float] = {}
        self._last: Tensor | None = None
        self._before: dict[str, Tensor] = {}
        self._handles = [p.register_post_accumulate_grad_hook(self._whole_gradient(n))
                         for n, p in self.parameters.items() if p.requires_grad]  # fmt: skip
        for opt in self.optimizers:
            self._handles += [
                opt.register_step_pre_hook(self._before_step),
                opt.register_step_post_hook(self._after_step),
            ]
        for m in models:
            self._handles.append(m.register_forward_hook(self._model_ran))
            for name, leaf in m.named_modules():
                if isinstance(leaf, SelfAttention) or not list(leaf.children()):
                    self._handles.append(leaf.register_forward_hook(self._module_ran(name)))

    @property
    def deep(self) -> bool:
        return self.step < 10 or self.step % EVERY == 0

    def log(self, **values: float) -> None:
        if "train_loss" in values:
            self.losses.append(float(values["train_loss"]))
        if "val_loss" in values:
            self.validation.append(float(values["val_loss"]))
        if "loss_scale" in values:
            self.scales.append(float(values["loss_scale"]))

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()
        self.end = {n: p.detach().clone().float() for n, p in self.parameters.items()}
        self._last, self._before = None, {}

    def _whole_gradient(self, name: str) -> Callable[[Tensor], None]:
        def hook(p: Tensor) -> None:
            assert p.grad is not None
            self._whole[name] = float(_dense(p.grad).norm())

        return hook

    @torch.no_grad()
    def _before_step(self, opt: torch.optim.Optimizer, *_: object) -> None:
        own = {id(p) for group in opt.param_groups for p in group["params"]}
        grads = {n: _dense(p.grad) for n, p in self.parameters.items() if p.grad is not None and id(p) in own}
        if grads:
            whole = math.sqrt(sum(self._whole.get(n, 0.0) ** 2 for n in grads))
            self.norms.append((whole, math.sqrt(sum(float(g.norm()) ** 2 for g in grads.values()))))
            flat = torch.cat([g.flatten() for g in grads.values()])
            if self._last is not None and self._last.shape == flat.shape:
                self.cosines.append(float(torch.cosine_similarity(flat, self._last, 0)))
            self._last = flat.clone()
        self.rates.append(max(float(group["lr"]) for group in opt.param_groups))
        if self.deep:
            self._before = {n: p.detach().clone() for n, p in self.parameters.items()}

    @torch.no_grad()
    def _after_step(self, opt: torch.optim.Optimizer, *_: object) -> None:
        self.taken += 1
        group_of = {id(p): group for group in opt.param_groups for p in group["params"]}
        for n in self.trainable if self._before else ():
            p = self.parameters[n]
            moved = p.detach() != self._before[n]
            row = {"gradient": self._whole.get(n, 0.0), "weight": float(self._before[n].float().norm()),
                   "update": float((p.detach().float() - self._before[n].float()).norm())}  # fmt: skip
            if p.grad is not None and not p.grad.is_sparse:
                reached = p.grad != 0
                row["zeros"] = 1 - float(reached.float().mean())
                row["stuck"] = float((reached & ~moved).sum() / max(1, int(reached.sum())))
                second = opt.state.get(p, {}).get("exp_avg_sq")
                if second is not None and id(p) in group_of:
                    beta = group_of[id(p)]["betas"][1]
                    root = (second.float() / (1 - beta ** float(opt.state[p]["step"]))).sqrt().median()
                    row["epsilon"] = group_of[id(p)]["eps"] / (float(root) + 1e-30)
            self.rows[n].append(row)
        self._before = {}
        self.step += opt is self.optimizers[-1]

    def _model_ran(self, module: nn.Module, args: Any, out: Any) -> None:
        if module.training and torch.is_tensor(out) and args and torch.is_tensor(args[0]):
            if args[0].is_floating_point():
                self.inputs = max(self.inputs, float(args[0].abs().nan_to_num().max()))
            self.logits.append(float(torch.logsumexp(out.detach().float(), -1).abs().mean()))

    def _module_ran(self, name: str) -> Callable[..., None]:
        @torch.no_grad()
        def hook(module: nn.Module, args: Any, out: Any) -> None:
            out = out[0] if isinstance(out, tuple) else out
            if (
                not module.training
                or not self.deep
                or not torch.is_tensor(out)
                or not out.is_floating_point()
            ):
                return
            y = out.detach().float()
            self.sizes.setdefault(name, float(y.square().mean().sqrt()))
            if isinstance(module, FLOORED):
                axes = (
                    [0, *range(2, y.dim())]
                    if y.dim() >= 3 and _channels_first(y)
                    else list(range(y.dim() - 1))
                )
                self.active.setdefault(name, []).append((y > 0).float().amax(axes) > 0)
            elif isinstance(module, SQUASHED):
                centred = y if isinstance(module, nn.Tanh) else 2 * y - 1
                self.saturated.setdefault(name, []).append(float((centred.abs() > 0.95).float().mean()))
            elif isinstance(module, SelfAttention):
                w = module.weights(args[0]).float()
                keys = (
                    (w > 0).sum(-1).clamp(min=2)
                    if not module.causal
                    else torch.arange(1, w.shape[2] + 1).clamp(min=2)
                )
                self.entropy.setdefault(name, []).append(
                    float((torch.special.entr(w).sum(-1) / keys.log()).mean())
                )

        return hook

    # ---- derived

    def typical(
        self, key: str, a: float = 0.0, b: float = 1.0, names: list[str] | None = None
    ) -> dict[str, float]:
        """Median by parameter over a part of the run."""
        found = {}
        for n in self.trainable if names is None else names:
            rows = self.rows[n][int(a * len(self.rows[n])) : max(1, math.ceil(b * len(self.rows[n])))]
            values = [r[key] for r in rows if math.isfinite(r.get(key, math.nan))]
            if values:
                found[n] = float(np.median(values))
        return found

    def final(self) -> float:
        """Validation loss at the end; infinite when it is not finite."""
        values = (self.validation or self.losses)[-3:]
        return float(np.median(values)) if all(map(math.isfinite, values)) else math.inf


def _dense(gradient: Tensor) -> Tensor:
    return (gradient.coalesce().values() if gradient.is_sparse else gradient).detach().float()


def _channels_first(y: Tensor) -> bool:
    return y.dim() == 4 or y.shape[2] > 12  # (n, channels, time) here; (n, nodes, channels) has 32 channels


def _ratio(a: float, b: float) -> float:
    return a / b if b else (math.inf if a else 1.0)


def _greatest(values: dict[str, float]) -> float:
    return max(values.values(), default=0.0)


def _peak(x: Probe) -> float:
    return max(
        (after if x.scales else before for before, after in x.norms if math.isfinite(before)), default=0.0
    )


def _fading(x: Probe) -> float:
    """Least gradient per element of a matrix, relative to the largest, early in the run."""
    sizes = {
        n: g / math.sqrt(x.parameters[n].numel())
        for n, g in x.typical("gradient", 0, 0.3, x.matrices).items()
    }
    alive = [v for v in sizes.values() if v > 0]
    return min(alive, default=1.0) / max(alive, default=1.0)


def _dead(x: Probe) -> float:
    return max(
        (1 - float(torch.stack(rows[-20:]).any(0).float().mean()) for rows in x.active.values()), default=0.0
    )


def _alike(x: Probe) -> float:
    """Spread between the rows of a matrix, or its columns' when these are copies, relative to its size."""
    found = []
    for n in x.matrices:
        w = x.end[n].flatten(1)
        for m in (w, w.T):
            if m.shape[0] >= 4 and float(w.abs().mean()) > 1e-8 and not re.search("token|words|place", n):
                found.append(float(m.std(0).mean() / w.abs().mean()))
    return min(found, default=1.0)


def _progress(f: Probe, t: Probe) -> float:
    """Share of the twin's progress on validation data that this run made."""
    first = t.losses[0]
    return (
        (first - f.final()) / (first - t.final())
        if first > t.final() and math.isfinite(f.final())
        else -math.inf
    )


def _spike(x: Probe) -> float:
    best = 0.0
    for i in range(30, len(x.losses)):
        window = np.array(x.losses[max(0, i - 60) : i])
        spread = max(np.quantile(window, 0.9) - np.quantile(window, 0.1), 0.05 * abs(np.median(window)), 1e-9)
        best = max(best, (x.losses[i] - float(np.median(window))) / spread)
    return best


def _turned(x: Probe) -> float:
    """Validation at the end over its best, when the training loss fell meanwhile."""
    v = np.array(x.validation)
    if v.size < 5 or not np.isfinite(v).all() or v.min() <= 0:
        return 1.0
    at = int(v.argmin() / v.size * len(x.losses))
    end = float(np.median(x.losses[-max(5, len(x.losses) // 20) :]))
    return float(np.median(v[-3:]) / v.min()) if end < float(np.median(x.losses[at : at + 20])) else 1.0


def _ratios(x: Probe) -> dict[str, float]:
    u, w = x.typical("update", 0.1, 1, x.matrices), x.typical("weight", 0.1, 1, x.matrices)
    return {n: u[n] / w[n] for n in u if u[n] > 0 and w[n] > 0}


def _spread(values: dict[str, float]) -> float:
    return max(values.values()) / min(values.values()) if values else 1.0


def _grown(x: Probe) -> float:
    return max((_ratio(float(x.end[n].norm()), float(x.start[n].norm()))
                for n in x.matrices if float(x.start[n].norm()) > 1e-6), default=1.0)  # fmt: skip


def _shrunk(f: Probe, t: Probe) -> float:
    return _ratio(
        sum(float(f.end[n].norm()) for n in f.matrices), sum(float(t.end[n].norm()) for n in t.matrices)
    )


def _unreached(x: Probe) -> int:
    weights = [n for n in x.trainable if x.parameters[n].dim() >= 2]
    return sum(not any(r["gradient"] for r in x.rows[n]) and x._whole.get(n, 0.0) == 0 for n in weights)


def _still(x: Probe) -> int:
    return sum(torch.equal(x.start[n], x.end[n]) and x._whole.get(n, 0.0) > 1e-9 for n in x.matrices)


def _rate_jump(x: Probe) -> tuple[float, float]:
    rates = np.array(x.rates)
    up = float(np.max(rates[1:] / np.maximum(rates[:-1], 1e-30), where=rates[:-1] > 0, initial=1.0))
    return up, float(np.mean(rates <= 1e-3 * rates.max()))


def _clipped(x: Probe) -> float:
    return float(
        np.median([b / a for a, b in x.norms[len(x.norms) // 5 :] if a > 0 and not x.scales] or [1.0])
    )


def _moved(x: Probe) -> float:
    return max(
        (
            float((x.end[n] - x.start[n]).norm() / x.start[n].norm())
            for n in x.matrices[:-1]
            if float(x.start[n].norm())
        ),
        default=0.0,
    )


def _logit(x: Probe) -> tuple[float, float]:
    n = max(1, len(x.logits) // 20)
    return float(np.median(x.logits[:n] or [0.0])), float(np.median(x.logits[-4 * n :] or [0.0]))


def _zeros(f: Probe, t: Probe) -> float:
    mine, other = f.typical("zeros", 0.05, 1, f.matrices), t.typical("zeros", 0.05, 1, t.matrices)
    return max((mine[n] - other.get(n, 0.0) for n in mine), default=0.0)


def _sizes(x: Probe) -> float:
    alive = [v for v in x.sizes.values() if v > 0 and math.isfinite(v)]
    return max(alive) / min(alive) if alive else 1.0


def _between(x: Probe) -> float:
    """Least entropy of a module's attention over the second half."""
    return min((float(np.median(v[len(v) // 2 :])) for v in x.entropy.values()), default=1.0)


#: code -> (faulty, twin) -> (is it there?, the number that shows it)
PROOFS: dict[str, Callable[[Probe, Probe], tuple[bool, float]]] = {
    "nonfinite": lambda f, t: (
        not all(map(math.isfinite, f.losses)),
        sum(not math.isfinite(v) for v in f.losses),
    ),
    "exploding_gradients": lambda f, t: (_peak(f) >= 30 * _peak(t), _ratio(_peak(f), _peak(t))),
    "vanishing_gradients": lambda f, t: (_fading(f) < 1e-3 and _fading(t) > 10 * _fading(f), _fading(f)),
    "dead_units": lambda f, t: (_dead(f) >= 0.5 and _dead(t) < 0.5 * _dead(f), _dead(f)),
    "saturated_units": lambda f, t: _both(
        {n: float(np.median(v[len(v) // 10 :])) for n, v in f.saturated.items()},
        {n: float(np.median(v[len(v) // 10 :])) for n, v in t.saturated.items()},
        0.6,
        0.6,
    ),
    "symmetric_units": lambda f, t: (_alike(f) < 0.02 and _alike(t) > 0.1, _alike(f)),
    "bad_init_scale": lambda f, t: (
        f.losses[0] >= 3 * abs(t.losses[0]) or _sizes(f) >= 8 * _sizes(t),
        _ratio(f.losses[0], t.losses[0]),
    ),
    "learning_rate_too_high": lambda f, t: (
        max(f.rates) > 2 * max(t.rates) and _progress(f, t) < 0.9,
        _progress(f, t),
    ),
    "learning_rate_too_low": lambda f, t: (
        max(f.rates) < 0.5 * max(t.rates) and _progress(f, t) < 0.6,
        _progress(f, t),
    ),
    "loss_spike": lambda f, t: (_spike(f) >= 6 and _spike(t) < 0.5 * _spike(f), _spike(f)),
    "not_learning": lambda f, t: (_progress(f, t) <= 0.1, _progress(f, t)),
    "overfitting": lambda f, t: (_turned(f) >= 1.1 and _turned(t) < 1 + 0.6 * (_turned(f) - 1), _turned(f)),
    "over_regularised": lambda f, t: (
        float(np.median(f.losses[-20:])) > 1.3 * float(np.median(t.losses[-20:])) and _shrunk(f, t) < 0.7,
        _shrunk(f, t),
    ),
    "unused_parameters": lambda f, t: (_unreached(f) > _unreached(t), _unreached(f)),
    "frozen_parameters": lambda f, t: (_still(f) > _still(t), _still(f)),
    "layer_imbalance": lambda f, t: (
        _spread(_ratios(f)) >= max(50, 10 * _spread(_ratios(t))),
        _spread(_ratios(f)),
    ),
    "weight_growth": lambda f, t: (_grown(f) >= max(4, 2.5 * _grown(t)), _grown(f)),
    "schedule_fault": lambda f, t: (
        _rate_jump(f)[0] >= 5 * _rate_jump(t)[0] or _rate_jump(f)[1] >= _rate_jump(t)[1] + 0.1,
        max(_rate_jump(f)),
    ),
    "stale_gradients": lambda f, t: (_cosine(f) >= 0.9 and _cosine(t) <= _cosine(f) - 0.2, _cosine(f)),
    "over_clipping": lambda f, t: (_clipped(f) <= 0.1 and _clipped(t) >= 3 * _clipped(f), _clipped(f)),
    "loss_scale_collapse": lambda f, t: (
        bool(f.scales) and (f.scales[-1] <= 1 or f.taken < 0.8 * len(f.losses)),
        f.scales[-1] if f.scales else 0.0,
    ),
    "gradient_underflow": lambda f, t: (
        _zeros(f, t) >= 0.25 and _greatest(f.typical("gradient")) < 1e-2,
        _zeros(f, t),
    ),
    "low_precision_stall": lambda f, t: (
        _greatest(f.typical("stuck", 0.1, 1, f.matrices)) >= 0.6
        and _greatest(t.typical("stuck", 0.1, 1, t.matrices)) < 0.5,
        _greatest(f.typical("stuck", 0.1, 1, f.matrices)),
    ),
    "attention_collapse": lambda f, t: (_between(f) <= 0.25 and _between(t) >= 2 * _between(f), _between(f)),
    "logit_drift": lambda f, t: (_logit(f)[1] >= max(10, 3 * _logit(t)[1], 3 * _logit(f)[0]), _logit(f)[1]),
    "adam_epsilon": lambda f, t: (
        _greatest(f.typical("epsilon", 0.1)) >= max(3, 10 * _greatest(t.typical("epsilon", 0.1))),
        _greatest(f.typical("epsilon", 0.1)),
    ),
    "excessive_drift": lambda f, t: (_moved(f) >= max(0.3, 3 * _moved(t)), _moved(f)),
}


def _cosine(x: Probe) -> float:
    return float(np.median(x.cosines or [0.0]))


def _both(mine: dict[str, float], other: dict[str, float], least: float, less: float) -> tuple[bool, float]:
    value = _greatest(mine)
    return value >= least and _greatest(other) < less * value, value


#: Causes that are in the data or the label, not in a trace: they count when the change itself is seen.
def data_changed(f: Probe, t: Probe) -> tuple[bool, float]:
    """Inputs of another size, or the same inputs and a training made worse by labels or their order."""
    return f.inputs >= 4 * t.inputs > 0 or f.final() > 1.2 * t.final(), _ratio(f.inputs, t.inputs)


PROOFS["data_fault"] = data_changed
