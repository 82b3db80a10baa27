"""Statistics of any size: the directions are those at 1, or an error names the size."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.moments import sketched_moments

DIM, NUM = 6, 60
METHODS = {"pca": ft.pca, "gradient_pca": ft.gradient_pca, "joint_pca": ft.joint_pca}
RNG = np.random.default_rng(0)
ACTS = RNG.normal(size=(NUM, DIM)) * np.array([5, 4, 3, 2, 1, 0.5])
GRADS = RNG.normal(size=(NUM, 1, DIM)) * np.array([0.5, 1, 2, 3, 4, 5])
FLAT = GRADS[:, 0]


@functools.cache
def update(kind):
    acc = ft.moments(DIM) if kind == "moments" else sketched_moments(DIM, DIM)
    return acc, jax.jit(acc.update)


def statistics(acts, grads, weight=1.0, kind="moments"):
    acc, step = update(kind)
    arrays = (ACTS * acts, GRADS * grads, np.full(NUM, weight))
    return acc.finish(step(acc.init(), ft.Taps(*map(jnp.float32, arrays))))


def truth(name, rank=2):
    """Readers and spectrum at 1, in float64."""
    cov = np.cov(ACTS.T, bias=True)
    second = FLAT.T @ FLAT / NUM
    if name == "joint_pca":
        values, vectors = np.linalg.eigh(cov)
        root = (vectors * np.sqrt(values)) @ vectors.T
        values, turn = np.linalg.eigh(root @ second @ root)
        return np.linalg.solve(root, turn[:, ::-1][:, :rank]), values[::-1][:rank]
    values, vectors = np.linalg.eigh(cov if name == "pca" else second)
    return vectors[:, ::-1][:, :rank], values[::-1][:rank]


def sizes(name, acts, grads):
    return {"pca": acts, "gradient_pca": grads, "joint_pca": acts * grads}[name]


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["moments", "sketched_moments"])
@pytest.mark.parametrize("name", METHODS)
def test_directions_and_spectrum_at_any_size_are_those_of_numpy(name, kind):
    readers, values = truth(name)
    for acts, grads, weight in [
        (1e-14, 1, 1),
        (1e16, 1, 1),
        (1, 1e-14, 1),
        (1, 1e16, 1),
        (1e-8, 1e-8, 1),
        (1e8, 1e8, 1),
        (1, 1, 1e-30),
        (1, 1, 1e30),
        (1e-14, 1, 1e-8),
    ]:
        try:
            stats = statistics(acts, grads, weight, kind)
        except ValueError as error:
            assert "size" in str(error)  # noqa: PT017
            assert (acts, weight) == (1e-14, 1e-8)
            continue
        basis = METHODS[name](stats, 2)
        size = sizes(name, acts, grads) ** 2
        np.testing.assert_allclose(np.float64(basis.spectrum) / size, values, rtol=1e-4)
        ours, theirs = (
            np.linalg.qr(np.float64(r))[0] for r in (basis.readers, readers)
        )
        np.testing.assert_allclose(np.linalg.svd(ours.T @ theirs)[1], 1, atol=1e-5)
        assert int(basis.diagnostics.rank) == 2


@pytest.mark.parametrize(
    ("acts", "grads", "match"),
    [
        (1e25, 1, "moments: .*activations of size"),
        (1e-20, 1, "moments: .*activations of size"),
        (1, 1e25, "moments: .*gradients of size"),
        (1, 1e-20, "moments: .*gradients of size"),
    ],
)
def test_squares_out_of_range_raise_and_name_the_size(acts, grads, match):
    with pytest.raises(ValueError, match=match):
        statistics(acts, grads)


@pytest.mark.parametrize("size", [1e-12, 1e12])
def test_a_joint_spectrum_out_of_range_raises_and_names_the_sizes(size):
    stats = statistics(size, size)
    with pytest.raises(
        ValueError, match=r"joint_pca: .*activations of size .*gradients"
    ):
        ft.joint_pca(stats, 2)


def test_squares_out_of_range_are_nan_inside_a_trace_and_never_zero():
    acc, step = update("moments")
    for size in (1e25, 1e-20):
        taps = ft.Taps(*map(jnp.float32, (ACTS * size, GRADS * size, np.ones(NUM))))
        stats = jax.jit(acc.finish)(step(acc.init(), taps))
        assert not np.isfinite(stats.scatter).any()
        assert not np.isfinite(stats.grad_second).any()


@pytest.mark.slow_cases
@pytest.mark.parametrize("kind", ["moments", "sketched_moments"])
@pytest.mark.parametrize(
    ("field", "bad"),
    [
        *(("acts", bad) for bad in (np.nan, np.inf)),
        *(("grads", bad) for bad in (np.nan, np.inf)),
        *(("weights", bad) for bad in (np.nan, np.inf, -1.0)),
    ],
)
def test_what_is_not_finite_or_a_negative_weight_raises(kind, field, bad):
    acc, step = update(kind)
    arrays = [ACTS.copy(), GRADS.copy(), np.ones(NUM)]
    arrays[ft.Taps._fields.index(field)].flat[5] = bad
    state = step(acc.init(), ft.Taps(*map(jnp.float32, arrays)))
    with pytest.raises(ValueError, match=rf"^{kind}: .*(finite|negative)"):
        acc.finish(state)


def test_constant_activations_of_any_size_have_rank_zero_and_no_error():
    acc, step = update("moments")
    for size in (0.0, 1e-18, 1e-12, 1e12):
        constant = jnp.full((NUM, DIM), size / 3, jnp.float32)
        taps = ft.Taps(constant, jnp.float32(GRADS), jnp.ones(NUM))
        basis = ft.pca(acc.finish(step(acc.init(), taps)), 2)
        assert int(basis.diagnostics.rank) == 0


BASIS = functools.cache(lambda: ft.pca(statistics(1, 1), 2))
MOMENTS = ft.Moments(jnp.array(2.0), jnp.zeros(4), jnp.eye(4))
TAPS = ft.Taps(jnp.ones((3, 4)), None, jnp.ones(3))
BAD = {
    "float dim": (lambda: ft.moments(1.5), "moments: dim must be an int"),
    "word as dim": (lambda: ft.moments("a"), "moments: dim must be an int"),
    "no dim": (
        lambda: ft.moments(0),
        "moments: dim must be an int of at least 1, got 0",
    ),
    "list of acts": (
        lambda: ft.moments_of(ft.Taps([[1.0, 2.0]], None, jnp.ones(1))),
        "moments_of: acts must be an array, got list",
    ),
    "list of weights": (
        lambda: ft.moments_of(ft.Taps(jnp.ones((1, 2)), None, [1.0])),
        r"moments_of: weights must be an array, got \[1.0\]",
    ),
    "complex acts": (
        lambda: ft.moments_of(TAPS._replace(acts=TAPS.acts.astype(complex))),
        "moments_of: acts must be real, got complex64",
    ),
    "dict of taps": (
        lambda: ft.moments(4).update(ft.moments(4).init(), {"a": TAPS}),
        r"moments: taps must be a Taps, got dict; .*taps\[site\]",
    ),
    "dict of taps, sketched": (
        lambda: sketched_moments(4, 2).update(sketched_moments(4, 2).init(), {"a": 1}),
        "sketched_moments: taps must be a Taps, got dict",
    ),
    "float rank, sketched": (
        lambda: sketched_moments(4, 2.0),
        "sketched_moments: rank",
    ),
    "float rank": (lambda: ft.pca(MOMENTS, 2.0), "pca: rank must be an int.*got 2.0"),
    "word as rank": (lambda: ft.pca(MOMENTS, "a"), "pca: rank must be an int.*got 'a'"),
    "word as stats": (lambda: ft.pca("x", 1), "pca: stats must be Moments, got str"),
    "taps as stats": (
        lambda: ft.joint_pca(TAPS, 1),
        "joint_pca: stats must be Moments",
    ),
    "list as rank": (lambda: ft.gradient_pca(MOMENTS, [1]), "gradient_pca: "),
    "shapes that differ": (
        lambda: ft.pca(MOMENTS._replace(scatter=jnp.eye(3)), 1),
        r"pca: stats must hold a mean \[D\]",
    ),
    "encode a list": (
        lambda: ft.encode(BASIS(), [1.0]),
        "encode: acts must be an array",
    ),
    "encode taps": (lambda: ft.encode(BASIS(), TAPS), r"encode: acts .*taps\.acts"),
    "encode complex": (
        lambda: ft.encode(BASIS(), np.ones((2, DIM), complex)),
        "encode: acts must be real",
    ),
    "dict as basis": (
        lambda: ft.encode({"a": BASIS()}, jnp.ones((2, DIM))),
        r"encode: basis must be a Basis, got dict; .*bases\[site\]",
    ),
    "decode None": (lambda: ft.decode(BASIS(), None), "decode: codes must be an array"),
    "describe moments": (
        lambda: ft.describe(MOMENTS),
        "describe: basis must be a Basis",
    ),
    "describe traced": (
        lambda: jax.jit(lambda b: ft.describe(b) and b)(BASIS()),
        "describe: basis must have known values",
    ),
    "truncated to a float": (
        lambda: ft.decompose.truncated(BASIS(), 1.0),
        "truncated: rank must be an int",
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize(("call", "match"), BAD.values(), ids=BAD)
def test_bad_arguments_say_what_was_wanted_and_what_came(call, match):
    with pytest.raises((TypeError, ValueError), match=f"^({match})"):
        call()


def test_ranks_of_numpy_are_taken():
    assert ft.pca(MOMENTS, np.int64(2)).spectrum.shape == (2,)
