"""Converts between images and the final latents of a rollout, for any pipeline.

Between the last `scheduler.step` and `vae.decode` each family post-processes the latents in its own
way: it unpacks tokens, divides by a scaling factor, adds a shift, applies a mean and a standard
deviation per channel. In all families this is a permutation of the elements followed by an affine
map of each element. So a few probe tensors sent through the pipeline determine the map exactly, and
it can be inverted.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lit_distill.errors import InputError
from lit_distill.pipelines.components import compute_device, denoisers, replaced_components
from lit_distill.pipelines.guidance import guidance
from lit_distill.pipelines.hooks import (
    LoopState,
    observed_scheduler,
    replaced_forward,
    undecorated_call,
)

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class LatentCodec:
    """Encodes images to final latents of a rollout and decodes them, at one resolution.

    Learning the map calls the pipeline a few times with two steps. The denoiser is evaluated once.

    Args:
        pipe: A pipeline with a component ``vae``.
        **call_kwargs: Arguments of the pipeline's `__call__` for one sample: ``prompt`` (any text;
            default ""), and ``height`` and ``width`` to set the resolution.

    Raises:
        ValueError: If the pipeline has no ``vae``, or its post-processing is not a permutation of
            the elements followed by an affine map of each.

    Examples:
        >>> from lit_distill import LatentCodec, load_pipeline
        >>> codec = LatentCodec(load_pipeline("tiny-digits"), height=32, width=32)
        >>> codec.encode(torch.rand(2, 3, 32, 32)).shape
        torch.Size([2, 16, 16])
    """

    def __init__(self, pipe: DiffusionPipeline, **call_kwargs: Any) -> None:  # noqa: ANN401
        self.pipe = pipe
        if getattr(pipe, "vae", None) is None:
            raise InputError(f"{type(pipe).__name__} has no component `vae` to encode images with")
        postprocess = _PostProcessing(pipe, {"prompt": "", **call_kwargs})
        with torch.no_grad():
            self._learn(postprocess)
        self.latent_shape = postprocess.latent_shape
        self._check_sides(call_kwargs.get("height"), call_kwargs.get("width"))

    def _check_sides(self, height: int | None, width: int | None) -> None:
        """Check that the pipeline does not crop or round the size: the target would not match."""
        if height is None or width is None:
            return
        rows, columns = self.z_shape[-2:]
        if height % rows or width % columns or height // rows != width // columns:
            raise InputError(
                f"{type(self.pipe).__name__} can't generate {height}x{width} pixels (height x "
                f"width): its latents would be {rows}x{columns}; both sides must be multiples of "
                "what the pipeline needs"
            )

    @property
    def vae(self) -> Any:  # noqa: ANN401
        """The pipeline's VAE."""
        return self.pipe.vae

    def _learn(self, postprocess: _PostProcessing) -> None:
        """Find z[j] = scale[j] * x[source[j]] + shift[j] and check it on random latents."""
        size = postprocess.latent_shape.numel()
        self.shift = postprocess(torch.zeros(size))
        self.scale = postprocess(torch.ones(size)) - self.shift
        self.z_shape = postprocess.z_shape
        name = type(self.pipe).__name__
        if self.shift.numel() != size or not (self.scale != 0).all():
            raise InputError(
                f"{name}: the map from final latents {tuple(postprocess.latent_shape)} to the "
                f"VAE's input {tuple(self.z_shape)} is not one to one; store the teacher's exact "
                "latents (column `latents`) instead of images"
            )
        # Positions are sent in two numbers below 1000, which single precision represents exactly.
        position = torch.arange(size)
        low = postprocess((position % 1000).double())
        high = postprocess((position // 1000).double())
        digits = [((z - self.shift) / self.scale).round().long() for z in (low, high)]
        self.source = (digits[0] + 1000 * digits[1]).clamp(0, size - 1)
        probe = torch.randn(size, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        expected = self.scale * probe[self.source] + self.shift
        error = (postprocess(probe) - expected).abs().max() / expected.abs().max()
        if not error < 1e-5 or not torch.equal(self.source.sort().values, position):
            raise InputError(
                f"{name}: the map from final latents to the VAE's input is not a permutation and "
                f"an affine map (relative error {error:.1e} on random latents); store the "
                "teacher's exact latents (column `latents`) instead of images"
            )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Return the latents that decode to `images`, up to the error of the VAE.

        The mode of the encoder's distribution is used, so that targets contain no noise.

        Args:
            images: (B, 3, height, width), range [0, 1], of the codec's resolution.

        Returns:
            (B, *latent_shape), float32, in the space of `rollout`'s result.

        Raises:
            ValueError: If the images are not of the codec's resolution.
        """
        try:
            return self.pack(vae_encode(self.vae, images, frames=len(self.z_shape) == 4))
        except ValueError as error:
            height, width = images.shape[-2:]
            raise InputError(f"of {height}x{width} pixels (height x width): {error}") from None

    def pack(self, z: Tensor) -> Tensor:
        """Convert the result of `vae_encode` to final latents.

        Args:
            z: (B, C, h, w), or with one frame (B, C, 1, h, w).

        Returns:
            (B, *latent_shape), float32, in the space of `rollout`'s result.

        Raises:
            ValueError: If the images were not of the codec's resolution.
        """
        if z.shape[1:] != self.z_shape:
            raise InputError(
                f"images that encode to {tuple(z.shape[1:])}, but the pipeline generates "
                f"{tuple(self.z_shape)} at this resolution; both sides must be multiples of what "
                "the pipeline needs"
            )
        shift, scale, source = self._map(z.device)
        flat = torch.empty(len(z), source.numel(), device=z.device)
        flat[:, source] = (z.flatten(1).float() - shift) / scale
        return flat.view(-1, *self.latent_shape)

    def unpack(self, latents: Tensor) -> Tensor:
        """Convert final latents to the input of ``vae.decode``, the inverse of `pack`.

        Args:
            latents: (B, *latent_shape), as `rollout` returns them.

        Returns:
            (B, C, h, w), or with one frame (B, C, 1, h, w), float32.
        """
        shift, scale, source = self._map(latents.device)
        z = scale * latents.flatten(1).float()[:, source] + shift
        return z.view(-1, *self.z_shape)

    def decode(self, latents: Tensor) -> Tensor:
        """Decode final latents to images, differentiably if gradients are enabled.

        Args:
            latents: (B, *latent_shape), as `rollout` returns them.

        Returns:
            (B, 3, height, width), float32, range [0, 1].
        """
        device = compute_device(self.vae)
        z = self.unpack(latents).to(device, self.vae.dtype)
        with torch.autocast(device.type, enabled=False):
            pixels = self.vae.decode(z, return_dict=False)[0]
        if len(self.z_shape) == 4:
            pixels = pixels[:, :, 0]
        images: Tensor = (pixels.float() / 2 + 0.5).clamp(0, 1)
        return images

    def _map(self, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
        return self.shift.float().to(device), self.scale.float().to(device), self.source.to(device)


@torch.no_grad()
def vae_encode(
    vae: Any,  # noqa: ANN401
    images: Tensor,
    *,
    frames: bool,
    encode: Callable[[Tensor], Any] | None = None,
) -> Tensor:
    """Encode images with a VAE and return the mode of its distribution, without noise.

    Args:
        vae: A VAE of diffusers.
        images: (B, 3, height, width), range [0, 1].
        frames: Whether it is a video VAE, to which an image is a video of one frame.
        encode: Used instead of the VAE's `encode`.

    Returns:
        (B, C, h, w), or with one frame (B, C, 1, h, w), in the VAE's data type.
    """
    device = compute_device(vae)
    pixels = images.to(device, vae.dtype) * 2 - 1
    with torch.autocast(device.type, enabled=False):
        output = (encode or vae.encode)(pixels.unsqueeze(2) if frames else pixels)
    # AutoencoderDC is deterministic and has no distribution.
    z: Tensor = output.latent_dist.mode() if hasattr(output, "latent_dist") else output.latent
    return z


def has_frames(vae: Any) -> bool:  # noqa: ANN401
    """Whether a VAE's encoder takes videos, (B, 3, frames, height, width)."""
    encoder = getattr(vae, "encoder", vae)
    return any(isinstance(module, nn.Conv3d) for module in encoder.modules())


class _PostProcessing:
    """The code of a pipeline between its last `scheduler.step` and `vae.decode`, as a function.

    It takes the final latents of one sample, flattened, and returns the VAE's input, flattened,
    float64, on the CPU.
    """

    def __init__(self, pipe: DiffusionPipeline, call_kwargs: dict[str, Any]) -> None:
        self.pipe = pipe
        self.call_kwargs = call_kwargs
        self.latent_shape = torch.Size()
        self.z_shape = torch.Size()
        self._prediction: Any = None
        self(torch.zeros(1))  # sets the shapes

    def __call__(self, latents: Tensor) -> Tensor:
        vae = _CapturingVAE(self.pipe.vae)

        def on_step(state: LoopState, sample: Tensor) -> Tensor:
            if state.done < state.total - 1:
                return sample
            self.latent_shape = sample.shape[1:]
            # Single precision whatever the pipeline's data type: it represents the positions
            # exactly, and Z-Image requires it.
            probe = latents.to(sample.device, torch.float32)
            if probe.numel() == 1:
                return probe.expand(sample.shape)
            return probe.view(sample.shape)

        with ExitStack() as stack:
            no_guidance = stack.enter_context(guidance(self.pipe, 1.0, 1, self.call_kwargs))
            stack.enter_context(observed_scheduler(self.pipe, on_step))
            for denoiser in denoisers(self.pipe).values():
                stack.enter_context(replaced_forward(denoiser, self._predict_once(denoiser)))
            stack.enter_context(replaced_components(self.pipe, vae=vae))
            try:
                # Two steps because PixArt-alpha and Mochi take another path with one.
                undecorated_call(self.pipe)(
                    num_inference_steps=2,
                    generator=[torch.Generator().manual_seed(0)],
                    output_type="pt",
                    return_dict=False,
                    **self.call_kwargs,
                    **no_guidance,
                )
            except _CapturedError as captured:
                self.z_shape = captured.z.shape[1:]
                return captured.z.double().flatten().cpu()
        raise InputError(f"{type(self.pipe).__name__} never called vae.decode")

    def _predict_once(self, denoiser: torch.nn.Module) -> Any:  # noqa: ANN401
        forward = denoiser.forward

        def predict(*args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            if self._prediction is None:
                self._prediction = forward(*args, **kwargs)
            return self._prediction

        return predict


class _CapturedError(Exception):
    """Carries the VAE's input out of a running pipeline."""

    def __init__(self, z: Tensor) -> None:
        self.z = z


class _CapturingVAE:
    """Replaces a VAE: its dtype is double precision, and `decode` stops the pipeline."""

    dtype = torch.float64

    def __init__(self, vae: torch.nn.Module) -> None:
        self._vae = vae

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        return getattr(self._vae, name)

    def decode(self, z: Tensor, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        raise _CapturedError(z)
