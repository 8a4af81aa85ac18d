"""The student: a pipeline, sampled as its settings say, with gradients where it is trained."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from lit_distill.data.batch import Batch, call_arguments, split_batch, split_like
from lit_distill.errors import InputError
from lit_distill.pipelines.components import (
    call_parameters,
    denoiser_device,
    denoisers,
    override_scheduler_config,
)
from lit_distill.pipelines.denoise import denoise
from lit_distill.pipelines.hooks import read_schedule
from lit_distill.pipelines.latent_codec import LatentCodec
from lit_distill.pipelines.model_digest import plain_config
from lit_distill.pipelines.noise_levels import NoiseLevel, NoiseLevels
from lit_distill.pipelines.rollout import rollout, sample
from lit_distill.pipelines.trajectory import Trajectory, trajectory
from lit_distill.teacher.online import OnlineTeacher
from lit_distill.training.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


Result = TypeVar("Result", Tensor, Trajectory)


class Student:
    """A pipeline with trainable denoisers. Not a module: encoders and VAE stay out of DDP.

    Args:
        pipe: The pipeline, made trainable; it gets the student's scheduler.
        settings: The settings in effect.
        sharded: Whether the denoisers are sharded over processes.
        base_digest: Digests of the pretrained denoisers, by name; empty if they are quantised.

    Attributes:
        encoders_digest: Digest of the encoders, if what they encode is stored in a folder.
        pretrained_scheduler: The scheduler that the pipeline came with, which its teacher uses.

    Raises:
        InputError: If the pipeline does not take the settings' schedule.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        settings: Settings,
        *,
        sharded: bool = False,
        base_digest: dict[str, str] | None = None,
    ) -> None:
        if settings.sigmas and "sigmas" not in call_parameters(pipe):
            raise InputError(
                f"model.sigmas: {type(pipe).__name__}'s call takes no sigmas; choose the student's "
                "schedule by fields of its scheduler instead (model.scheduler)"
            )
        self.pipe = pipe
        self.settings = settings
        self.base_digest = base_digest or {}
        self.encoders_digest = ""
        self.pretrained_scheduler = pipe.scheduler
        pipe.scheduler = override_scheduler_config(pipe, settings.scheduler)
        self.sharded = sharded
        self._codecs: dict[tuple[int, int] | None, LatentCodec] = {}

    def compile(self) -> None:
        """Compile the denoisers' repeated blocks."""
        from lit_distill.compute.compilation import compile_blocks  # diffusers is slow to import

        compile_blocks(denoisers(self.pipe).values())

    def precision(self) -> AbstractContextManager[Any]:
        """Disable a trainer's autocast where the denoiser itself computes in half precision."""
        compiled = self.settings.compile and not self.sharded
        if self.settings.torch_dtype == "float32" or compiled:
            return nullcontext()
        return torch.autocast(denoiser_device(self.pipe).type, enabled=False)

    def teacher(self) -> OnlineTeacher:
        """Return the online teacher that goes with this student."""
        return OnlineTeacher(
            student=self.pipe,
            scheduler=self.pretrained_scheduler,
            has_adapters=self.settings.lora is not None,
            model=self.settings.teacher_model,
            torch_dtype=self.settings.torch_dtype,
            num_inference_steps=self.settings.teacher_num_inference_steps,
            cfg_scale=self.settings.teacher_cfg_scale,
            call_kwargs=self.settings.call_kwargs,
            batch_size=self.settings.rollout_batch_size,
            precision=self.precision,
        )

    # The pipeline's arguments

    def call(self, batch: Batch) -> dict[str, Any]:
        """Return the arguments of the pipeline's call for a batch, but for steps and guidance."""
        return call_arguments(batch, self.settings.call_kwargs)

    def student_call(self, batch: Batch, num_inference_steps: int) -> dict[str, Any]:
        """Return the arguments of `call`, the steps, and `settings.sigmas` if there are as many."""
        call = self.call(batch) | {"num_inference_steps": num_inference_steps}
        sigmas = self.settings.sigmas
        if sigmas and len(sigmas) == num_inference_steps:
            call["sigmas"] = list(sigmas)
        return call

    def digest(self) -> str:
        """Return what samples and online targets depend on beside their rows, but for training."""
        names = ["torch_dtype", "quantization", "sigmas", "call_kwargs", "teacher_lora"]
        names += ["teacher_model", "teacher_num_inference_steps", "teacher_cfg_scale"]
        scheduler = self.pipe.scheduler
        content = [getattr(self.settings, name) for name in names]
        content += [self.base_digest, type(scheduler).__name__, plain_config(scheduler)]
        return hashlib.sha256(repr(content).encode()).hexdigest()

    # Sampling

    def rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, (B, ...), differentiable where gradients are on."""
        options = {"grad_steps": self.settings.grad_steps, **self._options(batch)}
        return torch.cat(self._generate(batch, rollout, options))

    def trajectory(self, batch: Batch) -> Trajectory:
        """Return the student's states after every step; each differentiable in its own step."""
        return Trajectory.concatenate(self._generate(batch, trajectory, self._options(batch)))

    def predict(
        self,
        latents: Tensor,
        level: NoiseLevel,
        batch: Batch,
        **options: Any,  # noqa: ANN401
    ) -> Tensor:
        """Return the clean latents that the student predicts, (B, ...), float32; see `denoise`.

        Args:
            latents: Noisy latents, (B, ...).
            level: Their noise level.
            batch: The rows.
            **options: Options of `denoise` that differ from the settings.
        """
        parts = split_batch(batch, self.settings.rollout_batch_size)
        options = self._options(batch) | options
        with self.precision():
            predictions = [
                denoise(self.pipe, noisy, level, **self.call(part), **options)
                for part, noisy in zip(parts, split_like(latents, parts), strict=True)
            ]
        return torch.cat(predictions)

    def schedule(self, batch: Batch, num_inference_steps: int) -> list[NoiseLevel]:
        """Return the noise level before every step of a schedule, and the one after the last."""
        schedule = self._schedule(batch, num_inference_steps)
        return NoiseLevels(self.pipe.scheduler).of_schedule(schedule)

    def sigmas(self, batch: Batch) -> Tensor:
        """Return the sigmas before every step of the rows' schedule, and after the last, (K + 1,).

        Raises:
            InputError: If the scheduler has none.
        """
        schedule = self._schedule(batch, batch["num_inference_steps"])
        if "sigmas" not in schedule:
            raise InputError(
                f"model.teacher_reuse: {type(self.pipe.scheduler).__name__} has no sigmas, at "
                "which the teacher's states could be kept; set teacher_reuse: 1"
            )
        return schedule["sigmas"]

    def _schedule(self, batch: Batch, num_inference_steps: int) -> dict[str, Tensor]:
        call = self.student_call(split_batch(batch, 1)[0], num_inference_steps)
        return read_schedule(self.pipe, partial(rollout, self.pipe, **call))

    def _options(self, batch: Batch) -> dict[str, Any]:
        return {
            "cfg_scale": batch["cfg_scale"],
            "checkpointing": self.settings.checkpointing,
            "offload": self.settings.offload_activations,
        }

    def _generate(
        self, batch: Batch, function: Callable[..., Result], options: dict[str, Any]
    ) -> list[Result]:
        """Return the results of the parts of a batch that the pipeline may take together."""
        steps = batch["num_inference_steps"]
        with self.precision():
            return [
                function(self.pipe, **self.student_call(part, steps), **options)
                for part in split_batch(batch, self.settings.rollout_batch_size)
            ]

    def sample(
        self,
        batch: Batch,
        *,
        num_inference_steps: int | None = None,
        cfg_scale: float | None = None,
        pipe: DiffusionPipeline | None = None,
    ) -> tuple[Tensor, list[Any]]:
        """Sample as `pipe()` does; return final latents (B, ...) and B images.

        Args:
            batch: The rows.
            num_inference_steps: Steps; default: those of the rows.
            cfg_scale: Guidance, 1 = off; default: that of the rows.
            pipe: Sample with this pipeline, and with its own schedule, instead.
        """
        steps = num_inference_steps or batch["num_inference_steps"]
        cfg_scale = batch["cfg_scale"] if cfg_scale is None else cfg_scale
        latents, images = [], []
        with self.precision():
            for part in split_batch(batch, self.settings.rollout_batch_size):
                if pipe is None:
                    call = self.student_call(part, steps)
                else:
                    call = self.call(part) | {"num_inference_steps": steps}
                result = sample(pipe or self.pipe, **call, cfg_scale=cfg_scale)
                latents.append(result[0])
                images += result[1]
        return torch.cat(latents), images

    def codec(self, batch: Batch) -> LatentCodec:
        """Return the codec of the batch's resolution; learned at first use."""
        size = batch["size"]
        if size not in self._codecs:
            call = self.call(split_batch(batch, 1)[0])
            del call["generator"]
            try:
                with self.precision():
                    self._codecs[size] = LatentCodec(self.pipe, **call)
            except ValueError as error:
                raise InputError(f"row {batch['row'][0]}: {error}") from error
        return self._codecs[size]

    def decode(self, latents: Tensor, batch: Batch) -> Tensor:
        """Return the images of the batch's final latents, (B, 3, H, W), float32, range [0, 1].

        Raises:
            InputError: If the pipeline's latents can't be decoded, which metrics {} do not need.
        """
        try:
            codec = self.codec(batch)
        except ValueError as error:
            raise InputError(f"{error}; or validate without images: model.metrics: {{}}") from error
        return codec.decode(latents)
