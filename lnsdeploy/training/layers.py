"""Layers that train on LNS words, and the conversion of torch models to and from them (docs/training.md).

A converted model keeps its parameters and their names: a layer is replaced by one of the same name that holds
the same parameters, and a batch norm that follows a layer stays where it is, but is trained as it will be
deployed, folded into the layer's weights (as Jacob et al. 2018 do for integers).
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from lnsdeploy.datapath import load_datapath
from lnsdeploy.errors import BadTypeError, BadValueError
from lnsdeploy.formats import LNSFormat, LNSTensor, Offset, encode
from lnsdeploy.recipe import LayerRecipe, Recipe
from lnsdeploy.training.fake_quantize import ActivationQuantizer, calibrate_weight, fake_quantize, quantize_backward

# A batch norm's scale below this is taken as 1 in training: 0/0 otherwise, and nothing to deploy anyway.
_LEAST_SCALE = 1e-12

_Module = TypeVar("_Module", bound=nn.Module)
_Layer = TypeVar("_Layer", bound="LNSLayer")
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d


class PrepareWarning(UserWarning):
    """A part of the model stays in float, or is trained otherwise than it will be deployed."""


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """How a layer was trained: what lowering must keep.

    Args:
        weight: the format of its weights; None if they are float.
        weight_offset: their offset, an integer or int64 [channels].
        weight_axis: the channel axis of several offsets, else None.
        activation: the format of its input; None if it is float.
        input_offset: the input's offset; 0 if it is float.
        datapath: the datapath that the recipe names for the layer, or None.
    """

    weight: LNSFormat | None
    weight_offset: Offset
    weight_axis: int | None
    activation: LNSFormat | None
    input_offset: int
    datapath: str | None


# ---------------------------------------------------------------------------------------------------
# Layers


class LNSLayer(nn.Module):
    """What all LNS layers share: fake-quantized input and weights, with offsets kept as buffers.

    The buffer `weight_offset` (int64, [] or [channels]) follows the weights: in training at every forward
    (with ``"lsq"``, which is slow, at every change of mode), and at every call of ``train()`` or ``eval()``; in
    eval mode it is frozen. Where an optimizer holds the weights as codes of its own (:class:`LNSMadam`), it follows the
    optimizer's instead, see :meth:`hold_offset`.

    Where the recipe names formats for `error` and `gradient`, the backward pass of training rounds the gradient of
    the layer's output, and that of its weights, to their words.
    """

    weight_offset: Tensor
    input_quantizer: ActivationQuantizer | None
    recipe: LayerRecipe
    layer_name: str
    _norm: BatchNorm | None
    _stale: bool
    _held: bool = False
    # an embedding is looked up by integers
    _takes_numbers = True

    def _setup(self, recipe: LayerRecipe, name: str, norm: BatchNorm | None) -> None:
        # not registered as a child: its parameters keep the names they have in the model
        object.__setattr__(self, "_norm", norm)
        self.recipe, self.layer_name = recipe, name
        quantizer = None
        if recipe.activation is not None and self._takes_numbers:
            quantizer = _activation_quantizer(recipe, f"the input of {name}" if name else "the layer's input")
            quantizer.to(self._weight.device).train(self.training)
        self.input_quantizer = quantizer
        if recipe.weight is not None:
            shape = self._weight.shape[:1] if recipe.granularity == "channel" else ()
            self.register_buffer("weight_offset", torch.zeros(shape, dtype=torch.int64, device=self._weight.device))
        else:
            self._buffers.pop("weight_offset", None)
        # weights may still be loaded or initialised; the offsets are made when they are first needed
        self._stale, self._held = True, False

    def hold_offset(self, offset: Offset) -> None:
        """Fix the weights' offset: from now on it no longer follows the weights.

        For weights that already are values of words of this offset, which rounding then leaves as they are. A layer
        with a folded norm has words of other numbers, and ignores the call.

        Args:
            offset: an integer, or int64 [channels] if the recipe says so.

        Raises:
            BadValueError: the weights are float, or `offset` has another shape.
        """
        if self.recipe.weight is None:
            raise BadValueError(f"layer {self.layer_name!r} has float weights, and so no offset")
        if self._norm is not None:
            return
        value = torch.as_tensor(offset, dtype=torch.int64)
        if value.shape != self.weight_offset.shape:
            raise BadValueError(
                f"layer {self.layer_name!r}: offsets of shape {tuple(value.shape)}, though its recipe needs "
                f"{tuple(self.weight_offset.shape)}"
            )
        self.weight_offset.copy_(value)
        self._stale, self._held = False, True

    @property
    def _weight(self) -> Tensor:
        return cast(Tensor, self.weight)

    @property
    def _bias(self) -> Tensor | None:
        return cast("Tensor | None", getattr(self, "bias", None))

    @property
    def norm(self) -> BatchNorm | None:
        """The batch norm folded into this layer, or None."""
        return self._norm

    @property
    def weight_axis(self) -> int | None:
        """The axis of several weight offsets, or None."""
        return 0 if self.recipe.granularity == "channel" else None

    def effective_weight(self) -> Tensor:
        """The float weights that are encoded for deployment: a batch norm is folded into them."""
        return self._weight if self._norm is None else fold(self, self._norm)[0]

    def effective_bias(self) -> Tensor | None:
        """The float bias that is deployed with :meth:`effective_weight`."""
        return self._bias if self._norm is None else fold(self, self._norm)[1]

    def weight_words(self) -> LNSTensor:
        """The words of the weights, as the eval forward uses them and as export encodes them.

        Raises:
            BadValueError: the recipe leaves the weights in float.
        """
        fmt = self.recipe.weight
        if fmt is None:
            raise BadValueError(f"layer {self.layer_name!r} has float weights, and so no words")
        self._refresh_if_stale()
        weight = self.effective_weight().detach()
        offset, axis = self._offset(), self.weight_axis
        words = encode(weight.cpu().numpy(), fmt, offset, axis=axis, name=self._weight_name())
        return LNSTensor(words, fmt, offset, axis)

    def spec(self) -> LayerSpec:
        """Formats and offsets for lowering.

        Raises:
            BadValueError: the input has never been calibrated.
        """
        self._refresh_if_stale()
        recipe, quantizer = self.recipe, self.input_quantizer
        if quantizer is not None and not quantizer.calibrated:
            raise BadValueError(
                f"{quantizer.name} has never been calibrated: train the model, or run calibrate_activations on it"
            )
        quantized = recipe.weight is not None
        return LayerSpec(
            weight=recipe.weight,
            weight_offset=self._offset() if quantized else 0,
            weight_axis=self.weight_axis if quantized else None,
            activation=None if quantizer is None else recipe.activation,
            input_offset=0 if quantizer is None else int(quantizer.offset),
            datapath=recipe.datapath,
        )

    def forward(self, x: Tensor) -> Tensor:
        """The layer's output for fake-quantized weights and input.

        Args:
            x: as for the torch layer of the same kind.
        """
        if self.input_quantizer is not None:
            x = self.input_quantizer(x)
        y = self._product(x, self._norm)
        error = self.recipe.error
        if isinstance(error, LNSFormat):
            y = quantize_backward(y, error, method=self.recipe.calibration, name=self._error_name())
        return y

    def _product(self, x: Tensor, norm: BatchNorm | None) -> Tensor:
        raw = self._weight
        if isinstance(self.recipe.gradient, LNSFormat):
            raw = quantize_backward(
                raw,
                self.recipe.gradient,
                method=self.recipe.calibration,
                per_channel=self.weight_axis is not None,
                shared=True,
                name=f"the gradient of {self._weight_name()}",
            )
        if norm is None:
            return self._operate(x, self._quantized(raw, self.training), self._bias)
        if not norm.training:
            weight, bias = fold(self, norm, raw)
            return self._operate(x, self._quantized(weight, False), bias)
        # Quantize at the scale of deployment, then undo the scale: the batch norm, which follows as its own
        # module, sees the convolution of the weights that deployment will have, up to that scale.
        scale = norm_scale(norm).detach()
        scale = torch.where(scale.abs() < _LEAST_SCALE, torch.ones_like(scale), scale)
        scale = scale.view(-1, *[1] * (self._weight.ndim - 1))
        weight = self._quantized(raw * scale, True) / scale
        return self._operate(x, weight, self._bias)

    def _error_name(self) -> str:
        return f"the error at {self.layer_name}" if self.layer_name else "the layer's error"

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        raise NotImplementedError  # pragma: no cover - every kind of layer defines it

    def _quantized(self, weight: Tensor, follow: bool) -> Tensor:
        fmt = self.recipe.weight
        if fmt is None:
            return weight
        if follow and not self._held and (self._stale or self.recipe.calibration != "lsq"):
            self._calibrate(weight)
        else:
            self._refresh_if_stale()
        return fake_quantize(weight, fmt, self.weight_offset, axis=self.weight_axis, name=self._weight_name())

    def _calibrate(self, weight: Tensor) -> None:
        fmt = self.recipe.weight
        if fmt is None:
            return
        per_channel = self.recipe.granularity == "channel"
        found = calibrate_weight(
            weight, fmt, method=self.recipe.calibration, per_channel=per_channel, name=self._weight_name()
        )
        self.weight_offset.copy_(torch.as_tensor(found))
        self._stale = False

    def _refresh_if_stale(self) -> None:
        if self._stale:
            self._calibrate(self.effective_weight())

    def _weight_name(self) -> str:
        return f"{self.layer_name}.weight" if self.layer_name else "weight"

    def _offset(self) -> Offset:
        values = self.weight_offset.detach().cpu().numpy()
        return int(values) if values.ndim == 0 else values.astype(np.int64)

    def train(self: _Layer, mode: bool = True) -> _Layer:
        """As in torch; also lets the offsets of the weights follow the weights as they are now."""
        super().train(mode)
        # a folded norm may be loaded or moved later than this layer, so only mark it
        self._stale = not self._held
        return self

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        self._refresh_if_stale()
        super()._save_to_state_dict(destination, prefix, keep_vars)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        key = prefix + "weight_offset"
        self._stale = key not in state_dict
        self._held = False
        if key in missing_keys:
            # the state of a float model: offsets follow from its weights
            missing_keys.remove(key)

    def extra_repr(self) -> str:
        weight, activation = self.recipe.weight or "float", self.recipe.activation or "float"
        folded = ", batch norm folded" if self._norm is not None else ""
        return f"{super().extra_repr()}, weight={weight}, activation={activation}{folded}"


class LNSLinear(LNSLayer, nn.Linear):
    """A linear layer on LNS words.

    Args:
        in_features, out_features, bias, device, dtype: as for ``torch.nn.Linear``.
        recipe: its formats.
        name: names it in messages.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        recipe: LayerRecipe | None = None,
        name: str = "",
        device: Any = None,
        dtype: Any = None,
    ):
        super().__init__(in_features, out_features, bias, device=device, dtype=dtype)
        self._setup(recipe or LayerRecipe(), name, None)

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.linear(x, weight, bias)


class _LNSConv(LNSLayer):
    """What convolutions of any dimension share; torch's own class comes second."""

    def __init__(self, *args: Any, recipe: LayerRecipe | None = None, name: str = "", **options: Any):
        super().__init__(*args, **options)
        self._setup(recipe or LayerRecipe(), name, None)

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        made: Tensor = cast(Any, self)._conv_forward(x, weight, bias)
        return made


class LNSConv1d(_LNSConv, nn.Conv1d):
    """A one-dimensional convolution on LNS words; see :class:`LNSConv2d`."""


class LNSConv2d(_LNSConv, nn.Conv2d):
    """A two-dimensional convolution on LNS words.

    Args:
        args, options: as for ``torch.nn.Conv2d``.
        recipe: its formats.
        name: names it in messages.
    """


class LNSConv3d(_LNSConv, nn.Conv3d):
    """A three-dimensional convolution on LNS words; see :class:`LNSConv2d`."""


class LNSEmbedding(LNSLayer, nn.Embedding):
    """A table of vectors whose entries are LNS words.

    Args:
        args, options: as for ``torch.nn.Embedding``; gradients must be dense.
        recipe: its formats; only those of weights, gradients and errors count.
        name: names it in messages.
    """

    _takes_numbers = False

    def __init__(self, *args: Any, recipe: LayerRecipe | None = None, name: str = "", **options: Any):
        super().__init__(*args, **options)
        self._setup(recipe or LayerRecipe(), name, None)

    def _operate(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return functional.embedding(
            x, weight, self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse
        )


class Matmul(nn.Module):
    """A product of two activations, as in attention, as a module of its own.

    ``torch.matmul`` leaves nothing behind that :func:`prepare_` could convert; this does, and becomes a
    :class:`LNSMatmul`.
    """

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a[…, m, k]·b[…, k, n]."""
        return torch.matmul(a, b)


class LNSMatmul(Matmul):
    """A product of two activations on LNS words: both have the format of activations, each its offset.

    Args:
        recipe: its formats.
        name: names it in messages.
    """

    left_quantizer: ActivationQuantizer | None
    right_quantizer: ActivationQuantizer | None

    def __init__(self, *, recipe: LayerRecipe | None = None, name: str = ""):
        super().__init__()
        self._setup(recipe or LayerRecipe(), name)

    def _setup(self, recipe: LayerRecipe, name: str) -> None:
        self.recipe, self.layer_name = recipe, name
        for side in ("left", "right"):
            made = None
            if recipe.activation is not None:
                made = _activation_quantizer(recipe, f"the {side} operand of {name or 'a product'}")
                made.train(self.training)
            setattr(self, f"{side}_quantizer", made)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        """a[…, m, k]·b[…, k, n] of fake-quantized operands."""
        if self.left_quantizer is not None:
            a = self.left_quantizer(a)
        if self.right_quantizer is not None:
            b = self.right_quantizer(b)
        y = super().forward(a, b)
        error = self.recipe.error
        if isinstance(error, LNSFormat):
            name = f"the error at {self.layer_name or 'a product'}"
            y = quantize_backward(y, error, method=self.recipe.calibration, name=name)
        return y

    def extra_repr(self) -> str:
        return f"activation={self.recipe.activation or 'float'}"


def _activation_quantizer(recipe: LayerRecipe, name: str) -> ActivationQuantizer:
    assert recipe.activation is not None
    return ActivationQuantizer(recipe.activation, recipe.calibration, name=name)


class _WithNorm(LNSLayer):
    """A layer whose following batch norm is folded into its words."""

    def __init__(self, *args: Any, norm: BatchNorm, **options: Any):
        super().__init__(*args, **options)
        why = _foldable(self, norm)
        if why is not None:
            raise BadValueError(f"norm: {why}")
        self._setup(self.recipe, self.layer_name, norm)


class LNSLinearBn(_WithNorm, LNSLinear):
    """A linear layer whose following batch norm is folded into its words; see :class:`LNSConvBn2d`."""


class LNSConvBn1d(_WithNorm, LNSConv1d):
    """A one-dimensional convolution with a folded batch norm; see :class:`LNSConvBn2d`."""


class LNSConvBn2d(_WithNorm, LNSConv2d):
    """A convolution whose following batch norm is folded into its words.

    In training the weights are quantized at the scale that the norm's running statistics give them, and the
    norm (a :class:`FoldedBatchNorm2d`, a module of its own) normalises with the batch's statistics. In eval
    mode the words of the folded weights are used, and the norm does nothing. Which of both depends on
    the norm's own mode, so that a norm frozen with ``norm.eval()`` trains folded.

    Args:
        args, options: as for :class:`LNSConv2d`.
        norm: the batch norm that takes this layer's output, and nothing else does. It is not a child of
            this module: register it where the model calls it.
    """


class LNSConvBn3d(_WithNorm, LNSConv3d):
    """A three-dimensional convolution with a folded batch norm; see :class:`LNSConvBn2d`."""


class _Folded(nn.modules.batchnorm._BatchNorm):
    def forward(self, x: Tensor) -> Tensor:
        """The normalised batch in training, `x` itself in eval mode."""
        return super().forward(x) if self.training else x


class FoldedBatchNorm1d(_Folded, nn.BatchNorm1d):
    """A batch norm that is folded into the layer before it: in eval mode it does nothing."""


class FoldedBatchNorm2d(_Folded, nn.BatchNorm2d):
    """A batch norm that is folded into the layer before it: in eval mode it does nothing."""


class FoldedBatchNorm3d(_Folded, nn.BatchNorm3d):
    """A batch norm that is folded into the layer before it: in eval mode it does nothing."""


_FOLDED = (FoldedBatchNorm1d, FoldedBatchNorm2d, FoldedBatchNorm3d)


def _foldable(layer: nn.Module, norm: nn.Module) -> str | None:
    """Why a batch norm cannot be folded into the layer before it; None if it can."""
    if isinstance(layer, nn.Linear):
        fits, channels = isinstance(norm, nn.BatchNorm1d), layer.out_features
    elif isinstance(layer, nn.modules.conv._ConvNd):
        kind = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)[len(layer.kernel_size) - 1]
        fits, channels = isinstance(norm, kind), layer.out_channels
    else:
        fits, channels = False, 0
    if not fits or not isinstance(norm, BatchNorm):
        return f"a {type(norm).__name__} does not belong to a {type(layer).__name__}"
    if norm.num_features != channels:
        return f"{channels} output channels, but a norm of {norm.num_features}"
    if norm.running_mean is None or norm.running_var is None:
        return "the norm keeps no running statistics"
    return None


def norm_scale(norm: BatchNorm) -> Tensor:
    """γ/√(σ² + ε) of a batch norm's running statistics, [channels]."""
    variance = cast(Tensor, norm.running_var)
    scale = torch.rsqrt(variance + norm.eps)
    return scale if norm.weight is None else norm.weight * scale


def fold(layer: nn.Module, norm: BatchNorm, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Weight and bias of a layer with the batch norm after it folded in.

    y = scale·(w·x + b − μ) + β = (scale·w)·x + (β + (b − μ)·scale), in the weights' dtype. Everything that
    deploys or evaluates a folded layer calls this function, so that all encode the same numbers.

    Args:
        layer: with `weight` [channels, …] and `bias` [channels] or None.
        norm: with running statistics.
        weight: instead of the layer's own.
    """
    weight = cast(Tensor, layer.weight) if weight is None else weight
    bias = cast("Tensor | None", layer.bias)
    scale = norm_scale(norm)
    mean = cast(Tensor, norm.running_mean)
    shift = (-mean if bias is None else bias - mean) * scale
    folded = weight * scale.view(-1, *[1] * (weight.ndim - 1))
    return folded, shift if norm.bias is None else norm.bias + shift


# ---------------------------------------------------------------------------------------------------
# Which batch norm follows which layer


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, (LNSLayer, Matmul, ActivationQuantizer, *_FOLDED)) or super().is_leaf_module(
            m, module_qualified_name
        )


@dataclass
class _Pairs:
    """Layer and norm modules that follow each other, and the modules that could not be traced."""

    found: list[tuple[nn.Module, BatchNorm]]
    untraced: dict[str, str]


def _is_layer(module: nn.Module) -> bool:
    return isinstance(module, (LNSLayer, Matmul)) or type(module) in _KINDS


def _is_norm(module: nn.Module) -> bool:
    return type(module) in _NORMS


def _find_pairs(model: nn.Module) -> _Pairs:
    pairs = _Pairs([], {})
    if any(_is_norm(m) for m in model.modules()):
        _trace_pairs(model, "", pairs)
    return pairs


def _trace_pairs(module: nn.Module, prefix: str, pairs: _Pairs) -> None:
    try:
        graph = _Tracer().trace(module)
    except Exception as error:  # a model's forward may raise anything when it meets a proxy
        if any(_is_norm(child) for child in module.children()):
            pairs.untraced[prefix] = f"{type(error).__name__}: {error}"
        for name, child in module.named_children():
            if any(_is_norm(m) for m in child.modules()) and not _is_norm(child):
                _trace_pairs(child, f"{prefix}.{name}" if prefix else name, pairs)
        return
    calls: dict[nn.Module, int] = {}
    called = {node: module.get_submodule(str(node.target)) for node in graph.nodes if node.op == "call_module"}
    for submodule in called.values():
        calls[submodule] = calls.get(submodule, 0) + 1
    for node, norm in called.items():
        source = node.args[0] if node.args else None
        if not _is_norm(norm) or not isinstance(source, fx.Node) or source not in called:
            continue
        layer = called[source]
        alone = len(source.users) == 1 and calls[layer] == 1 and calls[norm] == 1
        if alone and _is_layer(layer) and _foldable(layer, norm) is None:
            pairs.found.append((layer, cast(BatchNorm, norm)))


# ---------------------------------------------------------------------------------------------------
# Conversion


# Of torch's layers: without, and with a batch norm that follows.
_KINDS: dict[type[nn.Module], tuple[type[LNSLayer], type[LNSLayer]]] = {
    nn.Linear: (LNSLinear, LNSLinearBn),
    nn.Conv1d: (LNSConv1d, LNSConvBn1d),
    nn.Conv2d: (LNSConv2d, LNSConvBn2d),
    nn.Conv3d: (LNSConv3d, LNSConvBn3d),
    # no norm may follow an embedding
    nn.Embedding: (LNSEmbedding, LNSEmbedding),
}
_NORMS: dict[type[nn.Module], type[_Folded]] = {
    nn.BatchNorm1d: FoldedBatchNorm1d,
    nn.BatchNorm2d: FoldedBatchNorm2d,
    nn.BatchNorm3d: FoldedBatchNorm3d,
}
# They multiply and accumulate, but have no LNS layer: worth a word.
_LEFT_IN_FLOAT = (nn.modules.conv._ConvNd, nn.Linear, nn.Bilinear, nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention)


def prepare_(model: nn.Module, recipe: Recipe | None = None) -> nn.Module:
    """Convert a torch model in place, so that it trains and runs on the words of a recipe.

    Every ``nn.Linear``, ``nn.Conv1d`` to ``nn.Conv3d`` and ``nn.Embedding`` becomes an :class:`LNSLinear`,
    :class:`LNSConv2d` and so on with the same parameters under the same name, every :class:`Matmul` an
    :class:`LNSMatmul`. Errors and gradients are rounded where the recipe names formats for them. A batch norm that
    takes the output of such a layer, and nothing else does (found by symbolic tracing), is folded. State dicts of the
    float model still load. Layers that
    the recipe leaves wholly in float are not touched. A second call with the same recipe changes nothing;
    with another recipe it changes the formats, and calibration begins anew.

    Args:
        model: any module. Where it is itself a layer, use the returned one.
        recipe: formats by layer name; 8:8 for everything by default.
    Returns: `model`.

    Raises:
        UnknownNameError: a pattern of the recipe matches no layer, or a datapath is unknown.
        BadTypeError: `model` is not a module, or `recipe` not a recipe.

    Warns:
        PrepareWarning: a layer has no LNS form and stays in float, or a part of the model cannot be traced, so
            that its batch norms stay unfused.
    """
    recipe = Recipe() if recipe is None else recipe
    if not isinstance(model, nn.Module):
        raise BadTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(recipe, Recipe):
        raise BadTypeError(f"recipe must be a Recipe, not {type(recipe).__name__}")
    names = {module: name for name, module in model.named_modules() if _is_layer(module)}
    recipe.check_patterns(names.values())
    chosen = {module: _chosen(recipe, module, name, list(names.values())) for module, name in names.items()}
    for layer_recipe in chosen.values():
        if layer_recipe.datapath is not None:
            load_datapath(layer_recipe.datapath)
    pairs = _find_pairs(model)
    norms: dict[nn.Module, BatchNorm] = {layer: norm for layer, norm in pairs.found if not _in_float(chosen[layer])}
    replaced: dict[nn.Module, nn.Module] = {}
    for layer, layer_recipe in chosen.items():
        if isinstance(layer, (LNSLayer, LNSMatmul)):
            if layer.recipe == layer_recipe:
                continue
            if isinstance(layer, LNSMatmul):
                layer._setup(layer_recipe, layer.layer_name)
            else:
                layer._setup(layer_recipe, layer.layer_name, layer.norm)
        elif isinstance(layer, Matmul):
            if not _in_float(layer_recipe):
                product = LNSMatmul(recipe=layer_recipe, name=names[layer])
                replaced[layer] = product.train(layer.training)
        elif not _in_float(layer_recipe):
            norm = norms.get(layer)
            if norm is not None:
                plain_norm = norm
                norm = cast(BatchNorm, _recast(norm, _NORMS[type(norm)]))
                replaced[plain_norm] = norm
            made = _recast(layer, _KINDS[type(layer)][norm is not None])
            made._setup(layer_recipe, names[layer], norm)
            replaced[layer] = made
    model = _replace(model, replaced)
    _warn_about(model, recipe, pairs)
    return model


def _in_float(recipe: LayerRecipe) -> bool:
    """Whether training leaves the layer as it is, in both passes."""
    return recipe.is_float and not any(isinstance(f, LNSFormat) for f in (recipe.error, recipe.gradient))


def _chosen(recipe: Recipe, module: nn.Module, name: str, names: list[str]) -> LayerRecipe:
    kind = "conv"
    for found, of in (("linear", nn.Linear), ("matmul", Matmul), ("embedding", nn.Embedding)):
        if isinstance(module, of):
            kind = found
    return recipe.for_layer(name, (kind, _class_name(module)), recipe.positions(name, names))


def _class_name(module: nn.Module) -> str:
    """The class a user wrote: that of the layer before its conversion."""
    for kind in _KINDS:
        if isinstance(module, kind):
            return kind.__name__
    return type(module).__name__


def _recast(module: nn.Module, kind: type[_Module]) -> _Module:
    """A module of another class with the same parameters, buffers, hooks and attributes."""
    made = kind.__new__(kind)
    made.__dict__ = dict(module.__dict__)
    # the dictionaries of names must be its own, the parameters in them are shared
    for key in ("_parameters", "_buffers", "_modules"):
        made.__dict__[key] = dict(module.__dict__[key])
    return made


def _replace(model: nn.Module, replaced: Mapping[nn.Module, nn.Module]) -> nn.Module:
    if model in replaced:
        return replaced[model]
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if child is not None and child in replaced:
                parent._modules[name] = replaced[child]
    return model


def _warn_about(model: nn.Module, recipe: Recipe, pairs: _Pairs) -> None:
    names = [name for name, module in model.named_modules() if _is_layer(module)]
    left = [
        f"{name} ({type(module).__name__})"
        for name, module in model.named_modules()
        if not isinstance(module, LNSLayer)
        and isinstance(module, _LEFT_IN_FLOAT)
        and not (_is_layer(module) and _in_float(_chosen(recipe, module, name, names)))
    ]
    if left:
        warnings.warn(f"no LNS form, left in float: {', '.join(left)}", PrepareWarning, stacklevel=3)
    for name, why in pairs.untraced.items():
        warnings.warn(
            f"{name or 'the model'} ({type(model.get_submodule(name)).__name__}) cannot be traced by torch.fx "
            f"({why.splitlines()[0]}), so the batch norms in it are not folded in training; lowering folds them, and "
            "calibrates those weights anew. Put layer and norm into an nn.Sequential to have them folded",
            PrepareWarning,
            stacklevel=3,
        )


def lns_layers(model: nn.Module) -> Iterator[tuple[str, LNSLayer]]:
    """Names and LNS layers of a model."""
    for name, module in model.named_modules():
        if isinstance(module, LNSLayer):
            yield name, module


@contextmanager
def _observing(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    for module in model.modules():
        if isinstance(module, ActivationQuantizer):
            module.train(True)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def calibrate_activations(model: nn.Module, batches: Iterable[Tensor | npt.NDArray[np.float32]]) -> nn.Module:
    """Calibrate the inputs of all layers without training: for a prepared model with trained weights.

    Args:
        model: prepared; nothing but the activations' offsets changes.
        batches: real inputs, each as the model takes it.
    Returns: `model`.

    Raises:
        BadValueError: no batch, or NaN in one.
    """
    count = 0
    with _observing(model), torch.no_grad():
        for batch in batches:
            model(torch.as_tensor(batch))
            count += 1
    if not count:
        raise BadValueError("calibration needs at least one batch")
    return model


# ---------------------------------------------------------------------------------------------------
# Deployment


def deployable(model: nn.Module) -> tuple[nn.Module, dict[str, LayerSpec]]:
    """A plain float copy of a model, with how its layers were trained.

    In the copy every LNS layer is an ``nn.Linear`` or ``nn.Conv2d`` of the same name with the batch norm
    folded in, and a folded norm is an ``nn.Identity``. Encoding the copy's weights with a spec's offset
    gives the words of the layer's eval forward, bit for bit. In models without LNS layers batch norms are
    folded all the same, and there are no specs.

    Args:
        model: prepared or not; it is not changed.
    Returns: the copy in eval mode, and specs by layer name. A layer of a part that could not be traced has
        a spec without weight format where one of the part's batch norms may follow it.

    Raises:
        BadValueError: a layer's input has never been calibrated.
    """
    plain = copy.deepcopy(model).eval()
    specs = {name: layer.spec() for name, layer in lns_layers(plain)}
    fused = {name for name, layer in lns_layers(plain) if layer.norm is not None}
    replaced: dict[nn.Module, nn.Module] = {}
    with torch.no_grad():
        for product in plain.modules():
            if isinstance(product, LNSMatmul):
                replaced[product] = Matmul()
        for _, layer in lns_layers(plain):
            replaced[layer] = _plain_layer(layer, layer.effective_weight(), layer.effective_bias())
            if layer.norm is not None:
                replaced[layer.norm] = nn.Identity()
        plain = _replace(plain, replaced)
        pairs = _find_pairs(plain)
        names = {module: name for name, module in plain.named_modules()}
        folded: dict[nn.Module, nn.Module] = {}
        for plain_layer, norm in pairs.found:
            if names[plain_layer] in specs:
                # built by hand without its norm: lowering folds, and so chooses the offsets
                specs[names[plain_layer]] = _without_weight(specs[names[plain_layer]])
                continue
            folded[plain_layer] = _plain_layer(plain_layer, *fold(plain_layer, norm))
            folded[norm] = nn.Identity()
        plain = _replace(plain, folded)
    _distrust(plain, specs, fused, pairs)
    plain.eval()
    for parameter in plain.parameters():
        parameter.requires_grad_(False)
    return plain, specs


def _plain_layer(layer: nn.Module, weight: Tensor, bias: Tensor | None) -> nn.Module:
    kind = next(kind for kind in _KINDS if isinstance(layer, kind))
    made = _recast(layer, kind)
    for attribute in ("recipe", "layer_name", "_norm", "_stale", "_held"):
        made.__dict__.pop(attribute, None)
    made._buffers.pop("weight_offset", None)
    made._modules.pop("input_quantizer", None)
    made._parameters["weight"] = nn.Parameter(weight.detach().clone())
    if bias is not None:
        made._parameters["bias"] = nn.Parameter(bias.detach().clone())
    return made


def _distrust(plain: nn.Module, specs: dict[str, LayerSpec], fused: set[str], pairs: _Pairs) -> None:
    """Drop weight offsets where lowering may fold a batch norm that training did not."""
    for prefix in pairs.untraced:
        part = plain.get_submodule(prefix)
        widths = {module.num_features for module in part.children() if isinstance(module, BatchNorm)}
        for name, module in part.named_modules(prefix=prefix):
            if name in specs and name not in fused and cast(Tensor, module.weight).shape[0] in widths:
                specs[name] = _without_weight(specs[name])


def _without_weight(spec: LayerSpec) -> LayerSpec:
    return replace(spec, weight=None, weight_offset=0, weight_axis=None)
