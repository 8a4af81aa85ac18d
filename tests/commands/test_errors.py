"""What a user's mistake prints: a few lines with the remedy, exit status 2, no traceback."""

import os
import subprocess
import sys

import pytest
from conftest import ROOT

from lit_distill.cli import main
from lit_distill.commands.parser import explain

# Arguments, and what is printed after "error: ".
MISTAKES = [
    (["fitt"], "unknown subcommand 'fitt' (did you mean 'fit'?)"),
    (["fit", "--trainer.max_stepz", "3"], "unknown option '--trainer.max_stepz' (did you mean "),
    (["fit", "--model.checkpoint", "none"], "model: unknown key 'checkpoint' (did you mean "),
    (
        ["fit", "--data.batchsize", "2"],
        "data: unknown key 'batchsize' (did you mean 'batch_size'?)",
    ),
    (["fit", "--trainer.max_steps", "abc"], "trainer.max_steps must be an integer, got 'abc'"),
    (["fit", "--model.checkpointing", "blok"], "model.checkpointing must be none or block or "),
    (["fit", "--model.lora", "{r: 3"], "model.lora must be a mapping, got '{r: 3'"),
    (["fit", "--model.loss", "lit_distill.LatentL9"], "model.loss: there is no class lit_dis"),
    (
        ["fit", "--model.optimizer", "torch.optim.Adamm"],
        "model.optimizer: there is no class torch.",
    ),
    (
        ["fit", "--model.optimizer.init_args.lrr", "3"],
        "model.optimizer, torch.optim.AdamW: unknown key 'lrr' (did you mean 'lr'?)",
    ),
    (
        ["fit", "--trainer.callbacks", "[{class_path: lit_distill.EMA, init_args: {deca: 3}}]"],
        "trainer.callbacks, lit_distill.EMA: unknown key 'deca' (did you mean 'decay'?)",
    ),
    (["fit", "--config", "nowhere.yaml"], "--config: file does not exist: '"),
    (["generate", "--prompts", "x"], "missing option --out"),
]


@pytest.mark.parametrize(("arguments", "expected"), MISTAKES, ids=lambda value: str(value)[-40:])
def test_a_mistake_on_the_command_line_is_one_line(arguments, expected, capsys):
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    lines = capsys.readouterr().err.splitlines()
    assert ended.value.code == 2
    assert lines[0].startswith(f"error: {expected}"), lines
    assert len(lines) == 2 and lines[1].endswith(("--help", "--help all"))


def test_a_mistake_in_a_file_is_named_as_on_the_command_line(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("model: {checkpoint: none}\ndata: {batch_size: 2}\n")
    with pytest.raises(SystemExit):
        main(["fit", "--config", str(tmp_path / "config.yaml")])
    assert (
        "model: unknown key 'checkpoint' (did you mean 'checkpointing'?)" in capsys.readouterr().err
    )


def test_what_is_not_understood_is_printed_as_it_is():
    assert explain("something else") == ["something else"]


def run(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "lit_distill", *arguments],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env={**os.environ, **environment},
    )


def test_an_error_of_ours_has_no_traceback_unless_debugged(tmp_path):
    (tmp_path / "metadata.csv").write_text("image,prompt\na.png,a cat\n")
    fit = ["fit", "--config", "configs/tiny_lora.yaml", "--trainer.logger", "false"]
    fit += ["--data.metadata_path", str(tmp_path / "metadata.csv")]
    fit += ["--data.val_metadata_path", "null", "--data.val_fraction", "0.5"]
    found = run(*fit)
    assert found.returncode == 2
    assert "Traceback" not in found.stderr
    last = found.stderr[found.stderr.index("error: ") :]
    assert last.startswith("error: ") and "metadata.csv" in last and "'seed' is missing" in last
    assert len(last.splitlines()) < 10
    for found in (run(*fit, "--debug"), run(*fit, LIT_DISTILL_DEBUG="1")):
        assert found.returncode == 1
        assert "Traceback" in found.stderr and "MetadataError" in found.stderr
