import json

import lightning.pytorch as pl
import pytest
import torch
from digits import QUIET, data, module
from PIL import Image

from lit_distill import DistillDataModule, load_pipeline
from lit_distill.pipelines.release import forget_tables
from lit_distill.planning.counter import Counter
from lit_distill.preflight.remembered import FOLDER
from lit_distill.preflight.report import Finding, Report
from lit_distill.training import preflight_once


@pytest.fixture
def fitted(pairs, tmp_path, monkeypatch):
    """A function that trains for a step, and returns whether preflight ran, and what was logged."""
    ran, logged = [], []
    report = Report("QwenImagePipeline", [Finding("a check", "ok", "seen")], {}, ("block",))
    monkeypatch.setattr(preflight_once, "preflight", lambda *_, **__: ran.append(1) or report)
    monkeypatch.setattr(preflight_once, "rank_zero_info", logged.append)

    def fit(cache="cache", **options):
        ran.clear()
        logged.clear()
        folder = None if cache is None else str(tmp_path / cache)
        trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
        trainer.fit(module(metrics={}, **options), data(pairs, batch_size=1, cache_dir=folder))
        return bool(ran), list(logged)

    return fit


REMEMBERED = (False, ["preflight: this pipeline has passed it with these settings before"])


def test_a_pipeline_that_has_passed_starts_at_once(fitted):
    assert fitted() == (True, [])
    torch.manual_seed(1)  # of the LoRA, on which the answer does not depend
    assert fitted() == REMEMBERED
    assert fitted(preflight="always") == (True, [])
    assert fitted(preflight=False) == (False, [])
    for changed in ({"checkpointing": "block"}, {"lora": {"r": 2}}, {"torch_dtype": "bfloat16"}):
        assert fitted(**changed) == (True, [])
    assert fitted() == REMEMBERED


def test_other_weights_and_versions_are_checked_again(fitted, monkeypatch):
    fitted()
    with monkeypatch.context() as patch:
        patch.setattr(preflight_once, "_version", lambda package: "another")
        assert fitted() == (True, [])
    digests = "lit_distill.training.student_loader.component_digests"
    monkeypatch.setattr(digests, lambda *_: {"transformer": "another"})
    assert fitted() == (True, [])


@pytest.mark.parametrize("damage", ["cut", "changed", "mode"])
def test_a_damaged_file_is_ignored_with_a_warning_and_made_again(fitted, tmp_path, damage):
    fitted()
    (path,) = (tmp_path / "cache" / FOLDER).iterdir()
    text = path.read_text()
    content = json.loads(text)
    content["report"]["keep_gradient"] = ["sometimes"]
    if damage == "mode":
        from lit_distill.preflight.remembered import _sha256

        content["sha256"] = _sha256(content["report"])
    damaged = {"cut": text[:50]}
    path.write_text(damaged.get(damage, json.dumps(content)))
    with pytest.warns(UserWarning, match=r"can't be used \(.*\): preflight runs again"):
        assert fitted()[0]
    assert path.read_text() == text
    assert fitted() == REMEMBERED


def test_without_a_cache_dir_nothing_is_stored(fitted):
    assert fitted(None) == (True, [])
    assert fitted(None) == (True, [])


def test_what_failed_is_not_stored(pairs, tmp_path):
    from lit_distill.preflight.report import PreflightError

    trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
    with pytest.raises(PreflightError):
        trainer.fit(module(grad_steps=1), data(pairs, cache_dir=str(tmp_path)))
    assert not (tmp_path / FOLDER).exists()


def test_a_remembered_report_is_applied_as_the_first_was(pairs, tmp_path):
    froze = []
    for _ in range(2):
        model = module(metrics={})
        trainer = pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET)
        with pytest.warns(UserWarning, match=r"Set model\.freeze: .* Applied to this run"):
            trainer.fit(model, data(pairs, batch_size=1, cache_dir=str(tmp_path)))
        froze.append(model.hparams["freeze"])
    assert froze[0] and froze[0] == froze[1]


def peak(tmp_path, side, preflight):
    """Return the most that lives in a step of training and what comes before it, in bytes."""
    Image.new("RGB", (side, side), "red").save(tmp_path / "a.png")
    header = "image,prompt,seed,rand_device,num_inference_steps,cfg_scale"
    (tmp_path / "metadata.csv").write_text(f"{header}\na.png,a red seven,0,cpu,4,1\n")
    freeze = [f"transformer.transformer_blocks.3.{n}.*" for n in ("attn.to_add_out", "txt_mlp")]
    model = module(checkpointing="nested", metrics={}, preflight=preflight, freeze=freeze)
    rows = DistillDataModule(str(tmp_path / "metadata.csv"))
    forget_tables(load_pipeline("tiny-digits").transformer)  # those of earlier calls
    with Counter() as live:
        pl.Trainer(max_steps=1, enable_checkpointing=False, **QUIET).fit(model, rows)
    return live.peak


def test_fit_needs_no_more_memory_with_preflight(tmp_path):
    assert peak(tmp_path, 128, True) <= peak(tmp_path, 128, False)
