"""Where the pipeline's components are: on the training device, or in host memory."""

from __future__ import annotations

from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import nn

from lit_distill.pipelines.components import denoisers, move, replaced_components
from lit_distill.pipelines.stages import Offload, enable_offload

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def place(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Move all components to the device, also those that Lightning does not know."""
    move(pipe.components.values(), device)


def place_encoders(pipe: DiffusionPipeline, device: torch.device) -> None:
    """Move everything but the denoisers to the device."""
    move((c for name, c in pipe.components.items() if name not in denoisers(pipe)), device)


class Placement:
    """Keeps a VAE that was released before training, and restores it while images are needed.

    Args:
        pipe: The pipeline.
        vae: The released VAE, in host memory; None: the pipeline still has its own.
    """

    def __init__(self, pipe: DiffusionPipeline, vae: nn.Module | None = None) -> None:
        self.pipe = pipe
        self.vae = vae
        self._restored = ExitStack()

    def place(self, device: torch.device, *, vae: bool, offload: Offload = "none") -> None:
        """Move all components to the device; with `vae` also a released VAE, into the pipeline.

        With `offload` they stay in host memory, and diffusers moves them when they compute.
        """
        if offload != "none":
            enable_offload(self.pipe, device, offload)
            return
        if vae and self.vae is not None and getattr(self.pipe, "vae", None) is not self.vae:
            self._restored.enter_context(replaced_components(self.pipe, vae=self.vae))
        place(self.pipe, device)

    def release_vae(self) -> None:
        """Free the device's memory of the VAE again, if it was released before training."""
        self._restored.close()
        if self.vae is not None:
            self.vae.cpu()
