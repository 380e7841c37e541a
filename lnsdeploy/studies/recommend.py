"""`lnsdeploy recommend`: the cheapest datapath that holds a promise for a net, and why (docs/studies.md).

The search sees one half of the test set; what it finds is measured once more on the other, cheapest first, until enough
have held there. So a datapath that was lucky on the first half is found out.
"""

from __future__ import annotations

import dataclasses
import tempfile
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnsdeploy.errors import BadValueError, UnknownNameError
from lnsdeploy.files import dump_toml, make_folder, read_toml
from lnsdeploy.studies.points import Outcome, evaluate, float_file
from lnsdeploy.studies.pricing import require_tools
from lnsdeploy.studies.search import Progress
from lnsdeploy.studies.space import COSTS, Point, Study, parse_study
from lnsdeploy.studies.study import show_value
from lnsdeploy.training.arrays import names_arrays

# What is tried without --space: every width from 3 to 8 with the usual γ, each kind of accumulation, table and Δ.
SPACE: dict[str, Any] = {
    "format": ["3:1", "4:1", "4:2", "5:2", "5:4", "6:4", "7:4", "7:8", "8:8"],
    "accumulate": ["linear", "log"],
    "table_bits": [0, 1, "full"],
    "accumulator_bits": [16, 20, 24],
    "conversion": ["product"],
    "encoder": ["exact"],
    "delta": ["exact", "mitchell"],
    "guard_bits": [0, 2],
}


@dataclass(frozen=True)
class Candidate:
    """A datapath that held on the half that was searched.

    Args:
        point, outcome: of the search.
        held_out: what became of it on the other half; None where it was not asked.
        reason: why it is not recommended; None where it is.
    """

    point: Point
    outcome: Outcome
    held_out: Outcome | None
    reason: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        assert self.point.datapath is not None
        values = self.outcome.values
        return {
            "datapath": self.point.datapath.name,
            "datapath_toml": self.point.datapath.to_toml(),
            "description": self.point.datapath.describe(),
            "fingerprint": self.point.datapath.fingerprint,
            "format": str(self.point.datapath.activation),
            "parameters": self.point.parameters,
            "accuracy": values.get("accuracy"),
            "drop": _points(values.get("drop")),
            "held_out_accuracy": None if self.held_out is None else self.held_out.values.get("accuracy"),
            "held_out_drop": None if self.held_out is None else _points(self.held_out.values.get("drop")),
            **{name: values.get(name) for name in COSTS},
            "reason": self.reason,
        }


def _points(drop: float | None) -> float | None:
    return None if drop is None else round(100 * drop, 4)


@dataclass(frozen=True)
class Recommendation:
    """The answer.

    Args:
        chosen: the cheapest datapath that holds on both halves; None if there is none.
        runners_up: the next that hold.
        failed: cheaper ones that held on the searched half alone.
        tried: points by what became of them.
        nearest: of those that do not hold, the one that loses least.
        by: the cost that was to be small.
        max_drop: what may be lost, in points.
        inputs: how many were searched, and held out.
        float_accuracy: of the float net, on both.
    """

    chosen: Candidate | None
    runners_up: tuple[Candidate, ...]
    failed: tuple[Candidate, ...]
    tried: dict[str, int]
    nearest: Candidate | None
    by: str
    max_drop: float
    inputs: tuple[int, int]
    float_accuracy: tuple[float, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        best = self.chosen
        return {
            "recommended": None if best is None else best.to_dict(),
            "datapath": None if best is None or best.point.datapath is None else best.point.datapath.name,
            "accuracy": None if best is None else best.outcome.values.get("accuracy"),
            "transistors": None if best is None else best.outcome.values.get("transistors"),
            "margin": None if best is None else round(self.max_drop - self.worst(best), 4),
            "runners_up": [candidate.to_dict() for candidate in self.runners_up],
            "failed_held_out": [candidate.to_dict() for candidate in self.failed],
            "nearest": None if self.nearest is None else self.nearest.to_dict(),
            "tried": self.tried,
            "cost": self.by,
            "max_drop": self.max_drop,
            "inputs": {"searched": self.inputs[0], "held_out": self.inputs[1]},
            "float_accuracy": {"searched": self.float_accuracy[0], "held_out": self.float_accuracy[1]},
        }

    def worst(self, candidate: Candidate) -> float:
        """The larger loss of both halves, in points."""
        found = [o.values.get("drop") for o in (candidate.outcome, candidate.held_out) if o is not None]
        return max(100 * (drop if drop is not None else 1.0) for drop in found)

    def text(self) -> str:
        """For people."""
        counts = ", ".join(f"{n} {state}" for state, n in self.tried.items())
        lines = [f"tried {sum(self.tried.values())} datapaths ({counts}); {self.max_drop:g} points may be lost"]

        def line(candidate: Candidate) -> str:
            d = candidate.point.datapath
            assert d is not None
            held = None if candidate.held_out is None else candidate.held_out.values.get("drop")
            words = f"{self.by} {show_value(self.by, candidate.outcome.values.get(self.by))}, "
            words += f"loses {_points(candidate.outcome.values.get('drop')):.2f} points"
            words += "" if held is None else f", {_points(held):.2f} on inputs that were held out"
            return f"{d.name} ({d.describe()}): {words}"

        if self.chosen is None:
            lines.append("none holds" + (f"; the nearest: {line(self.nearest)}" if self.nearest else ""))
        else:
            lines.append(
                f"recommended: {line(self.chosen)}; margin {self.max_drop - self.worst(self.chosen):.2f} points"
            )
        lines += [f"runner-up: {line(candidate)}" for candidate in self.runners_up]
        lines += [f"cheaper, but: {line(candidate)}: {candidate.reason}" for candidate in self.failed]
        return "\n".join(lines)


def recommend(
    net: str | Path,
    max_drop: float,
    *,
    data: str | None = None,
    data_dir: str | Path | None = None,
    space: str | Path | None = None,
    by: str = "transistors",
    runners_up: int = 3,
    workers: int = 1,
    out: str | Path | None = None,
    progress: Progress | None = None,
) -> Recommendation:
    """Find the cheapest datapath that loses no more than allowed.

    Args:
        net: a float ONNX file or a run directory.
        max_drop: percentage points of accuracy that may be lost against float32, on either half.
        data, data_dir: labelled test inputs; by default those of the run.
        space: a TOML file with the table ``[space]`` of a study, or nothing but its fields.
        by: the cost that is to be small, one of transistors, depth, energy, table_bits, size_bytes.
        runners_up: further ones that hold.
        workers: processes.
        out: a folder, to go on after an interruption; by default nothing is kept.
        progress: called with points finished, points in all, and a word.

    Raises:
        LNSError: the net, the data or the space is wrong.
    """
    from lnsdeploy.studies.search import Job, default_storage, search

    if by not in COSTS:
        raise UnknownNameError("cost", by, COSTS)
    if not 0 <= max_drop <= 100:
        raise BadValueError(f"max_drop is in percentage points, 0 to 100, not {max_drop}")
    study = _study(Path(net), max_drop, data, data_dir, space, by)
    require_tools(study.needed)
    with ExitStack() as stack:
        folder = make_folder(out) if out is not None else Path(stack.enter_context(tempfile.TemporaryDirectory()))
        float_file(study, study.nets[0], folder)
        job = Job(study.toml, str(Path.cwd()), str(folder.absolute()), default_storage(folder))
        found = search(study, job, workers=workers, progress=progress)
        return _decide(study, folder, found, by, max_drop, runners_up)


def _study(
    net: Path,
    max_drop: float,
    data: str | None,
    data_dir: str | Path | None,
    space: str | Path | None,
    by: str,
) -> Study:
    """The search as a study, on the first half of the test set."""
    entry: dict[str, Any] = {"name": net.stem.replace(" ", "-") or "net"}
    if net.is_dir():
        from lnsdeploy.training.run import load_run

        config = load_run(net).config
        entry |= {"run": str(net.absolute()), "data": data or config.data}
        data_dir = data_dir or config.data_dir
    else:
        if data is None:
            raise BadValueError(f"{net}: name the data set with labels that it is judged by: --data digits, or mnist …")
        entry |= {"file": str(net.absolute()), "data": data}
    if names_arrays(entry["data"]) and data_dir is None:
        entry["data"] = str(Path(entry["data"]).absolute())
    if data_dir is not None:
        entry["data_dir"] = str(Path(data_dir).absolute())
    chosen: Any = SPACE
    if space is not None:
        table = read_toml(space)
        chosen = table.get("space", table)
    text = dump_toml(
        {
            "name": "recommend",
            "net": [entry],
            "evaluate": {"part": "even", "baselines": ["float32"]},
            "search": {"method": "grid"},
            "objectives": {"accuracy": "maximize", by: "minimize"},
            "constraint": [{"value": "drop", "max": max_drop / 100}],
            "space": chosen,
        }
    )
    return parse_study(text, where="recommend")


def _decide(study: Study, folder: Path, found: Any, by: str, max_drop: float, runners_up: int) -> Recommendation:
    other = dataclasses.replace(study, evaluate=dataclasses.replace(study.evaluate, part="odd", prune_on=0))
    tried: dict[str, int] = {}
    held: list[tuple[Point, Outcome]] = []
    rest: list[tuple[Point, Outcome]] = []
    for _, point, outcome, _ in found:
        if point.kind != "lns":
            continue
        tried[outcome.state] = tried.get(outcome.state, 0) + 1
        if outcome.state == "complete":
            held.append((point, outcome))
        elif outcome.values.get("drop") is not None:
            rest.append((point, outcome))
    # of equal cost, what is more accurate
    held.sort(key=lambda entry: (entry[1].values[by] or 0.0, -(entry[1].values["accuracy"] or 0.0)))
    good: list[Candidate] = []
    failed: list[Candidate] = []
    for point, outcome in held:
        if len(good) > runners_up:
            break
        checked = evaluate(other, point, folder)
        if checked.state == "complete":
            good.append(Candidate(point, outcome, checked, None))
        else:
            failed.append(Candidate(point, outcome, checked, f"on the held-out half {checked.reason}"))
    nearest = None
    if not good and (rest or failed):
        everything = [(c.point, c.outcome) for c in failed] + rest
        point, outcome = min(everything, key=lambda entry: entry[1].values.get("drop") or 0.0)
        nearest = Candidate(point, outcome, None, outcome.reason)
    both = _halves(study, other, folder)
    cheapest = good[0].outcome.values[by] if good else None
    cheaper = [c for c in failed if cheapest is None or (c.outcome.values[by] or 0) <= (cheapest or 0)]
    return Recommendation(
        good[0] if good else None,
        tuple(good[1:]),
        tuple(cheaper),
        tried,
        nearest,
        by,
        max_drop,
        (len(both[0].x), len(both[1].x)),
        (both[0].accuracy, both[1].accuracy),
    )


def _halves(study: Study, other: Study, folder: Path) -> tuple[Any, Any]:
    from lnsdeploy.studies.points import prepare

    return prepare(study, study.nets[0], folder), prepare(other, other.nets[0], folder)
