"""Text to train on, character by character (docs/training.md)."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadFileError
from lnsdeploy.files import read_bytes

PREFIX = "text:"
# The last tenth of a text is not trained on.
_TEST_SHARE = 10
_MAX_BYTES = 1 << 30
_MAX_CHARACTERS = 1 << 16

Tokens = npt.NDArray[np.uint16]


@dataclass(frozen=True, eq=False)
class Text:
    """A text as numbers of characters.

    Args:
        train, test: uint16 [n], the first nine tenths of the text and the last one.
        vocabulary: the characters that occur, sorted; a token is a place in it.
        name: ``"text:FILE"``.
        source: where it comes from, for people.
    """

    train: Tokens
    test: Tokens
    vocabulary: str
    name: str
    source: str

    @property
    def classes(self) -> int:
        """The size of the vocabulary."""
        return len(self.vocabulary)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits: a hash of vocabulary and tokens."""
        found = hashlib.sha256(self.vocabulary.encode())
        for tokens in (self.train, self.test):
            found.update(str(len(tokens)).encode())
            found.update(np.ascontiguousarray(tokens, dtype="<u2").tobytes())
        return found.hexdigest()[:16]


def is_text(name: str) -> bool:
    """Whether a data set's name is that of a text file."""
    return name.startswith(PREFIX)


def load_text(name: str, data_dir: str | os.PathLike[str] | None = None) -> Text:
    """A text by the name ``text:FILE``; UTF-8, every character a token.

    Args:
        data_dir: where a relative FILE is looked for; by default the current folder.

    Raises:
        BadFileError: the file is missing, not UTF-8, or too short to be split.
    """
    file = Path(name.removeprefix(PREFIX))
    if data_dir is not None:
        file = Path(data_dir) / file
    try:
        # line ends as they are everywhere, so that a digest does not depend on who copied the file
        text = read_bytes(file, limit=_MAX_BYTES).decode("utf-8").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise BadFileError(f"{file}: not UTF-8 text: {error.reason} at byte {error.start}") from error
    points = np.frombuffer(text.encode("utf-32-le"), dtype="<u4")
    if len(points) < 2 * _TEST_SHARE:
        raise BadFileError(f"{file}: {len(points)} characters are too few to train on")
    characters, tokens = np.unique(points, return_inverse=True)
    if not 2 <= len(characters) <= _MAX_CHARACTERS:
        raise BadFileError(f"{file}: {len(characters)} different characters; 2 to {_MAX_CHARACTERS} can be trained on")
    vocabulary = "".join(map(chr, characters.tolist()))
    cut = len(points) - len(points) // _TEST_SHARE
    wide = tokens.reshape(-1).astype(np.uint16)
    return Text(wide[:cut], wide[cut:], vocabulary, name, str(file))
