import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import ROOT
from digits import QUIET, data, fit, heldout, module
from PIL import Image
from tiny_pipelines import CALL_KWARGS, build

import lit_distill.adapters.weights
from lit_distill import DirectDistill, DistillDataModule, export_student, load_student
from lit_distill.adapters.inject import adapters_disabled, default_target_modules, make_trainable
from lit_distill.data.batch import NO_TARGET, split_batch
from lit_distill.preflight.checks import preflight
from lit_distill.preflight.report import PreflightError
from lit_distill.training.lr_scheduler import WarmupCosine


@pytest.fixture(scope="module", params=[{"r": 4, "lora_alpha": 8}, None], ids=["lora", "full"])
def trained(request, pairs, tmp_path_factory):
    path = tmp_path_factory.mktemp("run")
    model, trainer = fit(pairs, path, 12, lora=request.param)
    trainer.save_checkpoint(path / "student.ckpt")
    return model, trainer, path / "student.ckpt"


def test_training_closes_part_of_the_gap(trained):
    metrics = trained[1].callback_metrics
    assert metrics["val_latent_mse"] < 0.97 * metrics["val_undistilled_latent_mse"]
    ratio = metrics["val_latent_mse"] / metrics["val_undistilled_latent_mse"]
    assert metrics["val_gap_closed"] == pytest.approx(1 - ratio.item(), abs=1e-6)


def test_a_checkpoint_holds_what_trains_and_no_code(trained):
    model, _, path = trained
    checkpoint = torch.load(path, weights_only=True)
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    assert set(checkpoint["state_dict"]) == trainable
    if model.hparams["lora"]:
        assert all("lora" in name for name in trainable)
    assert not any("text_encoder" in name or "vae" in name for name in trainable)


def test_reloaded_students_generate_the_same(trained, pairs):
    model, _, path = trained
    batch = heldout(pairs)
    expected, images = model.sample(batch)
    reloaded = DirectDistill.load_from_checkpoint(path, map_location="cpu")
    assert torch.equal(reloaded.sample(batch)[0], expected)
    pipe = load_student(path)
    again = pipe(
        batch["prompt"],
        num_inference_steps=4,
        true_cfg_scale=1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in batch["seed"]],
    ).images
    for one, two in zip(images, again, strict=True):
        assert np.abs(np.asarray(one, int) - np.asarray(two, int)).max() <= 1


def test_the_undistilled_pipeline_is_the_base_bit_for_bit(trained, pairs):
    batch = heldout(pairs)
    base = module(lora=None)
    base.configure_model()
    assert torch.equal(trained[0].sample(batch, undistilled=True)[0], base.sample(batch)[0])
    assert not torch.equal(trained[0].sample(batch)[0], base.sample(batch)[0])


def test_an_export_generates_the_same_in_plain_diffusers(trained, pairs, tmp_path):
    """In a fresh Python that imports diffusers only."""
    model, _, path = trained
    batch = heldout(pairs)
    export_student(path, tmp_path / "export")
    lora = model.hparams["lora"] is not None
    source = str(ROOT / "lit_distill/assets/tiny") if lora else str(tmp_path / "export")
    load = f"pipe.load_lora_weights({str(tmp_path / 'export')!r})" if lora else ""
    code = f"""
import torch
from diffusers import DiffusionPipeline
pipe = DiffusionPipeline.from_pretrained({source!r}, dtype=torch.float32)
{load}
pipe({batch["prompt"][0]!r}, num_inference_steps=4, true_cfg_scale=1.0, height=32, width=32,
     generator=torch.Generator().manual_seed({batch["seed"][0]})
).images[0].save({str(tmp_path / "image.png")!r})
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    pipe = load_student(path)
    expected = pipe(
        batch["prompt"][0],
        num_inference_steps=4,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(batch["seed"][0]),
    ).images[0]
    found = np.asarray(Image.open(tmp_path / "image.png"), int)
    assert np.abs(found - np.asarray(expected, int)).max() <= 1
    base = module(lora=None)
    base.configure_model()
    undistilled = np.asarray(base.sample(batch)[1][0], int)
    assert np.abs(found - undistilled).max() > 1


def test_resume_in_the_middle_of_an_epoch_equals_the_uninterrupted_run(pairs, tmp_path):
    whole, _ = fit(pairs, tmp_path, 7)
    _, trainer = fit(pairs, tmp_path, 2)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = fit(pairs, tmp_path, 7, ckpt_path=tmp_path / "half.ckpt")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


def test_own_output_as_target_has_no_loss_and_no_gradient(pairs):
    model = module(lora=None)
    model.configure_model()
    batch = heldout(pairs)
    with torch.no_grad():
        batch["latents"] = model.student_rollout(batch)
    loss = model.compare(model.student_rollout(batch), model.teacher_target(batch), batch).mean()
    loss.backward()
    assert loss == 0
    assert all(p.grad is None or not p.grad.any() for p in model.denoisers.parameters())


def test_targets_come_from_latents_else_image_else_the_online_teacher(pairs):
    model = module(teacher_num_inference_steps=10, teacher_cfg_scale=4.0)
    model.configure_model()
    batch = heldout(pairs)
    with torch.no_grad():
        for name, parameter in model.denoisers.named_parameters():
            if "lora_B" in name:  # a student that differs from its teacher
                parameter.normal_(std=0.1)
    exact = model.teacher_target(batch)
    assert torch.equal(exact, batch["latents"])
    online = model.teacher_target(batch | {"latents": None})
    torch.testing.assert_close(online, exact, rtol=1e-4, atol=1e-4)
    image = model.codec(batch).decode(exact)
    encoded = model.teacher_target(batch | {"latents": None, "image": image})
    expected = model.codec(batch).encode(image)
    assert torch.equal(encoded, expected)
    full = module(lora=None)
    full.configure_model()
    with pytest.raises(ValueError, match="row 2 has neither image nor latents, and full training"):
        full.teacher_target(batch | {"latents": None})


def test_frozen_weights_are_bfloat16_and_trained_ones_float32(pairs, tmp_path):
    model = module(torch_dtype="bfloat16")
    trainer = pl.Trainer(max_steps=2, precision="bf16-mixed", default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, datamodule=data(pairs, batch_size=4))
    for name, parameter in model.denoisers.named_parameters():
        assert parameter.requires_grad <= ("lora" in name)
        assert parameter.dtype == (torch.float32 if "lora" in name else torch.bfloat16)
    assert torch.isfinite(trainer.callback_metrics["train_loss"])


def test_dropout_of_adapters_is_on_in_training_only(pairs, tmp_path):
    model = module(lora={"r": 4, "lora_dropout": 0.1})
    model.configure_model()
    dropouts = [m for m in model.denoisers.modules() if isinstance(m, torch.nn.Dropout) and m.p]
    assert dropouts and not any(m.training for m in dropouts)
    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, datamodule=data(pairs, batch_size=4))  # preflight among it
    assert all(m.training for m in dropouts)


def test_adapters_off_leaves_what_is_trainable_alone():
    model = module()
    model.configure_model()
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    with adapters_disabled(model.denoisers):
        pass
    assert before == {name: p.requires_grad for name, p in model.named_parameters()}


def test_default_targets_are_attention_and_mlp():
    targets = default_target_modules(build("QwenImage").transformer)
    endings = {name.removeprefix("transformer_blocks.1.") for name in targets}
    assert {"attn.to_q", "attn.to_out.0", "img_mlp.net.2", "txt_mlp.net.0.proj"} <= endings
    assert not any("mod" in name for name in targets)


@pytest.mark.parametrize(
    ("lora", "message"),
    [
        ({"target_modules": ["to_qq"]}, r"no linear layer 'to_qq' \(did you mean 'to_q'"),
        ({"rank": 4}, r"lora: unknown field 'rank' \(did you mean 'rank_pattern'"),
    ],
)
def test_lora_settings_that_do_not_fit_are_refused_with_near_matches(lora, message):
    with pytest.raises(ValueError, match=message):
        make_trainable(build("QwenImage"), lora)


def test_a_foreign_checkpoint_is_refused_by_name(trained, tmp_path):
    path = trained[2]
    content = torch.load(path, weights_only=True)
    name = sorted(content["state_dict"])[0]
    content["state_dict"].pop(name)
    torch.save(content, tmp_path / "less.ckpt")
    for load in (load_student, DirectDistill.load_from_checkpoint):
        with pytest.raises(ValueError, match=f"missing: {name}"):
            load(tmp_path / "less.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(path.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"cut\.ckpt is truncated or not a checkpoint"):
        load_student(tmp_path / "cut.ckpt")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match=r"other\.ckpt was not written by lit_distill"):
        load_student(tmp_path / "other.ckpt")


def test_latents_of_another_shape_are_refused_with_their_row(pairs):
    model = module()
    model.configure_model()
    batch = heldout(pairs)
    batch["latents"] = batch["latents"][:, :8]
    with pytest.raises(ValueError, match=r"row 2: the target's latents are \(8, 16\)"):
        model.training_step(batch, 0)


def test_the_schedule_rises_then_falls_to_zero():
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = WarmupCosine(optimizer, num_warmup_steps=4, num_training_steps=14)
    rates = []
    for _ in range(15):
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[9] == pytest.approx(0.5)
    assert rates[14] == pytest.approx(0.0)


def test_preflight_finds_that_nothing_is_trained():
    pipe = build("QwenImage")
    pipe.transformer.requires_grad_(False)
    report = preflight(pipe, prompt="a", **CALL_KWARGS["QwenImage"])
    with pytest.raises(PreflightError, match="no parameter of the denoiser requires gradients"):
        report.raise_failures()


def test_fit_applies_what_preflight_found_and_a_checkpoint_holds_it(pairs, tmp_path):
    model = module(lora=None)
    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    with pytest.warns(UserWarning, match=r"gets a gradient: 135 of 141 do\. Set model\.freeze"):
        trainer.fit(model, datamodule=data(pairs, batch_size=4))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert len(frozen) == 6 and all("transformer_blocks.3" in name for name in frozen)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    assert not frozen & set(torch.load(tmp_path / "student.ckpt")["state_dict"])
    again = DirectDistill.load_from_checkpoint(tmp_path / "student.ckpt")
    assert again.hparams["freeze"] == model.hparams["freeze"]
    load_student(tmp_path / "student.ckpt")


def test_rows_are_generated_one_by_one_where_batches_are_not_masked(monkeypatch):
    monkeypatch.setattr(
        lit_distill.adapters.weights, "load_pipeline", lambda *_, **__: build("CogView4")
    )
    model = module(rollout_batch_size=1, lora=None, call_kwargs={"max_sequence_length": 32})
    model.configure_model()
    batch = {
        "prompt": ["a red cat", "two dogs that run on a long green field"],
        "seed": [0, 1],
        "rand_device": "cpu",
        "num_inference_steps": 2,
        "cfg_scale": 1.0,
        "size": (16, 16),
        "call": {},
        "row": [2, 3],
        **NO_TARGET,
    }
    both = model.student_rollout(batch)
    singles = [model.student_rollout(part) for part in split_batch(batch, 1)]
    assert torch.equal(both, torch.cat(singles))
    latents, images = model.sample(batch)
    assert torch.equal(latents, both) and len(images) == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"freeze": ["transformer.nothing.*"]}, "model.freeze: no trained parameter is called"),
        ({"train_mode": ["transformer.nothing"]}, "model.train_mode: no module is called"),
    ],
)
def test_patterns_that_match_nothing_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(**options).configure_model()


def test_a_size_that_the_pipeline_can_not_generate_is_refused_before_training(tmp_path):
    header = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale"
    rows = []
    for index, side in enumerate((32, 40, 36)):
        Image.new("RGB", (side, 32), "red").save(tmp_path / f"{index}.png")
        rows.append(f"{index}.png,a red seven,{index},cpu,4,1")
    (tmp_path / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")
    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    with pytest.raises(ValueError, match=r"row 4: .*36"):
        trainer.fit(module(), datamodule=DistillDataModule(str(tmp_path / "metadata.csv")))
    assert trainer.global_step == 0
