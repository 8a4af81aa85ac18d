"""Writes tables as CSV: for this package to read back, or for spreadsheets."""

from __future__ import annotations

import csv
import tempfile
from pathlib import Path
from typing import Literal

import pandas as pd

from lit_distill.data.table_io import MetadataError, Problems, read_table
from lit_distill.errors import InputError

_FORMULA = ("=", "+", "-", "@", "\t", "\r", "\n")
"""What a cell begins with that spreadsheets take for a formula."""


def csv_content(table: pd.DataFrame, where: str) -> bytes:
    """Return a table as CSV in UTF-8 that `read_table` reads back unchanged.

    Args:
        table: The table, with texts and numbers.
        where: What the table is, for the error.

    Raises:
        InputError: If a text can't be stored; names it.
    """
    texts = table.astype(str)
    for name in texts:
        for text in texts[name].unique():
            try:
                text.encode()
            except UnicodeEncodeError as error:
                row = int((texts[name] == text).argmax()) + 1
                raise InputError(
                    f"{where}, row {row}: {name} {text!r} is not valid Unicode (half of a surrogate"
                    " pair, for example of an emoji); correct the text"
                ) from error
    content = _csv(table).encode()
    _check(content, texts, where)
    return content


def spreadsheet_content(table: pd.DataFrame) -> bytes:
    """Return a table as CSV in UTF-8 whose texts spreadsheets don't take for formulas."""

    def plain(value: object) -> object:
        is_formula = isinstance(value, str) and value.startswith(_FORMULA)
        return f"'{value}" if is_formula else value

    return _csv(table.map(plain).rename(columns=plain)).encode(errors="replace")


def _csv(table: pd.DataFrame) -> str:
    texts = table.select_dtypes(exclude=["number", "bool"]).astype(str)
    # pandas does not quote a lone carriage return, which would begin a new row.
    special = any(texts[name].str.contains("\r", regex=False).any() for name in texts)
    quoting: Literal[0, 1] = csv.QUOTE_ALL if special else csv.QUOTE_MINIMAL
    return table.to_csv(index=False, lineterminator="\n", quoting=quoting)


def _check(content: bytes, texts: pd.DataFrame, where: str) -> None:
    """Read a table back, as others will read it.

    Raises:
        InputError: If it is not the same.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "table.csv"
        path.write_bytes(content)
        try:
            read = read_table(path, Problems(where))
        except MetadataError as error:
            raise InputError(f"{where} can't be stored in a CSV file: {error}") from error
    for name in texts:
        stored, found = texts[name].tolist(), read[name].tolist() if name in read else []
        if found != stored:
            pairs = enumerate(zip(stored, found, strict=False), 1)
            row = next((row for row, (text, other) in pairs if text != other), 1)
            raise InputError(
                f"{where}, row {row}: {name} {stored[row - 1]!r} can't be stored in a CSV file; "
                "correct the text"
            )
