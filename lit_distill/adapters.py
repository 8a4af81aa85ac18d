"""What is trained: LoRA put into a pipeline, taken out of it, switched off, fused into it."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import re
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from statistics import mode
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lit_distill.families import call_parameters, denoisers, load_pipeline, repeated_blocks
from lit_distill.lora import Factors, LoRA, read_lora
from lit_distill.per_step import share_active, step_names
from lit_distill.rollout import switch_by_step

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def make_trainable(
    pipe: DiffusionPipeline,
    lora: dict[str, Any] | None,
    freeze: Sequence[str] = (),
    train_mode: Sequence[str] = (),
    lora_per_step: int | None = None,
) -> None:
    """Freeze the pipeline, then unfreeze what is trained, in float32.

    Args:
        pipe: The pipeline, changed in place.
        lora: Fields of `peft.LoraConfig` (``r``, ``lora_alpha``, ``target_modules``, ...) for an
            adapter on every denoiser; by default all attention and MLP linears of the repeated
            blocks are adapted, with ``lora_alpha = r``. None trains the denoisers' own weights.
        freeze: Patterns of parameters that stay frozen all the same, as in
            ``transformer.transformer_blocks.59.txt_mlp.*``.
        train_mode: Patterns of modules that are put into training mode, but for their dropout.
        lora_per_step: Number of steps, each of which gets an adapter of its own; ``pipe()`` and
            `rollout` switch them. None: one adapter for all steps.

    Raises:
        ValueError: If `lora` has an unknown field, or names a module that no denoiser has, or a
            pattern fits nothing, or no plain pipeline of this class could switch adapters.
    """
    if lora_per_step:
        _check_switchable(pipe)
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    for denoiser in denoisers(pipe).values():
        if lora is None:
            denoiser.requires_grad_(True)
        else:
            _add_lora(denoiser, lora, step_names(lora_per_step or 0))
            denoiser.eval()  # peft's layers come with their dropout switched on
        for parameter in denoiser.parameters():
            # At lr 1e-5 most bfloat16 weights are too coarse to take a step; float32 ones move.
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    freeze_parameters(pipe, freeze)
    set_training_mode(pipe, train_mode)
    if lora_per_step:
        switch_by_step(pipe)


def _check_switchable(pipe: DiffusionPipeline) -> None:
    by_hand = "callback_on_step_end" in call_parameters(pipe)
    if not by_hand or not hasattr(pipe, "load_lora_weights"):
        lacks = "load_lora_weights" if by_hand else "callback_on_step_end"
        raise ValueError(
            f"model.lora_per_step: {type(pipe).__name__} has no {lacks}, without which plain "
            "diffusers could not draw with what is trained; train one LoRA for all steps (null)"
        )


def set_training_mode(
    pipe: DiffusionPipeline, patterns: Sequence[str], training: bool = True
) -> None:
    """Put modules of the denoisers whose names fit into training mode, but for their dropout.

    Raises:
        ValueError: If a pattern fits none, naming the nearest ones.
    """
    modules = {
        f"{key}.{name}": module
        for key, denoiser in denoisers(pipe).items()
        for name, module in denoiser.named_modules()
    }
    for chosen in _fitting(modules, patterns, "model.train_mode: no module"):
        for module in chosen.modules():
            module.training = training and not isinstance(module, nn.Dropout)


def trained_parameters(pipe: DiffusionPipeline) -> dict[str, nn.Parameter]:
    """Return what trains, by name: ``transformer.<parameter>``."""
    return {
        f"{key}.{name}": parameter
        for key, denoiser in denoisers(pipe).items()
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }


def freeze_parameters(pipe: DiffusionPipeline, patterns: Sequence[str]) -> None:
    """Freeze the denoisers' trained parameters whose names fit one of the patterns.

    Raises:
        ValueError: If a pattern fits none, naming the nearest ones.
    """
    trained = trained_parameters(pipe)
    for parameter in _fitting(trained, patterns, "model.freeze: no trained parameter"):
        parameter.requires_grad_(False)


def _fitting(named: dict[str, Any], patterns: Sequence[str], nothing: str) -> list[Any]:
    """Return what the patterns fit; an error that begins with `nothing` if one fits none."""
    fitting = []
    for pattern in patterns:
        names = fnmatch.filter(named, pattern)
        if not names:
            raise ValueError(f"{nothing} is called {_near(pattern, named)}")
        fitting += [named[name] for name in names]
    return fitting


def _add_lora(denoiser: Any, lora: dict[str, Any], names: list[str]) -> None:  # noqa: ANN401
    """Add an adapter, or one for each of the names, all of them trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    accepted = inspect.signature(LoraConfig).parameters
    if unknown := set(lora) - set(accepted):
        raise ValueError(
            f"lora: unknown field {_near(sorted(unknown)[0], accepted)}; the fields are those of "
            "peft.LoraConfig"
        )
    fields = dict(lora)
    fields.setdefault("target_modules", default_target_modules(denoiser))
    fields.setdefault("lora_alpha", fields.get("r", accepted["r"].default))
    linears = [name for name, m in denoiser.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if not isinstance(fields["target_modules"], str):  # a string is a regular expression
        for target in fields["target_modules"]:
            if not any(name == target or name.endswith(f".{target}") for name in linears):
                suffixes = {".".join(n.split(".")[-k:]) for n in linears for k in (1, 2, 3)}
                raise ValueError(
                    f"lora.target_modules: {type(denoiser).__name__} has no linear layer "
                    f"{_near(target, suffixes)}"
                )
    trained = []
    for name in names or ["default"]:
        config = LoraConfig(**fields)
        with warnings.catch_warnings():
            # That there is one already: so it is meant.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            if hasattr(denoiser, "add_adapter"):
                denoiser.add_adapter(config, name)
            else:
                inject_adapter_in_model(config, denoiser, name)
        trained += [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in trained:  # adding one freezes those before it
        parameter.requires_grad_(True)
    if names:
        share_active(denoiser, names)


def _near(name: str, names: Any) -> str:  # noqa: ANN401
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f"{name!r}" + (f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else "")


def default_target_modules(denoiser: nn.Module) -> list[str]:
    """Return the names of the attention and MLP linears of the denoiser's repeated blocks.

    Linears that embed, normalise or modulate are left out. Full names: an ending such as
    ``attn.to_out`` is a linear in one kind of Flux2's blocks and a list in the other.
    """
    blocks = repeated_blocks(denoiser)
    targets = []
    for name, module in denoiser.named_modules():
        inside = [block for block in blocks if name.startswith(f"{block}.")]
        if not isinstance(module, nn.Linear) or not inside:
            continue
        ending = name.removeprefix(max(inside, key=len) + ".").partition(".")[2]
        if ending and not any(word in ending for word in ("norm", "mod", "emb")):
            targets.append(name)
    return targets


@contextmanager
def adapters_off(module: nn.Module) -> Iterator[None]:
    """Let the module compute as if it had no adapters: bit for bit the base model.

    Not for a graph that is still to be back-propagated: recomputation would miss the adapters.
    peft's own `disable_adapters` is not used because switching back unfreezes everything.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [m for m in module.modules() if isinstance(m, BaseTunerLayer)]
    before = [layer._disable_adapters for layer in layers]
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer, state in zip(layers, before, strict=True):
            layer._disable_adapters = state


def base_pipeline(
    hyper: dict[str, Any],
    *,
    torch_dtype: Any = None,  # noqa: ANN401
    **options: Any,  # noqa: ANN401
) -> DiffusionPipeline:
    """Load what a student starts from: the pretrained pipeline, the teacher's LoRA fused into it.

    Args:
        hyper: Hyperparameters of `DirectDistill`.
        torch_dtype: Data type of the weights; default: that of `hyper`.
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


def changed_scheduler(pipe: DiffusionPipeline, fields: dict[str, Any] | None) -> Any:  # noqa: ANN401
    """Return the pipeline's scheduler with some fields of its configuration changed.

    Raises:
        ValueError: If the scheduler has no such field.
    """
    scheduler = pipe.scheduler
    for name in fields or {}:
        if name not in scheduler.config:
            raise ValueError(
                f"model.scheduler: {type(scheduler).__name__} has no field "
                f"{_near(name, scheduler.config)}"
            )
    return type(scheduler).from_config({**scheduler.config, **(fields or {})})


@torch.no_grad()
def fuse_lora(pipe: DiffusionPipeline, lora: LoRA) -> None:
    """Add a LoRA to the denoisers' own weights, once and for all; summed in float32."""
    for component, weights in lora.items():
        denoiser = denoisers(pipe)[component]
        for name, factors in weights.items():
            weight = denoiser.get_submodule(name).weight
            weight.copy_(weight.float() + factors.delta().to(weight.device))


def take_lora(pipe: DiffusionPipeline, adapter: str | None = None) -> LoRA:
    """Return copies of the factors of the pipeline's adapters.

    Args:
        pipe: The pipeline.
        adapter: Name of the adapter; None: the active one.

    Raises:
        ValueError: If an adapter is more than two factors (DoRA, a bias), which no other layout
            than peft's own can hold.
    """
    from peft.tuners.lora import LoraLayer

    lora: LoRA = {}
    for component, denoiser in denoisers(pipe).items():
        layers = {n: m for n, m in denoiser.named_modules() if isinstance(m, LoraLayer)}
        for name, layer in layers.items():
            own = adapter or layer.active_adapters[0]
            if own not in layer.lora_A:
                continue
            down, up = layer.lora_A[own], layer.lora_B[own]
            if layer.use_dora.get(own) or up.bias is not None:
                raise ValueError(
                    f"{component}.{name}: its adapter is not plain LoRA (use_dora, lora_bias), "
                    "which cannot be written as two factors, in no format; train without these"
                )
            down, up = (factor.weight.detach().float().cpu().clone() for factor in (down, up))
            alpha = layer.scaling[own] * len(down)
            lora.setdefault(component, {})[name] = Factors(down, up, alpha)
    return lora


@torch.no_grad()
def put_lora(pipe: DiffusionPipeline, lora: LoRA, adapter: str | None = None) -> None:
    """Copy factors into adapters that `lora_fields` describes, which are there already.

    Args:
        pipe: The pipeline.
        lora: The factors.
        adapter: Name of the adapter; None: all that there are.
    """
    for component, weights in lora.items():
        for name, factors in weights.items():
            layer: Any = denoisers(pipe)[component].get_submodule(name)
            for own in [adapter] if adapter else layer.lora_A:
                layer.lora_A[own].weight.copy_(factors.down)
                layer.lora_B[own].weight.copy_(factors.up)


def lora_fields(lora: LoRA, pipe: DiffusionPipeline) -> dict[str, Any]:
    """Return the fields of `peft.LoraConfig` of adapters that hold `lora`.

    Raises:
        ValueError: If two denoisers are adapted in different modules, ranks or alphas: one set of
            fields serves both.
    """
    shapes = [
        # An integer where it is one, as everybody writes it.
        {n: (f.rank, int(f.alpha) if f.alpha == int(f.alpha) else f.alpha) for n, f in w.items()}
        for w in lora.values()
    ]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
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
    """Return the shortest `target_modules` that mean exactly these modules.

    Name endings where they do: FLUX's ``proj_out`` ends the blocks' names and is the last layer's
    whole name; FLUX.2's ``attn.to_out`` is a linear in some blocks, a list in others.
    """
    names = {name for name, _ in denoiser.named_modules()}
    endings = sorted({re.split(r"\.\d+\.", name, maxsplit=1)[-1] for name in modules})
    if {name for name in names if f".{name}".endswith(tuple(f".{e}" for e in endings))} == modules:
        return endings
    blocks = {re.sub(r"\\\.\d+\\\.", r"\.\\d+\.", re.escape(name), count=1) for name in modules}
    expression = "|".join(sorted(blocks))
    if {name for name in names if re.fullmatch(expression, name)} == modules:
        return expression
    return "|".join(map(re.escape, sorted(modules)))
