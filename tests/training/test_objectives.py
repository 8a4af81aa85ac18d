"""What every objective holds: what it moves, what it leaves alone, and exact resumes."""

import functools
from collections import Counter

import lightning.pytorch as pl
import pandas as pd
import pytest
import torch
from digits import QUIET, heldout
from digits import data as digits_data
from lightning.pytorch.callbacks import ModelCheckpoint
from objective_cases import OBJECTIVES, OWN, all_together
from tiny_pipelines import CALL_KWARGS, build

import lit_distill
import lit_distill.adapters.weights
from lit_distill import (
    EMA,
    Consistency,
    DirectDistill,
    DistillDataModule,
    Losses,
    Objective,
    Term,
    WeightedSum,
)
from lit_distill.data.batch import NO_TARGET
from lit_distill.pipelines.components import denoisers
from lit_distill.training.lr_scheduler import WarmupCosine

FAMILIES = ["QwenImage", "Flux", "StableDiffusionXL", "StableDiffusion3", "Wan22", "Sana"]
MULTISTEP = {"Wan22", "Sana"}
"""Families whose scheduler's states can't be interpolated, as a trajectory needs it."""


@functools.cache
def weights_of(name):
    pipe = build(name)
    state = {key: denoiser.state_dict() for key, denoiser in denoisers(pipe).items()}
    return {f"{key}.{n}": t.clone() for key, part in state.items() for n, t in part.items()}


def student(name, objective, **options):
    given = {k: v for k, v in CALL_KWARGS[name].items() if k not in ("height", "width")}
    defaults = {
        "torch_dtype": "float32",
        "lora": {"r": 2},
        "checkpointing": "block",
        "call_kwargs": given,
        "teacher_num_inference_steps": 3,
        "teacher_cfg_scale": 1.0 if name == "Flux" else 2.0,
        "optimizer": lambda groups: torch.optim.AdamW(groups, lr=1e-3),
    }
    torch.manual_seed(0)
    return DirectDistill(name, objective=objective, **{**defaults, **options})


def batch_of(name, **changes):
    size = tuple(CALL_KWARGS[name][side] for side in ("height", "width"))
    values = {"prompt": ["a red cat", "two dogs"], "seed": [3, 4], "rand_device": "cpu"}
    values |= {"num_inference_steps": 2, "cfg_scale": 1.0, "size": size, "call": {}, "row": [2, 3]}
    return {**values, **NO_TARGET, **changes}


@pytest.fixture(autouse=True)
def _tiny(monkeypatch):
    def load(source, **options):
        return real(source, **options) if source == "tiny-digits" else build(source)

    real = lit_distill.adapters.weights.load_pipeline
    monkeypatch.setattr(lit_distill.adapters.weights, "load_pipeline", load)


def copied(parameters):
    return {name: p.detach().clone() for name, p in parameters.items()}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kind", OBJECTIVES)
def test_three_steps_move_what_they_should_and_nothing_else(kind, name):
    model = student(name, OBJECTIVES[kind]())
    model.configure_model()
    if kind == "trajectory" and name in MULTISTEP:
        with pytest.raises(ValueError, match="a trajectory needs one of the schedulers"):
            model.losses(batch_of(name))
        return
    optimizer = model.configure_optimizers()
    before, beside = copied(model.trained()), copied(model.companions())
    assert bool(beside) == (kind in ("distribution matching", "adversarial"))
    for step in range(3):
        model.models.random.start(0, step)
        losses = model.losses(batch_of(name))
        assert losses.student.shape == (2,) and (losses.companion is None) == (not beside)
        optimizer.zero_grad()
        (losses.student.mean() + (losses.companion or 0.0)).backward()
        optimizer.step()
    moved = [n for n, p in model.trained().items() if not torch.equal(p, before[n])]
    assert len(moved) >= len(before) // 3  # lora_A moves from the second step on
    changed = [n for n, p in model.companions().items() if not torch.equal(p, beside[n])]
    assert len(changed) >= len(beside) // 3
    weights = weights_of(name)
    found = {n.replace(".base_layer", ""): p for n, p in model.denoisers.state_dict().items()}
    assert weights.keys() <= found.keys()
    assert all(torch.equal(found[n], weight) for n, weight in weights.items())


class SaveAt(pl.Callback):
    """Saves a checkpoint after a step."""

    def __init__(self, path, step):
        self.path, self.step = path, step

    def on_train_batch_end(self, trainer, pl_module, *_):
        if trainer.global_step == self.step and not trainer.fit_loop._should_accumulate():
            trainer.save_checkpoint(self.path)


def digits(objective, **options):
    freeze = [f"*transformer_blocks.3.{name}.*" for name in ("attn.to_add_out", "txt_mlp")]
    schedule = {"lr_scheduler": lambda optimizer: WarmupCosine(optimizer, 1, 6)}
    options = {"preflight": False, "freeze": freeze, "metrics": {}} | schedule | options
    torch.manual_seed(0)
    return DirectDistill(
        "tiny-digits",
        torch_dtype="float32",
        lora={"r": 2},
        checkpointing="none",
        objective=objective,
        teacher_num_inference_steps=4,
        optimizer=lambda groups: torch.optim.AdamW(groups, lr=1e-3),
        **options,
    )


def fit(model, pairs, path, steps, ckpt_path=None, callbacks=(), **options):
    defaults = {"max_steps": steps, "default_root_dir": path, "gradient_clip_val": 0.5}
    trainer = pl.Trainer(**QUIET, **defaults, callbacks=[EMA(0.5), *callbacks], **options)
    trainer.fit(model, datamodule=digits_data(pairs, batch_size=4), ckpt_path=ckpt_path)
    return trainer


RESUMED = {
    "distribution matching": OBJECTIVES["distribution matching"],
    "consistency": OBJECTIVES["consistency"],
    "all together": functools.partial(all_together, 3),
}
"""Regression's exact resume is tested with all other options of a run."""


@pytest.mark.parametrize("kind", RESUMED)
def test_a_resumed_run_equals_the_uninterrupted_one(kind, pairs, tmp_path):
    whole = digits(RESUMED[kind]())
    options = {"limit_val_batches": 0, "accumulate_grad_batches": 2}
    saving = [SaveAt(tmp_path / "half.ckpt", 2)]
    trainer = fit(whole, pairs, tmp_path, 4, callbacks=saving, **options)
    metrics = trainer.callback_metrics
    if whole.companions():
        assert metrics["companion_loss"].isfinite() and metrics["companion_grad_norm"] > 0
    half = torch.load(tmp_path / "half.ckpt", weights_only=True)
    again = digits(RESUMED[kind]())
    fit(again, pairs, tmp_path, 4, tmp_path / "half.ckpt", **options)
    for name, parameter in (whole.trained() | whole.companions()).items():
        assert torch.equal(parameter, (again.trained() | again.companions())[name]), name
    # What trains beside the student is a part of its own, and of no average.
    assert half.get("objective", {}).keys() == whole.companions().keys()
    assert half["state_dict"].keys() == half["ema"]["weights"].keys() == whole.trained().keys()


def test_companions_have_a_learning_rate_of_their_own_and_are_never_exported(pairs, tmp_path):
    model = digits(all_together())
    trainer = fit(model, pairs, tmp_path, 1, limit_val_batches=0)
    rates = [group["initial_lr"] for group in trainer.optimizers[0].param_groups]
    assert rates == [1e-3, OWN["lr"], OWN["lr"]]
    trainer.save_checkpoint(tmp_path / "student.ckpt")
    pipe = lit_distill.load_student(tmp_path / "student.ckpt")
    assert set(pipe.transformer.peft_config) == {"default"}
    batch = heldout(pairs)
    reloaded = DirectDistill.load_from_checkpoint(tmp_path / "student.ckpt")
    with torch.no_grad():
        assert torch.equal(reloaded.student_rollout(batch), model.student_rollout(batch))
    with pytest.raises(ValueError, match="what the checkpoint's objective trains does not fit"):
        other = digits(OBJECTIVES["distribution matching"]())
        fit(other, pairs, tmp_path, 2, tmp_path / "student.ckpt")


@pytest.mark.parametrize("kind", ["regression", "trajectory", "distribution matching"])
def test_a_student_that_is_its_teacher_has_no_gradient(kind):
    same = {"teacher_num_inference_steps": 2, "teacher_cfg_scale": 1.0}
    model = student("QwenImage", OBJECTIVES[kind](), **same)
    model.configure_model()
    losses = model.losses(batch_of("QwenImage"))
    losses.student.mean().backward()
    norms = [p.grad.norm() for p in model.trained().values() if p.grad is not None]
    assert norms and max(norms) < 1e-7


def test_the_direction_is_from_the_fake_prediction_to_the_teachers():
    """Against what the definition says, written out with the pipeline's own predictions."""
    model = student("QwenImage", OBJECTIVES["distribution matching"]())
    model.configure_model()
    with torch.no_grad():
        for name, parameter in model.companions().items():
            if "lora_B" in name:
                parameter.normal_(std=0.05)
    seen = {}
    models = model.models
    for name in ("teacher_x0", "companion_x0", "student_rollout"):
        original = getattr(models, name)

        def record(*args, name=name, original=original):
            found = original(*args)
            seen.setdefault(name, []).append((args, found))
            return found

        setattr(models, name, record)
    losses = model.losses(batch_of("QwenImage"))
    (args, real), (_, fake) = seen["teacher_x0"][0], seen["companion_x0"][0]
    assert torch.equal(args[0], seen["companion_x0"][0][0][0])  # the same noisy latents
    sample = seen["student_rollout"][0][1]
    (slope,) = torch.autograd.grad(losses.student.sum(), sample, retain_graph=True)
    size = (sample - real).abs().mean((1, 2), keepdim=True)
    expected = (fake - real) / size / sample[0].numel()
    torch.testing.assert_close(slope, expected.detach(), rtol=1e-4, atol=1e-8)
    assert (fake - real).abs().max() > 1e-4
    # The student is not in the fake denoiser's loss, nor the fake denoiser in the student's.
    losses.companion.backward(retain_graph=True)
    assert all(p.grad is None for p in model.trained().values())
    fresh = {name: p.grad.clone() for name, p in model.companions().items() if p.grad is not None}
    losses.student.mean().backward()
    assert all(torch.equal(model.companions()[name].grad, grad) for name, grad in fresh.items())


@pytest.mark.parametrize("checkpointing", ["block", "nested"])
def test_recomputation_uses_the_companion(checkpointing):
    """The backward pass recomputes after the student's adapter is active again."""
    grads = []
    for mode in ("none", checkpointing):
        model = student("QwenImage", OBJECTIVES["distribution matching"](), checkpointing=mode)
        model.configure_model()
        torch.manual_seed(1)
        with torch.no_grad():
            for name, parameter in (model.trained() | model.companions()).items():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        model.losses(batch_of("QwenImage")).companion.backward()
        grads.append({n: p.grad for n, p in model.companions().items() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad, rtol=1e-4, atol=1e-7)


def test_consistency_goes_through_its_stages_to_the_students_own_steps():
    objective = Consistency(segments=[4, 2], steps_per_stage=3, teacher_steps=12)
    assert [objective.stage(step) for step in (0, 2, 3, 99)] == [4, 4, 2, 2]
    model = student("QwenImage", objective)
    model.configure_model()
    edges = model.models.schedule(batch_of("QwenImage"), 4)
    found = set()
    for index in range(60):
        model.models.random.start(0, index)
        start, lower, end = objective._levels(model.models, batch_of("QwenImage"))
        assert start.noise > lower.noise >= end.noise
        assert end in edges[1:] and start.noise <= edges[edges.index(end) - 1].noise + 1e-9
        found.add(edges.index(end))
    assert found == {1, 2, 3, 4}
    # A jump to the end of the student's own step is that step.
    states = model.student.trajectory(batch_of("QwenImage"))
    edges = model.models.schedule(batch_of("QwenImage"), 2)
    x0 = model.models.student_x0(states.states[0], edges[1], batch_of("QwenImage"))
    torch.testing.assert_close(x0, states.states[1], rtol=1e-5, atol=1e-5)


def test_the_heads_see_the_gap_and_r1_lowers_their_slope():
    model = student("QwenImage", OBJECTIVES["adversarial"](), lora={"r": 2})
    model.configure_model()
    assert len(model.objective.names) == 2 and all("to_out" in n for n in model.objective.names)
    heads = torch.optim.Adam(model.objective.parameters(), lr=1e-2)
    losses = []
    for step in range(15):
        model.models.random.start(0, step % 3)
        losses.append(model.losses(batch_of("QwenImage")).companion)
        heads.zero_grad()
        losses[-1].backward()
        heads.step()
    assert losses[-1] < losses[0]
    objective, values = model.objective, []
    channels = objective.heads[0][0].normalized_shape[0]
    real = [torch.randn(2, 5, channels) for _ in objective.names]
    for penalty in (0.0, 1.0):
        objective.penalty = penalty
        values.append(objective._heads_loss([r.clone() for r in real], real))
    leaves = [r.clone().requires_grad_() for r in real]
    slopes = torch.autograd.grad(objective._scores(leaves).sum(), leaves)
    expected = sum(slope.square().sum((1, 2)) for slope in slopes).mean()
    torch.testing.assert_close(values[1] - values[0], expected)


def test_a_sum_is_the_sum_of_its_terms_from_their_start_to_their_stop():
    class Counted(Objective):
        def losses(self, models, batch):
            difference = models.student_rollout(batch) - models.teacher_target(batch)
            return Losses(difference.square().flatten(1).mean(1))

    sums = [Term(lit_distill.Regression(), 1.0, stop=6), Term(Counted(), 3.0, start=5)]
    model = student("QwenImage", WeightedSum(sums))
    model.configure_model()
    calls, original = [], model.student.rollout
    model.student.rollout = lambda batch: calls.append(1) or original(batch)
    early = model.losses(batch_of("QwenImage")).student
    model.models._steps = lambda: 5
    late = model.losses(batch_of("QwenImage")).student
    assert len(calls) == 2  # one rollout for both terms
    model.models._steps = lambda: 6
    last = model.losses(batch_of("QwenImage")).student
    torch.testing.assert_close((late, last), (4 * early, 3 * early))


@pytest.mark.parametrize("kind", ["distribution matching", "adversarial", "consistency"])
def test_what_needs_the_frozen_weights_refuses_full_training(kind):
    with pytest.raises(ValueError, match=r"needs the frozen pretrained weights.*model.lora"):
        student("QwenImage", OBJECTIVES[kind](), lora=None)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: lit_distill.DistributionMatching(low=0.9, high=0.1), "low and high must be"),
        (lambda: lit_distill.DistributionMatching(updates=0), "shift must be > 0 and updates"),
        (lambda: Consistency(segments=[0]), "segments, steps_per_stage and teacher_steps"),
        (lambda: lit_distill.Adversarial(layers=0), "layers and width must be >= 1"),
        (lambda: WeightedSum([Term(lit_distill.Regression(), start=1)]), "take part in every step"),
        (lambda: WeightedSum([Term(lit_distill.Regression(), stop=9)]), "take part in every step"),
        (
            lambda: WeightedSum([Term(lit_distill.DistributionMatching()) for _ in range(2)]),
            "there is one companion adapter",
        ),
        (lambda: student("Flux", Consistency(), lora_per_step=2), "a LoRA for each step only"),
        (lambda: student("Flux", lit_distill.Adversarial(), compile=True), "compiled layers"),
        (lambda: student("Flux", lit_distill.Trajectory(), grad_steps=2), "Trajectory and model"),
    ],
)
def test_settings_that_do_not_fit_are_refused_before_anything_is_loaded(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_unknown_options_of_the_optimizer_are_named():
    model = student("QwenImage", lit_distill.DistributionMatching(optimizer={"lrr": 1.0}))
    model.configure_model()
    with pytest.raises(ValueError, match=r"AdamW has no option 'lrr' \(did you mean 'lr'"):
        model.configure_optimizers()


def prompts_only(pairs, path, rows=12):
    table = pd.read_csv(pairs / "train/metadata.csv")[:rows]
    table.assign(image="").drop(columns="latents").to_csv(path, index=False)
    return DistillDataModule(str(path), batch_size=4)


@pytest.mark.parametrize("kind", ["regression", "trajectory"])
def test_generated_pairs_are_reused_and_a_resumed_run_equals_the_uninterrupted_one(
    kind, pairs, tmp_path
):
    data = functools.partial(prompts_only, pairs, tmp_path / "prompts.csv")
    reuse = {"teacher_reuse": 3, "teacher_buffer": 8}
    trained = []

    class Seen(pl.Callback):
        def on_train_start(self, trainer, module):
            def pairs_of(batch, objective, original=module.models.pairs):
                found = original(batch, objective)
                rows = zip(found["prompt"], found["seed"], found["latents"], strict=True)
                trained.extend(
                    (prompt, seed, latents.sum().item()) for prompt, seed, latents in rows
                )
                return found

            module.models.pairs = pairs_of

    def run(steps, ckpt_path=None, callbacks=()):
        model = digits(OBJECTIVES[kind](), **reuse)
        options = {"default_root_dir": tmp_path, "callbacks": list(callbacks)}
        trainer = pl.Trainer(**QUIET, **options, max_steps=steps)
        trainer.fit(model, datamodule=data(), ckpt_path=ckpt_path)
        return model, trainer

    whole, trainer = run(9, callbacks=[Seen(), SaveAt(tmp_path / "half.ckpt", 5)])
    uses = Counter(trained)
    assert len(trained) == 36 and max(uses.values()) == 3
    assert len(uses) <= 20  # of 36 rows: in the long run a third is generated
    assert len({seed for _, seed, _ in uses}) == len(uses)  # a new seed for every pair
    assert 0 < trainer.callback_metrics["teacher_share"] < 1
    again, _ = run(9, tmp_path / "half.ckpt")
    assert all(torch.equal(p, again.trained()[name]) for name, p in whole.trained().items())
    # The target is what the teacher generates from the pair's new seed.
    row = whole.models.buffer.state()[0][1]
    expected = whole.models.teacher.target(row | dict(NO_TARGET))
    torch.testing.assert_close(row["latents"], expected, rtol=1e-4, atol=1e-4)


def test_an_interrupted_step_takes_nothing_from_the_buffer(pairs, tmp_path):
    class Fails(pl.Callback):
        def on_before_backward(self, trainer, *_):
            if trainer.global_step == 4:
                raise RuntimeError("interrupted")

    def run(callbacks=(), ckpt_path=None):
        model = digits(None, teacher_reuse=3, teacher_buffer=8)
        options = {"default_root_dir": tmp_path, "callbacks": list(callbacks)}
        trainer = pl.Trainer(**QUIET, **options, max_steps=6)
        data = prompts_only(pairs, tmp_path / "prompts.csv")
        trainer.fit(model, datamodule=data, ckpt_path=ckpt_path)
        return model.trained()

    saver = ModelCheckpoint(tmp_path, filename="last", save_on_exception=True)
    with pytest.raises(RuntimeError, match="interrupted"):
        run([Fails(), saver])
    resumed, whole = run(ckpt_path=saver.best_model_path or tmp_path / "last.ckpt"), run()
    assert all(torch.equal(parameter, resumed[name]) for name, parameter in whole.items())


def test_a_buffer_of_another_run_is_refused_or_left_out(pairs, tmp_path):
    batch = batch_of("QwenImage")
    model = student("QwenImage", None, teacher_reuse=2, teacher_buffer=1)
    model.configure_model()
    with pytest.raises(ValueError, match=r"model.teacher_buffer is 1, less than the 2 rows"):
        model.models.pairs(batch, model.objective)
    pictures = batch | {"call": {"image": [object(), object()]}}
    with pytest.raises(ValueError, match=r"model.teacher_reuse: row 2 has image"):
        model.models.pairs(pictures, model.objective)
    stored = batch | {"latents": torch.zeros(2, 1)}
    assert model.models.pairs(stored, model.objective) is stored
    with pytest.raises(ValueError, match=r"model.teacher_reuse must be >= 1"):
        student("QwenImage", None, teacher_reuse=0)


def test_the_guided_teacher_works_with_encoders_released(pairs, tmp_path):
    """Rows with a target need the negative prompt, too, which is encoded ahead."""
    model = digits(OBJECTIVES["distribution matching"]())
    trainer = pl.Trainer(**QUIET, max_steps=1, default_root_dir=tmp_path, limit_val_batches=0)
    trainer.fit(model, datamodule=digits_data(pairs, batch_size=4, cache_dir=tmp_path / "cache"))
    assert not any(p.numel() for p in model.pipe.text_encoder.parameters())
