"""Compiled blocks: the same gradient in every checkpointing mode, and no variants without end."""

import pytest
import torch
from diffusers.models.transformers import transformer_qwenimage as qwen_image
from torch._dynamo.utils import counters

from lit_distill import DirectDistill, rollout
from lit_distill.adapters.inject import trained_parameters
from lit_distill.compute import compilation
from lit_distill.compute.activation_checkpointing import MODES_BY_MEMORY
from lit_distill.pipelines.components import denoisers

SIZES = [{"height": 32, "width": 32}, {"height": 48, "width": 32}, {"height": 48, "width": 64}]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def loaded():
    model = DirectDistill("tiny-digits", torch_dtype="float32", lora={"r": 4}, preflight=False)
    model.configure_model()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in trained_parameters(model.pipe).values():
            parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return model.pipe


def sample(pipe, size, mode="none", steps=2):
    generator = [torch.Generator().manual_seed(0)]
    options = {"num_inference_steps": steps, "generator": generator, "checkpointing": mode}
    return rollout(pipe, prompt=["a red seven"], **options, **size)


def gradient(pipe, size, mode):
    latents = sample(pipe, size, mode)
    known = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    (latents * known).sum().backward()
    parameters = trained_parameters(pipe).values()
    # Of parameters that lead nowhere, a compiled block returns zeros.
    found = [torch.zeros_like(p) if p.grad is None else p.grad for p in parameters]
    for parameter in parameters:
        parameter.grad = None
    return torch.cat([each.flatten() for each in found])


def test_gradient_in_every_checkpointing_mode_is_that_of_plain_blocks():
    plain, compiled = loaded(), loaded()
    compilation.compile_blocks(denoisers(compiled).values())
    expected = gradient(plain, SIZES[0], "none")
    for mode in MODES_BY_MEMORY * 2:
        found = gradient(compiled, SIZES[0], mode)
        assert (found - expected).norm() <= 1e-5 * expected.norm(), mode
    assert counters["stats"]["unique_graphs"] > 0
    assert not counters["graph_break"]


def test_a_third_size_compiles_nothing():
    """With dynamo alone, which decides what is compiled: inductor would take a minute."""
    pipe = loaded()
    compilation.compile_blocks(denoisers(pipe).values(), backend="eager")
    graphs = []
    for size in SIZES:
        for mode in MODES_BY_MEMORY:
            gradient(pipe, size, mode)
        with torch.no_grad():  # the online teacher, and validation
            sample(pipe, size)
        graphs.append(counters["stats"]["unique_graphs"])
    assert graphs[0] < graphs[1] == graphs[2] <= 12


def test_rotation_in_real_numbers_is_that_in_complex_ones():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 10, 3, 16, generator=generator)
    angles = torch.rand(10, 8, generator=generator) * 6
    freqs = torch.polar(torch.ones_like(angles), angles)
    complex_rotary = compilation._complex_rotary
    expected = complex_rotary(x, freqs, use_real=False)
    found = compilation._rotary(x, torch.view_as_real(freqs), use_real=False)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(compilation._rotary(x, freqs, use_real=False), expected)
    half = compilation._rotary(x.bfloat16(), torch.view_as_real(freqs), use_real=False)
    assert torch.equal(half, complex_rotary(x.bfloat16(), freqs, use_real=False))


def test_only_compiled_denoisers_rotate_in_real_numbers():
    pipe = loaded()
    before = sample(pipe, SIZES[0]).detach()
    compilation.compile_blocks(denoisers(loaded()).values(), backend="eager")
    assert qwen_image.apply_rotary_emb_qwen is compilation._rotary
    assert torch.equal(sample(pipe, SIZES[0]), before)
