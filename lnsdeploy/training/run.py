"""Run directories: what a training leaves, and how it is read back (docs/training.md).

A run directory holds ``config.toml`` (everything that decided the weights), ``weights.safetensors`` (when
the training is finished), ``metrics.csv``, ``curve.png`` and, until it is finished, ``checkpoint.safetensors``. Nothing
in it is pickled, and reading it executes nothing.
"""

from __future__ import annotations

import csv
import dataclasses
import hashlib
import io
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from lnsdeploy import __version__
from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.fields import check_choice, check_integer, check_string
from lnsdeploy.files import dump_toml, read_bytes, read_safetensors, read_toml, write_safetensors, write_text
from lnsdeploy.formats import METHODS, LNSFormat, LNSTensor, Method
from lnsdeploy.recipe import GRANULARITIES, Granularity, LayerRecipe, Recipe
from lnsdeploy.training.data import Dataset, data_names, load_data
from lnsdeploy.training.layers import prepare_
from lnsdeploy.training.models import MODELS, build_model

CONFIG = "config.toml"
WEIGHTS = "weights.safetensors"
METRICS = "metrics.csv"
CURVE = "curve.png"
CHECKPOINT = "checkpoint.safetensors"
FILES = (WEIGHTS, CHECKPOINT, METRICS, CURVE, CONFIG)

OPTIMIZERS = ("madam", "integer-madam", "adam", "sgd")
SCHEDULES = ("cosine", "constant")
LEARNING_RATES = {"madam": 0.03, "integer-madam": 0.03, "adam": 0.003, "sgd": 0.05}
# Passes over the training set by (data, model); enough for the curve to be flat at its end.
EPOCHS = {("digits", "mlp"): 60, ("digits", "cnn"): 40, ("", "mlp"): 20, ("", "cnn"): 8}

_MAX_SEED = (1 << 63) - 1


@dataclass(frozen=True)
class TrainConfig:
    """Everything that decides the weights of a training.

    Args:
        data: data set, see :func:`lnsdeploy.training.data.load_data`.
        data_dir: its folder; what counts is its content, so a moved folder does not change a run.
        model: ``"mlp"`` or ``"cnn"``.
        bits, gamma: format of all words.
        weights, activations: their formats where they differ, as ``"6:4"``.
        as_float: train in float32; formats do not count then.
        granularity, calibration: see :class:`~lnsdeploy.recipe.LayerRecipe`.
        recipe: formats layer by layer, instead of the five fields above.
        optimizer: ``"madam"``, ``"integer-madam"``, ``"adam"`` or ``"sgd"``.
        update_bits, update_gamma: format of the codes that integer-madam holds and moves (16:2048).
        lr: learning rate; each optimizer has its default.
        epochs: passes over the training set; a default for each data set and model.
        batch_size: samples of a step, at most.
        seed: of the initial weights, of the order of the samples, of stochastic rounding.
        schedule: ``"cosine"`` to zero, or ``"constant"``.
        threads: of torch; sums are split by threads, so they count.

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

    def __post_init__(self) -> None:
        check_choice("data", self.data, data_names())
        check_choice("model", self.model, tuple(MODELS))
        check_choice("optimizer", self.optimizer, OPTIMIZERS)
        check_choice("schedule", self.schedule, SCHEDULES)
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("calibration", self.calibration, METHODS)
        if self.data_dir is not None:
            check_string("data_dir", self.data_dir)
        LNSFormat(self.bits, self.gamma)
        for field in ("weights", "activations"):
            value = getattr(self, field)
            if value is not None:
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

    def _resolve(self) -> None:
        """Fill in what was left open, so that a config says what will happen."""
        if self.lr is None:
            object.__setattr__(self, "lr", LEARNING_RATES[self.optimizer])
        if self.epochs is None:
            found = EPOCHS.get((self.data, self.model), EPOCHS["", self.model])
            object.__setattr__(self, "epochs", found)
        if self.optimizer != "integer-madam":
            for field in ("update_bits", "update_gamma"):
                if getattr(self, field) is not None:
                    raise BadValueError(f"{field} belongs to integer-madam; leave it out with {self.optimizer}")
            return
        if self.update_bits is None:
            object.__setattr__(self, "update_bits", 16)
        check_integer("update_bits", self.update_bits, 2, 32)
        assert self.update_bits is not None
        if self.update_gamma is None:
            # 16 octaves, or where codes are few, at least the 7 that one code an octave needs
            object.__setattr__(self, "update_gamma", max(1, 1 << (self.update_bits - 1) >> 4))
        LNSFormat(self.update_bits, self.update_gamma)  # type: ignore[arg-type]

    def layer_recipe(self) -> LayerRecipe:
        """The formats that `bits`, `gamma`, `weights` and `activations` give."""
        both = LNSFormat(self.bits, self.gamma)
        return LayerRecipe(
            weight=LNSFormat.parse(self.weights) if self.weights else both,
            activation=LNSFormat.parse(self.activations) if self.activations else both,
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
        made = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
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
        model = build_model(self.model, shape, classes, seed=self.seed)
        recipe = self.full_recipe()
        return model if recipe is None else prepare_(model, recipe)


# ---------------------------------------------------------------------------------------------------
# config.toml


def config_table(config: TrainConfig, dataset: Dataset) -> dict[str, Any]:
    """What config.toml holds."""
    recipe = config.full_recipe()
    table: dict[str, Any] = {"lnsdeploy": __version__, "train": config.to_dict()}
    if recipe is not None:
        table["recipe"] = recipe.to_dict()
    table["dataset"] = {
        "source": dataset.source,
        "shape": list(dataset.shape),
        "classes": dataset.classes,
        "train": len(dataset.train_x),
        "test": len(dataset.test_x),
        "digest": dataset.digest,
    }
    table["environment"] = {"torch": torch.__version__, "numpy": np.__version__, "threads": config.threads}
    return table


def identity(table: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a config table that decides the weights: not where data lie, nor the versions of programs."""
    train = {key: value for key, value in table["train"].items() if key != "data_dir"}
    dataset = {key: table["dataset"][key] for key in ("shape", "classes", "digest")}
    return {"train": train, "recipe": table.get("recipe", {}), "dataset": dataset}


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
        writer.writerow([repr(row[key]) for key in COLUMNS])
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
        rows = [dict(zip(COLUMNS, map(float, line), strict=True)) for line in lines[1:]]
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
        words: the integer weights of integer-madam, by parameter name.
        history: the lines of metrics.csv.
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

    def dataset(self, data_dir: str | Path | None = None) -> Dataset:
        """The data set of the run.

        Args:
            data_dir: its folder, if it is not where it was.

        Raises:
            BadFileError: it is missing, or not the one the run was trained on.
        """
        found = load_data(self.config.data, data_dir or self.config.data_dir)
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
    }


def load_run(path: str | Path) -> Run:
    """Read a run directory.

    Raises:
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
    return Run(folder, config, model, accuracy, shape, classes, str(dataset["digest"]), tensors, history)


def read_weights_notes(notes: Mapping[str, Any], file: Path) -> tuple[float, dict[str, Any]]:
    """Accuracy, and format and offset by parameter name, from the notes of a weights file.

    Raises:
        BadFileError: they are missing or wrong.
    """
    accuracy, words = notes.get("accuracy"), notes.get("words", {})
    if not isinstance(accuracy, (int, float)) or not 0 <= accuracy <= 1 or not isinstance(words, dict):
        raise BadFileError(f"{file}: its metadata are not those of a trained net")
    return float(accuracy), words


def _read_words(
    notes: Mapping[str, Any], words: Mapping[str, npt.NDArray[Any]], model: nn.Module, file: Path
) -> dict[str, LNSTensor]:
    found = {}
    parameters = dict(model.named_parameters())
    for name, note in notes.items():
        if name not in words or name not in parameters:
            raise BadFileError(f"{file}: the words of {name!r} are missing")
        try:
            tensor = LNSTensor(words[name], LNSFormat.parse(note["format"]), int(note["offset"]))
        except (LNSError, KeyError, TypeError, ValueError) as error:
            raise BadFileError(f"{file}: the words of {name!r} are damaged: {error}") from error
        if not np.array_equal(tensor.decode(), parameters[name].detach().numpy()):
            raise BadFileError(f"{file}: the words of {name!r} are not those of its values")
        found[name] = tensor
    return found
