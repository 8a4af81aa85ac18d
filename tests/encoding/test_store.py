import json
import os
import sys
import warnings
from collections import Counter
from dataclasses import dataclass

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from diffusers.models.autoencoders.autoencoder_tiny import AutoencoderTinyOutput
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from diffusers.models.modeling_outputs import AutoencoderKLOutput
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

import lit_distill.encoding.encode_once
import lit_distill.encoding.store
from lit_distill import DirectDistill, DistillDataModule, load_pipeline
from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.encoding.store import FOLDER, EncodingStore, LostEncodingError
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


def shards(path):
    return sorted((path / FOLDER).glob("*.safetensors"))


def stored(path, **values):
    """Return a new store that has the values on the disk."""
    store = EncodingStore(path)
    for key, value in values.items():
        store[key] = value
    store.flush()
    return store


def test_encodings_are_restored_bit_for_bit_also_in_another_process(tmp_path):
    store, kept = EncodingStore(tmp_path), encoding()
    store["a"] = kept
    store["marker"] = None
    assert equal(store["a"], kept)
    assert not list((tmp_path / FOLDER).iterdir())  # not before it is whole
    store.flush()
    assert [path.suffix for path in (tmp_path / FOLDER).iterdir()] == [".safetensors"]
    assert equal(store["a"], kept)
    other = EncodingStore(tmp_path)
    assert "marker" in other and other["marker"] is None
    assert equal(other["a"], kept)


def test_what_encoders_return_can_be_stored(tmp_path):
    parameters = torch.randn(1, 8, 2, 2)
    output = AutoencoderKLOutput(latent_dist=DiagonalGaussianDistribution(parameters))
    text = BaseModelOutputWithPooling(last_hidden_state=parameters, hidden_states=(parameters,))
    stored(tmp_path, z=output, tiny=AutoencoderTinyOutput(latents=parameters), text=text)
    store = EncodingStore(tmp_path)
    assert torch.equal(store["z"].latent_dist.parameters, parameters)
    assert torch.equal(store["z"].latent_dist.mean, output.latent_dist.mean)
    assert torch.equal(store["tiny"].latents, parameters)
    assert isinstance(store["text"], BaseModelOutputWithPooling)
    assert torch.equal(store["text"].hidden_states[0], parameters)


@dataclass
class OfTheUser(AutoencoderTinyOutput):
    """A type that is not in the list."""


@pytest.mark.parametrize(
    "value",
    [
        nn.Linear(1, 1),
        OfTheUser(latents=torch.ones(1)),
        DiagonalGaussianDistribution(torch.ones(1, 2), deterministic=True),
        {1: torch.ones(1)},
        torch.Size([1]),
        object(),
    ],
)
def test_other_types_are_not_stored(value):
    with pytest.raises(TypeError, match="cannot store a"):
        EncodingStore()["a"] = [value]


def rewrite(path, change):
    """Change the entries of a shard as an attacker would: with a matching checksum."""
    with safe_open(path, framework="pt") as shard:
        tensors = {name: shard.get_tensor(name) for name in shard.keys()}  # noqa: SIM118
        metadata = shard.metadata()
    entries = json.loads(metadata["entries"])
    for entry in entries.values():
        change(entry)
        parts = [tensors[f"a/{index}"] for index in range(entry[1])]
        entry[2] = lit_distill.encoding.store._checksum(entry[0], parts)
    save_file(tensors, path, metadata | {"entries": json.dumps(entries)})


@pytest.mark.parametrize(
    "structure",
    [
        {"class": "diffusers.utils.dynamic_modules_utils:get_class_from_dynamic_module", "with": 0},
        {"output": "get_class_from_dynamic_module", "with": {}},
        {"output": "diffusers.utils.dynamic_modules_utils:get_class_from_dynamic_module"},
        {"distribution": "AutoencoderKLOutput", "of": {"plain": 1}},
        {"output": "AutoencoderKLOutput", "with": {"nothing": {"plain": 1}}},
        {"tensor": 7},
        {},
        [],
        None,
    ],
)
def test_a_shard_names_only_listed_types(tmp_path, structure):
    """Names in a shard are never imported, even if the checksum is right."""
    stored(tmp_path, a=torch.ones(2))
    rewrite(shards(tmp_path)[0], lambda entry: entry.__setitem__(0, structure))
    modules = set(sys.modules)
    with pytest.raises(LostEncodingError, match="is damaged"):
        EncodingStore(tmp_path)["a"]
    assert not [name for name in set(sys.modules) - modules if "dynamic" in name]


def test_files_of_the_user_in_the_folder_are_left_alone(tmp_path):
    mine = tmp_path / "model.safetensors"
    save_file({"x": torch.ones(1)}, mine)
    (tmp_path / "broken.safetensors").write_bytes(b"no safetensors")
    (tmp_path / FOLDER).mkdir()
    save_file({"x": torch.ones(1)}, tmp_path / FOLDER / "other.safetensors")
    save_file({"x": torch.ones(1)}, tmp_path / FOLDER / f"{'0' * 32}.safetensors")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*.safetensors")}
    stored(tmp_path, a=torch.ones(1))
    EncodingStore(tmp_path)
    assert {path: path.read_bytes() for path in before} == before


def test_a_truncated_shard_is_reported_and_removed(tmp_path):
    stored(tmp_path, a=encoding())
    path = shards(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.warns(UserWarning, match=rf"{path} is damaged .* its content is encoded again"):
        again = EncodingStore(tmp_path)
    assert "a" not in again
    assert not shards(tmp_path)


def test_no_flipped_bit_changes_an_encoding(tmp_path):
    kept = encoding()
    stored(tmp_path, a=kept)
    path = shards(tmp_path)[0]
    content = path.read_bytes()
    outcomes = Counter()
    for position in range(0, len(content)):
        damaged = bytearray(content)
        damaged[position] ^= 1 << position % 8
        path.write_bytes(damaged)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            store = EncodingStore(tmp_path)
        try:
            assert equal(store["a"], kept)
            outcomes["whole"] += 1  # the bit was in the padding, or in a name of nothing
        except (LostEncodingError, KeyError):
            outcomes["lost"] += 1
    assert outcomes["lost"] > 0.8 * len(content)


def test_a_damaged_shard_is_out_of_the_store_and_of_the_next(tmp_path):
    store = stored(tmp_path, a=torch.zeros(100), b=torch.ones(100))
    path = shards(tmp_path)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    store = EncodingStore(tmp_path)
    assert torch.equal(store["a"], torch.zeros(100))
    with pytest.raises(LostEncodingError, match=rf"{path} is damaged \(the checksum"):
        store["b"]
    store.reload()
    assert "a" not in store and "b" not in store
    assert not path.exists()
    store["b"] = torch.ones(100)
    store.flush()
    assert torch.equal(EncodingStore(tmp_path)["b"], torch.ones(100))


def test_a_shard_that_has_vanished_is_reported(tmp_path):
    stored(tmp_path, a=torch.ones(2))
    store, other = EncodingStore(tmp_path), EncodingStore(tmp_path)
    shards(tmp_path)[0].unlink()
    with pytest.raises(LostEncodingError, match="has vanished"):
        store["a"]
    assert "a" not in store
    other.reload()
    assert "a" not in other


def test_a_shard_may_vanish_while_the_folder_is_read(tmp_path, monkeypatch):
    stored(tmp_path, a=torch.ones(2))
    path = shards(tmp_path)[0]
    original = lit_distill.encoding.store.safe_open

    def removed_before(*args, **kwargs):
        path.unlink(missing_ok=True)
        return original(*args, **kwargs)

    monkeypatch.setattr(lit_distill.encoding.store, "safe_open", removed_before)
    assert "a" not in EncodingStore(tmp_path)


def test_a_shard_that_can_not_be_read_for_another_reason_stays(tmp_path, monkeypatch):
    stored(tmp_path, a=torch.ones(2))

    def no_device(*args, **kwargs):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(lit_distill.encoding.store, "safe_open", no_device)
    with pytest.raises(OSError, match=r"\.safetensors can't be read: .*Input/output error"):
        EncodingStore(tmp_path)
    assert len(shards(tmp_path)) == 1


def test_memory_is_bounded(monkeypatch):
    monkeypatch.setattr("lit_distill.encoding.store.MEMORY_BYTES", 100)
    store = EncodingStore()
    for index in range(10):
        store[str(index)] = torch.zeros(10)
    assert [key for key in map(str, range(10)) if key in store] == ["8", "9"]
    for _ in range(10):
        store["9"] = torch.zeros(10)  # replaces itself
    assert "8" in store
    store["large"] = torch.zeros(100)
    assert "large" not in store


def test_an_encoding_larger_than_the_memory_is_still_returned(monkeypatch):
    monkeypatch.setattr("lit_distill.encoding.store.MEMORY_BYTES", 1)
    pipe = load_pipeline("tiny-digits")
    pixels = torch.zeros(1, 3, 32, 32)
    expected = pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode()
    EncodeOnce(pipe)
    assert torch.equal(pipe.vae.encode(pixels.unsqueeze(2)).latent_dist.mode(), expected)


def test_encodings_are_written_after_a_minute_at_the_latest(tmp_path, monkeypatch):
    store = EncodingStore(tmp_path)
    store["a"] = torch.ones(1)
    assert not shards(tmp_path)
    monkeypatch.setattr("lit_distill.encoding.store.FLUSH_SECONDS", 0.0)
    store["b"] = torch.ones(1)
    assert {"a", "b"} <= set(EncodingStore(tmp_path)._index)


def test_what_a_killed_process_has_left_is_removed(tmp_path):
    (tmp_path / FOLDER).mkdir()
    old, new = (tmp_path / FOLDER / f".x.safetensors.{digit * 32}.tmp" for digit in "01")
    for path in (old, new):
        path.write_bytes(b"half")
    os.utime(old, (0, 0))
    EncodingStore(tmp_path)
    assert not old.exists()
    assert new.exists()  # perhaps of a process that is writing


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
