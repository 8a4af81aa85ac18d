"""The pipeline that is taught: loaded, frozen, and made trainable."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_distill.adapters.inject import make_trainable
from lit_distill.adapters.lora import LoRA
from lit_distill.adapters.lora_files import read_lora
from lit_distill.adapters.weights import load_base_pipeline, load_into_adapters, lora_config_fields
from lit_distill.compute.precision import compute_in
from lit_distill.compute.quantization import quantization_config
from lit_distill.compute.sharding import broadcast_state_dict, shard
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.loading import DTYPES, denoiser_classes, load_pipeline, pipeline_source

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.distributed.device_mesh import DeviceMesh


class StudentLoader:
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
            config = quantization_config(
                quantization, denoiser_classes(name, self.settings["revision"])
            )
            options["quantization_config"] = config
        return load_base_pipeline(dict(self.settings), **options)

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
        from lit_distill.compute.fused_lora import use_fused_lora  # peft is slow to import

        begin: LoRA = read_lora(self.init_lora, pipe) if self.init_lora else {}
        if begin:
            self.settings["lora"] = self._fields_of(begin, pipe)
        names = ("lora", "freeze", "train_mode", "lora_per_step")
        make_trainable(pipe, **{name: self.settings[name] for name in names})
        load_into_adapters(pipe, begin)
        for denoiser in denoisers(pipe).values():
            use_fused_lora(denoiser)

    def _fields_of(self, begin: LoRA, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Return the settings of a LoRA to go on from, with those of `lora` it leaves open."""
        found = lora_config_fields(begin, pipe)
        given = self.settings["lora"] or {}
        for name, value in given.items():
            if name in found and found[name] != value:
                raise ValueError(
                    f"model.lora.{name} is {value!r}, but init_lora {self.init_lora} has "
                    f"{found[name]!r}; leave it out"
                )
        return given | found


def load_sharded(
    load: Callable[[], DiffusionPipeline],
    load_rest: Callable[..., DiffusionPipeline],
    empty: dict[str, Any],
    prepare: Callable[[DiffusionPipeline], None],
    mesh: DeviceMesh,
    device: torch.device,
) -> DiffusionPipeline:
    """Return a pipeline whose trainable denoisers are sharded over the mesh.

    Process 0 alone reads the denoisers' weights and hands them out; host memory of the others
    never holds them.

    Args:
        load: Loads the whole pipeline; called on process 0.
        load_rest: Loads it with the components it is given; called on the others.
        empty: The denoisers without memory, of `empty_denoisers`.
        prepare: Makes a pipeline's denoisers trainable.
        mesh: One-dimensional mesh of all processes.
        device: Where this process's shards go.
    """
    full: dict[str, Any] = {}
    dtypes: dict[str, torch.dtype] = {}
    if mesh.get_rank() == 0:
        pipe = load()
        dtypes = {key: denoiser.dtype for key, denoiser in denoisers(pipe).items()}
        prepare(pipe)  # draws the adapters just as without sharding
        full = denoisers(pipe)
        pipe.register_modules(**empty)
    else:
        pipe = load_rest(**empty)
    (dtypes,) = _broadcast(dtypes)
    for key, denoiser in denoisers(pipe).items():
        nn.Module.to(denoiser, dtypes[key])  # diffusers' own talks of what it keeps in float32
    prepare(pipe)
    for key, denoiser in denoisers(pipe).items():
        shard(denoiser, mesh, dtypes[key])
        denoiser._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        broadcast_state_dict(full[key].state_dict() if full else {}, denoiser)
        full.pop(key, None)
    return pipe


def _broadcast(thing: Any) -> list[Any]:  # noqa: ANN401
    things = [thing]
    torch.distributed.broadcast_object_list(things, src=0)
    return things


def empty_denoisers(name: str, revision: str | None) -> dict[str, Any]:
    """Return the pipeline's denoisers as their configuration describes them, without memory."""
    from accelerate import init_empty_weights

    source = pipeline_source(name)
    empty: dict[str, Any] = {}
    for key, kind in denoiser_classes(name, revision).items():
        config = kind.load_config(source, subfolder=key, revision=revision)
        with init_empty_weights():  # a meta device context breaks tables made on the host
            empty[key] = kind.from_config(config).eval()
    return empty
