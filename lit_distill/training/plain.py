"""Plain types: what a checkpoint may hold, so that it can be read without running code."""

from __future__ import annotations

import os
from collections import Counter, OrderedDict
from collections.abc import Mapping
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lit_distill.errors import InputError

_LEAVES = (type(None), bool, int, float, complex, str, bytes, torch.dtype, torch.device, torch.Size)
_MAPPINGS = (dict, OrderedDict, Counter)


def plain(value: Any, name: str) -> Any:  # noqa: ANN401
    """Return a value in the types that a checkpoint is read back in, with the same content.

    Paths become texts, numpy's numbers become Python's, and mappings become dictionaries. Tensors
    stay as they are.

    Args:
        value: The value.
        name: What the user calls it, for the error.

    Raises:
        InputError: If it, or something in it, has no plain form, naming it.
    """
    kind = type(value)
    if kind in _LEAVES or isinstance(value, Tensor):
        return value
    if isinstance(value, Mapping):
        content = {plain(key, name): plain(each, f"{name}.{key}") for key, each in value.items()}
        return kind(content) if kind in _MAPPINGS else content
    if isinstance(value, list | tuple | set | frozenset):
        items = [plain(each, f"{name}[{index}]") for index, each in enumerate(value)]
        return kind(items) if kind in (tuple, set) else items
    if isinstance(value, np.generic):
        return plain(value.item(), name)
    if isinstance(value, Enum):
        return plain(value.value, name)
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    for base in (str, bool, int, float):
        if isinstance(value, base):
            return base(value)
    if isinstance(value, np.ndarray):
        return plain(value.tolist(), name)
    raise InputError(
        f"{name} is a {kind.__module__}.{kind.__qualname__}, which a checkpoint can't hold; use "
        "numbers, texts, and lists or mappings of them"
    )


def plain_setting(value: Any, name: str) -> Any:  # noqa: ANN401
    """Return a setting in plain types: arrays and tensors of one dimension become lists.

    Raises:
        InputError: If it has no plain form, naming it.
    """
    if isinstance(value, np.ndarray | Tensor):
        if value.ndim > 1:
            raise InputError(
                f"{name} is an array of {value.ndim} dimensions, which is no setting; a call "
                "argument that differs between rows belongs into data.call_columns"
            )
        return plain(value.tolist(), name)
    if isinstance(value, torch.dtype):
        return str(value).removeprefix("torch.")
    if isinstance(value, Mapping):
        return {plain(k, name): plain_setting(each, f"{name}.{k}") for k, each in value.items()}
    if isinstance(value, list | tuple):
        items = [plain_setting(each, f"{name}[{index}]") for index, each in enumerate(value)]
        return tuple(items) if type(value) is tuple else items
    return plain(value, name)
