"""A run goes on exactly where it stopped: whole checkpoint files, settings compared, signals."""

from __future__ import annotations

import inspect
import os
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.plugins.io import TorchCheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from lit_distill.adapters import read_checkpoint


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint files that are complete or absent, and are read without unpickling code.

    Lightning writes to the system's temporary folder and moves the file: onto another disk that is
    a copy, and a process killed meanwhile leaves half a checkpoint under the final name. It also
    holds the file in memory as a whole, which this does not.
    """

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: Any,  # noqa: ANN401
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        """Write beside `path`, then rename; remote storage is left to Lightning."""
        if "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f".{path.name}.part")
        with part.open("wb") as file:
            torch.save(checkpoint, file)
            file.flush()
            os.fsync(file.fileno())
        part.replace(path)

    def load_checkpoint(
        self,
        path: Any,  # noqa: ANN401
        map_location: Any = None,  # noqa: ANN401
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return the checkpoint on the CPU, or raise an error that says what is wrong with it."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path)


# Settings


def plain_settings(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the settings (lr, betas, ...) of each parameter group."""
    return [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]


def schedule_settings(scheduler: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return what a schedule was constructed with; how far it is, is none of it."""
    arguments = set(inspect.signature(type(scheduler)).parameters) - {"last_epoch"}
    return {k: v for k, v in scheduler.state_dict().items() if k in arguments}


def keep_optimizer_settings(
    optimizer: Optimizer,
    scheduler: Any,  # noqa: ANN401
    configured: list[dict[str, Any]],
) -> list[tuple[str, Any, Any]]:
    """Give an optimizer back the settings that loading a checkpoint has overwritten.

    Args:
        optimizer: The optimizer, its state loaded.
        scheduler: Its learning rate schedule, if any.
        configured: Its `plain_settings` when it was made.

    Returns:
        (name, configured value, the checkpoint's value) of each that differed.
    """
    changed = []
    for index, (group, wanted) in enumerate(zip(optimizer.param_groups, configured, strict=True)):
        if (saved := group.get("initial_lr", group["lr"])) != wanted["lr"]:
            changed.append(("lr", wanted["lr"], saved))
            group["lr"] *= wanted["lr"] / saved
            if "initial_lr" in group:
                group["initial_lr"] = wanted["lr"]
            if scheduler is not None:
                scheduler.base_lrs[index] = wanted["lr"]
        for name, value in wanted.items():
            if name not in ("lr", "initial_lr") and group.get(name) != value:
                changed.append((name, value, group.get(name)))
                group[name] = value
    return list({name: entry for entry in changed for name in entry[:1]}.values())


def keep_schedule_settings(
    scheduler: Any,  # noqa: ANN401
    configured: dict[str, Any],
) -> list[tuple[str, Any, Any]]:
    """Do for a schedule what `keep_optimizer_settings` does for an optimizer."""
    saved = scheduler.state_dict()
    changed = [(k, v, saved[k]) for k, v in configured.items() if saved.get(k) != v]
    scheduler.__dict__.update(configured)
    return changed


def class_path(thing: Any) -> str | None:  # noqa: ANN401
    """Return the import path of an object's class; None for None."""
    return None if thing is None else f"{type(thing).__module__}.{type(thing).__qualname__}"


# Signals


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
