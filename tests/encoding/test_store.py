import os
import warnings
from functools import partial

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from PIL import Image
from safetensors.torch import save_file
from torch import nn

import lit_distill.encoding.encode_once
from lit_distill import DirectDistill, DistillDataModule, load_pipeline
from lit_distill.encoding.encode_once import EncodeOnce, encoded_image
from lit_distill.encoding.store import EncodingStore
from lit_distill.pipelines.components import denoisers

QUIET = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False}
QUIET |= {"enable_model_summary": False, "use_distributed_sampler": False}


def encoding():
    return (torch.randn(1, 3).bfloat16(), [None, torch.arange(4)], {"a": torch.ones(2), "n": 5})


def equal(one, two):
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, list | tuple):
        return type(one) is type(two) and all(map(equal, one, two))
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(equal(one[key], two[key]) for key in one)
    return one == two


def test_encodings_are_restored_bit_for_bit_also_in_another_process(tmp_path):
    store, kept = EncodingStore(tmp_path), encoding()
    store["a"] = kept
    store["marker"] = None
    assert equal(store["a"], kept)
    assert not list(tmp_path.iterdir())  # not before it is whole
    store.flush()
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]
    other = EncodingStore(tmp_path)
    assert "marker" in other and other["marker"] is None
    assert equal(other["a"], kept)


def test_the_distribution_of_a_vae_can_be_stored(tmp_path):
    store = EncodingStore(tmp_path)
    parameters = torch.randn(1, 8, 2, 2)
    store["z"] = AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))
    store.flush()
    back = EncodingStore(tmp_path)["z"]
    assert torch.equal(back.latent_dist.parameters, parameters)
    with pytest.raises(TypeError, match="cannot store a"):
        store["pipe"] = nn.Linear(1, 1)


def test_a_truncated_or_foreign_shard_is_deleted_not_used(tmp_path):
    store = EncodingStore(tmp_path)
    store["a"] = encoding()
    store.flush()
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:-4])
    save_file({"x": torch.ones(1)}, tmp_path / "foreign.safetensors")
    with pytest.warns(UserWarning, match="can't be read .* encoded again"):
        again = EncodingStore(tmp_path)
    assert "a" not in again
    assert not list(tmp_path.glob("*.safetensors"))


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("lit_distill.encoding.store.MEMORY_BYTES", 100)
    store = EncodingStore()
    for index in range(10):
        store[str(index)] = torch.zeros(10)
    assert [key for key in map(str, range(10)) if key in store] == ["8", "9"]


@pytest.fixture(scope="module", params=["latents", "images", "online teacher"])
def table(request, pairs, tmp_path_factory):
    """Pairs of one kind of target."""
    path = tmp_path_factory.mktemp("tables")
    for name in ("train", "heldout"):
        rows = pd.read_csv(pairs / f"{name}/metadata.csv")
        drop = {"latents": [], "images": ["latents"], "online teacher": []}[request.param]
        rows = rows.drop(columns=drop)
        if request.param == "online teacher":
            rows["image"] = rows["latents"] = None
        for column in {"image", "latents"} & set(rows):
            rows[column] = [
                f"{name}/{file}" if isinstance(file, str) else "" for file in rows[column]
            ]
        rows.to_csv(path / f"{name}.csv", index=False)
    return path, pairs


class Losses(pl.Callback):
    def __init__(self):
        self.values = []
        self.weights = []

    def on_train_batch_end(self, trainer, module, *args):
        self.values.append(trainer.callback_metrics["train_loss"].item())
        pipe = module.pipe
        others = [
            component
            for name, component in pipe.components.items()
            if isinstance(component, nn.Module) and name not in denoisers(pipe)
        ]
        self.weights.append(sum(p.numel() for other in others for p in other.parameters()))


def fit(table, cache_dir, steps=4):
    path, pairs = table
    torch.manual_seed(0)
    losses = Losses()
    model = DirectDistill(
        "tiny-digits",
        torch_dtype="float32",
        lora={"r": 4},
        teacher_num_inference_steps=6,
        optimizer=lambda params: torch.optim.AdamW(params, lr=1e-3),
    )
    data = DistillDataModule(
        str(path / "train.csv"),
        str(path / "heldout.csv"),
        base_path=str(pairs),
        batch_size=4,
        cache_dir=None if cache_dir is None else str(cache_dir),
    )
    trainer = pl.Trainer(max_steps=steps, callbacks=[losses], enable_checkpointing=False, **QUIET)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, datamodule=data)
    metrics = {k: v.item() for k, v in trainer.callback_metrics.items() if k.startswith("val")}
    return losses, metrics


def test_training_with_and_without_the_cache_is_the_same_to_the_last_bit(
    table, tmp_path, monkeypatch
):
    plain, plain_metrics = fit(table, None)
    cached, cached_metrics = fit(table, tmp_path)
    assert cached.values == plain.values
    assert cached_metrics == plain_metrics
    assert min(plain.weights) > 0
    assert cached.weights == [0] * len(cached.values)  # no encoder's, no VAE's

    def refuse(*args, **kwargs):
        raise AssertionError("encoded again")

    monkeypatch.setattr(lit_distill.encoding.encode_once, "vae_encode", refuse)
    monkeypatch.setattr(lit_distill.encoding.encode_once.EncodeOnce, "encode", refuse)
    again, again_metrics = fit(table, tmp_path)
    assert again.values == plain.values
    assert again_metrics == plain_metrics


def test_nothing_stale_is_returned(tmp_path):
    """Other weights of an encoder, other arguments and a changed file have other keys."""

    def encoder(change=None):
        pipe = load_pipeline("tiny-digits")
        if change is not None:
            with torch.no_grad():
                next(getattr(pipe, change).parameters()).flatten()[0] += 1
        return EncodeOnce(pipe, EncodingStore(tmp_path / "cache"))

    keys = {
        encoder().key("a"),
        encoder("text_encoder").key("a"),
        encoder("vae").key("a"),
        encoder().key("b"),
    }
    assert len(keys) == 4
    assert encoder("transformer").key("a") == encoder().key("a")  # encodes nothing
    image = tmp_path / "a.png"
    Image.new("RGB", (32, 32), "red").save(image)
    cached = encoder()
    cached.cache_image(str(image))
    encoded = partial(encoded_image, cached.store, cached.namespace)
    assert encoded(str(image)).shape == (4, 1, 8, 8)
    Image.new("RGB", (32, 32), "blue").save(image)
    os.utime(image, ns=(0, 0))
    with pytest.raises(ValueError, match=r"a\.png has changed since training began"):
        encoded(str(image))
