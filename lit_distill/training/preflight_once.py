"""Runs preflight before training, unless the same pipeline has passed it with the same settings."""

from __future__ import annotations

from importlib.metadata import version
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info

from lit_distill.adapters.inject import trained_parameters
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.encoding.encode_once import forgotten_encodings
from lit_distill.encoding.fingerprint import fingerprint
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.model_digest import model_digest, plain_config
from lit_distill.preflight.checks import preflight
from lit_distill.preflight.remembered import RememberedReport
from lit_distill.preflight.report import Report
from lit_distill.training.first_row import preflight_call
from lit_distill.training.placement import place
from lit_distill.training.student import Student
from lit_distill.version import __version__

PACKAGES = ("torch", "diffusers", "peft", "transformers", "torchao", "bitsandbytes")
"""Packages on whose versions the report depends, where they are installed."""


def run_preflight(student: Student, trainer: pl.Trainer, **call: Any) -> Report:  # noqa: ANN401
    """Return the report of preflight, on the trainer's device and in its precision."""
    place(student.pipe, trainer.strategy.root_device)
    settings = student.settings
    precision = trainer.precision_plugin.forward_context()
    # No row has the other prompt, whose encodings would be kept.
    with precision, student.precision(), forgotten_encodings(student.pipe):
        return preflight(
            student.pipe,
            **{
                "checkpointing": settings.checkpointing,
                "offload": settings.offload_activations,
                "grad_steps": settings.grad_steps,
                **(settings.call_kwargs or {}),
                **call,
            },
        )


def preflight_once(student: Student, data: DistillDataModule, trainer: pl.Trainer) -> Report:
    """Return preflight's report for the first training row, the same on all processes.

    With `data.cache_dir` it is stored there, and used again by later runs; with
    ``model.preflight: always`` it is made again.

    Raises:
        PreflightError: If a check fails that no setting avoids.
    """
    call = preflight_call(student, data)
    remembered, report = None, None
    if data.cache_dir is not None and trainer.is_global_zero:
        remembered = RememberedReport(data.cache_dir, _digest(student, trainer, call))
        if student.settings.preflight != "always":
            report = remembered.read()
    report = trainer.strategy.broadcast(report)
    if report is not None:
        rank_zero_info("preflight: this pipeline has passed it with these settings before")
        place(student.pipe, trainer.strategy.root_device)
        return report
    report = run_preflight(student, trainer, **call)
    report.raise_failures()
    if remembered is not None:
        remembered.write(report)
    return report


def _digest(student: Student, trainer: pl.Trainer, call: dict[str, Any]) -> str:
    """Return a digest of all that the report depends on."""
    pipe, device = student.pipe, trainer.strategy.root_device
    settings = student.settings.hyperparameters()
    del settings["preflight"]
    trained = trained_parameters(pipe)
    # Quantised weights have no digest yet.
    weights = student.base_digest or {
        key: model_digest(each, [n.removeprefix(f"{key}.") for n in trained])
        for key, each in denoisers(pipe).items()
    }
    parts = {
        name: [type(component).__name__, plain_config(component)]
        for name, component in pipe.components.items()
    }
    kind = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    machine = [kind, str(trainer.precision), trainer.world_size, type(trainer.strategy).__name__]
    versions = [__version__, *map(_version, PACKAGES)]
    model = [type(pipe).__name__, plain_config(pipe), parts, weights, student.encoders_digest]
    names = [[name, list(parameter.shape)] for name, parameter in trained.items()]
    return fingerprint(
        [versions, machine, model, names, settings, student.settings.init_lora, call]
    )


def _version(package: str) -> str | None:
    try:
        return version(package)
    except ModuleNotFoundError:  # PackageNotFoundError among them
        return None
