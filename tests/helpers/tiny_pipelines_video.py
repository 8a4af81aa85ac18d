"""Tiny pipelines of the families whose denoisers are made for video."""

# ruff: noqa: N802

from __future__ import annotations

from typing import Any

import diffusers as df
import torch
import transformers as tf
from tiny_pipeline_parts import (
    BLOCKS,
    clip_encoder,
    clip_tokenizer,
    decoder,
    dynamic_flow,
    family,
    flux_vae,
    llama_tokenizer,
    qwen_processor,
    qwen_tokenizer,
    qwen_vl,
    stats,
    t5_encoder,
    t5_tokenizer,
)


@family(height=16, width=16, num_frames=5, max_sequence_length=64)
def HunyuanVideo() -> Any:
    llama, clip = llama_tokenizer(), clip_tokenizer()
    return df.HunyuanVideoPipeline(
        transformer=df.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            **BLOCKS,
            num_single_layers=2,
            num_refiner_layers=1,
            text_embed_dim=16,
            pooled_projection_dim=16,
            rope_axes_dim=(4, 6, 6),
        ),
        vae=df.AutoencoderKLHunyuanVideo(
            latent_channels=4,
            down_block_types=("HunyuanVideoDownBlock3D",) * 3,
            up_block_types=("HunyuanVideoUpBlock3D",) * 3,
            block_out_channels=(4, 4, 8),
            layers_per_block=1,
            norm_num_groups=2,
            spatial_compression_ratio=2,
            temporal_compression_ratio=4,
            scaling_factor=0.476986,
        ),
        text_encoder=tf.LlamaModel(tf.LlamaConfig(**decoder(llama, layers=4))),
        tokenizer=llama,
        text_encoder_2=clip_encoder(clip, projection=False),
        tokenizer_2=clip,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


def _wan_transformer() -> Any:
    return df.WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=32,
        freq_dim=32,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=32,
    )


def _wan_parts() -> dict[str, Any]:
    tokenizer = t5_tokenizer()
    return {
        "transformer": _wan_transformer(),
        "vae": df.AutoencoderKLWan(
            base_dim=4,
            z_dim=4,
            dim_mult=[1, 2],
            num_res_blocks=1,
            temperal_downsample=[True],
            scale_factor_spatial=2,
            scale_factor_temporal=2,
            **stats(4),
        ),
        "text_encoder": t5_encoder(tokenizer, "UMT5"),
        "tokenizer": tokenizer,
        "scheduler": df.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


@family(height=16, width=16, num_frames=5, max_sequence_length=32)
def Wan() -> Any:
    return df.WanPipeline(**_wan_parts())


@family(height=16, width=16, num_frames=5, max_sequence_length=32)
def Wan22() -> Any:
    parts = _wan_parts()
    return df.WanPipeline(**parts, transformer_2=_wan_transformer(), boundary_ratio=0.875)


@family(height=32, width=32, num_frames=5, max_sequence_length=32)
def LTX() -> Any:
    tokenizer = t5_tokenizer()
    vae = df.AutoencoderKLLTXVideo(
        latent_channels=4,
        block_out_channels=(4, 8),
        decoder_block_out_channels=(4, 8),
        down_block_types=("LTXVideoDownBlock3D",) * 2,
        layers_per_block=(1, 1, 1),
        decoder_layers_per_block=(1, 1, 1),
        spatio_temporal_scaling=(True, False),
        decoder_spatio_temporal_scaling=(True, False),
        decoder_inject_noise=(False,) * 3,
        upsample_residual=(False,) * 2,
        upsample_factor=(1,) * 2,
        patch_size=2,
    )
    vae.latents_mean.copy_(torch.tensor(stats(4)["latents_mean"]))
    vae.latents_std.copy_(torch.tensor(stats(4)["latents_std"]))
    return df.LTXPipeline(
        transformer=df.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            **BLOCKS,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        vae=vae,
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=dynamic_flow(
            base_image_seq_len=1024, base_shift=0.95, max_shift=2.05, shift=1.0, shift_terminal=0.1
        ),
    )


@family(height=64, width=64, max_sequence_length=32)
def Kandinsky5() -> Any:
    tokenizer, clip = qwen_tokenizer(), clip_tokenizer()
    pipe = df.Kandinsky5T2IPipeline(
        transformer=df.Kandinsky5Transformer3DModel(
            in_visual_dim=4,
            in_text_dim=16,
            in_text_dim2=16,
            time_dim=16,
            out_visual_dim=4,
            patch_size=(1, 2, 2),
            model_dim=32,
            ff_dim=32,
            num_text_blocks=1,
            num_visual_blocks=2,
            axes_dims=(4, 6, 6),
        ),
        vae=flux_vae(levels=4),  # the pipeline takes a factor of eight for granted
        text_encoder=qwen_vl(tokenizer),
        tokenizer=qwen_processor(tokenizer),
        text_encoder_2=clip_encoder(clip, projection=False),
        tokenizer_2=clip,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.resolutions = [(64, 64)]
    return pipe
