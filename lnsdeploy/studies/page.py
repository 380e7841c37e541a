"""The report page: measured results as one HTML file, with PNG, CSV and JSON beside it.

The input is a plain dictionary (:func:`validate` lists its fields), the output a folder:

- ``report.html``: self-contained; the chart library and the data are inside it and nothing is fetched;
- ``results.json``: the input; ``points.csv`` and ``layers.csv``: its two tables;
- ``accuracy.png`` and ``layers.png``: the main charts as pictures.

All statistics are made here, once; the page's script and the pictures only draw them. The same input
gives the same bytes.
"""

from __future__ import annotations

import base64
import csv
import hashlib
import io
import json
import math
import re
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnsdeploy.errors import BadValueError, MissingDependencyError
from lnsdeploy.files import make_folder, write_bytes, write_json, write_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Distances below the float32 mean, in percentage points, for which the narrowest width is reported.
MARGINS = (0.5, 1.5)

POINT_COLUMNS = (
    "id",
    "model",
    "bits",
    "gamma",
    "seed",
    "datapath",
    "fingerprint",
    "accumulate",
    "description",
    "trained_accuracy",
    "accuracy",
    "executor",
    "macs",
    "seconds",
    "words",
    "saturated",
    "flushed",
    "command",
)
LAYER_COLUMNS = (
    "point",
    "layer",
    "op",
    "macs",
    "words",
    "saturated",
    "flushed",
    "sqnr_db",
    "max_error",
)

# Okabe and Ito's palette, distinguishable without full colour vision; every line also has a marker and a
# dash of its own. The order is also that of the page's script (report.js).
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
MARKERS = ("o", "s", "D", "^", "v", "P", "X", "p")
DASHES: tuple[Any, ...] = (
    "solid",
    (0, (6, 3)),
    (0, (1.5, 2)),
    (0, (6, 2, 1.5, 2)),
    (0, (10, 4)),
    (0, (3, 1.5)),
)
MINUS = "\N{MINUS SIGN}"
THIN = "\N{NARROW NO-BREAK SPACE}"


# ---------------------------------------------------------------------------------------------------------
# Checking the input


def _bad(field: str, wanted: str, value: object) -> BadValueError:
    shown = repr(value)
    if len(shown) > 80:
        shown = shown[:77] + "..."
    return BadValueError(f"results: {field} must be {wanted}, not {shown}")


def _text(field: str, value: object) -> None:
    if not isinstance(value, str):
        raise _bad(field, "text", value)


def _name(field: str, value: object) -> None:
    if not isinstance(value, str) or not value.strip():
        raise _bad(field, "text that is not empty", value)


def _integer(low: int, high: int | None = None) -> Callable[[str, object], None]:
    def check(field: str, value: object) -> None:
        wanted = f"an integer of at least {low}" if high is None else f"an integer from {low} to {high}"
        if isinstance(value, bool) or not isinstance(value, int):
            raise _bad(field, wanted, value)
        if value < low or (high is not None and value > high):
            raise _bad(field, wanted, value)

    return check


def _number(
    low: float | None = None, high: float | None = None, *, optional: bool = False
) -> Callable[[str, object], None]:
    wanted = "a finite number"
    if low is not None and high is not None:
        wanted = f"a number from {low:g} to {high:g}"
    elif low is not None:
        wanted = f"a finite number of at least {low:g}"
    if optional:
        wanted += ", or None"

    def check(field: str, value: object) -> None:
        if value is None and optional:
            return
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise _bad(field, wanted, value)
        if not math.isfinite(value) or (low is not None and value < low):
            raise _bad(field, wanted, value)
        if high is not None and value > high:
            raise _bad(field, wanted, value)

    return check


def _choice(*names: str) -> Callable[[str, object], None]:
    def check(field: str, value: object) -> None:
        if value not in names:
            raise _bad(field, " or ".join(repr(name) for name in names), value)

    return check


def _fingerprint(field: str, value: object) -> None:
    if not isinstance(value, str) or not re.fullmatch(r"[0-9a-f]{16}", value):
        raise _bad(field, "16 hexadecimal digits (0-9, a-f)", value)


def _boolean(field: str, value: object) -> None:
    if not isinstance(value, bool):
        raise _bad(field, "True or False", value)


def _names(field: str, value: object) -> None:
    if not isinstance(value, list) or len(value) < 2:
        raise _bad(field, "a list of at least two names", value)
    for index, item in enumerate(value):
        _name(f"{field}[{index}]", item)


def _mapping(field: str, value: object) -> None:
    if not isinstance(value, dict):
        raise _bad(field, "a mapping of names to values", value)
    for key, item in value.items():
        if isinstance(item, (dict, list)):
            raise _bad(f"{field}[{key!r}]", "a single value", item)


_Fields = Mapping[str, Callable[[str, object], None]]

_TOP: _Fields = {
    "title": _name,
    "lnsdeploy": _name,
    "created": _name,
    "machine": _mapping,
    "command": _text,
    "seconds": _number(0),
    "data": _mapping,
    "recipe": _mapping,
}
_DATA: _Fields = {"name": _name, "train": _integer(1), "test": _integer(1), "source": _text}
_BASELINE: _Fields = {"model": _name, "seed": _integer(0), "accuracy": _number(0, 1), "command": _text}
_POINT: _Fields = {
    "id": _name,
    "model": _name,
    "bits": _integer(2, 32),
    "gamma": _integer(1),
    "seed": _integer(0),
    "datapath": _name,
    "fingerprint": _fingerprint,
    "accumulate": _choice("linear", "log"),
    "description": _text,
    "trained_accuracy": _number(0, 1, optional=True),
    "accuracy": _number(0, 1),
    "executor": _name,
    "macs": _integer(0),
    "seconds": _number(0),
    "words": _integer(0),
    "saturated": _integer(0),
    "flushed": _integer(0),
    "command": _text,
}
_LAYER: _Fields = {
    "point": _name,
    "layer": _name,
    "op": _text,
    "macs": _integer(0),
    "words": _integer(0),
    "saturated": _integer(0),
    "flushed": _integer(0),
    "sqnr_db": _number(optional=True),
    "max_error": _number(0, optional=True),
}
_EQUALITY: _Fields = {
    "model": _name,
    "executors": _names,
    "words_compared": _integer(0),
    "equal": _boolean,
}


def _clean(value: object) -> Any:
    """Plain Python values that JSON can carry: numpy scalars, paths, tuples and odd keys converted."""
    if isinstance(value, Mapping):
        return {str(key): _clean(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_clean(item) for item in value]
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        # File names may hold bytes that are not UTF-8; Python keeps them as lone surrogates.
        return value.encode("utf-8", "replace").decode("utf-8")
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return _clean(value.item())
    return _clean(str(value))


def _check(where: str, record: object, fields: _Fields) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise _bad(where or "the input", "a mapping of names to values", record)
    for name, check in fields.items():
        field = f"{where}.{name}" if where else name
        if name not in record:
            raise BadValueError(f"results: {field} is missing")
        check(field, record[name])
    return record


def _records(results: Mapping[str, Any], name: str, fields: _Fields) -> list[dict[str, Any]]:
    if name not in results:
        raise BadValueError(f"results: {name} is missing")
    value = results[name]
    if not isinstance(value, list):
        raise _bad(name, "a list", value)
    return [_check(f"{name}[{index}]", record, fields) for index, record in enumerate(value)]


def _normalise(results: object) -> dict[str, Any]:
    """A checked copy of `results` in plain Python values; what is not a number and may be absent is None."""
    clean = _clean(results)
    if not isinstance(clean, dict):
        raise _bad("the input", "a mapping of names to values", results)
    layers = clean.get("layers")
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict):
            if layer.get("sqnr_db") == math.inf and layer.get("max_error") is None:
                layer["max_error"] = 0.0
            _without_nan(layer, ("sqnr_db", "max_error"))
    points = clean.get("points")
    for point in points if isinstance(points, list) else []:
        if isinstance(point, dict):
            _without_nan(point, ("trained_accuracy",))
    for name in ("machine", "recipe", "data"):
        if isinstance(clean.get(name), dict):
            _without_nan(clean[name], tuple(clean[name]))

    _check("", clean, _TOP)
    _check("data", clean["data"], _DATA)
    checked_points = _records(clean, "points", _POINT)
    baseline = _records(clean, "baseline", _BASELINE)
    checked_layers = _records(clean, "layers", _LAYER)
    _records(clean, "equality", _EQUALITY)
    if not checked_points:
        raise BadValueError("results: points is empty; a report needs at least one emulated point")
    _unique("baseline", baseline, ("model", "seed"))
    _unique("points", checked_points, ("id",))
    _unique(
        "points",
        checked_points,
        ("model", "datapath", "fingerprint", "bits", "gamma", "seed", "executor"),
    )
    _unique("layers", checked_layers, ("point", "layer"))
    for where, records in (("points", checked_points), ("layers", checked_layers)):
        for index, record in enumerate(records):
            for name in ("saturated", "flushed"):
                if record[name] > record["words"]:
                    wanted = f"at most the {record['words']} words of that record"
                    raise _bad(f"{where}[{index}].{name}", wanted, record[name])
    known = {point["id"] for point in checked_points}
    for index, layer in enumerate(checked_layers):
        if layer["point"] not in known:
            raise _bad(f"layers[{index}].point", "the id of one of the points", layer["point"])
    try:
        json.dumps(clean, allow_nan=False)
    except ValueError as error:
        raise BadValueError(f"results: a field that the page does not use is not JSON: {error}") from error
    return clean


def _without_nan(record: dict[str, Any], names: Sequence[str]) -> None:
    for name in names:
        value = record.get(name)
        if isinstance(value, float) and not math.isfinite(value):
            record[name] = None


def _unique(where: str, records: Sequence[Mapping[str, Any]], names: Sequence[str]) -> None:
    seen: dict[tuple[Any, ...], int] = {}
    for index, record in enumerate(records):
        key = tuple(record[name] for name in names)
        if key in seen:
            same = ", ".join(f"{name} {record[name]!r}" for name in names)
            raise BadValueError(f"results: {where}[{index}] repeats {where}[{seen[key]}] ({same})")
        seen[key] = index


def validate(results: Mapping[str, Any]) -> None:
    """Check that `results` has all that the page needs.

    Fields (units in brackets; ``?`` marks what may be None; other fields are kept and not shown):

    - ``title``, ``lnsdeploy`` (its version), ``created`` (ISO 8601), ``command``: text;
      ``seconds`` [s]; ``machine`` and ``recipe``: flat mappings;
      ``data``: ``name``, ``train`` and ``test`` (images), ``source``;
    - ``baseline``: float32 nets: ``model``, ``seed``, ``accuracy`` (fraction of the test split), ``command``;
    - ``points``: emulated nets: ``id``, ``model``, ``bits``, ``gamma``, ``seed``, ``datapath``,
      ``fingerprint``, ``accumulate`` (``"linear"`` or ``"log"``), ``description``, ``trained_accuracy``?
      and ``accuracy`` (fractions), ``executor``, ``macs``, ``seconds`` [s], ``words``, ``saturated``,
      ``flushed`` (words), ``command``; and, where wanted, ``family``, the name of the line that the point
      belongs to (otherwise the datapath's name without its width);
    - ``layers``: ``point``, ``layer``, ``op``, ``macs``, ``words``, ``saturated``, ``flushed``,
      ``sqnr_db``? [dB; infinity where the layer has no error], ``max_error``? [largest absolute difference
      of decoded values];
    - ``equality``: ``model``, ``executors``, ``words_compared``, ``equal``, and, where wanted, ``datapath``.

    Raises:
        BadValueError: a field is missing, of the wrong type, out of range, or repeats another.
    """
    _normalise(results)


# ---------------------------------------------------------------------------------------------------------
# Statistics


def _spread(values: Sequence[float]) -> dict[str, Any]:
    """Mean, sample standard deviation (None for one value), least and largest of `values`."""
    return {
        "n": len(values),
        "mean": statistics.fmean(values),
        "sd": statistics.stdev(values) if len(values) > 1 else None,
        "min": min(values),
        "max": max(values),
    }


def _by_seed(points: Sequence[Mapping[str, Any]], field: str) -> list[float]:
    """One value a seed: executors that ran the same net count once."""
    seeds: dict[int, list[float]] = defaultdict(list)
    for point in points:
        if point[field] is not None:
            seeds[point["seed"]].append(point[field])
    return [statistics.fmean(values) for _, values in sorted(seeds.items())]


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None


def _families(points: Sequence[Mapping[str, Any]]) -> dict[tuple[str, str], str]:
    """The line that each (datapath, fingerprint) belongs to: the datapath's name without its width.

    A name used at several widths says nothing about the width and is kept. Where that would put two
    different datapaths of one format on the same line, each keeps its full name.
    """
    widths: dict[str, set[int]] = defaultdict(set)
    prints: dict[tuple[str, int, int], set[str]] = defaultdict(set)
    for point in points:
        widths[point["datapath"]].add(point["bits"])
        prints[point["datapath"], point["bits"], point["gamma"]].add(point["fingerprint"])
    several = {name for (name, _, _), found in prints.items() if len(found) > 1}

    def full(point: Mapping[str, Any]) -> str:
        name: str = point["datapath"]
        return f"{name} ({point['fingerprint'][:6]})" if name in several else name

    def short(point: Mapping[str, Any]) -> str:
        if isinstance(point.get("family"), str) and point["family"].strip():
            return str(point["family"])
        name = full(point)
        if len(widths[point["datapath"]]) > 1:
            return name
        name = re.sub(r"[-_ ]u?\d+:\d+", "", name)
        return re.sub(rf"[-_ ]{point['bits']}(?=$|[-_ ])", "", name) or point["datapath"]

    members: dict[tuple[str, int, int, str], set[tuple[str, str]]] = defaultdict(set)
    for point in points:
        key = (point["datapath"], point["fingerprint"])
        members[point["model"], point["bits"], point["gamma"], short(point)].add(key)
    crowded = {family for (_, _, _, family), found in members.items() if len(found) > 1}
    return {
        (point["datapath"], point["fingerprint"]): full(point) if short(point) in crowded else short(point)
        for point in points
    }


def _config(points: Sequence[Mapping[str, Any]], family: str, label: str) -> dict[str, Any]:
    """Statistics over the seeds of one model on one datapath and format."""
    first = points[0]
    trained = _by_seed(points, "trained_accuracy")
    words = sum(point["words"] for point in points)
    return {
        "label": label,
        "format": f"{first['bits']}:{first['gamma']}",
        "family": family,
        **{
            name: first[name]
            for name in (
                "model",
                "bits",
                "gamma",
                "datapath",
                "fingerprint",
                "accumulate",
                "description",
                "macs",
            )
        },
        "points": [point["id"] for point in points],
        "accuracy": _spread(_by_seed(points, "accuracy")),
        "trained": _spread(trained) if trained else None,
        "seconds": statistics.fmean(point["seconds"] for point in points),
        "words": words,
        "saturated": _share(sum(point["saturated"] for point in points), words),
        "flushed": _share(sum(point["flushed"] for point in points), words),
    }


def _layer_cell(layers: Sequence[Mapping[str, Any]]) -> dict[str, Any] | None:
    """Statistics over the seeds of one layer in one configuration; None where it was not measured."""
    if not layers:
        return None
    words = sum(layer["words"] for layer in layers)
    sqnr = [layer["sqnr_db"] for layer in layers if layer["sqnr_db"] is not None]
    errors = [layer["max_error"] for layer in layers if layer["max_error"] is not None]
    return {
        "sqnr_db": statistics.fmean(sqnr) if sqnr else None,
        "max_error": max(errors) if errors else None,
        # No finite ratio exists where the error is zero in every word.
        "exact": not sqnr and bool(errors) and max(errors) == 0,
        "words": words,
        "saturated": _share(sum(layer["saturated"] for layer in layers), words),
        "flushed": _share(sum(layer["flushed"] for layer in layers), words),
    }


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the page and the pictures draw: `results` averaged over seeds, by model and configuration.

    A configuration is a datapath (name and fingerprint) with its format. Accuracies are fractions, as in
    the input; ``delta`` is the difference of means to float32 in percentage points.

    Returns:
        ``models``: for each model its float32 spread, configurations (widest first), layers in network
        order, and indices of the best and the narrowest good configurations; ``series``: the lines of
        the chart, shared by all models; ``gamma_at``: the γ of each width, where it is the same everywhere.

    Raises:
        BadValueError: as :func:`validate`.
    """
    return _summarise(_normalise(results))


def _summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    points: list[dict[str, Any]] = results["points"]
    families = _families(points)
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = defaultdict(list)
    gammas: dict[tuple[str, int], set[int]] = defaultdict(set)
    widths: dict[int, set[int]] = defaultdict(set)
    for point in points:
        key = ("model", "bits", "gamma", "datapath", "fingerprint")
        groups[tuple(point[name] for name in key)].append(point)
        family = families[point["datapath"], point["fingerprint"]]
        gammas[family, point["bits"]].add(point["gamma"])
        widths[point["bits"]].add(point["gamma"])
    split = {family for (family, _), found in gammas.items() if len(found) > 1}
    used: dict[str, set[int]] = defaultdict(set)
    for (family, _), found in gammas.items():
        used[family] |= found

    def line(config: Mapping[str, Any]) -> str:
        family = str(config["family"])
        if family in split or len(used[family]) == 1:
            return f"{family}, γ = {config['gamma']}"
        return f"{family}, γ by width"

    layers_of: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for layer in results["layers"]:
        layers_of[layer["point"]].append(layer)
    labels: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    for model, bits, gamma, datapath, fingerprint in groups:
        labels[model, datapath, bits, gamma].add(fingerprint)

    models = []
    for model in dict.fromkeys(point["model"] for point in points):
        configs = []
        for key, members in groups.items():
            if key[0] != model:
                continue
            _, bits, gamma, datapath, fingerprint = key
            name = datapath
            if len(labels[model, datapath, bits, gamma]) > 1:
                name = f"{datapath} ({fingerprint[:6]})"
            fmt = f"{bits}:{gamma}"
            rest = re.sub(rf"[-_ ]u?{fmt}(?![0-9])", "", name, count=1)
            label = f"{fmt} {rest}"
            members = sorted(members, key=lambda point: (point["seed"], point["id"]))
            configs.append(_config(members, families[datapath, fingerprint], label))
        configs.sort(key=lambda config: (-config["bits"], -config["gamma"], config["label"]))
        for config in configs:
            config["line"] = line(config)
        models.append(_model(model, configs, results["baseline"], layers_of))

    names = sorted(
        {(config["family"], config["gamma"], config["line"]) for model in models for config in model["configs"]},
        key=lambda item: (item[0], -item[1], item[2]),
    )
    order = {name: index for index, name in enumerate(dict.fromkeys(name for _, _, name in names))}
    for model in models:
        for config in model["configs"]:
            config["series"] = order[config["line"]]
        _place(model["configs"])
    return {
        "models": models,
        "series": list(order),
        "gamma_at": {str(bits): min(found) for bits, found in sorted(widths.items()) if len(found) == 1},
        "sqnr_limits": _sqnr_limits(models),
        "margins": list(MARGINS),
        "test": results["data"]["test"],
    }


def _place(configs: Sequence[dict[str, Any]]) -> None:
    """Where each configuration is drawn beside its width, so that seeds do not hide one another.

    Sets ``shift``, in bits, for the seeds, and ``alone``: whether its line has no other width, so that
    the mean may be moved with them.
    """
    for bits in {config["bits"] for config in configs}:
        here = sorted(
            (config for config in configs if config["bits"] == bits), key=lambda config: int(config["series"])
        )
        step = min(0.16, 0.7 / len(here))
        for slot, config in enumerate(here):
            config["shift"] = round(step * (slot - (len(here) - 1) / 2), 4) if len(here) > 1 else 0.1
    for config in configs:
        config["alone"] = sum(other["series"] == config["series"] for other in configs) == 1


def _sqnr_limits(models: Sequence[Mapping[str, Any]]) -> list[float]:
    """Ends of the SQNR's colour scale [dB], the same for all models.

    Where the noise exceeds the signal (below 0 dB) nothing is gained by telling how much by colour.
    """
    found = [
        cell["sqnr_db"]
        for model in models
        for cells in model["cells"]
        for cell in cells
        if cell is not None and cell["sqnr_db"] is not None
    ]
    if not found:
        return [0, 1]
    high = math.ceil(max(found))
    low = math.floor(min(found))
    if low < 0 < high:
        low = 0
    return [low, max(high, low + 1)]


def _model(
    model: str,
    configs: list[dict[str, Any]],
    baseline: Sequence[Mapping[str, Any]],
    layers_of: Mapping[str, Sequence[Mapping[str, Any]]],
) -> dict[str, Any]:
    runs = sorted((run for run in baseline if run["model"] == model), key=lambda run: int(run["seed"]))
    reference = _spread([run["accuracy"] for run in runs]) if runs else None
    names: dict[str, Mapping[str, Any]] = {}
    table: list[dict[str, list[Mapping[str, Any]]]] = []
    for config in configs:
        row: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
        for point in config["points"]:
            for layer in layers_of.get(point, ()):
                names.setdefault(layer["layer"], layer)
                row[layer["layer"]].append(layer)
        table.append(row)
    for config in configs:
        config["delta"] = None if reference is None else 100 * (config["accuracy"]["mean"] - reference["mean"])
    return {
        "name": model,
        "float": reference,
        "baseline": [{"seed": run["seed"], "accuracy": run["accuracy"]} for run in runs],
        "configs": configs,
        "layers": [{"name": name, "op": layer["op"], "macs": layer["macs"]} for name, layer in names.items()],
        "cells": [[_layer_cell(row.get(name, [])) for name in names] for row in table],
        "best": max(range(len(configs)), key=lambda index: (configs[index]["accuracy"]["mean"], -index)),
        "narrowest": [_narrowest(configs, margin) for margin in MARGINS],
    }


def _narrowest(configs: Sequence[Mapping[str, Any]], margin: float) -> int | None:
    """Index of the configuration of fewest bits, and of these the most accurate, within `margin` points."""
    # The means carry rounding errors of a few units in the last place: do not lose a tie to them.
    good = [
        index
        for index, config in enumerate(configs)
        if config["delta"] is not None and config["delta"] >= -margin - 1e-9
    ]
    if not good:
        return None
    return min(good, key=lambda index: (configs[index]["bits"], -configs[index]["accuracy"]["mean"], index))


# ---------------------------------------------------------------------------------------------------------
# Numbers in words


def _percent(value: float | None, digits: int = 2) -> str:
    return "–" if value is None else f"{100 * value:.{digits}f}{THIN}%"


def _plus_minus(spread: Mapping[str, Any] | None) -> str:
    """``97.72 ± 0.21 %``: mean and sample standard deviation of a spread of fractions."""
    if spread is None:
        return "–"
    if spread["sd"] is None:
        return _percent(spread["mean"])
    return f"{100 * spread['mean']:.2f} ± {100 * spread['sd']:.2f}{THIN}%"


def _points(value: float | None) -> str:
    """A signed difference in percentage points, e.g. ``−0.12``."""
    if value is None:
        return "–"
    text = f"{value:+.2f}".replace("-", MINUS)
    return "0.00" if text in ("+0.00", f"{MINUS}0.00") else text


def _small_share(value: float | None) -> str:
    """A share as a percentage with as many digits as it needs; a true zero is ``0``."""
    if value is None:
        return "–"
    percent = 100 * value
    if percent == 0:
        return "0"
    if percent < 0.001:
        return f"<{THIN}0.001{THIN}%"
    return f"{percent:.2g}{THIN}%" if percent < 10 else f"{percent:.1f}{THIN}%"


def _count(value: int | None) -> str:
    return "–" if value is None else f"{value:,}".replace(",", THIN)


def _duration(seconds: float) -> str:
    if seconds < 1:
        return f"{1000 * seconds:.0f}{THIN}ms"
    if seconds < 120:
        return f"{seconds:.1f}{THIN}s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}{THIN}h {minutes}{THIN}min" if hours else f"{minutes}{THIN}min {rest}{THIN}s"


def _seeds(count: int) -> str:
    return "1 seed" if count == 1 else f"{count} seeds"


def _below(delta: float) -> str:
    """``0.12 pp below float32``, the sign in words."""
    if abs(delta) < 0.005:
        return "equal to float32 to within 0.01 pp"
    return f"{abs(delta):.2f}{THIN}pp {'below' if delta < 0 else 'above'} float32"


def _verdict(model: Mapping[str, Any]) -> dict[str, str]:
    """The headline of one model: a statement and its explanation."""
    configs = model["configs"]
    best = configs[model["best"]]
    reference = model["float"]
    seeds = _seeds(best["accuracy"]["n"])
    if reference is None:
        return {
            "claim": f"{_percent(best['accuracy']['mean'])} with {best['bits']}-bit words",
            "detail": f"The best configuration, {best['label']}, reaches {_plus_minus(best['accuracy'])} "
            f"({seeds}). No float32 baseline of this model was measured.",
        }
    yardstick = f"(float32: {_plus_minus(reference)}, {_seeds(reference['n'])})"
    close, wide = (None if index is None else configs[index] for index in model["narrowest"])
    if close is not None:
        claim = f"{close['bits']}-bit words stay within {MARGINS[0]:g}{THIN}pp of float32"
        detail = (
            f"{close['label']} classifies {_plus_minus(close['accuracy'])} of the test images correctly "
            f"({_seeds(close['accuracy']['n'])}), {_below(close['delta'])} {yardstick}."
        )
        if wide is not None and wide["bits"] < close["bits"]:
            detail += (
                f" Within {MARGINS[1]:g}{THIN}pp, {wide['bits']} bits do: {wide['label']} with "
                f"{_plus_minus(wide['accuracy'])}, {_below(wide['delta'])}."
            )
        elif any(config["bits"] < close["bits"] for config in configs):
            detail += f" No narrower width tried stays within {MARGINS[1]:g}{THIN}pp."
        else:
            detail += " No narrower width was tried."
    elif wide is not None:
        claim = f"{wide['bits']}-bit words stay within {MARGINS[1]:g}{THIN}pp of float32"
        detail = (
            f"{wide['label']} classifies {_plus_minus(wide['accuracy'])} of the test images correctly "
            f"({_seeds(wide['accuracy']['n'])}), {_below(wide['delta'])} {yardstick}. "
            f"No configuration tried stays within {MARGINS[0]:g}{THIN}pp."
        )
    else:
        claim = f"No configuration tried stays within {MARGINS[1]:g}{THIN}pp of float32"
        detail = (
            f"The best, {best['label']}, reaches {_plus_minus(best['accuracy'])} ({seeds}), "
            f"{_below(best['delta'])} {yardstick}."
        )
    return {"claim": claim, "detail": detail}


def _facts(model: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the headline table of one model: what, and its configuration (None for float32)."""
    configs = model["configs"]
    rows: list[dict[str, Any]] = [{"what": "float32", "config": None, "spread": model["float"]}]
    found = [("Best LNS", model["best"])]
    if model["float"] is not None:
        found += [
            (f"Narrowest within {margin:g}{THIN}pp", index)
            for margin, index in zip(MARGINS, model["narrowest"], strict=True)
        ]
    for what, index in found:
        config = None if index is None else configs[index]
        rows.append({"what": what, "config": config, "spread": config["accuracy"] if config else None})
    return rows


# ---------------------------------------------------------------------------------------------------------
# The page


def _embedded(value: object) -> str:
    """JSON that is safe inside a script element: no character of it can end the element or open a comment."""
    text = json.dumps(value, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character in "<>&":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _inline_script(text: str) -> tuple[str, str]:
    """A script as it may stand in the page, and its digest for the page's content security policy."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    # In JavaScript strings and regular expressions, the only places where these occur, both are the same.
    text = text.replace("</script", "<\\/script").replace("<!--", "<\\!--")
    digest = base64.b64encode(hashlib.sha256(text.encode("utf-8")).digest()).decode("ascii")
    return text, f"'sha256-{digest}'"


def _missing(package: str, error: ImportError) -> MissingDependencyError:
    return MissingDependencyError(
        f"the report needs {package}, which cannot be imported ({error}); "
        "install it with: pip install 'lnsdeploy[report]'"
    )


def render(results: Mapping[str, Any]) -> str:
    """The page as HTML text. The same input gives the same text.

    Args:
        results: see :func:`validate`.

    Raises:
        BadValueError: as :func:`validate`.
        MissingDependencyError: jinja2 or plotly is not installed.
    """
    clean = _normalise(results)
    return _render(clean, _summarise(clean))


def _render(results: Mapping[str, Any], view: Mapping[str, Any]) -> str:
    try:
        import jinja2
        from markupsafe import Markup
    except ImportError as error:
        raise _missing("jinja2", error) from error
    try:
        from plotly.offline import get_plotlyjs
    except ImportError as error:
        raise _missing("plotly", error) from error

    folder = resources.files("lnsdeploy.studies") / "templates"
    template_text, style, common, script, early = (
        (folder / name).read_text(encoding="utf-8")
        for name in ("report.html.j2", "report.css", "common.js", "report.js", "theme.js")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(
        percent=_percent,
        plus_minus=_plus_minus,
        pp=_points,
        share=_small_share,
        count=_count,
        duration=_duration,
        seeds=_seeds,
    )
    plotly, plotly_digest = _inline_script(get_plotlyjs())
    script, script_digest = _inline_script(common + script)
    early, early_digest = _inline_script(early)
    floats = {model["name"]: model["float"] for model in view["models"]}
    rows = []
    for point in results["points"]:
        reference = floats[point["model"]]
        rows.append(
            {
                **point,
                "delta": None if reference is None else 100 * (point["accuracy"] - reference["mean"]),
                "saturated_share": _share(point["saturated"], point["words"]),
                "flushed_share": _share(point["flushed"], point["words"]),
            }
        )
    test = results["data"]["test"]
    best = max(model["configs"][model["best"]]["accuracy"]["mean"] for model in view["models"])
    return environment.from_string(template_text).render(
        results=results,
        view=view,
        rows=rows,
        verdicts=[(model["name"], _verdict(model)) for model in view["models"]],
        facts=[(model["name"], _facts(model)) for model in view["models"]],
        one_image=100 / test,
        sampling=100 * math.sqrt(best * (1 - best) / test),
        choices={
            name: sorted({point[name] for point in results["points"]})
            for name in ("model", "bits", "gamma", "datapath")
        },
        measured={
            name: any(
                cell is not None and (cell[name] is not None or cell["exact"])
                for model in view["models"]
                for row in model["cells"]
                for cell in row
            )
            for name in ("sqnr_db", "saturated")
        },
        policy=(
            "default-src 'none'; "
            f"script-src {early_digest} {plotly_digest} {script_digest}; "
            "style-src 'unsafe-inline'; img-src data: blob:; base-uri 'none'; form-action 'none'"
        ),
        style=Markup(style),
        early=Markup(early),
        plotly=Markup(plotly),
        script=Markup(script),
        results_json=Markup(_embedded(results)),
        view_json=Markup(_embedded(view)),
    )


# ---------------------------------------------------------------------------------------------------------
# Tables and pictures


def _csv(columns: Sequence[str], records: Iterable[Mapping[str, Any]]) -> str:
    buffer = io.StringIO(newline="")
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    for record in records:
        writer.writerow(["" if record[name] is None else record[name] for name in columns])
    return buffer.getvalue()


def _plain(text: str, longest: int = 44) -> str:
    """Text for matplotlib, which reads dollar signs as mathematics, on one line of limited length."""
    text = " ".join(text.split())
    if len(text) > longest:
        text = text[: longest - 1] + "…"
    return text.replace("$", "\\$")


def _figure(width: float, height: float) -> Figure:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise _missing("matplotlib", error) from error
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    # savefig would draw everything twice, the first time for nothing
    figure.canvas.print_png(buffer, metadata={"Software": None})  # type: ignore[attr-defined]
    return buffer.getvalue()


def _accuracy_picture(results: Mapping[str, Any], view: Mapping[str, Any]) -> bytes:
    """Accuracy against width, one panel a model; a second row near float32 where the range hides it."""
    models = view["models"]
    spans = []
    for model in models:
        values = [config["accuracy"]["min"] for config in model["configs"]]
        top = model["float"]["mean"] if model["float"] else max(values)
        spans.append(100 * (top - min(values)))
    rows = 2 if max(spans) > 15 and any(model["float"] for model in models) else 1
    figure = _figure(1.2 + 5.6 * len(models), 0.9 + 3.9 * rows + 0.17 * len(view["series"]))
    grid = figure.subplots(rows, len(models), squeeze=False, sharey="row")
    points = {point["id"]: point for point in results["points"]}
    for column, model in enumerate(models):
        for row in range(rows):
            axes = grid[row][column]
            _accuracy_panel(axes, model, view, points)
            name = _plain(model["name"])
            axes.set_title(name if rows == 1 else f"{name}: {('all points', 'near float32')[row]}")
            if column == 0:
                axes.set_ylabel("test accuracy (%)")
    if rows == 2:
        means = [100 * model["float"]["mean"] for model in models if model["float"]]
        grid[1][0].set_ylim(min(means) - 5, min(100.0, max(means) + 2))
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    figure.legend(
        handles.values(),
        handles.keys(),
        loc="outside lower center",
        ncols=2 if len(models) == 1 else 3,
        frameon=False,
        fontsize=8,
    )
    figure.suptitle(_plain(results["title"], 90), fontsize=12)
    return _png(figure)


def _accuracy_panel(
    axes: Axes, model: Mapping[str, Any], view: Mapping[str, Any], points: Mapping[str, Mapping[str, Any]]
) -> None:
    reference = model["float"]
    if reference is not None:
        low, high = 100 * reference["min"], 100 * reference["max"]
        axes.axhspan(low, high, color="0.88", zorder=0)
        axes.axhline(
            100 * reference["mean"], color="0.25", dashes=(5, 3), lw=1.2, label="float32: mean, least to largest"
        )
    for index, name in enumerate(view["series"]):
        configs = sorted(
            (config for config in model["configs"] if config["series"] == index), key=lambda c: int(c["bits"])
        )
        if not configs:
            continue
        colour = COLOURS[index % len(COLOURS)]
        marker = MARKERS[index % len(MARKERS)]
        alone = len(configs) == 1
        bits = [config["bits"] + (config["shift"] if alone else 0) for config in configs]
        spread = [config["accuracy"] for config in configs]
        axes.plot(
            bits,
            [100 * item["mean"] for item in spread],
            marker=marker,
            ms=6,
            lw=1.8,
            ls=DASHES[index % len(DASHES)],
            label=_plain(name),
            zorder=3,
            color=colour,
        )
        low = [100 * item["min"] for item in spread]
        high = [100 * item["max"] for item in spread]
        if alone:
            axes.vlines(bits, low, high, lw=1.2, color=colour)
        else:
            axes.fill_between(bits, low, high, alpha=0.12, lw=0, color=colour)
        members = [
            (config["bits"] + config["shift"], points[name])
            for config in configs
            if config["accuracy"]["n"] > 1
            for name in config["points"]
        ]
        axes.plot(
            [width for width, _ in members],
            [100 * point["accuracy"] for _, point in members],
            ls="",
            marker=marker,
            ms=3,
            alpha=0.5,
            zorder=2,
            color=colour,
        )
    widths = sorted({config["bits"] for other in view["models"] for config in other["configs"]})
    gamma_at = view["gamma_at"]
    axes.set_xticks(
        widths,
        [f"{bits}\nγ = {gamma_at[str(bits)]}" if str(bits) in gamma_at else str(bits) for bits in widths],
    )
    axes.set_xlim(widths[0] - 0.5, widths[-1] + 0.5)
    axes.set_xlabel("word width (bits)")
    axes.grid(axis="y", color="0.9", lw=0.8)
    axes.spines[["top", "right"]].set_visible(False)


# Shares of words are drawn on a logarithmic scale that starts here (per cent).
_FLOOR_PERCENT = 1e-3
# field, colour bar label, colour map
_PANELS = (
    ("sqnr_db", "SQNR (dB, mean over seeds)", "cividis"),
    ("saturated", "saturated (% of words, log scale)", "OrRd"),
    ("flushed", "flushed (% of words, log scale)", "OrRd"),
)


def _layers_picture(results: Mapping[str, Any], view: Mapping[str, Any]) -> bytes:
    """Heat maps of every model: error, saturated and flushed words of each layer and configuration."""
    import numpy as np

    models = [model for model in view["models"] if model["layers"]]
    if not models:
        figure = _figure(6, 1.5)
        figure.text(0.5, 0.5, "No layers were measured.", ha="center", va="center")
        return _png(figure)
    heights = [0.25 * len(model["configs"]) + 1.6 for model in models]
    columns = max(len(model["layers"]) for model in models)
    figure = _figure(3.5 + 3 * max(2.4, 0.62 * columns), sum(heights) + 0.4)
    grid = figure.subplots(len(models), 3, squeeze=False, sharey="row", gridspec_kw={"height_ratios": heights})
    for row, model in enumerate(models):
        for column, (field, title, colours) in enumerate(_PANELS):
            axes = grid[row][column]
            values = np.full((len(model["configs"]), len(model["layers"])), np.nan)
            for i, cells in enumerate(model["cells"]):
                for j, cell in enumerate(cells):
                    if cell is not None and cell[field] is not None:
                        value = cell[field]
                        values[i, j] = value if field == "sqnr_db" else math.log10(max(100 * value, _FLOOR_PERCENT))
            limits = view["sqnr_limits"] if field == "sqnr_db" else (math.log10(_FLOOR_PERCENT), 2)
            image = axes.imshow(values, aspect="auto", cmap=colours, vmin=limits[0], vmax=limits[1])
            shades = image.to_rgba(np.nan_to_num(values, nan=limits[0]))
            for i, cells in enumerate(model["cells"]):
                for j, cell in enumerate(cells):
                    light = np.isnan(values[i, j]) or shades[i, j, :3] @ (0.3, 0.59, 0.11) > 0.5
                    axes.text(
                        j,
                        i,
                        _cell_text(cell, field),
                        ha="center",
                        va="center",
                        fontsize=6.5,
                        color="black" if light else "white",
                        in_layout=False,
                    )
            axes.set_facecolor("0.93")
            names = [_plain(layer["name"], 18) for layer in model["layers"]]
            axes.set_xticks(range(len(names)), names, rotation=40, ha="right", fontsize=7)
            axes.set_yticks(
                range(len(model["configs"])),
                [_plain(config["label"]) for config in model["configs"]],
                fontsize=7,
            )
            bar = figure.colorbar(image, ax=axes, location="top", aspect=30, pad=0.02)
            bar.set_label(f"{_plain(model['name'])}: {title}", fontsize=8)
            bar.ax.tick_params(labelsize=7)
            if field != "sqnr_db":
                bar.set_ticks([-3, -2, -1, 0, 1, 2], labels=["≤0.001", "0.01", "0.1", "1", "10", "100"])
    figure.suptitle(_plain(results["title"], 90), fontsize=11)
    return _png(figure)


def _cell_text(cell: Mapping[str, Any] | None, field: str) -> str:
    if cell is None:
        return ""
    if field == "sqnr_db" and cell["exact"]:
        return "exact"
    value = cell[field]
    if value is None:
        return ""
    if field == "sqnr_db":
        return f"{value:.0f}".replace("-", MINUS)
    percent = 100 * value
    return "0" if percent == 0 else "<.001" if percent < 1e-3 else f"{percent:.2g}"


# ---------------------------------------------------------------------------------------------------------


def write_page(results: Mapping[str, Any], out_dir: Path) -> dict[str, Path]:
    """Write the page and the files beside it.

    Everything is made before the first file is written, and each file appears complete or not at all.

    Args:
        results: see :func:`validate`.
        out_dir: the folder, made if it is missing.

    Returns:
        The path of each file by its name: ``report.html``, ``results.json``, ``points.csv``,
        ``layers.csv``, ``accuracy.png``, ``layers.png``.

    Raises:
        BadValueError: as :func:`validate`.
        BadFileError: a file cannot be written.
        MissingDependencyError: jinja2, plotly or matplotlib is not installed.
    """
    clean = _normalise(results)
    view = _summarise(clean)
    page = _render(clean, view)
    pictures = {
        "accuracy.png": _accuracy_picture(clean, view),
        "layers.png": _layers_picture(clean, view),
    }
    folder = make_folder(out_dir)
    names = ("report.html", "results.json", "points.csv", "layers.csv", *pictures)
    paths = {name: folder / name for name in names}
    write_json(paths["results.json"], clean)
    write_text(paths["points.csv"], _csv(POINT_COLUMNS, clean["points"]))
    write_text(paths["layers.csv"], _csv(LAYER_COLUMNS, clean["layers"]))
    for name, picture in pictures.items():
        write_bytes(paths[name], picture)
    # Last, so that a page that exists has its files beside it.
    write_text(paths["report.html"], page)
    return paths
