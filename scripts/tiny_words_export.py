"""Measures the "tiny-words" pipeline and exports it."""

import copy
import json
import random
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, QwenImagePipeline
from PIL import Image
from safetensors.torch import save_file
from tiny_words import (
    HEIGHT,
    NAMES,
    STYLES,
    WIDTH,
    WordPictures,
    is_held_out,
    prompt_of,
)
from tiny_words_parts import NEGATIVE_PROMPT
from torch import Tensor
from train_tiny_digits import rename_for_older_readers

from lit_distill.evaluation.feature_extractors import LETTERS, WordReader

TEACHER_CFG = 3.0


def sharpness(pictures: Tensor) -> float:
    """Returns the gradient energy of pictures (..., height, width)."""
    energy = pictures.diff(dim=-1).square().mean() + pictures.diff(dim=-2).square().mean()
    return energy.item()


def autoencoder_report(vae: AutoencoderKLQwenImage, pictures: Tensor) -> str:
    """Describes an autoencoder by what it makes of pictures that are new to it."""
    with torch.no_grad():
        latents = vae.encode(pictures).latent_dist.mode()
        decoded = vae.decode(latents).sample
        again = vae.encode(decoded).latent_dist.mode()
    spread = latents.std(dim=(0, 2, 3, 4), keepdim=True)
    return (
        f"PSNR {10 * torch.log10(4 / (decoded - pictures).square().mean()):.1f} dB, "
        f"round trip {((again - latents) / spread).square().mean():.5f}, "
        f"sharpness {sharpness(decoded) / sharpness(pictures):.3f}"
    )


class Trial:
    """Draws held-out words and tells how legible they are."""

    def __init__(
        self, pipe: QwenImagePipeline, reader: WordReader, pictures: WordPictures, count: int
    ) -> None:
        """Draws the words, and renders them for comparison."""
        generator = torch.Generator().manual_seed(6)
        self.rendered, self.labels = pictures.sample(count, generator, held_out=True)
        self.prompts = [prompt_of(label) for label in self.labels.tolist()]
        self.pipe, self.reader = pipe, reader

    def draw(self, steps: int, cfg: float) -> tuple[Tensor, Tensor]:
        """Draws one picture per word, the i-th from seed i.

        Returns:
            The final packed latents, and the pictures in [-1, 1].
        """
        latents = draw(self.pipe, self.prompts, steps, cfg)
        return latents, decode(self.pipe, latents)

    def read(self, pictures: Tensor) -> str:
        """Returns the shares of letters and words read right, and the sharpness."""
        with torch.no_grad():
            right = (
                self.reader.read(pictures.clamp(-1, 1) / 2 + 0.5).argmax(-1) == self.labels[:, 3:]
            )
        return (
            f"letters {right.float().mean():.3f} words {right.all(1).float().mean():.3f} "
            f"sharpness {sharpness(pictures) / sharpness(self.rendered):.3f}"
        )


def draw(
    pipe: QwenImagePipeline, prompts: list[str], steps: int, cfg: float, first_seed: int = 0
) -> Tensor:
    """Returns the final packed latents of one picture per prompt, each with a seed of its own."""
    latents: Tensor = pipe(
        prompts,
        negative_prompt=[NEGATIVE_PROMPT] * len(prompts) if cfg > 1 else None,
        true_cfg_scale=cfg,
        height=HEIGHT,
        width=WIDTH,
        num_inference_steps=steps,
        generator=[torch.Generator().manual_seed(first_seed + i) for i in range(len(prompts))],
        output_type="latent",
    ).images
    return latents


def unpack(pipe: QwenImagePipeline, latents: Tensor) -> Tensor:
    """Returns packed latents as the VAE decodes them, (B, C, 1, height, width)."""
    config, shape = pipe.vae.config, (1, -1, 1, 1, 1)
    z = pipe._unpack_latents(latents, HEIGHT, WIDTH, pipe.vae_scale_factor)
    z = z * torch.tensor(config.latents_std).view(shape)
    unpacked: Tensor = z + torch.tensor(config.latents_mean).view(shape)
    return unpacked


def decode(pipe: QwenImagePipeline, latents: Tensor) -> Tensor:
    """Returns the pictures in [-1, 1] of final packed latents."""
    with torch.no_grad():
        decoded: Tensor = pipe.vae.decode(unpack(pipe, latents)).sample
    return decoded[:, :, 0]


WORDS = """
    ABLE ACHE ACID ALSO AREA ARMY ATOM AUNT BABY BACK BAKE BALL BAND BANK BARK BARN BASE BATH BEAD
    BEAK BEAM BEAN BEAR BEAT BEEF BEER BELL BELT BEND BEST BIKE BILL BIRD BITE BLUE BOAT BODY BOIL
    BOLD BOLT BOMB BOND BONE BOOK BOOM BOOT BORN BOWL BULB BULK BURN BUSH BUSY CAFE CAKE CALF CALL
    CALM CAMP CARD CARE CART CASE CASH CELL CENT CHAT CHEF CHIN CITY CLAY CLUB COAL COAT CODE COIN
    COLD COME COOK COOL COPY CORD CORE CORN COST CREW CROP CROW CUBE CURE DARK DATA DATE DAWN DEAR
    DEEP DEER DESK DIAL DIET DIME DISH DOCK DOLL DOOR DOWN DRUM DUCK DUNE DUST DUTY EACH EARN EAST
    EASY ECHO EDIT ELSE EURO FACE FACT FAIR FALL FAME FARM FAST FEED FEET FERN FILE FILM FIND FINE
    FIRE FIRM FISH FIST FLAT FOAM FOLK FOOD FOOT FORK FORM FORT FOUR FROM FUEL FULL FUND HAIR HALF
    HALL HAND HARD HARP HAWK HEAD HEAL HEAR HEAT HERB HERO HILL HINT HOLD HOLE HOME HOOD HOOK HOPE
    HORN HOST HOUR IDEA INCH IRON ITEM KEEN KEEP KICK KIND KITE KNOB KNOT LACE LADY LAKE LAMB LAMP
    LAND LANE LAST LATE LAWN LEAD LEAF LEAN LEFT LENS LIFE LIFT LIKE LIME LINE LION LIST LOAD LOAF
    LOAN LOCK LOOP LORD LOUD LUCK MAIL MAIN MAKE MALL MANY MAPS MARK MASK MATH MEAL MEAT MELT MENU
    MICE MILE MILK MIND MINE MINT MIST MOON MORE MOST MOTH NAIL NAME NEAR NECK NEED NEST NEWS NICE
    NINE NOON NOSE NOTE OATH ONCE ONLY OPEN OURS PACK PAIN PAIR PALM PARK PART PATH PEAR PEAS PEEL
    PIER PINE PINK PIPE PLAN PLAY PLUM POEM POET POLE POND POOL PORT POST RACE RAIL RAIN RARE READ
    REAL RENT REST RICE RICH RIDE RISE ROAD ROCK ROOF ROOM ROOT ROPE ROSE RULE SAFE SAIL SALT SAME
    SAND SEAL SEAT SEED SHIP SHOE SHOP SILK SINK SKIN SLOW SNOW SOAP SOCK SOFT SOIL SONS SOUP STAR
    STEM STEP SUIT SURE SWAN TAIL TALK TALL TANK TASK TEAM TENT TERM TEST TEXT TIDE TILE TIME TINY
    TOWN TREE TRIP TRUE TUBE TUNA TUNE TURN TWIN UNIT UPON USER WAIT WALK WALL WARM WASH WEEK WEST
    WIFE WILD WIND WINE WIRE WISE WOLF WOOD WOOL WORD WORK YARD YARN YEAR
"""


def prompts_of(pictures: WordPictures, count: int, held_out: bool) -> list[str]:
    """Returns so many prompts of words that are, or are not, held out, English ones first."""
    known = [word for word in WORDS.split() if all(letter in LETTERS for letter in word)]
    letters = torch.tensor([[LETTERS.index(letter) for letter in word] for word in known])
    english = letters[is_held_out(letters) == held_out]
    labels = pictures.labels(count, held_out, torch.Generator().manual_seed(8))
    labels[: len(english), 3:] = english[:count]
    return list(dict.fromkeys(prompt_of(label) for label in labels.tolist()))


def save(pipe: QwenImagePipeline, pictures: WordPictures, folder: Path) -> QwenImagePipeline:
    """Saves the pipeline in fp16 with its prompt lists, and reads it back in fp32."""
    copy.deepcopy(pipe).to(torch.float16).save_pretrained(folder)
    for held_out, count, name in ((False, 2_048, "train"), (True, 512, "heldout")):
        prompts = prompts_of(pictures, count, held_out)
        # Shuffled, so that any first few lines show a bit of everything.
        random.Random(0).shuffle(prompts)
        text = "\n".join(prompts) + "\n"
        (folder / f"prompts_{name}.txt").write_text(text, encoding="utf-8")
    # The vocabulary once more, in the two files that transformers 4 reads it from.
    pipe.tokenizer.backend_tokenizer.model.save(str(folder / "tokenizer"))
    rename_for_older_readers(folder)
    # Or the encoder alone would be loaded in fp16, and a plain call would fail.
    path = folder / "text_encoder" / "config.json"
    settings = json.loads(path.read_text(encoding="utf-8")) | {"dtype": "float32"}
    path.write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    for file in folder.rglob("*.safetensors"):
        file.chmod(0o644)
    stored = QwenImagePipeline.from_pretrained(folder, torch_dtype=torch.float32)
    stored.set_progress_bar_config(disable=True)
    return stored


def save_preview(path: Path, *rows: Tensor) -> None:
    """Saves a contact sheet: the first eight pictures of every batch, one batch in a row."""
    sheet = torch.cat([torch.cat(list(row[:8]), dim=2) for row in rows], dim=1)
    levels = ((sheet.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0)
    image = Image.fromarray(levels.numpy())
    image.resize((image.width * 3, image.height * 3), Image.Resampling.NEAREST).save(path)


def measure(
    pipe: QwenImagePipeline, stored: QwenImagePipeline, trial: Trial, preview: Path
) -> dict[str, str]:
    """Measures what the pipeline draws from held-out prompts.

    Args:
        pipe: The pipeline in fp32.
        stored: The pipeline after its storage in fp16.
        trial: The words and their reader.
        preview: Where to save a contact sheet: rendered, teacher, undistilled.

    Returns:
        Figures by description.
    """
    trial.pipe, begun = stored, time.process_time()
    teacher, many = trial.draw(50, TEACHER_CFG)
    cost = (time.process_time() - begun) / len(many)
    few, short = trial.draw(4, 1.0)
    error = F.mse_loss(few, teacher).item()
    with torch.no_grad():
        again = stored.vae.encode(many.unsqueeze(2)).latent_dist.mode()
    mean, std = (
        torch.tensor(values).view(1, -1, 1, 1, 1)
        for values in (stored.vae.config.latents_mean, stored.vae.config.latents_std)
    )
    again = (again - mean) / std
    packed = stored._pack_latents(again.squeeze(2), *again.squeeze(2).shape)
    moved = F.mse_loss(packed, teacher).item()
    trial.pipe = pipe
    rounding = F.mse_loss(trial.draw(50, TEACHER_CFG)[0], teacher).item()
    save_preview(preview, trial.rendered, many, short)
    full = f"50 steps at cfg {TEACHER_CFG:g}"
    rendered = trial.rendered.unsqueeze(2)
    figures = {
        "words drawn, all of them held out": str(len(many)),
        "rendered": trial.read(trial.rendered),
        "autoencoder on rendered pictures": autoencoder_report(stored.vae, rendered),
        full: trial.read(many),
        "4 steps at cfg 1": trial.read(short),
    }
    trial.pipe = stored
    for steps, cfg in ((50, 1.0), (16, TEACHER_CFG), (8, TEACHER_CFG), (4, TEACHER_CFG)):
        figures[f"{steps} steps at cfg {cfg:g}"] = trial.read(trial.draw(steps, cfg)[1])
    return figures | {
        f"latent MSE of 4 steps at cfg 1 to {full}": f"{error:.4f}",
        f"latent MSE of decoding and encoding {full}": f"{moved:.5f} ({moved / error:.2%} of that)",
        f"latent MSE of fp16 storage to {full}": f"{rounding:.1e}",
        f"CPU time of a picture at {full}": f"{cost * 1e3:.0f} ms",
    }


README = """\
---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---
# tiny-words

A real `diffusers.QwenImagePipeline` (in fp16) that draws 32x64 pictures of four-letter words from
prompts such as "T-R-E-E in red serif on white". Pass `height=32, width=64`: the class has one
default size for all checkpoints, a square.

* letters: {letters}
* styles: {styles}
* colours: {colours}; dark ones on light ones, or light ones on dark ones

Made by `scripts/train_tiny_words.py` from random strings of letters in fonts of Debian packages,
which `scripts/tiny_words.py` names. A tenth of all strings was never trained on;
`prompts_heldout.txt` has only such words. Letters, words: the share that the shipped reader reads
as prompted. Sharpness: gradient energy, relative to that of the rendered pictures.

| measured | |
|---|---|
{rows}
"""


def export(
    pipe: QwenImagePipeline,
    reader: WordReader,
    pictures: WordPictures,
    folder: Path,
    preview: Path,
) -> None:
    """Saves the pipeline and the reader, measures them as stored, and writes the figures down."""
    stored = save(pipe, pictures, folder)
    # Beside the folder of the pipeline, which holds what diffusers expects and nothing else.
    weights = reader.state_dict().items()
    half = {name: value.half() if value.is_floating_point() else value for name, value in weights}
    reader_file = folder.parent / "word_reader.safetensors"
    save_file(half, reader_file)
    reader_file.chmod(0o644)
    trial = Trial(stored, reader, pictures, 256)
    figures = measure(pipe, stored, trial, preview)
    size = sum(file.stat().st_size for file in folder.rglob("*.safetensors"))
    figures["weights"] = f"{size / 1e6:.2f} MB"
    rows = "\n".join(f"| {name} | {value} |" for name, value in figures.items())
    names = {"letters": " ".join(LETTERS), "styles": ", ".join(STYLES), "colours": ", ".join(NAMES)}
    (folder / "README.md").write_text(README.format(rows=rows, **names), encoding="utf-8")
    print(rows)
