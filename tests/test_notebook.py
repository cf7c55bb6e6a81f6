"""A notebook imports the module and runs the documented flow."""

import os
from pathlib import Path

import pytest
from conftest import MakePairs
from nbclient import NotebookClient
from nbformat.v4 import new_code_cell, new_notebook

ROOT = Path(__file__).parents[1]

CELLS = """\
import networks, segment
pairs = segment.find_image_pairs("data/images", "data/masks")
sizes = segment.inspect(pairs[0])
segment.plot_image_sizes(sizes)
---
split = segment.train_val_test_split(*pairs, val_split=0.25, test_split=0.25)
train, val, test = (segment.create_generator(*part, image_size=(32, 32)) for part in split)
model = networks.tiny_network((32, 32))
history = segment.train_model(model, train, val, epochs=1, verbose=0)
segment.save_model(model, "unet.keras", split=split)
---
model = segment.load_model("unet.keras")
predictions = segment.predict(model, test, verbose=0)
scores = segment.results(test, predictions, history=segment.model_record(model).history)
---
len(scores), 0 <= scores[0]["dice"] <= 1
"""


def test_a_notebook_runs_the_documented_flow_and_shows_its_figures(
    make_pairs: MakePairs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_pairs(8)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{ROOT / 'tests'}")
    monkeypatch.delenv("MPLBACKEND")
    cells = [new_code_cell(cell) for cell in CELLS.split("---\n")]  # type: ignore[no-untyped-call]
    notebook = new_notebook(cells=cells)  # type: ignore[no-untyped-call]
    NotebookClient(notebook, resources={"metadata": {"path": str(tmp_path)}}).execute()
    shown = [
        sum("image/png" in output.get("data", {}) for output in cell.outputs)
        for cell in notebook.cells
    ]
    assert shown == [1, 0, 4, 0]
    assert "2 images, each at its original resolution" in notebook.cells[2].outputs[0].text
    assert notebook.cells[3].outputs[0].data["text/plain"] == "(2, True)"
