"""`--help`: the settings that people use, a line each; `--help all` has every one.

The long help is jsonargparse's own, which reads docstrings and types. It fills ten screens, most
of them with Lightning's Trainer, so the short help names what a first training needs.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
from jsonargparse import DefaultHelpFormatter

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.training.direct_distill import DirectDistill

if TYPE_CHECKING:
    from lit_distill.commands.parser import CommandParser

WIDTH = 80
COLUMN = 37
"""Where the explanation of a setting begins."""

SECTIONS = {"model": DirectDistill, "data": DistillDataModule, "trainer": pl.Trainer}
"""Top-level keys of a configuration, and the classes whose arguments they hold."""

SETTINGS = {
    "model.pretrained_model_name_or_path": "hub id or folder, or tiny-digits",
    "model.torch_dtype": "of the frozen weights",
    "model.lora": "such as {r: 32}; null: train all weights",
    "model.init_lora": "LoRA file to start from",
    "model.teacher_lora": "style LoRA that the teacher has",
    "model.checkpointing": "none, block, step, nested, auto",
    "model.quantization": "frozen weights in 8 or 4 bits",
    "model.optimizer": "class_path and init_args",
    "model.lr_scheduler": "class_path and init_args",
    "model.loss": "class_path and init_args",
    "model.metrics": "of held-out rows, by name",
    "model.call_kwargs": "such as {negative_prompt: blurry}",
    "data.metadata_path": "table of the training pairs",
    "data.val_metadata_path": "table of the held-out pairs",
    "data.val_fraction": "share of prompts to hold out instead",
    "data.batch_size": "rows per batch and process",
    "data.height": "set with width: required size of images",
    "data.width": "see height",
    "data.repeat": "passes over the rows in an epoch",
    "data.cache_dir": "encode once, then free the encoders",
    "data.num_workers": "processes that read files",
    "trainer.accelerator": "cpu, gpu, auto",
    "trainer.devices": "number of GPUs",
    "trainer.strategy": "ddp, fsdp2, auto",
    "trainer.precision": "32-true, or bf16-mixed on a GPU",
    "trainer.max_steps": "optimizer steps",
    "trainer.max_epochs": "passes over the data; -1: no limit",
    "trainer.accumulate_grad_batches": "batches of an optimizer step",
    "trainer.gradient_clip_val": "largest norm of the gradient",
    "trainer.check_val_every_n_epoch": "how often to validate",
    "trainer.val_check_interval": "the same within an epoch",
    "trainer.logger": "class_path and init_args; false: none",
    "trainer.default_root_dir": "folder of all runs",
    "trainer.callbacks": "list: ModelCheckpoint, lit_distill.EMA",
}
"""Settings that people use, in a few words; their docstrings say more."""

DEVICES = {"Device": "trainer.accelerator trainer.devices trainer.strategy"}
HELD_OUT = {"Held-out pairs": "data.val_metadata_path data.val_fraction data.batch_size"}

GROUPS: dict[str, dict[str, str]] = {
    "fit": {
        "Model": " ".join(name for name in SETTINGS if name.startswith("model.")),
        "Data": " ".join(name for name in SETTINGS if name.startswith("data.")),
        "Training": "trainer.accelerator trainer.devices trainer.strategy trainer.precision "
        "trainer.max_steps trainer.max_epochs trainer.accumulate_grad_batches "
        "trainer.gradient_clip_val trainer.check_val_every_n_epoch trainer.val_check_interval",
        "Checkpoints and logs": "trainer.default_root_dir trainer.callbacks trainer.logger",
    },
    "generate": {
        "Model": "model.pretrained_model_name_or_path model.torch_dtype model.teacher_lora "
        "model.call_kwargs",
        **DEVICES,
    },
    "check": {
        "Data": "data.metadata_path data.val_metadata_path data.height data.width",
        "Teacher, for --pairing without provenance.json": "model.pretrained_model_name_or_path "
        "model.torch_dtype",
    },
    "preflight": {
        "Model": "model.pretrained_model_name_or_path model.torch_dtype model.lora "
        "model.quantization model.call_kwargs",
        "Device": "trainer.accelerator",
    },
    "plan": {
        "Model": "model.pretrained_model_name_or_path model.lora model.checkpointing "
        "model.quantization",
        "Data": "data.metadata_path data.batch_size data.height data.width",
    },
    "validate": {**HELD_OUT, **DEVICES},
    "test": {**HELD_OUT, **DEVICES},
    "predict": {**HELD_OUT, **DEVICES},
    "play": {"Device": "trainer.accelerator"},
    "export": {"Device": "trainer.accelerator"},
}
"""What the short help of a subcommand lists beside its own options."""

ORDER = "init plan preflight generate check fit validate test play predict export plot".split()
"""Subcommands in the order of their use."""


class ShowHelp(argparse._HelpAction):
    """``--help`` prints the short help, ``--help all`` the long one."""

    def __init__(self, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.nargs, self.metavar = "?", "all"

    def __call__(
        self,
        parser: Any,  # noqa: ANN401
        namespace: argparse.Namespace,
        values: str | Sequence[Any] | None,
        option_string: str | None = None,
    ) -> None:
        """Print it and exit."""
        if values not in (None, "all"):
            parser.error(f"--help takes nothing, or all; got {values}")
        print(short_help(parser) if values is None else parser.format_help().rstrip())
        parser.exit()


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter; of many known classes it names this package's."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        return re.sub(r", known subclasses: ([^()]*)", _few, text)


def _few(match: re.Match[str]) -> str:
    names = match[1].split(", ")
    ours = [name for name in names if name.startswith("lit_distill.")]
    if len(names) <= 5:
        return match[0]
    kept = ours or names[:3]
    return f", classes: {', '.join(kept)} and {len(names) - len(kept)} others"


def short_help(parser: CommandParser) -> str:
    """Return the short help of the program or of one of its subcommands."""
    program = parser.prog.replace(" [options]", "")
    if parser.commands:
        return _program_help(parser, program)
    name = program.rpartition(" ")[2]
    lines = [f"usage: {program} [--config FILE] [options]", "", *_wrapped(parser.description), ""]
    lines += ["Options:", *_own_options(parser)]
    lines += _line("--config FILE", "YAML file of settings; options after it take precedence")
    for title, names in GROUPS.get(name, {}).items():
        lines += ["", f"{title}:"]
        for setting in names.split():
            lines += _line(f"--{setting}", _explained(setting))
    lines += ["", *_wrapped(f"Everything else: {program} --help all")]
    return "\n".join(lines)


def _program_help(parser: CommandParser, program: str) -> str:
    order = {name: index for index, name in enumerate(ORDER)}
    lines = [f"usage: {program} COMMAND [options]", "", *_wrapped(parser.description), ""]
    lines += ["Commands, in the order of their use:"]
    for name in sorted(parser.commands, key=lambda name: order.get(name, len(order))):
        text = textwrap.wrap(str(parser.commands[name].description), WIDTH - 16)
        lines += [f"    {name:12}{text[0]}", *(" " * 16 + line for line in text[1:])]
    lines += [
        "",
        "Options:",
        *_line("COMMAND --help", "what a command takes; --help all: all of it"),
    ]
    lines += _line("--verbose", "also print the messages of other libraries")
    lines += _line("--debug", "print the traceback of an error")
    lines += _line("--version", "print the version")
    return "\n".join(lines)


def _own_options(parser: CommandParser) -> list[str]:
    """Return the lines of a subcommand's options that are no settings of a section."""
    lines = []
    for action in parser._actions:
        name = action.dest
        known = {*SECTIONS, "help", "config", "print_config", "weights_only"}
        if "." in name or name in known or not action.option_strings or not action.help:
            continue
        sentence = re.split(r"\.(?:\s|$)", str(action.help))[0]
        sentence = SEED if name == "seed_everything" else sentence[0].lower() + sentence[1:]
        required = " (required)" if name in parser.required else ""
        lines += _line(f"--{name}", sentence + required + _default(action.default))
    return lines


SEED = "seed of initial weights"


def _explained(setting: str) -> str:
    section, _, name = setting.partition(".")
    default = inspect.signature(SECTIONS[section]).parameters[name].default
    return SETTINGS[setting] + _default(default)


def _default(value: Any) -> str:  # noqa: ANN401
    """Return a default in brackets, "" where there is nothing to say of it."""
    plain = isinstance(value, int | float | str) and not isinstance(value, bool)
    return f" [{value:g}]" if plain and isinstance(value, float) else f" [{value}]" if plain else ""


def _line(name: str, text: str) -> list[str]:
    """Return a setting and its explanation, on two lines if the name is long."""
    wrapped = textwrap.wrap(text, WIDTH - COLUMN - 1)
    if len(name) > COLUMN - 4:
        return [f"  {name}", *(" " * COLUMN + line for line in wrapped)]
    return [f"  {name:{COLUMN - 2}}{wrapped[0]}", *(" " * COLUMN + line for line in wrapped[1:])]


def _wrapped(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", WIDTH - 1)
