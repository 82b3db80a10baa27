from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.decompose import eigengaps, interaction_edges

SITES = ("first", "second", "third")
WIDTHS = (5, 6, 4)
INPUTS = 7


def model(params, x, tap):
    for site, w in zip(SITES, params["hidden"], strict=True):
        x = tap(site, jnp.tanh(x @ w) + 0.2 * (x @ w) ** 2)
    return x @ params["out"]


def params_of(key, dtype=jnp.float32):
    sizes = (INPUTS, *WIDTHS)
    keys = jax.random.split(key, 4)
    hidden = [
        jax.random.normal(k, pair, dtype) / pair[0] ** 0.5
        for k, pair in zip(keys, pairwise(sizes), strict=False)
    ]
    return {"hidden": hidden, "out": jax.random.normal(keys[3], (WIDTHS[-1], 3), dtype)}


PROBED = ft.from_function(model)


def batches_of(x, size=50):
    return lambda: (x[i : i + size] for i in range(0, len(x), size))


def dense_lib(params, x):
    """The definition in float64: per-example Jacobians, eigh, backwards."""
    acts = {}
    model(params, x, lambda name, value: acts.setdefault(name, np.asarray(value)))

    def rest(start, stop, a):
        for site in range(start + 1, stop + 1):
            h = a @ params["hidden"][site]
            a = jnp.tanh(h) + 0.2 * h**2
        return a

    found, code = {}, None
    for index in reversed(range(3)):
        a = acts[SITES[index]]

        def target(row, index=index, code=code):
            if code is None:
                return rest(index, 2, row) @ params["out"]
            return (rest(index, index + 1, row) - code[0]) @ code[1]

        jac = np.asarray(jax.jit(jax.vmap(jax.jacrev(target)))(a))
        g = np.einsum("nki,nkj->ij", jac, jac) / len(a)
        mean = a.mean(0)
        s = (a - mean).T @ (a - mean) / len(a)
        lam, q = np.linalg.eigh(s)
        root = (q * np.sqrt(np.maximum(lam, 0))) @ q.T
        inverse = (q / np.sqrt(lam)) @ q.T
        values, v = np.linalg.eigh(root @ g @ root)
        values, v = values[::-1], v[:, ::-1]
        keep = values > 1e-7 * values[0]
        values, v = values[keep], v[:, keep]
        readers = inverse @ v * np.sqrt(values)
        writers = (v / np.sqrt(values)).T @ root
        found[SITES[index]] = (values, readers, writers)
        code = (mean, jnp.asarray(readers))
    return found


@pytest.fixture(scope="module")
def truth():
    with jax.enable_x64(True):
        params = params_of(jax.random.key(1), jnp.float64)
        x = jax.random.normal(jax.random.key(2), (200, INPUTS), jnp.float64)
        found = dense_lib(params, x)
    to32 = lambda tree: jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), tree)  # noqa: E731
    with jax.enable_x64(True):
        params, x = jax.tree.map(np.asarray, (params, x))
    return to32(params), to32(x), found


@pytest.fixture(scope="module")
def exact(truth):
    params, x, _ = truth
    return ft.local_interaction_basis(PROBED, params, batches_of(x), sites=SITES)


def principal_cosines(ours, theirs):
    """Of the angles between the spans of the rows of two matrices."""
    q, r = (np.linalg.qr(np.asarray(x, float).T)[0] for x in (ours, theirs))
    return np.linalg.svd(q.T @ r, compute_uv=False)


@pytest.mark.slow
@pytest.mark.parametrize("site", SITES)
def test_lib_is_the_dense_definition_in_float64(truth, exact, site):
    values, readers, writers = truth[2][site]
    basis = exact[site]
    rank = int(basis.diagnostics.rank)
    assert rank == len(values)
    spectrum = np.asarray(basis.spectrum)[:rank]
    np.testing.assert_allclose(spectrum, values, rtol=1e-4, atol=1e-5)
    assert np.abs(spectrum - values).max() <= 1e-5 * values[0]
    for ours, theirs in (
        (np.asarray(basis.readers)[:, :rank].T, readers.T),
        (np.asarray(basis.writers), writers),
    ):
        for top in range(1, rank + 1):
            cosines = principal_cosines(ours[:top], theirs[:top])
            gap = values[top - 1] - (values[top] if top < rank else 0)
            if gap > 0.05 * values[0] or top == rank:
                assert 1 - float(cosines.min()) <= 1e-4


def test_what_the_codes_leave_out_changes_no_output(truth, exact):
    params, x, _ = truth
    basis = exact[SITES[2]]  # the outputs are linear in it
    assert int(basis.diagnostics.rank) == 3 < WIDTHS[2]

    def splice(a):
        return ft.decode(basis, ft.encode(basis, a))

    spliced = PROBED(params, x, {SITES[2]: splice})[0]
    np.testing.assert_allclose(spliced, PROBED(params, x, {})[0], atol=2e-3)


@pytest.mark.parametrize("site", SITES)
def test_a_codes_mean_square_is_its_eigenvalue(truth, exact, site):
    params, x, _ = truth
    acts = ft.tap(PROBED, params, x, sites=site, readout=None)[site].acts
    codes = np.asarray(ft.encode(exact[site], acts), float)
    np.testing.assert_allclose(
        codes.T @ codes / len(codes), np.diag(exact[site].spectrum), atol=2e-3
    )


def test_random_sources_are_unbiased_and_their_error_falls_with_their_number(truth):
    params, x, found = truth

    def errors(sources, seeds):
        values = []
        for seed in range(seeds):
            basis = ft.local_interaction_basis(
                PROBED,
                params,
                batches_of(x, 200),
                sites=SITES[2:],
                sources=sources,
                key=jax.random.key(seed),
            )[SITES[2]]
            values.append(float(basis.diagnostics.total))
        want = found[SITES[2]][0].sum()
        return np.asarray(values) / want - 1

    few, many = errors(1, 16), errors(16, 16)
    assert abs(few.mean()) < 4 * few.std() / 16**0.5 + 1e-4
    assert abs(many.mean()) < 4 * many.std() / 16**0.5 + 1e-4
    assert 2 < few.std() / many.std() < 8  # 4 in expectation


def test_joint_pca_is_one_site_lib_up_to_its_scale(truth):
    params, x, _ = truth
    site = SITES[1]
    lib = ft.local_interaction_basis(PROBED, params, batches_of(x), sites=[site])[site]
    taps = ft.tap(PROBED, params, x, sites=site, readout=ft.readouts.jacobian())[site]
    acc = ft.moments(WIDTHS[1])
    joint = ft.joint_pca(acc.finish(acc.update(acc.init(), taps)), WIDTHS[1])
    np.testing.assert_allclose(lib.spectrum, joint.spectrum, rtol=1e-4)
    root = np.sqrt(np.asarray(joint.spectrum))
    rank = int(lib.diagnostics.rank)
    scaled = np.asarray(joint.readers) * root
    cosine = np.sum(np.asarray(lib.readers) * scaled, axis=0) / np.maximum(
        np.sum(scaled**2, axis=0), 1e-30
    )
    np.testing.assert_allclose(np.abs(cosine[:rank]), 1, rtol=1e-3)


def test_batches_are_called_once_per_site_plus_once(truth):
    params, x, _ = truth
    calls = []

    def batches():
        calls.append(1)
        return iter([x])

    ft.local_interaction_basis(PROBED, params, batches, sites=SITES)
    assert len(calls) == len(SITES) + 1


def test_edges_are_the_mean_squared_effects(truth, exact):
    params, x, _ = truth
    small = x[:20]
    edges = interaction_edges(PROBED, params, batches_of(small, 10), exact)
    assert list(edges) == [
        ("first", "second"),
        ("second", "third"),
        ("third", "outputs"),
    ]
    basis = exact["third"]
    acts = ft.tap(PROBED, params, small, sites="third", readout=None)["third"].acts
    codes = np.asarray(ft.encode(basis, acts), float)
    slopes = np.asarray(params["out"], float).T @ np.asarray(basis.writers, float).T
    want = ((slopes[None] * codes[:, None, :]) ** 2).mean(0)
    np.testing.assert_allclose(edges["third", "outputs"], want, rtol=1e-3, atol=1e-5)


def test_all_edges_kept_is_the_model_and_none_is_its_mean(truth, exact):
    params, x, _ = truth
    metric = lambda y: y  # noqa: E731
    rank = int(exact["third"].diagnostics.rank)
    basis = exact["third"]
    whole = ft.metrics.edge_ablation(
        PROBED,
        params,
        x,
        metric,
        source=("third", basis),
        target=None,
        kept=jnp.ones((3, len(basis.spectrum)), bool),
    )
    assert rank == 3
    np.testing.assert_allclose(whole, PROBED(params, x, {})[0], atol=2e-3)
    none = ft.metrics.edge_ablation(
        PROBED,
        params,
        x,
        metric,
        source=("third", basis),
        target=None,
        kept=jnp.zeros((3, len(basis.spectrum)), bool),
    )
    np.testing.assert_allclose(none, none[:1] + 0 * none, atol=1e-5)


def test_the_ablation_curve_is_a_loop_over_spliced_bases(truth, exact):
    params, x, _ = truth
    site, basis = "second", exact["second"]
    curve = ft.metrics.ablation_curve(
        PROBED, params, x, lambda y: jnp.mean(y**2), site=site, basis=basis
    )
    for kept, value in enumerate(np.asarray(curve)):

        def splice(a, kept=kept):
            codes = ft.encode(basis, a).at[:, kept:].set(0.0)
            return ft.decode(basis, codes)

        want = jnp.mean(PROBED(params, x, {site: splice})[0] ** 2)
        np.testing.assert_allclose(value, want, rtol=1e-4)
    with pytest.raises(ValueError, match="a rank must be an int in 0"):
        ft.metrics.ablation_curve(
            PROBED, params, x, jnp.mean, site=site, basis=basis, ranks=[99]
        )


@pytest.mark.slow_cases
@pytest.mark.parametrize("over", ["positions", "units"])
def test_sources_over_positions_or_units_have_the_right_mean(over):
    mix = jnp.array([[1.0, 0.5], [-0.3, 2.0]])
    probed = ft.from_split(
        lambda p, x: x, lambda p, a: jnp.einsum("st,btd,de->bse", p["t"], a, mix)
    )
    params = {"t": jnp.array([[1.0, 0.2, 0.0], [0.0, 1.0, 0.4], [0.3, 0.0, 1.0]])}
    x = jax.random.normal(jax.random.key(0), (6, 3, 2))
    exact = ft.tap(probed, params, x, sites="acts", readout=ft.readouts.jacobian())
    want = jnp.einsum("nki,nkj->ij", exact["acts"].grads, exact["acts"].grads)

    def second(key):
        readout = ft.readouts.random_directions(key, 2, over=over)
        g = ft.tap(probed, params, x, sites="acts", readout=readout)["acts"].grads
        assert g.shape[1] == 2 * (2 if over == "positions" else 3)
        return jnp.einsum("nki,nkj->ij", g, g)

    keys = jax.random.split(jax.random.key(0), 2000)
    draws = np.asarray(jax.jit(jax.vmap(second))(keys), float)
    error = draws.std(0) / 2000**0.5
    np.testing.assert_array_less(np.abs(draws.mean(0) - want), 5 * error + 1e-4)


@pytest.mark.parametrize(
    ("kwargs", "error", "match"),
    [
        ({"sites": []}, ValueError, "distinct sites"),
        ({"sites": ["first", "first"]}, ValueError, "distinct sites"),
        ({"sites": ["nowhere"]}, ValueError, "no site 'nowhere'"),
        ({"sites": ["first"], "sources": 2}, ValueError, "want a key"),
        (
            {"sites": ["first"], "rank": 99},
            ValueError,
            r"rank must be an int in 1 \.\. 5,",
        ),
        ({"sites": ["first"], "rank": 2.0}, TypeError, "rank must be an int"),
        ({"sites": ["first"], "sources": "2"}, TypeError, "sources must be an int"),
        ({"sites": 3}, TypeError, "sites must be names"),
        ({"sites": [3]}, TypeError, "sites must be names"),
        ({"sites": ["first"], "sources": 2, "key": 0}, TypeError, "key must be one"),
    ],
)
def test_bad_arguments_of_lib_raise(truth, kwargs, error, match):
    params, x, _ = truth
    with pytest.raises(error, match=match):
        ft.local_interaction_basis(PROBED, params, batches_of(x), **kwargs)


def test_an_iterator_that_is_exhausted_and_values_that_are_not_finite_raise(truth):
    params, x, _ = truth
    same = iter([x])
    with pytest.raises(ValueError, match=r"same batches .* got 1 batches .* and 0"):
        ft.local_interaction_basis(PROBED, params, lambda: same, sites=["first"])
    broken = jax.tree.map(lambda leaf: leaf * jnp.nan, params)
    with pytest.raises(ValueError, match=r"^local_interaction_basis: .* finite"):
        ft.local_interaction_basis(PROBED, broken, batches_of(x), sites=["first"])


def test_batches_must_be_a_function_with_batches(truth):
    params, x, _ = truth
    with pytest.raises(TypeError, match="fresh iterator"):
        ft.local_interaction_basis(PROBED, params, [x], sites=["first"])
    with pytest.raises(ValueError, match="at least one batch"):
        ft.local_interaction_basis(PROBED, params, lambda: iter([]), sites=["first"])


def test_eigengaps_name_directions_that_share_a_value():
    stats = ft.Moments(
        jnp.array(1.0), jnp.zeros(4), jnp.diag(jnp.array([3.0, 2, 2, 0]))
    )
    basis = ft.pca(stats, 4)
    gaps, groups = eigengaps(basis)
    np.testing.assert_allclose(gaps, [1 / 3, 0, 1, 0], atol=1e-6)
    assert groups.tolist() == [0, 1, 1, -1]
    assert "directions 2-3 share an eigenvalue" in ft.describe(basis)


def test_edges_out_of_order_are_warned_of(truth, exact):
    params, x, _ = truth
    wrong = {site: exact[site] for site in ("second", "first", "third")}
    with pytest.warns(UserWarning, match="in order from input to output"):
        interaction_edges(PROBED, params, batches_of(x[:10]), wrong)
