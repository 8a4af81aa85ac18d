"""Resuming exactly where a run stopped: batches counted, steps completed, settings compared."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any, NamedTuple

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities import rank_zero_warn
from torch.optim import Optimizer

from lit_distill.errors import InputError


class FinishedStep(NamedTuple):
    """Where a run is after an optimizer step: the epoch, Lightning's loops, batches trained on."""

    epoch: int
    loops: dict[str, Any]
    batches: int


class ResumeState:
    """What an exact resume needs beside what Lightning saves.

    Attributes:
        seed: Seed of the randomness in training itself (dropout), the same on every process.
        batches: Number of batches that this process has trained on.
        resumed: The state in the checkpoint that this run resumes from.
        dataset_digest: Digests of this run's rows.
        updating: Whether an optimizer step has begun to change weights and is not complete.
        finished: The last optimizer step that is complete.
        interrupted: Whether an exception has ended the run, so that only `finished` is saved.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.batches = 0
        self.resumed: dict[str, Any] = {}
        self.dataset_digest: dict[str, Any] = {}
        self.updating = False
        self.finished: FinishedStep | None = None
        self.interrupted = False
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None
        self._silenced: list[ModelCheckpoint] = []
        self._settings: list[dict[str, Any]] = []
        self._schedule: dict[str, Any] = {}

    def reset(self) -> None:
        """Forget what an earlier call of ``trainer.fit`` has resumed and configured."""
        self.resumed, self.optimizer, self.scheduler = {}, None, None
        self.updating, self.finished, self.interrupted = False, None, False
        for callback in self._silenced:
            callback.save_on_exception = True
        self._silenced = []

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

    def finish_step(self, trainer: pl.Trainer) -> None:
        """Record that an optimizer step is complete."""
        self.updating = False
        loops = trainer.fit_loop.state_dict()
        self.finished = FinishedStep(trainer.current_epoch, loops, self.batches)

    def interrupt(self, trainer: pl.Trainer, *, may_save: bool) -> None:
        """Have the last complete step saved when an exception ends the run, or nothing.

        What follows it, an accumulated gradient or a batch that was read, is not saved: the resumed
        run does it again. Once the optimizer has begun to change the weights, that step can't be
        saved any more.

        Args:
            trainer: The trainer.
            may_save: Whether all processes are here, and there is time.
        """
        self.interrupted = True
        if may_save and self.finished is not None and not self.updating:
            return
        step = trainer.global_step
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.save_on_exception:
                callback.save_on_exception = False
                self._silenced.append(callback)
        if self._silenced and step and not trainer.sanity_checking:
            last = getattr(trainer.strategy.checkpoint_io, "last", None)
            where = f"{last[0]}, of step {last[1]}" if last else "none"
            rank_zero_warn(
                "the run ended in the middle of a step, which is not saved; the last checkpoint: "
                + where
            )

    def state(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this."""
        kinds = {
            "optimizer": _class_path(self.optimizer),
            "lr_scheduler": _class_path(self.scheduler),
        }
        batches = self.finished.batches if self.interrupted and self.finished else self.batches
        progress = {"seed": self.seed, "batches": batches, "dataset_digest": self.dataset_digest}
        return progress | kinds

    def rewind(self, checkpoint: dict[str, Any]) -> None:
        """After an exception, put the last complete step into a checkpoint's loops."""
        if self.interrupted and self.finished is not None:
            checkpoint["epoch"] = self.finished.epoch
            checkpoint["loops"]["fit_loop"] = self.finished.loops

    def load(self, checkpoint: dict[str, Any]) -> None:
        """Take over the state of a checkpoint.

        Raises:
            InputError: If it holds weights only, or this run's optimizer or schedule is of another
                class.
        """
        if "optimizer_states" not in checkpoint:
            raise InputError(
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
            InputError: If the checkpoint's are of another class.
        """
        if optimizer is not self.optimizer:  # a schedule changes the learning rate when it is made
            groups = optimizer.param_groups
            self._settings = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        self.optimizer, self.scheduler, self._schedule = optimizer, scheduler, {}
        if scheduler is not None:
            for group in optimizer.param_groups:  # as most schedules do; ReduceLROnPlateau does not
                group.setdefault("initial_lr", group["lr"])
            arguments = set(inspect.signature(type(scheduler)).parameters) - {"last_epoch"}
            state = scheduler.state_dict()
            self._schedule = {k: v for k, v in state.items() if k in arguments}
            self._check_classes()

    def _check_classes(self) -> None:
        for name, value in (("optimizer", self.optimizer), ("lr_scheduler", self.scheduler)):
            configured = _class_path(value)
            saved = self.resumed.get(name, configured)
            if saved != configured:
                raise InputError(
                    f"model.{name} is {configured}, but the checkpoint's is {saved}, whose state "
                    f"it can't load: resume with {saved}, or start a new run"
                )

    def keep_settings(self) -> None:
        """Restore settings of optimizer and schedule that a checkpoint has overwritten, and warn.

        Raises:
            InputError: If the checkpoint's are of another class.
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


def restore_order(trainer: pl.Trainer) -> None:
    """Resume the order of rows where Lightning does not: after a whole epoch, without max_steps.

    It would begin with the order of the first epoch again.
    """
    loop = trainer.fit_loop
    if loop._combined_loader is not None and loop._combined_loader_states_to_load:
        loop._combined_loader._load_state_dicts(loop._combined_loader_states_to_load)
        loop._combined_loader_states_to_load = []


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
