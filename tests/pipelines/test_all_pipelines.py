"""Faults that a sweep over diffusers' own pipelines found: schedulers, guidance, sizes, tails."""

import contextlib
import copy
import inspect
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec

import diffusers as df
import pytest
import torch
from tiny_pipelines import CALL_KWARGS, build
from torch import nn

from lit_distill import rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.pipelines.components import copy_scheduler, denoisers, override_scheduler_config
from lit_distill.pipelines.guidance import (
    describe_guidance,
    family_of,
    guidance,
    scale_is_an_input,
)
from lit_distill.pipelines.hooks import counted_batches, observed_scheduler
from lit_distill.pipelines.loading import load_pipeline, pipeline_source
from lit_distill.pipelines.rollout import run_pipeline, sample
from lit_distill.preflight.checks import preflight

PROMPTS = ["a red cat", "two dogs that run on a long green field"]


def generators(n=1):
    return [torch.Generator().manual_seed(i) for i in range(n)]


def call(name, prompts=PROMPTS[:1], steps=3):
    return {"prompt": list(prompts), "num_inference_steps": steps, **CALL_KWARGS[name]}


def rollout_and_pipe(pipe, name, **given):
    """What the rollout and the plain pipe() end in."""
    arguments = call(name) | given
    with torch.no_grad(), guidance(pipe, 1.0, 1, arguments) as off:
        expected = pipe(**arguments, **off, generator=generators(), output_type="latent")[0]
        return rollout(pipe, **arguments, generator=generators()), expected


# Schedulers ---------------------------------------------------------------------------------------


def with_scheduler(kind, **config):
    parts = build("StableDiffusion").components
    return df.StableDiffusionPipeline(
        **parts | {"scheduler": kind(**config)}, requires_safety_checker=False
    )


NOISE = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        # The constructor sets steps_offset 1, and clip_sample false, in the configuration.
        (df.PNDMScheduler, {"skip_prk_steps": True}),
        (df.PNDMScheduler, {"skip_prk_steps": True, "steps_offset": 0}),
        (df.DDIMScheduler, {}),
        (df.DDIMScheduler, {"steps_offset": 0, "clip_sample": True}),
        (df.DDPMScheduler, {}),
    ],
)
def test_values_that_the_pipeline_puts_into_its_scheduler_are_kept(kind, config):
    pipe = with_scheduler(kind, **NOISE, **config)
    pipe.set_progress_bar_config(disable=True)
    latents, expected = rollout_and_pipe(pipe, "StableDiffusion")
    assert torch.equal(latents, expected)


def test_values_that_the_user_puts_into_the_scheduler_are_kept():
    pipe = build("StableDiffusion3")
    pipe.scheduler.set_shift(7.0)  # not part of the configuration
    latents, expected = rollout_and_pipe(pipe, "StableDiffusion3")
    assert torch.equal(latents, expected)
    pipe.scheduler = df.FlowMatchEulerDiscreteScheduler()
    pipe.scheduler.register_to_config(invert_sigmas=True)
    latents, expected = rollout_and_pipe(pipe, "StableDiffusion3")
    assert torch.equal(latents, expected)
    assert not torch.equal(
        latents, rollout_and_pipe(build("StableDiffusion3"), "StableDiffusion3")[0]
    )


def test_fields_of_model_scheduler_override_values_that_were_left_at_their_default():
    pipe = with_scheduler(df.DDIMScheduler, **NOISE)
    changed = override_scheduler_config(pipe, {"timestep_spacing": "trailing"})
    assert changed.config.timestep_spacing == "trailing"
    assert changed.config.steps_offset == pipe.scheduler.config.steps_offset == 1
    assert changed.config.clip_sample is pipe.scheduler.config.clip_sample is False
    assert override_scheduler_config(pipe, None).config == pipe.scheduler.config


def loop(scheduler):
    """A few steps with a graph; schedulers keep some of its tensors."""
    given, dynamic = {}, scheduler.config.get("use_dynamic_shifting")
    if "generator" in inspect.signature(scheduler.step).parameters:
        given["generator"] = torch.Generator().manual_seed(0)
    if isinstance(scheduler, df.SCMScheduler):
        scheduler.set_timesteps(4, intermediate_timesteps=None)
    else:
        scheduler.set_timesteps(4, **({"mu": 0.5} if dynamic else {}))
    torch.manual_seed(0)
    latents, weight = torch.randn(1, 4, 8, 8), torch.tensor(0.3, requires_grad=True)
    for t in scheduler.timesteps[:4]:
        scale = getattr(scheduler, "scale_model_input", lambda sample, t: sample)
        latents = scheduler.step(scale(latents, t) * weight, t, latents, **given)[0]
    return latents


SCHEDULERS = [
    "CMStochasticIterative",
    "CogVideoXDDIM",
    "DDIM",
    "DDPM",
    "DEISMultistep",
    "DPMSolverMultistep",
    "DPMSolverSinglestep",
    "EDMDPMSolverMultistep",
    "EDMEuler",
    "EulerAncestralDiscrete",
    "EulerDiscrete",
    "FlowMatchEulerDiscrete",
    "FlowMatchHeunDiscrete",
    "FlowMatchLCM",
    "HeunDiscrete",
    "IPNDM",
    "KDPM2AncestralDiscrete",
    "KDPM2Discrete",
    "LCM",
    "LMSDiscrete",
    "PNDM",
    "SASolver",
    "SCM",
    "TCD",
    "UnCLIP",
    "UniPCMultistep",
]


@pytest.mark.parametrize("name", SCHEDULERS)
def test_a_copy_of_a_scheduler_starts_afresh_and_is_independent(name):
    scheduler = getattr(df, f"{name}Scheduler")()
    expected = loop(scheduler)  # keeps graph tensors now
    again = copy_scheduler(scheduler)
    assert again.config == scheduler.config
    tensors = [v for v in vars(again).values() if isinstance(v, torch.Tensor)]
    assert not any(tensor.requires_grad for tensor in tensors)
    assert torch.equal(loop(again), expected)
    state = {k: copy.copy(v) for k, v in vars(scheduler).items() if isinstance(v, int | list)}
    loop(copy_scheduler(scheduler))
    assert all(str(vars(scheduler)[key]) == str(value) for key, value in state.items())


def test_a_copy_that_the_pipeline_makes_of_its_scheduler_steps_by_itself():
    """LTX2 has one for the sound of its videos."""
    pipe = build("StableDiffusion3")
    with observed_scheduler(pipe) as steps:
        other = copy.deepcopy(pipe.scheduler)
        pipe.scheduler.set_timesteps(3)
        other.set_timesteps(5)
        other.step(torch.zeros(1, 2), other.timesteps[0], torch.zeros(1, 2))
        assert steps.done == 0
        assert (pipe.scheduler.step_index, other.step_index) == (None, 1)
        parameters = inspect.signature(pipe.scheduler.step).parameters
        assert list(parameters) == list(inspect.signature(other.step).parameters)
        assert "generator" in parameters
        assert "self" not in parameters


# Guidance -----------------------------------------------------------------------------------------

EMBEDDED = ["Flux2", "LatentConsistencyModel", "SanaSprint"]


@pytest.mark.parametrize("name", EMBEDDED)
def test_a_scale_that_is_an_input_of_the_network_is_no_guidance(name):
    pipe = build(name)
    assert scale_is_an_input(pipe)
    default = inspect.signature(inspect.unwrap(type(pipe).__call__)).parameters["guidance_scale"]
    off = rollout(pipe, **call(name), generator=generators())
    same = rollout(pipe, **call(name), generator=generators(), guidance_scale=default.default)
    other = rollout(pipe, **call(name), generator=generators(), guidance_scale=default.default + 2)
    assert torch.equal(off, same)
    assert not torch.equal(off, other)
    plain = pipe(**call(name), generator=generators(), output_type="latent")[0]
    assert torch.equal(run_pipeline_output(pipe, name), plain)
    with pytest.raises(ValueError, match="is an input of the network; set it in call_kwargs"):
        rollout(pipe, **call(name), generator=generators(), cfg_scale=2.0)
    assert "guidance_scale is an input of the network" in describe_guidance(pipe)


@torch.no_grad()
def run_pipeline_output(pipe, name):
    given = call(name) | {"generator": generators()}
    return run_pipeline(pipe, **given, cfg_scale=1.0, output_type="latent")[1]


def test_the_kind_of_guidance_is_told_by_the_pipeline_not_its_name():
    """A UNet of Stable Diffusion that was distilled like LCM; FLUX's with and without both."""
    assert describe_guidance(build("StableDiffusion")) == "cfg_scale sets guidance_scale"
    parts = build("LatentConsistencyModel").components
    parts["scheduler"] = build("StableDiffusion").scheduler
    pipe = df.StableDiffusionPipeline(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    assert scale_is_an_input(pipe)
    name = "StableDiffusion"
    low, high = (
        rollout(pipe, **call(name), generator=generators(), guidance_scale=scale)
        for scale in (1.5, 9.0)
    )
    assert not torch.equal(low, high)
    assert describe_guidance(build("Flux")) == (
        "cfg_scale sets true_cfg_scale; "
        "guidance_scale is an input of the network, 3.5 unless in call_kwargs"
    )
    assert describe_guidance(build("Flux2Klein")) == "cfg_scale sets guidance_scale"
    parts = build("Flux").components
    del parts["image_encoder"], parts["feature_extractor"]
    transformer = df.FluxTransformer2DModel.from_config(
        dict(parts["transformer"].config) | {"guidance_embeds": False, "in_channels": 36}
    )
    fill = df.FluxFillPipeline(**parts | {"transformer": transformer})
    assert describe_guidance(fill).startswith("there is no classifier-free guidance")
    assert "cfg_scale sets the pipeline's guider" in describe_guidance(build("HunyuanImage"))


@pytest.mark.parametrize("name", ["QwenImage", "LatentConsistencyModel"])
def test_preflight_reports_the_kind_of_guidance(name):
    pipe = build(name)
    make_trainable(pipe, None)
    report = preflight(pipe, **call(name) | {"prompt": PROMPTS[1]})
    report.raise_failures()
    assert report.findings[-1].check == "the kind of guidance"
    assert report.findings[-1].observed == describe_guidance(pipe)


def perturbed_attention():
    parts = build("StableDiffusion3").components
    del parts["image_encoder"], parts["feature_extractor"]
    pipe = df.StableDiffusion3PAGPipeline(**parts, pag_applied_layers=["blocks.1"])
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_scale_1_switches_other_kinds_of_guidance_off_and_preflight_counts_samples():
    pipe, name = perturbed_attention(), "StableDiffusion3"
    with counted_batches(pipe) as batches:
        rollout(pipe, **call(name, PROMPTS), generator=generators(2))
        assert batches == [2, 2, 2]
        rollout(pipe, **call(name, PROMPTS), generator=generators(2), pag_scale=2.0)
        assert batches[3:] == [4, 4, 4]
        rollout(pipe, **call(name, PROMPTS), generator=generators(2), cfg_scale=2.0)
        assert batches[6:] == [6, 6, 6]
    make_trainable(pipe, None)
    report = preflight(pipe, **call(name) | {"prompt": PROMPTS[1], "pag_scale": 2.0})
    finding = next(f for f in report.findings if "one denoiser call" in f.check)
    assert finding.verdict == "failed"
    assert finding.observed == "3 calls in 3 steps, each for 2 samples instead of one"


# Steps and tails ----------------------------------------------------------------------------------


class Kandinsky(df.StableDiffusionPipeline):
    """Refuses to return latents once it is done, and turns its images into arrays."""

    @torch.no_grad()
    def __call__(self, prompt, guidance_scale=4.0, output_type="pil", **given):
        call = inspect.unwrap(df.StableDiffusionPipeline.__call__)
        given |= {"guidance_scale": guidance_scale, "output_type": "latent"}
        latents = call(self, prompt, **given)[0]
        if output_type == "latent":
            raise ValueError("only pil and np are supported")
        images = self.vae.decode(latents / self.vae.config.scaling_factor).sample
        images = (images / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1).numpy()
        return (images if output_type == "np" else self.numpy_to_pil(images),)


def test_a_pipeline_without_latents_to_return_is_trained_and_checked():
    pipe = Kandinsky(**build("StableDiffusion").components, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    make_trainable(pipe, None)
    name = "StableDiffusion"
    latents = rollout(pipe, **call(name), generator=generators())
    assert latents.requires_grad
    assert torch.equal(latents, rollout(build(name), **call(name), generator=generators()))
    report = preflight(pipe, **call(name) | {"prompt": PROMPTS[1]})
    report.raise_failures()
    assert report.findings[0].observed == "equal bit for bit"
    assert len(sample(pipe, **call(name), generator=generators())[1]) == 1


def test_an_error_before_the_last_step_is_not_ignored():
    pipe = build("StableDiffusion")
    with pytest.raises(RuntimeError, match="in the middle"), second_call_fails(pipe):
        rollout(pipe, **call("StableDiffusion"), generator=generators())


@contextlib.contextmanager
def second_call_fails(pipe):
    calls = []

    def fail(module, args, kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("in the middle")

    (denoiser,) = denoisers(pipe).values()
    with denoiser.register_forward_pre_hook(fail, with_kwargs=True):
        yield


def test_steps_of_a_pipeline_that_starts_from_an_image_are_counted():
    """Half of the schedule is skipped: the last two of four steps are the first it makes."""
    from PIL import Image

    parts = build("StableDiffusion3").components
    del parts["image_encoder"], parts["feature_extractor"]
    pipe = df.StableDiffusion3Img2ImgPipeline(**parts)
    pipe.set_progress_bar_config(disable=True)
    make_trainable(pipe, None)
    given = {"image": Image.new("RGB", (16, 16), "red"), "strength": 0.5, "prompt": PROMPTS[:1]}
    seen = []

    def note(steps, latents):
        seen.append((steps.done, steps.total, latents.requires_grad))
        return latents

    run_pipeline(
        pipe,
        num_inference_steps=4,
        generator=generators(),
        cfg_scale=1.0,
        output_type="latent",
        grad_steps=2,
        on_step=note,
        max_sequence_length=32,
        **given,
    )
    assert seen == [(0, 2, True), (1, 2, True)]


def test_the_step_that_sana_sprint_leaves_out_is_not_counted():
    """Its schedule ends with a level that no step starts from."""
    pipe = build("SanaSprint")
    make_trainable(pipe, None)
    given = call("SanaSprint") | {"generator": generators()}
    assert rollout(pipe, **given, grad_steps=1).requires_grad
    steps, _ = run_pipeline(pipe, **given, cfg_scale=1.0, output_type="latent")
    assert (steps.done, steps.total) == (3, 3)


def test_a_step_that_is_made_again_is_counted_once():
    """Cosmos asks its scheduler for the denoised prediction first, and goes a step back."""
    pipe = build("StableDiffusion3")
    seen = []
    with observed_scheduler(pipe, lambda steps, x: seen.append(steps.done) or x) as steps:
        pipe.scheduler.set_timesteps(3)
        for t in pipe.scheduler.timesteps:
            pipe.scheduler.step(torch.zeros(1, 2), t, torch.zeros(1, 2))
            pipe.scheduler._step_index -= 1
            pipe.scheduler.step(torch.zeros(1, 2), t, torch.ones(1, 2))
        assert (steps.done, steps.total) == (3, 3)
    assert seen == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize(
    ("name", "scale"),
    [
        ("Kandinsky3Pipeline", 3.0),
        ("Cosmos2TextToImagePipeline", 3.0),
        ("Cosmos3OmniPipeline", 4.0),
        ("ZImagePipeline", 3.0),
        ("Flux2KleinPipeline", 4.0),
    ],
)
def test_families_that_add_the_difference_to_the_prompts_own_prediction(name, scale):
    family = family_of(type(name, (), {})())
    assert family.scale(4.0) == scale
    if name.startswith(("Kandinsky3", "Cosmos2")):  # they leave guidance off up to 1 on their scale
        assert family.scale(1.0) == 0.0
        with pytest.raises(ValueError, match=r"has no guidance with a cfg_scale up to 2, got 1\.5"):
            family.scale(1.5)


# Loading ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("saved", ["copied", "saved by diffusers"])
def test_a_copy_of_tiny_digits_generates_its_size(saved, tmp_path):
    if saved == "copied":
        shutil.copytree(pipeline_source("tiny-digits"), tmp_path / "copy")
    else:
        load_pipeline("tiny-digits").save_pretrained(tmp_path / "copy")
    pipe = load_pipeline(tmp_path / "copy")
    pipe.set_progress_bar_config(disable=True)
    image = pipe(prompt="a red handwritten seven", num_inference_steps=2).images[0]
    assert image.size == (32, 32)


WITHOUT = """
import importlib.util, sys
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *a: None if name == "sentencepiece" else find(name, *a)
sys.modules["sentencepiece"] = None
from lit_distill.pipelines.loading import load_pipeline
try:
    load_pipeline(sys.argv[1])
except ImportError as error:
    print("ImportError:", error)
"""


@pytest.mark.parametrize("kind", ["class", "tokenizer"])
def test_a_missing_sentencepiece_is_named(kind, tmp_path):
    index = {
        "class": '{"_class_name": "KolorsPipeline", "tokenizer": ["kolors", "ChatGLMTokenizer"]}',
        "tokenizer": '{"_class_name": "AuraFlowPipeline",'
        ' "tokenizer": ["transformers", "LlamaTokenizer"]}',
    }
    (tmp_path / "model_index.json").write_text(index[kind])
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.model").write_bytes(b"a SentencePiece model")
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)],
        capture_output=True,
        text=True,
        env=dict(os.environ),
        check=False,
    )
    expected = (
        f"ImportError: {tmp_path} needs sentencepiece, which is not installed; "
        "pip install 'lit-distill[tokenizers]'"
    )
    assert expected in done.stdout, done.stderr


def test_other_errors_of_loading_stay_what_they_are(tmp_path):
    with pytest.raises(OSError, match=r"model_index\.json"):
        load_pipeline(tmp_path)


@pytest.mark.skipif(find_spec("sentencepiece") is None, reason="needs lit-distill[tokenizers]")
@pytest.mark.parametrize("cfg_scale", [1.0, 3.0])
def test_kolors(cfg_scale):
    from tiny_pipelines_embedded import Kolors

    pipe = Kolors()
    pipe.set_progress_bar_config(disable=True)
    given = {"prompt": PROMPTS[:1], "num_inference_steps": 3, "height": 16, "width": 16}
    given["max_sequence_length"] = 32
    for component in pipe.components.values():
        if isinstance(component, nn.Module):
            component.requires_grad_(False).eval()
    make_trainable(pipe, None)
    latents = rollout(pipe, **given, generator=generators(), cfg_scale=cfg_scale)
    with guidance(pipe, cfg_scale, 1, given) as more:
        expected = pipe(**given, **more, generator=generators(), output_type="latent")[0]
    assert latents.requires_grad
    assert torch.equal(latents, expected)
