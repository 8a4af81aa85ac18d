"""Training that can be stopped at any time and goes on where it was."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Generic, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

M = TypeVar("M", bound=nn.Module)
SAVE_EVERY = 60.0  # CPU seconds


def save_atomically(state: dict[str, Any], path: Path) -> None:
    """Writes a file that is complete or absent, wherever the process gets killed."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


class Stage(Generic[M]):
    """Trains one module for a budget of CPU time, with its checkpoints in one file.

    The learning rate is a function of the share of the budget that is spent: it rises over the
    first 3%, stays, and falls linearly to zero over the last 35%. A finished stage that gets a
    larger budget goes on at the higher rate.

    Args:
        path: The checkpoint.
        module: What to train.
        optimizers: Their learning rates are the peaks.
        minutes: The budget.
        seed: Seed of the stage's own random generator, whose state is saved.
        ema: Decay of the moving average of the weights. It is what the stage gives in the end.
    """

    def __init__(
        self,
        path: Path,
        module: M,
        optimizers: list[Optimizer],
        minutes: float,
        seed: int,
        ema: float = 0.99,
    ) -> None:
        self.path, self.module, self.optimizers, self.budget = (
            path,
            module,
            optimizers,
            minutes * 60,
        )
        self.generator = torch.Generator().manual_seed(seed)
        average = get_ema_multi_avg_fn(ema)  # type: ignore[no-untyped-call]
        self.average = AveragedModel(module, multi_avg_fn=average, use_buffers=True)
        self.peaks = [group["lr"] for o in optimizers for group in o.param_groups]
        self.step, self.spent = 0, 0.0
        self.curve: list[str] = []
        if path.exists():
            self._load()

    def _load(self) -> None:
        state = torch.load(self.path, weights_only=True)
        self.module.load_state_dict(state["module"])
        self.average.load_state_dict(state["average"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        self.generator.set_state(state["generator"])
        self.step, self.spent, self.curve = state["step"], state["spent"], state["curve"]
        print(f"{self.path.stem}: resumed at step {self.step}, {self.spent:.0f} s", flush=True)

    def save(self) -> None:
        """Writes the checkpoint."""
        state = {
            "module": self.module.state_dict(),
            "average": self.average.state_dict(),
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "generator": self.generator.get_state(),
            "step": self.step,
            "spent": self.spent,
            "curve": self.curve,
        }
        save_atomically(state, self.path)

    def run(
        self,
        loss_of: Callable[[int, torch.Generator], Tensor],
        report: Callable[[M], str] = lambda _: "",
        report_every: float = 60.0,
    ) -> None:
        """Trains until the budget is spent, and leaves the averaged weights in the module.

        Args:
            loss_of: Gives a batch's loss for the step's number and the stage's generator.
            report: Describes the averaged module in the printed curve; takes no part of the budget.
            report_every: CPU seconds between two reports.
        """
        self.module.train()
        mark, losses = self.spent, []
        while self.spent < self.budget:
            begun = time.process_time()
            losses.append(self._update(loss_of))
            before, self.spent = self.spent, self.spent + time.process_time() - begun
            due = self.spent - mark >= report_every or self.spent >= self.budget
            if due:
                mark, mean = self.spent, sum(losses) / len(losses)
                losses = []
                line = f"{self.step} steps, {self.spent:.0f} s, loss {mean:.4f} "
                self.curve.append(line + report(cast(M, self.average.module.eval())))
                print(f"{self.path.stem}: {self.curve[-1]}", flush=True)
            if due or before // SAVE_EVERY != self.spent // SAVE_EVERY:
                self.save()
        self.module.load_state_dict(self.average.module.state_dict())
        self.module.eval()

    def _update(self, loss_of: Callable[[int, torch.Generator], Tensor]) -> float:
        progress = self.spent / self.budget
        rate = min(1.0, (progress + 1e-4) / 0.03, max(0.0, (1 - progress) / 0.35))
        groups = [group for o in self.optimizers for group in o.param_groups]
        for group, peak in zip(groups, self.peaks, strict=True):
            group["lr"] = peak * rate
        loss = loss_of(self.step, self.generator)
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        self.average.update_parameters(self.module)
        self.step += 1
        return loss.item()
