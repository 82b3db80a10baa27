"""Walk-throughs run as they are imported, so that no doctest is looked for in them."""

from pathlib import Path

collect_ignore = [
    path.name
    for path in Path(__file__).parent.glob("*.py")
    if "\n# %%" in path.read_text()
]
