"""How far each way to make Δ, and each converter, is from the real numbers: measured over every argument.

``python -m lnsdeploy.studies.bounds`` prints the table, ``--json`` one JSON object, ``--markdown`` the tables of
docs/accuracy.md, ``--update FILE`` writes them between that file's markers.

All errors are in units of the last place: for adders one code of the accumulator, 1/γ_acc octave, against the real
Δ⁺(d) = G·log2(1 + 2^(−d/G)) and Δ⁻(d) = −G·log2(1 − 2^(−d/G)) (spec 5.7); for converters one code of the words,
1/γ octave (spec 4.1, 4.6). Beside each measured figure stands a bound derived from the method's definition, where one
can be; its derivation is in the docstring of the function that gives it.
"""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from lnsdeploy import delta as methods
from lnsdeploy import tables
from lnsdeploy.datapath import LinearAccumulator, LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.delta import Delta, segments_of
from lnsdeploy.emulator.reference import raw_code
from lnsdeploy.errors import BadFileError, LNSError
from lnsdeploy.files import read_bytes, write_text

Floats = npt.NDArray[np.float64]

# The largest relative excess of Mitchell's approximation: log2(1 + x) − x at x = 1/ln 2 − 1.
_MITCHELL_LOG = math.log2(1 / math.log(2)) - (1 / math.log(2) - 1)
# Accumulator values up to here are encoded, each of them.
ENCODER_VALUES = 1 << 16
BEGIN, END = "<!-- bounds: begin -->", "<!-- bounds: end -->"


# ---------------------------------------------------------------------------------------------------
# The real functions


def real_plus(d: npt.ArrayLike, gamma: int) -> Floats:
    """Δ⁺ before rounding, in units of 1/γ; exact to a few units of float64."""
    result: Floats = gamma / math.log(2) * np.log1p(np.exp2(-np.asarray(d, dtype=np.float64) / gamma))
    return result


def real_minus(d: npt.ArrayLike, gamma: int) -> Floats:
    """Δ⁻ before rounding, for d > 0."""
    power = -np.expm1(-np.asarray(d, dtype=np.float64) * (math.log(2) / gamma))
    result: Floats = -gamma / math.log(2) * np.log(power)
    return result


def _real(sign: int, d: float, gamma: int) -> float:
    return float(real_plus(d, gamma) if sign > 0 else real_minus(max(d, 1), gamma))


# ---------------------------------------------------------------------------------------------------
# Adders


@dataclass(frozen=True)
class AdderRow:
    """One method at one γ_acc. Largest and mean absolute error of Δ⁺ and Δ⁻, and their bounds (None: none derived).

    The mean is over d from 0 (Δ⁻: from 1) to the last d at which the method or the exact table is not zero.
    """

    method: str
    parameters: str
    gamma_acc: int
    used_by: str
    entries: int
    plus_largest: float
    plus_mean: float
    plus_bound: float | None
    minus_largest: float
    minus_mean: float
    minus_bound: float | None


def adders() -> list[tuple[Delta, int]]:
    """The parametrisations of the tables: a set for each width of word, and those of the named datapaths."""
    found: list[tuple[Delta, int]] = []
    for gamma, split in ((8, 2), (64, 4), (128, 4), (1024, 6)):
        half = gamma // 2
        found += [(method, gamma) for method in _methods(half, split, gamma)]
    for _, part, gamma in _log_parts():
        found.append((part.delta, gamma << part.guard_bits))
    order = {kind: i for i, kind in enumerate(methods.METHODS)}
    return sorted(dict.fromkeys(found), key=lambda pair: (pair[1], order[pair[0].kind]))


def _methods(half: int, split: int, gamma: int) -> list[Delta]:
    fine = max(half // 4, 1)
    return [
        methods.Exact(),
        methods.Table(20, half, "left"),
        methods.Table(20, half, "middle"),
        methods.Table(80, fine, "left"),
        methods.Table(80, fine, "middle"),
        methods.Interpolated(4, "octave", 8),
        methods.Interpolated(16, "octave", 12),
        methods.Interpolated(64, "equal", 12),
        methods.Cotransform(split),
        methods.Mitchell(),
        methods.Shift(),
        methods.Polynomial(1, 4, "octave", 8),
        methods.Polynomial(2, 4, "octave", 8),
        methods.Polynomial(3, 16, "equal", 12),
        methods.Cordic(gamma.bit_length() + 4, gamma.bit_length() + 8),
        methods.Cordic(2 * gamma.bit_length() + 4, 2 * gamma.bit_length() + 8),
        methods.Max(),
    ]


def _log_parts() -> Iterator[tuple[str, LogAccumulator, int]]:
    """(datapath, log accumulator, γ) of every accumulator and adder of the named datapaths."""
    for name in named_datapaths():
        datapath = load_datapath(name)
        if isinstance(datapath.accumulate, LogAccumulator):
            yield name, datapath.accumulate, datapath.gamma
        yield name, datapath.add, datapath.gamma


def measure_adder(how: Delta, gamma: int) -> AdderRow:
    """The errors of one method over every d, and its bounds."""
    made, exact = how.tables(gamma), methods.Exact().tables(gamma)
    figures: dict[str, Any] = {}
    for name, sign, table, reference in (
        ("plus", 1, made.plus, exact.plus),
        ("minus", -1, made.minus, exact.minus),
    ):
        first = 0 if sign > 0 else 1
        count = max(len(table), len(reference), first + 1)
        d = np.arange(first, count)
        values = np.zeros(count)
        values[: len(table)] = table
        error = np.abs(values[first:] - (real_plus(d, gamma) if sign > 0 else real_minus(d, gamma)))
        bound = declared_bound(how, gamma, sign)
        figures |= {f"{name}_largest": float(error.max()), f"{name}_mean": float(error.mean()), f"{name}_bound": bound}
    used = [name for name, part, g in _log_parts() if (part.delta, g << part.guard_bits) == (how, gamma)]
    parameters = ", ".join(f"{f.name} {getattr(how, f.name)}" for f in dataclasses.fields(how))
    names = ", ".join(dict.fromkeys(used))
    return AdderRow(how.kind, parameters, gamma, names, how.table_entries(gamma), **figures)


def declared_bound(how: Delta, gamma: int, sign: int) -> float | None:
    """An upper bound of |Δ(d) − real Δ(d)| over all d, derived from the method's definition.

    Args:
        sign: +1 for Δ⁺, −1 for Δ⁻.
    Returns: the bound in codes; None where none is derived (CORDIC; a polynomial across Δ⁻'s singularity).
    """
    if isinstance(how, methods.Exact):
        return 0.5
    if isinstance(how, methods.Table):
        return _table_bound(how, gamma, sign)
    if isinstance(how, methods.Interpolated):
        return _interpolated_bound(how, gamma, sign)
    if isinstance(how, methods.Cotransform):
        return _cotransform_bound(sign)
    if isinstance(how, methods.Mitchell):
        return _mitchell_bound(gamma, sign)
    if isinstance(how, methods.Shift):
        return _shift_bound(gamma, sign)
    if isinstance(how, methods.Polynomial):
        return _polynomial_bound(how, gamma, sign)
    if isinstance(how, methods.Max):
        return _real(sign, 0, gamma)  # Δ falls with d, so the whole of its first value
    return None


def _table_bound(how: methods.Table, gamma: int, sign: int) -> float:
    """½ for the rounding of an entry, and the fall of Δ between a sample and the far edge of its step.

    Δ falls and is convex, so the steeper side is that before the sample, and no later step falls more than the first
    two (in Δ⁻'s first step d begins at 1, so the second is longer). Past the last entry the whole of Δ is lost.
    """
    step, first = how.step, 0 if sign > 0 else 1
    falls = [0.0]
    for i in range(min(how.entries, 2)):
        begin, end = max(i * step, first), (i + 1) * step - 1
        if begin > end:
            continue
        sample = max(i * step + (step // 2 if how.sample == "middle" else 0), first)
        at = _real(sign, sample, gamma)
        falls += [_real(sign, begin, gamma) - at, at - _real(sign, end, gamma)]
    return max(max(falls) + 0.5, _real(sign, how.entries * step, gamma))


def _interpolated_bound(how: methods.Interpolated, gamma: int, sign: int) -> float:
    """½ for the rounded ends, the chord's height above Δ, the slope's rounding, and 1 for the truncated product.

    The chord of a convex function stands at most w²/8 times its largest second derivative, that at the segment's
    start, above it, and never more than the function falls. Segments of width 1 hold a rounded value: ½.
    """
    c, end, worst = math.log(2) / gamma, _end(gamma, sign), 0.5
    for start, width in segments_of(end, how.segments, how.spacing):
        if width == 1:
            continue
        height = _real(sign, start, gamma) - _real(sign, start + width, gamma)
        if start or sign > 0:
            grown = math.exp(c * start)
            height = min(height, width**2 / 8 * c * grown / (grown + sign) ** 2)
        worst = max(worst, 1.5 + height + (width - 1) * 2.0 ** -(how.slope_bits + 1))
    return worst


def _cotransform_bound(sign: int) -> float:
    """Δ⁺ is exact: ½. Δ⁻: the errors of x and y, ½ each, enter with weights that add up to 1; then Δ⁺ adds ½."""
    return 0.5 if sign > 0 else 1.0


def _mitchell_bound(gamma: int, sign: int) -> float:
    """Mitchell's antilogarithm exceeds z = 2^(−d/G) by at most 0.043, log2(1 + z) exceeds z by at most 0.0861, and
    truncation takes less than 1.

    Δ⁻: −log2(1 − z) − z grows with z, so it is largest at d = 1, where z is 2^(−1/G).
    """
    if sign > 0:
        return gamma * _MITCHELL_LOG + 1
    return float(_real(-1, 1, gamma) - gamma * math.pow(2, -1 / gamma) + 1)


def _shift_bound(gamma: int, sign: int) -> float:
    """The method is constant within each octave of d and Δ falls, so the ends of the octaves decide."""
    constant = methods.scaled_log2_e(gamma)
    worst, q = 0.0, 0
    while True:
        first, last, value = max(q * gamma, 0 if sign > 0 else 1), (q + 1) * gamma - 1, constant >> q
        if first <= last:
            worst = max(worst, abs(value - _real(sign, first, gamma)), abs(value - _real(sign, last, gamma)))
        if value == 0:
            return worst
        q += 1


def _polynomial_bound(how: methods.Polynomial, gamma: int, sign: int) -> float | None:
    """Interpolation at n + 1 Chebyshev nodes, the coefficients' rounding, the truncations of Horner, and ½ at the end.

    Interpolation: M·w^(n+1)/((n + 1)!·2^(2n+1)), M being the largest (n + 1)-th derivative in the segment. With
    c = ln 2/G that of Δ⁻ is c^n·Σ k^n·e^(−kcd), largest at the segment's start. That of Δ⁺ is the same sum with
    alternating signs, so no larger; and c^n times a derivative of the logistic function, whose peak is known.
    Fixed point: (n + 1)/2 units of 2^−width for the coefficients and n for the truncations.
    """
    n, c, unit = how.degree, math.log(2) / gamma, 2.0**-how.width
    worst = 0.5 + unit / 2
    for start, width in segments_of(_end(gamma, sign), how.segments, how.spacing):
        if width == 1:
            continue
        if sign < 0 and start == 0:
            return None
        steepest = _polylogarithm(n, math.exp(-c * start)) if start else math.inf
        if sign > 0:
            steepest = min(steepest, _logistic_peak(n))
        interpolation = c**n * steepest * width ** (n + 1) / (math.factorial(n + 1) * 2 ** (2 * n + 1))
        worst = max(worst, 0.5 + interpolation + ((n + 1) / 2 + n) * unit)
    return worst


def _end(gamma: int, sign: int) -> int:
    made = methods.Exact().tables(gamma)
    return len(made.plus if sign > 0 else made.minus)


@cache
def _logistic_peak(order: int) -> float:
    """The largest |s^(order)| of s = 1/(1 + e^−x): s' = s − s², and each derivative is a polynomial in s."""
    derivative = np.polynomial.Polynomial([0, 1])
    rule = np.polynomial.Polynomial([0, 1, -1])
    for _ in range(order):
        derivative = derivative.deriv() * rule
    inside = derivative.deriv().roots()
    points = [complex(p).real for p in inside if abs(complex(p).imag) < 1e-9]
    return max(abs(float(derivative(p))) for p in points if 0 <= p <= 1)


def _polylogarithm(order: int, z: float) -> float:
    """Σ k^order·z^k, k ≥ 1: the operator z·d/dz applied `order` times to z/(1 − z)."""
    import mpmath

    return float(mpmath.polylog(-order, mpmath.mpf(z)).real)


# ---------------------------------------------------------------------------------------------------
# From words to integers: the remainder table


@dataclass(frozen=True)
class RemainderRow:
    """2^(r/γ) by a table of 2^t entries with m fraction bits and Mitchell's approximation, over every r (spec 4.1)."""

    gamma: int
    table_bits: int
    constant_bits: int
    used_by: str
    largest: float
    mean: float
    bound: float


def remainders() -> list[tuple[int, int, int]]:
    """(γ, t, m) of the tables."""
    found = [(8, t, m) for t in range(4) for m in (3, 5, 8)]
    found += [(64, t, m) for t in range(7) for m in (5, 8)]
    found += [(1024, t, m) for t in range(11) for m in (8, 16)]
    found += [(gamma, part.table_bits, part.constant_bits) for _, part, gamma in _linear_parts()]
    return sorted(dict.fromkeys(found))


def _linear_parts() -> Iterator[tuple[str, LinearAccumulator, int]]:
    for name in named_datapaths():
        datapath = load_datapath(name)
        if isinstance(datapath.accumulate, LinearAccumulator):
            yield name, datapath.accumulate, datapath.gamma


def measure_remainder(gamma: int, table_bits: int, constant_bits: int) -> RemainderRow:
    """The errors of one table over every remainder, and the bound of its two factors.

    Bound: a constant is at most ½ unit of 2^−m off a number of at least 1, which is −log2(1 − 2^−(m+1)) octaves or
    less, and exact where it is the only one; log2(1 + x) − x for x < 2^−t grows up to x = 0.4427.
    """
    f = gamma.bit_length() - 1
    low = f - table_bits
    r = np.arange(gamma)
    constants = tables.remainder_constants(table_bits, constant_bits)[r >> low].astype(np.float64)
    logarithm = np.log2(constants) - constant_bits
    if low:
        logarithm += np.log2(1 + (r & ((1 << low) - 1)) / gamma)
    error = np.abs(gamma * logarithm - r)
    x = min(2.0**-table_bits, 1 / math.log(2) - 1) if low else 0.0
    rounding = -math.log2(1 - 2.0 ** -(constant_bits + 1)) if table_bits else 0.0
    bound = gamma * (math.log2(1 + x) - x + rounding)
    key = (gamma, table_bits, constant_bits)
    used = [name for name, part, g in _linear_parts() if (g, part.table_bits, part.constant_bits) == key]
    return RemainderRow(*key, ", ".join(used), float(error.max()), float(error.mean()), bound)


# ---------------------------------------------------------------------------------------------------
# From integers to words: the encoder


@dataclass(frozen=True)
class EncoderRow:
    """γ·log2 A by an encoder, over every A from 1 to 2^16 (spec 4.6)."""

    gamma: int
    encoder: str
    encoder_bits: int | None
    used_by: str
    largest: float
    mean: float
    bound: float


def encoders() -> list[tuple[int, str, int | None]]:
    """(γ, encoder, n) of the tables."""
    found: list[tuple[int, str, int | None]] = []
    for gamma, sizes in ((8, (2, 3, 4, 5, 6)), (64, (5, 6, 7, 8)), (1024, (8, 10, 12))):
        found += [(gamma, "exact", None), *((gamma, "table", n) for n in sizes), (gamma, "mitchell", None)]
    found += [(gamma, part.encoder, part.encoder_bits) for _, part, gamma in _linear_parts()]
    return sorted(dict.fromkeys(found), key=lambda row: (row[0], row[1], row[2] or 0))


def measure_encoder(gamma: int, encoder: str, encoder_bits: int | None) -> EncoderRow:
    """The errors of one encoder over every sum up to 2^16, and its bound.

    Bound: ½ for the exact encoder; for a table ½ for the entry, and half of its first interval, the widest, in codes;
    Mitchell's bits are below the logarithm by at most 0.0861 octaves and the truncation of less than 1.
    """
    part = LinearAccumulator(bits=24, constant_bits=0, encoder=encoder, encoder_bits=encoder_bits)
    sums = np.arange(1, ENCODER_VALUES + 1, dtype=np.int64)
    error = np.abs(raw_code(sums, gamma, part) - gamma * np.log2(sums))
    if encoder == "exact":
        bound = 0.5
    elif encoder == "table":
        bound = 0.5 + gamma * math.log2(1 + 2.0 ** -(int(encoder_bits or 0) + 1))
    else:
        bound = gamma * _MITCHELL_LOG + 1 if gamma > 1 else 1.0
    key = (gamma, encoder, encoder_bits)
    used = [name for name, p, g in _linear_parts() if (g, p.encoder, p.encoder_bits) == key]
    return EncoderRow(*key, ", ".join(used), float(error.max()), float(error.mean()), bound)


# ---------------------------------------------------------------------------------------------------
# Output


def measure() -> dict[str, list[Any]]:
    """Every row of every table."""
    return {
        "adders": [measure_adder(how, gamma) for how, gamma in adders()],
        "remainders": [measure_remainder(*key) for key in remainders()],
        "encoders": [measure_encoder(*key) for key in encoders()],
    }


def _number(value: float | None) -> str:
    """Three decimals below ten, fewer above: the last digit shown is far above float64's."""
    if value is None:
        return "–"
    return f"{value:.3f}" if value < 10 else f"{value:.2f}" if value < 100 else f"{value:.1f}"


def _upper(value: float | None) -> str:
    """A bound, rounded up, so that what is printed still bounds."""
    if value is None:
        return "–"
    digits = 3 if value < 10 else 2 if value < 100 else 1
    return f"{math.ceil(round(value * 10**digits, 6)) / 10**digits:.{digits}f}"


def _figures(row: RemainderRow | EncoderRow) -> list[str]:
    return [_number(row.largest), _number(row.mean), _upper(row.bound)]


def _table(head: list[str], rows: list[list[str]], left: int) -> str:
    """A Markdown table whose first `left` columns are text."""
    rule = ["---"] * left + ["---:"] * (len(head) - left)
    return "\n".join("| " + " | ".join(row) + " |" for row in [head, rule, *rows])


def markdown(measured: dict[str, list[Any]]) -> str:
    """The tables of docs/accuracy.md."""
    parts = ["### Adders", ""]
    for gamma in dict.fromkeys(row.gamma_acc for row in measured["adders"]):
        rows = [
            [
                f"`{row.method}`" + (f" ({row.parameters})" if row.parameters else ""),
                row.used_by,
                str(row.entries),
                _number(row.plus_largest),
                _number(row.plus_mean),
                _upper(row.plus_bound),
                _number(row.minus_largest),
                _number(row.minus_mean),
                _upper(row.minus_bound),
            ]
            for row in measured["adders"]
            if row.gamma_acc == gamma
        ]
        head = ["Δ method", "used by", "stored words", "Δ⁺ largest", "mean", "bound", "Δ⁻ largest", "mean", "bound"]
        parts += [f"γ_acc = {gamma}", "", _table(head, rows, 2), ""]
    parts += ["### From words to integers: remainder tables", ""]
    rows = [
        [str(row.gamma), str(row.table_bits), str(row.constant_bits), row.used_by, *_figures(row)]
        for row in measured["remainders"]
    ]
    parts += [_table(["γ", "t", "m", "used by", "largest", "mean", "bound"], rows, 4), ""]
    parts += ["### From integers to words: encoders", ""]
    rows = [
        [
            str(row.gamma),
            f"`{row.encoder}`" + f"({row.encoder_bits})" * bool(row.encoder_bits),
            row.used_by,
            *_figures(row),
        ]
        for row in measured["encoders"]
    ]
    parts += [_table(["γ", "encoder", "used by", "largest", "mean", "bound"], rows, 3)]
    return "\n".join(parts) + "\n"


def updated(text: str, tables_text: str, *, where: str) -> str:
    """`text` with what stands between its markers replaced.

    Raises:
        BadFileError: the markers are missing.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise BadFileError(f"{where}: the markers {BEGIN} and {END} are missing")
    return f"{before}{BEGIN}\n\n{tables_text}\n{END}{after}"


def as_json(measured: dict[str, list[Any]]) -> str:
    """One JSON object with the rows of each table."""
    return json.dumps({name: [dataclasses.asdict(row) for row in rows] for name, rows in measured.items()}, indent=1)


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option("--json", "want_json", is_flag=True, help="Print one JSON object.")
@click.option("--markdown", "want_markdown", is_flag=True, help="Print the tables of docs/accuracy.md.")
@click.option("--update", type=click.Path(path_type=Path), help="Write the tables between a file's markers.")
def main(want_json: bool, want_markdown: bool, update: Path | None) -> None:
    """Measure the errors of every way to make Δ and of every converter, over all arguments.

    \b
    Example:
      python -m lnsdeploy.studies.bounds --json
    """
    measured = measure()
    if update is not None:
        text = read_bytes(update).decode("utf-8")
        write_text(update, updated(text, markdown(measured), where=str(update)))
    if want_json:
        click.echo(as_json(measured))
    elif want_markdown or update is None:
        click.echo(markdown(measured), nl=False)


if __name__ == "__main__":
    try:
        main()
    except LNSError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)
