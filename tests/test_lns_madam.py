"""LNS-Madam: codes whose upper bits are the layers' words, and errors and gradients on words (docs/madam.md)."""

from __future__ import annotations

import copy
import io

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lnsdeploy.errors import BadTypeError, BadValueError
from lnsdeploy.formats import LNSFormat, calibrate, decode, encode
from lnsdeploy.recipe import LayerRecipe, Recipe
from lnsdeploy.training.fake_quantize import quantize_backward
from lnsdeploy.training.layers import LNSLayer, LNSMatmul, Matmul, deployable, lns_layers, prepare_
from lnsdeploy.training.madam import IntegerMadam, LNSMadam

BYTE = LNSFormat(8, 8)
GRANULARITIES = pytest.mark.parametrize("granularity", ["channel", "tensor"])


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rounded(x: Tensor, fmt: LNSFormat, axis: int | None = None) -> np.ndarray:
    """decode(encode(x)) with offsets calibrated on x, by the definitions."""
    offset = calibrate(x, fmt, axis=axis)
    return np.asarray(decode(encode(x.numpy(), fmt, offset, axis=axis), fmt, offset, np.float32, axis=axis))


def net(recipe: LayerRecipe) -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 3),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(3 * 16, 5),
    )
    return prepare_(model, Recipe(recipe))


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for seed in range(start, start + steps):
        optimizer.zero_grad()
        x, y = normal(8, 2, 6, 6, seed=seed), torch.arange(8) % 5
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()


@GRANULARITIES
@pytest.mark.parametrize("foreach", [None, False])
@pytest.mark.parametrize(("weight", "bits"), [("8:8", 16), ("4:2", 12), ("6:4", 6), ("5:3", 20)])
def test_words_of_layers_are_the_upper_bits_of_codes(
    granularity: str, foreach: bool | None, weight: str, bits: int
) -> None:
    fmt = LNSFormat.parse(weight)
    model = net(LayerRecipe(weight=fmt, granularity=granularity))
    optimizer = LNSMadam(model, 0.1, bits, foreach=foreach, seed=5)
    names = [name for name, _ in model.named_parameters()]
    found = {name: layer.weight_offset.clone() for name, layer in lns_layers(model)}
    train(model, optimizer, 6)
    order = [p for group in optimizer.param_groups for p in group["params"]]
    named = {p: n for n, p in model.named_parameters()}
    updates = dict(zip([named[p] for p in order], optimizer.lns_tensors(), strict=True))
    computed = dict(zip([named[p] for p in order], optimizer.compute_tensors(), strict=True))
    assert set(named.values()) == set(names)
    for name, layer in lns_layers(model):
        codes, words = updates[f"{name}.weight"], computed[f"{name}.weight"]
        assert codes is not None
        assert words is not None
        assert codes.format == LNSFormat(bits, fmt.gamma << (bits - fmt.bits))
        if layer.norm is not None:
            # what is computed with is weight times scale, from the whole code
            assert words.format == codes.format
            continue
        assert torch.equal(layer.weight_offset, found[name]), "the offset stands still"
        drop = bits - fmt.bits
        magnitude, negative = codes.format.split(codes.words)
        half = 1 << drop >> 1
        upper = np.clip((magnitude.astype(np.int64) + half) >> drop, 1, fmt.max_code)
        assert np.array_equal(words.words, fmt.join(upper, negative))
        mine = layer.weight_words()
        assert mine.format == words.format == fmt
        assert np.array_equal(mine.words, words.words)
        assert np.array_equal(np.asarray(mine.offset), np.asarray(words.offset))
        # the parameter is the words' values, so that rounding it does nothing
        value = decode(words.words, fmt, words.offset, np.float32, axis=words.axis)
        assert np.array_equal(layer.weight.detach().numpy(), value)
    assert any(
        not np.array_equal(a.words, b)
        for a, b in zip(
            [u for u in updates.values() if u is not None],
            [
                t.words
                for t in LNSMadam(
                    net(LayerRecipe(weight=fmt, granularity=granularity)), 0.1, bits, seed=5
                ).lns_tensors()
                if t
            ],
            strict=True,
        )
    ), "codes have moved"


def test_every_code_rounds_to_its_upper_bits() -> None:
    codes = torch.arange(1, 1 << 15, dtype=torch.int64)
    codes = torch.cat([codes, -codes]).view(2, -1)
    p = nn.Parameter(torch.ones(codes.shape))
    optimizer = IntegerMadam([p], bits=16, gamma=2048, compute_bits=8, lr=0.0)
    state = optimizer.state[p]
    state["codes"].copy_(codes)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert torch.equal(state["codes"].long(), codes)
    expected = torch.clamp((codes.abs() + 128) // 256, 1, 127) * codes.sign()
    (words,) = optimizer.compute_tensors()
    assert words is not None
    magnitude, negative = BYTE.split(words.words)
    assert np.array_equal(np.where(negative, -magnitude.astype(int), magnitude), expected.numpy())
    assert np.array_equal(p.detach().numpy(), decode(words.words, BYTE, words.offset, np.float32))


@pytest.mark.parametrize("compute_bits", [None, 6])
def test_channels_are_as_tensors_of_their_own(compute_bits: int | None) -> None:
    whole = nn.Parameter(normal(5, 7) * torch.tensor([[1.0], [0.01], [30.0], [0.2], [1.0]]))
    parts = [nn.Parameter(row.detach().clone().view(1, 7)) for row in whole]
    options = {"bits": 12, "gamma": 128, "rounding": "nearest", "lr": 0.05, "compute_bits": compute_bits}
    together = IntegerMadam([whole], per_channel=True, **options)
    apart = IntegerMadam(parts, **options)
    for seed in range(4):
        whole.grad = normal(5, 7, seed=10 + seed)
        for part, row in zip(parts, whole.grad, strict=True):
            part.grad = row.view(1, 7)
        together.step()
        apart.step()
    assert torch.equal(whole.detach(), torch.cat([p.detach() for p in parts]))
    assert together.state[whole]["offset"].tolist() == [apart.state[p]["offset"] for p in parts]
    assert len(set(together.state[whole]["offset"].tolist())) > 2


def test_a_channel_of_zeros_takes_the_scale_of_the_tensor() -> None:
    p = nn.Parameter(torch.tensor([[0.0, 0.0], [1.0, 1.0]]))
    optimizer = IntegerMadam([p], per_channel=True)
    whole = IntegerMadam([nn.Parameter(p.detach().clone())])
    ((same,),) = ([s["offset"] for s in whole.state.values()],)
    assert int(optimizer.state[p]["offset"][0]) == same


def test_a_saved_state_continues_bit_for_bit_and_holds_the_offsets() -> None:
    model = net(LayerRecipe(error=BYTE, gradient=BYTE))
    optimizer = LNSMadam(model, 0.05)
    train(model, optimizer, 3)
    stream = io.BytesIO()
    torch.save((model.state_dict(), optimizer.state_dict()), stream)
    stream.seek(0)
    other = net(LayerRecipe(error=BYTE, gradient=BYTE))
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(3.0)
    second = LNSMadam(other, 0.05)
    weights, state = torch.load(stream)
    other.load_state_dict(weights)
    second.load_state_dict(state)
    train(model, optimizer, 3, start=3)
    train(other, second, 3, start=3)
    for (name, a), b in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def test_trained_words_are_exported_words() -> None:
    model = net(LayerRecipe(error=BYTE, gradient=BYTE))
    train(model, LNSMadam(model, 0.05), 4)
    model.eval()
    plain, specs = deployable(model)
    for name, layer in lns_layers(model):
        words, spec = layer.weight_words(), specs[name]
        weight = plain.get_submodule(name).weight.numpy()
        assert np.array_equal(encode(weight, BYTE, spec.weight_offset, axis=spec.weight_axis), words.words)


def test_models_and_formats_that_do_not_fit_are_refused() -> None:
    with pytest.raises(BadTypeError, match="takes a model"):
        LNSMadam([nn.Parameter(torch.ones(2, 2))])  # type: ignore[arg-type]
    model = net(LayerRecipe(weight=LNSFormat(12, 64)))
    with pytest.raises(BadValueError, match="no upper bits of signed codes of 8 bits"):
        LNSMadam(model, bits=8)
    with pytest.raises(BadValueError, match="need a γ that is a multiple of 16"):
        IntegerMadam([nn.Parameter(torch.ones(2, 2))], bits=12, gamma=8, compute_bits=8)
    with pytest.raises(BadValueError, match="compute_bits must be 2 to 12"):
        IntegerMadam([nn.Parameter(torch.ones(2, 2))], bits=12, gamma=8, compute_bits=13)


def test_offsets_beside_the_upper_bits_are_refused() -> None:
    model = net(LayerRecipe())
    optimizer = LNSMadam(model)
    state = copy.deepcopy(optimizer.state_dict())
    index = next(i for i, s in state["state"].items() if s.get("compute_bits") == 8)
    state["state"][index]["offset"] = state["state"][index]["offset"] + 1
    with pytest.raises(BadValueError, match="none of 8:8, its upper bits"):
        optimizer.load_state_dict(state)


# ---------------------------------------------------------------------------------------------------
# Errors and gradients


@pytest.mark.parametrize("fmt", ["8:8", "6:4", "4:2", "20:512"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_a_gradient_passes_as_words(fmt: str, per_channel: bool) -> None:
    form = LNSFormat.parse(fmt)
    x = normal(4, 9).requires_grad_()
    g = normal(4, 9, seed=1) * torch.tensor([[1e-6], [1.0], [100.0], [0.0]])
    y = quantize_backward(x, form, per_channel=per_channel)
    assert torch.equal(y.detach(), x.detach())
    y.backward(g)
    assert np.array_equal(x.grad.numpy(), rounded(g, form, 0 if per_channel else None))


def test_a_gradient_that_is_not_finite_is_named() -> None:
    model = prepare_(nn.Sequential(nn.Linear(3, 2)), Recipe(LayerRecipe(error=BYTE)))
    with pytest.raises(BadValueError, match="the error at 0 contains NaN or infinity"):
        (model(normal(2, 3)) * float("inf")).sum().backward()


@GRANULARITIES
def test_linear_layers_compute_with_words_in_all_three_products(granularity: str) -> None:
    error, gradient = LNSFormat(7, 8), LNSFormat(6, 4)
    recipe = LayerRecipe(error=error, gradient=gradient, granularity=granularity)
    model = prepare_(nn.Sequential(nn.Linear(6, 4)), Recipe(recipe))
    layer = model[0]
    x, g = normal(5, 6).requires_grad_(), normal(5, 4, seed=2)
    model(x).backward(g)
    axis = 0 if granularity == "channel" else None
    e = torch.from_numpy(rounded(g, error))
    w = torch.from_numpy(rounded(layer.weight.detach(), BYTE, axis))
    a = torch.from_numpy(rounded(x.detach(), BYTE))
    assert torch.equal(x.grad, e @ w)
    assert np.array_equal(layer.weight.grad.numpy(), rounded(e.t() @ a, gradient, axis))
    assert torch.equal(layer.bias.grad, e.sum(0))


def test_only_errors_and_gradients_may_be_words() -> None:
    recipe = Recipe(LayerRecipe(weight=None, activation=None, error=BYTE))
    model = prepare_(nn.Sequential(nn.Linear(6, 4), Matmul()), recipe)
    x, g = normal(5, 6).requires_grad_(), normal(5, 4, seed=2)
    model[0](x).backward(g)
    assert torch.equal(x.grad, torch.from_numpy(rounded(g, BYTE)) @ model[0].weight.detach())
    assert isinstance(model[1], LNSMatmul)


def test_products_of_activations() -> None:
    model = prepare_(nn.ModuleDict({"scores": Matmul()}), Recipe(LayerRecipe(error=LNSFormat(6, 4))))
    product = model["scores"]
    assert isinstance(product, LNSMatmul)
    a, b, g = normal(2, 3, 4).requires_grad_(), normal(2, 4, 5, seed=1).requires_grad_(), normal(2, 3, 5, seed=2)
    y = product(a, b)
    qa, qb = (torch.from_numpy(rounded(t.detach(), BYTE)) for t in (a, b))
    assert torch.equal(y.detach(), qa @ qb)
    y.backward(g)
    e = torch.from_numpy(rounded(g, LNSFormat(6, 4)))
    assert torch.equal(a.grad, e @ qb.transpose(1, 2))
    # a second call with another recipe changes formats, and forgets what was calibrated
    prepare_(model, Recipe(LayerRecipe(activation=LNSFormat(4, 2))))
    assert product.left_quantizer is not None
    assert str(product.left_quantizer.format) == "4:2"
    assert not product.left_quantizer.calibrated
    assert isinstance(deployable(prepare_(nn.Sequential(Matmul())))[0][0], Matmul)


@pytest.mark.parametrize(
    ("layer", "norm", "shape"),
    [
        (nn.Conv1d(2, 3, 3, padding=1), nn.BatchNorm1d(3), (4, 2, 6)),
        (nn.Conv3d(2, 3, 3, padding=1, groups=1), nn.BatchNorm3d(3), (4, 2, 4, 4, 4)),
    ],
)
def test_convolutions_of_other_dimensions(layer: nn.Module, norm: nn.Module, shape: tuple[int, ...]) -> None:
    model = prepare_(nn.Sequential(layer, norm, nn.ReLU()), Recipe(LayerRecipe()))
    assert isinstance(model[0], LNSLayer)
    assert model[0].norm is model[1]
    x = normal(*shape)
    for _ in range(3):
        model(x)
    model.eval()
    plain, specs = deployable(model)
    assert type(plain[0]) is type(layer)
    assert isinstance(plain[1], nn.Identity)
    assert not list(plain.buffers())
    spec = specs["0"]
    q = rounded_with(plain[0].weight, spec.weight_offset, 0)
    a = rounded_with(x, spec.input_offset, None)
    with torch.no_grad():
        plain[0].weight.copy_(q)
        assert torch.equal(model(x), plain(a))


def rounded_with(x: Tensor, offset: object, axis: int | None) -> Tensor:
    words = encode(x.detach().numpy(), BYTE, offset, axis=axis)  # type: ignore[arg-type]
    return torch.from_numpy(np.asarray(decode(words, BYTE, offset, np.float32, axis=axis)))  # type: ignore[arg-type]


def test_embeddings_hold_words() -> None:
    model = prepare_(nn.Sequential(nn.Embedding(7, 4)), Recipe(LayerRecipe(granularity="tensor", gradient=BYTE)))
    index = torch.tensor([[1, 2, 1]])
    y = model(index)
    table = torch.from_numpy(rounded(model[0].weight.detach(), BYTE))
    assert torch.equal(y.detach(), table[index])
    y.sum().backward()
    assert model[0].weight.grad[1].tolist() == [2.0] * 4
    assert not [n for n, _ in model.named_buffers() if "quantizer" in n]
