"""What people do to networks and optimizers, under watch: the log holds what the same loop measures alone.

Each feature is trained watched and not watched on one seed: the same weights, bit for bit. Where it changes
no mathematics, the numbers are those of a plain network in a plain loop too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.ao.quantization import get_default_qat_qconfig, get_default_qconfig, prepare, prepare_qat
from torch.ao.quantization.quantize import convert, quantize_dynamic
from torch.ao.quantization.stubs import DeQuantStub, QuantStub
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.jit._fuser import optimized_execution
from torch.nn.utils import parametrizations
from torch.nn.utils.spectral_norm import spectral_norm as old_spectral_norm
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint
from trainings import batch, failures, loss_of, norm

from layerwatch import Run, watch
from layerwatch.hooks.tensors import canonical

pytestmark = [
    # torch moves them to torchao, or to torch.compile; they are in many programs
    pytest.mark.filterwarnings("ignore:.*torch.ao.quantization is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*torch.jit.* is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:Please use quant_min and quant_max:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions:UserWarning"),
]

STEPS = 4
Norms = list[dict[str, float]]


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.three = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 3)
        self.dropout, self.act = nn.Dropout(0.2), nn.Tanh()

    def forward(self, x: Tensor) -> Tensor:
        return self.three(self.act(self.two(self.dropout(self.act(self.one(x))))))


def network() -> Network:
    torch.manual_seed(0)
    return Network()


@dataclass
class Training:
    """A network, and what surrounds it.

    Attributes:
        network: whose parameters are trained, and measured by this test.
        watched: what is given to `watch`; None: the network.
        optimizer: None: AdamW.
        finish: called when `watch` has returned: what is called from then on to compute.
        step: of the optimizer, made into what makes the steps.
        after: called after each step.
    """

    network: nn.Module
    watched: Any = None
    finish: Callable[[nn.Module], Any] = field(default=lambda network: network)
    step: Callable[[Callable[[], Any]], Callable[[], Any]] = field(default=lambda step: step)
    after: Callable[[nn.Module], object] = field(default=lambda network: None)


@dataclass
class Measured:
    """By the loop itself: norms by canonical name for each step."""

    weights: Norms = field(default_factory=list)
    gradients: Norms = field(default_factory=list)
    updates: Norms = field(default_factory=list)
    end: list[Tensor] = field(default_factory=list)


def train(training: Training, path: Path | None = None) -> Measured:
    net, measured = training.network, Measured()
    net.train()
    parameters = [p for p in net.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, 1e-2)
    watched = net if training.watched is None else training.watched
    with watch(watched, optimizer, run=path, every=1) if path else nullcontext() as watcher:
        call, step = training.finish(net), training.step(optimizer.step)
        for number in range(STEPS):
            torch.manual_seed(number)
            optimizer.zero_grad()
            loss_of(call(batch(number))).backward()
            named = {canonical(n): p for n, p in net.named_parameters()}
            before = {n: p.detach().clone() for n, p in named.items()}
            measured.gradients.append({n: norm(p.grad) for n, p in named.items() if p.grad is not None})
            step()
            training.after(net)
            measured.weights.append({n: norm(p) for n, p in named.items()})
            measured.updates.append({n: norm(p.double() - before[n]) for n, p in named.items()})
        if watcher is not None:
            assert failures(watcher) == ""
    measured.end = [t.detach().clone() for t in [*net.parameters(), *net.buffers()]]
    return measured


def assert_logged(run: Run, kind: str, expected: Norms, prefix: str = "", tolerance: float = 1e-6) -> None:
    stats = run.stats(kind)
    if prefix:
        stats = stats[stats["tensor"].str.startswith(prefix)]
    rows = zip(stats["step"], stats["tensor"].str.removeprefix(prefix), stats["norm"], strict=True)
    found = {(step, name): value for step, name, value in rows}
    truth = {(step, name): value for step, norms in enumerate(expected) for name, value in norms.items()}
    assert found.keys() == truth.keys(), kind
    for key, value in truth.items():
        assert found[key] == pytest.approx(value, rel=tolerance, abs=1e-9), (kind, key)


# Same mathematics -------------------------------------------------------------------------------------------


def compiled(target: Any) -> Any:
    return torch.compile(target, backend="aot_eager")


def compile_in_place(net: nn.Module) -> nn.Module:
    net.compile(backend="aot_eager")
    return net


def checkpointed(*, reentrant: bool) -> Callable[[nn.Module], Any]:
    def finish(net: nn.Module) -> Any:
        return lambda x: checkpoint(net, x.requires_grad_(), use_reentrant=reentrant)

    return finish


def compiled_before() -> Training:
    net = network()
    model = compiled(net)
    return Training(net, model, finish=lambda _: model)


def wrapped_checkpoints() -> Training:
    net = network()
    apply_activation_checkpointing(net, check_fn=lambda m: isinstance(m, nn.Linear))
    return Training(net)


def averaged(*, watched: bool) -> Training:
    net = network()
    copy = AveragedModel(net, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    return Training(net, [net, copy] if watched else None, after=copy.update_parameters)


def scripted() -> Training:
    """What its optimizer makes of a network depends on how often that was called before in the process."""

    def finish(net: nn.Module) -> Any:
        def call(x: Tensor) -> Tensor:
            with optimized_execution(False):
                return net(x)

        return call

    return Training(torch.jit.script(network()), finish=finish)


NEUTRAL: dict[str, Callable[[], Training]] = {
    "compiled before watch": compiled_before,
    "compiled after watch": lambda: Training(network(), finish=compiled),
    "compiled in place before watch": lambda: Training(compile_in_place(network())),
    "compiled in place after watch": lambda: Training(network(), finish=compile_in_place),
    "compiled optimizer": lambda: Training(network(), step=compiled),
    "compiled network and optimizer": lambda: Training(network(), finish=compiled, step=compiled),
    "checkpointing, reentrant": lambda: Training(network(), finish=checkpointed(reentrant=True)),
    "checkpointing": lambda: Training(network(), finish=checkpointed(reentrant=False)),
    "checkpoint wrapper": wrapped_checkpoints,
    "EMA copy": lambda: averaged(watched=False),
    "EMA copy watched too": lambda: averaged(watched=True),
    "TorchScript": scripted,
}


UNSEEN = {name for name in NEUTRAL if name.startswith("compiled")} - {"compiled optimizer"} | {"TorchScript"}


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    yield
    torch.compiler.reset()


def trained_twice(path: Path, build: Callable[[], Training]) -> tuple[Run, Measured]:
    """Watched and not: the same weights and buffers, bit for bit."""
    measured = train(build())
    torch.compiler.reset()
    watched = train(build(), path)
    assert len(watched.end) == len(measured.end) > 0
    for one, other in zip(watched.end, measured.end, strict=True):
        assert one.reshape(-1).view(torch.uint8).equal(other.reshape(-1).view(torch.uint8))
    return Run(path), measured


@pytest.mark.parametrize("feature", NEUTRAL)
def test_what_changes_no_mathematics(tmp_path: Path, feature: str) -> None:
    run, measured = trained_twice(tmp_path / "run", NEUTRAL[feature])
    plain = train(Training(network()))
    prefix = "Network." if feature == "EMA copy watched too" else ""
    for kind, truth, raw in (
        ("weight", measured.weights, plain.weights),
        ("gradient", measured.gradients, plain.gradients),
        ("update", measured.updates, plain.updates),
    ):
        assert_logged(run, kind, truth, prefix)
        rounding = 1e-3 if "compiled" in feature else 1e-6
        assert_logged(run, kind, raw, prefix, rounding)


@pytest.mark.parametrize("feature", NEUTRAL)
def test_activations_are_those_of_the_plain_network(tmp_path: Path, feature: str) -> None:
    """Or there are none, and the run says why."""
    train(NEUTRAL[feature](), tmp_path / "run")
    train(Training(network()), tmp_path / "plain")
    run, plain = Run(tmp_path / "run"), Run(tmp_path / "plain").stats("activation")
    found = run.stats("activation")
    assert (len(found) == 0) == (feature in UNSEEN)
    if feature in UNSEEN:
        assert any("compiled" in note and "cannot be seen" in note for note in run.info["notes"])
        return
    prefix = "Network." if feature == "EMA copy watched too" else ""
    assert (found["tensor"].str.removeprefix(prefix) == plain["tensor"]).all()
    rounding = 1e-4 if feature == "compiled optimizer" else 0.0
    assert found["norm"].tolist() == pytest.approx(plain["norm"].tolist(), rel=rounding)


# Other mathematics ------------------------------------------------------------------------------------------


def each_linear(change: Callable[[nn.Module], object]) -> Callable[[], Training]:
    def build() -> Training:
        net = network()
        for module in (net.one, net.two, net.three):
            change(module)
        return Training(net)

    return build


def fake_quantised() -> Training:
    net = network()
    net.qconfig = get_default_qat_qconfig("fbgemm")  # type: ignore[assignment]
    return Training(prepare_qat(net.train()))


def dynamically_quantised_body() -> Training:
    body = quantize_dynamic(network().eval(), {nn.Linear}, dtype=torch.qint8)
    torch.manual_seed(1)
    return Training(nn.Sequential(body, nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))


def quantised_body() -> Training:
    """Its modules pass quantised tensors to each other."""
    torch.manual_seed(0)
    body = nn.Sequential(QuantStub(), nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 3), DeQuantStub()).eval()
    body.qconfig = get_default_qconfig("fbgemm")  # type: ignore[assignment]
    prepare(body, inplace=True)
    body(batch(0))
    convert(body, inplace=True)
    return Training(nn.Sequential(body, nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 3)))


OTHER: dict[str, Callable[[], Training]] = {
    "weight_norm": each_linear(parametrizations.weight_norm),
    "spectral_norm": each_linear(parametrizations.spectral_norm),
    "spectral_norm of old": each_linear(old_spectral_norm),
    "orthogonal": each_linear(parametrizations.orthogonal),
    "quantisation-aware": fake_quantised,
    "dynamically quantised body": dynamically_quantised_body,
    "quantised body": quantised_body,
}


@pytest.mark.parametrize("feature", OTHER)
def test_what_changes_the_network(tmp_path: Path, feature: str) -> None:
    """spectral_norm improves its estimate whenever the weight is asked for: asking changes the training."""
    run, measured = trained_twice(tmp_path / "run", OTHER[feature])
    assert_logged(run, "weight", measured.weights)
    assert_logged(run, "gradient", measured.gradients)
    assert_logged(run, "update", measured.updates)
    assert set(run.stats("activation")["step"]) == set(range(STEPS))
