"""The figures of the plan in the head of each configuration for a card."""

import hashlib
import json
import re
import tempfile
from pathlib import Path

import yaml

from lit_distill.cli import main

ROOT = Path(__file__).parents[2]
PUBLISHED = ROOT / "tests" / "planning" / "published"
RECORD = ROOT / "benchmarks" / "results" / "plan_configs.json"
FOLDERS = {
    "Qwen/Qwen-Image": "qwen-image",
    "black-forest-labs/FLUX.1-dev": "flux.1-dev",
    "stabilityai/stable-diffusion-xl-base-1.0": "sdxl",
    "Tongyi-MAI/Z-Image": "z-image",
    "Wan-AI/Wan2.1-T2V-14B-Diffusers": "wan2.1-t2v-14b",
}
CARDS = {"24": "rtx4090", "48": "l40s", "80": "h100", "8x80": "h100"}
"""The card that is planned for, by the end of a configuration's name."""

PARTS = ("weights", "trained", "activations", "temporaries", "total")


def configs():
    """Return the configurations for cards."""
    paths = sorted((ROOT / "configs").glob("*.yaml"))
    return [path for path in paths if path.stem.rpartition("_")[2] in CARDS]


def card_of(path):
    return CARDS[path.stem.rpartition("_")[2]]


def digest(path):
    """Return a digest of a configuration without its comments."""
    content = json.dumps(yaml.safe_load(path.read_text()), sort_keys=True)
    return hashlib.sha256(content.encode()).hexdigest()[:16]


def planned(path):
    """Return what the record says of a configuration, planned now."""
    config = yaml.safe_load(path.read_text())
    folder = PUBLISHED / FOLDERS[config["model"]["pretrained_model_name_or_path"]]
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary, "plan.json")
        arguments = ["--config", str(path), "--gpu", card_of(path), "--json", str(out)]
        arguments += ["--model.pretrained_model_name_or_path", str(folder)]
        main(["plan", *arguments])
        plan = json.loads(out.read_text())
    mode = plan["fit"][config["model"]["checkpointing"]]
    stages = plan["stages"] | {"fit": {**mode, "place": "device", "note": ""}}
    return {
        "digest": digest(path),
        "card_gib": plan["card"]["memory_gib"],
        "margin": plan["margin"],
        "devices": plan["devices"],
        "seconds": round(mode["seconds"], 2),
        "pflop": round(mode["flops"] / 1e15, 4),
        "stages": {
            name: {part: round(stage[f"{part}_gib"], 2) for part in PARTS}
            | {"place": stage["place"], "note": stage["note"]}
            for name, stage in stages.items()
        },
    }


def head(path, record):
    """Return the lines of comments with a configuration's figures."""
    command = f"lit-distill plan --config configs/{path.name} --gpu {card_of(path)}"
    lines = [
        f"# Planned by {command}",
        f"# ({record['pflop']:.3f} PFLOP a batch), in GiB at the peak"
        f"{' of each GPU' if record['devices'] > 1 else ''}:",
        "#               " + " ".join(f"{part:>11}" for part in PARTS),
    ]
    for name, stage in record["stages"].items():
        if stage["place"] == "device":
            option = re.search(r"--offload \w+", stage["note"])
            figures = " ".join(f"{stage[part]:11.1f}" for part in PARTS)
            lines.append(f"#   {name:12}{figures}{'  ' + option[0] if option else ''}")
    if record["devices"] > 1:
        trained = record["stages"]["export"]["trained"]
        lines += [
            f"# Host memory: the first process gathers {3 * trained:.0f} GiB when it saves",
            f"# a checkpoint ({4 * trained:.0f} with an EMA), which is one file for any number of "
            "processes.",
        ]
    return lines


def with_head(path, record):
    """Return a configuration's text with these figures in its head."""
    title, _, *rest = path.read_text().splitlines()
    body = rest[next(n for n, line in enumerate(rest) if not line.startswith("#")) :]
    intro = [title, "# Not run on a GPU by us yet.", *head(path, record)]
    return "\n".join([*intro, *body]) + "\n"
