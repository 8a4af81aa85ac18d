"""Each input of the corpus, and the number of inputs in all."""

import pytest
import torch
from corpus import CORPUS
from fuzzing import COUNTS, REFUSED, attempt
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import build

from lit_distill.adapters.lora_files import read_lora
from lit_distill.data.images import read_picture
from lit_distill.data.latents_file import read_latents
from lit_distill.data.metadata import read_metadata
from lit_distill.data.table_io import Problems, read_table
from lit_distill.teacher.prompts import read_prompts
from lit_distill.training.checkpoint_io import read_checkpoint


@pytest.fixture(scope="module")
def pipe():
    return build("QwenImage")


def table(path):
    problems = Problems(path)
    found = read_table(path, problems)
    problems.check()
    return found


READERS = {
    "table": table,
    "metadata": read_metadata,
    "prompts": read_prompts,
    "picture": read_picture,
    "latents": lambda path: read_latents(str(path)),
    "checkpoint": read_checkpoint,
}

ACCEPTED = {"carriage return.csv"}
"""Inputs that are read; all others are refused."""


@pytest.mark.parametrize(
    ("reader", "name", "data"), CORPUS, ids=[f"{r}: {n}" for r, n, _ in CORPUS]
)
def test_an_input_that_was_once_read_wrongly(reader, name, data, tmp_path, request):
    Image.new("RGB", (32, 32)).save(tmp_path / "a.png")
    path = tmp_path / name
    read, beside = READERS.get(reader), ()
    if reader in ("lora", "settings"):
        pipe = request.getfixturevalue("pipe")
        read = lambda path: read_lora(path, pipe)  # noqa: E731
    if reader == "settings":
        path, config = tmp_path / "adapter_model.safetensors", tmp_path / "adapter_config.json"
        key = "base_model.model.transformer_blocks.0.attn.to_q"
        shape = pipe.transformer.get_submodule("transformer_blocks.0.attn.to_q").weight.shape
        down, up = torch.ones(2, shape[1]), torch.ones(shape[0], 2)
        save_file({f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, path)
        config.write_bytes(data)
        beside = [config]
    else:
        path.write_bytes(data)
    assert (attempt(read, path, beside=beside) is not REFUSED) == (name in ACCEPTED)


def test_at_least_20000_inputs_are_tried():
    """Each fuzz test asserts that it has tried its number."""
    assert sum(COUNTS.values()) >= 20_000
