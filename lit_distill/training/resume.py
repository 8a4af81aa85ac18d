"""A run goes on exactly where it stopped: its settings compared, its batches counted, signals."""

from __future__ import annotations

import inspect
import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import numpy as np
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer


class ResumeState:
    """What a run must know of itself to go on exactly, beside what Lightning saves.

    Attributes:
        seed: Seed of what is random in training itself (dropout), the same on every process.
        batches: Batches this process has trained on.
        resumed: The notes of the checkpoint that the run goes on from.
    """

    def __init__(self) -> None:
        self.seed: int | None = None
        self.batches = 0
        self.resumed: dict[str, Any] = {}
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None
        self._settings: list[dict[str, Any]] = []
        self._schedule: dict[str, Any] = {}

    def begin(self) -> None:
        """Forget what an earlier call of ``trainer.fit`` has resumed and configured."""
        self.resumed, self.optimizer, self.scheduler = {}, None, None

    def seed_batch(self, rank: int) -> None:
        """Make what is random in the next batch a function of seed, batch and process.

        There is no generator's state to save then.
        """
        words = np.random.SeedSequence([self.seed or 0, self.batches, rank])
        torch.manual_seed(int(words.generate_state(1)[0]))
        self.batches += 1

    def notes(self) -> dict[str, Any]:
        """Return what a checkpoint holds of this."""
        kinds = {"optimizer": _path(self.optimizer), "lr_scheduler": _path(self.scheduler)}
        return {"seed": self.seed, "batches": self.batches, **kinds}

    def resume(self, notes: dict[str, Any]) -> None:
        """Take up a checkpoint's notes.

        Raises:
            ValueError: If this run has another class of optimizer or schedule.
        """
        self.seed, self.batches, self.resumed = notes["seed"], notes["batches"], notes
        if self.optimizer is not None:  # sharded: made before the checkpoint is read
            self._refuse_others()

    def configure(self, optimizer: Optimizer, scheduler: Any = None) -> None:  # noqa: ANN401
        """Note optimizer and schedule as they are configured, before a checkpoint overwrites them.

        Raises:
            ValueError: If the checkpoint's are of another class.
        """
        if optimizer is not self.optimizer:  # a schedule has changed its lr when it comes along
            groups = optimizer.param_groups
            self._settings = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        self.optimizer, self.scheduler, self._schedule = optimizer, scheduler, {}
        if scheduler is not None:
            arguments = set(inspect.signature(type(scheduler)).parameters) - {"last_epoch"}
            state = scheduler.state_dict()
            self._schedule = {k: v for k, v in state.items() if k in arguments}
            self._refuse_others()

    def _refuse_others(self) -> None:
        for kind, thing in (("optimizer", self.optimizer), ("lr_scheduler", self.scheduler)):
            saved, found = self.resumed.get(kind, _path(thing)), _path(thing)
            if saved != found:
                raise ValueError(
                    f"model.{kind} is {found}, but the checkpoint's is {saved}, whose state it "
                    f"can't take: go on with {saved}, or begin a new run"
                )

    def keep_settings(self) -> list[tuple[str, Any, Any]]:
        """Give optimizer and schedule back the settings that loading a checkpoint has overwritten.

        Returns:
            (name, configured value, the checkpoint's value) of each that differed.

        Raises:
            ValueError: If the checkpoint's are of another class.
        """
        self._refuse_others()
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
        return list(changed.values())

    def _set_lr(self, index: int, group: dict[str, Any], base: float) -> None:
        before = group.get("initial_lr", group["lr"])
        group["lr"] = group["lr"] * base / before if before else base
        if "initial_lr" in group:
            group["initial_lr"] = base
        if hasattr(self.scheduler, "base_lrs"):
            self.scheduler.base_lrs[index] = base


def _path(thing: Any) -> str | None:  # noqa: ANN401
    """Return the import path of an object's class; None for None."""
    return None if thing is None else f"{type(thing).__module__}.{type(thing).__qualname__}"


class StopOnSignal(Callback):
    """Ends training after the running optimizer step when SIGTERM or SIGUSR1 comes.

    A ``ModelCheckpoint(save_on_exception=True)`` then saves. One process having the signal is
    enough: all agree, after an optimizer step, to stop. Lightning's own handler is replaced because
    it talks to the other processes from within the handler, in the middle of whatever they are
    exchanging, and may stop between the batches of an accumulated step. Where SLURM requeues the
    job, its signal stays Lightning's.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Take the signals; Lightning puts back the earlier handlers when the run ends."""
        self.received = None
        if threading.current_thread() is not threading.main_thread():
            return
        signal.signal(signal.SIGTERM, self._note)
        environment = trainer._accelerator_connector.cluster_environment
        if not (isinstance(environment, SLURMEnvironment) and environment.auto_requeue):
            signal.signal(signal.SIGUSR1, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = signal.Signals(number)

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
    ) -> None:
        """Stop if any process was told to, once its accumulated gradients are used."""
        if trainer.fit_loop._should_accumulate():
            return
        stop = self.received is not None
        if trainer.world_size > 1:
            stop = trainer.strategy.reduce_boolean_decision(stop, all=False)
        if stop:
            name = self.received.name if self.received else "a signal to another process"
            raise SIGTERMException(f"stopped by {name} after step {trainer.global_step}")
