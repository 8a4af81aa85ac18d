"""Exports the student whenever a checkpoint is saved."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_only

from lit_distill.export.exporter import ExportFormat, export_student


class ExportOnSave(Callback):
    """Exports the student whenever a checkpoint is saved, as `lit-distill export` does.

    Each export loads the pipeline again, twice, and draws on the CPU: mind the memory and the time
    of a large model, and save seldom.

    Args:
        out_dir: Folder to write to, one folder a step; null: ``exports`` beside the checkpoints.
        format: diffusers, comfyui, kohya, diffsynth, peft or merged.
        push_to_hub: Hub repository (user/name) that gets every export.
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
        self.exported = -1

    @rank_zero_only
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Export what is about to be saved, once a step."""
        if trainer.global_step == self.exported:
            return
        self.exported = trainer.global_step
        place = Path(self.out_dir or Path(trainer.log_dir or trainer.default_root_dir) / "exports")
        # The module's own notes are added to a checkpoint after the callbacks'.
        pl_module.on_save_checkpoint(checkpoint)
        export_student(
            checkpoint,
            place / f"step_{trainer.global_step:06d}",
            self.format,
            push_to_hub=self.push_to_hub,
        )
