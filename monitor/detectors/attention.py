"""Attention that has become a hard choice."""

from __future__ import annotations

import numpy as np

from ..findings import Finding
from .drift import trained_modules
from .history import Bools, History, lasting, nanmedian
from .outcome import outcome
from .registry import detector

#: Median entropy of a query's attention, of what is possible, below which the module has collapsed: a head
#: below a tenth has (the level that research on entropy collapse watches), and more than half of them are.
COLLAPSED = 0.1
#: Mean probability that attention gives to what it attends to, above which it is a hard choice.
HARD_ATTENTION = 0.8


@detector("attention_collapse")
def attention_collapse(history: History) -> Finding | None:
    """Attention that is a hard choice from the start: almost no gradient passes the softmax.

    The median over heads and sampled queries of the attention's entropy, divided by the logarithm of the
    number of visible keys, is below 0.1 in most captures of the first tenth and of the second half of the
    run; or, when the training fails, from some capture on until the end, for at least three of them. Without
    captured entropy, weights that were captured as activations (a Softmax, or the Dropout on it: not
    negative, with a mean of exactly one over a whole number of at least four keys): sum(p^2) / sum(p), the
    mean probability of what is attended to, is at least 0.8 in most of these captures (when the training
    fails, of the second half). Fresh attention is spread out. Told apart: heads that learn to be sharp in a
    good training, pretrained models, the classifier's own softmax.
    """
    if history.captures < 5:
        return None
    modules = history.measured("attention_entropy")
    found = _by_entropy(history, modules) if modules else _by_weights(history)
    return None if found is None or _pretrained(history) else found


def _by_entropy(history: History, modules: tuple[str, ...]) -> Finding | None:
    median = history.table("attention_entropy", "p50", modules)
    hard = np.nan_to_num(median, nan=1.0) < COLLAPSED
    facts = outcome(history)
    early, late = _ends(history)
    since = {}
    for i in range(len(modules)):
        known = ~np.isnan(median[:, i])
        begin = lasting(hard[known, i])
        from_start = hard[early & known, i].mean() > 0.5 if (early & known).any() else False
        at_end = hard[late & known, i].mean() > 0.5 if (late & known).any() else False
        if from_start and at_end:
            since[i] = int(np.flatnonzero(hard[:, i])[0])
        elif facts.bad and begin is not None:
            since[i] = int(np.flatnonzero(known)[begin])
    if not since:
        return None
    order = sorted(since, key=lambda i: (since[i], nanmedian(median[late, i])))
    worst = order[0]
    value = float(nanmedian(median[since[worst] :, worst]))
    first = int(history.steps[since[worst]])
    largest = nanmedian(history.table("attention_logit", "max", (modules[worst],))[since[worst] :])
    evidence = {"median_entropy": value, "threshold": COLLAPSED, "layers": len(order)}
    return _finding(
        history,
        f"its median entropy is {value:.0%} of what is possible from step {first} on",
        first,
        [modules[i] for i in order],
        evidence | ({"largest_logit": float(largest)} if np.isfinite(largest) else {}),
        confidence=0.9,
    )


def _by_weights(history: History) -> Finding | None:
    last = list(history.modules)[-1:]
    modules = tuple(
        m for m, kind in history.modules.items() if kind in ("Softmax", "Dropout") and m not in last
    )
    if not modules:
        return None
    mean, rms = (history.table("activation", column, modules) for column in ("mean", "rms"))
    with np.errstate(divide="ignore", invalid="ignore"):
        keys, sharp = 1 / mean, rms**2 / mean
        whole = (
            (np.abs(keys - np.round(keys)) < 1e-2)
            & (keys > 3.5)
            & (history.table("activation", "min", modules) >= 0)
        )
    early, late = _ends(history)
    facts = outcome(history)
    chosen = []
    for i in np.flatnonzero(whole.mean(axis=0) > 0.9):
        at_end = np.mean(sharp[late, i] >= HARD_ATTENTION) > 0.5
        if at_end and (facts.bad or np.mean(sharp[early, i] >= HARD_ATTENTION) > 0.5):
            chosen.append(int(i))
    if not chosen:
        return None
    chosen.sort(key=lambda i: -nanmedian(sharp[late, i]))
    value = float(nanmedian(sharp[late, chosen[0]]))
    first = int(history.steps[np.flatnonzero(sharp[:, chosen[0]] >= HARD_ATTENTION)[0]])
    return _finding(
        history,
        f"it gives {value:.0%} to what it attends to from step {first} on",
        first,
        [modules[i] for i in chosen],
        {"mean_probability": value, "threshold": HARD_ATTENTION},
        confidence=0.8,
    )


def _ends(history: History) -> tuple[Bools, Bools]:
    """The first tenth of the captures (three at least), and the second half."""
    index = np.arange(history.captures)
    return index < max(3, history.captures // 10), index >= history.captures // 2


def _finding(
    history: History, what: str, first: int, layers: list[str], evidence: dict[str, float], confidence: float
) -> Finding:
    facts = outcome(history)
    return history.finding(
        "attention_collapse",
        "critical" if facts.bad else "warning",
        f"Attention has collapsed in {layers[0]}: {what}, and {facts.words()}.",
        first=first,
        layers=layers,
        evidence=evidence,
        advice="Check the scale of the query and key weights and of 1/sqrt(head size); use QK-norm, a "
        "lower learning rate.",
        confidence=confidence,
    )


def _pretrained(history: History) -> bool:
    trained = list(trained_modules(history).values())
    return history.info.get("reference") not in (None, "start") or bool(trained and np.mean(trained) >= 0.5)
