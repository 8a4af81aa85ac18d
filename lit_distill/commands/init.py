"""`lit-distill init`: a commented configuration to start from."""

from __future__ import annotations

import math
import re
import textwrap
from pathlib import Path
from typing import Any

import yaml

from lit_distill.commands.next_step import print_next
from lit_distill.data.whole_files import write_file
from lit_distill.errors import InputError, with_suggestions

PACKAGE = Path(__file__).parent.parent
CONFIGS = next(
    folder for folder in (PACKAGE / "configs", PACKAGE.parent / "configs") if folder.is_dir()
)
"""Folder of the configurations: in an installed package inside it, in a clone beside it."""

NAME = re.compile(r"(.*?)_(?:(\d+)x)?(\d+|(?<=tiny_)lora|(?<=words_)lora)$")
"""Their names: model, number of GPUs, memory of each in GB. tiny_lora, words_lora need no GPU."""


def init(
    *,
    model: str = "qwen-image",
    gpu_memory: int = 48,
    devices: int = 1,
    metadata_path: str | None = None,
    columns: dict[str, str] | None = None,
    constants: dict[str, Any] | None = None,
    out: str | None = None,
) -> None:
    """Write a commented configuration to start from.

    It is one of those in configs/, whose memory lit-distill plan has computed.

    Args:
        model: flux, qwen-image, sdxl, wan, z-image, or tiny or words for an embedded pipeline.
        gpu_memory: Memory of a GPU in GB.
        devices: Number of GPUs: 1 trains a LoRA, 8 all weights.
        metadata_path: Table of the training pairs, to be written into it.
        columns: The table's names of its columns, such as {prompt: text}, to be written into it.
        constants: Values of columns that the table lacks, such as {cfg_scale: 1}, likewise.
        out: YAML file to write; default: named by model and GPU, in this folder.
    """
    config = choose(model, gpu_memory, devices)
    path = Path(config.name if out is None else out)
    if path.exists():
        raise InputError(f"{path} exists, and init overwrites nothing: choose another file (--out)")
    text = config.read_text(encoding="utf-8").replace(f"configs/{config.name}", str(path))
    data = {"metadata_path": metadata_path, "columns": columns, "constants": constants}
    lines = [f"  {key}: {_yaml(value)}" for key, value in data.items() if value is not None]
    old = re.search(r"(?m)^  metadata_path: .*$", text)
    assert old is not None  # tests/commands/test_init.py
    kept = [old[0]] if metadata_path is None else []
    text = text.replace(old[0], "\n".join([*kept, *lines]))
    write_file(str(path), text.encode())
    about = text.removeprefix("# ").replace("\n# ", " ").partition(". ")[0]
    print(f"configuration: {path}\n{textwrap.fill(about, 79)}")
    print_next("plan", "--config", path)


def choose(model: str, gpu_memory: int, devices: int) -> Path:
    """Return the configuration for the largest GPU that is not larger than a given one.

    Args:
        model: Name of the model, with ``-`` or ``_``.
        gpu_memory: Memory of a GPU in GB.
        devices: Number of GPUs.

    Raises:
        InputError: If there is none.
    """
    named = [(NAME.fullmatch(path.stem), path) for path in sorted(CONFIGS.glob("*.yaml"))]
    every = [(match, path) for match, path in named if match]
    models = sorted({match[1].replace("_", "-") for match, _ in every})
    wanted = model.lower().replace("_", "-")
    if wanted not in models:
        raise InputError(
            f"no configuration for {with_suggestions(model, models)}; there are "
            f"{', '.join(models)}; for another pipeline, start from the one nearest to it and set "
            "model.pretrained_model_name_or_path"
        )
    sizes: dict[tuple[int, int], Path] = {}
    for match, path in every:
        if match[1].replace("_", "-") == wanted:
            memory = 0 if match[3] == "lora" else int(match[3])
            sizes[int(match[2] or 1), memory] = path
    fitting = [size for size in sizes if size[0] == devices and size[1] <= gpu_memory]
    if not fitting:
        known = ", ".join(f"{count} x {memory}" for count, memory in sorted(sizes))
        raise InputError(
            f"no configuration of {wanted} for {devices} x {gpu_memory} GB; there are {known} GB; "
            "lit-distill plan computes what another one needs"
        )
    return sizes[max(fitting)]


def _yaml(value: Any) -> str:  # noqa: ANN401
    """Return a value as YAML on one line."""
    text = yaml.safe_dump(value, default_flow_style=True, width=math.inf, allow_unicode=True)
    return text.removesuffix("...\n").strip()
