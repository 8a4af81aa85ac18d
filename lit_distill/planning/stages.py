"""What every stage of a job needs besides the training step."""

from __future__ import annotations

from dataclasses import dataclass

from lit_distill.planning.fake_step import Figures
from lit_distill.planning.planner import Memory, Planner
from lit_distill.preflight.probe import preflight_size


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


class Stages:
    """Plans the stages besides fit.

    Args:
        planner: Plans runs of the pipeline, at the size of training.
        usable: Bytes that a stage may take.
        checkpointing: The mode that training uses, or auto.
        teacher_cfg_scale: Guidance of the teacher.
        teacher_steps: Steps of the teacher.
    """

    def __init__(
        self,
        planner: Planner,
        usable: float,
        checkpointing: str,
        *,
        teacher_cfg_scale: float,
        teacher_steps: int,
    ) -> None:
        self.planner = planner
        self.usable = usable
        modes = planner.modes
        self.mode = next((mode for mode in modes if mode == checkpointing), modes[-1])
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
        """The teacher's sampling and decoding of one sample, offloaded as far as it has to be."""
        figures = self.planner.sample(1, cfg_scale=self.teacher_cfg_scale)
        flops = figures["step_flops"] * self.teacher_steps + figures["decode_flops"]
        note = f"one sample, {self.teacher_steps} steps, cfg {self.teacher_cfg_scale:g}"
        options = self._offloaded(figures)
        fitting = [name for name, memory in options.items() if memory.total <= self.usable]
        offload = fitting[0] if fitting else "group"
        if offload != "none":
            note += f", --offload {offload}"
        return StagePlan("generate", options[offload], flops=flops, note=note)

    def _offloaded(self, figures: Figures) -> dict[str, Memory]:
        """Return the memory of sampling for each way of offloading, the fastest first."""
        rest, vae = self.encoders(), self.sizes.get("vae", 0.0)
        denoise, decode = figures["denoise"], figures["decode"]
        denoisers = self.planner.teacher_bytes
        # One layer computes while the next one is copied.
        layers = 2 * self.planner.largest_layer
        parts = (Memory(rest), Memory(vae, temporaries=decode))
        return {
            "none": Memory(rest + denoisers, temporaries=max(denoise, decode)),
            "model": _larger(*parts, Memory(denoisers, temporaries=denoise)),
            "group": _larger(*parts, Memory(layers, temporaries=denoise)),
        }

    def encode(self) -> StagePlan | None:
        """Text encoders and VAE, before training; the denoiser is not on the device yet."""
        if "vae" not in self.sizes:
            return None
        figures = self.planner.encode()
        memory = Memory(self.encoders(), temporaries=figures["encode"])
        note = "text encoders and VAE; activations of the VAE only"
        return StagePlan("encode", memory, flops=figures["flops"], note=note)

    def preflight(self) -> StagePlan:
        """The gradient of one sample at preflight's size, in the mode of training."""
        height, width = preflight_size(*self.planner.size)
        memory, _ = self.planner.memory(self.mode, batch_size=1, height=height, width=width)
        note = f"gradient of one sample at {height}x{width}, checkpointing {self.mode}"
        return StagePlan("preflight", memory, note=note)

    def validation(self, cached: bool) -> StagePlan:
        """The student's sampling and decoding beside all that training keeps on the device."""
        settings = self.planner.settings
        figures = self.planner.sample(settings.batch_size)
        training, _ = self.planner.memory(self.mode)
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


def _larger(*memories: Memory) -> Memory:
    return max(memories, key=lambda memory: memory.total)
