"""A training that is killed again and again ends with the same weights, byte for byte (docs/training.md).

    python examples/killed_and_resumed.py [TIMES] [OPTIONS OF lnsdeploy train]

trains once undisturbed; then TIMES times (10 by default) anew, each time killed with SIGKILL at a random moment, twice,
and continued. Prints how often the weights were the same, and fails if they were not.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

OPTIONS = ["--data", "digits", "--model", "cnn", "--optimizer", "lns-madam", "--epochs", "4"]
OPTIONS += ["--limit", "480", "--checkpoint-every", "3"]
KILLS = 2


def command(out: Path, options: list[str]) -> list[str]:
    return [sys.executable, "-m", "lnsdeploy", "train", *options, "--out", str(out)]


def killed(out: Path, options: list[str], patience: float) -> bool:
    """Train, and kill the process at a random moment after its first checkpoint; False if it was faster."""
    process = subprocess.Popen(command(out, options), stdout=subprocess.DEVNULL)
    while process.poll() is None and not (out / "checkpoint.safetensors").exists():
        time.sleep(0.005)
    time.sleep(random.uniform(0, patience))
    process.kill()
    return process.wait() != 0


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 10
    options = sys.argv[2:] or OPTIONS
    same = interrupted = 0
    with tempfile.TemporaryDirectory() as folder:
        whole = Path(folder) / "whole"
        whole.mkdir()
        process = subprocess.Popen(command(whole, options), stdout=subprocess.DEVNULL)
        while process.poll() is None and not (whole / "checkpoint.safetensors").exists():
            time.sleep(0.005)
        begun = time.monotonic()
        if process.wait():
            sys.exit("the undisturbed training failed")
        patience = (time.monotonic() - begun) / 3
        for number in range(times):
            out = Path(folder) / str(number)
            kills = 0
            while kills < KILLS:
                if killed(out, options, patience):
                    kills += 1
                else:
                    # it was finished before its time
                    shutil.rmtree(out)
                    kills = 0
            interrupted += kills
            subprocess.run(command(out, options), check=True, stdout=subprocess.DEVNULL)
            names = ("weights.safetensors", "steps.csv")
            same += all((out / name).read_bytes() == (whole / name).read_bytes() for name in names)
    print(f"{same} of {times} trainings, killed {interrupted} times, ended with the same bytes")
    sys.exit(same != times)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
