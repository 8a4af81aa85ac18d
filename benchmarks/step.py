"""Time, memory and FLOPs of a training step: the bare rollout, Lightning's Trainer, the reference.

    python benchmarks/step.py [--layers 4 --width 384 --image_tokens 1024] [--reference PATH]

This trains a LoRA on a Qwen-Image transformer with random weights and the embedded pipeline's
encoders, in each checkpointing mode. After every step of the Trainer the same step is made without
Lightning (rollout, mean squared error, backward pass, AdamW). With a checkout of DiffSynth-Studio
it is also made by that. All use the same weights (the learning rate is 0), prompt embeddings,
noise, target and sigmas, so all must have the same loss. Otherwise the benchmark stops. It reports

* seconds: CPU time of the whole process where there is no GPU, so run it on one thread
  (OMP_NUM_THREADS=1). Wall time on a GPU. Ratios are medians over neighbouring steps.
* saved: bytes that are stored for the backward pass, that is, allocated in the forward pass and not
  freed.
* peak: the most bytes allocated at any moment of the step, besides those from before it (weights,
  optimizer). It is counted tensor by tensor, so allocators and other programs don't affect it.
* FLOPs: of matrix products and attention, including recomputation, by torch's FlopCounterMode.
* overhead: seconds in the loader, logging and the gradient's norm, as a share of the step.

The reference checkpoints blocks or nothing. Mode none is compared with the reference without
checkpointing, all other modes with its checkpointed blocks. Curves over steps, batch size,
resolution and layers are counted, not timed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import diffusers
import lightning
import lightning.pytorch as pl
import pandas as pd
import torch
import transformers
from bare import HEAD, Bare, bare_step, counted, make_pipeline, make_prompt, varied
from counters import COUNTERS, Bytes, Flops, forward_flops
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.profilers import Profiler
from safetensors.torch import save_file

from lit_distill import DirectDistill, DistillDataModule
from lit_distill.pipelines.loading import DTYPES

MODES = ("none", "selective", "block", "step", "nested")
CURVES = {
    "steps": [1, 2, 4, 8],
    "batch_size": [1, 2, 4],
    "image_tokens": [64, 256, 1024],
    "layers": [2, 4, 8],
}
OVERHEAD = (
    "[_TrainingEpochLoop].train_dataloader_next",
    "[LightningModule]DirectDistill.on_before_optimizer_step",
)


def clock() -> float:
    """Return seconds: CPU time of this process, or wall time if a GPU does the work."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Watch(Profiler):
    """CPU seconds of chosen actions of the Trainer, step by step."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[float] = []
        self.now = 0.0
        self._begun: dict[str, float] = {}

    def start(self, action_name: str) -> None:
        """Record the start."""
        if action_name in OVERHEAD:
            self._begun[action_name] = time.process_time()

    def stop(self, action_name: str) -> None:
        """Add the time since the start."""
        if action_name in self._begun:
            self.now += time.process_time() - self._begun.pop(action_name)


class TimedLogger(CSVLogger):
    """Logger that adds its seconds to a watch."""

    watch: Watch

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        """Log."""
        begun = time.process_time()
        super().log_metrics(*args, **kwargs)
        self.watch.now += time.process_time() - begun

    def save(self) -> None:
        """Write the logged values."""
        begun = time.process_time()
        super().save()
        self.watch.now += time.process_time() - begun


class Interleaved(pl.Callback):
    """Makes the other steps after each step of the Trainer.

    The first step warms up. Two further steps are counted instead of timed.
    """

    def __init__(self, mode: str, options: argparse.Namespace, watch: Watch) -> None:
        self.mode, self.options, self.watch = mode, options, watch
        self.seconds: list[dict[str, float]] = []
        self.counts: dict[str, dict[str, float]] = {}
        self._counter: Bytes | Flops | None = None
        self._begun = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:  # noqa: ANN401
        """Prepare the other steps."""
        bare = Bare(module.pipe, self.mode, self.options)
        self.others: dict[str, Any] = {"bare": bare}
        if self.options.reference:
            from reference import ReferenceStep

            self.others["reference"] = ReferenceStep(
                self.options.reference, module.pipe, bare.inputs(), blocks=self.mode != "none"
            )

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:  # noqa: ANN401
        """Start to count, once the optimizer has its state."""
        if 1 <= trainer.global_step <= len(self.options.counters):
            self._counter = self.options.counters[trainer.global_step - 1]()
            self._counter.__enter__()

    def on_before_backward(self, *args: Any) -> None:  # noqa: ANN401
        """Notify the counter."""
        if self._counter:
            self._counter.forward_done()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: Any,  # noqa: ANN401
        outputs: Any,  # noqa: ANN401
        *args: Any,  # noqa: ANN401
    ) -> None:
        """Stop the Trainer's clock, make the other steps, and restart it."""
        seconds = {"trainer": clock() - self._begun}
        counter, self._counter = self._counter, None
        if counter:
            counter.__exit__(None, None, None)
            self.counts.setdefault("trainer", {}).update(counter.result())
        for name, step in self.others.items():
            begun = clock()
            if counter:
                with type(counter)() as own:
                    loss = step(own)
                self.counts.setdefault(name, {}).update(own.result())
            else:
                loss = step()
            seconds[name] = clock() - begun
            single = self.options.torch_dtype == "float32"
            close = (1e-5 if name == "bare" else 1e-4) if single else 2e-2
            if not math.isclose(loss, float(outputs["loss"]), rel_tol=close):
                raise RuntimeError(f"the Trainer's loss is {outputs['loss']}, of {name}: {loss}")
        if trainer.global_step > 1 + len(self.options.counters):
            self.seconds.append(seconds | {"overhead": self.watch.now})
        self.watch.now = 0.0
        self._begun = clock()

    def result(self) -> dict[str, Any]:
        """Return seconds, counts and ratios."""
        names = ["trainer", *self.others]
        found: dict[str, Any] = {
            name: {"seconds": round(statistics.median(s[name] for s in self.seconds), 4)}
            | self.counts.get(name, {})
            for name in names
        }
        for name in self.others:
            ratio = statistics.median(s["trainer"] / s[name] for s in self.seconds)
            found[f"trainer_over_{name}"] = round(ratio, 4)
        share = statistics.median(s["overhead"] / s["trainer"] for s in self.seconds)
        return found | {"overhead": round(share, 5)}


def measure(mode: str, folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of one checkpointing mode."""
    module = DirectDistill(
        "random",
        torch_dtype=options.torch_dtype,
        lora={"r": options.rank},
        scheduler={"shift_terminal": None},  # with which one step is impossible
        checkpointing=mode,  # type: ignore[arg-type]
        preflight=False,
        compile=options.compile,
        attention_backend=options.attention_backend,
        optimizer=lambda params: torch.optim.AdamW(params, lr=0.0, weight_decay=0.0),
    )
    module.loader.base = lambda: make_pipeline(options)  # type: ignore[method-assign]
    steps = 1 + len(options.counters) + options.repeats
    watch, logger = Watch(), TimedLogger(folder)
    logger.watch = watch
    interleaved = Interleaved(mode, options, watch)
    trainer = pl.Trainer(
        max_steps=steps,
        logger=logger,
        log_every_n_steps=1,
        callbacks=[interleaved],
        profiler=watch,
        precision="bf16-mixed" if options.torch_dtype == "bfloat16" else "32-true",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = DistillDataModule(
        str(write_table(folder, options)), batch_size=options.batch_size, repeat=steps
    )
    trainer.fit(module, datamodule=data)
    result = interleaved.result()
    result["curves"] = {
        name: {
            str(value): result["bare"]
            if value == getattr(options, name)
            else counted(bare_step(mode, varied(options, name, value)))
            for value in getattr(options, f"curve_{name}")
        }
        for name in CURVES
    }
    return result


def write_table(folder: Path, options: argparse.Namespace) -> Path:
    """Write the rows that the Trainer reads."""
    save_file({"latents": options.target[0].contiguous()}, folder / "target.safetensors")
    row = {"latents": "target.safetensors", "prompt": options.prompt, "seed": 0}
    row |= {"rand_device": "cpu", "num_inference_steps": options.steps, "cfg_scale": 1}
    table = pd.DataFrame([row | options.size] * options.batch_size)
    table.to_csv(folder / "metadata.csv", index=False)
    return folder / "metadata.csv"


def plot(result: dict[str, Any], path: Path) -> None:
    """Plot bytes and FLOPs over steps, batch size, resolution and layers."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 7), layout="constrained")
    dashes = dict(zip(MODES, ("-", (0, (3, 1)), "--", ":", "-."), strict=True))  # some are alike
    names = {"steps": "inference steps", "batch_size": "batch size"}
    names |= {"image_tokens": "image tokens", "layers": "layers"}
    labels = {"saved_MiB": "saved, MiB", "peak_MiB": "peak beside weights, MiB", "GFLOP": "GFLOP"}
    for row, (label, unit) in zip(figure.subplots(3, 4), labels.items(), strict=True):
        for axes, (name, title) in zip(row, names.items(), strict=True):
            ticks = [int(value) for value in next(iter(result["modes"].values()))["curves"][name]]
            for mode, found in result["modes"].items():
                values = [each[label] for each in found["curves"][name].values()]
                axes.plot(ticks, values, ls=dashes[mode], marker="o", markersize=3, label=mode)
            axes.set(xlabel=title, ylabel=unit)
            axes.set_xscale("log", base=2)
            axes.set_yscale("log", base=2)
            axes.set_xticks(ticks, [str(tick) for tick in ticks])
            axes.yaxis.set_major_formatter("{x:.3g}")
            axes.grid(True, which="both", alpha=0.2)
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, title="checkpointing", loc="outside lower center", ncols=5)
    figure.savefig(path, dpi=90)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384, help=f"a multiple of {HEAD}")
    parser.add_argument("--image_tokens", type=int, default=1024, help="a square number")
    parser.add_argument("--text_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="inference steps that are timed")
    for name, values in CURVES.items():
        about = f"{name} of the curve"
        parser.add_argument(f"--curve_{name}", type=int, nargs="*", default=values, help=about)
    parser.add_argument("--reference", type=Path, help="checkout of DiffSynth-Studio")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="timed pairs of steps")
    parser.add_argument("--checkpointing", nargs="+", default=MODES, choices=MODES)
    cuda = torch.cuda.is_available()
    parser.add_argument("--torch_dtype", default="bfloat16" if cuda else "float32", choices=DTYPES)
    about = "compile the blocks; then nothing is counted"
    parser.add_argument("--compile", action="store_true", help=about)
    parser.add_argument("--attention_backend", help="as model.attention_backend")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    options = parser.parse_args(arguments)
    side = math.isqrt(options.image_tokens)
    if side**2 != options.image_tokens or options.width % HEAD:
        parser.error(f"--image_tokens must be a square number, --width a multiple of {HEAD}")
    # Compiled code does not run under them.
    options.counters = () if options.compile else COUNTERS
    if options.compile:
        vars(options).update({f"curve_{name}": [] for name in CURVES})
    if options.reference and options.batch_size != 1:
        parser.error("--reference: its batch size is 1")
    return varied(options, "steps", options.steps)


def commit(checkout: Path) -> str:
    """Return the commit of a checkout."""
    command = ["git", "-C", str(checkout), "rev-parse", "HEAD"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, write, print and return the figures."""
    options = parse(arguments)
    left_out = ("counters", "out", "size", "checkpointing", "target", "reference")
    sizes = {name: value for name, value in vars(options).items() if name not in left_out}
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipe = make_pipeline(options)
    options.prompt = make_prompt(pipe, options.text_tokens)
    with torch.no_grad():
        text = pipe.encode_prompt(options.prompt)[0]
    assert text.shape[1] == options.text_tokens, text.shape
    del pipe
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/step.py", *(arguments or sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "seconds": "wall" if cuda else "CPU",
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, lightning)},
        "sizes": sizes,
        "reference": commit(options.reference) if options.reference else None,
        "forward_GFLOP": round(options.steps * forward_flops(options, text.shape[2]) / 1e9, 3),
        "modes": {},
    }
    columns = ["", "trainer s", "/ bare", "/ reference", "overhead"]
    print("".join(f"{column:>12}" for column in [*columns, "saved MiB", "peak MiB", "GFLOP"]))
    for mode in options.checkpointing:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(mode, Path(folder), options)
        result["modes"][mode] = found
        ours = found["trainer"]
        values = [ours["seconds"], found["trainer_over_bare"]]
        values += [found.get("trainer_over_reference", math.nan), found["overhead"]]
        values += [ours.get(name, math.nan) for name in ("saved_MiB", "peak_MiB", "GFLOP")]
        print(f"{mode:>12}" + "".join(f"{value:12.3f}" for value in values), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    if all(getattr(options, f"curve_{name}") for name in CURVES):
        plot(result, options.out.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
