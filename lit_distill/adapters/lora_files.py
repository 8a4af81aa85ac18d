"""Reads and writes LoRA files in the layouts of `lora_formats`.

Reading is strict: keys that belong to no module are an error, so that a LoRA of another model is
never loaded in part. Where a tool fuses several modules into one (queries, keys and values), their
factors are joined block-diagonally when written and split again when read.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lit_distill.adapters.lora import Factors, LoRA
from lit_distill.adapters.lora_formats import (
    Layout,
    adaptable_modules,
    file_name,
    known_names,
    layout_names,
)
from lit_distill.adapters.lora_settings import read_settings
from lit_distill.data.text import decode, parse_json, shorten
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


METADATA_KEY = "lit_distill"
"""Key of a file's metadata with the settings of the student, as JSON."""


# Writing


def to_state(weights: dict[str, Factors], layout: Layout, denoiser: nn.Module) -> dict[str, Tensor]:
    """Return the tensors of a LoRA file in a layout.

    Raises:
        InputError: If a module has no name in this layout.
    """
    state: dict[str, Tensor] = {}
    remaining = dict(weights)
    sizes = adaptable_modules(denoiser)
    for name, parts in layout_names(layout.table, denoiser).items():
        if not any(part in remaining for part in parts):
            continue
        group = [remaining.pop(part, None) for part in parts]
        factors = group[0] if len(parts) == 1 else _join(group, [sizes[part] for part in parts])
        assert factors is not None
        key = layout.prefix + (name.replace(".", "_") if layout.flat else name)
        factors = factors if layout.alpha else factors.folded()
        down, up = (f"{key}.{factor}.weight" for factor in layout.factors)
        state |= {down: factors.down.contiguous(), up: factors.up.contiguous()}
        if layout.alpha:
            state[f"{key}.alpha"] = torch.tensor(factors.alpha)
    if remaining:
        raise InputError(
            f"{len(remaining)} adapted modules of {type(denoiser).__name__} have no name in this "
            f"format, for example {', '.join(list(remaining)[:3])}; use format diffusers, peft or "
            "merged"
        )
    return state


def _join(group: list[Factors | None], sizes: list[tuple[int, ...]]) -> Factors:
    """Join the updates of modules that are concatenated along the output dimension of one weight.

    Modules without an update get one of zeros.
    """
    first = next(factors for factors in group if factors is not None)
    parts = [
        factors
        or Factors(
            torch.zeros_like(first.down), first.up.new_zeros(size[0], first.rank), first.alpha
        )
        for factors, size in zip(group, sizes, strict=True)
    ]
    if len({factors.scale for factors in parts}) > 1:
        parts = [factors.folded() for factors in parts]
    scale = parts[0].scale
    if all(torch.equal(factors.down, first.down) for factors in parts):
        # A LoRA that was trained on the fused module shares `down`.
        return Factors(first.down, torch.cat([factors.up for factors in parts]), scale * first.rank)
    down = torch.cat([factors.down for factors in parts])
    return Factors(down, _block_diagonal([factors.up for factors in parts]), scale * len(down))


def _split(joined: Factors, rows: list[int]) -> list[Factors]:
    """Undo `_join`. Factors that are not block-diagonal get the same `down`."""
    ups = torch.split(joined.up, rows)
    count = len(rows)
    if joined.rank % count == 0:
        rank = joined.rank // count
        blocks = [up[:, i * rank : (i + 1) * rank] for i, up in enumerate(ups)]
        if torch.equal(_block_diagonal(blocks), joined.up):
            downs = torch.split(joined.down, rank)
            alpha = joined.scale * rank
            return [Factors(d, b.contiguous(), alpha) for d, b in zip(downs, blocks, strict=True)]
    return [Factors(joined.down, up.contiguous(), joined.alpha) for up in ups]


def _block_diagonal(blocks: list[Tensor]) -> Tensor:
    matrix: Tensor = torch.block_diag(*blocks)  # type: ignore[no-untyped-call]
    return matrix


# Reading

_KEY = re.compile(
    r"(?P<name>.+?)\.(?:(?P<factor>lora_(?:A|B|down|up))(?:\.default)?\.weight|alpha)"
)

_FACTORS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", None: "alpha"}

_OTHER_KINDS = {
    "lora_magnitude_vector": "DoRA",
    "dora_scale": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    "lora_mid": "LoCon with a third factor",
    "lora_embedding_": "LoRA of an embedding",
    ".bias": "a trained bias",
    "oft_": "OFT",
    "ia3_": "IA3",
    "vera_lambda": "VeRA",
    ".diff": "differences of whole weights",
}
"""Parts of the keys of other kinds of adapters."""

_MAX_HEADER = 100_000_000  # of the safetensors format, in bytes


def read_lora(path: str | Path, pipe: DiffusionPipeline, stem: str | None = None) -> LoRA:
    """Read a LoRA in the layout of diffusers, peft, ComfyUI, kohya or DiffSynth-Studio.

    Args:
        path: A .safetensors file, or a folder with one, or with one for each denoiser.
        pipe: The pipeline to which the LoRA belongs.
        stem: Name of the file without .safetensors, for a folder with several LoRAs.

    Returns:
        The factors of all adapted modules, in the file's data type.

    Raises:
        FileNotFoundError: If there is no such file.
        InputError: If the file is truncated, a key belongs to no module of the pipeline, factors do
            not match each other or the module or are not finite, only some modules have an alpha,
            or the adapter is more than plain LoRA.
    """
    lora = {}
    for component, denoiser in denoisers(pipe).items():
        file = lora_file(path, component, pipe, stem)
        if file is not None:
            lora[component] = _read_file(file, component, denoiser)
    return lora


def lora_file(
    path: str | Path, component: str, pipe: DiffusionPipeline, stem: str | None = None
) -> Path | None:
    """Return the file with the LoRA of a denoiser; None if a second denoiser has none.

    Raises:
        FileNotFoundError: If there is none for the first denoiser.
        InputError: If there are several candidates.
    """
    path = Path(path)
    first = component == next(iter(denoisers(pipe)))
    if not path.is_dir():
        if first and not path.is_file():
            raise FileNotFoundError(f"LoRA {path} does not exist")
        return path if first else None
    if stem is not None:
        file = path / file_name(stem, component, denoisers(pipe))
        if first and not file.is_file():
            raise FileNotFoundError(f"LoRA {file} does not exist")
        return file if file.is_file() else None
    others = [name for name in denoisers(pipe) if name != component]
    named = [*path.glob(f"*_{component}.safetensors"), *path.glob(f"{component}/*.safetensors")]
    unnamed = [
        file
        for file in path.glob("*.safetensors")
        if not any(file.stem.endswith(f"_{name}") for name in [component, *others])
    ]
    files = named + (unnamed if first else [])
    if len(files) > 1:
        raise InputError(f"{path} holds several files, name one: {', '.join(map(str, files))}")
    if first and not files:
        raise FileNotFoundError(f"{path} holds no LoRA (a .safetensors file)")
    return files[0] if files else None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        InputError: If it is truncated or not a safetensors file.
    """
    from safetensors import safe_open

    if not path.is_file():
        raise InputError(f"{path} is not a regular file")
    try:
        with path.open("rb") as stream:  # safetensors would take the last of two equal names
            length = int.from_bytes(stream.read(8), "little")
            parse_json(decode(stream.read(min(length, _MAX_HEADER))))
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except Exception as error:  # safetensors and torch raise several kinds
        raise InputError(f"{path} is truncated or not a safetensors file: {error}") from error


def _read_file(path: Path, component: str, denoiser: nn.Module) -> dict[str, Factors]:
    state, metadata = load_tensors(path)
    names = known_names(component, denoiser)
    groups = _group(path, state, names, denoiser)
    settings = read_settings(path, metadata, component)
    needs_alpha = any(".lora_down." in key for key in state) or any(
        "alpha" in g for g in groups.values()
    )
    sizes = adaptable_modules(denoiser)
    weights: dict[str, Factors] = {}
    for name, group in groups.items():
        parts = names[name]
        factors = _factors(path, name, group, needs_alpha)
        _check_shape(path, name, factors, [sizes[part] for part in parts])
        alpha = settings.alpha_of(parts[0], factors.rank)
        if alpha is not None:
            if "alpha" in group and not math.isclose(alpha, factors.alpha, rel_tol=1e-6):
                raise InputError(
                    f"{path}: {name} has alpha {factors.alpha:g}, but its settings say {alpha:g}"
                )
            factors = factors._replace(alpha=alpha)
        split = _split(factors, [sizes[part][0] for part in parts]) if len(parts) > 1 else [factors]
        if double := set(parts) & set(weights):
            raise InputError(
                f"{path} adapts {double.pop()} twice, the second time as {name}; which one is "
                "meant is not known"
            )
        weights |= dict(zip(parts, split, strict=True))
    return weights


def _group(
    path: Path, state: dict[str, Tensor], names: Collection[str], denoiser: nn.Module
) -> dict[str, dict[str, Tensor]]:
    """Return the tensors of a file by module, each with the keys down, up and perhaps alpha."""
    groups: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None or match["name"] not in names:
            unknown.append(key)
            continue
        factor = _FACTORS[match["factor"]]
        group = groups.setdefault(match["name"], {})
        if factor in group:
            raise InputError(f"{path}: {match['name']} has two factors {factor!r}")
        group[factor] = tensor
    for key in unknown:
        for mark, kind in _OTHER_KINDS.items():
            if mark in key:
                raise InputError(
                    f"{path}: this kind of adapter is not supported: {kind} (as in "
                    f"{shorten(key, 120)}); only plain LoRA is"
                )
    if unknown or not groups:
        first = unknown[0][:200] if unknown else ""
        close = difflib.get_close_matches(first, names, n=1, cutoff=0.5)
        hint = f" (a similar known name is {close[0]!r})" if close else ""
        examples = ", ".join(shorten(key, 120).strip("'") for key in unknown[:3])
        raise InputError(
            f"{path}: {len(unknown)} of {len(state)} keys belong to no module of "
            f"{type(denoiser).__name__}: {examples}{hint}. Is it a LoRA of this "
            "model, for the denoiser only (LoRAs of text encoders are not supported)?"
        )
    return groups


def _factors(path: Path, name: str, group: dict[str, Tensor], needs_alpha: bool) -> Factors:
    if missing := {"down", "up"} - set(group):
        raise InputError(f"{path}: {name} has no factor {missing.pop()!r} (lora_A/down, lora_B/up)")
    if needs_alpha and "alpha" not in group:
        raise InputError(
            f"{path}: {name} has no alpha; this layout stores one for every module, and without it "
            "the strength of the update is unknown"
        )
    for factor, tensor in group.items():
        if not tensor.is_floating_point() and not (factor == "alpha" and not tensor.is_complex()):
            raise InputError(
                f"{path}: {name}: {factor} holds {tensor.dtype}, not numbers of floats"
            )
        if not torch.isfinite(tensor.float()).all():
            raise InputError(f"{path}: {name}: {factor} holds NaN or infinite values")
    down, up, alpha = group["down"], group["up"], group.get("alpha")
    if down.ndim < 2 or 0 in down.shape:
        raise InputError(f"{path}: {name}: down {tuple(down.shape)} is no factor")
    if alpha is not None and alpha.numel() != 1:
        raise InputError(f"{path}: {name}: alpha {tuple(alpha.shape)} must be a single number")
    return Factors(down, up, float(len(down) if alpha is None else alpha))


def _check_shape(path: Path, name: str, factors: Factors, sizes: list[tuple[int, ...]]) -> None:
    down, up = tuple(factors.down.shape), tuple(factors.up.shape)
    if len(up) < 2 or up[1] != down[0]:
        raise InputError(f"{path}: {name}: down {down} and up {up} differ in rank")
    rows, inputs = sum(size[0] for size in sizes), sizes[0][1:]
    if up[0] != rows or down[1:] != inputs or up[2:] != (1,) * (len(inputs) - 1):
        raise InputError(
            f"{path}: {name}: down {down} and up {up} do not match a weight of "
            f"{(rows, *inputs)}; is it a LoRA of another size of this model?"
        )
