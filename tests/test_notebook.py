"""The cells of the README run in a notebook."""

import os
import re
from pathlib import Path

import pytest
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[1]
SMALL = "import networks, segment; segment.create_model = networks.tiny_network"


def test_a_notebook_runs_the_cells_of_the_readme_and_shows_their_figures(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, text = (ROOT / "README.md").read_text().split("### In a notebook")
    documented = re.findall(r"```python\n(.*?)```", text.split("\n## ")[0], re.DOTALL)
    assert len(documented) == 3
    code = [cell.replace("epochs=30", "epochs=1").replace("128", "32") for cell in documented]
    for folder in ("images/sample/input", "images/sample/truth"):
        (tmp_path / folder).mkdir(parents=True)
        for path in sorted((ROOT / folder).iterdir())[:8]:
            (tmp_path / folder / path.name).write_bytes(path.read_bytes())
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.delenv("MPLBACKEND")
    cells = [new_code_cell(cell) for cell in (SMALL, *code, "type(scores), len(scores)")]  # type: ignore[no-untyped-call]
    notebook = new_notebook(cells=cells)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
    ]
    assert shown == [0, 1, 0, 4, 0]
    printed = "".join(output.get("text", "") for output in notebook.cells[3].outputs)
    assert "1 images, each at its original resolution" in printed
    assert notebook.cells[4].outputs[0].data["text/plain"] == "(list, 1)"
