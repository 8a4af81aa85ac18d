"""Compares planned training steps with counted ones, for every family and checkpointing mode.

    python benchmarks/plan_accuracy.py [--families QwenImage ...]

The real steps are those of tiny pipelines with random weights on a CPU, their tensors counted one
by one. For each family, two sizes and every mode it reports the planned and the real peak of
activations, temporaries and gradients, and the FLOPs. Then pipelines with more layers are planned
whole, and from a few of their layers. Writes results/plan_accuracy.json.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import diffusers
import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "helpers"))

from counted_steps import FAMILIES, planned_and_real, settings
from tiny_pipelines import build

from lit_distill.planning.blueprint import Blueprint
from lit_distill.planning.planner import MODES, Planner

RESULT = Path(__file__).parent / "results" / "plan_accuracy.json"
LAYERS = {
    "QwenImage": {"num_layers": 7},
    "Flux": {"num_layers": 6, "num_single_layers": 7},
    "StableDiffusion3": {"num_layers": 7},
    "ZImage": {"n_layers": 7},
    "Wan": {"num_layers": 7},
}
"""Layers of the deeper pipelines. The UNet of SDXL is always planned whole."""


def compare(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return planned and real figures of a family."""
    rows = []
    for times in (1, 3):
        for mode, peak, real_peak, flops, real_flops in planned_and_real(
            folder, settings(name, times), MODES
        ):
            row = {"family": name, "size": times, "mode": mode}
            row |= {"planned_bytes": peak, "real_bytes": real_peak}
            row |= {"error": round(peak / real_peak - 1, 5), "flops_equal": flops == real_flops}
            rows.append(row)
            print(row, flush=True)
    return rows


def extrapolate(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return figures of a deeper pipeline, from a few layers and from all of them."""
    freeze: list[str] = []
    if name == "QwenImage":  # the last block's text branch has no effect
        last = f"transformer.transformer_blocks.{LAYERS[name]['num_layers'] - 1}"
        freeze = [f"{last}.attn.to_add_out.*", f"{last}.txt_mlp.*"]
    chosen = settings(name, 1, num_inference_steps=2, freeze=freeze)
    blueprint = Blueprint.read(folder).with_layers(LAYERS[name])
    few, whole = Planner(blueprint, chosen), Planner(blueprint, chosen)
    whole.__dict__["_counts"] = {}
    rows = []
    for mode in MODES:
        found, expected = few.step(mode), whole.step(mode)
        row = {"family": name, "layers": LAYERS[name], "mode": mode}
        row["error"] = round(found.activation_peak / expected.activation_peak - 1, 6)
        row["flops_equal"] = found.flops == expected.flops
        rows.append(row)
        print(row, flush=True)
    return rows


def main() -> None:
    """Compare the families and update their rows in the result."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--families", nargs="*", default=FAMILIES)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    result = json.loads(options.out.read_text()) if options.out.exists() else {}
    for name in options.families:
        with tempfile.TemporaryDirectory() as folder:
            build(name).save_pretrained(folder)
            rows = {"steps": compare(Path(folder), name)}
            rows["layers"] = extrapolate(Path(folder), name) if name in LAYERS else []
        for part, found in rows.items():
            others = [row for row in result.get(part, []) if row["family"] != name]
            result[part] = sorted(others + found, key=lambda row: FAMILIES.index(row["family"]))
        errors = {part: max(abs(r["error"]) for r in result[part]) for part in rows if result[part]}
        equal = all(row["flops_equal"] for part in rows for row in result[part])
        result["summary"] = {"largest_error": errors, "flops_equal": equal}
        result["versions"] = {"torch": torch.__version__, "diffusers": diffusers.__version__}
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result["summary"]))


if __name__ == "__main__":
    main()
