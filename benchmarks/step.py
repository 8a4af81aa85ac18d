"""Time, memory and FLOPs of a training step: the bare rollout beside Lightning's Trainer.

    python benchmarks/step.py [--layers 4 --width 384 --image_tokens 1024 --text_tokens 64]

A Qwen-Image transformer of random weights, with the embedded pipeline's encoders, is trained as
LoRA in each checkpointing mode. After every step of the Trainer the same step is made without
Lightning: rollout, mean squared error, backward pass, AdamW; same weights (the learning rate is 0),
prompt, noise and target, so both have the same loss, which is checked. Reported are

* seconds: of the whole process's CPU where there is no GPU, so run it on one thread
  (OMP_NUM_THREADS=1); wall time on a GPU. The ratio is the median over neighbouring steps;
* saved: bytes that live after the forward pass but did not before: what the backward pass needs;
* peak: the most bytes that lived at any moment of the step besides what lived before it (weights,
  optimizer); counted tensor by tensor, so not subject to allocators or other programs;
* FLOPs: of matrix products and attention, recomputation included, by torch's FlopCounterMode.

The curve over the number of steps is counted, not timed.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import statistics
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path
from typing import Any

import diffusers
import lightning
import lightning.pytorch as pl
import pandas as pd
import torch
import transformers
from lightning.pytorch.loggers import CSVLogger
from safetensors.torch import save_file
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import (
    FlopCounterMode,
    sdpa_backward_flop_count,
    sdpa_flop_count,
)

from lit_distill import DirectDistill, DistillDataModule, load_pipeline, rollout
from lit_distill.families import DTYPES

MODES = ("none", "block", "step", "nested")
HEAD = 128  # width of an attention head, as published
CHANNELS = 16  # of a latent token: 4, of 2 x 2 positions
PIXELS = 8  # a token's side in pixels with the embedded VAE
MIB = 2**20


def make_pipeline(options: argparse.Namespace) -> Any:  # noqa: ANN401
    """Return a QwenImagePipeline with a random transformer of the wanted size."""
    torch.manual_seed(0)
    pipe = load_pipeline("tiny-digits", torch_dtype=options.torch_dtype)
    kind = type(pipe.transformer)
    config = dict(pipe.transformer.config) | {
        "num_layers": options.layers,
        "num_attention_heads": options.width // HEAD,
        "attention_head_dim": HEAD,
        "axes_dims_rope": (16, 56, 56),
    }
    torch.set_default_dtype(DTYPES[options.torch_dtype])
    pipe.register_modules(transformer=kind.from_config(config).eval())
    torch.set_default_dtype(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def make_prompt(pipe: Any, tokens: int) -> str:  # noqa: ANN401
    """Return a prompt that the pipeline makes `tokens` tokens of."""
    length = {n: pipe.encode_prompt(" ".join(["red"] * n))[0].shape[1] for n in (1, 2)}
    return " ".join(["red"] * (1 + (tokens - length[1]) // (length[2] - length[1])))


def forward_flops(options: argparse.Namespace, text_width: int) -> int:
    """Return the floating point operations of one denoiser call: two a multiplication."""
    width, rank = options.width, options.rank
    tokens = options.image_tokens + options.text_tokens
    block = 12 * width**2 * tokens  # q, k, v, out and the MLP of four times the width
    block += 2 * 6 * width**2  # modulation of image and text, once a sample
    block += rank * 18 * width * tokens  # LoRA of these: four of (w, w), one of (w, 4w) and back
    block += 2 * tokens**2 * width
    ends = (2 * CHANNELS * options.image_tokens + text_width * options.text_tokens) * width
    ends += (256 + width + 2 * width) * width  # the time's embedding, the last norm's modulation
    return 2 * options.batch_size * (options.layers * block + ends)


def _attention(*shapes: Any, **kwargs: Any) -> int:  # noqa: ANN401
    return sdpa_flop_count(*shapes[:3])  # query, key, value


def _attention_backward(*shapes: Any, **kwargs: Any) -> int:  # noqa: ANN401
    return sdpa_backward_flop_count(*shapes[:4])  # gradient, query, key, value


# Which torch counts on GPUs only.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
}


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that were made since and still live, each storage once.

    `torch.autograd.graph.saved_tensors_hooks` misses what checkpointing keeps by itself: the
    keyword arguments of a call that is to be run again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = 0
        self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Run the operation and note what it has made."""
        made = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        for tensor in _tensors(made):
            storage = tensor.untyped_storage()
            if storage._cdata in self._known or storage._cdata in given:
                continue  # a view
            self._known.add(storage._cdata)
            self.now += storage.nbytes()
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._forget, storage._cdata, storage.nbytes())
        return made

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


def _tensors(tree: Any) -> list[torch.Tensor]:  # noqa: ANN401
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


class Bytes:
    """Counts the memory of a step, as a context around it."""

    def __enter__(self) -> Bytes:
        self.saved = 0
        self.live = LiveBytes()
        self.live.__enter__()
        return self

    def forward_done(self) -> None:
        """Note what waits for the backward pass."""
        self.saved = self.live.now

    def __exit__(self, *exception: object) -> None:
        self.live.__exit__(*exception)

    def result(self) -> dict[str, float]:
        """Return the counts."""
        return {
            "saved_MiB": round(self.saved / MIB, 2),
            "peak_MiB": round(self.live.peak / MIB, 2),
        }


class Flops(FlopCounterMode):
    """Counts the operations of a step; never in one with `Bytes`, for it keeps tensors alive."""

    def __init__(self) -> None:
        super().__init__(display=False, custom_mapping=_CPU_ATTENTION)

    def forward_done(self) -> None:
        """Go on: the backward pass is counted too."""

    def result(self) -> dict[str, float]:
        """Return the count."""
        return {"GFLOP": round(self.get_total_flops() / 1e9, 3)}


COUNTERS: tuple[type[Bytes | Flops], ...] = (Bytes, Flops)


class Bare:
    """The step without Lightning."""

    def __init__(self, pipe: Any, steps: int, mode: Any, options: argparse.Namespace) -> None:  # noqa: ANN401
        trained = [p for p in pipe.transformer.parameters() if p.requires_grad]
        self.pipe, self.steps, self.mode, self.options = pipe, steps, mode, options
        self.optimizer = torch.optim.AdamW(trained, lr=0.0, weight_decay=0.0)
        self.target = options.target.to(pipe.transformer.device).expand(options.batch_size, -1, -1)

    def __call__(self, counter: Bytes | Flops | None = None) -> float:
        """Make a step; return its loss."""
        latents = rollout(
            self.pipe,
            prompt=[self.options.prompt] * self.options.batch_size,
            num_inference_steps=self.steps,
            generator=[torch.Generator().manual_seed(0) for _ in range(self.options.batch_size)],
            checkpointing=self.mode,
            **self.options.size,
        )
        loss = (latents.float() - self.target).pow(2).mean()
        if counter:
            counter.forward_done()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(loss.detach())

    def counted(self) -> dict[str, float]:
        """Make a step for each counter; return the counts."""
        counts = {}
        for kind in COUNTERS:
            with kind() as counter:
                self(counter)
            counts |= counter.result()
        return counts


def clock() -> float:
    """Return seconds: of this process's CPU, or of the wall where work is done on a GPU."""
    if not torch.cuda.is_available():
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


class Interleaved(pl.Callback):
    """Makes a bare step after each of the Trainer's. The first pair warms up, two are counted."""

    def __init__(self, mode: str, options: argparse.Namespace) -> None:
        self.mode, self.options = mode, options
        self.seconds: list[tuple[float, float]] = []
        self.counts: dict[str, dict[str, float]] = {"bare": {}, "trainer": {}}
        self._counter: Bytes | Flops | None = None
        self._begun = 0.0

    def on_train_start(self, trainer: pl.Trainer, module: Any) -> None:  # noqa: ANN401
        """Make the bare step ready."""
        self.bare = Bare(module.pipe, self.options.steps, self.mode, self.options)

    def on_train_batch_start(self, trainer: pl.Trainer, *args: Any) -> None:  # noqa: ANN401
        """Begin to count, once the optimizer has its state."""
        if 1 <= trainer.global_step <= len(COUNTERS):
            self._counter = COUNTERS[trainer.global_step - 1]()
            self._counter.__enter__()

    def on_before_backward(self, *args: Any) -> None:  # noqa: ANN401
        """Tell the counter."""
        if self._counter:
            self._counter.forward_done()

    def on_train_batch_end(
        self,
        trainer: pl.Trainer,
        module: Any,  # noqa: ANN401
        outputs: Any,  # noqa: ANN401
        *args: Any,  # noqa: ANN401
    ) -> None:
        """Stop the Trainer's clock, make the bare step, and start it again."""
        ended = clock()
        counter, self._counter = self._counter, None
        if counter:
            counter.__exit__(None, None, None)
            self.counts["trainer"] |= counter.result()
            with type(counter)() as own:
                loss = self.bare(own)
            self.counts["bare"] |= own.result()
        else:
            loss = self.bare()
            if trainer.global_step > 1 + len(COUNTERS):
                self.seconds.append((clock() - ended, ended - self._begun))
        if not math.isclose(loss, float(outputs["loss"]), rel_tol=1e-5):
            raise RuntimeError(f"the Trainer's loss is {outputs['loss']}, the bare step's {loss}")
        self._begun = clock()


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
    module.backbone._load = lambda: make_pipeline(options)  # type: ignore[method-assign]
    pairs = 1 + len(COUNTERS) + options.repeats
    interleaved = Interleaved(mode, options)
    trainer = pl.Trainer(
        max_steps=pairs,
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        callbacks=[interleaved],
        precision="bf16-mixed" if options.torch_dtype == "bfloat16" else "32-true",
        devices=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
    )
    data = DistillDataModule(
        str(write_table(folder, options)), batch_size=options.batch_size, repeat=pairs
    )
    trainer.fit(module, datamodule=data)
    bare, ours = zip(*interleaved.seconds, strict=True)
    result: dict[str, Any] = {
        "bare": {"seconds": round(statistics.median(bare), 4)} | interleaved.counts["bare"],
        "trainer": {"seconds": round(statistics.median(ours), 4)} | interleaved.counts["trainer"],
        "trainer_over_bare": round(statistics.median(b / a for a, b in interleaved.seconds), 4),
    }
    result["curve"] = {}
    for steps in options.curve:
        known = interleaved.counts["bare"] if steps == options.steps else None
        counts = known or Bare(module.pipe, steps, mode, options).counted()
        result["curve"][str(steps)] = counts
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
    """Draw what is stored and computed over the number of steps."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    dashes = dict(zip(MODES, ("-", "--", ":", "-."), strict=True))  # block and step compute alike
    labels = {
        "saved_MiB": "saved for the backward pass, MiB",
        "peak_MiB": "peak beside weights, MiB",
        "GFLOP": "GFLOP a step",
    }
    for axes, (name, label) in zip(figure.subplots(1, 3), labels.items(), strict=True):
        for mode, found in result["modes"].items():
            steps = [int(count) for count in found["curve"]]
            values = [each[name] for each in found["curve"].values()]
            axes.plot(steps, values, dashes[mode], marker="o", markersize=4, label=mode)
        axes.set(xlabel="inference steps", ylabel=label)
        axes.set_xscale("log", base=2)
        axes.set_yscale("log", base=2)
        axes.set_xticks(steps, [str(step) for step in steps])
        axes.yaxis.set_major_formatter("{x:.3g}")
        axes.grid(True, which="both", alpha=0.2)
    axes.legend(title="checkpointing")
    figure.savefig(path, dpi=110)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Return the options of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--width", type=int, default=384, help=f"a multiple of {HEAD}")
    parser.add_argument("--image_tokens", type=int, default=1024, help="a square number")
    parser.add_argument("--text_tokens", type=int, default=64)
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--steps", type=int, default=4, help="inference steps that are timed")
    parser.add_argument("--curve", type=int, nargs="+", default=[1, 2, 4, 8], help="... counted")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3, help="timed pairs of steps")
    parser.add_argument("--checkpointing", nargs="+", default=MODES, choices=MODES)
    cuda = torch.cuda.is_available()
    parser.add_argument("--torch_dtype", default="bfloat16" if cuda else "float32", choices=DTYPES)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--attention_backend", help="as model.attention_backend")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/step.json"))
    options = parser.parse_args(arguments)
    side = math.isqrt(options.image_tokens)
    if side**2 != options.image_tokens or options.width % HEAD:
        parser.error(f"--image_tokens must be a square number, --width a multiple of {HEAD}")
    options.size = {"height": side * PIXELS, "width": side * PIXELS}
    return options


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, write and print the figures; return them."""
    options = parse(arguments)
    sizes = {k: v for k, v in vars(options).items() if k not in ("out", "size", "checkpointing")}
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    pipe = make_pipeline(options)
    options.prompt = make_prompt(pipe, options.text_tokens)
    with torch.no_grad():
        text = pipe.encode_prompt(options.prompt)[0]
    assert text.shape[1] == options.text_tokens, text.shape
    generator = torch.Generator().manual_seed(1)
    options.target = torch.randn(1, options.image_tokens, CHANNELS, generator=generator)
    del pipe
    cuda = torch.cuda.is_available()
    result: dict[str, Any] = {
        "command": " ".join(["python benchmarks/step.py", *(arguments or sys.argv[1:])]),
        "device": torch.cuda.get_device_name() if cuda else f"CPU, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "seconds": "wall" if cuda else "CPU",
        "versions": {m.__name__: m.__version__ for m in (torch, diffusers, lightning)},
        "sizes": sizes,
        "forward_GFLOP": round(options.steps * forward_flops(options, text.shape[2]) / 1e9, 3),
        "modes": {},
    }
    columns = ("", "bare s", "trainer s", "ratio", "saved MiB", "peak MiB", "GFLOP")
    print("".join(f"{column:>10}" for column in columns))
    for mode in options.checkpointing:
        with tempfile.TemporaryDirectory() as folder:
            found = measure(mode, Path(folder), options)
        result["modes"][mode] = found
        bare, ours = found["bare"], found["trainer"]
        values = (bare["seconds"], ours["seconds"], found["trainer_over_bare"])
        values += (ours["saved_MiB"], ours["peak_MiB"], ours["GFLOP"])
        print(f"{mode:>10}" + "".join(f"{value:10.3f}" for value in values), flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, options.out.with_suffix(".png"))
    return result


if __name__ == "__main__":
    main()
