"""The LightningDataModule of pairs from a metadata table."""

from __future__ import annotations

from typing import Any

import lightning.pytorch as pl
import pandas as pd
from torch.utils.data import DataLoader

from lit_distill.data.batch import Batch
from lit_distill.data.bucket_sampler import BucketBatchSampler, PairLoader, PlannedBatches
from lit_distill.data.columns import check_mapping
from lit_distill.data.dataset import PairDataset
from lit_distill.data.filesystem import is_url
from lit_distill.data.metadata import hold_out, read_metadata
from lit_distill.errors import InputError


class DistillDataModule(pl.LightningDataModule):
    """Loads pairs from a CSV ``image,prompt,seed,rand_device,num_inference_steps,cfg_scale``.

    Steps and guidance are the student's. Images are never resized. The rows of a batch share size,
    steps, guidance and random device. Set ``use_distributed_sampler=False`` in a Trainer of several
    processes (the command line does): this module distributes the rows itself.

    Args:
        metadata_path: Table of the training pairs: CSV, JSON, JSONL or parquet, a file or a URL; or
            a folder, an imagefolder with metadata.jsonl or one that datasets' save_to_disk wrote.
        val_metadata_path: Table of held-out pairs, for validate, test and predict.
        val_fraction: Without `val_metadata_path`: share of the prompts to hold out, approximately.
        base_path: Folder that files are relative to; default: the table's folder.
        call_columns: Columns to pass to the pipeline's call, as argument: column, for example
            {image: edit_image} for an edit pipeline. Values are paths of pictures, numbers or
            texts.
        height: With `width`, the size in pixels that every image must have.
        width: See `height`.
        max_pixels: Largest accepted area of an image in pixels. Without height, width and
            max_pixels, images of any size are accepted and used at their size.
        allow_outside: Accept files that are not below base_path: absolute paths, "..", URLs.
        batch_size: Rows per batch and process.
        num_workers: Number of worker processes that read files; 0: read in the training process.
        repeat: Number of passes over the training rows in an epoch.
        drop_last: Drop incomplete training batches: the last rows of each combination of size,
            steps and guidance.
        cache_dir: Folder for encoded prompts and images, which are stored in a folder
            ``encodings-v1`` inside it. If set, all of them are encoded before
            training, and the encoders are freed: encoders and denoiser need not fit into memory
            together. Otherwise they are encoded at first use, and the encoders stay.
        seed: Seed of the order of rows and of the held-out split.
        columns: The table's names of the columns, where they differ, as in {prompt: text, image:
            file_name}.
        constants: Values for all rows of a table without these columns: rand_device,
            num_inference_steps, cfg_scale, as in {rand_device: cpu, num_inference_steps: 4,
            cfg_scale: 1}.

    Raises:
        InputError: If an argument is out of range.
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
        columns: dict[str, str] | None = None,
        constants: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        if (height is None) != (width is None):
            raise InputError(f"data.height={height}, data.width={width}: set both or neither")
        for name, value in (("batch_size", batch_size), ("repeat", repeat)):
            if value < 1:
                raise InputError(f"data.{name} must be >= 1, got {value}")
        if not 0 <= val_fraction < 1:
            raise InputError(f"data.val_fraction must be in [0, 1), got {val_fraction}")
        if cache_dir is not None and is_url(str(cache_dir)):
            raise InputError(f"data.cache_dir must be a local folder, got {cache_dir!r}")
        self.metadata_path = metadata_path
        self.val_metadata_path = val_metadata_path
        self.val_fraction = val_fraction
        self.base_path = base_path
        self.columns, self.constants = columns or {}, constants or {}
        check_mapping(self.columns, self.constants)
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
        self.sample_set: PairDataset | None = None  # rows that a callback samples while training

    def setup(self, stage: str) -> None:
        """Read and check the tables needed in `stage` (fit, validate, test or predict)."""
        if stage == "fit" and self.metadata_path is None:
            raise InputError("data.metadata_path is not set: the table of the training pairs")
        if self.val_metadata_path is not None:
            self.val_set = PairDataset(self._read(self.val_metadata_path))
        if self.metadata_path is not None and (stage == "fit" or self.val_set is None):
            table = self._read(self.metadata_path)
            if self.val_set is None and self.val_fraction:
                held_out = hold_out(table["prompt"], self.val_fraction, self.seed)
                if held_out.all() or not held_out.any():
                    raise InputError(
                        f"data.val_fraction={self.val_fraction} leaves no prompt on one side: "
                        f"{self.metadata_path} has {table['prompt'].nunique()} different prompts"
                    )
                self.val_set = PairDataset(table[held_out])
                table = table[~held_out]
            self.train_set = PairDataset(table)
        if stage != "fit" and self.val_set is None:
            raise InputError(
                f"{stage} needs held-out rows: set data.val_metadata_path or data.val_fraction"
            )

    def _read(self, path: str) -> pd.DataFrame:
        return read_metadata(path, self.base_path, self.call_columns, **self.read_options())

    def read_options(self) -> dict[str, Any]:
        """Return how the tables are read and what limits their rows, for `read_metadata`."""
        names = ("columns", "constants", "height", "width", "max_pixels", "allow_outside")
        return {name: getattr(self, name) for name in names}

    def _loader(self, dataset: PairDataset, train: bool) -> PairLoader:
        trainer = self.trainer
        connector = getattr(trainer, "_accelerator_connector", None)
        if (
            trainer
            and trainer.world_size > 1
            and getattr(connector, "use_distributed_sampler", False)
        ):
            raise InputError(
                "set use_distributed_sampler=False in the Trainer: the data module gives every "
                "process its share of the rows"
            )
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
        limit = getattr(trainer, "overfit_batches", 0) if train else 0
        if limit:  # a number of batches, or a share of them
            number = limit if isinstance(limit, int) else int(limit * len(batches))
            batches.overfit = min(number, len(batches))
        return PairLoader(dataset, batches, self.num_workers)

    def train_dataloader(self) -> PairLoader:
        """Return the loader of the training rows."""
        assert self.train_set is not None, "call setup('fit') first"
        loader = self._loader(self.train_set, train=True)
        if len(loader.batch_sampler) == 0:
            raise InputError(
                f"data.drop_last leaves no batch: no combination of size, steps and guidance has "
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
        """Return a plain loader of the held-out rows, since Lightning re-creates it for predict."""
        assert self.val_set is not None, "call setup('predict') first"
        plan = self._loader(self.val_set, train=False).batch_sampler.plan()
        return DataLoader(PlannedBatches(self.val_set, plan), batch_size=None)
