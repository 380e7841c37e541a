"""Any torch model through the emulator: :func:`emulate` (docs/emulation.md).

A `TorchDispatchMode` sees every operation that reaches the dispatcher, forward and backward, whatever library wrote
the model. Products and convolutions are computed on words instead; everything else runs as it is. What torch would
compute in one piece, attention or a recurrent layer, is unfused while the context is open.
"""

from __future__ import annotations

import contextlib
import functools
import math
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from lnsdeploy.datapath import Datapath, common_gamma, for_format, load_datapath, named_datapaths, widened
from lnsdeploy.emulator import geometry
from lnsdeploy.emulator.backends import EXECUTORS, Backend, backend_for
from lnsdeploy.emulator.names import Names, Owner
from lnsdeploy.emulator.plan import Window
from lnsdeploy.emulator.products import (
    Batched,
    Convolution,
    Dot,
    Geometry,
    Placed,
    Product,
    Setting,
    Traced,
    Weights,
    encode_weights,
)
from lnsdeploy.emulator.records import ProductRecord, Seen
from lnsdeploy.errors import BadTypeError, BadValueError, UnknownNameError, UnsupportedError
from lnsdeploy.fields import check_choice
from lnsdeploy.files import read_toml
from lnsdeploy.formats import LNSFormat
from lnsdeploy.recipe import FLOAT, LayerRecipe, Recipe

_F = TypeVar("_F", bound=Callable[..., Any])

aten = torch.ops.aten

HEADROOM = 1.0
_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# Forward products that a backward pass may still come back to.
_REMEMBERED = 1 << 16

# Operations that multiply and accumulate out of sight, by their name in torch.ops.aten. They reach the context only
# when called by name, or where a device has no other way; then they run in float (or on integers), and are listed.
_MISSED = re.compile(
    r"""_scaled_dot_product_.* | _flash_attention.* | _efficient_attention.* | .*multi_head_attention.* | _triton_.*
    | _transformer_encoder_layer_fwd | .*_rnn(_.*)? | mkldnn_.* | miopen_.* | cudnn_convolution.* | _thnn_.*conv.*
    | quantized_.* | _int_mm | _scaled_mm.* | _weight_int.* | _dyn_quant_.* | _mixed_dtypes_linear | fbgemm_.*
    | _wrapped_.*linear.* | _sparse_.*mm.* | _sparse_.*linear | sparse_sampled_addmm | sspaddmm | hspmm | smm | _cslt_.*
    | _grouped_mm | _scaled_grouped_mm.* | conv_tbc.* | .*conv_depthwise.* | slow_conv.* | thnn_conv.* | _slow_conv.*
    | convolution_overrideable | convolution_backward_overrideable | linear_backward | _trilinear | _fft_.*
    | linalg_.* | _linalg_.* | cholesky.* | lu_solve | triangular_solve | ormqr | geqrf | _euclidean_dist | _cdist_.*
    | matrix_exp | .*attention_(forward|backward) | _foreach_mm | .*_matmul | matmul_backward | _spsolve
    | _compute_linear_combination | _cholesky_.* | _?lstm_mps.* | _?mps_convolution.* | _nnpack_.*convolution""",
    re.VERBOSE,
)
# Namespaces of torch that hold no products of their own.
_PLAIN_SPACES = ("aten", "prim", "prims", "profiler", "c10d", "_c10d_functional", "inductor", "debugprims", "rngprims")
# Custom operators of others that are known to hold none.
_PLAIN_CUSTOM = ("torchvision.nms",)


class _Leave(Exception):
    """The operation runs in float after all."""


@dataclass(eq=False)
class _Forward:
    """A forward product that backward products will belong to.

    Args:
        name, path, module: of its record.
        kind: ``"conv"``, ``"linear"`` or ``"matmul"``.
        op: as in its record.
        recipe: of the layer.
        first, second: where its operands lie.
        owner: the parameter that the second is.
    """

    name: str
    path: str
    kind: str
    op: str
    recipe: LayerRecipe
    first: int
    second: int
    owned: bool


@dataclass(eq=False)
class _Site:
    """A product's place: what runs there, or None where the recipe leaves it in float."""

    product: Product | None
    name: str
    recipe: LayerRecipe


class _Contiguous(TorchFunctionMode):
    """Makes the inputs of linear layers contiguous, because torch would otherwise add the bias behind the product, in
    float, instead of into the accumulator."""

    _RECURRENT = ("lstm", "gru", "rnn_tanh", "rnn_relu")

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "linear" and args and isinstance(args[0], Tensor) and args[0].ndim > 2:
            args = (_contiguous(args[0]), *args[1:])
        elif name == "multi_head_attention_forward":
            # one tensor given three times is how self-attention is told
            made: dict[int, Any] = {}
            given = [made.setdefault(id(v), _contiguous(v)) for v in args[:3]]
            args = (*given, *args[3:])
            kwargs = {
                k: made.setdefault(id(v), _contiguous(v)) if k in ("query", "key", "value") else v
                for k, v in kwargs.items()
            }
        elif name in self._RECURRENT and len(args) == 9 and args[8] is True and isinstance(args[0], Tensor):
            # (input, hx, params, has_biases, num_layers, dropout, train, bidirectional, batch_first)
            result = func(args[0].transpose(0, 1).contiguous(), *args[1:8], False, **kwargs)
            return (result[0].transpose(0, 1), *result[1:])
        return func(*args, **kwargs)


def _contiguous(x: Any) -> Any:
    return x.contiguous() if isinstance(x, Tensor) and x.layout is torch.strided and not x.is_nested else x


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Hands every operation to an emulation."""

    supports_higher_order_operators = True

    def __init__(self, emulation: Emulation):
        super().__init__()  # type: ignore[no-untyped-call]
        self.emulation = emulation

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self.emulation._dispatch(self, func, types, args, kwargs or {})


_ACTIVE = threading.local()


class Emulation(Seen):
    """A context under which products run on LNS words; also a decorator. See :func:`emulate`.

    Its counters go on over several entries; the first entry and later ones are one emulation.
    """

    def __init__(
        self,
        recipe: Recipe,
        base: Datapath | None,
        *,
        backward: bool = False,
        executor: str | None = None,
        model: nn.Module | None = None,
        headroom: float = HEADROOM,
        sqnr: str = "sampled",
        trace: Callable[[Traced], None] | None = None,
    ):
        super().__init__()
        if executor is not None and executor not in EXECUTORS:
            raise UnknownNameError("executor", executor, EXECUTORS)
        if model is not None and not isinstance(model, nn.Module):
            raise BadTypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
        if isinstance(headroom, bool) or not isinstance(headroom, (int, float)) or not 0 <= headroom <= 16:
            raise BadValueError(f"headroom must be from 0 to 16 octaves, not {headroom!r}")
        check_choice("sqnr", sqnr, ("sampled", "full"))
        self.recipe, self.base = recipe, base
        self.backward, self.executor = bool(backward), executor
        self._headroom, self._sqnr, self._trace = float(headroom), sqnr, trace
        self._names = Names(model)
        self._sites: dict[Any, _Site] = {}
        self._taken: set[str] = set()
        self._weights: dict[Any, tuple[Any, Weights]] = {}
        self._writes: dict[int, int] = {}
        self._forward: OrderedDict[int, _Forward] = OrderedDict()
        self._last_backward: tuple[int, list[str]] = (-1, [])
        self._known: dict[str, Placed] = {}
        # set by whoever enters many times and changes no parameter between: packed weights are kept then
        self.frozen = False
        self._exit: contextlib.ExitStack | None = None
        self._checked = False

    # entering and leaving

    def __enter__(self) -> Emulation:
        if self._exit is not None or getattr(_ACTIVE, "emulation", None) is not None:
            raise BadValueError("an emulation is already active here; emulations do not nest")
        # data that the parameters held may have been changed where no counter saw it
        if not self.frozen:
            self._weights.clear()
        with contextlib.ExitStack() as stack:
            for unfused in _unfused():
                stack.enter_context(unfused)
            self._names.start()
            stack.callback(self._names.stop)
            stack.enter_context(_Contiguous())
            stack.enter_context(_Mode(self))
            _ACTIVE.emulation = self
            stack.callback(setattr, _ACTIVE, "emulation", None)
            self._exit = stack.pop_all()
        return self

    def __exit__(self, *error: Any) -> None:
        stack, self._exit = self._exit, None
        self._forward.clear()
        if stack is not None:
            stack.__exit__(*error)

    def __call__(self, function: _F) -> _F:
        """Decorate a function: it runs inside the context, and is otherwise the same."""

        @functools.wraps(function)
        def inside(*args: Any, **kwargs: Any) -> Any:
            with self:
                return function(*args, **kwargs)

        inside.emulation = self  # type: ignore[attr-defined]
        return inside  # type: ignore[return-value]

    # what it saw

    def report(self) -> list[ProductRecord]:
        """One record for each product of the model, in order of first appearance."""
        return list(self.records.values())

    def to_dict(self) -> dict[str, Any]:
        """Plain data that JSON carries."""
        return {
            "datapath": self.base.name if self.base is not None else "",
            "recipe": self.recipe.to_dict(),
            "backward": self.backward,
            "executor": self.executor or "",
            **super().to_dict(),
        }

    def calibration(self) -> dict[str, Any]:
        """What was recorded where the recipe says ``offsets = "recorded"``: plain data for :meth:`load_calibration`."""
        found = {
            site.name: site.product.recorded.to_dict()
            for site in self._sites.values()
            if site.product is not None and site.product.recorded is not None
        }
        return {name: placed.to_dict() for name, placed in self._known.items()} | found

    def load_calibration(self, data: Mapping[str, Any]) -> None:
        """Use what another emulation of the same model recorded, instead of recording.

        Raises:
            BadValueError: not what :meth:`calibration` gives.
        """
        try:
            self._known = {str(name): Placed.from_dict(dict(entry)) for name, entry in data.items()}
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise BadValueError(f"not a calibration of an emulation: {error!r}") from error
        for site in self._sites.values():
            if site.product is not None and site.name in self._known:
                site.product.recorded = self._known[site.name]

    # dispatch

    def _dispatch(self, mode: _Mode, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        handler = _HANDLERS.get(func)
        if handler is None:
            return self._other(mode, func, types, args, kwargs)
        if types:
            # a tensor subclass comes apart into plain tensors, whose operations come here; a fake one has no numbers
            return func(*args, **kwargs) if _are_fake(types) else NotImplemented
        why = _strange(args, kwargs)
        if why is None:
            if self._is_float_backward():
                return func(*args, **kwargs)
            try:
                if torch._C._len_torch_dispatch_stack():
                    # outer modes see the operation, and nothing of what it is replaced by
                    func(*args, **kwargs)
                    with _disable_current_modes(), torch._C.DisableTorchFunction():
                        return handler(self, *args, **kwargs)
                with torch._C.DisableTorchFunction():
                    return handler(self, *args, **kwargs)
            except _Leave:
                return func(*args, **kwargs)
        if why == "meta":
            return func(*args, **kwargs)
        self.miss(f"{_name(func)} ({why})")
        return func(*args, **kwargs)

    def _other(self, mode: _Mode, func: Any, types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        way = _way(func)
        if way == "plain":
            return func(*args, **kwargs)
        if way == "higher":
            return _higher(mode, func, args, kwargs)
        if way == "writes":
            for value in torch.utils._pytree.tree_iter((args, kwargs)):
                if type(value) in (Tensor, nn.Parameter) and self._names.owns(value):
                    key = value.untyped_storage().data_ptr()
                    self._writes[key] = self._writes.get(key, 0) + 1
            return func(*args, **kwargs)
        if types:
            return func(*args, **kwargs) if _are_fake(types) else NotImplemented
        if way == "decompose":
            with mode:
                result = func.decompose(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if way == "missed" or not _is_plain_space(func):
            self.miss(_name(func))
        return func(*args, **kwargs)

    # where it happens

    def _is_backward(self) -> bool:
        node: Any = torch._C._current_autograd_node()
        if node is None:
            return False
        if not torch.is_grad_enabled():
            return True
        # a forward pass once more, inside of the backward pass (checkpointing), or a backward pass of higher order
        return not self._names.stack and _PRODUCT_NODES.match(node.name()) is not None

    def _is_float_backward(self) -> bool:
        return not self.backward and self._is_backward()

    def _site(
        self, op: str, kind: str, first: Tensor, second: Tensor, owner: Owner | None, *, own_offsets: bool = True
    ) -> tuple[Product, bool]:
        """The product of this place, and whether its first operand is the one that holds errors.

        Raises:
            _Leave: the recipe leaves it in float.
        """
        if self._is_backward():
            return self._backward_site(op, first, second)
        if owner is not None:
            name, path = self._names.of_parameter(owner)
        else:
            stack = self._names.stack
            if kind == "linear" and not (stack and any(p is not None for p in stack[-1].module._parameters.values())):
                kind = "matmul"
            name, path = self._names.of_place(kind)
        key = (name, op, kind, own_offsets)
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = self._new_site(key, name, path, op, kind)
        if self.backward and torch.is_grad_enabled() and (first.requires_grad or second.requires_grad):
            seq = torch._C._autograd._get_sequence_nr() - 1
            self._forward[seq] = _Forward(
                site.name, path, kind, op, site.recipe, first.data_ptr(), second.data_ptr(), owner is not None
            )
            if len(self._forward) > _REMEMBERED:
                self._forward.popitem(last=False)
        return self._use(site, op)

    def _use(self, site: _Site, op: str) -> tuple[Product, bool]:
        if site.product is None:
            self._left = site.name
            raise _Leave
        return site.product, False

    def _backward_site(self, op: str, first: Tensor, second: Tensor) -> tuple[Product, bool]:
        node = torch._C._current_autograd_node()
        seq = node._sequence_nr()
        info = self._forward.get(seq)
        if seq != self._last_backward[0]:
            self._last_backward = (seq, [])
        done = self._last_backward[1]
        if info is None:
            name, path = self._names.of_place("matmul")
            info = _Forward(name, path, "matmul", op, self._layer_recipe(name, path, "matmul"), 0, 0, False)
        # the operand that is not the error says whose gradient this is
        which, error_first = "", True
        for saved, error in ((second, True), (first, False)):
            place = saved.data_ptr()
            if place == info.second and "input" not in done:
                which, error_first = "input", error
                break
            if place == info.first and "weight" not in done:
                which, error_first = "weight", error
                break
        if not which:
            # saved elsewhere meanwhile (checkpointing, offloading): a parameter tells, else torch's order of gradients
            by_first = self._names.owner(first) is not None
            by_second = self._names.owner(second) is not None
            which = "input" if by_first or by_second or not (done or info.owned) else "weight"
            error_first = not by_first
        done.append(which)
        return self._gradient_site(info, which, error_first)

    def _gradient_site(self, info: _Forward, which: str, error_first: bool) -> tuple[Product, bool]:
        name = f"{info.name}:{which}"
        key = (name, info.op, which, error_first)
        site = self._sites.get(key)
        if site is None:
            site = self._sites[key] = self._new_gradient_site(key, name, info, which, error_first)
        if site.product is None:
            self._left = site.name
            raise _Leave
        return site.product, error_first

    def _unique(self, name: str, key: Any) -> str:
        made, count = name, 1
        while made in self._taken:
            made, count = f"{name}_{count}", count + 1
        self._taken.add(made)
        return made

    def _layer_recipe(self, name: str, path: str, kind: str) -> LayerRecipe:
        module = self._names.classes.get(path, "")
        layers = self._names.layers
        if not self._checked and self._names.modules:
            self._checked = True
            self.recipe.check_patterns([*self._names.modules, name])
        return self.recipe.for_layer((name, path), (kind, module), self.recipe.positions(path, layers))

    def _new_site(self, key: Any, name: str, path: str, op: str, kind: str) -> _Site:
        layer = self._layer_recipe(name, path, kind)
        name = self._unique(name, key)
        if layer.is_float and layer.datapath is None:
            return _Site(None, name, layer)
        per_channel = layer.granularity == "channel" and kind != "matmul" and key[3]
        setting = self._setting(name, layer, layer.activation, layer.weight, layer.output, per_channel)
        return _Site(self._new_product(name, path, op, setting), name, layer)

    def _new_gradient_site(self, key: Any, name: str, info: _Forward, which: str, error_first: bool) -> _Site:
        layer = info.recipe
        name = self._unique(name, key)
        left = layer.is_float and layer.datapath is None
        if left or layer.error == FLOAT or (which == "weight" and layer.gradient == FLOAT):
            return _Site(None, name, layer)
        base = self._base(layer)
        activation = layer.activation or base.activation
        weight = layer.weight or base.weight
        error = layer.error if isinstance(layer.error, LNSFormat) else LNSFormat(activation.bits, activation.gamma)
        gradient = layer.gradient if isinstance(layer.gradient, LNSFormat) else None
        other = activation if which == "weight" else weight if info.owned else activation
        first, second = (error, other) if error_first else (other, error)
        output = gradient if which == "weight" else error
        per_channel = (
            layer.granularity == "channel" and which == "input" and info.owned and error_first and info.kind == "linear"
        ) or (layer.granularity == "channel" and which == "input" and info.kind == "conv")
        setting = self._setting(name, layer, first, second, output, per_channel)
        return _Site(self._new_product(name, info.path, f"{info.op} grad", setting), name, layer)

    def _base(self, layer: LayerRecipe) -> Datapath:
        if layer.datapath is not None:
            return load_datapath(layer.datapath)
        if self.base is not None:
            return self.base
        activation = layer.activation or layer.weight
        assert activation is not None
        return for_format(activation, weight=layer.weight or activation)

    def _setting(
        self,
        name: str,
        layer: LayerRecipe,
        activation: LNSFormat | None,
        weight: LNSFormat | None,
        output: LNSFormat | None,
        per_channel: bool,
    ) -> Setting:
        base = self._base(layer)
        activation, weight = activation or base.activation, weight or base.weight
        datapath = base.with_formats(weight, activation)
        gamma = common_gamma(activation, weight)
        made = output or datapath.output
        if made.gamma != gamma:
            if gamma % made.gamma:
                raise BadValueError(
                    f"{name}: results of {activation} by {weight} have {gamma} codes per octave, which {made} does not "
                    "divide; choose another format for them"
                )
            made = widened(made, gamma)
        for fmt, what in ((activation, "activations"), (weight, "weights"), (made, "results")):
            if fmt.bits > 16:
                raise UnsupportedError(f"{name}: {what} of {fmt}: emulation on the fly has words of at most 16 bits")
        return Setting(
            datapath,
            activation,
            weight,
            made,
            per_channel,
            layer.calibration,
            layer.offsets == "recorded",
            self._headroom,
        )

    def _new_product(self, name: str, path: str, op: str, setting: Setting) -> Product:
        record = self.records[name] = ProductRecord(name, op, self._names.classes.get(path, ""))
        product = Product(record, setting, self._sqnr)
        product.recorded = self._known.get(name)
        return product

    # operands

    def _packed(
        self,
        backend: Backend,
        product: Product,
        tensor: Tensor,
        owner: Owner | None,
        layout: str,
        lay: Callable[[Tensor], Tensor],
        *,
        fmt: LNSFormat | None = None,
        repeat: int = 1,
    ) -> Weights:
        """A second operand in words; those of parameters are kept while the parameter is unchanged.

        Args:
            tensor: as the operation has it.
            lay: makes it [N, …] as the product needs it; `layout` names that.
        """
        key: Any = None
        if owner is not None and not tensor.is_inference():
            storage = tensor.untyped_storage().data_ptr()
            key = (
                storage,
                tensor.storage_offset(),
                tensor.shape,
                tensor.stride(),
                tensor.dtype,
                layout,
                backend.name,
                product.setting,
            )
            state = (owner.tensor, tensor._version, self._writes.get(storage, 0))
            kept = self._weights.get(key)
            if kept is not None and kept[0] == state:
                return kept[1]
        values = lay(_number(tensor))
        what = f"the second operand of {product.record.name}"
        made = encode_weights(backend, values, what, product.setting, fmt, repeat)
        # `fmt` is given where the first operand is what is packed
        product.saw_packed(made.counts, first=fmt is not None, constant=key is not None)
        if key is not None:
            self._weights[key] = (state, made)
        return made

    def _run(
        self,
        backend: Backend,
        product: Product,
        shape: Geometry,
        a: Tensor,
        weights: Weights,
        bias: Tensor | None = None,
        *,
        swapped: bool = False,
    ) -> Tensor:
        return product.run(backend, shape, a, weights, bias, swapped=swapped, trace=self._trace)

    def _backend(self, tensor: Tensor) -> Backend:
        return backend_for(self.executor, tensor.device)

    def _leave_float(self, macs: int) -> None:
        self.leave(self._left, macs)

    # matrix products

    def _product(
        self, op: str, kind: str, a: Tensor, b: Tensor, bias: Callable[[bool], Tensor | None] | None = None
    ) -> tuple[Tensor, bool]:
        """a [M, K] times b [K, N], with a bias of each channel if there is one.

        Args:
            bias: called with whether the operands changed places; gives the bias [N] (or [M]) if it has that form.
        Returns: float32 or float64 [M, N], and whether a bias is in it.
        """
        m, k = a.shape
        n = b.shape[1]
        if not m * n:
            # nothing to compute
            raise _Leave
        left, right = self._names.owner(a), self._names.owner(b)
        swap = left is not None and right is None and not self._is_backward()
        # a parameter is what is packed: (b'a')' where it comes first
        first, second, owner = (b.T, a.T, left) if swap else (a, b, right)
        try:
            product, _ = self._site(op, kind, first, second, owner)
        except _Leave:
            self._leave_float(m * n * k)
            raise
        backend = self._backend(a)
        weights = self._packed(backend, product, second, owner, "columns", lambda v: v.T.contiguous())
        start = bias(swap) if bias is not None else None
        shape = Dot(n if swap else m, m if swap else n, k)
        result = self._run(backend, product, shape, _number(first).contiguous(), weights, start)
        return result.T if swap else result, start is not None

    def _mm(self, a: Tensor, b: Tensor, *, op: str = "mm", kind: str = "linear") -> Tensor:
        return self._product(op, kind, a, b)[0].to(a.dtype)

    def _addmm(
        self, start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, op: str = "linear"
    ) -> Tensor:
        shape = (a.shape[0], b.shape[1])

        def bias(swap: bool) -> Tensor | None:
            if alpha != 1 or beta == 0:
                return None
            return _channel_bias(start, shape, swap, beta)

        result, added = self._product(op, "linear", a, b, bias)
        if not added:
            result = _scaled_sum(result, start, beta, alpha)
        return result.to(a.dtype)

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        if weight.ndim == 1:
            return self._mv(rows, weight).reshape(x.shape[:-1])
        made = self._mm(rows, weight.T, op="linear") if bias is None else self._addmm(bias, rows, weight.T)
        return made.reshape(*x.shape[:-1], weight.shape[0])

    def _mv(self, a: Tensor, v: Tensor) -> Tensor:
        return self._product("mv", "linear", v[None], a.T)[0][0].to(a.dtype)

    def _addmv(self, start: Tensor, a: Tensor, v: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        def bias(swap: bool) -> Tensor | None:
            if alpha != 1 or beta == 0 or swap:
                return None
            return (beta * start).expand(a.shape[0])

        result, added = self._product("addmv", "linear", v[None], a.T, bias)
        made = result[0] if added else _scaled_sum(result[0], start, beta, alpha)
        return made.to(a.dtype)

    def _dot(self, a: Tensor, b: Tensor) -> Tensor:
        return self._product("dot", "matmul", a[None], b[:, None])[0].reshape(()).to(a.dtype)

    def _bmm(self, a: Tensor, b: Tensor, *, op: str = "matmul") -> Tensor:
        """[B, M, K] times [B, K, N], float32 or float64."""
        batch, m, k = a.shape
        n = b.shape[2]
        if not batch * m * n:
            raise _Leave
        if batch > 1 and b.stride(0) == 0 and a.numel() and b.numel() and not self._is_backward():
            return self._product("linear", "linear", a.reshape(batch * m, k), b[0])[0].reshape(batch, m, n)
        owner = self._names.owner(b)
        try:
            product, _ = self._site(op, "linear" if owner else "matmul", a, b, owner, own_offsets=False)
        except _Leave:
            self._leave_float(batch * m * n * k)
            raise
        backend = self._backend(a)
        shape = Batched(batch, m, n, k)
        weights = self._packed(
            backend, product, a, None, "rows", lambda v: v.reshape(batch * m, k, 1), fmt=product.setting.activation
        )
        weights.values = weights.values.reshape(batch, m, k)
        return self._run(backend, product, shape, _number(b).contiguous(), weights, swapped=True)

    def _bmm_op(self, a: Tensor, b: Tensor) -> Tensor:
        return self._bmm(a, b).to(a.dtype)

    def _baddbmm(self, start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return _scaled_sum(self._bmm(a, b), start, beta, alpha).to(a.dtype)

    def _addbmm(self, start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        # Σ over the batch of products is one product over (batch, k)
        batch, m, k = a.shape
        flat = a.permute(1, 0, 2).reshape(m, batch * k), b.reshape(batch * k, b.shape[2])
        result = self._product("addbmm", "matmul", *flat)[0]
        return _scaled_sum(result, start, beta, alpha).to(a.dtype)

    def _addmm_activation(
        self, start: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1, use_gelu: bool = False
    ) -> Tensor:
        made = self._addmm(start, a, b, beta=beta, alpha=alpha)
        return torch.nn.functional.gelu(made, approximate="tanh") if use_gelu else made.relu()

    # convolutions

    def _convolution(
        self,
        x: Tensor,
        w: Tensor,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
    ) -> Tensor:
        axes = w.ndim - 2
        stride, padding, dilation, output_padding = (
            _axes(v, axes) for v in (stride, padding, dilation, output_padding)
        )
        if not 1 <= axes <= 3:
            raise UnsupportedError(f"a convolution over {axes} axes")
        owner = self._names.owner(w)
        op = f"conv_transpose{axes}d" if transposed else f"conv{axes}d"
        macs = _conv_macs(x, w, stride, padding, dilation, transposed)
        if not x.numel() or not w.numel():
            raise _Leave
        try:
            product, _ = self._site(op, "conv", x, w, owner)
        except _Leave:
            self._leave_float(macs)
            raise
        if transposed:
            sizes = [
                (n - 1) * s - 2 * p + d * (k - 1) + o + 1
                for n, k, s, p, d, o in zip(
                    x.shape[2:], w.shape[2:], stride, padding, dilation, output_padding, strict=True
                )
            ]
            made = self._transposed(product, x, w, owner, bias, stride, padding, dilation, sizes, groups, macs)
        else:
            made = self._plain_conv(product, x, w, owner, bias, stride, padding, dilation, groups)
        return made.to(x.dtype)

    def _plain_conv(
        self,
        product: Product,
        x: Tensor,
        w: Tensor,
        owner: Owner | None,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        groups: int,
    ) -> Tensor:
        backend = self._backend(x)
        weights = self._packed(backend, product, w, owner, "conv", Tensor.contiguous)
        made, pads = geometry.padded(_number(x), (*padding, *padding))
        window = Window(tuple(w.shape[2:]), tuple(stride), pads, tuple(dilation))
        shape = Convolution(tuple(made.shape), tuple(w.shape), window, groups)
        return self._run(backend, product, shape, made, weights, bias)

    def _transposed(
        self,
        product: Product,
        x: Tensor,
        w: Tensor,
        owner: Owner | None,
        bias: Tensor | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        sizes: Sequence[int],
        groups: int,
        macs: int,
    ) -> Tensor:
        """w: [C_in, C_out/groups, *kernel]; sizes: of the result."""
        backend = self._backend(x)
        phases = math.prod(stride)
        weights = self._packed(
            backend,
            product,
            w,
            owner,
            f"transposed {tuple(stride)} {tuple(dilation)} {groups}",
            lambda v: geometry.transposed_weights(v, groups, stride, dilation),
            repeat=phases,
        )
        made, window, first = geometry.transposed_input(_number(x), w.shape[2:], stride, padding, dilation, sizes)
        shape = Convolution(tuple(made.shape), tuple(weights.values.shape), window, groups)
        shape.macs = macs
        start = None if bias is None else bias.repeat_interleave(phases)
        result = self._run(backend, product, shape, made, weights, start)
        return geometry.transposed_result(result, stride, first, sizes)

    def _convolution_backward(
        self,
        grad: Tensor,
        x: Tensor,
        w: Tensor,
        bias_sizes: Sequence[int] | None,
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int],
        transposed: bool,
        output_padding: Sequence[int],
        groups: int,
        mask: Sequence[bool],
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        axes = w.ndim - 2
        stride, padding, dilation = (_axes(v, axes) for v in (stride, padding, dilation))
        seq = torch._C._current_autograd_node()
        info = self._forward.get(seq._sequence_nr()) if seq is not None else None
        if info is None:
            owner = self._names.owner(w)
            name, path = self._names.of_parameter(owner) if owner else self._names.of_place("conv")
            op = f"conv_transpose{axes}d" if transposed else f"conv{axes}d"
            info = _Forward(name, path, "conv", op, self._layer_recipe(name, path, "conv"), 0, 0, owner is not None)
        macs = _conv_macs(x, w, stride, padding, dilation, transposed)
        by_input = by_weight = by_bias = None

        def left(which: str) -> Tensor:
            self._leave_float(macs)
            only = [which == "input", which == "weight", False]
            found = aten.convolution_backward.default(
                grad, x, w, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, only
            )
            made: Tensor = found[0 if which == "input" else 1]
            return made

        if mask[0]:
            owner = self._names.owner(w)
            try:
                product, _ = self._gradient_site(info, "input", True)
                if transposed:
                    by_input = self._plain_conv(product, grad, w, owner, None, stride, padding, dilation, groups)
                else:
                    by_input = self._transposed(
                        product, grad, w, owner, None, stride, padding, dilation, x.shape[2:], groups, macs
                    )
                by_input = by_input.to(x.dtype)
            except _Leave:
                by_input = left("input")
        if mask[1]:
            try:
                product, _ = self._gradient_site(info, "weight", transposed)
                inner, outer = (grad, x) if transposed else (x, grad)
                backend = self._backend(x)
                made, errors, window = geometry.weight_gradient(
                    _number(inner), _number(outer), w.shape[2:], stride, padding, dilation, groups
                )
                weights = self._packed(backend, product, errors, None, "conv", Tensor.contiguous)
                shape = Convolution(tuple(made.shape), tuple(errors.shape), window, groups)
                shape.macs = macs
                by_weight = self._run(backend, product, shape, made, weights).transpose(0, 1).to(w.dtype)
            except _Leave:
                by_weight = left("weight")
        if mask[2]:
            by_bias = grad.sum([0, *range(2, 2 + axes)])
        return by_input, by_weight, by_bias


_PRODUCT_NODES = re.compile(r"(Mm|Addmm|Bmm|Baddbmm|Mv|Addmv|Dot|Vdot|Addbmm|Linear|Convolution)\w*Backward")


# ---------------------------------------------------------------------------------------------------
# Kinds of operations


def _out(handler: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The ``out=`` form of a handler."""

    def run(self: Emulation, *args: Any, out: Tensor, **kwargs: Any) -> Tensor:
        made = handler(self, *args, **kwargs)
        if out.shape != made.shape:
            out.resize_(made.shape)
        return out.copy_(made)

    return run


def _inplace(handler: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The in-place form of a handler."""

    def run(self: Emulation, start: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return start.copy_(handler(self, start, *args, **kwargs))

    return run


def _handlers() -> dict[Any, Callable[..., Any]]:
    found: dict[Any, Callable[..., Any]] = {}
    plain: dict[str, Callable[..., Any]] = {
        "mm": Emulation._mm,
        "addmm": Emulation._addmm,
        "bmm": Emulation._bmm_op,
        "baddbmm": Emulation._baddbmm,
        "mv": Emulation._mv,
        "addmv": Emulation._addmv,
        "dot": Emulation._dot,
        "vdot": Emulation._dot,
        "addbmm": Emulation._addbmm,
        "_addmm_activation": Emulation._addmm_activation,
        "linear": Emulation._linear,
        "convolution": Emulation._convolution,
        "_convolution": lambda self, *args: self._convolution(*args[:9]),
        "convolution_backward": Emulation._convolution_backward,
    }
    for name, handler in plain.items():
        packet = getattr(aten, name)
        for overload in packet.overloads():
            func = getattr(packet, overload)
            if overload == "default":
                found[func] = handler
            elif overload == "out" and name != "convolution_backward":
                found[func] = _out(handler)
        inplace = getattr(aten, f"{name}_", None)
        if inplace is not None and name not in ("convolution", "linear"):
            found[inplace.default] = _inplace(handler)
    return found


def _name(func: Any) -> str:
    """An operation's name, without ``.default``."""
    name: Any = func.name
    return str(name()).replace("::", ".")


def _is_plain_space(func: Any) -> bool:
    return func.namespace in _PLAIN_SPACES or _name(func) in _PLAIN_CUSTOM


@functools.cache
def _way(func: Any) -> str:
    """What becomes of an operation that is no product: ``"plain"``, ``"writes"``, ``"decompose"``, ``"missed"`` or
    ``"higher"`` (an operator that takes functions)."""
    if not isinstance(func, torch._ops.OpOverload):
        return "higher"
    operation = _name(func)
    base = operation.partition(".")[2].partition(".")[0]
    if torch._C._dispatch_has_kernel_for_dispatch_key(operation.replace(".", "::", 1), "CompositeImplicitAutograd"):
        return "decompose"
    if func.namespace == "aten" and (_MISSED.fullmatch(base) or base in _PRODUCTS):
        return "missed"
    if not _is_plain_space(func):
        return "foreign"
    return "writes" if func._schema.is_mutable else "plain"


def _higher(mode: _Mode, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An operator that takes functions: its plain definition, whose operations come here."""
    kernels = getattr(func, "py_kernels", {})
    kernel = kernels.get(torch._C.DispatchKey.CompositeExplicitAutograd)
    if kernel is None:
        raise UnsupportedError(
            f"torch.ops.higher_order.{func} computes out of sight, and cannot be emulated: use the plain form of what "
            "it stands for, without compilation"
        )
    with mode:
        return kernel(*args, **kwargs)


def _strange(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
    """Why operands are no plain float tensors; ``"meta"`` where there is nothing to compute."""
    for value in (*args, *kwargs.values()):
        if not isinstance(value, Tensor):
            continue
        if value.device.type == "meta":
            return "meta"
        if value.layout is not torch.strided:
            return str(value.layout).removeprefix("torch.")
        if value.dtype not in _FLOATS:
            return str(value.dtype).removeprefix("torch.")
    return None


def _are_fake(types: Sequence[type]) -> bool:
    return any(kind.__name__ in ("FakeTensor", "FunctionalTensor") for kind in types)


def _number(x: Tensor) -> Tensor:
    """Float32, or float64 as it is; contiguous or not."""
    x = x.detach()
    if x.is_neg():
        x = x.resolve_neg()
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def _axes(values: Sequence[int], axes: int) -> tuple[int, ...]:
    """One integer an axis; a single one stands for all."""
    return tuple(int(v) for v in values) * (axes if len(values) == 1 else 1)


def _conv_macs(
    x: Tensor, w: Tensor, stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], transposed: bool
) -> int:
    """Products of a convolution: each position of the output (of the input, if transposed) with each weight."""
    if transposed:
        places = math.prod(x.shape[2:])
    else:
        places = math.prod(
            (n + 2 * p - d * (k - 1) - 1) // s + 1
            for n, k, s, p, d in zip(x.shape[2:], w.shape[2:], stride, padding, dilation, strict=True)
        )
    return int(x.shape[0]) * places * math.prod(w.shape)


def _channel_bias(start: Tensor, shape: tuple[int, int], swap: bool, beta: float) -> Tensor | None:
    """What is added to a product [M, N] as one number a channel, if it has that form."""
    full = start.expand(shape)
    along = 1 if swap else 0
    if full.stride(along) != 0 and shape[along] != 1:
        return None
    made = full[:, 0] if swap else full[0]
    return made if beta == 1 else beta * made


def _scaled_sum(result: Tensor, start: Tensor, beta: float, alpha: float) -> Tensor:
    if alpha != 1:
        result = alpha * result
    return result if beta == 0 else result + (start if beta == 1 else beta * start)


_HANDLERS = _handlers()
# Products, in whatever form: one that has no handler is missed.
_PRODUCTS = frozenset(_name(func).split(".")[1] for func in _HANDLERS)


# ---------------------------------------------------------------------------------------------------
# Unfusing


@contextlib.contextmanager
def _plain_attention() -> Any:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)


@contextlib.contextmanager
def _no_onednn() -> Any:
    # torch.backends.mkldnn.flags would warn about Intel's GPUs
    before = torch._C._get_mkldnn_enabled()
    torch._C._set_mkldnn_enabled(False)
    try:
        yield
    finally:
        torch._C._set_mkldnn_enabled(before)


@contextlib.contextmanager
def _no_graphs() -> Any:
    """A CUDA graph replays what nobody sees."""
    graph = getattr(torch.cuda, "CUDAGraph", None)
    if graph is None or not hasattr(graph, "replay"):
        yield
        return

    def replay(self: Any) -> None:
        raise UnsupportedError("a CUDA graph replays products that no emulation sees: run the model without it")

    own = "replay" in vars(graph)
    before = graph.replay
    graph.replay = replay
    try:
        yield
    finally:
        if own:
            graph.replay = before
        else:
            del graph.replay


def _unfused() -> list[Any]:
    """Contexts under which torch computes products one by one, by operations that the dispatcher sees."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    made = [_plain_attention(), sdpa_kernel(SDPBackend.MATH), _no_onednn(), _no_graphs()]
    if torch._C._has_cudnn:
        made.append(torch.backends.cudnn.flags(enabled=False))
    if hasattr(torch.compiler, "set_stance"):
        # compiled models run as they were written
        made.append(torch.compiler.set_stance("force_eager"))
    return made


# ---------------------------------------------------------------------------------------------------


def emulate(
    datapath_or_recipe: str | Path | Datapath | Recipe,
    *,
    backward: bool = False,
    executor: str | None = None,
    model: nn.Module | None = None,
    headroom: float = HEADROOM,
    sqnr: str = "sampled",
    trace: Callable[[Traced], None] | None = None,
) -> Emulation:
    """A context (and decorator) under which every matrix product and convolution of torch runs on LNS words.

    ::

        with lnsdeploy.emulate("lns-madam-8") as seen:
            y = model(x)
        print(seen.table())

    Args:
        datapath_or_recipe: a named datapath, a TOML file of a datapath or recipe, or either itself.
        backward: whether the products of a backward pass are emulated too; ``loss.backward()`` then belongs inside the
            context. Otherwise they stay in float.
        executor: ``"cpu"``, ``"cuda"`` or ``"reference"``; by default what fits the tensors.
        model: the model whose names the report uses; without it, the first module called is taken for it.
        headroom: octaves kept free in accumulators above the largest sum of a sample.
        sqnr: ``"sampled"``: the noise is measured on a few rows of each product; ``"full"``: on all, which costs a
            float32 product of the same size.
        trace: called with each product, to the word.
    Returns: the context; its value in ``with … as`` is itself (see :class:`Emulation`).

    Raises:
        UnknownNameError: no such datapath or executor.
        BadFileError: the file is neither a datapath nor a recipe.
        BadTypeError, BadValueError: an argument is wrong.
    """
    recipe, base = resolve(datapath_or_recipe)
    return Emulation(
        recipe, base, backward=backward, executor=executor, model=model, headroom=headroom, sqnr=sqnr, trace=trace
    )


def resolve(datapath_or_recipe: str | Path | Datapath | Recipe) -> tuple[Recipe, Datapath | None]:
    """The recipe, and the datapath of layers for which it names none."""
    if isinstance(datapath_or_recipe, Recipe):
        return datapath_or_recipe, None
    if not isinstance(datapath_or_recipe, (str, Path, Datapath)):
        raise BadTypeError(f"a datapath, a recipe, a name or a file is needed, not {type(datapath_or_recipe).__name__}")
    if isinstance(datapath_or_recipe, (str, Path)) and str(datapath_or_recipe) not in named_datapaths():
        path = Path(datapath_or_recipe)
        if path.suffix == ".toml" or path.is_file():
            data = read_toml(path)
            if "accumulate" not in data and ("default" in data or "layer" in data):
                return Recipe.from_dict(data, where=str(path)), None
    datapath = load_datapath(datapath_or_recipe)
    return Recipe(LayerRecipe(datapath.weight, datapath.activation)), datapath
