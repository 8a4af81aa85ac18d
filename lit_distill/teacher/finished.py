"""Whether the files of a pair are finished: whole, and written by this package."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

from PIL import Image
from torch import Tensor

from lit_distill.data.dataset_check import is_flat
from lit_distill.data.images import verify_png
from lit_distill.data.latents_file import not_finite, read_latents
from lit_distill.errors import InputError
from lit_distill.teacher.prompts import Pair

NOTE_KEY = "lit_distill"
"""Key of an image's text chunk with how it was generated, as JSON."""


def is_finished_image(path: Path, pair: Pair) -> bool:
    """Return whether the image of a pair is there and whole, that is, with its checksums.

    Raises:
        InputError: If it is whole, but the image of something else; nothing may overwrite it.
    """
    if not path.is_file():
        return False
    data = path.read_bytes()
    if not is_whole_png(data):
        # Power cuts leave files that are empty, cut off or in part zero.
        if data.startswith(b"\x89PNG") or not data.strip(b"\0"):
            return False
        note: dict[str, Any] = {}
    else:
        note = _note(data)
    if (note.get("prompt"), note.get("seed")) != (pair.prompt, pair.seed):
        raise InputError(
            f"{path} is not the image of prompt {pair.prompt!r} and seed {pair.seed} that "
            "`generate` writes; nothing is overwritten: write to another folder, or move it away"
        )
    return True


def is_finished_latents(path: Path) -> bool:
    """Return whether a file of latents is there and whole, with its checksum."""
    if not path.is_file():
        return False
    try:
        read_latents(str(path))
    except InputError:
        return False
    return True


def is_whole_png(data: bytes) -> bool:
    """Return whether a PNG file has all its parts, each with the right checksum."""
    try:
        verify_png(data)
    except ValueError:
        return False
    return data.startswith(b"\x89PNG\r\n\x1a\n")


def _note(data: bytes) -> dict[str, Any]:
    """Return how an image was generated, as its text chunk records it; empty if it does not."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            note = json.loads(image.info.get(NOTE_KEY, "{}"))
    except (OSError, ValueError, SyntaxError):
        return {}
    return note if isinstance(note, dict) else {}


def check_sample(
    pair: Pair,
    image: Any,  # noqa: ANN401
    tensors: dict[str, Tensor],
    dtype: str,
    checked: bool,
) -> None:
    """Check what the teacher has generated for a pair.

    Args:
        pair: The pair.
        image: A `PIL.Image.Image`, or a list of frames.
        tensors: The tensors of its file of latents.
        dtype: Data type of the teacher's weights.
        checked: Whether the pipeline has a safety checker.

    Raises:
        InputError: If values are NaN or infinite, or all pixels are equal.
    """
    where = f"prompt {pair.prompt!r}, seed {pair.seed}, in {dtype}"
    if problem := not_finite(tensors):
        other = "bfloat16 or float32" if dtype == "float16" else "float32"
        overflow = f", or {dtype} overflows: try model.torch_dtype {other}"
        raise InputError(
            f"{where}: the teacher generates {problem}. It is not written. Its weights or its LoRA "
            f"are damaged{'' if dtype == 'float32' else overflow}"
        )
    frames = image if isinstance(image, list) else [image]
    if all(is_flat(frame) for frame in frames):
        cause = (
            "the pipeline's safety checker has blanked it, so remove this prompt"
            if checked
            else "its VAE is damaged"
            if dtype == "float32"
            else f"{dtype} overflows in the VAE: try model.torch_dtype float32"
        )
        raise InputError(
            f"{where}: the teacher generates an image of a single colour. It is not written. Most "
            f"likely {cause}"
        )
