"""Tiny pipelines of the families whose students go into other tools, and of edits."""

# ruff: noqa: N802

from __future__ import annotations

from typing import Any

import diffusers as df
import torch
import transformers as tf
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_edit
from PIL import Image
from tiny_pipeline_parts import (
    BLOCKS,
    MISTRAL_CHAT,
    byte_tokenizer,
    clip_encoder,
    clip_tokenizer,
    decoder,
    dynamic_flow,
    family,
    flux_vae,
    kl_vae,
    qwen_processor,
    qwen_tokenizer,
    qwen_vl,
    stats,
    t5_encoder,
    t5_tokenizer,
)
from torch import nn


def _qwen_vae(levels: int = 2) -> Any:
    return df.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * (levels - 1) + [2],
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 2) + [True],
        **stats(4),
    )


def _qwen_parts() -> dict[str, Any]:
    tokenizer = qwen_tokenizer()
    return {
        "transformer": df.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            **BLOCKS,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": _qwen_vae(),
        "text_encoder": qwen_vl(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": dynamic_flow(
            max_shift=0.9, shift=1.0, max_image_seq_len=8192, shift_terminal=0.02
        ),
    }


@family(height=16, width=16)
def QwenImage() -> Any:
    return df.QwenImagePipeline(**_qwen_parts())


def _flux_parts() -> dict[str, Any]:
    clip, t5 = clip_tokenizer(), t5_tokenizer()
    return {
        "transformer": df.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            **BLOCKS,
            num_single_layers=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": flux_vae(),
        "text_encoder": clip_encoder(clip, projection=False),
        "tokenizer": clip,
        "text_encoder_2": t5_encoder(t5),
        "tokenizer_2": t5,
        "scheduler": dynamic_flow(),
    }


@family(height=16, width=16, max_sequence_length=32)
def Flux() -> Any:
    return df.FluxPipeline(**_flux_parts())


@family(height=16, width=16, max_sequence_length=32)
def StableDiffusion3() -> Any:
    clip, clip_2, t5 = clip_tokenizer(), clip_tokenizer("!"), t5_tokenizer()
    return df.StableDiffusion3Pipeline(
        transformer=df.SD3Transformer2DModel(
            sample_size=16,
            patch_size=2,
            in_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            joint_attention_dim=32,
            caption_projection_dim=16,
            pooled_projection_dim=32,
            out_channels=4,
            pos_embed_max_size=16,
            dual_attention_layers=(0,),
            qk_norm="rms_norm",
        ),
        vae=flux_vae(scale=1.5305, shift=0.0609),
        text_encoder=clip_encoder(clip),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip_2, hidden_act="gelu"),
        tokenizer_2=clip_2,
        text_encoder_3=t5_encoder(t5),
        tokenizer_3=t5,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _unet(**config: Any) -> Any:
    return df.UNet2DConditionModel(
        sample_size=16,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        **config,
    )


_SD_NOISE: dict[str, Any] = {
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "steps_offset": 1,
}


@family(height=16, width=16)
def StableDiffusionXL() -> Any:
    clip, clip_2 = clip_tokenizer(), clip_tokenizer("!")
    return df.StableDiffusionXLPipeline(
        unet=_unet(
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=32,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 16,
        ),
        vae=kl_vae(4, scaling_factor=0.13025),
        text_encoder=clip_encoder(clip, projection=False),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip_2, hidden_act="gelu"),
        tokenizer_2=clip_2,
        scheduler=df.EulerDiscreteScheduler(**_SD_NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )


@family(height=16, width=16)
def StableDiffusion() -> Any:
    clip = clip_tokenizer()
    return df.StableDiffusionPipeline(
        unet=_unet(attention_head_dim=4, cross_attention_dim=16),
        vae=kl_vae(4, scaling_factor=0.18215),
        text_encoder=clip_encoder(clip, projection=False),
        tokenizer=clip,
        scheduler=df.PNDMScheduler(**_SD_NOISE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@family(height=16, width=16, max_sequence_length=64)
def ZImage() -> Any:
    tokenizer = qwen_tokenizer()
    transformer = df.ZImageTransformer2DModel(
        in_channels=4,
        dim=32,
        n_layers=2,
        n_refiner_layers=1,
        n_heads=2,
        n_kv_heads=2,
        cap_feat_dim=16,
        axes_dims=[4, 6, 6],
        axes_lens=[256, 32, 32],
    )
    for pad in (transformer.x_pad_token, transformer.cap_pad_token):  # made by torch.empty
        nn.init.normal_(pad, std=0.02)
    return df.ZImagePipeline(
        transformer=transformer,
        vae=flux_vae(),
        text_encoder=tf.Qwen3Model(tf.Qwen3Config(**decoder(tokenizer))),
        tokenizer=tokenizer,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux2_parts(joint: int, guidance: bool) -> dict[str, Any]:
    vae = kl_vae(4, cls="AutoencoderKLFlux2")
    vae.bn.running_mean.copy_(torch.linspace(-0.9, 0.7, 16))
    vae.bn.running_var.copy_(torch.linspace(1.4, 7.8, 16))
    return {
        "transformer": df.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            **BLOCKS,
            num_single_layers=2,
            joint_attention_dim=joint,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        ),
        "vae": vae,
        "scheduler": dynamic_flow(),
    }


@family(height=16, width=16, max_sequence_length=64, text_encoder_out_layers=(1, 2))
def Flux2() -> Any:
    special = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = byte_tokenizer(
        *special,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=MISTRAL_CHAT,
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
    config = tf.Mistral3Config(
        text_config=decoder(tokenizer) | {"model_type": "mistral"},
        vision_config=vision | {"model_type": "pixtral"},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return df.Flux2Pipeline(
        text_encoder=tf.Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,  # for a PixtralProcessor, which needs torchvision
        **_flux2_parts(32, guidance=True),
    )


@family(height=16, width=16, max_sequence_length=64, text_encoder_out_layers=(1, 2))
def Flux2Klein() -> Any:
    tokenizer = qwen_tokenizer()
    return df.Flux2KleinPipeline(
        text_encoder=tf.Qwen3ForCausalLM(tf.Qwen3Config(**decoder(tokenizer))),
        tokenizer=tokenizer,
        **_flux2_parts(32, guidance=False),
    )


def _picture() -> Image.Image:
    ramp = torch.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3)
    return Image.fromarray(ramp.round().to(torch.uint8).numpy())


@family(
    image=_picture(),
    height=16,
    width=16,
    max_area=16 * 16,
    max_sequence_length=32,
    _auto_resize=False,
)
def FluxKontext() -> Any:
    return df.FluxKontextPipeline(**_flux_parts())


_edit_size = qwen_edit.calculate_dimensions


@family(image=_picture(), height=128, width=128)
def QwenImageEdit() -> Any:
    # The pipeline resizes every picture to a megapixel: here it means 128 x 128, and the VAE
    # divides by 32 so that a sample stays affordable (seconds) where this does not hold.
    qwen_edit.calculate_dimensions = lambda area, ratio: _edit_size(128 * 128, ratio)
    parts = _qwen_parts() | {"vae": _qwen_vae(levels=6)}
    return df.QwenImageEditPipeline(**parts, processor=qwen_processor(parts["tokenizer"]))
