"""Two gloo processes on the CPU through Lightning's own launcher; test_training.py runs it once.

    python tests/helpers/two_processes.py PAIRS OUT [strategy...]

Process 0 prints a line of JSON for every check. PAIRS are pairs of the embedded pipeline; OUT holds
checkpoints of one process, `one_lora.ckpt` and `one_full.ckpt` (step 2), and gets those of two.
"""

import json
import os
import signal
import sys
from pathlib import Path

import lightning.pytorch as pl
import pandas as pd
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from objective_cases import all_together
from torch.utils.data import DataLoader

from lit_distill import DirectDistill, DistillDataModule, Regression, SampleImages
from lit_distill.compute.sharding import full_tensor
from lit_distill.data.batch import collate
from lit_distill.training.ema import EMA
from lit_distill.training.lr_scheduler import WarmupCosine

LORA = {"r": 4}
UNUSED = [f"transformer.transformer_blocks.3.{name}.*" for name in ("attn.to_add_out", "txt_mlp")]
CASES = {
    "lora none": {"lora": LORA, "checkpointing": "none"},
    "lora block": {"lora": LORA, "checkpointing": "block"},
    "lora step": {"lora": LORA, "checkpointing": "step"},
    "lora nested": {"lora": LORA, "checkpointing": "nested"},
    "lora truncated": {"lora": LORA, "checkpointing": "nested", "grad_steps": 2},
    "lora per step": {"lora": LORA, "lora_per_step": 4, "checkpointing": "nested"},
    "lora online teacher": {"lora": LORA, "checkpointing": "block"},
    "lora objectives": {"lora": LORA, "checkpointing": "block", "objective": all_together},
    "full none": {"lora": None, "checkpointing": "none"},
    "full nested": {"lora": None, "checkpointing": "nested"},
}
QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "use_distributed_sampler": False}


class Grads(pl.Callback):
    """Keeps the whole gradient of the last optimizer step."""

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        grads = {name: p.grad for name, p in everything(pl_module).items()}
        self.grads = {name: full_tensor(g).clone() for name, g in grads.items() if g is not None}


class Fixed(DistillDataModule):
    """The first 8 rows: one batch for one process, a half for each of two."""

    def train_dataloader(self):
        rank, world = self.trainer.global_rank, self.trainer.world_size
        items = [self.train_set[row] for row in range(rank, 8, world)]
        if self.online:
            items = [item | {"latents": None, "image": None} for item in items]
        return DataLoader(items, batch_size=8 // world, collate_fn=collate)


def everything(module):
    return module.trained() | module.companions()


def weights_of(module):
    return {name: full_tensor(p.detach()).clone() for name, p in everything(module).items()}


def one_step(pairs, case, strategy, devices):
    """Return gradient and weights after an optimizer step on 8 rows."""
    torch.manual_seed(0)
    options = dict(CASES[case])
    objective = options.pop("objective", Regression)()
    module = DirectDistill(
        "tiny-digits",
        torch_dtype="float32",
        preflight=False,
        freeze=UNUSED,
        objective=objective,
        teacher_num_inference_steps=4,
        optimizer=lambda params: torch.optim.SGD(params, lr=0.1),
        **options,
    )
    data = Fixed(str(Path(pairs) / "train/metadata.csv"))
    data.online = "online" in case
    grads = Grads()
    options = QUIET | {"enable_checkpointing": False, "max_steps": 1, "callbacks": [grads]}
    trainer = pl.Trainer(strategy=strategy, devices=devices, gradient_clip_val=0.01, **options)
    trainer.fit(module, datamodule=data)
    return grads.grads, weights_of(module)


def train(pairs, path, strategy, devices, lora, max_steps, ckpt_path=None, **options):
    """Train with the real loader, dropout, schedule and average; save `path`; return weights.

    A LoRA is trained with all objectives together.
    """
    torch.manual_seed(0)
    module = DirectDistill(
        "tiny-digits",
        torch_dtype="float32",
        lora=lora,
        checkpointing="none",
        objective=all_together(1) if lora else Regression(),
        preflight=options.get("preflight", False),
        freeze=[] if options.get("preflight") else UNUSED,
        teacher_num_inference_steps=4,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 2, 20),
    )
    data = DistillDataModule(str(Path(pairs) / "train/metadata.csv"), batch_size=8 // devices)
    callbacks = options.get("callbacks", [])
    trainer = pl.Trainer(
        strategy=strategy,
        devices=devices,
        gradient_clip_val=1.0,
        max_steps=max_steps,
        callbacks=[EMA(0.9), *callbacks],
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        default_root_dir=Path(path).with_suffix(""),
        **QUIET,
    )
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    trainer.save_checkpoint(path)
    return weights_of(module)


class Signal(pl.Callback):
    """Sends a signal to one process, in the middle of its third batch."""

    def __init__(self, number, rank):
        self.number, self.rank = number, rank

    def on_before_backward(self, trainer, pl_module, loss):
        if trainer.global_step == 2 and trainer.global_rank == self.rank:
            os.kill(os.getpid(), self.number)


def difference(found, expected):
    """Return the relative difference of two dictionaries of tensors, in the 2-norm."""
    assert found.keys() == expected.keys()
    error = sum((found[k] - expected[k]).double().square().sum() for k in expected)
    return (error / sum(expected[k].double().square().sum() for k in expected)).sqrt().item()


def resume(pairs, out, strategy, report):
    """Compare interrupted runs with the uninterrupted one, which samples prompts meanwhile."""
    samples = SampleImages(["a red seven"], every_n_steps=3)
    for name, lora in (("lora", {"r": 4, "lora_dropout": 0.1}), ("full", None)):
        stem = f"{out}/{strategy}_{name}"
        options = {"callbacks": [samples]}
        uninterrupted = train(pairs, f"{stem}_end.ckpt", strategy, 2, lora, 5, **options)
        sheets = sorted(path.name for path in Path(f"{stem}_end/samples").iterdir())
        report(f"{name} samples", sheets)
        train(pairs, f"{stem}.ckpt", strategy, 2, lora, 2)
        resumed = train(pairs, f"{stem}_end.ckpt", strategy, 2, lora, 5, f"{stem}.ckpt")
        report(f"{name} resumed", difference(resumed, uninterrupted))
    resumed = train(pairs, f"{stem}_end.ckpt", strategy, 2, None, 5, f"{out}/one_full.ckpt")
    report("full of one process resumed", difference(resumed, uninterrupted))


def stop(pairs, out, strategy, report):
    """One process gets SIGTERM: both save and end after the step.

    Preflight finds and freezes what gets no gradient.
    """
    folder = Path(out) / f"{strategy}_stopped"
    saver = ModelCheckpoint(folder, filename="stopped", save_on_exception=True)
    callbacks = [Signal(signal.SIGTERM, rank=1), saver]
    try:
        options = {"callbacks": callbacks, "preflight": True}
        train(pairs, folder / "end.ckpt", strategy, 2, None, 5, **options)
    except SystemExit as end:
        report("stopped", str(end))


class Rows(pl.Callback):
    """Records steps and rows of every batch, of both processes; saves in mid-epoch."""

    def __init__(self, half):
        self.half = half
        self.seen = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        both = [None, None]
        mine = (batch["num_inference_steps"], batch["row"])
        torch.distributed.all_gather_object(both, mine)
        self.seen.append(both)
        if trainer.global_step == 4:
            trainer.save_checkpoint(self.half)


def epochs(pairs, out, ckpt_path=None):
    """Train three epochs of a table with two step counts, encoded ahead; return the batches."""
    torch.manual_seed(0)
    module = DirectDistill(
        "tiny-digits", torch_dtype="float32", lora=LORA, checkpointing="none", freeze=UNUSED
    )
    options = {"base_path": str(Path(pairs) / "train"), "cache_dir": f"{out}/cache"}
    data = DistillDataModule(f"{out}/mixed.csv", batch_size=3, **options)
    rows = Rows(f"{out}/half.ckpt")
    options = QUIET | {"enable_checkpointing": False, "callbacks": [rows]}
    trainer = pl.Trainer(strategy="ddp", devices=2, max_epochs=3, **options)
    trainer.fit(module, datamodule=data, ckpt_path=ckpt_path)
    return rows.seen


def buckets(pairs, out, report):
    """Both processes take rows of one bucket at every step, and miss none, also after a resume."""
    seen = epochs(pairs, out)
    shared = all(one[0] == two[0] and len(one[1]) == len(two[1]) for one, two in seen)
    counts = []  # of rows, in each epoch
    for epoch in range(3):
        part = seen[epoch * len(seen) // 3 : (epoch + 1) * len(seen) // 3]
        rows = [row for both in part for _, batch in both for row in batch]
        counts.append([len(rows), len(set(rows))])
    report("buckets", shared, counts, epochs(pairs, out, f"{out}/half.ckpt") == seen[4:])


def main(pairs, out, *strategies):
    expected = {}
    if "LOCAL_RANK" not in os.environ:  # before Lightning makes this process the first of two
        expected = {case: one_step(pairs, case, "auto", 1) for case in CASES}
        rows = pd.read_csv(Path(pairs) / "train/metadata.csv").iloc[:17]
        rows["num_inference_steps"] = [2 if index % 3 else 3 for index in range(len(rows))]
        rows.to_csv(f"{out}/mixed.csv", index=False)
    first = bool(expected)
    for strategy in strategies:

        def report(case, *values, strategy=strategy):
            if first:
                print(json.dumps([f"{strategy} {case}", *values]), flush=True)

        for case in CASES:
            found = one_step(pairs, case, strategy, 2)
            if first:
                report(case, *map(difference, found, expected[case]))
        resume(pairs, out, strategy, report)
        if strategy == "ddp":
            buckets(pairs, out, report)
        stop(pairs, out, strategy, report)


if __name__ == "__main__":
    main(*sys.argv[1:])
