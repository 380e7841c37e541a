"""Every table of the arithmetic, correctly rounded with integers (spec 2.1 to 2.3, 9.1).

The only irrational numbers an LNS needs are powers 2^(i/γ). They are computed here as integers with a
known error, and every table entry is decided by comparing such integers: no table depends on a
floating-point library, so every platform makes the same.
"""

from __future__ import annotations

import itertools
from fractions import Fraction
from functools import lru_cache

import numpy as np
import numpy.typing as npt
from mpmath import libmp

from lnsdeploy.errors import LNSError

# Bits beyond the wanted ones in the first attempt; doubled where an enclosure straddles a boundary.
_GUARD_BITS = 64


class _AmbiguousError(LNSError):
    """An enclosure straddles a rounding boundary: compute again with more bits."""


def fixed_root(numerator: int, denominator: int, bits: int) -> int:
    """floor(2^(bits + numerator/denominator)), within one unit."""
    whole, part = divmod(numerator, denominator)
    precision = bits + 40
    # mpmath's functions of explicit precision: its contexts are slow to make and global state is not safe
    exponent = libmp.from_rational(part, denominator, precision)
    return int(libmp.to_fixed(libmp.mpf_pow(libmp.ftwo, exponent, precision), bits + whole))


def powers(gamma: int, count: int, bits: int, *, half: bool = False, negative: bool = False) -> list[int]:
    """2^(bits ± (i + ½·half)/γ) for i < count, as integers.

    Entry i differs from the exact value by less than 2·i + 8 units (by much less where `negative`,
    where the values shrink).
    """
    sign = -1 if negative else 1
    # The step carries extra bits so that its own error stays below the rounding of each product.
    extra = max(count, 2).bit_length() + 8
    step = fixed_root(sign, gamma, bits + extra)
    value = fixed_root(sign, 2 * gamma, bits) if half else 1 << bits
    shift = bits + extra
    values = []
    for _ in range(count):
        values.append(value)
        value = (value * step) >> shift
    return values


def _certified(make: object, bits: int) -> list[int]:
    guard = _GUARD_BITS
    while True:
        try:
            return make(bits + guard, guard)  # type: ignore[operator, no-any-return]
        except _AmbiguousError:
            guard *= 2


def _ceil(value: int, error: int, drop: int) -> int:
    low, high = -((-(value - error)) >> drop), -((-(value + error)) >> drop)
    if low != high:
        raise _AmbiguousError
    return low


def _nearest(value: int, error: int, drop: int) -> int:
    half = 1 << (drop - 1)
    low, high = (value - error + half) >> drop, (value + error + half) >> drop
    if low != high:
        raise _AmbiguousError
    return low


@lru_cache(maxsize=32)
def octave_thresholds(gamma: int, bits: int, kind: str) -> npt.NDArray[np.uint64]:
    """The γ thresholds of one octave for significands of `bits` fraction bits (spec 2.1, 2.2).

    Entry i is the smallest integer not below 2^bits times

    - `"nearest"`: 2^((i + ½)/γ), where rounding to nearest in the log domain passes from i to i + 1;
    - `"linear"`: (2^(i/γ) + 2^((i+1)/γ))/2, where rounding in the linear domain does;
    - `"floor"`: 2^((i + 1)/γ), where truncation does.

    Returns: uint64 [γ], non-decreasing.
    """

    def make(precision: int, guard: int) -> list[int]:
        if kind == "nearest":
            values = powers(gamma, gamma, precision, half=True)
        elif kind == "floor":
            values = powers(gamma, gamma, precision)[1:]
            exact_last = 2 << precision
            return [_ceil(v, 2 * i + 10, guard) for i, v in enumerate(values)] + [exact_last >> guard]
        elif kind == "linear":
            if gamma == 1:
                return [3 << (bits - 1)]
            grid = [*powers(gamma, gamma, precision), 2 << precision]
            values = [(a + b) >> 1 for a, b in itertools.pairwise(grid)]
        else:
            raise LNSError(f"no thresholds of kind {kind!r}")
        return [_ceil(v, 2 * i + 12, guard) for i, v in enumerate(values)]

    return np.array(_certified(make, bits), dtype=np.uint64)


@lru_cache(maxsize=32)
def octave_significands(gamma: int, bits: int) -> npt.NDArray[np.uint64]:
    """The integers nearest to 2^(bits + i/γ), i < γ: significands for decoding (spec 2.5).

    Returns: uint64 [γ]; an entry may round up to 2^(bits + 1).
    """

    def make(precision: int, guard: int) -> list[int]:
        values = powers(gamma, gamma, precision)
        return [1 << bits] + [_nearest(v, 2 * i + 8, guard) for i, v in enumerate(values) if i]

    return np.array(_certified(make, bits), dtype=np.uint64)


def octave_significand(gamma: int, bits: int, index: int, *, floor: bool = False) -> int:
    """One entry of :func:`octave_significands` (or, with `floor`, the integer part), for 0 ≤ index < γ.

    `bits` may be zero or negative, to round values below one.
    """
    if index == 0:
        return 1 << bits if bits >= 0 else 0
    guard = _GUARD_BITS + max(-bits, 0)
    value = fixed_root(index, gamma, bits + guard)
    return value >> guard if floor else _nearest(value, 2, guard)


@lru_cache(maxsize=64)
def remainder_constants(table_bits: int, constant_bits: int) -> npt.NDArray[np.int64]:
    """T[i] = round(2^m · 2^(i/2^t)) (spec 4.1).

    Args:
        table_bits: t, so that the table has 2^t entries.
        constant_bits: m, the fraction bits of an entry.
    Returns: int64 [2^t].
    """
    return octave_significands(1 << table_bits, constant_bits).astype(np.int64)


def _at_least(table: list[int], value: int, error: int) -> int:
    """How many entries of a non-increasing `table` are at least `value` (both with `error` doubt)."""
    low, high = 0, len(table)
    while low < high:
        middle = (low + high) // 2
        if table[middle] >= value:
            low = middle + 1
        else:
            high = middle
    for index in (low - 1, low):
        if 0 <= index < len(table) and abs(table[index] - value) <= error:
            raise _AmbiguousError
    return low


@lru_cache(maxsize=32)
def delta_plus(gamma: int) -> npt.NDArray[np.int64]:
    """Δ⁺(d) = round(γ·log2(1 + 2^(−d/γ))) for d = 0 … up to its last non-zero entry (spec 5.2).

    Returns: int64, non-increasing, first entry γ, last entry ≥ 1.
    """
    return _delta(gamma, plus=True)


@lru_cache(maxsize=32)
def delta_minus(gamma: int) -> npt.NDArray[np.int64]:
    """Δ⁻(d) = round(−γ·log2(1 − 2^(−d/γ))) for d = 1 …; entry 0 repeats entry 1 (never used by an adder).

    Returns: int64, non-increasing, last entry ≥ 1.
    """
    return _delta(gamma, plus=False)


def _delta(gamma: int, *, plus: bool) -> npt.NDArray[np.int64]:
    # Δ(d) ≥ v ⟺ (v − ½)/γ ≤ ±log2(1 ± 2^(−d/γ)) ⟺ 2^(−d/γ) ≥ ±(2^(±(v−½)/γ) − 1): both sides are
    # powers of two, so merging two sorted lists of integers gives the correctly rounded table.
    log_gamma = gamma.bit_length()
    reach = gamma * (log_gamma + 3) + 4

    def make(precision: int, guard: int) -> list[int]:
        one = 1 << precision
        arguments = powers(gamma, reach, precision, negative=True)
        error = 4 * reach + 64
        if plus:
            count = gamma
            bounds = [p - one for p in powers(gamma, count, precision, half=True)]
        else:
            # the largest value is Δ⁻(1) < γ·log2(2γ) + 1
            count = gamma * (log_gamma + 2) + 2
            bounds = [one - p for p in powers(gamma, count, precision, half=True, negative=True)]
        # how many d have Δ(d) ≥ v, for v = 1, 2, …; the table then counts the v that each d reaches
        reached = [_at_least(arguments, bound, error) for bound in bounds]
        values = []
        v = count
        for d in range(reach):
            while v > 0 and reached[v - 1] <= d:
                v -= 1
            if v == 0:
                break
            values.append(v)
        if plus:
            values[0] = gamma  # log2(2), exactly
        return values

    # Near d = γ (and d = 0) the exact value is an integer, well away from every v − ½.
    values = np.array(_certified(make, 2 * log_gamma + 24), dtype=np.int64)
    if not plus:
        # d = 0 never reaches Δ⁻ (exact cancellation gives zero); keep the table defined there.
        values[0] = values[1] if len(values) > 1 else 0
    return values


def rounded_log2(value: Fraction, scale: int) -> int:
    """The integer nearest to scale·log2(value), for a positive rational `value`.

    The logarithm of a rational is an integer multiple of 1/2 only at powers of two, where it is exact.
    """
    return _log2(value, scale, ceil=False)


def ceil_log2(value: Fraction, scale: int) -> int:
    """The smallest integer not below scale·log2(value), for a positive rational `value`."""
    return _log2(value, scale, ceil=True)


def _log2(value: Fraction, scale: int, *, ceil: bool) -> int:
    top, bottom = value.numerator, value.denominator
    if top & (top - 1) == 0 and bottom & (bottom - 1) == 0:
        return scale * (top.bit_length() - bottom.bit_length())
    precision = 128 + 2 * scale.bit_length() + max(top.bit_length(), bottom.bit_length()).bit_length()
    while True:
        ln_top = libmp.mpf_log(libmp.from_int(top), precision)
        ln_bottom = libmp.mpf_log(libmp.from_int(bottom), precision)
        ratio = libmp.mpf_div(libmp.mpf_sub(ln_top, ln_bottom), libmp.mpf_ln2(precision), precision)
        # decided unless a boundary is nearer than the error
        fixed = int(libmp.to_fixed(libmp.mpf_mul(ratio, libmp.from_int(scale)), precision // 2))
        unit = 1 << (precision // 2)
        if not ceil:
            fixed += unit // 2
        below, rest = divmod(fixed, unit)
        if 4 < rest < unit - 4:
            return below + 1 if ceil else below
        precision *= 2


@lru_cache(maxsize=64)
def log_table(gamma: int, index_bits: int) -> npt.NDArray[np.int64]:
    """round(γ·log2(1 + (j + ½)/2^n)), j < 2^n: the table of the `table` accumulator encoder (spec 4.6).

    Returns: int64 [2^n].
    """
    n = index_bits
    return np.array(
        [rounded_log2(Fraction((1 << (n + 1)) + 2 * j + 1, 1 << (n + 1)), gamma) for j in range(1 << n)],
        dtype=np.int64,
    )
