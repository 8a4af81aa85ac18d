"""`checkpointing: auto` chooses by the plan of the step that will be trained."""

import re

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from tiny_pipelines import CALL_KWARGS, build

from lit_distill import DirectDistill, DistillDataModule, load_pipeline, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.compute.fused_lora import use_fused_lora
from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.pipelines.components import denoisers
from lit_distill.planning import auto_checkpointing
from lit_distill.planning.auto_checkpointing import choose_checkpointing
from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.cards import GIB, MARGIN
from lit_distill.planning.counter import Counter
from lit_distill.planning.fake_step import Example, UnplannableError
from lit_distill.planning.planner import MODES, Planner
from lit_distill.planning.settings import TrainingSettings
from lit_distill.preflight.probe import trial_arguments
from lit_distill.training import autoconfigure

CPU = torch.device("cpu")
PROMPT = "a red seven on a blue background"


def loaded(pipe, call, **settings):
    """The planner of a loaded pipeline, and the pipeline made trainable."""
    make_trainable(pipe, {"r": 4})
    for denoiser in denoisers(pipe).values():
        use_fused_lora(denoiser)
    EncodeOnce(pipe)
    plain = {"torch_dtype": "float32", "lora": {"r": 4}, "num_inference_steps": 2}
    chosen = TrainingSettings(**plain | settings)
    example = Example(pipe, PROMPT, call)
    return Planner(Blueprint.of(pipe), chosen, device="cpu", example=example)


@pytest.mark.parametrize("name", ["QwenImageEdit", "Kandinsky5"])
def test_a_loaded_pipeline_is_planned_with_its_own_prompts_and_pictures(name):
    pipe, call = build(name), dict(CALL_KWARGS[name])
    planner = loaded(pipe, call)
    planned = planner.step("block")

    def step():
        arguments = trial_arguments([PROMPT], num_inference_steps=2, **call)
        latents = rollout(pipe, checkpointing="block", **arguments)
        (latents.float() - torch.zeros(latents.shape)).square().mean().backward()
        for denoiser in denoisers(pipe).values():
            denoiser.zero_grad()

    step()  # encodes, and counts the blocks
    with Counter() as counter:
        step()
    assert planned.activation_peak == pytest.approx(counter.peak, rel=0.02)
    assert planned.flops == counter.flops


def test_a_pipeline_whose_shapes_depend_on_values_gets_the_mode_that_needs_least():
    name = "HiDreamImage"
    planner = loaded(build(name), dict(CALL_KWARGS[name]))
    with pytest.raises(UnplannableError, match=r"can't be planned without weights.*bincount"):
        planner.memory("none")
    choice = choose_checkpointing(planner, CPU, MODES)
    assert choice.mode == "nested" and not choice.fits and "bincount" in choice.reason


def test_auto_chooses_the_fastest_that_fits_and_reports_why(monkeypatch):
    pipe = load_pipeline("tiny-digits", torch_dtype="float32")
    planner = loaded(pipe, {"height": 64, "width": 64})

    def choose(free, modes=MODES):
        monkeypatch.setattr(auto_checkpointing, "free_bytes", lambda device: free)
        return choose_checkpointing(planner, CPU, modes)

    everything = choose(10 * GIB)
    assert everything.mode == "none" and everything.fits
    assert re.fullmatch(r"GiB needed: none [\d.e-]+; free on cpu: 10, less 8%", everything.reason)
    nothing = choose(0)
    assert not nothing.fits
    found = dict(re.findall(r"(\w+) ([\d.e-]+)[,;]", nothing.reason))
    assert list(found) == list(MODES)
    sizes = {mode: float(size) * GIB for mode, size in found.items()}
    assert nothing.mode == min(sizes, key=sizes.get)
    for mode in ("selective", "block"):
        fits = choose(1.01 * sizes[mode] / (1 - MARGIN))
        assert fits.mode == mode and fits.fits
    # What preflight finds wrong is not chosen.
    assert choose(10 * GIB, modes=("step", "block")).mode == "block"


def test_auto_is_decided_before_training_and_saved(pairs, tmp_path, monkeypatch, caplog):
    logged = []
    monkeypatch.setattr(autoconfigure, "rank_zero_info", logged.append)
    model = DirectDistill(
        "tiny-digits", torch_dtype="float32", lora={"r": 4}, checkpointing="auto", preflight=False
    )
    trainer = pl.Trainer(
        accelerator="cpu", max_steps=1, default_root_dir=tmp_path, logger=CSVLogger(tmp_path)
    )
    trainer.fit(model, DistillDataModule(str(pairs / "train/metadata.csv"), batch_size=2))
    assert model.hparams["checkpointing"] == "none"
    assert logged[0].startswith("model.checkpointing: auto chooses none; GiB needed: none ")
    checkpoint = torch.load(next(tmp_path.rglob("*.ckpt")), weights_only=True)
    assert checkpoint["hyper_parameters"]["checkpointing"] == "none"


def test_auto_without_training_data_is_refused():
    model = DirectDistill("tiny-digits", checkpointing="auto")
    with pytest.raises(ValueError, match="auto is resolved when training with DistillDataModule"):
        rollout(
            load_pipeline("tiny-digits"),
            prompt=["a"],
            num_inference_steps=2,
            generator=[torch.Generator()],
            checkpointing=model.hparams["checkpointing"],
        )
    with pytest.raises(ValueError, match="does not support offloading"):
        DirectDistill("tiny-digits", checkpointing="auto", offload_activations=True)
    with pytest.raises(ValueError, match="and checkpointing nested stores none"):
        DirectDistill("tiny-digits", checkpointing="nested", offload_activations=True)
