"""Whole dot products against the oracle: named edge cases and whatever hypothesis finds (spec 3, 4, 5, 7.2)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lnsdeploy.emulator.plan import Counts
from lnsdeploy.errors import BadTypeError, BadValueError
from tests import strategies
from tests.cases import DOTS, DotCase, oracle_product

NAMED = {case.name: case for case in DOTS}


@pytest.mark.smoke
@pytest.mark.parametrize("case", DOTS, ids=lambda case: case.name)
def test_named_cases(executor: Any, case: DotCase) -> None:
    """spec 3.1 to 5.6 at their edges; where the words follow by hand, they are written out."""
    a, w, bias = case.arrays()
    want = case.by_oracle()
    if case.expected is not None:
        assert want == case.expected
    got = executor.dot(a, w, bias, case.plan())
    assert got.dtype == case.plan().output.dtype
    assert got.shape == (a.shape[0], w.shape[0])
    assert got.tolist() == want


@given(st.data())
@settings(max_examples=250, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_dot_product(each_executor: Any, data: st.DataObject) -> None:
    """spec 3 to 5 with any datapath, plan, words and bias."""
    rows, channels, depth = (data.draw(st.integers(0, n)) for n in (3, 3, 12))
    plan = data.draw(strategies.dot_plans(channels))
    a = data.draw(strategies.words(plan.activation, (rows, depth)))
    w = data.draw(strategies.words(plan.weight, (channels, depth)))
    bias = data.draw(strategies.biases(plan, channels))
    want = oracle_product(a, w, bias, plan)

    def check(executor: Any) -> None:
        got = executor.dot(a, w, bias, plan)
        assert got.dtype == plan.output.dtype
        np.testing.assert_array_equal(got, want)

    each_executor(check)


@pytest.mark.parametrize("name", ["product", "bins", "log-exact", "16-bit", "log-lanes-4"])
def test_layout_does_not_matter(executor: Any, name: str) -> None:
    """Strided, transposed and reversed operands give the words of their copies."""
    a, w, bias = NAMED[name].arrays()
    plan = NAMED[name].plan()
    want = executor.dot(a, w, bias, plan)
    for view in (np.asfortranarray(a), np.repeat(a, 2, axis=1)[:, ::2], a[:, ::-1][:, ::-1], np.repeat(a, 3, 0)[::3]):
        np.testing.assert_array_equal(executor.dot(view, w, bias, plan), want)
    for view in (np.asfortranarray(w), np.repeat(w, 2, axis=1)[:, 1::2], w[::-1][::-1]):
        np.testing.assert_array_equal(executor.dot(a, view, bias, plan), want)
    np.testing.assert_array_equal(executor.dot(a[::2], w, bias, plan), want[::2])
    some = plan if isinstance(plan.weight_offset, int) and isinstance(plan.acc_offset, int) else None
    assert some is not None
    np.testing.assert_array_equal(executor.dot(a, w[::-1], bias, plan), want[:, ::-1])


@pytest.mark.parametrize("name", ["product", "saturates-at-every-step", "log-exact", "log-lanes-4"])
def test_rows_are_independent(executor: Any, name: str) -> None:
    """spec 7.2: a row's words do not depend on which other rows are in the batch, however many."""
    a, w, bias = NAMED[name].arrays()
    plan = NAMED[name].plan()
    want = executor.dot(a, w, bias, plan)
    many = np.tile(a, (7000, 1))
    np.testing.assert_array_equal(executor.dot(many, w, bias, plan), np.tile(want, (7000, 1)))
    for i in range(len(a)):
        np.testing.assert_array_equal(executor.dot(a[i : i + 1], w, bias, plan), want[i : i + 1])


@pytest.mark.parametrize(
    "name", ["product", "log-exact", "zeros-underflow-min", "unsigned-output", "log-unsigned-output"]
)
@pytest.mark.parametrize("offset", [-300, 0, 64, 80, 500])
def test_results_are_counted(executor: Any, name: str, offset: int) -> None:
    """spec 2.4: words above C count as saturated, non-zero words below code 1 as flushed."""
    case = replace(NAMED[name], output_offset=offset)
    a, w, bias = case.arrays()
    counts = Counts()
    executor.dot(a, w, bias, case.plan(), counts)
    # the same results with room at both ends of the output tell which of them left the format
    wide = replace(
        case, output="32:8" if case.plan().output.signed else "u32:8", output_offset=offset - 2**20, underflow="zero"
    )
    codes, _ = wide.plan().output.split(oracle_product(a, w, bias, wide.plan()).astype(np.uint32))
    unbounded = codes[codes > 0] - 2**20
    assert counts.words == a.shape[0] * w.shape[0]
    assert counts.saturated == (unbounded > case.plan().output.max_code).sum()
    assert counts.flushed == (unbounded < 1).sum()


def test_operands_are_checked(executor: Any) -> None:
    """Wrong shapes, dtypes and biases are refused by name."""
    a, w, _ = NAMED["product"].arrays()
    plan = NAMED["product"].plan()
    with pytest.raises(BadTypeError, match="activations: words of 8:8 are uint8, not int64"):
        executor.dot(a.astype(np.int64), w, None, plan)
    with pytest.raises(BadTypeError, match="weights: words of 8:8 are uint8, not uint16"):
        executor.dot(a, w.astype(np.uint16), None, plan)
    for x, y in ((a[:, :5], w), (a[0], w), (a, w[None])):
        with pytest.raises(BadValueError, match=r"activations \[M, K\] and weights \[N, K\]"):
            executor.dot(x, y, None, plan)
    with pytest.raises(BadValueError, match=r"bias for 4 output channels has shape \(3,\)"):
        executor.dot(a, w, np.zeros(3, dtype=np.int64), plan)
    with pytest.raises(BadTypeError, match="not float64"):
        executor.dot(a, w, np.zeros(4), plan)
    with pytest.raises(BadValueError, match=r"weight_offset has shape \(3,\), but there are 4 output channels"):
        executor.dot(a, w, None, replace(plan, weight_offset=np.zeros(3, dtype=np.int64)))
    narrow = NAMED["two-bit-words"]
    with pytest.raises(BadValueError, match="word 4 does not fit the 2 bits of 2:1"):
        executor.dot(np.array([[4]], dtype=np.uint8), np.array([[1]], dtype=np.uint8), None, narrow.plan())


def test_plans_are_checked() -> None:
    """spec 3.2: γ of plan and datapath must be one; offsets are integers within the limits."""
    plan = NAMED["product"].plan()
    other = NAMED["widened-weight"].plan()
    with pytest.raises(BadValueError, match="the output's gamma must be that of the products, 8, not 4"):
        replace(plan, output=other.weight)
    with pytest.raises(BadValueError, match=r"multiply at gamma 4.*the datapath 'product' at 8"):
        replace(plan, activation=other.weight, weight=other.weight, output=other.weight)
    for field, bad in (("input_offset", 2**31), ("output_offset", -(2**31)), ("lsb", 1 << 25), ("lsb", -(1 << 25))):
        with pytest.raises(BadValueError, match=f"{field} must be from"):
            replace(plan, **{field: bad})
    with pytest.raises(BadTypeError, match="input_offset must be an integer"):
        replace(plan, input_offset=1.5)
