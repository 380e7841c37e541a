"""Recipes: which formats each layer has. One recipe serves training, emulation and export (docs/training.md)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from lnsdeploy.errors import BadFileError, BadTypeError, BadValueError, LNSError, UnknownNameError
from lnsdeploy.fields import check_choice, check_string
from lnsdeploy.files import dump_toml, parse_toml, read_toml
from lnsdeploy.formats import METHODS, LNSFormat, Method

Granularity = Literal["channel", "tensor"]

GRANULARITIES = ("channel", "tensor")
FLOAT = "float"
DEFAULT_FORMAT = LNSFormat(8, 8)


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
        datapath: the arithmetic that lowering gives the layer, a name or a TOML file; None for the one
            that the whole net is lowered with.

    Raises:
        BadTypeError, BadValueError, UnknownNameError: a field is wrong; the message names it.
    """

    weight: LNSFormat | None = DEFAULT_FORMAT
    activation: LNSFormat | None = DEFAULT_FORMAT
    granularity: Granularity = "channel"
    calibration: Method = "absmax"
    datapath: str | None = None

    def __post_init__(self) -> None:
        for field in ("weight", "activation"):
            value = getattr(self, field)
            if value is not None and not isinstance(value, LNSFormat):
                raise BadTypeError(f"{field} must be an LNSFormat or None, not {value!r}")
        check_choice("granularity", self.granularity, GRANULARITIES)
        check_choice("calibration", self.calibration, METHODS)
        if self.datapath is not None:
            check_string("datapath", self.datapath)
            if not self.datapath:
                raise BadValueError("datapath must be a name or a file; leave it out for the net's own")

    @property
    def is_float(self) -> bool:
        """Whether nothing of the layer is quantized."""
        return self.weight is None and self.activation is None

    def to_dict(self) -> dict[str, Any]:
        """Plain data: formats as text, None as ``"float"``, no entry for a missing datapath."""
        made: dict[str, Any] = {
            "weight": FLOAT if self.weight is None else str(self.weight),
            "activation": FLOAT if self.activation is None else str(self.activation),
            "granularity": self.granularity,
            "calibration": self.calibration,
        }
        if self.datapath is not None:
            made["datapath"] = self.datapath
        return made


@dataclass(frozen=True)
class Recipe:
    """Formats by layer name.

    Args:
        default: for layers that no pattern matches.
        layers: (pattern, layer recipe) pairs. Patterns are matched against the whole module name, with
            ``*``, ``?`` and ``[…]`` as in file names (``*`` also matches dots); where several match, the last
            one counts.
    """

    default: LayerRecipe = LayerRecipe()
    layers: tuple[tuple[str, LayerRecipe], ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.default, LayerRecipe):
            raise BadTypeError(f"default must be a LayerRecipe, not {self.default!r}")
        if not isinstance(self.layers, (tuple, list)):
            raise BadTypeError(f"layers must be pairs of a pattern and a LayerRecipe, not {self.layers!r}")
        for entry in self.layers:
            if not (
                isinstance(entry, (tuple, list))
                and len(entry) == 2
                and isinstance(entry[0], str)
                and isinstance(entry[1], LayerRecipe)
            ):
                raise BadTypeError(f"layers must be pairs of a pattern and a LayerRecipe, not {entry!r}")
        object.__setattr__(self, "layers", tuple((pattern, layer) for pattern, layer in self.layers))

    @classmethod
    def uniform(cls, bits: int, gamma: int, **options: Any) -> Recipe:
        """The same format for the weights and activations of all layers.

        Args:
            options: further fields of :class:`LayerRecipe`.
        """
        fmt = LNSFormat(bits, gamma)
        return cls(LayerRecipe(fmt, fmt, **options))

    def for_layer(self, name: str) -> LayerRecipe:
        """The recipe of the layer of this name: the last match, or the default."""
        found = self.default
        for pattern, layer in self.layers:
            if fnmatchcase(name, pattern):
                found = layer
        return found

    def check_patterns(self, names: Iterable[str]) -> None:
        """Refuse patterns that match none of the layers.

        Raises:
            UnknownNameError: the message names the pattern and the nearest layer.
        """
        known = list(names)
        for pattern, _ in self.layers:
            if not any(fnmatchcase(name, pattern) for name in known):
                raise UnknownNameError("layer (no layer matches the recipe's pattern)", pattern, known)

    def to_dict(self) -> dict[str, Any]:
        """Plain data: a table ``default`` and a list of tables ``layer``, as in TOML."""
        made: dict[str, Any] = {"default": self.default.to_dict()}
        if self.layers:
            made["layer"] = [{"pattern": pattern} | layer.to_dict() for pattern, layer in self.layers]
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
        layers: list[tuple[str, LayerRecipe]] = []
        if not isinstance(entries, list):
            problems.append(f"layer must be a list of tables ([[layer]]), not {entries!r}")
            entries = []
        for number, entry in enumerate(entries):
            place = f"layer {number + 1}"
            if not isinstance(entry, Mapping):
                problems.append(f"{place} must be a table, not {entry!r}")
                continue
            rest = dict(entry)
            pattern = rest.pop("pattern", None)
            if not isinstance(pattern, str) or not pattern:
                problems.append(f"{place}.pattern must be a layer's name or pattern, not {pattern!r}")
                pattern = "*"
            layers.append((pattern, _layer(rest, default, place, problems)))
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


def parse_format(value: Any) -> LNSFormat | None:
    """A format of a recipe: ``"8:8"``, or ``"float"`` for None."""
    if value == FLOAT:
        return None
    try:
        return LNSFormat.parse(value)
    except LNSError as error:
        raise BadValueError(f'{error}, or write "{FLOAT}"') from error


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
            value: Any = parse_format(data[key]) if key in ("weight", "activation") else data[key]
            made = replace(made, **{key: value})
        except LNSError as error:
            text = str(error)
            problems.append(f"{place}.{key}: {text.removeprefix(f'{key} ')}")
    return made
