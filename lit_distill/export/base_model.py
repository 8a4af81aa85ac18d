"""The base model of a student: loaded, and compared with the one that it was trained on."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

from lit_distill.adapters.lora_files import read_lora
from lit_distill.adapters.weights import fuse_lora, load_base_pipeline
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.loading import DTYPES
from lit_distill.pipelines.model_digest import component_digests
from lit_distill.pipelines.release import release

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


def base_digest(pipe: DiffusionPipeline) -> dict[str, str]:
    """Return a digest of each denoiser: its class, configuration, weights and their data type."""
    return component_digests(pipe, denoisers(pipe))


def load_checked_base(
    content: dict[str, Any],
    torch_dtype: torch.dtype | str | None = None,
    *,
    given: bool = False,
) -> tuple[DiffusionPipeline, dict[str, str]]:
    """Load the base model of a checkpoint, with the teacher's LoRA in it if there is one.

    Args:
        content: Content of the checkpoint.
        torch_dtype: Data type of its weights; default: that of training.
        given: Whether the user has named the base model.

    Returns:
        The pipeline, and the digests of the base model without LoRA; none in another data type
        than that of training.

    Raises:
        InputError: If it is not the model that the student was trained on.
    """
    hparams = content["hyper_parameters"]
    expected: dict[str, str] = content.get("lit_distill", {}).get("base_digest") or {}
    if hparams.get("quantization"):
        expected = {}  # quantised weights have other digests
    if not is_dtype(torch_dtype, hparams["torch_dtype"]):
        if expected:
            release(load_checked_base(content, given=given)[0])
        return load_base_pipeline(hparams, torch_dtype=torch_dtype), {}
    pipe = load_base_pipeline({**hparams, "teacher_lora": None})
    digests = base_digest(pipe)
    accepted = [digests]
    if hparams.get("teacher_lora"):
        fuse_lora(pipe, read_lora(hparams["teacher_lora"], pipe))
        accepted += [base_digest(pipe)] if expected else []
        given = True  # training digests the sum, whose last bits depend on the machine: only warn
    check_base(accepted, expected, hparams["pretrained_model_name_or_path"], given=given)
    return pipe, digests


def is_dtype(torch_dtype: torch.dtype | str | None, training: str) -> bool:
    """Return whether a data type is that of training, as None is."""
    return torch_dtype in (None, training, DTYPES[training])


def check_base(
    found: Sequence[dict[str, str]], expected: dict[str, str], name: str, *, given: bool
) -> None:
    """Compare a base model with the one that a student was trained on.

    Args:
        found: Digests of its denoisers; several if the model is known in several states.
        expected: Digests of the model in training; those that are missing are not compared.
        name: Hub id or folder of the model.
        given: Whether the user has named it; a difference is then only a warning.

    Raises:
        InputError: If a denoiser differs; names it.
    """
    changed = [
        component
        for component, digest in expected.items()
        if all(digests.get(component) != digest for digests in found)
    ]
    if not changed:
        return
    text = (
        f"{', '.join(changed)} of the base model {name} is not as it was when this student was "
        "trained: its weights or configuration have changed, and the student's images with them"
    )
    if given:
        warnings.warn(text, stacklevel=2)
        return
    raise InputError(
        f"{text}. Restore that version of {name}, or name the base model to use in "
        "load_student(..., base_model=...)"
    )
