"""The parts of the embedded "tiny-words" pipeline, untrained."""

import math

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    QwenImagePipeline,
    QwenImageTransformer2DModel,
)
from diffusers.models.attention_processor import Attention
from tiny_digits import build_text_encoder, train_tokenizer
from tiny_words import HEIGHT, NAMES, STYLES, WIDTH
from torch import Tensor, nn
from transformers import Qwen2Tokenizer

TOKEN_ROWS, TOKEN_COLUMNS = HEIGHT // 8, WIDTH // 8
NEGATIVE_PROMPT = " "
# Of the noise schedule. Few steps are then spent where noise is low, and letters come out late:
# four steps begin at 1, 0.97, 0.91 and 0.77.
SHIFT = 10.0


def build_tokenizer() -> Qwen2Tokenizer:
    """Trains a byte-level BPE in which capitals and the words of prompts are single tokens."""
    return train_tokenizer(f" {word}" for word in ("in", "on", *STYLES, *NAMES))


def build_vae(channels: int = 8) -> AutoencoderKLQwenImage:
    """Builds the autoencoder: 4x4 pixels become one position of its latents."""
    return AutoencoderKLQwenImage(
        base_dim=12,
        z_dim=channels,
        dim_mult=[1, 2, 2],
        num_res_blocks=1,
        temperal_downsample=[False] * 2,
    )


def drop_dead_channels(vae: AutoencoderKLQwenImage, latents: Tensor) -> AutoencoderKLQwenImage:
    """Returns the autoencoder without channels that hardly vary, at the same pictures.

    Args:
        vae: The autoencoder.
        latents: Latents (N, C, height, width) of pictures.
    """
    spread, constant = latents.std(dim=(0, 2, 3)), latents.mean(dim=(0, 2, 3))
    alive = spread > 0.01 * spread.max()
    state, slim = vae.state_dict(), build_vae(int(alive.sum()))
    kept = alive.repeat(2)  # means and logarithms of variances
    before, mix = state["encoder.conv_out.weight"], state["quant_conv.weight"][kept, :, -1, 0, 0]
    state["encoder.conv_out.weight"] = torch.einsum("oc,cikhw->oikhw", mix, before)
    state["encoder.conv_out.bias"] = (
        mix @ state["encoder.conv_out.bias"] + state["quant_conv.bias"][kept]
    )
    before, mix = state["decoder.conv_in.weight"], state["post_quant_conv.weight"][:, :, -1, 0, 0]
    still = state["post_quant_conv.bias"] + mix[:, ~alive] @ constant[~alive]
    state["decoder.conv_in.weight"] = torch.einsum("ockhw,ci->oikhw", before, mix[:, alive])
    # Exact but at the margin, where zeros are padded.
    state["decoder.conv_in.bias"] = (
        state["decoder.conv_in.bias"] + before[:, :, -1].sum((2, 3)) @ still
    )
    for name, count in (("quant_conv", len(kept[kept])), ("post_quant_conv", len(alive[alive]))):
        state[f"{name}.weight"] = torch.eye(count).view(count, count, 1, 1, 1)
        state[f"{name}.bias"] = torch.zeros(count)
    slim.load_state_dict(state)
    return slim


def look_up_letters(attention: Attention, head: int, offset: int) -> None:
    """Makes a head of attention look, at first, at the text token `offset` columns from its own.

    Queries of the picture and keys of the text become constants. Rotary embeddings then make their
    product a function of the distance between column and token alone, here with its peak at the
    offset. Keys of the picture oppose the queries in a part that hardly rotates.

    Args:
        attention: A block's attention.
        head: Which head.
        offset: A token's column minus the text token's position.
    """
    width = attention.norm_q.weight.shape[0]
    rows = slice(head * width, (head + 1) * width)
    for layer in (attention.to_q, attention.to_k, attention.add_k_proj):
        layer.weight[rows] *= 0.2
        layer.bias[rows] = 0
    # Where a frequency's pair of channels begins, the frequency, and its part of the energy.
    for place, frequency, share in ((2, 0.0, 0.3), (16, 1.0, 0.45), (18, 10_000 ** (-1 / 8), 0.25)):
        size, angle = math.sqrt(share * width), frequency * offset
        first = rows.start + place
        attention.to_q.bias[first] = size
        attention.add_k_proj.bias[first] = size * math.cos(angle)
        attention.add_k_proj.bias[first + 1] = size * math.sin(angle)
        attention.norm_q.weight[place : place + 2] = 1.5
        attention.norm_added_k.weight[place : place + 2] = 1.5
    attention.to_k.bias[rows.start + 2] = -4


@torch.no_grad()
def build_transformer(channels: int) -> QwenImageTransformer2DModel:
    """Builds the denoiser of latents with so many channels.

    Zeros in its modulation and output layers make for a calm start, and two heads find the letters
    from the start: it would take them thousands of steps to learn where to look.
    """
    model = QwenImageTransformer2DModel(
        in_channels=4 * channels,
        out_channels=channels,
        num_layers=4,
        num_attention_heads=4,
        attention_head_dim=32,  # the sum of axes_dims_rope
        axes_dims_rope=(4, 12, 16),
        joint_attention_dim=64,
    )
    outputs = [model.norm_out.linear, model.proj_out]
    for block in model.transformer_blocks:
        outputs += [block.img_mod[1], block.txt_mod[1]]
    for layer in outputs:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    # Columns count from the middle, text tokens from half the picture's width on: a letter's left
    # column is as far from its token as the width of the picture, the right one a column less.
    for head in range(2):
        look_up_letters(model.transformer_blocks[0].attn, head, head - TOKEN_COLUMNS)
    return model


def build_pipeline(vae: AutoencoderKLQwenImage) -> QwenImagePipeline:
    """Assembles the pipeline around its autoencoder, the rest untrained."""
    # The frozen encoder is drawn here; a run that is resumed has to find it as it was.
    torch.manual_seed(0)
    tokenizer = build_tokenizer()
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    encoder, transformer = build_text_encoder(tokenizer), build_transformer(vae.config.z_dim)
    pipe = QwenImagePipeline(scheduler, vae, encoder, tokenizer, transformer)
    pipe.set_progress_bar_config(disable=True)
    return pipe
