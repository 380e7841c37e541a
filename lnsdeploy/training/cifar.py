"""CIFAR-10 and CIFAR-100 (Krizhevsky 2009), in the two layouts in which they are published.

The binary layout is read through a memory map: a batch costs the pages that it lies in. The Python layout is a pickle,
and reading a pickle runs what it names; here it may name three things, which stand-ins of our own replace.
"""

from __future__ import annotations

import io
import pickle
import pickletools
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadFileError
from lnsdeploy.files import read_bytes

SHAPE = (3, 32, 32)
_PIXELS = 3 * 32 * 32
# The largest pickle, the training set of CIFAR-100, has 155 MB.
_MAX_PICKLE = 512 << 20


@dataclass(frozen=True)
class Layout:
    """One published layout of one of the two sets.

    Args:
        folder: the name that its archive unpacks to.
        train, test: files.
        classes: fine labels; 10 or 100.
        record: bytes before the pixels of a record, of which the last is the label; 0 for pickles.
        label: the key of the labels in a pickle.
        archive: what to download.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    classes: int
    record: int
    label: bytes
    archive: str

    @property
    def is_pickle(self) -> bool:
        """Whether the files are pickles."""
        return self.record == 0


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "cifar10": (
        Layout(
            "cifar-10-batches-bin",
            tuple(f"data_batch_{i}.bin" for i in range(1, 6)),
            ("test_batch.bin",),
            10,
            1,
            b"labels",
            "cifar-10-binary.tar.gz",
        ),
        Layout(
            "cifar-10-batches-py",
            tuple(f"data_batch_{i}" for i in range(1, 6)),
            ("test_batch",),
            10,
            0,
            b"labels",
            "cifar-10-python.tar.gz",
        ),
    ),
    "cifar100": (
        Layout("cifar-100-binary", ("train.bin",), ("test.bin",), 100, 2, b"fine_labels", "cifar-100-binary.tar.gz"),
        Layout("cifar-100-python", ("train",), ("test",), 100, 0, b"fine_labels", "cifar-100-python.tar.gz"),
    ),
}


def find_cifar(name: str, roots: Sequence[Path]) -> tuple[Layout, Path]:
    """The layout that is there, and its folder.

    Args:
        name: ``cifar10`` or ``cifar100``.
        roots: folders that may be it, or hold it under its published name or under `name`.

    Raises:
        BadFileError: none is there; the message says where it was looked for and what to download.
    """
    layouts = LAYOUTS[name]
    looked: list[Path] = []
    for root in roots:
        for layout in layouts:
            for folder in (root, root / layout.folder, root / name, root / name / layout.folder):
                if (folder / layout.test[0]).is_file():
                    return layout, folder
                looked += [] if folder in looked else [folder]
    packed = next((f for folder in looked for layout in layouts if (f := folder / layout.archive).is_file()), None)
    if packed is not None:
        raise BadFileError(f"{packed} must be unpacked first: tar xzf {packed.name}")
    raise BadFileError(
        f"data set {name!r} not found: looked for {' or '.join(layout.test[0] for layout in layouts)} in "
        f"{', '.join(map(str, looked))}. Download and unpack {layouts[0].archive} from "
        "https://www.cs.toronto.edu/~kriz/cifar.html and name its folder with --data-dir"
    )


def read_cifar(layout: Layout, folder: Path, part: str) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    """The images and labels of a part.

    Args:
        part: ``"train"`` or ``"test"``.
    Returns: uint8 [n, 3, 32, 32], a view of the mapped file where that is a single binary one, and int64 [n].

    Raises:
        BadFileError: a file is missing, truncated, damaged, or not what it should be; the message names it.
    """
    read = _read_pickle if layout.is_pickle else _read_records
    parts = [read(layout, folder / file) for file in getattr(layout, part)]
    if len(parts) == 1:
        return parts[0]
    return np.concatenate([images for images, _ in parts]), np.concatenate([labels for _, labels in parts])


def _read_records(layout: Layout, file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    size = layout.record + _PIXELS
    try:
        length = file.stat().st_size
        if not length or length % size:
            raise BadFileError(f"{file}: {length} bytes, not a multiple of the {size} that an image and its label take")
        records = np.memmap(file, dtype=np.uint8, mode="r", shape=(length // size, size))
    except OSError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror or error}") from error
    labels = np.array(records[:, layout.record - 1], dtype=np.int64)
    _check_labels(layout, file, labels)
    return records[:, layout.record :].reshape(-1, *SHAPE), labels


def _check_labels(layout: Layout, file: Path, labels: npt.NDArray[np.int64]) -> None:
    if labels.size and not 0 <= int(labels.min()) <= int(labels.max()) < layout.classes:
        wrong = int(np.flatnonzero((labels < 0) | (labels >= layout.classes))[0])
        raise BadFileError(
            f"{file}: image {wrong} has label {labels[wrong]}, beyond the {layout.classes} classes: damaged, or not "
            f"a file of {layout.folder}"
        )


# ---------------------------------------------------------------------------------------------------
# Pickles


class _Dtype:
    """Stands in for `numpy.dtype`: remembers its name."""

    def __init__(self, name: Any = None, *_: Any):
        self.name = name

    def __setstate__(self, state: Any) -> None:
        pass


class _Array:
    """Stands in for `numpy.ndarray`: remembers shape, dtype, order and bytes, and checks them when asked."""

    def __init__(self) -> None:
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def bytes_of(self, where: str) -> npt.NDArray[np.uint8]:
        """uint8 [n, 3072]."""
        match self.state:
            case (int(), (int() as count, int() as width), _Dtype() as dtype, fortran, bytes() as data):
                right = dtype.name in ("u1", b"u1", "|u1", "B") and not fortran and width == _PIXELS
                if right and count > 0 and len(data) == count * width:
                    return np.frombuffer(data, dtype=np.uint8).reshape(count, width)
        raise BadFileError(f"{where}: its entry 'data' is not a complete array of bytes [n, {_PIXELS}]")


def _reconstruct(*_: Any) -> _Array:
    return _Array()


_ADMITTED: dict[tuple[str, str], Any] = {
    **{(f"numpy.{core}.multiarray", "_reconstruct"): _reconstruct for core in ("core", "_core")},
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
}

# What the files consist of: containers, numbers, texts, and the construction of those stand-ins.
_NAMES = """PROTO FRAME STOP MARK POP POP_MARK EMPTY_DICT EMPTY_LIST EMPTY_TUPLE DICT LIST TUPLE TUPLE1 TUPLE2 TUPLE3
APPEND APPENDS SETITEM SETITEMS NONE NEWTRUE NEWFALSE INT BININT BININT1 BININT2 LONG LONG1 STRING BINSTRING
SHORT_BINSTRING BINBYTES SHORT_BINBYTES BINBYTES8 UNICODE BINUNICODE SHORT_BINUNICODE PUT BINPUT LONG_BINPUT GET
BINGET LONG_BINGET MEMOIZE GLOBAL STACK_GLOBAL REDUCE BUILD"""
_OPCODES = frozenset(_NAMES.split())


class _Reader(pickle.Unpickler):
    """Knows three names."""

    where = ""

    def find_class(self, module: str, name: str) -> Any:
        found = _ADMITTED.get((module, name))
        if found is None:
            raise BadFileError(
                f"{self.where}: refused, since it wants to run {module}.{name}; CIFAR files need no such"
            )
        return found

    def persistent_load(self, pid: Any) -> NoReturn:
        raise BadFileError(f"{self.where}: refused, since it refers to something outside of it")


def _read_pickle(layout: Layout, file: Path) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int64]]:
    found = _unpickle(file)
    if not isinstance(found, dict):
        raise BadFileError(f"{file}: a pickle, but not of a table with 'data' and 'labels'")
    table = {key.encode() if isinstance(key, str) else key: value for key, value in found.items()}
    array, labels = table.get(b"data"), table.get(layout.label)
    if not isinstance(array, _Array) or not isinstance(labels, list):
        raise BadFileError(f"{file}: lacks an array 'data', or a list {layout.label.decode()!r}")
    images = array.bytes_of(str(file))
    if len(labels) != len(images) or not all(type(label) is int and abs(label) < 1 << 31 for label in labels):
        raise BadFileError(f"{file}: {len(images)} images, and {len(labels)} labels of which each must be an integer")
    numbers = np.array(labels, dtype=np.int64)
    _check_labels(layout, file, numbers)
    return images.reshape(-1, *SHAPE), numbers


def _unpickle(file: Path) -> Any:
    """The object in a pickle of the admitted kind; everything else is refused before it is built."""
    data = read_bytes(file, limit=_MAX_PICKLE)
    try:
        for opcode, argument, _ in pickletools.genops(data):
            if opcode.name not in _OPCODES:
                raise BadFileError(f"{file}: refused, since it holds the pickle instruction {opcode.name}")
            # a number in the memo makes the reader allocate as many entries
            if "PUT" in opcode.name and isinstance(argument, int) and argument > len(data):
                raise BadFileError(f"{file}: damaged: an entry numbered {argument}")
        reader = _Reader(io.BytesIO(data), encoding="bytes")
        reader.where = str(file)
        return reader.load()
    except BadFileError:
        raise
    except (
        pickle.UnpicklingError,
        ArithmeticError,
        AttributeError,
        EOFError,
        LookupError,
        MemoryError,
        RecursionError,
        TypeError,
        ValueError,
        struct.error,
    ) as error:
        raise BadFileError(
            f"{file}: not a readable pickle: {' '.join(str(error).split()) or type(error).__name__}"
        ) from error
