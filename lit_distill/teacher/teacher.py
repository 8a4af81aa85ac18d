"""The teacher: everything that decides what it draws, its pipeline, and a record of both."""

from __future__ import annotations

import inspect
import json
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_distill.adapters.weights import load_base_pipeline
from lit_distill.data.batch import collate_calls, open_pictures
from lit_distill.encoding.fingerprint import fingerprint, weights_summary
from lit_distill.pipelines.components import denoisers, override_scheduler_config, silent_diffusers
from lit_distill.pipelines.hooks import StepCallback, read_schedule
from lit_distill.pipelines.rollout import sample
from lit_distill.teacher.prompts import Pair, Size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Teacher:
    """Everything that decides what the teacher draws, and the student's steps to be recorded.

    Attributes:
        model: Hub id or folder of the pipeline.
        lora: LoRA that is fused into it, if any.
        revision: Branch, tag or commit of the hub repository.
        torch_dtype: Data type of the weights.
        num_inference_steps: The teacher's steps.
        cfg_scale: The teacher's guidance, 1 = off.
        scheduler: Name of the diffusers class that takes the place of the pipeline's scheduler,
            with the latter's settings; None: the pipeline's own.
        height: Height in pixels of rows without a size; None: the pipeline's default.
        width: Width in pixels; given together with `height`.
        rand_device: Device whose generator draws the noise.
        batch_size: Prompts a batch; part of the result, since sums depend on it in the last bit.
        call_kwargs: Further arguments of the pipeline's call, e.g. ``negative_prompt``.
        call_columns: Arguments of the pipeline's call that every row brings, and their columns.
        student_num_inference_steps: Written to the CSV for the student.
        student_cfg_scale: Written to the CSV for the student.
        student_scheduler: Fields in which the student's scheduler differs from the teacher's.
        student_sigmas: The student's `sigmas`, if it has its own.
        store_trajectory: Keep the states at the noise levels of the student's steps, too.
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

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("num_inference_steps", "batch_size", "student_num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)}")
        for name in ("cfg_scale", "student_cfg_scale"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be >= 1 (1 = off), got {getattr(self, name)}")
        if (self.height is None) != (self.width is None):
            raise ValueError(f"height={self.height}, width={self.width}: set both or neither")

    def size(self, pair: Pair) -> Size | None:
        """Return the (height, width) that a pair is drawn at; None: the pipeline's default."""
        if pair.size is not None or self.height is None or self.width is None:
            return pair.size
        return self.height, self.width

    def load(self) -> DiffusionPipeline:
        """Load the pipeline, with the scheduler that it draws with.

        Raises:
            ValueError: If diffusers has no such scheduler.
        """
        pipe = load_base_pipeline(
            {
                "pretrained_model_name_or_path": self.model,
                "revision": self.revision,
                "torch_dtype": self.torch_dtype,
                "teacher_lora": self.lora,
            }
        )
        if self.scheduler is not None:
            cls = _scheduler(self.scheduler)
            flow = "FlowMatch" in type(pipe.scheduler).__name__
            # Those that serve both kinds of models take this one for the other kind.
            told = {"use_flow_sigmas": True, "prediction_type": "flow_prediction"}
            takes = flow and "use_flow_sigmas" in inspect.signature(cls).parameters
            # All settings go along, for pipelines read some (base_shift) that the class does not;
            # it warns about those.
            with silent_diffusers():
                own = pipe.scheduler.config
                pipe.scheduler = cls.from_config(own, **(told if takes else {}))
        return pipe

    def sample(
        self, pipe: DiffusionPipeline, pairs: Sequence[Pair], on_step: StepCallback | None = None
    ) -> tuple[Tensor, list[Any]]:
        """Sample a batch of pairs that share size and the numbers of their calls.

        Returns:
            Final latents, (B, ...), and B images or lists of frames.

        Raises:
            ValueError: If the pipeline draws another size than it was asked for.
        """
        size = self.size(pairs[0])
        with nullcontext() if self.scheduler is None else silent_diffusers():  # see load
            latents, images = sample(
                pipe,
                num_inference_steps=self.num_inference_steps,
                cfg_scale=self.cfg_scale,
                generator=[torch.Generator(self.rand_device).manual_seed(p.seed) for p in pairs],
                prompt=[pair.prompt for pair in pairs],
                on_step=on_step,
                **({} if size is None else {"height": size[0], "width": size[1]}),
                **self.call_kwargs,
                **collate_calls([open_pictures(pair.call) for pair in pairs]),
            )
        width, height = (images[0][0] if isinstance(images[0], list) else images[0]).size
        if size is not None and (height, width) != size:
            raise ValueError(
                f"{type(pipe).__name__} draws {height}x{width} (height x width) when asked for "
                f"{size[0]}x{size[1]}: both sides must be multiples of what the pipeline needs"
            )
        return latents, images


def _scheduler(name: str) -> Any:  # noqa: ANN401
    import diffusers

    found = getattr(diffusers, name, None)
    if not hasattr(found, "set_timesteps"):
        raise ValueError(
            f"scheduler must be a scheduler class of diffusers, such as "
            f"FlowMatchHeunDiscreteScheduler or UniPCMultistepScheduler, got {name!r}"
        )
    return found


def record(teacher: Teacher, pipe: DiffusionPipeline, examples: Sequence[Pair]) -> dict[str, Any]:
    """Return what a loaded pipeline draws with, as plain JSON.

    Args:
        teacher: What draws.
        pipe: Its pipeline, `teacher.load()`.
        examples: A pair of each size.

    Returns:
        The scheduler's class and configuration; for each size the timesteps and sigmas that the
        pipeline itself sets; a digest of the denoisers' weights.
    """
    config = {key: value for key, value in pipe.scheduler.config.items() if key[0] != "_"}
    schedules = {}
    for pair in examples:
        size = teacher.size(pair)
        name = "default" if size is None else f"{size[0]}x{size[1]}"
        # Six digits: another device or version may differ in the last ones.
        schedules[name] = {
            kind: [float(f"{value:.6g}") for value in values.tolist()]
            for kind, values in read_schedule(pipe, partial(teacher.sample, pipe, [pair])).items()
        }
    facts = {
        "scheduler": {"class": type(pipe.scheduler).__name__, "config": config},
        "schedules": schedules,
        "denoiser_sha256": fingerprint([weights_summary(d) for d in denoisers(pipe).values()]),
    }
    plain: dict[str, Any] = json.loads(json.dumps(facts, default=str))
    return plain


def student_sigmas(teacher: Teacher, pipe: DiffusionPipeline, pair: Pair) -> Tensor:
    """Return the noise levels between the student's steps at the size of a pair, (steps - 1,).

    Raises:
        ValueError: If the scheduler has no sigmas.
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
    own, pipe.scheduler = pipe.scheduler, override_scheduler_config(pipe, teacher.student_scheduler)
    try:
        seen = read_schedule(pipe, partial(student.sample, pipe, [pair]))
    finally:
        pipe.scheduler = own
    if "sigmas" not in seen:
        raise ValueError(f"store_trajectory: {type(own).__name__} has no sigmas")
    return seen["sigmas"][1:-1]
