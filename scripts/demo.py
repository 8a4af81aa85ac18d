"""The whole workflow on `tiny-words`: pairs, training, evaluation, export (`make demo`).

Every stage is a command of `lit-distill`, which is printed before it runs. A second run reuses
finished stages.
"""

from __future__ import annotations

import contextlib
import io
import os
import shutil
from pathlib import Path

from lit_distill.cli import main
from lit_distill.commands import console
from lit_distill.commands.next_step import command_line, print_next
from lit_distill.pipelines.loading import pipeline_source

WORDS = "tiny-words"
PROMPTS = Path(os.path.relpath(pipeline_source(WORDS)))
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


def pairs(pipeline: str, prompts: Path, out: Path, *options: str) -> list[str]:
    """Return the command that generates pairs with an embedded pipeline, 50 steps, in `out`."""
    model = ["--model.pretrained_model_name_or_path", pipeline]
    model += ["--model.torch_dtype", "float32", "--trainer.accelerator", "cpu"]
    where = ["--prompts", str(prompts), "--out", str(out), "--batch_size", "32"]
    return ["generate", *model, *where, "--num_inference_steps", "50", *options]


def heldout_prompts(count: int) -> Path:
    """Return a file with the first `count` of the held-out prompts."""
    lines = (PROMPTS / "prompts_heldout.txt").read_text(encoding="utf-8").splitlines()
    path = OUT / "heldout.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines[:count]) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    teacher = ["--cfg_scale", "3", "--height", "32", "--width", "64"]
    stage(
        "Generate 512 pairs with the teacher",
        pairs(WORDS, PROMPTS / "prompts_train.txt", OUT / "train", *teacher, "--limit", "512"),
    )
    two_seeds = ["--seeds_per_prompt", "2", "--first_seed", "1000000"]
    stage(
        "Generate 128 held-out pairs: 64 words that the student never sees, two seeds each",
        pairs(WORDS, heldout_prompts(64), OUT / "heldout", *teacher, *two_seeds),
    )
    if not CHECKPOINT.is_file():
        shutil.rmtree(OUT / "fit", ignore_errors=True)  # logs of an interrupted run
        logger = ["--trainer.logger", "TensorBoardLogger", "--trainer.logger.save_dir", str(OUT)]
        logger += ["--trainer.logger.name", "fit", "--trainer.logger.version", "0"]
        stage("Train a LoRA", ["fit", "--config", "configs/words_lora.yaml", *logger])
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
