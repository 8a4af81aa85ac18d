"""Losses between latents, and losses on images."""

import lightning.pytorch as pl
import pytest
import torch
from digits import QUIET, data, heldout, module

from lit_distill import DistillLoss
from lit_distill.training.losses import LatentL1, LatentMSE, LatentRMSE


class Decoded(DistillLoss):
    """Mean squared error of images."""

    needs_codec = True

    def forward(self, student, target, codec):
        self.decodes = type(codec.vae).__name__
        return (codec.decode(student) - codec.decode(target)).square().flatten(1).mean(1)


@pytest.mark.parametrize(("loss", "expected"), [(LatentMSE, 4.0), (LatentL1, 2.0), (LatentRMSE, 2)])
def test_a_loss_is_a_mean_over_each_sample(loss, expected):
    target = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(0))
    sign = torch.tensor([1.0, -1.0]).repeat(10).view(5, 4)
    found = loss()(target + torch.tensor([2.0, 0, 2]).view(3, 1, 1) * sign, target, None)
    wanted = torch.tensor([float(expected), 0.0, float(expected)])
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-5)


def test_rmse_weighs_hard_rows_as_easy_ones():
    target = torch.zeros(2, 16)
    student = torch.randn(2, 16, generator=torch.Generator().manual_seed(0))
    student = (student * torch.tensor([[0.1], [10.0]])).requires_grad_()
    norms = {}
    for loss in (LatentMSE(), LatentRMSE()):
        gradient = torch.autograd.grad(loss(student, target, None).sum(), student)[0]
        norms[type(loss)] = gradient.norm(dim=1)
    assert norms[LatentRMSE][1] / norms[LatentRMSE][0] == pytest.approx(1, rel=1e-2)
    assert norms[LatentMSE][1] / norms[LatentMSE][0] > 10
    # No error, no step: the root's slope there is infinite.
    exact = target.clone().requires_grad_()
    assert torch.autograd.grad(LatentRMSE()(exact, target, None).sum(), exact)[0].abs().max() == 0
    with pytest.raises(ValueError, match="eps must be > 0, got 0"):
        LatentRMSE(eps=0)


def test_a_loss_on_images_has_its_gradient_and_keeps_the_vae(pairs, tmp_path):
    """Also with a cache, which lets go of the VAE otherwise."""
    loss = Decoded()
    model = module(loss=loss)
    trainer = pl.Trainer(max_steps=2, default_root_dir=tmp_path, **QUIET)
    trainer.fit(model, datamodule=data(pairs, batch_size=8, cache_dir=str(tmp_path / "cache")))
    assert loss.decodes == "AutoencoderKLQwenImage"
    assert torch.isfinite(trainer.callback_metrics["train_loss"])
    batch = heldout(pairs)
    latents, target = model.student_rollout(batch), model.teacher_target(batch)
    value = model.compare(latents, target, batch)
    expected = (model.decode(latents, batch) - model.decode(target, batch)).square()
    torch.testing.assert_close(value, expected.flatten(1).mean(1))
    value.sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.trained().values())
