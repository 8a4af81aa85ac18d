"""The student's own schedule, and the states between its steps."""

import lightning.pytorch as pl
import pytest
import torch
from conftest import generate
from diffusers import UniPCMultistepScheduler
from digits import QUIET, data, heldout, module
from safetensors.torch import load_file

import lit_distill
from lit_distill import DistillDataModule, export_student, load_pipeline, load_student, rollout
from lit_distill.adapters.inject import make_trainable
from lit_distill.pipelines.trajectory import Trajectory, trajectory

ARGUMENTS = {"prompt": ["a red seven on a blue background"], "height": 32, "width": 32}
SIGMAS = [1.0, 0.9, 0.75, 0.5]


def seeded(seed=0):
    return {"generator": [torch.Generator().manual_seed(seed)]}


def test_states_are_read_off_a_straight_line():
    sigmas = torch.tensor([0.9, 0.6, 0.2, 0.0])
    line = Trajectory(sigmas.view(4, 1, 1) * torch.tensor([[1.0, -2.0]]) + 3, sigmas)
    wanted = torch.tensor([0.9, 0.75, 0.2, 0.1, 0.0])
    found = line.at(wanted)
    torch.testing.assert_close(found.states, wanted.view(5, 1, 1) * torch.tensor([[1.0, -2]]) + 3)
    assert torch.equal(found.sigmas, wanted)
    with pytest.raises(ValueError, match=r"ends at sigma 0.9, below the student's 0.95"):
        line.at(torch.tensor([0.95]))


def test_a_states_gradient_ends_where_its_step_began():
    pipe = load_pipeline("tiny-digits", torch_dtype="float32")
    make_trainable(pipe, None)
    weight = pipe.transformer.proj_out.weight
    found = trajectory(pipe, num_inference_steps=3, **seeded(), **ARGUMENTS)
    whole = rollout(pipe, num_inference_steps=3, grad_steps=1, **seeded(), **ARGUMENTS)
    assert torch.equal(found.states[-1], whole)
    assert found.sigmas[-1] == 0 and (found.sigmas.diff() < 0).all()
    expected = torch.autograd.grad(whole.square().mean(), weight)[0]
    last = torch.autograd.grad(found.states[-1].square().mean(), weight, retain_graph=True)[0]
    torch.testing.assert_close(last, expected)
    first = torch.autograd.grad(found.states[0].square().mean(), weight)[0]
    assert first.abs().max() > 0 and not torch.allclose(first, expected)


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """Pairs whose teacher takes the same four steps as the student, without guidance."""
    out = tmp_path_factory.mktemp("followed")
    options = ["--store_trajectory", "true", "--num_inference_steps", "4", "--cfg_scale", "1"]
    generate(out / "train", "prompts_train.txt", 8, 0, *options)
    return out / "train"


def first_batch(folder, **changes):
    loaded = DistillDataModule(str(folder / "metadata.csv"), batch_size=4)
    loaded.setup("fit")
    return next(iter(loaded.train_dataloader())) | changes


def test_a_student_that_is_its_teacher_has_no_loss(followed):
    tensors = load_file(sorted(followed.glob("latents/*.safetensors"))[0])
    assert {name: tuple(t.shape) for name, t in tensors.items()} == {
        "latents": (16, 16),
        "trajectory": (3, 16, 16),
        "sigmas": (3,),
    }
    model = module(objective=lit_distill.Trajectory())
    model.configure_model()
    batch = first_batch(followed)
    losses = model.losses(batch).student
    assert losses.shape == (4,) and losses.max() < 1e-10
    moved = model.losses(batch | {"trajectory": batch["trajectory"] + 0.1}).student
    assert moved.min() > 1e-4  # the states between the steps count


def test_the_online_teacher_is_followed_too(followed):
    model = module(
        objective=lit_distill.Trajectory(), teacher_num_inference_steps=4, teacher_cfg_scale=1.0
    )
    model.configure_model()
    batch = first_batch(followed, latents=None, trajectory=None, sigmas=None)
    assert model.losses(batch).student.max() < 1e-10


def test_states_of_another_schedule_are_refused(followed, pairs):
    other = module(objective=lit_distill.Trajectory(), scheduler={"shift_terminal": None})
    other.configure_model()
    with pytest.raises(ValueError, match=r"row \d+: the teacher's states are at sigmas \[0.7"):
        other.losses(first_batch(followed))
    with pytest.raises(ValueError, match="the student's steps at"):
        other.losses(first_batch(followed, num_inference_steps=3))
    with pytest.raises(ValueError, match=r"has no states of the teacher.*store_trajectory"):
        other.losses(heldout(pairs))


def test_what_a_trajectory_can_t_do_is_said(tmp_path):
    with pytest.raises(ValueError, match="set one"):
        module(objective=lit_distill.Trajectory(), grad_steps=2)
    pipe = load_pipeline("tiny-digits", torch_dtype="float32")
    pipe.scheduler = UniPCMultistepScheduler(use_flow_sigmas=True)
    with pytest.raises(ValueError, match="this pipeline has UniPCMultistepScheduler"):
        trajectory(pipe, num_inference_steps=2, **seeded(), **ARGUMENTS)


def test_a_student_keeps_its_own_sigmas(pairs, tmp_path):
    settings = {"scheduler": {"use_dynamic_shifting": False, "shift_terminal": None}}
    model = module(sigmas=SIGMAS, **settings)
    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, datamodule=data(pairs, batch_size=8))
    batch = heldout(pairs)
    latents, _ = model.sample(batch)
    assert torch.equal(model.student_rollout(batch), latents)
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    given = {"num_inference_steps": 4, "sigmas": SIGMAS, "true_cfg_scale": 1.0, "height": 32}
    given |= {"width": 32, "output_type": "latent", "prompt": batch["prompt"][:1]}
    alone, _ = model.sample({**batch, "prompt": batch["prompt"][:1], "seed": batch["seed"][:1]})
    pipe = load_student(tmp_path / "student.ckpt")
    by_hand = pipe(**given, **seeded(batch["seed"][0])).images
    torch.testing.assert_close(by_hand, alone)
    by_default = pipe(batch["prompt"][:1], output_type="latent", **seeded(batch["seed"][0])).images
    assert torch.equal(by_default, by_hand)
    export_student(tmp_path / "student.ckpt", tmp_path / "export")
    card = (tmp_path / "export/README.md").read_text()
    assert f"sigmas={SIGMAS}" in card
    # Other numbers of steps use the pipeline's sigmas.
    eight, _ = model.sample(batch, num_inference_steps=8)
    assert eight.isfinite().all()
    pipe(batch["prompt"][:1], num_inference_steps=2, output_type="latent", **seeded())


def test_rows_of_another_number_of_steps_than_sigmas_are_refused(pairs):
    with pytest.raises(ValueError, match="must be positive and falling"):
        module(sigmas=[1.0, 0.5, 0.6])
    model = module(sigmas=[1.0, 0.5])
    trainer = pl.Trainer(max_steps=1, **QUIET)
    with pytest.raises(ValueError, match=r"row 2.*4 steps.*model.sigmas.* 2"):
        trainer.fit(model, datamodule=data(pairs))
