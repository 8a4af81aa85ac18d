"""Reads and checks the metadata table of pairs: which rows are valid.

`table_io` reads the file, `columns` says which columns it has, `schema` parses them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from lit_distill.data.columns import REQUIRED_COLUMNS, map_columns, offer_mapping
from lit_distill.data.schema import (
    ColumnParser,
    add_row_problems,
    call_key,
    picture_sizes,
    read_calls,
)
from lit_distill.data.table_io import Problems, column_names, read_table, table_folder
from lit_distill.errors import InputError


def read_metadata(
    path: str | Path,
    base_path: str | Path | None = None,
    call_columns: dict[str, str] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    constants: Mapping[str, Any] | None = None,
    height: int | None = None,
    width: int | None = None,
    max_pixels: int | None = None,
    allow_outside: bool = False,
) -> pd.DataFrame:
    """Read and check a table of pairs.

    Columns: ``prompt``, ``seed``, ``rand_device``, ``num_inference_steps``, ``cfg_scale`` (the last
    two are the student's) and ``image`` or ``latents``, files relative to `base_path`. Optional:
    ``height``, ``width``. Other columns stay text. Metadata files made for DiffSynth-Studio can be
    used unchanged.

    Args:
        path: .csv (UTF-8 with or without byte order mark), .json (a list of objects), .jsonl or
            .parquet; a file or any URL of fsspec (s3://, hf://, memory://); or a folder, as
            `lit_distill.data.table_io.read_table` accepts it.
        base_path: Folder or URL that files are relative to; default: the table's folder.
        call_columns: Further columns to pass to the pipeline's call: argument -> column. Pictures
            are opened when a row is used; numbers and texts are passed as they are.
        columns: The table's names of the columns, where they differ: our name -> its name.
        constants: Values of ``rand_device``, ``num_inference_steps`` or ``cfg_scale`` for all rows
            of a table without these columns.
        height: With `width`, the size in pixels that every image must have.
        width: See `height`.
        max_pixels: Largest accepted area in pixels.
        allow_outside: Accept files that are not below `base_path`: absolute paths, "..", URLs.

    Returns:
        One row per pair, in the file's order. ``row`` is the number that a spreadsheet shows
        (header = 1; in JSON the first object is 1). ``image`` and ``latents`` are full paths or
        URLs, empty if not given. ``height`` and ``width`` are read from the image's header if not
        given, and 0 if there is no image. ``call`` is a dictionary of the values of `call_columns`
        (`Picture`, number or text). ``call_key`` is equal for rows that may share a batch.

    Raises:
        FileNotFoundError: If there is no such table.
        MetadataError: Lists every row, column and value that can't be used (up to 50).
    """
    problems = Problems(path, columns)
    table = parse_metadata(
        path,
        problems,
        base_path,
        call_columns,
        constants=constants,
        height=height,
        width=width,
        max_pixels=max_pixels,
        allow_outside=allow_outside,
    )
    problems.check()
    return table


def parse_metadata(
    path: str | Path,
    problems: Problems,
    base_path: str | Path | None = None,
    call_columns: dict[str, str] | None = None,
    *,
    constants: Mapping[str, Any] | None = None,
    height: int | None = None,
    width: int | None = None,
    max_pixels: int | None = None,
    allow_outside: bool = False,
) -> pd.DataFrame:
    """Do as `read_metadata`, but collect invalid rows in `problems`.

    Returns:
        As `read_metadata`. The parsed values of rows in `problems.rows` are placeholders.

    Raises:
        MetadataError: If the table as a whole can't be read, or columns are missing.
    """
    call_columns = call_columns or {}
    raw = _read_columns(path, problems, list(call_columns.values()), constants)
    base = str(base_path) if base_path is not None else table_folder(path)
    parser = ColumnParser(raw, problems, base, allow_outside)
    parsed = {
        "seed": parser.integers("seed", 0, 2**63 - 1),
        "num_inference_steps": parser.integers("num_inference_steps", 1, 10_000),
        "cfg_scale": parser.floats("cfg_scale", 1.0),
        "height": parser.integers("height", 1, 2**20, blank=0),
        "width": parser.integers("width", 1, 2**20, blank=0),
        "image": parser.existing_files("image"),
        "latents": parser.existing_files("latents"),
    }
    parser.check_texts("prompt", lambda text: text.strip() != "", "a text that is not empty")
    parser.check_devices("rand_device")
    calls = read_calls(parser, call_columns)
    if call_columns and problems.rows:
        problems.check()  # the key below needs the sizes of the pictures
    parsed["call"] = pd.Series(calls, index=raw.index, dtype=object)
    parsed["call_key"] = [call_key(call) for call in calls] if call_columns else ""
    table = raw.assign(**parsed)
    table = _fill_sizes(table, problems)
    table = _check_sizes(table, problems, height, width, max_pixels)
    _check_duplicates(table, raw[list(call_columns.values())], problems)
    return table


def _read_columns(
    path: str | Path,
    problems: Problems,
    call_columns: list[str],
    constants: Mapping[str, Any] | None,
) -> pd.DataFrame:
    """Read a table and check that it has the columns that are needed.

    Raises:
        MetadataError: If the table can't be read, columns are missing, or there are no rows.
    """
    raw = map_columns(read_table(path, problems), problems, constants)
    # What data.columns names and the table does not have is reported already.
    needed = [name for name in REQUIRED_COLUMNS if name not in problems.columns]
    missing = [name for name in (*needed, *call_columns) if name not in raw]
    for name in missing:
        problems.add(f"column {name!r} is missing; found {column_names(raw)}")
    if not {"image", "latents"} & {*raw.columns, *problems.columns}:
        problems.add("a column 'image' or 'latents' is needed; found neither")
        missing.append("image")
    offer_mapping(raw, missing, problems)
    if raw.empty:
        problems.add("the table has no rows")
    problems.check()
    optional = [c for c in ("image", "latents", "height", "width") if c not in raw]
    return raw.assign(**dict.fromkeys(optional, ""))


def _fill_sizes(table: pd.DataFrame, problems: Problems) -> pd.DataFrame:
    """Fill in missing sizes from the images' headers."""
    sizes = table[["height", "width"]].to_numpy().copy()

    def one_missing(index: int) -> str:
        height, width = sizes[index]
        return f"height and width go together, got height={height or ''}, width={width or ''}"

    add_row_problems(table, (sizes == 0).sum(axis=1) == 1, problems, one_missing)
    images = table["image"].to_numpy()
    rows = table["row"].to_numpy()
    unknown = np.flatnonzero((sizes == 0).all(axis=1) & (images != ""))
    unknown = np.array([i for i in unknown if int(rows[i]) not in problems.rows], dtype=int)
    for index, size in zip(unknown, picture_sizes(images[unknown].tolist()), strict=True):
        if isinstance(size, InputError):
            problems.add(f"image: {size}", int(rows[index]), str(images[index]))
        else:
            sizes[index] = size
    return table.assign(height=sizes[:, 0], width=sizes[:, 1])


def _check_sizes(
    table: pd.DataFrame,
    problems: Problems,
    height: int | None,
    width: int | None,
    max_pixels: int | None,
) -> pd.DataFrame:
    """Check sizes against the limits; rows of unknown size get the required one.

    Images are never resized: a target must be exactly what the teacher generated.
    """
    sizes = table[["height", "width"]].to_numpy()
    unknown = (sizes == 0).any(axis=1, keepdims=True)
    if height and width:
        sizes = np.where(unknown, (height, width), sizes)
        bad = (sizes != (height, width)).any(axis=1)
        limit = f"but height and width are set to {height}x{width}"
    else:
        bad = sizes.prod(axis=1) > (max_pixels or np.inf)
        limit = f"more than max_pixels={max_pixels}"

    def message(index: int) -> str:
        rows, columns = sizes[index]
        size = f"{rows}x{columns} (height x width) = {rows * columns} pixels"
        return f"the image is {size}, {limit}; images are never resized"

    add_row_problems(table, bad, problems, message)
    return table.assign(height=sizes[:, 0], width=sizes[:, 1])


def _check_duplicates(table: pd.DataFrame, calls: pd.DataFrame, problems: Problems) -> None:
    """Refuse rows with the same settings but different targets: one of the targets is wrong."""
    key = ["prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale", "height", "width"]
    keys = pd.concat([table[key], calls.add_prefix("call ")], axis=1)
    repeated = keys.duplicated(keep=False).to_numpy()
    if not repeated.any():
        return
    group = keys[repeated].groupby(list(keys), sort=False).ngroup().to_numpy()
    first = np.unique(group, return_index=True)[1][group]
    duplicates = table[repeated]
    differs = np.zeros(len(duplicates), dtype=bool)
    for column in ("image", "latents"):
        values = duplicates[column].to_numpy()
        differs |= (values != values[first]) & (values != "") & (values[first] != "")
    first_row = duplicates["row"].to_numpy()[first]
    add_row_problems(
        duplicates,
        differs,
        problems,
        lambda index: (
            f"another image or latents than in row {first_row[index]}, which has the same prompt, "
            "seed, steps, cfg_scale and size: a seed gives one image"
        ),
    )


def hold_out(prompts: pd.Series, fraction: float, seed: int) -> pd.Series:
    """Hold out about `fraction` of the prompts; the choice depends only on the seed and the prompt.

    Returns:
        Boolean, True for held-out rows. All rows of a prompt are on the same side.
    """

    def uniform(prompt: str) -> float:
        digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return prompts.map({prompt: uniform(prompt) < fraction for prompt in prompts.unique()})
