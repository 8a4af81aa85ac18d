"""Plans of a whole model, from a few of its layers."""

import pytest
import torch
from torch import nn

from lit_distill.planning.blueprint import Blueprint, pattern_for_layers
from lit_distill.planning.optimizer import optimizer_bytes
from lit_distill.planning.planner import Planner, plan_step
from lit_distill.planning.settings import TrainingSettings
from lit_distill.planning.storage import bits_per_weight, gathered_bytes, weight_bytes

SIZE = {"height": 64, "width": 64, "num_inference_steps": 2, "prompt_tokens": 16}


def settings(**changes):
    return TrainingSettings(**({"lora": {"r": 4}} | SIZE | changes))


def deep(folder, **counts):
    """The configurations of a tiny pipeline with more layers."""
    return Blueprint.read(folder).with_layers(counts)


@pytest.mark.parametrize(
    ("name", "counts", "modes"),
    [  # all families and modes: benchmarks/plan_accuracy.py
        ("QwenImage", {"num_layers": 5}, ["block", "nested"]),
        ("Flux", {"num_layers": 5, "num_single_layers": 5}, ["none"]),
    ],
)
def test_few_layers_tell_the_whole(name, counts, modes, folder):
    # The last block's text branch leads nowhere: training freezes it.
    unused = [
        f"transformer.transformer_blocks.4.{part}.*" for part in ("attn.to_add_out", "txt_mlp")
    ]
    chosen = settings(freeze=unused if name == "QwenImage" else [])
    blueprint = deep(folder(name), **counts)
    few, whole = Planner(blueprint, chosen), Planner(blueprint, chosen)
    assert few._counts == counts
    whole.__dict__["_counts"] = {}
    for mode in modes:
        found, expected = few.step(mode), whole.step(mode)
        assert found.flops == expected.flops
        assert found.activation_peak == pytest.approx(expected.activation_peak, rel=1e-3), mode
        assert found.memory.total == pytest.approx(expected.memory.total, rel=1e-3), mode
        assert found.peak_at == expected.peak_at, mode


def test_the_frozen_last_layer_is_that_of_the_whole(folder):
    frozen = "transformer.transformer_blocks.6.txt_mlp.*"
    blueprint = deep(folder("QwenImage"), num_layers=7)
    few = Planner(blueprint, settings(freeze=[frozen]))
    whole = Planner(blueprint, settings(freeze=[frozen]))
    whole.__dict__["_counts"] = {}
    assert few._counts and few.constants == pytest.approx(whole.constants)
    assert few.constants["trained"] < Planner(blueprint, settings()).constants["trained"]
    # A single layer that is not the last makes layers differ: then the whole is run.
    other = settings(freeze=["transformer.transformer_blocks.2.txt_mlp.*"])
    assert Planner(blueprint, other)._counts == {}


def test_patterns_are_read_for_fewer_layers():
    whole, few = {"blocks": 60, "refiner": 2}, {"blocks": 3, "refiner": 2}
    assert pattern_for_layers("t.blocks.59.mlp.*", whole, few) == "t.blocks.2.mlp.*"
    assert pattern_for_layers("t.blocks.5.mlp.*", whole, few) is None
    assert pattern_for_layers("t.blocks.*.mlp.*", whole, few) == "t.blocks.*.mlp.*"
    assert pattern_for_layers("t.refiner.1.mlp.*", whole, few) == "t.refiner.1.mlp.*"


def test_settings_change_what_they_should(folder):
    def step(mode="block", **changes):
        return plan_step(folder("QwenImage"), settings(**changes), mode)

    plain = step()
    assert step(batch_size=2).flops == 2 * plain.flops
    assert step(batch_size=2).memory.activations > 1.8 * plain.memory.activations
    whole = step("none").memory.activations
    assert step("none", grad_steps=1).memory.activations < 0.6 * whole
    assert step(grad_steps=1).flops < plain.flops
    # A trajectory's gradients end at each step: as many products as through all steps.
    assert step(trajectory=True).flops == pytest.approx(plain.flops, rel=0.01)
    assert step(lora_per_step=2).memory.trained > 1.9 * plain.memory.trained
    assert step(lora_per_step=2).flops == plain.flops
    full = step(lora=None)
    assert full.memory.weights < 0.2 * full.memory.trained
    assert step(cfg_scale=2.0).flops > 1.9 * plain.flops
    assert step(ema=True).memory.trained == pytest.approx(plain.memory.trained * 5 / 4, rel=0.05)
    assert step("nested").recomputed > plain.recomputed > step("none").recomputed == 0


def test_what_trains_is_sharded(folder):
    one = plan_step(folder("QwenImage"), settings(lora=None), "nested").memory
    eight = plan_step(folder("QwenImage"), settings(lora=None, shards=8), "nested").memory
    assert eight.trained == pytest.approx(one.trained / 8, rel=0.05)
    assert eight.total < one.total


def test_quantised_weights_take_their_storage():
    module = nn.Sequential(nn.Linear(64, 128, bias=False), nn.LayerNorm(128)).to(torch.bfloat16)
    module.requires_grad_(False)
    norm = 2 * 2 * 128
    assert weight_bytes(module, None) == 2 * 64 * 128 + norm
    nf4 = {"quant_backend": "bitsandbytes_4bit", "quant_kwargs": {"bnb_4bit_quant_type": "nf4"}}
    assert weight_bytes(module, nf4) == 64 * 128 * (0.5 + 4 / 64) + norm
    int8 = {"quant_backend": "torchao", "quant_kwargs": {"quant_type": "Int8WeightOnlyConfig"}}
    assert weight_bytes(module, int8) == 64 * 128 + norm
    with pytest.raises(ValueError, match="the storage of 'gguf' is not known to plan"):
        bits_per_weight({"quant_backend": "gguf"})


def test_gathered_weights_are_two_blocks_and_the_rest():
    def block():
        return nn.ModuleDict({"linear": nn.Linear(8, 8, bias=False)})

    module = nn.ModuleDict({"blocks": nn.ModuleList([block() for _ in range(5)])})
    module["out"] = nn.Linear(8, 4, bias=False)
    module.requires_grad_(False)
    assert gathered_bytes(module, torch.bfloat16) == 2 * (32 + 2 * 64)


def test_optimizers_keep_what_they_keep():
    assert optimizer_bytes(torch.optim.AdamW)[0] == 2
    assert optimizer_bytes(torch.optim.SGD)[0] == 0
    assert optimizer_bytes(lambda p: torch.optim.AdamW(p, amsgrad=True))[0] == 3
    assert optimizer_bytes(lambda p: torch.optim.AdamW(p, fused=True))[1] == 0
