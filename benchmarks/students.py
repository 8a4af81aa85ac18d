"""What the benchmarks that train many students share: processes, results and their files."""

from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch


class Clock(pl.Callback):
    """Measures the CPU seconds of training."""

    seconds = 0.0

    def on_train_start(self, *args: Any) -> None:  # noqa: ANN401
        """Start."""
        self.started = time.process_time()

    def on_train_end(self, *args: Any) -> None:  # noqa: ANN401
        """Stop."""
        self.seconds = time.process_time() - self.started


def trainer(max_steps: int, callbacks: list[pl.Callback], **options: Any) -> pl.Trainer:  # noqa: ANN401
    """Return a Trainer that trains without validation and writes nothing."""
    return pl.Trainer(
        accelerator="cpu",
        max_steps=max_steps,
        max_epochs=-1,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        callbacks=callbacks,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        **options,
    )


def result_path(work: Path, name: str, seed: int) -> Path:
    """Return the path of a student's result."""
    return work / "results" / f"{name.replace('/', ' over ')}, seed {seed}.json"


def train_all(
    jobs: list[tuple[str, int]], options: argparse.Namespace, script: str, shown: str
) -> None:
    """Train students, each in its own process, several at a time, and print one metric of each."""

    def do(job: tuple[str, int]) -> None:
        name, seed = job
        path = result_path(options.work, name, seed)
        if not path.is_file():
            own = [sys.executable, script, "--one", name, str(seed), "--work", str(options.work)]
            subprocess.run(own, check=True, capture_output=True)
        values = json.loads(path.read_text())
        print(f"{name}, seed {seed}: {shown} {values[shown]:.4f}", flush=True)

    with ThreadPoolExecutor(options.jobs) as pool:
        list(pool.map(do, jobs))


def parse(
    arguments: list[str] | None, name: str, description: str | None, choose: str, among: list[str]
) -> argparse.Namespace:
    """Return the options of the benchmark of this name, which trains what `choose` selects."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(choose, nargs="+", default=among, choices=among)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time")
    parser.add_argument("--work", type=Path, default=Path("runs") / name)
    parser.add_argument("--out", type=Path, default=Path(f"benchmarks/results/{name}.json"))
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args(arguments)


def run_one(options: argparse.Namespace, one: Callable[[str, int, Path], dict[str, Any]]) -> None:
    """Train the student of --one, and store its result, whole or not at all."""
    warnings.simplefilter("ignore")
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    name, seed = options.one[0], int(options.one[1])
    path = result_path(options.work, name, seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(one(name, seed, options.work)))
    temporary.replace(path)


def write(out: Path, result: dict[str, Any]) -> None:
    """Write the figures with versions and the command beside them."""
    names = ("torch", "diffusers", "lightning", "peft")
    result |= {"versions": {name: version(name) for name in names}}
    result |= {"threads": torch.get_num_threads(), "command": f"python benchmarks/{out.stem}.py"}
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1) + "\n")
