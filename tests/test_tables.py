"""Every table entry of every named datapath, and tables in general, against mpmath (spec 9.1).

The expected values are written out here from the formulas of spec 4.1, 4.6 and 5.7, not taken from the
oracle: an entry is correctly rounded when it is less than half a unit from the real number (no ties exist).
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction
from typing import Any

import mpmath
import numpy as np
import pytest

from lnsdeploy import tables
from lnsdeploy.datapath import LinearAccumulator, LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.delta import Exact, Max, Shift, Table
from lnsdeploy.errors import LNSError

mpf = mpmath.mpf


def _rounded(entries: Any, real: Callable[[int], Any]) -> None:
    """Entry i is the integer nearest to real(i), for every i."""
    with mpmath.workdps(50):
        for i, entry in enumerate(entries):
            assert abs(int(entry) - real(i)) < 0.5, (
                f"entry {i} is {int(entry)}, the real number {mpmath.nstr(real(i), 12)}"
            )


def _plus(G: int, d: int) -> Any:
    return G * mpmath.log(1 + mpmath.power(2, mpf(-d) / G), 2)


def _minus(G: int, d: int) -> Any:
    return -G * mpmath.log(1 - mpmath.power(2, mpf(-d) / G), 2)


def _ends(entries: Any, real: Callable[[int], Any]) -> None:
    """The table stops at the first d whose value rounds to zero: none is missing and none superfluous."""
    with mpmath.workdps(50):
        assert int(entries[-1]) >= 1
        assert real(len(entries)) < 0.5


def _check_exact_delta(plus: Any, minus: Any, G: int) -> None:
    _rounded(plus, lambda d: _plus(G, d))
    _ends(plus, lambda d: _plus(G, d))
    _rounded(minus[1:], lambda i: _minus(G, i + 1))
    if len(minus) > 1:
        _ends(minus, lambda d: _minus(G, d))


def _check_delta(plus: Any, minus: Any, part: LogAccumulator, gamma: int) -> None:
    """spec 5.7.1, 5.7.2, 5.7.6, 5.7.9: the methods of the named datapaths."""
    G, how = gamma << part.guard_bits, part.delta
    if isinstance(how, Exact):
        _check_exact_delta(plus, minus, G)
    elif isinstance(how, Max):
        assert len(plus) == len(minus) == 0
    elif isinstance(how, Shift):
        with mpmath.workdps(50):
            constant = int(mpmath.nint(G / mpmath.log(2)))
        for made in (plus, minus):
            assert [int(v) for v in made] == [constant >> (d // G) for d in range(len(made))]
            assert constant >> (len(made) // G) == 0
    elif isinstance(how, Table):
        assert how.sample == "left"
        for made, real, first in ((plus, _plus, 0), (minus, _minus, 1)):
            starts = [max(i * how.step, first) for i in range(how.entries)]
            used = min(how.entries, -(-len(made) // how.step))
            _rounded(made[:: how.step], lambda i: real(G, starts[i]))  # noqa: B023
            assert [int(v) for v in made] == [int(made[d // how.step * how.step]) for d in range(len(made))]
            with mpmath.workdps(50):
                assert used == how.entries or real(G, starts[used]) < 0.5
    else:  # a new named datapath with another method needs its formula here
        raise AssertionError(f"no formula for the tables of {how}")


@pytest.mark.parametrize("name", named_datapaths())
def test_every_entry_of_every_named_datapath(name: str) -> None:
    """spec 4.1, 4.6, 5.7, 9.1: all tables that the fingerprint covers, entry by entry."""
    datapath = load_datapath(name)
    made = datapath.tables()
    checked = set()
    part = datapath.accumulate
    if isinstance(part, LinearAccumulator):
        t, m, gamma = part.table_bits, part.constant_bits, datapath.gamma
        assert len(made["constants"]) == 2**t
        _rounded(made["constants"], lambda i: mpmath.power(2, m + mpf(i) / 2**t))
        checked.add("constants")
        if part.encoder == "table":
            n = part.encoder_bits
            assert n is not None
            assert len(made["encoder"]) == 2**n
            _rounded(made["encoder"], lambda j: gamma * mpmath.log(1 + (j + mpf(1) / 2) / 2**n, 2))
            checked.add("encoder")
    else:
        _check_delta(made["delta_plus"], made["delta_minus"], part, datapath.gamma)
        checked |= {"delta_plus", "delta_minus"}
    _check_delta(made["add.delta_plus"], made["add.delta_minus"], datapath.add, datapath.gamma)
    checked |= {"add.delta_plus", "add.delta_minus"}
    assert checked == set(made)


@pytest.mark.parametrize("gamma", [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 16, 31, 32, 33, 64, 100, 128, 255, 256, 1000])
def test_exact_delta_of_any_gamma(gamma: int) -> None:
    """spec 5.7: Δ⁺ and Δ⁻ for every d up to where they vanish, and Δ⁺(0) = G exactly."""
    plus, minus = tables.delta_plus(gamma), tables.delta_minus(gamma)
    assert plus[0] == gamma
    _check_exact_delta(plus, minus, gamma)


@pytest.mark.parametrize("gamma", [1 << 14, 20_011])
def test_exact_delta_of_large_gamma(gamma: int) -> None:
    """spec 5.7 for large γ_acc: a sample of d, the ends, and monotony."""
    plus, minus = tables.delta_plus(gamma), tables.delta_minus(gamma)
    picks = np.unique(np.geomspace(1, len(plus) - 1, 150).astype(int))
    _rounded(plus[picks], lambda i: _plus(gamma, int(picks[i])))
    _rounded(minus[picks], lambda i: _minus(gamma, int(picks[i])))
    _ends(plus, lambda d: _plus(gamma, d))
    _ends(minus, lambda d: _minus(gamma, d))
    assert (np.diff(plus) <= 0).all()
    assert (np.diff(minus) <= 0).all()


@pytest.mark.parametrize("table_bits", range(0, 11))
def test_remainder_constants(table_bits: int) -> None:
    """spec 4.1 for every number of constant bits a datapath may have."""
    for constant_bits in range(0, 25, 1 if table_bits < 6 else 8):
        made = tables.remainder_constants(table_bits, constant_bits)
        assert made.dtype == np.int64
        assert len(made) == 2**table_bits
        _rounded(made, lambda i, m=constant_bits: mpmath.power(2, m + mpf(i) / 2**table_bits))


@pytest.mark.parametrize("gamma", [1, 2, 8, 64, 1024, 1 << 17])
def test_log_tables(gamma: int) -> None:
    """spec 4.6: the encoder's tables."""
    for index_bits in (1, 2, 5, 8):
        made = tables.log_table(gamma, index_bits)
        assert len(made) == 2**index_bits
        _rounded(made, lambda j, n=index_bits: gamma * mpmath.log(1 + (j + mpf(1) / 2) / 2**n, 2))


@pytest.mark.smoke
@pytest.mark.parametrize("bits", [23, 52, 62])
@pytest.mark.parametrize("gamma", [1, 2, 3, 8, 10, 256, 1000])
def test_octave_thresholds(gamma: int, bits: int) -> None:
    """spec 2.1, 2.2: each threshold is the smallest integer that is not below the irrational bound."""
    with mpmath.workdps(60):
        reals: dict[str, list[Any]] = {
            "nearest": [mpmath.power(2, (mpf(i) + mpf(1) / 2) / gamma) for i in range(gamma)],
            "linear": [
                (mpmath.power(2, mpf(i) / gamma) + mpmath.power(2, mpf(i + 1) / gamma)) / 2 for i in range(gamma)
            ],
            "floor": [mpmath.power(2, mpf(i + 1) / gamma) for i in range(gamma)],
        }
        for kind, bounds in reals.items():
            made = tables.octave_thresholds(gamma, bits, kind)
            assert made.dtype == np.uint64
            assert len(made) == gamma
            for entry, bound in zip(made, bounds, strict=True):
                exact = bound * 2**bits
                assert int(entry) >= exact - mpf(10) ** -30, (kind, entry)
                assert int(entry) - 1 < exact, (kind, entry)


@pytest.mark.parametrize("bits", [0, 8, 23, 52])
@pytest.mark.parametrize("gamma", [1, 2, 3, 8, 10, 1000])
def test_octave_significands(gamma: int, bits: int) -> None:
    """spec 2.5: whole tables, and single entries by the other route."""
    made = tables.octave_significands(gamma, bits)
    _rounded(made, lambda i: mpmath.power(2, bits + mpf(i) / gamma))
    assert [tables.octave_significand(gamma, bits, i) for i in range(gamma)] == made.tolist()
    with mpmath.workdps(50):
        for i in range(0, gamma, max(gamma // 16, 1)):
            floor = int(mpmath.floor(mpmath.power(2, bits + mpf(i) / gamma)))
            assert tables.octave_significand(gamma, bits, i, floor=True) == floor


@pytest.mark.parametrize("scale", [1, 3, 8, 1024, 1 << 23])
def test_rational_logarithms(scale: int) -> None:
    """spec 2.6, 6.5: round and ceiling of γ·log2 of a rational, exact at powers of two and beside them."""
    values = [Fraction(n) for n in (1, 2, 3, 5, 7, 9, 49, 1000, 2**60 + 1, 2**60 - 1, 2**1000)]
    values += [1 / v for v in values] + [Fraction(2**1074 + 1, 2**2000), Fraction(3, 1024)]
    with mpmath.workdps(700):
        for value in values:
            real = scale * mpmath.log(mpf(value.numerator) / value.denominator, 2)
            assert abs(tables.rounded_log2(value, scale) - real) < 0.5
            ceiling = tables.ceil_log2(value, scale)
            assert ceiling >= real - mpf(10) ** -600
            assert ceiling - 1 < real - mpf(10) ** -600


def test_unknown_thresholds_are_refused() -> None:
    with pytest.raises(LNSError, match="no thresholds of kind 'ceiling'"):
        tables.octave_thresholds(8, 23, "ceiling")


@pytest.mark.parametrize(("table", "index"), [("delta_plus", 3), ("delta_minus", 5), ("remainder_constants", 2)])
def test_a_wrong_entry_is_found(table: str, index: int) -> None:
    """The checks above can fail: one entry off by one is reported with its index."""
    if table == "remainder_constants":
        made = tables.remainder_constants(3, 8).copy()
        made[index] += 1
        with pytest.raises(AssertionError, match=f"entry {index} is"):
            _rounded(made, lambda i: mpmath.power(2, 8 + mpf(i) / 8))
        return
    plus, minus = tables.delta_plus(8).copy(), tables.delta_minus(8).copy()
    (plus if table == "delta_plus" else minus)[index] -= 1
    with pytest.raises(AssertionError, match=r"entry \d is"):
        _check_exact_delta(plus, minus, 8)
    with pytest.raises(AssertionError):
        _check_exact_delta(tables.delta_plus(8)[:-1], tables.delta_minus(8), 8)
