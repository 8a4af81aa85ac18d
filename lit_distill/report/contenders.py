"""The contenders of a report, and the results of sampling the held-out rows with them."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lit_distill.data.batch import Batch
from lit_distill.export.load_student import load_student
from lit_distill.pipelines.loading import load_pipeline
from lit_distill.training.direct_distill import DirectDistill

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Contender:
    """A pipeline and settings that the held-out rows are sampled with.

    Attributes:
        kind: teacher, undistilled, student or other.
        name: Its name.
        num_inference_steps: Number of steps; None: that of each row.
        cfg_scale: Guidance, 1 = off; None: that of each row.
        load: Loads its pipeline on the CPU; None: the tested module samples.
    """

    kind: Literal["teacher", "undistilled", "student", "other"]
    name: str
    num_inference_steps: int | None = None
    cfg_scale: float | None = None
    load: Callable[[], DiffusionPipeline] | None = None

    def steps(self, batch: Batch) -> int:
        """Return the number of steps for a batch."""
        return self.num_inference_steps or batch["num_inference_steps"]

    def guidance(self, batch: Batch) -> float:
        """Return the guidance for a batch."""
        return batch["cfg_scale"] if self.cfg_scale is None else self.cfg_scale

    def denoiser_calls(self, batch: Batch) -> int:
        """Return the number of denoiser calls per image; guidance takes two per step."""
        return self.steps(batch) * (1 if self.guidance(batch) == 1 else 2)

    def label(self, batches: list[Batch]) -> str:
        """Return its name with its steps and guidance for these batches."""
        steps = " or ".join(map(str, sorted({self.steps(batch) for batch in batches})))
        cfg = " or ".join(f"{value:g}" for value in sorted({self.guidance(b) for b in batches}))
        return f"{self.name}, {steps} steps, cfg {cfg}"


@dataclass
class ContenderResult:
    """Result of sampling the held-out rows with a contender.

    Attributes:
        contender: The contender.
        label: Its label for these rows, unique within a report.
        seconds: Wall time of the timed images, in this process.
        timed_images: Number of timed images, in this process.
        values: Metrics by name, over all processes.
    """

    contender: Contender
    label: str
    seconds: float = 0.0
    timed_images: int = 0
    values: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")

    @property
    def seconds_per_image(self) -> float:
        """Wall time per image, in this process."""
        return self.seconds / self.timed_images


def estimate_teacher_seconds(results: list[ContenderResult], batches: list[Batch]) -> None:
    """Set the teacher's time, whose images are stored, by what other samples have taken.

    Teacher and undistilled pipeline are the same weights: a denoiser call takes the same time.

    Args:
        results: The teacher's first, all others complete.
        batches: The held-out rows.
    """

    def calls(result: ContenderResult) -> int:
        return sum(result.contender.denoiser_calls(batch) for batch in batches)

    teacher, *others = results
    longest = max((r for r in others if r.contender.kind == "undistilled"), key=calls)
    teacher.seconds = longest.seconds_per_image * calls(teacher) / calls(longest)
    teacher.timed_images = 1


@dataclass
class ContenderConfig:
    """A further contender, as users describe it under ``compare``.

    Attributes:
        path: Checkpoint (.ckpt) of a run, or hub id or folder of a diffusers pipeline; null: the
            pipeline that the tested student was made from.
        lora: LoRA to load into it: hub id, folder or file, as pipe.load_lora_weights takes it.
        num_inference_steps: Number of steps; null: that of each row.
        cfg_scale: Guidance, 1 = off; null: that of each row.
        name: Its name in the report; null: the name of the file or folder.
    """

    path: str | None = None
    lora: str | None = None
    num_inference_steps: int | None = None
    cfg_scale: float | None = None
    name: str | None = None

    def contender(self, module: DirectDistill) -> Contender:
        """Return the contender; its pipeline is not loaded yet."""
        name = self.name or Path(self.lora or self.path or "").stem or "base"
        return Contender(
            "other", name, self.num_inference_steps, self.cfg_scale, lambda: self.load(module)
        )

    def load(self, module: DirectDistill) -> DiffusionPipeline:
        """Return the pipeline, on the CPU.

        Raises:
            OSError: If the file or folder does not exist, and the hub has none of this name.
            InputError: If the checkpoint can't be used.
        """
        if self.lora is not None and (Path(self.lora) / "step_1.safetensors").is_file():
            return load_student(self.lora, base_model=self.path)  # a LoRA for every step
        hparams = module.hparams
        if self.path is not None and self.path.endswith(".ckpt"):
            pipe = load_student(self.path)
        else:
            pipe = load_pipeline(
                self.path or hparams["pretrained_model_name_or_path"],
                revision=hparams["revision"] if self.path is None else None,
                torch_dtype=hparams["torch_dtype"],
            )
        if self.lora is not None:
            pipe.load_lora_weights(self.lora)
        return pipe
