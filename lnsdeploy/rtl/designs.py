"""Tops: a unit of the library behind one stream of bits in and one out (`lns_dut`), which the testbench drives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from importlib import resources

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import LogAccumulator
from lnsdeploy.errors import BadValueError
from lnsdeploy.formats import LNSFormat
from lnsdeploy.rtl.parameters import PEParameters
from lnsdeploy.rtl.roms import ROM_FLOAT, Adder, Rom, adder, bits_of, delta_text, rom_text, signed_bits, threshold_rom

Ints = npt.NDArray[np.int64]
Fields = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Design:
    """A unit ready to be simulated or synthesised.

    Args:
        name: for people and folders.
        inputs: fields of an input record, the first in the top bits: name and width.
        output_bits: of an output record.
        dut: text of `lns_dut.sv`.
        roms, adders: its tables.
        unit: the module under it, and the parameters that it is given.
    """

    name: str
    inputs: Fields
    output_bits: int
    dut: str
    roms: tuple[Rom, ...] = ()
    adders: dict[int, Adder] = field(default_factory=dict)
    unit: str = ""

    @property
    def input_bits(self) -> int:
        """Bits of an input record."""
        return sum(bits for _, bits in self.inputs)

    def generated(self) -> dict[str, str]:
        """Text by file name of what is not in the library."""
        roms = self.roms + tuple(rom for made in self.adders.values() for rom in made.roms)
        return {"lns_rom.sv": rom_text(roms), "lns_delta.sv": delta_text(self.adders), "lns_dut.sv": self.dut}


def library() -> dict[str, str]:
    """Text by file name of the hand-written library, the package first."""
    folder = resources.files("lnsdeploy.rtl") / "sv"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".sv"))
    names.sort(key=lambda name: name != "lns_pkg.sv")
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def harness() -> dict[str, str]:
    """Text by file name of testbench, clock, Verilator's main program and waivers."""
    folder = resources.files("lnsdeploy.rtl") / "sim"
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith((".sv", ".cpp", ".vlt")))
    return {name: (folder / name).read_text(encoding="utf-8") for name in names}


def used_files(texts: dict[str, str], top: str) -> list[str]:
    """Names of the files that `top` (a module) needs, in an order in which they can be read."""
    modules = {name.removesuffix(".sv"): name for name in texts}
    found: list[str] = []

    def visit(module: str) -> None:
        name = modules[module]
        if name in found:
            return
        text = "\n".join(line.split("//")[0] for line in texts[name].splitlines())
        for other in sorted(modules):
            if other not in (module, "lns_pkg") and _mentions(text, other):
                visit(other)
        found.append(name)

    visit(top)
    return ["lns_pkg.sv", *found] if "lns_pkg.sv" in texts else found


def _mentions(text: str, module: str) -> bool:
    import re

    return re.search(rf"\b{module}\b", text) is not None


# ---------------------------------------------------------------------------------------------------
# Records of bits


def pack(fields: Sequence[tuple[npt.ArrayLike, int]]) -> bytes:
    """Records, big-endian, padded with zeros at the top to whole bytes.

    Args:
        fields: arrays [n] or [n, parts] with the bits of each value, the first in the top bits; of an array
            [n, parts] part 0 lies lowest. Negative values as two's complement.

    Raises:
        BadValueError: a value does not fit its bits.
    """
    columns = []
    for values, bits in fields:
        array = np.asarray(values)
        array = array.astype(np.int64) if array.dtype.kind != "O" else array
        if array.ndim == 1:
            array = array[:, None]
        array = array[:, ::-1]
        if array.size and not -(1 << (bits - 1)) <= int(array.min()) <= int(array.max()) < 1 << bits:
            raise BadValueError(f"values of {int(array.min())} to {int(array.max())} do not fit {bits} bits")
        if array.dtype == object or bits > 63:
            text = [[bin(int(v) & ((1 << bits) - 1))[2:].zfill(bits) for v in row] for row in array.astype(object)]
            digits = np.array([[c == "1" for c in "".join(row)] for row in text], dtype=np.uint8)
            columns.append(digits.reshape(len(array), -1))
        else:
            shifts = np.arange(bits - 1, -1, -1, dtype=np.int64)
            columns.append((((array[:, :, None] >> shifts) & 1).astype(np.uint8)).reshape(len(array), -1))
    rows = np.concatenate(columns, axis=1)
    width = rows.shape[1]
    if width % 8:
        rows = np.concatenate([np.zeros((len(rows), 8 - width % 8), dtype=np.uint8), rows], axis=1)
    return np.packbits(rows, axis=1).tobytes()


def unpack(text: str, bits: int, parts: int = 1) -> Ints:
    """Integers [n, parts] of hexadecimal lines; part 0 lies lowest.

    Raises:
        BadValueError: a line is not a number (an x, say).
    """
    digits = (bits * parts + 3) // 4
    joined = text.replace("\n", "")
    try:
        if digits % 2:
            joined = "".join("0" + joined[i : i + digits] for i in range(0, len(joined), digits))
        raw = np.frombuffer(bytes.fromhex(joined), dtype=np.uint8).reshape(-1, (digits + 1) // 2)
    except ValueError as error:
        raise BadValueError("the simulation gave an unknown value (x or z)") from error
    rows = np.unpackbits(raw, axis=1)[:, -bits * parts :].reshape(-1, parts, bits)[:, ::-1]
    weights = np.int64(1) << np.arange(bits - 1, -1, -1, dtype=np.int64)
    values: Ints = (rows.astype(np.int64) * weights).sum(axis=2)
    return values


# ---------------------------------------------------------------------------------------------------
# Designs

_HEAD = """// SPDX-License-Identifier: Apache-2.0
//
// Generated by lnsdeploy: {title}.

module lns_dut (
    input  logic clk_i,
    input  logic rst_ni,
    input  logic in_valid_i,
    output logic in_ready_o,
    input  logic [{in_high}:0] in_i,
    output logic out_valid_o,
    input  logic out_ready_i,
    output logic [{out_high}:0] out_o
);
"""


def _instance(module: str, parameters: dict[str, int], ports: dict[str, str]) -> str:
    given = ",\n".join(f"      .{k}({v})" for k, v in parameters.items())
    wires = ",\n".join(f"      .{k}({v})" for k, v in ports.items())
    head = f"  {module} #(\n{given}\n  ) i_unit (" if given else f"  {module} i_unit ("
    return f"{head}\n{wires}\n  );\n"


def _slices(fields: Fields) -> dict[str, str]:
    high = sum(bits for _, bits in fields)
    found = {}
    for name, bits in fields:
        found[name] = f"in_i[{high - 1}:{high - bits}]"
        high -= bits
    return found


def combinational_head(title: str, in_bits: int, out_bits: int) -> str:
    """The beginning of a top whose outputs out_o follow in_i at once."""
    text = _HEAD.format(title=title, in_high=in_bits - 1, out_high=out_bits - 1)
    return text + "\n  assign in_ready_o = out_ready_i;\n  assign out_valid_o = in_valid_i;\n\n"


def combinational(
    name: str,
    title: str,
    module: str,
    parameters: dict[str, int],
    inputs: Fields,
    outputs: Fields,
    roms: tuple[Rom, ...] = (),
    adders: dict[int, Adder] | None = None,
) -> Design:
    """A unit without registers; its ports are the fields' names."""
    output_bits = sum(bits for _, bits in outputs)
    slices = _slices(inputs)
    ports = {
        port: f"$signed({slices[port]})" if "scale" in port or "offset" in port else slices[port] for port in slices
    }
    high = output_bits
    for port, bits in outputs:
        ports[port] = f"out_o[{high - 1}:{high - bits}]"
        high -= bits
    text = combinational_head(title, sum(b for _, b in inputs), output_bits)
    text += _instance(module, parameters, ports) + "\nendmodule\n"
    return Design(name, inputs, output_bits, text, roms, adders or {}, module)


def multiplier(a: LNSFormat, w: LNSFormat, a_scale: int = 1, w_scale: int = 1) -> Design:
    """lns_mul: {sign, zero, code} of two words."""
    p_bits = bits_of(a.max_code * a_scale + w.max_code * w_scale)
    parameters = {
        "A_BITS": a.bits,
        "A_SIGNED": int(a.signed),
        "A_SCALE": a_scale,
        "W_BITS": w.bits,
        "W_SIGNED": int(w.signed),
        "W_SCALE": w_scale,
        "P_BITS": p_bits,
    }
    inputs = (("a_i", a.bits), ("w_i", w.bits))
    outputs = (("sign_o", 1), ("zero_o", 1), ("code_o", p_bits))
    return combinational(f"mul-{a}-{w}", "a word multiplier", "lns_mul", parameters, inputs, outputs)


def log_adder(accumulator: LogAccumulator, gamma: int) -> Design:
    """lns_add: {sign, code} of two of them."""
    made = adder(accumulator, gamma, 0)
    bits = accumulator.bits
    inputs = (("x_sign_i", 1), ("x_code_i", bits), ("y_sign_i", 1), ("y_code_i", bits))
    outputs = (("sign_o", 1), ("code_o", bits))
    parameters = {"BITS": bits, "DELTA_BITS": made.value_bits, "DELTA": 0}
    name = f"add-{made.kind}-{bits}-{gamma}-{accumulator.guard_bits}"
    return combinational(name, f"an LNS adder, {made.kind}", "lns_add", parameters, inputs, outputs, (), {0: made})


def float_offset_bits(gamma: int) -> int:
    """Bits of the offsets that a tensor of binary32 numbers may have: their octaves, from 2^-149 on."""
    return signed_bits(-149 * gamma, 149 * gamma)


def float_encoder(fmt: LNSFormat, underflow: str) -> Design:
    """lns_float_to_log: {nan, word} of a binary32 number and an offset of :func:`float_offset_bits`."""
    offset_bits = float_offset_bits(fmt.gamma)
    index = max((2 * fmt.gamma - 1).bit_length(), 1)
    parameters = {
        "GAMMA": fmt.gamma,
        "INDEX_BITS": index,
        "OFFSET_BITS": offset_bits,
        "OUT_BITS": fmt.bits,
        "OUT_SIGNED": int(fmt.signed),
        "UNDERFLOW": int(underflow == "min"),
    }
    rom = threshold_rom(ROM_FLOAT, fmt.gamma, index, 23)
    inputs = (("x_i", 32), ("offset_i", offset_bits))
    outputs = (("nan_o", 1), ("word_o", fmt.bits))
    return combinational(
        f"encode-{fmt}-{underflow}",
        "a float-to-log encoder",
        "lns_float_to_log",
        parameters,
        inputs,
        outputs,
        (rom,),
    )


_FINISH = (
    *("F", "TABLE_BITS", "CONST_BITS", "CONVERSION", "ACC_BITS", "TOTAL_BITS", "ENCODER", "ENCODER_BITS"),
    *("OFFSET_BITS", "OUT_BITS", "OUT_SIGNED", "UNDERFLOW"),
)
_TERM = ["P_BITS", "F", "TABLE_BITS", "CONST_BITS", "CONVERSION", "SHIFT", "TERM_BITS"]


def linear_finish(pe: PEParameters) -> Design:
    """lns_lin_finish: the word of an accumulator (all its bins) and an offset."""
    v = pe.values
    bins = pe.datapath.linear.bins
    inputs = (("acc_i", bins * v["ACC_BITS"]), ("offset_i", v["OFFSET_BITS"]))
    parameters = {name: v[name] for name in _FINISH}
    return combinational(
        f"finish-{pe.datapath.name}",
        "a linear-to-log converter with its output",
        "lns_lin_finish",
        parameters,
        inputs,
        (("word_o", v["OUT_BITS"]),),
        pe.roms,
    )


def linear_term(pe: PEParameters) -> Design:
    """lns_term: {bin, magnitude} of a product's code."""
    v = pe.values
    inputs = (("code_i", v["P_BITS"]), ("zero_i", 1), ("align_i", v["SCALE_BITS"]))
    outputs = (("bin_o", max(v["TABLE_BITS"], 1)), ("magnitude_o", v["TERM_BITS"]))
    parameters = {name: v[name] for name in _TERM} | {"ALIGN_BITS": v["SCALE_BITS"]}
    return combinational(
        f"term-{pe.datapath.name}", "a log-to-linear converter", "lns_term", parameters, inputs, outputs, pe.roms
    )


def pe_fields(pe: PEParameters) -> Fields:
    """Fields of a PE's input record."""
    v = pe.values
    return (
        ("first_i", 1),
        ("last_i", 1),
        ("a_i", v["LANES"] * v["A_BITS"]),
        ("w_i", v["LANES"] * v["W_BITS"]),
        ("bias_i", v["ACC_BITS"] + 1),
        ("scale_i", v["SCALE_BITS"]),
        ("offset_i", v["OFFSET_BITS"]),
    )


def vector_pe(pe: PEParameters) -> Design:
    """lns_pe behind the streams."""
    fields = pe_fields(pe)
    bits = pe.values["OUT_BITS"]
    title = f"a processing element of datapath {pe.datapath.name}"
    text = _HEAD.format(title=title, in_high=sum(b for _, b in fields) - 1, out_high=bits - 1) + "\n"
    slices = _slices(fields)
    ports = {"clk_i": "clk_i", "rst_ni": "rst_ni", "in_valid_i": "in_valid_i", "in_ready_o": "in_ready_o"}
    ports |= {n: f"$signed({s})" if n in ("scale_i", "offset_i") else s for n, s in slices.items()}
    ports |= {"out_valid_o": "out_valid_o", "out_ready_i": "out_ready_i", "y_o": "out_o"}
    text += _instance("lns_pe", pe.values, ports) + "\nendmodule\n"
    return Design(f"pe-{pe.datapath.name}", fields, bits, text, pe.roms, pe.adders, "lns_pe")


@dataclass(frozen=True)
class ArrayShape:
    """Of `lns_array`: elements, and logarithms of what its buffers hold."""

    rows: int = 4
    cols: int = 4
    ksteps_log2: int = 8
    atiles_log2: int = 4
    wtiles_log2: int = 4

    def values(self) -> dict[str, int]:
        """As parameters."""
        return {
            "ROWS": self.rows,
            "COLS": self.cols,
            "KSTEPS_LOG2": self.ksteps_log2,
            "ATILES_LOG2": self.atiles_log2,
            "WTILES_LOG2": self.wtiles_log2,
        }


def array_widths(pe: PEParameters, shape: ArrayShape) -> tuple[int, int]:
    """Bits of a channel's entry, and of a command's data."""
    v = pe.values
    channel = v["OFFSET_BITS"] + v["SCALE_BITS"] + v["ACC_BITS"] + 1
    data = max(shape.rows * v["LANES"] * v["A_BITS"], shape.cols * v["LANES"] * v["W_BITS"], shape.cols * channel, 32)
    return channel, data


def array(pe: PEParameters, shape: ArrayShape) -> Design:
    """lns_array behind the streams: commands in, tiles out."""
    _, data = array_widths(pe, shape)
    fields: Fields = (("cmd_op_i", 2), ("cmd_addr_i", 16), ("cmd_data_i", data))
    bits = shape.rows * shape.cols * pe.values["OUT_BITS"]
    title = f"an array of {shape.rows} x {shape.cols} elements of datapath {pe.datapath.name}"
    text = _HEAD.format(title=title, in_high=sum(b for _, b in fields) - 1, out_high=bits - 1) + "\n"
    ports = {"clk_i": "clk_i", "rst_ni": "rst_ni", "cmd_valid_i": "in_valid_i", "cmd_ready_o": "in_ready_o"}
    ports |= _slices(fields)
    ports |= {"y_valid_o": "out_valid_o", "y_ready_i": "out_ready_i", "y_o": "out_o"}
    text += _instance("lns_array", pe.values | shape.values(), ports) + "\nendmodule\n"
    return Design(f"array-{pe.datapath.name}", fields, bits, text, pe.roms, pe.adders, "lns_array")
