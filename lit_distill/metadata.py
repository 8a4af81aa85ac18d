"""The table of pairs: read, parsed by declared type, checked; all that is wrong in one error."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps
from torch import Tensor

REQUIRED_COLUMNS = ("prompt", "seed", "rand_device", "num_inference_steps", "cfg_scale")

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

MAX_PROBLEMS = 50


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


def read_metadata(
    path: str | Path,
    base_path: str | Path | None = None,
    call_columns: dict[str, str] | None = None,
) -> pd.DataFrame:
    """Read and check a metadata CSV.

    Columns: ``prompt``, ``seed``, ``rand_device``, ``num_inference_steps``, ``cfg_scale`` (the last
    two are the student's) and ``image`` or ``latents``, files relative to `base_path`. Optional:
    ``height``, ``width``. Others stay text. A file made for DiffSynth-Studio works unchanged.

    Args:
        path: CSV file, UTF-8 with or without byte order mark.
        base_path: Folder that files are relative to; default: the CSV's.
        call_columns: Further columns that are arguments of the pipeline's call: argument -> column.
            Files of pictures are opened when a row is used; numbers and texts are as they stand.

    Returns:
        One row a pair, in the file's order, with a column ``row``, the number a spreadsheet shows
        (header = 1); ``image`` and ``latents`` are full paths, empty where not given; ``height``
        and ``width`` are 0 where not given; ``call`` is a dictionary of `call_columns`' values
        (`pathlib.Path` of a picture, number or text), and ``call_key`` is equal for rows whose
        values may share a batch.

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
    call_columns = call_columns or {}
    for column in (*REQUIRED_COLUMNS, *call_columns.values()):
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
    calls = read_calls(raw, call_columns, base, problems)
    problems.check()
    table["call"] = pd.Series(calls, dtype=object)
    table["call_key"] = [call_key(call) for call in calls] if call_columns else ""
    return table


def read_calls(
    raw: pd.DataFrame, call_columns: dict[str, str], base: Path, problems: Problems
) -> list[dict[str, Any]]:
    """Return each row's further arguments of the pipeline's call.

    Args:
        raw: The table as text, with columns ``row`` and ``image``.
        call_columns: Argument to column.
        base: Folder that paths are relative to.
        problems: Where pictures that can't be read are noted.

    Returns:
        For every row argument -> `pathlib.Path` of a picture, number or text.
    """
    parse = _ColumnParser(raw, problems)
    columns = [parse.values(column, base) for column in call_columns.values()]
    if not columns:
        return [{}] * len(raw)
    return [dict(zip(call_columns, row, strict=True)) for row in zip(*columns, strict=True)]


def call_key(call: dict[str, Any]) -> str:
    """Return what rows of a batch must share: numbers, and the sizes of pictures."""
    shared = {
        name: image_size(value) if isinstance(value, Path) else value
        for name, value in call.items()
        if not isinstance(value, str)
    }
    return repr(shared)


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

    def values(self, column: str, base: Path) -> list[Any]:
        """Return a column of pictures' paths, numbers or texts, whichever all of it is."""
        texts = self.raw[column].str.strip()
        numbers = pd.to_numeric(texts, errors="coerce")
        if numbers.notna().all():
            return numbers.tolist()
        if not texts.str.lower().str.endswith(PICTURES).any():
            return self.raw[column].tolist()
        paths = [base / text for text in texts]
        readable = []
        for path in paths:
            try:
                image_size(path)
                readable.append(True)
            except ValueError:
                readable.append(False)
        self.reject(column, ~np.array(readable), f"a picture below {base}")
        return paths


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
        path: A file that `read_picture` accepts.

    Returns:
        (3, height, width), float32, range [0, 1].

    Raises:
        ValueError: As in `read_picture`.
    """
    array = np.asarray(read_picture(path), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB: never resized, EXIF rotation applied.

    Args:
        path: A file that Pillow reads, in 8-bit grey, palette, RGB or opaque RGBA.

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
    return image.convert("RGB")


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
