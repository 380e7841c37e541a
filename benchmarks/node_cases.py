"""ONNX's own test cases of single operators, lowered to 16-bit words and run: what lowering takes, measured.

    python -m benchmarks.node_cases --markdown docs/node-cases.md

Each case of `onnx.backend.test` for an operator that lowering claims becomes a net of one operator: its first float
input is the net's, all others are constants. It is exported with 16-bit words (γ 1024), calibrated on the case's own
input, and run by an executor; the words must come within the tolerance of what the case expects.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from lnsdeploy.emulator.executor import get_executor
from lnsdeploy.errors import BadFileError, BadValueError, LNSError, UnsupportedError
from lnsdeploy.exporters.convert import ExportOptions, export
from lnsdeploy.exporters.lower import SUPPORTED

BITS, GAMMA = 16, 1024
# Of a result that has a signal: noise 40 dB below it, and no number further off than a hundredth of the largest.
MIN_SQNR, MAX_ERROR = 40.0, 0.01


@dataclass(frozen=True)
class Outcome:
    """What became of a case.

    Args:
        operator, case: their names.
        state: ``"passed"``, ``"wrong"`` (beyond the tolerance), or ``"refused"``.
        note: the signal to noise in dB, or why it was refused.
    """

    operator: str
    case: str
    state: str
    note: str

    def to_dict(self) -> dict[str, str]:
        """Plain data for JSON."""
        return {"operator": self.operator, "case": self.case, "state": self.state, "note": self.note}


@cache
def _all_cases() -> dict[str, list[Any]]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from onnx.backend.test.case.node import collect_testcases

        found: dict[str, list[Any]] = {}
        for case in collect_testcases(None):  # type: ignore[arg-type]
            if case.model is not None and len(case.model.graph.node) == 1 and case.data_sets:
                found.setdefault(case.model.graph.node[0].op_type, []).append(case)
    return found


def cases_of(operator: str) -> list[Any]:
    """ONNX's test cases of an operator: single nodes alone, not their expansions into functions."""
    return _all_cases().get(operator, [])


def as_net(case: Any) -> tuple[Any, np.ndarray, np.ndarray]:
    """A case as a net of one input: the model, its input, and what it should give.

    Raises:
        UnsupportedError: it has no float input, or gives no float numbers.
    """
    inputs, outputs = case.data_sets[0]
    model = type(case.model)()
    model.CopyFrom(case.model)
    names = [value.name for value in model.graph.input]
    floats = [i for i, value in enumerate(inputs) if isinstance(value, np.ndarray) and value.dtype == np.float32]
    if not floats:
        raise UnsupportedError("no float32 input")
    if not isinstance(outputs[0], np.ndarray) or outputs[0].dtype != np.float32:
        raise UnsupportedError("no float32 output")
    shape = inputs[floats[0]].shape
    if len(floats) == len(inputs) > 1 and len(shape) > 1 and all(value.shape == shape for value in inputs):
        return _split(model, inputs, names), np.concatenate(inputs, axis=1), outputs[0]
    chosen = floats[0]
    for index, (name, value) in enumerate(zip(names, inputs, strict=True)):
        if index != chosen:
            if not isinstance(value, (np.ndarray, np.generic)):
                raise UnsupportedError("an input that is no tensor")
            model.graph.initializer.append(numpy_helper.from_array(np.asarray(value), name))
    kept = model.graph.input[chosen]
    value_info = helper.make_tensor_value_info(kept.name, TensorProto.FLOAT, list(inputs[chosen].shape))
    del model.graph.input[:]
    model.graph.input.append(value_info)
    del model.graph.output[1:]
    return model, inputs[chosen], outputs[0]


def _split(model: Any, inputs: Sequence[np.ndarray], names: Sequence[str]) -> Any:
    """A node of several inputs of one shape, as a net whose input has them side by side."""
    shape = list(inputs[0].shape)
    joined = helper.make_tensor_value_info("joined", TensorProto.FLOAT, [shape[0], len(inputs) * shape[1], *shape[2:]])
    sizes = numpy_helper.from_array(np.full(len(inputs), shape[1], dtype=np.int64), "sizes")
    opset = model.opset_import[0].version
    node = model.graph.node[0]
    copy = type(node)()
    copy.CopyFrom(node)
    if opset >= 13:
        split = helper.make_node("Split", ["joined", "sizes"], list(names), axis=1)
        model.graph.initializer.append(sizes)
    else:
        split = helper.make_node("Split", ["joined"], list(names), axis=1, split=[shape[1]] * len(inputs))
    del model.graph.node[:]
    model.graph.node.extend([split, copy])
    del model.graph.input[:]
    model.graph.input.append(joined)
    del model.graph.output[1:]
    return model


def _agrees(model: Any, x: np.ndarray, wanted: np.ndarray) -> bool:
    """Whether ONNX Runtime computes in float32 what the case expects; operations in float are its own."""
    try:
        session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
        got = session.run(None, {session.get_inputs()[0].name: x})[0]
    except Exception:  # it has no common base class of its errors; what it cannot run is refused with a reason later
        return True
    return got.shape == wanted.shape and np.allclose(got, wanted, rtol=1e-3, atol=1e-5, equal_nan=True)


def run_case(operator: str, case: Any, executor: str = "ort") -> Outcome:
    """Export a case, run it, and compare."""
    try:
        model, x, wanted = as_net(case)
        if not _agrees(model, x, wanted):
            return Outcome(operator, case.name, "refused", "ONNX Runtime itself gives other numbers")
        result = export(model, x, options=ExportOptions(BITS, GAMMA, sample=len(x) if x.ndim else 1), evaluation=x)
        got = result.artifact.graph.decode_output(get_executor(executor).run(result.artifact, x))
    except (UnsupportedError, BadValueError, BadFileError) as error:
        return Outcome(operator, case.name, "refused", _reason(error))
    if got.shape != wanted.shape:
        return Outcome(operator, case.name, "wrong", f"shape {list(got.shape)}, not {list(wanted.shape)}")
    difference = np.abs(got.astype(np.float64) - wanted)
    signal = float(np.square(wanted, dtype=np.float64).sum())
    noise = float(np.square(difference).sum())
    largest = float(np.abs(wanted).max()) if wanted.size else 0.0
    db = np.inf if noise == 0 else 10 * np.log10(signal / noise) if signal else -np.inf
    fits = noise == 0 or (db >= MIN_SQNR and float(difference.max()) <= MAX_ERROR * largest)
    return Outcome(operator, case.name, "passed" if fits else "wrong", "exact" if np.isinf(db) else f"{db:.1f} dB")


def _reason(error: LNSError) -> str:
    text = " ".join(str(error).split()).removeprefix("the model: ")
    return text.split("; lowering knows")[0][:160]


def run(operators: Iterable[str], executor: str = "ort") -> list[Outcome]:
    """All cases of some operators."""
    return [run_case(operator, case, executor) for operator in operators for case in cases_of(operator)]


def markdown(outcomes: Sequence[Outcome]) -> str:
    """The page of docs/."""
    lines = [
        "# ONNX's test cases of operators",
        "",
        "Generated by `python -m benchmarks.node_cases --markdown docs/node-cases.md`.",
        "",
        "Each case of `onnx.backend.test` of an operator that lowering takes, as a net of that operator alone with "
        f"{BITS}-bit",
        f"words (γ {GAMMA}), calibrated on the case's own input and run in ONNX Runtime. It passes if the noise is",
        f"at least {MIN_SQNR:g} dB below the signal and no number is further off than {100 * MAX_ERROR:g} % of the",
        "largest.",
        "The first axis of a net's input is its batch, so cases that mix it up are refused, as are those without a",
        "float input or output.",
        "",
        "| operator | cases | passed | refused | worst |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    by_operator: dict[str, list[Outcome]] = {}
    for outcome in outcomes:
        by_operator.setdefault(outcome.operator, []).append(outcome)
    for operator in sorted(by_operator):
        found = by_operator[operator]
        counts = {state: sum(o.state == state for o in found) for state in ("passed", "refused")}
        ratios = [float(o.note.removesuffix(" dB")) for o in found if o.state == "passed" and o.note != "exact"]
        worst = f"{min(ratios):.1f} dB" if ratios else "exact" if counts["passed"] else "–"
        lines.append(f"| {operator} | {len(found)} | {counts['passed']} | {counts['refused']} | {worst} |")
    rest = [o for o in outcomes if o.state != "passed"]
    lines += ["", "## The rest", "", "| operator | case | why |", "| --- | --- | --- |"]
    lines += [
        f"| {o.operator} | {o.case} | {o.note.replace('|', '/')} |"
        for o in sorted(rest, key=lambda o: (o.operator, o.case))
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("operators", nargs="*", help="by default all that lowering takes")
    parser.add_argument("--executor", default="ort")
    parser.add_argument("--json", action="store_true", help="print every outcome as JSON")
    parser.add_argument("--markdown", type=Path, default=None, help="write the page there")
    given = parser.parse_args()
    start = time.perf_counter()
    outcomes = run(given.operators or sorted(SUPPORTED), given.executor)
    seconds = round(time.perf_counter() - start, 1)
    counts = {state: sum(o.state == state for o in outcomes) for state in ("passed", "wrong", "refused")}
    if given.markdown is not None:
        given.markdown.write_text(markdown(outcomes), encoding="utf-8")
    if given.json:
        print(json.dumps({"seconds": seconds, **counts, "outcomes": [o.to_dict() for o in outcomes]}, indent=1))
    else:
        for outcome in outcomes:
            if outcome.state == "wrong":
                print(f"{outcome.case}: {outcome.note}")
        print(f"{len(outcomes)} cases in {seconds} s: " + ", ".join(f"{n} {state}" for state, n in counts.items()))
    return 1 if counts["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
