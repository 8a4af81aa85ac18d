"""`lit-distill generate`: the teacher's pairs from a file of prompts."""

from __future__ import annotations

from collections.abc import Sequence

import lightning.pytorch as pl

from lit_distill.commands.next_step import print_fit
from lit_distill.data.datamodule import DistillDataModule
from lit_distill.pipelines.stages import Offload
from lit_distill.teacher.generate import generate_pairs
from lit_distill.teacher.prompts import plan_pairs, read_prompts
from lit_distill.teacher.teacher import Teacher
from lit_distill.training.direct_distill import DirectDistill


def generate(
    trainer: pl.Trainer,
    model: DirectDistill,
    datamodule: DistillDataModule | None = None,
    configs: Sequence[str] = (),
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
    offload: Offload = "none",
) -> None:
    """Generate the teacher's images, exact latents and metadata.csv from a file of prompts.

    Safe to interrupt: rerun the same command to resume; the files are the same in the end. With
    several processes (trainer.devices) each generates its share, and one table is written.

    Args:
        trainer: Devices, processes and progress bar.
        model: The pipeline to generate with: teacher_model, or else the pretrained one with
            teacher_lora. Of the other settings only torch_dtype, quantization and call_kwargs are
            used and, with store_trajectory, scheduler and sigmas.
        datamodule: Only its call_columns are used, fields of the prompts that are arguments of the
            pipeline's call, and its columns, such as {prompt: text}.
        configs: Configuration files that were given.
        prompts: Text file with one prompt a line, or a table (.csv, .json, .jsonl, .parquet, or a
            folder of datasets) with a field prompt, and height and width where sizes differ, and
            seed where it is given. Other fields must be in call_columns, unless columns is set.
        out: Local folder to write to.
        seeds_per_prompt: Number of images for each prompt, each with a different seed.
        num_inference_steps: Steps of the teacher.
        cfg_scale: Classifier-free guidance of the teacher, 1 = off. Its negative prompt:
            model.call_kwargs '{negative_prompt: blurry}'.
        scheduler: A scheduler class of diffusers, such as UniPCMultistepScheduler, with the
            configuration of the pipeline's scheduler; default: the pipeline's scheduler.
        height: Height in pixels of prompts without one; default: the pipeline's default.
        width: Width in pixels; set together with height.
        batch_size: Prompts per batch and process.
        first_seed: Seed of the first row; the others count up from it. Use other seeds for
            held-out pairs than for training pairs.
        limit: Largest number of rows.
        rand_device: Device whose generator samples the noise: cpu gives the same noise everywhere.
        student_num_inference_steps: Steps of the student, written to the CSV.
        student_cfg_scale: Guidance of the student, written to the CSV, 1 = off.
        store_trajectory: Also keep the teacher's states at the noise levels of the student's
            steps, for training with objective Trajectory.
        offload: What is on the device together: none: the whole pipeline; model: the encoders,
            for all prompts, then the denoiser, then the VAE; group: the same, with one layer of the
            denoiser at a time. The files are the same.
    """
    settings = model.settings
    teacher = Teacher(
        model=settings.teacher_model or settings.model_name(),
        lora=settings.teacher_lora,
        revision=None if settings.teacher_model else settings.revision,
        torch_dtype=settings.torch_dtype,
        call_kwargs=settings.call_kwargs or {},
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
        student_scheduler=settings.scheduler,
        student_sigmas=settings.sigmas,
        store_trajectory=store_trajectory,
        quantization=settings.quantization,
    )
    rows = read_prompts(prompts, teacher.call_columns, datamodule.columns if datamodule else {})
    pairs = plan_pairs(rows, seeds_per_prompt, first_seed, limit)
    metadata = generate_pairs(trainer, teacher, pairs, out, offload)
    if trainer.is_global_zero:
        print_fit(metadata, teacher.model, configs, f"{len(pairs)} pairs: {metadata}")
