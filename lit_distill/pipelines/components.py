"""The components of a pipeline: which are denoisers, and how to replace one."""

from __future__ import annotations

import copy
import inspect
import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lit_distill.errors import InputError, with_suggestions

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def denoisers(pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the networks that the denoising loop calls (`diffusers.ModelMixin`), by name.

    Raises:
        ValueError: If the pipeline has no such component.
    """
    from diffusers import ModelMixin

    models = {k: v for k, v in pipe.components.items() if isinstance(v, ModelMixin)}
    selected = select_denoisers(models)
    if not selected:
        raise InputError(
            f"{type(pipe).__name__} has no denoiser: none of its components "
            f"({', '.join(pipe.components)}) is a diffusers model without a decoder"
        )
    return selected


def denoiser_device(pipe: DiffusionPipeline) -> torch.device:
    """Return the device on which the pipeline's denoisers compute."""
    return compute_device(next(iter(denoisers(pipe).values())))


def compute_device(network: nn.Module) -> torch.device:
    """Return the device on which a network computes; offloading may keep its weights elsewhere."""
    from diffusers.hooks.group_offloading import _get_group_onload_device

    device = getattr(getattr(network, "_hf_hook", None), "execution_device", None)
    if device is not None:
        return torch.device(device)
    try:
        return torch.device(_get_group_onload_device(network))
    except ValueError:  # not offloaded
        return next(network.parameters()).device


def move(networks: Iterable[Any], device: torch.device) -> None:
    """Move those of the networks to a device that are not there yet.

    Quantised weights that are there can't be moved at all with some libraries.
    """
    for network in networks:
        if isinstance(network, nn.Module):
            tensors = itertools.chain(network.parameters(), network.buffers())
            if any(tensor.device != device for tensor in tensors):
                network.to(device)


def select_denoisers(models: dict[str, Any]) -> dict[str, Any]:
    """Return the denoisers among a pipeline's diffusers models, or among their classes.

    ``transformer``, ``transformer_2`` (Wan 2.2) and ``unet`` if there are any, otherwise every
    model without a ``decode`` method, which excludes the VAE.
    """
    order: tuple[str, ...] = ("transformer", "transformer_2", "unet")
    named = {k: models[k] for k in order if k in models}
    return named or {k: v for k, v in models.items() if not hasattr(v, "decode")}


def call_parameters(pipe: DiffusionPipeline) -> set[str]:
    """Return the names of the arguments that the pipeline's `__call__` accepts."""
    return set(inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters)


def replace_component(pipe: DiffusionPipeline, name: str, component: Any) -> None:  # noqa: ANN401
    """Replace a component without recording its class in the pipeline's configuration.

    `setattr` would record it, and `save_pretrained` would then write it.
    """
    pipe.__dict__[name] = component


@contextmanager
def replaced_components(pipe: DiffusionPipeline, **components: Any) -> Iterator[None]:  # noqa: ANN401
    """Replace components of the pipeline until the context is left; see `replace_component`.

    Args:
        pipe: The pipeline.
        **components: The replacements, by the name of the component, or of a method.
    """
    originals = {name: pipe.__dict__[name] for name in components if name in pipe.__dict__}
    for name, component in components.items():
        replace_component(pipe, name, component)
    try:
        yield
    finally:
        for name in components:
            if name in originals:
                replace_component(pipe, name, originals[name])
            else:  # a method: the class's own is found again
                del pipe.__dict__[name]


def weightless_copy(model: Any, device: torch.device) -> Any:  # noqa: ANN401
    """Return a copy of a model with its configuration, modules and buffers, but no weights.

    Pipelines read all three: SDXL the width of a layer, FLUX.2 the statistics of the VAE.
    """
    empty = copy.copy(model)
    empty.__dict__.update(
        _modules={
            name: None if child is None else weightless_copy(child, device)
            for name, child in model._modules.items()
        },
        _buffers={k: None if v is None else v.to(device) for k, v in model._buffers.items()},
        _parameters={
            name: nn.Parameter(torch.empty(0, dtype=p.dtype, device=device), requires_grad=False)
            for name, p in model._parameters.items()
            if p is not None
        },
    )
    return empty


def override_scheduler_config(pipe: DiffusionPipeline, fields: dict[str, Any] | None) -> Any:  # noqa: ANN401
    """Return a copy of the pipeline's scheduler with some fields of its configuration changed.

    Raises:
        ValueError: If the scheduler has no such field.
    """
    scheduler = pipe.scheduler
    for name in fields or {}:
        if name not in scheduler.config:
            raise InputError(
                f"model.scheduler: {type(scheduler).__name__} has no field "
                f"{with_suggestions(name, scheduler.config)}"
            )
    if not fields:
        return copy_scheduler(scheduler)
    # Without the list of fields that were left at their default: `from_config` would drop what the
    # pipeline or `fields` has put into them since.
    config = {k: v for k, v in scheduler.config.items() if k != "_use_default_values"}
    return type(scheduler).from_config({**config, **fields})


class _Detached(TorchFunctionMode):
    """Copies tensors without their graph: `copy.deepcopy` refuses those that have one."""

    def __torch_function__(self, function, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        """Copy a tensor, or call `function` as it is."""
        if function is Tensor.__deepcopy__:
            tensor, memo = args
            return memo.setdefault(id(tensor), tensor.detach().clone())
        return function(*args, **(kwargs or {}))


def copy_scheduler(scheduler: Any) -> Any:  # noqa: ANN401
    """Return an independent copy of a scheduler, without the graph of its last run.

    Not `from_config`: pipelines and users change a scheduler after it was made (Stable Diffusion
    writes ``steps_offset`` into its configuration, ``set_shift`` an attribute).
    """
    fresh = copy.copy(scheduler)
    with _Detached():
        fresh.__dict__ = copy.deepcopy(scheduler.__dict__, {id(scheduler): fresh})
    return fresh


def use_attention(pipe: DiffusionPipeline, backend: str) -> None:
    """Make the denoisers compute attention with one of diffusers' backends.

    diffusers keeps the choice for the whole process: models without a backend of their own use it,
    too.

    Args:
        pipe: The pipeline, changed in place.
        backend: Name in diffusers' dispatcher, such as ``native`` or ``_native_cudnn``.

    Raises:
        ValueError: If the backend is unknown, a package that it needs is not installed, or a
            denoiser does not use the dispatcher.
    """
    for name, denoiser in denoisers(pipe).items():
        processors = (getattr(module, "processor", None) for module in denoiser.modules())
        if not any(hasattr(processor, "_attention_backend") for processor in processors):
            raise InputError(
                f"model.attention_backend: {type(denoiser).__name__} ({name}) does not take its "
                "attention from diffusers' dispatcher; leave it out"
            )
        try:
            with silent_diffusers():  # it warns that backends are experimental
                denoiser.set_attention_backend(backend)
        except (ValueError, RuntimeError, ImportError, OSError) as error:
            raise InputError(f"model.attention_backend {backend!r}: {error}") from error


@contextmanager
def silent_diffusers() -> Iterator[None]:
    """Silence diffusers' warnings until the context is left."""
    from diffusers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
