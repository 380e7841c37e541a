"""Any float net to an LNS ONNX model: reading, calibration, widths, fidelity, and what is refused."""

from __future__ import annotations

import json

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

import lnsdeploy
from examples import torch_to_lns
from lnsdeploy.cli import _run
from lnsdeploy.emulator import artifact as artifacts
from lnsdeploy.emulator.compare import compare
from lnsdeploy.emulator.executor import get_executor
from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, CheckFailedError, LNSError, UnsupportedError
from lnsdeploy.exporters.calibration import FloatNet, Inputs, Statistics, collect, load_inputs
from lnsdeploy.exporters.command import parse_budget, parse_widths
from lnsdeploy.exporters.convert import ExportOptions, export, stored_bytes
from lnsdeploy.exporters.isolated import read_source
from lnsdeploy.exporters.mixed import greedy, layers_of
from lnsdeploy.exporters.source import OPSET, ReadOptions, normalise, parse_shape, read_model
from lnsdeploy.formats import LNSFormat, calibrate, decode, encode
from lnsdeploy.recipe import load_recipe
from tests.fuzz_export import fuzz, small_model


def net(kind=2):
    """A small net whose weights are fit to measure with."""
    return small_model(kind)


@pytest.fixture
def images():
    return np.random.default_rng(0).normal(size=(24, 3, 8, 8)).astype(np.float32)


def run_float(model, x):
    session = onnx.ModelProto()
    session.CopyFrom(model)
    return FloatNet(session).run(x)


# ---------------------------------------------------------------------------------------------------------------------
# Reading


@pytest.mark.parametrize("kind", range(12))
def test_normal_form_keeps_what_the_net_computes(kind):
    model = net(kind)
    shape = (3, 12) if kind % 2 else (3, 3, 8, 8)
    x = np.random.default_rng(kind).normal(size=shape).astype(np.float32)
    wanted = run_float(model, x)
    source = normalise(model, ReadOptions(), "small")
    assert source.input_shape == (0, *shape[1:])
    assert [o.version for o in source.model.opset_import if o.domain == ""] == [OPSET]
    assert len({node.name for node in source.model.graph.node}) == len(source.model.graph.node)
    np.testing.assert_allclose(run_float(source.model, x), wanted, rtol=1e-4, atol=1e-5)


def one_layer(weight, opset=21, shape=("batch", 4), kind=TensorProto.FLOAT):
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", kind, shape)],
        [helper.make_tensor_value_info("y", kind, None)],
        [weight],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


@pytest.mark.parametrize("kind", [TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16])
def test_other_widths_are_read_as_float32(kind):
    values = np.array([[0.5, -1.25], [3.0, 0.0], [1.0, 2.0], [0.25, 8.0]], dtype=np.float32)
    weight = helper.make_tensor("w", kind, [4, 2], values.reshape(-1))
    source = normalise(one_layer(weight, kind=kind), ReadOptions(), "net")
    assert source.float_bytes == 8 * (8 if kind == TensorProto.DOUBLE else 2)
    assert "read as float32" in source.notes[0]
    x = np.eye(4, dtype=np.float32)
    np.testing.assert_array_equal(run_float(source.model, x), values)


@pytest.mark.parametrize("opset", [7, 8, 9, 11, 13, 18, 21])
def test_opsets(opset):
    weight = numpy_helper.from_array(np.ones((4, 2), dtype=np.float32), "w")
    source = normalise(one_layer(weight, opset), ReadOptions(), "net")
    assert source.model.opset_import[0].version == OPSET


@pytest.mark.parametrize(("opset", "word"), [(6, "7 or later"), (99, "pip install -U onnx")])
def test_opsets_that_are_not_read(opset, word):
    weight = numpy_helper.from_array(np.ones((4, 2), dtype=np.float32), "w")
    with pytest.raises(UnsupportedError, match=word):
        normalise(one_layer(weight, opset), ReadOptions(), "net")


def test_a_batch_of_one_is_freed():
    model = net(2)
    model.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 1
    shape = next(t for t in model.graph.initializer if t.name == "shape")
    shape.CopyFrom(numpy_helper.from_array(np.array([1, 8]), "shape"))
    source = normalise(model, ReadOptions(), "net")
    assert "freed" in source.notes[0]
    x = np.random.default_rng(1).normal(size=(5, 3, 8, 8)).astype(np.float32)
    np.testing.assert_allclose(run_float(source.model, x), run_float(net(2), x), rtol=1e-4, atol=1e-5)


def test_open_sizes_are_asked_for():
    model = net(2)
    for index in (2, 3):
        model.graph.input[0].type.tensor_type.shape.dim[index].dim_param = "size"
    with pytest.raises(BadValueError, match=r"\[\?, 3, \?, \?\].*--input-shape"):
        normalise(onnx.ModelProto.FromString(model.SerializeToString()), ReadOptions(), "net")
    with pytest.raises(BadValueError, match="not"):
        normalise(onnx.ModelProto.FromString(model.SerializeToString()), ReadOptions((1, 4, 8, 8)), "net")
    assert normalise(model, ReadOptions((1, 3, 10, 10)), "net").input_shape == (0, 3, 10, 10)
    assert parse_shape("1,3,224,224") == (1, 3, 224, 224)
    for text in ("", "3", "1,x", "0,2", "1,-2"):
        with pytest.raises(BadValueError):
            parse_shape(text)


def test_outputs_and_inputs():
    model = net(2)
    model.graph.output.append(helper.make_tensor_value_info("t1", TensorProto.FLOAT, None))
    with pytest.raises(UnsupportedError, match="--model-output NAME"):
        normalise(onnx.ModelProto.FromString(model.SerializeToString()), ReadOptions(), "net")
    assert normalise(model, ReadOptions(output="t1"), "net").model.graph.output[0].name == "t1"
    two = net(1)
    two.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, ["batch", 8]))
    two.graph.node[1].op_type = "Add"
    two.graph.node[1].input.append("other")
    with pytest.raises(UnsupportedError, match="'x', 'other'"):
        normalise(two, ReadOptions(), "net")


def test_nodes_out_of_order_are_sorted():
    model = net(1)
    nodes = [onnx.NodeProto.FromString(n.SerializeToString()) for n in reversed(model.graph.node)]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
    x = np.ones((2, 12), dtype=np.float32)
    np.testing.assert_allclose(
        run_float(normalise(model, ReadOptions(), "net").model, x), run_float(net(1), x), rtol=1e-5
    )


# ---------------------------------------------------------------------------------------------------------------------
# What is refused


def hostile(how):
    """A model that must be refused, and a word of the line that says so."""
    model = net(2)
    node, first = model.graph.node, model.graph.initializer[0]
    if how == "cycle":
        node[0].input[0] = node[-1].output[0]
        return model, "cycle"
    if how == "missing initializer":
        del model.graph.initializer[0]
        return model, "neither a node nor an initializer"
    if how == "enormous":
        first.dims[0] = 1 << 40
        return model, "impossible shape"
    if how == "negative":
        first.dims[0] = -1
        return model, "impossible shape"
    if how == "lying":
        first.raw_data = first.raw_data[:-1]
        return model, "asks for"
    if how == "enormous input":
        model.graph.input[0].type.tensor_type.shape.dim[3].dim_value = 1 << 40
        return model, "impossible shape"
    if how == "enormous constant":
        model.graph.initializer.append(numpy_helper.from_array(np.array([1 << 20, 1 << 20]), "huge"))
        node.append(helper.make_node("ConstantOfShape", ["huge"], ["made"], name="maker"))
        node.append(helper.make_node("ReduceMax", ["made"], ["largest"]))
        node.append(helper.make_node("Add", [model.graph.output[0].name, "largest"], ["end"]))
        model.graph.output[0].name = "end"
        return model, "impossible shape"
    if how == "quantized":
        node[1].op_type = "QuantizeLinear"
        return model, "quantized model"
    if how == "other domain":
        node[1].domain = "com.microsoft"
        return model, "no ONNX operator"
    if how == "twice":
        node[1].output[0] = node[0].output[0]
        return model, "second time"
    if how == "text":
        model.graph.input[0].type.tensor_type.elem_type = TensorProto.INT64
        return model, "int64"
    assert how == "wrong weights"
    first.dims[:] = [3, 4, 3, 3]
    return model, "shapes"


HOSTILE = (
    "cycle", "missing initializer", "enormous", "negative", "lying", "enormous input", "enormous constant", "quantized",
    "other domain", "twice", "text", "wrong weights",
)  # fmt: skip


@pytest.mark.parametrize("how", HOSTILE)
def test_hostile_models_are_refused(how):
    model, word = hostile(how)
    with pytest.raises(LNSError, match=word):
        normalise(model, ReadOptions(), "net")


@pytest.mark.parametrize("data", [b"", b"not onnx at all", net(2).SerializeToString()[:-200]])
def test_files_that_are_no_models(data, tmp_path):
    file = tmp_path / "m.onnx"
    file.write_bytes(data)
    with pytest.raises(BadFileError, match=r"m\.onnx: (truncated|not an ONNX|tensor|does not say)"):
        read_model(file)


def test_a_crash_or_a_hang_of_the_child_is_one_line(tmp_path, monkeypatch):
    file = tmp_path / "m.onnx"
    onnx.save(net(2), file)
    with pytest.raises(BadFileError, match="given up"):
        read_source(file, seconds=0.01)
    import lnsdeploy.exporters.isolated as isolated

    monkeypatch.setattr(isolated, "BASE_MEMORY", 64 << 20)
    monkeypatch.setattr(isolated, "MEMORY_PER_BYTE", 0)
    with pytest.raises(BadFileError, match=r"m\.onnx"):
        read_source(file)


def external(tmp_path, location, **fields):
    folder = tmp_path / "model"
    folder.mkdir(exist_ok=True)
    weight = np.arange(8, dtype=np.float32)
    (tmp_path / "secret").write_bytes(weight.tobytes())
    (folder / "inside").write_bytes(weight.tobytes())
    link = folder / "link"
    if not link.is_symlink():
        link.symlink_to(tmp_path / "secret")
        (folder / "good").symlink_to(folder / "inside")
    tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[4, 2], data_location=TensorProto.EXTERNAL)
    for key, value in {"location": location, **fields}.items():
        tensor.external_data.add(key=key, value=value)
    file = folder / "m.onnx"
    file.write_bytes(one_layer(tensor).SerializeToString())
    return file


@pytest.mark.parametrize("location", ["inside", "good"])
def test_external_data_inside_of_the_folder(location, tmp_path):
    model = read_model(external(tmp_path, location))
    np.testing.assert_array_equal(numpy_helper.to_array(model.graph.initializer[0]).reshape(-1), np.arange(8))


@pytest.mark.parametrize(
    ("location", "fields", "word"),
    [
        ("../secret", {}, "outside"),
        ("a/../../secret", {}, "outside"),
        ("/etc/passwd", {}, "outside"),
        ("..\\secret", {}, "outside"),
        ("link", {}, "leads out"),
        ("nowhere", {}, "not there"),
        ("inside", {"offset": "4"}, "cannot be"),
        ("inside", {"offset": "-4"}, "cannot be"),
        ("inside", {"length": "4"}, "cannot be"),
        ("inside", {"length": "many"}, "no number"),
        ("", {}, "outside"),
    ],
)
def test_external_data_that_are_refused(location, fields, word, tmp_path):
    with pytest.raises(BadFileError, match=word):
        read_model(external(tmp_path, location, **fields))


def test_mutated_files_end_without_a_crash():
    """A slice of `python tests/fuzz_export.py`, small nets alone."""
    summary = fuzz(40, seed=1000, jobs=1, light=False, here=True)
    assert not summary.failures, summary.failures
    assert sum(summary.outcomes.values()) == 40
    assert min(summary.outcomes.values()) > 0, "seeds that are all refused test reading alone"


# ---------------------------------------------------------------------------------------------------------------------
# Calibration


@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=60),
    st.sampled_from([LNSFormat(8, 8), LNSFormat(4, 2), LNSFormat(16, 1024), LNSFormat(6, 4), LNSFormat(8, 8, False)]),
)
@settings(max_examples=60, deadline=None)
def test_absmax_of_streamed_batches_is_that_of_all(values, fmt):
    array = np.array(values, dtype=np.float32)
    statistics = Statistics()
    for part in np.array_split(array, 3):
        statistics.add(part)
    assert statistics.offset(fmt) == calibrate(array, fmt)
    assert statistics.total == array.size
    assert statistics.counts.sum() == array.size


@pytest.mark.parametrize("method", ["percentile", "lsq"])
@pytest.mark.parametrize("fmt", [LNSFormat(8, 8), LNSFormat(4, 2), LNSFormat(6, 4)])
@pytest.mark.parametrize("spread", [0.5, 2.0])
def test_histogram_chooses_as_the_numbers_themselves(method, fmt, spread):
    """Bins are a quarter of a code at γ 8: the choice is the same, or a neighbour of the same error."""
    rng = np.random.default_rng(3)
    values = (rng.choice([-1, 1], 20_000) * np.exp(rng.normal(size=20_000) * spread)).astype(np.float32)
    statistics = Statistics()
    for part in np.array_split(values, 7):
        statistics.add(part)
    got = statistics.offset(fmt, method, 99.0)
    wanted = int(calibrate(values, fmt, method=method, percentile=99.0))
    if method == "percentile":
        assert abs(got - wanted) <= 1
        return

    def error(offset):
        return float(np.square(decode(encode(values, fmt, offset), fmt, offset, np.float64) - values).sum())

    assert error(got) <= 1.02 * error(wanted)


def test_statistics_refuse_what_is_no_number():
    with pytest.raises(BadValueError, match="'t'"):
        Statistics().add(np.array([1.0, np.nan], dtype=np.float32), "t")
    assert Statistics().offset(LNSFormat(8, 8)) == 0


def test_collect_does_not_depend_on_the_batch(images):
    source = normalise(net(2), ReadOptions(), "net")
    float_net = FloatNet(source.model)
    inputs = Inputs("x", "x", images)
    one, seven = (collect(float_net, inputs, batch=size) for size in (1, 7))
    assert one.keys() == seven.keys()
    for name, found in one.items():
        assert found.total == seven[name].total
        assert abs(found.maximum - seven[name].maximum) <= 1e-5 * found.maximum


def test_inputs_from_everywhere(tmp_path, images):
    shape = (0, 3, 8, 8)
    np.savez(tmp_path / "a.npz", x=images, y=np.arange(24))
    np.save(tmp_path / "b.npy", images)
    np.savez(tmp_path / "c.npz", first=images, second=images)
    found = load_inputs(tmp_path / "a.npz", shape)
    np.testing.assert_array_equal(found.x, images)
    np.testing.assert_array_equal(found.labels, np.arange(24))
    assert load_inputs(tmp_path / "b.npy", shape, limit=5).x.shape == (5, 3, 8, 8)
    pairs = ((torch.from_numpy(images[i : i + 4]), torch.arange(4)) for i in range(0, 24, 4))
    assert load_inputs(pairs, shape, limit=6).x.shape == (6, 3, 8, 8)
    assert load_inputs([images[0], images[1:3]], shape).x.shape == (3, 3, 8, 8)
    made = load_inputs(None, shape, seed=1)
    assert made.synthetic
    assert "synthetic" in made.source
    np.testing.assert_array_equal(made.x, load_inputs(None, shape, seed=1).x)
    with pytest.raises(BadFileError, match="first, second"):
        load_inputs(tmp_path / "c.npz", shape)
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 no")
    with pytest.raises(BadFileError, match=r"d\.npz"):
        load_inputs(tmp_path / "d.npz", shape)
    np.save(tmp_path / "e.npy", np.array([{}], dtype=object))
    with pytest.raises(BadFileError, match=r"e\.npy"):
        load_inputs(tmp_path / "e.npy", shape)
    for wrong, kind in ((images[:, :2], BadValueError), (3, BadTypeError), (images * np.nan, BadValueError)):
        with pytest.raises(kind):
            load_inputs(wrong, shape)
    with pytest.raises(LookupError, match="digits"):
        load_inputs("digitz", shape)


def test_pictures(tmp_path):
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)
    for number in range(3):
        (tmp_path / "class").mkdir(exist_ok=True)
        pixels = rng.integers(0, 256, (16, 20, 3), dtype=np.uint8)
        image.fromarray(pixels).save(tmp_path / "class" / f"{number}.png")
    from lnsdeploy.exporters.calibration import Preparation

    plain = load_inputs(tmp_path, (0, 3, 8, 8)).x
    assert plain.shape == (3, 3, 8, 8)
    assert 0 <= plain.min() <= plain.max() <= 1
    moved = load_inputs(tmp_path, (0, 3, 8, 8), preparation=Preparation.parse("0.5", "0.25")).x
    np.testing.assert_allclose(moved, (plain - 0.5) / 0.25, rtol=1e-5, atol=1e-6)
    with pytest.raises(BadValueError, match="no use"):
        load_inputs(tmp_path, (0, 12))


# ---------------------------------------------------------------------------------------------------------------------
# Export


EXECUTORS = ("reference", "cpu", "ort", "ort-functions", "torch")


@pytest.mark.parametrize(("bits", "gamma", "least"), [(8, 8, 20), (16, 1024, 45)])
def test_export_and_every_executor(bits, gamma, least, images, tmp_path):
    result = export(net(2), images, bits=bits, gamma=gamma)
    assert result.fidelity.sqnr_db > least
    assert result.artifact.coverage == 1.0
    assert not result.fidelity.synthetic
    assert "held out" in result.fidelity.source
    result.save(tmp_path / "m.onnx")
    artifact = lnsdeploy.load_artifact(tmp_path / "m.onnx")
    engines = [get_executor(name) for name in EXECUTORS if name in ("reference", "ort", "torch") or bits == 8]
    assert compare(engines, artifact, images[:2]).equal
    assert artifact.graph.metadata["calibration_synthetic"] == "no"


def test_made_up_inputs_are_called_so():
    result = export(net(2))
    data = result.to_dict()
    assert data["calibration"]["synthetic"] is True
    assert data["fidelity"]["inputs_synthetic"] is True
    assert result.artifact.graph.metadata["calibration_synthetic"] == "yes"
    assert "synthetic" in result.artifact.graph.metadata["calibration"]


def test_bias_correction_takes_away_the_mean_error(images):
    """By it, every channel's mean over the sample is right to a few units of the accumulator's last place."""
    options = ExportOptions(bits=4, gamma=2, sample=24)
    plain, corrected = (
        export(net(2), images, evaluation=images, options=options, correct_bias=on) for on in (False, True)
    )
    assert corrected.fidelity.sqnr_db > plain.fidelity.sqnr_db


def test_torch_modules_and_programs(images):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.ReLU(), torch.nn.Flatten(), torch.nn.Linear(144, 3))
    module.train()
    result = lnsdeploy.export(module, images, bits=8, gamma=8)
    assert module.training
    assert result.fidelity.sqnr_db > 20
    program = torch.export.export(
        module.eval(), (torch.from_numpy(images[:2]),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    again = lnsdeploy.export(program, images, bits=8, gamma=8)
    assert again.fidelity.sqnr_db == pytest.approx(result.fidelity.sqnr_db, abs=0.5)
    with pytest.raises(BadTypeError, match="torch module"):
        lnsdeploy.export(object(), images)
    with pytest.raises(BadValueError, match="example_inputs"):
        lnsdeploy.export(module)
    with pytest.raises(LookupError, match="bits"):
        lnsdeploy.export(module, images, bit=8)


@pytest.mark.parametrize("name", ["net.pt2", "net.pt", "net.safetensors"])
def test_files_of_torch_are_not_opened(name, tmp_path):
    file = tmp_path / name
    file.write_bytes(b"anything")
    with pytest.raises(UnsupportedError, match=r"run code|without a net"):
        export(file)


# ---------------------------------------------------------------------------------------------------------------------
# Widths


@given(st.data())
@settings(max_examples=60, deadline=None)
def test_greedy_stays_in_the_budget_and_leaves_nothing(data):
    names = [f"l{i}" for i in range(data.draw(st.integers(1, 5)))]
    widths = [4, 6, 8]
    counts = {name: data.draw(st.integers(1, 50)) for name in names}
    noise = {
        name: dict(zip(widths, sorted((data.draw(st.floats(0, 100)) for _ in widths), reverse=True), strict=True))
        for name in names
    }
    total = data.draw(st.integers(4 * sum(counts.values()), 9 * sum(counts.values())))

    def cost(count, bits):
        return count * bits

    chosen = greedy(counts, noise, widths, total, cost)
    spent = sum(cost(counts[name], bits) for name, bits in chosen.items())
    assert spent <= total
    for name, bits in chosen.items():
        for more in widths:
            if more > bits and noise[name][more] < noise[name][bits]:
                assert spent + cost(counts[name], more) - cost(counts[name], bits) > total


def test_budget(images, tmp_path):
    low, middle = (export(net(2), images, bits=8, gamma=8, budget=bits) for bits in (4, 6))
    assert low.sizes()["weight_bits"] == 4
    assert 4 < middle.sizes()["weight_bits"] <= 6
    assert middle.fidelity.sqnr_db >= low.fidelity.sqnr_db
    middle.save_recipe(tmp_path / "r.toml")
    again = export(net(2), images, bits=8, gamma=8, recipe=load_recipe(tmp_path / "r.toml"))
    assert again.artifact.data == middle.artifact.data
    assert set(middle.sensitivity) == {layer.name for layer in layers_of(middle.source.model)}
    with pytest.raises(BadValueError, match="too small"):
        export(net(2), images, budget=3)
    in_bytes = export(net(2), images, budget=float(low.sizes()["word_bytes"] + 40))
    assert in_bytes.sizes()["word_bytes"] <= low.sizes()["word_bytes"] + 40


def test_budget_text():
    assert parse_budget("5.5") == 5.5
    assert parse_budget("3.5MB") == 3_500_000
    assert parse_budget("2 KiB") == 2048
    assert parse_widths("8,4,4") == (4, 8)
    for text in ("", "17", "1.5", "5 bits", "3B", "-4"):
        with pytest.raises(BadValueError):
            parse_budget(text)
    for text in ("", "1", "4;8", "17"):
        with pytest.raises(BadValueError):
            parse_widths(text)
    assert [stored_bytes(5, bits) for bits in (2, 4, 5, 8, 9, 16)] == [3, 3, 5, 5, 10, 10]


# ---------------------------------------------------------------------------------------------------------------------
# The command


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("export")
    onnx.save(net(2), path / "net.onnx")
    rng = np.random.default_rng(0)
    np.savez(path / "x.npz", x=rng.normal(size=(24, 3, 8, 8)).astype(np.float32), y=np.zeros(24, dtype=np.int64))
    return path


def command(capsys, *arguments):
    capsys.readouterr()
    status = _run([str(a) for a in arguments])
    told = capsys.readouterr()
    return status, told.out, told.err


def test_command(file, capsys):
    made, recipe, page = file / "net.lns.onnx", file / "r.toml", file / "page"
    status, out, err = command(
        capsys, "export", file / "net.onnx", "-o", made, "--bits", 8, "--gamma", 8, "--calibration", file / "x.npz",
        "--json", "--budget", 6, "--save-recipe", recipe, "--report", page, "--method", "lsq",
        "--min-sqnr", 5, "--max-drop", 100,
    )  # fmt: skip
    assert (status, err) == (0, "")
    data = json.loads(out)
    assert data["coverage"] == 1.0
    assert data["float_ops"] == []
    assert data["sqnr_db"] > 10
    assert data["seconds"] > 0
    assert data["fidelity"]["accuracy_float"] is not None
    assert data["sizes"]["weight_bits"] <= 6
    assert load_recipe(recipe).layers
    html = (page / "fidelity.html").read_text()
    assert "net.onnx" in html
    assert "http://" not in html
    assert "https://" not in html
    for layer in data["fidelity"]["layers"]:
        assert layer["name"] in html
    assert json.loads((page / "fidelity.json").read_text())["sqnr_db"] == data["sqnr_db"]
    status, out, err = command(capsys, "export", file / "net.onnx", "-o", made, "--min-sqnr", 90, "--layers")
    assert status == 1
    assert len(err.strip().splitlines()) == 1
    assert "90 dB" in err
    assert "made up" in out
    assert "n0" in out or "Conv" in out


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (["nothing.onnx"], "nothing.onnx"),
        (["nothing"], "timm:nothing"),
        (["net.onnx", "--budget", "5", "--recipe", "r"], "one of the two"),
        (["net.onnx", "--widths", "4"], "--budget"),
        (["net.onnx", "--weights", "random"], "torch models"),
        (["net.onnx", "--calibration", "x.np"], "x.np"),
        (["net.onnx", "--input-shape", "1,2"], "input"),
        (["net.onnx", "--model-output", "nothing"], "outputs are"),
        (["net.onnx", "--bits", "40"], "40"),
        (["net.onnx", "--method", "median"], "absmax"),
        (["net.onnx", "--weights-format", "8"], "8"),
    ],
)
def test_mistakes_are_one_line(arguments, word, file, capsys, monkeypatch):
    monkeypatch.chdir(file)
    status, out, err = command(capsys, "export", *arguments, "-o", file / "never.onnx")
    assert status == 2
    assert len(err.strip().splitlines()) == 1, err
    assert word in err
    assert not out
    assert not (file / "never.onnx").exists()


def test_checks():
    result = export(net(1), bits=8, gamma=8)
    result.fidelity.require(min_sqnr=0, max_drop=100)
    with pytest.raises(CheckFailedError, match="200 dB"):
        result.fidelity.require(min_sqnr=200)
    with pytest.raises(CheckFailedError, match="agreement"):
        result.fidelity.require(max_drop=-1)


# ---------------------------------------------------------------------------------------------------------------------
# Packed words


def packed_and_plain(images):
    result = export(net(2), images, bits=8, gamma=8, weight=LNSFormat(4, 2))
    graph, macs = result.artifact.graph, result.artifact.macs
    return result, [artifacts.build(graph, macs, pack=pack) for pack in (True, False)]


def test_packed_weights_are_the_same_words(images):
    result, (packed, plain) = packed_and_plain(images)
    model = onnx.load_model_from_string(packed.data)
    onnx.checker.check_model(model, full_check=True)
    narrow = [t for t in model.graph.initializer if t.data_type == TensorProto.UINT4]
    assert len(narrow) == sum(bool(getattr(n, "words", None) is not None) for n in packed.graph.nodes)
    assert result.sizes()["word_bytes"] == sum(len(t.raw_data) for t in narrow)
    assert len(packed.data) < len(plain.data) + 200 * len(narrow)
    again, other = (artifacts.read_artifact(a.data, where="m") for a in (packed, plain))
    for a, b in zip(again.graph.nodes, other.graph.nodes, strict=True):
        if getattr(a, "words", None) is not None:
            np.testing.assert_array_equal(a.words, b.words)
            assert a.words.dtype == b.words.dtype == np.uint8
    engines = [get_executor(name) for name in ("reference", "ort", "ort-functions", "torch")]
    assert compare(engines, again, images[:2]).equal
    assert compare(engines, other, images[:2]).equal


def test_a_packed_weight_that_was_changed_is_another_net(images):
    """No table of the datapath tells a weight: it is read as it stands, and stays in its format."""
    _, (packed, _) = packed_and_plain(images)
    model = onnx.load_model_from_string(packed.data)
    tensor = next(t for t in model.graph.initializer if t.data_type == TensorProto.UINT4)
    tensor.raw_data = bytes([tensor.raw_data[0] ^ 0x10]) + tensor.raw_data[1:]
    changed = artifacts.read_artifact(model.SerializeToString(), where="m")
    name = tensor.name.removesuffix(".packed").removesuffix(".weight")
    before, after = (next(n for n in a.graph.nodes if n.name == name) for a in (packed, changed))
    assert (before.words.reshape(-1) != after.words.reshape(-1)).nonzero()[0].tolist() == [1]


# ---------------------------------------------------------------------------------------------------------------------
# What runs an exported net


def test_emulate_and_verify_without_a_data_set(file, capsys):
    made = file / "plain.onnx"
    assert command(capsys, "export", file / "net.onnx", "-o", made)[0] == 0
    status, out, _ = command(capsys, "emulate", made, "--executor", "torch", "--limit", 3, "--json")
    assert status == 0
    assert json.loads(out)["accuracy"] is None
    status, out, _ = command(capsys, "emulate", made, "--data", file / "x.npz", "--executor", "ort", "--json")
    assert json.loads(out)["accuracy"] is not None
    assert json.loads(out)["samples"] == 24
    status, out, _ = command(capsys, "verify", made, "--limit", 2, "--executors", "reference,torch,ort")
    assert status == 0
    assert "equal" in out


# ---------------------------------------------------------------------------------------------------------------------
# The page


def test_page_shows_names_as_text(images):
    from lnsdeploy.studies.fidelity import render_fidelity

    hostile_name = "</script><script>alert(1)</script>"
    data = export(net(2), images).to_dict() | {"sensitivity": {hostile_name: {"4": 10.0}}, "command": hostile_name}
    data["fidelity"]["layers"][0]["name"] = hostile_name
    data["float_ops"] = [hostile_name]
    html = render_fidelity(data, title=hostile_name)
    assert "<script>alert" not in html
    assert html.count("&lt;script&gt;alert(1)") >= 5
    assert "default-src" in html
    assert html == render_fidelity(data, title=hostile_name)
    with pytest.raises(BadValueError):
        render_fidelity({"fidelity": {}})


# ---------------------------------------------------------------------------------------------------------------------
# The example


def test_a_net_of_plain_torch_keeps_its_accuracy(capsys):
    """8-bit words without any training, on the digits: within half a point."""
    assert torch_to_lns.main(["--epochs", "8", "--json"]) == 0
    told = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert told["inputs"] == 360
    assert told["accuracy_float"] > 0.95
    assert told["accuracy_lns"] >= told["accuracy_float"] - 0.005
