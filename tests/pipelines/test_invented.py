"""A pipeline that nobody has heard of."""

import inspect

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, FlowMatchEulerDiscreteScheduler, ModelMixin
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils.torch_utils import randn_tensor

import lit_distill.adapters.weights
from lit_distill import DirectDistill, DistillDataModule
from lit_distill.preflight.checks import preflight
from lit_distill.preflight.report import PreflightError
from lit_distill.teacher.generate import generate_pairs
from lit_distill.teacher.prompts import Prompt, plan_pairs
from lit_distill.teacher.teacher import Teacher

PROMPTS = ["a red cat", "two dogs that run on a long green field"]


class Painter(ModelMixin, ConfigMixin):
    """A denoiser that knows neither transformers' blocks nor their names."""

    @register_to_config
    def __init__(self, width: int = 16, words: int = 8):
        super().__init__()
        self.read = torch.nn.Linear(words, width)
        self.look = torch.nn.Linear(4, width)
        self.paint = torch.nn.ModuleList(
            torch.nn.Sequential(torch.nn.Linear(width, width)) for _ in "ab"
        )
        self.show = torch.nn.Linear(width, 4)

    def forward(self, strokes, noise_level, words):
        hidden = self.look(strokes) + self.read(words).unsqueeze(1) + noise_level.view(-1, 1, 1)
        for layer in self.paint:
            hidden = hidden + layer(hidden.tanh())
        return self.show(hidden)


class InventedPipeline(DiffusionPipeline):
    """Packs latents channels-last in reversed order, embeds texts by itself, guides by doubling."""

    def __init__(self, painter, vae, scheduler):
        super().__init__()
        self.register_modules(painter=painter, vae=vae, scheduler=scheduler)

    def words(self, prompt):
        counts = [[text.count(letter) for letter in "aeiouxyz"] for text in prompt]
        return torch.tensor(counts, device=self.device, dtype=self.painter.dtype)

    @torch.no_grad()
    def __call__(
        self,
        prompt,
        height=16,
        width=16,
        num_inference_steps=30,
        guidance_scale=3.0,
        generator=None,
        output_type="pil",
        return_dict=True,
    ):
        texts = [prompt] if isinstance(prompt, str) else prompt
        self.scheduler.set_timesteps(num_inference_steps, device=self.device)
        shape = (len(texts), height * width // 4, 4)
        strokes = randn_tensor(shape, generator=generator, device=self.device)
        for t in self.progress_bar(self.scheduler.timesteps):
            level = (t / 1000).expand(len(texts))
            velocity = self.painter(strokes, level, self.words(texts))
            if guidance_scale > 1:
                blind = self.painter(strokes, level, self.words([""] * len(texts)))
                velocity = blind + guidance_scale * (velocity - blind)
            strokes = self.scheduler.step(velocity, t, strokes, return_dict=False)[0]
        if output_type == "latent":
            return (strokes,)
        z = strokes.flip(1).transpose(1, 2).reshape(len(texts), 4, height // 2, width // 2)
        pictures = self.vae.decode(z * 3 - 0.5, return_dict=False)[0]
        pictures = (pictures / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)
        if output_type == "pil":
            pictures = self.numpy_to_pil(pictures.float().cpu().numpy())
        return ImagePipelineOutput(pictures) if return_dict else (pictures,)


def invented():
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        norm_num_groups=2,
        latent_channels=4,
    )
    pipe = InventedPipeline(Painter(), vae.eval(), FlowMatchEulerDiscreteScheduler())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_invented_pipeline_trains_unchanged(tmp_path, monkeypatch):
    monkeypatch.setattr(
        lit_distill.adapters.weights, "load_pipeline", lambda source, **options: invented()
    )
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False}
    teacher = Teacher("invented", torch_dtype="float32", cfg_scale=3.0, num_inference_steps=20)
    pairs = plan_pairs([Prompt(text, {}) for text in PROMPTS], 8)
    metadata = generate_pairs(pl.Trainer(**quiet), teacher, pairs, tmp_path)
    assert len(pd.read_csv(metadata)) == 16
    model = DirectDistill(
        "invented",
        torch_dtype="float32",
        checkpointing="block",  # which this denoiser does not have: preflight takes another
        optimizer=lambda params: torch.optim.Adam(params, lr=3e-3),
    )
    data = DistillDataModule(str(metadata), str(metadata), batch_size=8, repeat=20)
    trainer = pl.Trainer(max_epochs=1, use_distributed_sampler=False, **quiet)
    trainer.fit(model, datamodule=data)
    assert model.hparams["checkpointing"] == "step"
    assert trainer.callback_metrics["val_gap_closed"] > 0.3


def test_an_unknown_pipeline_whose_other_guidance_stays_on_is_named():
    class Stubborn(InventedPipeline):
        @torch.no_grad()
        def __call__(self, *args, guidance_scale=1.0, **kwargs):
            original = inspect.unwrap(InventedPipeline.__call__)
            return original(self, *args, guidance_scale=guidance_scale + 2, **kwargs)

    pipe = invented()
    pipe.__class__ = Stubborn
    report = preflight(pipe, prompt=PROMPTS[0], num_inference_steps=3)
    with pytest.raises(PreflightError, match="one denoiser call a step: 6 calls in 3 steps"):
        report.raise_failures()


def test_a_call_within_a_call_that_switches_gradients_off_is_found():
    class Derived(InventedPipeline):
        def __call__(self, *args, guidance_scale=1.0, **kwargs):
            return super().__call__(*args, guidance_scale=guidance_scale, **kwargs)

    pipe = invented()
    pipe.__class__ = Derived
    report = preflight(pipe, prompt=PROMPTS[0], num_inference_steps=3)
    with pytest.raises(PreflightError, match="every trained parameter gets a gradient: none does"):
        report.raise_failures()
