"""Make notebooks of examples, with their outputs.

    pip install -e ".[docs]"
    python scripts/notebooks.py

The cells of an example begin with ``# %%`` and a title.  Its docstring is the first
text, without the command.  Notebooks are written to ``examples/notebooks``; the tests
check that they have the cells of their examples, and run them.
"""

import ast
import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples" / "notebooks"
NAMES = "linen_model", "jacobian_lens", "own_method"


def main() -> None:
    """Write and run every notebook."""
    FOLDER.mkdir(exist_ok=True)
    for name in NAMES:
        notebook = run_notebook(make_notebook(name))
        nbformat.write(notebook, FOLDER / f"{name}.ipynb")
        print(FOLDER / f"{name}.ipynb")


def make_notebook(name: str) -> nbformat.NotebookNode:
    """Turn an example into a notebook without outputs."""
    text = (ROOT / "examples" / f"{name}.py").read_text(encoding="utf-8")
    docstring = ast.get_docstring(ast.parse(text)) or ""
    title, about = docstring.split("\n", 1)
    about = re.sub(r"\n(    .*\n)+", "", about).strip()
    new = nbformat.v4
    cells = [new.new_markdown_cell(f"# {title.rstrip('.')}\n\n{about}")]
    for cell in text.split("\n# %% ")[1:]:
        heading, code = cell.split("\n", 1)
        cells.append(new.new_markdown_cell(f"## {heading}"))
        cells.append(new.new_code_cell(code.strip()))
    for place, cell in enumerate(cells):  # else they are random
        cell["id"] = f"{name.replace('_', '-')}-{place}"
    kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return new.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run_notebook(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Run all cells in a kernel of their own; the times of the cells are left out."""
    options = {"timeout": 600, "kernel_name": "python3", "record_timing": False}
    return NotebookClient(
        notebook, resources={"metadata": {"path": ROOT}}, **options
    ).execute()


if __name__ == "__main__":
    main()
