import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY, generate
from PIL import Image

from lit_distill.cli import build_cli, main
from lit_distill.pipelines.loading import pipeline_source
from lit_distill.training.checkpoint_io import read_checkpoint

CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def run(*arguments, **options):
    return subprocess.run(
        [sys.executable, "-m", "lit_distill", *arguments], capture_output=True, text=True, **options
    )


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_understood(path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(path), "--print_config"])
    assert ended.value.code == 0
    assert "pretrained_model_name_or_path" in capsys.readouterr().out


def test_a_misspelt_key_is_refused_by_name(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["fit", "--config", str(CONFIGS[-1]), "--model.checkpoint", "none"])
    assert ended.value.code != 0
    assert "unknown key 'checkpoint' (did you mean 'checkpointing'?)" in capsys.readouterr().err


def test_help_lists_the_commands_soon():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    found = run("--help")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime - before.ru_utime < 15  # about 5 s
    for command in ("fit", "validate", "test", "predict", "generate", "check", "export", "plot"):
        assert f"\n  {command} " in found.stdout


def test_nothing_heavy_is_imported_for_the_command_line():
    code = "import sys, lit_distill.cli; print('diffusers' in sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.stdout.strip() == "False"


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
    assert "data:image/svg+xml" in (tmp_path / "report/report.html").read_text()
    main(["predict", "--ckpt_path", checkpoint, *data, *quiet])
    assert len(list((tmp_path / "predictions").glob("*.png"))) == 8
    main(["export", "--ckpt_path", checkpoint, "--out", str(tmp_path / "export")])
    name = "pytorch_lora_weights.safetensors" if config == "tiny_lora" else "model_index.json"
    assert (tmp_path / "export" / name).is_file()


def test_the_report_of_a_student_of_words_has_the_letters_of_teacher_and_student(tmp_path):
    words = ["--model.pretrained_model_name_or_path", "tiny-words", "--cfg_scale", "3"]
    words += ["--height", "32", "--width", "64"]
    prompts = Path(pipeline_source("tiny-words")) / "prompts_heldout.txt"
    generate(tmp_path / "pairs", prompts, 8, 0, *words)
    table = str(tmp_path / "pairs/metadata.csv")
    config = str(ROOT / "configs/words_lora.yaml")
    data = ["--data.metadata_path", table, "--data.val_metadata_path", "null"]
    place = ["--trainer.default_root_dir", str(tmp_path)]
    main(
        ["fit", "--config", config, *data, *place, "--data.val_fraction", "0.5"]
        + ["--data.batch_size", "4", "--trainer.max_steps", "1"]
    )
    checkpoint = str(next(tmp_path.rglob("last.ckpt")))
    main(
        ["test", "--ckpt_path", checkpoint, "--data.val_metadata_path", table, *place]
        + ["--trainer.accelerator", "cpu", "--undistilled", "[[4, 3.0]]"]
    )
    ways = json.loads((tmp_path / "report/metrics.json").read_text())["ways"]
    teacher, *_, student = ways
    assert teacher["letters"] > 0.9 and teacher["words"] <= teacher["letters"]
    assert teacher["sharpness"] is None and 0 < student["sharpness"] < 1
    assert student["letters"] < teacher["letters"]


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


def test_the_last_checkpoint_is_the_latest_where_validation_gets_no_better(pairs, tmp_path):
    data = ["--data.val_metadata_path", str(pairs / "heldout/metadata.csv")]
    data += ["--data.metadata_path", str(pairs / "train/metadata.csv"), "--model.metrics", "{}"]
    short = ["--trainer.max_steps", "8", "--trainer.default_root_dir", str(tmp_path)]
    learn_nothing = ["--model.optimizer.init_args.lr", "0"]
    main(["fit", "--config", str(ROOT / "configs/tiny_lora.yaml"), *data, *short, *learn_nothing])
    steps = {p.name: read_checkpoint(p)["global_step"] for p in tmp_path.rglob("*.ckpt")}
    assert steps == {"best.ckpt": 4, "last.ckpt": 8}


def test_examples_run(pairs, tmp_path):
    train = [sys.executable, "examples/train.py", str(pairs / "train/metadata.csv"), str(tmp_path)]
    subprocess.run([*train, "2"], check=True, cwd=ROOT)
    infer = [sys.executable, "examples/infer.py", str(TINY), str(tmp_path / "lora"), "a red seven"]
    subprocess.run([*infer, str(tmp_path / "image.png"), "32"], check=True, cwd=ROOT)
    assert Image.open(tmp_path / "image.png").size == (32, 32)


def test_preflight_prints_what_it_saw(capsys):
    tiny = ["--model.pretrained_model_name_or_path", "tiny-digits"]
    tiny += ["--model.torch_dtype", "float32", "--trainer.accelerator", "cpu"]
    started = time.monotonic()
    main(["preflight", *tiny, "--model.lora", "{r: 4}", "--trainer.logger", "false"])
    assert time.monotonic() - started < 30  # about 2 s where nothing else runs
    found = capsys.readouterr().out
    assert "QwenImagePipeline:\n  ok         the rollout generates what pipe() generates" in found
    assert "model.freeze: ['transformer.transformer_blocks.3.attn.to_add_out.*'" in " ".join(
        found.split()
    )
