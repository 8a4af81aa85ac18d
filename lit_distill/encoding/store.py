"""A key-value store of encodings, in memory or in a folder of safetensors shards."""

from __future__ import annotations

import importlib
import json
import os
import uuid
from collections import OrderedDict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_warn
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

SHARD_BYTES = 256 * 2**20
"""Approximate size of a shard."""

MEMORY_BYTES = 4 * 2**30
"""Size limit of a store in memory; the oldest encodings are dropped."""


class EncodingStore:
    """Stores encodings (nested tensors) under digests of what was encoded.

    With a folder, encodings are written to shards of about 256 MiB, atomically, and can be read by
    any number of processes. Without one, the latest 4 GiB are kept in memory. A key covers
    everything that the encoding depends on, so a shard is never out of date. A shard that can't be
    read is deleted, and its content is encoded again.

    Args:
        folder: Folder of the shards, created if missing. None: store in memory.

    Raises:
        OSError: If the folder can't be created or read.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._memory: OrderedDict[str, tuple[Any, list[Tensor]]] = OrderedDict()
        self._bytes = 0
        self._index: dict[str, tuple[Path, Any]] = {}
        self._open: dict[tuple[int, Path], Any] = {}
        self._read: set[Path] = set()
        self.reload()

    def __contains__(self, key: str) -> bool:
        return key in self._memory or key in self._index

    def __getitem__(self, key: str) -> Any:  # noqa: ANN401
        """Return an encoding, its tensors in host memory; do not modify them."""
        if key in self._memory:
            return _unflatten(*self._memory[key])
        path, structure = self._index[key]
        # A file handle must not be shared with forked processes.
        handle = (os.getpid(), path)
        if handle not in self._open:
            self._open[handle] = safe_open(path, framework="pt")
        tensors = _ShardTensors(self._open[handle], key)
        return _unflatten(structure, tensors)

    def __setitem__(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Store an encoding.

        Raises:
            TypeError: If it has values other than tensors, plain values, lists, tuples,
                dictionaries and distributions of diffusers' VAEs.
        """
        tensors: list[Tensor] = []
        structure = _flatten(value, tensors)
        self._memory[key] = structure, tensors
        self._bytes += _size(tensors)
        if self.folder is not None and self._bytes > SHARD_BYTES:
            self.flush()
        while self.folder is None and self._bytes > MEMORY_BYTES:
            _, (_, oldest) = self._memory.popitem(last=False)
            self._bytes -= _size(oldest)

    def flush(self) -> None:
        """Write new encodings to a shard. Does nothing without a folder."""
        if self.folder is None or not self._memory:
            return
        entries = {key: structure for key, (structure, _) in self._memory.items()}
        tensors = {
            f"{key}/{index}": tensor.detach().cpu().contiguous().clone()
            for key, (_, parts) in self._memory.items()
            for index, tensor in enumerate(parts)
        }
        path = self.folder / f"{uuid.uuid4().hex}.safetensors"
        temporary = path.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={"entries": json.dumps(entries)})
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        self._memory.clear()
        self._bytes = 0
        self._add_shard(path, entries)

    def reload(self) -> None:
        """Find shards that were written by other processes or an earlier run."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._read:
                continue
            try:
                with safe_open(path, framework="pt") as shard:
                    self._add_shard(path, json.loads(shard.metadata()["entries"]))
            except (SafetensorError, TypeError, KeyError, ValueError) as error:
                rank_zero_warn(f"{path} can't be read ({error}): its content is encoded again")
                path.unlink(missing_ok=True)

    def _add_shard(self, path: Path, entries: dict[str, Any]) -> None:
        self._read.add(path)
        self._index.update({key: (path, structure) for key, structure in entries.items()})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class _ShardTensors:
    """The tensors of one entry of a shard, read on access."""

    def __init__(self, shard: Any, key: str) -> None:  # noqa: ANN401
        self.shard = shard
        self.key = key

    def __getitem__(self, index: int) -> Tensor:
        tensor: Tensor = self.shard.get_tensor(f"{self.key}/{index}")
        return tensor


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _flatten(value: Any, tensors: list[Tensor]) -> Any:  # noqa: ANN401
    """Append the tensors of a value to the list and return its structure, as plain JSON."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu())
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_flatten(entry, tensors) for entry in value]}
    parameters = getattr(value, "parameters", None)
    if isinstance(parameters, Tensor):  # the distribution of a VAE
        return {"class": _class_name(value), "of": _flatten(parameters, tensors)}
    if isinstance(value, dict):  # includes the outputs of diffusers' models
        kind = "dict" if type(value) is dict else _class_name(value)
        return {"class": kind, "with": {k: _flatten(v, tensors) for k, v in value.items()}}
    raise TypeError(f"cannot store a {type(value).__name__}")


def _class_name(value: Any) -> str:  # noqa: ANN401
    cls = type(value)
    if not cls.__module__.startswith(("diffusers.", "transformers.")):
        raise TypeError(f"cannot store a {cls.__module__}.{cls.__name__}")
    return f"{cls.__module__}:{cls.__qualname__}"


def _load_class(name: str) -> Any:  # noqa: ANN401
    module, _, cls = name.partition(":")
    if not module.startswith(("diffusers.", "transformers.")):
        raise ValueError(f"a cache can't contain a {name}")
    return getattr(importlib.import_module(module), cls)


def _unflatten(structure: Any, tensors: Any) -> Any:  # noqa: ANN401
    kind, content = next(iter(structure.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "plain":
        return content
    if kind in ("list", "tuple"):
        entries = [_unflatten(entry, tensors) for entry in content]
        return entries if kind == "list" else tuple(entries)
    if "of" in structure:
        return _load_class(content)(_unflatten(structure["of"], tensors))
    fields = {k: _unflatten(v, tensors) for k, v in structure["with"].items()}
    return fields if content == "dict" else _load_class(content)(**fields)
