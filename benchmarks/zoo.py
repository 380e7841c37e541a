"""Well-known nets as LNS ONNX models: what lowering makes of them, and whether every executor agrees.

    python -m benchmarks.zoo --markdown docs/zoo.md

The nine nets that the `onnx` package carries have no weights of their own (each is 0.02): they are filled with seeded
random ones here. Those of timm are exported by `torch.onnx` with the random weights that timm gives them. Each is
lowered at full size and run by ONNX Runtime with the native operators; and again for small inputs, where every tensor
of words is compared between executors, function bodies in a plain ONNX Runtime among them.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from lnsdeploy import files

LIGHT = (
    "bvlc_alexnet",
    "densenet121",
    "inception_v1",
    "inception_v2",
    "resnet50",
    "shufflenet",
    "squeezenet",
    "vgg19",
    "zfnet512",
)
TIMM = ("resnet18", "mobilenetv3_large_100", "efficientnet_b0", "vit_tiny_patch16_224")
FORMATS = ("8:8", "16:1024")
# EfficientNet's gates and deep chains want the finer grid more than the range.
WIDE = {"efficientnet_b0": "16:2048"}
# Pictures for executors that take their time.
SMALL = 32
# The smallest that a net takes: branches of Inception v2 meet from 96 on.
LEAST = {"inception_v2": 96}
# Nets whose last batch norms see few places of small pictures: their statistics, and so the float nets, would be noise.
FULL = {"mobilenetv3_large_100": 224, "efficientnet_b0": 224}
EXECUTORS = ("cpu", "ort", "ort-functions", "torch")


# ---------------------------------------------------------------------------------------------------
# Nets


def light(name: str, size: int = 224, seed: int = 0) -> ModelProto:
    """One of the onnx package's nets with seeded random weights: He et al. (2015) for products, near 1 for scales.

    Args:
        size: of its pictures; the weights behind a flattening, and windows that reach over everything, follow it.
    """
    import onnx

    folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
    model = onnx.load(folder / f"light_{name}.onnx")
    graph = model.graph
    random = np.random.default_rng([seed, *name.encode()])
    shapes = {t.name: numpy_helper.to_array(t) for t in graph.initializer}
    made: dict[str, list[int]] = {}
    kept: list[NodeProto] = []
    for node in graph.node:
        if node.op_type == "ConstantOfShape":
            made[node.output[0]] = [int(n) for n in shapes[node.input[0]]]
        else:
            kept.append(node)
    for tensor in graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            made[tensor.name] = list(tensor.dims)
    reads = _reads(kept)
    filled = {weight: _filled(random, dims, *_role(weight, reads)) for weight, dims in made.items() if weight in reads}
    data = next(i.name for i in graph.input if i.name not in shapes)
    del graph.node[:]
    graph.node.extend(kept)
    constants = [t for t in graph.initializer if t.name not in filled and t.name in reads]
    del graph.initializer[:]
    graph.initializer.extend(constants)
    del graph.input[:]
    graph.input.append(helper.make_tensor_value_info(data, TensorProto.FLOAT, [1, 3, size, size]))
    if size != 224:
        _shrink(model, filled, random)
    graph.initializer.extend(numpy_helper.from_array(value, weight) for weight, value in filled.items())
    _free(graph.output[0])
    return model


def _free(value: Any) -> None:
    kind = value.type.tensor_type.elem_type
    value.CopyFrom(helper.make_tensor_value_info(value.name, kind, None))


def _reads(nodes: Sequence[NodeProto]) -> dict[str, tuple[NodeProto, int]]:
    return {name: (node, i) for node in reversed(nodes) for i, name in enumerate(node.input)}


def _role(weight: str, reads: dict[str, tuple[NodeProto, int]]) -> tuple[str, int]:
    node, position = reads[weight]
    while node.op_type == "Unsqueeze":
        node, position = reads[node.output[0]]
    return node.op_type, position


def _filled(random: np.random.Generator, dims: list[int], op: str, position: int) -> np.ndarray:
    values = random.standard_normal(dims)
    if op in ("Conv", "Gemm") and position == 1:
        # Gemm's weights lie as [N, K] in these nets
        values *= np.sqrt(2 / max(int(np.prod(dims[1:])), 1))
    elif (op, position) in (("BatchNormalization", 1), ("BatchNormalization", 4), ("Mul", 1)):
        values = np.exp(0.1 * values)
    else:
        values *= 0.1
    return values.astype(np.float32)


def _shrink(model: ModelProto, filled: dict[str, np.ndarray], random: np.random.Generator) -> None:
    """Make a net fit smaller pictures: windows that would not fit shrink, weights behind a flattening follow."""
    graph = model.graph
    constants = {t.name: numpy_helper.to_array(t) for t in graph.initializer} | filled
    shapes: dict[str, list[int]] = {
        graph.input[0].name: [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim]
    }
    targets: dict[str, np.ndarray] = {}
    for node in graph.node:
        x = shapes.get(node.input[0])
        if node.op_type in ("AveragePool", "MaxPool") and x is not None:
            parts = {a.name: a for a in node.attribute}
            if parts["kernel_shape"].ints[0] > x[2]:
                parts["kernel_shape"].ints[:] = x[2:]
                if "pads" in parts:
                    node.attribute.remove(parts["pads"])
        if node.op_type == "Reshape" and x is not None and len(constants[node.input[1]]) == 2:
            targets[node.input[1]] = np.array([x[0], int(np.prod(x[1:]))], dtype=np.int64)
            constants[node.input[1]] = targets[node.input[1]]
        elif node.op_type == "Reshape" and x is not None:
            # ShuffleNet's shuffles: the spatial sizes stay
            want = constants[node.input[1]].copy()
            want[-2:] = x[-2:]
            key = f"{node.input[1]}_{node.name or node.output[0]}"
            targets[key] = constants[key] = want
            node.input[1] = key
        if node.op_type == "Gemm" and x is not None and x[1] != constants[node.input[1]].shape[1]:
            wider = f"{node.input[1]}_small"
            filled[wider] = _filled(random, [constants[node.input[1]].shape[0], x[1]], "Gemm", 1)
            constants[wider], node.input[1] = filled[wider], wider
        made = _run(node, shapes, constants)
        if any(name in shapes for name in node.input):
            shapes[node.output[0]] = list(made.shape)
        else:
            constants[node.output[0]] = made
    used = {name for node in graph.node for name in node.input}
    keep = [t for t in graph.initializer if t.name not in targets and t.name in used]
    del graph.initializer[:]
    graph.initializer.extend(keep)
    graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in targets.items())
    for name in [name for name in filled if name not in used]:
        del filled[name]


def _run(node: NodeProto, shapes: dict[str, list[int]], constants: dict[str, np.ndarray]) -> np.ndarray:
    """What a node makes of zeros, or of constants."""
    import onnx
    import onnxruntime

    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, shapes[n]) for n in node.input if n in shapes]
    given = [numpy_helper.from_array(constants[name], name) for name in node.input if name in constants]
    output = onnx.ValueInfoProto(name=node.output[0])
    graph = helper.make_graph([node], "one", inputs, [output], given)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 9)], ir_version=8)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    feeds = {value.name: np.zeros(shapes[value.name], dtype=np.float32) for value in inputs}
    made: np.ndarray = session.run(None, feeds)[0]
    return made


def timm_net(name: str, size: int = 224, seed: int = 0) -> ModelProto:
    """A net of timm with seeded random weights and batch statistics of noise, as torch.onnx exports it."""
    import torch

    from lnsdeploy.evaluation.models import load_model
    from lnsdeploy.exporters.convert import torch_onnx

    load_model("timm:resnet18", weights="random", seed=seed)  # which makes timm importable beside a torch for CPUs
    import timm

    torch.manual_seed(seed)
    more = {"img_size": size} if name.startswith("vit") else {}
    module = timm.create_model(name, **more).train()
    with torch.no_grad():
        for part in module.modules():
            if isinstance(part, torch.nn.BatchNorm2d):
                part.momentum = None
        # statistics of a net that has seen something: without them nothing is normalised
        for _ in range(4):
            module(torch.randn(4, 3, size, size))
    example = np.zeros((2, 3, size, size), dtype=np.float32)
    return torch_onnx(module.eval(), example)


def net(name: str, size: int, seed: int = 0) -> ModelProto:
    """A net of either kind."""
    return light(name, size, seed) if name in LIGHT else timm_net(name, size, seed)


# ---------------------------------------------------------------------------------------------------
# Measurements


def compare(artifact: Any, x: np.ndarray, executors: Sequence[str]) -> dict[str, str]:
    """By executor, "equal", or the first tensor of words that differs from the first executor's."""
    from lnsdeploy.emulator.executor import get_executor

    found: dict[str, dict[str, np.ndarray]] = {}
    for name in executors:
        words: dict[str, np.ndarray] = {}
        get_executor(name).run(artifact, x, visit=words.__setitem__)
        found[name] = words
    first = found[executors[0]]
    result = {}
    for name in executors[1:]:
        differing = [t for t, w in first.items() if not np.array_equal(w, found[name][t])]
        result[name] = f"differs in {differing[0]}" if differing else "equal"
    return result


def _latencies(artifact: Any, model: ModelProto, x: np.ndarray) -> tuple[float, float]:
    """Seconds of a run by `ort`, and of the float net in ONNX Runtime, in turns: the best of three each."""
    import onnxruntime

    from lnsdeploy.emulator.executor import get_executor

    ort = get_executor("ort")
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x}
    best = [np.inf, np.inf]
    for attempt in range(4):
        for i, run in enumerate((lambda: ort.run(artifact, x), lambda: session.run(None, feed))):
            start = time.perf_counter()
            run()
            # the first builds sessions
            best[i] = min(best[i], time.perf_counter() - start if attempt else np.inf)
    return best[0], best[1]


def measure(name: str, fmt: str, *, size: int = 224, executors: Sequence[str] = EXECUTORS) -> dict[str, Any]:
    """Lower a net at full size and for small inputs, run it, and compare."""
    from lnsdeploy.exporters.convert import ExportOptions, export, peak_bytes

    bits, gamma = (int(part) for part in fmt.split(":"))
    options = ExportOptions(bits, gamma, evaluate_on=2, calibrate_on=8)
    little = max(SMALL, LEAST.get(name, 0))
    size = max(size, little, FULL.get(name, 0))
    model = net(name, size)
    start = time.perf_counter()
    result = export(model, options=options, name=name)
    seconds = time.perf_counter() - start
    x = np.random.default_rng(1).standard_normal((1, 3, size, size)).astype(np.float32)
    latency, float_latency = _latencies(result.artifact, model, x)
    full = compare(result.artifact, x, ("cpu", "ort"))
    row = {
        "net": name,
        "format": fmt,
        "size": size,
        "gmacs": round(sum(result.artifact.macs.values()) / 1e9, 3),
        "coverage": result.artifact.coverage,
        "float_ops": list(result.artifact.float_ops),
        "sqnr_db": result.fidelity.sqnr_db,
        "output_sqnr_db": result.fidelity.output_sqnr_db,
        "seconds": round(seconds, 1),
        "peak_bytes": peak_bytes(),
        "image_seconds": round(latency, 3),
        "of_float32": round(float_latency / latency, 3),
        "full": full,
    }
    if len(executors) > 1:
        small = result if little == size else export(net(name, little), options=options, name=name)
        x = np.random.default_rng(2).standard_normal((1, 3, little, little)).astype(np.float32)
        row["small"] = compare(small.artifact, x, executors)
        row["small_size"] = little
    return row


def markdown(rows: Sequence[dict[str, Any]], command: str, chosen: argparse.Namespace) -> str:
    """The table of docs/zoo.md."""
    first, *others = chosen.executors.split(",")
    larger = "".join(f" ({name}: {size} × {size})" for name, size in LEAST.items())
    small = f", and for a picture of {SMALL} × {SMALL}{larger}, between `{first}` and each of " + ", ".join(
        f"`{name}`" for name in others
    )
    lines = [
        "# Well-known nets on words",
        "",
        "Nets that the `onnx` package carries, filled with seeded random weights, and nets of timm as",
        "`torch.onnx` exports them, for square pictures of some size, lowered without training and",
        "calibrated on made-up inputs. SQNR is end to end against the float net, before a last softmax; *lowered*",
        "the time of the whole export, runs of the float net included. *Words equal*: every tensor of words, for one",
        f"picture of this size between `cpu` and `ort`{small if others else ''}.",
        "",
        "| net | format | size | GMACs | in LNS | SQNR | float operations | words equal | lowered |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in rows:
        states = [*row["full"].values(), *row.get("small", {}).values()]
        kinds: dict[str, int] = {}
        for entry in row["float_ops"]:
            kind = entry.split("(")[1].split(")")[0]
            kinds[kind] = kinds.get(kind, 0) + 1
        told = ", ".join(f"{count} {kind}" for kind, count in kinds.items()) or "none"
        db = "–" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB"
        lines.append(
            f"| {row['net']} | {row['format']} | {row['size']} | {row['gmacs']:.2f} | {100 * row['coverage']:.0f} % "
            f"| {db} | {told} | {sum(s == 'equal' for s in states)} of {len(states)} | {row['seconds']:.0f} s |"
        )
    return "\n".join([*lines, "", f"(`{command}`)", ""])


def main(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else "")
    parser.add_argument("--net", action="append", choices=[*LIGHT, *TIMM])
    parser.add_argument("--format", action="append", help="of words; by default 8:8 and one of 16 bits")
    parser.add_argument("--size", type=int, default=224, help="of pictures at full size")
    parser.add_argument(
        "--executors", default=",".join(EXECUTORS), help="to compare on small pictures; the first leads"
    )
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--markdown", type=Path, help="write the table into this file, after every row")
    parser.add_argument("--rows", type=Path, help="keep rows in this JSON file; those that it has are not made again")
    chosen = parser.parse_args(arguments)
    kept = {}
    if chosen.rows and chosen.rows.exists():
        kept = {tuple(row["of"]): row for row in json.loads(chosen.rows.read_text(encoding="utf-8"))}
    rows = []
    for name in chosen.net or [*LIGHT, *TIMM]:
        for fmt in chosen.format or (FORMATS[0], WIDE.get(name, FORMATS[1])):
            of = (name, fmt, chosen.size, chosen.executors)
            row = kept.get(of) or measure(name, fmt, size=chosen.size, executors=chosen.executors.split(","))
            rows.append(row)
            if chosen.rows:
                kept[of] = {**row, "of": list(of)}
                files.write_json(chosen.rows, list(kept.values()))
            db = "-" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f}"
            told = f"{row['gmacs']:7.3f} GMACs {100 * row['coverage']:5.1f} % {db:>6} dB {row['seconds']:6.1f} s"
            print(f"{name:24}{fmt:8}{told} {row['full']} {row.get('small', '')}", file=sys.stderr, flush=True)
            if chosen.markdown:
                given = " ".join(sys.argv[1:] if arguments is None else arguments)
                files.write_text(chosen.markdown, markdown(rows, f"python -m benchmarks.zoo {given}", chosen))
    if chosen.json:
        print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
