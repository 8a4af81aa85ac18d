"""Which objective makes better students of tiny-words, at 4, 2 and 1 steps, over three seeds.

    OMP_NUM_THREADS=1 python benchmarks/objectives.py [--jobs 2] [--parts four few ...]

Generates pairs, trains students for about the same CPU time each (`SECONDS_PER_STEP` turns it into
optimizer steps), and draws two pictures of each of 256 held-out prompts by the pipeline's own call.
Rerun the command to resume, or to add parts: results in --work are reused. Writes
benchmarks/results/objectives.json, and the pictures beside it. The columns:

* letters, words: the share that the shipped reader reads as prompted,
* sharpness, diversity: relative to the teacher's pictures of the same prompts and seeds,
* Frechet: distance of the reader's features to another sample of the teacher, of other seeds. The
  teacher's own distance to it is the floor,
* error: latent MSE to the teacher from the same noise, relative to 4 steps without guidance,
* CPU s: training, and the generation of the pairs that it needs,
* MiB: the most that tensors hold at once in training.
"""

from __future__ import annotations

import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pandas as pd
import students
import torch
from objectives_report import SIZE, decode, draw, plot, print_table, render, score, stored, summary
from students import result_path

from lit_distill import (
    Adversarial,
    Consistency,
    DirectDistill,
    DistillDataModule,
    DistributionMatching,
    Objective,
    Regression,
    Term,
    Trajectory,
    WarmupCosine,
    WeightedSum,
    load_pipeline,
)
from lit_distill.cli import main as command

ROOT = Path(__file__).parents[1]
TEACHER = (50, 3.0)
BATCH_SIZE = 16
SECONDS = 60.0
"""CPU seconds of training."""

SECONDS_PER_STEP = {
    ("regression", 4): 0.33,
    ("regression", 2): 0.18,
    ("regression", 1): 0.12,
    ("full", 4): 0.28,
    ("trajectory", 4): 0.33,
    ("matching", 4): 0.55,
    ("matching", 2): 0.37,
    ("matching", 1): 0.31,
    ("consistency", 4): 0.26,
    ("adversarial", 4): 0.48,
    ("both", 4): 0.85,
    ("both", 2): 0.5,
    ("both", 1): 0.38,
    ("after", 4): 0.44,
    ("after", 2): 0.27,
    ("after", 1): 0.21,
    ("online", 4): 0.38,
}
"""On a core of the machine of the committed figures, by objective and number of steps."""


@dataclass(frozen=True)
class Run:
    """One student to train.

    Attributes:
        objective: A key of `SECONDS_PER_STEP`, and of `OBJECTIVES`.
        steps: num_inference_steps of the student.
        pairs: Number of stored pairs; 0: prompts only.
        full: Whether all weights are trained instead of a LoRA.
        rate: Factor of the learning rates.
        longer: Factor of the CPU time.
        settings: Further settings of `DirectDistill`.
        images: Whether targets are the pictures instead of the exact latents.
    """

    objective: str
    steps: int = 4
    pairs: int = 2048
    full: bool = False
    rate: float = 1.0
    longer: float = 1.0
    settings: tuple[tuple[str, Any], ...] = ()
    images: bool = False

    @property
    def max_steps(self) -> int:
        """Number of optimizer steps."""
        kind = "full" if self.full else self.objective
        if self.objective == "regression" and not self.pairs:
            kind = "online"
        return round(self.longer * SECONDS / SECONDS_PER_STEP[kind, self.steps])


def _matching(rate: float) -> DistributionMatching:
    return DistributionMatching(shift=3.0, optimizer={"lr": 1e-3 * rate, "betas": (0.0, 0.99)})


def _consistency(run: Run) -> Consistency:
    stages = [count for count in (8, 4, 2, 1) if count >= run.steps]
    return Consistency(stages, max(1, run.max_steps // len(stages)))


OBJECTIVES: dict[str, Callable[[Run], Objective]] = {
    "regression": lambda run: Regression(),
    "trajectory": lambda run: Trajectory(),
    "matching": lambda run: _matching(run.rate),
    "consistency": _consistency,
    "adversarial": lambda run: WeightedSum(
        [
            Term(Regression()),
            Term(Adversarial(optimizer={"lr": 1e-3 * run.rate, "betas": (0.0, 0.99)}), 0.01),
        ]
    ),
    "both": lambda run: WeightedSum([Term(Regression()), Term(_matching(run.rate), 0.25)]),
    "after": lambda run: WeightedSum(
        [
            Term(Regression(), stop=run.max_steps // 2),
            Term(_matching(run.rate), start=run.max_steps // 2),
        ]
    ),
}

NAMES = {
    "regression": "regression",
    "trajectory": "trajectory",
    "matching": "distribution matching",
    "both": "regression + .25 distribution matching",
    "after": "regression, then distribution matching",
    "consistency": "consistency",
    "adversarial": "regression + .01 adversarial",
}

ONLINE = (
    ("teacher_num_inference_steps", 8),
    ("teacher_reuse", 8),
    ("teacher_buffer", 256),
)


def _named(steps: int, *kinds: str) -> dict[str, Run]:
    plural = "s" if steps > 1 else ""
    return {f"{NAMES[kind]}, {steps} step{plural}": Run(kind, steps) for kind in kinds}


PARTS: dict[str, dict[str, Run]] = {
    "four": {
        **_named(4, *NAMES),
        "unguided distribution matching, 4 steps": Run(
            "matching", settings=(("teacher_cfg_scale", 1.0),)
        ),
    },
    "few": {
        **_named(1, "regression", "both", "after"),
        **_named(2, "regression", "both", "after"),
    },
    "pairs": {
        "regression, 4 steps, 256 pairs": Run("regression", pairs=256),
        "regression, 4 steps, online": Run("regression", pairs=0, settings=ONLINE),
        "regression, 4 steps, pictures": Run("regression", images=True),
    },
    "full": {"regression, 4 steps, all weights": Run("regression", full=True)},
    "longer": {
        f"{NAMES[kind]}, 4 steps, 4x longer": Run(kind, longer=4.0)
        for kind in ("after", "matching", "regression")
    }
    | {"regression, 4 steps, 256 pairs, 4x longer": Run("regression", pairs=256, longer=4.0)},
    "longest": {f"{NAMES['after']}, 4 steps, 12x longer": Run("after", longer=12.0)},
    "rates": {
        f"{NAMES[kind]}, 4 steps, learning rate {label}": Run(kind, rate=factor)
        for kind in ("regression", "matching", "both", "consistency")
        for label, factor in (("x3", 3.0), ("/3", 1 / 3))
    },
}
"""Students by part and name. Those of *rates* and *longer* are trained with one seed."""

RUNS = {name: run for part in PARTS.values() for name, run in part.items()}
ONE_SEED = {**PARTS["rates"], **PARTS["longer"]}

RENDERED = "rendered"
REFERENCES = {
    "teacher": TEACHER,
    **{f"undistilled, {steps} steps, guided": (steps, TEACHER[1]) for steps in (16, 8, 4)},
    **{f"undistilled, {steps} steps": (steps, 1.0) for steps in (16, 8, 4, 2)},
    "undistilled, 1 step": (1, 1.0),
}
"""Steps and guidance of the pipeline as it is; a guided step is two denoiser calls."""

SHOWN = (
    *(RENDERED, "teacher", "undistilled, 8 steps, guided", "undistilled, 4 steps"),
    *("regression, 4 steps", "regression, 4 steps, 4x longer", "distribution matching, 4 steps"),
    f"{NAMES['after']}, 4 steps",
    f"{NAMES['after']}, 4 steps, 12x longer",
    *("undistilled, 1 step", "regression, 1 step", f"{NAMES['after']}, 1 step"),
)
"""The rows of the picture."""

# Pairs


def make_pairs(work: Path) -> None:
    """Generate 2,048 pairs, and two samples of the teacher of 256 held-out prompts."""
    assets = files("lit_distill").joinpath("assets", "words")
    few = work / "heldout.txt"
    few.parent.mkdir(parents=True, exist_ok=True)
    lines = assets.joinpath("prompts_heldout.txt").read_text(encoding="utf-8").splitlines()
    few.write_text("\n".join(lines[:256]) + "\n", encoding="utf-8")
    steps, cfg = TEACHER
    for out, prompts, options in (
        ("heldout", few, "--seeds_per_prompt 2 --first_seed 1000000"),
        ("independent", few, "--seeds_per_prompt 2 --first_seed 2000000"),
        ("train", assets.joinpath("prompts_train.txt"), "--store_trajectory true"),
    ):
        model = "--model.pretrained_model_name_or_path tiny-words --model.torch_dtype float32"
        how = f"--prompts {prompts} --out {work / out} --batch_size 64 --height 32 --width 64"
        how += f" --num_inference_steps {steps} --cfg_scale {cfg:g} {options}"
        trainer = "--trainer.accelerator cpu --trainer.logger false"
        trainer += " --trainer.enable_progress_bar false"
        command(f"generate {model} {how} {trainer}".split())


def table(work: Path, run: Run) -> Path:
    """Return the path of the table of the pairs that a student is trained on."""
    kind = "pictures" if run.images else f"{run.pairs}"
    path = work / "train" / f"{kind}_{run.steps}.csv"
    rows = pd.read_csv(work / "train" / "metadata.csv").sample(frac=1, random_state=0)
    rows = rows[: run.pairs or None].assign(num_inference_steps=run.steps)
    if run.images:
        rows = rows.drop(columns="latents")
    if not run.pairs:
        rows = rows.assign(image="", latents="")
    temporary = path.with_suffix(f".{time.monotonic_ns()}")
    rows.to_csv(temporary, index=False)
    temporary.replace(path)
    return path


# Students


def train(run: Run, seed: int, work: Path, max_steps: int) -> tuple[Any, float]:
    """Train a student; return its pipeline and the CPU seconds."""
    pl.seed_everything(seed, verbose=False)
    lr = (1e-3 if run.full else 3e-3) * run.rate
    settings = {"teacher_cfg_scale": TEACHER[1], **dict(run.settings)}
    module = DirectDistill(
        pretrained_model_name_or_path="tiny-words",
        torch_dtype="float32",
        lora=None if run.full else {"r": 32},
        checkpointing="none",
        # In bfloat16 on a CPU the fused attention's backward pass takes half of a step.
        attention_backend="_native_math",
        preflight=False,
        objective=OBJECTIVES[run.objective](run),
        optimizer=lambda groups: torch.optim.AdamW(
            groups, lr=lr, betas=(0.9, 0.99), weight_decay=0.0
        ),
        lr_scheduler=lambda optimizer: WarmupCosine(optimizer, 20),
        **settings,
    )
    data = DistillDataModule(str(table(work, run)), batch_size=BATCH_SIZE, seed=seed, **SIZE)
    clock = students.Clock()
    trainer = students.trainer(max_steps, [clock], precision="bf16-mixed")
    trainer.fit(module, datamodule=data)
    return module.pipe, clock.seconds


def memory(run: Run, work: Path) -> float:
    """Return the MiB that tensors hold at most in two optimizer steps."""
    sys.path.insert(0, str(ROOT / "tests" / "helpers"))
    from held_memory import HeldBytes

    with HeldBytes() as held:
        train(run, 0, work, 2)
    return float(held.peak / 2**20)


def one(name: str, seed: int, work: Path) -> dict[str, Any]:
    """Train a student, or take a reference; draw the held-out rows and return the metrics."""
    run, found = RUNS.get(name), dict[str, Any]()
    rows, _ = stored(work, "heldout")
    if run:
        pipe, seconds = train(run, seed, work, run.max_steps)
        found |= {"training_seconds": seconds, "max_steps": run.max_steps, "pairs": run.pairs}
        latents, found["seconds_per_picture"] = draw(pipe, rows, run.steps, 1.0)
    elif name == RENDERED:
        latents = None
    else:
        pipe = load_pipeline("tiny-words")
        latents, found["seconds_per_picture"] = draw(pipe, rows, *REFERENCES[name])
    images = render(list(rows["prompt"])) if latents is None else decode(latents)
    path = result_path(work, name, seed).with_suffix(".pt")
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(images[:16:2].clone(), path)  # one seed of each of eight prompts
    found |= score(rows, latents, images, work)
    return found | ({"mib": memory(run, work)} if run and seed == 0 else {})


def main(arguments: list[str] | None = None) -> None:
    """Train what is missing, and write the table and the pictures."""
    options = students.parse(arguments, "objectives", __doc__, "--parts", list(PARTS))
    if options.one:
        students.run_one(options, one)
        return
    make_pairs(options.work)
    wanted = [name for part in options.parts for name in PARTS[part]]
    jobs = [(name, 0) for name in (RENDERED, *REFERENCES)]
    jobs += [
        (name, seed)
        for seed in range(options.seeds)
        for name in wanted
        if not (seed and name in ONE_SEED)
    ]
    students.train_all(jobs, options, __file__, "letters")
    done = [name for name in RUNS if result_path(options.work, name, 0).is_file()]
    names = [RENDERED, *REFERENCES, *done]
    rows = summary(options.work, names)
    print_table(rows)
    students.write(options.out, {"runs": rows})
    shown = [name for name in SHOWN if name in names]
    plot(options.work, shown, options.out.with_suffix(".png"))


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
