"""Exports the student whenever a checkpoint is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from lit_distill.export.exporter import ExportFormat, export_student


class ExportOnSave(Callback):
    """Exports the student whenever a checkpoint is saved, like `lit-distill export`.

    Each export loads the pipeline twice and samples on the CPU. With a large model this takes time
    and memory, so save checkpoints rarely.

    Args:
        out_dir: Folder that gets one folder for each saved step; null: ``exports`` in the folder
            of the logs.
        format: diffusers, comfyui, kohya, diffsynth, peft or merged.
        push_to_hub: Hub repository (user/name) that every export is uploaded to.
    """

    def __init__(
        self,
        out_dir: str | None = None,
        format: ExportFormat = "diffusers",
        push_to_hub: str | None = None,
    ) -> None:
        self.out_dir = out_dir
        self.format = format
        self.push_to_hub = push_to_hub
        self._last_step = -1

    @rank_zero_only
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Export the content of the checkpoint, once per step."""
        if trainer.global_step == self._last_step:
            return
        self._last_step = trainer.global_step
        logs = Path(trainer.log_dir or trainer.default_root_dir)
        out_dir = Path(self.out_dir) if self.out_dir else logs / "exports"
        # Lightning calls the module's hook, which adds the facts, after those of the callbacks.
        pl_module.on_save_checkpoint(checkpoint)
        export_student(
            checkpoint,
            out_dir / f"step_{trainer.global_step:06d}",
            self.format,
            push_to_hub=self.push_to_hub,
        )
