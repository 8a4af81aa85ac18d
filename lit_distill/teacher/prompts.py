"""What the teacher draws: prompts from a file, and the rows that they become."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from lit_distill.data.batch import NO_TARGET, Batch, collate_calls, open_pictures
from lit_distill.data.filesystem import parent
from lit_distill.data.schema import ColumnParser, call_key, read_calls
from lit_distill.data.table_io import Problems, read_table

Size = tuple[int, int]


class Prompt(NamedTuple):
    """What to draw: a text, and further arguments of the pipeline's call that go with it.

    Attributes:
        text: The prompt.
        call: Argument -> `Picture`, number or text.
        size: (height, width) in pixels; None: the teacher's.
    """

    text: str
    call: dict[str, Any]
    size: Size | None = None


class Pair(NamedTuple):
    """One row to draw: its place in the data set, its prompt, and the seed of its noise."""

    number: int
    prompt: str
    seed: int
    call: dict[str, Any]
    size: Size | None = None

    def files(self, out: Path) -> tuple[Path, Path]:
        """Return the paths of its image and its latents."""
        return (
            out / "images" / f"{self.number:06d}.png",
            out / "latents" / f"{self.number:06d}.safetensors",
        )


def read_prompts(path: str | Path, call_columns: dict[str, str] | None = None) -> list[Prompt]:
    """Read prompts from a .csv, .json or .jsonl file or a text file, one a line.

    Tables have a field ``prompt``, and may have ``height`` and ``width`` in pixels. Rows without a
    prompt are left out.

    Args:
        path: The file.
        call_columns: Further fields that are arguments of the pipeline's call, argument -> field:
            pictures, relative to the file's folder, numbers or texts.

    Raises:
        FileNotFoundError: If there is no such file.
        MetadataError: If it holds no prompt or lacks a field; naming every row whose size or
            picture is of no use.
    """
    call_columns = call_columns or {}
    problems = Problems(path)
    if Path(path).suffix.lower() in (".csv", ".json", ".jsonl"):
        raw = read_table(path, problems)
    elif Path(path).is_file():
        lines = Path(path).read_text(encoding="utf-8-sig").splitlines()
        raw = pd.DataFrame({"prompt": lines, "row": range(1, len(lines) + 1)}, dtype=object)
    else:
        raise FileNotFoundError(f"{path} does not exist")
    for name in ("prompt", *call_columns.values()):
        if name not in raw:
            found = ", ".join(repr(column) for column in raw if column != "row")
            problems.add(f"field {name!r} is missing; found {found}")
    problems.check()
    raw = raw[raw["prompt"].str.strip() != ""].reset_index(drop=True)
    if raw.empty:
        problems.add("there is no prompt")
    optional = [name for name in ("image", "height", "width") if name not in raw]
    raw = raw.assign(**dict.fromkeys(optional, ""))
    # Where the prompts' own pictures are is nobody's business: the data set gets copies.
    parser = ColumnParser(raw, problems, parent(str(path)), allow_outside=True)
    height, width = (parser.integers(name, 1, 2**20, blank=0) for name in ("height", "width"))
    parser.reject("width", (height == 0) != (width == 0), "given together with height")
    calls = read_calls(parser, call_columns)
    problems.check()
    sizes = [(int(h), int(w)) if h else None for h, w in zip(height, width, strict=True)]
    texts = raw["prompt"].str.strip()
    return [Prompt(*fields) for fields in zip(texts, calls, sizes, strict=True)]


def plan_pairs(
    prompts: list[Prompt], seeds_per_prompt: int, first_seed: int = 0, limit: int | None = None
) -> list[Pair]:
    """Return the rows to draw: every prompt once, then every prompt again, each with its own seed.

    Args:
        prompts: The prompts.
        seeds_per_prompt: How often every prompt is drawn, >= 1.
        first_seed: Seed of the first row; the others count up from it.
        limit: Largest number of rows; None: all.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, value in (("seeds_per_prompt", seeds_per_prompt), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}")
    if first_seed < 0:
        raise ValueError(f"first_seed must be >= 0, got {first_seed}")
    rows = [prompt for _ in range(seeds_per_prompt) for prompt in prompts][:limit]
    return [
        Pair(index, prompt.text, first_seed + index, prompt.call, prompt.size)
        for index, prompt in enumerate(rows)
    ]


def prompt_batches(
    prompts: list[Prompt], facts: dict[str, Any], batch_size: int, first_seed: int
) -> list[Batch]:
    """Return prompts as batches to draw: a prompt's seed is its number plus `first_seed`.

    Args:
        prompts: The prompts, with further arguments of the call.
        facts: ``num_inference_steps``, ``cfg_scale`` and perhaps ``height``, ``width``.
        batch_size: Prompts a batch, at most; a batch shares its calls' numbers.
        first_seed: Seed of the first prompt.

    Raises:
        ValueError: If the steps are not known.
    """
    if "num_inference_steps" not in facts:
        raise ValueError("num_inference_steps: the checkpoint does not say, so it must be given")
    size = (facts["height"], facts["width"]) if facts.get("height") else None
    whole: Batch = {
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
    for (own_size, _), alike in itertools.groupby(
        enumerate(prompts), lambda row: (row[1].size, call_key(row[1].call))
    ):
        rows = list(alike)
        for start in range(0, len(rows), batch_size):
            numbers, chosen = zip(*rows[start : start + batch_size], strict=True)
            batches.append(
                {
                    **whole,
                    "size": own_size or size,
                    "prompt": [prompt.text for prompt in chosen],
                    "call": collate_calls([open_pictures(prompt.call) for prompt in chosen]),
                    "seed": [first_seed + number for number in numbers],
                    "row": list(numbers),
                }
            )
    return batches
