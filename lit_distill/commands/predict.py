"""`lit-distill predict`: generates the student's images of prompts, or of held-out rows."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lit_distill.commands.next_step import print_next
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.export.facts import recorded_facts
from lit_distill.pipelines.stages import Offload
from lit_distill.teacher.prompts import prompt_batches, read_prompts
from lit_distill.training.checkpoint_io import read_checkpoint
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.image_callbacks import ImageWriter


def predict(
    trainer: pl.Trainer,
    model: DirectDistill,
    datamodule: DistillDataModule | None = None,
    *,
    return_predictions: bool | None = None,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
    prompts: str | None = None,
    out: str | None = None,
    num_inference_steps: int | None = None,
    cfg_scale: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    first_seed: int = 0,
    offload: Offload = "none",
) -> Any:  # noqa: ANN401
    """Generate the student's images of a file of prompts, or of held-out rows.

    Args:
        trainer: Runs the predict loop.
        model: The pipeline, unless a checkpoint names it.
        datamodule: The held-out rows.
        return_predictions: Whether to return the images.
        ckpt_path: Checkpoint (.ckpt) of a run.
        weights_only: As in Trainer.fit.
        prompts: Text file with one prompt a line, or a table with a field prompt; default: the rows
            of data.val_metadata_path.
        out: Folder to write to; default: predictions in trainer.default_root_dir.
        num_inference_steps: Steps for prompts; default: those of training.
        cfg_scale: Guidance for prompts, 1 = off; default: that of training.
        height: Height in pixels for prompts; default: that of training.
        width: Width in pixels for prompts; default: that of training.
        batch_size: Prompts per batch.
        first_seed: Seed of the first prompt; the others count up from it.
        offload: What is on the device together: none: the whole pipeline; model: one component at a
            time; group: one layer at a time.
    """
    if offload != "none":  # generate calls this function with a module of its own
        model.offload_from(trainer.strategy.root_device, offload)
    loader: DataLoader[Any] | None = None
    if prompts is not None:
        facts = recorded_facts(read_checkpoint(ckpt_path)) if ckpt_path else {}
        given = {"num_inference_steps": num_inference_steps, "cfg_scale": cfg_scale}
        given |= {"height": height, "width": width}
        facts = facts | {name: value for name, value in given.items() if value is not None}
        mappings = (datamodule.call_columns, datamodule.columns) if datamodule else ()
        rows = read_prompts(prompts, *mappings)
        batches = prompt_batches(rows, facts, batch_size, first_seed)
        loader, datamodule = DataLoader(batches, batch_size=None), None  # type: ignore[arg-type]
    if out is not None:
        trainer.callbacks = [c for c in trainer.callbacks if not isinstance(c, ImageWriter)]  # type: ignore[attr-defined]
        trainer.callbacks.append(ImageWriter(out))  # type: ignore[attr-defined]
    images = pl.Trainer.predict(
        trainer, model, loader, datamodule, return_predictions, ckpt_path, weights_only
    )
    for writer in trainer.callbacks if trainer.is_global_zero else ():  # type: ignore[attr-defined]
        if isinstance(writer, ImageWriter):
            print(f"images: {writer.folder(trainer)}")
            if ckpt_path is not None:
                print_next("export", "--ckpt_path", ckpt_path, "--out", "student")
    return images
