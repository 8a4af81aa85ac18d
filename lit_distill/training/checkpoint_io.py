"""Checkpoint files: written atomically, read without unpickling code, checked by the model."""

from __future__ import annotations

import os
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

STATE_PREFIX = "denoisers."
"""Where a checkpoint's state dict holds the denoisers: ``denoisers.transformer.<parameter>``."""


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a Lightning checkpoint without unpickling code.

    Args:
        path: The file.
        mmap: Read tensors when they are used, without verifying their checksums.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of `DirectDistill`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if not mmap:
            with zipfile.ZipFile(path) as archive:  # torch does not verify checksums
                if damaged := archive.testzip():
                    raise ValueError(f"its part {damaged} is damaged")
        checkpoint: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mmap
        )
    except Exception as error:  # torch raises several kinds for a truncated or foreign file
        raise ValueError(f"checkpoint {path} is truncated or not a checkpoint: {error}") from error
    hyper = checkpoint.get("hyper_parameters", {}) if isinstance(checkpoint, dict) else {}
    if "pretrained_model_name_or_path" not in hyper:
        raise ValueError(
            f"checkpoint {path} was not written by lit_distill: its hyper_parameters name no "
            "pretrained_model_name_or_path"
        )
    return checkpoint


def check_state(state: Any, expected: Any, where: str) -> None:  # noqa: ANN401
    """Check that a checkpoint's state dict has exactly the trainable parameters.

    Raises:
        ValueError: If it has not, naming examples of missing and unknown parameters.
    """
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    for name in sorted(set(expected) & set(state)):
        if state[name].shape != expected[name].shape:
            raise ValueError(
                f"{where} does not fit this model: {name} is {tuple(state[name].shape)} in it and "
                f"{tuple(expected[name].shape)} here. Use the LoRA settings it was trained with."
            )
    if missing or unknown:
        lines = [
            f"{where} does not fit this model: {len(missing)} trainable parameters are missing "
            f"and {len(unknown)} are unknown."
        ]
        lines += [f"  missing: {name}" for name in missing[:3]]
        lines += [f"  unknown: {name}" for name in unknown[:3]]
        lines.append("Use the pipeline, the LoRA settings or full training it was trained with.")
        raise ValueError("\n".join(lines))


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes checkpoint files atomically, and reads them without unpickling code.

    Lightning writes to the system's temporary folder and moves the file. If that is another disk,
    the move is a copy, and a process killed meanwhile leaves half a checkpoint under the final
    name. Lightning also holds the whole file in memory, which this does not.
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
        """Return the checkpoint on the CPU, as `read_checkpoint` does."""
        if "://" in str(path):
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path)
