"""Ways to draw the held-out rows: teacher, undistilled pipeline, student, and others."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lit_distill.data.batch import Batch
from lit_distill.evaluation.evaluator import EvaluationBatch
from lit_distill.export.load_student import load_student
from lit_distill.pipelines.loading import load_pipeline
from lit_distill.training.direct_distill import DirectDistill

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass
class ContenderConfig:
    """Another way to draw the held-out rows, from the same seeds.

    Attributes:
        path: Checkpoint (.ckpt) of a run, or hub id or folder of a diffusers pipeline; null: the
            pipeline that the tested student was made from.
        lora: LoRA to load into it: hub id, folder or file, as pipe.load_lora_weights takes it.
        num_inference_steps: Steps; null: those of the rows.
        cfg_scale: Guidance, 1 = off; null: that of the rows.
        name: What the report calls it; null: the name of the file or folder.
    """

    path: str | None = None
    lora: str | None = None
    num_inference_steps: int | None = None
    cfg_scale: float | None = None
    name: str | None = None

    def load(self, module: DirectDistill) -> DiffusionPipeline:
        """Return the pipeline, on the CPU.

        Raises:
            OSError: If there is no such file or folder, and the hub can't help.
            ValueError: If the checkpoint can't be used.
        """
        if self.lora is not None and (Path(self.lora) / "step_1.safetensors").is_file():
            return load_student(self.lora, base_model=self.path)  # a LoRA for every step
        hyper = module.hparams
        if self.path is not None and self.path.endswith(".ckpt"):
            pipe = load_student(self.path)
        else:
            pipe = load_pipeline(
                self.path or hyper["pretrained_model_name_or_path"],
                revision=hyper["revision"] if self.path is None else None,
                torch_dtype=hyper["torch_dtype"],
            )
        if self.lora is not None:
            pipe.load_lora_weights(self.lora)
        return pipe

    def way(self, module: DirectDistill) -> Contender:
        """Return the way to draw with it."""
        name = self.name or Path(self.lora or self.path or "").stem or "base"
        return Contender(
            "other", name, self.num_inference_steps, self.cfg_scale, lambda: self.load(module)
        )


@dataclass
class HeldOutBatch:
    """A batch of held-out rows, with the teacher's side on the CPU.

    Attributes:
        batch: The rows, without their targets.
        new: Positions of the rows that count: no other process has them.
        target_latents: The teacher's final latents, (B, ...), float32.
        target: The teacher's images, (B, 3, H, W), uint8.
        undistilled_mse: Latent MSE of the undistilled pipeline, (B,).
    """

    batch: Batch
    new: list[int]
    target_latents: Tensor
    target: Tensor
    undistilled_mse: Tensor


@dataclass
class Contender:
    """One way to draw, and what came of it.

    Attributes:
        kind: teacher, undistilled, student or other.
        name: Its name.
        num_inference_steps: Steps; None: those of the rows.
        cfg_scale: Guidance; None: that of the rows.
        load: Makes the pipeline that draws; None: the tested module's draws.
        label: Name, steps and guidance.
        seconds: Wall time of the timed images.
        timed: Number of these.
        values: Metrics over all processes.
    """

    kind: str
    name: str
    num_inference_steps: int | None = None
    cfg_scale: float | None = None
    load: Callable[[], DiffusionPipeline] | None = None
    label: str = ""
    seconds: float = 0.0
    timed: int = 0
    values: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        """The label as the name of a folder."""
        return re.sub(r"[^a-z0-9.]+", "-", self.label.lower()).strip("-")

    def steps(self, batch: Batch) -> int:
        """Return the steps that it draws the batch with."""
        return self.num_inference_steps or batch["num_inference_steps"]

    def cfg(self, batch: Batch) -> float:
        """Return the guidance that it draws the batch with."""
        return batch["cfg_scale"] if self.cfg_scale is None else self.cfg_scale

    def evaluations(self, batch: Batch) -> int:
        """Return denoiser evaluations an image: guidance takes two a step."""
        return self.steps(batch) * (1 if self.cfg(batch) == 1 else 2)

    def name_after(self, batches: list[Batch]) -> None:
        """Make the label, which depends on the rows."""
        steps = " or ".join(map(str, sorted({self.steps(batch) for batch in batches})))
        cfg = " or ".join(f"{value:g}" for value in sorted({self.cfg(b) for b in batches}))
        self.label = f"{self.name}, {steps} steps, cfg {cfg}"

    @property
    def seconds_an_image(self) -> float:
        """Wall time of an image, in this process."""
        return self.seconds / self.timed

    def sample(
        self,
        module: DirectDistill,
        held: list[HeldOutBatch],
        precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    ) -> Iterator[tuple[HeldOutBatch, EvaluationBatch, list[Image.Image]]]:
        """Draw the rows and time it; the first batch only warms up, unless it is the only one.

        Args:
            module: The tested module.
            held: The rows.
            precision: Autocast that the module's own weights need; others draw as they are.

        Yields:
            A batch, what was drawn beside the teacher's, and the images.
        """
        with self._pipeline(module) as pipe, precision() if pipe is None else nullcontext():
            settings: dict[str, Any] = {
                "pipe": pipe,
                "num_inference_steps": self.num_inference_steps,
                "cfg_scale": self.cfg_scale,
                "undistilled": self.kind in ("teacher", "undistilled"),
            }
            if len(held) == 1:
                module.sample(held[0].batch, **settings)
            for index, rows in enumerate(held):
                started = time.perf_counter()
                latents, images = module.sample(rows.batch, **settings)
                if index > 0 or len(held) == 1:  # the images are on the host: nothing is pending
                    self.seconds += time.perf_counter() - started
                    self.timed += len(images)
                # Of a video, the codec decodes the first frame.
                images = [image[0] if isinstance(image, list) else image for image in images]
                # By name: a student's pipeline has a class of its own, of the same name.
                same_space = pipe is None or type(pipe).__name__ == type(module.pipe).__name__
                yield rows, self._beside(rows, latents, images, same_space), images

    @contextmanager
    def _pipeline(self, module: DirectDistill) -> Iterator[DiffusionPipeline | None]:
        """Load the other pipeline, with the module's own off the device meanwhile."""
        if self.load is None:
            yield None
            return
        pipe = self.load()
        module.pipe.to("cpu")
        try:
            yield pipe.to(module.device)
        finally:
            pipe.to("cpu")
            module.pipe.to(module.device)

    def _beside(
        self, held: HeldOutBatch, latents: Tensor, images: list[Image.Image], same_space: bool
    ) -> EvaluationBatch:
        device = latents.device
        pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])
        preds = torch.from_numpy(pixels).permute(0, 3, 1, 2)
        if preds.shape != held.target.shape:
            found, wanted = tuple(preds.shape[-2:]), tuple(held.target.shape[-2:])
            raise ValueError(
                f"{self.label} draws images of {found[0]}x{found[1]} (height x width), but the "
                f"held-out ones are {wanted[0]}x{wanted[1]}; give the rows height and width"
            )
        comparable = same_space and latents.shape == held.target_latents.shape
        return EvaluationBatch(
            prompt=held.batch["prompt"],
            latents=latents.float() if comparable else None,
            target_latents=held.target_latents.to(device),
            preds=preds.to(device).float() / 255,
            target=held.target.to(device).float() / 255,
            undistilled_mse=held.undistilled_mse.to(device),
        )
