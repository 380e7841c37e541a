"""Recipes: which formats each layer has. One recipe serves training, emulation and export (docs/training.md).

A recipe is data, and knows neither torch nor any executor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.fields import check_choice, check_string
from lnsdeploy.files import dump_toml, parse_toml, read_toml
from lnsdeploy.formats import METHODS, LNSFormat, Method

Granularity = Literal["channel", "tensor"]
Offsets = Literal["dynamic", "recorded"]
Position = Literal["first", "last"]
Float = Literal["float"]

GRANULARITIES = ("channel", "tensor")
OFFSETS = ("dynamic", "recorded")
POSITIONS = ("first", "last")
FLOAT: Float = "float"
DEFAULT_FORMAT = LNSFormat(8, 8)

# Fields that hold a format.
_FORMATS = ("weight", "activation", "output", "error", "gradient")
# Of those, the ones that follow from others where they are left out.
_FOLLOWING = ("output", "error", "gradient")


@dataclass(frozen=True)
class LayerRecipe:
    """How one layer is quantized.

    Args:
        weight: the format of its weights; None leaves them in float.
        activation: the format of its input; None leaves it in float.
        granularity: one weight offset for each output ``"channel"``, or one for the ``"tensor"``.
            Activations always have one offset.
        calibration: how offsets follow from values: ``"absmax"``, ``"percentile"`` (99.9) or ``"lsq"``
            (spec 2.6).
        datapath: the arithmetic that lowering and emulation give the layer, a name or a TOML file; None for the
            one that the whole net is lowered or emulated with.
        output: the format of its results in emulation, of the products' γ; None for the datapath's.
        error: the format of the gradients of its results in an emulated backward pass, ``"float"`` to leave its
            backward products in float, or None for that of `activation`.
        gradient: the format in which an emulated backward pass gives the gradients of its weights, ``"float"`` to
            leave that product in float, or None for what the datapath gives.
        offsets: in emulation, ``"dynamic"``: offsets and accumulators follow each batch; ``"recorded"``: those of
            the first batch stay.

    Raises:
        BadTypeError, BadValueError, UnknownNameError: a field is wrong; the message names it.
    """

    weight: LNSFormat | None = DEFAULT_FORMAT
    activation: LNSFormat | None = DEFAULT_FORMAT
    granularity: Granularity = "channel"
    calibration: Method = "absmax"
    datapath: str | None = None
    output: LNSFormat | None = None
    error: LNSFormat | Float | None = None
    gradient: LNSFormat | Float | None = None
    offsets: Offsets = "dynamic"

    def __post_init__(self) -> None:
        for field in ("weight", "activation", "output"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, LNSFormat):
                raise BadTypeError(f"{field} must be an LNSFormat or None, not {value!r}")
        for field in ("error", "gradient"):
            value = getattr(self, field)
            if value not in (None, FLOAT) and not isinstance(value, LNSFormat):
                raise BadTypeError(f'{field} must be an LNSFormat, "float" or None, not {value!r}')
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("calibration", self.calibration, METHODS)
        check_choice("offsets", self.offsets, OFFSETS)
        if self.datapath is not None:
            check_string("datapath", self.datapath)
            if not self.datapath:
                raise BadValueError("datapath must be a name or a file; leave it out for the net's own")

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantized."""
        return self.weight is None and self.activation is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: formats as text, None as ``"float"``; what follows from other fields is left out."""
        made: dict[str, Any] = {
            "weight": FLOAT if self.weight is None else str(self.weight),
            "activation": FLOAT if self.activation is None else str(self.activation),
            "granularity": self.granularity,
            "calibration": self.calibration,
        }
        if self.datapath is not None:
            made["datapath"] = self.datapath
        for field in _FOLLOWING:
            if getattr(self, field) is not None:
                made[field] = str(getattr(self, field))
        if self.offsets != "dynamic":
            made["offsets"] = self.offsets
        return made


@dataclass(frozen=True)
class Match:
    """Which layers, or products of an emulated model, a rule is for: those that have everything it names.

    Args:
        pattern: of the module's name, with ``*``, ``?`` and ``[…]`` as in file names (``*`` also matches dots).
        type: ``"conv"``, ``"linear"`` or ``"matmul"`` (products of two activations, as in attention), or the name
            of the module's class; None for any.
        position: ``"first"`` or ``"last"`` of the net's layers in the order of their definition; None for any.
    """

    pattern: str = "*"
    type: str | None = None
    position: Position | None = None

    def __post_init__(self) -> None:
        check_string("pattern", self.pattern)
        if self.type is not None:
            check_string("type", self.type)
        if self.position is not None:
            check_choice("position", self.position, POSITIONS)

    def holds(self, names: Sequence[str], types: Sequence[str], positions: Sequence[str]) -> bool:
        """Whether a layer of these names, types and positions is meant."""
        return (
            any(fnmatchcase(name, self.pattern) for name in names)
            and (self.type is None or self.type in types)
            and (self.position is None or self.position in positions)
        )

    def to_dict(self) -> dict[str, Any]:
        """Plain data: a pattern of its own is always written, unless another field says enough."""
        made: dict[str, Any] = {}
        if self.pattern != "*" or (self.type is None and self.position is None):
            made["pattern"] = self.pattern
        if self.type is not None:
            made["type"] = self.type
        if self.position is not None:
            made["position"] = self.position
        return made


@dataclass(frozen=True)
class Recipe:
    """Formats by layer.

    Args:
        default: for layers that no rule matches.
        layers: (match, layer recipe) pairs; a match is a :class:`Match`, or a pattern of names. Where several
            match, the last one counts.
    """

    default: LayerRecipe = LayerRecipe()
    layers: tuple[tuple[str | Match, LayerRecipe], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.default, LayerRecipe):
            raise BadTypeError(f"default must be a LayerRecipe, not {self.default!r}")
        wanted = "layers must be pairs of a pattern and a LayerRecipe"
        if not isinstance(self.layers, (tuple, list)):
            raise BadTypeError(f"{wanted}, not {self.layers!r}")
        for entry in self.layers:
            if not (
                isinstance(entry, (tuple, list))
                and len(entry) == 2
                and isinstance(entry[0], (str, Match))
                and isinstance(entry[1], LayerRecipe)
            ):
                raise BadTypeError(f"{wanted}, not {entry!r}")
        object.__setattr__(self, "layers", tuple((_plain(match), layer) for match, layer in self.layers))

    @property
    def rules(self) -> tuple[tuple[Match, LayerRecipe], ...]:
        """The pairs of `layers`, patterns as matches."""
        return tuple((_match(match), layer) for match, layer in self.layers)

    @classmethod
    def uniform(cls, bits: int, gamma: int, **options: Any) -> Recipe:
        """The same format for the weights and activations of all layers.

        Args:
            options: further fields of :class:`LayerRecipe`.
        """
        fmt = LNSFormat(bits, gamma)
        return cls(LayerRecipe(fmt, fmt, **options))

    def for_layer(
        self, name: str | Sequence[str], types: Sequence[str] = (), positions: Sequence[str] = ()
    ) -> LayerRecipe:
        """The recipe of a layer: the last match, or the default.

        Args:
            name: the layer's name, or several by which it may be called.
            types, positions: what else it is; see :class:`Match`.
        """
        names = (name,) if isinstance(name, str) else tuple(name)
        found = self.default
        for match, layer in self.rules:
            if match.holds(names, types, positions):
                found = layer
        return found

    @staticmethod
    def positions(name: str, names: Sequence[str]) -> tuple[str, ...]:
        """What a layer is by its place among all layers of a net, in the order of their definition."""
        return tuple(
            position for position, index in zip(POSITIONS, (0, -1), strict=True) if names and names[index] == name
        )

    def check_patterns(self, names: Iterable[str]) -> None:
        """Refuse patterns that match none of the layers. Types and positions may be there for other nets.

        Raises:
            UnknownNameError: the message names the pattern and the nearest layer.
        """
        known = list(names)
        for match, _ in self.rules:
            # products of two activations are no layers of training
            if match.type != "matmul" and not any(fnmatchcase(name, match.pattern) for name in known):
                raise UnknownNameError("layer (no layer matches the recipe's pattern)", match.pattern, known)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: a table ``default`` and a list of tables ``layer``, as in TOML."""
        made: dict[str, Any] = {"default": self.default.to_dict()}
        if self.layers:
            made["layer"] = [match.to_dict() | layer.to_dict() for match, layer in self.rules]
        return made

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], *, where: str = "recipe", base: LayerRecipe | None = None) -> Recipe:
        """Inverse of :meth:`to_dict`. Fields that a layer leaves out are the default's.

        Args:
            where: names the origin in errors.
            base: what fields have that ``default`` leaves out.

        Raises:
            BadFileError: a field is missing, unknown or out of range; the message names all that are.
        """
        problems: list[str] = []
        if not isinstance(data, Mapping):
            raise BadFileError(f"{where}: a recipe is a table, not {type(data).__name__}")
        _unknown(data, ("default", "layer"), "", problems)
        default = _layer(data.get("default", {}), base or LayerRecipe(), "default", problems)
        entries = data.get("layer", [])
        layers: list[tuple[Match, LayerRecipe]] = []
        if not isinstance(entries, list):
            problems.append(f"layer must be a list of tables ([[layer]]), not {entries!r}")
            entries = []
        for number, entry in enumerate(entries):
            place = f"layer {number + 1}"
            if not isinstance(entry, Mapping):
                problems.append(f"{place} must be a table, not {entry!r}")
                continue
            rest = dict(entry)
            match = _rule(rest, place, problems)
            layers.append((match, _layer(rest, default, place, problems)))
        if problems:
            raise BadFileError(f"{where}: " + "; ".join(problems))
        return cls(default, tuple(layers))

    def to_toml(self) -> str:
        """The recipe as TOML text; :meth:`from_toml` is its inverse."""
        return dump_toml(self.to_dict())

    @classmethod
    def from_toml(cls, text: str, *, where: str = "recipe", base: LayerRecipe | None = None) -> Recipe:
        """A recipe from TOML text; see :meth:`from_dict`."""
        return cls.from_dict(parse_toml(text, where=where), where=where, base=base)


def load_recipe(path: str | Path, *, base: LayerRecipe | None = None) -> Recipe:
    """A recipe from a TOML file; see :meth:`Recipe.from_dict`.

    Raises:
        BadFileError: the file is missing, not TOML, or not a recipe.
    """
    return Recipe.from_dict(read_toml(path), where=str(path), base=base)


def _match(match: str | Match) -> Match:
    return match if isinstance(match, Match) else Match(match)


def _plain(match: str | Match) -> str | Match:
    """A match that is only a pattern as that pattern, so that equal recipes compare equal."""
    alone = isinstance(match, Match) and match.type is None and match.position is None
    return match.pattern if isinstance(match, Match) and alone else match


def _rule(entry: dict[str, Any], place: str, problems: list[str]) -> Match:
    """What a ``[[layer]]`` is for; its fields are taken out of `entry`."""
    given: dict[str, Any] = {key: entry.pop(key) for key in ("pattern", "type", "position") if key in entry}
    pattern = given.get("pattern", "*" if given else None)
    if not isinstance(pattern, str) or not pattern:
        problems.append(f"{place}.pattern must be a layer's name or pattern, not {pattern!r}")
        given["pattern"] = "*"
    for key, choices in (("type", None), ("position", POSITIONS)):
        value = given.get(key)
        if value is None:
            continue
        try:
            check_string(key, value)
            if choices:
                check_choice(key, value, choices)
        except LNSError as error:
            problems.append(f"{place}.{str(error).removeprefix(f'{key} ')}" if choices is None else f"{place}: {error}")
            given.pop(key)
    return Match(**given)


def parse_format(value: Any) -> LNSFormat | None:
    """A format of a recipe: ``"8:8"``, or ``"float"`` for None."""
    if value == FLOAT:
        return None
    try:
        return LNSFormat.parse(value)
    except LNSError as error:
        raise BadValueError(f'{error}, or write "{FLOAT}"') from error


def _word_format(value: Any) -> LNSFormat:
    made = parse_format(value)
    if made is None:
        raise BadValueError("results are words; leave output out for the datapath's format")
    return made


def _unknown(data: Mapping[str, Any], known: Iterable[str], place: str, problems: list[str]) -> None:
    prefix = f"{place}: " if place else ""
    problems += [f"{prefix}{UnknownNameError('field', key, known)}" for key in data if key not in known]


def _layer(data: Any, base: LayerRecipe, place: str, problems: list[str]) -> LayerRecipe:
    """A layer's recipe over `base`; what is wrong is added to `problems`, a field at a time."""
    if not isinstance(data, Mapping):
        problems.append(f"{place} must be a table, not {data!r}")
        return base
    known = [f.name for f in fields(LayerRecipe)]
    _unknown(data, known, place, problems)
    made = base
    for key in known:
        if key not in data:
            continue
        try:
            value: Any = data[key]
            if key in _FORMATS and not (value == FLOAT and key in ("error", "gradient")):
                value = _word_format(value) if key == "output" else parse_format(value)
            made = replace(made, **{key: value})
        except LNSError as error:
            text = str(error)
            problems.append(f"{place}.{key}: {text.removeprefix(f'{key} ')}")
    return made
