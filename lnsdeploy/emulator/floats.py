"""Operations in float: one ONNX operator at a time, by ONNX Runtime on the CPU (docs/datapath.md, 6.6).

Float arithmetic differs in the last bit between libraries, and within ONNX Runtime between an operator and what its
optimizer makes of several. So every executor runs these operations the same way: each by itself, not optimized, by one
thread. The executors of whole files ask for the same.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadFileError, MissingDependencyError

if TYPE_CHECKING:
    from lnsdeploy.emulator.graph import Float

# Operators that a file may ask for: functions of their inputs alone, without subgraphs, state, or randomness.
_OPERATORS = """
    Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization Cast Ceil Celu Clip
    Compress Concat Conv ConvTranspose Cos Cosh CumSum DepthToSpace Div Einsum Elu Equal Erf Exp Expand Flatten Floor
    Gather GatherElements GatherND Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual
    GridSample GroupNormalization HardSigmoid HardSwish Hardmax InstanceNormalization IsInf IsNaN LRN
    LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax LpNormalization LpPool MatMul Max MaxPool Mean
    MeanVarianceNormalization Min Mish Mod Mul Neg Not OneHot Or PRelu Pad Pow Range Reciprocal ReduceL1 ReduceL2
    ReduceLogSum ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape
    Resize Round ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax Softplus
    Softsign SpaceToDepth Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile Transpose Trilu Unsqueeze Where Xor
"""
OPERATORS = frozenset(_OPERATORS.split())

_sessions: weakref.WeakKeyDictionary[Float, Any] = weakref.WeakKeyDictionary()


def plain(options: Any) -> Any:
    """Session options under which operators in float compute as they do by themselves; returns them.

    Args:
        options: an `onnxruntime.SessionOptions`.
    """
    import onnxruntime

    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.intra_op_num_threads = 1
    options.inter_op_num_threads = 1
    return options


def run_float(node: Float, tensors: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
    """The output of an operation in float.

    Raises:
        BadFileError: ONNX Runtime refuses it. MissingDependencyError: ONNX Runtime or onnx is not installed.
    """
    feeds = {f"x{i}": np.ascontiguousarray(np.asarray(value)) for i, value in enumerate(tensors)}
    types = tuple(str(value.dtype) for value in feeds.values())
    known = _sessions.get(node)
    if known is None or known[0] != types:
        known = types, _session(node, feeds)
        _sessions[node] = known
    try:
        made: npt.NDArray[Any] = known[1].run(["y"], feeds)[0]
    except Exception as error:  # ONNX Runtime's errors have no common base class
        raise BadFileError(f"{node.kind} {node.name!r} in float failed: {str(error).splitlines()[0]}") from error
    return made


def _session(node: Float, feeds: dict[str, npt.NDArray[Any]]) -> Any:
    try:
        import onnxruntime
        from onnx import ValueInfoProto, helper, numpy_helper
    except ImportError as error:
        raise MissingDependencyError(
            f"this net has operations in float ({node.kind} {node.name!r}), which ONNX Runtime computes: "
            "pip install 'lnsdeploy[onnx]'"
        ) from error
    names, constants = [], []
    for i, argument in enumerate(node.arguments):
        if argument is None:
            names.append("")
        elif isinstance(argument, int):
            names.append(f"x{argument}")
        else:
            names.append(f"c{i}")
            constants.append(numpy_helper.from_array(np.ascontiguousarray(argument), f"c{i}"))
    from lnsdeploy.exporters.functions import IR_VERSION, OPSET

    graph = helper.make_graph(
        [helper.make_node(node.kind, names, ["y"], name=node.name, **node.attributes)],
        "float",
        [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), [None] * value.ndim)
            for name, value in feeds.items()
        ],
        [ValueInfoProto(name="y")],
        constants,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], ir_version=IR_VERSION)
    options = plain(onnxruntime.SessionOptions())
    options.log_severity_level = 4
    try:
        return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise BadFileError(f"ONNX Runtime refuses {node.kind} {node.name!r}: {str(error).splitlines()[0]}") from error
