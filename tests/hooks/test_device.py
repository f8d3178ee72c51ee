"""Summaries by asynchronous operations on the tensors' device: the same numbers, and nobody waits."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from layerwatch.hooks.device import CHUNK, DeviceBatch
from layerwatch.monitor.summary import Summary, summarise

INTEGERS = (torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool)
HALVES = (torch.bfloat16, torch.float16)
FLOATS = (torch.float32, torch.float64, *HALVES)
EIGHTS = (torch.float8_e4m3fn, torch.float8_e5m2)
SIZES = (0, 1, 2, 3, 63, 64, 65, 2047, 2048, 2049)
SPECIAL = [
    0.0,
    -0.0,
    1.0,
    -1.0,
    1.25,
    2.0**-126,
    -(2.0**-127),
    1e-45,
    3e38,
    1e-300,
    1e200,
    math.nan,
    math.inf,
    -math.inf,
]


def numbers(seed: int, size: int, dtype: torch.dtype) -> Tensor:
    """Random bits, ordinary values and special ones; sometimes only one kind."""
    generator = np.random.default_rng(seed)
    bits = torch.from_numpy(generator.integers(-(2**63), 2**63, size=size, dtype=np.int64))
    if dtype in INTEGERS:
        return bits.to(dtype)
    ordinary = torch.from_numpy(generator.normal(size=size) * 10.0 ** generator.integers(-6, 6))
    special = torch.from_numpy(generator.choice(SPECIAL, size))
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    made = [bits.to(integer).view(dtype), ordinary.to(dtype), special.to(dtype)]
    kind = torch.from_numpy(generator.choice(3, size, p=[(0.2, 0.6, 0.2), (0, 1, 0), (0, 0, 1)][seed % 3]))
    stacked = torch.stack([m.to(torch.float64) for m in made])
    chosen = stacked.gather(0, kind.unsqueeze(0))[0].to(dtype) if size else made[1]
    return made[0] if dtype in EIGHTS else chosen


def batched(add: Callable[[DeviceBatch], Any], **how: int) -> list[Summary]:
    batch = DeviceBatch(**how)
    add(batch)
    batch.send()
    assert batch.ready()
    batch.wait()
    return batch.results()


def array(tensor: Tensor) -> NDArray[np.float64]:
    """By value, in double: the truth's input."""
    dense = tensor.detach().to_dense() if tensor.layout is not torch.strided else tensor.detach()
    return (dense.abs() if dense.is_complex() else dense).to(torch.float64).numpy().ravel()


COUNTS = ("count", "min", "max", "zeros", "subnormals", "nans", "pos_infs", "neg_infs")


def assert_same(found: Summary, truth: Summary, values: NDArray) -> None:
    """Counts and range exactly, sums to the rounding of a double."""
    for name in COUNTS:
        assert getattr(found, name) == getattr(truth, name), name
        assert type(getattr(found, name)) is type(getattr(Summary(), name)), name
    assert found.buckets.tolist() == truth.buckets.tolist()
    assert found.counts.tolist() == truth.counts.tolist()
    assert (found.buckets.dtype, found.counts.dtype) == (np.int16, np.int64)
    finite = values[np.isfinite(values)]
    with np.errstate(over="ignore"):
        size, squares = np.abs(finite).sum(), np.square(finite).sum()
    assert found.sum == pytest.approx(truth.sum, rel=0, abs=1e-13 * size, nan_ok=True)
    assert found.sum_sq == pytest.approx(squares, rel=1e-13)


@pytest.mark.parametrize("dtype", [*FLOATS, *INTEGERS, *EIGHTS], ids=str)
@given(seed=st.integers(0, 2**31), size=st.sampled_from(SIZES), chunk=st.sampled_from([64, CHUNK]))
def test_a_summary_is_the_plain_one(dtype: torch.dtype, seed: int, size: int, chunk: int) -> None:
    x = numbers(seed, size, dtype)
    (found,) = batched(lambda b: b.summary(x), chunk=chunk)
    with np.errstate(over="ignore"):
        assert_same(found, summarise(array(x)), array(x))
    assert (found.units, found.dot, found.lost) == (None, None, None)


def test_every_pattern_of_bits_of_half_precision() -> None:
    """All 65,536 of each, several tensors at once, more than fit one stack."""
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    tensors = [patterns.view(dtype) for dtype in HALVES for _ in range(3)]
    for x, found in zip(tensors, batched(lambda b: b.summaries(tensors), chunk=1 << 17), strict=True):
        assert_same(found, summarise(array(x)), array(x))


def test_nans_that_look_like_infinity() -> None:
    """Signalling NaN have the first bits of an infinity."""
    patterns = [0x7F800001, 0x7F9FFFFF, 0x7F800000, 0x7FC00000, 0x7FFFFFFF]
    single = torch.tensor(patterns + [p - 2**31 for p in patterns], dtype=torch.int64).to(torch.int32)
    found, wide = batched(
        lambda b: b.summaries([single.view(torch.float32), single.view(torch.float32).double()])
    )
    assert (found.nans, found.pos_infs, found.neg_infs, found.finite) == (8, 1, 1, 0)
    assert (wide.nans, wide.pos_infs, wide.neg_infs, wide.finite) == (8, 1, 1, 0)


def _sparse(*, coalesced: bool) -> Tensor:
    where = torch.tensor([[1, 4, 1]])
    made = torch.sparse_coo_tensor(
        where, torch.tensor([[1.0, 2], [3, -4], [5, 0]]), (6, 2), check_invariants=True
    )
    return made.coalesce() if coalesced else made


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "channels last": lambda: torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
    "transposed": lambda: torch.randn(5, 7).t(),
    "strided": lambda: torch.randn(20, 3)[::3],
    "expanded": lambda: torch.randn(1, 3).expand(4, 3),
    "scalar": lambda: torch.tensor(-2.5),
    "one": lambda: torch.ones(1, 1),
    "empty": lambda: torch.empty(0, 4),
    "empty rows": lambda: torch.empty(4, 0),
    "sparse, coalesced": lambda: _sparse(coalesced=True),
    "sparse, with duplicates": lambda: _sparse(coalesced=False),
    "sparse, without entries": lambda: torch.zeros(3, 2).to_sparse(),
    "complex": lambda: torch.tensor([3 + 4j, -5 + 12j, 0, complex(math.nan, 1), complex(math.inf, math.nan)]),
    "complex, conjugated": lambda: torch.tensor([3 + 4j, -5 + 12j], dtype=torch.complex128).conj(),
    "requires grad": lambda: nn.Parameter(torch.randn(3, 3)),
    "negated view": lambda: torch.tensor([1 + 2j, 3 - 4j]).conj().imag,
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout(layout: str) -> None:
    x = LAYOUTS[layout]()
    for found in batched(lambda b: b.summaries([x, x], [False, True])):
        assert_same(found, summarise(array(x)), array(x))


@pytest.mark.parametrize(
    "layout", ["strided", "transposed", "channels last", "complex matrix", "rows with nan"]
)
@pytest.mark.parametrize("chunk", [8, CHUNK])
def test_the_active_rows(layout: str, chunk: int) -> None:
    made = {
        **LAYOUTS,
        "complex matrix": lambda: torch.randn(9, 3, dtype=torch.cfloat),
        "rows with nan": lambda: torch.full((4, 3), math.nan),
    }
    x = made[layout]().clone(memory_format=torch.preserve_format)
    x[1] = 0.0
    tensors = [x, -x, x.bfloat16() if not x.is_complex() else x]
    truth = (array(x).reshape(len(x), -1) != 0).any(axis=1)
    for found in batched(lambda b: b.summaries(tensors, [True] * 3), chunk=chunk):
        assert found.units == len(x)
        assert found.active == np.packbits(truth).tobytes()
        assert found.count == x.numel()


# Pairs ------------------------------------------------------------------------------------------------------


def total(values: NDArray) -> float:
    """The sum, as exact as it can be; not a number where one of them is none."""
    values = values.ravel()
    return math.fsum(values) if np.isfinite(values).all() else float(values.sum())


def approximately(truth: float, size: NDArray) -> Any:
    return pytest.approx(
        truth, rel=1e-12, abs=1e-12 * float(np.abs(size[np.isfinite(size)]).sum()), nan_ok=True
    )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(seed=st.integers(0, 2**31), size=st.sampled_from(SIZES), chunk=st.sampled_from([64, CHUNK]))
def test_an_update_is_the_true_difference(dtype: torch.dtype, seed: int, size: int, chunk: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    before = numbers(seed, size, dtype)
    gradient = torch.randn(size, generator=generator).to(dtype).where(torch.arange(size) % 3 > 0, 0.0)
    after = torch.where(torch.rand(size, generator=generator) < 0.7, before - 1e-3 * gradient, before)
    without, found = batched(
        lambda b: b.updates([(before, after, None), (before, after, gradient)]), chunk=chunk
    )
    with np.errstate(all="ignore"):
        wide = np.float64 if dtype is torch.float64 else np.float32
        a, b, g = (array(t).astype(wide) for t in (after, before, gradient))
        change = a - b
        b64, c64 = b.astype(np.float64), change.astype(np.float64)
        for summary in (found, without):
            assert_same(summary, summarise(change), c64)
            assert summary.ref_sum_sq == approximately(total(b64 * b64), b64 * b64)
            assert summary.dot == approximately(total(b64 * c64), b64 * c64)
    assert without.lost is None
    assert found.lost == (int(((a == b) & (g != 0)).sum()) if size else None)


def test_an_update_of_complex_weights_counts_by_modulus() -> None:
    before = torch.tensor([1 + 1j, 2 - 2j, 0])
    after = before + torch.tensor([3 + 4j, 0, -6 + 8j])
    (found,) = batched(lambda b: b.update(before, after, torch.ones(3, dtype=torch.cfloat)), chunk=4)
    assert_same(found, summarise(np.array([5.0, 0.0, 10.0])), np.array([5.0, 0.0, 10.0]))
    assert (found.ref_sum_sq, found.dot, found.lost) == (pytest.approx(10.0), 7.0, None)


@pytest.mark.parametrize(
    "gradient", [_sparse(coalesced=True), torch.ones(3), torch.ones(6, 2, dtype=torch.cfloat)]
)
def test_gradients_that_tell_nothing_of_lost_updates(gradient: Tensor) -> None:
    weight = torch.randn(6, 2)
    (found,) = batched(lambda b: b.update(weight.clone(), weight, gradient))
    assert found.lost is None


@pytest.mark.parametrize("dtype", [*FLOATS, torch.cfloat], ids=str)
@pytest.mark.parametrize("how", ["exact", "bits"])
@given(seed=st.integers(0, 2**31), size=st.sampled_from(SIZES), chunk=st.sampled_from([64, CHUNK]))
def test_drift_is_the_true_distance(dtype: torch.dtype, how: str, seed: int, size: int, chunk: int) -> None:
    if dtype.is_complex:
        weight = torch.view_as_complex(numbers(seed, 2 * size, torch.float32).view(-1, 2))
        plain = torch.view_as_real(weight).reshape(-1)
    else:
        weight = plain = numbers(seed, size, dtype)
    kept = plain.roll(1).to(torch.bfloat16 if how == "bits" else plain.dtype)
    pair = (weight, None, kept.view(torch.int16)) if how == "bits" else (weight, kept, None)
    (found,) = batched(lambda b: b.drift(*pair), chunk=chunk)
    with np.errstate(all="ignore"):
        w, r = array(plain), array(kept)
        assert found.sum_sq == approximately(total((w - r) ** 2), (w - r) ** 2)
        assert found.dot == approximately(total(w * r), w * r)
        assert found.ref_sum_sq == approximately(total(r * r), r * r)
        assert found.sign_flips == int((w * r < 0).sum())
    assert found.count == weight.numel()


# Many, large, and in order ----------------------------------------------------------------------------------


def test_many_tensors_come_back_by_their_tickets() -> None:
    """Of one size and of several, mixed with other kinds; as one by one."""
    tensors = [torch.randn(n, 3) * 10.0**i for i, n in enumerate((4, 5, 4, 1, 4, 5) * 4)]
    batch = DeviceBatch(chunk=30)
    first = batch.summaries(tensors, [True] * len(tensors))
    drifts = batch.drifts([(t, t + 1, None) for t in tensors])
    updates = batch.updates([(t, t + 0.5, t) for t in tensors])
    alone = batch.summary(tensors[0])
    batch.send()
    last = batch.summary(tensors[1])
    batch.send()
    results = batch.results()
    assert sorted([*first, *drifts, *updates, alone, last]) == list(range(len(results)))
    for ticket, drift, update, x in zip(first, drifts, updates, tensors, strict=True):
        assert_same(results[ticket], summarise(array(x)), array(x))
        assert results[drift].sum_sq == pytest.approx(float((x - (x + 1)).double().square().sum()))
        assert results[update].count == results[ticket].count == x.numel()
        assert results[ticket].units == len(x)
    assert_same(results[alone], summarise(array(tensors[0])), array(tensors[0]))
    assert_same(results[last], summarise(array(tensors[1])), array(tensors[1]))


def test_more_equal_elements_than_float32_can_count() -> None:
    size = 2**24 + 11
    (found,) = batched(lambda b: b.summary(torch.full((size,), 1.5, dtype=torch.bfloat16)))
    assert (found.count, found.counts.tolist(), found.zeros) == (size, [size], 0)
    assert found.sum == 1.5 * size
    (found,) = batched(lambda b: b.summary(torch.zeros((1,)).expand(size)))
    assert (found.zeros, found.counts.size) == (size, 0)


def test_what_happens_after_adding_is_not_seen() -> None:
    """Gradients are clipped and cleared, weights stepped, before anything is sent."""
    weight, gradient = torch.ones(4, 4), torch.full((4, 4), 2.0)
    before = weight.clone()
    batch = DeviceBatch()
    batch.summaries([gradient, weight])
    weight.mul_(3)
    batch.update(before, weight, gradient)
    for tensor in (gradient, before, weight):
        tensor.fill_(math.nan)
    batch.send()
    assert [s.sum for s in batch.results()] == [32.0, 16.0, 32.0]


def test_tensors_are_left_as_they_are() -> None:
    """Also those that need no widening and no copy."""
    tensors = [torch.tensor([1.0, math.nan, math.inf, -0.0], dtype=d) for d in FLOATS]
    kept = [t.clone() for t in tensors]
    batched(
        lambda b: (
            b.summaries(tensors),
            b.updates([(t, t, t) for t in tensors]),
            b.drifts([(t, t, None) for t in tensors]),
        )
    )
    for now, then in zip(tensors, kept, strict=True):
        assert now.view(torch.uint8).equal(then.view(torch.uint8))


def test_deterministic_algorithms_are_no_obstacle() -> None:
    """torch.histc refuses on a GPU when they are demanded."""
    x = numbers(3, 999, torch.float32)
    torch.use_deterministic_algorithms(True)
    try:
        found = batched(lambda b: b.summaries([x, x, x.double()]), chunk=500)
    finally:
        torch.use_deterministic_algorithms(False)
    for summary in found[:2]:
        assert_same(summary, summarise(array(x)), array(x))


def test_without_a_reference_there_is_no_drift() -> None:
    with pytest.raises(ValueError, match="expected a reference"):
        DeviceBatch().drift(torch.ones(1), None)


# Nobody waits -----------------------------------------------------------------------------------------------

#: Operations after which the host needs a number of the device: values, or sizes that depend on values.
WAITING = {
    "_local_scalar_dense", "item", "is_nonzero", "equal", "nonzero", "nonzero_static", "masked_select",
    "bincount", "_unique", "_unique2", "unique_dim", "unique_consecutive", "repeat_interleave", "_coalesce",
    "coalesce", "allclose", "_assert_async", "argwhere", "index", "index_put", "index_put_",
}  # fmt: skip
#: Operations that start nothing on the device.
FREE = {
    "detach", "view", "alias", "slice", "unsqueeze", "device", "empty", "view_as_real", "view_as_complex",
    "_unsafe_view", "t", "transpose", "permute", "split",
}  # fmt: skip


class Onlooker(TorchDispatchMode):
    """Fails on what would make the host wait; counts what the device is told and the bytes that live."""

    def __init__(self) -> None:
        super().__init__()
        self.told: Counter[str] = Counter()
        self.on_host: Counter[str] = Counter()
        self.copies: list[bool] = []
        self.live = self.peak = 0
        self._storages: Counter[int] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.__name__.split(".")[0]
        assert name not in WAITING, name
        out = func(*args, **(kwargs or {}))
        if name not in FREE:
            self.told[name] += 1
            if isinstance(out, Tensor) and out.device.type == "cuda":
                self._follow(out)
            elif isinstance(out, Tensor):
                self.on_host[name] += 1
        tensors = [t for t in [*args, out] if isinstance(t, Tensor)]
        if name in ("copy_", "_to_copy") and len({t.device.type for t in tensors}) > 1:
            self.copies.append(bool((kwargs or {}).get("non_blocking") or (len(args) > 2 and args[2])))
        return out

    def _follow(self, out: Tensor) -> None:
        key, size = out.untyped_storage()._cdata, out.untyped_storage().nbytes()
        if not self._storages[key]:
            self.live += size
            self.peak = max(self.peak, self.live)
        self._storages[key] += 1
        weakref.finalize(out, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._storages[key] -= 1
        if not self._storages[key]:
            self.live -= size


class Event:
    arrived = False

    def query(self) -> bool:
        return self.arrived

    def synchronize(self) -> None:
        self.arrived = True


class Stream:
    def record_event(self) -> Event:
        return Event()


@pytest.fixture
def _no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors without data, which say that they are on a GPU: asking one for a number is an error."""
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream())


def on_gpu(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def capture(tensors: Sequence[Tensor], batch: DeviceBatch) -> None:
    """Gradients, weights, updates and drift: everything that a captured step asks for."""
    batch.summaries(tensors, [t.ndim > 1 for t in tensors])
    batch.summaries(tensors)
    batch.updates([(t, t, t) for t in tensors])
    batch.drifts([(t, t, None) for t in tensors])
    batch.send()


@pytest.mark.usefixtures("_no_gpu")
def test_no_number_is_asked_for_and_one_copy_is_made() -> None:
    with FakeTensorMode():
        plain = [
            on_gpu(8, 3, dtype=dtype) for dtype in (*FLOATS, torch.cfloat, torch.cdouble) for _ in range(3)
        ]
        other = [on_gpu(5, dtype=dtype) for dtype in (*INTEGERS, *EIGHTS)]
        odd = [
            on_gpu(2, 3, 4, 5).to(memory_format=torch.channels_last),
            on_gpu(),
            on_gpu(0, 3),
            on_gpu(9, 9).t(),
        ]
        with Onlooker() as seen:
            batch = DeviceBatch(chunk=16)
            batch.summaries([*other, *odd])
            batch.drift(plain[0], None, on_gpu(8, 3, dtype=torch.int16))
            capture(plain, batch)
            assert not batch.ready()
            batch.wait()
            assert batch.ready()
    assert seen.copies == [True]  # one, and the host does not wait for it
    assert seen.on_host == {"copy_": 1}  # nothing else comes from there, or goes there


@pytest.mark.usefixtures("_no_gpu")
def test_one_tensor_takes_few_operations_and_equal_ones_share_them() -> None:
    """A capture of one tensor is 64 operations; of 400 in two shapes no more than of the two."""

    def told(tensors: Callable[[], list[Tensor]]) -> int:
        with FakeTensorMode(), Onlooker() as seen:
            capture(tensors(), DeviceBatch())
        return seen.told.total()

    assert told(lambda: [on_gpu(64, 64)]) <= 64
    few = told(lambda: [on_gpu(*shape) for shape in ((64, 64), (64,)) for _ in range(2)])
    many = told(lambda: [on_gpu(*shape) for shape in ((64, 64), (64,)) for _ in range(200)])
    assert many == few <= 160


@pytest.mark.usefixtures("_no_gpu")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_memory_taken_is_bounded(dtype: torch.dtype) -> None:
    """However large the tensors are: 64 MiB, and the results."""
    with FakeTensorMode():
        tensors = [on_gpu(4 * CHUNK + 1, dtype=dtype)] + [on_gpu(4096, dtype=dtype) for _ in range(300)]
        with Onlooker() as seen:
            capture(tensors, DeviceBatch())
    results = 8192 * 3 * (5 + 512)  # a histogram for each chunk or tensor, of a power of two
    assert 40 * 2**20 <= seen.peak <= 64 * 2**20 + 2 * results


def test_the_onlooker_sees_what_it_should() -> None:
    """Else the tests above would prove nothing."""
    x = torch.ones(3)
    for wait in (
        lambda: x.sum().item(),
        lambda: x[x > 0],
        lambda: x.nonzero(),
        lambda: torch.bincount(x.long()),
        lambda: bool(x.any()),
    ):
        with pytest.raises(AssertionError), Onlooker():
            wait()
