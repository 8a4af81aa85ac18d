"""Tries every pipeline that diffusers' own tests can build, with tiny random weights.

    python benchmarks/families_sweep.py CHECKOUT [-k PART] [--out FILE]

CHECKOUT is a clone of https://github.com/huggingface/diffusers; its ``get_dummy_components`` make
the pipelines, nothing is downloaded. For each: does the rollout equal `pipe()` bit for bit, does
the gradient reach the output of every step, is there one denoiser call a step without guidance, at
the batch's size, and does `cfg_scale` guide on the textbook scale or is it refused. Writes
results/families_sweep.json.
"""

# ruff: noqa: ANN401

from __future__ import annotations

import argparse
import copy
import functools
import importlib
import inspect
import itertools
import json
import multiprocessing
import sys
import time
import traceback
import warnings
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import diffusers
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from offline_models import (  # noqa: E402
    match_image_tokens,
    resize_for_cosmos,
    small_edits,
    stand_ins,
)
from tiny_pipelines import _revive  # noqa: E402

from lit_distill.pipelines.components import call_parameters, denoisers  # noqa: E402
from lit_distill.pipelines.guidance import (  # noqa: E402
    OTHER_KINDS,
    describe_guidance,
    guidance,
    scale_argument,
)
from lit_distill.pipelines.hooks import counted_batches  # noqa: E402
from lit_distill.pipelines.rollout import run_pipeline  # noqa: E402

SECONDS = 120
"""Time limit of one test module."""

OURS = {"generator", "output_type", "return_dict", "num_inference_steps", "latents", "callback"}


REFUSALS = (
    "never called scheduler.step",
    "The `invert` method has to be called",
    "a list of prompts is not yet supported",
)
"""Errors that say why a pipeline can't be used."""

PLAIN = {
    "cfg_normalization": False,
    "enable_cfg_renorm": False,
    "guidance_rescale": 0.0,
    "audio_guidance_rescale": 0.0,
}
"""What is switched off, for it rescales the guided prediction."""


class NotBuiltError(Exception):
    """The test's components can't be made here."""


def find_testers(module: Any) -> list[Any]:
    """Return the classes of a test module that build a pipeline, one for each pipeline."""
    found: dict[str, Any] = {}
    for thing in vars(module).values():
        ours = isinstance(thing, type) and thing.__module__ == module.__name__
        pipeline = getattr(thing, "pipeline_class", None) if ours else None
        if isinstance(pipeline, type) and hasattr(thing, "get_dummy_components"):
            found.setdefault(pipeline.__name__, thing)
    return list(found.values())


class Trial:
    """One pipeline and the arguments of a small call."""

    def __init__(self, tester: Any) -> None:
        self.cls = tester.pipeline_class
        try:
            test = (
                tester()
                if "methodName" not in inspect.signature(tester).parameters
                else tester("run")
            )
            torch.manual_seed(0)
            with stand_ins():
                components = test.get_dummy_components()
            match_image_tokens(components)
            torch.manual_seed(0)
            for component in components.values():
                if isinstance(component, nn.Module):
                    _revive(component.float().eval())
            self.pipe = self.cls(**components)
            takes = inspect.signature(test.get_dummy_inputs).parameters
            self.inputs = test.get_dummy_inputs(*(["cpu"] if "device" in takes else []))
        except Exception as error:
            raise NotBuiltError(described(error)) from error
        self.pipe.set_progress_bar_config(disable=True)
        for component in self.pipe.components.values():
            if isinstance(component, nn.Module):
                component.requires_grad_(False)

        self.repeats, self.more = True, {}
        ways = itertools.product((True, False), ("latent", "pt", "np"))
        for self.listed, self.output_type in ways:  # the first that the pipeline knows
            try:
                self.expected = self.plain()
                again = zip(
                    tree_leaves(self.expected), tree_leaves(self.plain(seed=1)), strict=True
                )
                self.repeats = all(difference(a, b) == 0 for a, b in again)
                break
            except Exception as error:
                self.error = getattr(self, "error", error)

    def call(self) -> dict[str, Any]:
        """Return the call's arguments but for the guidance scale and what `rollout` sets."""
        given = {k: v for k, v in self.inputs.items() if k not in OURS}
        for name in (scale_argument(self.pipe), *OTHER_KINDS):
            given.pop(name, None)
        given |= {k: v for k, v in self.more.items() if k in call_parameters(self.pipe)}
        if isinstance(given.get("prompt"), str) and self.listed:
            given["prompt"] = [given["prompt"]]
        if "negative_prompt" in call_parameters(self.pipe) and "prompt" in given:
            text = given.get("negative_prompt")
            if text is None or isinstance(text, str):
                given["negative_prompt"] = [text or "a"] if self.listed else text or "a"
        for name in PLAIN.keys() & call_parameters(self.pipe):
            given[name] = PLAIN[name]
        mask = given.get("mask_image")  # many are black, so that nothing is painted
        if isinstance(mask, Tensor):
            given["mask_image"] = torch.ones_like(mask)
        elif mask is not None:
            size = getattr(mask, "size", (32, 32))
            given["mask_image"] = Image.new("L", size if isinstance(size, tuple) else (32, 32), 255)
        return copy.deepcopy(given)

    def steps(self) -> dict[str, Any]:
        """Return the number of steps."""
        return {"num_inference_steps": max(2, self.inputs.get("num_inference_steps", 2))}

    def plain(self, seed: int = 0) -> Any:
        """Return what `pipe()` returns as latents; `seed` is the global one."""
        torch.manual_seed(seed)
        call = self.call()
        with guidance(self.pipe, 1.0, 1, call) as given:
            given = {k: v for k, v in (call | given).items() if k != "negative_prompt"}
            return self.pipe(
                **given,
                **self.steps(),
                generator=[generator()],
                output_type=self.output_type,
                return_dict=False,
            )[0]

    def run(self, cfg_scale: float, grad: bool = False) -> Run:
        """Run the rollout."""
        return Run(self, cfg_scale, grad)


class Run:
    """A rollout: its states, the scheduler's inputs, what it returned, its denoiser's batches."""

    def __init__(self, trial: Trial, cfg_scale: float, grad: bool) -> None:
        pipe, self.states = trial.pipe, {}
        torch.manual_seed(0)
        call = trial.call()
        step = type(pipe.scheduler).step

        @functools.wraps(step)
        def noted(scheduler: Any, model_output: Any, *args: Any, **kwargs: Any) -> Any:
            # Cosmos makes its first step several times, the last time with guidance.
            if not self.states or getattr(scheduler, "step_index", 1) == 0:
                self.prediction = model_output
            return step(scheduler, model_output, *args, **kwargs)

        with ExitStack() as stack, torch.set_grad_enabled(grad):
            stack.enter_context(mock.patch.object(type(pipe.scheduler), "step", noted))
            self.batches = stack.enter_context(counted_batches(pipe))
            self.loop, self.output = run_pipeline(
                pipe,
                **call,
                **trial.steps(),
                generator=[generator()],
                output_type="latent" if grad else trial.output_type,
                cfg_scale=cfg_scale,
                on_step=self.note,
            )

    def note(self, loop: Any, latents: Tensor) -> Tensor:
        """Keep a state."""
        self.states[loop.done] = latents
        return latents


def generator() -> torch.Generator:
    """Return a generator with one seed."""
    return torch.Generator().manual_seed(0)


def described(error: BaseException) -> str:
    """Return an error in a line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:400]


def try_pipeline(tester: Any) -> dict[str, Any]:
    """Return what holds for one pipeline."""
    row: dict[str, Any] = {"pipeline": tester.pipeline_class.__name__, "test": tester.__module__}
    try:
        trial = Trial(tester)
    except NotBuiltError as error:
        return row | {"verdict": "not built", "why": str(error)}
    if not hasattr(trial, "expected"):
        refused = any(text in str(trial.error) for text in REFUSALS)
        verdict = "refused" if refused else "pipe() fails"
        return row | {"verdict": verdict, "why": described(trial.error)}
    try:
        row["guidance"] = describe_guidance(trial.pipe)
        row |= check(trial)
    except Exception as error:
        if any(text in str(error) for text in REFUSALS):
            return row | {"verdict": "refused", "why": described(error)}
        where = traceback.extract_tb(error.__traceback__)[-1]
        row |= {
            "verdict": "fails",
            "why": f"{described(error)} ({Path(where.filename).name}:{where.lineno})",
        }
        return row
    holds = all(row[key] is True for key in ("equal", "gradient", "one_call"))
    holds = holds and row["cfg"].startswith(("textbook", "refused"))
    if not trial.repeats:
        why = "two calls of pipe() with one seed differ: it draws noise outside its generator"
        return row | {"verdict": "refused", "why": why}
    if not trial.listed:
        return row | {
            "verdict": "refused",
            "why": "takes one prompt a call: " + described(trial.error),
        }
    return row | {"verdict": "holds" if holds else "fails"}


def check(trial: Trial) -> dict[str, Any]:
    """Return the checks of the module's docstring."""
    row: dict[str, Any] = {}
    one = trial.run(1.0)
    pairs = list(zip(tree_leaves(trial.expected), tree_leaves(one.output), strict=True))
    row["equal"] = all(torch.equal(torch.as_tensor(a), torch.as_tensor(b)) for a, b in pairs)
    if not row["equal"]:
        row["difference"] = max(difference(a, b) for a, b in pairs)
    row["result"] = relation(one.loop.latents, tree_leaves(one.output)[0])
    row["repeats"] = trial.repeats
    row["total"] = one.loop.total
    row["steps"], row["calls"], row["batch"] = one.loop.done, one.loop.calls, max(one.batches)
    row["one_call"] = one.loop.calls <= one.loop.done and row["batch"] == len(one.loop.latents)
    if not row["one_call"]:
        row["why"] = f"{row['calls']} calls of batch {row['batch']} in {row['steps']} steps"
    guided = guides(trial, one)
    if guided["cfg"] == "does nothing" and "max_sequence_length" in trial.inputs:
        trial.inputs["max_sequence_length"] = 512  # it cuts all but the template off
        one = trial.run(1.0)
        guided = guides(trial, one)
    row |= guided
    for denoiser in denoisers(trial.pipe).values():
        denoiser.requires_grad_(True)
    trained = trial.run(1.0, grad=True)
    row["grad_moves"] = difference(trained.loop.latents, one.loop.latents)
    row["gradient"] = reaches_every_step(trained)
    return row


def relation(latents: Tensor, output: Any) -> str:
    """Return how what the pipeline returns is made of the last step's output."""
    output = torch.as_tensor(output)
    if output.shape == latents.shape and torch.equal(output, latents):
        return "the same"
    if output.numel() != latents.numel():
        return f"{list(output.shape)} of {list(latents.shape)}"
    same = torch.equal(output.flatten().sort().values, latents.flatten().sort().values)
    return "permuted" if same else "another"


def difference(a: Any, b: Any) -> float:
    """Return the largest difference."""
    a, b = (torch.as_tensor(each).detach().float() for each in (a, b))
    return (a - b).abs().max().item()


def reaches_every_step(run: Run) -> bool:
    """Return whether the gradient of the result reaches the output of every step, and is finite."""
    final = run.loop.latents
    states = list(run.states.values())[:-1]
    if not final.requires_grad or not all(state.requires_grad for state in states):
        return False
    weights = torch.randn(final.shape, generator=generator())
    gradients = torch.autograd.grad(
        (final.float() * weights).sum(), [*states, final], allow_unused=True
    )
    return all(g is not None and g.isfinite().all() and g.any() for g in gradients)


def guides(trial: Trial, one: Run) -> dict[str, Any]:
    """Return whether `cfg_scale` is on the textbook scale, by the states after the first step."""
    try:
        trial.more |= OTHER_KINDS
        three = trial.run(3.0)
    except ValueError as error:
        if "cfg_scale" in str(error):
            return {"cfg": f"refused: {error}"}
        raise
    four = trial.run(4.0)
    trial.more = {}
    # The network's guided predictions in the first step: schedulers may clip what they make of it.
    first, third, fourth = (run.prediction.double() for run in (one, three, four))
    there = (third - first).norm() / first.norm()
    bend = (third - first) / 2 - (fourth - third)
    back = 2 * bend.norm() / (third - first).norm().clamp(min=1e-30)
    row = {"cfg_calls": len(three.batches), "cfg_batch": max(three.batches), "moved": there.item()}
    row["nonlinear"] = back.item()
    if there < 1e-6:
        return row | {"cfg": "does nothing"}
    if back < 1e-2:
        return row | {"cfg": "textbook"}
    norms = [run.prediction.double().norm(dim=-1) for run in (one, three, four)]
    kept = all(torch.allclose(norm, norms[0], rtol=1e-3) for norm in norms)
    return row | {"cfg": "textbook, rescaled by the pipeline" if kept else "another scale"}


def try_module(name: str) -> list[dict[str, Any]]:
    """Return what holds for the pipelines of one test module."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    resize_for_cosmos()
    small_edits()
    diffusers.utils.logging.set_verbosity(50)
    try:
        with stand_ins():
            module = importlib.import_module(name)
    except BaseException as error:
        return [{"pipeline": name, "test": name, "verdict": "not built", "why": described(error)}]
    torch.use_deterministic_algorithms(False)
    return [try_pipeline(tester) for tester in find_testers(module)]


def worker(name: str, queue: Any) -> None:
    """Put the rows of `try_module` into a queue."""
    queue.put(try_module(name))


def limited(name: str) -> list[dict[str, Any]]:
    """Return `try_module`'s rows from a process that may fail or hang."""
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=worker, args=(name, queue))
    process.start()
    end = time.monotonic() + SECONDS
    while process.is_alive() and queue.empty() and time.monotonic() < end:
        time.sleep(0.05)
    if not queue.empty():
        rows = queue.get()
    else:
        rows = [
            {
                "pipeline": name,
                "test": name,
                "verdict": "not built",
                "why": "took too long, or died",
            }
        ]
    process.kill()
    process.join()
    return rows


def main() -> None:
    """Try all pipelines, print a line for each, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("checkout", type=Path)
    parser.add_argument(
        "-k", default="", help="part of a test module's name; the other rows of FILE stay"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/families_sweep.json")
    arguments = parser.parse_args()
    sys.path.insert(0, str(arguments.checkout))
    files = sorted((arguments.checkout / "tests/pipelines").glob("*/test_*.py"))
    names = [".".join(f.relative_to(arguments.checkout).with_suffix("").parts) for f in files]
    rows: list[dict[str, Any]] = []
    if arguments.k and arguments.out.exists():  # the others' rows stay
        kept = json.loads(arguments.out.read_text(encoding="utf-8"))
        rows = [row for row in kept if arguments.k not in row["test"]]
    with stand_ins():
        importlib.import_module("tests.pipelines.test_pipelines_common")
    for name in names:
        if arguments.k in name:
            for row in limited(name):
                rows.append(row)
                print(row["verdict"], json.dumps(row), flush=True)
    arguments.out.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    verdicts = [row["verdict"] for row in rows]
    print({verdict: verdicts.count(verdict) for verdict in sorted(set(verdicts))})


if __name__ == "__main__":
    main()
