"""Describes where a report comes from, and how to generate images with its student."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_distill.data.batch import Batch, split_batch
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.data.filesystem import sha256_of
from lit_distill.data.table_io import table_folder
from lit_distill.errors import InputError
from lit_distill.export.facts import student_call_kwargs
from lit_distill.pipelines.guidance import guidance
from lit_distill.report.contenders import ContenderResult
from lit_distill.teacher.provenance import METADATA_KEY, PIPELINE_KEY, read_provenance
from lit_distill.training.checkpoint_io import read_checkpoint
from lit_distill.training.direct_distill import DirectDistill


def held_out(trainer: pl.Trainer) -> tuple[str | None, Any]:
    """Return the path or URL of the held-out rows and their table; None for each if unknown."""
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, DistillDataModule) or data.val_set is None:
        return None, None
    return str(data.val_metadata_path or data.metadata_path), data.val_set.table


def teacher_settings(trainer: pl.Trainer, module: DirectDistill) -> tuple[int, float]:
    """Return the teacher's steps and guidance: those of the CSV, or else of the online teacher."""
    steps = module.hparams["teacher_num_inference_steps"]
    cfg = module.hparams["teacher_cfg_scale"]
    _, table = held_out(trainer)
    columns = ["teacher_num_inference_steps", "teacher_cfg_scale"]
    if table is None or any(column not in table for column in columns):
        return steps, cfg
    recorded = table[columns].drop_duplicates()
    if len(recorded) > 1:
        return steps, cfg
    return int(recorded.iloc[0, 0]), float(recorded.iloc[0, 1])


def report_title(module: DirectDistill, results: list[ContenderResult]) -> str:
    """Return the title of a report: the model and its student."""
    model = str(module.hparams["pretrained_model_name_or_path"])
    model = Path(model).name if Path(model).exists() else model
    student = next(result for result in results if result.contender.kind == "student")
    return f"{model}: {student.label}"


def describe_run(trainer: pl.Trainer, module: DirectDistill, rows: int) -> dict[str, Any]:
    """Return the report's provenance: by name, a text or a mapping of texts.

    Args:
        trainer: The trainer of the test.
        module: The tested module.
        rows: Number of held-out rows.
    """
    table, _ = held_out(trainer)
    program = Path(sys.argv[0]).name.replace("__main__.py", "lit-distill")
    facts: dict[str, Any] = {"command": shlex.join([program, *sys.argv[1:]])}
    if trainer.ckpt_path:
        facts["checkpoint"] = _with_checksum(str(trainer.ckpt_path))
        saved = read_checkpoint(str(trainer.ckpt_path), mmap=True)
        facts["optimizer steps"] = str(saved.get("global_step", "unknown"))
    hidden = ("_class_path", "_instantiator", "metrics")
    facts["settings"] = {k: v for k, v in module.hparams.items() if k not in hidden}
    facts["metrics"] = module.validator.evaluation.describe()
    if table is not None:
        facts["held-out rows"] = f"{rows} of {_with_checksum(table)}"
        facts |= _made_with(table_folder(table))
    names = ("lit-distill", "torch", "lightning", "torchmetrics", "diffusers", "transformers")
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in (*names, "peft"))
    device = module.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    facts["machine"] = (
        f"{name} ({device.type}), {os.cpu_count()} CPU cores, {trainer.world_size} process"
        f"{'es' if trainer.world_size > 1 else ''}, {platform.system()}, "
        f"Python {platform.python_version()}"
    )
    return facts


def _made_with(folder: str) -> dict[str, Any]:
    """Return how the held-out rows of a folder were generated, if that is recorded."""
    try:
        provenance = read_provenance(folder)
    except InputError as error:  # the report can be written without it
        return {"held-out rows made with": str(error)}
    if provenance is None:
        return {}
    # It lists the whole schedule, of which only the scheduler's class is shown.
    schedule = provenance.pop(PIPELINE_KEY, {})
    scheduler = {"scheduler of the teacher": schedule["scheduler"]["class"]} if schedule else {}
    provenance.pop(METADATA_KEY, None)
    return {"held-out rows made with": provenance | scheduler}


def _with_checksum(path: str) -> str:
    """Return a file's path with the beginning of its SHA-256."""
    return f"{path} (sha256 {sha256_of(path)[:16]})"


def usage_snippet(trainer: pl.Trainer, module: DirectDistill, batch: Batch) -> str:
    """Return Python that generates the image of a batch's first row with the student."""
    checkpoint = str(trainer.ckpt_path or "student.ckpt")
    call = {**student_call_kwargs(module.hparams), **split_batch(batch, 1)[0]["call"]}
    settings: dict[str, Any] = {"num_inference_steps": batch["num_inference_steps"]}
    with guidance(module.pipe, batch["cfg_scale"], 1, call) as guidance_arguments:
        settings |= guidance_arguments
    settings |= dict(zip(("height", "width"), batch["size"] or (), strict=False)) | call
    arguments = ", ".join(f"{name}={value!r}" for name, value in settings.items())
    return f"""\
import torch
from lit_distill import load_student

pipe = load_student({checkpoint!r})
image = pipe(
    {batch["prompt"][0]!r},
    {arguments},
    generator=torch.Generator({batch["rand_device"]!r}).manual_seed({batch["seed"][0]}),
).images[0]
image.save("image.png")

# For plain diffusers, without lit_distill:
#   lit-distill export --ckpt_path {shlex.quote(checkpoint)} --out my-student"""
