"""The full check of a data set for `lit-distill check`: every file is read, not only the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from PIL import Image
from tqdm.auto import tqdm

from lit_distill.data.filesystem import THREADS
from lit_distill.data.images import Picture, read_picture
from lit_distill.data.latents_file import LATENTS_KEY, not_finite, read_latents
from lit_distill.data.metadata import parse_metadata
from lit_distill.data.schema import add_row_problems
from lit_distill.data.table_io import Problems
from lit_distill.errors import InputError


def check_data(
    path: str | Path,
    base_path: str | Path | None = None,
    call_columns: dict[str, str] | None = None,
    *,
    columns: Mapping[str, str] | None = None,
    **options: Any,  # noqa: ANN401
) -> pd.DataFrame:
    """Check the table as `read_metadata` does, decode every picture, and read all latents.

    Args:
        path: As in `read_metadata`.
        base_path: As in `read_metadata`.
        call_columns: As in `read_metadata`.
        columns: As in `read_metadata`.
        **options: The other options of `read_metadata`.

    Returns:
        The table.

    Raises:
        FileNotFoundError: If there is no such table.
        MetadataError: Lists every row, column and value that can't be used (up to 50).
    """
    problems = Problems(path, columns)
    table = parse_metadata(path, problems, base_path, call_columns, **options)
    fine = ~table["row"].isin(problems.rows).to_numpy()
    _check_pictures(table, fine, problems)
    _check_latents(table, fine, problems)
    problems.check()
    return table


def is_flat(picture: Image.Image) -> bool:
    """Return whether all pixels of a picture are equal."""
    bands = picture.convert("RGB").split()
    return all(low == high for low, high in (band.getextrema() for band in bands))


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
        results = pool.map(function, values)
        options = {"total": len(values), "unit": "file", "leave": False}
        return list(tqdm(results, desc=title, disable=None, **options))  # None: in a terminal


def _check_pictures(table: pd.DataFrame, fine: np.ndarray, problems: Problems) -> None:
    """Decode every picture; compare the size of targets with the table's."""

    def problem(task: tuple[str, tuple[int, int] | None]) -> str | None:
        path, size = task
        is_target = size is not None
        try:
            picture = read_picture(path)
        except InputError as error:
            return str(error)
        actual = (picture.height, picture.width)
        if size is not None and actual != size:
            listed = f"the table says {size[0]}x{size[1]}"
            return f"{path} is {actual[0]}x{actual[1]} (height x width), but {listed}"
        if is_target and is_flat(picture):
            return f"{path} is a single colour, as a safety checker or an overflow leaves an image"
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
    """Read latents: files must be whole, their values finite, with one shape for each size."""
    paths = table["latents"].to_numpy()
    indices = np.flatnonzero(fine & (paths != ""))

    def shape_or_problem(path: str) -> tuple[int, ...] | str:
        try:
            tensors = read_latents(path)
        except ValueError as error:
            return str(error)
        if problem := not_finite(tensors):
            return f"{path} holds {problem}; generate this row again"
        return tuple(tensors[LATENTS_KEY].shape)

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
