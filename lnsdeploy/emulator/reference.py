"""The specification in code: docs/datapath.md, paragraph by paragraph, in NumPy.

This executor is written to be read beside the specification, and decides what is right; the others are
fast. Magnitude codes and signs are kept apart as int64 and bool arrays, code 0 is zero.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy import tables
from lnsdeploy.datapath import LinearAccumulator, LogAccumulator
from lnsdeploy.delta import DeltaTables
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, MultiplyPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError
from lnsdeploy.formats import LNSFormat, Words

Ints = npt.NDArray[np.int64]
Bools = npt.NDArray[np.bool_]

# Rows of a product are independent, so they are taken in blocks whose accumulators stay in the cache.
_BLOCK_ELEMENTS = 1 << 16
# Product codes up to here have their aligned terms tabulated; above, they are computed for each product.
_TABULATE = 1 << 18


# ---------------------------------------------------------------------------------------------------
# Dot products (spec 3, 4, 5, 7)


def dot(a: Words, w: Words, bias: Ints | None, plan: DotPlan, counts: Counts | None = None) -> Words:
    """Matrix product of words by the plan's datapath (spec 3, 4, 5).

    Args:
        a: activations [M, K], of `plan.activation`.
        w: weights [N, K], of `plan.weight`.
        bias: None, or int64 [N]: integers at the accumulator's least significant bit (spec 4.5), or, for log
            accumulation, accumulator words: sign · 2^bits + code (spec 5.5).
        counts: filled in with saturated and flushed results.
    Returns: words [M, N] of `plan.output`.

    Raises:
        BadTypeError, BadValueError: shapes or dtypes do not fit.
    """
    a, w = np.asarray(a), np.asarray(w)
    plan.activation.check(a, "activations")
    plan.weight.check(w, "weights")
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise BadValueError(f"a product needs activations [M, K] and weights [N, K], not {a.shape} and {w.shape}")
    channels = w.shape[0]
    start = _bias(bias, channels)
    rows = max(1, _BLOCK_ELEMENTS // max(channels, 1))
    run = _linear if plan.datapath.is_linear else _log
    w_codes, w_signs = plan.weight.split(w)
    w_codes = w_codes * plan.widen_weight
    result = np.empty((a.shape[0], channels), dtype=plan.output.dtype)
    for first in range(0, a.shape[0], rows):
        part = slice(first, first + rows)
        a_codes, a_signs = plan.activation.split(a[part])
        result[part] = run(a_codes * plan.widen_activation, a_signs, w_codes, w_signs, start, plan, counts)
    return result


def _bias(bias: Ints | None, channels: int) -> Ints:
    if bias is None:
        return np.zeros(channels, dtype=np.int64)
    array = np.asarray(bias)
    if array.dtype.kind not in "iu":
        raise BadTypeError(f"a bias holds integers at the accumulator's scale, not {array.dtype}")
    if array.shape != (channels,):
        raise BadValueError(f"a bias for {channels} output channels has shape {array.shape}")
    return array.astype(np.int64)


def _linear(
    a: Ints, a_signs: Bools, w: Ints, w_signs: Bools, bias: Ints, plan: DotPlan, counts: Counts | None
) -> Words:
    """Linear accumulation (spec 4)."""
    accumulator = plan.datapath.linear
    bins, lanes, depth = accumulator.bins, accumulator.lanes, a.shape[1]
    term = _terms(plan)
    # spec 4.5: the bias is the initial value, of bin 0 if there are bins
    acc = np.zeros((bins, a.shape[0], w.shape[0]), dtype=term.dtype)
    acc[0] += _fit(bias.astype(term.dtype), accumulator.bits, accumulator.overflow)
    for first in range(0, depth, lanes):  # spec 4.4
        step = np.zeros_like(acc)
        for k in range(first, min(first + lanes, depth)):
            x, y = a[:, k, None], w[None, :, k]
            magnitude = term(x + y)  # spec 3.1
            magnitude = np.where((x == 0) | (y == 0), 0, magnitude)
            step += np.where(a_signs[:, k, None] != w_signs[None, :, k], -magnitude, magnitude)
        step = _fit(step, accumulator.step_bits, accumulator.overflow)
        acc = _fit(acc + step, accumulator.bits, accumulator.overflow)
    total, lsb = _combine(acc, accumulator, plan.lsb)
    # spec 4.6
    codes = raw_code(np.abs(total), plan.gamma, accumulator)
    codes += plan.gamma * lsb + plan.product_offset(w.shape[0]) - plan.output_offset
    return _output(codes, total < 0, total == 0, plan.output, plan.datapath.underflow, counts)


def _combine(acc: npt.NDArray[Any], accumulator: LinearAccumulator, lsb: int) -> tuple[Ints, int]:
    """The accumulator's value as one integer, and the weight of its last bit (spec 4.6)."""
    if accumulator.conversion == "product":
        return acc[0].astype(np.int64), lsb
    constants = tables.remainder_constants(accumulator.table_bits, accumulator.constant_bits)
    total = np.tensordot(constants, acc.astype(np.int64), axes=(0, 0))
    return total, lsb - accumulator.constant_bits


class _terms:
    """Aligned magnitudes of products by their code P, one row a bin (spec 4.1 to 4.3).

    Called with an array of P it gives an array with one more axis, first, of bins. Integers are int64 where
    no sum of a step can leave it, Python integers otherwise.
    """

    def __init__(self, plan: DotPlan):
        accumulator = plan.datapath.linear
        self.plan, self.accumulator = plan, accumulator
        f = plan.gamma.bit_length() - 1
        extra = max(plan.max_product_code // plan.gamma - plan.lsb, 0)
        largest = accumulator.constant_bits + f + 2 + extra
        exact = largest + accumulator.lanes.bit_length() < 62 and accumulator.bits < 62
        self.dtype: Any = np.int64 if exact else object
        self.table: npt.NDArray[Any] | None = None
        if plan.max_product_code <= _TABULATE:
            self.table = self._compute(np.arange(plan.max_product_code + 1, dtype=np.int64))

    def __call__(self, p: Ints) -> npt.NDArray[Any]:
        return self._compute(p) if self.table is None else self.table[:, p]

    def _compute(self, p: Ints) -> npt.NDArray[Any]:
        accumulator, gamma = self.accumulator, self.plan.gamma
        f = gamma.bit_length() - 1
        q, r = p >> f, p & (gamma - 1)
        # spec 4.1: the remainder's top bits index the table, the others are Mitchell's
        low_bits = f - accumulator.table_bits
        r_high, r_low = r >> low_bits, r & ((1 << low_bits) - 1)
        mantissa = gamma + r_low if low_bits else np.ones_like(r)
        fraction_bits = f if low_bits else 0
        # spec 4.2
        if accumulator.conversion == "product":
            constants = tables.remainder_constants(accumulator.table_bits, accumulator.constant_bits)
            mantissa = mantissa * constants[r_high]
            fraction_bits += accumulator.constant_bits
        # spec 4.3
        aligned: npt.NDArray[Any] = _align(
            mantissa.astype(self.dtype), q - fraction_bits - self.plan.lsb, accumulator.shift
        )
        if accumulator.conversion == "product":
            return aligned[None]
        bins = np.arange(accumulator.bins).reshape(-1, *[1] * p.ndim)
        separated: npt.NDArray[Any] = np.where(r_high == bins, aligned, 0)
        return separated


def aligned_terms(plan: DotPlan) -> npt.NDArray[Any]:
    """Aligned magnitudes [bins, P + 1] of products by bin and code sum (spec 4.1 to 4.3).

    Returns: int64, or Python integers (dtype object) where a term may not fit.
    """
    codes = np.arange(plan.max_product_code + 1, dtype=np.int64)
    terms = _terms(plan)(codes)
    # codes 0 and 1 are sums with a zero
    terms[:, :2] = 0
    return terms


def _align(mantissa: Any, shift: Ints, rule: str) -> Any:
    """mantissa·2^shift, dropped bits truncated or rounded half up (spec 4.3)."""
    # a mantissa has at most 41 bits: further right nothing is left of it
    right = np.clip(-shift, 0, 60).astype(mantissa.dtype)
    left = np.maximum(shift, 0).astype(mantissa.dtype)
    if rule == "round":
        half = np.where(right > 0, np.left_shift(1, np.maximum(right - 1, 0)), 0)
        mantissa = mantissa + half
    return np.left_shift(np.right_shift(mantissa, right), left)


def _fit(values: Any, bits: int, overflow: str) -> Any:
    """Fit integers to a width (spec 4.4)."""
    if overflow == "saturate":
        limit = (1 << (bits - 1)) - 1
        return np.minimum(np.maximum(values, -limit), limit)
    half = 1 << (bits - 1)
    return ((values + half) & ((1 << bits) - 1)) - half


def raw_code(magnitudes: Ints, gamma: int, accumulator: LinearAccumulator) -> Ints:
    """E(|A|), the accumulator's logarithm in codes (spec 4.6); 0 where |A| is 0.

    Args:
        magnitudes: int64 ≥ 0, below 2^62.
    """
    magnitudes = np.maximum(magnitudes, 1)
    position = _leading_one(magnitudes)
    if accumulator.encoder == "exact":
        thresholds = tables.octave_thresholds(gamma, 62, "nearest")
        normalised = magnitudes.astype(np.uint64) << (62 - position).astype(np.uint64)
        return gamma * position + np.searchsorted(thresholds, normalised, side="right")
    following = accumulator.encoder_bits or gamma.bit_length() - 1
    right, left = np.maximum(position - following, 0), np.maximum(following - position, 0)
    index = ((magnitudes >> right) << left) & ((1 << following) - 1)
    if accumulator.encoder == "table":
        index = tables.log_table(gamma, following)[index]
    return gamma * position + index


def _leading_one(magnitudes: Ints) -> Ints:
    """Position of the leading one of positive integers."""
    position = np.frexp(magnitudes.astype(np.float64))[1].astype(np.int64) - 1
    # the conversion to float64 may have rounded up to the next power of two
    return position - (np.left_shift(1, position) > magnitudes)


def _output(codes: Ints, signs: Bools, zero: Bools, fmt: LNSFormat, underflow: str, counts: Counts | None) -> Words:
    """Limit codes and make words (spec 2.4); `zero` marks results that are exactly zero."""
    if not fmt.signed:
        zero = zero | signs
        signs = np.zeros_like(signs)
    over, under = ~zero & (codes > fmt.max_code), ~zero & (codes < 1)
    if counts is not None:
        counts.add(codes.size, int(over.sum()), int(under.sum()), int((over & signs).sum()))
    least = 0 if underflow == "zero" else 1
    limited = np.where(zero | under, least, np.minimum(codes, fmt.max_code))
    return fmt.join(limited, signs & ~zero)


# ---------------------------------------------------------------------------------------------------
# Log accumulation (spec 5)


def log_add(x: Ints, x_signs: Bools, y: Ints, y_signs: Bools, delta: DeltaTables, limit: int) -> tuple[Ints, Bools]:
    """Add signed codes by the Gaussian logarithms (spec 5.2), within 1 … limit (spec 5.3)."""
    large, small = np.maximum(x, y), np.minimum(x, y)
    d = large - small
    differ = x_signs != y_signs
    signed = delta.signed
    total = large + signed[differ.astype(np.int64), np.minimum(d, signed.shape[1] - 1)]
    total = np.where(differ & (d == 0), 0, total)
    total = np.where(small == 0, large, total)  # zero is the identity
    total = np.where(total < 1, 0, np.minimum(total, limit))
    return total, np.where(x >= y, x_signs, y_signs) & (total > 0)


def _enter(codes: Ints, zero: Bools, shift: Ints | int, accumulator: LogAccumulator) -> Ints:
    """Codes at the accumulator's scale, limited to its range (spec 5.1)."""
    scaled = (codes + shift) << accumulator.guard_bits
    return np.where(zero | (scaled < 1), 0, np.minimum(scaled, accumulator.max_code))


def _reduce(
    entry: Callable[[int], tuple[Ints, Bools]],
    depth: int,
    start: tuple[Ints, Bools],
    accumulator: LogAccumulator,
    delta: DeltaTables,
) -> tuple[Ints, Bools]:
    """Add entries 0 … depth − 1 in the order of spec 5.4, from an initial value."""
    acc = start
    for first in range(0, depth, accumulator.lanes):
        # the zeros that pad the last group are identities, so they are left out
        level = [entry(k) for k in range(first, min(first + accumulator.lanes, depth))]
        while len(level) > 1:
            pairs = [
                log_add(*level[i], *level[i + 1], delta, accumulator.max_code) for i in range(0, len(level) - 1, 2)
            ]
            level = pairs + level[len(level) - len(level) % 2 :]
        acc = log_add(*acc, *level[0], delta, accumulator.max_code)
    return acc


def _from_accumulator(codes: Ints, accumulator: LogAccumulator) -> Ints:
    """Codes without their guard bits, rounded (spec 5.6)."""
    guard = accumulator.guard_bits
    return (codes + ((1 << guard) >> 1)) >> guard


def _log(a: Ints, a_signs: Bools, w: Ints, w_signs: Bools, bias: Ints, plan: DotPlan, counts: Counts | None) -> Words:
    """Log accumulation (spec 5)."""
    accumulator = plan.datapath.log
    delta = accumulator.delta.tables(plan.gamma << accumulator.guard_bits)
    channels = w.shape[0]
    acc_offset = plan.accumulator_offset(channels)
    shift = plan.product_offset(channels) - acc_offset

    def entry(k: int) -> tuple[Ints, Bools]:
        x, y = a[:, k, None], w[None, :, k]
        codes = _enter(x + y, (x == 0) | (y == 0), shift, accumulator)  # spec 3.1, 5.1
        return codes, (a_signs[:, k, None] != w_signs[None, :, k]) & (codes > 0)

    shape = (a.shape[0], channels)
    bias_codes = np.broadcast_to(bias & accumulator.max_code, shape)  # spec 5.5
    bias_signs = np.broadcast_to((bias >> accumulator.bits) != 0, shape) & (bias_codes > 0)
    codes, signs = _reduce(entry, a.shape[1], (bias_codes, bias_signs), accumulator, delta)
    zero = codes == 0
    codes = _from_accumulator(codes, accumulator) + acc_offset - plan.output_offset
    return _output(codes, signs, zero, plan.output, plan.datapath.underflow, counts)


# ---------------------------------------------------------------------------------------------------
# Convolution (spec 7)


def windows(x: npt.NDArray[Any], window: Window, fill: Any = 0) -> npt.NDArray[Any]:
    """A view of every window of a padded array.

    Args:
        x: [B, C, *spatial].
        fill: what padding holds.
    Returns: [B, C, *output spatial, *kernel].
    """
    axes = len(window.kernel)
    if x.ndim != axes + 2:
        raise BadValueError(f"a window over {axes} axes needs an array [B, C, …] of {axes + 2} axes, not {x.shape}")
    window.output_shape(x.shape[2:])
    widths = [(0, 0), (0, 0), *zip(window.pads[:axes], window.pads[axes:], strict=True)]
    padded = np.pad(x, widths, constant_values=fill)
    reach = [d * (k - 1) + 1 for d, k in zip(window.dilations, window.kernel, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, reach, axis=tuple(range(2, 2 + axes)))
    every = (slice(None),) * 2
    return view[
        (
            *every,
            *(slice(None, None, s) for s in window.strides),
            *(slice(None, None, d) for d in window.dilations),
        )
    ]


def convolution(
    x: Words,
    w: Words,
    bias: Ints | None,
    plan: DotPlan,
    window: Window,
    groups: int = 1,
    counts: Counts | None = None,
) -> Words:
    """Convolution as dot products over (C/groups, *kernel) in that order (spec 7.1). Images are independent, and k
    keeps its order (spec 7.2, 7.3).

    Args:
        x: [B, C, *spatial] of `plan.activation`, one to three spatial axes.
        w: [O, C/groups, *kernel] of `plan.weight`.
        bias: as for :func:`dot`, int64 [O].
    Returns: [B, O, *output spatial] of `plan.output`.
    """
    x, w = np.asarray(x), np.asarray(w)
    axes = len(window.kernel)
    if w.ndim != axes + 2 or w.shape[2:] != window.kernel:
        raise BadValueError(f"weights {w.shape} do not fit a kernel of {window.kernel}")
    outputs, inputs = w.shape[:2]
    if groups < 1 or x.ndim < 2 or x.shape[1] != inputs * groups or outputs % groups:
        raise BadValueError(f"input {x.shape}, weights {w.shape} and {groups} groups do not fit together")
    start = _bias(bias, outputs)
    view = windows(x, window)  # padding is the zero word
    spatial = view.shape[2 : 2 + axes]
    result = np.empty((x.shape[0], outputs, *spatial), dtype=plan.output.dtype)
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    depth = inputs * int(np.prod(window.kernel))
    each = outputs // groups
    # one image at a time: the matrix of windows is many times larger than the image
    images = max(1, (1 << 22) // max(depth * int(np.prod(spatial)), 1))
    for first in range(0, x.shape[0], images):
        some = slice(first, first + images)
        for group in range(groups):
            part = slice(group * each, (group + 1) * each)
            patches = view[some, group * inputs : (group + 1) * inputs].transpose(order)
            count = patches.shape[0]
            rows = dot(
                patches.reshape(count * int(np.prod(spatial)), depth),
                w[part].reshape(each, depth),
                start[part],
                plan.channels(part),
                counts,
            )
            shaped = rows.reshape(count, *spatial, each)
            result[some, part] = np.moveaxis(shaped, -1, 1)
    return result


def matmul(a: Words, b: Words, plan: DotPlan, counts: Counts | None = None) -> Words:
    """Matrix products of two tensors of words, one for each index of the axes before the last two (spec 7.2).

    Args:
        a: words [..., M, K] of `plan.activation`; b: words [..., K, N] of `plan.weight`, with the same leading axes.
    Returns: words [..., M, N] of `plan.output`.

    Raises:
        BadValueError: shapes do not fit.
    """
    return each_product(np.asarray(a), np.asarray(b), lambda x, w: dot(x, w, None, plan, counts), plan.output)


def each_product(a: Words, b: Words, run: Callable[[Words, Words], Words], fmt: LNSFormat) -> Words:
    """The products of :func:`matmul`, each by `run`, which takes words [M, K] and [N, K]."""
    if a.ndim < 2 or a.ndim != b.ndim or a.shape[:-2] != b.shape[:-2] or a.shape[-1] != b.shape[-2]:
        raise BadValueError(f"products need words [..., M, K] and [..., K, N], not {a.shape} and {b.shape}")
    result = np.empty((*a.shape[:-1], b.shape[-1]), dtype=fmt.dtype)
    for index in np.ndindex(*a.shape[:-2]):
        result[index] = run(a[index], np.ascontiguousarray(b[index].T))
    return result


# ---------------------------------------------------------------------------------------------------
# Other operations (spec 6)


def pad(words: Words, pads: tuple[int, ...]) -> Words:
    """Zero words around a tensor (spec 6.1); `pads` before each axis, then after each."""
    axes = words.ndim
    if len(pads) != 2 * axes or min(pads, default=0) < 0:
        raise BadValueError(f"pads of {axes} axes are {2 * axes} integers of at least 0, not {pads}")
    return np.pad(words, list(zip(pads[:axes], pads[axes:], strict=True)))


def lookup(words: Words, table: Words, fmt: LNSFormat) -> Words:
    """A function of one number as a table: the result's word for every word of `fmt` (spec 6.7)."""
    fmt.check(np.asarray(words))
    return table[words]


def _keys(words: Words, fmt: LNSFormat) -> Ints:
    """Integers in the order of the words' values (spec 6.1)."""
    codes, signs = fmt.split(words)
    return np.where(signs, -codes, codes)


def _from_keys(keys: Ints, fmt: LNSFormat) -> Words:
    return fmt.join(np.abs(keys), keys < 0)


def relu(words: Words, fmt: LNSFormat) -> Words:
    """Negative words become zero (spec 6.1)."""
    fmt.check(np.asarray(words))
    return _from_keys(np.maximum(_keys(words, fmt), 0), fmt)


def negate(words: Words, fmt: LNSFormat) -> Words:
    """The other sign; zero stays (spec 6.1). Unsigned formats have no negative words."""
    fmt.check(np.asarray(words))
    if not fmt.signed:
        raise BadValueError(f"words of the unsigned format {fmt} cannot be negated")
    return _from_keys(-_keys(words, fmt), fmt)


def maximum(a: Words, b: Words, fmt: LNSFormat) -> Words:
    """Element-wise larger value of words that share an offset (spec 6.1)."""
    return _from_keys(np.maximum(_keys(a, fmt), _keys(b, fmt)), fmt)


def minimum(a: Words, b: Words, fmt: LNSFormat) -> Words:
    """Element-wise smaller value of words that share an offset (spec 6.1)."""
    return _from_keys(np.minimum(_keys(a, fmt), _keys(b, fmt)), fmt)


def clip(words: Words, fmt: LNSFormat, low: int, high: int) -> Words:
    """Words limited to the values of two words `low` and `high` (spec 6.1)."""
    bounds = _keys(np.array([low, high], dtype=fmt.dtype), fmt)
    return _from_keys(np.clip(_keys(words, fmt), bounds[0], bounds[1]), fmt)


def max_pool(x: Words, fmt: LNSFormat, window: Window) -> Words:
    """Largest value of each window (spec 6.1).

    Args:
        x: words [B, C, *spatial].
    Returns: words [B, C, *output spatial].
    """
    fmt.check(np.asarray(x))
    axes = len(window.kernel)
    inside = windows(np.ones((1, 1, *np.shape(x)[2:]), dtype=np.bool_), window)
    if not inside.any(axis=tuple(range(-axes, 0))).all():
        raise BadValueError("a window of the max pooling holds padding only: use smaller pads")
    lowest = -(fmt.max_code + 1)  # below every word, so padding never wins
    view = windows(_keys(x, fmt), window, fill=lowest)
    return _from_keys(view.max(axis=tuple(range(-axes, 0))), fmt)


def add(a: Words, b: Words, plan: AddPlan, counts: Counts | None = None) -> Words:
    """Element-wise sum by the log adder (spec 6.4), with NumPy broadcasting."""
    plan.a.check(np.asarray(a), "first operand")
    plan.b.check(np.asarray(b), "second operand")
    accumulator = plan.accumulator
    delta = accumulator.delta.tables(plan.output.gamma << accumulator.guard_bits)
    entered = []
    for words, fmt, offset in ((a, plan.a, plan.a_offset), (b, plan.b, plan.b_offset)):
        codes, signs = fmt.split(words)
        entered.append((_enter(codes, codes == 0, offset - plan.acc_offset, accumulator), signs))
    codes, signs = log_add(*entered[0], *entered[1], delta, accumulator.max_code)
    zero = codes == 0
    codes = _from_accumulator(codes, accumulator) + plan.acc_offset - plan.output_offset
    return _output(codes, signs, zero, plan.output, plan.underflow, counts)


def sum_window(x: Words, plan: PoolPlan, window: Window, counts: Counts | None = None) -> Words:
    """Sum of each window by the log adder (spec 6.5).

    Args:
        x: words [B, C, *spatial].
    Returns: words [B, C, *output spatial].
    """
    return _pool(x, plan, window, None, counts)


def average_pool(
    x: Words,
    plan: PoolPlan,
    window: Window,
    count_include_pad: bool = False,
    counts: Counts | None = None,
) -> Words:
    """Average of each window by the log adder (spec 6.5); shapes as for :func:`sum_window`."""
    return _pool(x, plan, window, log_counts(np.asarray(x).shape[2:], plan, window, count_include_pad), counts)


def log_counts(shape: tuple[int, ...], plan: PoolPlan, window: Window, count_include_pad: bool) -> Ints:
    """round(γ_acc·log2 n) for each output position of an average (spec 6.5).

    Args:
        shape: spatial shape of the input.
    Returns: int64 [*output spatial].
    """
    gamma = plan.input.gamma << plan.accumulator.guard_bits
    ones = np.ones((1, 1, *shape), dtype=np.int64)
    view = windows(ones, window, fill=1 if count_include_pad else 0)[0, 0]
    numbers = view.sum(axis=tuple(range(-len(window.kernel), 0)))
    if not numbers.all():
        raise BadValueError("an average over padding only is undefined: use smaller pads")
    values, where = np.unique(numbers, return_inverse=True)
    logs = np.array([tables.rounded_log2(Fraction(int(n)), gamma) for n in values], dtype=np.int64)
    return logs[where].reshape(numbers.shape)


def _pool(x: Words, plan: PoolPlan, window: Window, divisor: Ints | None, counts: Counts | None) -> Words:
    plan.input.check(np.asarray(x))
    accumulator = plan.accumulator
    delta = accumulator.delta.tables(plan.input.gamma << accumulator.guard_bits)
    view = windows(np.asarray(x), window)
    shape = view.shape[: 2 + len(window.kernel)]
    flat = view.reshape(*shape, int(np.prod(window.kernel)))

    def entry(k: int) -> tuple[Ints, Bools]:
        codes, signs = plan.input.split(flat[..., k])
        entered = _enter(codes, codes == 0, plan.input_offset - plan.acc_offset, accumulator)
        return entered, signs & (entered > 0)

    nothing = np.zeros(shape, dtype=np.int64), np.zeros(shape, dtype=np.bool_)
    codes, signs = _reduce(entry, flat.shape[-1], nothing, accumulator, delta)
    if divisor is not None:
        codes = np.where(codes == 0, 0, np.maximum(codes - divisor, 0))
    zero = codes == 0
    codes = _from_accumulator(codes, accumulator) + plan.acc_offset - plan.output_offset
    return _output(codes, signs, zero, plan.output, plan.underflow, counts)


def rescale(words: Words, plan: RescalePlan, counts: Counts | None = None) -> Words:
    """Words of another format or offset (spec 6.3)."""
    plan.input.check(np.asarray(words))
    codes, signs = plan.input.split(words)
    zero = codes == 0
    absolute = codes + plan.input_offset
    if plan.output.gamma % plan.input.gamma == 0:
        absolute = absolute * (plan.output.gamma // plan.input.gamma)
    else:
        ratio = plan.input.gamma // plan.output.gamma
        absolute = (2 * absolute + ratio) // (2 * ratio)
    rescaled = _output(absolute - plan.output_offset, signs, zero, plan.output, plan.underflow, counts)
    nothing = zero if plan.output.signed else zero | signs
    return np.where(nothing, plan.output.dtype.type(0), rescaled)


def product(a: Words, b: Words, plan: MultiplyPlan, counts: Counts | None = None) -> Words:
    """Element-wise product of words of two formats of one γ: codes add (spec 6.2), with NumPy broadcasting."""
    plan.a.check(np.asarray(a), "first operand")
    plan.b.check(np.asarray(b), "second operand")
    (x, x_signs), (y, y_signs) = plan.a.split(a), plan.b.split(b)
    codes = x + y + plan.code_shift
    return _output(codes, x_signs != y_signs, (x == 0) | (y == 0), plan.output, plan.underflow, counts)


def multiply(
    a: Words, b: Words, fmt: LNSFormat, a_offset: int, b_offset: int, offset: int, underflow: str = "zero"
) -> Words:
    """Element-wise product of words of one format: codes add (spec 6.2)."""
    (x, x_signs), (y, y_signs) = fmt.split(a), fmt.split(b)
    codes = x + y + a_offset + b_offset - offset
    return _output(codes, x_signs != y_signs, (x == 0) | (y == 0), fmt, underflow, None)


def divide(
    a: Words, b: Words, fmt: LNSFormat, a_offset: int, b_offset: int, offset: int, underflow: str = "zero"
) -> Words:
    """Element-wise quotient of words of one format: codes subtract; x/0 is the largest code (spec 6.2)."""
    (x, x_signs), (y, y_signs) = fmt.split(a), fmt.split(b)
    codes = x - y + a_offset - b_offset - offset
    codes = np.where(y == 0, fmt.max_code, codes)
    return _output(codes, x_signs != y_signs, (x == 0) & (y != 0), fmt, underflow, None)


def square_root(words: Words, fmt: LNSFormat, offset: int, output_offset: int, underflow: str = "zero") -> Words:
    """Square root: the code is halved (spec 6.2).

    Raises:
        BadValueError: a word is negative.
    """
    codes, signs = fmt.split(words)
    if signs.any():
        raise BadValueError("the square root of a negative word is not defined")
    return _output(((codes + offset + 1) >> 1) - output_offset, signs, codes == 0, fmt, underflow, None)
