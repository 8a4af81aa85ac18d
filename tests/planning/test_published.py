"""Published models, planned from their configuration files alone."""

from pathlib import Path

import pytest

from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.cards import GIB
from lit_distill.planning.planner import Planner
from lit_distill.planning.settings import TrainingSettings

PUBLISHED = Path(__file__).parent / "published"

# Parameters of the denoiser in billions, as their publishers and diffusers' users state them.
DENOISERS = {
    "qwen-image": 20.43,
    "flux.1-dev": 11.90,
    "sdxl": 2.57,
    "sd3-medium": 2.08,
    "z-image": 6.15,
    "wan2.1-t2v-14b": 14.29,
    "sd-1.5": 0.86,
}
ENCODERS = {  # all text encoders
    "qwen-image": 8.29,
    "flux.1-dev": 4.89,
    "sdxl": 0.82,
    "sd3-medium": 5.58,
    "z-image": 4.02,
    "wan2.1-t2v-14b": 5.68,
    "sd-1.5": 0.12,
}


def test_every_folder_is_planned():
    assert {path.name for path in PUBLISHED.iterdir() if path.is_dir()} == set(DENOISERS)


@pytest.mark.parametrize("name", DENOISERS)
def test_a_published_model_has_as_many_parameters_as_published(name):
    planner = Planner(Blueprint.read(PUBLISHED / name), TrainingSettings())
    sizes = planner.component_bytes()
    own = planner.blueprint.denoisers
    billions = sum(sizes[key] for key in own) / 2 / 1e9
    assert billions == pytest.approx(DENOISERS[name], abs=0.02)
    encoders = sum(size for key, size in sizes.items() if key not in own and key != "vae") / 2e9
    assert encoders == pytest.approx(ENCODERS[name], abs=0.03)


@pytest.mark.parametrize("name", ["qwen-image", "wan2.1-t2v-14b"])
def test_a_published_model_trains_at_a_small_size_without_weights(name):
    call = {"num_frames": 5} if name.startswith("wan") else {}
    size = {"height": 256, "width": 256, "num_inference_steps": 2}
    settings = TrainingSettings(lora={"r": 8}, call_kwargs=call, **size)
    planner = Planner(Blueprint.read(PUBLISHED / name), settings)
    step = planner.step("none")
    assert step.memory.weights / GIB == pytest.approx(DENOISERS[name] * 2e9 / GIB, rel=0.02)
    assert step.memory.activations > 0 and step.flops > 0
