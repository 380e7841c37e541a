"""Models by name: every library that is installed, Python paths, weights of every origin, and every refusal."""

from __future__ import annotations

import builtins
import importlib.util
import json
import pickle
import socket
import struct
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lnsdeploy.errors import (
    BadFileError,
    BadTypeError,
    BadValueError,
    MissingDependencyError,
    UnknownNameError,
    UnsupportedError,
)
from lnsdeploy.evaluation import models, weights
from lnsdeploy.evaluation.inputs import ImageInput, TensorInput, TokenInput
from lnsdeploy.evaluation.models import load_model, scores_of, with_inputs
from lnsdeploy.evaluation.names import is_model_name
from tests import small_models

HERE = Path(__file__).parent / "small_models.py"


def small(name: str) -> str:
    return f"{HERE}:{name}"


@pytest.fixture(autouse=True)
def _offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No test asks a network, and none finds what another left in a cache."""
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(weights, "unreachable", lambda url: "no network in tests")


def library(name: str):
    """timm, torchvision or transformers, as the loader imports it."""
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    if importlib.util.find_spec("torchvision") is not None:
        models._torchvision()
    return importlib.import_module(name)


# ---------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    "name",
    [
        "timm:resnet50",
        "hf:gpt2",
        "hf:org/name",
        "hf:folder/x",
        "torchvision:resnet18",
        "a.py:f",
        "p/q.py:f.g",
        "m:f",
        "m.n:f",
    ],
)
def test_names_of_models(name: str) -> None:
    assert is_model_name(name)


@pytest.mark.parametrize(
    "name", ["m.onnx", "run", "timm:", ":f", "a.py", "a.py:", "a.py:f()", "C:\\m.onnx", "p/q:f", "1:f"]
)
def test_names_of_files(name: str) -> None:
    assert not is_model_name(name)


def test_a_file_that_looks_like_a_name_is_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("m:f").touch()
    assert not is_model_name("m:f")


def test_no_name() -> None:
    with pytest.raises(BadValueError, match=r"'m.onnx' names no model; write timm:NAME, hf:NAME, torchvision:NAME"):
        load_model("m.onnx")


# ---------------------------------------------------------------------------------------------------
# Python paths


def test_a_callable_of_a_file() -> None:
    made = load_model(small("sized_cnn"))
    assert isinstance(made.module, nn.Sequential)
    assert not made.module.training
    assert not any(p.requires_grad for p in made.module.parameters())
    assert made.inputs == ImageInput((3, 16, 12), (0.5, 0.4, 0.3), (0.2, 0.2, 0.25), 0.875, "bicubic")
    assert (made.task, made.weights) == ("classification", "own")
    assert made.weights_note.startswith("as ")
    assert made.parameters == sum(p.numel() for p in small_models.cnn().parameters())
    assert made(torch.zeros(2, 3, 16, 12)).shape == (2, 10)


def test_settings_reach_the_callable() -> None:
    assert load_model(small("decoder"), settings={"length": 7}).inputs == TokenInput(257, 7)
    with pytest.raises(BadValueError, match=r"raised TypeError: .*unexpected keyword argument 'wide'"):
        load_model(small("decoder"), settings={"wide": 7})


def test_a_callable_of_a_package() -> None:
    assert isinstance(load_model("torch.nn:Identity").module, nn.Identity)


def test_a_module_itself() -> None:
    assert load_model(small("module")).module.out_features == 2


def test_weights_follow_from_the_seed_alone() -> None:
    first, again, other = (load_model(small("cnn"), seed=seed) for seed in (1, 1, 2))
    assert weights.digest(first.module) == weights.digest(again.module) != weights.digest(other.module)
    state = torch.get_rng_state()
    load_model(small("cnn"), seed=3)
    assert torch.equal(state, torch.get_rng_state())


def test_random_weights_of_a_callable() -> None:
    made = load_model(small("module"), weights="random", seed=4)
    assert (made.weights, made.weights_note) == ("random", "random (seed 4)")


def test_inputs_that_only_data_tell() -> None:
    made = load_model(small("digits_mlp"))
    assert made.inputs is None
    assert with_inputs(made, (1, 8, 8)).inputs == ImageInput((1, 8, 8))
    # synthetic data are of no shape: the first layer says it
    assert with_inputs(made, None).inputs == TensorInput((64,))
    with pytest.raises(BadValueError, match="does not say what it takes; give --image-size"):
        with_inputs(load_model(small("cnn")), None)
    assert load_model(small("cnn"), image_size=20).inputs == ImageInput((3, 20, 20))
    assert load_model(small("sized_cnn"), image_size=20).inputs.shape == (3, 20, 20)
    assert load_model(small("decoder"), length=5).inputs.length == 5


@pytest.mark.parametrize(
    ("name", "kind", "message"),
    [
        ("cn", UnknownNameError, "unknown name in .*small_models.py 'cn'; did you mean 'cnn'"),
        ("number", BadTypeError, "is int, neither a module nor a callable"),
        ("raising", BadValueError, "raised ValueError: no such thing as a free model"),
        ("not_a_module", BadTypeError, "returned str; it must return a torch.nn.Module"),
        ("not_an_input", BadTypeError, "returned a module and tuple; the second must be"),
    ],
)
def test_callables_that_will_not_do(name: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_model(small(name))


@pytest.mark.parametrize(
    ("source", "kind", "message"),
    [
        ("nowhere.py:f", BadFileError, "cannot read nowhere.py: no such file"),
        ("tim:resnet50", UnknownNameError, "unknown library or Python module 'tim'; did you mean 'timm'"),
        ("torch.nothing:f", BadValueError, "No module named 'torch.nothing'"),
    ],
)
def test_paths_that_lead_nowhere(source: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        load_model(source)


def test_a_file_that_does_not_import(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("import lnsdeploy\nthis is no Python\n")
    with pytest.raises(BadValueError, match="importing it raised SyntaxError"):
        load_model(f"{file}:f")
    file.write_text("import a_package_that_nobody_has\n")
    with pytest.raises(BadValueError, match="No module named 'a_package_that_nobody_has'"):
        load_model(f"{file}:f")
    (tmp_path / "beside.py").write_text("import torch\nmake = torch.nn.Identity\n")
    file.write_text("from beside import make\n")
    before = list(sys.path)
    assert isinstance(load_model(f"{file}:make").module, nn.Identity)
    assert sys.path == before


def test_outputs_of_every_form() -> None:
    scores = torch.zeros(2, 3)

    class Output:
        logits = scores

    for output in (scores, {"logits": scores}, {"out": scores, "aux": None}, Output(), (scores, None), [scores]):
        assert scores_of(output, "m") is scores
    with pytest.raises(UnsupportedError, match="m returns list without a tensor of scores; wrap it"):
        scores_of([{"boxes": scores}], "m")


# ---------------------------------------------------------------------------------------------------
# Inputs


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: ImageInput((3, 8)), BadValueError, "channels .1 or 3., height and width"),
        (lambda: ImageInput((2, 8, 8)), BadValueError, "channels .1 or 3."),
        (lambda: ImageInput((3, 0, 8)), BadValueError, "sizes from 1 to"),
        (lambda: ImageInput((3, 8.0, 8)), BadTypeError, "shape must be integers"),
        (lambda: ImageInput((3, 8, 1 << 20)), BadValueError, "sizes from 1 to"),
        (lambda: ImageInput((3, 8, 8), (0.5,)), BadValueError, "mean must be 3 numbers"),
        (lambda: ImageInput((1, 8, 8), (0.5,), (0.0,)), BadValueError, "std must be 1 numbers"),
        (lambda: ImageInput((1, 8, 8), crop=0), BadValueError, "crop must be a share"),
        (lambda: ImageInput((1, 8, 8), interpolation="cubic"), UnknownNameError, "did you mean 'bicubic'"),
        (lambda: TokenInput(1, 8), BadValueError, "vocabulary must be"),
        (lambda: TokenInput(8, 0), BadValueError, "length must be"),
        (lambda: TokenInput(8, 8, mask=8), BadValueError, "mask must be one of the 8 tokens"),
        (lambda: TensorInput(()), BadValueError, "one to five sizes"),
    ],
)
def test_inputs_are_checked(make, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make()


# ---------------------------------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_weights_of_a_file(tmp_path: Path, suffix: str) -> None:
    trained = small_models.cnn()
    file = tmp_path / f"w{suffix}"
    if suffix == ".safetensors":
        save_file(trained.state_dict(), file)
    else:
        torch.save({"epoch": 3, "state_dict": {f"module.{n}": v for n, v in trained.state_dict().items()}}, file)
    made = load_model(small("cnn"), weights=str(file))
    assert (made.weights, made.weights_note) == ("file", f"from {file}")
    assert weights.digest(made.module) == weights.digest(trained)


def test_weights_that_do_not_fit(tmp_path: Path) -> None:
    state = small_models.cnn().state_dict()
    state["0.weight"] = state["0.weight"][:4].contiguous()
    state["more"] = torch.zeros(1)
    del state["8.bias"]
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(BadFileError) as caught:
        load_model(small("cnn"), weights=str(tmp_path / "w.safetensors"))
    for part in ("missing: 8.bias", "left over: more", "of another shape: 0.weight (4, 3, 3, 3) for (8, 3, 3, 3)"):
        assert part in str(caught.value)


class Hostile:
    def __reduce__(self):
        return builtins.print, ("hostile code ran",)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("w.safetensors", b"", "truncated, or not a safetensors file"),
        ("w.safetensors", struct.pack("<Q", 1 << 60) + b"{}", "truncated"),
        ("w.safetensors", struct.pack("<Q", 4) + b"{,}}", "not a readable safetensors file"),
        ("w.pt", b"", "refused, since it is damaged"),
        ("w.pt", b"PK\x03\x04 and nothing more", "refused, since it is damaged"),
        ("w.pth", pickle.dumps(Hostile()), "refused, since it holds more than tensors, or is damaged; convert"),
        ("w.bin", pickle.dumps({"a": Hostile()}, 2), "refused, since it holds more than tensors"),
    ],
)
def test_hostile_weights(tmp_path: Path, name: str, content: bytes, message: str, capsys) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BadFileError, match=message) as caught:
        load_model(small("cnn"), weights=str(tmp_path / name))
    assert str(tmp_path / name) in str(caught.value)
    assert "hostile" not in capsys.readouterr().out


@pytest.mark.parametrize("value", [[1, 2], {"a": 1}, {"state_dict": {"a": "text"}}])
def test_checkpoints_without_parameters(tmp_path: Path, value: object) -> None:
    torch.save(value, tmp_path / "w.pt")
    with pytest.raises(BadFileError, match=r"holds no (table of )?parameters"):
        load_model(small("cnn"), weights=str(tmp_path / "w.pt"))


def test_choices_of_weights() -> None:
    with pytest.raises(BadValueError, match="weights must be 'pretrained', 'random', or a file"):
        load_model(small("cnn"), weights="pretained")
    with pytest.raises(BadValueError, match="has the weights that it gives itself"):
        load_model(small("cnn"), weights="pretrained")
    for missing in ("none.safetensors", "none.pt"):
        with pytest.raises(BadFileError, match=f"cannot read {missing}"):
            load_model(small("cnn"), weights=missing)


def test_random_weights_hide_nothing() -> None:
    """Zero scales and heads are drawn; batch norms bring a sample to mean 0 and variance 1."""
    made = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5))
    nn.init.zeros_(made[1].weight)
    nn.init.zeros_(made[3].weight)
    made.eval()
    sample = 3 * torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 1
    weights.settle_(made, sample, 0)
    assert made[1].weight.tolist() == [1, 1, 1, 1]
    assert 0.05 < float(made[3].weight.detach().std()) < 0.2
    with torch.no_grad():
        after = made[:2](sample)
    assert after.mean(dim=(0, 2, 3)).abs().max() < 1e-4
    assert (after.var(dim=(0, 2, 3)) - 1).abs().max() < 1e-2
    assert made[1].momentum == 0.1
    assert not made[1].training


def test_a_host_that_does_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    monkeypatch.setattr(weights, "PATIENCE", 0.2)
    monkeypatch.setattr(weights.urllib.request, "getproxies", lambda: {})

    def silent(address, timeout):
        time.sleep(2)
        raise TimeoutError

    monkeypatch.setattr(socket, "create_connection", silent)
    # had it waited for the end of the attempt, it would tell of that
    assert weights.unreachable("https://hub.invalid/x") == "hub.invalid does not answer"

    def refuse(address, timeout):
        raise ConnectionRefusedError(111, "Connection refused")

    monkeypatch.setattr(socket, "create_connection", refuse)
    assert weights.unreachable("https://hub.invalid/x") == "hub.invalid: Connection refused"
    asked = []
    monkeypatch.setattr(weights.urllib.request, "getproxies", lambda: {"https": "http://proxy.invalid:3128"})
    monkeypatch.setattr(weights.urllib.request, "proxy_bypass", lambda host: False)
    monkeypatch.setattr(socket, "create_connection", lambda address, timeout: asked.append(address) or socket.socket())
    assert weights.unreachable("https://hub.invalid/x") is None
    assert asked == [("proxy.invalid", 3128)]


def test_the_hub_is_as_it_was_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    constants = pytest.importorskip("huggingface_hub.constants", reason="huggingface_hub is not installed")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    with weights.hub(online=False):
        assert constants.HF_HUB_OFFLINE
    assert not constants.HF_HUB_OFFLINE
    with weights.hub(online=True):
        assert not constants.HF_HUB_OFFLINE


# ---------------------------------------------------------------------------------------------------
# Libraries


def test_a_library_that_is_not_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("timm", "transformers", "torchvision"):
        monkeypatch.setitem(sys.modules, name, None)
    models._torchvision.cache_clear()
    for source in ("timm:resnet18", "hf:gpt2", "torchvision:resnet18"):
        with pytest.raises(MissingDependencyError, match=r"pip install 'lnsdeploy\[models\]'"):
            load_model(source)
    models._torchvision.cache_clear()


def test_timm() -> None:
    library("timm")
    made = load_model("timm:resnet10t", seed=3)
    assert made.weights == "random"
    assert made.weights_note == (
        "random (seed 3), since there are no pretrained ones here: not in the cache, and not to be downloaded "
        "(no network in tests)"
    )
    assert (made.classes, made.task) == (1000, "classification")
    assert made.inputs.interpolation == "bicubic"
    assert made.inputs.mean == (0.485, 0.456, 0.406)
    again = load_model("timm:resnet10t", weights="random", seed=3)
    assert again.weights_note == "random (seed 3)"
    assert weights.digest(made.module) == weights.digest(again.module)
    with torch.no_grad():
        assert made(torch.zeros(1, *made.inputs.shape)).shape == (1, 1000)


def test_timm_sizes_and_settings() -> None:
    library("timm")
    made = load_model(
        "timm:vit_tiny_patch16_224", weights="random", image_size=32, settings={"depth": 1, "num_classes": 7}
    )
    assert made.inputs.shape == (3, 32, 32)
    assert made.classes == 7
    with torch.no_grad():
        assert made(torch.zeros(1, 3, 32, 32)).shape == (1, 7)
    assert load_model("timm:resnet10t", weights="random", image_size=64).inputs.shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        (
            "timm:resnet5O",
            {},
            UnknownNameError,
            r"unknown timm model 'resnet5O'; did you mean 'resnet.*\d names",
        ),
        ("timm:resnet50.b1_in1k", {}, UnknownNameError, "unknown weights of timm:resnet50 'b1_in1k'; did you mean"),
        ("timm:resnet10t", {"settings": {"widht": 2}}, BadValueError, "with .'widht': 2. cannot be made: "),
        ("timm:resnet10t", {"weights": "pretrained"}, BadFileError, "no pretrained weights: not in the cache"),
    ],
)
def test_timm_refuses(source: str, options: dict, kind: type[Exception], message: str) -> None:
    library("timm")
    with pytest.raises(kind, match=message):
        load_model(source, **options)


def test_torchvision(tmp_path: Path) -> None:
    torchvision = library("torchvision")
    made = load_model("torchvision:mobilenet_v3_small", seed=1)
    assert (made.weights, made.classes) == ("random", 1000)
    assert "no network in tests" in made.weights_note
    assert (made.inputs.shape, made.inputs.crop) == ((3, 224, 224), 224 / 256)
    # what lies in torch's cache is pretrained, if its hash says so
    chosen = torchvision.models.get_model_weights("mobilenet_v3_small").DEFAULT
    cache = tmp_path / "torch" / "hub" / "checkpoints"
    cache.mkdir(parents=True)
    (cache / chosen.url.rpartition("/")[2]).write_bytes(pickle.dumps(Hostile()))
    damaged = load_model("torchvision:mobilenet_v3_small", seed=1)
    assert damaged.weights == "random"
    torch.save(made.module.state_dict(), cache / chosen.url.rpartition("/")[2])
    found = load_model("torchvision:mobilenet_v3_small")
    assert found.weights == "pretrained"
    assert "MobileNet_V3_Small_Weights" in found.weights_note
    assert weights.digest(found.module) == weights.digest(made.module)


def test_torchvision_refuses() -> None:
    library("torchvision")
    with pytest.raises(UnknownNameError, match="unknown torchvision model 'resnet1'; did you mean"):
        load_model("torchvision:resnet1")
    with pytest.raises(BadFileError, match="torchvision:alexnet: no pretrained weights"):
        load_model("torchvision:alexnet", weights="pretrained")
    with pytest.raises(BadValueError, match="cannot be made"):
        load_model("torchvision:alexnet", settings={"nothing": 1})


TINY = {"n_layer": 1, "n_embd": 24, "n_head": 2, "vocab_size": 300, "n_positions": 20}


def test_transformers_decoder() -> None:
    library("transformers")
    made = load_model("hf:gpt2", settings=TINY, seed=2)
    assert (made.task, made.weights) == ("next-token", "random")
    assert made.inputs == TokenInput(300, 20)
    assert made(torch.zeros(2, 5, dtype=torch.int64)).shape == (2, 5, 300)
    assert load_model("hf:gpt2", settings=TINY, length=6).inputs.length == 6
    with pytest.raises(BadValueError, match="reads at most 20 tokens, not 21"):
        load_model("hf:gpt2", settings=TINY, length=21)


def test_transformers_encoder_and_image_classifier() -> None:
    library("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    made = load_model("hf:bert", weights="random", settings={**sizes, "vocab_size": 300})
    assert made.task == "masked-token"
    assert made.inputs.mask == 103
    image = load_model("hf:google/vit-base-patch16-224", weights="random", image_size=32, settings=sizes)
    assert (image.task, image.classes, image.inputs.shape) == ("classification", 1000, (3, 32, 32))
    with torch.no_grad():
        assert image(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)


def test_transformers_folder(tmp_path: Path) -> None:
    """A folder of a model is pretrained: its own weights, none of its code."""
    transformers = library("transformers")
    config = transformers.GPT2Config(**TINY)
    torch.manual_seed(9)
    trained = transformers.GPT2LMHeadModel(config).eval()
    trained.save_pretrained(tmp_path / "net")
    made = load_model(f"hf:{tmp_path / 'net'}")
    assert made.weights == "pretrained"
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(made(ids), trained(ids).logits)
    assert load_model(f"hf:{tmp_path / 'net'}", weights="random").weights == "random"
    file = tmp_path / "net" / "config.json"
    stored = json.loads(file.read_text())
    file.write_text(json.dumps(stored | {"auto_map": {"AutoModelForCausalLM": "evil.Net"}}))
    with pytest.raises(UnsupportedError, match="code of its repository, which is not run"):
        load_model(f"hf:{tmp_path / 'net'}")
    for content, message in (("{", "not valid JSON"), ("[]", "names no 'model_type'"), ("{}", "names no 'model_type'")):
        file.write_text(content)
        with pytest.raises(BadFileError, match=message):
            load_model(f"hf:{tmp_path / 'net'}")
    file.unlink()
    with pytest.raises(BadFileError, match=r"has no config\.json"):
        load_model(f"hf:{tmp_path / 'net'}")


def test_transformers_folder_with_a_tokenizer(tmp_path: Path) -> None:
    transformers = library("transformers")
    tokenizers = pytest.importorskip("tokenizers", reason="tokenizers is not installed")
    words = {"one": 0, "two": 1, "three": 2, "?": 3}
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="?"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    transformers.GPT2LMHeadModel(transformers.GPT2Config(**TINY)).save_pretrained(tmp_path)
    transformers.PreTrainedTokenizerFast(tokenizer_object=made, unk_token="?").save_pretrained(tmp_path)
    found = load_model(f"hf:{tmp_path}")
    assert found.inputs.tokenizer("three two\nfour one") == [2, 1, 3, 0]
    # a vocabulary that the model does not have is another model's
    small_net = transformers.GPT2LMHeadModel(transformers.GPT2Config(**{**TINY, "vocab_size": 3}))
    small_net.save_pretrained(tmp_path)
    assert load_model(f"hf:{tmp_path}").inputs.tokenizer is None


def test_transformers_folder_with_an_image_processor(tmp_path: Path) -> None:
    transformers = library("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=32, num_labels=5)
    transformers.ViTForImageClassification(config).save_pretrained(tmp_path)
    stored = {
        "image_processor_type": "ViTImageProcessor",
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 3,
        "size": {"height": 32, "width": 32},
    }
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(stored))
    found = load_model(f"hf:{tmp_path}")
    assert (found.weights, found.classes) == ("pretrained", 5)
    assert found.inputs == ImageInput((3, 32, 32), (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 1.0, "bicubic")


@pytest.mark.parametrize(
    ("source", "options", "kind", "message"),
    [
        ("hf:gtp2", {}, UnknownNameError, "unknown hf model 'gtp2'; did you mean 'gpt2'"),
        (
            "hf:someone/something",
            {},
            BadFileError,
            "the configuration of hf:someone/something is not to be had: not in",
        ),
        (
            "hf:gpt2",
            {"settings": {"n_layers": 1}},
            UnknownNameError,
            "field of the configuration of hf:gpt2 'n_layers'; did",
        ),
        ("hf:gpt2", {"settings": {**TINY, "n_head": 5}}, BadValueError, "cannot be made: "),
        ("hf:gpt2", {"weights": "pretrained"}, BadFileError, "no pretrained weights: not in the cache"),
        ("hf:whisper", {"weights": "random"}, UnsupportedError, "is a whisper, neither a decoder, an encoder"),
    ],
)
def test_transformers_refuses(source: str, options: dict, kind: type[Exception], message: str) -> None:
    library("transformers")
    with pytest.raises(kind, match=message):
        load_model(source, **options)
