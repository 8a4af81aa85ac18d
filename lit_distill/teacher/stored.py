"""The teacher's results that the rows of a batch already hold."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lit_distill.data.batch import Batch, has_target
from lit_distill.errors import InputError
from lit_distill.pipelines.latent_codec import LatentCodec
from lit_distill.pipelines.trajectory import Trajectory


def stored_target(batch: Batch, codec: Callable[[Batch], LatentCodec]) -> Tensor | None:
    """Return the teacher's final latents, (B, ...), float32; None if the rows hold no result.

    Exact latents come first, then an encoded image, then an image.

    Args:
        batch: The rows.
        codec: Returns the codec of the batch's resolution.
    """
    if batch["latents"] is not None:
        return batch["latents"].float()
    if batch["encoded"] is not None:
        return codec(batch).pack(batch["encoded"])
    if batch["image"] is not None:
        return codec(batch).encode(batch["image"])
    return None


def stored_trajectory(batch: Batch, sigmas: Tensor) -> Trajectory | None:
    """Return the teacher's states at the student's noise levels; None if the rows hold no result.

    Args:
        batch: The rows.
        sigmas: The student's noise levels after each step, (K,).

    Raises:
        InputError: If the rows hold a result but no states, or the states of another schedule.
    """
    stored, levels = batch["trajectory"], batch["sigmas"]
    if stored is not None and levels is not None and batch["latents"] is not None:
        same = levels.shape[1] == len(sigmas) - 1
        if not same or not torch.allclose(levels.cpu(), sigmas[:-1], rtol=1e-3):
            raise InputError(
                f"row {batch['row'][0]}: the teacher's states are at sigmas "
                f"{[round(x, 4) for x in levels[0].tolist()]}, the student's steps at "
                f"{[round(x, 4) for x in sigmas[:-1].tolist()]}: make the pairs with the "
                "model.scheduler, model.sigmas and number of steps that you train with"
            )
        states = [*stored.float().transpose(0, 1), batch["latents"].float()]
        return Trajectory(torch.stack(states), sigmas)
    if has_target(batch):
        raise InputError(
            f"objective Trajectory: row {batch['row'][0]} has no states of the teacher between its "
            "steps; make the pairs with `lit-distill generate --store_trajectory true`"
        )
    return None
