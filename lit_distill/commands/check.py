"""`lit-distill check`: reads every file of a data set, and verifies seeds."""

from __future__ import annotations

import lightning.pytorch as pl

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.data.dataset_check import check_data, summary
from lit_distill.data.table_io import MetadataError
from lit_distill.teacher.seed_check import check_pairing
from lit_distill.training.direct_distill import DirectDistill


def check(
    trainer: pl.Trainer,
    model: DirectDistill,
    datamodule: DistillDataModule,
    *,
    pairing: int = 0,
) -> None:
    """Check a data set: the tables, every image and all latents in full.

    No model is needed, except for --pairing, which generates some pairs again: with the teacher
    that provenance.json beside the table records, or else with the model's settings.

    Args:
        trainer: The device.
        model: With --pairing: the pipeline, teacher_num_inference_steps, teacher_cfg_scale and
            call_kwargs where none is recorded. A pipeline named here takes precedence over the
            recorded one.
        datamodule: metadata_path, val_metadata_path, and the limits of their rows.
        pairing: Number of rows of each table to generate again.
    """
    paths = [p for p in (datamodule.metadata_path, datamodule.val_metadata_path) if p]
    if not paths:
        raise SystemExit("data.metadata_path is not set: the table to check")
    passed = True
    for path in paths:
        try:
            table = check_data(
                path, datamodule.base_path, datamodule.call_columns, **datamodule.read_options()
            )
        except (OSError, MetadataError) as error:
            print(error)
            passed = False
            continue
        print(f"{path}: {len(table)} rows, no problem\n{summary(table)}")
        if pairing:
            pairs = check_pairing(path, table, model, trainer.strategy.root_device, pairing)
            print(pairs.drop(columns="alike").to_string(index=False))
            passed &= bool(pairs["alike"].all())
    if not passed:
        raise SystemExit(1)
