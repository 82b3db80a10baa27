from toyfeat.report import page


def test_a_page_refers_to_no_other_file(tmp_path):
    body = [page.paragraph("1 < 2"), page.picture("data:image/png;base64,AA", 'a "b"')]
    page.write_page(tmp_path / "x.html", "T", [page.section("S", body)], "end")
    text = (tmp_path / "x.html").read_text()
    assert "1 &lt; 2" in text
    assert "http" not in text
    assert 'alt="a &quot;b&quot;"' in text
