"""Data sets: the real digits of scikit-learn, files in the IDX layout of MNIST, CIFAR, image folders, arrays."""

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
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, MissingDependencyError, UnknownNameError
from lnsdeploy.formats import random_bytes
from lnsdeploy.training.arrays import find_arrays, names_arrays, read_arrays
from lnsdeploy.training.cifar import find_cifar, read_cifar
from lnsdeploy.training.pictures import read_picture

Images = npt.NDArray[np.float32]
Labels = npt.NDArray[np.int64]
Pixels = npt.NDArray[np.uint8]

# The folder of data sets, where no other is named.
DATA_VARIABLE = "LNSDEPLOY_DATA"

_DIGITS_TEST = 360
_DIGITS_SHAPE = (1797, 65)
# No data set of this layout comes near; a header that says more is damaged or hostile.
_MAX_ELEMENTS = 1 << 31
_READ = 1 << 20
# Images that are converted at a time.
_PIECE = 4096
# Of data that come without a test set, this part is one.
_TEST_SHARE = 5

FOLDER = "folder"
_IMAGE_SIZE = 64
_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")


@dataclass(frozen=True, eq=False)
class Dataset:
    """Labelled images, split into training and test set.

    Images are kept as the bytes they are published as, a quarter of their size in float32.

    Args:
        train_raw, test_raw: uint8 [n, channels, height, width], or float32 in 0 … 1.
        train_y, test_y: int64 [n], the classes 0 … `classes` − 1.
        classes: their number.
        name: as in :func:`load_data`.
        source: where it comes from, for people.
    """

    train_raw: npt.NDArray[Any]
    train_y: Labels
    test_raw: npt.NDArray[Any]
    test_y: Labels
    classes: int
    name: str
    source: str

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one input: channels, height, width."""
        return tuple(self.train_raw.shape[1:])

    @cached_property
    def train_x(self) -> Images:
        """All training images, float32 [n, channels, height, width] in 0 … 1; converted when first asked for."""
        return as_floats(self.train_raw)

    @cached_property
    def test_x(self) -> Images:
        """All test images, as :attr:`train_x`."""
        return as_floats(self.test_raw)

    @cached_property
    def digest(self) -> str:
        """16 hexadecimal digits: a hash of all images, as float32, and labels."""
        found = hashlib.sha256()
        for raw, labels in ((self.train_raw, self.train_y), (self.test_raw, self.test_y)):
            found.update(f"float32{raw.shape}".encode())
            for start in range(0, len(raw), _PIECE):
                found.update(np.ascontiguousarray(as_floats(raw[start : start + _PIECE])).tobytes())
            found.update(f"{labels.dtype}{labels.shape}".encode())
            found.update(np.ascontiguousarray(labels).tobytes())
        return found.hexdigest()[:16]


def as_floats(raw: npt.NDArray[Any]) -> Images:
    """Stored images in 0 … 1: bytes divided by 255, others as they are."""
    return np.divide(raw, np.float32(255), dtype=np.float32) if raw.dtype == np.uint8 else raw


def load_data(name: str, data_dir: str | os.PathLike[str] | None = None, *, image_size: int | None = None) -> Dataset:
    """A data set by name.

    ``digits``: 1,797 real 8×8 images of handwritten digits that come with scikit-learn, split into 1,437 for
    training and 360 for testing, always in the same way and with the classes' shares kept.
    ``mnist``, ``fashion-mnist``: the four IDX files of these sets (or of any other in that layout), plain or
    gzipped. Where only one of the two pairs of images and labels is there, a fifth of it is for testing, with the
    classes' shares kept, always the same.
    ``cifar10``, ``cifar100``: 50,000 and 10,000 photographs of 32×32, in the binary or the Python layout in which
    they are published, unpacked.
    ``folder``: photographs in ``train/CLASS/*`` and ``val/CLASS/*`` (or ``test``) of `data_dir`, or in ``CLASS/*``,
    where a fifth of each class is for testing, always the same. They are cut to squares and scaled.
    ``FILE.npz``: a data set of one's own, of any shape: the arrays ``train_x``, ``train_y``, ``test_x``, ``test_y``.

    Args:
        data_dir: the folder with the files, or with a folder `name` (or of the published name) that holds them. By
            default the folder that the variable LNSDEPLOY_DATA names, or ``data``.
        image_size: height and width of a ``folder``'s images, 64 by default.

    Raises:
        UnknownNameError: no such data set.
        BadFileError: files are missing (the message says where they were looked for) or damaged.
        MissingDependencyError: scikit-learn, or Pillow for folders, is needed and not installed.
    """
    if name not in data_names() and not names_arrays(name):
        raise UnknownNameError("data set", name, [*data_names(), "FILE.npz"])
    if data_dir is not None and not isinstance(data_dir, (str, os.PathLike)):
        raise BadTypeError(f"data_dir must be a path, not {data_dir!r}")
    if name == FOLDER:
        return _load_folder(None if data_dir is None else Path(data_dir), image_size or _IMAGE_SIZE)
    if image_size is not None:
        raise BadValueError(f"image_size belongs to data of the kind {FOLDER!r}; {name} has images of its own size")
    if names_arrays(name):
        return _load_arrays(name, None if data_dir is None else Path(data_dir))
    return _LOADERS[name](name, None if data_dir is None else Path(data_dir))


def data_names() -> list[str]:
    """Names that :func:`load_data` knows."""
    return sorted([*_LOADERS, FOLDER])


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


def stratified_split(
    labels: Labels, count: int, *, seed: int = 0, stream: int = 0
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Indices of a training set and of a test set of `count`, with each class in proportion.

    Depends on the arguments alone: which samples are taken follows from the generator of spec 2.3.

    Args:
        labels: int64 [n], classes 0, 1, …
        count: size of the test set.
        seed, stream: of the generator.
    Returns: sorted int64 [n − count] and [count].
    """
    labels = np.asarray(labels)
    sizes = np.bincount(labels)
    quotas = sizes * count / len(labels)
    shares = np.floor(quotas).astype(np.int64)
    # the largest remainders take what rounding down has left
    for index in np.argsort(shares - quotas, kind="stable")[: count - int(shares.sum())]:
        shares[index] += 1
    keys = random_bytes(seed, stream, 8 * len(labels)).view("<u8")
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
    present = [part for part in ("train", "test") if any(_candidates(folder, _FILES[f"{part}_{a}"]) for a in "xy")]
    arrays = {
        f"{part}_{axis}": read_idx(_find_file(folder, _FILES[f"{part}_{axis}"])) for part in present for axis in "xy"
    }
    for key, array in arrays.items():
        wanted = 3 if key.endswith("x") else 1
        if array.ndim != wanted:
            raise BadFileError(f"{folder / _FILES[key]}: has {array.ndim} axes, {wanted} are needed")
    for part in present:
        images, labels = arrays[f"{part}_x"], arrays[f"{part}_y"]
        where = folder / _FILES[f"{part}_x"]
        if len(images) != len(labels) or not images.size:
            raise BadFileError(f"{where}: {len(images)} images of shape {images.shape[1:]} for {len(labels)} labels")
    source = f"IDX files in {folder}"
    if len(present) == 1:
        train, test = _own_split(arrays[f"{present[0]}_y"].astype(np.int64), folder)
        arrays = {
            f"{part}_{axis}": arrays[f"{present[0]}_{axis}"][chosen]
            for part, chosen in (("train", train), ("test", test))
            for axis in "xy"
        }
        source += f", of which every fifth image of {_FILES[present[0] + '_x']} is for testing"
    if arrays["train_x"].shape[1:] != arrays["test_x"].shape[1:]:
        raise BadFileError(
            f"{folder}: training images are {arrays['train_x'].shape[1:]}, test images {arrays['test_x'].shape[1:]}"
        )
    classes = int(arrays["train_y"].max()) + 1
    if int(arrays["test_y"].max()) >= classes or classes < 2:
        raise BadFileError(
            f"{folder}: training labels up to {classes - 1}, test labels up to {int(arrays['test_y'].max())}"
        )
    train_y, test_y = (arrays[key].astype(np.int64) for key in ("train_y", "test_y"))
    return Dataset(arrays["train_x"][:, None], train_y, arrays["test_x"][:, None], test_y, classes, name, source)


def _own_split(labels: Labels, where: Path) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Training and test indices of data that come without a test set."""
    count = len(labels) // _TEST_SHARE
    if not count:
        raise BadFileError(f"{where}: {len(labels)} images are too few to set a test set aside")
    return stratified_split(labels, count)


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
# Arrays


def _load_arrays(name: str, data_dir: Path | None) -> Dataset:
    file = find_arrays(name, data_dir)
    arrays, classes = read_arrays(file)
    train_x, train_y, test_x, test_y = (arrays[key] for key in ("train_x", "train_y", "test_x", "test_y"))
    return Dataset(train_x, train_y, test_x, test_y, classes, name, str(file))


# ---------------------------------------------------------------------------------------------------
# CIFAR


def _load_cifar(name: str, data_dir: Path | None) -> Dataset:
    layout, folder = find_cifar(name, data_roots(data_dir))
    (train_raw, train_y), (test_raw, test_y) = (read_cifar(layout, folder, part) for part in ("train", "test"))
    return Dataset(train_raw, train_y, test_raw, test_y, layout.classes, name, f"{layout.folder} in {folder}")


# ---------------------------------------------------------------------------------------------------
# Folders of images


def _load_folder(data_dir: Path | None, size: int) -> Dataset:
    if data_dir is None:
        raise BadValueError(
            "data of the kind 'folder' needs --data-dir: it holds train/CLASS/… and val/CLASS/…, or CLASS/…"
        )
    if not data_dir.is_dir():
        raise BadFileError(f"{data_dir}: no such folder")
    if not 1 <= size <= 4096:
        raise BadValueError(f"image_size must be 1 to 4096, not {size}")
    test_folder = next((data_dir / n for n in ("val", "test") if (data_dir / n).is_dir()), None)
    split = test_folder is not None and (data_dir / "train").is_dir()
    names = _classes(data_dir / "train" if split else data_dir)
    x, y = _read_folder(data_dir / "train" if split else data_dir, names, size)
    source = f"{data_dir}: {', '.join(names[:8])}{', …' if len(names) > 8 else ''}"
    if split and test_folder is not None:
        if extra := sorted(set(_classes(test_folder, 1)) - set(names)):
            raise BadFileError(f"{test_folder}: classes {', '.join(extra[:8])} are not among those of train")
        return Dataset(x, y, *_read_folder(test_folder, names, size), len(names), FOLDER, source)
    train, test = _own_split(y, data_dir)
    return Dataset(x[train], y[train], x[test], y[test], len(names), FOLDER, source)


def _classes(folder: Path, least: int = 2) -> list[str]:
    names = sorted(entry.name for entry in folder.iterdir() if entry.is_dir() and not entry.name.startswith("."))
    if len(names) < least:
        raise BadFileError(f"{folder}: {least} or more folders are needed, one for each class; there are {len(names)}")
    return names


def _read_folder(folder: Path, names: list[str], size: int) -> tuple[Pixels, Labels]:
    files = [
        (file, number)
        for number, name in enumerate(names)
        if (folder / name).is_dir()
        for file in sorted((folder / name).iterdir())
        if file.suffix.lower() in _SUFFIXES
    ]
    if not files:
        raise BadFileError(f"{folder}: no images ({', '.join(_SUFFIXES)}) in the folders of its classes")
    x = np.empty((len(files), 3, size, size), dtype=np.uint8)
    for index, (file, _) in enumerate(files):
        x[index] = read_picture(file, (3, size, size))
    return x, np.array([number for _, number in files], dtype=np.int64)


_LOADERS: dict[str, Callable[[str, Path | None], Dataset]] = {
    "cifar10": _load_cifar,
    "cifar100": _load_cifar,
    "digits": _load_digits,
    "mnist": _load_idx,
    "fashion-mnist": _load_idx,
}
