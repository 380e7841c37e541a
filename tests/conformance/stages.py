"""Each stage of the arithmetic, run over all it can see, as (words of the executor, words of the oracle).

The expected words never depend on lnsdeploy's tables; so a wrong entry in any of them shows as a difference,
which `test_mutations.py` checks entry by entry. Where one unit of a table would vanish in the rounding of the
output, the stage subtracts the expected sum through the bias: what is right is then exactly zero, and what is
wrong is not.
"""

from __future__ import annotations

import dataclasses
from functools import cache
from typing import Any

import numpy as np

from lnsdeploy.datapath import Accumulator, Datapath, LinearAccumulator, LogAccumulator, default_adder
from lnsdeploy.delta import Delta
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, Window
from lnsdeploy.formats import LNSFormat
from tests import oracle
from tests.cases import oracle_pool, oracle_product, to_linear, to_method

Array = np.ndarray[Any, Any]
Pair = tuple[Array, Array]


def datapath(accumulate: Accumulator, gamma: int = 8, bits: int = 8, underflow: Any = "zero") -> Datapath:
    fmt = LNSFormat(bits, gamma)
    return Datapath("stage", fmt, fmt, fmt, accumulate, default_adder(fmt), underflow)


def plan(path: Datapath, **changes: Any) -> DotPlan:
    return dataclasses.replace(DotPlan(path, path.activation, path.weight, path.output, 0, 0, 0), **changes)


@cache
def _terms_expected(part: LinearAccumulator, gamma: int, lsb: int, largest: int) -> tuple[list[int], list[list[int]]]:
    """The start value that cancels each product code, and the words of what is left, by the oracle."""
    table = oracle.remainder_table(part.table_bits, part.constant_bits)
    path = datapath(part, gamma)
    starts, words = [], []
    for code in range(1, largest + 1):
        number, term = oracle.linear_term(1 + code, gamma, lsb, to_linear(part), table)
        # with bins the start value stands in bin 0, which weighs T[0] = 2^m: the nearest it can come
        start = -term if part.conversion == "product" else -((table[number] * term) >> part.constant_bits)
        start = max(start, -(1 << 62))
        starts.append(start)
        one = plan(path, lsb=lsb)
        words.append(oracle_product(np.array([[1]]), np.array([[code]]), [start], one)[0].tolist())
    return starts, [[row[0] for row in words]]


def linear_terms(executor: Any, part: LinearAccumulator, gamma: int = 8, lsb: int = -12) -> Pair:
    """spec 4.1 to 4.3: the aligned term of every product code, to the last unit."""
    path = datapath(part, gamma)
    largest = path.weight.max_code
    starts, want = _terms_expected(part, gamma, lsb, largest)
    a = np.ones((1, 1), dtype=np.uint8)
    w = np.arange(1, largest + 1, dtype=np.uint8).reshape(-1, 1)
    got = executor.dot(a, w, np.array(starts, dtype=np.int64), plan(path, lsb=lsb))
    return got, np.array(want)


@cache
def _encoded(part: LinearAccumulator, gamma: int, values: tuple[int, ...], lsb: int, offset: int) -> Array:
    one = plan(datapath(part, gamma, 12), lsb=lsb, output_offset=offset)
    return oracle_product(np.zeros((1, 0), dtype=np.int64), np.zeros((len(values), 0), dtype=np.int64), values, one)


def encoder_values(gamma: int, bits: int) -> tuple[int, ...]:
    """All small sums, and those on either side of every bound of the highest octave that the accumulator holds."""
    small = list(range(-300, 1025))
    top = bits - 2
    bounds = []
    for i in range(gamma):
        with oracle.MP.workprec(200):
            exact = oracle.MP.ldexp(oracle.MP.power(2, (oracle.MP.mpf(i) + 0.5) / gamma), top)
            bounds.append(int(oracle.MP.ceil(exact)))
    return tuple(small + bounds + [b - 1 for b in bounds] + [-(2 ** (bits - 1)) + 1, 2 ** (bits - 1) - 1])


def linear_encoder(executor: Any, part: LinearAccumulator, gamma: int = 8) -> Pair:
    """spec 4.5, 4.6: sums that enter as bias, encoded by each encoder."""
    values, lsb = encoder_values(gamma, part.bits), -5
    offset = -gamma * 6
    one = plan(datapath(part, gamma, 12), lsb=lsb, output_offset=offset)
    dtype = one.weight.dtype
    got = executor.dot(
        np.zeros((1, 0), dtype=dtype), np.zeros((len(values), 0), dtype=dtype), np.array(values, dtype=np.int64), one
    )
    return got, _encoded(part, gamma, values, lsb, offset)


@cache
def delta_lists(how: oracle.Method, gamma: int, count: int) -> tuple[list[int], list[int]]:
    plus = [oracle.delta(d, gamma, 1, how) for d in range(count)]
    return plus, [0] + [oracle.delta(d, gamma, -1, how) for d in range(1, count)]


def log_adder(executor: Any, how: Delta, gamma: int = 8) -> Pair:
    """spec 5.2, 5.3: a product onto a start value, all 65,536 pairs of accumulator words."""
    words = np.arange(256, dtype=np.uint8)
    # the weight's code is taken off again by the accumulator's offset, so products enter with the activation's code
    one = plan(datapath(LogAccumulator(bits=7, delta=how), gamma), acc_offset=1, output_offset=1)
    got = executor.dot(words.reshape(-1, 1), np.ones((256, 1), dtype=np.uint8), words.astype(np.int64), one)
    plus, minus = delta_lists(to_method(how), gamma, 128)
    x, y = np.meshgrid(words, words, indexing="ij")
    return got, oracle.add_pairs(x, y, 7, plus, minus)


def add_adder(executor: Any, how: Delta, gamma: int = 8) -> Pair:
    """spec 6.4: the same through element-wise addition."""
    words = np.arange(256, dtype=np.uint8)
    fmt = LNSFormat(8, gamma)
    one = AddPlan(LogAccumulator(bits=7, delta=how), fmt, fmt, fmt, 0, 0, 0, 0)
    x, y = np.meshgrid(words, words, indexing="ij")
    plus, minus = delta_lists(to_method(how), gamma, 128)
    return executor.add(x, y, one), oracle.add_pairs(x, y, 7, plus, minus)


def average_counts(executor: Any, gamma: int = 8, guard_bits: int = 2) -> Pair:
    """spec 6.5: the logarithm of the count, for windows of 1 to 12 words of which one is not zero."""
    fmt = LNSFormat(8, gamma)
    got, want = [], []
    one = PoolPlan(LogAccumulator(bits=7 + guard_bits, guard_bits=guard_bits), fmt, fmt, 0, 0, 0)
    for n in range(1, 13):
        x = np.zeros((1, 3, n), dtype=np.uint8)
        x[0, :, 0] = (100, 101, 127)
        got.append(executor.average_pool(x, one, Window((n,))))
        want.append(oracle_pool(x, one, Window((n,)), average=True))
    return np.concatenate(got), np.concatenate(want)
