"""The LNS operators as torch operators, and nets made of them.

Importing this module registers `torch.ops.lnsdeploy.*`: the operators of docs/operators under their names in snake case
(``LinearGemm`` is ``torch.ops.lnsdeploy.linear_gemm``), tensors in the same order, then the same integer attributes,
all of them keyword-only. So a program of them corresponds to an ONNX file call by node, and eager code,
`torch.compile` and `torch.export` see each as one operation:

======================================  ================================  =====================================
operator                                first tensors                     result
======================================  ================================  =====================================
encode                                  float32 [...]                     words [...] (spec 2.1, 2.4)
decode                                  words [...]                       float32 [...] (spec 2.5)
linear_gemm, log_gemm                   words [..., K], [N, K]            words [..., N] (spec 3, 4, 5)
linear_conv, log_conv                   words [B, C, 1 to 3 axes],        words [B, O, 1 to 3 axes] (spec 7.1)
                                        [O, C/group, 1 to 3 axes]
relu, clip                              words [...]                       words [...] (spec 6.1)
max_pool, average_pool                  words [B, C, 1 to 3 axes]         words [B, C, 1 to 3 axes] (spec 6.1, 6.5)
add                                     words [...], words [...]          words, broadcast (spec 6.4)
rescale                                 words [...]                       words [...] (spec 6.3)
======================================  ================================  =====================================

Words are uint8 where their format has at most 8 bits, else uint16. Results are contiguous. What the attributes and
tables hold is on the operators' pages; a log accumulator may have 40 bits here. :mod:`lnsdeploy.emulator.operands`
makes the tables.

On CUDA tensors they compute by the GPU kernels (:mod:`lnsdeploy.emulator.cuda`); the tables of a product are read once,
which waits for the GPU, then calls only launch. On the CPU they compute by the native library, on torch's own memory:
nothing is copied but what is not
contiguous, and not even that for the operands of matrix products and sums, which may have any strides. The library
packs a product's weights once; they stay packed for as long as the tensors live and are not changed. See
:func:`clear_cache` for changes that torch does not see.

Errors name the operator. Shape functions raise them too, so most appear while tracing already:

* BadTypeError: a tensor has another dtype than its format or table.
* BadValueError: an attribute is out of its range, or shapes do not fit.
* UnsupportedError: beyond the library's integers, or operands of a sum that broadcast over more than 8 axes.
* MissingDependencyError: there is no native library; only computing needs one, tracing does not.
"""

from __future__ import annotations

import ctypes
import hashlib
import re
import threading
import weakref
from collections import OrderedDict, deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from ctypes import byref, c_int64
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from lnsdeploy.datapath import LinearAccumulator, LogAccumulator
from lnsdeploy.emulator import graph as g
from lnsdeploy.emulator import native, operands, reference
from lnsdeploy.emulator.plan import DotPlan, Window
from lnsdeploy.errors import BadTypeError, BadValueError, LNSError, MissingDependencyError, UnsupportedError
from lnsdeploy.formats import LNSFormat

Attributes = Mapping[str, Any]

NAMESPACE = "lnsdeploy"

# ONNX element types, which the attribute output_type holds.
_UINT8, _UINT16 = 2, 4
# What the native library takes.
_MAX_SHIFT = 1 << 56
_MAX_WIDEN = 1 << 24
_MAX_AXIS = (1 << 31) - 1
_MAX_RANK = 8

# ---------------------------------------------------------------------------------------------------
# Checks, which shape functions and computations share. Sizes may be symbolic: a comparison becomes a condition on
# the traced program, so a batch size is compared with nothing that it need not equal.


def _dtype(bits: int) -> torch.dtype:
    return torch.uint8 if bits <= 8 else torch.uint16


def _is(x: Tensor, name: str, *dtypes: torch.dtype) -> None:
    if x.dtype not in dtypes:
        raise BadTypeError(f"{name} has elements of {x.dtype}, not {' or '.join(str(d) for d in dtypes)}")


def _words(x: Tensor, name: str, bits: int) -> None:
    if x.dtype != _dtype(bits):
        raise BadTypeError(f"{name} has elements of {x.dtype}, but words of {bits} bits are {_dtype(bits)}")


def _text(shape: Any) -> str:
    return str([*shape])


def _shape(x: Tensor, name: str, *sizes: int) -> None:
    if x.dim() != len(sizes) or any(n != wanted for n, wanted in zip(x.shape, sizes, strict=True)):
        raise BadValueError(f"{name} has shape {_text(x.shape)}, not {_text(sizes)}")


def _list(x: Tensor, name: str, dtype: torch.dtype) -> None:
    _is(x, name, dtype)
    if x.dim() != 1:
        raise BadValueError(f"{name} has shape {_text(x.shape)}, not one axis")


def _max_code(a: Attributes, side: str) -> int:
    return (1 << (int(a[f"{side}bits"]) - int(a[f"{side}signed"]))) - 1


def _output_dtype(a: Attributes) -> torch.dtype:
    bits = a["output_bits"]
    wanted = _UINT8 if bits <= 8 else _UINT16
    if a["output_type"] != wanted:
        raise BadValueError(f"output_type is {a['output_type']}, but that of words of {bits} bits is {wanted}")
    return _dtype(bits)


def _deltas(plus: Tensor, minus: Tensor) -> None:
    _list(plus, "delta_plus", torch.int32)
    _list(minus, "delta_minus", torch.int32)


def _windows(x: Tensor, channels: int, a: Attributes) -> list[int]:
    """The shape of a result of windows over x [B, C, 1 to 3 axes]."""
    axes = x.dim() - 2
    if not 1 <= axes <= 3:
        raise BadValueError(f"x has shape {_text(x.shape)}, not [B, C, 1 to 3 axes]")
    kernel, strides, pads, dilations = (a[name] for name in _WINDOW)
    first = 3 - axes
    for i in range(first):
        if (kernel[i], strides[i], dilations[i], pads[i], pads[3 + i]) != (1, 1, 1, 0, 0):
            raise BadValueError(f"the window covers an axis that x of shape {_text(x.shape)} does not have")
    sizes = []
    for i in range(first, 3):
        size = x.shape[2 + i - first]
        room = size + pads[i] + pads[3 + i] - dilations[i] * (kernel[i] - 1) - 1
        if room < 0:
            raise BadValueError(
                f"a window of {kernel[i]} (dilation {dilations[i]}) does not fit an axis of {size} with pads {pads[i]} "
                f"and {pads[3 + i]}"
            )
        sizes.append(room // strides[i] + 1)
    return [x.shape[0], channels, *sizes]


@lru_cache(maxsize=4096)
def _padding_only(size: int, out: int, kernel: int, stride: int, pad: int, dilation: int) -> bool:
    """Whether a window along one axis holds no element of it."""
    last = (out - 1) * stride - pad
    if last >= max(size, 0):
        return True
    # one that starts inside holds an element; one that starts before may step over all of them
    for start in range(-pad, min(last + 1, 0), stride):
        first = -(start // dilation)
        if first >= kernel or start + first * dilation >= size:
            return True
    return False


# ---------------------------------------------------------------------------------------------------
# Packed layers


class _Layer:
    """A product's weights as the native library packs them (spec 3 to 5, 7)."""

    def __init__(self, desc: native._DotDesc):
        self.handle = ctypes.c_void_p()
        native._call("lns_dot_create", byref(desc), byref(self.handle))

    def __del__(self) -> None:
        # at interpreter exit the library may be gone already
        if self.handle:
            with suppress(Exception):
                native._library().lns_dot_destroy(self.handle)


@dataclass(frozen=True)
class _Entry:
    layer: Any
    tensors: tuple[weakref.ref[Tensor], ...]
    state: tuple[Any, ...]
    words: int


_Key = tuple[Any, ...]


class _Layers:
    """Packed layers by the tensors and attributes that they were made of, the least recently used dropped first.

    An entry holds no tensor. It goes when one of its tensors does, and does not count any more when one was written to,
    which torch's version counters tell, or was given other memory.

    Args:
        most: layers kept.
        most_words: weight words kept in all layers; the last layer stays whatever its size.
    """

    def __init__(self, most: int = 1024, most_words: int = 1 << 28):
        self.most, self.most_words = most, most_words
        self._lock = threading.Lock()
        self._entries: OrderedDict[_Key, _Entry] = OrderedDict()
        self._words = 0
        self._dead: deque[tuple[_Key, weakref.ref[Tensor]]] = deque()

    def __len__(self) -> int:
        with self._lock:
            self._purge()
            return len(self._entries)

    def clear(self) -> None:
        """Forget every layer."""
        with self._lock:
            self._entries.clear()
            self._words = 0

    def get(self, tensors: tuple[Tensor, ...], attributes: _Key, make: Callable[[], Any]) -> Any:
        """The layer of these tensors, the weight first, and attributes: whatever `make` makes of them."""
        if any(t.is_inference() for t in tensors):
            # they have no version counter, so nothing tells whether they are what they were
            return make()
        key = (attributes, *map(id, tensors))
        state = tuple((t.data_ptr(), t._version, t.shape, t.stride()) for t in tensors)
        with self._lock:
            self._purge()
            found = self._entries.get(key)
            if found and found.state == state and all(r() is t for r, t in zip(found.tensors, tensors, strict=True)):
                self._entries.move_to_end(key)
                return found.layer
        # threads that pack the same layer at once waste time, but wait for nobody; `state` is from before packing
        layer = make()

        def died(tensor: weakref.ref[Tensor]) -> None:
            # this may run anywhere, also in a thread that holds the lock: then the next caller clears up
            self._dead.append((key, tensor))
            if self._lock.acquire(blocking=False):
                try:
                    self._purge()
                finally:
                    self._lock.release()

        entry = _Entry(layer, tuple(weakref.ref(t, died) for t in tensors), state, tensors[0].numel())
        with self._lock:
            self._purge()
            self._drop(key)
            self._entries[key] = entry
            self._words += entry.words
            while len(self._entries) > 1 and (len(self._entries) > self.most or self._words > self.most_words):
                self._drop(next(iter(self._entries)))
        return layer

    def _drop(self, key: _Key) -> None:
        entry = self._entries.pop(key, None)
        if entry is not None:
            self._words -= entry.words

    def _purge(self) -> None:
        while self._dead:
            key, tensor = self._dead.popleft()
            entry = self._entries.get(key)
            # another layer may have taken the key since, as identities of dead tensors are given out again
            if entry is not None and any(r is tensor for r in entry.tensors):
                self._drop(key)


_layers = _Layers()


def clear_cache() -> None:
    """Forget all packed weights.

    Only changes that torch's version counters do not show need this: through `.data`, or through memory that a NumPy
    array or another library shares. Tensors made in inference mode have no such counter, and are packed at every call.
    """
    _layers.clear()


# ---------------------------------------------------------------------------------------------------
# The operators: for each a shape function, which checks everything that shapes, dtypes and attributes can tell and
# makes an empty result, and a computation that fills it.


def _encode_result(x: Tensor, thresholds: Tensor, a: Attributes) -> Tensor:
    dtype = _output_dtype(a)
    _is(x, "x", torch.float32)
    _is(thresholds, "thresholds", torch.float32)
    _shape(thresholds, "thresholds", _max_code(a, "output_"))
    return x.new_empty(x.shape, dtype=dtype)


def _encode(y: Tensor, x: Tensor, thresholds: Tensor, a: Attributes) -> None:
    x, thresholds = x.contiguous(), thresholds.contiguous()
    native._call(
        "lns_encode",
        x.data_ptr(),
        x.numel(),
        thresholds.data_ptr(),
        thresholds.numel(),
        _format(a, "output_"),
        y.data_ptr(),
        native.threads(),
    )


def _decode_result(x: Tensor, table: Tensor, a: Attributes) -> Tensor:
    _is(x, "x", torch.uint8, torch.uint16)
    _list(table, "table", torch.float32)
    known = range(2, 9) if x.dtype == torch.uint8 else range(9, 17)
    if all(table.shape[0] != 1 << bits for bits in known):
        raise BadValueError(f"table has {table.shape[0]} entries, not one for every word of a format of {x.dtype}")
    return x.new_empty(x.shape, dtype=torch.float32)


def _decode(y: Tensor, x: Tensor, table: Tensor, a: Attributes) -> None:
    x, table = x.contiguous(), table.contiguous()
    native._call(
        "lns_decode",
        x.data_ptr(),
        x.element_size(),
        x.numel(),
        table.data_ptr(),
        table.numel(),
        y.data_ptr(),
        native.threads(),
    )


def _check_layer(w: Tensor, tables: tuple[Tensor, ...], a: Attributes) -> None:
    """Whether a product's tables fit its weights and attributes."""
    _words(w, "w", a["weight_bits"])
    channels = w.shape[0]
    bias, code_shift = tables[0], tables[-1]
    if "psum_bits" in a:
        terms, constants, thresholds = tables[1:4]
        _is(terms, "terms", torch.int32, torch.int64)
        columns = _max_code(a, "activation_") * a["activation_widen"] + _max_code(a, "weight_") * a["weight_widen"] + 1
        if terms.dim() != 2 or terms.shape[0] < 1 or terms.shape[1] != columns:
            raise BadValueError(f"terms has shape {_text(terms.shape)}, not [B, {columns}], one column a code sum")
        _is(bias, "bias", terms.dtype)
        _is(constants, "constants", torch.int64)
        _shape(constants, "constants", terms.shape[0])
        _list(thresholds, "thresholds", torch.int64)
    else:
        plus, minus, entry_shift = tables[1:4]
        _is(bias, "bias", torch.int64)
        _deltas(plus, minus)
        _is(entry_shift, "entry_shift", torch.int64)
        _shape(entry_shift, "entry_shift", channels)
    _shape(bias, "bias", channels)
    _is(code_shift, "code_shift", torch.int64)
    _shape(code_shift, "code_shift", channels)


def _gemm_result(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    *tables, a = rest
    dtype = _output_dtype(a)
    _words(x, "x", a["activation_bits"])
    if w.dim() != 2:
        raise BadValueError(f"w has shape {_text(w.shape)}, not [N, K]")
    _check_layer(w, tuple(tables), a)
    if x.dim() < 1 or x.shape[-1] != w.shape[1]:
        raise BadValueError(f"x has shape {_text(x.shape)}, not [..., {w.shape[1]}]")
    return x.new_empty([*x.shape[:-1], w.shape[0]], dtype=dtype)


def _gemm(y: Tensor, x: Tensor, w: Tensor, *rest: Any) -> None:
    *tables, a = rest
    layer = _layer(w, tuple(tables), a)
    rows = prod(x.shape[:-1])
    # a view wherever one can be had
    x = x if x.dim() == 2 else x.reshape(rows, x.shape[-1])
    native._call(
        "lns_dot_run",
        layer.handle,
        x.data_ptr(),
        rows,
        *x.stride(),
        y.data_ptr(),
        native.threads(),
        None,
    )


def _conv_result(x: Tensor, w: Tensor, *rest: Any) -> Tensor:
    *tables, a = rest
    dtype = _output_dtype(a)
    _words(x, "x", a["activation_bits"])
    if not 3 <= w.dim() <= 5:
        raise BadValueError(f"w has shape {_text(w.shape)}, not [O, C/group, 1 to 3 axes]")
    group = a["group"]
    if w.shape[0] % group:
        raise BadValueError(f"w has shape {_text(w.shape)}: its output channels do not divide into {group} groups")
    if [*w.shape[2:]] != a["kernel_shape"][5 - w.dim() :]:
        raise BadValueError(f"w has shape {_text(w.shape)}, but kernel_shape is {a['kernel_shape']}")
    _check_layer(w, tuple(tables), a)
    if x.dim() != w.dim() or x.shape[1] != w.shape[1] * group:
        raise BadValueError(
            f"x has shape {_text(x.shape)}, which does not fit {group} groups and w of shape {_text(w.shape)}"
        )
    return x.new_empty(_windows(x, w.shape[0], a), dtype=dtype)


def _conv(y: Tensor, x: Tensor, w: Tensor, *rest: Any) -> None:
    *tables, a = rest
    layer = _layer(w, tuple(tables), a)
    x = x.contiguous()
    native._call(
        "lns_conv_run",
        layer.handle,
        byref(_window(a)),
        x.data_ptr(),
        x.shape[0],
        _sizes(x),
        y.data_ptr(),
        native.threads(),
        None,
    )


def _layer(w: Tensor, tables: tuple[Tensor, ...], a: Attributes) -> Any:
    # what is packed depends on the instruction set, which tests change
    known = (native._library().lns_isa_in_use(), "psum_bits" in a, *(v for n, v in a.items() if n not in _WINDOW))
    return _layers.get((w, *tables), known, lambda: _pack(w, tables, a))


def _pack(w: Tensor, tables: tuple[Tensor, ...], a: Attributes) -> _Layer:
    # these, and so their memory, live until the layer is made
    words, *others = (t.contiguous() for t in (w, *tables))
    bias, code_shift = others[0].to(torch.int64), others[-1]
    linear = "psum_bits" in a
    desc = native._DotDesc(
        log=int(not linear),
        activation=_format(a, "activation_"),
        weight=_format(a, "weight_"),
        activation_widen=a["activation_widen"],
        weight_widen=a["weight_widen"],
        output=_output(a),
        groups=a.get("group", 1),
        channels=w.shape[0],
        depth=prod(w.shape[1:]),
        weight_words=words.data_ptr(),
        lanes=a["lanes"],
        acc_bits=a["acc_bits"],
        bias=bias.data_ptr(),
        code_shift=code_shift.data_ptr(),
    )
    if linear:
        terms, constants, thresholds = others[1:4]
        desc.psum_bits, desc.saturate = a["psum_bits"], a["saturate"]
        desc.terms, desc.terms_are_64 = terms.data_ptr(), int(terms.dtype == torch.int64)
        desc.bins, desc.term_columns = terms.shape
        desc.constants = constants.data_ptr()
        desc.thresholds, desc.threshold_count = thresholds.data_ptr(), thresholds.numel()
    else:
        plus, minus, entry_shift = others[1:4]
        _check_range(bias, "bias", 0, (2 << a["acc_bits"]) - 1)
        desc.guard_bits = a["guard_bits"]
        desc.delta_plus, desc.delta_plus_count = plus.data_ptr(), plus.numel()
        desc.delta_minus, desc.delta_minus_count = minus.data_ptr(), minus.numel()
        desc.entry_shift = entry_shift.data_ptr()
    return _Layer(desc)


def _check_range(values: Tensor, name: str, low: int, high: int) -> None:
    if values.numel():
        for value in (int(values.min()), int(values.max())):
            if not low <= value <= high:
                raise BadValueError(f"{name} has an entry {value}, not {low} to {high}")


def _same_result(x: Tensor, a: Attributes) -> Tensor:
    _words(x, "x", a["bits"])
    if "low" in a:
        most = _max_code(a, "")
        least = -most if a["signed"] else 0
        if not least <= a["low"] <= a["high"] <= most:
            raise BadValueError(f"limits {a['low']} and {a['high']} are not codes from {least} to {most} in order")
    return x.new_empty(x.shape)


def _relu(y: Tensor, x: Tensor, a: Attributes) -> None:
    x = x.contiguous()
    native._call("lns_relu", x.data_ptr(), x.numel(), _format(a, ""), y.data_ptr(), native.threads())


def _clip(y: Tensor, x: Tensor, a: Attributes) -> None:
    x = x.contiguous()
    limits = a["low"], a["high"]
    native._call("lns_clip", x.data_ptr(), x.numel(), _format(a, ""), *limits, y.data_ptr(), native.threads())


def _max_pool_result(x: Tensor, a: Attributes) -> Tensor:
    _words(x, "x", a["bits"])
    shape = _windows(x, x.shape[1] if x.dim() > 1 else 0, a)
    kernel, strides, pads, dilations = (a[name] for name in _WINDOW)
    for size, out, i in zip(x.shape[2:], shape[2:], range(5 - x.dim(), 3), strict=True):
        # a symbolic axis is looked at when the size is known
        known = isinstance(size, int) and isinstance(out, int)
        if known and _padding_only(size, out, kernel[i], strides[i], pads[i], dilations[i]):
            raise BadValueError("a window of the max pooling holds padding only: use smaller pads")
    return x.new_empty(shape)


def _max_pool(y: Tensor, x: Tensor, a: Attributes) -> None:
    x = x.contiguous()
    native._call(
        "lns_max_pool",
        x.data_ptr(),
        x.shape[0] * x.shape[1],
        _sizes(x),
        _format(a, ""),
        byref(_window(a)),
        y.data_ptr(),
        native.threads(),
    )


def _add_result(a: Tensor, b: Tensor, plus: Tensor, minus: Tensor, attributes: Attributes) -> Tensor:
    dtype = _output_dtype(attributes)
    _words(a, "a", attributes["a_bits"])
    _words(b, "b", attributes["b_bits"])
    _deltas(plus, minus)
    rank = max(a.dim(), b.dim())
    shape = []
    for x, y in zip([1] * (rank - a.dim()) + [*a.shape], [1] * (rank - b.dim()) + [*b.shape], strict=True):
        # equality first: of a symbolic size with itself it is known, and says nothing about the size
        if x != y and x != 1 and y != 1:
            raise BadValueError(f"a of shape {_text(a.shape)} and b of shape {_text(b.shape)} do not broadcast")
        shape.append(x if x == y or y == 1 else y)
    return a.new_empty(shape, dtype=dtype)


def _axes(a: Tensor, b: Tensor) -> list[tuple[int, int, int]]:
    """Sizes and both strides of tensors of one shape, neighbouring axes that both walk alike as one."""
    axes: list[tuple[int, int, int]] = []
    for size, x, y in zip(a.shape, a.stride(), b.stride(), strict=True):
        if size == 1:
            continue
        if axes and axes[-1][1:] == (x * size, y * size):
            size *= axes.pop()[0]
        axes.append((size, x, y))
    return axes


def _add(y: Tensor, a: Tensor, b: Tensor, plus: Tensor, minus: Tensor, attributes: Attributes) -> None:
    plus, minus = plus.contiguous(), minus.contiguous()
    axes = _axes(a.expand(y.shape), b.expand(y.shape))
    if len(axes) > _MAX_RANK:
        a, b = a.contiguous(), b.contiguous()
        axes = _axes(a.expand(y.shape), b.expand(y.shape))
    if len(axes) > _MAX_RANK:
        raise UnsupportedError(f"the operands broadcast over {len(axes)} axes, more than {_MAX_RANK}; reshape first")
    shape, a_strides, b_strides = ((c_int64 * max(len(axes), 1))(*(axis[i] for axis in axes)) for i in range(3))
    desc = native._AddDesc(
        _adder(plus, minus, attributes),
        _format(attributes, "a_"),
        _format(attributes, "b_"),
        attributes["a_shift"],
        attributes["b_shift"],
        attributes["code_shift"],
        _output(attributes),
    )
    native._call(
        "lns_add",
        byref(desc),
        len(axes),
        shape,
        a.data_ptr(),
        a_strides,
        b.data_ptr(),
        b_strides,
        y.data_ptr(),
        native.threads(),
        None,
    )


def _average_pool_result(x: Tensor, plus: Tensor, minus: Tensor, log_counts: Tensor, a: Attributes) -> Tensor:
    dtype = _output_dtype(a)
    _words(x, "x", a["input_bits"])
    _deltas(plus, minus)
    _is(log_counts, "log_counts", torch.int64)
    shape = _windows(x, x.shape[1] if x.dim() > 1 else 0, a)
    out = [1] * (5 - len(shape)) + shape[2:]
    if log_counts.dim() != 3 or any(n != 1 and n != o for n, o in zip(log_counts.shape, out, strict=True)):
        raise BadValueError(f"log_counts has shape {_text(log_counts.shape)}, not {_text(out)} or ones")
    return x.new_empty(shape, dtype=dtype)


def _average_pool(y: Tensor, x: Tensor, plus: Tensor, minus: Tensor, log_counts: Tensor, a: Attributes) -> None:
    x, plus, minus, log_counts = (t.contiguous() for t in (x, plus, minus, log_counts))
    _check_range(log_counts, "log_counts", 0, _MAX_SHIFT)
    desc = native._AverageDesc(
        _adder(plus, minus, a),
        _format(a, "input_"),
        a["input_shift"],
        a["code_shift"],
        a["lanes"],
        _output(a),
        log_counts.data_ptr(),
        (c_int64 * 3)(*log_counts.shape),
    )
    native._call(
        "lns_average_pool",
        byref(desc),
        x.data_ptr(),
        x.shape[0] * x.shape[1],
        _sizes(x),
        byref(_window(a)),
        y.data_ptr(),
        native.threads(),
        None,
    )


def _rescale_result(x: Tensor, a: Attributes) -> Tensor:
    dtype = _output_dtype(a)
    _words(x, "x", a["input_bits"])
    if a["multiply"] != 1 and a["divide"] != 1:
        raise BadValueError(f"multiply and divide are {a['multiply']} and {a['divide']}: one of them is 1")
    return x.new_empty(x.shape, dtype=dtype)


def _rescale(y: Tensor, x: Tensor, a: Attributes) -> None:
    x = x.contiguous()
    desc = native._RescaleDesc(
        _format(a, "input_"), a["input_offset"], a["multiply"], a["divide"], a["output_offset"], _output(a)
    )
    native._call("lns_rescale", byref(desc), x.data_ptr(), x.numel(), y.data_ptr(), native.threads(), None)


# What the native library is given.


def _format(a: Attributes, side: str) -> native._Format:
    return native._Format(a[f"{side}bits"], a[f"{side}signed"])


def _output(a: Attributes) -> native._Output:
    return native._Output(_format(a, "output_"), a["underflow"])


def _window(a: Attributes) -> native._Window:
    return native._Window(*(tuple(a[name]) for name in _WINDOW))


def _sizes(x: Tensor) -> Any:
    return (c_int64 * 3)(*[1] * (5 - x.dim()), *x.shape[2:])


def _adder(plus: Tensor, minus: Tensor, a: Attributes) -> native._Adder:
    return native._Adder(a["acc_bits"], a["guard_bits"], plus.data_ptr(), plus.numel(), minus.data_ptr(), minus.numel())


# ---------------------------------------------------------------------------------------------------
# Their signatures, and registration

_WINDOW = ("kernel_shape", "strides", "pads", "dilations")

# Attributes with the range of their values. C's int32 fields hold them only because they are in it.
_Ranges = tuple[tuple[str, int, int], ...]


def _format_ranges(side: str) -> _Ranges:
    return ((f"{side}bits", 2, 16), (f"{side}signed", 0, 1))


def _shift(*names: str, most: int = _MAX_SHIFT) -> _Ranges:
    return tuple((name, -most, most) for name in names)


_OUTPUT: _Ranges = (*_format_ranges("output_"), ("output_type", _UINT8, _UINT16), ("underflow", 0, 1))
_OPERANDS: _Ranges = tuple(
    entry for side in ("activation_", "weight_") for entry in (*_format_ranges(side), (f"{side}widen", 1, _MAX_WIDEN))
)
_LANES: _Ranges = (("lanes", 1, 1024),)
_LINEAR: _Ranges = (*_LANES, ("acc_bits", 2, 62), ("psum_bits", 2, 62), ("saturate", 0, 1))
_ADDER: _Ranges = (("acc_bits", 1, 40), ("guard_bits", 0, 8))
_WINDOWS: _Ranges = tuple((name, 0 if name == "pads" else 1, _MAX_AXIS) for name in _WINDOW)
_GROUP: _Ranges = (("group", 1, _MAX_AXIS),)
_LINEAR_TENSORS = ("x", "w", "bias", "terms", "constants", "thresholds", "code_shift")
_LOG_TENSORS = ("x", "w", "bias", "delta_plus", "delta_minus", "entry_shift", "code_shift")


@dataclass(frozen=True)
class _Operator:
    """An operator.

    Args:
        tensors: names of its tensors.
        attributes: names and ranges of its attributes; those of windows are lists.
        result: (tensors, attributes) to an empty result: the shape function.
        compute: (result, tensors, attributes): fills it.
    """

    tensors: tuple[str, ...]
    attributes: _Ranges
    result: Callable[..., Tensor]
    compute: Callable[..., None]

    def schema(self, name: str) -> str:
        attributes = [f"{'int[]' if key in _WINDOW else 'int'} {key}" for key, *_ in self.attributes]
        arguments = [*(f"Tensor {tensor}" for tensor in self.tensors), *(["*", *attributes] if attributes else [])]
        return f"{name}({', '.join(arguments)}) -> Tensor"

    def check(self, attributes: Attributes) -> None:
        for name, low, high in self.attributes:
            value = attributes[name]
            if name in _WINDOW:
                count = 6 if name == "pads" else 3
                if len(value) != count or not all(low <= v <= high for v in value):
                    raise BadValueError(f"{name} must be {count} integers from {low} to {high}, not {value}")
            elif not low <= value <= high:
                raise BadValueError(f"{name} must be {low} to {high}, not {value}")


_OPERATORS: dict[str, _Operator] = {
    "encode": _Operator(("x", "thresholds"), _OUTPUT[:3], _encode_result, _encode),
    "decode": _Operator(("x", "table"), (), _decode_result, _decode),
    "linear_gemm": _Operator(_LINEAR_TENSORS, (*_OPERANDS, *_LINEAR, *_OUTPUT), _gemm_result, _gemm),
    "linear_conv": _Operator(
        _LINEAR_TENSORS, (*_OPERANDS, *_LINEAR, *_OUTPUT, *_WINDOWS, *_GROUP), _conv_result, _conv
    ),
    "log_gemm": _Operator(_LOG_TENSORS, (*_OPERANDS, *_LANES, *_ADDER, *_OUTPUT), _gemm_result, _gemm),
    "log_conv": _Operator(
        _LOG_TENSORS, (*_OPERANDS, *_LANES, *_ADDER, *_OUTPUT, *_WINDOWS, *_GROUP), _conv_result, _conv
    ),
    "relu": _Operator(("x",), _format_ranges(""), _same_result, _relu),
    "clip": _Operator(("x",), (*_format_ranges(""), *_shift("low", "high")), _same_result, _clip),
    "max_pool": _Operator(("x",), (*_format_ranges(""), *_WINDOWS), _max_pool_result, _max_pool),
    "add": _Operator(
        ("a", "b", "delta_plus", "delta_minus"),
        (
            *_format_ranges("a_"),
            *_shift("a_shift"),
            *_format_ranges("b_"),
            *_shift("b_shift"),
            *_ADDER,
            *_shift("code_shift"),
            *_OUTPUT,
        ),
        _add_result,
        _add,
    ),
    "average_pool": _Operator(
        ("x", "delta_plus", "delta_minus", "log_counts"),
        (
            *_format_ranges("input_"),
            *_shift("input_shift"),
            *_LANES,
            *_ADDER,
            *_shift("code_shift"),
            *_OUTPUT,
            *_WINDOWS,
        ),
        _average_pool_result,
        _average_pool,
    ),
    "rescale": _Operator(
        ("x",),
        (
            *_format_ranges("input_"),
            *_shift("input_offset"),
            ("multiply", 1, _MAX_WIDEN),
            ("divide", 1, _MAX_WIDEN),
            *_shift("output_offset"),
            *_OUTPUT,
        ),
        _rescale_result,
        _rescale,
    ),
}


def on_gpu(name: str, made: Tensor, tensors: tuple[Tensor, ...], attributes: Attributes) -> None:
    """Fill an operator's result by the GPU kernels (:mod:`lnsdeploy.emulator.cuda_ops`)."""
    from lnsdeploy.emulator import cuda_ops

    if any(t.device != made.device for t in tensors):
        raise BadValueError(
            f"tensors on {', '.join(sorted({str(t.device) for t in tensors}))}: all must be on one device"
        )
    cuda_ops.COMPUTE[name](_layers.get, made, *tensors, attributes)


def _register(library: Any, name: str, operator: _Operator) -> None:
    def result(tensors: tuple[Tensor, ...], attributes: Attributes) -> Tensor:
        operator.check(attributes)
        return operator.result(*tensors, attributes)

    def named(function: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return function(*arguments)
        except MissingDependencyError:
            raise
        except LNSError as error:
            raise type(error)(f"{NAMESPACE}::{name}: {error}") from error

    def fake(*tensors: Tensor, **attributes: Any) -> Tensor:
        made: Tensor = named(result, tensors, attributes)
        return made

    def compute(*tensors: Tensor, **attributes: Any) -> Tensor:
        made: Tensor = named(result, tensors, attributes)
        named(operator.compute, made, *tensors, attributes)
        return made

    def compute_cuda(*tensors: Tensor, **attributes: Any) -> Tensor:
        made: Tensor = named(result, tensors, attributes)
        named(on_gpu, name, made, tensors, attributes)
        return made

    library.define(operator.schema(name), tags=(torch.Tag.pt2_compliant_tag,))
    library.impl(name, compute, "CPU")
    library.impl(name, compute_cuda, "CUDA")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)


# The operators are there for as long as this is. A fragment leaves the namespace open to other devices' packages.
_LIBRARY: Any = torch.library.Library(NAMESPACE, "FRAGMENT")  # type: ignore[no-untyped-call]
for _name, _operator in _OPERATORS.items():
    _register(_LIBRARY, _name, _operator)


# ---------------------------------------------------------------------------------------------------
# Nets


def _format_attributes(side: str, fmt: LNSFormat) -> dict[str, Any]:
    if fmt.bits > 16:
        raise UnsupportedError(f"format {fmt}: words of a torch operator have at most 16 bits; use the reference")
    return {f"{side}bits": fmt.bits, f"{side}signed": int(fmt.signed)}


def _output_attributes(fmt: LNSFormat, underflow: str) -> dict[str, Any]:
    return {
        **_format_attributes("output_", fmt),
        "output_type": _UINT8 if fmt.bits <= 8 else _UINT16,
        "underflow": int(underflow == "min"),
    }


def _adder_attributes(accumulator: LogAccumulator) -> dict[str, Any]:
    return {"acc_bits": accumulator.bits, "guard_bits": accumulator.guard_bits}


def _dot_attributes(plan: DotPlan) -> dict[str, Any]:
    part = plan.datapath.accumulate
    attributes = {
        **_format_attributes("activation_", plan.activation),
        "activation_widen": plan.widen_activation,
        **_format_attributes("weight_", plan.weight),
        "weight_widen": plan.widen_weight,
        "lanes": part.lanes,
        "acc_bits": part.bits,
        **_output_attributes(plan.output, plan.datapath.underflow),
    }
    if isinstance(part, LinearAccumulator):
        return attributes | {"psum_bits": part.step_bits, "saturate": int(part.overflow == "saturate")}
    return attributes | _adder_attributes(part)


def _window_attributes(window: Window) -> dict[str, Any]:
    axes = len(window.kernel)
    zeros, ones = [0] * (3 - axes), [1] * (3 - axes)
    return {
        "kernel_shape": [*ones, *window.kernel],
        "strides": [*ones, *window.strides],
        "pads": [*zeros, *window.pads[:axes], *zeros, *window.pads[axes:]],
        "dilations": [*ones, *window.dilations],
    }


@dataclass(frozen=True)
class _Step:
    """One operation of a net: a torch operator of ours by name, or a change of shape.

    Args:
        name: of the operator, or ``"reshape"``, ``"permute"``, ``"cat"``.
        inputs: names of tensors of words.
        operands: names of buffers.
        attributes: of the operator.
        numbers: shape, order or axis of the others.
        done: tensors that no later step reads.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    operands: tuple[str, ...] = ()
    attributes: tuple[tuple[str, Any], ...] = ()
    numbers: tuple[int, ...] = ()
    done: tuple[str, ...] = ()


class LNSModule(nn.Module):
    """A net of the LNS operators, from its float input to its float output.

    Words and tables are buffers, so they are in the `state_dict` and can be changed in place. The output equals what
    the reference executor gives, :func:`lnsdeploy.emulator.graph.run_reference` and then the decoding, to the bit; NaN,
    which the reference refuses, counts as zero here (as in an ONNX file). `torch.export` takes it with a batch axis of
    any size.

    Args:
        graph: the net.

    Raises:
        BadFileError: the net's nodes contradict each other.
        UnsupportedError: a format, table or node has no operator.
    """

    def __init__(self, graph: g.LNSGraph):
        super().__init__()
        graph.check()
        self.input, self.input_shape, self.output = graph.input, tuple(graph.input_shape), graph.output
        self._shared: dict[Any, str] = {}
        steps = [self._encode(graph), *(self._node(node) for node in graph.nodes), self._decode(graph)]
        del self._shared
        last = {name: i for i, step in enumerate(steps) for name in step.inputs}
        self._steps = tuple(
            replace(step, done=tuple({name for name in step.inputs if last[name] == i})) for i, step in enumerate(steps)
        )

    def forward(self, x: Tensor) -> Tensor:
        """The net's output.

        Args:
            x: floating point, of the net's input shape, any batch.
        Returns: float32, of the net's output shape.

        Raises:
            BadValueError: another shape, or no floating-point numbers.
        """
        if not x.dtype.is_floating_point:
            raise BadValueError(f"input {self.input!r} must be floating point, not {x.dtype}")
        if x.dim() != len(self.input_shape) or any(
            wanted and n != wanted for n, wanted in zip(x.shape, self.input_shape, strict=True)
        ):
            wanted = ", ".join(str(n or "batch") for n in self.input_shape)
            raise BadValueError(f"input {self.input!r} must have the shape [{wanted}], not {_text(x.shape)}")
        env = {self.input: x.to(torch.float32)}
        for step in self._steps:
            inputs = [env[name] for name in step.inputs]
            for name in step.done:
                del env[name]
            env[step.output] = self._run(step, inputs)
        return env[self.output]

    def extra_repr(self) -> str:
        """The input's shape and the operators."""
        return f"input_shape={self.input_shape}, operators={[step.name for step in self._steps]}"

    def _run(self, step: _Step, inputs: list[Tensor]) -> Tensor:
        if step.name == "reshape":
            return inputs[0].reshape(_resolved(inputs[0].shape, step.numbers))
        if step.name == "permute":
            return inputs[0].permute(step.numbers)
        if step.name == "cat":
            return torch.cat(inputs, step.numbers[0])
        operator = getattr(torch.ops.lnsdeploy, step.name)
        made: Tensor = operator(*inputs, *(getattr(self, name) for name in step.operands), **dict(step.attributes))
        return made

    def _operands(self, name: str, arrays: Mapping[str, npt.NDArray[Any]]) -> tuple[str, ...]:
        """Names of buffers with these contents; equal tables are held once."""
        return tuple(self._operand(name, key, array) for key, array in arrays.items())

    def _operand(self, name: str, key: str, array: npt.NDArray[Any]) -> str:
        array = np.ascontiguousarray(array)
        content = (array.dtype.str, array.shape, hashlib.sha256(array.tobytes()).digest())
        # weights and biases of layers may be changed one by one
        own = key in ("w", "bias")
        if not own and content in self._shared:
            return self._shared[content]
        made = f"{re.sub(r'[^0-9A-Za-z]', '_', name)}_{key}"
        while hasattr(self, made):
            made += "_"
        self.register_buffer(made, torch.from_numpy(array.copy()))
        if not own:
            self._shared[content] = made
        return made

    def _encode(self, graph: g.LNSGraph) -> _Step:
        info = graph.tensors[graph.encoded]
        attributes = _output_attributes(info.format, graph.underflow)
        del attributes["underflow"]
        table = operands.encode_thresholds(info.format, info.offset, graph.underflow)
        made = self._operands(f"{graph.encoded}_encode", {"thresholds": table})
        return _Step("encode", (graph.input,), graph.encoded, made, tuple(attributes.items()))

    def _decode(self, graph: g.LNSGraph) -> _Step:
        info = graph.tensors[graph.words_output]
        _format_attributes("", info.format)
        made = self._operands(f"{graph.output}_decode", {"table": operands.decode_values(info.format, info.offset)})
        return _Step("decode", (graph.words_output,), graph.output, made)

    def _node(self, node: g.Node) -> _Step:
        try:
            return self._step(node)
        except UnsupportedError as error:
            raise UnsupportedError(f"node {node.name!r} ({node.op}): {error}") from error

    def _step(self, node: g.Node) -> _Step:
        def step(name: str, attributes: dict[str, Any], arrays: Mapping[str, npt.NDArray[Any]]) -> _Step:
            made = self._operands(node.name, arrays)
            return _Step(name, node.inputs, node.output, made, tuple(attributes.items()))

        if isinstance(node, (g.Gemm, g.Conv)):
            plan, channels = node.plan, node.words.shape[0]
            attributes = _dot_attributes(plan)
            if isinstance(node, g.Conv):
                attributes |= {**_window_attributes(node.window), "group": node.groups}
            kind = "linear" if plan.datapath.is_linear else "log"
            make = operands.linear_tables if plan.datapath.is_linear else operands.log_tables
            arrays = {"w": node.words, **make(plan, channels, node.bias)}
            return step(f"{kind}_{node.op.lower()}", attributes, arrays)
        if isinstance(node, g.Relu):
            return step("relu", _format_attributes("", node.format), {})
        if isinstance(node, g.Clip):
            fmt = node.format
            low, high = (-(w & fmt.max_code) if w & fmt.sign_bit else w & fmt.max_code for w in (node.low, node.high))
            return step("clip", {**_format_attributes("", fmt), "low": low, "high": high}, {})
        if isinstance(node, g.MaxPool):
            return step("max_pool", {**_format_attributes("", node.format), **_window_attributes(node.window)}, {})
        if isinstance(node, g.Add):
            add = node.plan
            attributes = {
                **_format_attributes("a_", add.a),
                "a_shift": add.a_offset - add.acc_offset,
                **_format_attributes("b_", add.b),
                "b_shift": add.b_offset - add.acc_offset,
                **_adder_attributes(add.accumulator),
                "code_shift": add.acc_offset - add.output_offset,
                **_output_attributes(add.output, add.underflow),
            }
            return step("add", attributes, operands.delta_tables(add.accumulator, add.output.gamma))
        if isinstance(node, g.AveragePool):
            pool = node.plan
            if node.spatial is None:
                raise UnsupportedError("the size of its input is not known")
            counts = reference.log_counts(node.spatial, pool, node.window, node.count_include_pad)
            arrays = {
                **operands.delta_tables(pool.accumulator, pool.input.gamma),
                "log_counts": counts.reshape((1,) * (3 - counts.ndim) + counts.shape),
            }
            attributes = {
                **_format_attributes("input_", pool.input),
                "input_shift": pool.input_offset - pool.acc_offset,
                "lanes": pool.accumulator.lanes,
                **_adder_attributes(pool.accumulator),
                "code_shift": pool.acc_offset - pool.output_offset,
                **_output_attributes(pool.output, pool.underflow),
                **_window_attributes(node.window),
            }
            return step("average_pool", attributes, arrays)
        if isinstance(node, g.Rescale):
            change = node.plan
            attributes = {
                **_format_attributes("input_", change.input),
                "input_offset": change.input_offset,
                "multiply": max(change.output.gamma // change.input.gamma, 1),
                "divide": max(change.input.gamma // change.output.gamma, 1),
                "output_offset": change.output_offset,
                **_output_attributes(change.output, change.underflow),
            }
            return step("rescale", attributes, {})
        if isinstance(node, g.Reshape):
            return _Step("reshape", node.inputs, node.output, numbers=tuple(node.shape))
        if isinstance(node, g.Transpose):
            return _Step("permute", node.inputs, node.output, numbers=tuple(node.order))
        if isinstance(node, g.Concat):
            return _Step("cat", node.inputs, node.output, numbers=(node.axis,))
        raise UnsupportedError("it has no torch operator")


def _resolved(have: tuple[int, ...], shape: tuple[int, ...]) -> list[int]:
    """A shape without zeros, which keep an axis, and without −1, even if an axis that is kept is empty (spec 6.1)."""
    left = prod([n for i, n in enumerate(have) if i >= len(shape) or shape[i] != 0])
    left //= prod([n for n in shape if n > 0])
    return [have[i] if n == 0 else left if n == -1 else n for i, n in enumerate(shape)]
