import inspect

import pytest
import torch
from tiny_pipelines import CALL_KWARGS, build

from lit_distill import rollout
from lit_distill.encoding.collate import EncodingCollateError
from lit_distill.encoding.encode_once import EncodeOnce, forgotten_encodings
from lit_distill.encoding.fingerprint import fingerprint
from lit_distill.encoding.store import EncodingStore


def sample(pipe, prompts, name, **further):
    given = {k: [v] * len(prompts) if k == "image" else v for k, v in CALL_KWARGS[name].items()}
    generator = [torch.Generator().manual_seed(i) for i in range(len(prompts))]
    with torch.no_grad():
        return rollout(
            pipe, prompt=prompts, num_inference_steps=2, generator=generator, **given | further
        )


def counted(owner, name):
    calls, original = [], getattr(owner, name)

    def count(*args, **kwargs):
        calls.append(1)
        return original(*args, **kwargs)

    count.__name__ = name
    count.__signature__ = inspect.signature(original)
    setattr(owner, name, count)
    return calls


@pytest.mark.parametrize("name", ["FluxKontext", "QwenImageEdit"])
def test_prompts_and_pictures_are_encoded_once_not_in_every_rollout(name):
    pipe = build(name)
    texts, images = counted(pipe, "encode_prompt"), counted(pipe.vae, "encode")
    EncodeOnce(pipe)
    first = sample(pipe, ["a red cat"], name)
    for _ in range(3):
        assert torch.equal(sample(pipe, ["a red cat"], name), first)
    assert len(texts) == 1
    assert len(images) == 1
    other = CALL_KWARGS[name]["image"].transpose(0)
    assert not torch.equal(sample(pipe, ["a red cat"], name, image=[other]), first)
    assert len(images) == 2


def test_what_is_encoded_for_now_is_forgotten(tmp_path):
    for folder, kept in ((None, 3), (tmp_path, 2)):
        pipe = build("QwenImage")
        texts = counted(pipe, "encode_prompt")
        EncodeOnce(pipe, EncodingStore(folder))
        sample(pipe, ["a cat"], "QwenImage")
        with forgotten_encodings(pipe):
            sample(pipe, ["a dog"], "QwenImage")
            sample(pipe, ["a dog"], "QwenImage")
        sample(pipe, ["a cat"], "QwenImage")
        sample(pipe, ["a dog"], "QwenImage")
        assert len(texts) == kept


def test_many_lengths_in_a_batch_need_only_singles_once_padding_is_known():
    pipe = build("QwenImage")
    texts = counted(pipe, "encode_prompt")
    EncodeOnce(pipe)
    prompts = ["a", "a cat", "a cat on a mat", "a cat on a mat in a house"]
    both = sample(pipe, prompts, "QwenImage")
    assert len(texts) == len(prompts) + 2  # one prompt twice; the shortest with the longest
    again = sample(pipe, prompts[::-1], "QwenImage")
    assert len(texts) <= len(prompts) + 4
    assert again.shape == both.shape


def test_unknown_padding_is_refused_not_guessed():
    pipe = build("QwenImage")
    original = pipe.encode_prompt

    def padded_by_content(prompt, *args, **kwargs):
        embeds, mask = original(prompt, *args, **kwargs)
        if mask is not None:  # what fills a short prompt is not constant
            embeds = embeds + torch.randn(embeds.shape, generator=torch.Generator().manual_seed(0))
        return embeds, mask

    padded_by_content.__name__ = "encode_prompt"
    padded_by_content.__signature__ = inspect.signature(original)
    pipe.encode_prompt = padded_by_content
    EncodeOnce(pipe)
    with pytest.raises(EncodingCollateError, match=r"set model\.rollout_batch_size: 1"):
        sample(pipe, ["a", "a cat on a mat"], "QwenImage")


def test_a_batch_of_images_is_encoded_like_single_ones():
    pipe = build("StableDiffusion")
    pixels = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    single = [pipe.vae.encode(part).latent_dist.mode() for part in pixels.split(1)]
    images = counted(pipe.vae, "encode")
    EncodeOnce(pipe)
    both = pipe.vae.encode(pixels).latent_dist.mode()
    assert torch.equal(both, torch.cat(single))
    assert torch.equal(pipe.vae.encode(pixels.flip(0)).latent_dist.mode(), both.flip(0))
    assert len(images) == 3


def test_fingerprints_tell_content_apart():
    tensor = torch.zeros(2, 3)
    contents = [tensor, tensor.half(), tensor.view(3, 2), tensor + 1, "a", ["a"], ["a", "b"]]
    contents += [["ab"], None, 1, True, 1.0, {"a": 1}, (("a", 1),)]
    assert len({fingerprint(content) for content in contents}) == len(contents)
    with pytest.raises(TypeError, match="cannot compute a digest of a Generator"):
        fingerprint({"generator": torch.Generator()})
