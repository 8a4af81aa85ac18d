import torch

from lit_distill.adapters import weights
from lit_distill.adapters.lora import Factors
from lit_distill.planning.counter import Counter


def test_a_lora_is_merged_without_whole_copies_of_a_weight(monkeypatch):
    generator = torch.Generator().manual_seed(0)
    network = torch.nn.ModuleDict({"x": torch.nn.Linear(4096, 4000, False, dtype=torch.bfloat16)})
    monkeypatch.setattr(weights, "denoisers", lambda pipe: {"transformer": network})
    down, up = (torch.randn(shape, generator=generator) for shape in ((4, 4096), (4000, 4)))
    weight = network["x"].weight
    expected = (weight.float() + 2 * up @ down).bfloat16()
    with Counter() as live:
        weights.fuse_lora(None, {"transformer": {"x": Factors(down, up, alpha=8.0)}})
    torch.testing.assert_close(weight.data, expected)
    assert live.peak < weight.nbytes / 2
