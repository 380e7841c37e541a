"""A graph of gates in which the analytical model builds a unit: constants folded, equal gates shared, dead ones gone.

Bits are literals: twice a node's number, plus one where it is complemented; 0 and 1 are the constants. Words are lists
of them, the lowest bit first. What is built can be run on numbers too (:meth:`Graph.run`), which is how the tests
know that the model counts gates of the right function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt

Packed = npt.NDArray[np.uint8]
Bits = list[int]

# How far a gate lengthens a path, in levels of nands.
_LEVELS = {"and": 1.0, "xor": 2.0, "mux": 2.0}

# Inputs on which gates are compared before they are taken for the same.
_TRIED = 4096
_ALL = (1 << _TRIED) - 1
# So many of them should have made a gate one before it is taken for constant.
_SEEN = 16


class Graph:
    """Gates of two kinds and multiplexers, each once however often it is asked for.

    Args:
        merge: gates that agree on some thousand adverse inputs are taken for the same, as a synthesiser finds out by
            proof; those of tables, which differ in single entries, are not.
    """

    def __init__(self, *, merge: bool = False) -> None:
        self._merge = merge
        self._random = np.random.default_rng(0)
        self._words: dict[int, npt.NDArray[np.uint8]] = {}
        self._traces: list[int] = [0]
        self._same: dict[int, int] = {0: 0}
        self._gates: list[tuple[str, int, int, int]] = [("input", 0, 0, 0)]
        self._parts: list[str] = [""]
        self._levels: list[float] = [0.0]
        self._known: dict[tuple[str, int, int, int], int] = {}
        self._part, self._table = "", ""

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Gates that are made meanwhile belong to a part of the unit."""
        before, self._part = self._part, name
        yield
        self._part = before

    @contextmanager
    def tables(self) -> Iterator[None]:
        """Gates that are made meanwhile select entries of a table: counted apart."""
        before, self._table = self._table, "table-"
        yield
        self._table = before

    def word(self, bits: int) -> Bits:
        """An input."""
        first = len(self._gates)
        self._gates += [("input", 0, 0, 0)] * bits
        self._parts += [""] * bits
        self._levels += [0.0] * bits
        if self._merge:
            self._traces += [int.from_bytes(row.tobytes(), "big") for row in self._adverse(bits)]
        return [2 * (first + i) for i in range(bits)]

    def _adverse(self, bits: int) -> Packed:
        """What a word is tried with: [bits, _TRIED / 8]. Random, small, close to its limits, or as another word."""
        random = self._random
        values = random.integers(0, 2, (bits, _TRIED), dtype=np.uint8)
        if bits > 1:
            kind = random.integers(0, 12, _TRIED)
            run = random.integers(0, bits + 1, _TRIED)
            places = np.arange(bits)[:, None]
            # a run of zeros or ones from the bottom or the top, or from below the top bit
            running = np.where(kind < 2, places < run, places >= run) & (kind < 6)
            values = np.where(running, (kind & 1).astype(np.uint8), values)
            values[-1] ^= ((kind == 4) | (kind == 5)).astype(np.uint8)
            before = self._words.get(bits)
            if before is not None:
                near = before.copy()
                near[: min(bits, 2)] ^= random.integers(0, 2, (min(bits, 2), _TRIED), dtype=np.uint8) & (kind == 6)
                values = np.where((kind == 6) | (kind == 7), near, values)
            self._words[bits] = values
        packed: Packed = np.packbits(values, axis=1)
        return packed

    def _node(self, kind: str, a: int, b: int, c: int = 0) -> int:
        key = (kind, a, b, c)
        found = self._known.get(key)
        if found is not None:
            return found
        made = 2 * len(self._gates)
        if self._merge:
            trace, told = self._trace(kind, a, b, c)
            flip = trace & 1
            if told and not self._table:
                same = self._same.setdefault(trace ^ -flip & _ALL, made ^ flip)
                if same != made ^ flip:
                    self._known[key] = same ^ flip
                    return same ^ flip
            self._traces.append(trace)
        self._known[key] = made
        self._gates.append(key)
        self._parts.append(f"{self._part}/{self._table}{kind}")
        levels = self._levels
        self._levels.append(max(levels[a >> 1], levels[b >> 1], levels[c >> 1]) + _LEVELS[kind])
        return made

    def _trace(self, kind: str, a: int, b: int, c: int) -> tuple[int, bool]:
        """What a gate gives for the inputs that are tried, and whether they tell it from others.

        They do not where it would be one, or read what is, so seldom that no input may have met it: a carry over
        twenty bits, say.
        """
        traces = self._traces
        read = [traces[bit >> 1] ^ -(bit & 1) & _ALL for bit in ((a, b, c) if kind == "mux" else (a, b))]
        told = all(trace not in (0, _ALL) for trace in read)
        x, y = read[:2]
        if kind == "and":
            both = x & y
            return both, told and (both != 0 or x.bit_count() * y.bit_count() > _SEEN * _TRIED)
        return (x ^ y if kind == "xor" else (x & y) | (~x & read[2])), told

    # Gates

    def and_(self, a: int, b: int) -> int:
        """Both."""
        if a > b:
            a, b = b, a
        if a < 2:
            return b if a else 0
        if a == b:
            return a
        if a == b ^ 1:
            return 0
        # what one of them says of the other: (x & y) & x, (x & y) & ~x, ~(x & y) & x
        for one, other in ((a, b), (b, a)):
            kind, x, y, _ = self._gates[one >> 1]
            if kind == "and":
                if other in (x, y):
                    return one if not one & 1 else self.and_(other, (y if other == x else x) ^ 1)
                if other ^ 1 in (x, y):
                    return other if one & 1 else 0
        return self._node("and", a, b)

    def or_(self, a: int, b: int) -> int:
        """At least one."""
        return self.and_(a ^ 1, b ^ 1) ^ 1

    def xor(self, a: int, b: int) -> int:
        """One of both."""
        flip = (a ^ b) & 1
        a, b = min(a & ~1, b & ~1), max(a & ~1, b & ~1)
        if a == 0:
            return b ^ flip
        if a == b:
            return flip
        return self._node("xor", a, b) ^ flip

    def mux(self, choose: int, yes: int, no: int) -> int:
        """`yes` where `choose`."""
        if choose & 1:
            choose, yes, no = choose ^ 1, no, yes
        if yes == no or choose == 0:
            return no
        if yes ^ 1 == no:
            return self.xor(choose, no)
        if yes < 2 or yes >> 1 == choose >> 1:
            on = yes if yes < 2 else yes & 1 ^ 1
            return self.or_(choose, no) if on else self.and_(choose ^ 1, no)
        if no < 2 or no >> 1 == choose >> 1:
            off = no if no < 2 else no & 1
            return self.or_(choose ^ 1, yes) if off else self.and_(choose, yes)
        flip = no & 1
        return self._node("mux", choose, yes ^ flip, no ^ flip) ^ flip

    # Words

    def choose(self, choose: int, yes: Sequence[int], no: Sequence[int]) -> Bits:
        """A word or another, of the same width."""
        return [self.mux(choose, a, b) for a, b in zip(yes, no, strict=True)]

    def masked(self, word: Sequence[int], on: int) -> Bits:
        """The word, or zero."""
        return [self.and_(bit, on) for bit in word]

    def all_(self, bits: Sequence[int]) -> int:
        """All of them, as a balanced tree."""
        now = list(bits) or [1]
        while len(now) > 1:
            now = [self.and_(*now[i : i + 2]) if i + 1 < len(now) else now[i] for i in range(0, len(now), 2)]
        return now[0]

    def any_(self, bits: Sequence[int]) -> int:
        """Any of them."""
        return self.all_([bit ^ 1 for bit in bits]) ^ 1

    def carries(self, propagate: Bits, generate: Bits) -> Bits:
        """The carry out of each bit by Brent's and Kung's prefix tree, as Yosys' `$lcu` has it."""
        p, g, n = list(propagate), list(generate), len(propagate)
        step = 1
        while 2 * step <= n:
            for j in range(2 * step - 1, n, 2 * step):
                g[j] = self.or_(g[j], self.and_(p[j], g[j - step]))
                p[j] = self.and_(p[j], p[j - step])
            step *= 2
        while step >= 1:
            for j in range(3 * step - 1, n, 2 * step):
                g[j] = self.or_(g[j], self.and_(p[j], g[j - step]))
            step //= 2
        return g

    def _sum(self, a: Sequence[int], b: Sequence[int], carry: int) -> tuple[Bits, Bits]:
        p = [self.xor(x, y) for x, y in zip(a, b, strict=True)]
        g = [self.and_(x, y) for x, y in zip(a, b, strict=True)]
        if p:
            g[0] = self.or_(g[0], self.and_(p[0], carry))
        return p, self.carries(p, g)

    def add(self, a: Sequence[int], b: Sequence[int], carry: int = 0) -> Bits:
        """The sum of words of the same width, cut to it."""
        p, c = self._sum(a, b, carry)
        return [self.xor(x, y) for x, y in zip(p, [carry, *c[:-1]], strict=True)]

    def sub(self, a: Sequence[int], b: Sequence[int]) -> Bits:
        """The difference, cut to the width."""
        return self.add(a, [bit ^ 1 for bit in b], 1)

    def neg(self, a: Sequence[int]) -> Bits:
        """Zero minus the word."""
        return self.sub([0] * len(a), a)

    def at_least(self, a: Sequence[int], b: Sequence[int]) -> int:
        """a >= b, without signs."""
        n = max(len(a), len(b))
        _, c = self._sum(unsigned(a, n), [bit ^ 1 for bit in unsigned(b, n)], 1)
        return c[-1] if c else 1

    def less(self, a: Sequence[int], b: Sequence[int]) -> int:
        """a < b in two's complement, both of the same width."""
        return self.at_least(*([*word[:-1], word[-1] ^ 1] for word in (a, b))) ^ 1

    def add_sub(self, a: Sequence[int], b: Sequence[int], minus: int) -> Bits:
        """a - b where `minus`, else a + b: one adder, whose second operand is complemented."""
        return self.add(a, [self.xor(bit, minus) for bit in b], minus)

    def shift_left(self, word: Sequence[int], by: Sequence[int]) -> Bits:
        """word << by, cut to its width: a stage a bit, the smallest first."""
        now, n = list(word), len(word)
        for i, bit in enumerate(by):
            step = min(1 << i, n)
            now = self.choose(bit, [0] * step + now[: n - step], now)
        return now

    def shift_right(self, word: Sequence[int], by: Sequence[int], fill: int = 0) -> Bits:
        """word >> by, with `fill` from above."""
        now, n = list(word), len(word)
        for i, bit in enumerate(by):
            step = min(1 << i, n)
            now = self.choose(bit, now[step:] + [fill] * step, now)
        return now

    def compress(self, rows: Sequence[Sequence[int]], bits: int) -> Bits:
        """The sum of words, cut to `bits`: full adders in columns until two rows are left, then an adder."""
        columns: list[Bits] = [[row[i] for row in rows if i < len(row) and row[i]] for i in range(bits)]
        while any(len(column) > 2 for column in columns):
            after: list[Bits] = [[] for _ in range(bits + 1)]
            for i, column in enumerate(columns):
                whole = len(column) // 3 * 3
                for j in range(0, whole, 3):
                    x, y, z = column[j : j + 3]
                    half = self.xor(x, y)
                    after[i].append(self.xor(half, z))
                    after[i + 1].append(self.or_(self.and_(x, y), self.and_(half, z)))
                after[i] += column[whole:]
            columns = [[bit for bit in column if bit] for column in after[:bits]]
        left, right = ([column[k] if k < len(column) else 0 for column in columns] for k in (0, 1))
        return self.add(left, right)

    def multiply(self, a: Sequence[int], b: Sequence[int], bits: int) -> Bits:
        """a · b without signs, cut to `bits`."""
        return self.compress(self.products(a, b), bits)

    def products(self, a: Sequence[int], b: Sequence[int]) -> list[Bits]:
        """Rows that a · b is the sum of; b has no sign."""
        return [[0] * i + self.masked(a, bit) for i, bit in enumerate(b) if bit]

    def multiply_signed(self, a: Sequence[int], b: Sequence[int], bits: int) -> Bits:
        """a · b in two's complement, b without a sign, cut to `bits`."""
        return self.compress(self.products(signed(a, bits), b), bits)

    def look_up(self, address: Sequence[int], entries: Sequence[int], bits: int) -> Bits:
        """The entry of a table, zero past its end: its shared decision diagram, in the better of two orders."""
        size = 1 << len(address)
        values = np.zeros(size, dtype=object if bits > 62 else np.int64)
        values[: min(len(entries), size)] = list(entries[:size])
        columns = np.stack([((values >> bit) & 1).astype(np.int64) for bit in range(bits)])  # [bits, size]
        reverse = np.zeros(size, dtype=np.int64)
        for bit in range(len(address)):
            reverse |= ((np.arange(size) >> bit) & 1) << (len(address) - 1 - bit)
        orders = [(columns, list(address)), (columns[:, reverse], list(address)[::-1])]
        edges, order = min(orders, key=lambda pair: _nodes(pair[0]))
        with self.tables():
            for bit in order:
                keys = (edges[:, 0::2] << 32) | edges[:, 1::2]
                distinct, where = np.unique(keys, return_inverse=True)
                made = [self.mux(bit, int(key) & 0xFFFFFFFF, int(key) >> 32) for key in distinct]
                edges = np.array(made, dtype=np.int64)[where].reshape(keys.shape)
        return [int(bit) for bit in edges[:, 0]]

    # What is told of it

    def _reached(self, outputs: Sequence[int]) -> list[int]:
        seen = bytearray(len(self._gates))
        ahead = [bit >> 1 for bit in outputs]
        found = []
        while ahead:
            node = ahead.pop()
            if seen[node]:
                continue
            seen[node] = 1
            kind, a, b, c = self._gates[node]
            if kind != "input":
                found.append(node)
                ahead += [a >> 1, b >> 1, c >> 1]
        return found

    def count(self, outputs: Sequence[int]) -> Counter[tuple[str, str]]:
        """Gates that the outputs depend on, by part and kind."""
        found: Counter[tuple[str, str]] = Counter()
        for node in self._reached(outputs):
            part, kind = self._parts[node].split("/")
            found[part, kind] += 1
        return found

    def path(self, outputs: Sequence[int]) -> Counter[str]:
        """Levels of the longest path, by part."""
        found: Counter[str] = Counter()
        levels = self._levels
        node = max((bit >> 1 for bit in outputs), key=lambda node: levels[node], default=0)
        while self._gates[node][0] != "input":
            kind, *read = self._gates[node]
            found[self._parts[node].split("/")[0]] += round(_LEVELS[kind])
            node = max((bit >> 1 for bit in read), key=lambda node: levels[node])
        return found

    def run(self, outputs: Sequence[int], inputs: Sequence[int], values: Packed) -> Packed:
        """What comes out for many inputs at once.

        Args:
            inputs: literals of all inputs.
            values: uint8 [inputs, n / 8], eight of them a byte.
        Returns: uint8 [outputs, n / 8].
        """
        known: dict[int, Packed] = dict(zip([bit >> 1 for bit in inputs], values, strict=True))
        known[0] = np.zeros(values.shape[1], dtype=np.uint8)

        def of(bit: int) -> Packed:
            row = known[bit >> 1]
            return np.bitwise_not(row) if bit & 1 else row

        # a gate's number is above those of what it reads
        for node in sorted(self._reached(outputs)):
            kind, a, b, c = self._gates[node]
            if kind == "mux":
                known[node] = (of(a) & of(b)) | (of(a ^ 1) & of(c))
            else:
                known[node] = of(a) & of(b) if kind == "and" else of(a) ^ of(b)
        made: Packed = np.stack([of(bit) for bit in outputs])
        return made


def _nodes(columns: npt.NDArray[np.int64]) -> int:
    """Nodes of the shared decision diagram with complemented edges of some functions [functions, 2^variables]."""
    edges, fresh, total = columns, 1, 0
    while edges.shape[1] > 1:
        low, high = edges[:, 0::2], edges[:, 1::2]
        flip = high & 1
        keys = ((low ^ flip) << 32) | (high ^ flip)
        distinct, where = np.unique(keys[low != high], return_inverse=True)
        total += len(distinct)
        edges = low.copy()
        edges[low != high] = 2 * (fresh + where) + flip[low != high]
        fresh += len(distinct)
    return total


def constant(value: int, bits: int) -> Bits:
    """A constant in two's complement."""
    return [(value >> i) & 1 for i in range(bits)]


def unsigned(word: Sequence[int], bits: int) -> Bits:
    """The word in another width, with zeros above."""
    return [*word[:bits], *[0] * (bits - len(word))]


def signed(word: Sequence[int], bits: int) -> Bits:
    """The word in another width, with its sign above."""
    return [*word[:bits], *[word[-1]] * (bits - len(word))]
