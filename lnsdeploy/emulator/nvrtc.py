"""GPU kernels from their text: compiled by NVRTC when they are first needed, kept on disk, launched on torch's stream.

The text lies in `lnsdeploy/kernels`. Neither a CUDA toolkit nor a C++ compiler takes part: NVRTC and the driver are
called through `cuda-bindings`. Compiling needs no GPU either.

A compiled kernel is kept under a key of everything it depends on: text, options, architecture and NVRTC's version. The
folder is `lnsdeploy` in the user's cache folder, or the one that ``LNSDEPLOY_CACHE`` names; it may be deleted at any
time. A damaged entry is compiled again, and a folder that cannot be written only costs time.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import sys
import tempfile
import threading
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Protocol

from lnsdeploy.errors import LNSError, MissingDependencyError, UnsupportedError

CACHE_VARIABLE = "LNSDEPLOY_CACHE"
HEADERS = ("params.h", "stages.h")
INSTALL = "install lnsdeploy[cuda], or lnsdeploy[cuda12] for drivers of CUDA 12 (cuda-bindings and NVRTC)"
_MAGIC = b"lnsdeploy kernel 1\n"


@dataclass(frozen=True)
class Program:
    """A kernel text with the macros that it is compiled with.

    Args:
        file: its name in `lnsdeploy/kernels`.
        macros: names and values, in order.
    """

    file: str
    macros: tuple[tuple[str, int], ...] = ()

    def options(self) -> list[str]:
        """The macros as compiler options."""
        return [f"-D{name}={value}" for name, value in self.macros]


class Runtime(Protocol):
    """What compiles and launches kernels: a GPU, or the host build of the tests."""

    @property
    def shared_memory(self) -> int:
        """Bytes of shared memory that a block may have."""

    @property
    def multiprocessors(self) -> int:
        """How many there are."""

    def launch(
        self,
        program: Program,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        parameters: ctypes.Structure,
    ) -> None:
        """Launch a kernel of a program; it is compiled and loaded if it was not yet."""


@lru_cache(maxsize=8)
def source(name: str) -> bytes:
    """The text of a file of `lnsdeploy/kernels`."""
    return resources.files("lnsdeploy").joinpath("kernels", name).read_bytes()


# ---------------------------------------------------------------------------------------------------
# Compiling


@lru_cache(maxsize=1)
def _nvrtc() -> tuple[Any, str | None]:
    """The bindings of NVRTC, or None and what is missing."""
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        return None, f"the package cuda-bindings cannot be imported ({error}); {INSTALL}"
    try:
        status, *_ = nvrtc.nvrtcVersion()
    except RuntimeError as error:
        return None, f"the library NVRTC is missing ({str(error).splitlines()[0]}); {INSTALL}"
    if int(status):
        return None, f"NVRTC does not work (status {int(status)}); {INSTALL}"
    return nvrtc, None


def compiler_unavailable() -> str | None:
    """Why kernels cannot be compiled here, or None."""
    return _nvrtc()[1]


def compiler_version() -> str:
    """NVRTC's version.

    Raises:
        MissingDependencyError: there is none.
    """
    _, major, minor = _compiler().nvrtcVersion()
    return f"{major}.{minor}"


def _compiler() -> Any:
    found, why = _nvrtc()
    if found is None:
        raise MissingDependencyError(str(why))
    return found


def compile_program(program: Program, architecture: str) -> tuple[bytes, str]:
    """Compile, without looking into the cache.

    Args:
        architecture: for instance ``"sm_90"``.
    Returns: machine code (a cubin), and what the compiler said of registers and spills.

    Raises:
        MissingDependencyError: there is no NVRTC.
        LNSError: the text does not compile; the message has the compiler's.
    """
    nvrtc = _compiler()

    def call(name: str, *arguments: Any) -> Any:
        status, *rest = getattr(nvrtc, name)(*arguments)
        if int(status):
            raise LNSError(f"{name}: {nvrtc.nvrtcGetErrorString(status)[1].decode()}")
        return rest[0] if rest else None

    headers = [source(name) for name in HEADERS]
    handle = call(
        "nvrtcCreateProgram",
        source(program.file),
        program.file.encode(),
        len(headers),
        headers,
        [name.encode() for name in HEADERS],
    )
    try:
        # no product and sum is ever contracted into one rounding
        options = [
            f"--gpu-architecture={architecture}",
            "--std=c++17",
            "--fmad=false",
            "--ptxas-options=-v",
            *program.options(),
        ]
        encoded = [option.encode() for option in options]
        status = nvrtc.nvrtcCompileProgram(handle, len(encoded), encoded)[0]
        log = b" " * call("nvrtcGetProgramLogSize", handle)
        call("nvrtcGetProgramLog", handle, log)
        text = log.decode("utf-8", "replace").strip("\0 \n")
        if int(status):
            raise LNSError(f"{program.file} does not compile for {architecture} with {' '.join(options[4:])}: {text}")
        code = b" " * call("nvrtcGetCUBINSize", handle)
        call("nvrtcGetCUBIN", handle, code)
        return code, text
    finally:
        nvrtc.nvrtcDestroyProgram(handle)


def cache_folder() -> Path:
    """Where compiled kernels are kept."""
    named = os.environ.get(CACHE_VARIABLE)
    if named:
        return Path(named)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "lnsdeploy"


def cache_key(program: Program, architecture: str, version: str) -> str:
    """A name for everything that machine code depends on."""
    digest = hashlib.sha256()
    for part in (program.file, architecture, version, *program.options()):
        digest.update(part.encode() + b"\0")
    for name in (program.file, *HEADERS):
        digest.update(hashlib.sha256(source(name)).digest())
    return digest.hexdigest()[:32]


def compiled(program: Program, architecture: str) -> bytes:
    """Machine code of a program, from the cache if it is there and whole.

    Raises:
        MissingDependencyError, LNSError: as :func:`compile_program`.
    """
    try:
        path: Path | None = cache_folder() / f"{cache_key(program, architecture, compiler_version())}.cubin"
    except RuntimeError:
        path = None  # no home folder
    if path is not None and (found := _read(path)) is not None:
        return found
    code, _ = compile_program(program, architecture)
    if path is not None:
        _write(path, code)
    return code


def _read(path: Path) -> bytes | None:
    """What an entry holds, or None if it is missing or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    start = len(_MAGIC) + 32
    code = content[start:]
    if not code or content[:start] != _MAGIC + hashlib.sha256(code).digest():
        return None
    return code


def _write(path: Path, code: bytes) -> None:
    """Make an entry; other processes see all of it or nothing. Failing to is no error."""
    temporary = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.stem, suffix=".part", delete=False) as file:
            temporary = file.name
            file.write(_MAGIC + hashlib.sha256(code).digest() + code)
        Path(temporary).replace(path)
    except OSError:
        if temporary is not None:
            with suppress(OSError):
                Path(temporary).unlink()


# ---------------------------------------------------------------------------------------------------
# Launching


@lru_cache(maxsize=1)
def _driver() -> Any:
    from cuda.bindings import driver

    return driver


def _call(name: str, *arguments: Any) -> Any:
    driver = _driver()
    status, *rest = getattr(driver, name)(*arguments)
    if int(status):
        text = driver.cuGetErrorString(status)[1]
        kind = MemoryError if "OUT_OF_MEMORY" in status.name else LNSError
        raise kind(f"{name}: {text.decode() if isinstance(text, bytes) else status.name}")
    return rest[0] if len(rest) == 1 else rest


class CudaRuntime:
    """One NVIDIA GPU, in the context that torch made.

    Args:
        index: torch's number of the device.

    Raises:
        UnsupportedError: it is older than sm_70.
    """

    def __init__(self, index: int):
        import torch

        properties = torch.cuda.get_device_properties(index)
        self.index = index
        if properties.major < 7:
            raise UnsupportedError(
                f"{properties.name} has compute capability {properties.major}.{properties.minor}; the kernels need 7.0"
            )
        self.architecture = f"sm_{properties.major}{properties.minor}"
        self.multiprocessors = int(properties.multi_processor_count)
        with torch.cuda.device(index):
            torch.cuda.current_stream().synchronize()  # torch's context is made, and the thread's
            driver = _driver()
            device = _call("cuCtxGetDevice")
            attribute = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN
            self.shared_memory = int(_call("cuDeviceGetAttribute", attribute, device))
        self._lock = threading.Lock()
        self._functions: dict[tuple[Program, str], Any] = {}
        self._modules: dict[Program, Any] = {}

    def _function(self, program: Program, name: str) -> Any:
        with self._lock:
            found = self._functions.get((program, name))
            if found is None:
                module = self._modules.get(program)
                if module is None:
                    module = _call("cuModuleLoadData", compiled(program, self.architecture))
                    self._modules[program] = module
                found = _call("cuModuleGetFunction", module, name.encode())
                limit = _driver().CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
                _call("cuFuncSetAttribute", found, limit, self.shared_memory)
                self._functions[program, name] = found
            return found

    def launch(
        self,
        program: Program,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        parameters: ctypes.Structure,
    ) -> None:
        """See :class:`Runtime`; on torch's current stream."""
        import torch

        with torch.cuda.device(self.index):
            function = self._function(program, name)
            stream = torch.cuda.current_stream().cuda_stream
            # an array of pointers to arguments; there is one
            pointers = (ctypes.c_void_p * 1)(ctypes.addressof(parameters))
            _call("cuLaunchKernel", function, *grid, threads, 1, 1, shared, stream, ctypes.addressof(pointers), 0)


@lru_cache(maxsize=64)
def cuda_runtime(index: int) -> CudaRuntime:
    """The runtime of one of torch's CUDA devices."""
    return CudaRuntime(index)


def unavailable() -> str | None:
    """Why kernels cannot be run here and what to do about it, or None."""
    try:
        import torch
    except ImportError:
        return "torch is not installed; install lnsdeploy[cuda] and a build of torch for CUDA"
    if torch.version.cuda is None:
        return f"this build of torch ({torch.__version__}) has no CUDA; install one that has (https://pytorch.org)"
    if not torch.cuda.is_available():
        return "torch sees no CUDA device: there is no NVIDIA GPU, or no driver that fits"
    if why := compiler_unavailable():
        return why
    try:
        cuda_runtime(torch.cuda.current_device())
    except (LNSError, ImportError, RuntimeError) as error:
        return str(error).splitlines()[0]
    return None
