"""Models by name: those of timm, transformers and torchvision, and any callable that returns a torch module.

Nothing here knows of LNS: what comes out is a plain module in evaluation mode, what it wants to be fed with, and where
its weights are from.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from lnsdeploy.errors import (
    BadFileError,
    BadTypeError,
    BadValueError,
    LNSError,
    MissingDependencyError,
    UnknownNameError,
    UnsupportedError,
)
from lnsdeploy.evaluation import weights as _weights
from lnsdeploy.evaluation.inputs import ImageInput, Input, TensorInput, TokenInput
from lnsdeploy.evaluation.names import LIBRARIES, is_model_name

Task = Literal["classification", "next-token", "masked-token", "outputs"]

PRETRAINED, RANDOM, FILE, OWN = "pretrained", "random", "file", "own"

# Sequences that a language model gets by default: long enough for attention to matter, and seconds an item on a CPU.
LENGTH = 128

# Well-known names whose configuration is that of a family with these sizes, for machines that cannot ask for it.
# Sources: Radford et al. 2019 (GPT-2), Sanh et al. 2019 (DistilGPT2), Devlin et al. 2019 (BERT), Dosovitskiy et al.
# 2021 (ViT), Touvron et al. 2021 (DeiT).
_FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", {}),
    "gpt2-medium": ("gpt2", {"n_embd": 1024, "n_layer": 24, "n_head": 16}),
    "gpt2-large": ("gpt2", {"n_embd": 1280, "n_layer": 36, "n_head": 20}),
    "gpt2-xl": ("gpt2", {"n_embd": 1600, "n_layer": 48, "n_head": 25}),
    "distilgpt2": ("gpt2", {"n_layer": 6}),
    "bert-base-uncased": ("bert", {}),
    "vit-base-patch16-224": ("vit", {"num_labels": 1000}),
    "deit-base-patch16-224": ("deit", {"num_labels": 1000}),
    "deit-tiny-patch16-224": (
        "deit",
        {"hidden_size": 192, "intermediate_size": 768, "num_attention_heads": 3, "num_labels": 1000},
    ),
}


@dataclass(eq=False)
class Model:
    """A model that is ready to run.

    Args:
        name: as it was asked for.
        module: in evaluation mode, on the CPU, float32.
        inputs: what it takes; None where only the data can tell (see :meth:`with_inputs`).
        task: what its outputs are: scores of classes, of the next token, of hidden tokens, or any numbers.
        classes: their number, where it has classes.
        weights: ``"pretrained"``, ``"random"``, ``"file"``, or ``"own"``: those that a callable gave it.
        weights_note: where they are from, or why they are random.
    """

    name: str
    module: nn.Module
    inputs: Input | None
    task: Task
    classes: int | None
    weights: str
    weights_note: str
    notes: list[str] = field(default_factory=list)

    @property
    def parameters(self) -> int:
        """The number of parameters, shared ones once."""
        return sum(p.numel() for p in self.module.parameters())

    @property
    def sequence(self) -> bool:
        """Whether it reads tokens."""
        return isinstance(self.inputs, TokenInput)

    def __call__(self, x: Tensor) -> Tensor:
        """Its outputs, scores along the last axis.

        Raises:
            UnsupportedError: it returns no tensor of scores.
        """
        found = scores_of(self.module(x), self.name)
        return found.movedim(1, -1) if self.task == "classification" and found.ndim > 2 else found


def scores_of(output: Any, name: str) -> Tensor:
    """The tensor of scores in whatever a module returned.

    Raises:
        UnsupportedError: there is none, as in detectors.
    """
    if isinstance(output, Tensor):
        return output
    for key in ("logits", "out", "prediction_logits"):
        value = output.get(key) if isinstance(output, Mapping) else getattr(output, key, None)
        if isinstance(value, Tensor):
            return value
    if isinstance(output, (tuple, list)) and output and isinstance(output[0], Tensor):
        return output[0]
    raise UnsupportedError(
        f"{name} returns {type(output).__name__} without a tensor of scores; wrap it in a module that returns one and "
        "name that as FILE.py:CALLABLE"
    )


def load_model(
    source: str,
    *,
    weights: str | None = None,
    seed: int = 0,
    image_size: int | None = None,
    length: int | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Model:
    """A model by name.

    ``timm:NAME`` and ``torchvision:NAME`` are image classifiers. ``hf:NAME`` is what transformers knows under the name:
    a repository, a folder with ``config.json``, or a family such as ``gpt2``; language models and image classifiers.
    ``FILE.py:CALLABLE`` and ``PACKAGE.MODULE:CALLABLE`` are imported and called; the callable returns a module, or a
    module and its :class:`~lnsdeploy.evaluation.inputs.ImageInput`, `TokenInput` or `TensorInput`. Code of a model
    repository is never run.

    Args:
        weights: ``"pretrained"``; ``"random"``, drawn from `seed`; or a file (:func:`~.weights.load_file`). By default
            pretrained ones if they are in a cache or can be downloaded, else random ones: `Model.weights` says which.
        image_size: height and width, where the model leaves a choice.
        length: tokens of a sequence.
        settings: further arguments of the model's constructor, or fields of its configuration.

    Raises:
        UnknownNameError: no such model; the nearest names are offered.
        MissingDependencyError: its library is not installed.
        BadValueError: an argument is wrong, or the model refuses it.
        BadFileError: the weights that were asked for are not there, or do not fit.
        UnsupportedError: the model is of a kind that has neither images nor tokens to run on.
    """
    weights = _weights.check_choice(weights)
    if not is_model_name(source):
        raise BadValueError(
            f"{source!r} names no model; write {', '.join(f'{name}:NAME' for name in LIBRARIES)}, FILE.py:CALLABLE or "
            "PACKAGE.MODULE:CALLABLE"
        )
    library, _, name = source.partition(":")
    request = _Request(source, name, weights, seed, image_size, length, dict(settings or {}))
    with warnings.catch_warnings():
        # libraries warn about their own futures
        warnings.simplefilter("ignore")
        model = _LOADERS[library](request) if library in _LOADERS else _load_callable(request)
    if weights not in (None, PRETRAINED, RANDOM):
        _weights.load_file(model.module, weights)
        model = replace(model, weights=FILE, weights_note=f"from {weights}")
    model.module.eval().requires_grad_(False)
    return model


@dataclass(frozen=True)
class _Request:
    """What was asked for."""

    source: str
    name: str
    weights: str | None
    seed: int
    image_size: int | None
    length: int | None
    settings: dict[str, Any]

    @property
    def wants_pretrained(self) -> bool:
        return self.weights in (None, PRETRAINED)

    def refuse_or_note(self, why: str) -> str:
        """The note about random weights; an error if pretrained ones were insisted on."""
        if self.weights == PRETRAINED:
            raise BadFileError(f"{self.source}: no pretrained weights: {why}")
        return f"random (seed {self.seed}), since there are no pretrained ones here: {why}"

    @property
    def random_note(self) -> str:
        return f"random (seed {self.seed})"


# ---------------------------------------------------------------------------------------------------
# Libraries


def _need(name: str, package: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise MissingDependencyError(
            f"{package} is needed for {name}: models: pip install 'lnsdeploy[models]' ({error})"
        ) from error


_FRAGMENTS: list[Any] = []


@cache
def _torchvision() -> Any:
    """torchvision, also where its compiled operators belong to another build of torch.

    PyPI's torchvision is compiled for CUDA; beside a torch for CPUs its import ends at the first operator that is not
    there. Those few serve detectors only. So they are declared, without an implementation, and the import repeated.
    """
    for _ in range(16):
        try:
            return _need("torchvision", "torchvision")
        except RuntimeError as error:
            missing = re.fullmatch(r"operator torchvision::(\w+) does not exist", str(error).strip())
            if missing is None:
                raise MissingDependencyError(
                    f"the installed torchvision does not fit torch {torch.__version__}: {_one_line(error)}"
                ) from error
            library: Any = torch.library.Library
            fragment = library("torchvision", "FRAGMENT")
            fragment.define(f"{missing[1]}(Tensor unavailable) -> Tensor")
            _FRAGMENTS.append(fragment)
            for module in [m for m in sys.modules if m.partition(".")[0] == "torchvision"]:
                del sys.modules[module]
    raise MissingDependencyError(f"the installed torchvision does not fit torch {torch.__version__}")


def _one_line(error: BaseException, limit: int = 200) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _pretrained(request: _Request, endpoint: str, load: Callable[[], Any]) -> tuple[Any, str]:
    """What `load` returns, from the cache or else from the network, and ""; or None, and why not."""
    try:
        with _weights.hub(online=False):
            return load(), ""
    except LNSError:
        raise
    except Exception as error:  # libraries raise anything when a download or a file fails
        why = _one_line(error)
    with contextlib.suppress(ImportError):
        from huggingface_hub import constants

        if constants.HF_HUB_OFFLINE:
            return None, "not in the cache, and HF_HUB_OFFLINE is set"
    if (silent := _weights.unreachable(endpoint)) is not None:
        return None, f"not in the cache, and not to be downloaded ({silent})"
    try:
        with _weights.hub(online=True):
            return load(), ""
    except Exception as error:
        why = _one_line(error)
    return None, why


def _refused(request: _Request, error: Exception) -> BadValueError:
    what = f" with {request.settings}" if request.settings else ""
    return BadValueError(f"{request.source}{what} cannot be made: {_one_line(error)}")


def _load_timm(request: _Request) -> Model:
    with contextlib.suppress(MissingDependencyError):
        _torchvision()  # timm imports it
    timm = _need("timm", "timm")
    name = request.name
    base, _, tag = name.partition(".")
    hub = name.startswith(("hf-hub:", "hf_hub:", "local-dir:"))
    if not hub:
        if not timm.is_model(base):
            raise UnknownNameError("timm model", base, timm.list_models())
        tags = [known.partition(".")[2] for known in timm.list_pretrained(f"{base}.*")]
        if tag and tag not in tags:
            raise UnknownNameError(f"weights of timm:{base}", tag, tags)
    else:
        tags = [name]
    sized = {} if request.image_size is None else {"img_size": request.image_size}

    def make(pretrained: bool) -> Any:
        try:
            with _weights.seeded(request.seed):
                return timm.create_model(name, pretrained=pretrained, **(request.settings | sized))
        except TypeError:
            if not sized:
                raise
        # convolutional nets take any size and know no such argument
        with _weights.seeded(request.seed):
            return timm.create_model(name, pretrained=pretrained, **request.settings)

    module, note = None, ""
    if request.wants_pretrained:
        if tags:
            module, note = _pretrained(request, _weights.hub_endpoint(), lambda: make(True))
        else:
            note = "none are published"
        if module is None:
            note = request.refuse_or_note(note)
    random = module is None
    if module is None:
        try:
            with _weights.hub(online=False):
                module = make(False)
        except (TypeError, ValueError, RuntimeError, AssertionError, KeyError) as error:
            raise _refused(request, error) from error
    config = timm.data.resolve_model_data_config(module)
    shape = tuple(config["input_size"])
    if isinstance(channels := request.settings.get("in_chans"), int):
        # the configuration is that of the published weights
        shape = (channels, *shape[1:])
    if request.image_size is not None:
        shape = (shape[0], request.image_size, request.image_size)
    inputs = ImageInput(
        shape,
        tuple(config["mean"])[: shape[0]],
        tuple(config["std"])[: shape[0]],
        min(1.0, float(config.get("crop_pct") or 1.0)),
        _interpolation(config.get("interpolation")),
    )
    classes = getattr(module, "num_classes", None) or None
    return _settled(
        request,
        Model(
            request.source,
            module,
            inputs,
            "classification" if classes else "outputs",
            classes,
            RANDOM if random else PRETRAINED,
            (note or request.random_note) if random else f"{module.pretrained_cfg.get('hf_hub_id') or name} of timm",
        ),
    )


def imagenet_synsets() -> list[str]:
    """The WordNet numbers of ImageNet's 1,000 classes in their order, as timm has them; none without timm."""
    try:
        with contextlib.suppress(MissingDependencyError):
            _torchvision()
        return list(_need("timm.data", "timm").ImageNetInfo().label_names())
    except (MissingDependencyError, AttributeError):
        return []


def _interpolation(value: Any) -> Any:
    name = str(getattr(value, "value", value) or "bilinear").lower()
    return name if name in ("bilinear", "bicubic", "nearest", "lanczos") else "bilinear"


def _load_torchvision(request: _Request) -> Model:
    models = _torchvision().models
    if request.name not in models.list_models():
        raise UnknownNameError("torchvision model", request.name, models.list_models())
    published = models.get_model_weights(request.name)
    chosen = published.DEFAULT if len(published) else None
    settings = dict(request.settings)
    note = ""

    def make() -> Any:
        sized = {} if request.image_size is None else {"image_size": request.image_size}
        builder = inspect.signature(models.get_model_builder(request.name))
        # a backbone's own weights would be downloaded
        plain = {name: None for name in ("weights", "weights_backbone") if name in builder.parameters}
        try:
            with _weights.seeded(request.seed):
                return models.get_model(request.name, **(settings | sized | plain))
        except (TypeError, ValueError):
            if not sized:
                raise
        with _weights.seeded(request.seed):
            return models.get_model(request.name, **(settings | plain))

    state = None
    if request.wants_pretrained:
        if chosen is None:
            note = "none are published"
        else:
            cached = Path(torch.hub.get_dir()) / "checkpoints" / chosen.url.rpartition("/")[2]
            silent = None if cached.is_file() else _weights.unreachable(chosen.url)
            if silent is not None:
                note = f"not in the cache, and not to be downloaded ({silent})"
            else:
                try:
                    state = chosen.get_state_dict(
                        progress=sys.stderr.isatty(), check_hash=True, map_location="cpu", weights_only=True
                    )
                except Exception as error:  # whatever a download or a damaged file may raise
                    note = _one_line(error)
        if state is None:
            note = request.refuse_or_note(note)
    try:
        module = make()
    except (TypeError, ValueError, RuntimeError, AssertionError) as error:
        raise _refused(request, error) from error
    if state is not None:
        try:
            wanted = module.state_dict()
            module.load_state_dict({n: v for n, v in state.items() if n in wanted})
        except RuntimeError as error:
            raise BadFileError(f"{request.source}: the published weights do not fit: {_one_line(error)}") from error
    inputs = ImageInput((3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    transform = chosen.transforms() if chosen is not None else None
    if transform is not None and hasattr(transform, "crop_size"):
        size = int(transform.crop_size[0])
        share = min(1.0, size / int(transform.resize_size[0]))
        inputs = ImageInput(
            (3, size, size), tuple(transform.mean), tuple(transform.std), share, _interpolation(transform.interpolation)
        )
    if request.image_size is not None:
        inputs = replace(inputs, shape=(3, request.image_size, request.image_size))
    classes = settings.get("num_classes") or (len(chosen.meta.get("categories", ())) if chosen is not None else 0)
    return _settled(
        request,
        Model(
            request.source,
            module,
            inputs,
            "classification",
            classes or 1000,
            RANDOM if state is None else PRETRAINED,
            (note or request.random_note) if state is None else f"{chosen} of torchvision",
        ),
    )


# ---------------------------------------------------------------------------------------------------
# transformers


def _load_hf(request: _Request) -> Model:
    with contextlib.suppress(MissingDependencyError):
        _torchvision()  # transformers imports it where it is installed
    transformers = _need("transformers", "transformers")
    with _quiet(transformers):
        return _load_hf_quietly(request, transformers)


@contextlib.contextmanager
def _quiet(transformers: Any) -> Iterator[None]:
    log = transformers.logging
    before, bars = (
        log.get_verbosity(),
        log.is_progress_bar_enabled() if hasattr(log, "is_progress_bar_enabled") else True,
    )
    log.set_verbosity(logging.CRITICAL)
    if not sys.stderr.isatty():
        log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(before)
        if bars:
            log.enable_progress_bar()


def _load_hf_quietly(request: _Request, transformers: Any) -> Model:
    name = request.name
    endpoint = _weights.hub_endpoint()
    local = Path(name).is_dir()
    config, why = None, ""
    known = _family(transformers, name)
    if local and not (Path(name) / "config.json").is_file():
        raise BadFileError(f"{name}: has no config.json, which a model of transformers has")
    if local:
        _check_json(Path(name) / "config.json")
    if local or known is None or request.wants_pretrained:
        config, why = _pretrained(
            request,
            endpoint,
            lambda: transformers.AutoConfig.from_pretrained(name, trust_remote_code=False),
        )
    if config is None and known is not None:
        config = transformers.AutoConfig.for_model(known[0], **known[1])
    if config is None:
        if local:
            raise BadFileError(f"{name}: {why}")
        families = sorted(transformers.CONFIG_MAPPING.keys()) + sorted(_FAMILIES)
        if "/" in name:
            raise BadFileError(
                f"the configuration of hf:{name} is not to be had: {why}; name a folder with its config.json, or a "
                "family of transformers (gpt2, vit, …)"
            )
        raise UnknownNameError("hf model", name, families)
    _set(config, request, known is not None)
    kind, task = _hf_kind(transformers, config, request)
    note, module = why, None
    if request.wants_pretrained and (not why or local):
        module, note = _pretrained(
            request,
            endpoint,
            lambda: kind.from_pretrained(
                name, config=config, dtype=torch.float32, trust_remote_code=False, low_cpu_mem_usage=True
            ),
        )
    if request.wants_pretrained and module is None:
        note = request.refuse_or_note(note)
    random = module is None
    if module is None:
        try:
            with _weights.seeded(request.seed):
                module = kind.from_config(config)
            module = module.float()
        except Exception as error:  # a configuration that does not fit fails anywhere
            raise _refused(request, error) from error
    if hasattr(module.config, "use_cache"):
        module.config.use_cache = False
    inputs, classes = _hf_inputs(request, transformers, module.config, task)
    return _settled(
        request,
        Model(
            request.source,
            module,
            inputs,
            task,
            classes,
            RANDOM if random else PRETRAINED,
            (note or request.random_note) if random else f"{name} of {endpoint if not local else 'that folder'}",
        ),
    )


def _check_json(file: Path) -> None:
    from lnsdeploy.files import MAX_TEXT_BYTES, read_bytes

    try:
        found = json.loads(read_bytes(file, limit=MAX_TEXT_BYTES))
    except (ValueError, RecursionError) as error:
        raise BadFileError(f"{file}: not valid JSON: {error}") from error
    if not isinstance(found, dict) or not isinstance(found.get("model_type"), str):
        raise BadFileError(f"{file}: names no 'model_type'")
    if found.get("auto_map"):
        raise UnsupportedError(
            f"{file}: the model is code of its repository, which is not run; name your own copy as FILE.py:CALLABLE"
        )


def _family(transformers: Any, name: str) -> tuple[str, dict[str, Any]] | None:
    """The family whose default configuration a name stands for, with what differs."""
    last = name.rpartition("/")[2]
    if last in _FAMILIES:
        return _FAMILIES[last]
    return (name, {}) if name in transformers.CONFIG_MAPPING else None


def _set(config: Any, request: _Request, resize: bool) -> None:
    """Fields of the configuration that were asked for."""
    changes = dict(request.settings)
    if request.image_size is not None and hasattr(config, "image_size"):
        changes.setdefault("image_size", request.image_size)
    known = [n for n in {**config.to_dict(), **getattr(config, "attribute_map", {})} if not n.startswith("_")]
    for key, value in changes.items():
        if key not in known and not hasattr(config, key):
            raise UnknownNameError(f"field of the configuration of {request.source}", key, known)
        try:
            setattr(config, key, value)
        except Exception as error:  # validators of the library
            raise _refused(request, error) from error


def _hf_kind(transformers: Any, config: Any, request: _Request) -> tuple[Any, Task]:
    kinds: list[tuple[str, Task]] = [
        ("ForCausalLM", "next-token"),
        ("ForMaskedLM", "masked-token"),
        ("ForImageClassification", "classification"),
    ]
    models = transformers.models.auto.modeling_auto
    named = " ".join(getattr(config, "architectures", None) or [])
    tables = {
        "ForCausalLM": models.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        "ForMaskedLM": models.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        "ForImageClassification": models.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
    }
    # what the files say that they are, or else the first kind that the family has: encoders before decoders
    order = [k for k in kinds if k[0] in named or (k[0] == "ForCausalLM" and "LMHead" in named)]
    if not order:
        order = [kinds[1], kinds[0], kinds[2]] if config.model_type in tables["ForMaskedLM"] else kinds
    for suffix, task in order:
        if config.model_type in tables[suffix] and not getattr(config, "is_encoder_decoder", False):
            return getattr(transformers, f"AutoModel{suffix}"), task
    raise UnsupportedError(
        f"{request.source} is a {config.model_type}, neither a decoder, an encoder with a head for tokens, nor an "
        "image classifier; wrap it in a module that returns scores and name that as FILE.py:CALLABLE"
    )


def _hf_inputs(request: _Request, transformers: Any, config: Any, task: Task) -> tuple[Input, int | None]:
    if task == "classification":
        size = request.image_size or getattr(config, "image_size", None) or 224
        size = max(size) if isinstance(size, (tuple, list)) else int(size)
        channels = int(getattr(config, "num_channels", 3))
        mean, std, how = (0.5,) * channels, (0.5,) * channels, "bilinear"
        found, _ = _cached(lambda: transformers.AutoImageProcessor.from_pretrained(request.name))
        if found is not None:
            mean = tuple(getattr(found, "image_mean", None) or mean)
            std = tuple(getattr(found, "image_std", None) or std)
            how = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}.get(
                getattr(found, "resample", 2), "bilinear"
            )
            wanted = getattr(found, "size", None)
            if request.image_size is None and getattr(config, "image_size", None) is None and wanted:
                size = int(wanted.get("height") or wanted.get("shortest_edge") or size)
        return ImageInput((channels, size, size), mean, std, 1.0, _interpolation(how)), int(config.num_labels)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    vocabulary = int(text.vocab_size)
    longest = next(
        (
            v
            for n in ("n_positions", "max_position_embeddings")
            if isinstance(v := getattr(text, n, None), int) and v > 0
        ),
        1 << 20,
    )
    if request.length is not None and request.length > longest:
        raise BadValueError(f"{request.source} reads at most {longest} tokens, not {request.length}")
    tokenizer, mask = None, None
    found, _ = _cached(lambda: transformers.AutoTokenizer.from_pretrained(request.name, trust_remote_code=False))
    if found is not None and len(found) <= vocabulary:
        tokenizer = _tokenizer(found)
        mask = found.mask_token_id
    if task == "masked-token" and mask is None:
        # BERT's place for it; any rare token serves where no text is read
        mask = min(103, vocabulary - 1)
    length = request.length or min(longest, LENGTH)
    return TokenInput(vocabulary, length, tokenizer, mask), vocabulary


def _cached(load: Callable[[], Any]) -> tuple[Any, str]:
    """What `load` finds in the cache or in a folder, or None."""
    try:
        with _weights.hub(online=False):
            return load(), ""
    except Exception as error:  # whatever a missing or foreign file makes a library raise
        return None, _one_line(error)


def _tokenizer(found: Any) -> Callable[[str], list[int]]:
    def tokens(text: str) -> list[int]:
        return list(found(text, add_special_tokens=False, verbose=False)["input_ids"])

    return tokens


# ---------------------------------------------------------------------------------------------------
# Callables


def _load_callable(request: _Request) -> Model:
    place, _, function = request.source.rpartition(":")
    if request.weights == PRETRAINED:
        raise BadValueError(
            f"{request.source} has the weights that it gives itself; name a file, or leave --weights out"
        )
    # a file that seeds torch itself does not choose the weights
    with torch.random.fork_rng(devices=[]):
        made: Any = _import(place, request.source)
    with _weights.seeded(request.seed):
        for part in function.split("."):
            if not hasattr(made, part):
                raise UnknownNameError(f"name in {place}", part, [n for n in vars(made) if not n.startswith("_")])
            made = getattr(made, part)
        if not isinstance(made, nn.Module):
            if not callable(made):
                raise BadTypeError(f"{request.source} is {type(made).__name__}, neither a module nor a callable")
            try:
                made = made(**request.settings)
            except LNSError:
                raise
            except Exception as error:  # the user's code
                raise BadValueError(f"{request.source} raised {type(error).__name__}: {_one_line(error)}") from error
    inputs: Any = None
    if isinstance(made, tuple) and len(made) == 2:
        made, inputs = made
    if not isinstance(made, nn.Module):
        raise BadTypeError(f"{request.source} returned {type(made).__name__}; it must return a torch.nn.Module")
    if inputs is not None and not isinstance(inputs, (ImageInput, TokenInput, TensorInput)):
        raise BadTypeError(
            f"{request.source} returned a module and {type(inputs).__name__}; the second must be an ImageInput, "
            "TokenInput or TensorInput of lnsdeploy.evaluation.inputs"
        )
    if inputs is None:
        inputs = _guess(made, request)
    if isinstance(inputs, ImageInput) and request.image_size is not None:
        inputs = replace(inputs, shape=(inputs.shape[0], request.image_size, request.image_size))
    if isinstance(inputs, TokenInput) and request.length is not None:
        inputs = replace(inputs, length=request.length)
    task: Task = "classification"
    if isinstance(inputs, TokenInput):
        task = "next-token" if inputs.mask is None else "masked-token"
    elif isinstance(inputs, TensorInput):
        task = "outputs"
    if request.weights == RANDOM:
        with _weights.seeded(request.seed):
            for layer in made.modules():
                if callable(reset := getattr(layer, "reset_parameters", None)):
                    reset()
        return Model(request.source, made.float(), inputs, task, None, RANDOM, request.random_note)
    return Model(request.source, made.float(), inputs, task, None, OWN, f"as {request.source} makes them")


def _import(place: str, source: str) -> Any:
    try:
        if not place.endswith(".py"):
            return importlib.import_module(place)
        file = Path(place)
        if not file.is_file():
            raise BadFileError(f"cannot read {file}: no such file")
        name = f"lnsdeploy_model_{file.stem}"
        spec = importlib.util.spec_from_file_location(name, file)
        if spec is None or spec.loader is None:
            raise BadFileError(f"{file}: not a Python file")
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module
        # as for a script: it may import what lies beside it
        sys.path.insert(0, str(file.resolve().parent))
        try:
            spec.loader.exec_module(module)
        finally:
            sys.path.remove(str(file.resolve().parent))
        return module
    except LNSError:
        raise
    except ModuleNotFoundError as error:
        if not place.endswith(".py") and error.name == place.partition(".")[0]:
            raise UnknownNameError("library or Python module", place, LIBRARIES) from error
        raise BadValueError(f"{source}: {_one_line(error)}") from error
    except Exception as error:  # the user's code
        raise BadValueError(f"{source}: importing it raised {type(error).__name__}: {_one_line(error)}") from error


def _guess(module: nn.Module, request: _Request) -> Input | None:
    """What a module takes, from its first layer, or None where only the data can tell."""
    for part in module.modules():
        if isinstance(part, nn.Embedding):
            return TokenInput(part.num_embeddings, request.length or LENGTH)
        if isinstance(part, nn.Conv2d) and part.in_channels in (1, 3) and request.image_size is not None:
            return ImageInput((part.in_channels, request.image_size, request.image_size))
        if isinstance(part, (nn.Linear, nn.modules.conv._ConvNd, nn.RNNBase)):
            return None
    return None


def with_inputs(model: Model, shape: tuple[int, ...] | None) -> Model:
    """The model with inputs, those of the data where it says none of its own.

    Args:
        shape: of an image of the data; None where the data have no shape of their own.

    Raises:
        BadValueError: nobody says what the model takes.
    """
    if model.inputs is not None:
        return model
    first = next((p for p in model.module.modules() if isinstance(p, (nn.Linear, nn.modules.conv._ConvNd))), None)
    if shape is not None and len(shape) == 3:
        # grey images for a net that sees colours are made so
        sees = first.in_channels if isinstance(first, nn.Conv2d) and first.in_channels in (1, 3) else shape[0]
        return replace(model, inputs=ImageInput((sees, shape[1], shape[2])))
    if isinstance(first, nn.Linear):
        return replace(model, inputs=TensorInput((first.in_features,)), task="outputs")
    raise BadValueError(
        f"{model.name} does not say what it takes; give --image-size, or let it return the module and an ImageInput, "
        "TokenInput or TensorInput of lnsdeploy.evaluation.inputs"
    )


def _settled(request: _Request, model: Model) -> Model:
    """The model, its weights fit to measure with if they are random and no file will replace them."""
    if model.weights != RANDOM or request.weights not in (None, PRETRAINED, RANDOM):
        return model
    from lnsdeploy.evaluation.samples import synthetic

    model.module.eval()
    sample = None
    if model.inputs is not None and not model.sequence:
        sample = synthetic(model.inputs, seed=request.seed, limit=8).batch(0, 8).inputs
    _weights.settle_(model.module, sample, request.seed)
    return model


_LOADERS: dict[str, Callable[[_Request], Model]] = {
    "timm": _load_timm,
    "hf": _load_hf,
    "torchvision": _load_torchvision,
}
