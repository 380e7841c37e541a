"""Training: from a config to a run directory (docs/training.md).

A training is a function of its config and data: the order of the samples follows from (seed, epoch), stochastic
rounding from (seed, step), and torch's random state is not used. So a training that was killed continues
from its last checkpoint to the bits it would have had.
"""

from __future__ import annotations

import importlib.util
import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lnsdeploy.errors import BadFileError, BadValueError, LNSError, MissingDependencyError
from lnsdeploy.files import atomic_path, make_folder
from lnsdeploy.formats import random_bytes
from lnsdeploy.recipe import load_recipe
from lnsdeploy.training import run as runs
from lnsdeploy.training.data import Dataset, load_data
from lnsdeploy.training.madam import IntegerMadam, Madam
from lnsdeploy.training.run import Row, TrainConfig

__all__ = ["TrainConfig", "TrainResult", "config_from_options", "evaluate", "make_optimizer", "train"]

Progress = Callable[[int, Row], None]

# Streams of the generator of spec 2.3; integer-madam has the first ones, by step.
_ORDER_STREAM = 1 << 62
_EVALUATION_BATCH = 512
_OPTIMIZER = "optimizer."
_MODEL = "model."


@dataclass(frozen=True)
class TrainResult:
    """What a training has reached.

    Args:
        accuracy: fraction of the test set, after the last epoch.
        run: the run directory.
        epochs: passes over the training set.
        seconds: time of all epochs, those before an interruption included.
        train_accuracy, train_loss: of the last epoch, averaged while it trained.
        parameters: number of trained parameters.
    """

    accuracy: float
    run: Path
    epochs: int
    seconds: float
    train_accuracy: float
    train_loss: float
    parameters: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "accuracy": self.accuracy,
            "run": str(self.run),
            "epochs": self.epochs,
            "seconds": round(self.seconds, 3),
            "train_accuracy": self.train_accuracy,
            "train_loss": self.train_loss,
            "parameters": self.parameters,
        }


def config_from_options(
    *,
    recipe: str | Path | None = None,
    data_dir: str | Path | None = None,
    batch_size: int | None = None,
    **options: Any,
) -> TrainConfig:
    """A config from what a command line gives: None stands for a default.

    Args:
        recipe: a TOML file; formats that its ``[default]`` leaves out follow from the other options.
        data_dir: kept as an absolute path.
        batch_size: as in :class:`TrainConfig`.
        options: the other fields of :class:`TrainConfig`.

    Raises:
        LNSError: an option is wrong, or the recipe is.
    """
    values = {key: value for key, value in options.items() if value is not None}
    if batch_size is not None:
        values["batch_size"] = batch_size
    if data_dir is not None:
        values["data_dir"] = str(Path(data_dir).absolute())
    config = TrainConfig(**values)
    if recipe is None:
        return config
    return TrainConfig(**values, recipe=load_recipe(recipe, base=config.layer_recipe()))


def make_optimizer(config: TrainConfig, model: nn.Module) -> Optimizer:
    """The config's optimizer over all parameters of a model."""
    assert config.lr is not None
    parameters = list(model.parameters())
    if config.optimizer == "madam":
        return Madam(parameters, lr=config.lr)
    if config.optimizer == "integer-madam":
        assert config.update_bits is not None
        assert config.update_gamma is not None
        return IntegerMadam(
            parameters, lr=config.lr, bits=config.update_bits, gamma=config.update_gamma, seed=config.seed
        )
    if config.optimizer == "adam":
        return torch.optim.Adam(parameters, lr=config.lr)
    return torch.optim.SGD(parameters, lr=config.lr, momentum=0.9, nesterov=True)


# ---------------------------------------------------------------------------------------------------


@torch.no_grad()
def _evaluated(model: nn.Module, x: Tensor, y: Tensor) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode; the model's mode is restored."""
    training = model.training
    model.eval()
    loss, right = 0.0, 0
    for start in range(0, len(x), _EVALUATION_BATCH):
        part = slice(start, start + _EVALUATION_BATCH)
        logits = model(x[part])
        loss += float(functional.cross_entropy(logits, y[part], reduction="sum"))
        right += int((logits.argmax(dim=1) == y[part]).sum())
    model.train(training)
    return loss / len(x), right / len(x)


def evaluate(model: nn.Module, dataset: Dataset) -> float:
    """Accuracy on the test set, a fraction; the model is run in eval mode and left in the mode it had."""
    return _evaluated(model, torch.tensor(dataset.test_x), torch.tensor(dataset.test_y))[1]


@contextmanager
def _deterministic(threads: int) -> Iterator[None]:
    """Deterministic algorithms and a fixed number of threads, both restored afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    fill = options.fill_uninitialized_memory
    torch.set_num_threads(threads)
    torch.use_deterministic_algorithms(True)
    # a debugging aid that costs a pass over every new tensor
    options.fill_uninitialized_memory = False
    try:
        yield
    finally:
        options.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
        torch.set_num_threads(before[0])


def sample_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of the samples in an epoch: a function of seed and epoch alone (generator of spec 2.3).

    Returns: a permutation, int64 [count].
    """
    keys = random_bytes(seed, _ORDER_STREAM + epoch, 8 * count).view("<u8")
    return np.argsort(keys, kind="stable").astype(np.int64)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 … `steps` − 1."""
    assert config.lr is not None
    if config.schedule == "constant":
        return config.lr
    return config.lr * 0.5 * (1 + math.cos(math.pi * step / steps))


class _Training:
    """A training in progress."""

    def __init__(self, config: TrainConfig, dataset: Dataset, folder: Path, identity: str):
        self.config, self.folder, self.identity = config, folder, identity
        self.train_x, self.train_y = torch.tensor(dataset.train_x), torch.tensor(dataset.train_y)
        self.test_x, self.test_y = torch.tensor(dataset.test_x), torch.tensor(dataset.test_y)
        self.model = config.model_for(dataset.shape, dataset.classes)
        self.optimizer = make_optimizer(config, self.model)
        self.history: list[Row] = []
        assert config.epochs is not None
        self.epochs = config.epochs
        # batches of nearly equal size, so that no batch norm ever sees a batch of one
        self.batches = -(-len(self.train_x) // config.batch_size)

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def run(self, progress: Progress | None) -> None:
        while len(self.history) < self.epochs:
            row = self.epoch(len(self.history))
            self.history.append(row)
            self.save_checkpoint()
            runs.write_metrics(self.folder, self.history)
            if progress is not None:
                progress(len(self.history), row)

    def epoch(self, number: int) -> Row:
        start = time.perf_counter()
        order = torch.from_numpy(sample_order(self.config.seed, number, len(self.train_x)))
        x, y = self.train_x[order], self.train_y[order]
        self.model.train()
        total, right, rate = 0.0, 0, 0.0
        steps = self.epochs * self.batches
        for index, (batch, labels) in enumerate(
            zip(x.tensor_split(self.batches), y.tensor_split(self.batches), strict=True)
        ):
            rate = learning_rate(self.config, number * self.batches + index, steps)
            for group in self.optimizer.param_groups:
                group["lr"] = rate
            self.optimizer.zero_grad(set_to_none=True)
            logits = self.model(batch)
            loss = functional.cross_entropy(logits, labels)
            value = float(loss.detach())
            if not math.isfinite(value):
                raise BadValueError(
                    f"the loss became {value} in epoch {number + 1}: the training has diverged; "
                    f"try a smaller learning rate than {self.config.lr}"
                )
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimizer.step()
            total += value * len(labels)
            right += int((logits.detach().argmax(dim=1) == labels).sum())
        test_loss, test_accuracy = _evaluated(self.model, self.test_x, self.test_y)
        return {
            "epoch": number + 1,
            "lr": rate,
            "train_loss": total / len(x),
            "train_accuracy": right / len(x),
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "seconds": round(time.perf_counter() - start, 6),
        }

    # -- checkpoints --------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        tensors = {_MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        scalars: dict[str, dict[str, Any]] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{index}.{key}"] = value
                elif value is not None:
                    scalars.setdefault(str(index), {})[key] = value
        notes = {"identity": self.identity, "history": self.history, "optimizer": scalars}
        runs.write_state(self.folder / runs.CHECKPOINT, runs.to_arrays(tensors), notes)

    def load_checkpoint(self) -> None:
        path = self.folder / runs.CHECKPOINT
        arrays, notes = runs.read_state(path)
        if notes.get("identity") != self.identity:
            raise BadFileError(f"{path}: belongs to another {runs.CONFIG}; begin anew with --restart")
        try:
            rows = [{key: row[key] for key in runs.COLUMNS} for row in notes["history"]]
            if not all(isinstance(v, (int, float)) for row in rows for v in row.values()):
                raise ValueError("history")
            states = {int(index): dict(state) for index, state in notes["optimizer"].items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise BadFileError(f"{path}: damaged metadata ({error!r}); begin anew with --restart") from error
        if len(rows) > self.epochs:
            raise BadFileError(f"{path}: {len(rows)} epochs, though only {self.epochs} are asked for")
        model = {k.removeprefix(_MODEL): v for k, v in arrays.items() if k.startswith(_MODEL)}
        runs.load_model_state(self.model, model, str(path))
        parameters = list(self.model.parameters())
        for name, array in arrays.items():
            if name.startswith(_MODEL):
                continue
            index, _, key = name.removeprefix(_OPTIMIZER).partition(".")
            if not name.startswith(_OPTIMIZER) or not index.isdigit() or int(index) >= len(parameters) or not key:
                raise BadFileError(f"{path}: unexpected tensor {name!r}")
            shape = parameters[int(index)].shape
            if array.shape not in (tuple(shape), (1,)):
                raise BadFileError(f"{path}: tensor {name!r} has shape {array.shape}, its parameter {tuple(shape)}")
            value = torch.from_numpy(np.array(array))
            # torch keeps Adam's step as a scalar tensor
            states.setdefault(int(index), {})[key] = value if array.shape == tuple(shape) else value.reshape(())
        saved = self.optimizer.state_dict()
        saved["state"] = states
        try:
            self.optimizer.load_state_dict(saved)
        except (LNSError, KeyError, ValueError, RuntimeError) as error:
            raise BadFileError(f"{path}: {error}; begin anew with --restart") from error
        self.history = rows

    # -- the end ------------------------------------------------------------------------------------

    def finish(self) -> None:
        """Write the results; the weights come last, because their presence says that all is there."""
        runs.write_metrics(self.folder, self.history)
        write_curve(self.folder / runs.CURVE, self.history, _title(self.config))
        self.model.eval()
        arrays = runs.to_arrays(self.model.state_dict())
        words: dict[str, dict[str, Any]] = {}
        if isinstance(self.optimizer, IntegerMadam):
            names = [name for name, _ in self.model.named_parameters()]
            for name, tensor in zip(names, self.optimizer.lns_tensors(), strict=True):
                if tensor is not None:
                    arrays[f"{name}.words"] = tensor.words
                    words[name] = {"format": str(tensor.format), "offset": int(tensor.offset)}
        notes = {"identity": self.identity, "accuracy": self.history[-1]["test_accuracy"], "words": words}
        runs.write_state(self.folder / runs.WEIGHTS, arrays, notes)
        _remove(self.folder / runs.CHECKPOINT)


def train(
    config: TrainConfig, out: str | Path, *, restart: bool = False, progress: Progress | None = None
) -> TrainResult:
    """Train a net and leave a run directory.

    A training that was interrupted continues from its last finished epoch, to the same bits as if it had not
    been; a finished one is not repeated, its result is read.

    Args:
        config: what to train.
        out: the run directory; it is created, and may hold other files.
        restart: begin anew even where `out` holds a run, which is removed.
        progress: called after each epoch with the number of finished epochs and the line of metrics.csv.

    Raises:
        BadValueError: `out` holds a run with another config (the message names the differences), or the
            training has diverged.
        BadFileError: a file of the run is damaged, or cannot be written.
        LNSError: the data set is missing or damaged.
        KeyboardInterrupt: Ctrl-C; finished epochs are kept.
    """
    if not isinstance(config, TrainConfig):
        raise BadValueError(f"config must be a TrainConfig, not {type(config).__name__}")
    if importlib.util.find_spec("matplotlib") is None:
        # better before an hour of training than after it
        raise MissingDependencyError("the learning curve needs matplotlib: pip install 'lnsdeploy[train]'")
    dataset = load_data(config.data, config.data_dir)
    folder = make_folder(out)
    table = runs.config_table(config, dataset)
    identity = runs.identity_hash(table)
    if restart:
        for name in runs.FILES:
            _remove(folder / name)
    elif (folder / runs.CONFIG).exists():
        _check_same(folder, table)
    with _deterministic(config.threads):
        training = _Training(config, dataset, folder, identity)
        if (folder / runs.WEIGHTS).exists():
            return _finished(folder, training)
        runs.write_config(folder, table)
        if (folder / runs.CHECKPOINT).exists():
            training.load_checkpoint()
        training.run(progress)
        training.finish()
    return _result(folder, training.history, training.parameters)


def _result(folder: Path, history: list[Row], parameters: int) -> TrainResult:
    last = history[-1]
    return TrainResult(
        accuracy=last["test_accuracy"],
        run=folder,
        epochs=len(history),
        seconds=math.fsum(row["seconds"] for row in history),
        train_accuracy=last["train_accuracy"],
        train_loss=last["train_loss"],
        parameters=parameters,
    )


def _finished(folder: Path, training: _Training) -> TrainResult:
    file = folder / runs.WEIGHTS
    _, notes = runs.read_state(file)
    accuracy, _ = runs.read_weights_notes(notes, file)
    if notes.get("identity") != training.identity:
        raise BadFileError(f"{file}: belongs to another {runs.CONFIG}; begin anew with --restart")
    history = runs.read_metrics(folder)
    if len(history) != training.epochs or history[-1]["test_accuracy"] != accuracy:
        raise BadFileError(f"{folder / runs.METRICS}: is not that of the weights beside it; begin anew with --restart")
    return _result(folder, history, training.parameters)


def _check_same(folder: Path, table: dict[str, Any]) -> None:
    _, there = runs.read_config(folder)
    old, new = _flat(runs.identity(there)), _flat(runs.identity(table))
    if old == new:
        return
    differing = [
        f"{key} ({old.get(key, 'not set')} there, {new.get(key, 'not set')} now)"
        for key in sorted(old.keys() | new.keys())
        if old.get(key) != new.get(key)
    ]
    raise BadValueError(
        f"{folder} holds a run with another config: {', '.join(differing)}; name another folder, or begin anew "
        "with --restart"
    )


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict):
        return {k: v for key, part in value.items() for k, v in _flat(part, f"{prefix}{key}.").items()}
    if isinstance(value, list) and any(isinstance(part, dict) for part in value):
        return {k: v for i, part in enumerate(value, start=1) for k, v in _flat(part, f"{prefix}{i}.").items()}
    return {prefix.removesuffix(".").removeprefix("train."): value}


def _remove(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError as error:
        raise BadFileError(f"cannot remove {path}: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------------
# The learning curve


def _title(config: TrainConfig) -> str:
    recipe = config.full_recipe()
    if recipe is None:
        formats = "float32"
    else:
        weight, activation = recipe.default.weight or "float", recipe.default.activation or "float"
        formats = f"{weight}" if weight == activation else f"weights {weight}, activations {activation}"
    return f"{config.data}, {config.model}, {formats}, {config.optimizer}, seed {config.seed}"


def write_curve(path: str | os.PathLike[str], history: list[Row], title: str) -> None:
    """Draw loss and error over epochs into a PNG file."""
    # the figure's own canvas: no window system, no state shared with a caller's plots
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.4), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    epochs = [row["epoch"] for row in history]
    for axes, key, label, scale in (
        (left, "loss", "cross-entropy", 1.0),
        (right, "accuracy", "error, %", 100.0),
    ):
        for part, style in (("train", "--"), ("test", "-")):
            values = [row[f"{part}_{key}"] for row in history]
            if key == "accuracy":
                values = [1 - v for v in values]
            axes.plot(epochs, [scale * v for v in values], style, label=part, linewidth=1.5)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    right.set_title(f"test accuracy {100 * history[-1]['test_accuracy']:.2f} %", fontsize=9)
    left.set_title(title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
