"""Callbacks that write images: grids during training, and the images of a prediction."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.loggers import TensorBoardLogger
from PIL import Image

from lit_distill.data.batch import Batch
from lit_distill.data.whole_files import write_file
from lit_distill.data.whole_folders import check_free, draft_of, publish
from lit_distill.evaluation.contact_sheet import contact_sheet, to_pil
from lit_distill.evaluation.evaluator import EvaluationBatch
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.validation import row_keys

PREDICTIONS_FILE = ".lit_distill_predictions.json"
"""Lists the images of a prediction: their folder may also hold other files."""


class ImageGrid(Callback):
    """Logs a grid at every validation: the same rows by teacher, undistilled pipeline and student.

    The grid goes to TensorBoard (tag ``val_images``) and Weights & Biases. Without either logger it
    is written to ``images/step_<n>.png`` in the folder of the run. The rows are always the first
    held-out ones, with their seeds. If no metric needs images, none are decoded, and there is no
    grid.

    Args:
        rows: Number of rows shown.
    """

    def __init__(self, rows: int = 8) -> None:
        self.rows = rows
        self._shown: list[tuple[str, list[Image.Image]]] = []
        self._undistilled: dict[tuple[int, ...], list[Image.Image]] = {}

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new grid."""
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
        """Add the batch's images, until the grid is full."""
        assert isinstance(pl_module, DirectDistill)
        missing = self.rows - len(self._shown)
        if trainer.state.fn != "fit" or missing <= 0:
            return
        samples: EvaluationBatch = outputs["samples"]
        if samples.preds is None or samples.target is None:
            return
        key = tuple(row_keys(batch, pl_module.student.digest()))
        if key not in self._undistilled:
            with pl_module.undistilled():
                latents = pl_module.student_rollout(batch)
            self._undistilled[key] = to_pil(pl_module.decode(latents, batch))
        columns = (to_pil(samples.target), self._undistilled[key], to_pil(samples.preds))
        rows = zip(batch["prompt"], zip(*columns, strict=True), strict=True)
        self._shown += [(prompt, list(images)) for prompt, images in rows][:missing]

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the grid."""
        if self._shown and trainer.is_global_zero:
            grid = contact_sheet(["teacher", "undistilled", "student"], self._shown)
            log_image(trainer, "val_images", grid)


def log_image(trainer: pl.Trainer, name: str, image: Image.Image) -> None:
    """Log an image with every logger that takes images; if there is none, write a PNG file."""
    if not log_to_loggers(trainer, name, image):
        write_png(run_folder(trainer) / "images" / f"step_{trainer.global_step:06d}.png", image)


def log_to_loggers(trainer: pl.Trainer, name: str, image: Image.Image) -> bool:
    """Log an image with every logger that takes images; return whether there is one."""
    step = trainer.global_step
    logged = False
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, np.asarray(image), step, dataformats="HWC")
        elif hasattr(logger, "log_image"):  # Weights & Biases
            logger.log_image(key=name, images=[image], step=step)
        else:
            continue
        logged = True
    return logged


def run_folder(trainer: pl.Trainer) -> Path:
    """Return the folder of the run, which Lightning's checkpoints are in.

    Not `trainer.log_dir`, for which every process would have to ask.
    """
    if trainer.logger is None:
        return Path(trainer.default_root_dir)
    version = trainer.logger.version
    name = version if isinstance(version, str) else f"version_{version}"
    root = trainer.logger.save_dir or trainer.default_root_dir
    return Path(root) / str(trainer.logger.name) / name


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image as a PNG file, whole or not at all."""
    write_file(path, lambda stream: image.save(stream, format="PNG"))


class ImageWriter(BasePredictionWriter):
    """Writes predicted images as ``row_<n>.png``, n being the row of the CSV.

    They appear in the folder once all of them are complete, in place of those of an earlier run.

    Args:
        out_dir: Folder to write to; null: ``predictions`` in the trainer's default_root_dir.
    """

    def __init__(self, out_dir: str | None = None) -> None:
        super().__init__("batch")
        self.out_dir = out_dir
        self._draft = Path()
        self._open = ExitStack()

    def folder(self, trainer: pl.Trainer) -> Path:
        """Return the folder to write to."""
        return Path(self.out_dir or Path(trainer.default_root_dir) / "predictions")

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Check that the images may be written.

        Raises:
            InputError: If an image of somebody else is in the way; names it.
        """
        folder = self.folder(trainer)
        check_free(folder, [path.name for path in folder.glob("row_*.png")], PREDICTIONS_FILE)
        draft = str(self._open.enter_context(draft_of(folder))) if trainer.is_global_zero else ""
        self._draft = Path(trainer.strategy.broadcast(draft))

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
        for row, image in zip(batch["row"], prediction, strict=True):
            write_png(self._draft / f"row_{row:06d}.png", image)

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Put the images of all processes in place."""
        trainer.strategy.barrier()
        if trainer.is_global_zero:
            publish(self._draft, self.folder(trainer), PREDICTIONS_FILE)

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Remove what is left of a run that did not end."""
        self._open.close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Remove what the run has written so far."""
        self._open.close()
