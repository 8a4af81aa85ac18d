"""How near a student's draws are to its teacher's: torchmetrics classes, and their sum over rows.

A metric asks for what it measures by the names of its `update`'s arguments:

===================================  =============================================================
``preds``, ``img1``, ``images``      the student's images, (B, 3, H, W), float32, range [0, 1]
``target``, ``img2``                 the teacher's images of the same prompts and seeds
``imgs`` with ``real``               both, in two calls: the teacher's are the real ones
``latents``, ``target_latents``      final latents of both, (B, ...), float32
``undistilled_mse``                  the undistilled pipeline's latent MSE, (B,)
``loss``                             the training loss of each row, (B,)
``prompt``                           B texts
===================================  =============================================================

So the image metrics of torchmetrics (PSNR, SSIM, LPIPS, KID, ...) work as they are.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from lit_distill.features import TransformersFeatures, load_features


@dataclass
class Draws:
    """B held-out rows as drawn by student and teacher; what metrics may ask for by name.

    Attributes:
        prompt: B texts.
        latents: The student's final latents, (B, ...), float32; None where another pipeline, whose
            latents live in a space of their own, takes the student's place.
        target_latents: The teacher's.
        preds: The student's images, (B, 3, H, W), float32, range [0, 1]; None if nobody asks.
        target: The teacher's images.
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

    def select(self, rows: list[int]) -> Draws:
        """Return the rows at these positions."""
        chosen: dict[str, Any] = {"prompt": [self.prompt[row] for row in rows]}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                chosen[field.name] = value[rows]
        return Draws(**chosen)


def latent_mse(latents: Tensor, target_latents: Tensor) -> Tensor:
    """Return the mean squared error of each row, (B,)."""
    return (latents.float() - target_latents.float()).square().flatten(1).mean(1)


class RowMean(Metric):
    """Base of metrics that are a mean over rows; exact over any number of processes."""

    full_state_update = False
    total: Tensor
    rows: Tensor

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        # float64: sums of many rows, in whatever order, agree to the last digit that is shown.
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add one value a row, (B,)."""
        self.total += values.double().sum()
        self.rows += values.numel()

    def compute(self) -> Tensor:
        """Return the mean; NaN without rows."""
        return self.total / self.rows


class HeldOutLoss(RowMean):
    """The training loss on held-out rows."""

    higher_is_better = False

    def update(self, loss: Tensor) -> None:
        """Add the rows' losses, (B,)."""
        self.add(loss)


class LatentMSE(RowMean):
    """Mean squared error between final latents of student and teacher."""

    higher_is_better = False

    def update(self, latents: Tensor, target_latents: Tensor) -> None:
        """Add rows: both (B, ...)."""
        self.add(latent_mse(latents, target_latents))


class UndistilledLatentMSE(RowMean):
    """Mean squared error between final latents of the undistilled pipeline and the teacher."""

    higher_is_better = False

    def update(self, undistilled_mse: Tensor) -> None:
        """Add the rows' errors, (B,)."""
        self.add(undistilled_mse)


class Sharpness(Metric):
    """Gradient energy of the student's images over that of the teacher's: below 1 is blurred.

    ``sum |grad student|^2 / sum |grad teacher|^2``, gradients being differences of neighbouring
    pixels along both axes. Blur is the known weakness of regression on latents.
    """

    full_state_update = False
    student: Tensor
    teacher: Tensor

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        for name in ("student", "teacher"):
            self.add_state(name, torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, preds: Tensor, target: Tensor) -> None:
        """Add rows: both (B, 3, H, W), range [0, 1]."""
        self.student += self._energy(preds)
        self.teacher += self._energy(target)

    @staticmethod
    def _energy(images: Tensor) -> Tensor:
        return sum(
            (images.double().diff(dim=axis).square().sum() for axis in (-2, -1)),
            torch.zeros((), dtype=torch.float64, device=images.device),
        )

    def compute(self) -> Tensor:
        """Return the ratio; NaN without rows."""
        return self.student / self.teacher


class Diversity(Metric):
    """How far the student's images of one prompt lie apart, over how far the teacher's do.

    The mean, over all pairs of seeds of one prompt, of the root mean squared difference of two
    images reduced to `size` x `size` pixels. Below 1 seeds matter less than they did; NaN where no
    prompt has two seeds.

    Args:
        size: Edge in pixels to which images are reduced; small, since it is layout and colour
            that a student which ignores its seed gets wrong, and since every image is kept.
        **kwargs: Of `torchmetrics.Metric`.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, size: int = 32, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.size = size
        # Key of the prompt, student's and teacher's pixels of a row, all in one flat float32: that
        # is what torchmetrics can gather from processes of which some have no rows at all.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, prompt: list[str]) -> None:
        """Add rows: images (B, 3, H, W), range [0, 1], and their B prompts."""
        keys = [list(hashlib.sha256(text.encode()).digest()[:8]) for text in prompt]
        reduced = [F.adaptive_avg_pool2d(i.float(), self.size).flatten(1) for i in (preds, target)]
        parts = [torch.tensor(keys, dtype=torch.float32, device=preds.device), *reduced]
        self.rows.append(torch.cat(parts, 1).flatten())

    def compute(self) -> Tensor:
        """Return the ratio."""
        rows = dim_zero_cat(self.rows).view(-1, 8 + 6 * self.size**2)
        keys, images = rows[:, :8], rows[:, 8:].chunk(2, dim=1)
        groups = torch.unique(keys, dim=0, return_inverse=True)[1]
        student, teacher = (
            torch.cat([F.pdist(own[groups == group]) for group in groups.unique()]).mean()
            for own in images
        )
        return student / teacher


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance between features of the student's and of the teacher's images.

    torchmetrics' FID on features of one's choice, so that it needs no torch-fidelity. Compare
    values of the same rows and features only: few rows bias it upwards.

    Args:
        features: ``tiny-digits`` for the embedded pipeline; else hub id or folder of a vision
            network of transformers, e.g. ``facebook/dinov2-base``.
        **kwargs: Of `torchmetrics.Metric`.
    """

    def __init__(self, features: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(feature=load_features(features), **kwargs)

    def compute(self) -> Tensor:
        """Return the distance; NaN with fewer than two rows."""
        if self.fake_features_num_samples < 2:
            return torch.tensor(torch.nan)
        return super().compute()


class CLIPScore(RowMean):
    """Mean of ``100 max(0, cos(image, prompt))`` in a CLIP: whether prompts are still followed.

    Args:
        model_name_or_path: Hub id or folder of a CLIP of transformers.
        **kwargs: Of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(
        self,
        model_name_or_path: str = "openai/clip-vit-base-patch16",
        **kwargs: Any,  # noqa: ANN401
    ) -> None:
        super().__init__(**kwargs)
        self.network = TransformersFeatures(model_name_or_path)

    def update(self, preds: Tensor, prompt: list[str]) -> None:
        """Add rows: images (B, 3, H, W), range [0, 1], and their B prompts."""
        cosine = F.cosine_similarity(self.network(preds), self.network.encode_text(prompt))
        self.add(100 * cosine.clamp(min=0))


def default_metrics() -> dict[str, Metric]:
    """Return the metrics that need no further network."""
    return {
        "psnr": PeakSignalNoiseRatio(data_range=1.0),
        "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
        "sharpness": Sharpness(),
        "diversity": Diversity(),
    }


IMAGES = {"preds": "preds", "img1": "preds", "images": "preds", "target": "target"}
IMAGES |= {"img2": "target"}
"""Arguments of an `update` that are images, and the field of `Draws` they come from."""


def arguments(metric: Metric) -> list[str]:
    """Return the names of the arguments that the metric's `update` cannot do without."""
    parameters = inspect.signature(metric.update).parameters.values()
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is p.empty and p.kind not in kinds]


class Evaluation:
    """Metrics over held-out rows: of all rows, and, where these differ, a number of steps each.

    Args:
        metrics: Metrics by name; copied, their networks shared.

    Raises:
        TypeError: If a metric's `update` asks for something unknown.
    """

    def __init__(self, metrics: Mapping[str, Metric]) -> None:
        own: dict[str, Metric] = {"loss": HeldOutLoss(), "latent_mse": LatentMSE()}
        own["undistilled_latent_mse"] = UndistilledLatentMSE()
        self._metrics = {name: _copy(metric) for name, metric in (own | dict(metrics)).items()}
        self._by_steps: dict[int, dict[str, Metric]] = {}
        self._steps: int | None = None
        self._counted: set[int] = set()
        known = {field.name for field in fields(Draws)} | set(IMAGES)
        for name, metric in self._metrics.items():
            asked = arguments(metric)
            if asked != ["imgs", "real"] and not set(asked) <= known:
                raise TypeError(
                    f"metrics.{name}: {type(metric).__name__}.update asks for {asked}; known are "
                    f"{sorted(known)}, or imgs with real. Subclass it with an update of those"
                )

    @property
    def needs_images(self) -> bool:
        """Whether any metric looks at images."""
        asked = {argument for metric in self._metrics.values() for argument in arguments(metric)}
        return bool(asked & ({"imgs"} | set(IMAGES)))

    def describe(self) -> dict[str, str]:
        """Return the class of each metric."""
        return {n: f"{type(m).__module__}.{type(m).__name__}" for n, m in self._metrics.items()}

    def claim(self, keys: list[list[int]], rank: int) -> list[int]:
        """Return the positions of rows of `rank` that no process has counted before.

        With several processes some rows are drawn twice, so that all have work at every step.

        Args:
            keys: What tells rows apart: for each process those of its batch.
            rank: This process.
        """
        kept = []
        for process, batch in enumerate(keys):
            for position, key in enumerate(batch):
                if key not in self._counted and process == rank:
                    kept.append(position)
                self._counted.add(key)
        return kept

    def update(self, draws: Draws, num_inference_steps: int) -> None:
        """Add rows that share a number of steps; metrics that lack their inputs are left out."""
        if self._steps is None:
            self._steps = num_inference_steps
        if num_inference_steps != self._steps and not self._by_steps:
            # So far all rows had the same number: their own metrics are those of all.
            self._by_steps[self._steps] = {n: _copy(m) for n, m in self._metrics.items()}
        groups = [self._metrics]
        if self._by_steps:
            if num_inference_steps not in self._by_steps:
                fresh = {name: _copy(metric) for name, metric in self._metrics.items()}
                for metric in fresh.values():
                    metric.reset()
                self._by_steps[num_inference_steps] = fresh
            groups.append(self._by_steps[num_inference_steps])
        device = (draws.preds if draws.latents is None else draws.latents).device  # type: ignore[union-attr]
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            for metric in (metric for group in groups for metric in group.values()):
                _update(metric.to(device), draws)

    def compute(self) -> dict[str, float]:
        """Return the values over all processes, in plain numbers; what has none is left out.

        ``gap_closed`` is 1 - latent_mse / undistilled_latent_mse. Where rows differ in their number
        of steps there is a second value for each, ``<name>_<number>_steps``.
        """
        values = _compute(self._metrics)
        for steps, group in sorted(self._by_steps.items()):
            values |= {f"{name}_{steps}_steps": value for name, value in _compute(group).items()}
        return values

    def fresh(self) -> Evaluation:
        """Return an evaluation by the same metrics, without rows."""
        other = Evaluation(self._metrics)
        other.reset()
        return other

    def reset(self) -> None:
        """Forget all rows."""
        self._by_steps, self._steps = {}, None
        self._counted.clear()
        for metric in self._metrics.values():
            metric.reset()


def _copy(metric: Metric) -> Metric:
    """Copy a metric's state, but not the networks that it looks through."""
    networks = [child for child in metric.children() if not isinstance(child, Metric)]
    memo: dict[int, nn.Module] = {id(network): network for network in networks}
    return copy.deepcopy(metric, memo)


def _update(metric: Metric, draws: Draws) -> None:
    if not draws.prompt:  # all rows of this batch were counted before
        return
    names = arguments(metric)
    if names == ["imgs", "real"]:
        if draws.preds is not None:
            metric.update(draws.preds, real=False)
            metric.update(draws.target, real=True)
        return
    values = {name: getattr(draws, IMAGES.get(name, name)) for name in names}
    if all(value is not None for value in values.values()):
        metric.update(**values)


def _compute(metrics: Mapping[str, Metric]) -> dict[str, float]:
    with warnings.catch_warnings():
        # A process whose rows were all counted elsewhere has nothing to warn of.
        warnings.filterwarnings("ignore", message="The ``compute`` method of metric")
        values = {name: float(metric.compute()) for name, metric in metrics.items()}
    undistilled = values.pop("undistilled_latent_mse")
    gap = 1 - values["latent_mse"] / undistilled if undistilled > 0 else math.nan
    first = {name: values.pop(name) for name in ("loss", "latent_mse")}
    ordered = {**first, "undistilled_latent_mse": undistilled, "gap_closed": gap, **values}
    return {name: value for name, value in ordered.items() if not math.isnan(value)}
