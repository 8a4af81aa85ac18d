"""A key-value store of encodings, in memory or in a folder of safetensors shards."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
import uuid
import warnings
from collections import OrderedDict
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lit_distill.data.whole_files import remove_temporary_files, write_file
from lit_distill.encoding.structure import flatten, unflatten
from lit_distill.errors import InputError
from lit_distill.pipelines.model_digest import tensor_digest

FOLDER = "encodings-v1"
"""Folder of the shards, inside the folder that the user names."""

SHARD_BYTES = 256 * 2**20
"""Approximate size of a shard."""

FLUSH_SECONDS = 60.0
"""New encodings are written to the disk after this time at the latest."""

MEMORY_BYTES = 4 * 2**30
"""Size limit of a store in memory; the oldest encodings are dropped."""

WRITER = "lit_distill"
"""Marks our shards, in their metadata."""

_SHARD = re.compile(r"[0-9a-f]{32}\.safetensors")

_ABANDONED_SECONDS = 3600.0
"""Age at which a temporary file belongs to a killed process: a shard is written in seconds."""


class LostEncodingError(Exception):
    """A stored encoding can't be read any more: its shard is damaged or has vanished."""


class _Entry(NamedTuple):
    path: Path
    structure: Any
    tensors: int
    sha256: str


class EncodingStore:
    """Stores encodings (nested tensors) under digests of what was encoded.

    With a folder, encodings are written to shards of about 256 MiB, at least every minute, and can
    be read by any number of processes. Without one, the latest 4 GiB are kept in memory. A key
    covers everything that the encoding depends on, so a shard is never out of date. The shards are
    in a folder of their own, `FOLDER`, and files of another kind in it are ignored. Every entry has
    a checksum, which is verified when a process first reads the entry. A damaged shard is removed,
    so that its content is encoded again.

    Args:
        folder: Folder in which the folder of the shards is created. None: store in memory.

    Raises:
        OSError: If the folder can't be created or read.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder) / FOLDER
        self._memory: OrderedDict[str, tuple[Any, list[Tensor]]] = OrderedDict()
        self._bytes = 0
        self._flushed = time.monotonic()
        self._index: dict[str, _Entry] = {}
        self._open: dict[tuple[int, Path], Any] = {}
        self._shards: set[Path] = set()
        self._verified: set[str] = set()
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
            remove_temporary_files(self.folder, older_than=_ABANDONED_SECONDS)
        self.reload()

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._index

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        """Return an encoding, its tensors in host memory; do not modify them.

        Raises:
            KeyError: If there is none.
            LostEncodingError: If its shard is damaged or has vanished. All that the shard held is
                then no longer in the store.
        """
        if key in self._memory:
            return unflatten(*self._memory[key])
        entry = self._index[key]
        try:
            return self._read(key, entry)
        except FileNotFoundError as error:
            self._forget(entry.path)
            raise LostEncodingError(f"{entry.path} has vanished") from error
        except (SafetensorError, ValueError) as error:
            self._remove(entry.path)
            raise LostEncodingError(f"{entry.path} is damaged ({error})") from error

    def _read(self, key: str, entry: _Entry) -> Any:  # noqa: ANN401
        # A file handle must not be shared with forked processes.
        handle = (os.getpid(), entry.path)
        if handle not in self._open:
            self._open[handle] = safe_open(entry.path, framework="pt")
        shard = self._open[handle]
        tensors = [shard.get_tensor(f"{key}/{index}") for index in range(entry.tensors)]
        if key not in self._verified:
            if _checksum(entry.structure, tensors) != entry.sha256:
                raise InputError("the checksum of an encoding does not match")
            self._verified.add(key)
        return unflatten(entry.structure, tensors)

    def __setitem__(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Store an encoding.

        Raises:
            TypeError: If it has parts that `lit_distill.encoding.structure` can't take apart.
        """
        tensors: list[Tensor] = []
        structure = flatten(value, tensors)
        if key in self._memory:
            self._bytes -= _size(self._memory.pop(key)[1])
        self._memory[key] = structure, tensors
        self._bytes += _size(tensors)
        if self.folder is None:
            while self._bytes > MEMORY_BYTES:
                _, (_, oldest) = self._memory.popitem(last=False)
                self._bytes -= _size(oldest)
        elif self._bytes > SHARD_BYTES or time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def flush(self) -> None:
        """Write new encodings to a shard. Does nothing without a folder."""
        self._flushed = time.monotonic()
        if self.folder is None or not self._memory:
            return
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        entries = {
            key: _Entry(path, structure, len(parts), _checksum(structure, parts))
            for key, (structure, parts) in self._memory.items()
        }
        tensors = {
            f"{key}/{index}": tensor.contiguous().clone()
            for key, (_, parts) in self._memory.items()
            for index, tensor in enumerate(parts)
        }
        described = {key: entry[1:] for key, entry in entries.items()}
        metadata = {"written_by": WRITER, "entries": json.dumps(described)}
        write_file(path, save(tensors, metadata))
        self._index.update(entries)
        self._shards.add(path)
        self._memory.clear()
        self._bytes = 0
        self._flushed = time.monotonic()

    def reload(self) -> None:
        """Find shards that other processes or an earlier run have written, and drop vanished ones.

        Raises:
            OSError: If a shard can't be read, naming the file.
        """
        if self.folder is None:
            return
        paths = [path for path in self.folder.iterdir() if _SHARD.fullmatch(path.name)]
        for path in self._shards.difference(paths):
            self._forget(path)
        self._shards.intersection_update(paths)
        for path in sorted(set(paths) - self._shards):
            self._shards.add(path)
            try:
                self._add_shard(path)
            except FileNotFoundError:
                continue  # another process has found it damaged
            except OSError as error:
                raise OSError(error.errno, f"{path} can't be read: {error}") from error
            except (SafetensorError, AttributeError, TypeError, KeyError, ValueError) as error:
                self._remove(path)
                warnings.warn(
                    f"{path} is damaged ({error}): its content is encoded again", stacklevel=2
                )

    def _add_shard(self, path: Path) -> None:
        with safe_open(path, framework="pt") as shard:
            metadata = shard.metadata() or {}
        if metadata.get("written_by") != WRITER:
            return  # not our file
        described = json.loads(metadata["entries"])
        self._index.update({key: _Entry(path, *entry) for key, entry in described.items()})

    def _forget(self, path: Path) -> None:
        """Drop all entries of a shard."""
        self._open.pop((os.getpid(), path), None)
        self._index = {key: entry for key, entry in self._index.items() if entry.path != path}

    def _remove(self, path: Path) -> None:
        """Remove a damaged shard; one that can't be removed is ignored from now on."""
        self._forget(path)
        with suppress(OSError):
            path.unlink(missing_ok=True)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


def _checksum(structure: Any, tensors: list[Tensor]) -> str:  # noqa: ANN401
    """Return the SHA-256 of an encoding, in hexadecimal."""
    content = [structure, [tensor_digest(tensor) for tensor in tensors]]
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
