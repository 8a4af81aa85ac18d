"""Pictures of words for the embedded "tiny-words" pipeline and their prompts."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageFont
from torch import Tensor

from lit_distill.evaluation.feature_extractors import LETTERS, WORD_LENGTH

HEIGHT, WIDTH = 32, 64
CELL = WIDTH // WORD_LENGTH
# Debian packages and licences: fonts-dejavu-core (Bitstream Vera), fonts-liberation (GPL 2, with
# an exception for what is written with it), fonts-lato (OFL 1.1), fonts-open-sans (Apache 2.0),
# fonts-roboto-slab (Apache 2.0), fonts-courier-prime (OFL 1.1), fonts-comic-neue (OFL 1.1),
# fonts-quicksand (OFL 1.1).
FONT_FOLDER = Path("/usr/share/fonts")
FONTS = {
    "sans": (
        "truetype/dejavu/DejaVuSans-Bold.ttf",
        "truetype/liberation/LiberationSans-Bold.ttf",
        "truetype/lato/Lato-Black.ttf",
        "truetype/open-sans/OpenSans-ExtraBold.ttf",
    ),
    "serif": (
        "truetype/dejavu/DejaVuSerif-Bold.ttf",
        "truetype/liberation/LiberationSerif-Bold.ttf",
        "opentype/roboto/slab/RobotoSlab-Bold.otf",
    ),
    "mono": (
        "truetype/dejavu/DejaVuSansMono-Bold.ttf",
        "truetype/liberation/LiberationMono-Bold.ttf",
        "opentype/courier-prime/Courier Prime Bold.otf",
    ),
    "round": (
        "opentype/comic-neue/ComicNeue-Bold.otf",
        "truetype/quicksand/Quicksand-Bold.ttf",
    ),
}
STYLES = tuple(FONTS)
# Dark letters on a light background, or the other way round.
COLOURS = {
    "black": (15, 15, 15),
    "red": (190, 30, 35),
    "blue": (35, 60, 200),
    "green": (20, 110, 60),
    "white": (245, 245, 245),
    "yellow": (250, 225, 60),
    "pink": (255, 160, 200),
    "cyan": (110, 215, 235),
}
NAMES = tuple(COLOURS)


def prompt_of(label: list[int]) -> str:
    """Returns the prompt of a label: style, foreground, background and four letters.

    The word is spelled. Its tokens are then two apart, like the columns of tokens in the picture
    that one letter fills, and one relative position of rotary embeddings leads to each letter.
    """
    style, fore, back, *letters = label
    word = "-".join(LETTERS[letter] for letter in letters)
    return f"{word} in {NAMES[fore]} {STYLES[style]} on {NAMES[back]}"


def is_held_out(letters: Tensor) -> Tensor:
    """Tells which words (..., 4) belong to the tenth that is never trained on."""
    return (letters * torch.tensor([7, 11, 13, 17])).sum(-1) % 10 == 3


class WordPictures:
    """An endless supply of pictures of words.

    Every letter stands in its own cell, 16 pixels wide. Font and colours are a word's. Each letter
    has its own height and place, which no prompt mentions: a sampler decides them on its way, and
    one of few steps draws ghosts of a letter in several places.

    Args:
        jump: How far a letter may be off the middle of its cell, in pixels: down, right.
        heights: The range of heights that letters have, in pixels. They are condensed where they
            would reach beyond their cell.
    """

    border = 8  # around a glyph on its canvas, so that it can be shifted

    def __init__(self, jump: tuple[int, int] = (7, 2), heights: tuple[int, int] = (12, 15)) -> None:
        """Renders every letter of every font at every height."""
        self.jump, self.heights = jump, range(heights[0], heights[1] + 1)
        files = [FONT_FOLDER / name for names in FONTS.values() for name in names]
        self.fonts_of_style = torch.tensor([len(names) for names in FONTS.values()])
        self.first_font = self.fonts_of_style.cumsum(0) - self.fonts_of_style
        fonts = [ImageFont.truetype(str(file), 96) for file in files]
        glyphs = [[[self._glyph(f, h, c) for c in LETTERS] for h in self.heights] for f in fonts]
        self.glyphs = torch.from_numpy(np.array(glyphs))
        self.palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1

    def _glyph(self, font: ImageFont.FreeTypeFont, height: int, letter: str) -> np.ndarray:
        mask = font.getmask(letter)
        left, top, right, bottom = mask.getbbox()
        ink = Image.fromarray(np.array(mask, dtype=np.uint8).reshape(mask.size[::-1]))
        ink = ink.crop((left, top, right, bottom))
        width = min(CELL - 2 * self.jump[1], max(3, round(ink.width * height / ink.height)))
        canvas = Image.new("L", (CELL + 2 * self.border, HEIGHT + 2 * self.border))
        place = ((canvas.width - width) // 2, (canvas.height - height) // 2)
        canvas.paste(ink.resize((width, height), Image.Resampling.LANCZOS), place)
        return np.asarray(canvas)

    def labels(self, count: int, held_out: bool, generator: torch.Generator) -> Tensor:
        """Draws random labels (count, 7) of words that are, or are not, held out."""
        letters = torch.randint(len(LETTERS), (20 * count + 200, WORD_LENGTH), generator=generator)
        letters = letters[is_held_out(letters) == held_out][:count]
        style = torch.randint(len(STYLES), (count,), generator=generator)
        fore = torch.randint(8, (count,), generator=generator)
        back = torch.randint(4, (count,), generator=generator) + 4 * (fore < 4)
        return torch.cat([style[:, None], fore[:, None], back[:, None], letters], dim=1)

    def masks(self, labels: Tensor, generator: torch.Generator) -> Tensor:
        """Draws one ink mask (B, 32, 64) in [0, 1] for each label."""

        def draw(low: int, high: int) -> Tensor:
            return torch.randint(low, high + 1, (len(labels), WORD_LENGTH), generator=generator)

        style, letters = labels[:, 0], labels[:, 3:]
        chosen = torch.rand(len(labels), generator=generator) * self.fonts_of_style[style]
        font = (self.first_font[style] + chosen.long())[:, None].expand_as(letters)
        canvases = self.glyphs[font, draw(0, len(self.heights) - 1), letters]
        down, right = (self.border + draw(-jump, jump) for jump in self.jump)
        rows = (down[..., None] + torch.arange(HEIGHT))[..., None].expand(-1, -1, -1, CELL)
        columns = (right[..., None] + torch.arange(CELL))[:, :, None].expand_as(rows)
        word, cell = torch.arange(len(labels))[:, None, None, None], torch.arange(WORD_LENGTH)
        ink = canvases[word, cell[None, :, None, None], rows, columns].float() / 255
        return ink.transpose(1, 2).flatten(2)

    def paint(self, masks: Tensor, labels: Tensor) -> Tensor:
        """Returns pictures (B, 3, 32, 64) in [-1, 1] of masks in their labels' colours."""
        front, ground = (self.palette[labels[:, i]][:, :, None, None] for i in (1, 2))
        return ground + masks[:, None] * (front - ground)

    def sample(
        self, count: int, generator: torch.Generator, held_out: bool = False
    ) -> tuple[Tensor, Tensor]:
        """Draws random pictures (count, 3, 32, 64) in [-1, 1] and their labels (count, 7)."""
        labels = self.labels(count, held_out, generator)
        return self.paint(self.masks(labels, generator), labels), labels
