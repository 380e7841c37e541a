"""The model's graphs of gates compute what the hardware computes: they are run, and compared with the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lnsdeploy.cost import gates
from lnsdeploy.cost.graph import Graph, constant
from lnsdeploy.datapath import LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.delta import METHODS
from lnsdeploy.errors import UnsupportedError
from lnsdeploy.formats import LNSFormat
from lnsdeploy.rtl import designs, roms, vectors
from lnsdeploy.rtl.check import methods_for

GAMMA = 8


def columns(data, bits):
    """Records as packed columns [bits, n / 8], the highest bit first."""
    rows = np.unpackbits(np.frombuffer(data, np.uint8).reshape(-1, (bits + 7) // 8), axis=1)[:, -bits:]
    return np.packbits(rows.T, axis=1)


def check(graph, design, inputs, outputs, v):
    """A unit's graph gives the expected records; words in the order of the design's fields."""
    given = [bit for word in inputs for bit in word[::-1]]
    made = graph.run([bit for word in outputs for bit in word[::-1]], given, columns(v.inputs, design.input_bits))
    expected = columns(v.expected, design.output_bits)
    # the last byte's end is no record
    made[:, -1] &= 0xFF << (-v.count % 8) & 0xFF
    assert made.any()
    wrong = np.flatnonzero((made != expected).any(axis=1))
    assert not len(wrong), f"{design.name}: output bits {wrong} of {design.output_bits} from the top"


def all_pairs(bits):
    both = np.arange(1 << (2 * bits), dtype=np.int64)
    return both >> bits, both & ((1 << bits) - 1)


@pytest.mark.parametrize(("a", "w"), [(LNSFormat(6, 4), LNSFormat(6, 4)), (LNSFormat(7, 8, False), LNSFormat(5, 4))])
def test_multipliers(a, w):
    x = np.arange(1 << (a.bits + w.bits), dtype=np.int64)
    x, y = x >> w.bits, x & ((1 << w.bits) - 1)
    design, graph = designs.multiplier(a, w), Graph()
    v = {"A_BITS": a.bits, "A_SIGNED": int(a.signed), "A_SCALE": 1}
    v |= {"W_BITS": w.bits, "W_SIGNED": int(w.signed), "W_SCALE": 1, "P_BITS": design.output_bits - 2}
    words = graph.word(a.bits), graph.word(w.bits)
    sign, zero, code = gates.multiplier(graph, v, *words)
    check(graph, design, words, [[sign], [zero], code], vectors.multiplier_vectors(a, w, x, y))


@pytest.mark.parametrize("gamma", [8, 6])
@pytest.mark.parametrize("method", methods_for(GAMMA), ids=str)
def test_adders_of_every_method(method, gamma):
    """Every pair of words of 8 bits."""
    accumulator = LogAccumulator(bits=7, delta=method)
    try:
        made = roms.adder(accumulator, gamma, 0)
    except UnsupportedError:
        pytest.skip("not at this gamma")
    plus = method.tables(gamma).plus
    graph = Graph()
    x, y = graph.word(8), graph.word(8)
    sign, code = gates.adder(graph, made, (x[7], x[:7]), (y[7], y[:7]), plus)
    v = vectors.adder_vectors(accumulator, gamma, *all_pairs(8))
    check(graph, designs.log_adder(accumulator, gamma), [x, y], [[sign], code], v)


def test_every_method_is_drawn_and_checked():
    """The registry is the one list of methods: a new one must be among the model's points and the RTL's programme."""
    from lnsdeploy.cost import fit

    assert {kind for kind, _ in fit.DRAWN} == {method.kind for method in methods_for(GAMMA)} == set(METHODS)


LINEAR = [name for name in named_datapaths() if load_datapath(name).is_linear]


@pytest.mark.parametrize("name", LINEAR)
def test_terms_and_converters(name):
    """Every product's magnitude; words of accumulators at random, at their limits and around zero."""
    pe, plan, _ = vectors.example(load_datapath(name), 1, 1, 16)
    v, bins = pe.values, pe.datapath.linear.bins
    graph = Graph()
    code, zero, align = graph.word(v["P_BITS"]), graph.word(1), graph.word(v["SCALE_BITS"])
    magnitude, index = gates.term(graph, v, pe.roms, code, zero[0], int(pe.scales(plan, 1)[0]))
    check(graph, designs.linear_term(pe), [code, zero, align], [index, magnitude], vectors.term_vectors(pe, plan))
    random, half = np.random.default_rng(0), 1 << (v["ACC_BITS"] - 1)
    acc = random.integers(-half, half, (1 << 11, bins)) >> random.integers(0, v["ACC_BITS"], (1 << 11, 1))
    acc[:40] = (np.arange(40) - 20)[:, None]
    acc[40:60], acc[60:80] = half - 1 - np.arange(20)[:, None], np.arange(20)[:, None] - half
    graph = Graph()
    words, offset = [graph.word(v["ACC_BITS"]) for _ in range(bins)], graph.word(v["OFFSET_BITS"])
    made = gates.linear_finish(graph, v, pe.roms, words, offset)
    design = designs.linear_finish(pe)
    check(graph, design, [*words[::-1], offset], [made], vectors.finish_vectors(pe, plan, acc))


@pytest.mark.parametrize("name", ["gauss-8", "gauss-8-guard", "mitchell-8", "lognet-4", "lns-madam-8"])
def test_a_step_of_elements(name):
    """A whole element of two lanes in one step: words, products, sum, output; every datapath's own way."""
    datapath = load_datapath(name)
    datapath = replace(datapath, accumulate=replace(datapath.accumulate, lanes=2))
    pe, plan, (a, w, bias) = vectors.example(datapath, 32, 32, 2)
    v, graph, scale = pe.values, Graph(), int(pe.scales(plan, 1)[0])
    first, last = graph.word(1), graph.word(1)
    words = [[graph.word(v["A_BITS"]) for _ in range(2)], [graph.word(v["W_BITS"]) for _ in range(2)]]
    start, scale_port, offset = graph.word(v["ACC_BITS"] + 1), graph.word(v["SCALE_BITS"]), graph.word(v["OFFSET_BITS"])
    products = [gates.multiplier(graph, v, x, y) for x, y in zip(*words, strict=True)]
    if v["LOG"]:
        plus = datapath.tables()["delta_plus"]
        terms = []
        for sign, zero, code in products:
            entered = gates.enter(graph, v, code, zero, constant(scale, v["SCALE_BITS"]))
            terms.append((graph.and_(sign, graph.any_(entered)), entered))
        total = gates.adder(graph, pe.adders[0], *terms, plus)
        total = gates.adder(graph, pe.adders[0], (start[-1], start[:-1]), total, plus)
        made = gates.log_finish(graph, v, *total, offset)
    else:
        lanes = [(sign, *gates.term(graph, v, pe.roms, code, zero, scale)) for sign, zero, code in products]
        terms = [(magnitude, sign) for sign, magnitude, _ in lanes]
        bins = datapath.linear.bins
        after = []
        for number in range(bins):
            here = [gates.equals(graph, index, number) if bins > 1 else 1 for _, _, index in lanes]
            before = start[: v["ACC_BITS"]] if number == 0 else [0] * v["ACC_BITS"]
            after.append(gates.step_bin(graph, v, terms, here, before))
        made = gates.linear_finish(graph, v, pe.roms, after, offset)
    inputs = [first, last, *words[0][::-1], *words[1][::-1], start, scale_port, offset]
    check(graph, designs.vector_pe(pe), inputs, [made], vectors.pe_vectors(pe, plan, a, w, bias))


def test_gates_are_shared_folded_and_merged():
    """Constants vanish, equal gates are one, and what only a proof can tell is merged where it is asked for."""
    graph = Graph()
    a, b = graph.word(2)
    assert graph.and_(a, 1) == a
    assert graph.xor(a, a ^ 1) == 1
    assert graph.mux(a, b, b) == b
    assert graph.mux(a, a, b) == graph.or_(a, b)
    assert graph.and_(a, b) == graph.and_(b, a)
    for merge, equal in ((False, False), (True, True)):
        graph = Graph(merge=merge)
        x, y, z = (graph.word(1)[0] for _ in range(3))
        left = graph.or_(graph.and_(x, y), graph.and_(x, z))
        assert (left == graph.and_(x, graph.or_(y, z))) is equal


def test_a_rare_carry_is_not_taken_for_none():
    """Forty bits are all ones for hardly any input: the gates that find out stay."""
    graph = Graph(merge=True)
    word = graph.word(40)
    every = graph.all_(word)
    assert every != 0
    assert sum(graph.count([every]).values()) == 39
