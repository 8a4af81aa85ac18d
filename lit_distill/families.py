"""What lit_distill knows about diffusers' pipelines: how to load one, its denoisers, its guidance.

Everything is found by looking at the pipeline's signature and components. Where a family departs
from the common meaning it has a line in `QUIRKS`; an unknown pipeline needs none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

TINY_DIGITS = "tiny-digits"
"""Name of the embedded pipeline, usable wherever a hub id or a path is."""

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Quirk(NamedTuple):
    """How one family departs from the common meaning of its arguments.

    Attributes:
        scale: Maps the textbook scale (1 = off) to the family's.
        refused: Why the family can't be used, if it can't.
    """

    scale: Callable[[float], float] = lambda cfg_scale: cfg_scale
    refused: str | None = None


# Keyed by what the names of a family's pipeline classes begin with.
QUIRKS: dict[str, Quirk] = {
    # These add s * (positive - negative) to the positive prediction instead of the negative one.
    "ZImage": Quirk(scale=lambda cfg_scale: cfg_scale - 1),
    "Krea2": Quirk(scale=lambda cfg_scale: cfg_scale - 1),
    "OmniGen": Quirk(refused="its guidance cannot be switched off"),
}


def quirk_of(pipe: DiffusionPipeline) -> Quirk:
    """Return the family's line in the table, found by its class or one it derives from."""
    names = [cls.__name__ for cls in type(pipe).__mro__]
    lines = (quirk for key, quirk in QUIRKS.items() if any(n.startswith(key) for n in names))
    return next(lines, Quirk())


def load_pipeline(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    torch_dtype: torch.dtype | str = torch.float32,
    **components: Any,  # noqa: ANN401
) -> DiffusionPipeline:
    """Load a pipeline as `DiffusionPipeline.from_pretrained` does; also knows ``"tiny-digits"``.

    Args:
        name_or_path: Hub id, folder in diffusers' layout, or ``"tiny-digits"``, the embedded
            `QwenImagePipeline` that draws 32x32 handwritten digits.
        revision: Branch, tag or commit of the hub repository.
        torch_dtype: Data type of the weights: a `torch.dtype`, or one of ``"float32"``,
            ``"bfloat16"``, ``"float16"``.
        **components: Components to use instead of loading them.

    Returns:
        The pipeline on the CPU, every component in evaluation mode.

    Raises:
        ValueError: If `torch_dtype` is not one of the names above.
        OSError: If the pipeline is neither a folder nor can be had from the hub.
    """
    from diffusers import DiffusionPipeline

    if isinstance(torch_dtype, str):
        if torch_dtype not in DTYPES:
            raise ValueError(f"torch_dtype must be one of {', '.join(DTYPES)}, got {torch_dtype!r}")
        torch_dtype = DTYPES[torch_dtype]
    pipe = DiffusionPipeline.from_pretrained(
        pipeline_source(name_or_path), revision=revision, dtype=torch_dtype, **components
    )
    if name_or_path == TINY_DIGITS:
        # The class says 128 latent pixels for every checkpoint; this one was trained on 8.
        pipe.default_sample_size = 8
    return pipe


def pipeline_source(name_or_path: str | Path) -> str:
    """Return the hub id or the folder behind a pipeline's name."""
    if name_or_path == TINY_DIGITS:
        return str(files("lit_distill").joinpath("assets", "tiny"))
    return str(name_or_path)


def denoisers(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the networks that the denoising loop calls (`diffusers.ModelMixin`), by name.

    ``transformer``, ``transformer_2`` (Wan 2.2) and ``unet`` where the pipeline has them, else
    every diffusers model that cannot decode (which a VAE can).

    Raises:
        ValueError: If the pipeline has no such component.
    """
    from diffusers import ModelMixin

    models = {k: v for k, v in pipe.components.items() if isinstance(v, ModelMixin)}
    found = _without_vae(models)
    if not found:
        raise ValueError(
            f"{type(pipe).__name__} has no denoiser: none of its components "
            f"({', '.join(pipe.components)}) is a diffusers model without a decoder"
        )
    return found


def denoiser_classes(name_or_path: str | Path, revision: str | None = None) -> dict[str, Any]:
    """Return the classes of the denoisers that `load_pipeline` would load, by name."""
    import diffusers

    source = pipeline_source(name_or_path)
    index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
    names = {key: str(entry[1]) for key, entry in index.items() if isinstance(entry, list)}
    kinds = {key: getattr(diffusers, name, None) for key, name in names.items()}
    models = {k: v for k, v in kinds.items() if diffusers.ModelMixin in getattr(v, "__mro__", ())}
    return _without_vae(models)


def _without_vae(models: dict[str, Any]) -> dict[str, Any]:
    order: tuple[str, ...] = ("transformer", "transformer_2", "unet")
    named = {k: models[k] for k in order if k in models}
    return named or {k: v for k, v in models.items() if not hasattr(v, "decode")}


def repeated_blocks(denoiser: nn.Module) -> dict[str, nn.ModuleList]:
    """Return the denoiser's repeated blocks, lists of modules of one class, by name."""
    return {
        name: module
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(True for _ in module[0].children())
    }


def use_attention(pipe: DiffusionPipeline, backend: str) -> None:
    """Let the denoisers compute attention with one of diffusers' backends.

    diffusers keeps the choice for the whole process: models that leave theirs open follow it.

    Args:
        pipe: The pipeline, changed in place.
        backend: Name in diffusers' dispatcher, such as ``native`` or ``_native_cudnn``.

    Raises:
        ValueError: If there is no such backend, what it needs is not installed, or a denoiser does
            not take its attention from the dispatcher.
    """
    for name, denoiser in denoisers(pipe).items():
        processors = (getattr(module, "processor", None) for module in denoiser.modules())
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise ValueError(
                f"model.attention_backend: {type(denoiser).__name__} ({name}) does not take its "
                "attention from diffusers' dispatcher; leave it out"
            )
        try:
            with silent_diffusers():  # it says that backends are experimental
                denoiser.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            raise ValueError(f"model.attention_backend {backend!r}: {error}") from error


def call_parameters(pipe: DiffusionPipeline) -> set[str]:
    """Return the names of the arguments that the pipeline's own `__call__` takes."""
    return set(inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters)


@contextmanager
def guidance(
    pipe: DiffusionPipeline, cfg_scale: float, batch_size: int, call_kwargs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Give the pipeline classifier-free guidance of `cfg_scale` until the context is left.

    The scale is the textbook one in every family: ``negative + cfg_scale * (positive - negative)``,
    1 = off, one denoiser call a step. It goes to ``true_cfg_scale`` where the pipeline has that
    argument (its ``guidance_scale`` is then an input of the network and left alone), else to
    ``guidance_scale``, else to the pipeline's guiders (`diffusers.guiders`), fresh ones, because
    some keep tensors of the last run.

    Args:
        pipe: The pipeline.
        cfg_scale: Guidance scale, >= 1.
        batch_size: Number of prompts in the batch.
        call_kwargs: The other call arguments; a negative prompt there is kept.

    Yields:
        The call arguments that the pipeline is to be called with besides.

    Raises:
        ValueError: If `cfg_scale` is below 1, the pipeline has no guidance and `cfg_scale` is not
            1, the argument is set by hand as well, or the family is refused.
    """
    if not cfg_scale >= 1:
        raise ValueError(f"cfg_scale must be a number >= 1 (1 = no guidance), got {cfg_scale!r}")
    name, quirk = type(pipe).__name__, quirk_of(pipe)
    if quirk.refused:
        raise ValueError(f"{name} cannot be distilled: {quirk.refused}")
    accepted = call_parameters(pipe)
    argument = next((a for a in ("true_cfg_scale", "guidance_scale") if a in accepted), None)
    guiders = _guiders(pipe)
    if argument in call_kwargs:
        raise ValueError(
            f"{argument} of {name} is set through cfg_scale; remove it from call_kwargs"
        )
    if argument is None and not guiders and cfg_scale != 1:
        raise ValueError(f"{name} takes no guidance scale: cfg_scale must be 1, got {cfg_scale}")
    kwargs: dict[str, Any] = {argument: quirk.scale(cfg_scale)} if argument else {}
    # With true_cfg_scale a missing negative prompt switches guidance off, with only a warning.
    default = " " if argument == "true_cfg_scale" else None
    negative = call_kwargs.get("negative_prompt", default)
    if cfg_scale > 1 and negative is not None and "negative_prompt_embeds" not in call_kwargs:
        # One text for all is spelled out: QwenImage does not broadcast it over the batch.
        texts = [negative] * batch_size if isinstance(negative, str) else negative
        kwargs["negative_prompt"] = texts
    pipe.__dict__.update({key: _set_guider(guider, cfg_scale) for key, guider in guiders.items()})
    try:
        yield kwargs
    finally:
        pipe.__dict__.update(guiders)


def _guiders(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the pipeline's components that carry out guidance."""
    named = {key: value for key, value in pipe.components.items() if "guider" in key}
    return {key: value for key, value in named.items() if value is not None}


def _set_guider(guider: Any, cfg_scale: float) -> Any:  # noqa: ANN401
    fresh = copy.copy(guider)  # not guider.new(), which warns that guiders are experimental
    fresh._enabled = cfg_scale != 1
    # The original formulation adds s * (positive - negative) to the positive prediction.
    original = getattr(guider, "use_original_formulation", False)
    fresh.guidance_scale = cfg_scale - 1 if original else cfg_scale
    return fresh


@contextmanager
def silent_diffusers() -> Iterator[None]:
    """Keep diffusers from logging warnings."""
    from diffusers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)
