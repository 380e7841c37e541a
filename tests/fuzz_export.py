"""Mutated float models through `lnsdeploy export`: each is exported, or refused with one line; none crashes or hangs.

    python tests/fuzz_export.py --count 500

Mutations are of bytes (flipped, cut, inserted, repeated) and of structure (cycles, missing and lying initializers,
shapes without measure, data outside of the folder, other operators and attributes). The seeds are the light
nets of the onnx
package and small nets of every kind. Children with limits of memory and time do the work; a seed that fails is run by
itself with --show.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import TensorProto, helper, numpy_helper

from lnsdeploy.errors import BadFileError, LNSError

HUGE = (1 << 62, 1 << 31, (1 << 31) - 1, 1 << 40, -1, 0, -(1 << 63))
OPERATORS = (
    "Conv", "Gemm", "MatMul", "Relu", "Add", "Mul", "Reshape", "Transpose", "Concat", "MaxPool", "AveragePool",
    "Softmax", "Slice", "Gather", "Expand", "Tile", "Pad", "Resize", "Loop", "If", "Scan", "BatchNormalization",
    "ConstantOfShape",
    "Range", "QuantizeLinear", "LSTM", "NoSuchOperator", "Split", "Squeeze", "LayerNormalization", "ConvTranspose",
)  # fmt: skip
# Light nets that are small enough to be run hundreds of times.
LIGHT = ("light_squeezenet", "light_shufflenet", "light_inception_v1", "light_resnet50")


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


def _weights(rng: np.random.Generator, *shape: int) -> np.ndarray:
    return (rng.normal(size=shape) / np.sqrt(max(np.prod(shape[1:]), 1))).astype(np.float32)


def small_model(kind: int) -> onnx.ModelProto:
    """A small float net of some kind."""
    rng = np.random.default_rng(kind)
    held: dict[str, np.ndarray] = {}
    nodes = []

    def node(op: str, inputs: list[str], **attributes: Any) -> str:
        output = f"t{len(nodes)}"
        nodes.append(helper.make_node(op, inputs, [output], name=f"n{len(nodes)}", **attributes))
        return output

    def constant(name: str, value: np.ndarray) -> str:
        held[name] = value
        return name

    if kind % 2:
        shape: list[Any] = ["batch", 12]
        x = node("Gemm", ["x", constant("w1", _weights(rng, 8, 12)), constant("b1", _weights(rng, 8))], transB=1)
        y = node("Relu", [x])
        z = node("MatMul", [y, constant("w2", _weights(rng, 8, 8))])
        last = node("Add", [z, y])
        last = node("Gemm", [last, constant("w3", _weights(rng, 8, 5))])
    else:
        shape = ["batch", 3, 8, 8]
        x = node("Conv", ["x", constant("w1", _weights(rng, 4, 3, 3, 3)), constant("b1", _weights(rng, 4))],
                 pads=[1, 1, 1, 1], kernel_shape=[3, 3])  # fmt: skip
        statistics = [constant(n, np.abs(_weights(rng, 4)) + 0.5) for n in ("scale", "shift", "mean", "var")]
        x = node("Relu", [node("BatchNormalization", [x, *statistics])])
        a = node(
            "Conv", [x, constant("w2", _weights(rng, 4, 1, 3, 3))], group=4, pads=[1, 1, 1, 1], kernel_shape=[3, 3]
        )
        x = node("Concat", [node("Add", [a, x]), x], axis=1)
        x = node("MaxPool", [x], kernel_shape=[2, 2], strides=[2, 2])
        x = node("GlobalAveragePool", [x])
        x = node("Reshape", [x, constant("shape", np.array([0, -1]))])
        last = node("Gemm", [x, constant("w3", _weights(rng, 5, 8)), constant("b3", _weights(rng, 5))], transB=1)
    if kind % 3 == 0:
        last = node("Softmax", [last])
    graph = helper.make_graph(
        nodes,
        "small",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info(last, TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in held.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", (9, 13, 17, 21)[kind % 4])], ir_version=8)


@cache
def _seed(name: str) -> bytes:
    if name.startswith("light_"):
        folder = Path(onnx.__file__).parent / "backend" / "test" / "data" / "light"
        return (folder / f"{name}.onnx").read_bytes()
    return small_model(int(name)).SerializeToString()


# ---------------------------------------------------------------------------------------------------------------------
# Mutations


def _bytes(data: bytes, rng: random.Random) -> bytes:
    """A few bytes otherwise."""
    changed = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4, 16, 64])):
        place = rng.randrange(len(changed)) if changed else 0
        how = rng.randrange(16)
        if how == 0:
            changed = changed[:place]
        elif how == 1:
            changed[place : place + rng.randrange(1, 40)] = b""
        elif how == 2:
            changed[place:place] = rng.randbytes(rng.randrange(1, 40))
        elif how == 3:
            part = changed[place : place + rng.randrange(1, 400)]
            changed[place:place] = part * rng.choice([1, 2, 50])
        elif changed:
            changed[place] = rng.choice([0, 1, 127, 128, 255, changed[place] ^ (1 << rng.randrange(8))])
    return bytes(changed)


Structural = Callable[[onnx.ModelProto, random.Random], None]


def _any_node(model: onnx.ModelProto, rng: random.Random) -> onnx.NodeProto:
    return model.graph.node[rng.randrange(len(model.graph.node))]


def _cycle(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _any_node(model, rng)
    if node.input and model.graph.node[-1].output:
        node.input[0] = model.graph.node[-1].output[0]


def _missing_initializer(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.initializer:
        del model.graph.initializer[rng.randrange(len(model.graph.initializer))]


def _huge_dims(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        place = rng.randrange(len(tensor.dims) + 1)
        if place < len(tensor.dims):
            tensor.dims[place] = rng.choice(HUGE)
        else:
            tensor.dims.append(rng.choice(HUGE))


def _short_data(model: onnx.ModelProto, rng: random.Random) -> None:
    if model.graph.initializer:
        tensor = rng.choice(model.graph.initializer)
        tensor.raw_data = tensor.raw_data[: rng.randrange(len(tensor.raw_data) + 1)]


def _input_shape(model: onnx.ModelProto, rng: random.Random) -> None:
    value = rng.choice(model.graph.input)
    shape = value.type.tensor_type.shape
    how = rng.randrange(4)
    if how == 0 or not shape.dim:
        shape.dim.add().dim_value = rng.choice([1, 2, *HUGE])
    elif how == 1:
        rng.choice(shape.dim).dim_value = rng.choice([0, 1, 3, 1 << 14, *HUGE])
    elif how == 2:
        del shape.dim[rng.randrange(len(shape.dim))]
    else:
        rng.choice(shape.dim).dim_param = "open"


def _operator(model: onnx.ModelProto, rng: random.Random) -> None:
    _any_node(model, rng).op_type = rng.choice(OPERATORS)


def _domain(model: onnx.ModelProto, rng: random.Random) -> None:
    _any_node(model, rng).domain = rng.choice(["com.microsoft", "lnsdeploy", "ai.onnx.ml", "x" * 3000])


def _attribute(model: onnx.ModelProto, rng: random.Random) -> None:
    nodes = [node for node in model.graph.node if node.attribute]
    if not nodes:
        return
    attribute = rng.choice(rng.choice(nodes).attribute)
    how = rng.randrange(5)
    if how == 0 and attribute.ints:
        attribute.ints[rng.randrange(len(attribute.ints))] = rng.choice([0, -1, 7, 1 << 20, *HUGE])
    elif how == 1:
        attribute.i = rng.choice(HUGE)
    elif how == 2:
        attribute.type = rng.randrange(0, 16)
    elif how == 3:
        attribute.name = rng.choice(["pads", "strides", "axis", "group", "perm", "value", "to", ""])
    elif attribute.ints:
        attribute.ints.extend([1] * rng.randrange(1, 4))


def _wiring(model: onnx.ModelProto, rng: random.Random) -> None:
    node = _any_node(model, rng)
    names = [n for m in model.graph.node for n in (*m.input, *m.output)] + ["", "nothing"]
    how = rng.randrange(4)
    if how == 0 and node.input:
        node.input[rng.randrange(len(node.input))] = rng.choice(names)
    elif how == 1 and node.output:
        node.output[rng.randrange(len(node.output))] = rng.choice(names)
    elif how == 2 and node.input:
        del node.input[rng.randrange(len(node.input))]
    else:
        node.input.append(rng.choice(names))


def _types(model: onnx.ModelProto, rng: random.Random) -> None:
    if rng.random() < 0.5 and model.graph.initializer:
        rng.choice(model.graph.initializer).data_type = rng.randrange(-1, 30)
    else:
        rng.choice([*model.graph.input, *model.graph.output]).type.tensor_type.elem_type = rng.randrange(0, 30)


def _opset(model: onnx.ModelProto, rng: random.Random) -> None:
    how = rng.randrange(3)
    if how == 0 or not model.opset_import:
        del model.opset_import[:]
    elif how == 1:
        model.opset_import[0].version = rng.choice([-1, 0, 1, 6, 7, 8, 11, 22, 99, 1 << 40])
    else:
        model.ir_version = rng.choice([0, 1, 2, 3, 99])


def _external(model: onnx.ModelProto, rng: random.Random) -> None:
    if not model.graph.initializer:
        return
    tensor = rng.choice(model.graph.initializer)
    tensor.data_location = TensorProto.EXTERNAL
    tensor.ClearField("raw_data")
    place = rng.choice(["../secret", "/etc/passwd", "..\\secret", "a/../../secret", "", "here", "/dev/zero", "\0"])
    for key, value in (("location", place), ("offset", str(rng.choice(HUGE))), ("length", str(rng.choice(HUGE)))):
        if rng.random() < 0.8:
            tensor.external_data.add(key=key, value=value)


def _numbers(model: onnx.ModelProto, rng: random.Random) -> None:
    floats = [t for t in model.graph.initializer if t.data_type == TensorProto.FLOAT and t.raw_data]
    if floats:
        tensor = rng.choice(floats)
        value = rng.choice([np.nan, np.inf, -np.inf, 3e38, 1e-45, 0.0])
        array = numpy_helper.to_array(tensor).copy()
        array.reshape(-1)[: rng.choice([1, array.size])] = value
        tensor.raw_data = array.tobytes()


def _shape_numbers(model: onnx.ModelProto, rng: random.Random) -> None:
    """A shape that a node is to make, beyond all measure."""
    name = "hostile_shape"
    model.graph.initializer.append(numpy_helper.from_array(np.array([rng.choice(HUGE) for _ in range(3)]), name))
    operator = rng.choice(["ConstantOfShape", "Expand", "Tile", "Reshape"])
    node = _any_node(model, rng)
    inputs = [name] if operator == "ConstantOfShape" else [node.output[0] if node.output else "x", name]
    model.graph.node.append(helper.make_node(operator, inputs, ["hostile"], name="hostile"))
    model.graph.output[0].name = "hostile"


def _nested(model: onnx.ModelProto, rng: random.Random) -> None:
    """Graphs within graphs."""
    graph = helper.make_graph([helper.make_node("Identity", ["x"], ["deep"])], "g", [], [])
    for depth in range(rng.choice([1, 8, 20])):
        condition = helper.make_node(
            "If", ["x"], [f"d{depth}"], then_branch=graph, else_branch=graph if depth < 3 else None
        )
        graph = helper.make_graph([condition], "g", [], [])
    model.graph.node.extend(graph.node)


def _remove(model: onnx.ModelProto, rng: random.Random) -> None:
    what = rng.choice([model.graph.node, model.graph.input, model.graph.output])
    if len(what):
        del what[rng.randrange(len(what))]


def _names(model: onnx.ModelProto, rng: random.Random) -> None:
    name = rng.choice(["", "x" * 100_000, "\n\r", "a/b:c", "é😀", "t0_words"])
    node = _any_node(model, rng)
    node.name = name
    if node.output:
        old = node.output[0]
        for other in model.graph.node:
            for index, read in enumerate(other.input):
                if read == old:
                    other.input[index] = name
        node.output[0] = name


STRUCTURAL: tuple[Structural, ...] = (
    _cycle, _missing_initializer, _huge_dims, _short_data, _input_shape, _operator, _domain, _attribute, _attribute,
    _wiring, _wiring, _types, _opset, _external, _numbers, _shape_numbers, _nested, _remove, _names,
)  # fmt: skip


def mutated(seed: int, light: bool = True) -> tuple[bytes, str]:
    """The file of a seed, and what was done to it."""
    rng = random.Random(seed)
    name = rng.choice(LIGHT) if light and rng.random() < 0.1 else str(rng.randrange(12))
    data = _seed(name)
    done = [name]
    if rng.random() < 0.85:
        model = onnx.load_model_from_string(data)
        for _ in range(rng.choice([1, 1, 1, 1, 2, 3])):
            mutation = rng.choice(STRUCTURAL)
            done.append(mutation.__name__.strip("_"))
            with contextlib.suppress(ValueError, TypeError, IndexError, DecodeError):
                # protobuf refuses some numbers itself
                mutation(model, rng)
        data = model.SerializeToString()
    if len(done) == 1 or rng.random() < 0.15:
        done.append("bytes")
        data = _bytes(data, rng)
    return data, ", ".join(done)


# ---------------------------------------------------------------------------------------------------------------------
# Running

OUTCOMES = ("exported", "refused")
_MEMORY = 12 << 30
_PATIENCE = 120


def run_one(seed: int, folder: Path, light: bool = True) -> tuple[str, str]:
    """What `lnsdeploy export` makes of a seed: its outcome, and its line.

    Raises:
        AssertionError: it says anything but one line, or leaves with another status.
    """
    from lnsdeploy.cli import _run

    data, _ = mutated(seed, light)
    inner = folder / "inner"
    inner.mkdir(exist_ok=True)
    (folder / "secret").write_bytes(b"\0" * 4096)
    file = inner / "mutated.onnx"
    file.write_bytes(data)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = _run(
            ["export", str(file), "-o", str(folder / "made.onnx"), "--json", "--sample", "2", "--evaluate-on", "2"]
        )
    lines = err.getvalue().strip().splitlines()
    if status == 0:
        json.loads(out.getvalue())
        return "exported", ""
    assert status == 2, (status, lines)
    assert len(lines) == 1, lines[:5]
    assert lines[0].startswith("lnsdeploy: "), lines[0][:300]
    assert len(lines[0]) < 2000, lines[0][:300]
    assert not out.getvalue(), out.getvalue()[:300]
    return "refused", lines[0]


def _read_here() -> None:
    """Read files in this process, which is as good as another to crash, and needs no start for each."""
    from lnsdeploy.exporters import convert
    from lnsdeploy.exporters.source import ReadOptions, Source, normalise, read_model

    def read(path: Path, options: ReadOptions) -> Source:
        try:
            return normalise(read_model(path), options, str(path), checked=True)
        except LNSError:
            raise
        except Exception as error:  # as the process for reading does
            raise BadFileError(f"{path}: damaged ({type(error).__name__})") from error

    convert.read_source = read  # type: ignore[assignment]


def child(first: int, count: int, light: bool, here: bool) -> None:
    """Run seeds, saying which before each, and what became of it after."""
    if here:
        _read_here()
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY, _MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(first, first + count):
            print(f"seed {seed}", flush=True)
            signal.alarm(_PATIENCE)
            outcome, line = run_one(seed, Path(folder), light)
            signal.alarm(0)
            print(f"done {outcome} {line}", flush=True)


@dataclass
class Summary:
    """What became of many files."""

    outcomes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(OUTCOMES, 0))
    failures: list[dict[str, Any]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)


def fuzz(count: int, seed: int = 0, jobs: int = 2, light: bool = True, here: bool = False) -> Summary:
    """Run the files of `count` seeds from `seed`."""
    summary = Summary()
    share = -(-count // jobs)
    waiting = [(first, min(share, seed + count - first)) for first in range(seed, seed + count, share)]
    running: list[tuple[Any, Any, Any, int, int]] = []
    environment = os.environ | {"OMP_NUM_THREADS": "1", "LNSDEPLOY_THREADS": "1"}
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                first, number = waiting.pop(0)
                output, errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
                command = [sys.executable, str(Path(__file__).resolve()), "--child", "--seed", str(first)]
                command += ["--count", str(number), *([] if light else ["--small"]), *(["--here"] if here else [])]
                process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
                running.append((process, output, errors, first, number))
            for job in [job for job in running if job[0].poll() is not None]:
                running.remove(job)
                waiting += _collect(job, summary)
            time.sleep(0.05)
    finally:
        for job in running:
            job[0].kill()
            job[0].wait()
    return summary


def _collect(job: tuple[Any, Any, Any, int, int], summary: Summary) -> list[tuple[int, int]]:
    """Add a child's results; what is left to do after a failure."""
    process, output, errors, first, number = job
    output.seek(0)
    lines = output.read().splitlines()
    for line in lines:
        if line.startswith("done "):
            _, outcome, *rest = line.split(" ", 2)
            summary.outcomes[outcome] += 1
            summary.lines += rest
    if process.returncode == 0:
        return []
    errors.seek(0)
    last = errors.read()[-2000:]
    seeds = [int(line.removeprefix("seed ")) for line in lines if line.startswith("seed ")]
    if not seeds:
        raise RuntimeError(f"a child failed before its first file, with status {process.returncode}:\n{last}")
    summary.failures.append({"seed": seeds[-1], "status": process.returncode, "stderr": last})
    left = first + number - seeds[-1] - 1
    return [(seeds[-1] + 1, left)] if left else []


def main() -> int:
    parser = argparse.ArgumentParser(description="Mutated float models through lnsdeploy export.")
    parser.add_argument("--count", type=int, default=500, help="files (default: 500)")
    parser.add_argument("--seed", type=int, default=0, help="the first one's seed (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="processes (default: 2)")
    parser.add_argument("--small", action="store_true", help="no light nets: small ones alone")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON")
    parser.add_argument(
        "--show", action="store_true", help="run the file of --seed in this process, and say what it is"
    )
    parser.add_argument("--here", action="store_true", help="read files in the children themselves: faster")
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        child(given.seed, given.count, not given.small, given.here)
        return 0
    if given.show:
        print(mutated(given.seed, not given.small)[1], flush=True)
        with tempfile.TemporaryDirectory() as folder:
            print(*run_one(given.seed, Path(folder), not given.small))
        return 0
    start = time.monotonic()
    summary = fuzz(given.count, given.seed, given.jobs, not given.small, given.here)
    seconds = round(time.monotonic() - start, 1)
    if given.json:
        told = {"count": given.count, "seed": given.seed, "onnx": onnx.__version__, "seconds": seconds}
        print(
            json.dumps(
                {**told, "outcomes": summary.outcomes, "failures": summary.failures, "lines": summary.lines}, indent=1
            )
        )
    else:
        for failure in summary.failures:
            print(f"seed {failure['seed']}: status {failure['status']}\n{failure['stderr'][-600:]}")
        told = ", ".join(f"{number} {outcome}" for outcome, number in summary.outcomes.items())
        print(f"{given.count} files in {seconds} s: {told}, {len(summary.failures)} crashes or hangs")
    return 1 if summary.failures else 0


if __name__ == "__main__":
    sys.exit(main())
