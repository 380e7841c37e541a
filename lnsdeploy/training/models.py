"""Nets to train, initialised as He et al. 2015: for small images, and a transformer for text."""

from __future__ import annotations

import inspect
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from lnsdeploy.errors import BadTypeError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.evaluation.names import is_model_name
from lnsdeploy.training.layers import Matmul

HIDDEN = (128, 64)
CHANNELS = (8, 16)

# A factor on a layer's initial weights, beside He's: an attribute of that name.
_SCALE = "initial_scale"


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


def cnn_large(in_shape: tuple[int, ...], classes: int, *, width: int = 32) -> nn.Module:
    """Two convolutions with batch norm and max pooling, then two linear layers.

    Of `width` and 2·`width` channels, and 4·`width` hidden units. About 4.2 million multiply-accumulates for an image
    of 28×28 with the default width.
    """
    _check_images("cnn-large", in_shape, 4)
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    channels = in_shape[0]
    for number, outputs in enumerate((width, 2 * width), start=1):
        parts[f"conv{number}"] = _conv(channels, outputs)
        parts[f"norm{number}"] = nn.BatchNorm2d(outputs)
        parts[f"relu{number}"] = nn.ReLU()
        parts[f"pool{number}"] = nn.MaxPool2d(2)
        channels = outputs
    parts["flatten"] = nn.Flatten()
    features = channels * (in_shape[1] // 4) * (in_shape[2] // 4)
    parts["hidden"] = nn.Linear(features, 4 * width)
    parts["relu3"] = nn.ReLU()
    parts["output"] = nn.Linear(4 * width, classes)
    return nn.Sequential(parts)


class BasicBlock(nn.Module):
    """y = ReLU(short(x) + BN(conv(ReLU(BN(conv(x)))))), as in He et al. 2016.

    Args:
        inputs, outputs: channels.
        stride: of the first convolution; where it or the channels change, `short` is a 1×1 convolution with batch norm.
    """

    def __init__(self, inputs: int, outputs: int, stride: int = 1):
        super().__init__()
        self.conv1 = _conv(inputs, outputs, stride)
        self.norm1 = nn.BatchNorm2d(outputs)
        self.relu1 = nn.ReLU()
        self.conv2 = _conv(outputs, outputs)
        self.norm2 = nn.BatchNorm2d(outputs)
        self.relu2 = nn.ReLU()
        self.short: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.short = nn.Sequential(
                OrderedDict(conv=nn.Conv2d(inputs, outputs, 1, stride, bias=False), norm=nn.BatchNorm2d(outputs))
            )

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, inputs, height, width] to [n, outputs, height/stride, width/stride]."""
        inner = self.relu1(self.norm1(self.conv1(x)))
        return self.relu2(self.short(x) + self.norm2(self.conv2(inner)))  # type: ignore[no-any-return]


def _resnet(in_shape: tuple[int, ...], classes: int, widths: tuple[int, ...], blocks: int) -> nn.Module:
    parts: OrderedDict[str, nn.Module] = OrderedDict()
    parts["conv"] = _conv(in_shape[0], widths[0])
    parts["norm"] = nn.BatchNorm2d(widths[0])
    parts["relu"] = nn.ReLU()
    channels = widths[0]
    for stage, width in enumerate(widths, start=1):
        for block in range(1, blocks + 1):
            stride = 2 if stage > 1 and block == 1 else 1
            parts[f"stage{stage}_{block}"] = BasicBlock(channels, width, stride)
            channels = width
    parts["average"] = nn.AdaptiveAvgPool2d(1)
    parts["flatten"] = nn.Flatten()
    parts["output"] = nn.Linear(channels, classes)
    return nn.Sequential(parts)


def resnet20(in_shape: tuple[int, ...], classes: int, *, width: int = 16) -> nn.Module:
    """The ResNet-20 of He et al. 2016 for CIFAR: three stages of three blocks with 16, 32 and 64 channels.

    41 million multiply-accumulates for an image of 32×32. Where channels double, the short way is a 1×1 convolution.
    """
    _check_images("resnet20", in_shape, 4)
    return _resnet(in_shape, classes, (width, 2 * width, 4 * width), 3)


def resnet18(in_shape: tuple[int, ...], classes: int, *, width: int = 64) -> nn.Module:
    """The ResNet-18 of He et al. 2016 (four stages of two blocks) behind a 3×3 convolution, for small images."""
    _check_images("resnet18", in_shape, 8)
    return _resnet(in_shape, classes, (width, 2 * width, 4 * width, 8 * width), 2)


def _check_images(name: str, in_shape: tuple[int, ...], least: int) -> None:
    if len(in_shape) != 3 or min(in_shape[1:]) < least:
        raise BadValueError(
            f"the {name} takes images [channels, height, width] of at least {least}×{least}, not {in_shape}"
        )


class Attention(nn.Module):
    """Causal attention of several heads; its products are modules, so that words reach them.

    Args:
        width: of vectors.
        heads: a divisor of `width`.
        dropout: of the weights of the sum.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.heads = heads
        self.query = nn.Linear(width, width, bias=False)
        self.key = nn.Linear(width, width, bias=False)
        self.value = nn.Linear(width, width, bias=False)
        self.scores = Matmul()
        self.mix = Matmul()
        self.dropout = nn.Dropout(dropout)
        self.project = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, length, width] to the same shape."""
        count, length, width = x.shape
        query, key, value = (
            layer(x).view(count, length, self.heads, -1).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = self.scores(query, key.transpose(2, 3)) * (width // self.heads) ** -0.5
        future = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        weights = self.dropout(torch.softmax(scores.masked_fill(future, -math.inf), dim=-1))
        mixed = self.mix(weights, value).transpose(1, 2).reshape(count, length, width)
        return self.project(mixed)  # type: ignore[no-any-return]


class TransformerBlock(nn.Module):
    """x + attention(norm(x)), then x + MLP(norm(x)) with ReLU and four times the width.

    Args:
        width, heads, dropout: as in :class:`Attention`.
    """

    def __init__(self, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.norm2 = nn.LayerNorm(width)
        self.expand = nn.Linear(width, 4 * width)
        self.relu = nn.ReLU()
        self.contract = nn.Linear(4 * width, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Maps [n, length, width] to the same shape."""
        x = x + self.dropout(self.attention(self.norm1(x)))
        return x + self.dropout(self.contract(self.relu(self.expand(self.norm2(x)))))  # type: ignore[no-any-return]


class Transformer(nn.Module):
    """A decoder that predicts the next token (Vaswani et al. 2017, with norms in front as in Radford et al. 2019).

    Args:
        tokens: of the vocabulary.
        context: the longest sequence.
        depth: blocks.
        width, heads, dropout: of each.
    """

    def __init__(self, tokens: int, context: int, depth: int, width: int, heads: int, dropout: float = 0.0):
        super().__init__()
        self.tokens = nn.Embedding(tokens, width)
        self.positions = nn.Embedding(context, width)
        blocks = [TransformerBlock(width, heads, dropout) for _ in range(depth)]
        self.blocks = nn.Sequential(*blocks)
        self.norm = nn.LayerNorm(width)
        self.output = nn.Linear(width, tokens)
        for block in blocks:
            # what 2·depth blocks add to the stream shall not grow with depth
            for layer in (block.attention.project, block.contract):
                setattr(layer, _SCALE, (2 * depth) ** -0.5)
        setattr(self.output, _SCALE, 0.25)

    def forward(self, x: Tensor) -> Tensor:
        """Logits [n, length, tokens] of the token that follows each of x [n, length], int64."""
        positions = torch.arange(x.shape[1], device=x.device)
        return self.output(self.norm(self.blocks(self.tokens(x) + self.positions(positions))))  # type: ignore[no-any-return]


def transformer(
    in_shape: tuple[int, ...],
    classes: int,
    *,
    depth: int = 4,
    width: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """A decoder for sequences [length] of tokens; `classes` is the size of the vocabulary."""
    if len(in_shape) != 1:
        raise BadValueError(f"the transformer takes text (--data text:FILE), not inputs of shape {in_shape}")
    if min(depth, width, heads) < 1 or width % heads:
        raise BadValueError(f"the transformer needs a width that its heads divide, not {width} and {heads}")
    if not 0 <= dropout < 1:
        raise BadValueError(f"dropout must be at least 0 and below 1, not {dropout}")
    return Transformer(classes, in_shape[0], depth, width, heads, dropout)


MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "cnn": cnn,
    "cnn-large": cnn_large,
    "resnet20": resnet20,
    "resnet18": resnet18,
    "transformer": transformer,
}


def settings_of(name: str) -> dict[str, int | float]:
    """The settings of a net of ours, with their defaults."""
    parameters = inspect.signature(MODELS[name]).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def runs_code(name: str) -> bool:
    """Whether a model's name says to import a module of the user's: anything but ours and libraries'."""
    return name not in MODELS and not name.startswith(("timm:", "torchvision:"))


def build_model(
    name: str,
    in_shape: tuple[int, ...],
    classes: int,
    *,
    seed: int = 0,
    settings: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A net by name, in training mode, with initial weights that depend on the seed alone.

    Weights of our nets are normal with variance 2/fan_in (He et al. 2015), biases zero. Others are initialised as their
    authors have it.

    Args:
        name: one of :data:`MODELS`, ``timm:NAME``, ``torchvision:NAME``, or ``FILE.py:CALLABLE`` and
            ``PACKAGE.MODULE:CALLABLE``, which is called with `settings` alone.
        in_shape: of one input: channels, height, width; or the length of a text.
        classes: outputs; the size of a text's vocabulary.
        seed: of the initial weights; torch's own random state is neither read nor changed.
        settings: of the model's constructor.

    Raises:
        UnknownNameError: no such net, or no such setting.
        BadValueError: the net cannot take inputs of that shape.
    """
    settings = dict(settings or {})
    if name not in MODELS and not is_model_name(name):
        raise UnknownNameError("model", name, MODELS)
    if classes < 2 or not in_shape or min(in_shape) < 1:
        raise BadValueError(f"a net needs inputs and at least two classes, not {tuple(in_shape)} and {classes}")
    if name not in MODELS:
        return _others(name, tuple(in_shape), classes, seed, settings)
    known = settings_of(name)
    for key, value in settings.items():
        if key not in known:
            raise UnknownNameError(f"setting of {name}", key, known)
        if isinstance(value, bool) or not isinstance(value, (int, type(known[key]))):
            raise BadTypeError(f"{key} of {name} must be like {known[key]!r}, not {value!r}")
        if isinstance(known[key], int) and not 1 <= value <= 1 << 16:
            raise BadValueError(f"{key} of {name} must be 1 to {1 << 16}, not {value}")
    with torch.random.fork_rng(devices=[]):
        model = MODELS[name](tuple(in_shape), classes, **settings)
    initialise_(model, seed)
    return model


def _others(name: str, in_shape: tuple[int, ...], classes: int, seed: int, settings: dict[str, Any]) -> nn.Module:
    from lnsdeploy.evaluation.models import load_model

    weights = None
    if not runs_code(name):
        weights = "random"
        if len(in_shape) != 3:
            raise BadValueError(f"{name} takes images, not inputs of shape {in_shape}")
    if name.startswith("timm:"):
        settings = {"num_classes": classes, "in_chans": in_shape[0]} | settings
        given = {"image_size": in_shape[1]} if in_shape[1] == in_shape[2] else {}
        try:
            found = load_model(name, weights=weights, seed=seed, settings=settings, **given)
        except (BadTypeError, BadValueError):
            # most convolutional nets take any size and no argument for it
            found = load_model(name, weights=weights, seed=seed, settings=settings)
    elif name.startswith("torchvision:"):
        found = load_model(name, weights=weights, seed=seed, settings={"num_classes": classes} | settings)
    else:
        found = load_model(name, weights=weights, seed=seed, settings=settings)
    model = found.module.train().requires_grad_(True)
    if len(in_shape) == 3:
        with torch.no_grad():
            model.eval()
            try:
                shape = tuple(model(torch.zeros(1, *in_shape)).shape)
            except LNSError:
                raise
            except Exception as error:  # whatever the model raises for inputs that do not fit
                raise BadValueError(f"{name} does not take inputs of shape {in_shape}: {error}") from error
            model.train()
        if shape != (1, classes):
            raise BadValueError(f"{name} gives outputs of shape {shape[1:]} for {classes} classes")
    return model


def initialise_(model: nn.Module, seed: int) -> None:
    """He initialisation of all matrices and kernels, zero biases; norms as torch makes them."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu", generator=generator)
            if hasattr(module, _SCALE):
                with torch.no_grad():
                    module.weight.mul_(getattr(module, _SCALE))
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=module.embedding_dim**-0.5, generator=generator)
