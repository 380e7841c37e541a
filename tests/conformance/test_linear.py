"""Linear accumulation, stage by stage and as a whole, against the oracle (spec 3 and 4)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from lnsdeploy.datapath import LinearAccumulator
from tests.conformance import stages

BASE = LinearAccumulator(bits=30, conversion="product", table_bits=3, constant_bits=8, overflow="saturate")


@pytest.mark.parametrize("shift", ["truncate", "round"])
@pytest.mark.parametrize("lsb", [-12, 0, 3, 9, 40])
@pytest.mark.parametrize("table_bits", [0, 1, 2, 3])
@pytest.mark.parametrize("conversion", ["product", "bin"])
def test_terms(executor: Any, conversion: str, table_bits: int, lsb: int, shift: str) -> None:
    """spec 4.1, 4.2, 4.3: every product code, full and partial tables, both conversions, left and right shifts."""
    part = replace(BASE, conversion=conversion, table_bits=table_bits, shift=shift, bits=45)
    got, want = stages.linear_terms(executor, part, lsb=lsb)
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(("gamma", "table_bits"), [(1, 0), (2, 1), (4, 0), (64, 2), (64, 6), (128, 7)])
@pytest.mark.parametrize("constant_bits", [0, 3, 12])
def test_terms_of_other_gammas(executor: Any, gamma: int, table_bits: int, constant_bits: int) -> None:
    """spec 4.1, 4.2: from one code an octave to one octave a format."""
    for conversion in ("product", "bin"):
        bits = 62 if conversion == "product" else 40
        lsb = -12 if gamma > 4 else 10 if gamma == 1 else -2
        part = replace(
            BASE, conversion=conversion, table_bits=table_bits, constant_bits=constant_bits, bits=bits, shift="round"
        )
        got, want = stages.linear_terms(executor, part, gamma=gamma, lsb=lsb)
        np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("gamma", [1, 2, 8, 64])
@pytest.mark.parametrize("bits", [12, 24, 40, 62])
@pytest.mark.parametrize(
    ("encoder", "n"), [("exact", None), ("table", 1), ("table", 5), ("table", 9), ("mitchell", None)]
)
def test_encoders(executor: Any, encoder: str, n: int | None, bits: int, gamma: int) -> None:
    """spec 4.5, 4.6: all small sums, and either side of every bound of the largest octave."""
    part = LinearAccumulator(bits=bits, constant_bits=0, encoder=encoder, encoder_bits=n)
    got, want = stages.linear_encoder(executor, part, gamma)
    np.testing.assert_array_equal(got, want)


@pytest.mark.smoke
@pytest.mark.parametrize("encoder", ["exact", "mitchell"])
def test_encoders_of_bins(executor: Any, encoder: str) -> None:
    """spec 4.6: with bins the constants' fraction bits are part of the sum's weight."""
    part = LinearAccumulator(bits=20, conversion="bin", table_bits=2, constant_bits=6, encoder=encoder)
    got, want = stages.linear_encoder(executor, part)
    np.testing.assert_array_equal(got, want)
