"""`lit-distill fit`: trains a student."""

from __future__ import annotations

import sys
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from tqdm.auto import tqdm

from lit_distill.commands.next_step import print_next
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.training.direct_distill import DirectDistill

CONFIG_FILE = "config.yaml"


def fit(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None = None,
    *,
    ckpt_path: str | None = None,
    weights_only: bool | None = None,
) -> None:
    """Train a student on the teacher's pairs, with validation, checkpoints and exact resume.

    Args:
        trainer: Runs the training.
        model: The pipeline, and what is trained of it.
        datamodule: The pairs.
        ckpt_path: Checkpoint (.ckpt) of a run to resume.
        weights_only: Passed on to torch.load.
    """
    pl.Trainer.fit(trainer, model, None, None, datamodule, ckpt_path, weights_only)
    if not trainer.is_global_zero:
        return
    steps = f"{trainer.global_step} steps"
    gap = trainer.callback_metrics.get("val_gap_closed")
    print(steps if gap is None else f"{steps}, gap closed {float(gap):.3f}")
    saved = checkpoints(trainer)
    for path in saved:
        print(f"checkpoint: {path}")
    config = Path(trainer.log_dir or trainer.default_root_dir) / CONFIG_FILE
    if not saved:
        print("No checkpoint was saved: trainer.callbacks has no ModelCheckpoint.")
    elif config.is_file() and (datamodule is None or getattr(datamodule, "val_set", None)):
        report = config.parent / "report"
        print_next("test", "--config", config, "--ckpt_path", saved[0], "--out", report)
    else:
        print_next("export", "--ckpt_path", saved[0], "--out", config.parent / "student")


def checkpoints(trainer: pl.Trainer) -> list[str]:
    """Return the checkpoints that a run has left, the best first."""
    callbacks = [c for c in trainer.checkpoint_callbacks if isinstance(c, ModelCheckpoint)]
    callbacks.sort(key=lambda callback: callback.monitor is None)
    paths = [callback.best_model_path for callback in callbacks]
    paths += [callback.last_model_path for callback in callbacks]
    return list(dict.fromkeys(path for path in paths if path))


class SaveFitConfig(SaveConfigCallback):
    """Saves the configuration of a training in its folder; other commands leave no file behind."""

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Save it, if this is a training."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class TrainingSize(Callback):
    """Prints at the start what is trained, and on how much."""

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Print it."""
        assert isinstance(pl_module, DirectDistill)
        trained = sum(p.numel() for p in pl_module.parameters() if p.requires_grad)
        total = sum(p.numel() for p in pl_module.parameters())
        rows = f"{trained:,} of {total:,} parameters"
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, DistillDataModule) and data.train_set is not None:
            held_out = len(data.val_set) if data.val_set is not None else 0
            rows += f" on {len(data.train_set)} pairs, {held_out} held out"
        if trainer.is_global_zero:
            tqdm.write(f"training {rows}", file=sys.stderr)  # above the progress bar
