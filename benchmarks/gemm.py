"""Speed of the native library's matrix products, one core, beside torch's float32 product in the same run.

``python -m benchmarks.gemm --json [--isa avx512|avx2|portable]``

A figure is the fastest of several runs, which take turns with those of the yardstick, so that a change of the
machine's load meets both. `gmacs` counts packing of activations, sums and encoding, as each call of a layer does them;
`gmacs_with_weights` counts packing of the weights as well, which a layer does once. With ``--threads N``, `speedup` and
`sgemm_speedup` are N threads over one, measured in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.optimizer import machine
from lnsdeploy.datapath import Accumulator, Datapath, LinearAccumulator, LogAccumulator, default_adder
from lnsdeploy.delta import Table
from lnsdeploy.emulator import native
from lnsdeploy.emulator.plan import DotPlan
from lnsdeploy.exporters.placement import place_dot
from lnsdeploy.formats import LNSFormat, calibrate, encode

SHAPES = ((1024, 1024, 1024), (3136, 64, 576))
BYTE, WORD = LNSFormat(8, 8), LNSFormat(16, 1024)
ROWS: dict[str, tuple[LNSFormat, Accumulator]] = {
    "linear-8-wrap": (BYTE, LinearAccumulator(32, table_bits=3, overflow="wrap")),
    "linear-16-wrap": (WORD, LinearAccumulator(32, table_bits=10, constant_bits=10, overflow="wrap")),
    # rounding to nearest is no product of two numbers: only a table gives it
    "linear-8-table": (BYTE, LinearAccumulator(32, table_bits=3, overflow="wrap", shift="round")),
    "linear-8-saturate": (BYTE, LinearAccumulator(24, table_bits=3)),
    "linear-16-saturate": (WORD, LinearAccumulator(24, table_bits=10, constant_bits=10)),
    "log-8": (BYTE, LogAccumulator(7)),
    "log-16-small": (WORD, LogAccumulator(15, delta=Table(20, 512))),
    "log-16-large": (WORD, LogAccumulator(15, delta=Table(1024, 16))),
}
# Not in the table of goals, but what the named datapaths need.
FURTHER: dict[str, tuple[LNSFormat, Accumulator]] = {
    "bins-8-saturate": (BYTE, LinearAccumulator(24, conversion="bin", table_bits=3)),
    "mitchell-8-saturate": (BYTE, LinearAccumulator(24)),
    "linear-8-wide": (BYTE, LinearAccumulator(38, table_bits=3, constant_bits=5, overflow="wrap")),
    "linear-16-wide": (WORD, LinearAccumulator(40, table_bits=10, constant_bits=16)),
    "log-8-guard": (BYTE, LogAccumulator(12, 3)),
}


def layer(fmt: LNSFormat, accumulate: Accumulator, shape: tuple[int, int, int]) -> tuple[Any, Any, Any]:
    """Plan, activations and weights of a product of normally distributed numbers, placed as lowering places it."""
    rows, channels, depth = shape
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((rows, depth)), rng.standard_normal((channels, depth)) / depth**0.5
    path = Datapath("benchmark", fmt, fmt, fmt, accumulate, default_adder(fmt))
    a, b, o = calibrate(x, fmt), calibrate(w, fmt), calibrate(x[:64] @ w.T, fmt)
    words = encode(x, fmt, a), encode(w, fmt, b)
    plan = DotPlan(path, fmt, fmt, fmt, a, b, o)
    plan, _ = place_dot(plan, words[0][:16], words[1][:64], None, 1.0)
    if not path.is_linear:
        plan = replace(plan, acc_offset=int(np.max(plan.acc_offset)))
    return plan, *words


def measure(names: list[str], shape: tuple[int, int, int], repeats: int, threads: int) -> list[dict[str, Any]]:
    """Rows of the report for one shape."""
    import torch

    rows, channels, depth = shape
    macs = rows * channels * depth
    x, w = torch.randn(rows, depth), torch.randn(channels, depth)
    found = []
    for name in names:
        plan, a, words = layer(*(ROWS | FURTHER)[name], shape)
        native.NativeDot(plan, words)  # tables that are kept are made now
        start = time.perf_counter()
        made = native.NativeDot(plan, words)
        packing = time.perf_counter() - start
        runs: dict[str, Callable[[int], Any]] = {
            "lns": lambda count, made=made, a=a: made.dot(a, None, count),
            "sgemm": lambda count: x @ w.T,
        }
        counts = sorted({1, threads})
        best = {(key, count): float("inf") for key in runs for count in counts}
        for _ in range(repeats):
            for key, count in best:
                torch.set_num_threads(count)
                start = time.perf_counter()
                runs[key](count)
                best[key, count] = min(best[key, count], time.perf_counter() - start)
        lns, sgemm = best["lns", threads], best["sgemm", threads]
        found.append(
            {
                "row": name,
                "shape": list(shape),
                "isa": native.isa(),
                "kernel": made.kernel,
                "threads": threads,
                "gmacs": round(macs / lns / 1e9, 3),
                "gmacs_with_weights": round(macs / (lns + packing) / 1e9, 3),
                "sgemm_gmacs": round(macs / sgemm / 1e9, 3),
                "ratio": round(sgemm / lns, 4),
                "speedup": round(best["lns", 1] / lns, 3),
                "sgemm_speedup": round(best["sgemm", 1] / sgemm, 3),
            }
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gemm", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=tuple(native.ISAS), help="instruction set; the best by default")
    parser.add_argument("--rows", default=None, help="names, separated by commas; all by default")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if why := native.unavailable():
        sys.exit(why)
    names = options.rows.split(",") if options.rows else list(ROWS | FURTHER)
    if unknown := [name for name in names if name not in ROWS | FURTHER]:
        sys.exit(f"unknown rows {', '.join(unknown)}; there are {', '.join(ROWS | FURTHER)}")
    if options.threads == 1 and hasattr(os, "sched_setaffinity"):
        # one core for both, and always the same
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    with native.forced_isa(options.isa):
        found = [
            row for shape in SHAPES for row in measure(names, shape, max(options.repeats, 1), max(options.threads, 1))
        ]
    result = {"machine": machine() | {"isas": native.isas()}, "rows": found}
    if options.json:
        print(json.dumps(result))
        return 0
    print(", ".join(f"{key} {value}" for key, value in result["machine"].items()))
    for row in found:
        shape_text = "×".join(map(str, row["shape"]))
        print(
            f"{row['row']:<20} {shape_text:<16} {row['kernel']:<24} {row['gmacs']:7.2f} GMAC/s "
            f"({row['gmacs_with_weights']:.2f} with weights)  sgemm {row['sgemm_gmacs']:6.1f}  ratio {row['ratio']:.3f}"
            + (f"  speedup {row['speedup']:.2f} (sgemm {row['sgemm_speedup']:.2f})" if row["threads"] > 1 else "")
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
