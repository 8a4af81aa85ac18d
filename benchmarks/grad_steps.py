"""Quality and time of truncated back-propagation (model.grad_steps).

    python benchmarks/grad_steps.py PAIRS

PAIRS is a folder with train/ and heldout/, such as runs/digits (README.md). The whole denoiser
of the embedded pipeline is trained as in configs/tiny_full.yaml with 4 steps, once for each number
of back-propagated steps and each of two schedules. The errors are those on the held-out rows.
Seconds are the CPU time of training, without validation.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.training.lr_scheduler import WarmupCosine

RESULT = Path(__file__).parent / "results" / "grad_steps.json"
SCHEDULES: dict[str, dict[str, Any] | None] = {
    "as published: the last step begins at sigma 0.02": None,
    "shift_terminal null": {"shift_terminal": None},
}
DEAD = "transformer.transformer_blocks.3."  # the last block's text branch leads nowhere


def train(
    grad_steps: int | None, scheduler: dict[str, Any] | None, options: argparse.Namespace
) -> dict[str, Any]:
    """Train once and return seconds and the error on held-out rows."""
    pl.seed_everything(options.seed, verbose=False)
    module = DirectDistill(
        "tiny-digits",
        torch_dtype="float32",
        checkpointing="none",
        grad_steps=grad_steps,
        scheduler=scheduler,
        freeze=[f"{DEAD}attn.to_add_out.*", f"{DEAD}txt_mlp.*"],
        preflight=False,
        optimizer=lambda params: torch.optim.AdamW(
            params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0
        ),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, num_warmup_steps=20),
        metrics={},
    )
    data = DistillDataModule(
        str(options.pairs / "train/metadata.csv"),
        val_metadata_path=str(options.pairs / "heldout/metadata.csv"),
        batch_size=16,
        repeat=100,
        seed=options.seed,
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=options.steps,
        gradient_clip_val=1.0,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    begun = time.process_time()
    trainer.fit(module, datamodule=data)
    seconds = time.process_time() - begun
    trainer.limit_val_batches = 1.0
    seen = trainer.validate(module, datamodule=data, verbose=False)[0]
    return {
        "cpu_seconds": round(seconds, 1),
        "held_out_latent_mse": round(seen["val_latent_mse"], 5),
        "gap_closed": round(seen["val_gap_closed"], 4),
    }


def main() -> None:
    """Measure and write the result."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--steps", type=int, default=256, help="optimizer steps")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    tables: dict[str, dict[str, Any]] = {}
    for name, scheduler in SCHEDULES.items():
        for grad_steps in (None, 3, 2, 1):
            found = train(grad_steps, scheduler, options)
            table = tables.setdefault(name, {})
            table[str(grad_steps or "all")] = found
            ratio = found["cpu_seconds"] / table["all"]["cpu_seconds"]
            found["x time of all"] = round(ratio, 3)
            print(name, grad_steps, found, flush=True)
    result = {
        "command": f"python benchmarks/grad_steps.py runs/digits --steps {options.steps}",
        "num_inference_steps": 4,
        "optimizer_steps": options.steps,
        "seed": options.seed,
        "torch": torch.__version__,
        "grad_steps": tables,
    }
    RESULT.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
