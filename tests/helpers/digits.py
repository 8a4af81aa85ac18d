"""Students of the embedded pipeline, their data, and a short training."""

import lightning.pytorch as pl
import torch

from lit_distill import DirectDistill, DistillDataModule

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}


QUIET |= {"enable_model_summary": False, "use_distributed_sampler": False}


def module(**options):
    options = {"lora": {"r": 4}, "checkpointing": "none", "torch_dtype": "float32"} | options
    return DirectDistill(
        "tiny-digits",
        optimizer=lambda params: torch.optim.AdamW(params, lr=5e-4, weight_decay=0.0),
        **options,
    )


def data(pairs, **options):
    return DistillDataModule(
        str(pairs / "train/metadata.csv"), str(pairs / "heldout/metadata.csv"), **options
    )


def fit(pairs, path, max_steps, ckpt_path=None, **options):
    torch.manual_seed(0)
    model = module(**options)
    trainer = pl.Trainer(max_steps=max_steps, default_root_dir=path, **QUIET)
    trainer.fit(model, datamodule=data(pairs, batch_size=8), ckpt_path=ckpt_path)
    return model, trainer


def heldout(pairs):
    loaded = data(pairs, batch_size=4)
    loaded.setup("validate")
    return next(iter(loaded.val_dataloader()))
