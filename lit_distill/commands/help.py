"""`--help`: the settings that people use, a line each; `--help all` has every one.

jsonargparse's own help begins with a screen of brackets, and does not list the settings of the
model and of the data, whose classes can be replaced.
"""

from __future__ import annotations

import argparse
import inspect
import re
import textwrap
from collections.abc import Mapping, Sequence, Set
from typing import Any, Protocol

import lightning.pytorch as pl
from docstring_parser import parse
from jsonargparse import DefaultHelpFormatter

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.sample_images import SampleImages

WIDTH = 80
COLUMN = 37
"""Where the explanation of a setting begins."""

SECTIONS: dict[str, type] = {"model": DirectDistill, "data": DistillDataModule}
SECTIONS |= {"sample": SampleImages, "trainer": pl.Trainer}
"""Top-level keys of a configuration, and the classes whose arguments they hold."""

SETTINGS = {
    "model.pretrained_model_name_or_path": "hub id or folder, or tiny-digits",
    "model.torch_dtype": "of the frozen weights",
    "model.lora": "such as {r: 32}; null: train all weights",
    "model.init_lora": "LoRA file to start from",
    "model.teacher_lora": "style LoRA that the teacher has",
    "model.checkpointing": "none, selective, block, step, nested, auto",
    "model.quantization": "frozen weights in 8 or 4 bits",
    "model.optimizer": "class_path and init_args",
    "model.lr_scheduler": "class_path and init_args",
    "model.objective": "null: Direct Distillation; or a class_path",
    "model.loss": "class_path and init_args",
    "model.metrics": "of held-out rows, by name",
    "model.call_kwargs": "such as {negative_prompt: blurry}",
    "data.metadata_path": "table of the training pairs",
    "data.val_metadata_path": "table of the held-out pairs",
    "data.val_fraction": "share of prompts to hold out instead",
    "data.columns": "its names, such as {prompt: text}",
    "data.constants": "columns that it lacks, such as {cfg_scale: 1}",
    "data.batch_size": "rows per batch and process",
    "data.height": "set with width: required size of images",
    "data.width": "see height",
    "data.repeat": "passes over the rows in an epoch",
    "data.cache_dir": "encode once, then free the encoders",
    "data.num_workers": "processes that read files",
    "sample.prompts": "list: sampled while training",
    "sample.every_n_steps": "how often",
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
        "Checkpoints and logs": "trainer.default_root_dir trainer.callbacks trainer.logger "
        "sample.prompts sample.every_n_steps",
    },
    "generate": {
        "Model": "model.pretrained_model_name_or_path model.torch_dtype model.teacher_lora "
        "model.call_kwargs",
        **DEVICES,
    },
    "check": {
        "Data": "data.metadata_path data.val_metadata_path data.columns data.constants "
        "data.height data.width",
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

ORDER = (
    *("init", "plan", "preflight", "generate", "check", "fit"),
    *("validate", "test", "play", "predict", "export", "plot"),
)
"""Subcommands in the order of their use."""

SEED = "seed of the initial weights of a LoRA"
RARE = {"validate": {"verbose"}, "test": {"verbose"}, "predict": {"return_predictions"}}
"""Options of subcommands that come with Lightning, and that only the long help lists."""


class Parser(Protocol):
    """The parser of the program, or of a subcommand: `commands.parser.CommandParser`."""

    prog: str
    description: str | None
    commands: Mapping[str, Any]
    required: Set[str]
    _actions: list[argparse.Action]


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
        print(short_help(parser) if values is None else long_help(parser))
        parser.exit()


class HelpFormatter(DefaultHelpFormatter):
    """jsonargparse's formatter, as of ``--model.help``; of many classes it names this package's."""

    def add_usage(self, usage: str | None, *args: Any, **options: Any) -> None:  # noqa: ANN401
        """Print no list of all options: it comes below."""
        super().add_usage(usage or "%(prog)s [options]", *args, **options)

    def _get_help_string(self, action: argparse.Action) -> str:
        text = super()._get_help_string(action)
        return re.sub(r", known subclasses: ([^()]*)", _few, text)


def _few(match: re.Match[str]) -> str:
    names = match[1].split(", ")
    if len(names) <= 5:
        return match[0]
    ours = [name for name in names if re.fullmatch(r"lit_distill\.\w+", name)] or names[:3]
    return f", classes: {', '.join(ours)} and {len(names) - len(ours)} others"


def short_help(parser: Parser) -> str:
    """Return the short help of the program or of one of its subcommands."""
    if parser.commands:
        return _program_help(parser)
    lines = _usage(parser)
    for title, names in GROUPS.get(_command(parser), {}).items():
        lines += ["", f"{title}:"]
        for setting in names.split():
            lines += _line(f"--{setting}", SETTINGS[setting] + _default(parser, setting))
    if _command(parser) in GROUPS:
        lines += ["", f"Everything else: {_program(parser)} --help all"]
    return "\n".join(lines)


def long_help(parser: Parser) -> str:
    """Return every option of a subcommand, and every setting with its docstring."""
    if parser.commands:
        return _program_help(parser)
    lines = _usage(parser, every=True)
    for section, owner in SECTIONS.items() if _command(parser) in GROUPS else ():
        lines += ["", f"{section.capitalize()} ({owner.__module__}.{owner.__qualname__}):"]
        texts = _docstring(owner)
        for name in inspect.signature(owner).parameters:
            setting, text = f"{section}.{name}", texts.get(name, "")
            lines += _line(f"--{setting}", text + _default(parser, setting))
    return "\n".join(lines)


def _docstring(owner: type) -> dict[str, str]:
    """Return what the docstring of a class or of its constructor says of each argument."""
    sources = (inspect.getdoc(owner), inspect.getdoc(owner.__init__))  # type: ignore[misc]
    params = [param for source in sources for param in parse(source or "").params]
    return {param.arg_name: _plain(param.description or "") for param in params}


def _plain(text: str) -> str:
    """Return a text without the marks of reStructuredText and what `_default` says."""
    text = re.sub(r":\w+:`~?(?:[\w.]*\.)?(\w+)`", r"\1", text)
    return re.sub(r"\s*Default: \S+$", "", re.sub(r"``|\*\*", "", text))


def _program(parser: Parser) -> str:
    return parser.prog.replace(" [options]", "")


def _command(parser: Parser) -> str:
    return _program(parser).rpartition(" ")[2]


def _program_help(parser: Parser) -> str:
    order = {name: index for index, name in enumerate(ORDER)}
    lines = [f"usage: {_program(parser)} COMMAND [options]", "", *_wrapped(parser.description), ""]
    lines += ["Commands, in the order of their use:"]
    for name in sorted(parser.commands, key=order.__getitem__):
        text = textwrap.wrap(str(parser.commands[name].description), WIDTH - 14)
        lines += [f"  {name:11}{text[0]}", *(" " * 13 + line for line in text[1:])]
    lines += ["", "Options:", *_line("COMMAND --help", "the settings that people use")]
    lines += _line("COMMAND --help all", "every setting of a command")
    lines += _line("--verbose", "print the messages of other libraries, too")
    lines += _line("--debug", "print the traceback of an error")
    lines += _line("--version", "print the version")
    return "\n".join(lines)


def _usage(parser: Parser, every: bool = False) -> list[str]:
    """Return usage, description and a subcommand's own options, which belong to no section."""
    command = _command(parser)
    lines = [f"usage: {_program(parser)} [options]", "", *_wrapped(parser.description), ""]
    lines += ["Options:"]
    hidden = {"help", "config", "print_config", "weights_only"}
    hidden |= {action.dest.partition(".")[0] for action in parser._actions if "." in action.dest}
    hidden |= set() if every else RARE.get(command, set())
    if command in GROUPS:
        lines += _line("--config FILE", "settings as YAML; options after it take precedence")
    for action in parser._actions:
        name = action.dest
        seed = name == "seed_everything"
        if "." in name or name in hidden or not action.help or (seed and command != "fit"):
            continue
        text = SEED if seed else str(action.help) if every else _first_sentence(str(action.help))
        required = " (required)" if name in parser.required else ""
        lines += _line(f"--{name}", text + required + _default(parser, name))
    if every and command in GROUPS:
        lines += _line("--print_config", "print all settings as YAML, and exit")
    return lines


def _first_sentence(text: str) -> str:
    text = re.split(r"\.(?:\s|$)|,? e\.g\.", text)[0]
    return text[0].lower() + text[1:] if text[1:2].islower() or text[1:2] == " " else text


def _default(parser: Parser, setting: str) -> str:
    """Return a default in brackets, "" where there is nothing to say of it."""
    section, _, name = setting.partition(".")
    value = {action.dest: action.default for action in parser._actions}.get(setting)
    if section in SECTIONS and value is None:  # the model's and the data's
        value = inspect.signature(SECTIONS[section]).parameters[name].default
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return ""
    return f" [{value:g}]" if isinstance(value, float) else f" [{value}]"


def _line(name: str, text: str) -> list[str]:
    """Return a setting and its explanation, on further lines if they are long."""
    wrapped = textwrap.wrap(text, WIDTH - COLUMN - 1, break_on_hyphens=False) or [""]
    further = [" " * COLUMN + line for line in wrapped]
    if len(name) > COLUMN - 4:
        return [f"  {name}", *further]
    return [f"  {name:{COLUMN - 2}}{wrapped[0]}".rstrip(), *further[1:]]


def _wrapped(text: str | None) -> list[str]:
    return textwrap.wrap(text or "", WIDTH - 1)
