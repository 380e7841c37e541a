"""Tables as SystemVerilog: one `case` each behind `lns_rom`, and the `lns_delta` that a datapath's adders use.

Every entry comes from :mod:`lnsdeploy.tables` or :mod:`lnsdeploy.delta`, as the emulator's do.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lnsdeploy import delta as methods
from lnsdeploy import tables
from lnsdeploy.datapath import LinearAccumulator, LogAccumulator
from lnsdeploy.errors import UnsupportedError

# IDs of lns_pkg.sv; an adder's tables are counted from its base.
ROM_CONSTANTS, ROM_ENCODER, ROM_FLOAT = 0, 1, 2
DELTA_BASES = (3, 6)
# A table of more entries is no ROM that anybody would build.
MAX_ENTRIES = 1 << 17


@dataclass(frozen=True)
class Rom:
    """A table.

    Args:
        id: the number that modules know it by.
        name: for people.
        address_bits, data_bits: its widths, as the modules that read it compute them.
        entries: non-negative integers from address 0 on; beyond them the table is zero.
    """

    id: int
    name: str
    address_bits: int
    data_bits: int
    entries: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Bits that are stored."""
        return len(self.entries) * self.data_bits


@dataclass(frozen=True)
class Adder:
    """An LNS adder's Δ: which module makes it, with which parameters and tables.

    Args:
        kind: the method.
        value_bits: of the largest Δ, at least 1.
        parameters: of the module `lns_delta_<module>`.
        roms: its tables.
    """

    kind: str
    module: str
    value_bits: int
    parameters: Mapping[str, str | int]
    roms: tuple[Rom, ...]


def bits_of(value: int) -> int:
    """Bits of a non-negative integer, at least 1."""
    return max(int(value).bit_length(), 1)


def _ints(values: Sequence[int] | np.ndarray) -> tuple[int, ...]:
    return tuple(int(v) for v in values)


def signed_bits(low: int, high: int) -> int:
    """Bits of a two's complement integer that holds both, at least 2."""
    return max(int(high).bit_length(), int(~low if low < 0 else low).bit_length(), 1) + 1


def linear_roms(accumulator: LinearAccumulator, gamma: int, total_bits: int) -> tuple[Rom, ...]:
    """The tables of linear accumulation: constants (spec 4.1) and the encoder's (spec 4.6)."""
    f = gamma.bit_length() - 1
    made = [
        Rom(
            ROM_CONSTANTS,
            "remainder constants",
            max(accumulator.table_bits, 1),
            accumulator.constant_bits + 1,
            _ints(tables.remainder_constants(accumulator.table_bits, accumulator.constant_bits)),
        )
    ]
    if accumulator.encoder == "exact":
        made.append(threshold_rom(ROM_ENCODER, gamma, f + 1, max(total_bits - 1, f + 1)))
    elif accumulator.encoder == "table":
        bits = accumulator.encoder_bits or 0
        made.append(Rom(ROM_ENCODER, "logarithms", bits, f + 1, _ints(tables.log_table(gamma, bits))))
    return tuple(made)


def threshold_rom(ident: int, gamma: int, index_bits: int, fraction_bits: int) -> Rom:
    """Entries {codes below the segment, the place of its threshold} for lns_fraction (spec 2.1, 4.6).

    Args:
        index_bits: segments an octave, 2^index_bits ≥ 2γ, so that none holds two thresholds.
        fraction_bits: of the significands.
    """
    low_bits = fraction_bits - index_bits
    thresholds = [int(t) - (1 << fraction_bits) for t in tables.octave_thresholds(gamma, fraction_bits, "nearest")]
    entries, below = [], 0
    for segment in range(1 << index_bits):
        start = segment << low_bits
        while below < gamma and thresholds[below] <= start:
            below += 1
        place = 1 << low_bits  # past the end: none here
        if below < gamma and thresholds[below] < start + (1 << low_bits):
            place = thresholds[below] - start
        entries.append((below << (low_bits + 1)) | place)
    return Rom(ident, "thresholds", index_bits, bits_of(gamma) + low_bits + 1, tuple(entries))


def adder(accumulator: LogAccumulator, gamma: int, which: int) -> Adder:
    """The Δ of an adder (spec 5.7).

    Args:
        gamma: γ of the words; the accumulator's guard bits multiply it.
        which: 0 for dot products, 1 for the datapath's `add`.

    Raises:
        UnsupportedError: tables of more entries than a ROM would hold.
    """
    method, acc_gamma, base = accumulator.delta, gamma << accumulator.guard_bits, DELTA_BASES[which]
    made = method.tables(acc_gamma)
    plus, minus = _ints(made.plus), _ints(made.minus)
    value_bits = bits_of(max([*plus, *minus, 0]))
    exact_plus, exact_minus = tables.delta_plus(acc_gamma), tables.delta_minus(acc_gamma)
    ends: dict[str, str | int] = {"PLUS_END": len(exact_plus), "MINUS_END": len(exact_minus)}
    parameters: dict[str, str | int]
    roms: tuple[Rom, ...]
    if isinstance(method, methods.Max):
        return Adder(method.kind, "none", value_bits, {}, ())
    if isinstance(method, (methods.Exact, methods.Table)):
        step = method.step if isinstance(method, methods.Table) else 1
        plus, minus = plus[::step], minus[::step]
        index = bits_of(max(len(plus), len(minus), 1) - 1)
        parameters = {"STEP_LOG2": step.bit_length() - 1, "INDEX_BITS": index, "ROM_BASE": base}
        roms = (Rom(base, "sums", index, value_bits, plus), Rom(base + 1, "differences", index, value_bits, minus))
        module = "rom"
    elif isinstance(method, methods.Interpolated):
        module = "interpolated"
        parameters, roms = _interpolated(method, exact_plus, exact_minus, value_bits, base)
        parameters |= ends
    elif isinstance(method, methods.Cotransform):
        module = "cotransform"
        high = exact_minus[:: 1 << method.split]
        low = exact_minus[: 1 << method.split]
        high_bits = bits_of(max(len(high) - 1, 0))
        plus_bits = bits_of(len(exact_plus) - 1)
        parameters = {"SPLIT": method.split, "PLUS_BITS": plus_bits, "HIGH_BITS": high_bits, "ROM_BASE": base}
        parameters |= ends
        roms = (
            Rom(base, "sums", plus_bits, value_bits, _ints(exact_plus)),
            Rom(base + 1, "differences, high part", high_bits, value_bits, (0, *_ints(high[1:]))),
            Rom(base + 2, "differences, low part", method.split, value_bits, (0, *_ints(low[1:]))),
        )
    elif isinstance(method, methods.Mitchell):
        module, parameters, roms = "mitchell", {"GAMMA": acc_gamma}, ()
    elif isinstance(method, methods.Shift):
        module, roms = "shift", ()
        parameters = {"GAMMA": acc_gamma, "CONSTANT": methods.scaled_log2_e(acc_gamma)}
    elif isinstance(method, methods.Polynomial):
        module = "polynomial"
        parameters, roms = _polynomial(method, acc_gamma, len(exact_plus), len(exact_minus), base)
        parameters |= ends
    elif isinstance(method, methods.Cordic):
        module = "cordic"
        parameters, roms = _cordic(method, acc_gamma, base)
        parameters |= ends
    else:
        raise UnsupportedError(f"no hardware is known for the method {method.kind!r}: see CONTRIBUTING.md")
    largest = max((len(rom.entries) for rom in roms), default=0)
    if largest > MAX_ENTRIES:
        raise UnsupportedError(
            f"delta {method.kind!r} at gamma {acc_gamma} has a table of {largest} entries, where a ROM has at most "
            f"{MAX_ENTRIES}: interpolated or polynomial takes less"
        )
    return Adder(method.kind, module, value_bits, parameters, roms)


def _segment_widths(method: methods.Interpolated | methods.Polynomial, ends: tuple[int, int]) -> dict[str, str | int]:
    widths = [next(iter(methods.segments_of(end, method.segments, method.spacing)), (0, 1))[1] for end in ends]
    return {
        "SEGMENTS_LOG2": method.segments.bit_length() - 1,
        "OCTAVE": int(method.spacing == "octave"),
        "PLUS_WIDTH_LOG2": widths[0].bit_length() - 1,
        "MINUS_WIDTH_LOG2": widths[1].bit_length() - 1,
    }


def _interpolated(
    method: methods.Interpolated, plus: np.ndarray, minus: np.ndarray, value_bits: int, base: int
) -> tuple[dict[str, str | int], tuple[Rom, ...]]:
    both = []
    for exact, is_minus in ((plus, False), (minus, True)):
        entries = []
        for start, width in methods.segments_of(len(exact), method.segments, method.spacing):
            first, last = _ints(methods._sampled(exact, np.array([start, start + width]), is_minus))
            entries.append((first, (((first - last) << (method.slope_bits + 1)) + width) // (2 * width)))
        both.append(entries)
    slope_bits = bits_of(max(slope for entries in both for _, slope in entries))
    index = bits_of(max(len(entries) for entries in both) - 1)
    roms = tuple(
        Rom(base + i, name, index, value_bits + slope_bits, tuple((v << slope_bits) | s for v, s in entries))
        for i, (name, entries) in enumerate(zip(("sums", "differences"), both, strict=True))
    )
    parameters = _segment_widths(method, (len(plus), len(minus)))
    parameters |= {
        "SLOPE_FRACTION": method.slope_bits,
        "SLOPE_BITS": slope_bits,
        "INDEX_BITS": index,
        "ROM_BASE": base,
    }
    return parameters, roms


def _polynomial(
    method: methods.Polynomial, gamma: int, plus: int, minus: int, base: int
) -> tuple[dict[str, str | int], tuple[Rom, ...]]:
    both = [
        [
            _ints(method._coefficients(gamma, start, width, is_minus))
            for start, width in methods.segments_of(end, method.segments, method.spacing)
        ]
        for end, is_minus in ((plus, False), (minus, True))
    ]
    every = [c for segments in both for coefficients in segments for c in coefficients]
    bits = signed_bits(min(every), max(every))
    # |h·u| ≤ |h| in each step (u < 1), so no intermediate value is above the sum of the coefficients' magnitudes
    horner = max(sum(abs(c) + 1 for c in coefficients) for segments in both for coefficients in segments)
    horner += 1 << method.width
    index = bits_of(max(map(len, both)) - 1)
    mask = (1 << bits) - 1
    roms = tuple(
        Rom(
            base + i,
            name,
            index,
            bits * (method.degree + 1),
            tuple(sum((c & mask) << (k * bits) for k, c in enumerate(coefficients)) for coefficients in segments),
        )
        for i, (name, segments) in enumerate(zip(("sums", "differences"), both, strict=True))
    )
    parameters = _segment_widths(method, (plus, minus))
    parameters |= {
        "DEGREE": method.degree,
        "FRACTION": method.width,
        "COEFFICIENT_BITS": bits,
        "HORNER_BITS": max(signed_bits(-horner, horner), bits),
        "INDEX_BITS": index,
        "ROM_BASE": base,
    }
    return parameters, roms


def _cordic(method: methods.Cordic, gamma: int, base: int) -> tuple[dict[str, str | int], tuple[Rom, ...]]:
    w = method.width
    constants = method.constants()
    parameters: dict[str, str | int] = {
        "GAMMA": gamma,
        "ITERATIONS": method.iterations,
        "WIDTH": w,
        "LN2": f"64'd{constants.ln2}",
        "START": f"64'd{constants.start}",
        "SCALE": f"96'd{gamma * constants.inverse}",
        "ROM_BASE": base,
    }
    return parameters, (Rom(base, "angles", 6, w + 8, tuple(constants.angles)),)


# ---------------------------------------------------------------------------------------------------
# Text

_LICENCE = "// SPDX-License-Identifier: Apache-2.0\n"


def rom_text(roms: Sequence[Rom]) -> str:
    """lns_rom.sv: every table, selected by its ID."""
    lines = [
        _LICENCE + "//\n// Generated by lnsdeploy: every table of the datapath (9.1).\n",
        "module lns_rom #(",
        "    parameter int ID        = 0,",
        "    parameter int ADDR_BITS = 1,",
        "    parameter int DATA_BITS = 1",
        ") (",
        "    input  logic [ADDR_BITS-1:0] addr_i,",
        "    output logic [DATA_BITS-1:0] data_o",
        ");\n",
        "  generate",
    ]
    for rom in sorted(roms, key=lambda rom: rom.id):
        lines.append(f"    if (ID == {rom.id}) begin : gen_rom_{rom.id}  // {rom.name}, {len(rom.entries)} entries")
        lines.append("      always_comb begin\n        case (addr_i)")
        digits = (rom.data_bits + 3) // 4
        lines += [
            f"          {rom.address_bits}'d{i}: data_o = {rom.data_bits}'h{entry:0{digits}x};"
            for i, entry in enumerate(rom.entries)
            if entry
        ]
        lines.append("          default: data_o = '0;\n        endcase\n      end\n    end")
    known = " && ".join(f"ID != {rom.id}" for rom in roms) or "1"
    lines.append(f"    if ({known}) begin : gen_none\n      assign data_o = '0;\n    end")
    lines.append("  endgenerate\n\nendmodule\n")
    return "\n".join(lines)


def delta_text(adders: Mapping[int, Adder]) -> str:
    """lns_delta.sv: the Δ of each adder, by its number."""
    lines = [
        _LICENCE + "//\n// Generated by lnsdeploy: how each adder makes its Gaussian logarithms (5.7).\n",
        "module lns_delta #(",
        "    parameter int ID     = 0,",
        "    parameter int D_BITS = 7,",
        "    parameter int V_BITS = 4",
        ") (",
        "    input  logic              minus_i,",
        "    input  logic [D_BITS-1:0] d_i,",
        "    output logic [V_BITS-1:0] delta_o",
        ");\n",
        "  generate",
    ]
    for ident, made in sorted(adders.items()):
        lines.append(f"    if (ID == {ident}) begin : gen_delta_{ident}  // {made.kind}")
        if made.module == "none":
            lines.append("      assign delta_o = '0;\n    end")
            continue
        given = [".D_BITS(D_BITS)", ".V_BITS(V_BITS)", *(f".{k}({v})" for k, v in sorted(made.parameters.items()))]
        lines.append(f"      lns_delta_{made.module} #(")
        lines.append(",\n".join(f"          {entry}" for entry in given))
        lines.append("      ) i_delta (")
        if made.module not in ("mitchell", "shift"):
            lines.append("          .minus_i(minus_i),")
        lines.append("          .d_i(d_i),\n          .delta_o(delta_o)\n      );\n    end")
    known = " && ".join(f"ID != {ident}" for ident in adders) or "1"
    lines.append(f"    if ({known}) begin : gen_none\n      assign delta_o = '0;\n    end")
    lines.append("  endgenerate\n\nendmodule\n")
    return "\n".join(lines)
