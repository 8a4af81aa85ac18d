"""Generates pairs again to check that their seeds are the ones the teacher used."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load
from torch import Tensor

from lit_distill.data.dataset import LATENTS_KEY
from lit_distill.data.dataset_check import latents_header
from lit_distill.data.filesystem import open_file, parent
from lit_distill.data.images import read_image
from lit_distill.pipelines.loading import DTYPES
from lit_distill.teacher.generate import read_provenance
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.teacher import Teacher, record

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


EXPLAINED = 3
"""Rows that the reason is looked for; the others most likely share it."""

# Relative errors of a pair that was drawn alike. Another batch size, device or version changes the
# last bits only, but 16-bit weights amplify them, and a JPEG is not what was drawn.
ALIKE = {"F64": 0.01, "F32": 0.01, "BF16": 0.15, "F16": 0.15, "image": 0.15}

DTYPE_OF = {"F64": "float64", "F32": "float32", "BF16": "bfloat16", "F16": "float16"}

# What people most often put in a pipeline's scheduler's place; those that it can't use are skipped.
SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "DDIMScheduler",
)


def recorded_teacher(provenance: dict[str, Any], **changes: Any) -> Teacher:  # noqa: ANN401
    """Return the teacher that a provenance file describes."""
    names = {field.name for field in fields(Teacher)}
    return Teacher(**{k: v for k, v in provenance.items() if k in names} | changes)


def check_pairing(
    path: str,
    table: pd.DataFrame,
    model: LightningModule,
    device: torch.device,
    rows: int,
) -> pd.DataFrame:
    """Draw rows of a checked table again, as `Pairing.check` does.

    Args:
        path: The table's file; ``provenance.json`` beside it names the teacher.
        table: As `read_metadata` returns it.
        model: A `DirectDistill`; its settings are the teacher's where none is recorded, and the
            pipeline that it names is preferred to the recorded one.
        device: Where to draw.
        rows: How many.

    Raises:
        ValueError: If no pipeline is named anywhere.
    """
    provenance = read_provenance(parent(str(path)))
    hyper: dict[str, Any] = dict(model.hparams)
    named = hyper["teacher_model"] or hyper["pretrained_model_name_or_path"]
    revision = None if hyper["teacher_model"] else hyper["revision"]
    pipeline = {"model": named, "revision": revision} if named else {}
    pipeline |= {"lora": hyper["teacher_lora"]} if hyper["teacher_lora"] else {}
    if provenance is not None:
        teacher = recorded_teacher(provenance, **pipeline)
    elif named:
        teacher = Teacher(
            **pipeline,
            torch_dtype=hyper["torch_dtype"],
            num_inference_steps=hyper["teacher_num_inference_steps"],
            cfg_scale=hyper["teacher_cfg_scale"],
            call_kwargs=hyper["call_kwargs"] or {},
        )
    else:
        raise ValueError(
            f"no provenance.json beside {path}: name the pipeline that drew it "
            "(--model.pretrained_model_name_or_path), and its teacher_num_inference_steps, "
            "teacher_cfg_scale and torch_dtype"
        )
    return Pairing(teacher, provenance, device).check(table, rows)


class Target:
    """What is stored of a row: exact latents, or the image.

    Attributes:
        kind: latents or image.
        alike: Largest relative error of a row that was drawn alike.
        dtype: Data type of the latents, as in float32, which is mostly the weights'.
        drawn_dtype: That of the latents it was last compared with.
    """

    def __init__(self, row: pd.Series) -> None:
        self.dtype: str | None = None
        self.drawn_dtype: str | None = None
        if row["latents"]:
            self.kind = "latents"
            stored = latents_header(row["latents"])[1]
            self.dtype = DTYPE_OF[stored]
            self.alike = ALIKE[stored]
            with open_file(row["latents"]) as stream:
                self.values = load(stream.read())[LATENTS_KEY].double()
        else:
            self.kind = "image"
            self.alike = ALIKE["image"]
            self.values = read_image(row["image"]).double()

    def error(self, latents: Tensor, image: Any) -> float:  # noqa: ANN401
        """Return the distance to what was drawn, relative to how far that is from its mean."""
        if self.kind == "latents":
            drawn = latents.double().cpu()
            self.drawn_dtype = str(latents.dtype).removeprefix("torch.")
        else:
            drawn = torch.from_numpy(np.asarray(image) / 255.0).permute(2, 0, 1)
        if drawn.shape != self.values.shape:
            return float("inf")
        return float((drawn - self.values).norm() / (drawn - drawn.mean()).norm())


class Guess(NamedTuple):
    """A way in which a pair may have been drawn instead, and what that means for the row."""

    finding: str
    teacher: Teacher
    pair: Pair


class Pairing:
    """Generates rows of a data set again and reports how they differ from what is stored.

    Args:
        teacher: What is said to have drawn them.
        provenance: What was recorded when they were drawn, if anything.
        device: Where to draw.
    """

    def __init__(
        self, teacher: Teacher, provenance: dict[str, Any] | None, device: torch.device
    ) -> None:
        self.teacher = teacher
        self.provenance = provenance or {}
        self.device = device
        self._loaded: tuple[Any, Any] = (None, None)

    def check(self, table: pd.DataFrame, rows: int) -> pd.DataFrame:
        """Draw rows of the table again.

        Args:
            table: As `read_metadata` returns it.
            rows: How many, evenly spread over those that have a target.

        Returns:
            For each its ``row``, its ``target`` (latents or image), the relative ``error``, whether
            it is ``alike``, and the ``finding`` in words.
        """
        stored = np.flatnonzero((table["latents"] != "") | (table["image"] != ""))
        spread = np.linspace(0, len(stored) - 1, min(rows, len(stored))).round().astype(int)
        findings: list[tuple[int, str, str, bool, str]] = []
        for index in stored[spread].tolist():
            row = table.iloc[index]
            pair, target = _pair(row), Target(row)
            teacher = replace(self.teacher, rand_device=row["rand_device"])
            error = self.error(teacher, pair, target)
            alike = error <= target.alike and target.drawn_dtype in (None, target.dtype)
            finding = "as the teacher draws it"
            if error <= target.alike and not alike:
                types = f"{target.dtype}, the teacher's is {target.drawn_dtype}"
                finding = f"wrong torch_dtype: {types}"
            elif not alike:
                explained = sum(not each[3] for each in findings)
                finding = "not looked into"
                if explained < EXPLAINED:
                    finding = self.explain(table, index, teacher, error)
            findings.append((int(row["row"]), target.kind, f"{error:.2g}", alike, finding))
        return pd.DataFrame(findings, columns=["row", "target", "error", "alike", "finding"])

    def error(self, teacher: Teacher, pair: Pair, target: Target) -> float:
        """Return the relative error of what is stored against what the teacher draws."""
        latents, images = teacher.sample(self.load(teacher), [pair])
        return target.error(latents[0], images[0])

    def load(self, teacher: Teacher) -> DiffusionPipeline:
        """Return the teacher's pipeline; one is kept at a time."""
        key = (
            teacher.model,
            teacher.lora,
            teacher.revision,
            teacher.torch_dtype,
            teacher.scheduler,
        )
        if self._loaded[0] != key:
            self._loaded = (None, None)  # two need not fit
            self._loaded = (key, teacher.load().to(self.device))
        pipe: DiffusionPipeline = self._loaded[1]
        return pipe

    def explain(self, table: pd.DataFrame, index: int, teacher: Teacher, error: float) -> str:
        """Return in what a row was probably drawn otherwise."""
        row = table.iloc[index]
        pair, target = _pair(row), Target(row)
        changed = self._changed(teacher, pair)
        best, best_error = "", error / 10
        for guess in self._guesses(table, index, teacher, target):
            try:
                found = self.error(guess.teacher, guess.pair, target)
            except (ValueError, TypeError, RuntimeError, AttributeError, OSError):
                continue  # this pipeline can't be drawn with so, so it was not
            if found < best_error:
                best, best_error = f"{guess.finding} (error {found:.2g})", found
            if found <= target.alike / 10:
                break
        if best or changed:
            return best or changed
        what = "seed, device or model" if error > 0.2 else "data type, scheduler or version"
        gpu = "" if torch.cuda.is_available() else "; noise of a GPU can't be tried here"
        return f"probably another {what}: nothing that was tried explains it{gpu}"

    def _guesses(
        self, table: pd.DataFrame, index: int, teacher: Teacher, target: Target
    ) -> Iterator[Guess]:
        """Yield other ways to draw a row, the cheap ones first: each costs an image."""
        row = table.iloc[index]
        pair = _pair(row)
        near = table["seed"].iloc[max(0, index - 1) : index + 2].tolist()
        for seed in sorted({pair.seed + 1, abs(pair.seed - 1), 0, *near} - {pair.seed}):
            yield Guess(f"wrong seed: it is {seed}'s", teacher, pair._replace(seed=seed))
        for device in ("cpu", "cuda"):
            if device != teacher.rand_device.partition(":")[0]:
                other = replace(teacher, rand_device=device)
                yield Guess(f"wrong rand_device: the noise is {device}'s", other, pair)
        student = (int(row["num_inference_steps"]), float(row["cfg_scale"]))
        for steps, cfg in (student, (teacher.num_inference_steps, 1.0)):
            other = replace(teacher, num_inference_steps=steps, cfg_scale=cfg)
            yield Guess(f"wrong settings: {steps} steps at cfg {cfg:g} drew it", other, pair)
        own = type(self.load(teacher).scheduler).__name__
        for name in SCHEDULERS:
            if name != own:
                other = replace(teacher, scheduler=name)
                yield Guess(f"wrong scheduler: {name} drew it", other, pair)
        for dtype in DTYPES:
            runs = dtype != "float16" or self.device.type != "cpu"
            if dtype != teacher.torch_dtype and target.dtype in (None, dtype) and runs:
                other = replace(teacher, torch_dtype=dtype)
                yield Guess(f"wrong torch_dtype: {dtype} weights drew it", other, pair)
        model = self.provenance.get("model", teacher.model)
        if model != teacher.model:
            other = replace(teacher, model=model, revision=self.provenance.get("revision"))
            yield Guess(f"wrong model: {model} drew it", other, pair)

    def _changed(self, teacher: Teacher, pair: Pair) -> str:
        """Return what of the loaded pipeline is not what was recorded, "" if nothing."""
        before = self.provenance.get("drawn_with")
        if before is None:
            return ""
        now = record(teacher, self.load(teacher), [pair])
        names = {"denoiser_sha256": "model: its weights", "scheduler": "scheduler: its settings"}
        changed = [text for name, text in names.items() if now[name] != before.get(name)]
        return "; ".join(f"wrong {text} are not those in provenance.json" for text in changed)


def _pair(row: pd.Series) -> Pair:
    size = (int(row["height"]), int(row["width"]))
    return Pair(0, row["prompt"], int(row["seed"]), row["call"], size if all(size) else None)
