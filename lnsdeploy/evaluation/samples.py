"""What models are fed with: test sets that are read a batch at a time, in any order, by any number of processes.

Sample i is the same whatever the batch it is in and whoever asks for it. What a sample is brought to, size, channels
and normalisation, is the model's wish (:mod:`lnsdeploy.evaluation.inputs`).
"""

from __future__ import annotations

import mmap
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lnsdeploy.errors import BadFileError, BadValueError, UnknownNameError
from lnsdeploy.evaluation.inputs import ImageInput, Input, TensorInput, TokenInput
from lnsdeploy.formats import random_bytes
from lnsdeploy.training.cifar import LAYOUTS, find_cifar, read_cifar
from lnsdeploy.training.data import data_roots, load_data
from lnsdeploy.training.pictures import pillow, read_picture

Pixels = npt.NDArray[np.uint8]

# Synthetic samples, where no limit says how many.
SYNTHETIC = 64

_IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
_SYNSET = re.compile(r"n\d{8}")
# Bytes of text that are tokenized together.
_PIECE = 1 << 16


@dataclass(frozen=True, eq=False)
class Batch:
    """Some samples.

    Args:
        inputs: float32 [n, …] or int64 [n, length].
        labels: int64 [n], classes; int64 [n, length], tokens, −1 where none is asked for; None if nobody knows.
    """

    inputs: Tensor
    labels: Tensor | None


class Samples(Protocol):
    """A test set in the form that a model wants."""

    @property
    def name(self) -> str:
        """As on the command line."""

    @property
    def source(self) -> str:
        """Where they come from, for people."""

    @property
    def labels_note(self) -> str:
        """Why there are no labels, or empty."""

    def __len__(self) -> int:
        """How many."""

    def batch(self, first: int, last: int) -> Batch:
        """Samples `first` … `last` − 1."""


@dataclass(frozen=True, eq=False)
class _Made:
    """Samples, as functions of their numbers.

    Args:
        one: the input with this number.
        label: its label; None if there are none.
    """

    name: str
    source: str
    count: int
    one: Callable[[int], Tensor]
    label: Callable[[int], Tensor] | None = None
    labels_note: str = ""

    def __len__(self) -> int:
        return self.count

    def batch(self, first: int, last: int) -> Batch:
        """See :class:`Samples`."""
        numbers = range(first, min(last, self.count))
        inputs = torch.stack([self.one(number) for number in numbers])
        return Batch(inputs, None if self.label is None else torch.stack([self.label(number) for number in numbers]))


def data_names() -> list[str]:
    """Names that :func:`open_samples` knows."""
    return ["synthetic", "digits", "mnist", "fashion-mnist", "cifar10", "cifar100", "folder", "text"]


def native_shape(name: str) -> tuple[int, int, int] | None:
    """The shape of the images of a data set; None if they have none of their own."""
    shapes = {"digits": (1, 8, 8), "mnist": (1, 28, 28), "fashion-mnist": (1, 28, 28)}
    return shapes.get(name) or ((3, 32, 32) if name in LAYOUTS else None)


def open_samples(
    name: str,
    inputs: Input,
    *,
    data_dir: Path | None = None,
    classes: int | None = None,
    seed: int = 0,
    limit: int | None = None,
) -> Samples:
    """The test samples of a data set, as a model wants them.

    ``synthetic``: made up from `seed`, the same on every machine. ``digits``, ``mnist``, ``fashion-mnist``,
    ``cifar10``, ``cifar100``: their test sets (:func:`~lnsdeploy.training.data.load_data`). ``folder``: photographs in
    `data_dir`, a folder a class. ``text``: a file of text, cut into sequences.

    Args:
        inputs: what the model takes.
        data_dir: the folder or file.
        classes: of the model; labels of a data set with another number of classes mean nothing to it.
        limit: the first so many only.

    Raises:
        UnknownNameError: no such data set.
        BadValueError: these data are of no use for this model.
        BadFileError: files are missing or damaged; the message names them.
        MissingDependencyError: Pillow is needed and not installed.
    """
    if name not in data_names():
        raise UnknownNameError("data set", name, data_names())
    if name == "synthetic":
        return synthetic(inputs, seed=seed, limit=limit)
    if isinstance(inputs, TokenInput) != (name == "text"):
        other = "--data text or synthetic" if isinstance(inputs, TokenInput) else "images, or --data synthetic"
        raise BadValueError(f"the model takes {inputs}; {name!r} is of no use to it: give it {other}")
    if isinstance(inputs, TokenInput):
        return _text(inputs, data_dir, limit)
    if isinstance(inputs, TensorInput):
        raise BadValueError(f"the model takes arrays of {inputs}; only --data synthetic has such")
    if name == "folder":
        return _folder(inputs, data_dir, classes, seed, limit)
    return _labelled(name, inputs, data_dir, classes, limit)


# ---------------------------------------------------------------------------------------------------
# Synthetic


def synthetic(inputs: Input, *, seed: int = 0, limit: int | None = None) -> Samples:
    """Samples that nobody photographed or wrote: for speed, and for error where no real data are at hand.

    Images are coloured noise whose spectrum falls as that of photographs (about 1/f, Field 1987), made of integers, so
    the same on every machine; tokens are uniform; other arrays are normal.

    Args:
        limit: how many; 64 by default.
    """
    count = limit or SYNTHETIC
    if isinstance(inputs, ImageInput):
        source = f"synthetic: coloured noise of seed {seed}, no photographs"
        prepare = _Normal(inputs)
        return _Made(
            "synthetic",
            source,
            count,
            lambda i: prepare(_noise(inputs.shape, seed, i)),
            None,
            "synthetic images have none",
        )
    if isinstance(inputs, TokenInput):

        def tokens(number: int) -> Tensor:
            words = random_bytes(seed, number, 8 * (inputs.length + 1)).view("<u8")
            return torch.from_numpy((words % np.uint64(inputs.vocabulary)).astype(np.int64))

        return _tokens("synthetic", f"synthetic: random tokens of seed {seed}, no text", count, inputs, tokens, seed)

    def normal(number: int) -> Tensor:
        words = random_bytes(seed, number, 48 * int(np.prod(inputs.shape))).view("<u4").reshape(12, *inputs.shape)
        # twelve uniform numbers less six: integers again, and near enough
        return torch.from_numpy((words.astype(np.float64).sum(axis=0) / 2**32 - 6).astype(np.float32))

    return _Made(
        "synthetic", f"synthetic: normal numbers of seed {seed}", count, normal, None, "synthetic arrays have none"
    )


def _noise(shape: tuple[int, int, int], seed: int, number: int) -> Pixels:
    """Value noise: grids of 2, 4, 8, … random numbers a side, bilinearly enlarged, each half as strong as the last.

    Three of four parts of it are the same in all channels, as colours in photographs mostly go together.

    Returns: uint8 [channels, height, width].
    """
    channels, height, width = shape
    layers = channels + (channels > 1)
    total = np.zeros((layers, height, width), dtype=np.int64)
    cells, level = 2, 0
    largest = max(height, width)
    while True:
        side = min(cells, largest) + 1
        values = random_bytes(seed, (number << 8) + level, layers * side * side).reshape(layers, side, side)
        total += _enlarged(values.astype(np.int64) - 128, height, width) << max(0, 10 - level)
        if cells >= largest:
            break
        cells, level = 2 * cells, level + 1
    if channels > 1:
        total = total[:-1] + 3 * total[-1]
    low, high = int(total.min()), int(total.max())
    return ((total - low) * 255 // max(high - low, 1)).astype(np.uint8)


def _enlarged(values: npt.NDArray[np.int64], height: int, width: int) -> npt.NDArray[np.int64]:
    """Bilinear interpolation at height × width places, in 1/256 of a cell; [layers, height, width]."""
    side = values.shape[1] - 1
    for axis, size in ((1, height), (2, width)):
        places = np.arange(size) * side * 256 // size
        cell, part = places >> 8, places & 255
        part = part.reshape((-1, 1) if axis == 1 else (1, -1))
        values = (values.take(cell, axis) * (256 - part) + values.take(cell + 1, axis) * part) >> 8
    return values


# ---------------------------------------------------------------------------------------------------
# Images


@dataclass(frozen=True)
class _Normal:
    """Pixels to a model's input."""

    inputs: ImageInput

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        mean, std = (torch.tensor(v, dtype=torch.float32)[:, None, None] for v in (self.inputs.mean, self.inputs.std))
        return mean, std

    def __call__(self, pixels: Pixels) -> Tensor:
        """float32 [channels, height, width] of uint8 [1 or 3, any, any]: size, channels, then normalised."""
        channels, height, width = self.inputs.shape
        image = torch.from_numpy(np.array(pixels, dtype=np.float32))
        if image.shape[0] != channels:
            # grey is what the eye sees of a colour (Rec. 601); a colour of a grey is grey
            grey = (
                image if len(image) == 1 else (image * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)[None]
            )
            image = grey.expand(channels, -1, -1)
        if image.shape[1:] != (height, width):
            mode = "bicubic" if self.inputs.interpolation in ("bicubic", "lanczos") else "bilinear"
            image = torch.nn.functional.interpolate(
                image[None], (height, width), mode=mode, align_corners=False, antialias=True
            )[0].clamp(0, 255)
        mean, std = self._affine
        return (image / 255 - mean) / std


def _labelled(name: str, inputs: ImageInput, data_dir: Path | None, classes: int | None, limit: int | None) -> Samples:
    if name in LAYOUTS:
        layout, folder = find_cifar(name, data_roots(data_dir))
        pixels, labels = read_cifar(layout, folder, "test")
        known, source = layout.classes, f"{len(labels)} test images of {layout.folder} in {folder}"
    else:
        found = load_data(name, data_dir)
        pixels = np.rint(found.test_x * np.float32(255)).astype(np.uint8)
        labels, known, source = found.test_y, found.classes, found.source
    prepare = _Normal(inputs)
    count = min(limit or len(labels), len(labels))
    note = _other_classes(name, known, classes)
    return _Made(
        name,
        source,
        count,
        lambda i: prepare(pixels[i]),
        None if note else lambda i: torch.tensor(int(labels[i])),
        note,
    )


def _other_classes(name: str, known: int, classes: int | None) -> str:
    if classes is None or classes == known:
        return ""
    return f"{name} has {known} classes, the model {classes}"


def _folder(inputs: ImageInput, data_dir: Path | None, classes: int | None, seed: int, limit: int | None) -> Samples:
    if data_dir is None:
        raise BadValueError("--data folder needs --data-dir, a folder with a subfolder of images for each class")
    pillow()
    try:
        names = sorted(entry.name for entry in data_dir.iterdir() if entry.is_dir() and not entry.name.startswith("."))
        members = {name: sorted(_images(data_dir / name)) for name in names}
    except OSError as error:
        raise BadFileError(f"cannot read {data_dir}: {error.strerror or error}") from error
    members = {name: files for name, files in members.items() if files}
    if not members:
        loose = any(data_dir.glob("*.*"))
        raise BadFileError(
            f"{data_dir}: no subfolder holds images ({', '.join(_IMAGE_SUFFIXES)})"
            + ("; they lie in the folder itself: move them into one, named after their class" if loose else "")
        )
    numbers, note = _class_numbers(list(members), classes)
    files = [(file, name) for name, found in members.items() for file in found]
    # the first so many should be of all classes: an order that depends on the seed alone
    keys = random_bytes(seed, 1, 8 * len(files)).view("<u8")
    order = np.argsort(keys, kind="stable")
    prepare = _Normal(inputs)
    count = min(limit or len(files), len(files))

    def one(number: int) -> Tensor:
        return prepare(read_image(files[order[number]][0], inputs))

    def label(number: int) -> Tensor:
        return torch.tensor(numbers[files[order[number]][1]])

    source = f"{len(files)} images of {len(members)} classes in {data_dir}"
    return _Made("folder", source, count, one, None if note else label, note)


def _images(folder: Path) -> list[Path]:
    return [file for file in folder.rglob("*") if file.suffix.lower() in _IMAGE_SUFFIXES and file.is_file()]


def _class_numbers(names: list[str], classes: int | None) -> tuple[dict[str, int], str]:
    """The class that each folder stands for, or why that is not known.

    Folders are counted in the order of their names; those that are numbers say it themselves; those of ImageNet, where
    not all are there, are looked up in timm's list.
    """
    if all(re.fullmatch(r"\d{1,6}", name) for name in names):
        numbers = {name: int(name) for name in names}
        if len(set(numbers.values())) == len(names) and (classes is None or max(numbers.values()) < classes):
            return numbers, ""
    if classes is None or len(names) == classes:
        return {name: number for number, name in enumerate(names)}, ""
    if classes == 1000 and all(_SYNSET.fullmatch(name) for name in names):
        from lnsdeploy.evaluation.models import imagenet_synsets

        known = {name: number for number, name in enumerate(imagenet_synsets())}
        if all(name in known for name in names):
            return {name: known[name] for name in names}, ""
    return {}, f"{len(names)} folders do not name which of the model's {classes} classes they are"


def read_image(file: Path, inputs: ImageInput) -> Pixels:
    """An image file as a model takes it: :func:`~lnsdeploy.training.pictures.read_picture`, uint8 [C, H, W]."""
    return read_picture(file, inputs.shape, crop=inputs.crop, interpolation=inputs.interpolation)


# ---------------------------------------------------------------------------------------------------
# Text


def _tokens(
    name: str, source: str, count: int, inputs: TokenInput, window: Callable[[int], Tensor], seed: int = 0
) -> Samples:
    """Sequences: the label of a token is the one after it; or, with a mask, what it hides, in one place of seven."""
    if inputs.mask is None:
        return _Made(name, source, count, lambda i: window(i)[:-1], lambda i: window(i)[1:])

    def hidden(number: int) -> Tensor:
        found = torch.from_numpy(random_bytes(seed, (1 << 40) + number, inputs.length).astype(np.int64)) < 37
        # at least one, or a short sequence would have nothing to guess
        found[int(random_bytes(seed, (1 << 41) + number, 4).view("<u4")[0]) % inputs.length] = True
        return found

    def one(number: int) -> Tensor:
        return window(number)[:-1].masked_fill(hidden(number), inputs.mask or 0)

    return _Made(name, source, count, one, lambda i: window(i)[:-1].masked_fill(~hidden(i), -1))


def _text(inputs: TokenInput, file: Path | None, limit: int | None) -> Samples:
    if file is None:
        raise BadValueError("--data text needs --data-dir, a file of text")
    if file.is_dir():
        raise BadValueError(f"--data text reads a file, and {file} is a folder: name a file of it")
    try:
        size = file.stat().st_size
    except OSError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror or error}") from error
    if size == 0:
        raise BadFileError(f"{file}: is empty")
    if inputs.tokenizer is None:
        if inputs.vocabulary < 256:
            raise BadValueError(
                f"the model has {inputs.vocabulary} tokens and no tokenizer: too few for the bytes of a text; use "
                "--data synthetic"
            )
        ids: npt.NDArray[Any] = _mapped(file)
        how = "bytes as tokens"
    else:
        ids = _tokenized(file, inputs, inputs.tokenizer, None if limit is None else limit * inputs.length + 1)
        how = "the model's tokenizer"
    count = (len(ids) - 1) // inputs.length
    if count < 1:
        raise BadFileError(
            f"{file}: {len(ids)} tokens, fewer than the {inputs.length + 1} of one sequence; try --length"
        )
    count = min(limit or count, count)

    def window(number: int) -> Tensor:
        first = number * inputs.length
        return torch.from_numpy(ids[first : first + inputs.length + 1].astype(np.int64))

    return _tokens("text", f"text of {file}, {how}", count, inputs, window)


def _mapped(file: Path) -> Pixels:
    try:
        with file.open("rb") as handle:
            return np.frombuffer(mmap.mmap(handle.fileno(), 0, access=mmap.ACCESS_READ), dtype=np.uint8)
    except (OSError, ValueError) as error:
        raise BadFileError(f"cannot read {file}: {getattr(error, 'strerror', None) or error}") from error


def _tokenized(
    file: Path, inputs: TokenInput, tokenizer: Callable[[str], list[int]], enough: int | None
) -> npt.NDArray[np.int32]:
    """Tokens of a text, piece by piece, cut at line ends, until there are enough."""
    pieces: list[npt.NDArray[np.int32]] = []
    have = 0
    try:
        with file.open("r", encoding="utf-8") as handle:
            while enough is None or have < enough:
                lines = handle.readlines(_PIECE)
                if not lines:
                    break
                found = np.asarray(tokenizer("".join(lines)), dtype=np.int32)
                pieces.append(found)
                have += len(found)
    except UnicodeDecodeError as error:
        raise BadFileError(f"{file}: not a text in UTF-8: {error.reason} at byte {error.start}") from error
    except OSError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror or error}") from error
    ids = np.concatenate(pieces) if pieces else np.zeros(0, dtype=np.int32)
    if ids.size and not 0 <= int(ids.min()) <= int(ids.max()) < inputs.vocabulary:
        raise BadValueError(f"the tokenizer makes tokens up to {int(ids.max())}, the model has {inputs.vocabulary}")
    return ids
