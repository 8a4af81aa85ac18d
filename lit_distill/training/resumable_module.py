"""A LightningModule whose checkpoints hold what trains, and which resumes exactly."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
from torch import nn

import lit_distill
from lit_distill.training.checkpoint_io import AtomicCheckpointIO, check_state
from lit_distill.training.resume import (
    ResumeState,
    StopOnSignal,
    is_fitting,
    warn_of_changed_settings,
)


class ResumableModule(pl.LightningModule):
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
        return [StopOnSignal()]

    def setup(self, stage: str) -> None:
        """Have checkpoints written atomically and read safely."""
        self.trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.resume.reset()

    def on_fit_start(self) -> None:
        """Choose the seed of the randomness in training, unless a checkpoint has one."""
        self.resume.choose_seed(self.trainer)

    def on_train_start(self) -> None:
        """Keep this run's settings of optimizer and schedule where a checkpoint has others."""
        self.resume.keep_settings()

    def trained(self) -> dict[str, nn.Parameter]:
        """Return what trains, by its name in a checkpoint."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override] # noqa: ANN401
        """Return the trainable tensors only."""
        full = super().state_dict(*args, **kwargs)
        return {name: full[name] for name in self.trained()}

    def load_state_dict(self, state_dict: Any, strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load trainable tensors.

        Raises:
            ValueError: If they are not exactly this module's, naming what differs.
        """
        if strict:
            check_state(state_dict, self.trained(), "the checkpoint")
        self.state_loaded = True
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Record what a resumed run needs beside what Lightning saves."""
        checkpoint["lit_distill"] = {"version": lit_distill.__version__, **self.resume.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take over a checkpoint's records, and warn of settings that differ from it.

        Raises:
            ValueError: If training can't resume from the checkpoint.
        """
        self.state_loaded = True
        if is_fitting(self._trainer):
            self.resume.load(checkpoint)
        warn_of_changed_settings(self.hparams, checkpoint["hyper_parameters"])
