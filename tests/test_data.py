"""Data sets: the fixed split of the digits, IDX files, and damage of every kind."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest

from lnsdeploy.errors import BadFileError, BadTypeError, UnknownNameError
from lnsdeploy.training import data
from lnsdeploy.training.data import load_data, read_idx, stratified_split

NAMES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}


def idx(array: np.ndarray, kind: int = 8) -> bytes:
    head = bytes([0, 0, kind, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape)
    return head + array.astype(np.uint8).tobytes()


def arrays(train: int = 30, test: int = 20) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {
        "train_x": random.integers(0, 256, (train, 6, 5)),
        "train_y": np.arange(train) % 3,
        "test_x": random.integers(0, 256, (test, 6, 5)),
        "test_y": np.arange(test) % 3,
    }


def write(folder: Path, made: dict[str, np.ndarray], zipped: bool = False) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for key, array in made.items():
        if zipped:
            (folder / f"{NAMES[key]}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (folder / NAMES[key]).write_bytes(idx(array))


@pytest.mark.smoke
def test_digits() -> None:
    found = load_data("digits")
    assert found.train_x.shape == (1437, 1, 8, 8)
    assert found.test_x.shape == (360, 1, 8, 8)
    assert found.train_x.dtype == np.float32
    assert found.train_y.dtype == np.int64
    assert (found.train_x.min(), found.train_x.max()) == (0, 1)
    assert (found.classes, found.shape, found.name) == (10, (1, 8, 8), "digits")
    # pinned: accuracies are compared between versions on this split
    assert found.digest == "81548392047d9654"
    everything = np.concatenate([found.train_y, found.test_y])
    shares = np.bincount(found.test_y) / np.bincount(everything)
    assert np.abs(shares - 360 / 1797).max() < 0.005


def test_digits_are_those_of_scikit_learn() -> None:
    from_file, from_function = data._digits_file(), data._digits_function()
    assert from_file is not None
    for a, b in zip(from_file, from_function, strict=True):
        assert np.array_equal(a, b)


def test_split_is_a_partition_in_proportion() -> None:
    labels = np.repeat(np.arange(4), [10, 20, 30, 41])
    train, test = stratified_split(labels, 33)
    assert sorted([*train, *test]) == list(range(101))
    assert np.bincount(labels[test]).sum() == 33
    assert np.abs(np.bincount(labels[test]) - np.array([10, 20, 30, 41]) * 33 / 101).max() < 1
    again = stratified_split(labels, 33)
    assert np.array_equal(again[1], test)


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("inside", ["", "mnist"])
def test_idx_files(tmp_path: Path, zipped: bool, inside: str) -> None:
    made = arrays()
    write(tmp_path / inside, made, zipped)
    found = load_data("mnist", tmp_path)
    assert found.train_x.shape == (30, 1, 6, 5)
    assert np.array_equal(np.rint(found.test_x[:, 0] * 255), made["test_x"])
    assert np.array_equal(found.train_y, made["train_y"])
    assert found.classes == 3
    assert str(tmp_path) in found.source


def test_default_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(data.DATA_VARIABLE, raising=False)
    write(tmp_path / "data" / "fashion-mnist", arrays())
    assert len(load_data("fashion-mnist").train_x) == 30
    elsewhere = tmp_path / "elsewhere"
    write(elsewhere, arrays(train=9))
    monkeypatch.setenv(data.DATA_VARIABLE, str(elsewhere))
    assert len(load_data("fashion-mnist").train_x) == 9


def test_missing_data_says_where_it_looked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(data.DATA_VARIABLE, str(tmp_path / "v"))
    with pytest.raises(BadFileError) as caught:
        load_data("mnist")
    message = str(caught.value)
    for part in (f"{tmp_path / 'v'}, {tmp_path / 'v' / 'mnist'}, data, ", *NAMES.values(), "--data-dir"):
        assert part in message
    with pytest.raises(BadFileError, match=r"looked in .*none"):
        load_data("mnist", tmp_path / "none")


def test_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match="'digit'; did you mean 'digits'"):
        load_data("digit")
    with pytest.raises(BadTypeError, match="data_dir must be a path"):
        load_data("mnist", 3)  # type: ignore[arg-type]


def test_a_missing_file_of_four(tmp_path: Path) -> None:
    write(tmp_path, arrays())
    (tmp_path / NAMES["test_y"]).unlink()
    with pytest.raises(BadFileError, match="t10k-labels-idx1-ubyte is missing"):
        load_data("mnist", tmp_path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "not an IDX file .it begins with nothing"),
        (b"\x89PNG....", "not an IDX file .it begins with 89504e47"),
        (idx(np.zeros((3, 2, 2)), kind=13), "elements of type 0x0d"),
        (b"\0\0\x08\x09", "says that it has 9 axes"),
        (b"\0\0\x08\x03\0\0\0\x01", "truncated in its header"),
        (idx(np.zeros((3, 2, 2)))[:-1], r"27 bytes, but its header, sizes \(3, 2, 2\), needs 28"),
        (idx(np.zeros((3, 2, 2))) + b"x", "29 bytes, but its header"),
        (b"\0\0\x08\x03" + b"\xff" * 12, "more than the .* allowed"),
        (b"\0\0\x08\x03" + struct.pack(">3I", 1 << 15, 1 << 8, 1 << 8), "16 bytes, but its header"),
    ],
)
def test_damaged_idx(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(content)
    with pytest.raises(BadFileError, match=message) as caught:
        read_idx(file)
    assert str(file) in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"not gzip", "damaged gzip data"),
        (gzip.compress(idx(np.arange(100)), mtime=0)[:-12], "damaged gzip data|truncated"),
        (gzip.compress(idx(np.arange(100))[:-1], mtime=0), "truncated, 1 of 100 bytes are missing"),
        (gzip.compress(idx(np.arange(100)) + b"x", mtime=0), "has bytes after its end"),
        # a lie of two gigabytes costs nothing: there are no such bytes
        (gzip.compress(b"\0\0\x08\x01" + struct.pack(">I", 1 << 31), mtime=0), "truncated, 2147483648 of 2147483648"),
    ],
    ids=["not-gzip", "cut", "too-short", "too-long", "lying-header"],
)
def test_damaged_gzip(tmp_path: Path, content: bytes, message: str) -> None:
    file = tmp_path / "labels.gz"
    file.write_bytes(content)
    with pytest.raises(BadFileError, match=message):
        read_idx(file)


def test_a_gzip_bomb_is_not_unpacked(tmp_path: Path) -> None:
    file = tmp_path / "labels.gz"
    bomb = gzip.compress(idx(np.arange(10)) + bytes(200 << 20), compresslevel=1, mtime=0)
    file.write_bytes(bomb)
    with pytest.raises(BadFileError, match="has bytes after its end"):
        read_idx(file)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": np.arange(29) % 3}, "30 images of shape .* for 29 labels"),
        ({"test_x": np.zeros((20, 5, 6))}, r"training images are \(6, 5\), test images \(5, 6\)"),
        ({"test_y": np.full(20, 7)}, "training labels up to 2, test labels up to 7"),
        ({"train_x": np.zeros((30, 6))}, "has 2 axes, 3 are needed"),
        ({"train_x": np.zeros((0, 6, 5)), "train_y": np.zeros(0)}, "0 images"),
    ],
)
def test_files_that_do_not_fit(tmp_path: Path, change: dict[str, np.ndarray], message: str) -> None:
    write(tmp_path, arrays() | change)
    with pytest.raises(BadFileError, match=message):
        load_data("mnist", tmp_path)
