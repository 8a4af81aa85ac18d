"""Rows of a metadata table with their images or latents, read on access."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import Dataset

from lit_distill.data.batch import open_pictures
from lit_distill.data.filesystem import opened
from lit_distill.data.images import read_image

LATENTS_KEY = "latents"

TRAJECTORY_KEY = "trajectory"

SIGMAS_KEY = "sigmas"
"""Names of tensors in a file of the ``latents`` column: the final latents; where they were made
with store_trajectory, also the states between the student's steps, (steps - 1, ...), and the noise
level of each, (steps - 1,)."""


class PairDataset(Dataset[dict[str, Any]]):
    """The rows of a checked table, with their images or latents read on access.

    Attributes:
        encoded: Reads what the VAE has made of an image file, once that is kept somewhere.
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
        """Return one row; exact latents are preferred to the image they decode to."""
        row = self.record(index)
        image, encoded, tensors = None, None, {}
        if row["latents"]:
            try:
                with opened(row["latents"]) as stream:
                    tensors = load(stream.read())
                    tensors[LATENTS_KEY]
            except Exception as error:  # safetensors raises its own kinds, without the file's name
                raise ValueError(
                    f"row {row['row']}: {row['latents']} holds no tensor "
                    f"{LATENTS_KEY!r} in safetensors format: {error}"
                ) from error
        elif row["image"] and self.encoded is not None:
            encoded = self.encoded(row["image"])
        elif row["image"]:
            image = read_image(row["image"])
            if tuple(image.shape[1:]) != (row["height"], row["width"]):
                raise ValueError(
                    f"row {row['row']}: {row['image']} is {image.shape[1]}x{image.shape[2]} (height"
                    f" x width), but the table says {row['height']}x{row['width']}"
                )
        targets = {"image": image, "encoded": encoded}
        targets |= {key: tensors.get(key) for key in (LATENTS_KEY, TRAJECTORY_KEY, SIGMAS_KEY)}
        return row | targets | {"call": open_pictures(row["call"])}

    @property
    def prompts(self) -> Any:  # noqa: ANN401
        """All rows' prompts, an array."""
        return self.columns["prompt"]

    def record(self, index: int) -> dict[str, Any]:
        """Return one row as it is in the table: files are paths."""
        return {name: column[index] for name, column in self.columns.items()}

    def image_sizes(self) -> list[dict[str, Any]]:
        """Return a row of every size among those whose target is an image."""
        names = ("image", "latents", "height", "width")
        rows = zip(*(self.columns[name].tolist() for name in names), strict=True)
        first: dict[tuple[int, int], int] = {}
        for index, (image, latents, height, width) in enumerate(rows):
            if image and not latents:
                first.setdefault((height, width), index)
        return [self.record(index) for index in first.values()]

    def buckets(self) -> list[np.ndarray]:
        """Return the indices of rows that may share a batch, one array a bucket."""
        keys = ["height", "width", "num_inference_steps", "cfg_scale", "rand_device", "call_key"]
        kind = np.where(self.table["latents"] != "", 2, np.where(self.table["image"] != "", 1, 0))
        groups = self.table.assign(kind=kind).groupby([*keys, "kind"], sort=True)
        return [np.sort(index) for index in groups.indices.values()]
