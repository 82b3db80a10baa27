"""The code in README and docs runs, block after block, as a reader would run it."""

from pathlib import Path

import pytest
from processes import run_python

from toyfeat.discover import ConsensusConfig

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "docs/bases.md", "docs/concepts.md", "docs/dictionaries.md"]
PAGES += ["docs/extending.md", "docs/finding.md", "docs/lens.md", "docs/models.md"]
PAGES += ["docs/partition.md", "docs/scale.md", "docs/torch.md"]


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
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


def test_every_page_with_python_blocks_is_executed():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    with_blocks = {
        page.relative_to(ROOT).as_posix()
        for page in pages
        if "```python" in page.read_text(encoding="utf-8")
    }
    assert with_blocks == set(PAGES)


def test_links_between_pages_lead_somewhere():
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    for page in pages:
        for part in page.read_text(encoding="utf-8").split("](")[1:]:
            target = part.split(")")[0].split("#")[0]
            if target and "://" not in target:
                assert (page.parent / target).exists(), f"{page.name}: {target}"


def test_the_site_builds_without_a_warning(tmp_path):
    pytest.importorskip("mkdocs", reason="the site wants the docs extra")
    quiet = {"NO_MKDOCS_2_WARNING": "1"}
    done = run_python("-m", "mkdocs", "build", "--site-dir", tmp_path, env=quiet)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    for page in sorted((ROOT / "docs").rglob("*.md")):
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert name.replace("README", "index") in pages
    moments = (tmp_path / "api" / "decompose.html").read_text(encoding="utf-8")
    assert "<math" in moments
    for left in ":math:", ":func:", ":class:", ".. math", "<autoref":
        assert left not in moments


def test_every_page_is_in_the_navigation():
    listed = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    for page in sorted((ROOT / "docs").rglob("*.md")):
        assert page.relative_to(ROOT / "docs").as_posix() in listed
