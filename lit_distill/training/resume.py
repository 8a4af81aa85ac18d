"""Resuming exactly where a run stopped: batches counted, settings compared, signals handled."""

from __future__ import annotations

import inspect
import signal
import threading
from collections.abc import Mapping
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer


class ResumeState:
    """What an exact resume needs beside what Lightning saves.

    Attributes:
        seed: Seed of the randomness in training itself (dropout), the same on every process.
        batches: Number of batches that this process has trained on.
        resumed: The state in the checkpoint that this run resumes from.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.batches = 0
        self.resumed: dict[str, Any] = {}
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None
        self._settings: list[dict[str, Any]] = []
        self._schedule: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget what an earlier call of ``trainer.fit`` has resumed and configured."""
        self.resumed, self.optimizer, self.scheduler = {}, None, None

    def choose_seed(self, trainer: pl.Trainer) -> None:
        """Take process 0's seed on every process, unless a checkpoint has one."""
        if self.seed is None:
            self.seed = trainer.strategy.broadcast(torch.initial_seed() % 2**63)

    def seed_batch(self, rank: int) -> None:
        """Seed the next batch by the run's seed, the number of the batch, and the process.

        So no generator's state has to be saved.
        """
        words = np.random.SeedSequence([self.seed or 0, self.batches, rank])
        torch.manual_seed(int(words.generate_state(1)[0]))
        self.batches += 1

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this."""
        kinds = {
            "optimizer": _class_path(self.optimizer),
            "lr_scheduler": _class_path(self.scheduler),
        }
        return {"seed": self.seed, "batches": self.batches, **kinds}

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take over the state of a checkpoint.

        Raises:
            ValueError: If it holds weights only, or this run's optimizer or schedule is of another
                class.
        """
        if "optimizer_states" not in checkpoint:
            raise ValueError(
                "the checkpoint holds weights only (ModelCheckpoint.save_weights_only): "
                "training can't resume from it"
            )
        state = checkpoint["lit_distill"]
        self.seed, self.batches, self.resumed = state["seed"], state["batches"], state
        if self.optimizer is not None:  # sharded: made before the checkpoint is read
            self._check_classes()

    def configure(self, optimizer: Optimizer, scheduler: Any = None) -> None:  # noqa: ANN401
        """Record the settings of optimizer and schedule before a checkpoint overwrites them.

        Raises:
            ValueError: If the checkpoint's are of another class.
        """
        if optimizer is not self.optimizer:  # a schedule changes the learning rate when it is made
            groups = optimizer.param_groups
            self._settings = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        self.optimizer, self.scheduler, self._schedule = optimizer, scheduler, {}
        if scheduler is not None:
            arguments = set(inspect.signature(type(scheduler)).parameters) - {"last_epoch"}
            state = scheduler.state_dict()
            self._schedule = {k: v for k, v in state.items() if k in arguments}
            self._check_classes()

    def _check_classes(self) -> None:
        for name, value in (("optimizer", self.optimizer), ("lr_scheduler", self.scheduler)):
            configured = _class_path(value)
            saved = self.resumed.get(name, configured)
            if saved != configured:
                raise ValueError(
                    f"model.{name} is {configured}, but the checkpoint's is {saved}, whose state "
                    f"it can't load: resume with {saved}, or start a new run"
                )

    def keep_settings(self) -> None:
        """Restore settings of optimizer and schedule that a checkpoint has overwritten, and warn.

        Raises:
            ValueError: If the checkpoint's are of another class.
        """
        self._check_classes()
        changed: dict[str, tuple[str, Any, Any]] = {}
        assert self.optimizer is not None
        groups = zip(self.optimizer.param_groups, self._settings, strict=True)
        for index, (group, wanted) in enumerate(groups):
            base = group.get("initial_lr", group["lr"])
            if base != wanted["lr"]:
                changed["lr"] = ("lr", wanted["lr"], base)
                self._set_lr(index, group, wanted["lr"])
            for name, value in wanted.items():
                if name not in ("lr", "initial_lr") and group.get(name) != value:
                    changed[name] = (name, value, group.get(name))
                    group[name] = value
        if self.scheduler is not None:
            state = self.scheduler.state_dict()
            for name, value in self._schedule.items():
                if state.get(name) != value:
                    changed[name] = (name, value, state.get(name))
            self.scheduler.__dict__.update(self._schedule)
        for name, configured, saved in changed.values():
            rank_zero_warn(
                f"the optimizer's or schedule's {name}={configured!r} differs from the "
                f"checkpoint's {saved!r}; continuing with {configured!r}"
            )

    def _set_lr(self, index: int, group: dict[str, Any], base: float) -> None:
        before = group.get("initial_lr", group["lr"])
        group["lr"] = group["lr"] * base / before if before else base
        if "initial_lr" in group:
            group["initial_lr"] = base
        if hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs[index] = base


def _class_path(value: Any) -> str | None:  # noqa: ANN401
    """Return the import path of an object's class; None for None."""
    return None if value is None else f"{type(value).__module__}.{type(value).__qualname__}"


def is_fitting(trainer: pl.Trainer | None) -> bool:
    """Return whether the trainer trains, rather than validates, tests or predicts."""
    return trainer is not None and trainer.state.fn == "fit"


def warn_of_changed_settings(configured: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Warn of every hyperparameter that differs from the checkpoint's; the configured one is used.

    Args:
        configured: Hyperparameters of this run.
        saved: Hyperparameters in the checkpoint.
    """
    for name, value in configured.items():
        # Metrics may be objects on one side, and do not affect the student.
        if name in saved and saved[name] != value and name != "metrics":
            rank_zero_warn(
                f"model.{name}={value!r} differs from the checkpoint's {saved[name]!r}; "
                f"continuing with {value!r}"
            )


class StopOnSignal(Callback):
    """Ends training after the current optimizer step on SIGTERM or SIGUSR1.

    A ``ModelCheckpoint(save_on_exception=True)`` then saves. It is enough if one process receives
    the signal: all processes agree, after an optimizer step, to stop. Lightning's own handler is
    replaced for two reasons. It communicates with the other processes from within the handler,
    which may interrupt another exchange. And it may stop between the batches of an accumulated
    step. Where SLURM requeues the job, Lightning keeps SLURM's signal.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Install the handlers; Lightning restores the earlier ones when training ends."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._receive)
        environment = trainer._accelerator_connector.cluster_environment
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            signal.signal(signal.SIGUSR1, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Stop if any process has received a signal, once accumulated gradients are used."""
        if trainer.fit_loop._should_accumulate():
            return
        stop = self.received is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            name = self.received.name if self.received else "a signal to another process"
            raise SIGTERMException(f"stopped by {name} after step {trainer.global_step}")
