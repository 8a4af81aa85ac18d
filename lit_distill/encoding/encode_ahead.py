"""Encodes all rows of a data set before training."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from tqdm.auto import tqdm

from lit_distill.data.batch import NO_TARGET, Batch, collate, open_pictures
from lit_distill.data.dataset import PairDataset
from lit_distill.data.filesystem import file_signature
from lit_distill.data.images import Picture
from lit_distill.encoding.collate import EncodingCollateError
from lit_distill.encoding.encode_once import EncodeOnce, image_key


def encode_ahead(
    once: EncodeOnce,
    datasets: list[PairDataset],
    call: Callable[[Batch], dict[str, Any]],
    teacher_cfg_scale: float,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], Any] = lambda: None,
) -> None:
    """Keep the encodings of all rows: their prompts, their pictures and their images.

    What is kept already is not encoded again. With several processes each encodes its share.

    Args:
        once: The pipeline's encoders; its store has a folder.
        datasets: The rows.
        call: Returns the arguments of the pipeline's call for a batch.
        teacher_cfg_scale: Guidance of the online teacher, for rows without a target.
        rank: This process.
        world_size: Number of processes.
        barrier: Waits for all processes.

    Raises:
        ValueError: If an image can't be read, or the pipeline does not take a row.
    """
    todo: dict[str, Callable[[], None]] = {}
    scales: set[float] = set()
    for dataset in datasets:
        for index in range(len(dataset)):
            record = dataset.record(index)
            if record["image"] and not record["latents"]:
                key = image_key(once.identity, record["image"])
                todo[key] = partial(once.image_latents, record["image"])
            needed = {record["cfg_scale"]}
            if not record["image"] and not record["latents"]:
                needed.add(teacher_cfg_scale)
            scales |= needed
            key = _row_key(once, record, call, needed)
            todo[key] = partial(_rehearse, once, [record], call, needed, key)
    # Shared out before what is kept is left out: a slow process may see more kept than a quick one.
    share = list(todo.items())[rank::world_size]
    mine = [work for key, work in share if key not in once.store]
    try:
        for work in tqdm(mine, desc="Encoding", disable=rank != 0 or not mine):
            work()
    finally:
        once.store.flush()  # an interrupted run goes on from here
    barrier()
    once.store.reload()
    # Every process learns how prompts of different length are put together.
    lengths = [
        (len(text), n, i) for n, d in enumerate(datasets) for i, text in enumerate(d.prompts)
    ]
    ends = [datasets[n].record(index) for _, n, index in (min(lengths), max(lengths))]
    if ends[0]["call_key"] == ends[1]["call_key"]:
        with suppress(EncodingCollateError):  # which preflight is going to find
            _rehearse(once, ends, call, scales)


def _row_key(
    once: EncodeOnce,
    record: dict[str, Any],
    call: Callable[[Batch], dict[str, Any]],
    scales: set[float],
) -> str:
    """Return the key that says that all encodings of a row are kept."""
    files = {
        k: file_signature(v) if isinstance(v, Picture) else v for k, v in record["call"].items()
    }
    arguments = call(collate([record | {"call": files} | NO_TARGET]))
    del arguments["generator"]
    return once.key("row", arguments, sorted(scales))


def _rehearse(
    once: EncodeOnce,
    records: list[dict[str, Any]],
    call: Callable[[Batch], dict[str, Any]],
    scales: set[float],
    key: str | None = None,
) -> None:
    opened = [row | {"call": open_pictures(row["call"])} | NO_TARGET for row in records]
    steps = int(records[0]["num_inference_steps"])
    for cfg_scale in sorted(scales):
        arguments = call(collate(opened))
        once.rehearse(cfg_scale=float(cfg_scale), num_inference_steps=steps, **arguments)
    if key is not None:
        once.store[key] = None
