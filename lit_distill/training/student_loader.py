"""Loads the student's pipeline, freezes it, and makes what is trained of it trainable."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
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
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers, use_attention
from lit_distill.pipelines.loading import DTYPES, denoiser_classes, load_pipeline, pipeline_source
from lit_distill.pipelines.model_digest import component_digests
from lit_distill.training.settings import Settings
from lit_distill.training.student import Student

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from torch.distributed.device_mesh import DeviceMesh


class StudentLoader:
    """Loads the pipeline of a student, whole or sharded over processes.

    Args:
        settings: The settings as they are given.
        companion: Whether to add the adapter that an objective trains beside the student's.

    Attributes:
        base_digest: Digests of the pretrained denoisers that were loaded last, by name. Quantised
            ones have none: they can't be compared with others.
    """

    def __init__(self, settings: Settings, *, companion: bool = False) -> None:
        self.settings = settings
        self.companion = companion
        self.base_digest: dict[str, str] = {}

    def load(self, mesh: DeviceMesh | None = None, device: torch.device | None = None) -> Student:
        """Return the student: the pipeline frozen, and what is trained of it made trainable.

        Its settings have the fields of the LoRA that `init_lora` names.

        Args:
            mesh: Processes that share the denoisers (FSDP2), if any.
            device: Where the shards of this process go.

        Raises:
            InputError: If the pipeline does not take a setting.
        """
        if mesh is None:
            pipe = self._whole()
        else:
            assert device is not None
            pipe = self._sharded(mesh, device)
        if self.settings.attention_backend:
            use_attention(pipe, self.settings.attention_backend)
        return Student(pipe, self.settings, sharded=mesh is not None, base_digest=self.base_digest)

    def base(self) -> DiffusionPipeline:
        """Return the pipeline that a student starts from, as pretrained."""
        name, quantization = self.settings.model_name(), self.settings.quantization
        options: dict[str, Any] = {}
        if quantization:
            classes = denoiser_classes(name, self.settings.revision)
            options["quantization_config"] = quantization_config(quantization, classes)
        return load_base_pipeline(self.settings.hyperparameters(), **options)

    def _digested_base(self) -> DiffusionPipeline:
        """Return the pipeline that a student starts from, and record its denoisers' digests."""
        pipe = self.base()
        if not self.settings.quantization:
            self.base_digest = component_digests(pipe, denoisers(pipe))
        return pipe

    def _whole(self) -> DiffusionPipeline:
        """Return the pipeline made trainable, its arithmetic in the base data type."""
        pipe = self._digested_base()
        dtypes = {
            key: {name: p.dtype for name, p in denoiser.named_parameters()}
            for key, denoiser in denoisers(pipe).items()
        }
        self._prepare(pipe)
        if not self.settings.compile:  # whose tracing can't follow the casts
            for key, denoiser in denoisers(pipe).items():
                compute_in(denoiser, dtypes[key], DTYPES[self.settings.torch_dtype])
        return pipe

    def _sharded(self, mesh: DeviceMesh, device: torch.device) -> DiffusionPipeline:
        """Return the pipeline made trainable, its denoisers sharded over processes (FSDP2)."""
        settings = self.settings
        if settings.quantization:
            raise InputError(
                "model.quantization: fsdp2 does not shard quantised weights; use strategy ddp, "
                "with the denoiser whole on each device"
            )
        pipe = load_sharded(
            self._digested_base,
            partial(
                load_pipeline,
                settings.model_name(),
                revision=settings.revision,
                torch_dtype=settings.torch_dtype,
            ),
            empty_denoisers(settings.model_name(), settings.revision),
            self._prepare,
            mesh,
            device,
        )
        self.base_digest = _broadcast(self.base_digest)
        return pipe

    def _prepare(self, pipe: DiffusionPipeline) -> None:
        """Make the pipeline trainable, with the weights of `init_lora` in its adapters."""
        from lit_distill.compute.fused_lora import use_fused_lora  # peft is slow to import

        init_lora = self.settings.init_lora
        initial: LoRA = read_lora(init_lora, pipe) if init_lora else {}
        if initial:
            self.settings = replace(self.settings, lora=self._fields_of(initial, pipe))
        names = ("lora", "freeze", "train_mode", "lora_per_step")
        options = {name: getattr(self.settings, name) for name in names}
        make_trainable(pipe, **options, companion=self.companion)
        load_into_adapters(pipe, initial)
        for denoiser in denoisers(pipe).values():
            use_fused_lora(denoiser)

    def _fields_of(self, initial: LoRA, pipe: DiffusionPipeline) -> dict[str, Any]:
        """Return the fields of the initial LoRA, and those of `lora` that it leaves open."""
        fields = lora_config_fields(initial, pipe)
        given = self.settings.lora or {}
        for name, value in given.items():
            if name in fields and fields[name] != value:
                raise InputError(
                    f"model.lora.{name} is {value!r}, but init_lora {self.settings.init_lora} has "
                    f"{fields[name]!r}; leave it out"
                )
        return given | fields


def load_sharded(
    load: Callable[[], DiffusionPipeline],
    load_rest: Callable[..., DiffusionPipeline],
    empty: dict[str, Any],
    prepare: Callable[[DiffusionPipeline], None],
    mesh: DeviceMesh,
    device: torch.device,
) -> DiffusionPipeline:
    """Return a pipeline whose trainable denoisers are sharded over the mesh.

    Only process 0 reads the denoisers' weights and sends each process its shards. The host memory
    of the others never holds the whole weights.

    Args:
        load: Loads the whole pipeline; called on process 0.
        load_rest: Loads it with the components it is given; called on the others.
        empty: The denoisers without memory, as `empty_denoisers` returns them.
        prepare: Makes a pipeline's denoisers trainable.
        mesh: One-dimensional mesh of all processes.
        device: Where this process's shards go.
    """
    full: dict[str, Any] = {}
    dtypes: dict[str, torch.dtype] = {}
    if mesh.get_rank() == 0:
        pipe = load()
        dtypes = {key: denoiser.dtype for key, denoiser in denoisers(pipe).items()}
        prepare(pipe)  # initialises the adapters exactly as without sharding
        full = denoisers(pipe)
        pipe.register_modules(**empty)
    else:
        pipe = load_rest(**empty)
    dtypes = _broadcast(dtypes)
    for key, denoiser in denoisers(pipe).items():
        nn.Module.to(denoiser, dtypes[key])  # diffusers' override logs what it keeps in float32
    prepare(pipe)
    for key, denoiser in denoisers(pipe).items():
        shard(denoiser, mesh, dtypes[key])
        denoiser._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device))
        broadcast_state_dict(full[key].state_dict() if full else {}, denoiser)
        full.pop(key, None)
    return pipe


def _broadcast(value: Any) -> Any:  # noqa: ANN401
    """Return the value of process 0."""
    values = [value]
    torch.distributed.broadcast_object_list(values, src=0)
    return values[0]


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
