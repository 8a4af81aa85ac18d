"""A LightningModule whose checkpoints hold what trains, and which resumes exactly."""

from __future__ import annotations

from collections.abc import Iterator
from multiprocessing.context import get_spawning_popen
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from torch import nn
from typing_extensions import Self

from lit_distill.adapters.inject import is_companion
from lit_distill.compute.sharding import assign_tensor, gather
from lit_distill.errors import InputError
from lit_distill.training.checkpoint_io import AtomicCheckpointIO, check_state, read_checkpoint
from lit_distill.training.offloaded_module import OffloadedModule
from lit_distill.training.resume import (
    ResumeState,
    is_fitting,
    restore_order,
    warn_of_changed_settings,
)
from lit_distill.training.same_inputs import dataset_digests, warn_of_changed_data
from lit_distill.training.saved_classes import constructor_arguments, named_class
from lit_distill.training.signals import StopOnSignal
from lit_distill.version import __version__

OBJECTIVE_PREFIX = "objective."
"""Names of the objective's own parameters begin with it."""

SPAWNED = (
    "trainer.strategy: processes that are spawned or forked (ddp_spawn, ddp_fork, ddp_notebook) "
    "would not return what they have trained; use ddp, with a script or the command"
)


def _is_beside(name: str) -> bool:
    return name.startswith(OBJECTIVE_PREFIX) or is_companion(name)


class ResumableModule(OffloadedModule):
    """Writes and reads checkpoints; knows nothing about what is trained.

    Attributes:
        resume: What an exact resume needs beside what Lightning saves.
        state_loaded: Whether a checkpoint has been loaded, so that the weights are not the initial
            ones.
    """

    def __init__(self) -> None:
        super().__init__()
        self.resume = ResumeState()
        self.state_loaded = False

    def configure_callbacks(self) -> list[pl.Callback]:
        """Return the callback that stops training on a signal."""
        self._signals = StopOnSignal(self.resume)
        return [self._signals]

    def __getstate__(self) -> Any:  # noqa: ANN401
        """Refuse to be sent to a spawned process; copies are made as usual."""
        if get_spawning_popen() is not None:
            raise InputError(SPAWNED)
        return super().__getstate__()

    def setup(self, stage: str) -> None:
        """Have checkpoints written whole and read verified.

        Raises:
            InputError: If the strategy's processes would not return the weights.
        """
        if isinstance(self.trainer.strategy.launcher, _MultiProcessingLauncher):
            raise InputError(SPAWNED)
        self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.resume.reset()

    def on_fit_start(self) -> None:
        """Choose the seed of the randomness in training, unless a checkpoint has one."""
        self.resume.choose_seed(self.trainer)
        self.resume.dataset_digest = dataset_digests(self.trainer)

    def on_train_start(self) -> None:
        """Keep this run's settings where a checkpoint has others; warn if it has other data."""
        self.resume.keep_settings()
        restore_order(self.trainer)
        resumed = self.resume.resumed
        warn_of_changed_data(resumed.get("dataset_digest", {}), self.resume.dataset_digest)
        metrics = resumed.get("facts", {}).get("metrics", {})
        # What EarlyStopping monitors, in case the epoch ends before the next validation.
        self.trainer.callback_metrics.update({n: torch.tensor(v) for n, v in metrics.items()})

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:  # noqa: ANN401
        """Record that a step is complete, and stop if a signal has been received."""
        if not self.trainer.fit_loop._should_accumulate():
            self.resume.finish_step(self.trainer)
            self._signals.stop_if_received(self.trainer)

    @classmethod
    def load_from_checkpoint(  # type: ignore[override]
        cls,
        checkpoint_path: str | Path,
        map_location: Any = None,  # noqa: ANN401
        **kwargs: Any,  # noqa: ANN401
    ) -> Self:
        """Return the module of a checkpoint, which is read as `read_checkpoint` does.

        Args:
            checkpoint_path: The file, or its URL.
            map_location: Device to move the module to; default: the CPU.
            **kwargs: Arguments of the constructor that differ from the checkpoint's.

        Raises:
            FileNotFoundError: If there is no such file.
            InputError: If it is damaged or not a checkpoint of this package, or if it does not fit.
        """
        content = read_checkpoint(checkpoint_path)
        kind = named_class(content["hyper_parameters"], cls, f"checkpoint {checkpoint_path}")
        module = kind(**constructor_arguments(kind, content["hyper_parameters"], kwargs))
        module.configure_model()
        module.on_load_checkpoint(content)
        module.load_state_dict(content["state_dict"])
        return module if map_location is None else module.to(map_location)

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what trains of the student, by its name in a checkpoint."""
        return {name: p for name, p in self._trainable() if not _is_beside(name)}

    def companions(self) -> dict[str, nn.Parameter]:
        """Return what the objective trains beside the student, by its name in a checkpoint."""
        return {name: p for name, p in self._trainable() if _is_beside(name)}

    def _trainable(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, p) for name, p in self.named_parameters() if p.requires_grad)

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override] # noqa: ANN401
        """Return the trainable tensors only."""
        full = super().state_dict(*args, **kwargs)
        return {name: full[name] for name in self.trained()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load trainable tensors.

        Raises:
            InputError: If they are not exactly this module's, naming what differs.
        """
        if strict:
            check_state(state_dict, self.trained(), "the checkpoint")
        self.state_loaded = True
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what a resumed run needs beside what Lightning saves."""
        self.resume.rewind(checkpoint)
        if companions := self.companions():
            checkpoint["objective"] = gather(companions, self.trainer.is_global_zero)
        checkpoint["lit_distill"] = {"version": __version__, **self.resume.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over a checkpoint's records, and warn of settings that differ from it.

        Raises:
            InputError: If training can't resume from the checkpoint.
        """
        self.state_loaded = True
        if is_fitting(self._trainer):
            self.resume.load(checkpoint)
            saved, companions = checkpoint.get("objective", {}), self.companions()
            check_state(saved, companions, "what the checkpoint's objective trains")
            for name, parameter in companions.items():
                assign_tensor(parameter, saved[name])
        warn_of_changed_settings(self.hparams, checkpoint["hyper_parameters"])
