import numpy as np
import pytest

from toyfeat.dictionary.latents import Latent
from toyfeat.lm.contexts import Context
from toyfeat.report import language, language_figures
from toyfeat.report.latents import context_html

pytest.importorskip("matplotlib")

SCORES = dict.fromkeys(
    ("ce", "kl", "recovered", "recovered_zero", "explained", "attribution_l0"), 0.5
) | {"attribution_l0_explained": 2.0, "unexplained": 0.1, "unmet": 0.2, "dead": 0.0}


def scored(method, l0, **more):
    row = {"site": "blocks_0/resid_post", "method": method, "what": "scores"}
    return row | SCORES | {"l0": l0} | more


def faithful(method, effects, **more):
    scores = {"correlation": 0.9, "slope": 1.0, "error": 0.1, "pairs": len(effects)}
    row = {"site": "blocks_0/resid_post", "method": method, "what": "faithfulness"}
    return row | scores | {"effects": effects} | more


ROWS = [
    {"site": "blocks_0/resid_post", "what": "losses", "clean": 1.0},
    scored("acts-k4-s0", 4.0),
    scored("acts-k8-s0", 8.0, recovered=None),
    scored("pca-k4", 4.0),
    faithful("acts-k4-s0", [[0.1, 0.2], [-0.3, -0.2]]),
    faithful("acts-k8-s0", [[0.0, 0.0]], correlation=None),
]
BASES = [
    {"site": "blocks_0/resid_post", "basis": "pca", "spectrum": [2.0, 1.0, 0.0]}
    | {"participation": 1.8},
    scored("pca, 1", 1.0),
    scored("pca, 4", 4.0, recovered=None),
]
STEPS = np.array([1.0, 2.0])
CURVES = {
    "acts-k4-s0": {"step": STEPS, "fvu": STEPS / 4, "dead": 0 * STEPS},
    "acts-k4-s1": {"step": STEPS, "fvu": STEPS / 8, "dead": 0 * STEPS},
}
CONTEXT = Context(("<b>", "\n", " c"), (0.0, 2.0, -1.0), 1, -0.25)
LATENT = Latent(7, 0.125, 0.5, (CONTEXT,), (CONTEXT,), ("<i>",), ("no",), ((3, 0.75),))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    folder = tmp_path_factory.mktemp("page")
    latents = {"acts-k4-s0": [LATENT]}
    header = {"model": "tiny"}
    path = language.write_language(
        folder, ROWS, BASES, latents, header=header, curves=CURVES
    )
    return path.read_text(encoding="utf-8")


def test_the_page_has_everything_in_it_and_fetches_nothing(page):
    assert page.count("data:image/png;base64,") == 4 + 2 + 2 + 2
    for text in (
        "What the model keeps",
        "Training",
        "Attributions against leaving out",
        "Bases",
    ):
        assert f"<h2>{text}</h2>" in page
    assert "model: tiny" in page
    assert "http" not in page.replace("http-equiv", "")


def test_a_latent_is_shown_with_its_tokens_escaped(page):
    assert "<h3>Latent 7</h3>" in page
    assert "activation density 12.50%" in page
    assert "3 (0.75)" in page
    assert "<code>&lt;i&gt;</code>" in page
    assert "&lt;b&gt;" in page
    assert "<b>" not in page
    assert "⏎" in page
    assert "-0.25 nats" in page


def test_shades_follow_the_codes_and_the_token_in_question_is_underlined():
    shown = context_html(CONTEXT)
    assert shown.count("underline") == 1
    assert "rgba(213,94,0,0.60);text-decoration:underline" in shown
    assert "rgba(213,94,0,0.30)" in shown
    assert "rgba(213,94,0,0.00)" in shown


def test_scores_have_a_line_each_with_faithfulness_beside_them():
    head, *lines = language.score_lines(ROWS)
    assert [line[0] for line in lines] == ["acts-k4", "acts-k8", "pca-k4"]
    columns = dict(zip(head, lines[0], strict=True))
    assert columns["L0"] == "4.0"
    assert columns["correlation"] == "0.900"
    missing = dict(zip(head, lines[1], strict=True))
    assert missing["recovered"] == missing["correlation"] == ""
    assert lines[2][-3:] == ("", "", "")


def axes_of(figures):
    return [axis for picture in figures.values() for axis in picture.axes]


def test_pictures_show_the_rows():
    fronts = axes_of(language_figures.fronts_figures(ROWS))
    lines = {x.get_label(): x.lines[0].get_xdata() for x in fronts[0].containers}
    assert {name: list(x) for name, x in lines.items()} == {
        "acts": [4.0, 8.0],
        "pca": [4.0],
    }
    fvu, dead = axes_of(language_figures.curves_figures(CURVES))
    assert [list(line.get_ydata()) for line in fvu.lines] == [
        [0.25, 0.5],
        [0.125, 0.25],
    ]
    assert len(dead.lines) == 2
    drawn = axes_of(language_figures.faithfulness_figures(ROWS))
    np.testing.assert_allclose(
        drawn[0].collections[0].get_offsets(), [[0.1, 0.2], [-0.3, -0.2]]
    )
    kept, spectrum = axes_of(language_figures.decomposition_figures(BASES))
    assert list(kept.lines[0].get_xdata()) == [1.0, 4.0]
    assert list(spectrum.lines[0].get_ydata()) == [1.0, 0.5]


def test_seeds_are_one_line_and_one_point_with_their_range():
    rows = [
        scored(f"{kind}-k4-s{seed}", 4.0, recovered=value)
        for kind in ("acts", "paired alone")
        for seed, value in ((0, 0.5), (1, 0.9), (12, 0.6))
    ]
    rows.append(faithful("acts-k4-s1", [[0.1, 0.2]], correlation=0.7))
    head, *lines = language.score_lines(rows)
    found = [dict(zip(head, line, strict=True)) for line in lines]
    assert [x["method"] for x in found] == ["acts-k4", "paired alone-k4"]
    assert [x["seeds"] for x in found] == ["3", "3"]
    assert found[0]["recovered"] == "0.600 (0.500 to 0.900)"
    assert found[0]["correlation"] == "0.700"
    bars = axes_of(language_figures.fronts_figures(rows))[0].containers[0]
    assert bars.lines[0].get_ydata().tolist() == [0.6]
    np.testing.assert_allclose(
        bars.lines[2][0].get_segments()[0][:, 1], [0.5, 0.9], atol=1e-12
    )


def test_a_seed_without_a_score_is_said_and_not_drawn():
    rows = [
        scored(f"acts-k4-s{i}", 4.0, recovered=x) for i, x in enumerate((None, 0.5))
    ]
    head, line = language.score_lines(rows)
    assert dict(zip(head, line, strict=True))["recovered"] == "0.500, 1 missing"
    bars = axes_of(language_figures.fronts_figures(rows))[0].containers[0]
    assert bars.lines[0].get_ydata().tolist() == [0.5]


def test_only_bases_are_grey():
    kinds = "acts", "strong", "paired alone", "joint pca"
    found = [language_figures._colour(kind) for kind in kinds]
    assert found == [
        (language_figures.BLUE, "-"),
        (language_figures.RED, "--"),
        (language_figures.ORANGE, "--"),
        (language_figures.GREY, ":"),
    ]


def test_a_page_of_nothing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="there are no rows"):
        language.write_language(tmp_path, [], [], {}, header={})
    assert not list(tmp_path.iterdir())
