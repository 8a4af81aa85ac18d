"""The first training row, which preflight and the encoders try first."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_distill.data.batch import NO_TARGET, Batch, collate, open_pictures
from lit_distill.preflight.probe import preflight_size

if TYPE_CHECKING:
    from lit_distill.data.datamodule import DistillDataModule
    from lit_distill.training.student import Student


def first_batch(data: DistillDataModule) -> Batch:
    """Return the first training row as a batch, without its target."""
    assert data.train_set is not None
    return untargeted_batch(data.train_set.record(0))


def untargeted_batch(record: dict[str, Any]) -> Batch:
    """Return a row as a batch, its pictures read, without its target."""
    return collate([record | {"call": open_pictures(record["call"])} | NO_TARGET])


def preflight_call(student: Student, data: DistillDataModule) -> dict[str, Any]:
    """Return the first training row as arguments of `preflight`, at a small size."""
    batch = first_batch(data)
    call = student.call(batch) | {"prompt": batch["prompt"][0]}
    del call["generator"]
    if batch["size"] is not None:
        call |= dict(zip(("height", "width"), preflight_size(*batch["size"]), strict=True))
    return call | {"num_inference_steps": batch["num_inference_steps"]}
