import pytest
import yaml
from conftest import ROOT

from lit_distill.cli import main
from lit_distill.commands.init import choose, init
from lit_distill.errors import InputError


@pytest.mark.parametrize(
    ("model", "memory", "devices", "name"),
    [
        ("qwen-image", 48, 1, "qwen_image_48"),
        ("Qwen_Image", 79, 1, "qwen_image_48"),  # the largest that fits
        ("qwen-image", 141, 8, "qwen_image_8x80"),
        ("sdxl", 32, 1, "sdxl_24"),
        ("tiny", 0, 1, "tiny_lora"),
        ("words", 0, 1, "words_lora"),
    ],
)
def test_the_configuration_of_the_largest_gpu_that_is_not_larger(model, memory, devices, name):
    assert choose(model, memory, devices) == ROOT / f"configs/{name}.yaml"


def test_every_configuration_of_a_gpu_is_reachable():
    paths = [path for path in (ROOT / "configs").glob("*.yaml") if path.stem[-1].isdigit()]
    for path in paths:
        model, _, size = path.stem.rpartition("_")
        devices, _, memory = size.rpartition("x")
        assert choose(model, int(memory), int(devices or 1)) == path


def test_what_there_is_is_said_where_there_is_none():
    with pytest.raises(InputError, match=r"'flax' \(did you mean 'flux'\?\); there are flux, qwen"):
        choose("flax", 48, 1)
    with pytest.raises(InputError, match="of wan for 1 x 24 GB; there are 1 x 48, 1 x 80 GB"):
        choose("wan", 24, 1)


def test_a_commented_configuration_is_written_and_nothing_is_overwritten(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    table = "my: data's.csv"
    main(
        ["init", "--model", "flux", "--metadata_path", table, "--out", "a/mine.yaml"]
        + ["--columns", "{prompt: text}", "--constants", "{cfg_scale: 1}"]
    )
    assert "lit-distill plan --config a/mine.yaml" in capsys.readouterr().out
    written = (tmp_path / "a/mine.yaml").read_text()
    original = (ROOT / "configs/flux_48.yaml").read_text()
    assert "configs/" not in written and written.count("#") >= original.count("#") - 1
    expected = yaml.safe_load(original)
    given = {"columns": {"prompt": "text"}, "constants": {"cfg_scale": 1}}
    expected["data"] |= {"metadata_path": table, **given}
    assert yaml.safe_load(written) == expected
    with pytest.raises(InputError, match=r"a/mine.yaml exists, and init overwrites nothing"):
        init(model="sdxl", out="a/mine.yaml")
    assert (tmp_path / "a/mine.yaml").read_text() == written
    init(columns={"prompt": "text"}, out="b.yaml")
    data = yaml.safe_load((tmp_path / "b.yaml").read_text())["data"]
    assert data["metadata_path"] == "data/train/metadata.csv"
    assert data["columns"] == {"prompt": "text"}
