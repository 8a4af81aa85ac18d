"""Trains the embedded "tiny-words" pipeline from scratch on a CPU.

The result is a real ``diffusers.QwenImagePipeline`` folder of under 6 MB that draws 32x64 pictures
of four-letter words from prompts such as "T-R-E-E in red serif on white". The training pictures
are rendered with fonts from Debian packages, which `tiny_words.py` names.

Run it from the repository root. Every stage can be killed at any time: the same command resumes it.

    python scripts/train_tiny_words.py --run runs/tiny-words
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from diffusers import QwenImagePipeline
from diffusers.models.autoencoders.autoencoder_kl_qwenimage import QwenImageCausalConv3d
from tiny_words import WordPictures, prompt_of
from tiny_words_autoencoder import finish_autoencoder, train_decoder, train_vae
from tiny_words_export import TEACHER_CFG, Trial, draw, export, unpack
from tiny_words_parts import (
    NEGATIVE_PROMPT,
    TOKEN_COLUMNS,
    TOKEN_ROWS,
    build_pipeline,
)
from tiny_words_stages import Stage, save_atomically
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from train_tiny_digits import convolve_frame

from lit_distill.evaluation.feature_extractors import WordReader


def train_reader(pictures: WordPictures, path: Path, minutes: float) -> WordReader:
    """Trains the classifier on training words, and scores it on held-out ones."""
    torch.manual_seed(0)
    reader = WordReader()
    fresh, truth = pictures.sample(1_000, torch.Generator().manual_seed(1), held_out=True)

    def loss_of(_: int, generator: torch.Generator) -> Tensor:
        batch, labels = pictures.sample(64, generator)
        # Letters are to be read off pictures that are a little noisy, like generated ones.
        level = 0.2 * torch.rand(64, 1, 1, 1, generator=generator)
        batch = batch + level * torch.randn(batch.shape, generator=generator)
        return F.cross_entropy(reader.read(batch / 2 + 0.5).flatten(0, 1), labels[:, 3:].flatten())

    def report(average: WordReader) -> str:
        with torch.no_grad():
            right = average.read(fresh / 2 + 0.5).argmax(-1) == truth[:, 3:]
        return f"letters {right.float().mean():.3f} words {right.all(1).float().mean():.3f}"

    optimizer = torch.optim.AdamW(reader.parameters(), 3e-3)
    Stage(path, reader, [optimizer], minutes, seed=2).run(loss_of, report, 20)
    return reader.requires_grad_(False)


def generate_bank(pipe: QwenImagePipeline, pictures: WordPictures, path: Path) -> Tensor:
    """Returns 2,048 latents (N, C, 1, height, width) that the pipeline generates."""
    if not path.exists():
        labels = pictures.labels(2_048, False, torch.Generator().manual_seed(9)).tolist()
        prompts = [prompt_of(label) for label in labels]
        parts = [
            unpack(pipe, draw(pipe, prompts[i : i + 64], 16, TEACHER_CFG, 10_000 + i))
            for i in range(0, len(prompts), 64)
        ]
        save_atomically({"latents": torch.cat(parts)}, path)
    latents: Tensor = torch.load(path, weights_only=True)["latents"]
    return latents


def encode_bank(
    pipe: QwenImagePipeline, pictures: WordPictures, folder: Path, parts: int
) -> dict[str, Tensor]:
    """Encodes the transformer's training set and writes its statistics into the VAE's config.

    Args:
        pipe: The pipeline, with its autoencoder trained.
        pictures: What to encode.
        folder: Where the files go, one for each part.
        parts: How many parts of 4,000 pictures.

    Returns:
        Packed, normalised latents (N, 32, 4 C) and their prompts' embeddings (N, 17, 64), in fp16.
    """
    folder.mkdir(exist_ok=True)
    files = [folder / f"{part:02}.pt" for part in range(parts)]
    for part, file in enumerate(files):
        if file.exists():
            continue
        generator = torch.Generator().manual_seed(1_000 + part)
        batches, texts = [], []
        for _ in range(20):
            batch, labels = pictures.sample(200, generator)
            prompts = [prompt_of(label) for label in labels.tolist()]
            with torch.no_grad():
                batches.append(pipe.vae.encode(batch.unsqueeze(2)).latent_dist.mode().squeeze(2))
                texts.append(pipe.encode_prompt(prompts)[0].half())
        save_atomically({"latents": torch.cat(batches), "texts": torch.cat(texts)}, file)
        print(f"bank: {part + 1}/{parts}", flush=True)
    saved = [torch.load(file, weights_only=True) for file in files]
    latents = torch.cat([part["latents"] for part in saved]).float()
    mean, std = latents.mean(dim=(0, 2, 3)), latents.std(dim=(0, 2, 3))
    pipe.vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    latents = (latents - mean[:, None, None]) / std[:, None, None]
    packed = pipe._pack_latents(latents, *latents.shape).half()
    return {"latents": packed, "texts": torch.cat([part["texts"] for part in saved])}


class Velocity:
    """The denoiser as it is called in training."""

    def __init__(self, pipe: QwenImagePipeline) -> None:
        """Encodes the negative prompt."""
        self.blank = pipe.encode_prompt(NEGATIVE_PROMPT)[0]

    def __call__(
        self, model: Callable[..., Any], noisy: Tensor, sigma: Tensor, text: Tensor
    ) -> Tensor:
        """Returns the velocity at noisy latents (B, 32, C), levels (B,) and embeddings."""
        velocity: Tensor = model(
            hidden_states=noisy,
            timestep=sigma,
            encoder_hidden_states=text,
            img_shapes=[[(1, TOKEN_ROWS, TOKEN_COLUMNS)]] * len(noisy),
            return_dict=False,
        )[0]
        return velocity


def train_transformer(
    pipe: QwenImagePipeline,
    bank: dict[str, Tensor],
    path: Path,
    minutes: float,
    report: Callable[[nn.Module], str] = lambda _: "",
) -> None:
    """Trains the denoiser by flow matching."""
    transformer, velocity = pipe.transformer, Velocity(pipe)
    # Both passes take a third of the time that they take in fp32: bf16, compiled, and without the
    # fused attention, whose backward pass in bf16 takes half of a step.
    compiled = torch.compile(transformer, dynamic=False)
    batch = 64

    def loss_of(step: int, generator: torch.Generator) -> Tensor:
        chosen = torch.randint(len(bank["latents"]), (batch,), generator=generator)
        clean = bank["latents"][chosen].float()
        noise = torch.randn(clean.shape, generator=generator)
        sigma = torch.sigmoid(torch.randn(batch, generator=generator) + 0.5)
        # Guidance needs to know the prediction for the negative prompt. Whole batches, because
        # that prompt is shorter than the others and mixing would need a mask.
        blank = step % 10 == 9
        text = velocity.blank.expand(batch, -1, -1) if blank else bank["texts"][chosen].float()
        noisy = torch.lerp(clean, noise, sigma[:, None, None])
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            predicted = velocity(compiled, noisy, sigma, text)
        return F.mse_loss(predicted.float(), noise - clean)

    named = transformer.transformer_blocks.named_parameters()
    matrices = [p for name, p in named if p.ndim == 2 and "_mod." not in name]
    known = {id(p) for p in matrices}
    others = [p for p in transformer.parameters() if id(p) not in known]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(
            matrices, 4e-3, weight_decay=0.01, ns_steps=4, adjust_lr_fn="match_rms_adamw"
        ),
        torch.optim.AdamW(others, 2e-3, betas=(0.9, 0.98), weight_decay=0),
    ]
    stage = Stage(path, transformer, optimizers, minutes, seed=5, ema=0.999)
    stage.run(loss_of, report, report_every=180)


def main() -> None:
    """Runs every stage that is not finished."""
    parser = argparse.ArgumentParser(
        description="Trains the embedded tiny-words pipeline.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--run", type=Path, default="runs/tiny-words", help="checkpoints")
    parser.add_argument("--reader_minutes", type=float, default=2, help="CPU time of the reader")
    parser.add_argument("--vae_minutes", type=float, default=9, help="CPU time of the VAE")
    parser.add_argument("--decoder_minutes", type=float, default=4, help="and of its decoder alone")
    parser.add_argument(
        "--beginner_minutes", type=float, default=10, help="of the denoiser, on large letters"
    )
    parser.add_argument(
        "--teacher_minutes", type=float, default=9, help="and of the denoiser on small ones"
    )
    parser.add_argument(
        "--finish_minutes", type=float, default=12, help="of the VAE on generated latents"
    )
    parser.add_argument("--bank", type=int, default=20, help="4,000s of pictures it is trained on")
    parser.add_argument("--out", type=Path, help="folder to export the pipeline to, and measure it")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.run.mkdir(parents=True, exist_ok=True)
    run, pictures = arguments.run, WordPictures()
    # Large letters come first. On small ones alone the autoencoder collapsed at this learning rate,
    # and what it learns on large ones codes small ones as well. The denoiser learns which letter a
    # prompt means, and where it stands, sooner while letters are large and hardly move.
    large, steady = WordPictures((5, 1), (14, 22)), WordPictures((3, 1), (15, 21))
    with mock.patch.object(QwenImageCausalConv3d, "forward", convolve_frame):
        reader = train_reader(pictures, run / "reader.pt", arguments.reader_minutes)
        vae = train_vae(large, run / "vae.pt", arguments.vae_minutes)
        train_decoder(vae, pictures, run / "decoder.pt", arguments.decoder_minutes)
        pipe = build_pipeline(vae)
        bank = encode_bank(pipe, steady, run / "steady", arguments.bank)
        train_transformer(pipe, bank, run / "beginner.pt", arguments.beginner_minutes)
        bank = encode_bank(pipe, pictures, run / "pictures", arguments.bank)
        trial = Trial(pipe, reader, pictures, 64)

        def report(average: nn.Module) -> str:
            with mock.patch.object(pipe, "transformer", average):
                few, many = trial.draw(4, 1.0)[1], trial.draw(12, 3.0)[1]
            return f"12 steps, cfg 3: {trial.read(many)}; 4: {trial.read(few)}"

        train_transformer(pipe, bank, run / "teacher.pt", arguments.teacher_minutes, report)
        generated = generate_bank(pipe, pictures, run / "generated.pt")
        finish_autoencoder(vae, pictures, run / "finish.pt", arguments.finish_minutes, generated)
        if arguments.out:
            export(pipe, reader, pictures, arguments.out, run / "preview.png")


if __name__ == "__main__":
    main()
