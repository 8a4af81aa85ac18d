"""A digest of a data set, to tell whether a resumed run trains on what it began with."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import pandas as pd

from lit_distill.data.filesystem import content_digest, content_digests
from lit_distill.data.images import Picture

COLUMNS = ("prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale", "height", "width")
"""Columns that training depends on, beside the targets and the arguments of the call."""

MAX_FILES = 1024
"""Files of targets that are read; of more, as many at equal distances stand for all."""


def dataset_digest(table: pd.DataFrame) -> dict[str, Any]:
    """Return what identifies the rows of a checked table, in plain types.

    File names do not count, since a data set may be moved: the content of the files does.

    Args:
        table: As `lit_distill.data.metadata.read_metadata` returns it.

    Returns:
        ``rows``, their number; ``order``, a digest of all rows in their order; and under
        ``columns``, for each column and for ``targets``, a digest of its values in any order.
    """
    hashes = {name: _hashes(table[name].to_numpy()) for name in COLUMNS}
    hashes["call"] = _hashes(np.array([_call(call) for call in table["call"]], dtype=object))
    columns = {name: f"{int(values.sum()):016x}" for name, values in hashes.items()}
    whole = hashlib.sha256()
    for values in hashes.values():
        whole.update(values.tobytes())
    contents = _contents(table)
    whole.update("".join(contents).encode())
    targets = hashlib.sha256("".join(sorted(contents)).encode()).hexdigest()
    order = whole.hexdigest()
    return {"rows": len(table), "order": order, "columns": {**columns, "targets": targets}}


def changes(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return how a data set differs from an earlier one, by their digests; nothing if it is equal.

    Args:
        before: Digest of the earlier data set.
        now: Digest of this one.
    """
    if before["rows"] != now["rows"]:
        return [f"{now['rows']} rows instead of {before['rows']}"]
    changed = [
        f"other values of {name}"
        for name, digest in now["columns"].items()
        if before["columns"].get(name) != digest
    ]
    if not changed and before["order"] != now["order"]:
        changed = ["another order of the rows, or other values together in a row"]
    return changed


def _hashes(values: np.ndarray) -> np.ndarray:
    """Return a 64-bit hash of each value; sums of them wrap around."""
    texts = np.array([repr(value) for value in values.tolist()], dtype=object)
    return pd.util.hash_array(texts, categorize=True)


def _call(call: dict[str, Any]) -> str:
    """Return the arguments of a row's call; those that are images count by their content."""
    plain = {k: content_digest(v) if isinstance(v, Picture) else v for k, v in sorted(call.items())}
    return repr(plain)


def _contents(table: pd.DataFrame) -> list[str]:
    """Return digests of the files that hold the targets."""
    latents, images = table["latents"].to_numpy(), table["image"].to_numpy()
    paths = [str(exact or image) for exact, image in zip(latents, images, strict=True)]
    if len(paths) > MAX_FILES:
        chosen = np.linspace(0, len(paths) - 1, MAX_FILES).round().astype(int)
        paths = [paths[index] for index in chosen]
    digests = content_digests([path for path in paths if path])
    return [next(digests) if path else "none" for path in paths]
