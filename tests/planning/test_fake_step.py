"""A step counted without weights is the step that trains.

`benchmarks/plan_accuracy.py` compares every family in every mode.
"""

import pytest
import torch
from counted_steps import FAMILIES, RealStudent, planned_and_real, settings
from torch.utils.flop_counter import FlopCounterMode

from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.counter import CPU_ATTENTION
from lit_distill.planning.fake_step import FakeStudent
from lit_distill.planning.planner import MODES

CASES = {
    "QwenImage": (1, ["selective", "nested"]),
    "Flux": (3, ["block"]),
    "StableDiffusion3": (3, ["none"]),
    "StableDiffusionXL": (1, ["step"]),
    "ZImage": (1, ["block"]),
    "Wan": (3, ["nested"]),
}


def test_the_cases_have_every_family_and_mode():
    assert set(CASES) == set(FAMILIES)
    assert {mode for _, modes in CASES.values() for mode in modes} == set(MODES)


@pytest.mark.parametrize("name", CASES)
def test_memory_and_flops_are_those_of_the_real_step(name, folder):
    times, modes = CASES[name]
    compared = list(planned_and_real(folder(name), settings(name, times), modes))
    assert len(compared) == len(modes)
    for mode, peak, real_peak, flops, real_flops in compared:
        assert flops == real_flops, mode
        assert peak == pytest.approx(real_peak, rel=0.02), mode


def test_real_flops_are_those_of_torchs_own_counter(folder):
    chosen = settings("Flux", 1)
    path = folder("Flux")
    real = RealStudent(path, chosen, FakeStudent(Blueprint.read(path), chosen, []))
    with FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION) as counted:
        real.loss("block").backward()
    assert real.step("block").flops == counted.get_total_flops()


@pytest.mark.parametrize("changes", [{"torch_dtype": "float32"}, {"lora": None}])
def test_other_arithmetic_and_full_training_are_counted_too(changes, folder):
    chosen = settings("QwenImage", 1, num_inference_steps=2, **changes)
    for _, peak, real_peak, flops, real_flops in planned_and_real(
        folder("QwenImage"), chosen, ["block"]
    ):
        assert flops == real_flops
        assert peak == pytest.approx(real_peak, rel=0.02)
    assert torch.get_default_dtype() == torch.float32
