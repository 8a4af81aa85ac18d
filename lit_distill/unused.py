"""Parameters that no gradient reaches, such as the text branch of Qwen-Image's last block."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from lit_distill.families import denoisers
from lit_distill.rollout import rollout

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def freeze_unused(pipe: DiffusionPipeline, **call_kwargs: Any) -> list[str]:  # noqa: ANN401
    """Freeze the trainable parameters that a rollout's result does not depend on.

    ``strategy: ddp`` would wait for their gradients for ever. To be called before the trainer wraps
    the module, thus from `configure_model`, and on every rank alike; sharded denoisers are fine.

    Args:
        pipe: The pipeline, on the device that it trains on.
        **call_kwargs: Arguments of `rollout` for one sample, but for steps and generator.

    Returns:
        Names of the parameters frozen, ``transformer.transformer_blocks.59.txt_mlp...``.
    """
    with torch.enable_grad():
        generator = [torch.Generator().manual_seed(0)]
        latents = rollout(pipe, num_inference_steps=2, generator=generator, **call_kwargs)
        if not latents.requires_grad:
            return []  # preflight says it better
        torch.autograd.backward(latents.float().square().mean())
    frozen = []
    for key, denoiser in denoisers(pipe).items():
        for name, parameter in denoiser.named_parameters():
            if parameter.requires_grad and parameter.grad is None:
                parameter.requires_grad_(False)
                frozen.append(f"{key}.{name}")
            parameter.grad = None
    return frozen
