"""The plan of a whole job: what every stage needs, which mode to train with, and for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.cards import GIB, MARGIN, Card
from lit_distill.planning.cards import card as named_card
from lit_distill.planning.optimizer import MakeOptimizer
from lit_distill.planning.planner import (
    Memory,
    Planner,
    StepPlan,
    blueprint_of,
)
from lit_distill.planning.settings import TrainingSettings
from lit_distill.planning.stages import StagePlan, Stages

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MFU = 0.45
"""Share of a card's peak speed that is assumed where none is given."""

TEACHER_STEPS = 50


@dataclass(frozen=True)
class Run:
    """How long a training is.

    Attributes:
        rows: Training rows; None where the table does not exist yet.
        optimizer_steps: Optimizer steps of the whole training; None where it is not known.
        batches: Batches that each device computes in it.
    """

    rows: int | None = None
    optimizer_steps: int | None = None
    batches: int | None = None


@dataclass(frozen=True)
class Plan:
    """What a job needs on a card.

    Attributes:
        model: The pipeline.
        card: The card.
        devices: Number of cards.
        mfu: Share of the card's speed that is assumed.
        settings: What trains, and how.
        size: Height and width of the images in pixels that memory is planned for.
        stages: The stages besides fit.
        fit: A training step in every checkpointing mode.
        seconds: Seconds of a batch in every mode, the mean over all sizes.
        configured: The mode that was asked for; auto: any.
        run: How long the training is.
    """

    model: str
    card: Card
    devices: int
    mfu: float
    settings: TrainingSettings
    size: tuple[int, int]
    stages: tuple[StagePlan, ...]
    fit: Mapping[str, StepPlan]
    seconds: Mapping[str, float]
    configured: str = "auto"
    run: Run = field(default_factory=Run)

    @property
    def usable(self) -> float:
        """Bytes of the card's memory, less the margin."""
        return self.card.memory * (1 - MARGIN)

    def fits(self, memory: Memory) -> bool:
        """Return whether this fits the card, with the margin."""
        return memory.total <= self.usable

    @property
    def recommended(self) -> StepPlan | None:
        """The fastest mode that fits; None if none does."""
        fitting = [step for step in self.fit.values() if self.fits(step.memory)]
        return min(fitting, key=lambda step: step.flops, default=None)

    def hours(self, mode: str) -> float | None:
        """Return the hours of the whole training, validation apart."""
        batches = self.run.batches
        return None if batches is None else batches * self.seconds[mode] / 3600

    def as_dict(self) -> dict[str, Any]:
        """Return the plan as plain values for JSON; sizes in GiB."""
        best = self.recommended
        return {
            "model": self.model,
            "card": {
                "name": self.card.name,
                "memory_gib": self.card.memory / GIB,
                "tflops": self.card.flops / 1e12,
            },
            "devices": self.devices,
            "mfu": self.mfu,
            "margin": MARGIN,
            "height": self.size[0],
            "width": self.size[1],
            "settings": asdict(self.settings),
            "stages": {
                stage.name: {
                    **_gib(stage.memory),
                    "place": stage.place,
                    "flops": stage.flops,
                    "fits": self.fits(stage.memory) if stage.place == "device" else None,
                    "note": stage.note,
                }
                for stage in self.stages
            },
            "fit": {
                mode: {
                    **_gib(step.memory),
                    "flops": step.flops,
                    "recomputed": step.recomputed,
                    "seconds": self.seconds[mode],
                    "hours": self.hours(mode),
                    "fits": self.fits(step.memory),
                    "peak_at": step.peak_at,
                }
                for mode, step in self.fit.items()
            },
            "run": asdict(self.run),
            "recommended": best.mode if best else None,
        }


def _gib(memory: Memory) -> dict[str, float]:
    sizes = {f"{name}_gib": value / GIB for name, value in asdict(memory).items()}
    return sizes | {"total_gib": memory.total / GIB}


def plan(
    source: str | Path | DiffusionPipeline,
    settings: TrainingSettings,
    card: Card | str = "h100",
    *,
    revision: str | None = None,
    optimizer: MakeOptimizer | None = None,
    devices: int = 1,
    mfu: float = MFU,
    sizes: Mapping[tuple[int, int], int] | None = None,
    modes: Sequence[Checkpointing] | None = None,
    configured: str = "auto",
    run: Run | None = None,
    cached: bool = True,
    teacher_cfg_scale: float = 4.0,
    teacher_num_inference_steps: int = TEACHER_STEPS,
) -> Plan:
    """Return what a job needs, without weights and without a GPU.

    Only configuration files of the pipeline are read or downloaded. Counted on the operations that
    a CUDA device takes, without `torch.compile`.

    Args:
        source: Hub id or folder of a pipeline, or the pipeline.
        settings: What trains, and how.
        card: The card, or its name: h100, a100-80gb, l40s, rtx4090 or rtx5090.
        revision: Branch, tag or commit of a hub repository.
        optimizer: Makes the optimizer of the trained parameters; default: AdamW.
        devices: Number of cards.
        mfu: Share of the card's speed that is assumed.
        sizes: How many rows have each height and width; default: all those of `settings`. Memory
            is that of the largest.
        modes: Checkpointing modes; default: all that the denoisers support.
        configured: The mode that the settings name, or auto.
        run: How long the training is.
        cached: Whether prompts and images are encoded before training, so that encoders and VAE
            leave the device.
        teacher_cfg_scale: Guidance of the teacher.
        teacher_num_inference_steps: Steps of the teacher.
    """
    card = named_card(card) if isinstance(card, str) else card
    sizes = dict(sizes or {})
    planner = _planner(blueprint_of(source, revision), settings, optimizer, sizes)
    stages = Stages(
        planner,
        (1 - MARGIN) * card.memory,
        configured,
        teacher_cfg_scale=teacher_cfg_scale,
        teacher_steps=teacher_num_inference_steps,
    )
    encoders = 0.0 if cached else stages.encoders()
    fit: dict[str, StepPlan] = {}
    for mode in modes or planner.modes:
        step = planner.step(mode)
        memory = replace(step.memory, weights=step.memory.weights + encoders)
        fit[mode] = replace(step, memory=memory)
    rate = card.flops * mfu
    work = _mean_work(planner, sizes, planner.size)
    return Plan(
        model=str(source) if isinstance(source, str | Path) else type(source).__name__,
        card=card,
        devices=devices,
        mfu=mfu,
        settings=planner.settings,
        size=planner.size,
        stages=stages.all(cached),
        fit=fit,
        seconds={mode: step.flops * work / rate for mode, step in fit.items()},
        configured=configured,
        run=run or Run(),
    )


def _planner(
    blueprint: Blueprint,
    settings: TrainingSettings,
    optimizer: MakeOptimizer | None,
    sizes: Mapping[tuple[int, int], int],
) -> Planner:
    """Return the planner of the largest size: of `sizes`, or that of the settings."""
    if sizes:
        height, width = max(sizes, key=lambda size: size[0] * size[1])
        settings = replace(settings, height=height, width=width)
    planner = Planner(blueprint, settings, optimizer=optimizer)
    if settings.height:
        return planner
    height, width = planner.size  # the pipeline's own
    settings = replace(settings, height=height, width=width)
    return Planner(blueprint, settings, optimizer=optimizer)


def _mean_work(
    planner: Planner, sizes: Mapping[tuple[int, int], int], largest: tuple[int, int]
) -> float:
    """Return the mean FLOPs of a batch over all sizes, as a share of the largest's."""
    if len(sizes) < 2:
        return 1.0
    whole = planner.count("none")["flops"]
    total = 0.0
    for (height, width), rows in sizes.items():
        if (height, width) == largest:
            total += rows * whole
        else:
            total += rows * planner.count("none", height=height, width=width)["flops"]
    return total / whole / sum(sizes.values())
