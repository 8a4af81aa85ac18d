"""Direct Distillation for any diffusers pipeline, on PyTorch Lightning."""

__version__ = "0.1.0"

from lit_distill.codec import LatentCodec
from lit_distill.data import DistillDataModule
from lit_distill.export import export_student
from lit_distill.families import load_pipeline
from lit_distill.losses import DistillLoss
from lit_distill.module import DirectDistill
from lit_distill.rollout import rollout
from lit_distill.student import load_student

__all__ = [
    "DirectDistill",
    "DistillDataModule",
    "DistillLoss",
    "LatentCodec",
    "export_student",
    "load_pipeline",
    "load_student",
    "rollout",
]
