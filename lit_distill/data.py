"""Pairs to learn from: batches of one size, step count and guidance, from a metadata table."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypedDict

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_warn
from safetensors.torch import load
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from lit_distill.metadata import hold_out, read_metadata
from lit_distill.pictures import Picture, read_image, read_picture
from lit_distill.storage import opened

LATENTS_KEY = "latents"
"""Name of the tensor in a file of the ``latents`` column."""


NO_TARGET: dict[str, Any] = {"image": None, "encoded": None, "latents": None}


class Batch(TypedDict):
    """What `DistillDataModule` yields: B rows that share everything but prompt, seed and target.

    Attributes:
        prompt: B texts.
        seed: B seeds of the start noise.
        rand_device: Device whose generator draws the noise.
        num_inference_steps: The student's.
        cfg_scale: The student's, 1 = off.
        size: (height, width) in pixels; None: the pipeline's own default.
        call: Further arguments of the pipeline's call: B pictures or texts, or a number for all.
        image: The teacher's images, (B, 3, height, width), range [0, 1], or None.
        encoded: What the VAE made of the images, (B, C, h, w) or (B, C, 1, h, w), in their place
            where they were encoded before training; or None.
        latents: The teacher's exact final latents, (B, ...), or None.
        row: B row numbers as a spreadsheet shows them, the header being row 1.
    """

    prompt: list[str]
    seed: list[int]
    rand_device: str
    num_inference_steps: int
    cfg_scale: float
    size: tuple[int, int] | None
    call: dict[str, Any]
    image: Tensor | None
    encoded: Tensor | None
    latents: Tensor | None
    row: list[int]


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
        image, encoded, latents = None, None, None
        if row["latents"]:
            try:
                with opened(row["latents"]) as stream:
                    latents = load(stream.read())[LATENTS_KEY]
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
        targets = {"image": image, "encoded": encoded, "latents": latents}
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


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Make a batch of rows of one bucket."""
    first = rows[0]

    def stacked(name: str) -> Tensor | None:
        return None if first[name] is None else torch.stack([row[name] for row in rows])

    size = (int(first["height"]), int(first["width"]))
    return {
        "prompt": [str(row["prompt"]) for row in rows],
        "seed": [int(row["seed"]) for row in rows],
        "rand_device": str(first["rand_device"]),
        "num_inference_steps": int(first["num_inference_steps"]),
        "cfg_scale": float(first["cfg_scale"]),
        "size": None if size == (0, 0) else size,
        "call": collate_calls([row["call"] for row in rows]),
        "image": stacked("image"),
        "encoded": stacked("encoded"),
        "latents": stacked("latents"),
        "row": [int(row["row"]) for row in rows],
    }


def open_pictures(call: dict[str, Any]) -> dict[str, Any]:
    """Return a row's call arguments with pictures in place of their paths."""
    return {k: read_picture(v) if isinstance(v, Picture) else v for k, v in call.items()}


def collate_calls(calls: list[dict[str, Any]]) -> dict[str, Any]:
    """Return the call arguments of a batch: a number common to all, or a list of all else."""
    return {
        name: value if isinstance(value, int | float) else [call[name] for call in calls]
        for name, value in calls[0].items()
    }


def split_batch(batch: Batch, size: int | None) -> list[Batch]:
    """Return the batch in parts of at most `size` rows; None: in one part."""
    rows = len(batch["row"])
    if size is None or size >= rows:
        return [batch]

    def part(value: Any, start: int) -> Any:  # noqa: ANN401
        if isinstance(value, dict):
            return {name: part(entry, start) for name, entry in value.items()}
        # The size is a tuple; what is one for each row is a list or a tensor.
        return value[start : start + size] if isinstance(value, list | Tensor) else value

    return [part(batch, start) for start in range(0, rows, size)]


class BucketBatchSampler:
    """Plans an epoch's batches, each from one bucket: a pure function of (seed, epoch).

    All ranks draw from the same bucket at the same step. With several ranks the last batch of a
    bucket is filled up with rows from its beginning, so that every rank has work at every step.

    Args:
        buckets: Indices that may share a batch, one array a bucket.
        batch_size: Rows a batch and rank, >= 1.
        shuffle: Whether rows and batches come in a new order each epoch.
        seed: Seed of that order.
        repeat: How often an epoch passes over every row.
        drop_last: Whether batches that a bucket's last rows don't fill are left out.
        rank: This process.
        world_size: Number of processes.
    """

    def __init__(
        self,
        buckets: list[np.ndarray],
        *,
        batch_size: int,
        shuffle: bool,
        seed: int = 0,
        repeat: int = 1,
        drop_last: bool = False,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.buckets = buckets
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.repeat = repeat
        self.drop_last = drop_last
        self.rank = rank
        self.world_size = world_size
        self.epoch = 0
        self.position = 0

    def plan(self) -> list[list[int]]:
        """Return this rank's batches of the current epoch."""
        rng = np.random.default_rng([self.seed, self.epoch])
        chunks = []
        size = self.batch_size * self.world_size
        for bucket in self.buckets:
            order = [
                rng.permutation(bucket) if self.shuffle else bucket for _ in range(self.repeat)
            ]
            rows = np.concatenate(order)
            if self.drop_last:
                rows = rows[: len(rows) // size * size]
            missing = -len(rows) % self.world_size
            rows = np.concatenate([rows, np.resize(rows, missing)])
            chunks += [rows[start : start + size] for start in range(0, len(rows), size)]
        if self.shuffle:
            chunks = [chunks[index] for index in rng.permutation(len(chunks))]
        return [chunk[self.rank :: self.world_size].tolist() for chunk in chunks]

    def __len__(self) -> int:
        size = self.batch_size * self.world_size
        rows = [len(bucket) * self.repeat for bucket in self.buckets]
        return sum(count // size if self.drop_last else -(-count // size) for count in rows)

    def __iter__(self) -> Iterator[list[int]]:
        yield from self.plan()[self.position :]


class PairLoader(DataLoader[dict[str, Any]]):
    """A `DataLoader` over pairs that knows where it is and can go on from there.

    Lightning keeps its state in the checkpoint and gives it back on resume. Epochs are counted
    here: Lightning's own count runs ahead when training stops in the middle of one.
    """

    batch_sampler: BucketBatchSampler

    def __init__(self, dataset: PairDataset, batches: BucketBatchSampler, num_workers: int) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the rest of the epoch, or the next one; held-out rows always from the first."""
        batches = self.batch_sampler
        if not batches.shuffle:
            batches.position = 0
        elif batches.position >= len(batches):
            batches.epoch, batches.position = batches.epoch + 1, 0
        for batch in super().__iter__():
            batches.position += 1
            yield batch

    def _order(self) -> dict[str, int]:
        """Return what the order of rows depends on, beside the epoch."""
        batches = self.batch_sampler
        rows = sum(len(bucket) for bucket in batches.buckets)
        step = batches.batch_size * batches.world_size
        return {"seed": batches.seed, "repeat": batches.repeat, "rows": rows, "rows_a_batch": step}

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of batches of it that were handed out, and the order."""
        batches = self.batch_sampler
        return {"epoch": batches.epoch, "position": batches.position, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken.

        With as many rows a batch over all processes, the rest of the epoch is the same, however
        many processes there are; else it goes on after as many rows as were seen.
        """
        order = self._order()
        for name, value in order.items():
            if state[name] != value:
                rank_zero_warn(
                    f"data: {name}={value} differs from the checkpoint's {state[name]}; the rest "
                    "of this epoch may repeat or miss rows"
                )
        seen = state["position"] * state["rows_a_batch"]
        self.batch_sampler.epoch = state["epoch"]
        self.batch_sampler.position = seen // order["rows_a_batch"]


class DistillDataModule(pl.LightningDataModule):
    """Teacher's pairs from a CSV ``image,prompt,seed,rand_device,num_inference_steps,cfg_scale``.

    Steps and guidance are the student's. Images are never resized. Batches share size, steps,
    guidance and random device. Set ``use_distributed_sampler=False`` in a Trainer of several
    processes (the command line does): this module gives every rank its share.

    Args:
        metadata_path: CSV, JSON or JSONL of the training pairs, a file or a URL (docs/data.md).
        val_metadata_path: CSV of held-out pairs, for validate, test and predict.
        val_fraction: Without `val_metadata_path`: hold out about this share of the prompts.
        base_path: Folder that files are relative to; default: the CSV's.
        call_columns: Columns that are arguments of the pipeline's call, argument to column, such as
            {image: edit_image} for an edit pipeline. Paths of pictures, numbers or texts.
        height: With `width`, the size in pixels that every image must have.
        width: See `height`.
        max_pixels: Largest area of an image in pixels. Without height, width and max_pixels
            every image is used at its own size.
        allow_outside: Accept files that are not below base_path: absolute paths, "..", URLs.
        batch_size: Rows a batch and process.
        num_workers: Processes that read files; 0 reads in the training process.
        repeat: How often an epoch passes over the training rows.
        drop_last: Leave out training batches that the last rows of a size, step count or guidance
            don't fill.
        cache_dir: Folder where prompts and images are kept encoded. With it all of them are encoded
            before training, then the encoders are let go of: they and the denoiser need not fit
            together. Without it they are encoded when first used, and stay.
        seed: Seed of the order of rows and of the held-out split.

    Raises:
        ValueError: If an argument is out of range.
    """

    def __init__(
        self,
        metadata_path: str | None = None,
        val_metadata_path: str | None = None,
        val_fraction: float = 0.0,
        base_path: str | None = None,
        call_columns: dict[str, str] | None = None,
        height: int | None = None,
        width: int | None = None,
        max_pixels: int | None = None,
        allow_outside: bool = False,
        batch_size: int = 1,
        num_workers: int = 0,
        repeat: int = 1,
        drop_last: bool = False,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (height is None) != (width is None):
            raise ValueError(f"data.height={height}, data.width={width}: set both or neither")
        for name, value in (("batch_size", batch_size), ("repeat", repeat)):
            if value < 1:
                raise ValueError(f"data.{name} must be >= 1, got {value}")
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction must be in [0, 1), got {val_fraction}")
        self.metadata_path = metadata_path
        self.val_metadata_path = val_metadata_path
        self.val_fraction = val_fraction
        self.base_path = base_path
        self.call_columns = call_columns or {}
        self.height = height
        self.width = width
        self.max_pixels = max_pixels
        self.allow_outside = allow_outside
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.repeat = repeat
        self.drop_last = drop_last
        self.cache_dir = cache_dir
        self.seed = seed
        self.train_set: PairDataset | None = None
        self.val_set: PairDataset | None = None

    def setup(self, stage: str) -> None:
        """Read and check the tables that `stage` (fit, validate, test, predict) needs."""
        if stage == "fit" and self.metadata_path is None:
            raise ValueError("data.metadata_path is not set: the CSV of the training pairs")
        if self.val_metadata_path is not None:
            self.val_set = PairDataset(self._read(self.val_metadata_path))
        if self.metadata_path is not None and (stage == "fit" or self.val_set is None):
            table = self._read(self.metadata_path)
            if self.val_set is None and self.val_fraction:
                held_out = hold_out(table["prompt"], self.val_fraction, self.seed)
                if held_out.all() or not held_out.any():
                    raise ValueError(
                        f"data.val_fraction={self.val_fraction} leaves no prompt on one side: "
                        f"{self.metadata_path} has {table['prompt'].nunique()} different prompts"
                    )
                self.val_set = PairDataset(table[held_out])
                table = table[~held_out]
            self.train_set = PairDataset(table)
        if stage != "fit" and self.val_set is None:
            raise ValueError(
                f"{stage} needs held-out rows: set data.val_metadata_path or data.val_fraction"
            )

    def _read(self, path: str) -> pd.DataFrame:
        return read_metadata(path, self.base_path, self.call_columns, **self.limits())

    def limits(self) -> dict[str, Any]:
        """Return what rows have to keep to, arguments of `read_metadata`."""
        names = ("height", "width", "max_pixels", "allow_outside")
        return {name: getattr(self, name) for name in names}

    def _loader(self, dataset: PairDataset, train: bool) -> PairLoader:
        trainer = self.trainer
        batches = BucketBatchSampler(
            dataset.buckets(),
            batch_size=self.batch_size,
            shuffle=train,
            seed=self.seed,
            repeat=self.repeat if train else 1,
            drop_last=train and self.drop_last,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return PairLoader(dataset, batches, self.num_workers)

    def train_dataloader(self) -> PairLoader:
        """Return the loader of the training rows."""
        assert self.train_set is not None, "call setup('fit') first"
        loader = self._loader(self.train_set, train=True)
        if len(loader.batch_sampler) == 0:
            raise ValueError(
                f"data.drop_last leaves no batch: no size, step count and guidance has "
                f"{self.batch_size} rows for each process (data.batch_size)"
            )
        return loader

    def val_dataloader(self) -> PairLoader | list[Any]:
        """Return the loader of the held-out rows; empty if there are none."""
        return [] if self.val_set is None else self._loader(self.val_set, train=False)

    def test_dataloader(self) -> PairLoader | list[Any]:
        """Return the loader of the held-out rows."""
        return self.val_dataloader()

    def predict_dataloader(self) -> DataLoader[Batch]:
        """Return a loader of the held-out rows, a plain one: Lightning rebuilds it to predict."""
        assert self.val_set is not None, "call setup('predict') first"
        plan = self._loader(self.val_set, train=False).batch_sampler.plan()
        return DataLoader(_PlannedBatches(self.val_set, plan), batch_size=None)


class _PlannedBatches(Dataset[Batch]):
    """Whole batches as items."""

    def __init__(self, dataset: PairDataset, plan: list[list[int]]) -> None:
        self.dataset = dataset
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        return collate([self.dataset[row] for row in self.plan[index]])
