"""A rollout is the pipeline's own `__call__`, run with gradients on.

Direct Distillation (DiffSynth-Studio's `DirectDistillLoss`; the regression of Luhman & Luhman,
arXiv:2101.02388, back-propagated through every step of the student) needs a differentiable
denoising loop. The loops in diffusers are differentiable except for a `torch.no_grad` decorator. So
no family's loop is written again here, and training equals inference by construction, including the
schedule.

`run_pipeline` calls the pipeline with three hooks, none of which depends on the family:

1. The scheduler (`hooks.observed_scheduler`). The result of a rollout is the output of the last
   `scheduler.step`, since each family unpacks or rescales what it returns for
   ``output_type="latent"`` in its own way.
2. The denoisers' `forward` (`_hooked_denoiser`), replaced on the instance so that module hooks, for
   example FSDP2's, still run around it. It adds activation checkpointing, truncated
   back-propagation and the LoRA of each step.
3. The call itself (`hooks.undecorated_call`), without `torch.no_grad` and progress bar.

`switch_adapters_per_step` installs the first two hooks permanently, for the plain `pipe()`.
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
    BlockCheckpointing,
    Checkpointing,
    check_mode,
)
from lit_distill.compute.step_adapters import StepAdapters
from lit_distill.errors import InputError
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
    """Sample with the pipeline's own loop and return its final latents, differentiably.

    Call it under `torch.no_grad` to sample without a graph, for example from the teacher.

    Args:
        pipe: Any diffusers pipeline. Freeze what is not trained: the graph reaches every
            parameter that requires gradients.
        num_inference_steps: Number of denoising steps, >= 1.
        generator: One generator per sample; the pipeline samples its initial noise from them.
        cfg_scale: Classifier-free guidance, the textbook scale in every family, >= 1.
            1 means off: exactly one denoiser call per step.
        grad_steps: Back-propagate through the last `grad_steps` steps only. None: all steps.
        checkpointing: What is recomputed in the backward pass instead of stored: ``"none"``;
            ``"block"``, the denoiser's blocks; ``"selective"``, the blocks except their attention;
            ``"step"``, every denoiser call but the last; ``"nested"``, every call and, within it,
            its blocks, so that memory does not grow with the number of steps.
        offload: Store the blocks' inputs in host memory, with ``"block"`` or ``"selective"``.
        **call_kwargs: Passed to the pipeline's `__call__`: ``prompt``, ``height``, ...

    Returns:
        The output of the last ``scheduler.step``, in the pipeline's own layout: for example
        (B, tokens, channels) for QwenImage and Flux, (B, C, H/8, W/8) for SD3 and SDXL. Use
        `LatentCodec` to convert it to the VAE's layout.

    Raises:
        ValueError: If an argument is out of range or the pipeline cannot take it.
        RuntimeError: If the pipeline never called its scheduler's `step`.
    """
    state, _ = run_pipeline(
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
    return state.latents


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
    """Sample as `pipe()` does and return the exact final latents together with the images.

    Args:
        pipe: Any diffusers pipeline.
        num_inference_steps: Number of denoising steps, >= 1.
        generator: One generator per sample.
        cfg_scale: Classifier-free guidance, the textbook scale, >= 1; 1 means off.
        on_step: Called after each step.
        **call_kwargs: Passed to the pipeline's `__call__`: ``prompt``, ``height``, ...

    Returns:
        The final latents as `rollout` returns them, and the decoded images: a list of B
        `PIL.Image.Image`, or of B lists of frames for a video pipeline.

    Raises:
        ValueError: If an argument is out of range or the pipeline cannot take it.
    """
    state, images = run_pipeline(
        pipe,
        num_inference_steps=num_inference_steps,
        generator=generator,
        cfg_scale=cfg_scale,
        on_step=on_step,
        output_type="pil",
        **call_kwargs,
    )
    return state.latents, images


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
    """Call the pipeline with the hooks of a rollout.

    Returns:
        The final state of the loop, and the pipeline's output of type `output_type`.

    Raises:
        ValueError: If an argument is out of range or the pipeline cannot take it.
        RuntimeError: If the pipeline never called its scheduler's `step`.
    """
    if num_inference_steps < 1:
        raise InputError(f"num_inference_steps must be >= 1, got {num_inference_steps}")
    if grad_steps is not None and not grad_steps >= 1:
        raise InputError(f"grad_steps must be >= 1 or None (all steps), got {grad_steps}")
    check_mode(checkpointing, offload)
    # Lists are copied: Z-Image's pipeline writes its chat template into the caller's prompts.
    call_kwargs = {k: list(v) if isinstance(v, list) else v for k, v in call_kwargs.items()}
    output: Any = (None,)
    with ExitStack() as stack:
        call_kwargs |= stack.enter_context(guidance(pipe, cfg_scale, len(generator), call_kwargs))
        if cfg_scale == 1:
            call_kwargs.pop("negative_prompt", None)  # unused, and QwenImage warns about it
        state = stack.enter_context(observed_scheduler(pipe, on_step))
        for denoiser in denoisers(pipe).values():
            hook = _hooked_denoiser(denoiser, state, grad_steps, checkpointing, offload)
            stack.enter_context(hook)
        if output_type == "latent":
            stack.enter_context(optional_tail(state))
        output = undecorated_call(pipe)(
            num_inference_steps=num_inference_steps,
            generator=list(generator),
            output_type=output_type,
            return_dict=False,
            **call_kwargs,
        )
    if not state.done:
        raise RuntimeError(f"{type(pipe).__name__} never called scheduler.step")
    return state, output[0]


def switch_adapters_per_step(pipe: DiffusionPipeline) -> None:
    """Make the plain `pipe()` use the LoRA of each step, as `rollout` does."""
    cls: Any = type(pipe)
    if getattr(cls, "_switches_adapters", False):
        return

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        with ExitStack() as stack:
            state = stack.enter_context(observed_scheduler(self))
            for denoiser in denoisers(self).values():
                stack.enter_context(_hooked_denoiser(denoiser, state, None, "none", False))
            return cls.__call__(self, *args, **kwargs)

    replace_call(pipe, call, _switches_adapters=True)


@contextmanager
def _hooked_denoiser(
    denoiser: Any,  # noqa: ANN401
    state: LoopState,
    grad_steps: int | None,
    checkpointing: Checkpointing,
    offload: bool,
) -> Iterator[None]:
    """Add checkpointing, truncated back-propagation and per-step LoRA to a denoiser's forward."""
    original_forward = denoiser.forward
    step_adapters = StepAdapters.of(denoiser)
    blocks = None
    if checkpointing in BLOCKWISE_MODES:
        blocks = BlockCheckpointing(
            denoiser,
            original_forward,
            keep_attention=checkpointing == "selective",
            offload=offload,
        )

    def forward(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        state.calls += 1
        # Steps are counted by the scheduler: guidance may call the denoiser twice per step.
        bind_step = partial(step_adapters.bind_step, state.done, state.total)
        if not torch.is_grad_enabled():
            return bind_step(original_forward)(*args, **kwargs)
        if grad_steps is not None and state.done < state.total - grad_steps:
            with torch.no_grad():
                return bind_step(original_forward)(*args, **kwargs)
        last = state.at_last_call
        nested = checkpointing == "nested"
        call = original_forward
        if blocks is not None:
            # With nested, each call is the most recent one when the backward pass recomputes it.
            call = partial(blocks.forward, nested or last)
        call = bind_step(call)
        # The backward pass starts with the last call, so recomputing that one saves no memory.
        if nested or (checkpointing == "step" and not last):
            # Cloned because Kandinsky5's video pipeline updates its latents in place.
            args, kwargs = tree_map_only(Tensor, Tensor.clone, (args, kwargs))
            return checkpoint(call, *args, use_reentrant=False, **kwargs)
        return call(*args, **kwargs)

    with replaced_forward(denoiser, forward):
        yield
