"""What a checkpoint records about its student beside weights and settings."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lit_distill.data.images import Picture

if TYPE_CHECKING:
    import pandas as pd


EXAMPLES = 4
"""Number of held-out rows that a checkpoint records, to be sampled when it is exported."""


def training_facts(trainer: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what a checkpoint records about the student and its data, in plain types.

    Args:
        trainer: A Lightning trainer; with a `DistillDataModule`, the facts describe the data.
    """
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    facts: dict[str, Any] = {"global_step": trainer.global_step, "metrics": metrics}
    datamodule: Any = getattr(trainer, "datamodule", None)
    sets = [getattr(datamodule, name, None) for name in ("val_set", "train_set")]
    tables = [rows.table for rows in sets if rows is not None]
    if not tables:
        return facts
    examples = [_example(row) for _, row in tables[0].head(EXAMPLES).iterrows()]
    trained = tables[-1]
    sizes = trained[["height", "width"]].drop_duplicates()
    height, width = (int(side) for side in sizes.iloc[0]) if len(sizes) == 1 else (0, 0)
    return facts | {
        "num_inference_steps": int(trained["num_inference_steps"].mode()[0]),
        "cfg_scale": float(trained["cfg_scale"].mode()[0]),
        "height": height or None,
        "width": width or None,
        "data": {
            "metadata_path": str(datamodule.metadata_path or datamodule.val_metadata_path),
            "rows": len(trained),
            "prompts": int(trained["prompt"].nunique()),
        },
        "teacher": _teacher(trained),
        "examples": examples,
    }


def _example(row: pd.Series) -> dict[str, Any]:
    call: dict[str, Any] = row["call"]
    return {
        "call": {name: value for name, value in call.items() if not isinstance(value, Picture)},
        "pictures": {
            name: value.absolute() for name, value in call.items() if isinstance(value, Picture)
        },
        "prompt": str(row["prompt"]),
        "seed": int(row["seed"]),
        "rand_device": str(row["rand_device"]),
        "num_inference_steps": int(row["num_inference_steps"]),
        "cfg_scale": float(row["cfg_scale"]),
        "height": int(row["height"]) or None,
        "width": int(row["width"]) or None,
    }


def _teacher(table: pd.DataFrame) -> dict[str, str]:
    """Return the teacher's settings as `lit-distill generate` wrote them to the table."""
    columns = ("teacher_model", "teacher_num_inference_steps", "teacher_cfg_scale")
    return {name: str(table[name].iloc[0]) for name in columns if name in table}
