"""Lightning's Trainer with the subcommands of `lit-distill` as further methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from torch.utils.data import DataLoader

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.data.dataset_check import check_data, summary
from lit_distill.data.table_io import MetadataError
from lit_distill.export.exporter import ExportFormat, export_student
from lit_distill.report.contenders import ContenderConfig
from lit_distill.report.plots import plot_curves, read_logs
from lit_distill.report.report_writer import ReportWriter
from lit_distill.teacher.generate import generate_pairs
from lit_distill.teacher.prompts import plan_pairs, prompt_batches, read_prompts
from lit_distill.teacher.seed_check import check_pairing
from lit_distill.teacher.teacher import Teacher
from lit_distill.training.autoconfigure import quantization_error, run_preflight
from lit_distill.training.checkpoint_io import read_checkpoint
from lit_distill.training.direct_distill import DirectDistill


class DistillTrainer(pl.Trainer):
    """Lightning's Trainer, which can also generate and check pairs, report and export."""

    def test(  # type: ignore[override]
        self,
        model: pl.LightningModule | None = None,
        dataloaders: Any = None,  # noqa: ANN401
        ckpt_path: str | None = None,
        verbose: bool = False,
        datamodule: pl.LightningDataModule | None = None,
        weights_only: bool | None = None,
        *,
        out: str | None = None,
        compare: list[str | ContenderConfig] | None = None,
        undistilled: list[tuple[int, float]] | None = None,
        gallery: int = 48,
        logs: str | None = None,
    ) -> Any:  # noqa: ANN401
        """Draw the held-out rows with teacher, undistilled pipeline and student; write a report.

        The folder holds report.html (one file, opens offline: summary, curves, gallery,
        provenance), metrics.json, metrics.csv, rows.csv, grid.png and all images.

        Args:
            model: Which pipeline, unless a checkpoint says so.
            dataloaders: Not used by the command.
            ckpt_path: Checkpoint (.ckpt) of the student.
            verbose: Also print Lightning's own table.
            datamodule: The held-out rows.
            weights_only: Passed on to torch.load.
            out: Folder to write to; default: report in trainer.default_root_dir.
            compare: Checkpoints (.ckpt), or hub ids or folders of pipelines, drawn beside the
                student; or mappings with path, lora, num_inference_steps, cfg_scale and name, e.g.
                '[{lora: their/lora, num_inference_steps: 8, name: theirs}]'.
            undistilled: Steps and guidance of further ways to draw with the undistilled pipeline;
                default: the student's steps and twice as many, with the teacher's guidance.
            gallery: Largest number of rows in the page: half of them the worst, half the best.
            logs: Folder with the logs of the run, for the curves; default: beside the checkpoint.
        """
        if not any(isinstance(callback, ReportWriter) for callback in self.callbacks):  # type: ignore[attr-defined]
            report = ReportWriter(out, compare, undistilled, gallery, logs)
            self.callbacks.append(report)  # type: ignore[attr-defined]
        return super().test(model, dataloaders, ckpt_path, verbose, datamodule, weights_only)

    def plot(
        self,
        model: DirectDistill,
        datamodule: DistillDataModule | None = None,
        *,
        logs: str | list[str],
        out: str = "curves.png",
        metrics: list[str] | None = None,
    ) -> None:
        """Draw the curves that runs have logged with TensorBoardLogger or CSVLogger as a PNG.

        Args:
            model: Not used.
            datamodule: Not used.
            logs: Folder of a run, or a list of such folders: '[runs/a, runs/b]'.
            out: PNG file to write.
            metrics: Names of what to draw, e.g. '[train_loss, val_gap_closed]'; default: the
                training loss and what was validated.
        """
        folders = [logs] if isinstance(logs, str) else logs
        figure = plot_curves({folder: read_logs(folder) for folder in folders}, metrics)
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(out, dpi=150)
        print(f"curves: {out}")

    def generate(
        self,
        model: DirectDistill,
        datamodule: DistillDataModule | None = None,
        *,
        prompts: str,
        out: str,
        seeds_per_prompt: int = 1,
        num_inference_steps: int = 50,
        cfg_scale: float = 4.0,
        scheduler: str | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        first_seed: int = 0,
        limit: int | None = None,
        rand_device: str = "cpu",
        student_num_inference_steps: int = 4,
        student_cfg_scale: float = 1.0,
        store_trajectory: bool = False,
    ) -> None:
        """Draw the teacher's images, exact latents and metadata.csv from a file of prompts.

        Started again after an interruption it goes on where it was, and ends with the same files.
        Several processes (trainer.devices) share the work and write one table.

        Args:
            model: Which pipeline to draw with: teacher_model, or else the pretrained one with
                teacher_lora; of the other settings only torch_dtype, call_kwargs and, with
                store_trajectory, scheduler and sigmas matter.
            datamodule: Only its call_columns matter: fields of the prompts that are arguments of
                the pipeline's call.
            prompts: Text file with a prompt a line, or .csv, .json or .jsonl with a field prompt,
                and height and width where sizes differ.
            out: Local folder to write to.
            seeds_per_prompt: How often every prompt is drawn, each time with a seed of its own.
            num_inference_steps: The teacher's steps.
            cfg_scale: The teacher's classifier-free guidance, 1 = off. Its negative prompt:
                model.call_kwargs '{negative_prompt: blurry}'.
            scheduler: A scheduler class of diffusers, such as UniPCMultistepScheduler, with the
                settings of the pipeline's; default: the pipeline's own.
            height: Height in pixels of prompts without one; default: the pipeline's own.
            width: Width in pixels, together with height.
            batch_size: Prompts a batch and process.
            first_seed: Seed of the first row; the others count up from it. Give held-out pairs
                other seeds than training pairs.
            limit: Largest number of rows.
            rand_device: Device whose generator draws the noise: cpu works everywhere alike.
            student_num_inference_steps: Steps of the student, written to the CSV.
            student_cfg_scale: Guidance of the student, written to the CSV, 1 = off.
            store_trajectory: Keep also the teacher's states at the noise levels of the student's
                steps, for training with model.trajectory.
        """
        hyper = model.hparams
        teacher = Teacher(
            model=hyper["teacher_model"] or hyper["pretrained_model_name_or_path"],
            lora=hyper["teacher_lora"],
            revision=None if hyper["teacher_model"] else hyper["revision"],
            torch_dtype=hyper["torch_dtype"],
            call_kwargs=model.call_kwargs,
            call_columns=datamodule.call_columns if datamodule else {},
            num_inference_steps=num_inference_steps,
            cfg_scale=cfg_scale,
            scheduler=scheduler,
            height=height,
            width=width,
            batch_size=batch_size,
            rand_device=rand_device,
            student_num_inference_steps=student_num_inference_steps,
            student_cfg_scale=student_cfg_scale,
            student_scheduler=model.hparams["scheduler"],
            student_sigmas=model.hparams["sigmas"],
            store_trajectory=store_trajectory,
        )
        rows = read_prompts(prompts, teacher.call_columns)
        pairs = plan_pairs(rows, seeds_per_prompt, first_seed, limit)
        metadata = generate_pairs(self, teacher, pairs, out)
        if self.is_global_zero:
            print(f"{len(pairs)} pairs: {metadata}")

    def check(
        self,
        model: DirectDistill,
        datamodule: DistillDataModule,
        *,
        pairing: int = 0,
    ) -> None:
        """Check a data set: the tables, every picture whole, the headers of latents.

        No model is needed, but for --pairing, which draws some pairs again: with the teacher that
        provenance.json beside the table records, or else with the model's settings.

        Args:
            model: With --pairing: the pipeline, teacher_num_inference_steps, teacher_cfg_scale and
                call_kwargs where none is recorded. A name given here is preferred to the recorded.
            datamodule: metadata_path, val_metadata_path, and what they have to keep to.
            pairing: Number of rows of each table to draw again.
        """
        paths = [p for p in (datamodule.metadata_path, datamodule.val_metadata_path) if p]
        if not paths:
            raise SystemExit("data.metadata_path is not set: the table to check")
        good = True
        for path in paths:
            try:
                table = check_data(
                    path, datamodule.base_path, datamodule.call_columns, **datamodule.limits()
                )
            except (OSError, MetadataError) as error:
                print(error)
                good = False
                continue
            print(f"{path}: {len(table)} rows, no problem\n{summary(table)}")
            if pairing:
                found = check_pairing(path, table, model, self.strategy.root_device, pairing)
                print(found.drop(columns="alike").to_string(index=False))
                good &= bool(found["alike"].all())
        if not good:
            raise SystemExit(1)

    def predict(  # type: ignore[override]
        self,
        model: DirectDistill | None = None,
        dataloaders: Any = None,  # noqa: ANN401
        datamodule: DistillDataModule | None = None,
        return_predictions: bool | None = None,
        ckpt_path: str | None = None,
        weights_only: bool | None = None,
        prompts: str | None = None,
        num_inference_steps: int | None = None,
        cfg_scale: float | None = None,
        height: int | None = None,
        width: int | None = None,
        batch_size: int = 1,
        first_seed: int = 0,
    ) -> Any:  # noqa: ANN401
        """Draw the student's images of a file of prompts, or of held-out rows.

        Args:
            model: The model.
            dataloaders: Loaders of batches; default: those of `datamodule`.
            datamodule: Brings the held-out rows.
            return_predictions: Whether to return the images.
            ckpt_path: Checkpoint (.ckpt) of a run.
            weights_only: As in Trainer.fit.
            prompts: Text file with a prompt a line, or .csv or .jsonl with a field prompt; default:
                the rows of data.val_metadata_path.
            num_inference_steps: Steps for prompts; default: those of training.
            cfg_scale: Guidance for prompts, 1 = off; default: that of training.
            height: Height in pixels for prompts; default: that of training.
            width: Width in pixels for prompts; default: that of training.
            batch_size: Prompts a batch.
            first_seed: Seed of the first prompt; the others count up from it.
        """
        if prompts is not None:
            noted = read_checkpoint(ckpt_path)["lit_distill"]["facts"] if ckpt_path else {}
            asked = {"num_inference_steps": num_inference_steps, "cfg_scale": cfg_scale}
            asked |= {"height": height, "width": width}
            wanted = {name: value for name, value in asked.items() if value is not None}
            rows = read_prompts(prompts, datamodule.call_columns if datamodule else {})
            batches = prompt_batches(rows, noted | wanted, batch_size, first_seed)
            dataloaders, datamodule = DataLoader(batches, batch_size=None), None  # type: ignore[arg-type]
        return super().predict(
            model, dataloaders, datamodule, return_predictions, ckpt_path, weights_only
        )

    def preflight(
        self,
        model: DirectDistill,
        datamodule: DistillDataModule | None = None,
        *,
        prompt: str = "a photo of a cat that sleeps on a green sofa",
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 4,
    ) -> None:
        """Check that a pipeline can be distilled, by a few small draws, and say what to set.

        Of quantised weights it also says how far they turn the gradient, if both fit. Runs where
        trainer.accelerator says, in the pipeline's torch_dtype.

        Args:
            model: The pipeline, what is trained of it, and its call_kwargs.
            datamodule: Not used.
            prompt: A typical prompt.
            height: Height in pixels; default: the pipeline's own. Small sizes are quick.
            width: Width in pixels; default: the pipeline's own.
            num_inference_steps: The student's steps.
        """
        model.configure_model()
        size = {} if height is None else {"height": height}
        size |= {} if width is None else {"width": width}
        call = {"prompt": prompt, "num_inference_steps": num_inference_steps, **size}
        report = run_preflight(model.backbone, self, **call)
        if model.hparams["quantization"]:
            report.findings.append(quantization_error(model.backbone, self, **call))
        print(report)
        report.raise_failures()

    def export(
        self,
        model: DirectDistill,
        datamodule: DistillDataModule | None = None,
        *,
        ckpt_path: str,
        out: str,
        format: ExportFormat = "diffusers",
        dtype: str | None = None,
        max_shard_size: str = "5GB",
        push_to_hub: str | None = None,
    ) -> None:
        """Write the student of a checkpoint for other tools, load it back and compare its image.

        Args:
            model: Not used: the checkpoint says all.
            datamodule: Not used.
            ckpt_path: Checkpoint (.ckpt) of a run.
            out: Folder to write to.
            format: diffusers, comfyui, kohya, diffsynth or peft for a LoRA file; merged for a
                pipeline folder (always, when the whole denoiser was trained).
            dtype: Data type of the tensors: float32, bfloat16 or float16; default: float32 for a
                LoRA, that of the base model for merged.
            max_shard_size: Largest file of format merged.
            push_to_hub: Hub repository (user/name) to upload the folder to; made if missing.
        """
        if self.is_global_zero:
            folder = export_student(
                ckpt_path,
                out,
                format,
                dtype=dtype,
                max_shard_size=max_shard_size,
                device=self.strategy.root_device,
                push_to_hub=push_to_hub,
            )
            print(f"student written to {folder}, loaded back, and seen to draw the same image")
