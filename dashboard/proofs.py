"""Which numbers of a log show each problem, by the formulas of the detectors themselves."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd

from ..monitor.detectors import History
from ..monitor.detectors.gradients import leverage, softmax_bias
from ..monitor.detectors.history import Floats, nanmedian
from ..monitor.detectors.outcome import finite, outcome, predictor
from ..monitor.detectors.overfitting import ACCURACY_LOST, GENERALISATION_LOSS, VAL_ACCURACY
from ..monitor.detectors.rates import held, largest_rate, update_ratios
from ..monitor.detectors.replicas import disagreement
from ..monitor.detectors.scales import input_size
from .excerpt import Case, Table, column, losses, of_layers, over_layers, quotient
from .figures.evidence import Evidence


def share_not_finite(kind: str) -> Table:
    def read(h: History, names: tuple[str, ...]) -> Floats:
        bad = h.table(kind, "nans", names) + h.table(kind, "infs", names)
        return bad / h.table(kind, "count", names)

    return read


def swallowed(h: History, names: tuple[str, ...]) -> Floats:
    moving = h.table("gradient", "count", names) - h.table("gradient", "zeros", names)
    lost = h.table("update", "lost", names)
    return np.divide(lost, moving, out=np.full(lost.shape, np.nan), where=moving > 0)


def dead(h: History, names: tuple[str, ...]) -> Floats:
    kind = "activation" if any(name in h.modules for name in names) else "gradient"
    return 1 - h.table(kind, "active_units", names) / h.table(kind, "units", names)


def at_ends(h: History, names: tuple[str, ...]) -> Floats:
    """E[y^2] of tanh, E[(2 y - 1)^2] of sigmoid."""
    mean, std = h.table("activation", "mean", names), h.table("activation", "std", names)
    sigmoid = np.array([h.modules.get(name) == "Sigmoid" for name in names], dtype=bool)
    return np.where(sigmoid, 4 * (std**2 + (mean - 0.5) ** 2), std**2 + mean**2)


def growth(h: History, names: tuple[str, ...]) -> Floats:
    first = h.initial("norm", names)
    return h.table("weight", "norm", names) / np.where(first > 0, first, np.nan)


def gain(h: History, names: tuple[str, ...]) -> Floats:
    fan = np.array(
        [
            max(1.0, math.prod(h.of(name, "shape")[1:])) if name in h.tensors.index else np.nan
            for name in names
        ]
    )
    return h.table("weight", "rms", names) * np.sqrt(fan)


def spread_over_units(h: History, names: tuple[str, ...]) -> Floats:
    """Relative spread of the bias's gradient over the units, for the bias that goes with each matrix."""
    table = h.tensors
    biases = tuple(_bias_of(table, name) for name in names)
    unique = tuple(dict.fromkeys(biases))
    values = quotient(column("gradient", "std"), column("gradient", "rms"))(h, unique)
    return values[:, [unique.index(bias) for bias in biases]]


def _bias_of(table: pd.DataFrame, name: str) -> str:
    module = table.at[name, "module"] if name in table.index else name
    same = table.index[(table["module"] == module) & (table["role"] == "bias")]
    return str(same[0]) if len(same) else name


def decay_pull(h: History, names: tuple[str, ...]) -> Floats:
    """|decay x weight| over |gradient|; with AdamW over the update, whose part it is."""
    groups = [(str(o.get("class")), g) for o in h.info.get("optimizers") or [] for g in o.get("groups", [])]
    found = [
        (float(g["weight_decay"]), kind)
        for kind, g in groups
        if isinstance(g.get("weight_decay"), int | float)
    ]
    decay, kind = max(found, default=(0.0, ""))
    weight, against = decay * h.table("weight", "norm", names), h.table("gradient", "norm", names)
    if kind == "AdamW":
        rate = largest_rate(h)
        weight = weight * (held(rate, h.steps)[:, None] if rate.step.size else np.nan)
        against = h.table("update", "norm", names)
    return np.divide(weight, against, out=np.full(weight.shape, np.nan), where=against > 0)


def moved(h: History, names: tuple[str, ...]) -> Floats:
    return h.table("drift", "relative_l2", names)


def nonfinite(c: Case) -> Evidence:
    """Share of NaN and infinity in what the named layers put out or receive; else the loss."""
    h = c.history
    if not c.named:
        return losses(c, {})
    kind = "activation" if c.named[0] in h.modules else "gradient"
    found = of_layers(
        f"share of {kind} that is not finite", share_not_finite(kind), log=False, typical=False
    )(c)
    return Evidence(found.what, found.curves, {}, {"allowed": 0.0})


def exploding(c: Case) -> Evidence:
    """Leverage against its limit, or the gradient norm against its usual size."""
    h = c.history
    if c.value("first_over_last") is not None:
        return vanishing(c)
    if c.value("growth") is None:
        return of_layers("leverage |g| |w| ÷ loss", leverage, limit="limit", default=300)(c)
    found = of_layers("gradient norm", column("gradient", "norm"))(c)
    before = h.steps < c.finding.first_step
    usual = nanmedian(h.table("gradient", "norm", c.named)[before])
    limits = {f"{c.threshold(100):g} x usual": c.threshold(100) * float(usual)} if usual > 0 else {}
    return Evidence(found.what, found.curves, found.typical, limits, True)


def vanishing(c: Case) -> Evidence:
    """Leverage of the named layers, and the share of the last third's that they must not fall below."""
    h = c.history
    found = of_layers("leverage |g| |w| ÷ loss", leverage, typical=False)(c)
    third = c.others[-max(1, len(c.others) // 3) :]
    last = over_layers(leverage(h, third))
    factor = c.threshold(1e-3)
    compared = {
        "last third of the layers": (h.steps, last),
        f"limit: {factor:g} x that": (h.steps, factor * last),
    }
    return Evidence(found.what, found.curves, compared, {}, True)


def update_too_large(c: Case) -> Evidence:
    """The update ratio; where the weights leapt between two captures, their norm."""
    if c.value("update_ratio") is None:
        return of_layers("weight norm ÷ first", growth)(c)
    return of_layers("update ratio", update_ratios, limit="limit", default=0.1)(c)


def schedule(c: Case) -> Evidence:
    """The learning rate; at a jump the limit is a multiple of the rate before it."""
    rate = largest_rate(c.history)
    limits = {}
    if c.value("jump") is not None:
        before = rate.value[rate.step < c.finding.first_step]
        limits = (
            {f"{c.threshold(10):g} x the step before": c.threshold(10) * float(before[-1])}
            if before.size
            else {}
        )
    return Evidence("learning rate", {"learning rate": (rate.step, rate.value)}, {}, limits, bool(limits))


def epsilon(c: Case) -> Evidence:
    """Root mean square of the gradients against Adam's eps."""
    found = of_layers("gradient rms", column("gradient", "rms"))(c)
    eps = c.value("eps") or math.nan
    limits = {"eps ÷ 3": eps / 3} if eps > 0 else {}
    return Evidence(found.what, found.curves, found.typical, limits, True)


def imbalance(c: Case) -> Evidence:
    """Update ratios, and the level that is so many times below the fastest layer."""
    found = of_layers("update ratio", update_ratios)(c)
    table = update_ratios(c.history, c.others)
    fastest = float(np.nan_to_num(over_layers(table.T)).max(initial=0.0))
    factor = c.threshold(100)
    limits = {f"fastest layer ÷ {factor:g}:": fastest / factor} if fastest > 0 else {}
    return Evidence(found.what, found.curves, found.typical, limits, True)


def init_scale(c: Case) -> Evidence:
    """Size of the predictions, or the gain of the hidden matrices."""
    if c.value("first_output") is not None:
        return predictions(c, 5.0)
    return of_layers("gain: rms(w) x √fan-in", gain, limit="limit", default=0.1)(c)


def predictions(c: Case, default: float = 10.0) -> Evidence:
    """Root mean square of what the last matrix puts out, or its mean where all logits were shifted."""
    h = c.history
    last = predictor(h)
    module = str(h.of(last, "module")) if last else ""
    statistic = "rms" if c.value("logit_mean") is None else "mean"
    values = np.abs(h.table("activation", statistic, (module,))[:, 0])
    limits = {"limit": c.threshold(default)}
    return Evidence(f"predictions, {statistic}", {module: (h.steps, values)}, {}, limits, True)


def inputs(c: Case) -> Evidence:
    """Size of the inputs; of batches that hold one class, the least gradient of the output's bias; of targets
    that do not fit, the losses.
    """
    h = c.history
    if c.value("val_over_train") is not None:
        factor = c.threshold(0.75)
        return losses(c, {f"{factor:.0%} of the training loss": factor * outcome(h).end})
    if c.value("share_of_captures") is not None:
        return surprise(c)
    module, size = input_size(h)
    limit = c.threshold(30)
    if c.value("input_over_usual") is not None:
        limit *= float(nanmedian(size)) if size.size else math.nan
    curves = {f"inputs of {module}": (h.steps, size if size.size else np.full(h.captures, np.nan))}
    return Evidence("inputs, rms", curves, {}, {"limit": limit} if math.isfinite(limit) else {}, True)


def surprise(c: Case) -> Evidence:
    """The least gradient over the classes: prediction minus label, averaged over a batch."""
    h, bias = c.history, softmax_bias(c.history)
    values = h.table("gradient", "min", (bias or "",))[:, 0]
    return Evidence(
        "least gradient of the output's bias", {bias or "bias": (h.steps, values)}, {}, {"limit": -0.5}
    )


def pile_up(c: Case) -> Evidence:
    """The largest gradient over the classes, which one batch cannot push beyond 1; or how the norms grow."""
    if c.value("autocorrelation") is not None:
        return of_layers("gradient norm", column("gradient", "norm"))(c)
    h, bias = c.history, softmax_bias(c.history)
    both = np.hstack([h.table("gradient", name, (bias or "",)) for name in ("min", "max")])
    size = np.abs(both).max(axis=1)
    limits = {"limit": c.threshold(1.05)}
    return Evidence("largest gradient of the output's bias", {bias or "bias": (h.steps, size)}, {}, limits)


def attention(c: Case) -> Evidence:
    """The median entropy of the attention, or how much of it goes to one place."""
    if c.value("mean_probability") is not None:
        mean = column("activation", "mean")
        table = quotient(lambda h, names: h.table("activation", "rms", names) ** 2, mean)
        return of_layers(
            "mean probability of what is attended to", table, log=False, limit="limit", typical=False
        )(c)
    what = "median attention entropy, share of possible"
    table = column("attention_entropy", "p50")
    return of_layers(what, table, log=False, limit="limit", default=0.1, typical=False)(c)


def loss_scale(c: Case) -> Evidence:
    """The scaler's factor; without it the share of captured steps that were skipped."""
    h = c.history
    series = h.scalar("loss_scale")
    if series.step.size:
        return Evidence("loss scale", {"loss scale": (series.step, series.value)}, {}, {"limit": 1.0}, True)
    share = pd.Series(h.skipped.astype(float)).rolling(20, min_periods=1).mean().to_numpy()
    return Evidence("skipped steps, share of the last 20", {"skipped": (h.steps, share)}, {}, {"limit": 0.2})


def learning(c: Case) -> Evidence:
    """The level that a loss must fall below to count as learnt."""
    trivial, facts = c.value("trivial"), outcome(c.history)
    if trivial is not None:
        return losses(c, {"must fall below": trivial * c.threshold(0.97)})
    return losses(c, {"must fall below": facts.initial * (1 - c.threshold(0.05))})


def turned_back(c: Case) -> Evidence:
    """Validation loss against its best plus the share that Prechelt's rule allows; or validation accuracy."""
    if c.value("accuracy_lost") is not None:
        steps, values = finite(c.history.scalar(*VAL_ACCURACY))
        top = 100.0 if values.size and values.max() > 1.5 else 1.0
        best = float(values.max(initial=0.0))
        lost = c.threshold(ACCURACY_LOST)
        return Evidence(
            "validation accuracy",
            {"validation accuracy": (steps, values)},
            {},
            {f"best - {100 * lost:g} points": best - lost * top},
        )
    found = finite(c.history.val_loss)
    if c.value("generalisation_loss") is None or not found.step.size:
        return losses(c, {})
    limit = c.threshold(GENERALISATION_LOSS)
    return losses(c, {f"best + {limit:g} %:": float(found.value.min()) * (1 + limit / 100)})


def spike(c: Case) -> Evidence:
    """The loss, and so many robust standard deviations above the hundred losses before the jump."""
    series = finite(c.history.train_loss)
    before = np.log(series.value[(series.step < c.finding.first_step) & (series.value > 0)][-100:])
    if not before.size:
        return losses(c, {}, log=True)
    middle = float(np.median(before))
    spread = max(1.4826 * float(np.median(np.abs(before - middle))), 0.02)
    sigmas = c.threshold(8.0)
    return losses(c, {f"{sigmas:g} deviations above usual:": math.exp(middle + sigmas * spread)}, log=True)


def against_baselines(c: Case) -> Evidence:
    """The loss against what earlier runs ended at."""
    known = {"baseline": c.value("baseline"), "limit": c.value("threshold")}
    return losses(c, {name: value for name, value in known.items() if value is not None})


def standing_still(c: Case) -> Evidence:
    """Named layers whose gradient or update never arrives: nothing counts as zero."""
    kind, name = ("update", "ratio") if c.finding.problem == "frozen_parameters" else ("gradient", "norm")

    def table(h: History, names: tuple[str, ...]) -> Floats:
        return np.nan_to_num(h.table(kind, name, names))

    found = of_layers(f"{kind} {name}", table, log=False)(c)
    return Evidence(found.what, found.curves, found.typical, {"stuck at": 0.0})


def copies(c: Case) -> Evidence:
    """How many tensors are not the same on all ranks, at each comparison."""
    differing = disagreement(c.history.source.checksums())
    curves = {"differing tensors": (differing.index.to_numpy(), differing.to_numpy(float).sum(axis=1))}
    return Evidence("tensors that differ between ranks", curves, limits={"none": 0.0})
