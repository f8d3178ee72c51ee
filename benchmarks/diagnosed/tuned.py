"""Families that the detectors' thresholds were chosen with."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import made
from .family import (
    Family,
    biased,
    blurred,
    by_label,
    constant,
    cut,
    frozen,
    jump,
    mislabelled,
    paced,
    repeated,
    scaled,
    shuffled,
    spare,
    times,
    warm,
    without,
)
from .networks import (
    MessagePassing,
    Reader,
    Recurrent,
    ResidualMLP,
    VisionTransformer,
    mlp,
    wave_net,
)


def adamw(p: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.AdamW(p, lr, (0.9, 0.98), weight_decay=0.05)


def adam(p: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.Adam(p, lr)


def sgd(
    rate: float, momentum: float = 0.0, decay: float = 0.0
) -> Callable[[Any, float], torch.optim.Optimizer]:
    """SGD with a rate of its own."""
    return lambda p, lr: torch.optim.SGD(p, rate, momentum, weight_decay=decay)


def nesterov(p: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(p, lr, 0.9, nesterov=True)


def entropy(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Softmax cross-entropy over the last axis, wherever targets are."""
    return F.cross_entropy(net(x).float().flatten(0, -2), y.flatten())


# ---- a vision transformer; AdamW, warm-up and cosine

rate = warm(30, 300)
vit = Family("vit", lambda: VisionTransformer(6), made.textures, entropy, adamw, 3e-3, clip=1.0, rate=rate)
vit.healthy("plain")
vit.healthy("smoothing", loss=lambda net, x, y: F.cross_entropy(net(x), y, label_smoothing=0.1))
vit.healthy("accumulate", accumulate=3, batch=12)
vit.healthy("log-every-10", log_every=10)
vit.healthy("tiny-batch", batch=2, faster=0.3, steps=600)
vit.healthy("frozen-patches", edit=frozen("patch"))
vit.healthy("finetune", before=200, faster=0.1)
vit.faulty("rate-x100", "learning_rate_too_high", "not_learning", "exploding_gradients", faster=100)
vit.faulty("rate-x30", "learning_rate_too_high", "not_learning", faster=30)
vit.faulty("rate-1000th", "learning_rate_too_low", "not_learning", faster=1e-3)
vit.faulty("rate-300th-rarely-logged", "learning_rate_too_low", faster=3e-3, log_every=10)
vit.faulty(
    "sharp-x40", "attention_collapse", "bad_init_scale", layers="attention", edit=scaled(r"\.(q|k)\.", 40)
)
vit.faulty(
    "sharp-x12", "attention_collapse", "bad_init_scale", layers="attention", edit=scaled(r"\.(q|k)\.", 12)
)
vit.faulty(
    "one-layer-sharp",
    "attention_collapse",
    "bad_init_scale",
    layers="layers.1.attention",
    edit=scaled(r"layers.1.*\.(q|k)\.", 40),
)
vit.faulty("wide", "bad_init_scale", "attention_collapse", edit=scaled("", 12))
vit.faulty("jump", "schedule_fault", "loss_spike", onset=170, rate=jump(170, 60, rate))
vit.faulty("stops", "schedule_fault", onset=120, rate=jump(120, 0, rate))
vit.faulty("no-optimizer", "frozen_parameters", layers="layers.1", groups=without("layers.1"))
vit.faulty("detached", "unused_parameters", layers="patch|place|layers.0", edit=cut("layers.0"))
vit.faulty("eps", "adam_epsilon", optimizer=lambda p, lr: torch.optim.AdamW(p, lr, eps=0.3))
vit.faulty("shuffled", "not_learning", "data_fault", "overfitting", data=mislabelled(1.0))
vit.faulty("nan", "nonfinite", "data_fault", onset=160, disturb=times(math.nan, [160]))
vit.faulty("no-reset", "stale_gradients", "learning_rate_too_high", "not_learning", reset=False)
vit.faulty("few", "overfitting", samples=60, steps=400, rate=warm(30))
vit.faulty(
    "decay",
    "over_regularised",
    "not_learning",
    optimizer=lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=40.0),
)


# ---- a GRU language model; Adam, clipped

gru = Family(
    "gru-text",
    lambda: Recurrent("GRU", 24, 48, 40, vocab=40, every=True),
    made.text,
    entropy,
    adam,
    5e-3,
    batch=16,
    clip=1.0,
)
gru.healthy("plain")
gru.healthy("sum", loss=lambda net, x, y: F.cross_entropy(net(x).flatten(0, 1), y.flatten(), reduction="sum"))
gru.healthy("long", steps=900, rate=warm(1, 900))
gru.healthy("no-clip-rmsprop", optimizer=lambda p, lr: torch.optim.RMSprop(p, 0.3 * lr), clip=1e9)
gru.faulty("rate-x100", "learning_rate_too_high", "not_learning", "saturated_units", faster=100)
gru.faulty("rate-1000th", "learning_rate_too_low", "not_learning", faster=1e-3)
gru.faulty(
    "clip",
    "over_clipping",
    "learning_rate_too_low",
    clip=1e-3,
    optimizer=sgd(0.5),
    twin={"optimizer": sgd(0.5)},
)
gru.faulty("wide", "bad_init_scale", "exploding_gradients", "saturated_units", edit=scaled("", 15))
gru.faulty(
    "bfloat16",
    "low_precision_stall",
    "learning_rate_too_low",
    precision="bfloat16 weights",
    faster=0.02,
    twin={"faster": 0.02},
)
gru.faulty(
    "spike",
    "schedule_fault",
    "loss_spike",
    "learning_rate_too_high",
    onset=180,
    rate=lambda step: 150.0 if step == 180 else 1.0,
)
gru.faulty("spare", "unused_parameters", layers="projection", edit=spare())
gru.faulty("slow-cell", "layer_imbalance", "learning_rate_too_low", layers="cell", groups=paced("cell", 1e-3))
gru.faulty(
    "fast-out",
    "weight_growth",
    "layer_imbalance",
    "learning_rate_too_high",
    "excessive_drift",
    layers="to_out",
    groups=paced("to_out", 120),
)
gru.faulty(
    "sign-of-penalty",
    "weight_growth",
    "logit_drift",
    "not_learning",
    "exploding_gradients",
    penalty=lambda net, x: -2e-3 * sum(p.square().sum() for p in net.parameters()),
)
gru.faulty(
    "z-sign",
    "logit_drift",
    "weight_growth",
    "not_learning",
    layers="to_out",
    penalty=lambda net, x: -0.03 * torch.logsumexp(net(x), -1).square().mean(),
)


# ---- a deep residual network on a table; huber loss, AdamW

res = Family(
    "residual",
    lambda: ResidualMLP(20, 1),
    lambda: made.table(1),
    lambda net, x, y: F.huber_loss(net(x), y.view(-1, 1).to(x.dtype)),
    adamw,
    2e-3,
)
res.healthy("plain")
res.healthy("zero-branches", edit=constant(r"blocks\.\d\.3\.", 0.0))
res.healthy("sgd", optimizer=sgd(0.05, 0.9))
res.healthy("converged", steps=1500, rate=warm(20, 1500))
res.healthy("very-short", steps=60)
res.healthy("noisy", source=lambda: made.table(1, noise=8.0))
res.faulty("noisy-targets", "data_fault", "overfitting", "not_learning", data=lambda x, y: (x, blurred(y, 3)))
res.faulty(
    "rate-x300", "learning_rate_too_high", "not_learning", "dead_units", "exploding_gradients", faster=300
)
res.faulty("rate-3000th", "learning_rate_too_low", "not_learning", faster=3e-4)
res.faulty(
    "dead",
    "dead_units",
    layers=r"blocks.(2|3).[12]|blocks.(2|3).3",
    edit=biased(r"blocks.(2|3).1.bias", -9.0),
)
res.faulty("constant", "symmetric_units", "bad_init_scale", edit=constant("blocks|stem", 0.02))
res.faulty("stem-out", "frozen_parameters", layers="stem", groups=without("stem"))
res.faulty("eps", "adam_epsilon", optimizer=lambda p, lr: torch.optim.AdamW(p, 0.3 * lr, eps=10.0))
res.faulty(
    "unscaled",
    "data_fault",
    "bad_init_scale",
    "exploding_gradients",
    "learning_rate_too_high",
    unit=(400.0, 0.0),
)
res.faulty(
    "batch-x1000",
    "data_fault",
    "loss_spike",
    onset=150,
    disturb=times(1e3, [150]),
    optimizer=nesterov,
    faster=2.0,
    twin={"optimizer": nesterov, "faster": 2.0},
)
res.faulty("shuffled", "not_learning", "data_fault", "overfitting", data=mislabelled(1.0))
res.faulty("few", "overfitting", samples=60, steps=500, data=lambda x, y: (x, blurred(y, 1)))
res.faulty(
    "underflow",
    "gradient_underflow",
    "learning_rate_too_low",
    "not_learning",
    "unused_parameters",
    precision="float16",
    divide=3e5,
    optimizer=sgd(0.05 * 3e5, 0.9),
    twin={"optimizer": sgd(0.05, 0.9)},
)
res.faulty(
    "bfloat16",
    "low_precision_stall",
    "learning_rate_too_low",
    precision="bfloat16 weights",
    optimizer=sgd(5e-4),
    twin={"optimizer": sgd(5e-4)},
)


# ---- convolutions over time; batch norm, RMSprop

wave = Family(
    "waves", wave_net, made.waves, entropy, lambda p, lr: torch.optim.RMSprop(p, lr), 1e-3, batch=48
)
wave.healthy("plain")
wave.healthy("raw-inputs", unit=(60.0, 20.0))
wave.healthy("no-norm", model=lambda: wave_net(norm=False))
wave.healthy("scaled-float16", precision="scaled")
wave.healthy("label-noise-floor", data=mislabelled(0.05))
wave.faulty("half-labels", "data_fault", "overfitting", "not_learning", data=mislabelled(0.6), steps=400)
wave.faulty("sorted", "data_fault", "loss_spike", "overfitting", data=by_label, in_order=True)
wave.faulty("repeated", "overfitting", "data_fault", data=repeated(50), steps=500)
wave.faulty(
    "rate-x1000", "learning_rate_too_high", "not_learning", "dead_units", "weight_growth", faster=1000
)
wave.faulty("rate-3000th", "learning_rate_too_low", "not_learning", faster=3e-4)
wave.faulty("dead", "dead_units", layers="^[345]$|^3", edit=biased("4.bias", -6.0))
wave.faulty("no-optimizer", "frozen_parameters", layers="^3", groups=without(r"^3\."))
wave.faulty("detached", "unused_parameters", layers="^[0134]", edit=cut("5"))
wave.faulty("nan-later", "nonfinite", "data_fault", onset=220, disturb=times(math.nan, [220]))
wave.faulty(
    "overflow",
    "loss_scale_collapse",
    "nonfinite",
    "data_fault",
    "bad_init_scale",
    "not_learning",
    precision="scaled",
    model=lambda: wave_net(norm=False),
    unit=(4e4, 0.0),
    twin={"model": lambda: wave_net(norm=False), "precision": "scaled"},
)
wave.faulty(
    "penalty",
    "over_regularised",
    "not_learning",
    optimizer=sgd(0.03, 0.9, 0.1),
    twin={"optimizer": sgd(0.03, 0.9)},
)


# ---- messages on graphs; Adam

graph = Family("graphs", MessagePassing, made.graphs, entropy, adam, 3e-3, batch=16)
graph.healthy("plain")
graph.healthy("sgd", optimizer=sgd(0.1, 0.9))
graph.healthy("restarts", rate=lambda step: 0.5 * (1 + math.cos(math.pi * (step % 75) / 75)))
graph.healthy("sparse", edit=biased(r"own.\d.bias", -0.05))
graph.faulty(
    "never-reset",
    "stale_gradients",
    "learning_rate_too_high",
    "exploding_gradients",
    "not_learning",
    reset=False,
    optimizer=sgd(0.03),
    twin={"optimizer": sgd(0.03)},
)
graph.faulty(
    "constant-no-bias",
    "symmetric_units",
    "bad_init_scale",
    layers="heard|own|enter",
    edit=constant("heard|own|enter", 0.03),
)
graph.faulty("wide", "bad_init_scale", "exploding_gradients", edit=scaled("", 4))
graph.faulty(
    "narrow",
    "bad_init_scale",
    "vanishing_gradients",
    "not_learning",
    edit=scaled("", 0.02),
    optimizer=sgd(0.1, 0.9),
    twin={"optimizer": sgd(0.1, 0.9)},
)
graph.faulty(
    "clip",
    "over_clipping",
    "learning_rate_too_low",
    clip=3e-3,
    optimizer=sgd(0.03, 0.9),
    twin={"optimizer": sgd(0.03, 0.9)},
)
graph.faulty("slow", "layer_imbalance", "learning_rate_too_low", layers="own", groups=paced("own", 1e-3))
graph.faulty(
    "far",
    "excessive_drift",
    "learning_rate_too_high",
    before=200,
    faster=30,
    after=lambda net: nn.init.normal_(net.leave.weight, std=0.1),
    data=mislabelled(0.1),
    twin={"before": 200, "faster": 0.1},
)
graph.faulty("jump", "schedule_fault", "loss_spike", "learning_rate_too_high", onset=200, rate=jump(200, 100))


# ---- two views of a thing; contrastive loss, Nesterov


def contrast(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each view must find the other one among 48 (InfoNCE)."""
    a, b = (F.normalize(net(x[:, i]).float(), dim=1).split(48) for i in (0, 1))
    parts = [F.cross_entropy(p @ q.T / 0.2, torch.arange(len(p))) for p, q in zip(a, b, strict=True)]
    return torch.stack(parts).mean()


pair = Family(
    "views", lambda: mlp(24, 64, 64, 16, act=nn.Tanh), made.views, contrast, nesterov, 0.1, batch=48
)
pair.healthy("plain")
pair.healthy(
    "relu-adam", model=lambda: mlp(24, 64, 64, 16), optimizer=lambda p, lr: torch.optim.Adam(p, 2e-3)
)
pair.faulty(
    "saturated",
    "saturated_units",
    "bad_init_scale",
    "vanishing_gradients",
    layers="^[0-3]",
    edit=scaled(r"^[02]\.", 25),
)
pair.faulty("unscaled", "saturated_units", "data_fault", "vanishing_gradients", unit=(80.0, 0.0))
pair.faulty(
    "rate-x100", "learning_rate_too_high", "not_learning", "saturated_units", "weight_growth", faster=100
)
pair.faulty("rate-100000th", "learning_rate_too_low", "not_learning", faster=1e-5)
pair.faulty(
    "mismatched",
    "not_learning",
    "data_fault",
    "overfitting",
    data=lambda x, y: (torch.stack([x[:, 0], shuffled(x[:, 1])], 1), y),
)
pair.faulty(
    "constant",
    "symmetric_units",
    "bad_init_scale",
    "not_learning",
    layers="^[02]",
    edit=constant(r"^[02]\.", 0.05),
)


# ---- sigmoids, deep or recurrent

deep = Family(
    "sigmoids", lambda: mlp(20, 48, 48, 5, act=nn.Sigmoid), lambda: made.table(5), entropy, adam, 5e-3
)
deep.healthy("plain")
deep.faulty(
    "ten-layers",
    "vanishing_gradients",
    "not_learning",
    layers=r"^[0-9]\.|^1[02]\.",
    model=lambda: mlp(20, *[32] * 10, 5, act=nn.Sigmoid),
    optimizer=nesterov,
    faster=10,
    twin={"model": lambda: mlp(20, 32, 5, act=nn.Sigmoid), "optimizer": nesterov, "faster": 10},
)
deep.faulty(
    "tanh-small",
    "vanishing_gradients",
    "bad_init_scale",
    "not_learning",
    model=lambda: mlp(20, *[32] * 8, 5, act=nn.Tanh),
    edit=scaled("", 0.25),
    optimizer=nesterov,
    faster=10,
    twin={"model": lambda: mlp(20, *[32] * 8, 5, act=nn.Tanh), "optimizer": nesterov, "faster": 10},
)

language = Family(
    "decoder-fused",
    lambda: Reader(40, 40, causal=True),
    made.text,
    entropy,
    adamw,
    3e-3,
    batch=16,
    clip=1.0,
    rate=warm(20, 250),
    steps=250,
)
language.healthy("plain")
language.faulty(
    "z-sign",
    "logit_drift",
    "weight_growth",
    "not_learning",
    layers="to_out",
    penalty=lambda net, x: -0.03 * torch.logsumexp(net(x), -1).square().mean(),
)
language.faulty(
    "sharp", "attention_collapse", "bad_init_scale", layers="attention", edit=scaled(r"\.(q|k)\.", 25)
)
language.faulty(
    "constant", "symmetric_units", "bad_init_scale", layers="up|down", edit=constant("up|down", 0.02)
)
