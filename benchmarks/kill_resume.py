"""Interrupt training at random moments, resume it, and compare with the uninterrupted run.

    python benchmarks/kill_resume.py [--kind kill interrupt power] [--times 5] [--steps 30]
        [--out FILE] [--append]

For a LoRA and for full training, on one process and on two (DDP), on the embedded pipeline, a run
that saves a checkpoint after every step is interrupted at a moment sampled uniformly from its
training time:

* ``kill``: SIGKILL to all processes at once; every second time while a checkpoint is written.
* ``interrupt``: SIGINT to all processes, as Ctrl-C sends it; the run saves and ends by itself.
* ``power``: SIGKILL, then every file that was not synced to the disk is emptied, which is what a
  power cut may leave. On one process only, since each would need a record of its own.

The run is resumed from its last checkpoint. In the end its weights, optimizer state and moving
average must equal the uninterrupted run's bit for bit.
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

KINDS = {"kill": (1, 2), "interrupt": (1, 2), "power": (1,)}
"""Kinds of interruption, and the numbers of processes that each is tried with."""

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
      init_args: {{filename: last, every_n_train_steps: {every}, enable_version_counter: false,
                  save_on_exception: true}}
    - class_path: lit_distill.EMA
      init_args: {{decay: 0.9}}
"""
LORA = "{r: 8, lora_dropout: 0.1}"


RECORD_SYNCS = """
import os, sys

record = open(os.environ["SYNCED_FILES"], "a", buffering=1)
fsync = os.fsync

def recorded(descriptor):
    fsync(descriptor)
    status = os.fstat(descriptor)
    print(status.st_ino, status.st_size, file=record)

os.fsync = recorded
sys.argv = ["lit-distill", *sys.argv[1:]]
from lit_distill.cli import main

main()
"""
"""Runs the command, and records which files were synced, at which size."""


def start(folder: Path, *options: str, record: bool = False) -> subprocess.Popen[bytes]:
    """Start `lit-distill fit` in a process group of its own."""
    program = ["-c", RECORD_SYNCS] if record else ["-m", "lit_distill"]
    command = [sys.executable, *program, "fit", "--config", str(folder / "config.yaml")]
    log = (folder / "log.txt").open("ab")
    return subprocess.Popen(
        [*command, "--trainer.default_root_dir", str(folder), *options],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env=os.environ | {"SYNCED_FILES": str(folder / "synced.txt")},
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


def interrupt(
    folder: Path, kind: str, seconds: float, steps: int, rng: random.Random
) -> dict[str, Any]:
    """Start a run and interrupt it within `seconds` after its first checkpoint.

    With kind ``kill`` and ``power`` every second run is killed while it writes a checkpoint.
    """
    process = start(folder, record=kind == "power")
    while not checkpoint_of(folder).exists():
        if process.poll() is not None:
            raise RuntimeError((folder / "log.txt").read_text()[-3000:])
        time.sleep(0.001)
    delay = rng.uniform(0, seconds)
    time.sleep(delay)
    saving = kind != "interrupt" and rng.random() < 0.5
    while saving and not writing(folder) and process.poll() is None:
        pass
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGINT if kind == "interrupt" else signal.SIGKILL)
    process.wait()
    while_saving = writing(folder)
    if kind == "power":
        cut_power(folder)
    step = read(folder)["global_step"]
    if step == steps:  # too late: the run had ended
        shutil.rmtree(folder / "checkpoints")
        return interrupt(folder, kind, seconds, steps, rng)
    return {
        "after s": round(delay, 3),
        "while saving": while_saving,
        "exit status": process.returncode,
        "resumed at step": step,
    }


def writing(folder: Path) -> bool:
    """Return whether a checkpoint is being written."""
    return any(checkpoint_of(folder).parent.glob(".*.tmp"))


def cut_power(folder: Path) -> None:
    """Empty every file of the run that was not synced at the size that it has."""
    synced = set((folder / "synced.txt").read_text().splitlines())
    for path in (folder / "checkpoints").rglob("*"):
        status = path.stat()
        if path.is_file() and f"{status.st_ino} {status.st_size}" not in synced:
            path.write_bytes(b"")


def equal(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two checkpoints hold the same weights, optimizer state and average, bit for bit."""
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
    out: Path, pairs: Path, kind: str, trains: str, processes: int, times: int, steps: int
) -> list[dict[str, Any]]:
    """Run one setting, and return a record for each interruption."""
    rng = random.Random(f"{kind} {trains} {processes} {steps}")

    def folder(name: str, every: int = 1) -> Path:
        made = out / f"{kind}_{trains}_{processes}_{name}"
        made.mkdir(parents=True)
        text = CONFIG.format(
            lora=LORA if trains == "lora" else "null",
            pairs=pairs,
            batch_size=8 // processes,
            strategy="ddp" if processes > 1 else "auto",
            devices=processes,
            steps=steps,
            every=every,
        )
        (made / "config.yaml").write_text(text)
        return made

    whole = folder("uninterrupted")
    process = start(whole)
    while not checkpoint_of(whole).exists():
        if process.poll() is not None:
            raise RuntimeError((whole / "log.txt").read_text()[-3000:])
        time.sleep(0.01)
    begun = time.monotonic()
    while read(whole)["global_step"] < steps:
        time.sleep(0.02)
    seconds = time.monotonic() - begun
    process.wait()
    expected = read(whole)
    records = []
    for index in range(times):
        run = folder(str(index))
        record = {"kind": kind, "trains": trains, "processes": processes, "steps": steps}
        record |= interrupt(run, kind, 0.9 * seconds, steps, rng)
        record["equal"] = equal(finish(run, "--ckpt_path", str(checkpoint_of(run))), expected)
        print(json.dumps(record), flush=True)
        records.append(record)
    return records


def make_pairs(out: Path) -> Path:
    """Generate 32 pairs of the embedded pipeline."""
    prompts = files("lit_distill").joinpath("assets", "tiny", "prompts_train.txt")
    options = f"--prompts {prompts} --out {out} --limit 32 --batch_size 16 --num_inference_steps 10"
    options += " --model.pretrained_model_name_or_path tiny-digits --model.torch_dtype float32"
    options += " --trainer.accelerator cpu --trainer.logger false"
    subprocess.run([sys.executable, "-m", "lit_distill", "generate", *options.split()], check=True)
    return out


def main() -> None:
    """Run all settings and write the records."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--kind", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--times", type=int, default=5, help="interruptions in each setting")
    parser.add_argument("--steps", type=int, default=30, help="optimizer steps of a run")
    parser.add_argument("--append", action="store_true", help="keep the records of --out")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/kill_resume.json"))
    arguments = parser.parse_args()
    begun = time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary)
        pairs = make_pairs(out / "pairs")
        records = [
            record
            for kind in arguments.kind
            for trains in ("lora", "full")
            for processes in KINDS[kind]
            for record in setting(
                out, pairs, kind, trains, processes, arguments.times, arguments.steps
            )
        ]
    minutes = (time.monotonic() - begun) / 60
    if arguments.append and arguments.out.exists():
        before = json.loads(arguments.out.read_text())
        records, minutes = before["records"] + records, before["minutes"] + minutes
    result = {
        "command": "python benchmarks/kill_resume.py " + " ".join(sys.argv[1:]),
        "machine": f"{os.cpu_count()} CPU cores, {platform.machine()}",
        "versions": {"torch": torch.__version__, "lightning": lightning.__version__},
        "minutes": round(minutes, 1),
        "interruptions": len(records),
        "while saving": sum(record["while saving"] for record in records),
        "equal": sum(record["equal"] for record in records),
        "records": records,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(f"{result['equal']} of {result['interruptions']} equal; {arguments.out}")
    statuses = {r["exit status"] for r in records if r["kind"] == "interrupt"} - {130}
    if result["equal"] != result["interruptions"] or statuses:
        sys.exit(1)


if __name__ == "__main__":
    main()
