"""Attention that has become a hard choice."""

from __future__ import annotations

import numpy as np

from ..findings import Finding
from .drift import trained_modules
from .history import History, nanmedian
from .outcome import outcome
from .registry import detector

#: Mean probability that attention gives to what it attends to, above which it is a hard choice.
HARD_ATTENTION = 0.8


@detector("attention_collapse")
def attention_collapse(history: History) -> Finding | None:
    """Attention that is a hard choice from the start: almost no gradient passes the softmax.

    For captured attention weights (a Softmax, or the Dropout on it: not negative, with a mean of exactly one
    over a whole number of at least four keys): sum(p^2) / sum(p), the mean probability of what is attended
    to, is at least 0.8 in most captures of the first tenth and of the second half of the run; or of the
    second half alone when the training fails. Fresh attention is spread out. Told apart: heads that learn to
    be sharp in a good training, pretrained models, the classifier's own softmax. Fused attention is not
    captured and not judged.
    """
    last = list(history.modules)[-1:]
    modules = tuple(
        m for m, kind in history.modules.items() if kind in ("Softmax", "Dropout") and m not in last
    )
    if not modules or history.captures < 5:
        return None
    mean, rms = (history.table("activation", column, modules) for column in ("mean", "rms"))
    with np.errstate(divide="ignore", invalid="ignore"):
        keys, sharp = 1 / mean, rms**2 / mean
        whole = (
            (np.abs(keys - np.round(keys)) < 1e-2)
            & (keys > 3.5)
            & (history.table("activation", "min", modules) >= 0)
        )
    early = np.arange(history.captures) < max(3, history.captures // 10)
    late = np.arange(history.captures) >= history.captures // 2
    facts = outcome(history)
    chosen = []
    for i in np.flatnonzero(whole.mean(axis=0) > 0.9):
        at_end = np.mean(sharp[late, i] >= HARD_ATTENTION) > 0.5
        if at_end and (facts.bad or np.mean(sharp[early, i] >= HARD_ATTENTION) > 0.5):
            chosen.append(int(i))
    if not chosen or _pretrained(history):
        return None
    chosen.sort(key=lambda i: -nanmedian(sharp[late, i]))
    value = float(nanmedian(sharp[late, chosen[0]]))
    first = int(history.steps[np.flatnonzero(sharp[:, chosen[0]] >= HARD_ATTENTION)[0]])
    return history.finding(
        "attention_collapse",
        "critical" if facts.bad else "warning",
        f"Attention has collapsed in {modules[chosen[0]]}: it gives {value:.0%} to what it attends to from "
        f"step {first} on, and "
        f"{facts.words()}.",
        first=first,
        layers=[modules[i] for i in chosen],
        evidence={"mean_probability": value, "threshold": HARD_ATTENTION},
        advice="Check the scale of the query and key weights and of 1/sqrt(head size); use QK-norm, a "
        "lower learning rate.",
        confidence=0.8,
    )


def _pretrained(history: History) -> bool:
    trained = list(trained_modules(history).values())
    return history.info.get("reference") not in (None, "start") or bool(trained and np.mean(trained) >= 0.5)
