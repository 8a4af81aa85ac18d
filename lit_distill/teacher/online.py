"""The online teacher: generates, during training, the targets of rows that hold none."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor, nn

from lit_distill.adapters.inject import adapters_disabled
from lit_distill.data.batch import Batch, call_arguments, split_batch, split_like
from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoiser_device, denoisers, replaced_components
from lit_distill.pipelines.denoise import denoise
from lit_distill.pipelines.loading import load_pipeline
from lit_distill.pipelines.noise_levels import NoiseLevel
from lit_distill.pipelines.rollout import rollout, sample
from lit_distill.pipelines.trajectory import Trajectory, trajectory

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


Result = TypeVar("Result", Tensor, Trajectory, tuple[Tensor, list[Any]])


@dataclass
class OnlineTeacher:
    """Generates with the student's pretrained weights, its adapters disabled, or another pipeline.

    Attributes:
        student: The student's pipeline.
        scheduler: The scheduler that its pretrained weights use.
        has_adapters: Whether the student is an adapter, so that the pretrained weights remain.
        model: Hub id or folder of another pipeline that teaches; loaded at first use.
        torch_dtype: Data type of its weights.
        num_inference_steps: Steps of the teacher.
        cfg_scale: Guidance of the teacher, 1 = off.
        call_kwargs: Fixed arguments of the pipeline's call.
        batch_size: Samples that are generated together; None: the whole batch.
        precision: Makes the context in which the denoisers compute.
        seconds: Seconds that it has generated for.
    """

    student: DiffusionPipeline
    scheduler: Any
    has_adapters: bool
    model: str | None
    torch_dtype: str
    num_inference_steps: int
    cfg_scale: float
    call_kwargs: Mapping[str, Any] | None
    batch_size: int | None
    precision: Callable[[], AbstractContextManager[Any]]
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._other: DiffusionPipeline | None = None

    def target(self, batch: Batch) -> Tensor:
        """Return the final latents that the teacher generates for the batch, (B, ...), float32.

        Raises:
            InputError: If the whole denoiser is trained, which leaves no teacher in it.
        """
        return torch.cat(self._generate(batch, rollout)).float()

    def images(self, batch: Batch) -> list[Any]:
        """Return the B images that the teacher generates for the batch.

        Raises:
            InputError: As `target`.
        """
        return [image for _, images in self._generate(batch, sample) for image in images]

    def trajectory(self, batch: Batch) -> Trajectory:
        """Return the teacher's states after each of its own steps.

        Raises:
            InputError: As `target`, or if the scheduler is not an Euler one.
        """
        return Trajectory.concatenate(self._generate(batch, trajectory))

    @torch.no_grad()
    def predict(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the clean latents that the guided teacher predicts, (B, ...), float32.

        Args:
            latents: Noisy latents, (B, ...).
            level: Their noise level.
            batch: The rows.
        """
        parts = split_batch(batch, self.batch_size)
        with self._pipeline() as pipe, self.precision():
            predictions = [
                denoise(
                    pipe,
                    noisy,
                    level,
                    cfg_scale=self.cfg_scale,
                    **call_arguments(part, self.call_kwargs),
                )
                for part, noisy in zip(parts, split_like(latents, parts), strict=True)
            ]
        return torch.cat(predictions)

    def _generate(self, batch: Batch, function: Callable[..., Result]) -> list[Result]:
        if not self.has_adapters and not self.model:
            raise InputError(
                f"row {batch['row'][0]} has neither image nor latents, and full training leaves no "
                "teacher to generate one: make pairs first with `lit-distill generate`"
            )
        options = {"num_inference_steps": self.num_inference_steps, "cfg_scale": self.cfg_scale}
        started = time.perf_counter()
        with self._pipeline() as pipe, self.precision():
            results = [
                function(pipe, **call_arguments(part, self.call_kwargs), **options)
                for part in split_batch(batch, self.batch_size)
            ]
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - started
        return results

    @contextmanager
    def _pipeline(self) -> Iterator[DiffusionPipeline]:
        if self.model:
            yield self._load(self.model)
            return
        pipe = self.student
        with (
            adapters_disabled(nn.ModuleDict(denoisers(pipe))),
            replaced_components(pipe, scheduler=self.scheduler),
        ):
            yield pipe

    def _load(self, model: str) -> DiffusionPipeline:
        if self._other is None:
            pipe = load_pipeline(model, torch_dtype=self.torch_dtype)
            EncodeOnce(pipe)
            self._other = pipe.to(denoiser_device(self.student))
        return self._other
