"""Writes the report of a test: the held-out rows, sampled with every contender and compared."""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lit_distill.data.batch import NO_TARGET, Batch
from lit_distill.data.whole_files import write_image
from lit_distill.data.whole_folders import check_free, draft_of, publish
from lit_distill.errors import InputError
from lit_distill.evaluation.contact_sheet import to_pil
from lit_distill.evaluation.evaluator import EvaluationBatch
from lit_distill.evaluation.metrics import latent_mse
from lit_distill.report.contenders import (
    Contender,
    ContenderConfig,
    ContenderResult,
    estimate_teacher_seconds,
)
from lit_distill.report.html_report import FILES, image_file, write_report
from lit_distill.report.run_info import describe_run, report_title, teacher_settings, usage_snippet
from lit_distill.report.sampling import HeldOutBatch, Samples, sample_held_out
from lit_distill.training.direct_distill import DirectDistill

MANIFEST_FILE = ".lit_distill_report.json"
"""Lists the files of the report: its folder may also hold the data set, or a run."""


class ReportWriter(Callback):
    """Samples the test rows with several contenders and writes a folder that compares them.

    The folder holds ``report.html`` (one file that opens without a network), ``metrics.json`` and
    ``metrics.csv`` (the summary), ``rows.csv`` (errors of each row), ``grid.png`` and
    ``images/<contender>/row_<n>.png``. Several processes must share the folder.

    Args:
        out: Folder to write to; None: ``report`` in the trainer's default_root_dir.
        compare: Further contenders: checkpoints or pipelines.
        undistilled: Steps and guidance of further contenders with the undistilled pipeline. They
            show what it achieves in similar time. None: the student's steps and twice as many,
            with the teacher's guidance.
        gallery: Largest number of rows in the page: half of them the worst, half the best.
        logs: Folder with the logs of the run, for the curves; None: beside the checkpoint.
    """

    def __init__(
        self,
        out: str | None = None,
        compare: list[str | ContenderConfig] | None = None,
        undistilled: list[tuple[int, float]] | None = None,
        gallery: int = 48,
        logs: str | None = None,
    ) -> None:
        if gallery < 1:
            raise InputError(f"gallery must be an integer >= 1, got {gallery}")
        self.out = out
        self.compare = [ContenderConfig(c) if isinstance(c, str) else c for c in compare or []]
        self.undistilled = undistilled
        self.gallery = gallery
        self.logs = logs
        self.held_out: list[HeldOutBatch] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the rows of an earlier test, and check that the report may be written.

        Raises:
            InputError: If a file of somebody else is in the way; names it.
        """
        self.held_out = []
        check_free(self._out(trainer), list(FILES), MANIFEST_FILE)

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows and the teacher's results."""
        assert isinstance(pl_module, DirectDistill)
        samples: EvaluationBatch = outputs["samples"]
        latents, undistilled_mse = samples.target_latents, samples.undistilled_mse
        assert latents is not None and undistilled_mse is not None
        target = pl_module.decode(latents, batch) if samples.target is None else samples.target
        without_target: Any = {**batch, **NO_TARGET}
        self.held_out.append(
            HeldOutBatch(
                batch=without_target,
                new=outputs["new"],
                target_latents=latents.cpu(),
                target=(target * 255).round().byte().cpu(),
                undistilled_mse=undistilled_mse.cpu(),
                samples=_known_samples(pl_module, outputs, batch),
            )
        )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Sample the rows with all contenders and write the report.

        The folder changes at the end, when the report is complete.

        Raises:
            InputError: If a file of somebody else is in the way; names it.
        """
        assert isinstance(pl_module, DirectDistill)
        if not self.held_out:
            return
        out = self._out(trainer)
        results = self._results(trainer, pl_module)
        numbers = [rows.batch["row"][index] for rows in self.held_out for index in rows.new]
        images = [image_file(result, row).as_posix() for result in results for row in numbers]
        check_free(out, [*FILES, *images], MANIFEST_FILE)
        with ExitStack() as stack:
            draft = ""
            if trainer.is_global_zero:
                draft = str(stack.enter_context(draft_of(out)))
            draft_folder = Path(trainer.strategy.broadcast(draft))
            records: list[dict[str, Any]] = []
            for result in results:
                records += self._sample(result, trainer, pl_module, draft_folder)
            estimate_teacher_seconds(results, [rows.batch for rows in self.held_out])
            rows = pd.DataFrame(_gathered(records)).sort_values(["row", "way"], ignore_index=True)
            if trainer.is_global_zero:
                facts = describe_run(trainer, pl_module, len(rows["row"].unique()))
                snippet = usage_snippet(trainer, pl_module, self.held_out[0].batch)
                logs = self._logs(trainer)
                title = report_title(pl_module, results)
                text = write_report(
                    draft_folder, title, results, rows, self.gallery, facts, snippet, logs
                )
                publish(draft_folder, out, MANIFEST_FILE)
                print(f"{text}\nreport: {out / 'report.html'}")

    def _out(self, trainer: pl.Trainer) -> Path:
        return Path(self.out or Path(trainer.default_root_dir) / "report")

    def _logs(self, trainer: pl.Trainer) -> Path | None:
        """Return where logs may be: Lightning keeps checkpoints in a folder beside them."""
        if self.logs is not None:
            return Path(self.logs)
        return Path(trainer.ckpt_path).parent.parent if trainer.ckpt_path else None

    def _results(self, trainer: pl.Trainer, module: DirectDistill) -> list[ContenderResult]:
        """Return an empty result for every contender, the teacher first.

        Raises:
            InputError: If two contenders have the same label.
        """
        batches = [rows.batch for rows in self.held_out]
        steps, cfg = teacher_settings(trainer, module)
        undistilled = self.undistilled
        if undistilled is None:
            most = max(batch["num_inference_steps"] for batch in batches)
            undistilled = [(most, cfg), (2 * most, cfg)]
        contenders = [
            Contender("teacher", "teacher", steps, cfg),
            Contender("undistilled", "undistilled"),
            *(Contender("undistilled", "undistilled", *settings) for settings in undistilled),
            Contender("student", "student"),
            *(config.contender(module) for config in self.compare),
        ]
        results: dict[str, ContenderResult] = {}
        for contender in contenders:
            result = ContenderResult(contender, contender.label(batches))
            keys = {other.key for other in results.values()}
            if contender.kind == "other" and result.key in keys:
                raise InputError(
                    f"compare: two contenders are called {result.label!r}; give one another name"
                )
            results.setdefault(result.label, result)
        return list(results.values())

    def _sample(
        self, result: ContenderResult, trainer: pl.Trainer, module: DirectDistill, out: Path
    ) -> list[dict[str, Any]]:
        """Sample the rows, fill in the result, save the images, and return a record of each row."""
        records: list[dict[str, Any]] = []
        taught = result.contender.kind == "teacher"
        evaluation = module.validator.evaluation.fresh(without_comparison=taught)
        if taught:  # its images are stored
            for rows in self.held_out:
                pixels = rows.target.to(module.device).float() / 255
                taken = EvaluationBatch(rows.batch["prompt"], preds=pixels).select(rows.new)
                evaluation.update(taken, rows.batch["num_inference_steps"])
                records += _record(result, rows, None, to_pil(pixels), out)
            result.values = evaluation.compute()
            return records
        precision = trainer.precision_plugin.forward_context
        for rows, samples, images in sample_held_out(result, module, self.held_out, precision):
            evaluation.update(samples.select(rows.new), rows.batch["num_inference_steps"])
            records += _record(result, rows, samples, images, out)
        module.release_undistilled()
        result.values = evaluation.compute()
        return records


def _known_samples(
    module: DirectDistill, outputs: dict[str, Any], batch: Batch
) -> dict[str, Samples]:
    """Return what a test step has sampled already, so that the report does not sample it again."""
    samples: EvaluationBatch = outputs["samples"]
    known = {}
    latents = {"student": samples.latents, "undistilled": outputs["undistilled"]}
    images = {"student": samples.preds}
    for kind, sampled in latents.items():
        if sampled is None:
            continue
        started = time.perf_counter()
        decoded = images.get(kind)
        pictures = to_pil(module.decode(sampled, batch) if decoded is None else decoded)
        seconds = outputs["seconds"][kind] + time.perf_counter() - started
        known[kind] = Samples(sampled.cpu(), pictures, seconds)
    return known


def _record(
    result: ContenderResult,
    rows: HeldOutBatch,
    samples: EvaluationBatch | None,
    images: list[Image.Image],
    out: Path,
) -> list[dict[str, Any]]:
    """Save the images of the rows that this process counts, and return a record of each.

    Args:
        result: Whose images these are.
        rows: The rows.
        samples: What to compute errors of; None: the records get no errors.
        images: One image for each row.
        out: The report's folder.
    """
    records = []
    batch = rows.batch
    for index in rows.new:
        row = batch["row"][index]
        record = {
            "row": row,
            "way": result.label,
            "prompt": batch["prompt"][index],
            "seed": batch["seed"][index],
            "num_inference_steps": batch["num_inference_steps"],
            "cfg_scale": batch["cfg_scale"],
            "evaluations": result.contender.denoiser_calls(batch),
            "latent_mse": None,
            "image_mse": None,
        }
        if samples is not None:
            record |= _errors(samples.select([index]))
        records.append(record)
        path = out / image_file(result, row)
        write_image(path, images[index])
    return records


def _errors(sample: EvaluationBatch) -> dict[str, float]:
    """Return the errors of one row, without that of the latents where they can't be compared."""
    assert sample.preds is not None and sample.target is not None
    errors = {"image_mse": (sample.preds - sample.target).square().mean().item()}
    if sample.latents is not None and sample.target_latents is not None:
        errors["latent_mse"] = latent_mse(sample.latents, sample.target_latents).item()
    return errors


def _gathered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return records
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, records)
    return [record for part in parts for record in part]
