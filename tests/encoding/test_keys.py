"""What the keys of stored encodings cover."""

import os
import sys

import pytest
import torch
from PIL import Image
from tiny_pipelines import build

from lit_distill import load_pipeline
from lit_distill.data.filesystem import content_digest, known_digests
from lit_distill.encoding.encode_once import EncodeOnce, encoded_image
from lit_distill.encoding.fingerprint import encoders_digest
from lit_distill.encoding.store import EncodingStore
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers


def middle_of_a_tensor(module):
    """Change the middle of the largest tensor of a module by one bit."""
    with torch.no_grad():
        flat = max(module.parameters(), key=torch.numel).view(-1)
        bits = flat[len(flat) // 2 : len(flat) // 2 + 1].view(torch.int32)
        bits ^= 1


CHANGES = {
    "text encoder": lambda pipe: middle_of_a_tensor(pipe.text_encoder),
    "VAE": lambda pipe: middle_of_a_tensor(pipe.vae),
    "tokenizer": lambda pipe: pipe.tokenizer.add_tokens(["red seven"]),
    "configuration of the VAE": lambda pipe: pipe.vae.register_to_config(latents_mean=[0.5] * 4),
    "tiling of the VAE": lambda pipe: setattr(pipe.vae, "use_tiling", True),
    "attribute of the pipeline": lambda pipe: setattr(pipe, "tokenizer_max_length", 7),
    "configuration of the denoiser": lambda pipe: pipe.transformer.register_to_config(
        joint_attention_dim=1
    ),
    "type of the denoiser": lambda pipe: pipe.transformer.half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_keys_depend_on_all_that_encodings_depend_on(change):
    pipe = load_pipeline("tiny-digits")
    before = encoders_digest(pipe)
    CHANGES[change](pipe)
    assert encoders_digest(pipe) != before


def test_keys_do_not_depend_on_the_denoisers_weights_or_where_a_model_is_stored(tmp_path):
    pipe = load_pipeline("tiny-digits")
    before = encoders_digest(pipe)
    middle_of_a_tensor(pipe.transformer)
    pipe.scheduler.register_to_config(shift=2.0)
    pipe.transformer.register_to_config(quantization_config={"load_in_4bit": True})
    assert encoders_digest(pipe) == before
    load_pipeline("tiny-digits").save_pretrained(tmp_path / "copy", max_shard_size="50KB")
    copy = load_pipeline(str(tmp_path / "copy"))
    copy.default_sample_size = pipe.default_sample_size
    assert encoders_digest(copy) == before
    pipe(prompt="a red seven", num_inference_steps=1)
    assert encoders_digest(pipe) == before


def test_the_configuration_of_a_pipeline_counts():
    pipe = build("StableDiffusionXL")
    before = encoders_digest(pipe)
    given = not pipe.config.force_zeros_for_empty_prompt
    pipe.register_to_config(force_zeros_for_empty_prompt=given)
    assert encoders_digest(pipe) != before


@pytest.mark.parametrize("name", ["StableDiffusion3", "FluxKontext", "QwenImageEdit", "Wan"])
def test_every_encoder_of_a_family_counts(name):
    pipe = build(name)
    before = encoders_digest(pipe)
    others = [
        component
        for key, component in pipe.components.items()
        if isinstance(component, torch.nn.Module) and key not in denoisers(pipe)
    ]
    assert others
    for component in others:
        middle_of_a_tensor(component)
        assert encoders_digest(pipe) != before
        middle_of_a_tensor(component)  # back again
        assert encoders_digest(pipe) == before


def test_large_encoders_are_read_with_a_progress_bar(monkeypatch, capsys):
    encoders_digest(load_pipeline("tiny-digits"))
    assert "Reading" not in capsys.readouterr().err
    monkeypatch.setattr("lit_distill.encoding.fingerprint.PROGRESS_BYTES", 0)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    encoders_digest(load_pipeline("tiny-digits"))
    assert "Reading the encoders' weights" in capsys.readouterr().err


def test_an_image_counts_by_its_content(tmp_path):
    """Neither name nor size nor date identify a file."""
    image, folder = tmp_path / "a.bmp", tmp_path / "cache"
    encodings = []
    for color in ("red", "blue"):
        Image.new("RGB", (32, 32), color).save(image)
        os.utime(image, ns=(0, 0))
        known_digests.clear()  # as in another process
        once = EncodeOnce(load_pipeline("tiny-digits"), EncodingStore(folder))
        once.cache_image(str(image))
        once.store.flush()
        encodings.append(encoded_image(once.store, once.namespace, str(image)))
    assert encodings[0].shape == (4, 1, 8, 8)
    assert not torch.equal(*encodings)
    copy = tmp_path / "b.bmp"
    copy.write_bytes(image.read_bytes())  # of the same content
    assert torch.equal(encoded_image(once.store, once.namespace, str(copy)), encodings[1])


def test_an_image_that_changes_during_training_is_named(tmp_path):
    image = tmp_path / "a.png"
    Image.new("RGB", (32, 32), "red").save(image)
    once = EncodeOnce(load_pipeline("tiny-digits"), EncodingStore(tmp_path / "cache"))
    once.cache_image(str(image))
    encoded_image(once.store, once.namespace, str(image))
    Image.new("RGB", (32, 32), "blue").save(image)
    os.utime(image, ns=(0, 0))
    with pytest.raises(InputError, match=r"a\.png has changed since training began"):
        encoded_image(once.store, once.namespace, str(image))


def test_a_file_is_read_once_in_a_process(tmp_path, monkeypatch):
    file = tmp_path / "a"
    file.write_bytes(b"content")
    digest = content_digest(str(file))
    monkeypatch.setattr("lit_distill.data.filesystem.open_file", None)
    assert content_digest(str(file)) == digest
