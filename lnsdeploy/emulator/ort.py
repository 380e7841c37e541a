"""The executors `ort` and `ort-functions`: an LNS ONNX file as it is, in ONNX Runtime.

Every LNS operator is also a model-local function in standard operators, so a plain ONNX Runtime that knows
nothing of lnsdeploy runs the file, to the same bits: that is `ort-functions`. `ort` has the native library's operators
registered, which then run instead.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy._native import library_path
from lnsdeploy.emulator import native
from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.floats import plain
from lnsdeploy.emulator.graph import LayerRecord, check_input
from lnsdeploy.errors import BadFileError, BadTypeError, MissingDependencyError, UnsupportedError
from lnsdeploy.formats import Words

MINIMUM = (1, 18)


def _runtime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingDependencyError(
            "ONNX Runtime is not installed: pip install 'lnsdeploy[onnx]' (or pip install onnxruntime)"
        ) from error
    return onnxruntime


def register(session_options: Any) -> None:
    """Register the native operators, so that sessions made with these options run LNS nodes by them.

    Args:
        session_options: an `onnxruntime.SessionOptions`.

    Raises:
        MissingDependencyError: the native library is missing; the message says why.
        BadTypeError: something else was given.
        UnsupportedError: this ONNX Runtime does not take it.
    """
    if why := native.unavailable():
        raise MissingDependencyError(why)
    if not hasattr(session_options, "register_custom_ops_library"):
        raise BadTypeError(
            f"register takes an onnxruntime.SessionOptions, not {type(session_options).__name__}; "
            "pass it to InferenceSession afterwards"
        )
    try:
        session_options.register_custom_ops_library(str(library_path()))
    except Exception as error:  # ONNX Runtime has no common base class of its errors
        raise UnsupportedError(f"ONNX Runtime refuses the native operators: {_first_line(error)}") from error


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _session(data: bytes, what: str, with_native: bool = False, uses_float: bool = False) -> Any:
    runtime = _runtime()
    options = runtime.SessionOptions()
    if uses_float:
        plain(options)
    # warnings about unused initializers and the like are not for users of lnsdeploy
    options.log_severity_level = 4
    threads = os.environ.get(native.THREADS_VARIABLE)
    if with_native:
        register(options)
        # the library has threads of its own, which those of ONNX Runtime, waiting busily, would only hinder
        options.intra_op_num_threads = 1
    elif threads and not uses_float:
        options.intra_op_num_threads = native.threads()
    try:
        return runtime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as above
        raise BadFileError(f"ONNX Runtime refuses {what}: {_first_line(error)}") from error


def float_session(data: bytes) -> Any:
    """An ONNX Runtime session of a float model.

    Raises:
        BadFileError: ONNX Runtime refuses the model; MissingDependencyError: it is not installed.
    """
    return _session(data, "the float model")


class OrtFunctionsExecutor:
    """Runs the file's own function bodies in ONNX Runtime."""

    name = "ort-functions"

    def __init__(self) -> None:
        self._sessions: weakref.WeakKeyDictionary[Artifact, dict[bool, Any]] = weakref.WeakKeyDictionary()

    def with_native(self) -> bool:
        """Whether the native operators run: never."""
        return False

    def unavailable(self) -> str | None:
        """Why it cannot run here, or None."""
        try:
            runtime = _runtime()
        except MissingDependencyError as error:
            return str(error)
        version = tuple(int(part) for part in runtime.__version__.split(".")[:2])
        if version < MINIMUM:
            wanted = ".".join(map(str, MINIMUM))
            return f"ONNX Runtime {runtime.__version__} is too old: pip install 'onnxruntime>={wanted}'"
        return None

    def run(
        self,
        artifact: Artifact,
        x: npt.NDArray[Any],
        *,
        records: dict[str, LayerRecord] | None = None,
        visit: Callable[[str, Words], None] | None = None,
    ) -> Words:
        """The words of the output for a batch of inputs; see :class:`Executor`."""
        graph = artifact.graph
        x = check_input(x, graph.input_shape, graph.input)
        if not np.isfinite(x).all() and np.isnan(x).any():
            raise BadFileError(f"input {graph.input!r} contains NaN, which has no LNS word")
        names = [graph.words_output]
        if visit is not None:
            names = [graph.encoded, *(node.output for node in graph.nodes if node.makes_words)]
        session = self._tapped(artifact, names, visit is not None)
        try:
            found = dict(zip(names, session.run(names, {graph.input: x}), strict=True))
        except Exception as error:  # as above
            raise BadFileError(f"ONNX Runtime failed in {artifact.where}: {str(error).splitlines()[0]}") from error
        if records is not None:
            for node in graph.nodes:
                records.setdefault(node.name, LayerRecord(node.name, node.op))
        if visit is not None:
            for name in names:
                visit(name, found[name])
        words: Words = found[graph.words_output]
        return words

    def _tapped(self, artifact: Artifact, names: list[str], everything: bool) -> Any:
        """A session that also gives the words of some tensors."""
        sessions = self._sessions.setdefault(artifact, {})
        if everything not in sessions:
            import onnx

            model = onnx.load_model_from_string(artifact.data)
            present = {output.name for output in model.graph.output}
            for name in names:
                if name in present:
                    continue
                info = artifact.graph.tensors.get(name)
                if info is None:
                    raise UnsupportedError(f"{artifact.where}: tensor {name!r} has no recorded format")
                kind = onnx.helper.np_dtype_to_tensor_dtype(info.format.dtype)
                model.graph.output.append(onnx.helper.make_tensor_value_info(name, kind, None))
            sessions[everything] = _session(
                model.SerializeToString(), artifact.where, self.with_native(), artifact.graph.uses_float
            )
        return sessions[everything]


class OrtExecutor(OrtFunctionsExecutor):
    """Runs the file in ONNX Runtime with the native operators; by its function bodies where the library is missing."""

    name = "ort"

    def with_native(self) -> bool:
        """Whether the native operators run."""
        return native.unavailable() is None
