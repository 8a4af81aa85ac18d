"""Tiny, randomly initialised, real diffusers pipelines, one per family, made without any download.

Every builder wires the family's own classes (denoiser, VAE, text encoders, tokenizers, scheduler)
at toy widths, with a scheduler configured like the published one and with non-trivial latent
statistics. The tokenizers are made here: byte-level BPEs that know the words of the prompt
templates, and character vocabularies.

    pipe = build("QwenImage")
    pipe(prompt="a cat", num_inference_steps=2, **CALL_KWARGS["QwenImage"])
"""

from __future__ import annotations

import functools
from typing import Any

import tiny_pipelines_embedded  # noqa: F401
import tiny_pipelines_images  # noqa: F401
import tiny_pipelines_more  # noqa: F401
import tiny_pipelines_video  # noqa: F401
import torch
from tiny_pipeline_parts import BUILDERS
from torch import nn


def build(name: str, *, seed: int = 0) -> Any:
    """Builds the tiny pipeline of family `name`: fp32, eval, CPU, the same weights for one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = BUILDERS[name][0]()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _revive(component.float().eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


@torch.no_grad()
def _revive(module: nn.Module, std: float = 0.02) -> None:
    """Gives parameters that are initialised to zero (output layers, gates) small random values."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)


FAMILIES = {name: functools.partial(build, name) for name in BUILDERS}
"""Builder of each family's pipeline, with seed 0."""

CALL_KWARGS = {name: call_kwargs for name, (_, call_kwargs) in BUILDERS.items()}
"""Arguments of each family's smallest sensible sample, besides prompt, steps and generator."""
