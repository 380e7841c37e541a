"""Convolution by explicit loops (spec 7.1): one to three axes, groups, strides, pads, dilations."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lnsdeploy.datapath import LinearAccumulator, LogAccumulator
from lnsdeploy.emulator.plan import Window
from lnsdeploy.errors import BadValueError
from tests import strategies
from tests.cases import oracle_convolution
from tests.conformance import stages

LINEAR = LinearAccumulator(bits=14, table_bits=3, constant_bits=6, lanes=2, overflow="saturate")
LOG = LogAccumulator(bits=9, guard_bits=1, lanes=3)


def _words(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    """Words within two octaves, a tenth of them zero."""
    words = rng.integers(48, 66, shape) | (rng.integers(0, 2, shape) << 7)
    return np.where(rng.random(shape) < 0.1, 0, words).astype(np.uint8)


def _plan(part: LinearAccumulator | LogAccumulator, channels: int) -> Any:
    nudge = np.arange(channels) % 5 - 2
    if isinstance(part, LinearAccumulator):
        return stages.plan(stages.datapath(part), lsb=9, weight_offset=nudge, output_offset=70)
    return stages.plan(stages.datapath(part), acc_offset=60 - nudge, weight_offset=nudge, output_offset=60)


GEOMETRIES = {
    "1d": ((2, 3, 9), (4, 3, 3), Window((3,)), 1),
    "1d-strided-padded": ((1, 2, 8), (3, 2, 3), Window((3,), (2,), (1, 2)), 1),
    "1d-dilated-groups": ((2, 4, 9), (6, 2, 2), Window((2,), (1,), (0, 0), (3,)), 2),
    "2d": ((1, 2, 5, 6), (3, 2, 3, 2), Window((3, 2)), 1),
    "2d-everything": ((2, 4, 6, 5), (4, 2, 2, 3), Window((2, 3), (2, 1), (1, 0, 2, 2), (2, 2)), 2),
    "2d-depthwise": ((1, 3, 4, 4), (6, 1, 3, 3), Window((3, 3), (1, 1), (1, 1, 1, 1)), 3),
    "2d-pointwise": ((2, 5, 3, 2), (2, 5, 1, 1), Window((1, 1)), 1),
    "3d": ((1, 2, 3, 4, 3), (2, 2, 2, 2, 2), Window((2, 2, 2), (1, 2, 1), (0, 1, 0, 1, 0, 1)), 1),
    "pads-larger-than-the-kernel": ((1, 1, 2), (1, 1, 2), Window((2,), (1,), (3, 3)), 1),
    "no-images": ((0, 2, 4), (3, 2, 2), Window((2,)), 1),
    "no-channels-out": ((1, 2, 4), (0, 2, 2), Window((2,)), 1),
    "no-channels-in": ((1, 0, 4), (2, 0, 2), Window((2,)), 1),
}


@pytest.mark.parametrize("part", [LINEAR, LOG], ids=["linear", "log"])
@pytest.mark.parametrize("geometry", GEOMETRIES.values(), ids=GEOMETRIES)
def test_geometries(executor: Any, geometry: Any, part: LinearAccumulator | LogAccumulator) -> None:
    """spec 7.1: the order of the reduction, and padding as the zero word, with offsets per output channel."""
    x_shape, w_shape, window, groups = geometry
    rng = np.random.default_rng(len(x_shape))
    x, w = _words(rng, x_shape), _words(rng, w_shape)
    plan = _plan(part, w_shape[0])
    scale = 40 if isinstance(part, LinearAccumulator) else 90
    bias = rng.integers(0, scale, w_shape[0])
    for start in (None, bias):
        got = executor.convolution(x, w, start, plan, window, groups)
        np.testing.assert_array_equal(got, oracle_convolution(x, w, start, plan, window, groups))


@given(st.data())
@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_convolution(each_executor: Any, data: st.DataObject) -> None:
    """spec 7.1 with any geometry, datapath and plan."""
    axes = data.draw(st.integers(1, 3))
    spatial, window = data.draw(strategies.geometries(axes))
    groups = data.draw(st.integers(1, 2))
    channels = groups * data.draw(st.integers(1, 2))
    inputs = data.draw(st.integers(1, 2))
    plan = data.draw(strategies.dot_plans(channels))
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
    x = rng.integers(0, 1 << plan.activation.bits, (1, groups * inputs, *spatial)).astype(plan.activation.dtype)
    w = rng.integers(0, 1 << plan.weight.bits, (channels, inputs, *window.kernel)).astype(plan.weight.dtype)
    bias = data.draw(strategies.biases(plan, channels))
    want = oracle_convolution(x, w, bias, plan, window, groups)

    def check(executor: Any) -> None:
        np.testing.assert_array_equal(executor.convolution(x, w, bias, plan, window, groups), want)

    each_executor(check)


def test_layout_does_not_matter(executor: Any) -> None:
    rng = np.random.default_rng(0)
    x, w = _words(rng, (2, 4, 6, 5)), _words(rng, (4, 2, 2, 3))
    window = Window((2, 3), (2, 1), (1, 0, 2, 2))
    plan = _plan(LOG, 4)
    want = executor.convolution(x, w, None, plan, window, 2)
    for view in (np.asfortranarray(x), np.repeat(x, 2, axis=3)[..., ::2], x[::-1][::-1]):
        np.testing.assert_array_equal(executor.convolution(view, w, None, plan, window, 2), want)
    np.testing.assert_array_equal(executor.convolution(x, np.asfortranarray(w), None, plan, window, 2), want)


@pytest.mark.smoke
def test_a_convolution_over_the_whole_input_is_a_dot_product(executor: Any) -> None:
    """spec 7.1: (C_in, kH, kW) flattened in C order."""
    rng = np.random.default_rng(1)
    x, w = _words(rng, (3, 2, 3, 4)), _words(rng, (5, 2, 3, 4))
    for part in (LINEAR, LOG):
        plan = _plan(part, 5)
        got = executor.convolution(x, w, None, plan, Window((3, 4)))
        np.testing.assert_array_equal(got[..., 0, 0], executor.dot(x.reshape(3, -1), w.reshape(5, -1), None, plan))


def test_shapes_are_checked(executor: Any) -> None:
    rng = np.random.default_rng(2)
    x, w = _words(rng, (1, 4, 5)), _words(rng, (6, 2, 3))
    plan = replace(_plan(LOG, 6), weight_offset=0, acc_offset=60)
    for bad, window, groups in (
        ((x, w), Window((3,)), 1),
        ((x, w), Window((2,)), 2),
        ((x, w), Window((3, 3)), 2),
        ((x, w[:5]), Window((3,)), 2),
        ((x, w), Window((3,)), 0),
        ((x[0], w), Window((3,)), 2),
        ((x[..., :2], w), Window((3,)), 2),
    ):
        with pytest.raises(BadValueError):
            executor.convolution(*bad, None, plan, window, groups)
    with pytest.raises(BadValueError, match="bias for 6 output channels"):
        executor.convolution(x, w, np.zeros(5, dtype=np.int64), plan, Window((3,)), 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (((),), "kernel must be one to three integers"),
        (((1, 1, 1, 1),), "kernel must be one to three integers"),
        (((0,),), "kernel must be one to three integers of at least 1"),
        (((3,), (0,)), "strides must be 1 integers of at least 1"),
        (((3,), (1, 1)), "strides must be 1 integers"),
        (((3, 3), (1, 1), (1, 1)), "pads must be 4 integers of at least 0"),
        (((3,), (1,), (-1, 0)), "pads must be 2 integers of at least 0"),
        (((3,), (1,), (0, 0), (0,)), "dilations must be 1 integers of at least 1"),
    ],
)
def test_windows_are_checked(arguments: Any, message: str) -> None:
    with pytest.raises(BadValueError, match=message):
        Window(*arguments)
