"""Exponential moving average of the trainable weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lit_distill.compute.sharding import assign_tensor, full_tensor, gather, local_tensor
from lit_distill.errors import InputError
from lit_distill.training.checkpoint_io import check_state
from lit_distill.training.direct_distill import DirectDistill


class EMA(Callback):
    """Keeps an exponential moving average of the trainable weights, in float32.

    Validation, exports and the model after training use the average. A checkpoint holds both
    average and weights, so that training resumes exactly. Frozen weights are not copied
    (Lightning's `EMAWeightAveraging` copies all). The average of sharded weights is sharded.

    Args:
        decay: Weight of the average in an update, >= 0 and < 1. The first updates use
            (1 + n) / (10 + n) where that is smaller, so that a short run forgets the initial
            weights.

    Raises:
        ValueError: If `decay` is out of range.
    """

    def __init__(self, decay: float = 0.999) -> None:
        if not 0 <= decay < 1:
            raise InputError(f"EMA: decay must be >= 0 and < 1, got {decay}")
        self.decay = decay
        self.updates = 0
        self.average: dict[str, Tensor] = {}
        self.swapped = False

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Reset, in case the callback has been used before."""
        if stage == "fit":
            self.average, self.updates, self.swapped = {}, 0, False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start from the current weights, unless a checkpoint has an average."""
        assert isinstance(pl_module, DirectDistill)
        loaded, self.average = self.average, {}
        for name, parameter in pl_module.trained().items():
            self.average[name] = parameter.detach().clone()
            if loaded:
                assign_tensor(self.average[name], loaded[name])

    @torch.no_grad()
    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Update the average after an optimizer step."""
        assert isinstance(pl_module, DirectDistill)
        if trainer.fit_loop._should_accumulate():
            return
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        weights = [local_tensor(parameter.detach()) for parameter in pl_module.trained().values()]
        averages = [local_tensor(average) for average in self.average.values()]
        torch._foreach_lerp_(averages, weights, 1 - decay)
        self.updates += 1

    @torch.no_grad()
    def _swap(self, module: DirectDistill) -> None:
        for name, parameter in module.trained().items():
            weight = parameter.detach().clone()
            parameter.copy_(self.average[name])
            self.average[name].copy_(weight)
        self.swapped = not self.swapped

    @contextmanager
    def averaged(self, module: DirectDistill) -> Iterator[None]:
        """Put the average into the model until the context is left."""
        if not self.average or self.swapped:
            yield
            return
        self._swap(module)
        try:
            yield
        finally:
            self._swap(module)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Validate the average."""
        if trainer.state.fn == "fit" and self.average and not self.swapped:
            assert isinstance(pl_module, DirectDistill)
            self._swap(pl_module)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Restore the weights for training."""
        if trainer.state.fn == "fit" and self.swapped:
            assert isinstance(pl_module, DirectDistill)
            self._swap(pl_module)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Leave the average in the model."""
        self.on_validation_start(trainer, pl_module)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Save the average as the state that `load_student` reads, and the weights beside it."""
        assert isinstance(pl_module, DirectDistill)
        if not self.average:
            return
        average: Mapping[str, Tensor] = self.average
        weights: Mapping[str, Tensor] = pl_module.trained()
        if self.swapped:
            average, weights = weights, average
        checkpoint["state_dict"] = gather(average, trainer.is_global_zero)
        checkpoint["ema"] = {
            "weights": gather(weights, trainer.is_global_zero),
            "updates": self.updates,
        }

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Move the average out of the model, which has just loaded it, and load the weights."""
        assert isinstance(pl_module, DirectDistill)
        if trainer.state.fn != "fit":
            return
        if "ema" not in checkpoint:
            rank_zero_warn("the checkpoint has no EMA: a new average starts from its weights")
            return
        saved = checkpoint["ema"]
        trained = pl_module.trained()
        check_state(saved["weights"], trained, "the checkpoint's EMA")
        self.updates = saved["updates"]
        for name, parameter in trained.items():
            self.average[name] = full_tensor(parameter.detach()).clone()
            assign_tensor(parameter, saved["weights"][name])


@contextmanager
def averaged_weights(trainer: pl.Trainer, module: DirectDistill) -> Iterator[None]:
    """Use the average of the trainer's `EMA`, if it has one, until the context is left."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    with ExitStack() as stack:
        for callback in callbacks:
            if isinstance(callback, EMA):
                stack.enter_context(callback.averaged(module))
        yield
