"""Run directories: what a training leaves, and how it is read back (docs/training.md).

A run directory holds ``config.toml`` (everything that decided the weights), ``weights.safetensors`` (when the training
is finished), ``metrics.csv``, ``curve.png``, ``deployed.onnx`` (of a training through a datapath) and, until it is
finished, ``checkpoint.safetensors``. Nothing in it is pickled, and reading it executes nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lnsdeploy import __version__
from lnsdeploy.datapath import load_datapath
from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, LNSError, UnknownNameError, UnsupportedError
from lnsdeploy.evaluation.names import is_model_name
from lnsdeploy.fields import check_choice, check_integer, check_string
from lnsdeploy.files import dump_toml, read_bytes, read_safetensors, read_toml, write_safetensors, write_text
from lnsdeploy.formats import METHODS, LNSFormat, LNSTensor, Method
from lnsdeploy.recipe import FLOAT, GRANULARITIES, Granularity, LayerRecipe, Recipe
from lnsdeploy.training.arrays import names_arrays
from lnsdeploy.training.data import Dataset, data_names, load_data
from lnsdeploy.training.layers import prepare_
from lnsdeploy.training.madam import upper_words
from lnsdeploy.training.models import MODELS, build_model, runs_code
from lnsdeploy.training.text import Text, is_text

CONFIG = "config.toml"
WEIGHTS = "weights.safetensors"
METRICS = "metrics.csv"
CURVE = "curve.png"
CHECKPOINT = "checkpoint.safetensors"
STEPS = "steps.csv"
DEPLOYED = "deployed.onnx"
FILES = (WEIGHTS, CHECKPOINT, METRICS, STEPS, CURVE, DEPLOYED, CONFIG)

OPTIMIZERS = ("madam", "integer-madam", "lns-madam", "adam", "sgd")
INTEGER_OPTIMIZERS = ("integer-madam", "lns-madam")
SCHEDULES = ("cosine", "constant", "linear", "step")
AUGMENTATIONS = ("none", "crop", "flip", "crop+flip")
EMULATIONS = ("forward", "both")
LEARNING_RATES = {"madam": 0.03, "integer-madam": 0.03, "lns-madam": 0.03, "adam": 0.003, "sgd": 0.05}
# Passes over the training set by (data, model); enough for the curve to be flat at its end.
EPOCHS = {("digits", "mlp"): 60, ("digits", "cnn"): 40, ("", "mlp"): 20, ("", "cnn"): 8}
_OTHER_EPOCHS = 10
# Options of optimizers that a user may set, beside the learning rate.
_MADAM_SETTINGS = ("beta", "g_bound", "p_scale", "p_max", "eps", "rule", "additive_scale", "sign_flip")
OPTIMIZER_SETTINGS: dict[str, tuple[str, ...]] = {
    "madam": (*_MADAM_SETTINGS, "range_octaves"),
    "integer-madam": (*_MADAM_SETTINGS, "rounding", "init"),
    "lns-madam": (*_MADAM_SETTINGS, "rounding", "init"),
    "adam": ("beta1", "beta2", "eps"),
    "sgd": ("momentum",),
}

_MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights of a training.

    Args:
        data: data set, see :func:`lnsdeploy.training.data.load_data`.
        data_dir: its folder; what counts is its content, so a moved folder does not change a run.
        model: a name that :func:`~lnsdeploy.training.models.build_model` knows.
        bits, gamma: format of weights and activations, with lns-madam also of errors and gradients.
        weights, activations, errors, gradients: their formats where they differ, as ``"6:4"``, or ``"float"``. Errors
            are the gradients of layers' outputs, gradients those of weights.
        as_float: train in float32; formats do not count then.
        granularity, calibration: see :class:`~lnsdeploy.recipe.LayerRecipe`.
        recipe: formats layer by layer, instead of the seven fields above.
        optimizer: ``"madam"``, ``"integer-madam"``, ``"lns-madam"``, ``"adam"`` or ``"sgd"``.
        update_bits, update_gamma: format of the codes that integer-madam holds and moves (16:2048). With lns-madam the
            width alone, since γ follows from that of the layer's words.
        lr: learning rate; each optimizer has its default.
        epochs: passes over the training set; a default for each data set and model.
        batch_size: samples of a step, at most.
        seed: of the initial weights, of the order of the samples, of stochastic rounding.
        schedule: ``"cosine"`` or ``"linear"`` to zero, ``"step"`` (a tenth after half of the steps, and again after
            three quarters), or ``"constant"``.
        threads: of torch; sums are split by threads, so they count.
        warmup: steps in which the learning rate rises from zero.
        label_smoothing: share of the target that goes to all classes, 0 to 1.
        weight_decay: of adam (decoupled, Loshchilov and Hutter 2019) and sgd. Weights of madam are bounded instead.
        grad_clip: bound of the gradient's norm over all parameters.
        augment: ``"none"``, ``"crop"`` (shifts by up to an eighth of the width), ``"flip"`` (left and right), or both.
        limit: train on that many samples, of each class in proportion, drawn by `seed`; of a text, on its beginning.
        image_size: of a folder's images.
        context: characters that a model of text sees at a time, 64 by default.
        emulate: run every product through `datapath` bit for bit while training, in the ``"forward"`` pass or in
            ``"both"``.
        datapath: a name or a TOML file.
        init_from: a run directory or a weights file whose weights the training begins with.
        model_settings: of the model's constructor, by name.
        optimizer_settings: of the optimizer's, by name.
        device: ``"cpu"``, ``"cuda"``, or ``"cuda:N"``.
        deterministic: ask torch for operations that repeat themselves to the bit; on a GPU they are slower.

    Raises:
        BadTypeError, BadValueError, UnknownNameError: a field is wrong; the message names it.
    """

    data: str = "digits"
    data_dir: str | None = None
    model: str = "mlp"
    bits: int = 8
    gamma: int = 8
    weights: str | None = None
    activations: str | None = None
    as_float: bool = False
    granularity: Granularity = "channel"
    calibration: Method = "absmax"
    recipe: Recipe | None = None
    optimizer: str = "madam"
    update_bits: int | None = None
    update_gamma: int | None = None
    lr: float | None = None
    epochs: int | None = None
    batch_size: int = 64
    seed: int = 0
    schedule: str = "cosine"
    threads: int = 1
    errors: str | None = None
    gradients: str | None = None
    warmup: int = 0
    label_smoothing: float = 0.0
    weight_decay: float = 0.0
    grad_clip: float | None = None
    augment: str = "none"
    limit: int | None = None
    image_size: int | None = None
    context: int | None = None
    emulate: str | None = None
    datapath: str | None = None
    init_from: str | None = None
    model_settings: Mapping[str, Any] | None = None
    optimizer_settings: Mapping[str, Any] | None = None
    device: str = "cpu"
    deterministic: bool = True

    def __post_init__(self) -> None:
        check_string("data", self.data)
        if not is_text(self.data) and not names_arrays(self.data):
            check_choice("data", self.data, data_names())
        check_string("model", self.model)
        if not is_model_name(self.model):
            check_choice("model", self.model, tuple(MODELS))
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("calibration", self.calibration, METHODS)
        if self.data_dir is not None:
            check_string("data_dir", self.data_dir)
        LNSFormat(self.bits, self.gamma)
        for field in ("weights", "activations", "errors", "gradients"):
            value = getattr(self, field)
            if value not in (None, FLOAT):
                try:
                    object.__setattr__(self, field, str(LNSFormat.parse(value)))
                except LNSError as error:
                    raise BadValueError(f"{field}: {error}") from error
        if not isinstance(self.as_float, bool):
            raise BadTypeError(f"as_float must be true or false, not {self.as_float!r}")
        if self.recipe is not None:
            if not isinstance(self.recipe, Recipe):
                raise BadTypeError(f"recipe must be a Recipe, not {self.recipe!r}")
            if self.as_float:
                raise BadValueError("as_float: a recipe says which formats to train; leave one of the two out")
        self._resolve()
        check_integer("epochs", self.epochs, 1, 1_000_000)
        check_integer("batch_size", self.batch_size, 1, 1 << 24)
        check_integer("seed", self.seed, 0, _MAX_SEED)
        check_integer("threads", self.threads, 1, 1024)
        if isinstance(self.lr, bool) or not isinstance(self.lr, (int, float)):
            raise BadTypeError(f"lr must be a number above 0, not {self.lr!r}")
        if not 0 < self.lr < math.inf:
            raise BadValueError(f"lr must be a number above 0, not {self.lr}")
        object.__setattr__(self, "lr", float(self.lr))
        self._check_later_fields()

    def _check_later_fields(self) -> None:
        check_choice("augment", self.augment, AUGMENTATIONS)
        check_integer("warmup", self.warmup, 0, 1 << 40)
        if self.augment != "none" and is_text(self.data):
            raise BadValueError(f"augment: {self.augment!r} is for images, not for text")
        for field, end in (("label_smoothing", 1.0), ("weight_decay", math.inf), ("grad_clip", math.inf)):
            value = getattr(self, field)
            if value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise BadTypeError(f"{field} must be a number, not {value!r}")
            if not 0 <= value < end or (field == "grad_clip" and value == 0):
                raise BadValueError(f"{field} must be {'above' if field == 'grad_clip' else 'at least'} 0, not {value}")
            object.__setattr__(self, field, float(value))
        if self.weight_decay and self.optimizer not in ("adam", "sgd"):
            raise BadValueError(
                f"weight_decay belongs to adam and sgd; {self.optimizer} bounds weights instead (p_scale in "
                "optimizer_settings)"
            )
        for field in ("limit", "image_size", "context"):
            if getattr(self, field) is not None:
                check_integer(field, getattr(self, field), 1, 1 << 31)
        if (self.emulate is None) != (self.datapath is None):
            raise BadValueError("emulate and datapath belong together: which passes, and through which arithmetic")
        if self.emulate is not None:
            check_choice("emulate", self.emulate, EMULATIONS)
            check_string("datapath", self.datapath)
            load_datapath(str(self.datapath))
        if self.init_from is not None:
            check_string("init_from", self.init_from)
        if not isinstance(self.deterministic, bool):
            raise BadTypeError(f"deterministic must be true or false, not {self.deterministic!r}")
        check_string("device", self.device)
        if not re.fullmatch(r"cpu|cuda(:\d{1,3})?", self.device):
            raise BadValueError(f"device must be cpu, cuda or cuda:N, not {self.device!r}")
        for field in ("model_settings", "optimizer_settings"):
            value = getattr(self, field)
            if value is None:
                continue
            if not isinstance(value, Mapping) or not all(
                isinstance(k, str) and isinstance(v, (bool, int, float, str)) for k, v in value.items()
            ):
                raise BadTypeError(f"{field} must be names with numbers, texts or booleans, not {value!r}")
            object.__setattr__(self, field, dict(value) or None)
        for key in self.optimizer_settings or {}:
            if key not in OPTIMIZER_SETTINGS[self.optimizer]:
                raise UnknownNameError(f"setting of {self.optimizer}", key, OPTIMIZER_SETTINGS[self.optimizer])

    def _resolve(self) -> None:
        """Fill in what was left open, so that a config says what will happen."""
        if self.lr is None:
            object.__setattr__(self, "lr", LEARNING_RATES[self.optimizer])
        if self.epochs is None:
            found = EPOCHS.get((self.data, self.model), EPOCHS.get(("", self.model), _OTHER_EPOCHS))
            object.__setattr__(self, "epochs", found)
        if self.optimizer != "integer-madam" and self.update_gamma is not None:
            raise BadValueError(f"update_gamma belongs to integer-madam; leave it out with {self.optimizer}")
        if self.optimizer not in INTEGER_OPTIMIZERS:
            if self.update_bits is not None:
                raise BadValueError(
                    f"update_bits belongs to integer-madam and lns-madam; leave it out with {self.optimizer}"
                )
            return
        if self.update_bits is None:
            object.__setattr__(self, "update_bits", 16)
        check_integer("update_bits", self.update_bits, 2, 32)
        assert self.update_bits is not None
        if self.optimizer == "lns-madam":
            if self.as_float:
                raise BadValueError("lns-madam trains words; for the yardstick in float32 take another optimizer")
            return
        if self.update_gamma is None:
            # 16 octaves, or where codes are few, at least the 7 that one code an octave needs
            object.__setattr__(self, "update_gamma", max(1, 1 << (self.update_bits - 1) >> 4))
        LNSFormat(self.update_bits, self.update_gamma)  # type: ignore[arg-type]

    @property
    def is_text(self) -> bool:
        """Whether it trains on text."""
        return is_text(self.data)

    def layer_recipe(self) -> LayerRecipe:
        """The formats that `bits`, `gamma`, `weights`, `activations`, `errors` and `gradients` give."""
        both = LNSFormat(self.bits, self.gamma)

        def named(text: str | None, otherwise: LNSFormat | None) -> LNSFormat | None:
            if text is None:
                return otherwise
            return None if text == FLOAT else LNSFormat.parse(text)

        backward = both if self.optimizer == "lns-madam" else None
        return LayerRecipe(
            weight=named(self.weights, both),
            activation=named(self.activations, both),
            error=named(self.errors, backward),
            gradient=named(self.gradients, backward),
            granularity=self.granularity,
            calibration=self.calibration,
        )

    def full_recipe(self) -> Recipe | None:
        """The recipe that the net is prepared with; None in float32."""
        if self.as_float:
            return None
        return self.recipe or Recipe(self.layer_recipe())

    def to_dict(self) -> dict[str, Any]:
        """Plain data for TOML; fields that are None, and the recipe, are left out."""
        made = {
            f.name: getattr(self, f.name)
            for f in dataclasses.fields(self)
            # what was added later is only written where it says something, so that older runs stay what they are
            if f.name not in _LATER or getattr(self, f.name) != f.default
        }
        return {key: value for key, value in made.items() if value is not None and key != "recipe"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, recipe: Recipe | None = None, where: str = "config") -> TrainConfig:
        """Inverse of :meth:`to_dict`.

        Raises:
            BadFileError: a field is unknown or wrong; the message names it and `where`.
        """
        if not isinstance(data, Mapping):
            raise BadFileError(f"{where}: [train] must be a table of fields, not {data!r}")
        known = {f.name for f in dataclasses.fields(cls)} - {"recipe"}
        try:
            for key in data:
                if key not in known:
                    raise UnknownNameError("field", key, known)
            return cls(**dict(data), recipe=recipe)
        except LNSError as error:
            raise BadFileError(f"{where}: {error}") from error

    def model_for(self, shape: tuple[int, ...], classes: int) -> nn.Module:
        """The net, initialised and prepared, in training mode."""
        model = build_model(self.model, shape, classes, seed=self.seed, settings=self.model_settings)
        recipe = self.full_recipe()
        return model if recipe is None else prepare_(model, recipe)


_LATER = (
    "errors",
    "gradients",
    "warmup",
    "label_smoothing",
    "weight_decay",
    "grad_clip",
    "augment",
    "limit",
    "image_size",
    "context",
    "emulate",
    "datapath",
    "init_from",
    "model_settings",
    "optimizer_settings",
    "device",
    "deterministic",
)
# Where a training runs and begins is not what it is; the digest of what it begins with is.
_PLACES = ("data_dir", "init_from", "device")


# ---------------------------------------------------------------------------------------------------
# config.toml


def config_table(
    config: TrainConfig, dataset: Dataset | Text, shape: tuple[int, ...], samples: tuple[int, int], start: str | None
) -> dict[str, Any]:
    """What config.toml holds.

    Args:
        shape: of one input.
        samples: numbers of training and of test samples.
        start: digest of the weights that the training begins with, where they are not initialised.
    """
    recipe = config.full_recipe()
    table: dict[str, Any] = {"lnsdeploy": __version__, "train": config.to_dict()}
    if recipe is not None:
        table["recipe"] = recipe.to_dict()
    table["dataset"] = {
        "source": dataset.source,
        "shape": list(shape),
        "classes": dataset.classes,
        "train": samples[0],
        "test": samples[1],
        "digest": dataset.digest,
    }
    if isinstance(dataset, Text):
        table["dataset"]["vocabulary"] = dataset.vocabulary
    if start is not None:
        table["start"] = {"digest": start}
    table["environment"] = {"torch": torch.__version__, "numpy": np.__version__, "threads": config.threads}
    return table


def identity(table: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config table that decides the weights: not where data lie, nor the versions of programs."""
    train = {key: value for key, value in table["train"].items() if key not in _PLACES}
    if is_text(str(train.get("data", ""))):
        train["data"] = "text"
    dataset = {key: table["dataset"][key] for key in ("shape", "classes", "digest")}
    found = {"train": train, "recipe": table.get("recipe", {}), "dataset": dataset}
    return found | ({"start": table["start"]} if "start" in table else {})


def identity_hash(table: Mapping[str, Any]) -> str:
    """16 hexadecimal digits of :func:`identity`, which weights and checkpoints carry."""
    text = json.dumps(identity(table), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def read_config(folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    """The config of a run directory, and the whole table.

    Raises:
        BadFileError: it is missing, not TOML, or a field is missing or wrong.
    """
    path = folder / CONFIG
    if not path.is_file():
        raise BadFileError(f"{folder}: not a run directory ({CONFIG} is missing)")
    table = read_toml(path)
    for part, needed in (("train", ()), ("dataset", ("shape", "classes", "digest"))):
        if not isinstance(table.get(part), Mapping):
            raise BadFileError(f"{path}: the table [{part}] is missing")
        for key in needed:
            if key not in table[part]:
                raise BadFileError(f"{path}: dataset.{key} is missing")
    shape, classes = table["dataset"]["shape"], table["dataset"]["classes"]
    if not (isinstance(shape, list) and 1 <= len(shape) <= 4 and all(_is_size(n, 1 << 16) for n in shape)):
        raise BadFileError(f"{path}: dataset.shape must be a list of sizes, not {shape!r}")
    if not _is_size(classes, 1 << 20) or classes < 2:
        raise BadFileError(f"{path}: dataset.classes must be an integer from 2, not {classes!r}")
    stored = table.get("recipe")
    recipe = None if stored is None else Recipe.from_dict(stored, where=f"{path}, [recipe]")
    config = TrainConfig.from_dict(table["train"], where=str(path))
    if recipe is not None and recipe != config.full_recipe():
        config = TrainConfig.from_dict(table["train"], recipe=recipe, where=str(path))
    return config, table


def _is_size(value: Any, limit: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 1 <= value <= limit


def write_config(folder: Path, table: Mapping[str, Any]) -> None:
    """Write config.toml."""
    write_text(folder / CONFIG, dump_toml(table))


# ---------------------------------------------------------------------------------------------------
# metrics.csv

Row = dict[str, float]
COLUMNS = ("epoch", "lr", "train_loss", "train_accuracy", "test_loss", "test_accuracy", "seconds")


def write_metrics(folder: Path, history: list[Row]) -> None:
    """Write metrics.csv, a line an epoch; seconds are the epoch's own, all else is reproducible."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(COLUMNS)
    for row in history:
        # an epoch that was not evaluated has nothing there
        writer.writerow(["" if math.isnan(row[key]) else repr(row[key]) for key in COLUMNS])
    write_text(folder / METRICS, text.getvalue())


def read_metrics(folder: Path) -> list[Row]:
    """The lines of metrics.csv.

    Raises:
        BadFileError: it is missing or damaged.
    """
    path = folder / METRICS
    try:
        lines = list(csv.reader(io.StringIO(read_bytes(path, limit=1 << 26).decode("utf-8"), newline="")))
        if not lines or tuple(lines[0]) != COLUMNS:
            raise BadFileError(f"{path}: the first line must be {','.join(COLUMNS)}")
        numbers = [[float(cell) if cell else math.nan for cell in line] for line in lines[1:]]
        rows = [dict(zip(COLUMNS, row, strict=True)) for row in numbers]
    except (UnicodeDecodeError, csv.Error) as error:
        raise BadFileError(f"{path}: not a table of numbers: {error}") from error
    except BadFileError:
        raise
    except ValueError as error:
        raise BadFileError(f"{path}: not a table of numbers: {error}") from error
    return rows


# ---------------------------------------------------------------------------------------------------
# States as arrays

_NOTES = "lnsdeploy"


def write_state(path: Path, arrays: Mapping[str, npt.NDArray[Any]], notes: Mapping[str, Any]) -> None:
    """Write arrays with notes (plain data) as safetensors; the same content gives the same bytes.

    All notes are one entry of the file's metadata, because safetensors writes several in no certain order.
    """
    text = json.dumps({"version": __version__, **notes}, sort_keys=True, separators=(",", ":"))
    write_safetensors(path, arrays, {_NOTES: text})


def read_state(path: Path) -> tuple[dict[str, npt.NDArray[Any]], dict[str, Any]]:
    """Arrays and notes that :func:`write_state` wrote.

    Raises:
        BadFileError: the file is missing, damaged, or another program's.
    """
    arrays, metadata = read_safetensors(path)
    try:
        notes = json.loads(metadata[_NOTES])
    except (KeyError, ValueError, RecursionError) as error:
        raise BadFileError(f"{path}: its metadata are not lnsdeploy's ({error!r})") from error
    if not isinstance(notes, dict):
        raise BadFileError(f"{path}: its metadata are not lnsdeploy's")
    return arrays, notes


def to_arrays(state: Mapping[str, torch.Tensor]) -> dict[str, npt.NDArray[Any]]:
    """Tensors as arrays; safetensors keeps scalars as arrays of one element."""
    return {name: tensor.detach().cpu().numpy().reshape(tensor.shape or (1,)) for name, tensor in state.items()}


def load_model_state(model: nn.Module, arrays: Mapping[str, npt.NDArray[Any]], where: str) -> None:
    """Load a model's tensors from arrays, all of them and no others.

    Raises:
        BadFileError: a tensor is missing, unexpected, of another shape or dtype, or not finite.
    """
    expected = model.state_dict()
    for name in sorted(set(arrays) - set(expected)):
        raise BadFileError(f"{where}: unexpected tensor {name!r}")
    loaded = {}
    for name, tensor in expected.items():
        if name not in arrays:
            raise BadFileError(f"{where}: tensor {name!r} is missing")
        loaded[name] = checked(arrays[name], tensor, f"{where}: tensor {name!r}")
    model.load_state_dict(loaded)


def checked(array: npt.NDArray[Any], like: torch.Tensor, what: str) -> torch.Tensor:
    """An array as a tensor of the shape and dtype of `like`.

    Raises:
        BadFileError: it has another shape or dtype, or is not finite.
    """
    shape = tuple(like.shape) or (1,)
    dtype = str(like.dtype).removeprefix("torch.")
    if array.shape != shape or str(array.dtype) != dtype:
        raise BadFileError(f"{what} is {array.dtype} {array.shape}, the net needs {dtype} {shape}")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise BadFileError(f"{what} contains NaN or infinity")
    return torch.from_numpy(np.array(array)).reshape(like.shape)


# ---------------------------------------------------------------------------------------------------
# A finished run


@dataclass(frozen=True)
class Deployed:
    """The net of an emulated training as hardware runs it: lowered once, and kept as ``deployed.onnx``.

    Args:
        accuracy: fraction of the test set, on words from the first encoding to the last.
        datapath: the fingerprint of the arithmetic, for the run's default formats.
        words: SHA-256 of the output words of the whole test set, in order, each as four bytes (the lowest first).
        file: SHA-256 of the file.
    """

    accuracy: float
    datapath: str
    words: str
    file: str

    @classmethod
    def from_notes(cls, notes: Mapping[str, Any], file: Path) -> Deployed | None:
        """What the notes of a weights file say; None where nothing was deployed.

        Raises:
            BadFileError: they are damaged.
        """
        found = notes.get("deployed")
        if found is None or (isinstance(found, dict) and set(found) == {"why"}):
            return None
        try:
            made = cls(**found)
            if not (
                0 <= made.accuracy <= 1 and all(isinstance(v, str) for v in (made.datapath, made.words, made.file))
            ):
                raise ValueError("values")
        except (TypeError, ValueError) as error:
            raise BadFileError(f"{file}: damaged metadata (deployed: {error}); begin anew with --restart") from error
        return made


def digest_of_words(words: npt.NDArray[Any]) -> str:
    """SHA-256 of words [n, …], whatever integers hold them: the same on every machine and from every executor."""
    return hashlib.sha256(np.ascontiguousarray(words, dtype="<u4").tobytes()).hexdigest()


@dataclass(frozen=True, eq=False)
class Run:
    """A finished training, read back.

    Args:
        path: the run directory.
        config: how it was trained.
        model: the prepared net in eval mode, with its final weights.
        accuracy: fraction of the test set, as measured at the end of the training.
        shape, classes: of inputs and outputs.
        digest: of the data set it was trained on.
        start: of the weights it began with, if they were not initialised.
        words: the integer weights of integer-madam, by parameter name.
        history: the lines of metrics.csv.
        deployed: what an emulated training ended with, on words; None for others, and where its net has no LNS form.
    """

    path: Path
    config: TrainConfig
    model: nn.Module
    accuracy: float
    shape: tuple[int, ...]
    classes: int
    digest: str
    words: dict[str, LNSTensor]
    history: list[Row]
    start: str | None = None
    deployed: Deployed | None = None

    def deployed_file(self) -> bytes:
        """The LNS ONNX file of :attr:`deployed`.

        Raises:
            BadFileError: it is missing, or not the one that belongs to the weights.
        """
        file = self.path / DEPLOYED
        data = read_bytes(file)
        if self.deployed is None or hashlib.sha256(data).hexdigest() != self.deployed.file:
            raise BadFileError(f"{file}: is not the net of the weights beside it; begin anew with --restart")
        return data

    def dataset(self, data_dir: str | Path | None = None) -> Dataset:
        """The data set of the run.

        Args:
            data_dir: its folder, if it is not where it was.

        Raises:
            BadFileError: it is missing, or not the one the run was trained on.
        """
        if is_text(self.config.data):
            raise UnsupportedError(f"{self.path}: was trained on text, and this needs images with labels")
        found = load_data(self.config.data, data_dir or self.config.data_dir, image_size=self.config.image_size)
        if found.digest != self.digest:
            raise BadFileError(
                f"{self.path}: was trained on other data ({self.config.data}, digest {self.digest}) than "
                f"{found.source} holds (digest {found.digest}); name its folder with --data-dir"
            )
        return found

    def formats(self) -> tuple[LNSFormat, LNSFormat]:
        """Formats of weights and of activations that layers have by default; in a float32 run, `bits` and `gamma`."""
        recipe = self.config.full_recipe()
        given = self.config.layer_recipe()
        layer = given if recipe is None else recipe.default
        both = LNSFormat(self.config.bits, self.config.gamma)
        return layer.weight or both, layer.activation or both

    def metadata(self) -> dict[str, str]:
        """What an artifact says of the run it came from."""
        config = self.config
        made = {
            "data": config.data,
            "model": config.model,
            "optimizer": config.optimizer,
            "seed": str(config.seed),
            "epochs": str(config.epochs),
            "trained_accuracy": repr(self.accuracy),
            "run": identity_hash(config_table_of(self)),
        }
        if config.data_dir is not None:
            made["data_dir"] = config.data_dir
        return made


def config_table_of(run: Run) -> dict[str, Any]:
    """The deciding part of a run's config table."""
    recipe = run.config.full_recipe()
    return {
        "train": run.config.to_dict(),
        "recipe": {} if recipe is None else recipe.to_dict(),
        "dataset": {"shape": list(run.shape), "classes": run.classes, "digest": run.digest},
        **({} if run.start is None else {"start": {"digest": run.start}}),
    }


def load_run(path: str | Path, *, run_code: bool = False) -> Run:
    """Read a run directory.

    Args:
        run_code: import the module that the run names for its model (``FILE.py:CALLABLE``). Without it nothing of a
            run directory is executed, and such a run is refused.

    Raises:
        UnsupportedError: the model is made by code that is not to be run.
        BadFileError: it is not a run directory, the training is not finished, or a file is damaged or
            does not belong to the others.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise BadFileError(f"{folder}: not a run directory (no such folder)")
    config, table = read_config(folder)
    file = folder / WEIGHTS
    if not file.is_file():
        raise BadFileError(
            f"{folder}: the training is not finished ({WEIGHTS} is missing); give the same train command again to go on"
        )
    arrays, notes = read_state(file)
    accuracy, word_notes = read_weights_notes(notes, file)
    if notes.get("identity") != identity_hash(table):
        raise BadFileError(f"{file}: belongs to another {CONFIG}; one of the two was changed or replaced")
    if runs_code(config.model) and not run_code:
        raise UnsupportedError(
            f"{folder}: its model is made by {config.model}, and reading a run executes no code; load it with "
            "load_run(…, run_code=True) if you trust that module"
        )
    dataset = table["dataset"]
    shape, classes = tuple(dataset["shape"]), int(dataset["classes"])
    try:
        model = config.model_for(shape, classes)
    except LNSError as error:
        raise BadFileError(f"{folder / CONFIG}: {error}") from error
    words = {name: arrays.pop(f"{name}.words") for name in word_notes if f"{name}.words" in arrays}
    load_model_state(model, arrays, str(file))
    model.eval()
    history = read_metrics(folder)
    tensors = _read_words(word_notes, words, model, file)
    start = table.get("start", {}).get("digest")
    deployed = Deployed.from_notes(notes, file)
    digest = str(dataset["digest"])
    return Run(folder, config, model, accuracy, shape, classes, digest, tensors, history, start, deployed)


def read_weights_notes(notes: Mapping[str, Any], file: Path) -> tuple[float, dict[str, Any]]:
    """Accuracy, and format and offset by parameter name, from the notes of a weights file.

    Raises:
        BadFileError: they are missing or wrong.
    """
    accuracy, words = notes.get("accuracy"), notes.get("words", {})
    if not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1 or not isinstance(words, dict):
        raise BadFileError(f"{file}: its metadata are not those of a trained net")
    return float(accuracy), words


def _are_words_of(tensor: LNSTensor, values: npt.NDArray[Any], compute_bits: Any) -> bool:
    """Whether values are those of words, or of their upper bits."""
    if compute_bits is None:
        return np.array_equal(tensor.decode(), values)
    try:
        return np.array_equal(upper_words(tensor, compute_bits).decode(), values)
    except LNSError:
        return False


def _read_words(
    notes: Mapping[str, Any], words: Mapping[str, npt.NDArray[Any]], model: nn.Module, file: Path
) -> dict[str, LNSTensor]:
    found = {}
    parameters = dict(model.named_parameters())
    for name, note in notes.items():
        if name not in words or name not in parameters:
            raise BadFileError(f"{file}: the words of {name!r} are missing")
        try:
            offset = note["offset"]
            several = isinstance(offset, list)
            tensor = LNSTensor(
                words[name],
                LNSFormat.parse(note["format"]),
                np.array(offset, dtype=np.int64) if several else int(offset),
                0 if several else None,
            )
        except (LNSError, KeyError, TypeError, ValueError) as error:
            raise BadFileError(f"{file}: the words of {name!r} are damaged: {error}") from error
        # the parameter has the values of the codes, or of their upper bits: the nearest word of any width is the same
        if not _are_words_of(tensor, parameters[name].detach().numpy(), note.get("compute_bits")):
            raise BadFileError(f"{file}: the words of {name!r} are not those of its values")
        found[name] = tensor
    return found
