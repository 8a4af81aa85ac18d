"""The notebook runs as it is, and is stored without outputs."""

import pytest
from conftest import ROOT

NOTEBOOK = ROOT / "examples/quickstart.ipynb"


def test_the_notebook_runs_and_shows_pictures(tmp_path, monkeypatch):
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    pytest.importorskip("ipykernel")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs or cell.execution_count for cell in cells)
    resources = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute()
    outputs = [output for cell in cells for output in cell.outputs]
    pictures = [o for o in outputs if "image/png" in o.get("data", {})]
    assert len(pictures) == 2
    printed = "".join(output.get("text", "") for output in outputs)
    assert float(printed.partition("gap closed: ")[2].split()[0]) > 0.2
    assert (tmp_path / "runs/quickstart/lora/README.md").is_file()
