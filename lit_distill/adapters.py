"""What is trained, and taking it home: LoRA in and out, checkpoints to diffusers pipelines."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from lit_distill.families import denoisers, load_pipeline

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

ExportFormat = Literal["diffusers"]

STATE_PREFIX = "denoisers."
"""Where a checkpoint's state dict holds the denoisers: ``denoisers.transformer.<parameter>``."""


def make_trainable(
    pipe: DiffusionPipeline,
    lora: dict[str, Any] | None,
    freeze: Sequence[str] = (),
    train_mode: Sequence[str] = (),
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

    Raises:
        ValueError: If `lora` has an unknown field, or names a module that no denoiser has, or a
            pattern fits nothing.
    """
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False)
    for denoiser in denoisers(pipe).values():
        if lora is None:
            denoiser.requires_grad_(True)
        else:
            _add_lora(denoiser, lora)
            denoiser.eval()  # peft's layers come with their dropout switched on
        for parameter in denoiser.parameters():
            # At lr 1e-5 most bfloat16 weights are too coarse to take a step; float32 ones move.
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    freeze_parameters(pipe, freeze)
    set_training_mode(pipe, train_mode)


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
    for pattern in patterns:
        found = fnmatch.filter(modules, pattern)
        if not found:
            raise ValueError(f"model.train_mode: no module is called {_near(pattern, modules)}")
        for module in (child for name in found for child in modules[name].modules()):
            module.training = training and not isinstance(module, nn.Dropout)


def freeze_parameters(pipe: DiffusionPipeline, patterns: Sequence[str]) -> None:
    """Freeze the denoisers' trained parameters whose names fit one of the patterns.

    Raises:
        ValueError: If a pattern fits none, naming the nearest ones.
    """
    trained = {
        f"{key}.{name}": parameter
        for key, denoiser in denoisers(pipe).items()
        for name, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }
    for pattern in patterns:
        found = fnmatch.filter(trained, pattern)
        if not found:
            raise ValueError(
                f"model.freeze: no trained parameter is called {_near(pattern, trained)}"
            )
        for name in found:
            trained[name].requires_grad_(False)


def _add_lora(denoiser: Any, lora: dict[str, Any]) -> None:  # noqa: ANN401
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
    config = LoraConfig(**fields)
    if hasattr(denoiser, "add_adapter"):
        denoiser.add_adapter(config)
    else:
        inject_adapter_in_model(config, denoiser)


def _near(name: str, names: Any) -> str:  # noqa: ANN401
    matches = difflib.get_close_matches(name, list(names), n=3, cutoff=0.4)
    return f"{name!r}" + (f" (did you mean {' or '.join(map(repr, matches))}?)" if matches else "")


def default_target_modules(denoiser: nn.Module) -> list[str]:
    """Return the names of the attention and MLP linears of the denoiser's repeated blocks.

    Repeated blocks are lists of modules of one class. Linears that embed, normalise or modulate
    are left out. Full names: an ending such as ``attn.to_out`` is a linear in one kind of Flux2's
    blocks and a list in the other.
    """
    blocks = [
        name
        for name, module in denoiser.named_modules()
        if isinstance(module, nn.ModuleList)
        and len({type(child) for child in module}) == 1
        and any(True for _ in module[0].children())
    ]
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


def read_checkpoint(path: str | Path, *, mmap: bool = False) -> dict[str, Any]:
    """Read a Lightning checkpoint without unpickling code.

    Args:
        path: The file.
        mmap: Read tensors when they are used; their checksums are not looked at then.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a checkpoint of `DirectDistill`.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    try:
        if not mmap:
            with zipfile.ZipFile(path) as archive:  # torch does not look at checksums
                if damaged := archive.testzip():
                    raise ValueError(f"its part {damaged} is damaged")
        checkpoint: dict[str, Any] = torch.load(
            path, map_location="cpu", weights_only=True, mmap=mmap
        )
    except Exception as error:  # torch raises several kinds for a truncated or foreign file
        raise ValueError(f"checkpoint {path} is truncated or not a checkpoint: {error}") from error
    hyper = checkpoint.get("hyper_parameters", {}) if isinstance(checkpoint, dict) else {}
    if "pretrained_model_name_or_path" not in hyper:
        raise ValueError(
            f"checkpoint {path} was not written by lit_distill: its hyper_parameters name no "
            "pretrained_model_name_or_path"
        )
    return checkpoint


def check_state(found: Any, expected: Any, where: str) -> None:  # noqa: ANN401
    """Compare the names in a checkpoint's state dict with the trainable parameters.

    Raises:
        ValueError: If they differ, naming examples of what is missing and what is not known.
    """
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    for name in sorted(set(expected) & set(found)):
        if found[name].shape != expected[name].shape:
            raise ValueError(
                f"{where} does not fit this model: {name} is {tuple(found[name].shape)} in it and "
                f"{tuple(expected[name].shape)} here. Use the LoRA settings it was trained with."
            )
    if missing or unknown:
        lines = [
            f"{where} does not fit this model: {len(missing)} trainable parameters are missing "
            f"and {len(unknown)} are unknown."
        ]
        lines += [f"  missing: {name}" for name in missing[:3]]
        lines += [f"  unknown: {name}" for name in unknown[:3]]
        lines.append("Use the pipeline, the LoRA settings or full training it was trained with.")
        raise ValueError("\n".join(lines))


def load_student(
    checkpoint: str | Path, *, torch_dtype: torch.dtype | str | None = None
) -> DiffusionPipeline:
    """Return a plain diffusers pipeline with the student in it, from a checkpoint alone.

    Draw with the number of steps it was trained with and without guidance, for example
    ``pipe(prompt, num_inference_steps=4, true_cfg_scale=1)``.

    Args:
        checkpoint: Path of a Lightning checkpoint (.ckpt) of `DirectDistill`.
        torch_dtype: Data type of all weights; default: that of the frozen weights in training.

    Returns:
        The pipeline on the CPU, in evaluation mode. A LoRA is attached, not merged.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is truncated, or was not written by lit_distill.
    """
    content = read_checkpoint(checkpoint)
    hyper = content["hyper_parameters"]
    pipe = load_pipeline(
        hyper["pretrained_model_name_or_path"],
        revision=hyper["revision"],
        torch_dtype=torch_dtype or hyper["torch_dtype"],
    )
    dtypes = {name: denoiser.dtype for name, denoiser in denoisers(pipe).items()}
    make_trainable(pipe, hyper["lora"], hyper["freeze"], hyper["train_mode"])
    state: dict[str, Tensor] = content["state_dict"]
    own = {
        f"{STATE_PREFIX}{name}.{key}": parameter
        for name, denoiser in denoisers(pipe).items()
        for key, parameter in denoiser.named_parameters()
        if parameter.requires_grad
    }
    check_state(state, own, f"checkpoint {checkpoint}")
    with torch.no_grad():
        for key, parameter in own.items():
            parameter.copy_(state[key])
    for name, denoiser in denoisers(pipe).items():
        denoiser.to(dtypes[name]).requires_grad_(False).eval()
    return pipe


def export_student(
    checkpoint: str | Path, out_dir: str | Path, format: ExportFormat = "diffusers"
) -> Path:
    """Write the student of a checkpoint in a form that others load.

    ``diffusers``: a LoRA becomes ``pytorch_lora_weights.safetensors``, which
    ``pipe.load_lora_weights(out_dir)`` takes; a fully trained denoiser becomes a whole pipeline
    folder for ``DiffusionPipeline.from_pretrained(out_dir)``.

    Args:
        checkpoint: Path of a Lightning checkpoint (.ckpt) of `DirectDistill`.
        out_dir: Folder to write to; made if missing.
        format: ``"diffusers"``.

    Returns:
        The folder written to.

    Raises:
        FileNotFoundError: If there is no such checkpoint.
        ValueError: If the checkpoint can't be used, the format is unknown, or the pipeline has no
            LoRA writer.
    """
    if format != "diffusers":
        raise ValueError(f"format must be 'diffusers', got {format!r}")
    out_dir = Path(out_dir)
    pipe = load_student(checkpoint)
    lora = read_checkpoint(checkpoint)["hyper_parameters"]["lora"] is not None
    out_dir.mkdir(parents=True, exist_ok=True)
    if lora:
        _save_lora(pipe, out_dir)
    else:
        pipe.save_pretrained(out_dir)
    return out_dir


def _save_lora(pipe: DiffusionPipeline, out_dir: Path) -> None:
    from peft import get_peft_model_state_dict

    writer = getattr(pipe, "save_lora_weights", None)
    accepted = inspect.signature(writer).parameters if writer else {}
    arguments: dict[str, Any] = {}
    for name, denoiser in denoisers(pipe).items():
        if f"{name}_lora_layers" not in accepted:
            raise ValueError(
                f"{type(pipe).__name__} has no LoRA writer for its {name}; use load_student, or "
                "train the whole denoiser"
            )
        arguments[f"{name}_lora_layers"] = get_peft_model_state_dict(denoiser)
        if f"{name}_lora_adapter_metadata" in accepted:
            # Carries lora_alpha: readers that lack it assume lora_alpha = r.
            settings = denoiser.peft_config["default"].to_dict()
            arguments[f"{name}_lora_adapter_metadata"] = {
                k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()
            }
    pipe.save_lora_weights(out_dir, **arguments)
