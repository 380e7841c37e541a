"""Where an accumulator stands, given the largest magnitude it must hold (docs/datapath.md, 4.3, 4.5, 5).

Shared by lowering, which follows partial sums term by term, and by emulation on the fly, which samples them. Nothing
here decides a bit of an executor: the integers that follow are written into plans.
"""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import numpy.typing as npt

from lnsdeploy import formats, tables
from lnsdeploy.datapath import LinearAccumulator, LogAccumulator
from lnsdeploy.emulator.plan import Ints


def finest_lsb(accumulator: LinearAccumulator, gamma: int) -> int:
    """The λ below which no product has a bit."""
    f = gamma.bit_length() - 1
    low_bits = f - accumulator.table_bits
    return -((f if low_bits else 0) + (accumulator.constant_bits if accumulator.conversion == "product" else 0))


def lsb_for(largest: float, accumulator: LinearAccumulator, gamma: int, headroom: float) -> int:
    """λ for a largest sum, in units of 2^(S/γ), with `headroom` octaves above it."""
    finest = finest_lsb(accumulator, gamma)
    if largest <= 0:
        return finest
    limit = (1 << (accumulator.bits - 1)) - 1
    return max(math.ceil(math.log2(largest) + headroom - math.log2(limit)), finest)


def acc_offset_for(peak: float, gamma: int, accumulator: LogAccumulator, headroom: float) -> int:
    """The offset at which the accumulator's largest code lies `headroom` octaves above `peak`."""
    top = tables.ceil_log2(Fraction(peak), gamma) + math.ceil(headroom * gamma)
    return top - (accumulator.max_code >> accumulator.guard_bits)


def bias_integers(
    bias: npt.NDArray[np.float64], shift: Ints, gamma: int, lsb: int, accumulator: LinearAccumulator
) -> Ints:
    """A real bias [N] as integers at a linear accumulator's least significant bit (spec 4.5).

    Args:
        shift: S_n, int64 [N].
    """
    limit = (1 << (accumulator.bits - 1)) - 1
    octave, part = np.divmod(-shift, gamma)
    # the power is correctly rounded, and what follows is exact but for one product: the same on every platform
    power = formats.decode_power(part, gamma)
    scaled = np.ldexp(bias * power, np.clip(octave - lsb, -2000, 2000).astype(np.int32))
    made: Ints = np.clip(np.floor(scaled + 0.5), -limit, limit).astype(np.int64)
    return made


def bias_words(bias: npt.NDArray[np.float64], offset: Ints, gamma: int, accumulator: LogAccumulator) -> Ints:
    """A real bias [N] as words of a log accumulator: sign · 2^bits + code (spec 5.5).

    Args:
        offset: o_acc, int64 [N].
    """
    codes = formats.absolute_codes(np.abs(bias), gamma << accumulator.guard_bits) - (offset << accumulator.guard_bits)
    codes = np.where((codes < 1) | (bias == 0), 0, np.minimum(codes, accumulator.max_code))
    made: Ints = codes + ((bias < 0) & (codes > 0)) * (1 << accumulator.bits)
    return made
