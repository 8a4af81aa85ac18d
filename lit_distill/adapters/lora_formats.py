"""The LoRA layouts of other tools: a prefix, the names of the factors, and a table of modules.

To add a format, add its layouts to `LAYOUTS`. Each table is used in both directions, for writing
and for reading, so that one is the exact inverse of the other.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from torch import nn

from lit_distill.errors import InputError

Table = Mapping[str, tuple[str, ...]]
"""The tool's name of a module -> diffusers' names of its parts; ``{}`` is a block's number."""


class Layout(NamedTuple):
    """How a tool names the LoRA weights of a family.

    Attributes:
        prefix: Prefix of every name.
        table: Names of the modules; empty: diffusers' names.
        flat: Whether dots in names are replaced by underscores.
        factors: Names of the two factors, down and up.
        alpha: Whether an alpha is stored for every module; otherwise it is folded into the weights.
        diffusers_reads: Whether diffusers can read the layout.
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


def file_name(stem: str, component: str, components: Iterable[str]) -> str:
    """Return the file name of a denoiser's LoRA; only that of the first denoiser has no suffix."""
    first = component == next(iter(components))
    return f"{stem if first else f'{stem}_{component}'}.safetensors"


def layout_of(format: str, component: str, denoiser: nn.Module) -> Layout:
    """Return the layout of `format` for a denoiser.

    Raises:
        InputError: If there is none for this model.
    """
    if format == "diffusers":
        return _PLAIN._replace(prefix=f"{component}.")
    if format == "peft":
        return _PLAIN._replace(prefix="base_model.model.")
    known = LAYOUTS[format]
    name = type(denoiser).__name__
    if name not in known:
        raise InputError(
            f"format {format}: its names for the modules of {name} are not known; use diffusers, "
            f"peft or merged (known: {', '.join(known)})"
        )
    layout = known[name]
    config: Any = getattr(denoiser, "config", {})
    if name == "FluxTransformer2DModel" and config["num_attention_heads"] != 24 and layout.table:
        # diffusers' reader of FLUX.1 assumes the published width of single blocks, 3072.
        return layout._replace(diffusers_reads=False)
    # Trainers of SDXL use Stability AI's names of the UNet, those of SD 1.5 diffusers' names.
    if layout.flat and config.get("addition_embed_type") == "text_time":
        return layout._replace(table=sgm_names(denoiser))
    return layout


def adaptable_modules(denoiser: nn.Module) -> dict[str, tuple[int, ...]]:
    """Return the linears and convolutions that a LoRA can adapt: name -> shape of the weight."""
    return {
        name.removesuffix(".base_layer"): tuple(module.weight.shape)
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and ".lora_" not in name
    }


def sgm_names(unet: Any) -> Table:  # noqa: ANN401
    """Return Stability AI's names of the modules of an SDXL UNet: ``input_blocks.4.1...``."""
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
    for module in adaptable_modules(unet):
        place = ".".join(module.split(".")[: 3 if module.startswith("mid_block") else 4])
        if place in places:
            rest = module.removeprefix(f"{place}.")
            names[f"{places[place]}.{inside.get(rest, rest)}"] = (module,)
    return names


def layout_names(table: Table, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return `table` with block numbers filled in: the tool's names -> modules of the denoiser."""
    modules = adaptable_modules(denoiser)
    if not table:
        return {module: (module,) for module in modules}
    numbers = {number for module in modules for number in re.findall(r"\.(\d+)\.", module)}
    filled = {
        name.format(number): tuple(part.format(number) for part in parts)
        for name, parts in table.items()
        for number in (numbers if "{}" in name else {""})
    }
    return {name: parts for name, parts in filled.items() if set(parts) <= set(modules)}


def known_names(component: str, denoiser: nn.Module) -> dict[str, tuple[str, ...]]:
    """Return all names, with prefix, that any tool uses for modules of the denoiser."""
    model = type(denoiser).__name__
    tables = [layouts[model].table for layouts in LAYOUTS.values() if model in layouts]
    if isinstance(getattr(denoiser, "config", {}).get("layers_per_block"), int):
        tables.append(sgm_names(denoiser))
    names: dict[str, tuple[str, ...]] = {}
    for table in [{}, *tables]:
        names |= layout_names(table, denoiser)
    prefixes = ("", f"{component}.", "transformer.", "diffusion_model.", "base_model.model.")
    dotted = {prefix + name: parts for prefix in prefixes for name, parts in names.items()}
    flat = {"lora_unet_" + name.replace(".", "_"): parts for name, parts in names.items()}
    return dotted | flat
