"""Encodings of single prompts put together as a pipeline encodes them together.

How, is learned from examples: one prompt twice in a call shows what carries the batch, and two
prompts of different length show how the shorter one is padded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map


class EncodingCollateError(ValueError):
    """Encodings of single prompts can't be put together the way the pipeline does it itself."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"these prompts can't be encoded one by one for a common batch ({reason}); set "
            "model.rollout_batch_size: 1"
        )


def tensor_sizes(encoding: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the sizes of all tensors, so that encodings of one length are equal in it."""
    if isinstance(encoding, Tensor):
        return tuple(encoding.shape)
    if isinstance(encoding, list | tuple):
        return tuple(size for part in encoding for size in tensor_sizes(part))
    return ()


def to_device(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    """Return a copy of an encoding with its tensors, however nested, on the device."""

    def move(leaf: Any) -> Any:  # noqa: ANN401
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if hasattr(leaf, "parameters") and isinstance(leaf.parameters, Tensor):
            return type(leaf)(leaf.parameters.to(device))  # the distribution of a VAE
        return leaf

    return tree_map(move, value)


def differ(found: Any, expected: Any) -> bool:  # noqa: ANN401
    """Whether two encodings differ by more than another batch size makes of rounding."""
    if isinstance(expected, Tensor):
        if found.shape != expected.shape:
            return True
        apart = (found.double() - expected.double()).norm()
        return not bool(apart <= 0.05 * expected.double().norm())
    if isinstance(expected, list | tuple):
        pairs = zip(found, expected, strict=False)
        return len(found) != len(expected) or any(differ(*pair) for pair in pairs)
    return bool(found != expected)


@dataclass
class CollateExample:
    """How a pipeline encodes several prompts: one alone and twice, and two of different length."""

    one: Any = None
    twin: Any = None
    mixed: MixedLengths | None = None


class MixedLengths(NamedTuple):
    """Encodings of a short and a long prompt, each alone, and of both together."""

    short: Any
    long: Any
    together: Any


class EncodingCollator:
    """Puts encodings of single prompts together as the pipeline does."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # of the prompts, once a tensor had to be padded

    def __call__(self, parts: list[Any], one: Any, twin: Any, mixed: MixedLengths | None) -> Any:  # noqa: ANN401
        """Return the encoding of a batch.

        Args:
            parts: Encodings of its prompts.
            one: Encoding of any prompt.
            twin: Encoding of that prompt, twice in a call.
            mixed: An example of two lengths, if the parts differ in length.

        Raises:
            EncodingCollateError: If what the pipeline does is not understood.
        """
        if isinstance(one, Tensor):
            return self._tensors(parts, one, twin, mixed)
        if isinstance(one, list | tuple):
            if one and len(twin) == 2 * len(one):  # a list with one entry a prompt
                return type(one)(entry for part in parts for entry in part)
            if any(len(each) != len(one) for each in [twin, *parts]):
                raise EncodingCollateError("lists of different length")
            examples: Any = [None] * len(one)
            if mixed is not None:
                examples = [MixedLengths(*column) for column in zip(*mixed, strict=True)]
            columns = zip(zip(*parts, strict=True), one, twin, examples, strict=True)
            return type(one)(self(list(column), *rest) for column, *rest in columns)
        if one is None and mixed is not None and isinstance(mixed.together, Tensor):
            return self._masks(mixed.together)
        if any(part != one for part in [twin, *parts]):
            raise EncodingCollateError(f"{one!r} is not common to all prompts")
        return one

    def _tensors(
        self, parts: list[Tensor], one: Tensor, twin: Tensor, mixed: MixedLengths | None
    ) -> Tensor:
        if twin.shape == one.shape:  # nothing of the batch in it, such as the text's positions
            if any(not torch.equal(each, one) for each in [twin, *parts]):
                raise EncodingCollateError("a tensor without a batch differs between prompts")
            return one
        sizes = [
            (axis, 2 * a == b)
            for axis, (a, b) in enumerate(zip(one.shape, twin.shape, strict=True))
            if a != b
        ]
        if len(sizes) != 1 or not sizes[0][1]:
            raise EncodingCollateError(f"{tuple(one.shape)} becomes {tuple(twin.shape)}")
        batch = sizes[0][0]
        if any(part.shape != parts[0].shape for part in parts):
            assert mixed is not None
            parts = self._padded(parts, batch, mixed)
        return torch.cat(parts, batch)

    def _padded(self, parts: list[Tensor], batch: int, mixed: MixedLengths) -> list[Tensor]:
        """Pad to the longest as the shorter prompt of the example was."""
        short, long, together = mixed
        axes = [axis for axis in range(short.ndim) if short.shape[axis] != long.shape[axis]]
        if len(axes) != 1 or together.shape[axes[0]] != long.shape[axes[0]]:
            raise EncodingCollateError("padded in more ways than to the longest prompt")
        axis, n, width = axes[0], short.shape[axes[0]], long.shape[axes[0]]
        row = together.narrow(batch, 0, short.shape[batch])
        for left in (False, True):
            kept = row.narrow(axis, width - n if left else 0, n)
            filled = row.narrow(axis, 0 if left else n, width - n)
            value = filled.flatten()[0]
            if not differ(kept, short) and bool((filled == value).all()):
                break
        else:
            raise EncodingCollateError("what a prompt is padded with depends on the prompt")
        self.lengths = [part.shape[axis] for part in parts]
        after = 2 * (short.ndim - 1 - axis)  # torch counts axes from the last
        padded = []
        for part, length in zip(parts, self.lengths, strict=True):
            missing = max(self.lengths) - length
            sides = (missing, 0) if left else (0, missing)
            padded.append(pad(part, (0,) * after + sides, value=value.item()))
        return padded

    def _masks(self, together: Tensor) -> Tensor:
        """Return the mask that a pipeline (QwenImage) leaves out where no prompt is padded."""
        short, long = together[0], together[-1]
        n = int((short == long[0]).sum())
        right = torch.arange(len(long)) < n
        if not self.lengths or together.ndim != 2 or not torch.equal(short == long[0], right):
            raise EncodingCollateError("a mask that is not understood")
        kept = torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)
        return torch.where(kept, long[0], short[-1])
