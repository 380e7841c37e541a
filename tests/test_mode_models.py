"""Whole models under emulation: names, recipes, counts, every way torch has to run them, and backward passes."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import lnsdeploy
from lnsdeploy.emulator import mode, native, reference
from lnsdeploy.emulator.products import Traced
from lnsdeploy.emulator.records import Seen
from lnsdeploy.errors import BadFileError, BadValueError, MissingDependencyError, UnknownNameError
from lnsdeploy.evaluation.models import load_model
from lnsdeploy.formats import LNSFormat, calibrate, decode, encode
from lnsdeploy.recipe import LayerRecipe, Match, Recipe

pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason=str(native.unavailable()))

BYTE, WORD = LNSFormat(8, 8), LNSFormat(16, 1024)


class Cnn(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.block = nn.Sequential(nn.Conv2d(8, 8, 3, 2, 1, groups=4), nn.BatchNorm2d(8), nn.ReLU())
        self.up = nn.ConvTranspose2d(8, 4, 4, 2, 1)
        self.head = nn.Linear(4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.up(self.block(self.stem(x).relu())).mean((2, 3)))


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, 16)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, 0.0, batch_first=True), 2)
        self.head = nn.Linear(16, 20, bias=False)
        self.head.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x)))


class Lstm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.rnn = nn.LSTM(6, 8, 2, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x)[0][:, -1])


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "cnn": (Cnn, lambda: torch.randn(2, 3, 8, 8)),
    "transformer": (Transformer, lambda: torch.randint(0, 20, (2, 7))),
    "lstm": (Lstm, lambda: torch.randn(3, 5, 6)),
}


def build(name: str) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    model, x = MODELS[name]
    return model(), x()


def check(t: Traced) -> None:
    if t.window is not None:
        words = reference.convolution(t.a, t.w, t.bias, t.plan, t.window, t.groups)
    elif t.a.ndim == 3:
        words = np.stack([reference.dot(a, w, t.bias, t.plan) for a, w in zip(t.a, t.w, strict=True)])
    else:
        words = reference.dot(t.a, t.w, t.bias, t.plan)
    np.testing.assert_array_equal(words, t.result, err_msg=t.name)


def error(made: Tensor, wanted: Tensor) -> float:
    # what is nothing but rounding, such as the gradient of a bias before a batch norm, has no relative error
    return float((made - wanted).detach().double().norm() / (wanted.detach().double().norm() + 1e-6))


def flops(run: Callable[[], Any], *around: Any) -> int:
    """Multiply-accumulates by torch's own count, with attention and recurrent layers in pieces."""
    with contextlib.ExitStack() as stack:
        for unfused in mode._unfused():
            stack.enter_context(unfused)
        counter = stack.enter_context(FlopCounterMode(display=False))
        run()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize("way", [contextlib.nullcontext, torch.no_grad, torch.inference_mode], ids=lambda w: w.__name__)
@pytest.mark.parametrize("name", MODELS)
def test_every_mac_is_counted(name: str, way: Any) -> None:
    model, x = build(name)
    model.eval()
    with way():
        wanted = model(x)
        count = flops(lambda: model(x))
        with lnsdeploy.emulate("lns-madam-8") as seen:
            made = model(x)
    assert seen.macs == count > 0
    assert sum(record.macs for record in seen.report()) == count
    assert not seen.not_emulated
    assert 0 < error(made, wanted) < 0.1


def zoo(name: str) -> tuple[nn.Module, Tensor]:
    """Models that others wrote, with random weights and small inputs."""
    if name == "gpt2":
        sizes = {"n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 300, "n_positions": 64}
        source, options, x = "hf:gpt2", {"settings": sizes}, torch.randint(0, 300, (2, 16))
    else:
        source, options, x = f"timm:{name}", {"image_size": 64}, torch.randn(1, 3, 64, 64)
    try:
        return load_model(source, weights="random", **options).module, x
    except MissingDependencyError as error:
        pytest.skip(f"{name} cannot be made: {error}")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet50", "vit_tiny_patch16_224", "gpt2"])
def test_every_mac_of_models_that_others_wrote(name: str) -> None:
    torch.manual_seed(0)
    model, x = zoo(name)
    model.eval()

    def run() -> Tensor:
        made = model(x)
        return made if isinstance(made, Tensor) else made.logits

    with torch.no_grad():
        wanted, count = run(), flops(run)
        with lnsdeploy.emulate("elma-8") as seen:
            made = run()
    assert seen.macs == count > 0
    assert not seen.not_emulated
    assert made.shape == wanted.shape
    assert error(made, wanted) < 0.5
    assert all(r.sqnr_db is None or r.sqnr_db > 15 for r in seen.report())


def test_a_counter_around_the_context_sees_the_model_alone() -> None:
    model, x = build("cnn")
    with FlopCounterMode(display=False) as outer, lnsdeploy.emulate("lns-madam-8") as seen:
        model(x)
    assert outer.get_total_flops() == 2 * seen.macs
    with lnsdeploy.emulate("lns-madam-8") as seen, FlopCounterMode(display=False) as inner:
        model(x)
    assert inner.get_total_flops() == 2 * seen.macs


# ---------------------------------------------------------------------------------------------------
# names


def test_names_of_modules() -> None:
    model, x = build("cnn")
    with lnsdeploy.emulate("lns-madam-8") as seen:
        model(x)
        model(x)
    records = seen.report()
    assert [r.name for r in records] == ["stem", "block.0", "up", "head"]
    assert [r.op for r in records] == ["conv2d", "conv2d", "conv_transpose2d", "linear"]
    assert [r["module"] for r in records] == ["Conv2d", "Conv2d", "ConvTranspose2d", "Linear"]
    assert all(r.calls == 2 for r in records)
    assert records[0].macs == records[0]["macs"] == 2 * 2 * 8 * 8 * 8 * 27
    assert set(records[0]) >= {"name", "op", "macs", "sqnr_db", "calls", "saturated", "flushed", "words", "seconds"}
    with pytest.raises(KeyError):
        records[0]["signal"]
    assert all(15 < r.sqnr_db < 50 for r in records)


def test_names_of_products_within_a_module() -> None:
    model, x = build("transformer")
    model.eval()
    with torch.inference_mode(), lnsdeploy.emulate("lns-madam-8") as seen:
        model(x)
    one = [
        "self_attn.in_proj_weight",
        "self_attn.matmul",
        "self_attn.matmul_1",
        "self_attn.out_proj",
        "linear1",
        "linear2",
    ]
    assert [r.name for r in seen.report()] == [f"encoder.layers.{i}.{n}" for i in (0, 1) for n in one] + ["head"]
    model, x = build("lstm")
    with lnsdeploy.emulate("lns-madam-8") as seen:
        model(x)
    assert [r.name for r in seen.report()][:2] == ["rnn.weight_ih_l0", "rnn.weight_hh_l0"]
    assert [r.calls for r in seen.report()] == [1, 5, 1, 5, 1]


def test_names_from_a_given_model() -> None:
    model, x = build("cnn")
    with lnsdeploy.emulate("lns-madam-8", model=model) as seen:
        model.block(model.stem(x))
    assert [r.name for r in seen.report()] == ["stem", "block.0"]


def test_two_models_and_none() -> None:
    a, b = nn.Linear(3, 3), nn.Sequential(nn.Linear(3, 2))
    with lnsdeploy.emulate("lns-madam-8") as seen:
        y = b(a(torch.randn(4, 3)))
        for _ in range(3):
            torch.mm(y, y.T)
    names = [r.name for r in seen.report()]
    assert names[:2] == ["Linear", "Sequential.0"]
    assert re.fullmatch(r"test_mode_models\.py:\d+:matmul", names[2])
    assert [r.calls for r in seen.report()] == [1, 1, 3]


# ---------------------------------------------------------------------------------------------------
# recipes


def test_recipes_choose_by_name_type_and_place(tmp_path: Any) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text(
        """
[default]
weight = "6:4"
activation = "6:4"

[[layer]]
type = "matmul"
weight = "8:8"
activation = "8:8"
output = "12:8"

[[layer]]
pattern = "encoder.layers.1.*"
type = "linear"
datapath = "gauss-8"
weight = "8:8"
activation = "8:8"

[[layer]]
pattern = "*.linear2"
weight = "float"
activation = "float"

[[layer]]
position = "last"
weight = "16:1024"
activation = "16:1024"
granularity = "tensor"
""",
        encoding="utf-8",
    )
    model, x = build("transformer")
    model.eval()
    with torch.no_grad():
        with lnsdeploy.emulate(file) as seen:
            model(x)
        count = flops(lambda: model(x))
    formats = {r.name: r.formats for r in seen.report()}
    assert formats["encoder.layers.0.linear1"] == ("6:4", "6:4", "6:4")
    assert formats["encoder.layers.1.self_attn.matmul"] == ("8:8", "8:8", "12:8")
    assert formats["encoder.layers.1.linear1"] == ("8:8", "8:8", "8:8")
    assert formats["head"] == ("16:1024",) * 3
    by_name = {r.name: r for r in seen.report()}
    assert by_name["encoder.layers.1.linear1"].datapath == "gauss-8"
    assert by_name["encoder.layers.0.linear1"].datapath.startswith("lns-madam-8")
    assert set(seen.left_float) == {"encoder.layers.0.linear2", "encoder.layers.1.linear2"}
    assert seen.float_macs == 2 * 14 * 32 * 16
    assert seen.macs + seen.float_macs == count
    assert "left in float by the recipe: encoder.layers.0.linear2" in seen.table()


def test_patterns_that_match_nothing_are_refused() -> None:
    model, x = build("cnn")
    recipe = Recipe(layers=(("stam", LayerRecipe(None, None)),))
    with pytest.raises(UnknownNameError, match="did you mean 'stem'"), lnsdeploy.emulate(recipe):
        model(x)


def test_what_a_file_is(tmp_path: Any) -> None:
    path = lnsdeploy.load_datapath("gauss-8")
    file = tmp_path / "mine.toml"
    file.write_text(path.to_toml(), encoding="utf-8")
    assert mode.resolve(file)[1] == path
    assert mode.resolve(str(file))[0].default.weight == BYTE
    assert mode.resolve(path) == (Recipe(LayerRecipe(BYTE, BYTE)), path)
    file.write_text('[default]\nweigth = "8:8"\n', encoding="utf-8")
    with pytest.raises(BadFileError, match=r"mine\.toml: default: unknown field 'weigth'; did you mean 'weight'"):
        lnsdeploy.emulate(file)
    with pytest.raises(BadFileError, match="cannot read"):
        lnsdeploy.emulate(tmp_path / "none.toml")


def test_results_of_another_gamma() -> None:
    model = nn.Linear(4, 3)
    recipe = Recipe(LayerRecipe(BYTE, BYTE, output=LNSFormat(5, 2)))
    with lnsdeploy.emulate(recipe) as seen:
        model(torch.randn(2, 4))
    # the same range, at the codes of the products
    assert seen.report()[0].formats[2] == "7:8"
    recipe = Recipe(LayerRecipe(BYTE, BYTE, output=LNSFormat(8, 16)))
    with (
        pytest.raises(BadValueError, match="8 codes per octave, which 8:16 does not divide"),
        lnsdeploy.emulate(recipe),
    ):
        model(torch.randn(2, 4))


def test_recorded_offsets_stay_and_travel() -> None:
    torch.manual_seed(0)
    model, a, b = nn.Sequential(nn.Linear(20, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(9, 20), torch.randn(9, 20)
    recipe = Recipe(LayerRecipe(BYTE, BYTE, offsets="recorded"))
    plans: list[Traced] = []
    with torch.no_grad(), lnsdeploy.emulate(recipe, trace=plans.append) as first:
        model(a)
        wanted = model(8 * b)
    for t in plans:
        check(t)
    for i in (0, 1):
        assert plans[i].plan.input_offset == plans[i + 2].plan.input_offset
        assert plans[i].plan.output_offset == plans[i + 2].plan.output_offset
        assert plans[i].plan.lsb == plans[i + 2].plan.lsb
    assert first.report()[0].saturated > 0
    data = json.loads(json.dumps(first.calibration()))
    second = lnsdeploy.emulate(recipe)
    second.load_calibration(data)
    with torch.no_grad(), second:
        assert torch.equal(model(8 * b), wanted)
    assert second.calibration() == data
    with pytest.raises(BadValueError, match="not a calibration"):
        second.load_calibration({"0": {"lsb": 3}})
    with torch.no_grad(), lnsdeploy.emulate(Recipe(LayerRecipe(BYTE, BYTE))) as dynamic:
        model(a)
        model(8 * b)
    assert dynamic.report()[0].saturated == 0
    assert dynamic.calibration() == {}


@pytest.mark.parametrize("method", ["percentile", "lsq"])
def test_calibration_methods(method: Any) -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(30, 5), torch.randn(50, 30)
    x[0, 0] = 1000
    found: list[Traced] = []
    with torch.no_grad(), lnsdeploy.emulate(Recipe(LayerRecipe(BYTE, BYTE, calibration=method)), trace=found.append):
        layer(x)
    t = found[0]
    assert t.plan.input_offset == calibrate(x, BYTE, method=method)
    np.testing.assert_array_equal(t.plan.weight_offset, calibrate(layer.weight, BYTE, method=method, axis=0))
    np.testing.assert_array_equal(t.a, encode(x.numpy(), BYTE, t.plan.input_offset))
    check(t)


# ---------------------------------------------------------------------------------------------------
# weights that change


def test_weights_are_packed_once_while_they_stay() -> None:
    layer, x = nn.Linear(20, 6), torch.randn(3, 20)
    with torch.no_grad(), lnsdeploy.emulate("lns-madam-8") as seen:
        first = layer(x)
        assert torch.equal(layer(x), first)
        assert seen.report()[0].weights.total == 120

        def changed(by: float) -> None:
            nonlocal first
            made = layer(x)
            assert error(made, by * first) < 0.1
            first = made

        layer.weight.mul_(2), layer.bias.mul_(2)
        changed(2)
        # no version counter sees this
        layer.weight.data.mul_(2), layer.bias.data.mul_(2)
        changed(2)
        layer.weight.data, layer.bias.data = layer.weight * 4, layer.bias * 4
        changed(4)
        layer.weight = nn.Parameter(-layer.weight)
        layer.bias = nn.Parameter(-layer.bias)
        changed(-1)
    layer.weight.data.mul_(3), layer.bias.data.mul_(3)
    with torch.no_grad(), seen:
        changed(3)


def test_memory_that_is_used_again_is_not_taken_for_the_old() -> None:
    x = torch.randn(3, 20)
    with torch.no_grad(), lnsdeploy.emulate("lns-madam-8"):
        for seed in range(8):
            torch.manual_seed(seed)
            layer = nn.Linear(20, 6, bias=False)

            made = layer(x)
            del layer
            torch.manual_seed(seed)
            wanted = nn.Linear(20, 6, bias=False).weight
            ideal = (x[:, None] * wanted).sum(-1)
            assert error(made, ideal) < 0.1


# ---------------------------------------------------------------------------------------------------
# every way torch has to run a model


def test_autocast() -> None:
    model, x = build("cnn")
    model.eval()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        wanted = model(x)
        with lnsdeploy.emulate("lns-madam-8") as seen:
            made = model(x)
    assert made.dtype == wanted.dtype == torch.bfloat16
    assert error(made.float(), wanted.float()) < 0.15
    assert [r.op for r in seen.report()] == ["conv2d", "conv2d", "conv_transpose2d", "linear"]


def test_compiled_models_run_as_they_were_written() -> None:
    model, x = build("cnn")
    model.eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(x)
        with lnsdeploy.emulate("lns-madam-8") as seen:
            made = compiled(x)
        with lnsdeploy.emulate("lns-madam-8"):
            assert torch.equal(made, model(x))
    assert [r.name for r in seen.report()][-1].endswith("head")
    assert len(seen.report()) == 4


def test_scripted_and_exported_models() -> None:
    model, x = build("cnn")
    model.eval()
    with torch.no_grad():
        with lnsdeploy.emulate("lns-madam-8") as seen:
            wanted = model(x)
        for made in (torch.jit.trace(model, x), torch.export.export(model, (x,)).module()):
            with lnsdeploy.emulate("lns-madam-8") as other:
                near = made(x)
            assert error(near, wanted) < 0.05
            assert other.macs == seen.macs
            assert not other.not_emulated


def test_vmap_and_functional_calls() -> None:
    layer, x = nn.Linear(8, 3), torch.randn(5, 2, 8)
    with torch.no_grad(), lnsdeploy.emulate("lns-madam-8") as seen:
        made = torch.vmap(lambda v: torch.func.functional_call(layer, dict(layer.named_parameters()), (v,)))(x)
    assert error(made, layer(x)) < 0.1
    assert seen.macs == 5 * 2 * 8 * 3


class Wrapped(torch.Tensor):
    """A subclass that comes apart into a plain tensor."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Wrapped:
        made = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        plain = torch.utils._pytree.tree_map(lambda v: v.inner if isinstance(v, Wrapped) else v, args)
        result = func(*plain, **(kwargs or {}))
        return Wrapped(result) if isinstance(result, Tensor) else result


def test_tensor_subclasses_come_apart() -> None:
    a, b = torch.randn(3, 20), torch.randn(20, 2)
    with lnsdeploy.emulate("lns-madam-8") as seen:
        made = torch.mm(Wrapped(a), b)
    assert seen.macs == 120
    assert error(made.inner, a @ b) < 0.1


def test_shapes_alone_cost_nothing() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with lnsdeploy.emulate("lns-madam-8") as seen:
        assert torch.mm(torch.empty(2, 3, device="meta"), torch.empty(3, 4, device="meta")).shape == (2, 4)
        with FakeTensorMode():
            assert torch.mm(torch.empty(2, 3), torch.empty(3, 4)).shape == (2, 4)
    assert seen.macs == 0
    assert not seen.not_emulated


def test_operators_that_take_functions() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 16, 8)
    with torch.no_grad():
        wanted = functional.scaled_dot_product_attention(q, q, q)
        with lnsdeploy.emulate("lns-madam-8") as seen:
            made = flex_attention(q, q, q)
    assert error(made, wanted) < 0.1
    assert seen.macs == 2 * 2 * 16 * 16 * 8


# ---------------------------------------------------------------------------------------------------
# backward passes


def gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    model(x).square().mean().backward()
    return [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_backward(name: str) -> None:
    model, x = build(name)
    wanted = gradients(model, x)
    found: list[Traced] = []
    with lnsdeploy.emulate("gauss-16", backward=True, trace=found.append) as seen:
        made = gradients(model, x)
    for t in found:
        check(t)
    for g, w in zip(made, wanted, strict=True):
        assert error(g, w) < 0.03
    names = [r.name for r in seen.report()]
    forward = [n for n in names if ":" not in n]
    assert {n.partition(":")[0] for n in names if ":" in n} == set(forward)
    # the first layer's input needs no gradient
    assert all(f"{n}:weight" in names for n in forward)
    assert all(f"{n}:input" in names for n in forward[1:])
    if name != "cnn":
        # torch counts all channels of a grouped convolution's backward pass
        assert seen.macs == flops(lambda: gradients(model, x))


def test_backward_stays_in_float_unless_asked() -> None:
    model, x = build("cnn")
    with lnsdeploy.emulate("lns-madam-8") as seen:
        gradients(model, x)
    assert all(":" not in r.name for r in seen.report())
    assert not seen.not_emulated


def test_the_products_of_a_backward_pass_by_hand() -> None:
    torch.manual_seed(0)
    layer, x = nn.Linear(20, 6), torch.randn(9, 20, requires_grad=True)
    grad = torch.randn(9, 6)
    recipe = Recipe(LayerRecipe(BYTE, BYTE, error=LNSFormat(6, 8), gradient=LNSFormat(10, 8)))
    found: dict[str, Traced] = {}
    with lnsdeploy.emulate(recipe, backward=True, trace=lambda t: found.__setitem__(t.name, t)):
        layer(x).backward(grad)
    six = LNSFormat(6, 8)
    errors = encode(grad.numpy(), six, calibrate(grad, six))
    t = found["Linear:input"]
    np.testing.assert_array_equal(t.a, errors)
    weights = layer.weight.detach().T.numpy()
    np.testing.assert_array_equal(t.w, encode(weights, BYTE, calibrate(weights, BYTE, axis=0), axis=0))
    np.testing.assert_array_equal(reference.dot(t.a, t.w, None, t.plan), t.result)
    assert (t.plan.activation, t.plan.weight, t.plan.output) == (six, BYTE, six)
    np.testing.assert_array_equal(x.grad.numpy(), decode(t.result, six, t.plan.output_offset))
    t = found["Linear:weight"]
    np.testing.assert_array_equal(t.a, errors.T)
    np.testing.assert_array_equal(t.w, encode(x.detach().T.numpy(), BYTE, calibrate(x, BYTE)))
    assert t.plan.output == LNSFormat(10, 8)
    np.testing.assert_array_equal(layer.weight.grad.numpy(), decode(t.result, t.plan.output, t.plan.output_offset))


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("stride", "padding", "dilation", "groups"), [(1, 1, 1, 1), (2, 1, 1, 2), (3, 0, 2, 1), (2, 3, 1, 4)]
)
def test_backward_of_convolutions(transposed: bool, stride: int, padding: int, dilation: int, groups: int) -> None:
    torch.manual_seed(0)
    for kind in ((nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d))[
        transposed
    ]:
        axes = int(kind.__name__[-2])
        layer = kind(4, 8, (3, 2, 4)[:axes], stride, padding, dilation=dilation, groups=groups)
        x = torch.randn(2, 4, *(11, 10, 12)[:axes], requires_grad=True)
        y = layer(x)
        wanted = torch.autograd.grad(y.square().sum(), [x, *layer.parameters()])
        found: list[Traced] = []
        with lnsdeploy.emulate("gauss-16", backward=True, trace=found.append) as seen:
            made = torch.autograd.grad(layer(x).square().sum(), [x, *layer.parameters()])
        for t in found:
            check(t)
        for g, w in zip(made, wanted, strict=True):
            assert g.shape == w.shape
            assert error(g, w) < 0.02
        assert len(found) == 3
        assert seen.macs == 3 * seen.report()[0].macs


def test_parts_of_the_backward_pass_in_float() -> None:
    layer, x = nn.Linear(20, 6), torch.randn(9, 20, requires_grad=True)
    for options, left in (
        ({"error": "float"}, {"Linear:input", "Linear:weight"}),
        ({"gradient": "float"}, {"Linear:weight"}),
    ):
        with lnsdeploy.emulate(Recipe(LayerRecipe(BYTE, BYTE, **options)), backward=True) as seen:
            layer(x).sum().backward()
        assert set(seen.left_float) == left
    recipe = Recipe(LayerRecipe(), ((Match(type="Linear"), LayerRecipe(None, None)),))
    with lnsdeploy.emulate(recipe, backward=True) as seen:
        layer(x).sum().backward()
    assert set(seen.left_float) == {"Linear", "Linear:input", "Linear:weight"}
    assert seen.macs == 0


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool) -> None:
    model = nn.Sequential(nn.Linear(20, 8), nn.Tanh(), nn.Linear(8, 5))
    x = torch.randn(4, 20, requires_grad=True)

    def run() -> list[Tensor]:
        model.zero_grad()
        checkpoint(model, x, use_reentrant=reentrant).square().sum().backward()
        return [p.grad.clone() for p in model.parameters()]

    wanted = run()
    for backward in (False, True):
        with lnsdeploy.emulate("gauss-16", backward=backward) as seen:
            made = run()
        for g, w in zip(made, wanted, strict=True):
            assert error(g, w) < 0.02
        # without reentry, torch stops once it has what it needs
        assert {r.name: r.calls for r in seen.report() if ":" not in r.name} == {"0": 2, "2": 1 + reentrant}
        names = {r.name for r in seen.report() if ":" in r.name}
        assert names == ({"0:input", "0:weight", "2:input", "2:weight"} if backward else set())


def test_second_derivatives() -> None:
    w = torch.randn(6, 3, requires_grad=True)
    x = torch.randn(4, 6, requires_grad=True)

    def run() -> Tensor:
        g = torch.autograd.grad((x @ w).pow(3).sum(), x, create_graph=True)[0]
        return torch.autograd.grad(g.square().sum(), w)[0]

    wanted = run()
    with lnsdeploy.emulate("gauss-16", backward=True):
        made = run()
    assert error(made, wanted) < 0.05


# ---------------------------------------------------------------------------------------------------
# counters


def test_counters_merge_exactly() -> None:
    model, _ = build("cnn")
    batches = [torch.randn(2, 3, 8, 8) for _ in range(4)]
    with torch.no_grad():
        with lnsdeploy.emulate("lns-madam-8") as alone:
            for x in batches:
                model(x)
        parts = []
        for some in (batches[::2], batches[1::2]):
            with lnsdeploy.emulate("lns-madam-8") as part:
                for x in some:
                    model(x)
            parts.append(json.loads(json.dumps(part.to_dict())))
    total = Seen()
    for data in reversed(parts):
        total.merge(data)

    def timeless(seen: Seen) -> Any:
        layers = seen.to_dict()["layers"]
        for layer in layers:
            layer.pop("seconds")
        return layers

    assert timeless(total) == timeless(alone)
    assert total.macs == alone.macs
    assert [r.sqnr_db for r in total.records.values()] == [r.sqnr_db for r in alone.report()]
    with pytest.raises(TypeError, match="an emulation or its dictionary"):
        total.merge(3)  # type: ignore[arg-type]


def test_the_table() -> None:
    model, x = build("cnn")
    with lnsdeploy.emulate("lns-madam-8") as seen:
        model(x)
    lines = seen.table().splitlines()
    assert lines[0].split() == ["name", "op", "calls", "MACs", "SQNR", "dB", "saturated", "flushed", "seconds"]
    assert lines[2].split()[:3] == ["stem", "conv2d", "1"]
    assert lines[-1].split()[:3] == ["all", "4", f"{seen.macs:,}"]


def test_noise_in_full_and_on_a_sample() -> None:
    torch.manual_seed(0)
    layer, x = nn.Conv2d(8, 16, 3), torch.randn(2, 8, 20, 20)
    with torch.no_grad():
        with lnsdeploy.emulate("lns-madam-8") as sampled:
            layer(x)
        with lnsdeploy.emulate("lns-madam-8", sqnr="full") as full:
            made = layer(x)
    noise = (made - layer(x)).detach().double()
    wanted = 10 * np.log10(float(layer(x).detach().double().square().sum() / noise.square().sum()))
    assert full.report()[0].sqnr_db == pytest.approx(wanted, abs=0.01)
    assert sampled.report()[0].sqnr_db == pytest.approx(wanted, abs=1.0)


# ---------------------------------------------------------------------------------------------------
# nothing slips by


def test_every_operation_of_torch_with_products_is_known() -> None:
    """Operations of aten whose names speak of products are rerouted, come apart, or are listed."""
    risky = re.compile(r"(^|_)\w*(mm|conv|attention|rnn|linear|dot|matmul|mv|gemm|fft|lstm|gru|bilinear|solve)")
    harmless = re.compile(
        r"""_?upsample_.* | _thnn_fused_.* | _?cumm(ax|in).* | .*comm.* | fft_r?fftfreq | .*gamma.* | hamming_window
        | .*convert.* | .*_dummy | _weight_norm.*""",
        re.VERBOSE,
    )
    left = set()
    for full in torch._C._dispatch_get_all_op_names():
        space, _, rest = full.partition("::")
        base, _, overload = rest.partition(".")
        if space != "aten" or not risky.search(base) or harmless.fullmatch(base.strip()):
            continue
        func = getattr(getattr(torch.ops.aten, base, None), overload or "default", None)
        if func is not None and func not in mode._HANDLERS and mode._way(func) in ("plain", "writes"):
            left.add(base)
    assert not left


def test_everything_that_torch_counts_is_known() -> None:
    from torch.utils.flop_counter import flop_registry

    for packet in flop_registry:
        for overload in getattr(packet, "overloads", list)():
            func = getattr(packet, overload)
            assert func in mode._HANDLERS or mode._way(func) in ("decompose", "missed"), func
