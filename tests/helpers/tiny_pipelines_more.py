"""Tiny pipelines of more image families."""

# ruff: noqa: N802

from __future__ import annotations

from typing import Any

import diffusers as df
import transformers as tf
from tiny_pipeline_parts import (
    BLOCKS,
    byte_tokenizer,
    clip_encoder,
    clip_tokenizer,
    decoder,
    dynamic_flow,
    family,
    flux_vae,
    gemma_tokenizer,
    kl_vae,
    llama_tokenizer,
    qwen_tokenizer,
    qwen_vl,
    t5_encoder,
    t5_tokenizer,
)


def sana_transformer(**config: Any) -> Any:
    return df.SanaTransformer2DModel(
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=2,
        attention_head_dim=8,
        num_cross_attention_heads=2,
        cross_attention_head_dim=8,
        cross_attention_dim=16,
        caption_channels=16,
        patch_size=1,
        sample_size=8,
        **config,
    )


@family(
    height=32,
    width=32,
    max_sequence_length=32,
    use_resolution_binning=False,
    complex_human_instruction=None,
)
def Sana() -> Any:
    tokenizer = gemma_tokenizer()
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {
            f"{side}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            f"{side}_block_out_channels": (8, 8, 8),
            f"{side}_layers_per_block": (1, 1, 1),
            f"{side}_qkv_multiscales": ((), (), (5,)),
        }
    return df.SanaPipeline(
        transformer=sana_transformer(),
        vae=df.AutoencoderDC(
            latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **sides
        ),
        text_encoder=tf.Gemma2Model(tf.Gemma2Config(**decoder(tokenizer))),
        tokenizer=tokenizer,
        scheduler=df.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@family(height=16, width=16, max_sequence_length=32, use_resolution_binning=False)
def PixArtSigma() -> Any:
    tokenizer = t5_tokenizer()
    return df.PixArtSigmaPipeline(
        transformer=df.PixArtTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            out_channels=8,
            num_layers=2,
            cross_attention_dim=16,
            caption_channels=32,
            sample_size=8,
        ),
        vae=kl_vae(4, scaling_factor=0.13025),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=df.DPMSolverMultistepScheduler(beta_end=0.02, beta_schedule="linear"),
    )


@family(height=64, width=64)
def Lumina2() -> Any:
    tokenizer = gemma_tokenizer()
    return df.Lumina2Pipeline(
        transformer=df.Lumina2Transformer2DModel(
            sample_size=8,
            in_channels=4,
            hidden_size=32,
            num_layers=2,
            num_refiner_layers=1,
            num_attention_heads=2,
            num_kv_heads=1,
            multiple_of=16,
            scaling_factor=1.0,
            axes_dim_rope=(4, 6, 6),
            axes_lens=(300, 32, 32),
            cap_feat_dim=16,
        ),
        vae=flux_vae(levels=4),  # the pipeline takes a factor of eight for granted
        text_encoder=tf.Gemma2Model(tf.Gemma2Config(**decoder(tokenizer))),
        tokenizer=tokenizer,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


@family(height=16, width=16, max_sequence_length=32)
def Chroma() -> Any:
    tokenizer = t5_tokenizer()
    return df.ChromaPipeline(
        transformer=df.ChromaTransformer2DModel(
            in_channels=16,
            **BLOCKS,
            num_single_layers=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        vae=flux_vae(),
        text_encoder=t5_encoder(tokenizer),
        tokenizer=tokenizer,
        scheduler=dynamic_flow(),
    )


@family(height=16, width=16, max_sequence_length=32)
def CogView4() -> Any:
    tokenizer = byte_tokenizer(
        "[gMASK]",
        "<sop>",
        "<|endoftext|>",
        prefix="[gMASK] <sop>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        padding_side="left",
    )
    return df.CogView4Pipeline(
        transformer=df.CogView4Transformer2DModel(
            in_channels=4,
            out_channels=4,
            num_layers=2,
            attention_head_dim=8,
            num_attention_heads=2,
            text_embed_dim=16,
            time_embed_dim=16,
            condition_dim=8,
        ),
        vae=kl_vae(4, scaling_factor=1.0, shift_factor=0.0),
        text_encoder=tf.GlmModel(tf.GlmConfig(**decoder(tokenizer))),
        tokenizer=tokenizer,
        scheduler=dynamic_flow(
            base_shift=0.25, max_shift=0.75, shift=1.0, time_shift_type="linear"
        ),
    )


@family(height=16, width=16, max_sequence_length=32)
def HiDreamImage() -> Any:
    clip, clip_2, t5 = clip_tokenizer(), clip_tokenizer("!"), t5_tokenizer()
    llama = llama_tokenizer()
    pipe = df.HiDreamImagePipeline(
        transformer=df.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            **BLOCKS,
            num_single_layers=2,
            caption_channels=[32, 16],
            text_emb_dim=32,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 1, 1],
        ),
        vae=flux_vae(),
        text_encoder=clip_encoder(clip, positions=248),
        tokenizer=clip,
        text_encoder_2=clip_encoder(clip_2, positions=248, hidden_act="gelu"),
        tokenizer_2=clip_2,
        text_encoder_3=t5_encoder(t5),
        tokenizer_3=t5,
        text_encoder_4=tf.LlamaForCausalLM(
            tf.LlamaConfig(**decoder(llama), attn_implementation="eager")
        ),
        tokenizer_4=llama,
        scheduler=df.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipe.default_sample_size = 8  # the pipeline scales every size to this area
    return pipe


@family(height=16, width=16)
def HunyuanImage() -> Any:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    tokenizer, glyphs = qwen_tokenizer(), tf.ByT5Tokenizer()
    pipe = df.HunyuanImagePipeline(
        transformer=df.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            **BLOCKS,
            num_single_layers=2,
            num_refiner_layers=1,
            patch_size=(1, 1),
            text_embed_dim=16,
            text_embed_2_dim=32,
            rope_axes_dim=(8, 8),
        ),
        vae=df.AutoencoderKLHunyuanImage(
            in_channels=3,
            out_channels=3,
            latent_channels=4,
            block_out_channels=(32, 32),
            layers_per_block=1,
            spatial_compression_ratio=2,
            sample_size=16,
            scaling_factor=0.75289,
        ),
        text_encoder=qwen_vl(tokenizer, layers=4),
        tokenizer=tokenizer,
        text_encoder_2=t5_encoder(glyphs),
        tokenizer_2=glyphs,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )
    pipe.tokenizer_max_length = 64  # prompts are padded to this length
    return pipe
