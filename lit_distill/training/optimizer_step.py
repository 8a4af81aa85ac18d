"""An optimizer step: the losses of its batches, the norm of its gradient, and its clipping."""

from __future__ import annotations

import math
from collections.abc import Iterable
from types import SimpleNamespace
from typing import Any, NamedTuple, NoReturn

import lightning.pytorch as pl
import torch
from lightning.pytorch.plugins.precision import Precision
from lightning.pytorch.utilities import GradClipAlgorithmType
from torch import Tensor, nn

from lit_distill.compute.sharding import full_tensor, local_tensor
from lit_distill.training.objectives.base import Losses
from lit_distill.training.resumable_module import ResumableModule


class MicroBatch(NamedTuple):
    """One batch of an optimizer step: its number of inference steps, its rows, their losses.

    Attributes:
        num_inference_steps: Number of inference steps.
        rows: Numbers of the rows.
        losses: The student's losses of the rows, (B,).
        companion: The loss of what trains beside the student, (), if anything does.
    """

    num_inference_steps: int
    rows: list[int]
    losses: Tensor
    companion: Tensor | None


class OptimizerStep:
    """Collects the batches whose gradients are accumulated into one optimizer step."""

    def __init__(self) -> None:
        self.batches: list[MicroBatch] = []

    def add(self, num_inference_steps: int, rows: list[int], losses: Losses) -> None:
        """Add a batch and its losses."""
        companion = None if losses.companion is None else losses.companion.detach()
        batch = MicroBatch(num_inference_steps, rows, losses.student.detach(), companion)
        self.batches.append(batch)

    def log(self, module: ResumableModule) -> None:
        """Log the loss of the whole step, over all processes, and the gradient's norm; start anew.

        Raises:
            FloatingPointError: If the norm is not finite, naming step, rows and losses.
        """
        norm = gradient_norm(module.trained().values())
        beside = module.companions().values()
        if any(parameter.grad is not None for parameter in beside):
            norm_beside = gradient_norm(beside)
            module.log("companion_grad_norm", norm_beside)
            if not torch.isfinite(norm_beside):
                norm = norm_beside
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
        beside = [batch.companion for batch in batches if batch.companion is not None]
        if beside:
            logged["companion_loss"] = torch.stack(beside).mean()
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


def total_loss(losses: Losses, parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return what is back-propagated, (): the student's mean loss and that of what trains beside.

    Args:
        losses: The losses of a batch.
        parameters: All that is trained.
    """
    total = losses.student.mean()
    if losses.companion is not None:
        total = total + losses.companion
    if not losses.complete:
        for parameter in parameters:
            total = total + 0.0 * local_tensor(parameter).sum()
    return total


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Tensor:
    """Return the 2-norm of all gradients together, of sharded ones too; () float32."""
    grads = [p.grad for p in parameters if p.grad is not None]
    kinds = {type(grad) for grad in grads}  # sharded and whole ones can't be stacked
    norms = [
        full_tensor(torch.nn.utils.get_total_norm([g for g in grads if type(g) is kind]))
        for kind in kinds
    ]
    return norms[0] if len(norms) == 1 else torch.stack([torch.zeros(()), *norms]).norm()


def scales_loss(trainer: pl.Trainer) -> bool:
    """Return whether the trainer scales the loss (float16) and skips steps that overflow."""
    return getattr(trainer.precision_plugin, "scaler", None) is not None


def clip_gradients(
    module: pl.LightningModule,
    optimizer: torch.optim.Optimizer,
    gradient_clip_val: float | None,
    gradient_clip_algorithm: str | None,
) -> None:
    """Clip as the trainer is configured to, each parameter group by itself, fused ones too.

    Lightning refuses fused optimizers under every mixed precision, but only float16 scales
    gradients.
    """
    if not gradient_clip_val or scales_loss(module.trainer):
        module.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)
        return
    algorithm = GradClipAlgorithmType(gradient_clip_algorithm or "norm")
    plugin = module.trainer.precision_plugin
    for group in optimizer.param_groups:
        # What trains beside the student has gradients of another size.
        one: Any = SimpleNamespace(param_groups=[group])
        Precision.clip_gradients(plugin, one, gradient_clip_val, algorithm)
