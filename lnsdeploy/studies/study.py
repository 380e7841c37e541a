"""`lnsdeploy study`: from a study's TOML to its points, their front, and the files that show them (docs/studies.md)."""

from __future__ import annotations

import csv
import io
import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from lnsdeploy.errors import BadFileError
from lnsdeploy.files import make_folder, write_json, write_text
from lnsdeploy.studies.points import Outcome, float_file, float_name, histograms
from lnsdeploy.studies.pricing import require_tools
from lnsdeploy.studies.search import Job, Progress, default_storage, search
from lnsdeploy.studies.space import VALUES, Point, Study, load_study
from lnsdeploy.training.arrays import names_arrays


@dataclass(frozen=True, eq=False)
class StudyResult:
    """A finished study.

    Args:
        results: what ``study.json`` has.
        files: path by name.
    """

    results: dict[str, Any] = field(repr=False)
    files: dict[str, Path]

    @property
    def points(self) -> list[dict[str, Any]]:
        """All points, baselines first."""
        return list(self.results["points"])

    @property
    def front(self) -> list[dict[str, Any]]:
        """LNS points that no other LNS point of their net is better than."""
        return [point for point in self.points if point["kind"] == "lns" and point["pareto"]]

    def to_dict(self) -> dict[str, Any]:
        """What the command line prints as JSON."""
        lns = [point for point in self.points if point["kind"] == "lns"]
        return {
            "trials": len(lns),
            "states": {s: n for s in STATES if (n := sum(point["state"] == s for point in lns))},
            "pareto": [_brief(point) for point in self.front],
            "baselines": [_brief(point) for point in self.points if point["kind"] != "lns"],
            "report": str(self.files.get("study.html", self.files["study.json"])),
            "files": {name: str(path) for name, path in self.files.items()},
            "fingerprint": self.results["study"]["fingerprint"],
        }

    def text(self) -> str:
        """For people: each net's baselines, and its front from the cheapest on."""
        names = ["accuracy", *(o["name"] for o in self.results["objectives"] if o["name"] != "accuracy")]
        lines = [f"{'net':<16} {'point':<34} " + " ".join(f"{name:>12}" for name in names)]
        for net in self.results["study"]["nets"]:
            own = [point for point in self.points if point["net"] == net["name"]]
            shown = [point for point in own if point["kind"] != "lns"]
            front = [point for point in own if point["kind"] == "lns" and point["pareto"]]
            shown += sorted(front, key=lambda p: (p["values"].get(names[-1]) or 0, p["id"]))
            lines += [
                f"{net['name']:<16} {point['label']:<34} "
                + " ".join(f"{show_value(name, point['values'].get(name)):>12}" for name in names)
                for point in shown
            ]
        wrong = [point for point in self.points if point["state"] == "failed"]
        lines += [f"{point['net']:<16} {point['label']:<34} failed: {point['reason']}" for point in wrong[:MAX_TOLD]]
        if len(wrong) > MAX_TOLD:
            lines.append(f"and {len(wrong) - MAX_TOLD} more failed")
        return "\n".join(lines)


# Failed points whose reasons are printed.
MAX_TOLD = 5
STATES = ("complete", "pruned", "infeasible", "failed")


def show_value(name: str, value: float | None) -> str:
    """A value for people."""
    if value is None:
        return "–"
    return f"{100 * value:.2f} %" if name in ("accuracy", "drop") else f"{value:,.1f}".removesuffix(".0")


def _brief(point: Mapping[str, Any]) -> dict[str, Any]:
    values = point["values"]
    return {
        "id": point["id"],
        "net": point["net"],
        "label": point["label"],
        "datapath": point["datapath"],
        "format": point["format"],
        "fingerprint": point["fingerprint"],
        **{name: values.get(name) for name in VALUES},
    }


def run_study(
    source: str | Path | Study,
    out: str | Path,
    *,
    storage: str | None = None,
    workers: int = 1,
    ray: str | None = None,
    command: str = "",
    folder: Path | None = None,
    data_dir: str | Path | None = None,
    progress: Progress | None = None,
    page: bool = True,
) -> StudyResult:
    """Run a study, or what is left of it, and write its files.

    Args:
        source: a TOML file, or a study.
        out: the folder of nets, runs, results, and by default of the SQLite file.
        storage: a database URL that Optuna knows.
        workers: processes.
        ray: the address of a Ray cluster; see :func:`~.search.search`.
        command: the command line, for the page.
        folder: what paths in the TOML are relative to; that of the file.
        data_dir: where data sets lie, instead of where the file says.
        progress: called with points finished, points in all, and a word.
        page: write the HTML page too.

    Raises:
        LNSError: the study, a net or the storage is wrong. Single points that fail do not end it.
    """
    if isinstance(source, Study):
        study, base = source, folder or Path()
    else:
        study, base = load_study(source, data_dir=data_dir), Path(source).parent
    require_tools(study.needed)
    target = make_folder(out)
    for net in study.nets:
        # once, before workers wait for one another; and a net that is wrong ends the study at once
        if progress:
            progress(0, 1, f"net {net.name}")
        float_file(study, net, target)
    job = Job(study.toml, str(base.absolute()), str(target.absolute()), storage or default_storage(target))
    if data_dir is not None:
        job = replace(job, data_dir=str(Path(data_dir).absolute()))
    found = search(study, job, workers=workers, ray=ray, progress=progress)
    results = assemble(study, found, command=command)
    results["histograms"] = _histograms(study, results, found, target)
    return StudyResult(results, write_files(results, target, page=page))


def _histograms(study: Study, results: Mapping[str, Any], found: Any, out: Path) -> list[dict[str, Any]]:
    """Of each net's most accurate point on the front."""
    made: list[dict[str, Any]] = []
    for net in study.nets:
        able = [p for p in results["points"] if p["net"] == net.name and p["kind"] == "lns" and p["pareto"]]
        if able:
            best = max(able, key=lambda p: (p["values"]["accuracy"] or 0, -p["id"]))
            made += histograms(study, next(point for place, point, *_ in found if place == best["id"]), out)
    return made


# ---------------------------------------------------------------------------------------------------
# Results


def assemble(study: Study, found: Sequence[tuple[int, Point, Outcome, Any]], *, command: str = "") -> dict[str, Any]:
    """The data of ``study.json``."""
    from lnsdeploy import __version__
    from lnsdeploy.versions import installed, machine

    points = [_entry(study, place, point, outcome) for place, point, outcome, _ in found]
    for net in study.nets:
        own = [point for point in points if point["net"] == net.name]
        mark_front([point for point in own if point["kind"] == "lns"], study.objectives)
        for point in own:
            if point["kind"] != "lns":
                # a baseline is on the front where no LNS point is better
                rivals = [other for other in own if other["kind"] == "lns"]
                point["pareto"] = _known(point, study.objectives) and not any(
                    _dominates(other, point, study.objectives) for other in rivals if _known(other, study.objectives)
                )
    return {
        "study": {
            "name": study.name,
            "fingerprint": study.fingerprint,
            "command": command,
            "toml": study.toml,
            "versions": {"lnsdeploy": __version__} | {k: v or "" for k, v in installed().items()},
            "machine": machine(),
            "nets": [{"name": net.name, **net.identity} for net in study.nets],
            "finished": True,
        },
        "objectives": [
            {"name": name, "direction": direction, "unit": VALUES[name][1]}
            for name, direction in study.objectives.items()
        ],
        "constraints": [constraint.to_dict() for constraint in study.constraints],
        "points": points,
        "delta_tables": _delta_tables(study, found),
        "histograms": [],
    }


def _entry(study: Study, place: int, point: Point, outcome: Outcome) -> dict[str, Any]:
    datapath = point.datapath
    values = {name: None if (v := outcome.values.get(name)) is None else _round(v) for name in VALUES}
    if datapath is not None:
        label = datapath.name
        form = str(datapath.activation)
        if datapath.weight != datapath.activation:
            form = f"{datapath.weight},{datapath.activation}"
    else:
        label = str(point.parameters.get("baseline", "no datapath"))
        form = str(point.parameters.get("baseline") or point.parameters.get("format", ""))
    groups = ", ".join(f"{name} {fmt}" for name, fmt in point.groups.items() if fmt != "same")
    return {
        "id": place,
        "kind": point.kind,
        "label": f"{label} ({groups})" if groups else label,
        "state": outcome.state,
        "reason": outcome.reason,
        "net": point.net,
        "parameters": point.parameters,
        "format": form,
        "description": datapath.describe() if datapath else "",
        "datapath": datapath.name if datapath else None,
        "datapath_toml": datapath.to_toml() if datapath else "",
        "datapath_fingerprint": datapath.fingerprint if datapath else None,
        "fingerprint": point.fingerprint,
        "values": values,
        "ranges": outcome.ranges,
        "breakdown": outcome.breakdown,
        "cost_source": outcome.cost_source,
        "layers": outcome.layers,
        "command": _command(study, point),
        "pareto": False,
    }


def _round(value: float) -> float:
    return int(value) if value == int(value) else round(value, 6)


def _command(study: Study, point: Point) -> str:
    """What shows a point again: its net through the TOML that the table has."""
    if point.datapath is None:
        return ""
    net = study.net(point.net)
    data = str(Path(net.data).absolute()) if names_arrays(net.data) and net.data_dir is None else net.data
    line = ["lnsdeploy", "export", f"nets/{float_name(net)}", "--datapath", "point.toml", "--calibration", data]
    line += ["--calibrate-on", str(study.evaluate.calibrate), "--sample", str(study.evaluate.sample)]
    line += ["-o", "point.lns.onnx"]
    where = [] if net.data_dir is None else ["--data-dir", net.data_dir]
    again = ["lnsdeploy", "emulate", "point.lns.onnx", "--data", data]
    return f"{shlex.join([*line, *where])} && {shlex.join([*again, *where])}"


def _known(point: Mapping[str, Any], objectives: Mapping[str, str]) -> bool:
    return point["state"] == "complete" and all(point["values"][name] is not None for name in objectives)


def _dominates(a: Mapping[str, Any], b: Mapping[str, Any], objectives: Mapping[str, str]) -> bool:
    """Whether `a` is as good in everything, and better in something."""
    better = False
    for name, direction in objectives.items():
        x, y = a["values"][name], b["values"][name]
        if direction == "minimize":
            x, y = -x, -y
        if x < y:
            return False
        better = better or x > y
    return better


def mark_front(points: Sequence[dict[str, Any]], objectives: Mapping[str, str]) -> None:
    """Set ``pareto`` of the complete points that no other is better than."""
    able = [point for point in points if _known(point, objectives)]
    for point in able:
        point["pareto"] = not any(_dominates(other, point, objectives) for other in able)


def _delta_tables(study: Study, found: Sequence[tuple[int, Point, Outcome, Any]]) -> list[dict[str, Any]]:
    """The Δ⁺ tables that log points used, once each, beside the real function; at most eight."""
    from lnsdeploy.delta import Exact

    made: dict[str, dict[str, Any]] = {}
    for _, point, _, _ in found:
        datapath = point.datapath
        if datapath is None or datapath.is_linear or len(made) == 8:
            continue
        log = datapath.log
        gamma = datapath.gamma << log.guard_bits
        label = f"{point.parameters.get('delta', log.delta.kind)}, {gamma} codes an octave"
        if label in made:
            continue
        got = [int(v) for v in log.delta.tables(gamma).plus]
        length = min(max(len(got), len(Exact().tables(gamma).plus)), 16 * gamma)
        got = (got + [0] * length)[:length]
        exact = [round(gamma * math.log2(1 + 2 ** (-d / gamma)), 4) for d in range(length)]
        made[label] = {
            "label": label,
            "gamma": gamma,
            "d": list(range(length)),
            "approximation": got,
            "exact": exact,
            "ulp": [round(a - b, 4) for a, b in zip(got, exact, strict=True)],
        }
    return list(made.values())


COLUMNS = (
    *("id", "net", "kind", "label", "state", "reason", "format", "datapath", "description", "pareto"),
    *VALUES,
    *("fingerprint", "command"),
)


def write_files(results: dict[str, Any], out: Path, *, page: bool = True) -> dict[str, Path]:
    """``study.json``, ``points.csv``, and the page with its pictures."""
    paths: dict[str, Path] = {}
    if page:
        from lnsdeploy.studies.study_page import write_page

        named = [net["name"] for net in results["study"]["nets"]]
        paths |= write_page({**results, "study": {**results["study"], "nets": named}}, out)
    # after the page, whose own tables leave out what it does not show
    paths |= {"study.json": out / "study.json", "points.csv": out / "points.csv"}
    write_json(paths["study.json"], results)
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for point in results["points"]:
        row = {**point, **point["values"]}
        writer.writerow(["" if row[name] is None else row[name] for name in COLUMNS])
    write_text(paths["points.csv"], text.getvalue())
    return paths


def read_results(path: str | Path) -> dict[str, Any]:
    """The data of a study's folder or of its ``study.json``.

    Raises:
        BadFileError: there is none, or it is no study's.
    """
    import json

    from lnsdeploy.files import read_bytes

    file = Path(path)
    file = file / "study.json" if file.is_dir() else file
    try:
        found = json.loads(read_bytes(file))
    except ValueError as error:
        raise BadFileError(f"{file}: not JSON ({error})") from error
    if not isinstance(found, dict) or not {"study", "points", "objectives"} <= found.keys():
        raise BadFileError(f"{file}: not the results of a study")
    return found
