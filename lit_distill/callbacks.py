"""What a run leaves behind to look at: the comparison of a test, the images of a prediction."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lit_distill.data import Batch
from lit_distill.export import ExportFormat, export_student
from lit_distill.module import DirectDistill


class Way(NamedTuple):
    """One way to draw the held-out rows."""

    name: str
    num_inference_steps: int
    cfg_scale: float
    undistilled: bool = False

    @property
    def label(self) -> str:
        """Name, steps and guidance, for a table or a picture."""
        return f"{self.name}, {self.num_inference_steps} steps, cfg {self.cfg_scale:g}"

    @property
    def evaluations(self) -> int:
        """Denoiser evaluations an image: guidance takes two a step."""
        return self.num_inference_steps * (1 if self.cfg_scale == 1 else 2)


class Tally:
    """Sums over the held-out rows drawn in one way."""

    def __init__(self) -> None:
        self.error = 0.0
        self.rows = 0
        self.seconds = 0.0
        self.timed_rows = 0

    def add(self, error: float, seconds: float, rows: int) -> None:
        """Add a batch; the first one is not timed, it warms up."""
        self.error += error
        self.rows += rows
        if self.rows > rows:
            self.seconds += seconds
            self.timed_rows += rows


class Comparison(Callback):
    """Draws the test rows with teacher, undistilled pipeline and student, side by side.

    Prints a table, and writes ``comparison.png`` and ``comparison.json``. Each rank draws its own
    rows; the table shows those of the first.

    Args:
        out_dir: Folder to write to; null: the trainer's default_root_dir.
        undistilled: Steps and guidance of further ways to draw with the undistilled pipeline,
            so that nobody is misled about what else its time buys.
        rows: Rows of the picture.
    """

    def __init__(
        self,
        out_dir: str | None = None,
        undistilled: list[tuple[int, float]] | None = None,
        rows: int = 8,
    ) -> None:
        self.out_dir = out_dir
        self.further = [(4, 4.0), (8, 4.0)] if undistilled is None else undistilled
        self.rows = rows
        self.tallies: dict[Way, Tally] = {}
        self.grid: list[tuple[str, list[Image.Image]]] = []

    def _ways(self, batch: Batch, module: DirectDistill) -> list[Way]:
        steps, cfg = batch["num_inference_steps"], batch["cfg_scale"]
        return [
            Way("undistilled", steps, cfg, undistilled=True),
            *(Way("undistilled", s, c, undistilled=True) for s, c in self.further),
            Way("student", steps, cfg),
        ]

    @staticmethod
    def _teacher(module: DirectDistill) -> Way:
        hyper = module.hparams
        return Way(
            "teacher", hyper["teacher_num_inference_steps"], hyper["teacher_cfg_scale"], True
        )

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier test."""
        self.tallies, self.grid = {}, []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the batch in every way."""
        assert isinstance(pl_module, DirectDistill)
        target = pl_module.teacher_target(batch)
        shown = [self._pictures(target, batch, pl_module)]
        for way in self._ways(batch, pl_module):
            images = self._draw(way, target, batch, pl_module)
            if way.num_inference_steps == batch["num_inference_steps"] and (
                way.cfg_scale == batch["cfg_scale"]
            ):
                shown.append(images)
        teacher = self._teacher(pl_module)
        # Its pictures are stored; it is drawn twice only to be timed.
        if self.tallies.get(teacher, Tally()).timed_rows == 0:
            self._draw(teacher, target, batch, pl_module)
        for prompt, *row in zip(batch["prompt"], *shown, strict=True):
            if len(self.grid) < self.rows:
                self.grid.append((prompt, row))

    def _draw(
        self, way: Way, target: Tensor, batch: Batch, module: DirectDistill
    ) -> list[Image.Image]:
        started = time.perf_counter()
        latents, images = module.draw(
            batch,
            num_inference_steps=way.num_inference_steps,
            cfg_scale=way.cfg_scale,
            undistilled=way.undistilled,
        )
        seconds = time.perf_counter() - started  # the images are on the host: nothing is pending
        error = (latents.float() - target).square().flatten(1).mean(1).sum().item()
        self.tallies.setdefault(way, Tally()).add(error, seconds, len(images))
        return images

    @staticmethod
    def _pictures(target: Tensor, batch: Batch, module: DirectDistill) -> list[Image.Image]:
        with torch.no_grad():
            pixels = module.codec(batch).decode(target)
        arrays = (pixels * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        return [Image.fromarray(array) for array in arrays]

    @rank_zero_only
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print the table and write the files."""
        assert isinstance(pl_module, DirectDistill)
        if not self.grid:
            return
        out_dir = Path(self.out_dir or trainer.default_root_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        records = self._records(self._teacher(pl_module))
        (out_dir / "comparison.json").write_text(json.dumps(records, indent=2) + "\n")
        teacher = self._teacher(pl_module).label
        first = next(iter(self.tallies))
        student = next(way for way in self.tallies if way.name == "student")
        picture = contact_sheet([teacher, first.label, student.label], self.grid)
        picture.save(out_dir / "comparison.png")
        print(format_table(records))
        print(f"{out_dir / 'comparison.png'} shows {len(self.grid)} of the held-out rows")

    def _records(self, teacher: Way) -> list[dict[str, Any]]:
        base = next(tally.error / tally.rows for tally in self.tallies.values())
        ways = [teacher, *(way for way in self.tallies if way != teacher)]
        records = []
        for way in ways:
            tally = self.tallies[way]
            # The stored latents are the teacher: its error is nil by definition.
            error = 0.0 if way == teacher else tally.error / tally.rows
            timed = tally.timed_rows > 0
            records.append(
                {
                    "drawn by": way.label,
                    "denoiser evaluations": way.evaluations,
                    "seconds an image": tally.seconds / tally.timed_rows if timed else None,
                    "latent MSE": error,
                    "x undistilled": error / base,
                }
            )
        return records


def format_table(records: list[dict[str, Any]]) -> str:
    """Return records as a plain text table, numbers to three significant digits."""
    header = list(records[0])
    cells = [[_show(record[name]) for name in header] for record in records]
    widths = [max(len(line[i]) for line in [header, *cells]) for i in range(len(header))]
    lines = []
    for line in [header, ["-" * width for width in widths], *cells]:
        first, *rest = (text for text in line)
        padded = [text.rjust(width) for text, width in zip(rest, widths[1:], strict=True)]
        lines.append("  ".join([first.ljust(widths[0]), *padded]))
    return "\n".join(lines)


def _show(value: Any) -> str:  # noqa: ANN401
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


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
