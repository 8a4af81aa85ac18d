"""Checkpoint files: written whole or not at all, read verified and without unpickling code."""

from __future__ import annotations

import os
import pickle
import re
import shutil
import tempfile
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import torch
from lightning.pytorch.plugins.io import TorchCheckpointIO

from lit_distill.data.filesystem import is_url, open_file
from lit_distill.data.whole_files import write_file
from lit_distill.errors import InputError
from lit_distill.training.plain import plain
from lit_distill.training.settings import Settings, wrong_types

STATE_PREFIX = "denoisers."
"""Where a checkpoint's state dict holds the denoisers: ``denoisers.transformer.<parameter>``."""


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a Lightning checkpoint, its checksums verified, without unpickling code.

    Args:
        path: The file, or its URL.
        mmap: Read tensors when they are used.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is damaged, or not a checkpoint of `DirectDistill`.
    """
    # Opened once: another run may replace the file between the verification and the reading.
    with _local_file(path) as file, file.open("rb") as stream:
        _verify_archive(stream, path)
        stream.seek(0)
        checkpoint = _load(file if mmap else stream, path, mmap)
    _check_content(checkpoint, path)
    return dict(checkpoint)


@contextmanager
def _local_file(path: str | Path) -> Iterator[Path]:
    """Yield the file on this machine; what a URL names is copied for the time being."""
    local = local_path(path)
    if local is None:
        with tempfile.NamedTemporaryFile() as copy:
            with open_file(path) as stream:
                shutil.copyfileobj(stream, copy, 2**24)
            copy.flush()
            yield Path(copy.name)
        return
    if local.is_dir():
        raise InputError(f"checkpoint {path} is a folder; a checkpoint is one file (.ckpt)")
    if not local.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    yield local


def local_path(path: str | Path) -> Path | None:
    """Return the local file that a path or a URL ``file://...`` names; None for other URLs."""
    if not is_url(str(path)):
        return Path(path)
    from fsspec import url_to_fs
    from fsspec.implementations.local import LocalFileSystem

    system, inner = url_to_fs(str(path))
    return Path(inner) if isinstance(system, LocalFileSystem) else None


def _verify_archive(stream: BinaryIO, path: str | Path) -> None:
    """Check that a file is a whole archive as torch writes it; torch itself reads past damage.

    Raises:
        InputError: If it is not; tells a truncated file from another kind of file.
    """
    size = os.fstat(stream.fileno()).st_size
    if size == 0:
        raise InputError(
            f"checkpoint {path} is empty: the process was killed or the disk was full while it was "
            "written; use another checkpoint"
        )
    if stream.read(4) != b"PK\x03\x04":
        raise InputError(f"checkpoint {path} is not a checkpoint: {size} bytes of another format")
    try:
        with zipfile.ZipFile(stream) as archive:
            parts = archive.infolist()
            names = [part.filename for part in parts]
            if any(part.compress_type != zipfile.ZIP_STORED for part in parts):
                raise InputError("its parts are compressed")
            if len(set(names)) < len(names) or sum(part.file_size for part in parts) > size:
                raise InputError("its parts overlap")
            damaged = archive.testzip()
    except Exception as error:  # zipfile raises several kinds
        raise InputError(
            f"checkpoint {path} is truncated or not a checkpoint: {error}; use another checkpoint"
        ) from error
    if damaged:
        raise InputError(
            f"checkpoint {path} is damaged: the checksum of its part {damaged} differs"
        )
    if not any(name.endswith("data.pkl") for name in names):
        raise InputError(f"checkpoint {path} is a zip archive, but not a checkpoint")


def _load(file: Path | BinaryIO, path: str | Path, mmap: bool) -> Any:  # noqa: ANN401
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of damaged storages; an error follows
            return torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    except pickle.UnpicklingError as error:
        match = re.search(r"GLOBAL (\S+)|(?:class|function) (\S+)", str(error))
        kind = f" ({match[1] or match[2]})" if match else ""
        raise InputError(
            f"checkpoint {path} holds other objects than tensors, numbers and texts{kind}, which "
            "are not read because they may run code"
        ) from error
    except Exception as error:  # torch raises several kinds for a foreign file
        raise InputError(f"checkpoint {path} is truncated or not a checkpoint: {error}") from error


def _check_content(checkpoint: Any, path: str | Path) -> None:  # noqa: ANN401
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
    """Writes checkpoint files whole or not at all, and reads them verified.

    Lightning writes to the system's temporary folder and moves the file. If that is another disk,
    the move is a copy, and a process killed meanwhile leaves half a checkpoint under the final
    name. Lightning also holds the whole file in memory, which this does not.

    Attributes:
        last: The last checkpoint that was written or read, and its step.
    """

    def __init__(self) -> None:
        super().__init__()
        self.last: tuple[str, int] | None = None

    def save_checkpoint(
        self,
        checkpoint: dict[str, Any],
        path: Any,  # noqa: ANN401
        storage_options: Any = None,  # noqa: ANN401
    ) -> None:
        """Write the file; remote storage is left to Lightning.

        Raises:
            InputError: If the checkpoint holds something that could not be read back, naming it.
            OSError: If the file can't be written, naming it.
        """
        checkpoint = plain(checkpoint, "checkpoint")
        local = local_path(path)
        if local is None:
            super().save_checkpoint(checkpoint, path, storage_options)
        else:
            write_file(local, lambda stream: _save(checkpoint, stream))
        self.last = str(path), int(checkpoint.get("global_step", 0))

    def load_checkpoint(
        self,
        path: Any,  # noqa: ANN401
        map_location: Any = None,  # noqa: ANN401
        weights_only: bool | None = None,
    ) -> dict[str, Any]:
        """Return the checkpoint on the CPU, as `read_checkpoint` does."""
        checkpoint = read_checkpoint(path)
        self.last = str(path), int(checkpoint.get("global_step", 0))
        return checkpoint


class _Stream:
    """A stream that keeps the error of a write, in place of which torch raises another."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self.error: OSError | None = None

    def write(self, content: Any) -> int:  # noqa: ANN401
        try:
            return self._stream.write(content)
        except OSError as error:
            self.error = error
            raise

    def flush(self) -> None:
        self._stream.flush()


def _save(checkpoint: dict[str, Any], stream: BinaryIO) -> None:
    kept = _Stream(stream)
    try:
        torch.save(checkpoint, kept)  # type: ignore[arg-type]
    except Exception:
        if kept.error is not None:
            raise kept.error from None
        raise
