"""Loads a student from a checkpoint or an export as a plain diffusers pipeline."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lit_distill.adapters.inject import make_trainable, trained_parameters
from lit_distill.adapters.lora_files import METADATA_KEY, load_tensors, read_lora
from lit_distill.adapters.weights import load_into_adapters, lora_config_fields
from lit_distill.compute.step_adapters import step_names
from lit_distill.errors import InputError
from lit_distill.export.base_model import (
    base_digest,
    check_base,
    is_dtype,
    load_checked_base,
)
from lit_distill.export.facts import StudentFacts, recorded_facts
from lit_distill.pipelines.components import denoisers, override_scheduler_config
from lit_distill.pipelines.guidance import guidance
from lit_distill.pipelines.hooks import replace_call
from lit_distill.pipelines.loading import load_pipeline
from lit_distill.pipelines.release import release
from lit_distill.training.checkpoint_io import STATE_PREFIX, check_state, read_checkpoint

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


FACTS_FILE = "lit_distill.json"
"""Holds the facts of a merged pipeline; a LoRA file has them in its metadata."""

SCHEDULER_FILE = "scheduler_config.json"


def load_student(
    source: str | Path,
    *,
    torch_dtype: torch.dtype | str | None = None,
    base_model: str | Path | None = None,
) -> DiffusionPipeline:
    """Return a plain diffusers pipeline with the student loaded.

    The number of steps, the guidance and the size of training are the defaults of its call:
    ``load_student(path)("a red seven").images[0]``.

    Args:
        source: A Lightning checkpoint (.ckpt) of `DirectDistill`; a LoRA that `export_student`
            wrote, as a file or its folder; or a folder of format merged.
        torch_dtype: Data type of all weights; default: that of the frozen weights in training.
        base_model: Hub id or folder of the base model; default: the one of training. If the one
            that is named differs from that of training, this is only a warning.

    Returns:
        The pipeline on the CPU, its weights frozen; LoRAs are attached, not merged.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is truncated, or was not written by lit_distill, or if the base model has
            changed since training.
    """
    source = Path(source)
    facts: StudentFacts | None
    if (source / "model_index.json").is_file():
        facts = _read_facts(source)
        pipe = load_pipeline(source, torch_dtype=torch_dtype or facts.torch_dtype)
    elif source.is_dir() or source.suffix == ".safetensors":
        pipe, facts = _load_export(source, torch_dtype, base_model)
    else:
        pipe, facts = _load_checkpoint(source, torch_dtype, base_model)
    for denoiser in denoisers(pipe).values():
        # Adapters are trained in float32; a plain pipeline has one data type.
        for name, parameter in denoiser.named_parameters():
            if ".lora_" in name:
                base = denoiser.get_parameter(name.partition(".lora_")[0] + ".base_layer.weight")
                parameter.data = parameter.data.to(base.dtype)
        denoiser.requires_grad_(False).eval()
    if facts is None:
        return pipe
    try:
        return with_defaults(pipe, facts)
    except InputError as error:
        raise InputError(f"{source} is damaged: {error}") from error


def _load_checkpoint(
    path: Path,
    torch_dtype: Any,  # noqa: ANN401
    base_model: str | Path | None,
) -> tuple[DiffusionPipeline, StudentFacts | None]:
    """Return pipeline and facts; no facts if the checkpoint does not record the number of steps."""
    content = read_checkpoint(path, mmap=True)
    if base_model is not None:
        content["hyper_parameters"]["pretrained_model_name_or_path"] = str(base_model)
    pipe, _ = load_checked_base(content, torch_dtype, given=base_model is not None)
    pipe = add_student(pipe, content, f"checkpoint {path}")
    if "num_inference_steps" not in recorded_facts(content):
        return pipe, None
    try:
        return pipe, StudentFacts.from_checkpoint(content, pipe)
    except (TypeError, ValueError, AttributeError) as error:
        raise InputError(
            f"checkpoint {path} is damaged: its record of the student: {error}"
        ) from error


def add_student(
    pipe: DiffusionPipeline, content: dict[str, Any], where: str = "the checkpoint"
) -> DiffusionPipeline:
    """Return a base model with the student of a checkpoint in it, its adapters in float32.

    Args:
        pipe: The base model, changed in place.
        content: Content of the checkpoint. Its weights are taken out, so that those in another
            data type are freed once they are converted.
        where: Name of the checkpoint in error messages.

    Raises:
        InputError: If the weights do not fit this pipeline and these settings.
    """
    hparams = content["hyper_parameters"]
    pipe.scheduler = override_scheduler_config(pipe, hparams.get("scheduler"))
    make_trainable(
        pipe,
        hparams["lora"],
        hparams.get("freeze") or (),
        lora_per_step=hparams.get("lora_per_step"),
        cast=hparams["lora"] is not None,
    )
    state: dict[str, Tensor] = content["state_dict"]
    parameters = {f"{STATE_PREFIX}{name}": p for name, p in trained_parameters(pipe).items()}
    check_state(state, parameters, where)
    for key, parameter in parameters.items():
        device, dtype = parameter.device, parameter.dtype
        # Not copied, so that a fully trained denoiser is not in memory beside the pretrained one.
        parameter.requires_grad_(False).data = state.pop(key)
        parameter.data = parameter.data.to(device, dtype)
    return pipe


def _read_facts(folder: Path) -> StudentFacts:
    path = folder / FACTS_FILE
    if not path.is_file():
        raise InputError(f"{folder} was not written by lit_distill: it has no {FACTS_FILE}")
    return StudentFacts.from_json(path.read_bytes().decode(errors="replace"), path)


def _load_export(
    source: Path,
    torch_dtype: Any,  # noqa: ANN401
    base_model: str | Path | None,
) -> tuple[DiffusionPipeline, StudentFacts]:
    files = sorted(source.rglob("*.safetensors")) if source.is_dir() else [source]
    if not files:
        raise FileNotFoundError(f"{source} holds no LoRA (a .safetensors file)")
    metadata = load_tensors(files[0])[1]
    if METADATA_KEY not in metadata:
        raise InputError(
            f"{files[0]} was not written by lit_distill: its metadata name no base model; load it "
            "with pipe.load_lora_weights into a pipeline of your choice"
        )
    facts = StudentFacts.from_json(metadata[METADATA_KEY], files[0])
    pipe = _load_base(facts, torch_dtype, base_model)
    folder = source if source.is_dir() else source.parent
    if facts.lora_per_step:
        names = step_names(facts.lora_per_step)
        loras = {name: read_lora(folder, pipe, name) for name in names}
        make_trainable(pipe, lora_config_fields(loras[names[0]], pipe), lora_per_step=len(names))
        for name, lora in loras.items():
            load_into_adapters(pipe, lora, name)
    else:
        lora = read_lora(source, pipe)
        make_trainable(pipe, lora_config_fields(lora, pipe))
        load_into_adapters(pipe, lora)
    if facts.scheduler_config:
        pipe.scheduler = type(pipe.scheduler).from_config(facts.scheduler_config)
    elif facts.scheduler_config is None and (folder / SCHEDULER_FILE).is_file():
        pipe.scheduler = type(pipe.scheduler).from_pretrained(folder)  # of an earlier version
    return pipe, facts


def _load_base(
    facts: StudentFacts,
    torch_dtype: Any,  # noqa: ANN401
    base_model: str | Path | None,
) -> DiffusionPipeline:
    """Load the base model of an export, and compare it with that of training."""
    name = base_model or facts.base_model
    revision = None if base_model else facts.base_revision
    if facts.base_digest and not is_dtype(torch_dtype, facts.torch_dtype):
        # Digests are those of the data type of training.
        release(_load_base(facts, None, base_model))
    pipe = load_pipeline(name, revision=revision, torch_dtype=torch_dtype or facts.torch_dtype)
    if facts.base_digest and is_dtype(torch_dtype, facts.torch_dtype):
        given = base_model is not None
        check_base([base_digest(pipe)], facts.base_digest, str(name), given=given)
    return pipe


def with_defaults(pipe: DiffusionPipeline, facts: StudentFacts) -> DiffusionPipeline:
    """Return the pipeline with the student's steps, guidance and size as its call's defaults.

    Only arguments that a call leaves out are filled in.
    """
    pipeline_class: Any = type(pipe)
    signature = inspect.signature(pipeline_class.__call__)
    defaults = facts.call_kwargs | {"num_inference_steps": facts.num_inference_steps}
    if facts.height:
        defaults |= {"height": facts.height, "width": facts.width}
    with guidance(pipe, facts.cfg_scale, 1, {}) as arguments:
        # The negative prompt is a list for one prompt, which other batch sizes can't use.
        defaults |= {name: arg for name, arg in arguments.items() if name != "negative_prompt"}

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        given = signature.bind_partial(self, *args, **kwargs).arguments
        if "num_inference_steps" in given:  # the student's sigmas are for its number of steps
            given = {"sigmas": None, **given}
        missing = {name: arg for name, arg in defaults.items() if name not in given}
        return pipeline_class.__call__(self, *args, **kwargs, **missing)

    replace_call(pipe, call)
    return pipe
