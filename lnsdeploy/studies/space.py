"""What a study searches: its TOML, the choices in it, and the datapath that each combination of choices is.

A choice that means nothing beside the others (a Δ method where products accumulate in the linear domain) is dropped,
and what is left has a fingerprint: two combinations of the same bits are one point, and are run once.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import random
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from lnsdeploy.datapath import (
    SPEC_VERSION,
    Datapath,
    LinearAccumulator,
    LogAccumulator,
    accumulator_from_dict,
    default_adder,
    for_format,
    load_datapath,
)
from lnsdeploy.errors import BadFileError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.fields import check_choice
from lnsdeploy.files import parse_toml, read_bytes
from lnsdeploy.formats import LNSFormat
from lnsdeploy.recipe import LayerRecipe, Match, Recipe
from lnsdeploy.training.arrays import find_arrays, names_arrays

# What may be measured of a point: how much of it is wanted, its unit.
VALUES = {
    "accuracy": ("maximize", "share of right answers"),
    "drop": ("minimize", "share of right answers lost against float32"),
    "sqnr_db": ("maximize", "dB"),
    "transistors": ("minimize", "per MAC"),
    "depth": ("minimize", "gates"),
    "energy": ("minimize", "transistor gates switched per product"),
    "table_bits": ("minimize", "bits"),
    "size_bytes": ("minimize", "bytes of weights"),
}
# Costs. Energy alone needs the operands of the net itself, and Yosys; the others are known before anything is emulated.
COSTS = ("transistors", "depth", "energy", "table_bits", "size_bytes")
CHEAP = tuple(name for name in COSTS if name != "energy")
ACCURACIES = ("post-training", "fine-tuned", "trained")
METHODS = ("grid", "random", "tpe", "nsga2")
BASELINES = ("float32", "int8", "int4", "fp8-e4m3", "fp8-e5m2")

# Choices of a space; those of one kind of accumulator are dropped beside the other.
_COMMON = ("datapath", "format", "weight", "accumulate", "lanes")
_LINEAR = (
    *("conversion", "table_bits", "constant_bits", "accumulator_bits", "psum_bits"),
    *("encoder", "shift", "overflow"),
)
_LOG = ("delta", "guard_bits", "range_bits")
PARAMETERS = (*_COMMON, *_LINEAR, *_LOG)
_NUMBERS = ("table_bits", "constant_bits", "accumulator_bits", "psum_bits", "guard_bits", "range_bits", "lanes")
# A grid of more combinations is a mistake, or a case for another method.
MAX_GRID = 200_000

Choice = str | int


@dataclass(frozen=True)
class Net:
    """A net that the study decides for: trained here, a run directory, or a float ONNX file.

    Args:
        name: in tables and file names.
        data, data_dir: the data set, by name or as an .npz file (:mod:`lnsdeploy.training.arrays`).
        model, seed, epochs, optimizer: of a training.
        run, file: a run directory, or a float ONNX file, instead of a training.
    """

    name: str
    data: str = "digits"
    data_dir: str | None = None
    model: str = "cnn"
    seed: int = 0
    epochs: int | None = None
    optimizer: str | None = None
    run: str | None = None
    file: str | None = None

    @property
    def identity(self) -> dict[str, Any]:
        """What decides its results; where the data lie does not."""
        table = {k: v for k, v in dataclasses.asdict(self).items() if v is not None and k not in ("name", "data_dir")}
        if self.file is not None:
            table["file"] = _digest_of(Path(self.file))
        if self.run is not None:
            table["run"] = _digest_of(Path(self.run) / "weights.safetensors")
        if names_arrays(self.data):
            table["data"] = _digest_of(find_arrays(self.data, None if self.data_dir is None else Path(self.data_dir)))
        return table


def _digest_of(file: Path) -> str:
    """16 hexadecimal digits of a file's bytes, which are read again only where the file has changed."""
    try:
        found = file.stat()
    except OSError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror or error}") from error
    return _digest_at(file, found.st_mtime_ns, found.st_size)


@lru_cache(maxsize=64)
def _digest_at(file: Path, changed: int, size: int) -> str:
    return hashlib.sha256(read_bytes(file)).hexdigest()[:16]


@dataclass(frozen=True)
class Constraint:
    """A bound on a value: at least `min`, at most `max`."""

    value: str
    min: float | None = None
    max: float | None = None

    def broken(self, values: Mapping[str, float | None]) -> str | None:
        """Why it is broken, or None where it holds or the value is not known."""
        found = values.get(self.value)
        if found is None:
            return None
        if self.min is not None and found < self.min:
            return f"{self.value} {found:.6g} is below {self.min:g}"
        if self.max is not None and found > self.max:
            return f"{self.value} {found:.6g} is above {self.max:g}"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {k: v for k, v in dataclasses.asdict(self).items() if v is not None}


@dataclass(frozen=True)
class Evaluate:
    """How accuracy is measured.

    Args:
        accuracy: ``"post-training"``: the float net on words; ``"fine-tuned"``: trained on in the formats of the point,
            beginning with the float net; ``"trained"``: trained in them from the start.
        epochs: of the latter two; None for 3 of fine-tuning, and the trainer's default.
        samples: test inputs, at most; 0 for all.
        part: of the test set: ``"all"``, or every second input: ``"even"``, ``"odd"``.
        calibrate: training inputs for offsets.
        sample: training inputs on which accumulators are placed.
        prune_on: a point is given up after so many inputs if it cannot keep the constraints; 0 for never.
        seed: of trainings of points.
        baselines: formats to compare with.
    """

    accuracy: str = "post-training"
    epochs: int | None = None
    samples: int = 0
    part: str = "all"
    calibrate: int = 512
    sample: int = 16
    prune_on: int = 100
    seed: int = 0
    baselines: tuple[str, ...] = BASELINES


@dataclass(frozen=True)
class Search:
    """How the space is searched.

    Args:
        method: ``"grid"``: every combination; ``"random"``: so many of them; ``"tpe"``, ``"nsga2"``: Optuna's samplers.
        trials: points, at most; 0 for all of a grid.
        seed: of what is drawn.
        generation: points that a sampler proposes before it sees the results of any of them.
    """

    method: str = "grid"
    trials: int = 0
    seed: int = 0
    generation: int = 16


@dataclass(frozen=True)
class Group:
    """Layers with formats of their own: whom it matches, and the choices."""

    name: str
    match: Match
    format: tuple[Choice, ...]


@dataclass(frozen=True, eq=False)
class Point:
    """One combination of choices, or a baseline.

    Args:
        kind: ``"lns"``, ``"float32"``, ``"int"`` or ``"fp8"``.
        net: its name.
        parameters: the choices that count.
        datapath: of LNS points; None for baselines and combinations that are no datapath.
        groups: formats of layer groups, by group.
        problem: why the combination is no datapath.
        fingerprint: of everything that decides its results.
    """

    kind: str
    net: str
    parameters: dict[str, Choice]
    datapath: Datapath | None
    groups: dict[str, str]
    problem: str | None
    fingerprint: str

    def to_dict(self) -> dict[str, Any]:
        """What a trial keeps; the study's TOML makes the point of it again."""
        return {"kind": self.kind, "net": self.net, "parameters": self.parameters}


@dataclass(frozen=True, eq=False)
class Study:
    """A study as its TOML says it.

    Args:
        name: of it.
        nets: at least one.
        objectives: value by direction.
        constraints, evaluate, search: see there.
        choices: by parameter.
        groups: of layers.
        toml: the text.
    """

    name: str
    nets: tuple[Net, ...]
    objectives: dict[str, str]
    constraints: tuple[Constraint, ...]
    evaluate: Evaluate
    search: Search
    choices: dict[str, tuple[Choice, ...]]
    groups: tuple[Group, ...]
    toml: str = field(repr=False, default="")

    def net(self, name: str) -> Net:
        """A net by its name."""
        return next(net for net in self.nets if net.name == name)

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: of all that decides which points there are and what becomes of them."""
        parts = {
            "nets": [[net.name, net.identity] for net in self.nets],
            "objectives": self.objectives,
            "constraints": [c.to_dict() for c in self.constraints],
            "evaluate": dataclasses.asdict(self.evaluate),
            "search": dataclasses.asdict(self.search),
            "choices": self.choices,
            "groups": [[g.name, g.match.to_dict(), g.format] for g in self.groups],
            "spec": SPEC_VERSION,
        }
        return _digest(parts)

    @cached_property
    def needed(self) -> frozenset[str]:
        """Values that it is decided by."""
        return frozenset({*self.objectives, *(constraint.value for constraint in self.constraints)})

    @cached_property
    def dimensions(self) -> dict[str, tuple[Choice, ...]]:
        """Every choice by name: the net, the parameters, the groups' formats."""
        made: dict[str, tuple[Choice, ...]] = {"net": tuple(net.name for net in self.nets)}
        return made | self.choices | {f"{group.name}.format": group.format for group in self.groups}

    @property
    def combinations(self) -> int:
        """How many there are, those that come to the same included."""
        return math.prod(len(values) for values in self.dimensions.values())

    def point(self, chosen: Mapping[str, Choice]) -> Point:
        """The point of a combination: choices that mean nothing are dropped."""
        net = str(chosen["net"])
        used = {k: v for k, v in chosen.items() if k != "net"}
        groups = {name.removesuffix(".format"): str(value) for name, value in used.items() if "." in name}
        try:
            datapath = _built(tuple(sorted((k, v) for k, v in used.items() if "." not in k)))
            other = _LOG if datapath.is_linear else _LINEAR
            used = {k: v for k, v in used.items() if k not in other}
            for text in groups.values():
                if text != "same":
                    fmt = LNSFormat.parse(text)
                    datapath.with_formats(fmt, fmt)
            key: Any = [datapath.fingerprint, groups]
            problem = None
        except LNSError as error:
            datapath, problem = None, str(error)
            key = problem
        parts = {"net": self.net(net).identity, "point": key, "how": self._how()}
        return Point("lns", net, used, datapath, groups, problem, _digest(parts))

    def baseline(self, net: str, name: str) -> Point:
        """A baseline's point."""
        parts = {"net": self.net(net).identity, "baseline": name, "how": self._how()}
        kind = "float32" if name == "float32" else "fp8" if name.startswith("fp8") else "int"
        return Point(kind, net, {"baseline": name}, None, {}, None, _digest(parts))

    def from_dict(self, table: Mapping[str, Any]) -> Point:
        """Inverse of :meth:`Point.to_dict`."""
        if "baseline" in table["parameters"]:
            return self.baseline(table["net"], table["parameters"]["baseline"])
        return self.point({"net": table["net"], **table["parameters"]})

    def _how(self) -> Any:
        table = dataclasses.asdict(self.evaluate)
        table.pop("baselines")
        # a point that is given up in one study is not one that another finished
        return [table, [c.to_dict() for c in self.constraints], SPEC_VERSION]

    def baselines(self) -> list[Point]:
        """Every net's."""
        return [self.baseline(net.name, name) for net in self.nets for name in self.evaluate.baselines]

    def grid(self) -> Iterator[Point]:
        """Every point once, in the order of the file."""
        if self.combinations > MAX_GRID:
            raise BadValueError(
                f"the grid has {self.combinations:,} combinations, more than {MAX_GRID:,}: "
                'leave some out, or let search.method be "random", "tpe" or "nsga2"'
            )
        seen: set[str] = set()
        names = list(self.dimensions)
        for values in itertools.product(*self.dimensions.values()):
            point = self.point(dict(zip(names, values, strict=True)))
            if point.fingerprint not in seen:
                seen.add(point.fingerprint)
                yield point

    def drawn(self) -> Iterator[Point]:
        """Points at random, each once; ends where none is found any more."""
        generator = random.Random(self.search.seed)
        seen: set[str] = set()
        vain = 0
        while vain < 2000:
            point = self.point({name: generator.choice(values) for name, values in self.dimensions.items()})
            vain = vain + 1 if point.fingerprint in seen else 0
            if not vain:
                seen.add(point.fingerprint)
                yield point

    def datapaths(self, point: Point) -> list[Datapath]:
        """The datapath of a point, and those of its groups."""
        assert point.datapath is not None
        formats = [LNSFormat.parse(text) for text in point.groups.values() if text != "same"]
        return [point.datapath, *(point.datapath.with_formats(fmt, fmt) for fmt in formats)]

    def recipe(self, point: Point) -> Recipe | None:
        """Formats by layer, where the point has groups that differ."""
        assert point.datapath is not None
        rules = []
        for group in self.groups:
            text = point.groups[group.name]
            if text != "same":
                fmt = LNSFormat.parse(text)
                rules.append((group.match, LayerRecipe(fmt, fmt)))
        if not rules:
            return None
        return Recipe(LayerRecipe(point.datapath.weight, point.datapath.activation), tuple(rules))


def _digest(parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------
# From choices to a datapath


def parse_delta(text: str) -> dict[str, Any]:
    """A Δ method from ``"mitchell"`` or ``"table(entries=64, step=2)"``, as the TOML of datapaths has it."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if match is None:
        raise BadValueError(f'delta: {text!r} is not a method such as "mitchell" or "table(entries=64, step=2)"')
    made: dict[str, Any] = {"method": match[1]}
    for part in filter(None, (p.strip() for p in (match[2] or "").split(","))):
        key, equals, value = part.partition("=")
        if not equals:
            raise BadValueError(f"delta: {part!r} in {text!r} is not of the form name=value")
        value = value.strip()
        made[key.strip()] = int(value) if re.fullmatch(r"-?\d+", value) else value
    return made


@lru_cache(maxsize=8192)
def _built(chosen: tuple[tuple[str, Choice], ...]) -> Datapath:
    """As :func:`build_datapath`: making tables takes longer than looking them up."""
    return build_datapath(dict(chosen))


def build_datapath(chosen: Mapping[str, Choice]) -> Datapath:
    """The datapath of some choices (without net and groups).

    Raises:
        LNSError: the combination is none; the message says why.
    """
    named = chosen.get("datapath")
    base = None if named is None or named == "default" else load_datapath(str(named))
    activation = LNSFormat.parse(str(chosen["format"])) if "format" in chosen else base.activation if base else None
    if activation is None:
        raise BadValueError("a space without datapaths needs formats")
    text = str(chosen.get("weight", "same"))
    weight = LNSFormat.parse(text) if text != "same" else activation
    if base is None:
        made = for_format(activation, weight=weight)
    else:
        made = base.with_formats(weight, activation)
    kind = str(chosen.get("accumulate", "linear" if made.is_linear else "log"))
    check_choice("accumulate", kind, ("linear", "log"))
    values: dict[str, Any] = {}
    if kind == "linear":
        old = made.accumulate if isinstance(made.accumulate, LinearAccumulator) else LinearAccumulator()
        full = made.gamma.bit_length() - 1
        for name in ("conversion", "constant_bits", "shift", "overflow"):
            if name in chosen:
                values[name] = chosen[name]
        if "accumulator_bits" in chosen:
            values["bits"] = chosen["accumulator_bits"]
        if "psum_bits" in chosen:
            values["psum_bits"] = chosen["psum_bits"] or None
        if "table_bits" in chosen:
            values["table_bits"] = min(full, 10) if chosen["table_bits"] == "full" else chosen["table_bits"]
        if "encoder" in chosen:
            encoder, _, bits = str(chosen["encoder"]).partition(":")
            values |= {"encoder": encoder, "encoder_bits": int(bits) if bits.isdecimal() else None}
        if "lanes" in chosen:
            values["lanes"] = chosen["lanes"]
        accumulate: LinearAccumulator | LogAccumulator = dataclasses.replace(old, **values)
    else:
        ready = isinstance(made.accumulate, LogAccumulator)
        old_log = made.accumulate if isinstance(made.accumulate, LogAccumulator) else LogAccumulator()
        guard = int(chosen.get("guard_bits", old_log.guard_bits if ready else 2))
        beyond = old_log.bits - made.output.magnitude_bits - old_log.guard_bits if ready else 1
        width = made.output.magnitude_bits + guard + int(chosen.get("range_bits", beyond))
        values = {"bits": width, "guard_bits": guard, "lanes": chosen.get("lanes", old_log.lanes)}
        accumulate = dataclasses.replace(old_log, **values)
        if "delta" in chosen:
            table = {"kind": "log", **values, "delta": parse_delta(str(chosen["delta"]))}
            accumulate = accumulator_from_dict("accumulate", table)
    if accumulate == made.accumulate:
        return made
    add = made.add if accumulate.__class__ is made.accumulate.__class__ else default_adder(made.output)
    name = f"{kind}-{weight}-{activation}" if weight != activation else f"{kind}-{activation}"
    made = dataclasses.replace(made, name=name, accumulate=accumulate, add=add, citation="", notes="")
    # names tell points apart in tables; the fingerprint alone decides
    return dataclasses.replace(made, name=f"{name}-{made.fingerprint[:6]}")


# ---------------------------------------------------------------------------------------------------
# From TOML


def load_study(path: str | Path, *, data_dir: str | Path | None = None) -> Study:
    """A study from a TOML file; paths in it are relative to the file.

    Args:
        data_dir: where data sets lie, instead of where the file says.

    Raises:
        BadFileError: not TOML, or not a study; the message names the field.
    """
    file = Path(path)
    return parse_study(
        read_bytes(file).decode("utf-8", "replace"), where=str(file), folder=file.parent, data_dir=data_dir
    )


def parse_study(
    text: str, *, where: str = "study", folder: Path | None = None, data_dir: str | Path | None = None
) -> Study:
    """A study from TOML text; see :func:`load_study`."""
    data = parse_toml(text, where=where)
    try:
        study = _study(data, text, folder or Path())
        if data_dir is None:
            return study
        nets = tuple(dataclasses.replace(net, data_dir=str(data_dir)) for net in study.nets)
        return dataclasses.replace(study, nets=nets)
    except LNSError as error:
        raise BadFileError(f"{where}: {error}") from error


def _study(data: Mapping[str, Any], text: str, folder: Path) -> Study:
    _known(data, ("name", "net", "evaluate", "search", "objectives", "constraint", "space"), "study")
    name = data.get("name")
    if not isinstance(name, str) or not re.fullmatch(r"[\w. -]{1,80}", name):
        raise BadValueError(f"name must be letters, digits, '-', '_', '.' and spaces, not {name!r}")
    nets = tuple(_net(entry, folder) for entry in _tables(data, "net"))
    if not nets:
        raise BadValueError("a study needs at least one [[net]]")
    if len({net.name for net in nets}) < len(nets):
        raise BadValueError("two nets have the same name")
    objectives = _objectives(data.get("objectives", {"accuracy": "maximize", "transistors": "minimize"}))
    constraints = tuple(_constraint(entry) for entry in _tables(data, "constraint"))
    evaluate = _filled(Evaluate, data.get("evaluate", {}), "evaluate")
    check_choice("evaluate.accuracy", evaluate.accuracy, ACCURACIES)
    check_choice("evaluate.part", evaluate.part, ("all", "even", "odd"))
    for baseline in evaluate.baselines:
        if baseline not in BASELINES:
            raise UnknownNameError("baseline", baseline, BASELINES)
    if evaluate.accuracy != "post-training" and any(net.file or net.run for net in nets):
        raise BadValueError(
            f'evaluate.accuracy = "{evaluate.accuracy}" trains nets, and needs them as data and model; '
            'for a file or a run it must be "post-training"'
        )
    search = _filled(Search, data.get("search", {}), "search")
    check_choice("search.method", search.method, METHODS)
    if search.method != "grid" and search.trials < 1:
        raise BadValueError(f'search.trials must be at least 1 with method = "{search.method}"')
    choices, groups = _space(data.get("space"))
    return Study(name, nets, objectives, constraints, evaluate, search, choices, groups, text)


def _known(table: Any, known: tuple[str, ...], place: str) -> None:
    if not isinstance(table, Mapping):
        raise BadValueError(f"{place} must be a table, not {table!r}")
    for key in table:
        if key not in known:
            raise UnknownNameError(f"field of {place}", key, known)


def _tables(data: Mapping[str, Any], name: str) -> list[Any]:
    found = data.get(name, [])
    if not isinstance(found, list):
        raise BadValueError(f"{name} must be a list of tables: [[{name}]]")
    return found


def _filled(kind: Any, table: Any, place: str) -> Any:
    fields = {f.name: f for f in dataclasses.fields(kind)}
    _known(table, tuple(fields), place)
    values = {}
    for key, value in table.items():
        wanted = fields[key].type
        if "tuple" in str(wanted):
            good = isinstance(value, list) and all(isinstance(v, str) for v in value)
            value = tuple(value) if good else value
        elif "int" in str(wanted):
            good = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        else:
            good = isinstance(value, str)
        if not good:
            kind_text = str(wanted).removesuffix(" | None")
            raise BadValueError(f"{place}.{key} must be of the kind {kind_text}, not {value!r}")
        values[key] = value
    for f in fields.values():
        if f.default is dataclasses.MISSING and f.name not in values:
            raise BadValueError(f"{place}.{f.name} is missing")
    return kind(**values)


def _net(entry: Any, folder: Path) -> Net:
    net: Net = _filled(Net, entry, "net")
    if not re.fullmatch(r"[\w.-]{1,80}", net.name):
        raise BadValueError(f"net.name must be letters, digits, '-', '_' and '.', not {net.name!r}")
    if net.file is not None and net.run is not None:
        raise BadValueError(f"net {net.name!r} has both a file and a run")
    places: dict[str, Any] = {
        k: str(folder / v) for k in ("file", "run", "data_dir") if (v := getattr(net, k)) is not None
    }
    if names_arrays(net.data) and net.data_dir is None:
        places["data"] = str(folder / net.data)
    return dataclasses.replace(net, **places)


def _objectives(table: Any) -> dict[str, str]:
    if not isinstance(table, Mapping) or not table:
        raise BadValueError('objectives must be a table such as accuracy = "maximize"')
    for name, direction in table.items():
        if name not in VALUES:
            raise UnknownNameError("objective", name, VALUES)
        check_choice(f"objectives.{name}", direction, ("maximize", "minimize"))
    return dict(table)


def _constraint(entry: Any) -> Constraint:
    _known(entry, ("value", "min", "max"), "constraint")
    if entry.get("value") not in VALUES:
        raise UnknownNameError("value of a constraint", entry.get("value"), VALUES)
    bounds = {k: entry[k] for k in ("min", "max") if k in entry}
    if not bounds or any(isinstance(v, bool) or not isinstance(v, (int, float)) for v in bounds.values()):
        raise BadValueError(f"constraint on {entry['value']}: needs a number min, max or both")
    return Constraint(entry["value"], **bounds)


def _space(table: Any) -> tuple[dict[str, tuple[Choice, ...]], tuple[Group, ...]]:
    if table is None:
        raise BadValueError("the table [space] is missing")
    _known(table, (*PARAMETERS, "group"), "space")
    choices = {name: _choices(name, values) for name, values in table.items() if name != "group"}
    if "format" not in choices and "datapath" not in choices:
        raise BadValueError("space needs formats or datapaths to choose from")
    groups: list[Group] = []
    for entry in _tables(table, "group"):
        _known(entry, ("name", "pattern", "type", "position", "format"), "space.group")
        name = entry.get("name")
        if not isinstance(name, str) or not re.fullmatch(r"[\w-]{1,40}", name) or name in [g.name for g in groups]:
            raise BadValueError(f"space.group.name must be a word of its own, not {name!r}")
        match = Match(entry.get("pattern", "*"), entry.get("type"), entry.get("position"))
        groups.append(Group(name, match, _choices("format", entry.get("format"))))
    return choices, tuple(groups)


def _choices(name: str, values: Any) -> tuple[Choice, ...]:
    given = values if isinstance(values, list) else [values]
    if not given:
        raise BadValueError(f"space.{name} has nothing to choose from")
    for value in given:
        number = isinstance(value, int) and not isinstance(value, bool)
        if name in _NUMBERS and not number and not (name == "table_bits" and value == "full"):
            raise BadValueError(f"space.{name} takes numbers, not {value!r}")
        if name not in _NUMBERS and not isinstance(value, str):
            raise BadValueError(f"space.{name} takes text, not {value!r}")
        # better told at once than as a hundred failed points
        if name == "datapath" and value != "default":
            load_datapath(value)
        elif name in ("format", "weight") and value != "same":
            LNSFormat.parse(value)
        elif name == "delta":
            LogAccumulator(delta=_delta(value))
        elif name == "accumulate":
            check_choice("space.accumulate", value, ("linear", "log"))
    return tuple(dict.fromkeys(given))


def _delta(text: str) -> Any:
    made = accumulator_from_dict("space", {"kind": "log", "delta": parse_delta(text)})
    assert isinstance(made, LogAccumulator)
    return made.delta
