"""The KL at the mean of a population, against autodiff and exact curvature."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat import losses
from toyfeat.dictionary.shared_kl import _key_of
from toyfeat.dictionary.types import MEMBERS, Output
from toyfeat.lm.finetune import WindowTaps, finetune, window_batches

B, T, D, V, P = 2, 3, 4, 5, 3
N = B * T


def behind(params, entry, value):
    """A model behind a site that mixes positions, causally."""
    mixed = jnp.cumsum(jnp.tanh(value @ params["mix"]), axis=1) + entry
    return mixed @ params["head"]


def problem():
    rng = np.random.default_rng(0)
    params = {"mix": rng.normal(size=(D, D)), "head": rng.normal(size=(D, V))}
    acts = rng.normal(size=(B, T, D))
    weights = np.array([1, 2, 0, 0.5, 1, 3])
    recons = acts.reshape(1, N, D) + 0.3 * rng.normal(size=(P, N, D))
    return params, acts, weights / weights.sum(), recons


def inputs_of(recon, context):
    _, acts, weights, _ = problem()
    return losses.Inputs(
        dictionary=None,
        params=None,
        acts=acts.reshape(N, D),
        target=acts.reshape(N, D),
        out=Output(None, None, recon, None),
        grads=None,
        weights=jnp.asarray(weights),
        dead=None,
        scale=1.0,
        coefficients={},
        unit=1.0,
        context=context,
    )


def term_of(term, recon):
    params, acts, *_ = problem()
    return term.loss(inputs_of(recon, losses.Windows(params, acts, acts)))


def members(term, recons):
    """Values and gradients of all members."""
    step = jax.value_and_grad(lambda recon: term_of(term, recon))
    return jax.vmap(step, axis_name=MEMBERS)(recons)


def test_a_single_member_has_value_and_gradient_of_the_spliced_kl():
    with jax.enable_x64(True):
        recon = jnp.asarray(problem()[3][0])
        spliced = losses.spliced_kl(behind)
        wanted = jax.value_and_grad(lambda x: term_of(spliced, x))(recon)
        for draws in (0, 2):
            found = members(losses.shared_kl(behind, draws=draws), recon[None])
            for mine, theirs in zip(found, wanted, strict=True):
                np.testing.assert_allclose(mine[0], theirs, rtol=1e-10, atol=1e-14)


def test_without_draws_it_is_the_first_order_at_the_mean():
    with jax.enable_x64(True):
        recons = jnp.asarray(problem()[3])
        spliced, mean = losses.spliced_kl(behind), recons.mean(0)
        kl, slope = jax.value_and_grad(lambda x: term_of(spliced, x))(mean)
        values, grads = members(losses.shared_kl(behind, draws=0), recons)
        wanted = kl + jnp.sum(slope[None] * (recons - mean[None]), axis=(1, 2))
        np.testing.assert_allclose(values, wanted, rtol=1e-10)
        np.testing.assert_allclose(
            grads, jnp.broadcast_to(slope, grads.shape), atol=1e-14
        )


def test_draws_are_unbiased_for_the_curvature_of_a_token():
    """Of each token alone: ``1/2 d^T J^T (diag p - p p^T) J d``, by the Jacobian."""
    params, acts, weights, recons = problem()
    with jax.enable_x64(True):
        mean = jnp.asarray(recons.mean(0)).reshape(B, T, D)
        counted = (weights > 0).reshape(B, T)
        change = (recons[0] - recons.mean(0)).reshape(B, T, D)
        value = jnp.where(counted[:, :, None], mean, acts)
        logits = behind(params, acts, value)
        p = np.asarray(jax.nn.softmax(logits))
        # Positions whose label is drawn, their logits, windows and tokens that move.
        jacobian = jax.jacrev(lambda x: behind(params, acts, x))(value)
        wanted = 0.0
        for b, t in np.argwhere(counted):
            for after in np.flatnonzero(counted[b]):
                moved = np.asarray(jacobian[b, after, :, b, t]) @ change[b, t]
                q = p[b, after]
                spread = q @ moved**2 - (q @ moved) ** 2
                wanted += weights.reshape(B, T)[b, after] * spread / 2
        values = [
            members(losses.shared_kl(behind, draws=draws), jnp.asarray(recons))[0][0]
            for draws in (0, 20_000)
        ]
        np.testing.assert_allclose(values[1] - values[0], wanted, rtol=0.05)


def test_the_model_has_no_axis_of_members():
    """The largest product of the model is there once for all members."""
    recons = problem()[3]
    shapes = []

    def watched(params, entry, value):
        shapes.append(value.shape)
        return behind(params, entry, value)

    term = losses.shared_kl(watched, draws=2)
    text = str(jax.make_jaxpr(lambda x: members(term, x))(recons))
    assert set(shapes) == {(B, T, D)}
    assert f"[{B},{T},{V}]" in text
    assert f"[{P},{B},{T},{V}]" not in text
    # The spliced KL of the same members has it.
    spliced = losses.spliced_kl(behind)
    text = str(jax.make_jaxpr(lambda x: members(spliced, x))(recons))
    assert f"[{P},{B},{T},{V}]" in text


def test_draws_are_of_the_batch_and_not_of_the_order_of_its_sum():
    acts = jnp.asarray(problem()[1], jnp.float32) * 1e4
    key = jax.random.key_data(_key_of(acts))
    np.testing.assert_array_equal(key, jax.random.key_data(_key_of(acts[:, ::-1])))
    assert (key != jax.random.key_data(_key_of(acts + 1))).any()


def test_what_it_cannot_do_is_said():
    recon = jnp.asarray(problem()[3][0])
    with pytest.raises(ValueError, match="shared_kl: wanted a trainer of a popul"):
        term_of(losses.shared_kl(behind), recon)
    with pytest.raises(ValueError, match="shared_kl: wanted taps with a context"):
        losses.shared_kl(behind).loss(inputs_of(recon, None))
    with pytest.raises(TypeError, match="shared_kl: run must be"):
        losses.shared_kl(3)
    with pytest.raises(ValueError, match="shared_kl: draws must be"):
        losses.shared_kl(behind, draws=-1)


def tuned_by(term, starts, sae, params, acts, rate=3e-3):
    """Fine-tune on windows; parameters of one dictionary or of a list."""
    steps = len(acts) // 4
    taps = WindowTaps(acts, np.ones(acts.shape[:2], np.float32))
    batches = window_batches(taps, windows=4, seed=0, steps=steps, params=params)
    return finetune(sae, starts, batches, term, steps=steps, learning_rate=rate)


def dictionaries(num, windows=80):
    rng = np.random.default_rng(1)
    params = {"mix": rng.normal(size=(D, D)), "head": rng.normal(size=(D, V))}
    params = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), params)
    acts = rng.normal(size=(windows, T, D)).astype(np.float32)
    sae = ft.dictionaries.topk(D, 8, 2)
    starts = [sae.init(key) for key in jax.random.split(jax.random.key(0), num)]
    return sae, params, acts, starts


@pytest.mark.slow_cases
@pytest.mark.parametrize("draws", [0, 1])
def test_a_list_of_one_is_end_to_end_training(draws):
    sae, params, acts, starts = dictionaries(1)
    term = losses.shared_kl(behind, draws=draws)
    (found,) = tuned_by(term, starts, sae, params, acts)
    wanted = tuned_by(losses.spliced_kl(behind), starts[0], sae, params, acts)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-4)
        assert np.abs(value - starts[0][name]).max() > 1e-3 or not value.any()


@pytest.mark.slow
def test_a_population_lowers_the_kl_of_each_member():
    sae, params, acts, starts = dictionaries(1, windows=2000)
    # Three dictionaries whose reconstructions are near each other.
    (base,) = tuned_by(None, starts, sae, params, acts, rate=1e-2)
    starts = [
        {n: x + 0.1 * jax.random.normal(key, x.shape) for n, x in base.items()}
        for key in jax.random.split(jax.random.key(2), 3)
    ]

    def kl_of(tensors):
        flat = acts.reshape(-1, D)
        value = sae.decode(tensors, sae.encode(tensors, flat)).reshape(acts.shape)
        clean, spliced = (
            jax.nn.log_softmax(behind(params, acts, x)) for x in (acts, value)
        )
        return float(jnp.sum(jnp.exp(clean) * (clean - spliced), axis=2).mean())

    term = losses.shared_kl(behind, draws=1)
    shared = tuned_by(term, starts, sae, params, acts)
    plain = tuned_by(None, starts, sae, params, acts)
    for mine, theirs in zip(shared, plain, strict=True):
        assert kl_of(mine) < 0.95 * kl_of(theirs)
