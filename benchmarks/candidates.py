"""Losses that `quality.py` compares with those of the package.

They are not better, so the package does not contain them. Each is an example of how to write one.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill import DistillLoss, LatentCodec
from lit_distill.evaluation.feature_extractors import DigitReader, load_features


class Sum(DistillLoss):
    """Weighted sum of losses."""

    def __init__(self, losses: Sequence[DistillLoss], weights: Sequence[float]) -> None:
        super().__init__()
        self.losses = nn.ModuleList(losses)
        self.weights = weights
        self.needs_codec = any(loss.needs_codec for loss in losses)  # type: ignore[misc]

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return the sum, (B,)."""
        terms = zip(self.losses, self.weights, strict=True)
        return torch.stack([w * loss(student, target, codec) for loss, w in terms]).sum(0)


class Pixel(DistillLoss):
    """Mean squared error of the decoded images, times 10: about that of the latents."""

    needs_codec = True

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return 10 mean((decode(student) - decode(target))^2), (B,)."""
        assert codec is not None
        with torch.no_grad():
            wanted = codec.decode(target)
        return 10 * (codec.decode(student) - wanted).square().flatten(1).mean(1)


class Perceptual(DistillLoss):
    """LPIPS's distance through the embedded pipeline's digit reader: three layers, normalised.

    Zhang et al., arXiv:1801.03924, without learned weights.
    """

    needs_codec = True

    def __init__(self) -> None:
        super().__init__()
        reader = load_features("tiny-digits")
        assert isinstance(reader, DigitReader)
        self.body = reader.body

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return the distance, (B,)."""
        assert codec is not None
        with torch.no_grad():
            wanted = self.features(codec.decode(target))
        found = self.features(codec.decode(student))
        pairs = zip(found, wanted, strict=True)
        apart = [(one - two).square().sum(1).flatten(1).mean(1) for one, two in pairs]
        return torch.stack(apart).mean(0)

    def features(self, images: Tensor) -> list[Tensor]:
        """Return the normalised features of images (B, 3, H, W), range [0, 1]."""
        found, features = [], images * 2 - 1
        for layer in self.body:
            features = layer(features)
            if isinstance(layer, nn.MaxPool2d):
                found.append(F.normalize(features, dim=1))
        return found


class Frequency(DistillLoss):
    """Mean squared error with more weight on high spatial frequencies, against blur."""

    needs_codec = True

    def __init__(self, weight: float = 2.0) -> None:
        super().__init__()
        self.weight = weight

    def forward(self, student: Tensor, target: Tensor, codec: LatentCodec | None) -> Tensor:
        """Return mean((1 + weight r) |FFT(student - target)|^2); r is 1 at the Nyquist rate."""
        assert codec is not None
        error = codec.unpack(student - target) - codec.unpack(torch.zeros_like(target))
        height, width = error.shape[-2:]
        rows = torch.fft.fftfreq(height, device=error.device).abs()[:, None]
        columns = torch.fft.rfftfreq(width, device=error.device)[None]
        radius = (rows.square() + columns.square()).sqrt() * 2
        power = torch.fft.rfft2(error, norm="ortho").abs().square()
        return ((1 + self.weight * radius) * power).flatten(1).mean(1)
