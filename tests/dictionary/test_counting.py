import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.dictionary.counting import number_of, smallest_positive


@pytest.mark.parametrize("shape", [(3, 1), (5, 127), (4, 128), (2, 131), (3, 1000)])
def test_counts_are_those_of_numpy_at_every_width(shape):
    mask = np.random.default_rng(0).uniform(size=shape) < 0.7
    mask[0] = True  # as many as there can be: a byte must not overflow
    got = jax.jit(number_of)(jnp.asarray(mask))
    assert got.dtype == jnp.int32
    np.testing.assert_array_equal(got, mask.sum(1))


def test_counts_of_doubles_are_int32():
    with jax.enable_x64(True):
        assert number_of(jnp.ones((2, 300), bool)).dtype == jnp.int32


@pytest.mark.parametrize("scale", [1e-30, 1.0, 1e30])
def test_the_smallest_positive_code_is_numpys(scale):
    codes = np.maximum(np.random.default_rng(1).normal(size=(40, 30)), 0) * scale
    codes = codes.astype(np.float32)
    assert smallest_positive(jnp.asarray(codes)) == codes[codes > 0].min()
    assert smallest_positive(jnp.zeros((4, 3))) == np.inf
