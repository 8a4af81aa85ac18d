"""Difference between training's rollout and the exported student's in bfloat16, after every step.

    python benchmarks/precision_gap.py [--out benchmarks/results/precision_gap.json]

On the embedded pipeline a LoRA and the whole denoiser are trained for 60 steps with torch_dtype
bfloat16 and exported. Plain diffusers generates with the export in bfloat16. The same weights are
then used in three ways: with casts of float32 weights (as in this package), under torch.autocast,
and all in float32. Figures are relative differences of the latents, in the 2-norm over 16 samples.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from diffusers import DiffusionPipeline

from lit_distill import DirectDistill, DistillDataModule, load_pipeline, load_student, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.cli import main as command
from lit_distill.training.checkpoint_io import read_checkpoint

STEPS = 4


def make_pairs(out: Path) -> str:
    """Generate 64 pairs and return their table."""
    prompts = files("lit_distill").joinpath("assets", "tiny", "prompts_train.txt")
    options = f"--prompts {prompts} --out {out} --limit 64 --batch_size 16 --num_inference_steps 20"
    options += " --model.pretrained_model_name_or_path tiny-digits --model.torch_dtype float32"
    command(["generate", *options.split(), "--trainer.accelerator=cpu", "--trainer.logger=false"])
    return str(out / "metadata.csv")


@torch.no_grad()
def states(pipe: DiffusionPipeline, prompts: list[str]) -> list[torch.Tensor]:
    """Return the latents after each step of a rollout, float32."""
    found: list[torch.Tensor] = []

    def keep(pipe: Any, step: int, timestep: Any, kwargs: dict[str, Any]) -> dict[str, Any]:  # noqa: ANN401
        found.append(kwargs["latents"].float().clone())
        return {}

    rollout(
        pipe,
        num_inference_steps=STEPS,
        generator=[torch.Generator().manual_seed(10_000 + i) for i in range(len(prompts))],
        prompt=prompts,
        height=32,
        width=32,
        callback_on_step_end=keep,
    )
    return found


def trainable(checkpoint: Path, lora: dict[str, Any] | None) -> DiffusionPipeline:
    """Return the pipeline as in training: frozen weights bfloat16, trained weights float32."""
    pipe = load_pipeline("tiny-digits", torch_dtype="bfloat16")
    make_trainable(pipe, lora)
    state = read_checkpoint(checkpoint)["state_dict"]
    own = dict(pipe.transformer.named_parameters())
    with torch.no_grad():
        for name, tensor in state.items():
            own[name.removeprefix("denoisers.transformer.")].copy_(tensor)
    return pipe


def measure(metadata: str, lora: dict[str, Any] | None, out: Path) -> dict[str, list[float]]:
    """Train, and return the difference after each step for each kind of arithmetic."""
    torch.manual_seed(0)
    module = DirectDistill(
        "tiny-digits",
        lora=lora,
        checkpointing="none",
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
    )
    trainer = pl.Trainer(
        accelerator="cpu", precision="bf16-mixed", max_steps=60, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, use_distributed_sampler=False,
    )  # fmt: skip
    trainer.fit(module, datamodule=DistillDataModule(metadata, batch_size=16))
    checkpoint = out / "student.ckpt"
    trainer.save_checkpoint(checkpoint)
    prompts = Path(str(files("lit_distill").joinpath("assets", "tiny", "prompts_heldout.txt")))
    texts = prompts.read_text().splitlines()[:16]
    expected = states(load_student(checkpoint), texts)
    ways = {"casts of float32 weights": states(module.pipe, texts)}
    with torch.autocast("cpu", torch.bfloat16):
        ways["autocast"] = states(trainable(checkpoint, lora), texts)
    ways["float32"] = states(load_student(checkpoint, torch_dtype="float32"), texts)
    return {
        way: [
            float(f"{(a - b).norm() / b.norm():.2e}") for a, b in zip(found, expected, strict=True)
        ]
        for way, found in ways.items()
    }


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/precision_gap.json"))
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        metadata = make_pairs(out / "pairs")
        result = {
            "command": "python benchmarks/precision_gap.py",
            "machine": f"CPU, torch {torch.__version__}",
            "relative difference after each step": {
                "lora": measure(metadata, {"r": 8}, out),
                "full": measure(metadata, None, out),
            },
        }
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
