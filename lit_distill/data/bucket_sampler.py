"""The order of rows: each batch from one bucket, the same plan on all processes, exact resume."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DataLoader, Dataset

from lit_distill.data.batch import Batch, collate
from lit_distill.errors import InputError

Rows = Dataset[dict[str, Any]]


class BucketBatchSampler:
    """Plans the batches of an epoch, each from one bucket, as a pure function of (seed, epoch).

    All ranks use the same bucket at the same step. With several ranks the last batch of a bucket is
    filled up with rows from the bucket's beginning, so that every rank has a batch at every step.

    Args:
        buckets: Indices of rows that may share a batch, one array per bucket.
        batch_size: Rows per batch and rank, >= 1.
        shuffle: Whether to shuffle rows and batches every epoch.
        seed: Seed of the shuffling.
        repeat: Number of passes over every row in an epoch.
        drop_last: Whether to drop the incomplete last batch of each bucket.
        rank: Rank of this process.
        world_size: Number of processes.

    Attributes:
        overfit: Number of batches that make up every epoch, the same ones each time; None: an epoch
            has all batches.
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
        self.overfit: int | None = None
        self.epoch = 0
        self.position = 0

    def plan(self) -> list[list[int]]:
        """Return the batches of this rank in the current epoch."""
        rng = np.random.default_rng([self.seed, self.epoch if self.overfit is None else 0])
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

    @property
    def epoch_is_over(self) -> bool:
        """Whether all batches of the current epoch have been used."""
        return self.position >= (len(self) if self.overfit is None else self.overfit)


class PairLoader(DataLoader[dict[str, Any]]):
    """A stateful `DataLoader` over pairs, for exact resume.

    Lightning saves its state in the checkpoint and restores it on resume. Epochs are counted here
    because Lightning's count is one too high if training stops in the middle of an epoch.
    """

    batch_sampler: BucketBatchSampler

    def __init__(self, dataset: Rows, batches: BucketBatchSampler, num_workers: int) -> None:
        super().__init__(
            dataset,
            batch_sampler=batches,
            collate_fn=collate,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            pin_memory=torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        """Yield the rest of the epoch or the next one; without shuffling, always a whole epoch."""
        batches = self.batch_sampler
        if not batches.shuffle:
            batches.position = 0
        elif batches.epoch_is_over:
            batches.epoch, batches.position = batches.epoch + 1, 0
        iterator = super().__iter__()
        while True:
            try:
                batch = next(iterator)
            except StopIteration:
                return
            except InputError as error:
                raise InputError(_message(error)) from error
            batches.position += 1
            yield batch

    def _order(self) -> dict[str, int]:
        """Return what the order of rows depends on, besides the epoch."""
        batches = self.batch_sampler
        rows = sum(len(bucket) for bucket in batches.buckets)
        step = batches.batch_size * batches.world_size
        return {"seed": batches.seed, "repeat": batches.repeat, "rows": rows, "rows_a_batch": step}

    def state_dict(self) -> dict[str, int]:
        """Return the epoch, the number of its batches already yielded, and what sets the order."""
        batches = self.batch_sampler
        return {"epoch": batches.epoch, "position": batches.position, **self._order()}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Resume at the position of `state`.

        The rest of the epoch is the same if the number of rows per batch over all processes is,
        whatever the number of processes. Otherwise it skips as many rows as were used before.
        """
        order = self._order()
        for name, value in order.items():
            if state[name] != value:
                rank_zero_warn(
                    f"data: {name}={value} differs from the checkpoint's {state[name]}; the rest "
                    "of this epoch may repeat or miss rows"
                )
        rows_done = state["position"] * state["rows_a_batch"]
        self.batch_sampler.epoch = state["epoch"]
        self.batch_sampler.position = rows_done // order["rows_a_batch"]


def _message(error: InputError) -> str:
    """Return an error's message, without the traceback that a worker process adds to it."""
    text = str(error)
    return text.rpartition(f"{InputError.__name__}: ")[2].strip() if "Traceback" in text else text


class PlannedBatches(Dataset[Batch]):
    """A dataset whose items are the batches of a plan."""

    def __init__(self, dataset: Rows, plan: list[list[int]]) -> None:
        self.dataset = dataset
        self.plan = plan

    def __len__(self) -> int:
        return len(self.plan)

    def __getitem__(self, index: int) -> Batch:
        return collate([self.dataset[row] for row in self.plan[index]])
