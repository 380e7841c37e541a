"""Files: nothing half-written, nothing lost, every damage refused in one line."""

from __future__ import annotations

import errno
import json
import os
import stat
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lnsdeploy import files
from lnsdeploy.errors import BadFileError


def _names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    """Under its final name only at the end, with ordinary permissions, and no temporary file left."""
    target = tmp_path / "model.toml"
    with files.atomic_path(target) as temporary:
        assert temporary.parent == tmp_path
        assert temporary.suffix == ".toml"
        temporary.write_text("new", encoding="utf-8")
        assert not target.exists()
    assert target.read_text(encoding="utf-8") == "new"
    assert _names(tmp_path) == ["model.toml"]
    mask = os.umask(0)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


@pytest.mark.parametrize(
    "failure", [KeyboardInterrupt(), RuntimeError("no"), OSError(errno.ENOSPC, "No space left on device")]
)
def test_a_failure_keeps_the_old_file(tmp_path: Path, failure: BaseException) -> None:
    """A full disk, Ctrl-C or any error in the middle: the old file stays, and nothing else."""
    target = tmp_path / "weights"
    files.write_text(target, "old")
    expected = BadFileError if isinstance(failure, OSError) else type(failure)

    def write() -> None:
        with files.atomic_path(target) as temporary:
            temporary.write_bytes(b"half")
            raise failure

    with pytest.raises(expected) as caught:
        write()
    if isinstance(failure, OSError):
        assert str(caught.value) == f"cannot write {target}: No space left on device"
    assert target.read_text(encoding="utf-8") == "old"
    assert _names(tmp_path) == ["weights"]


def test_a_failed_rename_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "weights"
    files.write_text(target, "old")

    def refuse(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(Path, "replace", refuse)
    with pytest.raises(BadFileError, match=r"cannot write .*weights: Input/output error"):
        files.write_text(target, "new")
    assert target.read_text(encoding="utf-8") == "old"
    assert _names(tmp_path) == ["weights"]


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error of the write itself, for each way to write."""

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    for write in (
        lambda p: files.write_bytes(p, b"x"),
        lambda p: files.write_text(p, "x"),
        lambda p: files.write_json(p, {"x": 1}),
        lambda p: files.write_safetensors(p, {"x": np.zeros(2)}),
    ):
        with pytest.raises(BadFileError, match="No space left on device") as caught:
            write(tmp_path / "out")
        assert "\n" not in str(caught.value)
    assert _names(tmp_path) == []


def test_what_cannot_be_written_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match=r"cannot write .*No such file or directory"):
        files.write_text(tmp_path / "missing" / "x", "")
    (tmp_path / "folder").mkdir()
    with pytest.raises(BadFileError, match=r"cannot write .*folder"):
        files.write_text(tmp_path / "folder", "")
    assert _names(tmp_path) == ["folder"]
    with pytest.raises(ValueError, match=r"JSON compliant|not allowed|Out of range"):
        files.write_json(tmp_path / "x.json", float("nan"))
    assert _names(tmp_path) == ["folder"]


def test_writers_write(tmp_path: Path) -> None:
    files.write_bytes(tmp_path / "b", b"\x00\xff")
    assert (tmp_path / "b").read_bytes() == b"\x00\xff"
    assert files.read_bytes(tmp_path / "b") == b"\x00\xff"
    files.write_text(tmp_path / "t", "γ = 8\n")
    assert (tmp_path / "t").read_bytes() == "γ = 8\n".encode()
    files.write_json(tmp_path / "j", {"γ": [1, None]})
    assert json.loads((tmp_path / "j").read_text(encoding="utf-8")) == {"γ": [1, None]}


def test_folders(tmp_path: Path) -> None:
    made = files.make_folder(tmp_path / "a" / "b")
    assert made.is_dir()
    assert files.make_folder(made) == made
    (tmp_path / "file").write_text("", encoding="utf-8")
    with pytest.raises(BadFileError, match=r"cannot create the folder"):
        files.make_folder(tmp_path / "file")
    with pytest.raises(BadFileError, match=r"cannot create the folder"):
        files.make_folder(tmp_path / "file" / "below")


def test_reading_refuses(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match=r"cannot read .*No such file"):
        files.read_bytes(tmp_path / "missing")
    with pytest.raises(BadFileError, match=r"cannot read .*directory"):
        files.read_bytes(tmp_path)
    (tmp_path / "long").write_bytes(b"x" * 10)
    assert files.read_bytes(tmp_path / "long", limit=10) == b"x" * 10
    with pytest.raises(BadFileError, match="larger than the 9 bytes"):
        files.read_bytes(tmp_path / "long", limit=9)


# ---------------------------------------------------------------------------------------------------------------------
# TOML


@pytest.mark.smoke
def test_toml_in_and_out(tmp_path: Path) -> None:
    value = {"a": 1, "b": {"c": [1.5, "γ", True]}, "text": 'with "quotes"\nand lines'}
    files.write_text(tmp_path / "x.toml", files.dump_toml(value))
    assert files.read_toml(tmp_path / "x.toml") == value


@pytest.mark.parametrize(
    "damage",
    [
        b"a = ",
        b"a = 1\na = 2",
        b"[a",
        b"\xff\xfe",
        b"a = 'x",
        b"\x00",
        b"a = " + b"[" * 100_000,
        b"= 3",
        b"a = 1 b = 2",
    ],
    ids=["cut", "twice", "bracket", "not-utf-8", "string", "nul", "deep", "no-key", "two"],
)
def test_damaged_toml_is_refused(tmp_path: Path, damage: bytes) -> None:
    """The message names the file; nothing else is raised, deep nesting included."""
    path = tmp_path / "bad.toml"
    path.write_bytes(damage)
    with pytest.raises(BadFileError, match=r"bad\.toml: not valid TOML"):
        files.read_toml(path)


def test_missing_toml_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match=r"cannot read"):
        files.read_toml(tmp_path / "none.toml")


def test_a_huge_toml_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "huge.toml"
    with path.open("wb") as handle:
        handle.truncate(files.MAX_TEXT_BYTES + 1)
    with pytest.raises(BadFileError, match="larger than"):
        files.read_toml(path)


# ---------------------------------------------------------------------------------------------------------------------
# safetensors


def _example(path: Path) -> bytes:
    arrays = {"w": np.arange(6, dtype=np.float32).reshape(2, 3), "codes": np.array([1, 2], dtype=np.uint16)}
    files.write_safetensors(path, arrays, {"kind": "run", "bits": "8"})
    return path.read_bytes()


def test_safetensors_in_and_out(tmp_path: Path) -> None:
    """Arrays of every dtype, empty ones and metadata; the same input gives the same bytes, in any order."""
    path = tmp_path / "x.safetensors"
    data = _example(path)
    arrays, metadata = files.read_safetensors(path)
    assert metadata == {"kind": "run", "bits": "8"}
    assert arrays["w"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert arrays["codes"].dtype == np.uint16
    files.write_safetensors(path, dict(reversed(arrays.items())), {"bits": "8", "kind": "run"})
    assert path.read_bytes() == data
    odd: dict[str, Any] = {"empty": np.zeros((0, 3)), "scalar": np.array(3, dtype=np.int64), "t": np.ones((2, 3)).T}
    files.write_safetensors(path, odd)
    again, metadata = files.read_safetensors(path)
    assert metadata == {}
    assert {k: v.shape for k, v in again.items()} == {"empty": (0, 3), "scalar": (), "t": (3, 2)}


def _header(text: bytes, rest: bytes = b"") -> bytes:
    return struct.pack("<Q", len(text)) + text + rest


@pytest.mark.parametrize(
    "damage",
    [
        lambda d: b"",
        lambda d: d[:4],
        lambda d: d[:8],
        lambda d: d[:40],
        lambda d: d[:-1],
        lambda d: d + b"\x00",
        lambda d: struct.pack("<Q", 2**63) + d[8:],
        lambda d: struct.pack("<Q", 2**64 - 1) + d[8:],
        lambda d: d[:8] + b"\xff" * (len(d) - 8),
        lambda d: d.replace(b"F32", b"F99"),
        lambda d: d.replace(b"[2,3]", b"[9,3]"),
        lambda d: _header(b"[]"),
        lambda d: _header(b"null"),
        lambda d: _header(b'{"w": 3}'),
        lambda d: _header(b'{"w":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}}', b"\x00" * 4),
        lambda d: _header(b'{"w":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,4]}}', b"\x00" * 4),
        lambda d: b"PK\x03\x04" + d,
        lambda d: b"\x80\x04cposix\nsystem\n(S'true'\ntR.",
    ],
)
def test_damaged_safetensors_are_refused(tmp_path: Path, damage: Any) -> None:
    """Truncated, longer, wrong lengths, wrong headers, other kinds of file: refused by name, never executed."""
    path = tmp_path / "bad.safetensors"
    path.write_bytes(damage(_example(path)))
    with pytest.raises(BadFileError, match=r"bad\.safetensors") as caught:
        files.read_safetensors(path)
    assert "\n" not in str(caught.value)


def test_missing_safetensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadFileError, match=r"cannot read"):
        files.read_safetensors(tmp_path / "none.safetensors")
    with pytest.raises(BadFileError):
        files.read_safetensors(tmp_path)
