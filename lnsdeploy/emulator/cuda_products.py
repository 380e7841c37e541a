"""Which GPU kernel computes a product, and the tables and numbers that it is given (lnsdeploy/kernels/products.cu).

Everything here is integers about a layer's datapath and formats: no tensor, no device. A kernel is chosen only where it
is proven to give the datapath's bits: tables are complete, sums fit their integers, and a limit is left out only where
no sequence of words reaches it. What no fast kernel takes is computed by the general ones (general.cu).
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from dataclasses import dataclass, field
from functools import lru_cache
from math import lcm
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.datapath import LinearAccumulator
from lnsdeploy.delta import DeltaTables
from lnsdeploy.emulator import operands, reference
from lnsdeploy.emulator.nvrtc import Program
from lnsdeploy.emulator.plan import DotPlan
from lnsdeploy.errors import BadValueError, UnsupportedError

Array = npt.NDArray[Any]

TABLE, FLOAT, MITCHELL, BINS, PAIR, LOG = range(1, 7)
FAMILIES = {TABLE: "table", FLOAT: "fp32", MITCHELL: "mitchell", BINS: "bins", PAIR: "pair", LOG: "log"}
WRAP, SATURATE, LANES = range(3)
ENTRY, HIGH, LOW = 1, 2, 4
_INT32 = (1 << 31) - 1
# Keys of products.cu stay well below its key of zero, 2^28.
_MAX_KEY = 1 << 26
# Entries of one table: more take longer to copy than they save.
_MAX_TABLE = 1 << 24
_MAX_BINS = 16
_MAX_DEPTH_OF_LANES = 64


@dataclass(frozen=True)
class Side:
    """Words of an operand or a result: bits, signed, and what codes are multiplied by (spec 3.2)."""

    bits: int
    signed: bool
    widen: int = 1

    @property
    def max_code(self) -> int:
        """The largest code."""
        return (1 << (self.bits - int(self.signed))) - 1

    @property
    def sign_bit(self) -> int:
        """The sign's weight; 0 if unsigned."""
        return 1 << (self.bits - 1) if self.signed else 0

    @property
    def bytes(self) -> int:
        """Of a word in memory."""
        return 1 if self.bits <= 8 else 2


@dataclass(frozen=True, eq=False)
class Layer:
    """A layer but for its weights: what `lns_dot_desc` of the native library holds (native/lnsdeploy.h)."""

    activation: Side
    weight: Side
    output: Side
    underflow_min: bool
    groups: int
    channels: int
    lanes: int
    acc_bits: int
    bias: Array
    code_shift: Array
    # linear
    psum_bits: int = 0
    saturate: bool = False
    terms: Array = field(default_factory=lambda: np.zeros((0, 0), dtype=np.int64))
    constants: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    thresholds: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    # log
    guard_bits: int = 0
    delta_plus: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    delta_minus: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int32))
    entry_shift: Array = field(default_factory=lambda: np.zeros(0, dtype=np.int64))
    # linear: what all of its tables follow from, if that is known
    key: tuple[Any, ...] | None = None

    @property
    def linear(self) -> bool:
        """Whether it accumulates in the linear domain."""
        return self.terms.size > 0

    @property
    def max_product_code(self) -> int:
        """The largest P (spec 3.1)."""
        a, w = self.activation, self.weight
        return a.max_code * a.widen + w.max_code * w.widen

    def check(self) -> None:
        """Refuse what the kernels' integers do not hold.

        Raises:
            BadValueError, UnsupportedError: the message says what.
        """
        for side, name in ((self.activation, "activations"), (self.weight, "weights"), (self.output, "output")):
            if not 2 <= side.bits <= 16:
                raise UnsupportedError(f"{name}: GPU kernels have words of 2 to 16 bits, not {side.bits}")
        if self.groups < 1 or self.channels % self.groups:
            raise BadValueError(f"{self.channels} channels do not divide into {self.groups} groups")
        arrays = [("bias", self.bias, 62), ("code_shift", self.code_shift, 56)]
        if not self.linear:
            arrays.append(("entry_shift", self.entry_shift, 50))
        for name, values, bits in arrays:
            if values.shape != (self.channels,):
                raise BadValueError(f"{name} has shape {values.shape}, not ({self.channels},)")
            if values.size and int(np.abs(values).max()) > 1 << bits:
                raise UnsupportedError(f"{name} has an entry beyond 2^{bits}")


def layer_of(plan: DotPlan, channels: int, groups: int, bias: Array | None) -> Layer:
    """The layer of a plan.

    Raises:
        UnsupportedError: beyond the kernels' integers.
    """
    accumulator = plan.datapath.accumulate
    common: dict[str, Any] = {
        "activation": Side(plan.activation.bits, plan.activation.signed, plan.widen_activation),
        "weight": Side(plan.weight.bits, plan.weight.signed, plan.widen_weight),
        "output": Side(plan.output.bits, plan.output.signed),
        "underflow_min": plan.datapath.underflow == "min",
        "groups": groups,
        "channels": channels,
        "lanes": accumulator.lanes,
        "acc_bits": accumulator.bits,
    }
    if isinstance(accumulator, LinearAccumulator):
        made = operands.linear_tables(plan, channels, bias)
        common |= {"psum_bits": accumulator.step_bits, "saturate": accumulator.overflow == "saturate"}
    else:
        made = operands.log_tables(plan, channels, bias)
        common |= {"guard_bits": accumulator.guard_bits}
    common |= {**made, "bias": made["bias"].astype(np.int64)}
    if plan.datapath.is_linear:
        common |= {"key": (plan.datapath.fingerprint, plan.activation, plan.weight, plan.lsb)}
    layer = Layer(**common)
    layer.check()
    return layer


@dataclass(frozen=True)
class Tile:
    """Results of a thread (m, n), threads of a block (n, m), and the depth of a tile."""

    tm: int
    tn: int
    tx: int
    ty: int
    depth: int
    # of the time that the largest needs, per result: for choosing, not for bits
    speed: float = 1.0

    @property
    def m(self) -> int:
        """Rows of a block."""
        return self.tm * self.ty

    @property
    def n(self) -> int:
        """Columns of a block."""
        return self.tn * self.tx

    @property
    def threads(self) -> int:
        """Of a block."""
        return self.tx * self.ty

    def shared(self) -> int:
        """Bytes of shared memory beside the tables: offsets of rows, shifts of columns, keys, counts."""
        words = -(-self.m // 4) * 4 + -(-self.n // 4) * 4 + self.depth * (self.m + 4 + self.n + 4) + 4
        return 4 * words


TILES = {
    "128x128": Tile(8, 8, 16, 16, 8),
    "128x64": Tile(8, 4, 16, 16, 8, 0.93),
    "64x64": Tile(4, 4, 16, 16, 8, 0.85),
    "32x32": Tile(4, 4, 8, 8, 8, 0.6),
    "16x16": Tile(2, 2, 8, 8, 16, 0.3),
}
# Accumulators of 64 bits take two registers.
_WIDE_TILES = ("128x64", "64x64", "32x32", "16x16")
_LANES_TILES = ("64x64", "16x16")
_BINS_TILES = ("64x64", "32x32", "16x16")


@dataclass(frozen=True, eq=False)
class Choice:
    """A kernel for a layer.

    Args:
        family: of products.cu, or None for the general kernels.
        macros: what it is compiled with, but for the tile.
        tiles: names of tiles that it may have.
        depth: a tile's depth, if the datapath decides it.
        shared: bytes of its tables in shared memory, without what each of a block's threads adds.
        thread_shared: bytes that each result of a thread adds.
        arrays: `table`, `table2`, `a_values`, `w_values`, where it has them; an `entry_shift` in place of the layer's.
        numbers: the kernel's numbers.
    """

    family: int | None
    macros: dict[str, int]
    tiles: tuple[str, ...]
    arrays: dict[str, Array]
    numbers: tuple[int, ...] = ()
    shared: int = 0
    thread_shared: int = 0
    depth: int = 0
    # arrays by device, for layers that share the kernel
    uploaded: dict[Any, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """For people: the family, and what sets its variants apart."""
        if self.family is None:
            return "general"
        parts = [FAMILIES[self.family]]
        if self.family in (PAIR, LOG):
            if self.family == LOG:
                found = [name for bit, name in ((ENTRY, "entry"), (HIGH, "high"), (LOW, "low")) if self.clamps & bit]
                parts += ["direct" if self.macros["LNS_DIRECT"] else "indexed", *found]
        else:
            parts += [("wrap", "saturate", "lanes")[self.macros["LNS_MODE"]]]
            parts += ["64"] if self.macros["LNS_WIDE"] else []
        if self.family not in (FLOAT, MITCHELL):
            parts.append(f"x{self.macros['LNS_COPIES']}" if self.macros["LNS_COPIES"] else "global")
        return "-".join(parts)

    @property
    def clamps(self) -> int:
        """LNS_CLAMPS."""
        return self.macros["LNS_CLAMPS"]

    def tile(self, name: str) -> Tile:
        """A tile, with the depth that the datapath needs."""
        tile = TILES[name]
        if not self.depth:
            return tile
        return Tile(tile.tm, tile.tn, tile.tx, tile.ty, self.depth, tile.speed)

    def shared_bytes(self, tile: Tile) -> int:
        """Of a block."""
        return self.shared + self.thread_shared * tile.tm * tile.tn * tile.threads + tile.shared()

    def program(self, tile: Tile, shared_memory: int, *, depth_fast: bool) -> Program:
        """The text and macros of the kernel with a tile."""
        # registers for two blocks of 256 threads, unless shared memory holds one only
        blocks = max(min(2 * 256 // tile.threads, 8), 1)
        while blocks > 1 and blocks * (self.shared_bytes(tile) + 1024) > shared_memory + 1024:
            blocks -= 1
        # those that need more registers than that
        if (self.family == LOG and self.clamps == ENTRY | HIGH | LOW) or self.macros["LNS_WIDE"]:
            blocks = max(blocks // 2, 1)
        macros = {
            "LNS_FAMILY": self.family or 0,
            **self.macros,
            "LNS_TM": tile.tm,
            "LNS_TN": tile.tn,
            "LNS_TX": tile.tx,
            "LNS_TY": tile.ty,
            "LNS_BK": tile.depth,
            "LNS_BLOCKS": blocks,
            "LNS_DEPTH_FAST": int(depth_fast),
        }
        return Program("products.cu", tuple(macros.items()))

    def best_tile(self, m: int, n: int, groups: int, multiprocessors: int, shared_memory: int) -> Tile:
        """The tile that finishes first, by how many blocks fill the multiprocessors, and how much of them is used."""
        best, least = self.tile(self.tiles[-1]), float("inf")
        for name in self.tiles:
            tile = self.tile(name)
            if self.shared_bytes(tile) > shared_memory:
                continue
            blocks = -(-m // tile.m) * -(-n // tile.n) * groups
            waves = -(-blocks // multiprocessors)
            time = waves * tile.m * tile.n / tile.speed
            if time < least:
                best, least = tile, time
        return best


_choices: OrderedDict[Any, Choice] = OrderedDict()
_choices_lock = threading.Lock()


def choose(layer: Layer, shared_memory: int) -> Choice:
    """The fastest kernel that is proven to give a layer's bits.

    Args:
        layer: what it computes.
        shared_memory: bytes of shared memory that a block may have.
    """
    key = None if layer.key is None else (*layer.key, shared_memory)
    with _choices_lock:
        if key in _choices:
            return _choices[key]
    made = None
    for attempt in (_table, _float, _bins, _table_anywhere) if layer.linear else (_pair, _log):
        made = made or attempt(layer, shared_memory)
    made = made or general(layer)
    if key is not None:
        with _choices_lock:
            _choices[key] = made
            while len(_choices) > 64:
                _choices.popitem(last=False)
    return made


def general(layer: Layer) -> Choice:
    """The kernel that computes every layer."""
    arrays = {"table": np.ascontiguousarray(layer.terms, dtype=np.int64)} if layer.linear else {}
    return Choice(None, {}, (), arrays)


# ---------------------------------------------------------------------------------------------------
# Linear accumulation


def _macros(mode: int, *, wide: bool = False, copies: int = 0, lanes: int = 1) -> dict[str, int]:
    return {"LNS_MODE": mode, "LNS_WIDE": int(wide), "LNS_COPIES": copies, "LNS_LANES": lanes}


def _mode(layer: Layer) -> int:
    """What a step does, or rather what of it can be left to the end."""
    if layer.saturate:
        return SATURATE if layer.lanes == 1 else LANES
    # fitting to more bits than the accumulator's changes nothing that is kept, and one term's fit is in the table
    return WRAP if layer.psum_bits >= layer.acc_bits or layer.lanes == 1 else LANES


def _lanes_depth(layer: Layer) -> int | None:
    """The depth of tiles that steps do not cross, or None where that is too deep."""
    depth = lcm(layer.lanes, 4)
    while depth < 8:
        depth *= 2
    return depth if depth <= _MAX_DEPTH_OF_LANES else None


def _blocks(layer: Layer) -> int:
    return 1 + int(layer.activation.signed) + int(layer.weight.signed)


def _signed_terms(layer: Layer, terms: Array) -> Array:
    """Terms by sum of block keys (products.cu, block_key): entry 0, then one block for each number of minus signs."""
    block = layer.max_product_code
    table = np.zeros(_blocks(layer) * block + 1, dtype=np.int64)
    for minuses in range(_blocks(layer)):
        table[minuses * block + 2 : (minuses + 1) * block + 1] = terms[2:] if minuses % 2 == 0 else -terms[2:]
    return table


def _single_terms(layer: Layer) -> Array:
    """Terms by sum of block keys, fitted where a step has one term."""
    table = _signed_terms(layer, layer.terms[0])
    if layer.lanes == 1:
        table = fitted(table, layer.psum_bits, layer.saturate)
    return table


def fitted(values: Array, bits: int, saturate: bool) -> Array:
    """Integers fitted to a width (spec 4.4)."""
    limit = (1 << (bits - 1)) - 1
    return operands._fitted(values, bits, "saturate" if saturate else "wrap", limit)


def _fits_32(layer: Layer, mode: int, table: Array) -> bool:
    """Whether accumulators of 32 bits do."""
    if mode == WRAP:
        return layer.acc_bits <= 32
    if mode == SATURATE:
        return layer.acc_bits <= 30
    largest = int(np.abs(table).max(initial=0)) * layer.lanes
    return largest + (1 << max(layer.acc_bits, layer.psum_bits)) <= _INT32


def _copies(entries: int, size: int, shared_memory: int, most: int = 32) -> int:
    """How many copies of a table fit."""
    largest_tile = max(tile.shared() for tile in TILES.values())
    copies = most
    while copies and entries * size * copies + 16 + largest_tile > shared_memory:
        copies //= 2
    return copies


def _table(layer: Layer, shared_memory: int, *, anywhere: bool = False) -> Choice | None:
    entries = _blocks(layer) * layer.max_product_code + 1
    if layer.terms.shape[0] != 1 or entries > _MAX_TABLE:
        return None
    mode = _mode(layer)
    depth = _lanes_depth(layer) if mode == LANES else 0
    if depth is None:
        return None
    table = _single_terms(layer)
    if mode == SATURATE:
        # a term of twice the limit takes any sum to the limit
        most = 2 * ((1 << (layer.acc_bits - 1)) - 1)
        table = np.clip(table, -most, most)
    wide = not _fits_32(layer, mode, table)
    size = 8 if wide else 4
    copies = _copies(entries, size, shared_memory, 16 if wide else 32)
    if copies < (16 if wide else 32) and not anywhere:
        return None
    if entries * size * max(copies, 1) >= 1 << 27:
        return None
    # of sums that wrap, only the accumulator's bits are kept
    kept = table if wide else ((table + (1 << 31)) & ((1 << 32) - 1)) - (1 << 31)
    return Choice(
        TABLE,
        _macros(mode, wide=wide, copies=copies, lanes=layer.lanes if mode == LANES else 1),
        _LANES_TILES if mode == LANES else _WIDE_TILES if wide else tuple(TILES),
        {"table": kept.astype(np.int64 if wide else np.int32)},
        (layer.max_product_code,),
        -(-entries * size * copies // 16) * 16,
        depth=depth,
    )


def _table_anywhere(layer: Layer, shared_memory: int) -> Choice | None:
    return _table(layer, shared_memory, anywhere=True)


@dataclass(frozen=True, eq=False)
class Structure:
    """terms[γ·q + r] = ⌊s_r·2^(q + exponent)⌋, with s_r either 2^(r/γ) rounded to `bits` bits, or 1 + r/γ."""

    mitchell: bool
    f: int
    bits: int
    exponent: int
    base: Array


def _rounded(x: Array, bits: int) -> Array:
    """float32 significands rounded half up to `bits` bits, as the kernels do it: with integers."""
    return ((x.view(np.int32) + _round_add(bits)) & np.int32(_round_mask(bits))).view(np.float32)


def _round_add(bits: int) -> int:
    return 1 << (22 - bits) if bits < 23 else 0


def _round_mask(bits: int) -> int:
    return -(1 << (23 - bits))


@lru_cache(maxsize=64)
def _products_are_exact(f: int, bits: int) -> bool:
    """Whether rounded products of two float32 powers depend on the sum of remainders alone: all γ² pairs are tried."""
    gamma = 1 << f
    base = _powers(f)
    once = _rounded(base, bits)
    wanted = np.concatenate([once, 2 * once])
    sums = np.add.outer(np.arange(gamma), np.arange(gamma))
    return bool(np.array_equal(_rounded(np.multiply.outer(base, base), bits), wanted[sums]))


@lru_cache(maxsize=16)
def _powers(f: int) -> Array:
    return np.exp2(np.arange(1 << f) / (1 << f)).astype(np.float32)


def _structure(terms: Array) -> Structure | None:
    """How terms [P + 1] follow from their codes, if they do in one of two ways."""
    largest = len(terms) - 1
    codes = np.arange(2, largest + 1)
    for f in range(13):
        gamma = 1 << f
        top = largest >> f
        if not 1 <= top <= 120:
            continue
        one = int(terms[gamma * top])
        if one < 1 or one & (one - 1):
            continue
        exponent = one.bit_length() - 1 - top
        remainders, octaves = codes & (gamma - 1), (codes >> f) + exponent

        def agrees(significands: Array, r: Array = remainders, q: Array = octaves) -> bool:
            values = np.ldexp(significands.astype(np.float64)[r], q)
            if values.max(initial=0) >= 1 << 31:
                return False
            return bool(np.array_equal(values.astype(np.int64), terms[2:]))

        if agrees(1 + np.arange(gamma) / gamma):
            return Structure(True, f, 0, exponent, _powers(f))
        for bits in range(24):
            if agrees(_rounded(_powers(f), bits)) and _products_are_exact(f, bits):
                return Structure(False, f, bits, exponent, _powers(f))
    return None


_structures: OrderedDict[tuple[int, bytes], Structure | None] = OrderedDict()
_structures_lock = threading.Lock()


def _structure_of(layer: Layer) -> Structure | None:
    terms = np.ascontiguousarray(layer.terms[0])
    key = len(terms), hashlib.sha256(terms.tobytes()).digest()
    with _structures_lock:
        if key in _structures:
            return _structures[key]
    found = _structure(terms)
    with _structures_lock:
        _structures[key] = found
        while len(_structures) > 256:
            _structures.popitem(last=False)
    return found


def _float(layer: Layer, shared_memory: int) -> Choice | None:
    if layer.terms.shape[0] != 1:
        return None
    mode = _mode(layer)
    depth = _lanes_depth(layer) if mode == LANES else 0
    largest = int(layer.terms.max(initial=0))
    limit = (1 << (layer.acc_bits - 1)) - 1
    # terms come out as they are: none may need fitting, and no sum leave 32 bits unless it may wrap
    if largest > _INT32 or depth is None or not _fits_32(layer, mode, layer.terms):
        return None
    if layer.lanes == 1 and largest > (1 << (layer.psum_bits - 1)) - 1 and (layer.saturate or mode != WRAP):
        return None
    if mode == WRAP and layer.psum_bits < layer.acc_bits:
        return None
    if mode == SATURATE and largest + limit > _INT32:
        return None
    found = _structure_of(layer)
    if found is None:
        return None
    keys = _mitchell_keys(layer, found) if found.mitchell else _float_keys(layer, found)
    if keys is None:
        return None
    return Choice(
        MITCHELL if found.mitchell else FLOAT,
        _macros(mode, lanes=layer.lanes if mode == LANES else 1),
        _LANES_TILES if mode == LANES else tuple(TILES),
        keys,
        (0, 0, _round_add(found.bits), _round_mask(found.bits)),
        depth=depth,
    )


def _by_word(side: Side) -> tuple[Array, Array]:
    """Widened codes and signs of every word."""
    words = np.arange(1 << side.bits)
    codes = words & side.max_code
    return codes * side.widen, (words & side.sign_bit != 0) & (codes > 0)


def _float_keys(layer: Layer, s: Structure) -> dict[str, Array] | None:
    # the exponents of both sides stay in the middle of float32's
    middle = (layer.activation.max_code * layer.activation.widen >> s.f) // 2
    made = {}
    for name, side, exponent in (
        ("a_values", layer.activation, -middle),
        ("w_values", layer.weight, s.exponent + middle),
    ):
        codes, minus = _by_word(side)
        powers = (codes >> s.f) + exponent
        used = powers[codes > 0]
        if used.size and (int(used.min()) < -126 or int(used.max()) > 126):
            return None
        values = np.ldexp(s.base[codes & ((1 << s.f) - 1)], powers.astype(np.int32)).astype(np.float32)
        values[codes == 0] = 0
        made[name] = np.where(minus, -values, values).astype(np.float32).view(np.int32)
    return made


def _mitchell_keys(layer: Layer, s: Structure) -> dict[str, Array] | None:
    # exponents 64 and 63 + exponent: a sum has 127 + exponent, and with a zero, less than 127
    made = {}
    octaves = [side.max_code * side.widen >> s.f for side in (layer.activation, layer.weight)]
    highest = 127 + s.exponent + (layer.max_product_code >> s.f)
    if 63 + s.exponent < 1 or highest > 254 or 64 + octaves[0] > 126 or 63 + s.exponent + octaves[1] > 126:
        return None
    for name, side, exponent in (("a_values", layer.activation, 64), ("w_values", layer.weight, 63 + s.exponent)):
        codes, minus = _by_word(side)
        bits = (exponent << 23) + (codes << (23 - s.f)) + np.where(minus, 1 << 31, 0)
        made[name] = np.where(codes > 0, bits, 0).astype(np.uint32).view(np.int32)
    return made


def _bins(layer: Layer, shared_memory: int) -> Choice | None:
    bins = layer.terms.shape[0]
    mode = _mode(layer)
    entries = _blocks(layer) * layer.max_product_code + 1
    if not 2 <= bins <= _MAX_BINS or mode == LANES or entries > _MAX_TABLE:
        return None
    used = layer.terms != 0
    if (used.sum(axis=0) > 1).any() or int(layer.terms.min()) < 0:
        return None
    if layer.acc_bits > (26 if mode == SATURATE else 32):
        return None
    bin_of = used.argmax(axis=0)
    terms = fitted(_signed_terms(layer, layer.terms.max(axis=0)), layer.psum_bits, layer.saturate)
    if mode == SATURATE:
        most = 2 * ((1 << (layer.acc_bits - 1)) - 1)
        terms = np.clip(terms, -most, most)
    if int(np.abs(terms).max(initial=0)) >= 1 << 27:
        return None
    table = 16 * terms + np.abs(_signed_terms(layer, bin_of))
    tiles = [
        name for name in _BINS_TILES if bins * 4 * TILES[name].tm * TILES[name].tn * TILES[name].threads <= 1 << 17
    ]
    rest = shared_memory - max(bins * 4 * TILES[n].tm * TILES[n].tn * TILES[n].threads for n in tiles)
    copies = _copies(entries, 4, rest)
    tiles = [name for name in tiles if TILES[name].shared() < shared_memory]
    return Choice(
        BINS,
        _macros(mode, copies=copies),
        tuple(tiles),
        {"table": table.astype(np.int32)},
        (layer.max_product_code,),
        -(-entries * 4 * copies // 16) * 16,
        4 * bins,
    )


# ---------------------------------------------------------------------------------------------------
# Log accumulation


@lru_cache(maxsize=16)
def _pairs(delta: tuple[bytes, bytes], bits: int) -> Array:
    """The sum of every accumulator word [256] and entered word [256], sign · 128 + code (spec 5.2, 5.3)."""
    words = np.arange(256)
    codes, signs = words & 127, (words & 128 != 0) & (words & 127 != 0)
    tables = DeltaTables(*(np.frombuffer(table, dtype=np.int32).astype(np.int64) for table in delta))
    shape = 256, 256
    x, x_signs = np.broadcast_to(codes[:, None], shape), np.broadcast_to(signs[:, None], shape)
    total, minus = reference.log_add(x, x_signs, x.T, x_signs.T, tables, (1 << bits) - 1)
    return (total + 128 * minus).astype(np.uint8)


def _pair(layer: Layer, shared_memory: int) -> Choice | None:
    if layer.lanes != 1 or layer.acc_bits > 7 or not layer.channels:
        return None
    largest = (1 << layer.acc_bits) - 1
    first, last = int(layer.entry_shift.min()), int(layer.entry_shift.max())
    base = first + 1  # products' codes begin at 2
    block = layer.max_product_code + last - base
    entries = _blocks(layer) * block + 1
    if block > 1 << 16:
        return None
    copies = _copies(entries, 4, shared_memory - 65536)
    if not copies:
        return None
    codes = (np.arange(block + 1) + base) << layer.guard_bits
    entered = np.where(codes < 1, 0, np.minimum(codes, largest))
    table = np.zeros(entries, dtype=np.int32)
    for minuses in range(_blocks(layer)):
        sign = np.where(entered[1:] > 0, 128 * (minuses % 2), 0)
        table[minuses * block + 1 : (minuses + 1) * block + 1] = entered[1:] + sign
    delta = layer.delta_plus.astype(np.int32).tobytes(), layer.delta_minus.astype(np.int32).tobytes()
    return Choice(
        PAIR,
        _macros(WRAP, copies=copies) | {"LNS_CLAMPS": 0, "LNS_DIRECT": 0},
        tuple(TILES),
        {
            "table": table,
            "table2": _pairs(delta, layer.acc_bits),
            # so that every sum of nonzero codes is at least 1
            "entry_shift": (layer.entry_shift - base).astype(np.int64),
        },
        (block,),
        65536 + -(-entries * 4 * copies // 16) * 16,
    )


def largest_sum(first: int, product: int, delta_plus: Array, steps: int, limit: int) -> int:
    """A bound of what an accumulator's code can grow to in so many steps, not followed beyond `limit` + 1.

    Args:
        first: its largest first value.
        product: the largest code of a product.
        delta_plus: Δ⁺.
    """
    # a sum of codes x and y ≤ product is at most x + the largest Δ⁺ from d = x − product on, if x is the larger
    reach = np.maximum.accumulate(delta_plus[::-1].astype(np.int64))[::-1] if delta_plus.size else np.zeros(0, np.int64)
    best = product + np.arange(len(reach)) + reach
    best = np.maximum.accumulate(best) if best.size else best
    largest = max(first, product)
    for _ in range(steps):
        d = largest - product
        # any smaller accumulator may grow more
        grown = max(largest, int(best[min(d, len(best) - 1)])) if best.size else largest
        if grown > limit:
            return limit + 1
        if grown == largest:
            break
        largest = grown
    return largest


def _log(layer: Layer, shared_memory: int, depth: int = 1 << 20) -> Choice | None:
    if layer.lanes != 1 or not layer.channels:
        return None
    guard, limit = layer.guard_bits, (1 << layer.acc_bits) - 1
    shifts = int(layer.entry_shift.min()), int(layer.entry_shift.max())
    low, high = (2 + shifts[0]) << guard, (layer.max_product_code + shifts[1]) << guard
    plus, minus = layer.delta_plus.astype(np.int64), layer.delta_minus.astype(np.int64)
    count = max(len(plus), len(minus), 1)
    most = max(int(plus.max(initial=0)), int(minus[1:].max(initial=0)))
    clamps = 0
    if low < 1 or high > limit:
        clamps |= ENTRY
    first = int((layer.bias & limit).max(initial=0))
    if largest_sum(first, min(high, limit), plus, depth, limit) > limit:
        clamps |= HIGH
    # after a step the accumulator is no lower than the product, less Δ⁻
    if max(low, 1) - int(minus[1:].max(initial=0)) < 1:
        clamps |= LOW
    # nothing is above this, whatever the limit
    top = min(limit, max(high, first) + count + most)
    sides = [(layer.weight.max_code * layer.weight.widen + abs(s)) << guard for s in shifts]
    reach = max(abs(low), abs(high), top, first, *sides) + count + most + 8
    reach = max(reach, (layer.activation.max_code * layer.activation.widen) << guard)
    # two copies would save few conflicts of banks, and take the room of a second block
    for direct, all_copies in ((True, (32,)), (False, (32, 16, 8, 4, 1, 0))):
        for copies in all_copies:
            unit = 32 * max(copies, 1)
            entries = 8 * (count + 1) + 8 if direct else 2 * count + 2
            if reach * unit >= _MAX_KEY or _copies(entries, 4, shared_memory) < copies:
                continue
            return Choice(
                LOG,
                _macros(WRAP, copies=copies) | {"LNS_CLAMPS": clamps, "LNS_DIRECT": int(direct)},
                tuple(TILES),
                {"table": _difference_table(plus, minus, count, unit, direct)},
                # the last entry changes nothing
                ((8 * (count + 1) + 3 if direct else 8 * count) * (unit // 8), max(top, 0)),
                -(-entries * 4 * copies // 16) * 16,
            )
    return None


def _difference_table(plus: Array, minus: Array, count: int, unit: int, direct: bool) -> Array:
    """What a difference of keys adds to the larger (products.cu, LNS_LOG)."""
    changes = np.zeros((2, count + 1), dtype=np.int64)
    changes[0, : len(plus)] = plus * unit
    changes[1, : len(minus)] = -minus * unit
    changes[1, 0] = -(1 << 28)  # they cancel
    if not direct:
        # signs differ, then signs are equal
        return np.stack([changes[1], changes[0]], axis=1).reshape(-1).astype(np.int32)
    table = np.zeros(8 * (count + 1) + 8, dtype=np.int64)
    places = np.arange(len(table)) - 3
    # a difference of codes, rounded, and an odd rest where signs differ
    rounded = (places + 3) >> 3
    known = rounded <= count
    table[known] = changes[(places[known] % 2), rounded[known]]
    return table.astype(np.int32)


# ---------------------------------------------------------------------------------------------------
# The encoder of sums


_starts: OrderedDict[bytes, tuple[Array, Array, int]] = OrderedDict()


def raw_starts(thresholds: Array) -> tuple[Array, Array, int]:
    """For the raw code (spec 4.6): thresholds and one that nothing reaches, how many are certain by the leading one and
    the bits after it, and how many bits (native/support.cpp, RawCode)."""
    key = hashlib.sha256(np.ascontiguousarray(thresholds, dtype=np.int64).tobytes()).digest()
    found = _starts.get(key)
    if found is None:
        found = _starts[key] = _raw_starts(thresholds)
        while len(_starts) > 64:
            _starts.pop(next(iter(_starts)), None)
    return found


def _raw_starts(thresholds: Array) -> tuple[Array, Array, int]:
    count = len(thresholds)
    bits = 1
    while bits < 12 and 48 << bits < 2 * count:
        bits += 1
    known = thresholds.astype(np.uint64)
    mantissas = (np.uint64(1) << np.uint64(bits)) + np.arange(1 << bits, dtype=np.uint64)
    rows = []
    for p in range(64):
        # the smallest magnitude with this leading one and these bits, rounded down where it has fewer
        firsts = mantissas << np.uint64(p - bits) if p >= bits else mantissas >> np.uint64(bits - p)
        rows.append(np.searchsorted(known, firsts, side="right"))
    full = np.append(known, np.uint64(0xFFFFFFFFFFFFFFFF))
    return full, np.concatenate(rows).astype(np.int32), bits
