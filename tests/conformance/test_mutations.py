"""The suite can fail: a wrong entry in any table of any stage is seen by that stage's comparison (spec 4.1, 4.6, 5.7).

Each test runs a comparison of `stages.py` with right tables, changes one entry, and expects a difference; for
every entry in turn.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lnsdeploy import delta as delta_module
from lnsdeploy import tables
from lnsdeploy.datapath import LinearAccumulator
from lnsdeploy.delta import DeltaTables
from lnsdeploy.emulator import reference
from lnsdeploy.formats import LNSFormat, decode, encode
from tests import oracle
from tests.cases import to_format
from tests.conformance import stages

Array = np.ndarray[Any, Any]


def _changed(table: Array, index: int, by: int) -> Array:
    copy = table.copy()
    copy[index] = int(copy[index]) + by
    return copy


def _differs(compare: Callable[[], stages.Pair]) -> bool:
    got, want = compare()
    return not np.array_equal(got, want)


def _every_entry_matters(
    monkeypatch: pytest.MonkeyPatch,
    maker: str,
    size: int,
    by: int,
    compare: Callable[[], stages.Pair],
    only: Callable[..., bool] = lambda *_: True,
) -> None:
    original = getattr(tables, maker)
    assert not _differs(compare)
    for index in range(size):
        for change in (by, -by):

            def wrong(*arguments: Any, index: int = index, change: int = change) -> Array:
                table = original(*arguments)
                return _changed(table, index, change) if only(*arguments) else table

            with monkeypatch.context() as patch:
                patch.setattr(tables, maker, wrong)
                assert _differs(compare), f"{maker}[{index}] changed by {change} goes unseen"
    assert not _differs(compare)


@pytest.mark.parametrize("conversion", ["product", "bin"])
@pytest.mark.parametrize("table_bits", [0, 1, 3])
def test_remainder_constants(monkeypatch: pytest.MonkeyPatch, conversion: str, table_bits: int) -> None:
    """spec 4.1, 4.2: every constant, by one unit, whether it is applied to products or to bins."""
    part = LinearAccumulator(bits=45, conversion=conversion, table_bits=table_bits, constant_bits=8)
    # a single bin's constant scales everything alike, so nothing cancels by it: the bounds of the encoder see it
    stage = stages.linear_encoder if (conversion, table_bits) == ("bin", 0) else stages.linear_terms
    _every_entry_matters(monkeypatch, "remainder_constants", 1 << table_bits, 1, lambda: stage(reference, part))


@pytest.mark.parametrize("encoder_bits", [1, 5])
def test_log_table(monkeypatch: pytest.MonkeyPatch, encoder_bits: int) -> None:
    """spec 4.6: every entry of the table encoder, by one code."""
    part = LinearAccumulator(bits=24, constant_bits=0, encoder="table", encoder_bits=encoder_bits)
    _every_entry_matters(monkeypatch, "log_table", 1 << encoder_bits, 1, lambda: stages.linear_encoder(reference, part))


@pytest.mark.parametrize("gamma", [1, 2, 8])
def test_thresholds_of_the_exact_encoder(monkeypatch: pytest.MonkeyPatch, gamma: int) -> None:
    """spec 4.6: every threshold, by the least amount that a 62-bit accumulator can see."""
    part = LinearAccumulator(bits=62, constant_bits=0)
    _every_entry_matters(
        monkeypatch, "octave_thresholds", gamma, 4, lambda: stages.linear_encoder(reference, part, gamma)
    )


@pytest.mark.parametrize("stage", [stages.log_adder, stages.add_adder])
@pytest.mark.parametrize(
    "how",
    [delta_module.Exact(), delta_module.Table(16, 4, "middle"), delta_module.Cordic(8, 12)],
    ids=lambda how: how.kind,
)
def test_delta_tables(monkeypatch: pytest.MonkeyPatch, how: delta_module.Delta, stage: Any) -> None:
    """spec 5.2, 5.7: every entry of Δ⁺ and Δ⁻ that the adder can reach, by one unit, in products and in additions."""
    made = how.tables(8)
    assert not _differs(lambda: stage(reference, how))
    wrong = [DeltaTables(_changed(made.plus, d, 1), made.minus) for d in range(min(len(made.plus), 126))]
    wrong += [DeltaTables(made.plus, _changed(made.minus, d, 1)) for d in range(1, min(len(made.minus), 126))]
    assert len(wrong) > 60
    for tables_ in wrong:
        with monkeypatch.context() as patch:
            patch.setattr(delta_module.Delta, "tables", lambda *_, t=tables_: t)
            assert _differs(lambda: stage(reference, how))


def test_logarithms_of_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """spec 6.5: the logarithm of every count, by the accumulator's unit times its guard bits."""
    original = tables.rounded_log2
    assert not _differs(lambda: stages.average_counts(reference))
    for n in range(1, 13):
        with monkeypatch.context() as patch:
            patch.setattr(tables, "rounded_log2", lambda v, s, n=n: original(v, s) + (4 if v == n else 0))
            assert _differs(lambda: stages.average_counts(reference)), n


# ---------------------------------------------------------------------------------------------------------------------
# Encode and decode keep what they make of a table: their caches are emptied around each change

_CACHES = ("_buckets", "_absolute", "_word_table")


def _clear() -> None:
    from lnsdeploy import formats

    for name in _CACHES:
        getattr(formats, name).cache_clear()


def _boundaries(gamma: int, kind: str) -> tuple[Array, list[int]]:
    """float64 numbers on both sides of every bound of one octave, and their codes by the oracle."""
    fmt, rounding = LNSFormat(12, gamma), "nearest" if kind == "nearest" else "linear"
    points = []
    for i in range(gamma):
        with oracle.MP.workprec(200):
            low, high = (oracle.MP.power(2, oracle.MP.mpf(i + j) / gamma) for j in (0, 1))
            bound = oracle.MP.sqrt(low * high) if kind == "nearest" else (low + high) / 2
            # mpmath rounds to the nearest float, which may stand on either side
            near = float(bound)
        points += [np.nextafter(near, 0), near, np.nextafter(near, 9)]
    x = np.array(points)
    return x, [oracle.encode(float(v), to_format(fmt), -500, rounding=rounding) for v in x]


@pytest.mark.parametrize("kind", ["nearest", "linear"])
@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_thresholds_of_encode(monkeypatch: pytest.MonkeyPatch, gamma: int, kind: str) -> None:
    """spec 2.1, 2.2: every threshold of an octave, by one unit in the last place of a float64."""
    x, want = _boundaries(gamma, kind)
    rounding: Any = "nearest" if kind == "nearest" else "linear"

    def compare() -> stages.Pair:
        _clear()
        return encode(x, LNSFormat(12, gamma), -500, rounding=rounding), np.array(want)

    try:
        _every_entry_matters(
            monkeypatch, "octave_thresholds", gamma, 1, compare, lambda g, bits, k: bits == 52 and k == kind
        )
    finally:
        _clear()


@pytest.mark.parametrize("gamma", [1, 3, 8])
def test_significands_of_decode(monkeypatch: pytest.MonkeyPatch, gamma: int) -> None:
    """spec 2.5: every significand, by one unit in the last place of a float32."""
    fmt = LNSFormat(8, gamma)
    words = np.arange(256, dtype=np.uint8)
    want = np.array([oracle.decode(int(w), to_format(fmt), -64) for w in words], dtype=np.float32)

    def compare() -> stages.Pair:
        _clear()
        return decode(words, fmt, -64), want

    try:
        _every_entry_matters(monkeypatch, "octave_significands", gamma, 1, compare)
    finally:
        _clear()
