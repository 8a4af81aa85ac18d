"""Encodes all rows of the data sets into a store before training, shared by all processes.

Afterwards the encoders are no longer needed, and `EncodeOnce.release` can free them.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_info
from tqdm.auto import tqdm

from lit_distill.data.batch import NO_TARGET, Batch, collate, open_pictures
from lit_distill.data.dataset import PairDataset
from lit_distill.data.filesystem import content_digest, content_digests, known_digests
from lit_distill.data.images import Picture
from lit_distill.encoding.collate import EncodingCollateError
from lit_distill.encoding.encode_once import EncodeOnce, image_key
from lit_distill.encoding.signals import signals_delayed
from lit_distill.encoding.store import EncodingStore, LostEncodingError
from lit_distill.errors import InputError


def encode_ahead(
    encoder: EncodeOnce,
    datasets: list[PairDataset],
    call: Callable[[Batch], dict[str, Any]],
    teacher_cfg_scale: float,
    *,
    always_guided: bool = False,
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
        always_guided: Whether the teacher is asked about rows with a target, too.
        rank: Rank of this process.
        world_size: Number of processes.
        barrier: Waits for all processes.

    Raises:
        InputError: If an image can't be read, the pipeline does not accept a row, or its encodings
            can't be stored.
    """
    tasks: dict[str, _Task] = {}
    all_scales: set[float] = set()
    for dataset in datasets:
        for index in range(len(dataset)):
            row = dataset.record(index)
            if row["image"] and not row["latents"]:
                tasks[row["image"]] = _image_task(encoder, row["image"])
            scales = {row["cfg_scale"]}
            if always_guided or not (row["image"] or row["latents"]):
                scales.add(teacher_cfg_scale)
            all_scales |= scales
            row_key = partial(_row_key, encoder, row, call, scales)
            pictures = [value for value in row["call"].values() if isinstance(value, Picture)]
            tasks[row_key(str)] = _Task(
                pictures,
                partial(row_key, content_digest),
                partial(_row_is_complete, encoder.store),
                partial(_encode_rows, encoder, [row], call, scales),
            )
    # Shared out before stored rows are skipped, since the store may look different to a slower
    # process, and before files are read, so that each process reads only those of its share.
    share = list(tasks.values())[rank::world_size]
    for _ in range(2):  # again for what another process has found damaged in the first pass
        _encode_missing(encoder.store, share, show_progress=rank == 0)
        barrier()
        encoder.store.reload()
    _exchange_digests()
    # Every process needs an example of how prompts of different length are collated.
    lengths = [
        (len(text), n, i) for n, d in enumerate(datasets) for i, text in enumerate(d.prompts)
    ]
    extremes = [datasets[n].record(index) for _, n, index in (min(lengths), max(lengths))]
    if extremes[0]["call_key"] == extremes[1]["call_key"]:
        with suppress(EncodingCollateError):  # preflight reports it
            _encode_rows(encoder, extremes, call, all_scales)


class _Task(NamedTuple):
    """An image or a row to encode.

    Attributes:
        pictures: The files whose content is part of its key.
        key: Returns its key.
        is_complete: Returns whether its encodings are in the store, for its key.
        encode: Stores its encodings, for its key.
    """

    pictures: list[Picture]
    key: Callable[[], str]
    is_complete: Callable[[str], bool]
    encode: Callable[[str], None]


def _image_task(encoder: EncodeOnce, path: str) -> _Task:
    return _Task(
        [Picture(path)],
        partial(image_key, encoder.namespace, path),
        encoder.store.__contains__,
        lambda _: encoder.cache_image(path),
    )


def _encode_missing(store: EncodingStore, tasks: list[_Task], *, show_progress: bool) -> None:
    """Encode what is not in the store; what is encoded when a signal arrives is kept."""
    pictures = list({picture for task in tasks for picture in task.pictures})
    for _ in tqdm(
        content_digests(pictures),
        "Reading images",
        len(pictures),
        delay=2,
        disable=None if show_progress else True,  # None: only in a terminal
    ):
        pass  # the digests are remembered
    keyed = {task.key(): task for task in tasks}
    missing = {key: task for key, task in keyed.items() if not task.is_complete(key)}
    shown = None if missing and show_progress else True  # None: only in a terminal
    progress = tqdm(missing.items(), "Encoding", leave=False, disable=shown)
    with signals_delayed() as received:
        try:
            for count, (key, task) in enumerate(progress):
                if received:
                    rank_zero_info(
                        f"Stopped with {count} of {len(missing)} rows and images encoded; the next "
                        "start continues there"
                    )
                    break
                task.encode(key)
        finally:
            store.flush()


def _exchange_digests() -> None:
    """Learn the digests of the images that other processes have read, which training looks up."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        digests: list[Any] = [None] * torch.distributed.get_world_size()
        torch.distributed.all_gather_object(digests, known_digests)
        for each in digests:
            known_digests.update(each)


def _row_is_complete(store: EncodingStore, key: str) -> bool:
    """Return whether the store has all encodings of a row, whose keys are under the row's key."""
    if key not in store:
        return False
    try:
        return all(each in store for each in store[key])
    except LostEncodingError as error:
        warnings.warn(f"{error}: its content is encoded again", stacklevel=2)
        return False


def _row_key(
    encoder: EncodeOnce,
    row: dict[str, Any],
    call: Callable[[Batch], dict[str, Any]],
    scales: set[float],
    name_picture: Callable[[str], str],
) -> str:
    """Return the key of a row: under it, the keys of the row's encodings are stored.

    Args:
        encoder: The pipeline's encoders.
        row: The row.
        call: Returns the arguments of the pipeline's call for a batch.
        scales: The guidance scales that the row is sampled with.
        name_picture: Returns what stands for a picture: its path or the digest of its content.
    """
    given = {k: name_picture(v) if isinstance(v, Picture) else v for k, v in row["call"].items()}
    arguments = call(collate([row | {"call": given} | NO_TARGET]))
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
    keys: set[str] = set()
    for cfg_scale in sorted(scales):
        arguments = call(collate(loaded))
        keys |= encoder.populate(cfg_scale=float(cfg_scale), num_inference_steps=steps, **arguments)
    if encoder.not_stored:
        raise InputError(
            f"data.cache_dir can't be used with {type(encoder.pipe).__name__} "
            f"({encoder.not_stored}); leave it out"
        )
    if key is not None:
        encoder.store[key] = sorted(keys)
