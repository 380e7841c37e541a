"""Whole models under emulation: what is measured, and that many processes find what one finds."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

import lnsdeploy
from lnsdeploy.errors import BadFileError, BadValueError, OtherProcessError, SilentExit, UnknownNameError
from lnsdeploy.evaluation import run as running
from lnsdeploy.evaluation import shards as sharding
from lnsdeploy.evaluation.models import load_model
from lnsdeploy.evaluation.run import Request, Scores, run
from lnsdeploy.evaluation.samples import Batch
from lnsdeploy.evaluation.shards import Shards, processes
from tests.shard_worker import request
from tests.test_cifar import write as write_cifar
from tests.test_samples import photographs

HERE = Path(__file__).parent
MODELS = HERE / "small_models.py"

RECORDED = """
[default]
weight = "8:8"
activation = "8:8"
offsets = "recorded"

[[layer]]
position = "last"
weight = "float"
activation = "float"
"""


def small(name: str) -> str:
    return f"{MODELS}:{name}"


def same(result: dict) -> dict:
    """Without what may differ: times, and the number of processes."""
    if isinstance(result, dict):
        return {k: same(v) for k, v in result.items() if not k.endswith("seconds") and k != "processes"}
    return [same(v) for v in result] if isinstance(result, list) else result


# ---------------------------------------------------------------------------------------------------
# One process


def test_figures_are_those_of_plain_torch() -> None:
    """Agreement, accuracy, loss and SQNR, once more from the outputs; counters are those of plain `emulate`."""
    found = run(Request(small("cnn"), data="digits", limit=20, batch=8, seed=3)).to_dict()
    model = load_model(small("cnn"), seed=3)
    from lnsdeploy.training.data import load_data

    images, labels = (torch.tensor(a[:20]) for a in (load_data("digits").test_x, load_data("digits").test_y))
    images = (images * 255).round().expand(-1, 3, -1, -1) / 255
    with torch.no_grad():
        plain = torch.cat([model.module(images[i : i + 8]) for i in (0, 8, 16)])
        seen = lnsdeploy.emulate("lns-madam-8", model=model.module)
        with seen:
            lns = torch.cat([model.module(images[i : i + 8]) for i in (0, 8, 16)])
    assert not torch.equal(plain, lns)
    assert found["samples"] == 20
    assert found["agreement"] == pytest.approx(float((plain.argmax(1) == lns.argmax(1)).float().mean()))
    assert found["accuracy"] == pytest.approx(float((lns.argmax(1) == labels).float().mean()))
    assert found["float32_accuracy"] == pytest.approx(float((plain.argmax(1) == labels).float().mean()))
    noise = (plain.double() - lns.double()).square().sum() / plain.double().square().sum()
    assert found["logits_sqnr_db"] == pytest.approx(-10 * math.log10(float(noise)), abs=1e-9)
    for name, scores in (("loss", lns), ("float32_loss", plain)):
        assert found[name] == pytest.approx(
            float(torch.nn.functional.cross_entropy(scores.double(), labels)), abs=1e-12
        )
    assert found["macs"] == seen.macs == sum(layer["macs"] for layer in found["layers"])
    assert same(found["layers"]) == same(seen.to_dict()["layers"])
    assert found["not_emulated"] == {}
    assert found["seconds"] > 0
    assert found["datapath"]["name"] == "lns-madam-8"
    assert (found["weights"], found["data"]) == ("own", "digits")
    assert json.loads(json.dumps(found, allow_nan=False)) == found


def test_language_models() -> None:
    found = run(Request(small("decoder"), limit=3, batch=2, datapath="gauss-8")).to_dict()
    assert found["task"] == "next-token"
    assert found["perplexity"] == math.exp(found["loss"])
    assert found["float32_perplexity"] == math.exp(found["float32_loss"])
    # every token is a place
    assert 0 <= found["agreement"] <= 1
    assert found["agreement"] * 36 == pytest.approx(round(found["agreement"] * 36))
    assert {layer["name"] for layer in found["layers"]} >= {"query", "key", "value", "head"}
    guessing = run(Request(small("masked"), limit=3)).to_dict()
    assert guessing["task"] == "masked-token"
    assert guessing["loss"] is not None


def test_classes_of_others_are_no_labels(tmp_path: Path) -> None:
    """Also where the number of classes is known only when the model runs."""
    write_cifar(tmp_path, "cifar-100-binary", 4)
    found = run(Request(small("cnn"), data="cifar100", data_dir=tmp_path)).to_dict()
    assert found["labels_note"] == "cifar100 has 100 classes, the model 10"
    assert (found["accuracy"], found["loss"]) == (None, None)
    assert found["agreement"] is not None


def test_backward_pass() -> None:
    """The gradients' SQNR is that of the emulated products of the backward pass; without, there is none."""
    found = run(Request(small("cnn"), data="digits", limit=8, batch=4, backward=True)).to_dict()
    assert 5 < found["gradients_sqnr_db"] < 60
    ops = {layer["op"] for layer in found["layers"]}
    assert any(op.endswith("grad") for op in ops)
    plain = run(Request(small("cnn"), data="digits", limit=8, batch=4)).to_dict()
    assert "gradients_sqnr_db" not in plain
    assert not any(layer["op"].endswith("grad") for layer in plain["layers"])
    assert found["loss"] == plain["loss"]
    assert run(Request(small("recurrent"), limit=2, backward=True)).to_dict()["gradients_sqnr_db"] is not None


def test_recipe_and_datapath(tmp_path: Path) -> None:
    """A recipe's layers that name no datapath have the one that is named beside it; those in float stay so."""
    (tmp_path / "r.toml").write_text(RECORDED)
    found = run(
        Request(small("cnn"), data="digits", limit=4, recipe=tmp_path / "r.toml", datapath="mitchell-8")
    ).to_dict()
    assert {layer["datapath"] for layer in found["layers"]} == {"mitchell-8"}
    assert list(found["left_float"]) == ["8"]
    assert found["float_macs"] == 4 * 160
    assert found["datapath"] is None
    assert found["recipe"]["default"]["offsets"] == "recorded"
    alone = run(Request(small("cnn"), data="digits", limit=4, recipe=tmp_path / "r.toml")).to_dict()
    assert {layer["datapath"] for layer in alone["layers"]} != {"mitchell-8"}


def test_everything_in_float_is_exact(tmp_path: Path) -> None:
    (tmp_path / "r.toml").write_text('[default]\nweight = "float"\nactivation = "float"\n')
    result = run(Request(small("cnn"), data="digits", limit=4, recipe=tmp_path / "r.toml"))
    found = result.to_dict()
    assert (found["macs"], found["agreement"], found["layers"]) == (0, 1.0, [])
    assert found["float_macs"] == 4 * 16288
    # the products are torch's own, in another order of adding at most
    assert found["logits_sqnr_db"] is None or found["logits_sqnr_db"] > 100


def test_text_says_what_is_random_and_synthetic() -> None:
    text = run(Request(small("module"), limit=2, weights="random")).text()
    assert "RANDOM WEIGHTS random (seed 0)" in text
    assert "synthetic" in text
    text = run(Request(small("decoder"), limit=2, weights="random")).text()
    assert "(of random weights)" in text
    assert "perplexity" in text


def test_threads_of_torch_are_as_before() -> None:
    before = torch.get_num_threads()
    run(Request(small("module"), limit=2, threads=2))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"source": small("infinite")}, BadValueError, "returns numbers that are not finite in float32 already"),
        ({"source": small("detector")}, Exception, "without a tensor of scores"),
        ({"source": small("sized_cnn"), "image_size": 2}, BadValueError, r"does not take inputs \(16, 3, 2, 2\): "),
        ({"source": small("cnn"), "image_size": 8, "datapath": "nothing"}, UnknownNameError, "nothing"),
        ({"source": small("cnn"), "image_size": 8, "executor": "cpus"}, UnknownNameError, "did you mean 'cpu'"),
        ({"source": small("cnn"), "image_size": 8, "device": "cuda:99"}, BadValueError, "cuda:99: "),
        ({"source": small("cnn"), "image_size": 8, "device": "gpu"}, BadValueError, "device must be cpu, cuda"),
        ({"source": small("cnn"), "image_size": 8, "recipe": Path("no.toml")}, BadFileError, r"cannot read no\.toml"),
        ({"source": small("digits_mlp"), "data": "digits", "settings": {"a": 1}}, BadValueError, "raised TypeError"),
    ],
)
def test_refusals(options: dict, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        run(Request(**options))


def test_settings_are_json_or_text() -> None:
    made = Request.from_options(
        "m:f", settings=("a=1", "b=x", "c=true", "d=[1, 2]", "e=", "f=a=b"), batch=None, other=3
    )
    assert made.settings == {"a": 1, "b": "x", "c": True, "d": [1, 2], "e": "", "f": "a=b"}
    assert made.batch is None
    for text in ("a", "=1", "a b=1"):
        with pytest.raises(BadValueError, match="a setting is KEY=VALUE"):
            Request.from_options("m:f", settings=(text,))


def test_labels_that_do_not_fit() -> None:
    model = load_model(small("digits_mlp"))
    batch = Batch(torch.zeros(1, 4), torch.tensor([3]))
    with pytest.raises(BadValueError, match="scores of 3 classes at 1 places a sample"):
        Scores().count(model, batch, torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(BadValueError, match=r"in float32 and .* in LNS"):
        Scores().count(model, batch, torch.zeros(1, 3), torch.zeros(1, 4))


def test_frozen_weights_are_packed_once_and_counters_can_begin_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Frozen or not, weights that were changed are packed again."""
    from lnsdeploy.emulator import mode

    packed = []
    encode = mode.encode_weights
    monkeypatch.setattr(mode, "encode_weights", lambda *args: packed.append(args[2]) or encode(*args))
    module = torch.nn.Linear(4, 4)
    seen = lnsdeploy.emulate("lns-madam-8", model=module)
    x = torch.ones(2, 4)

    def run_once() -> None:
        with torch.no_grad(), seen:
            module(x)

    run_once()
    run_once()
    record = seen.report()[0]
    assert (record.calls, len(packed)) == (2, 2)
    seen.frozen = True
    seen.forget()
    counted = (record.calls, record.macs, record.words, record.sqnr_db, record.inputs.total, record.outputs.total)
    assert counted == (0, 0, 0, None, 0, 0)
    # words of a parameter are no count: they are what is packed
    assert record.weights.total == 16
    run_once()
    assert (record.calls, record.macs, record.outputs.total, len(packed)) == (1, 32, 8, 2)
    with torch.no_grad():
        module.weight.mul_(2)
    run_once()
    assert len(packed) == 3
    assert seen.report()[0] is record


def test_sums_are_exact() -> None:
    """In whatever order and grouping batches are added, the sums are the same."""
    model = load_model(small("digits_mlp"))
    generator = torch.Generator().manual_seed(0)
    parts = []
    for scale in (1e-18, 1.0, 1e18, 3e-7, 1e5):
        one = Scores()
        plain = scale * torch.randn(3, 4, generator=generator)
        one.count(model, Batch(plain, torch.tensor([0, 1, 2])), plain, plain * 1.01)
        parts.append(one)
    orders = []
    for order in ((0, 1, 2, 3, 4), (4, 2, 0, 3, 1)):
        total = Scores()
        for number in order:
            total.merge(parts[number])
        orders.append(total)
    left, right = Scores(), Scores()
    for number in (0, 1):
        left.merge(parts[number])
    for number in (2, 3, 4):
        right.merge(parts[number])
    left.merge(right)
    assert orders[0] == orders[1] == left
    assert left.samples == 15
    assert isinstance(left.noise, Fraction)
    assert left.noise > 0


# ---------------------------------------------------------------------------------------------------
# Processes


def launch(arguments: list, expect: int | None = 0, **environment: str) -> subprocess.CompletedProcess:
    """Two processes of torchrun's."""
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=HERE.parent,
        timeout=1200,
        env=os.environ | {"OMP_NUM_THREADS": "1"} | environment,
    )
    if expect is not None:
        assert done.returncode == expect, done.stderr
    return done


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    """Every kind of model and data; batches that do not divide evenly, fewer batches than processes."""
    write_cifar(tmp_path / "cifar", "cifar-10-batches-bin", 11)
    photographs(tmp_path / "photos", ("ant", "bee", "cat"), count=2)
    (tmp_path / "r.toml").write_text(RECORDED)
    (tmp_path / "t.txt").write_bytes(bytes(np.random.default_rng(0).integers(0, 256, 200, dtype=np.uint8)))
    requests = [
        {"source": small("cnn"), "data": "cifar10", "data_dir": str(tmp_path / "cifar"), "batch": 2},
        {"source": small("cnn"), "data": "digits", "limit": 7, "batch": 3, "recipe": str(tmp_path / "r.toml")},
        {"source": small("sized_cnn"), "data": "folder", "data_dir": str(tmp_path / "photos"), "batch": 1},
        {
            "source": small("decoder"),
            "data": "text",
            "data_dir": str(tmp_path / "t.txt"),
            "batch": 5,
            "datapath": "gauss-8",
        },
        {"source": small("masked"), "limit": 3, "batch": 1},
        {"source": small("recurrent"), "limit": 5, "batch": 2},
        {
            "source": small("cnn"),
            "image_size": 12,
            "limit": 5,
            "batch": 2,
            "backward": True,
            "weights": "random",
            "seed": 7,
        },
        {"source": small("digits_mlp"), "data": "digits", "limit": 3, "batch": 5},
    ]
    (tmp_path / "in.json").write_text(json.dumps(requests))
    launch([HERE / "shard_worker.py", tmp_path / "in.json", tmp_path / "out.json"], PYTHONPATH=str(HERE.parent))
    made = json.loads((tmp_path / "out.json").read_text())
    assert len(made) == len(requests)
    for options, sharded in zip(requests, made, strict=True):
        alone = json.loads(json.dumps(run(request(options)).to_dict()))
        assert sharded["processes"] == 2
        assert alone["processes"] == 1
        assert same(sharded) == same(alone)
        assert alone["macs"] > 0


def test_torchrun_of_the_command_line(tmp_path: Path) -> None:
    """Exactly one object on standard output, from the first process; its figures are those of one process."""
    options = ["emulate", small("cnn"), "--data", "digits", "--limit", "10", "--batch", "3", "--json"]
    sharded = launch(["-m", "lnsdeploy", *options])
    alone = run(Request(small("cnn"), data="digits", limit=10, batch=3)).to_dict()
    assert same(json.loads(sharded.stdout)) == same(json.loads(json.dumps(alone)))
    assert len(sharded.stdout.strip().splitlines()) == 1


@pytest.mark.parametrize("way", ["raise", "kill"])
def test_a_process_that_fails_ends_all(way: str) -> None:
    """One line, not from every process; and nobody waits for the dead, or the launch would never end."""
    done = launch(
        ["-m", "lnsdeploy", "emulate", small("failing"), "--limit", "40", "--batch", "1"],
        expect=None,
        FAIL_IN="1",
        FAIL_BY=way,
    )
    assert done.returncode != 0
    assert done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("lnsdeploy: ")]
    if way == "raise":
        assert len(lines) == 1, done.stderr
        assert "process 1 of 2: " in lines[0]
        assert "does not take inputs (1, 4): out of luck in two lines" in lines[0]
    else:
        # torchrun itself may be faster to end the other than that one to notice
        assert len(lines) <= 1, done.stderr
        assert all("another process ended before its time" in line for line in lines)
        assert "Signal 9" in done.stderr


def test_shares() -> None:
    for world in (1, 2, 3, 7):
        owned = [list(Shards(rank, world).own(10)) for rank in range(world)]
        assert sorted(number for share in owned for number in share) == list(range(10))
        assert owned[0][0] == 0
    assert Shards().gather("a") == ["a"]
    assert Shards().broadcast("a") == "a"


def test_what_others_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first process speaks, others are silent; an error that nobody foresaw keeps its traceback."""
    first, second = Shards(0, 2), Shards(1, 2)

    def tells(texts):
        monkeypatch.setattr(Shards, "_exchange", lambda self, value: texts)

    monkeypatch.setattr(Shards, "_await_first", lambda self: None)

    def bad() -> None:
        raise BadValueError("mine")

    def unforeseen() -> None:
        raise ZeroDivisionError("oh")

    tells([None, None])
    assert first.together(lambda: 3) == 3
    tells([None, "theirs"])
    with pytest.raises(OtherProcessError, match="process 1 of 2: theirs"):
        first.together(lambda: 3)
    tells(["mine", None])
    with pytest.raises(BadValueError, match="mine"):
        first.together(bad)
    with pytest.raises(SilentExit):
        second.together(lambda: 3)
    with pytest.raises(SilentExit):
        second.together(bad)
    with pytest.raises(ZeroDivisionError):
        second.together(unforeseen)


def test_cores_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LNSDEPLOY_THREADS", raising=False)
    monkeypatch.setattr(sharding.os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)
    with sharding.share_cores(Shards(0, 6, 0, 3)):
        assert os.environ["LNSDEPLOY_THREADS"] == "2"
    assert "LNSDEPLOY_THREADS" not in os.environ
    monkeypatch.setenv("LNSDEPLOY_THREADS", "5")
    with sharding.share_cores(Shards(0, 2, 0, 2)):
        assert os.environ["LNSDEPLOY_THREADS"] == "5"


def test_gpus_are_shared(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process of a machine takes a device of its own, unless one is named."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert [sharding.device_of("cuda", Shards(r, 4, r % 2, 2)).index for r in range(4)] == [0, 1, 0, 1]
    assert sharding.device_of("auto", Shards()).type == "cuda"
    assert sharding.device_of("cuda:1", Shards()).index == 1
    assert len(chosen) == 6
    with pytest.raises(BadValueError, match="there are 2 GPUs, counted from 0"):
        sharding.device_of("cuda:2", Shards())


def test_an_environment_that_is_not_torchruns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "x")
    with (
        pytest.raises(BadValueError, match="RANK must be a number, not 'x': start processes with torchrun"),
        processes(),
    ):
        pass
    monkeypatch.delenv("RANK")
    with processes() as shards:
        assert shards == Shards()


def test_weights_that_differ_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """A file that is another on another machine is noticed."""
    second = Shards(1, 2)
    monkeypatch.setattr(Shards, "_exchange", lambda self, value: [None, value])
    monkeypatch.setattr(Shards, "_await_first", lambda self: None)
    told = iter([("own", "note"), "another digest"])
    monkeypatch.setattr(Shards, "broadcast", lambda self, value: next(told))
    with pytest.raises(SilentExit) as caught:
        running.load_together(second, small("module"), weights=None)
    assert "has other weights here than in the first process" in str(caught.value.__cause__)
