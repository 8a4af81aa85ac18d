import lightning.pytorch as pl
import pandas as pd
import pytest
import torch

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.adapters.inject import trained_parameters
from lit_distill.cli import main
from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.preflight.report import PreflightError
from lit_distill.training import preflight_once
from lit_distill.training.autoconfigure import quantization_error
from lit_distill.training.preflight_once import run_preflight

CALL = {"prompt": "a red seven on a blue background", "num_inference_steps": 4}
CALL |= {"height": 32, "width": 32}


def loaded(**options):
    options = {"torch_dtype": "float32", "lora": {"r": 4}} | options
    model = DirectDistill("tiny-digits", preflight=False, **options)
    model.configure_model()
    return model


def trainer(**options):
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
    return pl.Trainer(**quiet, enable_model_summary=False, **options)


@pytest.mark.parametrize(
    ("scheduler", "steps", "warnings"),
    [(None, 2, 1), ({"shift_terminal": None}, 2, 0), (None, 4, 0)],  # 4: the published recipe
)
def test_a_last_of_few_steps_with_nothing_to_do_is_warned_of_once_the_prompt_is_encoded(
    scheduler, steps, warnings, pairs, tmp_path, monkeypatch, recwarn
):
    """A text encoder must not run on the host before preflight has placed it."""
    placed = []
    place = preflight_once.place
    monkeypatch.setattr(preflight_once, "place", lambda *args: (placed.append(True), place(*args)))
    original = EncodeOnce.encode

    def encode(*args):
        assert placed
        return original(*args)

    monkeypatch.setattr(EncodeOnce, "encode", encode)
    model = DirectDistill("tiny-digits", torch_dtype="float32", lora={"r": 4}, scheduler=scheduler)
    table = pd.read_csv(pairs / "train/metadata.csv").assign(num_inference_steps=steps)
    table.to_csv(tmp_path / "metadata.csv", index=False)
    data = DistillDataModule(
        str(tmp_path / "metadata.csv"), base_path=str(pairs / "train"), batch_size=8
    )
    trainer(max_steps=1, default_root_dir=tmp_path).fit(model, datamodule=data)
    warned = [str(w.message) for w in recwarn if "last of the student's" in str(w.message)]
    assert len(warned) == warnings
    assert all("begins at sigma 0.02" in message for message in warned)


@pytest.mark.parametrize(
    ("scheduler", "grad_steps", "verdict"),
    [
        (None, 1, "failed"),  # the last of the published steps is tiny
        (None, 2, "ok"),
        ({"shift_terminal": None}, 1, "ok"),
    ],
)
def test_last_steps_that_make_nothing_of_the_image_are_refused(scheduler, grad_steps, verdict):
    model = loaded(scheduler=scheduler, grad_steps=grad_steps)
    finding = run_preflight(model.student, trainer(), **CALL).findings[-1]
    assert finding.check == "the steps with a gradient make enough of the image"
    assert finding.verdict == verdict
    assert finding.observed.startswith(f"the last {grad_steps} of 4 make ")
    assert ("model.grad_steps: 2" in finding.remedy) == (verdict == "failed")


def test_fit_refuses_a_last_step_that_makes_nothing_of_the_image(pairs, tmp_path):
    model = DirectDistill("tiny-digits", torch_dtype="float32", lora={"r": 4}, grad_steps=1)
    data = DistillDataModule(str(pairs / "train/metadata.csv"), batch_size=2)
    with pytest.raises(PreflightError, match=r"last 1 of 4 make 2% .*\n?.*model.grad_steps: 2"):
        trainer(max_steps=1, default_root_dir=tmp_path).fit(model, data)


def test_what_quantised_weights_do_to_the_gradient_is_measured():
    model = loaded()
    finding = quantization_error(model.student, trainer(), **CALL)
    assert finding.observed == "it differs by 0.0% of its norm"

    def gradient():
        weights = trained_parameters(model.pipe).values()
        with torch.enable_grad():
            latents = model.student.rollout(
                {
                    "prompt": [CALL["prompt"]],
                    "seed": [0],
                    "rand_device": "cpu",
                    "size": (32, 32),
                    "call": {},
                    "row": [0],
                    "num_inference_steps": 4,
                    "cfg_scale": 1.0,
                }
            )
            known = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
            found = torch.autograd.grad((latents * known).sum(), list(weights), allow_unused=True)
        return torch.cat([each.flatten() for each in found if each is not None])

    expected = gradient()
    torch.manual_seed(0)
    for parameter in model.pipe.transformer.parameters():
        if not parameter.requires_grad:
            parameter.data *= 1 + 0.02 * torch.randn_like(parameter)  # as if in fewer bits
    apart = ((gradient() - expected).norm() / expected.norm()).item()
    finding = quantization_error(model.student, trainer(), **CALL)
    assert apart > 0.01
    assert finding.observed == f"it differs by {apart:.1%} of its norm"


def test_preflight_prints_what_int8_does_to_the_gradient(capsys):
    pytest.importorskip("torchao")
    tiny = ["--model.pretrained_model_name_or_path", "tiny-digits", "--trainer.accelerator", "cpu"]
    tiny += ["--trainer.logger", "false", "--model.lora", "{r: 4}", "--height", "32"]
    tiny += ["--model.quantization.quant_backend", "torchao"]
    tiny += ["--model.quantization.quant_kwargs", "{quant_type: Int8WeightOnlyConfig}"]
    main(["preflight", *tiny, "--width", "32"])
    printed = " ".join(capsys.readouterr().out.split())
    finding = printed.partition("not quantised")[2]
    share = float(finding.partition("differs by ")[2].partition("%")[0])
    assert 0 < share < 10
