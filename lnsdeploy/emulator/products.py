"""One product of float tensors through the emulator: calibrate, encode, place, multiply, decode (docs/emulation.md).

Everything is stateless but for what a recipe asks to record: the same operands give the same words, whatever came
before and whichever executor runs them.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from lnsdeploy import formats
from lnsdeploy.datapath import Datapath, LinearAccumulator
from lnsdeploy.emulator.backends import Backend, Layer
from lnsdeploy.emulator.place import acc_offset_for, bias_integers, bias_words, lsb_for
from lnsdeploy.emulator.plan import DotPlan, Ints, Window
from lnsdeploy.emulator.records import CodeHistogram, ProductRecord
from lnsdeploy.errors import BadValueError
from lnsdeploy.formats import LNSFormat, Method

# Rows that are multiplied in float32 as well: spread over all (for the noise, and for placing the accumulator), and
# those of the largest norm (for placing alone).
SAMPLE, LOUDEST = 16, 8
# Partial sums are looked at this many times along the depth.
_STEPS = 8
_GOLDEN = (math.sqrt(5) - 1) / 2
# Results are first taken in words so wide that nothing leaves them, then limited to their format.
_LEAST_WIDE, _MOST_WIDE = 9, 16
_RETRIES = 4


@dataclass(frozen=True)
class Setting:
    """The arithmetic of a product.

    Args:
        datapath: for these formats.
        activation, weight, output: formats of the first and second operand, and of the result.
        per_channel: whether the second operand has an offset for each of its output channels.
        calibration: of the operands.
        recorded: whether offsets and the accumulator stay those of the first call.
        headroom: octaves kept free above the largest sum of the sample.
    """

    datapath: Datapath
    activation: LNSFormat
    weight: LNSFormat
    output: LNSFormat
    per_channel: bool
    calibration: Method
    recorded: bool
    headroom: float


@dataclass(eq=False)
class Placed:
    """What calibration found for a call; integers only.

    Args:
        input_offset: o_a.
        output_offset: o_out.
        lsb: λ, of a linear accumulator.
        acc_offset: o_acc less o_a (at the products' γ), int64 [] or [N], of a log accumulator.
    """

    input_offset: int
    output_offset: int | None = None
    lsb: int = 0
    acc_offset: Ints | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain data."""
        return {
            "input_offset": self.input_offset,
            "output_offset": self.output_offset,
            "lsb": self.lsb,
            "acc_offset": None if self.acc_offset is None else self.acc_offset.tolist(),
        }

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Placed:
        """Inverse of :meth:`to_dict`."""
        acc = data["acc_offset"]
        return cls(
            int(data["input_offset"]),
            None if data["output_offset"] is None else int(data["output_offset"]),
            int(data["lsb"]),
            None if acc is None else np.array(acc, dtype=np.int64),
        )


@dataclass(eq=False)
class Weights:
    """An encoded second operand, and the layer that was last packed from it.

    Args:
        values: float tensor, in the product's layout.
        words: of the backend.
        offset: int, or int64 [N].
        counts: int64 [2^bits], how often each word came.
    """

    values: Tensor
    words: Any
    offset: int | Ints
    counts: Ints
    layer: Layer | None = None
    key: Any = None


@dataclass(frozen=True, eq=False)
class Traced:
    """A product to the word, for comparison with another executor: ``reference.dot(a, w, bias, plan)`` for a product,
    ``reference.convolution(a, w, bias, plan, window, groups)`` for a convolution, gives `result`.

    Args:
        name: of the record.
        plan: formats, offsets, accumulator.
        a, w: words of the operands: [M, K] and [N, K] (batches first), or as a convolution has them.
        bias: integers [N], or None.
        window, groups: of a convolution, else None and 1.
        result: words of `plan.output`.
    """

    name: str
    plan: DotPlan
    a: npt.NDArray[Any]
    w: npt.NDArray[Any]
    bias: Ints | None
    window: Window | None
    groups: int
    result: npt.NDArray[Any]


class Geometry:
    """How a product's operands lie, and what its sample is.

    A sample is of rows [R, G, K] of the first operand, whose results are [R, G·n] for the G groups' n channels.
    """

    groups: int
    channels: int
    macs: int
    window: Window | None = None

    def rows(self, a: Tensor, loud: bool) -> tuple[Tensor, Any]:
        """Sampled rows [R, G, K], with those of the largest norm last if `loud`; and where their results are."""
        raise NotImplementedError

    def columns(self, values: Tensor, where: Any) -> Tensor:
        """The second operand [G, n, K] that the rows meet."""
        raise NotImplementedError

    def run(self, backend: Backend, layer: Layer, words: Any) -> Any:
        """The words of the result."""
        raise NotImplementedError

    def pick(self, result: Tensor, where: Any) -> Tensor:
        """The results [R, G·n] of the sampled rows."""
        raise NotImplementedError

    def fair(self, results: Tensor, where: Any) -> Tensor:
        """Sampled results without those that were chosen for their norm."""
        raise NotImplementedError

    def exact(self, a: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        """The whole result in float."""
        raise NotImplementedError


def spread(count: int, total: int) -> list[int]:
    """At most `count` of `total` indices, evenly spread and in no step with any size: multiples of the golden ratio."""
    if total <= count:
        return list(range(total))
    return sorted({int(((i + 0.5) * _GOLDEN % 1.0) * total) for i in range(count)})


class Dot(Geometry):
    """[M, K] times [N, K]."""

    groups = 1

    def __init__(self, m: int, n: int, k: int):
        self.m, self.channels, self.k = m, n, k
        self.macs = m * n * k

    def rows(self, a: Tensor, loud: bool) -> tuple[Tensor, Any]:
        index = spread(SAMPLE, self.m)
        fair = len(index)
        if loud and self.m > SAMPLE:
            index = index + a.square().sum(1).topk(min(LOUDEST, self.m)).indices.tolist()
        return a[index][:, None], (index, fair)

    def columns(self, values: Tensor, where: Any) -> Tensor:
        return values[None]

    def run(self, backend: Backend, layer: Layer, words: Any) -> Any:
        return layer.dot(words)

    def pick(self, result: Tensor, where: Any) -> Tensor:
        return result[where[0]]

    def fair(self, results: Tensor, where: Any) -> Tensor:
        return results[: where[1]]

    def exact(self, a: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return a @ values.T if bias is None else torch.addmm(bias, a, values.T)


class Batched(Geometry):
    """[B, M, K] times [B, K, N] as a grouped convolution with a kernel of 1. Its weights are the first operand, so that
    the result [B, M, N] lies as it should; codes add, so nothing else depends on which operand is which."""

    def __init__(self, batch: int, m: int, n: int, k: int):
        self.groups, self.m, self.n, self.k = batch, m, n, k
        self.channels = batch * m
        self.macs = batch * m * n * k
        self.window = Window((1,))

    # rows of the sample are columns of the second operand, [B, K, N]
    def rows(self, a: Tensor, loud: bool) -> tuple[Tensor, Any]:
        some = spread(4, self.groups)
        fair = len(some) * self.m
        if loud and self.groups > 4:
            some = some + a.square().sum((1, 2)).topk(4).indices.tolist()
        each = spread(SAMPLE // 2, self.n)
        return a[some][:, :, each].permute(2, 0, 1), (some, each, fair)

    def columns(self, values: Tensor, where: Any) -> Tensor:
        return values[where[0]]

    def run(self, backend: Backend, layer: Layer, words: Any) -> Any:
        assert self.window is not None
        words = backend.reshape(words, (1, self.groups * self.k, self.n))
        return backend.reshape(layer.convolution(words, self.window), (self.groups, self.m, self.n))

    def pick(self, result: Tensor, where: Any) -> Tensor:
        some, each, _ = where
        return result[some][:, :, each].permute(2, 0, 1).reshape(len(each), -1)

    def fair(self, results: Tensor, where: Any) -> Tensor:
        return results[:, : where[2]]

    def exact(self, a: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        return torch.bmm(values, a)


class Convolution(Geometry):
    """[B, groups·C, *spatial] by [N, C, *kernel]."""

    def __init__(self, x: tuple[int, ...], w: tuple[int, ...], window: Window, groups: int):
        self.window, self.groups, self.channels = window, groups, w[0]
        self.x, self.w = x, w
        self.out = window.output_shape(x[2:])
        self.k = math.prod(w[1:])
        self.macs = x[0] * w[0] * math.prod(self.out) * self.k

    def rows(self, a: Tensor, loud: bool) -> tuple[Tensor, Any]:
        assert self.window is not None
        window, axes = self.window, len(self.out)
        places = math.prod(self.out)
        index = spread(SAMPLE, self.x[0] * places)
        fair = len(index)
        if loud and self.x[0] * places > SAMPLE:
            norms = _window_norms(a, window)
            index = index + norms.reshape(-1).topk(min(LOUDEST, norms.numel())).indices.tolist()
        # for each row and axis the positions of the kernel's taps
        flat = torch.tensor(index, dtype=torch.int64, device=a.device)
        image, position = flat // places, flat % places
        at: Any = torch.zeros(len(index), 1, dtype=torch.int64, device=a.device)
        inside: Any = torch.ones(len(index), 1, dtype=torch.bool, device=a.device)
        remaining = places
        for axis in range(axes):
            remaining //= self.out[axis]
            start = position // remaining % self.out[axis] * window.strides[axis] - window.pads[axis]
            taps = torch.arange(window.kernel[axis], device=a.device) * window.dilations[axis]
            where = start[:, None] + taps
            size = self.x[2 + axis]
            inside = (inside[:, :, None] & ((where >= 0) & (where < size))[:, None]).flatten(1)
            at = (at[:, :, None] * size + where.clamp(0, size - 1)[:, None]).flatten(1)
        patches = a.reshape(self.x[0], self.x[1], -1)[image[:, None], :, at]  # [R, taps, C]
        patches = (patches * inside[:, :, None]).transpose(1, 2)
        return patches.reshape(len(index), self.groups, self.k), (image, position, fair)

    def columns(self, values: Tensor, where: Any) -> Tensor:
        return values.reshape(self.groups, self.channels // self.groups, self.k)

    def run(self, backend: Backend, layer: Layer, words: Any) -> Any:
        assert self.window is not None
        return layer.convolution(words, self.window)

    def pick(self, result: Tensor, where: Any) -> Tensor:
        image, position, _ = where
        return result.reshape(self.x[0], self.channels, -1)[image, :, position]

    def fair(self, results: Tensor, where: Any) -> Tensor:
        return results[: where[2]]

    def exact(self, a: Tensor, values: Tensor, bias: Tensor | None) -> Tensor:
        assert self.window is not None
        w, axes = self.window, len(self.out)
        pads = [p for i in reversed(range(axes)) for p in (w.pads[i], w.pads[axes + i])]
        conv: Any = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
        made: Tensor = conv(functional.pad(a, pads), values, bias, w.strides, 0, w.dilations, self.groups)
        return made


def _window_norms(x: Tensor, window: Window) -> Tensor:
    """The sum of squares under each window, over all channels: [B, *output spatial]."""
    axes = len(window.kernel)
    energy = x.square().sum(1, keepdim=True)
    if math.prod(window.kernel) == 1 and not any(window.pads):
        every: tuple[Any, ...] = (slice(None), 0, *(slice(None, None, s) for s in window.strides))
        return energy[every]
    pads = [p for i in reversed(range(axes)) for p in (window.pads[i], window.pads[axes + i])]
    ones = torch.ones(1, 1, *window.kernel, dtype=x.dtype, device=x.device)
    conv = (functional.conv1d, functional.conv2d, functional.conv3d)[axes - 1]
    return conv(functional.pad(energy, pads), ones, None, window.strides, 0, window.dilations)[:, 0]


# ---------------------------------------------------------------------------------------------------


def extent(x: Tensor, what: str, fmt: LNSFormat) -> float:
    """The largest finite magnitude of a tensor.

    Raises:
        BadValueError: NaN, or negative numbers for an unsigned format.
    """
    if not x.numel():
        return 0.0
    low, high = (float(v) for v in torch.aminmax(x))
    if math.isnan(low) or math.isnan(high):
        raise BadValueError(f"{what} contains NaN, which has no LNS word")
    if low < 0 and not fmt.signed:
        raise BadValueError(f"{what} contains negative numbers, which the unsigned format {fmt} cannot hold")
    if math.isinf(low) or math.isinf(high):
        finite = x[torch.isfinite(x)]
        return float(finite.abs().max()) if finite.numel() else 0.0
    return max(high, -low)


def calibrated(x: Tensor, what: str, fmt: LNSFormat, method: Method) -> int:
    """The offset of a tensor (spec 2.6). Infinities, which saturate, do not count."""
    largest = extent(x, what, fmt)
    if method == "absmax":
        return int(formats.offsets_for(largest, fmt))
    values = x.detach().cpu().numpy()
    return int(formats.calibrate(np.where(np.isfinite(values), values, 0), fmt, method=method, name=what))


def calibrated_channels(x: Tensor, what: str, fmt: LNSFormat, method: Method) -> Ints:
    """Offsets of the entries of the first axis: int64 [N]."""
    if method != "absmax" or not x.numel():
        extent(x, what, fmt)
        made: Ints = formats.calibrate(x.detach().cpu().numpy(), fmt, method=method, axis=0, name=what)
        return made
    flat = x.reshape(x.shape[0], -1)
    maxima = flat.abs().amax(1).cpu().numpy()
    if not np.isfinite(maxima).all() or not fmt.signed:
        extent(x, what, fmt)
        maxima = np.array([extent(row, what, fmt) for row in flat])
    return formats.offsets_for(maxima, fmt)


def encode_weights(
    backend: Backend, values: Tensor, what: str, setting: Setting, fmt: LNSFormat | None = None, repeat: int = 1
) -> Weights:
    """An operand that is packed: [N, …], contiguous, float32 or float64; of the format of weights, or another.

    Args:
        repeat: neighbours of the first axis that are one channel, and share its offset.
    """
    fmt = setting.weight if fmt is None else fmt
    offset: int | Ints
    if setting.per_channel:
        channels = values.reshape(values.shape[0] // repeat, -1)
        offset = calibrated_channels(channels, what, fmt, setting.calibration).repeat(repeat)
    else:
        offset = calibrated(values, what, fmt, setting.calibration)
    words, counts = backend.encode(values, fmt, offset, setting.datapath.underflow)
    return Weights(values, words, offset, counts)


@dataclass
class _Sample:
    """Float32 sums of sampled rows.

    Args:
        result: [R, N].
        peaks: the largest magnitude of a partial sum of each channel, float64 [N].
    """

    result: Tensor
    peaks: npt.NDArray[np.float64]


def _sample(rows: Tensor, columns: Tensor, bias: Tensor | None) -> _Sample:
    """Sums of rows [R, G, K] by columns [G, n, K], looked at `_STEPS` times on the way."""
    count, groups, depth = rows.shape
    channels = columns.shape[1]
    steps = min(_STEPS, max(depth, 1))
    length = depth // steps
    main = steps * length
    # stretches of the depth side by side: [steps, G, R, length] by [steps, G, length, n]
    left = rows[..., :main].reshape(count, groups, steps, length).permute(2, 1, 0, 3)
    right = columns[..., :main].reshape(groups, channels, steps, length).permute(2, 0, 3, 1)
    if groups == 1:
        parts = torch.bmm(left[:, 0], right[:, 0])[:, None]
    else:
        parts = left @ right
    if main < depth:
        parts[-1] += rows[..., main:].transpose(0, 1) @ columns[..., main:].transpose(1, 2)
    # terms that cancel in the end stood in the accumulator on the way: as a random walk of their lengths, at least
    walk = parts.square().sum(0)
    if bias is not None:
        parts[0] += bias.to(rows.dtype).reshape(groups, 1, channels)
    sums = parts.cumsum(0)
    result = sums[-1].transpose(0, 1).flatten(1)
    if not sums.numel():
        return _Sample(result, np.zeros(groups * channels))
    peaks = torch.maximum(sums.abs().amax((0, 2)), walk.amax(1).sqrt())
    if not torch.isfinite(peaks).all() and rows.dtype != torch.float64:
        # infinities saturate when they are encoded; large products fit float64
        kept = rows.isfinite()
        most = float(rows[kept].abs().max()) if kept.any() else 0.0
        finite = rows.double().nan_to_num(0.0, most, -most)
        return _Sample(result, _sample(finite, columns.double(), bias).peaks)
    return _Sample(result, peaks.flatten().double().cpu().numpy())


class Product:
    """A product at one place of a model: its setting, what was recorded, and its counters."""

    def __init__(self, record: ProductRecord, setting: Setting, sqnr: str):
        self.record, self.setting, self.sqnr = record, setting, sqnr
        self.recorded: Placed | None = None
        record.datapath = setting.datapath.name
        record.formats = (str(setting.activation), str(setting.weight), str(setting.output))
        record.inputs = CodeHistogram(setting.activation)
        record.weights = CodeHistogram(setting.weight)
        record.outputs = CodeHistogram(setting.output)

    def run(
        self,
        backend: Backend,
        geometry: Geometry,
        a: Tensor,
        weights: Weights,
        bias: Tensor | None,
        *,
        swapped: bool = False,
        trace: Callable[[Traced], None] | None = None,
    ) -> Tensor:
        """The decoded result, float32 (float64 for float64 operands).

        Args:
            a: contiguous first operand.
            weights: the second.
            bias: real [N], or None.
            swapped: whether `a` is the one in the format of weights.
            trace: called with the words.
        """
        start = time.perf_counter()
        s, record = self.setting, self.record
        datapath = s.datapath
        a_format, w_format = (s.weight, s.activation) if swapped else (s.activation, s.weight)
        what = f"the {'second' if swapped else 'first'} operand of {record.name}"
        placed = self.recorded if s.recorded else None
        known = placed is not None
        if placed is None:
            placed = Placed(calibrated(a, what, a_format, s.calibration))
        else:
            extent(a, what, a_format)
            placed = replace(placed)
        words, counts = backend.encode(a, a_format, placed.input_offset, datapath.underflow)

        channels = geometry.channels
        plan = DotPlan(
            replace(datapath, underflow="zero"),
            a_format,
            w_format,
            LNSFormat(_MOST_WIDE, datapath.gamma),
            0,
            weights.offset,
            0,
        )
        shift = plan.product_offset(channels)  # S_n less o_a
        input_shift = placed.input_offset * plan.widen_activation
        rows, where = geometry.rows(a, not known)
        sample = _sample(rows, geometry.columns(weights.values, where), bias)
        peaks = sample.peaks
        if isinstance(geometry, Batched):
            # a sample of the batch speaks for all of it
            peaks = np.full(channels, peaks.max(initial=0.0))
        real_bias = None if bias is None else bias.detach().double().cpu().numpy()
        if not known:
            self._place(placed, plan, peaks, shift, input_shift)

        for attempt in range(_RETRIES):
            plan, integers, top = self._accumulator(plan, placed, shift, input_shift, real_bias, peaks)
            layer = self._layer(backend, weights, plan, integers, geometry)
            wide = geometry.run(backend, layer, words)
            found = _Found.of(backend.histogram(wide, plan.output.bits), plan.output)
            largest = int(found.codes.max(initial=0))
            if known or attempt == _RETRIES - 1 or not self._full(backend, wide, plan.output, largest, top, geometry):
                break
            self._raise(placed, plan)
        record.kernel = layer.kernel

        # limit to the output's format (spec 2.4)
        out = s.output
        wide_offset = plan.output_offset + input_shift
        if placed.output_offset is None:
            placed.output_offset = self._output_offset(found, wide_offset)
        drop = wide_offset - placed.output_offset
        table = _value_table(out, drop, placed.output_offset, datapath.underflow, plan.output.bits, "f4")
        saturated, flushed, output_codes = found.limited(out, drop, datapath.underflow)
        if s.recorded and not known:
            self.recorded = placed
        if a.dtype == torch.float64:
            exact = _value_table(out, drop, placed.output_offset, datapath.underflow, plan.output.bits, "f8")
            result = torch.from_numpy(exact[_numpy(wide)]).to(a.device)
        else:
            result = backend.decode(wide, table, a)

        # what it saw
        if self.sqnr == "full":
            ideal, made = geometry.exact(a, weights.values, bias).double(), result.double()
        else:
            ideal = geometry.fair(sample.result, where).double()
            made = geometry.fair(geometry.pick(result, where), where).double()
        record.measure(float(ideal.square().sum()), float((made - ideal).square().sum()))
        record.calls += 1
        record.macs += geometry.macs
        record.words += result.numel()
        record.saturated += saturated
        record.flushed += flushed
        (record.weights if swapped else record.inputs).add_words(counts)  # type: ignore[union-attr]
        record.outputs.add_codes(output_codes)  # type: ignore[union-attr]
        record.seconds += time.perf_counter() - start
        if trace is not None:
            self._trace(trace, plan, placed, input_shift, words, weights, integers, geometry, wide, drop, swapped)
        return result

    def saw_packed(self, counts: Ints, *, first: bool, constant: bool) -> None:
        """Count the words of an operand that was packed.

        Args:
            first: whether it is the first operand.
            constant: whether it is a parameter's, which stay: those that were last packed count, once.
        """
        record = self.record
        histogram = record.inputs if first else record.weights
        if constant:
            record.constant = True
            histogram = record.weights = CodeHistogram(self.setting.weight)
        assert histogram is not None
        histogram.add_words(counts)

    # placing

    def _place(self, placed: Placed, plan: DotPlan, peaks: Any, shift: Ints, input_shift: int) -> None:
        accumulator, gamma = plan.datapath.accumulate, plan.gamma
        headroom = self.setting.headroom
        if isinstance(accumulator, LinearAccumulator):
            units = np.exp2((shift + input_shift) / gamma)
            largest = float((peaks / units).max(initial=0.0))
            # what wraps is lost entirely
            placed.lsb = lsb_for(largest, accumulator, gamma, headroom + (accumulator.overflow == "wrap"))
            return
        top = float(peaks.max(initial=0.0)) or 1.0
        if not np.ndim(plan.weight_offset):
            peaks = np.array(top)
        # a channel that the sample hardly reached may stand out elsewhere
        peaks = np.maximum(peaks, top / 8)
        offsets = [acc_offset_for(float(p), gamma, accumulator, headroom) for p in np.atleast_1d(peaks)]
        # in whole octaves above the operands, so that the layer need not be packed again for every batch
        octaves = -(-(np.array(offsets, dtype=np.int64) - input_shift) // gamma) * gamma
        placed.acc_offset = octaves if peaks.ndim else octaves[0]

    def _raise(self, placed: Placed, plan: DotPlan) -> None:
        """Sums reached the accumulator's end: an octave more."""
        if placed.acc_offset is None:
            placed.lsb += 1
        else:
            placed.acc_offset = placed.acc_offset + plan.gamma

    def _accumulator(
        self, plan: DotPlan, placed: Placed, shift: Ints, input_shift: int, bias: Any, peaks: Any
    ) -> tuple[DotPlan, Ints | None, Ints]:
        """The plan less o_a, the bias for it, and the wide code of a full accumulator in each channel."""
        gamma, accumulator = plan.gamma, plan.datapath.accumulate
        if isinstance(accumulator, LinearAccumulator):
            integers = (
                None if bias is None else bias_integers(bias, shift + input_shift, gamma, placed.lsb, accumulator)
            )
            limit, lsb = (1 << (accumulator.bits - 1)) - 1, placed.lsb
            low = gamma * (lsb - (accumulator.constant_bits if accumulator.conversion == "bin" else 0)) + int(
                shift.min(initial=0)
            )
            full = gamma * lsb + shift + math.floor(gamma * math.log2(max(limit, 2)))
            plan = replace(plan, lsb=lsb)
        else:
            assert placed.acc_offset is not None
            acc = np.broadcast_to(placed.acc_offset, shift.shape)
            integers = None if bias is None else bias_words(bias, acc + input_shift, gamma, accumulator)
            low = int(acc.min(initial=0))
            full = acc + ((accumulator.max_code + ((1 << accumulator.guard_bits) >> 1)) >> accumulator.guard_bits)
            plan = replace(plan, acc_offset=placed.acc_offset if placed.acc_offset.ndim else int(placed.acc_offset))
        high = int(full.max(initial=0)) + 2 * gamma
        offset = low - 1
        bits = max((high - offset).bit_length() + 1, _LEAST_WIDE)
        if bits > _MOST_WIDE:
            # more octaves than 16 bits hold: the lowest go, which no format could keep beside the highest
            bits = _MOST_WIDE
            room = (1 << (bits - 1)) - 1
            top = float(peaks.max(initial=0.0)) or 1.0
            estimate = int(formats.offsets_for(top, LNSFormat(bits, gamma))) + room - input_shift + 2 * gamma
            offset = min(high, estimate) - room
        return replace(plan, output=LNSFormat(bits, gamma), output_offset=offset), integers, full - offset

    def _layer(self, backend: Backend, weights: Weights, plan: DotPlan, bias: Ints | None, geometry: Geometry) -> Layer:
        key = (
            backend.name,
            plan.datapath,
            plan.activation,
            plan.lsb,
            np.asarray(plan.acc_offset).tobytes(),
            plan.output.bits,
            plan.output_offset,
            None if bias is None else bias.tobytes(),
            geometry.groups,
        )
        if weights.layer is None or weights.key != key:
            weights.layer = backend.layer(plan, weights.words, bias, geometry.groups)
            weights.key = key
        return weights.layer

    def _full(self, backend: Backend, wide: Any, fmt: LNSFormat, largest: int, top: Ints, geometry: Geometry) -> bool:
        """Whether a result stands at the accumulator's end, or at that of the wide words."""
        if largest >= fmt.max_code:
            return True
        if not top.size or largest < int(top.min()):
            return False
        if isinstance(geometry, Batched):
            return True
        return bool((backend.largest(wide, 1, fmt) >= top).any())

    def _output_offset(self, found: _Found, wide_offset: int) -> int:
        """The smallest offset that holds the largest result; it lies on the grid, so this is exact (spec 2.6)."""
        codes = found.codes if self.setting.output.signed else found.codes[~found.negative]
        largest = int(codes.max(initial=0))
        return largest + wide_offset - self.setting.output.max_code if largest else 0

    def _trace(
        self,
        trace: Callable[[Traced], None],
        plan: DotPlan,
        placed: Placed,
        input_shift: int,
        words: Any,
        weights: Weights,
        bias: Ints | None,
        geometry: Geometry,
        wide: Any,
        drop: int,
        swapped: bool,
    ) -> None:
        s = self.setting
        assert placed.output_offset is not None
        acc: Any = plan.acc_offset
        if placed.acc_offset is not None:
            acc = placed.acc_offset + input_shift
            acc = acc if np.ndim(acc) else int(acc)
        final = replace(
            plan,
            datapath=s.datapath,
            output=s.output,
            input_offset=placed.input_offset,
            output_offset=placed.output_offset,
            acc_offset=acc,
        )
        words_of = _limited_words(s.output, drop, s.datapath.underflow, plan.output.bits)
        lookup = np.concatenate(words_of).astype(s.output.dtype)
        a, w, result = (_numpy(v) for v in (words, weights.words, wide))
        window = geometry.window
        if isinstance(geometry, Batched):
            # as anyone would write it: [B, M, K] by [B, N, K]
            final = replace(
                final,
                activation=plan.weight,
                weight=plan.activation,
                input_offset=int(weights.offset),
                weight_offset=placed.input_offset,
            )
            window = None
            a, w = (
                w.reshape(geometry.groups, geometry.m, geometry.k),
                a.reshape(geometry.groups, geometry.k, geometry.n).transpose(0, 2, 1),
            )
        trace(Traced(self.record.name, final, a, w, bias, window, geometry.groups, lookup[result]))


def _numpy(words: Any) -> npt.NDArray[Any]:
    return words.cpu().numpy() if isinstance(words, Tensor) else np.asarray(words)


@dataclass(frozen=True, eq=False)
class _Found:
    """The wide words of a result, each once: int64 codes, signs, and how often they came."""

    codes: Ints
    negative: npt.NDArray[np.bool_]
    counts: Ints

    @classmethod
    def of(cls, histogram: Ints, fmt: LNSFormat) -> _Found:
        words = np.flatnonzero(histogram)
        return cls(words & fmt.max_code, words > fmt.max_code, histogram[words])

    def limited(self, fmt: LNSFormat, drop: int, underflow: str) -> tuple[int, int, Ints]:
        """How many saturate and flush in a format, and how often its codes come [C + 1]."""
        least = 0 if underflow == "zero" else 1
        zero = self.codes == 0
        if not fmt.signed:
            zero = zero | self.negative
        over, under = ~zero & (self.codes + drop > fmt.max_code), ~zero & (self.codes + drop < 1)
        limited = np.where(zero, least, np.clip(self.codes + drop, least, fmt.max_code))
        # float64 counts exactly
        codes = np.bincount(limited, weights=self.counts, minlength=fmt.max_code + 1).astype(np.int64)
        return int(self.counts[over].sum()), int(self.counts[under].sum()), codes


def _limited_words(fmt: LNSFormat, drop: int, underflow: str, bits: int) -> tuple[Ints, Ints]:
    """The words of `fmt` for all codes of wide words, positive and negative: code plus `drop`, limited (spec 2.4)."""
    least = 0 if underflow == "zero" else 1
    limited = np.clip(np.arange(1 << (bits - 1), dtype=np.int64) + drop, least, fmt.max_code)
    limited[0] = least
    if not fmt.signed:
        return limited, np.full_like(limited, least)
    negative = limited | np.where(limited > 0, fmt.sign_bit, 0)
    negative[0] = least
    return limited, negative


@lru_cache(maxsize=128)
def _value_table(fmt: LNSFormat, drop: int, offset: int, underflow: str, bits: int, dtype: str) -> npt.NDArray[Any]:
    """The value of every wide word once it is limited to `fmt` (spec 2.5)."""
    positive, negative = _limited_words(fmt, drop, underflow, bits)
    values = formats.decode_table(fmt, offset, np.dtype(dtype))
    signs = np.where(negative & fmt.sign_bit, -1, 1).astype(dtype)
    return np.concatenate([values[positive], signs * values[negative & fmt.max_code]])
