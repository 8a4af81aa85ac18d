import logging
import os
import sys
import warnings

import pytest
from diffusers.utils import logging as diffusers_logging
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from lit_distill import cli
from lit_distill.commands import console

HIDDEN = [
    "Found 553 module(s) in eval mode at the start of training.",
    "predict returned None if it was on purpose, ignore this warning...",
    "The 'val_dataloader' does not have many workers which may be a bottleneck.",
]


@pytest.fixture(autouse=True)
def not_verbose(monkeypatch):
    monkeypatch.delenv(console.VERBOSE, raising=False)


@pytest.mark.parametrize("message", HIDDEN)
def test_what_a_user_can_do_nothing_about_is_hidden(message, capsys):
    with console.quiet():
        rank_zero_warn(message)
        warnings.warn(message, stacklevel=1)
    assert capsys.readouterr().err == ""


def test_other_warnings_are_a_line_each_without_code(capsys):
    with console.quiet():
        warnings.warn("the disk is nearly full", stacklevel=1)
        warnings.warn("an old name", DeprecationWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: the disk is nearly full\n"


def test_lightnings_information_is_hidden_and_this_packages_is_not():
    logger = logging.getLogger(console.LIGHTNING)
    found = []
    handler = logging.Handler()
    handler.emit = found.append
    logger.addHandler(handler)
    try:
        with console.quiet():
            rank_zero_info("TPU available: False")  # of this file, which is not in the package
            exec(
                compile("say('a GPU is better')", f"{console._PACKAGE}/a.py", "exec"),
                {"say": logger.info},
            )
            logger.warning("the GPU is gone")
    finally:
        logger.removeHandler(handler)
    assert [record.getMessage() for record in found] == ["a GPU is better", "the GPU is gone"]


def state():
    names = ["lightning.pytorch", "lightning.fabric", console.LIGHTNING, *console.HIDDEN_LOGGERS]
    loggers = [logging.getLogger(name) for name in names]
    levels = [(logger.level, list(logger.filters)) for logger in loggers]
    bars = diffusers_logging.is_progress_bar_enabled()
    return levels, bars, list(warnings.filters), warnings.showwarning


def test_the_process_is_as_before_afterwards():
    before = state()
    with pytest.raises(RuntimeError), console.quiet():
        console.hide_loading_bars()
        assert not diffusers_logging.is_progress_bar_enabled()
        raise RuntimeError
    assert state() == before
    console.hide_loading_bars()  # of a program that uses this package: nothing changes
    assert state() == before


def test_verbose_hides_nothing(monkeypatch):
    monkeypatch.setenv(console.VERBOSE, "1")
    before = state()
    with console.quiet():
        assert not console.is_quiet()
        assert state() == before


@pytest.mark.parametrize(
    ("arguments", "verbose", "left"),
    [
        (["fit", "--verbose", "--config", "a"], "1", ["fit", "--config", "a"]),
        (["validate", "--verbose", "false"], None, ["validate", "--verbose", "false"]),
    ],
)
def test_verbose_is_an_option_of_the_program_and_of_validate(arguments, verbose, left, monkeypatch):
    """`--verbose` alone is the program's; with a value it is Lightning's, of validate."""
    monkeypatch.setenv(console.VERBOSE, "0")  # so that monkeypatch restores it
    monkeypatch.delenv(console.VERBOSE)
    monkeypatch.setattr(sys, "argv", ["lit-distill", *arguments])
    found = []
    monkeypatch.setattr(
        cli, "build_cli", lambda: found.append((os.environ.get(console.VERBOSE), sys.argv[1:]))
    )
    cli.main()
    assert found == [(verbose, left)]
