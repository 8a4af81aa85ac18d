"""Time that training waits for data with the cache, and the cost of the online teacher.

    python benchmarks/loader.py PAIRS [--steps 60]

PAIRS is a folder from `lit-distill generate`, such as runs/digits/train. Each kind of target is
trained on in turn, three times over. Medians are reported.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import warnings
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.profilers import SimpleProfiler

from lit_distill import DirectDistill, DistillDataModule

NEXT = "[_TrainingEpochLoop].train_dataloader_next"
RESULT = Path(__file__).parent / "results" / "loader.json"


def tables(pairs: Path, out: Path) -> dict[str, Path]:
    """Write the pairs' table with each kind of target."""
    rows = pd.read_csv(pairs / "metadata.csv")
    kinds = {
        "stored latents": rows,
        "stored images": rows.drop(columns="latents"),
        "online teacher": rows.assign(image="", latents="", height=32, width=32),
    }
    for name, table in kinds.items():
        table.to_csv(out / f"{name}.csv", index=False)
    return {name: out / f"{name}.csv" for name in kinds}


def seconds(
    table: Path, pairs: Path, cache: Path, steps: int, teacher_steps: int
) -> dict[str, float]:
    """Return the mean seconds of a step and of waiting for its data."""
    model = DirectDistill(
        "tiny-digits",
        torch_dtype="float32",
        lora={"r": 32},
        checkpointing="none",
        preflight=False,
        teacher_num_inference_steps=teacher_steps,
    )
    data = DistillDataModule(
        str(table), base_path=str(pairs), batch_size=16, repeat=100, cache_dir=str(cache)
    )
    profiler = SimpleProfiler()
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=steps,
        profiler=profiler,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    trainer.fit(model, datamodule=data)
    # The first batch waits for whatever is made on first use.
    waits = profiler.recorded_durations[NEXT][1:]
    works = profiler.recorded_durations["run_training_batch"][1:]
    return {"step": statistics.median(works), "loader": statistics.median(waits)}


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--teacher_steps", type=int, default=50)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    runs: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        for _ in range(3):
            for name, table in tables(options.pairs, out).items():
                # The online teacher is slow; a few of its steps tell.
                steps = options.steps // 6 if name == "online teacher" else options.steps
                measured = seconds(
                    table, options.pairs, out / "cache", steps, options.teacher_steps
                )
                runs.setdefault(name, []).append(measured)
    base = statistics.median(run["step"] for run in runs["stored latents"])
    result: dict[str, object] = {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} thread",
        "torch": torch.__version__,
        "batch_size": 16,
        "teacher_num_inference_steps": options.teacher_steps,
    }
    for name, measured_runs in runs.items():
        step = statistics.median(run["step"] for run in measured_runs)
        wait = statistics.median(run["loader"] for run in measured_runs)
        result[name] = {
            "seconds a step": round(step, 4),
            "x stored latents": round(step / base, 2),
            "loader, share of a step": round(wait / step, 5),
        }
        print(f"{name:15} {step:.4f} s a step, {step / base:.2f}x; loader {wait / step:.2%} of it")
    RESULT.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
