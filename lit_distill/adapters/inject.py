"""Selects what is trained: adds LoRA adapters, freezes parameters, sets the training mode."""

from __future__ import annotations

import fnmatch
import inspect
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from torch import nn

from lit_distill.compute.repeated_blocks import repeated_blocks
from lit_distill.compute.step_adapters import COMPANION, share_active_adapter, step_names
from lit_distill.errors import InputError, with_suggestions
from lit_distill.pipelines.components import call_parameters, denoisers
from lit_distill.pipelines.rollout import switch_adapters_per_step

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def make_trainable(
    pipe: DiffusionPipeline,
    lora: dict[str, Any] | None,
    freeze: Sequence[str] = (),
    train_mode: Sequence[str] = (),
    lora_per_step: int | None = None,
    *,
    companion: bool = False,
    cast: bool = True,
) -> None:
    """Freeze the pipeline and make the denoisers, or adapters on them, trainable in float32.

    Args:
        pipe: The pipeline, changed in place.
        lora: Fields of `peft.LoraConfig` (``r``, ``lora_alpha``, ``target_modules``, ...) for an
            adapter on every denoiser. By default it adapts all attention and MLP linears of the
            repeated blocks, with ``lora_alpha = r``. None: train the denoisers' weights.
        freeze: Patterns of parameters to keep frozen, for example
            ``transformer.transformer_blocks.59.txt_mlp.*``.
        train_mode: Patterns of modules to put into training mode, except for their dropout.
        lora_per_step: Number of steps, each with its own adapter; ``pipe()`` and `rollout` switch
            them. None: one adapter for all steps.
        cast: Convert trained weights to float32. Where a denoiser without adapters is not trained
            any more, False saves the memory.
        companion: Also add an adapter with the same fields that an objective trains beside the
            student's; with `lora` only.

    Raises:
        InputError: If `lora` has an unknown field or names a module that no denoiser has, a pattern
            matches nothing, or plain diffusers could not switch adapters of this pipeline.
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
            _add_lora(denoiser, lora, step_names(lora_per_step or 0), companion=companion)
            denoiser.eval()  # peft adds its layers in training mode, with dropout
        for parameter in denoiser.parameters():
            # At lr 1e-5 most updates of bfloat16 weights would be rounded to nothing.
            if parameter.requires_grad and cast:
                parameter.data = parameter.data.float()
    freeze_parameters(pipe, freeze)
    set_training_mode(pipe, train_mode)
    if lora_per_step:
        switch_adapters_per_step(pipe)


def _check_switchable(pipe: DiffusionPipeline) -> None:
    has_callback = "callback_on_step_end" in call_parameters(pipe)
    if not has_callback or not hasattr(pipe, "load_lora_weights"):
        missing = "load_lora_weights" if has_callback else "callback_on_step_end"
        raise InputError(
            f"model.lora_per_step: {type(pipe).__name__} has no {missing}, so plain diffusers "
            "could not use a LoRA for each step; train one LoRA for all steps (null)"
        )


def set_training_mode(
    pipe: DiffusionPipeline, patterns: Sequence[str], training: bool = True
) -> None:
    """Put modules with matching names into training mode, except for their dropout.

    Raises:
        InputError: If a pattern matches no module; suggests the closest names.
    """
    modules = {
        f"{key}.{name}": module
        for key, denoiser in denoisers(pipe).items()
        for name, module in denoiser.named_modules()
    }
    for parent in _matching(modules, patterns, "model.train_mode: no module"):
        for module in parent.modules():
            module.training = training and not isinstance(module, nn.Dropout)


def trained_parameters(pipe: DiffusionPipeline) -> dict[str, nn.Parameter]:
    """Return the student's trainable parameters, by name: ``transformer.<parameter>``."""
    trainable = _trainable(pipe).items()
    return {name: parameter for name, parameter in trainable if not is_companion(name)}


def is_companion(name: str) -> bool:
    """Return whether a parameter is one of the companion adapter, by its name."""
    return f".{COMPANION}." in name


def _trainable(pipe: DiffusionPipeline) -> dict[str, nn.Parameter]:
    return {
        f"{key}.{name}": parameter
        for key, denoiser in denoisers(pipe).items()
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }


def freeze_parameters(pipe: DiffusionPipeline, patterns: Sequence[str]) -> None:
    """Freeze the trainable parameters whose names match one of the patterns, the companion's too.

    Raises:
        InputError: If a pattern matches no trainable parameter; suggests the closest names.
    """
    trained = _trainable(pipe)
    for parameter in _matching(trained, patterns, "model.freeze: no trained parameter"):
        parameter.requires_grad_(False)


def _matching(named: dict[str, Any], patterns: Sequence[str], no_match: str) -> list[Any]:
    """Return the values whose names match; `no_match` starts the message if a pattern has none."""
    matching = []
    for pattern in patterns:
        names = fnmatch.filter(named, pattern)
        if not names:
            raise InputError(f"{no_match} is called {with_suggestions(pattern, named)}")
        matching += [named[name] for name in names]
    return matching


def _add_lora(
    denoiser: Any,  # noqa: ANN401
    lora: dict[str, Any],
    names: list[str],
    *,
    companion: bool,
) -> None:
    """Add a trainable adapter named ``default``, or one for each of the names, and a companion."""
    from peft import LoraConfig, inject_adapter_in_model

    accepted = inspect.signature(LoraConfig).parameters
    if unknown := set(lora) - set(accepted):
        raise InputError(
            f"lora: unknown field {with_suggestions(sorted(unknown)[0], accepted)}; the fields are "
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
                raise InputError(
                    f"lora.target_modules: {type(denoiser).__name__} has no linear layer "
                    f"{with_suggestions(target, suffixes)}"
                )
    added = [*(names or ["default"]), *([COMPANION] if companion else [])]
    trained = []
    for name in added:
        with warnings.catch_warnings():
            # peft warns when a second adapter is added, which is intended here.
            warnings.filterwarnings("ignore", "Already found a `peft_config` attribute")
            try:
                config = LoraConfig(**fields)
                if hasattr(denoiser, "add_adapter"):
                    denoiser.add_adapter(config, name)
                else:
                    inject_adapter_in_model(config, denoiser, name)
            except Exception as error:  # peft raises several kinds for values of the wrong type
                raise InputError(f"lora {fields}: peft can't use these fields: {error}") from error
        trained += [p for p in denoiser.parameters() if p.requires_grad]
    for parameter in trained:  # adding an adapter freezes the previous ones
        parameter.requires_grad_(True)
    if names or companion:
        for layer in denoiser.modules():
            if hasattr(layer, "lora_A"):
                layer._active_adapter = added[:1]
        share_active_adapter(denoiser, names)


def default_target_modules(denoiser: nn.Module) -> list[str]:
    """Return the names of the attention and MLP linears of the denoiser's repeated blocks.

    Linears of embeddings, norms and modulation are excluded. Names are full names: a suffix such as
    ``attn.to_out`` is a linear in one kind of Flux2's blocks and a list in the other.
    """
    blocks = repeated_blocks(denoiser)
    targets = []
    for name, module in denoiser.named_modules():
        inside = [block for block in blocks if name.startswith(f"{block}.")]
        if not isinstance(module, nn.Linear) or not inside:
            continue
        suffix = name.removeprefix(max(inside, key=len) + ".").partition(".")[2]
        if suffix and not any(word in suffix for word in ("norm", "mod", "emb")):
            targets.append(name)
    return targets


def enable_adapter_dropout(module: nn.Module) -> None:
    """Put the dropout of a module's adapters, if they have any, into training mode."""
    for name, layer in module.named_modules():
        if name.endswith("lora_dropout"):
            layer.train()


def remove_adapters(pipe: DiffusionPipeline) -> None:
    """Remove all adapters from the denoisers; their weights are those of the base model."""
    from diffusers.utils.peft_utils import recurse_remove_peft_layers

    for denoiser in denoisers(pipe).values():
        recurse_remove_peft_layers(denoiser)
        denoiser.__dict__.pop("peft_config", None)
        denoiser._hf_peft_config_loaded = False


@contextmanager
def adapters_disabled(module: nn.Module) -> Iterator[None]:
    """Disable the module's adapters until the context is left: bit for bit the base model.

    Not to be used while a graph is back-propagated, since recomputation would miss the adapters.
    peft's `disable_adapters` is not used because re-enabling with it unfreezes everything.
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
