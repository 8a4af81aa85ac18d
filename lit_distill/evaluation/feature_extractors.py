"""Frozen networks that extract image features for metrics."""

from __future__ import annotations

import itertools
from importlib.resources import files
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from lit_distill.errors import InputError
from lit_distill.pipelines.loading import TINY_DIGITS, TINY_WORDS

LETTERS = "ABCDEFHIKLMNOPRSTUWY"
"""The letters that tiny-words draws; without G, J, Q, V, X and Z."""

WORD_LENGTH = 4

Reader = TypeVar("Reader", bound=nn.Module)


def load_features(name_or_path: str) -> nn.Module:
    """Return a frozen network that maps images (B, 3, H, W), range [0, 1], to features.

    Args:
        name_or_path: ``"tiny-digits"`` or ``"tiny-words"`` for the classifier shipped with that
            embedded pipeline; else hub id or folder of a vision network of transformers, e.g.
            ``facebook/dinov2-base`` or ``openai/clip-vit-base-patch32``.

    Returns:
        A network with an attribute ``num_features``; its output is (B, num_features).

    Raises:
        OSError: If there is neither a folder nor a hub repository of this name.
        ValueError: If the network returns no image features.
    """
    if name_or_path == TINY_DIGITS:
        return _shipped(DigitReader(), "digit_reader.safetensors")
    if name_or_path == TINY_WORDS:
        return load_word_reader()
    return TransformersFeatures(name_or_path)


def load_word_reader() -> WordReader:
    """Return the classifier shipped with tiny-words, frozen."""
    return _shipped(WordReader(), "word_reader.safetensors")


def _shipped(reader: Reader, file: str) -> Reader:
    """Return the reader with its weights in the package, which are stored in fp16, frozen."""
    weights = load_file(str(files("lit_distill").joinpath("assets", file)))
    reader.load_state_dict({name: tensor.float() for name, tensor in weights.items()})
    return reader.eval().requires_grad_(False)


class DigitReader(nn.Module):
    """A small classifier of the digit and both colours of a tiny-digits image.

    Trained by ``scripts/train_tiny_digits.py``. Its features are the 64 channels before the last
    layer, averaged over the image.
    """

    num_features = 64

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for source, target in itertools.pairwise((3, 16, 32, self.num_features)):
            layers += [nn.Conv2d(source, target, 3, padding=1), nn.BatchNorm2d(target)]
            layers += [nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features * 16, 26)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, 64) of images (B, 3, 32, 32), range [0, 1]."""
        features: Tensor = self.body(images * 2 - 1).mean((2, 3))
        return features

    def read(self, images: Tensor) -> tuple[Tensor, ...]:
        """Return the logits of digit (B, 10), foreground (B, 8) and background (B, 8)."""
        return torch.split(self.head(self.body(images * 2 - 1).flatten(1)), [10, 8, 8], dim=1)


class WordReader(nn.Module):
    """A small classifier of the four letters of a tiny-words image, one quarter at a time.

    Trained by ``scripts/train_tiny_words.py``. Its features are the 64 channels before the last
    layer, averaged over each quarter.
    """

    num_features = 64 * WORD_LENGTH

    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for source, target in itertools.pairwise((3, 16, 32, 64)):
            layers += [nn.Conv2d(source, target, 3, padding=1, bias=False)]
            layers += [nn.BatchNorm2d(target), nn.ReLU(), nn.MaxPool2d(2)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(64 * 8, len(LETTERS))

    def _quarters(self, images: Tensor) -> Tensor:
        maps: Tensor = self.body(images * 2 - 1)
        return torch.stack(maps.chunk(WORD_LENGTH, dim=-1), dim=1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, 256) of images (B, 3, 32, 64), range [0, 1]."""
        return self._quarters(images).mean((3, 4)).flatten(1)

    def read(self, images: Tensor) -> Tensor:
        """Return the logits (B, 4, 20) of the letters in images (B, 3, 32, 64), range [0, 1]."""
        logits: Tensor = self.head(self._quarters(images).flatten(2))
        return logits


class TransformersFeatures(nn.Module):
    """Pooled image features of a network of transformers, such as CLIP, SigLIP, DINOv2 or ViT.

    Images are resized and normalised according to the network's ``preprocessor_config.json``, with
    torch alone because the processors of transformers require torchvision.

    Args:
        name_or_path: Hub id or folder.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, name_or_path: str) -> None:
        from transformers import AutoModel
        from transformers.models.auto.image_processing_auto import get_image_processor_config

        super().__init__()
        self.name_or_path = name_or_path
        self.model: Any = AutoModel.from_pretrained(name_or_path).eval().requires_grad_(False)
        settings = get_image_processor_config(name_or_path)
        if "image_mean" not in settings:
            raise InputError(
                f"{name_or_path} has no preprocessor_config.json with image_mean and image_std; "
                "use a vision network of transformers"
            )
        self.edge = _edge(settings.get("size", 224))
        self.crop = _edge(settings.get("crop_size", self.edge))
        self.register_buffer("mean", torch.tensor(settings["image_mean"]).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(settings["image_std"]).view(3, 1, 1))
        self.num_features = self(torch.zeros(1, 3, self.crop, self.crop)).shape[1]

    def preprocess(self, images: Tensor) -> Tensor:
        """Return images (B, 3, H, W), range [0, 1], resized, cropped and normalised."""
        height, width = images.shape[-2:]
        scale = self.edge / min(height, width)
        size = [max(self.crop, round(side * scale)) for side in (height, width)]
        resized = F.interpolate(images, size, mode="bicubic", antialias=True).clamp(0, 1)
        top, left = ((side - self.crop) // 2 for side in size)
        cropped = resized[..., top : top + self.crop, left : left + self.crop]
        return (cropped - self.mean) / self.std

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Return the features (B, num_features) of images (B, 3, H, W), range [0, 1]."""
        pixels = self.preprocess(images)
        if hasattr(self.model, "get_image_features"):
            return _pooled(self.model.get_image_features(pixel_values=pixels), self.name_or_path)
        return _pooled(self.model(pixel_values=pixels), self.name_or_path)

    @torch.no_grad()
    def encode_text(self, prompts: list[str]) -> Tensor:
        """Return the text features (B, num_features) of a network that has them, such as CLIP."""
        from transformers import AutoTokenizer

        if not hasattr(self.model, "get_text_features"):
            raise InputError(f"{self.name_or_path} encodes no text; use a CLIP model")
        tokenizer = AutoTokenizer.from_pretrained(self.name_or_path)
        tokens = tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt")
        output = self.model.get_text_features(**tokens.to(self.model.device))
        return _pooled(output, self.name_or_path)


def _edge(size: int | dict[str, int]) -> int:
    return size if isinstance(size, int) else min(size.values())


def _pooled(output: Any, name: str) -> Tensor:  # noqa: ANN401
    """Return the pooled features, which transformers 4 and 5 return differently."""
    if isinstance(output, Tensor):
        return output
    pooled = getattr(output, "pooler_output", None)
    if not isinstance(pooled, Tensor):
        raise InputError(f"{name} returns no pooled features; use a CLIP, SigLIP, ViT or DINOv2")
    return pooled
