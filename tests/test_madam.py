"""Madam and IntegerMadam against scalar arithmetic that shares no code with them (docs/madam.md)."""

from __future__ import annotations

import copy
import io
import math
import pickle
import warnings
from collections import Counter
from fractions import Fraction

import mpmath
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from lnsdeploy import formats
from lnsdeploy.errors import BadTypeError, BadValueError, LNSError, UnknownNameError, UnsupportedError
from lnsdeploy.formats import LNSFormat
from lnsdeploy.training import madam
from lnsdeploy.training.madam import IntegerMadam, Madam, MadamWarning

BOTH = pytest.mark.parametrize("optimizer", [Madam, IntegerMadam])
pytestmark = pytest.mark.filterwarnings("ignore::lnsdeploy.training.madam.MadamWarning")
PATHS = pytest.mark.parametrize("foreach", [None, False])


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def parameter(values, dtype=None):
    """A parameter of these values; float32 unless they are a tensor."""
    if dtype is None and not isinstance(values, torch.Tensor):
        dtype = torch.float32
    return torch.nn.Parameter(torch.as_tensor(values, dtype=dtype))


def matrix(*shape, seed=0, scale=0.1, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return parameter((torch.randn(*shape, generator=generator) * scale).to(dtype))


def gradient(p, seed, density=1.0):
    generator = torch.Generator().manual_seed(1000 + seed)
    values = torch.randn(p.shape, generator=generator)
    keep = torch.rand(p.shape, generator=generator) < density
    return (values * keep).to(p.dtype)


def step(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = None if g is None else torch.as_tensor(g, dtype=p.dtype)
    optimizer.step()


def ulps(a, b):
    """The largest distance, counted in floating-point numbers of the dtype."""
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]

    def ordered(x):
        bits = x.detach().contiguous().view(kind).to(torch.int64)
        return torch.where(bits < 0, -(bits & (2 ** (8 * x.element_size() - 1) - 1)), bits)

    return int((ordered(a) - ordered(b)).abs().max()) if a.numel() else 0


class Scalar:
    """One weight under Madam, in 50 digits, as the paper writes it."""

    def __init__(self, w, high, low=0, lr=0.03, beta=0.999, bound=10.0):
        self.w, self.high, self.low = mpmath.mpf(w), mpmath.mpf(high), mpmath.mpf(low)
        self.lr, self.beta, self.bound = mpmath.mpf(lr), mpmath.mpf(beta), mpmath.mpf(bound)
        self.v, self.t = mpmath.mpf(0), 0

    def normalised(self, g):
        g = mpmath.mpf(g)
        self.t += 1
        self.v = self.beta * self.v + (1 - self.beta) * g * g
        unbiased = self.v / (1 - self.beta**self.t)
        ghat = g / mpmath.sqrt(unbiased) if unbiased else mpmath.mpf(0)
        return max(-self.bound, min(self.bound, ghat))

    def multiply(self, g):
        ghat = self.normalised(g)
        sign = mpmath.sign(self.w)
        moved = abs(self.w) * mpmath.exp(-self.lr * ghat * sign)
        self.w = sign * max(self.low, min(self.high, moved))
        return self.w

    def add(self, g, scale):
        self.w -= self.lr * scale * self.normalised(g)
        return self.w


# ---------------------------------------------------------------------------------------------------
# Madam: the update


@pytest.mark.smoke
@PATHS
def test_first_step_moves_by_exactly_the_learning_rate(foreach):
    # ĝ = g/√g² = ±1 whatever the gradient's size, so the factors are e^(±0.03) = 1.0304545, 0.9704455
    w = parameter([[0.5, -0.5, 0.25], [-0.25, 0.125, 0.75]])
    step(Madam([w], lr=0.03, foreach=foreach), [w], [[[2.0, 2.0, -1e-3], [-1e-3, 40.0, 1e-6]]])
    down, up = 0.970445533548508, 1.030454533953517
    expected = [[0.5 * down, -0.5 * up, 0.25 * up], [-0.25 * down, 0.125 * down, 0.75 * down]]
    torch.testing.assert_close(w.detach(), torch.tensor(expected), rtol=3e-7, atol=0)


@PATHS
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 3e-6)])
@pytest.mark.parametrize("options", [{}, {"beta": 0.9, "lr": 0.9}, {"beta": 0.5, "g_bound": 0.7}])
def test_many_steps_against_fifty_digits(foreach, dtype, tolerance, options):
    w = matrix(3, 4, dtype=dtype)
    rms = mpmath.sqrt(sum(mpmath.mpf(x) ** 2 for x in w.detach().double().flatten().tolist()) / 12)
    names = {"beta": "beta", "lr": "lr", "g_bound": "bound"}
    scalars = [
        Scalar(x, 3 * rms, 3 * rms / 2**16, **{names[k]: v for k, v in options.items()})
        for x in w.detach().flatten().tolist()
    ]
    optimizer = Madam([w], foreach=foreach, **options)
    clipped = 0
    for number in range(12):
        grad = gradient(w, number, density=0.8) * 10.0 ** (number % 5 - 3)
        step(optimizer, [w], [grad])
        values = [float(s.multiply(g)) for s, g in zip(scalars, grad.flatten().tolist(), strict=True)]
        expected = torch.tensor(values, dtype=dtype)
        torch.testing.assert_close(w.detach().flatten(), expected, rtol=tolerance, atol=0)
        clipped += sum(s.w in (s.high, -s.high) for s in scalars)
    # the bound took part where it should, or this would not test it
    assert (clipped > 0) == ("lr" in options)


@PATHS
def test_gradient_is_bounded(foreach):
    # after 1000 zeros v̂ of a gradient 1 is 0.001/(1 − 0.999^1001) = 1/632, so g/√v̂ = 25.1 > 10
    w = parameter([[1.0, -1.0]])
    optimizer = Madam([w], lr=0.01, foreach=foreach)
    for _ in range(1000):
        step(optimizer, [w], [[[0.0, 0.0]]])
    assert w.tolist() == [[1.0, -1.0]]
    step(optimizer, [w], [[[1.0, 1.0]]])
    torch.testing.assert_close(w.detach(), torch.tensor([[math.exp(-0.1), -math.exp(0.1)]]), rtol=3e-7, atol=0)


@PATHS
@BOTH
def test_zero_and_vanishing_gradients_move_nothing(optimizer, foreach):
    w, b = matrix(5, 3), parameter([0.5, 0.25])
    opt = optimizer([w, b], foreach=foreach)
    before = w.detach().clone(), b.detach().clone()
    for value in (0.0, 1e-30, 1e-38, 0.0):
        step(opt, [w, b], [torch.full((5, 3), value), torch.full((2,), value)])
    assert torch.equal(w, before[0])
    torch.testing.assert_close(b.detach(), before[1], rtol=1e-7, atol=0)


@PATHS
def test_eps_is_the_least_denominator(foreach):
    # ĝ = 0.001/max(0.001, 0.004) = 1/4
    w = parameter([[0.5, -0.5]])
    step(Madam([w], lr=0.4, eps=0.004, foreach=foreach), [w], [[[0.001, 0.001]]])
    torch.testing.assert_close(
        w.detach(), torch.tensor([[0.5 * math.exp(-0.1), -0.5 * math.exp(0.1)]]), rtol=3e-7, atol=0
    )


@PATHS
def test_magnitudes_stop_at_the_clip(foreach):
    # RMS of (3, 4, 0, 0)/10 is 0.25: the clip is 0.5
    w = parameter([[0.3, 0.4], [0.1, -0.1]])
    w.data = torch.tensor([[0.3, 0.4], [0.0, 0.0]])
    optimizer = Madam([w], lr=0.2, p_scale=2.0, foreach=foreach)
    step(optimizer, [w], [[[-1.0, -1.0], [0.0, 0.0]]])
    assert w[0, 0].item() == pytest.approx(0.3 * math.exp(0.2))
    assert w[0, 1].item() == pytest.approx(0.4 * math.exp(0.2))
    for _ in range(20):
        step(optimizer, [w], [[[-1.0, -1.0], [0.0, 0.0]]])
    assert w.tolist() == [[0.5, 0.5], [0.0, 0.0]]


def test_the_clip_belongs_to_the_first_weights():
    w = parameter([[0.5, -0.5]])
    optimizer = Madam([w], lr=1.0, p_scale=2.0)
    for _ in range(9):
        step(optimizer, [w], [[[-1.0, 1.0]]])
    assert w.tolist() == [[1.0, -1.0]]


@PATHS
def test_p_max_replaces_p_scale(foreach):
    w = parameter([[0.5, -0.25]])
    step(Madam([w], lr=1.0, p_max=0.75, foreach=foreach), [w], [[[-1.0, 1.0]]])
    torch.testing.assert_close(w.detach(), torch.tensor([[0.75, -0.25 * math.e]]), rtol=3e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_clip_is_never_exceeded_by_rounding(dtype):
    w = parameter([[0.1, -0.1, 0.3]], dtype)
    rms = math.sqrt(sum(Fraction(x) ** 2 for x in w.detach().double().flatten().tolist()) / 3)
    optimizer = Madam([w], lr=1.0)
    for _ in range(5):
        step(optimizer, [w], [[[-1.0, 1.0, -1.0]]])
    assert 3 * rms * (1 - 2 * torch.finfo(dtype).eps) <= w.abs().max().item() <= 3 * rms


# ---------------------------------------------------------------------------------------------------
# Madam: zeros, signs, one dimension


@PATHS
@pytest.mark.parametrize("maximize", [False, True])
def test_zeros_wake_against_their_first_gradient(foreach, maximize):
    w = parameter([[0.0, 0.0, 0.0, -0.0, -0.0, 1.0]])
    optimizer = Madam([w], p_max=4.0, range_octaves=10, maximize=maximize, foreach=foreach)
    step(optimizer, [w], [[[2.0, -3.0, 0.0, 2.0, 0.0, 0.0]]])
    low, s = 4.0 / 1024, -1 if maximize else 1
    assert w.tolist() == [[-s * low, s * low, 0.0, -s * low, 0.0, 1.0]]
    step(optimizer, [w], [[[0.0, 0.0, -1e-5, 0.0, 1e-5, 0.0]]])
    assert w.tolist() == [[-s * low, s * low, s * low, -s * low, -s * low, 1.0]]
    # and once awake it moves like any other weight
    step(optimizer, [w], [[[2.0, 0.0, 0.0, 0.0, 0.0, 0.0]]])
    assert low < -s * w[0, 0].item() < 1.2 * low


@PATHS
def test_without_sign_flip_magnitudes_stop_at_the_floor(foreach):
    w = parameter([[1.0, -1.0]])
    optimizer = Madam([w], lr=0.5, p_max=1.0, range_octaves=2, foreach=foreach)
    for _ in range(8):
        step(optimizer, [w], [[[1.0, -1.0]]])
    assert w.tolist() == [[0.25, -0.25]]


@PATHS
def test_with_sign_flip_the_sign_changes_at_the_floor(foreach):
    # 1 → e^−½ = 0.607 → e^−1 = 0.368 → e^−1.5 = 0.223 < 0.25: −0.25, then growth away from zero
    w = parameter([[1.0, -1.0, 0.5]])
    optimizer = Madam([w], lr=0.5, p_max=1.0, range_octaves=2, sign_flip=True, foreach=foreach)
    seen = []
    for _ in range(4):
        step(optimizer, [w], [[[1.0, -1.0, 0.0]]])
        seen.append(w[0].tolist())
    assert seen[1] == pytest.approx([math.exp(-1), -math.exp(-1), 0.5])
    assert seen[2] == [-0.25, 0.25, 0.5]
    assert seen[3] == pytest.approx([-0.25 * math.exp(0.5), 0.25 * math.exp(0.5), 0.5])


def test_weights_below_the_floor_are_raised_to_it_and_keep_their_sign():
    w = parameter([[1e-30, -1e-30, 1e-44, 1.0]])
    step(Madam([w], p_max=1.0, range_octaves=4), [w], [[[0.0, 0.0, 0.0, 0.0]]])
    assert w.tolist() == [[1 / 16, -1 / 16, 1 / 16, 1.0]]


@PATHS
def test_one_dimension_moves_additively_by_default(foreach):
    b, s, w = parameter([0.0, 1.0, -2.0]), parameter(3.0), parameter([[1.0, 1.0]])
    optimizer = Madam([b, s, w], lr=0.5, additive_scale=0.25, g_bound=1.2, foreach=foreach)
    scalars = [Scalar(x, 99, lr=0.5, bound=1.2) for x in (0.0, 1.0, -2.0, 3.0)]
    for grads in ([1.0, -3.0, 0.0, 5.0], [-0.5, -3.0, 1.0, 0.1]):
        step(optimizer, [b, s, w], [grads[:3], grads[3], [[0.0, 0.0]]])
        expected = [float(x.add(g, 0.25)) for x, g in zip(scalars, grads, strict=True)]
        assert [*b.tolist(), s.item()] == pytest.approx(expected, rel=1e-6, abs=1e-7)
    assert expected[2] != -2.0


@pytest.mark.parametrize("foreach", [None, False])
def test_rules_can_be_chosen_by_group(foreach):
    b, w = parameter([0.5, -0.5]), parameter([[0.5, -0.5]])
    groups = [{"params": [b], "rule": "multiplicative"}, {"params": [w], "rule": "additive"}]
    step(Madam(groups, lr=0.1, additive_scale=0.5, foreach=foreach), [b, w], [[1.0, 1.0], [[1.0, 1.0]]])
    assert b.tolist() == pytest.approx([0.5 * math.exp(-0.1), -0.5 * math.exp(0.1)], rel=3e-7)
    assert w[0].tolist() == pytest.approx([0.45, -0.55], rel=3e-7)


def run(optimizer, w, steps, sign=1, **options):
    opt = optimizer([w], **options)
    for _ in range(steps):
        step(opt, [w], [sign * torch.ones_like(w)])
    return opt


@BOTH
def test_a_matrix_of_zeros_is_reported_and_still_trains(optimizer):
    w = parameter(torch.zeros(4, 8))
    with pytest.warns(MadamWarning, match=r"parameter 0 of group 0 \(shape \(4, 8\)\) is entirely zero"):
        opt = run(optimizer, w, 1)
    # He's bound, 3·√(2/8) = 1.5; the floor of both defaults is 16 octaves below
    assert w.flatten().tolist() == pytest.approx([-1.5 / 2**16] * 32, rel=2e-3)
    for _ in range(600):
        step(opt, [w], [torch.ones(4, 8)])
    assert w.flatten().tolist() == pytest.approx([-1.5] * 32, rel=1e-3)


@BOTH
def test_many_weights_at_the_clip_are_reported_once(optimizer):
    w = parameter(torch.linspace(0.5, 1.0, 100).view(10, 10))
    with pytest.warns(MadamWarning, match="% of the weights sit at their bound") as caught:
        run(optimizer, w, 64, sign=-1, p_max=1.0, lr=0.02)
    assert len(caught) == 1


@BOTH
@pytest.mark.parametrize(("number", "reported"), [(10, False), (11, True)])
def test_more_than_a_tenth_at_the_clip_is_too_many(optimizer, number, reported):
    w = parameter(torch.cat([torch.ones(number), torch.full((100 - number,), 0.25)]).view(10, 10))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(optimizer, w, 8, sign=0, p_max=1.0)
    assert [str(c.message)[:4] for c in caught] == ["11 %"] * reported


def test_maximize_mirrors_the_gradient():
    a, b = matrix(6, 5), matrix(6, 5)
    up, down = Madam([a], maximize=True), Madam([b])
    for number in range(4):
        g = gradient(a, number)
        step(up, [a], [g])
        step(down, [b], [-g])
    assert torch.equal(a, b)
    assert not torch.equal(a, matrix(6, 5))


# ---------------------------------------------------------------------------------------------------
# The two implementations


def model(dtype=torch.float32):
    """Large, small, one-dimensional, zero, strided and empty parameters."""
    params = [
        matrix(50, 30),
        matrix(7, 5),
        matrix(13),
        parameter(matrix(4, 3, 3, 3).detach().to(memory_format=torch.channels_last)),
        parameter(matrix(9, 6).detach().t()),
        parameter(matrix(8, 8).detach()[::2, 1::3]),
        matrix(40, 3, scale=1e-3),
        parameter(torch.zeros(0, 4)),
        parameter(0.5),
    ]
    params[1].data[0] = 0
    return [parameter(p.detach().to(dtype)) for p in params]


OPTIONS = [
    (Madam, {}),
    (Madam, {"sign_flip": True, "range_octaves": 2.0, "lr": 0.3}),
    (Madam, {"maximize": True, "range_octaves": 3.0, "lr": 0.3}),
    (Madam, {"rule": "additive"}),
    (Madam, {"rule": "multiplicative"}),
    (IntegerMadam, {}),
    (IntegerMadam, {"rounding": "nearest", "bits": 10, "gamma": 50}),
    (IntegerMadam, {"bits": 8, "gamma": 8, "sign_flip": True, "lr": 0.4}),
    (IntegerMadam, {"bits": 4, "gamma": 1, "maximize": True, "lr": 0.4}),
    (IntegerMadam, {"bits": 24, "gamma": 1 << 16}),
    (IntegerMadam, {"bits": 16, "gamma": 1 << 18, "init": "random"}),
    (IntegerMadam, {"bits": 2, "gamma": 1, "rule": "multiplicative"}),
]


@pytest.mark.parametrize("block", [64, 1 << 18])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("optimizer", "options"), OPTIONS)
def test_blocks_equal_tensor_by_tensor(monkeypatch, optimizer, options, dtype, block):
    """One unit in the last place is allowed, because other vector widths may treat remainders otherwise."""
    monkeypatch.setattr(madam, "_CPU_BLOCK", block)
    one, two = model(dtype), model(dtype)
    fast, plain = optimizer(one, **options), optimizer(two, foreach=False, **options)
    for number in range(5):
        grads = [gradient(p, number, density=0.7) for p in one]
        grads[number] = None
        step(fast, one, grads)
        step(plain, two, grads)
    for a, b in zip(one, two, strict=True):
        assert ulps(a, b) <= 1
        left, right = fast.state.get(a, {}), plain.state.get(b, {})
        assert left.keys() == right.keys()
        if "exp_avg_sq" in left:
            assert ulps(left["exp_avg_sq"], right["exp_avg_sq"]) <= 1
        if "codes" in left:
            assert torch.equal(left["codes"], right["codes"])


@pytest.mark.parametrize("block", [64, 1000, 1 << 18])
@pytest.mark.parametrize(("optimizer", "options"), OPTIONS)
def test_native_steps_equal_those_of_torch(monkeypatch, optimizer, options, block):
    """To the bit: weights, moments and codes, of single blocks and of packed ones."""
    monkeypatch.setattr(madam, "_CPU_BLOCK", block)
    one, two = model(torch.float32), model(torch.float32)
    fast, plain = optimizer(one, **options), optimizer(two, **options)
    available = madam._has_native()
    for number in range(4):
        grads = [gradient(p, number, density=0.7) for p in one]
        monkeypatch.setattr(madam, "_has_native", lambda: available)
        step(fast, one, grads)
        monkeypatch.setattr(madam, "_has_native", lambda: False)
        step(plain, two, grads)
    for a, b in zip(one, two, strict=True):
        assert torch.equal(a.view(torch.int32), b.view(torch.int32))
        left, right = fast.state[a], plain.state[b]
        assert all(torch.equal(left[k], right[k]) for k in ("exp_avg_sq", "codes") if k in left)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 40), st.integers(1, 9)), min_size=1, max_size=6),
    st.integers(1, 200),
    st.sampled_from([Madam, IntegerMadam]),
    st.booleans(),
    st.integers(0, 5),
)
def test_any_shapes_in_any_blocks_equal_tensor_by_tensor(shapes, block, optimizer, flip, seed):
    before, madam._CPU_BLOCK = madam._CPU_BLOCK, block
    try:
        one = [matrix(*shape, seed=seed + i) for i, shape in enumerate(shapes)]
        two = [parameter(p.detach().clone()) for p in one]
        fast = optimizer(one, lr=0.5, sign_flip=flip)
        plain = optimizer(two, lr=0.5, sign_flip=flip, foreach=False)
        for number in range(3):
            grads = [gradient(p, number, 0.9) for p in one]
            step(fast, one, grads)
            step(plain, two, grads)
    finally:
        madam._CPU_BLOCK = before
    assert all(ulps(a, b) <= 1 for a, b in zip(one, two, strict=True))


@BOTH
def test_calls_into_torch_do_not_grow_with_the_number_of_parameters(optimizer):
    class Count(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.seen = Counter()

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.seen[func.__name__.split(".")[0]] += 1
            return func(*args, **(kwargs or {}))

    counts = []
    for number in (2, 60):
        params = [matrix(6, 5, seed=i) for i in range(number)]
        opt = optimizer(params)
        step(opt, params, [gradient(p, 0) for p in params])
        with Count() as count:
            opt.step()
        # these touch no element
        del count.seen["view"], count.seen["slice"]
        counts.append(count.seen)
    assert counts[0] == counts[1]
    assert counts[0].total() < 60


# ---------------------------------------------------------------------------------------------------
# As a torch optimizer


@BOTH
def test_groups_have_their_own_options_also_when_added_later(optimizer):
    a, b, c = (parameter([[0.5, -0.25]]) for _ in range(3))
    opt = optimizer([{"params": [a], "lr": 0.5}, {"params": [b]}], lr=0.1, p_max=4.0)
    step(opt, [a, b], [[[1.0, 1.0]]] * 2)
    opt.add_param_group({"params": c, "lr": 0.7})
    step(opt, [a, b, c], [None, None, [[1.0, 1.0]]])
    for p, lr in ((a, 0.5), (b, 0.1), (c, 0.7)):
        expected = torch.tensor([[0.5 * math.exp(-lr), -0.25 * math.exp(lr)]])
        torch.testing.assert_close(p.detach(), expected, rtol=6e-4, atol=0)


@BOTH
@pytest.mark.parametrize("as_tensor", [False, True])
def test_schedulers_drive_the_learning_rate(optimizer, as_tensor):
    w = parameter([[0.5, 0.5]])
    opt = optimizer([w], lr=torch.tensor(0.4) if as_tensor else 0.4, p_max=4.0)
    schedule = torch.optim.lr_scheduler.MultiStepLR(opt, [1], gamma=0.25)
    for lr in (0.4, 0.1):
        before = w.detach().clone()
        step(opt, [w], [[[-1.0, -1.0]]])
        schedule.step()
        torch.testing.assert_close(w.detach(), before * math.exp(lr), rtol=6e-4, atol=0)


@BOTH
def test_closures_are_evaluated_with_gradients(optimizer):
    w = matrix(3, 3)
    opt = optimizer([w])
    before = w.detach().clone()

    def closure():
        opt.zero_grad()
        loss = (w * w).sum()
        loss.backward()
        return loss

    loss = opt.step(closure)
    assert loss.item() == pytest.approx((before**2).sum().item())
    assert (w.abs() < before.abs()).all()
    assert opt.step() is None


@BOTH
def test_parameters_without_gradient_are_left_alone(optimizer):
    a, b = matrix(3, 3), matrix(3, 3)
    opt = optimizer([a, b])
    kept = b.detach().clone()
    step(opt, [a, b], [torch.ones(3, 3), None])
    assert torch.equal(b, kept)
    assert opt.state[a]["step"] == 1
    assert opt.state.get(b, {}).get("step", 0) == 0
    # each parameter counts its own steps: the bias correction of b is that of a first step
    step(opt, [a, b], [None, torch.ones(3, 3)])
    torch.testing.assert_close(b.detach().abs().log(), kept.abs().log() - 0.03 * torch.sign(kept), rtol=0, atol=4e-4)


@BOTH
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_saved_state_continues_bit_for_bit(optimizer, dtype):
    def run(stop):
        params = model(dtype)
        opt = optimizer([{"params": params[:4], "lr": 0.2}, {"params": params[4:]}], sign_flip=True)
        for number in range(8):
            if number == stop:
                file = io.BytesIO()
                torch.save({"w": [p.detach() for p in params], "o": opt.state_dict()}, file)
                file.seek(0)
                saved = torch.load(file, weights_only=True)
                params = model(dtype)
                opt = optimizer([{"params": params[:4]}, {"params": params[4:]}])
                with torch.no_grad():
                    for p, w in zip(params, saved["w"], strict=True):
                        p.copy_(w if optimizer is Madam or p.ndim < 2 else torch.full_like(p, 0.5))
                opt.load_state_dict(saved["o"])
                assert [g["lr"] for g in opt.param_groups] == [0.2, 0.03]
            step(opt, params, [gradient(p, number) for p in params])
        return params, opt

    straight, first = run(None)
    resumed, second = run(5)
    for a, b in zip(straight, resumed, strict=True):
        assert torch.equal(a, b)
        assert first.state.get(a, {}).keys() == second.state.get(b, {}).keys()
        for key, value in first.state.get(a, {}).items():
            other = second.state[b][key]
            assert torch.equal(value, other) and value.dtype == other.dtype if key in TENSORS else value == other


TENSORS = ("exp_avg_sq", "codes")


@BOTH
def test_copies_and_pickles_go_on_alike(optimizer):
    w = matrix(6, 4)
    opt = optimizer([w])
    step(opt, [w], [gradient(w, 0)])
    results = []
    for duplicate in (copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        twin = duplicate(opt)
        (v,) = twin.param_groups[0]["params"]
        step(twin, [v], [gradient(w, 1)])
        results.append(v)
    step(opt, [w], [gradient(w, 1)])
    assert all(torch.equal(v, w) for v in results)


@BOTH
def test_training_lowers_the_loss(optimizer):
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(256, 8, generator=generator)
    y = (torch.tanh(x @ torch.randn(8, 3, generator=generator)) + 0.5).argmax(1)
    torch.manual_seed(0)
    net = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
    for layer in (net[0], net[2]):
        torch.nn.init.kaiming_normal_(layer.weight)
        torch.nn.init.zeros_(layer.bias)
    opt = optimizer(net.parameters())
    losses = []
    for _ in range(150):
        opt.zero_grad()
        loss = torch.nn.functional.cross_entropy(net(x), y)
        loss.backward()
        opt.step()
        losses.append(loss.item())
    assert losses[-1] < 0.1 * losses[0]
    assert net[0].bias.abs().min() > 0


# ---------------------------------------------------------------------------------------------------
# What is refused


@BOTH
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_bad_gradient_is_named_and_nothing_changes(optimizer, bad, dtype):
    params = [matrix(4, 3, dtype=dtype), matrix(5, dtype=dtype), matrix(2, 2, dtype=dtype)]
    opt = optimizer([{"params": params[:1]}, {"params": params[1:]}])
    step(opt, params, [gradient(p, 0) for p in params])
    before = copy.deepcopy(opt.state_dict()), [p.detach().clone() for p in params]
    grads = [gradient(p, 1) for p in params]
    grads[2][1, 0] = bad
    with pytest.raises(
        BadValueError, match=r"parameter 1 of group 1 \(shape \(2, 2\)\) contains NaN or infinity in 1 of 4"
    ):
        step(opt, params, grads)
    assert all(torch.equal(p, q) for p, q in zip(params, before[1], strict=True))
    for key, values in opt.state_dict()["state"].items():
        for name, value in values.items():
            old = before[0]["state"][key][name]
            assert torch.equal(value, old) if isinstance(value, torch.Tensor) else value == old


def test_names_of_parameters_appear_in_messages():
    net = torch.nn.Linear(3, 2)
    try:
        opt = Madam(net.named_parameters())
    except (TypeError, ValueError):  # pragma: no cover - torch before 2.6
        pytest.skip("this torch does not take named parameters")
    with pytest.raises(BadValueError, match="'bias'"):
        step(opt, [net.weight, net.bias], [torch.ones(2, 3), torch.tensor([0.0, math.nan])])


def test_a_gradient_whose_square_overflows_is_refused():
    w = matrix(2, 2)
    opt = Madam([w])
    with pytest.raises(BadValueError, match=r"too large: its squares overflow torch\.float32"):
        step(opt, [w], [torch.full((2, 2), 1e30)])
    assert torch.equal(w, matrix(2, 2))
    half = matrix(2, 2, dtype=torch.float16)
    step(Madam([half]), [half], [torch.full((2, 2), 6e4)])
    assert not torch.equal(half, matrix(2, 2, dtype=torch.float16))


@BOTH
def test_a_sparse_gradient_is_refused(optimizer):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    opt = optimizer(embedding.parameters())
    before = embedding.weight.detach().clone()
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(UnsupportedError, match=r"group 0.*is sparse.*to_dense"):
        opt.step()
    assert torch.equal(embedding.weight, before)


@BOTH
@pytest.mark.parametrize("dtype", [torch.complex64, torch.int32])
def test_parameters_of_other_dtypes_are_refused(optimizer, dtype):
    w = torch.zeros(2, 2, dtype=dtype)
    with pytest.raises(BadTypeError, match=f"parameter 0 of group 0 .* is {dtype}"):
        optimizer([w])


@BOTH
@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"lr": -0.1}, BadValueError, "lr must be a finite number that is not negative, not -0.1"),
        ({"lr": math.nan}, BadValueError, "lr must be a finite number"),
        ({"lr": "fast"}, BadTypeError, "lr must be a number, not 'fast'"),
        ({"lr": torch.ones(2)}, BadValueError, "lr must have one element"),
        ({"beta": 1.0}, BadValueError, "beta must be at least 0 and below 1.0, not 1.0"),
        ({"eps": -1e-9}, BadValueError, "eps must be at least 0"),
        ({"g_bound": 0}, BadValueError, "g_bound must be positive and finite, not 0"),
        ({"p_scale": math.inf}, BadValueError, "p_scale must be positive and finite, not inf"),
        ({"additive_scale": -1}, BadValueError, "additive_scale must be positive"),
        ({"p_max": 0.0}, BadValueError, "p_max must be a positive number or None, not 0.0"),
        ({"rule": "multiply"}, UnknownNameError, "did you mean 'multiplicative'"),
    ],
)
def test_options_out_of_range_are_refused(optimizer, options, kind, message):
    with pytest.raises(kind, match=message):
        optimizer([matrix(2, 2)], **options)
    opt = optimizer([matrix(2, 2)])
    with pytest.raises(kind, match=f"group 1.*{message}|{message}"):
        opt.add_param_group({"params": [matrix(2, 2)], **options})
    assert len(opt.param_groups) == 1


@pytest.mark.parametrize(
    ("optimizer", "options", "kind", "message"),
    [
        (Madam, {"range_octaves": 0}, BadValueError, "range_octaves must be above 0 and at most 100"),
        (IntegerMadam, {"bits": 1}, BadValueError, "bits must be from 2 to 32, not 1"),
        (IntegerMadam, {"gamma": 0}, BadValueError, "gamma must be from 1 to"),
        (IntegerMadam, {"rounding": "stochastically"}, UnknownNameError, "did you mean 'stochastic'"),
        (IntegerMadam, {"init": "rand"}, UnknownNameError, "did you mean 'random'"),
        (IntegerMadam, {"seed": 0.5}, BadTypeError, "seed must be an integer, not 0.5"),
    ],
)
def test_options_of_one_optimizer_are_checked(optimizer, options, kind, message):
    with pytest.raises(kind, match=message):
        optimizer([matrix(2, 2)], **options)


@BOTH
def test_a_learning_rate_that_turns_bad_stops_the_step(optimizer):
    w = matrix(2, 2)
    opt = optimizer([w])
    before = w.detach().clone()
    opt.param_groups[0]["lr"] = math.inf
    with pytest.raises(BadValueError, match="parameter group 0: lr"):
        step(opt, [w], [torch.ones(2, 2)])
    assert torch.equal(w, before)


@BOTH
def test_weights_that_are_not_finite_are_refused(optimizer):
    w = matrix(2, 2)
    w.data[0, 0] = math.nan
    with pytest.raises(BadValueError, match=r"parameter 0 of group 0.*contains NaN or infinity"):
        run(optimizer, w, 1)


def damaged(state, **changes):
    state = copy.deepcopy(state)
    for key, value in changes.items():
        state["state"][0][key] = value
    return state


@BOTH
def test_states_of_something_else_are_refused(optimizer):
    w = matrix(3, 2)
    opt = optimizer([w])
    step(opt, [w], [torch.ones(3, 2)])
    good = opt.state_dict()
    adam = torch.optim.Adam([matrix(3, 2)]).state_dict()
    other = (IntegerMadam if optimizer is Madam else Madam)([matrix(3, 2)]).state_dict()
    two = optimizer([matrix(3, 2), matrix(3, 2)]).state_dict()
    bad_group = copy.deepcopy(good)
    bad_group["param_groups"][0]["beta"] = 7.0
    cases = [
        ({}, "not the state of an optimizer"),
        (adam, f"not the state of {optimizer.__name__}: its groups lack"),
        (other, f"not the state of {optimizer.__name__}: its groups lack"),
        (two, r"parameter groups of \[2\] tensors, this optimizer of \[1\]"),
        (bad_group, "beta must be at least 0"),
        (damaged(good, exp_avg_sq=torch.zeros(2, 3)), r"shape \(2, 3\), the parameter needs .*\(3, 2\)"),
        (damaged(good, exp_avg_sq=torch.zeros(3, 2).half()), "second moment of torch.float16"),
        (damaged(good, exp_avg_sq=-torch.ones(3, 2)), "negative, infinite or NaN"),
        (damaged(good, exp_avg_sq=torch.full((3, 2), math.nan)), "negative, infinite or NaN"),
        (damaged(good, step=-1), "step or exp_avg_sq is missing"),
        (damaged(good, exp_avg_sq=None), "step or exp_avg_sq is missing"),
    ]
    if optimizer is Madam:
        cases += [(damaged(good, clip_max=-1.0), "clip_max must be a positive number")]
    else:
        missing = copy.deepcopy(good)
        del missing["state"][0]
        floats = copy.deepcopy(good)
        del floats["state"][0]["codes"]
        cases += [
            (missing, "no codes for parameter 0 of group 0"),
            (floats, "has no codes, this optimizer updates that parameter by the other rule"),
            (damaged(good, codes=torch.zeros(3, 2)), "codes of torch.float32"),
            (damaged(good, codes=torch.full((3, 2), -32768, dtype=torch.int16)), "codes beyond ±32767"),
            (damaged(good, offset=None), "lacks codes, bits, gamma, compute_bits, offset or position"),
            (damaged(good, offset=1 << 40), "offset or position out of range"),
            (damaged(good, bits=99), "bits must be from 2 to 32"),
        ]
    for state, message in cases:
        with pytest.raises(LNSError, match=message):
            opt.load_state_dict(state)
        assert all(
            torch.equal(v, good["state"][0][k]) if k in TENSORS else v == good["state"][0][k]
            for k, v in opt.state_dict()["state"][0].items()
        )


# ---------------------------------------------------------------------------------------------------
# IntegerMadam: codes


def codes_of(optimizer, p):
    return optimizer.state[p]["codes"].tolist()


@pytest.mark.smoke
def test_initial_weights_become_their_nearest_codes():
    # 8:8 with a largest value of 1: C = 127 is 2^0, so |w| = 2^((k − 127)/8) and the least is 2^−15.75
    w = parameter([[1.0, 0.5, -(2.0**-1.5), 0.0], [3.0, 1e-9, -1e-9, 2.0**-0.06]])
    optimizer = IntegerMadam([w], bits=8, gamma=8, p_max=1.0)
    assert codes_of(optimizer, w) == [[127, 119, -115, 0], [127, 1, -1, 127]]
    tiny = np.float32(2.0**-15.75)
    assert w.tolist() == [[1.0, 0.5, np.float32(-(2.0**-1.5)), 0.0], [1.0, tiny, -tiny, 1.0]]
    assert optimizer.state[w]["codes"].dtype == torch.int16
    assert optimizer.state[w]["offset"] == -127


@pytest.mark.parametrize(("bits", "gamma"), [(8, 8), (16, 2048), (5, 3), (12, 100)])
def test_the_largest_code_is_the_first_that_reaches_the_bound(bits, gamma):
    w = matrix(20, 10)
    squares = [Fraction(x) ** 2 for x in w.detach().flatten().tolist()]
    optimizer = IntegerMadam([w], bits=bits, gamma=gamma)
    top = optimizer.state[w]["offset"] + 2 ** (bits - 1) - 1
    with mpmath.workdps(40):
        bound = 3 * mpmath.sqrt(mpmath.mpf(sum(squares).numerator) / sum(squares).denominator / 200)
        assert mpmath.power(2, mpmath.mpf(top - 1) / gamma) < bound <= mpmath.power(2, mpmath.mpf(top) / gamma)


@PATHS
def test_nearest_steps_are_whole_codes(foreach):
    # one step of ĝ = ±1 is 0.3·8/ln 2 = 3.46 codes, so 3; then v̂ = (0.999·g² + 0)/(1 − 0.999²)·0.001 …
    w = parameter([[1.0, 0.5, -0.5, -0.25, 0.125, 2.0**-15.75]])
    optimizer = IntegerMadam([w], lr=0.3, bits=8, gamma=8, rounding="nearest", p_max=1.0, foreach=foreach)
    assert codes_of(optimizer, w) == [[127, 119, -119, -111, 103, 1]]
    step(optimizer, [w], [[[1.0, -1.0, 1.0, -1.0, 0.0, 1.0]]])
    assert codes_of(optimizer, w) == [[124, 122, -122, -108, 103, 1]]
    assert w[0].tolist() == [
        np.float32(s * 2.0 ** ((k - 127) / 8))
        for s, k in zip((1, 1, -1, -1, 1, 1), (124, 122, 122, 108, 103, 1), strict=True)
    ]
    # the fifth weight's first gradient comes at step 2: ĝ = 1/√(0.001/0.001999) = 1.41386, 4.895 codes: 5
    step(optimizer, [w], [[[-9.0, -9.0, 0.0, 0.0, 1.0, -1.0]]])
    # 9/√((0.999·0.001 + 0.001·81)/0.001999) = 1.40522: 4.865 codes: 5; the last is again at ĝ = −1: 3
    assert codes_of(optimizer, w) == [[127, 127, -122, -108, 98, 4]]


@PATHS
def test_long_runs_of_integers_follow_scalar_arithmetic(foreach):
    """Codes against exact integers and 50-digit steps, the random bytes being those of datapath.md 2.3."""
    w = matrix(6, 7, seed=4)
    optimizer = IntegerMadam([w], lr=0.05, bits=7, gamma=12, seed=11, sign_flip=True, p_max=0.4, foreach=foreach)
    codes = optimizer.state[w]["codes"].flatten().tolist()
    scalars = [Scalar(0, 1) for _ in codes]
    flips = 0
    for number in range(1, 41):
        grad = gradient(w, number // 8, density=0.9)
        step(optimizer, [w], [grad])
        draws = formats.random_bytes(11, number, 42).tolist()
        for i, g in enumerate(grad.flatten().tolist()):
            sign = (codes[i] > 0) - (codes[i] < 0)
            shrink = mpmath.mpf(0.05) * 12 / mpmath.log(2) * scalars[i].normalised(g) * sign
            wanted = abs(codes[i]) - ((int(mpmath.nint(256 * shrink)) + draws[i]) >> 8)
            flips += wanted < 1
            sign = -sign if wanted < 1 else sign
            codes[i] = sign * max(1, min(63, wanted))
        assert optimizer.state[w]["codes"].flatten().tolist() == codes, number
    assert flips > 3
    assert any(abs(k) == 63 for k in codes)


def test_stochastic_rounding_is_unbiased_and_nearest_loses_small_steps():
    # a step of 0.003·8/ln 2 = 0.03462 codes: nearest never moves
    lr, shrink = 0.003, 0.003 * 8 / math.log(2)
    still, moving = parameter(torch.full((200, 100), 0.5)), parameter(torch.full((200, 100), 0.5))
    nearest = IntegerMadam([still], lr=lr, bits=8, gamma=8, p_max=1.0, rounding="nearest")
    stochastic = IntegerMadam([moving], lr=lr, bits=8, gamma=8, p_max=1.0, seed=5)
    steps = 20
    for _ in range(steps):
        step(nearest, [still], [torch.ones(200, 100)])
        step(stochastic, [moving], [torch.ones(200, 100)])
    assert (nearest.state[still]["codes"] == 119).all()
    moved = 119 - stochastic.state[moving]["codes"].double()
    # each step moves a code by one with probability 9/256, the nearest 256th to 0.03462
    probability = round(256 * shrink) / 256
    deviation = math.sqrt(steps * probability * (1 - probability) / 20000)
    assert abs(moved.mean().item() - steps * probability) < 4 * deviation
    assert abs(moved.var().item() / (steps * probability * (1 - probability)) - 1) < 0.05


def test_growing_steps_are_unbiased_too():
    w = parameter(torch.full((200, 100), 0.5))
    optimizer = IntegerMadam([w], lr=0.1, bits=8, gamma=8, p_max=1.0)
    step(optimizer, [w], [-torch.ones(200, 100)])
    # 0.1·8/ln 2 = 1.15416 codes, as 295/256
    grown = optimizer.state[w]["codes"].double() - 119
    assert set(grown.unique().tolist()) == {1.0, 2.0}
    fraction = 295 / 256 - 1
    assert abs(grown.mean().item() - 295 / 256) < 4 * math.sqrt(fraction * (1 - fraction) / 20000)


def test_random_bits_depend_on_seed_step_and_position_only():
    def run(shapes, seed=0):
        params = [parameter(torch.full(shape, 0.5)) for shape in shapes]
        # a float parameter in between takes no random bits
        params.insert(1, parameter([0.5]))
        optimizer = IntegerMadam(params, bits=8, gamma=8, p_max=1.0, seed=seed)
        history = []
        for _ in range(3):
            step(optimizer, params, [torch.ones_like(p) for p in params])
            history.append(torch.cat([optimizer.state[p]["codes"].flatten() for p in params if p.ndim > 1]))
        return torch.stack(history)

    split = run([(10, 5), (7, 3), (1, 29)])
    assert torch.equal(split, run([(20, 5)]))
    assert not torch.equal(split, run([(20, 5)], seed=1))
    assert not torch.equal(split[1] - split[0], split[2] - split[1])


@PATHS
@pytest.mark.parametrize("maximize", [False, True])
def test_zero_codes_wake_against_their_first_gradient(foreach, maximize):
    w = parameter([[0.0, 0.0, 0.0, 1.0, 0.5]])
    optimizer = IntegerMadam([w], bits=8, gamma=8, p_max=1.0, rounding="nearest", maximize=maximize, foreach=foreach)
    s = -1 if maximize else 1
    step(optimizer, [w], [[[3.0, -3.0, 0.0, 0.0, 0.0]]])
    assert codes_of(optimizer, w) == [[-s, s, 0, 127, 119]]
    assert w[0, 2].item() == 0.0
    step(optimizer, [w], [[[0.0, 0.0, 1e-6, 0.0, 0.0]]])
    assert codes_of(optimizer, w) == [[-s, s, -s, 127, 119]]


@PATHS
@pytest.mark.parametrize("sign_flip", [False, True])
def test_codes_at_the_floor_stop_or_flip(foreach, sign_flip):
    w = parameter([[2.0**-3, -(2.0**-3), 1.0]])
    optimizer = IntegerMadam(
        [w], lr=0.3, bits=5, gamma=4, p_max=1.0, rounding="nearest", sign_flip=sign_flip, foreach=foreach
    )
    # C = 15 is 1, so 2^−3 is code 3; steps are 0.3·4/ln 2 = 1.73 codes: 2
    assert codes_of(optimizer, w) == [[3, -3, 15]]
    step(optimizer, [w], [[[1.0, -1.0, 0.0]]])
    assert codes_of(optimizer, w) == [[1, -1, 15]]
    step(optimizer, [w], [[[1.0, -1.0, 0.0]]])
    assert codes_of(optimizer, w) == ([[-1, 1, 15]] if sign_flip else [[1, -1, 15]])
    step(optimizer, [w], [[[1.0, -1.0, 0.0]]])
    assert codes_of(optimizer, w) == ([[-3, 3, 15]] if sign_flip else [[1, -1, 15]])


def test_a_step_larger_than_the_range_reaches_the_ends():
    w = parameter([[0.5, -0.5]])
    optimizer = IntegerMadam([w], lr=1e6, p_max=1.0)
    step(optimizer, [w], [[[1.0, 1.0]]])
    assert codes_of(optimizer, w) == [[1, -32767]]


@pytest.mark.parametrize(("bits", "gamma"), [(8, 8), (16, 2048), (20, 10000), (30, 1 << 24)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parameters_are_the_correctly_rounded_values_of_their_codes(bits, gamma, dtype):
    params = [matrix(9, 5, dtype=dtype), matrix(30, 4, scale=3.0, dtype=dtype), matrix(3, dtype=dtype)]
    optimizer = IntegerMadam(params, bits=bits, gamma=gamma)
    for number in range(3):
        step(optimizer, params, [gradient(p, number) for p in params])
        for p in params[:2]:
            state = optimizer.state[p]
            with mpmath.workdps(60):
                exact = [
                    mpmath.sign(k) * mpmath.power(2, mpmath.mpf(abs(k) + state["offset"]) / gamma)
                    for k in state["codes"].flatten().tolist()
                ]
            kind = np.float32 if dtype == torch.float32 else np.float64
            for value, want in zip(p.detach().flatten().tolist(), exact, strict=True):
                gap = abs(mpmath.mpf(value) - want)
                for neighbour in (np.nextafter(kind(value), kind(s * math.inf)) for s in (1, -1)):
                    assert gap <= abs(mpmath.mpf(float(neighbour)) - want)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_parameters_are_rounded_once(dtype):
    w = matrix(40, 25, dtype=dtype)
    optimizer = IntegerMadam([w], bits=16, gamma=4096)
    step(optimizer, [w], [gradient(w, 0)])
    state = optimizer.state[w]
    values = w.detach().double().flatten().tolist()
    up = torch.nextafter(w.detach(), torch.full_like(w, math.inf)).double().flatten().tolist()
    down = torch.nextafter(w.detach(), torch.full_like(w, -math.inf)).double().flatten().tolist()
    with mpmath.workdps(40):
        for k, value, a, b in zip(state["codes"].flatten().tolist(), values, up, down, strict=True):
            exact = mpmath.sign(k) * mpmath.power(2, mpmath.mpf(abs(k) + state["offset"]) / 4096)
            assert abs(value - exact) <= min(abs(a - exact), abs(b - exact))


def test_the_state_holds_no_float_weights():
    params = [matrix(30, 20), matrix(20)]
    optimizer = IntegerMadam(params)
    step(optimizer, params, [gradient(p, 0) for p in params])
    for p in params:
        tensors = {k: v for k, v in optimizer.state[p].items() if isinstance(v, torch.Tensor)}
        floats = [k for k, v in tensors.items() if v.is_floating_point()]
        assert floats == ["exp_avg_sq"]
        assert (tensors.keys() == {"exp_avg_sq", "codes"}) == (p.ndim > 1)
    held = [v for v in vars(optimizer).values() if isinstance(v, torch.Tensor)]
    assert not held
    assert optimizer.state[params[0]]["codes"].dtype == torch.int16
    wide = IntegerMadam([matrix(3, 3)], bits=17, gamma=4096)
    assert next(iter(wide.state.values()))["codes"].dtype == torch.int32


def test_the_parameter_itself_has_no_memory():
    """Only the codes carry a weight from step to step."""
    one, two = matrix(12, 5), matrix(12, 5)
    first, second = IntegerMadam([one]), IntegerMadam([two])
    for number in range(4):
        step(first, [one], [gradient(one, number)])
        two.data.fill_(7.0)
        step(second, [two], [gradient(one, number)])
    assert torch.equal(one, two)


def test_random_codes_are_uniform_and_keep_signs():
    w = matrix(200, 200, seed=9)
    w.data[0, :3] = 0
    signs = torch.sign(w.detach())
    optimizer = IntegerMadam([w], bits=5, gamma=3, init="random")
    codes = optimizer.state[w]["codes"]
    assert torch.equal(torch.sign(codes.float()), signs)
    counts = torch.bincount(codes.abs().flatten().long())[1:].double()
    assert len(counts) == 15
    # χ² with 14 degrees of freedom exceeds 36 once in a thousand
    assert (((counts - counts.mean()) ** 2) / counts.mean()).sum().item() < 36
    assert torch.equal(torch.sign(w.detach()), signs)
    again, other = matrix(200, 200, seed=9), matrix(200, 200, seed=9)
    again.data[0, :3] = other.data[0, :3] = 0
    assert torch.equal(IntegerMadam([again], bits=5, gamma=3, init="random").state[again]["codes"], codes)
    different = IntegerMadam([other], bits=5, gamma=3, init="random", seed=1).state[other]["codes"]
    assert (different != codes).double().mean().item() > 0.8


def test_random_codes_of_two_tensors_differ():
    params = [parameter(torch.ones(20, 20)) for _ in range(2)]
    optimizer = IntegerMadam(params, init="random")
    first, second = (optimizer.state[p]["codes"] for p in params)
    assert (first != second).double().mean() > 0.9


def test_lns_tensors_are_the_weights():
    params = [matrix(6, 4), matrix(4), parameter([[0.0, 1.0]])]
    optimizer = IntegerMadam([{"params": params[:2]}, {"params": params[2:], "bits": 5, "gamma": 2}])
    step(optimizer, params, [gradient(params[0], 0), gradient(params[1], 0), torch.zeros(1, 2)])
    words = optimizer.lns_tensors()
    assert words[1] is None
    assert [str(words[i].format) for i in (0, 2)] == ["16:2048", "5:2"]
    for tensor, p in ((words[0], params[0]), (words[2], params[2])):
        assert np.array_equal(tensor.decode(), p.detach().numpy())
    assert words[2].words.tolist() == [[0, optimizer.state[params[2]]["codes"][0, 1].item()]]


def test_encode_parameters_takes_outside_changes():
    w, b = matrix(8, 6), matrix(6)
    optimizer = IntegerMadam([w, b], bits=10, gamma=32)
    step(optimizer, [w, b], [gradient(w, 0), gradient(b, 0)])
    before = optimizer.state[w]["codes"].clone()
    optimizer.encode_parameters()
    assert torch.equal(optimizer.state[w]["codes"], before)
    values = matrix(8, 6, seed=7).detach() * 2
    with torch.no_grad():
        w.copy_(values)
    optimizer.encode_parameters()
    fmt, offset = LNSFormat(10, 32), optimizer.state[w]["offset"]
    expected = formats.encode(values.numpy(), fmt, offset, underflow="min")
    assert np.array_equal(optimizer.lns_tensors()[0].words, expected)
    assert np.array_equal(w.detach().numpy(), formats.decode(expected, fmt, offset))
    with torch.no_grad():
        w.copy_(16 * values)
    optimizer.encode_parameters(recalibrate=True)
    assert optimizer.state[w]["offset"] > offset
    torch.testing.assert_close(w.detach(), 16 * values, rtol=0.02, atol=0)
    with torch.no_grad():
        w[0, 0] = math.nan
    kept = optimizer.state[w]["codes"].clone()
    with pytest.raises(BadValueError, match="contains NaN or infinity"):
        optimizer.encode_parameters()
    assert torch.equal(optimizer.state[w]["codes"], kept)


def test_loading_decodes_the_codes():
    a, b = matrix(5, 5), matrix(5, 5, seed=1)
    source, target = IntegerMadam([a]), IntegerMadam([b], bits=8, gamma=8)
    target.load_state_dict(source.state_dict())
    assert torch.equal(a, b)
    assert str(target.lns_tensors()[0].format) == "16:2048"
    # a state is copied, not shared
    step(target, [b], [torch.ones(5, 5)])
    assert not torch.equal(a, b)
    assert torch.equal(source.state[a]["codes"], IntegerMadam([matrix(5, 5)]).state_dict()["state"][0]["codes"])


def test_a_state_may_mix_formats_within_a_group():
    results = []
    for foreach in (None, False):
        params = [matrix(5, 4), matrix(4, 4, seed=1)]
        state = IntegerMadam([matrix(5, 4), matrix(4, 4)]).state_dict()
        coarse = IntegerMadam([matrix(5, 4), matrix(4, 4, seed=1)], bits=8, gamma=8).state_dict()
        state["state"][1] = coarse["state"][1]
        optimizer = IntegerMadam(params, foreach=foreach)
        optimizer.load_state_dict(state)
        optimizer.param_groups[0]["foreach"] = foreach
        for number in range(3):
            step(optimizer, params, [gradient(p, number) for p in params])
        assert [str(x.format) for x in optimizer.lns_tensors()] == ["16:2048", "8:8"]
        assert optimizer.state[params[1]]["codes"].abs().max() <= 127
        results.append(torch.cat([p.detach().flatten() for p in params]))
    assert torch.equal(*results)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(2, 20),
    st.integers(1, 5000),
    st.floats(1e-4, 10.0),
    st.sampled_from(["stochastic", "nearest"]),
    st.booleans(),
    st.integers(0, 3),
)
def test_codes_stay_in_range_and_signs_change_only_by_flipping(bits, gamma, lr, rounding, flip, seed):
    w = matrix(7, 6, seed=seed)
    optimizer = IntegerMadam([w], lr=lr, bits=bits, gamma=gamma, rounding=rounding, sign_flip=flip)
    for number in range(4):
        before = optimizer.state[w]["codes"].clone()
        step(optimizer, [w], [gradient(w, number)])
        codes = optimizer.state[w]["codes"]
        assert 1 <= int(codes.abs().min()) <= int(codes.abs().max()) <= 2 ** (bits - 1) - 1
        changed = torch.sign(codes) != torch.sign(before)
        assert flip or not changed.any()
        assert (codes[changed].abs() == 1).all()
        against = torch.sign(w.grad) == -torch.sign(codes)
        assert against[changed].all()
