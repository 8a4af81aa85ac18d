"""Which settings make students better, over several seeds, on the embedded pipeline.

    OMP_NUM_THREADS=1 python benchmarks/quality.py [--jobs 2] [--only default trajectory ...]

This generates pairs, trains students, and evaluates them on 256 held-out pairs of prompts that none
of them has seen. Errors are relative to those of the undistilled pipeline at 4 steps without
guidance. Rerun the command to resume: results in --work are reused. Writes
benchmarks/results/quality.json and .png.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import students
import torch
from candidates import Frequency, Perceptual, Pixel, Sum

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.cli import main as command
from lit_distill.evaluation.metrics import FrechetDistance, default_metrics
from lit_distill.training.ema import EMA
from lit_distill.training.losses import LatentL1, LatentMSE, LatentRMSE
from lit_distill.training.lr_scheduler import WarmupCosine
from lit_distill.training.objectives.base import Objective
from lit_distill.training.objectives.regression import Regression
from lit_distill.training.objectives.trajectory import Trajectory

STEPS = 400
BATCH_SIZE = 16
STRAIGHT = {"shift_terminal": None}
FULL: dict[str, Any] = {"lora": None}
LORA: dict[str, Any] = {"lora": {"r": 32}}
PER_STEP: dict[str, Any] = {"lora_per_step": 4}
DEAD = [f"transformer.transformer_blocks.3.{name}.*" for name in ("attn.to_add_out", "txt_mlp")]
UNDISTILLED = "undistilled, 4 steps"
RELATIVE = ("latent_mse", "frechet")
COLUMNS = {
    "latent_mse": "latent MSE",
    "frechet": "Frechet",
    "sharpness": "sharpness",
    "psnr": "PSNR",
    "seconds": "CPU s",
}


@dataclass(frozen=True)
class Run:
    """One student to train.

    Attributes:
        settings: Of `DirectDistill`.
        inference_steps: num_inference_steps of the rows. Each row is repeated for each of them.
        pairs: Number of pairs.
        max_steps: Optimizer steps.
        objective: Makes the objective.
        loss: Makes the loss.
        callbacks: Makes callbacks.
        lr: Learning rate. None: 3e-3 for LoRA, 1e-3 for all weights.
        cosine: Whether the learning rate falls to zero along a cosine.
    """

    settings: dict[str, Any]
    inference_steps: tuple[int, ...] = (4,)
    pairs: int = 4096
    max_steps: int = STEPS
    objective: Callable[[], Objective] = Regression
    loss: Callable[[], Any] = LatentMSE
    callbacks: Callable[[], list[pl.Callback]] = field(default=list)
    lr: float | None = None
    cosine: bool = True


def _with(loss: Callable[[], Any], weight: float) -> Callable[[], Any]:
    return lambda: Sum([LatentMSE(), loss()], [1.0, weight])


RUNS = {
    # The default, and what the package offers beside it
    "default": Run(FULL),
    "L1": Run(FULL, loss=LatentL1),
    "RMSE": Run(FULL, loss=LatentRMSE),
    "no terminal": Run(FULL | {"scheduler": STRAIGHT}),
    "sigmas 1 .7 .4 .15": Run(
        FULL
        | {"scheduler": STRAIGHT | {"use_dynamic_shifting": False}, "sigmas": [1, 0.7, 0.4, 0.15]}
    ),
    "trajectory": Run(FULL, objective=Trajectory),
    "constant rate, EMA": Run(FULL, cosine=False, callbacks=lambda: [EMA(0.99)]),
    "grad_steps 2": Run(FULL | {"grad_steps": 2}),
    # Less data, more steps
    "512 pairs": Run(FULL, pairs=512),
    "best": Run(FULL, objective=Trajectory, max_steps=1600),
    # LoRA
    "LoRA": Run(LORA),
    "LoRA, trajectory": Run(LORA, objective=Trajectory),
    "LoRA per step": Run(LORA | PER_STEP),
    "LoRA per step, trajectory": Run(LORA | PER_STEP, objective=Trajectory),
    # Numbers of steps
    **{f"{n} steps": Run(FULL | {"scheduler": STRAIGHT}, (n,)) for n in (1, 2, 8)},
    **{f"LoRA, {n} steps": Run(LORA | {"scheduler": STRAIGHT}, (n,)) for n in (1, 2, 8)},
    "best, 1 step": Run(FULL | {"scheduler": STRAIGHT}, (1,), max_steps=3000, loss=LatentL1),
    "1, 2, 4 and 8 steps": Run(FULL | {"scheduler": STRAIGHT}, (1, 2, 4, 8)),
    # What is not in the package
    "pixel": Run(FULL, loss=_with(Pixel, 1.0)),
    "perceptual": Run(FULL, loss=_with(Perceptual, 0.1)),
    "frequency": Run(FULL, loss=Frequency),
}


def make_pairs(work: Path) -> None:
    """Generate 9 pairs of each training prompt, and 4 of each held-out prompt."""
    training = "--seeds_per_prompt 9 --store_trajectory true"
    _generate(work / "train", "prompts_train.txt", training)
    _generate(work / "heldout", "prompts_heldout.txt", "--seeds_per_prompt 4 --first_seed 1000000")


def _generate(out: Path, prompts: str, options: str) -> None:
    source = files("lit_distill").joinpath("assets", "tiny", prompts)
    model = "--model.pretrained_model_name_or_path tiny-digits --model.torch_dtype float32"
    how = f"--prompts {source} --out {out} --batch_size 64 --num_inference_steps 50 --cfg_scale 4"
    arguments = f"generate {model} {how} {options} --trainer.accelerator cpu --trainer.logger false"
    command([*arguments.split(), "--trainer.enable_progress_bar=false"])


def table(work: Path, source: str, rows: int, inference_steps: tuple[int, ...]) -> Path:
    """Return the path of a table of the first `rows` pairs, with these numbers of steps."""
    name = f"{rows}_{'_'.join(map(str, inference_steps))}"
    path = work / source / f"{name}.csv"
    pairs = pd.read_csv(work / source / "metadata.csv").sample(frac=1, random_state=0)[:rows]
    parts = [pairs.assign(num_inference_steps=steps) for steps in inference_steps]
    temporary = path.with_suffix(f".{time.monotonic_ns()}")
    pd.concat(parts).to_csv(temporary, index=False)
    temporary.replace(path)
    return path


def train(run: Run, seed: int, work: Path) -> dict[str, float]:
    """Train a student and return its metrics on the held-out rows."""
    pl.seed_everything(seed, verbose=False)
    lr = run.lr or (1e-3 if run.settings["lora"] is None else 3e-3)
    module = DirectDistill(
        pretrained_model_name_or_path="tiny-digits",
        torch_dtype="float32",
        checkpointing="none",
        preflight=False,
        freeze=DEAD,
        objective=run.objective(),
        loss=run.loss(),
        optimizer=lambda p: torch.optim.AdamW(p, lr=lr, betas=(0.9, 0.99), weight_decay=0.0),
        lr_scheduler=(lambda optimizer: WarmupCosine(optimizer, 20)) if run.cosine else None,
        metrics=default_metrics() | {"frechet": FrechetDistance("tiny-digits")},
        **run.settings,
    )
    data = DistillDataModule(
        str(table(work, "train", run.pairs, run.inference_steps)),
        str(table(work, "heldout", 256, run.inference_steps)),
        batch_size=BATCH_SIZE,
        seed=seed,
    )
    clock = students.Clock()
    trainer = students.trainer(run.max_steps, [clock, *run.callbacks()])
    trainer.fit(module, datamodule=data)
    trainer.limit_val_batches = 1.0
    found = trainer.validate(module, datamodule=data, verbose=False)[0]
    values = {name.removeprefix("val_"): value for name, value in found.items()}
    return values | {"seconds": clock.seconds}


def one(name: str, seed: int, work: Path) -> dict[str, float]:
    """Train one student and return its result."""
    return train(RUNS.get(name) or Run(FULL, max_steps=0), seed, work)


def summary(work: Path, names: list[str]) -> dict[str, Any]:
    """Return mean and half the range over seeds of all metrics, errors relative to UNDISTILLED."""
    base = json.loads(students.result_path(work, UNDISTILLED, 0).read_text())
    rows: dict[str, Any] = {}
    for name in names:
        files = sorted(students.result_path(work, name, 0).parent.glob(f"{name}, seed *.json"))
        found = [json.loads(file.read_text()) for file in files]
        rows[name] = {"seeds": [len(found), 0]}
        for key in found[0]:
            kind = key.removesuffix("s").rpartition("_step")[0].rpartition("_")[0] or key
            scale = base[kind] if kind in RELATIVE else 1.0
            values = [each[key] / scale for each in found]
            rows[name][key] = [statistics.mean(values), (max(values) - min(values)) / 2]
    return {UNDISTILLED: base, "runs": rows}


def print_table(rows: dict[str, dict[str, list[float]]]) -> None:
    """Print the table of docs/method.md."""
    print("| student | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, row in rows.items():
        several = row["seeds"][0] > 1
        label = name if several else f"{name}, one seed"
        cells = [
            f"{row[key][0]:.3g}" + (f" ± {row[key][1]:.1g}" if several else "")
            for key in COLUMNS
            if key != "seconds"
        ]
        print(f"| {label} | " + " | ".join(cells) + f" | {row['seconds'][0]:.0f} |")


def plot(rows: dict[str, dict[str, list[float]]], path: Path) -> None:
    """Plot the errors of all students, with a line at the default's."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 0.28 * len(rows) + 1), layout="constrained")
    names = list(rows)[::-1]
    panels = figure.subplots(1, 3, sharey=True)
    for panel, key in zip(panels, ("latent_mse", "frechet", "sharpness"), strict=True):
        means = [rows[name][key][0] for name in names]
        spreads = [rows[name][key][1] for name in names]
        panel.errorbar(means, names, xerr=spreads, fmt="o", markersize=4)
        panel.axvline(rows["default"][key][0], color="grey", linewidth=1)
        relative = ", share of the undistilled" if key in RELATIVE else ", share of the teacher's"
        panel.set_xlabel(COLUMNS[key] + relative)
        panel.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, and write table and plot."""
    options = students.parse(arguments, "quality", __doc__, "--only", list(RUNS))
    if options.one:
        students.run_one(options, one)
        return
    make_pairs(options.work)
    runs = [(name, seed) for seed in range(options.seeds) for name in options.only]
    students.train_all([(UNDISTILLED, 0), *runs], options, __file__, "latent_mse")
    result = summary(options.work, options.only)
    print_table(result["runs"])
    students.write(options.out, result)
    if "default" in result["runs"]:
        plot(result["runs"], options.out.with_suffix(".png"))


if __name__ == "__main__":
    main()
