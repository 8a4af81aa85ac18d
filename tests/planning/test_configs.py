"""Every configuration for a card fits that card."""

import re

import pytest
import yaml
from conftest import ROOT
from test_published import PUBLISHED

from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.cards import CARDS, GIB, MARGIN
from lit_distill.planning.planner import Planner
from lit_distill.planning.settings import TrainingSettings

CONFIGS = sorted(path for path in (ROOT / "configs").glob("*.yaml") if "--gpu" in path.read_text())
FOLDERS = {
    "Qwen/Qwen-Image": "qwen-image",
    "black-forest-labs/FLUX.1-dev": "flux.1-dev",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "Tongyi-MAI/Z-Image": "z-image",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-14b",
}


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_config_fits_its_card(path):
    config = yaml.safe_load(path.read_text())
    model, data, trainer = (config[name] for name in ("model", "data", "trainer"))
    names = ("torch_dtype", "lora", "quantization", "freeze", "call_kwargs")
    settings = TrainingSettings(
        **{name: model[name] for name in names if name in model},
        **{name: data[name] for name in ("height", "width", "batch_size")},
        shards=trainer["devices"] if trainer.get("strategy") == "fsdp2" else 1,
    )
    name = model["pretrained_model_name_or_path"]
    planner = Planner(Blueprint.read(PUBLISHED / FOLDERS[name]), settings)
    figures = planner.count(model["checkpointing"])
    peaks = {key: value for key, value in figures.items() if isinstance(key, tuple)}
    total = planner._peak(figures, peaks)[2]
    card = CARDS[re.search(r"--gpu (\S+)", path.read_text())[1]]
    assert total < (1 - MARGIN) * card.memory
    stated = float(re.search(r"^#   weights .* = ([\d.]+)$", path.read_text(), re.M)[1])
    assert total / GIB == pytest.approx(stated, abs=0.2)
