"""Verifies pairs by generating them again with the recorded teacher (`check --pairing`).

If a pair does not match, common mistakes are tried as explanations, for example a wrong seed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import pandas as pd
import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from lit_distill.data.images import read_image
from lit_distill.data.latents_file import LATENTS_KEY, read_latents
from lit_distill.data.table_io import table_folder
from lit_distill.errors import InputError
from lit_distill.pipelines.components import move
from lit_distill.pipelines.loading import DTYPES
from lit_distill.pipelines.release import release
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.provenance import (
    PIPELINE_KEY,
    pipeline_facts,
    read_provenance,
    recorded_teacher,
)
from lit_distill.teacher.teacher import Teacher

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


MAX_EXPLAINED = 3
"""Number of rows that are explained; the others probably have the same cause."""

# Largest relative errors of a pair that matches. Another batch size, device or version changes only
# the last bits, but 16-bit weights amplify the difference, and JPEG is lossy.
TOLERANCES = {"float64": 0.01, "float32": 0.01, "bfloat16": 0.15, "float16": 0.15, "image": 0.15}

# Numbers of steps that teachers commonly take, tried where the stated one does not stand out.
COMMON_STEPS = (8, 10, 15, 20, 25, 28, 30, 35, 40, 50, 60, 75, 100)

STANDS_OUT = 3.0
"""How many times smaller the error of the right number of steps is than that of its neighbours.

Lossless targets of a float32 teacher stand out a thousandfold. Rounding of 16-bit weights and JPEG
are larger than the difference between 49 and 50 steps, and then nothing stands out.
"""

# The most common replacements of a pipeline's scheduler; those that it can't use are skipped.
SCHEDULERS = (
    "FlowMatchEulerDiscreteScheduler",
    "FlowMatchHeunDiscreteScheduler",
    "UniPCMultistepScheduler",
    "DPMSolverMultistepScheduler",
    "EulerDiscreteScheduler",
    "DDIMScheduler",
)


def check_pairing(
    path: str,
    table: pd.DataFrame,
    model: LightningModule,
    device: torch.device,
    rows: int,
) -> tuple[pd.DataFrame, str]:
    """Generate rows of a checked table again, and find the teacher's steps where that is possible.

    Args:
        path: The table's file; ``provenance.json`` beside it records the teacher.
        table: As `read_metadata` returns it.
        model: A `DirectDistill`. Its settings are used if no teacher is recorded, and a pipeline
            that it names takes precedence over the recorded one.
        device: Device to generate on.
        rows: Number of rows.

    Returns:
        As `PairChecker.check` and as `PairChecker.steps`, which is "" if no row matches.

    Raises:
        InputError: If no pipeline is recorded or named.
    """
    provenance = read_provenance(table_folder(path))
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
        raise InputError(
            f"no provenance.json beside {path}: name the pipeline that generated it "
            "(--model.pretrained_model_name_or_path), and its teacher_num_inference_steps, "
            "teacher_cfg_scale and torch_dtype"
        )
    checker = PairChecker(teacher, provenance, device)
    found = checker.check(table, rows)
    matching = table[table["row"].isin(found["row"][found["alike"]])]
    return found, "" if matching.empty else checker.steps(matching.iloc[0])


class Target:
    """The stored target of a row: exact latents, or the image.

    Attributes:
        kind: ``latents`` or ``image``.
        tolerance: Largest relative error of a row that matches.
        dtype: Data type of the stored latents, such as float32; usually that of the weights.
        sampled_dtype: Data type of the latents that it was last compared with.
    """

    def __init__(self, row: pd.Series) -> None:
        self.dtype: str | None = None
        self.sampled_dtype: str | None = None
        if row["latents"]:
            self.kind = "latents"
            stored = read_latents(row["latents"])[LATENTS_KEY]
            self.dtype = str(stored.dtype).removeprefix("torch.")
            self.tolerance = TOLERANCES[self.dtype]
            self.values = stored.double()
        else:
            self.kind = "image"
            self.tolerance = TOLERANCES["image"]
            self.values = read_image(row["image"]).double()

    def error(self, latents: Tensor, image: Any) -> float:  # noqa: ANN401
        """Return the distance to a sample, relative to the sample's distance from its mean."""
        if self.kind == "latents":
            sampled = latents.double().cpu()
            self.sampled_dtype = str(latents.dtype).removeprefix("torch.")
        else:
            sampled = torch.from_numpy(np.asarray(image) / 255.0).permute(2, 0, 1)
        if sampled.shape != self.values.shape:
            return float("inf")
        return float((sampled - self.values).norm() / (sampled - sampled.mean()).norm())


class Variant(NamedTuple):
    """Other settings that may have generated a pair, and the finding if they did."""

    finding: str
    teacher: Teacher
    pair: Pair


class PairChecker:
    """Generates rows of a data set again and reports how they differ from what is stored.

    Args:
        teacher: The teacher that is assumed to have generated them.
        provenance: What was recorded when they were generated, if anything.
        device: Device to generate on.
    """

    def __init__(
        self, teacher: Teacher, provenance: dict[str, Any] | None, device: torch.device
    ) -> None:
        self.teacher = teacher
        self.provenance = provenance or {}
        self.device = device
        self._loaded: tuple[Any, Any] = (None, None)

    def check(self, table: pd.DataFrame, rows: int) -> pd.DataFrame:
        """Generate rows of the table again.

        Args:
            table: As `read_metadata` returns it.
            rows: Number of rows, spread evenly over those with a target.

        Returns:
            For each row: its number ``row``, ``target`` (latents or image), the relative ``error``,
            whether it is ``alike``, and the ``finding`` in words.
        """
        stored = np.flatnonzero((table["latents"] != "") | (table["image"] != ""))
        spread = np.linspace(0, len(stored) - 1, min(rows, len(stored))).round().astype(int)
        findings: list[tuple[int, str, str, bool, str]] = []
        for index in stored[spread].tolist():
            row = table.iloc[index]
            pair, target = _pair(row), Target(row)
            teacher = replace(self.teacher, rand_device=row["rand_device"])
            error = self.error(teacher, pair, target)
            close = error <= target.tolerance
            alike = close and target.sampled_dtype in (None, target.dtype)
            finding = "its seed generates it"
            if close and not alike:
                types = f"{target.dtype}, the teacher's is {target.sampled_dtype}"
                finding = f"wrong torch_dtype: {types}"
            elif not alike:
                explained = sum(not each[3] for each in findings)
                finding = "not investigated"
                if explained < MAX_EXPLAINED:
                    finding = self.explain(table, index, teacher, error)
            findings.append((int(row["row"]), target.kind, f"{error:.2g}", alike, finding))
        return pd.DataFrame(findings, columns=["row", "target", "error", "alike", "finding"])

    def error(self, teacher: Teacher, pair: Pair, target: Target) -> float:
        """Return the relative error of a stored target against a sample of the teacher."""
        latents, images = teacher.sample(self.load(teacher), [pair])
        return target.error(latents[0], images[0])

    def steps(self, row: pd.Series) -> str:
        """Return what a row that matches tells of the teacher's number of steps.

        A match proves the seed: another one gives another image. It does not prove the steps, since
        many steps and a few less give almost the same image.

        Args:
            row: A row of the table.
        """
        teacher = replace(self.teacher, rand_device=row["rand_device"])
        pair, target = _pair(row), Target(row)
        errors: dict[int, float] = {}

        def error(steps: int) -> float:
            if steps not in errors:
                other = replace(teacher, num_inference_steps=steps)
                errors[steps] = self.error(other, pair, target)
            return errors[steps]

        def stands_out(steps: int) -> bool:
            nearest = min(error(other) for other in (steps - 1, steps + 1) if other > 0)
            return STANDS_OUT * error(steps) < nearest

        stated = teacher.num_inference_steps
        if stands_out(stated):
            nearest = min(value for steps, value in errors.items() if steps != stated)
            return f"{stated}: error {error(stated):.2g}, with one step more or less {nearest:.2g}"
        best = min({*COMMON_STEPS, stated}, key=error)
        if best != stated and stands_out(best):
            return f"{best}, not {stated}: error {error(best):.2g} instead of {error(stated):.2g}"
        least, most = min(errors.values()), max(errors.values())
        return (
            f"not known: with {min(errors)} to {max(errors)} steps the error is {least:.2g} to "
            f"{most:.2g}, and that of {stated} does not stand out"
        )

    def load(self, teacher: Teacher) -> DiffusionPipeline:
        """Return the teacher's pipeline; only the last one is kept loaded."""
        key = (
            teacher.model,
            teacher.lora,
            teacher.revision,
            teacher.torch_dtype,
            teacher.scheduler,
        )
        if self._loaded[0] != key:
            if self._loaded[1] is not None:
                release(self._loaded[1])  # two pipelines may not fit into memory
            self._loaded = (None, None)
            self._loaded = (key, teacher.load())
            move(self._loaded[1].components.values(), self.device)
        pipe: DiffusionPipeline = self._loaded[1]
        return pipe

    def explain(self, table: pd.DataFrame, index: int, teacher: Teacher, error: float) -> str:
        """Return the probable reason why a row does not match."""
        row = table.iloc[index]
        pair, target = _pair(row), Target(row)
        changed = self._changed(teacher, pair)
        best, best_error = "", error / 10
        for variant in self._variants(table, index, teacher, target):
            try:
                variant_error = self.error(variant.teacher, variant.pair, target)
            except (ValueError, TypeError, RuntimeError, AttributeError, OSError):
                continue  # the pipeline does not accept these settings
            if variant_error < best_error:
                best, best_error = f"{variant.finding} (error {variant_error:.2g})", variant_error
            if variant_error <= target.tolerance / 10:
                break
        if best or changed:
            return best or changed
        what = "seed, device or model" if error > 0.2 else "data type, scheduler or version"
        gpu = "" if torch.cuda.is_available() else "; noise of a GPU can't be tried here"
        return f"probably another {what}: no other setting that was tried explains it{gpu}"

    def _variants(
        self, table: pd.DataFrame, index: int, teacher: Teacher, target: Target
    ) -> Iterator[Variant]:
        """Yield other settings for a row, first those that need no other pipeline to be loaded."""
        row = table.iloc[index]
        pair = _pair(row)
        neighbours = table["seed"].iloc[max(0, index - 1) : index + 2].tolist()
        for seed in sorted({pair.seed + 1, abs(pair.seed - 1), 0, *neighbours} - {pair.seed}):
            yield Variant(
                f"wrong seed: seed {seed} generates it", teacher, pair._replace(seed=seed)
            )
        for device in ("cpu", "cuda"):
            if device != teacher.rand_device.partition(":")[0]:
                other = replace(teacher, rand_device=device)
                yield Variant(f"wrong rand_device: noise of {device} generates it", other, pair)
        student = (int(row["num_inference_steps"]), float(row["cfg_scale"]))
        for steps, cfg in (student, (teacher.num_inference_steps, 1.0)):
            other = replace(teacher, num_inference_steps=steps, cfg_scale=cfg)
            finding = f"wrong settings: {steps} steps at cfg {cfg:g} generate it"
            yield Variant(finding, other, pair)
        scheduler = type(self.load(teacher).scheduler).__name__
        for name in SCHEDULERS:
            if name != scheduler:
                other = replace(teacher, scheduler=name)
                yield Variant(f"wrong scheduler: {name} generates it", other, pair)
        for dtype in DTYPES:
            supported = dtype != "float16" or self.device.type != "cpu"
            if dtype != teacher.torch_dtype and target.dtype in (None, dtype) and supported:
                other = replace(teacher, torch_dtype=dtype)
                yield Variant(f"wrong torch_dtype: {dtype} weights generate it", other, pair)
        model = self.provenance.get("model", teacher.model)
        if model != teacher.model:
            other = replace(teacher, model=model, revision=self.provenance.get("revision"))
            yield Variant(f"wrong model: {model} generates it", other, pair)

    def _changed(self, teacher: Teacher, pair: Pair) -> str:
        """Return how the loaded pipeline differs from the recorded one, "" if it does not."""
        recorded = self.provenance.get(PIPELINE_KEY)
        if recorded is None:
            return ""
        facts = pipeline_facts(teacher, self.load(teacher), [pair])
        names = {"model_digests": "model: its weights", "scheduler": "scheduler: its settings"}
        changed = [
            text
            for name, text in names.items()
            if name in recorded and facts[name] != recorded[name]  # earlier versions recorded less
        ]
        return "; ".join(f"wrong {text} are not those in provenance.json" for text in changed)


def _pair(row: pd.Series) -> Pair:
    size = (int(row["height"]), int(row["width"]))
    return Pair(0, row["prompt"], int(row["seed"]), row["call"], size if all(size) else None)
