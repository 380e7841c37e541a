"""Checks of single fields, all with the same form of message: the field, its range, what was given."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np

from lnsdeploy.errors import BadTypeError, BadValueError, UnknownNameError


def plain_integers(instance: Any) -> None:
    """Turn the NumPy integers in the fields of a frozen dataclass into Python's, which JSON and TOML can write."""
    for name, value in vars(instance).items():
        if isinstance(value, np.integer):
            object.__setattr__(instance, name, int(value))


def check_integer(field: str, value: Any, low: int, high: int) -> None:
    """Refuse what is not an integer in low … high."""
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise BadTypeError(f"{field} must be an integer from {low} to {high}, not {value!r}")
    if not low <= value <= high:
        raise BadValueError(f"{field} must be from {low} to {high}, not {value}")


def check_power_of_two(field: str, value: Any, high: int) -> None:
    """Refuse what is not a power of two in 1 … high."""
    check_integer(field, value, 1, high)
    if value & (value - 1):
        raise BadValueError(f"{field} must be a power of two from 1 to {high}, not {value}")


def check_choice(field: str, value: Any, choices: Sequence[str]) -> None:
    """Refuse what is not one of the names."""
    if value not in choices:
        raise UnknownNameError(field, value, choices)


def check_string(field: str, value: Any) -> None:
    """Refuse what is not text."""
    if not isinstance(value, str):
        raise BadTypeError(f"{field} must be text, not {value!r}")


def parse_setting(text: str) -> tuple[str, Any]:
    """The name and value of ``KEY=VALUE``; a value is a number, true, false, or null as in JSON, or else a text.

    Raises:
        BadValueError: it is not of that form.
    """
    key, equals, value = text.partition("=")
    if not equals or not key.isidentifier():
        raise BadValueError(f"a setting is KEY=VALUE, not {text!r}")
    try:
        return key, json.loads(value)
    except ValueError:
        return key, value
