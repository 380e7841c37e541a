"""The same matrix product by other LNS software, where it is installed.

``pip install xlnstorch && python -m benchmarks.peers --json``

xlnstorch (log-domain tensors for torch) adds word by word, by formula or by table; lnsdeploy runs the same kind of
adder, `gauss-16` on words of 16 bits and `gauss-8` on bytes, through the native library. One core each.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import sys
import time
from collections.abc import Callable
from typing import Any

from benchmarks.gemm import BYTE, WORD, layer
from benchmarks.optimizer import machine
from lnsdeploy.datapath import LogAccumulator
from lnsdeploy.emulator import native

# What xlnstorch 1.0.0 with its C++ extension reached at its best where it was first measured, GMAC/s.
PUBLISHED = 0.062


def fastest(run: Callable[[], Any], repeats: int) -> float:
    """Seconds of the fastest run."""
    best = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - start)
    return best


def xlnstorch(size: int, repeats: int) -> dict[str, Any]:
    """Its version and speed, or why there is none."""
    try:
        version = importlib.metadata.version("xlnstorch")
        import torch
        import xlnstorch as peer
    except ImportError as error:
        return {"available": False, "why": str(error)}
    torch.set_num_threads(1)
    found: dict[str, Any] = {"available": True, "version": version, "implementations": {}}
    for name in ("ideal", "tab", "utah_tayco"):
        try:
            # tables exist for bases 2^(1/γ)
            base = torch.tensor(2.0 ** (1 / 1024), dtype=torch.float64)
            with peer.override_sbdb_implementation(name):
                a, b = (peer.lnstensor(torch.randn(size, size), b=base) for _ in range(2))
                torch.matmul(a, b)
                seconds = fastest(lambda: torch.matmul(a, b), repeats)  # noqa: B023
        except Exception as error:  # whatever another package may raise
            found["implementations"][name] = {"error": str(error).splitlines()[0] if str(error) else repr(error)}
            continue
        found["implementations"][name] = {"gmacs": round(size**3 / seconds / 1e9, 6)}
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.peers", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--size", type=int, default=256, help="of the peer's square matrices")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if why := native.unavailable():
        sys.exit(why)
    ours = {}
    for name, fmt, accumulate in (("gauss-16", WORD, LogAccumulator(15)), ("gauss-8", BYTE, LogAccumulator(7))):
        plan, a, w = layer(fmt, accumulate, (512, 512, 512))
        made = native.NativeDot(plan, w)
        ours[name] = round(512**3 / fastest(lambda: made.dot(a, None, 1), options.repeats) / 1e9, 3)  # noqa: B023
    peer = xlnstorch(options.size, options.repeats)
    speeds = [entry["gmacs"] for entry in peer.get("implementations", {}).values() if "gmacs" in entry]
    best = max([*speeds, PUBLISHED])
    result = {
        "machine": machine(),
        "lnsdeploy": ours,
        "xlnstorch": peer,
        "ratio": {name: round(value / best, 1) for name, value in ours.items()},
    }
    if options.json:
        print(json.dumps(result))
        return 0
    for name, value in ours.items():
        print(f"lnsdeploy {name:<20} {value:8.3f} GMAC/s")
    if not peer["available"]:
        print(f"xlnstorch is not installed ({peer['why']}); {PUBLISHED} GMAC/s was measured elsewhere")
    for name, entry in peer.get("implementations", {}).items():
        print(f"xlnstorch {name:<20} {entry.get('gmacs', entry.get('error'))}")
    for name, value in result["ratio"].items():
        print(f"{name}: {value} times its best")
    return 0


if __name__ == "__main__":
    sys.exit(main())
