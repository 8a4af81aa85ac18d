import pytest
import torch

from lit_distill import load_pipeline
from lit_distill.adapters.inject import make_trainable, trained_parameters
from lit_distill.compute.activation_checkpointing import BlockCheckpointing
from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.hooks import counted_batches
from lit_distill.pipelines.release import forget_tables
from lit_distill.planning.counter import Counter
from lit_distill.preflight.checks import preflight
from lit_distill.preflight.probe import Probe

CALL = {"prompt": "a red seven on a blue background", "height": 32, "width": 32}


@pytest.fixture(scope="module")
def pipe():
    pipe = load_pipeline("tiny-digits", torch_dtype="float32")
    make_trainable(pipe, {"r": 4})
    return pipe


@pytest.mark.parametrize(
    ("mode", "count", "right"),
    [
        ("none", 11, "none"),  # with nothing to compare
        ("block", 12, "block"),
        ("auto", 15, "nested, step, block, selective, none"),
    ],
)
def test_questions_share_denoiser_calls(pipe, mode, count, right):
    with counted_batches(pipe) as batches:
        report = preflight(pipe, checkpointing=mode, **CALL)
    report.raise_failures()
    # The whole rollout of auto is that of nested, whose 4 calls are recomputed, like its first step
    # and that of mode step.
    assert len(batches) == count + (6 if mode == "auto" else 0)
    assert report.findings[3].observed == f"fine: {right}"
    assert len(report.findings) == 6 and set(report.settings) == {"freeze"}


def broken(monkeypatch, change):
    """Let diffusers' checkpointing of blocks compute something else."""
    original = BlockCheckpointing._checkpoint_block

    def checkpoint_block(self, block, *args):
        return change(original(self, block, *args))

    monkeypatch.setattr(BlockCheckpointing, "_checkpoint_block", checkpoint_block)


def wrong_gradient(outputs):
    for output in outputs:
        if output.requires_grad:
            output.register_hook(lambda gradient: 1.01 * gradient)
    return outputs


def wrong_padding(outputs):
    return tuple(1.1 * each if len(each) == 2 else each for each in outputs)


@pytest.mark.parametrize(
    ("change", "error"),
    [
        (wrong_gradient, "another gradient, by "),
        (wrong_padding, "another result of padded prompts"),
    ],
)
@pytest.mark.parametrize(("mode", "instead"), [("block", "step"), ("nested", "step")])
def test_checkpointing_that_changes_gradient_or_value_is_replaced(
    pipe, monkeypatch, change, error, mode, instead
):
    broken(monkeypatch, change)
    report = preflight(pipe, checkpointing=mode, **CALL)
    report.raise_failures()
    assert f"{mode}: {error}" in report.findings[3].observed
    assert report.settings["checkpointing"] == instead
    assert "rollout_batch_size" not in report.settings
    assert report.findings[2].verdict == "ok"


def test_a_rollout_that_is_not_the_pipelines_is_refused(pipe, monkeypatch):
    original = pipe.transformer.forward
    calls = []

    def drifting(*args, **kwargs):
        calls.append(1)
        return (original(*args, **kwargs)[0] * (1 + 0.01 * len(calls)),)

    monkeypatch.setattr(pipe.transformer, "forward", drifting, raising=False)
    (finding, *_) = preflight(pipe, **CALL).findings
    assert finding.verdict == "failed" and "two samples of a seed differ by" in finding.observed


@pytest.mark.parametrize("at", [1, 5, 6, 8, 10])
def test_too_little_memory_is_a_finding_and_leaves_nothing_behind(pipe, at):
    calls = []

    def full(module, args, kwargs):
        calls.append(1)
        if len(calls) == at:
            raise torch.OutOfMemoryError("too much")

    (denoiser,) = denoisers(pipe).values()
    with Counter() as live, denoiser.register_forward_pre_hook(full, with_kwargs=True):
        report = preflight(pipe, checkpointing="block", **CALL)
        assert live.now < 2**16
    finding = report.findings[-1]
    assert (finding.verdict, finding.observed) == ("failed", "memory ran out")
    assert "model.checkpointing: nested" in finding.remedy
    parameters = trained_parameters(pipe).values()
    assert all(p.requires_grad and p.grad is None for p in parameters)


@pytest.mark.parametrize("mode", ["nested", "block", "none"])
def test_preflight_needs_no_more_memory_than_the_gradient_of_one_row(pipe, mode):
    call = CALL | {"height": 128, "width": 128}
    prompt = call.pop("prompt")
    probe = Probe(pipe, prompt, 4, 0, call)
    peaks = []
    for run in (
        lambda: probe.rollout_norms(checkpointing=mode),
        lambda: preflight(pipe, prompt=prompt, checkpointing=mode, **call),
    ):
        forget_tables(pipe.transformer)  # those of earlier calls
        with Counter() as live:
            run()
        peaks.append(live.peak)
    assert live.now < 2**10
    # Less than the latents, 16 KiB: the positions of half the size, 4 KiB, and norms.
    assert peaks[1] - peaks[0] < 2**13
