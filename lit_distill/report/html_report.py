"""The files of a report: summary tables, the grid, and one HTML page that holds all it shows."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

import lit_distill
from lit_distill.evaluation.contact_sheet import contact_sheet
from lit_distill.report.contenders import Contender
from lit_distill.report.plots import plot_curves, read_logs

SMALL, LARGEST = 128, 512
"""Images of at most SMALL pixels an edge are shown as they are, others at most LARGEST wide."""

TITLES = {
    "way": ("drawn by", ""),
    "evaluations": ("denoiser calls", "evaluations of the denoiser an image; guidance takes two."),
    "seconds_an_image": ("s / image", "wall time on this machine, decoding included."),
    "speed_up": ("speed-up", "the teacher's seconds over these."),
    "latent_mse": (
        "latent MSE ↓",
        "mean squared error to the teacher's final latents; the teacher's own is that of drawing "
        "some rows once more, and near 0 if the pairs are its own.",
    ),
    "gap_closed": (
        "gap closed ↑",
        "1 - latent MSE / latent MSE of the undistilled pipeline at the student's steps: 0 has "
        "learnt nothing, 1 is the teacher.",
    ),
    "psnr": ("PSNR ↑", "peak signal-to-noise ratio to the teacher's images, in dB."),
    "ssim": ("SSIM ↑", "structural similarity to the teacher's images, 1 = the same."),
    "sharpness": ("sharpness → 1", "gradient energy over the teacher's; below 1 is blurred."),
    "diversity": (
        "diversity → 1",
        "distance between images of one prompt with different seeds, over the teacher's.",
    ),
    "frechet": ("Frechet ↓", "Frechet distance to the teacher's images on a network's features."),
    "clip_score": ("CLIP score ↑", "100 times the cosine between image and prompt."),
    "lpips": ("LPIPS ↓", "learned perceptual distance to the teacher's images."),
}

HIDDEN = ("kind", "key", "loss", "undistilled_latent_mse")

COSTS = ("evaluations", "seconds_an_image", "speed_up")

BY_STEPS = re.compile(r"(.+)_(\d+)_steps")
"""Names of metrics of those rows alone that have a certain number of steps."""


def image_file(way: Contender, row: int) -> Path:
    """Return where in the report's folder the image of a row lies."""
    return Path("images") / way.key / f"row_{row:06d}.png"


def write_report(
    out: Path,
    ways: list[Contender],
    rows: pd.DataFrame,
    gallery: int,
    facts: dict[str, Any],
    snippet: str,
    logs: Path | None,
) -> str:
    """Write all files but the images, which must be there already.

    Args:
        out: The report's folder.
        ways: Teacher first, with one student among them; drawn.
        rows: One line a row and way, with ``latent_mse`` and ``image_mse``.
        gallery: Largest number of rows in the page.
        facts: Provenance by name.
        snippet: How to run the student.
        logs: Folder where the run's logs may be.

    Returns:
        The summary as text.
    """
    summary = summarise(ways, rows)
    rows.to_csv(out / "rows.csv", index=False)
    summary.to_csv(out / "metrics.csv", index=False)
    lines = json.loads(summary.to_json(orient="records"))  # NaN and infinities become null
    content = {"rows": rows["row"].nunique(), "ways": lines, "provenance": facts}
    (out / "metrics.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    student = next(way for way in ways if way.kind == "student")
    chosen = worst_and_best(rows[rows["way"] == student.label], gallery)
    _write_grid(out, ways, rows)
    curves, no_curves = _curves(logs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lit_distill", "assets"), autoescape=True
    )
    page = environment.get_template("report.html.j2").render(
        title=f"{student.label}: how it compares with its teacher",
        version=lit_distill.__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        rows_total=content["rows"],
        facts=_headline(summary),
        **_tables(summary),
        curves=curves,
        no_curves=no_curves,
        gallery=_gallery(out, ways, rows, chosen),
        gallery_note=_gallery_note(len(chosen), content["rows"]),
        run=snippet,
        provenance=facts,
    )
    (out / "report.html").write_text(page, encoding="utf-8")
    shown = summary[_columns(summary)]
    return str(shown.to_string(index=False, float_format="{:.3g}".format, na_rep="-"))


def summarise(ways: list[Contender], rows: pd.DataFrame) -> pd.DataFrame:
    """Return one line a way: what it costs, then its metrics."""
    seconds = ways[0].seconds_an_image
    evaluations = rows.groupby("way")["evaluations"].mean()
    return pd.DataFrame(
        [
            {
                "way": way.label,
                "kind": way.kind,
                "key": way.key,
                "evaluations": float(evaluations[way.label]),
                "seconds_an_image": way.seconds_an_image,
                "speed_up": seconds / way.seconds_an_image,
                **way.values,
            }
            for way in ways
        ]
    )


def worst_and_best(rows: pd.DataFrame, count: int) -> list[int]:
    """Return at most `count` row numbers, worst first: half the worst, half the best."""
    measure = _measure(rows)
    order = rows.sort_values(measure, ascending=False)["row"].tolist()
    if len(order) <= count:
        return order
    return order[: count - count // 2] + order[len(order) - count // 2 :]


def _measure(rows: pd.DataFrame) -> str:
    """Return the error to sort by: of images, where latents can't be compared."""
    return "image_mse" if rows["latent_mse"].isna().any() else "latent_mse"


def _headline(summary: pd.DataFrame) -> list[dict[str, str]]:
    """Return the student's figures that matter most."""
    lines = summary.to_dict("records")
    teacher, student = lines[0], next(line for line in lines if line["kind"] == "student")
    seconds = [f"{line['seconds_an_image']:.2g} s" for line in (student, teacher)]
    facts = [
        (f"{student['speed_up']:.1f}x", f"faster: {seconds[0]} an image, not {seconds[1]}"),
        (
            f"{student['evaluations']:g}",
            f"denoiser calls an image, not {teacher['evaluations']:g}",
        ),
    ]
    if not math.isnan(student.get("gap_closed", math.nan)):
        facts.insert(0, (f"{student['gap_closed']:.0%}", "of the gap to the teacher closed"))
    if not math.isnan(student.get("sharpness", math.nan)):
        facts.append((f"{student['sharpness']:.2f}", "of the teacher's sharpness"))
    return [{"value": value, "label": label} for value, label in facts]


def _columns(summary: pd.DataFrame) -> list[str]:
    """Return the columns that are shown of all rows."""
    names = [str(name) for name in summary if name not in HIDDEN]
    return [name for name in names if not BY_STEPS.fullmatch(name)]


def _tables(summary: pd.DataFrame) -> dict[str, Any]:
    """Return the table of all rows, and one for every number of steps where rows differ."""
    names = _columns(summary)
    metrics = [name for name in names if name not in COSTS]
    parts = [match.groups() for name in summary if (match := BY_STEPS.fullmatch(str(name)))]
    by_steps = {}
    for steps in sorted({int(steps) for name, steps in parts if name not in HIDDEN}):
        columns = [name if name == "way" else f"{name}_{steps}_steps" for name in metrics]
        by_steps[steps] = _lines(summary, columns)
    return {
        "columns": _headings(names),
        "table": _lines(summary, names),
        "columns_by_steps": _headings(metrics),
        "tables_by_steps": by_steps,
    }


def _headings(names: list[str]) -> list[dict[str, str]]:
    titles = [TITLES.get(name, (name.replace("_", " "), "")) for name in names]
    return [{"title": title, "help": text} for title, text in titles]


def _lines(summary: pd.DataFrame, names: list[str]) -> list[dict[str, Any]]:
    return [
        {
            "student": line["kind"] == "student",
            "cells": [_text(line.get(name, math.nan)) for name in names],
        }
        for line in summary.to_dict("records")
    ]


def _text(value: Any) -> str:  # noqa: ANN401
    if not isinstance(value, float):
        return str(value)
    return "-" if math.isnan(value) else f"{value:.3g}"


def _curves(logs: Path | None) -> tuple[str, str]:
    """Return the curves as SVG, or why there are none."""
    if logs is None:
        return "", "No checkpoint was tested, so that there is no run to show the curves of."
    try:
        figure = plot_curves({logs.name: read_logs(logs)})
    except (FileNotFoundError, ValueError) as error:
        return "", f"No curves: {error}. Name the folder of the run's logs with --logs."
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    return text.getvalue()[text.getvalue().index("<svg") :], ""


def _gallery(
    out: Path, ways: list[Contender], rows: pd.DataFrame, chosen: list[int]
) -> dict[str, Any]:
    measures = {way.key: _measure(rows[rows["way"] == way.label]) for way in ways}
    # One measure for all, so that errors of different ways can be compared.
    others = [measures[way.key] for way in ways if way.kind != "teacher"]
    measure = "image_mse" if "image_mse" in others else "latent_mse"
    cards = []
    for row in chosen:
        lines = {line["way"]: line for line in rows[rows["row"] == row].to_dict("records")}
        first = lines[ways[0].label]
        with Image.open(out / image_file(ways[0], row)) as image:
            width, height = image.size
        errors = {way.key: lines[way.label][measure] for way in ways}
        cards.append(
            {
                "row": row,
                "prompt": first["prompt"],
                "seed": first["seed"],
                "width": width,
                "height": height,
                "small": max(width, height) <= SMALL,
                "measure": measure.replace("_mse", " MSE"),
                "error": {k: None if pd.isna(v) else float(v) for k, v in errors.items()},
                "image": {way.key: _inlined(out / image_file(way, row)) for way in ways},
            }
        )
    labels = [
        {"key": w.key, "label": w.label, "short": w.name, "student": w.kind == "student"}
        for w in ways
    ]
    return {"ways": labels, "rows": cards}


def _inlined(path: Path) -> str:
    """Return an image as a data URI: exact if it is small, else reduced and compressed."""
    kind, data = "png", path.read_bytes()
    with Image.open(path) as image:
        if max(image.size) > SMALL:
            reduced = image.convert("RGB")
            reduced.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
            buffer = io.BytesIO()
            reduced.save(buffer, "WEBP", quality=88)
            kind, data = "webp", buffer.getvalue()
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def _gallery_note(shown: int, total: int) -> str:
    if shown == total:
        return f"All {total} rows."
    return f"{shown} of {total} rows: those that the student draws worst, and those it draws best."


def _write_grid(out: Path, ways: list[Contender], rows: pd.DataFrame) -> None:
    first = next(way for way in ways if way.kind == "undistilled")
    shown = [way for way in ways if way.kind != "undistilled" or way is first]
    prompts = rows.drop_duplicates("row").set_index("row")["prompt"]
    lines = []
    for row in prompts.index[:8]:
        images = []
        for way in shown:
            with Image.open(out / image_file(way, row)) as image:
                images.append(image.convert("RGB"))
        lines.append((f"{prompts[row]}", images))
    contact_sheet([way.label for way in shown], lines).save(out / "grid.png")
