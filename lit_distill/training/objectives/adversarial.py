"""An adversarial objective, whose discriminator is a few small heads on the frozen denoiser."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lit_distill.adapters.inject import default_target_modules
from lit_distill.data.batch import Batch
from lit_distill.errors import InputError
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.noise_levels import NoiseLevel
from lit_distill.training.objectives.base import Losses, Models, Objective
from lit_distill.training.settings import Settings

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline


class Adversarial(Objective):
    """Makes the student's samples look like the teacher's to a discriminator (ADD, LADD).

    Sauer et al., arXiv:2311.17042 and 2403.12015. Noise is added to both samples. The frozen
    pretrained denoiser turns them into features, the outputs of some of its attention layers, and a
    small head on each layer tells them apart, token by token. Hinge losses, and R1, the squared
    gradient of the heads at the teacher's features. Usually a term of `WeightedSum` beside
    `Regression`.

    Args:
        layers: Number of layers with a head, evenly spaced over the denoiser.
        width: Hidden width of a head.
        penalty: Weight of R1.
        low: Lowest noise level, as a share of the timesteps.
        high: Highest noise level.
        optimizer: Options of the heads' parameter group that differ from `model.optimizer`, such
            as {lr: 1e-3, betas: [0.0, 0.99]}.
    """

    needs_base = True

    def __init__(
        self,
        layers: int = 4,
        width: int = 64,
        penalty: float = 0.01,
        low: float = 0.02,
        high: float = 0.8,
        optimizer: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(optimizer)
        if layers < 1 or width < 1 or penalty < 0 or not 0 < low < high <= 1:
            raise InputError(
                "Adversarial: layers and width must be >= 1, penalty >= 0 and 0 < low < high <= 1, "
                f"got {layers}, {width}, {penalty}, {low}, {high}"
            )
        self.layers, self.width, self.penalty = layers, width, penalty
        self.low, self.high = low, high
        self.names: list[str] = []
        self.heads = nn.ModuleList()

    def check(self, settings: Settings) -> None:
        """Check that the layers can be observed."""
        super().check(settings)
        if settings.compile:
            raise InputError(
                "model.objective: Adversarial reads features between compiled layers; set "
                "model.compile: false"
            )

    def build(self, pipe: DiffusionPipeline) -> None:
        """Make the heads, the same on every process."""
        denoiser = next(iter(denoisers(pipe).values()))
        self.names = feature_layers(denoiser, self.layers)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            for name in self.names:
                channels = denoiser.get_submodule(name).out_features
                body = [nn.LayerNorm(channels), nn.Linear(channels, self.width)]
                self.heads.append(nn.Sequential(*body, nn.SiLU(), nn.Linear(self.width, 1)))

    def losses(self, models: Models, batch: Batch) -> Losses:
        """Return how the student's samples are told apart, and the heads' losses."""
        real = models.teacher_target(batch)
        samples = models.student_rollout(batch).float()
        level = models.levels.share(self.low + (self.high - self.low) * models.uniform())
        noise = models.noise(samples, batch)
        with torch.no_grad():
            seen = self.features(models, level.add_noise(real, noise), level, batch)
        drawn = self.features(models, level.add_noise(samples, noise), level, batch)
        return Losses(self._student_loss(drawn), self._heads_loss(seen, drawn))

    def features(
        self, models: Models, latents: Tensor, level: NoiseLevel, batch: Batch
    ) -> list[Tensor]:
        """Return each layer's output for noisy latents, (B, tokens, channels), float32."""
        found: dict[str, list[Tensor]] = {name: [] for name in self.names}

        def keep(name: str) -> Any:  # noqa: ANN401
            return lambda module, args, output: found[name].append(output)

        with models.hooked({name: keep(name) for name in self.names}):
            prediction = models.base_x0(latents, level, batch)
        # Sharded blocks gather their weights when the backward pass reaches their output.
        outputs = 0.0 * prediction.sum()
        count = len(latents)
        features = []
        for name in self.names:
            parts = _of_all_rows(found[name], count)
            features.append(parts.float().reshape(count, -1, parts.shape[-1]) + outputs)
        return features

    def _student_loss(self, features: list[Tensor]) -> Tensor:
        """Return minus the scores, (B,); their gradient reaches the features, but no head."""
        leaves = [feature.detach().requires_grad_() for feature in features]
        scores = self._scores(leaves)
        slopes = torch.autograd.grad(scores.sum(), leaves)
        loss = -scores.detach()
        for feature, slope in zip(features, slopes, strict=True):
            loss = loss - ((feature - feature.detach()) * slope).flatten(1).sum(1)
        return loss

    def _heads_loss(self, real: list[Tensor], drawn: list[Tensor]) -> Tensor:
        leaves = [feature.requires_grad_() for feature in real]
        tokens = self._tokens(leaves)
        slopes = torch.autograd.grad(tokens.mean(1).sum(), leaves, create_graph=True)
        steepness = torch.stack([slope.square().flatten(1).sum(1) for slope in slopes]).sum(0)
        told = self._tokens([feature.detach() for feature in drawn])
        apart = F.relu(1 - tokens).mean(1) + F.relu(1 + told).mean(1)
        return (apart + self.penalty * steepness).mean()

    def _scores(self, features: list[Tensor]) -> Tensor:
        return self._tokens(features).mean(1)

    def _tokens(self, features: list[Tensor]) -> Tensor:
        """Return the score of every token of every layer, (B, tokens)."""
        pairs = zip(self.heads, features, strict=True)
        return torch.cat([head(feature).flatten(1) for head, feature in pairs], 1)


def feature_layers(denoiser: nn.Module, count: int) -> list[str]:
    """Return the names of attention output layers, evenly spaced over the denoiser."""
    # The linears inside of the adapters' layers, and not the adapters' own.
    linears = [name for name in default_target_modules(denoiser) if ".lora_" not in name]
    targets = [name.removesuffix(".base_layer") for name in linears]
    outputs = [name for name in targets if name.endswith((".to_out.0", ".to_out"))] or targets
    positions = torch.linspace(0, len(outputs) - 1, min(count, len(outputs))).round().long()
    return [outputs[position] for position in positions.tolist()]


def _of_all_rows(outputs: list[Tensor], count: int) -> Tensor:
    """Return the last outputs that cover all rows: a batch may be computed in parts."""
    parts: list[Tensor] = []
    for output in reversed(outputs):
        parts.insert(0, output)
        if sum(len(part) for part in parts) >= count:
            break
    return torch.cat(parts)
