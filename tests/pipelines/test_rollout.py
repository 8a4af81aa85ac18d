import pytest
import torch
from peft.tuners import lora
from tiny_pipelines import CALL_KWARGS, build
from torch.utils.flop_counter import FlopCounterMode

from lit_distill import rollout
from lit_distill.adapters.inject import make_trainable, trained_parameters
from lit_distill.compute import activation_checkpointing
from lit_distill.compute.fused_lora import FusedLoraLinear, use_fused_lora
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import guidance

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


@pytest.mark.parametrize("checkpointing", ["block", "selective", "step", "nested"])
@pytest.mark.parametrize("name", CORE)
def test_checkpointing_does_not_change_the_gradient(name, checkpointing):
    pipe = frozen(name)
    latents = rollout(pipe, **call(name), generator=generators())
    weights = torch.randn(latents.shape, generator=generators()[0])
    expected = gradient(pipe, latents, weights)
    for _ in range(2):  # from the second time on the number of blocks is known
        saved = rollout(pipe, **call(name), generator=generators(), checkpointing=checkpointing)
        assert torch.equal(saved, latents)
        found = gradient(pipe, saved, weights)
        assert (found - expected).norm() <= 1e-6 * expected.norm()


def saved_bytes(pipe, name, checkpointing, steps):
    """Return the bytes that autograd stores for the backward pass, without the parameters."""
    storages = {}

    def pack(tensor):
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    parameters = {
        p.untyped_storage().data_ptr() for d in denoisers(pipe).values() for p in d.parameters()
    }
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        keep = rollout(
            pipe,
            **call(name, steps=steps),
            generator=generators(),
            checkpointing=checkpointing,
        )
    assert keep.requires_grad
    return sum(size for pointer, size in storages.items() if pointer not in parameters)


def test_checkpointing_stores_less():
    modes = ("none", "selective", "block", "nested")
    stored = [saved_bytes(frozen("QwenImage"), "QwenImage", mode, 4) for mode in modes]
    assert stored[2] < 0.5 * stored[0]
    assert stored[3] < 0.5 * stored[2]
    # What selective keeps besides, autograd knows nothing of: tests of memory see it.
    assert stored[1] == stored[2]


def test_the_last_block_is_not_recomputed():
    pipe = frozen("QwenImage")
    blocks = pipe.transformer.transformer_blocks
    runs = {"first": 0, "last": 0}
    for name, block in (("first", blocks[0]), ("last", blocks[-1])):

        def count(*_, name=name):
            runs[name] += 1

        block.register_forward_pre_hook(count)
    seen = []
    for mode in ("block", "block", "nested"):
        runs.update(first=0, last=0)
        latents = rollout(pipe, **call("QwenImage"), generator=generators(), checkpointing=mode)
        latents.sum().backward()
        seen.append(dict(runs))
    # Three steps with the blocks of every call recomputed, with nested once more.
    assert seen == [{"first": 6, "last": 6}, {"first": 6, "last": 5}, {"first": 9, "last": 6}]


def with_lora(name, **lora):
    """A pipeline with a LoRA, and a function of the mode: gradient, FLOPs of the backward pass."""
    pipe = frozen(name)
    make_trainable(pipe, {"r": 4, "init_lora_weights": False} | lora)
    for denoiser in denoisers(pipe).values():
        use_fused_lora(denoiser)
    parameters = list(trained_parameters(pipe).values())

    def step(mode):
        for parameter in parameters:
            parameter.grad = None
        latents = rollout(pipe, **call(name), generator=generators(), checkpointing=mode)
        weights = torch.randn(latents.shape, generator=generators()[0])
        with FlopCounterMode(display=False) as counter:
            (latents * weights).sum().backward()
        found = [p.grad.flatten() for p in parameters if p.grad is not None]
        return torch.cat(found), counter.get_total_flops()

    return pipe, step


def skipped_layers(pipe):
    """Return the names of the layers that the first block skips in recomputation."""
    block = pipe.transformer.transformer_blocks[0]
    skipped = set().union(*activation_checkpointing._UNUSED_LAYERS[block].values())
    return {name for name, layer in block.named_modules() if layer in skipped}


@pytest.mark.parametrize("name", CORE)
def test_layers_that_are_skipped_in_recomputation_do_not_change_the_gradient(name):
    pipe, step = with_lora(name)
    expected, _ = step("none")
    for mode in ("block", "selective", "nested") * 2:
        found, _ = step(mode)
        assert (found - expected).norm() <= 1e-6 * expected.norm()
    _, lean = step("block")
    for denoiser in denoisers(pipe).values():
        for layer in denoiser.modules():
            if type(layer) is FusedLoraLinear:
                layer.__class__ = lora.Linear
    _, whole = step("block")
    assert lean <= whole
    if name == "QwenImage":
        assert skipped_layers(pipe) == {"img_mlp.net.2", "txt_mlp.net.2"}
        assert lean < whole


def test_a_layer_whose_gate_is_trained_is_recomputed():
    targets = ["to_q", "img_mod.1", "txt_mod.1", "img_mlp.net.2", "txt_mlp.net.2"]
    pipe, step = with_lora("QwenImage", target_modules=targets)
    expected, _ = step("none")
    found, _ = step("block")
    assert skipped_layers(pipe) == set()
    assert (found - expected).norm() <= 1e-6 * expected.norm()


def test_step_checkpointing_stores_one_call_whatever_the_steps():
    pipe = frozen("QwenImage")
    two, three = (saved_bytes(pipe, "QwenImage", "none", steps) for steps in (2, 3))
    one = three - two
    stored = {steps: saved_bytes(pipe, "QwenImage", "step", steps) for steps in (2, 4, 8)}
    assert stored[2] == pytest.approx(two - one, rel=0.05)
    assert stored[8] - stored[2] < 0.2 * one


@pytest.mark.parametrize("mode", ["block", "selective"])
def test_offloading_keeps_the_inputs_of_blocks_elsewhere_and_the_gradient(mode, monkeypatch):
    pipe = frozen("QwenImage")
    latents = rollout(pipe, **call("QwenImage"), generator=generators())
    weights = torch.randn(latents.shape, generator=generators()[0])
    expected = gradient(pipe, latents, weights)
    moved = []
    empty = torch.empty

    def watched(*args, pin_memory=None, **kwargs):
        if pin_memory is not None:  # where save_on_cpu moves to
            moved.append(tuple(args[0]))
        return empty(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", watched)
    arguments = call("QwenImage") | {"checkpointing": mode, "offload": True}
    saved = rollout(pipe, **arguments, generator=generators())
    hidden = pipe.transformer.inner_dim
    blocks = len(pipe.transformer.transformer_blocks)
    assert torch.equal(saved, latents)
    found = gradient(pipe, saved, weights)
    inputs = [shape for shape in moved if len(shape) == 3 and shape[-1] == hidden]
    assert len(inputs) == 2 * blocks * 3  # image and text of every block and step
    assert (found - expected).norm() <= 1e-6 * expected.norm()


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
        ({"checkpointing": "all"}, "checkpointing must be one of none, block, selective, step"),
        (
            {"offload": True},
            r"and checkpointing none stores none; use block or selective",
        ),
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
