"""The rows of a metadata table as a torch dataset."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from torch import Tensor
from torch.utils.data import Dataset

from lit_distill.data.batch import open_pictures
from lit_distill.data.images import read_image
from lit_distill.data.latents_file import (
    LATENTS_KEY,
    SIGMAS_KEY,
    TRAJECTORY_KEY,
    read_latents,
)
from lit_distill.errors import InputError


class PairDataset(Dataset[dict[str, Any]]):
    """The rows of a checked table; images and latents are read on access.

    Attributes:
        encoded: Returns the stored VAE encoding of an image file; None: images are not encoded yet.
    """

    def __init__(self, table: pd.DataFrame) -> None:
        self.encoded: Callable[[str], Tensor] | None = None
        self.table = table
        fields = ["row", "prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale"]
        fields += ["height", "width", "image", "latents", "call", "call_key"]
        self.columns = {name: table[name].to_numpy() for name in fields}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row; if it has exact latents, they are loaded instead of the image."""
        row = self.record(index)
        image, encoded, tensors = None, None, {}
        if row["latents"]:
            try:
                tensors = read_latents(row["latents"])
            except InputError as error:
                raise InputError(f"row {row['row']}: {error}") from error
        elif row["image"] and self.encoded is not None:
            encoded = self.encoded(row["image"])
        elif row["image"]:
            image = read_image(row["image"])
            if tuple(image.shape[1:]) != (row["height"], row["width"]):
                raise InputError(
                    f"row {row['row']}: {row['image']} is {image.shape[1]}x{image.shape[2]} (height"
                    f" x width), but the table says {row['height']}x{row['width']}"
                )
        targets = {"image": image, "encoded": encoded, "file": row["latents"] or row["image"]}
        targets |= {key: tensors.get(key) for key in (LATENTS_KEY, TRAJECTORY_KEY, SIGMAS_KEY)}
        return row | targets | {"call": open_pictures(row["call"])}

    @property
    def prompts(self) -> Any:  # noqa: ANN401
        """The prompts of all rows, as an array."""
        return self.columns["prompt"]

    def record(self, index: int) -> dict[str, Any]:
        """Return one row of the table, with paths instead of files."""
        return {name: column[index] for name, column in self.columns.items()}

    def image_sizes(self) -> list[dict[str, Any]]:
        """Return one row of each size, among rows whose target is an image."""
        names = ("image", "latents", "height", "width")
        rows = zip(*(self.columns[name].tolist() for name in names), strict=True)
        examples: dict[tuple[int, int], int] = {}
        for index, (image, latents, height, width) in enumerate(rows):
            if image and not latents:
                examples.setdefault((height, width), index)
        return [self.record(index) for index in examples.values()]

    def buckets(self) -> list[np.ndarray]:
        """Return the indices of rows that may share a batch, one array per bucket."""
        keys = ["height", "width", "num_inference_steps", "cfg_scale", "rand_device", "call_key"]
        target = np.where(self.table["latents"] != "", 2, np.where(self.table["image"] != "", 1, 0))
        groups = self.table.assign(target=target).groupby([*keys, "target"], sort=True)
        return [np.sort(index) for index in groups.indices.values()]
