import contextlib
import inspect
import io

import pytest

from lit_distill.cli import main
from lit_distill.commands.help import GROUPS, ORDER, SECTIONS, SETTINGS
from lit_distill.version import __version__


def printed(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as ended:
        main(list(arguments))
    assert ended.value.code == 0
    return out.getvalue()


@pytest.mark.parametrize("command", ["fit", "generate", "init"])
def test_the_short_help_fits_two_screens(command):
    lines = printed(command, "--help").splitlines()
    assert len(lines) <= 100
    assert max(map(len, lines)) < 80


def test_the_help_of_fit_has_what_people_use_with_its_default():
    found = printed("fit", "--help")
    for title in ("Model:", "Data:", "Training:", "Checkpoints and logs:"):
        assert f"\n{title}\n" in found
    lines = [line.split() for line in found.splitlines()]
    assert ["--data.batch_size", "rows", "per", "batch", "and", "process", "[1]"] in lines
    # The program's default, not Lightning's.
    assert ["--trainer.default_root_dir", "folder", "of", "all", "runs", "[runs]"] in lines


def test_help_all_has_every_setting():
    found = printed("fit", "--help", "all")
    for section, owner in SECTIONS.items():
        for name in inspect.signature(owner).parameters:
            assert f"  --{section}.{name}" in found
    assert "Where the settings" in " ".join(found.split())  # docstrings, in full
    assert ":class:" not in found and "``" not in found


def test_settings_exist_and_are_used():
    groups = {
        name for group in GROUPS.values() for names in group.values() for name in names.split()
    }
    assert groups == set(SETTINGS)
    for setting in SETTINGS:
        section, _, name = setting.partition(".")
        assert name in inspect.signature(SECTIONS[section]).parameters


def test_the_program_lists_its_commands_in_the_order_of_their_use():
    lines = printed("--help").splitlines()
    found = [line.split()[0] for line in lines if line[:3].strip() and line.startswith("  ")]
    commands = [name for name in found if not name.startswith("--") and name != "COMMAND"]
    assert commands == [name for name in ORDER if name in commands]
    assert len(commands) >= 11 and max(map(len, lines)) < 80
    assert printed("--version").split() == ["lit-distill", __version__]


def test_the_help_of_a_class_lists_no_two_hundred_others():
    found = printed("fit", "--model.help")
    assert "--model.metrics METRICS" in found
    assert "lit_distill.Sharpness" in found and "torchmetrics.image" not in found
    assert len(found.splitlines()) < 200


def test_help_takes_nothing_or_all(capsys):
    with pytest.raises(SystemExit):
        main(["fit", "--help", "everything"])
    assert "--help takes nothing, or all; got everything" in capsys.readouterr().err
