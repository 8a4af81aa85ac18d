"""Tiny, randomly initialised, real diffusers pipelines, one per family, made without any download.

Every builder wires the family's own classes (denoiser, VAE, text encoders, tokenizers, scheduler)
at toy widths, with a scheduler configured like the published one and with non-trivial latent
statistics. The tokenizers are made here: byte-level BPEs that know the words of the prompt
templates, and character vocabularies.

    pipe = build("QwenImage")
    pipe(prompt="a cat", num_inference_steps=2, **CALL_KWARGS["QwenImage"])
"""

# ruff: noqa: N802

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers as df
import torch
import transformers as tf
from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as qwen_edit
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import nn

FAMILIES: dict[str, Callable[[], Any]] = {}
"""Builder of each family's pipeline, with seed 0."""

CALL_KWARGS: dict[str, dict[str, Any]] = {}
"""Arguments of each family's smallest sensible draw, besides prompt, steps and generator."""

_BUILDERS: dict[str, Callable[[], Any]] = {}


def build(name: str, *, seed: int = 0) -> Any:
    """Builds the tiny pipeline of family `name`: fp32, eval, CPU, the same weights for one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        pipe = _BUILDERS[name]()
        for component in pipe.components.values():
            if isinstance(component, nn.Module):
                _revive(component.float().eval())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _family(**call_kwargs: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a builder under its function's name, with the arguments of its smallest draw."""

    def register(builder: Callable[[], Any]) -> Callable[[], Any]:
        name = builder.__name__
        _BUILDERS[name] = builder
        FAMILIES[name] = functools.partial(build, name)
        CALL_KWARGS[name] = call_kwargs
        return builder

    return register


@torch.no_grad()
def _revive(module: nn.Module, std: float = 0.02) -> None:
    """Gives parameters that are initialised to zero (output layers, gates) small random values."""
    for parameter in module.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=std)


# Tokenizers ---------------------------------------------------------------------------------------

_WORDS = [  # these words become single tokens, as in the published vocabularies
    "system\nuser\nassistant\nthink\n\n\n",
    "Describe the image by detailing the color, shape, size, texture, quantity, text, spatial "
    "relationships of the objects and background:",
    "Describe the key features of the input image (color, shape, size, texture, objects, "
    "background), then explain how the user's text instruction should alter or modify the image. "
    "Generate a new image that meets the user's requirements while maintaining consistency with "
    "the original input where appropriate.",
    "You are a prompt engineer. Describe the image by",
    "You are an AI that reasons about image descriptions. You give structured responses focusing "
    "on object relationships, object\nattribution and actions without speculation.",
    "\n\nDescribe the video by detailing the following aspects: 1. The main content and theme of "
    "the video.2. The color, shape, size, texture, quantity, text, and spatial relationships of "
    "the objects.3. Actions, events, behaviors temporal relationships, physical movement changes "
    "of the objects.4. background environment, light, style and atmosphere.5. camera angles, "
    "movements, and transitions used in the video:",
]
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
_CHARS = ["▁", "\n", *(chr(code) for code in range(33, 127))]


@functools.cache
def _byte_bpe() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-level BPE in which every word of `_WORDS` is one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = tf.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=4096, min_frequency=1, initial_alphabet=_BYTES, show_progress=False
    )
    tokenizer.train_from_iterator(_WORDS, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    return model["vocab"], [tuple(pair) for pair in model["merges"]]


def _with(vocab: dict[str, int], special: list[str]) -> dict[str, int]:
    return vocab | {token: len(vocab) + index for index, token in enumerate(special)}


_QWEN_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n"
    "{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}"
)
_MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% set tag = "
    "'SYSTEM_PROMPT' if m.role == 'system' else 'INST' %}[{{ tag }}]"
    "{% for c in m.content %}{{ c.text }}{% endfor %}[/{{ tag }}]{% endfor %}"
)


def _qwen_tokenizer() -> Any:
    vocab, merges = _byte_bpe()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return tf.Qwen2Tokenizer(
        vocab=_with(vocab, special),
        merges=merges,
        extra_special_tokens=special[1:],
        chat_template=_QWEN_CHAT,
    )


def _byte_tokenizer(*special: str, prefix: str = "", **config: Any) -> Any:
    """A byte-level BPE without a class of its own (Llama 3, GLM, Mistral), `prefix` before all."""
    vocab, merges = _byte_bpe()
    vocab = _with(vocab, list(special))
    backend = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    backend.pre_tokenizer = tf.Qwen2Tokenizer().backend_tokenizer.pre_tokenizer
    backend.decoder = decoders.ByteLevel()
    if prefix:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{prefix} $A", special_tokens=[(t, vocab[t]) for t in prefix.split()]
        )
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens=list(special), **config
    )


def _llama_tokenizer() -> Any:
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return _byte_tokenizer(
        *special,
        prefix=special[0],
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
    )


def _gemma_tokenizer() -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_CHARS]
    return tf.GemmaTokenizerFast(vocab=_with({}, tokens), padding_side="right")


def _clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    tokens = [*_BYTES, *(byte + "</w>" for byte in _BYTES), "<|startoftext|>", "<|endoftext|>"]
    return tf.CLIPTokenizer(vocab=_with({}, tokens), pad_token=pad_token, model_max_length=77)


def _t5_tokenizer() -> Any:
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocab += [(char, -4.0) for char in _CHARS]
    return tf.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def _qwen_processor(tokenizer: Any) -> Any:
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}  # pixels: four image tokens
    images = tf.Qwen2VLImageProcessorPil(size=size)
    # The check of its parts' classes looks for video processors, which need torchvision.
    with mock.patch.object(tf.Qwen2VLProcessor, "check_argument_for_proper_class"):
        return tf.Qwen2VLProcessor(images, tokenizer, None)


# Text encoders ------------------------------------------------------------------------------------


def _clip(tokenizer: Any, projection: bool = True, positions: int = 77, **config: Any) -> Any:
    cls = tf.CLIPTextModelWithProjection if projection else tf.CLIPTextModel
    return cls(
        tf.CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=32,
            projection_dim=16,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=positions,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            **config,
        )
    )


def _t5(tokenizer: Any, cls: str = "T5") -> Any:
    """An encoder of width 32; `cls` is T5, or UMT5 with its position biases in every layer."""
    config = getattr(tf, f"{cls}Config")(
        vocab_size=len(tokenizer),
        d_model=32,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=4,
        feed_forward_proj="gated-gelu",
    )
    return getattr(tf, f"{cls}EncoderModel")(config)


def _decoder(tokenizer: Any, layers: int = 2) -> dict[str, Any]:
    """Configuration of a language model of width 16."""
    return {
        "vocab_size": len(tokenizer),
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 0.2,
    }


def _qwen_vl(tokenizer: Any, layers: int = 2) -> Any:
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    config = tf.Qwen2_5_VLConfig(
        text_config=_decoder(tokenizer, layers) | {"rope_parameters": rope},
        vision_config={
            "depth": 1,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 16,
        },
        image_token_id=ids("<|image_pad|>"),
        video_token_id=ids("<|video_pad|>"),
        vision_start_token_id=ids("<|vision_start|>"),
        vision_end_token_id=ids("<|vision_end|>"),
    )
    return tf.Qwen2_5_VLForConditionalGeneration(config)


# VAEs and schedulers ------------------------------------------------------------------------------


def _kl_vae(channels: int, levels: int = 2, cls: str = "AutoencoderKL", **config: Any) -> Any:
    """An AutoencoderKL that divides the sides by 2 ** (levels - 1), with the scale in `config`."""
    return getattr(df, cls)(
        down_block_types=["DownEncoderBlock2D"] * levels,
        up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=[4] * (levels - 1) + [8],
        layers_per_block=1,
        latent_channels=channels,
        norm_num_groups=2,
        sample_size=32,
        **config,
    )


def _flux_vae(scale: float = 0.3611, shift: float = 0.1159, levels: int = 2) -> Any:
    """The VAE of Flux and its heirs, with 4 channels instead of 16."""
    return _kl_vae(
        4,
        levels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def _stats(channels: int) -> dict[str, list[float]]:
    """Non-trivial `latents_mean` and `latents_std`."""
    mean, std = torch.linspace(-0.9, 0.7, channels), torch.linspace(1.2, 2.8, channels)
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def _dynamic_flow(**config: Any) -> Any:
    """The flow-matching scheduler whose shift grows with the number of latents (Flux)."""
    defaults = {"base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True}
    return df.FlowMatchEulerDiscreteScheduler(**(defaults | config))


_BLOCKS: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
"""Size of most denoisers."""


# Families -----------------------------------------------------------------------------------------


def _qwen_vae(levels: int = 2) -> Any:
    return df.AutoencoderKLQwenImage(
        base_dim=4,
        z_dim=4,
        dim_mult=[1] * (levels - 1) + [2],
        num_res_blocks=1,
        temperal_downsample=[False] * (levels - 2) + [True],
        **_stats(4),
    )


def _qwen_parts() -> dict[str, Any]:
    tokenizer = _qwen_tokenizer()
    return {
        "transformer": df.QwenImageTransformer2DModel(
            patch_size=2,
            in_channels=16,
            out_channels=4,
            **_BLOCKS,
            joint_attention_dim=16,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": _qwen_vae(),
        "text_encoder": _qwen_vl(tokenizer),
        "tokenizer": tokenizer,
        "scheduler": _dynamic_flow(
            max_shift=0.9, shift=1.0, max_image_seq_len=8192, shift_terminal=0.02
        ),
    }


@_family(height=16, width=16)
def QwenImage() -> Any:
    return df.QwenImagePipeline(**_qwen_parts())


def _flux_parts() -> dict[str, Any]:
    clip, t5 = _clip_tokenizer(), _t5_tokenizer()
    return {
        "transformer": df.FluxTransformer2DModel(
            patch_size=1,
            in_channels=16,
            **_BLOCKS,
            num_single_layers=2,
            joint_attention_dim=32,
            pooled_projection_dim=16,
            guidance_embeds=True,
            axes_dims_rope=(4, 6, 6),
        ),
        "vae": _flux_vae(),
        "text_encoder": _clip(clip, projection=False),
        "tokenizer": clip,
        "text_encoder_2": _t5(t5),
        "tokenizer_2": t5,
        "scheduler": _dynamic_flow(),
    }


@_family(height=16, width=16, max_sequence_length=32)
def Flux() -> Any:
    return df.FluxPipeline(**_flux_parts())


@_family(height=16, width=16, max_sequence_length=32)
def StableDiffusion3() -> Any:
    clip, clip_2, t5 = _clip_tokenizer(), _clip_tokenizer("!"), _t5_tokenizer()
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
        vae=_flux_vae(scale=1.5305, shift=0.0609),
        text_encoder=_clip(clip),
        tokenizer=clip,
        text_encoder_2=_clip(clip_2, hidden_act="gelu"),
        tokenizer_2=clip_2,
        text_encoder_3=_t5(t5),
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


@_family(height=16, width=16)
def StableDiffusionXL() -> Any:
    clip, clip_2 = _clip_tokenizer(), _clip_tokenizer("!")
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
        vae=_kl_vae(4, scaling_factor=0.13025),
        text_encoder=_clip(clip, projection=False),
        tokenizer=clip,
        text_encoder_2=_clip(clip_2, hidden_act="gelu"),
        tokenizer_2=clip_2,
        scheduler=df.EulerDiscreteScheduler(**_SD_NOISE, timestep_spacing="leading"),
        add_watermarker=False,
    )


@_family(height=16, width=16)
def StableDiffusion() -> Any:
    clip = _clip_tokenizer()
    return df.StableDiffusionPipeline(
        unet=_unet(attention_head_dim=4, cross_attention_dim=16),
        vae=_kl_vae(4, scaling_factor=0.18215),
        text_encoder=_clip(clip, projection=False),
        tokenizer=clip,
        scheduler=df.PNDMScheduler(**_SD_NOISE, skip_prk_steps=True),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


@_family(height=16, width=16, max_sequence_length=64)
def ZImage() -> Any:
    tokenizer = _qwen_tokenizer()
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
        vae=_flux_vae(),
        text_encoder=tf.Qwen3Model(tf.Qwen3Config(**_decoder(tokenizer))),
        tokenizer=tokenizer,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def _flux2_parts(joint: int, guidance: bool) -> dict[str, Any]:
    vae = _kl_vae(4, cls="AutoencoderKLFlux2")
    vae.bn.running_mean.copy_(torch.linspace(-0.9, 0.7, 16))
    vae.bn.running_var.copy_(torch.linspace(1.4, 7.8, 16))
    return {
        "transformer": df.Flux2Transformer2DModel(
            patch_size=1,
            in_channels=16,
            **_BLOCKS,
            num_single_layers=2,
            joint_attention_dim=joint,
            timestep_guidance_channels=32,
            axes_dims_rope=(4, 4, 4, 4),
            guidance_embeds=guidance,
        ),
        "vae": vae,
        "scheduler": _dynamic_flow(),
    }


@_family(height=16, width=16, max_sequence_length=64, text_encoder_out_layers=(1, 2))
def Flux2() -> Any:
    special = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    special += ["[IMG]", "[IMG_BREAK]", "[IMG_END]"]
    tokenizer = _byte_tokenizer(
        *special,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        padding_side="left",
        chat_template=_MISTRAL_CHAT,
    )
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "head_dim": 8, "image_size": 28, "patch_size": 14}
    config = tf.Mistral3Config(
        text_config=_decoder(tokenizer) | {"model_type": "mistral"},
        vision_config=vision | {"model_type": "pixtral"},
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
    )
    return df.Flux2Pipeline(
        text_encoder=tf.Mistral3ForConditionalGeneration(config),
        tokenizer=tokenizer,  # for a PixtralProcessor, which needs torchvision
        **_flux2_parts(32, guidance=True),
    )


@_family(height=16, width=16, max_sequence_length=64, text_encoder_out_layers=(1, 2))
def Flux2Klein() -> Any:
    tokenizer = _qwen_tokenizer()
    return df.Flux2KleinPipeline(
        text_encoder=tf.Qwen3ForCausalLM(tf.Qwen3Config(**_decoder(tokenizer))),
        tokenizer=tokenizer,
        **_flux2_parts(32, guidance=False),
    )


def _picture() -> Image.Image:
    ramp = torch.linspace(0, 255, 32 * 32 * 3).reshape(32, 32, 3)
    return Image.fromarray(ramp.round().to(torch.uint8).numpy())


@_family(
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


@_family(image=_picture(), height=128, width=128)
def QwenImageEdit() -> Any:
    # The pipeline resizes every picture to a megapixel: here it means 128 x 128, and the VAE
    # divides by 32 so that the draw stays affordable (seconds) where this does not hold.
    qwen_edit.calculate_dimensions = lambda area, ratio: _edit_size(128 * 128, ratio)
    parts = _qwen_parts() | {"vae": _qwen_vae(levels=6)}
    return df.QwenImageEditPipeline(**parts, processor=_qwen_processor(parts["tokenizer"]))


@_family(
    height=32,
    width=32,
    max_sequence_length=32,
    use_resolution_binning=False,
    complex_human_instruction=None,
)
def Sana() -> Any:
    tokenizer = _gemma_tokenizer()
    sides: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        sides |= {
            f"{side}_block_types": ("ResBlock", "ResBlock", "EfficientViTBlock"),
            f"{side}_block_out_channels": (8, 8, 8),
            f"{side}_layers_per_block": (1, 1, 1),
            f"{side}_qkv_multiscales": ((), (), (5,)),
        }
    return df.SanaPipeline(
        transformer=df.SanaTransformer2DModel(
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
        ),
        vae=df.AutoencoderDC(
            latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **sides
        ),
        text_encoder=tf.Gemma2Model(tf.Gemma2Config(**_decoder(tokenizer))),
        tokenizer=tokenizer,
        scheduler=df.DPMSolverMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )


@_family(height=16, width=16, max_sequence_length=32, use_resolution_binning=False)
def PixArtSigma() -> Any:
    tokenizer = _t5_tokenizer()
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
        vae=_kl_vae(4, scaling_factor=0.13025),
        text_encoder=_t5(tokenizer),
        tokenizer=tokenizer,
        scheduler=df.DPMSolverMultistepScheduler(beta_end=0.02, beta_schedule="linear"),
    )


@_family(height=64, width=64)
def Lumina2() -> Any:
    tokenizer = _gemma_tokenizer()
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
        vae=_flux_vae(levels=4),  # the pipeline takes a factor of eight for granted
        text_encoder=tf.Gemma2Model(tf.Gemma2Config(**_decoder(tokenizer))),
        tokenizer=tokenizer,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


@_family(height=16, width=16, max_sequence_length=32)
def Chroma() -> Any:
    tokenizer = _t5_tokenizer()
    return df.ChromaPipeline(
        transformer=df.ChromaTransformer2DModel(
            in_channels=16,
            **_BLOCKS,
            num_single_layers=2,
            joint_attention_dim=32,
            axes_dims_rope=(4, 6, 6),
            approximator_num_channels=16,
            approximator_hidden_dim=32,
            approximator_layers=1,
        ),
        vae=_flux_vae(),
        text_encoder=_t5(tokenizer),
        tokenizer=tokenizer,
        scheduler=_dynamic_flow(),
    )


@_family(height=16, width=16, max_sequence_length=32)
def CogView4() -> Any:
    tokenizer = _byte_tokenizer(
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
        vae=_kl_vae(4, scaling_factor=1.0, shift_factor=0.0),
        text_encoder=tf.GlmModel(tf.GlmConfig(**_decoder(tokenizer))),
        tokenizer=tokenizer,
        scheduler=_dynamic_flow(
            base_shift=0.25, max_shift=0.75, shift=1.0, time_shift_type="linear"
        ),
    )


@_family(height=16, width=16, max_sequence_length=32)
def HiDreamImage() -> Any:
    clip, clip_2, t5 = _clip_tokenizer(), _clip_tokenizer("!"), _t5_tokenizer()
    llama = _llama_tokenizer()
    pipe = df.HiDreamImagePipeline(
        transformer=df.HiDreamImageTransformer2DModel(
            patch_size=2,
            in_channels=4,
            out_channels=4,
            **_BLOCKS,
            num_single_layers=2,
            caption_channels=[32, 16],
            text_emb_dim=32,
            num_routed_experts=4,
            num_activated_experts=2,
            axes_dims_rope=(8, 4, 4),
            max_resolution=(8, 8),
            llama_layers=[0, 1, 1, 1],
        ),
        vae=_flux_vae(),
        text_encoder=_clip(clip, positions=248),
        tokenizer=clip,
        text_encoder_2=_clip(clip_2, positions=248, hidden_act="gelu"),
        tokenizer_2=clip_2,
        text_encoder_3=_t5(t5),
        tokenizer_3=t5,
        text_encoder_4=tf.LlamaForCausalLM(
            tf.LlamaConfig(**_decoder(llama), attn_implementation="eager")
        ),
        tokenizer_4=llama,
        scheduler=df.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    )
    pipe.default_sample_size = 8  # the pipeline scales every size to this area
    return pipe


@_family(height=16, width=16)
def HunyuanImage() -> Any:
    from diffusers.guiders import AdaptiveProjectedMixGuidance

    tokenizer, glyphs = _qwen_tokenizer(), tf.ByT5Tokenizer()
    pipe = df.HunyuanImagePipeline(
        transformer=df.HunyuanImageTransformer2DModel(
            in_channels=4,
            out_channels=4,
            **_BLOCKS,
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
        text_encoder=_qwen_vl(tokenizer, layers=4),
        tokenizer=tokenizer,
        text_encoder_2=_t5(glyphs),
        tokenizer_2=glyphs,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=5.0),
        guider=AdaptiveProjectedMixGuidance(),
        ocr_guider=AdaptiveProjectedMixGuidance(),
    )
    pipe.tokenizer_max_length = 64  # prompts are padded to this length
    return pipe


@_family(height=16, width=16, num_frames=5, max_sequence_length=64)
def HunyuanVideo() -> Any:
    llama, clip = _llama_tokenizer(), _clip_tokenizer()
    return df.HunyuanVideoPipeline(
        transformer=df.HunyuanVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            **_BLOCKS,
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
        text_encoder=tf.LlamaModel(tf.LlamaConfig(**_decoder(llama, layers=4))),
        tokenizer=llama,
        text_encoder_2=_clip(clip, projection=False),
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
    tokenizer = _t5_tokenizer()
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
            **_stats(4),
        ),
        "text_encoder": _t5(tokenizer, "UMT5"),
        "tokenizer": tokenizer,
        "scheduler": df.UniPCMultistepScheduler(
            prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
        ),
    }


@_family(height=16, width=16, num_frames=5, max_sequence_length=32)
def Wan() -> Any:
    return df.WanPipeline(**_wan_parts())


@_family(height=16, width=16, num_frames=5, max_sequence_length=32)
def Wan22() -> Any:
    parts = _wan_parts()
    return df.WanPipeline(**parts, transformer_2=_wan_transformer(), boundary_ratio=0.875)


@_family(height=32, width=32, num_frames=5, max_sequence_length=32)
def LTX() -> Any:
    tokenizer = _t5_tokenizer()
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
    vae.latents_mean.copy_(torch.tensor(_stats(4)["latents_mean"]))
    vae.latents_std.copy_(torch.tensor(_stats(4)["latents_std"]))
    return df.LTXPipeline(
        transformer=df.LTXVideoTransformer3DModel(
            in_channels=4,
            out_channels=4,
            **_BLOCKS,
            cross_attention_dim=32,
            caption_channels=32,
        ),
        vae=vae,
        text_encoder=_t5(tokenizer),
        tokenizer=tokenizer,
        scheduler=_dynamic_flow(
            base_image_seq_len=1024, base_shift=0.95, max_shift=2.05, shift=1.0, shift_terminal=0.1
        ),
    )


@_family(height=64, width=64, max_sequence_length=32)
def Kandinsky5() -> Any:
    tokenizer, clip = _qwen_tokenizer(), _clip_tokenizer()
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
        vae=_flux_vae(levels=4),  # the pipeline takes a factor of eight for granted
        text_encoder=_qwen_vl(tokenizer),
        tokenizer=_qwen_processor(tokenizer),
        text_encoder_2=_clip(clip, projection=False),
        tokenizer_2=clip,
        scheduler=df.FlowMatchEulerDiscreteScheduler(shift=5.0),
    )
    pipe.resolutions = [(64, 64)]
    return pipe
