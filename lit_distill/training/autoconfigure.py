"""Runs preflight before training, and decides the settings that are wrong or left open."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_distill.adapters.inject import freeze_parameters, set_training_mode, trained_parameters
from lit_distill.compute.activation_checkpointing import MODES_BY_MEMORY, Checkpointing
from lit_distill.data.batch import Batch
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.pipelines.hooks import read_schedule
from lit_distill.pipelines.rollout import rollout
from lit_distill.planning.auto_checkpointing import choose_checkpointing
from lit_distill.preflight.probe import Probe, relative_difference
from lit_distill.preflight.report import Finding, Report
from lit_distill.training.first_row import first_batch, untargeted_batch
from lit_distill.training.placement import place
from lit_distill.training.preflight_once import preflight_once
from lit_distill.training.settings import Settings
from lit_distill.training.step_planner import step_planner, uncounted
from lit_distill.training.student import Student
from lit_distill.training.student_loader import StudentLoader

MIN_LAST_SIGMA = 0.05
"""Noise level below which the student's last step hardly changes the latents."""

FEW_STEPS = 3
"""With more steps, one that changes nothing hardly matters: docs/method.md, schedule."""


def autoconfigure(student: Student, data: DistillDataModule, trainer: pl.Trainer) -> Settings:
    """Run preflight, if it is enabled; return the settings that training can use.

    The student is changed as they say: parameters frozen, modules put into training mode.

    Raises:
        PreflightError: If a check fails that no setting avoids.
        ValueError: If the pipeline can't generate the size of an image.
    """
    settings = student.settings
    modes = MODES_BY_MEMORY
    if settings.preflight:
        report = preflight_once(student, data, trainer)
        # After preflight, which has placed the encoders where training runs.
        _check_last_step(student, first_batch(data))
        _check_sizes(student, data)
        settings = _avoid_findings(student, report)
        modes = report.keep_gradient
    if settings.checkpointing == "auto":
        mode = _fastest_checkpointing(student, data, trainer, modes)
        settings = replace(settings, checkpointing=mode)
    return settings


def quantization_error(student: Student, trainer: pl.Trainer, **call: Any) -> Finding:  # noqa: ANN401
    """Return how far quantised weights change the LoRA's gradient.

    The full-precision weights are loaded beside the quantised ones, so this needs memory for both.
    """
    check = "the gradient is that of the weights that are not quantised"
    device = trainer.strategy.root_device
    try:
        quantized = _gradient(student, trainer, call)
        reference = StudentLoader(replace(student.settings, quantization=None)).load()
        weights = trained_parameters(student.pipe)
        for name, parameter in trained_parameters(reference.pipe).items():
            parameter.data.copy_(weights[name].data)
        place(reference.pipe, device)
        expected = _gradient(reference, trainer, call)
    except torch.OutOfMemoryError:
        return Finding(check, "ok", f"not measured: {device} has no memory for both")
    error = relative_difference(quantized, expected)
    return Finding(check, "ok", f"it differs by {error:.1%} of its norm")


def _gradient(student: Student, trainer: pl.Trainer, call: dict[str, Any]) -> Tensor:
    """Return the gradient of all trainable parameters as one vector, on the host."""
    arguments = {**(student.settings.call_kwargs or {}), **call}
    prompt, steps = arguments.pop("prompt"), arguments.pop("num_inference_steps")
    probe = Probe(student.pipe, prompt, steps, 0, arguments)
    forward = trainer.precision_plugin.forward_context()
    with forward, student.precision(), probe.gradient("step") as gradient:
        return torch.cat([each.flatten().float().cpu() for each in gradient if each is not None])


def _avoid_findings(student: Student, report: Report) -> Settings:
    """Apply what avoids preflight's findings, and warn; return the settings with it."""
    for finding in report.findings:
        if finding.verdict == "avoidable":
            rank_zero_warn(
                f"{report.pipeline}, {finding.check}: {finding.observed}. "
                f"{finding.remedy} Applied to this run."
            )
    freeze_parameters(student.pipe, report.settings.get("freeze", []))
    set_training_mode(student.pipe, report.settings.get("train_mode", []))
    changes = dict(report.settings)
    for name in ("freeze", "train_mode"):
        if name in changes:  # patterns add to those that are set
            changes[name] = getattr(student.settings, name) + changes[name]
    return replace(student.settings, **changes)


def _check_last_step(student: Student, batch: Batch) -> None:
    """Warn if one of a few steps, the student's last, hardly changes the latents."""
    steps = batch["num_inference_steps"]
    if steps > FEW_STEPS:
        return
    call = student.student_call(batch, steps)
    sigmas = read_schedule(student.pipe, partial(rollout, student.pipe, **call)).get("sigmas")
    # Only flow matching has sigmas that are shares of noise.
    if sigmas is None or sigmas[0] > 1 or sigmas[-2] >= MIN_LAST_SIGMA:
        return
    rank_zero_warn(
        f"the last of the student's {steps} steps begins at sigma {sigmas[-2]:.3g}: it hardly "
        "changes the latents, so one step less would do the same. Give it a larger share with "
        "model.scheduler: {shift_terminal: null}, or set model.sigmas"
    )


@torch.no_grad()
def _check_sizes(student: Student, data: DistillDataModule) -> None:
    """Learn the codec of every size of image targets: bad sizes are refused before training."""
    for dataset in (data.train_set, data.val_set):
        for record in [] if dataset is None else dataset.image_sizes():
            student.codec(untargeted_batch(record))


def _fastest_checkpointing(
    student: Student,
    data: DistillDataModule,
    trainer: pl.Trainer,
    modes: tuple[Checkpointing, ...],
) -> Checkpointing:
    """Return the fastest mode that fits the device's memory, the same on all processes; log it."""
    place(student.pipe, trainer.strategy.root_device)
    planner = step_planner(student, data, trainer)
    choice = choose_checkpointing(planner, trainer.strategy.root_device, modes)
    choice = trainer.strategy.broadcast(choice)
    log = rank_zero_info if choice.fits else rank_zero_warn
    log(f"model.checkpointing: auto chooses {choice.mode}; {choice.reason}")
    if note := uncounted(trainer.lightning_module.objective):  # type: ignore[arg-type]
        rank_zero_warn(f"model.checkpointing: auto: {note}; if memory runs out, set it yourself")
    return choice.mode
