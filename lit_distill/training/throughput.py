"""Logs the speed and memory of training."""

from __future__ import annotations

import math
import resource
import time
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.fabric.utilities.throughput import get_available_flops
from lightning.pytorch.callbacks import Callback
from torch.utils.flop_counter import FlopCounterMode

from lit_distill.data.batch import Batch, split_batch
from lit_distill.errors import InputError
from lit_distill.planning.counter import CPU_ATTENTION
from lit_distill.training.direct_distill import DirectDistill


class TrainingMonitor(Callback):
    """Logs images/s, tokens/s, model FLOP utilisation and peak memory, over all processes.

    A token is one position of the latents in one denoiser call: an image of 16 tokens, generated in
    4 steps without guidance, counts 64. Model FLOPs are those of the forward pass, counted once for
    each size, number of steps and guidance, plus those of the backward pass. A backward pass costs
    twice a forward pass in full training, and as much as one with a LoRA, whose frozen weights need
    no gradient. Recomputation for activation checkpointing is not counted. Lightning's
    `ThroughputMonitor` assumes batches of one size.

    Args:
        every_n_steps: Optimizer steps that are averaged.
        peak_flops: Floating point operations per second of one device; null: Lightning's figure for
            this device and data type. If neither is known, utilisation is not logged.

    Raises:
        ValueError: If `every_n_steps` is not positive.
    """

    def __init__(self, every_n_steps: int = 10, peak_flops: float | None = None) -> None:
        if every_n_steps < 1:
            raise InputError(f"TrainingMonitor: every_n_steps must be >= 1, got {every_n_steps}")
        self.every_n_steps = every_n_steps
        self.peak_flops = peak_flops
        self._counts: dict[tuple[Any, ...], tuple[int, float]] = {}
        self._reset()

    def _reset(self) -> None:
        self._images, self._tokens, self._flops, self._steps = 0, 0, 0.0, 0
        self._started = time.perf_counter()

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Look up the device's peak."""
        assert isinstance(pl_module, DirectDistill)
        if self.peak_flops is None:
            dtype = getattr(torch, pl_module.settings.torch_dtype)
            self.peak_flops = get_available_flops(pl_module.device, dtype)
        self._reset()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Start a new measurement: validation is not training."""
        self._reset()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Batch,
        batch_idx: int,
    ) -> None:
        """Add a batch; log after every `every_n_steps` optimizer steps."""
        assert isinstance(pl_module, DirectDistill)
        tokens, flops = self._count(pl_module, batch)
        rows = len(batch["row"])
        self._images += rows
        self._tokens += rows * tokens
        self._flops += rows * flops
        if trainer.fit_loop._should_accumulate():
            return
        self._steps += 1
        if self._steps == self.every_n_steps:
            self._log(trainer, pl_module)
            self._reset()

    def _log(self, trainer: pl.Trainer, module: DirectDistill) -> None:
        cuda = module.device.type == "cuda"
        if cuda:
            torch.cuda.synchronize(module.device)
        seconds = time.perf_counter() - self._started
        speed = {
            "images_per_second": self._images * trainer.world_size / seconds,
            "tokens_per_second": self._tokens * trainer.world_size / seconds,
        }
        if self.peak_flops:
            speed["model_flops_utilisation"] = self._flops / seconds / self.peak_flops
        if cuda:
            speed["peak_memory_GiB"] = torch.cuda.max_memory_allocated(module.device) / 2**30
        else:  # kilobytes on Linux
            speed["peak_memory_GiB"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        module.log_dict(speed, on_step=True, on_epoch=False)

    def _count(self, module: DirectDistill, batch: Batch) -> tuple[int, float]:
        """Return tokens and model FLOPs of an image of this batch."""
        key = (batch["size"], batch["num_inference_steps"], batch["cfg_scale"] > 1)
        if key not in self._counts:
            started = time.perf_counter()
            # Eagerly, because the operations of compiled blocks can't be counted.
            eager = torch.compiler.set_stance("force_eager")
            counter = FlopCounterMode(display=False, custom_mapping=CPU_ATTENTION)
            with torch.no_grad(), eager, counter:
                latents = module.student_rollout(split_batch(batch, 1)[0])
            self._started += time.perf_counter() - started
            backward = 2 if module.settings.lora is None else 1
            share = min(1.0, (module.settings.grad_steps or math.inf) / key[1])
            tokens = _positions(module, latents) * key[1] * (2 if key[2] else 1)
            self._counts[key] = tokens, counter.get_total_flops() * (1 + backward * share)
        return self._counts[key]


def _positions(module: DirectDistill, latents: torch.Tensor) -> int:
    """Return the number of tokens that the denoiser makes of one image's latents."""
    if latents.dim() == 3:  # packed: (B, tokens, channels)
        return latents.shape[1]
    patch = getattr(next(iter(module.denoisers.values())).config, "patch_size", 1)
    patch = math.prod(patch) if isinstance(patch, list | tuple) else patch**2
    return latents[0, 0].numel() // patch
