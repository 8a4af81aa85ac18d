import pytest
import torch
from tiny_pipelines import CALL_KWARGS, build

from lit_distill import LatentCodec, load_pipeline
from lit_distill.pipelines.rollout import sample

IMAGES = ["QwenImage", "Flux", "StableDiffusion3", "StableDiffusionXL", "StableDiffusion"]
IMAGES += ["Flux2", "Sana", "PixArtSigma", "Lumina2", "Chroma", "CogView4"]


@pytest.mark.parametrize("name", IMAGES)
def test_decode_is_the_pipelines_own_decoding(name):
    pipe = build(name)
    codec = LatentCodec(pipe, **CALL_KWARGS[name])
    arguments = {"prompt": ["a red cat"], "num_inference_steps": 2, **CALL_KWARGS[name]}
    latents, images = sample(pipe, **arguments, generator=[torch.Generator().manual_seed(0)])
    with torch.no_grad():
        decoded = codec.decode(latents)[0].permute(1, 2, 0)
    expected = torch.tensor(list(images[0].tobytes())).view(decoded.shape) / 255
    assert (decoded - expected).abs().max() <= 0.5 / 255 + 1e-4


def test_encode_equals_the_familys_own_encoder():
    pipe = load_pipeline("tiny-digits")
    images = torch.rand(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        z = pipe.vae.encode((images * 2 - 1).unsqueeze(2)).latent_dist.mode()
        mean = torch.tensor(pipe.vae.config.latents_mean).view(1, -1, 1, 1, 1)
        std = torch.tensor(pipe.vae.config.latents_std).view(1, -1, 1, 1, 1)
        expected = pipe._pack_latents((z - mean) / std, 2, 4, 8, 12)
    found = LatentCodec(pipe, height=32, width=48).encode(images)
    assert (found - expected).abs().max() <= 1e-6


def test_a_tail_that_is_no_permutation_is_refused():
    pipe = load_pipeline("tiny-digits")
    unpack = type(pipe)._unpack_latents
    pipe._unpack_latents = lambda *args: unpack(*args).tanh()
    with pytest.raises(ValueError, match="not a permutation and an affine map"):
        LatentCodec(pipe, height=32, width=32)


def test_images_of_another_size_are_refused():
    codec = LatentCodec(load_pipeline("tiny-digits"), height=32, width=32)
    with pytest.raises(ValueError, match=r"of 40x32 pixels .* images that encode to"):
        codec.encode(torch.rand(1, 3, 40, 32))


@pytest.mark.parametrize(("height", "width"), [(33, 33), (36, 36), (32, 36)])
def test_a_size_that_the_pipeline_would_round_is_refused(height, width):
    """An image of 33 pixels has as many latents as one of 32, so shapes alone don't tell."""
    with pytest.raises(ValueError, match=rf"can't generate {height}x{width} pixels"):
        LatentCodec(load_pipeline("tiny-digits"), height=height, width=width)
