"""LoRA files: how each tool names the weights; written exactly, read strictly.

A layout is a prefix, a spelling of the two factors, and a table of names. Tables are read in both
directions: the names that a denoiser's own modules have elsewhere are listed, and a key that is
not on the list is refused by name. So what is written can always be read back, and a file of
another model is never half loaded.

Where a table puts several modules into one, the tool computes them as one (queries, keys and
values): their factors are joined block-diagonally and taken apart again.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from lit_distill.families import denoisers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

METADATA_KEY = "lit_distill"
"""Where a file's metadata holds the facts of the student, as JSON."""


class Factors(NamedTuple):
    """The update of one module: ``weight + alpha / rank * up @ down``.

    Attributes:
        down: (rank, in) or, for a convolution, (rank, in, height, width).
        up: (out, rank) or (out, rank, 1, 1).
        alpha: Scale of the update, times the rank.
    """

    down: Tensor
    up: Tensor
    alpha: float

    @property
    def rank(self) -> int:
        """The number of rows of `down`."""
        return self.down.shape[0]

    @property
    def scale(self) -> float:
        """What the product of the factors is multiplied by."""
        return self.alpha / self.rank

    def folded(self) -> Factors:
        """Return the same update with a scale of 1, for layouts that store no alpha."""
        if self.scale == 1:
            return self
        return Factors(self.down, self.up * self.scale, float(self.rank))

    def delta(self) -> Tensor:
        """Return the update itself, (out, in) or (out, in, height, width), float32."""
        down, up = self.down.float(), self.up.float()
        product = up.flatten(1) @ down.flatten(1)
        return self.scale * product.view(up.shape[0], *down.shape[1:])


LoRA = dict[str, dict[str, Factors]]
"""Denoiser (``transformer``, ...) -> module, by diffusers' name -> factors."""

Table = Mapping[str, tuple[str, ...]]
"""Name elsewhere -> diffusers' names of the modules in it; ``{}`` stands for a block's number."""


class Layout(NamedTuple):
    """How one tool writes the LoRA of one family.

    Attributes:
        prefix: Comes before every name.
        table: Names; empty: diffusers' own.
        flat: Whether dots in names become underscores.
        factors: Names of the two factors, down and up.
        alpha: Whether an alpha is stored for every module; else it is folded into the weights.
        diffusers_reads: Whether diffusers has a reader of it.
    """

    prefix: str
    table: Table = MappingProxyType({})
    flat: bool = False
    factors: tuple[str, str] = ("lora_down", "lora_up")
    alpha: bool = True
    diffusers_reads: bool = True


def _attention(native: str, block: str, names: Iterable[str]) -> dict[str, tuple[str, ...]]:
    return {native: tuple(f"{block}.{name}" for name in names)}


_DOUBLE, _SINGLE = "transformer_blocks.{}", "single_transformer_blocks.{}"
_QKV, _ADDED = ("attn.to_q", "attn.to_k", "attn.to_v"), tuple(f"attn.add_{x}_proj" for x in "qkv")

# Black Forest Labs' names: ComfyUI, sd-scripts and musubi-tuner.
_BFL_ATTENTION: Table = {
    **_attention("double_blocks.{}.img_attn.qkv", _DOUBLE, _QKV),
    **_attention("double_blocks.{}.txt_attn.qkv", _DOUBLE, _ADDED),
    "double_blocks.{}.img_attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "double_blocks.{}.txt_attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
}
FLUX: Table = {
    **_BFL_ATTENTION,
    "double_blocks.{}.img_mlp.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "double_blocks.{}.img_mlp.2": (f"{_DOUBLE}.ff.net.2",),
    "double_blocks.{}.txt_mlp.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "double_blocks.{}.txt_mlp.2": (f"{_DOUBLE}.ff_context.net.2",),
    "double_blocks.{}.img_mod.lin": (f"{_DOUBLE}.norm1.linear",),
    "double_blocks.{}.txt_mod.lin": (f"{_DOUBLE}.norm1_context.linear",),
    **_attention("single_blocks.{}.linear1", _SINGLE, [*_QKV, "proj_mlp"]),
    "single_blocks.{}.linear2": (f"{_SINGLE}.proj_out",),
    "single_blocks.{}.modulation.lin": (f"{_SINGLE}.norm.linear",),
}
FLUX2: Table = {
    **_BFL_ATTENTION,
    "double_blocks.{}.img_mlp.0": (f"{_DOUBLE}.ff.linear_in",),
    "double_blocks.{}.img_mlp.2": (f"{_DOUBLE}.ff.linear_out",),
    "double_blocks.{}.txt_mlp.0": (f"{_DOUBLE}.ff_context.linear_in",),
    "double_blocks.{}.txt_mlp.2": (f"{_DOUBLE}.ff_context.linear_out",),
    "single_blocks.{}.linear1": (f"{_SINGLE}.attn.to_qkv_mlp_proj",),
    "single_blocks.{}.linear2": (f"{_SINGLE}.attn.to_out",),
}
# Alibaba's names: ComfyUI, musubi-tuner and DiffSynth-Studio.
WAN: Table = {
    **{f"blocks.{{}}.self_attn.{x}": (f"blocks.{{}}.attn1.to_{x}",) for x in "qkv"},
    **{f"blocks.{{}}.cross_attn.{x}": (f"blocks.{{}}.attn2.to_{x}",) for x in "qkv"},
    **{f"blocks.{{}}.cross_attn.{x}_img": (f"blocks.{{}}.attn2.add_{x}_proj",) for x in "kv"},
    "blocks.{}.self_attn.o": ("blocks.{}.attn1.to_out.0",),
    "blocks.{}.cross_attn.o": ("blocks.{}.attn2.to_out.0",),
    "blocks.{}.ffn.0": ("blocks.{}.ffn.net.0.proj",),
    "blocks.{}.ffn.2": ("blocks.{}.ffn.net.2",),
}
# Stability AI's names: sd-scripts.
SD3: Table = {
    **_attention("joint_blocks.{}.x_block.attn.qkv", _DOUBLE, _QKV),
    **_attention("joint_blocks.{}.context_block.attn.qkv", _DOUBLE, _ADDED),
    **_attention("joint_blocks.{}.x_block.attn2.qkv", _DOUBLE, [f"attn2.to_{x}" for x in "qkv"]),
    "joint_blocks.{}.x_block.attn.proj": (f"{_DOUBLE}.attn.to_out.0",),
    "joint_blocks.{}.x_block.attn2.proj": (f"{_DOUBLE}.attn2.to_out.0",),
    "joint_blocks.{}.context_block.attn.proj": (f"{_DOUBLE}.attn.to_add_out",),
    "joint_blocks.{}.x_block.mlp.fc1": (f"{_DOUBLE}.ff.net.0.proj",),
    "joint_blocks.{}.x_block.mlp.fc2": (f"{_DOUBLE}.ff.net.2",),
    "joint_blocks.{}.context_block.mlp.fc1": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "joint_blocks.{}.context_block.mlp.fc2": (f"{_DOUBLE}.ff_context.net.2",),
}
# DiffSynth-Studio's own names of FLUX.1.
DIFFSYNTH_FLUX: Table = {
    **_attention("blocks.{}.attn.a_to_qkv", _DOUBLE, _QKV),
    **_attention("blocks.{}.attn.b_to_qkv", _DOUBLE, _ADDED),
    "blocks.{}.attn.a_to_out": (f"{_DOUBLE}.attn.to_out.0",),
    "blocks.{}.attn.b_to_out": (f"{_DOUBLE}.attn.to_add_out",),
    "blocks.{}.ff_a.0": (f"{_DOUBLE}.ff.net.0.proj",),
    "blocks.{}.ff_a.2": (f"{_DOUBLE}.ff.net.2",),
    "blocks.{}.ff_b.0": (f"{_DOUBLE}.ff_context.net.0.proj",),
    "blocks.{}.ff_b.2": (f"{_DOUBLE}.ff_context.net.2",),
    "blocks.{}.norm1_a.linear": (f"{_DOUBLE}.norm1.linear",),
    "blocks.{}.norm1_b.linear": (f"{_DOUBLE}.norm1_context.linear",),
    **_attention("single_blocks.{}.to_qkv_mlp", _SINGLE, [*_QKV, "proj_mlp"]),
    "single_blocks.{}.proj_out": (f"{_SINGLE}.proj_out",),
    "single_blocks.{}.norm.linear": (f"{_SINGLE}.norm.linear",),
}

_KOHYA = Layout("lora_unet_", flat=True)
_COMFY = Layout("diffusion_model.")
_DIFFSYNTH = Layout("", factors=("lora_A.default", "lora_B.default"), alpha=False)
_PLAIN = Layout("", factors=("lora_A", "lora_B"), alpha=False)

LAYOUTS: dict[str, dict[str, Layout]] = {
    "comfyui": {
        "QwenImageTransformer2DModel": _COMFY,
        "ZImageTransformer2DModel": _COMFY,
        "FluxTransformer2DModel": _COMFY._replace(table=FLUX),
        # diffusers' reader of these keys takes neither lora_down nor alpha for FLUX.2.
        "Flux2Transformer2DModel": _PLAIN._replace(prefix="diffusion_model.", table=FLUX2),
        "WanTransformer3DModel": _COMFY._replace(table=WAN),
        # ComfyUI reads diffusers' names of SD3, and kohya's files of the UNets.
        "SD3Transformer2DModel": _PLAIN._replace(prefix="transformer."),
        "UNet2DConditionModel": _KOHYA,
    },
    "kohya": {
        "QwenImageTransformer2DModel": _KOHYA,
        "ZImageTransformer2DModel": _KOHYA,
        "FluxTransformer2DModel": _KOHYA._replace(table=FLUX),
        "Flux2Transformer2DModel": _KOHYA._replace(table=FLUX2),
        "WanTransformer3DModel": _KOHYA._replace(table=WAN),
        "SD3Transformer2DModel": _KOHYA._replace(table=SD3, diffusers_reads=False),
        "UNet2DConditionModel": _KOHYA,
    },
    "diffsynth": {
        "QwenImageTransformer2DModel": _DIFFSYNTH,
        "FluxTransformer2DModel": _DIFFSYNTH._replace(table=DIFFSYNTH_FLUX),
        "WanTransformer3DModel": _DIFFSYNTH._replace(table=WAN),
        "UNet2DConditionModel": _DIFFSYNTH,
    },
}


def layout_of(format: str, component: str, denoiser: nn.Module) -> Layout:
    """Return how `format` writes the LoRA of a denoiser.

    Raises:
        ValueError: If that is not known.
    """
    if format == "diffusers":
        return _PLAIN._replace(prefix=f"{component}.")
    if format == "peft":
        return _PLAIN._replace(prefix="base_model.model.")
    known = LAYOUTS[format]
    name = type(denoiser).__name__
    if name not in known:
        raise ValueError(
            f"format {format}: how it names the modules of {name} is not known here; use "
            f"diffusers, peft or merged (known: {', '.join(known)})"
        )
    layout = known[name]
    config: Any = getattr(denoiser, "config", {})
    if name == "FluxTransformer2DModel" and config["num_attention_heads"] != 24 and layout.table:
        # diffusers' reader of FLUX.1 splits single blocks at the published width, 3072.
        return layout._replace(diffusers_reads=False)
    # Stability AI's UNet has other names than diffusers'; trainers of SD 1.5 use diffusers'.
    if layout.flat and config.get("addition_embed_type") == "text_time":
        return layout._replace(table=sgm_names(denoiser))
    return layout


def adaptable(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the linears and convolutions that a LoRA can adapt, with their weights' shapes."""
    return {
        name.removesuffix(".base_layer"): tuple(module.weight.shape)
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }


def sgm_names(unet: Any) -> Table:  # noqa: ANN401
    """Return Stability AI's names of an SDXL UNet's modules: ``input_blocks.4.1...``."""
    layers = unet.config.layers_per_block
    places = {"mid_block.attentions.0": "middle_block.1"}
    places |= {f"mid_block.resnets.{i}": f"middle_block.{2 * i}" for i in range(2)}
    for block in range(len(unet.config.block_out_channels)):
        first = block * (layers + 1)
        for layer in range(layers):
            for inner, kind in enumerate(("resnets", "attentions")):
                place = f"input_blocks.{1 + first + layer}.{inner}"
                places[f"down_blocks.{block}.{kind}.{layer}"] = place
        for layer in range(layers + 1):
            for inner, kind in enumerate(("resnets", "attentions")):
                place = f"output_blocks.{first + layer}.{inner}"
                places[f"up_blocks.{block}.{kind}.{layer}"] = place
    inside = {"conv1": "in_layers.2", "conv2": "out_layers.3"}
    inside |= {"time_emb_proj": "emb_layers.1", "conv_shortcut": "skip_connection"}
    names = {}
    for module in adaptable(unet):
        place = ".".join(module.split(".")[: 3 if module.startswith("mid_block") else 4])
        if place in places:
            rest = module.removeprefix(f"{place}.")
            names[f"{places[place]}.{inside.get(rest, rest)}"] = (module,)
    return names


def names_of(table: Table, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return `table` for the denoiser at hand: names elsewhere -> its own modules."""
    modules = adaptable(denoiser)
    if not table:
        return {module: (module,) for module in modules}
    numbers = {number for module in modules for number in re.findall(r"\.(\d+)\.", module)}
    filled = {
        name.format(number): tuple(part.format(number) for part in parts)
        for name, parts in table.items()
        for number in (numbers if "{}" in name else {""})
    }
    return {name: parts for name, parts in filled.items() if set(parts) <= set(modules)}


# Writing


def to_state(weights: dict[str, Factors], layout: Layout, denoiser: nn.Module) -> dict[str, Tensor]:
    """Return a LoRA as the tensors of a file.

    Raises:
        ValueError: If a module has no name in this layout.
    """
    state: dict[str, Tensor] = {}
    rest = dict(weights)
    sizes = adaptable(denoiser)
    for name, parts in names_of(layout.table, denoiser).items():
        if not any(part in rest for part in parts):
            continue
        found = [rest.pop(part, None) for part in parts]
        factors = found[0] if len(parts) == 1 else _join(found, [sizes[part] for part in parts])
        assert factors is not None
        key = layout.prefix + (name.replace(".", "_") if layout.flat else name)
        factors = factors if layout.alpha else factors.folded()
        down, up = (f"{key}.{factor}.weight" for factor in layout.factors)
        state |= {down: factors.down.contiguous(), up: factors.up.contiguous()}
        if layout.alpha:
            state[f"{key}.alpha"] = torch.tensor(factors.alpha, dtype=factors.down.dtype)
    if rest:
        raise ValueError(
            f"{len(rest)} adapted modules of {type(denoiser).__name__} have no name in this "
            f"format, for example {', '.join(list(rest)[:3])}; use format diffusers, peft or merged"
        )
    return state


def _join(found: list[Factors | None], sizes: list[tuple[int, ...]]) -> Factors:
    """Return one update for several modules that lie below one another in one weight."""
    given = next(factors for factors in found if factors is not None)
    parts = [
        factors
        or Factors(
            torch.zeros_like(given.down), given.up.new_zeros(size[0], given.rank), given.alpha
        )
        for factors, size in zip(found, sizes, strict=True)
    ]
    if len({factors.scale for factors in parts}) > 1:
        parts = [factors.folded() for factors in parts]
    scale = parts[0].scale
    if all(torch.equal(factors.down, given.down) for factors in parts):
        # As trained by a tool that computes them as one.
        return Factors(given.down, torch.cat([factors.up for factors in parts]), scale * given.rank)
    down = torch.cat([factors.down for factors in parts])
    return Factors(down, _block_diagonal([factors.up for factors in parts]), scale * len(down))


def _split(joined: Factors, rows: list[int]) -> list[Factors]:
    """Undo `_join`; factors that are not block-diagonal share `down`."""
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
_LORA_METADATA = "lora_adapter_metadata"  # where diffusers keeps the settings of a LoRA


def read_lora(path: str | Path, pipe: DiffusionPipeline) -> LoRA:
    """Read a LoRA in the layout of diffusers, peft, ComfyUI, kohya or DiffSynth-Studio.

    Args:
        path: A .safetensors file, or a folder with one (one a denoiser, where there are two).
        pipe: The pipeline that it is for.

    Returns:
        Factors of every adapted module of every denoiser, in the file's data type.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the file is truncated, has a key that stands for no module of the pipeline,
            factors that don't fit together or the module, or an alpha for some modules only.
    """
    found = {}
    for component, denoiser in denoisers(pipe).items():
        file = lora_file(path, component, pipe)
        if file is not None:
            found[component] = _read_file(file, component, denoiser)
    return found


def lora_file(path: str | Path, component: str, pipe: DiffusionPipeline) -> Path | None:
    """Return the file of one denoiser's LoRA; None if there is none for a second denoiser.

    Raises:
        FileNotFoundError: If there is none for the first denoiser.
        ValueError: If there are several to choose from.
    """
    path = Path(path)
    first = component == next(iter(denoisers(pipe)))
    if not path.is_dir():
        if first and not path.is_file():
            raise FileNotFoundError(f"LoRA {path} does not exist")
        return path if first else None
    others = [name for name in denoisers(pipe) if name != component]
    own = [*path.glob(f"*_{component}.safetensors"), *path.glob(f"{component}/*.safetensors")]
    unnamed = [
        file
        for file in path.glob("*.safetensors")
        if not any(file.stem.endswith(f"_{name}") for name in [component, *others])
    ]
    files = own + (unnamed if first else [])
    if len(files) > 1:
        raise ValueError(f"{path} holds several files, name one: {', '.join(map(str, files))}")
    if first and not files:
        raise FileNotFoundError(f"{path} holds no LoRA (a .safetensors file)")
    return files[0] if files else None


def load_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors and the metadata of a safetensors file.

    Raises:
        ValueError: If it is truncated or of another kind.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}, file.metadata() or {}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is truncated or not a safetensors file: {error}") from error


def _read_file(path: Path, component: str, denoiser: nn.Module) -> dict[str, Factors]:
    state, metadata = load_tensors(path)
    names = _known_names(component, denoiser)
    groups: dict[str, dict[str, Tensor]] = {}
    strange = []
    for key, tensor in state.items():
        match = _KEY.fullmatch(key)
        if match is None or match["name"] not in names:
            strange.append(key)
        else:
            factor = {"lora_A": "down", "lora_B": "up"}.get(match["factor"] or "alpha")
            factor = factor or (match["factor"] or "alpha").removeprefix("lora_")
            groups.setdefault(match["name"], {})[factor] = tensor
    if strange or not groups:
        near = difflib.get_close_matches(strange[0] if strange else "", names, n=1, cutoff=0.5)
        hint = f" (a known name like it is {near[0]!r})" if near else ""
        raise ValueError(
            f"{path}: {len(strange)} of {len(state)} keys stand for no module of "
            f"{type(denoiser).__name__}: {', '.join(strange[:3])}{hint}. Is it a LoRA, of this "
            "model, of the denoiser alone (text encoders are not adapted here)?"
        )
    settings = _settings(path, metadata, component)
    needs_alpha = any(".lora_down." in key for key in state) or any(
        "alpha" in g for g in groups.values()
    )
    sizes = adaptable(denoiser)
    weights: dict[str, Factors] = {}
    for name, group in groups.items():
        factors = _factors(path, name, group, needs_alpha)
        parts = names[name]
        factors = factors._replace(alpha=_alpha(settings, parts[0], factors))
        _check_shape(path, name, factors, [sizes[part] for part in parts])
        split = _split(factors, [sizes[part][0] for part in parts]) if len(parts) > 1 else [factors]
        weights |= dict(zip(parts, split, strict=True))
    return weights


def _known_names(component: str, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return every name, with its prefix, that some tool gives to modules of the denoiser."""
    kind = type(denoiser).__name__
    known = [layouts[kind] for layouts in LAYOUTS.values() if kind in layouts]
    tables = [layout.table for layout in known]
    if isinstance(getattr(denoiser, "config", {}).get("layers_per_block"), int):
        tables.append(sgm_names(denoiser))
    names: dict[str, tuple[str, ...]] = {}
    for table in [{}, *tables]:
        names |= names_of(table, denoiser)
    prefixes = ("", f"{component}.", "transformer.", "diffusion_model.", "base_model.model.")
    dotted = {prefix + name: parts for prefix in prefixes for name, parts in names.items()}
    flat = {"lora_unet_" + name.replace(".", "_"): parts for name, parts in names.items()}
    return dotted | flat


def _factors(path: Path, name: str, group: dict[str, Tensor], needs_alpha: bool) -> Factors:
    if missing := {"down", "up"} - set(group):
        raise ValueError(f"{path}: {name} has no factor {missing.pop()!r} (lora_A/down, lora_B/up)")
    if needs_alpha and "alpha" not in group:
        raise ValueError(
            f"{path}: {name} has no alpha; this layout stores one for every module, and without it "
            "the strength of the update is not known"
        )
    rank = group["down"].shape[0]
    return Factors(group["down"], group["up"], float(group.get("alpha", torch.tensor(rank))))


def _check_shape(path: Path, name: str, factors: Factors, sizes: list[tuple[int, ...]]) -> None:
    down, up = factors.down.shape, factors.up.shape
    if len(up) < 2 or up[1] != down[0]:
        raise ValueError(f"{path}: {name}: down {tuple(down)} and up {tuple(up)} differ in rank")
    rows = sum(size[0] for size in sizes)
    if up[0] != rows or tuple(down[1:]) != sizes[0][1:]:
        raise ValueError(
            f"{path}: {name}: down {tuple(down)} and up {tuple(up)} do not fit a weight of "
            f"{(rows, *sizes[0][1:])}; is it a LoRA of another size of this model?"
        )


def _settings(path: Path, metadata: dict[str, str], component: str) -> dict[str, Any]:
    """Return what peft's file beside the weights, or diffusers' metadata, say of the LoRA."""
    beside = path.parent / "adapter_config.json"
    if path.name == "adapter_model.safetensors":
        if not beside.is_file():
            raise ValueError(f"{path} needs peft's adapter_config.json beside it: alpha is there")
        settings: dict[str, Any] = json.loads(beside.read_text(encoding="utf-8"))
        if not isinstance(settings.get("lora_alpha"), int | float):
            raise ValueError(f"{beside} has no lora_alpha")
        return settings
    stored = json.loads(metadata.get(_LORA_METADATA, "{}"))
    return {
        key.removeprefix(f"{component}."): value
        for key, value in stored.items()
        if key.startswith(f"{component}.")
    }


def _alpha(settings: dict[str, Any], module: str, factors: Factors) -> float:
    if "lora_alpha" not in settings:
        return factors.alpha
    patterns: dict[str, float] = settings.get("alpha_pattern") or {}
    alpha = next(
        (value for key, value in patterns.items() if re.fullmatch(rf"(.*\.)?({key})", module)),
        settings["lora_alpha"],
    )
    # Rank-stabilised LoRA divides by the root of the rank.
    return float(alpha) * (math.sqrt(factors.rank) if settings.get("use_rslora") else 1.0)
