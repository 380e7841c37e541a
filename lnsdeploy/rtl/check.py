"""The complete programme of comparisons: ``python -m lnsdeploy.rtl.check --all`` (docs/rtl.md).

Exhaustive at 6 and 8 bits, random and adversarial vectors above, every named datapath. Minutes to an hour; the tests
run a choice of it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import replace

import click
import numpy as np

from lnsdeploy.datapath import LogAccumulator, load_datapath, named_datapaths
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
from lnsdeploy.formats import LNSFormat
from lnsdeploy.rtl import designs, simulate, vectors
from lnsdeploy.rtl.designs import ArrayShape, Design
from lnsdeploy.rtl.vectors import Vectors

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


def units(count: int) -> Iterator[tuple[Design, Vectors]]:
    """Multipliers, adders and encoders; all pairs up to 8 bits, `count` vectors above."""
    random = np.random.default_rng(0)
    for bits, gamma in WIDTHS:
        fmt = LNSFormat(bits, gamma)
        if bits <= 8:
            both = np.arange(1 << (2 * bits), dtype=np.int64)
            x, y = both >> bits, both & ((1 << bits) - 1)
        else:
            x, y = (vectors.operands(fmt, (count,), seed).astype(np.int64) for seed in (1, 2))
            # close codes, where differences cancel
            y = np.where(random.random(count) < 0.5, x ^ random.integers(0, 16, count), y)
        yield designs.multiplier(fmt, fmt), vectors.multiplier_vectors(fmt, fmt, x, y)
        for method in methods_for(gamma):
            accumulator = LogAccumulator(bits=bits - 1, delta=method)
            yield designs.log_adder(accumulator, gamma), vectors.adder_vectors(accumulator, gamma, x, y)
        pattern = random.integers(0, 1 << 32, count, dtype=np.uint64).astype(np.uint32)
        pattern[: count // 8] &= np.uint32(0x807FFFFF)  # subnormal numbers
        floats = pattern.view(np.float32)
        floats = np.where(np.isnan(floats), np.float32(np.inf), floats).astype(np.float32)
        yield designs.float_encoder(fmt, "zero"), vectors.encoder_vectors(fmt, "zero", floats, -gamma * 3)


def converters(count: int, exhaustive: bool) -> Iterator[tuple[Design, Vectors]]:
    """Terms of every product, and words of every accumulator of 24 bits (or random ones where there are more)."""
    random = np.random.default_rng(1)
    for name in named_datapaths():
        datapath = load_datapath(name)
        if not datapath.is_linear:
            continue
        parameters, plan, _ = vectors.example(datapath, 1, 1, 16)
        yield designs.linear_term(parameters), vectors.term_vectors(parameters, plan)
        bits, bins = datapath.linear.bits, datapath.linear.bins
        if exhaustive and bins == 1 and bits <= 24:
            acc = np.arange(-(1 << (bits - 1)), 1 << (bits - 1), dtype=np.int64)[:, None]
        else:
            acc = random.integers(-(1 << (bits - 1)), 1 << (bits - 1), (count, bins))
            acc >>= random.integers(0, bits, (count, 1))
        yield designs.linear_finish(parameters), vectors.finish_vectors(parameters, plan, acc)


def elements(outputs: int) -> Iterator[tuple[Design, Vectors]]:
    """PEs of 1 and 16 lanes, and arrays on three shapes, of every named datapath."""
    for name in named_datapaths():
        for lanes in (1, 16):
            datapath = load_datapath(name)
            datapath = replace(datapath, accumulate=replace(datapath.accumulate, lanes=lanes))
            side = max(int(outputs**0.5), 1)
            parameters, plan, (a, w, bias) = vectors.example(datapath, side, side, 3 * lanes + 1)
            yield designs.vector_pe(parameters), vectors.pe_vectors(parameters, plan, a, w, bias)
            shape = ArrayShape(2, 4, 6, 1, 1)
            for m, n, depth in ((9, 17, 40), (33, 10, 27), (5, 3, 64)):
                parameters, plan, (a, w, bias) = vectors.example(datapath, m, n, depth, seed=m)
                yield (
                    designs.array(parameters, shape),
                    vectors.array_vectors(parameters, shape, plan, a, w, bias),
                )


@click.command()
@click.option("--all", "everything", is_flag=True, help="Exhaustive converters, 2^20 random vectors, 2^16 a PE.")
@click.option("--only", type=click.Choice(("units", "converters", "elements")), default=None, help="A part of it.")
def main(everything: bool, only: str | None) -> None:
    """Compare every unit of the library with the reference, in Verilator or else Icarus."""
    count, outputs = (1 << 20, 1 << 16) if everything else (1 << 12, 1 << 6)
    parts: dict[str, Callable[[], Iterator[tuple[Design, Vectors]]]] = {
        "units": lambda: units(count),
        "converters": lambda: converters(count, everything),
        "elements": lambda: elements(outputs),
    }
    total, start = 0, time.perf_counter()
    for name, part in parts.items():
        if only not in (None, name):
            continue
        for design, v in part():
            simulate.build(design).check(v.inputs, v.expected, v.count)
            total += v.count
            click.echo(f"{time.perf_counter() - start:8.1f} s  {design.name:<36} {v.count:>9} outputs, 0 mismatches")
    click.echo(f"{total} outputs, 0 mismatches, {simulate.best().name} {simulate.best().version}")


if __name__ == "__main__":
    main()
