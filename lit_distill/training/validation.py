"""Validation: held-out rows sampled, compared with the teacher, summarised and logged."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from contextlib import AbstractContextManager
from typing import Any, Protocol

import lightning.pytorch as pl
import torch
from PIL import Image
from torch import Tensor
from torchmetrics import Metric

from lit_distill.data.batch import TARGETS, Batch, has_target
from lit_distill.evaluation.evaluator import Evaluation, EvaluationBatch
from lit_distill.evaluation.metrics import latent_mse
from lit_distill.pipelines.model_digest import tensor_digest
from lit_distill.training.student import Student


class ValidatedModule(Protocol):
    """What validation calls; `DirectDistill` has it."""

    student: Student

    @property
    def device(self) -> torch.device:
        """Where the denoisers are."""

    @property
    def global_rank(self) -> int:
        """Number of this process."""

    def all_gather(self, data: Any) -> Any:  # noqa: ANN401
        """Return a tensor of every process, stacked if there are several."""

    def teacher_target(self, batch: Batch) -> Tensor:
        """Return the teacher's final latents, (B, ...), float32."""

    def student_rollout(self, batch: Batch) -> Tensor:
        """Return the student's final latents, (B, ...)."""

    def compare(self, latents: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Return the loss of each sample, (B,)."""

    def undistilled(self) -> AbstractContextManager[None]:
        """Let `student_rollout` use the pretrained weights until the context is left."""

    def decode(self, latents: Tensor, batch: Batch) -> Tensor:
        """Return images, (B, 3, H, W), float32, range [0, 1]."""


class Validator:
    """Compares student and undistilled pipeline with the teacher, and keeps what does not change.

    Not a part of the module's tree: the metrics' networks stay out of checkpoints and of DDP.

    Args:
        metrics: Metrics by name.

    Attributes:
        evaluation: Summarises the metrics.
        undistilled_mse: Latent MSE of the undistilled pipeline by `row_keys`, of all processes'
            rows: these have to agree on whether to sample it.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.evaluation = Evaluation(metrics)
        self.undistilled_mse: dict[int, float] = {}
        self._online_targets: dict[int, Tensor] = {}
        self._started = 0.0

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    @torch.no_grad()
    def step(self, module: ValidatedModule, batch: Batch) -> dict[str, Any]:
        """Sample held-out rows and add them to the evaluation, each row once over all processes.

        Returns:
            ``samples``, an `EvaluationBatch`; ``new``, the positions of rows that count;
            ``undistilled``, latents of the undistilled pipeline, or None where its error is known;
            and ``seconds``, the time of ``student`` (with decoding, if images are needed) and
            ``undistilled`` (without).
        """
        own = row_keys(batch, module.student.digest())
        keys = _gather(module, torch.tensor(own, device=module.device))
        samples = EvaluationBatch(batch["prompt"], target_latents=self._target(module, batch, own))
        target = samples.target_latents
        assert target is not None
        if self.evaluation.needs_images:  # learns the codec, whose time is not the student's
            samples.target = module.decode(target, batch)
        clock = _Clock(module.device)
        samples.latents = latents = module.student_rollout(batch).float()
        if self.evaluation.needs_images:
            samples.preds = module.decode(latents, batch)
        seconds = {"student": clock.seconds()}
        samples.loss = module.compare(latents, target, batch)
        clock = _Clock(module.device)
        undistilled = self._undistilled(module, batch, target, keys)
        seconds["undistilled"] = clock.seconds()
        kept = [self.undistilled_mse[key] for key in keys[module.global_rank].tolist()]
        samples.undistilled_mse = torch.tensor(kept, device=module.device)
        new = self.evaluation.claim(keys.tolist(), module.global_rank)
        self.evaluation.update(samples.select(new), batch["num_inference_steps"])
        return {"samples": samples, "new": new, "undistilled": undistilled, "seconds": seconds}

    def log(self, module: pl.LightningModule, stage: str) -> dict[str, float]:
        """Log the values of all rows as ``<stage>_<name>``, and the seconds taken; start anew.

        Returns:
            What was logged.
        """
        values = {f"{stage}_{name}": value for name, value in self.evaluation.compute().items()}
        self.evaluation.reset()
        values[f"{stage}_seconds"] = time.perf_counter() - self._started
        gap = values.pop(f"{stage}_gap_closed", math.nan)
        # The values are of all rows already; their mean over processes is themselves.
        module.log_dict(values, sync_dist=True)
        module.log(f"{stage}_gap_closed", gap, prog_bar=True, sync_dist=True)
        trainer = module.trainer
        if trainer.sanity_checking and trainer.num_sanity_val_batches == trainer.num_val_batches:
            # Lightning discards this validation, but it is the first point of the curves.
            for logger in trainer.loggers:
                logger.log_metrics(values | {f"{stage}_gap_closed": gap}, module.global_step)
        return values | {f"{stage}_gap_closed": gap}

    def _target(self, module: ValidatedModule, batch: Batch, keys: list[int]) -> Tensor:
        """Return the teacher's latents; the online teacher generates a held-out row only once."""
        if has_target(batch):
            return module.teacher_target(batch)
        known = self._online_targets
        if any(key not in known for key in keys):
            known.update(zip(keys, module.teacher_target(batch).cpu(), strict=True))
        return torch.stack([known[key] for key in keys]).to(module.device)

    def _undistilled(
        self, module: ValidatedModule, batch: Batch, target: Tensor, keys: Tensor
    ) -> Tensor | None:
        """Sample the undistilled pipeline, once a row, and note its latent MSE.

        Returns:
            Its latents, (B, ...); None if all rows' errors are known.
        """
        known, rows = self.undistilled_mse, keys.flatten().tolist()
        if all(key in known for key in rows):
            return None
        with module.undistilled():
            latents = module.student_rollout(batch)
        errors = _gather(module, latent_mse(latents, target))
        known.update(zip(rows, errors.flatten().tolist(), strict=True))
        return latents


class _Clock:
    """Measures wall time, the device's work included."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.started = self._now()

    def seconds(self) -> float:
        """Return the time since it was made."""
        return self._now() - self.started

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def row_keys(batch: Batch, sampling: str = "") -> list[int]:
    """Return keys of the batch's rows, by all that their samples and targets depend on.

    The content of the targets and of pictures counts: a row may be generated again with other
    settings of the teacher, but the same prompt and seed.

    Args:
        batch: The rows.
        sampling: What the samples depend on beside their rows: see `Student.digest`.
    """
    fields = ("rand_device", "num_inference_steps", "cfg_scale", "size")
    shared = (sampling, *(batch[name] for name in fields))  # type: ignore[literal-required]
    keys = []
    for index, row in enumerate(zip(batch["row"], batch["prompt"], batch["seed"], strict=True)):
        targets = [_content(batch[name], index) for name in TARGETS]  # type: ignore[literal-required]
        call = {name: _content(value, index) for name, value in sorted(batch["call"].items())}
        digest = hashlib.sha256(repr((row, shared, targets, call)).encode()).digest()
        keys.append(int.from_bytes(digest[:7], "big"))
    return keys


def _content(values: Any, index: int) -> str:  # noqa: ANN401
    """Return what identifies a row's entry of a batch's values, or the value for all rows."""
    value = values[index] if isinstance(values, list | Tensor) else values
    if isinstance(value, Tensor):
        return tensor_digest(value)
    if isinstance(value, Image.Image):
        return f"{value.mode}{value.size}{hashlib.sha256(value.tobytes()).hexdigest()}"
    return repr(value)


def _gather(module: ValidatedModule, values: Tensor) -> Tensor:
    """Return (processes, B) of the (B,) of each."""
    gathered: Tensor = module.all_gather(values)
    return gathered.reshape(-1, len(values))
