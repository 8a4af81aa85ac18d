"""`lit-distill test`: a report of teacher, undistilled pipeline, student and others."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl

from lit_distill.commands.next_step import print_next
from lit_distill.errors import InputError
from lit_distill.pipelines.stages import Offload
from lit_distill.report.contenders import ContenderConfig
from lit_distill.report.report_writer import ReportWriter
from lit_distill.training.direct_distill import DirectDistill


def test(
    trainer: pl.Trainer,
    model: DirectDistill,
    datamodule: pl.LightningDataModule | None = None,
    *,
    ckpt_path: str | None = None,
    verbose: bool = False,
    weights_only: bool | None = None,
    out: str | None = None,
    compare: list[str | ContenderConfig] | None = None,
    undistilled: list[tuple[int, float]] | None = None,
    gallery: int = 48,
    logs: str | None = None,
    offload: Offload = "none",
) -> Any:  # noqa: ANN401
    """Sample the held-out rows with teacher, undistilled pipeline and student; write a report.

    The folder holds report.html (one file that opens offline: summary, curves, gallery,
    provenance), metrics.json, metrics.csv, rows.csv, grid.png and all images.

    Args:
        trainer: Runs the test loop.
        model: The pipeline, unless a checkpoint names it.
        datamodule: The held-out rows.
        ckpt_path: Checkpoint (.ckpt) of the student.
        verbose: Also print Lightning's table.
        weights_only: Passed on to torch.load.
        out: Folder to write to; default: report in trainer.default_root_dir.
        compare: Contenders beside the student: checkpoints (.ckpt), or hub ids or folders of
            pipelines; or mappings with path, lora, num_inference_steps, cfg_scale and name, e.g.
            '[{lora: their/lora, num_inference_steps: 8, name: theirs}]'.
        undistilled: Further steps and guidance to sample the undistilled pipeline with; default:
            the student's steps and twice as many, with the teacher's guidance.
        gallery: Largest number of rows in the page: half of them the worst, half the best.
        logs: Folder with the logs of the run, for the curves; default: beside the checkpoint.
        offload: What is on the device together: none: the whole pipeline; model: one component at a
            time; group: one layer at a time.
    """
    model.offload_from(trainer.strategy.root_device, offload)
    if offload != "none" and not model.settings.trains_lora:
        raise InputError(
            f"offload {offload}: model.lora is null (full training), where a test uses two "
            "denoisers in turn, which can't be offloaded; use none"
        )
    if not any(isinstance(callback, ReportWriter) for callback in trainer.callbacks):  # type: ignore[attr-defined]
        report = ReportWriter(out, compare, undistilled, gallery, logs)
        trainer.callbacks.append(report)  # type: ignore[attr-defined]
    values = pl.Trainer.test(trainer, model, None, ckpt_path, verbose, datamodule, weights_only)
    if trainer.is_global_zero and ckpt_path is not None:
        print_next("export", "--ckpt_path", ckpt_path, "--out", "student")
    return values
