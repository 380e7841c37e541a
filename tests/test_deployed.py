"""What a net trained through a datapath is exported as: the very words of its last evaluation."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from lnsdeploy.cli import cli
from lnsdeploy.emulator.artifact import load_artifact
from lnsdeploy.emulator.executor import fastest, get_executor
from lnsdeploy.emulator.session import emulate
from lnsdeploy.errors import BadFileError
from lnsdeploy.exporters.export import lower_run
from lnsdeploy.training import run as runs
from lnsdeploy.training.run import digest_of_words, load_run
from lnsdeploy.training.trainer import config_from_options, train

torch.set_num_threads(1)
# made twice, the trainings below would cost more than everything else here
pytestmark = pytest.mark.xdist_group("deployed")

# A chain with folded norms into a log accumulator, and a residual net whose sums and averages are in LNS as well.
NETS: dict[str, dict[str, Any]] = {
    "norms": {"model": "cnn-large", "model_settings": {"width": 4}, "datapath": "gauss-8"},
    "residual": {"model": "cnn", "datapath": "mitchell-8", "bits": 6, "gamma": 4},
}


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("deployed")
    for name, options in NETS.items():
        train(config_from_options(emulate="forward", epochs=1, limit=240, batch_size=48, **options), folder / name)
    return folder


@pytest.mark.parametrize("name", NETS)
def test_the_export_has_the_words_of_the_last_evaluation(trained: Path, tmp_path: Path, name: str) -> None:
    folder = trained / name
    run = load_run(folder)
    assert run.deployed is not None
    # without options, and with the datapath named: the file of the run, to the byte
    for more in ([], ["--datapath", NETS[name]["datapath"]]):
        done = CliRunner().invoke(cli, ["export", str(folder), "-o", str(tmp_path / "m.onnx"), "--json", *more])
        assert done.exit_code == 0, done.output
        assert (tmp_path / "m.onnx").read_bytes() == (folder / runs.DEPLOYED).read_bytes()
    assert json.loads(done.stdout)["datapath"]["name"].split("@")[0] == NETS[name]["datapath"]
    data = run.dataset()
    artifact = load_artifact(tmp_path / "m.onnx")
    found = emulate(artifact, get_executor(fastest()), data.test_x, data.test_y)
    assert digest_of_words(found.words) == run.deployed.words
    assert found.accuracy == run.deployed.accuracy
    # and the reference, whose digest could only be that of other words
    few = get_executor("reference").run(artifact, data.test_x[:6])
    np.testing.assert_array_equal(few, found.words[:6])
    assert digest_of_words(found.words[::-1]) != run.deployed.words
    # placed on other inputs it is another net
    assert lower_run(folder, sample=8).artifact().data != artifact.data
    assert train(run.config, folder).deployed == run.deployed.accuracy


def test_another_net_in_the_place_of_the_deployed_one_is_refused(trained: Path, tmp_path: Path) -> None:
    shutil.copytree(trained / "norms", tmp_path / "run")
    shutil.copy(trained / "residual" / runs.DEPLOYED, tmp_path / "run" / runs.DEPLOYED)
    with pytest.raises(BadFileError, match=r"deployed\.onnx: is not the net of the weights beside it"):
        lower_run(tmp_path / "run")
    (tmp_path / "run" / runs.DEPLOYED).unlink()
    with pytest.raises(BadFileError, match=r"deployed\.onnx"):
        lower_run(tmp_path / "run")
    # another arithmetic needs no such file
    assert lower_run(tmp_path / "run", datapath="elma-8").lowered.graph.datapath.name == "elma-8"


def test_damaged_notes_are_refused(trained: Path) -> None:
    file = trained / "norms" / runs.WEIGHTS
    _, notes = runs.read_state(file)
    assert runs.Deployed.from_notes({}, file) is None
    assert runs.Deployed.from_notes({"deployed": {"why": "no LNS form"}}, file) is None
    good = notes["deployed"]
    for bad in (1, {**good, "accuracy": 2}, {**good, "more": 1}, {**good, "words": 3}):
        with pytest.raises(BadFileError, match="damaged metadata"):
            runs.Deployed.from_notes({"deployed": bad}, file)


def test_a_net_without_an_lns_form_says_so(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("the quick brown fox jumps over the lazy dog\n" * 20)
    config = config_from_options(
        data=f"text:{tmp_path / 'text'}", model="transformer", model_settings={"depth": 1, "width": 8, "heads": 1},
        context=8, limit=8, batch_size=8, epochs=1, emulate="forward", datapath="lns-madam-8",
    )  # fmt: skip
    result = train(config, tmp_path / "run")
    assert result.deployed is None
    _, notes = runs.read_state(tmp_path / "run" / runs.WEIGHTS)
    assert "text" in notes["deployed"]["why"]
    assert not (tmp_path / "run" / runs.DEPLOYED).exists()
    assert load_run(tmp_path / "run").deployed is None


def test_weights_encoded_again_in_training_are_those_of_deployment_but_for_a_factor_a_channel(trained: Path) -> None:
    """A layer with a folded norm trains on quantized(w·s)/s: off the grid, but all of a channel by one and the same
    fraction of a code, so that an emulation encodes the codes of deployment again, up to a number for each channel."""
    from lnsdeploy.formats import calibrate, encode
    from lnsdeploy.training.layers import lns_layers, norm_scale

    seen = 0
    for name, layer in lns_layers(load_run(trained / "norms").model):
        if layer.norm is None:
            continue
        deployed = layer.weight_words()
        scale = norm_scale(layer.norm).detach()
        shape = (-1, *[1] * (deployed.words.ndim - 1))
        values = deployed.decode() / scale.numpy().reshape(shape)
        offset = calibrate(values, deployed.format, axis=0)
        again = encode(values, deployed.format, offset, axis=0, name=name)
        mask = deployed.format.max_code
        ours, theirs = (words.astype(np.int64) & mask for words in (deployed.words, again))
        kept = (ours > 0) & (theirs > 0) & (theirs < mask)
        moved = (theirs - ours).reshape(len(ours), -1)
        for channel, there in zip(moved, kept.reshape(len(ours), -1), strict=True):
            assert np.ptp(channel[there]) == 0
            seen += int(there.sum())
    assert seen > 100
