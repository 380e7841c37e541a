"""The same inputs through several executors, compared word for word."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.emulator.artifact import Artifact, TableDifference
from lnsdeploy.emulator.executor import Executor
from lnsdeploy.errors import BadValueError
from lnsdeploy.formats import Words, decode


@dataclass(frozen=True)
class Difference:
    """The first difference, in full.

    Args:
        kind: ``"words"`` of a tensor, or an entry of a ``"table"`` that no input of the comparison reached.
        node, op, tensor: where; the node that makes the tensor (or owns the table).
        index: of the element; the first axis counts over all inputs.
        words: the word (or entry) by executor.
        values: the decoded values by executor; empty for tables.
        differing: elements of that tensor that differ, in that batch.
    """

    kind: str
    node: str
    op: str
    tensor: str
    index: tuple[int, ...]
    words: dict[str, int | float]
    values: dict[str, float]
    differing: int

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return {
            "kind": self.kind,
            "node": self.node,
            "op": self.op,
            "tensor": self.tensor,
            "index": list(self.index),
            "words": self.words,
            "values": self.values,
            "differing": self.differing,
        }

    def __str__(self) -> str:
        words = ", ".join(f"{name} {word}" for name, word in self.words.items())
        where = f"node {self.node!r} ({self.op}), {'table' if self.kind == 'table' else 'tensor'} {self.tensor!r}"
        values = ", ".join(f"{name} {value:g}" for name, value in self.values.items())
        return f"{where}, index {list(self.index)}: {words}" + (f" (values: {values})" if values else "")


@dataclass(frozen=True)
class Comparison:
    """The outcome.

    Args:
        equal: no difference was found.
        words_compared: words of all tensors and inputs, once per executor after the first.
        executors: their names.
        first_difference: the earliest, in the order of execution.
        table_differences: entries of the file's tables that differ from the datapath's.
    """

    equal: bool
    words_compared: int
    executors: tuple[str, ...]
    first_difference: Difference | None
    table_differences: tuple[TableDifference, ...] = ()


def compare(
    executors: Sequence[Executor],
    artifact: Artifact,
    x: npt.NDArray[Any],
    *,
    batch: int = 64,
    progress: Callable[[int], None] | None = None,
) -> Comparison:
    """Run every tensor of words of a net through several executors and compare them.

    Args:
        executors: two or more; differences are reported against the first.
        x: float inputs [n, …].
        batch: inputs at a time.
        progress: called with the number of inputs done.

    Raises:
        BadValueError: fewer than two executors, or no inputs.
    """
    names = tuple(executor.name for executor in executors)
    if len(set(names)) < 2:
        raise BadValueError(f"a comparison needs two different executors, not {', '.join(names) or 'none'}")
    if len(x) == 0:
        raise BadValueError("a comparison needs at least one input")
    compared = 0
    for start in range(0, len(x), batch):
        part = x[start : start + batch]
        expected: dict[str, Words] = {}
        executors[0].run(artifact, part, visit=expected.__setitem__)
        for executor in executors[1:]:
            found: dict[str, Words] = {}
            executor.run(artifact, part, visit=found.__setitem__)
            for tensor, words in expected.items():
                other = found[tensor]
                compared += words.size
                if words.shape != other.shape or words.dtype != other.dtype or not np.array_equal(words, other):
                    difference = _difference(artifact, tensor, words, other, (names[0], executor.name), start)
                    return Comparison(False, compared, names, difference, artifact.table_differences)
        if progress:
            progress(min(start + batch, len(x)))
    if artifact.table_differences:
        return Comparison(
            False,
            compared,
            names,
            _table_difference(artifact.table_differences[0]),
            artifact.table_differences,
        )
    return Comparison(True, compared, names, None)


def _difference(artifact: Artifact, tensor: str, a: Words, b: Words, names: tuple[str, str], start: int) -> Difference:
    graph = artifact.graph
    maker = next((node for node in graph.nodes if node.output == tensor), None)
    node, op = (maker.name, maker.op) if maker else (graph.input, "Encode")
    if a.shape != b.shape or a.dtype != b.dtype:
        raise BadValueError(
            f"{names[1]} gives {b.dtype}{list(b.shape)} for tensor {tensor!r} where {names[0]} gives "
            f"{a.dtype}{list(a.shape)}"
        )
    different = np.argwhere(a != b)
    first = tuple(int(i) for i in different[0])
    info = graph.tensors[tensor]
    both = {names[0]: int(a[first]), names[1]: int(b[first])}
    values = {
        name: float(decode(np.array([word], dtype=info.format.dtype), info.format, info.offset, np.float64)[0])
        for name, word in both.items()
        if word >> info.format.bits == 0
    }
    return Difference("words", node, op, tensor, (first[0] + start, *first[1:]), dict(both), values, len(different))


def _table_difference(table: TableDifference) -> Difference:
    return Difference(
        "table",
        table.node,
        table.op,
        table.table,
        table.index,
        {"datapath": table.expected, "file": table.found},
        {},
        table.differing,
    )
