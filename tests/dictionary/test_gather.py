import jax
import jax.numpy as jnp
import numpy as np
import pytest

from toyfeat.dictionary import gather

# N, M, D, k: small enough for a dense product; sparse with a rest after the chunks
# of 64, with none, and with less than one chunk.
SIZES = {
    "dense": (7, 16, 5, 3),
    "sparse": (131, 4096, 64, 3),
    "whole": (64, 4096, 64, 2),
    "little": (5, 4096, 64, 200),
}


def draw(name, seed=0):
    num, latents, dim, k = SIZES[name]
    rng = np.random.default_rng(seed)
    index = np.stack([rng.permutation(latents)[:k] for _ in range(num)])
    return {
        "values": rng.normal(size=(num, k)),
        "x": rng.normal(size=(num, dim)),
        "rows": rng.normal(size=(latents, dim)),
        "index": index,
        "origin": rng.normal(size=dim),
        "bias": rng.normal(size=latents),
        "change_x": rng.normal(size=(num, dim)),
        "change_k": rng.normal(size=(num, k)),
    }


def single(arrays):
    """In the library's precision."""
    kinds = {True: jnp.float32, False: jnp.int32}
    return {n: jnp.asarray(a, kinds[a.dtype.kind == "f"]) for n, a in arrays.items()}


def spread(values, index, num):
    out = np.zeros((len(values), num))
    for n, row in enumerate(index):
        out[n, row] += values[n]
    return out


def close(got, want, tol=2e-5):
    want = np.asarray(want, np.float64)
    np.testing.assert_allclose(got, want, rtol=0, atol=tol * np.abs(want).max())


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", SIZES)
def test_weighted_rows_and_its_derivative_are_those_of_a_dense_product(name):
    a = draw(name)
    b = single(a)
    dense = spread(a["values"], a["index"], len(a["rows"]))
    run = lambda v, r: gather.weighted_rows(v, b["index"], r)  # noqa: E731
    out, back = jax.vjp(jax.jit(run), b["values"], b["rows"])
    close(out, dense @ a["rows"])
    by_values, by_rows = back(b["change_x"])
    close(by_rows, dense.T @ a["change_x"])
    by_dense = a["change_x"] @ a["rows"].T
    close(by_values, np.take_along_axis(by_dense, a["index"], axis=1))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", SIZES)
def test_row_products_and_its_derivative_are_those_of_a_dense_product(name):
    a = draw(name)
    b = single(a)
    run = lambda x, r: gather.row_products(x, b["index"], r)  # noqa: E731
    out, back = jax.vjp(jax.jit(run), b["x"], b["rows"])
    close(out, np.take_along_axis(a["x"] @ a["rows"].T, a["index"], axis=1))
    by_x, by_rows = back(b["change_k"])
    dense = spread(a["change_k"], a["index"], len(a["rows"]))
    close(by_x, dense @ a["rows"])
    close(by_rows, dense.T @ a["x"])


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", SIZES)
def test_row_sums_and_scattered_are_those_of_a_loop(name):
    a = draw(name)
    b, num = single(a), len(a["rows"])
    want = np.zeros((num, a["x"].shape[1]))
    for value, at, x in zip(a["values"], a["index"], a["x"], strict=True):
        want[at] += value[:, None] * x
    sums = jax.jit(gather.row_sums, static_argnums=3)
    close(sums(b["values"], b["index"], b["x"], num), want)
    got = gather.scatter(b["values"], b["index"], num)
    close(got, spread(a["values"], a["index"], num))


def encoder(x, origin, matrix, bias, index):
    """What ``taken`` takes, without any rule of its own."""
    pre = (x - origin[None, :]) @ matrix + bias[None, :]
    return jnp.take_along_axis(pre, index, axis=1)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", SIZES)
def test_taken_is_a_few_pre_activations_with_their_derivative(name):
    a = draw(name)
    b = single(a)
    names = ("x", "origin", "rows", "bias")

    def few(x, origin, rows, bias):
        pre = gather.affine(x, origin, rows.T, bias)
        return gather.take(x, origin, rows.T, bias, pre, b["index"])

    out, back = jax.vjp(jax.jit(few), *(b[n] for n in names))
    slopes = back(b["change_k"])
    with jax.enable_x64(True):
        full = lambda x, o, r, c: encoder(x, o, r.T, c, a["index"])  # noqa: E731
        want, dense_back = jax.vjp(full, *(jnp.asarray(a[n]) for n in names))
        want, dense = np.asarray(want), dense_back(jnp.asarray(a["change_k"]))
        dense = [np.asarray(d) for d in dense]
    close(out, want)
    for got, d in zip(slopes, dense, strict=True):
        close(got, d)


def test_affine_s_derivative_is_jax_s_own(key):
    keys = jax.random.split(key, 5)
    shapes = ((9, 4), (4,), (4, 6), (6,))
    args = [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=False)]
    plain = lambda x, o, m, b: (x - o[None, :]) @ m + b[None, :]  # noqa: E731
    change = jax.random.normal(keys[4], (9, 6))
    ours, ours_back = jax.vjp(gather.affine, *args)
    theirs, theirs_back = jax.vjp(plain, *args)
    close(ours, theirs)
    for x, y in zip(ours_back(change), theirs_back(change), strict=True):
        close(x, y)


def slopes_of(values, index, rows, x):
    def loss(values, rows, x):
        written = gather.weighted_rows(values, index, rows)
        read = gather.row_products(x, index, rows)
        return jnp.sum(written**2) + jnp.sum(read**3)

    return jax.grad(loss, (0, 1, 2))(values, rows, x)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_a_batch_of_them_is_each_of_them(name):
    many = [single(draw(name, seed)) for seed in range(2)]
    names = ("values", "index", "rows", "x")
    stacked = [jnp.stack([m[n] for m in many]) for n in names]
    together = jax.jit(jax.vmap(slopes_of))(*stacked)
    for i, one in enumerate(many):
        alone = slopes_of(*(one[n] for n in names))
        for x, y in zip(together, alone, strict=True):
            close(x[i], y)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_several_readouts_share_the_rows(name):
    a = draw(name)
    b = single(a)
    many = np.stack([a["x"], 2 * a["x"][::-1], a["change_x"]], axis=1)

    def loss(x, rows):
        run = jax.vmap(gather.row_products, (1, None, None), 1)
        return jnp.sum(run(x, b["index"], rows) ** 2)

    by_x, by_rows = jax.grad(loss, (0, 1))(jnp.asarray(many, jnp.float32), b["rows"])
    read = np.einsum("nkd,md->nkm", many, a["rows"])
    there = spread(np.ones_like(a["values"]), a["index"], len(a["rows"]))
    change = 2 * read * there[:, None, :]
    close(by_x, np.einsum("nkm,md->nkd", change, a["rows"]))
    close(by_rows, np.einsum("nkm,nkd->md", change, many))


def test_the_large_cases_gather_and_the_small_do_not():
    for name in SIZES:
        b = single(draw(name))
        text = str(
            jax.make_jaxpr(gather.weighted_rows)(b["values"], b["index"], b["rows"])
        )
        assert ("platform_index" in text) == (name != "dense")
