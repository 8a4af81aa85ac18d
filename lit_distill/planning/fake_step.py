"""A training step of a pipeline without weights, counted operation by operation."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from lit_distill.adapters.inject import make_trainable, trained_parameters
from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.compute.precision import compute_in
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers, override_scheduler_config
from lit_distill.pipelines.rollout import rollout, run_pipeline
from lit_distill.pipelines.trajectory import trajectory
from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.counter import Counter
from lit_distill.planning.device_operations import GRANULES, Device, operations_of
from lit_distill.planning.fake_pipeline import FakePipeline
from lit_distill.planning.segments import segments
from lit_distill.planning.settings import TrainingSettings
from lit_distill.planning.storage import gathered_bytes, largest_linear, weight_bytes
from lit_distill.preflight.probe import trial_arguments

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

Figures = dict[Any, float]
"""What was counted, by name; ``("forward" | "backward", ...)`` is the peak of a segment."""


class UnplannableError(InputError):
    """The pipeline computes shapes from values, which a plan does not have."""


@contextmanager
def _values_not_needed(pipe: Any) -> Iterator[None]:  # noqa: ANN401
    """Raise an error that a user understands where an operation needs values that are fake."""
    try:
        yield
    except (DynamicOutputShapeException, DataDependentOutputException) as error:
        raise UnplannableError(
            f"{type(pipe).__name__} can't be planned without weights: the size of what it computes "
            f"depends on values ({error}); try model.checkpointing none, block and nested on the "
            "GPU instead"
        ) from error


class Example(NamedTuple):
    """A loaded pipeline and one row, whose prompt and pictures it encodes.

    Attributes:
        pipe: The pipeline, its encoders on any device or their encodings stored.
        prompt: The row's prompt.
        call: Further arguments of the pipeline's call for the row: pictures, size, fixed ones.
    """

    pipe: DiffusionPipeline
    prompt: str
    call: Mapping[str, Any]


class FakeStudent:
    """A student without weights, whose training steps and samples can be counted.

    Args:
        blueprint: The pipeline's configurations.
        settings: What trains, and how.
        freeze: Patterns of parameters that are frozen, as they read in this pipeline.
        example: The pipeline, loaded, and a row; None: prompts are planned for, not encoded.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        settings: TrainingSettings,
        freeze: list[str],
        example: Example | None = None,
    ) -> None:
        from lit_distill.compute.fused_lora import use_fused_lora  # peft is slow to import

        self.settings = settings
        self.example = example
        encoder = None if example is None else example.pipe
        self.fake = FakePipeline(blueprint, getattr(torch, settings.torch_dtype), encoder)
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
            "weights": sum(
                weight_bytes(m, self.settings.quantization, frozen_only=True) for m in models
            ),
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
        if self.example is not None:
            row = trial_arguments([self.example.prompt] * batch_size, **self.example.call)
            return {**row, **options}
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
        counter = Counter(GRANULES[device])
        with ExitStack() as stack:
            stack.enter_context(operations_of(device))
            stack.enter_context(_values_not_needed(self.pipe))
            stack.enter_context(counter)
            parts = stack.enter_context(segments(counter, self.pipe))
            latents = self._parts(mode, size, grad_steps, changes)
            loss = (latents.float() - torch.zeros(latents.shape)).square().mean()
            figures: Figures = {"saved": counter.now, "forward_flops": counter.flops}
            del latents
            parts.begin_backward()
            loss.backward()  # type: ignore[no-untyped-call]
        del loss
        figures["flops"] = counter.flops
        figures["gradients"] = self._take_gradients()
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
        with operations_of(device), _values_not_needed(self.pipe):
            self._parts(mode, batch_size, grad_steps, {**changes, "num_inference_steps": 2})

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
    def sample(self, batch_size: int, **changes: Any) -> Figures:  # noqa: ANN401
        """Return what sampling without gradients takes, counted over two steps and the decoding.

        Args:
            batch_size: Samples.
            **changes: Arguments of the pipeline's call that differ from the settings.

        Returns:
            The peaks of denoising (denoise) and of decoding (decode) in bytes, and the FLOPs of a
            step (step_flops) and of decoding (decode_flops).
        """
        counter = Counter(GRANULES["cuda"])
        denoised = 0

        def before(*_: Any) -> None:  # noqa: ANN401
            counter.enter(["denoise"])

        def after(*_: Any) -> None:  # noqa: ANN401
            nonlocal denoised
            denoised = counter.flops
            counter.enter(["decode"])

        with ExitStack() as stack:
            for denoiser in denoisers(self.pipe).values():
                stack.callback(denoiser.register_forward_pre_hook(before).remove)
                stack.callback(denoiser.register_forward_hook(after).remove)
            stack.enter_context(operations_of("cuda"))
            stack.enter_context(_values_not_needed(self.pipe))
            stack.enter_context(counter)
            call = self.call(batch_size, **{**changes, "num_inference_steps": 2})
            run_pipeline(self.pipe, output_type="pt", **call)
        flops = {"step_flops": denoised / 2, "decode_flops": counter.flops - denoised}
        return {**counter.peaks, **flops}

    @torch.no_grad()
    def encode(self, batch_size: int) -> Figures:
        """Return what the VAE takes to encode images of the settings' size."""
        settings, vae = self.settings, self.pipe.vae
        counter = Counter(GRANULES["cuda"])
        counter.enter(["encode"])
        assert settings.height and settings.width
        shape: tuple[int, ...] = (batch_size, 3, settings.height, settings.width)
        if "temperal_downsample" in vae.config:  # Wan's and Qwen-Image's: an image is a frame
            shape = (batch_size, 3, 1, settings.height, settings.width)
        with operations_of("cuda"), counter:
            vae.encode(self.fake.empty(*shape, dtype=next(vae.parameters()).dtype))
        return {**counter.peaks, "flops": counter.flops}


def _free_gradient(parameter: Tensor) -> None:
    parameter.grad = None
