"""The settings of the model that a checkpoint records, for commands that sample with it."""

from __future__ import annotations

from typing import Any

from lit_distill.errors import InputError
from lit_distill.training.checkpoint_io import read_checkpoint
from lit_distill.training.saved_classes import (
    COMPONENTS,
    TRUSTED,
    check_class_paths,
    class_paths,
)

HARDWARE = ("attention_backend", "quantization")
"""Settings that say how this machine computes, not what the student is."""


def checkpoint_model(ckpt_path: str, config: Any) -> dict[str, Any]:  # noqa: ANN401
    """Return a checkpoint's settings of the model, as a configuration's section ``model``.

    Args:
        ckpt_path: The checkpoint.
        config: Configuration of the command, as the user has given it.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If it is no checkpoint of this package, or names a class that is neither of this
            package nor named by the user.
    """
    saved = read_checkpoint(ckpt_path, mmap=True)["hyper_parameters"]
    where, model = f"checkpoint {ckpt_path}", config.model
    skipped = {"_instantiator", "_class_path", *COMPONENTS, *HARDWARE}
    settings = {name: value for name, value in saved.items() if name not in skipped}
    check_class_paths(settings, where, set(class_paths(model.as_dict())))
    class_path = str(saved.get("_class_path", model.class_path))
    if class_path.partition(".")[0] in TRUSTED:
        class_path = model.class_path
    if class_path != model.class_path:
        raise InputError(
            f"{where} is of the class {class_path}, which is not imported, since it may be "
            f"anybody's code; if you trust it, give --model {class_path}"
        )
    return {"class_path": class_path, "dict_kwargs": settings}
