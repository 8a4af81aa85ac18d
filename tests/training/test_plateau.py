"""A learning rate that falls when a metric of the held-out rows no longer improves."""

import json

import lightning.pytorch as pl
import pytest
import torch
from conftest import ROOT
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import ReduceLROnPlateau
from short_training import module
from two_processes import QUIET, difference, weights_of

from lit_distill import DistillDataModule
from lit_distill.cli import build_cli
from lit_distill.errors import InputError


def fit(pairs, out, schedule, ckpt_path=None, max_epochs=4):
    torch.manual_seed(0)
    model = module(lr_scheduler=schedule, metrics={}, preflight=False)
    table = str(pairs / "heldout/metadata.csv")
    saver = ModelCheckpoint(out, filename="last", enable_version_counter=False)
    options = QUIET | {"max_epochs": max_epochs, "callbacks": [saver], "default_root_dir": out}
    trainer = pl.Trainer(check_val_every_n_epoch=2, num_sanity_val_steps=0, **options)
    trainer.fit(
        model, datamodule=DistillDataModule(table, table, batch_size=4), ckpt_path=ckpt_path
    )
    return weights_of(model), trainer.optimizers[0].param_groups[0]["lr"]


def stricter(monitor="val_gap_closed"):
    """Halves the rate at every validation but the first, since the metric has to fall by 100."""
    options = {"factor": 0.5, "patience": 0, "threshold": 100, "threshold_mode": "abs"}
    return lambda optimizer: ReduceLROnPlateau(optimizer, monitor=monitor, mode="min", **options)


def test_the_rate_is_reduced_after_validations_and_resumed(pairs, tmp_path):
    weights, rate = fit(pairs, tmp_path / "whole", stricter())
    assert rate == pytest.approx(5e-4)  # of two validations, the second
    fit(pairs, tmp_path, stricter(), max_epochs=2)
    resumed, rate = fit(pairs, tmp_path, stricter(), tmp_path / "last.ckpt")
    assert rate == pytest.approx(5e-4)
    assert difference(resumed, weights) == 0


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (torch.optim.lr_scheduler.ReduceLROnPlateau, "ReduceLROnPlateau names no metric; use"),
        (stricter("val_los"), r"there is no metric 'val_los'; those of the held-out .*val_loss"),
    ],
)
def test_a_metric_that_is_missing_is_named(schedule, message, pairs, tmp_path):
    with pytest.raises(InputError, match=message):
        fit(pairs, tmp_path, schedule)


def test_it_is_set_by_a_configuration(pairs, tmp_path):
    settings = {"class_path": "lightning.pytorch.cli.ReduceLROnPlateau"}
    settings["init_args"] = {"monitor": "val_loss", "patience": 7}
    table = str(pairs / "heldout/metadata.csv")
    cli = build_cli(
        ["fit", "--config", str(ROOT / "configs/tiny_lora.yaml"), "--data.metadata_path", table]
        + ["--data.val_metadata_path", table, "--trainer.max_steps", "1"]
        + ["--trainer.default_root_dir", str(tmp_path), "--trainer.limit_val_batches", "1"]
        + ["--model.metrics", "{}", "--model.lr_scheduler", json.dumps(settings)]
    )
    scheduler = cli.trainer.lr_scheduler_configs[0].scheduler
    assert (scheduler.monitor, scheduler.patience) == ("val_loss", 7)
