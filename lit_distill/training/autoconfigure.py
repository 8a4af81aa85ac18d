"""What is looked at before a training begins: does the pipeline distil, and in what memory."""

from __future__ import annotations

from functools import partial
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from lit_distill.adapters.inject import freeze_parameters, set_training_mode, trained_parameters
from lit_distill.compute.activation_checkpointing import MODES_BY_MEMORY, Checkpointing
from lit_distill.data.batch import NO_TARGET, Batch, collate, open_pictures
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.pipelines.hooks import read_schedule
from lit_distill.pipelines.rollout import rollout
from lit_distill.preflight.checks import Finding, Report, preflight
from lit_distill.preflight.memory import choose
from lit_distill.preflight.probe import Probe, difference
from lit_distill.training.student import Student

LAST_STEP = 0.05
"""Share of noise below which a student's last step has next to nothing left to do."""


def autoconfigure(student: Student, data: DistillDataModule, trainer: pl.Trainer) -> None:
    """Run preflight, if it is set; take up what avoids its findings, and what auto stands for.

    Raises:
        PreflightError: If a check fails that no setting avoids.
        ValueError: If the pipeline does not draw the size of an image.
    """
    keep_gradient = MODES_BY_MEMORY
    if student.settings["preflight"]:
        keep_gradient = _check(student, data, trainer)
    if student.settings["checkpointing"] == "auto":
        _choose_checkpointing(student, data, trainer, keep_gradient)


def run_preflight(student: Student, trainer: pl.Trainer, **call: Any) -> Report:  # noqa: ANN401
    """Return what preflight sees, on the trainer's device and in its precision."""
    student.place(trainer.strategy.root_device)
    with trainer.precision_plugin.forward_context(), student.own_dtype():
        fixed = student.settings["call_kwargs"] or {}
        chosen = {name: student.settings[name] for name in ("checkpointing", "grad_steps")}
        return preflight(student.pipe, **{**chosen, **fixed, **call})


def quantization_error(student: Student, trainer: pl.Trainer, **call: Any) -> Finding:  # noqa: ANN401
    """Return how far quantised weights turn the LoRA's gradient from that of the whole ones.

    The whole weights are loaded beside the quantised ones, so this needs memory for both.
    """
    check = "the gradient is that of the weights that are not quantised"
    device = trainer.strategy.root_device
    other = Student({**student.settings, "quantization": None}, student.loader.init_lora)
    try:
        found = _gradient(student, trainer, call)
        other.load()
        same = trained_parameters(student.pipe)
        for name, parameter in trained_parameters(other.pipe).items():
            parameter.data.copy_(same[name].data)
        other.place(device)
        expected = _gradient(other, trainer, call)
    except torch.OutOfMemoryError:
        return Finding(check, "ok", f"not measured: {device} has no memory for both")
    apart = difference(found, expected)
    return Finding(check, "ok", f"it differs by {apart:.1%} of its norm")


def _gradient(student: Student, trainer: pl.Trainer, call: dict[str, Any]) -> Tensor:
    """Return the gradient of what trains, in one dimension, on the host."""
    fixed = {**(student.settings["call_kwargs"] or {}), **call}
    prompt, steps = fixed.pop("prompt"), fixed.pop("num_inference_steps")
    trial = Probe(student.pipe, prompt, steps, 0, fixed)
    forward = trainer.precision_plugin.forward_context()
    with forward, student.own_dtype(), trial.gradient("step") as gradient:
        return torch.cat([each.flatten().float().cpu() for each in gradient if each is not None])


def _check(
    student: Student, data: DistillDataModule, trainer: pl.Trainer
) -> tuple[Checkpointing, ...]:
    """Avoid what preflight finds; return the checkpointing modes that keep the gradient."""
    report = run_preflight(student, trainer, **student.example(data))
    report.raise_failures()
    # After look, which has placed the encoders and had this prompt encoded where training runs.
    _check_last_step(student, student.first(data))
    _check_sizes(student, data)
    for finding in report.findings:
        if finding.verdict == "avoidable":
            rank_zero_warn(
                f"{report.pipeline}, {finding.check}: {finding.seen}. "
                f"{finding.remedy} It is done for this run."
            )
    freeze_parameters(student.pipe, report.settings.get("freeze", []))
    set_training_mode(student.pipe, report.settings.get("train_mode", []))
    for name, value in report.settings.items():
        known = student.settings[name]
        student.settings[name] = known + value if isinstance(value, list) else value
    return report.keep_gradient


def _check_last_step(student: Student, batch: Batch) -> None:
    """Warn where the student's last step has next to nothing to do."""
    steps = batch["num_inference_steps"]
    call = student.student_call(batch, steps)
    levels = read_schedule(student.pipe, partial(rollout, student.pipe, **call)).get("sigmas")
    # Those of flow matching only, which are shares of noise.
    if levels is None or levels[0] > 1 or levels[-2] >= LAST_STEP:
        return
    rank_zero_warn(
        f"the last of the student's {steps} steps begins at sigma {levels[-2]:.3g}: it moves the "
        "latents by next to nothing, so that one step less does the work. Give it its share with "
        "model.scheduler: {shift_terminal: null}, or set model.sigmas"
    )


def _check_sizes(student: Student, data: DistillDataModule) -> None:
    """Learn the codec of every size of image targets: bad sizes are refused before training."""
    for each in (data.train_set, data.val_set):
        for record in [] if each is None else each.image_sizes():
            opened = record | {"call": open_pictures(record["call"])} | NO_TARGET
            student.codec(collate([opened]))


def _choose_checkpointing(
    student: Student,
    data: DistillDataModule,
    trainer: pl.Trainer,
    modes: tuple[Checkpointing, ...],
) -> None:
    """Take the fastest mode that the device has memory for, the same on all, and say so."""
    assert data.train_set is not None
    rows = data.train_set.columns
    example = student.example(data)
    small = example.get("height", 0) * example.get("width", 0)
    largest = float((rows["height"] * rows["width"]).max())
    times = data.batch_size * (largest / small if small else 1.0)
    example["num_inference_steps"] = int(rows["num_inference_steps"].max())
    device = trainer.strategy.root_device
    student.place(device)
    with trainer.precision_plugin.forward_context(), student.own_dtype():
        trial = Probe(
            student.pipe, example.pop("prompt"), example.pop("num_inference_steps"), 0, example
        )
        grad_steps = student.settings["grad_steps"] or trial.num_inference_steps
        choice = choose(trial, device, modes, times, min(grad_steps, trial.num_inference_steps))
    choice = trainer.strategy.broadcast(choice)
    student.settings["checkpointing"] = choice.mode
    say = rank_zero_info if choice.fits else rank_zero_warn
    say(f"model.checkpointing: auto takes {choice.mode}; {choice.why}")
