"""Numbers that half precision cannot hold: lost updates, lost gradients, a loss scale that collapses."""

from __future__ import annotations

import numpy as np

from ..findings import Finding
from .history import MATRICES, History, nanmedian
from .outcome import outcome
from .registry import detector

#: So many captures must agree.
LEAST_CAPTURES = 5
#: Share of the updates that rounding swallowed.
ROUNDED = 0.5
#: Smallest normal float16: below it bits are lost, below 6e-8 everything is.
FP16_NORMAL = 2.0**-14
#: Share of a matrix's gradient that is exactly zero.
ZEROS = 0.25
#: A loss scale this low has collapsed; so has one for which so many captured steps are skipped.
LOWEST_SCALE, SKIPPED = 1.0, 0.2


@detector("low_precision_stall")
def low_precision_stall(history: History) -> Finding | None:
    """Half-precision weights that stand still because rounding swallows their updates.

    More than half of the elements of a float16 or bfloat16 matrix keep their bits in the typical captured
    step although their gradient is not zero (bfloat16 has 8 bits: an update below 1/256 of the weight is
    lost). Told apart: autocast, whose weights are float32, and elements that received no gradient.
    """
    table = history.tensors
    half = table.index[table["dtype"].isin(["float16", "bfloat16"])]
    names = tuple(n for n in history.names(*MATRICES) if n in half)
    if not names or history.captures < LEAST_CAPTURES:
        return None
    gradient = history.table("gradient", "count", names) - history.table("gradient", "zeros", names)
    with np.errstate(divide="ignore", invalid="ignore"):
        lost = history.table("update", "lost", names) / gradient
    lost[history.skipped] = np.nan
    typical = nanmedian(lost, axis=0)
    worst = [i for i in np.argsort(-np.nan_to_num(typical)) if typical[i] > ROUNDED]
    if not worst:
        return None
    facts = outcome(history)
    name, value = names[worst[0]], float(typical[worst[0]])
    kind = history.of(name, "dtype")
    return history.finding(
        "low_precision_stall",
        "critical" if facts.stalled else "warning",
        f"In the typical step {value:.0%} of the numbers of {name} do not change although their gradient "
        f"is not zero: {kind} "
        f"rounds the updates away.",
        first=history.steps[0],
        layers=[names[i] for i in worst],
        evidence={"lost_share": value, "threshold": ROUNDED},
        advice="Keep the weights in float32 and use autocast for the arithmetic, or use stochastic rounding.",
        confidence=0.9,
    )


@detector("gradient_underflow")
def gradient_underflow(history: History) -> Finding | None:
    """Gradients so small that float16 flushes much of them to zero.

    From the first captures on and over the first half of the run at least a quarter of the gradient is
    exactly zero in most matrices, and in every matrix what remains (99 %) is below the smallest normal
    float16, 6.1e-5. Told apart: ReLU's and embeddings' zeros, which sit beside gradients of ordinary size;
    converged runs (only the first half counts).
    """
    names = history.names(*MATRICES)
    if len(names) < 2 or history.captures < LEAST_CAPTURES:
        return None
    broken_step = outcome(history).broken_step
    if broken_step is not None and broken_step <= history.steps[LEAST_CAPTURES - 1]:
        return None
    half = slice(0, max(LEAST_CAPTURES, history.captures // 2))
    start = slice(0, LEAST_CAPTURES)
    count = history.table("gradient", "count", names)[half]
    zeros = history.table("gradient", "zeros", names)[half] / np.where(count > 0, count, np.nan)
    broken = history.table("gradient", "nans", names)[half] + history.table("gradient", "infs", names)[half]
    zeros[broken > 0] = np.nan
    if np.isfinite(zeros).sum(axis=0).min() < LEAST_CAPTURES:
        return None
    share = nanmedian(zeros, axis=0)
    from_start = np.mean(nanmedian(zeros[start], axis=0) >= ZEROS) >= 0.5
    if not from_start or np.mean(share >= ZEROS) < 0.5:
        return None
    high, low = (np.abs(history.table("gradient", quantile, names)[half]) for quantile in ("p99", "p01"))
    size = nanmedian(np.fmax(high, low), axis=0)
    if not (np.nan_to_num(size, nan=1.0) < FP16_NORMAL).all() or not (size > 0).any():
        return None
    facts = outcome(history)
    order = np.argsort(-share)
    return history.finding(
        "gradient_underflow",
        "critical" if facts.bad else "warning",
        f"{share[order[0]]:.0%} of the gradient of {names[order[0]]} is exactly zero and the rest is below "
        f"{FP16_NORMAL:.2g}: "
        f"gradients underflow in half precision, and {facts.words()}.",
        first=history.steps[0],
        layers=[names[i] for i in order if share[i] >= ZEROS],
        evidence={
            "zero_share": float(share[order[0]]),
            "largest_gradient": float(np.nanmax(size)),
            "threshold": ZEROS,
        },
        advice="Use torch.amp.GradScaler or bfloat16, and do not divide the loss by large numbers.",
        confidence=0.8,
    )


@detector("loss_scale_collapse")
def loss_scale_collapse(history: History) -> Finding | None:
    """A loss scaler that halves its scale again and again, because gradients overflow at any scale.

    The logged `loss_scale` ends at 1 or below, or more than a fifth of the captures after the first fifth
    were skipped. It began where the scale was last at its highest. Told apart: the first steps of a scaler,
    which starts too high on purpose, and one skipped step now and then.
    """
    skipped = history.skipped[history.captures // 5 :]
    frame = history.source.scalars("loss_scale") if "loss_scale" in history.source.scalar_names() else None
    scale = frame["value"].to_numpy(float) if frame is not None else np.empty(0)
    low = scale.size >= 3 and scale[-1] <= LOWEST_SCALE < scale[0]
    often = skipped.size >= 10 and skipped.mean() > SKIPPED
    if not low and not often:
        return None
    first = int(history.steps[0])
    if low and frame is not None:
        until = scale[: int(np.argmax(scale <= LOWEST_SCALE))]
        first = int(frame["step"].iloc[int(np.flatnonzero(until == until.max())[-1])])
    facts = outcome(history)
    what = (
        f"fell to {scale[-1]:.3g}" if low else f"made {skipped.mean():.0%} of the captured steps be skipped"
    )
    return history.finding(
        "loss_scale_collapse",
        "critical" if facts.bad else "warning",
        f"The loss scale {what}: gradients overflow at any scale and steps are skipped, and {facts.words()}.",
        first=first,
        evidence={
            "loss_scale": float(scale[-1]) if scale.size else 0.0,
            "skipped_share": float(skipped.mean() if skipped.size else 0),
        },
        advice="Look for activations beyond 65504 (inputs that are not normalised, attention logits); use "
        "bfloat16.",
    )
