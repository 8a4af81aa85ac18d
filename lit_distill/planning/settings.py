"""What a plan depends on, as plain values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class TrainingSettings:
    """What of the settings of a training its memory and compute depend on.

    Attributes:
        torch_dtype: Data type of the frozen weights, by name.
        lora: Fields of `peft.LoraConfig`; None trains the whole denoiser.
        lora_per_step: Number of steps that have a LoRA each.
        freeze: Patterns of parameters that are not trained.
        quantization: Backend and arguments of diffusers' quantizer of the frozen weights.
        height: Height of an image in pixels; None: the pipeline's own.
        width: Width of an image in pixels; None: the pipeline's own.
        batch_size: Samples of a batch and device.
        rollout_batch_size: Samples that are generated together; None: all of a batch.
        num_inference_steps: Steps of the student.
        cfg_scale: Guidance of the student, 1 = off.
        grad_steps: The last steps that the gradient goes through; None: all.
        trajectory: Whether every state has a loss and the gradient ends at each step.
        offload_activations: Whether the inputs of blocks are kept in the host's memory.
        prompt_tokens: Length of a prompt; None: the longest that the pipeline takes.
        call_kwargs: Fixed arguments of the pipeline's call.
        scheduler: Fields of the scheduler's configuration that the student's differs in.
        accumulate: Batches of an optimizer step.
        ema: Whether an average of what trains is kept.
        shards: Devices that share the denoiser (FSDP2).
        replicas: Devices that hold the same weights (DDP).
    """

    torch_dtype: str = "bfloat16"
    lora: Mapping[str, Any] | None = None
    lora_per_step: int | None = None
    freeze: Sequence[str] = ()
    quantization: Mapping[str, Any] | None = None
    height: int | None = None
    width: int | None = None
    batch_size: int = 1
    rollout_batch_size: int | None = None
    num_inference_steps: int = 4
    cfg_scale: float = 1.0
    grad_steps: int | None = None
    trajectory: bool = False
    offload_activations: bool = False
    prompt_tokens: int | None = None
    call_kwargs: Mapping[str, Any] = field(default_factory=dict)
    scheduler: Mapping[str, Any] | None = None
    accumulate: int = 1
    ema: bool = False
    shards: int = 1
    replicas: int = 1
