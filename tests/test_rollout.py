import pytest
import torch
from pipelines import CALL_KWARGS, build

from lit_distill import rollout
from lit_distill.families import denoisers, guidance

CORE = ["QwenImage", "Flux", "StableDiffusion3", "StableDiffusionXL"]
PROMPTS = ["a red cat", "two dogs that run on a long green field"]


def generators(n=1, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


def frozen(name):
    pipe = build(name)
    pipe.set_progress_bar_config(disable=True)
    for component in pipe.components.values():
        if isinstance(component, torch.nn.Module):
            component.requires_grad_(False)
    for denoiser in denoisers(pipe).values():
        denoiser.requires_grad_(True)
    return pipe


def call(name, prompts=PROMPTS[:1], steps=3):
    return {"prompt": list(prompts), "num_inference_steps": steps, **CALL_KWARGS[name]}


def gradient(pipe, latents, weights):
    for denoiser in denoisers(pipe).values():
        denoiser.zero_grad()
    (latents * weights).sum().backward()
    parameters = [p for d in denoisers(pipe).values() for p in d.parameters()]
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None])


@pytest.mark.parametrize("cfg_scale", [1.0, 4.0])
@pytest.mark.parametrize("name", CORE)
def test_is_the_pipeline_bit_for_bit(name, cfg_scale):
    pipe = frozen(name)
    arguments = call(name, PROMPTS)
    with guidance(pipe, cfg_scale, 2, arguments) as given:
        expected = pipe(**arguments, **given, generator=generators(2), output_type="latent")[0]
    latents = rollout(pipe, **arguments, cfg_scale=cfg_scale, generator=generators(2))
    assert latents.requires_grad
    assert torch.equal(latents, expected)


@pytest.mark.parametrize("name", CORE)
def test_batch_of_two_lengths_equals_two_singles(name):
    pipe = frozen(name)
    with torch.no_grad():
        both = rollout(pipe, **call(name, PROMPTS), generator=generators(2))
        one = rollout(pipe, **call(name, PROMPTS[:1]), generator=generators(1))
        two = rollout(pipe, **call(name, PROMPTS[1:]), generator=generators(1, first=1))
    torch.testing.assert_close(both, torch.cat([one, two]), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("checkpointing", ["block", "step", "nested"])
@pytest.mark.parametrize("name", CORE)
def test_checkpointing_does_not_change_the_gradient(name, checkpointing):
    pipe = frozen(name)
    latents = rollout(pipe, **call(name), generator=generators())
    weights = torch.randn(latents.shape, generator=generators()[0])
    expected = gradient(pipe, latents, weights)
    saved = rollout(pipe, **call(name), generator=generators(), checkpointing=checkpointing)
    assert torch.equal(saved, latents)
    found = gradient(pipe, saved, weights)
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def saved_bytes(pipe, name, checkpointing, steps):
    """Bytes that autograd keeps between forward and backward, each storage once."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    own = {p.untyped_storage().data_ptr() for d in denoisers(pipe).values() for p in d.parameters()}
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = rollout(
            pipe,
            **call(name, steps=steps),
            generator=generators(),
            checkpointing=checkpointing,
        )
    assert keep.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in own)


def test_checkpointing_stores_less_and_step_hardly_grows_with_steps():
    pipe = frozen("QwenImage")
    stored = {
        mode: saved_bytes(pipe, "QwenImage", mode, 4)
        for mode in ("none", "block", "step", "nested")
    }
    assert stored["block"] < 0.5 * stored["none"]
    assert stored["step"] < 0.5 * stored["block"]
    assert stored["nested"] == stored["step"]


@pytest.mark.parametrize("name", CORE)
def test_gradient_reaches_every_step(name):
    """The gradient of k last steps changes with every step that is added."""
    pipe = frozen(name)
    found = []
    for grad_steps in (1, 2, 3):
        latents = rollout(pipe, **call(name), generator=generators(), grad_steps=grad_steps)
        weights = torch.randn(latents.shape, generator=generators()[0])
        found.append(gradient(pipe, latents, weights))
    full = rollout(pipe, **call(name), generator=generators())
    assert torch.equal(gradient(pipe, full, weights), found[2])
    assert not torch.allclose(found[0], found[1], rtol=1e-5)
    assert not torch.allclose(found[1], found[2], rtol=1e-5)


def test_the_pipeline_is_left_as_it_was():
    pipe = frozen("QwenImage")
    before = (pipe.scheduler, dict(pipe.transformer.__dict__), dict(pipe._progress_bar_config))
    rollout(pipe, **call("QwenImage"), generator=generators(), checkpointing="nested")
    assert pipe.scheduler is before[0]
    assert "forward" not in pipe.transformer.__dict__
    assert pipe._progress_bar_config == before[2]
    assert not pipe.transformer.gradient_checkpointing


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps must be >= 1, got 0"),
        ({"checkpointing": "all"}, "checkpointing must be one of none, block, step, nested"),
        ({"grad_steps": 0}, "grad_steps must be >= 1"),
        ({"cfg_scale": 0.5}, r"cfg_scale must be a number >= 1 \(1 = no guidance\), got 0.5"),
        ({"true_cfg_scale": 4.0}, "true_cfg_scale of QwenImagePipeline is set through cfg_scale"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        rollout(frozen("QwenImage"), **call("QwenImage") | arguments, generator=generators())


def test_one_step_of_a_terminal_shift_is_refused_instead_of_nan():
    from lit_distill import load_pipeline

    pipe = load_pipeline("tiny-digits")
    with pytest.raises(ValueError, match="no one-step schedule with shift_terminal"):
        rollout(pipe, prompt=["a"], num_inference_steps=1, generator=generators())
