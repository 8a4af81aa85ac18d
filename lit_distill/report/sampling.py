"""Samples the held-out rows with a contender and measures the time."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_distill.data.batch import Batch
from lit_distill.errors import InputError
from lit_distill.evaluation.evaluator import EvaluationBatch
from lit_distill.pipelines.release import release
from lit_distill.pipelines.stages import enable_offload
from lit_distill.report.contenders import Contender, ContenderResult
from lit_distill.training.direct_distill import DirectDistill

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Samples:
    """Samples of a batch that were needed before the report, so that it does not repeat them.

    Attributes:
        latents: Final latents, (B, ...), on the CPU.
        images: B images.
        seconds: Wall time, decoding included.
    """

    latents: Tensor
    images: list[Image.Image]
    seconds: float


@dataclass(frozen=True)
class HeldOutBatch:
    """A batch of held-out rows with the teacher's results, on the CPU.

    Attributes:
        batch: The rows, without their targets.
        new: Positions of the rows that this process counts; others are repeated rows.
        target_latents: The teacher's final latents, (B, ...), float32.
        target: The teacher's images, (B, 3, H, W), uint8.
        undistilled_mse: Latent MSE of the undistilled pipeline, (B,).
        samples: Samples at the rows' own settings, of ``student`` and perhaps ``undistilled``.
    """

    batch: Batch
    new: list[int]
    target_latents: Tensor
    target: Tensor
    undistilled_mse: Tensor
    samples: dict[str, Samples]


def sample_held_out(
    result: ContenderResult,
    module: DirectDistill,
    held_out: list[HeldOutBatch],
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Iterator[tuple[HeldOutBatch, EvaluationBatch, list[Image.Image]]]:
    """Sample the rows with a contender, and add the time to its result.

    The first batch is a warm-up and not timed. A single batch is sampled twice instead.

    Args:
        result: Result of the contender; its seconds and timed images are updated.
        module: The tested module.
        held_out: The rows.
        precision: Autocast for the module's own pipeline; other pipelines run without it.

    Yields:
        A batch, its samples beside the teacher's, and its images.
    """
    contender = result.contender
    weights = module.undistilled() if contender.kind == "undistilled" else nullcontext()
    with (
        _pipeline(contender, module) as pipe,
        precision() if pipe is None else nullcontext(),
        weights,
    ):
        for index, rows in enumerate(held_out):
            samples = _sample(contender, module, rows, pipe)
            latents, images = samples.latents.to(module.device), samples.images
            if index > 0 or len(held_out) == 1:  # the first batch is slower than the others
                result.seconds += samples.seconds
                result.timed_images += len(images)
            # By name: `load_student` returns a subclass with the same name.
            same_space = pipe is None or type(pipe).__name__ == type(module.pipe).__name__
            comparable = same_space and latents.shape == rows.target_latents.shape
            preds = _pixels(images, rows.target, result.label)
            yield rows, _evaluation_batch(rows, latents, preds, comparable), images


def _sample(
    contender: Contender, module: DirectDistill, rows: HeldOutBatch, pipe: DiffusionPipeline | None
) -> Samples:
    """Return a contender's samples of a batch: those that exist, or new ones."""
    if contender.num_inference_steps is None and contender.kind in rows.samples:
        return rows.samples[contender.kind]
    started = time.perf_counter()
    latents, images = module.sample(
        rows.batch,
        pipe=pipe,
        num_inference_steps=contender.num_inference_steps,
        cfg_scale=contender.cfg_scale,
    )
    # The images are on the host, so all work on the device is done.
    seconds = time.perf_counter() - started
    # The target of a video is its first frame.
    images = [image[0] if isinstance(image, list) else image for image in images]
    return Samples(latents.cpu(), images, seconds)


@contextmanager
def _pipeline(contender: Contender, module: DirectDistill) -> Iterator[DiffusionPipeline | None]:
    """Load a contender's pipeline, if it has one, with the module's on the CPU meanwhile."""
    if contender.load is None:
        yield None
        return
    pipe = contender.load()
    offloaded = module.offload != "none"
    if offloaded:
        enable_offload(pipe, module.device, module.offload)
    else:
        module.pipe.to("cpu")
    try:
        yield pipe if offloaded else pipe.to(module.device)
    finally:
        release(pipe)
        if not offloaded:
            module.pipe.to(module.device)


def _pixels(images: list[Image.Image], target: Tensor, label: str) -> Tensor:
    """Return images as (B, 3, H, W), uint8.

    Raises:
        InputError: If they have another size than the teacher's.
    """
    arrays = np.stack([np.asarray(image.convert("RGB")) for image in images])
    pixels = torch.from_numpy(arrays).permute(0, 3, 1, 2)
    if pixels.shape != target.shape:
        (height, width), (rows_height, rows_width) = pixels.shape[-2:], target.shape[-2:]
        raise InputError(
            f"{label} generates images of {height}x{width} (height x width), but the held-out "
            f"images are {rows_height}x{rows_width}; give the rows height and width"
        )
    return pixels


def _evaluation_batch(
    rows: HeldOutBatch, latents: Tensor, preds: Tensor, comparable: bool
) -> EvaluationBatch:
    """Return samples beside the teacher's results, on the device of the latents.

    Args:
        rows: The rows.
        latents: Final latents of the samples, (B, ...).
        preds: Images of the samples, (B, 3, H, W), uint8.
        comparable: Whether the latents live in the same space as the teacher's.
    """
    device = latents.device
    return EvaluationBatch(
        prompt=rows.batch["prompt"],
        latents=latents.float() if comparable else None,
        target_latents=rows.target_latents.to(device),
        preds=preds.to(device).float() / 255,
        target=rows.target.to(device).float() / 255,
        undistilled_mse=rows.undistilled_mse.to(device),
    )
