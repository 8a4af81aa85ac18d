"""What tiny pipelines are made of: tokenizers, text encoders, VAEs, schedulers."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any
from unittest import mock

import diffusers as df
import torch
import transformers as tf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BUILDERS: dict[str, tuple[Callable[[], Any], dict[str, Any]]] = {}
"""Builder of each family, and the arguments of its smallest sensible sample."""


def family(**call_kwargs: Any) -> Callable[[Callable[[], Any]], Callable[[], Any]]:
    """Registers a builder under its function's name, with the arguments of its smallest sample."""

    def register(builder: Callable[[], Any]) -> Callable[[], Any]:
        BUILDERS[builder.__name__] = builder, call_kwargs
        return builder

    return register


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
MISTRAL_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% set tag = "
    "'SYSTEM_PROMPT' if m.role == 'system' else 'INST' %}[{{ tag }}]"
    "{% for c in m.content %}{{ c.text }}{% endfor %}[/{{ tag }}]{% endfor %}"
)


def qwen_tokenizer() -> Any:
    vocab, merges = _byte_bpe()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    special += ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]
    return tf.Qwen2Tokenizer(
        vocab=_with(vocab, special),
        merges=merges,
        extra_special_tokens=special[1:],
        chat_template=_QWEN_CHAT,
    )


def byte_tokenizer(*special: str, prefix: str = "", **config: Any) -> Any:
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


def llama_tokenizer() -> Any:
    special = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    return byte_tokenizer(
        *special,
        prefix=special[0],
        bos_token=special[0],
        eos_token=special[1],
        pad_token=special[1],
    )


def gemma_tokenizer() -> Any:
    tokens = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *_CHARS]
    return tf.GemmaTokenizerFast(vocab=_with({}, tokens), padding_side="right")


def clip_tokenizer(pad_token: str = "<|endoftext|>") -> Any:
    tokens = [*_BYTES, *(byte + "</w>" for byte in _BYTES), "<|startoftext|>", "<|endoftext|>"]
    return tf.CLIPTokenizer(vocab=_with({}, tokens), pad_token=pad_token, model_max_length=77)


def t5_tokenizer() -> Any:
    vocab = [(token, 0.0) for token in ("<pad>", "</s>", "<unk>")]
    vocab += [(char, -4.0) for char in _CHARS]
    return tf.T5TokenizerFast(vocab=vocab, extra_ids=0, model_max_length=512)


def qwen_processor(tokenizer: Any) -> Any:
    size = {"shortest_edge": 56 * 56, "longest_edge": 56 * 56}  # pixels: four image tokens
    images = tf.Qwen2VLImageProcessorPil(size=size)
    # The check of its parts' classes looks for video processors, which need torchvision.
    with mock.patch.object(tf.Qwen2VLProcessor, "check_argument_for_proper_class"):
        return tf.Qwen2VLProcessor(images, tokenizer, None)


# Text encoders ------------------------------------------------------------------------------------


def clip_encoder(
    tokenizer: Any, projection: bool = True, positions: int = 77, **config: Any
) -> Any:
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


def t5_encoder(tokenizer: Any, cls: str = "T5") -> Any:
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


def decoder(tokenizer: Any, layers: int = 2) -> dict[str, Any]:
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


def qwen_vl(tokenizer: Any, layers: int = 2) -> Any:
    ids = tokenizer.convert_tokens_to_ids
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    config = tf.Qwen2_5_VLConfig(
        text_config=decoder(tokenizer, layers) | {"rope_parameters": rope},
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


def kl_vae(channels: int, levels: int = 2, cls: str = "AutoencoderKL", **config: Any) -> Any:
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


def flux_vae(scale: float = 0.3611, shift: float = 0.1159, levels: int = 2) -> Any:
    """The VAE of Flux and its heirs, with 4 channels instead of 16."""
    return kl_vae(
        4,
        levels,
        scaling_factor=scale,
        shift_factor=shift,
        use_quant_conv=False,
        use_post_quant_conv=False,
    )


def stats(channels: int) -> dict[str, list[float]]:
    """Non-trivial `latents_mean` and `latents_std`."""
    mean, std = torch.linspace(-0.9, 0.7, channels), torch.linspace(1.2, 2.8, channels)
    return {"latents_mean": mean.tolist(), "latents_std": std.tolist()}


def dynamic_flow(**config: Any) -> Any:
    """The flow-matching scheduler whose shift grows with the number of latents (Flux)."""
    defaults = {"base_shift": 0.5, "max_shift": 1.15, "shift": 3.0, "use_dynamic_shifting": True}
    return df.FlowMatchEulerDiscreteScheduler(**(defaults | config))


BLOCKS: dict[str, Any] = {"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16}
"""Size of most denoisers."""
