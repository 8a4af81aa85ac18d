"""Encodes all rows of the data sets into a store before training, shared by all processes.

Afterwards the encoders are no longer needed, and `EncodeOnce.release` can free them.
"""

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
    encoder: EncodeOnce,
    datasets: list[PairDataset],
    call: Callable[[Batch], dict[str, Any]],
    teacher_cfg_scale: float,
    *,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], Any] = lambda: None,
) -> None:
    """Encode the prompts, pictures and images of all rows that are not in the store yet.

    With several processes each encodes its share.

    Args:
        encoder: The pipeline's encoders; their store has a folder.
        datasets: The rows.
        call: Returns the arguments of the pipeline's call for a batch.
        teacher_cfg_scale: Guidance of the online teacher, for rows without a target.
        rank: Rank of this process.
        world_size: Number of processes.
        barrier: Waits for all processes.

    Raises:
        ValueError: If an image can't be read, or the pipeline does not accept a row.
    """
    tasks: dict[str, Callable[[], None]] = {}
    all_scales: set[float] = set()
    for dataset in datasets:
        for index in range(len(dataset)):
            row = dataset.record(index)
            if row["image"] and not row["latents"]:
                key = image_key(encoder.namespace, row["image"])
                tasks[key] = partial(encoder.cache_image, row["image"])
            scales = {row["cfg_scale"]}
            if not row["image"] and not row["latents"]:
                scales.add(teacher_cfg_scale)
            all_scales |= scales
            key = _row_key(encoder, row, call, scales)
            tasks[key] = partial(_encode_rows, encoder, [row], call, scales, key)
    # Shared out before stored rows are skipped, since the store may look different to a slower
    # process.
    share = list(tasks.items())[rank::world_size]
    missing = [task for key, task in share if key not in encoder.store]
    try:
        for task in tqdm(missing, desc="Encoding", disable=rank != 0 or not missing):
            task()
    finally:
        encoder.store.flush()  # so that an interrupted run can resume
    barrier()
    encoder.store.reload()
    # Every process needs an example of how prompts of different length are collated.
    lengths = [
        (len(text), n, i) for n, d in enumerate(datasets) for i, text in enumerate(d.prompts)
    ]
    extremes = [datasets[n].record(index) for _, n, index in (min(lengths), max(lengths))]
    if extremes[0]["call_key"] == extremes[1]["call_key"]:
        with suppress(EncodingCollateError):  # preflight reports it
            _encode_rows(encoder, extremes, call, all_scales)


def _row_key(
    encoder: EncodeOnce,
    row: dict[str, Any],
    call: Callable[[Batch], dict[str, Any]],
    scales: set[float],
) -> str:
    """Return the key that is in the store if all encodings of the row are."""
    files = {k: file_signature(v) if isinstance(v, Picture) else v for k, v in row["call"].items()}
    arguments = call(collate([row | {"call": files} | NO_TARGET]))
    del arguments["generator"]
    return encoder.key("row", arguments, sorted(scales))


def _encode_rows(
    encoder: EncodeOnce,
    rows: list[dict[str, Any]],
    call: Callable[[Batch], dict[str, Any]],
    scales: set[float],
    key: str | None = None,
) -> None:
    """Encode rows at every guidance scale that they are sampled with, and mark `key` as done."""
    loaded = [row | {"call": open_pictures(row["call"])} | NO_TARGET for row in rows]
    steps = int(rows[0]["num_inference_steps"])
    for cfg_scale in sorted(scales):
        arguments = call(collate(loaded))
        encoder.populate(cfg_scale=float(cfg_scale), num_inference_steps=steps, **arguments)
    if key is not None:
        encoder.store[key] = None
