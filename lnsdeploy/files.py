"""Reading and writing files so that nothing is lost and nothing hostile runs.

Every file that lnsdeploy writes appears under its final name only when it is complete: it is written
beside its destination under a temporary name and then renamed. Readers turn any damage into a
:class:`~lnsdeploy.errors.BadFileError` that names the file.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from lnsdeploy.errors import BadFileError

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

# A TOML or JSON header larger than this is not one of ours; refuse before parsing it.
MAX_TEXT_BYTES = 64 * 1024 * 1024


@contextlib.contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path in the folder of `path`; rename it onto `path` if the block succeeds.

    The temporary file is removed if the block raises, so a full disk or Ctrl-C leaves the old file.

    Raises:
        BadFileError: the folder does not exist or cannot be written, or the disk is full.
    """
    final = Path(path)
    try:
        descriptor, name = tempfile.mkstemp(dir=final.parent, prefix=f".{final.name}.", suffix=".tmp" + final.suffix)
    except OSError as error:
        raise BadFileError(f"cannot write {final}: {error.strerror}") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        yield temporary
        # mkstemp makes private files; give the result the permissions an ordinary open() would.
        mask = os.umask(0)
        os.umask(mask)
        temporary.chmod(0o666 & ~mask)
        with temporary.open("rb") as handle:
            os.fsync(handle.fileno())
        temporary.replace(final)
    except OSError as error:
        raise BadFileError(f"cannot write {final}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def write_bytes(path: str | os.PathLike[str], data: bytes) -> None:
    """Write `data` to `path` atomically."""
    with atomic_path(path) as temporary:
        temporary.write_bytes(data)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` to `path` atomically, in UTF-8."""
    write_bytes(path, text.encode("utf-8"))


def write_json(path: str | os.PathLike[str], value: object) -> None:
    """Write `value` to `path` as JSON, atomically."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False, allow_nan=False) + "\n")


def make_folder(path: str | os.PathLike[str]) -> Path:
    """Create the folder `path` (and its parents) if it is missing.

    Raises:
        BadFileError: it cannot be created, or a file of that name stands in the way.
    """
    folder = Path(path)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadFileError(f"cannot create the folder {folder}: {error.strerror}") from error
    return folder


def read_bytes(path: str | os.PathLike[str], *, limit: int | None = None) -> bytes:
    """Read a whole file.

    Raises:
        BadFileError: it is missing, not a file, unreadable, or larger than `limit` bytes.
    """
    file = Path(path)
    try:
        if limit is not None and file.stat().st_size > limit:
            raise BadFileError(f"{file}: larger than the {limit} bytes that such a file may have")
        return file.read_bytes()
    except OSError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror}") from error


def read_toml(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a TOML file.

    Raises:
        BadFileError: it is missing, unreadable, too large, or not TOML; the message gives the line.
    """
    return parse_toml(read_bytes(path, limit=MAX_TEXT_BYTES), where=str(path))


def parse_toml(text: str | bytes, *, where: str) -> dict[str, Any]:
    """Parse TOML text; `where` names its origin in error messages."""
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        return tomllib.loads(text)
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadFileError(f"{where}: not valid TOML: {error}") from error


def dump_toml(value: Mapping[str, Any]) -> str:
    """TOML text of a mapping."""
    import tomli_w

    return tomli_w.dumps(dict(value))


def read_safetensors(path: str | os.PathLike[str]) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """Read a safetensors file: its arrays and its string metadata. Nothing in it is executed.

    Raises:
        BadFileError: it is missing, truncated, or damaged.
    """
    from safetensors import SafetensorError, safe_open

    file = Path(path)
    check_safetensors_header(file)
    try:
        with safe_open(str(file), framework="numpy") as handle:
            arrays = {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
            metadata = dict(handle.metadata() or {})
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadFileError(f"{file}: not a readable safetensors file: {error}") from error
    return arrays, metadata


def check_safetensors_header(file: Path) -> None:
    """Refuse a file that is missing, or shorter than its header says.

    Raises:
        BadFileError: it is.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as handle:
            head = handle.read(8)
    except OSError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror}") from error
    if len(head) < 8 or struct.unpack("<Q", head)[0] > size - 8:
        raise BadFileError(f"{file}: truncated, or not a safetensors file")


def write_safetensors(
    path: str | os.PathLike[str], arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None
) -> None:
    """Write arrays and string metadata as safetensors, atomically; the same input gives the same bytes."""
    from safetensors.numpy import save

    ordered = {name: np.asarray(arrays[name], order="C") for name in sorted(arrays)}
    data = save(ordered, metadata=dict(metadata) if metadata else None)
    write_bytes(path, _in_order(data))


def _in_order(data: bytes) -> bytes:
    """A safetensors file with the entries of its header's metadata sorted: the library writes them in any order."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    if "__metadata__" not in header:
        return data
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    # the data that follow stay aligned
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + data[8 + size :]
