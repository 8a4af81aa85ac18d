"""Components that share a device one after the other generate the same pairs, bit for bit."""

import weakref

import numpy as np
import pytest
import torch
from conftest import TINY, generate
from folders import hashes
from held_memory import no_garbage_collection
from tiny_pipelines import CALL_KWARGS

from lit_distill.cli import main
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.stages import check_offload, encoders
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.staged import StagedTeacher
from lit_distill.teacher.teacher import Teacher

CPU = torch.device("cpu")
BATCHES = [
    [Pair(0, "a cat", 1, {}, None), Pair(1, "a much longer prompt of a dog", 2, {}, None)],
    [Pair(2, "a cow", 3, {}, None)],
]


def teacher_of(name, folder):
    call = dict(CALL_KWARGS[name])
    size = {side: call.pop(side) for side in ("height", "width")}
    return Teacher(
        model=str(folder(name)), torch_dtype="float32", num_inference_steps=3, call_kwargs=call,
        **size,
    )  # fmt: skip


def pixels(images):
    return [np.asarray(image) for image in images]


@pytest.mark.parametrize("offload", ["model", "group"])
@pytest.mark.parametrize(
    "name", ["QwenImage", "StableDiffusionXL", "StableDiffusion3", "Flux", "Wan22"]
)
def test_stages_are_bit_equal_to_the_call(name, offload, folder):
    teacher = teacher_of(name, folder)
    whole = teacher.load()
    expected = [teacher.sample(whole, batch) for batch in BATCHES]
    staged = StagedTeacher(teacher, teacher.load(), CPU, offload, BATCHES)
    denoised = [staged.denoise(batch) for batch in BATCHES]
    for (latents, images), batch, result in zip(expected, BATCHES, denoised, strict=True):
        assert torch.equal(result.latents, latents)
        for image, other in zip(pixels(images), pixels(staged.decode(batch, result)), strict=True):
            assert (image == other).all()


def test_every_stage_runs_without_the_others_weights(folder):
    """Encoders are free before the denoiser runs; it is not called to decode."""
    with no_garbage_collection():
        teacher = teacher_of("Flux", folder)
        pipe = teacher.load()
        weights = [weakref.ref(p) for e in encoders(pipe).values() for p in e.parameters()]
        assert len(weights) > 20
        staged = StagedTeacher(teacher, pipe, CPU, "model", BATCHES)
        assert not any(reference() is not None for reference in weights)
        vae, pipe.vae.forward = pipe.vae, None
        decode, vae.decode = vae.decode, None  # calling it would fail
        result = staged.denoise(BATCHES[0])
        vae.decode = decode
        (denoiser,) = denoisers(pipe).values()
        denoiser.forward = None
        assert len(staged.decode(BATCHES[0], result)) == 2


def test_generate_writes_the_same_files_in_stages(tmp_path):
    options = ("--height", "32", "--width", "32", "--store_trajectory", "true")
    generate(tmp_path / "whole", TINY / "prompts_train.txt", 20, 0, *options)
    generate(tmp_path / "staged", TINY / "prompts_train.txt", 20, 0, *options, "--offload", "model")
    assert hashes(tmp_path / "whole") == hashes(tmp_path / "staged")


def test_groups_need_an_accelerator(tmp_path):
    with pytest.raises(InputError, match="parts of a network between host memory and an acc"):
        check_offload("group", CPU)
    with pytest.raises(InputError, match="offload group"):
        generate(tmp_path, TINY / "prompts_train.txt", 1, 0, "--offload", "group")


def test_a_quantised_teacher_is_recorded(tmp_path):
    pytest.importorskip("torchao")
    quantization = "{quant_backend: torchao, quant_kwargs: {quant_type: Int8WeightOnlyConfig}}"
    arguments = ("--model.quantization", quantization, "--model.lora", "{r: 4}")
    generate(tmp_path / "int8", TINY / "prompts_train.txt", 2, 0, *arguments)
    generate(tmp_path / "plain", TINY / "prompts_train.txt", 2, 0)
    assert "Int8WeightOnlyConfig" in (tmp_path / "int8/provenance.json").read_text()
    files = [hashes(tmp_path / name / "latents") for name in ("int8", "plain")]
    assert files[0].keys() == files[1].keys() and files[0] != files[1]
    main(
        ["check", "--data.metadata_path", str(tmp_path / "int8/metadata.csv"), "--pairing", "1"]
        + ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    )
