"""The facts of a student: what its checkpoint, its exports and its model card report of it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers
from lit_distill.training.facts import Example
from lit_distill.training.settings import wrong_types

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True, kw_only=True)
class StudentFacts:
    """What is known of a student; stored as JSON in the files of its exports.

    Attributes:
        num_inference_steps: Number of steps that it was trained for.
        cfg_scale: Guidance that it was trained for, 1 = off.
        height: Height in pixels of its training images; None if they differ.
        width: Width in pixels of its training images; None if they differ.
        global_step: Number of optimizer steps.
        metrics: Last logged metrics by name.
        data: Path, rows and prompts of the training data; None if unknown.
        teacher: The teacher's settings, by column of the training data.
        examples: Rows that an export is verified with.
        init_lora: The LoRA that training started from.
        version: Version of lit_distill that wrote the facts.
        pipeline: Class of the pipeline.
        base_model: Hub id or folder of the base model.
        base_revision: Its revision on the hub.
        base_digest: Digest of each of its denoisers; empty if unknown.
        torch_dtype: Data type of the base model's weights.
        call_kwargs: Fixed arguments of the pipeline's call.
        scheduler: Class of the scheduler.
        scheduler_config: Its configuration; empty: that of the base model; None: unknown.
        lora: Rank and alpha; None if the whole denoiser was trained.
        lora_per_step: Number of LoRAs of a student that has one for every step.
        teacher_lora: The teacher's LoRA, which exports contain.
        teacher_model: The teacher, where it is another model than the base model.
    """

    num_inference_steps: int = 4
    cfg_scale: float = 1.0
    height: int | None = None
    width: int | None = None
    global_step: int = 0
    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] | None = None
    teacher: dict[str, str] = field(default_factory=dict)
    examples: list[Example] = field(default_factory=list)
    init_lora: str | None = None
    version: str
    pipeline: str
    base_model: str
    base_revision: str | None = None
    base_digest: dict[str, str] = field(default_factory=dict)
    torch_dtype: str
    call_kwargs: dict[str, Any] = field(default_factory=dict)
    scheduler: str
    scheduler_config: dict[str, Any] | None = None
    lora: dict[str, Any] | None = None
    lora_per_step: int | None = None
    teacher_lora: str | None = None
    teacher_model: str | None = None

    @classmethod
    def from_checkpoint(cls, content: dict[str, Any], pipe: DiffusionPipeline) -> StudentFacts:
        """Return the facts of a checkpoint's student.

        Args:
            content: Content of the checkpoint. Without recorded rows, the only example is made up.
            pipe: The student's pipeline.
        """
        hparams = content["hyper_parameters"]
        lora = hparams["lora"]
        rank = lora.get("r", 8) if lora else None
        settings = {
            "version": version("lit-distill"),
            "pipeline": type(pipe).__name__,
            "base_model": hparams["pretrained_model_name_or_path"],
            "base_revision": hparams.get("revision") or _commit(pipe),
            "torch_dtype": hparams["torch_dtype"],
            "call_kwargs": student_call_kwargs(hparams),
            "scheduler": type(pipe.scheduler).__name__,
            "lora": lora and {"r": rank, "lora_alpha": lora.get("lora_alpha", rank)},
            "lora_per_step": hparams.get("lora_per_step"),
            "teacher_lora": hparams.get("teacher_lora"),
            "teacher_model": hparams.get("teacher_model"),
        }
        step = {"global_step": content.get("global_step", 0)}
        facts = cls.from_dict(step | recorded_facts(content) | settings)
        return facts if facts.examples else replace(facts, examples=[facts._made_up_example()])

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> StudentFacts:
        """Return the facts of what `to_dict` returned; unknown names are ignored.

        Raises:
            InputError: If a value is not of its type.
        """
        known = {attribute.name for attribute in fields(cls)}
        kept = {name: value for name, value in values.items() if name in known}
        damaged = "the student's facts are damaged: "
        for name, problem in wrong_types(cls, kept).items():
            raise InputError(f"{damaged}{name} {problem}")
        if not kept.get("cfg_scale", 1) >= 1 or kept.get("num_inference_steps", 1) < 1:
            raise InputError(f"{damaged}cfg_scale and num_inference_steps must be >= 1")
        examples = []
        for row in kept.get("examples", ()):
            try:
                examples.append(Example(**row))
                valid = not wrong_types(Example, row)
            except TypeError:  # not a row, or other fields
                valid = False
            if not valid:
                raise InputError(f"{damaged}an example is {row!r:.200}")
        return cls(**kept | {"examples": examples})

    @classmethod
    def from_json(cls, text: str, where: str | Path) -> StudentFacts:
        """Return the facts that a file of an export holds.

        Args:
            text: The facts, as JSON.
            where: The file, for the error.

        Raises:
            InputError: If they are damaged.
        """
        try:
            return cls.from_dict(json.loads(text))
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            raise InputError(
                f"{where}: the facts of its student are damaged ({error}); export it again"
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """Return the facts in plain types, for JSON."""
        return asdict(self)

    def _made_up_example(self) -> Example:
        return Example(
            prompt="a photo of a cat",
            seed=0,
            rand_device="cpu",
            num_inference_steps=self.num_inference_steps,
            cfg_scale=self.cfg_scale,
            height=self.height,
            width=self.width,
        )


def recorded_facts(content: dict[str, Any]) -> dict[str, Any]:
    """Return what training recorded in a checkpoint's content, as `training_facts` made it."""
    recorded: dict[str, Any] = content.get("lit_distill", {}).get("facts", {})
    return recorded


def student_call_kwargs(hparams: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fixed arguments of the student's call: the teacher's, and the student's sigmas."""
    sigmas = {"sigmas": list(hparams["sigmas"])} if hparams.get("sigmas") else {}
    return (hparams.get("call_kwargs") or {}) | sigmas


def _commit(pipe: DiffusionPipeline) -> str | None:
    """Return the hub commit that the denoiser was loaded from, as its cache folder names it."""
    source = str(next(iter(denoisers(pipe).values())).config.get("_name_or_path", ""))
    match = re.search(r"snapshots/([0-9a-f]{40})", Path(source).as_posix())
    return match[1] if match else None
