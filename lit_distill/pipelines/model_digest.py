"""Digests of models: all weights, streamed; configurations; tokenizers.

Two models with one digest compute the same. A digest does not depend on where a model is stored, on
the device, or on how its files are sharded.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import tempfile
from collections.abc import Collection, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

THREADS = 8
CHUNK = 2**26
"""Bytes that are hashed at once: what a tensor on an accelerator takes in host memory."""

_VOLATILE = {"_name_or_path", "_diffusers_version", "transformers_version", "_commit_hash"}
_VOLATILE |= {"_use_default_values"}
"""Fields of a configuration that say where or with what it was saved."""


def model_digest(model: nn.Module, without: Collection[str] = ()) -> str:
    """Return the SHA-256, in hexadecimal, of a model's class, configuration and all its weights.

    About 1 GB/s on each of eight threads.

    Args:
        model: The model.
        without: Names of weights that don't count.
    """
    state = sorted((k, v) for k, v in model.state_dict().items() if k not in without)
    with ThreadPoolExecutor(THREADS) as pool:
        weights = list(pool.map(lambda item: (item[0], tensor_digest(item[1])), state))
    return _digest([type(model).__name__, plain_config(model), weights])


def tensor_digest(tensor: Tensor) -> str:
    """Return the SHA-256 of a tensor's type, shape and content, in hexadecimal."""
    digest = hashlib.sha256()
    for part in _plain_tensors(tensor):
        digest.update(f"{part.dtype}{tuple(part.shape)}".encode())
        flat = part.detach().reshape(-1)
        step = max(1, CHUNK // part.element_size())
        for start in range(0, flat.numel(), step):
            chunk = flat[start : start + step].cpu().contiguous()
            digest.update(chunk.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_tensors(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the plain tensors that a tensor consists of: quantised ones are several."""
    names = getattr(type(tensor), "__tensor_flatten__", None) and tensor.__tensor_flatten__()[0]  # type: ignore[attr-defined]
    if not names:
        yield tensor
        return
    for name in names:
        yield from _plain_tensors(getattr(tensor, name))


def plain_config(component: Any) -> Any:  # noqa: ANN401
    """Return the configuration of a component in plain types, without where it was stored.

    Fields at their default are left out: a later version of the library may add some.
    """
    config = getattr(component, "config", None)
    if config is not None and hasattr(config, "to_diff_dict"):  # transformers
        return _plain(config.to_diff_dict())
    if not isinstance(config, Mapping):
        return None
    parameters = inspect.signature(type(component).__init__).parameters
    defaults = {
        name: _plain(p.default) for name, p in parameters.items() if p.default is not p.empty
    }
    plain = _plain(dict(config))
    return {k: v for k, v in plain.items() if k not in defaults or v != defaults[k]}


def _plain(value: Any) -> Any:  # noqa: ANN401
    if isinstance(value, Mapping):
        kept = {str(key): entry for key, entry in value.items() if str(key) not in _VOLATILE}
        return {key: _plain(entry) for key, entry in sorted(kept.items())}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)


def files_digest(component: Any) -> str:  # noqa: ANN401
    """Return the SHA-256 of what a tokenizer or processor saves: vocabulary, merges, template."""
    if hasattr(component, "get_attributes"):  # a processor, of which parts may be missing
        parts = {name: getattr(component, name, None) for name in component.get_attributes()}
        digests = {k: files_digest(part) for k, part in parts.items() if part is not None}
        plain = {
            k: v for k, v in vars(component).items() if isinstance(v, bool | int | float | str)
        }
        return _digest([type(component).__name__, plain, digests])
    with tempfile.TemporaryDirectory() as folder:
        component.save_pretrained(folder)
        paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
        files = [(path.relative_to(folder).as_posix(), _file_content(path)) for path in paths]
    return _digest([type(component).__name__, files])


def _file_content(path: Path) -> Any:  # noqa: ANN401
    content = path.read_bytes()
    if path.suffix == ".json":
        return _plain(json.loads(content))
    return hashlib.sha256(content).hexdigest()


def component_digests(pipe: DiffusionPipeline, names: Collection[str]) -> dict[str, str]:
    """Return a digest of each of these components of a pipeline that there is, by name."""
    digests = {}
    for name in sorted(names):
        component = pipe.components.get(name)
        if isinstance(component, nn.Module):
            digests[name] = model_digest(component)
        elif component is not None and hasattr(component, "set_timesteps"):  # a scheduler
            digests[name] = _digest([type(component).__name__, plain_config(component)])
        elif hasattr(component, "save_pretrained"):
            digests[name] = files_digest(component)
    return digests


def _digest(content: Any) -> str:  # noqa: ANN401
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
