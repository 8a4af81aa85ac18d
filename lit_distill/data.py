"""Pairs to learn from: a metadata table in, batches of one size, step count and guidance out."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypedDict

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

REQUIRED_COLUMNS = ("prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale")
LATENTS_KEY = "latents"
"""Name of the tensor in a file of the ``latents`` column."""

MAX_PROBLEMS = 50


class Batch(TypedDict):
    """What `DistillDataModule` yields: B rows that share everything but prompt, seed and target.

    Attributes:
        prompt: B texts.
        seed: B seeds of the start noise.
        rand_device: Device whose generator draws the noise.
        num_inference_steps: The student's.
        cfg_scale: The student's, 1 = off.
        size: (height, width) in pixels; None: the pipeline's own default.
        image: The teacher's images, (B, 3, height, width), range [0, 1], or None.
        latents: The teacher's exact final latents, (B, ...), or None.
        row: B row numbers as a spreadsheet shows them, the header being row 1.
    """

    prompt: list[str]
    seed: list[int]
    rand_device: str
    num_inference_steps: int
    cfg_scale: float
    size: tuple[int, int] | None
    image: Tensor | None
    latents: Tensor | None
    row: list[int]


class MetadataError(ValueError):
    """A metadata table can't be used; the message lists every problem found, up to 50."""


class Problems:
    """Collects what is wrong with a table, so that one error can show it all."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: list[str] = []

    def add(self, text: str, row: int | None = None, image: str = "") -> None:
        """Note one problem; `row` is the spreadsheet's row number."""
        place = "" if row is None else f" row {row}"
        shown = f" (image={image!r})" if image else ""
        self.lines.append(f"{self.path.name}{place}{shown}: {text}")

    def check(self) -> None:
        """Raise what was collected.

        Raises:
            MetadataError: If there was any problem.
        """
        if not self.lines:
            return
        more = len(self.lines) - MAX_PROBLEMS
        shown = self.lines[:MAX_PROBLEMS] + ([f"... and {more} more"] if more > 0 else [])
        count = "1 problem" if len(self.lines) == 1 else f"{len(self.lines)} problems"
        raise MetadataError("\n".join([f"{count} in {self.path}:", *shown]))


def read_metadata(path: str | Path, base_path: str | Path | None = None) -> pd.DataFrame:
    """Read and check a metadata CSV.

    Columns: ``prompt``, ``seed``, ``rand_device``, ``num_inference_steps``, ``cfg_scale`` (the last
    two are the student's) and ``image`` or ``latents``, files relative to `base_path`. Optional:
    ``height``, ``width``. Others stay text. A file made for DiffSynth-Studio works unchanged.

    Args:
        path: CSV file, UTF-8 with or without byte order mark.
        base_path: Folder that ``image`` and ``latents`` are relative to; default: the CSV's.

    Returns:
        One row a pair, in the file's order, with a column ``row``, the number a spreadsheet shows
        (header = 1); ``image`` and ``latents`` are full paths, empty where not given; ``height``
        and ``width`` are 0 where not given.

    Raises:
        FileNotFoundError: If there is no such CSV.
        MetadataError: Naming every row, column and value that can't be used (up to 50).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"metadata file {path} does not exist")
    try:
        # Everything is text until its declared type says otherwise: pandas would make NaN of a
        # prompt "NA" and floats of a column of seeds with a blank.
        raw = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8-sig")
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise MetadataError(f"{path} is not a CSV file in UTF-8: {error}") from error
    problems = Problems(path)
    for column in REQUIRED_COLUMNS:
        if column not in raw:
            problems.add(f"column {column!r} is missing; found {', '.join(map(repr, raw.columns))}")
    if not {"image", "latents"} & set(raw.columns):
        problems.add("a column 'image' or 'latents' is needed; found neither")
    if raw.empty:
        problems.add("the table has no rows")
    problems.check()

    raw["row"] = np.arange(2, len(raw) + 2)
    for column in ("image", "latents", "height", "width"):
        if column not in raw:
            raw[column] = ""
    table = raw.copy()
    parse = _ColumnParser(raw, problems)
    table["seed"] = parse.integers("seed", 0, 2**63 - 1)
    table["num_inference_steps"] = parse.integers("num_inference_steps", 1, 10_000)
    table["cfg_scale"] = parse.numbers("cfg_scale", 1.0)
    for column in ("height", "width"):
        table[column] = parse.integers(column, 1, 2**20, blank=0)
    parse.texts("prompt", lambda text: text.strip() != "", "a text that is not empty")
    parse.texts("rand_device", _can_draw, "cpu, or cuda (or cuda:N) where there is such a GPU")
    base = Path(base_path) if base_path is not None else path.parent
    for column in ("image", "latents"):
        given = table[column] != ""
        table.loc[given, column] = [str(base / name) for name in table.loc[given, column]]
        exists = [name == "" or Path(name).is_file() for name in table[column]]
        parse.reject(column, ~np.array(exists), f"a file below {base}")
    problems.check()
    return table


class _ColumnParser:
    """Parses text columns by declared type and notes what does not fit."""

    def __init__(self, raw: pd.DataFrame, problems: Problems) -> None:
        self.raw = raw
        self.problems = problems

    def reject(self, column: str, bad: Any, accepted: str) -> None:  # noqa: ANN401
        for index in np.flatnonzero(bad):
            record = self.raw.iloc[index]
            self.problems.add(
                f"{column} must be {accepted}, got {record[column]!r}",
                int(record["row"]),
                "" if column == "image" else record["image"],
            )

    def integers(self, column: str, low: int, high: int, blank: int | None = None) -> pd.Series:
        text = self.raw[column].str.strip()
        if blank is not None:
            text = text.mask(text == "", str(blank))
        # At most 19 digits fit int64; those above its limit turn negative and are caught below.
        whole = text.str.fullmatch(r"\d{1,19}")
        values = pd.Series(0, index=text.index, dtype="int64")
        values[whole] = text[whole].astype("uint64").astype("int64")
        bad = ~whole | (values < (low if blank is None else blank)) | (values > high)
        self.reject(column, bad.to_numpy(), f"an integer >= {low} and <= {high}")
        return values

    def numbers(self, column: str, low: float) -> pd.Series:
        values = pd.to_numeric(self.raw[column], errors="coerce").astype("float64")
        bad = ~(np.isfinite(values.to_numpy()) & (values.to_numpy() >= low))
        self.reject(column, bad, f"a number >= {low:g}")
        return values

    def texts(self, column: str, good: Callable[[str], bool], accepted: str) -> None:
        verdict = {text: good(text) for text in self.raw[column].unique()}
        fits = np.array([verdict[text] for text in self.raw[column]])
        self.reject(column, ~fits, accepted)


def _can_draw(device: str) -> bool:
    """Whether a generator of this device can be made here."""
    try:
        torch.Generator(device)
    except RuntimeError:  # an unknown name, or no such device in this machine
        return False
    return True


def read_image(path: str | Path) -> Tensor:
    """Read an image as it is: never resized, EXIF rotation applied.

    Args:
        path: A file that Pillow reads, in 8-bit grey, palette, RGB or opaque RGBA.

    Returns:
        (3, height, width), float32, range [0, 1].

    Raises:
        ValueError: If it can't be read, is truncated, has transparent pixels, or is of a kind
            (CMYK, 16-bit, ...) whose conversion would be a guess.
    """
    try:
        with Image.open(path) as file:
            image: Image.Image = ImageOps.exif_transpose(file)
            image.load()
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} is not a readable image: {error}") from error
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise ValueError(f"{path} has transparent pixels; flatten it onto a background first")
    elif image.mode not in ("RGB", "L", "P", "1"):
        raise ValueError(f"{path} has colour mode {image.mode}; save it as 8-bit RGB first")
    array = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) from an image's header, EXIF rotation applied.

    Raises:
        ValueError: If it is not an image.
    """
    try:
        with Image.open(path) as file:
            width, height = file.size
            turned = file.getexif().get(0x0112, 1) >= 5  # orientations that swap the sides
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"not a readable image ({error})") from error
    return (width, height) if turned else (height, width)


def check_sizes(
    table: pd.DataFrame,
    path: Path,
    *,
    height: int | None,
    width: int | None,
    max_pixels: int | None,
) -> pd.DataFrame:
    """Fill in ``height`` and ``width`` of every row and refuse what does not fit.

    Images are never resized: a target must be what the teacher drew.

    Args:
        table: As `read_metadata` returns it.
        path: The CSV, for messages.
        height: With `width`, the size in pixels that every row must have.
        width: See `height`.
        max_pixels: Largest area in pixels; smaller images of any size are accepted.

    Returns:
        The table; rows of unknown size (no image, no columns) get `height` and `width`, or 0, the
        pipeline's own default.

    Raises:
        MetadataError: Naming every row whose size does not fit, its size and the limit.
    """
    problems = Problems(path)
    fixed = (height, width) if height and width else None
    sizes = np.zeros((len(table), 2), dtype=np.int64)
    # Lists, not `iloc`: a hundred times faster on a large table.
    columns = [table[name].tolist() for name in ("row", "image", "height", "width")]
    for index, (row, image, *listed) in enumerate(zip(*columns, strict=True)):
        size = (int(listed[0]), int(listed[1]))
        if size == (0, 0) and image:
            try:
                size = image_size(image)
            except ValueError as error:
                problems.add(f"image: {error}", row, image)
                continue
        if size == (0, 0):
            size = fixed or size
        elif fixed and size != fixed:
            problems.add(
                f"the image is {size[0]}x{size[1]} (height x width), but height and width are set "
                f"to {height}x{width}; images are never resized",
                row,
                image,
            )
        elif max_pixels and size[0] * size[1] > max_pixels:
            problems.add(
                f"the image is {size[0]}x{size[1]} = {size[0] * size[1]} pixels, more than "
                f"max_pixels={max_pixels}; images are never resized",
                row,
                image,
            )
        sizes[index] = size
    problems.check()
    return table.assign(height=sizes[:, 0], width=sizes[:, 1])


def hold_out(prompts: pd.Series, fraction: float, seed: int) -> pd.Series:
    """Mark about `fraction` of the prompts, the same ones for a seed however the table grows.

    Returns:
        Boolean, True for held-out rows; all rows of a prompt are on one side.
    """

    def draw(prompt: str) -> float:
        digest = hashlib.sha256(f"{seed}:{prompt}".encode()).digest()
        return int.from_bytes(digest[:8], "big") / 2**64

    return prompts.map({prompt: draw(prompt) < fraction for prompt in prompts.unique()})


class PairDataset(Dataset[dict[str, Any]]):
    """The rows of a checked table, with their images or latents read on access."""

    def __init__(self, table: pd.DataFrame) -> None:
        self.table = table
        fields = ["row", "prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale"]
        fields += ["height", "width", "image", "latents"]
        self.columns = {name: table[name].to_numpy() for name in fields}

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, index: int) -> dict[str, Any]:
        """Return one row; exact latents are preferred to the image they decode to."""
        row = {name: column[index] for name, column in self.columns.items()}
        image, latents = None, None
        if row["latents"]:
            try:
                latents = load_file(row["latents"])[LATENTS_KEY]
            except Exception as error:  # safetensors raises its own kinds, without the file's name
                raise ValueError(
                    f"row {row['row']}: {row['latents']} holds no tensor "
                    f"{LATENTS_KEY!r} in safetensors format: {error}"
                ) from error
        elif row["image"]:
            image = read_image(row["image"])
            if tuple(image.shape[1:]) != (row["height"], row["width"]):
                raise ValueError(
                    f"row {row['row']}: {row['image']} is {image.shape[1]}x{image.shape[2]} (height"
                    f" x width), but the table says {row['height']}x{row['width']}"
                )
        return row | {"image": image, "latents": latents}

    def buckets(self) -> list[np.ndarray]:
        """Return the indices of rows that may share a batch, one array a bucket."""
        keys = ["height", "width", "num_inference_steps", "cfg_scale", "rand_device"]
        kind = np.where(self.table["latents"] != "", 2, np.where(self.table["image"] != "", 1, 0))
        groups = self.table.assign(kind=kind).groupby([*keys, "kind"], sort=True)
        return [np.sort(index) for index in groups.indices.values()]


def collate(rows: list[dict[str, Any]]) -> Batch:
    """Make a batch of rows of one bucket."""
    first = rows[0]
    size = (int(first["height"]), int(first["width"]))
    return {
        "prompt": [str(row["prompt"]) for row in rows],
        "seed": [int(row["seed"]) for row in rows],
        "rand_device": str(first["rand_device"]),
        "num_inference_steps": int(first["num_inference_steps"]),
        "cfg_scale": float(first["cfg_scale"]),
        "size": None if size == (0, 0) else size,
        "image": None if first["image"] is None else torch.stack([r["image"] for r in rows]),
        "latents": None if first["latents"] is None else torch.stack([r["latents"] for r in rows]),
        "row": [int(row["row"]) for row in rows],
    }


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
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.buckets = buckets
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.repeat = repeat
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
            missing = -len(rows) % self.world_size
            rows = np.concatenate([rows, np.resize(rows, missing)])
            chunks += [rows[start : start + size] for start in range(0, len(rows), size)]
        if self.shuffle:
            chunks = [chunks[index] for index in rng.permutation(len(chunks))]
        return [chunk[self.rank :: self.world_size].tolist() for chunk in chunks]

    def __len__(self) -> int:
        size = self.batch_size * self.world_size
        return sum(-(-len(bucket) * self.repeat // size) for bucket in self.buckets)

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
        metadata_path: CSV of the training pairs.
        val_metadata_path: CSV of held-out pairs, for validate, test and predict.
        val_fraction: Without `val_metadata_path`: hold out about this share of the prompts.
        base_path: Folder that image and latents paths are relative to; default: the CSV's.
        height: With `width`, the size in pixels that every image must have.
        width: See `height`.
        max_pixels: Largest area of an image in pixels. Without height, width and max_pixels
            every image is used at its own size.
        batch_size: Rows a batch and process.
        num_workers: Processes that read files; 0 reads in the training process.
        repeat: How often an epoch passes over the training rows.
        cache_dir: Reserved: a folder for encoded prompts and images; must be null for now.
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
        height: int | None = None,
        width: int | None = None,
        max_pixels: int | None = None,
        batch_size: int = 1,
        num_workers: int = 0,
        repeat: int = 1,
        cache_dir: str | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        if (height is None) != (width is None):
            raise ValueError(f"data.height={height}, data.width={width}: set both or neither")
        for name, value in (("batch_size", batch_size), ("repeat", repeat)):
            if value < 1:
                raise ValueError(f"data.{name} must be >= 1, got {value}")
        if cache_dir is not None:
            raise ValueError(
                "data.cache_dir: encodings are kept in memory only for now; leave it out"
            )
        if not 0 <= val_fraction < 1:
            raise ValueError(f"data.val_fraction must be in [0, 1), got {val_fraction}")
        self.metadata_path = metadata_path
        self.val_metadata_path = val_metadata_path
        self.val_fraction = val_fraction
        self.base_path = base_path
        self.height = height
        self.width = width
        self.max_pixels = max_pixels
        self.batch_size = batch_size
        self.num_workers = num_workers
        self.repeat = repeat
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
        limits = {"height": self.height, "width": self.width, "max_pixels": self.max_pixels}
        return check_sizes(read_metadata(path, self.base_path), Path(path), **limits)

    def _loader(self, dataset: PairDataset, train: bool) -> PairLoader:
        trainer = self.trainer
        batches = BucketBatchSampler(
            dataset.buckets(),
            batch_size=self.batch_size,
            shuffle=train,
            seed=self.seed,
            repeat=self.repeat if train else 1,
            rank=trainer.global_rank if trainer else 0,
            world_size=trainer.world_size if trainer else 1,
        )
        return PairLoader(dataset, batches, self.num_workers)

    def train_dataloader(self) -> PairLoader:
        """Return the loader of the training rows."""
        assert self.train_set is not None, "call setup('fit') first"
        return self._loader(self.train_set, train=True)

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
