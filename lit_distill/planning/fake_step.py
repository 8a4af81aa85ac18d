"""A training step of a pipeline without weights, counted operation by operation."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from lit_distill.adapters.inject import make_trainable, trained_parameters
from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.compute.precision import compute_in
from lit_distill.compute.repeated_blocks import repeated_blocks
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers, override_scheduler_config
from lit_distill.pipelines.rollout import rollout, run_pipeline
from lit_distill.pipelines.trajectory import trajectory
from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.counter import Counter
from lit_distill.planning.device_operations import Device, operations_of
from lit_distill.planning.fake_pipeline import FakePipeline
from lit_distill.planning.settings import TrainingSettings
from lit_distill.planning.storage import gathered_bytes, largest_linear, weight_bytes

Figures = dict[Any, float]
"""What was counted, by name; ``("forward" | "backward", ...)`` is the peak of a segment."""


class FakeStudent:
    """A student without weights, whose training steps and samples can be counted.

    Args:
        blueprint: The pipeline's configurations.
        settings: What trains, and how.
        freeze: Patterns of parameters that are frozen, as they read in this pipeline.
    """

    def __init__(self, blueprint: Blueprint, settings: TrainingSettings, freeze: list[str]) -> None:
        from lit_distill.compute.fused_lora import use_fused_lora  # peft is slow to import

        self.settings = settings
        self.fake = FakePipeline(blueprint, getattr(torch, settings.torch_dtype))
        self.pipe = pipe = self.fake.pipe
        lora = None if settings.lora is None else dict(settings.lora)
        make_trainable(pipe, lora, freeze, lora_per_step=settings.lora_per_step)
        pipe.scheduler = override_scheduler_config(pipe, dict(settings.scheduler or {}))
        for key, denoiser in denoisers(pipe).items():
            self.fake.fake_real(denoiser)
            if not settings.quantization:  # quantised layers have LoRA layers of their own
                use_fused_lora(denoiser)
            if settings.shards > 1:
                self._shard(denoiser)
            else:
                compute_in(denoiser, self.fake.dtypes[key], self.fake.dtype)
        self._warm = False

    def _shard(self, denoiser: nn.Module) -> None:
        """Compute with gathered weights in the base data type; gradients are sharded at once."""
        for parameter in denoiser.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.to(self.fake.dtype)
                parameter.register_post_accumulate_grad_hook(_free_gradient)  # type: ignore[no-untyped-call]

    # What does not depend on the checkpointing mode

    def weights(self) -> Figures:
        """Return the bytes of frozen weights and of float32 trained ones."""
        models = denoisers(self.pipe).values()
        trained = sum(4.0 * p.numel() for p in trained_parameters(self.pipe).values())
        figures: Figures = {
            "weights": sum(weight_bytes(m, self.settings.quantization) for m in models),
            "trained": trained,
            "dequantised": max(map(largest_linear, models)) if self.settings.quantization else 0.0,
            "gathered": 0.0,
        }
        if self.settings.shards > 1:
            figures["gathered"] = sum(gathered_bytes(m, self.fake.dtype) for m in models)
        return figures

    # Runs

    def call(self, batch_size: int, **changes: Any) -> dict[str, Any]:  # noqa: ANN401
        """Return the arguments of `lit_distill.rollout` for a batch."""
        settings = self.settings
        sides = {"height": settings.height, "width": settings.width}
        options = {
            "num_inference_steps": settings.num_inference_steps,
            "cfg_scale": settings.cfg_scale,
            **{name: side for name, side in sides.items() if side is not None},
            **changes,
        }
        prompts = self.fake.prompt_arguments(
            batch_size, settings.prompt_tokens, negative=options["cfg_scale"] > 1
        )
        fixed = {k: v for k, v in settings.call_kwargs.items() if k != "negative_prompt"}
        generators = [torch.Generator().manual_seed(seed) for seed in range(batch_size)]
        return {**fixed, **prompts, **options, "generator": generators}

    def step(
        self,
        mode: Checkpointing,
        device: Device = "cuda",
        *,
        batch_size: int | None = None,
        grad_steps: int | None = None,
        **changes: Any,  # noqa: ANN401
    ) -> Figures:
        """Return what a training step allocates and computes.

        Args:
            mode: Checkpointing mode.
            device: Whose operations are counted.
            batch_size: Samples; default: those of the settings.
            grad_steps: Default: those of the settings.
            **changes: Arguments of the pipeline's call that differ from the settings.
        """
        if not self._warm:  # the number of blocks is known from the second rollout on
            self._warm = True
            self._rollout("block" if self._has_blocks() else "none", 1, grad_steps, device, changes)
        size = batch_size or self.settings.batch_size
        grad_steps = grad_steps or self.settings.grad_steps
        counter = Counter()
        with ExitStack() as stack:
            stack.enter_context(operations_of(device))
            stack.enter_context(counter)
            segments = stack.enter_context(_segments(counter, self.pipe))
            latents = self._parts(mode, size, grad_steps, changes)
            loss = (latents.float() - torch.zeros(latents.shape)).square().mean()
            figures: Figures = {"saved": counter.now, "forward_flops": counter.flops}
            del latents
            segments.begin_backward()
            loss.backward()  # type: ignore[no-untyped-call]
        del loss
        figures["flops"] = counter.flops
        figures["gradients"] = self._take_gradients()
        gc.collect()
        return figures | counter.peaks

    def default_size(self) -> tuple[int, int]:
        """Return the height and width in pixels of the pipeline's own choice.

        Raises:
            InputError: If only its call knows them.
        """
        pipe = self.pipe
        scale = getattr(pipe, "vae_scale_factor", None)
        edge = getattr(pipe, "default_sample_size", None)
        edge = edge or next(iter(denoisers(pipe).values())).config.get("sample_size")
        if not scale or not isinstance(edge, int):
            raise InputError(
                f"{type(pipe).__name__} has no default size: set --height and --width, or "
                "data.height and data.width"
            )
        return edge * scale, edge * scale

    def _has_blocks(self) -> bool:
        models = denoisers(self.pipe).values()
        return all(getattr(m, "_supports_gradient_checkpointing", False) for m in models)

    def _rollout(
        self,
        mode: Checkpointing,
        batch_size: int,
        grad_steps: int | None,
        device: Device,
        changes: Mapping[str, Any],
    ) -> None:
        with operations_of(device):
            self._parts(mode, batch_size, grad_steps, {**changes, "num_inference_steps": 2})
        gc.collect()

    def _parts(
        self,
        mode: Checkpointing,
        batch_size: int,
        grad_steps: int | None,
        changes: Mapping[str, Any],
    ) -> Tensor:
        """Return final latents, or the states of all steps, of a batch."""
        together = min(self.settings.rollout_batch_size or batch_size, batch_size)
        options: dict[str, Any] = {"checkpointing": mode}
        options["offload"] = self.settings.offload_activations and mode in ("block", "selective")
        parts = []
        for first in range(0, batch_size, together):
            call = self.call(min(together, batch_size - first), **changes)
            if self.settings.trajectory:
                parts.append(trajectory(self.pipe, **call, **options).states)
            else:
                parts.append(rollout(self.pipe, grad_steps=grad_steps, **call, **options))
        return torch.cat(parts, 1 if self.settings.trajectory else 0)

    def _take_gradients(self) -> float:
        total = 0.0
        for parameter in trained_parameters(self.pipe).values():
            if parameter.grad is not None:
                total += parameter.grad.nbytes
                parameter.grad = None
        return total

    @torch.no_grad()
    def sample(self, batch_size: int, output_type: str, **changes: Any) -> Figures:  # noqa: ANN401
        """Return what two steps without gradients take, with the decoding if that is asked for."""
        counter = Counter()
        counter.enter(["sample"])
        with operations_of("cuda"), counter:
            call = self.call(batch_size, **{**changes, "num_inference_steps": 2})
            run_pipeline(self.pipe, output_type=output_type, **call)
        gc.collect()
        return {"sample": counter.peak, "flops": counter.flops}

    @torch.no_grad()
    def encode(self, batch_size: int) -> Figures:
        """Return what the VAE takes to encode images of the settings' size."""
        settings, vae = self.settings, self.pipe.vae
        counter = Counter()
        counter.enter(["encode"])
        assert settings.height and settings.width
        shape: tuple[int, ...] = (batch_size, 3, settings.height, settings.width)
        if "temperal_downsample" in vae.config:  # Wan's and Qwen-Image's: an image is a frame
            shape = (batch_size, 3, 1, settings.height, settings.width)
        with operations_of("cuda"), counter:
            vae.encode(self.fake.empty(*shape, dtype=next(vae.parameters()).dtype))
        gc.collect()
        return {"encode": counter.peak, "flops": counter.flops}


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None


class _Segments:
    """Tells a counter which part of the step runs: of which denoiser call, around which block."""

    def __init__(self, counter: Counter) -> None:
        self.counter = counter
        self.call = 0
        self.forward = True
        counter.enter([("forward", 0, "begin")])

    def begin_backward(self) -> None:
        self.forward = False
        self.counter.enter([("backward", "loss")])

    def on_call(self, *_: Any) -> None:  # noqa: ANN401
        if self.forward:
            self.call += 1
            self.counter.enter([("forward", self.call, "begin")])

    def on_block(self, places: list[Any], *_: Any) -> None:  # noqa: ANN401
        if self.forward:
            self.counter.enter([("forward", self.call, *place) for place in places])

    def after(self, places: list[Any], module: Any, args: Any, output: Any) -> None:  # noqa: ANN401
        if not self.forward:
            return
        # What follows a block or a whole call until the next one begins.
        self.counter.enter([("forward", self.call, places[0][0], "after")])
        back = partial(self._on_backward, [("backward", self.call, *place) for place in places])
        for tensor in tree_leaves(output):
            if isinstance(tensor, Tensor) and tensor.grad_fn is not None:
                tensor.grad_fn.register_prehook(back)

    def _on_backward(self, names: list[Any], *_: Any) -> None:  # noqa: ANN401
        self.counter.enter(names)


@contextmanager
def _segments(counter: Counter, pipe: Any) -> Iterator[_Segments]:  # noqa: ANN401
    """Let the counter know where a step is.

    The peak of each segment is linear in the number of layers, while the peak of the whole step is
    the largest of them and is not: another segment may be the largest in a deeper denoiser.
    """
    segments = _Segments(counter)
    hooks: list[Any] = []
    try:
        for denoiser in denoisers(pipe).values():
            hooks.append(denoiser.register_forward_pre_hook(segments.on_call))
            whole: list[Any] = [("output",)]
            hooks.append(denoiser.register_forward_hook(partial(segments.after, whole)))
            for name, blocks in repeated_blocks(denoiser).items():
                for index, block in enumerate(blocks):
                    places = _places(name, index, len(blocks))
                    hooks.append(
                        block.register_forward_pre_hook(partial(segments.on_block, places))
                    )
                    hooks.append(block.register_forward_hook(partial(segments.after, places)))
        yield segments
    finally:
        for hook in hooks:
            hook.remove()


def _places(name: str, index: int, length: int) -> list[Any]:
    """Return the names of a block's place: those where the peak may be, and between them.

    Memory rises or falls evenly from the second block to the last but one.
    """
    places = {"first": 0, "second": 1, "last but one": length - 2, "last": length - 1}
    named = [(name, place) for place, number in places.items() if number == index]
    return named or [(name, "between")]
