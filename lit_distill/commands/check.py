"""`lit-distill check`: reads every file of a data set, and verifies seeds."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from lit_distill.commands.next_step import print_fit
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.data.dataset_check import check_data, summary
from lit_distill.data.filesystem import parent
from lit_distill.data.table_io import MetadataError
from lit_distill.teacher.provenance import read_provenance
from lit_distill.teacher.seed_check import check_pairing
from lit_distill.training.direct_distill import DirectDistill


def check(
    trainer: pl.Trainer,
    model: DirectDistill,
    datamodule: DistillDataModule,
    configs: Sequence[str] = (),
    *,
    pairing: int = 0,
) -> None:
    """Check a data set: the tables, every image and all latents in full.

    No model is needed, except for --pairing, which generates some pairs again: with the teacher
    that provenance.json beside the table records, or else with the model's settings. A match
    proves the seed. It proves the teacher's number of steps only where that is stated.

    Args:
        trainer: The device.
        model: With --pairing: the pipeline, teacher_num_inference_steps, teacher_cfg_scale and
            call_kwargs where none is recorded. A pipeline named here takes precedence over the
            recorded one.
        datamodule: metadata_path, val_metadata_path, and the limits of their rows.
        configs: Configuration files that were given.
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
            device = trainer.strategy.root_device
            pairs, steps = check_pairing(path, table, model, device, pairing)
            print(pairs.drop(columns="alike").to_string(index=False))
            print(f"seeds: {pairs['alike'].sum()} of {len(pairs)} rows are as their seeds generate")
            if steps:
                print(f"teacher's steps: {steps}")
            passed &= bool(pairs["alike"].all())
    if not passed:
        raise SystemExit(1)
    recorded = read_provenance(parent(paths[0])) or {}
    named = model.hparams["pretrained_model_name_or_path"] or recorded.get("model")
    print_fit(paths[0], named, configs)
