import hashlib
import json
import subprocess
import sys
import time

import pandas as pd
import pytest
from conftest import ROOT, TINY, generate
from PIL import Image

from lit_distill.cli import build_cli, main

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "lit_distill", *arguments], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_understood(path):
    found = run("fit", "--config", str(path), "--print_config")
    assert found.returncode == 0, found.stderr
    assert "pretrained_model_name_or_path" in found.stdout


def test_a_misspelt_key_is_refused_by_name(tmp_path):
    found = run("fit", "--config", str(CONFIGS[-1]), "--model.checkpoint", "none")
    assert found.returncode != 0
    assert "checkpoint" in found.stderr


def test_help_lists_the_commands_soon():
    started = time.monotonic()
    found = run("--help")
    assert time.monotonic() - started < 20  # about 5 s where nothing else runs
    for command in ("fit", "validate", "test", "predict", "generate", "export", "plot"):
        assert f"    {command}" in found.stdout


def test_nothing_heavy_is_imported_for_the_command_line():
    code = "import sys, lit_distill.cli; print('diffusers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "False"


def hashes(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


def test_generate_goes_on_after_an_interruption_with_the_same_files(pairs, tmp_path):
    generate(tmp_path, "prompts_heldout.txt", 8, 1_000_000)
    whole = hashes(tmp_path)
    assert whole == hashes(pairs / "heldout")
    for name in ("images/000003.png", "latents/000005.safetensors", "metadata.csv"):
        (tmp_path / name).unlink()
    kept = (tmp_path / "images/000000.png").stat().st_mtime_ns
    generate(tmp_path, "prompts_heldout.txt", 8, 1_000_000)
    assert hashes(tmp_path) == whole
    assert (tmp_path / "images/000000.png").stat().st_mtime_ns == kept


def test_generate_refuses_a_folder_of_other_pairs(pairs):
    with pytest.raises(ValueError, match=r"cfg_scale was 4.0, now 5.0"):
        generate(pairs / "heldout", "prompts_heldout.txt", 8, 1_000_000, "--cfg_scale", "5")


def test_generate_records_how_the_pairs_were_made(pairs):
    table = pd.read_csv(pairs / "heldout/metadata.csv")
    prompts = (TINY / "prompts_heldout.txt").read_text().splitlines()
    assert table["prompt"].tolist() == prompts[:8]
    assert table["seed"].tolist() == list(range(1_000_000, 1_000_008))
    assert set(table["num_inference_steps"]) == {4}
    assert set(table["teacher_num_inference_steps"]) == {10}
    note = json.loads(Image.open(pairs / "heldout/images/000000.png").info["lit_distill"])
    assert note["prompt"] == prompts[0]
    assert note["cfg_scale"] == 4.0


@pytest.mark.parametrize("config", ["tiny_lora", "tiny_full"])
def test_fit_test_predict_and_export_by_command(config, pairs, tmp_path, capsys):
    data = ["--data.val_metadata_path", str(pairs / "heldout/metadata.csv")]
    place = ["--trainer.default_root_dir", str(tmp_path)]
    main(
        ["fit", "--config", str(ROOT / f"configs/{config}.yaml"), *data, *place]
        + ["--data.metadata_path", str(pairs / "train/metadata.csv"), "--trainer.max_steps", "4"]
    )
    checkpoint = str(next(tmp_path.rglob("last.ckpt")))
    quiet = ["--trainer.logger", "false", "--trainer.accelerator", "cpu", *place]
    main(["test", "--ckpt_path", checkpoint, *data, *quiet])
    assert "student, 4 steps, cfg 1" in capsys.readouterr().out
    ways = json.loads((tmp_path / "report/metrics.json").read_text())["ways"]
    assert [way["evaluations"] for way in ways] == [20, 4, 8, 16, 4]
    assert "<svg" in (tmp_path / "report/report.html").read_text()
    main(["predict", "--ckpt_path", checkpoint, *data, *quiet])
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 8
    main(["export", "--ckpt_path", checkpoint, "--out", str(tmp_path / "export")])
    name = "pytorch_lora_weights.safetensors" if config == "tiny_lora" else "model_index.json"
    assert (tmp_path / "export" / name).is_file()


def test_fit_does_not_let_a_checkpoint_override_the_command_line(pairs, tmp_path):
    data = ["--data.val_metadata_path", str(pairs / "heldout/metadata.csv")]
    data += ["--data.metadata_path", str(pairs / "train/metadata.csv")]
    begin = ["fit", "--config", str(ROOT / "configs/tiny_lora.yaml"), *data]
    begin += ["--trainer.default_root_dir", str(tmp_path)]
    main([*begin, "--trainer.max_steps", "2"])
    checkpoint = str(next(tmp_path.rglob("last.ckpt")))
    again = [*begin, "--trainer.max_steps", "3", "--ckpt_path", checkpoint]
    with pytest.warns(UserWarning, match="model.checkpointing='step' differs from the checkpoint"):
        cli = build_cli([*again, "--model.checkpointing", "step"])
    assert cli.model.hparams["checkpointing"] == "step"
    assert cli.trainer.global_step == 3


def test_examples_run(pairs, tmp_path):
    train = [sys.executable, "examples/train.py", str(pairs / "train/metadata.csv"), str(tmp_path)]
    subprocess.run([*train, "2"], check=True, cwd=ROOT)
    infer = [sys.executable, "examples/infer.py", str(TINY), str(tmp_path), "a red seven"]
    subprocess.run([*infer, str(tmp_path / "image.png"), "32"], check=True, cwd=ROOT)
    assert Image.open(tmp_path / "image.png").size == (32, 32)


def test_preflight_prints_what_it_saw(capsys):
    tiny = ["--model.pretrained_model_name_or_path", "tiny-digits"]
    tiny += ["--model.torch_dtype", "float32", "--trainer.accelerator", "cpu"]
    started = time.monotonic()
    main(["preflight", *tiny, "--model.lora", "{r: 4}", "--trainer.logger", "false"])
    assert time.monotonic() - started < 30  # about 2 s where nothing else runs
    found = capsys.readouterr().out
    assert "QwenImagePipeline:\n  ok         the rollout draws what pipe() draws" in found
    assert "model.freeze: ['transformer.transformer_blocks.3.attn.to_add_out.*'" in found
