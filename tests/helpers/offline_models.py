"""Stand-ins for the tiny models that diffusers' tests load from the hub.

`families_sweep.py` builds pipelines from those tests without a connection. Tokenizers and text
encoders come from `tests/helpers/tiny_pipeline_parts.py`, of the classes that the tests ask for.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import tiny_pipeline_parts as parts
import tiny_pipelines_embedded as embedded
import torch
import transformers as tf


def _t5(cls: type, **options: Any) -> Any:
    name = cls.__name__
    if "Config" in name:
        return parts.t5_encoder(parts.t5_tokenizer()).config
    if "Model" in name:
        return parts.t5_encoder(parts.t5_tokenizer(), "UMT5" if "UMT5" in name else "T5")
    return parts.t5_tokenizer()


def _clip(cls: type, **options: Any) -> Any:
    return parts.clip_tokenizer()


def _qwen(cls: type, **options: Any) -> Any:
    tokenizer = parts.qwen_tokenizer()
    if "3VLForConditional" in cls.__name__:
        return _qwen3_vl(tokenizer)
    if "ForConditional" in cls.__name__:
        return parts.qwen_vl(tokenizer)
    if "Processor" not in cls.__name__:
        return tokenizer
    processor = parts.qwen_processor(tokenizer)
    processor.chat_template = tokenizer.chat_template
    if "3VL" in cls.__name__:
        fresh: Any = cls.__new__(cls)  # its own constructor asks for a video processor
        fresh.__dict__.update(processor.__dict__)
        fresh.vision_start_token, fresh.vision_end_token = "<|vision_start|>", "<|vision_end|>"
        return fresh
    return processor


def _qwen3_vl(tokenizer: Any) -> Any:
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e6}
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 32, "num_heads": 2}
    vision |= {"patch_size": 14, "out_hidden_size": 16, "deepstack_visual_indexes": [0]}
    text = parts.decoder(tokenizer) | {"rope_parameters": rope}
    config = tf.Qwen3VLConfig(text_config=text, vision_config=vision)
    return tf.Qwen3VLForConditionalGeneration(config)


def _gemma(cls: type, **options: Any) -> Any:
    tokenizer = parts.gemma_tokenizer()
    if "Tokenizer" in cls.__name__:
        return tokenizer
    text = tf.Gemma3TextConfig(**parts.decoder(tokenizer) | {"hidden_size": 32})
    vision = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    vision |= {"num_attention_heads": 2, "image_size": 28, "patch_size": 14}
    return tf.Gemma3ForConditionalGeneration(
        tf.Gemma3Config(text_config=text, vision_config=vision)
    )


def _mistral(cls: type, **options: Any) -> Any:
    from tiny_pipelines_images import Flux2

    return Flux2().tokenizer


def _llama(cls: type, **options: Any) -> Any:
    tokenizer = parts.llama_tokenizer()
    if "Tokenizer" in cls.__name__:
        return tokenizer
    return tf.LlamaForCausalLM(tf.LlamaConfig(**parts.decoder(tokenizer)))


def _bert(cls: type, **options: Any) -> Any:
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *map(chr, range(97, 123))]
    vocab = {word: index for index, word in enumerate([*words, *(f"##{w}" for w in words[5:])])}
    if "Tokenizer" in cls.__name__:
        return tf.BertTokenizerFast(vocab=vocab)
    config = tf.BertConfig(
        vocab_size=1124,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=37,
    )
    return tf.BertModel(config)


def _bpe(cls: type, **options: Any) -> Any:
    return parts.byte_tokenizer(
        "<s>", "</s>", "<pad>", bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def _roberta(cls: type, **options: Any) -> Any:
    special = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}
    tokens = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    return parts.byte_tokenizer(*tokens, pad_token="<pad>", model_max_length=77, **special)


def _chatglm(cls: type, **options: Any) -> Any:
    return embedded.chatglm_tokenizer() if "Tokenizer" in cls.__name__ else embedded.chatglm()


def _siglip(cls: type, **options: Any) -> Any:
    if "Processor" in cls.__name__:
        return tf.SiglipImageProcessorPil(size={"height": 30, "width": 30})
    config = tf.SiglipVisionConfig(
        hidden_size=32,
        intermediate_size=37,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=30,
        patch_size=2,
    )
    return tf.SiglipVisionModel(config)


STAND_INS: dict[str, Callable[..., Any]] = {
    "tiny-random-t5": _t5,
    "tiny-random-T5Model": _t5,
    "tiny-random-umt5": _t5,
    "tiny-random-clip": _clip,
    "tiny-random-Qwen2VL": _qwen,
    "tiny-random-Qwen3VL": _qwen,
    "Qwen3-Embedding": _qwen,
    "dummy-gemma": _gemma,
    "tiny-gemma3": _gemma,
    "Mistral-Small": _mistral,
    "dummy-hunyaunvideo": _llama,
    "tiny-random-Llama": _llama,
    "llama-tokenizer": _llama,
    "tiny-random-BertModel": _bert,
    "glm-4": _bpe,
    "mclip": _roberta,
    "tiny-random-roberta": _roberta,
    "tiny-random-chatglm3": _chatglm,
    "SiglipVisionModel": _siglip,
}
"""What is returned instead, by a part of the name on the hub."""

_BASES = (
    "PreTrainedModel PreTrainedTokenizerBase PreTrainedConfig ProcessorMixin ImageProcessingMixin "
    "AutoTokenizer AutoConfig AutoProcessor AutoModel"
)


@contextmanager
def stand_ins() -> Iterator[None]:
    """Let `from_pretrained` of transformers return the stand-ins until the context is left."""
    with ExitStack() as stack:
        for base in map(_base, _BASES.split()):
            original = base.__dict__["from_pretrained"].__func__

            def load(
                cls: type, name: Any, *args: Any, _original: Any = original, **options: Any
            ) -> Any:
                for part, make in STAND_INS.items():
                    if part in str(name):
                        return make(cls, **options)
                return _original(cls, name, *args, **options)

            stack.enter_context(mock.patch.object(base, "from_pretrained", classmethod(load)))
        yield


def _base(name: str) -> Any:
    modules = (tf, tf.tokenization_utils_base, tf.processing_utils, tf.image_processing_base)
    return next(getattr(module, name) for module in modules if hasattr(module, name))


def match_image_tokens(components: dict[str, Any]) -> None:
    """Fit language models to the stand-in tokenizers: their size, and the tokens of images."""
    encoder, tokenizer = components.get("text_encoder"), components.get("tokenizer")
    if isinstance(encoder, tf.Gemma2PreTrainedModel):  # Sana's: the vocabulary has 8 tokens there
        size = len(tokenizer), encoder.config.hidden_size
        encoder.get_input_embeddings().weight = torch.nn.Parameter(torch.randn(size))
    tokenizers = [getattr(c, "tokenizer", c) for c in components.values()]
    tokenizers = [t for t in tokenizers if hasattr(t, "convert_tokens_to_ids")]
    names = {"image_token_id": "<|image_pad|>", "video_token_id": "<|video_pad|>"}
    names |= {"vision_start_token_id": "<|vision_start|>", "vision_end_token_id": "<|vision_end|>"}
    for component in components.values():
        config = getattr(component, "config", None)
        if isinstance(component, torch.nn.Module) and hasattr(config, "image_token_id"):
            for tokenizer in tokenizers:
                vocab = tokenizer.get_vocab()
                for field, token in names.items():
                    if token in vocab and hasattr(config, field):
                        setattr(config, field, vocab[token])


def resize_for_cosmos() -> None:
    """Give Cosmos the one function that it takes from torchvision, if that is missing."""
    if tf.utils.is_torchvision_available():
        return
    from diffusers.models.controlnets import controlnet_cosmos
    from diffusers.models.transformers import transformer_cosmos

    def resize(image: torch.Tensor, size: list[int], interpolation: Any) -> torch.Tensor:
        return torch.nn.functional.interpolate(image, size=size, mode="nearest")

    stand_in = SimpleNamespace(
        functional=SimpleNamespace(resize=resize), InterpolationMode=SimpleNamespace(NEAREST=None)
    )
    for module in (transformer_cosmos, controlnet_cosmos):
        module.transforms = stand_in


def small_edits() -> None:
    """Let Qwen-Image's edit pipelines work at 64x64 pixels instead of a million."""
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit as edit
    from diffusers.pipelines.qwenimage import pipeline_qwenimage_edit_plus as edit_plus

    for module in (edit, edit_plus):
        original = module.calculate_dimensions
        module.calculate_dimensions = functools.partial(_small, original)


def _small(original: Any, area: int, ratio: float) -> Any:
    return original(min(area, 64 * 64), ratio)
