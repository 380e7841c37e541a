"""Data sets of one's own: an .npz file of NumPy arrays, split into training and test set."""

from __future__ import annotations

import io
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadFileError
from lnsdeploy.files import read_bytes

KEYS = ("train_x", "train_y", "test_x", "test_y")
_LIMIT = 1 << 34


def names_arrays(name: str) -> bool:
    """Whether a data set's name is that of a file of arrays."""
    return name.endswith(".npz")


def find_arrays(name: str, data_dir: Path | None) -> Path:
    """The file: as it is named, or in `data_dir`."""
    file = Path(name)
    if data_dir is not None and not file.is_file() and (data_dir / file).is_file():
        return data_dir / file
    return file


def is_split(path: Path) -> bool:
    """Whether a file of arrays holds a data set, rather than inputs alone. False where it cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return {f"{key}.npy" for key in KEYS} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False


def read_arrays(path: Path) -> tuple[dict[str, npt.NDArray[Any]], int]:
    """The four arrays of a data set, and how many classes it has.

    Args:
        path: an .npz file with ``train_x`` and ``test_x`` (numbers, [n, …] of the same shape) and ``train_y`` and
            ``test_y`` (the classes 0, 1, …).

    Returns: inputs as float32, labels as int64.

    Raises:
        BadFileError: the file is missing or damaged, or does not hold such arrays; the message says which.
    """
    data = read_bytes(path, limit=_LIMIT)
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as found:
            missing = [key for key in KEYS if key not in found.files]
            if missing:
                raise BadFileError(
                    f"{path}: no {', '.join(missing)} in it; a data set has the arrays {', '.join(KEYS)}, this file "
                    f"{', '.join(found.files) or 'none'}"
                )
            arrays = {key: found[key] for key in KEYS}
    except (ValueError, OSError, EOFError, KeyError, zipfile.BadZipFile, zlib.error, AttributeError) as error:
        raise BadFileError(f"{path}: not a readable .npz file of numbers ({error})") from error
    for part in ("train", "test"):
        x, y = arrays[f"{part}_x"], arrays[f"{part}_y"]
        if x.dtype.kind not in "fiub" or x.ndim < 2 or not x.size:
            raise BadFileError(f"{path}: {part}_x must be numbers [n, …], not {x.dtype} of the shape {list(x.shape)}")
        if y.dtype.kind not in "iu" or y.shape != (len(x),):
            raise BadFileError(
                f"{path}: {part}_y must be {len(x)} integers, not {y.dtype} of the shape {list(y.shape)}"
            )
        if not np.isfinite(x).all():
            raise BadFileError(f"{path}: {part}_x holds NaN or infinity")
        if y.min() < 0:
            raise BadFileError(f"{path}: {part}_y holds {int(y.min())}; classes are 0, 1, …")
        arrays[f"{part}_x"], arrays[f"{part}_y"] = x.astype(np.float32), y.astype(np.int64)
    shapes = [list(arrays[f"{part}_x"].shape[1:]) for part in ("train", "test")]
    if shapes[0] != shapes[1]:
        raise BadFileError(f"{path}: training inputs are {shapes[0]}, test inputs {shapes[1]}")
    classes = int(arrays["train_y"].max()) + 1
    if classes < 2 or int(arrays["test_y"].max()) >= classes:
        raise BadFileError(
            f"{path}: training labels up to {classes - 1}, test labels up to {int(arrays['test_y'].max())}"
        )
    for array in arrays.values():
        array.setflags(write=False)
    return arrays, classes
