"""tiny-words: what its teacher draws, and that `Legibility` reads it."""

from pathlib import Path

import pytest
import torch

from lit_distill import Legibility, load_pipeline
from lit_distill.errors import InputError
from lit_distill.evaluation.feature_extractors import load_features
from lit_distill.pipelines.loading import pipeline_source


def prompts_of(name):
    path = Path(pipeline_source("tiny-words")) / f"prompts_{name}.txt"
    return path.read_text(encoding="utf-8").splitlines()


PROMPTS = prompts_of("heldout")[:16]


def draw(steps, cfg):
    pipe = load_pipeline("tiny-words")
    pipe.set_progress_bar_config(disable=True)
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(PROMPTS))]
    return pipe(
        PROMPTS,
        negative_prompt=[" "] * len(PROMPTS) if cfg > 1 else None,
        true_cfg_scale=cfg,
        height=32,
        width=64,
        num_inference_steps=steps,
        generator=generators,
        output_type="pt",
    ).images


@pytest.fixture(scope="module")
def taught():
    return draw(50, 3.0)


def legibility(images, prompts, **options):
    metric = Legibility(**options)
    metric.update(images, prompts)
    return metric.compute().item()


def test_the_teacher_writes_words_that_four_unguided_steps_do_not(taught):
    assert taught.shape == (16, 3, 32, 64)
    assert legibility(taught, PROMPTS) >= 0.9
    assert legibility(draw(4, 1.0), PROMPTS) <= 0.75


def test_letters_and_words_are_counted(taught):
    truth = [prompt.split(" ")[0].split("-") for prompt in PROMPTS]
    right = legibility(taught, PROMPTS)
    first, *rest = PROMPTS[0].split(" ")
    # One letter of sixteen words is another than the one drawn.
    changed = "-".join(["A" if truth[0][0] != "A" else "B", *truth[0][1:]])
    wrong = [" ".join([changed, *rest]), *PROMPTS[1:]]
    assert first != changed
    assert legibility(taught, wrong) == pytest.approx(right - 1 / 64, abs=1e-6)
    words = legibility(taught, PROMPTS, whole_words=True)
    assert words <= right
    assert legibility(taught, wrong, whole_words=True) == pytest.approx(words - 1 / 16, abs=1e-6)


def test_features_are_those_of_the_reader(taught):
    network = load_features("tiny-words")
    assert network(taught).shape == (16, network.num_features)
    # A letter's features come from its own quarter, but for what the kernels see across the edge.
    halved = taught.clone()
    halved[..., 32:] = 0.5
    features, changed = (network(images).unflatten(1, (4, 64)) for images in (taught, halved))
    assert torch.equal(features[:, 0], changed[:, 0])
    assert not torch.equal(features[:, 3], changed[:, 3])


@pytest.mark.parametrize(
    "prompt", ["a red seven", "T-R-E in red", "T-R-E-E-S in red", "T-R-E-Q", "t-r-e-e", ""]
)
def test_a_prompt_that_spells_no_word_is_named(prompt):
    with pytest.raises(InputError, match="Legibility reads what tiny-words draws, but the prompt"):
        Legibility().update(torch.zeros(1, 3, 32, 64), [prompt])


def test_no_held_out_word_is_in_the_training_prompts():
    words = [{prompt.split(" ")[0] for prompt in prompts_of(n)} for n in ("train", "heldout")]
    assert len(words[0]) > 1_000
    assert len(words[1]) > 250
    assert not words[0] & words[1]
