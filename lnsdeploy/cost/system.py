"""A whole net on an array: clocks, traffic between its levels, and the energy of its memories (docs/cost.md).

What is counted is `lns_array`: output-stationary, so partial sums never leave an element; its buffers hold some tiles,
and what does not fit is fetched again. The assumptions are a TOML file. Memories' energy is of one published
technology, elements' of this project's own unit; the two are never added.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.cost.energy import Energy, Stream, energy
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator.artifact import Artifact
from lnsdeploy.emulator.rtl import layers, patches
from lnsdeploy.errors import BadFileError, BadValueError, LNSError
from lnsdeploy.fields import check_choice, check_integer
from lnsdeploy.files import read_toml
from lnsdeploy.formats import Words

DEFAULT = Path(__file__).parent / "system.toml"
# Words of the integer net that is told beside.
INTEGER_BITS = 8


@dataclass(frozen=True)
class System:
    """The assumptions; see `system.toml`.

    Raises:
        BadValueError: a field is out of range; the message names it.
    """

    rows: int
    cols: int
    a_tiles: int
    w_tiles: int
    drain: int
    overlap: bool
    outside_bits: int
    patches: str
    technology: str
    citation: str
    outside_pj_per_bit: float
    buffer_pj_per_bit: float

    def __post_init__(self) -> None:
        for name in ("rows", "cols", "a_tiles", "w_tiles", "outside_bits"):
            check_integer(name, getattr(self, name), 1, 1 << 16)
        check_integer("drain", self.drain, 0, 1 << 16)
        check_choice("patches", self.patches, ("inside", "outside"))
        if not isinstance(self.overlap, bool):
            raise BadValueError(f"overlap must be true or false, not {self.overlap!r}")
        for name in ("outside_pj_per_bit", "buffer_pj_per_bit"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < 1e9:
                raise BadValueError(f"{name} must be a number of picojoules that is not negative, not {value!r}")
        for name in ("technology", "citation"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name):
                raise BadValueError(f"{name} must say where the energies are from")

    @classmethod
    def load(cls, path: str | Path | None = None) -> System:
        """Of a TOML file; without one the package's.

        Raises:
            BadFileError: it cannot be read, or a field is missing, unknown or out of range.
        """
        where = Path(path) if path is not None else DEFAULT
        fields: dict[str, Any] = {}
        for name, table in read_toml(where).items():
            if not isinstance(table, Mapping) or name not in ("array", "traffic", "energy"):
                raise BadFileError(f"{where}: {name!r} is none of the tables [array], [traffic], [energy]")
            fields |= table
        known = {field.name for field in dataclasses.fields(cls)}
        for problem, names in (("unknown", set(fields) - known), ("missing", known - set(fields))):
            if names:
                raise BadFileError(f"{where}: {problem} {', '.join(sorted(names))}")
        try:
            return cls(**fields)
        except LNSError as error:
            raise BadFileError(f"{where}: {error}") from error


@dataclass(frozen=True)
class Layer:
    """One layer on the array, for one input.

    Args:
        name: of the layer.
        macs: multiply-accumulate operations.
        clocks: of the array, fetching included.
        utilisation: the share of the elements' lanes that have work while it computes.
        outside: bits from and to outside, by weights, channels (bias, scale, offset), activations and outputs.
        buffer: bits read from the buffers, by weights and activations.
        element: bits of accumulators read and written in the elements.
    """

    name: str
    macs: int
    clocks: int
    utilisation: float
    outside: Mapping[str, int]
    buffer: Mapping[str, int]
    element: int


def count(
    name: str,
    m: int,
    n: int,
    depth: int,
    inputs: int,
    bits: Mapping[str, int],
    system: System,
    lanes: int,
    groups: int = 1,
) -> Layer:
    """Count the product of [m, depth] by [n, depth], `groups` times.

    Args:
        inputs: activations of a group that the patches are made of.
        bits: of an ``a`` word, a ``w`` word, an ``out`` word, a ``channel`` entry, and of the ``state`` of an element.
    """
    steps = -(-depth // lanes)
    row_tiles, col_tiles = -(-m // system.rows), -(-n // system.cols)
    passes = -(-col_tiles // system.w_tiles)
    arriving = m * depth if system.patches == "outside" else inputs
    # where all row tiles fit, the activations stay for every pass of weights
    a_fetches = passes if row_tiles > system.a_tiles else 1
    outside = {
        "weights": groups * n * depth * bits["w"],
        "channels": groups * n * bits["channel"],
        "activations": groups * a_fetches * arriving * bits["a"],
        "outputs": groups * m * n * bits["out"],
    }
    tiles = row_tiles * col_tiles
    moves = tiles * steps
    buffer = {
        "weights": groups * moves * system.cols * lanes * bits["w"],
        "activations": groups * moves * system.rows * lanes * bits["a"],
    }
    fetch = -(-sum(outside.values()) // system.outside_bits)
    runs = passes * -(-row_tiles // system.a_tiles)
    compute = groups * (moves + runs * system.drain)
    clocks = max(fetch, compute) if system.overlap else fetch + compute
    macs = groups * m * n * depth
    return Layer(
        name,
        macs,
        clocks,
        macs / max(groups * moves * system.rows * system.cols * lanes, 1),
        outside,
        buffer,
        groups * moves * system.rows * system.cols * 2 * bits["state"],
    )


@dataclass(frozen=True)
class Whole:
    """A net.

    Args:
        system: the assumptions.
        layers: of one input.
        integer: the same with words of 8 bits and accumulators of 32, the int8 net beside.
        energy: of the elements, in its own unit; None where it was not asked for.
    """

    system: System
    layers: list[Layer]
    integer: list[Layer]
    energy: Energy | None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        found: dict[str, Any] = {
            "assumptions": dataclasses.asdict(self.system),
            **self._sums(self.layers),
            "layers": [dataclasses.asdict(layer) for layer in self.layers],
            "baselines": {"int8, 32-bit": self._sums(self.integer)},
        }
        if self.energy is not None:
            found["compute"] = {
                "unit": "switched transistor gates an input",
                "total": round(self.energy.per_product * sum(layer.macs for layer in self.layers)),
                "note": "another unit than memory_pj: never to be added to it",
            }
        return found

    def _sums(self, found: list[Layer]) -> dict[str, Any]:
        outside, buffer = _sum([layer.outside for layer in found]), _sum([layer.buffer for layer in found])
        system = self.system
        pj = {
            "outside": round(sum(outside.values()) * system.outside_pj_per_bit, 1),
            "buffer": round(sum(buffer.values()) * system.buffer_pj_per_bit, 1),
        }
        macs = sum(layer.macs for layer in found)
        moves = sum(layer.macs / layer.utilisation for layer in found if layer.utilisation)
        return {
            "macs": macs,
            "clocks": sum(layer.clocks for layer in found),
            "utilisation": round(macs / moves, 4) if moves else 0.0,
            "traffic_bits": {
                "outside": outside,
                "buffer": buffer,
                "element_accumulators": sum(layer.element for layer in found),
                "partial_sums_moved": 0,
            },
            "memory_pj": pj | {"total": round(sum(pj.values()), 1)},
        }

    def text(self) -> str:
        """For people."""
        data = self.to_dict()
        s = self.system
        lines = [
            f"one input on an array of {s.rows} x {s.cols} elements, buffers of {s.a_tiles} row and {s.w_tiles} column "
            "tiles",
            f"{'layer':<24} {'MACs':>12} {'clocks':>10} {'use':>6} {'outside, bits':>14} {'buffers, bits':>14}",
        ]
        lines += [
            f"{x.name:<24} {x.macs:>12} {x.clocks:>10} {x.utilisation:>6.1%} {sum(x.outside.values()):>14} "
            f"{sum(x.buffer.values()):>14}"
            for x in self.layers
        ]
        for name, sums in (("all", data), ("int8, 32-bit", data["baselines"]["int8, 32-bit"])):
            t = sums["traffic_bits"]
            lines.append(
                f"{name:<24} {sums['macs']:>12} {sums['clocks']:>10} {sums['utilisation']:>6.1%} "
                f"{sum(t['outside'].values()):>14} {sum(t['buffer'].values()):>14}   "
                f"memories {sums['memory_pj']['total'] / 1000:.1f} nJ"
            )
        lines.append(f"memories: {s.technology}; {s.citation}")
        if self.energy is not None:
            e = self.energy.to_dict()
            lines.append(
                f"elements: {e['per_mac']} {e['unit']} ({e['glitches']:.0%} of the gates' changes are glitches), "
                + ", ".join(f"{name} {value}" for name, value in e["baselines"].items())
            )
            lines.append("the two are of different units and are not added")
        return "\n".join(lines)


def _sum(parts: list[Mapping[str, int]]) -> dict[str, int]:
    return {name: sum(part[name] for part in parts) for name in (parts[0] if parts else ())}


def _layer(node: g.Gemm | g.Conv, x: Words, system: System, integer: bool) -> Layer:
    plan = node.plan
    accumulate = plan.datapath.accumulate
    state = accumulate.bits + 1
    if plan.datapath.is_linear:
        state = plan.datapath.linear.bits * plan.datapath.linear.bins
    bits = {"a": plan.activation.bits, "w": plan.weight.bits, "out": plan.output.bits, "state": state}
    # a bias, and two small integers of scale and offset
    bits["channel"] = accumulate.bits + 1 + 24
    if integer:
        bits = {"a": INTEGER_BITS, "w": INTEGER_BITS, "out": INTEGER_BITS, "state": 32, "channel": 32 + 32}
    depth = int(np.prod(node.words.shape[1:]))
    groups = 1 if isinstance(node, g.Gemm) else node.groups
    if isinstance(node, g.Gemm):
        m = x[0].size // x.shape[-1]
        inputs = x[0].size
    else:
        m = len(patches(node, x[:1])[0][0])
        inputs = x[0].size // groups
    return count(node.name, m, len(node.words) // groups, depth, inputs, bits, system, accumulate.lanes, groups)


def _streams(node: g.Gemm | g.Conv, x: Words, steps: int, streams: int, seed: int) -> Stream:
    """Operands of a layer in the order in which an element sees them: random outputs, from their first product on."""
    random = np.random.default_rng(seed)
    groups = 1 if isinstance(node, g.Gemm) else node.groups
    rows = [x.reshape(-1, x.shape[-1])] if isinstance(node, g.Gemm) else patches(node, x)[0]
    weights = node.words.reshape(len(node.words), -1)
    channels = random.integers(0, len(weights), streams)
    each = len(weights) // groups
    # short products one after another, so that every stream is as long
    depth = weights.shape[1]
    a = np.empty((steps, streams), dtype=rows[0].dtype)
    w = np.empty((steps, streams), dtype=weights.dtype)
    for i, channel in enumerate(channels):
        group = rows[channel // each]
        for start in range(0, steps, depth):
            size = min(depth, steps - start)
            a[start : start + size, i] = group[random.integers(0, len(group)), :size]
            w[start : start + size, i] = weights[channel, :size]
    return Stream(node.plan, channels, a, w)


def whole(
    artifact: Artifact,
    inputs: npt.NDArray[Any],
    *,
    system: System | None = None,
    with_energy: bool = True,
    steps: int = 32,
    streams: int = 64,
) -> Whole:
    """Count a net on the array, and measure its elements under its own operands.

    Args:
        inputs: [batch, …]; operands are taken from them.
        with_energy: also simulate netlists; needs Yosys.
        steps, streams: operands of each layer.

    Raises:
        BadValueError: the net has no matrix product or convolution, or there is no input.
        MissingDependencyError: no Yosys.
    """
    system = system or System.load()
    nodes = layers(artifact.graph)
    if not nodes:
        raise BadValueError(f"{artifact.where} has no matrix product or convolution: there is nothing to count")
    if not len(inputs):
        raise BadValueError("operands are taken from inputs: at least one is needed")
    seen: dict[str, Words] = {}
    wanted = {node.inputs[0] for node in nodes}

    def visit(name: str, words: Words) -> None:
        if name in wanted:
            seen[name] = words

    g.run_reference(artifact.graph, inputs, visit=visit)
    made = [[_layer(node, seen[node.inputs[0]], system, integer) for node in nodes] for integer in (False, True)]
    found = None
    if with_energy:
        taken = [_streams(node, seen[node.inputs[0]], steps, streams, i) for i, node in enumerate(nodes)]
        weights = [layer.macs for layer in made[0]]
        found = energy(taken, operands=f"the net's own, {streams} outputs a layer", weights=weights)
    return Whole(system, made[0], made[1], found)
