"""`lit-distill validate`: the metrics of held-out rows, without a report."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lit_distill.commands.next_step import print_next


def validate(
    trainer: pl.Trainer,
    model: pl.LightningModule,
    datamodule: pl.LightningDataModule | None = None,
    *,
    ckpt_path: str | None = None,
    verbose: bool = True,
    weights_only: bool | None = None,
) -> Any:  # noqa: ANN401
    """Print the metrics of held-out rows; writes nothing.

    Args:
        trainer: Runs the validation loop.
        model: The pipeline, unless a checkpoint names it.
        datamodule: The held-out rows.
        ckpt_path: Checkpoint (.ckpt) of the student.
        verbose: Whether to print the metrics.
        weights_only: Passed on to torch.load.
    """
    values = pl.Trainer.validate(trainer, model, None, ckpt_path, False, datamodule, weights_only)
    if trainer.is_global_zero:
        found = {name: value for each in values for name, value in each.items()}
        for name in sorted(found) if verbose else ():
            print(f"{name:32} {found[name]:.4g}")
        if ckpt_path is not None:
            print_next("export", "--ckpt_path", ckpt_path, "--out", "student")
    return values
