"""Writes the files of a report: summary tables, an image grid and a self-contained HTML page."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from PIL import Image

from lit_distill.data.table_output import spreadsheet_content
from lit_distill.data.whole_files import write_file, write_image
from lit_distill.evaluation.contact_sheet import contact_sheet
from lit_distill.report.contenders import ContenderResult
from lit_distill.report.plots import plot_curves, read_logs, shown_metrics
from lit_distill.report.summary import headline, page_tables, summarise, terminal_table
from lit_distill.version import __version__

FILES = ("report.html", "metrics.json", "metrics.csv", "rows.csv", "grid.png")
"""Files of a report, beside its images."""

SMALL, LARGEST = 128, 512
"""Images of at most SMALL pixels per side are embedded unchanged, others at most LARGEST wide."""


def image_file(result: ContenderResult, row: int) -> Path:
    """Return the path of a row's image, relative to the report's folder."""
    return Path("images") / result.key / f"row_{row:06d}.png"


def write_report(
    out: Path,
    title: str,
    results: list[ContenderResult],
    rows: pd.DataFrame,
    gallery: int,
    facts: dict[str, Any],
    snippet: str,
    logs: Path | None,
) -> str:
    """Write all files except the images, which must exist already.

    Args:
        out: The report's folder.
        title: Title of the page.
        results: Results of all contenders, the teacher first, with one student among them.
        rows: One line per row and contender, with ``latent_mse`` and ``image_mse``.
        gallery: Largest number of rows in the page.
        facts: Provenance by name.
        snippet: How to generate images with the student.
        logs: Folder that may hold the run's logs.

    Returns:
        The summary as text, for a terminal of 80 columns.
    """
    summary = summarise(results, rows)
    write_file(out / "rows.csv", spreadsheet_content(rows))
    write_file(out / "metrics.csv", spreadsheet_content(summary))
    lines = json.loads(summary.to_json(orient="records"))  # NaN and infinities become null
    content = {"rows": rows["row"].nunique(), "ways": lines, "provenance": facts}
    write_file(out / "metrics.json", f"{json.dumps(content, indent=2, default=str)}\n".encode())
    student = next(result for result in results if result.contender.kind == "student")
    chosen = worst_and_best(rows[rows["way"] == student.label], gallery)
    _write_grid(out, results, rows)
    curves, no_curves = _curves(logs)
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("lit_distill", "assets"), autoescape=True
    )
    page = environment.get_template("report.html.j2").render(
        title=title,
        teacher=results[0].label,
        version=__version__,
        written=datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        rows_total=content["rows"],
        facts=headline(summary),
        **page_tables(summary),
        curves=curves,
        no_curves=no_curves,
        gallery=_gallery(out, results, rows, chosen),
        gallery_note=_gallery_note(len(chosen), content["rows"]),
        snippet=snippet,
        provenance=known(facts),
    )
    write_file(out / "report.html", page.encode(errors="replace"))
    return terminal_table(summary)


def worst_and_best(rows: pd.DataFrame, count: int) -> list[int]:
    """Return at most `count` row numbers, worst first: half the worst, half the best."""
    measure = _measure(rows)
    order = rows.sort_values(measure, ascending=False)["row"].tolist()
    if len(order) <= count:
        return order
    return order[: count - count // 2] + order[len(order) - count // 2 :]


def _measure(rows: pd.DataFrame) -> str:
    """Return the error to sort by: that of the images if latents can't be compared."""
    return "image_mse" if rows["latent_mse"].isna().any() else "latent_mse"


def _curves(logs: Path | None) -> tuple[list[dict[str, str]], str]:
    """Return a picture and its description for each curve, or why there are none."""
    if logs is None:
        return [], "No curves: no checkpoint was tested, so there is no run with logs."
    try:
        values = read_logs(logs)
        return [_curve(logs.name, name, values[name]) for name in shown_metrics(values)], ""
    except (FileNotFoundError, ValueError) as error:
        return [], f"No curves: {error}. Set the folder of the run's logs with --logs."


def _curve(run: str, name: str, log: pd.Series) -> dict[str, str]:
    """Return a curve as an SVG in a data URI, and its description.

    Each is a picture of its own: narrow windows show them one below the other.
    """
    buffer = io.BytesIO()
    figure = plot_curves({run: {name: log}}, [name])
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    (first, last), steps = (log.iloc[0], log.iloc[-1]), log.index
    return {
        "image": f"data:image/svg+xml;base64,{base64.b64encode(buffer.getvalue()).decode()}",
        "alt": f"{name} by optimizer step: {first:.3g} at step {steps[0]}, "
        f"{last:.3g} at step {steps[-1]}",
    }


def known(value: Any) -> Any:  # noqa: ANN401
    """Return a fact without the parts that are not set; texts stay texts."""
    if isinstance(value, Mapping):
        return {name: known(part) for name, part in value.items() if part not in _UNSET}
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


_UNSET: tuple[Any, ...] = (None, "", [], {}, ())


def _gallery(
    out: Path, results: list[ContenderResult], rows: pd.DataFrame, chosen: list[int]
) -> dict[str, Any]:
    """Return the data of the page's gallery, for its script."""
    measures = {
        _measure(rows[rows["way"] == result.label])
        for result in results
        if result.contender.kind != "teacher"
    }
    # One measure for all contenders, so that their errors can be compared.
    measure = "image_mse" if "image_mse" in measures else "latent_mse"
    cards = []
    for row in chosen:
        lines = {line["way"]: line for line in rows[rows["row"] == row].to_dict("records")}
        first = lines[results[0].label]
        with Image.open(out / image_file(results[0], row)) as image:
            width, height = image.size
        errors = {result.key: lines[result.label][measure] for result in results}
        cards.append(
            {
                "row": row,
                "prompt": first["prompt"],
                "seed": first["seed"],
                "width": width,
                "height": height,
                "small": max(width, height) <= SMALL,
                "measure": measure.replace("_mse", " MSE"),
                "error": {k: _finite(v) for k, v in errors.items()},
                "image": {r.key: _data_uri(out / image_file(r, row)) for r in results},
            }
        )
    contenders = [
        {
            "key": result.key,
            "label": result.label,
            "short": result.contender.name,
            "student": result.contender.kind == "student",
        }
        for result in results
    ]
    return {"contenders": contenders, "rows": cards}


def _finite(value: Any) -> float | None:  # noqa: ANN401
    """Return a number, or None: JSON has no NaN and no infinity."""
    return None if pd.isna(value) or math.isinf(value) else float(value)


def _data_uri(path: Path) -> str:
    """Return an image as a data URI: unchanged if it is small, else reduced and compressed."""
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
    return f"{shown} of {total} rows: those with the student's largest and smallest errors."


def _write_grid(out: Path, results: list[ContenderResult], rows: pd.DataFrame) -> None:
    """Write the first rows as a picture, with only one of the undistilled contenders."""
    undistilled = [result for result in results if result.contender.kind == "undistilled"]
    shown = [result for result in results if result not in undistilled[1:]]
    prompts = rows.drop_duplicates("row").set_index("row")["prompt"]
    lines = []
    for row in prompts.index[:8]:
        images = []
        for result in shown:
            with Image.open(out / image_file(result, row)) as image:
                images.append(image.convert("RGB"))
        lines.append((f"{prompts[row]}", images))
    write_image(out / "grid.png", contact_sheet([result.label for result in shown], lines))
