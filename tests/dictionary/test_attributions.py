import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.dictionary.attributions import (
    Penalty,
    attributions,
    mean_penalty,
    unexplained_effect,
)
from toyfeat.dictionary.types import Inputs

D, M, K, N = 5, 18, 3, 9


def single(x):
    return jnp.asarray(x, jnp.float32)


ALL = {
    "standard": lambda: ft.dictionaries.standard(D, M),
    "topk": lambda: ft.dictionaries.topk(D, M, K),
    "signed": lambda: ft.dictionaries.topk(D, M, K, signed=True),
    "batch": lambda: ft.dictionaries.batch_topk(D, M, K),
    "jump": lambda: ft.dictionaries.jump_relu(D, M),
    "gated": lambda: ft.dictionaries.gated(D, M),
}


def inputs_of(name, readouts):
    sae, rng = ALL[name](), np.random.default_rng(0)
    params = {
        n: jnp.asarray(0.5 * rng.normal(size=x.shape), jnp.float32)
        for n, x in sorted(sae.init(jax.random.key(0)).items())
    }
    acts = jnp.asarray(rng.normal(size=(N, D)), jnp.float32)
    grads = jnp.asarray(rng.normal(size=(N, readouts, D)), jnp.float32)
    out = jax.jit(sae.forward)(params, acts, grads=grads)
    return Inputs(
        dictionary=sae,
        params=params,
        acts=acts,
        target=acts,
        out=out,
        grads=grads,
        weights=jnp.full(N, 1 / N),
        dead=jnp.zeros(M, bool),
        scale=jnp.ones(()),
        coefficients={},
    )


def all_codes(inputs):
    values = np.asarray(inputs.out.values)
    if inputs.out.index is None:
        return values
    codes = np.zeros((N, M), np.float32)
    np.put_along_axis(codes, np.asarray(inputs.out.index), values, 1)
    return codes


@pytest.mark.slow_cases
@pytest.mark.parametrize("readouts", [1, 3])
@pytest.mark.parametrize("name", ALL)
def test_attributions_bias_and_rest_are_the_whole_first_order_effect(name, readouts):
    inputs = inputs_of(name, readouts)
    sizes, rest = attributions(inputs), unexplained_effect(inputs)
    b_dec, grads = np.asarray(inputs.params["b_dec"]), np.asarray(inputs.grads)
    whole = np.einsum("nd,nkd->nk", np.asarray(inputs.acts), grads)
    got = np.asarray(sizes).sum(-1) + grads @ b_dec + np.asarray(rest)
    np.testing.assert_allclose(got, whole, atol=2e-5)
    rows = np.asarray(inputs.params["W_dec"], np.float64)
    full = all_codes(inputs)[:, None, :] * (grads @ rows.T)
    if inputs.out.index is not None:
        index = np.asarray(inputs.out.index)[:, None, :].repeat(readouts, 1)
        full = np.take_along_axis(full, index, 2)
    np.testing.assert_allclose(sizes, full, atol=1e-5)


def by_a_loop(sizes, rest, latents):
    """The definition, word for word."""
    sizes = sorted(np.abs(np.asarray(sizes, np.float64)), reverse=True)
    total = sum(sizes) + abs(float(rest))
    if total == 0:
        return 0, 0.0
    for count in range(len(sizes) + 1):
        if sum(sizes[:count]) >= 0.95 * total:
            return count, abs(float(rest)) / total
    return latents, abs(float(rest)) / total


def test_attribution_l0_is_its_definition():
    rng = np.random.default_rng(2)
    sizes = rng.normal(size=(120, M)) ** 3 * (rng.uniform(size=(120, M)) < 0.4)
    rest = 0.3 * rng.normal(size=120) * (rng.uniform(size=120) < 0.5)
    sizes, rest = sizes.astype(np.float32), rest.astype(np.float32)
    count, share = jax.jit(ft.metrics.attribution_l0)(sizes, rest)
    want = [by_a_loop(s, r, M) for s, r in zip(sizes, rest, strict=True)]
    assert len({c for c, _ in want}) > 4
    assert M in {c for c, _ in want}
    np.testing.assert_array_equal(count, [c for c, _ in want])
    np.testing.assert_allclose(share, [s for _, s in want], rtol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "rest", "want"),
    [
        ([0.0, 0.0, 0.0], 0.0, (0, 0.0)),  # nothing there
        ([0.0, 0.0, 0.0], 1.0, (7, 1.0)),  # none suffices
        ([1.0, 1.0, 1.0], -3.0, (7, 0.5)),
        ([19.0, 0.0, 0.0], 1.0, (1, 0.05)),  # exactly 95 %
        ([-4.0, 0.0, 0.0], 0.0, (1, 0.0)),
        ([1.0, -1.0, 1.0], 0.0, (3, 0.0)),
        ([1e-30, 1e-30, 0.0], 0.0, (2, 0.0)),
        ([1e30, 1e28, 0.0], 0.0, (1, 0.0)),
    ],
)
def test_attribution_l0_at_its_edges(sizes, rest, want):
    count, share = ft.metrics.attribution_l0(jnp.asarray(sizes), jnp.asarray(rest), 7)
    assert count == want[0]
    np.testing.assert_allclose(share, want[1], rtol=1e-6)


def test_the_few_latents_that_are_there_give_the_count_of_all():
    few = inputs_of("topk", 2)
    out = few.out._replace(values=jnp.asarray(all_codes(few)), index=None)
    many = few._replace(out=out)
    rest = 0.01 * unexplained_effect(few)  # little, so that counts differ
    got = ft.metrics.attribution_l0(attributions(few), rest, M)
    want = ft.metrics.attribution_l0(attributions(many), rest)
    assert len(set(np.asarray(got[0]).ravel())) > 1
    for x, y in zip(got, want, strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-4)


def geman_mcclure(sizes):
    return sizes**2 / (sizes**2 + 0.01)


PENALTIES = {
    "geman": Penalty(geman_mcclure, lambda c, _: 0.02 * c / (c**2 + 0.01) ** 2),
    "absolute": Penalty(lambda c: c * jnp.sign(c), lambda c, _: jnp.sign(c)),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("readouts", [1, 3])
@pytest.mark.parametrize("name", ["standard", "topk"])
def test_penalties_and_their_slopes_are_those_of_all_attributions(
    name, readouts, penalty
):
    inputs = inputs_of(name, readouts)
    weights = jnp.asarray(np.random.default_rng(4).dirichlet(np.ones(N)), jnp.float32)
    inputs, scale = inputs._replace(weights=weights), jnp.asarray(0.7)
    penalty = PENALTIES[penalty]

    def ours(values, rows):
        out = inputs.out._replace(values=values)
        params = {**inputs.params, "W_dec": rows}
        return 3 * mean_penalty(inputs._replace(out=out, params=params), penalty, scale)

    def whole(values, rows):  # the definition, by a dense einsum
        codes = values
        if inputs.out.index is not None:
            codes = jnp.zeros((N, M)).at[jnp.arange(N)[:, None], inputs.out.index]
            codes = codes.set(values)
        sizes = codes[:, None, :] * jnp.einsum("nkd,md->nkm", inputs.grads, rows)
        sizes = penalty.value(sizes / scale)
        return 3 * jnp.einsum("n,nkm->", weights, sizes) / readouts

    args = inputs.out.values, inputs.params["W_dec"]
    got = jax.jit(jax.value_and_grad(ours, (0, 1)))(*args)
    want = jax.jit(jax.value_and_grad(whole, (0, 1)))(*args)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5), got, want)
    np.testing.assert_allclose(jax.jit(ours)(*args), want[0], rtol=1e-5)  # no slope


def test_no_array_of_readouts_by_latents_is_made():
    inputs = inputs_of("standard", 3)

    def loss(values, rows):
        out = inputs.out._replace(values=values)
        params = {**inputs.params, "W_dec": rows}
        changed = inputs._replace(out=out, params=params)
        return mean_penalty(changed, PENALTIES["geman"], jnp.ones(()))

    args = inputs.out.values, inputs.params["W_dec"]
    text = jax.jit(jax.grad(loss, (0, 1))).lower(*args).compile().as_text()
    assert f"f32[{N},{M}]" in text
    assert f"f32[{N},3,{M}]" not in text
    assert f"f32[3,{N},{M}]" not in text


def test_equal_attributions_are_never_more_than_there_are():
    num, size = np.meshgrid(np.arange(1, 41), [0.1, 0.3, 1 / 3, 0.7, 1e-3])
    num, size = num.ravel(), size.ravel()
    sizes = np.where(np.arange(40) < num[:, None], size[:, None], 0)
    rest = num * size / 19  # at the very border of 95 %
    count = np.asarray(ft.metrics.attribution_l0(single(sizes), single(rest))[0])
    assert np.all((count <= num) | (count == 40))  # none suffices, by rounding
    count = np.asarray(ft.metrics.attribution_l0(single(sizes), single(0 * rest))[0])
    assert np.all(count <= np.ceil(0.95 * num + 1e-4))
    assert np.all(count >= np.ceil(0.95 * num - 1e-4))


def test_without_gradients_the_reason_is_said():
    inputs = inputs_of("standard", 1)._replace(grads=None)
    with pytest.raises(ValueError, match="needs taps with gradients, got none"):
        attributions(inputs)
