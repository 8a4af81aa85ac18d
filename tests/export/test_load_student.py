import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image
from safetensors.torch import load_file, save_file
from students import away, batch, checkpoint_of, module, picture, plain

from lit_distill import export_student, load_student, rollout
from lit_distill.adapters.lora import add_loras
from lit_distill.adapters.weights import extract_lora, fuse_lora

# Students loaded from each source


@pytest.mark.parametrize("source", ["student.ckpt", "diffusers", "kohya", "peft", "merged"])
def test_a_loaded_student_uses_its_steps_by_default(source, exports, folder):
    out, model = exports
    pipe = load_student(out / source)
    generator = torch.Generator().manual_seed(3)
    image = pipe("a red cat", generator=generator, max_sequence_length=512).images[0]
    assert np.abs(np.asarray(image, int) - picture(model.pipe, "QwenImage")).max() <= 1
    timesteps = len(pipe.scheduler.timesteps)
    assert timesteps == 4
    pipe("a red cat", num_inference_steps=2)
    assert len(pipe.scheduler.timesteps) == 2
    assert pipe("a red cat", "", 1.0, 32).images[0].size == (16, 32)  # positional height
    assert type(pipe).__name__ == "QwenImagePipeline"
    latents = rollout(
        pipe,
        prompt=["a red cat"],
        num_inference_steps=4,
        generator=[torch.Generator().manual_seed(3)],
        height=16,
        width=16,
    )
    torch.testing.assert_close(latents, model.sample(batch())[0], rtol=1e-3, atol=1e-3)


def test_a_student_is_loaded_with_a_moved_base_model(exports, folder, tmp_path):
    moved = tmp_path / "moved"
    moved.symlink_to(folder("QwenImage"))
    for source in ("student.ckpt", "diffusers"):
        pipe = load_student(exports[0] / source, base_model=moved)
        assert np.abs(picture(pipe, "QwenImage") - picture(exports[1].pipe, "QwenImage")).max() <= 1


def test_files_of_other_tools_are_not_students(exports, tmp_path):
    state = load_file(exports[0] / "diffusers/pytorch_lora_weights.safetensors")
    save_file(state, tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"not written by lit_distill.*load_lora_weights"):
        load_student(tmp_path / "style.safetensors")
    with pytest.raises(ValueError, match=r"it has no lit_distill\.json"):
        load_student(TINY)


def test_two_adapters_add_up(exports, folder, tmp_path):
    """A few-step and a style LoRA, with the code of the example."""
    style = away(module(folder("QwenImage"), lora={"r": 2}), seed=5)
    export_student(checkpoint_of(style), tmp_path / "style")
    few = exports[0] / "diffusers"
    example = [sys.executable, "examples/two_adapters.py", str(folder("QwenImage")), str(few)]
    example += [str(tmp_path / "style"), "a red cat", str(tmp_path / "both.png"), "16"]
    subprocess.run(example, check=True, cwd=ROOT)
    pipe = plain(folder("QwenImage"))
    fuse_lora(pipe, add_loras(extract_lora(exports[1].pipe), extract_lora(style.pipe)))
    generator = torch.Generator().manual_seed(0)
    call = {"num_inference_steps": 4, "true_cfg_scale": 1.0, "height": 16, "width": 16}
    expected = np.asarray(pipe("a red cat", generator=generator, **call).images[0], int)
    both = np.asarray(Image.open(tmp_path / "both.png"), int)
    assert np.abs(both - expected).max() <= 1
    alone = np.asarray(exports[1].pipe("a red cat", generator=generator, **call).images[0], int)
    assert np.abs(both - alone).max() > 1


# Teachers


def test_the_teacher_lora_applies_to_teacher_student_and_export(exports, folder, tmp_path):
    out, styled = exports
    style = str(out / "kohya")
    options = {"teacher_num_inference_steps": 4, "teacher_cfg_scale": 1.0}
    model = module(folder("QwenImage"), teacher_lora=style, **options)
    expected, _ = styled.sample(batch())
    for latents in (model.teacher_target(batch()), model.student_rollout(batch())):
        torch.testing.assert_close(latents, expected, rtol=1e-4, atol=1e-4)
    away(model, seed=9)
    torch.testing.assert_close(model.teacher_target(batch()), expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(model.student_rollout(batch()), expected, atol=1e-2)
    for format in ("diffusers", "merged"):
        export_student(checkpoint_of(model), tmp_path / format, format)
        pipe = plain(tmp_path / format if format == "merged" else folder("QwenImage"))
        if format == "diffusers":
            pipe.load_lora_weights(tmp_path / format)
            state = load_file(tmp_path / format / "pytorch_lora_weights.safetensors")
            assert {len(state[key]) for key in state if "lora_A" in key} == {8}  # ranks add up
        assert np.abs(picture(pipe, "QwenImage") - picture(model.pipe, "QwenImage")).max() <= 1


def test_teacher_model_is_the_teacher(exports, folder):
    out, turbo = exports
    options = {"teacher_num_inference_steps": 4, "teacher_cfg_scale": 1.0}
    for lora in ({"r": 4}, None):
        model = module(folder("QwenImage"), lora=lora, teacher_model=str(out / "merged"), **options)
        expected, _ = turbo.sample(batch())
        torch.testing.assert_close(model.teacher_target(batch()), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(model.student_rollout(batch()), expected, atol=1e-2)
    with pytest.raises(ValueError, match=r"teacher_lora and model\.teacher_model: set one"):
        module(folder("QwenImage"), teacher_model="a", teacher_lora="b")


def test_a_modified_scheduler_is_exported(folder, tmp_path):
    options = {"teacher_num_inference_steps": 4, "teacher_cfg_scale": 1.0}
    model = module(folder("QwenImage"), scheduler={"shift_terminal": None}, **options)
    base = module(folder("QwenImage"), **options)
    usual = base.sample(batch())[0]
    away(model)
    assert not torch.allclose(model.sample(batch(), undistilled=True)[0], usual, atol=1e-2)
    # The teacher keeps the base's scheduler.
    torch.testing.assert_close(model.teacher_target(batch()), usual)
    content = checkpoint_of(model)
    content["lit_distill"]["facts"] |= {"num_inference_steps": 1}
    content["lit_distill"]["facts"]["examples"][0]["num_inference_steps"] = 1
    expected = model.sample(batch(num_inference_steps=1))[0]
    assert torch.isfinite(expected).all()
    for format in ("diffusers", "merged"):
        export_student(content, tmp_path / format, format)
        pipe = load_student(tmp_path / format)
        generator = [torch.Generator().manual_seed(3)]
        latents = rollout(
            pipe,
            prompt=["a red cat"],
            num_inference_steps=1,
            generator=generator,
            height=16,
            width=16,
        )
        torch.testing.assert_close(latents, expected, rtol=1e-3, atol=1e-3)
    assert (tmp_path / "diffusers/scheduler_config.json").is_file()
    assert "type(pipe.scheduler).from_pretrained" in (tmp_path / "diffusers/README.md").read_text()
    export_student(checkpoint_of(base), tmp_path / "usual")
    assert not (tmp_path / "usual/scheduler_config.json").exists()
    with pytest.raises(ValueError, match=r"has no field 'shift_end'"):
        module(folder("QwenImage"), scheduler={"shift_end": None})
