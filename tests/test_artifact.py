"""The LNS ONNX file: what is in it, that it runs without lnsdeploy, that changes are seen and damage is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import lru_cache

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from lnsdeploy.datapath import load_datapath
from lnsdeploy.emulator import artifact as artifacts
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.compare import compare
from lnsdeploy.emulator.executor import get_executor
from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.exporters.export import node_macs, replan
from lnsdeploy.exporters.lower import LowerOptions, lower, sqnr_db
from tests import nets


@lru_cache(maxsize=8)
def made(datapath="lns-madam-8"):
    _, model, x = nets.residual()
    lowered = lower(model, x, LowerOptions(load_datapath(datapath)), metadata={"data": "digits"})
    return artifacts.build(lowered.graph, node_macs(lowered.graph), where="net.onnx")


def model_of(datapath="lns-madam-8"):
    return onnx.load_model_from_string(made(datapath).data)


def engines():
    return [get_executor("reference"), get_executor("ort")]


def test_checker_and_strict_shape_inference_pass():
    onnx.checker.check_model(model_of(), full_check=True)
    onnx.shape_inference.infer_shapes(model_of(), strict_mode=True, data_prop=True)


@pytest.mark.parametrize("datapath", ["lns-madam-8", "gauss-16"])
def test_no_float_between_encode_and_decode(datapath):
    model = model_of(datapath)
    outputs = {name: node for node in model.graph.node for name in node.output}
    tapped = onnx.load_model_from_string(made(datapath).data)
    for name, node in outputs.items():
        if node.op_type != "Decode":
            kind = TensorProto.UINT16 if datapath == "gauss-16" else TensorProto.UINT8
            tapped.graph.output.append(helper.make_tensor_value_info(name, kind, None))
    session = onnxruntime.InferenceSession(tapped.SerializeToString())
    kinds = {o.name: o.type for o in session.get_outputs()}
    assert kinds.pop(model.graph.output[0].name) == "tensor(float)"
    assert set(kinds.values()) == {"tensor(uint16)" if datapath == "gauss-16" else "tensor(uint8)"}
    floats = {t.name for t in model.graph.initializer if t.data_type == TensorProto.FLOAT}
    for node in model.graph.node:
        if floats & set(node.input):
            assert node.op_type in ("Encode", "Decode")
    assert [node.op_type for node in model.graph.node].count("Encode") == 1


@pytest.mark.smoke
def test_metadata():
    metadata = {entry.key: entry.value for entry in model_of().metadata_props}
    assert metadata["lnsdeploy.fingerprint"] == load_datapath("lns-madam-8").fingerprint
    assert metadata["lnsdeploy.datapath"] == "lns-madam-8"
    assert metadata["lnsdeploy.formats"] == "8:8"
    assert float(metadata["lnsdeploy.coverage"]) == 1.0
    assert metadata["lnsdeploy.spec"] == "1"
    assert json.loads(metadata["lnsdeploy.graph"])["net"] == {"data": "digits"}


def test_the_same_net_gives_the_same_bytes_and_reads_back():
    first = made()
    again = artifacts.read_artifact(first.data, where="again")
    assert again.table_differences == ()
    rebuilt = artifacts.build(again.graph, again.macs)
    assert rebuilt.data == first.data
    assert [type(n) for n in again.graph.nodes] == [type(n) for n in first.graph.nodes]
    assert again.macs == first.macs


PLAIN = """
import sys
sys.modules["lnsdeploy"] = None  # as if it were not installed
import numpy, onnxruntime
data = numpy.load(sys.argv[2])
for level in ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_ALL"):
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, "ORT_" + level)
    session = onnxruntime.InferenceSession(sys.argv[1], options)
    for batch in (1, 7, len(data["inputs"])):
        outputs = session.run(None, {session.get_inputs()[0].name: data["inputs"][:batch]})[0]
        assert outputs.dtype == numpy.float32
        assert (outputs == data["outputs"][:batch]).all(), (level, batch)
print("equal")
"""


@pytest.mark.parametrize("datapath", ["lns-madam-8", "gauss-8"])
def test_a_plain_onnx_runtime_gives_the_reference_words(tmp_path, datapath):
    _, _, x = nets.residual()
    net = made(datapath)
    net.save(tmp_path / "net.onnx")
    outputs = net.graph.decode_output(g.run_reference(net.graph, x))
    np.savez(tmp_path / "data.npz", inputs=x, outputs=outputs)
    command = [sys.executable, "-c", PLAIN, str(tmp_path / "net.onnx"), str(tmp_path / "data.npz")]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == "equal", done.stderr


def changed(datapath, table, index, by=1):
    """The file with one entry of one table changed."""
    model = model_of(datapath)
    for tensor in model.graph.initializer:
        if tensor.name == table:
            array = numpy_helper.to_array(tensor).copy()
            array.reshape(-1)[index] += by
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
            return artifacts.read_artifact(model.SerializeToString(), where="net.onnx")
    raise AssertionError(f"no table {table}: {[t.name for t in model.graph.initializer]}")


def tables(datapath):
    return [
        t.name
        for t in model_of(datapath).graph.initializer
        if not t.name.endswith((".weight", ".bias", ".shape")) and np.prod(t.dims) > 0
    ]


@pytest.mark.parametrize("datapath", ["lns-madam-8", "gauss-8"])
def test_every_table_is_checked_entry_by_entry(datapath):
    """One entry of each table changed by 1: verify sees it, whether or not an input reaches it."""
    _, _, x = nets.residual()
    names = tables(datapath)
    assert len(names) >= 8
    for name in names:
        size = next(int(np.prod(t.dims)) for t in model_of(datapath).graph.initializer if t.name == name)
        for index in {0, size // 2, size - 1}:
            broken = changed(datapath, name, index)
            assert [t.table for t in broken.table_differences] == [name]
            with pytest.raises(BadFileError, match="the file was changed"):
                broken.require_intact()
    outcome = compare(engines(), changed(datapath, names[-2], 0), x[:4])
    assert not outcome.equal
    assert outcome.first_difference is not None


def test_a_changed_table_shows_the_first_word_that_differs():
    _, _, x = nets.residual()
    broken = changed("gauss-8", "c1.delta_plus", 0)
    outcome = compare(engines(), broken, x)
    assert not outcome.equal
    first = outcome.first_difference
    assert first.kind == "words"
    assert (first.node, first.op) == ("c1", "Conv")
    assert first.words["reference"] != first.words["ort"]
    index = tuple(first.index)
    words = {}
    get_executor("reference").run(broken, x, visit=words.__setitem__)
    assert words[first.tensor][index] == first.words["reference"]
    assert "c1" in str(first)


def test_an_entry_that_no_input_reaches_is_found_all_the_same():
    _, _, x = nets.residual()
    last = len(load_datapath("gauss-8").tables()["delta_minus"]) - 1
    index = 0  # entry 0 of Δ⁻ is never used by an adder
    assert last > 0
    outcome = compare(engines(), changed("gauss-8", "c1.delta_minus", index), x[:8])
    assert not outcome.equal
    assert outcome.first_difference.kind == "table"
    assert outcome.first_difference.index == (0,)


def test_weights_are_data_and_may_change():
    """A changed weight is another net, not a broken one: both executors run it alike."""
    _, _, x = nets.residual()
    model = model_of("gauss-8")
    for tensor in model.graph.initializer:
        if tensor.name == "fc.weight":
            array = numpy_helper.to_array(tensor) ^ np.uint8(1)
            tensor.CopyFrom(numpy_helper.from_array(array, tensor.name))
    other = artifacts.read_artifact(model.SerializeToString(), where="other")
    assert other.table_differences == ()
    assert compare(engines(), other, x[:8]).equal


@pytest.mark.parametrize("datapath", ["mitchell-8", "gauss-8", "max-plus-8"])
def test_another_datapath_for_the_same_words(datapath):
    net, _, x = nets.residual()
    other = replan(made(), datapath, x)
    assert other.graph.datapath.name == datapath
    assert compare(engines(), other, x[:8]).equal
    exact = nets.outputs(net, x)
    error = sqnr_db(exact, other.graph.decode_output(g.run_reference(other.graph, x)))
    floor = {"mitchell-8": 15, "gauss-8": 12, "max-plus-8": -10}[datapath]
    assert error > floor


def test_replanning_with_the_same_datapath_changes_little():
    net, _, x = nets.residual()
    again = replan(made(), "lns-madam-8", x)
    a, b = (sqnr_db(nets.outputs(net, x), m.graph.decode_output(g.run_reference(m.graph, x))) for m in (made(), again))
    assert abs(a - b) < 1


# ---------------------------------------------------------------------------------------------------
# Damage. Each function changes a good file's bytes or model; all must be refused with one clear error.


def truncated(model):
    return model.SerializeToString()[:-700]


def half(model):
    data = model.SerializeToString()
    return data[: len(data) // 2]


def empty(model):
    return b""


def noise(model):
    return bytes(np.random.default_rng(0).integers(0, 256, 4000, dtype=np.uint8))


def text(model):
    return b"this is no model\n" * 20


def pickled(model):
    import pickle

    return pickle.dumps({"weights": [1, 2, 3]})


def no_metadata(model):
    del model.metadata_props[:]
    return model


def metadata(model, change):
    for entry in model.metadata_props:
        if entry.key == "lnsdeploy.graph":
            description = json.loads(entry.value)
            change(description)
            entry.value = json.dumps(description)
    return model


def broken_json(model):
    for entry in model.metadata_props:
        if entry.key == "lnsdeploy.graph":
            entry.value = entry.value[:-5]
    return model


def deep_json(model):
    for entry in model.metadata_props:
        if entry.key == "lnsdeploy.graph":
            entry.value = "[" * 100000
    return model


def other_specification(model):
    for entry in model.metadata_props:
        if entry.key == "lnsdeploy.spec":
            entry.value = "99"
    return model


def other_datapath(model):
    def change(d):
        next(iter(d["datapaths"].values()))["accumulate"]["bits"] = 20

    return metadata(model, change)


def lying_offset(model):
    def change(d):
        d["plans"]["c1"]["input_offset"] += 1

    return metadata(model, change)


def huge_offset(model):
    def change(d):
        d["plans"]["c1"]["input_offset"] = 10**30

    return metadata(model, change)


def text_for_a_number(model):
    def change(d):
        d["plans"]["c1"]["lsb"] = "0; import os"

    return metadata(model, change)


def missing_plan(model):
    return metadata(model, lambda d: d["plans"].pop("c2"))


def missing_tensor(model):
    return metadata(model, lambda d: d["tensors"].pop("relu_words", d["tensors"].popitem()))


def plans_of_another_kind(model):
    return metadata(model, lambda d: d.update(plans=[1, 2, 3]))


def external_data(model):
    tensor = model.graph.initializer[0]
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", "../../../etc/passwd"
    return model


def enormous_shape(model):
    tensor = next(t for t in model.graph.initializer if t.name == "c1.weight")
    tensor.dims[:] = [1 << 40, 1 << 20, 3, 3]
    return model


def wrong_shape(model):
    tensor = next(t for t in model.graph.initializer if t.name == "c1.weight")
    tensor.dims[:] = [3, 2, 3, 3]
    return model


def wrong_dtype(model):
    for tensor in model.graph.initializer:
        if tensor.name == "c1.weight":
            tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.int32), tensor.name))
    return model


def missing_initializer(model):
    kept = [t for t in model.graph.initializer if t.name != "fc.weight"]
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    return model


def foreign_operator(model):
    model.graph.node[2].domain, model.graph.node[2].op_type = "evil", "System"
    return model


def unknown_operator(model):
    model.graph.node[2].op_type = "Explode"
    return model


def changed_attribute(model):
    for attribute in model.graph.node[1].attribute:
        if attribute.name == "acc_bits":
            attribute.i = 3
    return model


def cyclic(model):
    model.graph.node[1].input[0] = model.graph.node[4].output[0]
    return model


def extra_node(model):
    model.graph.node.append(helper.make_node("Identity", [model.graph.node[0].output[0]], ["copy"], name="copy"))
    return model


def no_nodes(model):
    del model.graph.node[:]
    return model


DAMAGES = [
    truncated, half, empty, noise, text, pickled, no_metadata, broken_json, deep_json, other_specification,
    other_datapath, lying_offset, huge_offset, text_for_a_number, missing_plan, missing_tensor, plans_of_another_kind,
    external_data, enormous_shape, wrong_shape, wrong_dtype, missing_initializer, foreign_operator, unknown_operator,
    changed_attribute, cyclic, extra_node, no_nodes,
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES, ids=lambda d: d.__name__)
def test_damaged_files_are_refused(tmp_path, damage):
    result = damage(model_of("gauss-8"))
    data = result if isinstance(result, bytes) else result.SerializeToString()
    file = tmp_path / "broken.onnx"
    file.write_bytes(data)
    with pytest.raises(BadFileError, match=r"broken\.onnx") as caught:
        artifacts.load_artifact(file)
    assert len(str(caught.value)) < 1500


def test_a_float_model_is_told_apart():
    _, model, _ = nets.dense()
    with pytest.raises(BadFileError, match="not an LNS one"):
        artifacts.read_artifact(model.SerializeToString(), where="float.onnx")


def test_missing_files_and_folders(tmp_path):
    with pytest.raises(BadFileError, match="No such file"):
        artifacts.load_artifact(tmp_path / "nothing.onnx")
    with pytest.raises(BadFileError, match="is a folder"):
        artifacts.load_artifact(tmp_path)


def test_random_bit_flips_never_crash():
    """Untrusted bytes end in a clear error or in a net, never in another exception."""
    data = bytearray(made("gauss-8").data)
    rng = np.random.default_rng(1)
    refused = 0
    for _ in range(150):
        broken = bytearray(data)
        for position in rng.integers(0, len(data), 3):
            broken[position] ^= 1 << int(rng.integers(0, 8))
        try:
            artifacts.read_artifact(bytes(broken), where="flipped")
        except BadFileError:
            refused += 1
    assert refused > 10


def test_comparison_needs_two_executors_and_inputs():
    _, _, x = nets.residual()
    with pytest.raises(BadValueError, match="two different executors"):
        compare([get_executor("reference")], made(), x)
    with pytest.raises(BadValueError, match="at least one input"):
        compare(engines(), made(), x[:0])
