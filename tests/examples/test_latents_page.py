import gzip

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


def test_clothes_are_read_as_they_were_written(tmp_path):
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (7, 28, 28)).astype(np.uint8)
    kinds = rng.integers(0, 10, 7).astype(np.uint8)
    for name, values in (("images-idx3", pixels), ("labels-idx1", kinds)):
        head = bytes([0, 0, 8, values.ndim]) + np.array(values.shape, ">i4").tobytes()
        path = tmp_path / f"t10k-{name}-ubyte.gz"
        path.write_bytes(gzip.compress(head + values.tobytes()))
    images, named = latents_page.read_clothes(tmp_path, 5)
    assert images.shape == (5, 28, 28, 1)
    np.testing.assert_allclose(images[..., 0] * 255, pixels[:5], atol=1e-4)
    assert named.tolist() == kinds[:5].tolist()


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
