"""Whether a resumed run has what it began with: the data set, and the pretrained weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities import rank_zero_warn

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.data.dataset_digest import changes, dataset_digest
from lit_distill.errors import InputError

BASE_SETTINGS = (
    "pretrained_model_name_or_path",
    "revision",
    "torch_dtype",
    "teacher_lora",
    "quantization",
)
"""Settings that choose the pretrained weights as they are loaded."""


def dataset_digests(trainer: pl.Trainer) -> dict[str, Any]:
    """Return the digests of the training and of the held-out rows, the same on all processes."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DistillDataModule):
        return {}
    digests = {}
    if trainer.is_global_zero:
        rows = {"training": data.train_set, "held-out": data.val_set}
        digests = {n: dataset_digest(each.table) for n, each in rows.items() if each is not None}
    return trainer.strategy.broadcast(digests)


def warn_of_changed_data(saved: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Warn of rows that are not those of the checkpoint; training continues with the new ones.

    Args:
        saved: Digests in the checkpoint; empty if it has none.
        now: Digests of this run's rows.
    """
    for name in sorted(set(saved) & set(now)):
        if changed := changes(saved[name], now[name]):
            rank_zero_warn(
                f"data: the {name} rows are not those of the checkpoint: {'; '.join(changed)}. "
                "Continuing with the rows as they are now, so this is another run than without "
                "the interruption"
            )


def check_base(
    checkpoint: Mapping[str, Any], settings: Mapping[str, Any], base_digest: Mapping[str, str]
) -> None:
    """Check that the pretrained weights are those that a checkpoint was trained from.

    If they were chosen otherwise, there has been a warning of the setting. They may differ then.

    Args:
        checkpoint: Content of the checkpoint.
        settings: Hyperparameters of this run.
        base_digest: Digests of the denoisers that this run has loaded.

    Raises:
        InputError: If the same name or folder holds other weights now, naming the component.
    """
    saved, records = checkpoint["hyper_parameters"], checkpoint.get("lit_distill", {})
    if any(saved.get(name) != settings.get(name) for name in BASE_SETTINGS):
        return
    before: Mapping[str, str] = records.get("base_digest") or {}
    changed = [n for n in sorted(before) if n in base_digest and base_digest[n] != before[n]]
    if changed:
        raise InputError(
            f"the pretrained {', '.join(changed)} of {saved['pretrained_model_name_or_path']} "
            "has changed since the checkpoint was written, and what was trained belongs to the "
            "weights before; restore them (model.revision pins a hub repository), or start a new "
            "run"
        )
