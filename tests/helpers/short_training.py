"""Short trainings of the embedded pipeline, with every option of a run."""

import lightning.pytorch as pl
import torch
from two_processes import QUIET

from lit_distill import DirectDistill, DistillDataModule


def adamw(**options):
    options = {"lr": 1e-3} | options
    return lambda params: torch.optim.AdamW(params, **options)


def module(**options):
    defaults = {"lora": {"r": 4}, "checkpointing": "none", "torch_dtype": "float32"}
    return DirectDistill("tiny-digits", **{**defaults, "optimizer": adamw(), **options})


def data(pairs, **options):
    options = {"batch_size": 4} | options
    return DistillDataModule(str(pairs / "train/metadata.csv"), **options)


def fit(model, pairs, path, ckpt_path=None, batch_size=4, **options):
    options = QUIET | {"default_root_dir": path, "max_steps": 1} | options
    trainer = pl.Trainer(**options)
    trainer.fit(model, datamodule=data(pairs, batch_size=batch_size), ckpt_path=ckpt_path)
    return trainer
