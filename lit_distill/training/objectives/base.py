"""The base of the objectives, and what an objective may ask of student and teacher."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch import Tensor, nn

from lit_distill.data.batch import Batch
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.noise_levels import NoiseLevel, NoiseLevels
from lit_distill.pipelines.trajectory import Trajectory
from lit_distill.training.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Losses(NamedTuple):
    """The losses of a batch.

    Attributes:
        student: Of each sample, (B,), float32, with its graph, which reaches the student only.
        companion: Of what the objective trains beside the student, (), with its graph, which
            reaches that only; None: nothing.
        complete: Whether the graph reaches all that is trained. If it does not, the rest gets a
            gradient of zero, for which DDP would wait.
    """

    student: Tensor
    companion: Tensor | None = None
    complete: bool = True


class Models(Protocol):
    """What an objective may ask for. Latents are in the space of `lit_distill.rollout`."""

    @property
    def pipe(self) -> DiffusionPipeline:
        """The student's pipeline."""

    @property
    def step(self) -> int:
        """Number of optimizer steps that are complete."""

    @property
    def levels(self) -> NoiseLevels:
        """The noise levels of the pipeline's model."""

    def student_rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, (B, ...), with their graph."""

    def student_trajectory(self, batch: Batch) -> Trajectory:
        """Return the student's states after every step, each with the graph of its own step."""

    def teacher_target(self, batch: Batch) -> Tensor:
        """Return the teacher's final latents, (B, ...), float32."""

    def teacher_trajectory(self, batch: Batch, sigmas: Tensor) -> Trajectory:
        """Return the teacher's states at the student's noise levels, (K,)."""

    def compare(self, latents: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Return `model.loss` of each sample, (B,), float32."""

    def student_x0(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the clean latents that the student predicts, (B, ...), with their graph."""

    def teacher_x0(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the clean latents that the guided teacher predicts, without graph."""

    def companion_x0(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the clean latents that the companion adapter predicts, with their graph."""

    def base_x0(self, latents: Tensor, level: NoiseLevel, batch: Batch) -> Tensor:
        """Return the unguided pretrained weights' prediction; the graph reaches the latents."""

    def schedule(self, batch: Batch, num_inference_steps: int) -> list[NoiseLevel]:
        """Return the levels before every step of the student's schedule, and the last one's end."""

    def noise(self, like: Tensor, batch: Batch) -> Tensor:
        """Return new standard normal noise for each row, the same on any number of processes."""

    def uniform(self) -> float:
        """Return a new random number in [0, 1), the same on all processes."""

    def with_other_noise(self, batch: Batch) -> Batch:
        """Return the batch with other seeds of the initial noise, and without targets."""

    def hooked(self, hooks: Mapping[str, Any]) -> AbstractContextManager[None]:
        """Have forward hooks on modules of the denoisers, by name, until the context is left."""


def one_denoiser(models: Models) -> bool:
    """Return whether the pipeline has one denoiser: of two, each predicts at some levels only."""
    return len(denoisers(models.pipe)) == 1


class Objective(nn.Module, ABC):
    """Base of the objectives. `model.loss` is the measure, the objective what it compares.

    Parameters of an objective, and the companion adapter if it needs one, are trained beside the
    student, in parameter groups of the same optimizer with options of their own. They are in the
    checkpoint, but neither exported nor averaged.

    Args:
        optimizer: Options of these groups that differ from `model.optimizer`, such as {lr: 1e-3}.

    Attributes:
        needs_base: Whether the frozen pretrained weights are needed: the student must be a LoRA.
        needs_companion: Whether an adapter of the same shape is trained beside the student's.
        needs_target: Whether it asks for the teacher's final latents.
        needs_trajectory: Whether it asks for the teacher's states.
        whole_rollouts: Whether the student only ever takes all steps of its schedule.
    """

    needs_base: bool = False
    needs_companion: bool = False
    needs_target: bool = True
    needs_trajectory: bool = False
    whole_rollouts: bool = True

    def __init__(self, optimizer: dict[str, Any] | None = None) -> None:
        super().__init__()
        self.optimizer = dict(optimizer or {})

    @abstractmethod
    def losses(self, models: Models, batch: Batch) -> Losses:
        """Return the losses of a batch."""

    def check(self, settings: Settings) -> None:
        """Check that the student's settings suit the objective, before anything is loaded.

        Raises:
            InputError: If they do not.
        """
        name = type(self).__name__
        if self.needs_base and not settings.trains_lora:
            raise InputError(
                f"model.objective: {name} needs the frozen pretrained weights beside the student, "
                "and model.lora is null (full training); set model.lora, for example {r: 32}"
            )
        if not self.whole_rollouts and settings.lora_per_step:
            raise InputError(
                f"model.objective: {name} trains at noise levels between the student's steps, and "
                "model.lora_per_step has a LoRA for each step only; leave it out"
            )

    def build(self, pipe: DiffusionPipeline) -> None:
        """Make the modules that are trained beside the student; called once, before training."""

    def groups(self, companion: Sequence[nn.Parameter]) -> list[dict[str, Any]]:
        """Return the optimizer's groups of what is trained beside the student.

        Args:
            companion: Parameters of the companion adapter.
        """
        parameters = [*(companion if self.needs_companion else ()), *self.parameters()]
        return [{**self.optimizer, "params": parameters}] if parameters else []
