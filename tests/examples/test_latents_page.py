import jax
import numpy as np
import pytest

from examples import latents_page


def test_bars_are_drawn_where_they_are_named():
    images, kinds = latents_page.draw_bars(0, 40)
    bright = images[..., 0] > 1.0
    heights, widths = bright.any(2).sum(1), bright.any(1).sum(1)
    assert np.all((heights <= 2) == (kinds == 0))
    assert np.all((widths <= 2) == (kinds == 1))


@pytest.mark.slow
def test_the_pages_are_written(tmp_path):
    lines = []
    with jax.numpy_dtype_promotion("standard"):  # optax divides floats by ints
        latents_page.main(tmp_path, steps=8, say=lines.append)
    assert len(lines) == 4
    pictures = {"images": "data:image/png", "vectors": "<svg", "tokens": "<span"}
    for name, picture in pictures.items():
        text = (tmp_path / f"{name}.html").read_text(encoding="utf-8")
        assert text.count("<h3>Latent") > 1
        assert picture in text
