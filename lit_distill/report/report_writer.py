"""The report of a test: the held-out rows drawn in every way, measured, timed and shown."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import Callback
from PIL import Image

from lit_distill.data.batch import NO_TARGET, Batch
from lit_distill.evaluation.contact_sheet import to_pil
from lit_distill.evaluation.evaluator import EvaluationBatch
from lit_distill.evaluation.metrics import latent_mse
from lit_distill.report.contenders import Contender, ContenderConfig, HeldOutBatch
from lit_distill.report.html_report import image_file, write_report
from lit_distill.report.run_info import describe_run, run_snippet, teacher_settings
from lit_distill.training.direct_distill import DirectDistill


class ReportWriter(Callback):
    """Samples the test rows in several ways and writes a folder that compares them.

    ``report.html`` (one file, opens anywhere without a network), ``metrics.json`` and
    ``metrics.csv`` (the summary), ``rows.csv`` (errors of each row), ``grid.png`` and
    ``images/<way>/row_<n>.png``. With several processes they must share the folder.

    Args:
        out: Folder to write to; None: ``report`` in the trainer's default_root_dir.
        compare: Checkpoints or pipelines drawn as well.
        undistilled: Steps and guidance of further ways to draw with the undistilled pipeline, so
            that nobody is misled about what else its time buys; None: the student's steps and
            twice as many, with the teacher's guidance.
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
            raise ValueError(f"gallery must be an integer >= 1, got {gallery}")
        self.out = out
        self.compare = [ContenderConfig(c) if isinstance(c, str) else c for c in compare or []]
        self.undistilled = undistilled
        self.gallery = gallery
        self.logs = logs
        self.held: list[HeldOutBatch] = []

    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget an earlier test."""
        self.held = []

    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Batch,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Keep the rows and the teacher's side of them."""
        assert isinstance(pl_module, DirectDistill)
        draws: EvaluationBatch = outputs["samples"]
        latents, undistilled_mse = draws.target_latents, draws.undistilled_mse
        assert latents is not None and undistilled_mse is not None
        target = pl_module.decode(latents, batch) if draws.target is None else draws.target
        light: Any = {**batch, **NO_TARGET}
        pixels = (target * 255).round().byte().cpu()
        self.held.append(
            HeldOutBatch(light, outputs["new"], latents.cpu(), pixels, undistilled_mse.cpu())
        )

    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Draw in all ways and write the folder."""
        assert isinstance(pl_module, DirectDistill)
        if not self.held:
            return
        out = Path(self.out or Path(trainer.default_root_dir) / "report")
        if trainer.is_global_zero:
            if (out / "metrics.json").is_file():  # of an earlier report, perhaps of other ways
                shutil.rmtree(out / "images", ignore_errors=True)
            out.mkdir(parents=True, exist_ok=True)
        trainer.strategy.barrier()
        ways = self._ways(trainer, pl_module)
        records = [record for way in ways for record in self._draw(way, trainer, pl_module, out)]
        rows = pd.DataFrame(_gathered(records)).sort_values(["row", "way"], ignore_index=True)
        if trainer.is_global_zero:
            facts = describe_run(trainer, pl_module, len(rows["row"].unique()))
            snippet = run_snippet(trainer, pl_module, self.held[0].batch)
            summary = write_report(
                out, ways, rows, self.gallery, facts, snippet, self._logs(trainer)
            )
            print(summary)
            print(f"report: {out / 'report.html'}")

    def _logs(self, trainer: pl.Trainer) -> Path | None:
        """Return where logs may be: Lightning keeps checkpoints in a folder beside them."""
        if self.logs is not None:
            return Path(self.logs)
        return Path(trainer.ckpt_path).parent.parent if trainer.ckpt_path else None

    def _ways(self, trainer: pl.Trainer, module: DirectDistill) -> list[Contender]:
        batches = [held.batch for held in self.held]
        steps, cfg = teacher_settings(trainer, module)
        further = self.undistilled
        if further is None:
            most = max(batch["num_inference_steps"] for batch in batches)
            further = [(most, cfg), (2 * most, cfg)]
        ways = [
            Contender("teacher", "teacher", steps, cfg),
            Contender("undistilled", "undistilled"),
            *(Contender("undistilled", "undistilled", *settings) for settings in further),
            Contender("student", "student"),
            *(candidate.way(module) for candidate in self.compare),
        ]
        different: dict[str, Contender] = {}
        for way in ways:
            way.name_after(batches)
            if way.kind == "other" and way.key in {known.key for known in different.values()}:
                raise ValueError(
                    f"compare: two ways are called {way.label!r}; give one another name"
                )
            different.setdefault(way.label, way)
        return list(different.values())

    def _draw(
        self, way: Contender, trainer: pl.Trainer, module: DirectDistill, out: Path
    ) -> list[dict[str, Any]]:
        """Draw the rows, fill in the way's values, save images, and return what each row gave."""
        evaluation = module.validator.evaluation.fresh()
        teacher = way.kind == "teacher"
        records: list[dict[str, Any]] = []
        if teacher:  # its images are stored
            for held in self.held:
                records += _record(way, held, None, to_pil(held.target.float() / 255), out)
        # The teacher draws two batches again, to be timed and to show that the pairs are its own.
        rows = self.held[:2] if teacher else self.held
        precision = trainer.precision_plugin.forward_context
        for held, draws, images in way.sample(module, rows, precision):
            evaluation.update(draws.select(held.new), held.batch["num_inference_steps"])
            if not teacher:
                records += _record(way, held, draws, images, out)
        module.release_undistilled()
        values = evaluation.compute()
        way.values = {"latent_mse": values["latent_mse"]} if teacher else values
        return records


def _record(
    way: Contender,
    held: HeldOutBatch,
    draws: EvaluationBatch | None,
    images: list[Image.Image],
    out: Path,
) -> list[dict[str, Any]]:
    """Save the images of the rows that count, and return their errors."""
    records = []
    for index in held.new:
        batch, row = held.batch, held.batch["row"][index]
        record = {
            "row": row,
            "way": way.label,
            "prompt": batch["prompt"][index],
            "seed": batch["seed"][index],
            "num_inference_steps": batch["num_inference_steps"],
            "cfg_scale": batch["cfg_scale"],
            "evaluations": way.evaluations(batch),
            "latent_mse": None,
            "image_mse": None,
        }
        if draws is not None:
            one = draws.select([index])
            assert one.preds is not None and one.target is not None
            record["image_mse"] = (one.preds - one.target).square().mean().item()
            if one.latents is not None and one.target_latents is not None:
                record["latent_mse"] = latent_mse(one.latents, one.target_latents).item()
        records.append(record)
        path = out / image_file(way, row)
        path.parent.mkdir(parents=True, exist_ok=True)
        images[index].save(path)
    return records


def _gathered(records: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the records of all processes."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return records
    parts: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(parts, records)
    return [record for part in parts for record in part]
