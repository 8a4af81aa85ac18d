"""A teacher whose encoders, denoisers and VAE are on the device one after the other."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.pipelines.components import (
    denoisers,
    move,
    replace_component,
    replaced_components,
    weightless_copy,
)
from lit_distill.pipelines.hooks import StepCallback
from lit_distill.pipelines.release import break_cycles
from lit_distill.pipelines.stages import (
    Denoised,
    Offload,
    decode,
    denoise,
    encoders,
    offload_groups,
)
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.teacher import Teacher

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class StagedTeacher:
    """Encodes the prompts of all pairs, frees the encoders, then denoises and decodes batches.

    Args:
        teacher: The settings.
        pipe: The pipeline, in host memory.
        device: Where it computes.
        offload: model: the denoisers are on the device while they are used; group: each of their
            layers while it computes.
        batches: The batches that are going to be sampled.
    """

    def __init__(
        self,
        teacher: Teacher,
        pipe: DiffusionPipeline,
        device: torch.device,
        offload: Offload,
        batches: Iterable[Sequence[Pair]],
    ) -> None:
        self.teacher = teacher
        self.pipe = pipe
        self.device = device
        self.offload = offload
        self._encode(batches)
        if offload == "group":
            for denoiser in denoisers(pipe).values():
                offload_groups(denoiser, device)

    def _encode(self, batches: Iterable[Sequence[Pair]]) -> None:
        move(self._rest().values(), self.device)
        once = EncodeOnce(self.pipe, whole_batches=True)
        for batch in batches:
            once.populate(**self.teacher.call(batch))
        for name, encoder in encoders(self.pipe).items():
            once.released = True
            replace_component(self.pipe, name, weightless_copy(encoder, self.device))
            break_cycles(encoder)

    def _rest(self) -> dict[str, nn.Module]:
        """Return all networks but the denoisers."""
        components = self.pipe.components.items()
        modules = {name: c for name, c in components if isinstance(c, nn.Module)}
        return {name: c for name, c in modules.items() if name not in denoisers(self.pipe)}

    def denoise(self, batch: Sequence[Pair], on_step: StepCallback | None = None) -> Denoised:
        """Return the final latents of a batch, and what `decode` needs."""
        decoders = {name: c for name, c in self._rest().items() if hasattr(c, "decode")}
        move(decoders.values(), torch.device("cpu"))
        if self.offload == "model":
            move(denoisers(self.pipe).values(), self.device)
        with self._without(decoders):
            return denoise(self.pipe, on_step=on_step, **self.teacher.call(batch))

    def decode(self, batch: Sequence[Pair], denoised: Denoised) -> list[Any]:
        """Return the B images, or lists of frames, of a batch."""
        if self.offload == "model":
            move(denoisers(self.pipe).values(), torch.device("cpu"))
        move(self._rest().values(), self.device)
        with self._without(denoisers(self.pipe)):
            images = decode(self.pipe, denoised, self.device, **self.teacher.call(batch))
        self.teacher.check_size(self.pipe, batch, images)
        return images

    @contextmanager
    def _without(self, components: dict[str, Any]) -> Iterator[None]:
        """Let copies without weights stand for networks: pipelines read more than weights."""
        copies = {name: weightless_copy(c, self.device) for name, c in components.items()}
        with replaced_components(self.pipe, **copies):
            yield
