"""Checkpoint files: written atomically, read without unpickling code, checked by the model."""

from __future__ import annotations

import os
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_distill.errors import InputError
from lit_distill.training.settings import Settings, wrong_types

STATE_PREFIX = "denoisers."
"""Where a checkpoint's state dict holds the denoisers: ``denoisers.transformer.<parameter>``."""


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a Lightning checkpoint without unpickling code.

    Args:
        path: The file.
        mmap: Read tensors when they are used, without verifying their checksums.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is not a checkpoint of `DirectDistill`, or is damaged.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    _verify_archive(path, checksums=not mmap)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged storages; an error follows
            checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:  # torch raises several kinds for a foreign file
        if "Weights only load failed" in str(error):
            names = re.findall(r"(?:GLOBAL|class) ([\w.]+)", str(error))
            what = f" ({names[0]})" if names else ""
            raise InputError(
                f"checkpoint {path} holds Python objects{what} that could run code when they are "
                "loaded; only tensors and plain values are read"
            ) from error
        raise InputError(f"checkpoint {path} can't be read: {error}") from error
    _check_content(checkpoint, path)
    return dict(checkpoint)


def _verify_archive(path: Path, checksums: bool) -> None:
    """Check that a file is a whole archive as torch writes it; torch itself reads past damage.

    Raises:
        InputError: If it is not; tells a truncated file from another kind of file.
    """
    size = path.stat().st_size
    if size == 0:
        raise InputError(
            f"checkpoint {path} is empty: the process was killed or the disk was full while it was "
            "written; use another checkpoint"
        )
    with path.open("rb") as stream:
        start = stream.read(4)
    if start != b"PK\x03\x04":
        raise InputError(f"checkpoint {path} is not a checkpoint: {size} bytes of another format")
    try:
        with zipfile.ZipFile(path) as archive:
            parts = archive.infolist()
            names = [part.filename for part in parts]
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise ValueError("its parts are compressed")
            if len(set(names)) < len(names) or sum(part.file_size for part in parts) > size:
                raise ValueError("its parts overlap")
            if checksums and (damaged := archive.testzip()):
                raise ValueError(f"its part {damaged} is damaged")
    except Exception as error:  # zipfile raises several kinds
        raise InputError(
            f"checkpoint {path} is truncated or damaged: {error}; use another checkpoint"
        ) from error
    if not any(name.endswith("data.pkl") for name in names):
        raise InputError(f"checkpoint {path} is a zip archive, but not a checkpoint")


def _check_content(checkpoint: Any, path: Path) -> None:  # noqa: ANN401
    """Check that a checkpoint has the parts of ours, each of its type.

    Raises:
        InputError: If it has not.
    """
    hyper = checkpoint.get("hyper_parameters") if isinstance(checkpoint, dict) else None
    if not isinstance(hyper, dict) or "pretrained_model_name_or_path" not in hyper:
        raise InputError(
            f"checkpoint {path} was not written by lit_distill: its hyper_parameters name no "
            "pretrained_model_name_or_path"
        )
    state = checkpoint.get("state_dict")
    tensors = isinstance(state, dict) and all(isinstance(t, torch.Tensor) for t in state.values())
    ours = checkpoint.get("lit_distill", {})
    facts = ours.get("facts", {}) if isinstance(ours, dict) else None
    if not tensors or not isinstance(facts, dict):
        part = "lit_distill" if tensors else "state_dict"
        raise InputError(
            f"checkpoint {path} is damaged: its {part} is not as lit_distill writes it"
        )
    for name, problem in wrong_types(Settings, hyper).items():
        raise InputError(f"checkpoint {path} is damaged: its hyper_parameters.{name} {problem}")


def check_state(state: Any, expected: Any, where: str) -> None:  # noqa: ANN401
    """Check that a checkpoint's state dict has exactly the trainable parameters.

    Raises:
        InputError: If it has not, naming examples of missing and unknown parameters.
    """
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    for name in sorted(set(expected) & set(state)):
        if state[name].shape != expected[name].shape:
            raise InputError(
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
        raise InputError("\n".join(lines))


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
        path = str(path).removeprefix("file://")
        if "://" in path:
            return super().load_checkpoint(path, map_location, weights_only=True)
        return read_checkpoint(path)
