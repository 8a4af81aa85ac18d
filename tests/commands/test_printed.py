"""What every command prints, as a user sees it: numbers are replaced by 0, the folder by DIR.

The texts are in printed/, one for each command. A line that is not needed there is one that its
user must read.
"""

import contextlib
import io
import logging
import re
import sys
from pathlib import Path
from unittest.mock import patch

import pytest
from conftest import TINY

from lit_distill import cli
from lit_distill.commands import console

PRINTED = Path(__file__).parent / "printed"
MODEL = ["--model.pretrained_model_name_or_path", "tiny-digits", "--model.torch_dtype", "float32"]
CPU = ["--trainer.accelerator", "cpu"]
CHECKPOINT = ["--ckpt_path", "runs/lightning_logs/version_0/checkpoints/best.ckpt"]
HELD_OUT = ["--data.val_metadata_path", "pairs/heldout/metadata.csv"]

COMMANDS = {
    "help": ["--help"],
    "init": ["init", "--model", "tiny"],
    "plan": ["plan", "--config", "tiny_lora.yaml"],
    "preflight": ["preflight", *MODEL, "--model.lora", "{r: 4}", "--height", "32", "--width", "32"],
    "generate": ["generate", *MODEL, *CPU, "--prompts", "prompts.txt", "--out", "data"]
    + ["--num_inference_steps", "4"],
    "check": ["check", "--data.metadata_path", "data/metadata.csv", "--pairing", "1"],
    "fit": ["fit", "--config", "tiny_lora.yaml", "--data.metadata_path", "pairs/train/metadata.csv"]
    + [*HELD_OUT, "--trainer.max_steps", "4"],
    "validate": ["validate", *CHECKPOINT, *HELD_OUT, *CPU],
    "test": ["test", *CHECKPOINT, *HELD_OUT, *CPU, "--out", "report"],
    "predict": ["predict", *CHECKPOINT, *CPU, "--prompts", "prompts.txt", "--out", "images"],
    "export": ["export", *CHECKPOINT, *CPU, "--out", "student"],
    "plot": ["plot", "--logs", "runs/lightning_logs/version_0"],
}
"""In the order of their use: each one finds what those before it have written."""


@pytest.fixture(scope="module")
def session(pairs, tmp_path_factory):
    """The folder of a session, and what each command printed there, both streams together."""
    folder = tmp_path_factory.mktemp("session")
    (folder / "pairs").symlink_to(pairs)
    prompts = (TINY / "prompts_train.txt").read_text().splitlines()
    (folder / "prompts.txt").write_text("\n".join(prompts[:2]))
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.delenv(console.VERBOSE, raising=False)
        monkeypatch.setenv("COLUMNS", "80")
        monkeypatch.chdir(folder)
        for name, arguments in COMMANDS.items():
            monkeypatch.setattr(sys, "argv", ["lit-distill", *arguments])
            found[name] = _printed()
    return folder, found


def _printed():
    out = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(out))
        logger = logging.getLogger("lightning.pytorch")  # its handler, as outside of pytest
        stack.enter_context(patch.object(logger, "handlers", [logging.StreamHandler(out)]))
        stack.enter_context(contextlib.suppress(SystemExit))
        cli.main()
    return out.getvalue()


def normalised(text, folder):
    text = text.replace(str(folder), "DIR")
    text = re.sub(r"(?<!\S)-(?=\d)", "", text)  # rounding has either sign
    text = re.sub(r"\b\d+([.,:]\d+)*(e[+-]?\d+)?", "0", text)
    return re.sub(r"-{3,}", "---", re.sub(r" +", " ", text))


@pytest.mark.parametrize("command", COMMANDS)
def test_what_a_command_prints(command, session):
    folder, found = session
    expected = (PRINTED / f"{command}.txt").read_text()
    assert normalised(found[command], folder) == expected


@pytest.mark.parametrize("command", COMMANDS)
def test_it_fits_80_columns(command, session):
    _, found = session
    assert max(len(line) for line in found[command].splitlines()) <= 80


def test_only_fit_writes_logs_and_nothing_lies_about(session):
    folder, _ = session
    assert {path.name for path in folder.iterdir()} == {
        *("data", "images", "pairs", "report", "runs", "student"),
        *("curves.png", "prompts.txt", "tiny_lora.yaml"),
    }
    assert [path.name for path in (folder / "runs").iterdir()] == ["lightning_logs"]
    assert [path.name for path in (folder / "runs/lightning_logs").iterdir()] == ["version_0"]
