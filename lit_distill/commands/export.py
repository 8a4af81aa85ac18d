"""`lit-distill export`: the student of a checkpoint as files for other tools."""

from __future__ import annotations

from pathlib import Path

import lightning.pytorch as pl

from lit_distill.export.exporter import ExportFormat, export_student


def export(
    trainer: pl.Trainer,
    *,
    ckpt_path: str,
    out: str,
    format: ExportFormat = "diffusers",
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    push_to_hub: str | None = None,
) -> None:
    """Write the student of a checkpoint for other tools; reload it and compare its image.

    Args:
        trainer: The device.
        ckpt_path: Checkpoint (.ckpt) of a run.
        out: Folder to write to.
        format: diffusers, comfyui, kohya, diffsynth or peft for a LoRA file; merged for a
            pipeline folder (always, when the whole denoiser was trained).
        dtype: Data type of the tensors: float32, bfloat16 or float16; default: float32 for a
            LoRA, that of the base model for merged.
        max_shard_size: Largest file of format merged.
        push_to_hub: Hub repository (user/name) to upload the folder to; created if missing.
    """
    if not trainer.is_global_zero:
        return
    folder = export_student(
        ckpt_path,
        out,
        format,
        dtype=dtype,
        max_shard_size=max_shard_size,
        device=trainer.strategy.root_device,
        push_to_hub=push_to_hub,
    )
    print(f"student: {folder}\nreloaded, and verified to reproduce the same image")
    print(f"\nNext: {Path(folder) / 'README.md'} has the code that generates with it.")
