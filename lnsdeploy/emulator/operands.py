"""What executors are given beside words: tables and integers that follow from a plan (docs/datapath.md).

The native library and the operators of an exported file take the same operands, so what was emulated is what is
deployed.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy import formats, tables
from lnsdeploy.datapath import Datapath, LinearAccumulator, LogAccumulator, widened
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import DotPlan
from lnsdeploy.errors import UnsupportedError
from lnsdeploy.formats import LNSFormat

Arrays = dict[str, npt.NDArray[Any]]

_INT32_MAX = (1 << 31) - 1
# Entries of a table over product codes or differences: keys of four times as many, and sums of two, fit 32 bits.
_MAX_ENTRIES = 1 << 24


def encode_thresholds(fmt: LNSFormat, offset: int, underflow: str) -> npt.NDArray[np.float32]:
    """Entry k − 1: the smallest float32 whose code is at least k (spec 2.1, 2.4)."""
    top = tables.octave_thresholds(fmt.gamma, 62, "nearest")
    bounds = []
    for k in range(1, fmt.max_code + 1):
        # the lower bound of code k is 2^((k − ½ + o)/γ): threshold number k + o − 1 of the absolute grid
        octave, index = divmod(k + offset - 1, fmt.gamma)
        bounds.append(_float32_at_least(int(top[index]), octave - 62))
    if underflow == "min":
        bounds[0] = 0.0
    return np.array(bounds, dtype=np.float32)


def _float32_at_least(significand: int, exponent: int) -> float:
    """The smallest float32 not below significand·2^exponent (itself rounded up from an irrational)."""
    # 24 bits of significand, fewer where the result is subnormal
    drop = max(significand.bit_length() - 24, -149 - exponent)
    kept = -((-significand) >> drop) if drop > 0 else significand << -drop
    power = exponent + drop
    if kept.bit_length() + power > 128:
        return float("inf")
    return float(np.ldexp(np.float64(kept), power))


def decode_values(fmt: LNSFormat, offset: int) -> npt.NDArray[np.float32]:
    """The value of every word (spec 2.5)."""
    words = np.arange(1 << fmt.bits).astype(fmt.dtype)
    values: npt.NDArray[np.float32] = formats.decode(words, fmt, offset)
    return values


@lru_cache(maxsize=16)
def raw_thresholds(gamma: int, accumulator: LinearAccumulator) -> npt.NDArray[np.int64]:
    """Entry e − 1: the smallest |A| whose raw code is at least e, for every |A| that can occur (spec 4.6)."""
    largest = 1 << (accumulator.bits - 1)
    if accumulator.conversion == "bin":
        constants = tables.remainder_constants(accumulator.table_bits, accumulator.constant_bits)
        largest *= int(constants.sum())
    octaves = largest.bit_length()
    if accumulator.encoder == "exact":
        top = [int(t) for t in tables.octave_thresholds(gamma, 62, "nearest")]
        found = [-((-t) >> (62 - p)) for p in range(octaves) for t in top]
    else:
        # the raw code is a step function of the leading one and the bits that follow it
        following = accumulator.encoder_bits or gamma.bit_length() - 1
        values = np.arange(1 << following)
        if accumulator.encoder == "table":
            values = tables.log_table(gamma, following)
        starts, codes = [], []
        for p in range(octaves):
            for j in range(1 << following) if p >= following else range(0, 1 << following, 1 << (following - p)):
                starts.append(((1 << following) + j) << p >> following)
                codes.append(gamma * p + int(values[j]))
        reached = np.maximum.accumulate(np.array(codes))
        wanted = np.arange(1, int(reached[-1]) + 1)
        found = [starts[i] for i in np.searchsorted(reached, wanted, side="left")]
    kept = [t for t in found if t <= largest]
    return np.array(kept or [largest + 1], dtype=np.int64)


def linear_tables(plan: DotPlan, channels: int, bias: npt.NDArray[np.int64] | None) -> Arrays:
    """The table inputs of a dot product with linear accumulation."""
    accumulator = plan.datapath.linear
    lsb = plan.lsb
    terms = _fitted_terms(plan.datapath, plan.activation, plan.weight, plan.lsb)
    constants = np.ones(1, dtype=np.int64)
    if accumulator.conversion == "bin":
        constants = tables.remainder_constants(accumulator.table_bits, accumulator.constant_bits)
        lsb -= accumulator.constant_bits
    limit = (1 << (accumulator.bits - 1)) - 1
    start = np.zeros(channels, dtype=np.int64) if bias is None else bias
    start = _fitted(start, accumulator.bits, accumulator.overflow, limit)
    return {
        "bias": start.astype(terms.dtype),
        "terms": terms,
        "constants": constants.astype(np.int64),
        "thresholds": raw_thresholds(plan.gamma, accumulator),
        "code_shift": plan.gamma * lsb + plan.product_offset(channels) - plan.output_offset,
    }


@lru_cache(maxsize=64)
def _fitted_terms(datapath: Datapath, activation: LNSFormat, weight: LNSFormat, lsb: int) -> npt.NDArray[Any]:
    """The terms of :func:`reference.aligned_terms`, as narrow as may be; kept, for layers that differ elsewhere."""
    accumulator = datapath.linear
    plan = DotPlan(datapath, activation, weight, widened(activation, datapath.gamma), 0, 0, 0, lsb)
    _check_entries("the terms of products", accumulator.bins * (plan.max_product_code + 1))
    terms = reference.aligned_terms(plan)
    # what fitting would do to a single term anyway is done here where it makes integers fit
    width = accumulator.step_bits
    if accumulator.overflow == "wrap":
        fitted = terms & ((1 << width) - 1)
    elif accumulator.lanes == 1:
        fitted = np.minimum(terms, (1 << (width - 1)) - 1)
    else:
        fitted = terms
    largest = int(terms.max(initial=0)) * accumulator.lanes
    if not _is_narrow(terms, accumulator) and (_is_narrow(fitted, accumulator) or largest >= 1 << 62):
        terms = fitted
        largest = int(terms.max(initial=0)) * accumulator.lanes
    if largest >= 1 << 62:
        raise UnsupportedError(
            f"{accumulator.lanes} lanes of terms up to {int(terms.max())} exceed 64 bits; "
            + ("use fewer lanes or psum_bits" if accumulator.overflow == "wrap" else "use a larger lsb or fewer lanes")
        )
    kind = np.int32 if _is_narrow(terms, accumulator) else np.int64
    return terms.astype(kind)


def _is_narrow(terms: npt.NDArray[Any], accumulator: LinearAccumulator) -> bool:
    """Whether neither a step's sum nor an accumulator leaves 32 bits."""
    largest = int(terms.max(initial=0)) * accumulator.lanes
    return largest + (1 << max(accumulator.bits, accumulator.step_bits)) <= _INT32_MAX


def _fitted(values: npt.NDArray[np.int64], bits: int, overflow: str, limit: int) -> npt.NDArray[np.int64]:
    if overflow == "saturate":
        return np.clip(values, -limit, limit)
    half = 1 << (bits - 1)
    return ((values + half) & ((1 << bits) - 1)) - half


def _check_entries(what: str, entries: int) -> None:
    if entries > _MAX_ENTRIES:
        raise UnsupportedError(
            f"{what} need a table of {entries} entries; {_MAX_ENTRIES} are the most outside of the reference: "
            "use formats of fewer bits, of closer gamma, or fewer bins"
        )


def delta_tables(accumulator: LogAccumulator, gamma: int) -> Arrays:
    """The tables of a log adder at `gamma` codes per octave, int32, zeros past their ends left out (spec 5.7)."""
    made = accumulator.delta.tables(gamma << accumulator.guard_bits)
    _check_entries("differences of accumulator codes", max(len(made.plus), len(made.minus)))
    return {"delta_plus": made.plus.astype(np.int32), "delta_minus": made.minus.astype(np.int32)}


def log_tables(plan: DotPlan, channels: int, bias: npt.NDArray[np.int64] | None) -> Arrays:
    """The table inputs of a dot product with log accumulation."""
    accumulator = plan.datapath.log
    _check_entries("the codes of products", plan.max_product_code + 1)
    offsets = plan.accumulator_offset(channels)
    entry = plan.product_offset(channels) - offsets
    return {
        "bias": np.zeros(channels, dtype=np.int64) if bias is None else bias.astype(np.int64),
        **delta_tables(accumulator, plan.gamma),
        "entry_shift": entry.astype(np.int64),
        "code_shift": (offsets - plan.output_offset).astype(np.int64),
    }
