"""The table of pairs: read, parsed by declared type, checked; all that is wrong in one error."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pandas as pd

from lit_distill.data.filesystem import parent
from lit_distill.data.schema import Columns, add_row_problems, call_key, picture_sizes, read_calls
from lit_distill.data.table_io import Problems, read_table

REQUIRED_COLUMNS = ("prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale")


def read_metadata(
    path: str | Path,
    base_path: str | Path | None = None,
    call_columns: dict[str, str] | None = None,
    *,
    height: int | None = None,
    width: int | None = None,
    max_pixels: int | None = None,
    allow_outside: bool = False,
) -> pd.DataFrame:
    """Read and check a table of pairs.

    Columns: ``prompt``, ``seed``, ``rand_device``, ``num_inference_steps``, ``cfg_scale`` (the last
    two are the student's) and ``image`` or ``latents``, files relative to `base_path`. Optional:
    ``height``, ``width``. Others stay text. A file made for DiffSynth-Studio works unchanged.

    Args:
        path: .csv (UTF-8 with or without byte order mark), .json (a list of objects) or .jsonl; a
            file or any URL of fsspec (s3://, hf://, memory://).
        base_path: Folder or URL that files are relative to; default: the table's.
        call_columns: Further columns that are arguments of the pipeline's call: argument -> column.
            Files of pictures are opened when a row is used; numbers and texts are as they stand.
        height: With `width`, the size in pixels that every image must have.
        width: See `height`.
        max_pixels: Largest area in pixels; smaller images of any size are accepted.
        allow_outside: Accept files that are not below `base_path`: absolute paths, "..", URLs.

    Returns:
        One row a pair, in the file's order, with a column ``row``, the number a spreadsheet shows
        (header = 1; in JSON the first object is 1); ``image`` and ``latents`` are full paths or
        URLs, empty where not given; ``height`` and ``width`` are read from the image's header where
        not given, 0 where there is no image; ``call`` is a dictionary of `call_columns`' values
        (`Picture`, number or text), and ``call_key`` is equal for rows whose values may share a
        batch.

    Raises:
        FileNotFoundError: If there is no such table.
        MetadataError: Naming every row, column and value that can't be used (up to 50).
    """
    problems = Problems(path)
    table = parse_metadata(
        path,
        problems,
        base_path,
        call_columns,
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
    height: int | None = None,
    width: int | None = None,
    max_pixels: int | None = None,
    allow_outside: bool = False,
) -> pd.DataFrame:
    """Do as `read_metadata`, but note what is wrong in `problems`; such rows are of no use.

    Raises:
        MetadataError: If the table as a whole can't be read, or columns are missing.
    """
    call_columns = call_columns or {}
    raw = read_table(path, problems)
    for column in (*REQUIRED_COLUMNS, *call_columns.values()):
        if column not in raw:
            problems.add(f"column {column!r} is missing; found {', '.join(map(repr, raw.columns))}")
    if not {"image", "latents"} & set(raw.columns):
        problems.add("a column 'image' or 'latents' is needed; found neither")
    if raw.empty:
        problems.add("the table has no rows")
    problems.check()

    optional = [c for c in ("image", "latents", "height", "width") if c not in raw]
    raw = raw.assign(**dict.fromkeys(optional, ""))
    base = str(base_path) if base_path is not None else parent(str(path))
    columns = Columns(raw, problems, base, allow_outside)
    parsed = {
        "seed": columns.integers("seed", 0, 2**63 - 1),
        "num_inference_steps": columns.integers("num_inference_steps", 1, 10_000),
        "cfg_scale": columns.numbers("cfg_scale", 1.0),
        "height": columns.integers("height", 1, 2**20, blank=0),
        "width": columns.integers("width", 1, 2**20, blank=0),
        "image": columns.files("image"),
        "latents": columns.files("latents"),
    }
    columns.texts("prompt", lambda text: text.strip() != "", "a text that is not empty")
    columns.devices("rand_device")
    calls = read_calls(columns, call_columns)
    if call_columns and problems.rows:
        problems.check()  # pictures that are not there have no size to share
    parsed["call"] = pd.Series(calls, index=raw.index, dtype=object)
    parsed["call_key"] = [call_key(call) for call in calls] if call_columns else ""
    table = raw.assign(**parsed)
    table = _fill_sizes(table, problems)
    table = _check_sizes(table, problems, height, width, max_pixels)
    _check_duplicates(table, raw[list(call_columns.values())], problems)
    return table


def _fill_sizes(table: pd.DataFrame, problems: Problems) -> pd.DataFrame:
    """Read the sizes that the table does not give from the images' headers."""
    sizes = table[["height", "width"]].to_numpy().copy()

    def half(index: int) -> str:
        high, wide = sizes[index]
        return f"height and width go together, got height={high or ''}, width={wide or ''}"

    add_row_problems(table, (sizes == 0).sum(axis=1) == 1, problems, half)
    images = table["image"].to_numpy()
    rows = table["row"].to_numpy()
    unknown = np.flatnonzero((sizes == 0).all(axis=1) & (images != ""))
    unknown = np.array([i for i in unknown if int(rows[i]) not in problems.rows], dtype=int)
    for index, size in zip(unknown, picture_sizes(images[unknown].tolist()), strict=True):
        if isinstance(size, ValueError):
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
    """Refuse what does not fit the limits; rows of unknown size get the fixed one.

    Images are never resized: a target must be what the teacher drew.
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

    def say(index: int) -> str:
        high, wide = sizes[index]
        size = f"{high}x{wide} (height x width) = {high * wide} pixels"
        return f"the image is {size}, {limit}; images are never resized"

    add_row_problems(table, bad, problems, say)
    return table.assign(height=sizes[:, 0], width=sizes[:, 1])


def _check_duplicates(table: pd.DataFrame, calls: pd.DataFrame, problems: Problems) -> None:
    """Refuse rows that must draw the same but have different targets: one of them is wrong."""
    key = ["prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale", "height", "width"]
    keys = pd.concat([table[key], calls.add_prefix("call ")], axis=1)
    again = keys.duplicated(keep=False).to_numpy()
    if not again.any():
        return
    group = keys[again].groupby(list(keys), sort=False).ngroup().to_numpy()
    first = np.unique(group, return_index=True)[1][group]
    some = table[again]
    other = np.zeros(len(some), dtype=bool)
    for column in ("image", "latents"):
        values = some[column].to_numpy()
        other |= (values != values[first]) & (values != "") & (values[first] != "")
    origin = some["row"].to_numpy()[first]
    add_row_problems(
        some,
        other,
        problems,
        lambda index: (
            f"another image or latents than in row {origin[index]}, which has the same prompt, "
            "seed, steps, cfg_scale and size: one seed draws one image"
        ),
    )


def hold_out(prompts: pd.Series, fraction: float, seed: int) -> pd.Series:
    """Mark about `fraction` of the prompts, the same ones for a seed however the table grows.

    Returns:
        Boolean, True for held-out rows; all rows of a prompt are on one side.
    """

    def uniform(prompt: str) -> float:
        digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return prompts.map({prompt: uniform(prompt) < fraction for prompt in prompts.unique()})
