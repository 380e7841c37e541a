"""Speed of the GPU kernels, beside what the card's integer units could do and float products of the same card.

``python -m benchmarks.gpu --json``             on a machine with a card
``python -m benchmarks.gpu --static --json``    without one: instructions, registers, spills, and an estimate

On a card every row is a product of random words of 4096³ multiply-accumulates, then the layers of a ResNet-50, then all
of a ResNet-50 (its shapes; random words, which speed does not depend on). A slice of every product is compared with the
reference. Times are medians of CUDA events after a warm-up.

``--static`` compiles the same kernels for sm_90 by NVRTC, disassembles them (nvdisasm, of the package
nvidia-cuda-nvdisasm or a CUDA toolkit) and counts the instructions of the loop over k for each multiply-accumulate. The
estimate is the largest of what the pipes of a multiprocessor need, of 132 at 1.7 GHz: 128 lanes issued a clock, 64
lanes of integers, 128 of float32, 64 of integer multiply-adds, 16 of conversions, 32 of shared memory, where random
addresses meet in banks. Nothing in it was measured on a card.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import replace
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.optimizer import machine
from lnsdeploy.datapath import Accumulator, Datapath, LinearAccumulator, LogAccumulator, default_adder, load_datapath
from lnsdeploy.delta import Table
from lnsdeploy.emulator.plan import AddPlan, DotPlan, PoolPlan, Window
from lnsdeploy.formats import LNSFormat

BYTE, WORD = LNSFormat(8, 8), LNSFormat(16, 1024)
_THOUSAND = Table(1024, 16)

# Name: format, accumulator, where it stands, and instructions a multiply-accumulate that are aimed at (None: no goal).
# Log accumulators with room below and above need no limits; those near code 1 must flush.
ROWS: dict[str, tuple[LNSFormat, Accumulator, dict[str, int], float | None]] = {
    "linear-8-wrap": (BYTE, LinearAccumulator(32, table_bits=3, overflow="wrap"), {"lsb": 8}, 3.0),
    "linear-8-saturate": (BYTE, LinearAccumulator(24, table_bits=3), {"lsb": 16}, 4.5),
    "linear-16-wrap": (
        WORD,
        LinearAccumulator(32, table_bits=10, constant_bits=10, overflow="wrap"),
        {"lsb": 44},
        7.5,
    ),
    "linear-16-saturate": (WORD, LinearAccumulator(24, table_bits=10, constant_bits=10), {"lsb": 48}, 9.5),
    "log-8": (BYTE, LogAccumulator(12), {"acc_offset": -200}, 6.4),
    "log-8-flush": (BYTE, LogAccumulator(12), {"acc_offset": -5}, 8.4),
    "log-16-1024": (WORD, LogAccumulator(20, delta=_THOUSAND), {"acc_offset": -50_000}, 9.0),
    "log-16-1024-flush": (WORD, LogAccumulator(20, delta=_THOUSAND), {"acc_offset": -5}, 11.0),
}
# Named datapaths, placed so that every limit can be reached.
NAMED: dict[str, dict[str, int]] = {
    "lns-madam-8": {"lsb": 14},
    "elma-8": {"lsb": 0},
    "mitchell-8": {"lsb": 14},
    "gauss-8": {"acc_offset": 110},
    "gauss-16": {"acc_offset": 32_000},
}

SHARED_MEMORY = 227 << 10
MULTIPROCESSORS, CLOCK = 132, 1.7e9
# Output channels, input channels, kernel, stride, input size: the distinct convolutions of a ResNet-50, and how often.
LAYERS: tuple[tuple[int, int, int, int, int, int], ...] = (
    (64, 3, 7, 2, 224, 1),
    (64, 64, 1, 1, 56, 1),
    (64, 64, 3, 1, 56, 3),
    (256, 64, 1, 1, 56, 4),
    (64, 256, 1, 1, 56, 2),
    (128, 256, 1, 1, 56, 1),
    (128, 128, 3, 2, 56, 1),
    (512, 128, 1, 1, 28, 4),
    (512, 256, 1, 2, 56, 1),
    (128, 512, 1, 1, 28, 3),
    (128, 128, 3, 1, 28, 3),
    (256, 512, 1, 1, 28, 1),
    (256, 256, 3, 2, 28, 1),
    (1024, 256, 1, 1, 14, 6),
    (1024, 512, 1, 2, 28, 1),
    (256, 1024, 1, 1, 14, 5),
    (256, 256, 3, 1, 14, 5),
    (512, 1024, 1, 1, 14, 1),
    (512, 512, 3, 2, 14, 1),
    (2048, 512, 1, 1, 7, 3),
    (2048, 1024, 1, 2, 14, 1),
    (512, 2048, 1, 1, 7, 2),
    (512, 512, 3, 1, 7, 2),
)


def plan_of(name: str) -> DotPlan:
    """The plan of a row."""
    if name in NAMED:
        path, places = load_datapath(name), NAMED[name]
    else:
        fmt, part, places, _ = ROWS[name]
        path = Datapath(name, fmt, fmt, fmt, part, default_adder(fmt))
    output = path.activation.max_code
    plan = DotPlan(path, path.activation, path.weight, path.output, 0, 0, output, **places)
    if not path.is_linear and places["acc_offset"] < 0:
        # results stand as far above the accumulator's first code as products do
        plan = replace(plan, output_offset=output)
    return plan


# ---------------------------------------------------------------------------------------------------
# Without a card

_ALU = {
    "IADD3", "IADD", "VIADD", "LOP3", "LOP", "SHF", "LEA", "SEL", "ISETP", "VIMNMX", "IMNMX", "VIADDMNMX", "IABS",
    "PRMT", "SGXT", "PLOP3", "BMSK", "P2R", "R2P", "ISCADD", "FSETP", "FMNMX", "VIMNMX3",
}  # fmt: skip
_MULTIPLY_ADD = {"IMAD", "IMUL"}
_FLOAT = {"FMUL", "FADD", "FFMA"}
_CONVERT = {"F2I", "I2F", "I2FP", "MUFU", "POPC", "FLO"}


def disassembler() -> str | None:
    """nvdisasm, or None."""
    found = shutil.which("nvdisasm")
    spec = find_spec("nvidia")
    for folder in spec.submodule_search_locations or [] if spec else []:
        for path in Path(folder).glob("*/bin/nvdisasm*"):
            found = found or str(path)
    return found


def instructions(code: bytes, tool: str) -> tuple[list[str], Counter[str]]:
    """Names of the instructions of the longest loop of a cubin, with their modifiers, and of all of it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin", delete=False) as file:
        file.write(code)
    try:
        text = subprocess.run([tool, "-c", file.name], capture_output=True, text=True, check=True).stdout
    finally:
        Path(file.name).unlink()
    names: list[str] = []
    labels: dict[str, int] = {}
    best: list[str] = []
    for line in text.splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label[1]] = len(names)
        elif found := re.search(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9_.]*)(.*)", line):
            names.append(found[1])
            target = re.search(r"\((\.L_x_\d+)\)", found[2]) if found[1].startswith("BRA") else None
            first = labels.get(target[1]) if target else None
            if first is not None and len(names) - first > len(best):
                best = names[first:]
    return best, Counter(name.split(".")[0] for name in names)


@lru_cache(maxsize=8)
def wavefronts(copies: int) -> float:
    """How often a warp's loads of random entries of a table must be served: lanes of one copy share its banks."""
    rng = np.random.default_rng(0)
    per = 32 // copies
    banks = rng.integers(0, per, (4000, 32)) * copies + np.arange(32) % copies
    loads = np.zeros((4000, 32), dtype=np.int64)
    np.add.at(loads, (np.arange(4000)[:, None], banks), 1)
    return float(loads.max(axis=1).mean())


def static_row(name: str, tool: str | None, architecture: str = "sm_90") -> dict[str, Any]:
    """What the compiler made of a row's kernel."""
    from lnsdeploy.emulator import cuda_products as products
    from lnsdeploy.emulator import nvrtc

    choice = products.choose(products.layer_of(plan_of(name), 4096, 1, None), SHARED_MEMORY)
    tile = choice.tile(choice.tiles[0])
    program = choice.program(tile, SHARED_MEMORY, depth_fast=True)
    code, log = nvrtc.compile_program(program, architecture)
    row: dict[str, Any] = {
        "row": name,
        "kernel": choice.name,
        "tile": f"{tile.m}x{tile.n}x{tile.depth}",
        "threads": tile.threads,
        "shared_memory": choice.shared_bytes(tile),
        "registers": int((re.search(r"Used (\d+) registers", log) or [0, 0])[1]),
        "spill_bytes": sum(int(n) for n in re.findall(r"(\d+) bytes spill", log)),
        "goal": ROWS[name][3] if name in ROWS else None,
    }
    if tool is None:
        return row
    loop, every = instructions(code, tool)
    macs = tile.tm * tile.tn * tile.depth
    counts = Counter(part.split(".")[0] for part in loop)
    per = {key: value / macs for key, value in counts.items()}
    # tiles are loaded 16 bytes a lane, in one or two wavefronts; the rest are look-ups
    tiles = sum(part.startswith("LDS.128") for part in loop) / macs
    looked_up = per.get("LDS", 0.0) - tiles
    copies = choice.macros["LNS_COPIES"]
    each = wavefronts(copies) * (2 if choice.macros["LNS_WIDE"] else 1) if copies else 0.0
    shared = 1.5 * tiles + looked_up * each
    if choice.family == products.PAIR:
        # half of the look-ups go to one table of bytes
        shared = 1.5 * tiles + looked_up / 2 * (wavefronts(copies) + wavefronts(1))
    if choice.family == products.BINS:
        # accumulators are a thread's own: no conflicts
        shared = 1.5 * tiles + looked_up / 2 * (each + 1) + per.get("STS", 0.0)
    lanes = {
        "issue": (sum(per.values()), 128),
        "integer": (sum(per.get(key, 0.0) for key in _ALU), 64),
        "multiply-add": (
            sum(per.get(key, 0.0) for key in _MULTIPLY_ADD) + sum(per.get(k, 0.0) for k in _FLOAT) / 2,
            64,
        ),
        "convert": (sum(per.get(key, 0.0) for key in _CONVERT), 16),
        "shared": (shared, 32),
    }
    clocks = {key: count / width for key, (count, width) in lanes.items()}
    limit = max(clocks, key=lambda key: clocks[key])
    return row | {
        "instructions_per_mac": round(sum(per.values()), 2),
        "of_goal": round(sum(per.values()) / row["goal"], 3) if row["goal"] else None,
        "integer": round(lanes["integer"][0], 2),
        "wavefronts": round(shared, 2),
        "local_memory": every["LDL"] + every["STL"],
        "limit": limit,
        "bound_tmacs": round(MULTIPROCESSORS * CLOCK / clocks[limit] / 1e12, 2),
    }


# ---------------------------------------------------------------------------------------------------
# On a card


def words(fmt: LNSFormat, shape: tuple[int, ...], seed: int, device: Any) -> Any:
    """Random words within the upper half of the codes."""
    import torch

    rng = np.random.default_rng(seed)
    made = rng.integers(fmt.max_code // 2, fmt.max_code + 1, shape) | rng.choice([0, fmt.sign_bit], shape)
    return torch.from_numpy(made.astype(fmt.dtype)).to(device)


def seconds(run: Any, repeats: int) -> float:
    """The median of a GPU's time."""
    import torch

    for _ in range(2):
        run()
    times = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1e3)
    return statistics.median(times)


def product_row(name: str, size: int, repeats: int, device: Any) -> dict[str, Any]:
    """A matrix product of size³."""
    from lnsdeploy.emulator import cuda, reference

    plan = plan_of(name)
    a, w = words(plan.activation, (size, size), 0, device), words(plan.weight, (size, size), 1, device)
    layer = cuda.CudaDot(plan, w)
    got = layer.dot(a)[-8:, -8:].cpu().numpy()
    want = reference.dot(a[-8:].cpu().numpy(), w[-8:].cpu().numpy(), None, plan)
    time = seconds(lambda: layer.dot(a), repeats)
    return {
        "row": name,
        "kernel": layer.kernel,
        "tmacs": round(size**3 / time / 1e12, 3),
        "milliseconds": round(time * 1e3, 3),
        "equal": bool(np.array_equal(got, want)),
    }


def layers_row(name: str, batch: int, repeats: int, device: Any) -> dict[str, Any]:
    """The convolutions of a ResNet-50, one after another."""
    from lnsdeploy.emulator import cuda

    plan = plan_of(name)
    found, total, macs = [], 0.0, 0
    for outputs, inputs, kernel, stride, size, often in LAYERS:
        x = words(plan.activation, (batch, inputs, size, size), 0, device)
        layer = cuda.CudaDot(plan, words(plan.weight, (outputs, inputs, kernel, kernel), 1, device))
        window = Window((kernel, kernel), (stride, stride), (kernel // 2,) * 4)
        positions = int(np.prod(window.output_shape((size, size))))
        count = batch * positions * outputs * inputs * kernel * kernel
        time = seconds(lambda layer=layer, x=x, window=window: layer.convolution(x, window), repeats)
        found.append(
            {
                "layer": f"{inputs}→{outputs} {kernel}×{kernel}/{stride} {size}²",
                "tmacs": round(count / time / 1e12, 3),
            }
        )
        total, macs = total + often * time, macs + often * count
    return {
        "row": name,
        "batch": batch,
        "gmacs": round(macs / 1e9, 1),
        "tmacs": round(macs / total / 1e12, 3),
        "layers": found,
    }


class ResNet:
    """A ResNet-50 on words: convolutions, ReLU, pooling, additions and the last layer, all on the device.

    Args:
        datapath: of every layer.
        device: where it computes.
        width: what channels are divided by, for tests.
        blocks: of each stage.
    """

    def __init__(self, datapath: Datapath, device: Any, width: int = 1, blocks: tuple[int, ...] = (3, 4, 6, 3)):
        self.device, self.fmt = device, datapath.output
        top = self.fmt.max_code
        places = {"lsb": 14} if datapath.is_linear else {"acc_offset": top}
        self.plan = DotPlan(datapath, datapath.activation, datapath.weight, datapath.output, 0, 0, top, **places)
        adder = datapath.add
        self.add_plan = AddPlan(adder, self.fmt, self.fmt, self.fmt, 0, 0, 0, 0)
        self.pool_plan = PoolPlan(adder, self.fmt, self.fmt, 0, 0, 0)
        self.stem = self._conv(64 // width, 3, 7, 2)
        self.stages: list[list[tuple[Any, Any, Any, Any]]] = []
        inputs = 64 // width
        for stage, count in enumerate(blocks):
            middle = 64 * 2**stage // width
            made = []
            for block in range(count):
                stride = 2 if block == 0 and stage > 0 else 1
                short = self._conv(4 * middle, inputs, 1, stride) if block == 0 else None
                made.append(
                    (
                        self._conv(middle, inputs, 1, 1),
                        self._conv(middle, middle, 3, stride),
                        self._conv(4 * middle, middle, 1, 1),
                        short,
                    )
                )
                inputs = 4 * middle
            self.stages.append(made)
        from lnsdeploy.emulator import cuda

        self.last = cuda.CudaDot(self.plan, words(self.plan.weight, (1000 // width, inputs), 3, device))

    def _conv(self, outputs: int, inputs: int, kernel: int, stride: int) -> Any:
        from lnsdeploy.emulator import cuda

        layer = cuda.CudaDot(self.plan, words(self.plan.weight, (outputs, inputs, kernel, kernel), 2, self.device))
        return layer, Window((kernel, kernel), (stride, stride), (kernel // 2,) * 4)

    def run(self, x: Any) -> Any:
        """Words [batch, 1000/width] of float32 images [batch, 3, size, size]."""
        from lnsdeploy.emulator import cuda

        def conv(made: Any, y: Any) -> Any:
            return made[0].convolution(y, made[1])

        y = cuda.encode(x, self.plan.activation, -self.fmt.max_code, check=False)
        y = cuda.relu(conv(self.stem, y), self.fmt)
        y = cuda.max_pool(y, self.fmt, Window((3, 3), (2, 2), (1, 1, 1, 1)))
        for stage in self.stages:
            for first, second, third, short in stage:
                z = cuda.relu(conv(first, y), self.fmt)
                z = conv(third, cuda.relu(conv(second, z), self.fmt))
                y = cuda.relu(cuda.add(z, y if short is None else conv(short, y), self.add_plan), self.fmt)
        y = cuda.average_pool(y, self.pool_plan, Window(tuple(y.shape[2:])))
        return self.last.dot(y.reshape(y.shape[0], -1))


def resnet_row(name: str, batch: int, repeats: int, device: Any) -> dict[str, Any]:
    """Images a second of a whole ResNet-50, and the memory that it takes."""
    import torch

    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    net = ResNet(load_datapath(name), device)
    x = torch.randn(batch, 3, 224, 224, device=device)
    time = seconds(lambda: net.run(x), repeats)
    return {
        "datapath": name,
        "batch": batch,
        "images_per_second": round(batch / time, 1),
        "gibibytes": round(torch.cuda.max_memory_allocated(device) / 2**30, 2),
    }


def card(device: Any, size: int, repeats: int) -> dict[str, Any]:
    """The card, what its integer units could do, and its float products."""
    import torch

    properties = torch.cuda.get_device_properties(device)
    clock = getattr(properties, "clock_rate", 0) * 1e3 or CLOCK
    torch.backends.cuda.matmul.allow_tf32 = False
    found: dict[str, Any] = {
        "name": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "clock_ghz": round(clock / 1e9, 3),
        # one instruction of 64 lanes a multiply-accumulate
        "integer_bound_tmacs": round(properties.multi_processor_count * 64 * clock / 1e12, 2),
    }
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        found[f"{str(dtype).removeprefix('torch.')}_tmacs"] = round(
            size**3 / seconds(lambda a=a, b=b: a @ b, repeats) / 1e12, 2
        )
    return found


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--static", action="store_true", help="compile and count, without a card")
    parser.add_argument("--rows", default=None, help="names, separated by commas; all by default")
    parser.add_argument("--size", type=int, default=4096, help="of the products")
    parser.add_argument("--batch", type=int, default=64, help="images of a ResNet-50")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    names = options.rows.split(",") if options.rows else [*ROWS, *NAMED]
    if unknown := [name for name in names if name not in ROWS and name not in NAMED]:
        sys.exit(f"unknown rows {', '.join(unknown)}; there are {', '.join([*ROWS, *NAMED])}")
    return _static(names, options.json) if options.static else _measure(names, options)


def _static(names: list[str], as_json: bool) -> int:
    from lnsdeploy.emulator import nvrtc

    if why := nvrtc.compiler_unavailable():
        sys.exit(why)
    tool = disassembler()
    if tool is None:
        print("no nvdisasm: install nvidia-cuda-nvdisasm to count instructions", file=sys.stderr)
    rows = [static_row(name, tool) for name in names]
    if as_json:
        print(json.dumps({"nvrtc": nvrtc.compiler_version(), "architecture": "sm_90", "rows": rows}))
    else:
        print(f"{'row':<20} {'kernel':<32} instructions/MAC  goal  registers  spilled  limit         bound TMAC/s")
        for row in rows:
            shown = {key: "–" if value is None else value for key, value in row.items()}
            print(
                f"{row['row']:<20} {row['kernel']:<32} {shown.get('instructions_per_mac', '–'):>16}  "
                f"{shown['goal']:>4}  {row['registers']:>9}  {row['spill_bytes']:>7}  "
                f"{row.get('limit', '–'):<12}  {row.get('bound_tmacs', '–'):>12}"
            )
    good = all(row["spill_bytes"] == 0 and (row.get("of_goal") or 0) <= 1.15 for row in rows if row["goal"])
    return 0 if good else 1


def _measure(names: list[str], options: argparse.Namespace) -> int:
    from lnsdeploy.emulator import cuda

    if why := cuda.unavailable():
        sys.exit(f"{why} (--static needs no card)")
    import torch

    device = torch.device("cuda", torch.cuda.current_device())
    repeats = max(options.repeats, 1)
    result: dict[str, Any] = {
        "machine": machine(),
        "card": card(device, options.size, repeats),
        "size": options.size,
        "rows": [product_row(name, options.size, repeats, device) for name in names],
        "resnet50_layers": [
            layers_row(name, options.batch, repeats, device)
            for name in names
            if name in ("linear-8-wrap", "linear-16-wrap", "log-8", "log-16-1024", "lns-madam-8")
        ],
        "resnet50": [
            resnet_row(name, options.batch, max(repeats // 2, 1), device)
            for name in ("lns-madam-8", "elma-8", "gauss-8")
            if name in names
        ],
    }
    if options.json:
        print(json.dumps(result))
    else:
        print(", ".join(f"{key} {value}" for key, value in result["card"].items()))
        for row in result["rows"]:
            print(f"{row['row']:<20} {row['kernel']:<32} {row['tmacs']:8.3f} TMAC/s  equal {row['equal']}")
        for row in result["resnet50_layers"]:
            print(f"{row['row']:<20} ResNet-50 layers {row['tmacs']:8.3f} TMAC/s")
        for row in result["resnet50"]:
            print(f"{row['datapath']:<20} ResNet-50 {row['images_per_second']:8.1f} images/s, {row['gibibytes']} GiB")
    return 0 if all(row["equal"] for row in result["rows"]) else 1


if __name__ == "__main__":
    sys.exit(main())
