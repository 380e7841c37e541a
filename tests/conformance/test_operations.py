"""The operations on words beside dot products (spec 6), all words of small formats and whatever hypothesis finds."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lnsdeploy.datapath import LogAccumulator
from lnsdeploy.delta import Delta
from lnsdeploy.emulator.plan import AddPlan, Counts, PoolPlan, RescalePlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError, UnknownNameError
from lnsdeploy.formats import LNSFormat, decode
from tests import oracle, strategies
from tests.cases import DELTAS, delta_name, oracle_add, oracle_pool, to_format, to_shape
from tests.conformance import stages

FORMATS = [LNSFormat(5, 2), LNSFormat(4, 3, False), LNSFormat(2, 1), LNSFormat(6, 10), LNSFormat(6, 8, False)]
quiet = settings(max_examples=80, suppress_health_check=[HealthCheck.function_scoped_fixture])
Array = np.ndarray[Any, Any]


def _all(fmt: LNSFormat) -> Array:
    return np.arange(1 << fmt.bits, dtype=fmt.dtype)


def _pairs(fmt: LNSFormat) -> tuple[Array, Array]:
    x, y = np.meshgrid(_all(fmt), _all(fmt), indexing="ij")
    return x.reshape(-1), y.reshape(-1)


# ---------------------------------------------------------------------------------------------------------------------
# Exact operations: spec 6.1


@pytest.mark.smoke
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_relu_and_negate(executor: Any, fmt: LNSFormat) -> None:
    """spec 6.1: every word, minus zero included."""
    words, form = _all(fmt), to_format(fmt)
    assert executor.relu(words, fmt).tolist() == [oracle.relu(int(w), form) for w in words]
    assert executor.relu(words, fmt).dtype == fmt.dtype
    if fmt.signed:
        assert executor.negate(words, fmt).tolist() == [oracle.negate(int(w), form) for w in words]
    else:
        with pytest.raises(BadValueError, match="unsigned"):
            executor.negate(words, fmt)


@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_maximum_minimum_and_clip(executor: Any, fmt: LNSFormat) -> None:
    """spec 6.1: every pair of words; the order is that of the values."""
    x, y = _pairs(fmt)
    form = to_format(fmt)
    pairs = [(int(a), int(b)) for a, b in zip(x, y, strict=True)]
    assert executor.maximum(x, y, fmt).tolist() == [oracle.maximum(a, b, form) for a, b in pairs]
    assert executor.minimum(x, y, fmt).tolist() == [oracle.minimum(a, b, form) for a, b in pairs]
    values = decode(executor.maximum(x, y, fmt), fmt, 0)
    np.testing.assert_array_equal(values, np.maximum(decode(x, fmt, 0), decode(y, fmt, 0)))
    words = _all(fmt)
    for low, high in itertools.product(range(0, 1 << fmt.bits, 3), repeat=2):
        if oracle.value_order(low, form) <= oracle.value_order(high, form):
            got = executor.clip(words, fmt, low, high)
            assert got.tolist() == [oracle.clip(int(w), low, high, form) for w in words]


@given(st.data())
@quiet
def test_max_pooling(each_executor: Any, data: st.DataObject) -> None:
    """spec 6.1: any window in which every position sees the input; padding never wins, not even over negatives."""
    axes = data.draw(st.integers(1, 3))
    spatial, window = data.draw(strategies.geometries(axes, small_pads=True))
    fmt = data.draw(st.sampled_from(FORMATS))
    x = data.draw(strategies.words(fmt, (1, 2, *spatial)))
    form = to_format(fmt)
    want = oracle.pool(x, to_shape(window), lambda words: oracle.max_of_window(words, form))

    def check(executor: Any) -> None:
        got = executor.max_pool(x, fmt, window)
        assert got.dtype == fmt.dtype
        np.testing.assert_array_equal(got, want)

    each_executor(check)


def test_max_pooling_of_negative_words_with_padding(executor: Any) -> None:
    """spec 6.1: the padded zeros are larger than every word here, and must not be chosen."""
    fmt = LNSFormat(5, 2)
    x = np.full((1, 1, 3, 3), fmt.sign_bit | 7, dtype=np.uint8)
    x[0, 0, 1, 1] = fmt.sign_bit | 15
    got = executor.max_pool(x, fmt, Window((2, 2), (1, 1), (1, 1, 1, 1)))
    assert set(got.reshape(-1).tolist()) == {fmt.sign_bit | 7}


@pytest.mark.parametrize(
    "window",
    [
        Window((2,), (1,), (2, 0)),
        Window((2,), (1,), (0, 2)),
        Window((1,), (1,), (1, 1)),
        Window((2,), (1,), (3, 3), (3,)),
    ],
)
def test_windows_of_padding_only_are_refused(executor: Any, window: Window) -> None:
    """spec 6.1, 6.5: a maximum or an average of nothing is not defined; dilated windows may step over the input."""
    x = np.ones((1, 1, 1), dtype=np.uint8)
    with pytest.raises(BadValueError, match="padding only"):
        executor.max_pool(x, LNSFormat(8, 8), window)
    plan = PoolPlan(LogAccumulator(bits=7), LNSFormat(8, 8), LNSFormat(8, 8), 0, 0, 0)
    with pytest.raises(BadValueError, match="padding only"):
        executor.average_pool(x, plan, window)
    assert executor.average_pool(x, plan, window, True).shape[2] > 0


# ---------------------------------------------------------------------------------------------------------------------
# Products, quotients, roots: spec 6.2


@pytest.mark.parametrize("underflow", ["zero", "min"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_multiply_and_divide(executor: Any, fmt: LNSFormat, underflow: str) -> None:
    """spec 6.2, 3.1: every pair of words; zero by anything, anything by zero, zero by zero."""
    x, y = _pairs(fmt)
    form = to_format(fmt)
    forms = (form, form, form)
    for offsets in ((0, 0, 0), (5, -3, 9), (2**31 - 1, 2, 2**31 - 1), (-30, -4, -50)):
        for run, by_oracle in ((executor.multiply, oracle.multiply), (executor.divide, oracle.divide)):
            got = run(x, y, fmt, *offsets, underflow=underflow)
            assert got.dtype == fmt.dtype
            want = [by_oracle(int(a), int(b), forms, offsets, underflow) for a, b in zip(x, y, strict=True)]
            assert got.tolist() == want


@pytest.mark.parametrize("underflow", ["zero", "min"])
@pytest.mark.parametrize("fmt", FORMATS, ids=str)
def test_square_root(executor: Any, fmt: LNSFormat, underflow: str) -> None:
    """spec 6.2: odd exponents round up; negative words are refused, minus zero is zero."""
    form = to_format(fmt)
    words = np.append(_all(fmt)[: fmt.max_code + 1], fmt.dtype.type(fmt.sign_bit))
    for offset, out in itertools.product((-21, 0, 4, 2**31 - 1, -(2**31) + 1), (-9, 0, 3)):
        got = executor.square_root(words, fmt, offset, out, underflow=underflow)
        assert got.tolist() == [oracle.square_root(int(w), form, form, offset, out, underflow) for w in words]
    if fmt.signed:
        with pytest.raises(BadValueError, match="square root of a negative word"):
            executor.square_root(np.array([1, fmt.sign_bit | 1], dtype=fmt.dtype), fmt, 0, 0)


def test_roots_and_products_are_inverse(executor: Any) -> None:
    """spec 6.2: the square root of a square is the word itself."""
    fmt = LNSFormat(8, 8, False)
    words = _all(fmt)
    squares = np.minimum(2 * words.astype(np.int64), 255).astype(np.uint8)
    some = words[words < 128]
    np.testing.assert_array_equal(executor.multiply(some, some, fmt, 0, 0, 0), squares[:128])
    np.testing.assert_array_equal(executor.square_root(squares[:128], fmt, 0, 0), some)


# ---------------------------------------------------------------------------------------------------------------------
# Rescale: spec 6.3


@given(st.data())
@quiet
def test_rescale(each_executor: Any, data: st.DataObject) -> None:
    """spec 6.3: γ up, down and the same, any offsets, signed and unsigned, both underflow rules."""
    gamma, ratio = data.draw(strategies.GAMMAS), data.draw(st.sampled_from([1, 2, 3, 4, 7]))
    first = LNSFormat(data.draw(st.integers(2, 8)), gamma, data.draw(st.booleans()))
    second = LNSFormat(data.draw(st.integers(2, 8)), gamma * ratio, data.draw(st.booleans()))
    if data.draw(st.booleans()):
        first, second = second, first
    offset = data.draw(st.one_of(st.integers(-50, 50), st.integers(-(2**31) + 1, 2**31 - 1)))
    middle = (offset + first.max_code // 2) * second.gamma // first.gamma - second.max_code // 2
    out = middle + data.draw(st.integers(-second.max_code, second.max_code))
    underflow = data.draw(strategies.UNDERFLOWS)
    plan = RescalePlan(first, second, offset, out, underflow)
    forms = to_format(first), to_format(second)
    want = [oracle.rescale(int(w), *forms, offset, out, underflow) for w in _all(first)]

    def check(executor: Any) -> None:
        counts = Counts()
        got = executor.rescale(_all(first), plan, counts)
        assert got.dtype == second.dtype
        assert got.tolist() == want
        assert counts.words == got.size

    each_executor(check)


def test_rescale_there_and_back(executor: Any) -> None:
    """spec 6.3: to a multiple of γ and back is the identity; to a divisor, ties go up."""
    narrow, wide = LNSFormat(6, 3), LNSFormat(9, 12)
    words = _all(narrow)
    up = executor.rescale(words, RescalePlan(narrow, wide, -10, -40))
    back = executor.rescale(up, RescalePlan(wide, narrow, -40, -10))
    np.testing.assert_array_equal(back, np.where(words == narrow.sign_bit, 0, words))
    half = executor.rescale(np.arange(8, dtype=np.uint8), RescalePlan(LNSFormat(8, 2), LNSFormat(8, 1), 0, 0))
    assert half.tolist() == [0, 1, 1, 2, 2, 3, 3, 4]
    with pytest.raises(BadValueError, match="do not fit together"):
        RescalePlan(LNSFormat(8, 3), LNSFormat(8, 8), 0, 0)
    with pytest.raises(UnknownNameError, match="underflow 'mni'"):
        RescalePlan(LNSFormat(8, 8), LNSFormat(8, 8), 0, 0, "mni")


# ---------------------------------------------------------------------------------------------------------------------
# Addition, sums, averages: spec 6.4, 6.5


@pytest.mark.parametrize("how", DELTAS, ids=delta_name)
def test_all_pairs_of_the_adder(executor: Any, how: Delta) -> None:
    """spec 6.4, 5.2, 5.3: all 65,536 pairs of 8-bit words, by every method."""
    got, want = stages.add_adder(executor, how)
    np.testing.assert_array_equal(got, want)


@given(st.data())
@quiet
def test_any_addition(each_executor: Any, data: st.DataObject) -> None:
    """spec 6.4: unequal formats and offsets, guard bits, limits, both underflow rules, broadcasting."""
    plan = data.draw(strategies.add_plans())
    a = data.draw(strategies.words(plan.a, (3, 1)))
    b = data.draw(strategies.words(plan.b, (1, 4)))
    want = oracle_add(a, b, plan)

    def check(executor: Any) -> None:
        counts = Counts()
        got = executor.add(a, b, plan, counts)
        assert got.dtype == plan.output.dtype
        np.testing.assert_array_equal(got, want)
        assert counts.words == 12

    each_executor(check)


def test_additions_are_checked(executor: Any) -> None:
    fmt = LNSFormat(8, 8)
    plan = AddPlan(LogAccumulator(bits=7), fmt, fmt, fmt, 0, 0, 0, 0)
    word = np.ones(1, dtype=np.uint8)
    with pytest.raises(BadTypeError, match="first operand: words of 8:8 are uint8, not uint16"):
        executor.add(word.astype(np.uint16), word, plan)
    with pytest.raises(BadTypeError, match="second operand"):
        executor.add(word, word.astype(np.int64), plan)
    with pytest.raises(BadValueError, match="one gamma, not those of 8:8, 8:4 and 8:8; rescale first"):
        replace(plan, b=LNSFormat(8, 4))
    with pytest.raises(UnknownNameError, match="underflow"):
        replace(plan, underflow="none")
    with pytest.raises(BadValueError, match="one gamma, not those of 8:8 and 8:4; rescale first"):
        PoolPlan(LogAccumulator(bits=7), fmt, LNSFormat(8, 4), 0, 0, 0)


@given(st.data())
@quiet
def test_sums_and_averages(each_executor: Any, data: st.DataObject) -> None:
    """spec 6.5: the order of 5.4 within a window, padding as zero words, counts with and without it."""
    plan = data.draw(strategies.pool_plans())
    axes = data.draw(st.integers(1, 3))
    spatial, window = data.draw(strategies.geometries(axes, small_pads=True))
    x = data.draw(strategies.words(plan.input, (1, 1, *spatial)))
    total = oracle_pool(x, plan, window, False)
    averages = [oracle_pool(x, plan, window, True, include) for include in (False, True)]

    def check(executor: Any) -> None:
        counts = Counts()
        np.testing.assert_array_equal(executor.sum_window(x, plan, window, counts), total)
        assert counts.words == np.prod(window.output_shape(spatial))
        for include, want in zip((False, True), averages, strict=True):
            got = executor.average_pool(x, plan, window, include)
            assert got.dtype == plan.output.dtype
            np.testing.assert_array_equal(got, want)

    each_executor(check)


def test_logarithms_of_counts(executor: Any) -> None:
    """spec 6.5: round(γ_acc·log2 n) for n from 1 to 12."""
    for gamma, guard_bits in ((8, 2), (10, 0), (3, 3), (1, 0)):
        got, want = stages.average_counts(executor, gamma, guard_bits)
        np.testing.assert_array_equal(got, want)
