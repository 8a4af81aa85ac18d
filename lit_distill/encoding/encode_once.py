"""Prompts and images encoded once: the pipeline's own encoders answer from memory.

Nothing is known of what a family's encoders take or return. A call for B samples becomes B calls
for one, whose results are kept and put together again. How, is learned from the
pipeline: one prompt encoded twice in a call shows what carries the batch, and two prompts of
different length show how the shorter one is padded.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_distill.data.filesystem import file_signature
from lit_distill.data.images import read_image
from lit_distill.encoding.collate import (
    CollateExample,
    EncodingCollateError,
    EncodingCollator,
    MixedLengths,
    differ,
    tensor_sizes,
    to_device,
)
from lit_distill.encoding.fingerprint import fingerprint, weights_summary
from lit_distill.encoding.store import EncodingStore
from lit_distill.pipelines.components import denoisers, weightless_copy
from lit_distill.pipelines.latent_codec import has_frames, vae_encode
from lit_distill.pipelines.rollout import run_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class EncodeOnce:
    """Takes the place of a pipeline's `encode_prompt`, `encode_image` and `vae.encode`.

    Args:
        pipe: A pipeline; the methods are replaced on the instance, where it has them.
        store: Where encodings are kept; default: in memory.
    """

    def __init__(self, pipe: DiffusionPipeline, store: EncodingStore | None = None) -> None:
        self.pipe = pipe
        self.store = EncodingStore() if store is None else store
        self.released = False
        self.identity = ""
        if self.store.folder is not None:  # shared with other models
            models = {
                name: weights_summary(component)
                for name, component in pipe.components.items()
                if isinstance(component, nn.Module) and name not in denoisers(pipe)
            }
            versions = [version(name) for name in ("diffusers", "transformers", "torch")]
            self.identity = fingerprint([type(pipe).__name__, versions, models])
        for name in ("encode_prompt", "encode_image"):
            if callable(getattr(pipe, name, None)):
                setattr(pipe, name, _Encoder(self, getattr(pipe, name)))
        vae: Any = getattr(pipe, "vae", None)
        if hasattr(vae, "encode"):
            vae.encode = _ImageEncoder(self, vae.encode)

    def image_latents(self, path: str) -> None:
        """Keep what the VAE makes of an image file, to be found again by its name and date."""
        key = image_key(self.identity, path)
        if key not in self.store:
            vae: Any = self.pipe.vae
            own = vae.encode.own  # past the memory of single images: they are kept here
            image = read_image(path).unsqueeze(0)
            self.store[key] = vae_encode(vae, image, frames=has_frames(vae), encode=own)

    def key(self, *content: Any) -> str:  # noqa: ANN401
        """Return the key under which something that these encoders make of `content` is kept."""
        return fingerprint((self.identity, content))

    def recall(self, own: Callable[..., Any], given: dict[str, Any]) -> Any:  # noqa: ANN401
        """Return what `own` returns for the arguments, in host memory; computed at most once.

        Raises:
            TypeError: If an argument's content can't be told, so that nothing can be kept.
        """
        content = {name: value for name, value in sorted(given.items()) if name != "device"}
        key = self.key(own.__name__, content)
        if key not in self.store:
            self.store[key] = self.compute(own, given)
        return self.store[key]

    def compute(self, own: Callable[..., Any], given: dict[str, Any]) -> Any:  # noqa: ANN401
        """Return what `own` returns, as in inference: a trainer's autocast must not reach it.

        Raises:
            RuntimeError: If the encoders have been released.
        """
        if self.released:
            texts = {name: value for name, value in given.items() if "prompt" in name and value}
            raise RuntimeError(
                f"the encoders are released, but {own.__name__} was to encode {texts}"
            )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return own(**given)

    @property
    def device(self) -> torch.device:
        """Where the pipeline runs."""
        return torch.device(self.pipe._execution_device)

    def rehearse(self, *, cfg_scale: float, **arguments: Any) -> None:  # noqa: ANN401
        """Run the pipeline up to its first denoiser call, so that all encodings of it are kept."""

        def stop(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            raise _ReachedError

        own = denoisers(self.pipe)
        encoders = [c for c in self.pipe.components.values() if isinstance(c, nn.Module)]
        weights = (p for c in encoders if c not in own.values() for p in c.parameters())
        device = next(weights, torch.empty(0)).device
        for name, denoiser in own.items():
            # The denoiser need not be where the encoders are; pipelines run where their first is.
            stand_in = weightless_copy(denoiser, device)
            stand_in.forward = stop
            self.pipe.__dict__[name] = stand_in
        try:
            with suppress(_ReachedError), torch.no_grad():
                run_pipeline(self.pipe, cfg_scale=cfg_scale, output_type="latent", **arguments)
        finally:
            self.pipe.__dict__.update(own)

    def release(self, device: torch.device) -> Any:  # noqa: ANN401
        """Let go of everything but the denoisers; shells stay in the pipeline.

        A shell has its model's configuration, modules and buffers, and no weights.

        Returns:
            The VAE, in host memory, or None.
        """
        vae = getattr(self.pipe, "vae", None)
        for name, component in self.pipe.components.items():
            if isinstance(component, nn.Module) and name not in denoisers(self.pipe):
                self.pipe.__dict__[name] = weightless_copy(component, device)
        self.released = True
        return None if vae is None else vae.cpu()


def image_key(identity: str, path: str) -> str:
    """Return the key of an image file, as long as it is the same."""
    return fingerprint((identity, "image", file_signature(path)))


def encoded_image(store: EncodingStore, identity: str, path: str) -> Tensor:
    """Return what `EncodeOnce.image_latents` has kept of a file, (C, h, w) or (C, 1, h, w).

    Raises:
        ValueError: If the file has changed since.
    """
    key = image_key(identity, path)
    if key not in store:
        raise ValueError(f"{path} has changed since training began")
    latents: Tensor = store[key]
    return latents[0]


class _ReachedError(Exception):
    """The pipeline has encoded all it needs."""


class _Encoder:
    """A method of a pipeline that encodes prompts, images or both."""

    def __init__(self, once: EncodeOnce, own: Callable[..., Any]) -> None:
        self.once = once
        self.own = own
        self.__name__ = own.__name__
        self.__signature__ = inspect.signature(own)  # pipelines look for arguments in it
        self.examples: dict[str, CollateExample] = {}

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
        return to_device(encoded, torch.device(given.get("device") or self.once.device))

    def _batch(self, given: dict[str, Any], size: int) -> Any:  # noqa: ANN401
        samples = [_sample(given, [index], size) for index in range(size)]
        parts = [self.once.recall(self.own, sample) for sample in samples]
        if size == 1:
            return parts[0]
        # Learned once for each way of calling, so that it is there when the encoders are not.
        common = {k: v for k, v in samples[0].items() if k != "device" and v is given.get(k)}
        example = self.examples.setdefault(fingerprint(common), CollateExample())
        if example.twin is None:
            twin = self.once.recall(self.own, _sample(given, [0, 0], size))
            if differ(EncodingCollator()([parts[0], parts[0]], parts[0], twin, None), twin):
                raise EncodingCollateError("two encodings of one prompt")
            example.one, example.twin = parts[0], twin
        lengths = [tensor_sizes(part) for part in parts]
        if len(set(lengths)) > 1 and example.mixed is None:
            ends = [lengths.index(min(lengths)), lengths.index(max(lengths))]
            together = self.once.recall(self.own, _sample(given, ends, size))
            example.mixed = MixedLengths(parts[ends[0]], parts[ends[1]], together)
        mixed = example.mixed if len(set(lengths)) > 1 else None
        return EncodingCollator()(parts, example.one, example.twin, mixed)


class _ImageEncoder:
    """A VAE's `encode`, which keeps the result of every image."""

    def __init__(self, once: EncodeOnce, own: Callable[..., Any]) -> None:
        self.once = once
        self.own = own

    def __call__(self, x: Tensor, return_dict: bool = True) -> Any:  # noqa: ANN401
        parts = [
            to_device(self.once.recall(self.own, {"x": part}), x.device)
            for part in torch.split(x, 1)
        ]
        output = copy.copy(parts[0])
        if hasattr(output, "latent_dist"):
            kind = type(output.latent_dist)
            output.latent_dist = kind(torch.cat([p.latent_dist.parameters for p in parts]))
        else:
            output.latent = torch.cat([part.latent for part in parts])
        return output if return_dict else output.to_tuple()


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
