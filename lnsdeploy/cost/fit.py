"""The points that the analytical model is fitted to, and the fit: ``python -m lnsdeploy.cost.fit`` (docs/cost.md).

``--synthesise`` adds the points that `points.json` lacks (half an hour of two cores for all of them; stopped by
whatever, the same command goes on); without it the coefficients of `model.json` are fitted to the points that are
there, and the errors on those held out are printed.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from lnsdeploy.cost import model, synthesis, units
from lnsdeploy.datapath import Datapath, LinearAccumulator, LogAccumulator, load_datapath, named_datapaths
from lnsdeploy.delta import METHODS, Delta
from lnsdeploy.errors import LNSError
from lnsdeploy.files import read_bytes, write_text
from lnsdeploy.formats import LNSFormat
from lnsdeploy.rtl.designs import Design

Floats = npt.NDArray[np.float64]

HERE = Path(__file__).parent
POINTS = HERE / "points.json"
MODEL = HERE / "model.json"
RUNS = 3
# Pseudo-random configurations, in three draws: the first of all sizes, the second of more but smaller ones, and the
# third, drawn when the model had its form, for nothing but the error.
COUNT, SEED = 20, 7
MORE, MORE_SEED = 72, 2026
FRESH, FRESH_SEED = 40, 20261128
# A point's error from which on it counts linearly; how strongly coefficients are held to what they start from.
TOLERATED = 0.15
PART_STIFFNESS, KIND_STIFFNESS = 0.15, 0.3
# Lanes of the baselines' elements that are synthesised; between them, and past the last, the model is linear.
BASELINE_LANES = (1, 2, 4, 16)
# Remainder bins, of which the pseudo-random configurations have few: log2 of their number, width, overflow.
BINNED = (
    (2, 16, "saturate"),
    (3, 16, "saturate"),
    (3, 20, "wrap"),
    (3, 12, "saturate"),
    (2, 28, "saturate"),
    (1, 24, "wrap"),
    (3, 24, "wrap"),
    (2, 24, "saturate"),
)


@dataclass(frozen=True)
class Point:
    """One synthesised unit.

    Args:
        datapath: its datapath.
        unit: as :func:`lnsdeploy.cost.units.units_of` names it, ``pe`` without its lanes.
        lanes: of the element; 1 for other units.
        held_out: not fitted to; see :func:`configurations`.
        transistors, depth: medians of perturbed runs.
        low, high: the range of the transistors.
    """

    datapath: Datapath
    unit: str
    lanes: int
    held_out: bool
    transistors: float
    low: float
    high: float
    depth: float

    @property
    def key(self) -> tuple[str, str, str, int]:
        """What tells points apart; a configuration that is changed under its name is another."""
        return self.datapath.name, self.datapath.fingerprint, self.unit, self.lanes

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Point:
        """Inverse of :meth:`to_dict`."""
        median, low, high = data["transistors"]
        path = Datapath.from_dict(data["datapath"], where="points.json")
        return cls(path, data["unit"], data["lanes"], data["held_out"], median, low, high, data["depth"])

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "unit": self.unit,
            "lanes": self.lanes,
            "held_out": self.held_out,
            "transistors": [self.transistors, self.low, self.high],
            "depth": self.depth,
            "datapath": self.datapath.canonical() | {"name": self.datapath.name},
        }


# Ways to make Δ that are drawn from, and their parameters: tuples are drawn from too, None is a step that fits γ.
DRAWN: Sequence[tuple[str, Mapping[str, Any]]] = (
    ("exact", {}),
    ("exact", {}),
    ("table", {"entries": (8, 12, 20, 32), "step": None, "sample": ("left", "middle")}),
    ("table", {"entries": (16, 64), "step": None}),
    ("interpolated", {"segments": (4, 8), "spacing": ("octave", "equal"), "slope_bits": (5, 8)}),
    ("cotransform", {"split": (2, 3, 4)}),
    ("mitchell", {}),
    ("shift", {}),
    ("polynomial", {"degree": (1, 2), "segments": 4, "spacing": ("octave", "equal"), "width": (6, 8)}),
    ("cordic", {"iterations": (6, 8), "width": (8, 12)}),
    ("max", {}),
)


def _method(rng: random.Random, gamma: int) -> Delta:
    step = max(gamma >> rng.randint(0, 2), 1)
    kind, ranges = rng.choice(DRAWN)
    drawn = {name: rng.choice(values) if isinstance(values, tuple) else values for name, values in ranges.items()}
    return METHODS[kind](**{name: step if value is None else value for name, value in drawn.items()})


def _drawn_datapath(rng: random.Random, name: str, linear: bool, widths: Sequence[int]) -> tuple[Datapath, int] | None:
    """A pseudo-random datapath and its lanes; None where a method does not fit the γ that was drawn."""
    bits = rng.choice(widths)
    # 4 to 16 octaves a word
    octaves = rng.choice((2, 3, 3, 4))
    gamma = 1 << min(max(bits - 1 - octaves, 0), 8)
    word = LNSFormat(bits, gamma)
    lanes = rng.choice((1, 1, 2, 4))
    accumulate: LinearAccumulator | LogAccumulator
    f = gamma.bit_length() - 1
    if linear:
        bins = rng.random() < 0.3
        encoder = rng.choice(("exact", "table", "mitchell"))
        accumulate = LinearAccumulator(
            bits=rng.choice((12, 16, 20, 24, 32)),
            conversion="bin" if bins else "product",
            table_bits=min(rng.choice((0, 1, 2, 3, f)), 2 if bins else 5, f),
            constant_bits=rng.choice((3, 4, 6, 8)),
            overflow=rng.choice(("saturate", "wrap")),
            shift=rng.choice(("truncate", "round")),
            encoder=encoder,
            encoder_bits=rng.choice((3, 4, 6)) if encoder == "table" else None,
            lanes=lanes,
        )
    else:
        guard = rng.choice((0, 0, 1, 2)) if gamma < 64 else 0
        accumulate = LogAccumulator(
            bits=bits - 1 + guard + rng.choice((0, 0, 1)),
            guard_bits=guard,
            delta=_method(rng, gamma << guard),
            lanes=lanes,
        )
    try:
        made = Datapath(name, word, word, word, accumulate, load_datapath("gauss-8").add)
        made.tables()
    except LNSError:
        return None
    return made, lanes


def _draw(name: str, count: int, seed: int, widths: Sequence[int]) -> Iterator[tuple[int, Datapath, int]]:
    """Index, datapath and lanes of those of a draw that are datapaths; every other one sums linearly."""
    rng = random.Random(seed)
    for index in range(count):
        drawn = _drawn_datapath(rng, f"{name}-{index}", bool(index % 2), widths)
        if drawn is not None:
            yield index, *drawn


def configurations() -> Iterator[tuple[Datapath, int, bool]]:
    """Datapath, lanes, and whether it is held out: pseudo-random ones first, then the named ones.

    Held out are, of the first draw, two in eight; of the second every third; of those with bins every fourth; all of
    the third; and all named ones.
    """
    for index, path, lanes in _draw("point", COUNT, SEED, (4, 5, 6, 8, 8, 10, 12)):
        yield path, lanes, index % 8 in (2, 3)
    adder = load_datapath("gauss-8").add
    for index, (table_bits, width, overflow) in enumerate(BINNED):
        word = LNSFormat((6, 8)[index % 2], 8)
        linear = LinearAccumulator(width, "bin", table_bits, (4, 8)[index % 3 == 0], overflow=overflow)
        yield Datapath(f"bins-{index}", word, word, word, linear, adder), 1, index % 4 == 3
    for index, path, lanes in _draw("more", MORE, MORE_SEED, (4, 5, 6, 7, 8, 8, 9, 10)):
        yield path, lanes, index // 2 % 3 == 2
    for _, path, lanes in _draw("fresh", FRESH, FRESH_SEED, (4, 5, 6, 7, 8, 8, 9, 10, 12)):
        yield path, lanes, True
    for name in named_datapaths():
        yield load_datapath(name), 1, True


def designs_of(datapath: Datapath, lanes: int) -> dict[str, Design]:
    """Units of a configuration by name, ``pe`` without its lanes."""
    found = units.units_of(datapath, 1)
    if lanes > 1:
        found["pe"] = units.pe(datapath, lanes)
    return found


def synthesise(path: Path) -> None:
    """Synthesise every point that the file lacks, and write it after each: it is valid at all times.

    Points of another version of the tool, or of other steps, are made anew.
    """
    kept, others = load_points(path) if path.is_file() else ([], {})
    same = (others.get("tool"), others.get("steps")) == (synthesis.best().version, list(synthesis.GATES))
    made = {point.key: point for point in kept} if same else {}
    beside: dict[str, Any] = dict(others.get("baselines", {})) if same else {}

    def write() -> None:
        _write(path, [made[key].to_dict() for key in sorted(made)], beside)

    for lanes in BASELINE_LANES:
        for name, design in units.baselines(lanes).items():
            if name not in beside:
                cost = synthesis.synthesise(design, runs=RUNS)
                t = cost.transistors
                beside[name] = {"transistors": [t.median, t.min, t.max], "depth": cost.depth.median}
                write()
    missing: list[tuple[float, Point, Design]] = []
    for datapath, lanes, held_out in configurations():
        try:
            sizes = model.estimate(datapath, lanes).units
            designs = designs_of(datapath, lanes)
        except LNSError as error:
            click.echo(f"{datapath.name}: {error}", err=True)
            continue
        for unit, design in designs.items():
            at = lanes if unit == "pe" else 1
            point = Point(datapath, unit, at, held_out, 0, 0, 0, 0)
            if point.key not in made:
                missing.append((sizes[f"pe-{lanes}" if unit == "pe" else unit].transistors, point, design))
    # small ones first: whenever it is stopped, there are as many as could be
    missing.sort(key=lambda entry: entry[0])
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(synthesis.synthesise, design, runs=RUNS): point for _, point, design in missing}
        for job in as_completed(jobs):
            point = jobs[job]
            try:
                cost = job.result()
            except LNSError as error:
                click.echo(f"{point.datapath.name} {point.unit}: {error}", err=True)
                continue
            t, depth = cost.transistors, cost.depth.median
            made[point.key] = replace(point, transistors=t.median, low=t.min, high=t.max, depth=depth)
            write()
            click.echo(f"{point.datapath.name:<24} {point.unit:<24} {t.median:>8.0f} {depth:>4.0f}")


def _write(path: Path, points: list[dict[str, Any]], beside: dict[str, Any]) -> None:
    lines = ",\n".join(json.dumps(point, sort_keys=True) for point in points)
    made_by = f'"tool": {json.dumps(synthesis.best().version)}, "steps": {json.dumps(synthesis.GATES)}'
    text = f'{{{made_by}, "runs": {RUNS},\n"baselines": {json.dumps(beside)},\n"points": [\n{lines}\n]}}\n'
    write_text(path, text)


def load_points(path: Path = POINTS) -> tuple[list[Point], dict[str, Any]]:
    """Points, and the file's other fields."""
    data = json.loads(read_bytes(path))
    return [Point.from_dict(point) for point in data.pop("points")], data


def _drawn(points: list[Point]) -> list[model.Sketch]:
    return [_units(point.datapath, point.lanes)[point.unit] for point in points]


@lru_cache(maxsize=512)
def _units(datapath: Datapath, lanes: int) -> dict[str, model.Sketch]:
    return model.sketches(datapath, lanes)[0]


def _solve(terms: Floats, fixed: Floats, target: Floats, prior: Floats, stiffness: Floats) -> Floats:
    """Coefficients c of the least squares of log((Σ terms · Πc + fixed) / target), and of log(c / prior) by stiffness.

    Errors of more than TOLERATED count linearly, lest a single odd point turns all others.

    Args:
        terms: [points, first, second]: what a pair of coefficients, one of each group, multiplies.
        fixed, target: [points].
        prior, stiffness: [first + second].
    """
    first = terms.shape[1]
    now = np.log(prior)
    for _ in range(200):
        each = terms * np.exp(now[:first])[None, :, None] * np.exp(now[first:])[None, None, :]
        total = each.sum(axis=(1, 2)) + fixed
        slope = np.concatenate([each.sum(axis=2), each.sum(axis=1)], axis=1) / total[:, None]
        error = np.log(total / target)
        weight = np.minimum(1.0, TOLERATED / np.maximum(np.abs(error), 1e-9))
        gram = (slope * weight[:, None]).T @ slope + np.diag(stiffness**2)
        right = (slope * weight[:, None]).T @ error + stiffness**2 * (now - np.log(prior))
        step = np.linalg.solve(gram, right)
        now = now - np.clip(step, -0.5, 0.5)
        if np.abs(step).max() < 1e-10:
            break
    solved: Floats = np.exp(now)
    return solved


def fit(points: list[Point]) -> dict[str, Any]:
    """Coefficients fitted to the points that are not held out, without the errors and the baselines."""
    used = [point for point in points if not point.held_out]
    sketches = _drawn(used)
    kinds, parts = list(model.KINDS), list(model.PARTS)
    terms = np.zeros((len(used), len(parts), len(kinds)))
    for row, sketch in zip(terms, sketches, strict=True):
        for (part, kind), count in sketch.gates.items():
            row[parts.index(part), kinds.index(kind)] = count
    registers = np.array([float(synthesis.FLIP_FLOP * sum(s.registers.values())) for s in sketches])
    solved = _solve(
        terms,
        registers,
        np.array([p.transistors for p in used]),
        np.array([1.0] * len(parts) + list(model.KINDS.values())),
        np.array([PART_STIFFNESS] * len(parts) + [KIND_STIFFNESS] * len(kinds)),
    )
    found: dict[str, Any] = {
        "parts": dict(zip(parts, solved[: len(parts)], strict=True)),
        "kinds": dict(zip(kinds, solved[len(parts) :], strict=True)),
        "levels": dict.fromkeys(parts, model.GATES_A_LEVEL),
    }
    target = np.array([max(p.depth, 1.0) for p in used])
    # which of an element's paths is the longest depends on the coefficients
    for _ in range(4):
        longest = [
            max(s.paths, key=lambda path: sum(found["levels"][k] * n for k, n in path.items())) for s in sketches
        ]
        rows = np.array([[[float(path.get(part, 0))] for part in parts] for path in longest])
        stiffness = np.array([PART_STIFFNESS] * len(parts) + [1e6])
        prior = np.array([model.GATES_A_LEVEL] * len(parts) + [1.0])
        levels = _solve(rows, np.zeros(len(used)), target, prior, stiffness)
        found["levels"] = dict(zip(parts, levels[:-1], strict=True))
    return {name: {key: round(float(value), 4) for key, value in row.items()} for name, row in found.items()}


@dataclass(frozen=True)
class Error:
    """Of an estimate against the synthesised median: 0.1 is ten per cent too much."""

    point: Point
    transistors: float
    depth: float


def errors(points: list[Point], coefficients: Mapping[str, Any]) -> list[Error]:
    """Relative errors on every point."""
    found = []
    for point, sketch in zip(points, _drawn(points), strict=True):
        made = model.price(sketch, coefficients)
        found.append(Error(point, made.transistors / point.transistors - 1, made.depth / max(point.depth, 1.0) - 1))
    return found


def _summary(found: list[Error]) -> dict[str, Any]:
    told: dict[str, Any] = {"points": len(found)}
    for name in ("transistors", "depth"):
        sizes = sorted(abs(getattr(error, name)) for error in found)
        told[name] = {
            "median": round(sizes[len(sizes) // 2], 3),
            "nine_in_ten": round(sizes[int(len(sizes) * 0.9)], 3),
            "largest": round(sizes[-1], 3),
            "within_20_percent": round(sum(size <= 0.2 for size in sizes) / len(sizes), 3),
        }
    return told


def _baselines(data: Mapping[str, Any]) -> dict[str, Any]:
    """Medians: units by name, and elements by lanes, of which the units are those of one lane."""
    units_: dict[str, Any] = {}
    elements: dict[str, list[dict[str, Any]]] = {}
    for name, row in data.items():
        plain = {"transistors": row["transistors"][0], "depth": row["depth"]}
        if " pe-" in name:
            head, rest = name.split(" pe-")
            lanes, tail = rest.split(",", 1)
            key = f"{head} pe-N,{tail}"
            elements.setdefault(key, []).append({"lanes": int(lanes)} | plain)
        else:
            units_[name] = plain
    for name, rows in elements.items():
        rows.append({"lanes": 1} | units_[name.replace("pe-N", "mac")])
        rows.sort(key=lambda row: row["lanes"])
    return {"units": units_, "elements": elements}


def make_model(points: list[Point], others: Mapping[str, Any]) -> dict[str, Any]:
    """`model.json`."""
    fitted = fit(points)
    found = errors(points, fitted)
    # multipliers are all alike, and would flatter
    kept = [error for error in found if error.point.held_out and error.point.unit != "multiplier"]
    return {
        "tool": others["tool"],
        **fitted,
        "errors": {
            "fitted": _summary([e for e in found if not e.point.held_out and e.point.unit != "multiplier"]),
            "held_out": _summary(kept),
        },
        "baselines": _baselines(others["baselines"]),
    }


@click.command()
@click.option("--synthesise", "again", is_flag=True, help="Add the points that are missing first.")
@click.option("--check", is_flag=True, help="Write nothing; only print the errors of a fit.")
def main(again: bool, check: bool) -> None:
    """Fit the analytical model to the synthesised points, and print its errors on those held out."""
    if again:
        synthesise(POINTS)
    points, others = load_points()
    made = make_model(points, others)
    click.echo(f"{'held out':<22} {'unit':<24} {'synthesised':>11} {'model':>8} {'error':>7} {'depth':>7}")
    for error in sorted(errors(points, made), key=lambda e: (e.point.unit, e.point.datapath.name)):
        p = error.point
        if p.held_out:
            click.echo(
                f"{p.datapath.name:<22} {p.unit + (f'-{p.lanes}' if p.lanes > 1 else ''):<24} {p.transistors:>11.0f} "
                f"{p.transistors * (1 + error.transistors):>8.0f} {error.transistors:>+7.1%} {error.depth:>+7.1%}"
            )
    click.echo(json.dumps(made["errors"], indent=1))
    if not check:
        write_text(MODEL, json.dumps(made, indent=1) + "\n")


if __name__ == "__main__":
    main()
