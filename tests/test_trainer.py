"""Training: bits that repeat, runs that resume, directories that are checked."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.files import read_safetensors, read_toml, write_safetensors
from lnsdeploy.formats import LNSFormat
from lnsdeploy.recipe import LayerRecipe, Recipe
from lnsdeploy.training import run as runs
from lnsdeploy.training import trainer
from lnsdeploy.training.data import load_data
from lnsdeploy.training.layers import deployable, lns_layers
from lnsdeploy.training.models import build_model
from lnsdeploy.training.run import TrainConfig, load_run
from lnsdeploy.training.trainer import config_from_options, evaluate, train, write_curve

torch.set_num_threads(1)
OPTIMIZERS = ["madam", "integer-madam", "adam", "sgd"]


def quick(**options: Any) -> TrainConfig:
    return config_from_options(**({"epochs": 2, "batch_size": 240} | options))


def weights(folder: Path) -> bytes:
    return (folder / runs.WEIGHTS).read_bytes()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, for tests that only read it or work on a copy."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    train(quick(optimizer="integer-madam"), folder)
    return folder


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the finished run."""
    folder = tmp_path / "run"
    folder.mkdir()
    for file in finished.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    return folder


# ---------------------------------------------------------------------------------------------------
# What a run leaves


def test_curve(finished: Path, tmp_path: Path) -> None:
    """The true function, which conftest.py takes the place of for every training of the tests."""
    history = runs.read_metrics(finished)
    write_curve(tmp_path / "curve.png", history, "title")
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG\r\n")
    # where nobody looked at the test set there is nothing to draw, and no error
    write_curve(
        tmp_path / "curve.png", [history[0] | {"test_loss": math.nan, "test_accuracy": math.nan}, history[1]], ""
    )
    assert [path.name for path in tmp_path.iterdir()] == ["curve.png"]


def test_run_directory(finished: Path) -> None:
    assert {f.name for f in finished.iterdir()} == {
        "config.toml",
        "weights.safetensors",
        "metrics.csv",
        "steps.csv",
        "curve.png",
    }
    table = read_toml(finished / "config.toml")
    assert table["train"]["optimizer"] == "integer-madam"
    assert table["recipe"]["default"]["weight"] == "8:8"
    assert table["dataset"]["digest"] == load_data("digits").digest
    assert (finished / "curve.png").read_bytes().startswith(b"\x89PNG")
    rows = runs.read_metrics(finished)
    assert [row["epoch"] for row in rows] == [1, 2]
    loaded = load_run(finished)
    assert loaded.accuracy == rows[-1]["test_accuracy"] == evaluate(loaded.model, loaded.dataset())
    assert loaded.formats() == (LNSFormat(8, 8), LNSFormat(8, 8))
    assert not loaded.model.training
    metadata = loaded.metadata()
    assert metadata["data"] == "digits"
    assert all(isinstance(v, str) for v in metadata.values())


def test_integer_madam_stores_words_of_its_weights(finished: Path) -> None:
    loaded = load_run(finished)
    parameters = dict(loaded.model.named_parameters())
    assert set(loaded.words) == {name for name, p in parameters.items() if p.ndim > 1}
    for name, tensor in loaded.words.items():
        assert tensor.words.dtype == np.uint16
        assert tensor.format == LNSFormat(16, 2048)
        assert np.array_equal(tensor.decode(), parameters[name].detach().numpy())


def test_a_finished_run_is_not_repeated(run: Path) -> None:
    before = {file.name: file.stat().st_mtime_ns for file in run.iterdir()}
    calls: list[int] = []
    result = train(quick(optimizer="integer-madam"), run, progress=lambda epoch, row: calls.append(epoch))
    assert not calls
    assert {file.name: file.stat().st_mtime_ns for file in run.iterdir()} == before
    summary = result.to_dict()
    assert summary["accuracy"] == load_run(run).accuracy
    assert summary["run"] == str(run)
    json.dumps(summary)


@pytest.mark.smoke
def test_learning_happens(tmp_path: Path) -> None:
    for optimizer in OPTIMIZERS:
        result = train(quick(optimizer=optimizer, epochs=6, batch_size=96), tmp_path / optimizer)
        assert result.accuracy > 0.85, optimizer


def test_float_runs_have_no_lns_layers(tmp_path: Path) -> None:
    train(quick(as_float=True, model="cnn", epochs=1), tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert not dict(lns_layers(loaded.model))
    assert loaded.formats() == (LNSFormat(8, 8), LNSFormat(8, 8))
    plain, specs = deployable(loaded.model)
    assert specs == {}
    assert not any(isinstance(m, nn.BatchNorm2d) for m in plain.modules())


# ---------------------------------------------------------------------------------------------------
# Bits that repeat


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_interrupted_runs_end_with_the_same_bits(tmp_path: Path, optimizer: str, model: str) -> None:
    config = quick(optimizer=optimizer, model=model, epochs=3, batch_size=360, calibration="percentile")
    train(config, tmp_path / "whole")

    def interrupt(epoch: int, row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            train(config, tmp_path / "parts", progress=interrupt)
        assert (tmp_path / "parts" / runs.CHECKPOINT).is_file()
        assert not (tmp_path / "parts" / runs.WEIGHTS).exists()
    # torch's own random state must not count
    torch.manual_seed(torch.seed())
    train(config, tmp_path / "parts")
    assert weights(tmp_path / "parts") == weights(tmp_path / "whole")
    drop_seconds = [line.rsplit(",", 1)[0] for line in (tmp_path / "parts" / "metrics.csv").read_text().splitlines()]
    whole = [line.rsplit(",", 1)[0] for line in (tmp_path / "whole" / "metrics.csv").read_text().splitlines()]
    assert drop_seconds == whole


_CHILD = """
import sys
from lnsdeploy.training.trainer import config_from_options, train
config = config_from_options(epochs=200, batch_size=64, optimizer="integer-madam", bits=6, gamma=4)
train(config, sys.argv[1], progress=lambda epoch, row: print(epoch, flush=True))
"""


def test_killed_run_resumes_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL in the middle of an epoch; then both runs are cut short in the same way and compared."""
    folder = tmp_path / "killed"
    child = subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(Path(trainer.__file__).parents[2])},
    )
    assert child.stdout is not None
    lines = [child.stdout.readline() for _ in range(2)]
    child.send_signal(signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    assert lines == ["1\n", "2\n"]
    config = config_from_options(epochs=200, batch_size=64, optimizer="integer-madam", bits=6, gamma=4)
    done = len(_checkpoint_history(folder))
    assert 2 <= done < 200

    def stop_at(last: int):  # type: ignore[no-untyped-def]
        def progress(epoch: int, row: dict[str, float]) -> None:
            if epoch == last:
                raise KeyboardInterrupt

        return progress

    for place in (folder, tmp_path / "whole"):
        with pytest.raises(KeyboardInterrupt):
            train(config, place, progress=stop_at(done + 1))
    killed, _ = read_safetensors(folder / runs.CHECKPOINT)
    whole, _ = read_safetensors(tmp_path / "whole" / runs.CHECKPOINT)
    assert killed.keys() == whole.keys()
    for name, array in killed.items():
        assert array.tobytes() == whole[name].tobytes(), name
    assert not [f for f in folder.iterdir() if f.name.endswith(".tmp.safetensors") and f.stat().st_size == 0]


def _checkpoint_history(folder: Path) -> list[Any]:
    _, notes = runs.read_state(folder / runs.CHECKPOINT)
    found: list[Any] = notes["history"]
    return found


def test_seeds(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        train(quick(seed=seed, epochs=1), tmp_path / name)
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    a, _ = read_safetensors(tmp_path / "a" / runs.WEIGHTS)
    c, _ = read_safetensors(tmp_path / "c" / runs.WEIGHTS)
    assert all(not np.array_equal(a[k], c[k]) for k in a if k.endswith(".weight"))


def test_progress_and_global_state_do_not_count(tmp_path: Path) -> None:
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    threads, strict = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    train(quick(epochs=1), tmp_path / "a", progress=lambda epoch, row: None)
    assert torch.equal(before, torch.random.get_rng_state())
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == (threads, strict)
    torch.manual_seed(6)
    train(quick(epochs=1), tmp_path / "b")
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_initial_weights() -> None:
    a, b, c = (build_model("mlp", (1, 8, 8), 10, seed=s) for s in (0, 0, 1))
    for x, y, z in zip(a.parameters(), b.parameters(), c.parameters(), strict=True):
        assert torch.equal(x, y)
        assert x.ndim == 1 or not torch.equal(x, z)
    assert float(a.hidden1.weight.detach().std()) == pytest.approx((2 / 64) ** 0.5, rel=0.05)
    with pytest.raises(UnknownNameError, match="'mpl'; did you mean 'mlp'"):
        build_model("mpl", (1, 8, 8), 10)
    with pytest.raises(BadValueError, match="images"):
        build_model("cnn", (64,), 10)
    with pytest.raises(BadValueError, match="two classes"):
        build_model("mlp", (64,), 1)


def test_cnn_is_small_enough_to_emulate() -> None:
    model = build_model("cnn", (1, 8, 8), 10)
    macs = 0

    def count(module: nn.Module, args: tuple[torch.Tensor], output: torch.Tensor) -> None:
        nonlocal macs
        macs += module.weight[0].numel() * output.numel()  # type: ignore[index,operator]

    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    model.eval()(torch.zeros(1, 1, 8, 8))
    assert 100_000 < macs < 200_000
    assert build_model("cnn", (1, 28, 28), 10).eval()(torch.zeros(2, 1, 28, 28)).shape == (2, 10)


def test_sample_order_and_schedule() -> None:
    order = trainer.sample_order(3, 7, 1000)
    assert sorted(order) == list(range(1000))
    assert np.array_equal(order, trainer.sample_order(3, 7, 1000))
    assert not np.array_equal(order, trainer.sample_order(3, 8, 1000))
    assert not np.array_equal(order, trainer.sample_order(4, 7, 1000))
    config = quick(lr=0.5)
    rates = [trainer.learning_rate(config, step, 4) for step in range(4)]
    assert rates == pytest.approx([0.5, 0.25 * (1 + 0.5**0.5), 0.25, 0.25 * (1 - 0.5**0.5)])
    assert trainer.learning_rate(quick(lr=0.5, schedule="constant"), 3, 4) == 0.5


# ---------------------------------------------------------------------------------------------------
# Configs


def test_config_round_trip_and_defaults(tmp_path: Path) -> None:
    config = config_from_options(bits=6, gamma=4, weights="5:2", seed=3, lr=None, update_bits=None, as_float=False)
    assert (config.lr, config.epochs) == (0.03, 60)
    assert TrainConfig.from_dict(config.to_dict()) == config
    recipe = config.full_recipe()
    assert recipe is not None
    assert recipe.default == LayerRecipe(LNSFormat(5, 2), LNSFormat(6, 4))
    assert config_from_options(data_dir="x").data_dir == str(Path("x").absolute())
    assert config_from_options(optimizer="integer-madam").update_gamma == 2048
    assert config_from_options(optimizer="integer-madam", update_bits=8).update_gamma == 8


def test_recipe_file_over_options(tmp_path: Path) -> None:
    file = tmp_path / "recipe.toml"
    file.write_text('[default]\nweight = "5:2"\n[[layer]]\npattern = "output"\nweight = "float"\n')
    config = config_from_options(recipe=file, bits=6, gamma=4, epochs=1)
    recipe = config.full_recipe()
    assert recipe is not None
    assert recipe.for_layer("hidden1") == LayerRecipe(LNSFormat(5, 2), LNSFormat(6, 4))
    train(config, tmp_path / "run")
    loaded = load_run(tmp_path / "run")
    assert loaded.config == config
    assert {n: str(layer.recipe.weight) for n, layer in lns_layers(loaded.model)} == {
        "hidden1": "5:2",
        "hidden2": "5:2",
        "output": "None",
    }
    assert loaded.formats() == (LNSFormat(5, 2), LNSFormat(6, 4))
    file.write_text('[[layer]]\npattern = "hiden1"\n')
    with pytest.raises(UnknownNameError, match="'hiden1'; did you mean 'hidden1'"):
        train(config_from_options(recipe=file), tmp_path / "other")
    with pytest.raises(BadValueError, match="as_float"):
        config_from_options(recipe=file, as_float=True)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"bits": 1}, BadValueError, "bits must be from 2 to 32, not 1"),
        ({"gamma": 0}, BadValueError, "gamma must be from 1"),
        ({"weights": "8"}, BadValueError, "weights: not an LNS format"),
        ({"model": "cn"}, UnknownNameError, "model 'cn'; did you mean 'cnn'"),
        ({"data": "mnits"}, UnknownNameError, "data 'mnits'; did you mean 'mnist'"),
        ({"optimizer": "adm"}, UnknownNameError, "optimizer 'adm'; did you mean 'adam'"),
        ({"schedule": "poly"}, UnknownNameError, "schedule"),
        ({"granularity": "row"}, UnknownNameError, "granularity"),
        ({"calibration": "max"}, UnknownNameError, "calibration"),
        ({"lr": 0}, BadValueError, "lr must be a number above 0, not 0"),
        ({"lr": float("nan")}, BadValueError, "lr must be a number above 0"),
        ({"lr": "fast"}, BadTypeError, "lr must be a number above 0, not 'fast'"),
        ({"epochs": 0}, BadValueError, "epochs must be from 1"),
        ({"batch_size": 0}, BadValueError, "batch_size"),
        ({"seed": -1}, BadValueError, "seed"),
        ({"threads": 0}, BadValueError, "threads"),
        ({"update_bits": 8}, BadValueError, "update_bits belongs to integer-madam"),
        ({"optimizer": "integer-madam", "update_bits": 1}, BadValueError, "update_bits must be from 2 to 32, not 1"),
        ({"as_float": 1}, BadTypeError, "as_float must be true or false"),
        ({"data_dir": 3}, BadTypeError, "data_dir must be text"),
    ],
)
def test_bad_options(options: dict[str, Any], error: type[LNSError], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(**options)
    with pytest.raises(BadFileError, match=message):
        TrainConfig.from_dict(options, where="c.toml")


def test_another_config_is_refused(run: Path) -> None:
    before = weights(run)
    with pytest.raises(BadValueError, match=r"another config: .*epochs \(2 there, 5 now\).*--restart"):
        train(quick(optimizer="integer-madam", epochs=5), run)
    with pytest.raises(BadValueError, match=r"recipe\.default\.weight \(8:8 there, 4:2 now\)"):
        train(quick(optimizer="integer-madam", bits=4, gamma=2), run)
    assert weights(run) == before
    again = train(quick(optimizer="integer-madam", epochs=1), run, restart=True)
    assert again.epochs == 1
    assert weights(run) != before


def test_a_checkpoint_of_another_config_is_refused(tmp_path: Path) -> None:
    def interrupt(epoch: int, row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    for name, seed in (("a", 0), ("b", 1)):
        with pytest.raises(KeyboardInterrupt):
            train(quick(seed=seed), tmp_path / name, progress=interrupt)
    (tmp_path / "a" / runs.CHECKPOINT).write_bytes((tmp_path / "b" / runs.CHECKPOINT).read_bytes())
    with pytest.raises(BadFileError, match=r"belongs to another config\.toml"):
        train(quick(seed=0), tmp_path / "a")
    with pytest.raises(BadFileError, match="not finished"):
        load_run(tmp_path / "b")


# ---------------------------------------------------------------------------------------------------
# Damage


def _truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def _rewrite(path: Path, change: Any) -> None:
    arrays, notes = runs.read_state(path)
    change(arrays, notes)
    runs.write_state(path, arrays, notes)


def _edit(**changes: Any):  # type: ignore[no-untyped-def]
    """A change of arrays or notes, by name; None removes."""

    def change(arrays: dict[str, Any], notes: dict[str, Any]) -> None:
        for key, value in changes.items():
            place: dict[str, Any] = notes if key in ("identity", "accuracy", "words") else arrays
            name = key.replace("__", ".")
            if value is None:
                place.pop(name)
            else:
                place[name] = value(place[name]) if callable(value) else value

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_edit(hidden1__weight=None), r"tensor 'hidden1\.weight' is missing"),
        (_edit(hidden1__weight=lambda a: a[:5]), r"'hidden1\.weight' is float32 \(5, 64\), the net needs"),
        (_edit(hidden1__bias=lambda a: a.astype(np.float64)), r"'hidden1\.bias' is float64"),
        (_edit(hidden1__bias=lambda a: a * np.nan), r"'hidden1\.bias' contains NaN"),
        (_edit(extra=np.zeros(3)), "unexpected tensor 'extra'"),
        (_edit(identity="0" * 16), r"belongs to another config\.toml"),
        (_edit(accuracy="high"), "metadata are not those of a trained net"),
        (_edit(accuracy=None), "metadata are not those of a trained net"),
        (_edit(accuracy=7), "metadata are not those of a trained net"),
        (_edit(words=[]), "metadata are not those of a trained net"),
        (_edit(words={}), "unexpected tensor 'hidden1.weight.words'"),
        (_edit(words=lambda w: w | {"hidden1.weight": 3}), r"words of 'hidden1\.weight' are damaged"),
        (_edit(words=lambda w: w | {"hidden1.bias": {}}), r"words of 'hidden1\.bias' are missing"),
        (_edit(hidden1__weight__words=lambda a: a ^ 1), r"words of 'hidden1\.weight' are not those of its values"),
        (_edit(hidden1__weight__words=lambda a: a.astype(np.uint8)), r"words of 'hidden1\.weight' are damaged"),
        (_edit(hidden1__weight__words=None), r"words of 'hidden1\.weight' are missing"),
    ],
)
def test_damaged_weights(run: Path, change: Any, message: str) -> None:
    _rewrite(run / runs.WEIGHTS, change)
    with pytest.raises(BadFileError, match=message):
        load_run(run)


def test_damaged_files(run: Path, tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match="no such folder"):
        load_run(tmp_path / "none")
    with pytest.raises(BadFileError, match=r"config\.toml is missing"):
        load_run(tmp_path)
    whole = weights(run)
    _truncate(run / runs.WEIGHTS)
    for read in (load_run, lambda folder: train(quick(optimizer="integer-madam"), folder)):
        with pytest.raises(BadFileError, match=r"weights\.safetensors"):
            read(run)
    (run / runs.WEIGHTS).write_bytes(whole)
    (run / runs.METRICS).write_text("epoch\n1\n")
    for read in (load_run, lambda folder: train(quick(optimizer="integer-madam"), folder)):
        with pytest.raises(BadFileError, match=r"metrics\.csv: the first line"):
            read(run)
    (run / runs.METRICS).write_text(",".join(runs.COLUMNS) + "\n1,2\n")
    with pytest.raises(BadFileError, match="not a table of numbers"):
        load_run(run)
    (run / runs.METRICS).write_text(",".join(runs.COLUMNS) + "\n")
    with pytest.raises(BadFileError, match="is not that of the weights"):
        train(quick(optimizer="integer-madam"), run)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[train]", "[trian]", r"the table \[train\] is missing"),
        ("digest", "digits", "dataset.digest is missing"),
        ("bits = 8", "bits = 99", "bits must be from 2 to 32, not 99"),
        ("bits = 8", "bit = 8", "unknown field 'bit'; did you mean 'bits'"),
        ("classes = 10", "classes = 1", "dataset.classes must be an integer from 2"),
        ("classes = 10", "classes = 11", "belongs to another"),
        ("seed = 0", "seed = 1", "belongs to another"),
        ('weight = "8:8"', 'weight = "8:9:9"', r"\[recipe\]: default.weight: not an LNS format"),
        ("[train]", "[train", "not valid TOML"),
    ],
)
def test_damaged_config(run: Path, old: str, new: str, message: str) -> None:
    file = run / runs.CONFIG
    text = file.read_text()
    assert old in text
    file.write_text(text.replace(old, new))
    with pytest.raises(BadFileError, match=message):
        load_run(run)


@pytest.mark.parametrize("shape", ["[0, 8, 8]", "[]", "[1, 8, 100000000]", '"8x8"'])
def test_damaged_shape(run: Path, shape: str) -> None:
    file = run / runs.CONFIG
    table = read_toml(file)
    assert table["dataset"]["shape"] == [1, 8, 8]
    start, _, rest = file.read_text().partition("shape = [")
    file.write_text(f"{start}shape = {shape}\n{rest.partition(']')[2]}")
    with pytest.raises(BadFileError, match=r"dataset\.shape must be a list of sizes"):
        load_run(run)


def test_damaged_checkpoint(tmp_path: Path) -> None:
    def interrupt(epoch: int, row: dict[str, float]) -> None:
        raise KeyboardInterrupt

    config = quick()
    with pytest.raises(KeyboardInterrupt):
        train(config, tmp_path, progress=interrupt)
    file = tmp_path / runs.CHECKPOINT
    whole = file.read_bytes()

    def damaged(change: Any, message: str) -> None:
        file.write_bytes(whole)
        _rewrite(file, change)
        with pytest.raises(BadFileError, match=message):
            train(config, tmp_path)

    damaged(lambda a, m: m.update(history=3), "damaged metadata .*--restart")
    damaged(lambda a, m: m.update(history=[{"epoch": 1}]), "damaged metadata")
    damaged(lambda a, m: m.update(history=m["history"] * 3), "3 epochs, though only 2")
    damaged(lambda a, m: m.update(optimizer=[]), "damaged metadata")
    damaged(lambda a, m: a.update({"optimizer.99.exp_avg_sq": np.zeros(3)}), "unexpected tensor")
    damaged(lambda a, m: a.update({"optimizer.0.exp_avg_sq": np.zeros(3)}), "has shape")
    damaged(lambda a, m: a.pop("optimizer.0.exp_avg_sq"), "exp_avg_sq.*--restart")
    damaged(lambda a, m: a.pop("model.hidden1.weight"), "is missing")
    arrays, _ = read_safetensors(file)
    for metadata in ({}, {"lnsdeploy": "["}, {"lnsdeploy": "3"}):
        write_safetensors(file, arrays, metadata)
        with pytest.raises(BadFileError, match="metadata are not lnsdeploy's"):
            train(config, tmp_path)
    file.write_bytes(whole[:-64])
    with pytest.raises(BadFileError, match=r"checkpoint\.safetensors"):
        train(config, tmp_path)
    train(config, tmp_path, restart=True)
    load_run(tmp_path)


def test_other_data_are_refused(run: Path) -> None:
    file = run / runs.CONFIG
    digest = load_data("digits").digest
    text = file.read_text()
    file.write_text(text.replace(digest, "0" * 16))
    identity = runs.identity_hash(read_toml(file))
    _rewrite(run / runs.WEIGHTS, _edit(identity=identity))
    with pytest.raises(BadFileError, match="was trained on other data"):
        load_run(run).dataset()


def test_unwritable_places(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(BadFileError, match="cannot create the folder"):
        train(quick(), tmp_path / "file" / "run")
    with pytest.raises(BadValueError, match="config must be a TrainConfig"):
        train({}, tmp_path / "run")  # type: ignore[arg-type]


def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    config = quick()
    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(BadFileError, match="No space left on device"):
        train(config, tmp_path / "run")
    assert not list((tmp_path / "run").iterdir())


def test_divergence_is_named(tmp_path: Path) -> None:
    with pytest.raises(BadValueError, match="diverged"):
        train(quick(optimizer="sgd", lr=1e30, as_float=True), tmp_path / "a")
    with pytest.raises(BadValueError, match="diverged"):
        train(quick(optimizer="sgd", lr=1e30), tmp_path / "b")


def test_idx_data_train_and_load(tmp_path: Path) -> None:
    import struct

    digits = load_data("digits")

    def idx(array: np.ndarray) -> bytes:
        return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()

    folder = tmp_path / "data"
    folder.mkdir()
    for part, x, y in (("train", digits.train_x, digits.train_y), ("t10k", digits.test_x, digits.test_y)):
        (folder / f"{part}-images-idx3-ubyte").write_bytes(idx(np.rint(x[:, 0] * 255).astype(np.uint8)))
        (folder / f"{part}-labels-idx1-ubyte").write_bytes(idx(y.astype(np.uint8)))
    config = quick(data="mnist", data_dir=folder, epochs=1)
    result = train(config, tmp_path / "run")
    moved = tmp_path / "moved"
    folder.rename(moved)
    loaded = load_run(tmp_path / "run")
    with pytest.raises(BadFileError, match="not found"):
        loaded.dataset()
    assert evaluate(loaded.model, loaded.dataset(moved)) == result.accuracy
    # another place of the same data is no other config
    assert train(quick(data="mnist", data_dir=moved, epochs=1), tmp_path / "run").accuracy == result.accuracy


def test_recipe_object_in_a_config() -> None:
    recipe = Recipe.uniform(4, 2)
    assert TrainConfig(recipe=recipe).full_recipe() == recipe
    with pytest.raises(BadTypeError, match="recipe must be a Recipe"):
        TrainConfig(recipe="4:2")  # type: ignore[arg-type]
