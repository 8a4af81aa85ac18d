"""Exports a student: writes it for other tools, reloads it, and verifies that it is the same."""

from __future__ import annotations

import errno
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor

from lit_distill.adapters.inject import adapters_disabled, remove_adapters
from lit_distill.adapters.lora import LoRA, add_loras, differences
from lit_distill.adapters.lora_files import read_lora
from lit_distill.adapters.weights import extract_lora, fuse_lora, load_base_pipeline
from lit_distill.compute.step_adapters import step_names, switch_adapter_callback
from lit_distill.data.whole_files import write_file
from lit_distill.data.whole_folders import check_replaceable, draft_of, replace_folder
from lit_distill.errors import InputError
from lit_distill.export.base_model import load_checked_base
from lit_distill.export.facts import StudentFacts
from lit_distill.export.hub import upload
from lit_distill.export.load_student import FACTS_FILE, add_student
from lit_distill.export.lora_writer import LoRAWriter
from lit_distill.export.model_card import ExportSummary, Gallery, model_card
from lit_distill.export.readers import reader_for
from lit_distill.export.samples import sample_example, write_gallery
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.loading import DTYPES, load_pipeline
from lit_distill.pipelines.release import release
from lit_distill.training.checkpoint_io import read_checkpoint
from lit_distill.training.placement import place

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


ExportFormat = Literal["diffusers", "comfyui", "kohya", "diffsynth", "peft", "merged"]

SAMPLES_FILE = "samples.png"

TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest root mean square difference, relative to the root mean square of the expected values."""


class ExportError(RuntimeError):
    """An export that does not reproduce the student after reloading; the message says where."""


def export_student(
    checkpoint: str | Path | dict[str, Any],
    out_dir: str | Path,
    format: ExportFormat = "diffusers",
    *,
    dtype: str | None = None,
    max_shard_size: str = "5GB",
    device: str | torch.device = "cpu",
    push_to_hub: str | None = None,
) -> Path:
    """Export the student of a checkpoint, reload it, and verify that it reproduces the image.

    After writing, the base pipeline is loaded again, and the target's reader loads the export into
    it. The checkpoint's first held-out row is then sampled again and must give the student's
    result. The folder also gets ``README.md``, a model card in the hub's format, and
    ``samples.png``.

    =========== =======================================================================
    diffusers   pytorch_lora_weights.safetensors for ``pipe.load_lora_weights(out_dir)``
    comfyui     comfyui_lora.safetensors, with the names and alphas that ComfyUI reads
    kohya       kohya_lora.safetensors, as sd-scripts and musubi-tuner write it
    diffsynth   diffsynth_lora.safetensors, as DiffSynth-Studio writes it
    peft        adapter_model.safetensors and adapter_config.json for ``PeftModel``
    merged      a pipeline folder for ``DiffusionPipeline.from_pretrained(out_dir)``
    =========== =======================================================================

    A pipeline with two denoisers gets two LoRA files. A student with a LoRA for every step
    (model.lora_per_step) supports format diffusers only, with files step_1.safetensors and so on;
    the model card shows the callback that switches them. After training with a teacher's LoRA the
    files hold the sum of both LoRAs, for the plain base model. A fully trained denoiser is always
    exported as merged.

    Args:
        checkpoint: Path of a Lightning checkpoint (.ckpt) of `DirectDistill`, or its content.
        out_dir: Folder to write to; created if missing. An earlier export in it is replaced.
        format: One of the formats above.
        dtype: Data type of the tensors: float32, bfloat16 or float16. Default: float32 for a
            LoRA, as it was trained; that of the base model for merged.
        max_shard_size: Largest file of format merged.
        device: Device for sampling.
        push_to_hub: Hub repository (``user/name``) to upload the folder to; created if missing.

    Returns:
        The folder written to.

    Raises:
        FileNotFoundError: If the checkpoint does not exist.
        InputError: If the checkpoint can't be used, or can't be written in this format; if the
            folder holds files of somebody else; if the base model has changed since training.
        OSError: If a file can't be written. The folder is as before then.
        ExportError: If the reloaded export differs from the student.
    """
    if format not in get_args(ExportFormat):
        raise InputError(f"format must be one of {', '.join(get_args(ExportFormat))}: {format!r}")
    if dtype is not None and dtype not in DTYPES:
        raise InputError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    content = checkpoint if isinstance(checkpoint, dict) else read_checkpoint(checkpoint, mmap=True)
    content = content | {"state_dict": dict(content["state_dict"])}  # weights are taken out of it
    format = _supported_format(format, content["hyper_parameters"])
    out_dir = Path(out_dir)
    check_replaceable(out_dir)
    # Files appear in out_dir only after they are verified. The random state is kept for a training
    # run that continues: adapters are initialised at random before weights are loaded into them.
    with draft_of(out_dir) as draft, torch.random.fork_rng(devices=[]):
        try:
            export = _Export(content, draft, format, dtype, device)
            export.run(max_shard_size, push_to_hub or str(out_dir))
        except OSError as error:
            if str(draft) in str(error) and error.errno is not None:
                text = str(error.strerror).replace(str(draft), str(out_dir))
                raise OSError(error.errno, text) from error
            raise
        replace_folder(draft, out_dir)
    if push_to_hub is not None:
        upload(out_dir, push_to_hub)
    return out_dir


def _supported_format(format: ExportFormat, hparams: dict[str, Any]) -> ExportFormat:
    """Return the format to write: merged for a fully trained denoiser.

    Raises:
        InputError: If the student can't be written in this format.
    """
    if hparams["lora"] is None:
        if format not in ("diffusers", "merged"):
            raise InputError(
                f"format {format} is for a LoRA, but the whole denoiser was trained; use format "
                "merged"
            )
        return "merged"
    if hparams.get("lora_per_step") and format != "diffusers":
        raise InputError(
            f"format {format}: this student has a LoRA for every step (model.lora_per_step), but "
            "tools that read this format use one LoRA for all steps; use format diffusers, or "
            "train with model.lora_per_step: null"
        )
    return format


class _Export:
    """One export, in four phases: write, reload, verify, write the model card.

    Args:
        content: Content of the checkpoint.
        folder: Folder to write to.
        format: One that the student supports.
        dtype: Data type of the tensors; None: the default of the format.
        device: Device for sampling.
    """

    def __init__(
        self,
        content: dict[str, Any],
        folder: Path,
        format: ExportFormat,
        dtype: str | None,
        device: str | torch.device,
    ) -> None:
        self.content = content
        self.hparams: dict[str, Any] = content["hyper_parameters"]
        self.folder = folder
        self.format = format
        self.device = device
        base_dtype: str = self.hparams["torch_dtype"]
        self.dtype = DTYPES[dtype or (base_dtype if format == "merged" else "float32")]
        self.has_other_dtype = self.dtype != DTYPES[base_dtype]
        # Readers cast a LoRA to the data type of the base model.
        self.tolerance = max(TOLERANCES[self.dtype], TOLERANCES[DTYPES[base_dtype]])
        self.steps = step_names(self.hparams.get("lora_per_step") or 0)
        self.loras: dict[str | None, LoRA] = {}
        self.files: dict[str | None, dict[str, Path]] = {}
        self.columns: dict[str, list[Image.Image]] = {}

    def run(self, max_shard_size: str, where: str) -> None:
        """Run all phases.

        Args:
            max_shard_size: Largest file of format merged.
            where: Hub repository or folder that users will load the export from.

        Raises:
            InputError: If the format does not support the pipeline.
            ExportError: If the reloaded export differs from the student.
        """
        self._write_and_free(max_shard_size)
        pipe, reader = self._reload()
        has_scheduler = self._save_scheduler(pipe)
        difference = self._verify(pipe)
        merged_dtype = str(self.dtype).removeprefix("torch.")
        dtype = merged_dtype if self.format == "merged" else self.facts.torch_dtype
        summary = ExportSummary(self.format, reader, difference, has_scheduler, where, dtype)
        self._write_card(pipe, summary)
        release(pipe)

    # Phase 1: write

    def _write_and_free(self, max_shard_size: str) -> None:
        """Sample the student, write it, and free its pipeline."""
        base, digest = load_checked_base(self.content)
        original = dict(base.scheduler.config)
        content = self.content
        if self.has_other_dtype:  # the weights are needed once more
            content = content | {"state_dict": dict(content["state_dict"])}
        student = add_student(base, content).to(self.device)
        self.scheduler = student.scheduler
        changed = dict(self.scheduler.config) != original
        config = json.loads(self.scheduler.to_json_string()) if changed else {}
        self.facts = replace(
            StudentFacts.from_checkpoint(self.content, student),
            base_digest=digest,
            scheduler_config=config,
        )
        samples = self._sample(student)
        self.expected = samples[0][0]
        self.columns = {"student": [image for _, image in samples]}
        adapters: list[str | None] = [*self.steps] or [None]  # None: the only one
        self.loras = {adapter: extract_lora(student, adapter) for adapter in adapters}
        if self.hparams["lora"] is not None:
            with adapters_disabled(torch.nn.ModuleList(denoisers(student).values())):
                undistilled = [image for _, image in self._sample(student)]
                self.columns = {"undistilled": undistilled} | self.columns
        if self.format != "merged":
            self.loras = {k: self._with_teachers(lora, student) for k, lora in self.loras.items()}
            writer = LoRAWriter(self.folder, self.format, self.dtype, self.facts)
            self.files = {k: writer.write(student, lora, k) for k, lora in self.loras.items()}
            release(student)
        else:
            self._write_merged(self._pipeline_to_merge(student), max_shard_size)

    def _sample(self, pipe: DiffusionPipeline) -> list[tuple[Tensor, Image.Image]]:
        return [sample_example(pipe, e, **self.facts.call_kwargs) for e in self.facts.examples]

    def _with_teachers(self, lora: LoRA, student: DiffusionPipeline) -> LoRA:
        """Return the student's LoRA plus its teacher's, which the plain base model lacks."""
        if self.hparams.get("teacher_lora"):
            return add_loras(read_lora(self.hparams["teacher_lora"], student), lora)
        return lora

    def _pipeline_to_merge(self, student: DiffusionPipeline) -> DiffusionPipeline:
        """Return the student's pipeline without adapters, on the CPU, in the data type to write."""
        if not self.has_other_dtype:
            place(student, torch.device("cpu"))
            remove_adapters(student)
            return student
        release(student)
        pipe = load_base_pipeline(self.hparams, torch_dtype=self.dtype)
        return pipe if self.loras[None] else add_student(pipe, self.content)

    def _write_merged(self, pipe: DiffusionPipeline, max_shard_size: str) -> None:
        """Write the pipeline with the LoRA in its weights, and free it."""
        fuse_lora(pipe, self.loras[None])
        pipe.scheduler = self.scheduler
        try:
            pipe.save_pretrained(self.folder, max_shard_size=max_shard_size)
        except SafetensorError as error:
            raise OSError(errno.EIO, f"{self.folder} can't be written: {error}") from error
        release(pipe)
        facts = replace(self.facts, torch_dtype=str(self.dtype).removeprefix("torch."))
        text = json.dumps(facts.to_dict(), indent=2, ensure_ascii=False)
        write_file(self.folder / FACTS_FILE, (text + "\n").encode())

    # Phase 2: reload

    def _reload(self) -> tuple[DiffusionPipeline, str]:
        """Return a new pipeline with the export loaded, and the name of the reader.

        Raises:
            ExportError: If the reader fails, or a module does not get the student's update.
        """
        if self.format == "merged":
            pipe = load_pipeline(self.folder, torch_dtype=self.dtype)
            return pipe.to(self.device), "DiffusionPipeline.from_pretrained"
        pipe = load_pipeline(
            self.facts.base_model,
            revision=self.hparams.get("revision"),
            torch_dtype=self.hparams["torch_dtype"],
        )
        reader = reader_for(self.format, pipe)
        try:
            for adapter, files in self.files.items():
                reader.load(pipe, files, adapter)
        except Exception as error:
            raise ExportError(
                f"{reader.name} refuses what was written as {self.format}: "
                f"{type(error).__name__}: {error}"
            ) from error
        self._check_modules(pipe)
        return pipe.to(self.device), reader.name

    def _check_modules(self, pipe: DiffusionPipeline) -> None:
        errors = [
            error
            for adapter, lora in self.loras.items()
            for error in differences(extract_lora(pipe, adapter), lora, self.tolerance)
        ]
        if errors:
            more = [f"... and {len(errors) - 5} more"] if len(errors) > 5 else []
            raise ExportError("\n  ".join(["modules differ after reloading:", *errors[:5], *more]))

    def _save_scheduler(self, pipe: DiffusionPipeline) -> bool:
        """Save the student's scheduler if the pipeline has another, and return whether it has."""
        if dict(pipe.scheduler.config) == dict(self.scheduler.config):
            return False
        self.scheduler.save_pretrained(self.folder)
        pipe.scheduler = type(self.scheduler).from_pretrained(self.folder)
        return True

    # Phase 3: verify

    def _verify(self, pipe: DiffusionPipeline) -> float:
        """Return the relative difference between the latents of the export and the student.

        Raises:
            ExportError: If it is larger than rounding explains.
        """
        call_kwargs = dict(self.facts.call_kwargs)
        if self.steps:
            call_kwargs["callback_on_step_end"] = switch_adapter_callback(self.steps)
            pipe.set_adapters(self.steps[0])
        latents, _ = sample_example(pipe, self.facts.examples[0], **call_kwargs)
        error = (latents - self.expected).square().mean()
        difference = (error / self.expected.square().mean()).sqrt().item()
        if not difference <= self.tolerance:  # NaN is an error too
            raise ExportError(
                f"what was written as {self.format} does not reproduce the student's image: its "
                f"latents differ by {difference:.1e} (root mean square, relative), more than "
                f"rounding explains ({self.tolerance:.0e})"
            )
        return difference

    # Phase 4: model card

    def _write_card(self, pipe: DiffusionPipeline, summary: ExportSummary) -> None:
        columns = write_gallery(self.folder / SAMPLES_FILE, self.facts.examples, self.columns)
        text = model_card(self.facts, summary, pipe, Gallery(SAMPLES_FILE, columns))
        write_file(self.folder / "README.md", text.encode(errors="replace"))
