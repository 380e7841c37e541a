"""Time of an optimizer step: Madam and IntegerMadam (with LNSMadam's codes too) beside torch's Adam, in one run.

``python -m benchmarks.optimizer --json``

All optimizers update tensors of the same shapes with the same gradients. They take turns, so that a change
of the machine's load meets all of them; the figure is the fastest of the repeats, the ratio is that of the
fastest to the fastest of the yardstick, torch's Adam with ``foreach=True``.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

YARDSTICK = "adam_foreach"


def machine() -> dict[str, Any]:
    """The processor and the versions that a figure depends on."""
    import numpy
    import torch

    name = platform.processor() or platform.machine()
    if (cpuinfo := Path("/proc/cpuinfo")).exists():
        models = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        name = models[0].partition(":")[2].strip() if models else name
    return {
        "processor": name,
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": numpy.__version__,
    }


def measure(elements: int, tensors: int, repeats: int, warmup: int = 3) -> dict[str, Any]:
    """Milliseconds of a step, for `elements` float32 weights in `tensors` matrices."""
    import torch
    from torch.optim import Adam, Optimizer

    from lnsdeploy.training.madam import IntegerMadam, Madam

    columns = 1000 if elements >= 1000 * tensors else 1
    rows = max(elements // tensors // columns, 1)
    makers: dict[str, Callable[[list[torch.nn.Parameter]], Optimizer]] = {
        YARDSTICK: lambda p: Adam(p, foreach=True),
        "adam_single": lambda p: Adam(p, foreach=False),
        "adam_fused": lambda p: Adam(p, fused=True),
        "madam": lambda p: Madam(p),
        "madam_sign_flip": lambda p: Madam(p, sign_flip=True),
        "madam_single": lambda p: Madam(p, foreach=False),
        "integer_madam_nearest": lambda p: IntegerMadam(p, rounding="nearest"),
        "integer_madam_stochastic": lambda p: IntegerMadam(p),
        "integer_madam_16_on_8": lambda p: IntegerMadam(p, bits=16, gamma=2048, compute_bits=8, rounding="nearest"),
    }
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(rows, columns, generator=generator) * 0.05 for _ in range(tensors)]
    grads = [torch.randn(rows, columns, generator=generator) for _ in range(tensors)]
    optimizers = {}
    for name, make in makers.items():
        params = [torch.nn.Parameter(w.clone()) for w in weights]
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        optimizers[name] = make(params)
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for number in range(warmup + repeats):
        for name, optimizer in optimizers.items():
            start = time.perf_counter()
            optimizer.step()
            elapsed = time.perf_counter() - start
            if number >= warmup:
                times[name].append(1e3 * elapsed)
    fastest = {name: min(values) for name, values in times.items()}
    return {
        "elements": rows * columns * tensors,
        "tensors": tensors,
        "repeats": repeats,
        "milliseconds": {name: round(value, 2) for name, value in fastest.items()},
        "median_milliseconds": {name: round(statistics.median(v), 2) for name, v in times.items()},
        "ratio_to_" + YARDSTICK: {name: round(v / fastest[YARDSTICK], 3) for name, v in fastest.items()},
        "state_bytes_per_weight": {name: _state_bytes(o) for name, o in optimizers.items()},
    }


def _state_bytes(optimizer: Any) -> float:
    """Bytes of state tensors per weight, the parameter itself not counted."""
    tensors = [v for s in optimizer.state.values() for v in s.values() if hasattr(v, "element_size")]
    held = sum(t.numel() * t.element_size() for t in tensors)
    return round(held / sum(p.numel() for g in optimizer.param_groups for p in g["params"]), 3)


def main(arguments: list[str] | None = None) -> int:
    """The command line."""
    import torch

    parser = argparse.ArgumentParser(prog="python -m benchmarks.optimizer", description=__doc__)
    parser.add_argument("--elements", type=int, default=10_000_000, help="weights in all")
    parser.add_argument("--tensors", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    if min(options.elements, options.tensors, options.repeats, options.threads) < 1:
        parser.error("all numbers must be at least 1")
    torch.set_num_threads(options.threads)
    result = {"benchmark": "optimizer", **measure(options.elements, options.tensors, options.repeats)}
    result["machine"] = machine()
    if options.json:
        print(json.dumps(result))
        return 0
    ratios = result["ratio_to_" + YARDSTICK]
    print(f"{result['elements']:,} weights in {result['tensors']} tensors, {result['machine']}")
    for name, value in result["milliseconds"].items():
        print(f"{name:26} {value:8.1f} ms  {ratios[name]:6.2f} × {YARDSTICK}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
