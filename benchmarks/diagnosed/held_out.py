"""Families that were not looked at while the detectors were written: a check that these generalise."""

from __future__ import annotations

import math

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
    BagOfWords,
    Hourglass,
    Reader,
    Recurrent,
    TwoTasks,
    mlp,
    plain_convolutions,
)
from .tuned import adam, adamw, entropy, nesterov, sgd

# ---- a small U-Net that takes noise away; group norm, Adam


def restore(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(net(x).float(), y)


def noisy_images() -> tuple[Tensor, Tensor]:
    clean = made.images()[0]
    return blurred(clean, 0.4), clean


unet = Family("hourglass", Hourglass, noisy_images, restore, adam, 2e-3, steps=250, batch=16, held_out=True)
unet.healthy("plain")
unet.healthy("sum", loss=lambda net, x, y: F.mse_loss(net(x), y, reduction="sum"))
unet.healthy("frozen-entrance", edit=frozen("down1"))
unet.healthy(
    "one-cycle", faster=3, rate=lambda s: 0.1 + 0.9 * (s / 60 if s < 60 else max(0.0, (250 - s) / 190))
)
unet.faulty("rate-x300", "learning_rate_too_high", "not_learning", "weight_growth", faster=300)
unet.faulty("rate-10000th", "learning_rate_too_low", "not_learning", faster=1e-4)
unet.faulty("detached", "unused_parameters", layers="middle|down2", edit=cut("middle"))
unet.faulty("left-out", "frozen_parameters", layers="join", groups=without("join"))
unet.faulty("slow", "layer_imbalance", layers="middle|down", groups=paced("middle|down", 1e-3))
unet.faulty("nan", "nonfinite", "data_fault", onset=120, disturb=times(math.nan, [120]))
unet.faulty("jump", "schedule_fault", "loss_spike", "learning_rate_too_high", onset=150, rate=jump(150, 200))
unet.faulty("eps", "adam_epsilon", optimizer=lambda p, lr: torch.optim.Adam(p, 0.5 * lr, eps=3.0))
unet.faulty("unpaired", "not_learning", "data_fault", "overfitting", data=lambda x, y: (shuffled(x), y))

# ---- a transformer that reads a text; post-norm, softmax and dropout, AdamW

reader = Family(
    "reader",
    lambda: Reader(200, 5, post=True, fused=False),
    lambda: made.topics(),
    entropy,
    adamw,
    2e-3,
    batch=24,
    clip=1.0,
    rate=warm(30, 300),
    held_out=True,
)
reader.healthy("plain")
reader.healthy("rare-words", data=lambda x, y: (x, y), batch=8)
reader.healthy("finetune-all", before=200, faster=0.05)
reader.faulty(
    "sharp", "attention_collapse", "bad_init_scale", layers="attention", edit=scaled(r"\.(q|k)\.", 60)
)
reader.faulty("rate-x100", "learning_rate_too_high", "not_learning", faster=100)
reader.faulty("rate-1000th", "learning_rate_too_low", "not_learning", faster=1e-3)
reader.faulty("shuffled", "not_learning", "data_fault", "overfitting", data=mislabelled(1.0))
reader.faulty("half-labels", "data_fault", "not_learning", "overfitting", data=mislabelled(0.6))
reader.faulty("few", "overfitting", samples=80, steps=400, rate=warm(30))
reader.faulty(
    "decay",
    "over_regularised",
    "not_learning",
    optimizer=lambda p, lr: torch.optim.AdamW(p, lr, weight_decay=60.0),
)
reader.faulty("never-reset", "stale_gradients", "not_learning", "learning_rate_too_high", reset=False)
reader.faulty("stops", "schedule_fault", onset=60, rate=jump(60, 0, warm(30, 300)))
reader.faulty(
    "sorted", "data_fault", "loss_spike", "overfitting", "not_learning", data=by_label, in_order=True
)
reader.faulty(
    "far",
    "excessive_drift",
    "learning_rate_too_high",
    "not_learning",
    before=250,
    faster=15,
    clip=1e9,
    twin={"before": 250, "faster": 0.05},
)

# ---- an LSTM that forecasts quantiles; RMSprop


def quantiles(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Pinball loss at 10, 50 and 90 %."""
    miss = y.view(-1, 1) - net(x).float()
    q = torch.tensor([0.1, 0.5, 0.9])
    return torch.maximum(q * miss, (q - 1) * miss).mean()


lstm = Family(
    "forecast",
    lambda: Recurrent("LSTM", 1, 32, 3),
    made.forecasts,
    quantiles,
    lambda p, lr: torch.optim.RMSprop(p, lr),
    2e-3,
    clip=1.0,
    held_out=True,
)
lstm.healthy("plain")
lstm.healthy("gru", model=lambda: Recurrent("GRU", 1, 32, 3))
lstm.healthy("unclipped-adam", clip=1e9, optimizer=adam)
lstm.faulty(
    "rnn-gain-4",
    "exploding_gradients",
    "saturated_units",
    "bad_init_scale",
    "not_learning",
    layers="cell",
    clip=1e9,
    model=lambda: Recurrent("RNN", 1, 32, 3),
    edit=scaled("hh", 8.0),
    twin={"model": lambda: Recurrent("RNN", 1, 32, 3)},
)
lstm.faulty(
    "rate-x300", "learning_rate_too_high", "not_learning", "saturated_units", "weight_growth", faster=300
)
lstm.faulty("rate-10000th", "learning_rate_too_low", "not_learning", faster=1e-4)
lstm.faulty(
    "clip",
    "over_clipping",
    "learning_rate_too_low",
    clip=1e-4,
    optimizer=sgd(0.1, 0.9),
    twin={"optimizer": sgd(0.1, 0.9)},
)
lstm.faulty(
    "wide",
    "bad_init_scale",
    "saturated_units",
    "exploding_gradients",
    "vanishing_gradients",
    edit=scaled("", 20),
)
lstm.faulty(
    "spike",
    "schedule_fault",
    "loss_spike",
    "learning_rate_too_high",
    onset=200,
    rate=lambda s: 100.0 if s in (200, 201) else 1.0,
)

# ---- one trunk, two losses; Adagrad


def both(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    out = net(x).float()
    return F.mse_loss(out[:, 0], y[:, 0]) + F.binary_cross_entropy_with_logits(out[:, 1], y[:, 1])


tasks = Family(
    "two-tasks", TwoTasks, made.two_tasks, both, lambda p, lr: torch.optim.Adagrad(p, lr), 2e-2, held_out=True
)
tasks.healthy("plain")
tasks.healthy("one-loss-counts-more", loss=lambda n, x, y: 5 * both(n, x, y))
tasks.healthy("tiny-batch", batch=3, faster=0.5, steps=600)
tasks.healthy("rarely-logged", log_every=10)
tasks.faulty(
    "second-loss-forgotten",
    "unused_parameters",
    layers="kind",
    loss=lambda n, x, y: F.mse_loss(n(x)[:, 0], y[:, 0]),
)
tasks.faulty("dead-head", "dead_units", layers="number", edit=biased("number.0.bias", -12.0))
tasks.faulty("unscaled", "data_fault", "bad_init_scale", "exploding_gradients", unit=(200.0, 0.0))
tasks.faulty("rate-x100", "learning_rate_too_high", "not_learning", "dead_units", "weight_growth", faster=100)
tasks.faulty("rate-10000th", "learning_rate_too_low", "not_learning", faster=1e-4)
tasks.faulty(
    "constant-trunk", "symmetric_units", "bad_init_scale", layers="trunk", edit=constant("trunk", 0.05)
)
tasks.faulty("spare", "unused_parameters", layers="projection", edit=spare(64))
tasks.faulty(
    "batch-x1000",
    "data_fault",
    "loss_spike",
    onset=180,
    disturb=times(1e3, [180]),
    optimizer=nesterov,
    faster=0.5,
    twin={"optimizer": nesterov, "faster": 0.5},
)

tasks.healthy("scaled-float16", precision="scaled")
tasks.faulty(
    "underflow",
    "gradient_underflow",
    "learning_rate_too_low",
    "not_learning",
    "unused_parameters",
    precision="float16",
    divide=3e5,
    optimizer=sgd(0.02 * 3e5, 0.9),
    twin={"optimizer": sgd(0.02, 0.9)},
)
tasks.faulty(
    "overflow",
    "loss_scale_collapse",
    "nonfinite",
    "data_fault",
    "not_learning",
    precision="scaled",
    unit=(1e5, 0.0),
    twin={"precision": "scaled"},
)

# ---- a mixture of two normal distributions; tanh, Adam


def mixture(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Negative log-likelihood, which may be negative."""
    weight, mean, log_std = net(x).float().chunk(3, 1)
    each = -0.5 * ((y - mean) / log_std.exp()) ** 2 - log_std - 0.92
    return -torch.logsumexp(F.log_softmax(weight, 1) + each, 1).mean()


density = Family(
    "density", lambda: mlp(1, 40, 40, 6, act=nn.Tanh), made.two_branches, mixture, adam, 5e-3, held_out=True
)
density.healthy("plain")
density.healthy("softplus", model=lambda: mlp(1, 40, 40, 6, act=nn.Softplus))
density.faulty("rate-10000th", "learning_rate_too_low", "not_learning", faster=1e-4)
density.faulty(
    "rate-x200", "learning_rate_too_high", "not_learning", "saturated_units", "weight_growth", faster=200
)
density.faulty(
    "saturated",
    "saturated_units",
    "bad_init_scale",
    "vanishing_gradients",
    layers="^[0-3]",
    edit=scaled(r"^[02]\.", 40),
)
density.faulty(
    "constant",
    "symmetric_units",
    "bad_init_scale",
    "not_learning",
    layers="^[02]",
    edit=constant(r"^[02]\.", 0.1),
)
density.faulty("nan", "nonfinite", "data_fault", onset=170, disturb=times(math.nan, [170]))

# ---- a bag of words; focal loss, SGD with a large rate


def focal(net: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    log_p = F.log_softmax(net(x).float(), 1).gather(1, y[:, None])
    return -((1 - log_p.exp()) ** 2 * log_p).mean()


bag = Family("words", BagOfWords, lambda: made.topics(), focal, adam, 5e-3, batch=48, held_out=True)
bag.healthy("plain")
bag.healthy("adagrad", optimizer=lambda p, lr: torch.optim.Adagrad(p, 0.1))
bag.faulty("rate-x200", "learning_rate_too_high", "not_learning", "dead_units", "weight_growth", faster=200)
bag.faulty("rate-1000th", "learning_rate_too_low", "not_learning", faster=1e-3)
bag.faulty("shuffled", "not_learning", "data_fault", "overfitting", data=mislabelled(1.0))
bag.faulty("dead", "dead_units", layers="hidden|act", edit=biased("hidden.bias", -9.0))
bag.faulty("without-embedding", "frozen_parameters", layers="words", groups=without("words"))
bag.faulty("few", "overfitting", samples=60, steps=500)
bag.faulty(
    "constant",
    "symmetric_units",
    "bad_init_scale",
    "not_learning",
    layers="hidden",
    edit=constant("hidden", 0.1),
)
bag.faulty(
    "bfloat16",
    "low_precision_stall",
    "learning_rate_too_low",
    precision="bfloat16 weights",
    optimizer=sgd(3e-3),
    twin={"optimizer": sgd(3e-3)},
)

# ---- convolutions without a norm; hinge loss, momentum

conv = Family(
    "plain-convolutions",
    plain_convolutions,
    made.textures,
    lambda net, x, y: F.multi_margin_loss(net(x).float(), y),
    lambda p, lr: torch.optim.SGD(p, lr, 0.9),
    0.05,
    batch=48,
    held_out=True,
)
conv.healthy("plain")
conv.healthy("step-decay", rate=lambda s: 0.1 ** (s // 120))
conv.healthy("clipped", clip=1.0)
conv.faulty(
    "rate-x40", "learning_rate_too_high", "not_learning", "dead_units", "exploding_gradients", faster=40
)
conv.faulty("rate-1000th", "learning_rate_too_low", "not_learning", faster=1e-3)
conv.faulty("clip", "over_clipping", "learning_rate_too_low", clip=1e-3)
conv.faulty("wide", "bad_init_scale", "exploding_gradients", "dead_units", edit=scaled("", 6))
conv.faulty("narrow", "bad_init_scale", "vanishing_gradients", "not_learning", edit=scaled("", 0.03))
conv.faulty("dead", "dead_units", layers="^(2|3)", edit=biased("^2.bias", -8.0))
conv.faulty(
    "never-reset",
    "stale_gradients",
    "learning_rate_too_high",
    "exploding_gradients",
    "not_learning",
    "dead_units",
    reset=False,
)
conv.faulty(
    "decay",
    "over_regularised",
    "not_learning",
    optimizer=lambda p, lr: torch.optim.SGD(p, lr, 0.9, weight_decay=0.08),
)
conv.faulty(
    "repeated",
    "overfitting",
    "data_fault",
    data=repeated(40),
    steps=500,
    loss=entropy,
    twin={"loss": entropy, "steps": 500},
)

# ---- a language model with softmax attention; AdamW, warm-up

decoder = Family(
    "decoder",
    lambda: Reader(40, 40, causal=True, fused=False, depth=3),
    made.text,
    entropy,
    adamw,
    3e-3,
    batch=16,
    clip=1.0,
    rate=warm(20, 250),
    steps=250,
    held_out=True,
)
decoder.healthy("plain")
decoder.healthy("accumulate", accumulate=2, batch=8)
decoder.faulty(
    "sharp", "attention_collapse", "bad_init_scale", layers="attention", edit=scaled(r"\.(q|k)\.", 30)
)
decoder.faulty(
    "z-sign",
    "logit_drift",
    "weight_growth",
    "not_learning",
    layers="to_out",
    penalty=lambda net, x: -0.05 * torch.logsumexp(net(x), -1).square().mean(),
)
decoder.faulty(
    "sign-of-penalty",
    "weight_growth",
    "logit_drift",
    "not_learning",
    "exploding_gradients",
    penalty=lambda net, x: -0.02 * sum(p.square().sum() for p in net.parameters()),
)
decoder.faulty("eps", "adam_epsilon", optimizer=lambda p, lr: torch.optim.AdamW(p, lr, eps=1.0))
decoder.faulty(
    "fast-out",
    "weight_growth",
    "layer_imbalance",
    "learning_rate_too_high",
    "logit_drift",
    layers="to_out",
    groups=paced("to_out", 100),
)
