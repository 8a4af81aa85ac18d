"""The parser of the command line: a mistake becomes a few lines that name it and what is near."""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Collection, Iterator, Mapping, Set
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

from lit_distill.commands.help import SECTIONS, HelpFormatter, ShowHelp
from lit_distill.errors import with_suggestions

TYPES = {"int": "an integer", "float": "a number", "str": "a text", "bool": "true or false"}
TYPES |= {"dict": "a mapping", "list": "a list"}


class CommandParser(LightningArgumentParser):
    """Lightning's parser with short errors and a short help.

    Attributes:
        commands: The parsers of the subcommands, by name.
        required: Names of the options that a subcommand needs.
    """

    def __init__(self, *args: Any, **options: Any) -> None:  # noqa: ANN401
        options.setdefault("formatter_class", HelpFormatter)
        super().__init__(*args, add_help=False, **options)
        self.commands: Mapping[str, Any] = {}
        self.required: Set[str] = frozenset()
        self.add_argument("-h", "--help", action=ShowHelp, help="all: every setting")

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Print what is wrong, without the usage, and exit with status 2."""
        if not self.exit_on_error:
            super().error(message, ex)
        parser: Any = getattr(ex, "subcommand_parser", None) or self
        options = [name for action in parser._actions for name in action.option_strings]
        for line in explain(message, options):
            print(f"error: {line}", file=sys.stderr)
        program = parser.prog.replace(" [options]", "")
        every = "" if parser.commands else " all"
        print(f"All settings: {program} --help{every}", file=sys.stderr)
        self.exit(2)


def explain(message: str, options: Collection[str] = ()) -> list[str]:
    """Return what a message of jsonargparse means, one line for each mistake.

    jsonargparse reports every type that it has tried, nested; only the innermost reasons are kept.

    Args:
        message: The message. One that is not understood is returned as it is.
        options: Names of the options that are accepted, with their dashes.
    """
    if match := re.match(r"unrecognized arguments: (.*)", message, re.DOTALL):
        keys = (f"--{section}.{name}" for section in SECTIONS for name in _keys(section))
        known = dict.fromkeys([*options, *keys])
        names = [part.partition("=")[0] for part in match[1].split() if part.startswith("-")]
        unknown = [f"unknown option {with_suggestions(name, known, 0.6)}" for name in names]
        return unknown or [message]
    if match := re.match(r"argument subcommand: invalid choice: '(.*)' \(choose from", message):
        subcommands = re.findall(r"'(\w+)'", message[match.end() :])
        return [f"unknown subcommand {with_suggestions(match[1], subcommands, 0.6)}"]
    if match := re.match(r"the following arguments are required: (.*)", message):
        names = [name.strip().rpartition(".")[2] for name in match[1].split(",")]
        return [f"missing option --{name}" for name in names]
    return list(dict.fromkeys(_reasons(message))) or [message]


def _keys(section: str) -> list[str]:
    """Return the keys of a section of the configuration."""
    return list(inspect.signature(SECTIONS[section]).parameters)


def _reasons(message: str) -> Iterator[str]:
    """Yield the innermost reasons of a nested message, each with its key."""
    keys: list[tuple[int, str]] = []  # indentation and name, the outermost first
    expected: list[str] = []
    explained: set[str] = set()
    class_path = ""
    for line in message.splitlines():
        text = line.lstrip(" -")
        indentation = len(line) - len(text)
        if match := re.match(r'Parser key "(.*?)":(.*)', text):
            keys = [*(key for key in keys if key[0] < indentation), (indentation, match[1])]
            expected, text = [], match[2].strip()
        key = ".".join(name for _, name in keys)
        if match := re.search(r"class_path[ =]'(.*?)'", text):
            class_path = match[1]
        if match := re.search(r"(?:Option|Key) '(.*?)' is not (?:accepted|expected)", text):
            explained.add(key)
            yield _unknown_key(key, match[1], class_path)
        elif match := re.search(r"module '(.*)' has no attribute '(.*?)'", text):
            explained.add(key)
            yield f"{key}: there is no class {match[1]}.{match[2]}"
        elif match := re.search(r"No module named '(.*?)'", text):
            explained.add(key)
            yield f"{key}: there is no module {match[1]}"
        elif text.startswith("File does not exist"):
            yield f"--{key}: {text[0].lower()}{text[1:]}"
        elif match := re.match(r"Expected an? (?!path but)(.*?)(?:\. Got value: (.*))?$", text):
            expected.append(_readable(match[1]))
            if match[2] is not None:
                yield _wrong_value(key, expected, match[2])
        elif match := re.match(r"Given value: (?!NestedArg)(.*)", text):
            if key not in {*SECTIONS, *explained} and set(expected) - {"null"}:
                yield _wrong_value(key, expected, match[1])
            expected = []


def _unknown_key(section: str, name: str, class_path: str) -> str:
    known = _keys(section) if section in SECTIONS else _arguments(class_path)
    near = with_suggestions(name, known, cutoff=0.6)
    where = section if section in SECTIONS else f"{section}, {class_path}"
    return f"{where}: unknown key {near}"


def _arguments(class_path: str) -> list[str]:
    """Return the names of a class's arguments; none where it can't be imported."""
    module, _, name = class_path.rpartition(".")
    try:
        return list(inspect.signature(getattr(importlib.import_module(module), name)).parameters)
    except (ImportError, AttributeError, ValueError):
        return []


def _wrong_value(key: str, expected: list[str], value: str) -> str:
    kinds = [kind for kind in dict.fromkeys(expected) if kind != "null"] or ["null"]
    return f"{key} must be {' or '.join(kinds)}, got {value!r}"


def _readable(kind: str) -> str:
    """Return a Python type as a user would write it."""
    if "NoneType" in kind:
        return "null"
    if literal := re.search(r"Literal\[(.*)\]", kind):
        return " or ".join(part.strip().strip("'") for part in literal[1].split(","))
    name = re.sub(r"<class '(?:.*\.)?(.*)'>", r"\1", kind)
    return TYPES.get(name, name)
