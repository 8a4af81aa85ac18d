"""A step counted without weights is the step that trains."""

import pytest
import torch
from tiny_pipelines import CALL_KWARGS
from torch.utils.flop_counter import FlopCounterMode

from lit_distill import load_pipeline, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.compute.fused_lora import use_fused_lora
from lit_distill.compute.precision import compute_in
from lit_distill.pipelines.components import denoisers
from lit_distill.planning import counter
from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.fake_step import FakeStudent
from lit_distill.planning.planner import MODES
from lit_distill.planning.settings import TrainingSettings
from lit_distill.preflight.memory import LiveBytes
from lit_distill.training.throughput import CPU_ATTENTION

FAMILIES = ["QwenImage", "Flux", "StableDiffusion3", "StableDiffusionXL", "ZImage", "Wan"]
TOKENS = 24


def settings(name, times, **changes):
    call = dict(CALL_KWARGS[name])
    size = {"height": call.pop("height") * times, "width": call.pop("width") * times}
    plain = {"num_inference_steps": 3, "prompt_tokens": TOKENS, "call_kwargs": call}
    return TrainingSettings(**({"lora": {"r": 4}} | plain | size | changes))


class RealStudent:
    """The student as training loads it, its steps counted by other counters."""

    def __init__(self, folder, settings, fake):
        self.settings, self.fake = settings, fake
        self.pipe = load_pipeline(folder, torch_dtype=settings.torch_dtype)
        dtypes = {
            key: {name: p.dtype for name, p in denoiser.named_parameters()}
            for key, denoiser in denoisers(self.pipe).items()
        }
        make_trainable(self.pipe, settings.lora and dict(settings.lora))
        for key, denoiser in denoisers(self.pipe).items():
            use_fused_lora(denoiser)
            compute_in(denoiser, dtypes[key], getattr(torch, settings.torch_dtype))
        self.loss("block")  # the number of blocks is known from the second rollout on

    def loss(self, mode):
        def real(value):
            if isinstance(value, list):
                return [real(each) for each in value]
            return torch.randn(value.shape, dtype=value.dtype)

        call = self.fake.call(self.settings.batch_size)
        embeds = {key: value for key, value in call.items() if "embeds" in key}
        call |= {key: real(value) for key, value in embeds.items() if "mask" not in key}
        latents = rollout(
            self.pipe, grad_steps=self.settings.grad_steps, checkpointing=mode, **call
        )
        return (latents.float() - torch.zeros(latents.shape)).square().mean()

    def step(self, mode):
        with LiveBytes() as live:
            self.loss(mode).backward()
        self.clear()
        with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as flops:
            self.loss(mode).backward()
        self.clear()
        return live.peak, flops.get_total_flops()

    def clear(self):
        for denoiser in denoisers(self.pipe).values():
            denoiser.zero_grad()


@pytest.fixture(autouse=True)
def exact_sizes(monkeypatch):
    monkeypatch.setattr(counter, "GRANULE", 1)


def compare(folder, chosen, modes=MODES):
    blueprint = Blueprint.read(folder)
    fake = FakeStudent(blueprint, chosen, [])
    real = RealStudent(folder, chosen, fake)
    for mode in modes:
        found = fake.step(mode, "cpu")
        peak, flops = real.step(mode)
        planned = max(value for key, value in found.items() if isinstance(key, tuple))
        assert found["flops"] == flops, mode
        assert planned == pytest.approx(peak, rel=0.02), mode


@pytest.mark.parametrize("times", [1, 3])
@pytest.mark.parametrize("name", FAMILIES)
def test_memory_and_flops_are_those_of_the_real_step(name, times, folder):
    compare(folder(name), settings(name, times))
