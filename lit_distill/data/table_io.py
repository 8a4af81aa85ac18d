"""Tables of text: CSV, JSON or JSONL as it stands, and the problems that were found in one."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_distill.data.filesystem import opened

MAX_PROBLEMS = 50


class MetadataError(ValueError):
    """A metadata table can't be used; the message lists every problem found, up to 50."""


class Problems:
    """Collects what is wrong with a table, so that one error can show it all.

    Attributes:
        rows: Numbers of the rows that something is wrong with.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.rows: set[int] = set()
        self._lines: list[tuple[int, str]] = []
        self._more = 0

    def add(self, text: str, row: int | None = None, image: str = "") -> None:
        """Note one problem; `row` is the number that a spreadsheet shows."""
        place = "" if row is None else f" row {row}"
        shown = f" (image={image!r})" if image else ""
        name = self.path.rpartition("/")[2]
        self._lines.append((row or 0, f"{name}{place}{shown}: {text}"))
        if row is not None:
            self.rows.add(row)

    def shown(self, rows: Any, indices: Any) -> Any:  # noqa: ANN401
        """Return the first of `indices`, to be described; the others are counted only.

        A million bad rows are told as soon as fifty.
        """
        self.rows.update(int(row) for row in rows)
        self._more += max(0, len(indices) - MAX_PROBLEMS)
        return indices[:MAX_PROBLEMS]

    def __str__(self) -> str:
        lines = [text for _, text in sorted(self._lines, key=lambda line: line[0])]
        count = len(lines) + self._more
        more = count - min(len(lines), MAX_PROBLEMS)
        shown = lines[:MAX_PROBLEMS] + ([f"... and {more} more"] if more else [])
        title = "1 problem" if count == 1 else f"{count} problems"
        return "\n".join([f"{title} in {self.path}:", *shown])

    def check(self) -> None:
        """Raise what was collected.

        Raises:
            MetadataError: If there was any problem.
        """
        if self._lines:
            raise MetadataError(str(self))


def read_table(path: str | Path, problems: Problems) -> pd.DataFrame:
    """Read a table as text, whatever its columns: types are declared by who uses them.

    pandas would make NaN of a prompt "NA" and floats of a column of seeds with a blank.

    Args:
        path: .csv, .json (a list of objects) or .jsonl (an object a line); a file or a URL.
        problems: Where duplicate columns and objects that are none are noted.

    Returns:
        Columns of text, empty where not given, and ``row``: the number that a spreadsheet shows
        (header = 1), the number of the object, or of the line.

    Raises:
        FileNotFoundError: If there is no such file.
        MetadataError: If it is not of that format.
    """
    suffix = Path(str(path)).suffix.lower()
    read = {".json": _read_json, ".jsonl": _read_jsonl}.get(suffix, _read_csv)
    try:
        with opened(path) as stream:
            return read(stream, problems)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, ValueError) as error:
        if isinstance(error, MetadataError):
            raise
        kind = {".json": "a JSON list of objects", ".jsonl": "JSONL"}.get(suffix, "a CSV file")
        hint = "" if read is not _read_csv else "; values with commas or line breaks need quotes"
        reason = str(error).replace("Error tokenizing data. C error: ", "").strip()
        raise MetadataError(f"{path} is not {kind} in UTF-8: {reason}{hint}") from error


def _read_csv(stream: Any, problems: Problems) -> pd.DataFrame:  # noqa: ANN401
    # The header is read as a row like the others, else pandas renames what occurs twice.
    table = pd.read_csv(
        stream,
        dtype=str,
        header=None,
        keep_default_na=False,
        na_filter=False,
        skip_blank_lines=False,  # they count as rows in a spreadsheet
        encoding="utf-8-sig",
    )
    header = [str(name).strip() for name in table.iloc[0]]
    for name in sorted({name for name in header if name and header.count(name) > 1}):
        problems.add(f"column {name!r} occurs {header.count(name)} times; keep one of them")
    problems.check()
    table = table.iloc[1:].set_axis(header, axis=1)
    table = table.loc[:, [name != "" for name in header]]
    table = table.assign(row=np.arange(2, len(table) + 2))
    blank = (table["prompt"] == "") if "prompt" in table else pd.Series(False, index=table.index)
    if blank.any():  # a look at all columns only where it can matter
        blank &= (table.drop(columns="row") == "").all(axis=1)
    return table[~blank].reset_index(drop=True)


def _read_json(stream: Any, problems: Problems) -> pd.DataFrame:  # noqa: ANN401
    records = _loads(stream.read().decode("utf-8-sig"))
    if not isinstance(records, list):
        raise ValueError(f"found {type(records).__name__}")
    return _from_records(enumerate(records, 1), problems)


def _read_jsonl(stream: Any, problems: Problems) -> pd.DataFrame:  # noqa: ANN401
    def records() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(io.TextIOWrapper(stream, "utf-8-sig"), 1):
            if line.strip():
                try:
                    yield number, _loads(line)
                except ValueError as error:
                    raise ValueError(f"line {number}: {error}") from error

    return _from_records(records(), problems)


def _loads(text: str) -> Any:  # noqa: ANN401
    """Read JSON, its numbers as they are written: 5 is a seed, 5.0 is none."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"an object has {twice!r} more than once")
        return found

    return json.loads(
        text, parse_int=str, parse_float=str, parse_constant=str, object_pairs_hook=once
    )


def _from_records(records: Iterable[tuple[int, Any]], problems: Problems) -> pd.DataFrame:
    columns: dict[str, list[str]] = {}
    rows: list[int] = []
    for number, record in records:
        if not isinstance(record, dict):
            problems.add(f"must be an object, got {record!r}", number)
            continue
        for name, value in record.items():
            column = columns.setdefault(name, [])
            column.extend([""] * (len(rows) - len(column)))
            column.append(_as_text(value))
        rows.append(number)
    for column in columns.values():
        column.extend([""] * (len(rows) - len(column)))
    return pd.DataFrame(columns, dtype=object).assign(row=rows)


def _as_text(value: Any) -> str:  # noqa: ANN401
    """Return a JSON value as a cell: null is one that is not given."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
