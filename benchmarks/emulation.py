"""What emulating a whole model on the fly costs beside its bare kernels: a ResNet-50 under ``lnsdeploy.emulate``.

``python -m benchmarks.emulation --batch 8 --json``

`seconds` is one forward pass inside the context, with everything: encoding, placing, measuring noise, histograms, and
what stays in float. `kernels` is the part of it that the `cpu` kernels spend on the products themselves, their operands
encoded and weights packed. `ratio` is the one over the other. The net has the shapes of the ResNet-50 of He et al. 2016
(4.09 GMAC an image of 224×224), random weights and random images.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.optimizer import machine


def resnet50() -> Any:
    """The float net, in eval mode."""
    import torch
    from torch import nn

    def conv(inputs: int, outputs: int, kernel: int, stride: int = 1) -> list[nn.Module]:
        made = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        nn.init.kaiming_normal_(made.weight)
        return [made, nn.BatchNorm2d(outputs)]

    class Block(nn.Module):
        def __init__(self, inputs: int, width: int, stride: int):
            super().__init__()
            self.path = nn.Sequential(
                *conv(inputs, width, 1),
                nn.ReLU(),
                *conv(width, width, 3, stride),
                nn.ReLU(),
                *conv(width, 4 * width, 1),
            )
            short = stride > 1 or inputs != 4 * width
            self.short = nn.Sequential(*conv(inputs, 4 * width, 1, stride)) if short else nn.Identity()

        def forward(self, x: Any) -> Any:
            return torch.relu(0.5 * self.path(x) + self.short(x))

    torch.manual_seed(0)
    parts = [*conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = 64
    for width, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for index in range(count):
            parts.append(Block(inputs, width, stride if index == 0 else 1))
            inputs = 4 * width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000)).eval()


@contextlib.contextmanager
def timed_kernels() -> Iterator[list[float]]:
    """The seconds that products spend in kernels, inside."""
    from lnsdeploy.emulator import products

    spent = [0.0]
    kinds = (products.Dot, products.Batched, products.Convolution)
    before = [kind.run for kind in kinds]

    def timed(run: Any) -> Any:
        def inside(*arguments: Any) -> Any:
            start = time.perf_counter()
            try:
                return run(*arguments)
            finally:
                spent[0] += time.perf_counter() - start

        return inside

    for kind, run in zip(kinds, before, strict=True):
        kind.run = timed(run)  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        for kind, run in zip(kinds, before, strict=True):
            kind.run = run  # type: ignore[method-assign]


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.emulation", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--datapath", default="elma-8")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    import torch

    import lnsdeploy
    from lnsdeploy.emulator import native

    if why := native.unavailable():
        sys.exit(why)
    model, x = resnet50(), torch.randn(options.batch, 3, 224, 224)
    passes = []
    with torch.no_grad(), timed_kernels() as spent:
        model(x)
        start = time.perf_counter()
        model(x)
        in_float = time.perf_counter() - start
        # the first pass packs the weights
        with lnsdeploy.emulate(options.datapath) as seen:
            for _ in range(options.repeats + 1):
                spent[0] = 0.0
                start = time.perf_counter()
                model(x)
                passes.append((time.perf_counter() - start, spent[0]))
    seconds, kernels = min(passes[1:])
    macs = seen.macs // len(passes)
    result = {
        "machine": machine()
        | {"isa": native.isa(), "threads": native.threads(), "torch_threads": torch.get_num_threads()},
        "datapath": options.datapath,
        "batch": options.batch,
        "macs": macs,
        "float_seconds": round(in_float, 3),
        "first_seconds": round(passes[0][0], 3),
        "seconds": round(seconds, 3),
        "kernels": round(kernels, 3),
        "ratio": round(seconds / kernels, 3),
        "gmacs": round(macs / seconds / 1e9, 3),
        "not_emulated": seen.not_emulated,
    }
    if options.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:<14} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
