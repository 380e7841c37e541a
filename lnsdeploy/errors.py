"""The errors that users can cause, each also a builtin so that generic handlers still work.

The command line prints any :class:`LNSError` as one line and exits with status 2.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

# More than these are no help in one line.
_FEW_NAMES = 100


class LNSError(Exception):
    """Base of every error that lnsdeploy raises on purpose."""


class BadValueError(LNSError, ValueError):
    """An argument or a field is outside its allowed range."""


class BadTypeError(LNSError, TypeError):
    """An argument has the wrong type or dtype."""


class UnknownNameError(LNSError, LookupError):
    """A name that is not registered; the message offers the nearest match, and all names where they are few."""

    def __init__(self, kind: str, name: object, known: Iterable[str]):
        names = sorted(known)
        few = len(names) <= _FEW_NAMES
        near = difflib.get_close_matches(str(name), names, n=1 if few else 4)
        hint = f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
        listed = ", ".join(names) if few else f"{len(names)} names"
        super().__init__(f"unknown {kind} {name!r}{hint} (known: {listed})")


class BadFileError(LNSError, ValueError):
    """A file is missing, unreadable, truncated, or not what it claims to be."""


class MissingDependencyError(LNSError, ImportError):
    """An optional package is needed; the message says what to install."""


class UnsupportedError(LNSError, NotImplementedError):
    """The request is meaningful but has no LNS form here; the message says what to do instead."""


class CheckFailedError(LNSError, RuntimeError):
    """A check that the user asked for failed (exit status 1 on the command line)."""


class OtherProcessError(LNSError, RuntimeError):
    """Another process of the same run failed; the message is its own."""


class SilentExit(Exception):
    """This process ends because another failed, which says so itself (exit status 2 on the command line)."""
