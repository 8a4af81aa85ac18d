"""Encodings kept: in memory, or in a folder of safetensors shards that outlives the run."""

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

MEMORY_BYTES = 4 * 2**30


class EncodingStore:
    """Keeps encodings (tensors, however nested) under digests of what was encoded.

    With a folder they are written to shards of about 256 MiB, each whole or not at all, and read
    from there by any number of processes. Without one the latest 4 GiB are kept in memory. A key
    says all that the encoding depends on, so a shard can't be out of date; one that can't be read
    is removed, and what it held is encoded anew.

    Args:
        folder: Where the shards are; made if missing. None: memory.

    Raises:
        OSError: If the folder can't be made or read.
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
        """Return an encoding, its tensors in host memory; not to be written to."""
        if key in self._memory:
            return _unpacked(*self._memory[key])
        path, structure = self._index[key]
        # A handle must not be shared with a process that was forked from this one.
        place = (os.getpid(), path)
        if place not in self._open:
            self._open[place] = safe_open(path, framework="pt")
        tensors = _Tensors(self._open[place], key)
        return _unpacked(structure, tensors)

    def __setitem__(self, key: str, value: Any) -> None:  # noqa: ANN401
        """Keep an encoding.

        Raises:
            TypeError: If there is something else in it than tensors, plain values, lists, tuples,
                dictionaries and distributions of diffusers' VAEs.
        """
        tensors: list[Tensor] = []
        structure = _packed(value, tensors)
        self._memory[key] = structure, tensors
        self._bytes += _size(tensors)
        if self.folder is not None and self._bytes > SHARD_BYTES:
            self.flush()
        while self.folder is None and self._bytes > MEMORY_BYTES:
            _, (_, oldest) = self._memory.popitem(last=False)
            self._bytes -= _size(oldest)

    def flush(self) -> None:
        """Write what is new as a shard; without a folder nothing happens."""
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
        self._note(path, entries)

    def reload(self) -> None:
        """Take up shards that other processes, or an earlier run, have written."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        for path in sorted(self.folder.glob("*.safetensors")):
            if path in self._read:
                continue
            try:
                with safe_open(path, framework="pt") as shard:
                    self._note(path, json.loads(shard.metadata()["entries"]))
            except (SafetensorError, TypeError, KeyError, ValueError) as error:
                rank_zero_warn(f"{path} can't be read ({error}): what it held is encoded anew")
                path.unlink(missing_ok=True)

    def _note(self, path: Path, entries: dict[str, Any]) -> None:
        self._read.add(path)
        self._index.update({key: (path, structure) for key, structure in entries.items()})

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}


class _Tensors:
    """The tensors of one entry, read when asked for."""

    def __init__(self, shard: Any, key: str) -> None:  # noqa: ANN401
        self.shard = shard
        self.key = key

    def __getitem__(self, index: int) -> Tensor:
        tensor: Tensor = self.shard.get_tensor(f"{self.key}/{index}")
        return tensor


def _size(tensors: list[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _packed(value: Any, tensors: list[Tensor]) -> Any:  # noqa: ANN401
    """Return what JSON can hold of a value, and put its tensors into the list."""
    if isinstance(value, Tensor):
        tensors.append(value.detach().cpu())
        return {"tensor": len(tensors) - 1}
    if value is None or isinstance(value, bool | int | float | str):
        return {"plain": value}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_packed(entry, tensors) for entry in value]}
    parameters = getattr(value, "parameters", None)
    if isinstance(parameters, Tensor):  # the distribution of a VAE
        return {"class": _name(value), "of": _packed(parameters, tensors)}
    if isinstance(value, dict):  # among them the outputs of diffusers' models
        kind = "dict" if type(value) is dict else _name(value)
        return {"class": kind, "with": {k: _packed(v, tensors) for k, v in value.items()}}
    raise TypeError(f"cannot keep a {type(value).__name__}")


def _name(value: Any) -> str:  # noqa: ANN401
    kind = type(value)
    if not kind.__module__.startswith(("diffusers.", "transformers.")):
        raise TypeError(f"cannot keep a {kind.__module__}.{kind.__name__}")
    return f"{kind.__module__}:{kind.__qualname__}"


def _class(name: str) -> Any:  # noqa: ANN401
    module, _, kind = name.partition(":")
    if not module.startswith(("diffusers.", "transformers.")):
        raise ValueError(f"a cache can't hold a {name}")
    return getattr(importlib.import_module(module), kind)


def _unpacked(structure: Any, tensors: Any) -> Any:  # noqa: ANN401
    kind, content = next(iter(structure.items()))
    if kind == "tensor":
        return tensors[content]
    if kind == "plain":
        return content
    if kind in ("list", "tuple"):
        listed = [_unpacked(entry, tensors) for entry in content]
        return listed if kind == "list" else tuple(listed)
    if "of" in structure:
        return _class(content)(_unpacked(structure["of"], tensors))
    entries = {k: _unpacked(v, tensors) for k, v in structure["with"].items()}
    return entries if content == "dict" else _class(content)(**entries)
