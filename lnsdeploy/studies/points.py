"""What becomes of one point: a float net on its words, its accuracy and error; and of the baselines, alike.

The float net is trained (or read) once and kept as ONNX; every point is that net, lowered for the point's datapath and
run over the test set by the fastest executor. Baselines are the same net with the weights and the inputs of each layer
rounded to their formats: integers by a scale for each output channel and one for each activation, fp8 by ml_dtypes.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import Datapath
from lnsdeploy.errors import BadValueError, LNSError, MissingDependencyError
from lnsdeploy.files import make_folder, read_bytes, write_bytes
from lnsdeploy.studies.pricing import (
    ACCUMULATOR_BITS,
    BASELINE_UNITS,
    Price,
    baseline_price,
    model_available,
    price,
)
from lnsdeploy.studies.space import CHEAP, Evaluate, Net, Point, Study, build_datapath

Floats = npt.NDArray[np.float32]
# Inputs for the error of each layer.
ERROR_SAMPLES = 64
# How sure pruning is before it gives a point up: one in a thousand, of one side.
_PRUNE_Z = 3.0
_FINE_TUNING_EPOCHS = 3
# Operands are drawn from the layers of so many inputs.
_ENERGY_INPUTS = 4


@dataclass(frozen=True)
class Outcome:
    """What became of a point.

    Args:
        state: ``"complete"``, ``"pruned"``, ``"infeasible"`` or ``"failed"``.
        reason: of the latter three.
        values: by name; None where not known.
        ranges: of values, as pairs.
        breakdown: transistors by part.
        layers: signal to noise by layer.
        cost_source: where the cost is from.
    """

    state: str
    reason: str | None
    values: dict[str, float | None]
    ranges: dict[str, list[float]]
    breakdown: dict[str, float]
    layers: list[dict[str, Any]]
    cost_source: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return dict(vars(self))


@dataclass(frozen=True, eq=False)
class Prepared:
    """A float net at hand, with its data.

    Args:
        model: onnx.ModelProto.
        net: the same in ONNX Runtime.
        statistics: of its tensors over the calibration inputs.
        sample: training inputs that accumulators are placed on.
        x, y: test inputs and labels that points are measured on.
        exact: its tensors for the first of them.
        accuracy: its own.
        weights: numbers in its layers.
    """

    model: Any
    net: Any
    statistics: Any
    sample: Floats
    x: Floats
    y: npt.NDArray[np.int64]
    exact: dict[str, Floats]
    accuracy: float
    weights: int


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Bounds of a share of which `right` of `total` were seen (Wilson 1927); 95 % by default."""
    if total == 0:
        return 0.0, 1.0
    share = right / total
    middle = (share + z * z / (2 * total)) / (1 + z * z / total)
    half = z / (1 + z * z / total) * math.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    return max(0.0, middle - half), min(1.0, middle + half)


# ---------------------------------------------------------------------------------------------------
# The float net


def float_file(study: Study, net: Net, out: Path) -> Path:
    """Train or read a net, once, and keep it as ONNX.

    Raises:
        LNSError: the training fails, or the file is no net that can be read.
    """
    kept = make_folder(out / "nets") / float_name(net)
    with locked(kept.with_suffix(".lock")):
        if kept.is_file():
            return kept
        if net.file is not None:
            from lnsdeploy.exporters.convert import ExportOptions, _read

            model = _read(net.file, None, ExportOptions(), None, None).model
        else:
            from lnsdeploy.exporters.export import float_onnx
            from lnsdeploy.training.layers import deployable
            from lnsdeploy.training.run import load_run

            run = Path(net.run) if net.run else float_run(net, out)
            loaded = load_run(run)
            plain, _ = deployable(loaded.model)
            model = float_onnx(plain, _data(net).train_x[:2])
        write_bytes(kept, model.SerializeToString())
    return kept


def float_name(net: Net) -> str:
    """The name of a net's ONNX file: another net of the same name has another."""
    import hashlib
    import json

    digest = hashlib.sha256(json.dumps(net.identity, sort_keys=True).encode()).hexdigest()[:8]
    return f"{net.name}-{digest}.onnx"


def float_run(net: Net, out: Path) -> Path:
    """The run directory of the float training of a net; trained if it is not there."""
    from lnsdeploy.training.trainer import train

    folder = out / "runs" / f"{net.name}-float"
    train(_config(net, as_float=True, seed=net.seed), folder)
    return folder


def _config(net: Net, **others: Any) -> Any:
    from lnsdeploy.training.trainer import config_from_options

    options: dict[str, Any] = {"data": net.data, "data_dir": net.data_dir, "model": net.model, "epochs": net.epochs}
    if net.optimizer is not None:
        options["optimizer"] = net.optimizer
    return config_from_options(**(options | others))


def _data(net: Net) -> Any:
    from lnsdeploy.training.data import load_data

    return load_data(net.data, net.data_dir)


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Only one process of a machine does what is inside; where the system has no such locks, all do."""
    try:
        import fcntl
    except ImportError:  # pragma: no cover
        yield
        return
    make_folder(path.parent)
    with path.open("w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        yield


_PREPARED: dict[tuple[str, str], Prepared] = {}


def prepare(study: Study, net: Net, out: Path) -> Prepared:
    """A net at hand; kept for the next point of this process."""
    import json

    key = (str(out), json.dumps([net.identity, vars(study.evaluate)], sort_keys=True, default=str))
    if key not in _PREPARED:
        _PREPARED[key] = _prepare(study.evaluate, net, float_file(study, net, out))
    return _PREPARED[key]


def _prepare(how: Evaluate, net: Net, file: Path) -> Prepared:
    try:
        import onnx
    except ImportError as error:
        raise MissingDependencyError("a study needs onnx: pip install 'lnsdeploy[all,study]'") from error
    from lnsdeploy.exporters.calibration import FloatNet, Inputs, collect
    from lnsdeploy.exporters.lower import float_values

    model = onnx.load_model_from_string(read_bytes(file))
    found, data = FloatNet(model), _data(net)
    step = {"all": slice(None), "even": slice(0, None, 2), "odd": slice(1, None, 2)}[how.part]
    x, y = data.test_x[step][: how.samples or None], data.test_y[step][: how.samples or None]
    shape = tuple(d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim)[1:]
    if shape != tuple(x.shape[1:]):
        raise BadValueError(f"net {net.name!r} takes inputs of shape {shape}, {net.data} has {tuple(x.shape[1:])}")
    inputs = Inputs(net.data, f"{how.calibrate} training inputs of {net.data}", data.train_x[: how.calibrate])
    right = _right(found.run, x, y)
    weights = sum(int(np.prod(t.dims)) for t in model.graph.initializer if len(t.dims) > 1)
    return Prepared(
        model,
        found,
        collect(found, inputs, batch=64),
        data.train_x[: how.sample],
        x,
        y,
        float_values(model, x[:ERROR_SAMPLES]),
        right / len(x),
        weights,
    )


def _right(run: Any, x: Floats, y: npt.NDArray[Any]) -> int:
    total = 0
    for first in range(0, len(x), 128):
        scores = np.asarray(run(x[first : first + 128]))
        total += int((scores.reshape(len(scores), -1).argmax(axis=1) == y[first : first + 128]).sum())
    return total


# ---------------------------------------------------------------------------------------------------
# A point


def evaluate(study: Study, point: Point, out: Path) -> Outcome:
    """Measure a point.

    Raises:
        LNSError: it cannot be; what is wrong with the point's combination itself is an outcome.
    """
    if point.kind == "lns":
        return _evaluate_lns(study, point, out)
    return _evaluate_baseline(study, point, out)


def _evaluate_lns(study: Study, point: Point, out: Path) -> Outcome:
    if point.datapath is None:
        return Outcome("infeasible", point.problem, {}, {}, {}, [])
    cost = Price(source="not asked for")
    if _priced(study):
        # hardware that runs all layers must hold the widest of their formats
        cost = max((price(d) for d in study.datapaths(point)), key=lambda p: p.transistors or 0)
    values: dict[str, float | None] = _costs(cost)
    ranges = {} if cost.range is None else {"transistors": list(cost.range)}

    def outcome(state: str, reason: str | None, layers: list[dict[str, Any]] | None = None) -> Outcome:
        return Outcome(state, reason, values, ranges, cost.breakdown, layers or [], cost.source)

    if broken := _broken(study, values, CHEAP):
        return outcome("infeasible", broken)
    for name in study.needed & set(CHEAP) - {"size_bytes"}:
        if values[name] is None:
            raise BadValueError(f"{name} of {point.datapath.name} is not known ({cost.source})")
    ready = prepare(study, study.net(point.net), out)
    artifact = _lowered(study, point, ready, out)
    values["size_bytes"] = _bytes(artifact)
    if broken := _broken(study, values, CHEAP):
        return outcome("infeasible", broken)
    from lnsdeploy.emulator.executor import fastest, get_executor

    engine = get_executor(fastest())
    graph = artifact.graph

    def run(x: Floats) -> Floats:
        return np.asarray(graph.decode_output(engine.run(artifact, x)))

    few = study.evaluate.prune_on
    if few and few < len(ready.x):
        right = _right(run, ready.x[:few], ready.y[:few])
        _, highest = wilson(right, few, _PRUNE_Z)
        best = {"accuracy": highest, "drop": ready.accuracy - highest}
        if broken := _broken(study, best, ("accuracy", "drop")):
            values |= {"accuracy": right / few, "drop": ready.accuracy - right / few}
            ranges["accuracy"] = list(wilson(right, few))
            return outcome("pruned", f"of the first {few} inputs {right} are right: {broken}")
    right = _right(run, ready.x, ready.y)
    values |= {"accuracy": right / len(ready.x), "drop": ready.accuracy - right / len(ready.x)}
    ranges["accuracy"] = list(wilson(right, len(ready.x)))
    values["sqnr_db"], layers = _errors(artifact, engine, ready)
    if "energy" in study.needed:
        values["energy"] = _energy(artifact, ready).per_product
    return outcome("complete" if not (broken := _broken(study, values)) else "infeasible", broken, layers)


def _priced(study: Study) -> bool:
    """Whether hardware's cost is to be told: always by the fitted model, by synthesis only where the study needs it."""
    return model_available() or bool(study.needed & set(CHEAP) - {"size_bytes"})


def _costs(cost: Price) -> dict[str, float | None]:
    return {name: getattr(cost, name) for name in ("transistors", "depth", "table_bits")} | {"energy": None}


def _energy(artifact: Any, ready: Prepared) -> Any:
    """Switching of the point's MAC, and of the baselines', under the operands of the net's own layers."""
    from lnsdeploy.cost.system import whole

    return whole(artifact, ready.x[:_ENERGY_INPUTS]).energy


def _broken(study: Study, values: Mapping[str, float | None], names: tuple[str, ...] | None = None) -> str | None:
    for constraint in study.constraints:
        if names is None or constraint.value in names:
            broken = constraint.broken(values)
            if broken:
                return broken
    return None


def _bytes(artifact: Any) -> int:
    from lnsdeploy.emulator.graph import Conv, Gemm
    from lnsdeploy.exporters.convert import stored_bytes

    layers = [node for node in artifact.graph.nodes if isinstance(node, (Conv, Gemm))]
    return sum(stored_bytes(layer.words.size, layer.plan.weight.bits) for layer in layers)


def _errors(artifact: Any, engine: Any, ready: Prepared) -> tuple[float | None, list[dict[str, Any]]]:
    from lnsdeploy.exporters.lower import layer_errors

    words: dict[str, Any] = {}
    engine.run(artifact, ready.x[:ERROR_SAMPLES], visit=words.__setitem__)
    errors = layer_errors(ready.exact, artifact.graph, words)
    layers: list[dict[str, Any]] = [
        {"name": name, "sqnr_db": _finite(db)} for name, db in errors.items() if name in artifact.macs
    ]
    return (layers[-1]["sqnr_db"] if layers else None), layers


def _finite(value: float | None) -> float | None:
    """JSON has no infinity: words that are exact are 999 dB, as in the other files."""
    return None if value is None or math.isnan(value) else round(max(min(value, 999.0), -999.0), 3)


def _lowered(study: Study, point: Point, ready: Prepared, out: Path) -> Any:
    """The net of a point."""
    assert point.datapath is not None
    if study.evaluate.accuracy == "post-training":
        return _post_training(point.datapath, study.evaluate.sample, study.recipe(point), ready)
    from lnsdeploy.exporters.export import lower_datapaths

    run = _trained(study, point, out)
    found = lower_datapaths(run, [point.datapath], sample=study.evaluate.sample).exported[0]
    return _artifact(found.lowered.graph, point.datapath)


def _post_training(datapath: Datapath, sample: int, recipe: Any, ready: Prepared) -> Any:
    from lnsdeploy.exporters.lower import LowerOptions, lower

    options = LowerOptions(datapath, sample=sample, recipe=recipe, statistics=ready.statistics, correct_bias=True)
    return _artifact(lower(ready.model, ready.sample, options).graph, datapath)


def _artifact(graph: Any, datapath: Datapath) -> Any:
    from lnsdeploy.emulator.artifact import Artifact
    from lnsdeploy.exporters.export import node_macs

    return Artifact(graph, b"", datapath.name, node_macs(graph))


def _trained(study: Study, point: Point, out: Path) -> Path:
    """The run of a point's formats; datapaths of the same formats share it."""
    import hashlib

    from lnsdeploy.files import write_text
    from lnsdeploy.training.trainer import train

    assert point.datapath is not None
    how, net = study.evaluate, study.net(point.net)
    recipe = study.recipe(point)
    weight, activation = point.datapath.weight, point.datapath.activation
    options: dict[str, Any] = {"weights": str(weight), "activations": str(activation), "seed": how.seed}
    name = f"{net.name}-{how.accuracy}-{weight}-{activation}-s{how.seed}".replace(":", ".")
    if how.epochs is not None:
        options["epochs"] = how.epochs
        name += f"-e{how.epochs}"
    if recipe is not None:
        text = recipe.to_toml()
        name += "-" + hashlib.sha256(text.encode()).hexdigest()[:6]
        file = make_folder(out / "runs") / f"{name}.toml"
        write_text(file, text)
        options["recipe"] = file
    if how.accuracy == "fine-tuned":
        options["init_from"] = str((out / "runs" / f"{net.name}-float").absolute())
        options["epochs"] = how.epochs or _FINE_TUNING_EPOCHS
    folder = out / "runs" / name
    with locked(folder.with_suffix(".lock")):
        if how.accuracy == "fine-tuned":
            with locked(out / "runs" / f"{net.name}-float.lock"):
                float_run(net, out)
        train(_config(net, **options), folder)
    return folder


def histograms(study: Study, point: Point, out: Path) -> list[dict[str, Any]]:
    """How often each code occurs in the weights of each layer, and in its results for the first test inputs."""
    from lnsdeploy.emulator.executor import fastest, get_executor
    from lnsdeploy.emulator.graph import Conv, Gemm

    ready = prepare(study, study.net(point.net), out)
    artifact = _lowered(study, point, ready, out)
    words: dict[str, Any] = {}
    get_executor(fastest()).run(artifact, ready.x[:ERROR_SAMPLES], visit=words.__setitem__)
    made = []
    for node in artifact.graph.nodes:
        if not isinstance(node, (Conv, Gemm)):
            continue
        seen = [("weights", node.words, node.plan.weight)]
        if node.output in words:
            seen.append(("activations", words[node.output], artifact.graph.tensors[node.output].format))
        for kind, values, fmt in seen:
            codes = np.asarray(values).astype(np.int64).reshape(-1) & fmt.max_code
            found, counts = np.unique(codes, return_counts=True)
            layer = f"{point.net}: {node.name}"
            made.append({"layer": layer, "kind": kind, "codes": found.tolist(), "counts": counts.tolist()})
    return made


# ---------------------------------------------------------------------------------------------------
# Baselines


def _evaluate_baseline(study: Study, point: Point, out: Path) -> Outcome:
    name = str(point.parameters["baseline"])
    ready = prepare(study, study.net(point.net), out)
    cost = baseline_price(name) if _priced(study) else Price(source="not asked for")
    values: dict[str, float | None] = _costs(cost)
    width = {"float32": 32, "int8": 8, "int4": 4}.get(name, 8)
    values["size_bytes"] = -(-ready.weights * width // 8)
    if name == "float32":
        rounded = ready.net
    else:
        from lnsdeploy.exporters.calibration import FloatNet

        rounded = FloatNet(rounded_model(ready.model, name, ready.statistics))
    right = _right(rounded.run, ready.x, ready.y)
    values |= {"accuracy": right / len(ready.x), "drop": ready.accuracy - right / len(ready.x)}
    ranges = {"accuracy": list(wilson(right, len(ready.x)))}
    if cost.range is not None:
        ranges["transistors"] = list(cost.range)
    if "energy" in study.needed and name in _ENERGY_UNITS:
        values["energy"] = _baselines_energy(study, ready).get(_ENERGY_UNITS[name])
    exact = ready.exact[ready.net.output]
    noise = exact.astype(np.float64) - rounded.run(ready.x[:ERROR_SAMPLES])
    signal, power = float((exact.astype(np.float64) ** 2).sum()), float((noise**2).sum())
    values["sqnr_db"] = _finite(10 * math.log10(signal / power)) if signal and power else 999.0
    return Outcome("complete", None, values, ranges, cost.breakdown, [], cost.source)


# Units of the baselines, as lnsdeploy.cost.energy names them.
_ENERGY_UNITS = {name: f"{unit} mac, {ACCUMULATOR_BITS}-bit" for name, unit in BASELINE_UNITS.items()}


def _baselines_energy(study: Study, ready: Prepared) -> Mapping[str, float]:
    """Of the baselines' MACs under this net's numbers: those of its 8-bit words, rounded to each format."""
    artifact = _post_training(build_datapath({"format": "8:8"}), study.evaluate.sample, None, ready)
    found: Mapping[str, float] = _energy(artifact, ready).baselines
    return found


@lru_cache(maxsize=4)
def _fp8(name: str) -> tuple[Any, int, float]:
    """ml_dtypes' type, ONNX's number of it, and its largest value."""
    try:
        import ml_dtypes
        from onnx import TensorProto
    except ImportError as error:
        raise MissingDependencyError(
            "baselines in fp8 need onnx and ml_dtypes: pip install 'lnsdeploy[study]'"
        ) from error
    if name == "fp8-e4m3":
        return ml_dtypes.float8_e4m3fn, TensorProto.FLOAT8E4M3FN, 448.0
    return ml_dtypes.float8_e5m2, TensorProto.FLOAT8E5M2, 57344.0


def round_weights(weight: Floats, name: str, axis: int = 0) -> Floats:
    """Weights rounded to a baseline's format, with one scale for each channel.

    Args:
        axis: the channels'.
    """
    others = tuple(i for i in range(weight.ndim) if i != axis)
    largest = np.abs(weight).max(axis=others, keepdims=True).astype(np.float64)
    largest[largest == 0] = 1
    if name.startswith("int"):
        top = (1 << (int(name[3:]) - 1)) - 1
        scale = largest / top
        return np.asarray(np.clip(np.rint(weight / scale), -top, top) * scale, dtype=np.float32)
    kind, _, top_value = _fp8(name)
    scale = largest / top_value
    return np.asarray((weight / scale).astype(np.float32).astype(kind).astype(np.float64) * scale, dtype=np.float32)


def rounded_model(model: Any, name: str, statistics: Mapping[str, Any]) -> Any:
    """A float net with weights and inputs of layers rounded to a baseline's format, in standard operators.

    Args:
        model: onnx.ModelProto.
        name: ``"int8"``, ``"int4"``, ``"fp8-e4m3"`` or ``"fp8-e5m2"``.
        statistics: magnitudes of the net's tensors: activations have one symmetric scale, that of the largest.
    """
    from onnx import TensorProto, helper, numpy_helper

    made = type(model)()
    made.CopyFrom(model)
    initializers = {tensor.name: tensor for tensor in made.graph.initializer}
    nodes: list[Any] = []
    rounded: dict[str, str] = {}

    def number(label: str, value: float) -> str:
        made.graph.initializer.append(numpy_helper.from_array(np.float32(value), label))
        return label

    for node in made.graph.node:
        if node.op_type in ("Conv", "Gemm", "MatMul") and node.input[1] in initializers:
            tensor = initializers[node.input[1]]
            transposed = any(a.name == "transB" and a.i for a in node.attribute)
            axis = 0 if node.op_type == "Conv" or transposed else 1
            weight = np.asarray(numpy_helper.to_array(tensor), dtype=np.float32)
            tensor.CopyFrom(numpy_helper.from_array(round_weights(weight, name, axis), tensor.name))
            source = node.input[0]
            if source not in rounded:
                largest = (statistics[source].maximum if source in statistics else 0.0) or 1.0
                label = f"{source}.{name}"
                if name.startswith("int"):
                    top = (1 << (int(name[3:]) - 1)) - 1
                    scale = number(f"{label}.scale", largest / top)
                    low, high = number(f"{label}.low", -top), number(f"{label}.high", top)
                    nodes += [
                        helper.make_node("Div", [source, scale], [f"{label}.scaled"]),
                        helper.make_node("Round", [f"{label}.scaled"], [f"{label}.whole"]),
                        helper.make_node("Clip", [f"{label}.whole", low, high], [f"{label}.codes"]),
                        helper.make_node("Mul", [f"{label}.codes", scale], [label]),
                    ]
                else:
                    _, kind, top_value = _fp8(name)
                    scale = number(f"{label}.scale", largest / top_value)
                    # told, lest it is taken for floats
                    made.graph.value_info.append(helper.make_tensor_value_info(f"{label}.codes", kind, None))
                    nodes += [
                        helper.make_node("Div", [source, scale], [f"{label}.scaled"]),
                        helper.make_node("Cast", [f"{label}.scaled"], [f"{label}.codes"], to=kind, saturate=1),
                        helper.make_node("Cast", [f"{label}.codes"], [f"{label}.back"], to=TensorProto.FLOAT),
                        helper.make_node("Mul", [f"{label}.back", scale], [label]),
                    ]
                rounded[source] = label
            node.input[0] = rounded[source]
        nodes.append(node)
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del made.graph.node[:]
    made.graph.node.extend(kept)
    # types inferred before would name the new tensors wrongly
    for opset in made.opset_import:
        if opset.domain in ("", "ai.onnx"):
            # casts to fp8 came with 19
            opset.version = max(opset.version, 19)
    return made


def describe_error(error: BaseException) -> str:
    """One line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, LNSError) else f"{type(error).__name__}: {text}"


def quiet() -> None:
    """One thread, as there is a process for every core."""
    os.environ["LNSDEPLOY_THREADS"] = "1"
    os.environ.setdefault("OMP_NUM_THREADS", "1")
