"""Notebooks have the cells of their examples, outputs, and run."""

import importlib.util
import re
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="pip install 'toyfeat[docs]'")
pytest.importorskip("nbclient", reason="pip install 'toyfeat[docs]'")

ROOT = Path(__file__).parents[2]
NAMES = "linen_model", "jacobian_lens", "own_method"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location(
        "notebooks", ROOT / "scripts" / "notebooks.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_are_committed(script):
    there = {path.stem for path in script.FOLDER.glob("*.ipynb")}
    assert there == set(script.NAMES) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_cells_are_those_of_the_example(name, script):
    made = script.make_notebook(name)
    kept = nbformat.read(script.FOLDER / f"{name}.ipynb", as_version=4)
    nbformat.validate(kept)
    assert [(c.cell_type, c.source, c.id) for c in kept.cells] == [
        (c.cell_type, c.source, c.id) for c in made.cells
    ], "run python scripts/notebooks.py"


@pytest.mark.parametrize("name", NAMES)
def test_outputs_are_text_without_errors_or_paths(name, script):
    kept = nbformat.read(script.FOLDER / f"{name}.ipynb", as_version=4)
    outputs = [output for cell in kept.cells for output in cell.get("outputs", [])]
    assert outputs
    for output in outputs:
        assert (output.output_type, output.name) == ("stream", "stdout")
        assert str(ROOT) not in output.text


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, script):
    pytest.importorskip("ipykernel")
    fresh = script.run_notebook(script.make_notebook(name))
    kept = nbformat.read(script.FOLDER / f"{name}.ipynb", as_version=4)
    texts = [
        [
            re.sub(r"[-\d. ]+", "#", output.text)  # figures differ in their last places
            for cell in notebook.cells
            for output in cell.get("outputs", [])
        ]
        for notebook in (fresh, kept)
    ]
    assert texts[0] == texts[1]
