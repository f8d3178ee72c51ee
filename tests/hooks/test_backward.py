"""Backward passes are seen once each, and torch is left as it was."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint
from trainings import batch, failures, loss_of, mlp, weights_of

from layerwatch import watch
from layerwatch.hooks import backward


class Ear:
    """Hears, and remembers."""

    def __init__(self) -> None:
        self.roots: list[Tensor | None] = []
        self.ends = 0
        self.backward_ended = self._ended

    def backward_begins(self, root: Tensor | None) -> None:
        self.roots.append(root)

    def _ended(self) -> None:
        self.ends += 1


@pytest.fixture
def ear() -> Iterator[Ear]:
    original = torch.autograd.backward
    listener = Ear()
    backward.listen(listener)
    yield listener
    backward.unlisten(listener)
    assert torch.autograd.backward is original


def test_each_pass_is_heard_with_the_tensor_it_starts_from(ear: Ear) -> None:
    model = mlp()
    one, two, three = (loss_of(model(batch(s))) for s in range(3))
    one.backward()
    torch.autograd.backward(two)
    torch.autograd.backward(tensors=[three])
    a, b = (loss_of(model(batch(s))) for s in range(2))
    torch.autograd.backward([a, b])
    model(batch(0)).backward(torch.ones(32, 3))
    assert [r is x for r, x in zip(ear.roots[:4], (one, two, three, None), strict=True)] == [True] * 4
    assert ear.roots[4] is not None
    assert ear.ends == 5
    torch.autograd.grad(loss_of(model(batch(0))), list(model.parameters()))
    assert ear.ends == 5  # it fills no .grad


def test_a_pass_within_a_pass_is_part_of_it(ear: Ear) -> None:
    model = mlp()
    x = batch(0).requires_grad_()
    loss_of(checkpoint(model, x, use_reentrant=True)).backward()
    assert (len(ear.roots), ear.ends) == (1, 1)


def test_a_pass_that_raises_has_no_end_and_raises_as_ever(ear: Ear) -> None:
    loss = loss_of(mlp()(batch(0)))
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
    assert (len(ear.roots), ear.ends) == (2, 1)


def test_several_listeners_come_and_go() -> None:
    original = torch.autograd.backward
    first, second = Ear(), Ear()
    for listener in (first, second):
        backward.listen(listener)
    assert inspect.signature(torch.autograd.backward) == inspect.signature(original)
    backward.unlisten(first)
    loss_of(mlp()(batch(0))).backward()
    assert (first.ends, second.ends) == (0, 1)
    backward.unlisten(first)
    backward.unlisten(second)
    assert torch.autograd.backward is original


def compiled_steps(path: Path | None, *, whole: bool) -> tuple[dict[str, Tensor], int]:
    """A training whose model, or whose whole step, is compiled: weights and graph breaks."""
    torch._dynamo.reset()
    counters.clear()
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watcher = watch(model, optimizer, run=path, every=2) if path else None
    forward = model if whole else torch.compile(model, backend="eager")

    def step(x: Tensor) -> None:
        loss_of(forward(x)).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimizer.step()
        optimizer.zero_grad()

    run = torch.compile(step, backend="eager") if whole else step
    for i in range(5):
        run(batch(i))
    if watcher is not None:
        assert failures(watcher) == ""
        assert watcher.step == 4
        watcher.close()
    return weights_of(model), sum(counters["graph_break"].values())


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("whole", [False, True])
def test_compiled(tmp_path: Path, whole: bool) -> None:
    """A compiled model gets no graph break. A whole compiled step has some of its own, and still runs."""
    plain, breaks = compiled_steps(None, whole=whole)
    watched, more = compiled_steps(tmp_path / "run", whole=whole)
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    if not whole:
        assert (breaks, more) == (0, 0)
