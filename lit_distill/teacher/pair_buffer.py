"""Pairs that the online teacher has generated, each used several times before it is replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lit_distill.data.batch import TARGETS, Batch, merge_batches, split_batch
from lit_distill.errors import InputError


class PairBuffer:
    """Generated pairs of which a training step takes new ones or some that it has used before.

    As long as there is room for a batch, the teacher generates one: it is trained on and kept.
    Otherwise the batch is drawn from what is kept. A pair leaves the buffer after `reuse` uses,
    which makes room again, so that in the long run one batch in `reuse` is generated. Batches of
    different sizes, steps or call arguments have buffers of their own.

    All decisions depend on counts and on `draw` only, so that all processes, whose rows differ,
    generate in the same steps.

    Args:
        reuse: How often a pair is used, >= 1.
        capacity: Number of pairs that are kept, on the host, by each process.
    """

    def __init__(self, reuse: int, capacity: int) -> None:
        self.reuse = reuse
        self.capacity = capacity
        self._pairs: dict[str, list[tuple[int, Batch]]] = {}

    def next(
        self,
        batch: Batch,
        generate: Callable[[Batch], Batch],
        draw: Callable[[int, int], list[int]],
    ) -> Batch:
        """Return a batch with the teacher's results, for as many rows as `batch` has.

        Args:
            batch: Rows without a target.
            generate: Returns rows with the teacher's results.
            draw: ``draw(n, k)`` returns k different numbers from 0 to n - 1.

        Raises:
            InputError: If a batch does not fit into the buffer, or its rows hold pictures.
        """
        count = len(batch["row"])
        pairs = self._pairs.setdefault(_key(batch), [])
        if count > self.capacity:
            raise InputError(
                f"model.teacher_buffer is {self.capacity}, less than the {count} rows of a batch; "
                "set it to several times data.batch_size"
            )
        if len(pairs) + count <= self.capacity:
            made = generate(batch)
            kept = with_targets_on(made, torch.device("cpu"))
            pairs += [(self.reuse - 1, row) for row in split_batch(kept, 1)]
            return made
        chosen = draw(len(pairs), count)
        drawn = merge_batches([pairs[index][1] for index in chosen])
        for index in chosen:
            pairs[index] = (pairs[index][0] - 1, pairs[index][1])
        pairs[:] = [pair for pair in pairs if pair[0] > 0]
        return drawn

    def state(self) -> list[tuple[int, Batch]]:
        """Return what a checkpoint holds: the pairs, each with its number of uses left."""
        return [pair for pairs in self._pairs.values() for pair in pairs]

    def load(self, state: list[tuple[int, Batch]]) -> None:
        """Take over the state of a checkpoint."""
        self._pairs.clear()
        for left, row in state:
            self._pairs.setdefault(_key(row), []).append((left, row))


def with_targets_on(batch: Batch, device: torch.device) -> Batch:
    """Return the batch with its targets on a device."""
    targets: Any = {name: batch[name] for name in TARGETS}  # type: ignore[literal-required]
    moved = {n: t.to(device) if isinstance(t, Tensor) else t for n, t in targets.items()}
    return {**batch, **moved}  # type: ignore[typeddict-item]


def _key(batch: Batch) -> str:
    """Return what rows of one batch share.

    Raises:
        InputError: If the rows hold pictures, which a checkpoint can't hold.
    """
    call: dict[str, Any] = {}
    for name, value in batch["call"].items():
        entries = value if isinstance(value, list) else [value]
        if not all(isinstance(entry, int | float | str) for entry in entries):
            raise InputError(
                f"model.teacher_reuse: row {batch['row'][0]} has {name}, which is not a text or a "
                "number, and a checkpoint can't hold it; set teacher_reuse: 1, or make the pairs "
                "first with `lit-distill generate`"
            )
        call[name] = None if isinstance(value, list) else value
    shared = ("size", "num_inference_steps", "cfg_scale", "rand_device")
    return repr(([batch[name] for name in shared], sorted(call.items())))  # type: ignore[literal-required]
