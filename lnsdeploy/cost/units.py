"""The units whose cost is told: a datapath's, with its constants tied, and the baselines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from lnsdeploy.datapath import Datapath, LinearAccumulator, LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.delta import Interpolated, Max, Mitchell, Polynomial, Shift, Table
from lnsdeploy.emulator.plan import DotPlan
from lnsdeploy.formats import LNSFormat
from lnsdeploy.rtl.designs import (
    Design,
    combinational,
    float_encoder,
    linear_finish,
    log_adder,
    multiplier,
    vector_pe,
)
from lnsdeploy.rtl.parameters import PEParameters, pe_parameters
from lnsdeploy.rtl.roms import ROM_CONSTANTS
from lnsdeploy.rtl.vectors import example_plan

_MAC = (
    *("A_BITS", "A_SIGNED", "A_SCALE", "W_BITS", "W_SIGNED", "W_SCALE", "P_BITS", "LOG", "ACC_BITS", "SCALE_BITS"),
    *("F", "TABLE_BITS", "CONST_BITS", "CONVERSION", "SHIFT", "TERM_BITS", "PSUM_BITS", "OVERFLOW"),
    *("GUARD", "DELTA_BITS"),
)


def with_lanes(datapath: Datapath, lanes: int) -> Datapath:
    """The same datapath with vector steps of another length."""
    return replace(datapath, accumulate=replace(datapath.accumulate, lanes=lanes))


def parameters(datapath: Datapath) -> PEParameters:
    """Parameters for the alignment and offsets that calibration gives operands of unit size and 64 products."""
    return pe_parameters([(example_plan(datapath), 1)])


def mac(datapath: Datapath, *, tied: bool = True) -> Design:
    """lns_mac of a datapath with one lane; `tied`: its scale is a constant, as where each layer is its own hardware."""
    datapath = with_lanes(datapath, 1)
    pe, plan = parameters(datapath), example_plan(datapath)
    v = {name: pe.values[name] for name in _MAC if name in pe.values}
    state = pe.values["ACC_BITS"] + 1
    if datapath.is_linear:
        state = pe.values["ACC_BITS"] * datapath.linear.bins
    inputs = [("valid_i", 1), ("a_i", v["A_BITS"]), ("w_i", v["W_BITS"])]
    if not tied:
        inputs.append(("scale_i", v["SCALE_BITS"]))
    design = combinational(
        f"mac-{datapath.name}",
        f"a scalar multiply-accumulate of datapath {datapath.name}",
        "lns_mac",
        v,
        tuple(inputs),
        (("acc_o", state),),
        # the encoder is no part of it, and bins take their constants afterwards
        tuple(rom for rom in pe.roms if rom.id == ROM_CONSTANTS and datapath.linear.conversion == "product"),
        pe.adders,
    )
    wires = "      .clk_i(clk_i),\n      .rst_ni(rst_ni),\n"
    if tied:
        wires += f"      .scale_i({v['SCALE_BITS']}'sd{int(pe.scales(plan, 1)[0]) % (1 << v['SCALE_BITS'])}),\n"
    return _wired(design, wires)


def scalar_plan(plan: DotPlan) -> DotPlan:
    """The same plan on one lane."""
    return replace(plan, datapath=with_lanes(plan.datapath, 1))


def mac_of(pe: PEParameters) -> Design:
    """lns_mac with the parameters of a net's layers; its scale is a port."""
    v = {name: pe.values[name] for name in _MAC if name in pe.values}
    bins = pe.datapath.linear.bins if pe.datapath.is_linear else 1
    state = v["ACC_BITS"] * bins if pe.datapath.is_linear else v["ACC_BITS"] + 1
    inputs = (("valid_i", 1), ("a_i", v["A_BITS"]), ("w_i", v["W_BITS"]), ("scale_i", v["SCALE_BITS"]))
    name, title = f"mac-{pe.datapath.name}", f"a scalar multiply-accumulate of datapath {pe.datapath.name}"
    roms = tuple(rom for rom in pe.roms if rom.id == ROM_CONSTANTS)
    made = combinational(name, title, "lns_mac", v, inputs, (("acc_o", state),), roms, pe.adders)
    return _wired(made, "      .clk_i(clk_i),\n      .rst_ni(rst_ni),\n")


def _wired(design: Design, wires: str) -> Design:
    """A design whose unit has further ports: clock, reset, constants."""
    head, tail = design.dut.split(" i_unit (\n", 1)
    return replace(design, dut=f"{head} i_unit (\n{wires}{tail}")


def pe(datapath: Datapath, lanes: int) -> Design:
    """lns_pe with its scale tied; bias and offset stay ports."""
    datapath = with_lanes(datapath, lanes)
    found, plan = parameters(datapath), example_plan(datapath)
    design = vector_pe(found)
    bits = found.values["SCALE_BITS"]
    constant = f"{bits}'sd{int(found.scales(plan, 1)[0]) % (1 << bits)}"
    lines = [
        f"      .scale_i({constant})," if line.startswith("      .scale_i(") else line
        for line in design.dut.splitlines()
    ]
    return replace(design, name=f"pe-{lanes}-{datapath.name}", dut="\n".join(lines) + "\n")


def units_of(datapath: Datapath, lanes: int) -> dict[str, Design]:
    """A datapath's units by name: multiplier, adder or converter, MAC, and with several lanes the PE."""
    scalar = with_lanes(datapath, 1)
    found = {"multiplier": multiplier(datapath.activation, datapath.weight)}
    if datapath.is_linear:
        found["linear-to-log converter"] = linear_finish(parameters(scalar))
    else:
        found["adder"] = log_adder(scalar.log, datapath.gamma)
    found["mac"] = mac(datapath)
    if lanes > 1:
        found[f"pe-{lanes}"] = pe(datapath, lanes)
    return found


def integer_mac(bits: int, acc_bits: int, lanes: int = 1) -> Design:
    """base_int_mac."""
    parameters = {"BITS": bits, "ACC_BITS": acc_bits, "LANES": lanes}
    name = f"int{bits} mac, {acc_bits}-bit" if lanes == 1 else f"int{bits} pe-{lanes}, {acc_bits}-bit"
    inputs = (("valid_i", 1), ("a_i", lanes * bits), ("w_i", lanes * bits))
    made = combinational(name, name, "base_int_mac", parameters, inputs, (("acc_o", acc_bits),))
    return _wired(made, "      .clk_i(clk_i),\n      .rst_ni(rst_ni),\n")


def fp8_mac(acc_bits: int = 24, lanes: int = 1) -> Design:
    """base_fp8_mac, e4m3."""
    name = f"fp8 e4m3 mac, {acc_bits}-bit" if lanes == 1 else f"fp8 e4m3 pe-{lanes}, {acc_bits}-bit"
    inputs = (("valid_i", 1), ("a_i", lanes * 8), ("w_i", lanes * 8))
    made = combinational(
        name, name, "base_fp8_mac", {"ACC_BITS": acc_bits, "LANES": lanes}, inputs, (("acc_o", acc_bits),)
    )
    return _wired(made, "      .clk_i(clk_i),\n      .rst_ni(rst_ni),\n")


def bf16_multiplier() -> Design:
    """base_bf16_mul."""
    inputs = (("a_i", 16), ("b_i", 16))
    return combinational("bf16 multiplier", "a bf16 multiplier", "base_bf16_mul", {}, inputs, (("y_o", 16),))


def bf16_mac() -> Design:
    """base_bf16_mac."""
    inputs = (("valid_i", 1), ("a_i", 16), ("w_i", 16))
    made = combinational("bf16 mac, fp32", "a bf16 MAC", "base_bf16_mac", {}, inputs, (("acc_o", 32),))
    return _wired(made, "      .clk_i(clk_i),\n      .rst_ni(rst_ni),\n")


def baselines(lanes: int) -> dict[str, Design]:
    """By name: MACs, a multiplier, and PEs of as many lanes as the datapath's."""
    made = [integer_mac(8, 24), integer_mac(8, 32), integer_mac(4, 24), fp8_mac(), bf16_multiplier(), bf16_mac()]
    made += [integer_mac(8, 32, lanes), integer_mac(4, 24, lanes), fp8_mac(24, lanes)] if lanes > 1 else []
    return {design.name: design for design in made}


def table_bits(design: Design) -> int:
    """Bits of the tables that a design reads, each counted once however often it is instantiated."""
    roms = design.roms + tuple(rom for made in design.adders.values() for rom in made.roms)
    return sum(rom.bits for rom in roms)


# Word widths and γ of the table of all units: 16 octaves a word.
WIDTHS = ((6, 4), (8, 8), (10, 32), (12, 128))


def library(lanes: int) -> Iterator[tuple[str, Design]]:
    """Every unit by name, as `lnsdeploy cost --all` tells them; what takes long last.

    Args:
        lanes: of the elements.
    """
    for bits, gamma in WIDTHS:
        word = LNSFormat(bits, gamma)
        yield f"LNS multiplier, {bits} bits", multiplier(word, word)
    for bits, gamma in WIDTHS:
        yield f"LNS adder, exact, {bits} bits, γ {gamma}", log_adder(LogAccumulator(bits=bits - 1), gamma)
    for method in (Table(64, 32), Interpolated(8), Polynomial(2, 4, "octave", 12), Mitchell(), Shift(), Max()):
        yield f"LNS adder, {method.kind}, 12 bits, γ 128", log_adder(LogAccumulator(bits=11, delta=method), 128)
    for bits, gamma in WIDTHS:
        linear = _linear(bits, gamma)
        yield f"linear MAC, 24-bit, {bits} bits", mac(linear)
        yield f"linear-to-log converter, {bits} bits", linear_finish(parameters(linear))
    for bits, gamma in WIDTHS:
        word = LNSFormat(bits, gamma)
        yield f"float-to-log encoder, {bits} bits", float_encoder(word, "zero")
    for name, module, ports in (
        ("ReLU", "lns_relu", (("a_i", 8),)),
        ("maximum", "lns_compare", (("a_i", 8), ("b_i", 8))),
    ):
        yield f"{name}, 8 bits", combinational(name, name, module, {"BITS": 8}, ports, (("y_o", 8),))
    named = [load_datapath(name) for name in named_datapaths()]
    for datapath in named:
        if datapath.activation.bits <= 12:
            yield f"{datapath.name} mac", mac(datapath)
    for baseline in baselines(1).values():
        yield baseline.name, baseline
    yield f"pe-{lanes}, log tree, 8 bits", pe(load_datapath("gauss-8"), lanes)
    yield f"pe-{lanes}, linear with converter, 8 bits", pe(_linear(8, 8), lanes)
    for name, design in baselines(lanes).items():
        if f"pe-{lanes}" in name:
            yield name, design
    for datapath in named:
        if datapath.activation.bits > 12:
            yield f"{datapath.name} mac", mac(datapath)
    yield "LNS adder, exact, 16 bits, γ 256", log_adder(LogAccumulator(bits=15), 256)


def _linear(bits: int, gamma: int) -> Datapath:
    """A datapath that sums linearly in 24 bits, with a table of the remainder of three bits at most."""
    word, f = LNSFormat(bits, gamma), gamma.bit_length() - 1
    linear = LinearAccumulator(bits=24, conversion="product", table_bits=min(f, 3), constant_bits=8)
    return Datapath(f"linear-{bits}", word, word, word, linear, load_datapath("gauss-8").add)
