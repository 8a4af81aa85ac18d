"""Trains the autoencoder of the "tiny-words" pipeline."""

import copy
from pathlib import Path
from unittest import mock

import torch
from diffusers import AutoencoderKLQwenImage
from tiny_words import WordPictures
from tiny_words_export import autoencoder_report
from tiny_words_parts import build_vae, drop_dead_channels
from tiny_words_stages import Stage
from torch import Tensor, nn


def autoencoder_loss(
    vae: AutoencoderKLQwenImage,
    batch: Tensor,
    generator: torch.Generator,
    cycle: float,
    off: float = 0.15,
) -> Tensor:
    """Returns the loss of reconstructing a batch and, weighted, of encoding what was decoded.

    The second makes what a latent holds visible in the picture, also a little off the latents of
    real pictures, where generated ones lie: up to `off` of their standard deviation.
    """
    posterior = vae.encode(batch).latent_dist
    spread = posterior.mean.detach().std(dim=(0, 2, 3, 4), keepdim=True)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    level = off * torch.rand(len(batch), 1, 1, 1, 1, generator=generator) * spread
    latents = posterior.mean + noise * (posterior.std.square() + level.square()).sqrt()
    decoded = vae.decode(latents).sample
    error = decoded - batch
    kl = 0.5 * (posterior.mean.square() + posterior.var - 1 - posterior.logvar).mean()
    loss: Tensor = error.abs().mean() + 0.5 * error.square().mean() + 1e-4 * kl
    if cycle:
        again = vae.encode(decoded).latent_dist.mean
        loss = loss + cycle * ((again - latents) / spread).square().mean()
    return loss


def train_vae(pictures: WordPictures, path: Path, minutes: float) -> AutoencoderKLQwenImage:
    """Trains the autoencoder, and takes out channels that it doesn't use."""
    torch.manual_seed(0)
    vae = build_vae()
    fresh = pictures.sample(256, torch.Generator().manual_seed(1), held_out=True)[0].unsqueeze(2)

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        batch = pictures.sample(16, generator)[0].unsqueeze(2)
        # The pictures come first, or latents of no use are the easiest to repeat.
        return autoencoder_loss(vae, batch, generator, cycle=0.3 if step >= 1_200 else 0)

    optimizer = torch.optim.AdamW(vae.parameters(), 4e-3)
    stage = Stage(path, vae, [optimizer], minutes, seed=2)
    stage.run(loss_of, lambda average: autoencoder_report(average, fresh))
    with torch.no_grad():
        return drop_dead_channels(vae, vae.encode(fresh).latent_dist.mode().squeeze(2))


def train_decoder(
    vae: AutoencoderKLQwenImage, pictures: WordPictures, path: Path, minutes: float
) -> None:
    """Trains the decoder on, against the encoder as it is.

    Pictures become crisper, and are encoded again as the latents that they were decoded from.
    """
    vae.requires_grad_(False)
    parts = nn.ModuleList([vae.post_quant_conv, vae.decoder]).requires_grad_(True)
    fresh = pictures.sample(256, torch.Generator().manual_seed(1), held_out=True)[0].unsqueeze(2)

    def loss_of(_: int, generator: torch.Generator) -> Tensor:
        batch = pictures.sample(16, generator)[0].unsqueeze(2)
        return autoencoder_loss(vae, batch, generator, cycle=2, off=0.3)

    def report(average: nn.ModuleList) -> str:
        with mock.patch.multiple(vae, post_quant_conv=average[0], decoder=average[1]):
            return autoencoder_report(vae, fresh)

    optimizer = torch.optim.AdamW(parts.parameters(), 2e-3)
    Stage(path, parts, [optimizer], minutes, seed=3).run(loss_of, report)
    vae.requires_grad_(False)


def finish_autoencoder(
    vae: AutoencoderKLQwenImage,
    pictures: WordPictures,
    path: Path,
    minutes: float,
    generated: Tensor,
) -> None:
    """Trains the autoencoder on, to encode what the pipeline generates as it was generated.

    Generated latents are no encoding of any picture, so that an autoencoder of pictures alone loses
    what is particular to them. The latents of pictures stay what the denoiser has learned.

    Args:
        vae: The autoencoder.
        pictures: What it is trained on, every other batch.
        path: The checkpoint.
        minutes: The budget.
        generated: Latents (N, C, 1, height, width) that the pipeline generates, for the others.
    """
    before = copy.deepcopy(vae.encoder), copy.deepcopy(vae.quant_conv)
    fresh = pictures.sample(256, torch.Generator().manual_seed(1), held_out=True)[0].unsqueeze(2)

    def encode(batch: Tensor) -> Tensor:
        with torch.no_grad(), mock.patch.multiple(vae, encoder=before[0], quant_conv=before[1]):
            latents: Tensor = vae.encode(batch).latent_dist.mode()
        return latents

    spread = encode(fresh).std(dim=(0, 2, 3, 4), keepdim=True)

    def moved(batch: Tensor, latents: Tensor) -> Tensor:
        again = vae.encode(batch).latent_dist.mode()
        error: Tensor = ((again - latents) / spread).square().mean()
        return error

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        if step % 2:
            chosen = generated[torch.randint(len(generated) - 256, (16,), generator=generator)]
            return 2 * moved(vae.decode(chosen).sample, chosen)
        batch = pictures.sample(16, generator)[0].unsqueeze(2)
        latents = encode(batch)
        decoded = vae.decode(latents).sample
        error = decoded - batch
        cycles = moved(decoded, latents) + moved(batch, latents)
        loss: Tensor = error.abs().mean() + 0.5 * error.square().mean() + cycles
        return loss

    def report(average: AutoencoderKLQwenImage) -> str:
        with torch.no_grad():
            own = generated[-256:]
            again = average.encode(average.decode(own).sample).latent_dist.mode()
            error = ((again - own) / spread).square().mean()
        return f"{autoencoder_report(average, fresh)}, round trip of generated ones {error:.5f}"

    vae.requires_grad_(True)
    optimizer = torch.optim.AdamW(vae.parameters(), 2e-3)
    Stage(path, vae, [optimizer], minutes, seed=4).run(loss_of, report)
    vae.requires_grad_(False)
