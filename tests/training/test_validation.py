import json
import math
import shutil
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from conftest import ROOT, generate
from independent_metrics import ssim_by_scipy
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torchmetrics.image import PeakSignalNoiseRatio

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.cli import main
from lit_distill.training.image_callbacks import ImageGrid


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Five held-out rows of three prompts, two of them for a student of two steps."""
    out = tmp_path_factory.mktemp("rows")
    generate(out, "prompts_heldout.txt", 3, 1_000_000)
    more = tmp_path_factory.mktemp("more")
    generate(more, "prompts_heldout.txt", 2, 2_000_000)
    for kind in ("images", "latents"):
        for file in sorted((more / kind).iterdir()):
            shutil.copy(file, out / kind / f"1{file.name}")
    tables = [pd.read_csv(folder / "metadata.csv", dtype=str) for folder in (out, more)]
    for kind in ("image", "latents"):
        tables[1][kind] = tables[1][kind].str.replace("/0", "/10", n=1)
    table = pd.concat(tables)
    table["num_inference_steps"] = ["4", "4", "4", "2", "2"]
    table.to_csv(out / "metadata.csv", index=False)
    return out


def module(**options):
    options = {"lora": {"r": 4}, "checkpointing": "none", "torch_dtype": "float32"} | options
    return DirectDistill(
        "tiny-digits", optimizer=lambda params: torch.optim.AdamW(params, lr=2e-3), **options
    )


QUIET = {"accelerator": "cpu", "enable_progress_bar": False, "enable_model_summary": False}
QUIET |= {"use_distributed_sampler": False, "num_sanity_val_steps": -1}


def fit(pairs, rows, path, logger=False, callbacks=(), model=None, cache_dir=None, **options):
    data = DistillDataModule(
        str(pairs / "train/metadata.csv"),
        str(rows / "metadata.csv"),
        batch_size=2,
        cache_dir=cache_dir,
    )
    trainer = pl.Trainer(
        **{**QUIET, "max_steps": 6, "val_check_interval": 3} | options,
        default_root_dir=path,
        logger=logger,
        callbacks=list(callbacks),
    )
    model = model or module()
    trainer.fit(model, datamodule=data)
    return model, trainer


class Watch(pl.Callback):
    """Counts rollouts, calls of the text encoder and validation batches."""

    def __init__(self):
        self.encoded, self.batches, self.undistilled = [], [], []

    def on_validation_start(self, trainer, pl_module):
        self.validating = True
        self.batches.append(0)
        self.encoded.append(0)
        self.undistilled.append(0)
        if len(self.batches) > 1:
            return
        own = pl_module.undistilled

        def undistilled():
            self.undistilled[-1] += self.validating
            return own()

        pl_module.undistilled = undistilled
        pl_module.pipe.text_encoder.register_forward_hook(self.count)

    def count(self, *_):
        self.encoded[-1] += self.validating

    def on_validation_batch_end(self, *_):
        self.batches[-1] += 1

    def on_validation_end(self, *_):
        self.validating = False


@pytest.fixture(scope="module")
def fitted(pairs, rows, tmp_path_factory):
    path, watch = tmp_path_factory.mktemp("fit"), Watch()
    model, trainer = fit(pairs, rows, path, CSVLogger(path), [watch, ImageGrid(rows=3)])
    trainer.save_checkpoint(path / "student.ckpt")
    return model, trainer, watch, path


def test_validation_logs_the_metrics_of_the_samples(fitted, rows):
    model, trainer, _, _ = fitted
    data = DistillDataModule(val_metadata_path=str(rows / "metadata.csv"), batch_size=5)
    data.setup("validate")
    latents, target, preds, images, undistilled = [], [], [], [], []
    for batch in data.val_dataloader():
        latents.append(model.sample(batch)[0])
        undistilled.append(model.sample(batch, undistilled=True)[0])
        target.append(batch["latents"])
        preds.append(model.decode(latents[-1], batch))
        images.append(model.decode(target[-1], batch))
    latents, target, preds, images, undistilled = map(
        torch.cat, (latents, target, preds, images, undistilled)
    )
    logged = trainer.callback_metrics
    mse = (latents - target).square().mean().item()
    base = (undistilled - target).square().mean().item()
    assert mse < 0.99 * base
    assert logged["val_latent_mse"] == pytest.approx(mse, rel=1e-4)
    assert logged["val_loss"] == pytest.approx(mse, rel=1e-4)
    assert logged["val_undistilled_latent_mse"] == pytest.approx(base, rel=1e-4)
    assert logged["val_gap_closed"] == pytest.approx(1 - mse / base, rel=1e-3)
    psnr = -10 * math.log10((preds - images).square().mean().item())
    assert logged["val_psnr"] == pytest.approx(psnr, rel=1e-4)
    assert logged["val_ssim"] == pytest.approx(ssim_by_scipy(preds, images), abs=1e-4)
    # Batches come by steps: first the two rows of two steps.
    few = (latents[:2] - target[:2]).square().mean().item()
    assert logged["val_latent_mse_2_steps"] == pytest.approx(few, rel=1e-4)
    assert {"val_sharpness", "val_diversity", "val_gap_closed_4_steps"} <= set(logged)


def test_the_log_starts_before_the_first_step(fitted):
    log = pd.read_csv(next(fitted[3].rglob("metrics.csv"))).dropna(subset=["val_gap_closed"])
    assert log["step"].tolist() == [0, 2, 5]
    assert log["val_gap_closed"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert log["val_gap_closed"].iloc[-1] > 0.01
    assert (log["val_seconds"] > 0).all()


def test_validation_samples_the_undistilled_once_and_encodes_nothing_again(fitted):
    watch = fitted[2]
    assert watch.batches == [3, 3, 3]
    # Each batch for its error; the first two batches once more for the pictures of three rows.
    assert watch.undistilled == [5, 0, 0]
    assert watch.encoded[0] > 0 and watch.encoded[1:] == [0, 0]


def test_the_online_teacher_generates_a_held_out_row_once(pairs, rows, tmp_path):
    table = pd.read_csv(rows / "metadata.csv", dtype=str)
    table[["image", "latents", "height", "width"]] = ["", "", "32", "32"]
    table.to_csv(tmp_path / "metadata.csv", index=False)
    model = module(teacher_num_inference_steps=10, teacher_cfg_scale=4.0)
    generated, teacher = [], model.teacher_target

    def counted(batch):
        generated.extend(batch["row"] if batch["latents"] is None else [])
        return teacher(batch)

    model.teacher_target = counted
    _, trainer = fit(pairs, tmp_path, tmp_path, model=model)
    assert sorted(generated) == [2, 3, 4, 5, 6]
    stored = fit(pairs, rows, tmp_path, max_steps=3)[1].callback_metrics
    name = "val_undistilled_latent_mse"
    assert trainer.callback_metrics[name] == pytest.approx(stored[name].item(), rel=1e-3)


def test_released_encoders_are_not_brought_back_for_validation(pairs, rows, tmp_path):
    logged = []
    for cache_dir in (None, str(tmp_path / "cache")):
        torch.manual_seed(0)
        model, trainer = fit(
            pairs, rows, tmp_path, callbacks=[ImageGrid(2)], cache_dir=cache_dir, max_steps=3
        )
        logged.append({k: v.item() for k, v in trainer.callback_metrics.items()})
    assert len(list(tmp_path.rglob("images/*.png"))) == 2
    for name in ("val_gap_closed", "val_psnr", "val_diversity"):
        assert logged[1][name] == pytest.approx(logged[0][name], rel=1e-4), name
    with pytest.raises(RuntimeError, match="the encoders are released"):
        model.pipe.encode_prompt(["a prompt that no row has"])


def test_limit_val_batches_bounds_the_cost(pairs, rows, tmp_path):
    watch = Watch()
    fit(pairs, rows, tmp_path, callbacks=[watch], max_steps=3, limit_val_batches=1)
    assert watch.batches == [1, 1]


def test_no_image_is_decoded_if_no_metric_needs_it(pairs, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(DirectDistill, "decode", None)
    _, trainer = fit(pairs, rows, tmp_path, model=module(metrics={}), max_steps=3)
    assert "val_latent_mse" in trainer.callback_metrics
    assert "val_psnr" not in trainer.callback_metrics


class TakesImages(CSVLogger):
    """A logger with the method of Weights & Biases."""

    def log_image(self, key, images, step):
        self.taken = [*getattr(self, "taken", []), (key, images[0].size, step)]


def test_grids_go_to_every_logger_that_takes_images(fitted, pairs, rows, tmp_path):
    files = sorted(path.name for path in fitted[3].rglob("images/*.png"))
    assert files == ["step_000000.png", "step_000003.png", "step_000006.png"]
    first, last = (Image.open(next(fitted[3].rglob(files[i]))) for i in (0, -1))
    assert first.size == last.size
    edge = first.width // 3
    columns = [np.asarray(last)[:, i * edge : (i + 1) * edge] for i in range(3)]
    before = [np.asarray(first)[:, i * edge : (i + 1) * edge] for i in range(3)]
    assert np.array_equal(columns[0], before[0]) and np.array_equal(columns[1], before[1])
    assert not np.array_equal(columns[2], before[2])
    board, taker = TensorBoardLogger(tmp_path), TakesImages(tmp_path)
    fit(pairs, rows, tmp_path, [board, taker], [ImageGrid(rows=2)], max_steps=3)
    assert [(key, step) for key, _, step in taker.taken] == [("val_images", 0), ("val_images", 3)]
    assert not list(tmp_path.rglob("*.png"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(board.log_dir)
    events.Reload()
    assert [image.step for image in events.Images("val_images")] == [0, 3]


def test_checkpoints_and_early_stopping_by_the_gap_closed(pairs, rows, tmp_path):
    best = ModelCheckpoint(tmp_path, "{step}", monitor="val_gap_closed", mode="max")
    # No gain is ever this large, so that it stops at the second validation.
    stop = EarlyStopping("val_gap_closed", min_delta=2.0, patience=1, mode="max")
    _, trainer = fit(pairs, rows, tmp_path, callbacks=[best, stop], max_steps=12)
    assert trainer.global_step == 6
    assert best.best_model_score == trainer.callback_metrics["val_gap_closed"]


def test_metrics_of_the_command_line_travel_with_the_checkpoint(pairs, rows, tmp_path):
    main(
        ["fit", "--config", str(ROOT / "configs/tiny_lora.yaml"), "--trainer.max_steps", "1"]
        + ["--data.metadata_path", str(pairs / "train/metadata.csv")]
        + ["--data.val_metadata_path", str(rows / "metadata.csv")]
        + ["--trainer.default_root_dir", str(tmp_path), "--trainer.limit_val_batches", "1"]
    )
    path = next(tmp_path.rglob("last.ckpt"))
    model = DirectDistill.load_from_checkpoint(path, map_location="cpu")
    assert "frechet" in model.validator.evaluation.describe()
    objects = module(metrics={"psnr": PeakSignalNoiseRatio(data_range=1.0)})
    assert objects.hparams["metrics"] is None
    assert "psnr" in objects.validator.evaluation.describe()
    assert "ssim" not in objects.validator.evaluation.describe()


def test_two_processes_report_what_one_reports(fitted, rows, tmp_path):
    data = ["--data.val_metadata_path", str(rows / "metadata.csv"), "--data.batch_size", "2"]
    common = ["test", "--ckpt_path", str(fitted[3] / "student.ckpt"), *data]
    common += ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    main([*common, "--out", str(tmp_path / "one")])
    devices = ["--trainer.devices", "2", "--trainer.strategy", "ddp"]
    found = subprocess.run(
        [sys.executable, "-m", "lit_distill", *common, *devices, "--out", str(tmp_path / "two")],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert found.returncode == 0, found.stderr[-3000:]
    one, two = (json.loads((tmp_path / n / "metrics.json").read_text()) for n in ("one", "two"))
    assert one["rows"] == two["rows"] == 5
    for way, other in zip(one["ways"], two["ways"], strict=True):
        timed = ("seconds_an_image", "speed_up")
        numbers = {k: v for k, v in way.items() if k not in timed and way["kind"] != "teacher"}
        for name, value in numbers.items():
            expected = (
                pytest.approx(value, rel=2e-4, abs=1e-6) if isinstance(value, float) else value
            )
            assert other[name] == expected, (way["way"], name)
    tables = [pd.read_csv(tmp_path / name / "rows.csv") for name in ("one", "two")]
    pd.testing.assert_frame_equal(*tables, rtol=1e-3, atol=1e-6)
