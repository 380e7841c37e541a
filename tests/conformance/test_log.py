"""Log accumulation, stage by stage, against the oracle (spec 5)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from lnsdeploy.datapath import LogAccumulator
from lnsdeploy.delta import Delta
from tests.cases import DELTAS, delta_name, oracle_product
from tests.conformance import stages


@pytest.mark.parametrize("how", DELTAS, ids=delta_name)
def test_all_pairs_of_accumulator_words(executor: Any, how: Delta) -> None:
    """spec 5.2, 5.3, 5.5, 5.7: the adder inside a dot product, all 65,536 pairs, by every method."""
    got, want = stages.log_adder(executor, how)
    np.testing.assert_array_equal(got, want)


@pytest.mark.smoke
@pytest.mark.parametrize("guard_bits", [0, 1, 4])
@pytest.mark.parametrize("acc_offset", [-40, 0, 100, 254, 300])
def test_entry_and_output(executor: Any, acc_offset: int, guard_bits: int) -> None:
    """spec 5.1, 5.6: single products of every code: entered, limited, rounded and put out again."""
    path = stages.datapath(LogAccumulator(bits=6 + guard_bits, guard_bits=guard_bits))
    one = stages.plan(path, acc_offset=acc_offset, output_offset=acc_offset - 3)
    a = np.arange(256, dtype=np.uint8).reshape(-1, 1)
    w = np.array([[1], [127], [129], [255], [0], [128]], dtype=np.uint8)
    np.testing.assert_array_equal(executor.dot(a, w, None, one), oracle_product(a, w, None, one))


@pytest.mark.parametrize("underflow", ["zero", "min"])
@pytest.mark.parametrize("guard_bits", [0, 1, 3])
def test_output_of_every_accumulator_code(executor: Any, guard_bits: int, underflow: str) -> None:
    """spec 5.5, 5.6, 2.4: start values alone, of every code and sign, minus zero included."""
    bits = 5 + guard_bits
    path = stages.datapath(LogAccumulator(bits=bits, guard_bits=guard_bits), bits=5, underflow=underflow)
    words = np.arange(2 << bits, dtype=np.int64)
    a, w = np.zeros((2, 0), dtype=np.uint8), np.zeros((len(words), 0), dtype=np.uint8)
    for offset in (-30, -4, 0, 7, 40):
        one = stages.plan(path, output_offset=offset)
        np.testing.assert_array_equal(executor.dot(a, w, words, one), oracle_product(a, w, words, one))


@pytest.mark.parametrize("depth", [0, 1, 2, 3, 5, 8, 9, 17])
@pytest.mark.parametrize("lanes", range(1, 10))
def test_order_of_additions(executor: Any, lanes: int, depth: int) -> None:
    """spec 5.4: the tree of every number of lanes, with depths that are not multiples of it."""
    path = stages.datapath(LogAccumulator(bits=9, guard_bits=1, lanes=lanes))
    one = stages.plan(path, acc_offset=8, output_offset=8)
    rng = np.random.default_rng(100 * lanes + depth)
    a = (rng.integers(30, 60, (6, depth)) | (rng.integers(0, 2, (6, depth)) << 7)).astype(np.uint8)
    w = np.full((1, depth), 9, dtype=np.uint8)
    got = executor.dot(a, w, np.array([100]), one)
    np.testing.assert_array_equal(got, oracle_product(a, w, [100], one))


def test_order_matters() -> None:
    """spec 5.4, 7.3: the inputs above do tell one order from another."""
    words = set()
    a, w = np.array([[40, 41, 43, 39, 52, 40, 41]], dtype=np.uint8), np.full((1, 7), 9, dtype=np.uint8)
    for lanes in (1, 2, 3, 4):
        path = stages.datapath(LogAccumulator(bits=7, lanes=lanes))
        words.add(int(oracle_product(a, w, None, stages.plan(path, acc_offset=8, output_offset=8))[0, 0]))
    assert len(words) > 1
