"""Prompts and images encoded once: the pipeline's own encoders answer from memory.

Nothing is known of what a family's encoders take or return. A call for B samples becomes B calls
for one, whose results are kept in host memory and put together again. How, is learned from the
pipeline: one prompt encoded twice in a call shows what carries the batch, and two prompts of
different length show how the shorter one is padded.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad
from torch.utils._pytree import tree_map

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class UnjoinableError(ValueError):
    """Encodings of single prompts can't be put together the way the pipeline does it itself."""

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"these prompts can't be encoded one by one for a common batch ({reason}); set "
            "model.rollout_batch_size: 1"
        )


class EncodeOnce:
    """Takes the place of a pipeline's `encode_prompt`, `encode_image` and `vae.encode`.

    Args:
        pipe: A pipeline; the methods are replaced on the instance, where it has them.
    """

    def __init__(self, pipe: DiffusionPipeline) -> None:
        self.pipe = pipe
        self.kept: dict[str, Any] = {}
        for owner, name in ((pipe, "encode_prompt"), (pipe, "encode_image")):
            if callable(getattr(owner, name, None)):
                setattr(owner, name, _Encoder(self, getattr(owner, name)))
        vae: Any = getattr(pipe, "vae", None)
        if hasattr(vae, "encode"):
            vae.encode = _ImageEncoder(self, vae.encode)

    def recall(self, own: Callable[..., Any], given: dict[str, Any]) -> Any:  # noqa: ANN401
        """Return what `own` returns for the arguments, in host memory; computed at most once.

        Raises:
            TypeError: If an argument's content can't be told, so that nothing can be kept.
        """
        content = {name: value for name, value in sorted(given.items()) if name != "device"}
        key = fingerprint((own.__name__, content))
        if key not in self.kept:
            self.kept[key] = moved(self.compute(own, given), torch.device("cpu"))
        return self.kept[key]

    def compute(self, own: Callable[..., Any], given: dict[str, Any]) -> Any:  # noqa: ANN401
        """Return what `own` returns, as in inference: a trainer's autocast must not reach it."""
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return own(**given)

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(self.pipe._execution_device)


class _Encoder:
    """A method of a pipeline that encodes prompts, images or both."""

    def __init__(self, once: EncodeOnce, own: Callable[..., Any]) -> None:
        self.once = once
        self.own = own
        self.__name__ = own.__name__
        self.__signature__ = inspect.signature(own)  # pipelines look for arguments in it

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return what the pipeline's own method returns."""
        bound = self.__signature__.bind(*args, **kwargs).arguments
        given = {k: v for name, v in bound.items() for k, v in _spread(name, v, self.__signature__)}
        texts = [v for v in given.values() if isinstance(v, list) and _all(str, v)]
        sizes = {len(value) for value in texts}
        try:
            if len(sizes) != 1 or any("embeds" in k and v is not None for k, v in given.items()):
                encoded = self.once.recall(self.own, given)
            else:
                encoded = self._batch(given, sizes.pop())
        except TypeError:  # of unknown content, so not to be kept
            return self.once.compute(self.own, given)
        return moved(encoded, torch.device(given.get("device") or self.once.device))

    def _batch(self, given: dict[str, Any], size: int) -> Any:  # noqa: ANN401
        samples = [_sample(given, [index], size) for index in range(size)]
        parts = [self.once.recall(self.own, sample) for sample in samples]
        if size == 1:
            return parts[0]
        one, twin = parts[0], self.once.recall(self.own, _sample(given, [0, 0], size))
        mixed = None
        lengths = [_extent(part) for part in parts]
        if len(set(lengths)) > 1:
            ends = [lengths.index(min(lengths)), lengths.index(max(lengths))]
            together = self.once.recall(self.own, _sample(given, ends, size))
            mixed = _Mixed(parts[ends[0]], parts[ends[1]], together)
        if _unlike(_Joiner()([one, one], one, twin, None), twin):
            raise UnjoinableError("two encodings of one prompt")
        return _Joiner()(parts, one, twin, mixed)


class _ImageEncoder:
    """A VAE's `encode`, which keeps the result of every image."""

    def __init__(self, once: EncodeOnce, own: Callable[..., Any]) -> None:
        self.once = once
        self.own = own

    def __call__(self, x: Tensor, return_dict: bool = True) -> Any:  # noqa: ANN401
        parts = [
            moved(self.once.recall(self.own, {"x": part}), x.device) for part in torch.split(x, 1)
        ]
        output = copy.copy(parts[0])
        if hasattr(output, "latent_dist"):
            kind = type(output.latent_dist)
            output.latent_dist = kind(torch.cat([p.latent_dist.parameters for p in parts]))
        else:
            output.latent = torch.cat([part.latent for part in parts])
        return output if return_dict else output.to_tuple()


def fingerprint(content: Any) -> str:  # noqa: ANN401
    """Return a digest of texts, numbers, tensors and pictures, however nested.

    Raises:
        TypeError: If there is something else in it.
    """
    digest = hashlib.sha256()

    def feed(value: Any) -> None:  # noqa: ANN401
        if isinstance(value, Tensor):
            plain = value.detach().cpu().contiguous()
            digest.update(f"{plain.dtype}{tuple(plain.shape)}".encode())
            digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
        elif isinstance(value, Image.Image):
            digest.update(f"{value.mode}{value.size}".encode() + value.tobytes())
        elif isinstance(value, dict | list | tuple):
            digest.update(f"{type(value).__name__}{len(value)}".encode())
            for entry in value.items() if isinstance(value, dict) else value:
                feed(entry)
        elif value is None or isinstance(value, str | int | float | bool | torch.dtype):
            digest.update(repr(value).encode() + b"\0")
        else:
            raise TypeError(f"cannot tell the content of a {type(value).__name__}")

    feed(content)
    return digest.hexdigest()


def moved(value: Any, device: torch.device) -> Any:  # noqa: ANN401
    """Return a copy of an encoding with its tensors, however nested, on the device."""

    def move(leaf: Any) -> Any:  # noqa: ANN401
        if isinstance(leaf, Tensor):
            return leaf.to(device)
        if hasattr(leaf, "parameters") and isinstance(leaf.parameters, Tensor):
            return type(leaf)(leaf.parameters.to(device))  # the distribution of a VAE
        return leaf

    return tree_map(move, value)


def _all(kind: type, values: list[Any]) -> bool:
    return bool(values) and all(isinstance(value, kind) for value in values)


def _spread(name: str, value: Any, signature: inspect.Signature) -> Any:  # noqa: ANN401
    """Yield an argument, or what ``**kwargs`` holds."""
    var_keyword = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
    return value.items() if var_keyword else ((name, value),)


def _sample(given: dict[str, Any], indices: list[int], size: int) -> dict[str, Any]:
    """Return the arguments for some samples of a batch of `size`."""

    def pick(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, list) and len(value) == size:
            return [value[index] for index in indices]
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == size:
            return value[indices]
        return value

    chosen = {name: pick(value) for name, value in given.items()}
    if "batch_size" in chosen:  # HunyuanImage is told how many prompts there are
        chosen["batch_size"] = len(indices)
    return chosen


def _extent(encoding: Any) -> tuple[int, ...]:  # noqa: ANN401
    """Return the sizes of all tensors, so that encodings of one length are equal in it."""
    if isinstance(encoding, Tensor):
        return tuple(encoding.shape)
    if isinstance(encoding, list | tuple):
        return tuple(size for part in encoding for size in _extent(part))
    return ()


def _unlike(found: Any, expected: Any) -> bool:  # noqa: ANN401
    """Whether two encodings differ by more than another batch size makes of rounding."""
    if isinstance(expected, Tensor):
        if found.shape != expected.shape:
            return True
        apart = (found.double() - expected.double()).norm()
        return not bool(apart <= 0.05 * expected.double().norm())
    if isinstance(expected, list | tuple):
        pairs = zip(found, expected, strict=False)
        return len(found) != len(expected) or any(_unlike(*pair) for pair in pairs)
    return bool(found != expected)


class _Mixed(NamedTuple):
    """Encodings of a short and a long prompt, each alone, and of both together."""

    short: Any
    long: Any
    together: Any


class _Joiner:
    """Puts encodings of single prompts together as the pipeline does."""

    def __init__(self) -> None:
        self.lengths: list[int] = []  # of the prompts, once a tensor had to be padded

    def __call__(self, parts: list[Any], one: Any, twin: Any, mixed: _Mixed | None) -> Any:  # noqa: ANN401
        """Return the encoding of a batch.

        Args:
            parts: Encodings of its prompts.
            one: Encoding of any prompt.
            twin: Encoding of that prompt, twice in a call.
            mixed: An example of two lengths, if the parts differ in length.

        Raises:
            UnjoinableError: If what the pipeline does is not understood.
        """
        if isinstance(one, Tensor):
            return self._tensors(parts, one, twin, mixed)
        if isinstance(one, list | tuple):
            if one and len(twin) == 2 * len(one):  # a list with one entry a prompt
                return type(one)(entry for part in parts for entry in part)
            if any(len(each) != len(one) for each in [twin, *parts]):
                raise UnjoinableError("lists of different length")
            examples: Any = [None] * len(one)
            if mixed is not None:
                examples = [_Mixed(*column) for column in zip(*mixed, strict=True)]
            columns = zip(zip(*parts, strict=True), one, twin, examples, strict=True)
            return type(one)(self(list(column), *rest) for column, *rest in columns)
        if one is None and mixed is not None and isinstance(mixed.together, Tensor):
            return self._masks(mixed.together)
        if any(part != one for part in [twin, *parts]):
            raise UnjoinableError(f"{one!r} is not common to all prompts")
        return one

    def _tensors(
        self, parts: list[Tensor], one: Tensor, twin: Tensor, mixed: _Mixed | None
    ) -> Tensor:
        if twin.shape == one.shape:  # nothing of the batch in it, such as the text's positions
            if any(not torch.equal(each, one) for each in [twin, *parts]):
                raise UnjoinableError("a tensor without a batch differs between prompts")
            return one
        sizes = [
            (axis, 2 * a == b)
            for axis, (a, b) in enumerate(zip(one.shape, twin.shape, strict=True))
            if a != b
        ]
        if len(sizes) != 1 or not sizes[0][1]:
            raise UnjoinableError(f"{tuple(one.shape)} becomes {tuple(twin.shape)}")
        batch = sizes[0][0]
        if any(part.shape != parts[0].shape for part in parts):
            assert mixed is not None
            parts = self._padded(parts, batch, mixed)
        return torch.cat(parts, batch)

    def _padded(self, parts: list[Tensor], batch: int, mixed: _Mixed) -> list[Tensor]:
        """Pad to the longest as the shorter prompt of the example was."""
        short, long, together = mixed
        axes = [axis for axis in range(short.ndim) if short.shape[axis] != long.shape[axis]]
        if len(axes) != 1 or together.shape[axes[0]] != long.shape[axes[0]]:
            raise UnjoinableError("padded in more ways than to the longest prompt")
        axis, n, width = axes[0], short.shape[axes[0]], long.shape[axes[0]]
        row = together.narrow(batch, 0, short.shape[batch])
        for left in (False, True):
            kept = row.narrow(axis, width - n if left else 0, n)
            filled = row.narrow(axis, 0 if left else n, width - n)
            value = filled.flatten()[0]
            if not _unlike(kept, short) and bool((filled == value).all()):
                break
        else:
            raise UnjoinableError("what a prompt is padded with depends on the prompt")
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
            raise UnjoinableError("a mask that is not understood")
        kept = torch.arange(max(self.lengths)) < torch.tensor(self.lengths).unsqueeze(1)
        return torch.where(kept, long[0], short[-1])
