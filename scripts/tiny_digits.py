"""The parts of the embedded "tiny-digits" pipeline: its pictures, and every part untrained."""

import itertools
import json
import re
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from sklearn.datasets import load_digits
from tokenizers import pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer

SIZE = 32
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
COLOURS = {
    "red": (214, 39, 40),
    "pink": (250, 130, 180),
    "yellow": (250, 225, 60),
    "green": (40, 160, 70),
    "blue": (35, 80, 210),
    "purple": (145, 60, 180),
    "white": (245, 245, 245),
    "black": (15, 15, 15),
}
NAMES = tuple(COLOURS)
# One (digit, foreground, background) triple per prompt. Its index is 56 d + 7 f + (b - f - 1) % 8,
# which DigitPictures.sample uses to go from a random picture to its prompt.
TRIPLES = [(d, f, (f + 1 + k) % 8) for d, f, k in itertools.product(range(10), range(8), range(7))]
# Qwen's own special tokens; the pipeline's prompt template contains the second and the third.
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
SPECIAL_TOKENS += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
NEGATIVE_PROMPT = " "


def prompt_of(digit: int, fore: int, back: int) -> str:
    """Returns the prompt that describes a digit and its two colours."""
    return f"a {NAMES[fore]} handwritten {DIGITS[digit]} on a {NAMES[back]} background"


def is_held_out(digit: int, fore: int, back: int) -> bool:
    """Tells whether a prompt belongs to the eighth that no distillation set may contain."""
    return (3 * digit + 5 * fore + 7 * back + fore * back) % 8 == 0


class DigitPictures:
    """An endless supply of coloured digit pictures made from scikit-learn's scans."""

    def __init__(self) -> None:
        """Loads the 1,797 scans and enlarges them once."""
        data = load_digits()
        scans = torch.tensor(data.images, dtype=torch.float32).unsqueeze(1) / 16
        # The scans touch their frame; a blank border keeps jittered strokes inside the picture.
        scans = F.pad(scans, (1, 1, 1, 1))
        self.scans = F.interpolate(scans, (SIZE, SIZE), mode="bicubic", align_corners=False)
        self.digits = torch.tensor(data.target, dtype=torch.long)
        self.palette = torch.tensor(list(COLOURS.values()), dtype=torch.float32) / 127.5 - 1

    def sample(self, count: int, scans: slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Draw random pictures.

        Args:
            count: How many pictures.
            scans: The part of the scans to draw from.

        Returns:
            Pictures in [-1, 1], shape (count, 3, 32, 32), and indexes into TRIPLES.
        """
        allowed = torch.arange(len(self.digits))[scans]
        chosen = allowed[torch.randint(len(allowed), (count,))]
        fore, offset = torch.randint(8, (count,)), torch.randint(7, (count,))
        ink = self._jitter(self.scans[chosen])
        # A steep sigmoid gives the blurry enlargement the edge of a pen stroke.
        ink = torch.sigmoid(12 * (ink - 0.45))
        front = self.palette[fore][:, :, None, None]
        ground = self.palette[(fore + 1 + offset) % 8][:, :, None, None]
        return ground + ink * (front - ground), self.digits[chosen] * 56 + fore * 7 + offset

    @staticmethod
    def _jitter(ink: Tensor) -> Tensor:
        """Rotates by up to 8 degrees, and scales and shifts by up to 8 percent."""
        angle, zoom, right, down = (torch.rand(4, len(ink)) * 2 - 1) * 0.08
        angle = angle * (torch.pi * 8 / 180 / 0.08)
        cos, sin = torch.cos(angle) * (1 + zoom), torch.sin(angle) * (1 + zoom)
        theta = torch.stack([cos, -sin, right, sin, cos, down], dim=1).view(-1, 2, 3)
        grid = F.affine_grid(theta, list(ink.shape), align_corners=False)
        return F.grid_sample(ink, grid, align_corners=False)


def build_tokenizer() -> Qwen2Tokenizer:
    """Trains a byte-level BPE in which every known word is a single token.

    The pipeline drops a fixed number of tokens, its prompt template's beginning, so the template
    must split here into exactly as many tokens as it does under the real tokenizer. Merging until
    nothing is left to merge achieves that; any other text still falls back to bytes.
    """
    return train_tokenizer(f" {word}" for triple in TRIPLES for word in prompt_of(*triple).split())


def train_tokenizer(words: Iterable[str]) -> Qwen2Tokenizer:
    """Trains a byte-level BPE in which these words and the pipeline's template are merged whole."""
    template = QwenImagePipeline(None, None, None, None, None).prompt_template_encode
    pieces = re.split("|".join(map(re.escape, SPECIAL_TOKENS)), template.format(""))
    backend = Qwen2Tokenizer().backend_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=10_000,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    backend.train_from_iterator([*pieces, *words], trainer)
    model = json.loads(backend.to_str())["model"]
    return Qwen2Tokenizer(
        vocab=model["vocab"],
        merges=[tuple(merge) for merge in model["merges"]],
        extra_special_tokens=SPECIAL_TOKENS[1:],
    )


def build_text_encoder(tokenizer: Qwen2Tokenizer) -> Qwen2_5_VLForConditionalGeneration:
    """Builds the smallest Qwen2.5-VL; its random features tell the prompts apart untrained."""
    token = tokenizer.convert_tokens_to_ids
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "max_position_embeddings": 2048,
            "rope_parameters": {"rope_type": "default", "mrope_section": [4, 6, 6]},
            "bos_token_id": token("<|endoftext|>"),
            "eos_token_id": token("<|im_end|>"),
        },
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_heads": 1,
            "out_hidden_size": 64,
            "fullatt_block_indexes": [0],
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    encoder = Qwen2_5_VLForConditionalGeneration(config).eval().requires_grad_(False)
    # The folder stores fp16: round now, so that training sees the very features it will serve.
    return encoder.half().float()


def build_transformer() -> QwenImageTransformer2DModel:
    """Builds the denoiser, with zeros in its modulation and output layers for a calm start."""
    model = QwenImageTransformer2DModel(
        in_channels=16,
        out_channels=4,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=16,  # the sum of axes_dims_rope
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=64,
    )
    outputs = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        outputs += [block.img_mod[1], block.txt_mod[1]]
    for layer in outputs:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    return model


def build_pipeline() -> QwenImagePipeline:
    """Assembles the untrained pipeline."""
    tokenizer = build_tokenizer()
    # Two levels of spatial halving: the pipeline takes its scale from this list's length.
    vae = AutoencoderKLQwenImage(
        base_dim=8, z_dim=4, dim_mult=[1, 2, 2], num_res_blocks=1, temperal_downsample=[False] * 2
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=0.9,
        base_image_seq_len=256,
        max_image_seq_len=8192,
        shift_terminal=0.02,
        time_shift_type="exponential",
    )
    encoder, transformer = build_text_encoder(tokenizer), build_transformer()
    pipe = QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe
