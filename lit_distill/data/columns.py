"""The columns of a table of pairs, and how a table with other names is mapped to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import yaml

from lit_distill.data.table_io import Problems, column_names
from lit_distill.errors import InputError, with_suggestions

REQUIRED_COLUMNS = ("prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale")

COLUMNS = (*REQUIRED_COLUMNS, "image", "latents", "height", "width")

CONSTANTS = {"rand_device": "cpu", "num_inference_steps": 4, "cfg_scale": 1}
"""Columns that may have one value for all rows, with the usual one."""

LIKELY = {
    "prompt": ("text", "caption", "prompts", "description", "label"),
    "image": ("file_name", "image_path", "image_file", "filename", "file", "path", "img", "images"),
    "seed": ("seeds", "noise_seed", "random_seed"),
    "num_inference_steps": ("steps", "num_steps", "student_steps"),
    "cfg_scale": ("cfg", "guidance", "guidance_scale"),
    "rand_device": ("device", "noise_device"),
}
"""Names that other programs give to our columns."""


def check_mapping(columns: Mapping[str, str], constants: Mapping[str, Any]) -> None:
    """Check the settings data.columns and data.constants.

    Raises:
        InputError: If one names a column that a table of pairs does not have.
    """
    for name in columns:
        if name not in COLUMNS:
            raise InputError(
                f"data.columns: unknown column {with_suggestions(name, COLUMNS)}; it maps "
                f"{', '.join(COLUMNS)} to the table's names, as in {{prompt: text}}"
            )
    for name in constants:
        if name not in CONSTANTS:
            raise InputError(
                f"data.constants: {with_suggestions(name, CONSTANTS)} can't be the same in all "
                f"rows; accepted are {', '.join(CONSTANTS)}"
            )


def map_columns(
    raw: pd.DataFrame, problems: Problems, constants: Mapping[str, Any] | None = None
) -> pd.DataFrame:
    """Return a table with our columns beside its own.

    Args:
        raw: The table as it was read.
        problems: Holds the names of the columns, our name -> the table's; collects what is wrong.
        constants: Values of columns that the table does not have.
    """
    mapped = {ours: raw[theirs] for ours, theirs in problems.columns.items() if theirs in raw}
    for ours, theirs in problems.columns.items():
        if theirs not in raw:
            problems.add(
                f"column {theirs!r} is missing, which data.columns names for {ours}; found "
                f"{column_names(raw)}"
            )
    for name in constants or {}:
        if name in raw or name in mapped:
            problems.add(f"the table has a column {name!r}: remove it from data.constants")
    return raw.assign(**mapped, **{name: str(v) for name, v in (constants or {}).items()})


def offer_mapping(raw: pd.DataFrame, missing: list[str], problems: Problems) -> None:
    """Add to the message what to set if columns are missing, but the table has likely ones.

    Args:
        raw: The table as it was read.
        missing: Our names of the columns that are needed.
        problems: Collects the offer.
    """
    found = {str(name).lower(): str(name) for name in raw}
    likely = {
        ours: next(found[name] for name in LIKELY[ours] if name in found)
        for ours in missing
        if any(name in found for name in LIKELY.get(ours, ()))
    }
    if likely:
        problems.hints.append(
            f"Likely columns are there; if they are right, set data.columns: "
            f"{_as_yaml({**problems.columns, **likely})}"
        )
    constants = {name: v for name, v in CONSTANTS.items() if name in missing and name not in likely}
    if constants:
        problems.hints.append(
            f"If all rows have the same value, set data.constants, for example "
            f"{_as_yaml(constants)}"
        )


def _as_yaml(mapping: Mapping[str, Any]) -> str:
    return yaml.safe_dump(
        dict(mapping), default_flow_style=True, sort_keys=False, width=1000
    ).strip()
