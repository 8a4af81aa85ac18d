"""Direct Distillation for any diffusers pipeline, on PyTorch Lightning."""

from lit_distill.data.datamodule import DistillDataModule
from lit_distill.evaluation.metrics import (
    CLIPScore,
    Diversity,
    FrechetDistance,
    Legibility,
    Sharpness,
)
from lit_distill.export.export_on_save import ExportOnSave
from lit_distill.export.exporter import export_student
from lit_distill.export.load_student import load_student
from lit_distill.pipelines.latent_codec import LatentCodec
from lit_distill.pipelines.loading import load_pipeline
from lit_distill.pipelines.rollout import rollout
from lit_distill.planning.plan import plan
from lit_distill.planning.settings import TrainingSettings
from lit_distill.training.direct_distill import DirectDistill
from lit_distill.training.ema import EMA
from lit_distill.training.fsdp_strategy import FSDP2  # registers `strategy: fsdp2`
from lit_distill.training.image_callbacks import ImageGrid, ImageWriter
from lit_distill.training.losses import DistillLoss, LatentL1, LatentMSE, LatentRMSE
from lit_distill.training.lr_scheduler import WarmupCosine
from lit_distill.training.objectives.adversarial import Adversarial
from lit_distill.training.objectives.base import Losses, Objective
from lit_distill.training.objectives.consistency import Consistency
from lit_distill.training.objectives.distribution_matching import DistributionMatching
from lit_distill.training.objectives.regression import Regression
from lit_distill.training.objectives.trajectory import Trajectory
from lit_distill.training.objectives.weighted_sum import Term, WeightedSum
from lit_distill.training.sample_images import SampleImages
from lit_distill.training.throughput import TrainingMonitor
from lit_distill.version import __version__

__all__ = [
    "EMA",
    "FSDP2",
    "Adversarial",
    "CLIPScore",
    "Consistency",
    "DirectDistill",
    "DistillDataModule",
    "DistillLoss",
    "DistributionMatching",
    "Diversity",
    "ExportOnSave",
    "FrechetDistance",
    "ImageGrid",
    "ImageWriter",
    "LatentCodec",
    "LatentL1",
    "LatentMSE",
    "LatentRMSE",
    "Legibility",
    "Losses",
    "Objective",
    "Regression",
    "SampleImages",
    "Sharpness",
    "Term",
    "TrainingMonitor",
    "TrainingSettings",
    "Trajectory",
    "WarmupCosine",
    "WeightedSum",
    "__version__",
    "export_student",
    "load_pipeline",
    "load_student",
    "plan",
    "rollout",
]
