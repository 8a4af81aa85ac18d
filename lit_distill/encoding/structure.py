"""Takes encodings apart into tensors and a structure of plain JSON, and puts them together again.

A structure is read from a file, so the types that it may name are a closed list: no name from a
file is ever imported.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from lit_distill.errors import InputError

_DISTRIBUTIONS = {
    "DiagonalGaussianDistribution": "diffusers.models.autoencoders.vae",
    "IdentityDistribution": "diffusers.models.autoencoders.vae",
    "OobleckDiagonalGaussianDistribution": "diffusers.models.autoencoders.autoencoder_oobleck",
}
"""Distributions of VAEs, which are made from one tensor, and the modules that define them."""

_OUTPUTS = {
    "AutoencoderKLOutput": "diffusers.models.modeling_outputs",
    "AutoencoderOobleckOutput": "diffusers.models.autoencoders.autoencoder_oobleck",
    "AutoencoderTinyOutput": "diffusers.models.autoencoders.autoencoder_tiny",
    "EncoderOutput": "diffusers.models.autoencoders.vae",
    "VQEncoderOutput": "diffusers.models.autoencoders.vq_model",
    "BaseModelOutput": "transformers.modeling_outputs",
    "BaseModelOutputWithPast": "transformers.modeling_outputs",
    "BaseModelOutputWithPooling": "transformers.modeling_outputs",
    "ImageClassifierOutput": "transformers.modeling_outputs",
    "CLIPTextModelOutput": "transformers.models.clip.modeling_clip",
    "CLIPVisionModelOutput": "transformers.models.clip.modeling_clip",
}
"""Outputs of encoders, which are dataclasses with named fields."""


def flatten(value: Any, tensors: list[Tensor]) -> dict[str, Any]:  # noqa: ANN401
    """Append the tensors of a value to the list, in host memory, and return its structure.

    Raises:
        TypeError: If the value has a part that is neither a tensor, a plain value, a list, tuple or
            dictionary, nor of a type that this module lists.
    """
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu())
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    cls = type(value)
    if cls in (list, tuple):
        return {cls.__name__: [flatten(entry, tensors) for entry in value]}
    name = cls.__name__
    if _DISTRIBUTIONS.get(name) == cls.__module__ and not getattr(value, "deterministic", False):
        return {"distribution": name, "of": flatten(value.parameters, tensors)}
    if cls is dict or _OUTPUTS.get(name) == cls.__module__:
        if not all(isinstance(key, str) for key in value):
            raise TypeError("cannot store a dictionary whose keys are not all texts")
        fields = {key: flatten(entry, tensors) for key, entry in value.items()}
        return {"dict": fields} if cls is dict else {"output": name, "with": fields}
    raise TypeError(f"cannot store a {cls.__module__}.{cls.__qualname__}")


def unflatten(structure: Any, tensors: Sequence[Tensor]) -> Any:  # noqa: ANN401
    """Return the value of a structure.

    Raises:
        ValueError: If `flatten` does not make such a structure.
    """
    try:
        kind, content = next(iter(structure.items()))
        if kind == "tensor":
            return tensors[content]
        if kind == "plain":
            return content
        if kind in ("list", "tuple"):
            entries = [unflatten(entry, tensors) for entry in content]
            return entries if kind == "list" else tuple(entries)
        if kind == "distribution":
            parameters = unflatten(structure["of"], tensors)
            return _load(content, _DISTRIBUTIONS)(parameters)
        if kind in ("dict", "output"):
            fields = structure["with"] if kind == "output" else content
            values = {key: unflatten(entry, tensors) for key, entry in fields.items()}
            return _load(content, _OUTPUTS)(**values) if kind == "output" else values
    except (AttributeError, IndexError, KeyError, StopIteration, TypeError) as error:
        raise InputError(f"no structure of an encoding: {structure!r}") from error
    raise InputError(f"no structure of an encoding: {structure!r}")


def _load(name: str, modules: dict[str, str]) -> Any:  # noqa: ANN401
    """Return one of the listed classes; only the listed modules are imported."""
    return getattr(importlib.import_module(modules[name]), name)
