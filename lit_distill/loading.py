"""The pipeline that is taught: loaded, frozen, and made trainable."""

from __future__ import annotations

from collections.abc import MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.adapters import base_pipeline, lora_fields, make_trainable, put_lora
from lit_distill.families import DTYPES, denoisers, load_pipeline
from lit_distill.lora import LoRA, read_lora
from lit_distill.precision import compute_in
from lit_distill.quantization import quantization_config
from lit_distill.sharding import empty_denoisers, load_sharded

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.distributed.device_mesh import DeviceMesh


class Loader:
    """Loads the pipeline of a `DirectDistill`, whole or shared among processes.

    Args:
        settings: Its hyperparameters. Those of a LoRA to go on from are written into them.
        init_lora: File or folder of the LoRA to go on from.
    """

    def __init__(self, settings: MutableMapping[str, Any], init_lora: str | None) -> None:
        self.settings = settings
        self.init_lora = init_lora

    def _name(self) -> str:
        name: str | None = self.settings["pretrained_model_name_or_path"]
        if not name:
            raise ValueError(
                "model.pretrained_model_name_or_path is not set: a hub id, a folder in diffusers' "
                "layout, or tiny-digits"
            )
        return name

    def base(self) -> DiffusionPipeline:
        """Return the pipeline that a student starts from, as pretrained."""
        name, quantization = self._name(), self.settings["quantization"]
        options: dict[str, Any] = {}
        if quantization:
            config = quantization_config(quantization, name, self.settings["revision"])
            options["quantization_config"] = config
        return base_pipeline(dict(self.settings), **options)

    def whole(self) -> DiffusionPipeline:
        """Return the pipeline made trainable, its arithmetic in the base data type."""
        pipe = self.base()
        dtypes = {
            key: {name: p.dtype for name, p in denoiser.named_parameters()}
            for key, denoiser in denoisers(pipe).items()
        }
        self._prepare(pipe)
        if not self.settings["compile"]:  # whose tracing can't follow the casts
            for key, denoiser in denoisers(pipe).items():
                compute_in(denoiser, dtypes[key], DTYPES[self.settings["torch_dtype"]])
        return pipe

    def sharded(self, mesh: DeviceMesh, device: torch.device) -> DiffusionPipeline:
        """Return the pipeline made trainable, its denoisers shared among processes (FSDP2).

        Raises:
            ValueError: If the weights are quantised.
        """
        if self.settings["quantization"]:
            raise ValueError(
                "model.quantization: fsdp2 does not shard quantised weights; use strategy ddp, "
                "with the denoiser whole on each device"
            )
        options = {name: self.settings[name] for name in ("revision", "torch_dtype")}
        return load_sharded(
            self.base,
            partial(load_pipeline, self._name(), **options),
            empty_denoisers(self._name(), self.settings["revision"]),
            self._prepare,
            mesh,
            device,
        )

    def _prepare(self, pipe: DiffusionPipeline) -> None:
        """Make the pipeline trainable, with the LoRA to go on from in it."""
        from lit_distill.lean import make_lean  # peft is slow to import

        begin: LoRA = read_lora(self.init_lora, pipe) if self.init_lora else {}
        if begin:
            self.settings["lora"] = self._fields_of(begin, pipe)
        names = ("lora", "freeze", "train_mode", "lora_per_step")
        make_trainable(pipe, **{name: self.settings[name] for name in names})
        put_lora(pipe, begin)
        for denoiser in denoisers(pipe).values():
            make_lean(denoiser)

    def _fields_of(self, begin: LoRA, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Return the settings of a LoRA to go on from, with those of `lora` it leaves open."""
        found = lora_fields(begin, pipe)
        given = self.settings["lora"] or {}
        for name, value in given.items():
            if name in found and found[name] != value:
                raise ValueError(
                    f"model.lora.{name} is {value!r}, but init_lora {self.init_lora} has "
                    f"{found[name]!r}; leave it out"
                )
        return given | found
