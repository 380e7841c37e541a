"""What models are fed with: made up, from files, damaged files."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from lnsdeploy.errors import BadFileError, BadValueError, MissingDependencyError, UnknownNameError
from lnsdeploy.evaluation import samples
from lnsdeploy.evaluation.inputs import ImageInput, TensorInput, TokenInput
from lnsdeploy.evaluation.samples import data_names, native_shape, open_samples, synthetic
from lnsdeploy.training.data import load_data
from tests.test_cifar import write as write_cifar

PLAIN = ImageInput((3, 32, 32))


def image_of():
    return pytest.importorskip("PIL.Image", reason="pillow is not installed")


def numbers(batch) -> list[list[float]]:
    return batch.inputs.flatten(1).tolist()


# ---------------------------------------------------------------------------------------------------
# Synthetic


@pytest.mark.parametrize(
    "inputs",
    [ImageInput((3, 20, 30)), ImageInput((1, 7, 5)), TokenInput(50, 6), TokenInput(50, 6, mask=3), TensorInput((4, 2))],
)
def test_a_sample_depends_on_its_number_alone(inputs) -> None:
    made = synthetic(inputs, seed=5, limit=7)
    assert len(made) == 7
    together = made.batch(0, 7)
    for first in range(7):
        alone = made.batch(first, first + 1)
        assert torch.equal(alone.inputs[0], together.inputs[first])
        if together.labels is not None:
            assert torch.equal(alone.labels[0], together.labels[first])
    assert len(made.batch(5, 100).inputs) == 2
    assert len(set(map(tuple, numbers(together)))) == 7
    assert numbers(synthetic(inputs, seed=6, limit=1).batch(0, 1)) != numbers(made.batch(0, 1))
    assert made.name == "synthetic"
    assert "synthetic" in made.source


def test_synthetic_pixels_are_pinned() -> None:
    """Integers all the way: the same on every machine, or figures could not be compared between two."""
    pixels = samples._noise((3, 9, 13), 0, 1)
    assert pixels.dtype == np.uint8
    assert (int(pixels.min()), int(pixels.max())) == (0, 255)
    assert pixels[0, 0].tolist() == [173, 134, 87, 45, 35, 13, 1, 16, 83, 126, 168, 193, 210]
    weighted = int((pixels.astype(np.int64).reshape(-1) * np.arange(pixels.size)).sum())
    assert weighted == 8494642


def test_synthetic_images_have_the_spectrum_of_photographs() -> None:
    """Power falls with frequency, as white noise's does not; and it is normalised as the model's own images."""
    image = samples._noise((1, 128, 128), 0, 0)[0].astype(np.float64)
    power = np.abs(np.fft.rfft2(image - image.mean())) ** 2
    y, x = np.fft.fftfreq(128)[:, None] * 128, np.arange(65)[None]
    radius = np.hypot(y, x)
    low, high = (power[(radius >= a) & (radius < b)].mean() for a, b in ((2, 6), (24, 48)))
    assert 1.0 < np.log2(low / high) / np.log2(36 / 4) < 3.5
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    x = synthetic(ImageInput((3, 64, 64), mean, std), limit=4).batch(0, 4).inputs
    again = x * torch.tensor(std)[:, None, None] + torch.tensor(mean)[:, None, None]
    assert -1e-6 <= float(again.min()) < 0.05
    assert 0.95 < float(again.max()) <= 1 + 1e-6


def test_synthetic_tokens_and_arrays() -> None:
    batch = synthetic(TokenInput(11, 200), limit=8).batch(0, 8)
    assert sorted(set(batch.inputs.flatten().tolist())) == list(range(11))
    assert torch.equal(batch.inputs[:, 1:], batch.labels[:, :-1])
    x = synthetic(TensorInput((50, 40)), limit=2).batch(0, 2).inputs
    assert abs(float(x.mean())) < 0.05
    assert abs(float(x.std()) - 1) < 0.05


def test_hidden_tokens() -> None:
    """Labels are what is hidden, and −1 elsewhere; something is hidden in every sequence."""
    made = synthetic(TokenInput(50, 8, mask=49), limit=200)
    batch = made.batch(0, 200)
    hidden = batch.labels >= 0
    assert bool(hidden.any(1).all())
    assert 0.1 < float(hidden.float().mean()) < 0.35
    assert bool((batch.inputs[hidden] == 49).all())
    plain = synthetic(TokenInput(50, 8), limit=200).batch(0, 200).inputs
    assert torch.equal(torch.where(hidden, batch.labels, batch.inputs), plain)


# ---------------------------------------------------------------------------------------------------
# Sets of images


def test_digits_as_a_model_wants_them() -> None:
    made = open_samples("digits", ImageInput((1, 8, 8)), classes=10)
    found = load_data("digits")
    batch = made.batch(0, 360)
    assert torch.allclose(batch.inputs, torch.tensor(found.test_x), atol=1 / 255)
    assert torch.equal(batch.labels, torch.tensor(found.test_y))
    larger = (
        open_samples("digits", ImageInput((3, 16, 24), (0.5, 0.4, 0.3), (0.2, 0.2, 0.2)), limit=2).batch(0, 2).inputs
    )
    assert larger.shape == (2, 3, 16, 24)
    pixels = larger * 0.2 + torch.tensor([0.5, 0.4, 0.3])[:, None, None]
    # a grey image in colour, not stretched beyond its range
    assert torch.allclose(pixels[:, 0], pixels[:, 2], atol=1e-6)
    assert float(pixels.min()) > -1e-6
    assert float(pixels.max()) < 1 + 1e-6


def test_cifar_as_a_model_wants_it(tmp_path: Path) -> None:
    pixels, labels = write_cifar(tmp_path, "cifar-10-batches-bin")
    made = open_samples("cifar10", PLAIN, data_dir=tmp_path, classes=10)
    batch = made.batch(3, 9)
    assert np.array_equal(np.rint(batch.inputs.numpy() * 255).reshape(6, -1), pixels[3:9])
    assert batch.labels.tolist() == labels[3:9].tolist()
    grey = open_samples("cifar10", ImageInput((1, 32, 32)), data_dir=tmp_path).batch(0, 1).inputs[0, 0]
    r, g, b = pixels[0].reshape(3, 32, 32).astype(np.float64)
    assert np.allclose(grey.numpy() * 255, 0.299 * r + 0.587 * g + 0.114 * b, atol=1e-3)
    # classes of another net are no labels
    other = open_samples("cifar10", PLAIN, data_dir=tmp_path, classes=1000)
    assert other.labels_note == "cifar10 has 10 classes, the model 1000"
    assert other.batch(0, 2).labels is None
    assert native_shape("cifar100") == (3, 32, 32)
    assert native_shape("folder") is None


def photographs(folder: Path, names=("ant", "bee"), count: int = 3, size=(40, 30)) -> Path:
    made = image_of()
    for index, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for number in range(count):
            colour = (40 * index, 60 * number, 100)
            made.new("RGB", size, colour).save(folder / name / f"{number}.png")
    return folder


def test_a_folder_of_images(tmp_path: Path) -> None:
    photographs(tmp_path)
    (tmp_path / "ant" / "notes.txt").write_text("no image")
    (tmp_path / ".hidden").mkdir()
    made = open_samples("folder", ImageInput((3, 16, 16)), data_dir=tmp_path, classes=2)
    assert len(made) == 6
    batch = made.batch(0, 6)
    # the colour tells the class: labels belong to their images
    assert [round(float(x[0, 0, 0]) * 255) // 40 for x in batch.inputs] == batch.labels.tolist()
    assert sorted(batch.labels.tolist()) == [0, 0, 0, 1, 1, 1]
    other = open_samples("folder", ImageInput((3, 16, 16)), data_dir=tmp_path, classes=2, seed=1).batch(0, 6)
    assert other.labels.tolist() != batch.labels.tolist()
    assert len(open_samples("folder", PLAIN, data_dir=tmp_path, limit=4)) == 4


def test_resize_and_crop(tmp_path: Path) -> None:
    """The shorter side is brought to size / crop, the middle is kept, proportions too."""
    made = image_of()
    (tmp_path / "a").mkdir()
    picture = np.zeros((60, 100, 3), dtype=np.uint8)
    picture[:, 40:60] = 255  # a bar in the middle
    made.fromarray(picture).save(tmp_path / "a" / "x.png")
    inputs = ImageInput((3, 24, 24), crop=0.8, interpolation="nearest")
    x = open_samples("folder", inputs, data_dir=tmp_path).batch(0, 1).inputs[0, 0]
    # 60 → 30: the bar of 20 becomes one of 10, in the middle of 24
    assert int((x[12] > 0.5).sum()) == 10
    assert bool((x[:, 7:17] > 0.5).all())


@pytest.mark.parametrize(
    ("names", "classes", "labels", "note"),
    [
        (("7", "3"), 10, [3, 7], ""),
        (("b", "a"), 2, [0, 1], ""),
        (("b", "a"), None, [0, 1], ""),
        (("b", "a"), 1000, None, "2 folders do not name which of the model's 1000 classes they are"),
        (("12", "a"), 13, None, "2 folders do not name"),
        (("12", "3"), 5, None, "2 folders do not name"),
    ],
)
def test_names_of_class_folders(tmp_path: Path, names, classes, labels, note: str) -> None:
    photographs(tmp_path, names, count=1)
    made = open_samples("folder", PLAIN, data_dir=tmp_path, classes=classes)
    assert made.labels_note.startswith(note)
    found = made.batch(0, 2).labels
    assert (found is None) if labels is None else sorted(found.tolist()) == labels


def test_some_folders_of_imagenet(tmp_path: Path) -> None:
    """WordNet numbers are looked up, where timm is there to know them."""
    if importlib.util.find_spec("timm") is None:
        pytest.skip("timm is not installed")
    photographs(tmp_path, ("n02123045", "n01440764"), count=1)
    made = open_samples("folder", PLAIN, data_dir=tmp_path, classes=1000)
    assert sorted(made.batch(0, 2).labels.tolist()) == [0, 281]


@pytest.mark.parametrize("content", [b"", b"no image at all", b"\x89PNG\r\n\x1a\n" + bytes(40)])
def test_damaged_images(tmp_path: Path, content: bytes) -> None:
    photographs(tmp_path, ("a",), count=1)
    (tmp_path / "a" / "0.png").write_bytes(content)
    made = open_samples("folder", PLAIN, data_dir=tmp_path)
    with pytest.raises(BadFileError, match=r"0\.png: not a readable image") as caught:
        made.batch(0, 1)
    assert "\n" not in str(caught.value)


def test_truncated_and_enormous_images(tmp_path: Path) -> None:
    made = image_of()
    (tmp_path / "a").mkdir()
    file = tmp_path / "a" / "x.jpg"
    made.new("RGB", (200, 200), (1, 2, 3)).save(file)
    file.write_bytes(file.read_bytes()[:400])
    with pytest.raises(BadFileError, match=r"x\.jpg: not a readable image"):
        open_samples("folder", PLAIN, data_dir=tmp_path).batch(0, 1)
    # a picture of 100 million pixels takes some kilobytes on disk, and would take gigabytes
    made.new("1", (10_000, 10_000)).save(tmp_path / "a" / "y.png")
    file.unlink()
    with pytest.raises(BadFileError, match="decompression bomb"):
        open_samples("folder", PLAIN, data_dir=tmp_path).batch(0, 1)


# ---------------------------------------------------------------------------------------------------
# Text


def test_text_as_bytes(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    text = bytes(np.random.default_rng(0).integers(0, 256, 100, dtype=np.uint8))
    file.write_bytes(text)
    made = open_samples("text", TokenInput(256, 8), data_dir=file)
    assert len(made) == 12
    assert "bytes as tokens" in made.source
    batch = made.batch(0, 12)
    assert bytes(batch.inputs.flatten().tolist()) == text[:96]
    assert bytes(batch.labels.flatten().tolist()) == text[1:97]
    assert len(open_samples("text", TokenInput(256, 8), data_dir=file, limit=3)) == 3


def test_text_by_a_tokenizer(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("one two three\n" * 9000, encoding="utf-8")
    pieces = []

    def words(text: str) -> list[int]:
        pieces.append(len(text))
        return [len(word) for word in text.split()]

    made = open_samples("text", TokenInput(10, 4, words), data_dir=file)
    assert len(made) == (27000 - 1) // 4
    assert made.batch(1, 2).inputs.tolist() == [[3, 5, 3, 3]]
    assert sum(pieces) == file.stat().st_size
    assert len(pieces) > 1
    pieces.clear()
    assert len(open_samples("text", TokenInput(10, 4, words), data_dir=file, limit=2)) == 2
    # no more is read than is needed
    assert len(pieces) == 1
    with pytest.raises(BadValueError, match="the tokenizer makes tokens up to 5, the model has 5"):
        open_samples("text", TokenInput(5, 4, words), data_dir=file)
    file.write_bytes(b"good\n\xff\xfe\n")
    with pytest.raises(BadFileError, match="not a text in UTF-8: invalid start byte at byte 5"):
        open_samples("text", TokenInput(10, 1, words), data_dir=file)


# ---------------------------------------------------------------------------------------------------
# Refusals


@pytest.mark.parametrize(
    ("name", "inputs", "options", "kind", "message"),
    [
        ("cifar", PLAIN, {}, UnknownNameError, "unknown data set 'cifar'; did you mean 'cifar10'"),
        (
            "digits",
            TokenInput(9, 9),
            {},
            BadValueError,
            "takes 9 tokens of 9; 'digits' is of no use to it: give it --data",
        ),
        ("text", PLAIN, {}, BadValueError, "takes 3×32×32; 'text' is of no use to it: give it images"),
        ("digits", TensorInput((4,)), {}, BadValueError, "only --data synthetic has such"),
        ("folder", PLAIN, {}, BadValueError, "--data folder needs --data-dir"),
        ("text", TokenInput(300, 9), {}, BadValueError, "--data text needs --data-dir, a file of text"),
        ("folder", PLAIN, {"data_dir": "nowhere"}, BadFileError, "cannot read nowhere"),
        ("text", TokenInput(300, 9), {"data_dir": "nowhere"}, BadFileError, "cannot read nowhere"),
        ("text", TokenInput(300, 9), {"data_dir": "."}, BadValueError, "is a folder: name a file of it"),
        ("text", TokenInput(300, 9), {"data_dir": "empty"}, BadFileError, "empty: is empty"),
        (
            "text",
            TokenInput(300, 9),
            {"data_dir": "short"},
            BadFileError,
            "4 tokens, fewer than the 10 of one sequence",
        ),
        (
            "text",
            TokenInput(99, 9),
            {"data_dir": "short"},
            BadValueError,
            "99 tokens and no tokenizer: too few for the by",
        ),
        ("folder", PLAIN, {"data_dir": "."}, BadFileError, "no subfolder holds images .*move them into one"),
        ("cifar10", PLAIN, {"data_dir": "."}, BadFileError, "data set 'cifar10' not found"),
    ],
)
def test_refusals(tmp_path: Path, monkeypatch, name: str, inputs, options: dict, kind, message: str) -> None:
    image_of().new("RGB", (8, 8)).save(tmp_path / "loose.png")
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("abcd")
    monkeypatch.chdir(tmp_path)
    options = {key: Path(value) for key, value in options.items()}
    with pytest.raises(kind, match=message):
        open_samples(name, inputs, **options)


def test_without_pillow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(MissingDependencyError, match=r"Pillow reads images: pip install 'lnsdeploy\[models\]'"):
        open_samples("folder", PLAIN, data_dir=tmp_path)


def test_every_name_is_there() -> None:
    assert set(data_names()) == {
        "synthetic",
        "folder",
        "text",
        "digits",
        "mnist",
        "fashion-mnist",
        "cifar10",
        "cifar100",
    }
