"""A report replaces only an earlier report, whole; what users wrote is shown, never run."""

import csv
import io
import json
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import TINY, generate
from folders import hashes
from PIL import Image

from lit_distill.cli import main
from lit_distill.data.table_output import spreadsheet_content
from lit_distill.errors import InputError
from lit_distill.report import report_writer
from lit_distill.report.contenders import Contender, ContenderResult
from lit_distill.report.html_report import write_report

PROMPTS = ["=1+1", "@SUM(A1)", "a blue handwritten nine on a green background", "-2"]


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Four held-out rows, some of whose prompts spreadsheets would take for formulas."""
    out = tmp_path_factory.mktemp("data")
    (out / "prompts.txt").write_text("\n".join(PROMPTS))
    generate(out / "data", out / "prompts.txt", 4, 1_000_000)
    return out / "data"


def test_command(table, out, *options):
    main(
        ["test", "--model.pretrained_model_name_or_path", "tiny-digits", "--out", str(out)]
        + ["--model.torch_dtype", "float32", "--data.val_metadata_path", str(table)]
        + ["--data.height", "32", "--data.width", "32", "--data.batch_size", "2"]
        + ["--model.preflight", "false", "--trainer.accelerator", "cpu"]
        + ["--trainer.logger", "false", "--undistilled", "[[2, 1]]", *options]
    )


test_command.__test__ = False


def test_a_report_in_the_folder_of_the_data_leaves_the_data(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    before = hashes(folder)
    compare = [{"path": str(TINY), "num_inference_steps": 3, "cfg_scale": 2.0, "name": "=x()"}]
    test_command(folder / "metadata.csv", folder, "--compare", json.dumps(compare))
    first = hashes(folder)
    assert first.items() >= before.items()
    assert (folder / "images/x-3-steps-cfg-2/row_000002.png").is_file()

    # Texts are no formulas; numbers stay numbers, with their signs.
    rows = list(csv.DictReader(io.StringIO((folder / "rows.csv").read_text())))
    assert {row["prompt"] for row in rows} == {"'=1+1", "'@SUM(A1)", PROMPTS[2], "'-2"}
    summary = pd.read_csv(folder / "metrics.csv")
    assert "'=x(), 3 steps, cfg 2" in set(summary["way"])
    assert summary["gap_closed"].dtype == float and summary["gap_closed"].min() < 0

    # Again, without the further contender: its images go, the data stay.
    test_command(folder / "metadata.csv", folder)
    second = hashes(folder)
    assert second.items() >= before.items()
    assert not [name for name in second if "x-3-steps" in name]
    assert not list(tmp_path.glob(".*.draft"))

    # An edited file of the report is not overwritten, nor is anything sampled.
    (folder / "metrics.csv").write_text("mine")
    with pytest.raises(InputError, match=r"holds metrics.csv, not written by this command, or ch"):
        test_command(folder / "metadata.csv", folder)
    assert (folder / "metrics.csv").read_text() == "mine"


@pytest.mark.parametrize(
    "name", ["rows.csv", "grid.png", "images/student-4-steps-cfg-1/row_000002.png"]
)
def test_files_of_others_are_named_before_sampling(data, tmp_path, name, monkeypatch):
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("mine")
    monkeypatch.setattr(report_writer, "sample_held_out", None)
    with pytest.raises(InputError, match=f"holds {name}, not written by this command"):
        test_command(data / "metadata.csv", tmp_path)
    assert hashes(tmp_path).keys() == {name}
    assert (tmp_path / name).read_text() == "mine"


def test_a_test_that_fails_leaves_the_earlier_report(data, tmp_path, monkeypatch):
    out = tmp_path / "report"
    test_command(data / "metadata.csv", out)
    before = hashes(out)

    def failing(*arguments):
        raise OSError("no space left")

    monkeypatch.setattr(report_writer, "write_report", failing)
    with pytest.raises(OSError, match="no space left"):
        test_command(data / "metadata.csv", out)
    assert hashes(out) == before
    assert list(tmp_path.iterdir()) == [out]


def test_a_damaged_provenance_does_not_cost_the_report(data, tmp_path):
    folder = shutil.copytree(data, tmp_path / "data")
    path = folder / "provenance.json"
    path.write_text(path.read_text()[:50])
    test_command(folder / "metadata.csv", tmp_path / "report")
    facts = json.loads((tmp_path / "report/metrics.json").read_text())["provenance"]
    assert "provenance.json is damaged" in facts["held-out rows made with"]


@pytest.mark.parametrize("text", ["=1", "+1", "-1", "@A1", "\t=1", "\r=1", "\n=1"])
def test_texts_are_no_formulas_and_numbers_stay(text):
    table = pd.DataFrame({text: [text, "a=1"], "number": [-1.5, 2.0]})
    read = list(csv.reader(io.StringIO(spreadsheet_content(table).decode(), newline="")))
    assert read == [[f"'{text}", "number"], [f"'{text}", "-1.5"], ["a=1", "2.0"]]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(1)> {{ 7*7 }} $x^{$ \"'&"


def test_nothing_in_the_page_is_run(tmp_path):
    """Names, prompts, metrics, settings and logs with HTML in them; errors that are infinite."""
    results = [
        ContenderResult(Contender(kind, HOSTILE), f"{kind} {HOSTILE}", 1.0, 1, {HOSTILE: 1.0})
        for kind in ("teacher", "student")
    ]
    for result in results:
        path = tmp_path / "images" / result.key / "row_000002.png"
        path.parent.mkdir(parents=True)
        noise = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path)
    rows = pd.DataFrame(
        [
            {"row": 2, "way": result.label, "prompt": HOSTILE, "seed": 1, "evaluations": 4}
            | {"latent_mse": float("inf"), "image_mse": 1.0}
            for result in results
        ]
    )
    logs = tmp_path / HOSTILE.replace("/", "")
    logs.mkdir()
    name = HOSTILE.replace('"', '""')
    (logs / "metrics.csv").write_text(f'step,"{name}",train_loss\n0,1,2\n1,2,3\n')
    facts = {HOSTILE: HOSTILE, "settings": {HOSTILE: Path(HOSTILE)}}
    write_report(tmp_path, HOSTILE, results, rows, 4, facts, HOSTILE, logs)
    page = (tmp_path / "report.html").read_text()
    assert page.count("<script") == 2 and page.count("</script>") == 2
    assert page.count("<img") == page.count('<img src="data:image/svg+xml;base64,') > 0
    assert "{{ 7*7 }}" in page and "<h1>49" not in page
    data = page.partition('type="application/json">')[2].partition("</script>")[0]
    gallery = json.loads(data, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert gallery["rows"][0]["prompt"] == HOSTILE
    assert set(gallery["rows"][0]["error"].values()) == {None}
    json.loads((tmp_path / "metrics.json").read_text(), parse_constant=pytest.fail)
