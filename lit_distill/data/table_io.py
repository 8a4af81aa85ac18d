"""Reads a file of any format as a table of text, and collects the problems of a table.

No column has a meaning here; `columns`, `metadata` and `teacher.prompts` define those.
"""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_distill.data.arrow_files import read_records, saved_files
from lit_distill.data.filesystem import open_file, parent
from lit_distill.data.text import decode, invalid_character, parse_json, shorten
from lit_distill.errors import InputError

MAX_PROBLEMS = 50
"""Number of problems that an error lists; the others are counted."""


class MetadataError(InputError):
    """A table can't be used; the message lists all problems, up to 50."""


class Problems:
    """Collects the problems of a table, so that one error can list all of them.

    Args:
        path: What the user calls the table.
        columns: What the table calls our columns, where its name differs: our name -> its name.

    Attributes:
        rows: Numbers of the rows with a problem.
        hints: Sentences to end the message with.
    """

    def __init__(self, path: str | Path, columns: Mapping[str, str] | None = None) -> None:
        self.path = str(path)
        self.columns = dict(columns or {})
        self.rows: set[int] = set()
        self.hints: list[str] = []
        self._lines: list[tuple[int, str]] = []
        self._more = 0

    def add(self, text: str, row: int | None = None, image: str = "") -> None:
        """Add one problem; `row` is the number that a spreadsheet shows."""
        where = "" if row is None else f" row {row}"
        named = f" (image={shorten(image, 200)})" if image else ""
        name = self.path.rstrip("/").rpartition("/")[2]
        self._lines.append((row or 0, f"{name}{where}{named}: {text}"))
        if row is not None:
            self.rows.add(row)

    def own_name(self, column: str) -> str:
        """Return the name of one of our columns for a message: the table's name first."""
        theirs = self.columns.get(column, column)
        return column if theirs == column else f"{theirs} ({column})"

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
        return "\n".join([f"{title} in {self.path}:", *listed, *self.hints])

    def check(self) -> None:
        """Raise an error if there are problems.

        Raises:
            MetadataError: Lists all problems.
        """
        if self._lines:
            raise MetadataError(str(self))


FORMATS = (".csv", ".json", ".jsonl", ".parquet")
"""Suffixes of tables."""


def read_table(path: str | Path, problems: Problems) -> pd.DataFrame:
    """Read a table with all columns as text.

    Types are not inferred: a prompt "NA" stays a text, and so does a seed beside an empty cell.

    Args:
        path: .csv, .json (a list of objects), .jsonl (one object per line) or .parquet; a file or
            a URL. Or a folder: with a table metadata.csv, .json, .jsonl or .parquet in it, as
            `datasets` reads it as an imagefolder, or as `datasets.Dataset.save_to_disk` writes it.
        problems: Collects rows with too many values, entries that are not objects, and texts that
            can't be written to a file.

    Returns:
        Columns of text, empty where not given, and ``row``: the number that a spreadsheet shows
        (header = 1), the number of the JSON object or of the row of the parquet file or folder, or
        the line of the JSONL file. A file in a cell of a parquet file or folder is an
        `EmbeddedFile`.

    Raises:
        FileNotFoundError: If there is no such file.
        MetadataError: If it is not in the format of its suffix, or a folder is not a table.
    """
    files = _table_files(str(path))
    suffix = Path(files[0]).suffix.lower() if files else ".arrow"
    try:
        if suffix in (".parquet", ".arrow"):
            records = (record for file in files for record in read_records(file))
            return _from_records(enumerate(records, 1), problems)
        read = {".json": _read_json, ".jsonl": _read_jsonl}.get(suffix, _read_csv)
        return read(read_text(files[0]), problems)
    except MetadataError:
        raise
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None
    except ValueError as error:
        if isinstance(error.__cause__, ImportError):
            raise
        raise MetadataError(
            f"{path} is not {_KINDS.get(suffix, _KINDS['.csv'])}: {error}"
        ) from error


_KINDS = {
    ".csv": "a CSV file in UTF-8",
    ".json": "a JSON list of objects in UTF-8",
    ".jsonl": "JSONL in UTF-8",
    ".parquet": "a parquet file",
    ".arrow": "a folder of datasets' save_to_disk",
}


def is_table(path: str | Path) -> bool:
    """Return whether a path is that of a table, by its suffix, or of a folder."""
    return Path(str(path)).suffix.lower() in FORMATS or _is_folder(str(path))


def table_folder(path: str | Path) -> str:
    """Return the folder that a table's files are relative to: its own, or that of its file."""
    return str(path) if _is_folder(str(path)) else parent(str(path))


def _is_folder(path: str) -> bool:
    return Path(path).is_dir()


def _table_files(path: str) -> list[str]:
    """Return the file of a table, or the Arrow files of a folder.

    Raises:
        MetadataError: If a folder holds no table, or several.
    """
    if not _is_folder(path):
        return [path]
    folder = Path(path)
    if (folder / "state.json").is_file():
        return saved_files(folder)
    if (folder / "dataset_dict.json").is_file():
        splits = sorted(each.parent.name for each in folder.glob("*/state.json"))
        raise MetadataError(
            f"{path} holds several splits ({', '.join(splits)}): name one, as in "
            f"{path.rstrip('/')}/{splits[0] if splits else 'train'}"
        )
    found = [str(folder / f"metadata{s}") for s in FORMATS if (folder / f"metadata{s}").is_file()]
    if len(found) != 1:
        names = ", ".join(f"metadata{suffix}" for suffix in FORMATS)
        raise MetadataError(
            f"{path} is a folder with {' and '.join(found) or 'no table'}: name the table itself, "
            f"or a folder with one of {names}, or one that datasets' save_to_disk wrote"
        )
    return found


def column_names(table: pd.DataFrame) -> str:
    """Return the names of a table's columns for a message; the first ones if there are many."""
    names = [shorten(str(name)) for name in table if name != "row"]
    return ", ".join(names[:30]) + (f" and {len(names) - 30} more" if len(names) > 30 else "")


def read_text(path: str | Path) -> str:
    """Return the text of a UTF-8 file or URL.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not UTF-8; the message does not name the file.
    """
    try:
        with open_file(path) as stream:
            return decode(stream.read())
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist") from None


def _read_csv(text: str, problems: Problems) -> pd.DataFrame:
    header, rows = _check_csv(text, problems)
    # All lines are read as rows, since pandas would rename duplicate columns.
    table = pd.read_csv(
        io.StringIO(text, newline=""),
        dtype=object,
        header=None,
        names=range(len(header)),
        index_col=False,
        keep_default_na=False,
        na_filter=False,
        skip_blank_lines=False,  # they count as rows in a spreadsheet
    )
    if len(table) != rows + 1:
        raise InputError(f"its lines are ambiguous: {rows} rows, or {len(table) - 1}")
    table = table.iloc[1:].set_axis(header, axis=1)
    if "" in header:
        if (table[[""]] != "").to_numpy().any():
            problems.add("the header has a column without a name, but rows have values in it")
        table = table.drop(columns="")
    problems.check()
    table = table.assign(row=np.arange(2, rows + 2))
    blank = (table["prompt"] == "") if "prompt" in table else pd.Series(False, index=table.index)
    if blank.any():  # all columns are compared only if needed, for speed
        blank &= (table.drop(columns="row") == "").all(axis=1)
    return table[~blank].reset_index(drop=True)


def _check_csv(text: str, problems: Problems) -> tuple[list[str], int]:
    """Check what pandas passes over: quotes, the number of values in a row, and column names.

    pandas reads the values all the same: it takes a fifth of the time for a million rows.

    Returns:
        The names of the columns, and the number of rows below them.
    """
    header: list[str] | None = None
    number = 0
    try:
        for number, cells in enumerate(csv.reader(io.StringIO(text, newline=""), strict=True), 1):
            if header is None:
                header = [name.strip() for name in cells]
            elif len(cells) > len(header):
                problems.add(
                    f"has {len(cells)} values, but the header has {len(header)} columns; values "
                    "with commas or line breaks need quotes",
                    number,
                )
    except csv.Error as error:
        problems.add(_QUOTING.get(str(error), str(error)), number + 1)
    for name, count in sorted(Counter(header).items()):
        if name and count > 1:
            problems.add(f"column {shorten(name)} occurs {count} times; keep one of them")
    problems.check()
    if not header:
        raise InputError("it has no header")
    return header, number - 1


_QUOTING = {
    "',' expected after '\"'": "has text after a closing quote; write a quote in a value twice, as "
    'in "a ""good"" one"',
    "unexpected end of data": "has a quote that is never closed",
}
"""What Python's reader reports -> what it means."""


def _read_json(text: str, problems: Problems) -> pd.DataFrame:
    records = _loads(text)
    if not isinstance(records, list):
        raise InputError(f"found {type(records).__name__}")
    return _from_records(enumerate(records, 1), problems)


def _read_jsonl(text: str, problems: Problems) -> pd.DataFrame:
    def records() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(io.StringIO(text, newline=None), 1):
            if line.strip():
                try:
                    yield number, _loads(line)
                except ValueError as error:
                    raise InputError(f"line {number}: {error}") from error

    return _from_records(records(), problems)


def _loads(text: str) -> Any:  # noqa: ANN401
    """Parse JSON with numbers as they are written: 5 is a valid seed, 5.0 is not."""
    return parse_json(text, parse_int=str, parse_float=str, parse_constant=str)


def _from_records(records: Iterable[tuple[int, Any]], problems: Problems) -> pd.DataFrame:
    columns: dict[str, list[str]] = {}
    rows: list[int] = []
    for number, record in records:
        if not isinstance(record, dict):
            problems.add(f"must be an object, got {shorten(record)}", number)
            continue
        for name, value in record.items():
            if invalid := invalid_character(name + _as_text(value)):
                problems.add(f"{shorten(name)} holds {invalid}", number)
            column = columns.setdefault(name, [])
            column.extend([""] * (len(rows) - len(column)))
            column.append(_as_text(value))
        rows.append(number)
    for column in columns.values():
        column.extend([""] * (len(rows) - len(column)))
    return pd.DataFrame(columns, dtype=object).assign(row=rows)


def _as_text(value: Any) -> str:  # noqa: ANN401
    """Return a value of JSON or Arrow as the text of a cell; null is an empty cell."""
    if value is None:
        return ""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
