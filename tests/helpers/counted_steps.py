"""Training steps of real tiny pipelines, counted, beside those that are planned without weights."""

import torch
from tiny_pipelines import CALL_KWARGS

from lit_distill import load_pipeline, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.compute.fused_lora import use_fused_lora
from lit_distill.compute.precision import compute_in
from lit_distill.pipelines.components import denoisers
from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.counter import Counter
from lit_distill.planning.fake_step import FakeStudent
from lit_distill.planning.settings import TrainingSettings

FAMILIES = ["QwenImage", "Flux", "StableDiffusion3", "StableDiffusionXL", "ZImage", "Wan"]
TOKENS = 24


def settings(name, times, **changes):
    """Settings of a family's tiny pipeline, its images `times` as high and wide."""
    call = dict(CALL_KWARGS[name])
    size = {"height": call.pop("height") * times, "width": call.pop("width") * times}
    plain = {"num_inference_steps": 3, "prompt_tokens": TOKENS, "call_kwargs": call}
    return TrainingSettings(**({"lora": {"r": 4}} | plain | size | changes))


class RealStudent:
    """A student as training loads it, with random prompts."""

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
        """Count a step of real tensors."""
        with Counter() as counter:
            self.loss(mode).backward()
        for denoiser in denoisers(self.pipe).values():
            denoiser.zero_grad()
        return counter


def planned_and_real(folder, settings, modes):
    """Yield mode, planned peak, real peak, planned FLOPs and real FLOPs."""
    fake = FakeStudent(Blueprint.read(folder), settings, [])
    real = RealStudent(folder, settings, fake)
    for mode in modes:
        found = fake.step(mode, "cpu")
        counted = real.step(mode)
        peak = max(value for key, value in found.items() if isinstance(key, tuple))
        yield mode, peak, counted.peak, found["flops"], counted.flops
