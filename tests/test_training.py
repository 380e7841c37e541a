"""What the trainer can be fed with and how it goes on: data, kills, processes, hardware in the loop."""

from __future__ import annotations

import csv
import importlib.util
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, UnknownNameError, UnsupportedError
from lnsdeploy.files import read_safetensors, read_toml
from lnsdeploy.formats import LNSFormat
from lnsdeploy.recipe import LayerRecipe, Recipe
from lnsdeploy.training import run as runs
from lnsdeploy.training import trainer
from lnsdeploy.training.data import Dataset, load_data
from lnsdeploy.training.feeds import ImageFeed, TextFeed
from lnsdeploy.training.models import build_model, settings_of
from lnsdeploy.training.run import TrainConfig, load_run
from lnsdeploy.training.text import load_text
from lnsdeploy.training.trainer import config_from_options, train

torch.set_num_threads(1)
ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


def quick(**options: Any) -> TrainConfig:
    return config_from_options(**({"epochs": 2, "batch_size": 240} | options))


def losses(folder: Path) -> list[float]:
    with (folder / runs.STEPS).open(newline="") as handle:
        return [float(row["train_loss"]) for row in csv.DictReader(handle)]


@pytest.fixture(scope="module")
def verse(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A text that can be learnt: the same words over and over, with a change here and there."""
    words = ["rise ", "and ", "shine ", "again, ", "ö "]
    rng = np.random.default_rng(0)
    text = "".join(words[i % 4] if rng.random() > 0.05 else words[4] for i in range(1500))
    file = tmp_path_factory.mktemp("text") / "verse.txt"
    file.write_bytes(text.replace(", ", ",\r\n").encode())
    return file


def of_text(verse: Path, **options: Any) -> TrainConfig:
    settings = {"depth": 1, "width": 16, "heads": 2, "dropout": 0.1}
    return quick(
        **({"data": f"text:{verse}", "model": "transformer", "context": 16, "model_settings": settings} | options)
    )


# ---------------------------------------------------------------------------------------------------
# Text


def test_a_text_is_numbers_of_its_characters(verse: Path) -> None:
    text = load_text(f"text:{verse.name}", verse.parent)
    everything = np.concatenate([text.train, text.test])
    written = verse.read_bytes().decode().replace("\r\n", "\n")
    assert "".join(text.vocabulary[i] for i in everything) == written
    assert text.vocabulary == "".join(sorted(set(written)))
    assert len(text.test) == len(written) // 10
    feed = TextFeed(text, context=16, limit=None, seed=3, device=CPU)
    starts = set()
    for epoch in range(4):
        x, y = feed.batch(epoch, np.arange(feed.sizes[0]))
        assert torch.equal(x[:, 1:], y[:, :-1])
        flat = x.reshape(-1).numpy()
        first = next(i for i in range(16) if np.array_equal(text.train[i : i + len(flat)], flat))
        assert torch.equal(
            y.reshape(-1), torch.from_numpy(text.train[first + 1 : first + 1 + len(flat)].astype(np.int64))
        )
        starts.add(first)
    assert len(starts) > 1, "stretches begin elsewhere in every epoch"
    x, y = feed.test(0, feed.sizes[1])
    assert np.array_equal(x.reshape(-1).numpy(), text.test[: x.numel()])


def test_texts_that_do_not_serve(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    for content, message in ((b"\xff\xfe", "not UTF-8 text"), (b"abc", "too few"), (b"a" * 100, "1 different")):
        file.write_bytes(content)
        with pytest.raises(BadFileError, match=message):
            load_text(f"text:{file}")
    with pytest.raises(BadFileError, match=r"no such file|cannot read"):
        load_text("text:missing.txt", tmp_path)
    file.write_bytes(b"ab" * 60)
    with pytest.raises(BadValueError, match="too few for a context of 64"):
        train(quick(data=f"text:{file}", model="transformer"), tmp_path / "run")


@pytest.mark.parametrize("optimizer", ["lns-madam", "adam"])
def test_a_transformer_learns_a_text(verse: Path, tmp_path: Path, optimizer: str) -> None:
    config = of_text(verse, optimizer=optimizer, epochs=4, batch_size=32, lr=0.03, errors="8:8", gradients="8:8")
    result = train(config, tmp_path / "run")
    assert result.loss < 0.7 * np.log(18) < losses(tmp_path / "run")[0] + 1
    again = load_run(tmp_path / "run")
    table = read_toml(tmp_path / "run" / runs.CONFIG)
    assert table["dataset"]["vocabulary"] == load_text(f"text:{verse}").vocabulary
    feed = trainer.make_feed(config, load_text(f"text:{verse}"))
    assert trainer._evaluated(again.model, feed, trainer.Shards()) == (result.loss, result.accuracy)
    with pytest.raises(UnsupportedError, match="was trained on text"):
        again.dataset()
    # where the text lies does not matter, what it says does
    moved = tmp_path / "moved.txt"
    moved.write_bytes(verse.read_bytes())
    assert (
        train(
            of_text(
                moved,
                **{k: getattr(config, k) for k in ("optimizer", "epochs", "batch_size", "lr", "errors", "gradients")},
            ),
            tmp_path / "run",
        ).loss
        == result.loss
    )
    moved.write_bytes(verse.read_bytes() + b"more")
    with pytest.raises(BadValueError, match=r"another config: .*dataset\.digest"):
        train(
            of_text(
                moved,
                **{k: getattr(config, k) for k in ("optimizer", "epochs", "batch_size", "lr", "errors", "gradients")},
            ),
            tmp_path / "run",
        )


# ---------------------------------------------------------------------------------------------------
# Images


def labelled(count: int = 12, shape: tuple[int, ...] = (2, 16, 16)) -> Dataset:
    rng = np.random.default_rng(5)
    x = rng.random((count, *shape), dtype=np.float32) + 1
    y = np.arange(count, dtype=np.int64) % 3
    return Dataset(x, y, x, y, 3, "made", "made")


@pytest.mark.parametrize("augment", ["crop", "flip", "crop+flip"])
def test_augmentation_shifts_and_flips(augment: str) -> None:
    data = labelled(64)
    feed = ImageFeed(data, augment=augment, limit=None, seed=1, device=CPU)
    seen = set()
    x, y = feed.batch(0, np.arange(64))
    assert torch.equal(y, torch.from_numpy(data.train_y))
    for index in range(64):
        found = None
        for flip in (False, True):
            original = data.train_x[index][:, :, ::-1] if flip else data.train_x[index]
            padded = np.pad(original, ((0, 0), (2, 2), (2, 2)))
            for dy in range(5):
                for dx in range(5):
                    if np.array_equal(padded[:, dy : dy + 16, dx : dx + 16], x[index].numpy()):
                        found = dy - 2, dx - 2, flip
        assert found is not None
        seen.add(found)
    assert {s[2] for s in seen} == ({False, True} if "flip" in augment else {False})
    shifts = {s[:2] for s in seen}
    assert (
        (len(shifts) > 15 and {s[0] for s in shifts} == set(range(-2, 3))) if "crop" in augment else shifts == {(0, 0)}
    )
    # a sample is shifted alike in whatever batch it comes, and otherwise in another epoch
    some = np.array([5, 40, 2])
    assert torch.equal(feed.batch(0, some)[0], x[some])
    assert not torch.equal(feed.batch(1, some)[0], x[some])


def test_a_limit_is_drawn_by_seed() -> None:
    data = labelled(300)
    found = [ImageFeed(data, augment="none", limit=30, seed=seed, device=CPU)._train[0] for seed in (0, 0, 1)]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_a_limit_keeps_the_classes_shares() -> None:
    feed = ImageFeed(labelled(300), augment="none", limit=30, seed=0, device=CPU)
    assert feed.sizes == (30, 300)
    assert torch.bincount(feed.batch(0, np.arange(30))[1]).tolist() == [10, 10, 10]
    with pytest.raises(BadValueError, match="made has 300 training samples, not 301"):
        ImageFeed(labelled(300), augment="none", limit=301, seed=0, device=CPU)


def test_learning_rates() -> None:
    def rates(**options: Any) -> list[float]:
        config = quick(lr=0.8, **options)
        return [trainer.learning_rate(config, step, 8) for step in range(8)]

    assert rates(schedule="linear") == pytest.approx([0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1])
    assert rates(schedule="step") == pytest.approx([0.8] * 4 + [0.08] * 2 + [0.008] * 2)
    assert rates(schedule="constant", warmup=3) == pytest.approx([0.2, 0.4, 0.6] + [0.8] * 5)
    assert rates()[4] == pytest.approx(0.4)


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"augment": "rotate"}, UnknownNameError, "augment"),
        ({"augment": "crop", "data": "text:x"}, BadValueError, "is for images"),
        ({"label_smoothing": 1.0}, BadValueError, "label_smoothing"),
        ({"weight_decay": 0.1}, BadValueError, "belongs to adam and sgd"),
        ({"grad_clip": 0.0}, BadValueError, "grad_clip must be above 0"),
        ({"emulate": "forward"}, BadValueError, "belong together"),
        ({"datapath": "gauss-8"}, BadValueError, "belong together"),
        ({"emulate": "sideways", "datapath": "gauss-8"}, UnknownNameError, "emulate"),
        ({"emulate": "both", "datapath": "gauss-9"}, UnknownNameError, "gauss-9"),
        ({"device": "tpu"}, BadValueError, "device must be"),
        ({"optimizer": "lns-madam", "as_float": True}, BadValueError, "trains words"),
        ({"optimizer": "lns-madam", "update_gamma": 8}, BadValueError, "belongs to integer-madam"),
        ({"optimizer_settings": {"momentum": 0.5}}, UnknownNameError, "momentum"),
        ({"optimizer_settings": {"beta": [1]}}, BadTypeError, "optimizer_settings must be"),
        ({"errors": "8-8"}, BadValueError, "errors"),
        ({"limit": 0}, BadValueError, "limit"),
    ],
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        quick(**options)


def test_settings_reach_model_and_optimizer(tmp_path: Path) -> None:
    config = quick(
        model="cnn-large",
        model_settings={"width": 4},
        optimizer="lns-madam",
        update_bits=12,
        optimizer_settings={"sign_flip": True, "rounding": "nearest", "p_scale": 10.0},
        granularity="tensor",
        label_smoothing=0.1,
        grad_clip=1.0,
    )
    model = config.model_for((1, 8, 8), 10)
    optimizer = trainer.make_optimizer(config, model)
    assert model.conv1.out_channels == 4
    assert {g["bits"] for g in optimizer.param_groups} == {12}
    assert all(g["sign_flip"] and g["rounding"] == "nearest" and g["p_scale"] == 10.0 for g in optimizer.param_groups)
    assert settings_of("transformer") == {"depth": 4, "width": 128, "heads": 4, "dropout": 0.0}
    with pytest.raises(UnknownNameError, match="setting of cnn-large"):
        build_model("cnn-large", (1, 8, 8), 10, settings={"wide": 4})
    with pytest.raises(BadTypeError, match="width of cnn-large must be like 32"):
        build_model("cnn-large", (1, 8, 8), 10, settings={"width": 4.5})
    with pytest.raises(BadValueError, match=r"optimizer_settings: .*beta"):
        trainer.make_optimizer(quick(optimizer="adam", optimizer_settings={"beta1": 2.0}), model)


def test_fields_that_came_later_do_not_change_older_runs() -> None:
    first = {
        "data", "model", "bits", "gamma", "as_float", "granularity", "calibration", "optimizer", "lr", "epochs",
        "batch_size", "seed", "schedule", "threads",
    }  # fmt: skip
    assert set(TrainConfig().to_dict()) == first
    config = quick(errors="6:4", model_settings={"width": 3}, model="cnn-large", warmup=2)
    assert TrainConfig.from_dict(config.to_dict()) == config


# ---------------------------------------------------------------------------------------------------
# Emulated hardware, other models


def test_training_through_a_datapath(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # what becomes of the net in the end is the matter of test_deployed.py
    monkeypatch.setattr(trainer._Training, "_deploy", lambda self, data, start: (None, "not here"))
    found = {}
    for name, options in {
        "float sums": {},
        "forward": {"emulate": "forward", "datapath": "lns-madam-8"},
        "both": {"emulate": "both", "datapath": "lns-madam-8"},
        "max-plus": {"emulate": "forward", "datapath": "max-plus-8"},
    }.items():
        config = quick(epochs=3, batch_size=60, limit=480, seed=2, **options)
        found[name] = train(config, tmp_path / name)
        assert train(config, tmp_path / name).accuracy == found[name].accuracy
    curves = {name: losses(tmp_path / name) for name in found}
    assert len({tuple(curve) for curve in curves.values()}) == 4
    # the same first forward pass; the second step shows which backward pass was another
    assert curves["forward"][0] == curves["both"][0] != curves["float sums"][0]
    assert curves["forward"][0] == pytest.approx(curves["float sums"][0], rel=0.05)
    assert found["forward"].accuracy > 0.8
    assert found["both"].accuracy > 0.8
    assert found["max-plus"].loss > found["forward"].loss


def test_a_datapath_runs_the_formats_of_the_run(tmp_path: Path) -> None:
    for options, formats in (
        ({"bits": 6, "gamma": 4, "weights": "5:2"}, ("6:4", "5:2", "6:4")),
        ({"as_float": True}, ("8:8", "8:8", "8:8")),
    ):
        config = quick(emulate="forward", datapath="gauss-8", **options)
        training = trainer._Training(
            config, 10, trainer.make_feed(config, load_data("digits")), tmp_path, "", trainer.Shards()
        )
        with training.arithmetic() as seen:
            training.model(torch.rand(4, 1, 8, 8))
        assert {record.formats[:2] for record in seen.records.values()} == {formats[:2]}


def test_a_training_records_no_offsets(tmp_path: Path) -> None:
    """Those of a first batch would be others where a training is continued; export leaves them alone as well."""
    layer = LayerRecipe(LNSFormat(8, 8), LNSFormat(8, 8))
    common = quick(emulate="forward", datapath="mitchell-8", epochs=1, batch_size=60, limit=180)
    found = []
    for name, given in (("plain", layer), ("emulation", replace(layer, offsets="recorded", output=LNSFormat(5, 8)))):
        train(replace(common, recipe=Recipe(given, (("hidden1", given),))), tmp_path / name)
        weights = read_safetensors(tmp_path / name / runs.WEIGHTS)[0]
        found.append((losses(tmp_path / name), {key: value.tobytes() for key, value in weights.items()}))
    assert found[0] == found[1]


MODEL = """
from torch import nn

def net(width=7):
    return nn.Sequential(nn.Flatten(), nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))

def wrong():
    return nn.Linear(3, 2)
"""


def test_models_of_python_files(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(MODEL)
    config = quick(model=f"{file}:net", model_settings={"width": 9})
    assert train(config, tmp_path / "run").parameters == 65 * 9 + 100
    with pytest.raises(UnsupportedError, match="reading a run executes no code"):
        load_run(tmp_path / "run")
    loaded = load_run(tmp_path / "run", run_code=True)
    assert trainer.evaluate(loaded.model, loaded.dataset()) == loaded.accuracy
    with pytest.raises(BadValueError, match="does not take inputs of shape"):
        train(quick(model=f"{file}:wrong"), tmp_path / "other")


def test_models_of_timm(tmp_path: Path) -> None:
    if importlib.util.find_spec("timm") is None:
        pytest.skip("no timm")
    config = quick(model="timm:test_resnet", epochs=1, batch_size=48, limit=48, optimizer="lns-madam")
    result = train(config, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert trainer.evaluate(loaded.model, loaded.dataset()) == result.accuracy
    assert result.parameters == sum(p.numel() for p in loaded.model.parameters())


@pytest.mark.parametrize(
    ("name", "shape"), [("resnet20", (3, 32, 32)), ("resnet18", (3, 16, 16)), ("cnn-large", (1, 28, 28))]
)
def test_nets_for_images(name: str, shape: tuple[int, ...]) -> None:
    model = build_model(name, shape, 7, settings={"width": 4})
    assert model.eval()(torch.zeros(2, *shape)).shape == (2, 7)
    again = build_model(name, shape, 7, settings={"width": 4})
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), again.parameters(), strict=True))
    with pytest.raises(BadValueError, match="takes images"):
        build_model(name, (64,), 7)
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert len(convolutions) == {"resnet20": 21, "resnet18": 20, "cnn-large": 2}[name]


def test_a_transformer_does_not_see_the_future() -> None:
    model = build_model("transformer", (12,), 9, settings={"depth": 2, "width": 8, "heads": 2}).eval()
    x = torch.arange(12)[None] % 9
    changed = x.clone()
    changed[0, 7] = 3
    a, b = model(x), model(changed)
    assert torch.equal(a[:, :7], b[:, :7])
    assert not torch.allclose(a[:, 7:], b[:, 7:])
    assert model(x[:, :5]).shape == (1, 5, 9)


def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(BadValueError, match="sees no GPU"):
        train(quick(device="cuda"), tmp_path / "run")
