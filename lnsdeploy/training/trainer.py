"""Training: from a config to a run directory (docs/training.md).

A training is a function of its config and data: the order of the samples and their augmentation follow from (seed,
epoch), stochastic rounding from (seed, step), and torch's random state, which dropout needs, is set anew for every
step. So a training that was killed continues from its last checkpoint to the bits it would have had.
"""

from __future__ import annotations

import contextlib
import copy
import csv
import hashlib
import importlib.util
import io
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer

from lnsdeploy.datapath import load_datapath
from lnsdeploy.errors import BadFileError, BadValueError, LNSError, MissingDependencyError, UnsupportedError
from lnsdeploy.evaluation.shards import Shards
from lnsdeploy.fields import check_integer
from lnsdeploy.files import atomic_path, make_folder, read_bytes, write_text
from lnsdeploy.formats import LNSFormat, random_bytes
from lnsdeploy.recipe import LayerRecipe, Recipe, load_recipe
from lnsdeploy.training import run as runs
from lnsdeploy.training.data import Dataset, load_data
from lnsdeploy.training.feeds import CONTEXT, Feed, ImageFeed, TextFeed
from lnsdeploy.training.layers import lns_layers
from lnsdeploy.training.madam import IntegerMadam, LNSMadam, Madam
from lnsdeploy.training.norms import synchronised_norms
from lnsdeploy.training.processes import average_, joined, total
from lnsdeploy.training.run import Row, TrainConfig
from lnsdeploy.training.text import Text, is_text, load_text

__all__ = ["TrainConfig", "TrainResult", "config_from_options", "evaluate", "make_optimizer", "train"]

Progress = Callable[[int, Row], None]
# Steps done, steps in all, the loss of the last.
StepProgress = Callable[[int, int, float], None]

# Streams of the generator of spec 2.3; integer-madam has the first ones, by step.
_ORDER_STREAM = 1 << 62
_EVALUATION_BATCH = 512
# Between checkpoints within an epoch, in seconds.
_CHECKPOINT_SECONDS = 60.0
_OPTIMIZER = "optimizer."
_MODEL = "model."
_LOSSES = "steps.loss"


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
        loss: mean cross-entropy of the test set, in nats; of a text, per character.
        best: the largest accuracy after any epoch.
        deployed: of an emulated training, the accuracy of the net that the run exports, on words throughout; None for
            others, and where the net has no LNS form.
    """

    accuracy: float
    run: Path
    epochs: int
    seconds: float
    train_accuracy: float
    train_loss: float
    parameters: int
    loss: float
    best: float
    deployed: float | None = None

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
            "loss": self.loss,
            "best": self.best,
            "deployed": self.deployed,
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
    """The config's optimizer over all parameters of a model.

    Raises:
        BadValueError, BadTypeError, UnknownNameError: one of its settings is wrong.
    """
    assert config.lr is not None
    parameters = [p for p in model.parameters() if p.requires_grad]
    settings: dict[str, Any] = dict(config.optimizer_settings or {})
    if config.optimizer == "madam":
        return Madam(parameters, lr=config.lr, **settings)
    if config.optimizer in runs.INTEGER_OPTIMIZERS:
        assert config.update_bits is not None
        settings["seed"] = config.seed
        if config.optimizer == "lns-madam":
            return LNSMadam(model, config.lr, config.update_bits, **settings)
        assert config.update_gamma is not None
        return IntegerMadam(parameters, config.lr, config.update_bits, config.update_gamma, **settings)
    try:
        if config.optimizer == "adam":
            betas = settings.pop("beta1", 0.9), settings.pop("beta2", 0.999)
            return torch.optim.AdamW(
                parameters, lr=config.lr, betas=betas, weight_decay=config.weight_decay, **settings
            )
        momentum = settings.pop("momentum", 0.9)
        return torch.optim.SGD(
            parameters, lr=config.lr, momentum=momentum, nesterov=bool(momentum), weight_decay=config.weight_decay
        )
    except (TypeError, ValueError) as error:
        raise BadValueError(f"optimizer_settings: {error}") from error


def make_feed(config: TrainConfig, data: Dataset | Text) -> Feed:
    """The samples of a config's training.

    Raises:
        BadValueError: there are too few.
    """
    device = torch.device(config.device)
    if isinstance(data, Text):
        return TextFeed(data, context=config.context or CONTEXT, limit=config.limit, seed=config.seed, device=device)
    return ImageFeed(data, augment=config.augment, limit=config.limit, seed=config.seed, device=device)


def load_any(config: TrainConfig) -> Dataset | Text:
    """The data of a config.

    Raises:
        LNSError: missing or damaged.
    """
    if is_text(config.data):
        return load_text(config.data, config.data_dir)
    return load_data(config.data, config.data_dir, image_size=config.image_size)


# ---------------------------------------------------------------------------------------------------


def _loss_and_hits(model: nn.Module, x: Tensor, y: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy over all labels, and how many of them have the largest logit."""
    logits = model(x)
    if logits.ndim == 3:
        logits, y = logits.reshape(-1, logits.shape[-1]), y.reshape(-1)
    loss = functional.cross_entropy(logits, y, label_smoothing=smoothing)
    return loss, (logits.detach().argmax(dim=1) == y).sum()


@torch.no_grad()
def _evaluated(model: nn.Module, feed: Feed, shards: Shards) -> tuple[float, float]:
    """Mean loss and accuracy in eval mode; the model's mode is restored."""
    training = model.training
    model.eval()
    loss, right, count = 0.0, 0.0, 0.0
    samples = feed.sizes[1]
    size = max(1, min(_EVALUATION_BATCH, samples // shards.world))
    for number in shards.own(-(-samples // size)):
        x, y = feed.test(number * size, min(samples, (number + 1) * size))
        mean, hits = _loss_and_hits(model, x, y, 0.0)
        loss += float(mean) * y.numel()
        right += int(hits)
        count += y.numel()
    model.train(training)
    loss, right, count = total([loss, right, count])
    return loss / count, right / count


def evaluate(model: nn.Module, dataset: Dataset) -> float:
    """Accuracy on the test set, a fraction; the model is run in eval mode and left in the mode it had."""
    feed = ImageFeed(dataset, augment="none", limit=None, seed=0, device=next(model.parameters()).device)
    return _evaluated(model, feed, Shards())[1]


@contextmanager
def _deterministic(config: TrainConfig) -> Iterator[None]:
    """Torch's global options for a training, all restored afterwards."""
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    options: Any = torch.utils.deterministic
    fill = options.fill_uninitialized_memory
    torch.set_num_threads(config.threads)
    on_gpu = config.device != "cpu"
    if config.deterministic:
        if on_gpu:
            # what cuBLAS wants to hear before it is deterministic; it looks when it is first used
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=on_gpu)
        # a debugging aid that costs a pass over every new tensor
        options.fill_uninitialized_memory = False
    try:
        with torch.random.fork_rng(devices=[torch.device(config.device)] if on_gpu else []):
            yield
    finally:
        options.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[1], warn_only=warn_only)
        torch.set_num_threads(before[0])


class _Interrupts:
    """Ctrl-C and SIGTERM between steps rather than within one, so that what a step changes stays whole."""

    def __init__(self) -> None:
        self.asked: int | None = None

    def _ask(self, number: int, frame: FrameType | None) -> None:
        if self.asked is not None:
            # twice: the user will not wait for the step
            raise KeyboardInterrupt
        self.asked = number

    @contextmanager
    def between_steps(self) -> Iterator[None]:
        """Inside, the first interrupt is only noted; elsewhere than in the main thread nothing changes."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        for number, handler in before.items():
            # one that is ignored (as in a shell's background) stays ignored
            if handler is not signal.SIG_IGN:
                signal.signal(number, self._ask)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def sample_order(seed: int, epoch: int, count: int) -> npt.NDArray[np.int64]:
    """The order of the samples in an epoch: a function of seed and epoch alone (generator of spec 2.3).

    Returns: a permutation, int64 [count].
    """
    keys = random_bytes(seed, _ORDER_STREAM + epoch, 8 * count).view("<u8")
    return np.argsort(keys, kind="stable").astype(np.int64)


def learning_rate(config: TrainConfig, step: int, steps: int) -> float:
    """The learning rate of step 0 … `steps` − 1."""
    assert config.lr is not None
    warm = min(1.0, (step + 1) / (config.warmup + 1))
    part = step / steps
    shapes = {
        "constant": 1.0,
        "cosine": 0.5 * (1 + math.cos(math.pi * part)),
        "linear": 1 - part,
        "step": 0.01 if part >= 0.75 else 0.1 if part >= 0.5 else 1.0,
    }
    return config.lr * (shapes[config.schedule] * warm)


class _Training:
    """A training in progress."""

    def __init__(self, config: TrainConfig, classes: int, feed: Feed, folder: Path, identity: str, shards: Shards):
        self.config, self.folder, self.identity, self.feed, self.shards = config, folder, identity, feed, shards
        self.model = config.model_for(feed.shape, classes).to(config.device)
        self.history: list[Row] = []
        self.losses: list[float] = []
        # of the epoch in progress: the next batch, sums, and seconds before the last interruption
        self.batch, self.sums, self.seconds = 0, (0.0, 0.0, 0.0), 0.0
        assert config.epochs is not None
        self.epochs = config.epochs
        samples = feed.sizes[0]
        # batches of nearly equal size, so that no batch norm ever sees a batch of one
        self.batches = -(-samples // config.batch_size)
        if samples // self.batches < shards.world:
            raise BadValueError(
                f"batches of {samples // self.batches} samples cannot be split over {shards.world} processes"
            )
        self.steps = self.epochs * self.batches
        self.interrupts = _Interrupts()
        self.stop = False
        self.deployed: runs.Deployed | None = None
        self.eval_every = 1
        self._saved = time.monotonic()

    def begin(self, start: dict[str, npt.NDArray[Any]] | None, where: str) -> None:
        """Take the weights to begin with, and make the optimizer."""
        if start is not None:
            load_start(self.model, start, where)
        self.optimizer = make_optimizer(self.config, self.model)
        held = {layer.weight for _, layer in lns_layers(self.model) if isinstance(layer.recipe.gradient, LNSFormat)}
        # gradients that are words have been averaged before they were rounded
        self._to_average = [p for p in self.model.parameters() if p not in held]

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())

    def run(self, progress: Progress | None, on_step: StepProgress | None, every: int | None, board: Any) -> None:
        while len(self.history) < self.epochs:
            with self.interrupts.between_steps(), self.arithmetic():
                row = self.epoch(len(self.history), on_step, every)
            self.history.append(row)
            self.batch, self.sums, self.seconds = 0, (0.0, 0.0, 0.0), 0.0
            self.save_checkpoint()
            if self.shards.is_first:
                runs.write_metrics(self.folder, self.history)
                self.write_steps()
                if board is not None:
                    _tell_board(board, row, self.losses[-self.batches :], self.steps_done)
            if progress is not None:
                progress(len(self.history), row)
            # an interrupt that came while one process alone was evaluated; several agree at a step
            if (self.stop or (self.interrupts.asked and self.shards.world == 1)) and len(self.history) < self.epochs:
                raise KeyboardInterrupt

    @property
    def steps_done(self) -> int:
        return len(self.history) * self.batches + self.batch

    def arithmetic(self) -> contextlib.AbstractContextManager[Any]:
        """Where products are computed: as torch does, or through a datapath."""
        if self.config.emulate is None or self.config.datapath is None:
            return contextlib.nullcontext()
        from lnsdeploy.emulator.mode import Emulation, emulate

        backward = self.config.emulate == "both"
        recipe = self.config.full_recipe()
        if recipe is None:
            return emulate(self.config.datapath, backward=backward, model=self.model)
        # the run's own formats, as its export has them, on this arithmetic
        datapath = load_datapath(self.config.datapath)
        # but no results' formats, which it leaves alone, and no offsets and places of a first batch: weights move away
        # from them, and a training that is continued would begin with another
        recipe = Recipe(_placed_anew(recipe.default), tuple((m, _placed_anew(layer)) for m, layer in recipe.layers))
        return Emulation(recipe, datapath, backward=backward, model=self.model)

    def epoch(self, number: int, on_step: StepProgress | None, every: int | None) -> Row:
        started = time.perf_counter()
        order = sample_order(self.config.seed, number, self.feed.sizes[0])
        parts = np.array_split(order, self.batches)
        if not self.batch:
            # (within an epoch a change of mode would make offsets anew that the checkpoint has)
            self.model.train()
        while self.batch < self.batches:
            asked = self.step(number, parts[self.batch])
            self.batch += 1
            if on_step is not None:
                on_step(self.steps_done, self.steps, self.losses[-1])
            if every is not None:
                due = self.steps_done % every == 0
            else:
                due = self.shards.is_first and time.monotonic() - self._saved > _CHECKPOINT_SECONDS
            if (due or asked) and self.batch < self.batches:
                self.seconds += time.perf_counter() - started
                started = time.perf_counter()
                self.save_checkpoint()
            if asked and self.batch < self.batches:
                raise KeyboardInterrupt
        test_loss = test_accuracy = math.nan
        if (number + 1) % self.eval_every == 0 or number + 1 == self.epochs:
            test_loss, test_accuracy = _evaluated(self.model, self.feed, self.shards)
        loss, right, count = self.sums
        return {
            "epoch": number + 1,
            "lr": learning_rate(self.config, (number + 1) * self.batches - 1, self.steps),
            "train_loss": loss / count,
            "train_accuracy": right / count,
            "test_loss": test_loss,
            "test_accuracy": test_accuracy,
            "seconds": round(self.seconds + time.perf_counter() - started, 6),
        }

    def step(self, epoch: int, indices: npt.NDArray[np.int64]) -> bool:
        """One update from the samples of a batch, of which this process takes its part.

        Returns: whether this process or another has been asked to stop.
        """
        config, world = self.config, self.shards.world
        rate = learning_rate(config, self.steps_done, self.steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        # dropout, or whatever random a user's model has
        torch.manual_seed(_seed_of(config.seed, self.steps_done * world + self.shards.rank))
        own = np.array_split(indices, world)[self.shards.rank]
        x, y = self.feed.batch(epoch, own)
        self.optimizer.zero_grad(set_to_none=True)
        loss, hits = _loss_and_hits(self.model, x, y, config.label_smoothing)
        share = world * len(own) / len(indices)
        (loss * share if world > 1 else loss).backward()  # type: ignore[no-untyped-call]
        asked = float(self.interrupts.asked is not None)
        sums = total([float(loss.detach()) * y.numel(), float(hits), float(y.numel()), asked])
        value = sums[0] / sums[2]
        if not math.isfinite(value):
            raise self._diverged(f"the loss became {value}", epoch)
        if world > 1:
            average_(p.grad for p in self._to_average if p.grad is not None)
        if config.grad_clip is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), config.grad_clip)
        try:
            self.optimizer.step()
        except BadValueError as error:
            raise self._diverged(str(error), epoch) from error
        if world > 1:
            average_(
                buffer for name, buffer in self.model.named_buffers() if name.endswith(("running_mean", "running_var"))
            )
        loss_sum, right, count = self.sums
        self.sums = loss_sum + sums[0], right + sums[1], count + sums[2]
        self.losses.append(value)
        self.stop = bool(sums[3])
        return self.stop

    def _diverged(self, what: str, epoch: int) -> BadValueError:
        kept = f"; the last checkpoint is kept in {self.folder}" if (self.folder / runs.CHECKPOINT).exists() else ""
        return BadValueError(
            f"{what} in epoch {epoch + 1}, step {self.steps_done + 1}: the training has diverged; try a smaller "
            f"learning rate than {self.config.lr}{kept}"
        )

    def write_steps(self) -> None:
        """Write steps.csv, a line a step."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(("step", "lr", "train_loss"))
        for step, loss in enumerate(self.losses):
            writer.writerow((step + 1, repr(learning_rate(self.config, step, self.steps)), repr(loss)))
        write_text(self.folder / runs.STEPS, text.getvalue())

    # -- checkpoints --------------------------------------------------------------------------------

    def save_checkpoint(self) -> None:
        self._saved = time.monotonic()
        if not self.shards.is_first:
            return
        tensors = {_MODEL + name: tensor for name, tensor in self.model.state_dict().items()}
        scalars: dict[str, dict[str, Any]] = {}
        for index, state in self.optimizer.state_dict()["state"].items():
            for key, value in state.items():
                if isinstance(value, Tensor):
                    tensors[f"{_OPTIMIZER}{index}.{key}"] = value
                elif value is not None:
                    scalars.setdefault(str(index), {})[key] = value
        tensors[_LOSSES] = torch.tensor(self.losses, dtype=torch.float64)
        notes = {
            "identity": self.identity,
            "history": self.history,
            "optimizer": scalars,
            "batch": self.batch,
            "sums": self.sums,
            "seconds": self.seconds,
        }
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
            # those of the first versions were written between epochs alone
            batch, seconds = int(notes.get("batch", 0)), float(notes.get("seconds", 0.0))
            loss, right, count = (float(v) for v in notes.get("sums", (0.0, 0.0, 0.0)))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise BadFileError(f"{path}: damaged metadata ({error!r}); begin anew with --restart") from error
        if len(rows) > self.epochs:
            raise BadFileError(f"{path}: {len(rows)} epochs, though only {self.epochs} are asked for")
        if not 0 <= batch < self.batches:
            raise BadFileError(f"{path}: batch {batch} of an epoch that has {self.batches}")
        done = len(rows) * self.batches + batch
        losses = arrays.pop(_LOSSES, np.full(done, np.nan))
        if losses.dtype != np.float64 or losses.shape != (done,):
            raise BadFileError(f"{path}: losses of {losses.shape} steps, not {done}; begin anew with --restart")
        model = {k.removeprefix(_MODEL): v for k, v in arrays.items() if k.startswith(_MODEL)}
        runs.load_model_state(self.model, model, str(path))
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        for name, array in arrays.items():
            if name.startswith(_MODEL):
                continue
            index, _, key = name.removeprefix(_OPTIMIZER).partition(".")
            if not name.startswith(_OPTIMIZER) or not index.isdigit() or int(index) >= len(parameters) or not key:
                raise BadFileError(f"{path}: unexpected tensor {name!r}")
            shape = tuple(parameters[int(index)].shape)
            # torch keeps Adam's step as a scalar tensor; offsets may be those of channels
            allowed = {shape, (1,), shape[:1] if key == "offset" else shape}
            if array.shape not in allowed:
                raise BadFileError(f"{path}: tensor {name!r} has shape {array.shape}, its parameter {shape}")
            value = torch.from_numpy(np.array(array))
            single = array.shape == (1,) and shape != (1,) and not (key == "offset" and shape[:1] == (1,))
            states.setdefault(int(index), {})[key] = value.reshape(()) if single else value
        saved = self.optimizer.state_dict()
        saved["state"] = states
        try:
            self.optimizer.load_state_dict(saved)
        except (LNSError, KeyError, ValueError, RuntimeError) as error:
            raise BadFileError(f"{path}: {error}; begin anew with --restart") from error
        self.history, self.losses = rows, losses.tolist()
        self.batch, self.sums, self.seconds = batch, (loss, right, count), seconds

    # -- the end ------------------------------------------------------------------------------------

    def finish(self, data: Dataset | Text, start: str | None) -> None:
        """Write the results; the weights come last, because their presence says that all is there.

        Args:
            data: what it was trained on.
            start: digest of the weights it began with.
        """
        if not self.shards.is_first:
            return
        runs.write_metrics(self.folder, self.history)
        self.write_steps()
        write_curve(self.folder / runs.CURVE, self.history, _title(self.config))
        self.model.eval()
        arrays = runs.to_arrays(self.model.state_dict())
        words: dict[str, dict[str, Any]] = {}
        if isinstance(self.optimizer, IntegerMadam):
            names = {parameter: name for name, parameter in self.model.named_parameters()}
            held = [p for group in self.optimizer.param_groups for p in group["params"]]
            for parameter, tensor in zip(held, self.optimizer.lns_tensors(), strict=True):
                if tensor is None:
                    continue
                name = names[parameter]
                arrays[f"{name}.words"] = tensor.words
                offset = np.asarray(tensor.offset)
                words[name] = {"format": str(tensor.format), "offset": offset.tolist()}
                shorter = self.optimizer.state[parameter]["compute_bits"]
                if shorter != tensor.format.bits:
                    words[name]["compute_bits"] = shorter
        notes: dict[str, Any] = {
            "identity": self.identity,
            "accuracy": self.history[-1]["test_accuracy"],
            "words": words,
        }
        if self.config.emulate is not None:
            self.deployed, why = self._deploy(data, start)
            notes["deployed"] = {"why": why} if self.deployed is None else asdict(self.deployed)
        runs.write_state(self.folder / runs.WEIGHTS, arrays, notes)
        _remove(self.folder / runs.CHECKPOINT)

    def _deploy(self, data: Dataset | Text, start: str | None) -> tuple[runs.Deployed | None, str]:
        """Lower the trained net for the datapath it was trained through, and evaluate it on words.

        While it trains, every batch has accumulators of its own; here they are placed once, as hardware has them, and
        that net is part of the run. Whoever exports the run gets these words.

        Returns: what was found, or None and why the net has no LNS form.
        """
        from lnsdeploy.emulator.executor import fastest, get_executor
        from lnsdeploy.emulator.session import emulate
        from lnsdeploy.exporters.export import lower_loaded

        accuracy = self.history[-1]["test_accuracy"]
        # on the CPU, and with nothing that a later step of this process could change
        model = copy.deepcopy(self.model).cpu()
        run = runs.Run(
            self.folder, self.config, model, accuracy, self.feed.shape, data.classes, data.digest, {}, [], start
        )
        try:
            if isinstance(data, Text):
                raise UnsupportedError("a net of text has no LNS form as a whole")
            artifact = lower_loaded(run, data, None).exported[0].artifact(str(self.folder / runs.DEPLOYED))
        except LNSError as error:
            return None, str(error)
        found = emulate(artifact, get_executor(fastest()), data.test_x, data.test_y, batch=128)
        assert found.accuracy is not None
        artifact.save(self.folder / runs.DEPLOYED)
        made = runs.Deployed(
            found.accuracy,
            load_datapath(str(self.config.datapath)).with_formats(*run.formats()).fingerprint,
            runs.digest_of_words(found.words),
            hashlib.sha256(artifact.data).hexdigest(),
        )
        return made, ""


def _placed_anew(layer: LayerRecipe) -> LayerRecipe:
    """Without what belongs to emulation alone."""
    return replace(layer, output=None, offsets="dynamic")


def _seed_of(seed: int, step: int) -> int:
    """A seed for torch's own generator, a function of the training's and the step."""
    return int.from_bytes(hashlib.blake2b(f"{seed} {step}".encode(), digest_size=7).digest(), "little")


def _tell_board(board: Any, row: Row, losses: list[float], done: int) -> None:
    for step, loss in enumerate(losses, start=done - len(losses) + 1):
        board.add_scalar("train/loss", loss, step)
    for key in ("lr", "train_accuracy", "test_loss", "test_accuracy"):
        if math.isnan(row[key]):
            continue
        board.add_scalar(key.replace("_", "/"), row[key], done)
    board.flush()


def read_start(source: str) -> tuple[dict[str, npt.NDArray[Any]], str, str]:
    """The weights that a training is to begin with.

    Args:
        source: a run directory, or its weights file.
    Returns: arrays by name, the file, and a digest of its bytes.

    Raises:
        BadFileError: it is missing or damaged.
    """
    file = Path(source)
    if file.is_dir():
        file = file / runs.WEIGHTS
        if not file.is_file():
            raise BadFileError(f"{source}: not a finished run ({runs.WEIGHTS} is missing)")
    arrays, notes = runs.read_state(file)
    words = notes.get("words", {})
    kept = {k: v for k, v in arrays.items() if not (k.endswith(".words") and k.removesuffix(".words") in words)}
    return kept, str(file), hashlib.sha256(read_bytes(file)).hexdigest()[:16]


def load_start(model: nn.Module, arrays: dict[str, npt.NDArray[Any]], where: str) -> None:
    """Begin with the parameters and statistics of another net of the same kind; formats may be others.

    Offsets and maxima of quantizers are taken where both nets have them of one shape, and made anew elsewhere.

    Raises:
        BadFileError: a parameter is missing or of another shape.
    """
    own = model.state_dict()
    calibration = ("weight_offset", ".offset", ".maximum")
    taken = {}
    for name, tensor in own.items():
        if name in arrays and (not name.endswith(calibration) or arrays[name].shape == (tuple(tensor.shape) or (1,))):
            taken[name] = runs.checked(arrays[name], tensor, f"{where}: tensor {name!r}")
        elif not name.endswith(calibration):
            raise BadFileError(f"{where}: tensor {name!r} is missing: the weights are those of another net")
    for name in arrays:
        if name not in own and not name.endswith(calibration):
            raise BadFileError(f"{where}: the net has no tensor {name!r}: the weights are those of another net")
    model.load_state_dict(taken, strict=False)


def train(
    config: TrainConfig,
    out: str | Path,
    *,
    restart: bool = False,
    resume: bool = False,
    progress: Progress | None = None,
    on_step: StepProgress | None = None,
    checkpoint_every: int | None = None,
    eval_every: int = 1,
    tensorboard: str | Path | None = None,
    shards: Shards | None = None,
) -> TrainResult:
    """Train a net and leave a run directory.

    A training that was interrupted continues from its last checkpoint, to the same bits as if it had not
    been; a finished one is not repeated, its result is read.

    Args:
        config: what to train.
        out: the run directory; it is created, and may hold other files.
        restart: begin anew even where `out` holds a run, which is removed.
        resume: `out` must hold a run of this config, finished or not.
        progress: called after each epoch with the number of finished epochs and the line of metrics.csv.
        on_step: called after each step with the number of steps done and of all, and the loss.
        checkpoint_every: steps between checkpoints; by default one a minute, and one after each epoch.
        eval_every: epochs between looks at the test set; the last epoch always has one. Weights do not depend on it.
        tensorboard: a folder for TensorBoard's event files.
        shards: the processes that train together (:func:`lnsdeploy.evaluation.shards.processes`); this one alone by
            default.

    Raises:
        BadValueError: `out` holds a run with another config (the message names the differences), or the
            training has diverged.
        BadFileError: a file of the run is damaged, or cannot be written.
        LNSError: the data set is missing or damaged.
        KeyboardInterrupt: Ctrl-C; finished steps are kept.
    """
    if not isinstance(config, TrainConfig):
        raise BadValueError(f"config must be a TrainConfig, not {type(config).__name__}")
    check_integer("eval_every", eval_every, 1, 1_000_000)
    if restart and resume:
        raise BadValueError("restart and resume exclude each other")
    if importlib.util.find_spec("matplotlib") is None:
        # better before an hour of training than after it
        raise MissingDependencyError("the learning curve needs matplotlib: pip install 'lnsdeploy[train]'")
    if config.device != "cpu" and not torch.cuda.is_available():
        raise BadValueError(f"device {config.device}: torch {torch.__version__} sees no GPU here")
    shards = Shards() if shards is None else shards
    board = _board(tensorboard) if tensorboard is not None and shards.is_first else None

    folder = Path(out)

    def read() -> Any:
        data = load_any(config)
        feed = make_feed(config, data)
        arrays, where, digest = read_start(config.init_from) if config.init_from else (None, "", None)
        table = runs.config_table(config, data, feed.shape, feed.sizes, digest)
        return data, feed, arrays, where, table

    def prepare(found: Any) -> tuple[_Training, bool]:
        data, feed, arrays, where, table = found
        identity = runs.identity_hash(table)
        training = _Training(config, data.classes, feed, folder, identity, shards)
        if (folder / runs.WEIGHTS).exists():
            return training, True
        training.begin(arrays, where)
        if (folder / runs.CHECKPOINT).exists():
            training.load_checkpoint()
        return training, False

    with _deterministic(config), joined(shards.world):
        found = shards.together(read)
        # the first removes what is not to be found, before others look
        shards.together(lambda: _set_up(folder, found[-1], restart, resume) if shards.is_first else None)
        training, finished = shards.together(lambda: prepare(found))
        if finished:
            return shards.together(lambda: _finished(training.folder, training))
        training.eval_every = eval_every
        try:
            with synchronised_norms(training.model, shards.world):
                training.run(progress, on_step, checkpoint_every, board)
        finally:
            if board is not None:
                board.close()
        data, start = found[0], found[-1].get("start", {}).get("digest")
        shards.together(lambda: training.finish(data, start))
    return _result(training.folder, training.history, training.parameters, training.deployed)


def _set_up(folder: Path, table: dict[str, Any], restart: bool, resume: bool) -> None:
    """Make the run directory what the config says, or refuse."""
    make_folder(folder)
    if restart:
        for name in runs.FILES:
            _remove(folder / name)
    elif (folder / runs.CONFIG).exists():
        _check_same(folder, table)
    elif resume:
        raise BadFileError(f"{folder}: there is no run to resume ({runs.CONFIG} is missing)")
    if not (folder / runs.WEIGHTS).exists():
        runs.write_config(folder, table)


def _board(folder: str | Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise MissingDependencyError("TensorBoard is not installed: pip install 'lnsdeploy[tensorboard]'") from error
    return SummaryWriter(log_dir=str(folder))


def _result(folder: Path, history: list[Row], parameters: int, deployed: runs.Deployed | None) -> TrainResult:
    last = history[-1]
    return TrainResult(
        accuracy=last["test_accuracy"],
        run=folder,
        epochs=len(history),
        seconds=math.fsum(row["seconds"] for row in history),
        train_accuracy=last["train_accuracy"],
        train_loss=last["train_loss"],
        parameters=parameters,
        loss=last["test_loss"],
        best=max(row["test_accuracy"] for row in history if not math.isnan(row["test_accuracy"])),
        deployed=None if deployed is None else deployed.accuracy,
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
    return _result(folder, history, training.parameters, runs.Deployed.from_notes(notes, file))


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
            seen = [(epoch, row[f"{part}_{key}"]) for epoch, row in zip(epochs, history, strict=True)]
            seen = [(epoch, value) for epoch, value in seen if not math.isnan(value)]
            values = [1 - v if key == "accuracy" else v for _, v in seen]
            axes.plot([epoch for epoch, _ in seen], [scale * v for v in values], style, label=part, linewidth=1.5)
        axes.set_xlabel("epoch")
        axes.set_ylabel(label)
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False)
    right.set_title(f"test accuracy {100 * history[-1]['test_accuracy']:.2f} %", fontsize=9)
    left.set_title(title, fontsize=9)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120, format="png")
