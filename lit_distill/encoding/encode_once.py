"""Caches a pipeline's encoders: each prompt and each image is encoded only once.

The cache works for any family, whatever its encoders take and return. A call for B samples becomes
B calls for one sample. Their results are stored and collated to a batch by rules learned from the
pipeline itself (`encoding.collate`).
"""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_distill.data.filesystem import content_digest
from lit_distill.data.images import read_image
from lit_distill.encoding.collate import (
    CollateExample,
    EncodingCollateError,
    EncodingCollator,
    MixedLengths,
    encodings_differ,
    tensor_sizes,
    to_device,
)
from lit_distill.encoding.fingerprint import encoders_digest, fingerprint
from lit_distill.encoding.store import EncodingStore, LostEncodingError
from lit_distill.errors import InputError
from lit_distill.pipelines.components import (
    denoisers,
    replace_component,
    replaced_components,
    weightless_copy,
)
from lit_distill.pipelines.latent_codec import has_frames, vae_encode
from lit_distill.pipelines.rollout import run_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class EncodeOnce:
    """Caches a pipeline's `encode_prompt`, `encode_image` and `vae.encode`.

    Args:
        pipe: A pipeline. Those of the methods that it has are replaced on the instance.
        store: Stores the encodings; default: in memory.
        whole_batches: Keep the encodings of batches as they are, instead of those of each sample.
            Bit for bit those of the pipeline's call, for a batch that is encoded once.

    Attributes:
        namespace: Digest of the encoders, part of every key, so that several models can share a
            folder. Empty for a store in memory.
        released: Whether the encoders have been freed, so that only stored encodings are available.
        not_stored: Why an encoding could not be stored; None: all could.
    """

    def __init__(
        self,
        pipe: DiffusionPipeline,
        store: EncodingStore | None = None,
        *,
        whole_batches: bool = False,
    ) -> None:
        self.pipe = pipe
        self.whole_batches = whole_batches
        self.store = EncodingStore() if store is None else store
        self.released = False
        self.not_stored: str | None = None
        self._keys: set[str] | None = None  # of the encodings of a call, see populate
        self.namespace = "" if self.store.folder is None else encoders_digest(pipe)
        for name in ("encode_prompt", "encode_image"):
            if callable(getattr(pipe, name, None)):
                setattr(pipe, name, _CachedEncoder(self, getattr(pipe, name)))
        vae: Any = getattr(pipe, "vae", None)
        if hasattr(vae, "encode"):
            vae.encode = _CachedVAEEncoder(self, vae.encode)

    def cache_image(self, path: str) -> None:
        """Store the VAE's encoding of an image file, under the digest of its content."""
        key = image_key(self.namespace, path)
        if key not in self.store:
            vae: Any = self.pipe.vae
            image = read_image(path).unsqueeze(0)
            # The original method: the cached one would store the encoding a second time.
            original = vae.encode.original
            self.store[key] = vae_encode(vae, image, frames=has_frames(vae), encode=original)

    def key(self, *content: Any) -> str:  # noqa: ANN401
        """Return the key under which the encoding of `content` by this pipeline is stored."""
        return fingerprint((self.namespace, content))

    def get_or_encode(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        """Return the result of an encoder, in host memory: the stored one if there is one.

        Args:
            original: The pipeline's method.
            arguments: Its arguments, by name.

        Raises:
            TypeError: If an argument is of a kind that can't be part of a key.
        """
        content = {name: value for name, value in sorted(arguments.items()) if name != "device"}
        key = self.key(original.__name__, content)
        if self._keys is not None:
            self._keys.add(key)
        if key in self.store:
            try:
                return self.store[key]
            except LostEncodingError as error:
                if self.released:
                    raise lost(error) from error
                warnings.warn(f"{error}: its content is encoded again", stacklevel=2)
        encoded = to_device(self.encode(original, arguments), torch.device("cpu"))
        try:
            self.store[key] = encoded
        except TypeError as error:  # no type that can be stored
            self.not_stored = f"{original.__name__}: {error}"
        return encoded

    def encode(self, original: Callable[..., Any], arguments: dict[str, Any]) -> Any:  # noqa: ANN401
        """Call an encoder as in inference, without gradients and without the trainer's autocast.

        Raises:
            RuntimeError: If the encoders have been released.
        """
        if self.released:
            texts = {name: value for name, value in arguments.items() if "prompt" in name and value}
            raise RuntimeError(
                f"the encoders are released, but {original.__name__} was called with {texts}"
            )
        with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
            return original(**arguments)

    @property
    def device(self) -> torch.device:
        """The device on which the pipeline runs."""
        return torch.device(self.pipe._execution_device)

    def populate(self, *, cfg_scale: float, **arguments: Any) -> set[str]:  # noqa: ANN401
        """Store all encodings that a call of the pipeline needs, without calling the denoisers.

        Args:
            cfg_scale: Guidance of the call.
            **arguments: Its other arguments, as for `run_pipeline`.

        Returns:
            The keys of these encodings.
        """

        def stop(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
            raise _ReachedError

        originals = denoisers(self.pipe)
        modules = [c for c in self.pipe.components.values() if isinstance(c, nn.Module)]
        weights = (p for m in modules if m not in originals.values() for p in m.parameters())
        device = next(weights, torch.empty(0)).device
        # A pipeline runs on the device of its first module, which may be a denoiser; the encoders
        # may be on another device.
        copies = {name: weightless_copy(each, device) for name, each in originals.items()}
        for denoiser in copies.values():
            denoiser.forward = stop
        keys: set[str] = set()
        self._keys = keys
        try:
            with replaced_components(self.pipe, **copies), suppress(_ReachedError), torch.no_grad():
                run_pipeline(self.pipe, cfg_scale=cfg_scale, output_type="latent", **arguments)
        finally:
            self._keys = None
        return keys

    def release(self, device: torch.device) -> Any:  # noqa: ANN401
        """Free all modules except the denoisers; weightless copies stay in the pipeline.

        Args:
            device: Device of the copies' buffers.

        Returns:
            The VAE, in host memory, or None.
        """
        vae = getattr(self.pipe, "vae", None)
        for name, component in self.pipe.components.items():
            if isinstance(component, nn.Module) and name not in denoisers(self.pipe):
                replace_component(self.pipe, name, weightless_copy(component, device))
        self.released = True
        return None if vae is None else vae.cpu()


@contextmanager
def forgotten_encodings(pipe: DiffusionPipeline) -> Iterator[None]:
    """Forget on exit what `EncodeOnce` has encoded meanwhile; what is in a folder stays."""
    encoders = [e for e in vars(pipe).values() if isinstance(e, _CachedEncoder)]
    kept = [(e, e.examples, e.cache.store) for e in encoders if e.cache.store.folder is None]
    for encoder, examples, _ in kept:
        encoder.examples, encoder.cache.store = dict(examples), EncodingStore()
    try:
        yield
    finally:
        for encoder, examples, store in kept:
            encoder.examples, encoder.cache.store = examples, store


def image_key(namespace: str, path: str) -> str:
    """Return the key of an image file, which depends on its content only."""
    return fingerprint((namespace, "image", content_digest(path)))


def encoded_image(store: EncodingStore, namespace: str, path: str) -> Tensor:
    """Return the encoding that `EncodeOnce.cache_image` has stored, (C, h, w) or (C, 1, h, w).

    Raises:
        InputError: If the file has changed since, or the encoding can't be read any more.
    """
    key = image_key(namespace, path)
    if key not in store:
        raise InputError(f"{path} has changed since training began")
    try:
        latents: Tensor = store[key]
    except LostEncodingError as error:
        raise lost(error) from error
    return latents[0]


def lost(error: LostEncodingError) -> InputError:
    """Return the error for an encoding that is lost after the encoders have been freed."""
    return InputError(f"{error}; start training again: its content is then encoded again")


class _ReachedError(Exception):
    """The pipeline has called a denoiser, so all encodings are stored."""


class _CachedEncoder:
    """Replaces a method of a pipeline that encodes prompts, pictures or both."""

    def __init__(self, cache: EncodeOnce, original: Callable[..., Any]) -> None:
        self.cache = cache
        self.original = original
        self.__name__ = original.__name__
        self.__signature__ = inspect.signature(original)  # pipelines inspect it for arguments
        self.examples: dict[str, CollateExample] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        """Return what the pipeline's method returns."""
        bound = self.__signature__.bind(*args, **kwargs).arguments
        arguments = {
            name: value
            for parameter, bound_value in bound.items()
            for name, value in _named_arguments(parameter, bound_value, self.__signature__)
        }
        texts = [v for v in arguments.values() if _is_list_of_str(v)]
        sizes = {len(value) for value in texts}
        has_embeds = any("embeds" in k and v is not None for k, v in arguments.items())
        try:
            if len(sizes) != 1 or has_embeds or self.cache.whole_batches:
                encoded = self.cache.get_or_encode(self.original, arguments)
            else:
                encoded = self._encode_batch(arguments, sizes.pop())
        except TypeError as error:  # an argument that can't be part of a key
            self.cache.not_stored = f"{self.__name__}: {error}"
            encoded = self.cache.encode(self.original, arguments)
        return to_device(encoded, torch.device(arguments.get("device") or self.cache.device))

    def _encode_batch(self, arguments: dict[str, Any], size: int) -> Any:  # noqa: ANN401
        samples = [_select_samples(arguments, [index], size) for index in range(size)]
        encodings = [self.cache.get_or_encode(self.original, sample) for sample in samples]
        if size == 1:
            return encodings[0]
        # One example for each set of common arguments. It is kept for when the encoders are freed.
        common = {k: v for k, v in samples[0].items() if k != "device" and v is arguments.get(k)}
        example = self.examples.setdefault(fingerprint(common), CollateExample())
        if example.doubled is None:
            self._learn_doubled(example, encodings[0], _select_samples(arguments, [0, 0], size))
        lengths = [tensor_sizes(encoding) for encoding in encodings]
        if len(set(lengths)) > 1 and example.mixed is None:
            short, long = lengths.index(min(lengths)), lengths.index(max(lengths))
            both = _select_samples(arguments, [short, long], size)
            together = self.cache.get_or_encode(self.original, both)
            example.mixed = MixedLengths(encodings[short], encodings[long], together)
        mixed = example.mixed if len(set(lengths)) > 1 else None
        return EncodingCollator()(encodings, example.single, example.doubled, mixed)

    def _learn_doubled(self, example: CollateExample, single: Any, twice: dict[str, Any]) -> None:  # noqa: ANN401
        doubled = self.cache.get_or_encode(self.original, twice)
        collated = EncodingCollator()([single, single], single, doubled, None)
        if encodings_differ(collated, doubled):
            raise EncodingCollateError("two encodings of one prompt")
        example.single, example.doubled = single, doubled


class _CachedVAEEncoder:
    """Replaces a VAE's `encode` and stores the encoding of each image."""

    def __init__(self, cache: EncodeOnce, original: Callable[..., Any]) -> None:
        self.cache = cache
        self.original = original

    def __call__(self, x: Tensor, return_dict: bool = True) -> Any:  # noqa: ANN401
        outputs = [
            to_device(self.cache.get_or_encode(self.original, {"x": image}), x.device)
            for image in torch.split(x, len(x) if self.cache.whole_batches else 1)
        ]
        output = copy.copy(outputs[0])
        if hasattr(output, "latent_dist"):
            distribution = type(output.latent_dist)
            parameters = torch.cat([each.latent_dist.parameters for each in outputs])
            output.latent_dist = distribution(parameters)
        else:
            for name in output:  # of a field: they are dictionaries
                output[name] = torch.cat([each[name] for each in outputs])
        return output if return_dict else output.to_tuple()


def _is_list_of_str(value: Any) -> bool:  # noqa: ANN401
    if not isinstance(value, list) or not value:
        return False
    return all(isinstance(entry, str) for entry in value)


def _named_arguments(name: str, value: Any, signature: inspect.Signature) -> Any:  # noqa: ANN401
    """Return the (name, value) pairs of a bound argument: several for ``**kwargs``."""
    var_keyword = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
    return value.items() if var_keyword else ((name, value),)


def _select_samples(arguments: dict[str, Any], indices: list[int], size: int) -> dict[str, Any]:
    """Return the arguments for some samples of a batch of `size`."""

    def pick(value: Any) -> Any:  # noqa: ANN401
        if isinstance(value, list) and len(value) == size:
            return [value[index] for index in indices]
        if isinstance(value, Tensor) and value.ndim > 1 and len(value) == size:
            return value[indices]
        return value

    selected = {name: pick(value) for name, value in arguments.items()}
    if "batch_size" in selected:  # HunyuanImage takes the number of prompts as an argument
        selected["batch_size"] = len(indices)
    return selected
