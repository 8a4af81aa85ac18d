"""A pipeline with parameters that have a shape and a data type, but no memory.

Everything that does not depend on a weight is computed for real: noise, timesteps, sigmas, masks,
rotary tables. So schedulers and pipelines that look at values work unchanged.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from lit_distill.encoding.collate import to_device
from lit_distill.errors import InputError
from lit_distill.pipelines.components import (
    call_parameters,
    denoisers,
    silent_diffusers,
    weightless_copy,
)
from lit_distill.planning.blueprint import Blueprint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TEXT_WIDTHS = (
    "caption_channels",
    "cap_feat_dim",
    "text_embed_dim",
    "text_dim",
    "joint_attention_dim",
    "cross_attention_dim",
)
"""Fields of a denoiser's configuration that tell the width of the encoded prompt."""

_CPU = torch.device("cpu")

CLIP_TOKENS = 77
"""Length of a prompt that CLIP has encoded."""


class FakePipeline:
    """A pipeline for `lit_distill.rollout` that computes shapes only.

    Args:
        blueprint: Its classes and configurations.
        dtype: Data type of the weights.
        encoder: The loaded pipeline, which encodes prompts and pictures; None: only calls with
            `prompt_arguments` are possible.

    Attributes:
        pipe: The pipeline, on the CPU; its text encoders have no weights.
        dtypes: Data type of each denoiser's parameters before anything is made trainable.
    """

    def __init__(
        self, blueprint: Blueprint, dtype: torch.dtype, encoder: DiffusionPipeline | None = None
    ) -> None:
        self.blueprint = blueprint
        self.dtype = dtype
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        self.pipe = self._assemble({} if encoder is None else _other_components(encoder))
        if encoder is not None:
            _encode_with(self.pipe, encoder)
        self.dtypes = {
            key: {name: p.dtype for name, p in denoiser.named_parameters()}
            for key, denoiser in denoisers(self.pipe).items()
        }

    def _assemble(self, others: dict[str, Any]) -> DiffusionPipeline:
        kept = {*self.blueprint.denoisers, "vae"}
        models = {k: self.blueprint.empty(k) for k in self.blueprint.models if k in kept}
        for model in models.values():
            set_dtype(model, self.dtype)
            self.fill(model)
        accepted = inspect.signature(self.blueprint.kind.__init__).parameters
        parts: dict[str, Any] = {name: None for name in accepted if name != "self"}
        options = {k: v for k, v in self.blueprint.options.items() if k in accepted}
        defaults = {
            name: parameter.default
            for name, parameter in accepted.items()
            if parameter.default is not inspect.Parameter.empty
        }
        parts |= defaults | options | others | models | {"scheduler": self.blueprint.scheduler}
        # Stable Diffusion warns that it has no safety checker.
        parts |= {"requires_safety_checker": False} if "requires_safety_checker" in parts else {}
        with silent_diffusers():
            pipe = self.blueprint.kind(**parts)
        if self.blueprint.sample_size is not None and hasattr(pipe, "default_sample_size"):
            pipe.default_sample_size = self.blueprint.sample_size
        return pipe

    def fill(self, module: nn.Module) -> None:
        """Turn parameters on the meta device into fake ones on the host."""
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and parameter.is_meta:
                    fake = self.empty(*parameter.shape, dtype=parameter.dtype)
                    owner._parameters[name] = nn.Parameter(
                        fake, requires_grad=parameter.requires_grad
                    )

    def fake_real(self, module: nn.Module) -> None:
        """Turn parameters that have memory, such as new adapters, into fake ones."""
        for owner in module.modules():
            for name, parameter in owner._parameters.items():
                if parameter is not None and type(parameter.data) is Tensor:
                    fake = self.empty(*parameter.shape, dtype=parameter.dtype)
                    owner._parameters[name] = nn.Parameter(
                        fake, requires_grad=parameter.requires_grad
                    )

    def empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """Return a fake tensor."""
        with self.mode:
            return torch.empty(*shape, dtype=dtype or self.dtype)

    # The prompt

    def prompt_arguments(
        self, batch_size: int, tokens: int | None = None, negative: bool = False
    ) -> dict[str, Any]:
        """Return encoded prompts as arguments of the pipeline's call.

        Args:
            batch_size: Number of prompts.
            tokens: Length of a prompt; default: the longest that the pipeline takes.
            negative: Return those of negative prompts as well.

        Raises:
            InputError: If the pipeline does not take encoded prompts, or the denoiser's
                configuration does not tell their width.
        """
        accepted = call_parameters(self.pipe)
        name = type(self.pipe).__name__
        if "prompt_embeds" not in accepted:
            raise InputError(f"{name} takes no prompt_embeds: its prompts can't be planned for")
        length = tokens or self.prompt_tokens
        given: dict[str, Any] = {"prompt_embeds": self._embeds(batch_size, length)}
        if "pooled_prompt_embeds" in accepted:
            given["pooled_prompt_embeds"] = self.empty(batch_size, self._pooled_width())
        for mask in ("prompt_embeds_mask", "prompt_attention_mask"):
            if mask in accepted:
                given[mask] = torch.ones(batch_size, length, dtype=torch.long)
        if negative:
            given |= {f"negative_{key}": value for key, value in given.items()}
        return {key: value for key, value in given.items() if key in accepted}

    def _embeds(self, batch_size: int, length: int) -> Tensor | list[Tensor]:
        width = self._text_width()
        call = inspect.unwrap(type(self.pipe).__call__)
        annotation = str(inspect.signature(call).parameters["prompt_embeds"].annotation)
        if "list" in annotation.lower():  # Z-Image: one tensor a prompt
            return [self.empty(length, width) for _ in range(batch_size)]
        return self.empty(batch_size, length, width)

    @property
    def prompt_tokens(self) -> int:
        """The longest prompt that the pipeline takes, in tokens."""
        call = inspect.signature(inspect.unwrap(type(self.pipe).__call__))
        if "max_sequence_length" not in call.parameters:
            return CLIP_TOKENS
        longest = int(call.parameters["max_sequence_length"].default)
        # SD3 joins what CLIP and what T5 have encoded.
        return longest + CLIP_TOKENS * (type(self.pipe).__name__.startswith("StableDiffusion3"))

    def _config(self) -> Mapping[str, Any]:
        config: Mapping[str, Any] = next(iter(denoisers(self.pipe).values())).config
        return config

    def _text_width(self) -> int:
        config = self._config()
        for name in TEXT_WIDTHS:
            if isinstance(config.get(name), int):
                return int(config[name])
        raise InputError(
            f"{type(self.pipe).__name__}: the configuration of its denoiser does not tell the "
            f"width of encoded prompts by any of {', '.join(TEXT_WIDTHS)}"
        )

    def _pooled_width(self) -> int:
        config = self._config()
        if isinstance(config.get("pooled_projection_dim"), int):
            return int(config["pooled_projection_dim"])
        # SDXL: pooled text beside six numbers, each embedded.
        embedded = 6 * int(config["addition_time_embed_dim"])
        return int(config["projection_class_embeddings_input_dim"]) - embedded


def _other_components(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return what a pipeline has besides denoisers, VAE and scheduler, without the weights."""
    own = {*denoisers(pipe), "vae", "scheduler"}
    return {
        name: weightless_copy(each, _CPU) if isinstance(each, nn.Module) else each
        for name, each in pipe.components.items()
        if name not in own
    }


def _encode_with(pipe: DiffusionPipeline, encoder: DiffusionPipeline) -> None:
    """Let a pipeline on the CPU encode prompts and pictures with another, wherever that is."""
    for name, value in vars(encoder).items():  # such as the sizes that it accepts
        if name not in encoder.components and isinstance(value, int | float | str | list | dict):
            setattr(pipe, name, value)
    for name in ("encode_prompt", "encode_image"):
        if callable(getattr(encoder, name, None)):
            setattr(pipe, name, _on_device_of(encoder, getattr(encoder, name)))
    if hasattr(getattr(encoder, "vae", None), "encode"):
        pipe.vae.encode = _on_device_of(encoder, encoder.vae.encode)


def _on_device_of(encoder: DiffusionPipeline, encode: Any) -> Any:  # noqa: ANN401
    """Return an encoding function that takes and returns tensors on the CPU."""
    signature = inspect.signature(encode)
    device = torch.device(encoder._execution_device)

    def call(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        bound = signature.bind(*to_device(args, device), **to_device(kwargs, device))
        if "device" in signature.parameters:
            bound.arguments["device"] = device
        with torch.no_grad():
            return to_device(encode(*bound.args, **bound.kwargs), _CPU)

    call.__signature__ = signature  # type: ignore[attr-defined]  # pipelines inspect it
    return call


def set_dtype(model: nn.Module, dtype: torch.dtype) -> None:
    """Give parameters and buffers the data types that `from_pretrained` gives them."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for prefix, owner in model.named_modules():
        lasting = owner._parameters.keys() | (
            owner._buffers.keys() - (owner._non_persistent_buffers_set if kept else set())
        )
        for name in lasting:
            tensor = owner._parameters.get(name, owner._buffers.get(name))
            stays = kept & set(f"{prefix}.{name}".split("."))
            if tensor is not None and tensor.is_floating_point() and not stays:
                tensor.data = tensor.data.to(dtype)
