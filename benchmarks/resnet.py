"""A ResNet-20-shaped LNS net through the executors: images a second, and ONNX Runtime beside the `cpu` executor.

``python -m benchmarks.resnet --json``

The net has the shapes of the ResNet-20 of He et al. 2016 for CIFAR-10 (three stages of three blocks with 16, 32 and 64
channels, 41 million multiply-accumulates an image), random weights and random images.

``python -m benchmarks.resnet --full --datapath elma-8,lns-madam-8 --json``

With ``--full`` it is the ResNet-50 that the onnx package carries, for pictures of 224 × 224, with seeded random
weights: exported by each datapath, then run by ONNX Runtime on words and in float32, in turns, one thread each. All
seconds are those of the processor, so that others who use the machine count less.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.optimizer import machine


def model() -> Any:
    """The float net, in eval mode."""
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.first = nn.Conv2d(inputs, outputs, 3, stride, 1)
            self.second = nn.Conv2d(outputs, outputs, 3, 1, 1)
            self.short = nn.Conv2d(inputs, outputs, 1, stride) if stride > 1 else nn.Identity()

        def forward(self, x: Any) -> Any:
            return torch.relu(self.second(torch.relu(self.first(x))) + self.short(x))

    torch.manual_seed(0)
    parts: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1), nn.ReLU()]
    for inputs, outputs, stride in ((16, 16, 1), (16, 32, 2), (32, 64, 2)):
        parts += [Block(inputs, outputs, stride), Block(outputs, outputs, 1), Block(outputs, outputs, 1)]
    parts += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10)]
    return nn.Sequential(*parts).eval()


def artifact(datapath: str) -> Any:
    """The net as an LNS ONNX model, and images."""
    import io

    import onnx
    import torch

    from lnsdeploy.datapath import load_datapath
    from lnsdeploy.emulator.artifact import build
    from lnsdeploy.exporters.export import node_macs
    from lnsdeploy.exporters.lower import LowerOptions, lower

    x = np.random.default_rng(0).standard_normal((64, 3, 32, 32)).astype(np.float32)
    file = io.BytesIO()
    batch = torch.export.Dim("batch", min=1)
    program = torch.onnx.export(
        model(), (torch.from_numpy(x[:2]),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False
    )
    program.save(file)
    lowered = lower(onnx.load_model_from_string(file.getvalue()), x, LowerOptions(load_datapath(datapath), sample=8))
    return build(lowered.graph, node_macs(lowered.graph)), x


def full(datapath: str, repeats: int) -> dict[str, Any]:
    """Export ResNet-50 at 8 bits by a datapath, and run one picture on words and in float32.

    Args:
        datapath: its name; ``"default"`` for the one that ``export --bits 8 --gamma 8`` takes.
    """
    import resource

    import onnxruntime

    from benchmarks.zoo import compare, light
    from lnsdeploy.emulator.executor import get_executor
    from lnsdeploy.exporters.convert import ExportOptions, export

    def used() -> float:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return time.process_time() + children.ru_utime + children.ru_stime

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "resnet50.onnx"
        path.write_bytes(light("resnet50").SerializeToString())
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        start = used()
        result = export(path, options=ExportOptions(8, 8, datapath=None if datapath == "default" else datapath))
        seconds = used() - start
    x = np.random.default_rng(1).standard_normal((1, 3, 224, 224)).astype(np.float32)
    feed = {session.get_inputs()[0].name: x}
    ort = get_executor("ort")
    best = {"ort": float("inf"), "float32": float("inf")}
    for attempt in range(repeats + 1):
        for name, run in (("ort", lambda: ort.run(result.artifact, x)), ("float32", lambda: session.run(None, feed))):
            start = time.process_time()
            run()
            if attempt:  # the first run makes sessions
                best[name] = min(best[name], time.process_time() - start)
    return {
        "datapath": result.artifact.graph.datapath.name,
        "macs": sum(result.artifact.macs.values()),
        "sqnr_db": result.fidelity.sqnr_db,
        "export_seconds": round(seconds, 1),
        "export_peak_bytes": result.peak_bytes,
        "ort_seconds": round(best["ort"], 3),
        "float32_seconds": round(best["float32"], 3),
        "of_float32": round(best["float32"] / best["ort"], 3),
        "equal": compare(result.artifact, x, ("cpu", "ort"))["ort"] == "equal",
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--datapath", default="elma-8")
    parser.add_argument("--full", action="store_true", help="ResNet-50; several datapaths are separated by commas")
    parser.add_argument("--executors", default="cpu,ort")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    if options.full:
        # read by the native library and by ONNX Runtime's sessions when they are made
        os.environ["LNSDEPLOY_THREADS"] = "1"
        rows = [full(name, options.repeats) for name in options.datapath.split(",")]
        if options.json:
            print(json.dumps({"machine": machine(), "rows": rows}))
        else:
            for row in rows:
                print(
                    f"{row['datapath']:<18} {row['ort_seconds']:.3f} s, float32 {row['float32_seconds']:.3f} s: "
                    f"{row['of_float32']:.2f} of float32; {row['sqnr_db']:.1f} dB; exported in "
                    f"{row['export_seconds']:.0f} s and {row['export_peak_bytes'] / 2**30:.1f} GiB; words equal: "
                    f"{row['equal']}"
                )
        return 0 if all(row["equal"] for row in rows) else 1
    from lnsdeploy.emulator.executor import get_executor

    made, x = artifact(options.datapath)
    batch = x[: options.batch]
    engines = {name: get_executor(name) for name in options.executors.split(",")}
    best = dict.fromkeys(engines, float("inf"))
    words = {name: engine.run(made, batch) for name, engine in engines.items()}
    first = next(iter(words.values()))
    for _ in range(options.repeats):
        for name, engine in engines.items():
            start = time.perf_counter()
            engine.run(made, batch)
            best[name] = min(best[name], time.perf_counter() - start)
    result = {
        "machine": machine(),
        "datapath": options.datapath,
        "batch": len(batch),
        "macs": sum(made.macs.values()),
        "images_per_second": {name: round(len(batch) / seconds, 2) for name, seconds in best.items()},
        "equal": all(np.array_equal(first, other) for other in words.values()),
    }
    if {"cpu", "ort"} <= best.keys():
        result["ort_to_cpu"] = round(best["cpu"] / best["ort"], 3)
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result["images_per_second"].items():
            print(f"{name:<14} {value:8.1f} images/s  {value * result['macs'] / 1e9:6.2f} GMAC/s")
        print(f"words equal: {result['equal']}; ort at {result.get('ort_to_cpu', '–')} of cpu")
    return 0 if result["equal"] else 1


if __name__ == "__main__":
    sys.exit(main())
