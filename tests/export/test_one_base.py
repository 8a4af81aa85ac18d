"""An export never holds two bases, in any format."""

import pytest
import torch
from held_memory import HeldBytes, no_garbage_collection
from students import away, checkpoint_of, module

from lit_distill import export_student, load_pipeline
from lit_distill.pipelines.release import release

FORMATS = ["diffusers", "comfyui", "kohya", "diffsynth", "peft", "merged"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A pipeline whose weights are much larger than what it computes, and their bytes."""
    pipe = load_pipeline("tiny-digits")
    config = dict(pipe.transformer.config) | {"num_layers": 6, "num_attention_heads": 4}
    config |= {"attention_head_dim": 128, "axes_dims_rope": (32, 48, 48)}
    torch.manual_seed(0)
    pipe.register_modules(transformer=type(pipe.transformer).from_config(config))
    folder = tmp_path_factory.mktemp("base")
    pipe.save_pretrained(folder)
    modules = (c for c in pipe.components.values() if isinstance(c, torch.nn.Module))
    return folder, sum(p.nbytes for module in modules for p in module.parameters())


def student(folder, **options):
    model = module(folder, **options)
    model.configure_model()
    return away(model)


def exported_peak(content, out, format, **options):
    """The peak of an export, in bytes."""
    with no_garbage_collection(), HeldBytes() as held:
        export_student(content, out, format, **options)
    return held.peak


@pytest.fixture(scope="module")
def lora(base):
    return checkpoint_of(student(base[0]))


@pytest.mark.parametrize("format", FORMATS)
def test_an_export_holds_one_base(format, base, lora, tmp_path):
    assert exported_peak(lora, tmp_path / "out", format) <= 1.1 * base[1]


def test_merging_in_another_data_type_holds_what_its_loading_does(base, lora, tmp_path):
    with no_garbage_collection(), HeldBytes() as held:
        release(load_pipeline(base[0], torch_dtype="bfloat16"))
    peak = exported_peak(lora, tmp_path / "out", "merged", dtype="bfloat16")
    assert peak <= 1.1 * max(held.peak, base[1])


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_full_export_holds_one_base(dtype, base, tmp_path):
    """The checkpoint's weights are mapped from its file and count when they are read."""
    folder, size = base
    if dtype == "bfloat16":
        folder, size = tmp_path / "base", size // 2
        load_pipeline(base[0], torch_dtype=dtype).save_pretrained(folder)
    content = checkpoint_of(student(folder, lora=None))
    content["hyper_parameters"]["torch_dtype"] = dtype  # trained in float32 in any case
    torch.save(content, tmp_path / "student.ckpt")
    del content
    peak = exported_peak(tmp_path / "student.ckpt", tmp_path / "out", "merged")
    assert peak <= 1.1 * size
