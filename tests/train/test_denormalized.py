import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.train import normalization

D, E, M, K, N = 6, 4, 24, 3, 90
R = 3  # readouts
SIZES = np.array([1e-3, 1.0, 40.0])  # of their gradients
PLAIN = {"rescale_acts_by_decoder_norm": False}
ALL = {
    "standard": ft.dictionaries.standard(D, M),
    "topk": ft.dictionaries.topk(D, M, K),
    "topk plain": ft.dictionaries.topk(D, M, K, **PLAIN),
    "signed": ft.dictionaries.topk(D, M, K, signed=True),
    "gradient": ft.dictionaries.gradient_topk(D, M, K, weight=3.0),
    "gradient plain": ft.dictionaries.gradient_topk(D, M, K, weight=30.0, **PLAIN),
    "batch": ft.dictionaries.batch_topk(D, M, K),
    "batch plain": ft.dictionaries.batch_topk(D, M, K, **PLAIN),
    "matryoshka": ft.dictionaries.matryoshka(D, M, K, widths=(8, M)),
    "matryoshka plain": ft.dictionaries.matryoshka(D, M, K, widths=(8, M), **PLAIN),
    "jump": ft.dictionaries.jump_relu(D, M, threshold=0.05, bandwidth=0.3),
    "gated": ft.dictionaries.gated(D, M),
    "paired": ft.dictionaries.paired(D, M, K),
    "transcoder": ft.dictionaries.standard(D, M, target_dim=E),
    "topk transcoder": ft.dictionaries.topk(D, M, K, target_dim=E),
    "plain transcoder": ft.dictionaries.topk(D, M, K, target_dim=E, **PLAIN),
    "batch transcoder": ft.dictionaries.batch_topk(D, M, K, target_dim=E),
    "jump transcoder": ft.dictionaries.jump_relu(D, M, target_dim=E),
    "gradient transcoder": ft.dictionaries.gradient_topk(
        D, M, K, weight=3.0, target_dim=E
    ),
}


def single(x):
    return jnp.asarray(x, jnp.float32)


def draw(sae, seed, scale=1.0):
    """Taps that are far from unit size and off centre, each readout in its units."""
    rng = np.random.default_rng(seed)
    rows = np.random.default_rng(99).normal(size=(2 * D, D))
    codes = rng.uniform(0.5, 1.5, (N, 2 * D)) * (rng.uniform(size=(N, 2 * D)) < 0.2)
    acts = 20 * (codes @ rows + 1)
    wide = D if sae.config.d_out is None else E
    grads = SIZES[:, None] * rng.normal(size=(N, R, wide))
    targets = None if sae.config.d_out is None else single(5e-3 * acts[:, :E] ** 2)
    return ft.Taps(single(scale * acts), single(grads), jnp.ones(N), targets)


@functools.cache
def trained(name, steps=8, **options):
    sae = ALL[name]
    objective = ft.losses.default(sae, sparsity=0.1)
    options = {"readouts": R, "warm_up": 0} | options
    trainer = ft.trainer(sae, objective, **options)
    state = trainer.init(jax.random.key(0), learning_rate=0.01)
    update = jax.jit(trainer.update)
    batches = [draw(sae, seed) for seed in range(steps)]
    for taps in batches:
        state, _ = update(state, taps)
    return state, batches


def made_up(sae, scale=1.0):
    """A state as training leaves it, with random parameters and given scales."""
    trainer = ft.trainer(sae, ft.losses.default(sae), readouts=R)
    state, rng = trainer.init(jax.random.key(0)), np.random.default_rng(1)
    shaken = {
        n: x + single(0.3 * rng.normal(size=x.shape)) for n, x in state.params.items()
    }
    for name in ("threshold", "topk_threshold"):
        if name in shaken:
            shaken[name] = jnp.abs(shaken[name]) + 0.2
    square = single((1 - 0.99**20) * SIZES**2)
    acts = 37.0 * scale
    target = acts if sae.config.d_out is None else 5.0
    running = {"acts_scale": single(acts), "target_scale": single(target)}
    one = jnp.ones_like(square)
    running = state.running | running | {"grads_square": square, "grads_unit": one}
    step = jnp.array(20, jnp.int32)
    return state._replace(step=step, params=shaken, running=running)


def size(x):
    x = np.asarray(x, np.float64)
    return np.sqrt(np.mean((x - x.mean(0)) ** 2))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["standard", "transcoder"])
def test_units_are_the_sizes_of_the_data(name):
    state, batches = trained(name)
    units = normalization(state)
    np.testing.assert_allclose(units.acts, size(batches[0].acts), rtol=1e-5)
    target = batches[0].acts if name == "standard" else batches[0].targets
    np.testing.assert_allclose(units.target, size(target), rtol=1e-5)
    squares = [np.mean(np.asarray(b.grads, float) ** 2, (0, 2)) for b in batches]
    weights = 0.99 ** np.arange(len(batches))[::-1]
    mean = np.average(squares, axis=0, weights=weights)
    np.testing.assert_allclose(units.grads, np.sqrt(mean), rtol=1e-5)
    np.testing.assert_allclose(units.grads, SIZES, rtol=0.1)


def test_units_are_1_where_nothing_was_normalized():
    sae = ALL["standard"]
    trainer = ft.trainer(sae, ft.losses.default(sae), readouts=R)
    plain, _ = trained("standard", normalize=False)
    for state in (trainer.init(jax.random.key(0)), plain):
        units = normalization(state)
        assert (float(units.acts), float(units.target)) == (1, 1)
        np.testing.assert_array_equal(units.grads, np.ones(R))


def test_members_of_a_population_have_units_and_are_denormalized_as_alone():
    sae = ALL["paired"]
    one = made_up(sae)
    more = {n: x if x.dtype == bool else 3 * x for n, x in one.running.items()}
    two = one._replace(running=more, step=1)
    both = jax.tree.map(lambda *x: jnp.stack(list(map(jnp.asarray, x))), one, two)
    alone = [normalization(jax.tree.map(jnp.asarray, state)) for state in (one, two)]
    assert normalization(both).grads.shape == (2, R)
    for many, *single in zip(normalization(both), *alone, strict=True):
        np.testing.assert_allclose(many, np.stack(single), rtol=1e-6)
    each = jax.vmap(lambda member: ft.denormalized(sae, member))(both)
    for name, x in ft.denormalized(sae, one).items():
        np.testing.assert_allclose(each[name][0], x, rtol=1e-6)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ALL)
def test_denormalized_parameters_do_for_taps_what_the_others_do_for_scaled_taps(name):
    sae = ALL[name]
    state = made_up(sae)
    params, units, taps = (
        ft.denormalized(sae, state),
        normalization(state),
        draw(sae, 50),
    )
    np.testing.assert_allclose(units.grads, SIZES, rtol=1e-5)
    acts, grads = taps.acts / units.acts, taps.grads / units.grads[None, :, None]
    unit = units.target if sae.config.rescale_acts_by_decoder_norm else 1.0
    for mine, yours in ((None, None), (grads, taps.grads)):
        for train in (False, True):
            inner = sae.encode(state.params, acts, grads=mine, train=train)
            outer = sae.encode(params, taps.acts, grads=yours, train=train)
            assert 0 < np.mean(inner != 0) < 1
            np.testing.assert_array_equal(outer != 0, inner != 0)
            np.testing.assert_allclose(outer / unit, inner, rtol=1e-4, atol=1e-4)
            want = sae.decode(state.params, inner)
            got = sae.decode(params, outer) / units.target
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
        out = sae.forward(params, taps.acts, grads=yours)
        want = sae.forward(state.params, acts, grads=mine)
        np.testing.assert_allclose(out.recon / units.target, want.recon, atol=1e-4)
        np.testing.assert_allclose(out.codes / unit, want.codes, atol=1e-4)
        if want.grad_recon is not None:
            got = out.grad_recon / units.grads[None, :, None]
            np.testing.assert_allclose(got, want.grad_recon, atol=1e-4)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["topk", "batch", "gradient", "paired"])
@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_denormalized_parameters_choose_the_same_at_every_scale(name, scale):
    sae = ALL[name]
    one, other = (ft.denormalized(sae, made_up(sae, s)) for s in (1.0, scale))
    near, far = draw(sae, 50), draw(sae, 50, scale)
    unit = scale if sae.config.rescale_acts_by_decoder_norm else 1.0
    for grads in (None, near.grads):
        want = sae.encode(one, near.acts, grads=grads)
        got = sae.encode(other, far.acts, grads=grads)
        np.testing.assert_array_equal(got != 0, want != 0)
        np.testing.assert_allclose(np.asarray(got) / unit, want, rtol=1e-3, atol=1e-3)
        out = np.asarray(sae.decode(other, got)) / scale
        np.testing.assert_allclose(out, sae.decode(one, want), rtol=1e-3, atol=1e-2)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["gradient", "gradient plain", "paired"])
def test_the_choice_is_the_definition_s_in_float64(name):
    sae = ALL[name]
    state, _ = trained(name)
    params, taps = ft.denormalized(sae, state), draw(sae, 50)
    p = {k: np.asarray(v, np.float64) for k, v in state.params.items()}
    units = jax.tree.map(lambda x: np.asarray(x, np.float64), normalization(state))
    acts = np.asarray(taps.acts, np.float64) / units.acts
    grads = np.asarray(taps.grads, np.float64) / units.grads[:, None]
    codes = np.maximum((acts - p["b_dec"]) @ p["W_enc"] + p["b_enc"], 0)
    length = np.linalg.norm(p["W_dec"], axis=1)
    if name == "paired":
        sizes = np.mean((grads @ p["P"]) ** 2, axis=1)
        readers = np.sum(p["W_read"] ** 2, axis=1)
        score = codes**2 * length**2 * sizes * readers
    else:
        unit = length if name == "gradient" else np.ones(M)
        effect = np.sqrt(np.mean((grads @ (p["W_dec"] / unit[:, None]).T) ** 2, axis=1))
        score = codes * unit * (1 + sae.config.gradient_weight * effect)
    cut = np.sort(score, axis=1)[:, -K][:, None]
    chosen = (score >= cut) & (codes > 0)
    got = sae.encode(params, taps.acts, grads=taps.grads)
    np.testing.assert_array_equal(got != 0, chosen)
    for wrong in (jnp.ones(R), params["grad_scale"][::-1]):
        other = sae.encode(params | {"grad_scale": wrong}, taps.acts, grads=taps.grads)
        assert np.any((other != 0) != chosen)  # the scale does matter


def test_one_scale_serves_any_number_of_readouts_and_others_are_named():
    sae = ALL["paired"]
    state, _ = trained("paired")
    params, taps = ft.denormalized(sae, state), draw(sae, 50)
    two = taps.grads[:, 1:]
    match = r"grad_scale \(3,\), .* gradients are \(90, 2, 6\); set grad_scale to"
    for name in ("paired", "gradient"):
        with pytest.raises(ValueError, match=match):
            ALL[name].encode(params, taps.acts, grads=two)
    one = params | {"grad_scale": jnp.array([7.0])}  # the same for all: no matter
    none = {name: x for name, x in params.items() if name != "grad_scale"}
    np.testing.assert_array_equal(
        sae.encode(one, taps.acts, grads=two), sae.encode(none, taps.acts, grads=two)
    )


def test_gradients_of_one_readout_are_scaled_too():
    sae = ALL["gradient"]
    taps = draw(sae, 0)
    taps = taps._replace(grads=1e-6 * taps.grads[:, 1:2])
    trainer = ft.trainer(sae, ft.losses.default(sae))
    state, _ = jax.jit(trainer.update)(trainer.init(jax.random.key(0)), taps)
    params, units = ft.denormalized(sae, state), normalization(state)
    grads = taps.grads / units.grads[None, :, None]
    inner = sae.encode(state.params, taps.acts / units.acts, grads=grads)
    outer = sae.encode(params, taps.acts, grads=taps.grads)
    np.testing.assert_array_equal(outer != 0, inner != 0)
    plain = sae.encode(params, taps.acts)
    assert np.any((plain != 0) != (outer != 0))
