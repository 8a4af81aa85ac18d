"""The training step of DiffSynth-Studio, from a checkout of it, on our weights and inputs.

The code is DiffSynth-Studio's: the denoiser, `model_fn_qwen_image`, `DirectDistillLoss`, its
scheduler's step, gradient checkpointing, LoRA by peft. The numbers are ours: weights, LoRA, noise,
prompt embeddings, target, sigmas, and the width of the denoiser, which is fixed in its code.

Its MLPs compute x * sigmoid(1.702 x) where the published model uses the tanh approximation of GELU.
With small random weights the losses agree to 1e-6 nevertheless.

Needs `pip install einops`. Other packages that it imports and that are not installed (modelscope,
torchvision, ...) are replaced by empty ones while it is imported.
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from typing import Any

import diffusers  # noqa: F401  # before the stand-ins: it looks for what is installed
import peft
import torch
import transformers  # noqa: F401
from einops import rearrange
from torch import nn

ABSENT = ("modelscope", "torchvision", "imageio", "ftfy", "datasets", "controlnet_aux", "cv2")


class _StandIn(types.ModuleType):
    __path__ = ()  # a package

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


class _Absent(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Import hook that provides empty packages for missing ones."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:  # noqa: ANN401
        if name.partition(".")[0] in ABSENT:
            return importlib.machinery.ModuleSpec(name, self, is_package=True)
        return None

    def create_module(self, spec: Any) -> types.ModuleType:  # noqa: ANN401
        return _StandIn(spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        pass


def load(path: Path) -> tuple[Any, Any]:
    """Return the reference's Qwen-Image pipeline module and its loss.

    Raises:
        SystemExit: If `path` is not a checkout of it.
    """
    if not (path / "diffsynth/diffusion/loss.py").is_file():
        raise SystemExit(f"--reference {path}: no checkout of DiffSynth-Studio")
    finder = _Absent()
    sys.path.insert(0, str(path))
    sys.meta_path.append(finder)
    known = set(sys.modules)
    try:
        pipeline = importlib.import_module("diffsynth.pipelines.qwen_image")
        loss = importlib.import_module("diffsynth.diffusion.loss").DirectDistillLoss
    finally:
        sys.path.remove(str(path))
        sys.meta_path.remove(finder)
        for name in set(sys.modules) - known:  # nobody else shall take them for the real ones
            if isinstance(sys.modules[name], _StandIn):
                del sys.modules[name]
    return pipeline, loss


def make_denoiser(module: Any, transformer: Any) -> Any:  # noqa: ANN401
    """Return the reference's denoiser with the weights, LoRA and size of a diffusers one.

    Args:
        module: The reference's pipeline module.
        transformer: QwenImageTransformer2DModel with its LoRA.
    """
    config, width = transformer.config, transformer.inner_dim
    parts = importlib.import_module("diffsynth.models.qwen_image_dit")
    with torch.device("meta"):
        dit = module.QwenImageDiT(num_layers=0)
    dit.pos_embed = parts.QwenEmbedRope(10000, list(config.axes_dims_rope), scale_rope=True)
    dit.time_text_embed = parts.TimestepEmbeddings(
        256, width, diffusers_compatible_format=True, scale=1000, align_dtype_to_timestep=False
    )
    dit.txt_norm = parts.RMSNorm(config.joint_attention_dim, eps=1e-6)
    dit.img_in = nn.Linear(config.in_channels, width)
    dit.txt_in = nn.Linear(config.joint_attention_dim, width)
    dit.transformer_blocks = nn.ModuleList(
        parts.QwenImageTransformerBlock(
            width, config.num_attention_heads, config.attention_head_dim
        )
        for _ in range(config.num_layers)
    )
    dit.norm_out = parts.AdaLayerNorm(width, single=True)
    dit.proj_out = nn.Linear(width, transformer.proj_out.out_features)
    adapted = [name for name, layer in transformer.named_modules() if hasattr(layer, "lora_A")]
    rank = transformer.get_submodule(adapted[0]).r["default"]
    dit.requires_grad_(False)
    # As its training does: DiffusionTrainingModule.add_lora_to_model.
    settings = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=adapted)
    dit = peft.inject_adapter_in_model(settings, dit)
    dit.to(transformer.dtype)  # the LoRA too, as it does
    dit.load_state_dict(transformer.state_dict())
    return dit.to(transformer.device)


class ReferenceStep:
    """The reference's training step.

    Args:
        path: The checkout.
        pipe: Our pipeline, with its LoRA.
        inputs: The inputs that both share: ``prompt_embeds`` (1, tokens, width), ``noise`` and
            ``target`` (1, tokens, channels), ``sigmas`` (steps,).
        blocks: Whether it recomputes its blocks in the backward pass, its only checkpointing.
    """

    def __init__(
        self,
        path: Path,
        pipe: Any,  # noqa: ANN401
        inputs: dict[str, torch.Tensor],
        blocks: bool,
    ) -> None:
        module, self.loss = load(path)
        dit = make_denoiser(module, pipe.transformer)
        trained = [p for p in dit.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        scheduler = module.FlowMatchScheduler("Qwen-Image")
        scheduler.set_timesteps_fn = lambda **_: (inputs["sigmas"], inputs["sigmas"] * 1000)
        self.pipe = types.SimpleNamespace(
            scheduler=scheduler,
            in_iteration_models=("dit",),
            dit=dit,
            model_fn=module.model_fn_qwen_image,
            torch_dtype=dit.img_in.weight.dtype,
            device=dit.img_in.weight.device,
        )
        self.pipe.step = types.MethodType(module.BasePipeline.step, self.pipe)
        text = inputs["prompt_embeds"]
        side = round(inputs["noise"].shape[1] ** 0.5)
        self.inputs = {
            "latents": _unpacked(inputs["noise"], side),
            "input_latents": _unpacked(inputs["target"], side),
            "prompt_emb": text,
            "prompt_emb_mask": torch.ones(text.shape[:2], dtype=torch.long, device=text.device),
            "height": 16 * side,
            "width": 16 * side,
            "num_inference_steps": len(inputs["sigmas"]),
            "use_gradient_checkpointing": blocks,
        }

    def __call__(self, counter: Any = None) -> float:  # noqa: ANN401
        """Make a step and return its loss."""
        loss = self.loss(self.pipe, **self.inputs)
        if counter:
            counter.forward_done()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())


def _unpacked(latents: torch.Tensor, side: int) -> torch.Tensor:
    pattern = "B (H W) (C P Q) -> B C (H P) (W Q)"
    return rearrange(latents, pattern, H=side, W=side, P=2, Q=2)
