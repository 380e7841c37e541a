"""Data sets: the real digits that come with scikit-learn, files in the IDX layout of MNIST, and CIFAR."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadFileError, BadTypeError, MissingDependencyError, UnknownNameError
from lnsdeploy.formats import random_bytes
from lnsdeploy.training.cifar import find_cifar, read_cifar

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]

# The folder of data sets, where no other is named.
DATA_VARIABLE = "LNSDEPLOY_DATA"

_DIGITS_TEST = 360
_DIGITS_SHAPE = (1797, 65)
# No data set of this layout comes near; a header that says more is damaged or hostile.
_MAX_ELEMENTS = 1 << 31
_READ = 1 << 20


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, split into training and test set.

    Args:
        train_x, test_x: float32 [n, channels, height, width] in 0 … 1.
        train_y, test_y: int64 [n], the classes 0 … `classes` − 1.
        classes: their number.
        name: as in :func:`load_data`.
        source: where it comes from, for people.
    """

    train_x: Images
    train_y: Labels
    test_x: Images
    test_y: Labels
    classes: int
    name: str
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input: channels, height, width."""
        return tuple(self.train_x.shape[1:])

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits: a hash of all images and labels."""
        found = hashlib.sha256()
        for array in (self.train_x, self.train_y, self.test_x, self.test_y):
            found.update(f"{array.dtype}{array.shape}".encode())
            found.update(np.ascontiguousarray(array).tobytes())
        return found.hexdigest()[:16]


def load_data(name: str, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """A data set by name.

    ``digits``: 1,797 real 8×8 images of handwritten digits that come with scikit-learn, split into 1,437 for
    training and 360 for testing, always in the same way and with the classes' shares kept.
    ``mnist``, ``fashion-mnist``: the four IDX files of these sets (or of any other in that layout), plain or
    gzipped.
    ``cifar10``, ``cifar100``: 50,000 and 10,000 photographs of 32×32, in the binary or the Python layout in which
    they are published, unpacked; as float32 they take 740 MB.

    Args:
        data_dir: the folder with the files, or with a folder `name` (or of the published name) that holds them. By
            default the folder that the variable LNSDEPLOY_DATA names, or ``data``.

    Raises:
        UnknownNameError: no such data set.
        BadFileError: files are missing (the message says where they were looked for) or damaged.
        MissingDependencyError: scikit-learn is needed and not installed.
    """
    if name not in _LOADERS:
        raise UnknownNameError("data set", name, _LOADERS)
    if data_dir is not None and not isinstance(data_dir, (str, os.PathLike)):
        raise BadTypeError(f"data_dir must be a path, not {data_dir!r}")
    return _LOADERS[name](name, None if data_dir is None else Path(data_dir))


def data_names() -> list[str]:
    """Names that :func:`load_data` knows."""
    return sorted(_LOADERS)


# ---------------------------------------------------------------------------------------------------
# Digits


@lru_cache(maxsize=1)
def _digits() -> Dataset:
    pixels, labels = _digits_file() or _digits_function()
    images = (pixels.reshape(-1, 1, 8, 8) / 16.0).astype(np.float32)
    train, test = stratified_split(labels, _DIGITS_TEST)
    arrays = images[train], labels[train], images[test], labels[test]
    for array in arrays:
        # shared by all callers of this process
        array.setflags(write=False)
    source = "scikit-learn load_digits: a part of Optical Recognition of Handwritten Digits (UCI), Alpaydin and Kaynak"
    return Dataset(*arrays, 10, "digits", source)


def _digits_file() -> tuple[npt.NDArray[np.int64], Labels] | None:
    """Pixels and labels from the file inside scikit-learn, which takes a second to import; None if it moved."""
    found = importlib.util.find_spec("sklearn")
    for folder in (found.submodule_search_locations or []) if found else []:
        file = Path(folder) / "datasets" / "data" / "digits.csv.gz"
        try:
            with gzip.open(file, "rt", encoding="ascii") as handle:
                rows = np.loadtxt(handle, delimiter=",", dtype=np.int64)
        except (OSError, ValueError, EOFError, zlib.error):
            continue
        if rows.shape == _DIGITS_SHAPE and rows.min() >= 0 and rows.max() <= 16 and rows[:, -1].max() == 9:
            return rows[:, :-1], rows[:, -1].copy()
    return None


def _digits_function() -> tuple[npt.NDArray[np.int64], Labels]:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise MissingDependencyError("the digits come with scikit-learn: pip install 'lnsdeploy[train]'") from error
    found = load_digits()
    return found.data.astype(np.int64), found.target.astype(np.int64)


def _load_digits(name: str, data_dir: Path | None) -> Dataset:
    return _digits()


def stratified_split(labels: Labels, count: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of a training set and of a test set of `count`, with each class in proportion.

    Depends on the labels alone: which samples are taken follows from the generator of spec 2.3.

    Args:
        labels: int64 [n], classes 0, 1, …
        count: size of the test set.
    Returns: sorted int64 [n − count] and [count].
    """
    labels = np.asarray(labels)
    sizes = np.bincount(labels)
    quotas = sizes * count / len(labels)
    shares = np.floor(quotas).astype(np.int64)
    # the largest remainders take what rounding down has left
    for index in np.argsort(shares - quotas, kind="stable")[: count - int(shares.sum())]:
        shares[index] += 1
    keys = random_bytes(0, 0, 8 * len(labels)).view("<u8")
    test = np.concatenate(
        [
            members[np.argsort(keys[members], kind="stable")[:share]]
            for members, share in ((np.flatnonzero(labels == c), shares[c]) for c in range(len(sizes)))
        ]
    )
    chosen = np.zeros(len(labels), dtype=bool)
    chosen[test] = True
    return np.flatnonzero(~chosen), np.flatnonzero(chosen)


# ---------------------------------------------------------------------------------------------------
# IDX files

_FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}


def _load_idx(name: str, data_dir: Path | None) -> Dataset:
    folder = _find_folder(name, data_dir)
    arrays = {key: read_idx(_find_file(folder, stem)) for key, stem in _FILES.items()}
    for key, stem in _FILES.items():
        wanted = 3 if key.endswith("x") else 1
        if arrays[key].ndim != wanted:
            raise BadFileError(f"{folder / stem}: has {arrays[key].ndim} axes, {wanted} are needed")
    for part in ("train", "test"):
        images, labels = arrays[f"{part}_x"], arrays[f"{part}_y"]
        where = folder / _FILES[f"{part}_x"]
        if len(images) != len(labels) or not images.size:
            raise BadFileError(f"{where}: {len(images)} images of shape {images.shape[1:]} for {len(labels)} labels")
    if arrays["train_x"].shape[1:] != arrays["test_x"].shape[1:]:
        raise BadFileError(
            f"{folder}: training images are {arrays['train_x'].shape[1:]}, test images {arrays['test_x'].shape[1:]}"
        )
    classes = int(arrays["train_y"].max()) + 1
    if int(arrays["test_y"].max()) >= classes or classes < 2:
        raise BadFileError(
            f"{folder}: training labels up to {classes - 1}, test labels up to {int(arrays['test_y'].max())}"
        )
    train_x, test_x = (_scaled(arrays[key]) for key in ("train_x", "test_x"))
    train_y, test_y = (arrays[key].astype(np.int64) for key in ("train_y", "test_y"))
    return Dataset(train_x, train_y, test_x, test_y, classes, name, f"IDX files in {folder}")


def _scaled(images: npt.NDArray[np.uint8]) -> Images:
    return (images.astype(np.float32) / np.float32(255))[:, None]


def data_roots(data_dir: Path | None) -> list[Path]:
    """Where to look for files: in `data_dir`, or by default in what LNSDEPLOY_DATA names and in ``data``."""
    if data_dir is not None:
        return [data_dir]
    variable = os.environ.get(DATA_VARIABLE)
    return [*([Path(variable)] if variable else []), Path("data")]


def _find_folder(name: str, data_dir: Path | None) -> Path:
    looked = [folder for root in data_roots(data_dir) for folder in (root, root / name)]
    for folder in looked:
        if any(_candidates(folder, stem) for stem in _FILES.values()):
            return folder
    files = ", ".join(_FILES.values())
    raise BadFileError(
        f"data set {name!r} not found: looked in {', '.join(str(f) for f in looked)} for {files} (plain or .gz). "
        f"Download these four files and name their folder with --data-dir, or its parent in {DATA_VARIABLE}"
    )


def _candidates(folder: Path, stem: str) -> list[Path]:
    names = (stem, stem.replace("-idx", ".idx"))
    return [folder / f"{n}{end}" for n in names for end in ("", ".gz") if (folder / f"{n}{end}").is_file()]


def _find_file(folder: Path, stem: str) -> Path:
    found = _candidates(folder, stem)
    if not found:
        raise BadFileError(f"{folder / stem} is missing (plain or .gz), though other files of the set are there")
    return found[0]


def read_idx(path: str | os.PathLike[str]) -> npt.NDArray[np.uint8]:
    """An array of bytes from a file in the IDX layout: 0, 0, type 8, axes, their sizes (big-endian), data.

    Sizes are compared with the file's before anything is allocated; a gzipped file is unpacked no further than
    its header says.

    Args:
        path: gzipped if it ends in ``.gz``.

    Raises:
        BadFileError: the file is missing, truncated, too long, or not an IDX file of bytes.
    """
    file = Path(path)
    try:
        with gzip.open(file, "rb") if file.suffix == ".gz" else file.open("rb") as handle:
            magic = handle.read(4)
            if len(magic) < 4 or magic[:2] != b"\0\0":
                raise BadFileError(f"{file}: not an IDX file (it begins with {magic.hex() or 'nothing'})")
            kind, axes = magic[2], magic[3]
            if kind != 8:
                raise BadFileError(f"{file}: holds elements of type 0x{kind:02x}; images and labels are bytes, 0x08")
            if not 1 <= axes <= 4:
                raise BadFileError(f"{file}: says that it has {axes} axes")
            header = handle.read(4 * axes)
            if len(header) < 4 * axes:
                raise BadFileError(f"{file}: truncated in its header")
            shape = struct.unpack(f">{axes}I", header)
            count = 1
            for size in shape:
                count *= size
            if count > _MAX_ELEMENTS:
                raise BadFileError(f"{file}: says that it holds {count} bytes, more than the {_MAX_ELEMENTS} allowed")
            if file.suffix != ".gz" and file.stat().st_size != 4 + 4 * axes + count:
                raise BadFileError(
                    f"{file}: {file.stat().st_size} bytes, but its header, sizes {shape}, needs {4 + 4 * axes + count}"
                )
            # piece by piece, so that a lie in the header costs no more memory than the file really holds
            pieces, missing = [], count
            while missing and (piece := handle.read(min(missing, _READ))):
                pieces.append(piece)
                missing -= len(piece)
            if missing or handle.read(1):
                what = f"truncated, {missing} of {count} bytes are missing" if missing else "has bytes after its end"
                raise BadFileError(f"{file}: {what}")
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise BadFileError(f"{file}: damaged gzip data: {error}") from error
    except OSError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror or error}") from error
    return np.frombuffer(b"".join(pieces), dtype=np.uint8).reshape(shape)


# ---------------------------------------------------------------------------------------------------
# CIFAR


def _load_cifar(name: str, data_dir: Path | None) -> Dataset:
    layout, folder = find_cifar(name, data_roots(data_dir))
    parts = {part: read_cifar(layout, folder, part) for part in ("train", "test")}
    train_x, test_x = (np.divide(images, np.float32(255), dtype=np.float32) for images, _ in parts.values())
    train_y, test_y = (labels for _, labels in parts.values())
    return Dataset(train_x, train_y, test_x, test_y, layout.classes, name, f"{layout.folder} in {folder}")


_LOADERS: dict[str, Callable[[str, Path | None], Dataset]] = {
    "cifar10": _load_cifar,
    "cifar100": _load_cifar,
    "digits": _load_digits,
    "mnist": _load_idx,
    "fashion-mnist": _load_idx,
}
