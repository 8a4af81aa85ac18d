"""Helpers for error messages."""

from __future__ import annotations

import difflib
from typing import Any


def with_suggestions(name: str, names: Any) -> str:  # noqa: ANN401
    """Return the name in quotes, followed by the closest known names if there are any."""
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f"{name!r}" + (f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else "")
