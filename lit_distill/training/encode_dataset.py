"""Encodes the prompts and images of a data set before training, and frees the encoders."""

from __future__ import annotations

from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING

import lightning.pytorch as pl
from torch import nn

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.encoding.collate import EncodingCollateError
from lit_distill.encoding.encode_ahead import encode_ahead
from lit_distill.encoding.encode_once import EncodeOnce, encoded_image
from lit_distill.encoding.store import EncodingStore
from lit_distill.pipelines.components import denoisers
from lit_distill.preflight.probe import half_size, other_prompt, trial_arguments
from lit_distill.training.first_row import preflight_call
from lit_distill.training.placement import place_encoders

if TYPE_CHECKING:
    from lit_distill.training.student import Student


def encode_dataset(
    student: Student,
    data: DistillDataModule | None,
    trainer: pl.Trainer | None,
    *,
    always_guided: bool = False,
) -> nn.Module | None:
    """Encode every prompt and image only once: at first use, or now if the data has a cache_dir.

    Args:
        student: The student, whose encoders are replaced.
        data: The rows to train on, if training is about to begin.
        trainer: Its trainer.
        always_guided: Whether the guided teacher is asked about rows with a target, too.

    Returns:
        The VAE, in host memory, if the encoders were released; else None.
    """
    pipe = student.pipe
    if data is None or data.cache_dir is None:
        EncodeOnce(pipe)
        return None
    assert trainer is not None
    device = trainer.strategy.root_device
    if student.settings.quantization:
        # bitsandbytes has put them on the GPU already, where the encoders need the room now.
        for denoiser in denoisers(pipe).values():
            denoiser.to("cpu")
    place_encoders(pipe, device)
    once = EncodeOnce(pipe, EncodingStore(data.cache_dir))
    student.encoders_digest = once.namespace
    given = (data.train_set, data.val_set, data.sample_set)
    datasets = [dataset for dataset in given if dataset is not None]
    encode_ahead(
        once,
        datasets,
        student.call,
        student.settings.teacher_cfg_scale,
        always_guided=always_guided,
        rank=trainer.global_rank,
        world_size=trainer.world_size,
        barrier=trainer.strategy.barrier,
    )
    _encode_preflight(once, student, data)
    for dataset in datasets:
        dataset.encoded = partial(encoded_image, once.store, once.namespace)
    vae: nn.Module | None = once.release(device)
    return vae


def _encode_preflight(once: EncodeOnce, student: Student, data: DistillDataModule) -> None:
    """Encode the prompts that preflight is going to sample."""
    call = preflight_call(student, data)
    prompt = call.pop("prompt")
    for size in ({}, half_size(call)):
        for prompts in ([prompt], [prompt, other_prompt(prompt)]):
            with suppress(EncodingCollateError):  # preflight reports it
                once.populate(cfg_scale=1.0, **trial_arguments(prompts, **call | size))
    once.store.flush()
