"""A local page to try a student by hand: teacher, undistilled pipeline and student side by side."""

from __future__ import annotations

import base64
import io
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.adapters.inject import adapters_disabled
from lit_distill.adapters.weights import load_base_pipeline
from lit_distill.errors import InputError
from lit_distill.export.base_model import load_checked_base
from lit_distill.export.facts import StudentFacts
from lit_distill.export.load_student import add_student
from lit_distill.export.samples import sample_example
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.loading import load_pipeline
from lit_distill.training.checkpoint_io import read_checkpoint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


CONTENDERS = ("teacher", "undistilled", "student")

MAX_STEPS = 1000

MAX_SEED = 2**63 - 1


class Playground:
    """Samples prompts with the teacher, the undistilled pipeline and the student of a checkpoint.

    With a LoRA all three share one set of weights. Otherwise the pretrained denoiser, or the
    teacher's own pipeline, is loaded at its first use and kept.

    Args:
        ckpt_path: Checkpoint (.ckpt) of a run.
        device: Device for sampling.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it can't be used, or if the base model has changed since training.
    """

    def __init__(self, ckpt_path: str | Path, device: str | torch.device = "cpu") -> None:
        content = read_checkpoint(ckpt_path)
        self.device = torch.device(device)
        self.hparams: dict[str, Any] = content["hyper_parameters"]
        base, _ = load_checked_base(content)
        self.base_scheduler = base.scheduler
        self.pipe = add_student(base, content, f"checkpoint {ckpt_path}").to(device)
        self.pipe.set_progress_bar_config(disable=True)
        self.facts = StudentFacts.from_checkpoint(content, self.pipe)
        self._loaded: dict[str, DiffusionPipeline] = {}
        self._lock = threading.Lock()

    @property
    def title(self) -> str:
        """Name of the base model."""
        model = self.facts.base_model
        return Path(model).name if Path(model).exists() else model

    @property
    def teacher_settings(self) -> tuple[int, float]:
        """Steps and guidance of the teacher: of the training rows, or else of the online one."""
        recorded = self.facts.teacher
        steps = recorded.get("teacher_num_inference_steps")
        cfg = recorded.get("teacher_cfg_scale")
        return (
            int(steps or self.hparams["teacher_num_inference_steps"]),
            float(cfg or self.hparams["teacher_cfg_scale"]),
        )

    def sample(self, contender: str, prompt: str, seed: int, steps: int) -> dict[str, Any]:
        """Return an image as a data URI, the seconds that it took, and a caption.

        Only one image is sampled at a time.

        Args:
            contender: One of `CONTENDERS`.
            prompt: Text prompt.
            seed: Seed of the initial noise.
            steps: Number of steps.

        Raises:
            InputError: If a value is not accepted.
        """
        _check(contender, prompt, seed, steps)
        cfg = self.teacher_settings[1] if contender == "teacher" else self.facts.cfg_scale
        example = replace(
            self.facts.examples[0], prompt=prompt, seed=seed, num_inference_steps=steps
        )
        example = replace(example, cfg_scale=cfg)
        call_kwargs = dict(self.facts.call_kwargs)
        if contender == "teacher" or steps != self.facts.num_inference_steps:
            call_kwargs.pop("sigmas", None)  # they are the student's, for its number of steps
        with self._lock, self._pipeline(contender) as pipe:
            started = time.perf_counter()
            _, image = sample_example(pipe, example, **call_kwargs)
            seconds = time.perf_counter() - started
        buffer = io.BytesIO()
        image.save(buffer, "PNG")
        return {
            "image": f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}",
            "seconds": seconds,
            "caption": f"{steps} steps, cfg {cfg:g}",
        }

    @contextmanager
    def _pipeline(self, contender: str) -> Iterator[DiffusionPipeline]:
        """Yield the pipeline of a contender, on the device."""
        if contender == "student":
            yield self.pipe
        elif contender == "teacher" and (model := self.hparams.get("teacher_model")):
            dtype = self.hparams["torch_dtype"]
            yield self._load("teacher", lambda: load_pipeline(model, torch_dtype=dtype))
        elif self.hparams["lora"] is None:
            pretrained = self._load("pretrained", self._pretrained)
            with self._scheduler(pretrained, contender):
                yield pretrained
        else:
            modules = torch.nn.ModuleList(denoisers(self.pipe).values())
            with self._scheduler(self.pipe, contender), adapters_disabled(modules):
                yield self.pipe

    @contextmanager
    def _scheduler(self, pipe: DiffusionPipeline, contender: str) -> Iterator[None]:
        """Let the teacher use the base model's scheduler, and the others the student's."""
        previous, student = pipe.scheduler, self.pipe.scheduler
        pipe.scheduler = self.base_scheduler if contender == "teacher" else student
        try:
            yield
        finally:
            pipe.scheduler = previous

    def _pretrained(self) -> DiffusionPipeline:
        """Load the pretrained denoiser beside a fully trained one; other components are shared."""
        trained = denoisers(self.pipe)
        shared = {k: v for k, v in self.pipe.components.items() if k not in trained}
        return load_base_pipeline(self.hparams, **shared)

    def _load(self, name: str, load: Callable[[], DiffusionPipeline]) -> DiffusionPipeline:
        if name not in self._loaded:
            self._loaded[name] = load().to(self.device)
            self._loaded[name].set_progress_bar_config(disable=True)
        return self._loaded[name]


def _check(contender: str, prompt: str, seed: int, steps: int) -> None:
    if contender not in CONTENDERS:
        raise InputError(f"contender must be one of {', '.join(CONTENDERS)}, got {contender!r}")
    if not isinstance(prompt, str) or not prompt.strip():
        raise InputError("the prompt is empty; write one")
    for name, value, least, most in (("seed", seed, 0, MAX_SEED), ("steps", steps, 1, MAX_STEPS)):
        if type(value) is not int or not least <= value <= most:
            raise InputError(f"{name} must be an integer from {least} to {most}, got {value!r}")
