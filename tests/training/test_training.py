import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch
from conftest import ROOT
from lightning.pytorch.loggers import CSVLogger
from short_training import adamw, data, fit, module
from tiny_pipelines import CALL_KWARGS, build
from two_processes import QUIET, difference, train, weights_of

from lit_distill import DistillDataModule, load_student, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.compute.precision import compute_in
from lit_distill.pipelines.components import denoisers
from lit_distill.training.ema import EMA
from lit_distill.training.throughput import TrainingMonitor

# Numerics


def test_small_steps_move_float32_weights_where_bfloat16_ones_stall(pairs, tmp_path):
    model = module(lora=None, torch_dtype="bfloat16", optimizer=adamw(lr=1e-5, weight_decay=0.0))
    before = {}

    class Before(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            before.update(weights_of(pl_module))

    trainer = fit(model, pairs, tmp_path, precision="bf16-mixed", callbacks=[Before()])
    after = {n: p for n, p in model.trained().items() if p.grad is not None and p.grad.any()}
    assert {p.dtype for p in after.values()} == {torch.float32}
    state = trainer.optimizers[0].state_dict()["state"]
    assert {entry["exp_avg"].dtype for entry in state.values()} == {torch.float32}
    moved = stalled = total = 0
    for name, weight in after.items():
        reached = weight.grad.abs() > 1e-6  # Adam's first step is lr wherever eps is small
        moved += ((weight != before[name]) & reached).sum().item()
        stalled += ((weight.bfloat16() == before[name].bfloat16()) & reached).sum().item()
        total += reached.sum().item()
    assert moved / total > 0.99
    assert stalled / total > 0.75


@pytest.mark.parametrize("lora", [{"r": 4}, None], ids=["lora", "full"])
def test_training_in_bfloat16_computes_what_the_exported_student_does(lora, pairs, tmp_path):
    model = module(lora=lora, torch_dtype="bfloat16")
    trainer = fit(model, pairs, tmp_path, max_steps=3, precision="bf16-mixed")
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    batch = next(iter(trainer.train_dataloader))
    with torch.autocast("cpu", torch.bfloat16):  # as the trainer has it around a step
        found = model.student_rollout(batch)
    assert found.requires_grad
    with torch.no_grad():
        expected = rollout(
            load_student(tmp_path / "student.ckpt"),
            num_inference_steps=batch["num_inference_steps"],
            generator=[torch.Generator().manual_seed(seed) for seed in batch["seed"]],
            prompt=batch["prompt"],
            height=32,
            width=32,
        )
    assert torch.equal(found, expected)


@pytest.mark.parametrize("family", ["ZImage", "Flux2Klein", "Wan", "StableDiffusionXL"])
def test_families_compute_in_bfloat16_as_in_inference(family):
    """Z-Image reads the data type of its own weights, Flux.2 and Wan that of the denoiser."""

    def sample(pipe):
        generator = [torch.Generator().manual_seed(0)]
        call = {"prompt": ["a cat"], "num_inference_steps": 2} | CALL_KWARGS[family]
        return rollout(pipe, generator=generator, checkpointing="step", **call)

    plain, trained = build(family).to(torch.bfloat16), build(family).to(torch.bfloat16)
    dtypes = {
        k: {n: p.dtype for n, p in d.named_parameters()} for k, d in denoisers(trained).items()
    }
    make_trainable(trained, None)
    for name, denoiser in denoisers(trained).items():
        compute_in(denoiser, dtypes[name], torch.bfloat16)
    with torch.no_grad():
        expected = sample(plain)
    found = sample(trained)
    assert torch.equal(found, expected)
    found.float().square().mean().backward()
    grads = [p.grad for d in denoisers(trained).values() for p in d.parameters()]
    assert {g.dtype for g in grads if g is not None} == {torch.float32}


def test_weights_in_half_precision_are_refused(pairs, tmp_path):
    with pytest.raises(ValueError, match=r"trainer\.precision is bf16-true.*use bf16-mixed"):
        fit(module(), pairs, tmp_path, precision="bf16-true")


def test_a_loss_that_is_not_finite_stops_with_row_step_and_norm(pairs, tmp_path):
    class Broken(DistillDataModule):
        def on_after_batch_transfer(self, batch, dataloader_idx):
            if 7 in batch["row"]:
                batch["latents"][batch["row"].index(7)] = float("inf")
            return batch

    model = module()
    broken = Broken(str(pairs / "train/metadata.csv"), batch_size=4)
    trainer = pl.Trainer(max_epochs=1, default_root_dir=tmp_path, **QUIET)
    with pytest.raises(FloatingPointError, match=r"step \d: .*norm is nan; row 7: loss inf\. No"):
        trainer.fit(model, datamodule=broken)
    assert all(torch.isfinite(p).all() for p in model.parameters())


# Watching


def test_logged_are_the_mean_loss_of_an_optimizer_step_its_norm_and_speed(pairs, tmp_path):
    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            losses.append(outputs["loss"].item())

    logger = CSVLogger(tmp_path)
    model = module(torch_dtype="bfloat16", optimizer=adamw(fused=True))
    options = {"logger": logger, "log_every_n_steps": 1, "max_steps": 4}
    options |= {"accumulate_grad_batches": 2, "gradient_clip_val": 1.0, "precision": "bf16-mixed"}
    callbacks = [Losses(), TrainingMonitor(every_n_steps=2, peak_flops=1e12)]
    trainer = fit(model, pairs, tmp_path, callbacks=callbacks, **options)
    with Path(logger.log_dir, "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    logged = [float(row["train_loss"]) for row in rows if row.get("train_loss")]
    # Lightning has divided what it returns by the number of accumulated batches.
    expected = [one + two for one, two in zip(losses[::2], losses[1::2], strict=True)]
    assert logged == pytest.approx(expected)
    assert [int(row["step"]) for row in rows if row.get("train_loss")] == [0, 1, 2, 3]
    assert trainer.callback_metrics["train_loss_4_steps"] == pytest.approx(expected[-1])
    assert trainer.callback_metrics["grad_norm"] > 0
    speed = trainer.callback_metrics
    # 16 tokens in each of 4 denoiser calls
    assert speed["tokens_per_second"] == pytest.approx(64 * speed["images_per_second"].item())
    assert 0 < speed["model_flops_utilisation"] < 1
    assert speed["peak_memory_GiB"] > 0.1


def test_model_flops_are_those_of_the_matrices(pairs, tmp_path):
    monitor = TrainingMonitor()
    model = module(lora=None, grad_steps=1, scheduler={"shift_terminal": None})
    fit(model, pairs, tmp_path, callbacks=[monitor])
    ((tokens, flops),) = monitor._counts.values()
    assert tokens == 4 * 16
    # 2 operations a weight and token at least, 13 prompt tokens beside 16 of the image; forward in
    # 4 steps, backward twice that through one of them.
    blocks = sum(
        m.weight.numel() for n, m in model.denoisers.named_modules() if n.endswith("mlp.net.2")
    )
    assert flops > 2 * blocks * 13 * (4 + 2)


def test_flops_of_compiled_blocks_are_counted_with_their_attention(pairs, monkeypatch):
    model = module(compile=True)
    model.configure_model()
    rows = data(pairs, batch_size=2)
    rows.setup("fit")
    batch = next(iter(rows.train_dataloader()))
    monitor = TrainingMonitor()
    monitor._started = 0.0
    monitor._count(model, batch)  # encodes the prompts
    monitor._counts.clear()
    compiled = monitor._count(model, batch)[1]
    monkeypatch.setattr("lit_distill.training.throughput.CPU_ATTENTION", {})
    monitor._counts.clear()
    attention = compiled - monitor._count(model, batch)[1]
    # Scores and their sum over 29 tokens of 64 channels; 4 layers, 4 steps, backward as much.
    assert attention == 2 * 2 * 29**2 * 64 * 4 * 4 * 2


# Moving average


def test_the_average_is_of_trained_weights_and_is_what_is_validated_and_exported(pairs, tmp_path):
    seen = []

    class Weights(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, *_):
            seen.append(weights_of(pl_module))

        def on_validation_epoch_start(self, trainer, pl_module):
            self.validated = weights_of(pl_module)

    model, weights = module(), Weights()
    first = {}

    class First(pl.Callback):
        def on_train_start(self, trainer, pl_module):
            first.update(weights_of(pl_module))

    trainer = pl.Trainer(
        max_steps=8,
        callbacks=[First(), weights, EMA(0.3)],
        num_sanity_val_steps=0,
        default_root_dir=tmp_path,
        **QUIET,
    )
    loaded = DistillDataModule(
        str(pairs / "train/metadata.csv"), str(pairs / "heldout/metadata.csv"), batch_size=4
    )
    trainer.fit(model, datamodule=loaded)
    expected = first
    for step, now in enumerate(seen):
        decay = min(0.3, (1 + step) / (10 + step))
        expected = {n: decay * expected[n] + (1 - decay) * now[n] for n in now}
    trainer.save_checkpoint(tmp_path / "ema.ckpt")
    assert difference(weights.validated, expected) < 1e-6
    assert difference(weights_of(model), expected) < 1e-6
    assert difference(seen[-1], expected) > 1e-4
    content = torch.load(tmp_path / "ema.ckpt", weights_only=True)
    assert difference(content["state_dict"], expected) < 1e-6
    assert difference(content["ema"]["weights"], seen[-1]) == 0
    student = dict(load_student(tmp_path / "ema.ckpt").transformer.named_parameters())
    own = {name: student[name.removeprefix("denoisers.transformer.")] for name in expected}
    assert difference(own, expected) < 1e-6


# Several processes


@pytest.fixture(scope="module")
def two(pairs, tmp_path_factory):
    """What two_processes.py reports, and its folder."""
    out = tmp_path_factory.mktemp("two")
    train(pairs, out / "one_full.ckpt", "auto", 1, None, 2)
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tests/helpers/two_processes.py"), str(pairs), str(out)]
    found = subprocess.run(
        [*command, "ddp", "fsdp2"], capture_output=True, text=True, env=environment
    )
    assert found.returncode == 0, found.stderr[-3000:]
    lines = [json.loads(line) for line in found.stdout.splitlines() if line.startswith("[")]
    return {case: values for case, *values in lines}, out


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_equal_the_doubled_batch(two, strategy):
    """For each checkpointing mode, truncation, a LoRA per step, online teacher, all objectives."""
    found = {k: v for k, v in two[0].items() if k.startswith(strategy) and len(v) == 2}
    assert len(found) == 10
    # The gradient of a discriminator's heads is a small difference of two sums.
    together = found.pop(f"{strategy} lora objectives")
    assert all(error <= 1e-5 for error in together), together
    assert all(error <= 1e-6 for errors in found.values() for error in errors), found


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_two_processes_resume_exactly_and_from_one(two, strategy, pairs, tmp_path):
    found, out = two
    assert found[f"{strategy} lora resumed"] == found[f"{strategy} full resumed"] == [0.0]
    assert found[f"{strategy} full of one process resumed"][0] < 1e-6
    sheets = [f"step_00000{step}.png" for step in (0, 3, 5)]
    assert found[f"{strategy} lora samples"] == found[f"{strategy} full samples"] == [sheets]
    # One process resumes from their checkpoint, and reads their student.
    checkpoint = out / f"{strategy}_full.ckpt"
    resumed = train(pairs, tmp_path / "end.ckpt", "auto", 1, None, 5, checkpoint)
    content = torch.load(out / f"{strategy}_full_end.ckpt", weights_only=True)
    assert difference(resumed, content["state_dict"]) < 1e-6
    student = load_student(out / f"{strategy}_full_end.ckpt")
    own = {f"denoisers.transformer.{n}": p for n, p in student.transformer.named_parameters()}
    own = {name: own[name] for name in content["state_dict"]}
    assert difference(own, content["state_dict"]) == 0


def test_two_processes_share_buckets_and_a_cache(two):
    """17 rows, in buckets of 6 and 11, in batches of 3 a process: one row comes twice an epoch."""
    shared, counts, rest_is_the_same = two[0]["ddp buckets"]
    assert shared
    assert counts == [[18, 17]] * 3
    assert rest_is_the_same
    assert list((two[1] / "cache/encodings-v1").glob("*.safetensors"))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_signal_to_one_process_stops_and_saves_both(two, strategy):
    found, out = two
    assert found[f"{strategy} stopped"] == ["stopped by SIGTERM after step 3"]
    content = torch.load(out / f"{strategy}_stopped/stopped.ckpt", weights_only=True)
    assert content["global_step"] == 3
