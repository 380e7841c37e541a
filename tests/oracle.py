"""A second reading of docs/datapath.md, for the tests only.

Scalar, slow and obvious: Python integers, fractions and mpmath, one number at a time. It imports nothing
of lnsdeploy and was written from the specification's text alone, so that a misreading in the reference
executor cannot hide in both. Every function names the paragraph it transcribes ("spec 4.3"). NumPy appears
only as a container of words (convolution, 7.1) and in `add_pairs`, which adds whole arrays of accumulator
words by given Δ lists.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from functools import cache, lru_cache
from typing import Any, NamedTuple

import mpmath
import numpy as np

MP = mpmath.mp


# ---------------------------------------------------------------------------------------------------------------------
# Integers out of real numbers


def _settle(real: Callable[[], Any], shift: Fraction) -> int:
    """⌊real + shift⌋ for a real that is never an integer minus shift: precision grows until the floor is certain."""
    precision = 96
    while True:
        with MP.workprec(precision):
            value = real() + MP.mpf(shift.numerator) / shift.denominator
            floor = MP.floor(value)
            slack = MP.ldexp(1 + abs(value), 32 - precision)
            if floor + slack < value < floor + 1 - slack:
                return int(floor)
        precision *= 2
        if precision > 1 << 16:
            raise ArithmeticError("the real number sits on a rounding bound, where the specification says none can be")


def nearest(real: Callable[[], Any]) -> int:
    """The integer nearest to a real that is never halfway between two (a callable, evaluated at growing precision)."""
    return _settle(real, Fraction(1, 2))


def _power_of_two_exponent(x: Fraction) -> int | None:
    """n if x = 2^n exactly, else None."""
    n, d = x.numerator, x.denominator
    if n & (n - 1) == 0 and d & (d - 1) == 0:
        return n.bit_length() - d.bit_length()
    return None


def log2_of(x: Fraction) -> Any:
    """log2 of a positive fraction at mpmath's current precision."""
    return MP.log(MP.mpf(x.numerator) / x.denominator) / MP.log(2)


# ---------------------------------------------------------------------------------------------------------------------
# Words: spec 1.1, 1.2, 1.3


class Format(NamedTuple):
    """spec 1.1: B bits, γ codes per octave, with or without a sign bit."""

    bits: int
    gamma: int
    signed: bool = True

    @property
    def largest(self) -> int:
        """C."""
        return 2 ** (self.bits - 1) - 1 if self.signed else 2**self.bits - 1


def split(word: int, fmt: Format) -> tuple[int, int]:
    """(sign, code) of a word; a minus zero is read as zero (spec 1.2)."""
    word = int(word)
    if not fmt.signed:
        return 0, word
    code = word % 2 ** (fmt.bits - 1)
    sign = word // 2 ** (fmt.bits - 1)
    return (sign, code) if code else (0, 0)


def join(sign: int, code: int, fmt: Format) -> int:
    """The word of a sign and a code; zero is all zeros (spec 1.2)."""
    if code == 0:
        return 0
    return sign * 2 ** (fmt.bits - 1) + code if fmt.signed else code


def limit(sign: int, code: int, fmt: Format, underflow: str) -> int:
    """spec 2.4: the word of an unbounded code. A negative one into an unsigned format is taken as 0 (spec 4.6)."""
    if sign and not fmt.signed:
        return zero_word(fmt, underflow)
    if code < 1:
        return 0 if underflow == "zero" else join(sign, 1, fmt)
    return join(sign, min(code, fmt.largest), fmt)


def zero_word(fmt: Format, underflow: str) -> int:
    """spec 2.4: what 0 becomes."""
    return 0 if underflow == "zero" else join(0, 1, fmt)


# ---------------------------------------------------------------------------------------------------------------------
# Encode: spec 2.1 to 2.4


@lru_cache(maxsize=1 << 16)
def nearest_code(x: Fraction, gamma: int) -> int:
    """spec 2.1 for offset 0: the k with 2^((k − ½)/γ) ≤ x < 2^((k + ½)/γ)."""
    exponent = _power_of_two_exponent(x)
    if exponent is not None:
        return gamma * exponent
    return nearest(lambda: gamma * log2_of(x))


def _not_below(x: Fraction, terms: Sequence[tuple[Fraction, Fraction]]) -> bool:
    """x ≥ Σ weight·2^exponent, exactly."""
    # (powers far beyond any number's range are compared below, where nothing can be equal)
    if all(exponent.denominator == 1 and abs(exponent) < 1 << 16 for _, exponent in terms):
        return x >= sum((weight * Fraction(2) ** int(exponent) for weight, exponent in terms), Fraction(0))
    precision = 96
    while True:
        with MP.workprec(precision):
            bound = sum(
                MP.mpf(weight.numerator) / weight.denominator * MP.power(2, MP.mpf(e.numerator) / e.denominator)
                for weight, e in terms
            )
            value = MP.mpf(x.numerator) / x.denominator
            if abs(value - bound) > MP.ldexp(abs(value) + abs(bound), 32 - precision):
                return bool(value > bound)
        precision *= 2
        if precision > 1 << 16:
            raise ArithmeticError("a rational number equals an irrational bound")


def linear_code(x: Fraction, gamma: int, offset: int, largest: int) -> int:
    """spec 2.2, limited to 0 … C: bounds are means of neighbours' values, that under code 1 half its value."""

    def at_least(k: int) -> bool:
        if k == 1:
            return _not_below(x, [(Fraction(1, 2), Fraction(1 + offset, gamma))])
        lower, upper = Fraction(k - 1 + offset, gamma), Fraction(k + offset, gamma)
        return _not_below(x, [(Fraction(1, 2), lower), (Fraction(1, 2), upper)])

    low, high = 0, largest  # the answer is the largest k in low … high that x reaches
    guess = nearest_code(x, gamma) - offset
    if 2 < guess < largest - 2:  # one octave is at most one code off at γ = 1, less elsewhere
        low, high = guess - 2, guess + 2
        if not at_least(low) or at_least(high):
            low, high = 0, largest
    while low < high:
        middle = (low + high + 1) // 2
        if at_least(middle):
            low = middle
        else:
            high = middle - 1
    return low


def encode(
    x: float,
    fmt: Format,
    offset: int,
    *,
    rounding: str = "nearest",
    underflow: str = "zero",
    negative: str = "error",
    byte: int = 0,
) -> int:
    """spec 2.1 to 2.4: the word of one float. `byte` is the random byte of spec 2.3."""
    if math.isnan(x):
        raise ValueError("NaN")
    if x == 0:
        return zero_word(fmt, underflow)
    sign = int(x < 0)
    if sign and not fmt.signed:
        if negative == "clip":
            return zero_word(fmt, underflow)
        raise ValueError("negative number into an unsigned format")
    if math.isinf(x):
        return join(sign, fmt.largest, fmt)
    magnitude = abs(Fraction(x))
    if rounding == "nearest":
        code = nearest_code(magnitude, fmt.gamma) - offset
    elif rounding == "linear":
        code = linear_code(magnitude, fmt.gamma, offset, fmt.largest)
    else:
        code = (nearest_code(magnitude, 256 * fmt.gamma) - 256 * offset + byte) >> 8
    return limit(sign, code, fmt, underflow)


def philox4x32(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int, int, int]:
    """Philox4x32 with ten rounds (Salmon et al. 2011), as spec 2.3 uses it."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    mask = 0xFFFFFFFF
    for _ in range(10):
        p0 = 0xD2511F53 * c0
        p1 = 0xCD9E8D57 * c2
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ k0, p1 & mask, (p0 >> 32) ^ c3 ^ k1, p0 & mask
        k0, k1 = (k0 + 0x9E3779B9) & mask, (k1 + 0xBB67AE85) & mask
    return c0, c1, c2, c3


def random_byte(seed: int, stream: int, index: int) -> int:
    """spec 2.3: the byte of element number `index`."""
    mask = 0xFFFFFFFF
    block = index // 16
    words = philox4x32((block & mask, block >> 32, stream & mask, stream >> 32), (seed & mask, seed >> 32))
    return b"".join(word.to_bytes(4, "little") for word in words)[index % 16]


# ---------------------------------------------------------------------------------------------------------------------
# Decode and calibration: spec 2.5, 2.6


@lru_cache(maxsize=1 << 16)
def decode_magnitude(exponent: int, gamma: int, precision: int = 24, lowest: int = -126, highest: int = 127) -> float:
    """2^(exponent/γ) rounded to the nearest binary float with `precision` bits (ties to even), as IEEE 754 rounds."""
    octave, rest = divmod(exponent, gamma)
    unit = max(octave, lowest) - (precision - 1)  # the last place weighs 2^unit
    if octave < unit - 1:
        return 0.0
    if octave > highest + 1:
        return math.inf
    if rest == 0:
        count = 2 ** (octave - unit) if octave >= unit else 0  # exactly half a unit goes to even, zero
    else:
        count = nearest(lambda: MP.power(2, MP.mpf(rest) / gamma + (octave - unit)))
    if count >= 2 ** (highest + 1 - unit):
        return math.inf
    return math.ldexp(count, unit)


def decode(word: int, fmt: Format, offset: int, *, double: bool = False) -> float:
    """spec 2.5: the float32 (or float64) nearest to the word's value."""
    sign, code = split(word, fmt)
    if code == 0:
        return 0.0
    shape = (53, -1022, 1023) if double else (24, -126, 127)
    value = decode_magnitude(code + offset, fmt.gamma, *shape)
    return -value if sign else value


def offset_for(maximum: Fraction, fmt: Format) -> int:
    """spec 2.6: the smallest o with 2^((C + o)/γ) ≥ μ; 0 for μ = 0."""
    if maximum == 0:
        return 0
    exponent = _power_of_two_exponent(maximum)
    if exponent is not None:
        return fmt.gamma * exponent - fmt.largest
    return _settle(lambda: fmt.gamma * log2_of(maximum), Fraction(1)) - fmt.largest  # a ceiling: never an integer


def percentile_magnitude(values: Iterable[float], percentile: Fraction) -> Fraction:
    """spec 2.6: the smallest magnitude that at least p per cent of the magnitudes do not exceed."""
    magnitudes = sorted(abs(Fraction(v)) for v in values)
    for magnitude in magnitudes:
        covered = sum(other <= magnitude for other in magnitudes)
        if covered * 100 >= percentile * len(magnitudes):
            return magnitude
    return magnitudes[-1]


def squared_error(values: Iterable[float], fmt: Format, offset: int) -> Any:
    """Σ (x − value of its nearest word)², to 100 bits: what `"lsq"` of spec 2.6 minimises over the offsets."""
    with MP.workprec(160):
        total = MP.mpf(0)
        for x in values:
            wide = Format(32, fmt.gamma)
            code = min(split(encode(abs(x), wide, offset), wide)[1], fmt.largest)
            value = MP.power(2, MP.mpf(code + offset) / fmt.gamma) if code else MP.mpf(0)
            total += (MP.mpf(abs(x)) - value) ** 2
        return total


# ---------------------------------------------------------------------------------------------------------------------
# Multiply: spec 3.1, 3.2


def widen(word: int, fmt: Format, offset: int, gamma: int) -> tuple[int, int, int]:
    """spec 3.2: (sign, code, offset) at a γ that this format's γ divides."""
    if gamma % fmt.gamma:
        raise ValueError("the smaller γ must divide the larger")
    ratio = gamma // fmt.gamma
    sign, code = split(word, fmt)
    return sign, code * ratio, offset * ratio


def product(a: int, b: int, fa: Format, fb: Format) -> tuple[int, int]:
    """spec 3.1: sign and code P of a product (code 0 if either is zero), at the common γ."""
    gamma = max(fa.gamma, fb.gamma)
    sa, ca, _ = widen(a, fa, 0, gamma)
    sb, cb, _ = widen(b, fb, 0, gamma)
    if ca == 0 or cb == 0:
        return 0, 0
    return sa ^ sb, ca + cb


def offsets_sum(fa: Format, fb: Format, oa: int, ob: int) -> int:
    """spec 3.2: S_n."""
    gamma = max(fa.gamma, fb.gamma)
    return oa * (gamma // fa.gamma) + ob * (gamma // fb.gamma)


# ---------------------------------------------------------------------------------------------------------------------
# Dot product, linear accumulation: spec 4


class Linear(NamedTuple):
    """The fields of a linear accumulator under the specification's names."""

    bits: int = 24
    conversion: str = "product"
    table_bits: int = 0
    constant_bits: int = 8
    lanes: int = 1
    psum_bits: int | None = None
    overflow: str = "wrap"
    shift: str = "truncate"
    encoder: str = "exact"
    encoder_bits: int | None = None


@cache
def remainder_table(table_bits: int, constant_bits: int) -> tuple[int, ...]:
    """spec 4.1: T[i] = round(2^m·2^(i/2^t)), i < 2^t."""

    def entry(i: int) -> int:
        if i == 0:
            return 2**constant_bits
        return nearest(lambda: MP.power(2, constant_bits + MP.mpf(i) / 2**table_bits))

    return tuple(entry(i) for i in range(2**table_bits))


@cache
def log_table(gamma: int, encoder_bits: int) -> tuple[int, ...]:
    """spec 4.6: L[j] = round(γ·log2(1 + (j + ½)/2^n)), j < 2^n."""
    return tuple(
        nearest(lambda j=j: gamma * log2_of(1 + Fraction(2 * j + 1, 2 * 2**encoder_bits)))  # type: ignore[misc]
        for j in range(2**encoder_bits)
    )


def fit(value: int, bits: int, overflow: str) -> int:
    """spec 4.4: wrap to two's complement, or clamp to ±(2^(W−1) − 1)."""
    half = 2 ** (bits - 1)
    if overflow == "wrap":
        return (value + half) % (2 * half) - half
    return max(-(half - 1), min(half - 1, value))


def align(magnitude: int, shift: int, mode: str) -> int:
    """spec 4.3: M·2^s, or its floor, or rounded half up."""
    if shift >= 0:
        return magnitude * 2**shift
    exact = Fraction(magnitude, 2**-shift)
    return math.floor(exact) if mode == "truncate" else math.floor(exact + Fraction(1, 2))


def linear_term(code: int, gamma: int, lsb: int, part: Linear, table: Sequence[int]) -> tuple[int, int]:
    """spec 4.1 to 4.3: (accumulator number, aligned magnitude) of a product's code P."""
    f = gamma.bit_length() - 1
    q, r = divmod(code, gamma)
    low = f - part.table_bits
    r_hi, r_lo = divmod(r, 2**low)
    if low == 0:
        mitchell, e = 1, 0
    else:
        mitchell, e = 2**f + r_lo, f
    if part.conversion == "product":
        magnitude, fraction, number = table[r_hi] * mitchell, part.constant_bits + e, 0
    else:
        magnitude, fraction, number = mitchell, e, r_hi
    return number, align(magnitude, q - fraction - lsb, part.shift)


def raw_code(magnitude: int, gamma: int, part: Linear, table: Sequence[int] | None = None) -> int:
    """spec 4.6: E(|A|) by the datapath's encoder (`table` overrides L, for tests that mutate it)."""
    if part.encoder == "exact":
        return nearest_code(Fraction(magnitude), gamma)
    position = magnitude.bit_length() - 1
    after = magnitude - 2**position  # the bits after the leading one, `position` of them
    wanted = int(part.encoder_bits or 0) if part.encoder == "table" else gamma.bit_length() - 1
    bits = after * 2**wanted // 2**position
    if part.encoder == "table":
        entries = log_table(gamma, wanted) if table is None else table
        return gamma * position + entries[bits]
    return gamma * position + bits


def dot_linear(
    a: Sequence[int],
    w: Sequence[int],
    bias: int,
    formats: tuple[Format, Format, Format],
    offsets: tuple[int, int, int],
    lsb: int,
    part: Linear,
    underflow: str = "zero",
    table: Sequence[int] | None = None,
) -> int:
    """spec 4.2 to 4.6: one output word. `formats` and `offsets` are of activation, weight and output."""
    fa, fw, fo = formats
    gamma = max(fa.gamma, fw.gamma)
    table = remainder_table(part.table_bits, part.constant_bits) if table is None else table
    psum_bits = part.bits if part.psum_bits is None else part.psum_bits
    count = 2**part.table_bits if part.conversion == "bin" else 1
    bins = [0] * count
    bins[0] = fit(bias, part.bits, part.overflow)
    pairs = list(zip(a, w, strict=True))
    while len(pairs) % part.lanes:
        pairs.append((0, 0))
    for start in range(0, len(pairs), part.lanes):
        sums = [0] * count
        for x, y in pairs[start : start + part.lanes]:
            sign, code = product(x, y, fa, fw)
            if code:
                number, magnitude = linear_term(code, gamma, lsb, part, table)
                sums[number] += -magnitude if sign else magnitude
        for number in range(count):
            step = fit(sums[number], psum_bits, part.overflow)
            bins[number] = fit(bins[number] + step, part.bits, part.overflow)
    if part.conversion == "bin":
        total = sum(constant * each for constant, each in zip(table, bins, strict=True))
        lsb = lsb - part.constant_bits
    else:
        total = bins[0]
    if total == 0:
        return zero_word(fo, underflow)
    code = raw_code(abs(total), gamma, part) + gamma * lsb + offsets_sum(fa, fw, offsets[0], offsets[1]) - offsets[2]
    return limit(int(total < 0), code, fo, underflow)


# ---------------------------------------------------------------------------------------------------------------------
# How Δ is made: spec 5.7


def real_delta(d: Any, G: int, sign: int) -> Any:
    """±G·log2(1 ± 2^(−d/G)) at mpmath's current precision, for any real d."""
    power = MP.power(2, -MP.mpf(d) / G)
    return sign * G * MP.log1p(sign * power) / MP.log(2)


@cache
def exact_delta(d: int, G: int, sign: int) -> int:
    """spec 5.7, the exact values: sign +1 for Δ⁺, −1 for Δ⁻ (d ≥ 1)."""
    if sign < 0 and d == 0:
        raise ValueError("Δ⁻(0) is not defined")
    return nearest(lambda: real_delta(d, G, sign))


@cache
def delta_end(G: int, sign: int) -> int:
    """spec 5.7: D±, the first d from which on the exact values are 0."""
    low, high = 0, 1
    while exact_delta(high, G, sign):
        low, high = high, high * 2
    while high - low > 1:  # Δ falls with d, so bisection finds the first zero
        middle = (low + high) // 2
        if exact_delta(middle, G, sign):
            low = middle
        else:
            high = middle
    return high


def _sample(d: int, G: int, sign: int) -> int:
    """An exact value, that of Δ⁻ at 0 being taken at 1 (spec 5.7.2, 5.7.3)."""
    return exact_delta(1 if sign < 0 and d == 0 else d, G, sign)


def segment(d: int, G: int, sign: int, segments: int, spacing: str) -> tuple[int, int]:
    """spec 5.7.10: (start, w) of the segment that holds d."""
    if spacing == "equal":
        w = 1
        while segments * w < delta_end(G, sign):
            w *= 2
        return d // w * w, w
    if d < segments:
        return d, 1
    octave = 2 ** (d.bit_length() - 1)
    w = octave // segments
    return octave + (d - octave) // w * w, w


def delta_exact(d: int, G: int, sign: int) -> int:
    """spec 5.7.1."""
    return exact_delta(d, G, sign)


def delta_table(d: int, G: int, sign: int, *, entries: int, step: int, sample: str) -> int:
    """spec 5.7.2."""
    i = d // step
    if i >= entries:
        return 0
    return _sample(i * step + (step // 2 if sample == "middle" else 0), G, sign)


def delta_interpolated(d: int, G: int, sign: int, *, segments: int, spacing: str, slope_bits: int) -> int:
    """spec 5.7.3."""
    if d >= delta_end(G, sign):
        return 0
    start, w = segment(d, G, sign, segments, spacing)
    first, last = _sample(start, G, sign), _sample(start + w, G, sign)
    slope = math.floor(Fraction((first - last) * 2 ** (slope_bits + 1) + w, 2 * w))
    return first - (slope * (d - start) >> slope_bits)


def delta_cotransform(d: int, G: int, sign: int, *, split: int) -> int:
    """spec 5.7.4."""
    if sign > 0:
        return exact_delta(d, G, 1)
    if d >= delta_end(G, -1):
        return 0
    h, low = divmod(d, 2**split)
    if h == 0:
        return exact_delta(low, G, -1)
    x = exact_delta(h * 2**split, G, -1)
    if low == 0:
        return x
    y = h * 2**split + exact_delta(low, G, -1)
    return min(x, y) - exact_delta(abs(x - y), G, 1)


def delta_mitchell(d: int, G: int, sign: int) -> int:
    """spec 5.7.5."""
    q, r = divmod(d, G)
    return (2 * G - r) >> (q + 1)


def delta_shift(d: int, G: int, sign: int) -> int:
    """spec 5.7.6."""
    return nearest(lambda: G / MP.log(2)) >> (d // G)


@cache
def polynomial_coefficients(start: int, w: int, G: int, sign: int, degree: int, width: int) -> tuple[int, ...]:
    """spec 5.7.7: C_0 … C_n of one segment."""
    if w == 1:
        at = 1 if sign < 0 and start == 0 else start
        return (nearest(lambda: real_delta(at, G, sign) * 2**width), *[0] * degree)

    def coefficients() -> list[Any]:
        nodes = [
            (1 - MP.cos((2 * i + 1) * MP.pi / (2 * degree + 2))) / 2 for i in range(degree + 1)
        ]  # u = (d − start)/w
        values = [real_delta(start + w * u, G, sign) for u in nodes]
        # Newton's divided differences, then expanded into powers of u.
        table = list(values)
        for order in range(1, degree + 1):
            for i in range(degree, order - 1, -1):
                table[i] = (table[i] - table[i - 1]) / (nodes[i] - nodes[i - order])
        powers = [MP.mpf(0)] * (degree + 1)
        for i in range(degree, -1, -1):  # powers ← powers·(u − node_i) + table_i
            powers = [(powers[k - 1] if k else MP.mpf(0)) - nodes[i] * powers[k] for k in range(degree + 1)]
            powers[0] += table[i]
        return powers

    return tuple(nearest(lambda k=k: coefficients()[k] * 2**width) for k in range(degree + 1))  # type: ignore[misc]


def delta_polynomial(d: int, G: int, sign: int, *, degree: int, segments: int, spacing: str, width: int) -> int:
    """spec 5.7.7: Horner in integers."""
    if d >= delta_end(G, sign):
        return 0
    start, w = segment(d, G, sign, segments, spacing)
    constants = polynomial_coefficients(start, w, G, sign, degree, width)
    h = constants[degree]
    for k in range(degree - 1, -1, -1):
        h = (h * (d - start) >> (w.bit_length() - 1)) + constants[k]
    return max(0, math.floor(Fraction(h, 2**width) + Fraction(1, 2)))


@cache
def cordic_constants(iterations: int, width: int) -> tuple[tuple[int, ...], int, int, int, tuple[int, ...]]:
    """spec 5.7.8: indices, LN2, X0, INV and A."""
    indices: list[int] = []
    i = 1
    while len(indices) < iterations:
        indices.append(i)
        if i in (4, 13, 40) and len(indices) < iterations:
            indices.append(i)
        i += 1
    scale = 2**width
    ln2 = nearest(lambda: scale * MP.log(2))
    inverse = nearest(lambda: scale / MP.log(2))
    gain = nearest(lambda: scale / MP.fprod(MP.sqrt(1 - MP.ldexp(1, -2 * i)) for i in indices))
    angles = tuple(nearest(lambda i=i: scale * MP.atanh(MP.ldexp(1, -i))) for i in indices)  # type: ignore[misc]
    return tuple(indices), ln2, gain, inverse, angles


def delta_cordic(d: int, G: int, sign: int, *, iterations: int, width: int) -> int:
    """spec 5.7.8."""
    if d >= delta_end(G, sign):
        return 0
    indices, ln2, gain, inverse, angles = cordic_constants(iterations, width)
    one = 2**width
    q, r = divmod(d, G)
    x, y, z = gain, 0, r * ln2 // G
    for i, angle in zip(indices, angles, strict=True):
        s = 1 if z >= 0 else -1
        x, y, z = x + s * (y >> i), y + s * (x >> i), z - s * angle
    u = max(x - y, 0) >> q
    v = max(one + sign * u, 1)
    n = 0
    while v * 2**n < one:
        n += 1
    v = v * 2**n
    x, y, z = v + one, v - one, 0
    for i, angle in zip(indices, angles, strict=True):
        s = -1 if y >= 0 else 1
        x, y, z = x + s * (y >> i), y + s * (x >> i), z - s * angle
    log = 2 * z - n * ln2
    return max(0, (sign * log * G * inverse + 2 ** (2 * width - 1)) >> (2 * width))


def delta_max(d: int, G: int, sign: int) -> int:
    """spec 5.7.9."""
    return 0


DELTAS: dict[str, Callable[..., int]] = {
    "exact": delta_exact,
    "table": delta_table,
    "interpolated": delta_interpolated,
    "cotransform": delta_cotransform,
    "mitchell": delta_mitchell,
    "shift": delta_shift,
    "polynomial": delta_polynomial,
    "cordic": delta_cordic,
    "max": delta_max,
}


class Method(NamedTuple):
    """A way to make Δ: its name in spec 5.7 and its parameters, as sorted (name, value) pairs."""

    kind: str
    parameters: tuple[tuple[str, Any], ...] = ()


def method(kind: str, **parameters: Any) -> Method:
    return Method(kind, tuple(sorted(parameters.items())))


@lru_cache(maxsize=1 << 18)
def delta(d: int, G: int, sign: int, how: Method) -> int:
    """spec 5.7: Δ⁺(d) (sign +1) or Δ⁻(d) (sign −1); no method gives a negative number."""
    return max(0, DELTAS[how.kind](d, G, sign, **dict(how.parameters)))


# ---------------------------------------------------------------------------------------------------------------------
# Dot product, log accumulation: spec 5


class Log(NamedTuple):
    """The fields of a log accumulator under the specification's names."""

    bits: int
    guard_bits: int = 0
    lanes: int = 1
    delta: Method = Method("exact")

    @property
    def largest(self) -> int:
        """Λ."""
        return 2**self.bits - 1


Number = tuple[int, int]  # sign and code of the accumulator; code 0 is zero


def log_enter(sign: int, code: int, part: Log) -> Number:
    """spec 5.1, from a code in units of 1/γ less o_acc."""
    code = code * 2**part.guard_bits
    if code < 1:
        return 0, 0
    return sign, min(code, part.largest)


def log_add(a: Number, b: Number, gamma: int, part: Log) -> Number:
    """spec 5.2 and 5.3."""
    if a[1] == 0:
        return b if b[1] else (0, 0)
    if b[1] == 0:
        return a
    (sx, x), (sy, y) = (a, b) if a[1] >= b[1] else (b, a)
    d = x - y
    G = gamma * 2**part.guard_bits
    if sx == sy:
        code = x + delta(d, G, 1, part.delta)
    elif d == 0:
        return 0, 0
    else:
        code = x - delta(d, G, -1, part.delta)
    if code < 1:
        return 0, 0
    return sx, min(code, part.largest)


def log_tree(numbers: Sequence[Number], gamma: int, part: Log) -> Number:
    """spec 5.4: a balanced binary tree; with an odd count the last passes up."""
    level = list(numbers)
    while len(level) > 1:
        above = [log_add(level[i], level[i + 1], gamma, part) for i in range(0, len(level) - 1, 2)]
        if len(level) % 2:
            above.append(level[-1])
        level = above
    return level[0]


def log_reduce(start: Number, numbers: Sequence[Number], gamma: int, part: Log) -> Number:
    """spec 5.4: groups of L, each a tree, into the accumulator in order."""
    padded = list(numbers)
    while len(padded) % part.lanes:
        padded.append((0, 0))
    total = start
    for i in range(0, len(padded), part.lanes):
        total = log_add(total, log_tree(padded[i : i + part.lanes], gamma, part), gamma, part)
    return total


def log_output(total: Number, shift: int, part: Log, fmt: Format, underflow: str) -> int:
    """spec 5.6: `shift` is o_acc − o_out."""
    sign, code = total
    if code == 0:
        return zero_word(fmt, underflow)
    g = part.guard_bits
    code = math.floor(Fraction(code, 2**g) + Fraction(1, 2)) if g else code
    return limit(sign, code + shift, fmt, underflow)


def log_word(word: int, bits: int) -> Number:
    """The accumulator's number of a word sign·2^bits + code, for the bias (spec 5.5)."""
    sign, code = divmod(int(word), 2**bits)
    return (sign, code) if code else (0, 0)


def dot_log(
    a: Sequence[int],
    w: Sequence[int],
    bias: int,
    formats: tuple[Format, Format, Format],
    offsets: tuple[int, int, int],
    acc_offset: int,
    part: Log,
    underflow: str = "zero",
) -> int:
    """spec 5.1 to 5.6: one output word; `bias` is an accumulator word."""
    fa, fw, fo = formats
    gamma = max(fa.gamma, fw.gamma)
    shared = offsets_sum(fa, fw, offsets[0], offsets[1])
    numbers = []
    for x, y in zip(a, w, strict=True):
        sign, code = product(x, y, fa, fw)
        numbers.append(log_enter(sign, code + shared - acc_offset, part) if code else (0, 0))
    total = log_reduce(log_word(bias, part.bits), numbers, gamma, part)
    return log_output(total, acc_offset - offsets[2], part, fo, underflow)


def add_pairs(
    x: np.ndarray[Any, Any], y: np.ndarray[Any, Any], bits: int, plus: Sequence[int], minus: Sequence[int]
) -> np.ndarray[Any, Any]:
    """spec 5.2 and 5.3 on whole arrays of accumulator words (sign·2^bits + code), from Δ lists that cover every d.

    Written by cases on signs and codes rather than by ordering the operands, unlike `log_add`; the tests
    hold the two equal.
    """
    x, y = x.astype(np.int64), y.astype(np.int64)
    cx, cy = x % 2**bits, y % 2**bits
    nx, ny = (x >> bits) & 1, (y >> bits) & 1
    distance = np.abs(cx - cy)
    top = np.maximum(cx, cy)
    grown = top + np.asarray(plus, dtype=np.int64)[distance]
    shrunk = np.where(distance == 0, 0, top - np.asarray(minus, dtype=np.int64)[distance])
    code = np.where(nx == ny, grown, shrunk)
    sign = np.where(cx > cy, nx, ny)
    code, sign = np.where(cx == 0, cy, code), np.where(cx == 0, ny, sign)
    code, sign = np.where(cy == 0, cx, code), np.where(cy == 0, nx, sign)
    code = np.clip(code, 0, 2**bits - 1)
    return np.where(code == 0, 0, (sign << bits) + code)


# ---------------------------------------------------------------------------------------------------------------------
# Other operations: spec 6


def value_order(word: int, fmt: Format) -> int:
    """spec 6.1: an integer that orders the words of one tensor by value."""
    sign, code = split(word, fmt)
    return -code if sign else code


def _from_order(order: int, fmt: Format) -> int:
    return join(int(order < 0), abs(order), fmt)


def relu(word: int, fmt: Format) -> int:
    """spec 6.1."""
    return _from_order(max(0, value_order(word, fmt)), fmt)


def maximum(a: int, b: int, fmt: Format) -> int:
    """spec 6.1."""
    return _from_order(max(value_order(a, fmt), value_order(b, fmt)), fmt)


def minimum(a: int, b: int, fmt: Format) -> int:
    """spec 6.1."""
    return _from_order(min(value_order(a, fmt), value_order(b, fmt)), fmt)


def clip(word: int, low: int, high: int, fmt: Format) -> int:
    """spec 6.1."""
    return minimum(maximum(word, low, fmt), high, fmt)


def negate(word: int, fmt: Format) -> int:
    """spec 6.1."""
    return _from_order(-value_order(word, fmt), fmt)


def multiply(
    a: int, b: int, formats: tuple[Format, Format, Format], offsets: tuple[int, int, int], underflow: str = "zero"
) -> int:
    """spec 6.2."""
    fa, fb, fo = formats
    sign, code = product(a, b, fa, fb)
    if code == 0:
        return zero_word(fo, underflow)
    return limit(sign, code + offsets_sum(fa, fb, offsets[0], offsets[1]) - offsets[2], fo, underflow)


def divide(
    a: int, b: int, formats: tuple[Format, Format, Format], offsets: tuple[int, int, int], underflow: str = "zero"
) -> int:
    """spec 6.2: division by zero gives C with the dividend's sign."""
    fa, fb, fo = formats
    gamma = max(fa.gamma, fb.gamma)
    sa, ca, oa = widen(a, fa, offsets[0], gamma)
    sb, cb, ob = widen(b, fb, offsets[1], gamma)
    if cb == 0:
        return limit(sa, fo.largest, fo, underflow)
    if ca == 0:
        return zero_word(fo, underflow)
    return limit(sa ^ sb, ca - cb + oa - ob - offsets[2], fo, underflow)


def square_root(word: int, fmt: Format, fo: Format, offset: int, out_offset: int, underflow: str = "zero") -> int:
    """spec 6.2."""
    sign, code = split(word, fmt)
    if sign:
        raise ValueError("square root of a negative word")
    if code == 0:
        return zero_word(fo, underflow)
    return limit(0, math.floor(Fraction(code + offset + 1, 2)) - out_offset, fo, underflow)


def rescale(word: int, fmt: Format, fo: Format, offset: int, out_offset: int, underflow: str = "zero") -> int:
    """spec 6.3: zero stays zero, and so does a negative word into an unsigned format."""
    sign, code = split(word, fmt)
    if code == 0 or (sign and not fo.signed):
        return 0
    if fo.gamma % fmt.gamma == 0:
        return limit(sign, (code + offset) * (fo.gamma // fmt.gamma) - out_offset, fo, underflow)
    if fmt.gamma % fo.gamma:
        raise ValueError("one γ must divide the other")
    rho = fmt.gamma // fo.gamma
    return limit(sign, math.floor(Fraction(code + offset, rho) + Fraction(1, 2)) - out_offset, fo, underflow)


def add(
    a: int,
    b: int,
    formats: tuple[Format, Format, Format],
    offsets: tuple[int, int, int],
    acc_offset: int,
    part: Log,
    underflow: str = "zero",
) -> int:
    """spec 6.4."""
    fa, fb, fo = formats
    gamma = max(fa.gamma, fb.gamma)
    entered = []
    for word, fmt, offset in ((a, fa, offsets[0]), (b, fb, offsets[1])):
        sign, code, wide = widen(word, fmt, offset, gamma)
        entered.append(log_enter(sign, code + wide - acc_offset, part) if code else (0, 0))
    total = log_add(entered[0], entered[1], gamma, part)
    return log_output(total, acc_offset - offsets[2], part, fo, underflow)


def window_sum(
    words: Sequence[int],
    average_of: int | None,
    fmt: Format,
    fo: Format,
    offset: int,
    out_offset: int,
    acc_offset: int,
    part: Log,
    underflow: str = "zero",
) -> int:
    """spec 6.5: the sum of a window's words (padding as zero words), or their average over `average_of`."""
    entered = []
    for word in words:
        sign, code = split(word, fmt)
        entered.append(log_enter(sign, code + offset - acc_offset, part) if code else (0, 0))
    sign, code = log_reduce((0, 0), entered, fmt.gamma, part)
    if average_of is not None and code:
        G = fmt.gamma * 2**part.guard_bits
        n = average_of
        less = G * (n.bit_length() - 1) if n & (n - 1) == 0 else nearest(lambda: G * log2_of(Fraction(n)))
        code = code - less
        if code < 1:
            sign, code = 0, 0
    return log_output((sign, code), acc_offset - out_offset, part, fo, underflow)


# ---------------------------------------------------------------------------------------------------------------------
# Windows and convolution: spec 6.1, 6.5, 7.1, by explicit loops


class Shape(NamedTuple):
    """Kernel, strides, dilations per axis; pads as ONNX gives them (all begins, then all ends)."""

    kernel: tuple[int, ...]
    strides: tuple[int, ...]
    pads: tuple[int, ...]
    dilations: tuple[int, ...]


def output_sizes(spatial: Sequence[int], shape: Shape) -> tuple[int, ...]:
    """Positions per axis: the padded size less the dilated kernel, over the stride, plus one."""
    axes = len(shape.kernel)
    return tuple(
        (spatial[i] + shape.pads[i] + shape.pads[axes + i] - (shape.dilations[i] * (shape.kernel[i] - 1) + 1))
        // shape.strides[i]
        + 1
        for i in range(axes)
    )


def window_positions(place: Sequence[int], spatial: Sequence[int], shape: Shape) -> list[tuple[int, ...] | None]:
    """The input positions of one window in C order; None where they are padding."""
    found: list[tuple[int, ...] | None] = []
    for tap in itertools.product(*(range(k) for k in shape.kernel)):
        at = tuple(place[i] * shape.strides[i] + tap[i] * shape.dilations[i] - shape.pads[i] for i in range(len(tap)))
        inside = all(0 <= at[i] < spatial[i] for i in range(len(at)))
        found.append(at if inside else None)
    return found


def convolve(
    x: np.ndarray[Any, Any],
    w: np.ndarray[Any, Any],
    shape: Shape,
    groups: int,
    dot: Callable[[list[int], list[int], int], int],
) -> np.ndarray[Any, Any]:
    """spec 7.1: `dot(a, w, output channel)` over (C_in/groups, kernel…) at every position, padding as the zero word."""
    batch, _, *spatial = x.shape
    channels, per_group = w.shape[:2]
    sizes = output_sizes(spatial, shape)
    out = np.zeros((batch, channels, *sizes), dtype=np.int64)
    for b, o in itertools.product(range(batch), range(channels)):
        group = o // (channels // groups)
        for place in itertools.product(*(range(n) for n in sizes)):
            positions = window_positions(place, spatial, shape)
            a = [
                0 if at is None else int(x[(b, group * per_group + c, *at)])
                for c in range(per_group)
                for at in positions
            ]
            out[(b, o, *place)] = dot(a, [int(v) for v in w[o].reshape(-1)], o)
    return out


def pool(
    x: np.ndarray[Any, Any],
    shape: Shape,
    reduce: Callable[[list[int | None]], int],
) -> np.ndarray[Any, Any]:
    """spec 6.1, 6.5: `reduce` on the words of every window of every channel (None for padding)."""
    batch, channels, *spatial = x.shape
    sizes = output_sizes(spatial, shape)
    out = np.zeros((batch, channels, *sizes), dtype=np.int64)
    for b, c in itertools.product(range(batch), range(channels)):
        for place in itertools.product(*(range(n) for n in sizes)):
            positions = window_positions(place, spatial, shape)
            out[(b, c, *place)] = reduce([None if at is None else int(x[(b, c, *at)]) for at in positions])
    return out


def max_of_window(words: Sequence[int | None], fmt: Format) -> int:
    """spec 6.1: the largest by value; padding never wins."""
    return _from_order(max(value_order(word, fmt) for word in words if word is not None), fmt)
