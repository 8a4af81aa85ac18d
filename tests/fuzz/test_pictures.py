"""Images and files of latents: mutated ones give the same pixels and tensors, or are refused."""

import io

import numpy as np
import torch
from fuzzing import REFUSED, attempt, files, fuzz
from PIL import Image
from safetensors.torch import load, save

from lit_distill.data.images import image_size, read_picture
from lit_distill.data.latents_file import read_latents

PIXELS = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)


def encoded(format, image=None, **options):
    data = io.BytesIO()
    (image or Image.fromarray(PIXELS)).save(data, format=format, **options)
    return data.getvalue()


def test_png(tmp_path):
    """A PNG has a checksum for each part: what is accepted is the intact image."""
    path = tmp_path / "a.png"
    samples = [encoded("PNG"), encoded("PNG", compress_level=0)]

    def check(data):
        path.write_bytes(data)
        size, picture = attempt(image_size, path), attempt(read_picture, path)
        if picture is not REFUSED and data not in samples:
            assert size == (picture.height, picture.width)
            assert np.array_equal(np.asarray(picture), PIXELS)

    fuzz("png", check, data=files(*samples))


def test_other_formats(tmp_path):
    """JPEG, WebP, BMP and TIFF have no checksums: what is accepted is a picture of its size."""
    path = tmp_path / "a.jpg"
    grey = Image.fromarray(PIXELS[..., 0])
    samples = [encoded("JPEG"), encoded("WEBP", lossless=True), encoded("BMP"), encoded("TIFF")]
    samples += [encoded("TIFF", compression="tiff_lzw"), encoded("GIF", grey), encoded("BMP", grey)]
    samples += [encoded("JPEG", exif=_turned())]

    def check(data):
        path.write_bytes(data)
        size, picture = attempt(image_size, path), attempt(read_picture, path)
        if picture is not REFUSED:
            assert picture.mode == "RGB" and size == (picture.height, picture.width)

    fuzz("pictures", check, data=files(*samples))


def same_bits(one, two):
    parts = [each.contiguous().flatten().view(torch.uint8) for each in (one, two)]
    return one.shape == two.shape and one.dtype == two.dtype and torch.equal(*parts)


def test_latents(tmp_path):
    """Latents that are accepted are those that safetensors reads."""
    path = tmp_path / "a.safetensors"
    tensors = {"latents": torch.randn(4, 3), "sigmas": torch.randn(3)}
    samples = [save(tensors), save({"latents": torch.randn(2, 2, dtype=torch.float16)})]

    def check(data):
        path.write_bytes(data)
        found = attempt(read_latents, str(path))
        if found is not REFUSED:
            expected = load(data)
            assert found.keys() == expected.keys()
            assert all(same_bits(found[key], expected[key]) for key in expected)

    fuzz("latents", check, data=files(*samples))


def _turned():
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif
