"""Errors that a user can mend, and what their messages share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Something that the user gave can't be used; the message says where, what and what to do.

    The command prints such a message without a traceback.
    """


def with_suggestions(name: str, names: Iterable[str], cutoff: float = 0.4) -> str:
    """Return the name, quoted, with the nearest known names if there are any."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=cutoff)
    return f"{name!r}" + (f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else "")
