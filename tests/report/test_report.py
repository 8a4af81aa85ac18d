import functools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
import torch
from browser import CHROMIUM, Browser
from conftest import ROOT, TINY, generate
from diffusers import QwenImageTransformer2DModel
from PIL import Image

from lit_distill import export_student, load_student
from lit_distill.cli import main
from lit_distill.report.html_report import worst_and_best
from lit_distill.report.plots import find_logs, plot_curves, read_logs

needs_chromium = pytest.mark.skipif(
    CHROMIUM is None,
    reason="no chromium on the PATH to open the report in; Debian: apt-get install chromium",
)
HOSTILE = 'a red seven <script>fetch("http://example.com")</script> & </script>'


@pytest.fixture(scope="module")
def heldout(tmp_path_factory):
    """Eight held-out rows of four prompts, one of which would run as HTML."""
    out = tmp_path_factory.mktemp("heldout")
    prompts = (TINY / "prompts_heldout.txt").read_text().splitlines()[:3] + [HOSTILE]
    (out / "prompts.txt").write_text("\n".join(prompts))
    generate(out / "data", out / "prompts.txt", 8, 1_000_000, "--seeds_per_prompt", "2")
    return out / "data/metadata.csv"


@pytest.fixture(scope="module")
def run(pairs, heldout, tmp_path_factory):
    """A short run with its checkpoint and log."""
    out = tmp_path_factory.mktemp("run")
    main(
        ["fit", "--config", str(ROOT / "configs/tiny_lora.yaml"), "--trainer.max_steps", "4"]
        + ["--data.metadata_path", str(pairs / "train/metadata.csv")]
        + ["--data.val_metadata_path", str(heldout), "--trainer.log_every_n_steps", "1"]
        + ["--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", str(out)]
        + ["--trainer.check_val_every_n_epoch", "1"]
    )
    return next(out.rglob("last.ckpt"))


@pytest.fixture(scope="module")
def report(run, heldout, tmp_path_factory):
    """Its report, beside its own export and the undistilled pipeline at other settings."""
    out = tmp_path_factory.mktemp("report")
    export_student(run, out / "lora")
    compare = [
        str(run),
        {"lora": str(out / "lora"), "name": "exported"},
        {"path": str(TINY), "num_inference_steps": 3, "cfg_scale": 2.0, "name": "folder"},
    ]
    main(
        ["test", "--ckpt_path", str(run), "--data.val_metadata_path", str(heldout)]
        + ["--data.batch_size", "4", "--data.height", "32", "--data.width", "32"]
        + ["--trainer.logger", "false", "--trainer.accelerator", "cpu", "--gallery", "6"]
        + ["--out", str(out / "report"), "--compare", json.dumps(compare)]
    )
    return out / "report"


def contenders(report):
    content = json.loads((report / "metrics.json").read_text())
    return {contender["way"]: contender for contender in content["ways"]}


def test_every_contender_is_measured(report):
    measured = contenders(report)
    assert list(measured) == [
        "teacher, 10 steps, cfg 4",
        "undistilled, 4 steps, cfg 1",
        "undistilled, 4 steps, cfg 4",
        "undistilled, 8 steps, cfg 4",
        "student, 4 steps, cfg 1",
        "last, 4 steps, cfg 1",
        "exported, 4 steps, cfg 1",
        "folder, 3 steps, cfg 2",
    ]
    evaluations = [contender["evaluations"] for contender in measured.values()]
    assert evaluations == [20, 4, 8, 16, 4, 4, 4, 6]
    teacher, undistilled, _, nearest, student, *same, folder = measured.values()
    assert teacher["latent_mse"] is None  # its pairs are stored
    assert undistilled["gap_closed"] == pytest.approx(0, abs=1e-4)
    assert 0 < student["gap_closed"] < nearest["gap_closed"] < 1
    for other in same:
        for name in ("latent_mse", "psnr", "frechet", "diversity"):
            assert other[name] == pytest.approx(student[name], rel=1e-2), name
        assert other["latent_mse"] != undistilled["latent_mse"]
    assert folder["latent_mse"] not in (undistilled["latent_mse"], student["latent_mse"])
    for contender in measured.values():
        assert contender["speed_up"] == pytest.approx(
            teacher["seconds_an_image"] / contender["seconds_an_image"]
        )
    assert student["speed_up"] > 1  # a fifth of the denoiser calls
    table = pd.read_csv(report / "metrics.csv")
    assert table["way"].tolist() == list(measured)
    assert table["latent_mse"].tolist()[1:] == pytest.approx(
        [contender["latent_mse"] for contender in measured.values()][1:]
    )


def test_a_test_makes_no_denoiser_call_that_its_table_does_not_need(
    run, heldout, tmp_path, monkeypatch
):
    original, calls = QwenImageTransformer2DModel.forward, []

    @functools.wraps(original)
    def counting(self, hidden_states, **options):
        calls.append(len(hidden_states))
        return original(self, hidden_states, **options)

    monkeypatch.setattr(QwenImageTransformer2DModel, "forward", counting)
    for table in (heldout, heldout.parent.parent / "other/metadata.csv"):
        if not table.is_file():  # rows that training has not seen: their errors are not recorded
            generate(table.parent, heldout.parent.parent / "prompts.txt", 4, 5_000_000)
        calls.clear()
        main(
            ["test", "--ckpt_path", str(run), "--data.val_metadata_path", str(table)]
            + ["--data.batch_size", "2", "--data.height", "32", "--data.width", "32"]
            + ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
            + ["--out", str(tmp_path / table.parent.name), "--undistilled", "[[2, 4.0]]"]
        )
        rows = len(pd.read_csv(table))
        # 4 of the student, 4 of the undistilled pipeline, 2 x 2 of it with guidance; one call of
        # one row learns how latents are decoded.
        assert sum(calls) == rows * (4 + 4 + 4) + 1


def test_images_and_errors_of_every_row_are_kept(report, heldout):
    rows = pd.read_csv(report / "rows.csv")
    assert len(rows) == 8 * 8
    measured = contenders(report)
    for label, errors in rows.groupby("way"):
        folder = report / "images" / measured[label]["key"]
        assert len(list(folder.glob("row_*.png"))) == 8
        if not label.startswith("teacher"):
            mse = errors["latent_mse"].mean()
            assert mse == pytest.approx(measured[label]["latent_mse"], rel=1e-5)
            psnr = -10 * math.log10(errors["image_mse"].mean())
            assert psnr == pytest.approx(measured[label]["psnr"], rel=1e-5)
    stored = np.asarray(Image.open(heldout.parent / "images/000003.png"), int)
    shown = Image.open(report / "images/teacher-10-steps-cfg-4/row_000005.png")
    assert np.abs(np.asarray(shown, int) - stored).max() <= 1
    assert Image.open(report / "grid.png").width > 5 * 256


def test_provenance_names_run_rows_and_machine(report, run, heldout):
    facts = json.loads((report / "metrics.json").read_text())["provenance"]
    assert str(run) in facts["checkpoint"] and facts["optimizer steps"] == "4"
    assert facts["settings"]["lora"] == {"r": 32}
    assert str(heldout) in facts["held-out rows"]
    assert facts["held-out rows made with"]["num_inference_steps"] == 10
    assert f"torch {torch.__version__.split('+')[0]}" in facts["versions"]


def test_the_snippet_generates_what_the_report_shows(report, run, tmp_path):
    page = (report / "report.html").read_text()
    snippet = re.search(r'<pre id="run">(.*?)</pre>', page, re.DOTALL)[1]
    for code, character in (("&#39;", "'"), ("&#34;", '"'), ("&lt;", "<"), ("&gt;", ">")):
        snippet = snippet.replace(code, character)
    subprocess.run([sys.executable, "-c", snippet.replace("&amp;", "&")], check=True, cwd=tmp_path)
    image = np.asarray(Image.open(tmp_path / "image.png"), int)
    shown = Image.open(report / "images/student-4-steps-cfg-1/row_000002.png")
    assert np.abs(image - np.asarray(shown, int)).max() <= 1


@needs_chromium
def test_the_page_works_in_a_browser_without_a_network(report, tmp_path):
    with Browser() as browser:
        browser.open(report / "report.html")
        assert browser.requests == [(report / "report.html").resolve().as_uri()]

        # All images are there, the curves too, and the table's columns.
        assert browser.run("document.querySelectorAll('.card').length") == 6
        loaded = "[...document.querySelectorAll('.card img')]"
        loaded += ".every((i) => i.complete && i.naturalWidth === 32 && i.alt)"
        assert browser.run(loaded)
        curves = "[...document.querySelectorAll('.curves img')].map((i) => i.naturalWidth && i.alt)"
        assert any("val_gap_closed by optimizer step" in alt for alt in browser.run(curves))
        assert "gap closed" in browser.run("document.getElementById('summary').innerText")
        assert browser.run("document.querySelector('.tag.l').textContent") == "teacher"
        assert browser.run("document.querySelector('.tag.r').textContent") == "student"

        # Side by side: both images whole, next to each other.
        boxes = browser.run(
            "[...document.querySelectorAll('.card:first-child img')].map((image) =>"
            " (({x, y, width, height}) => [x, y, width, height])(image.getBoundingClientRect()))"
        )
        (x, y, *size), (other_x, other_y, *other_size) = boxes
        assert other_y == y and other_size == size and other_x >= x + size[0]
        choose = "(document.getElementById('{}').value = {!r},"
        choose += " document.getElementById('{}').dispatchEvent(new Event('input')))"
        browser.run(choose.format("view", "slide", "view"))

        # The slider: a drag of the mouse moves the border between the two images.
        corner = browser.run(
            "document.querySelector('.controls').style.position = 'static';"
            "document.querySelector('.pair').scrollIntoView({block: 'center'});"
            "(({x, y, width, height}) => [x, y, width, height])"
            "(document.querySelector('.pair').getBoundingClientRect())"
        )
        x, y, width, height = corner
        browser.screenshot(tmp_path / "before.png")
        mouse = {"y": y + height / 3, "button": "left", "clickCount": 1}
        for kind, share in (("mousePressed", 0.5), ("mouseMoved", 0.8), ("mouseReleased", 0.9)):
            browser.call(
                "Input.dispatchMouseEvent", type=kind, x=x + share * width, buttons=1, **mouse
            )
        position = "document.querySelector('.pair').style.getPropertyValue('--cut')"
        cut = browser.run(position)
        assert 75 <= float(cut.rstrip("%")) <= 95
        browser.screenshot(tmp_path / "after.png")
        row = browser.run("document.querySelector('.text div').textContent").split(",")[0][4:]
        right_of_the_middle = {}
        for name in ("before", "after"):
            shot = Image.open(tmp_path / f"{name}.png").convert("RGB")
            # The middle of every pixel of the picture in columns 18 to 22 of 32, tags aside.
            spots = [(i, j) for i in range(2, 26) for j in range(18, 23)]
            right_of_the_middle[name] = np.array(
                [
                    shot.getpixel((x + (j + 0.5) * width / 32, y + (i + 0.5) * height / 32))
                    for i, j in spots
                ],
                int,
            )
        for name, key in (("before", "student-4-steps-cfg-1"), ("after", "teacher-10-steps-cfg-4")):
            stored = np.asarray(Image.open(report / f"images/{key}/row_{int(row):06d}.png"), int)
            expected = stored[2:26, 18:23].reshape(-1, 3)
            assert np.abs(right_of_the_middle[name] - expected).max() <= 4, name

        for kind in ("keyDown", "keyUp"):
            browser.call("Input.dispatchKeyEvent", type=kind, key="Home", windowsVirtualKeyCode=36)
        assert browser.run(position) == "0%"

        # Order and filter.
        errors = (
            "[...document.querySelectorAll('.card .text div')]"
            ".map((d) => Number(d.textContent.match(/MSE (.*)$/)[1]))"
        )
        worst = browser.run(errors)
        assert worst == sorted(worst, reverse=True)
        browser.run(choose.format("order", "best", "order"))
        assert browser.run(errors) == worst[::-1]
        browser.run(choose.format("filter", "RED  fetch", "filter"))
        shown = browser.run("[...document.querySelectorAll('.card .text')].map((d) => d.innerText)")
        assert shown and all(text.startswith(HOSTILE) for text in shown)
        count = browser.run("document.getElementById('count').textContent")
        assert count == f"{len(shown)} of 6 rows" and len(shown) < 6
        browser.run(choose.format("filter", "nothing like it", "filter"))
        assert browser.run("document.querySelectorAll('.card').length") == 0
        browser.run(choose.format("filter", "", "filter"))

        # Another contender.
        key = contenders(report)["folder, 3 steps, cfg 2"]["key"]
        source = "document.querySelector('.card img.right').src"
        before = browser.run(source)
        browser.run(choose.format("right", key, "right"))
        assert browser.run(source) != before
        assert browser.run("document.querySelector('.tag.r').textContent") == "folder"

        assert browser.problems == []
        assert len(browser.requests) == 1


def test_two_contenders_of_one_name_are_refused(run, heldout, tmp_path):
    with pytest.raises(
        ValueError, match="two contenders are called 'last, 4 steps, cfg 1'; give one"
    ):
        main(
            ["test", "--ckpt_path", str(run), "--data.val_metadata_path", str(heldout)]
            + ["--trainer.logger", "false", "--trainer.accelerator", "cpu"]
            + ["--trainer.limit_test_batches", "1", "--out", str(tmp_path)]
            + ["--compare", json.dumps([str(run), str(run)])]
        )


def test_the_gallery_takes_the_worst_and_the_best():
    rows = pd.DataFrame({"row": range(2, 12), "latent_mse": np.arange(10.0)})
    assert worst_and_best(rows, 5) == [11, 10, 9, 3, 2]
    assert worst_and_best(rows, 1) == [11]
    assert worst_and_best(rows, 20) == list(range(11, 1, -1))


# Curves


def test_plot_draws_the_curves_of_several_runs(run, tmp_path):
    folder = run.parent.parent
    logs = read_logs(folder)
    log = pd.read_csv(folder / "metrics.csv")
    expected = log.dropna(subset=["val_gap_closed"])
    assert logs["val_gap_closed"].tolist() == expected["val_gap_closed"].tolist()
    assert logs["val_gap_closed"].index.tolist() == expected["step"].tolist()
    out = tmp_path / "curves.png"
    main(["plot", "--logs", json.dumps([str(folder), str(folder)]), "--out", str(out)])
    assert Image.open(out).width > 1000
    figure = plot_curves({"one": logs, "two": logs}, ["val_gap_closed", "train_loss"])
    assert [axes.get_title() for axes in figure.axes] == ["val_gap_closed", "train_loss"]
    line = figure.axes[0].lines[0]
    assert line.get_ydata().tolist() == expected["val_gap_closed"].tolist()
    assert [text.get_text() for text in figure.axes[0].get_legend().texts] == ["one", "two"]
    with pytest.raises(ValueError, match=r"no run has logged 'val_fid'; logged are .*val_psnr"):
        plot_curves({"one": logs}, ["val_fid"])


def test_logs_are_found_or_named(run, tmp_path):
    assert find_logs(run.parent.parent.parent) == run.parent.parent
    (tmp_path / "metrics.csv").write_text("way,psnr\nstudent,26\n")  # a report's own
    with pytest.raises(FileNotFoundError, match="holds no logs: neither events"):
        find_logs(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.csv").write_text("step,x\n0,1\n")
    with pytest.raises(ValueError, match="holds the logs of 2 runs; name one of them"):
        find_logs(tmp_path)


def test_a_resumed_run_s_later_values_are_kept(tmp_path):
    (tmp_path / "metrics.csv").write_text("epoch,step,loss\n0,0,3\n0,5,2\n0,5,1\n,7,\n")
    log = read_logs(tmp_path)["loss"]
    assert log.to_dict() == {0: 3.0, 5: 1.0}


def test_a_student_of_the_report_is_the_one_of_load_student(report, run):
    pipe = load_student(run)
    rows = pd.read_csv(report / "rows.csv").query("way == 'student, 4 steps, cfg 1'")
    row = rows.iloc[-1]
    image = pipe(
        row["prompt"],
        height=32,
        width=32,
        num_inference_steps=4,
        true_cfg_scale=1.0,
        generator=torch.Generator().manual_seed(int(row["seed"])),
    ).images[0]
    shown = Image.open(report / f"images/student-4-steps-cfg-1/row_{row['row']:06d}.png")
    assert np.abs(np.asarray(image, int) - np.asarray(shown, int)).max() <= 1
