"""Terms of what a reconstruction does to the model, against float64 arithmetic."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat import losses
from toyfeat.dictionary.types import Output
from toyfeat.train.normalization import normalization, normalized

B, T, D, V, M, K = 3, 4, 5, 7, 9, 2
N = B * T
UNIT = 1.7


def behind(params, entry, value):
    """A model behind a site that mixes positions, causally."""
    mixed = jnp.cumsum(jnp.tanh(value @ params["mix"]), axis=1) + entry
    return mixed @ params["head"]


def behind_numpy(params, entry, value):
    mixed = np.cumsum(np.tanh(value @ params["mix"]), axis=1) + entry
    return mixed @ params["head"]


def log_softmax(logits):
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


@cache
def problem():
    rng = np.random.default_rng(0)
    params = {"mix": rng.normal(size=(D, D)), "head": rng.normal(size=(D, V))}
    acts, entry = rng.normal(size=(2, B, T, D))
    weights = np.ones((B, T))
    weights[:, -1] = weights[1, 0] = 0
    weights = weights.ravel() / weights.sum()
    sae = ft.dictionaries.topk(D, M, 3)
    tensors = {
        n: 0.4 * rng.normal(size=x.shape)
        for n, x in sae.init(jax.random.key(0)).items()
    }
    grads = rng.normal(size=(N, K, D))
    return params, acts, entry, weights, sae, tensors, grads


def inputs_with(recon, context=True, units=(0.5, 3.0)):
    """Inputs of a term, of a reconstruction that is given."""
    params, acts, entry, weights, sae, tensors, grads = problem()
    rows = acts.reshape(N, D) / UNIT
    return losses.Inputs(
        dictionary=sae,
        params=tensors,
        acts=rows,
        target=rows,
        out=Output(None, None, recon, None),
        grads=grads,
        weights=weights,
        dead=np.zeros(M, bool),
        scale=np.asarray(1.0),
        coefficients={},
        unit=UNIT,
        effect_units=np.asarray(units),
        context=losses.Windows(params, acts, entry) if context else None,
    )


@cache
def recon_of():
    noise = np.random.default_rng(1).normal(size=(N, D))
    return problem()[1].reshape(N, D) / UNIT + 0.3 * noise


def loss_and_slope(term):
    """Of a term, by the reconstruction, in float64."""
    with jax.enable_x64(True):
        both = jax.jit(jax.value_and_grad(lambda x: term.loss(inputs_with(x))))
        return jax.tree.map(np.asarray, both(jnp.asarray(recon_of())))


def spliced(recon):
    acts, weights = problem()[1], problem()[3].reshape(B, T)
    value = recon.reshape(B, T, D) * UNIT
    return np.where(weights[:, :, None] > 0, value, acts), weights


def kl_of(recon, temperature):
    params, acts, entry = problem()[:3]
    value, weights = spliced(recon)
    clean = log_softmax(behind_numpy(params, entry, acts) / temperature)
    other = log_softmax(behind_numpy(params, entry, value) / temperature)
    return (weights * (np.exp(clean) * (clean - other)).sum(-1)).sum()


@pytest.mark.slow_cases
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_spliced_kl_is_that_of_the_predictions(temperature):
    term = losses.spliced_kl(behind, temperature=temperature)
    loss, slope = loss_and_slope(term)
    np.testing.assert_allclose(loss, kl_of(recon_of(), temperature), rtol=1e-12)
    assert loss > 0.01
    for row in (0, 5, N - 1):  # the last has no weight
        step = np.zeros((N, D))
        step[row, 2] = 1e-6
        up, down = (kl_of(recon_of() + s, temperature) for s in (step, -step))
        np.testing.assert_allclose(slope[row, 2], (up - down) / 2e-6, atol=1e-8)


def test_a_spliced_run_of_its_own_gets_the_clean_activations():
    def run_spliced(params, entry, value, acts):
        return behind(params, entry, acts + 0 * value)

    term = losses.spliced_kl(behind, run_spliced=run_spliced)
    loss, slope = loss_and_slope(term)
    assert abs(loss) < 1e-15
    assert np.abs(slope).max() < 1e-15


def test_downstream_error_is_in_units_of_the_variance():
    params, acts, entry = problem()[:3]

    def run(params, entry, value):
        logits = behind(params, entry, value)
        return {"a": logits, "b": 3 * logits[:, :, :2]}

    loss, _ = loss_and_slope(losses.downstream_error(run))
    value, weights = spliced(recon_of())
    errors = []
    for width in (V, 2):
        clean = behind_numpy(params, entry, acts)[..., :width]
        error = ((clean - behind_numpy(params, entry, value)[..., :width]) ** 2).sum(-1)
        mean = np.einsum("bt,btv->v", weights, clean)
        variance = (weights[..., None] * (clean - mean) ** 2).sum() / width
        errors.append((weights * error).sum() / variance)
    np.testing.assert_allclose(loss, np.mean(errors), rtol=1e-12)


@pytest.mark.slow_cases
@pytest.mark.parametrize("length", [0, T])
@pytest.mark.parametrize("form", ["square", "huber", "log"])
def test_fisher_is_the_second_order_kl(form, length):
    weights, grads, limit = problem()[3], problem()[6], 0.9
    term = losses.fisher(form, limit=limit, length=length)
    loss, _ = loss_and_slope(term)
    error = problem()[1].reshape(N, D) / UNIT - recon_of()
    effect = np.einsum("nd,nkd->nk", error, grads) * [0.5, 3.0]
    if length:  # of a window together, for every token of it that counts
        counts = (weights > 0).reshape(B, T)
        joint = (effect.reshape(B, T, K) * counts[:, :, None]).sum(1)
        kl = (joint**2).sum(1) / 2 / counts.sum(1)
        weights = weights.reshape(B, T).sum(1)
    else:
        kl = (effect**2).sum(1) / 2
    bent = {
        "square": kl,
        "huber": np.where(kl <= limit, kl, 2 * np.sqrt(limit * kl) - limit),
        "log": limit * np.log1p(kl / limit),
    }[form]
    np.testing.assert_allclose(loss, weights @ bent, rtol=1e-12)
    assert kl.min() < limit < kl.max()


@pytest.mark.slow_cases
@pytest.mark.parametrize("draws", [0, K])
def test_expanded_kl_is_the_expansion_where_it_stands(draws):
    rng = np.random.default_rng(7)
    weights = problem()[3]
    point, slope = rng.normal(size=(2, N, D))
    grads = rng.normal(size=(N, draws, D)) if draws else None
    near = losses.Expansion(point, rng.normal(size=N), slope, grads)

    def loss_of(recon):
        inputs = inputs_with(recon)._replace(context=near)
        return losses.expanded_kl().loss(inputs)

    change = recon_of() * UNIT - point
    wanted = near.value + (slope * change).sum(1)
    if draws:
        wanted = wanted + (np.einsum("nkd,nd->nk", grads, change) ** 2).sum(1) / 2
    with jax.enable_x64(True):
        np.testing.assert_allclose(loss_of(recon_of()), weights @ wanted, rtol=1e-12)
        # Where the dictionary stands it has the value and the slope.
        value, step = jax.value_and_grad(loss_of)(jnp.asarray(point / UNIT))
    np.testing.assert_allclose(value, weights @ near.value, rtol=1e-12)
    np.testing.assert_allclose(step, weights[:, None] * slope * UNIT, rtol=1e-9)


def test_expanded_kl_of_windows_squares_what_their_tokens_do_together():
    rng = np.random.default_rng(8)
    weights = problem()[3]
    point, slope = rng.normal(size=(2, N, D))
    grads = rng.normal(size=(N, K, D))
    near = losses.Expansion(point, rng.normal(size=N), slope, grads)
    inputs = inputs_with(recon_of())._replace(context=near)
    change = recon_of() * UNIT - point
    wanted = weights @ (near.value + (slope * change).sum(1))
    for window in np.arange(N).reshape(B, T):
        counted = [n for n in window if weights[n]]
        for k in range(K):
            together = sum(grads[n, k] @ change[n] for n in counted)
            wanted += weights[window].sum() / len(counted) * together**2 / 2
    with jax.enable_x64(True):
        found = losses.expanded_kl(length=T).loss(inputs)
        np.testing.assert_allclose(found, wanted, rtol=1e-12)
    with pytest.raises(ValueError, match="expanded_kl: length must be"):
        losses.expanded_kl(length=-1)


def test_terms_of_windows_refuse_other_taps():
    with pytest.raises(ValueError, match=r"spliced_kl: wanted taps with a context"):
        losses.spliced_kl(behind).loss(inputs_with(recon_of(), context=False))
    inputs = inputs_with(recon_of())
    fewer = inputs.context._replace(acts=inputs.context.acts[:1])
    with pytest.raises(ValueError, match=r"rows, got \(1, 4\)"):
        losses.spliced_kl(behind).loss(inputs._replace(context=fewer))
    with pytest.raises(ValueError, match="expanded_kl: wanted taps with a context"):
        losses.expanded_kl().loss(inputs)
    with pytest.raises(TypeError, match="spliced_kl: run must be"):
        losses.spliced_kl(3)
    with pytest.raises(ValueError, match="fisher: form must be"):
        losses.fisher("cubic")
    with pytest.raises(ValueError, match="fisher: limit must be"):
        losses.fisher(limit=0)


@pytest.mark.slow
def test_units_make_effects_those_of_the_taps():
    """A trainer in normalized units has the term of taps in their own units."""
    rng = np.random.default_rng(3)
    taps = ft.Taps(
        jnp.asarray(5 + 3 * rng.normal(size=(N, D)), jnp.float32),
        jnp.asarray(0.01 * rng.normal(size=(N, K, D)), jnp.float32),
        jnp.ones(N),
    )
    sae = problem()[4]
    objective = (losses.reconstruction(), losses.fisher())
    train = ft.trainer(sae, objective, readouts=K)
    state = train.init(jax.random.key(0))
    after, metrics = jax.jit(train.update)(state, taps)
    # The parameters of the first loss, in units of the taps.
    mean = np.asarray(taps.acts).mean(0)
    first = after._replace(params={**state.params})
    scale = float(normalization(after).acts)
    first.params["b_dec"] = jnp.asarray(mean / scale)
    params = ft.denormalized(sae, first)
    recon = sae.forward(params, taps.acts).recon
    error = np.asarray(taps.acts - recon, np.float64)
    effect = np.einsum("nd,nkd->nk", error, np.asarray(taps.grads, np.float64))
    wanted = (effect**2).sum(1).mean() / 2
    np.testing.assert_allclose(metrics["fisher"], wanted, rtol=1e-4)
    # Back into the units of the state.
    back = normalized(sae, params, first)
    for name, value in first.params.items():
        np.testing.assert_allclose(back[name], value, rtol=1e-5, atol=1e-7)
