"""Classifier-free guidance of any pipeline, on the textbook scale.

Where a family departs from the common meaning of its arguments it has a line in `FAMILIES`; an
unknown pipeline needs none.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

from lit_distill.errors import InputError
from lit_distill.pipelines.components import call_parameters, denoisers, replaced_components

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Family(NamedTuple):
    """How one family departs from the common meaning of its arguments.

    Attributes:
        scale: Maps the textbook scale (1 = off) to the family's.
        refused: Why the family can't be used, if it can't.
    """

    scale: Callable[[float], float] = lambda cfg_scale: cfg_scale
    refused: str | None = None


def _above_two(cfg_scale: float) -> float:
    """Map the scale of a family whose guidance starts above 2 on the textbook scale."""
    if 1 < cfg_scale <= 2:
        raise InputError(f"this family has no guidance with a cfg_scale up to 2, got {cfg_scale}")
    return cfg_scale - 1


# Keyed by what the names of a family's pipeline classes begin with.
FAMILIES: dict[str, Family] = {
    # These add s * (positive - negative) to the positive prediction instead of the negative one.
    "ZImage": Family(scale=lambda cfg_scale: cfg_scale - 1),
    "Krea2": Family(scale=lambda cfg_scale: cfg_scale - 1),
    # So do these, which leave guidance off up to 1 on their scale.
    "Kandinsky3": Family(scale=_above_two),
    "Cosmos3": Family(),
    "Cosmos": Family(scale=_above_two),
    "OmniGen": Family(refused="its guidance cannot be switched off"),
}


OTHER_KINDS: dict[str, Any] = {
    "pag_scale": 0.0,
    "max_guidance_scale": 1.0,  # Stable Video Diffusion
    # LTX-2
    "stg_scale": 0.0,
    "modality_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "audio_stg_scale": 0.0,
    "audio_modality_scale": 1.0,
}
"""Call arguments of other kinds of guidance, on by default, and the values that mean off."""


def family_of(pipe: DiffusionPipeline) -> Family:
    """Return the family's line in the table, found by its class or one it derives from."""
    names = [cls.__name__ for cls in type(pipe).__mro__]
    lines = (family for key, family in FAMILIES.items() if any(n.startswith(key) for n in names))
    return next(lines, Family())


def scale_argument(pipe: DiffusionPipeline) -> str | None:
    """Return the call argument that carries the scale of classifier-free guidance, if one does.

    ``true_cfg_scale`` where the pipeline has it, else ``guidance_scale``, unless that is an input
    of the network (`scale_is_an_input`).
    """
    accepted = call_parameters(pipe)
    if "true_cfg_scale" in accepted:
        return "true_cfg_scale"
    return "guidance_scale" if "guidance_scale" in accepted - _embedded(pipe) else None


def scale_is_an_input(pipe: DiffusionPipeline) -> bool:
    """Return whether the pipeline feeds ``guidance_scale`` to its network as an input.

    Guidance-distilled models (FLUX, LCM) take the scale as an embedding, like the timestep. It is
    not classifier-free guidance then: no negative prompt, no second call of the denoiser.
    """
    return "guidance_scale" in _embedded(pipe)


def _embedded(pipe: DiffusionPipeline) -> set[str]:
    accepted = call_parameters(pipe)
    if "guidance_scale" not in accepted:
        return set()
    models = denoisers(pipe).values()
    # Configurations of distilled models: transformers have the first field, UNets the second.
    if "true_cfg_scale" in accepted or any(
        model.config.get("guidance_embeds") or model.config.get("time_cond_proj_dim") is not None
        for model in models
    ):
        return {"guidance_scale"}
    # A network that could take the scale, in a pipeline without any negative prompt (FluxFill).
    takes = any("guidance" in inspect.signature(type(m).forward).parameters for m in models)
    negative = any(name.startswith("negative_prompt") for name in accepted)
    return {"guidance_scale"} if takes and not negative else set()


def describe_guidance(pipe: DiffusionPipeline) -> str:
    """Return a sentence on what `cfg_scale` sets, and on what ``guidance_scale`` means."""
    argument = scale_argument(pipe)
    if argument is not None:
        seen = f"cfg_scale sets {argument}"
    elif _guiders(pipe):
        seen = f"cfg_scale sets the pipeline's {', '.join(_guiders(pipe))}"
    else:
        seen = "there is no classifier-free guidance: cfg_scale is 1"
    if scale_is_an_input(pipe):
        call = inspect.signature(inspect.unwrap(type(pipe).__call__))
        default = call.parameters["guidance_scale"].default
        seen += f"; guidance_scale is an input of the network, {default} unless in call_kwargs"
    return seen


@contextmanager
def guidance(
    pipe: DiffusionPipeline, cfg_scale: float, batch_size: int, call_kwargs: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Give the pipeline classifier-free guidance of `cfg_scale` until the context is left.

    The scale is the textbook one in every family: ``negative + cfg_scale * (positive - negative)``,
    1 = off, one denoiser call a step. It goes to the argument that `scale_argument` names, else to
    the pipeline's guiders (`diffusers.guiders`), fresh ones, because some keep tensors of the last
    run. With 1, other kinds of guidance are off too, unless `call_kwargs` sets their scale
    (``pag_scale``). A ``guidance_scale`` that is an input of the network is left alone: it is the
    pipeline's default, or what `call_kwargs` sets.

    Args:
        pipe: The pipeline.
        cfg_scale: Guidance scale, >= 1.
        batch_size: Number of prompts in the batch.
        call_kwargs: The other call arguments; a negative prompt there is kept.

    Yields:
        The call arguments that the pipeline is to be called with besides.

    Raises:
        ValueError: If `cfg_scale` is below 1, the pipeline has no classifier-free guidance and
            `cfg_scale` is not 1, the argument is set by hand as well, or the family is refused.
    """
    if not cfg_scale >= 1:
        raise InputError(f"cfg_scale must be a number >= 1 (1 = no guidance), got {cfg_scale!r}")
    name, family = type(pipe).__name__, family_of(pipe)
    if family.refused:
        raise InputError(f"{name} cannot be distilled: {family.refused}")
    argument = scale_argument(pipe)
    guiders = _guiders(pipe)
    if argument in call_kwargs:
        raise InputError(
            f"{argument} of {name} is set through cfg_scale; remove it from call_kwargs"
        )
    if argument is None and not guiders and cfg_scale != 1:
        if scale_is_an_input(pipe):
            raise InputError(
                f"{name} has no classifier-free guidance: cfg_scale must be 1, got {cfg_scale}. "
                "Its guidance_scale is an input of the network; set it in call_kwargs"
            )
        raise InputError(f"{name} takes no guidance scale: cfg_scale must be 1, got {cfg_scale}")
    kwargs: dict[str, Any] = {argument: family.scale(cfg_scale)} if argument else {}
    if cfg_scale == 1:
        unset = OTHER_KINDS.keys() & call_parameters(pipe) - call_kwargs.keys()
        kwargs |= {name: OTHER_KINDS[name] for name in unset}
    # With true_cfg_scale a missing negative prompt switches guidance off, with only a warning.
    default = " " if argument == "true_cfg_scale" else None
    negative = call_kwargs.get("negative_prompt", default)
    if cfg_scale > 1 and negative is not None and "negative_prompt_embeds" not in call_kwargs:
        # One text for all is spelled out: QwenImage does not broadcast it over the batch.
        texts = [negative] * batch_size if isinstance(negative, str) else negative
        kwargs["negative_prompt"] = texts
    copies = {name: _copy_guider(guider, cfg_scale) for name, guider in guiders.items()}
    with replaced_components(pipe, **copies):
        yield kwargs


def _guiders(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the pipeline's components that carry out guidance."""
    named = {key: value for key, value in pipe.components.items() if "guider" in key}
    return {key: value for key, value in named.items() if value is not None}


def _copy_guider(guider: Any, cfg_scale: float) -> Any:  # noqa: ANN401
    fresh = copy.copy(guider)  # not guider.new(), which warns that guiders are experimental
    fresh._enabled = cfg_scale != 1
    # The original formulation adds s * (positive - negative) to the positive prediction.
    original = getattr(guider, "use_original_formulation", False)
    fresh.guidance_scale = cfg_scale - 1 if original else cfg_scale
    return fresh
