import pytest
import torch
from conftest import TINY

from lit_distill import load_pipeline


def test_weights_of_one_variant_only_are_loaded(tmp_path):
    plain = load_pipeline(TINY)
    plain.save_pretrained(tmp_path, variant="fp16", max_shard_size="500KB")
    loaded = load_pipeline(tmp_path)
    state = plain.transformer.state_dict()
    assert all(torch.equal(v, state[n]) for n, v in loaded.transformer.state_dict().items())


def test_a_folder_without_weights_is_diffusers_error(tmp_path):
    plain = load_pipeline(TINY)
    plain.save_pretrained(tmp_path)
    for path in tmp_path.rglob("*.safetensors"):
        path.unlink()
    with pytest.raises(OSError, match="no file named"):
        load_pipeline(tmp_path)
