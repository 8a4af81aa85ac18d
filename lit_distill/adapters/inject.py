"""What is trained: LoRA put into a pipeline, taken out of it, switched off, fused into it."""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_distill.compute.repeated_blocks import repeated_blocks
from lit_distill.compute.step_adapters import share_active_adapter, step_names
from lit_distill.errors import did_you_mean
from lit_distill.pipelines.components import call_parameters, denoisers
from lit_distill.pipelines.rollout import switch_by_step

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
            raise ValueError(f"{nothing} is called {did_you_mean(pattern, named)}")
        fitting += [named[name] for name in names]
    return fitting


def _add_lora(denoiser: Any, lora: dict[str, Any], names: list[str]) -> None:  # noqa: ANN401
    """Add an adapter, or one for each of the names, all of them trainable."""
    from peft import LoraConfig, inject_adapter_in_model

    accepted = inspect.signature(LoraConfig).parameters
    if unknown := set(lora) - set(accepted):
        raise ValueError(
            f"lora: unknown field {did_you_mean(sorted(unknown)[0], accepted)}; the fields are "
            "those of peft.LoraConfig"
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
                    f"{did_you_mean(target, suffixes)}"
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
        share_active_adapter(denoiser, names)


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


def enable_adapter_dropout(module: nn.Module) -> None:
    """Put the dropout of a module's adapters, if they have any, into training mode."""
    for name, layer in module.named_modules():
        if name.endswith("lora_dropout"):
            layer.train()


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
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
