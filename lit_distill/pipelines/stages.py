"""A pipeline's call in stages, so that its components share a device one after the other.

The stages together are bit for bit the pipeline's call: each runs the same code, and what an
earlier stage has computed is put in where it belongs.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.hooks import LoopState, StepCallback, replaced_forward
from lit_distill.pipelines.rollout import run_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


Offload = Literal["none", "model", "group"]
"""What is on the device at a time: all components; one after the other; parts of one."""


def check_offload(offload: Offload, device: torch.device) -> None:
    """Check that weights can be offloaded from this device.

    Raises:
        InputError: If they can't.
    """
    if offload == "group" and device.type == "cpu":
        raise InputError(
            "offload group: it moves parts of a network between host memory and an accelerator, "
            "but this run is on the CPU (trainer.accelerator); use model, which loads the "
            "components one after the other, or none"
        )


def enable_offload(pipe: DiffusionPipeline, device: torch.device, offload: Offload) -> None:
    """Let diffusers move the components of a pipeline to the device whenever they compute.

    Args:
        pipe: The pipeline, in host memory.
        device: Where it computes.
        offload: model or group.

    Raises:
        InputError: If diffusers does not know the order of this pipeline's components.
    """
    if offload == "model":
        if pipe.model_cpu_offload_seq is None:
            raise InputError(
                f"offload model: diffusers does not know the order of {type(pipe).__name__}'s "
                "components; use group or none"
            )
        pipe.enable_model_cpu_offload(device=device)
    else:
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                offload_groups(component, device)


def offload_groups(network: nn.Module, device: torch.device) -> None:
    """Let diffusers move each layer of a network to the device while it computes."""
    from diffusers.hooks import apply_group_offloading

    stream = device.type == "cuda"  # the next layer's weights are copied meanwhile
    apply_group_offloading(network, device, offload_type="leaf_level", use_stream=stream)


def encoders(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    """Return the networks that a pipeline needs only before its denoisers, by name.

    None for pipelines without `encode_prompt`, whose results can't be kept.
    """
    order = (pipe.model_cpu_offload_seq or "").split("->")
    first = min((order.index(name) for name in denoisers(pipe) if name in order), default=0)
    if not callable(getattr(pipe, "encode_prompt", None)):
        return {}
    components = {name: pipe.components.get(name) for name in order[:first]}
    return {
        name: component
        for name, component in components.items()
        if isinstance(component, nn.Module) and not hasattr(component, "decode")
    }


@dataclass(frozen=True)
class Denoised:
    """The result of `denoise`, in host memory.

    Attributes:
        latents: The final latents, (B, ...), as `rollout` returns them.
        predictions: The last output of each denoiser, by name. The decoding stage needs their
            shape.
    """

    latents: Tensor
    predictions: dict[str, Any]


@torch.no_grad()
def denoise(
    pipe: DiffusionPipeline,
    *,
    on_step: StepCallback | None = None,
    **call: Any,  # noqa: ANN401
) -> Denoised:
    """Return what `decode` needs to return the images of a call of the pipeline.

    Args:
        pipe: The pipeline; its VAE's decoder is not called.
        on_step: Called after each step.
        **call: Arguments of `run_pipeline`.
    """
    predictions: dict[str, Any] = {}

    def keep(name: str, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        predictions[name] = forward(*args, **kwargs)
        return predictions[name]

    with ExitStack() as stack:
        for name, denoiser in denoisers(pipe).items():
            hook = partial(keep, name, denoiser.forward)
            stack.enter_context(replaced_forward(denoiser, hook))
        state, _ = run_pipeline(pipe, output_type="latent", on_step=on_step, **call)
    return Denoised(*tree_map_only(Tensor, Tensor.cpu, (state.latents, predictions)))


@torch.no_grad()
def decode(
    pipe: DiffusionPipeline,
    denoised: Denoised,
    device: torch.device,
    **call: Any,  # noqa: ANN401
) -> list[Any]:
    """Return the images of `denoise`, (B), as the pipeline's call does.

    Args:
        pipe: The pipeline; its denoisers do not compute.
        denoised: The result of `denoise`.
        device: Where the pipeline computes.
        **call: The same arguments, with new generators of the same seeds.
    """
    latents, predictions = tree_map_only(
        Tensor, lambda tensor: tensor.to(device), (denoised.latents, denoised.predictions)
    )

    def final(state: LoopState, sample: Tensor) -> Tensor:
        return latents if state.done == state.total - 1 else sample

    with ExitStack() as stack:
        for name, denoiser in denoisers(pipe).items():
            known = partial(_return, predictions.get(name))
            stack.enter_context(replaced_forward(denoiser, known))
        _, images = run_pipeline(pipe, output_type="pil", on_step=final, **call)
    result: list[Any] = images
    return result


def _return(value: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
    return value
