"""CIFAR in both published layouts, and files that are damaged or hostile."""

from __future__ import annotations

import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from lnsdeploy.errors import BadFileError
from lnsdeploy.training.cifar import LAYOUTS, find_cifar, read_cifar
from lnsdeploy.training.data import load_data

LAYOUT = {layout.folder: layout for layouts in LAYOUTS.values() for layout in layouts}


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), dtype=np.uint8)


def op(code: str, *parts: bytes) -> bytes:
    return code.encode("latin-1") + b"".join(parts)


def text(value: str) -> bytes:
    """As Python 2 pickled its strings: SHORT_BINSTRING."""
    return op("U", bytes([len(value)]), value.encode())


def number(value: int) -> bytes:
    return op("J", struct.pack("<i", value))


def array(data: bytes, shape: tuple[int, ...], dtype: str = "u1", core: str = "core") -> bytes:
    """An array of bytes as NumPy pickled it in Python 2, protocol 2."""
    return b"".join(
        [
            op("c", f"numpy.{core}.multiarray\n_reconstruct\n".encode()),
            op("c", b"numpy\nndarray\n"),
            op("K", b"\0") + op("\x85") + text("b") + op("\x87") + op("R"),
            op("("),
            number(1),
            b"".join(number(size) for size in shape) + op({1: "\x85", 2: "\x86"}[len(shape)]),
            op("c", b"numpy\ndtype\n") + text(dtype) + number(0) + number(1) + op("\x87") + op("R"),
            op("(") + number(3) + text("|") + op("NNN") + number(-1) + number(-1) + number(0) + op("t") + op("b"),
            op("\x89"),
            op("T", struct.pack("<i", len(data)), data),
            op("t") + op("b"),
        ]
    )


def python2(pixels: np.ndarray, labels: list[int], key: str = "labels", extra: bytes = b"", **options: str) -> bytes:
    entries = [
        text("batch_label") + text("testing batch 1 of 1"),
        text(key) + op("]") + op("(") + b"".join(number(label) for label in labels) + op("e"),
        text("data") + array(pixels.tobytes(), pixels.shape, **options),
    ]
    return b"\x80\x02}(" + b"".join(entries) + extra + b"u."


def write(folder: Path, name: str, count: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A set of `count` images a file; returns the pixels and labels of the test file."""
    layout = LAYOUT[name]
    folder.mkdir(parents=True, exist_ok=True)
    labels = np.arange(count) * 7 % layout.classes
    for number, file in enumerate((*layout.train, *layout.test)):
        pixels = images(count, seed=number)
        if layout.is_pickle:
            data = python2(pixels, labels.tolist(), layout.label.decode())
        else:
            head = np.zeros((count, layout.record), dtype=np.uint8)
            head[:, 0] = 1
            head[:, -1] = labels
            data = np.hstack([head, pixels]).tobytes()
        (folder / file).write_bytes(data)
    return pixels, labels


def test_the_handmade_pickle_is_what_numpy_reads() -> None:
    pixels = images(3)
    found = pickle.loads(python2(pixels, [1, 2, 3]), encoding="bytes")
    assert np.array_equal(found[b"data"], pixels)
    assert found[b"labels"] == [1, 2, 3]


@pytest.mark.parametrize("name", sorted(LAYOUT))
def test_every_layout(tmp_path: Path, name: str) -> None:
    layout = LAYOUT[name]
    pixels, labels = write(tmp_path / name, name)
    data_set = "cifar10" if layout.classes == 10 else "cifar100"
    for root in (tmp_path, tmp_path / name):
        found = load_data(data_set, root)
        assert found.train_x.shape == (12 * len(layout.train), 3, 32, 32)
        assert found.test_x.dtype == np.float32
        assert np.array_equal(np.rint(found.test_x * 255).reshape(12, -1), pixels)
        assert np.array_equal(found.test_y, labels)
        assert found.classes == layout.classes
        assert name in found.source


def test_a_binary_file_is_mapped_not_read(tmp_path: Path) -> None:
    write(tmp_path, "cifar-10-batches-bin")
    found, _ = read_cifar(*find_cifar("cifar10", [tmp_path]), "test")
    base = found
    while base.base is not None and not isinstance(base, np.memmap):
        base = base.base
    assert isinstance(base, np.memmap)


@pytest.mark.parametrize("protocol", [3, 4])
def test_a_python_file_written_again_by_another_python(tmp_path: Path, protocol: int) -> None:
    write(tmp_path, "cifar-10-batches-py")
    pixels = images(4)
    table = {"labels": [3, 1, 4, 1], "filenames": ["a.png"] * 4, "data": pixels}
    (tmp_path / "test_batch").write_bytes(pickle.dumps(table, protocol))
    found, labels = read_cifar(*find_cifar("cifar10", [tmp_path]), "test")
    assert np.array_equal(found.reshape(4, -1), pixels)
    assert labels.tolist() == [3, 1, 4, 1]


def test_a_missing_set_says_what_to_download(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match=r"looked for test_batch\.bin or test_batch in .*cifar-10-binary\.tar\.gz"):
        load_data("cifar10", tmp_path)
    (tmp_path / "cifar-100-python.tar.gz").touch()
    with pytest.raises(BadFileError, match=r"must be unpacked first: tar xzf cifar-100-python\.tar\.gz"):
        load_data("cifar100", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, not a multiple of the 3073"),
        (bytes(3072), "3072 bytes, not a multiple"),
        (bytes(3073) + b"\x0a" + bytes(3072), "image 1 has label 10, beyond the 10 classes"),
    ],
)
def test_damaged_records(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, "cifar-10-batches-bin")
    (tmp_path / "test_batch.bin").write_bytes(content)
    with pytest.raises(BadFileError, match=message) as caught:
        load_data("cifar10", tmp_path)
    assert str(tmp_path / "test_batch.bin") in str(caught.value)


def test_a_missing_file_of_the_set(tmp_path: Path) -> None:
    write(tmp_path, "cifar-10-batches-bin")
    (tmp_path / "data_batch_3.bin").unlink()
    with pytest.raises(BadFileError, match=r"cannot read .*data_batch_3\.bin"):
        load_data("cifar10", tmp_path)


class Hostile:
    def __init__(self, folder: Path):
        self.folder = folder

    def __reduce__(self):
        return os.mkdir, (str(self.folder / "run"),)


PIXELS = images(2)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not a readable pickle"),
        (b"\x80\x02", "not a readable pickle"),
        (b"\x89PNG\r\n", "refused|not a readable pickle"),
        (python2(PIXELS, [1, 2])[:-2000], "not a readable pickle"),
        (pickle.dumps([1, 2]), "not of a table"),
        (pickle.dumps({"labels": [1]}), "lacks an array 'data'"),
        (python2(PIXELS, [1]), "2 images, and 1 labels"),
        (python2(PIXELS, [1, 11]), "image 1 has label 11"),
        (python2(PIXELS, [1, -1]), "image 1 has label -1"),
        (python2(PIXELS, [1, 2], dtype="f4"), "not a complete array of bytes"),
        (python2(PIXELS.reshape(-1), [1, 2]), "not a complete array of bytes"),
        (python2(PIXELS[:, :-1], [1, 2]), "not a complete array of bytes"),
        (python2(PIXELS, [1, 2], extra=b"Ppersistent\nN"), "instruction PERSID"),
        (python2(PIXELS, [1, 2], extra=b"U\x01xcnumpy\nload\n"), r"wants to run numpy\.load"),
        (python2(PIXELS, [1, 2], extra=b"U\x01xcnumpy\nndarray\nN\x85Nb"), "not a readable pickle|lacks"),
        # an entry with a huge number in the memo would take gigabytes
        (python2(PIXELS, [1, 2], extra=b"U\x01xNr\xff\xff\xff\x7f"), "an entry numbered 2147483647"),
        (b"\x80\x04\x8e" + struct.pack("<Q", 1 << 60) + b"x.", "not a readable pickle"),
        (b"\x80\x02" + b"(" * 100 + b".", "not a readable pickle|not of a table"),
    ],
    ids=range(18),
)
def test_damaged_pickles(tmp_path: Path, content: bytes, message: str) -> None:
    write(tmp_path, "cifar-10-batches-py")
    (tmp_path / "test_batch").write_bytes(content)
    with pytest.raises(BadFileError, match=message) as caught:
        read_cifar(*find_cifar("cifar10", [tmp_path]), "test")
    assert str(tmp_path / "test_batch") in str(caught.value)


@pytest.mark.parametrize("protocol", range(6))
def test_a_pickle_runs_nothing(tmp_path: Path, protocol: int) -> None:
    write(tmp_path, "cifar-10-batches-py")
    bait = tmp_path / "bait"
    bait.mkdir()
    (tmp_path / "test_batch").write_bytes(pickle.dumps({"data": Hostile(bait)}, protocol))
    with pytest.raises(BadFileError, match="refused, since it"):
        read_cifar(*find_cifar("cifar10", [tmp_path]), "test")
    assert not list(bait.iterdir())


def test_flipped_bytes_never_escape_as_other_errors(tmp_path: Path) -> None:
    """Every damage of a byte is read or refused, in the part of the file that is not pixels."""
    write(tmp_path, "cifar-10-batches-py")
    good = python2(images(1), [1])
    where = find_cifar("cifar10", [tmp_path])
    edges = [*range(good.index(b"T", 40)), *range(len(good) - 12, len(good))]
    refused = 0
    for position in edges:
        for value in (0, ord("."), ord("b"), ord("R"), 0xFF):
            damaged = bytearray(good)
            damaged[position] = value
            (tmp_path / "test_batch").write_bytes(bytes(damaged))
            try:
                read_cifar(*where, "test")
            except BadFileError:
                refused += 1
    assert refused > len(edges)
