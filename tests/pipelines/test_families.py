"""What holds for every family of pipelines, and for one that nobody has heard of."""

import contextlib

import lightning.pytorch as pl
import numpy as np
import pandas as pd
import pytest
import torch
from families_expected import FOUND
from PIL import Image
from tiny_pipelines import CALL_KWARGS, FAMILIES, build

import lit_distill.adapters.weights
from lit_distill import DirectDistill, DistillDataModule, LatentCodec, rollout
from lit_distill.adapters.inject import adapters_disabled, make_trainable
from lit_distill.data.images import Picture
from lit_distill.encoding.collate import EncodingCollateError
from lit_distill.encoding.encode_once import EncodeOnce
from lit_distill.encoding.store import EncodingStore
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import describe_guidance, family_of, guidance
from lit_distill.pipelines.hooks import counted_batches
from lit_distill.pipelines.rollout import sample
from lit_distill.preflight.checks import preflight
from lit_distill.teacher.generate import generate_pairs
from lit_distill.teacher.prompts import Prompt, plan_pairs
from lit_distill.teacher.teacher import Teacher

ALL = sorted(FAMILIES)
PROMPTS = ["a red cat", "two dogs that run on a long green field"]


def generators(n=1, first=0):
    return [torch.Generator().manual_seed(first + i) for i in range(n)]


def call(name, prompts=PROMPTS[:1], steps=3):
    given = {k: one(v, len(prompts)) for k, v in CALL_KWARGS[name].items()}
    return {"prompt": list(prompts), "num_inference_steps": steps, **given}


def one(value, count):
    return [value] * count if isinstance(value, Image.Image) else value


def scales(pipe):
    """Guidance scales to try: only 1 where there is no classifier-free guidance."""
    return (1.0,) if describe_guidance(pipe).startswith("there is no") else (1.0, 3.0)


def trainable(name, lora=None):
    pipe = build(name)
    make_trainable(pipe, lora, train_mode=FOUND.get(name, {}).get("train_mode", ()))
    return pipe


def parameters(pipe):
    found = [p for d in denoisers(pipe).values() for p in d.parameters() if p.requires_grad]
    return [p for p in found if p.grad is not None]


@pytest.mark.parametrize("name", ALL)
def test_samples_equal_the_pipelines_with_one_call_per_step(name):
    pipe = trainable(name)
    with guidance(pipe, 1.0, 1, {}) as given:
        expected = pipe(**call(name), **given, generator=generators(), output_type="pil")[0]
    with counted_batches(pipe) as batches:
        latents, images = sample(pipe, **call(name), generator=generators())
    # PNDM (SD 1.5's scheduler) takes one step more than it is asked for.
    assert batches == [1] * (4 if name == "StableDiffusion" else 3)
    assert np.array_equal(np.asarray(images[0]), np.asarray(expected[0]))
    again = rollout(pipe, **call(name), generator=generators())
    assert again.requires_grad
    assert torch.equal(again, latents)


@pytest.mark.parametrize("name", ALL)
def test_gradient_equals_finite_differences(name):
    # Kandinsky5 casts to single precision, and its rotations to bfloat16: a coarse step there.
    coarse = name == "Kandinsky5"
    pipe = trainable(name).to(dtype=torch.float32 if coarse else torch.float64)
    latents = rollout(pipe, **call(name, steps=2), generator=generators())
    torch.manual_seed(0)
    weights = torch.randn_like(latents)
    (latents * weights).sum().backward()
    moved = parameters(pipe)
    direction = [torch.randn_like(p) * p.std(correction=0).clamp(min=0.01) for p in moved]
    slope = sum((p.grad * v).sum() for p, v in zip(moved, direction, strict=True)).item()

    def value(step):
        with torch.no_grad():
            for p, v in zip(moved, direction, strict=True):
                p.add_(v, alpha=step)
            latents = rollout(pipe, **call(name, steps=2), generator=generators())
            for p, v in zip(moved, direction, strict=True):
                p.sub_(v, alpha=step)
        return (latents.double() * weights).sum().item()

    # Many families round sigmas or embeddings to single precision: too small a step drowns in it.
    steps = (1e-2, 3e-2) if coarse else (3e-4, 1e-3, 3e-3)
    errors = [abs((value(h) - value(-h)) / (2 * h) / slope - 1) for h in steps]
    assert min(errors) <= (1e-2 if coarse else 1e-3)


@pytest.mark.parametrize("name", ALL)
def test_preflight_finds_what_is_wrong_and_nothing_else(name):
    pipe = build(name)
    make_trainable(pipe, None)
    report = preflight(pipe, checkpointing="block", **call(name) | {"prompt": PROMPTS[1]})
    report.raise_failures()
    assert report.findings[0].observed == "equal bit for bit"
    if "checkpointing" not in FOUND.get(name, {}):
        assert report.findings[3].observed == "fine: block"
    settings = dict(report.settings)
    patterns = settings.pop("freeze", [])
    expected = dict(FOUND.get(name, {}))
    words = expected.pop("freeze", [])
    assert settings == expected
    assert bool(patterns) == bool(words)
    assert all(any(word in pattern for word in words) for pattern in patterns)


@pytest.mark.parametrize("name", ALL)
def test_encoding_ahead_and_releasing_the_encoders_changes_nothing(name, tmp_path):
    pipe = build(name)

    def sample_all():
        singles = [
            rollout(pipe, **call(name, [prompt]), generator=generators(1, first), cfg_scale=scale)
            for first, prompt in enumerate(PROMPTS)
            for scale in scales(pipe)
        ]
        return torch.cat(singles)

    with torch.no_grad():
        expected = sample_all()
        encoder = EncodeOnce(pipe, EncodingStore(tmp_path))
        for prompts in ([PROMPTS[0]], [PROMPTS[1]], PROMPTS):
            for scale in scales(pipe):
                with contextlib.suppress(EncodingCollateError):
                    given = call(name, prompts) | {"generator": generators(len(prompts))}
                    encoder.populate(cfg_scale=scale, **given)
        encoder.store.flush()
        encoder.release(torch.device("cpu"))
        left = [c for c in pipe.components.values() if isinstance(c, torch.nn.Module)]
        count = sum(p.numel() for c in left for p in c.parameters())
        assert count == sum(p.numel() for d in denoisers(pipe).values() for p in d.parameters())
        assert torch.equal(sample_all(), expected)
        if "rollout_batch_size" in FOUND.get(name, {}):
            with pytest.raises(EncodingCollateError, match=r"set model\.rollout_batch_size: 1"):
                rollout(pipe, **call(name, PROMPTS), generator=generators(2))
        else:
            both = rollout(pipe, **call(name, PROMPTS), generator=generators(2))
            torch.testing.assert_close(both, expected[:: len(scales(pipe))], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ALL)
def test_codec_inverts_the_tail(name):
    """With a VAE whose encoder returns what its decoder was given."""
    pipe = build(name)
    given = call(name)
    del given["num_inference_steps"]
    codec = LatentCodec(pipe, **given)
    latents = torch.randn(2, *codec.latent_shape, generator=generators()[0])
    captured = {}

    class Echo(torch.nn.Linear):
        dtype = torch.float32

        def decode(self, z, return_dict):
            captured["z"] = z
            return (torch.zeros(len(z), 3, *([1] * (z.ndim == 5)), 8, 8),)

        def encode(self, pixels):
            return type("Output", (), {"latent": captured["z"]})()

    pipe.__dict__["vae"] = Echo(1, 1)
    codec.decode(latents)
    again = codec.encode(torch.zeros(2, 3, 8, 8))
    assert (again - latents).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ALL)
def test_two_steps_of_training_lower_the_loss(name, tmp_path, monkeypatch):
    """From prompts to pairs to a LoRA, all through the Trainer; and the LoRA off is the base."""
    monkeypatch.setattr(
        lit_distill.adapters.weights, "load_pipeline", lambda source, **options: build(source)
    )
    given = dict(CALL_KWARGS[name])
    picture = given.pop("image", None)
    columns = {} if picture is None else {"image": "edit_image"}
    if picture is not None:
        picture.save(tmp_path / "edit.png")
    size = {key: given.pop(key) for key in ("height", "width")}
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"accelerator": "cpu", "enable_checkpointing": False}
    teacher = Teacher(
        name,
        torch_dtype="float32",
        num_inference_steps=6,
        cfg_scale=1.0,
        call_kwargs=given,
        call_columns=columns,
        student_num_inference_steps=3,
        **size,
    )
    prompt = Prompt(PROMPTS[0], {"image": Picture(tmp_path / "edit.png")} if columns else {})
    metadata = generate_pairs(pl.Trainer(**quiet), teacher, plan_pairs([prompt], 1), tmp_path / "p")
    assert pd.read_csv(metadata).columns[0] == ("video" if "num_frames" in given else "image")

    losses = []

    class Losses(pl.Callback):
        def on_train_batch_end(self, trainer, *args):
            losses.append(trainer.callback_metrics["train_loss"].item())

    model = DirectDistill(
        name,
        torch_dtype="float32",
        lora={"r": 4},
        checkpointing="block",
        call_kwargs=given,
        optimizer=lambda params: torch.optim.Adam(params, lr=1e-3),
    )
    data = DistillDataModule(str(metadata), call_columns=columns, repeat=3)
    trainer = pl.Trainer(max_steps=3, callbacks=[Losses()], use_distributed_sampler=False, **quiet)
    trainer.fit(model, datamodule=data)
    assert losses[2] < losses[0]
    batch = next(iter(data.train_dataloader()))
    with torch.no_grad(), adapters_disabled(model.denoisers):
        off = model.student_rollout(batch)
    base = DirectDistill(name, torch_dtype="float32", call_kwargs=given, checkpointing="none")
    base.configure_model()
    assert torch.equal(off, base.student_rollout(batch))


def test_the_callers_prompts_are_left_alone():
    """Z-Image's pipeline writes its chat template into the list that it is given."""
    pipe, prompts = build("ZImage"), [PROMPTS[0]]
    with torch.no_grad():
        first = rollout(pipe, **call("ZImage") | {"prompt": prompts}, generator=generators())
        again = rollout(pipe, **call("ZImage") | {"prompt": prompts}, generator=generators())
    assert prompts == [PROMPTS[0]]
    assert torch.equal(first, again)


def test_hardly_any_family_needs_a_line_in_the_table():
    ordinary = [name for name in ALL if family_of(build(name)) == family_of(build("QwenImage"))]
    assert len(ordinary) >= len(ALL) - 1


def test_the_documented_table_is_the_tested_one():
    from families_table import DOC, split, table

    assert split(DOC.read_text(encoding="utf-8"))[1] == table()
