"""Tiny pipelines whose ``guidance_scale`` is an input of the network, and Kolors."""

# ruff: noqa: N802

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import diffusers as df
import tiny_pipelines_images as images
import tiny_pipelines_more as more
from tiny_pipeline_parts import family, kl_vae
from torch import nn


@family(height=16, width=16)
def LatentConsistencyModel() -> Any:
    """Stable Diffusion's parts; the UNet takes an embedding of the scale beside the timestep."""
    parts = images.StableDiffusion().components
    parts["unet"] = images._unet(attention_head_dim=4, cross_attention_dim=16, time_cond_proj_dim=8)
    parts["scheduler"] = df.LCMScheduler(**images._SD_NOISE)
    return df.LatentConsistencyModelPipeline(**parts, requires_safety_checker=False)


@family(
    height=32,
    width=32,
    max_sequence_length=32,
    use_resolution_binning=False,
    complex_human_instruction=None,
    intermediate_timesteps=None,
)
def SanaSprint() -> Any:
    parts = more.Sana().components
    parts["transformer"] = more.sana_transformer(
        guidance_embeds=True, qk_norm="rms_norm_across_heads"
    )
    parts["scheduler"] = df.SCMScheduler(prediction_type="trigflow", sigma_data=0.5)
    return df.SanaSprintPipeline(**parts)


def chatglm_tokenizer() -> Any:
    """Kolors' tokenizer with a SentencePiece model of a few letters."""
    import sentencepiece
    from diffusers.pipelines.kolors import ChatGLMTokenizer

    with tempfile.TemporaryDirectory() as folder:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(["the quick brown fox jumps over the lazy dog"] * 20),
            model_prefix=str(Path(folder) / "tokenizer"),
            vocab_size=40,
            hard_vocab_limit=False,
            minloglevel=2,
        )
        return ChatGLMTokenizer(str(Path(folder) / "tokenizer.model"))


def chatglm() -> Any:
    """Kolors' text encoder, of width 8."""
    from diffusers.pipelines.kolors import ChatGLMModel
    from diffusers.pipelines.kolors.text_encoder import ChatGLMConfig

    config = ChatGLMConfig(
        num_layers=2,
        padded_vocab_size=128,
        hidden_size=8,
        ffn_hidden_size=16,
        kv_channels=4,
        num_attention_heads=2,
        multi_query_attention=True,
        multi_query_group_num=1,
        seq_length=64,
        add_qkv_bias=True,
        rmsnorm=True,
        original_rope=True,
    )
    model = ChatGLMModel(config)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2)  # its constructor leaves them as they are
    return model


def Kolors() -> Any:
    """Not a family of `tiny_pipelines.FAMILIES`, because it needs sentencepiece."""
    return df.KolorsPipeline(
        unet=images._unet(
            attention_head_dim=(2, 4),
            use_linear_projection=True,
            transformer_layers_per_block=(1, 2),
            cross_attention_dim=8,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=6 * 8 + 8,
        ),
        vae=kl_vae(4, scaling_factor=0.13025),
        text_encoder=chatglm(),
        tokenizer=chatglm_tokenizer(),
        scheduler=df.EulerDiscreteScheduler(**images._SD_NOISE, timestep_spacing="leading"),
    )
