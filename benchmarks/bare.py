"""The training step without Lightning, on a random Qwen-Image transformer of any size."""

from __future__ import annotations

import argparse
import math
from typing import Any

import torch
from counters import CHANNELS, COUNTERS, Bytes, Flops

from lit_distill import load_pipeline, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.compute.fused_lora import use_fused_lora
from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.pipelines.loading import DTYPES
from lit_distill.pipelines.rollout import run_pipeline

HEAD = 128  # width of an attention head, as published
PIXELS = 8  # a token's side in pixels with the embedded VAE


def make_pipeline(options: argparse.Namespace) -> Any:  # noqa: ANN401
    """Return a QwenImagePipeline with a random transformer of the given size."""
    torch.manual_seed(0)
    pipe = load_pipeline("tiny-digits", torch_dtype=options.torch_dtype)
    kind = type(pipe.transformer)
    config = dict(pipe.transformer.config) | {
        "num_layers": options.layers,
        "num_attention_heads": options.width // HEAD,
        "attention_head_dim": HEAD,
        "axes_dims_rope": (16, 56, 56),
    }
    torch.set_default_dtype(DTYPES[options.torch_dtype])
    pipe.register_modules(transformer=kind.from_config(config).eval())
    torch.set_default_dtype(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_prompt(pipe: Any, tokens: int) -> str:  # noqa: ANN401
    """Return a prompt that the pipeline encodes as `tokens` tokens."""
    length = {n: pipe.encode_prompt(" ".join(["red"] * n))[0].shape[1] for n in (1, 2)}
    return " ".join(["red"] * (1 + (tokens - length[1]) // (length[2] - length[1])))


class Bare:
    """The step without Lightning."""

    def __init__(self, pipe: Any, mode: Any, options: argparse.Namespace) -> None:  # noqa: ANN401
        trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
        self.pipe, self.mode, self.options = pipe, mode, options
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        self.target = options.target.to(pipe.transformer.device).expand(options.batch_size, -1, -1)

    def call(self) -> dict[str, Any]:
        """Return the arguments of the rollout."""
        count = self.options.batch_size
        return {
            "prompt": [self.options.prompt] * count,
            "num_inference_steps": self.options.steps,
            "generator": [torch.Generator().manual_seed(0) for _ in range(count)],
            **self.options.size,
        }

    def __call__(self, counter: Bytes | Flops | None = None) -> float:
        """Make a step and return its loss."""
        latents = rollout(self.pipe, checkpointing=self.mode, **self.call())
        loss = (latents.float() - self.target).pow(2).mean()
        if counter:
            counter.forward_done()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    @torch.no_grad()
    def inputs(self) -> dict[str, torch.Tensor]:
        """Return the denoiser's inputs, for another implementation."""
        seen: list[torch.Tensor] = []
        hook = self.pipe.transformer.register_forward_pre_hook(
            lambda module, args, kwargs: seen.append(kwargs["hidden_states"]), with_kwargs=True
        )
        steps, _ = run_pipeline(self.pipe, cfg_scale=1.0, output_type="latent", **self.call())
        hook.remove()
        text = self.pipe.encode_prompt([self.options.prompt], device=seen[0].device)[0]
        sigmas = steps.scheduler.sigmas[:-1].cpu()
        return {"noise": seen[0], "prompt_embeds": text, "target": self.target, "sigmas": sigmas}


def counted(step: Any) -> dict[str, float]:  # noqa: ANN401
    """Make one step for each counter and return the counts."""
    counts: dict[str, float] = {}
    for kind in COUNTERS:
        with kind() as counter:
            step(counter)
        counts |= counter.result()
    return counts


def varied(options: argparse.Namespace, name: str, value: int) -> argparse.Namespace:
    """Return the options with one number changed."""
    other = argparse.Namespace(**vars(options) | {name: value})
    side = math.isqrt(other.image_tokens)
    other.size = {"height": side * PIXELS, "width": side * PIXELS}
    generator = torch.Generator().manual_seed(1)
    other.target = torch.randn(1, other.image_tokens, CHANNELS, generator=generator)
    return other


def bare_step(mode: str, options: argparse.Namespace) -> Bare:
    """Return a step on a new pipeline, with the optimizer's state initialised."""
    pipe = make_pipeline(options)
    make_trainable(pipe, {"r": options.rank})
    use_fused_lora(pipe.transformer)
    EncodeOnce(pipe)
    fields = {"shift_terminal": None}
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **fields)
    if torch.cuda.is_available():
        pipe.to("cuda")
    step = Bare(pipe, mode, options)
    step()
    return step
