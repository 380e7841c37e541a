"""`lnsdeploy report`: train and emulate over widths, γ and datapaths, then write the page.

Every training is a run directory and every emulation a small JSON file in the report's folder, so an interrupted
report continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import datetime
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lnsdeploy import __version__
from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.files import make_folder, read_bytes, write_json
from lnsdeploy.formats import LNSFormat, default_gamma

# One of each kind of datapath; each is adapted to the format at hand.
DATAPATHS = ("lns-madam-8", "lns-madam-8-lut1", "mitchell-8", "gauss-8-guard", "gauss-8", "max-plus-8")
# Inputs for the error of each layer, and for the comparison of executors.
ERROR_SAMPLES = 64


def parse_bits(text: str) -> list[int]:
    """Widths from ``"8"``, ``"3-8"`` or ``"4,6,8"``.

    Raises:
        BadValueError: another form, or a width outside 2 … 16.
    """
    widths: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d{1,3})\s*(?:-\s*(\d{1,3})\s*)?", part)
        if match is None:
            raise BadValueError(f"--bits: {text!r} is not a list of widths such as 8, 3-8 or 4,6,8")
        first, last = int(match[1]), int(match[2] or match[1])
        if not 2 <= first <= last <= 16:
            raise BadValueError(f"--bits: widths must be from 2 to 16 and in order, not {part.strip()!r}")
        widths.update(range(first, last + 1))
    return sorted(widths)


def formats_for(widths: Sequence[int], gammas: str | None) -> list[LNSFormat]:
    """Formats to study: those of `gammas` (``"8:8,8:16,4:2"``), and the default γ for every other width."""
    named = [LNSFormat.parse(part) for part in gammas.split(",")] if gammas else []
    chosen = []
    for bits in widths:
        own = [fmt for fmt in named if fmt.bits == bits]
        chosen += own or [LNSFormat(bits, default_gamma(bits))]
    return sorted(set(chosen))


@dataclass(frozen=True)
class ReportConfig:
    """What a report covers.

    Args:
        out: its folder.
        data, data_dir, models, optimizer, epochs: as for training; None epochs means the trainer's default.
        formats: formats of weights and activations.
        seeds: runs per format, with seeds 0, 1, ….
        datapaths: named ones, adapted to each format.
        workers: processes.
        command: the command line, for the page.
    """

    out: Path
    formats: tuple[LNSFormat, ...]
    data: str = "digits"
    data_dir: Path | None = None
    models: tuple[str, ...] = ("mlp",)
    optimizer: str = "madam"
    epochs: int | None = None
    seeds: int = 3
    datapaths: tuple[str, ...] = DATAPATHS
    workers: int = 1
    command: str = ""

    @classmethod
    def from_options(
        cls,
        *,
        out: Path,
        bits: str,
        gammas: str | None,
        models: Sequence[str],
        workers: int | None,
        datapaths: Sequence[str] = (),
        **rest: Any,
    ) -> ReportConfig:
        """From the options of the command line."""
        from lnsdeploy.datapath import load_datapath

        for name in datapaths:
            load_datapath(name)  # a wrong name is better told now than after hours of training
        rest["datapaths"] = tuple(dict.fromkeys(datapaths)) or DATAPATHS
        formats = tuple(formats_for(parse_bits(bits), gammas))
        count = workers or max(1, len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1)
        return cls(out=out, formats=formats, models=tuple(dict.fromkeys(models)), workers=count, **rest)

    def total(self) -> int:
        """Trainings in all."""
        return len(self.models) * self.seeds * (len(self.formats) + 1)


@dataclass(frozen=True)
class ReportResult:
    """What was written.

    Args:
        files: path by name: report.html, results.json, points.csv, …
        results: the page's data.
    """

    files: dict[str, Path]
    results: dict[str, Any] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """What the command line prints as JSON."""
        return {
            "report": str(self.files["report.html"]),
            "files": {name: str(path) for name, path in self.files.items()},
            "points": len(self.results["points"]),
            "runs": len({(p["model"], p["bits"], p["gamma"], p["seed"]) for p in self.results["points"]}),
            "equal": all(entry["equal"] for entry in self.results["equality"]),
            "seconds": self.results["seconds"],
        }

    def summary(self) -> str:
        """A few lines for the terminal."""
        lines = []
        for model in dict.fromkeys(b["model"] for b in self.results["baseline"]):
            yardstick = [b["accuracy"] for b in self.results["baseline"] if b["model"] == model]
            lines.append(f"{model}: float32 {_mean(yardstick)}")
            for key in dict.fromkeys((p["bits"], p["gamma"]) for p in self.results["points"] if p["model"] == model):
                some = [p for p in self.results["points"] if p["model"] == model and (p["bits"], p["gamma"]) == key]
                by_path = {
                    d: [p["accuracy"] for p in some if p["datapath"] == d] for d in {p["datapath"] for p in some}
                }
                best = max(by_path, key=lambda d: (sum(by_path[d]) / len(by_path[d]), d))
                trained = [p["trained_accuracy"] for p in some]
                lines.append(
                    f"  {key[0]}:{key[1]}  trained {_mean(trained)}, best emulated {_mean(by_path[best])} ({best})"
                )
        return "\n".join([*lines, f"page: {self.files['report.html']}"])


def _mean(values: Sequence[float]) -> str:
    return f"{100 * sum(values) / len(values):.2f} %"


@dataclass(frozen=True)
class _Job:
    """One training and the emulations of its result."""

    config: ReportConfig
    model: str
    format: LNSFormat | None
    seed: int

    @property
    def run(self) -> Path:
        name = "float" if self.format is None else f"{self.format.bits}-{self.format.gamma}"
        return self.config.out / "runs" / f"{self.model}-{name}-s{self.seed}"


def make_report(config: ReportConfig, *, progress: Callable[[int], None] | None = None) -> ReportResult:
    """Train, emulate and write the page.

    Args:
        progress: called with the number of trainings done.

    Raises:
        LNSError: a run failed; the finished ones are kept.
    """
    from lnsdeploy.studies.page import write_page
    from lnsdeploy.training.data import load_data

    start = time.perf_counter()
    dataset = load_data(config.data, config.data_dir)
    make_folder(config.out / "runs")
    make_folder(config.out / "points")
    jobs = [
        _Job(config, model, fmt, seed)
        for model in config.models
        for seed in range(config.seeds)
        for fmt in (None, *config.formats)
    ]
    # long jobs first keeps all workers busy to the end
    jobs.sort(key=lambda job: job.model != "cnn")
    found = _run_all(jobs, config.workers, progress)
    baseline, points, layers, equality = [], [], [], []
    for job in sorted(jobs, key=_order):
        part = found[job.run.name]
        baseline += part["baseline"]
        points += part["points"]
        layers += part["layers"]
        equality += part["equality"]
    results = {
        "title": f"Log-domain nets on {dataset.name}",
        "lnsdeploy": __version__,
        "created": datetime.date.today().isoformat(),
        "machine": _machine(),
        "command": config.command,
        "seconds": round(time.perf_counter() - start, 1),
        "data": {
            "name": dataset.name,
            "train": len(dataset.train_x),
            "test": len(dataset.test_x),
            "source": dataset.source,
        },
        "recipe": _recipe(config),
        "baseline": baseline,
        "points": points,
        "layers": layers,
        "equality": equality,
    }
    return ReportResult(write_page(results, config.out), results)


def _order(job: _Job) -> tuple[int, LNSFormat, int]:
    return job.config.models.index(job.model), job.format or LNSFormat(32, 1), job.seed


def _machine() -> dict[str, Any]:
    from lnsdeploy.versions import installed, machine

    versions = installed()
    return machine() | {name: versions[name] or "" for name in ("torch", "onnxruntime", "numpy")}


def _recipe(config: ReportConfig) -> dict[str, Any]:
    from lnsdeploy.training.trainer import TrainConfig

    made = _train_config(_Job(config, config.models[0], config.formats[0], 0))
    plain = {f.name: getattr(made, f.name) for f in dataclasses.fields(TrainConfig)}
    shown = {
        key: value if isinstance(value, (int, float, str, bool)) else str(value)
        for key, value in plain.items()
        if value is not None and key not in ("seed", "bits", "gamma", "model", "data_dir", "recipe")
    }
    return shown | {"inputs for layer errors and executor comparison": ERROR_SAMPLES}


def _run_all(jobs: Sequence[_Job], workers: int, progress: Callable[[int], None] | None) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}

    def done(job: _Job, part: dict[str, Any]) -> None:
        found[job.run.name] = part
        if progress:
            progress(len(found))

    if workers == 1:
        for job in jobs:
            done(job, _run_job(job))
        return found
    import multiprocessing

    # a fresh interpreter a worker: torch's threads do not survive a fork
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, mp_context=context, initializer=_quiet_worker) as pool:
        waiting: dict[Future[dict[str, Any]], _Job] = {pool.submit(_run_job, job): job for job in jobs}
        try:
            while waiting:
                finished, _ = wait(waiting, return_when=FIRST_COMPLETED)
                for future in finished:
                    done(waiting.pop(future), future.result())
        except BaseException:
            # checkpoints and finished parts are on disk, so nobody needs to wait for the others
            pool.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.terminate()
            raise
    return found


def _quiet_worker() -> None:
    import signal

    import torch

    # Ctrl-C is for the parent, which stops the pool
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)
    os.environ["LNSDEPLOY_THREADS"] = "1"


def _train_config(job: _Job) -> Any:
    from lnsdeploy.training.trainer import config_from_options

    config, fmt = job.config, job.format
    return config_from_options(
        data=config.data,
        data_dir=config.data_dir,
        model=job.model,
        bits=fmt.bits if fmt else 8,
        gamma=fmt.gamma if fmt else 8,
        as_float=fmt is None,
        optimizer=config.optimizer,
        epochs=config.epochs,
        seed=job.seed,
    )


def _train_command(job: _Job) -> str:
    config = job.config
    parts = ["lnsdeploy", "train", "--data", config.data]
    if config.data_dir:
        parts += ["--data-dir", str(config.data_dir)]
    parts += ["--model", job.model]
    parts += ["--float"] if job.format is None else ["--bits", str(job.format.bits), "--gamma", str(job.format.gamma)]
    parts += ["--optimizer", config.optimizer, "--seed", str(job.seed)]
    if config.epochs:
        parts += ["--epochs", str(config.epochs)]
    return " ".join([*parts, "--out", str(job.run)])


def _run_job(job: _Job) -> dict[str, Any]:
    """Train one net and emulate it; finished parts are read back from their files."""
    from lnsdeploy.training.trainer import train

    trained = train(_train_config(job), job.run)
    if job.format is None:
        entry = {
            "model": job.model,
            "seed": job.seed,
            "accuracy": trained.accuracy,
            "command": _train_command(job),
        }
        return {"baseline": [entry], "points": [], "layers": [], "equality": []}
    digest = hashlib.sha256(read_bytes(job.run / "weights.safetensors")).hexdigest()[:16]
    kept = job.config.out / "points" / f"{job.run.name}.json"
    key = f"{__version__} {digest} {' '.join(job.config.datapaths)}"
    if kept.is_file():
        try:
            part = json.loads(kept.read_text(encoding="utf-8"))
            if part.get("key") == key:
                return dict(part["result"])
        except (ValueError, KeyError, OSError):
            pass  # a damaged file is made again
    result = _emulate_all(job, trained.accuracy)
    write_json(kept, {"key": key, "result": result})
    return result


def _emulate_all(job: _Job, trained_accuracy: float) -> dict[str, Any]:
    from lnsdeploy.datapath import load_datapath
    from lnsdeploy.emulator.compare import compare
    from lnsdeploy.emulator.executor import fastest, get_executor
    from lnsdeploy.emulator.session import emulate
    from lnsdeploy.exporters.export import lower_datapaths
    from lnsdeploy.exporters.lower import layer_errors

    fmt = job.format
    assert fmt is not None
    chosen = []
    for name in job.config.datapaths:
        datapath = load_datapath(name)
        if datapath.is_linear and fmt.fraction_bits is None:
            continue  # linear accumulation needs a power of two
        chosen.append(datapath)
    if not chosen:
        raise BadValueError(f"none of the report's datapaths takes the format {fmt}")
    source = lower_datapaths(job.run, chosen, data_dir=job.config.data_dir)
    engine = get_executor(fastest())
    points, layers, equality = [], [], []
    for datapath, exported in zip(chosen, source.exported, strict=True):
        artifact = exported.artifact(str(job.run))
        x, y = source.dataset.test_x, source.dataset.test_y
        result = emulate(artifact, engine, x, y, batch=128)
        used = artifact.graph.datapath
        point = f"{job.run.name}-{datapath.name}"
        totals = result.to_dict()
        points.append(
            {
                "id": point,
                "model": job.model,
                "bits": fmt.bits,
                "gamma": fmt.gamma,
                "seed": job.seed,
                "datapath": datapath.name,
                "fingerprint": used.fingerprint,
                "accumulate": "linear" if used.is_linear else "log",
                "description": used.describe(),
                "trained_accuracy": trained_accuracy,
                "accuracy": result.accuracy,
                "executor": engine.name,
                "macs": result.macs,
                "seconds": round(result.seconds, 4),
                "words": totals["words"],
                "saturated": totals["saturated"],
                "flushed": totals["flushed"],
                "command": f"lnsdeploy emulate {job.run} --datapath {datapath.name}",
            }
        )
        words: dict[str, Any] = {}
        engine.run(artifact, x[:ERROR_SAMPLES], visit=words.__setitem__)
        errors = layer_errors(source.float_values, artifact.graph, words)
        for layer in result.layers:
            db = errors.get(layer["name"])
            if layer["words"] == 0:
                continue
            layers.append(
                {
                    "point": point,
                    "layer": layer["name"],
                    "op": layer["op"],
                    "macs": layer["macs"],
                    "words": layer["words"],
                    "saturated": layer["saturated"],
                    "flushed": layer["flushed"],
                    "sqnr_db": None if db is None or db == float("inf") else round(db, 3),
                    "max_error": 0.0 if db == float("inf") else None,
                }
            )
        if job.seed == 0 and get_or_none("ort") is not None:
            names = dict.fromkeys(("reference", engine.name, "ort"))
            outcome = compare([get_executor(name) for name in names], artifact, x[:ERROR_SAMPLES])
            equality.append(
                {
                    "model": job.model,
                    "datapath": used.name,
                    "executors": list(outcome.executors),
                    "words_compared": outcome.words_compared,
                    "equal": outcome.equal,
                }
            )
            if not outcome.equal:
                raise BadFileError(f"{point}: the executors do not agree: {outcome.first_difference}")
    return {"baseline": [], "points": points, "layers": layers, "equality": equality}


def get_or_none(name: str) -> str | None:
    """The executor's name if it can run here."""
    from lnsdeploy.emulator.executor import availability

    return name if availability()[name] is None else None
