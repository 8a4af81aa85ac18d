"""What runs before the first step: loading, encoding, preflight, compilation."""

from __future__ import annotations

from typing import TYPE_CHECKING

import lightning.pytorch as pl
import torch

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.training import fsdp_strategy  # noqa: F401 (registers strategy fsdp2)
from lit_distill.training.autoconfigure import autoconfigure
from lit_distill.training.encode_dataset import encode_dataset
from lit_distill.training.placement import Placement
from lit_distill.training.resume import is_fitting
from lit_distill.training.settings import check_rows
from lit_distill.training.student import Student
from lit_distill.training.student_loader import StudentLoader

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


def set_up_student(
    loader: StudentLoader,
    trainer: pl.Trainer | None,
    mesh: DeviceMesh | None,
    *,
    always_guided: bool = False,
) -> tuple[Student, Placement]:
    """Return the student, ready to train or to sample, with the settings in effect.

    Args:
        loader: Loads it.
        trainer: The trainer. If it is about to train on a `DistillDataModule`, the data set is
            encoded if it has a cache_dir, and preflight decides the settings that are left open.
        mesh: Processes that share the denoisers (FSDP2), if any.
        always_guided: Whether the guided teacher is asked about rows with a target, too.

    Raises:
        PreflightError: If the pipeline can't be distilled.
        ValueError: If the settings do not fit the pipeline or the rows.
    """
    data = training_data(trainer)
    if data is not None:
        check_rows(loader.settings, data)
    # Lightning makes the accelerator the default device here. Schedulers that are built there can't
    # compute their schedules, for which they use numpy.
    with torch.device("cpu"):
        student = loader.load(mesh, trainer.strategy.root_device if trainer and mesh else None)
        vae = encode_dataset(student, data, trainer, always_guided=always_guided)
        # Before anything wraps the denoisers: DDP must not wait for frozen parameters.
        if data is not None:
            assert trainer is not None
            student.settings = autoconfigure(student, data, trainer)
        if student.settings.compile:
            student.compile()
    return student, Placement(student.pipe, vae)


def training_data(trainer: pl.Trainer | None) -> DistillDataModule | None:
    """Return the data that the trainer is about to train on, if it is of this package."""
    data = getattr(trainer, "datamodule", None) if is_fitting(trainer) else None
    return data if isinstance(data, DistillDataModule) else None
