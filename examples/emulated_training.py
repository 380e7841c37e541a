"""Training whose every product, forward and backward, runs on LNS words: the digits MLP beside float32.

    python examples/emulated_training.py --datapath lns-madam-8 --seeds 3

Weights are float32 between steps, as the optimizer sees them; every product of the forward pass, of the errors and of
the weights' gradients is computed by the emulator, and testing is emulated as well.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import time
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import lnsdeploy
from lnsdeploy.training import build_model, load_data


def train(datapath: str | None, seed: int, epochs: int, batch: int, lr: float) -> dict[str, Any]:
    """Train the MLP, in float32 if there is no datapath; its accuracy on the test images and what was emulated."""
    data = load_data("digits")
    torch.manual_seed(seed)
    model = build_model("mlp", data.shape, data.classes, seed=seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=lr)
    images, labels = torch.from_numpy(data.train_x), torch.from_numpy(data.train_y)
    steps = epochs * -(-len(images) // batch)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    order = np.random.default_rng(seed)
    seen = None if datapath is None else lnsdeploy.emulate(datapath, backward=True, model=model)
    start = time.perf_counter()
    with contextlib.nullcontext() if seen is None else seen:
        for _ in range(epochs):
            for some in np.array_split(order.permutation(len(images)), -(-len(images) // batch)):
                optimizer.zero_grad()
                loss = functional.cross_entropy(model(images[some]), labels[some])
                loss.backward()
                optimizer.step()
                schedule.step()
        with torch.no_grad():
            right = model(torch.from_numpy(data.test_x)).argmax(1) == torch.from_numpy(data.test_y)
    return {
        "datapath": datapath or "float32",
        "seed": seed,
        "accuracy": float(right.double().mean()),
        "seconds": round(time.perf_counter() - start, 2),
        "macs": 0 if seen is None else seen.macs,
        "not_emulated": {} if seen is None else seen.not_emulated,
        "table": "" if seen is None else seen.table(),
    }


def main(argv: list[str] | None = None) -> int:
    """Train, print, and fail where the emulated net is more than a point below float32 on the mean."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--datapath", default="lns-madam-8", help="a named datapath, or a TOML file of one or of a recipe"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=0.003)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(argv)
    runs = [
        train(path, seed, options.epochs, options.batch, options.lr)
        for seed in range(options.seeds)
        for path in (None, options.datapath)
    ]
    mean = {
        name: np.mean([r["accuracy"] for r in runs if r["datapath"] == name]) for name in ("float32", options.datapath)
    }
    lost = 100 * float(mean["float32"] - mean[options.datapath])
    if options.json:
        print(json.dumps({"runs": runs, "points_lost": round(lost, 3)}))
    else:
        print(runs[-1]["table"])
        for r in runs:
            print(f"seed {r['seed']}  {r['datapath']:<14} {100 * r['accuracy']:6.2f} %  {r['seconds']:6.1f} s")
        print(f"points lost to float32, mean of {options.seeds} seeds: {lost:.2f}")
    return 0 if lost <= 1 else 1


if __name__ == "__main__":
    sys.exit(main())
