"""Data sets: the fixed split of the digits, IDX files, folders, texts, augmentation, and damage of every kind."""

from __future__ import annotations

import gzip
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, UnknownNameError
from lnsdeploy.training import data
from lnsdeploy.training.data import load_data, read_idx, stratified_split
from lnsdeploy.training.feeds import ImageFeed, TextFeed
from lnsdeploy.training.text import load_text

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


# ---------------------------------------------------------------------------------------------------
# Sets without a test set, folders, texts


@pytest.mark.parametrize("part", ["train", "t10k"])
def test_one_pair_of_idx_files_is_split(tmp_path: Path, part: str) -> None:
    made = arrays(train=100, test=100)
    key = "train" if part == "train" else "test"
    write(tmp_path, {k: v for k, v in made.items() if k.startswith(key)})
    found = load_data("mnist", tmp_path)
    assert (len(found.train_y), len(found.test_y)) == (80, 20)
    assert np.bincount(found.test_y).min() >= 6
    whole = {x.tobytes() for x in np.asarray(made[f"{key}_x"], dtype=np.uint8)}
    parts = [{x.tobytes() for x in raw[:, 0]} for raw in (found.train_raw, found.test_raw)]
    assert parts[0] | parts[1] == whole
    assert not parts[0] & parts[1]
    assert load_data("mnist", tmp_path).digest == found.digest
    (tmp_path / NAMES[f"{key}_y"]).unlink()
    with pytest.raises(BadFileError, match="is missing"):
        load_data("mnist", tmp_path)


def test_images_are_kept_as_bytes(tmp_path: Path) -> None:
    made = arrays()
    write(tmp_path, made)
    found = load_data("mnist", tmp_path)
    assert found.train_raw.dtype == np.uint8
    expected = made["train_x"].astype(np.float32)[:, None] / np.float32(255)
    assert np.array_equal(found.train_x, expected)
    # a set of floats has the digest of the same set of bytes: runs of either are the same run
    floats = data.Dataset(found.train_x, found.train_y, found.test_x, found.test_y, 3, "mnist", "")
    assert floats.digest == found.digest
    feeds = [ImageFeed(d, augment="crop+flip", limit=None, seed=3, device=torch.device("cpu")) for d in (found, floats)]
    for batch in (feed.batch(1, np.arange(20)) for feed in feeds):
        assert batch[0].dtype == torch.float32
    assert torch.equal(feeds[0].batch(1, np.arange(20))[0], feeds[1].batch(1, np.arange(20))[0])
    assert np.array_equal(feeds[0].test(0, 20)[0].numpy(), found.test_x)


def test_augmentation_depends_on_seed_epoch_and_sample_alone(tmp_path: Path) -> None:
    write(tmp_path, arrays())
    found = load_data("mnist", tmp_path)

    def feed(augment: str, seed: int = 3) -> ImageFeed:
        return ImageFeed(found, augment=augment, limit=None, seed=seed, device=torch.device("cpu"))

    whole = feed("crop+flip").batch(2, np.arange(30))[0]
    assert torch.equal(feed("crop+flip").batch(2, np.array([7, 4]))[0], whole[[7, 4]])
    assert not torch.equal(feed("crop+flip").batch(3, np.arange(30))[0], whole)
    assert not torch.equal(feed("crop+flip", 4).batch(2, np.arange(30))[0], whole)
    plain = feed("none").batch(2, np.arange(30))[0]
    assert np.array_equal(plain.numpy(), found.train_x)
    for before, after in zip(plain, feed("flip").batch(2, np.arange(30))[0], strict=True):
        assert torch.equal(before, after) or torch.equal(before.flip(2), after)
    # crops shift by a line at most here, and fill with zeros
    for before, after in zip(plain, feed("crop").batch(2, np.arange(30))[0], strict=True):
        padded = torch.nn.functional.pad(before, (1, 1, 1, 1))
        places = [padded[:, i : i + 6, j : j + 5] for i in range(3) for j in range(3)]
        assert any(torch.equal(after, place) for place in places)


def pictures(folder: Path, classes: dict[str, int], size: tuple[int, int] = (9, 7)) -> None:
    image = pytest.importorskip("PIL.Image")
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = np.full((*size, 3), 40 * number + index, dtype=np.uint8)
            image.fromarray(pixels).save(folder / name / f"{index}.png")


def test_folders_of_images(tmp_path: Path) -> None:
    pictures(tmp_path / "split" / "train", {"cat": 4, "dog": 3})
    pictures(tmp_path / "split" / "val", {"dog": 2})
    found = load_data("folder", tmp_path / "split", image_size=8)
    assert (found.train_raw.shape, found.test_raw.shape, found.classes) == ((7, 3, 8, 8), (2, 3, 8, 8), 2)
    assert list(found.train_y) == [0, 0, 0, 0, 1, 1, 1]
    assert list(found.test_y) == [1, 1]
    assert list(found.train_raw[:, 0, 4, 4]) == [0, 1, 2, 3, 40, 41, 42]
    pictures(tmp_path / "plain", {"a": 10, "b": 20})
    found = load_data("folder", tmp_path / "plain")
    assert (len(found.train_y), list(np.bincount(found.test_y))) == (24, [2, 4])
    pictures(tmp_path / "split" / "val" / "..", {"val/cow": 1})
    with pytest.raises(BadFileError, match="cow"):
        load_data("folder", tmp_path / "split")
    (tmp_path / "plain" / "a" / "0.png").write_bytes(b"no image")
    with pytest.raises(BadFileError, match=r"0\.png"):
        load_data("folder", tmp_path / "plain")
    with pytest.raises(BadValueError, match="--data-dir"):
        load_data("folder")
    with pytest.raises(BadFileError, match="no such folder"):
        load_data("folder", tmp_path / "nowhere")
    with pytest.raises(BadValueError, match="image_size"):
        load_data("digits", image_size=8)


def test_texts(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("añb\U0001f600" * 50, encoding="utf-8")
    found = load_text(f"text:{file}")
    assert found.vocabulary == "abñ\U0001f600"
    assert (len(found.train), len(found.test)) == (180, 20)
    assert "".join(found.vocabulary[i] for i in found.train[:4]) == "añb\U0001f600"
    feed = TextFeed(found, context=16, limit=None, seed=0, device=torch.device("cpu"))
    assert feed.sizes == (10, 1)
    x, y = feed.batch(3, np.arange(10))
    assert torch.equal(x[:, 1:], y[:, :-1])
    # one after the other: each character once
    assert torch.equal(x[1:, 0], y[:-1, -1])
    assert not torch.equal(feed.batch(4, np.arange(10))[0], x) or not torch.equal(feed.batch(5, np.arange(10))[0], x)
    x, y = feed.test(0, 1)
    assert [found.test[: len(x[0])].tolist(), found.test[1:17].tolist()] == [x[0].tolist(), y[0].tolist()]
    with pytest.raises(BadValueError, match="too few"):
        TextFeed(found, context=32, limit=None, seed=0, device=torch.device("cpu"))
    with pytest.raises(BadValueError, match="limit"):
        TextFeed(found, context=16, limit=11, seed=0, device=torch.device("cpu"))
    for content, message in ((b"\xff\xfe\x00" * 20, "not UTF-8"), (b"abc", "too few"), (b"a" * 50, "different")):
        file.write_bytes(content)
        with pytest.raises(BadFileError, match=message):
            load_text(f"text:{file}")
    with pytest.raises(BadFileError, match="nowhere"):
        load_text("text:nowhere", tmp_path)


# ---------------------------------------------------------------------------------------------------
# Arrays of one's own


def _arrays(**changes):
    generator = np.random.default_rng(0)
    made = {
        "train_x": generator.normal(size=(6, 1, 4, 3)),
        "train_y": np.array([0, 1, 2, 0, 1, 2]),
        "test_x": generator.normal(size=(3, 1, 4, 3)),
        "test_y": np.array([2, 0, 1]),
    }
    return {key: value for key, value in (made | changes).items() if value is not None}


def test_arrays_are_a_data_set_wherever_one_is_named(tmp_path):
    from lnsdeploy.exporters.calibration import load_inputs

    arrays = _arrays()
    np.savez(tmp_path / "own.npz", **arrays)
    for found in (load_data(str(tmp_path / "own.npz")), load_data("own.npz", tmp_path)):
        assert found.classes == 3
        assert found.shape == (1, 4, 3)
        for key, value in arrays.items():
            got = getattr(found, key)
            assert got.dtype == (np.float32 if key.endswith("x") else np.int64)
            assert np.array_equal(got, value.astype(got.dtype))
    for split in ("train", "test"):
        inputs = load_inputs(str(tmp_path / "own.npz"), (0, 1, 4, 3), split=split)
        assert np.array_equal(inputs.x, arrays[f"{split}_x"].astype(np.float32))
        assert np.array_equal(inputs.labels, arrays[f"{split}_y"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_y": None}, "no test_y in it"),
        ({"train_y": np.arange(5)}, "train_y must be 6 integers"),
        ({"train_y": np.zeros(6)}, "train_y must be 6 integers, not float64"),
        ({"train_y": np.array([0, 1, 2, 0, 1, -1])}, "train_y holds -1"),
        ({"test_y": np.array([0, 1, 3])}, "labels up to 2, test labels up to 3"),
        ({"test_x": np.zeros((3, 1, 4, 4))}, "test inputs"),
        ({"test_x": np.full((3, 1, 4, 3), np.nan)}, "test_x holds NaN"),
        ({"train_x": np.full((6, 1, 4, 3), "a")}, "train_x must be numbers"),
        ({"train_x": np.full((6, 1, 4, 3), None, dtype=object)}, "not a readable"),
    ],
)
def test_arrays_that_are_no_data_set(tmp_path, changes, message):
    np.savez(tmp_path / "own.npz", **_arrays(**changes))
    with pytest.raises(BadFileError, match=message):
        load_data(str(tmp_path / "own.npz"))


def test_a_file_of_arrays_that_is_damaged_or_missing(tmp_path):
    with pytest.raises(BadFileError, match=r"none\.npz"):
        load_data(str(tmp_path / "none.npz"))
    np.savez(tmp_path / "own.npz", **_arrays())
    data = (tmp_path / "own.npz").read_bytes()
    (tmp_path / "own.npz").write_bytes(data[: len(data) // 2])
    with pytest.raises(BadFileError, match="not a readable"):
        load_data(str(tmp_path / "own.npz"))
