"""Where in a model an operation happens: the module that runs, the parameter that an operand is (docs/emulation.md)."""

from __future__ import annotations

import sys
import threading
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as hooks

from lnsdeploy.errors import UnsupportedError

# Layers, for what is first and last; and what has one weight whose name says nothing.
_CONVS = (nn.modules.conv._ConvNd,)
_LINEARS = (nn.Linear,)
# What Python frames of these are never where a user multiplied.
_OWN = ("torch", "lnsdeploy")


@dataclass(eq=False)
class Owner:
    """A parameter or buffer of a model.

    Args:
        tensor: weak, so that a storage that was freed and used again is noticed.
        name: as in ``named_parameters``.
        module: the class of the module that holds it.
    """

    tensor: weakref.ref[Tensor]
    name: str
    module: str


@dataclass(eq=False)
class Frame:
    """A module that is running.

    Args:
        module: itself.
        path: its name in the model.
        products: of each kind so far in this call.
    """

    module: nn.Module
    path: str
    products: dict[str, int]


class Names:
    """The names of the modules that run, and of their parameters.

    Hooks on every module keep a stack for each thread; the first module called while it is empty is a root, whose
    submodules are named from there. `model`, if given, is a root from the beginning.
    """

    def __init__(self, model: nn.Module | None = None):
        self._local = threading.local()
        self._handles: list[Any] = []
        self._paths: dict[int, tuple[weakref.ref[nn.Module], str]] = {}
        self._roots: list[weakref.ref[nn.Module]] = []
        self._owners: dict[int, Owner] = {}
        self.layers: list[str] = []
        self.modules: list[str] = []
        self.classes: dict[str, str] = {}
        self._model = model

    def start(self) -> None:
        """Hook every module that runs from now on."""
        if self._model is not None:
            self._adopt(self._model, "")
        self._handles = [
            hooks.register_module_forward_pre_hook(self._enter),
            hooks.register_module_forward_hook(self._leave, always_call=True),
        ]

    def stop(self) -> None:
        """Undo :meth:`start`."""
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._local = threading.local()

    @property
    def stack(self) -> list[Frame]:
        """The modules that are running in this thread, the innermost last."""
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        found: list[Frame] = self._local.stack
        return found

    def _enter(self, module: nn.Module, args: Any) -> None:
        if isinstance(module, nn.DataParallel) and len(module.device_ids) > 1:
            raise UnsupportedError(
                "nn.DataParallel runs its replicas in threads that no emulation sees: use a process for each device "
                "(torchrun), or the module inside it"
            )
        stack = self.stack
        known = self._paths.get(id(module))
        if known is None or known[0]() is not module:
            self._adopt(module, self._prefix(module) if not stack else f"{stack[-1].path}.{type(module).__name__}")
            known = self._paths[id(module)]
        elif not stack:
            root = next((r() for r in self._roots if r() is module), None)
            if root is not None or self._model is None:
                # parameters may have been replaced since
                self._own(module, known[1])
        stack.append(Frame(module, known[1], {}))

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        stack = self.stack
        while stack:
            if stack.pop().module is module:
                return

    def _prefix(self, module: nn.Module) -> str:
        """The path of a new root: nothing for the first, its class for others."""
        if not any(r() is not None and r() is not module for r in self._roots):
            return ""
        taken = {path for _, path in self._paths.values()}
        name, count = type(module).__name__, 1
        while name in taken:
            name, count = f"{type(module).__name__}_{count}", count + 1
        return name

    def _adopt(self, root: nn.Module, path: str) -> None:
        self._roots.append(weakref.ref(root))
        for name, module in root.named_modules():
            full = _joined(path, name)
            known = self._paths.get(id(module))
            if known is None or known[0]() is not module:
                self._paths[id(module)] = (weakref.ref(module), full)
            self.modules.append(full)
            self.classes.setdefault(full, type(module).__name__)
            if isinstance(module, _CONVS + _LINEARS):
                self.layers.append(full)
        self._own(root, path)

    def _own(self, root: nn.Module, path: str) -> None:
        for named in (root.named_parameters(), root.named_buffers()):
            for name, tensor in named:
                if type(tensor) not in (nn.Parameter, Tensor, nn.Buffer) or not tensor.numel():
                    continue
                if tensor.layout is not torch.strided or tensor.device.type == "meta":
                    continue
                key = tensor.untyped_storage().data_ptr()
                full = _joined(path, name)
                self._owners.setdefault(key, Owner(weakref.ref(tensor), full, ""))
                if self._owners[key].tensor() is not tensor and self._owners[key].tensor() is None:
                    self._owners[key] = Owner(weakref.ref(tensor), full, "")

    def owner(self, tensor: Tensor) -> Owner | None:
        """The parameter or buffer that a tensor is, or is a view of."""
        key = tensor.untyped_storage().data_ptr()
        found = self._owners.get(key)
        if found is None:
            return None
        held = found.tensor()
        if held is None or held.untyped_storage().data_ptr() != key:
            # freed, or moved elsewhere
            del self._owners[key]
            return None
        return found

    def owns(self, tensor: Tensor) -> bool:
        """Whether a write to a tensor may change a parameter."""
        return tensor.layout is torch.strided and tensor.untyped_storage().data_ptr() in self._owners

    def of_parameter(self, owner: Owner) -> tuple[str, str]:
        """The name of a product with a parameter, and the path of its module.

        It is the running module's own name for the parameter, where it has one (weights may be tied), else that of
        the model; ``.weight`` says nothing and is left out.
        """
        held, stack = owner.tensor(), self.stack
        if stack:
            frame = stack[-1]
            for name, tensor in frame.module._parameters.items():
                if tensor is held:
                    return self._short(_joined(frame.path, name), frame.path), frame.path
        path = owner.name.rpartition(".")[0]
        return self._short(owner.name, path), path

    def _short(self, name: str, path: str) -> str:
        # a model that is a layer has no name
        return self.classes.get("", name) if name == "weight" else name.removesuffix(".weight")

    def of_place(self, kind: str) -> tuple[str, str]:
        """The name of another product of a kind at this place, and the path of its module.

        In a module: its path and the kind, numbered within a call. Elsewhere: the line of the user's program.
        """
        stack = self.stack
        if stack:
            frame = stack[-1]
            count = frame.products.get(kind, 0)
            frame.products[kind] = count + 1
            return _joined(frame.path, kind if not count else f"{kind}_{count}"), frame.path
        frame_ = sys._getframe(1)
        while frame_.f_back is not None and frame_.f_globals.get("__name__", "").partition(".")[0] in _OWN:
            frame_ = frame_.f_back
        file = frame_.f_code.co_filename.replace("\\", "/").rpartition("/")[2]
        return f"{file}:{frame_.f_lineno}:{kind}", ""


def _joined(path: str, name: str) -> str:
    return f"{path}.{name}" if path and name else path or name
