"""Writes the table of docs/families.md from what tests/pipelines/test_families.py proves."""

import json
import re
from pathlib import Path

from families_expected import FOUND
from tiny_pipelines import CALL_KWARGS, FAMILIES, build

from lit_distill.pipelines.components import denoisers
from lit_distill.pipelines.guidance import Family, family_of

DOC = Path(__file__).parents[2] / "docs" / "families.md"
BEGIN, END = "<!-- table: begin (tests/helpers/families_table.py) -->\n", "<!-- table: end -->\n"

SWEEP_BEGIN = "<!-- sweep: begin (benchmarks/families_sweep.py) -->\n"
SWEEP_END = "<!-- sweep: end -->\n"


def table() -> str:
    lines = ["| family | pipeline | denoiser | draws | line in the table | set by preflight |"]
    lines += ["|---|---|---|---|---|---|"]
    for name in FAMILIES:
        pipe = build(name)
        models = ", ".join(dict.fromkeys(type(d).__name__ for d in denoisers(pipe).values()))
        kind = "edits" if "image" in CALL_KWARGS[name] else "images"
        kind = "videos" if "num_frames" in CALL_KWARGS[name] else kind
        line = "-" if family_of(pipe) == Family() else "scale"
        found = ", ".join(f"`{key}`" for key in FOUND.get(name, {})) or "-"
        lines.append(f"| {name} | {type(pipe).__name__} | {models} | {kind} | {line} | {found} |")
    return "\n".join(lines) + "\n"


SWEEP = Path(__file__).parents[2] / "benchmarks" / "results" / "families_sweep.json"
OTHER_TASKS = {
    "audio": r"ace_step|audio",
    "depth, normals or intrinsic images": "marigold",
    "an image's embedding": "Prior",
    "larger latents": r"LatentUpsample|LatentUpscale",
    "text": r"llada|gemma",
    "3D shapes": "shap_e",
    "images without a prompt": r"\.(ddim|ddpm|dit|pndm|consistency_models)\.",
}
"""Tasks that are not this package's, by a part of the test's name or the pipeline's."""


def task(row: dict) -> str | None:
    names = f"{row['test']} {row['pipeline']}"
    return next((task for task, part in OTHER_TASKS.items() if re.search(part, names)), None)


def swept() -> tuple[list[dict], list[dict], list[dict]]:
    """Rows of the sweep for this package's tasks: those that hold, are refused, and others."""
    rows = {}
    for row in json.loads(SWEEP.read_text(encoding="utf-8")):
        row["pipeline"] = row["pipeline"].removesuffix("Wrapper")
        if row["pipeline"] not in rows or row["verdict"] == "holds":
            rows[row["pipeline"]] = row
    ours = [row for _, row in sorted(rows.items()) if task(row) is None]
    holds = [row for row in ours if row["verdict"] == "holds"]
    refused = [row for row in ours if row["verdict"] == "refused"]
    return holds, refused, [row for row in ours if row not in holds and row not in refused]


def sweep_list() -> str:
    holds, refused, others = swept()
    names = [row["pipeline"].removesuffix("Pipeline") for row in holds]
    embedded = sum(row["cfg"].startswith("refused") for row in holds)
    lines = [f"**{len(holds)} hold** ({embedded} of them without classifier-free guidance):"]
    lines += [", ".join(names) + ".", ""]
    if refused:
        lines += [f"**{len(refused)} are refused**, for these reasons:", ""]
        lines += [f"* {row['pipeline']}: {row['why']}" for row in refused]
    if others:
        lines += ["", f"**{len(others)} could not be tried or do not hold**:", ""]
        lines += [f"* {row['pipeline']}: {row.get('why') or row['cfg']}" for row in others]
    return "\n".join(lines) + "\n"


def split(text: str, begin: str = BEGIN, end: str = END) -> tuple[str, str, str]:
    head, _, rest = text.partition(begin)
    body, _, tail = rest.partition(end)
    return head, body, tail


if __name__ == "__main__":
    head, _, tail = split(DOC.read_text(encoding="utf-8"))
    text = head + BEGIN + table() + END + tail
    head, _, tail = split(text, SWEEP_BEGIN, SWEEP_END)
    text = head + SWEEP_BEGIN + sweep_list() + SWEEP_END + tail
    DOC.write_text(text, encoding="utf-8")
