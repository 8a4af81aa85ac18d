"""Files of latents: safetensors with a checksum, verified when they are read."""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from lit_distill.data.filesystem import open_file
from lit_distill.errors import InputError

LATENTS_KEY = "latents"

TRAJECTORY_KEY = "trajectory"

SIGMAS_KEY = "sigmas"
"""Names of the tensors in a file of the ``latents`` column. With store_trajectory there are three:
the final latents, the states between the student's steps, (steps - 1, ...), and the noise levels of
these states, (steps - 1,). Otherwise only the final latents."""

CHECKSUM_KEY = "lit_distill_sha256"
"""Key of a file's metadata with the SHA-256 of its tensors: names, types, shapes and content."""

FLOATS = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
"""Accepted data types of latents in safetensors files, with their size in bytes."""


def latents_content(tensors: dict[str, Tensor]) -> bytes:
    """Return the content of a file of latents.

    Args:
        tensors: The tensors by name, among them ``latents``.
    """
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    data = save(plain)
    content: bytes = save(plain, metadata={CHECKSUM_KEY: _checksum(*_parse("latents", data))})
    return content


def read_latents(path: str) -> dict[str, Tensor]:
    """Return the tensors of a file of latents, its checksum verified if it has one.

    Raises:
        InputError: If it is not a complete safetensors file with floats in a tensor ``latents``,
            its content has changed since it was written, or it can't be read.
    """
    try:
        with open_file(path) as stream:
            data = stream.read()
    except OSError as error:
        raise InputError(f"{path} can't be read: {error.strerror or error}") from error
    header, body = _parse(path, data)
    _check_header(path, header, len(body))
    metadata = header.get("__metadata__")
    recorded = metadata.get(CHECKSUM_KEY) if isinstance(metadata, dict) else None
    if recorded is not None and recorded != _checksum(header, body):
        raise InputError(f"{path} is damaged: its content does not match its checksum")
    try:
        tensors: dict[str, Tensor] = load(data)
    except SafetensorError as error:
        raise InputError(f"{path} is truncated or damaged: {error}") from error
    return tensors


def _check_header(path: str, header: dict[str, Any], size: int) -> None:
    """Check that a header describes latents, and as many bytes as there are."""
    try:
        entry = header[LATENTS_KEY]
        shape, dtype = tuple(map(_whole, entry["shape"])), str(entry["dtype"])
        begin, stop = map(_whole, entry["data_offsets"])
        end = max(_whole(e["data_offsets"][1]) for k, e in header.items() if k != "__metadata__")
        expected = math.prod(shape) * FLOATS.get(dtype, 0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise InputError(f"{path} holds no tensor {LATENTS_KEY!r} in safetensors format") from error
    if dtype not in FLOATS:
        raise InputError(f"{path} holds latents of type {dtype}; accepted: {', '.join(FLOATS)}")
    if size != end or stop - begin != expected:
        raise InputError(f"{path} is truncated or damaged: {size} bytes of data, not {end}")


def _whole(value: Any) -> int:  # noqa: ANN401
    """Return a number of a header.

    Raises:
        TypeError: If it is not an integer >= 0.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(value)
    return value


def not_finite(tensors: dict[str, Tensor]) -> str | None:
    """Return which of the tensors of a file has NaN or infinite values; None if none has."""
    for name in (LATENTS_KEY, TRAJECTORY_KEY, SIGMAS_KEY):
        tensor = tensors.get(name, torch.empty(0))
        if count := int((~torch.isfinite(tensor)).sum()):
            return f"{name} with {count} of {tensor.numel()} values NaN or infinite"
    return None


def _parse(path: str, data: bytes) -> tuple[dict[str, Any], memoryview]:
    """Return the header and the values of a file."""
    length = int.from_bytes(data[:8], "little")
    try:
        header = json.loads(data[8 : 8 + length])
        if not isinstance(header, dict):
            raise TypeError("no mapping")
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(f"{path} holds no tensor {LATENTS_KEY!r} in safetensors format") from error
    return header, memoryview(data)[8 + length :]


def _checksum(header: dict[str, Any], body: memoryview) -> str:
    entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
    digest = hashlib.sha256(json.dumps(entries, sort_keys=True).encode())
    digest.update(body)
    return digest.hexdigest()
