"""Samples the examples of a checkpoint, for verifying an export and for its model card."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor

from lit_distill.data.batch import collate_calls, open_pictures
from lit_distill.data.images import Picture, read_picture
from lit_distill.data.whole_files import write_image
from lit_distill.errors import InputError
from lit_distill.evaluation.contact_sheet import contact_sheet
from lit_distill.pipelines.rollout import sample
from lit_distill.training.facts import Example

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def sample_example(
    pipe: DiffusionPipeline,
    example: Example,
    **options: Any,  # noqa: ANN401
) -> tuple[Tensor, Image.Image]:
    """Return the final latents, float32 on the CPU, and the image; of a video, its first frame.

    Args:
        pipe: The pipeline.
        example: What to sample.
        **options: Further arguments of the pipeline's call.
    """
    sides: dict[str, Any] = {"height": example.height, "width": example.width}
    available = torch.cuda.is_available() or example.rand_device == "cpu"
    generator = torch.Generator(example.rand_device if available else "cpu")
    pictures = {name: Picture(path) for name, path in example.pictures.items()}
    latents, images = sample(
        pipe,
        prompt=[example.prompt],
        generator=[generator.manual_seed(example.seed)],
        num_inference_steps=example.num_inference_steps,
        cfg_scale=example.cfg_scale,
        **{name: side for name, side in sides.items() if side},
        **collate_calls([open_pictures(example.call | pictures)]),
        **options,
    )
    image: Any = images[0]
    while isinstance(image, list):
        image = image[0]
    return latents.float().cpu(), image


def write_gallery(
    path: Path, examples: Sequence[Example], columns: Mapping[str, Sequence[Image.Image]]
) -> list[str]:
    """Write the images of the examples side by side, and return the names of the columns.

    Args:
        path: File to write.
        examples: What was sampled, a row each.
        columns: Images of all examples, by name. The teacher's are added if they can be read.
    """
    teacher = _teacher_images(examples)
    columns = ({"teacher": teacher} if teacher else {}) | dict(columns)
    rows = zip(examples, zip(*columns.values(), strict=True), strict=True)
    lines = [(example.prompt, list(images)) for example, images in rows]
    write_image(path, contact_sheet(list(columns), lines))
    return list(columns)


def _teacher_images(examples: Sequence[Example]) -> list[Image.Image] | None:
    """Return the teacher's stored images of the examples, or None if one of them can't be read."""
    try:
        return [read_picture(str(example.target)) for example in examples]
    except (OSError, InputError):  # moved since training, or generated while training
        return None
