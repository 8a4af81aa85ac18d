"""The plan of a whole job: what every stage needs, which mode to train with, and for how long."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lit_distill.compute.activation_checkpointing import Checkpointing
from lit_distill.planning.cards import GIB, Card
from lit_distill.planning.cards import card as named_card
from lit_distill.planning.optimizer import MakeOptimizer
from lit_distill.planning.planner import (
    Memory,
    Planner,
    StepPlan,
    blueprint_of,
)
from lit_distill.planning.settings import TrainingSettings
from lit_distill.preflight.probe import preflight_size

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

MARGIN = 0.08
"""Share of a card's memory that is left free for what a plan does not count.

That is the CUDA context (about .5 GiB), fragmentation, the workspaces of cuBLAS and cuDNN, and
NCCL's buffers. Not calibrated on a GPU yet.
"""

MFU = 0.45
"""Share of a card's peak speed that is assumed where none is given."""

TEACHER_STEPS = 50


@dataclass(frozen=True)
class StagePlan:
    """One stage of the job.

    Attributes:
        name: encode, preflight, validation, export or generate.
        memory: Memory at the peak.
        place: device, or host where the stage needs no GPU.
        flops: Floating point operations for one sample; 0 where they are not counted.
        note: What it is that is planned.
    """

    name: str
    memory: Memory
    place: str = "device"
    flops: float = 0.0
    note: str = ""


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
    blueprint = blueprint_of(source, revision)
    sizes = dict(sizes or {})
    if sizes:
        height, width = max(sizes, key=lambda size: size[0] * size[1])
        settings = replace(settings, height=height, width=width)
    planner = Planner(blueprint, settings, optimizer=optimizer)
    height, width = planner.size
    if not settings.height:
        settings = replace(settings, height=height, width=width)
        planner = Planner(blueprint, settings, optimizer=optimizer)
    stages = Stages(planner, teacher_cfg_scale, teacher_num_inference_steps)
    encoders = 0.0 if cached else stages.encoders()
    fit: dict[str, StepPlan] = {}
    for mode in modes or planner.modes:
        step = planner.step(mode)
        memory = replace(step.memory, weights=step.memory.weights + encoders)
        fit[mode] = replace(step, memory=memory)
    rate = card.flops * mfu
    work = _mean_work(planner, sizes, (height, width))
    return Plan(
        model=str(source) if isinstance(source, str | Path) else type(source).__name__,
        card=card,
        devices=devices,
        mfu=mfu,
        settings=planner.settings,
        size=(height, width),
        stages=stages.all(cached),
        fit=fit,
        seconds={mode: step.flops * work / rate for mode, step in fit.items()},
        configured=configured,
        run=run or Run(),
    )


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


class Stages:
    """Plans the stages besides fit.

    Args:
        planner: Plans runs of the pipeline, at the size of training.
        teacher_cfg_scale: Guidance of the teacher.
        teacher_steps: Steps of the teacher.
    """

    def __init__(self, planner: Planner, teacher_cfg_scale: float, teacher_steps: int) -> None:
        self.planner = planner
        self.teacher_cfg_scale = teacher_cfg_scale
        self.teacher_steps = teacher_steps
        self.sizes = planner.component_bytes()

    def all(self, cached: bool) -> tuple[StagePlan, ...]:
        """Return all of them, in the order in which a job goes through them."""
        stages = [self.generate(), self.encode() if cached else None]
        stages += [self.preflight(), self.validation(cached), self.export()]
        return tuple(stage for stage in stages if stage is not None)

    def encoders(self) -> float:
        """Return the bytes of everything but the denoisers."""
        own = self.planner.blueprint.denoisers
        return sum(size for name, size in self.sizes.items() if name not in own)

    def generate(self) -> StagePlan:
        """The teacher's sampling and decoding of one sample, every component on the device."""
        figures = self.planner.sample(1, cfg_scale=self.teacher_cfg_scale)
        weights, steps = sum(self.sizes.values()), self.teacher_steps
        memory = Memory(weights, temporaries=max(figures["denoise"], figures["decode"]))
        flops = figures["step_flops"] * steps + figures["decode_flops"]
        note = f"one sample, {steps} steps, cfg {self.teacher_cfg_scale:g}"
        return StagePlan("generate", memory, flops=flops, note=note)

    def encode(self) -> StagePlan | None:
        """Text encoders and VAE, before training; the denoiser is not on the device yet."""
        if "vae" not in self.sizes:
            return None
        figures = self.planner.encode()
        memory = Memory(self.encoders(), temporaries=figures["encode"])
        note = "text encoders and VAE; activations of the VAE only"
        return StagePlan("encode", memory, flops=figures["flops"], note=note)

    def preflight(self) -> StagePlan:
        """Gradients of one sample at preflight's size, in the mode that needs least."""
        height, width = preflight_size(*self.planner.size)
        mode = self.planner.modes[-1]
        memory, _ = self.planner.memory(mode, batch_size=1, height=height, width=width)
        note = f"gradients of one sample at {height}x{width}, checkpointing {mode}"
        return StagePlan("preflight", memory, note=note)

    def validation(self, cached: bool) -> StagePlan:
        """The student's sampling and decoding beside all that training keeps on the device."""
        settings = self.planner.settings
        figures = self.planner.sample(settings.batch_size)
        training, _ = self.planner.memory(self.planner.modes[-1])
        own = self.planner.blueprint.denoisers
        weights = training.weights + (self.sizes.get("vae", 0.0) if cached else self.encoders())
        note = "student and undistilled pipeline, decoding included"
        if settings.lora is None:  # no adapters to switch off
            weights += sum(self.sizes[key] for key in own) / settings.shards
            note += ", which is a second denoiser"
        most = max(figures["denoise"], figures["decode"])
        return StagePlan("validation", Memory(weights, training.trained, 0.0, most), note=note)

    def export(self) -> StagePlan:
        """The pretrained pipeline in the host's memory, and the exported weights."""
        trained = self.planner.constants["trained"]
        memory = Memory(sum(self.sizes.values()), trained)
        return StagePlan("export", memory, place="host", note="the pipeline once, on the host")
