"""The full check of a data set for `lit-distill check`: every file is read, not only the table."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from tqdm.auto import tqdm

from lit_distill.data.dataset import LATENTS_KEY
from lit_distill.data.filesystem import THREADS, open_file
from lit_distill.data.images import Picture, read_picture
from lit_distill.data.metadata import parse_metadata
from lit_distill.data.schema import add_row_problems
from lit_distill.data.table_io import Problems
from lit_distill.data.text import decode, parse_json
from lit_distill.errors import InputError

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Accepted data types of latents in safetensors files, with their size in bytes."""


def check_data(
    path: str | Path,
    base_path: str | Path | None = None,
    call_columns: dict[str, str] | None = None,
    **limits: Any,  # noqa: ANN401
) -> pd.DataFrame:
    """Check the table as `read_metadata` does, decode every picture, read all headers of latents.

    Args:
        path: As in `read_metadata`.
        base_path: As in `read_metadata`.
        call_columns: As in `read_metadata`.
        **limits: ``height``, ``width``, ``max_pixels``, ``allow_outside``, as in `read_metadata`.

    Returns:
        The table.

    Raises:
        FileNotFoundError: If there is no such table.
        MetadataError: Lists every row, column and value that can't be used (up to 50).
    """
    problems = Problems(path)
    table = parse_metadata(path, problems, base_path, call_columns, **limits)
    fine = ~table["row"].isin(problems.rows).to_numpy()
    _check_pictures(table, fine, problems)
    _check_latents(table, fine, problems)
    problems.check()
    return table


def summary(table: pd.DataFrame) -> str:
    """Return the number of rows of each size, setting and kind of target, as a text table."""
    latents, image = table["latents"] != "", table["image"] != ""
    target = np.select([latents, image], ["latents", "image"], "online teacher")
    settings = pd.DataFrame(
        {
            "height": table["height"].replace(0, "default"),
            "width": table["width"].replace(0, "default"),
            "steps": table["num_inference_steps"],
            "cfg": table["cfg_scale"].map("{:g}".format),
            "rand_device": table["rand_device"],
            "target": target,
        }
    )
    counts = settings.astype(str).value_counts().rename("rows").reset_index()
    return str(counts.to_string(index=False))


def _map_files(function: Callable[[Any], Any], values: list[Any], title: str) -> list[Any]:
    """Apply a function to all values in threads, with a progress bar."""
    if not values:
        return []
    with ThreadPoolExecutor(THREADS) as pool:
        return list(tqdm(pool.map(function, values), desc=title, total=len(values), unit="file"))


def _check_pictures(table: pd.DataFrame, fine: np.ndarray, problems: Problems) -> None:
    """Decode every picture and compare its size with the table's."""

    def problem(task: tuple[str, tuple[int, int] | None]) -> str | None:
        path, size = task
        try:
            picture = read_picture(path)
        except InputError as error:
            return str(error)
        actual = (picture.height, picture.width)
        if size is not None and actual != size:
            listed = f"the table says {size[0]}x{size[1]}"
            return f"{path} is {actual[0]}x{actual[1]} (height x width), but {listed}"
        return None

    def check(indices: np.ndarray, tasks: list[Any], title: str) -> None:
        messages = _map_files(problem, tasks, title)
        bad = np.zeros(len(table), dtype=bool)
        bad[indices] = [message is not None for message in messages]
        by_index = dict(zip(indices.tolist(), messages, strict=True))
        add_row_problems(table, bad, problems, lambda index: str(by_index[index]))

    images = table["image"].to_numpy()
    sizes = table[["height", "width"]].to_numpy().tolist()
    indices = np.flatnonzero(fine & (images != ""))
    check(indices, [(images[i], tuple(sizes[i])) for i in indices], "images")
    calls = table["call"].tolist()
    for name in [k for k, v in calls[0].items() if isinstance(v, Picture)]:
        indices = np.flatnonzero(fine)
        check(indices, [(calls[i][name], None) for i in indices], name)


def _check_latents(table: pd.DataFrame, fine: np.ndarray, problems: Problems) -> None:
    """Read the headers of latents: files must be complete, with one shape for each size."""
    paths = table["latents"].to_numpy()
    indices = np.flatnonzero(fine & (paths != ""))

    def shape_or_problem(path: str) -> tuple[int, ...] | str:
        try:
            return latents_header(path)[0]
        except InputError as error:
            return str(error)

    shapes = _map_files(shape_or_problem, paths[indices].tolist(), "latents")
    sizes = table[["height", "width"]].to_numpy().tolist()
    keys = [(*sizes[i], table["call_key"].iloc[i]) for i in indices]
    counts: dict[Any, Counter[tuple[int, ...]]] = {}
    for key, shape in zip(keys, shapes, strict=True):
        if not isinstance(shape, str):
            counts.setdefault(key, Counter())[shape] += 1
    for index, key, shape in zip(indices, keys, shapes, strict=True):
        usual = counts[key].most_common(1)[0][0] if key in counts else None
        if isinstance(shape, str):
            text = shape
        elif shape != usual:
            text = f"latents are of shape {shape}, but {usual} in most rows of this size"
        else:
            continue
        problems.add(text, int(table["row"].iloc[index]), str(table["image"].iloc[index]))


def latents_header(path: str) -> tuple[tuple[int, ...], str]:
    """Return the shape and the data type (such as F32) of a file of latents.

    Raises:
        InputError: If it is not a complete safetensors file with floats in a tensor ``latents``.
    """
    try:
        with open_file(path) as stream:
            length = int.from_bytes(stream.read(8), "little")
            # The limit of the format: other kinds of files would give absurd lengths.
            header = parse_json(decode(stream.read(length) if length <= 100_000_000 else b""))
            size = stream.seek(0, 2) - 8 - length
        entry = header[LATENTS_KEY]
        shape, dtype = tuple(map(_whole, entry["shape"])), str(entry["dtype"])
        begin, stop = map(_whole, entry["data_offsets"])
        end = max(_whole(e["data_offsets"][1]) for k, e in header.items() if k != "__metadata__")
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no tensor {LATENTS_KEY!r} in safetensors format") from error
    if dtype not in FLOATS:
        kinds = ", ".join(FLOATS)
        raise InputError(f"{path} holds latents of type {dtype[:40]}; accepted: {kinds}")
    if size != end or stop - begin != math.prod(shape) * FLOATS[dtype]:
        raise InputError(f"{path} is truncated or damaged: {size} bytes of data, not {end}")
    return shape, dtype


def _whole(value: Any) -> int:  # noqa: ANN401
    """Return a number of a header.

    Raises:
        TypeError: If it is not an integer >= 0.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not an integer >= 0")
    return value
