"""Decodes text files and JSON strictly: what is ambiguous or damaged is refused, never guessed."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

from lit_distill.errors import InputError


def decode(data: bytes) -> str:
    """Return the text of a UTF-8 file, with or without a byte order mark.

    Raises:
        ValueError: If it is not UTF-8, or holds NUL characters as UTF-16 read as UTF-8 does.
    """
    hint = "; it looks like UTF-16, save it as UTF-8"
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        utf16 = data.startswith((b"\xff\xfe", b"\xfe\xff"))
        raise InputError(
            f"byte {error.start} is not UTF-8 ({error.reason}){hint if utf16 else ''}"
        ) from None
    if "\0" in text:
        raise InputError(f"character {text.index(chr(0))} is NUL{hint}")
    return text


def invalid_character(text: str) -> str | None:
    """Return what a string of JSON holds that no file of text can hold; None if nothing."""
    if "\0" in text:
        return "a NUL character"
    try:
        text.encode()
    except UnicodeEncodeError:
        return "half of a surrogate pair, as from an emoji that was cut in two"
    return None


def parse_json(text: str, **options: Any) -> Any:  # noqa: ANN401
    """Return the value of a JSON text.

    Args:
        text: The text.
        **options: How to read numbers, as in `json.loads`.

    Raises:
        ValueError: If it is not JSON, an object has a name twice, or it is nested too deeply.
    """

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            duplicate, _ = Counter(name for name, _ in pairs).most_common(1)[0]
            raise InputError(f"an object has {shorten(duplicate)} more than once")
        return record

    try:
        return json.loads(text, object_pairs_hook=without_duplicates, **options)
    except RecursionError:
        raise InputError("it is nested too deeply") from None


def shorten(value: Any, limit: int = 80) -> str:  # noqa: ANN401
    """Return the representation of a value for a message, cut after `limit` characters."""
    if isinstance(value, str):
        return repr(value if len(value) <= limit else value[: limit - 3] + "...")
    text = repr(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
