"""The end of a command's output: the next command on the way to an exported student."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path

WIDTH = 78


def print_next(*arguments: str | Path) -> None:
    """Print the command to type next.

    Args:
        *arguments: Its arguments, without the program.
    """
    print(f"\nNext:\n{command_line([str(argument) for argument in arguments])}")


def settings_of(model: str | None, configs: Sequence[str]) -> list[str]:
    """Return the options that name a pipeline again, as its user has named it.

    Args:
        model: Hub id or folder of the pipeline.
        configs: Configuration files that were given.
    """
    files = [part for path in configs for part in ("--config", path)]
    return files or ["--model.pretrained_model_name_or_path", str(model)]


def print_fit(
    metadata_path: str | Path, model: str | None, configs: Sequence[str] = (), written: str = ""
) -> None:
    """Print the command that trains on a table.

    Args:
        metadata_path: The table.
        model: Hub id or folder of the pipeline, if it is known.
        configs: Configuration files that the user works with.
        written: What was written, printed first.
    """
    if written:
        print(written)
    settings = settings_of(model, configs)
    if configs:
        print_next("fit", *settings, "--data.metadata_path", metadata_path)
    elif model:
        settings += ["--model.lora", "{r: 32}"]
        data = ["--data.metadata_path", metadata_path, "--data.val_fraction", "0.1"]
        print_next("fit", *settings, *data, "--trainer.max_steps", "1000")
    else:
        print_next("init", "--metadata_path", metadata_path)


def command_line(arguments: Sequence[str]) -> str:
    """Return a command as a shell takes it, on several lines if it is long.

    Args:
        arguments: The arguments of ``lit-distill``.
    """
    lines, line = [], "  lit-distill"
    for part in _options(arguments):
        if len(line) + 1 + len(part) > WIDTH and line.strip():
            lines.append(f"{line} \\")
            line = f"    {part}"
        else:
            line += f" {part}"
    return "\n".join([*lines, line])


def _options(arguments: Sequence[str]) -> list[str]:
    """Return the quoted arguments, every value behind its option."""
    parts: list[str] = []
    for argument in arguments:
        if parts and parts[-1].startswith("--") and not argument.startswith("--"):
            parts[-1] += f" {shlex.quote(argument)}"
        else:
            parts.append(shlex.quote(argument))
    return parts
