"""What the command prints when a signal has stopped it."""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from lit_distill.training.signals import StoppedBySignal


def stop_report(stop: StoppedBySignal, arguments: Sequence[str]) -> str:
    """Return what was stopped, where the checkpoint is, and the command that resumes.

    Args:
        stop: The exception.
        arguments: Arguments of the command.
    """
    lines = [str(stop)]
    if stop.step is None:
        return lines[0]
    if stop.last_checkpoint is None:
        lines.append("No checkpoint was saved.")
        return "\n".join(lines)
    path, step = stop.last_checkpoint
    lines.append(f"The last checkpoint, of step {step}: {path}")
    if step < stop.step:
        lines.append(
            "Later steps are lost: only a ModelCheckpoint with save_on_exception: true also saves "
            "when a run is stopped."
        )
    command = [*_without_checkpoint(arguments), "--ckpt_path", path]
    lines.append(f"Resume with: lit-distill {shlex.join(command)}")
    return "\n".join(lines)


def _without_checkpoint(arguments: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for argument in arguments:
        if skip or argument.startswith("--ckpt_path="):
            skip = False
        elif argument == "--ckpt_path":
            skip = True
        else:
            kept.append(argument)
    return kept
