"""Loads exported LoRA files into a plain pipeline, as the tools do that they are written for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from lit_distill.adapters.inject import make_trainable
from lit_distill.adapters.lora_files import read_lora
from lit_distill.adapters.lora_formats import layout_of
from lit_distill.adapters.weights import load_into_adapters, lora_config_fields
from lit_distill.pipelines.components import denoisers, silent_diffusers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class Reader:
    """A way to load an exported LoRA.

    Attributes:
        name: Its name in model cards and error messages.
        load: Loads a LoRA into a pipeline, given the file of each denoiser and the name of the
            adapter (None: the reader's default).
    """

    name: str
    load: Callable[[DiffusionPipeline, dict[str, Path], str | None], None]


def reader_for(format: str, pipe: DiffusionPipeline) -> Reader:
    """Return the reader with which a LoRA of this format is verified."""
    if format == "peft":
        return PEFT
    component, denoiser = next(iter(denoisers(pipe).items()))
    if format != "diffsynth" and layout_of(format, component, denoiser).diffusers_reads:
        return DIFFUSERS
    return NAME_TABLE


def _load_with_diffusers(
    pipe: DiffusionPipeline, files: dict[str, Path], adapter: str | None
) -> None:
    with silent_diffusers():  # it warns about text encoders without a LoRA
        for index, (component, path) in enumerate(files.items()):
            target = {f"load_into_{component}": True} if index else {}
            pipe.load_lora_weights(
                path.parent, weight_name=path.name, adapter_name=adapter, **target
            )


def _load_with_peft(pipe: DiffusionPipeline, files: dict[str, Path], _: str | None) -> None:
    from peft import PeftModel

    for component, path in files.items():
        PeftModel.from_pretrained(denoisers(pipe)[component], path.parent)


def _load_with_name_table(pipe: DiffusionPipeline, files: dict[str, Path], _: str | None) -> None:
    lora = read_lora(next(iter(files.values())).parent, pipe)
    make_trainable(pipe, lora_config_fields(lora, pipe))
    load_into_adapters(pipe, lora)


DIFFUSERS = Reader("diffusers' load_lora_weights", _load_with_diffusers)

PEFT = Reader("peft's PeftModel.from_pretrained", _load_with_peft)

NAME_TABLE = Reader(
    "lit_distill's table of names (diffusers has no reader for this format)", _load_with_name_table
)
