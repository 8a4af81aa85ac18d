import json
import math
import shutil
import subprocess
import sys

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import transformers as tf
from conftest import ROOT, generate
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from PIL import Image
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio
from torchmetrics.image.kid import KernelInceptionDistance

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.callbacks import ImageGrid
from lit_distill.cli import main
from lit_distill.evaluation import Draws, Evaluation
from lit_distill.features import TransformersFeatures, load_features
from lit_distill.metrics import (
    CLIPScore,
    Diversity,
    FrechetDistance,
    Sharpness,
    default_metrics,
)


def pictures(count, seed=0):
    """Pictures of digits as the embedded pipeline's classifier knows them: smooth and coloured."""
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    smooth = scipy.ndimage.gaussian_filter(noise.numpy(), (0, 0, 2, 2))
    return torch.from_numpy(smooth * 3 + 0.5).clamp(0, 1)


def draws(preds, target, prompt=None):
    """Rows whose latents are the pixels themselves."""
    prompt = prompt or [f"prompt {index // 2}" for index in range(len(preds))]
    undistilled = torch.full((len(preds),), 0.25)
    return Draws(prompt, preds, target, preds, target, undistilled)


def measure(metrics, *parts):
    evaluation = Evaluation(metrics)
    for part in parts:
        evaluation.update(part, 4)
    return evaluation.compute()


def ssim_by_scipy(one, two):
    """Wang et al. 2004 with a Gaussian of 1.5, images mirrored at their edges."""
    one, two = one.double().numpy(), two.double().numpy()

    def blurred(image):
        return scipy.ndimage.gaussian_filter(
            image, (0, 0, 1.5, 1.5), mode="mirror", radius=(0, 0, 5, 5)
        )

    mean1, mean2 = blurred(one), blurred(two)
    var1, var2 = blurred(one**2) - mean1**2, blurred(two**2) - mean2**2
    both = blurred(one * two) - mean1 * mean2
    top = (2 * mean1 * mean2 + 0.01**2) * (2 * both + 0.03**2)
    value = top / ((mean1**2 + mean2**2 + 0.01**2) * (var1 + var2 + 0.03**2))
    return value.mean()


def frechet_by_scipy(one, two):
    one, two = (load_features("tiny-digits")(images).double().numpy() for images in (one, two))
    cov1, cov2 = np.cov(one.T), np.cov(two.T)
    # A little of the identity keeps the root of few rows' covariance in reach of scipy.
    tiny = 1e-12 * np.eye(len(cov1))
    root = scipy.linalg.sqrtm((cov1 + tiny) @ (cov2 + tiny)).real
    return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)


def test_metrics_agree_with_independent_implementations():
    target = pictures(40)
    preds = (target + 0.1 * pictures(40, 1)).clamp(0, 1)
    metrics = default_metrics() | {"frechet": FrechetDistance("tiny-digits")}
    parts = [draws(preds[i : i + 7], target[i : i + 7]) for i in range(0, 40, 7)]
    found = measure(metrics, *parts)
    mse = (preds - target).double().square().mean().item()
    assert found["latent_mse"] == pytest.approx(mse, rel=1e-6)
    assert found["gap_closed"] == pytest.approx(1 - mse / 0.25, rel=1e-6)
    assert found["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    assert found["ssim"] == pytest.approx(ssim_by_scipy(preds, target), abs=1e-5)
    assert found["frechet"] == pytest.approx(frechet_by_scipy(preds, target), rel=1e-3)
    assert found["frechet"] > 0.01


def test_sharpness_is_the_ratio_of_squared_slopes():
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    found = measure({"sharpness": Sharpness()}, draws(0.5 * ramp, ramp))
    assert found["sharpness"] == pytest.approx(0.25)
    turned = measure({"sharpness": Sharpness()}, draws(ramp.transpose(2, 3), ramp))
    assert turned["sharpness"] == pytest.approx(1)


def test_diversity_is_the_mean_distance_of_pairs_of_one_prompt():
    grey = torch.tensor([0.0, 0.2, 0.6, 0.9])
    target = grey.view(4, 1, 1, 1).expand(4, 3, 8, 8)
    prompts = ["a", "a", "a", "b"]  # pairs .2, .4 and .6; b has no second seed
    preds = torch.tensor([0.0, 0.1, 0.1, 0.7]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    found = measure({"diversity": Diversity()}, draws(preds, target, prompts))
    assert found["diversity"] == pytest.approx((0.1 + 0.0 + 0.1) / (0.2 + 0.4 + 0.6))
    alone = measure({"diversity": Diversity()}, draws(preds, target, ["a", "b", "c", "d"]))
    assert "diversity" not in alone


def test_planted_faults_are_seen():
    target = pictures(64)
    metrics = default_metrics() | {"frechet": FrechetDistance("tiny-digits")}
    faithful = measure(metrics, draws((target + 0.01).clamp(0, 1), target))
    blurred = torch.from_numpy(scipy.ndimage.gaussian_filter(target.numpy(), (0, 0, 1, 1)))
    assert measure(metrics, draws(blurred, target))["sharpness"] < 0.8 < faithful["sharpness"]
    same = target[::2].repeat_interleave(2, 0)  # one image for both seeds of a prompt
    assert measure(metrics, draws(same, target))["diversity"] == 0
    assert faithful["diversity"] == pytest.approx(1, abs=0.02)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = measure(metrics, draws(target[order], target))
    assert shuffled["latent_mse"] > 50 * faithful["latent_mse"]
    assert shuffled["psnr"] < faithful["psnr"] - 15
    assert shuffled["frechet"] == pytest.approx(0, abs=1e-4)
    other = measure(metrics, draws(pictures(64, 2).roll(1, 1) * 0.5, target))
    assert other["frechet"] > 0.1


class Perceptual(Metric):
    """With the arguments of torchmetrics' LPIPS."""

    def __init__(self):
        super().__init__()
        self.add_state("total", torch.tensor(0.0), dist_reduce_fx="sum")

    def update(self, img1, img2):
        self.total += (img1 - 2 * img2).sum()

    def compute(self):
        return self.total


class Unknown(Metric):
    def update(self, waveform):
        pass

    def compute(self):
        return torch.tensor(0.0)


def test_metrics_ask_for_what_they_measure_by_name():
    target, preds = pictures(8), pictures(8, 1)
    kid = KernelInceptionDistance(feature=load_features("tiny-digits"), subset_size=8, subsets=1)
    found = measure({"lpips": Perceptual()}, draws(preds, target))
    assert found["lpips"] == pytest.approx((preds - 2 * target).sum().item(), rel=1e-5)
    evaluation = Evaluation({"kid": kid})
    evaluation.update(draws(preds, target), 4)
    kid.update(preds, real=False)
    kid.update(target, real=True)
    group = evaluation._metrics["kid"]
    assert torch.equal(torch.cat(group.real_features), torch.cat(kid.real_features))
    assert torch.equal(torch.cat(group.fake_features), torch.cat(kid.fake_features))
    with pytest.raises(TypeError, match=r"metrics\.odd: Unknown\.update asks for \['waveform'\]"):
        Evaluation({"odd": Unknown()})


def test_copies_of_a_metric_share_its_network():
    metric = FrechetDistance("tiny-digits")
    evaluation = Evaluation({"frechet": metric})
    assert evaluation.fresh()._metrics["frechet"].inception is metric.inception
    evaluation.update(draws(pictures(4), pictures(4, 1)), 4)
    assert metric.fake_features_num_samples == 0


def test_values_of_every_number_of_steps_where_rows_differ():
    target, preds = pictures(12), pictures(12, 1)
    few, many = draws(preds[:4], target[:4]), draws(preds[4:], target[4:])
    evaluation = Evaluation(default_metrics())
    evaluation.update(few.select([0, 1]), 2)
    evaluation.update(few.select([2, 3]), 2)
    assert "psnr_2_steps" not in evaluation.compute()
    evaluation.update(many, 4)
    found = evaluation.compute()
    alone = {2: measure(default_metrics(), few), 4: measure(default_metrics(), many)}
    for steps, values in alone.items():
        for name, value in values.items():
            assert found[f"{name}_{steps}_steps"] == pytest.approx(value, rel=1e-5)
    whole = measure(default_metrics(), few, many)
    for name, value in whole.items():
        assert found[name] == pytest.approx(value, rel=1e-5)


def test_rows_are_counted_once_over_all_processes():
    evaluation = Evaluation({})
    assert evaluation.claim([[11, 12], [13, 14]], rank=1) == [0, 1]
    assert evaluation.claim([[15, 16], [17, 11]], rank=1) == [0]  # 11 fills up the last batch
    assert evaluation.claim([[18], [18]], rank=1) == []
    evaluation.reset()
    assert evaluation.claim([[18], [19]], rank=0) == [0]


# Networks of transformers


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A tiny CLIP with random weights, saved as the hub has it."""
    path = tmp_path_factory.mktemp("clip")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 12}
    letters = "abcdefghijklmnopqrstuvwxyz"
    words = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{a}</w>" for a in letters)]
    tokenizer = tf.CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        pad_token=words[1],
        model_max_length=16,
    )
    ids = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
    text = sizes | {"vocab_size": len(words), "max_position_embeddings": 16} | ids
    vision = sizes | {"image_size": 20, "patch_size": 10}
    config = tf.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    tf.CLIPModel(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    settings = {"size": {"shortest_edge": 24}, "crop_size": {"height": 20, "width": 20}}
    settings |= {"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.3, 0.4]}
    settings |= {"image_processor_type": "CLIPImageProcessor"}
    (path / "preprocessor_config.json").write_text(json.dumps(settings))
    return path


def test_images_are_prepared_as_the_network_s_own_settings_say(clip):
    image = pictures(1)[0]
    pil = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    resized = np.asarray(pil.resize((24, 24), Image.Resampling.BICUBIC), float)[2:22, 2:22] / 255
    expected = (resized - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    found = TransformersFeatures(str(clip)).preprocess(image[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(found - expected).max() < 0.04  # twice 1/255 over a deviation of .2


def test_clip_score_is_the_cosine_of_image_and_prompt(clip):
    images, prompts = pictures(4), ["red", "blue seven", "seven red", "blue"]
    metric = CLIPScore(str(clip))
    found = measure({"clip_score": metric}, draws(images, images, prompts))["clip_score"]
    model = tf.CLIPModel.from_pretrained(clip).eval()
    tokens = tf.AutoTokenizer.from_pretrained(clip)(
        prompts, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**tokens, pixel_values=metric.network.preprocess(images))
    cosine = (output.image_embeds * output.text_embeds).sum(1)  # both of unit length
    assert len(set(cosine.tolist())) == 4
    assert found == pytest.approx(100 * cosine.clamp(min=0).mean().item(), abs=1e-3)


def test_frechet_distance_on_a_clip_and_on_a_dino(clip, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    dino = tf.Dinov2Model(tf.Dinov2Config(**sizes, image_size=28, patch_size=14))
    dino.save_pretrained(tmp_path)
    shutil.copy(clip / "preprocessor_config.json", tmp_path)
    settings = json.loads((tmp_path / "preprocessor_config.json").read_text())
    settings["crop_size"] = settings["size"] = {"height": 28, "width": 28}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(settings))
    for path, features in ((clip, 12), (tmp_path, 16)):
        metric = FrechetDistance(str(path))
        assert metric.real_features_sum.shape == (features,)
        images = pictures(8)
        assert measure({"f": metric}, draws(images.flip(0), images))["f"] == pytest.approx(
            0, abs=1e-3
        )
        assert measure({"f": metric}, draws(images / 2, images))["f"] > 1e-3


# Validation


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


def test_validation_logs_what_the_draws_say(fitted, rows):
    model, trainer, _, _ = fitted
    data = DistillDataModule(val_metadata_path=str(rows / "metadata.csv"), batch_size=5)
    data.setup("validate")
    latents, target, preds, images, undistilled = [], [], [], [], []
    for batch in data.val_dataloader():
        latents.append(model.draw(batch)[0])
        undistilled.append(model.draw(batch, undistilled=True)[0])
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


def test_the_log_starts_from_nothing_learnt(fitted):
    log = pd.read_csv(next(fitted[3].rglob("metrics.csv"))).dropna(subset=["val_gap_closed"])
    assert log["step"].tolist() == [0, 2, 5]
    assert log["val_gap_closed"].iloc[0] == pytest.approx(0, abs=1e-6)
    assert log["val_gap_closed"].iloc[-1] > 0.01
    assert (log["val_seconds"] > 0).all()


def test_validation_draws_the_undistilled_once_and_encodes_nothing_anew(fitted):
    watch = fitted[2]
    assert watch.batches == [3, 3, 3]
    # Each batch for its error; the first two batches once more for the pictures of three rows.
    assert watch.undistilled == [5, 0, 0]
    assert watch.encoded[0] > 0 and watch.encoded[1:] == [0, 0]


def test_the_online_teacher_draws_a_held_out_row_once(pairs, rows, tmp_path):
    table = pd.read_csv(rows / "metadata.csv", dtype=str)
    table[["image", "latents", "height", "width"]] = ["", "", "32", "32"]
    table.to_csv(tmp_path / "metadata.csv", index=False)
    model = module(teacher_num_inference_steps=10, teacher_cfg_scale=4.0)
    drawn, teacher = [], model.teacher_target

    def counted(batch):
        drawn.extend(batch["row"] if batch["latents"] is None else [])
        return teacher(batch)

    model.teacher_target = counted
    _, trainer = fit(pairs, tmp_path, tmp_path, model=model)
    assert sorted(drawn) == [2, 3, 4, 5, 6]
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


def test_no_image_is_decoded_where_no_metric_looks_at_it(pairs, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(DirectDistill, "decode", None)
    _, trainer = fit(pairs, rows, tmp_path, model=module(metrics={}), max_steps=3)
    assert "val_latent_mse" in trainer.callback_metrics
    assert "val_psnr" not in trainer.callback_metrics


class TakesImages(CSVLogger):
    """A logger with the method of Weights & Biases."""

    def log_image(self, key, images, step):
        self.taken = [*getattr(self, "taken", []), (key, images[0].size, step)]


def test_grids_go_to_whatever_logger_is_there(fitted, pairs, rows, tmp_path):
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
    assert "frechet" in model.held_out.evaluation.describe()
    objects = module(metrics={"psnr": PeakSignalNoiseRatio(data_range=1.0)})
    assert objects.hparams["metrics"] is None
    assert "psnr" in objects.held_out.evaluation.describe()
    assert "ssim" not in objects.held_out.evaluation.describe()


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
