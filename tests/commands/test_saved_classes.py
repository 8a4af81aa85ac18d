"""A checkpoint may come from anywhere: no class that it names is imported, unless the user has."""

import contextlib

import pytest
import torch
from conftest import TINY
from short_training import fit, module

from lit_distill import DirectDistill
from lit_distill.cli import build_cli
from lit_distill.errors import InputError

CODE = """
from pathlib import Path
Path(__file__).with_suffix(".ran").touch()
import lit_distill
import torchmetrics
class Model(lit_distill.DirectDistill): pass
class Score(torchmetrics.image.PeakSignalNoiseRatio): pass
"""


@pytest.fixture(scope="module")
def content(pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("saved")
    fit(module(), pairs, path, enable_checkpointing=False).save_checkpoint(path / "saved.ckpt")
    return torch.load(path / "saved.ckpt", weights_only=True)


@pytest.fixture
def predict(tmp_path, monkeypatch):
    """Runs ``lit-distill predict`` in a folder with a module that must not be imported."""
    (tmp_path / "foreign.py").write_text(CODE)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "prompts.txt").write_text("a red seven\n")

    def run(content, *options):
        torch.save(content, tmp_path / "theirs.ckpt")
        with contextlib.chdir(tmp_path):
            return build_cli(
                ["predict", "--ckpt_path", "theirs.ckpt", "--prompts", "prompts.txt"]
                + ["--trainer.accelerator", "cpu", "--trainer.logger", "false", *options]
            )

    return run


METRICS = {"score": {"class_path": "foreign.Score", "init_args": {"data_range": 1.0}}}
NESTED = {"score": {"class_path": "torchmetrics.MinMaxMetric"}}
NESTED["score"]["init_args"] = {"base_metric": METRICS["score"]}


@pytest.mark.parametrize(
    "settings",
    [
        {"_class_path": "foreign.Model"},
        {"metrics": METRICS},
        {"metrics": NESTED},
        {"call_kwargs": {"anything": [{"class_path": "foreign.Model"}]}},
        {"optimizer": {"class_path": "foreign.Model"}},
        {"_instantiator": "foreign.Model"},
        {"loss": {"class_path": "foreign.Model"}},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_a_class_that_a_checkpoint_names_is_not_imported(settings, content, predict, tmp_path):
    refused = {"_class_path", "metrics"} & set(settings)  # what constructors would import
    hyper = content["hyper_parameters"] | settings
    message = r"theirs\.ckpt (names the class|is of the class) foreign"
    by_command = pytest.raises(InputError, match=message)
    with by_command if refused or "call_kwargs" in settings else contextlib.nullcontext():
        predict(content | {"hyper_parameters": hyper})
    with pytest.raises(InputError, match="foreign") if refused else contextlib.nullcontext():
        DirectDistill.load_from_checkpoint(tmp_path / "theirs.ckpt")
    assert not (tmp_path / "foreign.ran").exists()


def test_a_class_that_the_user_names_is(content, predict, tmp_path):
    hyper = content["hyper_parameters"] | {"_class_path": "foreign.Model"}
    cli = predict(content | {"hyper_parameters": hyper}, "--model", "foreign.Model")
    assert (tmp_path / "foreign.ran").exists()
    assert type(cli.model).__name__ == "Model"
    assert cli.model.settings.lora == {"r": 4}
    assert type(DirectDistill.load_from_checkpoint(tmp_path / "theirs.ckpt")) is type(cli.model)


def test_metrics_of_trusted_packages_are_made_again(content, tmp_path):
    psnr = {"class_path": "torchmetrics.image.PeakSignalNoiseRatio"}
    psnr["init_args"] = {"data_range": 1.0}
    metrics = {"psnr": psnr, "sharp": {"class_path": "lit_distill.Sharpness"}}
    hyper = content["hyper_parameters"] | {"metrics": metrics}
    torch.save(content | {"hyper_parameters": hyper}, tmp_path / "saved.ckpt")
    model = DirectDistill.load_from_checkpoint(tmp_path / "saved.ckpt")
    assert {"psnr", "sharp"} <= set(model.validator.evaluation.describe())
    hyper["metrics"] = {"psnr": {"class_path": "torchmetrics.utilities.checks.is_overridden"}}
    torch.save(content | {"hyper_parameters": hyper}, tmp_path / "saved.ckpt")
    with pytest.raises(InputError, match="is not a metric"):
        DirectDistill.load_from_checkpoint(tmp_path / "saved.ckpt")


@pytest.mark.parametrize("command", ["test", "predict", "validate"])
def test_an_empty_checkpoint_is_refused_by_its_name(command, tmp_path):
    (tmp_path / "empty.ckpt").touch()
    with pytest.raises(InputError, match=r"empty\.ckpt is empty"):
        build_cli(
            [command, "--ckpt_path", str(tmp_path / "empty.ckpt")]
            + ["--model.pretrained_model_name_or_path", str(TINY)]
        )
