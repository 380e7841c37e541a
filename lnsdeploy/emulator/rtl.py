"""The `rtl` executor: matrix products and convolutions through the simulated array of `lnsdeploy.rtl` (docs/rtl.md).

Every hardware that a net needs (a datapath with formats) is built once and kept in the user's cache. Element-wise
nodes, of which a chip has one comparator or adder, run by the reference. A layer of more multiply-accumulates than
`limit` is sampled: rows spread evenly go through the hardware, the others through the fastest other executor, and
:attr:`RtlExecutor.sampled` says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.emulator import cpu, reference
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.plan import Counts, DotPlan, Ints
from lnsdeploy.errors import BadValueError, MissingDependencyError
from lnsdeploy.formats import Words
from lnsdeploy.rtl import designs, simulate, vectors
from lnsdeploy.rtl.designs import ArrayShape
from lnsdeploy.rtl.parameters import PEParameters, key_of, pe_parameters

# Multiply-accumulates of a layer in one call that go through the hardware; LNSDEPLOY_RTL_MACS is another number.
DEFAULT_LIMIT = 1 << 24
Dot = Callable[[Words, Words, Ints | None, DotPlan], Words]


@dataclass(frozen=True)
class Hardware:
    """An array for the layers of one datapath and one set of formats.

    Args:
        parameters: of its elements.
        shape: of the array.
        simulation: built.
    """

    parameters: PEParameters
    shape: ArrayShape
    simulation: simulate.Simulation

    def dot(self, a: Words, w: Words, bias: Ints | None, plan: DotPlan) -> Words:
        """Words [M, N] of a product, by the simulated array."""
        if not a.shape[0] or not w.shape[0]:
            return np.zeros((a.shape[0], w.shape[0]), dtype=plan.output.dtype)
        if not a.shape[1]:
            # a product of nothing is the bias: one step of zeros
            a, w = (np.zeros((x.shape[0], 1), dtype=x.dtype) for x in (a, w))
        records, count = vectors.commands(self.parameters, self.shape, plan, a, w, bias)
        text = self.simulation.outputs(records, count)
        tiles = designs.unpack(text, plan.output.bits, self.shape.rows * self.shape.cols)
        return vectors.untile(tiles, self.shape, len(a), len(w)).astype(plan.output.dtype)


def layers(graph: g.LNSGraph) -> list[g.Gemm | g.Conv]:
    """The nodes that are matrix products or convolutions."""
    return [node for node in graph.nodes if isinstance(node, (g.Gemm, g.Conv))]


def groups(graph: g.LNSGraph) -> dict[Any, list[g.Gemm | g.Conv]]:
    """Layers by the hardware that they need."""
    found: dict[Any, list[g.Gemm | g.Conv]] = {}
    for node in layers(graph):
        found.setdefault(key_of(node.plan), []).append(node)
    return found


def shape_for(nodes: Sequence[g.Gemm | g.Conv], rows: int, cols: int) -> ArrayShape:
    """An array whose buffers hold the deepest product of some layers.

    Raises:
        BadValueError: deeper than 2^15 steps.
    """
    lanes = max(node.plan.datapath.accumulate.lanes for node in nodes)
    steps = max(-(-int(np.prod(node.words.shape[1:])) // lanes) for node in nodes)
    ksteps = max((max(steps, 2) - 1).bit_length(), 1)
    if ksteps > 15:
        raise BadValueError(f"a layer of {steps} steps is deeper than the 32768 that the array's controller counts")
    return ArrayShape(rows, cols, ksteps, min(4, 16 - ksteps), min(2, 16 - ksteps))


class RtlExecutor:
    """The emitted SystemVerilog, simulated.

    Args:
        rows, cols: of the array.
        limit: multiply-accumulates a layer and call, above which a layer is sampled.
        simulator: `verilator` or `icarus`; by default the first that there is.
    """

    name = "rtl"

    def __init__(self, rows: int = 4, cols: int = 4, limit: int | None = None, simulator: str | None = None):
        self.rows, self.cols, self.simulator = rows, cols, simulator
        self.limit = limit or int(os.environ.get("LNSDEPLOY_RTL_MACS", DEFAULT_LIMIT))
        #: rows of the last run that went through the hardware, and rows in all, of the layers that were sampled
        self.sampled: dict[str, tuple[int, int]] = {}
        self._built: dict[int, tuple[Artifact, dict[Any, Hardware]]] = {}

    def unavailable(self) -> str | None:
        """A simulator is missing."""
        try:
            simulate.best(self.simulator)
        except MissingDependencyError as error:
            return str(error)
        return None

    def hardware(self, artifact: Artifact) -> dict[Any, Hardware]:
        """What a net needs, by :func:`lnsdeploy.rtl.parameters.key_of`; built the first time."""
        known = self._built.get(id(artifact))
        if known is not None:
            return known[1]
        tool = simulate.best(self.simulator)
        made = {}
        for key, nodes in groups(artifact.graph).items():
            shape = shape_for(nodes, self.rows, self.cols)
            pe = pe_parameters([(node.plan, len(node.words)) for node in nodes])
            made[key] = Hardware(pe, shape, simulate.build(designs.array(pe, shape), tool))
        # the artifact is kept with its hardware, so its id stays its own
        self._built = {id(artifact): (artifact, made)}
        return made

    def run(
        self,
        artifact: Artifact,
        x: npt.NDArray[Any],
        *,
        records: dict[str, g.LayerRecord] | None = None,
        visit: Callable[[str, Words], None] | None = None,
    ) -> Words:
        """See :class:`lnsdeploy.emulator.executor.Executor`; saturated and flushed words are not counted."""
        built = self.hardware(artifact)
        self.sampled = {}
        steps = [self._step(node, built) for node in artifact.graph.nodes]
        return g.run_graph(artifact.graph, x, steps, g.LNSGraph.encode_input, records, visit)

    def _step(self, node: g.Node, built: dict[Any, Hardware]) -> Callable[[list[Words], Counts], Words]:
        if not isinstance(node, (g.Gemm, g.Conv)):
            return node.run
        hardware = built[key_of(node.plan)]

        def dot(a: Words, w: Words, bias: Ints | None, plan: DotPlan) -> Words:
            return self._sampled_dot(node.name, hardware, a, w, bias, plan)

        if isinstance(node, g.Gemm):
            return lambda tensors, counts: _gemm(node, tensors[0], dot)
        return lambda tensors, counts: _conv(node, tensors[0], dot)

    def _sampled_dot(
        self, name: str, hardware: Hardware, a: Words, w: Words, bias: Ints | None, plan: DotPlan
    ) -> Words:
        rows = max(self.limit // max(w.size, 1), 1)
        if len(a) <= rows:
            return hardware.dot(a, w, bias, plan)
        result = cpu.dot(a, w, bias, plan)
        some = np.unique(np.linspace(0, len(a) - 1, rows).astype(np.int64))
        result[some] = hardware.dot(a[some], w, bias, plan)
        before = self.sampled.get(name, (0, 0))
        self.sampled[name] = (before[0] + len(some), before[1] + len(a))
        return result


def _gemm(node: g.Gemm, x: Words, dot: Dot) -> Words:
    rows = dot(x.reshape(-1, x.shape[-1]), node.words, node.bias, node.plan)
    return rows.reshape(*x.shape[:-1], node.words.shape[0])


def patches(node: g.Conv, x: Words) -> tuple[list[Words], tuple[int, ...]]:
    """Rows [images · positions, K] of a convolution, one matrix a group, and the spatial shape of its output."""
    view = reference.windows(x, node.window)
    axes = len(node.window.kernel)
    spatial = view.shape[2 : 2 + axes]
    inputs = node.words.shape[1]
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    depth = int(np.prod(node.words.shape[1:]))
    found = [
        np.ascontiguousarray(view[:, i * inputs : (i + 1) * inputs].transpose(order)).reshape(-1, depth)
        for i in range(node.groups)
    ]
    return found, spatial


def _conv(node: g.Conv, x: Words, dot: Dot) -> Words:
    outputs = node.words.shape[0]
    each = outputs // node.groups
    found, spatial = patches(node, x)
    result = np.empty((x.shape[0], outputs, *spatial), dtype=node.plan.output.dtype)
    for i, rows in enumerate(found):
        part = slice(i * each, (i + 1) * each)
        bias = None if node.bias is None else node.bias[part]
        words = dot(rows, node.words[part].reshape(each, -1), bias, node.plan.channels(part))
        result[:, part] = np.moveaxis(words.reshape(x.shape[0], *spatial, each), -1, 1)
    return result
