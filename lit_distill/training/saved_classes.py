"""Classes that a checkpoint names: only those of this package and what the user names are used.

Importing a module runs its code, and a checkpoint may come from anywhere.
"""

from __future__ import annotations

import importlib
import inspect
import sys
from collections.abc import Collection, Iterator, Mapping
from typing import Any, TypeVar

from torchmetrics import Metric

from lit_distill.errors import InputError

TRUSTED = ("lit_distill", "torchmetrics")
"""Packages whose classes a checkpoint may name."""

COMPONENTS = ("loss", "objective", "optimizer", "lr_scheduler", "init_lora")
"""Arguments of `DirectDistill` that no checkpoint holds."""

Module = TypeVar("Module")


def class_paths(value: Any) -> Iterator[str]:  # noqa: ANN401
    """Yield the class paths in a configuration, at any depth."""
    if isinstance(value, Mapping):
        if "class_path" in value:
            yield str(value["class_path"])
        for each in value.values():
            yield from class_paths(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from class_paths(each)


def check_class_paths(value: Any, where: str, named: Collection[str] = ()) -> None:  # noqa: ANN401
    """Check that a checkpoint's settings name trusted classes only.

    Args:
        value: The settings.
        where: Name of the checkpoint in the error.
        named: Class paths that the user has named.

    Raises:
        InputError: If they name another class.
    """
    for path in class_paths(value):
        if path.partition(".")[0] not in TRUSTED and path not in named:
            raise InputError(
                f"{where} names the class {path}, which is not imported, since it may be anybody's "
                "code; if you trust it, name the class yourself, on the command line or in the "
                "configuration"
            )


def named_class(saved: Mapping[str, Any], default: type[Module], where: str) -> type[Module]:
    """Return the class that a checkpoint's module had, if it is imported already.

    Args:
        saved: The checkpoint's hyperparameters.
        default: Class that it has to be, or inherit from.
        where: Name of the checkpoint in the error.

    Raises:
        InputError: If it is another class, or is not imported.
    """
    path = saved.get("_class_path")
    if path is None:
        return default
    module, _, name = str(path).rpartition(".")
    kind = getattr(sys.modules.get(module), name, None)
    if isinstance(kind, type) and issubclass(kind, default):
        return kind
    raise InputError(
        f"{where} is of the class {path}, which is not imported, since it may be anybody's code; "
        "if you trust it, import it first, and load the checkpoint with that class"
    )


def constructor_arguments(
    kind: type, saved: Mapping[str, Any], given: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the arguments with which a checkpoint's module is made again.

    Args:
        kind: Class of the module.
        saved: The checkpoint's hyperparameters.
        given: Arguments that the user gives, which take precedence.

    Raises:
        InputError: If a metric of the checkpoint is of a class that is not trusted.
    """
    parameters = inspect.signature(kind.__init__).parameters  # type: ignore[misc]
    arguments = {n: v for n, v in saved.items() if n in parameters and n not in COMPONENTS}
    arguments |= given
    metrics = arguments.get("metrics")
    if metrics and "metrics" not in given:
        check_class_paths(metrics, "the checkpoint")
        arguments["metrics"] = {name: _metric(each) for name, each in metrics.items()}
    return arguments


def _metric(settings: Any) -> Any:  # noqa: ANN401
    """Return the metric, or a metric's argument, that trusted settings describe."""
    if not isinstance(settings, Mapping):
        return settings
    if "class_path" not in settings:
        return {name: _metric(each) for name, each in settings.items()}
    module, _, name = str(settings["class_path"]).rpartition(".")
    kind = getattr(importlib.import_module(module), name, None)
    if not (isinstance(kind, type) and issubclass(kind, Metric)):
        raise InputError(f"the checkpoint's metric {settings['class_path']} is not a metric")
    arguments = {name: _metric(each) for name, each in settings.get("init_args", {}).items()}
    return kind(**arguments)
