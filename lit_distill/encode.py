"""Prompts encoded once: the pipeline's `encode_prompt` answers from memory."""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class PromptEncoder:
    """Takes the place of ``pipe.encode_prompt`` and encodes every prompt only once.

    Nothing is known of what a family's `encode_prompt` takes or returns. A call with B prompts is
    split into B calls with one, whose results are kept in host memory and put together again;
    what carries the batch is seen by encoding one prompt twice. Where encodings differ in shape,
    the whole call goes to the pipeline's own method, which knows how to pad.

    Args:
        pipe: A pipeline; its method is replaced on the instance. One without `encode_prompt` is
            left as it is.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self._kept: dict[str, Any] = {}
        self._pair: Any = None
        if hasattr(pipe, "encode_prompt"):
            self._own = pipe.encode_prompt
            self._signature = inspect.signature(self._own)
            pipe.encode_prompt = self

    @torch.no_grad()
    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return what the pipeline's own `encode_prompt` returns."""
        given = self._signature.bind(*args, **kwargs).arguments
        prompts = {
            name: texts
            for name, texts in given.items()
            if "prompt" in name and isinstance(texts, list) and all(type(t) is str for t in texts)
        }
        sizes = {len(texts) for texts in prompts.values()}
        if len(sizes) != 1 or any(isinstance(value, Tensor) for value in given.values()):
            return self._encode(given)
        singles = [
            self._single(given | {name: [texts[index]] for name, texts in prompts.items()})
            for index in range(sizes.pop())
        ]
        try:
            joined = (
                singles[0] if len(singles) == 1 else _join(singles, self._pair_of(given, prompts))
            )
        except _ShapesDifferError:
            return self._encode(given)
        device = given.get("device")
        return tree_map_only(Tensor, lambda kept: kept.to(device), joined) if device else joined

    def _encode(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        # As in inference: a trainer's autocast must not reach the encoders.
        device = torch.device(arguments.get("device") or "cpu")
        with torch.autocast(device.type, enabled=False):
            return self._own(**arguments)

    def _single(self, arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        if "batch_size" in arguments:  # HunyuanImage is told how many prompts there are
            arguments = arguments | {"batch_size": 1}
        key = repr(sorted((name, value) for name, value in arguments.items() if name != "device"))
        if key not in self._kept:
            self._kept[key] = tree_map_only(Tensor, Tensor.cpu, self._encode(arguments))
        return self._kept[key]

    def _pair_of(self, given: dict[str, Any], prompts: dict[str, list[str]]) -> Any:  # noqa: ANN401
        """Return the encoding of the first prompt, twice."""
        if self._pair is None:
            twice: dict[str, Any] = {name: [texts[0]] * 2 for name, texts in prompts.items()}
            if "batch_size" in given:
                twice["batch_size"] = 2
            self._pair = tree_map_only(Tensor, Tensor.cpu, self._encode(given | twice))
        return self._pair


class _ShapesDifferError(Exception):
    """Encodings of single prompts do not fit together without padding."""


def _join(parts: list[Any], pair: Any) -> Any:  # noqa: ANN401
    """Put encodings of single prompts together the way `pair` differs from one of them."""
    first = parts[0]
    if any(type(part) is not type(first) for part in parts) or type(first) is not type(pair):
        raise _ShapesDifferError
    if isinstance(first, Tensor):
        if any(part.shape != first.shape for part in parts):
            raise _ShapesDifferError
        sizes = zip(first.shape, pair.shape, strict=True)
        doubled = [axis for axis, (one, two) in enumerate(sizes) if two == 2 * one]
        return torch.cat(parts, doubled[0]) if doubled else first
    if isinstance(first, list | tuple):
        if first and len(pair) == 2 * len(first):  # a list with one entry a prompt
            return type(first)(entry for part in parts for entry in part)
        joined = [_join(list(column), two) for *column, two in zip(*parts, pair, strict=True)]
        return type(first)(joined)
    return first
