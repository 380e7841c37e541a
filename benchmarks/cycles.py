"""What a compiler's model of a processor says of the native library's inner loops: for processors that are not at hand.

``python -m benchmarks.cycles --json [--cpu icelake-server]``

The loops are taken out of the compiled kernels (`make native` leaves them in build/native) by objdump, and run through
llvm-mca (package `llvm` of most systems), which simulates ports and dependencies, but no caches. So a figure is what
the inner loop could do if everything lay in the first-level cache: packing, laying out of terms and encoding of results
are not in it. `of_fma_peak` divides by the two fused multiply-additions a cycle that bound a float32 product; a good
sgemm reaches 0.84 of that peak.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

KERNELS = Path(__file__).parents[1] / "build" / "native"
# row: function, an instruction that its loop has, MACs of an iteration (rows or depth side by side, times lanes)
ROWS: dict[str, dict[str, tuple[str, str, int]]] = {
    "avx512": {
        "linear-8-wrap": (r"\bshifted\(", "vpsra", 8 * 64),
        "linear-8-table": (r"\bexpanded<0>", "vpaddd", 4 * 32),
        "linear-16-wrap": (r"\blinear<.*Fp32, 0, 8>", "vcvttps2dq", 8 * 32),
        "linear-saturate, in range": (r"\blinear<.*Fp32, 1, 8>", "vcvttps2dq", 8 * 32),
        "log-8": (r"\blog8\(", "vpermb", 4 * 64),
        "log-16-small": (r"\bnarrow<.*Words<1>", "vpermw", 4 * 32),
        "log-16-large": (r"\bnarrow<.*LookedUp>", "vpgatherdd", 4 * 32),
    },
    "avx2": {
        "linear-8-wrap": (r"\blinear<.*Fp32, 0, 4>", "vcvttps2dq", 4 * 16),
        "linear-8-table": (r"\bexpanded<0>", "vpaddd", 4 * 16),
        "log-8": (r"\blog8\(", "vpshufb", 4 * 32),
        "log-16-large": (r"\bnarrow<.*LookedUp>", "vpgatherdd", 4 * 16),
    },
}
FMA_LANES = {"avx512": 16, "avx2": 8}

_Instruction = tuple[int, str]


def functions(path: Path) -> dict[str, list[_Instruction]]:
    """The instructions of every function of an object file, with their addresses."""
    text = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "-C", str(path)], capture_output=True, text=True, check=True
    ).stdout
    found: dict[str, list[_Instruction]] = {}
    body: list[_Instruction] = []
    for line in text.splitlines():
        if start := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            body = found.setdefault(start[1], [])
        elif instruction := re.match(r"\s+([0-9a-f]+):\t(.*)$", line):
            body.append((int(instruction[1], 16), re.sub(r"<.*>|#.*", "", instruction[2]).strip()))
    return found


def loops(body: list[_Instruction]) -> list[list[str]]:
    """The innermost loops: from the target of a jump backwards to before the jump."""
    at = {address: i for i, (address, _) in enumerate(body)}
    spans = []
    for i, (_, text) in enumerate(body):
        jump = re.match(r"j\w+\s+([0-9a-f]+)$", text)
        first = at.get(int(jump[1], 16)) if jump else None
        if first is not None and first <= i:
            spans.append((first, i))
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    return [[text for _, text in body[first:last]] for first, last in inner]


def cycles(loop: list[str], cpu: str) -> float:
    """Cycles of an iteration, by llvm-mca."""
    iterations = 200
    report = subprocess.run(
        ["llvm-mca", f"-mcpu={cpu}", f"-iterations={iterations}"],
        input="\n".join(loop) + "\n",
        capture_output=True,
        text=True,
        check=False,
    )
    found = re.search(r"Total Cycles:\s+(\d+)", report.stdout)
    if found is None:
        sys.exit(f"llvm-mca: {(report.stderr or report.stdout).strip().splitlines()[0]}")
    return int(found[1]) / iterations


def measure(isa: str, cpu: str) -> list[dict[str, Any]]:
    """Rows of the report."""
    paths = sorted(KERNELS.rglob(f"*lns_kernels_{isa}*/**/kernels.cpp.o"))
    if not paths:
        sys.exit(f"no compiled {isa} kernels under {KERNELS}: run make native")
    known = functions(paths[0])
    found = []
    for row, (function, instruction, macs) in ROWS[isa].items():
        candidates = [
            loop
            for name, body in known.items()
            if re.search(function, name)
            for loop in loops(body)
            if any(text.startswith(instruction) for text in loop)
        ]
        if not candidates:
            sys.exit(f"{row}: no loop with {instruction} in a function like {function}: bring ROWS up to date")
        # of the variants in a function, the one that does most
        loop = max(candidates, key=len) if "in range" not in row else min(candidates, key=len)
        spent = cycles(loop, cpu)
        found.append(
            {
                "row": row,
                "isa": isa,
                "cpu": cpu,
                "instructions": len(loop),
                "cycles": round(spent, 2),
                "macs": macs,
                "macs_per_cycle": round(macs / spent, 2),
                "of_fma_peak": round(macs / spent / (2 * FMA_LANES[isa]), 3),
            }
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.cycles", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--isa", choices=tuple(ROWS), default="avx512")
    parser.add_argument("--cpu", default="icelake-server", help="a processor that llvm-mca knows")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if missing := [tool for tool in ("objdump", "llvm-mca") if shutil.which(tool) is None]:
        sys.exit(f"{' and '.join(missing)} not found: install binutils and llvm")
    found = measure(options.isa, options.cpu)
    if options.json:
        print(json.dumps({"rows": found}))
        return 0
    for row in found:
        print(
            f"{row['row']:<28} {row['cycles']:7.1f} cycles for {row['macs']:4} MACs: "
            f"{row['macs_per_cycle']:6.2f} a cycle, {row['of_fma_peak']:.2f} of the float32 peak"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
