"""Losses and objectives that `quality.py` compares with those of the package.

They are not better, so the package does not contain them. Each is an example of how to write one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill import DirectDistill, DistillLoss, LatentCodec, Losses, rollout
from lit_distill.data.batch import Batch
from lit_distill.evaluation.feature_extractors import DigitReader, load_features
from lit_distill.pipelines.hooks import replaced_forward


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


class _SeenError(Exception):
    """Stops a pipeline once the arguments of its denoiser's calls are known."""


class Consistency(DirectDistill):
    """Trajectory-segmented consistency distillation, as in Hyper-SD (arXiv:2404.13686).

    Within each of the student's steps, the jump from one of the teacher's noise levels to the
    end of the step should equal the jump from the teacher's next noise level. The second jump is
    made by a moving average of the student, from where the guided teacher's step leads. For LoRA
    and flow matching.

    Args:
        decay: Of the moving average.
        **options: Of `DirectDistill`.
    """

    def __init__(self, decay: float = 0.95, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.decay = decay
        self._copy: dict[str, Tensor] = {}
        self._schedules: dict[int, Tensor] = {}

    def losses(self, batch: Batch) -> Losses:
        """Return the mean squared difference of the two jumps."""
        clean = self.teacher_target(batch)
        noise = torch.randn_like(clean)
        prompted, unprompted = self._arguments(batch)
        ends = self._levels(batch, batch["num_inference_steps"])
        levels = self._levels(batch, self.hparams["teacher_num_inference_steps"])
        start = int(torch.randint(len(levels) - 1, ()))
        high, low = levels[start], levels[start + 1]
        end = ends[ends < high].max().minimum(low)
        noisy = (1 - high) * clean + high * noise
        with torch.no_grad(), self.undistilled():
            guided, free = (self._velocity(noisy, high, a) for a in (prompted, unprompted))
            scale = self.hparams["teacher_cfg_scale"]
            combined = free + scale * (guided - free)
            # Qwen-Image rescales the guided velocity to the norm of the unguided one.
            combined = combined * guided.norm(dim=-1, keepdim=True)
            combined = combined / (free + scale * (guided - free)).norm(dim=-1, keepdim=True)
            lower = noisy + (low - high) * combined
        with torch.no_grad(), self._following():
            target = lower + (end - low) * self._velocity(lower, low, prompted)
        jump = noisy + (end - high) * self._velocity(noisy, high, prompted)
        return Losses((jump - target).square().flatten(1).mean(1))

    def _arguments(self, batch: Batch) -> list[dict[str, Any]]:
        """Return the arguments of the denoiser's calls with prompt and without."""
        seen: list[dict[str, Any]] = []

        def look(*args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
            seen.append(kwargs)
            if len(seen) == 2:
                raise _SeenError
            return (torch.zeros_like(kwargs["hidden_states"]),)  # type: ignore[return-value]

        with replaced_forward(self.pipe.transformer, look), suppress(_SeenError), torch.no_grad():
            rollout(
                self.pipe,
                num_inference_steps=2,
                cfg_scale=self.hparams["teacher_cfg_scale"],
                **self.student.call(batch),
            )
        return seen

    def _levels(self, batch: Batch, steps: int) -> Tensor:
        """Return the sigmas of a schedule at this size, (steps + 1,)."""
        if steps not in self._schedules:
            found: list[Tensor] = []

            def look(*args: Any, **kwargs: Any) -> None:  # noqa: ANN401
                found.append(self.pipe.scheduler.sigmas.clone())
                raise _SeenError

            with replaced_forward(self.pipe.transformer, look), suppress(_SeenError):
                rollout(self.pipe, num_inference_steps=steps, **self.student.call(batch))
            self._schedules[steps] = found[0]
        return self._schedules[steps]

    def _velocity(self, latents: Tensor, sigma: Tensor, arguments: dict[str, Any]) -> Tensor:
        given = {"hidden_states": latents, "timestep": sigma.expand(len(latents))}
        velocity: Tensor = self.pipe.transformer(**{**arguments, **given})[0]
        return velocity

    @contextmanager
    def _following(self) -> Iterator[None]:
        """Update the moving average, and use it in place of the trained weights."""
        own = {name: p.detach().clone() for name, p in self.trained().items()}
        if not self._copy:
            self._copy = {name: value.clone() for name, value in own.items()}
        for name, value in self._copy.items():
            value.lerp_(own[name], 1 - self.decay)
        for name, parameter in self.trained().items():
            parameter.data = self._copy[name]
        try:
            yield
        finally:
            for name, parameter in self.trained().items():
                parameter.data = own[name]


class Adversarial(DirectDistill):
    """Direct Distillation plus a discriminator on frozen features, as in ADD (arXiv:2311.17042).

    Hinge losses, one head for each layer of the embedded pipeline's digit reader, and an R1
    penalty on the features of the teacher's images.

    Args:
        weight: Of the generator's loss beside the latents' mean squared error.
        penalty: Of R1.
        **options: Of `DirectDistill`.
    """

    def __init__(self, weight: float = 0.02, penalty: float = 0.01, **options: Any) -> None:  # noqa: ANN401
        super().__init__(**options)
        self.weight, self.penalty = weight, penalty
        features = Perceptual()
        heads = nn.ModuleList(
            nn.Sequential(nn.Conv2d(width, 32, 1), nn.LeakyReLU(0.2), nn.Conv2d(32, 1, 1))
            for width in (16, 32, 64)
        )
        # Lists, so that neither is among what the student saves and trains.
        self._networks = [features, heads]
        self._optimizer = torch.optim.AdamW(heads.parameters(), lr=1e-3, betas=(0.0, 0.99))

    def losses(self, batch: Batch) -> Losses:
        """Train the discriminator for one step and return the student's losses."""
        features, heads = self._networks
        target = self.teacher_target(batch)
        latents = self.student_rollout(batch)
        codec = self.codec(batch)
        drawn = features.features(codec.decode(latents))
        with torch.no_grad():
            real = features.features(codec.decode(target))
        real = [feature.requires_grad_() for feature in real]
        scores = _scores(heads, real)
        slopes = torch.autograd.grad(scores.sum(), real, create_graph=True)
        steepness = sum(slope.square().flatten(1).sum(1) for slope in slopes)
        fake = _scores(heads, [feature.detach() for feature in drawn])
        loss = F.relu(1 - scores).mean(1) + F.relu(1 + fake).mean(1) + self.penalty * steepness
        self._optimizer.zero_grad()
        loss.mean().backward()
        self._optimizer.step()
        heads.requires_grad_(False)
        adversarial = -_scores(heads, drawn).mean(1)
        heads.requires_grad_(True)
        return Losses(self.compare(latents, target, batch) + self.weight * adversarial)


def _scores(heads: Any, features: list[Tensor]) -> Tensor:  # noqa: ANN401
    pairs = zip(heads, features, strict=True)
    return torch.cat([head(feature).flatten(1) for head, feature in pairs], 1)
