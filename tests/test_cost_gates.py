"""The model's graphs of gates compute what the hardware computes: they are run on words, and compared with the reference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from lnsdeploy import delta as methods
from lnsdeploy.cost import gates
from lnsdeploy.cost.graph import Graph, constant, signed, unsigned
from lnsdeploy.datapath import LogAccumulator, load_datapath, named_datapaths
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
