"""The complete programme of comparisons: ``python -m lnsdeploy.rtl.check --all`` (docs/rtl.md).

Exhaustive at 6 and 8 bits, random and adversarial vectors above, every named datapath. An hour of a core; the tests run
a choice of it. What has passed is kept beside the simulations, by the hardware's text, the simulator, the reference's
text and the number of vectors: stopped by whatever, the same command goes on.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from lnsdeploy.cost.units import mac_of, with_lanes
from lnsdeploy.datapath import Datapath, LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.delta import (
    Cordic,
    Cotransform,
    Delta,
    Exact,
    Interpolated,
    Max,
    Mitchell,
    Polynomial,
    Shift,
    Table,
)
from lnsdeploy.emulator import reference
from lnsdeploy.emulator.plan import DotPlan
from lnsdeploy.files import read_bytes, write_text
from lnsdeploy.formats import LNSFormat
from lnsdeploy.rtl import designs, simulate, vectors
from lnsdeploy.rtl.designs import ArrayShape, Design, pack
from lnsdeploy.rtl.parameters import Ints, PEParameters, pe_parameters
from lnsdeploy.rtl.simulate import SimulationError
from lnsdeploy.rtl.vectors import Vectors

Bools = npt.NDArray[np.bool_]

WIDTHS = ((6, 4), (8, 8), (10, 32), (12, 128), (16, 1024))


def methods_for(gamma: int) -> list[Delta]:
    """One of each way to make Δ, and the further kinds of segments and samples."""
    step = max(gamma // 2, 1)
    step = 1 << (step.bit_length() - 1)
    return [
        Exact(),
        Table(20, step),
        Table(20, step, "middle"),
        Interpolated(8),
        Interpolated(8, "equal"),
        Cotransform(3),
        Mitchell(),
        Shift(),
        Polynomial(2, 4, "octave", 12),
        Polynomial(1, 8, "equal", 8),
        Cordic(12, 20),
        Max(),
    ]


@dataclass(frozen=True)
class Comparison:
    """A design, and vectors that are made when they are asked for.

    Args:
        design: the hardware.
        count: which of several sizes of the programme it is.
        vectors: made by the reference.
    """

    design: Design
    count: int
    vectors: Callable[[], Vectors]


def _pairs(fmt: LNSFormat, count: int) -> tuple[Ints, Ints]:
    """Operands: all pairs up to 8 bits, `count` above."""
    if fmt.bits <= 8:
        both = np.arange(1 << (2 * fmt.bits), dtype=np.int64)
        return both >> fmt.bits, both & ((1 << fmt.bits) - 1)
    random = np.random.default_rng(fmt.bits)
    x, y = (vectors.operands(fmt, (count,), seed).astype(np.int64) for seed in (1, 2))
    # close codes, where differences cancel
    return x, np.where(random.random(count) < 0.5, x ^ random.integers(0, 16, count), y)


def _floats(gamma: int, count: int) -> npt.NDArray[np.float32]:
    random = np.random.default_rng(gamma)
    pattern = random.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
    pattern[: count // 8] &= np.uint32(0x807FFFFF)  # subnormal numbers
    found = pattern.view(np.float32)
    return np.where(np.isnan(found), np.float32(np.inf), found).astype(np.float32)


def units(count: int) -> Iterator[Comparison]:
    """Multipliers, adders and encoders; all pairs up to 8 bits, `count` vectors above."""
    for bits, gamma in WIDTHS:
        fmt = LNSFormat(bits, gamma)
        yield from _units_of(fmt, count)
        yield Comparison(designs.float_encoder(fmt, "zero"), count, partial(_encoder_vectors, fmt, count))


def exhaustive_units(bits: int) -> Iterator[Comparison]:
    """The multiplier and the adders of one width of at most 8 bits, with the outputs of all pairs."""
    yield from _units_of(LNSFormat(bits, dict(WIDTHS)[bits]), 0)


def _units_of(fmt: LNSFormat, count: int) -> Iterator[Comparison]:
    yield Comparison(designs.multiplier(fmt, fmt), count, partial(_multiplier_vectors, fmt, count))
    for method in methods_for(fmt.gamma):
        accumulator = LogAccumulator(bits=fmt.bits - 1, delta=method)
        made = partial(_adder_vectors, accumulator, fmt, count)
        yield Comparison(designs.log_adder(accumulator, fmt.gamma), count, made)


def _multiplier_vectors(fmt: LNSFormat, count: int) -> Vectors:
    return vectors.multiplier_vectors(fmt, fmt, *_pairs(fmt, count))


def _adder_vectors(accumulator: LogAccumulator, fmt: LNSFormat, count: int) -> Vectors:
    return vectors.adder_vectors(accumulator, fmt.gamma, *_pairs(fmt, count))


def _encoder_vectors(fmt: LNSFormat, count: int) -> Vectors:
    return vectors.encoder_vectors(fmt, "zero", _floats(fmt.gamma, count), -fmt.gamma * 3)


def _accumulators(datapath: Datapath, count: int, exhaustive: bool) -> Ints:
    bits, bins = datapath.linear.bits, datapath.linear.bins
    if exhaustive and bins == 1 and bits <= 24:
        return np.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=np.int64)[:, None]
    random = np.random.default_rng(1)
    acc = random.integers(-(1 << (bits - 1)), 1 << (bits - 1), (count, bins))
    return acc >> random.integers(0, bits, (count, 1))


def converters(count: int, exhaustive: bool) -> Iterator[Comparison]:
    """Terms of every product, and words of every accumulator of 24 bits (or random ones where there are more)."""
    for name in named_datapaths():
        datapath = load_datapath(name)
        if not datapath.is_linear:
            continue
        pe, plan, _ = vectors.example(datapath, 1, 1, 16)
        yield Comparison(designs.linear_term(pe), count, partial(vectors.term_vectors, pe, plan))
        made = partial(_finish_vectors, pe, plan, count, exhaustive)
        yield Comparison(designs.linear_finish(pe), count, made)


def _finish_vectors(pe: PEParameters, plan: DotPlan, count: int, exhaustive: bool) -> Vectors:
    return vectors.finish_vectors(pe, plan, _accumulators(pe.datapath, count, exhaustive))


def macs(count: int) -> Iterator[Comparison]:
    """Scalar multiply-accumulates of every named datapath: the register before each of `count` products of one sum."""
    for name in named_datapaths():
        plan = vectors.example_plan(with_lanes(load_datapath(name), 1))
        pe = pe_parameters([(plan, 1)])
        yield Comparison(mac_of(pe), count, partial(_mac_vectors, pe, plan, count))


def _mac_vectors(pe: PEParameters, plan: DotPlan, count: int) -> Vectors:
    """Sums of products of words, as spec 4.1 to 4.4 and 5.1 to 5.3 have them, from zero on."""
    words = [vectors.operands(fmt, (count,), seed) for seed, fmt in enumerate((plan.activation, plan.weight))]
    (a_code, a_sign), (w_code, w_sign) = (
        fmt.split(x) for fmt, x in zip((plan.activation, plan.weight), words, strict=True)
    )
    code, zero = a_code.astype(np.int64) + w_code, (a_code == 0) | (w_code == 0)
    scale, v = int(pe.scales(plan, 1)[0]), pe.values
    inputs = [(np.ones(count), 1), (words[0], v["A_BITS"]), (words[1], v["W_BITS"])]
    packed = pack([*inputs, (np.full(count, scale), v["SCALE_BITS"])])
    sums = _linear_sums if plan.datapath.is_linear else _log_sums
    return Vectors(packed, sums(plan, code, zero, a_sign ^ w_sign, scale), count)


def _linear_sums(plan: DotPlan, code: Ints, zero: Bools, sign: Bools, scale: int) -> bytes:
    accumulator = plan.datapath.linear
    terms = np.where(zero, 0, reference._terms(plan)(code)) * np.where(sign, -1, 1)
    terms = reference._fit(terms, accumulator.step_bits, accumulator.overflow)
    half, wraps = 1 << (accumulator.bits - 1), accumulator.overflow == "wrap"
    found = np.zeros((len(code), accumulator.bins), dtype=np.int64)
    for number, steps in enumerate(terms.tolist()):
        total, row = 0, []
        for step in steps:
            row.append(total)
            total += step
            # one by one, a million times: reference._fit in plain integers
            if not -half < total < half:
                total = (total + half) % (2 * half) - half if wraps else (half - 1 if total > 0 else 1 - half)
        found[:, number] = row
    return pack([(found, accumulator.bits)])


def _log_sums(plan: DotPlan, code: Ints, zero: Bools, sign: Bools, scale: int) -> bytes:
    accumulator = plan.datapath.log
    tables = accumulator.delta.tables(plan.datapath.gamma << accumulator.guard_bits)
    entered = reference._enter(code, zero, scale, accumulator)
    signs = sign & (entered != 0)
    codes, minus = np.zeros(1, dtype=np.int64), np.zeros(1, dtype=bool)
    found = np.zeros((2, len(code)), dtype=np.int64)
    for i in range(len(code)):
        found[0, i], found[1, i] = minus[0], codes[0]
        step = slice(i, i + 1)
        codes, minus = reference.log_add(codes, minus, entered[step], signs[step], tables, accumulator.max_code)
    return pack([(found[0], 1), (found[1], accumulator.bits)])


def _element_vectors(datapath: Datapath, side: int, depth: int) -> Vectors:
    pe, plan, (a, w, bias) = vectors.example(datapath, side, side, depth)
    return vectors.pe_vectors(pe, plan, a, w, bias)


def elements(outputs: int) -> Iterator[Comparison]:
    """PEs of 1 and 16 lanes, and arrays on three shapes, of every named datapath."""
    side = max(int(outputs**0.5), 1)
    shape = ArrayShape(2, 4, 6, 1, 1)
    for name in named_datapaths():
        for lanes in (1, 16):
            datapath = load_datapath(name)
            datapath = replace(datapath, accumulate=replace(datapath.accumulate, lanes=lanes))
            depth = 3 * lanes + 1
            parameters, _, _ = vectors.example(datapath, 1, side, depth)
            made = partial(_element_vectors, datapath, side, depth)
            yield Comparison(designs.vector_pe(parameters), outputs, made)
            for m, n, k in ((9, 17, 40), (33, 10, 27), (5, 3, 64)):
                parameters, plan, (a, w, bias) = vectors.example(datapath, m, n, k, seed=m)
                made = partial(vectors.array_vectors, parameters, shape, plan, a, w, bias)
                yield Comparison(designs.array(parameters, shape), m * n * k, made)


@lru_cache(maxsize=1)
def _code() -> str:
    """What the vectors depend on beside their number: the reference's text."""
    digest = hashlib.sha256()
    root = Path(__file__).parent.parent
    for name in ("datapath", "delta", "formats", "tables", "emulator/plan", "emulator/reference", "rtl/vectors"):
        digest.update(read_bytes(root / f"{name}.py"))
    return digest.hexdigest()


def passed(comparison: Comparison) -> Path:
    """The file that says so, made by :func:`compare`."""
    folder = simulate.folder_of(comparison.design)
    key = hashlib.sha256(f"{_code()} {comparison.design.name} {comparison.count}".encode()).hexdigest()
    return folder.with_name(f"{folder.name}-passed-{key[:20]}.txt")


def compare(comparison: Comparison) -> int:
    """Compare one design, unless it has passed already.

    Returns: outputs compared.

    Raises:
        SimulationError: they differ.
    """
    kept = passed(comparison)
    if not kept.is_file():
        made = comparison.vectors()
        simulate.build(comparison.design).check(made.inputs, made.expected, made.count)
        write_text(kept, f"{made.count}\n")
    return int(read_bytes(kept))


@click.command()
@click.option("--all", "everything", is_flag=True, help="Exhaustive converters, 2^20 random vectors, 2^16 a PE.")
@click.option(
    "--only", type=click.Choice(("units", "converters", "macs", "elements")), default=None, help="A part of it."
)
def main(everything: bool, only: str | None) -> None:
    """Compare every unit of the library with the reference, in Verilator or else Icarus."""
    count, outputs = (1 << 20, 1 << 16) if everything else (1 << 12, 1 << 6)
    parts: dict[str, Callable[[], Iterator[Comparison]]] = {
        "units": lambda: units(count),
        "converters": lambda: converters(count, everything),
        "macs": lambda: macs(count),
        "elements": lambda: elements(outputs),
    }
    total, designs_, failed, start = 0, 0, 0, time.perf_counter()
    for name, part in parts.items():
        if only not in (None, name):
            continue
        for comparison in part():
            before = " (before)" if passed(comparison).is_file() else ""
            try:
                outcome = compare(comparison)
            except SimulationError as error:
                failed += 1
                click.echo(f"FAILED: {error}", err=True)
                continue
            designs_ += 1
            total += outcome
            spent = time.perf_counter() - start
            click.echo(f"{spent:8.1f} s  {comparison.design.name:<36} {outcome:>9} outputs, 0 mismatches{before}")
    tool = simulate.best()
    click.echo(f"{designs_} designs, {total} outputs, 0 mismatches, {failed} failed, {tool.name}: {tool.version}")
    raise SystemExit(1 if failed else 0)


if __name__ == "__main__":
    main()
