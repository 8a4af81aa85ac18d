"""What the command prints of what other libraries say: only what its user can act on.

`quiet` is for programs that own their process, as the command does. Importing this package changes
nothing of how a process prints.
"""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path

from tqdm.auto import tqdm

VERBOSE = "LIT_DISTILL_VERBOSE"
"""Environment variable: anything but 0 and the empty text brings all messages back."""

HIDDEN_WARNINGS = (
    # The pipeline is in evaluation mode on purpose: it computes as when it samples.
    r"Found \d+ module\(s\) in eval mode",
    # The predict loop of `generate` writes files and returns nothing.
    r"predict returned None",
    r"Couldn't infer the batch indices",
    # Commands that read a checkpoint need none of the callbacks that wrote it.
    r"Be aware that when using `ckpt_path`, callbacks",
    r"The dirpath has changed from",
    # Short runs.
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    # Encodings are read from memory, or data.num_workers is set.
    r"The '\w+_dataloader' does not have many workers",
    # `Trainer.log_dir` exists where a run was resumed.
    r"Checkpoint directory .* exists and is not empty",
    # Its samples are written as they come.
    r"You're resuming from a checkpoint that ended before the epoch ended",
)
"""Warnings of other libraries that a user of the command can do nothing about."""

HIDDEN_LOGGERS = (
    # Of its own C++ extensions, and of tensor classes of other versions: model.quantization works.
    "torchao",
    "diffusers.quantizers.torchao.torchao_quantizer",
    # `torch_dtype` in the configuration files of published models.
    "transformers.configuration_utils",
)
"""Loggers whose warnings are as little use; their errors are printed."""

LIGHTNING = "lightning.pytorch.utilities.rank_zero"
"""Logger of Lightning's messages, which this package's go through, too."""

LOADING_BARS = ("diffusers.utils.logging", "transformers.utils.logging")
"""Modules that switch the bars of a pipeline's parts; those of downloads stay."""

_PACKAGE = str(Path(__file__).parent.parent)
_active: list[bool] = []


def is_quiet() -> bool:
    """Return whether `quiet` is in effect."""
    return bool(_active)


def wants_everything() -> bool:
    """Return whether the environment asks for all messages."""
    return os.environ.get(VERBOSE, "") not in ("", "0")


@contextmanager
def quiet() -> Iterator[None]:
    """Print only what a user can act on, until the context is left.

    Warnings are a line each. Deprecations, Lightning's own information and what the constants above
    list are hidden; everything else is shown, this package's messages above all. Does nothing where
    the environment variable LIT_DISTILL_VERBOSE is set.
    """
    if wants_everything():
        yield
        return
    with ExitStack() as stack:
        stack.enter_context(_quiet_warnings())
        for name in HIDDEN_LOGGERS:
            stack.enter_context(_level(name, logging.ERROR))
        for name in ("lightning.pytorch", "lightning.fabric"):
            stack.enter_context(_level(name, logging.WARNING))
        stack.enter_context(_level(LIGHTNING, logging.INFO))
        logger = logging.getLogger(LIGHTNING)
        logger.addFilter(_is_ours)
        stack.callback(logger.removeFilter, _is_ours)
        _active.append(True)
        stack.callback(_active.pop)
        stack.callback(_show_loading_bars, True)
        yield


def hide_loading_bars() -> None:
    """Hide the bars of a pipeline's parts, if `quiet` is in effect; imports what shows them."""
    if is_quiet():
        for name in LOADING_BARS:
            import_module(name)
        _show_loading_bars(False)


def _show_loading_bars(shown: bool) -> None:
    for module in (sys.modules.get(name) for name in LOADING_BARS):
        if module is not None:
            (module.enable_progress_bar if shown else module.disable_progress_bar)()


@contextmanager
def _quiet_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        for category in (DeprecationWarning, PendingDeprecationWarning, FutureWarning):
            warnings.simplefilter("ignore", category)
        for message in HIDDEN_WARNINGS:
            warnings.filterwarnings("ignore", message=message)
        warnings.showwarning = _show_warning
        yield


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning above the progress bar, without the line of code that gave it."""
    tqdm.write(f"warning: {message}", file=sys.stderr)


@contextmanager
def _level(name: str, level: int) -> Iterator[None]:
    logger = logging.getLogger(name)
    before = logger.level
    logger.setLevel(level)
    try:
        yield
    finally:
        logger.setLevel(before)


def _is_ours(record: logging.LogRecord) -> bool:
    return record.levelno >= logging.WARNING or record.pathname.startswith(_PACKAGE)
