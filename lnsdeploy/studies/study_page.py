"""The page of a study: its points as one HTML file, with pictures, CSV and JSON beside it.

The input is a plain dictionary (:func:`normalise` lists its fields), the output a folder:

- ``study.html``: self-contained; the chart library and the data are inside it and nothing is fetched;
- ``study.json``: the input; ``points.csv``, ``layers.csv``, ``delta_tables.csv``, ``histograms.csv``: its tables;
- ``front``, ``bits``, ``breakdown``, ``layers``, ``delta``, ``histograms``: each chart as ``.png`` and ``.svg``.

What the page claims is worked out here, once (:func:`summarise`); its script and the pictures only draw. The same
input gives the same bytes.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lnsdeploy.errors import BadValueError
from lnsdeploy.files import make_folder, write_bytes, write_json, write_text
from lnsdeploy.studies.base import (
    COLOURS,
    DASHES,
    MARKERS,
    MINUS,
    bad,
    both_kinds,
    count,
    csv_text,
    legend,
    new_figure,
    nothing,
    percent,
    plain,
    plain_data,
    signed_points,
)
from lnsdeploy.studies.base import render as render_page

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.axis import Axis
    from matplotlib.figure import Figure

KINDS = ("lns", "float32", "int", "fp8")
STATES = ("complete", "pruned", "failed", "infeasible")
PARTS = ("multiplier", "alignment", "adder", "tables", "accumulator", "converter")

# name, title, unit, which way is better; in the order of the axes' menus and of the table's columns.
METRICS: tuple[tuple[str, str, str, str], ...] = (
    ("accuracy", "Accuracy", "%", "maximize"),
    ("drop", "Drop", "pp", "minimize"),
    ("sqnr_db", "SQNR", "dB", "maximize"),
    ("transistors", "Transistors", "", "minimize"),
    ("area", "Area", "µm²", "minimize"),
    ("depth", "Depth", "gates", "minimize"),
    ("energy", "Energy", "", "minimize"),
    ("table_bits", "Table bits", "", "minimize"),
    ("size_bytes", "Model size", "bytes", "minimize"),
)

# A point's share of accuracy below float32 (percentage points) that still counts as holding.
HOLDS = 0.5
# Rows of the charts of single points, where nothing is selected.
SHOWN_ROWS = 24
# Parameters with more different values than this do not colour the charts: there are no more marks to tell apart.
GROUPS = 8
# Values that are shares, and shown in per cent.
SHARES = ("accuracy", "drop")
# A signal-to-noise ratio of this or more means that there is no noise.
EXACT_DB = 999
_HATCHES = ("", "////", "....", "xxxx")


# ---------------------------------------------------------------------------------------------------------
# Checking the input


def _mapping_of(where: str, record: object) -> dict[str, Any]:
    if not isinstance(record, Mapping):
        raise bad(where, "a mapping", record)
    return dict(record)


def _number_or_none(where: str, value: object) -> float | int | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise bad(where, "a number, or None", value)
    return value


def _numbers(where: str, values: object) -> list[float | int | None]:
    if isinstance(values, (str, bytes)) or not isinstance(values, Sequence):
        raise bad(where, "a list of numbers", values)
    return [_number_or_none(f"{where}[{i}]", value) for i, value in enumerate(values)]


def _finite(value: Any) -> Any:
    """JSON has no NaN and no infinity: None in their place."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _same_length(where: str, record: Mapping[str, Any], names: Sequence[str]) -> None:
    lengths = {len(record[name]) for name in names}
    if len(lengths) > 1:
        raise BadValueError(f"results: {where}: {', '.join(names)} must be lists of the same length")


def _list(results: Mapping[str, Any], name: str) -> list[Any]:
    value = results.get(name, [])
    if isinstance(value, (str, bytes)) or not isinstance(value, Sequence):
        raise bad(name, "a list", value)
    return list(value)


def _string(where: str, value: object, default: str = "") -> str:
    if value is None:
        return default
    if not isinstance(value, str):
        raise bad(where, "text", value)
    return value


def _one_of(where: str, value: object, names: Sequence[str]) -> str:
    if value not in names:
        raise bad(where, "one of " + ", ".join(names), value)
    return str(value)


def _point(where: str, record: object) -> dict[str, Any]:
    given = _mapping_of(where, record)
    number = given.get("id")
    if isinstance(number, bool) or not isinstance(number, int):
        raise bad(f"{where}.id", "an integer", number)
    values = {
        str(name): _number_or_none(f"{where}.values.{name}", value)
        for name, value in _mapping_of(f"{where}.values", given.get("values") or {}).items()
    }
    accuracy = values.get("accuracy")
    if accuracy is not None and not 0 <= accuracy <= 1:
        raise bad(f"{where}.values.accuracy", "a share from 0 to 1", accuracy)
    ranges: dict[str, list[float | int]] = {}
    for name, value in _mapping_of(f"{where}.ranges", given.get("ranges") or {}).items():
        ends = _numbers(f"{where}.ranges.{name}", value) if value is not None else []
        if value is not None and len(ends) != 2:
            raise bad(f"{where}.ranges.{name}", "a least and a largest value", value)
        low, high = ends if ends else (None, None)
        if low is not None and high is not None:
            if low > high:
                raise bad(f"{where}.ranges.{name}", "a least and a largest value", value)
            ranges[str(name)] = [low, high]
    layers = []
    for i, layer in enumerate(_list(given, "layers") if given.get("layers") is not None else []):
        layer = _mapping_of(f"{where}.layers[{i}]", layer)
        layers.append(
            {
                "name": _string(f"{where}.layers[{i}].name", layer.get("name")),
                "sqnr_db": _number_or_none(f"{where}.layers[{i}].sqnr_db", layer.get("sqnr_db")),
            }
        )
    return {
        "id": number,
        "kind": _one_of(f"{where}.kind", given.get("kind"), KINDS),
        "label": _string(f"{where}.label", given.get("label"), str(number)) or str(number),
        "state": _one_of(f"{where}.state", given.get("state"), STATES),
        "reason": _string(f"{where}.reason", given.get("reason")) or None,
        "net": _string(f"{where}.net", given.get("net")),
        "parameters": {
            str(name): value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
            for name, value in _mapping_of(f"{where}.parameters", given.get("parameters") or {}).items()
        },
        "format": _string(f"{where}.format", given.get("format")),
        "datapath": _string(f"{where}.datapath", given.get("datapath")),
        "description": _string(f"{where}.description", given.get("description")),
        "datapath_toml": _string(f"{where}.datapath_toml", given.get("datapath_toml")),
        "fingerprint": _string(f"{where}.fingerprint", given.get("fingerprint")),
        "values": values,
        "ranges": ranges,
        "breakdown": {
            str(name): _number_or_none(f"{where}.breakdown.{name}", value)
            for name, value in _mapping_of(f"{where}.breakdown", given.get("breakdown") or {}).items()
        },
        "layers": layers,
        "command": _string(f"{where}.command", given.get("command")),
        "pareto": bool(given.get("pareto", False)),
    }


def normalise(results: Mapping[str, Any]) -> dict[str, Any]:
    """The results checked, with what may be left out filled in; no NaN, no NumPy scalars.

    Args:
        results: a dictionary with

            - ``study``: ``name``, ``fingerprint``, ``command``, ``toml`` (texts), ``versions`` (by name), ``nets``
              (names), ``finished`` (bool), and whatever else is to be told;
            - ``objectives``: of ``name``, ``direction`` (``maximize`` or ``minimize``), ``unit``;
            - ``constraints``: texts, or mappings;
            - ``points``: of ``id`` (int, once each), ``kind`` (of :data:`KINDS`), ``label``, ``state`` (of
              :data:`STATES`), ``reason``, ``net``, ``parameters`` (flat), ``format`` (``"8:8"``), ``datapath``,
              ``description``,
              ``datapath_toml``, ``fingerprint``, ``values`` and ``ranges`` (by metric; accuracy is a share),
              ``breakdown`` (transistors by part), ``layers`` (``name``, ``sqnr_db``), ``command``, ``pareto``;
            - ``delta_tables``: of ``label``, ``gamma`` (codes an octave, where all are to be drawn over octaves) and
              equally long ``d``, ``approximation``, ``exact``, ``ulp``;
            - ``histograms``: of ``layer``, ``kind``, ``codes``, ``counts``.

            ``study.name`` and each point's ``id``, ``kind`` and ``state`` must be there.

    Raises:
        BadValueError: something is not as above; the message says where.
    """
    given = _mapping_of("the whole", _finite(plain_data(results)))
    study = _mapping_of("study", given.get("study"))
    name = study.get("name")
    if not isinstance(name, str) or not name.strip():
        raise bad("study.name", "text that is not empty", name)
    points = [_point(f"points[{i}]", record) for i, record in enumerate(_list(given, "points"))]
    seen: set[int] = set()
    for point in points:
        if point["id"] in seen:
            raise BadValueError(f"results: points: id {point['id']} is there twice")
        seen.add(point["id"])
    objectives = []
    for i, record in enumerate(_list(given, "objectives")):
        record = _mapping_of(f"objectives[{i}]", record)
        objectives.append(
            {
                "name": _string(f"objectives[{i}].name", record.get("name")),
                "direction": _one_of(f"objectives[{i}].direction", record.get("direction"), ("maximize", "minimize")),
                "unit": _string(f"objectives[{i}].unit", record.get("unit")),
            }
        )
    tables = []
    for i, record in enumerate(_list(given, "delta_tables")):
        where = f"delta_tables[{i}]"
        record = _mapping_of(where, record)
        table = {
            "label": _string(f"{where}.label", record.get("label"), str(i)),
            "gamma": _number_or_none(f"{where}.gamma", record.get("gamma")),
        }
        columns = ("d", "approximation", "exact", "ulp")
        tables.append(table | {key: _numbers(f"{where}.{key}", record.get(key)) for key in columns})
        _same_length(where, tables[-1], columns)
    histograms = []
    for i, record in enumerate(_list(given, "histograms")):
        where = f"histograms[{i}]"
        record = _mapping_of(where, record)
        histograms.append(
            {
                "layer": _string(f"{where}.layer", record.get("layer"), str(i)),
                "kind": _one_of(f"{where}.kind", record.get("kind"), ("weights", "activations")),
                "codes": _numbers(f"{where}.codes", record.get("codes")),
                "counts": _numbers(f"{where}.counts", record.get("counts")),
            }
        )
        _same_length(where, histograms[-1], ("codes", "counts"))
    nets = list(dict.fromkeys([*map(str, study.get("nets") or []), *(point["net"] for point in points)]))
    return {
        "study": {
            **study,
            "fingerprint": _string("study.fingerprint", study.get("fingerprint")),
            "command": _string("study.command", study.get("command")),
            "toml": _string("study.toml", study.get("toml")),
            "versions": _mapping_of("study.versions", study.get("versions") or {}),
            "nets": [net for net in nets if any(point["net"] == net for point in points)],
            "finished": bool(study.get("finished", True)),
        },
        "objectives": objectives,
        "constraints": _list(given, "constraints"),
        "points": points,
        "delta_tables": tables,
        "histograms": histograms,
    }


# ---------------------------------------------------------------------------------------------------------
# What the page says


def bits_of(point: Mapping[str, Any]) -> int | None:
    """Word width of a point: of its format ("8:8", "int8", "fp8 e4m3", "e5m2"), or its parameter ``bits``."""
    text = point["format"] or point["label"]
    if (match := re.match(r"\s*(\d+):\d+", text)) or (match := re.match(r"\s*(?:u?int|fp|float)(\d+)", text)):
        return int(match[1])
    bits = point["parameters"].get("bits")
    return bits if isinstance(bits, int) and not isinstance(bits, bool) else None


def front(points: Sequence[Mapping[str, Any]], x: str, y: str, metrics: Mapping[str, str]) -> list[int]:
    """Ids of the points that no other beats in both metrics, by growing x; of equal points, the first.

    Args:
        points: of :func:`normalise`; those without either value are passed over.
        x, y: names of metrics.
        metrics: which way each is better (``maximize`` or ``minimize``).
    """

    def cost(point: Mapping[str, Any], name: str) -> float:
        return float(point["values"][name]) * (-1 if metrics[name] == "maximize" else 1)

    usable = [p for p in points if p["values"].get(x) is not None and p["values"].get(y) is not None]
    kept: list[Mapping[str, Any]] = []
    for point in sorted(usable, key=lambda p: (cost(p, x), cost(p, y), p["id"])):
        if not kept or cost(point, y) < cost(kept[-1], y):
            kept.append(point)
    return [point["id"] for point in sorted(kept, key=lambda p: float(p["values"][x]))]


def _metrics(results: Mapping[str, Any]) -> list[dict[str, str]]:
    objectives = {objective["name"]: objective for objective in results["objectives"]}
    there = {
        name
        for point in results["points"]
        for name, value in point["values"].items()
        if value is not None and point["state"] != "failed"
    }
    known = {name: (title, unit, direction) for name, title, unit, direction in METRICS}
    found = []
    for name in [name for name in known if name in there] + sorted(there - set(known)):
        title, unit, direction = known.get(name, (name, "", "minimize"))
        if name in objectives:
            direction = objectives[name]["direction"]
            unit = unit if name in SHARES else objectives[name]["unit"] or unit
        # "transistors" of transistors says nothing
        unit = re.sub(rf"^{re.escape(title)}\b\s*", "", unit, flags=re.IGNORECASE)
        found.append({"name": name, "title": title, "unit": unit, "direction": direction})
    return found


def _groups(points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Parameters by which points can be told apart, with their values in order; the most telling first."""
    names = dict.fromkeys(name for point in points for name in point["parameters"])
    groups = []
    for name in names:
        values = {point["parameters"].get(name) for point in points if name in point["parameters"]} - {None}
        if 2 <= len(values) <= GROUPS:
            ordered = sorted(values, key=lambda v: (isinstance(v, str), v if not isinstance(v, str) else 0, str(v)))
            groups.append({"name": name, "values": [str(value) for value in ordered]})
    preferred = (
        "accumulate",
        "accumulation",
        "accumulate.kind",
        "method",
        "delta",
        "delta.method",
        "accumulate.delta.method",
    )
    return sorted(groups, key=lambda g: preferred.index(g["name"]) if g["name"] in preferred else len(preferred))


def _cost_metric(metrics: Sequence[Mapping[str, str]]) -> str | None:
    costs = [metric["name"] for metric in metrics if metric["direction"] == "minimize"]
    return "transistors" if "transistors" in costs else costs[0] if costs else None


def _overlap(a: Mapping[str, Any], b: Mapping[str, Any], name: str) -> bool:
    """Whether the ranges of a metric meet; a value without a range is a range of one."""
    low_a, high_a = a["ranges"].get(name, [a["values"][name]] * 2)
    low_b, high_b = b["ranges"].get(name, [b["values"][name]] * 2)
    return bool(low_a <= high_b and low_b <= high_a)


def _comparison(baseline: Mapping[str, Any], lns: Sequence[Mapping[str, Any]], cost: str | None) -> dict[str, Any]:
    """A baseline against the LNS points of its net: the cheapest that is no worse, the best that is no dearer."""
    accuracy = baseline["values"].get("accuracy")
    price = baseline["values"].get(cost) if cost else None
    row: dict[str, Any] = {"id": baseline["id"], "cheapest": None, "best": None, "ratio": None, "verdict": "unknown"}
    if accuracy is None:
        return row
    usable = [p for p in lns if p["values"].get("accuracy") is not None]
    if cost is None or price is None:
        if usable:
            best = max(usable, key=lambda p: (p["values"]["accuracy"], -p["id"]))
            row["best"] = best["id"]
        return row
    usable = [p for p in usable if p["values"].get(cost) is not None]
    as_good = [p for p in usable if p["values"]["accuracy"] >= accuracy]
    no_dearer = [p for p in usable if p["values"][cost] <= price]
    if as_good:
        cheapest = min(as_good, key=lambda p: (p["values"][cost], -p["values"]["accuracy"], p["id"]))
        row["cheapest"] = cheapest["id"]
        if cheapest["values"][cost] > 0:
            row["ratio"] = price / cheapest["values"][cost]
    if no_dearer:
        best = max(no_dearer, key=lambda p: (p["values"]["accuracy"], -p["values"][cost], -p["id"]))
        row["best"] = best["id"]
    if row["ratio"] is not None and row["ratio"] > 1:
        row["verdict"] = "wins"
    elif row["ratio"] == 1:
        row["verdict"] = "equal"
    elif no_dearer and any(_overlap(p, baseline, "accuracy") for p in no_dearer):
        row["verdict"] = "unclear"
    else:
        row["verdict"] = "loses"
    return row


def summarise(results: Mapping[str, Any]) -> dict[str, Any]:
    """What the page and the pictures draw, worked out from results of :func:`normalise`."""
    points = results["points"]
    metrics = _metrics(results)
    directions = {metric["name"]: metric["direction"] for metric in metrics}
    cost = _cost_metric(metrics)
    nets = []
    for name in results["study"]["nets"]:
        mine = [point for point in points if point["net"] == name]
        complete = [point for point in mine if point["state"] in ("complete", "infeasible")]
        lns = [point for point in complete if point["kind"] == "lns" and point["state"] == "complete"]
        baselines = [point for point in complete if point["kind"] != "lns"]
        floats = [p for p in baselines if p["kind"] == "float32" and p["values"].get("accuracy") is not None]
        reference = floats[0] if floats else None
        holding = [
            p
            for p in lns
            if reference is not None
            and cost is not None
            and p["values"].get("accuracy") is not None
            and p["values"].get(cost) is not None
            and round(100 * (reference["values"]["accuracy"] - p["values"]["accuracy"]), 6) <= HOLDS
        ]
        cheapest = (
            min(holding, key=lambda p: (p["values"][cost], -p["values"]["accuracy"], p["id"])) if holding else None
        )
        on_front = [p for p in lns if p["pareto"]]
        if not on_front and cost is not None and "accuracy" in directions:
            chosen = set(front(lns, cost, "accuracy", directions))
            on_front = [p for p in lns if p["id"] in chosen]
        order = cost or "accuracy"
        on_front.sort(key=lambda p: (p["values"].get(order) is None, p["values"].get(order) or 0, p["id"]))
        nets.append(
            {
                "name": name,
                "points": [p["id"] for p in mine],
                "front": [p["id"] for p in on_front],
                "baselines": [p["id"] for p in baselines],
                "float": None if reference is None else reference["id"],
                "holds": None if cheapest is None else cheapest["id"],
                "against": [_comparison(p, lns, cost) for p in baselines if p["kind"] != "float32"],
                "layers": list(dict.fromkeys(layer["name"] for p in complete for layer in p["layers"])),
            }
        )
    lns_points = [point for point in points if point["kind"] == "lns"]
    parts = [part for part in PARTS if any(part in point["breakdown"] for point in points)]
    parts += sorted({part for point in points for part in point["breakdown"]} - set(parts))
    sqnr = [layer["sqnr_db"] for point in points for layer in point["layers"] if layer["sqnr_db"] is not None]
    return {
        "nets": nets,
        "metrics": metrics,
        "cost": cost,
        "groups": _groups(lns_points),
        "bits": {str(point["id"]): bits for point in points if (bits := bits_of(point)) is not None},
        "parts": parts,
        "states": {state: sum(point["state"] == state for point in points) for state in STATES},
        "sqnr_limits": [max(0.0, math.floor(min(sqnr))), max(1.0, math.ceil(min(max(sqnr), 60)))] if sqnr else [0, 1],
        "shown_rows": SHOWN_ROWS,
        "shares": list(SHARES),
        "exact_db": EXACT_DB,
    }


def _value(value: float | int | None, name: str) -> str:
    """A metric's value as the tables show it."""
    if value is None:
        return "–"
    if name == "accuracy":
        return percent(float(value))
    if name == "drop":
        return f"{100 * value:.2f}".replace("-", MINUS)
    if name == "sqnr_db":
        return "exact" if value >= EXACT_DB else f"{value:.1f}".replace("-", MINUS)
    if float(value).is_integer() or abs(value) >= 1000:
        return count(round(value)).replace("-", MINUS)
    return f"{value:.4g}".replace("-", MINUS)


def _claims(results: Mapping[str, Any], view: Mapping[str, Any]) -> list[dict[str, Any]]:
    """For each net, what stands at the top of the page."""
    points = {point["id"]: point for point in results["points"]}
    cost = view["cost"]
    title = next((metric["title"].lower() for metric in view["metrics"] if metric["name"] == cost), "")
    claims = []
    for net in view["nets"]:
        reference = points.get(net["float"])
        held = points.get(net["holds"])
        if reference is None or cost is None:
            claim = "There is no float32 result to compare with." if reference is None else "No cost was measured."
            detail = ""
        elif held is None:
            claim = f"No LNS point holds float32’s accuracy within {HOLDS:g} pp."
            detail = f"float32 reaches {percent(reference['values']['accuracy'])}."
        else:
            loss = 100 * (held["values"]["accuracy"] - reference["values"]["accuracy"])
            claim = f"{held['label']} holds float32’s accuracy with {_value(held['values'][cost], cost)} {title}."
            detail = (
                f"It reaches {percent(held['values']['accuracy'])}, {signed_points(loss)} pp against float32’s "
                f"{percent(reference['values']['accuracy'])}: of the LNS points within {HOLDS:g} pp, "
                f"the one with the fewest {title}."
            )
            if "accuracy" in held["ranges"] and "accuracy" in reference["ranges"]:
                low, high = held["ranges"]["accuracy"]
                detail += f" Its range is {percent(low)} to {percent(high)}."
        claims.append({"net": net["name"], "claim": claim, "detail": detail})
    return claims


# ---------------------------------------------------------------------------------------------------------
# The page


def render_study(results: Mapping[str, Any]) -> str:
    """The page as HTML text. The same input gives the same text.

    Raises:
        BadValueError: as :func:`normalise`.
        MissingDependencyError: jinja2 or plotly is not installed.
    """
    clean = normalise(results)
    return _render(clean, summarise(clean))


def _render(results: Mapping[str, Any], view: Mapping[str, Any]) -> str:
    return render_page(
        "study.html.j2",
        filters={"value": _value},
        styles=("study.css",),
        script="study.js",
        data={"results": results, "view": view},
        title=results["study"]["name"],
        results=results,
        study=results["study"],
        view=view,
        by_id={point["id"]: point for point in results["points"]},
        claims=_claims(results, view),
        nets=view["nets"],
        kinds=[kind for kind in KINDS if any(point["kind"] == kind for point in results["points"])],
        states=[state for state in STATES if view["states"][state]],
        known=("name", "fingerprint", "command", "toml", "versions", "nets", "finished"),
    )


# ---------------------------------------------------------------------------------------------------------
# Tables and pictures


def _tables(results: Mapping[str, Any], view: Mapping[str, Any]) -> dict[str, str]:
    points = results["points"]

    def union(field: str) -> list[str]:
        return list(dict.fromkeys(name for point in points for name in point[field]))

    parameters, values, ranges, parts = (union(f) for f in ("parameters", "values", "ranges", "breakdown"))
    plain = ("id", "kind", "label", "state", "reason", "net", "format", "datapath", "fingerprint", "pareto")
    columns = [
        *plain,
        *(f"parameter {name}" for name in parameters),
        *values,
        *(f"{name} {end}" for name in ranges for end in ("least", "largest")),
        *(f"transistors of {name}" for name in parts),
        "command",
    ]
    rows = []
    for point in points:
        row = {name: point[name] for name in (*plain, "command")}
        row |= {f"parameter {name}": point["parameters"].get(name) for name in parameters}
        row |= {name: point["values"].get(name) for name in values}
        for name in ranges:
            row[f"{name} least"], row[f"{name} largest"] = point["ranges"].get(name, (None, None))
        row |= {f"transistors of {name}": point["breakdown"].get(name) for name in parts}
        rows.append(row)

    def long(records: Iterable[Mapping[str, Any]], name: str, columns: Sequence[str]) -> list[dict[str, Any]]:
        return [
            {name: record[name], **dict(zip(columns, entry, strict=True))}
            for record in records
            for entry in zip(*(record[column] for column in columns), strict=True)
        ]

    histograms = [
        {"layer": record["layer"], "kind": record["kind"], "code": code, "count": count}
        for record in results["histograms"]
        for code, count in zip(record["codes"], record["counts"], strict=True)
    ]
    layers = [{"point": p["id"], "net": p["net"], **layer} for p in points for layer in p["layers"]]
    deltas = long(results["delta_tables"], "label", ("d", "approximation", "exact", "ulp"))
    return {
        "points.csv": csv_text(columns, rows),
        "layers.csv": csv_text(("point", "net", "name", "sqnr_db"), layers),
        "delta_tables.csv": csv_text(("label", "d", "approximation", "exact", "ulp"), deltas),
        "histograms.csv": csv_text(("layer", "kind", "code", "count"), histograms),
    }


def _scaled(values: Sequence[float | int | None], name: str) -> list[float]:
    factor = 100 if name in SHARES else 1
    return [math.nan if value is None else factor * float(value) for value in values]


def _axis_title(metric: Mapping[str, str]) -> str:
    return metric["title"] + (f" ({metric['unit']})" if metric["unit"] else "")


_BASE_MARKS = {"float32": "*", "int": "s", "fp8": "D"}


def _series(view: Mapping[str, Any], points: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Mapping[str, Any]]]]:
    """LNS points by the first of the groups; all in one where there is none."""
    if not view["groups"]:
        return [("LNS", list(points))]
    group = view["groups"][0]
    found = [
        (f"{group['name']} = {value}", [p for p in points if str(p["parameters"].get(group["name"])) == value])
        for value in group["values"]
    ]
    rest = [p for p in points if str(p["parameters"].get(group["name"])) not in group["values"]]
    return [entry for entry in [*found, (f"{group['name']} not set", rest)] if entry[1]]


def _front_picture(results: Mapping[str, Any], view: Mapping[str, Any]) -> Figure:
    metrics = {metric["name"]: metric for metric in view["metrics"]}
    cost = view["cost"]
    if cost is None or "accuracy" not in metrics:
        return nothing("Accuracy and a cost are needed for a front.")
    directions = {name: metric["direction"] for name, metric in metrics.items()}
    nets = view["nets"]
    figure = new_figure(0.8 + 5.6 * len(nets), 4.9)
    grid = figure.subplots(1, len(nets), squeeze=False)[0]
    points = {point["id"]: point for point in results["points"]}
    for axes, net in zip(grid, nets, strict=True):
        lns = [points[i] for i in net["points"] if points[i]["kind"] == "lns" and points[i]["state"] == "complete"]
        names = [label for label, _ in _series(view, [p for p in results["points"] if p["kind"] == "lns"])]
        for label, members in _series(view, lns):
            index = names.index(label)
            colour, marker = COLOURS[index % 7], MARKERS[index % len(MARKERS)]
            for chosen, fill in ((False, "none"), (True, colour)):
                some = [p for p in members if (p["id"] in net["front"]) == chosen]
                axes.plot(
                    _scaled([p["values"].get(cost) for p in some], cost),
                    _scaled([p["values"].get("accuracy") for p in some], "accuracy"),
                    ls="",
                    marker=marker,
                    ms=6.5 if chosen else 5,
                    markerfacecolor=fill,
                    markeredgecolor=colour,
                    alpha=1 if chosen else 0.6,
                    zorder=4 if chosen else 3,
                    label=plain(label) if chosen else None,
                )
        line = [points[i] for i in front(lns, cost, "accuracy", directions)]
        axes.plot(
            [p["values"][cost] for p in line],
            [100 * p["values"]["accuracy"] for p in line],
            color="0.2",
            lw=1.2,
            drawstyle="steps-post",
            zorder=2,
            label="front of the LNS points",
        )
        lines_at: list[tuple[float, str]] = []
        for i in net["baselines"]:
            point = points[i]
            y = point["values"].get("accuracy")
            x = point["values"].get(cost)
            if y is None:
                continue
            if x is None:
                axes.axhline(100 * y, color="0.35", lw=1, dashes=(5, 3))
                lines_at.append((100 * y, plain(point["label"], 16)))
                continue
            axes.plot(
                [x],
                [100 * y],
                ls="",
                marker=_BASE_MARKS[point["kind"]],
                ms=9,
                mfc="white",
                mec="black",
                mew=1.4,
                zorder=5,
            )
            axes.annotate(
                plain(point["label"], 16),
                (x, 100 * y),
                xytext=(0, 8),
                textcoords="offset points",
                fontsize=8,
                ha="center",
                annotation_clip=False,
            )
        priced = [p["values"][cost] for p in results["points"] if p["values"].get(cost) is not None]
        axes.set_xscale("log" if min(priced, default=0) > 0 else "linear")
        if axes.get_xscale() == "log":
            _thousands(axes.xaxis, max(priced) / min(priced))
        _beside(axes, lines_at)
        axes.set_title(plain(net["name"]))
        axes.set_xlabel(_axis_title(metrics[cost]))
        axes.grid(color="0.9", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("Accuracy (%)")
    legend(figure)
    figure.suptitle(plain(results["study"]["name"], 90), fontsize=12)
    return figure


def _thousands(axis: Axis, ratio: float) -> None:
    """Ticks of a logarithmic axis as 500, 2 k, 5 k; the fewer decades, the more of them."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    def text(value: float, _: object) -> str:
        return f"{value / 1e6:g} M" if value >= 1e6 else f"{value / 1e3:g} k" if value >= 1e3 else f"{value:g}"

    subs = (1.0,) if ratio > 1500 else (1.0, 2.0, 5.0) if ratio > 5 else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(10, subs))
    axis.set_major_formatter(FuncFormatter(text))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _beside(axes: Axes, names: Sequence[tuple[float, str]]) -> None:
    """Names of horizontal lines, right of the chart, the upper first, each below the one before."""
    low, high = axes.get_ylim()
    last = math.inf
    for y, name in sorted(names, reverse=True):
        at = min((y - low) / (high - low), last - 0.035)
        last = at
        axes.text(1.01, at, name, transform=axes.transAxes, fontsize=8, ha="left", va="center")


def _best_by_bits(view: Mapping[str, Any], members: Iterable[Mapping[str, Any]]) -> list[tuple[int, Mapping[str, Any]]]:
    best: dict[int, Mapping[str, Any]] = {}
    for point in members:
        bits = view["bits"].get(str(point["id"]))
        accuracy = point["values"].get("accuracy")
        if bits is None or accuracy is None:
            continue
        if bits not in best or accuracy > best[bits]["values"]["accuracy"]:
            best[bits] = point
    return sorted(best.items())


def _bits_picture(results: Mapping[str, Any], view: Mapping[str, Any]) -> Figure:
    points = {point["id"]: point for point in results["points"]}
    nets = view["nets"]
    if not any(str(i) in view["bits"] for net in nets for i in net["points"]):
        return nothing("No point has a word width.")
    figure = new_figure(0.8 + 5.2 * len(nets), 4.7)
    grid = figure.subplots(1, len(nets), squeeze=False, sharey="row")[0]
    everything = _series(view, [p for p in results["points"] if p["kind"] == "lns"])
    names = [label for label, _ in everything]
    for axes, net in zip(grid, nets, strict=True):
        lns = [points[i] for i in net["points"] if points[i]["kind"] == "lns" and points[i]["state"] == "complete"]
        for label, members in _series(view, lns):
            index = names.index(label)
            line = _best_by_bits(view, members)
            if not line:
                continue
            bits = [b for b, _ in line]
            colour = COLOURS[index % 7]
            axes.plot(
                bits,
                [100 * p["values"]["accuracy"] for _, p in line],
                color=colour,
                marker=MARKERS[index % len(MARKERS)],
                ls=DASHES[index % len(DASHES)],
                label=plain(label),
            )
            ends = [p["ranges"].get("accuracy", [p["values"]["accuracy"]] * 2) for _, p in line]
            axes.fill_between(
                bits, [100 * e[0] for e in ends], [100 * e[1] for e in ends], alpha=0.13, lw=0, color=colour
            )
        for i in net["baselines"]:
            point = points[i]
            accuracy, bits_here = point["values"].get("accuracy"), view["bits"].get(str(i))
            if accuracy is None:
                continue
            if point["kind"] == "float32" or bits_here is None:
                axes.axhline(100 * accuracy, color="0.25", dashes=(5, 3), lw=1.1, label=plain(point["label"]))
            else:
                axes.plot(
                    [bits_here],
                    [100 * accuracy],
                    ls="",
                    marker=_BASE_MARKS[point["kind"]],
                    ms=9,
                    mfc="none",
                    mec="black",
                    mew=1.4,
                )
                axes.annotate(
                    plain(point["label"]),
                    (bits_here, 100 * accuracy),
                    xytext=(8, -3),
                    textcoords="offset points",
                    fontsize=8,
                )
        axes.set_title(plain(net["name"]))
        axes.set_xlabel("word width (bits)")
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(axis="y", color="0.9", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    grid[0].set_ylabel("best accuracy (%), with its range")
    legend(figure)
    return figure


def _chosen_rows(
    results: Mapping[str, Any], net: Mapping[str, Any], limit: int = SHOWN_ROWS
) -> list[Mapping[str, Any]]:
    """Points that the charts of single points show where none is selected: the front, thinned evenly, and baselines."""
    points = {point["id"]: point for point in results["points"]}
    chosen = net["front"]
    room = max(limit - len(net["baselines"]), 2)
    if len(chosen) > room:
        chosen = [chosen[round(i * (len(chosen) - 1) / (room - 1))] for i in range(room)]
    return [points[i] for i in [*chosen, *net["baselines"]]]


def _breakdown_picture(results: Mapping[str, Any], view: Mapping[str, Any]) -> Figure:
    rows = [(net, p) for net in view["nets"] for p in _chosen_rows(results, net) if p["breakdown"]]
    if not rows:
        return nothing("No cost was broken down.")
    figure = new_figure(8.5, 1.3 + 0.26 * len(rows))
    axes = figure.subplots()
    starts = [0.0] * len(rows)
    for index, part in enumerate(view["parts"]):
        widths = [float(p["breakdown"].get(part) or 0) for _, p in rows]
        axes.barh(
            range(len(rows)),
            widths,
            left=starts,
            color=COLOURS[index % 7],
            alpha=0.85,
            hatch=_HATCHES[index % 4],
            edgecolor="white",
            lw=0.5,
            label=plain(part),
        )
        starts = [a + b for a, b in zip(starts, widths, strict=True)]
    many = len(view["nets"]) > 1
    axes.set_yticks(
        range(len(rows)),
        [plain(f"{net['name']}: {p['label']}" if many else p["label"], 52) for net, p in rows],
        fontsize=7,
    )
    axes.invert_yaxis()
    axes.set_xlabel("transistors")
    axes.spines[["top", "right"]].set_visible(False)
    legend(figure)
    return figure


def _layers_picture(results: Mapping[str, Any], view: Mapping[str, Any]) -> Figure:
    import numpy as np

    nets = [net for net in view["nets"] if net["layers"]]
    if not nets:
        return nothing("No layers were measured.")
    shown = [[p for p in _chosen_rows(results, net) if p["layers"]] for net in nets]
    heights = [0.26 * len(rows) + 1.3 for rows in shown]
    figure = new_figure(3.2 + 0.75 * max(len(net["layers"]) for net in nets), sum(heights))
    grid = figure.subplots(len(nets), 1, squeeze=False, gridspec_kw={"height_ratios": heights})[:, 0]
    low, high = view["sqnr_limits"]
    for axes, net, rows in zip(grid, nets, shown, strict=True):
        values = np.full((max(len(rows), 1), len(net["layers"])), np.nan)
        for i, point in enumerate(rows):
            for layer in point["layers"]:
                if layer["sqnr_db"] is not None:
                    values[i, net["layers"].index(layer["name"])] = layer["sqnr_db"]
        image = axes.imshow(values, aspect="auto", cmap="cividis", vmin=low, vmax=high)
        for (i, j), value in np.ndenumerate(values):
            if not np.isnan(value):
                ink = "black" if (value - low) / (high - low) > 0.5 else "white"
                axes.text(j, i, f"{value:.0f}".replace("-", MINUS), ha="center", va="center", fontsize=6.5, color=ink)
        axes.set_facecolor("0.93")
        axes.set_xticks(
            range(len(net["layers"])), [plain(n, 18) for n in net["layers"]], rotation=40, ha="right", fontsize=7
        )
        axes.set_yticks(range(len(rows)), [plain(p["label"]) for p in rows], fontsize=7)
        axes.set_title(f"{plain(net['name'])}: SQNR of each layer (dB)", fontsize=9)
        figure.colorbar(image, ax=axes)
    return figure


def _over(values: Sequence[float | int | None], unit: float) -> list[float]:
    return [math.nan if value is None else value / unit for value in values]


def _delta_picture(results: Mapping[str, Any], view: Mapping[str, Any]) -> Figure:
    tables = results["delta_tables"]
    if not tables:
        return nothing("No point adds in the logarithm: there are no Δ tables.")
    figure = new_figure(9.5, 4.2)
    upper, lower = figure.subplots(1, 2)
    # Tables of several resolutions lie on one curve only over octaves.
    octaves = len(tables) > 1 and all(table["gamma"] for table in tables)
    for index, table in enumerate(tables):
        unit = table["gamma"] if octaves else 1
        d = _over(table["d"], unit)
        style: dict[str, Any] = {"color": COLOURS[index % 7], "ls": DASHES[index % len(DASHES)], "lw": 1.4}
        upper.plot(d, _over(table["exact"], unit), color="0.75", lw=4, zorder=1, label="exact" if index == 0 else None)
        upper.plot(d, _over(table["approximation"], unit), label=plain(table["label"]), **style)
        lower.plot(d, _over(table["ulp"], 1), **style)
    lower.axhline(0, color="0.5", lw=0.8)
    what = "octaves" if octaves else "codes"
    upper.set_title("Δ(d): approximation and exact")
    upper.set_ylabel(f"Δ ({what})")
    lower.set_title("error (units of the last place)")
    for axes in (upper, lower):
        axes.set_xlabel(f"d ({what})")
        axes.grid(color="0.92", lw=0.8)
        axes.spines[["top", "right"]].set_visible(False)
    legend(figure)
    return figure


def _histogram_picture(results: Mapping[str, Any], view: Mapping[str, Any]) -> Figure:
    histograms = results["histograms"]
    if not histograms:
        return nothing("No codes were counted.")
    columns = min(3, len(histograms))
    rows = -(-len(histograms) // columns)
    figure = new_figure(3.4 * columns, 2.1 * rows + 0.3)
    grid = figure.subplots(rows, columns, squeeze=False).ravel()
    for axes, record in zip(grid, histograms, strict=False):
        index = 0 if record["kind"] == "weights" else 1
        codes = [math.nan if code is None else code for code in record["codes"]]
        counts = [count or 0 for count in record["counts"]]
        # one path a panel, where a bar for each code would be a hundred
        low, high = (min(known), max(known)) if (known := [c for c in codes if not math.isnan(c)]) else (0, 0)
        heights = dict(zip(codes, counts, strict=True))
        axes.stairs(
            [heights.get(code, 0) for code in range(int(low), int(high) + 1)],
            [code - 0.5 for code in range(int(low), int(high) + 2)],
            fill=True,
            facecolor=COLOURS[index],
            hatch=_HATCHES[index],
            edgecolor="white",
            lw=0,
        )
        axes.set_title(f"{plain(record['layer'], 24)}: {record['kind']}", fontsize=8)
        axes.locator_params(nbins=5)
        axes.tick_params(labelsize=7)
        axes.spines[["top", "right"]].set_visible(False)
    for axes in grid[len(histograms) :]:
        axes.set_visible(False)
    return figure


def write_page(results: Mapping[str, Any], folder: str | Path) -> dict[str, Path]:
    """Write the page and the files beside it.

    Everything is made before the first file is written, and each file appears complete or not at all.

    Args:
        results: see :func:`normalise`.
        folder: made if it is missing.

    Returns:
        The path of each file by its name: ``study.html``, ``study.json``, four CSV tables,
        and each chart as PNG and SVG.

    Raises:
        BadValueError: as :func:`normalise`.
        BadFileError: a file cannot be written.
        MissingDependencyError: jinja2, plotly or matplotlib is not installed.
    """
    clean = normalise(results)
    view = summarise(clean)
    page = _render(clean, view)
    tables = _tables(clean, view)
    pictures: dict[str, bytes] = {}
    for name, draw in (
        ("front", _front_picture),
        ("bits", _bits_picture),
        ("breakdown", _breakdown_picture),
        ("layers", _layers_picture),
        ("delta", _delta_picture),
        ("histograms", _histogram_picture),
    ):
        pictures |= both_kinds(name, draw(clean, view))
    out = make_folder(Path(folder))
    paths = {name: out / name for name in ("study.html", "study.json", *tables, *pictures)}
    write_json(paths["study.json"], clean)
    for name, text in tables.items():
        write_text(paths[name], text)
    for name, picture in pictures.items():
        write_bytes(paths[name], picture)
    # Last, so that a page that exists has its files beside it.
    write_text(paths["study.html"], page)
    return paths
