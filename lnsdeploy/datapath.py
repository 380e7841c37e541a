"""Datapaths as data: frozen dataclasses, TOML in and out, a fingerprint (docs/datapath.md, 8).

No executor has an opinion of its own about arithmetic: a datapath says everything, and its tables are
made once from it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np

from lnsdeploy import tables
from lnsdeploy.delta import METHODS, Delta, Exact, Table, check_gamma
from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.fields import check_choice, check_integer, check_string, plain_integers
from lnsdeploy.files import dump_toml, parse_toml, read_toml
from lnsdeploy.formats import UNDERFLOWS, LNSFormat

SPEC_VERSION = 1


@dataclass(frozen=True)
class LinearAccumulator:
    """Products converted to the linear domain and summed as integers (spec 4).

    Johnson 2018 (ELMA) applies the remainder's constant to each product, Zhao et al. 2022
    (LNS-Madam) to bins.

    Args:
        bits: W, the accumulator's width, 2 to 62.
        conversion: where the remainder's constant is applied: to each ``"product"`` (ELMA), or once to
            each remainder ``"bin"`` (LNS-Madam).
        table_bits: t, 0 to log2 γ: the remainder table has 2^t entries; the other bits by Mitchell.
        constant_bits: m, the fraction bits of a table entry, 0 to 24.
        lanes: L, products summed exactly in one vector step, 1 to 1024.
        psum_bits: width that a step's sum is fitted to, 2 to 62; None for `bits`.
        overflow: ``"saturate"`` or ``"wrap"``.
        shift: ``"truncate"`` or ``"round"`` (half up) when a product's low bits are dropped.
        encoder: how the accumulator's logarithm is taken: ``"exact"``, ``"table"`` or ``"mitchell"``.
        encoder_bits: n of the table encoder, 1 to 16; None for the others.
    """

    bits: int = 24
    conversion: str = "product"
    table_bits: int = 0
    constant_bits: int = 8
    lanes: int = 1
    psum_bits: int | None = None
    overflow: str = "saturate"
    shift: str = "truncate"
    encoder: str = "exact"
    encoder_bits: int | None = None

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 2, 62)
        check_choice("conversion", self.conversion, ("product", "bin"))
        check_integer("table_bits", self.table_bits, 0, 16)
        check_integer("constant_bits", self.constant_bits, 0, 24)
        check_integer("lanes", self.lanes, 1, 1024)
        if self.psum_bits is not None:
            check_integer("psum_bits", self.psum_bits, 2, 62)
        check_choice("overflow", self.overflow, ("wrap", "saturate"))
        check_choice("shift", self.shift, ("truncate", "round"))
        check_choice("encoder", self.encoder, ("exact", "table", "mitchell"))
        if self.encoder == "table":
            check_integer("encoder_bits", self.encoder_bits, 1, 16)
        elif self.encoder_bits is not None:
            raise BadValueError(f'encoder_bits belongs to encoder = "table"; leave it out with {self.encoder!r}')

        plain_integers(self)
        if self.conversion == "bin" and self.bits + self.constant_bits + self.table_bits > 61:
            raise BadValueError(
                'bits + constant_bits + table_bits must be at most 61 with conversion = "bin", '
                f"not {self.bits + self.constant_bits + self.table_bits}"
            )

    @property
    def bins(self) -> int:
        """Accumulators side by side: 2^t with bins, else 1."""
        return 1 << self.table_bits if self.conversion == "bin" else 1

    @property
    def step_bits(self) -> int:
        """The width that a vector step's sum is fitted to."""
        return self.bits if self.psum_bits is None else self.psum_bits


@dataclass(frozen=True)
class LogAccumulator:
    """Products summed in the logarithmic domain by an LNS adder (spec 5).

    Args:
        bits: bits of the accumulator's magnitude code, 1 to 40.
        guard_bits: g, 0 to 8: the accumulator has γ·2^g codes per octave.
        lanes: L, 1 to 1024: products of one step, added as a balanced tree.
        delta: how Δ is made.
    """

    bits: int = 16
    guard_bits: int = 0
    lanes: int = 1
    delta: Delta = field(default_factory=Exact)

    def __post_init__(self) -> None:
        check_integer("bits", self.bits, 1, 40)
        check_integer("guard_bits", self.guard_bits, 0, 8)
        check_integer("lanes", self.lanes, 1, 1024)
        if not isinstance(self.delta, Delta):
            raise BadTypeError(f"delta must be one of the methods of lnsdeploy.delta, not {self.delta!r}")
        plain_integers(self)

    @property
    def max_code(self) -> int:
        """Λ, the accumulator's largest code."""
        return (1 << self.bits) - 1


Accumulator = LinearAccumulator | LogAccumulator


@dataclass(frozen=True)
class Datapath:
    """Everything that decides a bit (spec 8.1).

    Args:
        name: for people; not part of the fingerprint.
        weight, activation, output: formats; the smaller γ of the operands must divide the larger, and the
            output has the larger.
        accumulate: how dot products are summed.
        add: the log adder of residual additions, sums and averages.
        underflow: what results below code 1 become, ``"zero"`` or ``"min"``.
        citation: the paper that it follows.
        notes: where it differs from the paper, or why.
        spec: the specification version.

    Raises:
        BadValueError, BadTypeError, UnknownNameError: a field is wrong; the message names it.
    """

    name: str
    weight: LNSFormat
    activation: LNSFormat
    output: LNSFormat
    accumulate: Accumulator
    add: LogAccumulator
    underflow: str = "zero"
    citation: str = ""
    notes: str = ""
    spec: int = SPEC_VERSION

    def __post_init__(self) -> None:
        for text in ("name", "citation", "notes"):
            check_string(text, getattr(self, text))
        for name in ("weight", "activation", "output"):
            if not isinstance(getattr(self, name), LNSFormat):
                raise BadTypeError(f"{name} must be an LNSFormat, not {getattr(self, name)!r}")
        if not isinstance(self.accumulate, (LinearAccumulator, LogAccumulator)):
            raise BadTypeError(f"accumulate must be a LinearAccumulator or a LogAccumulator, not {self.accumulate!r}")
        if not isinstance(self.add, LogAccumulator):
            raise BadTypeError(f"add must be a LogAccumulator, not {self.add!r}")
        check_choice("underflow", self.underflow, UNDERFLOWS)
        if isinstance(self.spec, bool) or not isinstance(self.spec, int) or self.spec != SPEC_VERSION:
            raise BadValueError(
                f"spec must be {SPEC_VERSION}, the version that this lnsdeploy executes, not {self.spec!r}"
            )
        gamma = common_gamma(self.activation, self.weight)
        if self.output.gamma != gamma:
            raise BadValueError(
                f"output: its gamma must be the operands' ({gamma}), not {self.output.gamma}; rescale the words after"
            )
        if isinstance(self.accumulate, LinearAccumulator):
            f = gamma.bit_length() - 1
            if gamma != 1 << f:
                raise BadValueError(
                    f"accumulate: linear accumulation needs a gamma that is a power of two, not {gamma}; "
                    "the log accumulator takes any"
                )
            if self.accumulate.table_bits > f:
                raise BadValueError(
                    f"accumulate.table_bits must be from 0 to {f} (log2 of gamma {gamma}), "
                    f"not {self.accumulate.table_bits}"
                )
        else:
            check_gamma(gamma << self.accumulate.guard_bits)
        check_gamma(gamma << self.add.guard_bits)

    @property
    def gamma(self) -> int:
        """γ of the products."""
        return common_gamma(self.activation, self.weight)

    @property
    def is_linear(self) -> bool:
        """Whether dot products accumulate in the linear domain."""
        return isinstance(self.accumulate, LinearAccumulator)

    @property
    def linear(self) -> LinearAccumulator:
        """The linear accumulator; an error where the datapath has the other."""
        if not isinstance(self.accumulate, LinearAccumulator):
            raise BadValueError(f"datapath {self.name!r} accumulates in the log domain")
        return self.accumulate

    @property
    def log(self) -> LogAccumulator:
        """The log accumulator; an error where the datapath has the other."""
        if not isinstance(self.accumulate, LogAccumulator):
            raise BadValueError(f"datapath {self.name!r} accumulates in the linear domain")
        return self.accumulate

    def describe(self) -> str:
        """One line for tables and reports."""
        a = self.accumulate
        if isinstance(a, LinearAccumulator):
            entries = 1 << a.table_bits
            table = f"{entries}-entry table" if a.table_bits else "pure Mitchell" if self.gamma > 1 else "shifts"
            encoder = {"exact": "exact", "mitchell": "Mitchell"}.get(a.encoder, f"{a.encoder_bits}-bit table")
            where = "bins" if a.conversion == "bin" else "products"
            return f"linear, {table} on {where}, {a.bits}-bit {a.overflow}, {encoder} encoder"
        method = _method_text(a.delta)
        return f"log, {method}, {a.bits}-bit code, {a.guard_bits} guard bits"

    def canonical(self) -> dict[str, Any]:
        """The fields that decide bits, as plain data (spec 8.2)."""
        table = self.to_dict()
        for text in ("name", "citation", "notes"):
            table.pop(text, None)
        return table

    @cached_property
    def fingerprint(self) -> str:
        """16 hexadecimal digits: a hash of the canonical form and of every table (spec 8.2)."""
        digest = hashlib.sha256()
        digest.update(json.dumps(self.canonical(), sort_keys=True, separators=(",", ":")).encode())
        for name, table in sorted(self.tables().items()):
            digest.update(f"\n{name}:{len(table)}\n".encode())
            digest.update(np.ascontiguousarray(table, dtype="<i8").tobytes())
        return digest.hexdigest()[:16]

    def with_formats(self, weight: LNSFormat, activation: LNSFormat) -> Datapath:
        """The same datapath for other formats: tables and widths keep their meaning as far as they can.

        A remainder table has at most all of γ's bits; a log accumulator keeps its width beyond the output's
        code, a Δ table its step as a fraction of an octave. The name tells the change.
        """
        if (weight, activation) == (self.weight, self.activation):
            return self
        output = widened(activation, common_gamma(weight, activation))
        accumulate: Accumulator
        if isinstance(self.accumulate, LinearAccumulator):
            f = output.gamma.bit_length() - 1
            t = min(self.accumulate.table_bits, f)
            if self.accumulate.table_bits == self.gamma.bit_length() - 1:
                t = min(f, 10)  # a full table stays full
            accumulate = dataclasses.replace(self.accumulate, table_bits=t)
        else:
            accumulate = _adapted(self.accumulate, self.output, output)
        return dataclasses.replace(
            self,
            name=f"{self.name}@{weight}" if weight == activation else f"{self.name}@{weight},{activation}",
            weight=weight,
            activation=activation,
            output=output,
            accumulate=accumulate,
            add=_adapted(self.add, self.output, output),
        )

    def tables(self) -> dict[str, np.ndarray[Any, np.dtype[np.int64]]]:
        """Every table the datapath uses, by name (spec 4.1, 4.6, 5.7)."""
        found = {}
        if isinstance(self.accumulate, LinearAccumulator):
            found["constants"] = tables.remainder_constants(self.accumulate.table_bits, self.accumulate.constant_bits)
            if self.accumulate.encoder_bits is not None:
                found["encoder"] = tables.log_table(self.gamma, self.accumulate.encoder_bits)
        else:
            made = self.accumulate.delta.tables(self.gamma << self.accumulate.guard_bits)
            found["delta_plus"], found["delta_minus"] = made.plus, made.minus
        made = self.add.delta.tables(self.gamma << self.add.guard_bits)
        found["add.delta_plus"], found["add.delta_minus"] = made.plus, made.minus
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain data: what TOML and ONNX carry."""
        result: dict[str, Any] = {"name": self.name, "spec": self.spec}
        for text in ("citation", "notes"):
            if getattr(self, text):
                result[text] = getattr(self, text)
        for name in ("weight", "activation", "output"):
            result[name] = str(getattr(self, name))
        result["underflow"] = self.underflow
        result["accumulate"] = accumulator_to_dict(self.accumulate)
        result["add"] = accumulator_to_dict(self.add)
        return result

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "datapath") -> Datapath:
        """Inverse of :meth:`to_dict`. Without `add`, a log datapath adds with its own accumulator, and a
        linear one with :func:`default_adder`.

        Raises:
            BadFileError: a field is missing, unknown or out of range; the message names it and `where`.
        """
        if not isinstance(data, Mapping):
            raise BadFileError(f"{where}: a datapath is a table of fields, not {type(data).__name__}")
        known = {f.name for f in dataclasses.fields(cls)}
        try:
            for key in data:
                if key not in known:
                    raise UnknownNameError("field", key, known)
            values = dict(data)
            for name in ("weight", "activation", "output"):
                if name not in values:
                    raise BadValueError(f'field {name!r} is missing (a format, as "8:8")')
                values[name] = _field(name, LNSFormat.parse, values[name])
            if "accumulate" not in values:
                raise BadValueError("the table [accumulate] is missing")
            values["accumulate"] = accumulator_from_dict("accumulate", values["accumulate"])
            if "add" in values:
                values["add"] = log_accumulator_from_dict("add", values["add"])
            elif isinstance(values["accumulate"], LogAccumulator):
                values["add"] = dataclasses.replace(values["accumulate"], lanes=1)
            else:
                values["add"] = default_adder(values["output"])
            values.setdefault("name", "unnamed")
            return cls(**values)
        except LNSError as error:
            raise BadFileError(f"{where}: {error}") from error

    def to_toml(self) -> str:
        """The datapath as TOML text; :meth:`from_toml` is its inverse."""
        return dump_toml(self.to_dict())

    @classmethod
    def from_toml(cls, text: str, *, where: str = "datapath") -> Datapath:
        """A datapath from TOML text; `where` names it in errors.

        Raises:
            BadFileError: not TOML, or not a datapath.
        """
        return cls.from_dict(parse_toml(text, where=where), where=where)


def _field(name: str, convert: Any, value: Any) -> Any:
    try:
        return convert(value)
    except LNSError as error:
        raise BadValueError(f"{name}: {error}") from error


def _method_text(delta: Delta) -> str:
    fields = ", ".join(f"{f.name} {getattr(delta, f.name)}" for f in dataclasses.fields(delta))
    return f"{delta.kind} Δ" + (f" ({fields})" if fields else "")


def accumulator_to_dict(accumulator: Accumulator) -> dict[str, Any]:
    """An accumulator as plain data; :func:`accumulator_from_dict` is its inverse."""
    result: dict[str, Any] = {"kind": "linear" if isinstance(accumulator, LinearAccumulator) else "log"}
    for entry in dataclasses.fields(accumulator):
        value = getattr(accumulator, entry.name)
        if isinstance(value, Delta):
            result["delta"] = {"method": value.kind} | dataclasses.asdict(value)
        elif value is not None:
            result[entry.name] = value
    return result


def accumulator_from_dict(place: str, data: Any) -> Accumulator:
    """An accumulator from plain data.

    Args:
        place: names the table in errors.
    Raises:
        LNSError: a field is missing, unknown or out of range; the message names it.
    """
    if not isinstance(data, Mapping):
        raise BadValueError(f"{place} must be a table, not {data!r}")
    values = dict(data)
    if "kind" not in values:
        raise BadValueError(f"{place}.kind is missing (linear or log)")
    kind = values.pop("kind")
    check_choice(f"{place}.kind", kind, ("linear", "log"))
    made = LinearAccumulator if kind == "linear" else LogAccumulator
    known = [f.name for f in dataclasses.fields(made)]
    for key in values:
        if key not in known:
            raise UnknownNameError(f"field of {place}", key, known)
    if "delta" in values:
        values["delta"] = _delta_from_dict(f"{place}.delta", values["delta"])
    accumulator: Accumulator = _build(place, made, values)
    return accumulator


def log_accumulator_from_dict(place: str, data: Any) -> LogAccumulator:
    """As :func:`accumulator_from_dict`, for places that need the log adder (`kind` may be left out)."""
    if isinstance(data, Mapping):
        data = {"kind": "log", **data}
    accumulator = accumulator_from_dict(place, data)
    if not isinstance(accumulator, LogAccumulator):
        raise BadValueError(f"{place}.kind must be log")
    return accumulator


def _delta_from_dict(place: str, data: Any) -> Delta:
    values = {"method": data} if isinstance(data, str) else data
    if not isinstance(values, Mapping):
        raise BadValueError(f"{place} must be a table or a method's name, not {data!r}")
    values = dict(values)
    kind = values.pop("method", None)
    if not isinstance(kind, str) or kind not in METHODS:
        raise UnknownNameError(f"{place}.method", kind, METHODS)
    method = METHODS[kind]
    known = [f.name for f in dataclasses.fields(method)]
    for key in values:
        if key not in known:
            raise UnknownNameError(f"field of {place}", key, known or ["none"])
    for entry in dataclasses.fields(method):
        if entry.default is dataclasses.MISSING and entry.name not in values:
            raise BadValueError(f"{place}.{entry.name} is missing")
    made: Delta = _build(place, method, values)
    return made


def _build(place: str, make: Any, values: dict[str, Any]) -> Any:
    try:
        return make(**values)
    except LNSError as error:
        raise (
            type(error)(f"{place}.{error}")
            if not isinstance(error, UnknownNameError)
            else BadValueError(f"{place}: {error}")
        ) from error


def common_gamma(a: LNSFormat, b: LNSFormat) -> int:
    """γ of the products of two formats (spec 3.2).

    Raises:
        BadValueError: the smaller γ does not divide the larger.
    """
    large, small = max(a.gamma, b.gamma), min(a.gamma, b.gamma)
    if large % small:
        raise BadValueError(f"gammas {a.gamma} and {b.gamma} do not fit together: the smaller must divide the larger")
    return large


def widened(fmt: LNSFormat, gamma: int) -> LNSFormat:
    """The format with `gamma` codes per octave that covers at least the range of `fmt` (spec 3.2)."""
    if gamma == fmt.gamma:
        return fmt
    return LNSFormat(min(fmt.bits + (gamma // fmt.gamma - 1).bit_length(), 32), gamma, fmt.signed)


def _adapted(accumulator: LogAccumulator, old: LNSFormat, new: LNSFormat) -> LogAccumulator:
    bits = min(max(new.magnitude_bits + accumulator.bits - old.magnitude_bits, 1), 40)
    delta = accumulator.delta
    if isinstance(delta, Table) and new.gamma != old.gamma:
        step = max(1, delta.step * new.gamma // old.gamma)
        delta = dataclasses.replace(delta, step=1 << (step.bit_length() - 1))
    return dataclasses.replace(accumulator, bits=bits, delta=delta)


def default_adder(output: LNSFormat) -> LogAccumulator:
    """The adder for residuals where a datapath names none: exact Δ, 2 guard bits, twice the range."""
    guard = 2
    return LogAccumulator(bits=output.magnitude_bits + guard + 1, guard_bits=guard)


def named_datapaths() -> list[str]:
    """Names of the shipped datapaths, sorted."""
    folder = resources.files("lnsdeploy") / "datapaths"
    return sorted(entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml"))


@lru_cache(maxsize=64)
def _named(name: str) -> Datapath:
    file = resources.files("lnsdeploy") / "datapaths" / f"{name}.toml"
    return Datapath.from_toml(file.read_text(encoding="utf-8"), where=f"datapath {name}")


def load_datapath(name_or_path: str | Path | Datapath) -> Datapath:
    """A shipped datapath by name, or any from a TOML file.

    Raises:
        UnknownNameError: no such name (the nearest is offered), and no such file.
        BadFileError: the file is not a datapath.
    """
    if isinstance(name_or_path, Datapath):
        return name_or_path
    text = str(name_or_path)
    if text in named_datapaths():
        return _named(text)
    path = Path(name_or_path)
    if path.suffix == ".toml" or path.is_file():
        return Datapath.from_dict(read_toml(path), where=str(path))
    raise UnknownNameError("datapath", text, named_datapaths())


def for_format(fmt: LNSFormat, *, weight: LNSFormat | None = None) -> Datapath:
    """The default datapath for activations (and output) of one format and weights of the same or another.

    Up to γ = 8, where it is a power of two: `lns-madam-8` adapted. Other powers of two: saturating linear
    accumulation with a table of up to 1024 entries on each product. Any other γ: log accumulation with exact Δ and
    2 guard bits.
    """
    weight = weight or fmt
    gamma = common_gamma(fmt, weight)
    output = widened(fmt, gamma)
    f = gamma.bit_length() - 1
    accumulate: Accumulator
    if gamma == 1 << f and f <= 3:
        return load_datapath("lns-madam-8").with_formats(weight, fmt)
    if gamma == 1 << f:
        bits = 24 if fmt.bits <= 8 else 32 if fmt.bits <= 12 else 40
        accumulate = LinearAccumulator(bits=bits, table_bits=min(f, 10), constant_bits=16)
    else:
        accumulate = LogAccumulator(bits=output.magnitude_bits + 4, guard_bits=2)
    return Datapath(
        name=f"default-{weight}-{fmt}" if weight != fmt else f"default-{fmt}",
        weight=weight,
        activation=fmt,
        output=output,
        accumulate=accumulate,
        add=default_adder(output),
    )
