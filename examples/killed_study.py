"""A study whose process is killed again and again ends with the same points and the same front (docs/studies.md).

    python examples/killed_study.py [KILLS] [STUDY.toml]

runs a study once undisturbed, then killed with SIGKILL at KILLS random moments (20 by default), workers and all, and
continued each time; whenever all of its points have got through it ends, is compared with the undisturbed one, and
begins again. Fails if a point was lost, doubled, or is another.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from contextlib import closing
from pathlib import Path
from typing import Any

STUDY = """
name = "killed"

[[net]]
name = "digits-mlp"
data = "digits"
model = "mlp"
epochs = 3

[objectives]
accuracy = "maximize"
size_bytes = "minimize"

[space]
format = ["3:1", "4:1", "4:2", "5:2", "6:4", "8:8"]
accumulate = ["linear", "log"]
table_bits = [0, "full"]
delta = ["exact", "mitchell", "max"]
"""


def command(toml: Path, out: Path, workers: int = 1) -> list[str]:
    return [
        *(sys.executable, "-m", "lnsdeploy", "study", str(toml)),
        *("--out", str(out), "--workers", str(workers), "--json"),
    ]


def points(out: Path) -> list[dict[str, Any]]:
    """What became of every point, without what belongs to this run of it."""
    found = json.loads((out / "study.json").read_text())["points"]
    return [{k: point[k] for k in ("id", "fingerprint", "state", "reason", "values", "pareto")} for point in found]


def finished(out: Path) -> int:
    """Trials in the database that have a result."""
    if not (out / "study.db").exists():
        return 0
    with closing(sqlite3.connect(f"file:{out / 'study.db'}?mode=ro", uri=True)) as database:
        try:
            return int(
                database.execute("SELECT count(*) FROM trials WHERE state IN ('COMPLETE', 'PRUNED')").fetchone()[0]
            )
        except sqlite3.OperationalError:  # killed before the tables were there
            return 0


def killed(toml: Path, out: Path, patience: float, workers: int = 1) -> bool:
    """Run, and kill all of it at a random moment; False if it was faster."""
    process = subprocess.Popen(
        command(toml, out, workers), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    try:
        process.wait(random.uniform(0, patience))
        return False
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        return True


def main() -> None:
    kills = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        toml = folder / "study.toml"
        toml.write_text(Path(sys.argv[2]).read_text() if len(sys.argv) > 2 else STUDY)
        whole, broken = folder / "whole", folder / "broken"
        subprocess.run(command(toml, whole), check=True, stdout=subprocess.DEVNULL)
        # the net is trained once; killing trainings is another example
        for part in ("nets", "runs"):
            shutil.copytree(whole / part, broken / part)
        begun = time.monotonic()
        scratch = folder / "scratch"
        for part in ("nets", "runs"):
            shutil.copytree(whole / part, scratch / part)
        subprocess.run(command(toml, scratch), check=True, stdout=subprocess.DEVNULL)
        patience = 0.9 * (time.monotonic() - begun)
        wanted, all_of_them = points(whole), finished(whole)
        done = rounds = 0
        while done < kills or finished(broken):
            if done < kills and killed(toml, broken, patience, workers=1 + done % 2):
                done += 1
                print(f"killed {done} times, {finished(broken)} of {all_of_them} points finished", flush=True)
                if done < kills and finished(broken) < all_of_them:
                    continue
            # nothing is left that a kill could spoil
            subprocess.run(command(toml, broken, 2), check=True, stdout=subprocess.DEVNULL)
            if points(broken) != wanted or finished(broken) != all_of_them:
                sys.exit(f"after {done} kills the points are NOT the same")
            rounds += 1
            (broken / "study.db").unlink()
        print(f"{done} kills in {rounds} studies of {len(wanted)} points: the same points and front every time")


if __name__ == "__main__":
    main()
