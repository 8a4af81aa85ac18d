"""The optimizer of what is trained, and the schedule of its learning rate."""

from __future__ import annotations

import sys
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch.optim.lr_scheduler import ReduceLROnPlateau

from lit_distill.adapters.inject import is_companion
from lit_distill.errors import InputError, with_suggestions
from lit_distill.training.lr_scheduler import WarmupCosine
from lit_distill.training.objectives.base import Objective
from lit_distill.training.resumable_module import ResumableModule


def configure_optimizers(
    module: ResumableModule,
    make_optimizer: OptimizerCallable,
    make_scheduler: LRSchedulerCallable | None,
    objective: Objective,
) -> Any:  # noqa: ANN401
    """Return the optimizer of the trainable parameters and its schedule, as Lightning takes them.

    What the objective trains has parameter groups of its own in the same optimizer.

    Args:
        module: The module.
        make_optimizer: Makes the optimizer, given parameters or groups.
        make_scheduler: Makes the schedule; None: constant.
        objective: Knows the groups of what it trains beside the student, and their options.

    Raises:
        InputError: If the optimizer has no such option, or the schedule follows a metric, but names
            none.
    """
    companion = [p for name, p in module.companions().items() if is_companion(name)]
    groups = objective.groups(companion)
    trained = list(module.trained().values())
    optimizer = make_optimizer([{"params": trained}, *groups] if groups else trained)
    for name in {name for group in groups for name in group}:
        if name != "params" and name not in optimizer.defaults:
            raise InputError(
                f"model.objective: optimizer: {type(optimizer).__name__} has no option "
                f"{with_suggestions(name, optimizer.defaults)}"
            )
    module.resume.configure(optimizer)
    if make_scheduler is None:
        return optimizer
    scheduler: Any = make_scheduler(optimizer)
    if isinstance(scheduler, WarmupCosine) and scheduler.num_training_steps is None:
        scheduler.num_training_steps = int(module.trainer.estimated_stepping_batches)
    config: dict[str, Any] = {"scheduler": scheduler, "interval": "step"}
    if isinstance(scheduler, ReduceLROnPlateau):
        # Lightning would step it after every step or epoch, whether it was validated or not.
        config |= {"monitor": _monitor(scheduler), "frequency": sys.maxsize}
    module.resume.configure(optimizer, scheduler)
    return [optimizer], [config]


def step_on_plateau(scheduler: Any, metrics: dict[str, float]) -> None:  # noqa: ANN401
    """Step a schedule that follows a metric, after a validation; leave others alone.

    Raises:
        InputError: If there is no such metric.
    """
    if not isinstance(scheduler, ReduceLROnPlateau):
        return
    monitor = _monitor(scheduler)
    if monitor not in metrics:
        raise InputError(
            f"model.lr_scheduler: there is no metric {monitor!r}; those of the held-out rows are "
            + ", ".join(sorted(metrics))
        )
    scheduler.step(metrics[monitor])


def _monitor(scheduler: ReduceLROnPlateau) -> str:
    monitor = getattr(scheduler, "monitor", None)
    if monitor is None:
        raise InputError(
            "model.lr_scheduler: torch's ReduceLROnPlateau names no metric; use "
            "lightning.pytorch.cli.ReduceLROnPlateau with monitor: val_loss"
        )
    return str(monitor)
