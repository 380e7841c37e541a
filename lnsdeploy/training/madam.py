"""Madam: multiplicative weight updates, on floats and on integer log codes (docs/madam.md).

Sources: Bernstein et al. 2020, "Learning compositional functions via multiplicative weight updates"
(the update, and weights held as B-bit integers), and Zhao et al. 2022, "LNS-Madam: Low-precision
training in logarithmic number system using multiplicative weight update". Written from the papers.

A weight moves by a factor, so on a logarithmic scale the step is additive, and a weight stored as an
integer log code moves by an integer number of codes:

    v  ← β·v + (1 − β)·g²          ĝ = clamp(g / √(v / (1 − β^t)), ±g_bound)
    w  ← w·2^(−(lr/ln 2)·ĝ·sign w)            (:class:`Madam`)
    |k| ← |k| − round((lr·γ/ln 2)·ĝ·sign k)    (:class:`IntegerMadam`)

Large tensors are cut into blocks that stay in the cache through all operations of the update, small ones
are packed together, so that the number of Python calls depends on the number of blocks and not on the
number of parameters; on an accelerator a block is as large as memory comfortably allows.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, overload

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.optim import Optimizer

from lnsdeploy import formats
from lnsdeploy.errors import BadTypeError, BadValueError, UnknownNameError, UnsupportedError
from lnsdeploy.formats import LNSFormat, LNSTensor

Rule = Literal["auto", "multiplicative", "additive"]
CodeRounding = Literal["stochastic", "nearest"]
Init = Literal["encode", "random"]

RULES = ("auto", "multiplicative", "additive")
CODE_ROUNDINGS = ("stochastic", "nearest")
INITS = ("encode", "random")

# Elements of a block on the CPU, per thread: w, g, v and the temporaries share a second-level cache.
_CPU_BLOCK = 1 << 16
_DEVICE_BLOCK = 1 << 26
# Lengths are rounded up to this, so that no element of exp2 falls in the remainder of a vector loop,
# where torch computes it with another function: results do not depend on how tensors are packed.
_LANES = 64
_CLIP_WARNING = 0.1
_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_LN2 = math.log(2.0)
# Stream of the random bits that draw the first codes; updates use streams 1, 2, 3, …
_INIT_STREAM = 1 << 63


class MadamWarning(UserWarning):
    """Training goes on, but a weight bound or an initialisation probably limits it."""


@dataclass
class _Entry:
    """A parameter that takes part in this step."""

    param: Tensor
    grad: Tensor
    state: dict[str, Any]
    where: str

    @property
    def size(self) -> int:
        return self.param.numel()


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
    """Flat tensors for one pass: a slice of one parameter in place, or several parameters packed."""

    entries: list[_Entry]
    start: int
    size: int
    weight: Tensor
    grad: Tensor
    moment: Tensor
    codes: Tensor | None
    packed: bool

    def per_tensor(self, values: list[float], dtype: torch.dtype) -> float | Tensor:
        """One number per tensor, spread over the elements where the block holds several tensors."""
        if len(set(values)) == 1:
            return values[0]
        sizes = torch.tensor([e.size for e in self.entries])
        spread = torch.tensor(values, dtype=dtype).repeat_interleave(sizes, output_size=self.size)
        return spread.to(self.weight.device)

    def scatter(self, field: Literal["param", "exp_avg_sq", "codes"], flat: Tensor) -> None:
        """Write the packed result back to the tensors it was gathered from."""
        targets = [e.param if field == "param" else e.state[field] for e in self.entries]
        parts = flat.split([e.size for e in self.entries])
        torch._foreach_copy_(targets, [part.view(t.shape) for part, t in zip(parts, targets, strict=True)])


class _Scratch:
    """Temporaries of the size of a block, reused from block to block."""

    def __init__(self, capacity: int, dtype: torch.dtype, device: torch.device):
        capacity = -(-capacity // _LANES) * _LANES
        self._buffers = [torch.zeros(capacity, dtype=dtype, device=device) for _ in range(4)]
        self._size = -1

    def views(self, size: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """x, x with its padding, sign, y, and zeros: [size] each, the second rounded up."""
        if size != self._size:
            x, sign, y, zeros = self._buffers
            padded = x[: -(-size // _LANES) * _LANES]
            self._views = (x[:size], padded, sign[:size], y[:size], zeros[:size])
            self._size = size
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
        for name, low, high in (
            ("beta", 0.0, 1.0),
            ("g_bound", 0.0, math.inf),
            ("p_scale", 0.0, math.inf),
            ("eps", 0.0, math.inf),
            ("additive_scale", 0.0, math.inf),
        ):
            value = _number(group[name], name, where)
            if not low <= value < high or (value == 0 and name in ("g_bound", "p_scale")):
                raise BadValueError(f"{where}: {name} must be a number from {low} to {high}, not {value}")
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
            # Looking at steps 1, 2, 4, 8, … costs nothing on the whole and is late by a factor of two at most.
            count = bucket.multiplicative and not self._clip_warned and bucket.step & (bucket.step - 1) == 0
            found = self._update(bucket, count)
            if count:
                clipped += found
                counted += sum(e.size for e in bucket.entries)
        if counted and clipped > _CLIP_WARNING * counted:
            self._clip_warned = True
            warnings.warn(
                f"{100 * clipped / counted:.0f} % of the weights sit at their bound (p_scale times the RMS of "
                "the initial weights): initialise with a larger scale (He), or raise p_scale or p_max",
                MadamWarning,
                stacklevel=2,
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
                        f"the gradient of {_where(group, number, index)} is sparse ({grad.layout}); Madam needs "
                        "dense gradients (sparse=False in the embedding, or grad.to_dense())"
                    )
                entry = _Entry(param, grad, self.state[param], _where(group, number, index))
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
            bad = int((~torch.isfinite(entry.grad)).sum())
            if bad:
                raise BadValueError(
                    f"the gradient of {entry.where} contains NaN or infinity in {bad} of {entry.size} elements; "
                    "nothing was updated (lower the learning rate, clip the gradients, or skip this step)"
                )
            raise BadValueError(
                f"the gradient of {entry.where} is too large: its squares overflow {_work_dtype(dtype)}; "
                "nothing was updated (scale the loss down)"
            )

    def _buckets(self, collected: list[tuple[dict[str, Any], bool, list[_Entry]]]) -> list[_Bucket]:
        """Counts the step of every entry, and groups those that share device, dtype and step number."""
        found: dict[tuple[Any, ...], _Bucket] = {}
        for number, (group, multiplicative, entries) in enumerate(collected):
            for entry in entries:
                self._prepare(group, multiplicative, entry)
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
        blocks = list(_blocks(bucket.entries, bucket.multiplicative and self._coded))
        first = bucket.entries[0]
        scratch = _Scratch(max(b.size for b in blocks), first.state["exp_avg_sq"].dtype, first.param.device)
        clipped = 0
        for block in blocks:
            if bucket.multiplicative:
                clipped += self._multiply(bucket, block, scalars, scratch, count)
            else:
                self._add(bucket, block, scalars, scratch)
        return clipped

    _coded = False

    def _multiply(
        self, bucket: _Bucket, block: _Block, scalars: _Scalars, scratch: _Scratch, count: bool
    ) -> int:
        raise NotImplementedError  # pragma: no cover - both subclasses define it

    def _multiply_single(self, bucket: _Bucket, entry: _Entry, scalars: _Scalars, count: bool) -> int:
        raise NotImplementedError  # pragma: no cover - both subclasses define it

    def _add(self, bucket: _Bucket, block: _Block, scalars: _Scalars, scratch: _Scratch) -> None:
        """w ← w − lr·additive_scale·ĝ."""
        x, _, _, _, _ = scratch.views(block.size)
        grad, moment = _moment(block, scalars)
        torch.clamp(moment, min=scalars.least, out=x)
        x.rsqrt_().mul_(grad)
        size = scalars.bound / abs(scalars.correction)
        x.clamp_(-size, size)
        rate = -scalars.lr * float(bucket.group["additive_scale"]) * scalars.correction
        weight = block.weight.to(x.dtype)
        weight.add_(x, alpha=rate)
        if weight is not block.weight and not block.packed:
            block.weight.copy_(weight)
        if block.packed:
            block.scatter("param", weight)
            block.scatter("exp_avg_sq", moment)

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
        missing = sorted(set(self.defaults) - {"differentiable"} - set(saved_groups[0]))
        if missing:
            raise BadValueError(
                f"not the state of {type(self).__name__}: its groups lack {', '.join(missing)}"
            )
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
        moment = values.get("exp_avg_sq")
        step = values.get("step")
        if moment is None and "codes" in values and step == 0:
            return
        if not isinstance(moment, Tensor) or not isinstance(step, int) or step < 0:
            raise BadValueError(f"{where} is not one of {type(self).__name__}: step or exp_avg_sq is missing")
        if moment.shape != param.shape or moment.dtype != _work_dtype(param.dtype):
            raise BadValueError(
                f"{where} has a second moment of {moment.dtype} and shape {tuple(moment.shape)}, the parameter "
                f"needs {_work_dtype(param.dtype)} and {tuple(param.shape)}"
            )

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
            entry.state["clip_max"] = _round_down(
                _largest_magnitude(entry.param, group, entry.where), entry.param.dtype
            )

    def _check_state(self, param: Tensor, values: dict[str, Any], where: str) -> None:
        super()._check_state(param, values, where)
        clip = values.get("clip_max", 1.0)
        if "codes" in values or not isinstance(clip, float) or not 0 < clip < math.inf:
            raise BadValueError(f"{where} is not one of Madam: clip_max must be a positive number")

    def _multiply(
        self, bucket: _Bucket, block: _Block, scalars: _Scalars, scratch: _Scratch, count: bool
    ) -> int:
        flip = bool(bucket.group["sign_flip"])
        high, low = self._bounds(bucket, block)
        x, padded, sign, y, zeros = scratch.views(block.size)
        grad, moment = _moment(block, scalars)
        weight = block.weight.to(x.dtype)

        # x: the change of log2 |w|
        torch.clamp(moment, min=scalars.least, out=x)
        x.rsqrt_().mul_(grad)
        torch.sign(weight, out=sign)
        rate = scalars.lr / _LN2
        torch.addcmul(zeros, x, sign, value=-rate * scalars.correction, out=x)
        x.clamp_(-rate * scalars.bound, rate * scalars.bound)
        padded.exp2_()

        # y: the new magnitude
        torch.mul(weight, sign, out=y)
        y.mul_(x)
        if _needs_signs(y, low if flip else torch.finfo(y.dtype).tiny):
            sign = _signs(sign, y, low, grad, scalars, flip)
        y.clamp_(low, high)  # type: ignore[call-overload]
        clipped = int((y >= high).sum()) if count else 0
        if block.packed:
            block.scatter("param", y.mul_(sign))
            block.scatter("exp_avg_sq", moment)
        elif weight is block.weight:
            torch.mul(y, sign, out=weight)
        else:
            block.weight.copy_(y.mul_(sign))
        return clipped

    def _bounds(self, bucket: _Bucket, block: _Block) -> tuple[float | Tensor, float | Tensor]:
        """The largest and smallest magnitude; tensors if the block packs tensors that differ in them."""
        highs = [float(e.state["clip_max"]) for e in block.entries]
        lows = [_floor(e, bucket.group) for e in block.entries]
        dtype = block.moment.dtype
        high, low = block.per_tensor(highs, dtype), block.per_tensor(lows, dtype)
        if isinstance(high, Tensor) != isinstance(low, Tensor):
            # clamp takes two numbers or two tensors
            full = torch.ones(block.size, dtype=dtype, device=block.weight.device)
            high, low = full * high, full * low
        return high, low

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
        high, low = float(entry.state["clip_max"]), _floor(entry, bucket.group)
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

    Raises:
        BadValueError, UnknownNameError, BadTypeError: an option or a parameter is not allowed.
    """

    _coded = True

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
        if isinstance(group["seed"], bool) or not isinstance(group["seed"], int):
            raise BadTypeError(f"parameter group {number}: seed must be an integer, not {group['seed']!r}")

    @torch.no_grad()
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add parameters, with their own options, to the optimizer; they are encoded at once.

        Raises:
            BadValueError, UnknownNameError: an option is out of range, or a weight is NaN or infinite.
            BadTypeError: a parameter is not float16, bfloat16, float32 or float64.
        """
        position = sum(p.numel() for g in self.param_groups for p in g["params"] if "codes" in self.state[p])
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
        return "codes" in self.state[param]

    def _kind(self, entry: _Entry) -> tuple[Any, ...]:
        return (entry.state.get("bits"), entry.state.get("gamma"))

    def _first_codes(self, param: Tensor, group: dict[str, Any], position: int, where: str) -> dict[str, Any]:
        fmt = LNSFormat(group["bits"], group["gamma"])
        largest = _largest_magnitude(param, group, where)
        offset = formats.offset_for(largest, fmt)
        if group["init"] == "random":
            count = param.numel()
            draws = formats.random_bytes(int(group["seed"]), _INIT_STREAM, 4 * count, 4 * position)
            uniform = draws.view("<u4").astype(np.int64)
            # multiply and shift: every code has the same number of 32-bit words, give or take one
            magnitudes = torch.from_numpy((uniform * fmt.max_code >> 32) + 1).view(param.shape)
            codes = (magnitudes * torch.sign(param.cpu())).to(_code_dtype(fmt))
        else:
            codes = _encode(param, fmt, offset, where)
        return {
            "step": 0,
            "codes": codes.to(param.device),
            "offset": offset,
            "bits": fmt.bits,
            "gamma": fmt.gamma,
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
            state = self.state[param]
            if "codes" not in state:
                found.append(None)
                continue
            fmt = LNSFormat(state["bits"], state["gamma"])
            found.append(LNSTensor(_words(state["codes"], fmt), fmt, state["offset"]))
        return found

    @torch.no_grad()
    def encode_parameters(self, *, recalibrate: bool = False) -> None:
        """Take the parameters as they are now: encode them to the nearest codes, and decode those.

        For use after the parameters were changed from outside. Parameters that already are decoded codes
        of the same offset keep exactly these codes. Second moments and step numbers stay.

        Args:
            recalibrate: choose the offsets anew, from the RMS of the present values.

        Raises:
            BadValueError: a weight is NaN or infinite; nothing has been changed then.
        """
        fresh: list[tuple[Tensor, int, Tensor]] = []
        for number, group in enumerate(self.param_groups):
            for index, param in enumerate(group["params"]):
                state, where = self.state[param], _where(group, number, index)
                if "codes" not in state:
                    continue
                fmt = LNSFormat(state["bits"], state["gamma"])
                offset = state["offset"]
                if recalibrate:
                    offset = formats.offset_for(_largest_magnitude(param, group, where), fmt)
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
            self._decode([param for param, _ in self._named() if "codes" in self.state[param]])

    def _matching(self, state_dict: dict[str, Any]) -> list[tuple[Tensor, dict[str, Any]]]:
        found = super()._matching(state_dict)
        present = {param for param, _ in found}
        for param, where in self._named():
            if "codes" in self.state[param] and param not in present:
                raise BadValueError(f"the saved state has no codes for {where}")
        return found

    def _check_state(self, param: Tensor, values: dict[str, Any], where: str) -> None:
        super()._check_state(param, values, where)
        if ("codes" in values) != ("codes" in self.state[param]):
            held = "codes" if "codes" in values else "no codes"
            raise BadValueError(
                f"{where} has {held}, this optimizer updates that parameter by the other rule"
            )
        if "codes" not in values:
            return
        numbers = [values.get(key) for key in ("bits", "gamma", "offset", "position")]
        codes = values["codes"]
        if not isinstance(codes, Tensor) or not all(isinstance(n, int) for n in numbers):
            raise BadValueError(f"{where} lacks codes, bits, gamma, offset or position")
        fmt = LNSFormat(values["bits"], values["gamma"])
        if codes.dtype != _code_dtype(fmt) or codes.shape != param.shape:
            raise BadValueError(
                f"{where} has codes of {codes.dtype} and shape {tuple(codes.shape)}; {fmt} and the parameter "
                f"need {_code_dtype(fmt)} and {tuple(param.shape)}"
            )
        if codes.numel() and not -fmt.max_code <= int(codes.min()) <= int(codes.max()) <= fmt.max_code:
            raise BadValueError(f"{where} has codes beyond ±{fmt.max_code}, the largest of {fmt}")
        if abs(values["offset"]) > formats.MAX_OFFSET or values["position"] < 0:
            raise BadValueError(f"{where} has an offset or position out of range")

    def _decode(self, params: list[Tensor]) -> None:
        """Set parameters to the values of their codes."""
        for param in params:
            state = self.state[param]
            fmt = LNSFormat(state["bits"], state["gamma"])
            values = _decode_words(_words(state["codes"], fmt), fmt, state["offset"], param.dtype)
            param.copy_(values.to(param.device).view(param.shape))

    def _table(self, bucket: _Bucket) -> tuple[int, Tensor] | None:
        """Magnitudes by absolute exponent for all offsets of a bucket: 2^(e/γ) at index e − first.

        None for formats whose codes are too many for a table.
        """
        first = bucket.entries[0]
        fmt = LNSFormat(first.state["bits"], first.state["gamma"])
        offsets = [e.state["offset"] for e in bucket.entries]
        low, span = min(offsets), fmt.max_code + max(offsets) - min(offsets)
        # Tensors of very different scale would need a table with more entries than weights are decoded.
        wide = LNSFormat(max(span.bit_length() + 1, 2), fmt.gamma) if span < 1 << 20 else None
        if fmt.bits > 16 or wide is None:
            return None
        key = (fmt, low, span, first.param.dtype, first.param.device)
        if key not in self._tables:
            if len(self._tables) >= 16:
                self._tables.clear()
            values = formats.decode_table(wide, low, _table_dtype(first.param.dtype))[: span + 1]
            table = _to_torch(values, first.param.dtype).to(first.param.device)
            self._tables[key] = (low, table)
        return self._tables[key]

    # -- the update ---------------------------------------------------------------------------------

    def _multiply(
        self, bucket: _Bucket, block: _Block, scalars: _Scalars, scratch: _Scratch, count: bool
    ) -> int:
        group, first = bucket.group, block.entries[0].state
        fmt = LNSFormat(first["bits"], first["gamma"])
        flip = bool(group["sign_flip"])
        stochastic = group["rounding"] == "stochastic"
        assert_codes = block.codes
        if assert_codes is None:  # pragma: no cover - blocks of coded buckets carry codes
            raise BadValueError("a block of coded weights carries no codes")
        codes = assert_codes
        work = torch.float64 if fmt.bits > 16 else block.moment.dtype
        return 0

    def _multiply_single(self, bucket: _Bucket, entry: _Entry, scalars: _Scalars, count: bool) -> int:
        return 0
