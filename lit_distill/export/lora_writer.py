"""Writes LoRA files in the format of each tool."""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import save
from torch import Tensor

from lit_distill.adapters.lora import Factors, LoRA
from lit_distill.adapters.lora_files import METADATA_KEY, to_state
from lit_distill.adapters.lora_formats import file_name, layout_of
from lit_distill.adapters.weights import lora_config_fields
from lit_distill.data.whole_files import write_file
from lit_distill.errors import InputError
from lit_distill.export.facts import StudentFacts
from lit_distill.pipelines.components import denoisers

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


@dataclass(frozen=True)
class LoRAWriter:
    """Writes LoRAs of one student, with its facts in the metadata of every file.

    Attributes:
        folder: Folder to write to.
        format: diffusers, comfyui, kohya, diffsynth or peft.
        dtype: Data type of the weights.
        facts: The student's facts.
    """

    folder: Path
    format: str
    dtype: torch.dtype
    facts: StudentFacts

    def write(
        self, pipe: DiffusionPipeline, lora: LoRA, adapter: str | None = None
    ) -> dict[str, Path]:
        """Write a LoRA, one file for each denoiser.

        Args:
            pipe: The pipeline that the LoRA was trained in.
            lora: The LoRA.
            adapter: Name of the files; None: the usual one of the format.

        Returns:
            The file of each denoiser.

        Raises:
            InputError: If the format does not support the pipeline.
        """
        files = {}
        for component, factors in lora.items():
            denoiser = denoisers(pipe)[component]
            state = to_state(factors, layout_of(self.format, component, denoiser), denoiser)
            # Alphas (0-dimensional) stay in float32: bfloat16 would round large ones.
            state = {k: t if t.ndim == 0 else t.to(self.dtype) for k, t in state.items()}
            path = files[component] = self._path(component, pipe, adapter)
            path.parent.mkdir(exist_ok=True)
            if self.format == "diffusers":
                self._save_with_diffusers(pipe, component, state, path)
            else:
                self._save(state, path)
            if self.format == "peft":
                self._save_peft_config(component, factors, pipe, path.parent)
        return files

    def _path(self, component: str, pipe: DiffusionPipeline, adapter: str | None) -> Path:
        names = list(denoisers(pipe))
        if self.format == "peft":
            folder = self.folder / component if len(names) > 1 else self.folder
            return folder / "adapter_model.safetensors"
        stem = "pytorch_lora_weights" if self.format == "diffusers" else f"{self.format}_lora"
        return self.folder / file_name(adapter or stem, component, names)

    def _save(self, state: dict[str, Tensor], path: str | Path) -> None:
        facts = json.dumps(self.facts.to_dict(), ensure_ascii=False)
        write_file(path, save(state, metadata={"format": "pt", METADATA_KEY: facts}))

    def _save_with_diffusers(
        self, pipe: DiffusionPipeline, component: str, state: dict[str, Tensor], path: Path
    ) -> None:
        """Save through the pipeline's own writer, as if every denoiser were the first one.

        The writer supports only one denoiser.
        """
        writer = getattr(pipe, "save_lora_weights", None)
        first = next(iter(denoisers(pipe)))
        if writer is None or f"{first}_lora_layers" not in inspect.signature(writer).parameters:
            raise InputError(
                f"{type(pipe).__name__} has no LoRA writer for its {first}; use format peft or "
                "merged"
            )
        layers = {key.removeprefix(f"{component}."): tensor for key, tensor in state.items()}
        writer(
            path.parent,
            weight_name=path.name,
            save_function=self._save,
            **{f"{first}_lora_layers": layers},
        )

    def _save_peft_config(
        self, component: str, factors: dict[str, Factors], pipe: DiffusionPipeline, folder: Path
    ) -> None:
        from peft import LoraConfig

        folded = {name: factor.folded() for name, factor in factors.items()}
        config = LoraConfig(**lora_config_fields({component: folded}, pipe))
        config.base_model_name_or_path = self.facts.base_model
        config.inference_mode = True
        config.save_pretrained(folder)
