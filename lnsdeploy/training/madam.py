"""Madam: multiplicative weight updates, on floats and on integer log codes (docs/madam.md).

Sources: Bernstein et al. 2020, "Learning compositional functions via multiplicative weight updates"
(the update, and weights held as B-bit integers), and Zhao et al. 2022, "LNS-Madam: Low-precision
training in logarithmic number system using multiplicative weight update". Written from the papers.

A weight moves by a factor, so on a logarithmic scale the step is additive, and a weight stored as an
integer log code moves by an integer number of codes:

    v  ← β·v + (1 − β)·g²          ĝ = clamp(g / √(v / (1 − β^t)), ±g_bound)
    w  ← w·2^(−(lr/ln 2)·ĝ·sign w)            (:class:`Madam`)
    |k| ← |k| − round((lr·γ/ln 2)·ĝ·sign k)    (:class:`IntegerMadam`)

:class:`LNSMadam` does the latter on codes whose upper bits are the words that a net's layers compute with.

Large tensors are cut into blocks that stay in the cache through all operations of the update, small ones
are packed together, so that the number of Python calls depends on the number of blocks and not on the
number of parameters; on an accelerator a block is as large as memory comfortably allows.
"""

from __future__ import annotations

import bisect
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from numbers import Integral, Real
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from lnsdeploy import formats
from lnsdeploy.emulator import native
from lnsdeploy.errors import BadTypeError, BadValueError, UnknownNameError, UnsupportedError
from lnsdeploy.formats import LNSFormat, LNSTensor

Rule = Literal["auto", "multiplicative", "additive"]
CodeRounding = Literal["stochastic", "nearest"]
Init = Literal["encode", "random"]

RULES = ("auto", "multiplicative", "additive")
CODE_ROUNDINGS = ("stochastic", "nearest")
INITS = ("encode", "random")

# Elements of a block on the CPU, per thread: w, g, v and the temporaries stay in a cache, and the calls
# into torch are few enough not to be felt.
_CPU_BLOCK = 1 << 18
_DEVICE_BLOCK = 1 << 26
# Lengths are rounded up to this, so that no element of exp2 falls in the remainder of a vector loop,
# where torch computes it with another function: results do not depend on how tensors are packed.
_LANES = 64
# Entries of a decoding table; beyond, codes are decoded one by one.
_TABLE_LIMIT = 1 << 20
_CLIP_WARNING = 0.1
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LN2 = math.log(2.0)
# Stream of the random bits that draw the first codes; updates use streams 1, 2, 3, …
_INIT_STREAM = 1 << 63


_has_native = native.is_available

# One call each into C++, whatever the number of tensors.
_flatten: Callable[[list[Tensor]], Tensor] = torch._utils._flatten_dense_tensors
_unflatten: Callable[[Tensor, list[Tensor]], tuple[Tensor, ...]] = torch._utils._unflatten_dense_tensors


class MadamWarning(UserWarning):
    """Training goes on, but a weight bound or an initialisation probably limits it."""


@dataclass
class _Entry:
    """A parameter that takes part in this step."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    size: int
    number: int
    index: int


@dataclass
class _Bucket:
    """Entries that share every scalar of the update."""

    group: dict[str, Any]
    multiplicative: bool
    step: int
    entries: list[_Entry]


@dataclass(frozen=True)
class _Scalars:
    """Numbers of one bucket's update, bias correction folded in.

    ĝ = clamp(correction·g/√max(v, least), ±bound), negated if the objective is maximised.
    """

    lr: float
    beta: float
    correction: float
    least: float
    bound: float


@dataclass
class _Block:
    """Flat tensors for one pass: a slice of one parameter in place, or several parameters packed.

    With integer codes, `weight` is only written (and empty in a packed block); without, `codes` is empty.
    """

    entries: list[_Entry]
    start: int
    size: int
    weight: Tensor
    grad: Tensor
    moment: Tensor
    codes: Tensor
    packed: bool

    def per_element(self, values: Tensor) -> Tensor:
        """One number per tensor, spread over the elements of a packed block."""
        sizes = torch.tensor([e.size for e in self.entries])
        return values.repeat_interleave(sizes, output_size=self.size).to(self.moment.device)

    def scatter(self, field: Literal["param", "exp_avg_sq", "codes"], flat: Tensor) -> None:
        """Write the packed result back to the tensors it was gathered from."""
        targets = [e.param if field == "param" else e.state[field] for e in self.entries]
        torch._foreach_copy_(targets, _unflatten(flat, targets))


class _Scratch:
    """Temporaries of the size of a block, reused from block to block."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype, self.device = dtype, device
        self._capacity = self._size = 0
        self._buffers: list[Tensor] = []
        self._views: tuple[Tensor, Tensor, Tensor, Tensor, Tensor]

    def views(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, x with its padding, sign, y, and zeros: [size] each, the second rounded up."""
        if size == self._size:
            return self._views
        padded = -(-size // _LANES) * _LANES
        if padded > self._capacity:
            self._capacity = padded
            self._buffers = [torch.zeros(padded, dtype=self.dtype, device=self.device) for _ in range(4)]
        x, sign, y, zeros = self._buffers
        self._size = size
        self._views = (x[:size], x[:padded], sign[:size], y[:size], zeros[:size])
        return self._views


class _LogOptimizer(Optimizer):
    """What both optimizers share: options, rules, checks, blocks, and loading of states."""

    _clip_warned: bool

    def __init__(self, params: Any, defaults: dict[str, Any]):
        self._clip_warned = False
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_clip_warned", False)

    # -- options ------------------------------------------------------------------------------------

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own options, to the optimizer.

        Raises:
            BadValueError, UnknownNameError: an option is out of range.
            BadTypeError: a parameter is not float16, bfloat16, float32 or float64.
        """
        number = len(self.param_groups)
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        try:
            self._check_group(group, number)
            for index, param in enumerate(group["params"]):
                if param.dtype not in _DTYPES:
                    raise BadTypeError(
                        f"{_where(group, number, index)} is {param.dtype}; Madam updates float16, bfloat16, "
                        "float32 and float64 parameters"
                    )
        except Exception:
            self.param_groups.pop()
            raise

    def _check_group(self, group: dict[str, Any], number: int) -> None:
        where = f"parameter group {number}"
        _learning_rate(group, where)
        for name in ("g_bound", "p_scale", "additive_scale"):
            value = _number(group[name], name, where)
            if not 0 < value < math.inf:
                raise BadValueError(f"{where}: {name} must be positive and finite, not {value}")
        for name, end in (("beta", 1.0), ("eps", math.inf)):
            value = _number(group[name], name, where)
            if not 0 <= value < end:
                raise BadValueError(f"{where}: {name} must be at least 0 and below {end}, not {value}")
        if group["p_max"] is not None and not 0 < _number(group["p_max"], "p_max", where) < math.inf:
            raise BadValueError(f"{where}: p_max must be a positive number or None, not {group['p_max']}")
        if group["rule"] not in RULES:
            raise UnknownNameError("rule", group["rule"], RULES)

    def _is_multiplicative(self, group: dict[str, Any], param: Tensor) -> bool:
        rule = group["rule"]
        return rule == "multiplicative" or (rule == "auto" and param.ndim > 1)

    # -- a step -------------------------------------------------------------------------------------

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update all parameters that have a gradient.

        Args:
            closure: evaluates the model again and returns the loss.
        Returns: the loss of the closure, if there is one.

        Raises:
            BadValueError: a gradient contains NaN or infinity, or a learning rate is negative or not
                finite; nothing has been changed then.
            UnsupportedError: a gradient is sparse; nothing has been changed then.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        collected = self._collect()
        self._check_finite([e for _, _, entries in collected for e in entries])
        clipped = counted = 0
        for bucket in self._buckets(collected):
            # Steps 1, 2, 4, 8, … only: costs nothing on the whole, and is late by a factor of two at most.
            count = bucket.multiplicative and not self._clip_warned and bucket.step & (bucket.step - 1) == 0
            found = self._update(bucket, count)
            if count:
                clipped += found
                counted += sum(e.size for e in bucket.entries)
        if counted and clipped > _CLIP_WARNING * counted:
            self._clip_warned = True
            warnings.warn(
                f"{100 * clipped / counted:.0f} % of the weights sit at their bound (p_scale times the RMS "
                "of the initial weights): initialise with a larger scale (He), or raise p_scale or p_max",
                MadamWarning,
                stacklevel=4,
            )
        return loss

    def _collect(self) -> list[tuple[dict[str, Any], bool, list[_Entry]]]:
        """Entries by group and rule; refuses what cannot be updated, before anything changes."""
        collected = []
        for number, group in enumerate(self.param_groups):
            _learning_rate(group, f"parameter group {number}")
            sides: tuple[list[_Entry], list[_Entry]] = ([], [])
            for index, param in enumerate(group["params"]):
                grad = param.grad
                if grad is None or not param.numel():
                    continue
                if grad.layout != torch.strided:
                    raise UnsupportedError(
                        f"the gradient of {_where(group, number, index)} is sparse ({grad.layout}); Madam "
                        "needs dense gradients (sparse=False in the embedding, or grad.to_dense())"
                    )
                entry = _Entry(param, grad, self.state[param], param.numel(), number, index)
                sides[self._is_multiplicative(group, param)].append(entry)
            collected += [(group, bool(rule), side) for rule, side in enumerate(sides) if side]
        return collected

    def _check_finite(self, entries: list[_Entry]) -> None:
        kinds: dict[tuple[torch.device, torch.dtype], list[_Entry]] = {}
        for entry in entries:
            kinds.setdefault((entry.grad.device, entry.grad.dtype), []).append(entry)
        for (_, dtype), same in kinds.items():
            # A finite norm proves that all elements and all squares are finite, in one pass.
            norms = torch._foreach_norm([e.grad for e in same], 2, dtype=_work_dtype(dtype))
            finite = torch.isfinite(torch.stack(norms))
            if bool(finite.all()):
                continue
            entry = same[int((~finite).nonzero()[0])]
            where = _where(self.param_groups[entry.number], entry.number, entry.index)
            bad = int((~torch.isfinite(entry.grad)).sum())
            if bad:
                raise BadValueError(
                    f"the gradient of {where} contains NaN or infinity in {bad} of {entry.size} "
                    "elements; nothing was updated (lower the learning rate, or skip this step)"
                )
            raise BadValueError(
                f"the gradient of {where} is too large: its squares overflow {_work_dtype(dtype)}; "
                "nothing was updated (scale the loss down)"
            )

    def _buckets(self, collected: list[tuple[dict[str, Any], bool, list[_Entry]]]) -> list[_Bucket]:
        """Counts the step of every entry, and groups those that share device, dtype and step number."""
        for group, multiplicative, entries in collected:
            for entry in entries:
                self._prepare(group, multiplicative, entry)
        found: dict[tuple[Any, ...], _Bucket] = {}
        for number, (group, multiplicative, entries) in enumerate(collected):
            for entry in entries:
                step = entry.state["step"] = entry.state["step"] + 1
                key = (number, entry.param.device, entry.param.dtype, step, *self._kind(entry))
                if key not in found:
                    found[key] = _Bucket(group, multiplicative, step, [])
                found[key].entries.append(entry)
        return list(found.values())

    def _kind(self, entry: _Entry) -> tuple[Any, ...]:
        """Anything more that the entries of a bucket have in common."""
        return ()

    def _prepare(self, group: dict[str, Any], multiplicative: bool, entry: _Entry) -> None:
        """Make the state of a parameter that is updated for the first time."""
        state = entry.state
        if "exp_avg_sq" not in state:
            state.setdefault("step", 0)
            state["exp_avg_sq"] = torch.zeros_like(
                entry.param, dtype=_work_dtype(entry.param.dtype), memory_format=torch.contiguous_format
            )

    def _scalars(self, bucket: _Bucket) -> _Scalars:
        group = bucket.group
        beta = float(group["beta"])
        unbias = 1.0 - beta**bucket.step
        tiny = torch.finfo(bucket.entries[0].state["exp_avg_sq"].dtype).tiny
        return _Scalars(
            lr=float(group["lr"]),
            beta=beta,
            correction=(-1.0 if group["maximize"] else 1.0) * math.sqrt(unbias),
            # below the smallest normal number the reciprocal root would overflow or be slow
            least=max(float(group["eps"]) ** 2 * unbias, tiny),
            bound=float(group["g_bound"]),
        )

    def _update(self, bucket: _Bucket, count: bool) -> int:
        """Apply the rule to a bucket; returns how many weights sit at the clip afterwards, if asked."""
        scalars = self._scalars(bucket)
        if bucket.group["foreach"] is False:
            rule = self._multiply_single if bucket.multiplicative else self._add_single
            return sum(rule(bucket, entry, scalars, count) for entry in bucket.entries)
        if bucket.multiplicative:
            return self._multiply(bucket, scalars, count)
        self._add(bucket, scalars)
        return 0

    @abstractmethod
    def _multiply(self, bucket: _Bucket, scalars: _Scalars, count: bool) -> int:
        """The multiplicative rule, block by block."""

    @abstractmethod
    def _multiply_single(self, bucket: _Bucket, entry: _Entry, scalars: _Scalars, count: bool) -> int:
        """The same for one tensor, written plainly: what `_multiply` is tested against."""

    def _add(self, bucket: _Bucket, scalars: _Scalars) -> None:
        """w ← w − lr·additive_scale·ĝ."""
        size = scalars.bound / abs(scalars.correction)
        rate = -scalars.lr * float(bucket.group["additive_scale"]) * scalars.correction
        scratch = _scratch(bucket)
        for block in _blocks(bucket.entries, coded=False):
            x, _, _, _, _ = scratch.views(block.size)
            grad, moment = _moment(block, scalars)
            torch.clamp(moment, min=scalars.least, out=x)
            x.rsqrt_().mul_(grad).clamp_(-size, size)
            weight = block.weight.to(x.dtype).add_(x, alpha=rate)
            if block.packed:
                block.scatter("param", weight)
                block.scatter("exp_avg_sq", moment)
            elif weight.dtype != block.weight.dtype:
                block.weight.copy_(weight)

    def _add_single(self, bucket: _Bucket, entry: _Entry, scalars: _Scalars, count: bool) -> int:
        unbounded = _normalised(entry, scalars)
        size = scalars.bound / abs(scalars.correction)
        clamped = torch.clamp(unbounded, -size, size)
        rate = -scalars.lr * float(bucket.group["additive_scale"]) * scalars.correction
        weight = torch.add(_flat(entry.param, clamped.dtype), clamped, alpha=rate)
        entry.param.copy_(weight.view(entry.param.shape))
        return 0

    # -- saving and loading -------------------------------------------------------------------------

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` gave; the continuation is bit-identical.

        Raises:
            BadValueError: the state belongs to other parameters or another optimizer; the optimizer is
                unchanged then.
        """
        saved = self._matching(state_dict)
        super().load_state_dict(state_dict)
        # torch casts every tensor of a state to its parameter's dtype, which would round the second moment
        # of half-precision parameters and turn integer codes into floats: put the originals back.
        for param, values in saved:
            self.state[param] = {
                key: value.to(param.device, copy=True, memory_format=torch.contiguous_format)
                if isinstance(value, Tensor)
                else value
                for key, value in values.items()
            }

    def _matching(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        """The saved states with the parameters they belong to, checked."""
        try:
            saved_groups, saved_states = state_dict["param_groups"], state_dict["state"]
            counts = [len(g["params"]) for g in saved_groups]
        except (KeyError, TypeError) as error:
            raise BadValueError(f"not the state of an optimizer: {error!r} is missing") from error
        if counts != [len(g["params"]) for g in self.param_groups]:
            raise BadValueError(
                f"the saved state has parameter groups of {counts} tensors, this optimizer of "
                f"{[len(g['params']) for g in self.param_groups]}"
            )
        for number, group in enumerate(saved_groups):
            missing = sorted(set(self.param_groups[number]) & set(self.defaults) - set(group))
            if missing:
                kind = type(self).__name__
                raise BadValueError(f"not the state of {kind}: its groups lack {', '.join(missing)}")
            self._check_group(group, number)
        found = []
        keys = chain.from_iterable(g["params"] for g in saved_groups)
        for (param, where), key in zip(self._named(), keys, strict=True):
            if key not in saved_states:
                continue
            values = saved_states[key]
            self._check_state(param, values, f"the saved state of {where}")
            found.append((param, dict(values)))
        return found

    def _check_state(self, param: Tensor, values: dict[str, Any], where: str) -> None:
        if not values:
            return
        moment = values.get("exp_avg_sq")
        step = values.get("step")
        if moment is None and "codes" in values and step == 0:
            return
        if not isinstance(moment, Tensor) or not isinstance(step, int) or step < 0:
            raise BadValueError(f"{where} is not one of {type(self).__name__}: step or exp_avg_sq is missing")
        if moment.shape != param.shape or moment.dtype != _work_dtype(param.dtype):
            raise BadValueError(
                f"{where} has a second moment of {moment.dtype} and shape {tuple(moment.shape)}, the "
                f"parameter needs {_work_dtype(param.dtype)} and {tuple(param.shape)}"
            )
        if moment.numel() and not 0 <= float(moment.min()) <= float(moment.max()) < math.inf:
            raise BadValueError(f"{where} has a second moment that is negative, infinite or NaN")

    def _named(self) -> Iterator[tuple[Tensor, str]]:
        """Parameters in order, each with words that say which it is."""
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                yield param, _where(group, number, index)


class Madam(_LogOptimizer):
    """Madam with float weights (Bernstein et al. 2020, algorithm 1).

    Matrices move by factors, w ← w·exp(−lr·ĝ·sign w), with magnitudes kept between
    clip·2^−range_octaves and clip = p_scale·RMS(w₀). One-dimensional parameters move by
    w ← w − lr·additive_scale·ĝ. See docs/madam.md for both, and for weights that are zero.

    All options may be given per parameter group.

    Args:
        params: tensors of float16, bfloat16, float32 or float64, or groups of them, or (name, tensor) pairs.
        lr: learning rate, a number or a tensor of one element: the largest change of ln |w| at ĝ = 1.
        beta: β, the decay of the second moment, in [0, 1).
        g_bound: bound of the normalised gradient ĝ.
        p_scale: bound of |w|, in units of the RMS of the tensor's initial values.
        p_max: bound of |w| itself, instead of `p_scale`.
        eps: least denominator of ĝ; gradients whose RMS is below it count as zero.
        rule: ``"multiplicative"``, ``"additive"``, or ``"auto"``: additive up to one dimension.
        additive_scale: the magnitude whose multiplicative step the additive rule copies.
        range_octaves: log2 of the ratio of the largest to the smallest magnitude.
        sign_flip: whether a weight that falls below the smallest magnitude changes its sign; otherwise it
            stays at the smallest magnitude.
        maximize: maximise the objective instead of minimising it.
        foreach: False selects the plain implementation, tensor by tensor.

    Raises:
        BadValueError, UnknownNameError, BadTypeError: an option or a parameter is not allowed.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.03,
        beta: float = 0.999,
        g_bound: float = 10.0,
        p_scale: float = 3.0,
        eps: float = 1e-16,
        rule: Rule = "auto",
        sign_flip: bool = False,
        *,
        p_max: float | None = None,
        additive_scale: float = 0.1,
        range_octaves: float = 16.0,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "beta": beta,
            "g_bound": g_bound,
            "p_scale": p_scale,
            "p_max": p_max,
            "eps": eps,
            "rule": rule,
            "additive_scale": additive_scale,
            "range_octaves": range_octaves,
            "sign_flip": sign_flip,
            "maximize": maximize,
            "foreach": foreach,
        }
        super().__init__(params, defaults)

    def _check_group(self, group: dict[str, Any], number: int) -> None:
        super()._check_group(group, number)
        octaves = _number(group["range_octaves"], "range_octaves", f"parameter group {number}")
        if not 0 < octaves <= 100:
            raise BadValueError(
                f"parameter group {number}: range_octaves must be above 0 and at most 100, not {octaves}"
            )

    def _prepare(self, group: dict[str, Any], multiplicative: bool, entry: _Entry) -> None:
        super()._prepare(group, multiplicative, entry)
        if multiplicative and "clip_max" not in entry.state:
            where = _where(group, entry.number, entry.index)
            entry.state["clip_max"] = _round_down(_largest_magnitude(entry.param, group, where), entry.param.dtype)

    def _check_state(self, param: Tensor, values: dict[str, Any], where: str) -> None:
        super()._check_state(param, values, where)
        clip = values.get("clip_max", 1.0)
        if "codes" in values or not isinstance(clip, float) or not 0 < clip < math.inf:
            raise BadValueError(f"{where} is not one of Madam: clip_max must be a positive number")

    def _multiply(self, bucket: _Bucket, scalars: _Scalars, count: bool) -> int:
        flip = bool(bucket.group["sign_flip"])
        rate = scalars.lr / _LN2
        scratch = _scratch(bucket)
        clipped = 0
        for block in _blocks(bucket.entries, coded=False):
            high, low = self._bounds(bucket, block)
            x, padded, sign, y, zeros = scratch.views(block.size)
            grad, moment = _moment(block, scalars)
            weight = block.weight.to(x.dtype)
            if _is_native(block, weight, grad):
                clipped += _move_natively(block, scalars, (weight, grad, x, padded, y), (low, high), flip)
                continue

            # x: the change of log2 |w|, then 2 to its power
            torch.clamp(moment, min=scalars.least, out=x)
            x.rsqrt_().mul_(grad)
            torch.sign(weight, out=sign)
            torch.addcmul(zeros, x, sign, value=-rate * scalars.correction, out=x)
            x.clamp_(-rate * scalars.bound, rate * scalars.bound)
            padded.exp2_()

            # y: the new magnitude
            torch.mul(weight, sign, out=y)
            y.mul_(x)
            if _any_below(y, low if flip else torch.finfo(y.dtype).tiny):
                sign = _signs(sign, y, low, grad, scalars, flip)
            _clamp_(y, low, high)
            if count:
                clipped += int((y >= high).sum())
            if block.packed:
                block.scatter("param", y.mul_(sign))
                block.scatter("exp_avg_sq", moment)
            elif weight.dtype == block.weight.dtype:
                torch.mul(y, sign, out=block.weight)
            else:
                block.weight.copy_(y.mul_(sign))
        return clipped

    def _bounds(self, bucket: _Bucket, block: _Block) -> tuple[float | Tensor, float | Tensor]:
        """The largest and smallest magnitude; tensors if the block packs several tensors."""
        highs = [e.state["clip_max"] for e in block.entries]
        lows = _floor(highs, bucket.group, block.entries[0].param.dtype)
        if not block.packed:
            return highs[0], lows[0]
        bounds = [torch.tensor(side, dtype=block.moment.dtype) for side in (highs, lows)]
        return block.per_element(bounds[0]), block.per_element(bounds[1])

    def _multiply_single(self, bucket: _Bucket, entry: _Entry, scalars: _Scalars, count: bool) -> int:
        unbounded = _normalised(entry, scalars)
        weight = _flat(entry.param, unbounded.dtype)
        rate = scalars.lr / _LN2
        sign = torch.sign(weight)
        octaves = torch.clamp(
            unbounded * sign * (-rate * scalars.correction), -rate * scalars.bound, rate * scalars.bound
        )
        padded = torch.nn.functional.pad(octaves, (0, -octaves.numel() % _LANES))
        magnitude = torch.abs(weight) * torch.exp2(padded)[: octaves.numel()]
        high = float(entry.state["clip_max"])
        (low,) = _floor([high], bucket.group, entry.param.dtype)
        grad = _flat(entry.grad, unbounded.dtype)
        sign = _signs(sign, magnitude, low, grad, scalars, bool(bucket.group["sign_flip"]))
        magnitude = torch.clamp(magnitude, low, high)
        entry.param.copy_((magnitude * sign).view(entry.param.shape))
        return int((magnitude >= high).sum()) if count else 0


class IntegerMadam(_LogOptimizer):
    """Madam on integer log codes: the B-bit version, without a float copy of the weights.

    A weight is sign·2^((k + offset)/γ) with an integer code k from 1 to C = 2^(bits − 1) − 1; the state
    holds sign·k as int16 (int32 above 16 bits), and the parameter's data is only ever the decoding of
    its codes, correctly rounded to its dtype. The offset is the smallest at which code C reaches
    p_scale·RMS(w₀). A step moves k by (lr·γ/ln 2)·ĝ·sign w, rounded to an integer.

    The codes are made when the parameters are handed over, so the parameters change at once. If they are
    changed from outside afterwards, say by ``model.load_state_dict``, call :meth:`encode_parameters`;
    otherwise the next step overwrites the change. (``optimizer.load_state_dict`` needs no such call: it
    brings the codes, and decodes them.)

    One-dimensional parameters are floats and move by the additive rule, as in :class:`Madam`.

    Args:
        params, lr, beta, g_bound, p_scale, p_max, eps, rule, additive_scale, maximize, foreach: as in
            :class:`Madam`.
        bits: B, 2 to 32, sign included.
        gamma: γ, codes per octave; the magnitudes span (C − 1)/γ octaves.
        rounding: ``"stochastic"`` (8 random bits, unbiased to 1/256 of a code) or ``"nearest"``, which loses
            steps of less than half a code.
        seed: key of the random bits. They are a function of seed, step number and the weight's position
            among all coded weights (datapath.md, 2.3), so nothing needs to be saved to continue.
        init: ``"encode"`` takes the nearest codes of the initial weights; ``"random"`` keeps only their
            signs and draws the codes uniformly (Bernstein et al. 2020).
        sign_flip: whether a code that falls below 1 changes its sign; otherwise it stays at 1.
        per_channel: one offset for each index of a parameter's first axis, from the RMS of that part.
        compute_bits: where it is given, the parameter's data is not the decoding of the whole code but of its upper
            `compute_bits` bits, rounded to nearest (the sign is one of them), so of a word of this width whose γ is
            smaller by 2^(bits − compute_bits). Offsets are multiples of that power.

    Raises:
        BadValueError, UnknownNameError, BadTypeError: an option or a parameter is not allowed.
    """

    def __init__(
        self,
        params: Any,
        lr: float | Tensor = 0.03,
        bits: int = 16,
        gamma: int = 2048,
        rounding: CodeRounding = "stochastic",
        seed: int = 0,
        init: Init = "encode",
        *,
        beta: float = 0.999,
        g_bound: float = 10.0,
        p_scale: float = 3.0,
        eps: float = 1e-16,
        rule: Rule = "auto",
        sign_flip: bool = False,
        p_max: float | None = None,
        additive_scale: float = 0.1,
        per_channel: bool = False,
        compute_bits: int | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
    ):
        defaults = {
            "lr": lr,
            "bits": bits,
            "gamma": gamma,
            "rounding": rounding,
            "seed": seed,
            "init": init,
            "beta": beta,
            "g_bound": g_bound,
            "p_scale": p_scale,
            "p_max": p_max,
            "eps": eps,
            "rule": rule,
            "additive_scale": additive_scale,
            "sign_flip": sign_flip,
            "per_channel": per_channel,
            "compute_bits": compute_bits,
            "maximize": maximize,
            "foreach": foreach,
        }
        self._tables: dict[tuple[Any, ...], tuple[int, Tensor]] = {}
        super().__init__(params, defaults)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._tables = {}

    def _check_group(self, group: dict[str, Any], number: int) -> None:
        super()._check_group(group, number)
        LNSFormat(group["bits"], group["gamma"])
        if group["rounding"] not in CODE_ROUNDINGS:
            raise UnknownNameError("rounding", group["rounding"], CODE_ROUNDINGS)
        if group["init"] not in INITS:
            raise UnknownNameError("initialisation", group["init"], INITS)
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], Integral):
            raise BadTypeError(f"parameter group {number}: seed must be an integer, not {group['seed']!r}")
        if not isinstance(group["per_channel"], bool):
            raise BadTypeError(f"parameter group {number}: per_channel must be a bool, not {group['per_channel']!r}")
        if group["compute_bits"] is not None:
            _compute_format(group["bits"], group["gamma"], group["compute_bits"], f"parameter group {number}")

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own options, to the optimizer; they are encoded at once.

        Raises:
            BadValueError, UnknownNameError: an option is out of range, or a weight is NaN or infinite.
            BadTypeError: a parameter is not float16, bfloat16, float32 or float64.
        """
        position = sum(p.numel() for g in self.param_groups for p in g["params"] if self._has_codes(p))
        super().add_param_group(param_group)
        number, group = len(self.param_groups) - 1, self.param_groups[-1]
        coded = [
            (p, _where(group, number, i))
            for i, p in enumerate(group["params"])
            if _LogOptimizer._is_multiplicative(self, group, p)
        ]
        states = []
        try:
            for param, where in coded:
                states.append(self._first_codes(param, group, position, where))
                position += param.numel()
        except Exception:
            self.param_groups.pop()
            raise
        for (param, _), state in zip(coded, states, strict=True):
            self.state[param].update(state)
        self._decode([param for param, _ in coded])

    def _is_multiplicative(self, group: dict[str, Any], param: Tensor) -> bool:
        return self._has_codes(param)

    def _has_codes(self, param: Tensor) -> bool:
        return "codes" in self.state.get(param, ())

    def _kind(self, entry: _Entry) -> tuple[Any, ...]:
        return (entry.state.get("bits"), entry.state.get("gamma"), entry.state.get("compute_bits"))

    def _first_codes(self, param: Tensor, group: dict[str, Any], position: int, where: str) -> dict[str, Any]:
        fmt = LNSFormat(group["bits"], group["gamma"])
        compute_bits = group["compute_bits"] or fmt.bits
        offset = _first_offset(param, group, fmt, compute_bits, where)
        if group["init"] == "random":
            count = param.numel()
            draws = formats.random_bytes(int(group["seed"]), _INIT_STREAM, 4 * count, 4 * position)
            uniform = draws.view("<u4").astype(np.int64)
            # multiply and shift: every code has the same number of 32-bit words, give or take one
            magnitudes = torch.from_numpy((uniform * fmt.max_code >> 32) + 1).view(param.shape)
            codes = (magnitudes * torch.sign(param.detach().cpu()).to(torch.int64)).to(_code_dtype(fmt))
        else:
            codes = _encode(param, fmt, offset, where)
        return {
            "step": 0,
            "codes": codes.to(param.device),
            "offset": offset,
            "bits": fmt.bits,
            "gamma": fmt.gamma,
            "compute_bits": compute_bits,
            "position": position,
        }

    # -- codes in and out ---------------------------------------------------------------------------

    def lns_tensors(self) -> list[LNSTensor | None]:
        """The weights as LNS words, one entry per parameter in the order of the groups.

        Returns: words of the parameter's shape, with format and offset; None for parameters that the
            additive rule updates, which are floats.
        """
        found: list[LNSTensor | None] = []
        for param, _ in self._named():
            if not self._has_codes(param):
                found.append(None)
                continue
            state = self.state[param]
            fmt = _format(state)
            found.append(LNSTensor(_words(state["codes"], fmt), fmt, *_offset_and_axis(state["offset"])))
        return found

    def compute_tensors(self) -> list[LNSTensor | None]:
        """The words that the parameters' data are the values of: the upper bits of :meth:`lns_tensors`.

        Returns: as :meth:`lns_tensors`; the same where `compute_bits` is not given.
        """
        named = zip(self._named(), self.lns_tensors(), strict=True)
        return [
            None if tensor is None else upper_words(tensor, self.state[param]["compute_bits"], where)
            for (param, where), tensor in named
        ]

    @torch.no_grad()
    def encode_parameters(self, *, recalibrate: bool = False) -> None:
        """Take the parameters as they are now: encode them to the nearest codes, and decode those.

        For use after the parameters were changed from outside. Parameters that already are decoded codes
        of the same offset get exactly these codes, provided that their dtype tells neighbouring codes apart.
        Second moments and step numbers stay.

        Args:
            recalibrate: choose the offsets anew, from the RMS of the present values.

        Raises:
            BadValueError: a weight is NaN or infinite; nothing has been changed then.
        """
        fresh: list[tuple[Tensor, int | Tensor, Tensor]] = []
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                if not self._has_codes(param):
                    continue
                state, where = self.state[param], _where(group, number, index)
                fmt = _format(state)
                offset = state["offset"]
                if recalibrate:
                    offset = _first_offset(param, group, fmt, state["compute_bits"], where)
                fresh.append((param, offset, _encode(param, fmt, offset, where).to(param.device)))
        for param, offset, codes in fresh:
            self.state[param].update(codes=codes, offset=offset)
        self._decode([param for param, _, _ in fresh])

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from a state that :meth:`state_dict` gave, and decode its codes into the parameters.

        Raises:
            BadValueError: the state belongs to other parameters or another optimizer; the optimizer is
                unchanged then.
        """
        super().load_state_dict(state_dict)
        with torch.no_grad():
            self._decode([param for param, _ in self._named() if self._has_codes(param)])

    def _matching(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        found = super()._matching(state_dict)
        present = {param for param, _ in found}
        for param, where in self._named():
            if self._has_codes(param) and param not in present:
                raise BadValueError(f"the saved state has no codes for {where}")
        return found

    def _check_state(self, param: Tensor, values: dict[str, Any], where: str) -> None:
        super()._check_state(param, values, where)
        if ("codes" in values) != self._has_codes(param):
            held = "codes" if "codes" in values else "no codes"
            raise BadValueError(f"{where} has {held}, this optimizer updates that parameter by the other rule")
        if "codes" not in values:
            return
        numbers = [values.get(key) for key in ("bits", "gamma", "compute_bits", "position")]
        codes, offset = values["codes"], values.get("offset")
        if (
            not isinstance(codes, Tensor)
            or not isinstance(offset, (int, Tensor))
            or not all(isinstance(n, int) for n in numbers)
        ):
            raise BadValueError(f"{where} lacks codes, bits, gamma, compute_bits, offset or position")
        fmt = LNSFormat(values["bits"], values["gamma"])
        if codes.dtype != _code_dtype(fmt) or codes.shape != param.shape:
            raise BadValueError(
                f"{where} has codes of {codes.dtype} and shape {tuple(codes.shape)}; {fmt} and the parameter "
                f"need {_code_dtype(fmt)} and {tuple(param.shape)}"
            )
        if codes.numel() and not -fmt.max_code <= int(codes.min()) <= int(codes.max()) <= fmt.max_code:
            raise BadValueError(f"{where} has codes beyond ±{fmt.max_code}, the largest of {fmt}")
        if isinstance(offset, Tensor) and (offset.dtype != torch.int64 or offset.shape != param.shape[:1]):
            raise BadValueError(f"{where} has offsets of {offset.dtype} and shape {tuple(offset.shape)}")
        compute, drop = _upper(values, where)
        if max(map(abs, _extremes(offset))) > formats.MAX_OFFSET or values["position"] < 0:
            raise BadValueError(f"{where} has an offset or position out of range")
        if bool((torch.as_tensor(offset) & ((1 << drop) - 1)).any()):
            raise BadValueError(f"{where} has offsets that are none of {compute}, its upper bits")

    def _decode(self, params: list[Tensor]) -> None:
        """Set parameters to the values of their codes."""
        for param in params:
            state = self.state[param]
            fmt, drop = _upper(state, "the state")
            codes, offset = state["codes"], state["offset"]
            if drop:
                codes = _upper_codes(codes.to(torch.int64), fmt, drop)
            values = _decode_words(_words(codes, fmt), fmt, offset >> drop, param.dtype)
            param.copy_(values.to(param.device).view(param.shape))

    def _table(self, bucket: _Bucket, fmt: LNSFormat) -> tuple[int, Tensor] | None:
        """Magnitudes by absolute exponent, for all offsets of a bucket: 2^(e/γ) at index e − low.

        Returns: low and the table; None where it would be larger than is useful.
        """
        offsets = [o for e in bucket.entries for o in _extremes(e.state["offset"])]
        param = bucket.entries[0].param
        key = (fmt.gamma, param.dtype, param.device)
        low, high = min(offsets), max(offsets) + fmt.max_code
        if key in self._tables:
            known, values = self._tables[key]
            if known <= low and high < known + len(values):
                return self._tables[key]
            union = min(low, known), max(high, known + len(values) - 1)
            low, high = union if union[1] - union[0] < _TABLE_LIMIT else (low, high)
        if high - low >= _TABLE_LIMIT:
            return None
        wide = LNSFormat(_TABLE_LIMIT.bit_length(), fmt.gamma)
        exponents = np.arange(high - low + 1).astype(wide.dtype)
        self._tables[key] = (low, _decode_words(exponents, wide, low, param.dtype).to(param.device))
        return self._tables[key]

    # -- the update ---------------------------------------------------------------------------------

    def _multiply(self, bucket: _Bucket, scalars: _Scalars, count: bool) -> int:
        fmt = _format(bucket.entries[0].state)
        flip = bool(bucket.group["sign_flip"])
        unit, limit = _unit(bucket.group, fmt, scalars)
        random = _Draws(bucket) if bucket.group["rounding"] == "stochastic" else None
        table = self._table(bucket, fmt)
        scratch = _scratch(bucket, fmt)
        clipped = 0
        for block in _blocks(bucket.entries, coded=True):
            x, _, sign, y, zeros = scratch.views(block.size)
            grad, moment = _moment(block, scalars)
            if table is not None and fmt.bits <= 16 and _is_native(block, x, grad):
                drawn = None if random is None else random.take(block).numpy()
                clipped += _step_natively(block, scalars, (unit, limit), drawn, table, grad, y, flip)
                continue
            y.copy_(block.codes)
            torch.sign(y, out=sign)

            # x: by how many codes the magnitude shrinks
            torch.clamp(moment.to(x.dtype), min=scalars.least, out=x)
            x.rsqrt_().mul_(grad)
            torch.addcmul(zeros, x, sign, value=unit * scalars.correction, out=x)
            x.clamp_(-limit, limit).round_()
            if random is not None:
                x.add_(random.take(block)).mul_(1.0 / 256).floor_()

            # y: the new magnitude code; from here on all numbers are integers, and exact
            y.mul_(sign)
            asleep = not flip and _any_below(y, 1)
            y.sub_(x)
            if asleep or (flip and _any_below(y, 1)):
                sign = _signs(sign, y, 1, grad, scalars, flip)
            y.clamp_(1, fmt.max_code)
            if count:
                clipped += int((y >= fmt.max_code).sum())
            torch.mul(y, sign, out=x)
            if block.packed:
                block.scatter("codes", x)
                block.scatter("exp_avg_sq", moment)
            else:
                block.codes.copy_(x)
            self._write(block, fmt, table, x, y, sign)
        return clipped

    def _write(
        self,
        block: _Block,
        fmt: LNSFormat,
        table: tuple[int, Tensor] | None,
        codes: Tensor,
        magnitudes: Tensor,
        sign: Tensor,
    ) -> None:
        """Decode the new codes into the parameters; `magnitudes` is overwritten."""
        low = table[0] if table else 0
        base = _bases(block, low)
        compute, drop = _upper(block.entries[0].state, "the state")
        if drop:
            # still integers in floats, and exact
            magnitudes.add_(1 << (drop - 1)).mul_(2.0**-drop).floor_().clamp_(1, compute.max_code).mul_(1 << drop)
        if table is not None:
            index = magnitudes.add_(base).to(torch.int64)
            if not block.packed:
                torch.index_select(table[1], 0, index, out=block.weight)
                block.weight.mul_(sign)
                return
            values = torch.index_select(table[1], 0, index).mul_(sign)
        else:
            if drop:
                codes = magnitudes.mul(sign)
            words = _words(codes.to(torch.int64), fmt)
            values = _decode_words(words, fmt, base, block.weight.dtype).to(block.weight.device)
        if block.packed:
            block.scatter("param", values)
        else:
            block.weight.copy_(values)

    def _multiply_single(self, bucket: _Bucket, entry: _Entry, scalars: _Scalars, count: bool) -> int:
        state = entry.state
        fmt = _format(state)
        codes = state["codes"].reshape(-1).to(torch.int64)
        unbounded = _normalised(entry, scalars, _code_work_dtype(fmt, entry))
        unit, limit = _unit(bucket.group, fmt, scalars)
        shrink = torch.clamp(unbounded * torch.sign(codes) * (unit * scalars.correction), -limit, limit)
        steps = torch.round(shrink).to(torch.int64)
        if bucket.group["rounding"] == "stochastic":
            seed, start = int(bucket.group["seed"]), state["position"]
            draws = formats.random_bytes(seed, bucket.step, entry.size, start)
            steps = (steps + torch.from_numpy(draws).to(steps)) >> 8
        magnitude = codes.abs() - steps
        grad = _flat(entry.grad, unbounded.dtype)
        sign = _signs(torch.sign(codes), magnitude, 1, grad, scalars, bool(bucket.group["sign_flip"]))
        magnitude = torch.clamp(magnitude, 1, fmt.max_code)
        state["codes"].copy_((magnitude * sign).view(entry.param.shape))
        self._decode([entry.param])
        return int((magnitude == fmt.max_code).sum()) if count else 0


class LNSMadam(IntegerMadam):
    """LNS-Madam: the weights of a prepared model as codes whose upper bits are its layers' words.

    Zhao et al. 2022 hold weights in an update format, wider than what products are computed in, and move them by
    integer additions. Here a layer whose recipe says 8:8 for its weights has codes of 16 bits with γ = 8·2⁸; their
    upper eight bits, rounded to nearest, are the words of its forward pass, with the codes' offset over 2⁸. What the
    layer's own quantizer does with the parameter then changes nothing, and its offset stands still. No float weight
    exists.

    A layer with a folded batch norm computes with the words of weight times scale. Its parameter is the decoding of
    the whole code, to which the scale comes, before words are made: in the log domain an addition at the update
    format's precision. So trained words are exported words there too, but not the upper bits of codes alone.

    Weights outside such layers (a table of positions, say) have codes of 16 octaves without a shorter form. Parameters
    of one dimension follow the additive rule, as in :class:`Madam`.

    Args:
        model: prepared by :func:`lnsdeploy.training.prepare_`; its layers' offsets follow this optimizer from now on.
        lr, rounding, seed, init, sign_flip, beta, g_bound, p_scale, eps, additive_scale, maximize: as in
            :class:`IntegerMadam`.
        bits: of the update format, at least those of every layer's weights.

    Raises:
        BadTypeError: `model` is not a module.
        BadValueError: an option is out of range, or a layer's words are wider than `bits`.
    """

    def __init__(self, model: nn.Module, lr: float | Tensor = 0.03, bits: int = 16, **options: Any):
        from lnsdeploy.training.layers import LNSLayer

        if not isinstance(model, nn.Module):
            raise BadTypeError(f"LNSMadam takes a model, whose layers know their formats, not {type(model).__name__}")
        self._layers = [m for m in model.modules() if isinstance(m, LNSLayer) and m.recipe.weight is not None]
        groups: list[dict[str, Any]] = []
        taken: set[Tensor] = set()
        for layer in self._layers:
            fmt, weight = layer.recipe.weight, layer._weight
            assert fmt is not None
            if weight in taken:
                continue
            taken.add(weight)
            if fmt.bits > bits or not fmt.signed:
                raise BadValueError(
                    f"layer {layer.layer_name!r} has weights of {fmt}, which are no upper bits of signed codes of "
                    f"{bits} bits"
                )
            groups.append(
                {
                    "params": [weight],
                    "gamma": fmt.gamma << (bits - fmt.bits),
                    "per_channel": layer.weight_axis is not None,
                    "compute_bits": fmt.bits if layer.norm is None else None,
                }
            )
        rest = [p for p in model.parameters() if p not in taken]
        if rest:
            groups.append({"params": rest, "gamma": max(1, 1 << (bits - 1) >> 4)})
        super().__init__(groups, lr, bits, **options)
        self._hold()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """As :meth:`IntegerMadam.load_state_dict`; the layers' offsets follow."""
        super().load_state_dict(state_dict)
        self._hold()

    @torch.no_grad()
    def encode_parameters(self, *, recalibrate: bool = False) -> None:
        """As :meth:`IntegerMadam.encode_parameters`; the layers' offsets follow."""
        super().encode_parameters(recalibrate=recalibrate)
        self._hold()

    def _hold(self) -> None:
        for layer in self._layers:
            state = self.state.get(layer._weight, {})
            if layer.norm is None and "codes" in state:
                offset, _ = _offset_and_axis(state["offset"])
                layer.hold_offset(offset >> _upper(state, layer.layer_name)[1])


# ---------------------------------------------------------------------------------------------------
# Blocks


def _blocks(entries: list[_Entry], *, coded: bool) -> Iterator[_Block]:
    """Cut large tensors into slices and pack small or strided ones together, in order."""
    if entries[0].param.device.type == "cpu":
        limit = _CPU_BLOCK * torch.get_num_threads()
    else:
        limit = _DEVICE_BLOCK
    waiting: list[_Entry] = []
    total = 0
    for entry in entries:
        if 4 * entry.size >= limit and entry.param.is_contiguous():
            yield from _slices(entry, limit, coded)
            continue
        if waiting and total + entry.size > limit:
            yield from _pack(waiting, limit, coded)
            waiting, total = [], 0
        waiting.append(entry)
        total += entry.size
    if waiting:
        yield from _pack(waiting, limit, coded)


def _slices(entry: _Entry, limit: int, coded: bool) -> Iterator[_Block]:
    pieces = -(-entry.size // limit)
    # equal lengths, and whole pages, so that every slice but the last ends with a full vector
    length = -(-entry.size // pieces // 1024) * 1024
    state = entry.state
    tensors = [entry.param.view(-1), entry.grad.reshape(-1), state["exp_avg_sq"].view(-1)]
    if coded:
        tensors.append(state["codes"].view(-1))
    for number, (weight, grad, moment, *codes) in enumerate(zip(*(t.split(length) for t in tensors), strict=True)):
        last = codes[0] if coded else _nothing(weight)
        yield _Block([entry], number * length, weight.numel(), weight, grad, moment, last, packed=False)


def _pack(entries: list[_Entry], limit: int, coded: bool) -> Iterator[_Block]:
    if len(entries) == 1 and entries[0].param.is_contiguous():
        yield from _slices(entries[0], limit, coded)
        return
    param = entries[0].param
    yield _Block(
        entries,
        0,
        sum(e.size for e in entries),
        _nothing(param) if coded else _flatten([e.param for e in entries]),
        _flatten([e.grad for e in entries]),
        _flatten([e.state["exp_avg_sq"] for e in entries]),
        _flatten([e.state["codes"] for e in entries]) if coded else _nothing(param),
        packed=True,
    )


def _nothing(like: Tensor) -> Tensor:
    return torch.empty(0, dtype=like.dtype, device=like.device)


class _Draws:
    """The random bytes of one step for the coded weights of a bucket, drawn in as few runs as possible."""

    def __init__(self, bucket: _Bucket):
        runs: list[list[int]] = []
        for entry in sorted(bucket.entries, key=lambda e: int(e.state["position"])):
            start = entry.state["position"]
            if runs and runs[-1][1] == start:
                runs[-1][1] += entry.size
            else:
                runs.append([start, start + entry.size])
        seed, device = int(bucket.group["seed"]), bucket.entries[0].param.device
        self._starts = [start for start, _ in runs]
        self._runs = [
            torch.from_numpy(_random_bytes(seed, bucket.step, end - start, start)).to(device) for start, end in runs
        ]

    def take(self, block: _Block) -> Tensor:
        """uint8 [block.size]"""
        if block.packed:
            starts = [e.state["position"] for e in block.entries]
            sizes = [e.size for e in block.entries]
        else:
            starts, sizes = [block.entries[0].state["position"] + block.start], [block.size]
        # neighbours in the block are neighbours in the run, unless a parameter between them got no gradient
        joined: list[list[int]] = []
        for start, size in zip(starts, sizes, strict=True):
            if joined and joined[-1][0] + joined[-1][1] == start:
                joined[-1][1] += size
            else:
                joined.append([start, size])
        pieces = []
        for start, size in joined:
            run = bisect.bisect_right(self._starts, start) - 1
            pieces.append(self._runs[run].narrow(0, start - self._starts[run], size))
        return torch.cat(pieces) if len(pieces) > 1 else pieces[0]


# ---------------------------------------------------------------------------------------------------
# Parts of the update


def _scratch(bucket: _Bucket, fmt: LNSFormat | None = None) -> _Scratch:
    entry = bucket.entries[0]
    dtype = _code_work_dtype(fmt, entry) if fmt else _work_dtype(entry.param.dtype)
    return _Scratch(dtype, entry.param.device)


def _moment(block: _Block, scalars: _Scalars) -> tuple[Tensor, Tensor]:
    """Update the second moment; returns the gradient in its dtype, and the moment."""
    grad = block.grad.to(block.moment.dtype)
    block.moment.mul_(scalars.beta).addcmul_(grad, grad, value=1 - scalars.beta)
    return grad, block.moment


def _normalised(entry: _Entry, scalars: _Scalars, dtype: torch.dtype | None = None) -> Tensor:
    """g/√v of one tensor, after the update of v, without bias correction and bound; flat."""
    moment = entry.state["exp_avg_sq"]
    grad = _flat(entry.grad, moment.dtype).view(moment.shape)
    moment.mul_(scalars.beta).addcmul_(grad, grad, value=1 - scalars.beta)
    root = torch.clamp(moment.to(dtype or moment.dtype), min=scalars.least).rsqrt()
    return (root * grad).view(-1)


def _is_native(block: _Block, *tensors: Tensor) -> bool:
    """Whether the native library does the rest of a block's step: on the CPU, with float32 numbers throughout."""
    # Second moments stay with torch: whether it rounds once or twice there depends on how it was compiled.
    held = (block.weight, block.moment, *tensors)
    return (
        block.moment.device.type == "cpu"
        and _has_native()
        and all(t.dtype == torch.float32 and t.is_contiguous() for t in held)
    )


def _move_natively(
    block: _Block,
    scalars: _Scalars,
    tensors: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    bounds: tuple[float | Tensor, float | Tensor],
    flip: bool,
) -> int:
    """The rest of :meth:`Madam._multiply` for a block, to the same bits, in two passes around torch's exp2."""
    weight, grad, x, padded, y = tensors
    rate, threads = scalars.lr / _LN2, torch.get_num_threads()
    limits = (scalars.least, -rate * scalars.correction, rate * scalars.bound)
    where = (weight.data_ptr(), grad.data_ptr())
    native.madam_octaves(block.size, *where, block.moment.data_ptr(), limits, x.data_ptr(), threads)
    padded.exp2_()
    low, high = (np.asarray(side, dtype=np.float32).reshape(-1) for side in bounds)
    made = y if block.packed else block.weight
    clipped = native.madam_move(
        block.size,
        *where,
        x.data_ptr(),
        (low, high),
        made.data_ptr(),
        flip=flip,
        ascend=scalars.correction < 0,
        threads=threads,
    )
    if block.packed:
        block.scatter("param", made)
        block.scatter("exp_avg_sq", block.moment)
    return clipped


def _step_natively(
    block: _Block,
    scalars: _Scalars,
    steps: tuple[float, float],
    drawn: npt.NDArray[np.uint8] | None,
    table: tuple[int, Tensor],
    grad: Tensor,
    y: Tensor,
    flip: bool,
) -> int:
    """The rest of :meth:`IntegerMadam._multiply` for a block, to the same bits, in one pass."""
    unit, limit = steps
    state = block.entries[0].state
    _, drop = _upper(state, "the state")
    base = _bases(block, table[0])
    made = y if block.packed else block.weight
    clipped = native.madam_codes(
        block.codes.numpy(),
        grad.data_ptr(),
        block.moment.data_ptr(),
        (scalars.least, unit * scalars.correction, limit),
        drawn,
        (int(state["bits"]), drop),
        table[1].numpy(),
        np.asarray(base, dtype=np.int64).reshape(-1),
        made.data_ptr(),
        flip=flip,
        ascend=scalars.correction < 0,
        threads=torch.get_num_threads(),
    )
    if block.packed:
        block.scatter("codes", block.codes)
        block.scatter("exp_avg_sq", block.moment)
        block.scatter("param", made)
    return clipped


def _random_bytes(seed: int, stream: int, count: int, start: int) -> npt.NDArray[np.uint8]:
    if _has_native():
        return native.random_bytes(seed, stream, count, start, torch.get_num_threads())
    return formats.random_bytes(seed, stream, count, start)


def _any_below(values: Tensor, limit: float | Tensor) -> bool:
    """Whether signs may have to change; always yes where asking would wait for an accelerator."""
    if values.device.type != "cpu":
        return True
    return float(values.amin()) < float(limit.max() if isinstance(limit, Tensor) else limit)


def _signs(sign: Tensor, magnitude: Tensor, low: float | Tensor, grad: Tensor, scalars: _Scalars, flip: bool) -> Tensor:
    """The new signs: zeros wake against their gradient, and magnitudes below the least flip if allowed."""
    against = torch.sign(grad).to(sign.dtype)
    if scalars.correction > 0:
        against.neg_()
    moved = torch.where(magnitude < low, -sign, sign) if flip else sign
    return torch.where(sign == 0, against, moved)


def _clamp_(values: Tensor, low: float | Tensor, high: float | Tensor) -> None:
    """Clamp in place; torch wants two numbers or two tensors."""
    if isinstance(low, Tensor) and isinstance(high, Tensor):
        torch.clamp(values, low, high, out=values)
    else:
        values.clamp_(float(low), float(high))


def _unit(group: dict[str, Any], fmt: LNSFormat, scalars: _Scalars) -> tuple[float, float]:
    """Steps of a code (or of 1/256 of a code) per unit of ĝ, and the bound of a step.

    A step of C codes reaches either end from anywhere, so a larger one would do the same.
    """
    parts = 256.0 if group["rounding"] == "stochastic" else 1.0
    unit = parts * scalars.lr * fmt.gamma / _LN2
    return unit, min(unit * scalars.bound, parts * fmt.max_code)


def _flat(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().reshape(-1).to(dtype)


def _work_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of second moments and temporaries."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _code_work_dtype(fmt: LNSFormat, entry: _Entry) -> torch.dtype:
    """The dtype that holds 256·C exactly."""
    return torch.float64 if fmt.bits > 16 else _work_dtype(entry.param.dtype)


def _largest_magnitude(param: Tensor, group: dict[str, Any], where: str) -> float:
    """The bound of |w|: p_max, or p_scale times the RMS of the values (float64)."""
    count = param.numel()
    norm = float(torch.linalg.vector_norm(param.detach(), dtype=torch.float64))
    if not math.isfinite(norm):
        raise BadValueError(f"{where} contains NaN or infinity")
    if group["p_max"] is not None:
        return float(group["p_max"])
    scale: float = norm / math.sqrt(max(count, 1))
    if scale == 0 and count:
        scale = math.sqrt(2 * param.shape[0] / count) if param.ndim > 1 else float(group["additive_scale"])
        warnings.warn(
            f"{where} is entirely zero, so it has no scale of its own: its weights start at the smallest "
            f"magnitude and are bounded by {float(group['p_scale']) * scale:.4g}; initialise it, or set "
            "p_max for its group",
            MadamWarning,
            stacklevel=2,
        )
    return float(group["p_scale"]) * scale


def _round_down(value: float, dtype: torch.dtype) -> float:
    """The largest number of `dtype` not above a positive `value`."""
    rounded = float(torch.tensor(value, dtype=dtype))
    if rounded > value:
        rounded = float(torch.tensor(value * (1 - torch.finfo(dtype).eps), dtype=dtype))
    return max(rounded, _smallest(dtype))


def _smallest(dtype: torch.dtype) -> float:
    """The smallest magnitude that weights of `dtype` may take; float16 has too few octaves to spare any."""
    info = torch.finfo(dtype)
    return float(info.tiny * info.eps if dtype == torch.float16 else info.tiny)


def _floor(highs: list[float], group: dict[str, Any], dtype: torch.dtype) -> list[float]:
    """The smallest magnitudes that go with the largest."""
    ratio, least = math.pow(2.0, -float(group["range_octaves"])), _smallest(dtype)
    return [min(high, max(high * ratio, least)) for high in highs]


# ---------------------------------------------------------------------------------------------------
# Codes and words


def _format(state: dict[str, Any]) -> LNSFormat:
    return LNSFormat(state["bits"], state["gamma"])


def _compute_format(bits: int, gamma: int, compute_bits: Any, where: str) -> LNSFormat:
    """The format of a code's upper bits."""
    if isinstance(compute_bits, bool) or not isinstance(compute_bits, Integral):
        raise BadTypeError(f"{where}: compute_bits must be an integer or None, not {compute_bits!r}")
    drop = bits - int(compute_bits)
    if drop < 0 or compute_bits < 2:
        raise BadValueError(f"{where}: compute_bits must be 2 to {bits}, the width of codes, not {compute_bits}")
    if gamma % (1 << drop):
        raise BadValueError(
            f"{where}: the upper {compute_bits} of {bits} bits need a γ that is a multiple of {1 << drop}"
        )
    return LNSFormat(int(compute_bits), gamma >> drop)


def _upper(state: dict[str, Any], where: str) -> tuple[LNSFormat, int]:
    """The format of the upper bits that are computed with, and how many bits are below."""
    fmt = _compute_format(state["bits"], state["gamma"], state["compute_bits"], where)
    return fmt, state["bits"] - fmt.bits


def _upper_codes(codes: Tensor, fmt: LNSFormat, drop: int) -> Tensor:
    """Signed codes of the upper bits, rounded to nearest, halves up; int64. Zero stays zero."""
    if not drop:
        return codes
    magnitudes = ((codes.abs() + (1 << (drop - 1))) >> drop).clamp(1, fmt.max_code)
    return magnitudes * torch.sign(codes)


def upper_words(tensor: LNSTensor, bits: int, where: str = "words") -> LNSTensor:
    """The words that the upper `bits` bits of integer weights are: what a parameter of :class:`LNSMadam` holds.

    Args:
        tensor: codes as words, as :meth:`IntegerMadam.lns_tensors` gives them.
        bits: of the shorter words, the sign among them.
        where: names the words in error messages.

    Raises:
        BadTypeError, BadValueError: codes of that format and offset have no upper words of `bits` bits.
    """
    fmt = _compute_format(tensor.format.bits, tensor.format.gamma, bits, where)
    drop = tensor.format.bits - fmt.bits
    codes, negative = tensor.format.split(tensor.words)
    signed = torch.from_numpy(np.where(negative, -codes.astype(np.int64), codes))
    offset = np.asarray(tensor.offset) >> drop
    return LNSTensor(
        _words(_upper_codes(signed, fmt, drop), fmt), fmt, offset if offset.ndim else int(offset), tensor.axis
    )


def _first_offset(param: Tensor, group: dict[str, Any], fmt: LNSFormat, compute_bits: int, where: str) -> int | Tensor:
    """The offset at which the largest code of the upper bits reaches the bound of |w|; per channel int64 [channels]."""
    compute = _compute_format(fmt.bits, fmt.gamma, compute_bits, where)
    drop = fmt.bits - compute.bits
    largest = _largest_magnitude(param, group, where)
    if not group["per_channel"] or group["p_max"] is not None or not param.numel():
        offset = formats.offset_for(largest, compute) << drop
        return torch.full(param.shape[:1], offset) if group["per_channel"] else offset
    rows = param.detach().reshape(param.shape[0], -1).to(torch.float64)
    bounds = float(group["p_scale"]) * rows.square().mean(dim=1).sqrt()
    # a channel of zeros has no scale of its own
    bounds = torch.where(bounds > 0, bounds, torch.full_like(bounds, largest))
    return torch.tensor([formats.offset_for(float(bound), compute) << drop for bound in bounds])


def _extremes(offset: int | Tensor) -> tuple[int, int]:
    """The least and the largest of one offset or several."""
    if not isinstance(offset, Tensor):
        return offset, offset
    return (int(offset.min()), int(offset.max())) if len(offset) else (0, 0)


def _offset_and_axis(offset: int | Tensor) -> tuple[Any, int | None]:
    """As :class:`LNSTensor` takes them."""
    return (offset.cpu().numpy(), 0) if isinstance(offset, Tensor) else (offset, None)


def _bases(block: _Block, low: int) -> int | Tensor:
    """What to add to magnitude codes for absolute exponents above `low`: a number, or int64 [block.size]."""
    offsets = [e.state["offset"] for e in block.entries]
    device = block.moment.device
    if not any(isinstance(offset, Tensor) for offset in offsets):
        if not block.packed:
            return int(offsets[0]) - low
        return block.per_element(torch.tensor([int(o) - low for o in offsets]))
    pieces = []
    for entry, offset in zip(block.entries, offsets, strict=True):
        if isinstance(offset, Tensor):
            spread = (offset - low).to(device).repeat_interleave(entry.size // len(offset), output_size=entry.size)
        else:
            spread = torch.full((entry.size,), offset - low, device=device)
        pieces.append(spread)
    if block.packed:
        return torch.cat(pieces)
    return pieces[0].narrow(0, block.start, block.size)


def _code_dtype(fmt: LNSFormat) -> torch.dtype:
    return torch.int16 if fmt.bits <= 16 else torch.int32


def _words(codes: Tensor, fmt: LNSFormat) -> npt.NDArray[Any]:
    """LNS words of signed codes."""
    signed = codes.detach().cpu().numpy().astype(np.int64)
    return fmt.join(np.abs(signed), signed < 0)


def _encode(param: Tensor, fmt: LNSFormat, offset: int | Tensor, where: str) -> Tensor:
    """Signed codes nearest to the values; only what is exactly zero gets code 0."""
    values = param.detach().cpu()
    values = values.to(_work_dtype(values.dtype))
    if not bool(torch.isfinite(values).all()):
        raise BadValueError(f"{where} contains NaN or infinity")
    offset, axis = _offset_and_axis(offset)
    words = formats.encode(values.numpy(), fmt, offset, axis=axis, underflow="min", name=where)
    magnitudes, negative = fmt.split(words)
    signed = np.where(negative, -magnitudes, magnitudes) * (values.numpy() != 0)
    return torch.from_numpy(np.asarray(signed)).to(_code_dtype(fmt)).view(param.shape)


def _decode_words(words: npt.NDArray[Any], fmt: LNSFormat, offset: int | Tensor, dtype: torch.dtype) -> Tensor:
    """The numbers of `dtype` nearest to the values of words; a tensor of offsets has one for each word."""
    axis = 0 if isinstance(offset, Tensor) else None
    offsets = offset.cpu().numpy() if isinstance(offset, Tensor) else offset
    if dtype in (torch.float32, torch.float64):
        wide = np.float32 if dtype == torch.float32 else np.float64
        return torch.from_numpy(np.asarray(formats.decode(words, fmt, offsets, wide, axis=axis)))
    # torch rounds float64 to float32 on the way to a half type; round once, here, instead
    values = np.asarray(formats.decode(words, fmt, offsets, np.float64, axis=axis))
    if dtype == torch.float16:
        with np.errstate(over="ignore"):
            return torch.from_numpy(np.asarray(values.astype(np.float16)))
    significand, exponent = np.frexp(values)
    return torch.from_numpy(np.asarray(np.ldexp(np.rint(significand * 256), exponent - 8))).to(dtype)


# ---------------------------------------------------------------------------------------------------
# Options


def _where(group: dict[str, Any], number: int, index: int) -> str:
    """Words for a parameter in messages."""
    names = group.get("param_names")
    name = f"{names[index]!r}, " if names else ""
    return f"parameter {index} of group {number} ({name}shape {tuple(group['params'][index].shape)})"


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, Real):
        raise BadTypeError(f"{where}: {name} must be a number, not {value!r}")
    return float(value)


def _learning_rate(group: dict[str, Any], where: str) -> float:
    """The learning rate as a number."""
    value = group["lr"]
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise BadValueError(f"{where}: lr must have one element, not shape {tuple(value.shape)}")
        value = float(value)
    rate = _number(value, "lr", where)
    if not 0 <= rate < math.inf:
        raise BadValueError(f"{where}: lr must be a finite number that is not negative, not {rate}")
    return rate
