"""The precision report: what fewer bits would do to each tensor of a weight file or of a run."""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from .formats import SCHEMES, Scheme
from .precision_advice import LEAST_SNR, advise, bits_of
from .precision_exact import left_out, measure
from .precision_facts import TensorPrecision, decibels, number
from .source import STORAGE, Weights

if TYPE_CHECKING:
    import pandas as pd

GROUPS = ("layer", "block", "role")
#: Tensors that are rounded at the same time; each takes a few blocks of memory.
THREADS = 4


@dataclass
class PrecisionReport:
    """What each number format would do to the tensors of a network, and which is advised.

    Attributes:
        source: the path, or what else it was given. kind: "file", every element was rounded; or "run",
            counts come from histograms and errors are estimates.
        step: of the weights of a run, "initial" of those before the first; None of files.
        tensors: in stored order. left_out: name -> why it was not judged.
        least_snr: dB that an advised format leaves. notes: what to know when reading it.
    """

    source: str
    kind: str
    tensors: list[TensorPrecision]
    left_out: dict[str, str] = field(default_factory=dict)
    step: int | str | None = None
    least_snr: float = LEAST_SNR
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        for tensor in self.tensors:
            tensor.recommendation = tensor.recommendation or advise(tensor, self.least_snr)

    def recommended(self) -> dict[str, str]:
        """Tensor -> the advised format, such as "int8 per channel"; without what is to stay as it is."""
        advised = ((t.name, t.recommendation) for t in self.tensors)
        return {name: r.label for name, r in advised if r and r.scheme}

    def frame(self) -> pd.DataFrame:
        """One row for each tensor and format: tensor, role, block, count, kurtosis, format, bits, zeroed,
        subnormal, overflow, snr_db, channel_snr_db, max_error, counts, errors, recommended."""
        import pandas as pd

        rows = []
        for tensor in self.tensors:
            advised = tensor.recommendation and tensor.recommendation.scheme
            for scheme, rounding in tensor.roundings.items():
                found = rounding.to_dict()
                rows.append(
                    {"tensor": tensor.name, "role": tensor.role, "block": tensor.block}
                    | {"count": tensor.count, "kurtosis": tensor.kurtosis, "format": scheme.label}
                    | {k: found[k] for k in ("bits", "zeroed", "subnormal", "overflow")}
                    | {"snr_db": rounding.snr_db, "channel_snr_db": rounding.channel_snr_db}
                    | {k: found[k] for k in ("max_error", "counts", "errors")}
                    | {"recommended": scheme == advised}
                )
        return pd.DataFrame(rows)

    def bytes(self, tensors: Iterable[TensorPrecision] | None = None) -> tuple[int, int]:
        """Bytes as stored and as advised, without scales."""
        stored = advised = 0
        for tensor in self.tensors if tensors is None else tensors:
            size = STORAGE[tensor.dtype].itemsize if tensor.dtype in STORAGE else 4
            scheme = tensor.recommendation.scheme if tensor.recommendation else None
            stored += 8 * size * tensor.count
            advised += bits_of(tensor, scheme, size)
        return stored // 8, advised // 8

    def groups(self, by: str) -> list[dict[str, Any]]:
        """Tensors of one block, or of one role, together: errors and counts add up.

        Raises:
            ValueError: `by` is neither "block" nor "role".
        """
        if by not in GROUPS[1:]:
            raise ValueError(f"expected to group by block or role, got {by!r}")
        members: dict[str, list[TensorPrecision]] = {}
        for tensor in self.tensors:
            members.setdefault(getattr(tensor, by), []).append(tensor)
        return [self._group(name, tensors) for name, tensors in members.items()]

    def _group(self, name: str, tensors: list[TensorPrecision]) -> dict[str, Any]:
        formats = []
        for scheme in SCHEMES:
            found = [t.roundings[scheme] for t in tensors if scheme in t.roundings]
            if not found:
                continue
            formats.append(
                {
                    "label": scheme.label,
                    "tensors": len(found),
                    "zeroed": sum(r.zeroed for r in found),
                    "overflow": sum(r.overflow for r in found),
                    "snr_db": number(decibels(sum(r.signal for r in found), sum(r.error for r in found))),
                }
            )
        advised = Counter(t.recommendation.label for t in tensors if t.recommendation)
        stored, after = self.bytes(tensors)
        return {
            "name": name, "tensors": len(tensors), "count": sum(t.count for t in tensors),
            "formats": formats, "recommended": dict(advised.most_common()), "bytes": stored,
            "bytes_recommended": after,
        }  # fmt: skip

    def to_dict(self, by: str = "layer") -> dict[str, Any]:
        """What `layerwatch precision --format json` prints: no NaN, no infinity."""
        stored, after = self.bytes()
        document: dict[str, Any] = {
            "version": 1, "source": self.source, "kind": self.kind, "step": self.step,
            "least_snr_db": self.least_snr, "tensors": [t.to_dict() for t in self.tensors],
            "left_out": self.left_out, "bytes": stored, "bytes_recommended": after, "notes": self.notes,
        }  # fmt: skip
        return document if by == "layer" else document | {"by": by, "groups": self.groups(by)}


def weights_report(weights: Weights, *, least_snr: float = LEAST_SNR) -> PrecisionReport:
    """Every tensor of weights in every format, each element rounded.

    What cannot be judged is in `left_out`, with the reason; a file that ends early gives what it still holds.

    Raises:
        ValueError: `least_snr` is no number of decibels above 0.
    """
    check_snr(least_snr)
    found, skipped = [], dict(weights.problems)
    pool = ThreadPoolExecutor(min(THREADS, os.cpu_count() or 1))
    try:
        for name, result in zip(
            weights.entries, pool.map(partial(_judged, weights), weights.entries), strict=True
        ):
            if isinstance(result, str):
                skipped[name] = result
            else:
                found.append(result)
    finally:
        pool.shutdown(cancel_futures=True)  # when interrupted, do not go on to the end
    return PrecisionReport(weights.label, "file", found, skipped, least_snr=least_snr)


def _judged(weights: Weights, name: str) -> TensorPrecision | str:
    """A tensor, or why it is left out."""
    if why := left_out(weights.entries[name]):
        return why
    try:
        return measure(weights, name)
    except ValueError as error:  # the file has become shorter or unreadable
        return str(error)


def check_snr(least_snr: float) -> None:
    if not 0 < least_snr < math.inf:
        raise ValueError(f"expected least_snr in decibels above 0, such as {LEAST_SNR:g}, got {least_snr}")


def snr_of(tensor: TensorPrecision, label: str) -> float | None:
    """dB of one format by its label; None where it does not apply."""
    return next((r.snr_db for s, r in tensor.roundings.items() if s.label == label), None)


__all__ = ["GROUPS", "PrecisionReport", "Scheme", "check_snr", "snr_of", "weights_report"]
