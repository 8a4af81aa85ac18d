"""Classifier-free guidance of any pipeline, on the textbook scale.

`FAMILIES` is the table of exceptions. A family needs a line in it only if its guidance argument
departs from the common meaning; unknown pipelines work without one.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_distill.pipelines.components import call_parameters, replaced_components

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Family(NamedTuple):
    """How the guidance of a family departs from the common meaning.

    Attributes:
        scale: Maps the textbook scale (1 = off) to the family's argument.
        refused: Why the family is not supported; None if it is.
    """

    scale: Callable[[float], float] = lambda cfg_scale: cfg_scale
    refused: str | None = None


FAMILIES: dict[str, Family] = {
    # Keys are prefixes of pipeline class names, for example "ZImage" for ZImagePipeline.
    # ZImage and Krea2 compute positive + s * (positive - negative), which is scale 1 + s.
    "ZImage": Family(scale=lambda cfg_scale: cfg_scale - 1),
    "Krea2": Family(scale=lambda cfg_scale: cfg_scale - 1),
    "OmniGen": Family(refused="its guidance cannot be switched off"),
}


def family_of(pipe: DiffusionPipeline) -> Family:
    """Return the pipeline's entry of `FAMILIES`, by its class or a base class; else the default."""
    names = [cls.__name__ for cls in type(pipe).__mro__]
    matches = (
        family
        for prefix, family in FAMILIES.items()
        if any(name.startswith(prefix) for name in names)
    )
    return next(matches, Family())


@contextmanager
def guidance(
    pipe: DiffusionPipeline, cfg_scale: float, batch_size: int, call_kwargs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Set the pipeline's classifier-free guidance to `cfg_scale` until the context is left.

    The scale is the textbook one in every family: ``negative + cfg_scale * (positive - negative)``.
    1 means off, with one denoiser call per step. The scale is passed as the first of these that the
    pipeline has:

    1. ``true_cfg_scale``; ``guidance_scale`` is then an input of the network and left alone;
    2. ``guidance_scale``;
    3. guider components (`diffusers.guiders`), copied because some store tensors of the last call.

    Args:
        pipe: The pipeline.
        cfg_scale: Guidance scale, >= 1.
        batch_size: Number of prompts in the batch.
        call_kwargs: The other call arguments. A negative prompt in them is used.

    Yields:
        Call arguments to add to `call_kwargs`.

    Raises:
        ValueError: If `cfg_scale` is below 1 or not supported by the pipeline, the guidance
            argument is in `call_kwargs` as well, or the family is not supported.
    """
    if not cfg_scale >= 1:
        raise ValueError(f"cfg_scale must be a number >= 1 (1 = no guidance), got {cfg_scale!r}")
    name, family = type(pipe).__name__, family_of(pipe)
    if family.refused:
        raise ValueError(f"{name} cannot be distilled: {family.refused}")
    accepted = call_parameters(pipe)
    argument = next((a for a in ("true_cfg_scale", "guidance_scale") if a in accepted), None)
    guiders = _guiders(pipe)
    if argument in call_kwargs:
        raise ValueError(
            f"{argument} of {name} is set through cfg_scale; remove it from call_kwargs"
        )
    if argument is None and not guiders and cfg_scale != 1:
        raise ValueError(f"{name} takes no guidance scale: cfg_scale must be 1, got {cfg_scale}")
    kwargs: dict[str, Any] = {argument: family.scale(cfg_scale)} if argument else {}
    # With true_cfg_scale, pipelines only warn and skip guidance if there is no negative prompt.
    default = " " if argument == "true_cfg_scale" else None
    negative = call_kwargs.get("negative_prompt", default)
    if cfg_scale > 1 and negative is not None and "negative_prompt_embeds" not in call_kwargs:
        # A single text is repeated because QwenImage does not broadcast it over the batch.
        texts = [negative] * batch_size if isinstance(negative, str) else negative
        kwargs["negative_prompt"] = texts
    scaled = {key: _scaled_guider(guider, cfg_scale) for key, guider in guiders.items()}
    with replaced_components(pipe, **scaled):
        yield kwargs


def _guiders(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the pipeline's guider components, by name."""
    named = {key: value for key, value in pipe.components.items() if "guider" in key}
    return {key: value for key, value in named.items() if value is not None}


def _scaled_guider(guider: Any, cfg_scale: float) -> Any:  # noqa: ANN401
    guider = copy.copy(guider)  # guider.new() would warn that guiders are experimental
    guider._enabled = cfg_scale != 1
    # The original formulation adds s * (positive - negative) to the positive prediction.
    original = getattr(guider, "use_original_formulation", False)
    guider.guidance_scale = cfg_scale - 1 if original else cfg_scale
    return guider
