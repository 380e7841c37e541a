"""The whole pipeline on real digits: train, export, emulate, verify, report, and a table at the end.

    python examples/demo.py --out demo-out

Every step is a command of `lnsdeploy`, printed before it runs, so each can be repeated by hand.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

MODELS = ("mlp", "cnn")
# those of them that run here
EXECUTORS = ("reference", "cpu", "ort")


def run(*arguments: str) -> dict[str, Any]:
    """One command, its JSON back; stops the demonstration where a command fails."""
    command = ["lnsdeploy", *arguments]
    print(f"$ {shlex.join(command)}", flush=True)
    done = subprocess.run(
        [sys.executable, "-m", *command, "--json"],
        stdout=subprocess.PIPE,
        text=True,
        check=False,
        env=os.environ | {"OMP_NUM_THREADS": "1", "LNSDEPLOY_THREADS": "1"},
    )
    if done.returncode not in (0, 1) or not done.stdout.strip():
        sys.exit(done.returncode or 2)
    result: dict[str, Any] = json.loads(done.stdout)
    return result | {"status": done.returncode}


def pipeline(model: str, out: Path, executors: list[str]) -> dict[str, Any]:
    """Train one net in float32 and in LNS, export it, emulate it with every executor and compare them."""
    common = ("--data", "digits", "--model", model, "--seed", "0")
    yardstick = run("train", *common, "--float", "--out", str(out / f"{model}-float"))
    trained = run("train", *common, "--bits", "8", "--gamma", "8", "--out", str(out / f"{model}-8-8"))
    file = str(out / f"{model}.onnx")
    exported = run("export", str(out / f"{model}-8-8"), "-o", file)
    emulated = {name: run("emulate", file, "--executor", name) for name in executors}
    verified = run("verify", file, "--executors", ",".join(executors))
    return {
        "model": model,
        "float32": yardstick["accuracy"],
        "trained": trained["accuracy"],
        "emulated": {name: result["accuracy"] for name, result in emulated.items()},
        "words": verified["words_compared"],
        "equal": verified["equal"],
        "datapath": exported["datapath"],
    }


def main() -> None:
    """Run everything and print the table; exit status 1 if executors differ."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, default=Path("demo-out"))
    out: Path = parser.parse_args().out
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    known = run("info")["executors"]
    executors = [name for name in EXECUTORS if known[name]["available"]]
    with ThreadPoolExecutor(2) as pool:
        rows = list(pool.map(lambda model: pipeline(model, out, executors), MODELS))
    report = run("report", "--data", "digits", "--bits", "4,6,8", "--seeds", "2", "--out", str(out / "report"))
    header = ["net", "float32", "trained 8:8", *(f"emulated: {name}" for name in executors), "words compared", "equal"]
    table = [header] + [
        [
            row["model"],
            _percent(row["float32"]),
            _percent(row["trained"]),
            *(_percent(row["emulated"][name]) for name in executors),
            f"{row['words']:,}",
            "yes" if row["equal"] else "NO",
        ]
        for row in rows
    ]
    widths = [max(len(line[i]) for line in table) for i in range(len(header))]
    print()
    for line in table:
        print("  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))
    datapath = rows[0]["datapath"]
    print(f"\ndatapath {datapath['name']} ({datapath['fingerprint']}); test split of 360 real digits, seed 0")
    print(f"report: {report['report']}")
    print(f"{time.perf_counter() - start:.0f} s in all")
    if not all(row["equal"] for row in rows):
        sys.exit(1)


def _percent(fraction: float) -> str:
    return f"{100 * fraction:.2f} %"


if __name__ == "__main__":
    main()
