import inspect
from dataclasses import FrozenInstanceError, fields, replace

import pytest
import torch
from short_training import fit, module

from lit_distill import DirectDistill
from lit_distill.training.settings import Settings


def test_settings_are_frozen_and_a_changed_copy_is_validated():
    settings = module().settings
    with pytest.raises(FrozenInstanceError):
        settings.checkpointing = "step"
    changed = replace(settings, checkpointing="step")
    assert (settings.checkpointing, changed.checkpointing) == ("none", "step")
    with pytest.raises(ValueError, match="rollout_batch_size must be >= 1, got 0"):
        replace(settings, rollout_batch_size=0)


def test_settings_are_the_arguments_that_are_hyperparameters():
    components = {"self", "loss", "objective", "optimizer", "lr_scheduler", "metrics"}
    arguments = set(inspect.signature(DirectDistill.__init__).parameters)
    assert {field.name for field in fields(Settings)} == arguments - components
    assert set(module().hparams) == arguments - components - {"init_lora"} | {"metrics"}


def test_a_checkpoint_holds_the_settings_in_effect(pairs, tmp_path):
    """Preflight decides freeze and checkpointing here."""
    model = module(checkpointing="auto")
    trainer = fit(model, pairs, tmp_path)
    assert model.settings.checkpointing == "none"
    assert model.settings.freeze  # the unused text branch of the last block
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    saved = torch.load(tmp_path / "student.ckpt", weights_only=True)["hyper_parameters"]
    assert saved == model.settings.hyperparameters() | {"metrics": None}
    again = DirectDistill.load_from_checkpoint(tmp_path / "student.ckpt", map_location="cpu")
    assert again.settings == model.settings


def test_the_lora_to_start_from_decides_the_settings(exports, folder):
    out, styled = exports
    model = DirectDistill(str(folder("QwenImage")), init_lora=str(out / "diffusers"))
    given = model.settings
    assert given.lora is None and model.hparams["lora"] is None
    model.configure_model()
    assert given.lora is None  # a copy has changed
    assert model.settings.lora["r"] == styled.settings.lora["r"]
    assert model.hparams["lora"] == model.settings.lora
    assert "init_lora" not in model.hparams
