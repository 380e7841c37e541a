"""The errors that docs/accuracy.md states: measured over every argument, within their bounds, and up to date."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import mpmath
import numpy as np
import pytest
from click.testing import CliRunner

from lnsdeploy import delta as methods
from lnsdeploy.datapath import LinearAccumulator, LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.delta import METHODS
from lnsdeploy.errors import BadFileError
from lnsdeploy.studies import bounds

ROOT = Path(__file__).resolve().parent.parent
ACCURACY = ROOT / "docs" / "accuracy.md"


@cache
def _measured() -> dict[str, list[Any]]:
    return bounds.measure()


def test_the_document_is_up_to_date() -> None:
    """Where this fails on purpose: python -m lnsdeploy.studies.bounds --update docs/accuracy.md."""
    text = ACCURACY.read_text(encoding="utf-8")
    assert bounds.updated(text, bounds.markdown(_measured()), where="accuracy.md") == text
    assert "python -m lnsdeploy.studies.bounds" in text


def test_every_method_and_every_named_datapath_is_measured() -> None:
    """spec 5.7, 4.1, 4.6: all methods at each width, and whatever the named datapaths use."""
    adders = bounds.adders()
    for gamma in (8, 64, 128, 1024):
        assert {how.kind for how, g in adders if g == gamma} == set(METHODS)
    for name in named_datapaths():
        datapath = load_datapath(name)
        for part in (datapath.accumulate, datapath.add):
            if isinstance(part, LogAccumulator):
                assert (part.delta, datapath.gamma << part.guard_bits) in adders
            else:
                assert (datapath.gamma, part.table_bits, part.constant_bits) in bounds.remainders()
                assert (datapath.gamma, part.encoder, part.encoder_bits) in bounds.encoders()
    named = {
        name for row in [r for rows in _measured().values() for r in rows] for name in row.used_by.split(", ") if name
    }
    assert named == set(named_datapaths())
    for gamma in (8, 64, 1024):
        assert {t for g, t, _ in bounds.remainders() if g == gamma} == set(range(gamma.bit_length()))
        assert {e for g, e, _ in bounds.encoders() if g == gamma} == {"exact", "table", "mitchell"}


def test_measured_errors_are_within_their_bounds() -> None:
    """spec 5.7, 4.1, 4.6: no figure exceeds what its definition allows."""
    slack = 1 + 1e-12
    for row in _measured()["adders"]:
        for largest, mean, bound in (
            (row.plus_largest, row.plus_mean, row.plus_bound),
            (row.minus_largest, row.minus_mean, row.minus_bound),
        ):
            assert 0 <= mean <= largest
            if bound is None:
                assert row.method in ("cordic", "polynomial")
            else:
                assert largest <= bound * slack, row
    for row in _measured()["remainders"] + _measured()["encoders"]:
        assert 0 <= row.mean <= row.largest <= row.bound * slack, row


@pytest.mark.parametrize("gamma", [1, 2, 3, 7, 8, 10, 32, 100, 500])
def test_bounds_hold_for_other_parameters(gamma: int) -> None:
    """spec 5.7: the derivations are general, not fitted to the rows of the table."""
    tried: list[methods.Delta] = [methods.Exact(), methods.Mitchell(), methods.Shift(), methods.Max()]
    for sample in ("left", "middle"):
        tried += [methods.Table(n, s, sample) for n in (1, 2, 3, 20, 500) for s in (1, 2, 4, 16, 64)]
    for spacing in ("equal", "octave"):
        tried += [methods.Interpolated(n, spacing, p) for n in (1, 2, 8, 64) for p in (1, 4, 20)]
        tried += [methods.Polynomial(n, k, spacing, w) for n in (1, 2, 4) for k in (1, 4, 32) for w in (0, 4, 20)]
    tried += [methods.Cotransform(j) for j in (1, 2, 3, 5, 8)]
    for how in tried:
        row = bounds.measure_adder(how, gamma)
        for largest, bound in ((row.plus_largest, row.plus_bound), (row.minus_largest, row.minus_bound)):
            assert bound is None or largest <= bound * (1 + 1e-12), (how, largest, bound)


def test_bounds_are_near_what_is_measured() -> None:
    """A bound that says nothing would pass too: these are attained to within a code, or by an eighth."""
    for row in _measured()["adders"]:
        if row.gamma_acc < 1024 or row.method == "interpolated":
            continue
        for largest, bound in ((row.plus_largest, row.plus_bound), (row.minus_largest, row.minus_bound)):
            if bound is not None:
                assert largest >= bound - 1.5 or largest >= 0.875 * bound, row
    for row in _measured()["encoders"]:
        assert row.largest >= 0.8 * row.bound, row


def test_the_real_functions_are_accurate() -> None:
    """float64 serves the figures: spot checks against 40 digits."""
    with mpmath.workdps(40):
        for gamma in (1, 8, 100, 1024):
            for d in (0, 1, 2, 7, gamma // 2, gamma, 3 * gamma + 1, 10 * gamma):
                power = mpmath.power(2, mpmath.mpf(-d) / gamma)
                plus = gamma * mpmath.log(1 + power, 2)
                assert abs(bounds.real_plus(d, gamma) - plus) < 1e-11 * (1 + plus)
                if d:
                    minus = -gamma * mpmath.log(1 - power, 2)
                    assert abs(bounds.real_minus(d, gamma) - minus) < 1e-11 * (1 + minus)


def test_figures_by_mpmath() -> None:
    """spec 5.7.6, 5.7.9, 4.1, 4.6: some figures of the tables, computed from scratch."""
    with mpmath.workdps(30):
        log2e = 1 / mpmath.log(2)
        shift = bounds.measure_adder(methods.Shift(), 8)
        K = int(mpmath.nint(8 * log2e))
        errors = [abs((K >> d // 8) - 8 * mpmath.log(1 + mpmath.power(2, mpmath.mpf(-d) / 8), 2)) for d in range(40)]
        assert shift.plus_largest == pytest.approx(float(max(errors)), rel=1e-12)
        nothing = bounds.measure_adder(methods.Max(), 8)
        assert nothing.minus_largest == pytest.approx(
            float(-8 * mpmath.log(1 - mpmath.power(2, -mpmath.mpf(1) / 8), 2))
        )
        row = bounds.measure_remainder(8, 0, 8)
        errors = [abs(8 * mpmath.log(1 + mpmath.mpf(r) / 8, 2) - r) for r in range(8)]
        assert row.largest == pytest.approx(float(max(errors)), rel=1e-12)
        assert row.mean == pytest.approx(float(sum(errors) / 8), rel=1e-12)
        encoder = bounds.measure_encoder(8, "mitchell", None)
        worst = max(
            abs(8 * (a.bit_length() - 1) + (a * 8 >> (a.bit_length() - 1)) % 8 - 8 * mpmath.log(a, 2))
            for a in range(1, 4096)
        )
        assert float(worst) <= encoder.largest <= float(worst) + 0.01
    assert LinearAccumulator().encoder == "exact"


def test_logistic_peaks() -> None:
    """The largest derivatives of the logistic function, known in closed form or to many digits."""
    for order, peak in ((1, 0.25), (2, 1 / (6 * 3**0.5)), (3, 0.125)):
        assert bounds._logistic_peak(order) == pytest.approx(peak, rel=1e-9)


def test_printed_bounds_are_rounded_up() -> None:
    for value in (0.5, 1.9031, 14.712, 234.05, 0.7004999, 9.9999):
        assert float(bounds._upper(value)) >= value - 1e-9
    assert bounds._upper(0.5) == "0.500"
    assert bounds._upper(1.9031) == "1.904"
    assert bounds._upper(None) == bounds._number(None) == "–"


def test_the_command(tmp_path: Path) -> None:
    """`--json` prints one object, the default the tables; `--update` writes between markers and nowhere else."""
    runner = CliRunner()
    printed = runner.invoke(bounds.main, ["--json"])
    assert printed.exit_code == 0
    data = json.loads(printed.stdout)
    assert set(data) == {"adders", "remainders", "encoders"}
    assert data["adders"][0] == dataclasses.asdict(_measured()["adders"][0])
    assert all(np.isfinite(row["largest"]) for row in data["remainders"])
    tables = bounds.markdown(_measured())
    assert runner.invoke(bounds.main, ["--markdown"]).stdout == tables
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bounds.BEGIN}\nold\n{bounds.END}\nafter\n", encoding="utf-8")
    assert runner.invoke(bounds.main, ["--update", str(page)]).exit_code == 0
    assert page.read_text(encoding="utf-8") == f"before\n{bounds.BEGIN}\n\n{tables}\n{bounds.END}\nafter\n"
    with pytest.raises(BadFileError, match=r"p\.md: the markers .* are missing"):
        bounds.updated("no markers", tables, where="p.md")


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    """Exit status 2, one line on standard error."""
    page = tmp_path / "page.md"
    page.write_text("no markers", encoding="utf-8")
    command = [sys.executable, "-m", "lnsdeploy.studies.bounds", "--update", str(page)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1
    assert page.read_text(encoding="utf-8") == "no markers"
