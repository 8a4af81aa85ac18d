"""A data set is resumed with the model that it was begun with, by all of its weights."""

import json

import pytest
import torch
from safetensors.torch import save_file

from lit_distill import load_pipeline
from lit_distill.adapters.lora_files import read_lora
from lit_distill.adapters.weights import fuse_lora
from lit_distill.teacher.prompts import Pair
from lit_distill.teacher.provenance import pipeline_facts, record_pipeline
from lit_distill.teacher.teacher import Teacher

PAIR = Pair(0, "a red seven", 0, {}, None)
MODULE = "transformer_blocks.0.attn.to_q"


def facts(pipe, **settings):
    return pipeline_facts(Teacher("tiny-digits", torch_dtype="float32", **settings), pipe, [PAIR])


def change_last_bit(tensor, position):
    with torch.no_grad():
        bits = tensor.view(-1)[position : position + 1].view(torch.int32)
        bits ^= 1


def test_a_bit_of_any_weight_tells_models_apart(tmp_path):
    pipe = load_pipeline("tiny-digits")
    record_pipeline(tmp_path, facts(pipe))
    record_pipeline(tmp_path, facts(load_pipeline("tiny-digits")))
    weight = pipe.transformer.get_submodule(MODULE).weight
    change_last_bit(weight, weight.numel() // 2)
    with pytest.raises(ValueError, match=r"model_digests was .*, now .*write to another folder"):
        record_pipeline(tmp_path, facts(pipe))


def test_a_data_set_of_an_earlier_version_can_be_resumed(tmp_path):
    new = facts(load_pipeline("tiny-digits"))
    old = {k: v for k, v in new.items() if k != "model_digests"} | {"denoiser_sha256": "0" * 64}
    (tmp_path / "provenance.json").write_text(json.dumps({"drawn_with": old}))
    record_pipeline(tmp_path, new)
    assert json.loads((tmp_path / "provenance.json").read_text()) == {"drawn_with": old}
    old["scheduler"] = {"class": "Other"}
    (tmp_path / "provenance.json").write_text(json.dumps({"drawn_with": old}))
    with pytest.raises(ValueError, match="scheduler was"):
        record_pipeline(tmp_path, new)


def test_a_fused_lora_counts_by_itself_not_by_sums_whose_last_bits_depend_on_the_machine(tmp_path):
    def fused(scale):
        pipe = load_pipeline("tiny-digits")
        size = pipe.transformer.get_submodule(MODULE).weight.shape
        factors = {"lora_A": scale * torch.ones(2, size[1]), "lora_B": torch.ones(size[0], 2)}
        path = str(tmp_path / f"{scale}.safetensors")
        save_file({f"transformer.{MODULE}.{k}.weight": v for k, v in factors.items()}, path)
        fuse_lora(pipe, read_lora(path, pipe))
        return pipe, path

    pipe, path = fused(0.1)
    before = facts(pipe, lora=path)
    assert set(before["model_digests"]) == {"transformer", "lora"}
    change_last_bit(pipe.transformer.get_submodule(MODULE).weight, 0)
    assert facts(pipe, lora=path) == before
    change_last_bit(pipe.transformer.get_submodule(MODULE).bias, 0)
    assert facts(pipe, lora=path) != before
    pipe, path = fused(0.2)
    assert facts(pipe, lora=path) != before
