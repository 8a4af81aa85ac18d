"""What a checkpoint records of its student: settings, data, metrics and example rows."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from lit_distill.data.images import Picture

if TYPE_CHECKING:
    import pandas as pd


MAX_EXAMPLES = 4
"""Largest number of held-out rows that a checkpoint stores, to be sampled when it is exported."""


@dataclass(frozen=True)
class Example:
    """A row that is sampled to verify an export.

    Attributes:
        prompt: Text prompt.
        seed: Seed of the initial noise.
        rand_device: Device of the random generator.
        num_inference_steps: Number of steps.
        cfg_scale: Guidance, 1 = off.
        height: Height in pixels; None: the pipeline's default.
        width: Width in pixels; None: the pipeline's default.
        call: Further arguments of the pipeline's call, by name.
        pictures: Paths of images that are arguments of the call, by name.
        target: Path of the teacher's image; None if there is none.
    """

    prompt: str
    seed: int
    rand_device: str
    num_inference_steps: int
    cfg_scale: float
    height: int | None = None
    width: int | None = None
    call: dict[str, Any] = field(default_factory=dict)
    pictures: dict[str, str] = field(default_factory=dict)
    target: str | None = None

    @classmethod
    def from_row(cls, row: pd.Series) -> Example:
        """Return the example of a row of a dataset's table."""
        call: dict[str, Any] = row["call"]
        pictures = {name: value for name, value in call.items() if isinstance(value, Picture)}
        return cls(
            prompt=str(row["prompt"]),
            seed=int(row["seed"]),
            rand_device=str(row["rand_device"]),
            num_inference_steps=int(row["num_inference_steps"]),
            cfg_scale=float(row["cfg_scale"]),
            height=int(row["height"]) or None,
            width=int(row["width"]) or None,
            call={name: value for name, value in call.items() if name not in pictures},
            pictures={name: picture.absolute() for name, picture in pictures.items()},
            target=Picture(row["image"]).absolute() if row["image"] else None,
        )


def training_facts(trainer: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what a training run records of its student, in plain types, for its checkpoint.

    `lit_distill.export.facts.StudentFacts` reads it back.

    Args:
        trainer: A Lightning trainer. With a `DistillDataModule`, the facts describe its data too.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    facts: dict[str, Any] = {"global_step": trainer.global_step, "metrics": metrics}
    datamodule: Any = getattr(trainer, "datamodule", None)
    datasets = [getattr(datamodule, name, None) for name in ("val_set", "train_set")]
    tables = [dataset.table for dataset in datasets if dataset is not None]
    if not tables:
        return facts
    # Examples are held-out rows where there are any; the other facts describe the training rows.
    held_out, training = tables[0], tables[-1]
    sizes = training[["height", "width"]].drop_duplicates()
    height, width = (int(side) for side in sizes.iloc[0]) if len(sizes) == 1 else (0, 0)
    return facts | {
        "num_inference_steps": int(training["num_inference_steps"].mode()[0]),
        "cfg_scale": float(training["cfg_scale"].mode()[0]),
        "height": height or None,
        "width": width or None,
        "data": {
            "metadata_path": str(datamodule.metadata_path or datamodule.val_metadata_path),
            "rows": len(training),
            "prompts": int(training["prompt"].nunique()),
        },
        "teacher": _teacher(training),
        "examples": [
            asdict(Example.from_row(row)) for _, row in held_out.head(MAX_EXAMPLES).iterrows()
        ],
    }


def _teacher(table: pd.DataFrame) -> dict[str, str]:
    """Return the teacher's settings that `lit-distill generate` recorded in the table."""
    columns = ("teacher_model", "teacher_num_inference_steps", "teacher_cfg_scale")
    return {name: str(table[name].iloc[0]) for name in columns if name in table}
