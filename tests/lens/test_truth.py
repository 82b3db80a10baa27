"""Lenses on models whose Jacobians are known: where they must see, and must not."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat import lens as lenses

NO_SKIP = {"skip_first": 0, "skip_last": 0}


def probed_model(fn, sites):
    """The logits of a stream are its entries."""
    return lenses.from_probed(
        ft.from_function(fn),
        sites=sites,
        unembed=lambda p, resid: resid,
        head=lambda p: jnp.eye(p["dim"].shape[0]),
    )


def estimate(make, model, params, inputs, **options):
    dim = params["dim"].shape[0]
    acc = make(model, dim, **{**NO_SKIP, **options})
    return jax.jit(lambda p, x: acc.finish(acc.update(acc.init(), p, x)))(
        params, inputs
    )


def unit_rows(num, dim, seed=0):
    """Orthonormal rows."""
    normal = np.random.default_rng(seed).normal(size=(dim, dim))
    return np.linalg.qr(normal)[0][:num].astype(np.float32)


# A linear chain: products of matrices, with the sums of a causal mixing.


def linear_chain(params, x, tap):
    """Blocks ``h + A h W`` with a fixed causal mixing ``A [T, T]``."""
    resid = x
    for i, matrix in enumerate(params["blocks"]):
        mixed = jnp.einsum("st,btd->bsd", params["mixing"], resid)
        resid = tap(f"block_{i}", resid + mixed @ matrix)
    return resid


def test_a_linear_chain_has_its_exact_jacobian():
    rng, time, dim = np.random.default_rng(0), 5, 4
    params = {
        "blocks": list(0.5 * rng.normal(size=(3, dim, dim)).astype(np.float32)),
        "mixing": np.tril(rng.normal(size=(time, time))).astype(np.float32),
        "dim": np.zeros(dim),
    }
    model = probed_model(linear_chain, [f"block_{i}" for i in range(3)])
    x = rng.normal(size=(2, time, dim)).astype(np.float32)
    fitted = estimate(lenses.mean_jacobian, model, params, x, skip_first=1, skip_last=1)
    # d h_2[s] / d h_1[t] = delta_st I + A[s, t] W^T; two blocks also have A A.
    last, first = (m.T for m in (params["blocks"][2], params["blocks"][1]))
    valid, mixing = slice(1, 4), params["mixing"]
    once = mixing[valid, valid].sum() / 3
    twice = (mixing @ mixing)[valid, valid].sum() / 3
    wanted = np.eye(dim) + once * last
    np.testing.assert_allclose(fitted.matrices["block_1"], wanted, atol=1e-5)
    wanted = np.eye(dim) + once * (first + last) + twice * last @ first
    np.testing.assert_allclose(fitted.matrices["block_0"], wanted, atol=1e-4)
    # All prompts have the same Jacobian, so that nothing is left to chance.
    assert fitted.standard_error["block_0"] < 1e-5
    np.testing.assert_allclose(fitted.refit_cosine["block_0"], 1, atol=1e-5)


# x^2: the mean is blind, the second moment and clusters are not.


def squaring(params, x, tap):
    """``h + (w . h)^2 u``."""
    resid = tap("in", x)
    return tap("out", resid + (resid @ params["w"]) ** 2 * params["u"][None, None])


@pytest.fixture(scope="module")
def square():
    """Model, parameters and streams ``x w`` with symmetric x."""
    w, u = unit_rows(2, 4)
    params = {"w": w[:, None], "u": u, "dim": np.zeros(4)}
    sizes = np.linspace(0.5, 1.0, 8, dtype=np.float32)
    x = np.concatenate([sizes, -sizes])[:, None, None] * w[None, None]
    return probed_model(squaring, ["in", "out"]), params, x, float(sizes.mean())


def test_the_mean_jacobian_of_a_square_is_blind(square):
    model, params, x, _ = square
    fitted = estimate(lenses.mean_jacobian, model, params, x)
    np.testing.assert_allclose(fitted.matrices["in"], np.eye(4), atol=1e-6)
    lens = lenses.jacobian_lens(model, params, fitted)
    said = lens.read("in", x) @ params["u"]
    truth = model.run(params, x, x, "in", "out") @ params["u"]
    assert np.abs(said).max() < 1e-6
    assert truth.min() > 0.2


def test_the_second_moment_of_a_square_has_its_reader(square):
    model, params, x, _ = square
    moment = estimate(lenses.second_moment, model, params, x).matrices["in"]
    w, mean_square = params["w"][:, 0], np.mean((x @ params["w"]) ** 2)
    wanted = np.eye(4) + 4 * mean_square * np.outer(w, w)
    np.testing.assert_allclose(moment, wanted, atol=1e-5)
    leading = np.linalg.eigh(moment)[1][:, -1]
    assert abs(leading @ w) > 1 - 1e-5


def test_two_clusters_of_a_square_see_it(square):
    model, params, x, mean_size = square
    w, u = params["w"][:, 0], params["u"]
    centres = {"in": lenses.cluster_centres(jax.random.key(0), x[:, 0], 2)}
    fitted = estimate(lenses.mean_jacobian, model, params, x, centres=centres)
    signs = np.sign(np.asarray(centres["in"]) @ w)
    assert sorted(signs.tolist()) == [-1, 1]
    for sign, expert in zip(signs, fitted.matrices["in"], strict=True):
        wanted = np.eye(4) + 2 * sign * mean_size * np.outer(u, w)
        np.testing.assert_allclose(expert, wanted, atol=1e-5)
    # Each stream by its own expert: 2 E|x| |x| along u, right for either sign.
    routed = lenses.clustered_lens(model, params, fitted, centres)
    said = np.asarray(routed.read("in", x) @ u)
    size = np.abs(x @ w)
    np.testing.assert_allclose(said, 2 * mean_size * size, rtol=1e-4)
    # With signed weights one matrix is left, which leads from w to u and nowhere else.
    shares = {"in": jnp.array([0.5, 0.5])}
    contrast = lenses.contrast_lens(model, params, fitted, shares)
    matrix = np.asarray(contrast.maps["in"].matrices[0])
    matrix = matrix * np.sign(u @ matrix @ w)
    np.testing.assert_allclose(matrix, 2 * mean_size * np.outer(u, w), atol=1e-5)


# A feature is written at layer 2 and read at layer 5; another is held and erased.


def late_reader(params, x, tap):
    """Layer 2 adds ``(e . h) a``, layer 5 ``relu(a . h) b`` and takes away ``q``."""
    resid = x
    for layer in range(6):
        if layer == 2:
            resid = resid + (resid @ params["e"]) * params["a"][None, None]
        if layer == 5:
            read = jnp.maximum(resid @ params["a"][:, None], 0)
            resid = resid + read * params["b"][None, None]
            held = resid @ params["q"][:, None]
            resid = resid - held * params["q"][None, None]
        resid = tap(f"layer_{layer}", resid)
    return resid


@pytest.fixture(scope="module")
def late():
    e, a, b, q = np.eye(6, dtype=np.float32)[:4]
    params = {"e": e[:, None], "a": a, "b": b, "q": q, "dim": np.zeros(6)}
    x = np.zeros((9, 1, 6), np.float32)
    x[:, 0, 0] = np.linspace(-1, 2, 9)  # e: a is what it becomes at layer 2
    x[:, 0, 3] = 3.0  # q
    model = probed_model(late_reader, [f"layer_{i}" for i in range(6)])
    return model, params, x, estimate(lenses.mean_jacobian, model, params, x)


def test_a_feature_that_is_read_late_is_seen_where_it_is_written(late):
    model, params, x, fitted = late
    active = (x[:, 0, 0] > 0).mean()
    e, a, b, q = np.eye(6)[:4]
    behind = np.eye(6) + active * np.outer(b, a) - np.outer(q, q)
    for layer in (2, 3, 4):
        np.testing.assert_allclose(fitted.matrices[f"layer_{layer}"], behind, atol=1e-6)
    before = behind @ (np.eye(6) + np.outer(a, e))
    for layer in (0, 1):
        np.testing.assert_allclose(fitted.matrices[f"layer_{layer}"], before, atol=1e-6)
    # What the lenses say of the answer b, before the model has computed it.
    acts = model.probed(params, x, {})[1]
    lens = lenses.jacobian_lens(model, params, fitted)
    plain = lenses.logit_lens(model, params)
    for layer in range(5):
        site = f"layer_{layer}"
        said = lens.read(site, acts[site])[:, 0, 2]
        np.testing.assert_allclose(said, active * x[:, 0, 0], atol=1e-6)
        assert not np.any(plain.read(site, acts[site])[:, 0, 2])


def test_a_feature_that_is_held_and_unused_is_not_seen(late):
    model, params, x, fitted = late
    lens, plain = (
        lenses.jacobian_lens(model, params, fitted),
        lenses.logit_lens(model, params),
    )
    for layer in range(5):
        site = f"layer_{layer}"
        np.testing.assert_allclose(fitted.matrices[site][:, 3], 0, atol=1e-6)
        assert np.abs(lens.read(site, x)[:, 0, 3]).max() < 1e-6
        assert plain.read(site, x)[:, 0, 3].min() > 2.9  # it is there all the same
        assert np.abs(lens.vectors([3], centred=False)[site]).max() < 1e-6


# Superposition: more features than dimensions, each read by a ReLU of its own.


def superposed(params, x, tap):
    """``h + sum_i relu(r_i . h - c) b_i``."""
    resid = tap("in", x)
    read = jnp.maximum(resid @ params["r"].T - 0.5, 0)
    return tap("out", resid + read @ params["b"])


def test_features_in_superposition_are_read_as_often_as_they_are_active():
    rng, features, space, dim = np.random.default_rng(2), 12, 8, 24
    rows = rng.normal(size=(features, space))
    r = np.zeros((features, dim), np.float32)
    r[:, :space] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    b = np.eye(dim, dtype=np.float32)[space : space + features]
    params = {"r": r, "b": b, "dim": np.zeros(dim)}
    # One feature a prompt, of size 1.
    active = np.arange(60) % features
    x = r[active][:, None]
    model = probed_model(superposed, ["in", "out"])
    fitted = estimate(lenses.mean_jacobian, model, params, x)
    share = (x[:, 0] @ r.T > 0.5).mean(0)
    wanted = np.eye(dim) + b.T @ (share[:, None] * r)
    np.testing.assert_allclose(fitted.matrices["in"], wanted, atol=1e-5)
    # Of the outputs, the lens names the feature that is there; the logit lens none.
    outputs = slice(space, space + features)
    lens = lenses.jacobian_lens(model, params, fitted)
    said = np.asarray(lens.read("in", x)[:, 0, outputs])
    scaled = said / share[None]  # rare features are read as weakly as they are rare
    assert (scaled.argmax(1) == active).all()
    plain = lenses.logit_lens(model, params).read("in", x)[:, 0, outputs]
    assert not np.any(plain)


# Modular addition by products of waves: all of it is interaction.


def waves(angles, numbers):
    phase = numbers[..., None] * angles
    return np.stack([np.cos(phase), np.sin(phase)], -1).reshape(*phase.shape[:-1], -1)


def adding(params, x, tap):
    """Planes of ``a`` and ``b`` in the stream; a block adds the planes of ``a + b``."""
    resid = tap("in", x)
    num = params["unembed"].shape[0]
    a = resid[..., :num].reshape(*resid.shape[:-1], -1, 2)
    b = resid[..., num : 2 * num].reshape(*resid.shape[:-1], -1, 2)
    cos = a[..., 0] * b[..., 0] - a[..., 1] * b[..., 1]
    sin = a[..., 1] * b[..., 0] + a[..., 0] * b[..., 1]
    planes = jnp.stack([cos, sin], -1).reshape(*resid.shape[:-1], -1)
    zeros = jnp.zeros((*resid.shape[:-1], 2 * num))
    return tap("out", resid + jnp.concatenate([zeros, planes], -1))


@pytest.fixture(scope="module")
def addition():
    modulus = 7
    angles = 2 * np.pi / modulus * np.arange(1, 4)
    pairs = np.array(list(itertools.product(range(modulus), repeat=2)))
    summands = waves(angles, pairs)  # [N, 2, 2 K]
    num = summands.shape[-1]
    x = np.zeros((len(pairs), 1, 3 * num), np.float32)
    x[:, 0, : 2 * num] = summands.reshape(len(pairs), -1)
    unembed = waves(angles, np.arange(modulus)).T.astype(np.float32)
    params = {"unembed": unembed, "dim": np.zeros(3 * num)}
    model = lenses.from_probed(
        ft.from_function(adding),
        sites=["in", "out"],
        unembed=lambda p, resid: resid[..., 2 * num :] @ p["unembed"],
    )
    return model, params, x, pairs.sum(1) % modulus


def test_the_mean_jacobian_says_nothing_of_a_sum_and_the_second_moment_does(addition):
    """The answer is a product of the summands: each one's effect averages to 0."""
    model, params, x, answers = addition
    out = model.run(params, x, x, "in", "out")
    assert (np.argmax(model.unembed(params, out)[:, 0], -1) == answers).all()
    dim = x.shape[-1]
    mean = estimate(lenses.mean_jacobian, model, params, x)
    np.testing.assert_allclose(mean.matrices["in"], np.eye(dim), atol=1e-5)
    lens = lenses.jacobian_lens(model, params, mean)
    assert np.abs(lens.read("in", x)).max() < 1e-4
    # Known Fourier solution: 2 on the planes of both summands, 1 on those of the sum.
    second = estimate(lenses.second_moment, model, params, x)
    wanted = np.diag(np.where(np.arange(dim) < 2 * dim // 3, 2.0, 1.0))
    np.testing.assert_allclose(second.matrices["in"], wanted, atol=1e-5)


def test_clusters_of_a_summand_see_a_part_of_the_sum(addition):
    """One cluster per pair would be the exact derivative; one per b is linear in a."""
    model, params, x, answers = addition
    centres = {"in": jnp.asarray(x[:, 0])}
    exact = estimate(lenses.mean_jacobian, model, params, x, centres=centres)
    routed = lenses.clustered_lens(model, params, exact, centres)
    said = np.asarray(routed.read("in", x)[:, 0])
    # f is a product of two, so that its derivative times the point is 2 f.
    assert (said.argmax(1) == answers).all()


# Belief states of Mess3: the exact filter of a hidden Markov model.


def mess3(x=0.15, a=0.6):
    """``[3, 3, 3]``: joint probabilities ``T[token][state, next state]``."""
    stay, emit = np.full((3, 3), x) + (1 - 3 * x) * np.eye(3), np.full(3, (1 - a) / 2)
    operators = []
    for token in range(3):
        likelihood = np.where(np.arange(3) == token, a, emit)
        operators.append(stay * likelihood[None])
    return np.array(operators)


def filtering(params, tokens, tap):
    """Stream of tokens, mixed into operators; the final stream is the belief."""
    resid = tap("in", tokens)
    operators = jnp.einsum("btx,xij->btij", resid, params["operators"])

    def step(belief, operator):
        belief = jnp.einsum("bi,bij->bj", belief, operator)
        belief = belief / jnp.sum(belief, axis=1, keepdims=True)
        return belief, belief

    start = jnp.full((tokens.shape[0], 3), 1 / 3, resid.dtype)
    _, beliefs = jax.lax.scan(step, start, jnp.moveaxis(operators, 1, 0))
    return tap("out", jnp.moveaxis(beliefs, 0, 1))


def belief_jacobian(operators, tokens):
    """``sum_{t' >= t} d belief_t' / d token_t``, mean over t, from the products."""
    total = np.zeros((3, 3))
    for t in range(len(tokens)):
        alpha = np.full(3, 1 / 3)
        for token in tokens[:t]:
            alpha = alpha @ operators[token]
        for token in range(3):
            changed, plain = alpha @ operators[token], alpha @ operators[tokens[t]]
            for later in range(t, len(tokens)):
                if later > t:
                    changed = changed @ operators[tokens[later]]
                    plain = plain @ operators[tokens[later]]
                belief = plain / plain.sum()
                slope = (changed - belief * changed.sum()) / plain.sum()
                total[:, token] += slope
    return total / len(tokens)


def test_belief_states_of_mess3_have_the_jacobian_of_the_filter():
    operators = mess3()
    np.testing.assert_allclose(operators.sum((0, 2)), 1)
    tokens = np.random.default_rng(0).integers(0, 3, (4, 5))
    params = {"operators": operators.astype(np.float32), "dim": np.zeros(3)}
    x = np.eye(3, dtype=np.float32)[tokens]
    model = probed_model(filtering, ["in", "out"])
    lenses.check_model(model, params, x)
    fitted = estimate(lenses.mean_jacobian, model, params, x)
    wanted = np.mean([belief_jacobian(operators, row) for row in tokens], axis=0)
    np.testing.assert_allclose(fitted.matrices["in"], wanted, atol=1e-5)
    # Beliefs sum to 1, so that no token can move their sum.
    np.testing.assert_allclose(fitted.matrices["in"].sum(0), 0, atol=1e-5)
    # A token speaks for the state that likes to emit it.
    assert (np.argmax(fitted.matrices["in"], axis=0) == np.arange(3)).all()
