"""A ResNet-20-shaped LNS net through the executors: images a second, and ONNX Runtime beside the `cpu` executor.

``python -m benchmarks.resnet --json``

The net has the shapes of the ResNet-20 of He et al. 2016 for CIFAR-10 (three stages of three blocks with 16, 32 and 64
channels, 41 million multiply-accumulates an image), random weights and random images: speed does not depend on either.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
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


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.resnet", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--datapath", default="elma-8")
    parser.add_argument("--executors", default="cpu,ort")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
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
