"""`test` and `predict` with offloaded components give the same results, bit for bit."""

import json
import weakref

import accelerate
import pytest
import torch
from conftest import TINY
from folders import hashes
from held_memory import no_garbage_collection
from students import module

from lit_distill.cli import main
from lit_distill.errors import InputError
from lit_distill.training import offloaded_module, undistilled
from lit_distill.training.image_callbacks import PREDICTIONS_FILE

MODEL = ["--model.pretrained_model_name_or_path", "tiny-digits", "--model.torch_dtype", "float32"]
MODEL += ["--model.lora", "{r: 4}", "--trainer.accelerator", "cpu", "--trainer.logger", "false"]


@pytest.fixture(params=["model", "group"])
def offload(request, monkeypatch):
    """A mode; the CPU takes the accelerator's place."""
    monkeypatch.setattr(offloaded_module, "check_offload", lambda *_: None)
    return request.param


@pytest.fixture
def moved(monkeypatch):
    """Classes of the components, in the order in which accelerate fetched them."""
    original, names = accelerate.hooks.CpuOffload.pre_forward, []

    def noting(self, module, *args, **kwargs):
        if names[-1:] != [type(module).__name__]:
            names.append(type(module).__name__)
        return original(self, module, *args, **kwargs)

    monkeypatch.setattr(accelerate.hooks.CpuOffload, "pre_forward", noting)
    return names


def predict(out, *options):
    main(
        ["predict", *MODEL, "--prompts", str(out / "prompts.txt"), "--height", "32"]
        + ["--width", "32", "--num_inference_steps", "2", "--cfg_scale", "1"]
        + ["--trainer.default_root_dir", str(out), *options]
    )
    return hashes(out / "predictions")


def test_predictions_are_the_same(offload, moved, tmp_path):
    prompt = (TINY / "prompts_heldout.txt").read_text().splitlines()[0]
    results = []
    for name, options in (("whole", ()), ("offloaded", ("--offload", offload))):
        (tmp_path / name).mkdir()
        (tmp_path / name / "prompts.txt").write_text(prompt)
        results.append(predict(tmp_path / name, *options))
    assert results[0] == results[1] and set(results[0]) == {PREDICTIONS_FILE, "row_000000.png"}
    order = ["Qwen2_5_VLForConditionalGeneration", "QwenImageTransformer2DModel"]
    assert moved == ([*order, "AutoencoderKLQwenImage"] if offload == "model" else [])


def report(out, table, *options):
    compare = [{"path": str(TINY), "num_inference_steps": 3, "cfg_scale": 2.0, "name": "folder"}]
    main(
        ["test", *MODEL, "--data.val_metadata_path", str(table), "--data.batch_size", "4"]
        + ["--data.height", "32", "--data.width", "32", "--out", str(out)]
        + ["--undistilled", "[[2, 4]]", "--compare", json.dumps(compare), *options]
    )
    ways = json.loads((out / "metrics.json").read_text())["ways"]
    times = ("seconds_an_image", "speed_up")
    return hashes(out / "images"), [{k: v for k, v in w.items() if k not in times} for w in ways]


def test_reports_are_the_same(offload, pairs, tmp_path):
    table = pairs / "heldout/metadata.csv"
    whole = report(tmp_path / "whole", table)
    assert report(tmp_path / "offloaded", table, "--offload", offload) == whole


def test_a_full_student_is_refused(pairs, tmp_path):
    with pytest.raises(InputError, match="a test uses two denoisers in turn"):
        report(tmp_path, pairs / "x.csv", "--model.lora", "null", "--offload", "model")


def test_validation_of_full_training_has_one_denoiser_on_the_device(monkeypatch):
    model = module("tiny-digits", lora=None)
    model.configure_model()
    order = []
    monkeypatch.setattr(
        undistilled, "move", lambda networks, device: order.append((list(networks), device))
    )
    own = [model.pipe.transformer]
    host = device = torch.device("cpu")
    with model._undistilled.active():
        second = [model.pipe.transformer]
        assert second[0] is not own[0]
        assert [(n[0] is own[0], d) for n, d in order] == [(True, host), (False, device)]
        order.clear()
    assert [n[0] is own[0] for n, _ in order] == [False, True]
    weight = weakref.ref(next(second[0].parameters()))
    with no_garbage_collection():
        second.clear()
        order.clear()
        model.release_undistilled()
        assert weight() is None
