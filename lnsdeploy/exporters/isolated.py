"""Reading a model file in a process of its own, with limits: what it does to a library, it does there.

The parent starts ``python -m lnsdeploy.exporters.isolated`` and reads back either the model in its normal form or one
error. A crash, a hang, or more memory than a model of that size can need, is an error as any other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lnsdeploy import errors
from lnsdeploy.emulator.artifact import MAX_FILE_BYTES, parse_model
from lnsdeploy.errors import BadFileError, LNSError
from lnsdeploy.exporters.source import ReadOptions, Source, load_libraries, normalise, read_model

# Address space for the libraries themselves and a net of a few hundred megabytes, and for each byte of a larger one.
BASE_MEMORY = 8 << 30
MEMORY_PER_BYTE = 8
SECONDS = 300


def read_source(path: str | os.PathLike[str], options: ReadOptions | None = None, *, seconds: int = SECONDS) -> Source:
    """A float ONNX file in the form that lowering reads.

    Args:
        options: what the file does not say.
        seconds: after which reading is given up.

    Raises:
        BadFileError: missing, damaged or hostile. UnsupportedError: it cannot be brought to that form.
        BadValueError: `options` do not fit it.
    """
    file = Path(path)
    try:
        size = file.stat().st_size
    except OSError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror}") from error
    if not file.is_file():
        raise BadFileError(f"{file} is a folder, and not one that lnsdeploy train made")
    if size > MAX_FILE_BYTES:
        raise BadFileError(f"{file}: larger than the {MAX_FILE_BYTES} bytes that such a file may have")
    with tempfile.TemporaryDirectory(prefix="lnsdeploy-") as folder:
        made, told = Path(folder) / "model.onnx", Path(folder) / "result.json"
        request = {
            "path": str(file),
            "model": str(made),
            "result": str(told),
            "options": (options or ReadOptions()).to_dict(),
            "memory": BASE_MEMORY + MEMORY_PER_BYTE * _with_neighbours(file, size),
            "seconds": seconds,
        }
        environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHONSTARTUP")}
        try:
            done = subprocess.run(
                [sys.executable, "-m", __name__, json.dumps(request)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                timeout=seconds,
                check=False,
                env=environment,
            )
        except subprocess.TimeoutExpired as error:
            raise BadFileError(f"{file}: reading it took more than {seconds} s and was given up") from error
        if not told.exists():
            raise BadFileError(_why(file, done.returncode, done.stderr))
        result = json.loads(told.read_text(encoding="utf-8"))
        if "error" in result:
            raise _error(result["error"])(result["message"])
        model = parse_model(made.read_bytes(), str(file))
    return Source(
        model,
        str(file),
        tuple(result["input_shape"]),
        tuple(result["notes"]),
        result["float_bytes"],
        result["parameters"],
    )


def _with_neighbours(file: Path, size: int) -> int:
    """Bytes of the file and of those beside it, which may hold its parameters."""
    total = 0
    try:
        for entry in os.scandir(file.parent):
            if entry.is_file(follow_symlinks=False):
                total += entry.stat(follow_symlinks=False).st_size
    except OSError:
        total = size
    return min(max(total, size), MAX_FILE_BYTES)


def _why(file: Path, status: int, stderr: bytes) -> str:
    """What to say of a child that left no result."""
    if status == -signal.SIGXCPU or status == -signal.SIGKILL:
        return f"{file}: reading it took more time or memory than any model of its size needs, and was given up"
    if status < 0:
        name = signal.Signals(-status).name
        return f"{file}: damaged; it crashes the libraries that read ONNX files ({name})"
    text = stderr.decode("utf-8", "replace").strip()
    last = text.splitlines()[-1] if text else f"status {status}"
    if "bad_alloc" in text or "MemoryError" in text:
        return f"{file}: damaged; reading it takes more memory than any model of its size needs"
    return f"{file}: cannot be read ({last[:200]})"


def _error(name: str) -> type[LNSError]:
    kind = getattr(errors, name, BadFileError)
    return kind if isinstance(kind, type) and issubclass(kind, LNSError) else BadFileError


def _limit(memory: int, seconds: int) -> None:
    try:
        import resource
    except ImportError:  # pragma: no cover
        return
    for what, most in (
        (resource.RLIMIT_AS, memory),
        # threads of ONNX Runtime count as well
        (resource.RLIMIT_CPU, 2 * seconds),
        (resource.RLIMIT_CORE, 0),
    ):
        _, hard = resource.getrlimit(what)
        limit = most if hard == resource.RLIM_INFINITY else min(most, hard)
        resource.setrlimit(what, (limit, hard if what == resource.RLIMIT_CPU else limit))


def _child(request: Mapping[str, Any]) -> dict[str, Any]:
    where = request["path"]
    try:
        source = normalise(read_model(where), ReadOptions.from_dict(request["options"]), where, checked=True)
        data = source.model.SerializeToString()
        if len(data) > MAX_FILE_BYTES:
            raise BadFileError(f"{where}: its parameters take more than {MAX_FILE_BYTES >> 30} GiB, the most there is")
        Path(request["model"]).write_bytes(data)
    except LNSError as error:
        return {"error": type(error).__name__, "message": " ".join(str(error).split())}
    except MemoryError:
        return {
            "error": "BadFileError",
            "message": f"{where}: damaged; reading it takes more memory than any model of its size needs",
        }
    except Exception as error:  # whatever a damaged file makes of Python libraries
        text = " ".join(str(error).split())[:200]
        return {"error": "BadFileError", "message": f"{where}: damaged ({type(error).__name__}: {text})"}
    return {
        "input_shape": list(source.input_shape),
        "notes": list(source.notes),
        "float_bytes": source.float_bytes,
        "parameters": source.parameters,
    }


def main() -> None:
    """The child's entry point."""
    request = json.loads(sys.argv[1])
    with contextlib.suppress(LNSError):
        # what is loaded is no fault of the file; that it cannot be is said in its turn
        load_libraries()
    _limit(int(request["memory"]), int(request["seconds"]))
    result = _child(request)
    told = Path(request["result"])
    part = told.with_suffix(".part")
    part.write_text(json.dumps(result), encoding="utf-8")
    part.rename(told)


if __name__ == "__main__":
    main()
