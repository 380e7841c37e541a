"""Small float nets for tests, as torch modules and as ONNX models."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import nn

from lnsdeploy.exporters.export import float_onnx


class ResidualNet(nn.Module):
    """Convolutions with batch norm, max pooling, a residual, average pooling, and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv2d(1, 6, 3, padding=1)
        self.b1 = nn.BatchNorm2d(6)
        self.c2 = nn.Conv2d(6, 6, 3, padding=1, bias=False)
        self.b2 = nn.BatchNorm2d(6)
        self.pool = nn.MaxPool2d(2)
        self.average = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.pool(torch.relu(self.b1(self.c1(x))))
        x = torch.relu(x + self.b2(self.c2(x)))
        out: torch.Tensor = self.fc(torch.flatten(self.average(x), 1))
        return out


class Dense(nn.Module):
    """Two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(12, 16)
        self.fc2 = nn.Linear(16, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.fc2(torch.relu(self.fc1(torch.flatten(x, 1))))
        return out


def seeded(module: type[nn.Module], seed: int = 0) -> nn.Module:
    """A module with seeded weights and batch-norm statistics away from their defaults, in eval mode."""
    torch.manual_seed(seed)
    net = module()
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            nn.init.uniform_(part.weight, 0.5, 1.5)
            nn.init.uniform_(part.bias, -0.3, 0.3)
            nn.init.uniform_(part.running_mean, -0.3, 0.3)
            nn.init.uniform_(part.running_var, 0.5, 1.5)
    return net.eval()


def inputs(shape: tuple[int, ...], count: int, seed: int = 0) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Seeded inputs in 0 … 1."""
    return np.random.default_rng(seed).random((count, *shape), dtype=np.float32)


@lru_cache(maxsize=4)
def residual() -> tuple[nn.Module, Any, np.ndarray[Any, Any]]:
    """The residual net, its ONNX model, and inputs."""
    net = seeded(ResidualNet)
    x = inputs((1, 8, 8), 40)
    return net, float_onnx(net, x[:2]), x


@lru_cache(maxsize=4)
def dense() -> tuple[nn.Module, Any, np.ndarray[Any, Any]]:
    """The dense net, its ONNX model, and inputs."""
    net = seeded(Dense)
    x = inputs((3, 4), 40)
    return net, float_onnx(net, x[:2]), x


def outputs(net: nn.Module, x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """The float32 outputs."""
    with torch.no_grad():
        return np.asarray(net(torch.from_numpy(x)).numpy())
