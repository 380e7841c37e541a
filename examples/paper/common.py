"""What the experiments share: many trainings on all cores, finished ones kept, then a table and a figure."""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from lnsdeploy.errors import BadValueError

_RESULT = "result.json"

# Colours that stay apart without colour vision (Okabe and Ito 2008), with markers beside them.
STYLES = (("#0072B2", "o"), ("#D55E00", "s"), ("#009E73", "^"), ("#CC79A7", "D"), ("#E69F00", "v"), ("#000000", "x"))


@dataclass(frozen=True)
class Job:
    """One training.

    Args:
        row: what it belongs to in the table; jobs of a row differ in their seed.
        name: of its folder.
        options: of :func:`lnsdeploy.training.trainer.config_from_options`, or of `work`.
        work: what else to do; called with folder and options, returns numbers. By default a training.
        after: name of the job whose run must be there first; its folder goes into the option ``init_from``.
    """

    row: str
    name: str
    options: Mapping[str, Any]
    work: Callable[[Path, dict[str, Any]], dict[str, Any]] | None = None
    after: str | None = None


@dataclass
class Results:
    """What the jobs found, by row."""

    rows: dict[str, list[dict[str, Any]]] = field(default_factory=dict)

    def values(self, row: str, key: str) -> list[float]:
        """A number of all jobs of a row; those that diverged have none."""
        return [found[key] for found in self.rows.get(row, []) if found.get(key) is not None]

    def mean(self, row: str, key: str) -> float:
        """Mean of :meth:`values`; not a number where there are none."""
        values = self.values(row, key)
        return statistics.fmean(values) if values else float("nan")

    def spread(self, row: str, key: str) -> float:
        """Standard deviation of :meth:`values`."""
        values = self.values(row, key)
        return statistics.stdev(values) if len(values) > 1 else 0.0


def train_job(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """A training by its options; one that diverges says so, with no accuracy."""
    from lnsdeploy.training.trainer import config_from_options, train

    try:
        result = train(config_from_options(**options), folder)
    except BadValueError as error:
        if "diverged" not in str(error):
            raise
        return {"accuracy": None, "loss": None, "diverged": str(error)}
    found = {"accuracy": result.accuracy, "loss": result.loss, "seconds": result.seconds}
    return found if result.deployed is None else found | {"deployed": result.deployed}


def _run(job: Job, out: str) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    os.environ["LNSDEPLOY_THREADS"] = "1"
    folder = Path(out) / "runs" / job.name
    done = folder / _RESULT
    options = dict(job.options)
    if job.after is not None:
        options["init_from"] = str(Path(out) / "runs" / job.after)
    found = (job.work or train_job)(folder, options)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = done.with_suffix(".tmp")
    temporary.write_text(json.dumps(found))
    temporary.rename(done)
    return found


def _known(job: Job, out: Path) -> dict[str, Any] | None:
    """What a job found before."""
    done = out / "runs" / job.name / _RESULT
    found: dict[str, Any] | None = json.loads(done.read_text()) if done.exists() else None
    return found


def run_all(jobs: Sequence[Job], out: Path, workers: int) -> Results:
    """Do all jobs, each in a process with one thread; those that were done before are read.

    Of each row, results are in the order of its jobs, whichever of them was done first.
    """
    out.mkdir(parents=True, exist_ok=True)
    # no process is started for what is there already
    waiting, running = [], {}
    finished: dict[str, dict[str, Any]] = {}
    for job in jobs:
        known = _known(job, out)
        if known is None:
            waiting.append(job)
        else:
            finished[job.name] = known
    with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
        while waiting or running:
            for job in [job for job in waiting if job.after is None or job.after in finished]:
                waiting.remove(job)
                running[pool.submit(_run, job, str(out))] = job
            future = next(as_completed(running))
            job = running.pop(future)
            finished[job.name] = found = future.result()
            shown = ", ".join(f"{k} {v:.4g}" for k, v in found.items() if isinstance(v, float))
            print(f"[{len(finished)}/{len(jobs)}] {job.name}: {shown or 'diverged'}", file=sys.stderr, flush=True)
    results = Results({job.row: [] for job in jobs})
    for job in jobs:
        results.rows[job.row].append(finished[job.name])
    return results


def parser_of(text: str | None) -> argparse.ArgumentParser:
    """Options that every experiment has."""
    parser = argparse.ArgumentParser(description=(text or "").splitlines()[0])
    parser.add_argument("--data", default="digits", help="data set for the images; digits need no files")
    parser.add_argument("--data-dir", default=None, help="its folder")
    parser.add_argument("--model", default="cnn", help="net for the images")
    parser.add_argument("--augment", default="none", help="of the images: none, crop, flip, or crop+flip")
    parser.add_argument("--epochs", type=int, default=None, help="passes over the images")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="trainings at a time")
    parser.add_argument("--out", type=Path, required=True, help="folder for runs, table and figure; kept between calls")
    return parser


def images(options: argparse.Namespace) -> dict[str, Any]:
    """Options of a training on the images."""
    return {
        "data": options.data,
        "data_dir": options.data_dir,
        "model": options.model,
        "augment": options.augment,
        "epochs": options.epochs,
    }


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def percent(results: Results, row: str, key: str = "accuracy") -> str:
    """Mean and standard deviation over seeds, in per cent."""
    values = results.values(row, key)
    lost = len(results.rows.get(row, [])) - len(values)
    if not values:
        return "diverged"
    text = f"{100 * results.mean(row, key):.2f} ± {100 * results.spread(row, key):.2f}"
    return text + (f" ({lost} diverged)" if lost else "")


def figure(width: float = 9.0, height: float = 3.4, panels: int = 1) -> tuple[Any, list[Any]]:
    """A matplotlib figure without a window system, and its axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    made = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(made)
    axes = made.subplots(1, panels, squeeze=False)[0]
    for one in axes:
        one.grid(alpha=0.3)
    return made, list(axes)


def write(out: Path, name: str, text: str, results: Results, picture: Any) -> None:
    """Print the table, and write it with the figure and all numbers."""
    (out / f"{name}.md").write_text(text + "\n")
    (out / f"{name}.json").write_text(json.dumps(results.rows, indent=1))
    picture.savefig(out / f"{name}.png", dpi=110)
    print(text)
