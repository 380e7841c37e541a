"""Mixed widths: the layers that hurt most get more bits, under a budget that the user sets (docs/export.md).

Each layer's damage is measured, not guessed: its weights alone become words of a width, and the net's output says how
much noise that makes. Noise of several layers adds up, near enough; so the widths follow from a greedy choice, the
upgrade that takes away most noise for its bits first. The outcome is a recipe, a TOML file as any other.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from lnsdeploy.errors import BadValueError, UnsupportedError
from lnsdeploy.exporters.calibration import FloatNet
from lnsdeploy.exporters.fidelity import before_softmax
from lnsdeploy.exporters.lower import layer_name
from lnsdeploy.formats import LNSFormat, calibrate, decode, encode
from lnsdeploy.recipe import LayerRecipe, Match, Recipe

if TYPE_CHECKING:
    from lnsdeploy.exporters.convert import ExportOptions

# An average of bits, or, above it, bytes.
MOST_BITS = 16


@dataclass(frozen=True)
class Layer:
    """A layer whose weights are words.

    Args:
        name: in recipes.
        tensor: the initializer's name.
        axis: of its output channels; None where they lie on none.
        count: of its weights.
    """

    name: str
    tensor: str
    axis: int | None
    count: int


@dataclass(frozen=True)
class Widths:
    """What a budget led to.

    Args:
        recipe: formats by layer.
        formats: of each layer's weights.
        sensitivity: for each layer and width, the output's signal to noise in dB when that layer's weights alone are so
            narrow.
        predicted_db: of all together, by the sum of their noises.
    """

    recipe: Recipe
    formats: dict[str, LNSFormat]
    sensitivity: dict[str, dict[int, float]]
    predicted_db: float


def layers_of(model: Any) -> list[Layer]:
    """Layers of a float model with constant weights, in order; weights that several nodes share once."""
    held = {t.name: t for t in model.graph.initializer}
    found: dict[str, Layer] = {}
    for node in model.graph.node:
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            continue
        # of a product, weights may stand on either side
        name = next((n for n in (*node.input[1:2], *node.input[:1]) if n in held), None)
        if name is None or name in found:
            continue
        dims = list(held[name].dims)
        transposed = any(a.name == "transB" and a.i for a in node.attribute)
        axis: int | None = 0
        if node.op_type == "ConvTranspose":
            axis = None
        elif node.op_type != "Conv" and not transposed:
            axis = len(dims) - 1 if name == node.input[1] else None
        found[name] = Layer(layer_name(name, node.name), name, axis, int(np.prod(dims)))
    return list(found.values())


class _Overridden:
    """The float net with the weights of some layers as inputs, so that one session serves every trial."""

    def __init__(self, net: FloatNet, layers: Sequence[Layer], at: str):
        from onnx import TensorProto, helper, numpy_helper

        from lnsdeploy.emulator.ort import float_session

        model = type(net.model)()
        model.CopyFrom(net.model)
        held = {t.name: t for t in model.graph.initializer}
        self.weights: dict[str, npt.NDArray[np.float32]] = {}
        for layer in layers:
            tensor = held[layer.tensor]
            self.weights[layer.tensor] = np.asarray(numpy_helper.to_array(tensor), dtype=np.float32)
            model.graph.input.append(helper.make_tensor_value_info(tensor.name, TensorProto.FLOAT, list(tensor.dims)))
        if at != net.output:
            model.graph.output.append(helper.make_tensor_value_info(at, TensorProto.FLOAT, None))
        self.input, self.at = net.input, at
        self._session = float_session(model.SerializeToString())

    def run(self, x: npt.NDArray[Any], changed: Mapping[str, npt.NDArray[np.float32]]) -> npt.NDArray[np.float64]:
        """The output with some weights changed."""
        found = self._session.run([self.at], {self.input: x, **changed})[0]
        return np.asarray(found, dtype=np.float64)


def best_format(
    weight: npt.NDArray[np.float32], bits: int, gamma: int, axis: int | None, method: Any
) -> tuple[LNSFormat, npt.NDArray[np.float32]]:
    """Of the formats of a width whose γ is a power of two that divides `gamma`, the nearest to some weights.

    Returns: the format, and the weights in it.
    """
    candidates = [g for g in (1 << i for i in range(13)) if gamma % g == 0] or [gamma]
    if gamma not in candidates:
        candidates.append(gamma)
    best: tuple[float, LNSFormat, npt.NDArray[np.float32]] | None = None
    for candidate in candidates:
        fmt = LNSFormat(bits, candidate)
        offset = calibrate(weight, fmt, axis=axis, method=method)
        got = decode(encode(weight, fmt, offset, axis=axis), fmt, offset, axis=axis)
        error = float(np.square(np.subtract(weight, got, dtype=np.float64)).sum())
        if best is None or error < best[0]:
            best = (error, fmt, got)
    assert best is not None
    return best[1], best[2]


def choose_widths(
    net: FloatNet,
    x: npt.NDArray[Any],
    options: ExportOptions,
    *,
    progress: Callable[[str, int, int], None] | None = None,
) -> Widths:
    """Widths of the layers' weights under a budget.

    Args:
        x: inputs [n, …] that damage is measured on; a few are enough.
        options: `budget`, `widths`, and the formats of all else.
        progress: called with "budget", trials done, and all.

    Raises:
        BadValueError: the budget is less than the narrowest widths take.
        UnsupportedError: the net has no layer with constant weights.
    """
    layers = layers_of(net.model)
    if not layers:
        raise UnsupportedError(
            f"no layer of the net has constant weights: a budget of {options.budget:g} changes nothing"
        )
    assert options.budget is not None
    widths = sorted(set(options.widths))
    _, activation = options.formats

    def stored(count: int, bits: int) -> int:
        from lnsdeploy.exporters.convert import stored_bytes

        return stored_bytes(count, bits, options.pack)

    cost = _bits if options.budget <= MOST_BITS else stored
    total = options.budget * (sum(layer.count for layer in layers) if cost is _bits else 1)
    least = sum(cost(layer.count, widths[0]) for layer in layers)
    if least > total:
        told = f"{widths[0]} bits" if cost is _bits else f"{least} bytes"
        raise BadValueError(f"a budget of {options.budget:g} is too small: the narrowest widths take {told}")
    trial = _Overridden(net, layers, before_softmax(net))
    exact = trial.run(x, {})
    signal = float(np.square(exact).sum())
    noise: dict[str, dict[int, float]] = {}
    formats: dict[str, dict[int, LNSFormat]] = {}
    done = 0
    for layer in layers:
        weight = trial.weights[layer.tensor]
        noise[layer.name], formats[layer.name] = {}, {}
        for bits in widths:
            axis = layer.axis if options.per_channel else None
            fmt, words = best_format(weight, bits, activation.gamma, axis, options.weight_method)
            got = trial.run(x, {layer.tensor: words})
            noise[layer.name][bits] = float(np.square(got - exact).sum())
            formats[layer.name][bits] = fmt
            done += 1
            if progress:
                progress("budget", done, len(layers) * len(widths))
    chosen = greedy({layer.name: layer.count for layer in layers}, noise, widths, total, cost)
    named = {name: formats[name][bits] for name, bits in chosen.items()}
    weight_format, _ = options.formats
    common: dict[str, Any] = {
        "granularity": "channel" if options.per_channel else "tensor",
        "calibration": options.weight_method,
    }
    recipe = Recipe(
        LayerRecipe(weight_format, activation, **common),
        tuple((Match(_literal(name)), LayerRecipe(fmt, activation, **common)) for name, fmt in named.items()),
    )
    sensitivity = {
        name: {bits: _db(signal, value) for bits, value in by_width.items()} for name, by_width in noise.items()
    }
    predicted = _db(signal, sum(noise[name][bits] for name, bits in chosen.items()))
    return Widths(recipe, named, sensitivity, predicted)


def _bits(count: int, bits: int) -> int:
    return count * bits


def greedy(
    counts: Mapping[str, int],
    noise: Mapping[str, Mapping[int, float]],
    widths: Sequence[int],
    total: float,
    cost: Callable[[int, int], int],
) -> dict[str, int]:
    """A width for each layer: from the narrowest, always the upgrade that takes away most noise for what it costs.

    Args:
        counts: of each layer's weights.
        noise: of the output, by layer and width.
        widths: ascending.
        total: what all may cost together.
        cost: of so many weights at a width.
    """
    chosen = dict.fromkeys(counts, widths[0])
    spent = sum(cost(counts[name], widths[0]) for name in counts)
    while True:
        best: tuple[float, str, int, int] | None = None
        for name, now in chosen.items():
            for bits in widths:
                gain = noise[name][now] - noise[name][bits]
                more = cost(counts[name], bits) - cost(counts[name], now)
                if bits <= now or gain <= 0 or spent + more > total:
                    continue
                rate = gain / more if more else np.inf
                if best is None or rate > best[0]:
                    best = (rate, name, bits, more)
        if best is None:
            return chosen
        _, name, bits, more = best
        chosen[name] = bits
        spent += more


def _db(signal: float, noise: float) -> float:
    return 999.0 if noise == 0 or signal == 0 else float(10 * np.log10(signal / noise))


def _literal(name: str) -> str:
    """A pattern that matches this name alone."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)
