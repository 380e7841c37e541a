"""`lnsdeploy compare`: two runs, studies or models side by side; of models, float ones too."""

from __future__ import annotations

import csv
import io
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.files import read_bytes

# Characters of a value in a table.
MAX_SHOWN = 48
Value = str | int | float | bool | None


@dataclass(frozen=True)
class Comparison:
    """Two of a kind.

    Args:
        kind: ``"run"``, ``"study"`` or ``"model"``.
        names: of both.
        rows: by what it is, both values; None where one lacks it.
    """

    kind: str
    names: tuple[str, str]
    rows: dict[str, tuple[Value, Value]]

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "kind": self.kind,
            "a": self.names[0],
            "b": self.names[1],
            "rows": [{"name": name, "a": a, "b": b, "equal": a == b} for name, (a, b) in self.rows.items()],
            "differences": [name for name, (a, b) in self.rows.items() if a != b],
        }

    def text(self) -> str:
        """A table; rows that differ are marked, and numbers have their difference."""
        table = [("", *(name if len(name) <= MAX_SHOWN else f"…{name[1 - MAX_SHOWN :]}" for name in self.names), "")]
        for name, (a, b) in self.rows.items():
            mark = "" if a == b else "*"
            if mark and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in (a, b)):
                mark = f"{float(b) - float(a):+g}"  # type: ignore[arg-type]
            table.append((name, _shown(a), _shown(b), mark))
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        return "\n".join(
            f"{row[0]:<{widths[0]}}  {row[1]:>{widths[1]}}  {row[2]:>{widths[2]}}  {row[3]}".rstrip() for row in table
        )


def _shown(value: Value) -> str:
    if value is None:
        return "–"
    text = f"{value:,.6g}" if isinstance(value, float) else str(value)
    # all of it is in the JSON
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 1]}…"


def compare(first: str | Path, second: str | Path) -> Comparison:
    """Put two runs, studies or ONNX models, LNS or float, side by side.

    Raises:
        BadFileError: one of them is none of these, or damaged. BadValueError: they are not of one kind.
    """
    (kind, a), (other, b) = _read(Path(first)), _read(Path(second))
    if kind != other:
        raise BadValueError(f"{first} is a {kind} and {second} a {other}; two of a kind can be compared")
    rows = {name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b])}
    return Comparison(kind, (str(first), str(second)), rows)


def _read(path: Path) -> tuple[str, dict[str, Value]]:
    if path.suffix == ".onnx":
        return "model", _model(path)
    if path.suffix == ".json" or (path / "study.json").is_file():
        return "study", _study(path)
    if (path / "metrics.csv").is_file() or (path / "weights.safetensors").is_file():
        return "run", _run(path)
    raise BadFileError(f"{path}: neither a run directory, nor a study's folder, nor an ONNX file")


def _flat(prefix: str, table: Any) -> dict[str, Value]:
    if isinstance(table, dict):
        made: dict[str, Value] = {}
        for key, value in table.items():
            made |= _flat(f"{prefix}.{key}" if prefix else str(key), value)
        return made
    if isinstance(table, (list, tuple)):
        return {prefix: " ".join(map(str, table))}
    return {prefix: table if table is None or isinstance(table, (str, int, float)) else str(table)}


def _run(folder: Path) -> dict[str, Value]:
    from lnsdeploy.training.run import load_run

    run = load_run(folder)
    made = _flat("", run.config.to_dict())
    rows = list(csv.DictReader(io.StringIO(read_bytes(folder / "metrics.csv").decode("utf-8", "replace"))))
    if rows:
        for key, text in rows[-1].items():
            try:
                made[f"last {key}"] = float(text)
            except (TypeError, ValueError):
                made[f"last {key}"] = text
    made["parameters"] = sum(p.numel() for p in run.model.parameters())
    return made


def _model(file: Path) -> dict[str, Value]:
    from lnsdeploy.emulator.artifact import METADATA, load_artifact, parse_model
    from lnsdeploy.emulator.graph import Conv, Gemm

    if all(entry.key != f"{METADATA}.graph" for entry in parse_model(read_bytes(file), str(file)).metadata_props):
        return _float_model(file)
    artifact = load_artifact(file)
    graph = artifact.graph
    made: dict[str, Value] = {
        "arithmetic": "LNS",
        "bytes": len(artifact.data),
        "input": " ".join(map(str, graph.input_shape)),
        "MACs an input": sum(artifact.macs.values()),
        "coverage": artifact.coverage,
        "formats": " ".join(artifact.formats),
        "nodes": len(graph.nodes),
        "datapath.fingerprint": graph.datapath.fingerprint,
    }
    made |= _flat("datapath", graph.datapath.to_dict())
    made |= {f"metadata.{key}": value for key, value in graph.metadata.items() if "\n" not in value}
    for node in graph.nodes:
        if isinstance(node, (Conv, Gemm)):
            shape = "×".join(map(str, node.words.shape))
            made[f"layer {node.name}"] = f"{shape} {node.plan.activation}·{node.plan.weight}"
    return made


def _float_model(file: Path) -> dict[str, Value]:
    """Of a float ONNX file, in the form that an export reads it in."""
    import hashlib
    import math
    from collections import Counter

    from onnx import numpy_helper

    from lnsdeploy.exporters.isolated import read_source
    from lnsdeploy.exporters.lower import layer_name

    source = read_source(file)
    graph = source.model.graph
    held = {tensor.name: tensor for tensor in graph.initializer}
    told = [*graph.input, *graph.value_info, *graph.output]
    # of one input: the batch axis alone is open
    shapes = {v.name: [d.dim_value or 1 for d in v.type.tensor_type.shape.dim] for v in told}
    shapes |= {name: list(tensor.dims) for name, tensor in held.items()}
    digest = hashlib.sha256()
    layers: dict[str, Value] = {}
    macs = 0
    for node in graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        output = math.prod(shapes.get(node.output[0], [0]))
        a, w = (shapes[name] for name in node.input[:2])
        if node.op_type == "Conv":
            macs += output * math.prod(w[1:])
        elif node.op_type == "ConvTranspose":
            macs += math.prod(a) * math.prod(w[1:])
        else:
            macs += output * (a[0] if any(x.name == "transA" and x.i for x in node.attribute) else a[-1])
        if node.input[1] in held:
            digest.update(numpy_helper.to_array(held[node.input[1]]).tobytes())
            layers[f"layer {layer_name(node.input[1], node.name)}"] = "×".join(map(str, w)) + " float32"
    return {
        "arithmetic": "float32",
        "bytes": source.float_bytes,
        "input": " ".join(map(str, source.input_shape)),
        "MACs an input": macs,
        "nodes": len(graph.node),
        "parameters": source.parameters,
        "layers' weights": digest.hexdigest()[:16],
        **{f"operator {name}": count for name, count in sorted(Counter(n.op_type for n in graph.node).items())},
        **layers,
    }


def _study(path: Path) -> dict[str, Value]:
    from lnsdeploy.studies.study import read_results

    found = read_results(path)
    points = found["points"]
    made: dict[str, Value] = {
        "name": found["study"]["name"],
        "fingerprint": found["study"]["fingerprint"],
        "points": sum(point["kind"] == "lns" for point in points),
    }
    for state in ("complete", "pruned", "infeasible", "failed"):
        made[state] = sum(point["kind"] == "lns" and point["state"] == state for point in points)
    for net in found["study"]["nets"]:
        own = [point for point in points if point["net"] == net["name"]]
        for point in own:
            if point["kind"] != "lns":
                made |= {
                    f"{net['name']} {point['label']} {o['name']}": point["values"].get(o["name"])
                    for o in found["objectives"]
                }
        for objective in found["objectives"]:
            known = [
                (point["values"][objective["name"]], point["label"])
                for point in own
                if point["kind"] == "lns" and point["pareto"] and point["values"].get(objective["name"]) is not None
            ]
            if known:
                best = max(known) if objective["direction"] == "maximize" else min(known)
                made[f"{net['name']} best {objective['name']}"] = best[0]
                made[f"{net['name']} best {objective['name']} by"] = best[1]
        front = {point["label"] for point in own if point["kind"] == "lns" and point["pareto"]}
        made[f"{net['name']} front"] = len(front)
        made |= {f"{net['name']} on the front: {label}": True for label in sorted(front)}
    return made
