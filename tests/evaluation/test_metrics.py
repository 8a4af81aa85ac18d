import json
import math
import shutil

import numpy as np
import pytest
import scipy.linalg
import scipy.ndimage
import torch
import transformers as tf
from independent_metrics import ssim_by_scipy
from PIL import Image
from torchmetrics import Metric
from torchmetrics.image.kid import KernelInceptionDistance

from lit_distill.evaluation.evaluator import Evaluation, EvaluationBatch
from lit_distill.evaluation.feature_extractors import TransformersFeatures, load_features
from lit_distill.evaluation.metrics import (
    CLIPScore,
    Diversity,
    FrechetDistance,
    RowMean,
    Sharpness,
    default_metrics,
)


def pictures(count, seed=0):
    """Smooth, coloured images, as the embedded pipeline's classifier was trained on."""
    noise = torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    smooth = scipy.ndimage.gaussian_filter(noise.numpy(), (0, 0, 2, 2))
    return torch.from_numpy(smooth * 3 + 0.5).clamp(0, 1)


def samples(preds, target, prompt=None):
    """Rows whose latents are the pixels themselves."""
    prompt = prompt or [f"prompt {index // 2}" for index in range(len(preds))]
    undistilled = torch.full((len(preds),), 0.25)
    return EvaluationBatch(prompt, preds, target, preds, target, undistilled)


def measure(metrics, *parts):
    evaluation = Evaluation(metrics)
    for part in parts:
        evaluation.update(part, 4)
    return evaluation.compute()


def frechet_by_scipy(one, two):
    one, two = (load_features("tiny-digits")(images).double().numpy() for images in (one, two))
    cov1, cov2 = np.cov(one.T), np.cov(two.T)
    # A small multiple of the identity keeps scipy's root of few rows' covariance stable.
    tiny = 1e-12 * np.eye(len(cov1))
    root = scipy.linalg.sqrtm((cov1 + tiny) @ (cov2 + tiny)).real
    return ((one.mean(0) - two.mean(0)) ** 2).sum() + np.trace(cov1 + cov2 - 2 * root)


def test_metrics_agree_with_independent_implementations():
    target = pictures(40)
    preds = (target + 0.1 * pictures(40, 1)).clamp(0, 1)
    metrics = default_metrics() | {"frechet": FrechetDistance("tiny-digits")}
    parts = [samples(preds[i : i + 7], target[i : i + 7]) for i in range(0, 40, 7)]
    measured = measure(metrics, *parts)
    mse = (preds - target).double().square().mean().item()
    assert measured["latent_mse"] == pytest.approx(mse, rel=1e-6)
    assert measured["gap_closed"] == pytest.approx(1 - mse / 0.25, rel=1e-6)
    assert measured["psnr"] == pytest.approx(-10 * math.log10(mse), rel=1e-5)
    assert measured["ssim"] == pytest.approx(ssim_by_scipy(preds, target), abs=1e-5)
    assert measured["frechet"] == pytest.approx(frechet_by_scipy(preds, target), rel=1e-3)
    assert measured["frechet"] > 0.01


def test_sharpness_is_the_ratio_of_squared_slopes():
    ramp = torch.linspace(0, 1, 32).expand(2, 3, 32, 32)
    measured = measure({"sharpness": Sharpness()}, samples(0.5 * ramp, ramp))
    assert measured["sharpness"] == pytest.approx(0.25)
    turned = measure({"sharpness": Sharpness()}, samples(ramp.transpose(2, 3), ramp))
    assert turned["sharpness"] == pytest.approx(1)


def test_diversity_is_the_mean_distance_of_pairs_of_one_prompt():
    grey = torch.tensor([0.0, 0.2, 0.6, 0.9])
    target = grey.view(4, 1, 1, 1).expand(4, 3, 8, 8)
    prompts = ["a", "a", "a", "b"]  # pairs .2, .4 and .6; b has no second seed
    preds = torch.tensor([0.0, 0.1, 0.1, 0.7]).view(4, 1, 1, 1).expand(4, 3, 8, 8)
    measured = measure({"diversity": Diversity()}, samples(preds, target, prompts))
    assert measured["diversity"] == pytest.approx((0.1 + 0.0 + 0.1) / (0.2 + 0.4 + 0.6))
    alone = measure({"diversity": Diversity()}, samples(preds, target, ["a", "b", "c", "d"]))
    assert "diversity" not in alone


def test_planted_faults_are_measured():
    target = pictures(64)
    metrics = default_metrics() | {"frechet": FrechetDistance("tiny-digits")}
    faithful = measure(metrics, samples((target + 0.01).clamp(0, 1), target))
    blurred = torch.from_numpy(scipy.ndimage.gaussian_filter(target.numpy(), (0, 0, 1, 1)))
    assert measure(metrics, samples(blurred, target))["sharpness"] < 0.8 < faithful["sharpness"]
    same = target[::2].repeat_interleave(2, 0)  # one image for both seeds of a prompt
    assert measure(metrics, samples(same, target))["diversity"] == 0
    assert faithful["diversity"] == pytest.approx(1, abs=0.02)
    order = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    shuffled = measure(metrics, samples(target[order], target))
    assert shuffled["latent_mse"] > 50 * faithful["latent_mse"]
    assert shuffled["psnr"] < faithful["psnr"] - 15
    assert shuffled["frechet"] == pytest.approx(0, abs=1e-4)
    other = measure(metrics, samples(pictures(64, 2).roll(1, 1) * 0.5, target))
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


def test_metrics_get_inputs_by_the_names_of_their_arguments():
    target, preds = pictures(8), pictures(8, 1)
    kid = KernelInceptionDistance(feature=load_features("tiny-digits"), subset_size=8, subsets=1)
    measured = measure({"lpips": Perceptual()}, samples(preds, target))
    assert measured["lpips"] == pytest.approx((preds - 2 * target).sum().item(), rel=1e-5)
    evaluation = Evaluation({"kid": kid})
    evaluation.update(samples(preds, target), 4)
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
    evaluation.update(samples(pictures(4), pictures(4, 1)), 4)
    assert metric.fake_features_num_samples == 0


class Brightness(RowMean):
    def update(self, preds):
        self.add(preds.mean((1, 2, 3)))


def test_the_teacher_has_values_of_metrics_that_compare_with_nothing():
    evaluation = Evaluation(default_metrics() | {"brightness": Brightness()})
    taught = evaluation.fresh(without_comparison=True)
    images = pictures(4)
    taught.update(EvaluationBatch(["a prompt"] * 4, preds=images), 4)
    assert taught.compute() == {"brightness": pytest.approx(images.mean().item())}


def test_values_of_every_number_of_steps_where_rows_differ():
    target, preds = pictures(12), pictures(12, 1)
    few, many = samples(preds[:4], target[:4]), samples(preds[4:], target[4:])
    evaluation = Evaluation(default_metrics())
    evaluation.update(few.select([0, 1]), 2)
    evaluation.update(few.select([2, 3]), 2)
    assert "psnr_2_steps" not in evaluation.compute()
    evaluation.update(many, 4)
    measured = evaluation.compute()
    alone = {2: measure(default_metrics(), few), 4: measure(default_metrics(), many)}
    for steps, values in alone.items():
        for name, value in values.items():
            assert measured[f"{name}_{steps}_steps"] == pytest.approx(value, rel=1e-5)
    whole = measure(default_metrics(), few, many)
    for name, value in whole.items():
        assert measured[name] == pytest.approx(value, rel=1e-5)


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


def test_images_are_preprocessed_by_the_settings_of_the_network(clip):
    image = pictures(1)[0]
    pil = Image.fromarray((image * 255).round().byte().permute(1, 2, 0).numpy())
    resized = np.asarray(pil.resize((24, 24), Image.Resampling.BICUBIC), float)[2:22, 2:22] / 255
    expected = (resized - [0.4, 0.5, 0.6]) / [0.2, 0.3, 0.4]
    measured = TransformersFeatures(str(clip)).preprocess(image[None])[0].permute(1, 2, 0).numpy()
    assert np.abs(measured - expected).max() < 0.04  # twice 1/255 over a deviation of .2


def test_clip_score_is_the_cosine_of_image_and_prompt(clip):
    images, prompts = pictures(4), ["red", "blue seven", "seven red", "blue"]
    metric = CLIPScore(str(clip))
    measured = measure({"clip_score": metric}, samples(images, images, prompts))["clip_score"]
    model = tf.CLIPModel.from_pretrained(clip).eval()
    tokens = tf.AutoTokenizer.from_pretrained(clip)(
        prompts, padding="max_length", return_tensors="pt"
    )
    with torch.no_grad():
        output = model(**tokens, pixel_values=metric.network.preprocess(images))
    cosine = (output.image_embeds * output.text_embeds).sum(1)  # both of unit length
    assert len(set(cosine.tolist())) == 4
    assert measured == pytest.approx(100 * cosine.clamp(min=0).mean().item(), abs=1e-3)


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
        assert measure({"f": metric}, samples(images.flip(0), images))["f"] == pytest.approx(
            0, abs=1e-3
        )
        assert measure({"f": metric}, samples(images / 2, images))["f"] > 1e-3
