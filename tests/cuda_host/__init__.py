"""The GPU kernels' text built for the host, so that tests launch it as :mod:`lnsdeploy.emulator.cuda` would on a GPU.

A program is compiled by the C++ compiler for each choice of macros, into `build/cuda-host` beside the sources, and kept
there by its text. ``LNSDEPLOY_CUDA_HOST_SANITIZE`` names sanitizers to build with, for instance ``address,undefined``.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

from lnsdeploy.emulator import nvrtc
from lnsdeploy.emulator.nvrtc import Program

HERE = Path(__file__).parent
SANITIZE_VARIABLE = "LNSDEPLOY_CUDA_HOST_SANITIZE"

_LAUNCHERS = {
    "products.cu": """
static void product(const void* p) { lns::lns_product(*static_cast<const lns::Product*>(p)); }
extern "C" void lns_host_launch(const char*, const unsigned* grid, unsigned threads, size_t shared, const void* p) {
  lns_host::run(product, grid, threads, shared, p);
}
""",
    "general.cu": """
template <class Parameters, void (*kernel)(Parameters)>
static void apart(const void* p) { kernel(*static_cast<const Parameters*>(p)); }
extern "C" void lns_host_launch(const char* name, const unsigned* grid, unsigned threads, size_t, const void* p) {
  static const struct { const char* name; void (*run)(const void*); } kernels[] = {
      {"lns_general_linear", apart<lns::Product, lns::lns_general_linear>},
      {"lns_general_log", apart<lns::Product, lns::lns_general_log>},
      {"lns_map", apart<lns::Map, lns::lns_map>},
      {"lns_encode", apart<lns::Map, lns::lns_encode>},
      {"lns_decode", apart<lns::Map, lns::lns_decode>},
      {"lns_add", apart<lns::Sum, lns::lns_add>},
      {"lns_max_pool", apart<lns::Pool, lns::lns_max_pool>},
      {"lns_average_pool", apart<lns::Pool, lns::lns_average_pool>},
      {"lns_pad", apart<lns::Pad, lns::lns_pad>},
  };
  for (const auto& known : kernels) {
    if (strcmp(name, known.name) == 0) return lns_host::run_apart(known.run, grid, threads, p);
  }
  abort();
}
""",
}


def compiler() -> str | None:
    """A C++17 compiler, or None."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def unavailable() -> str | None:
    """Why the kernels cannot be built for the host, or None."""
    return None if compiler() else "no C++ compiler builds the GPU kernels for the host"


def _folder() -> Path:
    folder = HERE.parent.parent / "build" / "cuda-host"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        folder = Path(tempfile.gettempdir()) / "lnsdeploy-cuda-host"
        folder.mkdir(exist_ok=True)
    return folder


def build(program: Program, text: bytes | None = None) -> Path:
    """The shared library of a program; `text` takes the place of its file's."""
    text = nvrtc.source(program.file) if text is None else text
    sanitize = os.environ.get(SANITIZE_VARIABLE, "")
    headers = [nvrtc.source(name) for name in nvrtc.HEADERS]
    shim, launcher = (HERE / "shim.h").read_bytes(), _LAUNCHERS[program.file].encode()
    options = program.options()
    parts = [text, *headers, shim, launcher, " ".join(options).encode(), sanitize.encode(), str(compiler()).encode()]
    key = hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:24]
    target = _folder() / f"{key}.so"
    if target.exists():
        return target
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        for name, content in zip(nvrtc.HEADERS, headers, strict=True):
            (Path(folder) / name).write_bytes(content)
        unit = Path(folder) / "unit.cpp"
        unit.write_bytes(b'#include "shim.h"\n' + text + launcher)
        made = Path(folder) / "made.so"
        flags = ["-g1", f"-fsanitize={sanitize}", "-fno-sanitize-recover=all"] if sanitize else []
        command = [
            str(compiler()),
            "-std=c++17",
            "-O1",
            "-ffp-contract=off",
            "-Wall",
            "-Wno-unknown-pragmas",
            "-shared",
            "-fPIC",
            "-pthread",
            *flags,
            *options,
            f"-I{HERE}",
            f"-I{folder}",
            str(unit),
            "-o",
            str(made),
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{program} does not compile for the host:\n{done.stderr}")
        made.replace(target)
    return target


@cache
def _library(path: Path) -> Any:
    library = ctypes.CDLL(str(path))
    library.lns_host_launch.restype = None
    return library


class HostRuntime:
    """Launches the host build; the numbers are those of an H100.

    Args:
        shared_memory: bytes that a block may have.
        texts: other texts of programs' files.
    """

    multiprocessors = 132

    def __init__(self, shared_memory: int = 227 << 10, texts: dict[str, bytes] | None = None):
        self.shared_memory = shared_memory
        self.texts = texts or {}
        self.launches: list[tuple[Program, str, tuple[int, int, int], int, int]] = []

    def launch(
        self,
        program: Program,
        name: str,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        parameters: ctypes.Structure,
    ) -> None:
        """See :class:`lnsdeploy.emulator.nvrtc.Runtime`; done when it returns."""
        # what CUDA refuses
        assert min(grid) >= 1
        assert max(grid[0] >> 15, *grid[1:]) <= 65535
        assert threads in range(32, 1025, 32)
        assert 0 <= shared <= self.shared_memory
        self.launches = [*self.launches[-63:], (program, name, grid, threads, shared)]
        library = _library(build(program, self.texts.get(program.file)))
        library.lns_host_launch(
            name.encode(),
            (ctypes.c_uint * 3)(*grid),
            ctypes.c_uint(threads),
            ctypes.c_size_t(shared),
            ctypes.byref(parameters),
        )
