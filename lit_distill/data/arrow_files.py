"""Tables in parquet and Arrow files, and the files that are embedded in their cells.

An embedded file is referred to as ``train.parquet#image[7]``: the cell of column ``image`` in row
7, the first row being 1. `lit_distill.data.filesystem` opens it as any other file.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from lit_distill.errors import InputError

_REFERENCE = re.compile(r"(.+\.(?:parquet|arrow))#([^/\[\]]+)\[(\d+)\]", re.DOTALL)

_lock = threading.Lock()
"""Lets one thread read a group of rows, and the others find it."""


class EmbeddedFile(str):
    """Reference to a file in a cell; the type distinguishes it from a path that a user wrote."""


def split_reference(path: str) -> tuple[str, str, int] | None:
    """Return file, column and index from 0 of a reference to a cell; None for any other path."""
    match = _REFERENCE.fullmatch(path) if path.endswith("]") else None
    return None if match is None else (match[1], unquote(match[2]), int(match[3]) - 1)


def saved_files(folder: str | Path) -> list[str]:
    """Return the Arrow files of a folder that `datasets.Dataset.save_to_disk` wrote, in order.

    Raises:
        InputError: If the folder's ``state.json`` lists no files.
    """
    state = Path(folder) / "state.json"
    try:
        names = [entry["filename"] for entry in json.loads(state.read_text())["_data_files"]]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{state} is not as datasets' save_to_disk writes it: {error!r}"
        ) from error
    return [str(Path(folder) / name) for name in names]


def read_records(path: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of a .parquet or .arrow file; embedded files as `EmbeddedFile`.

    Only a few hundred rows are in memory at a time.

    Args:
        path: The file; a .parquet file also as a URL.

    Raises:
        InputError: If pyarrow is not installed.
        OSError: If the file can't be read.
        ValueError: If it is of another format.
    """
    arrow = _pyarrow(path)
    row = 0
    for batch in _batches(path):
        columns = {}
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            paths: list[Any] = [None] * len(column)
            data = column
            if _is_file(column.type):
                data = arrow.compute.struct_field(column, "bytes")
                paths = arrow.compute.struct_field(column, "path").to_pylist()
            elif not _is_binary(column.type):
                columns[name] = column.to_pylist()
                continue
            cell = f"{path}#{quote(name, safe=' ')}"
            columns[name] = [
                EmbeddedFile(f"{cell}[{row + index}]") if embedded else paths[index - 1]
                for index, embedded in enumerate(data.is_valid().to_pylist(), 1)
            ]
        row += len(batch)
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def read_cell(path: str, column: str, index: int) -> bytes:
    """Return the content of an embedded file.

    Args:
        path: The table's file.
        column: Name of its column.
        index: Its row, from 0.

    Raises:
        OSError: If the file has no such cell any more, or can't be read.
    """
    try:
        modified = 0.0 if "://" in path else Path(path).stat().st_mtime
        with _lock:
            starts = _row_groups(path, modified)
            group = max(i for i, start in enumerate(starts) if start <= index)
            values = _group(path, modified, column, group)
        value = values[index - starts[group]].as_py()
        content = value["bytes"] if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            raise KeyError(column)
    except (KeyError, IndexError, ValueError) as error:
        raise OSError(f"{path} has no file in row {index + 1} of column {column!r}") from error
    return content


def _batches(path: str) -> Iterator[Any]:
    if path.endswith(".arrow"):
        yield from _memory_mapped(path).to_batches()
        return
    with _parquet(path) as file:
        yield from file.iter_batches(batch_size=256, use_threads=False)


@contextmanager
def _parquet(path: str) -> Iterator[Any]:
    import fsspec

    parquet = _pyarrow(path).parquet
    with fsspec.open(path, "rb") as stream:
        yield parquet.ParquetFile(stream)


def _memory_mapped(path: str) -> Any:  # noqa: ANN401
    """Return the table of an Arrow file; its pages are read when they are used."""
    arrow = _pyarrow(path)
    return arrow.ipc.open_stream(arrow.memory_map(os.fspath(path))).read_all()


@lru_cache(maxsize=64)
def _row_groups(path: str, modified: float) -> list[int]:
    """Return the first row of each group of rows that is read at once."""
    if path.endswith(".arrow"):
        return [0]
    with _parquet(path) as file:
        sizes = [file.metadata.row_group(i).num_rows for i in range(file.num_row_groups)]
    return [sum(sizes[:i]) for i in range(len(sizes))] or [0]


@lru_cache(maxsize=4)
def _group(path: str, modified: float, column: str, group: int) -> Any:  # noqa: ANN401
    """Return a column in a group of rows; the last ones are kept."""
    if path.endswith(".arrow"):
        return _memory_mapped(path).column(column)
    with _parquet(path) as file:
        return file.read_row_group(group, columns=[column], use_threads=False).column(column)


def _is_file(kind: Any) -> bool:  # noqa: ANN401
    """Return whether a type is that of the features Image and Audio of `datasets`."""
    names = [kind.field(i).name for i in range(kind.num_fields)]
    return sorted(names) == ["bytes", "path"]


def _is_binary(kind: Any) -> bool:  # noqa: ANN401
    return str(kind) in ("binary", "large_binary", "binary_view")


def _pyarrow(path: str) -> Any:  # noqa: ANN401
    try:
        import pyarrow
        import pyarrow.compute
        import pyarrow.ipc
        import pyarrow.parquet
    except ImportError as error:
        raise InputError(
            f"{path} needs the package pyarrow: pip install 'lit-distill[arrow]'"
        ) from error
    return pyarrow
