"""The online teacher's pairs in checkpoints, and its share of the time."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_distill.training.models import StudentAndTeacher
from lit_distill.training.resume import ResumeState


class TeacherBuffer(Callback):
    """Saves and restores the buffer of generated pairs, and logs ``teacher_share``.

    The pairs themselves are saved, not the seeds that they were generated from: to generate a
    buffer again takes as long as many training steps, and is exact on the same machine only. Every
    process has its own pairs; they are gathered. ``teacher_share`` is the share of training time in
    which the online teacher has generated, from the start of the run.

    Args:
        models: Returns student and teacher, once they are loaded.
        resume: Knows whether an exception has ended the run.
    """

    def __init__(self, models: Callable[[], StudentAndTeacher], resume: ResumeState) -> None:
        self.models = models
        self.resume = resume
        self._finished: list[Any] = []
        self._started = (0.0, 0.0)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock."""
        self._started = time.perf_counter(), self.models().teacher.seconds

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Log the share, if the teacher has generated anything."""
        seconds = self.models().teacher.seconds - self._started[1]
        if seconds:
            share = seconds / (time.perf_counter() - self._started[0])
            pl_module.log("teacher_share", share)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Note the buffer after a complete step."""
        if not trainer.fit_loop._should_accumulate():
            self._finished = self.models().buffer.state()

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the pairs of every process, as they were after the last complete step."""
        buffer = self.models().buffer
        if buffer.reuse == 1:
            return
        own = self._finished if self.resume.interrupted else buffer.state()
        states: list[Any] = [own]
        if trainer.world_size > 1:
            states = [None] * trainer.world_size
            torch.distributed.all_gather_object(states, own)
        checkpoint["teacher_buffer"] = states

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore this process's pairs."""
        buffer = self.models().buffer
        if trainer.state.fn != "fit" or buffer.reuse == 1:
            return
        states = checkpoint.get("teacher_buffer", [])
        if len(states) != trainer.world_size:
            rank_zero_warn(
                f"the checkpoint has the online teacher's pairs of {len(states)} processes, and "
                f"this run has {trainer.world_size}: its buffer starts empty"
            )
            return
        # Copied: the tensors of a memory-mapped checkpoint are read when they are used.
        buffer.load([(left, _copied(row)) for left, row in states[trainer.global_rank]])


def _copied(row: dict[str, Any]) -> Any:  # noqa: ANN401
    return {name: v.clone() if isinstance(v, Tensor) else v for name, v in row.items()}
