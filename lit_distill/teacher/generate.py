"""The teacher's side: prompts in; lossless images, exact final latents and a metadata CSV out.

Drawing can be stopped at any moment and started again: a file is there whole or not at all, the
batches are the same in every run, and the CSV is derived from the files once all are there.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import RichProgressBar, TQDMProgressBar
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save
from torch.utils.data import DataLoader

from lit_distill.data.dataset import LATENTS_KEY, SIGMAS_KEY, TRAJECTORY_KEY
from lit_distill.data.filesystem import files_exist, is_url, open_file
from lit_distill.data.images import Picture, image_size
from lit_distill.data.schema import call_key
from lit_distill.pipelines.trajectory import TrajectoryRecorder
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.teacher import Teacher, record, student_sigmas

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


METADATA_FILE = "metadata.csv"

PROVENANCE_FILE = "provenance.json"

FOLDERS = ("images", "latents", "inputs")

PACKAGES = ("lit-distill", "torch", "diffusers", "transformers", "lightning")


def generate_pairs(
    trainer: pl.Trainer, teacher: Teacher, pairs: list[Pair], out: str | Path
) -> Path:
    """Draw the teacher's side of `pairs` and write a data set that `DistillDataModule` reads.

    Finished rows of an earlier, interrupted run are kept. The trainer brings devices, processes
    and the progress bar.

    Args:
        trainer: Its `predict` loop does the work.
        teacher: What draws, and how.
        pairs: What to draw.
        out: Local folder to write to: ``images/``, ``latents/``, ``metadata.csv``,
            ``provenance.json``, and ``inputs/``, copies of the rows' own pictures.

    Returns:
        Path of the CSV.

    Raises:
        ValueError: If the folder holds pairs made in another way, naming what differs.
        OSError: If something can't be written. What is finished stays.
    """
    if is_url(str(out)):
        raise ValueError(f"out must be a local folder, got {out!r}; copy it there once complete")
    out = Path(out)
    inputs = _inputs(pairs)
    _claim(out, teacher, pairs, inputs, writes=trainer.is_global_zero)
    if _unfinished(pairs, out):
        trainer.predict(_GenerateModule(teacher, pairs, out, inputs), return_predictions=False)
    metadata = out / METADATA_FILE
    if trainer.is_global_zero:
        missing = len(_unfinished(pairs, out))
        if missing:
            raise RuntimeError(f"{missing} of {len(pairs)} pairs are not there; run it again")
        write_whole(metadata, _metadata(teacher, pairs, out, inputs).encode())
    return metadata


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that appears only when it is complete.

    Raises:
        OSError: If it can't be written, naming the file and the reason.
    """
    # The process number keeps several ranks from writing to the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        reason = f"{path} can't be written: {error.strerror}; what is finished is kept"
        raise OSError(error.errno, f"{reason}, run the same command again to go on") from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)


def _unfinished(pairs: Sequence[Pair], out: Path) -> list[Pair]:
    """Return the pairs that lack a file."""
    files = [pair.files(out) for pair in pairs]
    there = files_exist([str(path) for both in files for path in both])
    return [p for p, *both in zip(pairs, there[::2], there[1::2], strict=True) if not all(both)]


def _inputs(pairs: Sequence[Pair]) -> dict[Picture, str]:
    """Return where in the data set the pictures that come with the prompts are, by content."""
    pictures = {v for pair in pairs for v in pair.call.values() if isinstance(v, Picture)}
    places = {}
    for picture in sorted(pictures):
        with open_file(picture) as stream:
            digest = hashlib.sha256(stream.read()).hexdigest()[:16]
        places[picture] = f"inputs/{digest}{Path(picture).suffix.lower()}"
    return places


def _claim(
    out: Path, teacher: Teacher, pairs: list[Pair], inputs: dict[Picture, str], writes: bool
) -> None:
    """Make the folder this data set's own, or see that it is.

    All processes look, one `writes`: it is done before any other begins to draw.
    """
    rows = json.dumps([[*pair, teacher.size(pair)] for pair in _plain(pairs, inputs)])
    facts = asdict(teacher) | {
        "rows": len(pairs),
        "rows_sha256": hashlib.sha256(rows.encode()).hexdigest(),
    }
    # A folder in which nothing was drawn yet is nobody's: a first try may have been refused.
    before = read_provenance(out) if any(out.glob("latents/[!.]*")) else None
    if before is not None:
        _compare(out, before, facts)
        found = before.get("versions")
        if found != _versions():
            rank_zero_warn(f"{out} was begun with {found}, now {_versions()}: bits may differ")
    if not writes:
        return
    try:
        for folder in FOLDERS[: 3 if inputs else 2]:
            (out / folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(error.errno, f"{out} can't be written: {error.strerror}") from error
    for folder in ("", *FOLDERS):
        for left in (out / folder).glob(".*.tmp"):
            left.unlink(missing_ok=True)  # by a run that was killed
    if before is None:
        _write_provenance(out, facts | {"versions": _versions()})
    for picture, place in inputs.items():
        if not (out / place).is_file():
            with open_file(picture) as stream:
                write_whole(out / place, stream.read())


def _plain(pairs: Sequence[Pair], inputs: dict[Picture, str]) -> list[Pair]:
    """Return pairs whose pictures are places in the data set."""
    return [
        pair._replace(call={name: inputs.get(value, value) for name, value in pair.call.items()})
        for pair in pairs
    ]


def read_provenance(out: str | Path) -> dict[str, Any] | None:
    """Return how the pairs of a folder or URL were made, None if that is not recorded."""
    try:
        with open_file(f"{out}/{PROVENANCE_FILE}") as stream:
            facts: dict[str, Any] = json.load(stream)
    except (FileNotFoundError, NotADirectoryError):
        return None
    return facts


def _write_provenance(out: Path, facts: dict[str, Any]) -> None:
    text = json.dumps(facts, indent=2, ensure_ascii=False) + "\n"
    write_whole(out / PROVENANCE_FILE, text.encode())


def _compare(out: Path, before: dict[str, Any], facts: dict[str, Any]) -> None:
    differences = [
        f"{name} was {_short(before.get(name))}, now {_short(value)}"
        for name, value in facts.items()
        if before.get(name) != value
    ]
    if differences:
        raise ValueError(
            f"{out} holds pairs made in another way ({'; '.join(differences)}); write to "
            "another folder, or delete this one"
        )


def _short(value: Any) -> str:  # noqa: ANN401
    text = repr(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _versions() -> dict[str, str]:
    return {name: version(name) for name in PACKAGES}


def _metadata(teacher: Teacher, pairs: list[Pair], out: Path, inputs: dict[Picture, str]) -> str:
    files = [pair.files(out) for pair in pairs]
    # A file of several frames is no target to train on: the exact latents are.
    with Image.open(files[0][0]) as first:
        kind = "video" if getattr(first, "is_animated", False) else "image"

    def size(pair: Pair, image: Path) -> tuple[int | str, int | str]:
        # Written also where it is the pipeline's own: reading a table then opens no image.
        return teacher.size(pair) or (("", "") if kind == "video" else image_size(image))

    sizes = [size(pair, image) for pair, (image, _) in zip(pairs, files, strict=True)]
    table = pd.DataFrame(
        {
            kind: [image.relative_to(out).as_posix() for image, _ in files],
            "prompt": [pair.prompt for pair in pairs],
            "seed": [pair.seed for pair in pairs],
            "rand_device": teacher.rand_device,
            "num_inference_steps": teacher.student_num_inference_steps,
            "cfg_scale": f"{teacher.student_cfg_scale:g}",
            "latents": [latents.relative_to(out).as_posix() for _, latents in files],
            "height": [height for height, _ in sizes],
            "width": [width for _, width in sizes],
            "teacher_model": teacher.model,
            "teacher_num_inference_steps": teacher.num_inference_steps,
            "teacher_cfg_scale": f"{teacher.cfg_scale:g}",
            **{
                column: [pair.call[argument] for pair in _plain(pairs, inputs)]
                for argument, column in teacher.call_columns.items()
            },
        }
    )
    return str(table.to_csv(index=False))


class _GenerateModule(pl.LightningModule):
    """Generates batches of pairs in Lightning's predict loop."""

    pipe: DiffusionPipeline

    def __init__(
        self, teacher: Teacher, pairs: list[Pair], out: Path, inputs: dict[Picture, str]
    ) -> None:
        super().__init__()
        self.teacher = teacher
        self.pairs = pairs
        self.out = out
        self.inputs = inputs
        alike: dict[Any, list[Pair]] = {}
        for pair in pairs:
            alike.setdefault((teacher.size(pair), call_key(pair.call)), []).append(pair)
        size = teacher.batch_size
        self.batches = [
            group[start : start + size]
            for group in alike.values()
            for start in range(0, len(group), size)
        ]
        # One of each size, the first: what is recorded must not depend on what is left to draw.
        self.examples = list({teacher.size(pair): pair for pair in reversed(pairs)}.values())
        self.drawn = 0
        self.sigmas: dict[Any, torch.Tensor] = {}

    def setup(self, stage: str) -> None:
        """Choose what is left to draw: the first process does, the others follow."""
        missing = {pair.number for pair in _unfinished(self.pairs, self.out)}
        # Whole batches are drawn again, since another batch would give other last bits.
        left = [batch for batch in self.batches if any(p.number in missing for p in batch)]
        self.left: list[list[Pair]] = self.trainer.strategy.broadcast(left)

    def configure_model(self) -> None:
        self.pipe = self.teacher.load()

    def on_predict_start(self) -> None:
        self.pipe.to(self.device)
        if self.teacher.store_trajectory:
            self.sigmas = {
                self.teacher.size(pair): student_sigmas(self.teacher, self.pipe, pair)
                for pair in self.examples
            }
        if self.trainer.is_global_zero:
            facts = {"drawn_with": record(self.teacher, self.pipe, self.examples)}
            before = read_provenance(self.out) or {}
            if "drawn_with" in before:
                _compare(self.out, before["drawn_with"], facts["drawn_with"])
            else:
                _write_provenance(self.out, before | facts)
        self.started = time.monotonic()

    def predict_dataloader(self) -> Any:  # noqa: ANN401
        mine = self.left[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=None, collate_fn=list)  # type: ignore[arg-type]

    def predict_step(self, batch: list[Pair], batch_idx: int) -> None:
        recorder = TrajectoryRecorder() if self.teacher.store_trajectory else None
        latents, images = self.teacher.sample(self.pipe, batch, recorder)
        tensors = [{LATENTS_KEY: final} for final in latents]
        if recorder is not None:
            found = recorder.trajectory().at(self.sigmas[self.teacher.size(batch[0])])
            for row, states in zip(tensors, found.states.transpose(0, 1), strict=True):
                row |= {TRAJECTORY_KEY: states, SIGMAS_KEY: found.sigmas}
        for pair, image, row in zip(_plain(batch, self.inputs), images, tensors, strict=True):
            self._write(pair, image, row)
        self.drawn += len(batch)

    def on_predict_batch_end(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Tell the rate of all processes in Lightning's bar, which knows the time left."""
        images = self.drawn * self.trainer.world_size
        text = f"{images / (time.monotonic() - self.started):.3g} images/s"
        bar = self.trainer.progress_bar_callback
        if isinstance(bar, TQDMProgressBar) and bar.predict_progress_bar is not None:
            bar.predict_progress_bar.set_postfix_str(text)
        elif isinstance(bar, RichProgressBar) and bar.progress is not None:
            task = bar.predict_progress_bar_id
            if task is not None:
                bar.progress.update(task, description=text)

    def on_predict_end(self) -> None:
        """Wait for the other processes: the CSV lists what all of them drew."""
        self.trainer.strategy.barrier()
        seconds = time.monotonic() - self.started
        images = sum(len(batch) for batch in self.left)
        rate = f"{images / seconds:.3g} images/s"
        rank_zero_info(f"Drew {images} images in {seconds:.1f} s, {rate}.")

    def _write(self, pair: Pair, image: Any, tensors: dict[str, torch.Tensor]) -> None:  # noqa: ANN401
        image_path, latents_path = pair.files(self.out)
        facts = asdict(self.teacher) | {"prompt": pair.prompt, "seed": pair.seed, "call": pair.call}
        note = PngInfo()
        note.add_itxt("lit_distill", json.dumps(facts, ensure_ascii=False))
        if not latents_path.is_file():
            write_whole(latents_path, save({k: t.cpu().contiguous() for k, t in tensors.items()}))
        if not image_path.is_file():
            # A video is an animated PNG: lossless, one file, and any browser plays it.
            first, *rest = image if isinstance(image, list) else [image]
            animated = {"save_all": True, "append_images": rest, "duration": 62} if rest else {}
            data = io.BytesIO()
            first.save(data, format="PNG", pnginfo=note, **animated)
            write_whole(image_path, data.getvalue())
