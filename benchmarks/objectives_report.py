"""Pictures, metrics and tables of `objectives.py`."""

from __future__ import annotations

import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from safetensors.torch import load_file
from students import result_path
from torch import Tensor

from lit_distill import (
    Diversity,
    FrechetDistance,
    LatentCodec,
    Legibility,
    Sharpness,
    load_pipeline,
)
from lit_distill.evaluation.contact_sheet import contact_sheet, to_pil
from lit_distill.evaluation.evaluator import Evaluation, EvaluationBatch
from lit_distill.evaluation.feature_extractors import LETTERS

SIZE = {"height": 32, "width": 64}
UNDISTILLED = "undistilled, 4 steps"

COLUMNS = {
    "letters": "letters",
    "words": "words",
    "sharpness": "sharpness",
    "frechet": "Frechet",
    "diversity": "diversity",
    "latent_mse": "error",
    "seconds": "CPU s",
    "mib": "MiB",
}


def draw(
    pipe: Any,  # noqa: ANN401
    rows: pd.DataFrame,
    steps: int,
    cfg: float,
) -> tuple[Tensor, float]:
    """Return final latents (N, ...) of rows, by the pipeline's own call, and CPU seconds of one."""
    pipe.set_progress_bar_config(disable=True)
    started, parts = time.process_time(), []
    for start in range(0, len(rows), 64):
        batch = rows[start : start + 64]
        parts.append(
            pipe(
                list(batch["prompt"]),
                negative_prompt=[" "] * len(batch) if cfg > 1 else None,
                true_cfg_scale=cfg,
                num_inference_steps=steps,
                generator=[torch.Generator().manual_seed(seed) for seed in batch["seed"]],
                output_type="latent",
                **SIZE,
            ).images
        )
    return torch.cat(parts).float(), (time.process_time() - started) / len(rows)


def stored(work: Path, name: str) -> tuple[pd.DataFrame, Tensor]:
    """Return the rows of a sample of the teacher, and their latents."""
    rows = pd.read_csv(work / name / "metadata.csv")
    return rows, torch.stack([load_file(work / name / p)["latents"] for p in rows["latents"]])


@torch.no_grad()
def decode(latents: Tensor) -> Tensor:
    """Return the pictures (N, 3, 32, 64), range [0, 1], of final latents."""
    codec = LatentCodec(load_pipeline("tiny-words"), **SIZE)
    return torch.cat([codec.decode(part) for part in latents.split(64)])


def render(prompts: list[str]) -> Tensor:
    """Return what the teacher was trained on, (N, 3, 32, 64); needs its fonts."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
    from tiny_words import NAMES, STYLES, WordPictures

    labels = []
    for prompt in prompts:
        word, _, fore, style, _, back = prompt.split()
        letters = [LETTERS.index(letter) for letter in word.split("-")]
        labels.append([STYLES.index(style), NAMES.index(fore), NAMES.index(back), *letters])
    pictures, every = WordPictures(), torch.tensor(labels)
    masks = pictures.masks(every, torch.Generator().manual_seed(0))
    return pictures.paint(masks, every) / 2 + 0.5


def score(
    rows: pd.DataFrame, latents: Tensor | None, images: Tensor, work: Path
) -> dict[str, float]:
    """Return the metrics of pictures of the held-out rows."""
    wanted, other = stored(work, "heldout")[1], stored(work, "independent")[1]
    metrics = {"letters": Legibility(), "words": Legibility(whole_words=True)}
    evaluation = Evaluation(metrics | {"sharpness": Sharpness(), "diversity": Diversity()})
    prompts = list(rows["prompt"])
    evaluation.update(EvaluationBatch(prompts, latents, wanted, images, decode(wanted)), 0)
    frechet = FrechetDistance("tiny-words")
    frechet.update(decode(other), real=True)
    frechet.update(images, real=False)
    return evaluation.compute() | {"frechet": float(frechet.compute())}


def summary(work: Path, names: list[str]) -> dict[str, dict[str, list[float]]]:
    """Return mean and half the range over seeds of all metrics."""
    load = lambda path: json.loads(path.read_text())  # noqa: E731
    base = load(result_path(work, UNDISTILLED, 0))["latent_mse"]
    pair = load(result_path(work, "teacher", 0))["seconds_per_picture"]
    rows: dict[str, dict[str, list[float]]] = {}
    for name in names:
        paths = [result_path(work, name, seed) for seed in range(3)]
        found = [load(path) for path in paths if path.is_file()]
        for each in found:
            if "latent_mse" in each:
                each["latent_mse"] /= base
            if "training_seconds" in each:
                needs = "matching" not in name or "regression" in name
                each["seconds"] = each["training_seconds"] + needs * each["pairs"] * pair
        rows[name] = {"seeds": [len(found), 0]}
        for key in found[0]:
            values = [each[key] for each in found if key in each]
            rows[name][key] = [statistics.mean(values), (max(values) - min(values)) / 2]
    return rows


def print_table(rows: dict[str, dict[str, list[float]]]) -> None:
    """Print the table of docs/method.md."""
    print("| | " + " | ".join(COLUMNS.values()) + " |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, row in rows.items():
        cells = [_cell(key, row) for key in COLUMNS]
        print(f"| {name} | " + " | ".join(cells) + " |")


def _cell(key: str, row: dict[str, list[float]]) -> str:
    if key not in row:
        return "-"
    mean, spread = row[key]
    if key in ("seconds", "mib"):
        return f"{mean:.0f}"
    digits = 2 if key == "frechet" else 3
    text = f"{mean:.{digits}f}"
    return f"{text} ± {spread:.{digits}f}" if row["seeds"][0] > 1 else text


def plot(work: Path, names: list[str], path: Path) -> None:
    """Save the pictures of the first seed, one column for each prompt, one row for each name."""
    prompts = stored(work, "heldout")[0]["prompt"][:16:2]
    pictures = [
        (name, to_pil(torch.load(result_path(work, name, 0).with_suffix(".pt")))) for name in names
    ]
    contact_sheet([text.split()[0] for text in prompts], pictures).save(path)
