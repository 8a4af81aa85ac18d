"""Plans the training step of a student that is loaded."""

from __future__ import annotations

import lightning.pytorch as pl

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.fake_step import Example
from lit_distill.planning.planner import Planner
from lit_distill.planning.settings import TrainingSettings
from lit_distill.training.first_row import first_batch
from lit_distill.training.objectives.base import Objective
from lit_distill.training.objectives.regression import Regression
from lit_distill.training.objectives.trajectory import Trajectory
from lit_distill.training.settings import Settings
from lit_distill.training.student import Student


def training_settings(settings: Settings, objective: Objective) -> dict[str, object]:
    """Return the fields of `TrainingSettings` that the settings of the model tell."""
    names = ["torch_dtype", "lora", "lora_per_step", "freeze", "quantization", "scheduler"]
    names += ["rollout_batch_size", "grad_steps", "offload_activations"]
    fields = {name: getattr(settings, name) for name in names}
    return fields | {
        "call_kwargs": settings.call_kwargs or {},
        "trajectory": isinstance(objective, Trajectory),
    }


def uncounted(objective: Objective) -> str | None:
    """Return what the plan of a step with this objective leaves out; None: nothing."""
    if isinstance(objective, Regression | Trajectory):
        return None
    return (
        f"planned as Regression: what {type(objective).__name__} trains and computes beside the "
        "student's rollout is not counted"
    )


def step_planner(student: Student, data: DistillDataModule, trainer: pl.Trainer) -> Planner:
    """Return the planner of a step on the largest rows, with the prompt of the first one."""
    assert data.train_set is not None
    rows = data.train_set.columns
    batch = first_batch(data)
    call = student.call(batch)
    (prompt,) = call.pop("prompt")
    del call["generator"]
    largest = int((rows["height"] * rows["width"]).argmax())
    sharded = student.sharded
    module = trainer.lightning_module
    objective = getattr(module, "objective", None) or Regression()
    fields = training_settings(student.settings, objective) | {
        "height": int(rows["height"][largest]) or None,
        "width": int(rows["width"][largest]) or None,
        "batch_size": data.batch_size,
        "num_inference_steps": int(rows["num_inference_steps"].max()),
        "cfg_scale": float(rows["cfg_scale"].max()),
        "accumulate": trainer.accumulate_grad_batches,
        # By name: the callback's file imports the module that is being configured here.
        "ema": any(type(each).__name__ == "EMA" for each in trainer.callbacks),  # type: ignore[attr-defined]
        "shards": trainer.world_size if sharded else 1,
        "replicas": 1 if sharded else trainer.world_size,
    }
    return Planner(
        Blueprint.of(student.pipe),
        TrainingSettings(**fields),  # type: ignore[arg-type]
        optimizer=getattr(module, "optimizer", None),
        device="cuda" if trainer.strategy.root_device.type == "cuda" else "cpu",
        example=Example(student.pipe, prompt, call),
    )
