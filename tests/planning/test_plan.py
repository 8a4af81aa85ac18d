"""`lit-distill plan` and what it recommends."""

import json

import pytest
import yaml
from conftest import ROOT, TINY

import lit_distill
from lit_distill import TrainingSettings
from lit_distill.cli import main
from lit_distill.errors import InputError
from lit_distill.planning.cards import CARDS, GIB, card
from lit_distill.planning.render import recommendation, render


@pytest.fixture(scope="module")
def planned():
    """A plan of the embedded pipeline, from its configurations alone."""
    settings = TrainingSettings(lora={"r": 4}, num_inference_steps=2, prompt_tokens=16)
    return lit_distill.plan("tiny-digits", settings, card("rtx4090"))


def test_every_stage_and_mode_is_planned(planned):
    assert planned.size == (32, 32)
    assert [stage.name for stage in planned.stages] == [
        "generate",
        "encode",
        "preflight",
        "validation",
        "export",
    ]
    assert set(planned.fit) == {"none", "selective", "block", "step", "nested"}
    flops = {mode: step.flops for mode, step in planned.fit.items()}
    assert planned.recommended.mode == min(flops, key=flops.get) == "none"
    text = render(planned)
    for name in (*planned.fit, *(stage.name for stage in planned.stages)):
        assert name in text
    assert "MiB, peak" in text  # it would be 0.00 GiB
    assert f"{planned.fit['none'].memory.total / 2**20:8.2f}  yes" in text
    assert yaml.safe_load(recommendation(planned)) == {
        "model": {"checkpointing": "none"},
        "data": {"batch_size": 1},
    }
    json.dumps(planned.as_dict())


def test_without_memory_nothing_is_recommended(planned):
    from dataclasses import replace

    none = replace(planned, card=card(memory_gb=1e-6))
    assert none.recommended is None
    assert "No mode fits" in recommendation(none) and "model.quantization" in recommendation(none)


def test_cards():
    assert card().name == "h100" and 23 * GIB < card("rtx4090").memory < 24 * GIB
    assert card(memory_gb=12, tflops=50).flops == 50e12
    with pytest.raises(ValueError, match=r"no card is called 'h10' \(did you mean 'h100'"):
        card("h10")
    assert set(CARDS) == {"h100", "a100-80gb", "l40s", "rtx4090", "rtx5090"}


def test_the_command_takes_the_configuration_of_fit_and_fit_takes_its_answer(tmp_path, capsys):
    out = tmp_path / "plan.json"
    arguments = ["--model.pretrained_model_name_or_path", str(TINY), "--data.height", "32"]
    arguments += ["--data.width", "32", "--trainer.accelerator", "gpu", "--rows", "100"]
    arguments += ["--data.metadata_path", str(tmp_path / "not_yet.csv")]
    arguments += ["--gpu", "l40s", "--num_inference_steps", "2", "--json", str(out)]
    main(["plan", "--config", str(ROOT / "configs/tiny_lora.yaml"), *arguments])
    printed = capsys.readouterr().out
    found = json.loads(out.read_text())
    assert found["card"]["name"] == "l40s" and found["recommended"] == "none"
    assert found["run"]["rows"] == 100
    answer = tmp_path / "answer.yaml"
    answer.write_text(printed[printed.index("# Recommended") : printed.index("plan: ")])
    configs = ["--config", str(ROOT / "configs/tiny_lora.yaml"), "--config", str(answer)]
    with pytest.raises(SystemExit) as ended:
        main(["fit", *configs, "--print_config"])
    assert ended.value.code == 0
    assert "checkpointing: none" in capsys.readouterr().out


def test_a_lora_whose_fields_only_its_file_knows_is_not_planned_as_full_training():
    model = ["--model.pretrained_model_name_or_path", str(TINY), "--model.init_lora", "lora"]
    with pytest.raises(InputError, match=r"set model\.lora to them"):
        main(["plan", *model, "--trainer.accelerator", "cpu"])
