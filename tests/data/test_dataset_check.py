import json
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import HEADER, TINY, generate
from PIL import Image
from safetensors.torch import save_file

from lit_distill import DirectDistill, load_pipeline
from lit_distill.cli import main
from lit_distill.data.dataset_check import check_data
from lit_distill.data.metadata import read_metadata
from lit_distill.data.table_io import MetadataError
from lit_distill.teacher.seed_check import check_pairing

QUIET = ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
CPU = torch.device("cpu")


@pytest.fixture
def copy(pairs, tmp_path):
    """A copy of the held-out pairs, to be damaged."""
    return shutil.copytree(pairs / "heldout", tmp_path / "copy")


def edit(folder, **changes):
    """Change the provenance of a data set."""
    path = folder / "provenance.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def check(folder, *options):
    main(["check", "--data.metadata_path", str(folder / "metadata.csv"), *QUIET, *options])


def test_a_good_data_set_needs_no_model(pairs, capsys, monkeypatch):
    monkeypatch.setattr("lit_distill.adapters.weights.load_pipeline", None)
    check(pairs / "heldout")
    found = capsys.readouterr().out
    assert f"{pairs}/heldout/metadata.csv: 8 rows, no problem" in found
    counts = [line.split() for line in found.splitlines()]
    assert ["32", "32", "4", "1", "cpu", "latents", "8"] in counts


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def foreign(path):
    save_file({"weights": torch.zeros(1)}, path)


def other_shape(path):
    save_file({"latents": torch.zeros(4, 16)}, path)


def integers(path):
    save_file({"latents": torch.zeros(16, 16, dtype=torch.int64)}, path)


def other_size(path):
    Image.new("RGB", (64, 32)).save(path)


def deep(path):
    Image.new("I;16", (32, 32)).save(path)


SPOILT = [
    ("images/000003.png", cut, "not a readable image"),
    ("images/000003.png", other_size, r"is 32x64 \(height x width\), but the table says 32x32"),
    ("images/000003.png", deep, "colour mode I;16"),
    ("latents/000003.safetensors", cut, "is truncated or damaged"),
    ("latents/000003.safetensors", lambda path: path.write_bytes(b"1234"), "holds no tensor"),
    ("latents/000003.safetensors", lambda path: path.write_bytes(b"9" * 99), "holds no tensor"),
    ("latents/000003.safetensors", foreign, "holds no tensor 'latents'"),
    ("latents/000003.safetensors", integers, "holds latents of type I64; accepted: F64, F32"),
    ("latents/000003.safetensors", other_shape, r"shape \(4, 16\), but \(16, 16\) in most rows"),
]


@pytest.mark.parametrize(("name", "spoil", "message"), SPOILT)
def test_a_damaged_file_is_named_with_its_row(copy, name, spoil, message):
    spoil(copy / name)
    with pytest.raises(MetadataError, match=rf"1 problem in .*\n.* row 5 \(image=.*{message}"):
        check_data(copy / "metadata.csv")


def test_fit_checks_headers_only(copy):
    """Reading a table must not read a million files: damage inside of them is found by `check`."""
    cut(copy / "latents/000003.safetensors")
    assert len(read_metadata(copy / "metadata.csv")) == 8


def test_all_problems_are_listed_at_once_without_a_traceback(copy, capsys):
    table = pd.read_csv(copy / "metadata.csv", dtype=str)
    table.loc[1, "seed"] = "5.0"
    table.loc[6, "image"] = "images/none.png"
    table.to_csv(copy / "metadata.csv", index=False)
    cut(copy / "images/000003.png")
    with pytest.raises(SystemExit) as status:
        check(copy)
    assert status.value.code == 1
    found = capsys.readouterr().out
    lines = found[found.index("3 problems in") :].splitlines()
    assert [line.split()[2] for line in lines[1:4]] == ["3", "5", "8:"]


def test_pictures_of_the_call_are_fully_decoded_too(write, tmp_path):
    path = write("a.png,x,1,cpu,4,1,c.png", header=HEADER + ",edit")
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "c.png")
    cut(tmp_path / "c.png")
    with pytest.raises(MetadataError, match=r"row 2 .*c\.png is not a readable image"):
        check_data(path, call_columns={"image": "edit"})


def test_pairs_are_generated_again_with_the_recorded_teacher(pairs, capsys):
    check(pairs / "heldout", "--pairing", "3")
    found = capsys.readouterr().out
    lines = found[found.index(" row  target") :].splitlines()
    assert lines[0].split() == ["row", "target", "error", "finding"]
    assert [line.split()[0] for line in lines[1:4]] == ["2", "6", "9"]
    assert all(line.endswith("its seed generates it") for line in lines[1:4])
    assert lines[4] == "seeds: 3 of 3 rows are as their seeds generate"
    assert lines[5].startswith("teacher's steps: 10: error ")


def steps(folder, **settings):
    table = read_metadata(folder / "metadata.csv")
    model = DirectDistill("tiny-digits", teacher_cfg_scale=4.0, **settings)
    found, steps = check_pairing(str(folder / "metadata.csv"), table, model, CPU, 1)
    assert found["alike"].all()
    return steps


def test_the_teachers_steps_are_told_where_the_targets_are_exact(copy, monkeypatch):
    """A match within the tolerance proves the seed only."""
    monkeypatch.setattr("lit_distill.teacher.seed_check.COMMON_STEPS", (25, 28))
    generate(copy / "new", "prompts_heldout.txt", 1, 0, "--num_inference_steps", "28")
    table = pd.read_csv(copy / "new/metadata.csv", dtype=str)
    (copy / "new/provenance.json").unlink()
    stated = {"teacher_num_inference_steps": 30, "torch_dtype": "float32"}
    assert steps(copy / "new", **stated).startswith("28, not 30: error ")
    assert steps(copy / "new", **stated | {"teacher_num_inference_steps": 28}).startswith("28: ")
    table.drop(columns="latents").to_csv(copy / "new/metadata.csv", index=False)
    assert steps(copy / "new", **stated).startswith("28, not 30: error ")  # a PNG is lossless
    Image.open(copy / "new/images/000000.png").convert("RGB").save(copy / "new/a.jpg", quality=90)
    table["image"] = "a.jpg"
    table.drop(columns="latents").to_csv(copy / "new/metadata.csv", index=False)
    assert steps(copy / "new", **stated).startswith("not known: with ")


def findings(folder, rows=2, **settings):
    model = DirectDistill(**settings)
    table = read_metadata(folder / "metadata.csv")
    return check_pairing(str(folder / "metadata.csv"), table, model, CPU, rows)[0]


def test_a_wrong_seed_is_found(copy, capsys):
    table = pd.read_csv(copy / "metadata.csv", dtype=str)
    table["seed"] = table["seed"].astype(int) + 1
    table.to_csv(copy / "metadata.csv", index=False)
    with pytest.raises(SystemExit):
        check(copy, "--pairing", "2")
    lines = capsys.readouterr().out.splitlines()
    assert "wrong seed: seed 1000000 generates it" in lines[-3]
    assert "wrong seed: seed 1000007 generates it" in lines[-2]
    assert lines[-1] == "seeds: 0 of 2 rows are as their seeds generate"


def test_wrong_settings_are_found(pairs, copy):
    generate(copy / "new", "prompts_heldout.txt", 2, 0, "--cfg_scale", "1")
    edit(copy / "new", cfg_scale=4.0)
    found = findings(copy / "new")
    assert not found["alike"].any()
    assert found["finding"].str.startswith("wrong settings: 10 steps at cfg 1 generate it").all()


def test_a_wrong_scheduler_is_found(copy):
    generate(copy / "new", "prompts_heldout.txt", 1, 0, "--scheduler", "UniPCMultistepScheduler")
    edit(copy / "new", scheduler=None)
    finding = findings(copy / "new")["finding"][0]
    assert finding.startswith("wrong scheduler: UniPCMultistepScheduler generates it")


def test_a_wrong_model_is_found_by_its_weights(copy, tmp_path):
    pipe = load_pipeline("tiny-digits")
    with torch.no_grad():
        for parameter in pipe.transformer.parameters():
            parameter.mul_(1.1)
    pipe.save_pretrained(tmp_path / "other")
    edit(copy, model=str(tmp_path / "other"))
    finding = findings(copy)["finding"][0]
    assert finding == "wrong model: its weights are not those in provenance.json"
    edit(copy, model="tiny-digits")
    finding = findings(copy, pretrained_model_name_or_path=str(tmp_path / "other"))["finding"][0]
    assert finding.startswith("wrong model: tiny-digits generates it")


def test_images_without_latents_or_provenance_are_generated_with_the_models_settings(copy):
    table = pd.read_csv(copy / "metadata.csv", dtype=str).drop(columns="latents")
    table.to_csv(copy / "metadata.csv", index=False)
    (copy / "provenance.json").unlink()
    with pytest.raises(ValueError, match="name the pipeline that generated it"):
        findings(copy)
    settings = {"torch_dtype": "float32", "teacher_cfg_scale": 4.0}
    settings |= {"pretrained_model_name_or_path": str(TINY)}
    good = findings(copy, teacher_num_inference_steps=10, **settings)
    assert set(good["target"]) == {"image"}
    assert good["alike"].all()
    assert not findings(copy, teacher_num_inference_steps=2, **settings)["alike"].any()


def test_a_16_bit_teacher_matches_and_another_data_type_is_found(copy):
    out = copy / "new"
    generate(out, "prompts_heldout.txt", 4, 0, "--model.torch_dtype", "bfloat16")
    assert findings(out, rows=4)["alike"].all()
    edit(out, torch_dtype="float32")
    found = findings(out)
    assert not found["alike"].any()
    assert found["finding"][0] == "wrong torch_dtype: bfloat16, the teacher's is float32"
