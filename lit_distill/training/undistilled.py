"""The pretrained weights, used in place of the student's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_distill.adapters.inject import adapters_disabled
from lit_distill.pipelines.components import (
    denoiser_device,
    denoisers,
    move,
    replaced_components,
)
from lit_distill.pipelines.release import break_cycles

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class UndistilledWeights:
    """Lets a pipeline compute with its pretrained weights: adapters off, or a second denoiser.

    Args:
        pipe: The student's pipeline.
        load: Loads the pretrained pipeline; None: the student is an adapter, which is disabled.
    """

    def __init__(
        self, pipe: DiffusionPipeline, load: Callable[[], DiffusionPipeline] | None
    ) -> None:
        self.pipe = pipe
        self.load = load
        self._denoisers: dict[str, Any] = {}

    @contextmanager
    def active(self) -> Iterator[None]:
        """Compute with the pretrained weights until the context is left.

        A second denoiser takes the place of the student's on the device, which is in host memory
        meanwhile; with several processes, whose strategies refer to the weights, it is beside it.
        """
        if self.load is None:
            with adapters_disabled(nn.ModuleDict(denoisers(self.pipe))):
                yield
            return
        if not self._denoisers:
            self._denoisers = denoisers(self.load())
            for denoiser in self._denoisers.values():
                denoiser.requires_grad_(False)
        device, host = denoiser_device(self.pipe), torch.device("cpu")
        own = [] if torch.distributed.is_initialized() else list(denoisers(self.pipe).values())
        move(own, host)
        move(self._denoisers.values(), device)
        try:
            with replaced_components(self.pipe, **self._denoisers):
                yield
        finally:
            if own:
                move(self._denoisers.values(), host)
            move(own, device)

    def release(self) -> None:
        """Free the second denoiser; it is loaded again at the next use."""
        for denoiser in self._denoisers.values():
            break_cycles(denoiser)
        self._denoisers.clear()
