"""Stopping on a signal: after the current optimizer step, with a checkpoint of finished steps."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.callbacks import Callback

from lit_distill.training.checkpoint_io import AtomicCheckpointIO
from lit_distill.training.resume import ResumeState, is_fitting


class StoppedBySignal(SystemExit):
    """A signal has stopped the program, cleanly; the exit status is 128 + the signal's number.

    Args:
        number: The signal.
        when: When it took effect, such as "after step 3".
        step: Number of optimizer steps that are complete; None: nothing was being trained.
        checkpoints: Knows the last checkpoint.
    """

    def __init__(
        self,
        number: int,
        when: str = "",
        step: int | None = None,
        checkpoints: AtomicCheckpointIO | None = None,
    ) -> None:
        self.signal = signal.Signals(number)
        super().__init__(f"stopped by {self.signal.name} {when}".strip())
        self.code = 128 + number
        self.step = step
        self._checkpoints = checkpoints

    @property
    def last_checkpoint(self) -> tuple[str, int] | None:
        """The last checkpoint that was saved, and its step."""
        return getattr(self._checkpoints, "last", None)


class StopOnSignal(Callback):
    """Ends a run on SIGINT (Ctrl-C), SIGTERM or SIGUSR1; a second Ctrl-C ends it at once.

    Training ends after the current optimizer step, validation after the current batch, everything
    before at once. A ``ModelCheckpoint(save_on_exception=True)`` then saves what is finished. It is
    enough if one process receives the signal: after every optimizer step and every validation batch
    all processes agree whether to stop. Lightning's own handlers are replaced for three reasons.
    That of SIGTERM communicates with the other processes, perhaps while another exchange is in
    progress, and may stop between the batches of an accumulated step. SIGINT raises an exception
    wherever the program is, even in the middle of the optimizer's arithmetic. Where SLURM requeues
    the job, its signal makes Lightning save and requeue, and this happens after a step, too.

    Args:
        resume: Knows which step is complete.
    """

    def __init__(self, resume: ResumeState) -> None:
        self.resume = resume
        self.received: int | None = None
        self._trainer: pl.Trainer | None = None
        self._deferred = False
        self._requeue: int | None = None
        self._process = 0
        self._replaced: dict[int, Any] = {}

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        """Stop at once on a signal, until training starts."""
        self.received, self._deferred, self._trainer = None, False, trainer
        self._process = os.getpid()
        self._install(trainer)

    def _install(self, trainer: pl.Trainer) -> None:
        """Install the handlers; when the run ends, Lightning restores what was there before."""
        if threading.current_thread() is not threading.main_thread():
            return
        environment = trainer._accelerator_connector.cluster_environment
        self._requeue = None
        if isinstance(environment, SLURMEnvironment) and environment.auto_requeue:
            self._requeue = environment.requeue_signal
        signals = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1}
        for number in signals | ({self._requeue} if self._requeue else set()):
            before = signal.signal(number, self._receive)
            if before != self._receive:
                # Not those that Lightning has installed in the meantime.
                self._replaced.setdefault(number, before)
        trainer._signal_connector._original_handlers.update(self._replaced)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that reads data: Ctrl-C reaches it, too
            if number != signal.SIGINT:
                signal.signal(number, signal.SIG_DFL)
                os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self.received is not None:
            raise KeyboardInterrupt
        self.received = number
        if not self._deferred and number != self._requeue:
            raise self._stopped(number)

    def on_sanity_check_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after a batch from here on."""
        self._deferred = True
        self._install(trainer)

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop after an optimizer step from here on."""
        self._deferred = True
        self._install(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Replace Lightning's handlers."""
        self._install(trainer)

    on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:  # noqa: ANN401
        """Stop a validation during training if any process has received a signal."""
        if is_fitting(trainer):
            self.stop_if_received(trainer)

    def stop_if_received(self, trainer: pl.Trainer) -> None:
        """Stop if any process has received a signal; with SLURM's, have the job requeued.

        Raises:
            StoppedBySignal: On all processes.
        """
        number = self.received or 0
        if trainer.world_size > 1:
            count = torch.tensor(number, device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(count, reduce_op="max"))
        if number == 0:
            return
        if number == self._requeue:
            if trainer.training:
                self.received = None
                trainer._signal_connector._slurm_sigusr_handler_fn(number, None)  # type: ignore[arg-type]
            return
        raise self._stopped(number)

    def _stopped(self, number: int) -> StoppedBySignal:
        assert self._trainer is not None
        if not is_fitting(self._trainer):
            return StoppedBySignal(number)
        step = self._trainer.global_step
        when = f"after step {step}" if self._deferred and step else "before the first step"
        io: Any = self._trainer.strategy.checkpoint_io
        stopped = StoppedBySignal(number, when, step, io)
        environment = self._trainer._accelerator_connector.cluster_environment
        if isinstance(environment, LightningEnvironment) and self._trainer.local_rank:
            # Lightning kills process 0, which may still write, if one that it started fails.
            stopped.code = 0
        return stopped

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Let no ModelCheckpoint save a step that is not complete."""
        if is_fitting(trainer):
            together = isinstance(exception, StoppedBySignal) or trainer.world_size == 1
            at_once = isinstance(exception, KeyboardInterrupt)
            self.resume.interrupt(trainer, may_save=together and not at_once)
