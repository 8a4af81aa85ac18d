"""Evaluates metrics over held-out rows, each row once; any torchmetrics class can be a metric.

The names of a metric's `update` arguments decide what it gets:

===================================  =============================================================
``preds``, ``img1``, ``images``      the student's images, (B, 3, H, W), float32, range [0, 1]
``target``, ``img2``                 the teacher's images of the same prompts and seeds
``imgs`` with ``real``               both, in two calls; the teacher's are the real ones
``latents``, ``target_latents``      final latents of both, (B, ...), float32
``undistilled_mse``                  the undistilled pipeline's latent MSE, (B,)
``loss``                             the training loss of each row, (B,)
``prompt``                           the prompts, B strings
===================================  =============================================================

The image metrics of torchmetrics (PSNR, SSIM, LPIPS, KID, ...) work unchanged.
"""

from __future__ import annotations

import copy
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torchmetrics import Metric

from lit_distill.evaluation.metrics import HeldOutLoss, LatentMSE, UndistilledLatentMSE


@dataclass
class EvaluationBatch:
    """B held-out rows as sampled by student and teacher; metrics get its fields by name.

    Attributes:
        prompt: B prompts.
        latents: The student's final latents, (B, ...), float32; None if another pipeline, with
            latents in another space, takes the student's place.
        target_latents: The teacher's final latents, (B, ...), float32.
        preds: The student's images, (B, 3, H, W), float32, range [0, 1]; None if no metric needs
            images.
        target: The teacher's images, (B, 3, H, W), float32, range [0, 1].
        undistilled_mse: Latent MSE of the undistilled pipeline, (B,).
        loss: Training loss of each row, (B,).
    """

    prompt: list[str]
    latents: Tensor | None = None
    target_latents: Tensor | None = None
    preds: Tensor | None = None
    target: Tensor | None = None
    undistilled_mse: Tensor | None = None
    loss: Tensor | None = None

    def select(self, rows: list[int]) -> EvaluationBatch:
        """Return the rows at these positions."""
        selected: dict[str, Any] = {"prompt": [self.prompt[row] for row in rows]}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                selected[field.name] = value[rows]
        return EvaluationBatch(**selected)


IMAGES = {"preds": "preds", "img1": "preds", "images": "preds", "target": "target"}

IMAGES |= {"img2": "target"}
"""Arguments of `update` that are images, with the field of `EvaluationBatch` they come from."""


def arguments(metric: Metric) -> list[str]:
    """Return the names of the required arguments of the metric's `update`."""
    parameters = inspect.signature(metric.update).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


class Evaluation:
    """Metrics over all held-out rows and, where rows differ in steps, per number of steps.

    Args:
        metrics: Metrics by name. They are copied, but share their networks.

    Raises:
        TypeError: If a metric's `update` requires an unknown argument.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        standard: dict[str, Metric] = {"loss": HeldOutLoss(), "latent_mse": LatentMSE()}
        standard["undistilled_latent_mse"] = UndistilledLatentMSE()
        self._metrics = {n: _copy(metric) for n, metric in (standard | dict(metrics)).items()}
        self._by_steps: dict[int, dict[str, Metric]] = {}
        self._steps: int | None = None
        self._counted: set[int] = set()
        known = {field.name for field in fields(EvaluationBatch)} | set(IMAGES)
        for name, metric in self._metrics.items():
            required = arguments(metric)
            if required != ["imgs", "real"] and not set(required) <= known:
                raise TypeError(
                    f"metrics.{name}: {type(metric).__name__}.update asks for {required}; known "
                    f"arguments are {sorted(known)}, or imgs with real. Subclass it with an update "
                    "that takes these"
                )

    @property
    def needs_images(self) -> bool:
        """Whether any metric needs images."""
        required = {name for metric in self._metrics.values() for name in arguments(metric)}
        return bool(required & ({"imgs"} | set(IMAGES)))

    def describe(self) -> dict[str, str]:
        """Return the class of each metric."""
        return {n: f"{type(m).__module__}.{type(m).__name__}" for n, m in self._metrics.items()}

    def claim(self, keys: list[list[int]], rank: int) -> list[int]:
        """Return the positions of the rows of process `rank` that no process has counted before.

        With several processes some rows are sampled twice, so that all have work at every step.

        Args:
            keys: Identifiers of rows: for each process those of its batch.
            rank: This process.
        """
        new = []
        for process, batch in enumerate(keys):
            for position, key in enumerate(batch):
                if key not in self._counted and process == rank:
                    new.append(position)
                self._counted.add(key)
        return new

    def update(self, batch: EvaluationBatch, num_inference_steps: int) -> None:
        """Add rows that share a number of steps; metrics whose inputs are missing are skipped."""
        if self._steps is None:
            self._steps = num_inference_steps
        if num_inference_steps != self._steps and not self._by_steps:
            # So far all rows had the same number of steps: its metrics are those of all rows.
            self._by_steps[self._steps] = {n: _copy(m) for n, m in self._metrics.items()}
        groups = [self._metrics]
        if self._by_steps:
            if num_inference_steps not in self._by_steps:
                fresh = {name: _copy(metric) for name, metric in self._metrics.items()}
                for metric in fresh.values():
                    metric.reset()
                self._by_steps[num_inference_steps] = fresh
            groups.append(self._by_steps[num_inference_steps])
        device = (batch.preds if batch.latents is None else batch.latents).device  # type: ignore[union-attr]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for metric in (metric for group in groups for metric in group.values()):
                _update(metric.to(device), batch)

    def compute(self) -> dict[str, float]:
        """Return the values over all processes by name; metrics without a value are left out.

        ``gap_closed`` is 1 - latent_mse / undistilled_latent_mse. Where rows differ in their number
        of steps, each metric also has one value per number, ``<name>_<number>_steps``.
        """
        values = _compute(self._metrics)
        for steps, group in sorted(self._by_steps.items()):
            values |= {f"{name}_{steps}_steps": value for name, value in _compute(group).items()}
        return values

    def fresh(self, without_comparison: bool = False) -> Evaluation:
        """Return an evaluation with the same metrics and no rows.

        Args:
            without_comparison: Only with the metrics that need nothing but images and prompts: the
                teacher itself has values of these, too.
        """
        alone = {name for name, field in IMAGES.items() if field == "preds"} | {"prompt"}
        metrics = self._metrics.items()
        other = Evaluation(
            {n: m for n, m in metrics if not without_comparison or set(arguments(m)) <= alone}
        )
        other.reset()
        return other

    def reset(self) -> None:
        """Forget all rows."""
        self._by_steps, self._steps = {}, None
        self._counted.clear()
        for metric in self._metrics.values():
            metric.reset()


def _copy(metric: Metric) -> Metric:
    """Return a copy of a metric that shares its networks."""
    networks = [child for child in metric.children() if not isinstance(child, Metric)]
    memo: dict[int, nn.Module] = {id(network): network for network in networks}
    return copy.deepcopy(metric, memo)


def _update(metric: Metric, batch: EvaluationBatch) -> None:
    if not batch.prompt:  # all rows of this batch were counted before
        return
    names = arguments(metric)
    if names == ["imgs", "real"]:
        if batch.preds is not None:
            metric.update(batch.preds, real=False)
            metric.update(batch.target, real=True)
        return
    values = {name: getattr(batch, IMAGES.get(name, name)) for name in names}
    if all(value is not None for value in values.values()):
        metric.update(**values)


def _compute(metrics: Mapping[str, Metric]) -> dict[str, float]:
    with warnings.catch_warnings():
        # torchmetrics warns if a process has no rows, which is normal here.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        values = {name: float(metric.compute()) for name, metric in metrics.items()}
    undistilled = values.pop("undistilled_latent_mse")
    gap = 1 - values["latent_mse"] / undistilled if undistilled > 0 else math.nan
    first = {name: values.pop(name) for name in ("loss", "latent_mse")}
    ordered = {**first, "undistilled_latent_mse": undistilled, "gap_closed": gap, **values}
    return {name: value for name, value in ordered.items() if not math.isnan(value)}
