"""Fake quantization, LNS layers, conversion of models and back: compared as words with lnsdeploy.formats."""

from __future__ import annotations

import copy
import importlib
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from lnsdeploy.emulator import native
from lnsdeploy.errors import BadTypeError, BadValueError, UnknownNameError
from lnsdeploy.formats import LNSFormat, calibrate, decode, encode, offset_for
from lnsdeploy.recipe import LayerRecipe, Recipe
from lnsdeploy.training.fake_quantize import ActivationQuantizer, calibrate_weight, fake_quantize, offsets_for
from lnsdeploy.training.layers import (
    FoldedBatchNorm2d,
    LNSConv2d,
    LNSConvBn2d,
    LNSLinear,
    LNSLinearBn,
    PrepareWarning,
    calibrate_activations,
    deployable,
    fold,
    lns_layers,
    prepare_,
)
from lnsdeploy.training.models import build_model

torch.set_num_threads(1)
# the package has a function of the same name
quantizing = importlib.import_module("lnsdeploy.training.fake_quantize")

FORMATS = ["2:1", "3:1", "4:2", "5:3", "8:8", "u8:8", "8:7", "u3:2", "9:256", "12:64", "16:2048", "20:512", "24:1"]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=generator(seed))


def bits(x: Tensor) -> Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int64 if x.dtype == torch.float64 else torch.int16)


def hard_values(fmt: LNSFormat, offset: int) -> Tensor:
    """Values of codes, the bounds between them and their neighbours, and what else may go wrong."""
    codes = np.unique(np.linspace(1, fmt.max_code, 200).astype(np.int64))
    exponents = np.concatenate([codes, codes - 0.5, codes + 0.5]) + offset
    middle = np.exp2(np.clip(exponents / fmt.gamma, -149, 127)).astype(np.float32)
    near = [middle]
    for _ in range(2):
        near += [np.nextafter(near[-1], np.float32(np.inf)), np.nextafter(near[0], np.float32(0))]
    special = np.array([0.0, 1e-45, 1e-40, 1.1754944e-38, 1.0, 3.4028235e38, np.inf], dtype=np.float32)
    all_values = np.concatenate([*near, special])
    return torch.from_numpy(np.concatenate([all_values, -all_values]))


@pytest.mark.parametrize("underflow", ["zero", "min"])
@pytest.mark.parametrize("text", FORMATS)
def test_fake_quantize_is_decode_of_encode(text: str, underflow: str) -> None:
    fmt = LNSFormat.parse(text)
    for offset in (-fmt.max_code, -fmt.max_code // 2, 3, -140 * fmt.gamma, 120 * fmt.gamma):
        x = hard_values(fmt, offset)
        words = encode(x, fmt, offset, underflow=underflow, negative="clip")  # type: ignore[arg-type]
        got = fake_quantize(x, fmt, offset, underflow=underflow)  # type: ignore[arg-type]
        assert torch.equal(bits(got), bits(decode(words, fmt, offset)))


@pytest.mark.parametrize("text", ["4:2", "8:8", "u8:8", "16:2048", "20:8"])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_fake_quantize_by_channel(text: str, axis: int) -> None:
    fmt = LNSFormat.parse(text)
    x = normal(5, 6, 7).transpose(0, 1) * torch.exp2(torch.arange(6.0))[:, None, None]
    assert not x.is_contiguous()
    offsets = calibrate(x.abs(), fmt, axis=axis) - 2
    words = encode(x, fmt, offsets, axis=axis, negative="clip")
    expected = decode(words, fmt, offsets, axis=axis)
    for given in (offsets, torch.from_numpy(offsets)):
        assert torch.equal(bits(fake_quantize(x, fmt, given, axis=axis)), bits(expected))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_fake_quantize_keeps_the_dtype(dtype: torch.dtype) -> None:
    fmt, x = LNSFormat(8, 8), normal(300).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    expected = decode(encode(x, fmt, -120), fmt, -120, wide).to(dtype)
    got = fake_quantize(x, fmt, -120)
    assert got.dtype == dtype
    assert torch.equal(bits(got), bits(expected))


def test_fake_quantize_of_nothing() -> None:
    assert fake_quantize(torch.zeros(0, 3), LNSFormat(8, 8), 0).shape == (0, 3)


@pytest.mark.parametrize("text", ["4:2", "20:2"])
def test_straight_through_gradient(text: str) -> None:
    fmt = LNSFormat.parse(text)
    # o places the largest value at 1; its bound is half a code above, 2^(1/4)
    offset = -fmt.max_code
    bound = np.float32(2**0.25)
    inside, outside = np.nextafter(bound, np.float32(0)), np.nextafter(bound, np.float32(2))
    x = torch.tensor([1e-9, 0.3, -1.0, float(inside), float(outside), -5.0], requires_grad=True)
    upstream = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])
    fake_quantize(x, fmt, offset).backward(upstream)
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3, 4, 5, 6]
    x.grad = None
    fake_quantize(x, fmt, offset, saturated="zero").backward(upstream)
    assert x.grad is not None
    assert x.grad.tolist() == [1, 2, 3, 4, 0, 0]


def test_fake_quantize_refuses() -> None:
    fmt, x = LNSFormat(8, 8), torch.ones(2, 3)
    with pytest.raises(BadValueError, match="hidden contains NaN"):
        fake_quantize(torch.tensor([1.0, np.nan]), fmt, 0, name="hidden")
    with pytest.raises(BadTypeError, match=r"floating-point tensor is needed, not torch\.int64"):
        fake_quantize(torch.ones(3, dtype=torch.int64), fmt, 0)
    with pytest.raises(BadTypeError, match="floating-point tensor is needed, not list"):
        fake_quantize([1.0], fmt, 0)  # type: ignore[arg-type]
    with pytest.raises(BadTypeError, match=r"offsets are integers, not torch\.float32"):
        fake_quantize(x, fmt, torch.zeros(2), axis=0)
    with pytest.raises(BadTypeError, match="offsets are integers, not float"):
        fake_quantize(x, fmt, 1.5)  # type: ignore[arg-type]
    with pytest.raises(BadValueError, match="name the channel axis"):
        fake_quantize(x, fmt, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(BadValueError, match=r"offsets of shape \(2,\) do not fit axis 1"):
        fake_quantize(x, fmt, torch.zeros(2, dtype=torch.int64), axis=1)
    with pytest.raises(UnknownNameError, match="gradient rule 'clip'"):
        fake_quantize(x, fmt, 0, saturated="clip")  # type: ignore[arg-type]
    with pytest.raises(UnknownNameError, match="underflow rule 'none'"):
        fake_quantize(x, fmt, 0, underflow="none")  # type: ignore[arg-type]


# ---------------------------------------------------------------------------------------------------
# Offsets


@pytest.mark.parametrize("text", ["4:2", "8:8", "8:7", "16:2048", "20:4096"])
def test_offsets_for_is_exact(text: str) -> None:
    fmt = LNSFormat.parse(text)
    powers = np.exp2(np.arange(-140, 127, 7.0))
    near = np.exp2(np.arange(-40, 40) / fmt.gamma)
    maxima = np.concatenate([[0.0], powers, near, np.abs(normal(200).numpy())]).astype(np.float32)
    maxima = np.concatenate([maxima, np.nextafter(maxima, np.float32(np.inf)), np.nextafter(maxima, np.float32(0))])
    assert offsets_for(maxima, fmt).tolist() == [offset_for(float(m), fmt) for m in maxima]
    with pytest.raises(BadValueError, match="finite"):
        offsets_for(np.array([1.0, np.nan]), fmt)


@pytest.mark.parametrize("method", ["absmax", "percentile", "lsq"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16])
def test_calibrate_weight_is_calibrate(method: str, dtype: torch.dtype) -> None:
    fmt = LNSFormat(6, 4)
    x = (normal(7, 3, 500) ** 3).to(dtype)
    x[2] = 0
    options = {"method": method, "percentile": 99.9}
    per_channel = calibrate_weight(x, fmt, method=method, per_channel=True)  # type: ignore[arg-type]
    assert np.array_equal(per_channel, calibrate(x, fmt, axis=0, **options))  # type: ignore[arg-type]
    single = calibrate_weight(x, fmt, method=method, per_channel=False)  # type: ignore[arg-type]
    assert single == calibrate(x, fmt, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("method", ["absmax", "percentile", "lsq"])
def test_calibrate_weight_refuses_nan(method: str) -> None:
    with pytest.raises(BadValueError, match="w contains NaN or infinity"):
        calibrate_weight(torch.tensor([[1.0, np.nan]]), LNSFormat(8, 8), method=method, per_channel=True, name="w")  # type: ignore[arg-type]


def test_running_absolute_maximum() -> None:
    fmt = LNSFormat(8, 8)
    quantizer = ActivationQuantizer(fmt, decay=0.75)
    seen = []
    for largest in (2.0, 8.0, 4.0, 0.0):
        quantizer(torch.tensor([0.5 * largest, -largest]))
        seen.append(float(quantizer.maximum))
        assert int(quantizer.offset) == offset_for(seen[-1], fmt)
    # up at once, down by 1/4 of the distance
    assert seen == [2.0, 8.0, 7.0, 5.25]


@pytest.mark.parametrize("method", ["percentile", "lsq"])
def test_running_average(method: str) -> None:
    fmt = LNSFormat(5, 4)
    quantizer = ActivationQuantizer(fmt, method, decay=0.5)  # type: ignore[arg-type]
    first, second = normal(3000), 9 * normal(3000, seed=1)
    quantizer(first)
    assert int(quantizer.offset) == calibrate(first, fmt, method=method, percentile=99.9)  # type: ignore[arg-type]
    before = float(quantizer.maximum)
    quantizer(second)
    alone = ActivationQuantizer(fmt, method)  # type: ignore[arg-type]
    alone(second)
    assert float(quantizer.maximum) == pytest.approx(0.5 * before + 0.5 * float(alone.maximum), rel=1e-6)


def test_observer_is_frozen_in_eval_and_kept_in_the_state() -> None:
    quantizer = ActivationQuantizer(LNSFormat(8, 8))
    with pytest.raises(BadValueError, match="has never been calibrated"):
        quantizer.eval()(torch.ones(3))
    quantizer.train()(torch.ones(3))
    state = copy.deepcopy(quantizer.state_dict())
    quantizer.eval()(100 * torch.ones(3))
    assert all(torch.equal(state[k], v) for k, v in quantizer.state_dict().items())
    other = ActivationQuantizer(LNSFormat(8, 8))
    other.load_state_dict(state)
    x = normal(100)
    assert torch.equal(other.eval()(x), quantizer(x))
    assert state["offset"].dtype == torch.int64


@pytest.mark.parametrize("method", ["absmax", "percentile", "lsq"])
def test_observer_refuses_nan_and_takes_zeros(method: str) -> None:
    quantizer = ActivationQuantizer(LNSFormat(8, 8), method, name="the input of x")  # type: ignore[arg-type]
    for bad in (np.nan, np.inf):
        with pytest.raises(BadValueError, match="the input of x contains NaN or infinity"):
            quantizer(torch.tensor([1.0, bad]))
    assert not quantizer.calibrated
    assert not quantizer(torch.zeros(4)).any()
    assert quantizer.calibrated


# ---------------------------------------------------------------------------------------------------
# Layers


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("calibration", ["absmax", "percentile", "lsq"])
def test_linear(granularity: str, calibration: str) -> None:
    recipe = LayerRecipe(LNSFormat(5, 2), LNSFormat(6, 4), granularity, calibration)  # type: ignore[arg-type]
    layer = LNSLinear(9, 4, recipe=recipe, name="fc")
    x = normal(8, 9)
    y = layer(x)
    axis = 0 if granularity == "channel" else None
    offset = calibrate(layer.weight, recipe.weight, method=calibration, axis=axis)  # type: ignore[arg-type]
    weight = decode(encode(layer.weight, recipe.weight, offset, axis=axis), recipe.weight, offset, axis=axis)  # type: ignore[arg-type]
    given = calibrate(x, recipe.activation, method=calibration)  # type: ignore[arg-type]
    inputs = decode(encode(x, recipe.activation, given), recipe.activation, given)  # type: ignore[arg-type]
    assert torch.equal(y, functional.linear(inputs, weight, layer.bias))
    spec = layer.eval().spec()
    assert np.array_equal(spec.weight_offset, offset)
    assert (spec.input_offset, spec.weight_axis) == (given, axis)
    assert torch.equal(torch.from_numpy(layer.weight_words().decode()), weight)


@pytest.mark.smoke
def test_gradients_reach_weights_and_inputs() -> None:
    layer = LNSLinear(3, 2, recipe=LayerRecipe(LNSFormat(4, 2), LNSFormat(4, 2)))
    x = normal(5, 3).requires_grad_()
    layer(x).sum().backward()
    quantizer = layer.input_quantizer
    assert quantizer is not None
    inputs = quantizer.eval()(x).detach()
    weight = torch.from_numpy(layer.weight_words().decode())
    assert layer.weight.grad is not None
    assert x.grad is not None
    # d/dw of Σ y is Σ x̂, d/dx is Σ ŵ: of the quantized values, straight through
    assert torch.allclose(layer.weight.grad, inputs.sum(0).expand(2, 3))
    assert torch.allclose(x.grad, weight.sum(0).expand(5, 3))


def test_convolution_options() -> None:
    recipe = LayerRecipe(LNSFormat(8, 8), None)
    layer = LNSConv2d(4, 6, 3, stride=2, padding=2, dilation=2, groups=2, recipe=recipe)
    x = normal(2, 4, 9, 9)
    weight = torch.from_numpy(layer.weight_words().decode())
    expected = functional.conv2d(x, weight, layer.bias, 2, 2, 2, 2)
    assert torch.equal(layer(x), expected)
    assert layer.input_quantizer is None


def test_float_weights_have_no_words() -> None:
    layer = LNSLinear(3, 2, recipe=LayerRecipe(None, LNSFormat(8, 8)), name="fc")
    with pytest.raises(BadValueError, match="'fc' has float weights"):
        layer.weight_words()
    assert "weight_offset" not in layer.state_dict()
    layer(torch.ones(1, 3))
    assert layer.spec().weight is None


def conv_bn(recipe: LayerRecipe, bias: bool = True, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1, bias=bias), nn.BatchNorm2d(5), nn.ReLU())
    norm = model[1]
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, -0.5, 2.0, 0.3, 1.5]))
        norm.bias.copy_(torch.tensor([0.1, 0.2, -0.3, 0.0, 1.0]))
        norm.running_mean.copy_(normal(5, seed=3))
        norm.running_var.copy_(normal(5, seed=4) ** 2 + 0.1)
    prepared = prepare_(model, Recipe(recipe))
    assert isinstance(prepared, nn.Sequential)
    return prepared


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("granularity", ["channel", "tensor"])
def test_batch_norm_in_training_by_hand(granularity: str, bias: bool) -> None:
    fmt = LNSFormat(6, 4)
    model = conv_bn(LayerRecipe(fmt, fmt, granularity), bias)  # type: ignore[arg-type]
    layer, norm = model[0], model[1]
    x = normal(4, 3, 6, 6)
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    spread = scale.detach().view(-1, 1, 1, 1)
    axis = 0 if granularity == "channel" else None
    offset = calibrate(layer.weight * spread, fmt, axis=axis)
    weight = decode(encode(layer.weight * spread, fmt, offset, axis=axis), fmt, offset, axis=axis) / spread
    given = calibrate(x, fmt)
    inputs = decode(encode(x, fmt, given), fmt, given)
    raw = functional.conv2d(inputs, weight, layer.bias, padding=1)
    expected = functional.batch_norm(raw, None, None, norm.weight, norm.bias, training=True, eps=norm.eps).relu()
    assert torch.allclose(model(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("granularity", ["channel", "tensor"])
@pytest.mark.parametrize("calibration", ["absmax", "percentile", "lsq"])
def test_batch_norm_in_eval_uses_the_words_of_the_folded_weights(granularity: str, calibration: str) -> None:
    fmt = LNSFormat(6, 4)
    model = conv_bn(LayerRecipe(fmt, fmt, granularity, calibration))  # type: ignore[arg-type]
    for seed in range(3):
        model(normal(4, 3, 6, 6, seed=seed))
    model.eval()
    layer, norm = model[0], model[1]
    scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
    folded = (layer.weight * scale.view(-1, 1, 1, 1)).detach()
    weight, bias = fold(layer, norm)
    assert torch.allclose(weight, folded, rtol=1e-6)
    assert torch.allclose(bias, norm.bias + (layer.bias - norm.running_mean) * scale, rtol=1e-5, atol=1e-6)
    axis = 0 if granularity == "channel" else None
    offset = calibrate(weight, fmt, axis=axis, method=calibration)  # type: ignore[arg-type]
    words = encode(weight.detach(), fmt, offset, axis=axis)
    assert np.array_equal(layer.weight_words().words, words.numpy())
    given = int(layer.input_quantizer.offset)
    x = normal(4, 3, 6, 6, seed=9)
    inputs = decode(encode(x, fmt, given), fmt, given)
    expected = functional.conv2d(inputs, decode(words, fmt, offset, axis=axis), bias, padding=1).relu()
    assert torch.equal(model(x), expected)


def test_norm_with_zero_scale_trains() -> None:
    fmt = LNSFormat(6, 4)
    model = conv_bn(LayerRecipe(fmt, fmt))
    layer, norm = model[0], model[1]
    with torch.no_grad():
        norm.weight[2] = 0
        norm.bias[2] = 0.5  # so that ReLU lets the gradient through
    model(normal(4, 3, 6, 6)).square().sum().backward()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert torch.isfinite(parameter.grad).all()
    assert norm.weight.grad[2] != 0
    model.eval()
    assert not layer.weight_words().words[2].any()


def test_frozen_norm_trains_folded() -> None:
    fmt = LNSFormat(8, 8)
    model = conv_bn(LayerRecipe(fmt, fmt))
    x = normal(4, 3, 6, 6)
    model(x)
    model[1].eval()
    before = model[1].running_mean.clone()
    y = model(x)
    assert torch.equal(before, model[1].running_mean)
    y.sum().backward()
    assert model[1].weight.grad.abs().sum() > 0
    assert torch.equal(y, model.eval()(x))


def test_linear_with_norm() -> None:
    fmt = LNSFormat(8, 8)
    norm = nn.BatchNorm1d(4)
    layer = LNSLinearBn(6, 4, norm=norm, recipe=LayerRecipe(fmt, fmt))
    x = normal(16, 6)
    for _ in range(3):
        norm(layer(x))
    layer.eval()
    norm.eval()
    weight, bias = fold(layer, norm)
    quantized = torch.from_numpy(layer.weight_words().decode())
    assert torch.equal(layer(x), functional.linear(layer.input_quantizer(x), quantized, bias))
    assert not torch.equal(weight, layer.weight)


def test_pairs_must_fit() -> None:
    with pytest.raises(BadValueError, match="4 output channels, but a norm of 5"):
        LNSConvBn2d(3, 4, 1, norm=nn.BatchNorm2d(5))
    with pytest.raises(BadValueError, match="keeps no running statistics"):
        LNSConvBn2d(3, 4, 1, norm=nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(BadValueError, match="a BatchNorm2d does not belong to a LNSLinearBn"):
        LNSLinearBn(3, 4, norm=nn.BatchNorm2d(4))  # type: ignore[arg-type]


def test_deepcopy_keeps_layer_and_norm_together() -> None:
    fmt = LNSFormat(8, 8)
    model = conv_bn(LayerRecipe(fmt, fmt))
    twin = copy.deepcopy(model)
    assert twin[0].norm is twin[1]
    assert twin[1] is not model[1]


# ---------------------------------------------------------------------------------------------------
# Conversion


class Nested(nn.Module):
    """Blocks in blocks, a shared layer, a norm after two uses of a layer, a norm before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
        self.body = nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)), "b": nn.Conv2d(4, 4, 1)})
        self.alone = nn.BatchNorm2d(4)
        self.head = nn.Linear(4, 3)
        self.again = self.head
        self.after = nn.Linear(3, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        y = self.body["b"](x)
        # used twice: cannot be folded
        x = self.alone(y) + self.body["a"](x) + y
        return self.again(self.after(self.head(x.mean((2, 3)))))


def test_prepare_keeps_names_and_parameters() -> None:
    torch.manual_seed(0)
    model = Nested()
    state = copy.deepcopy(model.state_dict())
    parameters = dict(model.named_parameters())
    assert prepare_(model) is model
    assert all(parameters[name] is p for name, p in model.named_parameters())
    assert set(state) <= set(model.state_dict())
    layers = dict(lns_layers(model))
    assert set(layers) == {"stem.0", "body.a.0", "body.b", "head", "after"}
    assert model.head is model.again
    assert isinstance(layers["stem.0"], LNSConvBn2d)
    assert layers["stem.0"].norm is model.stem[1]
    assert isinstance(model.stem[1], FoldedBatchNorm2d)
    assert isinstance(layers["body.a.0"], LNSConvBn2d)
    assert type(layers["body.b"]) is LNSConv2d
    assert type(model.alone) is nn.BatchNorm2d
    assert torch.isfinite(model(normal(2, 1, 5, 5))).all()
    # a float model's state loads, and offsets follow from its weights
    state["head.weight"] *= 16
    offset = layers["head"].spec().weight_offset
    model.load_state_dict(state)
    assert np.array_equal(layers["head"].spec().weight_offset, offset + 4 * 8)


def test_prepared_state_round_trip() -> None:
    torch.manual_seed(0)
    model, other = prepare_(Nested()), prepare_(Nested())
    for seed in range(2):
        model(normal(3, 1, 5, 5, seed=seed))
    other.load_state_dict(model.state_dict())
    x = normal(3, 1, 5, 5, seed=7)
    assert torch.equal(model.eval()(x), other.eval()(x))


def test_prepare_twice_changes_nothing() -> None:
    model = prepare_(Nested())
    model(normal(2, 1, 5, 5))
    modules = dict(model.named_modules())
    state = copy.deepcopy(model.state_dict())
    assert prepare_(model) is model
    assert all(modules[name] is m for name, m in model.named_modules())
    assert all(torch.equal(state[k], v) for k, v in model.state_dict().items())


def test_prepare_with_another_recipe_changes_formats() -> None:
    model = prepare_(Nested())
    model(normal(2, 1, 5, 5))
    prepare_(model, Recipe.uniform(4, 2))
    layers = dict(lns_layers(model))
    assert {str(layer.recipe.weight) for layer in layers.values()} == {"4:2"}
    assert not layers["head"].input_quantizer.calibrated
    assert layers["stem.0"].norm is model.stem[1]
    model(normal(2, 1, 5, 5))
    model.eval()(normal(2, 1, 5, 5))


def test_prepare_follows_the_recipe() -> None:
    recipe = Recipe(
        LayerRecipe(LNSFormat(4, 2), LNSFormat(6, 4)),
        (("body.*", LayerRecipe(None, None)), ("head", LayerRecipe(LNSFormat(8, 8), None, "tensor"))),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model = prepare_(Nested(), recipe)
    layers = dict(lns_layers(model))
    assert set(layers) == {"stem.0", "head", "after"}
    assert type(model.body["a"][1]) is nn.BatchNorm2d
    assert layers["head"].input_quantizer is None
    assert layers["head"].weight_offset.shape == ()
    assert layers["after"].weight_offset.shape == (4,)


def test_prepare_refuses() -> None:
    with pytest.raises(UnknownNameError, match="'haed'; did you mean 'head'"):
        prepare_(Nested(), Recipe(layers=(("haed", LayerRecipe()),)))
    with pytest.raises(UnknownNameError, match="unknown datapath 'lns-madam-9'; did you mean 'lns-madam-8'"):
        prepare_(Nested(), Recipe(LayerRecipe(datapath="lns-madam-9")))
    with pytest.raises(BadTypeError, match=r"must be a torch\.nn\.Module"):
        prepare_([1])  # type: ignore[arg-type]
    with pytest.raises(BadTypeError, match="recipe must be a Recipe, not dict"):
        prepare_(Nested(), {})  # type: ignore[arg-type]


def test_a_refused_model_is_unchanged() -> None:
    model = Nested()
    with pytest.raises(UnknownNameError):
        prepare_(model, Recipe(layers=(("nothing", LayerRecipe()),)))
    assert not dict(lns_layers(model))


def test_a_layer_alone() -> None:
    layer = prepare_(nn.Linear(3, 2), Recipe.uniform(4, 2))
    assert isinstance(layer, LNSLinear)
    assert layer(torch.ones(1, 3)).shape == (1, 2)


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner(x)
        if x.sum() > 1e9:
            x = -x
        return self.out(self.norm(self.conv(x)).mean((2, 3)))


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("underflow", ["zero", "min"])
def test_tensors_of_accelerators_round_alike(text: str, underflow: Any) -> None:
    """The operations that run on a GPU, on the CPU's tensors."""
    fmt = LNSFormat.parse(text)
    for offsets in ([-3], [-3, 5, 2 * fmt.gamma]):
        array = np.array(offsets, dtype=np.int64)
        limits = quantizing._limits(fmt, array.tobytes())
        if limits is None:
            assert fmt.bits > 16, "the general path serves these"
            continue
        x = torch.cat([hard_values(fmt, o) for o in offsets]).repeat(len(offsets)).view(len(offsets), -1)
        made = quantizing._round_tensor(x, fmt, limits, underflow, "x")
        expected = quantizing._round(x.numpy(), fmt, limits, underflow, "x")
        assert np.array_equal(made.numpy(), expected)
        for isa in isas():
            with native.forced_isa(isa):
                # ends that fill no vector, and rows that are tasks of their own
                for end in (x.shape[1], x.shape[1] - 3, 5, 1):
                    part = x[:, :end].contiguous()
                    made = quantizing._round_natively(part, fmt, limits, underflow, "x")
                    assert np.array_equal(made.numpy().view(np.int32), expected[:, :end]), isa
    bad = torch.tensor([[1.0, float("nan")]])
    if limits is not None and len(limits.low) == 3:
        with pytest.raises(BadValueError, match="x contains NaN"):
            quantizing._round_tensor(bad.expand(3, 2).contiguous(), fmt, limits, underflow, "x")
        if isas():
            with pytest.raises(BadValueError, match="x contains NaN"):
                quantizing._round_natively(bad.expand(3, 2).contiguous(), fmt, limits, underflow, "x")


def isas() -> list[str]:
    return [] if native.unavailable() else native.isas()


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
def test_long_tensors_are_rounded_in_pieces() -> None:
    fmt = LNSFormat(8, 8)
    for shape in ((1, 100_003), (3, 70_001), (5000, 3)):
        x = normal(*shape)
        offsets = np.full(shape[0], -100, dtype=np.int64) + np.arange(shape[0]) % 7
        limits = quantizing._limits(fmt, offsets.tobytes())
        made = quantizing._round_natively(x, fmt, limits, "zero", "x")
        assert np.array_equal(made.numpy().view(np.int32), quantizing._round(x.numpy(), fmt, limits, "zero", "x"))
        for isa in isas():
            with native.forced_isa(isa):
                assert np.array_equal(quantizing._maxima(x, shape[0]), np.abs(x.numpy()).max(axis=1))
                assert quantizing._absmax(x) == float(x.abs().max())
    turned = normal(2, 3, 4, 5).to(memory_format=torch.channels_last)
    assert quantizing._absmax(turned[:, :, 1:]) == float(turned[:, :, 1:].abs().max())
    assert np.isnan(quantizing._absmax(torch.tensor([1.0, float("nan"), float("inf")])))
    assert np.isinf(quantizing._absmax(torch.tensor([1.0, -float("inf")])))


@pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"limits": ([0], [1 << 30])}, "not within the 4 buckets"),
        ({"limits": ([5], [3])}, "not within"),
        ({"limits": ([-1], [3])}, "not within"),
        ({"limits": ([1, 1], [2, 2])}, "1 or 1 limits, not 2"),
        ({"drop": 24}, "drop must be 0 to 23"),
        ({"values": 4}, "4 values for 4 bounds"),
    ],
)
def test_limits_outside_the_grid_are_refused(change: dict[str, Any], message: str) -> None:
    x, y = torch.zeros(1, 3), torch.zeros(1, 3)
    low, high = (np.array(v, dtype=np.int32) for v in change.get("limits", ([0], [3])))
    bounds, values = np.zeros(4, dtype=np.int32), np.zeros(change.get("values", 5), dtype=np.int32)
    with pytest.raises(BadValueError, match=message):
        native.round_floats(
            x.data_ptr(),
            (1, 3),
            (change.get("drop", 0), 0, bounds, values),
            (low, high),
            y.data_ptr(),
            signed=True,
            underflow="zero",
            threads=1,
        )


def test_untraceable_parts_stay_unfused_with_a_note() -> None:
    with pytest.warns(PrepareWarning, match=r"the model \(Untraceable\) cannot be traced .* nn.Sequential"):
        model = prepare_(Untraceable())
    assert isinstance(model.inner[0], LNSConvBn2d)
    assert type(model.conv) is LNSConv2d
    assert type(model.norm) is nn.BatchNorm2d
    model(normal(2, 1, 6, 6))
    plain, specs = deployable(model)
    # its norm is folded by lowering, which therefore chooses the offsets
    assert specs["conv"].weight is None
    assert specs["conv"].activation == LNSFormat(8, 8)
    assert specs["inner.0"].weight == specs["out"].weight == LNSFormat(8, 8)
    assert isinstance(plain.norm, nn.BatchNorm2d)


def test_layers_without_lns_form_are_named() -> None:
    model = nn.Sequential(nn.ConvTranspose1d(2, 3, 1), nn.Flatten(), nn.Linear(12, 2))
    with pytest.warns(PrepareWarning, match=r"no LNS form, left in float: 0 \(ConvTranspose1d\)"):
        prepare_(model)


# ---------------------------------------------------------------------------------------------------
# Deployment


def trained_cnn(recipe: Recipe) -> nn.Module:
    model = prepare_(build_model("cnn", (1, 8, 8), 10, seed=1), recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for seed in range(4):
        optimizer.zero_grad()
        model(normal(16, 1, 8, 8, seed=seed)).square().mean().backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize(
    "layer", [LayerRecipe(), LayerRecipe(LNSFormat(4, 2), LNSFormat(5, 2), "tensor", "lsq", "lns-madam-8")]
)
def test_deployable_gives_the_words_of_the_eval_forward(layer: LayerRecipe) -> None:
    model = trained_cnn(Recipe(layer))
    x = normal(3, 1, 8, 8, seed=11)
    before = copy.deepcopy(model.state_dict())
    used: dict[str, Tensor] = {}

    def record(name: str):  # type: ignore[no-untyped-def]
        def hook(module: nn.Module, args: tuple[Tensor], output: Tensor) -> None:
            used[name] = output

        return hook

    plain, specs = deployable(model)
    assert set(specs) == {name for name, _ in lns_layers(model)}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    assert not dict(lns_layers(plain))
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    handles = [module.register_forward_hook(record(name)) for name, module in lns_layers(model)]
    inputs: dict[str, Tensor] = {}
    handles += [
        module.register_forward_pre_hook(lambda m, args, name=name: inputs.update({name: args[0]}))
        for name, module in lns_layers(model)
    ]
    model(x)
    for handle in handles:
        handle.remove()
    for name, layer_module in lns_layers(model):
        spec, mate = specs[name], plain.get_submodule(name)
        assert type(mate) in (nn.Linear, nn.Conv2d)
        assert spec.weight is not None
        assert spec.activation is not None
        words = encode(mate.weight.numpy(), spec.weight, spec.weight_offset, axis=spec.weight_axis)
        assert np.array_equal(words, layer_module.weight_words().words)
        # the layer's own output follows from these words, its input's words and the plain bias
        weight = torch.from_numpy(decode(words, spec.weight, spec.weight_offset, axis=spec.weight_axis))
        given = decode(encode(inputs[name], spec.activation, spec.input_offset), spec.activation, spec.input_offset)
        if isinstance(mate, nn.Linear):
            expected = functional.linear(given, weight, mate.bias)
        else:
            expected = functional.conv2d(given, weight, mate.bias, mate.stride, mate.padding)
        assert torch.equal(used[name], expected), name
        assert spec.datapath == layer.datapath


def test_deployable_of_a_float_model_folds_norms() -> None:
    model = build_model("cnn", (1, 8, 8), 10, seed=2)
    for seed in range(3):
        model(normal(8, 1, 8, 8, seed=seed))
    plain, specs = deployable(model)
    assert specs == {}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())
    x = normal(5, 1, 8, 8, seed=9)
    assert torch.allclose(plain(x), model.eval()(x), rtol=1e-4, atol=1e-5)
    assert set(dict(plain.named_modules())) == set(dict(model.named_modules()))
    assert not any(p.requires_grad for p in plain.parameters())


def test_deployable_folds_norms_of_float_layers_too() -> None:
    recipe = Recipe(layers=(("conv1", LayerRecipe(None, None)),))
    model = trained_cnn(recipe)
    plain, specs = deployable(model)
    assert "conv1" not in specs
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())


def test_calibrated_activations_without_training() -> None:
    model = prepare_(build_model("cnn", (1, 8, 8), 10, seed=3)).eval()
    with pytest.raises(BadValueError, match="the input of conv1 has never been calibrated"):
        deployable(model)
    means = model.norm1.running_mean.clone()
    batches = [normal(8, 1, 8, 8, seed=s) for s in range(2)]
    with pytest.raises(BadValueError, match="at least one batch"):
        calibrate_activations(model, [])
    calibrate_activations(model, batches)
    assert not any(m.training for m in model.modules())
    assert torch.equal(means, model.norm1.running_mean)
    _, specs = deployable(model)
    largest = max(float(b.abs().max()) for b in batches)
    assert specs["conv1"].input_offset == offset_for(largest, LNSFormat(8, 8))
