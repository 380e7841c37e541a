"""What a training is fed with: batches of images or of text, as functions of seed and epoch (docs/training.md)."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lnsdeploy.errors import BadValueError
from lnsdeploy.formats import random_bytes
from lnsdeploy.training.data import Dataset, stratified_split
from lnsdeploy.training.text import Text

CONTEXT = 64

# Streams of the generator of spec 2.3; integer-madam has the first ones, by step, and the order of samples 2^62.
_AUGMENT_STREAM = 3 << 61
_TEXT_STREAM = 5 << 60
_LIMIT_STREAM = 7 << 60
# Shifts are up to this share of an image's width.
_SHIFT = 8

Integers = npt.NDArray[np.int64]


class Feed(Protocol):
    """Samples to train and to test on."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one input."""

    @property
    def sizes(self) -> tuple[int, int]:
        """Numbers of training and of test samples."""

    def batch(self, epoch: int, indices: Integers) -> tuple[Tensor, Tensor]:
        """Inputs and labels of some training samples, as they are in an epoch."""

    def test(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Inputs and labels of the test samples `first` … `last` − 1."""


class ImageFeed:
    """Images with labels.

    Args:
        dataset: where they come from.
        augment: see :class:`~lnsdeploy.training.run.TrainConfig`.
        limit: take that many, of each class in proportion, drawn by `seed`.
        seed: of the draw, and of shifts and flips.
        device: where batches are made.

    Raises:
        BadValueError: there are fewer than `limit`.
    """

    def __init__(self, dataset: Dataset, *, augment: str, limit: int | None, seed: int, device: torch.device):
        x, y = dataset.train_raw, dataset.train_y
        if limit is not None and limit != len(x):
            if limit > len(x):
                raise BadValueError(f"limit: {dataset.name} has {len(x)} training samples, not {limit}")
            _, chosen = stratified_split(y, limit, seed=seed, stream=_LIMIT_STREAM)
            x, y = x[chosen], y[chosen]
        # copies, as bytes where images are bytes: several trainings of a process may share the arrays
        self._train, self._test = (
            (torch.from_numpy(np.array(images)).to(device), torch.tensor(labels, device=device))
            for images, labels in ((x, y), (dataset.test_raw, dataset.test_y))
        )
        # divided by a tensor: for a number some devices multiply by its inverse, which rounds otherwise
        self._white = torch.tensor(255.0, device=device)
        self._crop, self._flip = "crop" in augment, "flip" in augment
        self._seed = seed
        self._drawn: tuple[int, npt.NDArray[np.uint8]] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._train[0].shape[1:])

    @property
    def sizes(self) -> tuple[int, int]:
        return len(self._train[1]), len(self._test[1])

    def batch(self, epoch: int, indices: Integers) -> tuple[Tensor, Tensor]:
        chosen = torch.from_numpy(indices).to(self._train[1].device)
        x = self._train[0][chosen]
        if self._crop or self._flip:
            x = self._augmented(x, self._draws(epoch)[indices])
        return self._floats(x), self._train[1][chosen]

    def test(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        return self._floats(self._test[0][first:last]), self._test[1][first:last]

    def _floats(self, x: Tensor) -> Tensor:
        return x.to(torch.float32) / self._white if x.dtype == torch.uint8 else x

    def _draws(self, epoch: int) -> npt.NDArray[np.uint8]:
        """Three random bytes a sample: who else is in a batch, or on which process, does not matter."""
        if self._drawn is None or self._drawn[0] != epoch:
            drawn = random_bytes(self._seed, _AUGMENT_STREAM + epoch, 3 * len(self._train[1]))
            self._drawn = epoch, drawn.reshape(-1, 3)
        return self._drawn[1]

    def _augmented(self, x: Tensor, draws: npt.NDArray[np.uint8]) -> Tensor:
        count, channels, height, width = x.shape
        reach = max(1, min(height, width) // _SHIFT) if self._crop else 0
        shifts = draws[:, :2].astype(np.int64) * (2 * reach + 1) >> 8
        rows = shifts[:, :1] + np.arange(height)
        columns = shifts[:, 1:] + np.arange(width)
        if self._flip:
            columns = np.where(draws[:, 2:] & 1, columns[:, ::-1], columns)
        if reach:
            x = torch.nn.functional.pad(x, (reach, reach, reach, reach))
        at, of = (torch.from_numpy(np.ascontiguousarray(index)).to(x.device) for index in (rows, columns))
        samples = torch.arange(count, device=x.device)
        planes = torch.arange(channels, device=x.device)
        return x[samples[:, None, None, None], planes[:, None, None], at[:, None, :, None], of[:, None, None, :]]


class TextFeed:
    """Stretches of a text, with the characters that follow.

    An epoch has the text once, cut into stretches of `context` characters. Where the first begins depends on the epoch.

    Args:
        text: the text.
        context: characters of a stretch.
        limit: train on so many stretches, the text's first.
        seed: of where stretches begin.
        device: where batches are made.

    Raises:
        BadValueError: the text is too short, or has fewer than `limit`.
    """

    def __init__(self, text: Text, *, context: int, limit: int | None, seed: int, device: torch.device):
        self._context, self._seed = context, seed
        count = (len(text.train) - 1) // context - 1
        tests = (len(text.test) - 1) // context
        if count < 1 or tests < 1:
            raise BadValueError(
                f"{text.source}: {len(text.train)} characters to train and {len(text.test)} to test on are too few for "
                f"a context of {context}"
            )
        if limit is not None and limit > count:
            raise BadValueError(f"limit: the text has {count} stretches of {context} characters, not {limit}")
        self._sizes = limit or count, tests
        self._train, self._test = (
            torch.from_numpy(tokens.astype(np.int64)).to(device) for tokens in (text.train, text.test)
        )

    @property
    def shape(self) -> tuple[int, ...]:
        return (self._context,)

    @property
    def sizes(self) -> tuple[int, int]:
        return self._sizes

    def batch(self, epoch: int, indices: Integers) -> tuple[Tensor, Tensor]:
        drawn = int(random_bytes(self._seed, _TEXT_STREAM + epoch, 8).view("<u8")[0])
        return self._stretches(self._train, drawn % self._context + indices * self._context)

    def test(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        return self._stretches(self._test, np.arange(first, last) * self._context)

    def _stretches(self, tokens: Tensor, starts: Integers) -> tuple[Tensor, Tensor]:
        at = torch.from_numpy(starts[:, None] + np.arange(self._context + 1)).to(tokens.device)
        taken = tokens[at]
        return taken[:, :-1], taken[:, 1:]
