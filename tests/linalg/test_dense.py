"""Dense factorizations: numpy is the oracle, and no batched call on a CPU."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from processes import run_python

import toyfeat as ft
from toyfeat.linalg import dense

FACTORIZATIONS = {
    "eigh": (dense.eigh, np.linalg.eigh),
    "qr": (dense.qr, np.linalg.qr),
    "svd": (dense.svd, lambda x: np.linalg.svd(x, full_matrices=False)),
    "singular_values": (
        dense.singular_values,
        lambda x: np.linalg.svd(x, compute_uv=False),
    ),
    "cholesky": (dense.cholesky, np.linalg.cholesky),
}


@pytest.fixture(scope="module")
def matrices():
    """Positive definite matrices ``[2, 3, 4, 4]`` with well separated values."""
    rows = jax.random.normal(jax.random.key(0), (2, 3, 9, 4))
    scales = jnp.array([1.0, 2.0, 4.0, 8.0])
    return jnp.einsum("abni,abnj,i,j->abij", rows, rows, scales, scales)


def unsigned(tree):
    """Absolute values: the sign of a vector is the library's choice."""
    return jax.tree.map(lambda x: np.abs(np.asarray(x)), jax.tree.leaves(tree))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", FACTORIZATIONS)
@pytest.mark.parametrize("compiled", [False, True])
def test_one_matrix_and_nested_batches_agree_with_numpy(matrices, name, compiled):
    ours, oracle = FACTORIZATIONS[name]
    nested = jax.vmap(jax.vmap(ours))
    got = unsigned((jax.jit(nested) if compiled else nested)(matrices))
    for i in range(2):
        for j in range(3):
            exact = np.asarray(matrices[i, j], np.float64)
            expected = unsigned(oracle(exact))
            single = unsigned(ours(matrices[i, j]))
            for whole, one, right in zip(got, single, expected, strict=True):
                np.testing.assert_allclose(whole[i, j], right, rtol=2e-3, atol=2e-3)
                np.testing.assert_allclose(one, right, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("axes", [(0, None), (None, 0), (0, 0)])
def test_a_triangular_system_may_share_either_side(matrices, axes):
    lower = jnp.tril(matrices[0])
    right = jax.random.normal(jax.random.key(1), (3, 4, 2))
    operands = [
        x if axis == 0 else x[0] for x, axis in zip((lower, right), axes, strict=True)
    ]
    got = jax.vmap(dense.solve_lower, in_axes=axes)(*operands)
    for i in range(3):
        own = [
            np.asarray(x[i] if axis == 0 else x, np.float64)
            for x, axis in zip(operands, axes, strict=True)
        ]
        np.testing.assert_allclose(got[i], np.linalg.solve(*own), rtol=1e-3, atol=1e-4)


def test_derivatives_are_those_of_jax(matrices):
    def largest(function):
        return lambda x: jnp.sum(function((x + x.T) / 2)[0][-2:] ** 2)

    ours, theirs = largest(dense.eigh), largest(jnp.linalg.eigh)
    for derivative in (jax.grad, jax.jacfwd, jax.hessian):
        got, expected = (
            jax.vmap(derivative(f))(matrices[0] / 100) for f in (ours, theirs)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-3)
    got, expected = (
        jax.grad(lambda x, f=f: jax.vmap(f)(x).sum())(matrices[0])
        for f in (ours, theirs)
    )
    np.testing.assert_allclose(got, expected, rtol=1e-3)


def decompose(key):
    """Two independent decompositions and a comparison, as of a network of a seed."""
    acts, grads = jax.random.normal(key, (2, 200, 32))
    taps = ft.Taps(acts, grads[:, None], jnp.ones(len(acts)))
    stats = ft.moments_of(taps)
    bases = ft.pca(stats, 3), ft.gradient_pca(stats, 3), ft.joint_pca(stats, 3)
    angles = ft.metrics.principal_angles(bases[0].readers, bases[1].readers)
    return bases, angles, ft.linalg.randomized_svd(key, acts, 3)


def test_decompositions_of_many_networks_make_no_batched_call_on_a_cpu():
    """Such calls wait for each other's threads, for ever where cores are few."""
    keys = jax.random.split(jax.random.key(0), 8)
    text = jax.jit(jax.vmap(decompose)).lower(keys).compile().as_text()
    calls = [line for line in text.splitlines() if '"lapack_' in line]
    assert calls
    for line in calls:
        for shape in re.findall(r"f32\[([0-9,]+)\]", line.split("custom-call")[0]):
            sizes = [int(size) for size in shape.split(",")]
            assert int(np.prod(sizes[:-2])) == 1, line


STRESS = """
import jax, toyfeat as ft
def decompose(rows):
    return [ft.linalg.psd_spectrum(x.T @ x) for x in rows]
rows = jax.random.normal(jax.random.key(0), (8, 8, 256, 32))
run = jax.jit(jax.vmap(decompose))
for shift in range(300):
    out = run(rows + shift)
    jax.block_until_ready((out, jax.tree.map(lambda x: x[0], out)))
print("done")
"""


@pytest.mark.slow
def test_decompositions_of_many_networks_end_on_two_threads():
    done = run_python("-c", STRESS, timeout=300)
    assert done.stdout == "done\n", done.stderr
