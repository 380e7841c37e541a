"""The hardware gives the reference's bits: every way to make Δ, datapaths, a net; and planted errors are caught."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import replace

import numpy as np
import pytest

from lnsdeploy import delta as methods
from lnsdeploy.cost import formal, synthesis, units
from lnsdeploy.datapath import LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.errors import BadFileError, BadValueError, CheckFailedError, MissingDependencyError, UnsupportedError
from lnsdeploy.formats import LNSFormat
from lnsdeploy.rtl import check as programme
from lnsdeploy.rtl import designs, roms, simulate, vectors
from lnsdeploy.rtl.designs import pack, unpack
from lnsdeploy.rtl.parameters import pe_parameters

needs_simulator = pytest.mark.skipif(
    simulate.find("verilator") is None and simulate.find("icarus") is None, reason=simulate.HOW_TO_GET_ONE
)
# Yosys comes with the extra `rtl`, which `make install` brings; lnsdeploy works without.
needs_yosys = pytest.mark.skipif(synthesis.find() is None, reason=synthesis.HOW_TO_GET_ONE)
needs_verilator = pytest.mark.skipif(simulate.find("verilator") is None, reason=simulate.HOW_TO_GET_ONE)

METHODS = [
    methods.Exact(),
    methods.Table(20, 4),
    methods.Table(12, 4, "middle"),
    methods.Interpolated(4),
    methods.Interpolated(4, "equal", 6),
    methods.Cotransform(3),
    methods.Mitchell(),
    methods.Shift(),
    methods.Polynomial(2, 4, "octave", 8),
    methods.Polynomial(1, 4, "equal", 6),
    methods.Cordic(8, 12),
    methods.Max(),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    """Builds of this run only."""
    patch = pytest.MonkeyPatch()
    patch.setenv("LNSDEPLOY_CACHE", str(tmp_path_factory.mktemp("rtl")))
    yield
    patch.undo()


def all_pairs(bits):
    both = np.arange(1 << (2 * bits), dtype=np.int64)
    return both >> bits, both & ((1 << bits) - 1)


def quick():
    """Icarus, which builds in an instant, for few vectors; another simulator where there is no Icarus."""
    return simulate.find("icarus") or simulate.best()


def check(design, v, **options):
    simulate.build(design, quick()).check(v.inputs, v.expected, v.count, **options)


# ---------------------------------------------------------------------------------------------------
# Without a simulator


def test_records_are_packed_as_documented():
    """Fields from the top, part 0 lowest, padding above."""
    assert pack([(np.array([1]), 1), (np.array([[2, 3]]), 2)]) == bytes([0b1_11_10])
    assert pack([(np.array([-1]), 9)]) == bytes([0x01, 0xFF])
    assert unpack("1ff\n003\n", 3, 3).tolist() == [[7, 7, 7], [3, 0, 0]]


@pytest.mark.parametrize("gamma", [1, 2, 3, 6, 8, 100, 1024])
def test_threshold_table_is_the_encoder(gamma):
    """Segment and comparison give the code of every significand (spec 2.1)."""
    bits = 14
    index = max((2 * gamma - 1).bit_length(), 1)
    rom = roms.threshold_rom(1, gamma, index, bits)
    x = np.arange(1 << bits)
    entry = np.array(rom.entries)[x >> (bits - index)]
    low = x & ((1 << (bits - index)) - 1)
    code = (entry >> (bits - index + 1)) + (low >= (entry & ((2 << (bits - index)) - 1)))
    from lnsdeploy import tables

    thresholds = tables.octave_thresholds(gamma, bits, "nearest").astype(np.int64) - (1 << bits)
    assert np.array_equal(code, np.searchsorted(thresholds, x, side="right"))


def test_every_library_file_is_one_module_with_licence():
    for name, text in designs.library().items():
        assert text.startswith("// SPDX-License-Identifier: Apache-2.0\n"), name
        assert re.findall(r"^(?:module|package) (\w+)", text, re.MULTILINE) == [name.removesuffix(".sv")]


def test_generated_text_is_deterministic():
    for name in ("lns-madam-8", "gauss-8"):
        made = [designs.vector_pe(vectors.example(load_datapath(name), 1, 1, 4)[0]).generated() for _ in range(2)]
        assert made[0] == made[1]


def test_a_shifter_that_is_no_hardware_is_refused():
    wide = LNSFormat(16, 1)
    datapath = replace(
        load_datapath("lognet-4"), weight=wide, activation=wide, output=wide, add=load_datapath("gauss-8").add
    )
    with pytest.raises(UnsupportedError, match="shifters"):
        pe_parameters([(replace_lsb(datapath), 1)])


def replace_lsb(datapath):
    return vectors.example_plan(datapath)


def test_no_simulator_says_how_to_get_one(monkeypatch):
    monkeypatch.setattr(simulate, "find", lambda name: None)
    with pytest.raises(MissingDependencyError, match="pip install"):
        simulate.best()


# ---------------------------------------------------------------------------------------------------
# In a simulator


def library_designs():
    """Designs that use every file of the library, with every way to make Δ."""
    made = [designs.log_adder(LogAccumulator(bits=9, guard_bits=2, delta=m), 6) for m in METHODS]
    made += [designs.float_encoder(LNSFormat(8, 8), "zero"), *units.baselines(4).values()]
    for name in ("lns-madam-8", "elma-8", "mitchell-8", "gauss-8-guard", "lognet-4"):
        parameters = vectors.example(load_datapath(name), 4, 4, 9)[0]
        made += [designs.array(parameters, designs.ArrayShape(2, 2, 4, 1, 1)), units.mac(load_datapath(name))]
    words = (("a_i", 6), ("b_i", 6))
    made.append(designs.combinational("relu", "", "lns_relu", {"BITS": 6}, words[:1], (("y_o", 6),)))
    made.append(designs.combinational("compare", "", "lns_compare", {"BITS": 6}, words, (("y_o", 6),)))
    adder = roms.adder(LogAccumulator(bits=8, guard_bits=2), 4, 1)
    parameters = {f"{name}_BITS": 6 for name in ("A", "B", "OUT", "SCALE", "OFFSET")}
    parameters |= {"ACC_BITS": 8, "GUARD": 2, "DELTA_BITS": adder.value_bits}
    words += (("a_scale_i", 6), ("b_scale_i", 6), ("offset_i", 6))
    made.append(designs.combinational("add", "", "lns_add_words", parameters, words, (("y_o", 6),), (), {1: adder}))
    return made


def covering():
    """As few of them as use every file of the library."""
    library, seen, found = set(designs.library()), set(), []
    for design in sorted(library_designs(), key=lambda design: -len(simulate.texts_of(design))):
        texts = simulate.texts_of(design)
        if set(texts) & library - seen:
            seen |= set(texts)
            found.append((design, texts))
    assert library <= seen
    return found


@needs_verilator
def test_verilator_warns_of_nothing():
    """-Wall with the waivers of waivers.vlt, for every file of the library."""
    seen = set()
    for design in library_designs():
        texts = simulate.texts_of(design)
        seen |= set(texts)
        assert simulate.lint(texts) == [], design.name
    assert set(designs.library()) <= seen


@pytest.mark.skipif(simulate.find("icarus") is None, reason="no Icarus Verilog")
def test_icarus_accepts_every_file(tmp_path):
    for design, texts in covering():
        for name, text in texts.items():
            (tmp_path / name).write_text(text)
        command = [simulate.find("icarus").command, "-g2012", "-t", "null", "-s", "lns_dut", *texts]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        said = [line for line in done.stderr.splitlines() if "sorry: constant selects" not in line]
        assert done.returncode == 0, f"{design.name}: {done.stderr}"
        assert not [line for line in said if "error" in line or "warning" in line], f"{design.name}: {said}"


@needs_yosys
def test_yosys_accepts_every_file():
    """Reads and elaborates them, all in one run."""
    files, script = {}, []
    for number, (_, texts) in enumerate(covering()):
        files |= {f"d{number}_{name}": text for name, text in texts.items()}
        names = " ".join(f"d{number}_{name}" for name in texts)
        script += ["design -reset", f"read_verilog -sv {names}", "hierarchy -check -top lns_dut"]
    script.append("tee -q -o done.txt stat")
    assert "lns_dut" in synthesis.run_script("\n".join(script) + "\n", files, ["done.txt"])["done.txt"]


def bundle():
    """One design of all 8-bit adders, since a build costs more than 65,536 additions."""
    made, text, offset = {}, [], 0
    bits, gamma = 7, 8
    tables, first = [], None
    for i, method in enumerate(METHODS):
        accumulator = LogAccumulator(bits=bits, delta=method)
        adder = roms.adder(accumulator, gamma, 0)
        moved = tuple(replace(rom, id=rom.id + 10 * i) for rom in adder.roms)
        values = dict(adder.parameters)
        if "ROM_BASE" in values:
            values["ROM_BASE"] = 3 + 10 * i
        made[i] = replace(adder, parameters=values, roms=moved)
        tables.append(accumulator)
        ports = ".x_sign_i(in_i[15]), .x_code_i(in_i[14:8]), .y_sign_i(in_i[7]), .y_code_i(in_i[6:0]), " + (
            f".sign_o(out_o[{offset + 7}]), .code_o(out_o[{offset + 6}:{offset}])"
        )
        text.append(f"  lns_add #(.BITS(7), .DELTA_BITS({adder.value_bits}), .DELTA({i})) i_{i} ({ports});\n")
        offset += 8
        first = first or designs.log_adder(accumulator, gamma)
    dut = re.sub(r"  lns_add #\(.*\n  \);\n", "".join(text), first.dut, flags=re.DOTALL)
    dut = dut.replace("output logic [7:0] out_o", f"output logic [{offset - 1}:0] out_o")
    return replace(first, name="adders", output_bits=offset, dut=dut, adders=made), tables


@needs_simulator
def test_adders_of_every_method_on_all_pairs():
    """65,536 pairs of 8-bit words, each method (spec 5.2, 5.3, 5.7)."""
    design, accumulators = bundle()
    x, y = all_pairs(8)
    sums = []
    for accumulator in accumulators:
        expected = vectors.adder_vectors(accumulator, 8, x, y).expected
        sums.append((np.frombuffer(expected, dtype=np.uint8), 8))
    simulation = simulate.build(design)
    inputs = pack([(x, 8), (y, 8)])
    simulation.check(inputs, pack(sums[::-1]), len(x))
    # negative control: operands swapped in one record of the expected words
    wrong = bytearray(pack(sums[::-1]))
    wrong[777] ^= 1
    with pytest.raises(simulate.SimulationError, match="1 mismatches"):
        simulation.check(inputs, bytes(wrong), len(x))
    with pytest.raises(simulate.SimulationError, match="were expected"):
        simulation.check(inputs, pack(sums[::-1]), len(x) - 1)


DATAPATHS = ["lns-madam-8-lut2", "elma-8", "gauss-8-guard"]
if simulate.find("verilator") is None:
    DATAPATHS = named_datapaths()


@needs_simulator
@pytest.mark.parametrize("name", DATAPATHS)
def test_array_gives_the_reference_words(name):
    """Three layer shapes, with valid and ready at random: lanes, padding, several tiles and runs (spec 4, 5, 7)."""
    datapath = load_datapath(name)
    datapath = replace(datapath, accumulate=replace(datapath.accumulate, lanes=3))
    shape = designs.ArrayShape(2, 3, 4, 1, 1)
    layers = [(7, 10, 20), (1, 1, 1), (4, 3, 48)]
    examples = [vectors.example(datapath, *layer, seed=i) for i, layer in enumerate(layers)]
    parameters = pe_parameters([(plan, n) for (_, plan, _), (_, n, _) in zip(examples, layers, strict=True)])
    # both simulators run arrays: one of these in Verilator
    simulation = simulate.build(designs.array(parameters, shape), simulate.best() if name == "elma-8" else quick())
    for _, plan, (a, w, bias) in examples:
        v = vectors.array_vectors(parameters, shape, plan, a, w, bias)
        simulation.check(v.inputs, v.expected, v.count, stall=True)


MUTATIONS = {
    "an altered table entry": ("lns_rom.sv", r"3'd5: data_o = 9'h([0-9a-f]+);", "3'd5: data_o = 9'h001;"),
    "a swapped operand": ("lns_mul.sv", r"assign w_code = w_i\[", "assign w_code = a_i["),
    "a dropped carry": ("lns_sum.sv", r"left \+ right", "left ^ right"),
    "a shift off by one": ("lns_term.sv", r"<< quotient;", "<< (quotient + 1);"),
}


def side_by_side(design, variants):
    """One design of several variants of another, each with its own modules: one build instead of five.

    Args:
        variants: text by file name that each has instead of the library's or the generated.
    Returns: the design, whose outputs are the variants', the first on top; and its files.
    """
    files, instances = {}, []
    bits = design.output_bits
    own = simulate.texts_of(design)
    modules = [name.removesuffix(".sv") for name in own if name != "lns_pkg.sv"]
    for k, changed in enumerate(variants):
        low = (len(variants) - 1 - k) * bits
        for name, text in (own | changed).items():
            if name != "lns_pkg.sv":
                renamed = re.sub(rf"\b({'|'.join(modules)})\b", rf"\1_v{k}", text)
                files[f"{name.removesuffix('.sv')}_v{k}.sv"] = renamed
        first = "" if k else ".in_ready_o(in_ready_o), .out_valid_o(out_valid_o), "
        instances.append(
            f"  lns_dut_v{k} i_v{k} (.clk_i(clk_i), .rst_ni(rst_ni), .in_valid_i(in_valid_i), .in_i(in_i), {first}"
            f".out_ready_i(out_ready_i), .out_o(out_o[{low + bits - 1}:{low}]));\n"
        )
    head = design.dut[design.dut.index("module lns_dut") : design.dut.index(");") + 2]
    head = head.replace(f"[{bits - 1}:0] out_o", f"[{bits * len(variants) - 1}:0] out_o")
    top = replace(design, name="variants", output_bits=bits * len(variants), dut="", unit="")
    return top, files | {"lns_dut.sv": head + "\n" + "".join(instances) + "endmodule\n"}


@needs_simulator
@pytest.mark.parametrize(
    "comparison",
    # Icarus takes long to read tables of 16-bit words
    [one for one in programme.macs(1 << 11) if one.design.name != "mac-gauss-16"],
    ids=lambda comparison: comparison.design.name,
)
def test_scalar_macs(comparison):
    """The register before each of 2,048 products of one sum."""
    check(comparison.design, comparison.vectors())


@needs_simulator
def test_planted_errors_are_caught():
    """Negative controls: each changes the text of one file, and the comparison fails; unchanged text passes."""
    datapath = load_datapath("lns-madam-8")
    accumulate = replace(datapath.accumulate, conversion="product", lanes=2)
    parameters, plan, (a, w, bias) = vectors.example(replace(datapath, accumulate=accumulate), 4, 4, 20)
    design, v = designs.vector_pe(parameters), vectors.pe_vectors(parameters, plan, a, w, bias)
    texts, variants = simulate.texts_of(design), [{}]
    for name, pattern, text in MUTATIONS.values():
        after = re.sub(pattern, text, texts[name])
        assert after != texts[name]
        variants.append({name: after})
    top, files = side_by_side(design, variants)
    simulation = simulate.build(top, quick(), replace=files)
    words = unpack(simulation.outputs(v.inputs, v.count), design.output_bits, len(variants))[:, ::-1]
    expected = np.frombuffer(v.expected, dtype=np.uint8)
    wrong = {what: int((words[:, k + 1] != expected).sum()) for k, what in enumerate(MUTATIONS)}
    assert np.array_equal(words[:, 0], expected)
    assert all(wrong.values()), wrong


@needs_simulator
def test_baselines_compute_what_they_say():
    """bf16 products against binary32 arithmetic: rounding to nearest even, zero below, infinity above."""
    random = np.random.default_rng(0)
    a, b = (random.integers(0, 1 << 16, 1 << 14, dtype=np.int64) for _ in range(2))
    a, b = (np.where((x >> 7) & 255 == 255, x & 0x807F, x) for x in (a, b))  # no infinities or NaN
    values = [np.where((x >> 7) & 255 == 0, x & 0x8000, x).astype(np.uint32) << 16 for x in (a, b)]
    # the product of two numbers of 8 bits is exact in binary64, and its binary32 rounding does not touch bf16's
    exact = values[0].view(np.float32).astype(np.float64) * values[1].view(np.float32).astype(np.float64)
    with np.errstate(over="ignore", under="ignore"):
        bits = exact.astype(np.float32).view(np.uint32).astype(np.int64)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    expected = np.where((rounded >> 7) & 255 == 0, rounded & 0x8000, rounded)
    v = vectors.Vectors(pack([(a, 16), (b, 16)]), pack([(expected, 16)]), len(a))
    check(units.bf16_multiplier(), v)


# ---------------------------------------------------------------------------------------------------
# Synthesis


@needs_yosys
def test_cost_of_units():
    """Figures are ranges, and cached."""
    datapath = load_datapath("lognet-4")
    multiplier = designs.multiplier(datapath.activation, datapath.weight)
    cost = synthesis.synthesise(multiplier, runs=2)
    assert 50 < cost.transistors.min <= cost.transistors.median <= cost.transistors.max < 400
    assert synthesis.synthesise(multiplier, runs=2) == cost
    mac = synthesis.synthesise(units.mac(datapath), runs=1)
    assert mac.flip_flops == 24


@needs_yosys
@pytest.mark.parametrize("comparison", [*programme.exhaustive_units(6)], ids=lambda comparison: comparison.design.name)
def test_netlists_are_proved_to_be_the_tables(comparison):
    """For all inputs: the multiplier's and every adder's netlist is the reference's table."""
    formal.prove(comparison.design, against=comparison.vectors())


@needs_yosys
def test_proofs_fail_where_they_should():
    small = LNSFormat(4, 2)
    design = designs.multiplier(small, small)
    pairs = np.arange(256)
    made = vectors.multiplier_vectors(small, small, pairs >> 4, pairs & 15)
    formal.prove(design, against=made)
    formal.prove(design)
    altered = bytearray(made.expected)
    altered[100] ^= 1
    with pytest.raises(CheckFailedError, match="differs"):
        formal.prove(design, against=replace(made, expected=bytes(altered)))
    with pytest.raises(BadValueError, match="all 256 inputs, and 255"):
        formal.prove(design, against=replace(made, count=255))
    adder = designs.log_adder(LogAccumulator(bits=5), 4)
    formal.prove(adder)
    with pytest.raises(CheckFailedError):
        formal.prove(adder, against=designs.log_adder(LogAccumulator(bits=5, delta=methods.Mitchell()), 4))


# ---------------------------------------------------------------------------------------------------
# A net


@needs_simulator
def test_a_net_is_exported_and_run(tmp_path):
    """A trained net: the executor gives every word, the folder checks itself and comes out the same twice."""
    from lnsdeploy import cli
    from lnsdeploy.emulator.compare import compare
    from lnsdeploy.emulator.executor import ReferenceExecutor
    from lnsdeploy.emulator.rtl import RtlExecutor
    from lnsdeploy.exporters.export import lower_run
    from lnsdeploy.exporters.rtl import export_rtl
    from lnsdeploy.training.data import load_data
    from lnsdeploy.training.trainer import config_from_options, train

    train(config_from_options(model="cnn", epochs=1), tmp_path / "run")
    artifact = lower_run(tmp_path / "run", datapath="gauss-8").artifact()
    x = load_data("digits", None).test_x[:3]
    executor = RtlExecutor(rows=2, cols=2)
    found = compare([ReferenceExecutor(), executor], artifact, x)
    assert found.equal, str(found.first_difference)
    assert executor.sampled == {}
    few = RtlExecutor(rows=2, cols=2, limit=1 << 12)
    assert compare([ReferenceExecutor(), few], artifact, x[:1]).equal
    assert few.sampled
    assert all(some < every for some, every in few.sampled.values())
    told = cli._sampled([ReferenceExecutor(), few])
    assert {(n, r["run"], r["rows"]) for n, r in told["rtl"].items()} == {(n, *r) for n, r in few.sampled.items()}
    assert list(told) == ["rtl"]

    export_rtl(artifact, tmp_path / "a", x[:1], rows=2, cols=2)
    export_rtl(artifact, tmp_path / "b", x[:1], rows=2, cols=2)
    files = sorted(p.relative_to(tmp_path / "a") for p in (tmp_path / "a").rglob("*") if p.is_file())
    assert all((tmp_path / "a" / p).read_bytes() == (tmp_path / "b" / p).read_bytes() for p in files)
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "mine.txt").write_text("mine")
    with pytest.raises(BadFileError, match="not an export"):
        export_rtl(artifact, tmp_path / "c", x[:1])
    tool = simulate.best()
    name = {"verilator": "VERILATOR", "icarus": "IVERILOG"}[tool.name]
    command = ["make", "-C", str(tmp_path / "a"), "check-hw0/pe", f"SIM={tool.name}", f"{name}={tool.command}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | dict(tool.environment))
    assert done.returncode == 0, done.stdout + done.stderr
    # a damaged vector is noticed
    layer = next((tmp_path / "a" / "hw0" / "pe").glob("conv2.expect.bin"))
    data = bytearray(layer.read_bytes())
    data[5] ^= 1
    layer.write_bytes(data)
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ | dict(tool.environment))
    assert done.returncode != 0
    assert "1 mismatches" in done.stdout + done.stderr
