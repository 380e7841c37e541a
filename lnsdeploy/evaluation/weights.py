"""Weights: of a file, without running it; of a download that ends in seconds; or random, and fit to measure with."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import sys
import threading
import urllib.request
import warnings
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from lnsdeploy.errors import BadFileError, BadValueError, UnsupportedError

# Seconds in which a host must answer before a download is tried.
PATIENCE = 4.0

HUB = "https://huggingface.co"
TORCH_HOST = "https://download.pytorch.org"

_PICKLES = (".pt", ".pth", ".bin", ".ckpt")
# What checkpoints wrap the parameters in.
_WRAPPERS = ("state_dict", "model", "model_state_dict", "state_dict_ema", "module")
_PREFIXES = ("module.", "_orig_mod.")


def unreachable(url: str) -> str | None:
    """Why the host of `url` does not answer, or None if it does.

    A download library tries for most of a minute before it gives up, a name server may take longer than any timeout:
    so this asks from a thread of its own, and waits no longer than a few seconds. Proxies of the environment are used.
    """
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    if proxy and not urllib.request.proxy_bypass(parts.hostname or ""):
        parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    host = parts.hostname or ""
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found: list[str | None] = []

    def ask() -> None:
        try:
            socket.create_connection((host, port), timeout=PATIENCE).close()
            found.append(None)
        except OSError as error:
            found.append(f"{host}: {error.strerror or error}")

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(PATIENCE)
    return found[0] if found else f"{host} does not answer"


def hub_endpoint() -> str:
    """Where Hugging Face's files come from."""
    return os.environ.get("HF_ENDPOINT") or HUB


@contextlib.contextmanager
def hub(*, online: bool) -> Iterator[None]:
    """Hugging Face's libraries use their cache only, or the network too; no pickle of theirs is run, and no bar drawn.

    Their users' own HF_HUB_OFFLINE stays in force.
    """
    names = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not online:
        names["HF_HUB_OFFLINE"] = "1"
    if not sys.stderr.isatty():
        names["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(names)
    # the variable is read once, at import
    constants = sys.modules.get("huggingface_hub.constants")
    offline = getattr(constants, "HF_HUB_OFFLINE", None)
    try:
        if constants is not None and offline is not None and not online:
            constants.HF_HUB_OFFLINE = True  # type: ignore[attr-defined]
        yield
    finally:
        # a module imported inside read the variable as it was there
        constants = sys.modules.get("huggingface_hub.constants")
        if constants is not None and not online:
            constants.HF_HUB_OFFLINE = bool(offline)  # type: ignore[attr-defined]
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# ---------------------------------------------------------------------------------------------------
# Files


def load_file(module: nn.Module, path: str | os.PathLike[str]) -> None:
    """Fill a module with the parameters and buffers of a file, all of them.

    Args:
        path: ``.safetensors``, or a checkpoint of torch, of which nothing but tensors is read (`weights_only`).

    Raises:
        BadFileError: it is missing, damaged, holds other things than tensors, or does not fit the module; the message
            names what is missing, left over, or of another shape.
    """
    file = Path(path)
    state = _read(file)
    for prefix in _PREFIXES:
        if state and all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    wanted = module.state_dict()
    # counters of batch norm, which old files lack and evaluation does not read
    missing = [n for n in wanted if n not in state and not n.endswith("num_batches_tracked")]
    # parameters that are one under two names are written once
    there = {t.data_ptr() for n, t in wanted.items() if n in state and t.numel()}
    missing = [n for n in missing if wanted[n].data_ptr() not in there]
    surplus = [n for n in state if n not in wanted]
    shapes = [
        f"{n} {tuple(state[n].shape)} for {tuple(wanted[n].shape)}"
        for n in wanted
        if n in state and state[n].shape != wanted[n].shape
    ]
    problems = [
        f"{what}: {', '.join(names[:4])}{f' and {len(names) - 4} more' if len(names) > 4 else ''}"
        for what, names in (("missing", missing), ("left over", surplus), ("of another shape", shapes))
        if names
    ]
    if problems:
        raise BadFileError(f"{file} does not fit the model; {'; '.join(problems)}")
    module.load_state_dict(state, strict=False)


def _read(file: Path) -> dict[str, Tensor]:
    if file.suffix == ".safetensors":
        return _read_safetensors(file)
    if file.suffix not in _PICKLES:
        raise BadFileError(f"{file}: weights are read from .safetensors, or from {', '.join(_PICKLES)} of torch")
    try:
        with warnings.catch_warnings():
            # of a pickle's protocol
            warnings.simplefilter("ignore")
            found = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError as error:
        raise BadFileError(f"cannot read {file}: {error.strerror}") from error
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, LookupError, ValueError, TypeError) as error:
        why = "holds more than tensors, or is damaged" if isinstance(error, pickle.UnpicklingError) else "is damaged"
        raise BadFileError(f"{file}: refused, since it {why}; convert it to .safetensors if you trust it") from error
    for wrapper in _WRAPPERS:
        if isinstance(found, Mapping) and isinstance(found.get(wrapper), Mapping):
            found = found[wrapper]
    if not isinstance(found, Mapping) or not all(isinstance(n, str) for n in found):
        raise BadFileError(f"{file}: holds no table of parameters")
    tensors = {name: value for name, value in found.items() if isinstance(value, Tensor)}
    if not tensors:
        raise BadFileError(f"{file}: holds no parameters")
    return tensors


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file as load

    from lnsdeploy.files import check_safetensors_header

    check_safetensors_header(file)
    try:
        found: dict[str, Tensor] = load(str(file), device="cpu")
        return found
    except (SafetensorError, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise BadFileError(f"{file}: not a readable safetensors file: {error}") from error


# ---------------------------------------------------------------------------------------------------
# Random


def settle_(module: nn.Module, sample: Any, seed: int) -> None:
    """Make freshly drawn weights fit to measure with, in place; a function of the module and of the seed alone.

    Libraries start some parameters at zero, to begin training gently: the scale of the last norm of a residual block,
    or a head. A net whose branches are multiplied by zero shows none of their error. Such matrices are drawn anew (He
    et al. 2015), such scales become one. Batch norms, which know nothing of any input yet, get the statistics of
    `sample`.

    Args:
        module: in evaluation mode, with `sample` as its only argument; or None, and norms stay as they are.
    """
    generator = torch.Generator().manual_seed(seed)
    norms = []
    for part in module.modules():
        own = dict(part.named_parameters(recurse=False))
        weight = own.get("weight")
        if isinstance(part, nn.modules.batchnorm._BatchNorm) and part.track_running_stats:
            norms.append(part)
        for name, parameter in own.items():
            if parameter.numel() == 0 or bool(parameter.detach().any()):
                continue
            if parameter.ndim >= 2:
                fan = parameter[0].numel()
                with torch.no_grad():
                    parameter.normal_(0, (2 / fan) ** 0.5, generator=generator)
            elif name == "weight" and parameter is weight:
                nn.init.ones_(parameter)
    if norms and sample is not None:
        _measure_norms(module, norms, sample)


def _measure_norms(module: nn.Module, norms: list[nn.modules.batchnorm._BatchNorm], sample: Any) -> None:
    before = [norm.momentum for norm in norms]
    try:
        for norm in norms:
            norm.momentum = 1.0
            norm.train()
        with torch.no_grad():
            module(sample)
    except (ValueError, RuntimeError) as error:
        raise UnsupportedError(
            f"batch norms could not be measured on inputs of shape {tuple(getattr(sample, 'shape', ()))}: {error}"
        ) from error
    finally:
        for norm, momentum in zip(norms, before, strict=True):
            norm.momentum = momentum
            norm.eval()
    for norm in norms:
        # a channel that was silent in the sample must not become a thousandfold amplifier of what it says later
        if norm.running_var is not None and norm.running_var.numel():
            norm.running_var.clamp_(min=float(norm.running_var.mean()) * 1e-2)


@contextlib.contextmanager
def seeded(seed: int) -> Iterator[None]:
    """torch draws from `seed` inside, and goes on as before afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def digest(module: nn.Module) -> str:
    """8 hexadecimal digits of all parameters and buffers: processes compare what they hold."""
    found = 0
    for name, value in sorted(module.state_dict().items()):
        found = zlib.crc32(name.encode(), found)
        if isinstance(value, Tensor) and value.numel():
            flat = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            found = zlib.crc32(flat.numpy(), found)  # type: ignore[arg-type]
    return f"{found:08x}"


def check_choice(weights: str | None) -> str | None:
    """The choice of weights: None for whatever there is, ``pretrained``, ``random``, or a file.

    Raises:
        BadValueError: it is none of them.
    """
    if weights is None or weights in ("pretrained", "random") or Path(weights).suffix in (".safetensors", *_PICKLES):
        return weights
    raise BadValueError(
        f"weights must be 'pretrained', 'random', or a file (.safetensors, {', '.join(_PICKLES)}), not {weights!r}"
    )
