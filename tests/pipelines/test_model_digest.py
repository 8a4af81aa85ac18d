import json
import shutil
from pathlib import Path

import pytest
import torch
from conftest import TINY

from lit_distill import load_pipeline
from lit_distill.pipelines.model_digest import component_digests, model_digest, tensor_digest

NAMES = ["transformer", "text_encoder", "tokenizer", "vae", "scheduler"]


@pytest.fixture(scope="module")
def expected():
    return component_digests(load_pipeline("tiny-digits"), NAMES)


def test_a_digest_does_not_depend_on_where_a_model_is_stored(expected, tmp_path):
    assert len(expected) == len(set(expected.values())) == 5
    shutil.copytree(TINY, tmp_path / "moved")
    assert component_digests(load_pipeline(tmp_path / "moved"), NAMES) == expected
    load_pipeline("tiny-digits").save_pretrained(tmp_path / "saved", max_shard_size="200KB")
    assert component_digests(load_pipeline(tmp_path / "saved"), NAMES) == expected


@pytest.mark.parametrize("name", ["transformer", "text_encoder", "vae"])
def test_every_weight_counts(expected, name):
    pipe = load_pipeline("tiny-digits")
    weights = getattr(pipe, name).state_dict()
    middle = sorted(weights)[len(weights) // 2]
    flat = weights[middle].view(-1)
    with torch.no_grad():
        flat[len(flat) // 2] += 1
    found = component_digests(pipe, NAMES)
    assert {key for key in NAMES if found[key] != expected[key]} == {name}


def test_a_tokenizer_counts_with_its_vocabulary(expected, tmp_path):
    shutil.copytree(TINY, tmp_path / "pipe")
    path = next(Path(tmp_path / "pipe").glob("tokenizer/tokenizer.json"))
    content = json.loads(path.read_text())
    vocabulary = content["model"]["vocab"]
    first, second = list(vocabulary)[10:12]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    path.write_text(json.dumps(content))
    found = component_digests(load_pipeline(tmp_path / "pipe"), NAMES)
    assert {key for key in NAMES if found[key] != expected[key]} == {"tokenizer"}


def test_configurations_count(expected):
    pipe = load_pipeline("tiny-digits")
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, shift_terminal=None)
    pipe.vae.register_to_config(latents_mean=[9.0, 0.0, 0.0, 0.0])
    found = component_digests(pipe, NAMES)
    assert {key for key in NAMES if found[key] != expected[key]} == {"scheduler", "vae"}


def test_types_and_shapes_count_in_parts_of_any_size(monkeypatch):
    tensor = torch.arange(12, dtype=torch.float32)
    whole = tensor_digest(tensor)
    monkeypatch.setattr("lit_distill.pipelines.model_digest.CHUNK", 8)
    assert tensor_digest(tensor) == whole == tensor_digest(tensor.repeat(2)[:12])
    assert len({whole, tensor_digest(tensor.view(3, 4)), tensor_digest(tensor.int())}) == 3
    assert tensor_digest(tensor.bfloat16()) != tensor_digest(tensor.half())
    assert tensor_digest(torch.zeros(())) and tensor_digest(torch.empty(0))


def test_a_model_is_more_than_its_weights():
    one, two = torch.nn.Linear(2, 2), torch.nn.Bilinear(1, 1, 1)
    assert model_digest(one) == model_digest(one) != model_digest(two)


def test_fields_at_their_default_do_not_count(expected):
    """A later version of a library adds some."""
    pipe = load_pipeline("tiny-digits")
    config = pipe.transformer.config
    assert config["guidance_embeds"] is False  # the default of the class
    kept = {name: value for name, value in config.items() if name != "guidance_embeds"}
    pipe.transformer._internal_dict = type(config)(kept)
    assert component_digests(pipe, NAMES) == expected
