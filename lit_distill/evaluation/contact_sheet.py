"""Contact sheets: images side by side in one labelled picture."""

from __future__ import annotations

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def to_pil(images: Tensor) -> list[Image.Image]:
    """Return images (B, 3, H, W), range [0, 1], as Pillow images, rounded as diffusers does."""
    arrays = (images * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(array) for array in arrays]


def contact_sheet(columns: list[str], rows: list[tuple[str, list[Image.Image]]]) -> Image.Image:
    """Return a picture with one labelled column per contender and one row per prompt.

    Small images are enlarged by an integer factor and large ones reduced, to about 256 pixels.

    Args:
        columns: Labels of the columns.
        rows: Prompt and images, one for each column, of every row.
    """
    edge = 256
    example = rows[0][1][0]
    factor = edge / max(example.size)
    factor = max(1, round(factor)) if factor >= 1 else factor
    width, height = (max(1, round(side * factor)) for side in example.size)
    gap, caption, head = 12, 22, 34
    font = ImageFont.load_default(15)
    sheet = Image.new(
        "RGB",
        (gap + len(columns) * (width + gap), head + len(rows) * (height + caption + gap)),
        "white",
    )
    pen = ImageDraw.Draw(sheet)
    method = Image.Resampling.NEAREST if factor >= 1 else Image.Resampling.LANCZOS
    for column, label in enumerate(columns):
        pen.text((gap + column * (width + gap), 8), label, "black", font)
    for index, (prompt, images) in enumerate(rows):
        top = head + index * (height + caption + gap)
        pen.text((gap, top), prompt, "dimgray", font)
        for column, image in enumerate(images):
            cell = image.resize((width, height), method)
            sheet.paste(cell, (gap + column * (width + gap), top + caption))
    return sheet
