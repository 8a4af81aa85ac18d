"""The teacher's side: prompts in; lossless images, exact final latents and a metadata CSV out.

Drawing can be stopped at any moment and started again: a file is there whole or not at all, the
batches are the same in every run, and the CSV is derived from the files once all are there.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import lightning.pytorch as pl
import pandas as pd
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from lit_distill.adapters import base_pipeline
from lit_distill.data import LATENTS_KEY, collate_calls, open_pictures
from lit_distill.metadata import Problems, call_key, read_calls
from lit_distill.rollout import draw

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

METADATA_FILE = "metadata.csv"
PROVENANCE_FILE = "provenance.json"


class Prompt(NamedTuple):
    """What to draw: a text, and further arguments of the pipeline's call that go with it."""

    text: str
    call: dict[str, Any]


class Pair(NamedTuple):
    """One row to draw: its place in the data set, its prompt, and the seed of its noise."""

    number: int
    prompt: str
    seed: int
    call: dict[str, Any]

    def files(self, out: Path) -> tuple[Path, Path]:
        """Return the paths of its image and its latents."""
        return (
            out / "images" / f"{self.number:06d}.png",
            out / "latents" / f"{self.number:06d}.safetensors",
        )


@dataclass(frozen=True)
class Teacher:
    """Everything that decides what the teacher draws, and the student's steps to be recorded.

    Attributes:
        model: Hub id or folder of the pipeline.
        lora: LoRA that is fused into it, if any.
        revision: Branch, tag or commit of the hub repository.
        torch_dtype: Data type of the weights.
        num_inference_steps: The teacher's steps.
        cfg_scale: The teacher's guidance, 1 = off.
        height: Height in pixels; None: the pipeline's default.
        width: Width in pixels; None: the pipeline's default.
        rand_device: Device whose generator draws the noise.
        batch_size: Prompts a batch; part of the result, since sums depend on it in the last bit.
        call_kwargs: Further arguments of the pipeline's call, e.g. ``negative_prompt``.
        call_columns: Arguments of the pipeline's call that every row brings, and their columns.
        student_num_inference_steps: Written to the CSV for the student.
        student_cfg_scale: Written to the CSV for the student.
    """

    model: str
    lora: str | None = None
    revision: str | None = None
    torch_dtype: str = "bfloat16"
    num_inference_steps: int = 50
    cfg_scale: float = 4.0
    height: int | None = None
    width: int | None = None
    rand_device: str = "cpu"
    batch_size: int = 1
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    call_columns: dict[str, str] = field(default_factory=dict)
    student_num_inference_steps: int = 4
    student_cfg_scale: float = 1.0

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name in ("num_inference_steps", "batch_size", "student_num_inference_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be an integer >= 1, got {getattr(self, name)}")
        for name in ("cfg_scale", "student_cfg_scale"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} must be >= 1 (1 = off), got {getattr(self, name)}")


def read_prompts(path: str | Path, call_columns: dict[str, str] | None = None) -> list[Prompt]:
    """Read prompts from a .csv or .jsonl file (field ``prompt``) or a text file, one a line.

    Args:
        path: The file.
        call_columns: Further fields that are arguments of the pipeline's call, argument -> field:
            pictures, relative to the file's folder, numbers or texts.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it holds no prompt, or lacks a field, or a picture can't be read.
    """
    path = Path(path)
    call_columns = call_columns or {}
    if not path.is_file():
        raise FileNotFoundError(f"prompts file {path} does not exist")
    if path.suffix == ".csv":
        table = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    elif path.suffix == ".jsonl":
        table = pd.read_json(path, lines=True, dtype=False).astype(str)
    else:
        table = pd.DataFrame({"prompt": path.read_text(encoding="utf-8-sig").splitlines()})
    for name in ("prompt", *call_columns.values()):
        if name not in table:
            raise ValueError(f"{path} has no field {name!r}; found {', '.join(map(repr, table))}")
    first = 2 if path.suffix == ".csv" else 1
    table = table.assign(row=range(first, first + len(table)), image="")
    table = table[table["prompt"].str.strip() != ""]
    if table.empty:
        raise ValueError(f"{path} holds no prompt")
    problems = Problems(path)
    calls = read_calls(table, call_columns, path.parent, problems)
    problems.check()
    texts = table["prompt"].str.strip()
    return [Prompt(text, call) for text, call in zip(texts, calls, strict=True)]


def plan_pairs(
    prompts: list[Prompt], seeds_per_prompt: int, first_seed: int = 0, limit: int | None = None
) -> list[Pair]:
    """Return the rows to draw: every prompt once, then every prompt again, each with its own seed.

    Args:
        prompts: The prompts.
        seeds_per_prompt: How often every prompt is drawn, >= 1.
        first_seed: Seed of the first row; the others count up from it.
        limit: Largest number of rows; None: all.

    Raises:
        ValueError: If a number is out of range.
    """
    for name, value in (("seeds_per_prompt", seeds_per_prompt), ("limit", limit)):
        if value is not None and value < 1:
            raise ValueError(f"{name} must be an integer >= 1, got {value}")
    if first_seed < 0:
        raise ValueError(f"first_seed must be >= 0, got {first_seed}")
    rows = enumerate(prompt for _ in range(seeds_per_prompt) for prompt in prompts)
    return [Pair(index, prompt.text, first_seed + index, prompt.call) for index, prompt in rows][
        :limit
    ]


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
        out: Folder to write to: ``images/``, ``latents/``, ``metadata.csv``, ``provenance.json``.

    Returns:
        Path of the CSV.

    Raises:
        ValueError: If the folder holds pairs made in another way, naming what differs.
    """
    out = Path(out)
    _claim(out, teacher, pairs)
    metadata = out / METADATA_FILE
    if any(not file.is_file() for pair in pairs for file in pair.files(out)):
        trainer.predict(_Draws(teacher, pairs, out), return_predictions=False)
    if trainer.is_global_zero:
        _write_metadata(metadata, teacher, pairs, out)
    return metadata


def _claim(out: Path, teacher: Teacher, pairs: list[Pair]) -> None:
    """Write the provenance file, or compare with the one that is there."""
    rows = json.dumps(pairs, ensure_ascii=False, default=lambda path: path.name)
    facts = asdict(teacher) | {
        "rows": len(pairs),
        "rows_sha256": hashlib.sha256(rows.encode()).hexdigest(),
    }
    path = out / PROVENANCE_FILE
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        differences = [
            f"{name} was {before.get(name)!r}, now {value!r}"
            for name, value in facts.items()
            if before.get(name) != value
        ]
        if differences:
            raise ValueError(
                f"{out} holds pairs made in another way ({'; '.join(differences)}); write to "
                "another folder, or delete this one"
            )
        return
    for folder in ("images", "latents"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    versions = {name: version(name) for name in ("lit-distill", "torch", "diffusers")}
    with _whole(path) as temporary:
        text = json.dumps(facts | {"versions": versions}, indent=2, ensure_ascii=False)
        temporary.write_text(text + "\n", encoding="utf-8")


@contextmanager
def _whole(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; `path` appears only when that is complete."""
    # The process number keeps several ranks from writing to the same temporary file.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _write_metadata(path: Path, teacher: Teacher, pairs: list[Pair], out: Path) -> None:
    files = [pair.files(out) for pair in pairs]
    # A file of several frames is no target to train on: the exact latents are.
    with Image.open(files[0][0]) as first:
        kind = "video" if getattr(first, "is_animated", False) else "image"
    table = pd.DataFrame(
        {
            kind: [image.relative_to(out).as_posix() for image, _ in files],
            "prompt": [pair.prompt for pair in pairs],
            "seed": [pair.seed for pair in pairs],
            "rand_device": teacher.rand_device,
            "num_inference_steps": teacher.student_num_inference_steps,
            "cfg_scale": f"{teacher.student_cfg_scale:g}",
            "latents": [latents.relative_to(out).as_posix() for _, latents in files],
            "height": "" if teacher.height is None else teacher.height,
            "width": "" if teacher.width is None else teacher.width,
            "teacher_model": teacher.model,
            "teacher_num_inference_steps": teacher.num_inference_steps,
            "teacher_cfg_scale": f"{teacher.cfg_scale:g}",
            **{
                column: [_as_text(pair.call[argument], out) for pair in pairs]
                for argument, column in teacher.call_columns.items()
            },
        }
    )
    with _whole(path) as temporary:
        table.to_csv(temporary, index=False)


def _as_text(value: Any, out: Path) -> Any:  # noqa: ANN401
    """Return a call argument as the CSV holds it: paths relative to the CSV's folder."""
    return os.path.relpath(value, out) if isinstance(value, Path) else value


class _Draws(pl.LightningModule):
    """Draws batches of pairs in Lightning's predict loop."""

    pipe: DiffusionPipeline

    def __init__(self, teacher: Teacher, pairs: list[Pair], out: Path) -> None:
        super().__init__()
        self.teacher = teacher
        self.out = out
        alike: dict[str, list[Pair]] = {}
        for pair in pairs:
            alike.setdefault(call_key(pair.call), []).append(pair)
        size = teacher.batch_size
        batches = [
            group[start : start + size]
            for group in alike.values()
            for start in range(0, len(group), size)
        ]
        # Whole batches are drawn again, since another batch would give other last bits.
        self.batches = [
            batch
            for batch in batches
            if any(not file.is_file() for pair in batch for file in pair.files(out))
        ]

    def configure_model(self) -> None:
        teacher = self.teacher
        self.pipe = base_pipeline(
            {
                "pretrained_model_name_or_path": teacher.model,
                "revision": teacher.revision,
                "torch_dtype": teacher.torch_dtype,
                "teacher_lora": teacher.lora,
            }
        )

    def on_predict_start(self) -> None:
        self.pipe.to(self.device)

    def predict_dataloader(self) -> Any:  # noqa: ANN401
        mine = self.batches[self.trainer.global_rank :: self.trainer.world_size]
        return DataLoader(mine, batch_size=None, collate_fn=list)  # type: ignore[arg-type]

    def predict_step(self, batch: list[Pair], batch_idx: int) -> None:
        teacher = self.teacher
        size = {"height": teacher.height, "width": teacher.width} if teacher.height else {}
        latents, images = draw(
            self.pipe,
            num_inference_steps=teacher.num_inference_steps,
            cfg_scale=teacher.cfg_scale,
            generator=[torch.Generator(teacher.rand_device).manual_seed(p.seed) for p in batch],
            prompt=[pair.prompt for pair in batch],
            **size,
            **teacher.call_kwargs,
            **collate_calls([open_pictures(pair.call) for pair in batch]),
        )
        for pair, image, final in zip(batch, images, latents, strict=True):
            self._write(pair, image, final)

    def _write(self, pair: Pair, image: Any, latents: torch.Tensor) -> None:  # noqa: ANN401
        image_path, latents_path = pair.files(self.out)
        call = {argument: _as_text(value, self.out) for argument, value in pair.call.items()}
        facts = asdict(self.teacher) | {"prompt": pair.prompt, "seed": pair.seed, "call": call}
        note = PngInfo()
        note.add_itxt("lit_distill", json.dumps(facts, ensure_ascii=False))
        if not latents_path.is_file():
            with _whole(latents_path) as temporary:
                save_file({LATENTS_KEY: latents.cpu().contiguous()}, temporary)
        if not image_path.is_file():
            with _whole(image_path) as temporary:
                # A video is an animated PNG: lossless, one file, and any browser plays it.
                first, *rest = image if isinstance(image, list) else [image]
                first.save(
                    temporary,
                    format="PNG",
                    pnginfo=note,
                    **({"save_all": True, "append_images": rest, "duration": 62} if rest else {}),
                )
