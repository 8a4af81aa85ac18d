"""Prompts from a file, and the pairs or batches that are generated from them."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lit_distill.data.batch import NO_TARGET, Batch, collate_calls, open_pictures
from lit_distill.data.columns import map_columns, offer_mapping
from lit_distill.data.schema import ColumnParser, call_key, read_calls
from lit_distill.data.table_io import (
    MetadataError,
    Problems,
    column_names,
    is_table,
    read_table,
    read_text,
    table_folder,
)
from lit_distill.data.text import shorten
from lit_distill.errors import InputError

Size = tuple[int, int]


class Prompt(NamedTuple):
    """A prompt with its further arguments of the pipeline's call.

    Attributes:
        text: The prompt.
        call: Argument -> `Picture`, number or text.
        size: (height, width) in pixels; None: the teacher's.
        seed: Seed of its noise; None: counted up from the first seed.
    """

    text: str
    call: dict[str, Any]
    size: Size | None = None
    seed: int | None = None


class Pair(NamedTuple):
    """One row of a data set: its number, its prompt, and the seed of its noise."""

    number: int
    prompt: str
    seed: int
    call: dict[str, Any]
    size: Size | None = None

    def files(self, out: Path) -> tuple[Path, Path]:
        """Return the paths of the image and the latents."""
        return (
            out / "images" / f"{self.number:06d}.png",
            out / "latents" / f"{self.number:06d}.safetensors",
        )


COLUMNS = ("prompt", "height", "width", "seed")


def read_prompts(
    path: str | Path,
    call_columns: dict[str, str] | None = None,
    columns: Mapping[str, str] | None = None,
) -> list[Prompt]:
    """Read prompts from a table, or from a text file with one per line.

    Tables have a field ``prompt`` and optionally ``height`` and ``width`` in pixels, and ``seed``.
    Rows without a prompt are skipped. A field that nothing would use is an error, unless `columns`
    says which are meant.

    Args:
        path: The text file, or the table, a file or folder that `read_table` reads.
        call_columns: Further fields that are arguments of the pipeline's call, argument -> field:
            pictures, relative to the table's folder, numbers or texts.
        columns: The table's names of the fields, where they differ: our name -> its name.

    Raises:
        FileNotFoundError: If there is no such file.
        MetadataError: If there is no prompt, a field is missing or unknown, or a size, a seed or a
            picture is invalid; lists all such rows.
    """
    call_columns = call_columns or {}
    problems = Problems(path, {k: v for k, v in (columns or {}).items() if k in COLUMNS})
    raw = _read_raw(path, problems)
    needed = [name for name in ("prompt", *call_columns.values()) if name not in problems.columns]
    missing = [name for name in needed if name not in raw]
    for name in missing:
        problems.add(f"field {name!r} is missing; found {column_names(raw)}")
    offer_mapping(raw, missing, problems)
    problems.check()
    raw = raw[raw["prompt"].str.strip() != ""].reset_index(drop=True)
    if raw.empty:
        problems.add("there is no prompt")
    used = {"row", *COLUMNS, *call_columns.values()}
    for column in raw:
        if not columns and column not in used and (raw[column] != "").any():
            problems.add(
                f"field {shorten(column)} is not used: remove it, or name the argument of the "
                "pipeline's call that it is for, as in data.call_columns '{negative_prompt: "
                "negative_prompt}'"
            )
    optional = [name for name in ("image", *COLUMNS) if name not in raw]
    raw = raw.assign(**dict.fromkeys(optional, ""))
    # Pictures may be anywhere, since the data set gets copies of them.
    parser = ColumnParser(raw, problems, table_folder(path), allow_outside=True)
    height, width = (parser.integers(name, 1, 2**20, blank=0) for name in ("height", "width"))
    parser.reject("width", (height == 0) != (width == 0), "given together with height")
    seeds = parser.integers("seed", 0, 2**63 - 1, blank=-1)
    calls = read_calls(parser, call_columns)
    problems.check()
    sizes = [(int(h), int(w)) if h else None for h, w in zip(height, width, strict=True)]
    texts = raw["prompt"].str.strip()
    given = [None if seed < 0 else int(seed) for seed in seeds]
    return [Prompt(*fields) for fields in zip(texts, calls, sizes, given, strict=True)]


def _read_raw(path: str | Path, problems: Problems) -> pd.DataFrame:
    if is_table(path):
        return map_columns(read_table(path, problems), problems)
    problems.columns.clear()  # a text file has none
    try:
        text = read_text(path)
    except ValueError as error:
        raise MetadataError(f"{path} is not a text file in UTF-8: {error}") from error
    # Not splitlines, which also splits at characters within a line, such as U+2028.
    lines = io.StringIO(text, newline=None).read().split("\n")
    return pd.DataFrame({"prompt": lines, "row": range(1, len(lines) + 1)}, dtype=object)


def plan_pairs(
    prompts: list[Prompt], seeds_per_prompt: int, first_seed: int = 0, limit: int | None = None
) -> list[Pair]:
    """Return the pairs to generate: all prompts, then all prompts again, each with another seed.

    Args:
        prompts: The prompts.
        seeds_per_prompt: Number of pairs for each prompt, >= 1.
        first_seed: Seed of the first row; the others count up from it. Prompts with a seed keep it.
        limit: Largest number of pairs; None: no limit.

    Raises:
        InputError: If a number is out of range, or prompts with a seed are to be repeated.
    """
    for name, value in (("seeds_per_prompt", seeds_per_prompt), ("limit", limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} must be an integer >= 1, got {value}")
    if first_seed < 0:
        raise InputError(f"first_seed must be >= 0, got {first_seed}")
    if seeds_per_prompt > 1 and any(prompt.seed is not None for prompt in prompts):
        raise InputError(
            f"seeds_per_prompt is {seeds_per_prompt}, but the prompts have a field 'seed', which "
            "gives one seed for each; write a row for each seed, or remove the field"
        )
    rows = [prompt for _ in range(seeds_per_prompt) for prompt in prompts][:limit]
    return [
        Pair(index, prompt.text, _seed(prompt, first_seed + index), prompt.call, prompt.size)
        for index, prompt in enumerate(rows)
    ]


def _seed(prompt: Prompt, counted: int) -> int:
    return counted if prompt.seed is None else prompt.seed


def prompt_batches(
    prompts: list[Prompt], facts: dict[str, Any], batch_size: int, first_seed: int
) -> list[Batch]:
    """Return prompts as batches.

    Args:
        prompts: The prompts.
        facts: ``num_inference_steps``, and optionally ``cfg_scale``, ``height`` and ``width``.
        batch_size: Largest number of prompts per batch. Numbers in calls are equal in a batch.
        first_seed: Seed of the first prompt; the others count up from it. Prompts with a seed
            keep it.

    Raises:
        InputError: If the number of steps is unknown.
    """
    if "num_inference_steps" not in facts:
        raise InputError("num_inference_steps: not stored in the checkpoint, so it must be given")
    size = (facts["height"], facts["width"]) if facts.get("height") else None
    template: Batch = {
        "prompt": [],
        "seed": [],
        "rand_device": "cpu",
        "num_inference_steps": facts["num_inference_steps"],
        "cfg_scale": facts.get("cfg_scale", 1.0),
        "size": size,
        "call": {},
        "row": [],
        **NO_TARGET,  # type: ignore[typeddict-item]
    }
    batches: list[Batch] = []
    for (prompt_size, _), group in itertools.groupby(
        enumerate(prompts), lambda row: (row[1].size, call_key(row[1].call))
    ):
        rows = list(group)
        for start in range(0, len(rows), batch_size):
            numbers, batch = zip(*rows[start : start + batch_size], strict=True)
            batches.append(
                {
                    **template,
                    "size": prompt_size or size,
                    "prompt": [prompt.text for prompt in batch],
                    "call": collate_calls([open_pictures(prompt.call) for prompt in batch]),
                    "seed": [
                        _seed(prompt, first_seed + number)
                        for number, prompt in zip(numbers, batch, strict=True)
                    ],
                    "row": list(numbers),
                }
            )
    return batches
