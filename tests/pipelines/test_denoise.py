"""The clean latents that every family predicts at a noise level are those of its scheduler."""

import functools
from types import MethodType

import diffusers
import pytest
import torch
from test_families import ALL, call, generators, scales
from tiny_pipelines import build

from lit_distill.pipelines.components import copy_scheduler, denoisers, replaced_components
from lit_distill.pipelines.denoise import denoise
from lit_distill.pipelines.hooks import counted_batches
from lit_distill.pipelines.noise_levels import NoiseLevels
from lit_distill.pipelines.rollout import rollout

REFUSED = {
    "CogView4": "CogView4Pipeline gives its denoiser other timesteps",
    "SanaSprint": "SCMScheduler: the noise levels of this scheduler are not known",
}
"""Families whose predictions can't be read, and a part of the error."""


def implied(pipe, index, scale, name):
    """Noise level, latents and the scheduler's own x0 of a step of the pipeline's sampling."""
    scheduler = copy_scheduler(pipe.scheduler)
    original, found, count = type(scheduler).step, {}, [0]

    @functools.wraps(original)
    def step(self, output, timestep, sample, *args, **kwargs):
        here = count[0] == index
        sigmas = getattr(self, "sigmas", None)
        low, position = None, getattr(self, "step_index", None)
        if here and sigmas is not None:
            found["sigma"], low = sigmas[position].item(), sigmas[position + 1].item()
        if here and hasattr(self, "convert_model_output"):  # multistep
            found["x0"] = self.convert_model_output(output, sample=sample).clone()
        result = original(self, output, timestep, sample.clone(), *args, **kwargs)
        if here:
            found.update(timestep=float(timestep), latents=sample.clone())
            if low is not None:  # Euler: the same step, but down to zero noise
                end = 1.0 if self.config.get("invert_sigmas") else 0.0
                slope = (result[0] - sample) / (low - found["sigma"])
                found.setdefault("x0", sample + (end - found["sigma"]) * slope)
            else:
                whole = original(self, output, timestep, sample)
                found["x0"] = whole.get("pred_original_sample", whole.get("denoised"))
        count[0] += 1
        return result

    scheduler.__dict__["step"] = MethodType(step, scheduler)
    with replaced_components(pipe, scheduler=scheduler):
        rollout(pipe, **call(name), generator=generators(), cfg_scale=scale)
    return found


def at(pipe, name, scale, step):
    """What `denoise` returns at a step of the pipeline's sampling, and what the step implies."""
    found = implied(pipe, step, scale, name)
    levels = NoiseLevels(pipe.scheduler)
    time = found["timestep"]
    if levels.flow:
        time = found["sigma"] * levels.num_train_timesteps
    given = {key: value for key, value in call(name).items() if key != "num_inference_steps"}
    given |= {"generator": generators(1, 7), "cfg_scale": scale}
    return functools.partial(denoise, pipe, found["latents"], levels.at(time), **given), found["x0"]


@pytest.mark.parametrize("name", ALL)
@torch.no_grad()
def test_the_prediction_is_what_the_scheduler_implies(name):
    pipe = build(name)
    if name == "StableDiffusion":  # PNDM's own step tells no x0
        config = {**pipe.scheduler.config, "clip_sample": False}
        pipe.scheduler = diffusers.DDIMScheduler.from_config(config)
    if name in REFUSED:
        given = {key: value for key, value in call(name).items() if key != "num_inference_steps"}
        with pytest.raises(ValueError, match=REFUSED[name]):
            levels = NoiseLevels(pipe.scheduler)
            denoise(pipe, torch.zeros(1), levels.at(500), generator=generators(), **given)
        return
    for scale in scales(pipe):
        predict, expected = at(pipe, name, scale, 1)
        predict()
        with counted_batches(pipe) as batches:
            found = predict()
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        assert sum(batches) == (1 if scale == 1 else 2)  # only the second step is computed


def test_each_denoiser_of_wan_predicts_at_its_own_levels():
    pipe = build("Wan22")
    levels, seen = NoiseLevels(pipe.scheduler), []
    for key, denoiser in denoisers(pipe).items():
        denoiser.register_forward_pre_hook(lambda *_, key=key: seen.append(key))
    given = {key: value for key, value in call("Wan22").items() if key != "num_inference_steps"}
    latents = rollout(pipe, **call("Wan22"), generator=generators()).detach()
    for share in (0.95, 0.1):
        denoise(pipe, latents, levels.share(share), generator=generators(), **given)
    assert list(dict.fromkeys(seen)) == ["transformer", "transformer_2"]


@pytest.mark.parametrize("checkpointing", ["none", "block", "step", "nested"])
def test_gradient_reaches_latents_and_weights(checkpointing):
    pipe = build("QwenImage")
    pipe.transformer.requires_grad_(True)
    given = {key: value for key, value in call("QwenImage").items() if key != "num_inference_steps"}
    level = NoiseLevels(pipe.scheduler).share(0.6)
    latents = rollout(pipe, **call("QwenImage"), generator=generators()).detach()

    def value(moved, **options):
        x0 = denoise(pipe, moved, level, generator=generators(), **given, **options)
        return (x0 * weights).sum()

    weights, direction = torch.randn(2, *latents.shape, generator=generators()[0])
    latents.requires_grad_(True)
    value(latents, checkpointing=checkpointing).backward()
    weight = pipe.transformer.img_in.weight
    assert weight.grad.any()
    slope = (latents.grad * direction).sum()
    with torch.no_grad():
        step = 1e-3 * direction
        difference = (value(latents + step) - value(latents - step)) / 2e-3
    torch.testing.assert_close(difference, slope, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("scheduler", "options"),
    [
        (diffusers.DDIMScheduler, {"prediction_type": "v_prediction", "clip_sample": False}),
        (diffusers.DDIMScheduler, {"prediction_type": "sample", "clip_sample": False}),
        (diffusers.EulerDiscreteScheduler, {"prediction_type": "v_prediction"}),
        (diffusers.EulerDiscreteScheduler, {"prediction_type": "epsilon"}),
    ],
)
def test_predictions_of_every_type(scheduler, options):
    made = scheduler(**options)
    made.set_timesteps(4)
    output, latents = torch.randn(2, 1, 4, 8, 8, generator=generators()[0])
    level = NoiseLevels(made).at(made.timesteps[1].item())
    if scheduler is diffusers.EulerDiscreteScheduler:
        scaled = made.scale_model_input(latents, made.timesteps[1])
        torch.testing.assert_close(latents / level.scale, scaled)
    expected = made.step(output, made.timesteps[1], latents).pred_original_sample
    torch.testing.assert_close(NoiseLevels(made).predict(output, latents, level), expected)


def test_flow_that_runs_backwards():
    """Mochi's times are shares of signal."""
    made = diffusers.FlowMatchEulerDiscreteScheduler(invert_sigmas=True)
    made.set_timesteps(4)
    output, latents = torch.randn(2, 1, 4, 8, 8, generator=generators()[0])
    level = NoiseLevels(made).at(made.timesteps[2].item())
    assert level.signal == pytest.approx(made.sigmas[2].item())
    end = latents + (1 - made.sigmas[2]) * output
    torch.testing.assert_close(NoiseLevels(made).predict(output, latents, level), end)
    assert NoiseLevels(made).share(0.9).noise == pytest.approx(0.9)


def test_what_can_not_be_read_is_refused():
    pipe = build("QwenImage")
    with pytest.raises(ValueError, match="EDMEulerScheduler: the noise levels"):
        NoiseLevels(diffusers.EDMEulerScheduler())
    given = {key: value for key, value in call("QwenImage").items() if key != "num_inference_steps"}
    latents = torch.zeros(1, 4, 16)  # a quarter of the tokens
    with pytest.raises(Exception, match=r"must match|does more|size of tensor"):
        denoise(
            pipe, latents, NoiseLevels(pipe.scheduler).share(0.5), generator=generators(), **given
        )
