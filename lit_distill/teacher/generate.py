"""Generates the teacher's pairs: lossless images, exact final latents and a metadata CSV.

Generation can be interrupted at any time and resumed. A file either is complete or does not exist,
the batches are the same in every run, and the CSV is written once all files exist.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor
from torch.utils.data import DataLoader

from lit_distill.data.filesystem import is_url
from lit_distill.data.latents_file import LATENTS_KEY, SIGMAS_KEY, TRAJECTORY_KEY
from lit_distill.data.schema import call_key
from lit_distill.data.whole_folders import locked
from lit_distill.errors import InputError
from lit_distill.pipelines.components import move
from lit_distill.pipelines.stages import Denoised, Offload, check_offload
from lit_distill.pipelines.trajectory import TrajectoryRecorder
from lit_distill.teacher.finished import check_sample
from lit_distill.teacher.pair_writer import METADATA_FILE, PairWriter
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.provenance import (
    METADATA_KEY,
    pipeline_facts,
    read_provenance,
    record_metadata,
    record_pipeline,
    record_settings,
)
from lit_distill.teacher.staged import StagedTeacher
from lit_distill.teacher.teacher import Teacher, student_sigmas

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


DECODED_TOGETHER = 16
"""Batches that are denoised before they are decoded, if the VAE is offloaded meanwhile."""


def generate_pairs(
    trainer: pl.Trainer,
    teacher: Teacher,
    pairs: list[Pair],
    out: str | Path,
    offload: Offload = "none",
) -> Path:
    """Generate the targets of `pairs` and write a data set for `DistillDataModule`.

    Finished pairs of an interrupted run are kept.

    Args:
        trainer: Its predict loop generates the pairs, on its devices and processes.
        teacher: The settings of the teacher.
        pairs: The pairs to generate.
        out: Local folder to write to: ``images/``, ``latents/``, ``metadata.csv``,
            ``provenance.json``, and ``inputs/``, copies of the pictures that come with prompts.
        offload: Which components are on the device together: none: all; model: encoders, then
            denoisers, then the VAE; group: the same, but only a layer of the denoisers at a time.

    Returns:
        Path of the CSV.

    Raises:
        InputError: If the folder holds pairs made with other settings, naming the differences, or
            files of somebody else; if a text can't be stored; or if the teacher generates NaN,
            infinite values or a blank image.
        OSError: If a file can't be written. Finished pairs are kept.
    """
    if is_url(str(out)):
        raise InputError(f"out must be a local folder, got {out!r}; copy it there once complete")
    check_offload(offload, trainer.strategy.root_device)
    writer = PairWriter(teacher, pairs, Path(out))
    writer.check_texts()
    with ExitStack() as stack:
        if trainer.is_global_zero:
            writer.create_folders()
            stack.enter_context(locked(writer.out))
        _write_pairs(trainer, writer, offload)
    return writer.out / METADATA_FILE


def _write_pairs(trainer: pl.Trainer, writer: PairWriter, offload: Offload) -> None:
    """Generate what is missing, and write the table."""
    # Process 0 creates the folders before any process generates.
    record_settings(writer, write=trainer.is_global_zero)
    if trainer.is_global_zero:
        writer.remove_temporary_files()
        writer.check_metadata((read_provenance(writer.out) or {}).get(METADATA_KEY))
        writer.copy_inputs()
        if damaged := writer.damaged():
            rank_zero_warn(
                f"{writer.out}: {len(damaged)} damaged files are generated again: "
                f"{', '.join(damaged[:5])}{', ...' if damaged[5:] else ''}"
            )
    if writer.unfinished():
        trainer.predict(_GenerateModule(writer, offload), return_predictions=False)
    if trainer.is_global_zero:
        missing = len(writer.unfinished())
        if missing:
            raise RuntimeError(
                f"{missing} of {len(writer.pairs)} pairs are missing; run the same command again"
            )
        record_metadata(writer.out, writer.write_metadata())


class _GenerateModule(pl.LightningModule):
    """Generates batches of pairs in Lightning's predict loop."""

    pipe: DiffusionPipeline

    def __init__(self, writer: PairWriter, offload: Offload) -> None:
        super().__init__()
        self.writer = writer
        self.offload = offload
        self.staged: StagedTeacher | None = None
        self.denoised: list[tuple[list[Pair], Denoised, list[dict[str, Tensor]]]] = []
        self.teacher = writer.teacher
        buckets: dict[Any, list[Pair]] = {}
        for pair in writer.pairs:
            buckets.setdefault((self.teacher.size(pair), call_key(pair.call)), []).append(pair)
        size = self.teacher.batch_size
        self.batches = [
            bucket[start : start + size]
            for bucket in buckets.values()
            for start in range(0, len(bucket), size)
        ]
        # The first pair of each size: what is recorded must not depend on which pairs are left.
        by_size = {self.teacher.size(pair): pair for pair in reversed(writer.pairs)}
        self.examples = list(by_size.values())
        self.generated = 0
        self.sigmas: dict[Any, Tensor] = {}

    def setup(self, stage: str) -> None:
        """Find the batches that are left; process 0 decides for all processes."""
        missing = {pair.number for pair in self.writer.unfinished()}
        # Whole batches are generated again, since the last bits depend on the batch.
        remaining = [batch for batch in self.batches if any(p.number in missing for p in batch)]
        self.remaining: list[list[Pair]] = self.trainer.strategy.broadcast(remaining)

    def configure_model(self) -> None:
        self.pipe = self.teacher.load()

    def on_predict_start(self) -> None:
        if self.offload == "none":
            move(self.pipe.components.values(), self.device)
        if self.teacher.store_trajectory:
            self.sigmas = {
                self.teacher.size(pair): student_sigmas(self.teacher, self.pipe, pair)
                for pair in self.examples
            }
        if self.trainer.is_global_zero:
            facts = pipeline_facts(self.teacher, self.pipe, self.examples)
            record_pipeline(self.writer.out, facts)
        self.started = time.monotonic()
        if self.offload != "none":
            options = (self.device, self.offload, self.share())
            self.staged = StagedTeacher(self.teacher, self.pipe, *options)

    def share(self) -> list[list[Pair]]:
        """Return the batches of this process."""
        return self.remaining[self.trainer.global_rank :: self.trainer.world_size]

    def predict_dataloader(self) -> Any:  # noqa: ANN401
        return DataLoader(self.share(), batch_size=None, collate_fn=list)  # type: ignore[arg-type]

    def predict_step(self, batch: list[Pair], batch_idx: int) -> None:
        recorder = TrajectoryRecorder() if self.teacher.store_trajectory else None
        if self.staged is None:
            latents, images = self.teacher.sample(self.pipe, batch, recorder)
            self._write(batch, images, self._tensors(batch, latents, recorder))
            return
        denoised = self.staged.denoise(batch, recorder)
        tensors = self._tensors(batch, denoised.latents, recorder)
        self.denoised.append((batch, denoised, tensors))
        if len(self.denoised) == DECODED_TOGETHER:
            self._decode()

    def on_predict_epoch_end(self) -> None:
        """Decode what is left."""
        self._decode()

    def _decode(self) -> None:
        for batch, denoised, tensors in self.denoised:
            assert self.staged is not None
            self._write(batch, self.staged.decode(batch, denoised), tensors)
        self.denoised.clear()

    def _tensors(
        self, batch: list[Pair], latents: Tensor, recorder: TrajectoryRecorder | None
    ) -> list[dict[str, Tensor]]:
        """Return the tensors to write for each pair."""
        files = [{LATENTS_KEY: final} for final in latents]
        if recorder is not None:
            path = recorder.trajectory().at(self.sigmas[self.teacher.size(batch[0])])
            for tensors, states in zip(files, path.states.transpose(0, 1), strict=True):
                tensors |= {TRAJECTORY_KEY: states, SIGMAS_KEY: path.sigmas}
        return files

    def _write(self, batch: list[Pair], images: list[Any], files: list[dict[str, Tensor]]) -> None:
        pairs = self.writer.with_input_paths(batch)
        samples = list(zip(pairs, images, files, strict=True))
        checked = getattr(self.pipe, "safety_checker", None) is not None
        for pair, image, tensors in samples:
            check_sample(pair, image, tensors, self.teacher.torch_dtype, checked)
        for pair, image, tensors in samples:
            self.writer.write_pair(pair, image, tensors)
        self.generated += len(batch)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Show the rate of all processes in Lightning's progress bar."""
        images = self.generated * self.trainer.world_size
        text = f"{images / (time.monotonic() - self.started):.3g} images/s"
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar) and bar.predict_progress_bar is not None:
            bar.predict_progress_bar.set_postfix_str(text)
        elif isinstance(bar, RichProgressBar) and bar.progress is not None:
            task = bar.predict_progress_bar_id
            if task is not None:
                bar.progress.update(task, description=text)

    def on_predict_end(self) -> None:
        """Wait for the other processes: the CSV lists the pairs of all of them."""
        self.trainer.strategy.barrier()
        seconds = time.monotonic() - self.started
        images = sum(len(batch) for batch in self.remaining)
        rate = f"{images / seconds:.3g} images/s"
        rank_zero_info(f"Generated {images} images in {seconds:.1f} s, {rate}.")
