"""Descriptions of latents of any model, and the page that shows them."""

import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.dictionary.latents import from_acts
from toyfeat.metrics.latents import Example, describe_latents
from toyfeat.report.latents import write_latents
from toyfeat.report.thumbnails import bars_svg, pixels_of, png_bytes

RNG = np.random.default_rng(0)
B, D, C, M = 12, 5, 3, 8
X = RNG.standard_normal((B, D)).astype(np.float32)
HEAD = RNG.standard_normal((D, C)).astype(np.float32)
SAE = ft.dictionaries.standard(D, M)
PARAMS = {
    "W_enc": jnp.asarray(RNG.standard_normal((D, M)), jnp.float32),
    "W_dec": jnp.asarray(RNG.standard_normal((M, D)), jnp.float32),
    "b_enc": jnp.asarray(RNG.standard_normal(M), jnp.float32),
    "b_dec": jnp.asarray(RNG.standard_normal(D), jnp.float32),
}
LINEAR = ft.from_split(lambda p, x: x, lambda p, a: a @ jnp.asarray(HEAD))
SQUARE = ft.readouts.scalar(lambda y: jnp.sum(y**2))
# An image model whose site is the image itself, by a channel of ones.
IMAGES = np.full((4, 6, 6), -1.0, np.float32)
SPOTS = [(0, 1), (2, 5), (4, 0), (3, 3)]
for number, spot in enumerate(SPOTS):
    IMAGES[number, *spot] = number + 1.0


def describe(**options):
    about = {"site": "acts", "readout": SQUARE, "view": from_acts(SAE, PARAMS)}
    return describe_latents(LINEAR, None, X, **(about | options))


def test_every_figure_is_that_of_numpy():
    p = {name: np.asarray(x, np.float64) for name, x in PARAMS.items()}
    codes = np.maximum((X - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
    grads = 2 * (X @ HEAD) @ HEAD.T
    attributions = codes * (grads @ p["W_dec"].T)
    effects = np.abs(attributions).mean(0)
    slopes = p["W_dec"] @ HEAD
    readers = p["W_enc"].T / np.linalg.norm(p["W_enc"].T, axis=1, keepdims=True)
    latents = describe(examples=3, names=["a", "b", "c"])
    assert len(latents) == np.sum(effects > 0) > 3
    assert [x.index for x in latents] == np.argsort(-effects)[: len(latents)].tolist()
    for latent in latents:
        j = latent.index
        assert latent.frequency == pytest.approx((codes[:, j] > 0).mean())
        assert latent.effect == pytest.approx(effects[j], 1e-4)
        order = np.argsort(-slopes[j])
        assert latent.promoted == tuple("abc"[i] for i in order if slopes[j, i] > 0)
        reverse = [i for i in order[::-1] if slopes[j, i] < 0]
        assert latent.suppressed == tuple("abc"[i] for i in reverse)
        top = [i for i in np.argsort(-codes[:, j])[:3] if codes[i, j] > 0]
        assert [x.index for x in latent.activating] == top
        top = np.argsort(-np.abs(attributions[:, j]))[: len(top)]
        assert [x.index for x in latent.attributed] == top.tolist()
        assert latent.attributed[0].effect == pytest.approx(
            attributions[top[0], j], 1e-4
        )
        cosines = readers @ readers[j] - 2 * (np.arange(M) == j)
        assert [i for i, _ in latent.neighbours] == np.argsort(-cosines)[:5].tolist()


def planted_latents():
    """One latent that is active where the image is bright."""
    sae = ft.dictionaries.standard(1, 1)
    one = jnp.ones((1, 1))
    params = {"W_enc": one, "W_dec": one, "b_enc": jnp.zeros(1), "b_dec": jnp.zeros(1)}
    model = ft.from_split(
        lambda p, x: x[..., None], lambda p, a: a.sum((1, 2)) @ jnp.array([[2.0, -1.0]])
    )
    return describe_latents(
        model,
        None,
        jnp.asarray(IMAGES),
        site="acts",
        readout=ft.readouts.scalar(lambda y: y[0]),
        view=from_acts(sae, params),
        names=["up", "down"],
    )


def test_a_planted_spot_of_an_image_is_found_and_framed(tmp_path):
    (latent,) = planted_latents()
    found = [(x.index, divmod(x.at, 6)) for x in latent.activating]
    assert found == [(i, SPOTS[i]) for i in (3, 2, 1, 0)]
    assert (latent.promoted, latent.suppressed) == (("up",), ("down",))
    assert latent.frequency == pytest.approx(4 / 144)
    path = write_latents(tmp_path / "new" / "page.html", [latent], IMAGES, unit="nats")
    text = path.read_text(encoding="utf-8")
    assert text.count("data:image/png") == 8
    assert "left:83.33%;top:33.33%;width:16.67%" in text  # row 2, column 5
    assert "http" not in text
    assert latent.neighbours == ()  # the only latent has none
    assert "nearest readers:" not in text
    assert "prefers-color-scheme: dark" in text


def test_vectors_and_tokens_have_pages_too(tmp_path):
    latents = describe(num=2)
    text = write_latents(tmp_path / "x.html", latents, X, names="vwxyz").read_text()
    assert text.count("<svg") == sum(
        len(a.activating) + len(a.attributed) for a in latents
    )
    example = Example(index=1, at=2, shape=(4,), values=(0, 0, 2.0, 1.0), effect=0.5)
    latent = latents[0]._replace(activating=(example,), attributed=())
    tokens = np.array([[0, 1, 2, 3], [3, 2, 1, 0]])
    names = ["<b>", "one", "two", "three"]
    text = write_latents(tmp_path / "t.html", [latent], tokens, names=names).read_text()
    assert "rgba(213,94,0,0.60);text-decoration:underline" in text
    assert "&lt;b&gt;" in text
    assert "<b>" not in text


def test_a_picture_is_read_back_as_it_was(tmp_path):
    image = pytest.importorskip("matplotlib.image")
    pixels = RNG.integers(0, 256, (5, 7, 3)).astype(np.uint8)
    (tmp_path / "x.png").write_bytes(png_bytes(pixels))
    read = image.imread(tmp_path / "x.png")
    np.testing.assert_array_equal(np.round(255 * read).astype(np.uint8), pixels)
    grey = pixels_of(np.array([[0.0, 1.0], [np.nan, 0.5]]))
    assert grey[..., 0].tolist() == [[0, 255], [0, 128]]
    assert "nan" not in bars_svg(np.array([1.0, np.nan, -np.inf]), "x")


def test_what_cannot_be_described_says_so(tmp_path):
    with pytest.raises(ValueError, match="wanted one gradient per input, got 3"):
        describe(readout=ft.readouts.jacobian())
    with pytest.raises(ValueError, match="names must be those of the 3 outputs"):
        describe(names=["a"])
    with pytest.raises(ValueError, match="outputs must be one array"):
        describe(outputs=lambda y: {"y": y})
    with pytest.raises(ValueError, match="outputs must have derivatives, got int32"):
        describe(outputs=lambda y: jnp.argmax(y, axis=1))
    with pytest.raises(ValueError, match="wanted one gradient per input, got None"):
        describe(readout=None)
    with pytest.raises(ValueError, match=r"example is input \d+, .* there are 1;"):
        write_latents(tmp_path / "x.html", describe(num=2), X[:1])
    with pytest.raises(ValueError, match="wanted names of 5 tokens or entries, got 2"):
        write_latents(str(tmp_path / "x.html"), describe(num=1), X, names="ab")
    with pytest.raises(ValueError, match="wanted latents, got none"):
        write_latents(tmp_path / "x.html", [], X)
    with pytest.raises(ValueError, match="inputs must be tokens"):
        write_latents(tmp_path / "x.html", describe(num=1), np.zeros((B, 3, 4, 5)))
