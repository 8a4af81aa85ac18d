"""Two gloo processes on the CPU, run by test_training.py through Lightning's own launcher.

Every check trains the same two batches in one process alone (rank 0's launcher runs it before the
processes are started) and in both, and prints a line of JSON with the largest relative difference:

    python tests/two_processes.py PAIRS OUT ddp|fsdp2
"""

import copy
import json
import os
import sys
from pathlib import Path

import lightning.pytorch as pl
import torch
from torch.utils.data import DataLoader

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.data import collate
from lit_distill.ema import EMA
from lit_distill.module import WarmupCosine
from lit_distill.sharding import whole


NCASES = int(os.environ.get("NCASES", "99"))
CASES = {
    "lora none": {"lora": {"r": 4}, "checkpointing": "none"},
    "lora block": {"lora": {"r": 4}, "checkpointing": "block"},
    "lora step": {"lora": {"r": 4}, "checkpointing": "step"},
    "lora nested": {"lora": {"r": 4}, "checkpointing": "nested"},
    "lora truncated": {"lora": {"r": 4}, "checkpointing": "nested", "grad_steps": 2},
    "lora online teacher": {"lora": {"r": 4}, "checkpointing": "block"},
    "full none": {"lora": None, "checkpointing": "none"},
    "full nested": {"lora": None, "checkpointing": "nested"},
}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "enable_checkpointing": False}
QUIET |= {"use_distributed_sampler": False, "max_steps": 2, "num_sanity_val_steps": 0}


class Grads(pl.Callback):
    """Keeps the whole gradients of every optimizer step."""

    def __init__(self):
        self.grads = []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.grads.append(
            {
                name: whole(p.grad).clone()
                for name, p in pl_module.trained().items()
                if p.grad is not None
            }
        )


class Fixed(DistillDataModule):
    """Rows 0 to 15 in order: batches of 8 for one process, of 4 for each of two."""

    def train_dataloader(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        rows = range(rank, 16, world)
        items = [self.train_set[row] for row in rows]
        if self.online:
            items = [item | {"latents": None, "image": None} for item in items]
        return DataLoader(items, batch_size=8 // world, collate_fn=collate)


def fit(pairs, case, strategy, devices, **trainer_options):
    options = dict(CASES[case])
    torch.manual_seed(0)
    module = DirectDistill(
        "tiny-digits",
        torch_dtype="float32",
        preflight=False,
        teacher_num_inference_steps=4,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        **options,
    )
    data = Fixed(str(Path(pairs) / "train/metadata.csv"), batch_size=8)
    data.online = "online" in case
    grads = Grads()
    ema = EMA(0.5)
    trainer = pl.Trainer(
        strategy=strategy,
        devices=devices,
        callbacks=[grads, ema],
        gradient_clip_val=1.0,
        **QUIET | trainer_options,
    )
    trainer.fit(module, datamodule=data)
    weights = {name: whole(p.detach()).clone() for name, p in module.trained().items()}
    return grads.grads, weights


def resume(pairs, out, strategy, devices, name, max_steps, ckpt_path=None):
    """Train with the real loader, schedule and average; save a checkpoint and return the weights."""
    torch.manual_seed(0)
    lora = {"r": 4, "lora_dropout": 0.1} if "lora" in name else None
    module = DirectDistill(
        "tiny-digits",
        torch_dtype="float32",
        lora=lora,
        checkpointing="none",
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 2, 20),
    )
    data = DistillDataModule(str(Path(pairs) / "train/metadata.csv"), batch_size=8 // devices)
    options = QUIET | {"max_steps": max_steps, "callbacks": [EMA(0.9)]}
    trainer = pl.Trainer(strategy=strategy, devices=devices, gradient_clip_val=1.0, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    path = Path(out) / f"{strategy}_{devices}_{name.replace(' ', '_')}_{max_steps}.ckpt"
    trainer.save_checkpoint(path)
    return path, {name: whole(p.detach()).clone() for name, p in module.trained().items()}


def difference(found, expected):
    assert found.keys() == expected.keys()
    error = sum((found[k] - expected[k]).double().square().sum() for k in found)
    return (error / sum(expected[k].double().square().sum() for k in found)).sqrt().item()


def main(pairs, out, strategy):
    expected = {}
    if "LOCAL_RANK" not in os.environ:  # before Lightning makes this process the first of two
        for case in list(CASES)[:NCASES]:
            expected[case] = copy.deepcopy(fit(pairs, case, "auto", 1))
    for case in list(CASES)[:NCASES]:
        grads, weights = fit(pairs, case, strategy, 2)
        if case in expected:
            record = {
                "case": case,
                "gradient": max(map(difference, grads, expected[case][0])),
                "weights": difference(weights, expected[case][1]),
            }
            print(json.dumps(record), flush=True)
    for name in ("lora", "full"):
        _, uninterrupted = resume(pairs, out, strategy, 2, f"{name} whole", 5)
        half, _ = resume(pairs, out, strategy, 2, name, 2)
        _, resumed = resume(pairs, out, strategy, 2, name, 5, half)
        record = {"case": f"{name} resumed", "weights": difference(resumed, uninterrupted)}
        if Path(out, f"auto_1_{name}_2.ckpt").is_file():  # of one process, made by the test
            one = Path(out, f"auto_1_{name}_2.ckpt")
            _, resumed = resume(pairs, out, strategy, 2, f"{name} of one", 5, one)
            record["of one"] = difference(resumed, uninterrupted)
        if expected:
            print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
