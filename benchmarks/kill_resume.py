"""Kill training with SIGKILL at random moments, resume, and compare with an uninterrupted run.

    python benchmarks/kill_resume.py [--kills 5] [--out benchmarks/results/kill_resume.json]

This trains a LoRA and the whole denoiser of the embedded pipeline, on one process and on two (DDP).
A run saves a checkpoint after every step. All its processes are killed at once, at a random moment
of its training time (uniformly distributed), and every second time while it writes a checkpoint. It
resumes from the last checkpoint. At the end its weights, optimizer state and moving average must
equal those of the uninterrupted run bit for bit.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning
import torch
from torch.utils._pytree import tree_leaves

STEPS = 30
CONFIG = """
model:
  pretrained_model_name_or_path: tiny-digits
  torch_dtype: float32
  checkpointing: none
  lora: {lora}
  optimizer:
    class_path: torch.optim.AdamW
    init_args: {{lr: 1.0e-3}}
  lr_scheduler:
    class_path: lit_distill.WarmupCosine
    init_args: {{num_warmup_steps: 5}}
data:
  metadata_path: {pairs}/metadata.csv
  batch_size: {batch_size}
trainer:
  accelerator: cpu
  strategy: {strategy}
  devices: {devices}
  max_steps: {steps}
  max_epochs: -1
  gradient_clip_val: 1.0
  logger: false
  enable_progress_bar: false
  enable_model_summary: false
  callbacks:
    - class_path: lightning.pytorch.callbacks.ModelCheckpoint
      init_args: {{filename: last, every_n_train_steps: 1, enable_version_counter: false}}
    - class_path: lit_distill.EMA
      init_args: {{decay: 0.9}}
"""
LORA = "{r: 8, lora_dropout: 0.1}"


def start(folder: Path, *options: str) -> subprocess.Popen[bytes]:
    """Start `lit-distill fit` in a process group of its own."""
    command = [sys.executable, "-m", "lit_distill", "fit", "--config", str(folder / "config.yaml")]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(
        [*command, "--trainer.default_root_dir", str(folder), *options],
        stdout=log,
        stderr=log,
        start_new_session=True,
    )


def finish(folder: Path, *options: str) -> dict[str, Any]:
    """Run to the end and return the last checkpoint."""
    if start(folder, *options).wait():
        raise RuntimeError(f"training failed:\n{(folder / 'log.txt').read_text()[-3000:]}")
    return read(folder)


def checkpoint_of(folder: Path) -> Path:
    """Return where a run saves."""
    return folder / "checkpoints" / "last.ckpt"


def read(folder: Path) -> dict[str, Any]:
    """Return the last checkpoint of a run."""
    content: dict[str, Any] = torch.load(checkpoint_of(folder), weights_only=True)
    return content


def kill(folder: Path, seconds: float, rng: random.Random, saving: bool) -> dict[str, Any]:
    """Start a run and kill it within `seconds` after its first checkpoint, or at the next save."""
    process = start(folder)
    while not checkpoint_of(folder).exists():
        if process.poll() is not None:
            raise RuntimeError((folder / "log.txt").read_text()[-3000:])
        time.sleep(0.001)
    delay = rng.uniform(0, seconds)
    time.sleep(delay)
    while (
        saving and not any(checkpoint_of(folder).parent.glob(".*.part")) and process.poll() is None
    ):
        pass
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    hit = any(checkpoint_of(folder).parent.glob(".*.part"))
    step = read(folder)["global_step"]
    if step == STEPS:  # too late: it was done
        shutil.rmtree(folder / "checkpoints")
        return kill(folder, seconds, rng, saving)
    return {"killed after s": round(delay, 3), "while saving": hit, "went on at step": step}


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Return whether two checkpoints hold the same weights, optimizer state and average."""
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "ema", "global_step")
    pairs = [(tree_leaves(one[key]), tree_leaves(two[key])) for key in keys]
    return all(
        len(a) == len(b)
        and all(
            torch.equal(torch.as_tensor(x), torch.as_tensor(y)) for x, y in zip(a, b, strict=True)
        )
        for a, b in [
            ([v for v in p if v is not None], [v for v in q if v is not None]) for p, q in pairs
        ]
    )


def setting(
    out: Path, pairs: Path, trains: str, processes: int, kills: int
) -> list[dict[str, Any]]:
    """Run one setting, and return a record for each kill."""
    rng = random.Random(f"{trains} {processes}")
    text = CONFIG.format(
        lora=LORA if trains == "lora" else "null",
        pairs=pairs,
        batch_size=8 // processes,
        strategy="ddp" if processes > 1 else "auto",
        devices=processes,
        steps=STEPS,
    )

    def folder(name: str) -> Path:
        made = out / f"{trains}_{processes}_{name}"
        made.mkdir(parents=True)
        (made / "config.yaml").write_text(text)
        return made

    whole = folder("uninterrupted")
    process = start(whole)
    while not checkpoint_of(whole).exists():
        if process.poll() is not None:
            raise RuntimeError((whole / "log.txt").read_text()[-3000:])
        time.sleep(0.01)
    begun = time.monotonic()
    while read(whole)["global_step"] < STEPS:
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    process.wait()
    expected = read(whole)
    records = []
    for index in range(kills):
        run = folder(str(index))
        record = {
            "trains": trains,
            "processes": processes,
            **kill(run, 0.9 * seconds, rng, index % 2 == 1),
        }
        record["equal"] = equal(finish(run, "--ckpt_path", str(checkpoint_of(run))), expected)
        print(json.dumps(record), flush=True)
        records.append(record)
    return records


def make_pairs(out: Path) -> Path:
    """Generate 32 pairs with the embedded pipeline."""
    prompts = files("lit_distill").joinpath("assets", "tiny", "prompts_train.txt")
    options = f"--prompts {prompts} --out {out} --limit 32 --batch_size 16 --num_inference_steps 10"
    options += " --model.pretrained_model_name_or_path tiny-digits --model.torch_dtype float32"
    options += " --trainer.accelerator cpu --trainer.logger false"
    subprocess.run([sys.executable, "-m", "lit_distill", "generate", *options.split()], check=True)
    return out


def main() -> None:
    """Run all settings and write the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kills", type=int, default=5, help="kills in each of the four settings")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill_resume.json"))
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        pairs = make_pairs(out / "pairs")
        records = [
            record
            for trains in ("lora", "full")
            for processes in (1, 2)
            for record in setting(out, pairs, trains, processes, arguments.kills)
        ]
    result = {
        "command": "python benchmarks/kill_resume.py " + " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "minutes": round((time.monotonic() - begun) / 60, 1),
        "kills": len(records),
        "while saving": sum(record["while saving"] for record in records),
        "equal": sum(record["equal"] for record in records),
        "records": records,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['equal']} of {result['kills']} equal; {arguments.out}")
    if result["equal"] != result["kills"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
