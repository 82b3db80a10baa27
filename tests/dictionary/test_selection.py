import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.dictionary.selection import (
    best_of_each,
    cut_of_batch,
    heaviside,
    largest_level,
    number_of,
    smallest_positive,
)


def largest(codes, wanted):
    return np.sort(np.asarray(codes).ravel())[::-1][wanted - 1]


def same_codes(cut, codes, wanted):
    """Whether a cut and the last of so many codes choose the same ones."""
    codes = np.asarray(codes)
    return bool(np.all((codes >= np.asarray(cut)) == (codes >= largest(codes, wanted))))


def codes_of(kind, num=12, latents=40):
    rng = np.random.default_rng(3)
    codes = np.maximum(rng.normal(size=(num, latents)), 0)
    if kind == "one row has them all":  # more than the candidates of a row
        codes[0] += 100
    if kind == "most rows have none":  # the few that have some have many
        codes[3:] = 0
    if kind == "tiny":
        codes = codes * 1e-30
    if kind == "huge":
        codes = codes * 1e30
    if kind == "mostly zero":
        codes = codes * (rng.uniform(size=codes.shape) < 0.02)
    if kind == "narrow":
        codes = codes[:, :7]
    return jnp.asarray(codes, jnp.float32)


KINDS = ("plain", "one row has them all", "tiny", "huge", "mostly zero", "narrow")
KINDS += ("most rows have none",)


@pytest.mark.parametrize("kind", KINDS)
def test_the_cut_is_that_of_a_sort(kind):
    codes, run = codes_of(kind), jax.jit(cut_of_batch, static_argnums=1)
    assert same_codes(run(codes, 2, None), codes, 24)
    for fewer in (1.0, 1.5, 2.0):
        got = run(codes, 2, jnp.asarray(fewer, jnp.float32))
        assert same_codes(got, codes, int(12 * fewer))


def test_fewer_examples_have_fewer_codes():
    codes = codes_of("plain").at[5:].set(0)
    assert same_codes(cut_of_batch(codes, 2, None, jnp.asarray(5)), codes, 10)
    assert cut_of_batch(0 * codes, 2, None, jnp.asarray(0)) == 0


def test_the_cut_of_doubles_is_that_of_a_sort():
    with jax.enable_x64(True):
        codes = jnp.asarray(np.random.default_rng(0).uniform(size=(9, 50)))
        assert same_codes(cut_of_batch(codes, 3, None), codes, 27)


def test_each_of_a_batch_has_its_own_cut():
    kinds = ("plain", "one row has them all", "tiny")
    codes = jnp.stack([codes_of(k) for k in kinds])
    fewer = jnp.asarray([1.0, 2.0, 1.0])
    got = jax.vmap(cut_of_batch, (0, None, 0))(codes, 2, fewer)
    for cut, c, k in zip(got, codes, fewer, strict=True):
        assert same_codes(cut, c, int(12 * k))


def test_ties_at_the_cut_are_all_at_or_above_it():
    codes = jnp.asarray([[3.0, 1.0, 1.0, 0.0], [2.0, 1.0, 0.0, 0.0]])
    cut = cut_of_batch(codes, 2, None)
    assert cut == 1.0
    assert int(jnp.sum(codes >= cut)) == 5


def test_what_is_out_of_the_question_is_not_chosen():
    score = jnp.asarray([[1.0, -jnp.inf, -2.0], [-jnp.inf, -jnp.inf, 0.5]])
    index, here = best_of_each(score, 2)
    np.testing.assert_array_equal(index[0], [0, 2])
    np.testing.assert_array_equal(here, [[True, True], [True, False]])


def test_a_step_has_the_kernel_derivative_of_its_threshold_alone():
    rng = np.random.default_rng(1)
    pre, change = rng.normal(size=(2, 30, 4))
    threshold, width = np.array([0.1, 0.5, 1.0, 0.0]), 0.6
    pre[0, 0] = threshold[0]  # not above
    args = (jnp.asarray(pre, jnp.float32), jnp.asarray(threshold, jnp.float32))
    out, back = jax.vjp(lambda p, t: heaviside(p, t, width), *args)
    np.testing.assert_array_equal(out, pre > threshold)
    by_pre, by_threshold = back(jnp.asarray(change, jnp.float32))
    np.testing.assert_array_equal(by_pre, 0)
    near = np.abs(pre - threshold) < width / 2
    want = -(near * change).sum(0) / width
    np.testing.assert_allclose(by_threshold, want, rtol=1e-5)


@pytest.mark.parametrize("kind", ["alike", "by size", "rare and loud", "repeated"])
def test_the_cut_of_a_large_batch_does_not_need_its_sample_to_be_like_it(kind):
    rng = np.random.default_rng(5)
    codes = np.maximum(rng.normal(size=(700, 60)), 0)
    if kind == "by size":
        codes = codes * np.exp(4 * rng.normal(size=(700, 1)))
    if kind == "rare and loud":
        codes[1::50] *= 1e4  # between the examples that are looked at first
    if kind == "repeated":
        codes = np.round(codes, 1)  # many ties, at the cut too
    codes = jnp.asarray(codes, jnp.float32)
    for k in (1, 5, 29):
        cut = jax.jit(cut_of_batch, static_argnums=1)(codes, k, None)
        assert same_codes(cut, codes, 700 * k), k


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_the_largest_level_is_exact(dtype):
    values = np.random.default_rng(6).exponential(size=50).astype(dtype)
    with jax.enable_x64(dtype is np.float64):
        there, wanted = jnp.asarray(values), jnp.asarray([1, 7, 50])

        def enough(level):
            reach = there[None, :] >= level[:, None]
            return jnp.sum(reach, axis=1, dtype=wanted.dtype) >= wanted

        got = largest_level(enough, (3,), there.dtype)
        np.testing.assert_array_equal(got, np.sort(values)[::-1][[0, 6, 49]])


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
