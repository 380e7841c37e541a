"""How near the words come to the float net: of each layer and end to end (docs/export.md).

Everything is summed over batches, so memory does not grow with the number of inputs; all figures are those of the very
words that every executor gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.executor import Executor
from lnsdeploy.errors import BadValueError, CheckFailedError
from lnsdeploy.exporters.calibration import FloatNet, Inputs
from lnsdeploy.formats import Words, decode

# JSON has no infinity; beyond this, and for equality, the ratio is said to be this.
EXACT_DB = 999.0


@dataclass(eq=False)
class _Sums:
    """Signal, noise and their product, summed."""

    signal: float = 0.0
    noise: float = 0.0
    other: float = 0.0
    product: float = 0.0
    count: int = 0

    def add(self, exact: npt.NDArray[Any], got: npt.NDArray[Any]) -> None:
        a, b = (np.asarray(v, dtype=np.float64).reshape(-1) for v in (exact, got))
        self.signal += float(a @ a)
        self.other += float(b @ b)
        self.product += float(a @ b)
        difference = a - b
        self.noise += float(difference @ difference)
        self.count += a.size

    @property
    def sqnr_db(self) -> float | None:
        if self.signal == 0:
            return None
        return EXACT_DB if self.noise == 0 else min(10 * math.log10(self.signal / self.noise), EXACT_DB)

    @property
    def cosine(self) -> float | None:
        length = math.sqrt(self.signal * self.other)
        return self.product / length if length else None


@dataclass(frozen=True)
class LayerFidelity:
    """One operation on words against the float tensor that it stands for.

    Args:
        name, op: of the node.
        tensor: the float net's name of its result.
        formats: activation, weight and result of a layer; the result's alone of others.
        macs: multiply-accumulate operations for one input.
        parameters: words of its weights.
        sqnr_db: signal to quantisation noise in decibels; 999 where they are equal, None where there is no signal.
        cosine: of the angle between both.
        saturated, flushed: shares of its results.
    """

    name: str
    op: str
    tensor: str
    formats: tuple[str, ...]
    macs: int
    parameters: int
    sqnr_db: float | None
    cosine: float | None
    saturated: float
    flushed: float

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "name": self.name,
            "op": self.op,
            "tensor": self.tensor,
            "formats": list(self.formats),
            "macs": self.macs,
            "parameters": self.parameters,
            "sqnr_db": _rounded(self.sqnr_db, 3),
            "cosine": _rounded(self.cosine, 6),
            "saturated": _rounded(self.saturated, 6),
            "flushed": _rounded(self.flushed, 6),
        }


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


@dataclass(frozen=True)
class Fidelity:
    """An LNS net against the float net that it was made of.

    Args:
        inputs: how many were compared.
        source: where they come from.
        synthetic: whether they were made up.
        measured_at: the float net's tensor that `sqnr_db`, `cosine` and `agreement` are of: the output, or what a
            softmax at the end is taken of (a softmax saturates, and hides every error).
        sqnr_db, cosine: there, over all inputs.
        output_sqnr_db: at the output itself.
        agreement: share of inputs (positions, in outputs of more axes) whose largest output is the same.
        accuracy_float, accuracy_lns: share of right answers, where labels are known.
        layers: every operation whose float counterpart exists.
        executor: who ran the words.
    """

    inputs: int
    source: str
    synthetic: bool
    measured_at: str
    sqnr_db: float | None
    cosine: float | None
    output_sqnr_db: float | None
    agreement: float
    accuracy_float: float | None
    accuracy_lns: float | None
    layers: tuple[LayerFidelity, ...] = field(default=())
    executor: str = ""

    @property
    def drop(self) -> float:
        """Points lost: of accuracy where labels are known, else of agreement with the float net."""
        if self.accuracy_float is not None and self.accuracy_lns is not None:
            return 100 * (self.accuracy_float - self.accuracy_lns)
        return 100 * (1 - self.agreement)

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "sqnr_db": _rounded(self.sqnr_db, 3),
            "output_sqnr_db": _rounded(self.output_sqnr_db, 3),
            "measured_at": self.measured_at,
            "cosine": _rounded(self.cosine, 6),
            "agreement": self.agreement,
            "accuracy_float": self.accuracy_float,
            "accuracy_lns": self.accuracy_lns,
            "drop_points": round(self.drop, 4),
            "inputs": self.inputs,
            "inputs_source": self.source,
            "inputs_synthetic": self.synthetic,
            "executor": self.executor,
            "layers": [layer.to_dict() for layer in self.layers],
        }

    def require(self, *, min_sqnr: float | None = None, max_drop: float | None = None) -> None:
        """Refuse less than was asked for.

        Args:
            min_sqnr: decibels, end to end.
            max_drop: points of accuracy, or of agreement where no labels are known.

        Raises:
            CheckFailedError: the message says what was found.
        """
        problems = []
        if min_sqnr is not None and (self.sqnr_db is None or self.sqnr_db < min_sqnr):
            got = "no signal at all" if self.sqnr_db is None else f"{self.sqnr_db:.1f} dB"
            problems.append(f"{got} of signal to noise, where at least {min_sqnr:g} dB were asked for")
        if max_drop is not None and self.drop > max_drop:
            what = "accuracy" if self.accuracy_float is not None else "agreement with the float net"
            problems.append(f"{self.drop:.2f} points of {what} lost, where at most {max_drop:g} were allowed")
        if problems:
            raise CheckFailedError("; ".join(problems))


def measure(
    artifact: Artifact,
    net: FloatNet,
    inputs: Inputs,
    executor: Executor,
    *,
    batch: int = 16,
    progress: Callable[[int], None] | None = None,
) -> Fidelity:
    """Compare an LNS net with its float net.

    Args:
        batch: inputs at a time.
        progress: called with the number of inputs done.

    Raises:
        BadValueError: no inputs.
    """
    if not len(inputs):
        raise BadValueError("fidelity needs at least one input")
    graph = artifact.graph
    stands_for = counterparts(graph, set(net.names) | {net.input})
    before = before_softmax(net)
    by_float = {tensor: words for words, tensor in stands_for.items()}
    probe = by_float.get(before, "") if before != net.output else ""
    measured_at = before if probe else net.output
    sums = {words: _Sums() for words in stands_for}
    end = _Sums()
    agree = positions = right_float = right_lns = 0
    records: dict[str, g.LayerRecord] = {}
    done = 0
    for part in inputs.batches(batch):
        exact = net.values(part, sorted({*stands_for.values(), net.output}))

        def visit(name: str, words: Words, exact: Mapping[str, Any] = exact) -> None:
            if name in stands_for:
                info = graph.tensors[name]
                value = exact[stands_for[name]]
                if value.shape == words.shape:
                    sums[name].add(value, decode(words, info.format, info.offset))

        words = executor.run(artifact, part, records=records, visit=visit)
        got, wanted = graph.decode_output(words), exact[net.output]
        end.add(wanted, got)
        a, b = (_scores(value).argmax(axis=-1) for value in (wanted, got))
        agree += int((a == b).sum())
        positions += a.size
        if inputs.labels is not None:
            labels = inputs.labels[done : done + len(part)]
            right_float += int((a.reshape(len(part), -1)[:, 0] == labels).sum())
            right_lns += int((b.reshape(len(part), -1)[:, 0] == labels).sum())
        done += len(part)
        if progress:
            progress(done)
    known = inputs.labels is not None
    measured = sums[probe] if probe else end
    return Fidelity(
        inputs=len(inputs),
        source=inputs.source,
        synthetic=inputs.synthetic,
        measured_at=measured_at,
        sqnr_db=measured.sqnr_db,
        cosine=measured.cosine,
        output_sqnr_db=end.sqnr_db,
        agreement=agree / positions if positions else 1.0,
        accuracy_float=right_float / len(inputs) if known else None,
        accuracy_lns=right_lns / len(inputs) if known else None,
        layers=_layers(artifact, stands_for, sums, records, len(inputs)),
        executor=executor.name,
    )


def _scores(value: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Outputs with the scores along the last axis: those of a net for pictures have them along the second."""
    if value.ndim == 1:
        return value[:, None]
    if value.ndim > 2 and all(n == 1 for n in value.shape[2:]):
        return value.reshape(value.shape[:2])
    return np.moveaxis(value, 1, -1) if value.ndim == 4 else value


def before_softmax(net: FloatNet) -> str:
    """The tensor that the output is the softmax of, or the output."""
    nodes: dict[str, Any] = {output: node for node in net.model.graph.node for output in node.output}
    name: str = net.output
    for _ in range(8):
        node = nodes.get(name)
        if node is None:
            return net.output
        if node.op_type in ("Softmax", "LogSoftmax", "Sigmoid"):
            # what only changes the shape stands for the same numbers
            found = str(node.input[0])
            while found in nodes and nodes[found].op_type in ("Reshape", "Flatten", "Squeeze", "Unsqueeze", "Identity"):
                found = str(nodes[found].input[0])
            return found
        if node.op_type not in ("Reshape", "Flatten", "Squeeze", "Identity"):
            return net.output
        name = str(node.input[0])
    return net.output


def counterparts(graph: g.LNSGraph, floats: set[str]) -> dict[str, str]:
    """For tensors of words, the float tensor that each stands for; where a ReLU alone reads it, the one behind it."""
    found: dict[str, str] = {}
    for node in graph.nodes:
        output = (graph.read_by_relu(node.output) or node).output
        name = output.removesuffix("_words")
        if name in floats and output not in found:
            found[output] = name
    return found


def _layers(
    artifact: Artifact,
    stands_for: Mapping[str, str],
    sums: Mapping[str, _Sums],
    records: Mapping[str, g.LayerRecord],
    inputs: int,
) -> tuple[LayerFidelity, ...]:
    graph = artifact.graph
    layers = []
    for node in graph.nodes:
        output = (graph.read_by_relu(node.output) or node).output
        if output not in stands_for or sums[output].count == 0:
            continue
        plan = getattr(node, "plan", None)
        formats = [getattr(plan, side, None) for side in ("activation", "weight")]
        formats.append(graph.tensors[node.output].format)
        record = records.get(node.name)
        count = record.counts.words if record is not None and record.counts.words else 0
        words = getattr(node, "words", None)
        layers.append(
            LayerFidelity(
                name=node.name,
                op=node.op,
                tensor=stands_for[output],
                formats=tuple(str(fmt) for fmt in formats if fmt is not None),
                macs=artifact.macs.get(node.name, 0),
                parameters=0 if words is None else int(words.size),
                sqnr_db=sums[output].sqnr_db,
                cosine=sums[output].cosine,
                saturated=record.counts.saturated / count if record is not None and count else 0.0,
                flushed=record.counts.flushed / count if record is not None and count else 0.0,
            )
        )
    return tuple(layers)
