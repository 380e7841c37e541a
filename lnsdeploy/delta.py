"""The ways to make Δ, the table at the heart of an LNS adder (docs/datapath.md, 5.7).

With d the difference of two codes, the Gaussian logarithms are
Δ⁺(d) = γ·log2(1 + 2^(−d/γ)) and Δ⁻(d) = −γ·log2(1 − 2^(−d/γ)). Every method is a frozen dataclass that
turns the accumulator's γ into two integer tables; whatever hardware builds, Δ is a function of the
integer d alone, so a table is all that an executor needs. To add a method, subclass :class:`Delta`,
define `kind` and `tables`, and register it in `METHODS`; see CONTRIBUTING.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
from mpmath import libmp

from lnsdeploy import tables
from lnsdeploy.errors import BadValueError
from lnsdeploy.fields import check_choice, check_integer, check_power_of_two, plain_integers

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class DeltaTables:
    """Δ⁺ and Δ⁻ by d, in units of 1/γ_acc; both are zero past their last entry.

    Args:
        plus: int64, entry d for d = 0 ….
        minus: int64; entry 0 is never used by an adder (equal codes of different sign cancel exactly).
    """

    plus: Ints
    minus: Ints

    @cached_property
    def signed(self) -> Ints:
        """int64 [2, D + 1]: row 0 is +Δ⁺, row 1 is −Δ⁻, both by d with zeros past their ends."""
        both = np.zeros((2, max(len(self.plus), len(self.minus)) + 1), dtype=np.int64)
        both[0, : len(self.plus)] = self.plus
        both[1, : len(self.minus)] = -self.minus
        return both


def _past_end(table: Ints) -> Ints:
    return np.append(table, np.int64(0))


def _trim(values: Ints) -> Ints:
    """Without the zeros at the end, and without negative values (spec 5.7)."""
    values = np.maximum(values, 0)
    used = np.flatnonzero(values)
    return values[: used[-1] + 1 if used.size else 0].astype(np.int64)


@dataclass(frozen=True)
class Delta:
    """Base of the methods: a method is data, its tables follow from it and from γ_acc."""

    kind: ClassVar[str]

    def __post_init__(self) -> None:
        plain_integers(self)

    def tables(self, gamma_acc: int) -> DeltaTables:
        """The tables for an accumulator with `gamma_acc` codes per octave; made once, then cached."""
        return _cached_tables(self, gamma_acc)

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        """Δ⁺ and Δ⁻ as the method defines them; overridden by each."""
        raise NotImplementedError

    def table_entries(self, gamma_acc: int) -> int:
        """Words that hardware would store for Δ⁺ and Δ⁻ together; 0 where logic alone suffices."""
        made = self.tables(gamma_acc)
        return len(made.plus) + len(made.minus)


@lru_cache(maxsize=64)
def _cached_tables(method: Delta, gamma_acc: int) -> DeltaTables:
    plus, minus = method.make(gamma_acc)
    result = DeltaTables(_trim(plus), _trim(minus))
    result.plus.setflags(write=False)
    result.minus.setflags(write=False)
    return result


def _sampled(exact: Ints, d: Ints, minus: bool) -> Ints:
    """The exact table at d; Δ⁻ at 0, where it is infinite, is taken at 1 (spec 5.7.2)."""
    if minus:
        d = np.maximum(d, 1)
    return _past_end(exact)[np.minimum(d, len(exact))]


@dataclass(frozen=True)
class Exact(Delta):
    """Correctly rounded for every d up to where it vanishes (spec 5.7.1)."""

    kind: ClassVar[str] = "exact"

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        return tables.delta_plus(gamma_acc), tables.delta_minus(gamma_acc)


@dataclass(frozen=True)
class Table(Delta):
    """A table of `entries` exact values, one per `step` codes (spec 5.7.2; Sanyal et al. 2020).

    Args:
        entries: 1 to 65536.
        step: a power of two, in codes of γ_acc.
        sample: where in a step the value is taken, ``"left"`` edge or ``"middle"``.
    """

    entries: int
    step: int = 1
    sample: str = "left"
    kind: ClassVar[str] = "table"

    def __post_init__(self) -> None:
        check_integer("entries", self.entries, 1, 1 << 16)
        check_power_of_two("step", self.step, 1 << 24)
        check_choice("sample", self.sample, ("left", "middle"))
        super().__post_init__()

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        at = np.arange(self.entries, dtype=np.int64) * self.step
        if self.sample == "middle":
            at += self.step // 2
        made = []
        for exact, minus in ((tables.delta_plus(gamma_acc), False), (tables.delta_minus(gamma_acc), True)):
            made.append(np.repeat(_sampled(exact, at, minus), self.step))
        return made[0], made[1]

    def table_entries(self, gamma_acc: int) -> int:
        return 2 * self.entries


def segments_of(end: int, segments: int, spacing: str) -> Iterator[tuple[int, int]]:
    """(start, width) of each segment that covers d = 0 … end − 1 (spec 5.7.10)."""
    if spacing == "equal":
        width = 1
        while segments * width < end:
            width *= 2
        for start in range(0, end, width):
            yield start, width
        return
    for start in range(min(segments, end)):
        yield start, 1
    octave = segments
    while octave < end:
        width = octave // segments
        for start in range(octave, min(2 * octave, end), width):
            yield start, width
        octave *= 2


def _check_segments(segments: int, spacing: str) -> None:
    check_power_of_two("segments", segments, 1 << 12)
    check_choice("spacing", spacing, ("equal", "octave"))


@dataclass(frozen=True)
class Interpolated(Delta):
    """A value and a slope per segment, the product truncated (spec 5.7.3; Coleman et al. 2008).

    Args:
        segments: a power of two; in all, or per octave of d.
        spacing: ``"equal"`` segments, or ``"octave"``-wise.
        slope_bits: fraction bits of the slopes, 1 to 24.
    """

    segments: int
    spacing: str = "octave"
    slope_bits: int = 8
    kind: ClassVar[str] = "interpolated"

    def __post_init__(self) -> None:
        _check_segments(self.segments, self.spacing)
        check_integer("slope_bits", self.slope_bits, 1, 24)
        super().__post_init__()

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        made = []
        for exact, minus in ((tables.delta_plus(gamma_acc), False), (tables.delta_minus(gamma_acc), True)):
            end = len(exact)
            values = np.zeros(end, dtype=np.int64)
            for start, width in segments_of(end, self.segments, self.spacing):
                ends = _sampled(exact, np.array([start, start + width]), minus)
                first, last = int(ends[0]), int(ends[1])
                slope = (((first - last) << (self.slope_bits + 1)) + width) // (2 * width)
                inside = np.arange(min(width, end - start), dtype=np.int64)
                values[start : start + width] = first - ((slope * inside) >> self.slope_bits)
            made.append(values)
        return made[0], made[1]

    def table_entries(self, gamma_acc: int) -> int:
        exact = tables.delta_plus(gamma_acc), tables.delta_minus(gamma_acc)
        return sum(2 * len(list(segments_of(len(e), self.segments, self.spacing))) for e in exact)


@dataclass(frozen=True)
class Cotransform(Delta):
    """Δ⁻ near its singularity from two small tables and Δ⁺ (spec 5.7.4; Arnold et al. 1998).

    Args:
        split: j, 1 to 20: the low j bits of d index one table, the rest the other.
    """

    split: int
    kind: ClassVar[str] = "cotransform"

    def __post_init__(self) -> None:
        check_integer("split", self.split, 1, 20)
        super().__post_init__()

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        plus, exact = tables.delta_plus(gamma_acc), tables.delta_minus(gamma_acc)
        d = np.arange(len(exact), dtype=np.int64)
        low = d & ((1 << self.split) - 1)
        high = d - low
        from_high = _sampled(exact, high, True)
        from_low = _sampled(exact, low, True)
        x, y = from_high, high + from_low
        both = np.minimum(x, y) - _past_end(plus)[np.minimum(np.abs(x - y), len(plus))]
        return plus, np.where(high == 0, from_low, np.where(low == 0, from_high, both))

    def table_entries(self, gamma_acc: int) -> int:
        end = len(tables.delta_minus(gamma_acc))
        return len(tables.delta_plus(gamma_acc)) + min(end, 1 << self.split) - 1 + (end >> self.split)


@dataclass(frozen=True)
class Mitchell(Delta):
    """Mitchell's antilogarithm and log2(1 ± z) ≈ ±z: a shift, no table (spec 5.7.5; Mitchell 1962)."""

    kind: ClassVar[str] = "mitchell"

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        quotient, remainder = np.divmod(_until_shifted_out(gamma_acc, 2 * gamma_acc), gamma_acc)
        values = (2 * gamma_acc - remainder) >> (quotient + 1)
        return values, values

    def table_entries(self, gamma_acc: int) -> int:
        return 0


@dataclass(frozen=True)
class Shift(Delta):
    """A constant, γ·log2 e, shifted by the integer part of d (spec 5.7.6; Sanyal et al. 2020)."""

    kind: ClassVar[str] = "shift"

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        constant = scaled_log2_e(gamma_acc)
        values = constant >> (_until_shifted_out(gamma_acc, constant) // gamma_acc)
        return values, values

    def table_entries(self, gamma_acc: int) -> int:
        return 0


def _until_shifted_out(gamma_acc: int, constant: int) -> Ints:
    return np.arange(gamma_acc * (constant.bit_length() + 1), dtype=np.int64)


def _fixed(value: Any, bits: int) -> int:
    """round(value·2^bits) of a libmp number that carries many more bits than that."""
    return (int(libmp.to_fixed(value, bits + 1)) + 1) >> 1


def scaled_log2_e(gamma_acc: int) -> int:
    """round(γ·log2 e)."""
    precision = 64 + gamma_acc.bit_length()
    inverse = libmp.mpf_div(libmp.fone, libmp.mpf_ln2(precision), precision)
    return _fixed(libmp.mpf_mul(inverse, libmp.from_int(gamma_acc)), 0)


@dataclass(frozen=True)
class Polynomial(Delta):
    """Fixed-point Horner evaluation per segment, truncating after each product (spec 5.7.7).

    Args:
        degree: 1 to 6.
        segments, spacing: as for :class:`Interpolated`.
        width: fraction bits of the coefficients, 0 to 30.
    """

    degree: int = 2
    segments: int = 4
    spacing: str = "octave"
    width: int = 8
    kind: ClassVar[str] = "polynomial"

    def __post_init__(self) -> None:
        check_integer("degree", self.degree, 1, 6)
        _check_segments(self.segments, self.spacing)
        check_integer("width", self.width, 0, 30)
        super().__post_init__()

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        made = []
        for exact, minus in ((tables.delta_plus(gamma_acc), False), (tables.delta_minus(gamma_acc), True)):
            end = len(exact)
            values = np.zeros(end, dtype=np.int64)
            for start, width in segments_of(end, self.segments, self.spacing):
                coefficients = self._coefficients(gamma_acc, start, width, minus)
                inside = np.arange(min(width, end - start), dtype=np.int64)
                horner = np.full(inside.shape, coefficients[-1], dtype=np.int64)
                for coefficient in coefficients[-2::-1]:
                    horner = ((horner * inside) >> (width.bit_length() - 1)) + coefficient
                values[start : start + width] = (horner + ((1 << self.width) >> 1)) >> self.width
            made.append(values)
        return made[0], made[1]

    def _coefficients(self, gamma_acc: int, start: int, width: int, minus: bool) -> list[int]:
        precision = 128 + 2 * gamma_acc.bit_length()

        def value(d: Any) -> Any:
            return real_delta(gamma_acc, d, minus, precision)

        if width == 1:
            only = _fixed(value(libmp.from_int(max(start, 1) if minus else start)), self.width)
            return [only] + [0] * self.degree
        count = self.degree + 1
        # Chebyshev nodes in u ∈ (0, 1), then Newton's divided differences, then powers of u
        nodes = []
        for i in range(count):
            angle = libmp.mpf_mul(libmp.mpf_pi(precision), libmp.from_rational(2 * i + 1, 2 * count, precision))
            cosine = libmp.mpf_cos(angle, precision)
            nodes.append(libmp.mpf_shift(libmp.mpf_sub(libmp.fone, cosine, precision), -1))
        table = [
            value(libmp.mpf_add(libmp.from_int(start), libmp.mpf_mul(u, libmp.from_int(width)), precision))
            for u in nodes
        ]
        for order in range(1, count):
            for i in range(count - 1, order - 1, -1):
                rise = libmp.mpf_sub(table[i], table[i - 1], precision)
                table[i] = libmp.mpf_div(rise, libmp.mpf_sub(nodes[i], nodes[i - order], precision), precision)
        powers = [libmp.fzero] * count
        for i in range(count - 1, -1, -1):
            # powers ← powers·(u − node_i) + table[i]
            shifted = [libmp.fzero, *powers[:-1]]
            scaled = [libmp.mpf_mul(p, nodes[i], precision) for p in powers]
            powers = [libmp.mpf_sub(a, b, precision) for a, b in zip(shifted, scaled, strict=True)]
            powers[0] = libmp.mpf_add(powers[0], table[i], precision)
        return [_fixed(p, self.width) for p in powers]

    def table_entries(self, gamma_acc: int) -> int:
        exact = tables.delta_plus(gamma_acc), tables.delta_minus(gamma_acc)
        count = sum(len(list(segments_of(len(e), self.segments, self.spacing))) for e in exact)
        return (self.degree + 1) * count


def real_delta(gamma_acc: int, d: Any, minus: bool, precision: int) -> Any:
    """The real Δ⁺ or Δ⁻ at a real d (libmp numbers), in units of 1/γ_acc."""
    gamma = libmp.from_int(gamma_acc)
    power = libmp.mpf_pow(libmp.ftwo, libmp.mpf_neg(libmp.mpf_div(d, gamma, precision)), precision)
    inner = (libmp.mpf_sub if minus else libmp.mpf_add)(libmp.fone, power, precision)
    log2 = libmp.mpf_div(libmp.mpf_log(inner, precision), libmp.mpf_ln2(precision), precision)
    result = libmp.mpf_mul(gamma, log2, precision)
    return libmp.mpf_neg(result) if minus else result


@dataclass(frozen=True)
class CordicConstants:
    """Constants of :class:`Cordic` in its fixed point: LN2, INV, A[i] and X0 of spec 5.7.8."""

    ln2: int
    inverse: int
    angles: list[int]
    start: int


@dataclass(frozen=True)
class Cordic(Delta):
    """Hyperbolic CORDIC in fixed point: exponential by rotation, logarithm by vectoring (spec 5.7.8).

    Args:
        iterations: 1 to 48; indices 4, 13 and 40 count twice.
        width: fraction bits, 4 to 48.
    """

    iterations: int
    width: int = 16
    kind: ClassVar[str] = "cordic"

    def __post_init__(self) -> None:
        check_integer("iterations", self.iterations, 1, 48)
        check_integer("width", self.width, 4, 48)
        super().__post_init__()

    def constants(self) -> CordicConstants:
        """What the iterations add and begin with."""
        w, precision = self.width, self.width + 80
        indices = _cordic_indices(self.iterations)
        gain = Fraction(1)
        for i in indices:
            gain *= 1 - Fraction(1, 1 << (2 * i))
        root = libmp.mpf_sqrt(libmp.from_rational(gain.denominator, gain.numerator, precision), precision)
        return CordicConstants(
            ln2=_fixed(libmp.mpf_ln2(precision), w),
            inverse=_fixed(libmp.mpf_div(libmp.fone, libmp.mpf_ln2(precision), precision), w),
            angles=[_fixed(_atanh(i, precision), w) for i in indices],
            start=_fixed(root, w),
        )

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        w, one = self.width, 1 << self.width
        indices = _cordic_indices(self.iterations)
        constants = self.constants()
        ln2, inverse, angles, start = constants.ln2, constants.inverse, constants.angles, constants.start
        made = []
        for end, sign in (
            (len(tables.delta_plus(gamma_acc)), 1),
            (len(tables.delta_minus(gamma_acc)), -1),
        ):
            quotient, remainder = np.divmod(np.arange(end, dtype=np.int64), gamma_acc)
            x = np.full(end, start, dtype=np.int64)
            y = np.zeros(end, dtype=np.int64)
            # r < γ and LN2 < 2^w, so the product stays below 2^(26 + 48): Python integers where it must
            theta = (remainder.astype(object) * ln2) // gamma_acc
            x, y, _ = _cordic(x, y, theta.astype(np.int64), indices, angles, lambda x, y, z: z >= 0)
            u = np.maximum(x - y, 0) >> np.minimum(quotient, 62)
            v = np.maximum(one + sign * u, 1)
            normalise = np.zeros(end, dtype=np.int64)
            while (short := v < one).any():
                v[short] <<= 1
                normalise[short] += 1
            x, y = v + one, v - one
            _, _, z = _cordic(x, y, np.zeros(end, dtype=np.int64), indices, angles, lambda x, y, z: y < 0)
            log = 2 * z - normalise * ln2
            scaled = sign * log.astype(object) * (gamma_acc * inverse)
            made.append(((scaled + (1 << (2 * w - 1))) >> (2 * w)).astype(np.int64))
        return made[0], made[1]

    def table_entries(self, gamma_acc: int) -> int:
        return self.iterations


def _cordic_indices(count: int) -> list[int]:
    indices: list[int] = []
    i = 1
    while len(indices) < count:
        indices += [i, i] if i in (4, 13, 40) else [i]
        i += 1
    return indices[:count]


def _atanh(i: int, precision: int) -> Any:
    """atanh 2^−i = ½·ln((2^i + 1)/(2^i − 1))."""
    ratio = libmp.from_rational((1 << i) + 1, (1 << i) - 1, precision)
    return libmp.mpf_shift(libmp.mpf_log(ratio, precision), -1)


def _cordic(
    x: Ints,
    y: Ints,
    z: Ints,
    indices: list[int],
    angles: list[int],
    positive: Callable[[Ints, Ints, Ints], npt.NDArray[np.bool_]],
) -> tuple[Ints, Ints, Ints]:
    for i, angle in zip(indices, angles, strict=True):
        sigma = np.where(positive(x, y, z), 1, -1)
        x, y, z = x + sigma * (y >> i), y + sigma * (x >> i), z - sigma * angle
    return x, y, z


@dataclass(frozen=True)
class Max(Delta):
    """Δ = 0: max-plus, the lower bound of what hardware can be (spec 5.7.9)."""

    kind: ClassVar[str] = "max"

    def make(self, gamma_acc: int) -> tuple[Ints, Ints]:
        nothing = np.zeros(0, dtype=np.int64)
        return nothing, nothing


METHODS: dict[str, type[Delta]] = {
    method.kind: method
    for method in (Exact, Table, Interpolated, Cotransform, Mitchell, Shift, Polynomial, Cordic, Max)
}


def check_gamma(gamma_acc: int) -> None:
    """Refuse a γ_acc whose exact tables would not fit in memory.

    Raises:
        BadValueError: above 2^17 codes per octave.
    """
    if gamma_acc > 1 << 17:
        raise BadValueError(
            f"gamma of the accumulator (gamma · 2^guard_bits) must be at most {1 << 17}, not {gamma_acc}"
        )
