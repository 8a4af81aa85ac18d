"""A pipeline as its configuration files describe it: everything but the weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_distill.compute.repeated_blocks import repeated_blocks
from lit_distill.errors import InputError
from lit_distill.pipelines.components import select_denoisers
from lit_distill.pipelines.loading import pipeline_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

LAYER_FIELDS = ("num_layers", "num_single_layers", "n_layers")
"""Fields of a denoiser's configuration that count layers which are all alike."""

_LIBRARIES = ("diffusers", "transformers")


@dataclass(frozen=True)
class Blueprint:
    """Classes and configurations of a pipeline's components.

    Attributes:
        kind: The pipeline's class.
        models: Class and configuration of every network, by the component's name.
        scheduler: The scheduler.
        options: The pipeline's other settings, such as Wan's ``boundary_ratio``.
        sample_size: The default size in latent pixels, where the pipeline's class does not say it.
    """

    kind: Any
    models: Mapping[str, tuple[Any, Any]]
    scheduler: Any
    options: Mapping[str, Any] = field(default_factory=dict)
    sample_size: int | None = None

    @classmethod
    def read(cls, name_or_path: str | Path, revision: str | None = None) -> Blueprint:
        """Return that of a hub id or a folder; only configuration files are read or downloaded.

        Raises:
            InputError: If the pipeline's class is not one of the installed diffusers.
            OSError: If the pipeline is neither a folder nor on the hub.
        """
        import diffusers

        source = pipeline_source(name_or_path)
        index = diffusers.DiffusionPipeline.load_config(source, revision=revision)
        kind = getattr(diffusers, index["_class_name"], None)
        if kind is None:
            raise InputError(
                f"{name_or_path}: its class {index['_class_name']} is not one of diffusers "
                f"{diffusers.__version__}"
            )
        models, scheduler, options = {}, None, {}
        for key, entry in index.items():
            if key.startswith("_"):
                continue
            if not isinstance(entry, list | tuple):
                options[key] = entry
            elif entry[0] is not None and (component := _class_of(*entry)) is not None:
                where = {"subfolder": key, "revision": revision}
                if hasattr(component, "set_timesteps"):
                    scheduler = component.from_config(component.load_config(source, **where))
                else:
                    models[key] = component, _configuration(component, source, where)
        sizes = [
            config["_default_sample_size"]
            for _, config in models.values()
            if isinstance(config, Mapping) and "_default_sample_size" in config
        ]
        return cls(kind, models, scheduler, options, sizes[0] if sizes else None)

    @classmethod
    def of(cls, pipe: DiffusionPipeline) -> Blueprint:
        """Return that of a pipeline, as it was before anything was added to its denoisers."""
        models = {
            key: (_published_class(component), _plain_configuration(component))
            for key, component in pipe.components.items()
            if isinstance(component, nn.Module)
        }
        expected = {key: value for key, value in pipe.config.items() if not key.startswith("_")}
        options = {k: v for k, v in expected.items() if not isinstance(v, list | tuple)}
        options = {k: v for k, v in options.items() if k not in pipe.components}
        kind = _published_class(pipe)
        size = getattr(pipe, "default_sample_size", None)
        return cls(kind, models, pipe.scheduler, options, size)

    @property
    def denoisers(self) -> dict[str, tuple[Any, Any]]:
        """The networks that the denoising loop calls."""
        from diffusers import ModelMixin

        kinds = {k: v[0] for k, v in self.models.items() if issubclass(v[0], ModelMixin)}
        return {key: self.models[key] for key in select_denoisers(kinds)}

    def empty(self, name: str) -> nn.Module:
        """Return a component whose parameters have no memory, on the meta device."""
        from accelerate import init_empty_weights

        kind, config = self.models[name]
        with init_empty_weights(include_buffers=False):
            model: nn.Module = (
                kind.from_config(config) if hasattr(kind, "load_config") else kind(config)
            )
        if not hasattr(kind, "load_config"):
            # Made empty, the two names of T5's embedding are two parameters.
            model.tie_weights()  # type: ignore[operator]
        return model.eval()

    def layer_counts(self) -> dict[str, int]:
        """Return how many layers the denoisers have, by field, where a few stand for all.

        Empty where the layers are not all alike, or are so few that nothing is gained.
        """
        counts: dict[str, int] = {}
        for kind, config in self.denoisers.values():
            if hasattr(kind, "down_blocks") or "down_block_types" in config:
                return {}
            if config.get("dual_attention_layers"):  # SD3.5 medium
                return {}
            for name in LAYER_FIELDS:
                number = config.get(name)
                if not isinstance(number, int) or number <= 4:
                    continue
                if counts.setdefault(name, number) != number:
                    return {}
        return counts

    def with_layers(self, counts: Mapping[str, int]) -> Blueprint:
        """Return the pipeline whose denoisers have these numbers of layers."""
        models = dict(self.models)
        for key, (kind, config) in self.denoisers.items():
            own = {name: number for name, number in counts.items() if name in config}
            models[key] = kind, {**config, **own}
        return Blueprint(self.kind, models, self.scheduler, self.options, self.sample_size)


def _class_of(library: str, name: str) -> Any:  # noqa: ANN401
    """Return the class of a network or a scheduler; None for a tokenizer or the like."""
    import diffusers
    import transformers

    module = {"diffusers": diffusers, "transformers": transformers}.get(library)
    found = getattr(module, name, None)
    if found is None:
        return None
    if issubclass(found, nn.Module) or hasattr(found, "set_timesteps"):
        return found
    return None


def _published_class(component: Any) -> Any:  # noqa: ANN401
    """Return the class that precision, adapters and sharding have derived this object's from."""
    derived = type(component).__mro__
    return next((c for c in derived if c.__module__.partition(".")[0] in _LIBRARIES), derived[0])


def _plain_configuration(component: Any) -> Any:  # noqa: ANN401
    """Return the configuration without the quantisation of its weights."""
    config = component.config
    if isinstance(config, Mapping):
        return {key: value for key, value in config.items() if key != "quantization_config"}
    return config


def _configuration(kind: Any, source: str, where: dict[str, Any]) -> Any:  # noqa: ANN401
    if hasattr(kind, "load_config"):  # diffusers
        return kind.load_config(source, **where)
    return kind.config_class.from_pretrained(source, **where)


def pattern_for_layers(
    pattern: str, whole: Mapping[str, int], few: Mapping[str, int]
) -> str | None:
    """Return a pattern of parameters as it reads in a denoiser with fewer layers.

    Args:
        pattern: Such as ``transformer.transformer_blocks.59.txt_mlp.*``: the last of 60 layers.
        whole: Length of each list of layers of the whole denoiser, by name.
        few: The same of the one with fewer layers.

    Returns:
        The pattern with the last layer's number; None if it names another single layer.
    """
    for name, length in whole.items():
        match = re.search(rf"\b{re.escape(name)}\.(\d+)\b", pattern)
        if match and few[name] != length:
            if int(match[1]) != length - 1:
                return None
            return f"{pattern[: match.start(1)]}{few[name] - 1}{pattern[match.end(1) :]}"
    return pattern


def list_lengths(denoiser: nn.Module) -> dict[str, int]:
    """Return the length of each of a denoiser's lists of blocks, by name."""
    return {name: len(blocks) for name, blocks in repeated_blocks(denoiser).items()}
