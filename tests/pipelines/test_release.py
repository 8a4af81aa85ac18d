"""A released pipeline's memory is free at once, without the garbage collector."""

import inspect
import weakref

import pytest
import torch
from held_memory import no_garbage_collection
from tiny_pipelines import CALL_KWARGS, build

from lit_distill.adapters.inject import make_trainable
from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.hooks import observed_scheduler
from lit_distill.pipelines.release import break_cycles, forget_tables, release


def used_pipeline(name):
    """A pipeline as this package uses it: encodings kept, a LoRA on it, called."""
    pipe = build(name)
    EncodeOnce(pipe)
    make_trainable(pipe, {"r": 2})
    pipe(prompt="a cat", num_inference_steps=1, output_type="latent", **CALL_KWARGS[name])
    return pipe


def weights_of(pipe):
    modules = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module)]
    return [weakref.ref(parameter) for module in modules for parameter in module.parameters()]


def alive(weights):
    return sum(reference() is not None for reference in weights)


@pytest.mark.parametrize("name", ["QwenImage", "Flux", "StableDiffusionXL"])
def test_a_released_pipeline_is_free(name):
    with no_garbage_collection():
        pipe = used_pipeline(name)
        weights = weights_of(pipe)
        assert alive(weights) == len(weights)
        release(pipe)
        assert alive(weights) == 0


def test_without_release_weights_stay():
    """The reason for `release`: it goes when diffusers has no more cycles."""
    with no_garbage_collection():
        pipe = used_pipeline("QwenImage")
        weights = weights_of(pipe)
        del pipe
        assert alive(weights) == len(weights)


def test_a_network_without_cycles_is_free():
    with no_garbage_collection():
        pipe = used_pipeline("QwenImage")
        (denoiser,) = denoisers(pipe).values()
        weights = [weakref.ref(parameter) for parameter in denoiser.parameters()]
        pipe.register_modules(transformer=None)
        break_cycles(denoiser)
        del denoiser
        assert alive(weights) == 0


def test_the_scheduler_of_a_rollout_is_free_when_it_ends():
    pipe = build("Wan")  # its multistep scheduler keeps latents
    with no_garbage_collection():
        with observed_scheduler(pipe):
            scheduler = weakref.ref(pipe.scheduler)
        assert scheduler() is None


def test_tables_of_positions_are_forgotten():
    pipe = build("QwenImage")
    tables = inspect.getclosurevars(type(pipe.transformer.pos_embed)._compute_video_freqs)
    cached = tables.nonlocals["cached"]
    pipe("a cat", num_inference_steps=1, output_type="latent", **CALL_KWARGS["QwenImage"])
    assert cached.cache_info().currsize
    forget_tables(pipe.transformer)
    assert not cached.cache_info().currsize
