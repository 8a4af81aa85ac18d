"""The batch: its fields, how rows are collated into it, and how it is split into parts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor

from lit_distill.data.images import Picture, read_picture
from lit_distill.errors import InputError

TARGETS = ("image", "encoded", "latents", "trajectory", "sigmas")

NO_TARGET: dict[str, Any] = dict.fromkeys(TARGETS)


class Batch(TypedDict):
    """A batch of `DistillDataModule`: B rows that share all settings.

    Attributes:
        prompt: B texts.
        seed: B seeds of the initial noise.
        rand_device: Device whose generator samples the noise.
        num_inference_steps: Steps of the student.
        cfg_scale: Guidance of the student, 1 = off.
        size: (height, width) in pixels; None: the pipeline's default.
        call: Further arguments of the pipeline's call: B pictures or texts, or one number for all.
        image: The teacher's images, (B, 3, height, width), float32, range [0, 1], or None.
        encoded: The VAE's encoding of the images, (B, C, h, w) or (B, C, 1, h, w), instead of
            `image` if the images were encoded before training; or None.
        latents: The teacher's exact final latents, (B, ...), or None.
        trajectory: The teacher's states between the student's steps, (B, steps - 1, ...), or None.
        sigmas: Noise levels of these states, (B, steps - 1), or None.
        row: B row numbers as a spreadsheet shows them, the header being row 1.
    """

    prompt: list[str]
    seed: list[int]
    rand_device: str
    num_inference_steps: int
    cfg_scale: float
    size: tuple[int, int] | None
    call: dict[str, Any]
    image: Tensor | None
    encoded: Tensor | None
    latents: Tensor | None
    trajectory: Tensor | None
    sigmas: Tensor | None
    row: list[int]


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Collate rows of one bucket into a batch.

    Raises:
        InputError: If the targets of the rows differ in shape; names a row and its file.
    """
    first = rows[0]
    stacked = partial(_stack, rows)
    size = (int(first["height"]), int(first["width"]))
    return {
        "prompt": [str(row["prompt"]) for row in rows],
        "seed": [int(row["seed"]) for row in rows],
        "rand_device": str(first["rand_device"]),
        "num_inference_steps": int(first["num_inference_steps"]),
        "cfg_scale": float(first["cfg_scale"]),
        "size": None if size == (0, 0) else size,
        "call": collate_calls([row["call"] for row in rows]),
        "image": stacked("image"),
        "encoded": stacked("encoded"),
        "latents": stacked("latents"),
        "trajectory": stacked("trajectory"),
        "sigmas": stacked("sigmas"),
        "row": [int(row["row"]) for row in rows],
    }


def _stack(rows: list[dict[str, Any]], name: str) -> Tensor | None:
    """Return one kind of target of all rows; None if a row has none."""
    tensors = [row[name] for row in rows]
    if any(tensor is None for tensor in tensors):
        return None
    shapes = [tuple(tensor.shape) for tensor in tensors]
    expected, _ = Counter(shapes).most_common(1)[0]
    for row, shape in zip(rows, shapes, strict=True):
        if shape != expected:
            example = rows[shapes.index(expected)]
            raise InputError(
                f"row {row['row']}: {row['file']} holds {name} of shape {shape}, but {expected} is "
                f"expected, as in row {example['row']} ({example['file']}): rows of one size need "
                "targets of one shape"
            )
    return torch.stack(tensors)


def open_pictures(call: dict[str, Any]) -> dict[str, Any]:
    """Return a row's call arguments with its pictures loaded."""
    return {k: read_picture(v) if isinstance(v, Picture) else v for k, v in call.items()}


def collate_calls(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the call arguments of a batch: numbers once, everything else as a list."""
    return {
        name: value if isinstance(value, int | float) else [call[name] for call in calls]
        for name, value in calls[0].items()
    }


def split_batch(batch: Batch, size: int | None) -> list[Batch]:
    """Split a batch into parts of at most `size` rows. None: return it as the only part."""
    rows = len(batch["row"])
    if size is None or size >= rows:
        return [batch]

    def part(value: Any, start: int) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {name: part(entry, start) for name, entry in value.items()}
        # Only lists and tensors have an entry per row; the size is a tuple.
        return value[start : start + size] if isinstance(value, list | Tensor) else value

    return [part(batch, start) for start in range(0, rows, size)]


def merge_batches(parts: list[Batch]) -> Batch:
    """Return the rows of several batches that share all settings as one batch."""

    def merged(values: list[Any]) -> Any:  # noqa: ANN401
        first = values[0]
        if isinstance(first, dict):
            return {name: merged([value[name] for value in values]) for name in first}
        if isinstance(first, list):
            return [entry for value in values for entry in value]
        return torch.cat(values) if isinstance(first, Tensor) else first

    whole: Batch = merged(parts)
    return whole


def split_like(values: Tensor, parts: list[Batch]) -> list[Tensor]:
    """Split values of a batch's rows, (B, ...), as the batch was split into parts."""
    return list(torch.split(values, [len(part["row"]) for part in parts]))


def has_target(batch: Batch) -> bool:
    """Return whether the rows hold the teacher's result: latents, or an image, perhaps encoded."""
    return any(batch[kind] is not None for kind in ("latents", "encoded", "image"))


def call_arguments(batch: Batch, call_kwargs: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the arguments of the pipeline's call for a batch, but for steps and guidance.

    Args:
        batch: The rows. Each sample gets its own generator, seeded with the row's seed.
        call_kwargs: Fixed arguments of the call; those of the rows take precedence.
    """
    size = dict(zip(("height", "width"), batch["size"] or (), strict=False))
    device = batch["rand_device"]
    generators = [torch.Generator(device).manual_seed(seed) for seed in batch["seed"]]
    rows = {"prompt": batch["prompt"], "generator": generators, **size}
    return {**(call_kwargs or {}), **rows, **batch["call"]}
