"""Reads a CSV, JSON or JSONL file as a table of text, and collects the problems of a table.

No column has a meaning here; `metadata` and `teacher.prompts` define those.
"""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_distill.data.filesystem import open_file
from lit_distill.errors import InputError

MAX_PROBLEMS = 50
"""Number of problems that an error lists; the others are counted."""


class MetadataError(InputError):
    """A table can't be used; the message lists all problems, up to 50."""


class Problems:
    """Collects the problems of a table, so that one error can list all of them.

    Attributes:
        rows: Numbers of the rows with a problem.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = str(path)
        self.rows: set[int] = set()
        self._lines: list[tuple[int, str]] = []
        self._more = 0

    def add(self, text: str, row: int | None = None, image: str = "") -> None:
        """Add one problem; `row` is the number that a spreadsheet shows."""
        where = "" if row is None else f" row {row}"
        named = f" (image={image!r})" if image else ""
        name = self.path.rpartition("/")[2]
        self._lines.append((row or 0, f"{name}{where}{named}: {text}"))
        if row is not None:
            self.rows.add(row)

    def add_rows(self, rows: Any, indices: Any) -> Any:  # noqa: ANN401
        """Count bad rows and return the first of `indices`, of which messages are to be added.

        With messages for those only, a million bad rows are reported as fast as fifty.
        """
        self.rows.update(int(row) for row in rows)
        self._more += max(0, len(indices) - MAX_PROBLEMS)
        return indices[:MAX_PROBLEMS]

    def __str__(self) -> str:
        lines = [text for _, text in sorted(self._lines, key=lambda line: line[0])]
        count = len(lines) + self._more
        more = count - min(len(lines), MAX_PROBLEMS)
        listed = lines[:MAX_PROBLEMS] + ([f"... and {more} more"] if more else [])
        title = "1 problem" if count == 1 else f"{count} problems"
        return "\n".join([f"{title} in {self.path}:", *listed])

    def check(self) -> None:
        """Raise an error if there are problems.

        Raises:
            MetadataError: Lists all problems.
        """
        if self._lines:
            raise MetadataError(str(self))


def read_table(path: str | Path, problems: Problems) -> pd.DataFrame:
    """Read a table with all columns as text.

    Types are not inferred: pandas would turn a prompt "NA" into NaN, and a column of seeds with an
    empty cell into floats.

    Args:
        path: .csv, .json (a list of objects) or .jsonl (one object per line); a file or a URL.
        problems: Collects duplicate columns and entries that are not objects.

    Returns:
        Columns of text, empty where not given, and ``row``: the number that a spreadsheet shows
        (header = 1), the number of the JSON object, or the line of the JSONL file.

    Raises:
        FileNotFoundError: If there is no such file.
        MetadataError: If it is not in the format of its suffix.
    """
    suffix = Path(str(path)).suffix.lower()
    read = {".json": _read_json, ".jsonl": _read_jsonl}.get(suffix, _read_csv)
    try:
        with open_file(path) as stream:
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
    # The header is read as an ordinary row because pandas would rename duplicate columns.
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
    if blank.any():  # all columns are compared only if needed, for speed
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
    """Parse JSON with numbers as they are written: 5 is a valid seed, 5.0 is not."""

    def without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        record = dict(pairs)
        if len(record) < len(pairs):
            names = [name for name, _ in pairs]
            duplicate = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"an object has {duplicate!r} more than once")
        return record

    return json.loads(
        text,
        parse_int=str,
        parse_float=str,
        parse_constant=str,
        object_pairs_hook=without_duplicates,
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
    """Return a JSON value as the text of a cell; null is an empty cell."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
