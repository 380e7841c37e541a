"""The native library as it was built and installed: its record, and how it is found."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

import lnsdeploy
from lnsdeploy import _native


@pytest.fixture
def package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The folder of a package that holds nothing yet."""
    monkeypatch.delenv(_native.LIBRARY_VARIABLE, raising=False)
    monkeypatch.setattr(_native, "__path__", [str(tmp_path / "missing"), str(tmp_path)])
    return tmp_path


@pytest.mark.smoke
def test_what_was_built_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(_native.LIBRARY_VARIABLE, raising=False)
    info, path = _native.build_info(), _native.library_path()
    assert info["built"] == (path is not None)
    assert bool(info["why"]) != info["built"]
    if path is None:
        pytest.skip(f"no native library: {info['why']}")
    assert info["version"] == lnsdeploy.__version__
    assert info["compiler"]
    assert ctypes.CDLL(str(path)).lns_abi() >= 1


def test_a_named_library_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_native.LIBRARY_VARIABLE, "/some/where.so")
    assert _native.library_path() == Path("/some/where.so")


def test_an_empty_name_is_none(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(_native.LIBRARY_VARIABLE, "")
    assert _native.library_path() is None


@pytest.mark.parametrize("name", _native.NAMES)
def test_the_library_of_each_system(package: Path, name: str) -> None:
    (package / name).touch()
    (package / "build.json").write_text('{"built": true, "isas": ["portable"]}')
    assert _native.library_path() == package / name
    assert _native.build_info() == {"built": True, "why": "", "compiler": "", "isas": ["portable"], "version": ""}


@pytest.mark.parametrize(
    "record", [None, "", "[1]", '{"built": false}', '{"built": true}', '{"built": false, "why": "x"}']
)
def test_no_library_has_a_reason(package: Path, record: str | None) -> None:
    if record is not None:
        (package / "build.json").write_text(record)
    assert _native.library_path() is None
    info = _native.build_info()
    assert info["built"] is False
    assert info["why"]
