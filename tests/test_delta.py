"""Every way to make Δ against the oracle, over all d and many γ_acc (spec 5.7); all pairs of the 8-bit adder (5.2)."""

from __future__ import annotations

import dataclasses
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lnsdeploy import delta as methods
from lnsdeploy import tables
from lnsdeploy.datapath import LogAccumulator
from lnsdeploy.delta import METHODS, Delta, check_gamma
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import AddPlan
from lnsdeploy.errors import BadTypeError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.formats import LNSFormat
from tests import oracle
from tests.cases import DELTAS, delta_name, to_method

Array = np.ndarray[Any, Any]


def _list(table: Array, count: int) -> list[int]:
    """A Δ table by d, with the zeros past its end."""
    return table.tolist()[:count] + [0] * max(count - len(table), 0)


def _reach(how: Delta, gamma: int) -> int:
    """Past every entry of the tables and of the exact values."""
    made = how.tables(gamma)
    return max(len(made.plus), len(made.minus), oracle.delta_end(gamma, -1)) + 3


@lru_cache(maxsize=256)
def _oracle_lists(how: oracle.Method, gamma: int, count: int) -> tuple[list[int], list[int]]:
    plus = [oracle.delta(d, gamma, 1, how) for d in range(count)]
    return plus, [0] + [oracle.delta(d, gamma, -1, how) for d in range(1, count)]


@pytest.mark.parametrize("gamma", [1, 2, 3, 4, 5, 8, 10, 16, 24, 64, 100, 128])
@pytest.mark.parametrize("how", DELTAS, ids=delta_name)
def test_every_method_for_every_d(how: Delta, gamma: int) -> None:
    """spec 5.7.1 to 5.7.10: both tables of every method, entry by entry and some way past their ends."""
    count = _reach(how, gamma)
    made = how.tables(gamma)
    plus, minus = _oracle_lists(to_method(how), gamma, count)
    assert _list(made.plus, count) == plus
    assert _list(made.minus, count)[1:] == minus[1:]


@pytest.mark.parametrize(
    "how",
    [
        methods.Table(20, 512),
        methods.Interpolated(16, "octave", 12),
        methods.Interpolated(64, "equal", 10),
        methods.Cotransform(7),
        methods.Mitchell(),
        methods.Shift(),
        methods.Polynomial(2, 4, "octave", 10),
        methods.Cordic(12, 16),
    ],
    ids=delta_name,
)
def test_methods_at_the_gamma_of_16_bit_words(how: Delta) -> None:
    """spec 5.7 at γ = 1024: every 13th d, and every d near the singularity."""
    made = how.tables(1024)
    end = _reach(how, 1024)
    for d in [*range(1, 60), *range(60, end, 13), *range(end - 5, end + 2)]:
        assert (made.plus[d] if d < len(made.plus) else 0) == oracle.delta(d, 1024, 1, to_method(how)), d
        assert (made.minus[d] if d < len(made.minus) else 0) == oracle.delta(d, 1024, -1, to_method(how)), d


@st.composite
def _any_method(draw: Any) -> Delta:
    spacing = st.sampled_from(["equal", "octave"])
    power = st.integers(0, 7).map(lambda n: 1 << n)
    return draw(  # type: ignore[no-any-return]
        st.one_of(
            st.builds(methods.Table, st.integers(1, 200), power, st.sampled_from(["left", "middle"])),
            st.builds(methods.Interpolated, power, spacing, st.integers(1, 24)),
            st.builds(methods.Cotransform, st.integers(1, 20)),
            st.builds(methods.Polynomial, st.integers(1, 4), power, spacing, st.integers(0, 30)),
            st.builds(methods.Cordic, st.integers(1, 48), st.integers(4, 48)),
        )
    )


@given(_any_method(), st.sampled_from([1, 2, 3, 8, 10, 20]))
@settings(max_examples=100)
def test_any_parameters_match_the_oracle(how: Delta, gamma: int) -> None:
    """spec 5.7 with parameters nobody would choose."""
    count = min(_reach(how, gamma), 400)
    made = how.tables(gamma)
    for d in range(count):
        assert (made.plus[d] if d < len(made.plus) else 0) == oracle.delta(d, gamma, 1, to_method(how)), d
        if d:
            assert (made.minus[d] if d < len(made.minus) else 0) == oracle.delta(d, gamma, -1, to_method(how)), d


def test_every_method_is_tested_and_known_to_the_oracle() -> None:
    """A new method needs its parametrisations in `DELTAS` and its definition in the oracle."""
    assert {how.kind for how in DELTAS} == set(METHODS) == set(oracle.DELTAS)
    for kind, method in METHODS.items():
        assert method.kind == kind
        assert issubclass(method, Delta)


@pytest.mark.parametrize("gamma", [1, 3, 8, 64])
@pytest.mark.parametrize("how", DELTAS, ids=delta_name)
def test_invariants_of_tables(how: Delta, gamma: int) -> None:
    """spec 5.7: never negative, read-only, trimmed, cached; `signed` is what an adder indexes."""
    made = how.tables(gamma)
    assert how.tables(gamma) is made
    for table in (made.plus, made.minus):
        assert table.dtype == np.int64
        assert not table.size or (table.min() >= 0 and table[-1] > 0)
        with pytest.raises(ValueError, match="read-only"):
            table[...] = 0
    both = made.signed
    assert both.shape == (2, max(len(made.plus), len(made.minus)) + 1)
    assert both[0].tolist() == _list(made.plus, both.shape[1])
    assert (-both[1]).tolist() == _list(made.minus, both.shape[1])
    assert both[:, -1].tolist() == [0, 0]
    assert how.table_entries(gamma) >= 0
    if how.kind in ("mitchell", "shift", "max"):
        assert how.table_entries(gamma) == 0
    else:
        assert how.table_entries(gamma) > 0


@pytest.mark.parametrize("gamma", [1, 2, 5, 8, 64, 1000])
def test_exact_values_fall(gamma: int) -> None:
    """spec 5.7: exact Δ falls with d, Δ⁺ ≤ Δ⁻ from d = 1, and Δ⁺(0) doubles."""
    plus, minus = tables.delta_plus(gamma), tables.delta_minus(gamma)
    assert plus[0] == gamma
    assert (np.diff(plus) <= 0).all()
    assert (np.diff(minus[1:]) <= 0).all()
    assert len(minus) >= len(plus) - 1
    shared = min(len(plus), len(minus))
    assert (minus[1:shared] >= plus[1:shared]).all()


def test_methods_that_become_exact() -> None:
    """Enough entries of step 1, or segments of width 1, store the exact values themselves."""
    for gamma in (1, 8, 30):
        exact = methods.Exact().tables(gamma)
        for how in (
            methods.Table(4096, 1, "left"),
            methods.Table(4096, 1, "middle"),
            methods.Interpolated(4096, "equal", 1),
            methods.Interpolated(4096, "octave", 1),
            methods.Cotransform(20),
            methods.Polynomial(1, 4096, "equal", 30),
        ):
            made = how.tables(gamma)
            assert made.plus.tolist() == exact.plus.tolist(), how
            assert made.minus[1:].tolist() == exact.minus[1:].tolist(), how


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: methods.Table(0), BadValueError, "entries must be from 1 to 65536, not 0"),
        (lambda: methods.Table(1 << 17), BadValueError, "entries must be from 1"),
        (lambda: methods.Table(True), BadTypeError, "entries must be an integer"),
        (lambda: methods.Table(4, 3), BadValueError, "step must be a power of two from 1 to 16777216, not 3"),
        (lambda: methods.Table(4, 0), BadValueError, "step must be from 1"),
        (lambda: methods.Table(4, 4, "midle"), UnknownNameError, "sample 'midle'; did you mean 'middle'"),
        (lambda: methods.Interpolated(3), BadValueError, "segments must be a power of two from 1 to 4096, not 3"),
        (lambda: methods.Interpolated(8192), BadValueError, "segments must be from 1 to 4096"),
        (lambda: methods.Interpolated(4, "octaves"), UnknownNameError, "spacing 'octaves'; did you mean 'octave'"),
        (lambda: methods.Interpolated(4, "equal", 0), BadValueError, "slope_bits must be from 1 to 24, not 0"),
        (lambda: methods.Interpolated(4, "equal", 25), BadValueError, "slope_bits must be from 1 to 24, not 25"),
        (lambda: methods.Cotransform(0), BadValueError, "split must be from 1 to 20, not 0"),
        (lambda: methods.Cotransform(21), BadValueError, "split must be from 1 to 20, not 21"),
        (lambda: methods.Polynomial(0), BadValueError, "degree must be from 1 to 6, not 0"),
        (lambda: methods.Polynomial(7), BadValueError, "degree must be from 1 to 6, not 7"),
        (lambda: methods.Polynomial(2, 5), BadValueError, "segments must be a power of two"),
        (lambda: methods.Polynomial(2, 4, "octave", 31), BadValueError, "width must be from 0 to 30, not 31"),
        (lambda: methods.Polynomial(2, 4, "octave", 8.0), BadTypeError, "width must be an integer"),  # type: ignore[arg-type]
        (lambda: methods.Cordic(0), BadValueError, "iterations must be from 1 to 48, not 0"),
        (lambda: methods.Cordic(49), BadValueError, "iterations must be from 1 to 48, not 49"),
        (lambda: methods.Cordic(8, 3), BadValueError, "width must be from 4 to 48, not 3"),
    ],
)
def test_parameters_are_checked(make: Any, error: type[LNSError], message: str) -> None:
    """Every bad field is named with its allowed range."""
    with pytest.raises(error, match=message):
        make()


def test_the_largest_gamma_is_checked() -> None:
    check_gamma(1 << 17)
    with pytest.raises(BadValueError, match="at most 131072, not 131073"):
        check_gamma((1 << 17) + 1)


# ---------------------------------------------------------------------------------------------------------------------
# The 8-bit adder: all 65,536 pairs


def _pairs() -> tuple[Array, Array]:
    words = np.arange(256, dtype=np.uint8)
    x, y = np.meshgrid(words, words, indexing="ij")
    return x.reshape(-1), y.reshape(-1)


def test_the_oracles_two_adders_agree() -> None:
    """spec 5.2, 5.3: the oracle's array formulation is its scalar one, for methods of every shape of Δ."""
    x, y = _pairs()
    for how in (methods.Exact(), methods.Table(8, 4), methods.Shift(), methods.Max(), methods.Mitchell()):
        plus, minus = _oracle_lists(to_method(how), 8, 128)
        fast = oracle.add_pairs(x, y, 7, plus, minus)
        part = oracle.Log(7, delta=to_method(how))
        for i in range(0, x.size, 7):
            sign, code = oracle.log_add(oracle.log_word(x[i], 7), oracle.log_word(y[i], 7), 8, part)
            assert fast[i] == sign * 128 + code


@pytest.mark.parametrize("gamma", [1, 4, 8, 10])
@pytest.mark.parametrize("how", DELTAS, ids=delta_name)
def test_all_pairs_of_the_8_bit_adder(how: Delta, gamma: int) -> None:
    """spec 5.2, 5.3, 6.4: all 65,536 pairs of words, minus zeros included, by every method."""
    x, y = _pairs()
    fmt = LNSFormat(8, gamma)
    plus, minus = _oracle_lists(to_method(how), gamma, 128)
    plan = AddPlan(LogAccumulator(bits=7, delta=how), fmt, fmt, fmt, 0, 0, 0, 0)
    np.testing.assert_array_equal(reference.add(x, y, plan), oracle.add_pairs(x, y, 7, plus, minus))


@pytest.mark.parametrize("guard_bits", [1, 3])
@pytest.mark.parametrize("how", [methods.Exact(), methods.Cotransform(3), methods.Table(20, 4)], ids=delta_name)
def test_all_pairs_with_guard_bits(how: Delta, guard_bits: int) -> None:
    """spec 5.1, 5.6, 6.4: entry shifts left, output rounds half up, for all pairs of words."""
    x, y = _pairs()
    fmt = LNSFormat(8, 8)
    bits = 8 + guard_bits
    plan = AddPlan(LogAccumulator(bits, guard_bits, delta=how), fmt, fmt, fmt, 0, 0, 0, 0)
    plus, minus = _oracle_lists(to_method(how), 8 << guard_bits, 128 << guard_bits)

    def entered(words: Array) -> Array:
        return (words.astype(np.int64) >> 7 << bits) + ((words.astype(np.int64) & 127) << guard_bits)

    total = oracle.add_pairs(entered(x), entered(y), bits, plus, minus)
    code = ((total % 2**bits) + 2 ** (guard_bits - 1)) >> guard_bits
    want = np.where(code == 0, 0, (total >> bits << 7) + np.minimum(code, 127))
    np.testing.assert_array_equal(reference.add(x, y, plan), want)


@pytest.mark.parametrize("how", [methods.Exact(), methods.Shift(), methods.Cordic(8, 12)], ids=delta_name)
def test_addition_commutes_and_negates(how: Delta) -> None:
    """spec 5.2: neither the order of the operands nor their common sign matters."""
    x, y = _pairs()
    fmt = LNSFormat(8, 8)
    plan = AddPlan(LogAccumulator(bits=7, delta=how), fmt, fmt, fmt, 0, 0, 0, 0)
    forward = reference.add(x, y, plan)
    np.testing.assert_array_equal(forward, reference.add(y, x, plan))
    negated = reference.add(reference.negate(x, fmt), reference.negate(y, fmt), plan)
    np.testing.assert_array_equal(reference.negate(forward, fmt), negated)


@pytest.mark.smoke
def test_methods_are_data() -> None:
    """Frozen dataclasses that compare by their fields: what the fingerprint and the cache rely on."""
    assert methods.Table(20, 4) == methods.Table(20, 4)
    assert hash(methods.Table(20, 4)) == hash(methods.Table(20, 4))
    assert methods.Table(20, 4) != methods.Table(20, 4, "middle")
    with pytest.raises(dataclasses.FrozenInstanceError):
        methods.Table(20, 4).step = 8  # type: ignore[misc]
