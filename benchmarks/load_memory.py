"""Host memory of loading a denoiser on two processes, under FSDP2 and DDP.

    python benchmarks/load_memory.py [--out benchmarks/results/load_memory.json]

A Qwen-Image transformer of about 2 GB in bfloat16 (random weights, the embedded pipeline's
encoders) is loaded for LoRA training under ``strategy: fsdp2`` and ``ddp`` on two gloo processes.
The figure is the growth of each process's peak of resident memory (VmHWM), from just before
`configure_model` until the weights were read once, relative to the size of the weights. On the CPU
the shards are host memory too, so the least possible value is 0.5. On GPUs they are not.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch

from lit_distill import DirectDistill, load_pipeline


def make_pipeline(folder: Path) -> int:
    """Save a pipeline with a large transformer, and return the bytes of its weights."""
    pipe = load_pipeline("tiny-digits", torch_dtype="bfloat16")
    kind = type(pipe.transformer)
    config = dict(pipe.transformer.config) | {"num_layers": 24, "num_attention_heads": 8}
    config |= {"attention_head_dim": 128, "axes_dims_rope": (32, 48, 48)}
    torch.set_default_dtype(torch.bfloat16)
    pipe.register_modules(transformer=kind.from_config(config))
    torch.set_default_dtype(torch.float32)
    pipe.save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in pipe.transformer.parameters())


def peak() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) * 1024


class Measured(DirectDistill):
    """Reports the memory that loading took."""

    def configure_model(self) -> None:
        """Load, and print the growth of the peak."""
        import accelerate  # noqa: F401
        import diffusers  # noqa: F401
        import peft  # noqa: F401

        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        before = peak()
        super().configure_model()
        for parameter in self.parameters():  # files are mapped: only reading loads them
            getattr(parameter, "to_local", lambda p=parameter: p)().sum()
        record = {"process": self.trainer.global_rank, "bytes": peak() - before}
        print("MEASURED " + json.dumps(record), flush=True)


def load(folder: str, strategy: str) -> None:
    """Load on two processes."""
    module = Measured(folder, torch_dtype="bfloat16", lora={"r": 4}, preflight=False)
    trainer = pl.Trainer(
        accelerator="cpu", devices=2, strategy=strategy, max_steps=1, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader([]))


def measure(folder: Path, strategy: str, size: int) -> list[float]:
    """Return the growth of each process's peak relative to the size of the weights."""
    command = [sys.executable, __file__, "--load", str(folder), strategy]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    lines = [line for line in found.stdout.splitlines() if "MEASURED" in line]
    records: list[dict[str, Any]] = [json.loads(line.split("MEASURED ")[1]) for line in lines]
    return [round(r["bytes"] / size, 2) for r in sorted(records, key=lambda r: r["process"])]


def main() -> None:
    """Measure and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/load_memory.json"))
    parser.add_argument("--load", nargs=2, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.load:
        load(*arguments.load)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "pipeline"
        size = make_pipeline(folder)
        result = {
            "command": "python benchmarks/load_memory.py",
            "weights in GB": round(size / 1e9, 2),
            "peak host memory of each process over the weights": {
                strategy: measure(folder, strategy, size) for strategy in ("ddp", "fsdp2")
            },
            "machine": f"{os.cpu_count()} CPU cores, torch {torch.__version__}",
        }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
