"""One LoRA per step: the right one samples, is trained, and is exported."""

import functools
import json
import re
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from conftest import TINY
from digits import QUIET, data, heldout, module
from PIL import Image
from students import away, checkpoint_of, picture, plain
from students import module as module_of
from tiny_pipelines import CALL_KWARGS, build

from lit_distill import DirectDistill, export_student, load_pipeline, load_student, rollout
from lit_distill.adapters.inject import adapters_disabled, make_trainable
from lit_distill.adapters.weights import extract_lora, load_into_adapters
from lit_distill.cli import build_cli, main
from lit_distill.compute.fused_lora import use_fused_lora
from lit_distill.compute.step_adapters import step_names, switch_adapter_callback
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import guidance
from lit_distill.pipelines.trajectory import trajectory
from lit_distill.training.ema import EMA

STEPS = 3
PROMPTS = ["a red seven on a blue background", "two"]


def pipeline(name="tiny-digits"):
    return load_pipeline(name, torch_dtype="float32") if name == "tiny-digits" else build(name)


def moved(pipe, lora_per_step=STEPS, lean=True, seed=1, **lora):
    """Add LoRAs that all differ, and that all change the output."""
    make_trainable(pipe, {"r": 4, "lora_alpha": 8} | lora, lora_per_step=lora_per_step)
    generator = torch.Generator().manual_seed(seed)
    for denoiser in denoisers(pipe).values():
        for name, parameter in denoiser.named_parameters():
            if "lora_B" in name:
                with torch.no_grad():
                    parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
        if lean:
            use_fused_lora(denoiser)
    return pipe


def arguments(name="tiny-digits", steps=STEPS):
    call = {"height": 32, "width": 32} if name == "tiny-digits" else CALL_KWARGS[name]
    generator = [torch.Generator().manual_seed(seed) for seed in range(2)]
    return {"prompt": PROMPTS, "generator": generator, "num_inference_steps": steps} | call


def gradients(pipe, loss):
    parameters = {
        f"{key}.{name}": parameter
        for key, denoiser in denoisers(pipe).items()
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }
    found = torch.autograd.grad(loss, parameters.values(), allow_unused=True)
    return {name: grad for name, grad in zip(parameters, found, strict=True) if grad is not None}


def step_of(name):
    return re.search(r"\.(step_\d)\.", name)[1]


@pytest.mark.parametrize("name", ["tiny-digits", "StableDiffusionXL", "Flux"])
def test_equal_loras_are_one(name):
    """They sample as one LoRA does, and their gradients add up to its gradient."""
    single = moved(pipeline(name), None)
    several = moved(pipeline(name))
    load_into_adapters(several, extract_lora(single))
    assert all(
        p.dtype == torch.float32 for _, p in denoisers(several).popitem()[1].named_parameters()
    )
    expected = rollout(single, **arguments(name))
    found = rollout(several, **arguments(name))
    assert torch.equal(found, expected)
    one, each = (gradients(p, x.square().mean()) for p, x in ((single, expected), (several, found)))
    assert {step_of(key) for key in each} == set(step_names(STEPS))
    for key, grad in one.items():
        parts = [each[key.replace(".default.", f".{step}.")] for step in step_names(STEPS)]
        torch.testing.assert_close(sum(parts), grad, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny-digits", "StableDiffusionXL"])
def test_the_call_the_rollout_and_plain_diffusers_sample_the_same(name):
    pipe = moved(pipeline(name))
    with torch.no_grad():
        expected = rollout(pipe, **arguments(name))
    plain = {"output_type": "latent", "return_dict": False}
    with guidance(pipe, 1.0, 2, {}) as off:
        scheduler = pipe.scheduler
        assert torch.equal(pipe(**arguments(name), **plain, **off)[0], expected)
        assert pipe.scheduler is scheduler
        seen = []

        def callback(pipe, step, timestep, kwargs):
            seen.append(step)
            return kwargs

        again = pipe(**arguments(name), **plain, **off, callback_on_step_end=callback)[0]
        assert torch.equal(again, expected) and seen == [0, 1, 2]
        # The same adapters, switched by what plain diffusers has.
        by_hand = moved(pipeline(name), None)
        for denoiser in denoisers(by_hand).values():
            denoiser.delete_adapters("default")
        fresh = pipeline(name)
        for key, denoiser in denoisers(fresh).items():
            for step in step_names(STEPS):
                denoiser.add_adapter(denoisers(pipe)[key].peft_config[step], step)
            denoiser.load_state_dict(denoisers(pipe)[key].state_dict())
        fresh.set_adapters("step_1")
        switch = switch_adapter_callback(step_names(STEPS))
        for _ in range(2):  # it begins anew by itself
            latents = fresh(**arguments(name), **plain, **off, callback_on_step_end=switch)[0]
            torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "modes"),
    [
        ("tiny-digits", ["block", "selective", "step", "nested", "block off", "selective off"]),
        ("StableDiffusionXL", ["nested"]),
    ],
)
def test_recomputation_uses_the_lora_of_its_step(name, modes):
    pipe = moved(pipeline(name))
    expected = {}
    # The last block is known, and kept, from the second time on.
    for mode in ["none", modes[0], *modes]:
        checkpointing, _, offload = mode.partition(" ")
        options = arguments(name) | {"checkpointing": checkpointing, "offload": bool(offload)}
        # Two rollouts before the backward pass, as for a split batch.
        both = [rollout(pipe, **options), rollout(pipe, **arguments(name), checkpointing="block")]
        found = gradients(pipe, sum(part.square().mean() for part in both))
        expected = expected or found
        assert found.keys() == expected.keys()
        for key, grad in expected.items():
            torch.testing.assert_close(found[key], grad, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("checkpointing", ["none", "selective", "nested"])
def test_a_state_of_a_trajectory_teaches_the_lora_of_its_step_only(checkpointing):
    pipe = moved(pipeline())
    for index, step in enumerate(step_names(STEPS)):
        states = trajectory(pipe, checkpointing=checkpointing, **arguments()).states
        found = gradients(pipe, states[index].square().mean())
        reached = [name for name, grad in found.items() if grad.any()]
        assert {step_of(name) for name in reached} == {step}


def test_a_lora_changes_what_comes_after_its_step():
    pipe = moved(pipeline())
    before = trajectory(pipe, **arguments()).states.detach()
    with torch.no_grad():
        for name, parameter in pipe.transformer.named_parameters():
            if ".lora_B.step_2." in name:
                parameter.mul_(2)
    after = trajectory(pipe, **arguments()).states
    assert torch.equal(after[0], before[0])
    assert not torch.equal(after[1], before[1])


def test_compiled_blocks_see_the_lora_of_the_step():
    pipe = moved(pipeline(), 2)
    expected = rollout(pipe, **arguments(steps=2))
    grads = gradients(pipe, expected.square().mean())
    pipe.transformer.compile_repeated_blocks(fullgraph=True, backend="eager")
    found = rollout(pipe, checkpointing="block", **arguments(steps=2))
    torch.testing.assert_close(found, expected)
    for key, grad in gradients(pipe, found.square().mean()).items():
        torch.testing.assert_close(grad, grads[key], rtol=1e-3, atol=1e-6)
    torch._dynamo.reset()


def test_other_adapters_that_a_user_has_activated_stay_active():
    pipe = moved(pipeline())
    generator = torch.Generator().manual_seed(5)
    style = moved(pipeline(), None, lean=False, seed=9)
    config = style.transformer.peft_config["default"]
    pipe.transformer.add_adapter(config, "style")
    load_into_adapters(pipe, extract_lora(style), "style")
    with torch.no_grad():
        alone = rollout(pipe, **arguments())  # only the style is active: nothing to switch
        torch.testing.assert_close(alone, rollout(style, **arguments()))
        pipe.transformer.set_adapters(["step_1", "style"])
        both = rollout(pipe, **arguments())
        assert torch.equal(rollout(pipe, **arguments()), both)
        # Without switching: the style and the first step's at each step.
        for name, parameter in pipe.transformer.named_parameters():
            if ".step_3." in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
        assert not torch.allclose(rollout(pipe, **arguments()), both)
        pipe.transformer.set_adapters("step_1")
        assert not torch.allclose(rollout(pipe, **arguments()), both)


def test_another_number_of_steps_is_refused_unless_they_are_off():
    pipe = moved(pipeline())
    with pytest.raises(
        ValueError, match=r"LoRA for each of 3 steps, but .* schedule of 5: set num"
    ):
        rollout(pipe, **arguments(steps=5))
    with adapters_disabled(pipe.transformer), torch.no_grad():
        expected = rollout(pipeline(), **arguments(steps=5))
        assert torch.equal(rollout(pipe, **arguments(steps=5)), expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lora": None}, r"model\.lora_per_step: model\.lora is null"),
        ({"lora_per_step": 0}, r"model\.lora_per_step must be >= 1, got 0"),
        ({"grad_steps": 2}, r"before the last 2 of model\.lora_per_step \(3\) would never train"),
    ],
)
def test_unsupported_combinations_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        module(**{"lora_per_step": 3} | options)


def test_rows_of_another_number_of_steps_are_refused_before_anything_is_loaded(pairs):
    trainer = pl.Trainer(max_steps=1, **QUIET)
    model = module(lora_per_step=3)
    with pytest.raises(ValueError, match=r"row 2.*4 steps.*model.lora_per_step has 3"):
        trainer.fit(model, datamodule=data(pairs))
    assert not hasattr(model, "denoisers")


def test_a_pipeline_that_plain_diffusers_could_not_switch_is_refused():
    with pytest.raises(ValueError, match=r"PixArtSigmaPipeline has no callback_on_step_end"):
        make_trainable(build("PixArtSigma"), {"r": 4}, lora_per_step=2)


# From training to a stranger's machine


@pytest.fixture(scope="module")
def trained(pairs, tmp_path_factory):
    """Trained with preflight and a moving average, interrupted and resumed."""
    path = tmp_path_factory.mktemp("run") / "one/checkpoints"  # reports look for logs beside it
    for limit, ckpt_path in ((2, None), (4, path / "student.ckpt")):
        torch.manual_seed(0)
        model = DirectDistill(
            "tiny-digits",
            torch_dtype="float32",
            lora={"r": 4, "lora_alpha": 8},
            lora_per_step=4,
            checkpointing="block",
            optimizer=lambda params: torch.optim.AdamW(params, lr=1e-2),
        )
        options = {"default_root_dir": path, "callbacks": [EMA(0.5)], "limit_val_batches": 0}
        trainer = pl.Trainer(max_steps=limit, **QUIET | options)
        trainer.fit(model, datamodule=data(pairs, batch_size=8), ckpt_path=ckpt_path)
        trainer.save_checkpoint(path / "student.ckpt")
    export_student(path / "student.ckpt", path / "export")
    return model, path


def test_training_moves_the_lora_of_every_step(trained):
    trained_names = trained[0].trained()
    assert {step_of(name) for name in trained_names} == set(step_names(4))
    state = torch.load(trained[1] / "student.ckpt", weights_only=True)["state_dict"]
    assert set(state) == set(trained_names)
    # The text's queries of the last block reach nothing, but have a gradient, of zero.
    still = [name for name, tensor in state.items() if not tensor.any()]
    assert all(".3.attn.add_q_proj.lora_B." in name for name in still)


def test_a_student_is_the_same_wherever_it_is_loaded(trained, pairs):
    path = trained[1]
    batch = heldout(pairs)
    model = DirectDistill.load_from_checkpoint(path / "student.ckpt", map_location="cpu")
    expected, _ = model.sample(batch)
    for source in ("student.ckpt", "export"):
        pipe = load_student(path / source)
        generator = [torch.Generator().manual_seed(seed) for seed in batch["seed"]]
        found = pipe(batch["prompt"], generator=generator, output_type="latent").images
        torch.testing.assert_close(found, expected)
        assert torch.equal(model.sample(batch, pipe=pipe)[0], found)
    base = module(lora=None)
    base.configure_model()
    undistilled, _ = model.sample(batch, undistilled=True)
    assert torch.equal(undistilled, base.sample(batch)[0])
    assert not torch.allclose(undistilled, expected)
    eight, _ = model.sample(batch, undistilled=True, num_inference_steps=8, cfg_scale=4.0)
    assert eight.isfinite().all()


def test_the_commands_work_on_the_checkpoint_alone(trained, pairs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = ["--data.val_metadata_path", str(pairs / "heldout/metadata.csv")]
    quiet = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    ckpt = ["--ckpt_path", str(trained[1] / "student.ckpt")]
    main(["validate", *ckpt, *rows, *quiet])
    quiet += ["--trainer.enable_progress_bar", "false"]
    (tmp_path / "prompts.txt").write_text("a red seven on a blue background\n")
    predicted = build_cli(["predict", *ckpt, "--prompts", "prompts.txt", *quiet])
    assert predicted.model.hparams["lora_per_step"] == 4
    compare = json.dumps([{"lora": str(trained[1] / "export"), "name": "exported"}])
    options = ["--data.batch_size", "8", "--out", "report", "--compare", compare]
    main(["test", *ckpt, *rows, *quiet, *options])
    found = json.loads((tmp_path / "report/metrics.json").read_text())["ways"]
    own, exported = ({**way} for way in found if way["way"].startswith(("student", "exported")))
    assert exported["latent_mse"] == pytest.approx(own["latent_mse"], rel=1e-4)


def test_the_code_of_the_card_samples_the_student_in_plain_diffusers(trained, tmp_path):
    """Word for word but for the embedded pipeline's name, without lit_distill."""
    export = trained[1] / "export"
    files = sorted(path.name for path in export.glob("*.safetensors"))
    assert files == [f"{step}.safetensors" for step in step_names(4)]
    code = re.search(r"```python\n(.*?)```", (export / "README.md").read_text(), re.S)[1]
    assert "callback_on_step_end=next_lora" in code
    code = code.replace("from lit_distill import load_pipeline", "from diffusers import *")
    tiny = f"DiffusionPipeline.from_pretrained({str(TINY)!r}, dtype="
    code = code.replace("load_pipeline('tiny-digits', torch_dtype=", tiny)
    call = code[code.index("image = pipe(") :]
    code += call.replace("image =", "again =")
    code += "image.save('image.png'), again.save('again.png')\n"
    code += "import sys; assert 'lit_distill' not in sys.modules\n"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)
    prompt = re.search(r"pipe\(\n    '(.*?)'", call)[1]
    seed = int(re.search(r"manual_seed\((\d+)\)", call)[1])
    pipe = load_student(trained[1] / "student.ckpt")
    expected = np.asarray(
        pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0], int
    )
    for name in ("image.png", "again.png"):
        assert np.abs(np.asarray(Image.open(tmp_path / name), int) - expected).max() <= 1
    # The first step's LoRA at every step gives another image.
    pipe.transformer.set_adapters("step_1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "lit_distill.compute.step_adapters.StepAdapters.bind_step",
            lambda self, step, total, call: call,
        )
        other = np.asarray(
            pipe(prompt, generator=torch.Generator().manual_seed(seed)).images[0], int
        )
    assert np.abs(other - expected).max() > 1


@pytest.mark.parametrize("format", ["comfyui", "kohya", "diffsynth", "peft", "merged"])
def test_a_format_that_holds_one_lora_is_refused(format, trained, tmp_path):
    with pytest.raises(
        ValueError, match=rf"format {format}: .*lora_per_step.*use format diffusers"
    ):
        export_student(trained[1] / "student.ckpt", tmp_path, format)


@pytest.mark.parametrize("name", ["StableDiffusionXL", "Wan22"])
def test_families_are_exported(name, folder, tmp_path):
    """A second denoiser has its own files; the teacher's LoRA is merged into each LoRA."""
    model = away(module_of(folder(name), name, lora_per_step=4))
    export_student(checkpoint_of(model, name), tmp_path)
    expected = picture(model.pipe, name)
    assert np.abs(picture(load_student(tmp_path), name) - expected).max() <= 1
    pipe = plain(folder(name))
    code = re.search(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), re.S)[1]
    _, _, code = code.partition("float32)\n")
    code = code.rpartition("\n\n")[0]
    names = {"pipe": pipe}
    exec(code, names)
    call = type(pipe).__call__

    @functools.wraps(call)
    def switched(self, *args, **kwargs):
        return call(self, *args, **kwargs, callback_on_step_end=names["next_lora"])

    pipe.__class__ = type(type(pipe).__name__, (type(pipe),), {"__call__": switched})
    assert np.abs(picture(pipe, name) - expected).max() <= 1
    assert np.abs(picture(plain(folder(name)), name) - expected).max() > 1


def test_all_start_from_init_lora_and_are_exported_with_the_teachers(folder, tmp_path):
    path = folder("QwenImage")
    first = away(module_of(path))
    export_student(checkpoint_of(first), tmp_path / "first")
    begun = module_of(path, lora=None, init_lora=str(tmp_path / "first"), lora_per_step=4)
    assert np.abs(picture(begun.pipe, "QwenImage") - picture(first.pipe, "QwenImage")).max() <= 1
    taught = module_of(path, teacher_lora=str(tmp_path / "first"), lora_per_step=4)
    away(taught, seed=2)
    export_student(checkpoint_of(taught), tmp_path / "both")
    expected = picture(taught.pipe, "QwenImage")
    assert np.abs(picture(load_student(tmp_path / "both"), "QwenImage") - expected).max() <= 1
