"""The teacher: its settings, its pipeline, and how it samples a batch of pairs."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_distill.adapters.weights import load_base_pipeline
from lit_distill.compute.quantization import quantization_config
from lit_distill.data.batch import collate_calls, open_pictures
from lit_distill.errors import InputError
from lit_distill.pipelines.components import (
    override_scheduler_config,
    replaced_components,
    silent_diffusers,
)
from lit_distill.pipelines.hooks import StepCallback, read_schedule
from lit_distill.pipelines.loading import denoiser_classes
from lit_distill.pipelines.rollout import sample
from lit_distill.teacher.prompts import Pair, Size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Teacher:
    """All settings that determine the teacher's samples, and those of the student to record.

    Attributes:
        model: Hub id or folder of the pipeline.
        lora: LoRA to fuse into it, if any.
        revision: Branch, tag or commit of the hub repository.
        torch_dtype: Data type of the weights.
        num_inference_steps: Steps of the teacher.
        cfg_scale: Guidance of the teacher, 1 = off.
        scheduler: Name of a scheduler class of diffusers that replaces the pipeline's scheduler,
            with the same configuration; None: the pipeline's scheduler.
        height: Height in pixels of pairs without a size; None: the pipeline's default.
        width: Width in pixels; set together with `height`.
        rand_device: Device whose generator samples the noise.
        batch_size: Prompts per batch. It affects the last bits of the samples.
        call_kwargs: Further arguments of the pipeline's call, e.g. ``negative_prompt``.
        call_columns: Arguments of the pipeline's call that differ between pairs -> their columns.
        student_num_inference_steps: Steps of the student, written to the CSV.
        student_cfg_scale: Guidance of the student, written to the CSV.
        student_scheduler: Fields of the scheduler's configuration that the student changes.
        student_sigmas: The student's `sigmas`, if it sets them.
        store_trajectory: Also store the states at the noise levels of the student's steps.
        quantization: The denoisers' weights in fewer bits: see `quantization_config`.
    """

    model: str
    lora: str | None = None
    revision: str | None = None
    torch_dtype: str = "bfloat16"
    num_inference_steps: int = 50
    cfg_scale: float = 4.0
    scheduler: str | None = None
    height: int | None = None
    width: int | None = None
    rand_device: str = "cpu"
    batch_size: int = 1
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    call_columns: dict[str, str] = field(default_factory=dict)
    student_num_inference_steps: int = 4
    student_cfg_scale: float = 1.0
    student_scheduler: dict[str, Any] | None = None
    student_sigmas: list[float] | None = None
    store_trajectory: bool = False
    quantization: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("num_inference_steps", "batch_size", "student_num_inference_steps"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} must be an integer >= 1, got {getattr(self, name)}")
        for name in ("cfg_scale", "student_cfg_scale"):
            if not getattr(self, name) >= 1:
                raise InputError(f"{name} must be >= 1 (1 = off), got {getattr(self, name)}")
        if (self.height is None) != (self.width is None):
            raise InputError(f"height={self.height}, width={self.width}: set both or neither")
        if double := set(self.call_kwargs) & set(self.call_columns):
            raise InputError(
                f"{sorted(double)[0]!r} is both in model.call_kwargs and in data.call_columns: one "
                "value for all rows, or a column with one for each"
            )

    def size(self, pair: Pair) -> Size | None:
        """Return the (height, width) at which a pair is generated; None: the pipeline's default."""
        if pair.size is not None or self.height is None or self.width is None:
            return pair.size
        return self.height, self.width

    def load(self) -> DiffusionPipeline:
        """Load the pipeline and replace its scheduler if another one is set.

        Raises:
            InputError: If diffusers has no such scheduler.
        """
        options: dict[str, Any] = {}
        if self.quantization:
            classes = denoiser_classes(self.model, self.revision)
            options["quantization_config"] = quantization_config(self.quantization, classes)
        pipe = load_base_pipeline(
            {
                "pretrained_model_name_or_path": self.model,
                "revision": self.revision,
                "torch_dtype": self.torch_dtype,
                "teacher_lora": self.lora,
            },
            **options,
        )
        if self.scheduler is not None:
            cls = _scheduler_class(self.scheduler)
            is_flow = "FlowMatch" in type(pipe.scheduler).__name__
            overrides: dict[str, Any] = {}
            if is_flow and "use_flow_sigmas" in inspect.signature(cls).parameters:
                # Schedulers for both kinds of models default to the other kind.
                overrides = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            # The whole configuration is passed, since pipelines read fields (base_shift) that the
            # class does not have; diffusers warns about those.
            with silent_diffusers():
                pipe.scheduler = cls.from_config(pipe.scheduler.config, **overrides)
        return pipe

    def sample(
        self, pipe: DiffusionPipeline, pairs: Sequence[Pair], on_step: StepCallback | None = None
    ) -> tuple[Tensor, list[Any]]:
        """Sample a batch of pairs that share their size and the numbers in their calls.

        Returns:
            Final latents, (B, ...), and B images or lists of frames.

        Raises:
            InputError: If the pipeline generates another size than requested.
        """
        with nullcontext() if self.scheduler is None else silent_diffusers():  # see load
            latents, images = sample(pipe, on_step=on_step, **self.call(pairs))
        self.check_size(pipe, pairs, images)
        return latents, images

    def call(self, pairs: Sequence[Pair]) -> dict[str, Any]:
        """Return the arguments of `sample` for a batch, with new generators."""
        size = self.size(pairs[0])
        return {
            "num_inference_steps": self.num_inference_steps,
            "cfg_scale": self.cfg_scale,
            "generator": [torch.Generator(self.rand_device).manual_seed(p.seed) for p in pairs],
            "prompt": [pair.prompt for pair in pairs],
            **({} if size is None else {"height": size[0], "width": size[1]}),
            **self.call_kwargs,
            **collate_calls([open_pictures(pair.call) for pair in pairs]),
        }

    def check_size(
        self, pipe: DiffusionPipeline, pairs: Sequence[Pair], images: Sequence[Any]
    ) -> None:
        """Check that the images of a batch have the size that was asked for.

        Raises:
            InputError: If the pipeline has generated another size.
        """
        size = self.size(pairs[0])
        width, height = (images[0][0] if isinstance(images[0], list) else images[0]).size
        if size is not None and (height, width) != size:
            raise InputError(
                f"{type(pipe).__name__} generates {height}x{width} (height x width) when asked for "
                f"{size[0]}x{size[1]}: both sides must be multiples of what the pipeline needs"
            )


def _scheduler_class(name: str) -> Any:  # noqa: ANN401
    import diffusers

    cls = getattr(diffusers, name, None)
    if not hasattr(cls, "set_timesteps"):
        raise InputError(
            f"scheduler must be a scheduler class of diffusers, such as "
            f"FlowMatchHeunDiscreteScheduler or UniPCMultistepScheduler, got {name!r}"
        )
    return cls


def student_sigmas(teacher: Teacher, pipe: DiffusionPipeline, pair: Pair) -> Tensor:
    """Return the noise levels between the student's steps for a pair's size, (steps - 1,).

    Raises:
        InputError: If the scheduler has no sigmas.
    """
    call = teacher.call_kwargs | (
        {"sigmas": teacher.student_sigmas} if teacher.student_sigmas else {}
    )
    student = replace(
        teacher,
        num_inference_steps=teacher.student_num_inference_steps,
        cfg_scale=teacher.student_cfg_scale,
        call_kwargs=call,
    )
    scheduler = override_scheduler_config(pipe, teacher.student_scheduler)
    with replaced_components(pipe, scheduler=scheduler):
        schedule = read_schedule(pipe, partial(student.sample, pipe, [pair]))
    if "sigmas" not in schedule:
        raise InputError(f"store_trajectory: {type(scheduler).__name__} has no sigmas")
    return schedule["sigmas"][1:-1]
