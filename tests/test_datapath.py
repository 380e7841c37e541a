"""Datapaths as data (spec 8.1, 8.2): TOML, validation, fingerprints, the named ones."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings

from lnsdeploy import delta as methods
from lnsdeploy import tables
from lnsdeploy.datapath import (
    Datapath,
    LinearAccumulator,
    LogAccumulator,
    accumulator_from_dict,
    accumulator_to_dict,
    common_gamma,
    default_adder,
    for_format,
    load_datapath,
    log_accumulator_from_dict,
    named_datapaths,
    widened,
)
from lnsdeploy.delta import DeltaTables
from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.formats import LNSFormat
from tests import strategies
from tests.cases import DELTAS, delta_name

# A changed fingerprint is a changed bit: a decision, recorded under "Bits" in the CHANGELOG.
FINGERPRINTS = {
    "elma-8": "33fde0d17d6baf1d",
    "gauss-12": "3a07dd2bc1b24183",
    "gauss-16": "9faca4ebc2b6746c",
    "gauss-8": "311a5e9bf0b56a78",
    "gauss-8-guard": "fdf71e5fe6f25302",
    "lns-madam-8": "211c75364e632062",
    "lns-madam-8-lut1": "dc61c4295b598033",
    "lns-madam-8-lut2": "dfba4ef925d26183",
    "lns-madam-8-lut4": "1bd6e2568fcb53ec",
    "lognet-4": "edce9d7363773472",
    "lognet-5": "cd35d427ca8c1dba",
    "max-plus-8": "762d1b3b2795d69c",
    "mitchell-8": "f63e90d622d5ac15",
    "shift-16": "e1ce516695ef98df",
    "table-16": "21219dfce3aa5fc6",
}


def _linear(**changes: Any) -> Datapath:
    fmt = LNSFormat(8, 8)
    return Datapath("test", fmt, fmt, fmt, LinearAccumulator(**changes), default_adder(fmt))


# ---------------------------------------------------------------------------------------------------------------------
# Named datapaths


@pytest.mark.smoke
def test_fingerprints_are_pinned() -> None:
    """spec 8.2: every named datapath's bits, and no name without a pin."""
    assert {name: load_datapath(name).fingerprint for name in named_datapaths()} == FINGERPRINTS
    assert len(set(FINGERPRINTS.values())) == len(FINGERPRINTS)


@pytest.mark.parametrize("name", named_datapaths())
def test_named_datapaths_are_complete(name: str) -> None:
    """spec 8.1: the name is the file's, a paper is cited, TOML in and out is the identity."""
    datapath = load_datapath(name)
    assert datapath.name == name
    assert re.search(r"(19|20)\d\d", datapath.citation), "cites its paper, with the year"
    assert datapath.spec == 1
    again = Datapath.from_toml(datapath.to_toml())
    assert again == datapath
    assert again.fingerprint == datapath.fingerprint
    assert datapath.describe().startswith("linear" if datapath.is_linear else "log")
    assert load_datapath(datapath) is datapath
    assert load_datapath(name) is datapath


@pytest.mark.smoke
def test_names_are_found_with_the_nearest_match(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="unknown datapath 'gauss-9'; did you mean 'gauss-8'"):
        load_datapath("gauss-9")
    with pytest.raises(BadFileError, match=r"cannot read .*missing\.toml"):
        load_datapath(tmp_path / "missing.toml")
    own = tmp_path / "own.toml"
    own.write_text(load_datapath("elma-8").to_toml(), encoding="utf-8")
    assert load_datapath(own) == load_datapath("elma-8")
    assert load_datapath(str(own)) == load_datapath("elma-8")
    own.write_text("weight = 8", encoding="utf-8")
    with pytest.raises(BadFileError, match=r"own\.toml: weight: not an LNS format: 8"):
        load_datapath(own)


# ---------------------------------------------------------------------------------------------------------------------
# TOML


@given(strategies.datapaths(free=True))
@settings(max_examples=150)
def test_toml_in_and_out_is_the_identity(datapath: Datapath) -> None:
    """spec 8.1 for any datapath, with any text in its name and notes."""
    text = datapath.to_toml()
    again = Datapath.from_toml(text)
    assert again == datapath
    assert again.to_toml() == text
    assert again.canonical() == datapath.canonical()


@pytest.mark.parametrize("how", DELTAS, ids=delta_name)
def test_accumulators_are_plain_data(how: methods.Delta) -> None:
    part = LogAccumulator(bits=9, guard_bits=2, lanes=3, delta=how)
    assert accumulator_from_dict("x", accumulator_to_dict(part)) == part
    data = accumulator_to_dict(part)
    del data["kind"]
    assert log_accumulator_from_dict("x", data) == part


MINIMAL = 'weight = "8:8"\nactivation = "8:8"\noutput = "8:8"\n'


def test_defaults_of_toml() -> None:
    """`add`, texts and the parameters with defaults may be left out; a method without parameters may be a name."""
    linear = Datapath.from_toml(MINIMAL + '[accumulate]\nkind = "linear"\n')
    assert linear.accumulate == LinearAccumulator()
    assert linear.add == default_adder(LNSFormat(8, 8))
    assert (linear.name, linear.citation, linear.notes, linear.underflow) == ("unnamed", "", "", "zero")
    log = Datapath.from_toml(MINIMAL + '[accumulate]\nkind = "log"\nlanes = 4\ndelta = "shift"\n')
    assert log.accumulate == LogAccumulator(lanes=4, delta=methods.Shift())
    assert log.add == LogAccumulator(lanes=1, delta=methods.Shift())
    with pytest.raises(BadValueError, match="accumulates in the log domain"):
        _ = log.linear
    with pytest.raises(BadValueError, match="accumulates in the linear domain"):
        _ = linear.log


L, G = '[accumulate]\nkind = "linear"\n', '[accumulate]\nkind = "log"\n'


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "field 'weight' is missing"),
        ('weight = "8:8"\n', "field 'activation' is missing"),
        (MINIMAL, r"the table \[accumulate\] is missing"),
        (MINIMAL + 'unknwon = 1\n[accumulate]\nkind = "log"\n', "unknown field 'unknwon'"),
        (MINIMAL + 'activaton = "8:8"\n' + L, "unknown field 'activaton'; did you mean 'activation'"),
        (MINIMAL.replace('"8:8"', "8", 1) + L, "weight: not an LNS format: 8"),
        (MINIMAL.replace('"8:8"', '"8-8"', 1) + L, "weight: not an LNS format: '8-8'"),
        (MINIMAL.replace('"8:8"', '"99:8"', 1) + L, "weight: bits must be from 2 to 32, not 99"),
        (MINIMAL + "accumulate = 3\n", "accumulate must be a table, not 3"),
        (MINIMAL + "[accumulate]\nbits = 24\n", "accumulate.kind is missing"),
        (MINIMAL + '[accumulate]\nkind = "lineer"\n', "accumulate.kind 'lineer'; did you mean 'linear'"),
        (MINIMAL + L + "lane = 4\n", "field of accumulate 'lane'; did you mean 'lanes'"),
        (MINIMAL + L + "guard_bits = 4\n", "unknown field of accumulate 'guard_bits'"),
        (MINIMAL + L + "bits = 63\n", "accumulate.bits must be from 2 to 62, not 63"),
        (MINIMAL + L + "bits = 1\n", "accumulate.bits must be from 2 to 62, not 1"),
        (MINIMAL + L + "bits = 24.0\n", "accumulate.bits must be an integer from 2 to 62, not 24.0"),
        (MINIMAL + L + "bits = true\n", "accumulate.bits must be an integer from 2 to 62, not True"),
        (MINIMAL + L + 'conversion = "bins"\n', "conversion 'bins'; did you mean 'bin'"),
        (MINIMAL + L + "table_bits = -1\n", "accumulate.table_bits must be from 0 to 16, not -1"),
        (MINIMAL + L + "table_bits = 4\n", r"accumulate.table_bits must be from 0 to 3 \(log2 of gamma 8\), not 4"),
        (MINIMAL + L + "constant_bits = 25\n", "accumulate.constant_bits must be from 0 to 24, not 25"),
        (MINIMAL + L + "lanes = 0\n", "accumulate.lanes must be from 1 to 1024, not 0"),
        (MINIMAL + L + "psum_bits = 1\n", "accumulate.psum_bits must be from 2 to 62, not 1"),
        (MINIMAL + L + 'overflow = "clamp"\n', "unknown overflow 'clamp'"),
        (MINIMAL + L + 'shift = "floor"\n', "unknown shift 'floor'"),
        (MINIMAL + L + 'encoder = "mitchel"\n', "encoder 'mitchel'; did you mean 'mitchell'"),
        (MINIMAL + L + 'encoder = "table"\n', "accumulate.encoder_bits must be an integer from 1 to 16, not None"),
        (MINIMAL + L + 'encoder = "table"\nencoder_bits = 17\n', "accumulate.encoder_bits must be from 1 to 16"),
        (MINIMAL + L + "encoder_bits = 4\n", "encoder_bits belongs to encoder"),
        (MINIMAL + L + 'conversion = "bin"\nbits = 60\n', "bits \\+ constant_bits \\+ table_bits must be at most 61"),
        (MINIMAL + G + "bits = 0\n", "accumulate.bits must be from 1 to 40, not 0"),
        (MINIMAL + G + "bits = 41\n", "accumulate.bits must be from 1 to 40, not 41"),
        (MINIMAL + G + "guard_bits = 9\n", "accumulate.guard_bits must be from 0 to 8, not 9"),
        (MINIMAL + G + "lanes = 2000\n", "accumulate.lanes must be from 1 to 1024, not 2000"),
        (MINIMAL + G + 'delta = "exat"\n', "accumulate.delta.method 'exat'; did you mean 'exact'"),
        (MINIMAL + G + "delta = 3\n", "accumulate.delta must be a table or a method's name, not 3"),
        (MINIMAL + G + "delta = {}\n", "accumulate.delta.method None"),
        (MINIMAL + G + "delta = {method = [1]}\n", r"accumulate.delta.method"),
        (MINIMAL + G + 'delta = {method = "table"}\n', "accumulate.delta.entries is missing"),
        (MINIMAL + G + 'delta = {method = "table", entries = 0}\n', "accumulate.delta.entries must be from 1 to 65536"),
        (MINIMAL + G + 'delta = {method = "exact", entries = 2}\n', "unknown field of accumulate.delta 'entries'"),
        (MINIMAL + G + 'delta = {method = "cordic", iteration = 2}\n', "did you mean 'iterations'"),
        (MINIMAL + L + '[add]\nkind = "linear"\n', "add.kind must be log"),
        (MINIMAL + L + "[add]\nbits = 50\n", "add.bits must be from 1 to 40, not 50"),
        (MINIMAL + "add = 1\n" + L, "add must be a table, not 1"),
        (MINIMAL + 'underflow = "flush"\n' + L, "unknown underflow 'flush'"),
        (MINIMAL + "spec = 2\n" + L, "spec must be 1, the version that this lnsdeploy executes, not 2"),
        (MINIMAL + "spec = true\n" + L, "spec must be"),
        (MINIMAL + "spec = 1.0\n" + L, "spec must be"),
        (MINIMAL + "name = 3\n" + L, "name must be text, not 3"),
        (MINIMAL + "notes = [1]\n" + L, r"notes must be text, not \[1\]"),
        (MINIMAL.replace("8:8", "8:3") + L, "power of two, not 3"),
        (MINIMAL.replace("8:8", "8:3", 1) + G, "gammas 8 and 3 do not fit together"),
        (
            'weight = "8:8"\nactivation = "8:8"\noutput = "8:4"\n' + L,
            r"output: its gamma must be the operands' \(8\), not 4",
        ),
        (MINIMAL.replace("8:8", "8:65536") + G + "guard_bits = 2\n", "at most 131072, not 262144"),
        ("weight = ", "not valid TOML"),
        ("= 1", "not valid TOML"),
        ("a = 1\na = 2", "not valid TOML"),
        ("\x00", "not valid TOML"),
    ],
)
def test_every_bad_field_is_named(text: str, message: str) -> None:
    """spec 8.1: one clear error that says where, which field, and its range or the nearest name."""
    with pytest.raises(BadFileError, match=message) as caught:
        Datapath.from_toml(text, where="mine.toml")
    assert str(caught.value).startswith("mine.toml: ")
    assert "\n" not in str(caught.value)


def test_objects_are_checked_too() -> None:
    fmt = LNSFormat(8, 8)
    good: dict[str, Any] = {
        "name": "x",
        "weight": fmt,
        "activation": fmt,
        "output": fmt,
        "accumulate": LinearAccumulator(),
        "add": default_adder(fmt),
    }
    for field, bad, error, message in (
        ("name", 3, BadTypeError, "name must be text"),
        ("citation", None, BadTypeError, "citation must be text"),
        ("weight", "8:8", BadTypeError, "weight must be an LNSFormat, not '8:8'"),
        ("output", None, BadTypeError, "output must be an LNSFormat"),
        ("accumulate", 24, BadTypeError, "accumulate must be a LinearAccumulator or a LogAccumulator"),
        ("add", LinearAccumulator(), BadTypeError, "add must be a LogAccumulator"),
        ("underflow", "none", UnknownNameError, "unknown underflow 'none'"),
        ("spec", 0, BadValueError, "spec must be 1"),
        ("output", LNSFormat(8, 4), BadValueError, "output: its gamma"),
    ):
        with pytest.raises(error, match=message):
            Datapath(**{**good, field: bad})
    with pytest.raises(BadTypeError, match="delta must be one of the methods"):
        LogAccumulator(delta="exact")  # type: ignore[arg-type]
    with pytest.raises(BadFileError, match="a datapath is a table of fields, not list"):
        Datapath.from_dict([])  # type: ignore[arg-type]


def test_numpy_integers_are_integers() -> None:
    """Fields computed by NumPy make the same datapath, fingerprint and TOML as Python's."""
    fmt = LNSFormat(8, 8)
    for bits in (np.int64(10), np.uint8(10)):
        odd = Datapath("x", fmt, fmt, fmt, LogAccumulator(bits=bits, delta=methods.Table(bits)), default_adder(fmt))  # type: ignore[arg-type]
        even = Datapath("x", fmt, fmt, fmt, LogAccumulator(bits=10, delta=methods.Table(10)), default_adder(fmt))
        assert odd == even
        assert odd.fingerprint == even.fingerprint
        assert odd.to_toml() == even.to_toml()
        linear = dataclasses.replace(even, accumulate=LinearAccumulator(bits=bits))  # type: ignore[arg-type]
        assert Datapath.from_toml(linear.to_toml()) == linear


# ---------------------------------------------------------------------------------------------------------------------
# Fingerprints


def test_fingerprints_ignore_words_and_see_every_other_field() -> None:
    """spec 8.2: each field of each part, one at a time."""
    fmt, linear = LNSFormat(8, 8), _linear(table_bits=2, encoder="table", encoder_bits=4)
    base = linear.fingerprint
    assert re.fullmatch("[0-9a-f]{16}", base)
    for text in ("name", "citation", "notes"):
        assert dataclasses.replace(linear, **{text: "another"}).fingerprint == base
    changed = [
        dataclasses.replace(linear, weight=LNSFormat(8, 4)),
        dataclasses.replace(linear, activation=LNSFormat(8, 8, False)),
        dataclasses.replace(linear, output=LNSFormat(9, 8)),
        dataclasses.replace(linear, underflow="min"),
        dataclasses.replace(linear, add=LogAccumulator(bits=11)),
    ]
    other: dict[str, Any] = {
        "bits": 25,
        "conversion": "bin",
        "table_bits": 3,
        "constant_bits": 9,
        "lanes": 2,
        "psum_bits": 30,
        "overflow": "wrap",
        "shift": "round",
        "encoder_bits": 5,
    }
    changed += [
        dataclasses.replace(linear, accumulate=dataclasses.replace(linear.linear, **{k: v})) for k, v in other.items()
    ]
    changed += [
        dataclasses.replace(linear, accumulate=dataclasses.replace(linear.linear, encoder=e, encoder_bits=None))
        for e in ("exact", "mitchell")
    ]
    assert set(other) | {"encoder"} == {f.name for f in dataclasses.fields(LinearAccumulator)}
    adders = [LogAccumulator(), LogAccumulator(bits=9), LogAccumulator(guard_bits=1), LogAccumulator(lanes=2)]
    adders += [LogAccumulator(delta=how) for how in DELTAS if how != methods.Exact()]
    changed += [dataclasses.replace(linear, accumulate=adder) for adder in adders]
    changed += [dataclasses.replace(linear, add=adder) for adder in adders]
    prints = [datapath.fingerprint for datapath in [linear, *changed]]
    assert len(set(prints)) == len(prints)
    covered = {"weight", "activation", "output", "underflow", "add", "accumulate", "name", "citation", "notes", "spec"}
    assert covered == {f.name for f in dataclasses.fields(Datapath)}
    assert Datapath.from_toml(linear.to_toml()).fingerprint == base
    assert fmt == linear.weight


def _fresh(datapath: Datapath) -> str:
    """The fingerprint, made again: it is cached on the object."""
    return dataclasses.replace(datapath).fingerprint


@pytest.mark.parametrize("name", ["lns-madam-8", "elma-8", "gauss-8", "lognet-5"])
def test_fingerprints_see_every_table_entry(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """spec 8.2: any entry of any table off by one gives another fingerprint."""
    datapath = load_datapath(name)
    base = _fresh(datapath)
    seen = {base}

    def changed(table: np.ndarray[Any, Any], i: int) -> np.ndarray[Any, Any]:
        copy = table.copy()
        copy[i] += 1
        return copy

    makers = []
    for maker in ("remainder_constants", "log_table"):
        original = getattr(tables, maker)
        key = "constants" if maker == "remainder_constants" else "encoder"
        for i in range(len(datapath.tables().get(key, []))):
            wrong_table: Any = lambda *a, f=original, i=i: changed(f(*a), i)  # noqa: E731
            makers.append((tables, maker, wrong_table))
    made = datapath.add.delta.tables(datapath.gamma << datapath.add.guard_bits)
    for i in range(len(made.plus)):
        wrong = DeltaTables(changed(made.plus, i), made.minus)
        makers.append((methods.Delta, "tables", lambda *_, w=wrong: w))
    for i in range(len(made.minus)):
        wrong = DeltaTables(made.plus, changed(made.minus, i))
        makers.append((methods.Delta, "tables", lambda *_, w=wrong: w))
    for place, attribute, replacement in makers:
        with monkeypatch.context() as patch:
            patch.setattr(place, attribute, replacement)
            seen.add(_fresh(datapath))
    assert len(seen) == len(makers) + 1
    assert _fresh(datapath) == base


# ---------------------------------------------------------------------------------------------------------------------
# Derived datapaths


@pytest.mark.parametrize("gamma", [1, 2, 3, 5, 8, 10, 64, 1024])
def test_every_format_has_a_default_datapath(gamma: int) -> None:
    """Any bits, any γ, with narrower weights too; linear where γ is a power of two, else log."""
    for bits in range(2, 17):
        fmt = LNSFormat(bits, gamma)
        datapath = for_format(fmt)
        assert datapath.is_linear == (gamma & (gamma - 1) == 0)
        assert (datapath.activation, datapath.weight, datapath.output) == (fmt, fmt, fmt)
        assert Datapath.from_toml(datapath.to_toml()) == datapath
        mixed = for_format(LNSFormat(bits, gamma, False), weight=LNSFormat(4, 1))
        assert mixed.gamma == mixed.output.gamma == gamma
        assert mixed.weight == LNSFormat(4, 1)


@pytest.mark.parametrize("name", named_datapaths())
def test_named_datapaths_take_other_formats(name: str) -> None:
    """The same arithmetic for other formats is again a valid datapath, and itself for its own."""
    datapath = load_datapath(name)
    assert datapath.with_formats(datapath.weight, datapath.activation) is datapath
    for weight, activation in (("4:2", "6:4"), ("8:8", "u8:8"), ("12:64", "12:64"), ("2:1", "2:1")):
        pair = LNSFormat.parse(weight), LNSFormat.parse(activation)
        other = datapath.with_formats(*pair)
        assert (other.weight, other.activation) == pair
        assert other.is_linear == datapath.is_linear
        assert other.name != datapath.name
        assert Datapath.from_toml(other.to_toml()) == other


def test_gammas_widen() -> None:
    """spec 3.2: the common γ, and a format of it with at least the range."""
    assert common_gamma(LNSFormat(8, 8), LNSFormat(4, 2)) == 8
    with pytest.raises(BadValueError, match="the smaller must divide the larger"):
        common_gamma(LNSFormat(8, 8), LNSFormat(8, 3))
    for bits, gamma, factor in ((8, 8, 1), (8, 4, 2), (6, 3, 3), (4, 1, 10), (32, 1, 8)):
        fmt = LNSFormat(bits, gamma)
        wide = widened(fmt, gamma * factor)
        assert wide.gamma == gamma * factor
        assert wide.max_code >= fmt.max_code * factor or wide.bits == 32


def test_errors_are_builtin_kinds_too() -> None:
    """Generic handlers see ValueError, TypeError and LookupError."""
    with pytest.raises(ValueError, match="bits"):
        LinearAccumulator(bits=0)
    with pytest.raises(TypeError, match="bits"):
        LinearAccumulator(bits="24")  # type: ignore[arg-type]
    with pytest.raises(LookupError, match="overflow"):
        LinearAccumulator(overflow="clip")
    assert issubclass(UnknownNameError, LNSError)
