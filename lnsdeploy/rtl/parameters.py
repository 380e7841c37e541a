"""What a plan makes of a datapath in hardware: the parameters of `lns_pe` and `lns_array`, and their tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import DotPlan
from lnsdeploy.errors import UnsupportedError
from lnsdeploy.formats import LNSFormat
from lnsdeploy.rtl.roms import Adder, Rom, adder, bits_of, linear_roms, signed_bits

Ints = npt.NDArray[np.int64]

# A shifter of more bits is no hardware: γ this small beside words this wide have too many octaves.
MAX_SHIFTER_BITS = 2048
_ENCODERS = {"exact": 0, "table": 1, "mitchell": 2}


@dataclass(frozen=True)
class PEParameters:
    """Parameters of `lns_pe`, by the names that it has for them, and the tables that it reads.

    Args:
        datapath: whose arithmetic it is.
        values: parameter by name.
        roms: the tables, without the adders'.
        adders: by number: 0 of the dot products, where they accumulate in the log domain.
        fraction_bits: F of spec 4.2.
    """

    datapath: Datapath
    values: dict[str, int]
    roms: tuple[Rom, ...]
    adders: dict[int, Adder]
    fraction_bits: int

    @property
    def all_roms(self) -> tuple[Rom, ...]:
        """The tables, with the adders'."""
        return self.roms + tuple(rom for made in self.adders.values() for rom in made.roms)

    def scales(self, plan: DotPlan, channels: int) -> Ints:
        """scale_i of each output channel, int64 [channels]."""
        if plan.datapath.is_linear:
            return np.full(channels, self.fraction_bits + plan.lsb, dtype=np.int64)
        return plan.product_offset(channels) - plan.accumulator_offset(channels)

    def offsets(self, plan: DotPlan, channels: int) -> Ints:
        """offset_i of each output channel, int64 [channels]."""
        return _offsets(plan, channels)

    def biases(self, plan: DotPlan, bias: Ints | None, channels: int) -> Ints:
        """bias_i of each output channel, int64 [channels]: fitted already (spec 4.5), as unsigned bit patterns."""
        if bias is None:
            return np.zeros(channels, dtype=np.int64)
        values = np.asarray(bias, dtype=np.int64)
        if plan.datapath.is_linear:
            accumulator = plan.datapath.linear
            fitted: Ints = reference._fit(values, accumulator.bits, accumulator.overflow)
            return fitted & ((1 << accumulator.bits) - 1)
        return values & ((1 << (plan.datapath.log.bits + 1)) - 1)


def _offsets(plan: DotPlan, channels: int) -> Ints:
    if not plan.datapath.is_linear:
        return plan.accumulator_offset(channels) - plan.output_offset
    accumulator = plan.datapath.linear
    lsb = plan.lsb - (accumulator.constant_bits if accumulator.conversion == "bin" else 0)
    return plan.gamma * lsb + plan.product_offset(channels) - plan.output_offset


def pe_parameters(plans: Sequence[tuple[DotPlan, int]], *, pipe_terms: bool = True) -> PEParameters:
    """Parameters that fit every plan of one datapath and one set of formats.

    Args:
        plans: each with its number of output channels.
        pipe_terms: registers between products and sum.

    Raises:
        UnsupportedError: a plan asks for shifters or tables that are no hardware.
    """
    first = plans[0][0]
    datapath = first.datapath
    p_max = first.max_product_code
    values: dict[str, int] = {
        "A_BITS": first.activation.bits,
        "A_SIGNED": int(first.activation.signed),
        "A_SCALE": first.widen_activation,
        "W_BITS": first.weight.bits,
        "W_SIGNED": int(first.weight.signed),
        "W_SCALE": first.widen_weight,
        "P_BITS": bits_of(p_max),
        "OUT_BITS": first.output.bits,
        "OUT_SIGNED": int(first.output.signed),
        "UNDERFLOW": int(datapath.underflow == "min"),
        "PIPE_TERMS": int(pipe_terms),
    }
    made = _linear(datapath, plans, values) if datapath.is_linear else _log(datapath, values)
    scales = np.concatenate([made.scales(plan, n) for plan, n in plans])
    offsets = np.concatenate([_offsets(plan, n) for plan, n in plans])
    values["SCALE_BITS"] = signed_bits(int(scales.min()), int(scales.max()))
    values["OFFSET_BITS"] = signed_bits(int(offsets.min()), int(offsets.max()))
    return made


def _linear(datapath: Datapath, plans: Sequence[tuple[DotPlan, int]], values: dict[str, int]) -> PEParameters:
    accumulator, gamma = datapath.linear, datapath.gamma
    f = gamma.bit_length() - 1
    mitchell = f - accumulator.table_bits > 0
    product = accumulator.conversion == "product"
    fraction_bits = (f if mitchell else 0) + (accumulator.constant_bits if product else 0)
    shifter = fraction_bits + 2 + (1 << max(values["P_BITS"] - f, 1))
    largest = max(_largest_term(plan) for plan, _ in plans)
    if max(shifter, bits_of(largest)) > MAX_SHIFTER_BITS:
        raise UnsupportedError(
            f"datapath {datapath.name!r} would need shifters of {max(shifter, bits_of(largest))} bits, more than "
            f"{MAX_SHIFTER_BITS}: take a larger gamma or narrower words"
        )
    total = accumulator.bits
    if not product:
        total += accumulator.constant_bits + accumulator.table_bits + 1
    encoder_bits = {"exact": f + 1, "table": accumulator.encoder_bits or 1, "mitchell": max(f, 1)}[accumulator.encoder]
    values |= {
        "LOG": 0,
        "LANES": accumulator.lanes,
        "ACC_BITS": accumulator.bits,
        "F": f,
        "TABLE_BITS": accumulator.table_bits,
        "CONST_BITS": accumulator.constant_bits,
        "CONVERSION": int(not product),
        "SHIFT": int(accumulator.shift == "round"),
        "TERM_BITS": bits_of(largest),
        "PSUM_BITS": accumulator.step_bits,
        "TOTAL_BITS": total,
        "OVERFLOW": int(accumulator.overflow == "saturate"),
        "ENCODER": _ENCODERS[accumulator.encoder],
        "ENCODER_BITS": encoder_bits,
    }
    return PEParameters(datapath, values, linear_roms(accumulator, gamma, total), {}, fraction_bits)


def _largest_term(plan: DotPlan) -> int:
    """The largest aligned magnitude (spec 4.3)."""
    gamma = plan.gamma
    if plan.max_product_code // gamma - plan.lsb > 2 * MAX_SHIFTER_BITS:
        return 1 << (2 * MAX_SHIFTER_BITS)
    # terms grow with the quotient, so the largest is among the last two octaves
    codes = np.arange(max(plan.max_product_code - 2 * gamma, 0), plan.max_product_code + 1, dtype=np.int64)
    return int(reference._terms(plan)._compute(codes).max())


def _log(datapath: Datapath, values: dict[str, int]) -> PEParameters:
    accumulator = datapath.log
    made = adder(accumulator, datapath.gamma, 0)
    values |= {
        "LOG": 1,
        "LANES": accumulator.lanes,
        "ACC_BITS": accumulator.bits,
        "GUARD": accumulator.guard_bits,
        "DELTA_BITS": made.value_bits,
    }
    return PEParameters(datapath, values, (), {0: made}, 0)


def key_of(plan: DotPlan) -> tuple[str, LNSFormat, LNSFormat, LNSFormat]:
    """Plans with equal keys run on the same hardware."""
    return plan.datapath.fingerprint, plan.activation, plan.weight, plan.output
