"""Moves LoRA weights: out of a pipeline's adapters, into them, or into the base weights."""

from __future__ import annotations

import re
from statistics import mode
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_distill.adapters.lora import Factors, LoRA
from lit_distill.adapters.lora_files import read_lora
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.loading import load_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


FUSED_AT_ONCE = 2**20
"""Values of a weight that are summed at once: some float32 copies of them are held meanwhile."""


def load_base_pipeline(
    hyper: dict[str, Any],
    *,
    torch_dtype: Any = None,  # noqa: ANN401
    **options: Any,  # noqa: ANN401
) -> DiffusionPipeline:
    """Load the pretrained pipeline and fuse the teacher's LoRA into it, if there is one.

    Args:
        hyper: Hyperparameters of `DirectDistill`.
        torch_dtype: Data type of the weights; default: the one in `hyper`.
        **options: Further arguments of `load_pipeline`.
    """
    pipe = load_pipeline(
        hyper["pretrained_model_name_or_path"],
        revision=hyper.get("revision"),
        torch_dtype=torch_dtype or hyper["torch_dtype"],
        **options,
    )
    if hyper.get("teacher_lora"):
        fuse_lora(pipe, read_lora(hyper["teacher_lora"], pipe))
    return pipe


@torch.no_grad()
def fuse_lora(pipe: DiffusionPipeline, lora: LoRA) -> None:
    """Add a LoRA to the denoisers' weights permanently; the sum is computed in float32."""
    for component, weights in lora.items():
        denoiser = denoisers(pipe)[component]
        for name, factors in weights.items():
            weight = denoiser.get_submodule(name).weight
            rows = max(1, FUSED_AT_ONCE // weight[0].numel())
            for part, up in zip(
                torch.split(weight, rows), torch.split(factors.up, rows), strict=True
            ):
                delta = factors._replace(up=up).delta().to(weight.device)
                part.copy_(part.float().add_(delta))


def extract_lora(pipe: DiffusionPipeline, adapter: str | None = None) -> LoRA:
    """Return the LoRA of the pipeline's adapters, copied, float32, on the CPU.

    Args:
        pipe: The pipeline.
        adapter: Name of the adapter; None: the active one.

    Raises:
        InputError: If an adapter has more than two factors (DoRA, a bias): only peft's own layout
            can store those.
    """
    from peft.tuners.lora import LoraLayer

    lora: LoRA = {}
    for component, denoiser in denoisers(pipe).items():
        layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            adapter_name = adapter or layer.active_adapters[0]
            if adapter_name not in layer.lora_A:
                continue
            down, up = layer.lora_A[adapter_name], layer.lora_B[adapter_name]
            if layer.use_dora.get(adapter_name) or up.bias is not None:
                raise InputError(
                    f"{component}.{name}: its adapter is not plain LoRA (use_dora, lora_bias), "
                    "and no export format supports that; train without these options"
                )
            down, up = (factor.weight.detach().float().cpu().clone() for factor in (down, up))
            alpha = layer.scaling[adapter_name] * len(down)
            lora.setdefault(component, {})[name] = Factors(down, up, alpha)
    return lora


@torch.no_grad()
def load_into_adapters(pipe: DiffusionPipeline, lora: LoRA, adapter: str | None = None) -> None:
    """Copy a LoRA into existing adapters, made with the fields of `lora_config_fields`.

    Args:
        pipe: The pipeline.
        lora: The LoRA.
        adapter: Name of the adapter; None: all adapters.
    """
    for component, weights in lora.items():
        for name, factors in weights.items():
            layer: Any = denoisers(pipe)[component].get_submodule(name)
            for adapter_name in [adapter] if adapter else layer.lora_A:
                layer.lora_A[adapter_name].weight.copy_(factors.down)
                layer.lora_B[adapter_name].weight.copy_(factors.up)


def lora_config_fields(lora: LoRA, pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the fields of `peft.LoraConfig` for adapters of the same shape as `lora`.

    Raises:
        InputError: If two denoisers differ in their adapted modules, ranks or alphas: both get the
            same fields.
    """
    shapes = [
        # Whole numbers as integers, as in configuration files.
        {n: (f.rank, int(f.alpha) if f.alpha == int(f.alpha) else f.alpha) for n, f in w.items()}
        for w in lora.values()
    ]
    if any(shape != shapes[0] for shape in shapes):
        raise InputError(
            f"the LoRA must adapt the same modules of {', '.join(lora)}, with the same ranks and "
            "alphas"
        )
    modules = shapes[0]
    rank, alpha = mode(modules.values())
    return {
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": _targets(set(modules), next(iter(denoisers(pipe).values()))),
        "rank_pattern": {f"^{re.escape(name)}": r for name, (r, _) in modules.items() if r != rank},
        "alpha_pattern": {
            f"^{re.escape(name)}": a for name, (_, a) in modules.items() if a != alpha
        },
    }


def _targets(modules: set[str], denoiser: nn.Module) -> list[str] | str:
    """Return the shortest `target_modules` that select exactly these modules.

    Suffixes if they are unambiguous, otherwise a regular expression. Examples of ambiguous
    suffixes: FLUX's ``proj_out`` is a layer of the blocks and also the last layer; FLUX.2's
    ``attn.to_out`` is a linear in some blocks and a list in others.
    """
    names = {name for name, _ in denoiser.named_modules()}
    suffixes = sorted({re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in modules})
    dotted = tuple(f".{suffix}" for suffix in suffixes)
    if {name for name in names if f".{name}".endswith(dotted)} == modules:
        return suffixes
    blocks = {re.sub(r"\\\.\d+\\\.", r"\.\\d+\.", re.escape(name), count=1) for name in modules}
    expression = "|".join(sorted(blocks))
    if {name for name in names if re.fullmatch(expression, name)} == modules:
        return expression
    return "|".join(map(re.escape, sorted(modules)))
