"""Plans training steps and samples of a whole model from runs of a few of its layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_distill.compute.activation_checkpointing import BLOCKWISE_MODES, Checkpointing
from lit_distill.errors import InputError
from lit_distill.pipelines.loading import DTYPES
from lit_distill.planning.blueprint import Blueprint, list_lengths, pattern_for_layers
from lit_distill.planning.device_operations import Device
from lit_distill.planning.extrapolation import extrapolate, layer_counts_to_run
from lit_distill.planning.fake_pipeline import set_dtype
from lit_distill.planning.fake_step import Example, FakeStudent, Figures
from lit_distill.planning.optimizer import MakeOptimizer, optimizer_bytes
from lit_distill.planning.settings import TrainingSettings
from lit_distill.planning.storage import largest_linear, weight_bytes

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MODES: tuple[Checkpointing, ...] = ("none", "selective", "block", "step", "nested")
"""Checkpointing modes, mostly the fastest first."""


@dataclass(frozen=True)
class Memory:
    """Bytes at the moment when most is allocated.

    Attributes:
        weights: Frozen weights of what is on the device, and the buffers.
        trained: What trains in float32, its gradient, and the optimizer's state.
        activations: What is kept for the backward pass.
        temporaries: What is allocated besides at that moment.
    """

    weights: float = 0.0
    trained: float = 0.0
    activations: float = 0.0
    temporaries: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return self.weights + self.trained + self.activations + self.temporaries


@dataclass(frozen=True)
class StepPlan:
    """A training step of one device.

    Attributes:
        mode: Checkpointing mode.
        memory: Memory at the peak of an optimizer step but the first.
        activation_peak: The most bytes of activations, temporaries and gradients at any moment.
        flops: Floating point operations of a batch, those of recomputation included.
        recomputed: Share of `flops` that mode none does not take.
        peak_at: Where in the step the peak is.
    """

    mode: Checkpointing
    memory: Memory
    activation_peak: float
    flops: float
    recomputed: float
    peak_at: str


def plan_step(
    source: str | Path | DiffusionPipeline,
    settings: TrainingSettings,
    mode: Checkpointing,
    *,
    revision: str | None = None,
    optimizer: MakeOptimizer | None = None,
) -> StepPlan:
    """Return memory and compute of a training step, without weights and without a GPU.

    Args:
        source: Hub id or folder of a pipeline, of which only configuration files are read, or the
            pipeline itself, of which only the configurations are used.
        settings: What trains, and how.
        mode: Checkpointing mode.
        revision: Branch, tag or commit of a hub repository.
        optimizer: Makes the optimizer of the trained parameters; default: AdamW.
    """
    return Planner(blueprint_of(source, revision), settings, optimizer=optimizer).step(mode)


def blueprint_of(source: str | Path | DiffusionPipeline, revision: str | None = None) -> Blueprint:
    """Return the configurations of a hub id, a folder or a pipeline."""
    if isinstance(source, str | Path):
        return Blueprint.read(source, revision)
    return Blueprint.of(source)


class Planner:
    """Plans the stages of one pipeline with one set of settings.

    Args:
        blueprint: The pipeline's configurations.
        settings: What trains, and how. Without a size it is the pipeline's own.
        optimizer: Makes the optimizer of the trained parameters; default: AdamW.
        device: Whose operations are counted.
        example: The pipeline, loaded, and a row to plan with, instead of prompts of a given length.
    """

    def __init__(
        self,
        blueprint: Blueprint,
        settings: TrainingSettings,
        *,
        optimizer: MakeOptimizer | None = None,
        device: Device = "cuda",
        example: Example | None = None,
    ) -> None:
        if settings.torch_dtype not in DTYPES:
            raise InputError(f"torch_dtype must be one of {', '.join(DTYPES)}")
        self.blueprint = blueprint
        self.settings = settings
        self.device = device
        self.example = example
        self._optimizer = optimizer or torch.optim.AdamW
        self._counted: dict[Any, Figures] = {}

    # The few layers that stand for all

    @cached_property
    def _whole(self) -> dict[str, nn.Module]:
        """The denoisers in full, without memory."""
        models = {key: self.blueprint.empty(key) for key in self.blueprint.denoisers}
        for model in models.values():
            set_dtype(model, getattr(torch, self.settings.torch_dtype))
        return models

    @cached_property
    def _counts(self) -> dict[str, int]:
        """How many layers the whole denoisers have, where a few stand for all; else empty."""
        counts = self.blueprint.layer_counts()
        lora = dict(self.settings.lora or {})
        if any(lora.get(name) for name in ("rank_pattern", "layers_to_transform")):
            return {}
        if not counts:
            return {}
        runs = [self.blueprint.with_layers(each) for each in layer_counts_to_run(counts)]
        if self._freeze(runs[0]) is None:
            return {}
        sizes = [{"numel": float(self._numel(run))} for run in runs]
        whole = sum(p.numel() for model in self._whole.values() for p in model.parameters())
        alike = extrapolate(sizes, counts)["numel"] == whole
        return counts if alike else {}

    @staticmethod
    def _numel(blueprint: Blueprint) -> int:
        models = [blueprint.empty(key) for key in blueprint.denoisers]
        return sum(p.numel() for model in models for p in model.parameters())

    def _freeze(self, few: Blueprint) -> list[str] | None:
        """Return the patterns of frozen parameters as a denoiser of a few layers has them.

        None, if one of them names a single layer that is not the last.
        """
        patterns: list[str] = []
        for pattern in self.settings.freeze:
            changed: str | None = pattern
            for key, model in self._whole.items():
                lengths = list_lengths(few.empty(key))
                changed = changed and pattern_for_layers(changed, list_lengths(model), lengths)
            if changed is None:
                return None
            patterns.append(changed)
        return patterns

    @cached_property
    def _students(self) -> list[FakeStudent]:
        """A student with few layers, and one with one layer more of each kind; or the whole."""
        if not self._counts:
            return [self._student(self.blueprint, list(self.settings.freeze))]
        blueprints = [
            self.blueprint.with_layers(counts) for counts in layer_counts_to_run(self._counts)
        ]
        return [self._student(few, self._freeze(few) or []) for few in blueprints]

    def _student(self, blueprint: Blueprint, freeze: list[str]) -> FakeStudent:
        return FakeStudent(blueprint, self.settings, freeze, self.example)

    def _figures(self, run: Callable[[FakeStudent], Figures]) -> Figures:
        return extrapolate([run(student) for student in self._students], self._counts)

    # Plans

    @cached_property
    def modes(self) -> tuple[Checkpointing, ...]:
        """Checkpointing modes that the denoisers support."""
        models = self._whole.values()
        if all(getattr(m, "_supports_gradient_checkpointing", False) for m in models):
            return MODES
        return tuple(mode for mode in MODES if mode not in BLOCKWISE_MODES)

    @cached_property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels: those of the settings, or the pipeline's own."""
        if self.settings.height and self.settings.width:
            return self.settings.height, self.settings.width
        return self._students[0].default_size()

    @cached_property
    def constants(self) -> Figures:
        """Bytes of frozen weights (weights) and of those that train (trained), and the like."""
        figures = self._figures(FakeStudent.weights)
        for name in ("dequantised", "gathered"):  # of the largest layer, not of all
            figures[name] = max(student.weights()[name] for student in self._students)
        return figures

    @cached_property
    def optimizer_bytes(self) -> tuple[float, float]:
        """Bytes of the optimizer's state, and of its temporaries, for each byte that trains."""
        return optimizer_bytes(self._optimizer)

    @property
    def loaded(self) -> float:
        """Bytes of all weights of the denoisers, before training begins."""
        return (self.constants["weights"] + self.constants["trained"]) / self.settings.shards

    @property
    def teacher_bytes(self) -> float:
        """Bytes of the denoisers' weights as pretrained, quantised if the settings say so."""
        quantization = self.settings.quantization
        return sum(weight_bytes(model, quantization) for model in self._whole.values())

    @property
    def largest_layer(self) -> int:
        """Bytes of the denoisers' largest linear layer."""
        return max(map(largest_linear, self._whole.values()))

    def count(self, mode: Checkpointing, **changes: Any) -> Figures:  # noqa: ANN401
        """Return what a step of the whole model allocates and computes.

        Args:
            mode: Checkpointing mode.
            **changes: Arguments of `FakeStudent.step`.
        """
        key = (mode, tuple(sorted(changes.items())))
        if key not in self._counted:
            self._counted[key] = self._figures(
                lambda student: student.step(mode, self.device, **changes)
            )
        return self._counted[key]

    def step(self, mode: Checkpointing, **changes: Any) -> StepPlan:  # noqa: ANN401
        """Return the plan of a training step.

        Args:
            mode: Checkpointing mode.
            **changes: Arguments of `FakeStudent.step`, such as another size.
        """
        figures = self.count(mode, **changes)
        memory, where = self.memory(mode, **changes)
        return StepPlan(
            mode=mode,
            memory=memory,
            activation_peak=max(_segments(figures).values()),
            flops=figures["flops"],
            recomputed=1 - self.count("none", **changes)["flops"] / figures["flops"],
            peak_at=where,
        )

    def memory(self, mode: Checkpointing, **changes: Any) -> tuple[Memory, str]:  # noqa: ANN401
        """Return the memory of a training step at its peak, and where in the step that is.

        Args:
            mode: Checkpointing mode.
            **changes: Arguments of `FakeStudent.step`, such as another size.
        """
        figures = self.count(mode, **changes)
        weights, trained, peak, where = self._peak(figures, _segments(figures))
        rest = max(0.0, peak - weights - trained)
        saved = min(figures["saved"], rest)
        return Memory(weights, trained, saved, rest - saved), where

    def _peak(self, figures: Figures, peaks: Figures) -> tuple[float, float, float, str]:
        """Return bytes of weights and of what trains, all bytes at the peak, and where it is."""
        settings, constants = self.settings, self.constants
        state, temporary = self.optimizer_bytes
        shards = settings.shards
        # The last step's gradients live until the next backward pass begins.
        parameters = constants["trained"] / shards
        gradients = parameters if shards > 1 else figures["gradients"]
        optimizer = parameters * state
        average = parameters if settings.ema else 0.0
        buckets = gradients if settings.replicas > 1 and shards == 1 else 0.0
        weights = constants["weights"] / shards + constants["gathered"]
        trained = parameters + gradients + optimizer + average + buckets
        fixed = weights + trained + constants["dequantised"]
        moments = {
            f"{key[0]}: {', '.join(map(str, key[1:]))}": fixed + value
            for key, value in peaks.items()
        }
        if settings.accumulate == 1 and shards == 1:
            for key, value in peaks.items():
                if key[0] == "backward":
                    # Counted among what is allocated, from none to all.
                    moments[f"backward: {', '.join(map(str, key[1:]))}"] = fixed - gradients + value
        moments["optimizer"] = weights + trained + parameters * temporary
        at = max(moments, key=lambda key: moments[key])
        return weights, trained, moments[at], at

    def sample(self, batch_size: int, **changes: Any) -> Figures:  # noqa: ANN401
        """Return what sampling without gradients takes, as `FakeStudent.sample` does."""
        key = ("sample", batch_size, tuple(sorted(changes.items())))
        if key not in self._counted:
            runs = [student.sample(batch_size, **changes) for student in self._students]
            figures = extrapolate(runs, self._counts)
            # Without a graph, memory does not grow with the layers.
            peaks = {name: max(run[name] for run in runs) for name in ("denoise", "decode")}
            self._counted[key] = figures | peaks
        return self._counted[key]

    def encode(self, batch_size: int = 1) -> Figures:
        """Return the temporaries (encode) and the FLOPs (flops) of encoding images."""
        return self._students[0].encode(batch_size)

    def component_bytes(self, dtype_bytes: int | None = None) -> dict[str, float]:
        """Return the bytes of each component's weights, by name; of denoisers, unquantised."""
        size = dtype_bytes or torch.empty(0, dtype=DTYPES[self.settings.torch_dtype]).element_size()
        sizes = {}
        for key in self.blueprint.models:
            model = self._whole[key] if key in self._whole else self.blueprint.empty(key)
            tensors = [*model.parameters(), *model.buffers()]
            sizes[key] = float(sum(tensor.numel() for tensor in tensors) * size)
        return sizes


def _segments(figures: Figures) -> Figures:
    """Return the peaks of a step's segments."""
    return {key: value for key, value in figures.items() if isinstance(key, tuple)}
