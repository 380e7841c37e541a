"""A model in float32 and in LNS on the same samples: how far they agree, and what each product did."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lnsdeploy.datapath import load_datapath
from lnsdeploy.emulator.backends import backend_for
from lnsdeploy.emulator.mode import resolve
from lnsdeploy.errors import BadValueError, LNSError, UnknownNameError
from lnsdeploy.evaluation.inputs import Input
from lnsdeploy.evaluation.models import PRETRAINED, RANDOM, Model, load_model, with_inputs
from lnsdeploy.evaluation.samples import Batch, Samples, data_names, native_shape, open_samples, synthetic
from lnsdeploy.evaluation.shards import Shards, device_of
from lnsdeploy.evaluation.weights import digest
from lnsdeploy.fields import parse_setting
from lnsdeploy.recipe import LayerRecipe, Recipe, load_recipe

if TYPE_CHECKING:
    from lnsdeploy.emulator.records import Seen

# The arithmetic where none is named, and samples at a time.
DATAPATH = "lns-madam-8"
IMAGES, SEQUENCES = 16, 4

# After so many rounds of batches, at most, processes hear of each other.
_MEETINGS = 64


@dataclass
class Scores:
    """What is counted of outputs: integers, and sums of floats kept exactly, so that no order of adding matters.

    Args:
        samples: inputs.
        places: outputs with a largest score: one a sample, or one a token.
        agree: places where float32 and LNS have the same largest score.
        labelled: places whose label is known.
        float_right, lns_right: where it has the largest score.
        float_loss, lns_loss: cross entropies, summed over labelled places.
        signal, noise: squares of the float32 outputs, and of their differences to those of LNS.
        gradient_signal, gradient_noise: the same of the gradients of all parameters.
    """

    samples: int = 0
    places: int = 0
    agree: int = 0
    labelled: int = 0
    float_right: int = 0
    lns_right: int = 0
    float_loss: Fraction = Fraction(0)
    lns_loss: Fraction = Fraction(0)
    signal: Fraction = Fraction(0)
    noise: Fraction = Fraction(0)
    gradient_signal: Fraction = Fraction(0)
    gradient_noise: Fraction = Fraction(0)

    def merge(self, other: Scores) -> None:
        """Add what another process counted."""
        for each in fields(self):
            setattr(self, each.name, getattr(self, each.name) + getattr(other, each.name))

    def count(self, model: Model, batch: Batch, plain: Tensor, lns: Tensor) -> None:
        """Add a batch.

        Args:
            plain, lns: outputs in float32 and in LNS, scores along the last axis.

        Raises:
            BadValueError: the outputs are not what labels and task need, or not finite.
        """
        if plain.shape != lns.shape:
            raise BadValueError(f"{model.name} returns {tuple(plain.shape)} in float32 and {tuple(lns.shape)} in LNS")
        plain, lns = plain.float().cpu(), lns.float().cpu()
        if not bool(plain.isfinite().all()):
            raise BadValueError(f"{model.name} returns numbers that are not finite in float32 already")
        self.samples += len(plain)
        # sample by sample: the scores of a vocabulary take much room in float64
        for number in range(len(plain)):
            self._count_one(
                model, plain[number], lns[number], None if batch.labels is None else batch.labels[number].cpu()
            )

    def _count_one(self, model: Model, plain: Tensor, lns: Tensor, labels: Tensor | None) -> None:
        self.signal += _squares(plain)
        self.noise += _squares(plain.double() - lns.double())
        if model.task == "outputs":
            return
        plain, lns = plain.reshape(-1, plain.shape[-1]), lns.reshape(-1, lns.shape[-1])
        best, found = plain.argmax(-1), lns.argmax(-1)
        self.places += len(best)
        self.agree += int((best == found).sum())
        if labels is None:
            return
        labels = labels.reshape(-1)
        if len(labels) != len(best) or int(labels.max()) >= plain.shape[-1]:
            raise BadValueError(
                f"{model.name} returns scores of {plain.shape[-1]} classes at {len(best)} places a sample; the data "
                f"have {len(labels)} labels up to {int(labels.max())}"
            )
        known = labels >= 0
        plain, lns, labels, best, found = plain[known], lns[known], labels[known], best[known], found[known]
        self.labelled += len(labels)
        self.float_right += int((best == labels).sum())
        self.lns_right += int((found == labels).sum())
        self.float_loss += _loss(plain, labels)
        self.lns_loss += _loss(lns, labels)

    def to_dict(self, task: str) -> dict[str, Any]:
        """Plain data; None for what cannot be known."""
        losses = {
            "loss": _ratio(self.lns_loss, self.labelled),
            "float32_loss": _ratio(self.float_loss, self.labelled),
        }
        made: dict[str, Any] = {
            "samples": self.samples,
            "agreement": _ratio(Fraction(self.agree), self.places),
            "logits_sqnr_db": sqnr_db(self.signal, self.noise),
            "accuracy": _ratio(Fraction(self.lns_right), self.labelled),
            "float32_accuracy": _ratio(Fraction(self.float_right), self.labelled),
            **losses,
        }
        if task in ("next-token", "masked-token"):
            made |= {name.replace("loss", "perplexity"): _exponential(value) for name, value in losses.items()}
        if self.gradient_signal:
            made["gradients_sqnr_db"] = sqnr_db(self.gradient_signal, self.gradient_noise)
        return made


def sqnr_db(signal: Fraction, noise: Fraction) -> float | None:
    """Signal to noise in dB; None without either."""
    if not signal or not noise:
        return None
    ratio = signal / noise
    return 10 * (math.log10(ratio.numerator) - math.log10(ratio.denominator))


def _squares(x: Tensor) -> Fraction:
    value = float(x.double().square().sum())
    return Fraction(value) if math.isfinite(value) else Fraction(0)


def _loss(scores: Tensor, labels: Tensor) -> Fraction:
    value = float(torch.nn.functional.cross_entropy(scores.double(), labels, reduction="sum")) if len(labels) else 0.0
    return Fraction(value) if math.isfinite(value) else Fraction(0)


def _ratio(value: Fraction, count: int) -> float | None:
    return float(value / count) if count else None


def _exponential(value: float | None) -> float | None:
    return None if value is None or value > 700 else math.exp(value)


@dataclass(eq=False)
class Evaluation:
    """The result of :func:`evaluate`.

    Args:
        model, data: what ran on what.
        scores: of all processes.
        seen: what each product did, in all processes.
        seconds: of the emulated passes, in the process that took longest.
        float_seconds: of the float32 passes, likewise.
        settings: datapath, executor, device, batch, processes.
    """

    model: Model
    data: Samples
    scores: Scores
    seen: Seen
    seconds: float
    float_seconds: float
    settings: dict[str, Any] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        seen = self.seen.to_dict()
        return {
            "model": self.model.name,
            "task": self.model.task,
            "inputs": str(self.model.inputs),
            "parameters": self.model.parameters,
            "weights": self.model.weights,
            "weights_note": self.model.weights_note,
            "data": self.data.name,
            "data_source": self.data.source,
            "labels_note": self.data.labels_note,
            **self.settings,
            **self.scores.to_dict(self.model.task),
            "macs": seen["macs"],
            "float_macs": seen["float_macs"],
            "seconds": round(self.seconds, 4),
            "float32_seconds": round(self.float_seconds, 4),
            "not_emulated": seen["not_emulated"],
            "left_float": seen["left_float"],
            "layers": seen["layers"],
        }

    def text(self) -> str:
        """The result for people, a few lines."""
        found = self.scores.to_dict(self.model.task)
        random = self.model.weights == RANDOM
        lines = [
            f"{self.model.name}: {self.model.parameters:,} parameters, "
            f"{'RANDOM WEIGHTS' if random else 'weights'} {self.model.weights_note}",
            f"data: {self.data.source}, {found['samples']} samples",
        ]
        parts = []
        if found["agreement"] is not None:
            parts.append(f"agrees with float32 on {100 * found['agreement']:.2f} % of the largest scores")
        sqnr = found["logits_sqnr_db"]
        parts.append("the outputs are those of float32" if sqnr is None else f"outputs at {sqnr:.1f} dB")
        if "gradients_sqnr_db" in found:
            gradient = found["gradients_sqnr_db"]
            parts.append("gradients exact" if gradient is None else f"gradients at {gradient:.1f} dB")
        lines.append(", ".join(parts))
        if found["accuracy"] is not None and self.model.task == "classification":
            lines.append(
                f"accuracy {100 * found['accuracy']:.2f} %, float32 {100 * found['float32_accuracy']:.2f} %"
                + (" (of random weights)" if random else "")
            )
        elif found["loss"] is not None:
            shown = [f"loss {found['loss']:.4f} nats, float32 {found['float32_loss']:.4f}"]
            if found["perplexity"] is not None and found["float32_perplexity"] is not None:
                shown.append(f"perplexity {found['perplexity']:.2f}, float32 {found['float32_perplexity']:.2f}")
            lines.append("; ".join(shown) + (" (of random weights)" if random else ""))
        elif self.data.labels_note:
            lines.append(f"no accuracy: {self.data.labels_note}")
        rate = self.seen.macs / self.seconds / 1e6 if self.seconds else 0.0
        speed = f"{rate / 1000:.2f} G" if rate >= 1000 else f"{rate:.1f} M"
        lines.append(
            f"{self.seen.macs:,} MACs emulated in {self.seconds:.2f} s ({speed}MAC/s), {self.seen.float_macs:,} "
            f"left in float; {self._ran_on()}"
        )
        if self.seen.not_emulated:
            lines.append("not emulated: " + ", ".join(f"{n} (×{c})" for n, c in sorted(self.seen.not_emulated.items())))
        return "\n".join(lines)

    def facts(self) -> dict[str, str]:
        """What ran and what came out, for people, by name: for a page."""
        found = self.scores.to_dict(self.model.task)
        random = self.model.weights == RANDOM
        of_random = " (of random weights)" if random else ""

        def both(name: str, form: str) -> str:
            plain = found.get(f"float32_{name}")
            value = found.get(name)
            return "" if value is None or plain is None else f"{value:{form}}, float32 {plain:{form}}{of_random}"

        sqnr, gradients = found["logits_sqnr_db"], found.get("gradients_sqnr_db")
        made = {
            "Model": f"{self.model.name}, {self.model.parameters:,} parameters",
            "Weights": ("RANDOM: " if random else "") + self.model.weights_note,
            "Inputs": str(self.model.inputs),
            "Data": f"{self.data.source}, {found['samples']:,} samples",
            "Agreement with float32": "" if found["agreement"] is None else f"{found['agreement']:.2%}",
            "Outputs": "those of float32" if sqnr is None else f"{sqnr:.1f} dB",
            "Gradients": "" if gradients is None else f"{gradients:.1f} dB",
            "Accuracy": both("accuracy", ".2%") or self.data.labels_note,
            "Loss": both("loss", ".4f"),
            "Perplexity": both("perplexity", ".2f"),
            "Arithmetic": self._ran_on(),
            "Time": f"{self.seconds:.2f} s in LNS, {self.float_seconds:.2f} s in float32",
        }
        return {name: value for name, value in made.items() if value}

    def _ran_on(self) -> str:
        base, how = self.settings["datapath"], self.settings
        named = "datapaths of the recipe" if base is None else f"datapath {base['name']} ({base['fingerprint']})"
        processes = f", {how['processes']} processes" if how["processes"] > 1 else ""
        return f"{named}, executor {how['executor']}, batches of {how['batch']}{processes}"


@dataclass(frozen=True)
class Request:
    """What is to be run, as on the command line.

    Args:
        source: the model's name (:func:`~lnsdeploy.evaluation.models.load_model`).
        data, data_dir: the data set (:func:`~lnsdeploy.evaluation.samples.open_samples`).
        datapath, recipe: the arithmetic; `datapath` alone for all products, or as what a recipe's layers have that name
            none.
        executor: None for the fastest.
        device: cpu, cuda, cuda:N or auto.
        batch: samples at a time; None for 16 images or 4 texts.
        limit: the first so many samples.
        weights, seed, image_size, length, settings: of the model.
        backward: whether to emulate the backward pass too.
        threads: of torch. One by default, so that floats between the products are added in one order, on every machine
            and in any number of processes; the native library takes all cores, its words do not depend on them.
    """

    source: str
    data: str = "synthetic"
    data_dir: Path | None = None
    datapath: str | None = None
    recipe: Path | None = None
    executor: str | None = None
    device: str = "cpu"
    batch: int | None = None
    limit: int | None = None
    weights: str | None = None
    seed: int = 0
    image_size: int | None = None
    length: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    backward: bool = False
    threads: int = 1

    @classmethod
    def from_options(cls, source: str, *, settings: Sequence[str] = (), **options: Any) -> Request:
        """From the command line's options; those that are None, or not for here, are left out.

        Args:
            settings: texts ``KEY=VALUE``; a value is a number, true, false, or null as in JSON, or else a text.

        Raises:
            BadValueError: a setting is not of that form.
        """
        known = {each.name for each in fields(cls)}
        found = {name: value for name, value in options.items() if name in known and value is not None}
        return cls(source, settings=dict(parse_setting(text) for text in settings), **found)


Bar = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


@contextmanager
def _no_bar(label: str, total: int) -> Iterator[Callable[[int], None]]:
    yield lambda done: None


def run(request: Request, shards: Shards | None = None, bar: Bar = _no_bar) -> Evaluation | None:
    """Load, open, and evaluate what was asked for, in all processes.

    Args:
        bar: makes a progress bar of a label and a total.
    Returns: the result in the first process, None in the others.

    Raises: as :func:`load_together`, :func:`~lnsdeploy.evaluation.samples.open_samples` and :func:`evaluate`.
    """
    shards = shards or Shards()
    # what can be told at once should not be told after minutes of loading
    arithmetic = shards.together(lambda: _checked(request, shards))
    with _torch_threads(request.threads):
        model = load_together(
            shards,
            request.source,
            weights=request.weights,
            seed=request.seed,
            image_size=request.image_size,
            length=request.length,
            settings=request.settings,
        )
        model, data = shards.together(lambda: _open(request, model))
        batch = request.batch or (SEQUENCES if model.sequence else IMAGES)
        with bar("samples", len(data)) if shards.is_first else _no_bar("", 0) as progress:
            return evaluate(
                model,
                data,
                arithmetic,
                executor=request.executor,
                device=request.device,
                batch=batch,
                backward=request.backward,
                shards=shards,
                progress=progress,
            )


def _open(request: Request, model: Model) -> tuple[Model, Samples]:
    model = with_inputs(model, native_shape(request.data))
    if model.inputs is None:
        raise BadValueError(f"{model.name} does not say what it takes")
    inputs = model.inputs
    if model.classes is None and model.task == "classification" and request.data != "synthetic":
        model = replace(model, classes=_classes(model, inputs))
    data = open_samples(
        request.data,
        inputs,
        data_dir=request.data_dir,
        classes=model.classes,
        seed=request.seed,
        limit=request.limit,
    )
    return model, data


def _classes(model: Model, inputs: Input) -> int | None:
    """How many scores a model gives, by asking it once; what else is wrong with it is told when it runs."""
    try:
        with torch.no_grad():
            return model(synthetic(inputs, limit=1).batch(0, 1).inputs).shape[-1]
    except (LNSError, RuntimeError, ValueError, TypeError, IndexError):
        return None


@contextmanager
def _torch_threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _checked(request: Request, shards: Shards) -> Any:
    """The arithmetic, if that, the data set, the executor and the device are there."""
    if request.data not in data_names():
        raise UnknownNameError("data set", request.data, data_names())
    backend_for(request.executor, device_of(request.device, shards))
    arithmetic = _arithmetic(request)
    resolve(arithmetic)
    return arithmetic


def _arithmetic(request: Request) -> Any:
    """The datapath, or the recipe, whose layers have the datapath that is named beside it where they name none."""
    if request.recipe is None:
        return request.datapath or DATAPATH
    if request.datapath is None:
        return load_recipe(request.recipe)
    datapath = load_datapath(request.datapath)
    recipe = load_recipe(request.recipe, base=LayerRecipe(datapath.weight, datapath.activation))

    def filled(layer: LayerRecipe) -> LayerRecipe:
        return layer if layer.is_float or layer.datapath else replace(layer, datapath=request.datapath)

    return Recipe(filled(recipe.default), tuple((match, filled(layer)) for match, layer in recipe.layers))


def evaluate(
    model: Model,
    data: Samples,
    arithmetic: Any,
    *,
    executor: str | None = None,
    device: str = "cpu",
    batch: int = 64,
    backward: bool = False,
    shards: Shards | None = None,
    progress: Callable[[int], None] | None = None,
) -> Evaluation | None:
    """Run a model over samples in float32 and under emulation.

    Batches are dealt out to the processes whole, what a recipe records on the first is recorded by the first process
    for all, and sums are exact: the figures are those of a single process, to the bit.

    Args:
        model: with inputs; moved to `device`.
        arithmetic: what :func:`lnsdeploy.emulate` takes: a datapath or a recipe.
        batch: samples at a time. Offsets that are calibrated batch by batch depend on it.
        backward: also emulate the backward pass of the mean cross entropy, and compare gradients.
        shards: the processes; one by default.
        progress: called with the number of samples done, in the first process.
    Returns: the result in the first process, None in the others.

    Raises:
        BadValueError: the model does not take the samples, or returns no finite numbers.
    """
    shards = shards or Shards()
    work = shards.together(lambda: _Work(model, data, arithmetic, executor, device_of(device, shards), batch, backward))
    batches = -(-len(data) // batch)
    own = list(shards.own(batches))
    if work.records:
        # the first process records, on the first batch, for all
        shards.together(lambda: work.step(0) if shards.is_first else None)
        recorded = shards.broadcast(work.emulation.calibration() if shards.is_first else {})
        shards.together(lambda: None if shards.is_first else work.emulation.load_calibration(recorded))
    shards.together(partial(_first, work, own, shards))
    done = 1 if shards.is_first else 0
    rounds = -(-batches // shards.world)
    every = -(-rounds // _MEETINGS)
    for stop in range(every, rounds + every, every):
        mine = own[done:stop]
        done = stop
        shards.together(partial(_steps, work, mine))
        if progress and shards.is_first:
            progress(min(len(data), stop * shards.world * batch))
    told = shards.gather((work.scores, work.seen.to_dict(), work.seconds, work.float_seconds))
    return _result(model, data, told, work, shards) if shards.is_first else None


def _first(work: _Work, own: Sequence[int], shards: Shards) -> None:
    """The first process runs the first batch, unless it has; the others pack their weights."""
    if shards.is_first and not work.records:
        work.step(0)
    if not shards.is_first and own:
        work.warm(own[0])


def _steps(work: _Work, numbers: list[int]) -> None:
    for number in numbers:
        work.step(number)


class _Work:
    """What one process does, a batch at a time."""

    def __init__(
        self,
        model: Model,
        data: Samples,
        arithmetic: Any,
        executor: str | None,
        device: torch.device,
        batch: int,
        backward: bool,
    ):
        import lnsdeploy

        self.model, self.data, self.device, self.batch, self.backward = model, data, device, batch, backward
        model.module.to(device).requires_grad_(backward)
        self.emulation = lnsdeploy.emulate(arithmetic, backward=backward, executor=executor, model=model.module)
        self.emulation.frozen = True
        with self.emulation:
            # the first entry loads what torch unfuses with, which takes seconds
            pass
        recipe = self.emulation.recipe
        # whether anything of one batch matters to the next
        self.records = any(
            layer.offsets == "recorded" for layer in (recipe.default, *(layer for _, layer in recipe.layers))
        )
        self.scores = Scores()
        self.seconds = self.float_seconds = 0.0

    @property
    def seen(self) -> Seen:
        """What the products did so far."""
        return self.emulation

    def warm(self, number: int) -> None:
        """Encode and pack weights, on one sample, and forget what was counted: the first process counts them."""
        first = number * self.batch
        with self.emulation:
            self._run(self.data.batch(first, first + 1).inputs.to(self.device), None)
        self.emulation.forget()

    def step(self, number: int) -> None:
        """Run a batch, in float32 and then in LNS, and count it."""
        batch = self.data.batch(number * self.batch, (number + 1) * self.batch)
        x = batch.inputs.to(self.device)
        start = time.perf_counter()
        try:
            plain, slopes = self._run(x, batch.labels)
        except LNSError:
            raise
        except (RuntimeError, ValueError, TypeError, IndexError) as error:
            why = " ".join(str(error).split())
            raise BadValueError(f"{self.model.name} does not take inputs {tuple(x.shape)}: {why}") from error
        middle = time.perf_counter()
        with self.emulation:
            lns, found = self._run(x, batch.labels, plain)
        end = time.perf_counter()
        self.float_seconds += middle - start
        self.seconds += end - middle
        self.scores.count(self.model, batch, plain, lns)
        for name, slope in slopes.items():
            self.scores.gradient_signal += _squares(slope)
            self.scores.gradient_noise += _squares(slope.double() - found[name].double())

    def _run(self, x: Tensor, labels: Tensor | None, plain: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        """Outputs, and with a backward pass the gradients of all parameters."""
        if not self.backward:
            with torch.no_grad():
                return self._finished(self.model(x)), {}
        scores = self.model(x)
        if self.model.task == "outputs":
            return self._gradients(scores, scores.float().square().mean())
        # without labels, those that float32 would give
        best = (scores if plain is None else plain).detach().argmax(-1)
        targets = best if labels is None else labels.to(scores.device)
        loss = torch.nn.functional.cross_entropy(
            scores.reshape(-1, scores.shape[-1]).float(), targets.reshape(-1), ignore_index=-1
        )
        return self._gradients(scores, loss)

    def _gradients(self, scores: Tensor, loss: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        loss.backward()  # type: ignore[no-untyped-call]
        slopes = {n: p.grad for n, p in self.model.module.named_parameters() if p.grad is not None}
        self.model.module.zero_grad(set_to_none=True)
        return self._finished(scores.detach()), slopes

    def _finished(self, x: Tensor) -> Tensor:
        # a GPU computes on while Python measures nothing
        if x.is_cuda:
            torch.cuda.synchronize(x.device)
        return x


def load_together(shards: Shards, source: str, *, weights: str | None, **options: Any) -> Model:
    """A model with the same weights in all processes: the first decides between pretrained and random ones.

    Args: as :func:`~lnsdeploy.evaluation.models.load_model`.

    Raises:
        OtherProcessError: processes came to other weights, say because a file differs between machines.
    """
    first = shards.together(lambda: load_model(source, weights=weights, **options) if shards.is_first else None)
    kind, note = shards.broadcast((first.weights, first.weights_note) if first else ("", ""))
    choice = kind if weights is None and kind in (PRETRAINED, RANDOM) else weights
    model = shards.together(lambda: first or load_model(source, weights=choice, **options))

    if shards.world > 1:
        mine = digest(model.module)
        theirs = shards.broadcast(mine)

        def check() -> None:
            if theirs != mine:
                raise BadValueError(f"{source} has other weights here than in the first process: {mine}, not {theirs}")

        shards.together(check)
    return replace(model, weights_note=note)


def _result(
    model: Model, data: Samples, told: list[tuple[Scores, dict[str, Any], float, float]], work: _Work, shards: Shards
) -> Evaluation:
    scores, seen = work.scores, work.seen
    for other, counters, _, _ in told[1:]:
        scores.merge(other)
        seen.merge(counters)
    emulation = work.emulation
    name = backend_for(emulation.executor, work.device).name
    base = emulation.base
    settings = {
        "datapath": None if base is None else {"name": base.name, "fingerprint": base.fingerprint},
        "recipe": emulation.recipe.to_dict(),
        "executor": name,
        "device": work.device.type,
        "batch": work.batch,
        "backward": work.backward,
        "processes": shards.world,
    }
    return Evaluation(model, data, scores, seen, max(t[2] for t in told), max(t[3] for t in told), settings)
