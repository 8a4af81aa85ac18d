"""Metrics of how close the student's samples are to the teacher's, as torchmetrics classes.

`lit_distill.evaluation.evaluator` lists the arguments that an `update` may have.
"""

from __future__ import annotations

import hashlib
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.image import PeakSignalNoiseRatio, StructuralSimilarityIndexMeasure
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.utilities import dim_zero_cat

from lit_distill.errors import InputError
from lit_distill.evaluation.feature_extractors import (
    LETTERS,
    WORD_LENGTH,
    TransformersFeatures,
    load_features,
    load_word_reader,
)


def latent_mse(latents: Tensor, target_latents: Tensor) -> Tensor:
    """Return the mean squared error of each row, (B,), of latents (B, ...)."""
    return (latents.float() - target_latents.float()).square().flatten(1).mean(1)


class RowMean(Metric):
    """Base of metrics that are a mean over rows; exact with any number of processes."""

    full_state_update = False
    total: Tensor
    rows: Tensor

    def __init__(self, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        # In float64, sums of many rows in any order agree in all digits that are shown.
        self.add_state("total", torch.tensor(0.0, dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")

    def add(self, values: Tensor) -> None:
        """Add one value per row, (B,)."""
        self.total += values.double().sum()
        self.rows += values.numel()

    def compute(self) -> Tensor:
        """Return the mean; NaN without rows."""
        return self.total / self.rows


class HeldOutLoss(RowMean):
    """The training loss on held-out rows."""

    higher_is_better = False

    def update(self, loss: Tensor) -> None:
        """Add the losses of rows, (B,)."""
        self.add(loss)


class LatentMSE(RowMean):
    """Mean squared error between final latents of student and teacher."""

    higher_is_better = False

    def update(self, latents: Tensor, target_latents: Tensor) -> None:
        """Add the latents of rows, both (B, ...)."""
        self.add(latent_mse(latents, target_latents))


class UndistilledLatentMSE(RowMean):
    """Mean squared error between final latents of the undistilled pipeline and the teacher."""

    higher_is_better = False

    def update(self, undistilled_mse: Tensor) -> None:
        """Add the errors of rows, (B,)."""
        self.add(undistilled_mse)


class Sharpness(Metric):
    """Gradient energy of the student's images relative to the teacher's; below 1: blurred.

    ``sum |grad student|^2 / sum |grad teacher|^2``, where gradients are differences of neighbouring
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
        """Add the images of rows, both (B, 3, H, W), range [0, 1]."""
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
    """Distance between the student's images of one prompt, relative to the teacher's.

    The distance is the mean, over all pairs of seeds of a prompt, of the root mean squared
    difference of two images reduced to `size` x `size` pixels. Below 1 the seed changes the
    student's images less than the teacher's. NaN if no prompt has two seeds.

    Args:
        size: Width and height in pixels to which images are reduced. A small size suffices, since
            a student that ignores its seed fails in layout and colour, and it saves memory, since
            every image is kept.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    full_state_update = False
    rows: list[Tensor]

    def __init__(self, size: int = 32, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.size = size
        # A row is the prompt's key, the student's and the teacher's pixels in one flat float32
        # tensor, which torchmetrics can gather even if some processes have no rows.
        self.add_state("rows", [], dist_reduce_fx="cat")

    def update(self, preds: Tensor, target: Tensor, prompt: list[str]) -> None:
        """Add the images of rows, (B, 3, H, W), range [0, 1], and their B prompts."""
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
            torch.cat([F.pdist(pixels[groups == group]) for group in groups.unique()]).mean()
            for pixels in images
        )
        return student / teacher


class FrechetDistance(FrechetInceptionDistance):
    """Frechet distance between features of the student's and of the teacher's images.

    It is torchmetrics' FID with features of your choice and does not need torch-fidelity. Compare
    only values of the same rows and features: with few rows it is biased upwards.

    Args:
        features: ``tiny-digits`` or ``tiny-words`` for the embedded pipelines; else hub id or
            folder of a vision network of transformers, e.g. ``facebook/dinov2-base``.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    def __init__(self, features: str, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(feature=load_features(features), **kwargs)

    def compute(self) -> Tensor:
        """Return the distance; NaN with fewer than two rows."""
        if self.fake_features_num_samples < 2:
            return torch.tensor(torch.nan)
        return super().compute()


class CLIPScore(RowMean):
    """Mean of ``100 max(0, cos(image, prompt))`` of CLIP embeddings: how well prompts are followed.

    Args:
        model_name_or_path: Hub id or folder of a CLIP model of transformers.
        **kwargs: Arguments of `torchmetrics.Metric`.
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
        """Add the images of rows, (B, 3, H, W), range [0, 1], and their B prompts."""
        cosine = F.cosine_similarity(self.network(preds), self.network.encode_text(prompt))
        self.add(100 * cosine.clamp(min=0))


class Legibility(RowMean):
    """Share of the letters, or whole words, of tiny-words that a classifier reads as prompted.

    Prompts spell their word, as in ``T-R-E-E in red serif on white``.

    Args:
        whole_words: Count words whose four letters are all read right, instead of letters.
        **kwargs: Arguments of `torchmetrics.Metric`.
    """

    higher_is_better = True

    def __init__(self, whole_words: bool = False, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(**kwargs)
        self.whole_words = whole_words
        self.reader = load_word_reader()

    def update(self, preds: Tensor, prompt: list[str]) -> None:
        """Add the images of rows, (B, 3, 32, 64), range [0, 1], and their B prompts.

        Raises:
            InputError: If a prompt does not begin with a spelled word.
        """
        truth = torch.tensor([_spelled(text) for text in prompt], device=preds.device)
        right = (self.reader.read(preds.float()).argmax(-1) == truth).float()
        self.add(right.prod(1) if self.whole_words else right.mean(1))


def _spelled(prompt: str) -> list[int]:
    """Return the positions in `LETTERS` of the word that a prompt of tiny-words spells."""
    letter = f"[{LETTERS}]"
    match = re.match(f"{letter}(-{letter}){{{WORD_LENGTH - 1}}}(?= |$)", prompt)
    if match is None:
        raise InputError(
            f"Legibility reads what tiny-words draws, but the prompt {prompt!r} spells no word of "
            f"{WORD_LENGTH} letters of {LETTERS}; write prompts like 'T-R-E-E in red serif on "
            "white', or leave the metric out"
        )
    return [LETTERS.index(letter) for letter in match[0].split("-")]


def default_metrics() -> dict[str, Metric]:
    """Return the metrics that need no additional network."""
    return {
        "psnr": PeakSignalNoiseRatio(data_range=1.0),
        "ssim": StructuralSimilarityIndexMeasure(data_range=1.0),
        "sharpness": Sharpness(),
        "diversity": Diversity(),
    }
