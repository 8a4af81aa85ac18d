"""Validation: held-out rows drawn, compared with the teacher, summed up and logged."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import Metric

from lit_distill.data.batch import Batch
from lit_distill.evaluation.evaluator import Evaluation, EvaluationBatch
from lit_distill.evaluation.metrics import latent_mse

if TYPE_CHECKING:
    from lit_distill.training.direct_distill import DirectDistill


class Validator:
    """What a `DirectDistill` does in validation and test, and what it remembers between them.

    Not a part of the module's tree: the metrics' networks stay out of checkpoints and of DDP.

    Args:
        metrics: Metrics by name.

    Attributes:
        evaluation: Sums up the metrics.
        undistilled_mse: Latent MSE of the undistilled pipeline by `row_keys`, of all processes'
            rows: these have to agree on whether to draw.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        self.evaluation = Evaluation(metrics)
        self.undistilled_mse: dict[int, float] = {}
        self._online: dict[int, Tensor] = {}
        self._started = 0.0

    def start(self) -> None:
        """Start the clock."""
        self._started = time.perf_counter()

    @torch.no_grad()
    def step(self, module: DirectDistill, batch: Batch) -> dict[str, Any]:
        """Draw held-out rows and add them to the evaluation, each row once over all processes.

        Returns:
            ``draws``, an `EvaluationBatch`, and ``new``, the positions of rows that count.
        """
        keys = _gather(module, torch.tensor(row_keys(batch), device=module.device))
        target = self._target(module, batch, keys[module.global_rank].tolist())
        latents = module.student_rollout(batch).float()
        loss = module.compare(latents, target, batch)
        draws = EvaluationBatch(batch["prompt"], latents, target, loss=loss)
        draws.undistilled_mse = self._undistilled(module, batch, target, keys)
        if self.evaluation.needs_images:
            draws.preds, draws.target = module.decode(latents, batch), module.decode(target, batch)
        new = self.evaluation.claim(keys.tolist(), module.global_rank)
        self.evaluation.update(draws.select(new), batch["num_inference_steps"])
        return {"samples": draws, "new": new}

    def finish(self, module: DirectDistill, stage: str) -> None:
        """Log the values of all rows as ``<stage>_<name>``, and the seconds that it took."""
        values = {f"{stage}_{name}": value for name, value in self.evaluation.compute().items()}
        self.evaluation.reset()
        module.release_undistilled()
        values[f"{stage}_seconds"] = time.perf_counter() - self._started
        gap = values.pop(f"{stage}_gap_closed", math.nan)
        # The values are of all rows already; their mean over processes is themselves.
        module.log_dict(values, sync_dist=True)
        module.log(f"{stage}_gap_closed", gap, prog_bar=True, sync_dist=True)
        trainer = module.trainer
        if trainer.sanity_checking and trainer.num_sanity_val_batches == trainer.num_val_batches:
            # Lightning forgets this validation, but it is where the curves start.
            for logger in trainer.loggers:
                logger.log_metrics(values | {f"{stage}_gap_closed": gap}, module.global_step)

    def _target(self, module: DirectDistill, batch: Batch, keys: list[int]) -> Tensor:
        """Return the teacher's latents; the online teacher draws a held-out row only once."""
        if any(batch[kind] is not None for kind in ("latents", "encoded", "image")):
            return module.teacher_target(batch)
        if any(key not in self._online for key in keys):
            self._online.update(zip(keys, module.teacher_target(batch).cpu(), strict=True))
        return torch.stack([self._online[key] for key in keys]).to(module.device)

    def _undistilled(
        self, module: DirectDistill, batch: Batch, target: Tensor, keys: Tensor
    ) -> Tensor:
        """Return the undistilled pipeline's latent MSE of each row, (B,); drawn once a row."""
        known, rows = self.undistilled_mse, keys.flatten().tolist()
        if any(key not in known for key in rows):
            with module.undistilled():
                error = latent_mse(module.student_rollout(batch), target)
            known.update(zip(rows, _gather(module, error).flatten().tolist(), strict=True))
        kept = [known[key] for key in keys[module.global_rank].tolist()]
        return torch.tensor(kept, device=module.device)


def row_keys(batch: Batch) -> list[int]:
    """Return what tells the batch's held-out rows apart, also from those of another table."""
    shared = (batch["num_inference_steps"], batch["cfg_scale"], batch["size"])
    rows = zip(batch["row"], batch["prompt"], batch["seed"], strict=True)
    digests = [hashlib.sha256(repr((*row, *shared)).encode()).digest() for row in rows]
    return [int.from_bytes(digest[:7], "big") for digest in digests]


def _gather(module: DirectDistill, values: Tensor) -> Tensor:
    """Return (processes, B) of the (B,) of each."""
    gathered: Tensor = module.all_gather(values)  # type: ignore[assignment]
    return gathered.reshape(-1, len(values))
