"""Reads pictures as 8-bit RGB, never resized; refuses those whose conversion would be a guess."""

from __future__ import annotations

import io
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, TiffImagePlugin, UnidentifiedImageError, WebPImagePlugin
from torch import Tensor

from lit_distill.data.arrow_files import split_reference
from lit_distill.data.filesystem import is_url, open_file
from lit_distill.errors import InputError

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")

assert TiffImagePlugin and WebPImagePlugin  # importing them registers their formats

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF")
"""What Pillow may open. Of its other formats some start programs, and none holds our images."""


class Picture(str):
    """Path or URL of a picture; the type distinguishes it from a text."""

    def suffix(self) -> str:
        """Return the suffix of its file, or one for the format of an embedded file."""
        if split_reference(self) is None:
            return Path(self).suffix.lower()
        with open_file(self) as stream, Image.open(stream, formats=_FORMATS) as file:
            return {"JPEG": ".jpg", "TIFF": ".tif"}.get(str(file.format), f".{file.format}".lower())

    def absolute(self) -> str:
        """Return the absolute path, or the URL, as a plain string."""
        return str(self) if is_url(self) else str(Path(self).absolute())


def read_image(path: str | Path) -> Tensor:
    """Read an image as a tensor, with EXIF rotation applied and without resizing.

    Args:
        path: A file or URL that `read_picture` accepts.

    Returns:
        (3, height, width), float32, range [0, 1].

    Raises:
        InputError: As in `read_picture`.
    """
    array = np.asarray(read_picture(path), dtype=np.float32) / 255
    return torch.from_numpy(array).permute(2, 0, 1).contiguous()


def read_picture(path: str | Path) -> Image.Image:
    """Read a picture as 8-bit RGB, with EXIF rotation applied and without resizing.

    Args:
        path: A file or URL that Pillow reads, in 8-bit grey, palette, RGB or opaque RGBA.

    Raises:
        InputError: If it can't be read, is truncated, has more pixels than Pillow considers safe
            (179 million), has transparent pixels or several frames, or has a colour mode (CMYK,
            16-bit, ...) whose conversion would be a guess.
    """
    try:
        with open_file(path) as stream:
            data = stream.read()
        with Image.open(io.BytesIO(data), formats=_FORMATS) as file:
            if file.format == "PNG":
                verify_png(data)
            # Pillow would silently reduce these to 8 bits.
            deep = any(mark in str(file.tile) for mark in (";16", ";32"))
            frames = 1 if file.format == "MPO" else getattr(file, "n_frames", 1)
            image: Image.Image = ImageOps.exif_transpose(file)
            image.load()
    except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files
        raise InputError(f"{path} is not a readable image: {_reason(error)}") from error
    if frames > 1:
        raise InputError(f"{path} has {frames} frames; targets of several frames are latents")
    if deep or image.mode in ("CMYK", "YCbCr", "LAB", "HSV", "I", "F", "I;16"):
        mode = f"{image.mode} of more than 8 bits" if deep else image.mode
        raise InputError(f"{path} has colour mode {mode}; save it as 8-bit RGB first")
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        if np.asarray(image.getchannel("A")).min() < 255:
            raise InputError(f"{path} has transparent pixels; flatten it onto a background first")
    return image.convert("RGB")


def image_size(path: str | Path) -> tuple[int, int]:
    """Return (height, width) from an image's header, EXIF rotation applied.

    Raises:
        InputError: If it is not an image.
    """
    try:
        with open_file(path) as stream, Image.open(stream, formats=_FORMATS) as file:
            width, height = file.size
            # Not file.getexif(), which decodes a whole PNG to find EXIF data after its pixels.
            orientation = Image.Image.getexif(file).get(0x0112, 1)
            # The size of a TIFF file is transposed already.
            transposed = orientation in (5, 6, 7, 8) and file.format != "TIFF"
    except Exception as error:  # Pillow's decoders raise errors of many kinds for damaged files
        raise InputError(f"{path} is not a readable image: {_reason(error)}") from error
    return (width, height) if transposed else (height, width)


def verify_png(data: bytes) -> None:
    """Compare the checksums of all parts of a PNG file; Pillow skips those of the pixels.

    Raises:
        ValueError: If a part is damaged, or the end is missing.
    """
    start, kind = 8, b""
    while kind != b"IEND":
        length = int.from_bytes(data[start : start + 4], "big")
        end = start + 8 + length
        part, checksum = data[start + 4 : end], data[end : end + 4]
        if len(checksum) < 4 or zlib.crc32(part) != int.from_bytes(checksum, "big"):
            raise InputError(f"its part at byte {start} is damaged or cut off")
        start, kind = end + 4, part[:4]


def _reason(error: BaseException) -> str:
    # Pillow's message names only the stream object.
    return "of no known format" if isinstance(error, UnidentifiedImageError) else str(error)
