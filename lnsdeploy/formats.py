"""LNS numbers: formats, words, encoding, decoding and calibration (spec 1.1 to 2.5).

A word holds a sign bit (if the format is signed) above a magnitude code c; c = 0 is zero and c ≥ 1 is
±2^((c + o)/γ), where the integer offset o belongs to the tensor or to each of its channels. All
decisions are comparisons of integers with correctly rounded integer tables (:mod:`lnsdeploy.tables`).

NumPy arrays and torch tensors are accepted alike, and the same kind is returned; this module never
imports torch itself.
"""

from __future__ import annotations

import itertools
import re
import sys
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lnsdeploy import tables
from lnsdeploy.errors import BadTypeError, BadValueError, UnknownNameError

Rounding = Literal["nearest", "linear", "stochastic"]
Underflow = Literal["zero", "min"]
Negative = Literal["error", "clip"]
Method = Literal["absmax", "percentile", "lsq"]
Words = npt.NDArray[np.unsignedinteger[Any]]
Offset = int | npt.NDArray[np.int64]

ROUNDINGS = ("nearest", "linear", "stochastic")
UNDERFLOWS = ("zero", "min")
METHODS = ("absmax", "percentile", "lsq")

MAX_GAMMA = 1 << 26
MAX_OFFSET = (1 << 31) - 1
STOCHASTIC_BITS = 8

# Elements per pass: a chunk and its temporaries stay in the second-level cache.
_CHUNK = 1 << 15
# Up to here one table entry per code of an octave; above, two tables of about the square root of it.
_TABLE_LIMIT = 1 << 19
# Far below every code; still far from overflow after an int64 offset is subtracted.
_NOTHING = -(1 << 60)
_EVERYTHING = 1 << 60
# Extra bits where arbitrary precision decides.
_EXACT_BITS = 192


@dataclass(frozen=True, order=True)
class LNSFormat:
    """A format of LNS words (spec 1).

    Args:
        bits: B, the word's width, 2 to 32.
        gamma: γ, the base factor: codes per octave, an integer from 1 to 2^26.
        signed: whether the top bit of a word is a sign.

    `str` gives ``"B:γ"``, or ``"uB:γ"`` if unsigned; :meth:`parse` is its inverse.

    Raises:
        BadValueError: a field is outside its range.
        BadTypeError: a field has the wrong type.
    """

    bits: int
    gamma: int
    signed: bool = True

    def __post_init__(self) -> None:
        for field, low, high in (("bits", 2, 32), ("gamma", 1, MAX_GAMMA)):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
                raise BadTypeError(f"{field} must be an integer from {low} to {high}, not {value!r}")
            if not low <= value <= high:
                raise BadValueError(f"{field} must be from {low} to {high}, not {value}")
            object.__setattr__(self, field, int(value))
        if not isinstance(self.signed, (bool, np.bool_)):
            raise BadTypeError(f"signed must be True or False, not {self.signed!r}")
        object.__setattr__(self, "signed", bool(self.signed))

    def __str__(self) -> str:
        return f"{'' if self.signed else 'u'}{self.bits}:{self.gamma}"

    @classmethod
    def parse(cls, text: str) -> LNSFormat:
        """The format written as ``"8:8"`` (bits:gamma) or ``"u8:8"`` (unsigned).

        Raises:
            BadValueError: the text has another form, or a number is out of range.
        """
        match = re.fullmatch(r"\s*(u?)(\d{1,9})\s*:\s*(\d{1,12})\s*", text) if isinstance(text, str) else None
        if match is None:
            raise BadValueError(f"not an LNS format: {text!r} (write BITS:GAMMA, as 8:8, or u8:8 if unsigned)")
        return cls(int(match[2]), int(match[3]), not match[1])

    @property
    def magnitude_bits(self) -> int:
        """Bits of the magnitude code."""
        return self.bits - 1 if self.signed else self.bits

    @property
    def max_code(self) -> int:
        """C, the largest magnitude code."""
        return (1 << self.magnitude_bits) - 1

    @property
    def sign_bit(self) -> int:
        """The sign's weight in a word; 0 if unsigned."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def dtype(self) -> np.dtype[Any]:
        """The smallest unsigned NumPy dtype that holds a word."""
        return np.dtype(np.uint8 if self.bits <= 8 else np.uint16 if self.bits <= 16 else np.uint32)

    @property
    def zero(self) -> int:
        """The word of zero."""
        return 0

    @property
    def octaves(self) -> float:
        """Ratio of the largest to the smallest magnitude, as a number of octaves."""
        return (self.max_code - 1) / self.gamma

    @property
    def fraction_bits(self) -> int | None:
        """f where γ = 2^f, else None."""
        f = self.gamma.bit_length() - 1
        return f if 1 << f == self.gamma else None

    def split(self, words: npt.NDArray[Any]) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Magnitude codes (int64) and signs (bool) of words; a zero's sign is False."""
        wide = np.asarray(words).astype(np.int64)
        codes = wide & self.max_code
        signs = (wide & self.sign_bit) != 0
        return codes, signs & (codes > 0)

    def join(self, codes: npt.NDArray[Any], signs: npt.NDArray[np.bool_]) -> Words:
        """Words of magnitude codes in 0 … C and signs; zeros get the canonical word."""
        words = codes | np.where(signs & (codes > 0), self.sign_bit, 0)
        return words.astype(self.dtype)

    def check(self, words: npt.NDArray[Any], name: str = "words") -> None:
        """Refuse words that have another dtype or bits above the format's width.

        Raises:
            BadTypeError: not the format's dtype.
            BadValueError: a word is 2^bits or more.
        """
        if words.dtype != self.dtype:
            raise BadTypeError(f"{name}: words of {self} are {self.dtype}, not {words.dtype}")
        if self.bits < 8 * self.dtype.itemsize and words.size and int(words.max()) >> self.bits:
            raise BadValueError(f"{name}: word {int(words.max())} does not fit the {self.bits} bits of {self}")


def default_gamma(bits: int) -> int:
    """A base factor for a width where none is chosen: about 16 octaves from 8 bits up, less below.

    Below 6 bits range, not precision, is what runs out, so γ falls (docs/results.md).
    """
    return {2: 1, 3: 1, 4: 2, 5: 2, 6: 4, 7: 8}.get(bits, 1 << max(bits - 5, 0))


@dataclass(frozen=True, eq=False)
class LNSTensor:
    """Words with what they mean.

    Args:
        words: unsigned integers of `format.dtype`, any shape.
        format: their format.
        offset: o, an integer, or an int64 array with one offset per channel of `axis`.
        axis: the channel axis; None with a single offset.
    """

    words: Words
    format: LNSFormat
    offset: Offset
    axis: int | None = None

    def __post_init__(self) -> None:
        self.format.check(self.words)
        _offsets(self.offset, self.axis, self.words.shape)

    @classmethod
    def encode(
        cls,
        x: npt.NDArray[Any],
        fmt: LNSFormat,
        offset: Offset | None = None,
        *,
        axis: int | None = None,
        method: Method = "absmax",
        **options: Any,
    ) -> LNSTensor:
        """Encode an array; without an offset, calibrate it first (per channel where `axis` is given).

        Args:
            options: passed on to :func:`encode`.
        """
        if offset is None:
            offset = calibrate(x, fmt, method=method, axis=axis)
        return cls(encode(x, fmt, offset, axis=axis, **options), fmt, offset, axis)

    def decode(self, dtype: npt.DTypeLike = np.float32) -> npt.NDArray[Any]:
        """The values, correctly rounded to `dtype` (float32 or float64)."""
        values: npt.NDArray[Any] = decode(self.words, self.format, self.offset, dtype, axis=self.axis)
        return values

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the words."""
        return self.words.shape


# ---------------------------------------------------------------------------------------------------
# torch tensors come in and go out as NumPy views


def _is_tensor(x: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(x, torch.Tensor)


def _as_numpy(x: Any, name: str) -> npt.NDArray[Any]:
    if _is_tensor(x):
        torch = sys.modules["torch"]
        x = x.detach()
        if x.dtype == torch.bfloat16:
            x = x.float()
        return x.cpu().numpy()  # type: ignore[no-any-return]
    if isinstance(x, (np.ndarray, np.generic)):
        return np.asarray(x)
    if isinstance(x, (int, float, list, tuple)):
        try:
            return np.asarray(x, dtype=np.float64)
        except (TypeError, ValueError) as error:
            raise BadTypeError(f"{name}: not an array of numbers: {error}") from error
    raise BadTypeError(f"{name}: expected a NumPy array or a torch tensor, not {type(x).__name__}")


def _like(result: npt.NDArray[Any], x: Any) -> Any:
    if not _is_tensor(x):
        return result
    torch = sys.modules["torch"]
    return torch.from_numpy(np.ascontiguousarray(result)).reshape(result.shape).to(x.device)


def _offsets(offset: Any, axis: int | None, shape: tuple[int, ...]) -> npt.NDArray[np.int64]:
    """The offset as an int64 array that broadcasts against `shape`."""
    if _is_tensor(offset):
        offset = offset.detach().cpu().numpy()
    values = np.asarray(offset)
    if values.dtype.kind not in "iu":
        raise BadTypeError(f"offsets are integers, not {values.dtype}")
    values = values.astype(np.int64)
    if values.size and (int(values.max()) > MAX_OFFSET or int(values.min()) < -MAX_OFFSET):
        raise BadValueError(f"offsets must lie within ±{MAX_OFFSET}")
    if values.ndim == 0:
        return values
    if axis is None:
        raise BadValueError("several offsets were given, so name the channel axis they belong to (axis=…)")
    if values.ndim != 1 or not -len(shape) <= axis < len(shape) or values.shape[0] != shape[axis]:
        raise BadValueError(f"offsets of shape {values.shape} do not fit axis {axis} of a tensor of shape {shape}")
    spread = [1] * len(shape)
    spread[axis] = -1
    return values.reshape(spread)


# ---------------------------------------------------------------------------------------------------
# Absolute codes: k with 2^((k − ½)/γ) ≤ |x| < 2^((k + ½)/γ), whatever the offset


@lru_cache(maxsize=32)
def _buckets(gamma: int, bits: int, kind: str) -> tuple[int, npt.NDArray[np.int32], npt.NDArray[np.int64]] | None:
    """Per bucket of leading significand bits: codes below it, and the one threshold inside it.

    None where one bucket may hold several thresholds and no table of this size can serve.
    """
    if gamma > _TABLE_LIMIT:
        return None
    index_bits = min(gamma.bit_length() + 1, bits)
    drop = bits - index_bits
    thresholds = tables.octave_thresholds(gamma, bits, kind).astype(np.int64) - (1 << bits)
    starts = np.arange(1 << index_bits, dtype=np.int64) << drop
    # A threshold at a bucket's start belongs to the codes below, so that the comparison inside is >.
    base = np.searchsorted(thresholds, starts, side="right").astype(np.int32)
    ends = np.append(base[1:], np.int32(gamma))
    if int((ends - base).max()) > 1:
        return None
    padded = np.append(thresholds, np.int64(1) << (bits + 1))
    return drop, base, padded[base]


class _AbsoluteCodes:
    """Maps |x| to its absolute code, for float32 or float64 input and one kind of rounding."""

    def __init__(self, gamma: int, dtype: np.dtype[Any], kind: str):
        self.gamma, self.kind = gamma, kind
        single = dtype == np.float32
        self.bits = 23 if single else 52
        self.bias = 127 if single else 1023
        self.unsigned = np.uint32 if single else np.uint64
        self.integer = np.int32 if single else np.int64
        # With int32 arithmetic the absolute code of any float32 must fit: γ·(255 + 127).
        self.work = np.int32 if single and gamma <= 1 << 21 else np.int64
        found = _buckets(gamma, self.bits, kind)
        self.wide = None if found else _WideOctave(gamma, kind)
        if found:
            self.drop, self.base, thresholds = found
            self.base = self.base.astype(self.work)
            self.thresholds = thresholds.astype(self.integer)

    def __call__(self, x: npt.NDArray[Any], name: str) -> npt.NDArray[Any]:
        """Absolute codes of a flat contiguous chunk; zero gives `_NOTHING`, infinity `_EVERYTHING`."""
        magnitude: Any = np.asarray(x.view(self.integer)) & ((1 << (8 * x.itemsize - 1)) - 1)
        top = int(magnitude.max()) if magnitude.size else 0
        infinity = (2 * self.bias + 1) << self.bits
        if top > infinity:
            raise BadValueError(f"{name} contains NaN, which has no LNS word")
        if self.wide is None:
            mantissa = magnitude & ((1 << self.bits) - 1)
            # intp indices spare np.take a conversion
            bucket = (mantissa >> self.drop).astype(np.intp)
            codes: npt.NDArray[Any] = self.base.take(bucket)
            codes += mantissa >= self.thresholds.take(bucket)
            exponent = (magnitude >> self.bits).astype(self.work)
        else:
            mantissa = magnitude & ((1 << self.bits) - 1)
            significand = (mantissa.astype(np.uint64) | np.uint64(1 << self.bits)) << np.uint64(62 - self.bits)
            codes = self.wide(significand, self.bits)
            exponent = (magnitude >> self.bits).astype(np.int64)
        exponent -= self.bias
        exponent *= self.gamma
        codes += exponent
        small = magnitude < (1 << self.bits)
        if top >= infinity or bool(small.any()):
            codes = codes.astype(np.int64)
            codes[magnitude == infinity] = _EVERYTHING
            codes[magnitude == 0] = _NOTHING
            subnormal = small & (magnitude != 0)
            if subnormal.any():
                codes[subnormal] = self._subnormal(magnitude[subnormal])
        return codes

    def _subnormal(self, magnitude: npt.NDArray[Any]) -> npt.NDArray[np.int64]:
        # The stored integer times 2^(1 − bias − bits): a float64 holds the integer itself exactly.
        scaled = magnitude.astype(np.float64)
        codes = _absolute(self.gamma, np.dtype(np.float64), self.kind)(scaled, "tensor").astype(np.int64)
        return codes + self.gamma * (1 - self.bias - self.bits)


@lru_cache(maxsize=32)
def _absolute(gamma: int, dtype: np.dtype[Any], kind: str) -> _AbsoluteCodes:
    return _AbsoluteCodes(gamma, dtype, kind)


def _multiply_high(a: npt.NDArray[np.uint64], b: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The upper 64 bits of a·b, less at most 2 units."""
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    a1, a0, b1, b0 = a >> half, a & mask, b >> half, b & mask
    cross = a1 * b0
    result: npt.NDArray[np.uint64] = a1 * b1 + (cross >> half) + ((a0 * b1 + (cross & mask)) >> half)
    return result


class _WideOctave:
    """Codes within one octave where γ is too large for a table with an entry per code.

    A code is h·S + l. Multiplying the significand by 2^(−h·S/γ) leaves a ratio in [1, 2^(S/γ)), whose
    l thresholds serve every h. What 62-bit integers cannot decide (about one in 2^30) is decided by
    arbitrary precision.
    """

    _ONE = 1 << 62
    _DOUBT = 64

    def __init__(self, gamma: int, kind: str):
        self.gamma, self.kind = gamma, kind
        self.step = 1 << (gamma.bit_length() // 2)
        count = -(-gamma // self.step)
        guard = 64
        fixed = [
            (
                tables.fixed_root(h * self.step, gamma, 62 + guard),
                tables.fixed_root(-h * self.step, gamma, 63),
            )
            for h in range(count)
        ]
        self.high = np.array([up >> guard for up, _ in fixed], dtype=np.uint64)
        self.inverse = np.array([min(down, (1 << 63)) for _, down in fixed], dtype=np.uint64)
        self.low_exact = self._low(62 + guard)
        self.low = np.array([v >> guard for v in self.low_exact], dtype=np.uint64)

    def _low(self, bits: int) -> list[int]:
        # one more than a step, because the last row may reach into the next
        if self.kind == "nearest":
            return tables.powers(self.gamma, self.step + 1, bits, half=True)
        grid = tables.powers(self.gamma, self.step + 2, bits)
        if self.kind == "floor":
            return grid[1:]
        return [(a + b) >> 1 for a, b in itertools.pairwise(grid)]

    def __call__(self, significand: npt.NDArray[np.uint64], bits: int) -> npt.NDArray[np.int64]:
        """Codes 0 … γ of significands in [2^62, 2^63)."""
        row = np.searchsorted(self.high, significand, side="right") - 1
        ratio = _multiply_high(significand, self.inverse[row]) << np.uint64(1)
        column = np.searchsorted(self.low, ratio, side="right")
        codes = row * self.step + column
        # between which thresholds, and is either too near to tell? (nothing lies below the first or above the last)
        padded = np.concatenate([[np.uint64(0)], self.low, [np.uint64((1 << 64) - 1)]])
        doubt = np.uint64(self._DOUBT)
        unsure = (padded[column + 1] - ratio < doubt) | (ratio - padded[column] < doubt)
        for index in np.flatnonzero(unsure):
            codes[index] = self._exact(int(significand[index]), int(codes[index]))
        return codes.astype(np.int64)

    def _exact(self, significand: int, guess: int) -> int:
        for code in range(max(guess - 2, 0), guess + 3):
            if significand << _EXACT_BITS < self._threshold(code):
                return code
        return guess + 3  # pragma: no cover - the guess is within one

    def _threshold(self, code: int) -> int:
        """2^62·threshold, with so many more bits that no 53-bit significand can lie within its error."""
        bits = 62 + _EXACT_BITS
        if self.kind == "nearest":
            return tables.fixed_root(2 * code + 1, 2 * self.gamma, bits)
        upper = 2 << bits if code + 1 == self.gamma else tables.fixed_root(code + 1, self.gamma, bits)
        if self.kind == "floor":
            return upper
        return (tables.fixed_root(code, self.gamma, bits) + upper) >> 1


# ---------------------------------------------------------------------------------------------------
# Encode


def encode(
    x: Any,
    fmt: LNSFormat,
    offset: Any,
    *,
    rounding: Rounding = "nearest",
    underflow: Underflow = "zero",
    negative: Negative = "error",
    seed: int = 0,
    stream: int = 0,
    name: str = "tensor",
    axis: int | None = None,
) -> Any:
    """Round floating-point numbers to LNS words (spec 2.1 to 2.4).

    Args:
        x: float16, float32, float64 (or bfloat16, in torch), any shape.
        fmt: the format of the words.
        offset: o, an integer, or integers [channels] with `axis`.
        rounding: ``"nearest"`` in the log domain, ``"linear"`` to nearest in the linear domain (a value
            on a bound takes the upper code), or ``"stochastic"`` (2.3).
        underflow: what becomes of magnitudes below code 1: ``"zero"``, or ``"min"`` for code 1.
        negative: what to do with a negative number in an unsigned format: ``"error"``, or ``"clip"``
            to treat it as zero.
        seed, stream: key of the random bits of stochastic rounding; elements are numbered in C order.
        name: names the tensor in error messages.
        axis: the channel axis of several offsets.
    Returns: words of `fmt.dtype`, the shape and kind (NumPy or torch) of `x`.

    Raises:
        BadValueError: NaN, or a negative number into an unsigned format, or an unknown option.
        BadTypeError: `x` is not floating point.
    """
    if rounding not in ROUNDINGS:
        raise UnknownNameError("rounding", rounding, ROUNDINGS)
    if underflow not in UNDERFLOWS:
        raise UnknownNameError("underflow rule", underflow, UNDERFLOWS)
    if negative not in ("error", "clip"):
        raise UnknownNameError("rule for negative numbers", negative, ("error", "clip"))
    values = _floats(x, name)
    shape = values.shape
    offsets = _offsets(offset, axis, shape)
    flat = np.ascontiguousarray(values).reshape(-1)
    gamma = fmt.gamma << STOCHASTIC_BITS if rounding == "stochastic" else fmt.gamma
    absolute = _absolute(gamma, flat.dtype, "linear" if rounding == "linear" else "nearest")
    floor = _absolute(gamma, flat.dtype, "floor") if rounding == "linear" else None
    if offsets.ndim:
        offsets = np.ascontiguousarray(np.broadcast_to(offsets, shape)).reshape(-1)
    words = np.empty(flat.shape, dtype=fmt.dtype)
    least = 0 if underflow == "zero" else 1
    narrow = fmt.bits < 32 and not offsets.ndim and -(1 << 29) < int(offsets) < 1 << 29
    for start in range(0, flat.size, _CHUNK):
        part = slice(start, min(start + _CHUNK, flat.size))
        chunk = flat[part]
        o = offsets[part] if offsets.ndim else int(offsets)
        codes = absolute(chunk, name)
        if rounding == "stochastic":
            codes = codes.astype(np.int64)
            codes -= np.asarray(o) << STOCHASTIC_BITS
            codes += random_bytes(seed, stream, len(chunk), start)
            codes >>= STOCHASTIC_BITS
        else:
            if not narrow:
                codes = codes.astype(np.int64)
            codes -= o
        if floor is not None and underflow == "zero":
            _round_up_to_one(codes, chunk, o, fmt, floor, name)
        # Anything below code 1 is now at most 0, so the lower clip is the underflow rule.
        np.maximum(codes, least, out=codes)
        np.minimum(codes, fmt.max_code, out=codes)
        minus = chunk < 0
        words[part] = codes
        if fmt.signed:
            # a product of mask and constant is several times faster than np.where
            minus &= codes > 0
            words[part] |= minus * fmt.dtype.type(fmt.sign_bit)
        elif minus.any():
            if negative == "error":
                raise BadValueError(
                    f"{name} contains negative numbers, which the unsigned format {fmt} cannot hold "
                    "(negative='clip' makes them zero)"
                )
            words[part][minus] = least
    return _like(words.reshape(shape), x)


def _floats(x: Any, name: str) -> npt.NDArray[Any]:
    values = _as_numpy(x, name)
    if values.dtype == np.float16:
        values = values.astype(np.float32)
    if values.dtype not in (np.float32, np.float64):
        raise BadTypeError(f"{name}: floating-point numbers are needed, not {values.dtype}")
    return values


def _round_up_to_one(
    codes: npt.NDArray[Any],
    chunk: npt.NDArray[Any],
    offset: Any,
    fmt: LNSFormat,
    floor: _AbsoluteCodes,
    name: str,
) -> None:
    """In the linear domain the bound between zero and code 1 is half of code 1's value (spec 2.2)."""
    low = codes < 1
    if not low.any():
        return
    o = offset[low] if isinstance(offset, np.ndarray) else offset
    reaches = floor(np.ascontiguousarray(chunk[low]), name).astype(np.int64) >= 1 + o - fmt.gamma
    codes[low] = reaches


# ---------------------------------------------------------------------------------------------------
# Decode


def decode(
    words: Any,
    fmt: LNSFormat,
    offset: Any,
    dtype: Any = np.float32,
    *,
    axis: int | None = None,
) -> Any:
    """The floating-point numbers nearest to the values of words (spec 2.5).

    Args:
        words: unsigned integers of `fmt.dtype`, any shape.
        offset: o, an integer, or integers [channels] with `axis`.
        dtype: float32 or float64. Values beyond its range become ±inf or ±0, as IEEE 754 rounds.
    Returns: an array (or tensor) of `dtype`, of the shape of `words`.

    Raises:
        BadTypeError: the words have another dtype than `fmt.dtype`.
        BadValueError: a word has bits above the format's width.
    """
    array = _as_numpy(words, "words")
    fmt.check(array)
    offsets = _offsets(offset, axis, array.shape)
    target = _float_dtype(dtype)
    if offsets.ndim == 0 and fmt.bits <= 16:
        return _like(_word_table(fmt, int(offsets), target).take(array), words)
    codes, signs = fmt.split(array)
    values = _power(codes + offsets, fmt.gamma, target)
    values[codes == 0] = 0
    np.negative(values, out=values, where=signs)
    return _like(values, words)


def decode_table(fmt: LNSFormat, offset: int, dtype: Any = np.float32) -> npt.NDArray[Any]:
    """Magnitudes of all codes: entry c is the value of code c, entry 0 is 0.

    Returns: array [C + 1] of `dtype`; formats up to 24 bits only.
    """
    if fmt.bits > 24:
        raise BadValueError(f"a table of all codes of {fmt} would have {fmt.max_code + 1} entries")
    values = _power(np.arange(fmt.max_code + 1, dtype=np.int64) + int(offset), fmt.gamma, _float_dtype(dtype))
    values[0] = 0
    return values


@lru_cache(maxsize=64)
def _word_table(fmt: LNSFormat, offset: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    magnitudes = decode_table(fmt, offset, dtype)
    if not fmt.signed:
        return magnitudes
    negative = -magnitudes
    negative[0] = 0
    return np.concatenate([magnitudes, negative])


def _float_dtype(dtype: Any) -> np.dtype[Any]:
    if _is_torch_dtype(dtype):
        dtype = str(dtype).removeprefix("torch.")
    try:
        target: np.dtype[Any] = np.dtype(dtype)
    except TypeError as error:
        raise BadTypeError(f"decode gives float32 or float64, not {dtype!r}") from error
    if target not in (np.dtype(np.float32), np.dtype(np.float64)):
        raise BadTypeError(f"decode gives float32 or float64, not {target}")
    return target


def _is_torch_dtype(dtype: object) -> bool:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(dtype, torch.dtype)


def _power(exponents: npt.NDArray[np.int64], gamma: int, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """2^(exponents/γ), correctly rounded to `dtype`."""
    octave, remainder = np.divmod(exponents, gamma)
    bits, least = (23, -126) if dtype == np.float32 else (52, -1022)
    if gamma <= _TABLE_LIMIT:
        significands = tables.octave_significands(gamma, bits).astype(np.float64)[remainder]
    else:
        significands = _wide_significands(remainder, gamma, bits)
    # ldexp of the correctly rounded significand is exact except where the result is subnormal
    shift = np.clip(octave, -4000, 4000).astype(np.int32)
    with np.errstate(over="ignore", under="ignore"):
        values: npt.NDArray[Any] = np.ldexp(significands.astype(dtype), shift - bits)
    tiny = octave < least
    if tiny.any():
        unique, where = np.unique(exponents[tiny], return_inverse=True)
        exact_values = [_subnormal(int(e), gamma, bits, least) for e in unique]
        values[tiny] = np.array(exact_values, dtype=dtype)[where]
    return values


@lru_cache(maxsize=8)
def _wide_factors(gamma: int) -> tuple[int, npt.NDArray[np.uint64], npt.NDArray[np.uint64]]:
    """2^63·2^(h·S/γ) and 2^63·2^(l/γ), truncated, and S: every 2^(i/γ) is a product of two."""
    step = 1 << (gamma.bit_length() // 2)
    high = [tables.fixed_root(h * step, gamma, 63) for h in range(-(-gamma // step))]
    low = [v >> 64 for v in tables.powers(gamma, step, 63 + 64)]
    return step, np.array(high, dtype=np.uint64), np.array(low, dtype=np.uint64)


def _wide_significands(remainder: npt.NDArray[np.int64], gamma: int, bits: int) -> npt.NDArray[np.float64]:
    """The integers nearest to 2^(bits + remainder/γ) where γ is too large for a table."""
    step, high, low = _wide_factors(gamma)
    row, column = np.divmod(remainder, step)
    product = _multiply_high(high[row], low[column])  # 2^62·2^(remainder/γ), to within 6 units
    drop = np.uint64(62 - bits)
    half = np.uint64(1 << (61 - bits))
    doubt = np.uint64(8)
    result = ((product + half) >> drop).astype(np.float64)
    unsure = ((product + half - doubt) >> drop) != ((product + half + doubt) >> drop)
    for index in zip(*np.nonzero(unsure), strict=True):
        result[index] = tables.octave_significand(gamma, bits, int(remainder[index]))
    return result


def _subnormal(exponent: int, gamma: int, bits: int, least: int) -> float:
    """2^(exponent/γ) rounded to a multiple of the smallest subnormal, 2^(least − bits)."""
    units = exponent + gamma * (bits - least)
    if units < -gamma:
        return 0.0
    # nearest integer to 2^(units/γ); a tie needs a half, reached only at exactly 2^−1, which goes to even
    if units == -gamma:
        return 0.0
    doubled = tables.octave_significand(gamma, 1 + units // gamma, units % gamma, floor=True)
    return float((doubled + 1) >> 1) * 2.0 ** (least - bits)


# ---------------------------------------------------------------------------------------------------
# Calibration


def calibrate(
    x: Any,
    fmt: LNSFormat,
    *,
    method: Method = "absmax",
    axis: int | None = None,
    percentile: float = 99.9,
    name: str = "tensor",
) -> Any:
    """The offset for a tensor: the smallest whose largest value is not below a chosen maximum (spec 2.6).

    Args:
        x: floating point, any shape.
        method: ``"absmax"``: the largest magnitude; ``"percentile"``: the smallest magnitude in `x` that
            at least `percentile` per cent of the magnitudes do not exceed; ``"lsq"``: the offset that
            minimises the sum of squared errors of encoding `x` (to nearest, underflow to zero).
        axis: calibrate each channel of this axis apart.
        percentile: above 0, up to 100.
    Returns: int, or int64 [channels] where `axis` is given. A tensor (channel) of zeros gets 0.

    Raises:
        BadValueError: NaN or infinity in `x`, or an argument out of range.
    """
    if method not in METHODS:
        raise UnknownNameError("calibration method", method, METHODS)
    if not 0 < percentile <= 100:
        raise BadValueError(f"percentile must be above 0 and at most 100, not {percentile}")
    values = _floats(x, name)
    if values.size and not np.isfinite(values).all():
        raise BadValueError(f"{name} contains NaN or infinity; it cannot be calibrated")

    def one(magnitudes: npt.NDArray[Any]) -> int:
        if method == "lsq":
            return _least_squares_offset(magnitudes, fmt)
        if method == "percentile":
            return _offset_for(_order_statistic(magnitudes, percentile), fmt)
        return _offset_for(float(magnitudes.max()) if magnitudes.size else 0.0, fmt)

    if axis is None:
        return one(np.abs(values).reshape(-1))
    if not -values.ndim <= axis < values.ndim:
        raise BadValueError(f"{name} of shape {values.shape} has no axis {axis}")
    channels = np.abs(np.moveaxis(values, axis, 0))
    if method == "absmax":
        return offsets_for(channels.max(axis=tuple(range(1, channels.ndim)), initial=0.0), fmt)
    return np.array([one(channel.reshape(-1)) for channel in channels], dtype=np.int64)


def offset_for(maximum: float, fmt: LNSFormat) -> int:
    """The smallest offset at which `fmt` reaches `maximum` (a finite number ≥ 0); 0 for zero."""
    if not (np.isfinite(maximum) and maximum >= 0):
        raise BadValueError(f"a maximum must be finite and not negative, not {maximum}")
    return _offset_for(float(maximum), fmt)


def absolute_codes(magnitudes: npt.NDArray[np.float64], gamma: int) -> npt.NDArray[np.int64]:
    """The k with 2^((k − ½)/γ) ≤ x < 2^((k + ½)/γ) of float64 x ≥ 0; far below every code for 0 (spec 2.1)."""
    flat = np.ascontiguousarray(magnitudes, dtype=np.float64).reshape(-1)
    return _absolute(gamma, flat.dtype, "nearest")(flat, "magnitudes").astype(np.int64).reshape(np.shape(magnitudes))


def decode_power(exponents: npt.NDArray[np.int64], gamma: int) -> npt.NDArray[np.float64]:
    """2^(exponents/γ), correctly rounded to float64."""
    return _power(np.asarray(exponents, dtype=np.int64), gamma, np.dtype(np.float64))


def offsets_for(maxima: npt.ArrayLike, fmt: LNSFormat) -> npt.NDArray[np.int64]:
    """As :func:`offset_for`, for an array of maxima: int64 of its shape."""
    values = np.asarray(maxima, dtype=np.float64)
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise BadValueError("maxima must be finite and not negative")
    flat = np.ascontiguousarray(values).reshape(-1)
    codes = _absolute(fmt.gamma, flat.dtype, "floor")(flat, "maxima").astype(np.int64)
    # no other float than a power of two is 2^(k/γ)
    codes += np.frexp(flat)[0] != 0.5
    codes -= fmt.max_code
    codes[flat == 0] = 0
    return codes.reshape(values.shape)


@lru_cache(maxsize=4096)
def _offset_for(maximum: float, fmt: LNSFormat) -> int:
    if maximum == 0:
        return 0
    return tables.ceil_log2(Fraction(maximum), fmt.gamma) - fmt.max_code


def _order_statistic(magnitudes: npt.NDArray[Any], percentile: float) -> float:
    if not magnitudes.size:
        return 0.0
    rank = max(-(-magnitudes.size * percentile // 100), 1)
    index = min(int(rank), magnitudes.size) - 1
    return float(np.partition(magnitudes, index)[index])


def _least_squares_offset(magnitudes: npt.NDArray[Any], fmt: LNSFormat) -> int:
    """All tensors share one grid of absolute codes, so one histogram serves every candidate offset."""
    magnitudes = np.ascontiguousarray(magnitudes[magnitudes > 0])
    if not magnitudes.size:
        return 0
    codes = np.concatenate(
        [
            _absolute(fmt.gamma, magnitudes.dtype, "nearest")(magnitudes[i : i + _CHUNK], "tensor")
            for i in range(0, magnitudes.size, _CHUNK)
        ]
    ).astype(np.int64)
    # one empty bin below all, because saturating everything may be best: 1.45 is nearer to 1 than to 2
    first = int(codes.min()) - 1
    bins = int(codes.max()) - first + 1
    wide = magnitudes.astype(np.float64)
    wide /= wide.max()
    index = codes - first
    count = np.bincount(index, minlength=bins).astype(np.float64)
    total = np.bincount(index, weights=wide, minlength=bins)
    square = np.bincount(index, weights=wide * wide, minlength=bins)
    value = np.exp2((np.arange(bins) + first) / fmt.gamma - np.log2(float(magnitudes.max())))
    inside = np.concatenate([[0.0], np.cumsum(square - 2 * value * total + value * value * count)])
    flushed = np.concatenate([[0.0], np.cumsum(square)])
    # top is the bin of the largest code; bins above it saturate to its value
    best, best_error = bins - 1, np.inf
    rest = np.cumsum(np.stack([count, total, square])[:, ::-1], axis=1)[:, ::-1]
    for top in range(bins - 1, -1, -1):
        low = max(top - fmt.max_code + 1, 0)
        error = flushed[low] + inside[top + 1] - inside[low]
        if top + 1 < bins:
            n, s1, s2 = rest[:, top + 1]
            clipped = s2 - 2 * value[top] * s1 + value[top] ** 2 * n
            if clipped > best_error:
                break  # saturation alone is worse from here down
            error += clipped
        if error < best_error:
            best, best_error = top, error
    return first + best - fmt.max_code


# ---------------------------------------------------------------------------------------------------
# Random bits (spec 2.3)

_PHILOX_M = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_PHILOX_W = (0x9E3779B9, 0xBB67AE85)


def philox4x32(
    even: npt.NDArray[np.uint64], odd: npt.NDArray[np.uint64], key: tuple[int, int]
) -> tuple[npt.NDArray[np.uint64], ...]:
    """Philox4x32 with ten rounds (Salmon et al. 2011), in place.

    Args:
        even: words 0 and 2 of each counter, uint64 [2, n]; odd: words 1 and 3. Both are overwritten.
        key: two 32-bit words.
    Returns: the four output words, uint64 [n] each.
    """
    product = np.empty_like(even)
    mask, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    k0, k1 = key
    for _ in range(10):
        np.multiply(even, _PHILOX_M, out=product)
        np.right_shift(product[::-1], half, out=even)
        even ^= odd
        even ^= np.array([[k0], [k1]], dtype=np.uint64)
        np.bitwise_and(product[::-1], mask, out=odd)
        k0, k1 = (k0 + _PHILOX_W[0]) & 0xFFFFFFFF, (k1 + _PHILOX_W[1]) & 0xFFFFFFFF
    return even[0], odd[0], even[1], odd[1]


def random_bytes(seed: int, stream: int, count: int, start: int = 0) -> npt.NDArray[np.uint8]:
    """Random bytes number `start` … `start + count − 1` of a stream (spec 2.3).

    Byte i is byte i mod 16 (little-endian) of the Philox4x32-10 block with counter
    (⌊i/16⌋ low, ⌊i/16⌋ high, stream low, stream high) and key (seed low, seed high).

    Args:
        seed, stream: integers, taken modulo 2^64.
    Returns: uint8 [count].
    """
    if count < 0 or start < 0:
        raise BadValueError(f"count and start must not be negative, not {count} and {start}")
    first, last = start // 16, -(-(start + count) // 16)
    data = np.empty((last - first, 4), dtype="<u4")
    for block in range(first, last, _CHUNK):
        part = slice(block - first, min(block + _CHUNK, last) - first)
        index = np.arange(block, min(block + _CHUNK, last), dtype=np.uint64)
        words = philox4x32(
            np.stack([index & np.uint64(0xFFFFFFFF), np.full_like(index, stream & 0xFFFFFFFF)]),
            np.stack([index >> np.uint64(32), np.full_like(index, (stream >> 32) & 0xFFFFFFFF)]),
            (seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF),
        )
        for column, word in enumerate(words):
            data[part, column] = word
    flat = data.reshape(-1).view(np.uint8)
    return flat[start - 16 * first :][:count]
