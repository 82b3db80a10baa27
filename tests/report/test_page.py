from toyfeat.report import page


def test_a_page_refers_to_no_other_file(tmp_path):
    body = [page.paragraph("1 < 2"), page.picture("data:image/png;base64,AA", 'a "b"')]
    page.write_page(tmp_path / "x.html", "T", [page.section("S", body)], "end")
    text = (tmp_path / "x.html").read_text()
    assert "1 &lt; 2" in text
    assert "http" not in text
    assert 'alt="a &quot;b&quot;"' in text


def test_a_fold_hides_what_it_holds_and_drawings_share_a_caption():
    folded = page.fold("3 < 4", [page.paragraph("long")])
    assert folded == ("<details><summary>3 &lt; 4</summary>\n<p>long</p>\n</details>")
    drawn = page.panels([("data:a", "left"), ("data:b", 'r "2"')], "both")
    assert drawn.count("<figcaption>both</figcaption>") == 1
    assert 'alt="left"' in drawn
    assert 'alt="r &quot;2&quot;"' in drawn
