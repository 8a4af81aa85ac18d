"""Columns of text, parsed by declared type; what does not fit is noted with its row."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch

from lit_distill.data.filesystem import THREADS, exist, join, leaves
from lit_distill.data.images import SUFFIXES, Picture, image_size
from lit_distill.data.table_io import Problems


class Columns:
    """Parses columns of text by declared type and notes what does not fit.

    Args:
        raw: All text, with a column ``row``.
        problems: Where it is noted.
        base: Folder or URL that files are relative to.
        allow_outside: Whether files may be elsewhere.
    """

    def __init__(
        self, raw: pd.DataFrame, problems: Problems, base: str, allow_outside: bool
    ) -> None:
        self.raw = raw
        self.problems = problems
        self.base = base
        self.allow_outside = allow_outside

    def reject(self, column: str, bad: Any, accepted: str) -> None:  # noqa: ANN401
        """Note the rows where `bad` is true, with the column's value and what is accepted."""
        cells = self.raw[column]

        def say(index: int) -> str:
            value = cells.iloc[index]
            shown = value if len(value) <= 80 else value[:77] + "..."
            return f"{column} must be {accepted}, got {shown!r}"

        add_row_problems(self.raw, bad, self.problems, say, name_image=column != "image")

    def parse(self, column: str, read: Callable[[str], Any], accepted: str, missing: Any) -> Any:  # noqa: ANN401
        """Return the column's values, `missing` where `read` gives None; each text is read once."""
        codes, texts = pd.factorize(self.raw[column].to_numpy(dtype=object))
        values = [read(text) for text in texts]
        unfit = np.array([value is None for value in values])
        if unfit.any():
            self.reject(column, unfit[codes], accepted)
        return np.array([missing if value is None else value for value in values])[codes]

    def integers(self, column: str, low: int, high: int, blank: int | None = None) -> Any:  # noqa: ANN401
        """Return a column of integers in [low, high]; `blank` stands for an empty cell."""

        def read(text: str) -> int | None:
            text = text.strip()
            if text == "":
                return blank
            whole = text.isascii() and text.isdigit() and len(text) < 20
            return int(text) if whole and low <= int(text) <= high else None

        return self.parse(column, read, f"an integer >= {low} and <= {high}", 0).astype("int64")

    def numbers(self, column: str, low: float) -> Any:  # noqa: ANN401
        """Return a column of finite numbers >= low."""

        def read(text: str) -> float | None:
            try:
                value = float(text)
            except ValueError:
                return None
            return value if math.isfinite(value) and value >= low and "_" not in text else None

        return self.parse(column, read, f"a number >= {low:g}", low).astype("float64")

    def texts(self, column: str, good: Callable[[str], bool], accepted: str) -> None:
        """Check a column that stays text."""
        self.parse(column, lambda text: True if good(text) else None, accepted, False)

    def devices(self, column: str) -> None:
        """Check a column of devices whose generators can draw here."""
        accepted = "cpu, or cuda (or cuda:N) where there is such a GPU"
        if not torch.cuda.is_available():
            accepted += " (here is none, and another device draws other noise)"
        self.texts(column, _can_draw, accepted)

    def files(self, column: str) -> Any:  # noqa: ANN401
        """Return a column of full paths or URLs of files that exist, empty where not given."""
        names = self.raw[column].tolist()
        paths = [join(self.base, name) if name else "" for name in names]
        # Nobody looks outside for a table that must not.
        sought = np.array([path != "" for path in paths]) & ~self.outside(column, names)
        if sought.any():
            there = exist([path for path, wanted in zip(paths, sought, strict=True) if wanted])
            gone = sought.copy()
            gone[sought] = ~np.array(there)
            self.reject(column, gone, f"a file below {self.base}")
        return pd.Series(paths, index=self.raw.index, dtype=object)

    def outside(self, column: str, names: list[str]) -> Any:  # noqa: ANN401
        """Note and return which files are not below the root, where they have to be."""
        if self.allow_outside:
            return np.zeros(len(names), dtype=bool)
        out = np.array([leaves(self.base, name) for name in names], dtype=bool)
        accepted = f"inside of {self.base} (or set data.allow_outside: true)"
        self.reject(column, out, accepted)
        return out

    def values(self, column: str) -> list[Any]:
        """Return a column of pictures, numbers or texts, whichever all of it is."""
        texts = self.raw[column].str.strip()
        numbers = pd.to_numeric(texts, errors="coerce")
        if numbers.notna().all():
            return numbers.tolist()
        if not texts.str.lower().str.endswith(SUFFIXES).any():
            return self.raw[column].tolist()
        pictures = [Picture(join(self.base, text)) for text in texts]
        sought = np.flatnonzero(~self.outside(column, texts.tolist()))
        broken = np.zeros(len(pictures), dtype=bool)
        sizes = picture_sizes([pictures[index] for index in sought])
        broken[sought] = [isinstance(size, ValueError) for size in sizes]
        self.reject(column, broken, f"a picture below {self.base}")
        return pictures


def add_row_problems(
    table: pd.DataFrame,
    bad: Any,  # noqa: ANN401
    problems: Problems,
    say: Callable[[int], str],
    name_image: bool = True,
) -> None:
    """Note the rows where `bad` is true; `say` makes the message of a row's position."""
    indices = np.flatnonzero(np.asarray(bad, dtype=bool))
    rows = table["row"].to_numpy()
    for index in problems.shown(rows[indices], indices):
        image = str(table["image"].iloc[index]) if name_image else ""
        problems.add(say(index), int(rows[index]), image)


def read_calls(columns: Columns, call_columns: dict[str, str]) -> list[dict[str, Any]]:
    """Return each row's further arguments of the pipeline's call.

    Args:
        columns: The table.
        call_columns: Argument to column.

    Returns:
        For every row argument -> `Picture`, number or text.
    """
    if not call_columns:
        return [{}] * len(columns.raw)
    values = [columns.values(column) for column in call_columns.values()]
    return [dict(zip(call_columns, row, strict=True)) for row in zip(*values, strict=True)]


def call_key(call: dict[str, Any]) -> str:
    """Return what rows of a batch must share: numbers, and the sizes of pictures."""
    shared = {
        name: image_size(value) if isinstance(value, Picture) else value
        for name, value in call.items()
        if isinstance(value, Picture) or not isinstance(value, str)
    }
    return repr(shared)


def picture_sizes(paths: Sequence[str]) -> list[tuple[int, int] | ValueError]:
    """Return (height, width) from the headers of pictures, or what is wrong with them."""

    def size(path: str) -> tuple[int, int] | ValueError:
        try:
            return image_size(path)
        except ValueError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(size, paths))


def _can_draw(device: str) -> bool:
    """Whether a generator of this device can be made here."""
    try:
        torch.Generator(device)
    except RuntimeError:  # an unknown name, or no such device in this machine
        return False
    return True
