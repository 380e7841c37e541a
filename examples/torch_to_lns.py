"""A net trained elsewhere, in plain torch, to 8-bit LNS without any training: what is lost?

    python examples/torch_to_lns.py
    python examples/torch_to_lns.py --data mnist --data-dir FOLDER --epochs 6

Trains a small convolutional net in float32 with Adam, exports it with torch.onnx, and gives the file to
`lnsdeploy.export`, which calibrates it on training images. Both nets then see the whole test set. Exit status 1 if more
than --max-drop points of accuracy are lost.
"""

from __future__ import annotations

import argparse
import json
import logging
import sys
import tempfile
import warnings
from pathlib import Path

import torch
from torch import nn

import lnsdeploy
from lnsdeploy.errors import CheckFailedError
from lnsdeploy.training.data import Dataset, load_data


def make_net(channels: int, size: int, classes: int) -> nn.Module:
    """Two convolutions with batch norm and pooling, and a linear layer; nothing of lnsdeploy."""
    return nn.Sequential(
        nn.Conv2d(channels, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(32 * (size // 4) ** 2, classes),
    )  # fmt: skip


def train(data: Dataset, epochs: int, seed: int) -> nn.Module:
    """A net trained in float32."""
    torch.manual_seed(seed)
    net = make_net(data.shape[0], data.shape[-1], data.classes)
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    x, y = torch.from_numpy(data.train_x.copy()), torch.from_numpy(data.train_y.copy())
    for _ in range(epochs):
        order = torch.randperm(len(x))
        for first in range(0, len(x), 64):
            batch = order[first : first + 64]
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    return net.eval()


def save_onnx(net: nn.Module, data: Dataset, path: Path) -> None:
    """The net as an ONNX file, as anybody would make it."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            net,
            (torch.from_numpy(data.train_x[:2].copy()),),
            str(path),
            dynamo=True,
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            verbose=False,
        )


def main(argv: list[str] | None = None) -> int:
    """Train, export twice, compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="data set (default: digits)")
    parser.add_argument("--data-dir", type=Path, default=None, help="where it lies, if it is files")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--bits", type=int, default=8)
    parser.add_argument("--gamma", type=int, default=8)
    parser.add_argument("--max-drop", type=float, default=0.5, help="points of accuracy (default: 0.5)")
    parser.add_argument("--out", type=Path, default=None, help="keep the files there")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args(argv)
    data = load_data(given.data, given.data_dir)
    net = train(data, given.epochs, given.seed)
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.out or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        save_onnx(net, data, folder / "net.onnx")
        result = lnsdeploy.export(
            folder / "net.onnx",
            data.train_x[:512],
            bits=given.bits,
            gamma=given.gamma,
            evaluation=((data.test_x[i : i + 64], data.test_y[i : i + 64]) for i in range(0, len(data.test_x), 64)),
            evaluate_on=len(data.test_x),
        )
        result.save(folder / "net.lns.onnx")
    found = result.fidelity
    assert found.accuracy_float is not None
    assert found.accuracy_lns is not None
    if given.json:
        told = {"data": given.data, "bits": given.bits, "gamma": given.gamma, "inputs": found.inputs}
        told |= {"accuracy_float": found.accuracy_float, "accuracy_lns": found.accuracy_lns, "sqnr_db": found.sqnr_db}
        print(json.dumps(told))
    else:
        print(
            f"{given.data}, {found.inputs} test images: float32 {100 * found.accuracy_float:.2f} %, "
            f"{given.bits}-bit LNS {100 * found.accuracy_lns:.2f} % ({found.drop:+.2f} points lost), "
            f"{found.sqnr_db:.1f} dB, {100 * result.artifact.coverage:.0f} % of MACs in LNS"
        )
    try:
        found.require(max_drop=given.max_drop)
    except CheckFailedError as error:
        print(f"torch_to_lns: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
