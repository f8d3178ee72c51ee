"""Which number format for which tensor, and why."""

from __future__ import annotations

from .formats import Scheme, scheme_of
from .precision_facts import Recommendation, Rounding, TensorPrecision

#: Signal to noise, in decibels, that a format must leave: below it the error passes a tenth of the weights'
#: own size. The same limit as that of the problem quantisation_risk.
LEAST_SNR = 20.0
#: Tried in this order: fewest bits first, integers before floats, as more hardware and libraries have them. A
#: scale for each output channel costs 32 bits in hundreds of weights, so one for the whole tensor saves
#: nothing worth its noise. e5m2 is meant for gradients (Micikevicius et al. 2022).
LADDER = tuple(
    scheme_of(label)
    for label in ("int4 per channel", "int4 per group", "int8 per channel", "fp8_e4m3 per channel")
)
ONE_SCALE = scheme_of("int8 per tensor")
_HALVES = (scheme_of("fp16"), scheme_of("bf16"))
#: Roles that stay in 16 bits: few numbers, or what libraries leave out.
_KEPT = {
    "bias": "a vector: 8 bits would save next to nothing",
    "norm_gain": "a vector: 8 bits would save next to nothing",
    "norm_bias": "a vector: 8 bits would save next to nothing",
    "scalar": "a single number",
    "output": "the output layer: its error goes into the logits unfiltered",
}
_LIBRARIES = "llm.int8 (Dettmers et al. 2022) and GPTQ (Frantar et al. 2023) leave these in 16 bits"


def advise(tensor: TensorPrecision, least_snr: float = LEAST_SNR) -> Recommendation:
    """The first format of the ladder that leaves `least_snr` dB, overall and in 99 of 100 channels (from a
    run, which does not know them: overall)."""
    if tensor.nans or tensor.infs:
        bad = tensor.nans + tensor.infs
        return Recommendation(None, f"{bad:,} elements are NaN or infinite: find out why first", "ours")
    if not tensor.largest:
        return Recommendation(None, "all elements are zero: every format holds it", "ours")
    why = _KEPT.get(tensor.role, "" if len(tensor.shape) >= 2 else _KEPT["bias"])
    if why:
        return _half(tensor, least_snr, why, _LIBRARIES)
    source = f"{least_snr:g} dB: an error of {10 ** (-least_snr / 20):.2g} of the weights' size (ours)"
    refused = ""
    for scheme in LADDER:
        rounding = tensor.roundings[scheme]
        if passes(rounding, least_snr):
            return Recommendation(scheme, _leaves(rounding) + refused + _one_scale(tensor, least_snr), source)
        refused = f"; {scheme.label} {_short(rounding)}"
    return _half(tensor, least_snr, f"no 8 bits leave {least_snr:g} dB{refused}", source)


def _half(tensor: TensorPrecision, least_snr: float, why: str, source: str) -> Recommendation:
    """float16 or bfloat16, whichever leaves more; as stored where neither does."""
    halves = [tensor.roundings[s] for s in _HALVES if passes(tensor.roundings[s], least_snr)]
    if not halves:
        return Recommendation(None, f"{why}; in 16 bits values overflow or vanish", source)
    best = max(halves, key=lambda r: r.snr_db)
    if tensor.dtype in ("float16", "bfloat16") and best.lossless:
        return Recommendation(best.scheme, f"{why}; stored so", source)
    return Recommendation(best.scheme, f"{why}; {_leaves(best)}", source)


def passes(rounding: Rounding, least_snr: float) -> bool:
    """Nothing overflows, and so many dB are left."""
    lowest = min(rounding.snr_db, rounding.snr_db if (c := rounding.channel_snr_db) is None else c)
    return rounding.overflow == 0 and lowest >= least_snr


def _leaves(rounding: Rounding) -> str:
    if rounding.lossless:
        return "changes nothing"
    about = "" if rounding.exact_errors else "about "
    return f"leaves {about}{_short(rounding)}"


def _short(rounding: Rounding) -> str:
    whole = f"{rounding.snr_db:.1f} dB"
    channels = rounding.channel_snr_db
    return whole if channels is None or channels > 1e3 else f"{whole} (99 % of channels {channels:.1f})"


def _one_scale(tensor: TensorPrecision, least_snr: float) -> str:
    """Where one scale would not do: what spoils it."""
    rounding = tensor.roundings[ONE_SCALE]
    if passes(rounding, least_snr):
        return ""
    found = [
        (times, f"{word} {place}")
        for word, places in (("row", tensor.outlier_channels), ("column", tensor.outlier_inputs))
        for place, times in (places or [])[:1]
    ]
    times, where = max(found, default=(0.0, ""))
    why = f": {where} reaches {times:.1f} times the median one" if found else ""
    return f"; with one scale {_short(rounding)}{why}"


def bits_of(tensor: TensorPrecision, scheme: Scheme | None, stored: int) -> int:
    """Bits of the tensor in a scheme, scales not counted; of none as it is stored (`stored` bytes each)."""
    return tensor.count * (scheme.bits if scheme else 8 * stored)
