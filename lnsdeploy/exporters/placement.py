"""Where accumulators stand: λ, o_acc and integer biases from real operands (docs/datapath.md, 4.3, 4.5, 5).

Nothing here decides a bit of an executor: floating point measures ranges, and the integers that follow are
written into the net.
"""

from __future__ import annotations

import math
from dataclasses import replace
from fractions import Fraction
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy import tables
from lnsdeploy.datapath import Datapath, LogAccumulator
from lnsdeploy.emulator import native, reference
from lnsdeploy.emulator.place import acc_offset_for, lsb_for
from lnsdeploy.emulator.plan import AddPlan, DotPlan, Ints, PoolPlan, Window
from lnsdeploy.formats import LNSFormat, Words

# Sums are followed term by term over at most this many (rows × channels × bins).
_SAMPLE = 1 << 18
# And over as many products in all, but for a few rows that are always followed.
_WORK = 1 << 26
_ROWS = 16
# Of products of two tensors, as many are followed.
_SLICES = 16


def place_dot(
    plan: DotPlan, x: Words, w: Words, bias: npt.NDArray[np.float64] | None, headroom: float
) -> tuple[DotPlan, Ints | None]:
    """Place the accumulator of a matrix product so that no partial sum of the sample leaves it.

    Args:
        plan: formats and offsets; its `lsb` and `acc_offset` are replaced.
        x: words of a sample of activations [M, K].
        w: words of the weights [N, K].
        bias: real bias [N], or None.
        headroom: octaves kept free above the largest partial sum of the sample.
    Returns: the plan, and the bias as integers for it (None without one).
    """
    channels = w.shape[0]
    shift = plan.product_offset(channels)
    units = np.exp2(shift / plan.gamma)
    real_bias = np.zeros(channels) if bias is None else np.asarray(bias, dtype=np.float64)
    if plan.datapath.is_linear:
        largest = float(_largest(plan, x, w, real_bias / units).max(initial=0.0))
        plan = replace(plan, lsb=lsb_for(largest, plan.datapath.linear, plan.gamma, headroom))
        if bias is None:
            return plan, None
        return plan, bias_at(plan, real_bias, plan.lsb)
    accumulator = plan.datapath.log
    peaks = _largest(plan, x, w, real_bias / units) * units
    top = float(peaks.max()) if peaks.size else 0.0
    # a channel that the sample never reached takes the place of the widest
    peaks = np.where(peaks > 0, peaks, top if top > 0 else 1.0)
    offsets = np.array([acc_offset_for(p, plan.gamma, accumulator, headroom) for p in peaks], dtype=np.int64)
    plan = replace(plan, acc_offset=offsets)
    if bias is None:
        return plan, None
    return plan, np.array(
        [
            _log_word(Fraction(float(b)), int(o), plan.gamma, accumulator)
            for b, o in zip(real_bias, offsets, strict=True)
        ],
        dtype=np.int64,
    )


def place_matmul(plan: DotPlan, a: Words, b: Words, headroom: float) -> DotPlan:
    """As :func:`place_dot`, for products of two tensors: one λ or o_acc for all (spec 7.2).

    Args:
        a: words [..., M, K]; b: words [..., K, N].
    """
    x, w = a.reshape(-1, *a.shape[-2:]), b.reshape(-1, *b.shape[-2:])
    some = sorted({int(i) for i in np.linspace(0, max(len(x) - 1, 0), min(len(x), _SLICES))})
    placed = [place_dot(plan, x[i], np.ascontiguousarray(w[i].T), None, headroom)[0] for i in some]
    if not placed:
        return plan
    if plan.datapath.is_linear:
        return replace(plan, lsb=max(p.lsb for p in placed))
    return replace(plan, acc_offset=max(int(np.max(p.acc_offset)) for p in placed))


def place_convolution(
    plan: DotPlan,
    x: Words,
    w: Words,
    bias: npt.NDArray[np.float64] | None,
    window: Window,
    groups: int,
    headroom: float,
) -> tuple[DotPlan, Ints | None]:
    """As :func:`place_dot`, for a convolution: λ is the layer's, o_acc each output channel's.

    Args:
        x: words [B, C, *spatial]; w: words [O, C/groups, *kernel]; bias: real [O], or None.
    """
    axes = len(window.kernel)
    view = reference.windows(x, window)
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    inputs, each = w.shape[1], w.shape[0] // groups
    channels = w.shape[0]
    start = np.zeros(channels) if bias is None else np.asarray(bias, np.float64)
    start = start / np.exp2(plan.product_offset(channels) / plan.gamma)
    placed, largest = [], 0.0
    for group in range(groups):
        some = slice(group * each, (group + 1) * each)
        patches = view[:, group * inputs : (group + 1) * inputs].transpose(order)
        rows = patches.reshape(-1, inputs * int(np.prod(window.kernel)))
        part, words_of = plan.channels(some), w[some].reshape(each, -1)
        if plan.datapath.is_linear:
            # λ is that of all groups: one placement, whatever their number, as depthwise layers have hundreds
            largest = max(largest, float(_largest(part, rows, words_of, start[some]).max(initial=0.0)))
        else:
            placed.append(place_dot(part, rows, words_of, None if bias is None else bias[some], headroom))
    if plan.datapath.is_linear:
        plan = replace(plan, lsb=lsb_for(largest, plan.datapath.linear, plan.gamma, headroom))
        return plan, None if bias is None else bias_at(plan, np.asarray(bias, np.float64), plan.lsb)
    words = [b for _, b in placed if b is not None]
    offsets = np.concatenate([np.asarray(p.acc_offset) for p, _ in placed])
    return replace(plan, acc_offset=offsets), np.concatenate(words) if words else None


def bias_at(plan: DotPlan, bias: npt.NDArray[np.float64], lsb: int) -> Ints:
    """A real bias [N] as integers at a linear accumulator's least significant bit (spec 4.5)."""
    limit = (1 << (plan.datapath.linear.bits - 1)) - 1
    scaled = [
        _rounded(Fraction(float(b)), int(s), plan.gamma, lsb)
        for b, s in zip(bias, plan.product_offset(len(bias)), strict=True)
    ]
    return np.array([min(max(v, -limit), limit) for v in scaled], dtype=np.int64)


def _rounded(value: Fraction, shift: int, gamma: int, lsb: int) -> int:
    """value / 2^(shift/γ + lsb), to the nearest integer (to within the float64 power)."""
    whole, part = divmod(-shift, gamma)
    exact = value * Fraction(2.0 ** (part / gamma))
    scale = whole - lsb
    exact = exact * (1 << scale) if scale >= 0 else exact / (1 << -scale)
    return math.floor(exact + Fraction(1, 2))


def _sample_rows(rows: int, width: int, depth: int) -> npt.NDArray[np.intp]:
    count = min(rows, max(min(_SAMPLE // max(width, 1), _WORK // max(width * depth, 1)), _ROWS))
    return np.unique(np.linspace(0, max(rows - 1, 0), count).astype(np.intp)) if rows else np.zeros(0, np.intp)


def _largest(plan: DotPlan, x: Words, w: Words, start: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The largest magnitude of each channel's partial sums (of any bin), in units of its 2^(S/γ): float64 [N].

    Args:
        start: initial sums in these units [N].
    """
    bins = plan.datapath.linear.bins if plan.datapath.is_linear else 1
    some = x[_sample_rows(x.shape[0], bins * w.shape[0], w.shape[1])]
    a, b = _signed(plan.activation, some, plan.widen_activation), _signed(plan.weight, w, plan.widen_weight).T
    values, bins_of = _values(plan)
    if native.unavailable() is None:
        return native.largest_sums(a, b, values, bins_of, start)
    sums = np.zeros((bins, a.shape[0], b.shape[1]))
    sums[0] += start
    peak = np.abs(start)
    for k in range(a.shape[1]):
        u, v = a[:, k, None], b[None, k]
        codes = np.abs(u) + np.abs(v)
        term = np.sign(u) * np.sign(v) * values[codes]
        sums += term if bins_of is None else np.where(bins_of[codes] == np.arange(bins)[:, None, None], term, 0.0)
        np.maximum(peak, np.abs(sums).max(axis=(0, 1), initial=0.0), out=peak)
    return peak


def _signed(fmt: LNSFormat, words: Words, widen: int) -> npt.NDArray[np.int32]:
    """Widened codes with the sign of their value."""
    codes, signs = fmt.split(words)
    return (np.where(signs, -codes, codes) * widen).astype(np.int32)


def _values(plan: DotPlan) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8] | None]:
    """What a product adds by the sum of its codes, and to which of several bins (spec 4.1, 4.2)."""
    return _values_of(plan.datapath, plan.gamma, plan.max_product_code)


@lru_cache(maxsize=16)
def _values_of(
    datapath: Datapath, gamma: int, max_code: int
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.uint8] | None]:
    p = np.arange(max_code + 1)
    if not datapath.is_linear:
        return np.exp2(p / gamma), None
    accumulator = datapath.linear
    f = gamma.bit_length() - 1
    low_bits = f - accumulator.table_bits
    r = p & (gamma - 1)
    value = 1 + (r & ((1 << low_bits) - 1)) / gamma
    if accumulator.conversion != "bin":
        value = value * np.exp2((r >> low_bits << low_bits) / gamma)
    value = value * np.exp2(p >> f)
    return value, (r >> low_bits).astype(np.uint8) if accumulator.bins > 1 else None


def _log_word(value: Fraction, offset: int, gamma: int, accumulator: LogAccumulator) -> int:
    """A bias as a word of the accumulator's format: sign · 2^bits + code (spec 5.5)."""
    if value == 0:
        return 0
    code = tables.rounded_log2(abs(value), gamma << accumulator.guard_bits) - (offset << accumulator.guard_bits)
    code = min(code, accumulator.max_code)
    if code < 1:
        return 0
    return code + (int(value < 0) << accumulator.bits)


def place_add(plan: AddPlan, a: Any, b: Any, headroom: float) -> AddPlan:
    """Place the adder of an element-wise addition for the float64 values of a sample of its operands."""
    peak = max(float(np.abs(v).max(initial=0.0)) for v in (a, b, a + b))
    return replace(plan, acc_offset=acc_offset_for(peak or 1.0, plan.output.gamma, plan.accumulator, headroom))


def place_pool(plan: PoolPlan, views: npt.NDArray[np.float64], headroom: float) -> PoolPlan:
    """Place the accumulator of a pooling for float64 windows [..., n] of a sample."""
    peak = float(np.abs(np.cumsum(views, axis=-1)).max(initial=0.0))
    return replace(plan, acc_offset=acc_offset_for(peak or 1.0, plan.input.gamma, plan.accumulator, headroom))
