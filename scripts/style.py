"""A style LoRA becomes a few-step one: `model.teacher_lora` on the embedded pipeline.

Trains an ordinary LoRA that inverts all colours (flow matching, for 50 steps with guidance), lets
the pipeline with it draw pairs, and distils those to 4 steps. A few CPU-minutes; run it from the
repository root: python scripts/style.py
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import torch
import torch.nn.functional as F
from demo import pairs, stage
from safetensors.torch import load_file

from lit_distill import load_pipeline
from lit_distill.adapters.inject import make_trainable
from lit_distill.adapters.lora_files import to_state
from lit_distill.adapters.lora_formats import layout_of
from lit_distill.adapters.weights import extract_lora
from lit_distill.data.latents_file import LATENTS_KEY
from lit_distill.data.metadata import read_metadata
from lit_distill.pipelines.latent_codec import LatentCodec
from lit_distill.pipelines.loading import pipeline_source

DIGITS = "tiny-digits"
PROMPTS = Path(os.path.relpath(pipeline_source(DIGITS)))
OUT = Path("runs/style")
STYLE = OUT / "style"
STEPS, BATCH = 2000, 64


def train_style(base: Path) -> None:
    """Train a LoRA on inverted pictures of the base pairs, by flow matching as the base was."""
    torch.manual_seed(0)
    pipe = load_pipeline(DIGITS)
    make_trainable(pipe, {"r": 16})
    codec = LatentCodec(pipe, height=32, width=32)
    paths = sorted((base / "latents").glob("*.safetensors"))
    drawn = torch.stack([load_file(path)[LATENTS_KEY] for path in paths])
    with torch.no_grad():
        bank = codec.encode(1 - codec.decode(drawn))
        prompts = read_metadata(base / "metadata.csv")["prompt"].tolist()
        texts = pipe.encode_prompt(prompts)[0]
        blank = pipe.encode_prompt(" ")[0]
    parameters = [p for p in pipe.transformer.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=2e-3, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=STEPS)
    for step in range(STEPS):
        chosen = torch.randint(len(bank), (BATCH,))
        clean, noise, uniform = bank[chosen], torch.randn(BATCH, *bank.shape[1:]), torch.rand(BATCH)
        sigma = 1.4 * uniform / (1 + 0.4 * uniform)
        # Guidance needs the style without a prompt, too.
        text = texts[chosen] if step % 10 else blank.expand(BATCH, -1, -1)
        velocity = pipe.transformer(
            hidden_states=torch.lerp(clean, noise, sigma[:, None, None]),
            timestep=sigma,
            encoder_hidden_states=text,
            img_shapes=[[(1, 4, 4)]] * BATCH,
            return_dict=False,
        )[0]
        loss = F.mse_loss(velocity, noise - clean)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"   step {step + 1}: loss {loss.item():.3f}", flush=True)
    layout = layout_of("diffusers", "transformer", pipe.transformer)
    state = to_state(extract_lora(pipe)["transformer"], layout, pipe.transformer)
    layers = {key.removeprefix("transformer."): tensor for key, tensor in state.items()}
    pipe.save_lora_weights(STYLE, transformer_lora_layers=layers)


if __name__ == "__main__":
    twice = ["--seeds_per_prompt", "2", "--limit", "512"]
    heldout_rows = ["--limit", "64", "--first_seed", "1000000"]
    stage(
        "512 pairs of the plain teacher, to train the style on",
        pairs(DIGITS, PROMPTS / "prompts_train.txt", OUT / "plain", *twice),
    )
    if not STYLE.is_dir():
        print("\n== training the style LoRA", flush=True)
        train_style(OUT / "plain")
    styled = ["--model.teacher_lora", str(STYLE)]
    stage(
        "512 pairs of the styled teacher",
        pairs(DIGITS, PROMPTS / "prompts_train.txt", OUT / "train", *twice, *styled),
    )
    stage(
        "64 held-out pairs of the styled teacher",
        pairs(DIGITS, PROMPTS / "prompts_heldout.txt", OUT / "heldout", *heldout_rows, *styled),
    )
    shutil.rmtree(OUT / "fit", ignore_errors=True)
    logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(OUT)]
    logger += ["--trainer.logger.name", "fit", "--trainer.logger.version", "0"]
    data = ["--data.metadata_path", str(OUT / "train/metadata.csv")]
    heldout = ["--data.val_metadata_path", str(OUT / "heldout/metadata.csv")]
    config = ["fit", "--config", "configs/tiny_lora.yaml"]
    stage("distilling the style to 4 steps", [*config, *styled, *data, *heldout, *logger])
    checkpoint = str(OUT / "fit/version_0/checkpoints/last.ckpt")
    cpu = ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
    stage(
        "evaluation on the held-out pairs",
        ["test", "--ckpt_path", checkpoint, "--trainer.default_root_dir", str(OUT), *heldout]
        + ["--data.batch_size", "16", *cpu],
    )
    stage(
        "export: one LoRA with style and few steps, for the plain pipeline",
        ["export", "--ckpt_path", checkpoint, "--out", str(OUT / "lora"), *cpu],
    )
    print(f"\nLook at {OUT / 'report/report.html'} and {OUT / 'lora/samples.png'}")
