"""Parameters that take no part in the training although they could."""

from __future__ import annotations

import numpy as np

from ..findings import Finding
from .drift import trained_modules
from .history import MATRICES, History
from .outcome import outcome
from .registry import detector

#: So many captures, over so many steps, must agree before "never" is said.
LEAST_CAPTURES, LEAST_STEPS = 3, 50
#: Unused parameters below this share of all trainable ones are a remark (a pooler that a task does not need).
NEGLIGIBLE = 0.01


@detector("unused_parameters")
def unused_parameters(history: History) -> Finding | None:
    """Parameters that require a gradient but never receive one (torch-audit TA104).

    `grad` is None at every capture, or the gradient of a whole matrix is exactly zero at every capture. Told
    apart: parameters frozen on purpose; biases that a following softmax or normalisation makes irrelevant
    (only matrices count when the gradient is zero, with the biases of their module); LoRA's A, which starts
    at zero gradient and leaves it; branches used now and then (one gradient is enough). Less than 1 % of the
    trainable elements is a remark: pretrained models often carry a head that the task leaves aside.
    """
    names = history.names()
    if not names or _too_few(history):
        return None
    known = history.has_state(names)
    enough = known.sum(axis=0) >= LEAST_CAPTURES
    unused = history.has_state(names, "unused") | ~known
    none = enough & unused.all(axis=0)
    zero = enough & (history.has_state(names, "zero_gradient") | unused).all(axis=0) & ~none
    dead_modules = {
        history.of(n, "module")
        for n, z in zip(names, zero, strict=True)
        if z and history.role(n) in (*MATRICES, "embedding")
    }
    chosen = [
        n for n, unused, z in zip(names, none, zero, strict=True)
        if unused or (z and history.of(n, "module") in dead_modules)
    ]  # fmt: skip
    if not chosen:
        return None
    elements = history.tensors["elements"].astype(float)
    share = float(elements[chosen].sum() / max(elements[list(names)].sum(), 1.0))
    facts = outcome(history)
    severity = "critical" if facts.stalled else "warning" if share >= NEGLIGIBLE else "info"
    how = "have no gradient" if none.any() else "have a gradient of exactly zero"
    chosen.sort(key=lambda n: -elements[n])
    return history.finding(
        "unused_parameters",
        severity,
        f"{len(chosen)} trainable tensors ({share:.1%} of the trainable numbers), such as {chosen[0]}, "
        f"{how} at any of "
        f"{history.captures} captured steps.",
        first=history.steps[0],
        layers=chosen,
        evidence={"tensors": len(chosen), "share_of_trainable": share, "threshold": 0},
        advice="Connect them to the loss (look for .detach(), torch.no_grad() or a branch that forward() "
        "leaves out), or remove "
        "them or set requires_grad=False.",
        confidence=0.95 if none.any() else 0.8,
    )


@detector("frozen_parameters")
def frozen_parameters(history: History) -> Finding | None:
    """Parameters that receive a gradient and are never updated, although they are trainable.

    Either in no optimizer's param groups, or in one and left bit for bit unchanged at every capture
    (SageMaker Debugger's UnchangedTensor, on bits instead of a tolerance, which misfires at small learning
    rates). Told apart: requires_grad=False, a group whose learning rate is 0, a gradient of exactly zero or
    of rounding noise (a bias before a normalisation), half-precision weights whose updates rounding swallows
    (`low_precision_stall`), and a head trained alone on a pretrained body (a remark).
    """
    names = history.names()
    if not names or _too_few(history):
        return None
    alone = _alone(history, names)
    outside = alone & (np.nan_to_num(history.table("gradient", "norm", names) > 0).mean(axis=0) > 0.5)
    stuck = _stuck(history, names)
    chosen = [n for n, hit in zip(names, outside | stuck, strict=True) if hit]
    if not chosen:
        return None
    elements = history.tensors["elements"].astype(float)
    only_head = bool(outside.any()) and _head_on_pretrained_body(history, names, alone)
    facts = outcome(history)
    share = float(elements[chosen].sum() / elements[list(names)].sum())
    chosen.sort(key=lambda n: -elements[n])
    why = "are in no optimizer" if outside.any() else "are never changed by the optimizer"
    return history.finding(
        "frozen_parameters",
        "info" if only_head and not facts.bad else "critical" if facts.stalled else "warning",
        f"{len(chosen)} tensors ({share:.1%} of the trainable numbers), such as {chosen[0]}, receive "
        f"gradients but {why}.",
        first=history.steps[0],
        layers=chosen,
        evidence={"tensors": len(chosen), "share_of_trainable": share, "threshold": 0},
        advice="Pass model.parameters() to the optimizer after the model is complete; when they are meant "
        "to stay fixed, set "
        "requires_grad=False, which also saves time.",
        confidence=0.95,
    )


def _too_few(history: History) -> bool:
    few = history.captures < LEAST_CAPTURES
    return few or (history.captures < 5 and int(history.steps[-1] - history.steps[0]) < LEAST_STEPS)


def _alone(history: History, names: tuple[str, ...]) -> np.ndarray:
    """In no optimizer at any capture."""
    known = history.has_state(names)
    alone = history.has_state(names, "no_optimizer") | ~known
    return alone.all(axis=0) & (known.sum(axis=0) >= LEAST_CAPTURES)


def _stuck(history: History, names: tuple[str, ...]) -> np.ndarray:
    """In an optimizer, never moved by a bit at any capture, with a nonzero gradient and learning rate."""
    counts = history.table("update", "count", names)
    unmoved = history.table("update", "zeros", names) == counts
    reached = np.nan_to_num(history.table("gradient", "norm", names)) > 0
    reached &= history.has_state(names, "trainable") & ~history.skipped[:, None]
    full = ~history.tensors["dtype"].reindex(list(names)).isin(["float16", "bfloat16"]).to_numpy(bool)
    relevant = reached & ~np.isnan(counts)
    stuck = full & (relevant.sum(axis=0) >= LEAST_CAPTURES) & (unmoved | ~relevant).all(axis=0)
    modules = history.tensors["module"].reindex(list(names)).to_numpy(object)
    weights = np.array([history.role(n) != "bias" for n in names])
    return stuck & np.isin(modules, modules[stuck & weights])


def _head_on_pretrained_body(history: History, names: tuple[str, ...], alone: np.ndarray) -> bool:
    """Everything up to some layer is in no optimizer and comes from a training; everything behind it is
    optimized.
    """
    depth = history.tensors["depth"].reindex(list(names)).to_numpy()
    if alone.all() or alone.sum() <= (~alone).sum() or depth[alone].max() > depth[~alone].min():
        return False
    body = {history.of(n, "module") for n, out in zip(names, alone, strict=True) if out}
    judged = [trained for module, trained in trained_modules(history).items() if module in body]
    return bool(judged) and float(np.mean(judged)) >= 0.5
