"""An optimizer step: the losses of its batches, the norm of its gradient, and its clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from lit_distill.compute.sharding import full_tensor
from lit_distill.training.resumable_module import ResumableModule


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

    def log(self, module: ResumableModule) -> None:
        """Log the loss of the whole step, over all processes, and the gradient's norm; start anew.

        Raises:
            FloatingPointError: If the norm is not finite, naming step, rows and losses.
        """
        norm = gradient_norm(module.trained().values())
        # A loss scaler skips such steps by itself.
        if not (torch.isfinite(norm) or scales_loss(module.trainer)):
            self.refuse(module.global_step, norm.item())
        losses, rows = self.finish()
        module.log("grad_norm", norm, batch_size=rows)
        sync = module.trainer.world_size > 1
        for name, mean in losses.items():
            bar = name == "train_loss"
            module.log(name, mean, prog_bar=bar, sync_dist=sync, batch_size=rows)

    def finish(self) -> tuple[dict[str, Tensor], int]:
        """Return the mean losses by their name in the log, and the number of rows; start anew."""
        batches, self.batches = self.batches, []
        logged = {}
        if batches:
            logged["train_loss"] = _mean(batches)
        for steps in sorted({batch.num_inference_steps for batch in batches}):
            same = [batch for batch in batches if batch.num_inference_steps == steps]
            logged[f"train_loss_{steps}_steps"] = _mean(same)
        return logged, sum(len(batch.rows) for batch in batches)

    def refuse(self, step: int, norm: float) -> NoReturn:
        """Stop training, on all processes, and name the rows whose loss is not finite.

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
        listed = ", ".join(f"row {row}: loss {loss:g}" for row, loss in (bad or losses).items())
        raise FloatingPointError(
            f"step {step}: the gradient's norm is {norm}; {listed}. No weight was changed. Check "
            "these rows' targets, lower the learning rate, or clip gradients "
            "(trainer.gradient_clip_val: 1)"
        )


def _mean(batches: list[MicroBatch]) -> Tensor:
    return torch.stack([batch.losses.mean() for batch in batches]).mean()


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, of sharded ones too; () float32."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return full_tensor(torch.nn.utils.get_total_norm(grads))


def scales_loss(trainer: pl.Trainer) -> bool:
    """Return whether the trainer scales the loss (float16) and skips steps that overflow."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def clip_gradients(
    module: pl.LightningModule,
    optimizer: torch.optim.Optimizer,
    gradient_clip_val: float | None,
    gradient_clip_algorithm: str | None,
) -> None:
    """Clip as the trainer is configured to, with fused optimizers too.

    Lightning refuses fused optimizers under every mixed precision, but only float16 scales
    gradients.
    """
    if gradient_clip_val and not scales_loss(module.trainer):
        algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
        plugin = module.trainer.precision_plugin
        Precision.clip_gradients(plugin, optimizer, gradient_clip_val, algorithm)
    else:
        module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
