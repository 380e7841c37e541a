"""What an emulation saw: counters of each product, exact and mergeable (docs/emulation.md)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadTypeError, BadValueError
from lnsdeploy.formats import LNSFormat

Ints = npt.NDArray[np.int64]

# Bars of a histogram: one a code up to 8 bits, ranges of codes above.
MAX_BARS = 128


@dataclass
class CodeHistogram:
    """How often codes came, in ranges of equal width.

    Args:
        format: of the words.
        zeros: words of zero.
        bars: int64; bar i counts codes i·width + 1 … (i + 1)·width of either sign.
    """

    format: LNSFormat
    zeros: int = 0
    bars: Ints = field(default_factory=lambda: np.zeros(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if not self.bars.size:
            self.bars = np.zeros(-(-self.format.max_code // self.width), dtype=np.int64)

    @property
    def width(self) -> int:
        """Codes of a bar."""
        return max(1, (self.format.max_code + 1) // MAX_BARS)

    @property
    def total(self) -> int:
        """Words counted."""
        return self.zeros + int(self.bars.sum())

    def add_words(self, counts: Ints) -> None:
        """Count words, given how often each came: int64 [2^bits or more]."""
        fmt = self.format
        codes = counts[: fmt.max_code + 1].copy()
        if fmt.signed:
            codes += counts[fmt.sign_bit : fmt.sign_bit + fmt.max_code + 1]
        self.add_codes(codes)

    def add_codes(self, codes: Ints) -> None:
        """Count codes, given how often each came: int64 [C + 1]."""
        self.zeros += int(codes[0])
        self.bars += np.add.reduceat(codes[1:], np.arange(0, len(codes) - 1, self.width))

    def merge(self, other: CodeHistogram) -> None:
        """Add the counts of another histogram of the same format."""
        if other.format != self.format:
            raise BadValueError(f"histograms of {self.format} and {other.format} cannot be merged")
        self.zeros += other.zeros
        self.bars += other.bars

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "format": str(self.format),
            "zeros": self.zeros,
            "width": self.width,
            "bars": [int(v) for v in self.bars],
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CodeHistogram:
        """Inverse of :meth:`to_dict`."""
        return cls(LNSFormat.parse(data["format"]), int(data["zeros"]), np.array(data["bars"], dtype=np.int64))


_FIELDS = (
    "name",
    "op",
    "module",
    "calls",
    "macs",
    "sqnr_db",
    "words",
    "saturated",
    "flushed",
    "seconds",
    "datapath",
    "formats",
    "kernel",
    "constant",
    "inputs",
    "weights",
    "outputs",
)


@dataclass(eq=False)
class ProductRecord(Mapping[str, Any]):
    """What one product of a model did, over all its calls; readable by attribute and as a mapping.

    Args:
        name: of the module (``layer1.0.conv1``), with a suffix where a module has several products, and ``:input`` or
            ``:weight`` for the gradient of that operand.
        op: what was asked for (``conv2d``, ``linear``, ``matmul``, …; ``grad`` behind it in a backward pass).
        module: the class of the module, or empty.
        calls: how often.
        macs: multiply-accumulates, of all calls.
        words: results; saturated, flushed: those above the largest code and below code 1.
        seconds: spent in emulation.
        datapath: its name.
        formats: of activations, weights and results.
        kernel: what ran it.
        signal, noise: exact sums of squares of the float32 result, and of its difference to the emulated one, over the
            sampled rows.
        constant: whether the second operand is a parameter; then `weights` counts it once, as it was last.
        inputs, weights, outputs: histograms of codes.
    """

    name: str
    op: str
    module: str = ""
    calls: int = 0
    macs: int = 0
    words: int = 0
    saturated: int = 0
    flushed: int = 0
    seconds: float = 0.0
    datapath: str = ""
    formats: tuple[str, str, str] = ("", "", "")
    kernel: str = ""
    constant: bool = False
    signal: Fraction = Fraction(0)
    noise: Fraction = Fraction(0)
    inputs: CodeHistogram | None = None
    weights: CodeHistogram | None = None
    outputs: CodeHistogram | None = None

    @property
    def sqnr_db(self) -> float | None:
        """Signal-to-quantization-noise ratio against the float32 result of the same operands, in dB; None where nothing
        was measured, or where the signal is zero; infinity without noise."""
        if not self.signal:
            return None
        if not self.noise:
            return math.inf
        ratio = self.signal / self.noise
        return 10 * (math.log10(ratio.numerator) - math.log10(ratio.denominator))

    def __getitem__(self, key: str) -> Any:
        if key not in _FIELDS:
            raise KeyError(key)
        return getattr(self, key)

    def __iter__(self) -> Iterator[str]:
        return iter(_FIELDS)

    def __len__(self) -> int:
        return len(_FIELDS)

    def measure(self, signal: float, noise: float) -> None:
        """Add sums of squares; exactly, so that the order of batches and processes does not matter."""
        if math.isfinite(signal) and math.isfinite(noise):
            self.signal += Fraction(signal)
            self.noise += Fraction(noise)

    def clear(self) -> None:
        """Count from nothing; what the product is stays, and so do the words of a parameter."""
        fresh = ProductRecord(self.name, self.op)
        for name in ("calls", "macs", "words", "saturated", "flushed", "seconds", "signal", "noise"):
            setattr(self, name, getattr(fresh, name))
        for name in ("inputs", "weights", "outputs"):
            histogram = getattr(self, name)
            if histogram is not None and not (name == "weights" and self.constant):
                setattr(self, name, CodeHistogram(histogram.format))

    def merge(self, other: ProductRecord) -> None:
        """Add what another process counted for the same product."""
        for name in ("calls", "macs", "words", "saturated", "flushed", "seconds", "signal", "noise"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("inputs", "weights", "outputs"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if name == "weights" and self.constant and mine is not None and mine.total:
                continue
            if mine is None:
                setattr(self, name, theirs)
            elif theirs is not None:
                mine.merge(theirs)
        self.kernel = self.kernel or other.kernel

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON carries; :meth:`from_dict` is its inverse."""
        made: dict[str, Any] = {key: getattr(self, key) for key in _FIELDS}
        made["formats"] = dict(zip(("activation", "weight", "output"), self.formats, strict=True))
        sqnr = self.sqnr_db
        made["sqnr_db"] = None if sqnr is None or math.isinf(sqnr) else sqnr
        made["exact"] = sqnr is not None and math.isinf(sqnr)
        for key in ("signal", "noise"):
            value = getattr(self, key)
            made[key] = [value.numerator, value.denominator]
        for key in ("inputs", "weights", "outputs"):
            histogram = getattr(self, key)
            made[key] = None if histogram is None else histogram.to_dict()
        return made

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ProductRecord:
        """Inverse of :meth:`to_dict`."""
        plain = {key: data[key] for key in _FIELDS if key not in ("sqnr_db", "formats", "inputs", "weights", "outputs")}
        formats = data["formats"]
        return cls(
            **plain,
            formats=(formats["activation"], formats["weight"], formats["output"]),
            signal=Fraction(*data["signal"]),
            noise=Fraction(*data["noise"]),
            inputs=_histogram(data["inputs"]),
            weights=_histogram(data["weights"]),
            outputs=_histogram(data["outputs"]),
        )


def _histogram(data: Mapping[str, Any] | None) -> CodeHistogram | None:
    return None if data is None else CodeHistogram.from_dict(data)


class Seen:
    """The counters of an emulation."""

    def __init__(self) -> None:
        self.records: dict[str, ProductRecord] = {}
        self.not_emulated: dict[str, int] = {}
        self.left_float: dict[str, dict[str, int]] = {}

    @property
    def macs(self) -> int:
        """Multiply-accumulates that were emulated."""
        return sum(record.macs for record in self.records.values())

    @property
    def float_macs(self) -> int:
        """Multiply-accumulates that the recipe left in float."""
        return sum(entry["macs"] for entry in self.left_float.values())

    def miss(self, name: str) -> None:
        """Count an operation that was not emulated."""
        self.not_emulated[name] = self.not_emulated.get(name, 0) + 1

    def leave(self, name: str, macs: int) -> None:
        """Count a product that the recipe leaves in float."""
        entry = self.left_float.setdefault(name, {"calls": 0, "macs": 0})
        entry["calls"] += 1
        entry["macs"] += macs

    def forget(self) -> None:
        """Count from nothing. What was recorded for later calls, and packed, stays."""
        for record in self.records.values():
            record.clear()
        self.not_emulated.clear()
        self.left_float.clear()

    def merge(self, other: Seen | Mapping[str, Any]) -> None:
        """Add what another emulation of the same model saw, given itself or as its :meth:`to_dict`.

        Every sum is exact, so the order does not matter; records that only the other has come last.

        Raises:
            BadTypeError: neither.
        """
        if isinstance(other, Mapping):
            other = seen_from_dict(other)
        if not isinstance(other, Seen):
            raise BadTypeError(f"an emulation or its dictionary is needed, not {type(other).__name__}")
        for name, record in other.records.items():
            if name in self.records:
                self.records[name].merge(record)
            else:
                self.records[name] = ProductRecord.from_dict(record.to_dict())
        for name, count in other.not_emulated.items():
            self.not_emulated[name] = self.not_emulated.get(name, 0) + count
        for name, entry in other.left_float.items():
            mine = self.left_float.setdefault(name, {"calls": 0, "macs": 0})
            for key in mine:
                mine[key] += entry[key]

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON carries."""
        return {
            "macs": self.macs,
            "float_macs": self.float_macs,
            "seconds": sum(record.seconds for record in self.records.values()),
            "not_emulated": dict(sorted(self.not_emulated.items())),
            "left_float": {name: dict(entry) for name, entry in self.left_float.items()},
            "layers": [record.to_dict() for record in self.records.values()],
        }

    def table(self) -> str:
        """The records as a table for a terminal."""
        return table(self.records.values(), self.not_emulated, self.left_float)


def seen_from_dict(data: Mapping[str, Any]) -> Seen:
    """Counters from :meth:`Seen.to_dict`."""
    made = Seen()
    for entry in data["layers"]:
        record = ProductRecord.from_dict(entry)
        made.records[record.name] = record
    made.not_emulated = {str(name): int(count) for name, count in data["not_emulated"].items()}
    made.left_float = {str(name): dict(entry) for name, entry in data["left_float"].items()}
    return made


def sqnr_text(record: ProductRecord) -> str:
    """The ratio of a record for people."""
    value = record.sqnr_db
    return "–" if value is None else "exact" if math.isinf(value) else f"{value:.1f}"


def table(
    records: Iterable[ProductRecord], not_emulated: Mapping[str, int], left_float: Mapping[str, Mapping[str, int]]
) -> str:
    """A table of records, then what was not emulated and what was left in float."""
    rows = [("name", "op", "calls", "MACs", "SQNR dB", "saturated", "flushed", "seconds")]
    found = list(records)
    rows += [
        (
            r.name,
            r.op,
            f"{r.calls:,}",
            f"{r.macs:,}",
            sqnr_text(r),
            _share(r.saturated, r.words),
            _share(r.flushed, r.words),
            f"{r.seconds:.3f}",
        )
        for r in found
    ]
    rows.append(
        (
            "all",
            "",
            f"{sum(r.calls for r in found):,}",
            f"{sum(r.macs for r in found):,}",
            "",
            _share(sum(r.saturated for r in found), sum(r.words for r in found)),
            _share(sum(r.flushed for r in found), sum(r.words for r in found)),
            f"{sum(r.seconds for r in found):.3f}",
        )
    )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = [
        "  ".join(
            cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines.insert(1, "  ".join("-" * w for w in widths))
    lines.insert(len(lines) - 1, "  ".join("-" * w for w in widths))
    if left_float:
        listed = ", ".join(f"{name} ({entry['macs']:,} MACs)" for name, entry in left_float.items())
        lines.append(f"left in float by the recipe: {listed}")
    if not_emulated:
        listed = ", ".join(f"{name} ({count}×)" for name, count in sorted(not_emulated.items()))
        lines.append(f"not emulated: {listed}")
    return "\n".join(line.rstrip() for line in lines)


def _share(part: int, whole: int) -> str:
    if not part:
        return "0"
    share = 100 * part / whole
    return f"{share:.2f} %" if share >= 0.01 else "<0.01 %"
