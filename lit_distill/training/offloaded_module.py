"""A module whose networks stay in host memory while diffusers moves them to the device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
import torch

from lit_distill.pipelines.stages import Offload, check_offload


class OffloadedModule(pl.LightningModule):
    """Leaves its networks where they are when a trainer moves it, if they are offloaded.

    Attributes:
        offload: What is on the device together: see `enable_offload`.
    """

    offload: Offload = "none"

    def offload_from(self, device: torch.device, offload: Offload) -> None:
        """Keep the networks in host memory when the trainer places this module on the device.

        Raises:
            InputError: If they can't be offloaded from it.
        """
        check_offload(offload, device)
        self.offload = offload

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:  # noqa: ANN401
        """Move the module; its networks may be larger than the device."""
        whole = recurse and self.offload == "none"
        return super()._apply(fn, recurse=whole)  # type: ignore[no-untyped-call]
