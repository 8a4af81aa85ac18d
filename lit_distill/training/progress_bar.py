"""The progress of a run: one line that is drawn again, or a plain line now and then."""

# ruff: noqa: ANN401 (Lightning passes anything on)
from __future__ import annotations

import math
import shutil
import sys
import time
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import TQDMProgressBar
from lightning.pytorch.callbacks.progress.tqdm_progress import Tqdm, convert_inf

from lit_distill.data.batch import Batch

REDRAWN_EVERY = 0.2
"""Seconds: reading the loss from a GPU waits for it, so the bar does not read every step's."""


class StepProgressBar(TQDMProgressBar):
    """Shows optimizer steps, loss, gap closed, images per second and time left of the whole run.

    In a terminal it is a bar on the standard error stream, at most 80 columns wide. A resumed run
    starts at its step. Time left counts validations at their average share so far. Elsewhere, in
    the log file of a job for example, it prints a plain line after the first step, after every
    validation, and once a minute.

    Args:
        seconds_between_lines: Least time between two plain lines that no validation calls for.
    """

    BAR_FORMAT = "{desc} {n_fmt}/{total_fmt} |{bar}| {remaining} left{postfix}"
    TRAINING_FORMAT = "{desc} |{bar}| {remaining} left"

    def __init__(self, seconds_between_lines: float = 60.0) -> None:
        super().__init__()
        self.seconds_between_lines = seconds_between_lines
        self.on_terminal = sys.stderr.isatty()
        self._images = 0
        self._validating = 0.0  # seconds
        self._validation_started = 0.0
        self._training_started = 0.0
        self._first_step = 0
        self._drawn = -math.inf
        self._printed = -math.inf

    # The bars, as Lightning's class asks for them

    def _bar(self, desc: str, **options: Any) -> Tqdm:
        options = {"bar_format": self.BAR_FORMAT, "leave": False, "smoothing": 0, **options}
        columns = min(shutil.get_terminal_size().columns, 80) - 1
        disabled = self.is_disabled or not self.on_terminal
        return Tqdm(desc=desc, file=sys.stderr, ncols=columns, disable=disabled, **options)

    def init_sanity_tqdm(self) -> Tqdm:
        """Return the bar of the validation before the first step."""
        return self._bar("validating")

    def init_train_tqdm(self) -> Tqdm:
        """Return the bar of the whole run."""
        step, total = self.trainer.global_step, convert_inf(self.trainer.estimated_stepping_batches)
        options = {"initial": step, "total": total, "bar_format": self.TRAINING_FORMAT}
        return self._bar(f"step {step}/{total or '?'}", leave=True, **options)

    def init_validation_tqdm(self) -> Tqdm:
        """Return the bar of a validation, below that of the run if there is one."""
        return self._bar("validating", position=int(self.trainer.state.fn != "validate"))

    def init_test_tqdm(self) -> Tqdm:
        """Return the bar of a test."""
        return self._bar("testing")

    def init_predict_tqdm(self) -> Tqdm:
        """Return the bar of a prediction."""
        return self._bar("generating")

    # Training

    def on_train_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Start the bar at the step of the run."""
        self._images, self._validating = 0, 0.0
        self._first_step = trainer.global_step
        self._training_started = time.monotonic()
        super().on_train_start(trainer, *_)

    def on_train_epoch_start(self, trainer: pl.Trainer, *_: Any) -> None:
        """Let the bar go on: it is the run's, not the epoch's."""

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Show the step that has ended, if a batch has ended one."""
        self._images += len(batch["row"]) * trainer.world_size
        steps = trainer.global_step
        if self.is_disabled or trainer.fit_loop._should_accumulate():
            return
        now = time.monotonic()
        if self.on_terminal:
            if now - self._drawn >= REDRAWN_EVERY or steps == self.train_progress_bar.total:
                self._drawn = now
                self._draw()
        elif steps == self._first_step + 1 or now - self._printed >= self.seconds_between_lines:
            self._print(self._text(with_time_left=True))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Let the bar go on."""

    def on_train_end(self, *_: Any) -> None:
        """Leave the bar as the run has ended."""
        if self.is_enabled and self.on_terminal:
            self._draw()
        super().on_train_end()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """End the line of the bar: what comes next is about the exception."""
        bars = (self._train_progress_bar, self._val_progress_bar)
        for bar in (*bars, self._test_progress_bar, self._predict_progress_bar):
            if bar is not None:
                bar.close()

    def _draw(self) -> None:
        bar = self.train_progress_bar
        bar.n = self.trainer.global_step
        bar.set_description_str(self._text(), refresh=False)
        bar.refresh()

    def _text(self, with_time_left: bool = False) -> str:
        """Return what is known of the run, shortest first to be cut off."""
        steps = self.trainer.global_step
        total = convert_inf(self.trainer.estimated_stepping_batches)
        metrics = self.trainer.progress_bar_metrics
        parts = [f"step {steps}/{total or '?'}"]
        if "train_loss" in metrics:
            parts.append(f"loss {float(metrics['train_loss']):.3g}")
        if math.isfinite(gap := float(metrics.get("val_gap_closed", math.nan))):
            parts.append(f"gap closed {gap:.3f}")
        elapsed = time.monotonic() - self._training_started
        if self._images and elapsed > self._validating:
            parts.append(f"{self._images / (elapsed - self._validating):.3g} images/s")
        if with_time_left and total is not None and steps > self._first_step:
            seconds = elapsed / (steps - self._first_step) * (total - steps)
            parts.append(f"{Tqdm.format_interval(seconds)} left")
        return "  ".join(parts)

    # Validation, test, prediction

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start the clock of validation."""
        self._validation_started = time.monotonic()
        super().on_validation_start(trainer, pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Show the new gap."""
        self.val_progress_bar.close()
        self.reset_dataloader_idx_tracker()
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        self._validating += time.monotonic() - self._validation_started
        if self.on_terminal and self.is_enabled:
            self._draw()
        elif self.is_enabled:
            self._print(self._text(with_time_left=True))

    def on_validation_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Start at the first batch of the rows."""
        if self.has_dataloader_changed(dataloader_idx):
            total = self.total_val_batches_current_dataloader
            self.val_progress_bar.reset(convert_inf(total))

    def on_test_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Start at the first batch of the rows."""
        if self.has_dataloader_changed(dataloader_idx):
            total = self.total_test_batches_current_dataloader
            self.test_progress_bar.reset(convert_inf(total))

    def on_predict_batch_start(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Start at the first batch of the rows."""
        if self.has_dataloader_changed(dataloader_idx):
            total = self.total_predict_batches_current_dataloader
            self.predict_progress_bar.reset(convert_inf(total))

    def on_validation_batch_end(self, *arguments: Any, **options: Any) -> None:
        """Show the batch."""
        super().on_validation_batch_end(*arguments, **options)
        self._print_if_due("validating", arguments[4], self.total_val_batches_current_dataloader)

    def on_test_batch_end(self, *arguments: Any, **options: Any) -> None:
        """Show the batch."""
        super().on_test_batch_end(*arguments, **options)
        self._print_if_due("testing", arguments[4], self.total_test_batches_current_dataloader)

    def on_predict_batch_end(self, *arguments: Any, **options: Any) -> None:
        """Show the batch."""
        super().on_predict_batch_end(*arguments, **options)
        total = self.total_predict_batches_current_dataloader
        self._print_if_due("generating", arguments[4], total)

    # Plain lines

    def _print_if_due(self, what: str, index: int, total: float) -> None:
        if self._printed == -math.inf:
            self._printed = time.monotonic()  # the first line comes after a minute
        if time.monotonic() - self._printed >= self.seconds_between_lines:
            self._print(f"{what} {index + 1}/{convert_inf(total) or '?'}")

    def _print(self, text: str) -> None:
        if self.is_enabled and not self.on_terminal:
            self._printed = time.monotonic()
            print(text, file=sys.stderr, flush=True)
