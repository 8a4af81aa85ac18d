"""What is known of an optimizer step: the losses of its batches and the norm of its gradient."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn

from lit_distill.compute.sharding import full_tensor


class MicroBatch(NamedTuple):
    """One batch of an optimizer step: its number of inference steps, its rows, their losses."""

    num_inference_steps: int
    rows: list[int]
    losses: Tensor


class OptimizerStep:
    """Collects the batches whose gradients are accumulated into one optimizer step."""

    def __init__(self) -> None:
        self.batches: list[MicroBatch] = []

    def add(self, num_inference_steps: int, rows: list[int], losses: Tensor) -> None:
        """Add a batch and the losses of its rows, (B,)."""
        self.batches.append(MicroBatch(num_inference_steps, rows, losses))

    def finish(self) -> tuple[dict[str, Tensor], int]:
        """Return the mean losses by their name in the log, and the number of rows; begin anew."""
        batches, self.batches = self.batches, []
        logged = {}
        if batches:
            logged["train_loss"] = _mean(batches)
        for steps in sorted({batch.num_inference_steps for batch in batches}):
            same = [batch for batch in batches if batch.num_inference_steps == steps]
            logged[f"train_loss_{steps}_steps"] = _mean(same)
        return logged, sum(len(batch.rows) for batch in batches)

    def refuse(self, step: int, norm: float) -> NoReturn:
        """Stop training, on all processes, and name the rows that made the gradient useless.

        Raises:
            FloatingPointError: Always.
        """
        losses = {
            row: loss
            for batch in self.batches
            for row, loss in zip(batch.rows, batch.losses.tolist(), strict=True)
        }
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts: list[Any] = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, losses)
            losses = {row: loss for part in parts for row, loss in part.items()}
        bad = {row: loss for row, loss in losses.items() if not math.isfinite(loss)}
        found = ", ".join(f"row {row}: loss {loss:g}" for row, loss in (bad or losses).items())
        raise FloatingPointError(
            f"step {step}: the gradient's norm is {norm}; {found}. No weight was changed. Look at "
            "these rows' targets, lower the learning rate, or clip gradients "
            "(trainer.gradient_clip_val: 1)"
        )


def _mean(batches: list[MicroBatch]) -> Tensor:
    return torch.stack([batch.losses.mean() for batch in batches]).mean()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, of sharded ones too; () float32."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return full_tensor(torch.nn.utils.get_total_norm(grads))
