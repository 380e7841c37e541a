"""Energy of a unit from the toggles of its gates under a stream of operands (docs/cost.md).

The netlist that synthesis makes is simulated here, gate by gate with a delay of one for each, so that glitches count;
many streams run side by side in the bits of machine words. Every change of a net is weighed by the transistors whose
gates the net drives. That is a unit of its own, the charge of one transistor's gate: it compares units of one
technology, and says nothing in joules.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.cost import units
from lnsdeploy.cost.synthesis import GATES, run_script
from lnsdeploy.datapath import Datapath
from lnsdeploy.emulator.plan import DotPlan
from lnsdeploy.errors import BadValueError, LNSError
from lnsdeploy.formats import Words, decode, encode
from lnsdeploy.rtl.designs import Design
from lnsdeploy.rtl.parameters import PEParameters, pe_parameters
from lnsdeploy.rtl.simulate import texts_of
from lnsdeploy.rtl.vectors import example_plan

UNIT = "transistor gates charged or discharged a product"
# A pin of a static CMOS gate is the gate of two transistors.
PIN_LOAD = 2
# Transistors of a flip-flop of 16 that its clock drives; both edges of every clock.
CLOCK_LOAD = 8
STREAMS, STEPS = 64, 32

Bits = npt.NDArray[np.uint8]
Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_POPCOUNT = np.array([bin(i).count("1") for i in range(256)], dtype=np.uint8)
_INPUTS: Mapping[str, str] = {
    "$_BUF_": "A",
    "$_NOT_": "A",
    "$_NAND_": "AB",
    "$_NOR_": "AB",
    "$_AND_": "AB",
    "$_OR_": "AB",
    "$_XOR_": "AB",
    "$_XNOR_": "AB",
    "$_AOI3_": "ABC",
    "$_OAI3_": "ABC",
    "$_AOI4_": "ABCD",
    "$_OAI4_": "ABCD",
    "$_MUX_": "ABS",
    "$_NMUX_": "ABS",
}


def _gate(kind: str, pins: Sequence[Any]) -> Any:
    a, b, c, d = (*pins, None, None, None)[:4]
    if kind in ("$_BUF_", "$_NOT_"):
        found = a
    elif kind in ("$_NAND_", "$_AND_"):
        found = a & b
    elif kind in ("$_NOR_", "$_OR_"):
        found = a | b
    elif kind in ("$_XOR_", "$_XNOR_"):
        found = a ^ b
    elif kind == "$_AOI3_":
        found = (a & b) | c
    elif kind == "$_OAI3_":
        found = (a | b) & c
    elif kind == "$_AOI4_":
        found = (a & b) | (c & d)
    elif kind == "$_OAI4_":
        found = (a | b) & (c | d)
    else:
        found = (a & ~c) | (b & c)
    return found if kind in ("$_BUF_", "$_AND_", "$_OR_", "$_XOR_", "$_MUX_") else ~found


@dataclass(frozen=True)
class Toggles:
    """Of a run.

    Args:
        steps: products in all.
        weighted: changes of nets, each times the transistors that the net drives.
        settled: the same where every net changed at most once a clock: without glitches.
        clock: what the clock drives.
        outputs: the output bits after the last step [streams, bits], the highest first.
    """

    steps: int
    weighted: float
    settled: float
    clock: float
    outputs: Bits

    @property
    def energy(self) -> float:
        """Of one product, in :data:`UNIT`."""
        return (self.weighted + self.clock) / self.steps

    @property
    def settled_energy(self) -> float:
        """The same without glitches."""
        return (self.settled + self.clock) / self.steps


class Netlist:
    """A synthesised unit of gates and flip-flops on one clock, ready to be simulated.

    Args:
        text: what Yosys' `write_json` wrote.
        top: the module.

    Raises:
        LNSError: it has cells that are not known.
    """

    def __init__(self, text: str, top: str = "lns_dut"):
        module = json.loads(text)["modules"][top]
        # nets 0 and 1 are constant; a bit that nothing drives is 0
        numbers: dict[Any, int] = {"0": 0, "1": 1, "x": 0, "z": 0}

        def number(bit: Any) -> int:
            return numbers.setdefault(bit, len(numbers) - 2)

        self.ports = {name: [number(bit) for bit in port["bits"]] for name, port in module["ports"].items()}
        by_kind: dict[str, list[list[int]]] = {}
        flip_flops: list[tuple[int, int]] = []
        for cell in module["cells"].values():
            kind, wires = cell["type"], cell["connections"]
            if kind == "$_DFF_P_":
                flip_flops.append((number(wires["D"][0]), number(wires["Q"][0])))
            elif kind in _INPUTS:
                pins = [number(wires[pin][0]) for pin in (*_INPUTS[kind], "Y")]
                by_kind.setdefault(kind, []).append(pins)
            elif kind != "$scopeinfo":
                raise LNSError(f"the netlist has a cell {kind!r} that is not known")
        self.gates = [(kind, np.array(pins, dtype=np.int64)) for kind, pins in sorted(by_kind.items())]
        self.flip_flops = np.array(flip_flops, dtype=np.int64).reshape(-1, 2)
        self.nets = max(numbers.values()) + 1
        self.load = np.zeros(self.nets, dtype=np.int64)
        for _, wired in self.gates:
            np.add.at(self.load, wired[:, :-1], PIN_LOAD)
        np.add.at(self.load, self.flip_flops[:, 0], PIN_LOAD)

    def _settle(self, nets: Any, toggles: Ints | None) -> None:
        """Let every gate follow its inputs, all at once and again, until nothing changes."""
        outputs = np.concatenate([pins[:, -1] for _, pins in self.gates]) if self.gates else np.zeros(0, np.int64)
        for _ in range(len(outputs) + 2):
            made = np.concatenate([_gate(kind, [nets[p] for p in pins[:, :-1].T]) for kind, pins in self.gates])
            change = made ^ nets[outputs]
            if not change.any():
                return
            if toggles is not None:
                toggles[outputs] += _ones(change)
            nets[outputs] = made
        raise LNSError("the netlist does not settle: it has a loop of gates")

    def run(self, inputs: Bits) -> Toggles:
        """Simulate streams side by side, each from cleared registers.

        Args:
            inputs: bits of `in_i` [steps, streams, bits], the highest first; streams a multiple of 64.
        """
        steps, streams, _ = inputs.shape
        if streams % 64:
            raise BadValueError(f"streams must be a multiple of 64, not {streams}")
        nets = np.zeros((self.nets, streams // 64), dtype=np.uint64)
        nets[1] = ~np.uint64(0)
        wires = np.array(self.ports["in_i"][::-1])
        packed = np.ascontiguousarray(np.packbits(inputs.transpose(0, 2, 1), axis=2)).view(np.uint64)
        for name in ("rst_ni", "in_valid_i", "out_ready_i"):
            nets[self.ports[name]] = ~np.uint64(0)
        nets[wires] = packed[0]
        self._settle(nets, None)
        toggles, settled = np.zeros(self.nets, dtype=np.int64), np.zeros(self.nets, dtype=np.int64)
        for step in range(steps):
            before = nets.copy()
            # the clock's edge: registers take what the gates say, and the next operands arrive
            arriving = packed[min(step + 1, steps - 1)]
            taken = nets[self.flip_flops[:, 0]]
            q = self.flip_flops[:, 1]
            toggles[q] += _ones(taken ^ nets[q])
            np.add.at(toggles, wires, _ones(arriving ^ nets[wires]))
            nets[q] = taken
            nets[wires] = arriving
            if step + 1 < steps:
                self._settle(nets, toggles)
                settled += _ones(before ^ nets)
            else:
                settled[q] += _ones(before[q] ^ nets[q])
        out = np.unpackbits(np.ascontiguousarray(nets[self.ports["out_o"][::-1]]).view(np.uint8), axis=1)
        count = steps * streams
        clock = float(2 * CLOCK_LOAD * len(self.flip_flops) * count)
        return Toggles(count, float(toggles @ self.load), float(settled @ self.load), clock, out.T)


def _ones(words: Any) -> Ints:
    counts: Ints = _POPCOUNT[np.ascontiguousarray(words).view(np.uint8)].sum(axis=1, dtype=np.int64)
    return counts


@lru_cache(maxsize=64)
def _netlist(texts: tuple[tuple[str, str], ...]) -> Netlist:
    script = [
        f"read_verilog -sv {' '.join(name for name, _ in texts)}",
        *GATES,
        "write_json net.json",
    ]
    made = run_script("\n".join(script) + "\n", dict(texts), ["net.json"])
    return Netlist(made["net.json"])


def netlist(design: Design) -> Netlist:
    """A design's netlist, as the costs are counted of.

    Raises:
        MissingDependencyError: no Yosys.
        LNSError: it fails.
    """
    return _netlist(tuple(sorted(texts_of(design).items(), key=lambda item: item[0] != "lns_pkg.sv")))


# ---------------------------------------------------------------------------------------------------
# Streams of operands


@dataclass(frozen=True)
class Stream:
    """Operands of many products of one plan, side by side.

    Args:
        plan: theirs, of one output channel each.
        channels: [streams] of the plan, for scales.
        a, w: words [steps, streams].
    """

    plan: DotPlan
    channels: Ints
    a: Words
    w: Words

    @property
    def outputs(self) -> int:
        """Output channels of the plan: the streams need not meet the last of them."""
        return max(int(self.channels.max()) + 1, int(np.asarray(self.plan.weight_offset).size))

    def values(self) -> tuple[Floats, Floats]:
        """What the words mean, each [steps, streams]."""
        plan = self.plan
        offsets = np.broadcast_to(np.asarray(plan.weight_offset, dtype=np.int64), (self.outputs,))
        a = decode(self.a, plan.activation, plan.input_offset, dtype=np.float64)
        plain = decode(self.w, plan.weight, 0, dtype=np.float64)
        w = plain * np.exp2(offsets[self.channels] / plan.weight.gamma)
        return np.asarray(a, dtype=np.float64), np.asarray(w, dtype=np.float64)


def made_up_stream(datapath: Datapath, steps: int = STEPS, streams: int = STREAMS, seed: int = 0) -> Stream:
    """Normally distributed weights, and activations as after a ReLU: half of them zero."""
    random = np.random.default_rng(seed)
    plan = example_plan(datapath)
    limits = [2.0 ** ((f.max_code + o) / f.gamma) for f, o in _formats(plan)]
    a = np.maximum(random.normal(0, limits[0] / 4, (steps, streams)), 0).astype(np.float32)
    w = random.normal(0, limits[1] / 4, (steps, streams)).astype(np.float32)
    words = [
        encode(x, f, o, underflow=datapath.underflow)  # type: ignore[arg-type]
        for x, (f, o) in zip((a, w), _formats(plan), strict=True)
    ]
    return Stream(plan, np.zeros(streams, dtype=np.int64), words[0], words[1])


def _formats(plan: DotPlan) -> list[tuple[Any, int]]:
    return [(plan.activation, plan.input_offset), (plan.weight, int(np.asarray(plan.weight_offset)))]


def _bits(values: Ints, width: int) -> Bits:
    """[steps, streams] as bits [steps, streams, width], the highest first; negative ones in two's complement."""
    shifts = np.arange(width - 1, -1, -1, dtype=np.int64)
    found: Bits = ((values[:, :, None] >> shifts) & 1).astype(np.uint8)
    return found


def lns_inputs(stream: Stream, pe: PEParameters) -> Bits:
    """Records of `units.mac(…, tied=False)`."""
    v = pe.values
    scales = pe.scales(stream.plan, stream.outputs)[stream.channels]
    a, w = stream.a.astype(np.int64), stream.w.astype(np.int64)
    valid = np.ones((*a.shape, 1), dtype=np.uint8)
    scale = np.broadcast_to(scales, a.shape)
    return np.concatenate([valid, _bits(a, v["A_BITS"]), _bits(w, v["W_BITS"]), _bits(scale, v["SCALE_BITS"])], axis=2)


def integer_inputs(values: tuple[Floats, Floats], bits: int) -> Bits:
    """Records of `units.integer_mac`: both operands rounded to integers, the largest magnitude being the largest."""
    most = (1 << (bits - 1)) - 1
    found = [np.ones((*values[0].shape, 1), dtype=np.uint8)]
    for x in values:
        largest = float(np.abs(x).max()) or 1.0
        found.append(_bits(np.rint(x * (most / largest)).astype(np.int64), bits))
    return np.concatenate(found, axis=2)


@lru_cache(maxsize=1)
def _e4m3() -> tuple[Floats, Ints]:
    """Magnitudes of OCP fp8 e4m3 in rising order, and their bytes."""
    codes = np.arange(127)
    exponent, fraction = codes >> 3, codes & 7
    values = np.where(exponent == 0, fraction / 8 * 2.0**-6, (1 + fraction / 8) * np.exp2(exponent - 7.0))
    return values, codes.astype(np.int64)


def fp8_inputs(values: tuple[Floats, Floats]) -> Bits:
    """Records of `units.fp8_mac`: both operands rounded to the nearest number, the largest magnitude to 448."""
    known, codes = _e4m3()
    found = [np.ones((*values[0].shape, 1), dtype=np.uint8)]
    for x in values:
        scaled = np.abs(x) * (known[-1] / (float(np.abs(x).max()) or 1.0))
        at = codes[np.searchsorted((known[1:] + known[:-1]) / 2, scaled)]
        found.append(_bits(at | np.where(x < 0, 128, 0), 8))
    return np.concatenate(found, axis=2)


# ---------------------------------------------------------------------------------------------------
# Energy of a datapath's MAC


@dataclass(frozen=True)
class Energy:
    """Of a scalar MAC under a stream, beside the baselines under the same numbers.

    Args:
        per_product: in :data:`UNIT`.
        clock: the part of it that the registers' clock takes.
        glitches: the share of the gates' changes that a settled net would not have made.
        baselines: per_product of each baseline.
        settled_baselines: the same without glitches.
        operands: where the stream comes from.
        products: of the stream.
    """

    per_product: float
    clock: float
    glitches: float
    baselines: Mapping[str, float]
    settled_baselines: Mapping[str, float]
    operands: str
    products: int

    @property
    def settled(self) -> float:
        """per_product without glitches."""
        return self.clock + (self.per_product - self.clock) * (1 - self.glitches)

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        name = "int8 mac, 32-bit"
        int8, calm = self.baselines.get(name), self.settled_baselines.get(name)
        return {
            "unit": UNIT,
            "per_mac": round(self.per_product, 1),
            "clock": round(self.clock, 1),
            "glitches": round(self.glitches, 3),
            "settled": round(self.settled, 1),
            "relative_to_int8": round(self.per_product / int8, 3) if int8 else None,
            "settled_relative_to_int8": round(self.settled / calm, 3) if calm else None,
            "baselines": {name: round(value, 1) for name, value in self.baselines.items()},
            "settled_baselines": {name: round(value, 1) for name, value in self.settled_baselines.items()},
            "operands": self.operands,
            "products": self.products,
        }


def energy(
    streams: Sequence[Stream],
    *,
    operands: str,
    with_baselines: bool = True,
    weights: Sequence[float] | None = None,
) -> Energy:
    """Energy of a product on the scalar MACs of some streams' plans.

    Args:
        operands: where the streams come from, for people.
        weights: how much each stream counts, say its layer's products; by default all the same.

    The MACs' scale is a port that holds still within a product, as in an array that runs every layer.

    Raises:
        BadValueError: no stream.
        MissingDependencyError: no Yosys.
    """
    if not streams:
        raise BadValueError("an energy needs operands: there is no matrix product to take them from")
    runs: list[Toggles] = []
    beside: dict[str, list[Toggles]] = {}
    for stream in streams:
        pe = pe_parameters([(units.scalar_plan(s.plan), s.outputs) for s in _alike(streams, stream)])
        runs.append(netlist(units.mac_of(pe)).run(lns_inputs(stream, pe)))
        if with_baselines:
            values = stream.values()
            for design, inputs in (
                (units.integer_mac(8, 24), integer_inputs(values, 8)),
                (units.integer_mac(8, 32), integer_inputs(values, 8)),
                (units.integer_mac(4, 24), integer_inputs(values, 4)),
                (units.fp8_mac(), fp8_inputs(values)),
            ):
                beside.setdefault(design.name, []).append(netlist(design).run(inputs))
    share = np.array(weights if weights is not None else [1.0] * len(runs), dtype=float)
    share = share / share.sum()

    def mean(values: Sequence[float]) -> float:
        return float(share @ np.array(values))

    gates = mean([run.weighted / run.steps for run in runs])
    calm = mean([run.settled / run.steps for run in runs])
    return Energy(
        mean([run.energy for run in runs]),
        mean([run.clock / run.steps for run in runs]),
        1 - calm / gates if gates else 0.0,
        {name: mean([run.energy for run in found]) for name, found in beside.items()},
        {name: mean([run.settled_energy for run in found]) for name, found in beside.items()},
        operands,
        sum(run.steps for run in runs),
    )


def _alike(streams: Sequence[Stream], one: Stream) -> list[Stream]:
    from lnsdeploy.rtl.parameters import key_of

    return [stream for stream in streams if key_of(stream.plan) == key_of(one.plan)]
