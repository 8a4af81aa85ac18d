"""The whole way of a model at published shapes: calls, time and memory of every stage.

    python benchmarks/journey.py sd-1.5 [--stages generate test] [--out FILE]

A pipeline with the published configuration and random weights in bfloat16 goes through preflight,
generate, check, fit, test and export by the command line, and its export into plain diffusers.
Stable Diffusion 1.5 is whole, but for its safety checker. The others have a few layers at their
full width, as `LAYERS` says, in their text encoders, too. Tokenizers are small, since no published
vocabulary is at hand. Sizes and numbers of steps are small. Every stage is a process of its own:

* *calls*: denoiser calls, those of other modules' stand-ins excluded,
* *encoder calls*, *decodes*: calls of the text encoders, and of the VAE's decoder,
* *peak*: the most that tensors held at once, and *base*: the pipeline's weights,
* *resident*: the process's largest resident memory (VmHWM), with libraries and mapped files.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

MIB = 2**20

LAYERS: dict[str, dict[str, dict[str, Any]]] = {
    "sd-1.5": {},
    "sdxl": {
        "unet": {"transformer_layers_per_block": [1, 1, 1], "layers_per_block": 1},
        "text_encoder": {"num_hidden_layers": 2},
        "text_encoder_2": {"num_hidden_layers": 2},
    },
    "qwen-image": {
        "transformer": {"num_layers": 2},
        "text_encoder": {"num_hidden_layers": 1, "vision_config": {"depth": 1}},
    },
    "flux.1-dev": {
        "transformer": {"num_layers": 1, "num_single_layers": 1},
        "text_encoder": {"num_hidden_layers": 2},
        "text_encoder_2": {"num_layers": 1},
    },
}
"""What of each published configuration is changed."""

PROMPTS = ("a red seven on a blue background", "a photo of a cat that sleeps on a green sofa")

STAGES = (
    *("preflight", "generate", "generate --offload model", "check"),
    *("fit --model.preflight false", "fit", "test", "test --offload model"),
    *("export", "export --format merged", "plain diffusers"),
)


# The pipeline


def make_pipeline(name: str, published: Path, folder: Path) -> None:
    """Save a pipeline of the published shapes with random weights."""
    import diffusers
    import transformers

    index = json.loads((published / name / "model_index.json").read_text())
    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    parts: dict[str, Any] = {}
    for key, entry in index.items():
        if not isinstance(entry, list):
            continue
        path = next(iter((published / name / key).glob("*.json")), None)
        config = json.loads(path.read_text()) if path else {}
        for field, value in LAYERS[name].get(key, {}).items():
            config[field] = {**config[field], **value} if isinstance(value, dict) else value
        if key in ("safety_checker", "feature_extractor"):
            parts[key] = None
        elif key.startswith("tokenizer"):
            parts[key] = _tokenizer(entry[1], second=key.endswith("_2"))
        elif entry[0] == "diffusers":
            parts[key] = getattr(diffusers, entry[1]).from_config(config)
        else:
            kind = getattr(transformers, entry[1])
            parts[key] = kind(kind.config_class.from_dict(config))
    torch.set_default_dtype(torch.float32)
    options = {"requires_safety_checker": False} if "safety_checker" in parts else {}
    pipe = getattr(diffusers, index["_class_name"])(**parts, **options)
    with torch.no_grad():
        for module in (part for part in parts.values() if isinstance(part, nn.Module)):
            for parameter in module.parameters():  # output layers that begin at zero
                if not parameter.any():
                    parameter.normal_(std=0.02)
    pipe.to(torch.bfloat16).save_pretrained(folder)


def _tokenizer(kind: str, second: bool) -> Any:  # noqa: ANN401
    import tiny_pipeline_parts as parts

    if kind.startswith("Qwen"):
        return parts.qwen_tokenizer()
    if kind.startswith("T5"):
        return parts.t5_tokenizer()
    return parts.clip_tokenizer("!") if second else parts.clip_tokenizer()


# One stage, in a process of its own


def measured(folder: Path, arguments: list[str]) -> dict[str, Any]:
    """Run a command of lit-distill, or plain diffusers, and return what it took."""
    from held_memory import HeldBytes

    calls = _counted(folder)
    started = time.perf_counter()
    with HeldBytes() as held:
        _plain(*arguments[1:]) if arguments[0] == "plain" else _command(arguments)
    status = Path("/proc/self/status").read_text().splitlines()
    resident = next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 1024
    return {
        "calls": calls["denoiser"],
        "encoder calls": calls["encoder"],
        "decodes": calls["decode"],
        "seconds": round(time.perf_counter() - started, 1),
        "peak MiB": round(held.peak / MIB),
        "resident MiB": round(resident),
    }


def _command(arguments: list[str]) -> None:
    from lit_distill.cli import main

    main(arguments)


def _plain(model: str, lora: str, out: str, *call: str) -> None:
    """Generate the student's image without lit_distill."""
    from diffusers import DiffusionPipeline

    pipe = DiffusionPipeline.from_pretrained(model, dtype=torch.bfloat16)
    pipe.load_lora_weights(lora)
    options = json.loads(call[0])
    generator = [torch.Generator().manual_seed(options.pop("seed"))]
    pipe(**options, generator=generator).images[0].save(out)


def _counted(folder: Path) -> Counter[str]:
    """Count calls by replacing methods of the classes of the pipeline's components."""
    import diffusers
    import transformers

    calls: Counter[str] = Counter()

    def count(cls: type, method: str, kind: str) -> None:
        original = getattr(cls, method)

        @functools.wraps(original)
        def counting(self: Any, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
            calls[kind] += 1
            return original(self, *args, **kwargs)

        setattr(cls, method, counting)

    index = json.loads((folder / "model_index.json").read_text())
    for key, (_, name) in ((k, v) for k, v in index.items() if isinstance(v, list)):
        if key in ("unet", "transformer"):
            count(getattr(diffusers, name), "forward", "denoiser")
        elif key == "vae":
            count(getattr(diffusers, name), "decode", "decode")
        elif key.startswith("text_encoder"):
            count(getattr(transformers, name), "forward", "encoder")
    return calls


# All stages


def commands(model: Path, work: Path, side: int) -> dict[str, list[str]]:
    """Return the arguments of each stage."""
    base = ["--model.pretrained_model_name_or_path", str(model)]
    cpu = ["--trainer.accelerator", "cpu", "--trainer.logger", "false"]
    size = ["--height", str(side), "--width", str(side)]
    table = str(work / "pairs" / "metadata.csv")
    checkpoint = str(work / "student.ckpt")
    sides = ["--data.height", str(side), "--data.width", str(side)]
    save = ["--trainer.callbacks", "lightning.pytorch.callbacks.ModelCheckpoint"]
    save += ["--trainer.callbacks.dirpath", str(work), "--trainer.callbacks.filename", "student"]
    save += ["--trainer.callbacks.save_last", "false"]
    out = {name: str(work / name) for name in ("report", "offloaded", "lora", "merged")}
    offload = ["--offload", "model"]
    generate = ["generate", *base, *cpu, *size, "--prompts", str(work / "prompts.txt")]
    generate += ["--num_inference_steps", "4", "--cfg_scale", "4"]
    generate += ["--student_num_inference_steps", "2"]
    test = ["test", "--ckpt_path", checkpoint, *cpu, "--data.val_metadata_path", table]
    test += [*sides, "--data.num_workers", "0"]
    call: dict[str, Any] = {"prompt": PROMPTS[0], "seed": 0, "num_inference_steps": 2}
    call |= {"height": side, "width": side}
    off = "true_cfg_scale" if (model / "transformer").is_dir() else "guidance_scale"
    if (model / "text_encoder_2").is_dir() and off == "true_cfg_scale":  # FLUX.1's is no guidance
        call["guidance_scale"] = 3.5
    call[off] = 1.0
    fit = ["fit", *base, *cpu, "--model.lora", "{r: 8}", "--trainer.max_steps", "1"]
    fit += ["--data.metadata_path", table, "--data.val_metadata_path", table]
    fit += ["--data.num_workers", "0", "--trainer.default_root_dir", str(work / "runs"), *sides]
    return {
        "preflight": ["preflight", *base, *cpu, *size, "--model.lora", "{r: 8}"]
        + ["--num_inference_steps", "2"],
        "generate": [*generate, "--out", str(work / "pairs")],
        "generate --offload model": [*generate, "--out", str(work / "staged"), *offload],
        "check": ["check", *base, *cpu, "--data.metadata_path", table, "--pairing", "1"],
        "fit --model.preflight false": [*fit, "--model.preflight", "false"],
        "fit": [*fit, *save],
        "test": [*test, "--out", out["report"]],
        "test --offload model": [*test, "--out", out["offloaded"], *offload],
        "export": ["export", "--ckpt_path", checkpoint, *cpu, "--out", out["lora"]],
        "export --format merged": [
            "export",
            "--ckpt_path",
            checkpoint,
            *cpu,
            "--out",
            out["merged"],
        ]
        + ["--format", "merged"],
        "plain diffusers": [
            "plain",
            str(model),
            out["lora"],
            str(work / "plain.png"),
            json.dumps(call),
        ],
    }


def journey(name: str, published: Path, work: Path, side: int, stages: list[str]) -> dict[str, Any]:
    """Run the stages and return the table of a model."""
    model = work / "model"
    if not model.is_dir():
        print(f"{name}: making the pipeline", flush=True)
        make_pipeline(name, published, model)
    (work / "prompts.txt").write_text("\n".join(PROMPTS))
    base = sum(path.stat().st_size for path in model.rglob("*.safetensors"))
    table: dict[str, Any] = {}
    for stage, arguments in commands(model, work, side).items():
        if stage not in stages:
            continue
        result = work / f"{stage}.json"
        command = [sys.executable, __file__, MEASURE, str(model), str(result)]
        with (work / f"{stage}.log").open("w") as log:
            done = subprocess.run([*command, *arguments], stdout=log, stderr=subprocess.STDOUT)
        if done.returncode:
            sys.exit(f"{name}, {stage}: exit status {done.returncode}\n{_end(work, stage)}")
        table[stage] = json.loads(result.read_text())
        print(name, stage, table[stage], flush=True)
    return {"layers": LAYERS[name] or "all", "side": side, "base MiB": round(base / MIB)} | table


def _end(work: Path, stage: str) -> str:
    return "\n".join((work / f"{stage}.log").read_text().splitlines()[-15:])


MEASURE = "--measure"
"""First argument of the process of a stage; its folder, result and command follow."""


def main() -> None:
    """Measure, and write the figures beside those of the other models."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("model", choices=LAYERS)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--side", type=int, default=128, help="height and width in pixels")
    parser.add_argument("--published", type=Path, default=ROOT / "tests/planning/published")
    parser.add_argument("--work", type=Path, help="folder to keep; default: a temporary one")
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/journey.json")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = arguments.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        stages = list(arguments.stages)
        table = journey(arguments.model, arguments.published, work, arguments.side, stages)
    results = json.loads(arguments.out.read_text()) if arguments.out.is_file() else {}
    before = results.get(arguments.model, {})
    machine = f"{os.cpu_count()} CPU cores, torch {torch.__version__}"
    results[arguments.model] = before | table | {"machine": machine}
    arguments.out.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    if sys.argv[1:2] == [MEASURE]:
        Path(sys.argv[3]).write_text(json.dumps(measured(Path(sys.argv[2]), sys.argv[4:])))
    else:
        main()
