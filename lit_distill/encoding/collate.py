"""Collates encodings of single prompts to the encoding of a batch.

Families differ in how they stack and pad encodings, so the rule is learned from examples. One
prompt encoded twice in a call shows which axis is the batch. Two prompts of different length show
how the shorter one is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

from lit_distill.errors import InputError


class EncodingCollateError(InputError):
    """Encodings of single prompts can't be collated as the pipeline would encode the batch."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"these prompts can't be encoded one by one for a common batch ({reason}); set "
            "model.rollout_batch_size: 1"
        )


class MixedLengths(NamedTuple):
    """Encodings of a short prompt, of a long one, and of both in one call."""

    short: Any
    long: Any
    together: Any


@dataclass
class CollateExample:
    """What is known of how a pipeline encodes a batch.

    Attributes:
        single: Encoding of one prompt.
        doubled: Encoding of the same prompt, twice in a call.
        mixed: Encodings of prompts of different length, once some were met.
    """

    single: Any = None
    doubled: Any = None
    mixed: MixedLengths | None = None


class EncodingCollator:
    """Collates the encodings of single prompts as the pipeline does."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # of the prompts, set when a tensor is padded

    def __call__(
        self,
        encodings: list[Any],
        single: Any,  # noqa: ANN401
        doubled: Any,  # noqa: ANN401
        mixed: MixedLengths | None,
    ) -> Any:  # noqa: ANN401
        """Return the encoding of a batch.

        Args:
            encodings: Encodings of its prompts.
            single: Encoding of any prompt.
            doubled: Encoding of the same prompt, twice in a call.
            mixed: An example of two lengths; needed if the encodings differ in length.

        Raises:
            EncodingCollateError: If the examples follow no known rule.
        """
        if isinstance(single, Tensor):
            return self._collate_tensors(encodings, single, doubled, mixed)
        if isinstance(single, list | tuple):
            if single and len(doubled) == 2 * len(single):  # a list with one entry per prompt
                return type(single)(entry for encoding in encodings for entry in encoding)
            if any(len(each) != len(single) for each in [doubled, *encodings]):
                raise EncodingCollateError("lists of different length")
            mixed_parts: Any = [None] * len(single)
            if mixed is not None:
                mixed_parts = [MixedLengths(*column) for column in zip(*mixed, strict=True)]
            parts = zip(zip(*encodings, strict=True), single, doubled, mixed_parts, strict=True)
            return type(single)(self(list(part), *examples) for part, *examples in parts)
        if single is None and mixed is not None and isinstance(mixed.together, Tensor):
            return self._make_mask(mixed.together)
        if any(encoding != single for encoding in [doubled, *encodings]):
            raise EncodingCollateError(f"{single!r} is not common to all prompts")
        return single

    def _collate_tensors(
        self,
        tensors: list[Tensor],
        single: Tensor,
        doubled: Tensor,
        mixed: MixedLengths | None,
    ) -> Tensor:
        if doubled.shape == single.shape:  # no batch axis, for example the text's positions
            if any(not torch.equal(tensor, single) for tensor in [doubled, *tensors]):
                raise EncodingCollateError("a tensor without a batch differs between prompts")
            return single
        changed = [
            (axis, 2 * a == b)
            for axis, (a, b) in enumerate(zip(single.shape, doubled.shape, strict=True))
            if a != b
        ]
        if len(changed) != 1 or not changed[0][1]:
            raise EncodingCollateError(f"{tuple(single.shape)} becomes {tuple(doubled.shape)}")
        batch_axis = changed[0][0]
        if any(tensor.shape != tensors[0].shape for tensor in tensors):
            assert mixed is not None
            tensors = self._pad_to_longest(tensors, batch_axis, mixed)
        return torch.cat(tensors, batch_axis)

    def _pad_to_longest(
        self, tensors: list[Tensor], batch_axis: int, mixed: MixedLengths
    ) -> list[Tensor]:
        """Pad as the pipeline padded the short prompt of the example: value, axis and side."""
        short, long, together = mixed
        axes = [axis for axis in range(short.ndim) if short.shape[axis] != long.shape[axis]]
        if len(axes) != 1 or together.shape[axes[0]] != long.shape[axes[0]]:
            raise EncodingCollateError("padded in more ways than to the longest prompt")
        axis = axes[0]
        length, longest = short.shape[axis], long.shape[axis]
        padded_short = together.narrow(batch_axis, 0, short.shape[batch_axis])
        for left in (False, True):
            content = padded_short.narrow(axis, longest - length if left else 0, length)
            padding = padded_short.narrow(axis, 0 if left else length, longest - length)
            value = padding.flatten()[0]
            if not encodings_differ(content, short) and bool((padding == value).all()):
                break
        else:
            raise EncodingCollateError("what a prompt is padded with depends on the prompt")
        self.lengths = [tensor.shape[axis] for tensor in tensors]
        later_axes = 2 * (short.ndim - 1 - axis)  # `pad` lists axes from the last one
        padded = []
        for tensor, length in zip(tensors, self.lengths, strict=True):
            missing = max(self.lengths) - length
            sides = (missing, 0) if left else (0, missing)
            padded.append(pad(tensor, (0,) * later_axes + sides, value=value.item()))
        return padded

    def _make_mask(self, together: Tensor) -> Tensor:
        """Return the mask that a pipeline (QwenImage) omits if no prompt is padded."""
        short, long = together[0], together[-1]
        valid = short == long[0]
        right_padded = torch.arange(len(long)) < int(valid.sum())
        if not self.lengths or together.ndim != 2 or not torch.equal(valid, right_padded):
            raise EncodingCollateError("a mask of an unknown kind")
        kept = torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)
        return torch.where(kept, long[0], short[-1])


def encodings_differ(found: Any, expected: Any) -> bool:  # noqa: ANN401
    """Return whether two encodings differ by more than the rounding of another batch size."""
    if isinstance(expected, Tensor):
        if found.shape != expected.shape:
            return True
        distance = (found.double() - expected.double()).norm()
        return not bool(distance <= 0.05 * expected.double().norm())
    if isinstance(expected, list | tuple):
        pairs = zip(found, expected, strict=False)
        return len(found) != len(expected) or any(encodings_differ(*pair) for pair in pairs)
    return bool(found != expected)


def tensor_sizes(encoding: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the sizes of all tensors; they are equal for prompts of the same length."""
    if isinstance(encoding, Tensor):
        return tuple(encoding.shape)
    if isinstance(encoding, list | tuple):
        return tuple(size for part in encoding for size in tensor_sizes(part))
    return ()


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    """Return a copy of a nested encoding with all tensors on the device."""

    def move(leaf: Any) -> Any:  # noqa: ANN401
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if hasattr(leaf, "parameters") and isinstance(leaf.parameters, Tensor):
            return type(leaf)(leaf.parameters.to(device))  # the distribution of a VAE
        return leaf

    return tree_map(move, value)
