"""Lowering a float net to words: structure, fidelity, placement of accumulators (spec 4.3, 4.5, 5.1, 5.5, 6.4, 6.5)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from lnsdeploy.datapath import for_format, load_datapath, named_datapaths
from lnsdeploy.emulator import graph as g
from lnsdeploy.errors import BadFileError, BadValueError
from lnsdeploy.exporters import placement
from lnsdeploy.exporters.lower import LowerOptions, layer_errors, lower, sqnr_db
from lnsdeploy.formats import LNSFormat, calibrate, decode, encode
from tests import nets

# Against float, without training: what each datapath must reach on the residual net (dB). Measured values lie
# 3 dB or more above; a broken placement falls to zero or below.
FIDELITY = {
    "lns-madam-8": 22,
    "lns-madam-8-lut4": 20,
    "lns-madam-8-lut2": 18,
    "lns-madam-8-lut1": 16,
    "elma-8": 20,
    "mitchell-8": 16,
    "gauss-8": 12,
    "gauss-12": 30,
    "gauss-16": 45,
    "lognet-5": 8,
}


@pytest.mark.parametrize("name", sorted(FIDELITY))
def test_fidelity_of_each_datapath(name):
    net, model, x = nets.residual()
    lowered = lower(model, x, LowerOptions(load_datapath(name)))
    got = lowered.graph.decode_output(g.run_reference(lowered.graph, x))
    error = sqnr_db(nets.outputs(net, x), got)
    assert error is not None
    assert error > FIDELITY[name]


@pytest.mark.parametrize("name", named_datapaths())
def test_no_accumulator_leaves_its_range_on_the_sample(name):
    _, model, x = nets.residual()
    lowered = lower(model, x[:16], LowerOptions(load_datapath(name), sample=16))
    # a wider accumulator in the same place gives the same words: nothing was wrapped or saturated
    roomy = []
    for node in lowered.graph.nodes:
        if isinstance(node, (g.Gemm, g.Conv)):
            datapath = node.plan.datapath
            wider = replace(datapath.accumulate, bits=datapath.accumulate.bits + 3)
            bias = node.bias
            if bias is not None and not datapath.is_linear:
                old = datapath.log
                bias = (bias & old.max_code) + ((bias >> old.bits) << wider.bits)
            node = replace(node, bias=bias, plan=replace(node.plan, datapath=replace(datapath, accumulate=wider)))
        roomy.append(node)
    same = g.run_reference(replace(lowered.graph, nodes=tuple(roomy)), x[:16])
    np.testing.assert_array_equal(g.run_reference(lowered.graph, x[:16]), same)
    # and it is no wider than it must be: a quarter of the range would not do
    if datapath_saturates(name):
        tight = []
        for node in lowered.graph.nodes:
            if isinstance(node, (g.Gemm, g.Conv)):
                datapath = node.plan.datapath
                narrow = replace(datapath.accumulate, bits=datapath.accumulate.bits - 4)
                node = replace(node, plan=replace(node.plan, datapath=replace(datapath, accumulate=narrow)))
            tight.append(node)
        other = g.run_reference(replace(lowered.graph, nodes=tuple(tight)), x[:16])
        assert (other != same).any()


def datapath_saturates(name):
    datapath = load_datapath(name)
    return datapath.is_linear and datapath.linear.overflow == "saturate" and datapath.gamma == 8


@pytest.mark.smoke
def test_structure_of_the_residual_net():
    _, model, x = nets.residual()
    lowered = lower(model, x, LowerOptions(load_datapath("lns-madam-8")))
    ops = [node.op for node in lowered.graph.nodes]
    assert ops == ["Conv", "Relu", "MaxPool", "Conv", "Add", "Relu", "AveragePool", "Reshape", "Gemm"]
    assert [n.name for n in lowered.graph.nodes if isinstance(n, (g.Conv, g.Gemm))] == ["c1", "c2", "fc"]
    assert lowered.macs == 8 * 8 * 9 * 6 + 4 * 4 * 9 * 6 * 6 + 6 * 4
    assert lowered.coverage == 1.0
    assert lowered.float_ops == ()
    # tensors that ReLU and pooling join share one offset
    infos = [lowered.graph.tensors[node.output] for node in lowered.graph.nodes[:3]]
    assert infos[0] == infos[1] == infos[2]


def test_the_batch_does_not_change_bits():
    _, model, x = nets.residual()
    graph = lower(model, x, LowerOptions(load_datapath("gauss-8"))).graph
    whole = g.run_reference(graph, x)
    parts = np.concatenate([g.run_reference(graph, x[i : i + 7]) for i in range(0, len(x), 7)])
    np.testing.assert_array_equal(whole, parts)


def test_gammas_that_are_no_power_of_two():
    net, model, x = nets.dense()
    datapath = for_format(LNSFormat(10, 12))
    lowered = lower(model, x, LowerOptions(datapath))
    got = lowered.graph.decode_output(g.run_reference(lowered.graph, x))
    assert not datapath.is_linear
    assert sqnr_db(nets.outputs(net, x), got) > 24


def test_weights_and_activations_of_different_gammas_are_rescaled():
    net, model, x = nets.dense()
    base = load_datapath("lns-madam-8").with_formats(LNSFormat(8, 16), LNSFormat(8, 8))
    lowered = lower(model, x, LowerOptions(base))
    assert "Rescale" in [node.op for node in lowered.graph.nodes]
    got = lowered.graph.decode_output(g.run_reference(lowered.graph, x))
    assert sqnr_db(nets.outputs(net, x), got) > 20


@dataclass
class Spec:
    weight: LNSFormat | None
    weight_offset: object
    weight_axis: int | None
    activation: LNSFormat | None
    input_offset: int
    datapath: str | None = None


def test_recorded_offsets_are_kept():
    net, model, x = nets.dense()
    fmt = LNSFormat(8, 8)
    weight = net.fc2.weight.detach().numpy()
    offsets = calibrate(weight, fmt, axis=0) - 3
    specs = {"fc2": Spec(fmt, offsets, 0, fmt, -91)}
    graph = lower(model, x, LowerOptions(load_datapath("lns-madam-8")), specs=specs).graph
    layer = next(node for node in graph.nodes if node.name == "fc2")
    assert layer.plan.input_offset == -91
    np.testing.assert_array_equal(layer.plan.weight_offset, offsets)
    np.testing.assert_array_equal(layer.words, encode(weight, fmt, offsets, axis=0))
    assert next(n for n in graph.nodes if n.name == "fc1").plan.output_offset == -91


def test_a_layer_with_a_datapath_of_its_own():
    _, model, x = nets.dense()
    fmt = LNSFormat(8, 8)
    specs = {"fc1": Spec(fmt, -100, None, fmt, -110, "gauss-8")}
    graph = lower(model, x, LowerOptions(load_datapath("lns-madam-8")), specs=specs).graph
    used = {node.name: node.plan.datapath.name for node in graph.nodes if isinstance(node, g.Gemm)}
    assert used == {"fc1": "gauss-8", "fc2": "lns-madam-8"}
    assert len(graph.datapaths) == 2


def test_layer_errors_name_layers():
    _, model, x = nets.residual()
    lowered = lower(model, x, LowerOptions(load_datapath("gauss-16")))
    words: dict[str, np.ndarray] = {}
    g.run_reference(lowered.graph, x, visit=words.__setitem__)
    from lnsdeploy.exporters.lower import float_values

    errors = layer_errors(float_values(model, x), lowered.graph, words)
    assert {"c1", "c2", "fc"} <= set(errors)
    assert all(errors[name] > 40 for name in ("c1", "c2", "fc"))


def test_saturation_that_a_relu_removes_does_not_count():
    """The offset in front of a ReLU is that of what it lets through, so large negative results saturate."""
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Relu", ["h"], ["y"])]
    weights = {"w": np.array([[0.5, -16.0]], dtype=np.float32)}
    x = np.linspace(0.5, 1, 8, dtype=np.float32).reshape(8, 1)
    lowered = lower(single(nodes, weights, [1]), x, LowerOptions(load_datapath("gauss-8").with_formats(FMT, FMT)))
    records: dict[str, g.LayerRecord] = {}
    words: dict[str, np.ndarray] = {}
    g.run_reference(lowered.graph, x, records, words.__setitem__)
    layer = lowered.graph.nodes[0]
    codes, signs = FMT.split(words[layer.output])
    assert signs[:, 1].all()
    assert (codes[:, 1] == FMT.max_code).all()  # they did saturate
    assert records[layer.name].counts.saturated == 0


def single(node_list, weights, in_shape, out_rank=2, **attributes):
    """A float model of a few nodes, input x, output y."""
    graph = helper.make_graph(
        node_list,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", *in_shape])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", *[None] * (out_rank - 1)])],
        [numpy_helper.from_array(v, k) for k, v in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)


def run(model, x, name="gauss-16"):
    lowered = lower(model, x, LowerOptions(load_datapath(name)))
    import onnxruntime

    expected = onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    return lowered, sqnr_db(expected, lowered.graph.decode_output(g.run_reference(lowered.graph, x)))


RNG = np.random.default_rng(3)
FMT = LNSFormat(4, 2)


def floats(*shape):
    return RNG.standard_normal(shape).astype(np.float32)


def test_matmul_and_an_added_bias():
    nodes = [helper.make_node("MatMul", ["x", "w"], ["h"]), helper.make_node("Add", ["h", "b"], ["y"])]
    lowered, error = run(single(nodes, {"w": floats(6, 5), "b": floats(5)}, [6]), floats(20, 6))
    assert [node.op for node in lowered.graph.nodes] == ["Gemm"]
    assert error > 50


def test_grouped_strided_dilated_convolution():
    node = helper.make_node(
        "Conv", ["x", "w", "b"], ["y"], group=2, strides=[2, 1], pads=[1, 2, 0, 2], dilations=[1, 2]
    )
    model = single([node], {"w": floats(6, 2, 3, 3), "b": floats(6)}, [4, 9, 9], 4)
    for name in ("gauss-16", "lns-madam-8"):
        _, error = run(model, floats(6, 4, 9, 9), name)
        assert error > (50 if name == "gauss-16" else 20)


@pytest.mark.parametrize("axes", [1, 3])
def test_convolution_over_one_and_three_axes(axes):
    node = helper.make_node("Conv", ["x", "w"], ["y"], pads=[1] * 2 * axes)
    _, error = run(
        single([node], {"w": floats(3, 2, *[3] * axes)}, [2, *[5] * axes], axes + 2), floats(4, 2, *[5] * axes)
    )
    assert error > 50


def test_a_batch_norm_with_nothing_to_fold_into():
    parts = {"s": floats(3), "b": floats(3), "m": floats(3), "v": np.abs(floats(3)) + 0.5}
    nodes = [
        helper.make_node("Relu", ["x"], ["h"]),
        helper.make_node("BatchNormalization", ["h", "s", "b", "m", "v"], ["y"]),
    ]
    lowered, error = run(single(nodes, parts, [3, 4, 4], 4), floats(10, 3, 4, 4))
    assert [node.op for node in lowered.graph.nodes] == ["Relu", "Conv"]
    assert error > 45


def test_concatenation_clip_transpose_and_average_pooling():
    nodes = [
        helper.make_node("Conv", ["x", "w1"], ["a"]),
        helper.make_node("Conv", ["x", "w2"], ["b0"]),
        helper.make_node("Clip", ["b0", "lo", "hi"], ["b"]),
        helper.make_node("Concat", ["a", "b"], ["c"], axis=1),
        helper.make_node("AveragePool", ["c"], ["d"], kernel_shape=[3, 3], pads=[1, 1, 1, 1], strides=[2, 2]),
        helper.make_node("Transpose", ["d"], ["e"], perm=[0, 2, 3, 1]),
        helper.make_node("Flatten", ["e"], ["y"]),
    ]
    weights = {"w1": floats(2, 2, 1, 1), "w2": floats(3, 2, 1, 1), "lo": np.float32(0), "hi": np.float32(1.5)}
    weights = {k: np.asarray(v, dtype=np.float32) for k, v in weights.items()}
    lowered, error = run(single(nodes, weights, [2, 5, 5]), floats(12, 2, 5, 5))
    assert error > 45
    ops = [n.op for n in lowered.graph.nodes]
    assert sorted(ops[:3]) == ["Clip", "Conv", "Conv"]
    assert ops[3:] == ["Concat", "AveragePool", "Transpose", "Reshape"]


def test_bad_inputs():
    _, model, x = nets.dense()
    options = LowerOptions(load_datapath("gauss-8"))
    with pytest.raises(BadValueError, match="at least one input"):
        lower(model, x[:0], options)
    with pytest.raises(BadValueError, match=r"must have the shape \[batch, 3, 4\], not \[40, 12\]"):
        lower(model, x.reshape(40, 12), options)
    broken = x.copy()
    broken[3, 1, 1] = np.nan
    with pytest.raises(BadValueError, match="NaN"):
        lower(model, broken, options)
    external = onnx.ModelProto()
    external.CopyFrom(model)
    external.graph.initializer[0].data_location = TensorProto.EXTERNAL
    with pytest.raises(BadFileError, match="another file"):
        lower(external, x, options)


@pytest.mark.parametrize("name", ["lns-madam-8", "elma-8", "gauss-8", "gauss-12"])
def test_biases_become_integers_of_the_accumulator(name):
    """Spec 4.5 and 5.5: with zero activations the output is the bias."""
    datapath = load_datapath(name)
    rng = np.random.default_rng(0)
    x, w = rng.standard_normal((32, 10)), rng.standard_normal((6, 10))
    bias = np.array([0.0, 1.0, -2.5, 3e-3, 40.0, -0.7])
    a, b, o = (calibrate(v, datapath.activation) for v in (x, w, x @ w.T + bias))
    plan = g.DotPlan(datapath, datapath.activation, datapath.weight, datapath.output, a, b, o)
    xw, ww = encode(x, datapath.activation, a), encode(w, datapath.weight, b)
    plan, integers = placement.place_dot(plan, xw, ww, bias, 1.0)
    words = g.reference.dot(np.zeros_like(xw), ww, integers, plan)
    got = decode(words[0], datapath.output, o, np.float64)
    step = 2 ** (1 / datapath.gamma)
    lsb = 2.0 ** (plan.lsb + (a + b) / datapath.gamma) if datapath.is_linear else 0.0
    for want, have in zip(bias, got, strict=True):
        if have == 0:  # flushed: below the format's smallest, or less than one bit of the accumulator
            smallest = 2 ** ((1 + o) / datapath.gamma)
            assert abs(want) < max(smallest, lsb) or want == 0
        else:
            assert abs(want) / step - lsb <= abs(have) <= abs(want) * step + lsb
            assert np.sign(want) == np.sign(have)
