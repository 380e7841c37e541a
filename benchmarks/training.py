"""Time of a training step on words beside the float32 step of the same net, in one run.

``python -m benchmarks.training --json``

Steps are forward, loss, backward and Madam's update, on random images. The variants take turns, so that a
change of the machine's load meets all of them; the figure is the fastest of the repeats.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from typing import Any

from benchmarks.optimizer import machine

YARDSTICK = "float32"


def variants(bits: int, gamma: int) -> dict[str, Any]:
    """Recipes by name; None is float32."""
    from lnsdeploy import LNSFormat
    from lnsdeploy.recipe import LayerRecipe, Recipe

    fmt = LNSFormat(bits, gamma)
    return {
        YARDSTICK: None,
        "weights_activations": Recipe(LayerRecipe(fmt, fmt)),
        "weights_activations_errors_gradients": Recipe(LayerRecipe(fmt, fmt, error=fmt, gradient=fmt)),
    }


def measure(model: str, batch: int, repeats: int, bits: int = 8, gamma: int = 8, warmup: int = 2) -> dict[str, Any]:
    """Milliseconds of a step of a net for images of 3 × 32 × 32."""
    import torch
    from torch import nn

    from lnsdeploy.training.layers import prepare_
    from lnsdeploy.training.madam import Madam
    from lnsdeploy.training.models import build_model

    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch, 3, 32, 32, generator=generator)
    y = torch.randint(0, 10, (batch,), generator=generator)
    loss = nn.CrossEntropyLoss()
    nets = {}
    for name, recipe in variants(bits, gamma).items():
        net = build_model(model, (3, 32, 32), 10)
        nets[name] = net if recipe is None else prepare_(net, recipe)
    optimizers = {name: Madam(net.parameters()) for name, net in nets.items()}
    times: dict[str, list[float]] = {name: [] for name in nets}
    for number in range(warmup + repeats):
        for name, net in nets.items():
            start = time.perf_counter()
            optimizers[name].zero_grad()
            loss(net(x), y).backward()
            optimizers[name].step()
            if number >= warmup:
                times[name].append(1e3 * (time.perf_counter() - start))
    fastest = {name: min(values) for name, values in times.items()}
    return {
        "model": model,
        "batch": batch,
        "format": f"{bits}:{gamma}",
        "repeats": repeats,
        "milliseconds": {name: round(value, 1) for name, value in fastest.items()},
        "median_milliseconds": {name: round(statistics.median(v), 1) for name, v in times.items()},
        "ratio_to_" + YARDSTICK: {name: round(v / fastest[YARDSTICK], 3) for name, v in fastest.items()},
    }


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.training", description=__doc__)
    parser.add_argument("--model", default="resnet20", help="a net that takes images of 3 × 32 × 32")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if min(options.batch, options.repeats, options.threads) < 1:
        parser.error("all numbers must be at least 1")
    torch.set_num_threads(options.threads)
    result = {"benchmark": "training", **measure(options.model, options.batch, options.repeats)}
    result["machine"] = machine()
    if options.json:
        print(json.dumps(result))
        return 0
    ratios = result["ratio_to_" + YARDSTICK]
    print(f"{options.model}, batch {options.batch}, {result['format']}, {result['machine']}")
    for name, value in result["milliseconds"].items():
        print(f"{name:38} {value:8.1f} ms  {ratios[name]:6.2f} × {YARDSTICK}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
