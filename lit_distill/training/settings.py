"""What the settings of a `DirectDistill` must keep to, and the rows with them."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from lit_distill.compute.activation_checkpointing import check_mode
from lit_distill.pipelines.loading import DTYPES

if TYPE_CHECKING:
    from lit_distill.data.datamodule import DistillDataModule


def check_settings(given: Mapping[str, Any], init_lora: str | None) -> None:
    """Refuse what can't be, before anything is loaded.

    Args:
        given: Hyperparameters of `DirectDistill`.
        init_lora: Its LoRA to go on from.

    Raises:
        ValueError: Naming settings that are out of range, or exclude each other.
    """
    if given["torch_dtype"] not in DTYPES:
        raise ValueError(
            f"model.torch_dtype must be one of {', '.join(DTYPES)}, got {given['torch_dtype']!r}"
        )
    if given["checkpointing"] != "auto" or given["offload_activations"]:
        check_mode(given["checkpointing"], given["offload_activations"])
    batch_size, sigmas = given["rollout_batch_size"], given["sigmas"]
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"model.rollout_batch_size must be >= 1, got {batch_size}")
    if sigmas is not None and not (sigmas and _falling([*sigmas, 0.0])):
        raise ValueError(f"model.sigmas must be positive and falling, got {sigmas}")
    if given["trajectory"] and given["grad_steps"] is not None:
        raise ValueError(
            "model.trajectory and model.grad_steps: set one; with trajectory no gradient goes "
            "through more than one step"
        )
    if given["lora_per_step"] is not None:
        lora = given["lora"] is not None or init_lora is not None
        _check_lora_per_step(given["lora_per_step"], lora, given["grad_steps"])
    if given["teacher_lora"] and given["teacher_model"]:
        raise ValueError(
            "model.teacher_lora and model.teacher_model: set one; to teach with a model and a "
            "LoRA, fuse the LoRA into the model first"
        )
    if given["quantization"] and given["lora"] is None and not init_lora:
        raise ValueError(
            "model.quantization: quantised weights can't be trained, and model.lora is null (full "
            "training); set model.lora, for example {r: 32}"
        )
    if given["quantization"] and given["teacher_lora"]:
        raise ValueError(
            "model.quantization and model.teacher_lora: a LoRA can't be fused into quantised "
            "weights; fuse it before, and name the merged folder as the pretrained model"
        )


def _check_lora_per_step(count: int, lora: bool, grad_steps: int | None) -> None:
    if count < 1:
        raise ValueError(f"model.lora_per_step must be >= 1, got {count}")
    if not lora:
        raise ValueError(
            "model.lora_per_step: model.lora is null (full training); set it, for example {r: 32}"
        )
    if grad_steps is not None and grad_steps < count:
        raise ValueError(
            f"model.grad_steps is {grad_steps}: the LoRAs of the steps before the last "
            f"{grad_steps} of model.lora_per_step ({count}) would never train; leave one out"
        )


def _falling(values: list[float]) -> bool:
    return all(left > right for left, right in itertools.pairwise(values))


def check_rows(settings: Mapping[str, Any], data: DistillDataModule) -> None:
    """See, before anything is loaded, that the rows are such as these settings can train on.

    Raises:
        ValueError: Naming a row of another number of steps than model.sigmas or
            model.lora_per_step.
    """
    counts = {"sigmas": len(settings["sigmas"] or ()), "lora_per_step": settings["lora_per_step"]}
    for rows in (data.train_set, data.val_set):
        for name, count in counts.items():
            if rows is None or not count:
                continue
            steps = rows.columns["num_inference_steps"]
            for index in (steps != count).nonzero()[0][:1]:
                raise ValueError(
                    f"row {rows.columns['row'][index]} is to be drawn in {steps[index]} steps, but "
                    f"model.{name} has {count}; they must be as many"
                )
