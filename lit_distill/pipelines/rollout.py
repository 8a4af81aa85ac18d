"""The one idea: a rollout is the pipeline's own `__call__`, run with gradients on.

Direct Distillation (DiffSynth-Studio's `DirectDistillLoss`; the regression of Luhman & Luhman,
arXiv:2101.02388, back-propagated through every step of the student) needs the denoising loop to
be differentiable. diffusers' loops are, but for a `torch.no_grad` decorator. So nothing about a
family's loop is written again here: training equals inference by construction, schedule and all.

Three taps, none of which knows a family, are laid while the pipeline runs:

1. A fresh scheduler, because multistep ones keep graph tensors, whose `step` is watched: the
   result of a rollout is the output of the last step. What a pipeline returns for
   ``output_type="latent"`` is unpacked, rescaled or not, as each family likes.
2. The denoisers' `forward`, wrapped on the instance (so that module hooks, FSDP2's for example,
   still run around it), for activation checkpointing and truncated back-propagation.
3. The progress bar, no_progress_bar.

Where the student has a LoRA for every step, the second hook also switches them; `switch_by_step`
lays it around the plain `pipe()`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only
from torch.utils.checkpoint import checkpoint

from lit_distill.compute.activation_checkpointing import (
    BLOCKWISE_MODES,
    Blocks,
    Checkpointing,
    check_mode,
)
from lit_distill.compute.step_adapters import StepAdapters
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import guidance
from lit_distill.pipelines.hooks import (
    LoopState,
    StepCallback,
    observed_scheduler,
    optional_tail,
    replace_call,
    replaced_forward,
    undecorated_call,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def rollout(
    pipe: DiffusionPipeline,
    *,
    num_inference_steps: int,
    generator: Sequence[torch.Generator],
    cfg_scale: float = 1.0,
    grad_steps: int | None = None,
    checkpointing: Checkpointing = "none",
    offload: bool = False,
    **call_kwargs: Any,  # noqa: ANN401
) -> Tensor:
    """Draw with the pipeline's own loop and return its final latents, differentiably.

    Whether a graph is built is the caller's choice: under `torch.no_grad` this is the teacher.

    Args:
        pipe: Any diffusers pipeline. Freeze what is not trained; the graph reaches every
            parameter that requires gradients.
        num_inference_steps: Number of denoising steps, >= 1.
        generator: One generator a sample; the pipeline draws its start noise from them.
        cfg_scale: Classifier-free guidance, the textbook scale in every family, >= 1.
            1 means off: exactly one denoiser call a step.
        grad_steps: Back-propagate through the last `grad_steps` steps only (None: all).
        checkpointing: What is recomputed in the backward pass instead of stored: ``"none"``;
            ``"block"``, the denoiser's blocks; ``"selective"``, these but for their attention;
            ``"step"``, each denoiser call but the last; ``"nested"``, each call and, within it, its
            blocks: memory flat in the number of steps.
        offload: Keep the blocks' inputs in the host's memory, with block or selective.
        **call_kwargs: Passed to the pipeline's `__call__`: ``prompt``, ``height``, ...

    Returns:
        The output of the last ``scheduler.step``, in the pipeline's own layout: for example
        (B, tokens, channels) for QwenImage and Flux, (B, C, H/8, W/8) for SD3 and SDXL. Undo
        the layout with `LatentCodec`.

    Raises:
        ValueError: If an argument is out of range or the pipeline cannot take it.
        RuntimeError: If the pipeline never called its scheduler's `step`.
    """
    steps, _ = run_pipeline(
        pipe,
        num_inference_steps=num_inference_steps,
        generator=generator,
        cfg_scale=cfg_scale,
        grad_steps=grad_steps,
        checkpointing=checkpointing,
        offload=offload,
        output_type="latent",
        **call_kwargs,
    )
    return steps.latents


@torch.no_grad()
def sample(
    pipe: DiffusionPipeline,
    *,
    num_inference_steps: int,
    generator: Sequence[torch.Generator],
    cfg_scale: float = 1.0,
    on_step: StepCallback | None = None,
    **call_kwargs: Any,  # noqa: ANN401
) -> tuple[Tensor, list[Any]]:
    """Draw as `pipe()` does and return the exact final latents with the images.

    Args:
        pipe: Any diffusers pipeline.
        num_inference_steps: Number of denoising steps, >= 1.
        generator: One generator a sample.
        cfg_scale: Classifier-free guidance, the textbook scale, >= 1; 1 means off.
        on_step: Sees every step.
        **call_kwargs: Passed to the pipeline's `__call__`: ``prompt``, ``height``, ...

    Returns:
        What `rollout` returns, and what the pipeline made of it: a list of B `PIL.Image.Image`, or
        of B lists of frames.

    Raises:
        ValueError: If an argument is out of range or the pipeline cannot take it.
    """
    steps, images = run_pipeline(
        pipe,
        num_inference_steps=num_inference_steps,
        generator=generator,
        cfg_scale=cfg_scale,
        on_step=on_step,
        output_type="pil",
        **call_kwargs,
    )
    return steps.latents, images


def run_pipeline(
    pipe: DiffusionPipeline,
    *,
    num_inference_steps: int,
    generator: Sequence[torch.Generator],
    cfg_scale: float,
    output_type: str,
    on_step: StepCallback | None = None,
    grad_steps: int | None = None,
    checkpointing: Checkpointing = "none",
    offload: bool = False,
    **call_kwargs: Any,  # noqa: ANN401
) -> tuple[LoopState, Any]:
    """Run the pipeline as `rollout` does; return its finished steps and what it returned itself."""
    if num_inference_steps < 1:
        raise ValueError(f"num_inference_steps must be >= 1, got {num_inference_steps}")
    if grad_steps is not None and not grad_steps >= 1:
        raise ValueError(f"grad_steps must be >= 1 or None (all steps), got {grad_steps}")
    check_mode(checkpointing, offload)
    # Lists are copied, for Z-Image's pipeline writes its chat template into the caller's prompts.
    call_kwargs = {k: list(v) if isinstance(v, list) else v for k, v in call_kwargs.items()}
    output: Any = (None,)
    with ExitStack() as stack:
        call_kwargs |= stack.enter_context(guidance(pipe, cfg_scale, len(generator), call_kwargs))
        if cfg_scale == 1:
            call_kwargs.pop("negative_prompt", None)  # unused, and QwenImage warns about it
        steps = stack.enter_context(observed_scheduler(pipe, on_step))
        for denoiser in denoisers(pipe).values():
            tapped = _hooked_denoiser(denoiser, steps, grad_steps, checkpointing, offload)
            stack.enter_context(tapped)
        if output_type == "latent":
            stack.enter_context(optional_tail(steps))
        output = undecorated_call(pipe)(
            num_inference_steps=num_inference_steps,
            generator=list(generator),
            output_type=output_type,
            return_dict=False,
            **call_kwargs,
        )
    if not steps.done:
        raise RuntimeError(f"{type(pipe).__name__} never called scheduler.step")
    return steps, output[0]


def switch_by_step(pipe: DiffusionPipeline) -> None:
    """Let the plain `pipe()` draw each step with its own LoRA, as `rollout` does by itself."""
    own: Any = type(pipe)
    if getattr(own, "_switches_by_step", False):
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with ExitStack() as stack:
            steps = stack.enter_context(observed_scheduler(self))
            for denoiser in denoisers(self).values():
                stack.enter_context(_hooked_denoiser(denoiser, steps, None, "none", False))
            return own.__call__(self, *args, **kwargs)

    replace_call(pipe, call, _switches_by_step=True)


@contextmanager
def _hooked_denoiser(
    denoiser: Any,  # noqa: ANN401
    steps: LoopState,
    grad_steps: int | None,
    checkpointing: Checkpointing,
    offload: bool,
) -> Iterator[None]:
    """Lay checkpointing, truncation and each step's LoRA around the denoiser's forward."""
    original = denoiser.forward
    loras = StepAdapters.of(denoiser)
    blocks = None
    if checkpointing in BLOCKWISE_MODES:
        keep_attention = checkpointing == "selective"
        blocks = Blocks(denoiser, original, keep_attention=keep_attention, offload=offload)

    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        steps.calls += 1
        # Steps are counted by the scheduler: guidance may call the denoiser twice a step.
        at_step = partial(loras.at, steps.done, steps.total)
        if not torch.is_grad_enabled():
            return at_step(original)(*args, **kwargs)
        if grad_steps is not None and steps.done < steps.total - grad_steps:
            with torch.no_grad():
                return at_step(original)(*args, **kwargs)
        last = steps.at_last_call
        nested = checkpointing == "nested"
        # Run again, each call is the last that has run.
        call = at_step(original if blocks is None else partial(blocks.run, nested or last))
        # The backward pass begins with the last call: to run it again at once would free nothing.
        if nested or (checkpointing == "step" and not last):
            # Cloned, for Kandinsky5's video pipeline updates its latents in place.
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            return checkpoint(call, *args, use_reentrant=False, **kwargs)
        return call(*args, **kwargs)

    with replaced_forward(denoiser, forward):
        yield
