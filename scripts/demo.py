"""The whole workflow on the embedded pipeline: pairs, training, evaluation, export (`make demo`).

Every stage is a command of `lit-distill`, which is printed before it runs. A second run reuses
finished stages.
"""

from __future__ import annotations

import contextlib
import io
import shutil
from importlib.resources import files
from pathlib import Path

from lit_distill.cli import main
from lit_distill.commands import console
from lit_distill.commands.next_step import command_line, print_next

OUT = Path("runs/demo")
CHECKPOINT = OUT / "student.ckpt"


def stage(title: str, arguments: list[str]) -> None:
    """Print a command, run it, and print what it prints but for the command to type next."""
    print(f"\n== {title}\n{command_line(arguments).lstrip()}", flush=True)
    printed = io.StringIO()
    try:
        with console.quiet(), contextlib.redirect_stdout(printed):
            main(arguments)
    finally:
        print(printed.getvalue().partition("\nNext:")[0].rstrip())


def pairs(prompts: str, out: Path, *options: str) -> list[str]:
    """Return the command that generates the teacher's pairs, 50 steps with guidance 4, in `out`."""
    prompts_file = str(files("lit_distill").joinpath("assets", "tiny", prompts))
    model = ["--model.pretrained_model_name_or_path", "tiny-digits"]
    model += ["--model.torch_dtype", "float32", "--trainer.accelerator", "cpu"]
    where = ["--prompts", prompts_file, "--out", str(out), "--batch_size", "32"]
    teacher = ["--num_inference_steps", "50", "--cfg_scale", "4"]
    return ["generate", *model, *where, *teacher, *options]


if __name__ == "__main__":
    stage(
        "Generate 512 pairs with the teacher",
        pairs("prompts_train.txt", OUT / "train", "--seeds_per_prompt", "2", "--limit", "512"),
    )
    stage(
        "Generate 148 held-out pairs: 74 prompts that the student never sees, two seeds each",
        pairs(
            "prompts_heldout.txt",
            OUT / "heldout",
            "--seeds_per_prompt",
            "2",
            "--first_seed",
            "1000000",
        ),
    )
    if not CHECKPOINT.is_file():
        shutil.rmtree(OUT / "fit", ignore_errors=True)  # logs of an interrupted run
        logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(OUT)]
        logger += ["--trainer.logger.name", "fit", "--trainer.logger.version", "0"]
        stage("Train a LoRA", ["fit", "--config", "configs/tiny_lora.yaml", *logger])
        shutil.copy(OUT / "fit/version_0/checkpoints/last.ckpt", CHECKPOINT)
    stage(
        "Export for plain diffusers",
        ["export", "--ckpt_path", str(CHECKPOINT), "--out", str(OUT / "lora")],
    )
    stage(
        "Evaluate on the held-out pairs",
        ["test", "--ckpt_path", str(CHECKPOINT), "--trainer.default_root_dir", str(OUT)]
        + ["--data.val_metadata_path", str(OUT / "heldout/metadata.csv"), "--data.batch_size", "16"]
        + ["--trainer.accelerator", "cpu"]
        + ["--logs", str(OUT / "fit")],
    )
    print_next("play", "--ckpt_path", CHECKPOINT)
