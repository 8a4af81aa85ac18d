"""The hyperparameters of a `DirectDistill`: typed, immutable, and validated in one place."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from lit_distill.compute.activation_checkpointing import Checkpointing, check_mode
from lit_distill.errors import InputError
from lit_distill.pipelines.loading import DTYPES
from lit_distill.training.plain import plain_setting

if TYPE_CHECKING:
    from lit_distill.data.datamodule import DistillDataModule


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Hyperparameters, as the arguments of `DirectDistill` of the same names describe them.

    Preflight and `init_lora` decide some of them. They never change an instance: they make a
    changed copy (`dataclasses.replace`), and the copy is validated too. Their values are made
    plain, since a checkpoint holds them: paths become texts, numpy's numbers Python's.

    Raises:
        InputError: If a setting is out of range or has no plain form, or if settings exclude each
            other.
    """

    pretrained_model_name_or_path: str | None
    revision: str | None
    torch_dtype: str
    lora: dict[str, Any] | None
    init_lora: str | None
    lora_per_step: int | None
    teacher_lora: str | None
    teacher_model: str | None
    scheduler: dict[str, Any] | None
    sigmas: list[float] | None
    checkpointing: Checkpointing | Literal["auto"]
    offload_activations: bool
    grad_steps: int | None
    teacher_num_inference_steps: int
    teacher_cfg_scale: float
    teacher_reuse: int
    teacher_buffer: int
    call_kwargs: dict[str, Any] | None
    freeze: list[str]
    train_mode: list[str]
    rollout_batch_size: int | None
    preflight: bool | Literal["always"]
    compile: bool
    attention_backend: str | None
    quantization: dict[str, Any] | None

    def __post_init__(self) -> None:
        for name in (field.name for field in fields(self)):
            object.__setattr__(self, name, plain_setting(getattr(self, name), f"model.{name}"))
        _check_ranges(self)
        _check_lora_per_step(self)
        _check_teacher(self)
        _check_quantization(self)

    @classmethod
    def select(cls, values: Mapping[str, Any]) -> Settings:
        """Return the settings among `values`, which holds a value for each of them."""
        return cls(**{field.name: values[field.name] for field in fields(cls)})

    @property
    def trains_lora(self) -> bool:
        """Whether a LoRA is trained, and not the whole denoiser."""
        return self.lora is not None or bool(self.init_lora)

    def model_name(self) -> str:
        """Return the hub id or folder of the pretrained pipeline.

        Raises:
            InputError: If it is not set.
        """
        if not self.pretrained_model_name_or_path:
            raise InputError(
                "model.pretrained_model_name_or_path is not set: a hub id, a folder in diffusers' "
                "layout, tiny-digits or tiny-words"
            )
        return self.pretrained_model_name_or_path

    def hyperparameters(self) -> dict[str, Any]:
        """Return what a checkpoint holds of them, in plain types, by name.

        Without `init_lora`, which only says where training begins: a checkpoint holds the weights
        and the fields of the LoRA itself.
        """
        return {name: value for name, value in asdict(self).items() if name != "init_lora"}


def wrong_types(cls: type, values: Mapping[str, Any]) -> dict[str, str]:
    """Return the values that are not of the type that a dataclass gives their name.

    Args:
        cls: The dataclass.
        values: Values for some of its fields, by name; other names are ignored.

    Returns:
        The problem, by name.
    """
    problems = {}
    for name, hint in get_type_hints(cls).items():
        accepted = _classes(hint)
        if name not in values:
            continue
        value = values[name]
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in accepted):
            kinds = " or ".join(dict.fromkeys(kind.__name__ for kind in accepted))
            problems[name] = f"must be {kinds}, got {value!r:.100}"
    return problems


def _classes(hint: Any) -> tuple[type, ...]:  # noqa: ANN401
    """Return the classes of the values that a type hint accepts."""
    origin = get_origin(hint)
    if origin in (Union, UnionType):
        return tuple(cls for part in get_args(hint) for cls in _classes(part))
    if origin is Literal:
        return tuple({type(value) for value in get_args(hint)})
    return (int, float) if hint is float else (origin or hint,)


def _check_ranges(settings: Settings) -> None:
    if settings.torch_dtype not in DTYPES:
        raise InputError(
            f"model.torch_dtype must be one of {', '.join(DTYPES)}, got {settings.torch_dtype!r}"
        )
    if settings.checkpointing != "auto" or settings.offload_activations:
        check_mode(settings.checkpointing, settings.offload_activations)
    batch_size, sigmas = settings.rollout_batch_size, settings.sigmas
    if settings.preflight not in (True, False, "always"):
        raise InputError(
            f"model.preflight must be true, false or always, got {settings.preflight!r}"
        )
    if batch_size is not None and batch_size < 1:
        raise InputError(f"model.rollout_batch_size must be >= 1, got {batch_size}")
    if sigmas is not None and not (sigmas and _falling([*sigmas, 0.0])):
        raise InputError(f"model.sigmas must be positive and falling, got {sigmas}")


def _falling(values: list[float]) -> bool:
    return all(left > right for left, right in itertools.pairwise(values))


def _check_lora_per_step(settings: Settings) -> None:
    count, grad_steps = settings.lora_per_step, settings.grad_steps
    if count is None:
        return
    if count < 1:
        raise InputError(f"model.lora_per_step must be >= 1, got {count}")
    if not settings.trains_lora:
        raise InputError(
            "model.lora_per_step: model.lora is null (full training); set it, for example {r: 32}"
        )
    if grad_steps is not None and grad_steps < count:
        raise InputError(
            f"model.grad_steps is {grad_steps}: the LoRAs of the steps before the last "
            f"{grad_steps} of model.lora_per_step ({count}) would never train; leave one out"
        )


def _check_teacher(settings: Settings) -> None:
    for name in ("teacher_num_inference_steps", "teacher_reuse", "teacher_buffer"):
        if getattr(settings, name) < 1:
            raise InputError(f"model.{name} must be >= 1, got {getattr(settings, name)}")
    if settings.teacher_lora and settings.teacher_model:
        raise InputError(
            "model.teacher_lora and model.teacher_model: set one; to teach with a model and a "
            "LoRA, fuse the LoRA into the model first"
        )


def _check_quantization(settings: Settings) -> None:
    if settings.quantization and not settings.trains_lora:
        raise InputError(
            "model.quantization: quantised weights can't be trained, and model.lora is null (full "
            "training); set model.lora, for example {r: 32}"
        )
    if settings.quantization and settings.teacher_lora:
        raise InputError(
            "model.quantization and model.teacher_lora: a LoRA can't be fused into quantised "
            "weights; fuse it before, and name the merged folder as the pretrained model"
        )


def check_precision(precision: str) -> None:
    """Check that a trainer's precision keeps trained weights in float32.

    Raises:
        InputError: If it does not.
    """
    if precision in ("bf16-true", "16-true"):
        raise InputError(
            f"trainer.precision is {precision}, in which most steps round to nothing; use "
            "bf16-mixed (trained weights are float32, model.torch_dtype sets the arithmetic)"
        )


def check_rows(settings: Settings, data: DistillDataModule) -> None:
    """Check that these settings can train on the rows, before anything is loaded.

    Raises:
        InputError: Naming a row whose number of steps is not that of model.sigmas or
            model.lora_per_step.
    """
    counts = {"sigmas": len(settings.sigmas or ()), "lora_per_step": settings.lora_per_step}
    for rows in (data.train_set, data.val_set):
        for name, count in counts.items():
            if rows is None or not count:
                continue
            steps = rows.columns["num_inference_steps"]
            for index in (steps != count).nonzero()[0][:1]:
                raise InputError(
                    f"row {rows.columns['row'][index]} is for {steps[index]} steps, but "
                    f"model.{name} has {count}; they must be equal"
                )
