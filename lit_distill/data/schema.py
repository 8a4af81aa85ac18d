"""Parses the text columns of a table: integers, floats, files, devices, pictures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pandas as pd
import torch

from lit_distill.data.arrow_files import EmbeddedFile
from lit_distill.data.filesystem import THREADS, files_exist, is_outside, join
from lit_distill.data.images import SUFFIXES, Picture, image_size
from lit_distill.data.table_io import Problems
from lit_distill.data.text import shorten
from lit_distill.errors import InputError


class ColumnParser:
    """Parses text columns of a table and collects the rows with invalid values.

    Args:
        raw: The table, all columns text but ``row``.
        problems: Collects the invalid rows.
        base: Folder or URL that files are relative to.
        allow_outside: Whether to accept files outside of `base`.
    """

    def __init__(
        self, raw: pd.DataFrame, problems: Problems, base: str, allow_outside: bool
    ) -> None:
        self.raw = raw
        self.problems = problems
        self.base = base
        self.allow_outside = allow_outside

    def reject(self, column: str, bad: Any, accepted: str) -> None:  # noqa: ANN401
        """Report the rows where `bad` is true, with the column's value and what is accepted."""
        cells = self.raw[column]

        def message(index: int) -> str:
            name = self.problems.own_name(column)
            return f"{name} must be {accepted}, got {shorten(cells.iloc[index])}"

        add_row_problems(self.raw, bad, self.problems, message, name_image=column != "image")

    def parse(
        self,
        column: str,
        read: Callable[[str], Any],
        accepted: str,
        placeholder: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        """Return the parsed values of a column; each distinct text is parsed once.

        Args:
            column: Name of the column.
            read: Parses a text; None if it is invalid.
            accepted: What is accepted, for the message.
            placeholder: The value of invalid rows.
        """
        codes, texts = pd.factorize(self.raw[column].to_numpy(dtype=object))
        values = [read(text) for text in texts]
        invalid = np.array([value is None for value in values])
        if invalid.any():
            self.reject(column, invalid[codes], accepted)
        return np.array([placeholder if value is None else value for value in values])[codes]

    def integers(self, column: str, low: int, high: int, blank: int | None = None) -> Any:  # noqa: ANN401
        """Return a column of integers in [low, high]; `blank` is the value of an empty cell."""

        def read(text: str) -> int | None:
            text = text.strip()
            if text == "":
                return blank
            whole = text.isascii() and text.isdigit() and len(text) < 20
            return int(text) if whole and low <= int(text) <= high else None

        return self.parse(column, read, f"an integer >= {low} and <= {high}", 0).astype("int64")

    def floats(self, column: str, low: float) -> Any:  # noqa: ANN401
        """Return a column of finite numbers >= low."""

        def read(text: str) -> float | None:
            try:
                value = float(text)
            except ValueError:
                return None
            plain = text.isascii() and "_" not in text
            return value if plain and math.isfinite(value) and value >= low else None

        return self.parse(column, read, f"a number >= {low:g}", low).astype("float64")

    def check_texts(self, column: str, valid: Callable[[str], bool], accepted: str) -> None:
        """Check a column that stays text."""
        self.parse(column, lambda text: True if valid(text) else None, accepted, False)

    def check_devices(self, column: str) -> None:
        """Check a column of devices that have a random generator on this machine."""
        accepted = "cpu, or cuda (or cuda:N) where there is such a GPU"
        if not torch.cuda.is_available():
            accepted += " (there is none here, and another device generates other noise)"
        self.check_texts(column, _has_generator, accepted)

    def existing_files(self, column: str) -> Any:  # noqa: ANN401
        """Return a column of full paths or URLs of existing files, empty where not given."""
        names = self.raw[column].tolist()
        paths = [self._full_path(name) if name else "" for name in names]
        given = np.array([name != "" and not isinstance(name, EmbeddedFile) for name in names])
        # Files outside of the folder are not even looked up unless allowed.
        to_check = given & ~self.reject_outside(column, names)
        if to_check.any():
            checked = [path for path, check in zip(paths, to_check, strict=True) if check]
            missing = to_check.copy()
            missing[to_check] = ~np.array(files_exist(checked))
            self.reject(column, missing, f"a file below {self.base}")
        return pd.Series(paths, index=self.raw.index, dtype=object)

    def _full_path(self, name: str) -> str:
        return name if isinstance(name, EmbeddedFile) else join(self.base, name)

    def reject_outside(self, column: str, names: list[str]) -> Any:  # noqa: ANN401
        """Report and return which files are outside of the folder, unless that is allowed."""
        if self.allow_outside:
            return np.zeros(len(names), dtype=bool)
        outside = np.array(
            [not isinstance(name, EmbeddedFile) and is_outside(self.base, name) for name in names],
            dtype=bool,
        )
        accepted = f"inside of {self.base} (or set data.allow_outside: true)"
        self.reject(column, outside, accepted)
        return outside

    def call_values(self, column: str) -> list[Any]:
        """Return a column of numbers, pictures or texts: the first type that fits all its cells."""
        texts = self.raw[column].str.strip()
        numbers = pd.to_numeric(texts, errors="coerce")
        if numbers.notna().all():
            return numbers.tolist()
        cells = self.raw[column].tolist()
        embedded = any(isinstance(cell, EmbeddedFile) for cell in cells)
        if not embedded and not texts.str.lower().str.endswith(SUFFIXES).any():
            return cells
        names = [cell if isinstance(cell, EmbeddedFile) else cell.strip() for cell in cells]
        pictures = [Picture(self._full_path(name)) for name in names]
        to_check = np.flatnonzero(~self.reject_outside(column, names))
        broken = np.zeros(len(pictures), dtype=bool)
        sizes = picture_sizes([pictures[index] for index in to_check])
        broken[to_check] = [isinstance(size, InputError) for size in sizes]
        self.reject(column, broken, f"a picture below {self.base}")
        return pictures


def add_row_problems(
    table: pd.DataFrame,
    bad: Any,  # noqa: ANN401
    problems: Problems,
    message: Callable[[int], str],
    name_image: bool = True,
) -> None:
    """Report the rows where `bad` is true; `message` is called with the position of a row."""
    indices = np.flatnonzero(np.asarray(bad, dtype=bool))
    rows = table["row"].to_numpy()
    for index in problems.add_rows(rows[indices], indices):
        image = str(table["image"].iloc[index]) if name_image else ""
        problems.add(message(index), int(rows[index]), image)


def read_calls(parser: ColumnParser, call_columns: dict[str, str]) -> list[dict[str, Any]]:
    """Return the further arguments of the pipeline's call of each row.

    Args:
        parser: The table.
        call_columns: Argument -> column.

    Returns:
        For every row: argument -> `Picture`, number or text.
    """
    if not call_columns:
        return [{}] * len(parser.raw)
    values = [parser.call_values(column) for column in call_columns.values()]
    return [dict(zip(call_columns, row, strict=True)) for row in zip(*values, strict=True)]


def call_key(call: dict[str, Any]) -> str:
    """Return a key of what the rows of a batch must share: numbers, and the sizes of pictures."""
    shared = {
        name: image_size(value) if isinstance(value, Picture) else value
        for name, value in call.items()
        if isinstance(value, Picture) or not isinstance(value, str)
    }
    return repr(shared)


def picture_sizes(paths: Sequence[str]) -> list[tuple[int, int] | InputError]:
    """Return (height, width) from the header of each picture, or the error."""

    def size_or_error(path: str) -> tuple[int, int] | InputError:
        try:
            return image_size(path)
        except InputError as error:
            return error

    with ThreadPoolExecutor(THREADS) as pool:
        return list(pool.map(size_or_error, paths))


def _has_generator(device: str) -> bool:
    """Return whether this machine has a random generator on the device."""
    try:
        torch.Generator(device)
    except RuntimeError:  # unknown name, or no such device
        return False
    return True
