"""What a run leaves behind to look at: image grids while it trains, the images of a prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_distill.batches import Batch
from lit_distill.evaluation import Draws
from lit_distill.export import ExportFormat, export_student
from lit_distill.module import DirectDistill


class ImageGrid(Callback):
    """Shows at every validation how teacher, undistilled pipeline and student draw the same rows.

    The picture goes to the loggers: TensorBoard (tag ``val_images``) and Weights & Biases; without
    one of these, to ``images/step_<n>.png`` in the folder of the run. The rows are the first
    held-out ones, with their own seeds, every time. Where no metric looks at images, none are
    decoded, and there is no picture.

    Args:
        rows: Number of rows shown.
    """

    def __init__(self, rows: int = 8) -> None:
        self.rows = rows
        self._shown: list[tuple[str, list[Image.Image]]] = []
        self._undistilled: dict[int, list[Image.Image]] = {}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Begin a new picture."""
        self._shown = []

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Take the batch's images, if rows are wanting."""
        assert isinstance(pl_module, DirectDistill)
        missing = self.rows - len(self._shown)
        if trainer.state.fn != "fit" or missing <= 0:
            return
        draws: Draws = outputs["draws"]
        if draws.preds is None or draws.target is None:
            return
        if batch_idx not in self._undistilled:
            with pl_module.undistilled():
                latents = pl_module.student_rollout(batch)
            self._undistilled[batch_idx] = to_pil(pl_module.decode(latents, batch))
        columns = (to_pil(draws.target), self._undistilled[batch_idx], to_pil(draws.preds))
        rows = zip(batch["prompt"], zip(*columns, strict=True), strict=True)
        self._shown += [(prompt, list(images)) for prompt, images in rows][:missing]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Give the picture to the loggers."""
        if self._shown and trainer.is_global_zero:
            grid = contact_sheet(["teacher", "undistilled", "student"], self._shown)
            log_image(trainer, "val_images", grid)


def log_image(trainer: pl.Trainer, name: str, image: Image.Image) -> None:
    """Give an image to every logger that takes images; if there is none, write a PNG file."""
    step = trainer.global_step
    taken = False
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key=name, images=[image], step=step)
        else:
            continue
        taken = True
    if not taken:
        folder = Path(trainer.log_dir or trainer.default_root_dir) / "images"
        folder.mkdir(parents=True, exist_ok=True)
        image.save(folder / f"step_{step:06d}.png")


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return images (B, 3, H, W), range [0, 1], as Pillow's, rounded as diffusers does."""
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def contact_sheet(columns: list[str], rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Return a picture with a labelled column a way to draw and a row a prompt.

    Small images are enlarged by a whole factor, large ones reduced, to about 256 pixels.
    """
    edge = 256
    example = rows[0][1][0]
    factor = edge / max(example.size)
    factor = max(1, round(factor)) if factor >= 1 else factor
    width, height = (max(1, round(side * factor)) for side in example.size)
    gap, caption, head = 12, 22, 34
    font = ImageFont.load_default(15)
    sheet = Image.new(
        "RGB",
        (gap + len(columns) * (width + gap), head + len(rows) * (height + caption + gap)),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    for column, label in enumerate(columns):
        pen.text((gap + column * (width + gap), 8), label, "black", font)
    for index, (prompt, images) in enumerate(rows):
        top = head + index * (height + caption + gap)
        pen.text((gap, top), prompt, "dimgray", font)
        for column, image in enumerate(images):
            cell = image.resize((width, height), method)
            sheet.paste(cell, (gap + column * (width + gap), top + caption))
    return sheet


class ImageWriter(BasePredictionWriter):
    """Writes predicted images as ``row_<n>.png``, n being the row of the CSV.

    Args:
        out_dir: Folder to write to; null: ``predictions`` in the trainer's default_root_dir.
    """

    def __init__(self, out_dir: str | None = None) -> None:
        super().__init__("batch")
        self.out_dir = out_dir

    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,  # noqa: ANN401
        batch_indices: Any,  # noqa: ANN401
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        """Write the images of one batch."""
        out_dir = Path(self.out_dir or Path(trainer.default_root_dir) / "predictions")
        out_dir.mkdir(parents=True, exist_ok=True)
        for row, image in zip(batch["row"], prediction, strict=True):
            image.save(out_dir / f"row_{row:06d}.png")


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
