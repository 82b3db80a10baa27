"""The code in README and docs runs, block after block, as a reader would run it."""

from pathlib import Path

import pytest

from toyfeat.discover import ConsensusConfig

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/extending.md", "docs/lens.md"])
def test_the_python_blocks_of_a_page_run_in_order(page, capsys, tmp_path, monkeypatch):
    blocks = (ROOT / page).read_text(encoding="utf-8").split("```python\n")[1:]
    assert blocks, f"{page} has no python example"
    monkeypatch.chdir(tmp_path)
    # Fewer examples and steps; enough for the example of the README.
    names = {"QUICK": ConsensusConfig(examples=1000, steps=30, batch_size=512)}
    for block in blocks:
        code = block.split("```")[0].replace("steps=2000", "steps=20")
        code = code.replace("subject_of(task))", "subject_of(task), config=QUICK)")
        exec(compile(code, page, "exec"), names)
    assert capsys.readouterr().out.strip()
    if page == "README.md":  # "it finds all twenty readers (coverage .99 or more)"
        assert len(names["task"].truth.readers) == 20
        assert names["scores"].readers >= 0.99


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"
