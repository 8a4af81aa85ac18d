"""Digests used as cache keys: of texts, numbers, tensors, images, and of a pipeline's encoders."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor, nn
from tqdm.auto import tqdm

from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.model_digest import component_digests, plain_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

PROGRESS_BYTES = 2 * 10**9
"""Size of weights that take seconds to read."""


def fingerprint(content: Any) -> str:  # noqa: ANN401
    """Return a digest of nested texts, numbers, tensors and pictures.

    Raises:
        TypeError: If the content has a value of another type.
    """
    digest = hashlib.sha256()

    def update(value: Any) -> None:  # noqa: ANN401
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Image.Image):
            digest.update(f"{value.mode}{value.size}".encode() + value.tobytes())
        elif isinstance(value, dict | list | tuple):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for entry in value.items() if isinstance(value, dict) else value:
                update(entry)
        elif value is None or isinstance(value, str | int | float | bool | torch.dtype):
            digest.update(repr(value).encode() + b"\0")
        else:
            raise TypeError(f"cannot compute a digest of a {type(value).__name__}")

    update(content)
    return digest.hexdigest()


def encoders_digest(pipe: DiffusionPipeline) -> str:
    """Return a digest of all that a pipeline's encodings depend on, beside what is encoded.

    It covers the weights, configurations and files of all components but denoisers and scheduler,
    the settings of the pipeline, and what its methods can read of the denoisers: configuration and
    type. All weights are read; a progress bar is shown if they are large.
    """
    networks = denoisers(pipe)
    others = {
        name: component
        for name, component in pipe.components.items()
        if name not in networks and component is not None and component is not pipe.scheduler
    }
    size = sum(_weight_bytes(component) for component in others.values())
    # None: shown only in a terminal.
    hidden = size < PROGRESS_BYTES or getattr(rank_zero_only, "rank", 0) != 0 or None
    digests = {
        name: component_digests(pipe, [name])
        for name in tqdm(sorted(others), desc="Reading the encoders' weights", disable=hidden)
    }
    read = {
        name: [type(network).__name__, _without_quantization(network), str(network.dtype)]
        for name, network in networks.items()
    }
    settings = {name: _settings(component) for name, component in others.items()}
    versions = [version(name) for name in ("diffusers", "transformers", "torch")]
    config = {k: v for k, v in plain_config(pipe).items() if k != "_class_name"}
    own = [type(pipe).__name__, config, _settings(pipe)]
    return fingerprint([versions, own, digests, settings, read])


def _weight_bytes(component: Any) -> int:  # noqa: ANN401
    if not isinstance(component, nn.Module):
        return 0
    return sum(tensor.numel() * tensor.element_size() for tensor in component.parameters())


def _without_quantization(network: Any) -> Any:  # noqa: ANN401
    """Return a denoiser's configuration; how its weights are stored does not change encodings."""
    return {k: v for k, v in plain_config(network).items() if k != "quantization_config"}


def _settings(component: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return the switches and numbers of a component, for example a VAE's tiling."""
    return {
        name: value
        for name, value in sorted(getattr(component, "__dict__", {}).items())
        if isinstance(value, bool | int | float) and name[0] != "_" and name != "training"
    }
