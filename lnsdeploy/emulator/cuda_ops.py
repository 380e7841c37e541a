"""The torch operators on CUDA tensors; :mod:`lnsdeploy.emulator.ops` registers them.

Each fills a result that the operator's shape function has made, so shapes, dtypes and attributes are checked.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

from lnsdeploy.emulator import cuda
from lnsdeploy.emulator.cuda_products import Layer, Side, fitted
from lnsdeploy.emulator.plan import Window
from lnsdeploy.errors import BadValueError

Attributes = Mapping[str, Any]
# keeps what is made of tensors, by the tensors: ops._layers.get
Keep = Callable[[tuple[Tensor, ...], tuple[Any, ...], Callable[[], Any]], Any]


def _side(a: Attributes, side: str) -> Side:
    return Side(a[f"{side}bits"], bool(a[f"{side}signed"]), a.get(f"{side}widen", 1))


def _numpy(x: Tensor) -> npt.NDArray[Any]:
    array: npt.NDArray[Any] = x.contiguous().cpu().numpy()
    return array


def _window(a: Attributes, axes: int) -> Window:
    first = 3 - axes
    kernel, strides, pads, dilations = (a[name] for name in ("kernel_shape", "strides", "pads", "dilations"))
    return Window(
        tuple(kernel[first:]), tuple(strides[first:]), (*pads[first:3], *pads[3 + first :]), tuple(dilations[first:])
    )


def _pack(w: Tensor, tables: tuple[Tensor, ...], a: Attributes) -> cuda.Packed:
    bias, *middle, code_shift = (_numpy(t) for t in tables)
    common: dict[str, Any] = {
        "activation": _side(a, "activation_"),
        "weight": _side(a, "weight_"),
        "output": _side(a, "output_"),
        "underflow_min": bool(a["underflow"]),
        "groups": a.get("group", 1),
        "channels": w.shape[0],
        "lanes": a["lanes"],
        "acc_bits": a["acc_bits"],
        "bias": bias.astype(np.int64),
        "code_shift": code_shift,
    }
    if "psum_bits" in a:
        terms, constants, thresholds = middle
        if thresholds.size and (thresholds[0] < 1 or (np.diff(thresholds) < 0).any()):
            raise BadValueError("thresholds must be sorted and at least 1")
        common |= {"psum_bits": a["psum_bits"], "saturate": bool(a["saturate"])}
        common |= {"terms": terms.astype(np.int64), "constants": constants, "thresholds": thresholds}
        # the first value is fitted before the first step (spec 4.5)
        common["bias"] = fitted(common["bias"], a["acc_bits"], bool(a["saturate"]))
    else:
        if bias.size and not 0 <= int(bias.min()) <= int(bias.max()) < 2 << a["acc_bits"]:
            raise BadValueError(f"bias has an entry that is not 0 to {(2 << a['acc_bits']) - 1}")
        common |= {"guard_bits": a["guard_bits"]}
        common |= dict(zip(("delta_plus", "delta_minus", "entry_shift"), middle, strict=True))
    layer = Layer(**common)
    layer.check()
    return cuda.Packed(layer, w.reshape(w.shape[0], prod(w.shape[1:])))


def _packed(w: Tensor, tables: tuple[Tensor, ...], a: Attributes, keep: Keep) -> cuda.Packed:
    windows = ("kernel_shape", "strides", "pads", "dilations")
    known = ("cuda", "psum_bits" in a, *(v for name, v in a.items() if name not in windows))
    found: cuda.Packed = keep((w, *tables), known, lambda: _pack(w, tables, a))
    return found


def gemm(keep: Keep, y: Tensor, x: Tensor, w: Tensor, *rest: Any) -> None:
    """x [..., K] and w [N, K] to y [..., N] (spec 3, 4, 5)."""
    *tables, a = rest
    packed = _packed(w, tuple(tables), a, keep)
    rows = prod(x.shape[:-1])
    x = x if x.dim() == 2 else x.reshape(rows, x.shape[-1])
    cuda.matrix(packed, x[None], y.view(1, rows, w.shape[0]), None)


def conv(keep: Keep, y: Tensor, x: Tensor, w: Tensor, *rest: Any) -> None:
    """x [B, C, …] and w [O, C/group, …] to y [B, O, …] (spec 7.1)."""
    *tables, a = rest
    packed = _packed(w, tuple(tables), a, keep)
    cuda.convolution(packed, x, y, _window(a, x.dim() - 2), int(w.shape[1]), None)


def encode(keep: Keep, y: Tensor, x: Tensor, thresholds: Tensor, a: Attributes) -> None:
    """float32 to words (spec 2.1, 2.4)."""

    def make() -> tuple[Tensor, Tensor, int]:
        values = _numpy(thresholds)
        if not (values >= 0).all() or (np.diff(values) < 0).any():
            raise BadValueError("thresholds must be sorted and at least 0")
        bounds, starts, drop = cuda.encode_table(values)
        return cuda.upload(bounds, x.device), cuda.upload(starts, x.device), drop

    cuda.encode_words(x, keep((thresholds,), ("encode",), make), _side(a, "output_"), y)


def decode(keep: Keep, y: Tensor, x: Tensor, table: Tensor, a: Attributes) -> None:
    """Words to float32 (spec 2.5)."""
    cuda.decode_words(x, table.contiguous(), table.shape[0].bit_length() - 1, y)


def relu(keep: Keep, y: Tensor, x: Tensor, a: Attributes) -> None:
    """spec 6.1"""
    cuda.limit_words(x, _side(a, ""), (0, _side(a, "").max_code), y)


def clip(keep: Keep, y: Tensor, x: Tensor, a: Attributes) -> None:
    """spec 6.1"""
    cuda.limit_words(x, _side(a, ""), (a["low"], a["high"]), y)


def max_pool(keep: Keep, y: Tensor, x: Tensor, a: Attributes) -> None:
    """spec 6.1"""
    window = _window(a, x.dim() - 2)
    if y.numel() and cuda.holds_padding_only(tuple(x.shape[2:]), window):
        raise BadValueError("a window of the max pooling holds padding only: use smaller pads")
    cuda.max_words(x, _side(a, ""), window, y)


def _adder(plus: Tensor, minus: Tensor, a: Attributes) -> Any:
    return cuda.adder(plus, plus.numel(), minus, minus.numel(), a["acc_bits"], a["guard_bits"], a.get("lanes", 1))


def add(keep: Keep, y: Tensor, a: Tensor, b: Tensor, plus: Tensor, minus: Tensor, attributes: Attributes) -> None:
    """spec 6.4"""
    plus, minus = plus.contiguous(), minus.contiguous()
    cuda.add_words(
        a.expand(y.shape),
        b.expand(y.shape),
        (_side(attributes, "a_"), _side(attributes, "b_")),
        (attributes["a_shift"], attributes["b_shift"], attributes["code_shift"]),
        _adder(plus, minus, attributes),
        cuda.result(y, _side(attributes, "output_"), bool(attributes["underflow"])),
    )


def average_pool(
    keep: Keep, y: Tensor, x: Tensor, plus: Tensor, minus: Tensor, log_counts: Tensor, a: Attributes
) -> None:
    """spec 6.5"""
    plus, minus, log_counts = plus.contiguous(), minus.contiguous(), log_counts.contiguous()
    cuda.pool_words(
        x,
        _side(a, "input_"),
        cuda.result(y, _side(a, "output_"), bool(a["underflow"])),
        _adder(plus, minus, a),
        _window(a, x.dim() - 2),
        y.numel(),
        (a["input_shift"], a["code_shift"]),
        (log_counts, tuple(log_counts.shape)),
    )


def rescale(keep: Keep, y: Tensor, x: Tensor, a: Attributes) -> None:
    """spec 6.3"""
    offsets = a["input_offset"], a["output_offset"]
    change = offsets, a["multiply"], a["divide"]
    cuda.rescale_words(x, _side(a, "input_"), _side(a, "output_"), bool(a["underflow"]), change, y)


COMPUTE: dict[str, Callable[..., None]] = {
    "encode": encode,
    "decode": decode,
    "linear_gemm": gemm,
    "linear_conv": conv,
    "log_gemm": gemm,
    "log_conv": conv,
    "relu": relu,
    "clip": clip,
    "max_pool": max_pool,
    "add": add,
    "average_pool": average_pool,
    "rescale": rescale,
}
