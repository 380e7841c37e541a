"""Small nets for small images, initialised as He et al. 2015 and ready for export."""

from __future__ import annotations

import itertools
import math
from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn

from lnsdeploy.errors import BadValueError, UnknownNameError

HIDDEN = (128, 64)
CHANNELS = (8, 16)


class ResidualBlock(nn.Module):
    """y = ReLU(x + BN(conv(ReLU(BN(conv(x)))))), 3×3 convolutions that keep shape and channels.

    Args:
        channels: of input and output.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.conv1 = _conv(channels, channels)
        self.norm1 = nn.BatchNorm2d(channels)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(channels, channels)
        self.norm2 = nn.BatchNorm2d(channels)
        self.relu2 = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, channels, height, width] to the same shape."""
        inner = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(x + self.norm2(self.conv2(inner)))  # type: ignore[no-any-return]


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    # the batch norm that follows has a shift of its own
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)


def mlp(in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two hidden layers of 128 and 64 with ReLU."""
    sizes = [math.prod(in_shape), *HIDDEN]
    parts: OrderedDict[str, nn.Module] = OrderedDict(flatten=nn.Flatten())
    for number, (inputs, outputs) in enumerate(itertools.pairwise(sizes), start=1):
        parts[f"hidden{number}"] = nn.Linear(inputs, outputs)
        parts[f"relu{number}"] = nn.ReLU()
    parts["output"] = nn.Linear(sizes[-1], classes)
    return nn.Sequential(parts)


def cnn(in_shape: tuple[int, ...], classes: int) -> nn.Module:
    """Two convolutions with batch norm, max pooling, a residual block, global average, a linear layer.

    About 0.15 million multiply-accumulates for an image of 8×8, and 0.47 million for one of 28×28, where the
    first convolution has a stride of 2.
    """
    if len(in_shape) != 3 or min(in_shape[1:]) < 2:
        raise BadValueError(f"the cnn takes images [channels, height, width] of at least 2×2, not {in_shape}")
    stride = 2 if min(in_shape[1:]) >= 16 else 1
    first, second = CHANNELS
    return nn.Sequential(
        OrderedDict(
            conv1=_conv(in_shape[0], first, stride),
            norm1=nn.BatchNorm2d(first),
            relu1=nn.ReLU(),
            conv2=_conv(first, second),
            norm2=nn.BatchNorm2d(second),
            relu2=nn.ReLU(),
            pool=nn.MaxPool2d(2),
            block=ResidualBlock(second),
            average=nn.AdaptiveAvgPool2d(1),
            flatten=nn.Flatten(),
            output=nn.Linear(second, classes),
        )
    )


MODELS: dict[str, Callable[[tuple[int, ...], int], nn.Module]] = {"mlp": mlp, "cnn": cnn}


def build_model(name: str, in_shape: tuple[int, ...], classes: int, *, seed: int = 0) -> nn.Module:
    """A net by name, in training mode, with initial weights that depend on the seed alone.

    Weights are normal with variance 2/fan_in (He et al. 2015), biases zero.

    Args:
        name: ``"mlp"`` or ``"cnn"``.
        in_shape: of one input: channels, height, width.
        classes: outputs.
        seed: of the initial weights; torch's own random state is neither read nor changed.

    Raises:
        UnknownNameError: no such net.
        BadValueError: the net cannot take inputs of that shape.
    """
    if name not in MODELS:
        raise UnknownNameError("model", name, MODELS)
    if classes < 2 or not in_shape or min(in_shape) < 1:
        raise BadValueError(f"a net needs inputs and at least two classes, not {tuple(in_shape)} and {classes}")
    with torch.random.fork_rng(devices=[]):
        model = MODELS[name](tuple(in_shape), classes)
    initialise_(model, seed)
    return model


def initialise_(model: nn.Module, seed: int) -> None:
    """He initialisation of all matrices and kernels, zero biases; batch norms as torch makes them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
