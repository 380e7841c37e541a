"""The arithmetic in plain torch operations, on any device that torch has 64-bit integers for (docs/datapath.md).

The second path beside the GPU kernels, for other makes of GPU: correct for every datapath, some hundred times slower
than a kernel. The functions have the names and signatures of :mod:`lnsdeploy.emulator.reference`, with tensors for
arrays; results are on the operands' device. Work is taken in blocks, so that intermediate tensors stay bounded. What
64-bit integers do not hold is left to the reference, on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lnsdeploy import formats
from lnsdeploy.datapath import LogAccumulator
from lnsdeploy.emulator import operands, reference
from lnsdeploy.emulator.plan import AddPlan, Counts, DotPlan, Ints, MultiplyPlan, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError, UnsupportedError
from lnsdeploy.formats import LNSFormat

# Elements of the largest intermediate tensor of a product.
_BLOCK_ELEMENTS = 1 << 22
# Terms of a step that need not be fitted one by one, so that fewer operations are launched.
_STEP = 16
# Thresholds of a format's encoding, at most.
_MAX_TABLE_BITS = 20

Coded = tuple[Tensor, Tensor]


def word_dtype(fmt: LNSFormat) -> torch.dtype:
    """Of a format's words."""
    return {1: torch.uint8, 2: torch.uint16, 4: torch.uint32}[fmt.dtype.itemsize]


def check(words: Tensor, fmt: LNSFormat, name: str = "words") -> None:
    """Refuse words that have another dtype or bits above the format's width, which waits for the device.

    Raises:
        BadTypeError, BadValueError: as :meth:`lnsdeploy.formats.LNSFormat.check`.
    """
    if words.dtype != word_dtype(fmt):
        raise BadTypeError(f"{name}: words of {fmt} are {fmt.dtype}, not {str(words.dtype).removeprefix('torch.')}")
    if fmt.bits < 8 * fmt.dtype.itemsize and words.numel():
        largest = int(words.to(torch.int64).max())
        if largest >> fmt.bits:
            raise BadValueError(f"{name}: word {largest} does not fit the {fmt.bits} bits of {fmt}")


def _split(words: Tensor, fmt: LNSFormat) -> Coded:
    wide = words.to(torch.int64)
    codes = wide & fmt.max_code
    return codes, ((wide & fmt.sign_bit) != 0) & (codes > 0)


def _join(codes: Tensor, signs: Tensor, fmt: LNSFormat) -> Tensor:
    return torch.where(signs & (codes > 0), codes | fmt.sign_bit, codes).to(word_dtype(fmt))


def _limited(
    codes: Tensor, signs: Tensor, zero: Tensor, fmt: LNSFormat, underflow: str, counts: Counts | None
) -> Tensor:
    """Codes limited and made words (spec 2.4); `zero` marks results that are exactly zero."""
    if not fmt.signed:
        zero = zero | signs
        signs = torch.zeros_like(signs)
    over, under = ~zero & (codes > fmt.max_code), ~zero & (codes < 1)
    if counts is not None:
        found = torch.stack([over.sum(), under.sum(), (over & signs).sum()]).tolist()
        counts.add(codes.numel(), *found)
    least = 0 if underflow == "zero" else 1
    limited = torch.where(zero | under, least, codes.clamp(max=fmt.max_code))
    return _join(limited, signs & ~zero, fmt)


def _tensor(array: Any, device: torch.device) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64)).to(device)


def _to_numpy(words: Tensor) -> npt.NDArray[Any]:
    return words.cpu().numpy()


def _from_numpy(words: npt.NDArray[Any], device: torch.device) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(words)).to(device)


def _fit(values: Tensor, bits: int, overflow: str) -> Tensor:
    """Integers fitted to a width (spec 4.4)."""
    if overflow == "saturate":
        limit = (1 << (bits - 1)) - 1
        return values.clamp(-limit, limit)
    half = 1 << (bits - 1)
    return ((values + half) & ((1 << bits) - 1)) - half


# ---------------------------------------------------------------------------------------------------
# Dot products (spec 3, 4, 5, 7)


def start_values(bias: Any, channels: int) -> Ints | None:
    """A bias as int64 [channels], or None.

    Raises:
        BadTypeError, BadValueError: it holds no integers, or not one for each channel.
    """
    if bias is None:
        return None
    array = np.asarray(bias.cpu() if isinstance(bias, Tensor) else bias)
    if array.dtype.kind not in "iu":
        raise BadTypeError(f"a bias holds integers at the accumulator's scale, not {array.dtype}")
    if array.shape != (channels,):
        raise BadValueError(f"a bias for {channels} output channels has shape {array.shape}")
    return array.astype(np.int64)


def check_product(a: Tensor, w: Tensor, plan: DotPlan) -> None:
    """Refuse operands of a product that do not fit together or their formats."""
    check(a, plan.activation, "activations")
    check(w, plan.weight, "weights")
    if a.ndim != 2 or w.ndim != 2 or a.shape[1] != w.shape[1]:
        raise BadValueError(
            f"a product needs activations [M, K] and weights [N, K], not {tuple(a.shape)} and {tuple(w.shape)}"
        )


def dot(a: Tensor, w: Tensor, bias: Any, plan: DotPlan, counts: Counts | None = None) -> Tensor:
    """Matrix product of words (spec 3, 4, 5); see :func:`lnsdeploy.emulator.reference.dot`."""
    check_product(a, w, plan)
    start = start_values(bias, w.shape[0])
    try:
        run = _linear(plan, w, start) if plan.datapath.is_linear else _log(plan, w, start)
    except UnsupportedError:
        words = reference.dot(_to_numpy(a), _to_numpy(w), start, plan, counts)
        return _from_numpy(words, a.device)
    result = torch.empty((a.shape[0], w.shape[0]), dtype=word_dtype(plan.output), device=a.device)
    rows = max(1, _BLOCK_ELEMENTS // max(w.shape[0] * _block_factor(plan), 1))
    for first in range(0, a.shape[0], rows):
        codes, signs = _split(a[first : first + rows], plan.activation)
        result[first : first + rows] = run(codes * plan.widen_activation, signs, counts)
    return result


def _block_factor(plan: DotPlan) -> int:
    """How many tensors of results one step needs at once."""
    part = plan.datapath.accumulate
    return max(_STEP, part.lanes) if not plan.datapath.is_linear else _terms_at_once(plan) * plan.datapath.linear.bins


def _terms_at_once(plan: DotPlan) -> int:
    """Terms whose sum is taken before it is fitted: a step's, or more where fitting in between changes nothing."""
    part = plan.datapath.linear
    if part.overflow == "wrap" and part.step_bits >= part.bits:
        return max(_STEP // part.lanes, 1) * part.lanes
    return part.lanes


_Run = Callable[[Tensor, Tensor, Counts | None], Tensor]


def _linear(plan: DotPlan, w: Tensor, bias: Ints | None) -> _Run:
    """Linear accumulation (spec 4): what makes words of activation codes and signs."""
    part, device, channels = plan.datapath.linear, w.device, w.shape[0]
    made = operands.linear_tables(plan, channels, bias)
    lanes = _terms_at_once(plan)
    terms64 = made["terms"].astype(np.int64)
    # more terms at once must not leave 64 bits; sums that wrap keep their low bits in any case
    terms, constants = _tensor(terms64, device), _tensor(made["constants"], device)
    thresholds, shift = _tensor(made["thresholds"], device), _tensor(made["code_shift"], device)
    start = _tensor(made["bias"], device)
    w_codes, w_signs = _split(w, plan.weight)
    w_codes = w_codes * plan.widen_weight

    def run(a: Tensor, signs: Tensor, counts: Counts | None) -> Tensor:
        acc = torch.zeros((part.bins, a.shape[0], channels), dtype=torch.int64, device=device)
        acc[0] += start
        for first in range(0, a.shape[1], lanes):
            x, y = a[:, None, first : first + lanes], w_codes[None, :, first : first + lanes]
            minus = signs[:, None, first : first + lanes] != w_signs[None, :, first : first + lanes]
            magnitudes = terms[:, torch.where((x == 0) | (y == 0), 0, x + y)]
            step = torch.where(minus, -magnitudes, magnitudes).sum(-1)
            acc = _fit(acc + _fit(step, part.step_bits, part.overflow), part.bits, part.overflow)
        total = (constants[:, None, None] * acc).sum(0)
        codes = torch.searchsorted(thresholds, total.abs(), right=True) + shift
        return _limited(codes, total < 0, total == 0, plan.output, plan.datapath.underflow, counts)

    return run


def _deltas(accumulator: LogAccumulator, gamma: int, device: torch.device) -> Tensor:
    """int64 [2, D + 1]: +Δ⁺ and −Δ⁻ by d, zeros past their ends (spec 5.7)."""
    made = operands.delta_tables(accumulator, gamma)
    plus, minus = made["delta_plus"].astype(np.int64), made["delta_minus"].astype(np.int64)
    both = np.zeros((2, max(len(plus), len(minus)) + 1), dtype=np.int64)
    both[0, : len(plus)], both[1, : len(minus)] = plus, -minus
    return _tensor(both, device)


def log_add(x: Coded, y: Coded, delta: Tensor, limit: int) -> Coded:
    """Signed codes added by the Gaussian logarithms (spec 5.2), within 1 … limit (spec 5.3)."""
    large, small = torch.maximum(x[0], y[0]), torch.minimum(x[0], y[0])
    d, differ = large - small, x[1] != y[1]
    total = large + delta[differ.to(torch.int64), d.clamp(max=delta.shape[1] - 1)]
    total = torch.where(differ & (d == 0), 0, total)
    total = torch.where(small == 0, large, total)
    total = torch.where(total < 1, 0, total.clamp(max=limit))
    return total, torch.where(x[0] >= y[0], x[1], y[1]) & (total > 0)


def _enter(codes: Tensor, zero: Tensor, shift: Tensor | int, accumulator: LogAccumulator) -> Tensor:
    """Codes at the accumulator's scale, limited to its range (spec 5.1)."""
    scaled = (codes + shift) << accumulator.guard_bits
    return torch.where(zero | (scaled < 1), 0, scaled.clamp(max=accumulator.max_code))


def _reduce(
    entry: Callable[[int], Coded], depth: int, start: Coded, accumulator: LogAccumulator, delta: Tensor
) -> Coded:
    """Entries 0 … depth − 1 added in the order of spec 5.4, from an initial value."""
    acc, limit = start, accumulator.max_code
    for first in range(0, depth, accumulator.lanes):
        level = [entry(k) for k in range(first, min(first + accumulator.lanes, depth))]
        while len(level) > 1:
            pairs = [log_add(level[i], level[i + 1], delta, limit) for i in range(0, len(level) - 1, 2)]
            level = pairs + level[len(level) - len(level) % 2 :]
        acc = log_add(acc, level[0], delta, limit)
    return acc


def _leave(codes: Tensor, accumulator: LogAccumulator) -> Tensor:
    """Codes without their guard bits, rounded (spec 5.6)."""
    guard = accumulator.guard_bits
    return (codes + ((1 << guard) >> 1)) >> guard


def _log(plan: DotPlan, w: Tensor, bias: Ints | None) -> _Run:
    """Log accumulation (spec 5): what makes words of activation codes and signs."""
    part, device, channels = plan.datapath.log, w.device, w.shape[0]
    made = operands.log_tables(plan, channels, bias)
    delta = _deltas(part, plan.gamma, device)
    start, shift = _tensor(made["bias"], device), _tensor(made["entry_shift"], device)
    code_shift = _tensor(made["code_shift"], device)
    w_codes, w_signs = _split(w, plan.weight)
    w_codes = w_codes * plan.widen_weight
    first_codes = start & part.max_code
    first_signs = ((start >> part.bits) != 0) & (first_codes > 0)

    def run(a: Tensor, signs: Tensor, counts: Counts | None) -> Tensor:
        def entry(k: int) -> Coded:
            x, y = a[:, k, None], w_codes[None, :, k]
            codes = _enter(x + y, (x == 0) | (y == 0), shift, part)
            return codes, (signs[:, k, None] != w_signs[None, :, k]) & (codes > 0)

        shape = a.shape[0], channels
        begin = first_codes.expand(shape), first_signs.expand(shape)
        codes, minus = _reduce(entry, a.shape[1], begin, part, delta)
        left = _leave(codes, part) + code_shift
        return _limited(left, minus, codes == 0, plan.output, plan.datapath.underflow, counts)

    return run


def windows(x: Tensor, window: Window, fill: int = 0) -> Tensor:
    """A view of every window of a padded tensor [B, C, *spatial]: [B, C, *output spatial, *kernel]."""
    axes = len(window.kernel)
    if x.ndim != axes + 2:
        raise BadValueError(
            f"a window over {axes} axes needs an array [B, C, …] of {axes + 2} axes, not {tuple(x.shape)}"
        )
    out = window.output_shape(tuple(x.shape[2:]))
    sizes = [n + window.pads[i] + window.pads[axes + i] for i, n in enumerate(x.shape[2:])]
    inside = tuple(slice(window.pads[i], window.pads[i] + n) for i, n in enumerate(x.shape[2:]))
    padded = torch.full((*x.shape[:2], *sizes), fill, dtype=torch.int64, device=x.device)
    padded[(slice(None), slice(None), *inside)] = x.to(torch.int64)
    strides = padded.stride()
    steps = [s * v for s, v in zip(strides[2:], window.strides, strict=True)]
    taps = [s * v for s, v in zip(strides[2:], window.dilations, strict=True)]
    return padded.as_strided((*x.shape[:2], *out, *window.kernel), (*strides[:2], *steps, *taps))


def check_convolution(x: Tensor, w: Tensor, plan: DotPlan, window: Window, groups: int) -> None:
    """Refuse operands of a convolution that do not fit together or their formats."""
    check(x, plan.activation, "activations")
    check(w, plan.weight, "weights")
    axes = len(window.kernel)
    if w.ndim != axes + 2 or tuple(w.shape[2:]) != window.kernel:
        raise BadValueError(f"weights {tuple(w.shape)} do not fit a kernel of {window.kernel}")
    if groups < 1 or x.ndim < 2 or x.shape[1] != w.shape[1] * groups or w.shape[0] % groups:
        raise BadValueError(f"input {tuple(x.shape)}, weights {tuple(w.shape)} and {groups} groups do not fit together")
    if x.ndim != axes + 2:
        raise BadValueError(
            f"a window over {axes} axes needs an array [B, C, …] of {axes + 2} axes, not {tuple(x.shape)}"
        )


def convolution(
    x: Tensor,
    w: Tensor,
    bias: Any,
    plan: DotPlan,
    window: Window,
    groups: int = 1,
    counts: Counts | None = None,
) -> Tensor:
    """Convolution (spec 7.1); see :func:`lnsdeploy.emulator.reference.convolution`."""
    check_convolution(x, w, plan, window, groups)
    axes, outputs, inputs = len(window.kernel), w.shape[0], w.shape[1]
    start = start_values(bias, outputs)
    sizes = window.output_shape(tuple(x.shape[2:]))
    result = torch.empty((x.shape[0], outputs, *sizes), dtype=word_dtype(plan.output), device=x.device)
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    positions, depth, each = int(np.prod(sizes)), inputs * int(np.prod(window.kernel)), outputs // groups
    # the matrix of windows is many times larger than the images
    images = max(1, _BLOCK_ELEMENTS // max(depth * positions, 1))
    for first in range(0, x.shape[0], images):
        view = windows(x[first : first + images], window)
        for group in range(groups):
            part = slice(group * each, (group + 1) * each)
            patches = view[:, group * inputs : (group + 1) * inputs].permute(order)
            rows = dot(
                patches.reshape(view.shape[0] * positions, depth).to(word_dtype(plan.activation)),
                w[part].reshape(each, depth),
                None if start is None else start[part],
                plan.channels(part),
                counts,
            )
            result[first : first + images, part] = rows.reshape(view.shape[0], *sizes, each).movedim(-1, 1)
    return result


# ---------------------------------------------------------------------------------------------------
# Encode and decode (spec 2)


def _tabulated(fmt: LNSFormat) -> bool:
    return fmt.bits <= _MAX_TABLE_BITS


@lru_cache(maxsize=64)
def _thresholds(fmt: LNSFormat, offset: int, underflow: str, device: torch.device) -> Tensor:
    return torch.from_numpy(operands.encode_thresholds(fmt, offset, underflow)).to(device)


def encode(x: Tensor, fmt: LNSFormat, offset: int, underflow: str = "zero") -> Tensor:
    """Words of float32 numbers, to nearest (spec 2.1, 2.4); negative ones into an unsigned format are taken as 0.

    Raises:
        BadValueError: NaN in `x`.
    """
    x = x.to(torch.float32)
    if bool(torch.isnan(x).any()):
        raise BadValueError("NaN has no LNS word")
    if not _tabulated(fmt):
        words = formats.encode(_to_numpy(x), fmt, offset, underflow=underflow, negative="clip")  # type: ignore[arg-type]
        return _from_numpy(words, x.device)
    minus = x < 0
    magnitudes = x.abs() if fmt.signed else x.clamp(min=0)
    codes = torch.searchsorted(_thresholds(fmt, offset, underflow, x.device), magnitudes, right=True)
    return _join(codes, minus if fmt.signed else torch.zeros_like(minus), fmt)


@lru_cache(maxsize=64)
def _values(fmt: LNSFormat, offset: int, device: torch.device) -> Tensor:
    return torch.from_numpy(operands.decode_values(fmt, offset)).to(device)


def decode(words: Tensor, fmt: LNSFormat, offset: int) -> Tensor:
    """The float32 values of words (spec 2.5)."""
    if not _tabulated(fmt):
        return _from_numpy(formats.decode(_to_numpy(words), fmt, offset), words.device)
    return _values(fmt, offset, words.device)[words.to(torch.int64)]


# ---------------------------------------------------------------------------------------------------
# Other operations (spec 6)


def _keys(words: Tensor, fmt: LNSFormat) -> Tensor:
    codes, signs = _split(words, fmt)
    return torch.where(signs, -codes, codes)


def _from_keys(keys: Tensor, fmt: LNSFormat) -> Tensor:
    return _join(keys.abs(), keys < 0, fmt)


def relu(words: Tensor, fmt: LNSFormat) -> Tensor:
    """Negative words become zero (spec 6.1)."""
    return _from_keys(_keys(words, fmt).clamp(min=0), fmt)


def negate(words: Tensor, fmt: LNSFormat) -> Tensor:
    """The other sign; zero stays (spec 6.1). Unsigned formats have no negative words."""
    if not fmt.signed:
        raise BadValueError(f"words of the unsigned format {fmt} cannot be negated")
    return _from_keys(-_keys(words, fmt), fmt)


def maximum(a: Tensor, b: Tensor, fmt: LNSFormat) -> Tensor:
    """Element-wise larger value of words that share an offset (spec 6.1)."""
    return _from_keys(torch.maximum(_keys(a, fmt), _keys(b, fmt)), fmt)


def minimum(a: Tensor, b: Tensor, fmt: LNSFormat) -> Tensor:
    """Element-wise smaller value of words that share an offset (spec 6.1)."""
    return _from_keys(torch.minimum(_keys(a, fmt), _keys(b, fmt)), fmt)


def clip(words: Tensor, fmt: LNSFormat, low: int, high: int) -> Tensor:
    """Words limited to the values of two words (spec 6.1)."""
    keys = [-(w & fmt.max_code) if w & fmt.sign_bit else w & fmt.max_code for w in (int(low), int(high))]
    return _from_keys(_keys(words, fmt).clamp(*keys), fmt)


def max_pool(x: Tensor, fmt: LNSFormat, window: Window) -> Tensor:
    """Largest value of each window (spec 6.1)."""
    axes = tuple(range(-len(window.kernel), 0))
    inside = windows(torch.ones((1, 1, *x.shape[2:]), dtype=torch.int64), window)
    if not bool(inside.amax(axes).all()):
        raise BadValueError("a window of the max pooling holds padding only: use smaller pads")
    view = windows(_keys(x, fmt), window, -(fmt.max_code + 1))
    return _from_keys(view.amax(axes), fmt)


def add(a: Tensor, b: Tensor, plan: AddPlan, counts: Counts | None = None) -> Tensor:
    """Element-wise sum by the log adder (spec 6.4), with broadcasting."""
    check(a, plan.a, "first operand")
    check(b, plan.b, "second operand")
    part = plan.accumulator
    delta = _deltas(part, plan.output.gamma, a.device)
    entered = []
    for words, fmt, offset in ((a, plan.a, plan.a_offset), (b, plan.b, plan.b_offset)):
        codes, signs = _split(words, fmt)
        entered.append((_enter(codes, codes == 0, offset - plan.acc_offset, part), signs))
    codes, signs = log_add(entered[0], entered[1], delta, part.max_code)
    left = _leave(codes, part) + plan.acc_offset - plan.output_offset
    return _limited(left, signs, codes == 0, plan.output, plan.underflow, counts)


def sum_window(x: Tensor, plan: PoolPlan, window: Window, counts: Counts | None = None) -> Tensor:
    """Sum of each window by the log adder (spec 6.5)."""
    return _pool(x, plan, window, None, counts)


def average_pool(
    x: Tensor, plan: PoolPlan, window: Window, count_include_pad: bool = False, counts: Counts | None = None
) -> Tensor:
    """Average of each window by the log adder (spec 6.5)."""
    logs = reference.log_counts(tuple(x.shape[2:]), plan, window, count_include_pad)
    return _pool(x, plan, window, _tensor(logs, x.device), counts)


def _pool(x: Tensor, plan: PoolPlan, window: Window, divisor: Tensor | None, counts: Counts | None) -> Tensor:
    part = plan.accumulator
    delta = _deltas(part, plan.input.gamma, x.device)
    view = windows(x, window)
    shape = view.shape[: 2 + len(window.kernel)]
    taps = [np.unravel_index(k, window.kernel) for k in range(int(np.prod(window.kernel)))]

    def entry(k: int) -> Coded:
        tap: tuple[Any, ...] = (..., *(int(i) for i in taps[k]))
        codes, signs = _split(view[tap], plan.input)
        entered = _enter(codes, codes == 0, plan.input_offset - plan.acc_offset, part)
        return entered, signs & (entered > 0)

    nothing = (
        torch.zeros(shape, dtype=torch.int64, device=x.device),
        torch.zeros(shape, dtype=torch.bool, device=x.device),
    )
    codes, signs = _reduce(entry, len(taps), nothing, part, delta)
    if divisor is not None:
        codes = torch.where(codes == 0, 0, (codes - divisor).clamp(min=0))
    left = _leave(codes, part) + plan.acc_offset - plan.output_offset
    return _limited(left, signs, codes == 0, plan.output, plan.underflow, counts)


def rescale(words: Tensor, plan: RescalePlan, counts: Counts | None = None) -> Tensor:
    """Words of another format or offset (spec 6.3)."""
    codes, signs = _split(words, plan.input)
    zero = codes == 0
    at = codes + plan.input_offset
    if plan.output.gamma % plan.input.gamma == 0:
        at = at * (plan.output.gamma // plan.input.gamma)
    else:
        ratio = plan.input.gamma // plan.output.gamma
        at = torch.div(2 * at + ratio, 2 * ratio, rounding_mode="floor")
    made = _limited(at - plan.output_offset, signs, zero, plan.output, plan.underflow, counts)
    nothing = zero if plan.output.signed else zero | signs
    return torch.where(nothing, 0, made.to(torch.int64)).to(made.dtype)


def product(a: Tensor, b: Tensor, plan: MultiplyPlan, counts: Counts | None = None) -> Tensor:
    """Element-wise product of words (spec 6.2); see :func:`lnsdeploy.emulator.reference.product`."""
    check(a, plan.a, "first operand")
    check(b, plan.b, "second operand")
    (x, x_signs), (y, y_signs) = _split(a, plan.a), _split(b, plan.b)
    codes = x + y + plan.code_shift
    return _limited(codes, x_signs != y_signs, (x == 0) | (y == 0), plan.output, plan.underflow, counts)


def multiply(
    a: Tensor, b: Tensor, fmt: LNSFormat, a_offset: int, b_offset: int, offset: int, underflow: str = "zero"
) -> Tensor:
    """Element-wise product of words of one format: codes add (spec 6.2)."""
    (x, x_signs), (y, y_signs) = _split(a, fmt), _split(b, fmt)
    codes = x + y + (a_offset + b_offset - offset)
    return _limited(codes, x_signs != y_signs, (x == 0) | (y == 0), fmt, underflow, None)


def divide(
    a: Tensor, b: Tensor, fmt: LNSFormat, a_offset: int, b_offset: int, offset: int, underflow: str = "zero"
) -> Tensor:
    """Element-wise quotient of words of one format: codes subtract; x/0 is the largest code (spec 6.2)."""
    (x, x_signs), (y, y_signs) = _split(a, fmt), _split(b, fmt)
    codes = torch.where(y == 0, fmt.max_code, x - y + (a_offset - b_offset - offset))
    return _limited(codes, x_signs != y_signs, (x == 0) & (y != 0), fmt, underflow, None)


def square_root(words: Tensor, fmt: LNSFormat, offset: int, output_offset: int, underflow: str = "zero") -> Tensor:
    """Square root: the code is halved (spec 6.2).

    Raises:
        BadValueError: a word is negative.
    """
    codes, signs = _split(words, fmt)
    if bool(signs.any()):
        raise BadValueError("the square root of a negative word is not defined")
    return _limited(((codes + offset + 1) >> 1) - output_offset, signs, codes == 0, fmt, underflow, None)
