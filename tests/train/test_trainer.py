import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import toyfeat as ft
from toyfeat import controllers, losses

D, M, K, N, R = 6, 24, 3, 90, 2
ALL = {
    "standard": lambda: ft.dictionaries.standard(D, M),
    "topk": lambda: ft.dictionaries.topk(D, M, K),
    "gradient": lambda: ft.dictionaries.gradient_topk(D, M, K),
    "batch": lambda: ft.dictionaries.batch_topk(D, M, K),
    "matryoshka": lambda: ft.dictionaries.matryoshka(D, M, K, widths=(6, M)),
    "jump": lambda: ft.dictionaries.jump_relu(D, M, threshold=0.05, bandwidth=0.3),
    "gated": lambda: ft.dictionaries.gated(D, M),
}
OFF = {"normalize": False, "center": False, "clip": np.inf, "warm_up": 0}


def single(x):
    return jnp.asarray(x, jnp.float32)


def draw(seed=0, num=N, scale=3.0, grad_scale=0.02):
    """Sparse sums of planted directions, off centre, and gradients."""
    rng = np.random.default_rng(seed)
    rows = np.random.default_rng(99).normal(size=(2 * D, D))
    codes = rng.uniform(0.5, 1.5, (num, 2 * D)) * (
        rng.uniform(size=(num, 2 * D)) < 0.15
    )
    acts = codes @ rows + 0.05 * rng.normal(size=(num, D)) + 1.0
    grads = grad_scale * np.array([1.0, 5.0])[:, None] * rng.normal(size=(num, R, D))
    weights = np.ones(num)
    return ft.Taps(single(scale * acts), single(grads), single(weights))


@functools.cache  # the same trainer is compiled once
def make(name, **options):
    sae = ALL[name]()
    objective = losses.attribution(sae, dead_latents=0.1)
    return sae, ft.trainer(sae, objective, readouts=R, **options)


def trained(trainer, batches, **hyper):
    state, update = trainer.init(jax.random.key(0), **hyper), jax.jit(trainer.update)
    told = []
    for taps in batches:
        state, metrics = update(state, taps)
        told.append(metrics)
    return state, {n: np.array([m[n] for m in told]) for n in told[0]}


def centred_size(x):
    x = np.asarray(x, np.float64)
    return np.sqrt(np.mean((x - x.mean(0)) ** 2))


def same(x, y, rtol=1e-4, atol=1e-5):
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol)  # noqa: E731
    jax.tree.map(close, x, y)


@pytest.mark.slow
def test_the_first_batch_sets_the_scale_and_the_origin():
    taps = draw(1)
    _, trainer = make("standard")
    state, _ = trained(trainer, [taps], learning_rate=0.0)
    size = centred_size(taps.acts)
    np.testing.assert_allclose(state.running["acts_scale"], size, rtol=1e-5)
    mean = np.asarray(taps.acts).mean(0) / size
    np.testing.assert_allclose(state.params["b_dec"], mean, rtol=1e-4)
    after, _ = trained(trainer, [taps, draw(2, scale=50.0)], learning_rate=0.0)
    same(after.params["b_dec"], state.params["b_dec"])
    assert after.running["acts_scale"] == state.running["acts_scale"]


def test_gradients_are_in_units_of_each_readout_s_running_size():
    sae, trainer = make("standard")
    batches = [draw(i, grad_scale=0.02 * (i + 1)) for i in range(3)]
    state, told = trained(trainer, batches, learning_rate=0.0, warm_up=0)
    squares = [np.mean(np.asarray(b.grads) ** 2, axis=(0, 2)) for b in batches]
    weights = 0.99 ** np.arange(2, -1, -1)
    size = np.sqrt(weights @ squares / weights.sum())
    acts = single(batches[2].acts / state.running["acts_scale"])
    recon = sae.forward(state.params, acts).recon
    missed = np.einsum("nd,nkd->nk", acts - recon, batches[2].grads) / size
    want = np.mean(missed**2)
    np.testing.assert_allclose(told["unexplained"][2], want, rtol=1e-3)


@pytest.mark.slow
def test_a_transcoder_is_denormalized_in_two_units():
    sae = ft.dictionaries.topk(D, M, K, target_dim=4)
    trainer = ft.trainer(sae, losses.default(sae))
    taps = draw(0, scale=10.0)
    taps = taps._replace(grads=None, targets=1e-3 * taps.acts[:, :4] ** 2)
    state, told = trained(trainer, 300 * [taps], learning_rate=0.01)
    params = ft.denormalized(sae, state)
    out = sae.decode(params, sae.encode(params, taps.acts))
    targets = np.asarray(taps.targets)
    whole = np.sum((targets - targets.mean(0)) ** 2)
    fvu = np.sum((targets - out) ** 2) / whole
    np.testing.assert_allclose(fvu, told["fvu"][-1], rtol=0.1)
    assert fvu < 0.2


def test_targets_beside_a_shared_origin_are_in_the_units_of_acts():
    sae = ft.dictionaries.standard(D, M)
    trainer = ft.trainer(sae, losses.default(sae, sparsity=0.01))
    taps = draw(0)._replace(grads=None)
    taps = taps._replace(targets=5 * taps.acts)
    state, _ = trained(trainer, [taps, taps])
    params, scale = ft.denormalized(sae, state), state.running["acts_scale"]
    inner = sae.decode(state.params, sae.encode(state.params, taps.acts / scale))
    outer = sae.decode(params, sae.encode(params, taps.acts))
    same(outer / state.running["target_scale"], inner)


@pytest.mark.slow_cases
@pytest.mark.parametrize("scale", [1e-3, 1e3, 1e-25, 1e25])
def test_the_units_of_acts_and_of_gradients_do_not_matter(scale):
    _, trainer = make("standard", warm_up=4)
    batches = [draw(i) for i in range(8)]
    _, want = trained(trainer, batches, learning_rate=0.01)
    other = scale if 1e-10 < scale < 1e10 else 1.0
    batches = [b._replace(acts=scale * b.acts, grads=b.grads / other) for b in batches]
    _, got = trained(trainer, batches, learning_rate=0.01)
    same(got, want, rtol=2e-3, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["standard", "topk", "batch", "jump"])
def test_examples_of_weight_0_are_not_there(name):
    _, trainer = make(name, warm_up=2, dead_after=2)
    batches, padded = [draw(i, 70) for i in range(4)], []
    for taps in batches:
        junk = draw(50, 70, scale=40.0, grad_scale=3.0)
        acts, grads, weights = (
            jnp.concatenate([y, x]) for x, y in zip(taps[:3], junk[:3], strict=True)
        )
        padded.append(ft.Taps(acts, grads, weights.at[:70].set(0)))
    want, one = trained(trainer, batches, learning_rate=0.01)
    got, two = trained(trainer, padded, learning_rate=0.01)
    same(two, one)
    same(got.params, want.params)
    same(got.running, want.running)


@pytest.mark.slow
def test_weights_are_counts():
    _, trainer = make("standard", warm_up=0)
    taps = draw(3, 40)
    weights = single(np.arange(40) % 3)
    index = np.repeat(np.arange(40), np.arange(40) % 3)
    twice = ft.Taps(*(x[index] for x in taps[:3]))
    want, one = trained(trainer, [twice], learning_rate=0.01)
    got, two = trained(trainer, [taps._replace(weights=weights)], learning_rate=0.01)
    for name in ("loss", "reconstruction", "l0", "fvu", "grad_norm"):
        same(two[name], one[name])
    same(got.params, want.params, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ALL)
def test_training_reconstructs_planted_data(name):
    sae = ALL[name]()
    objective = losses.attribution(
        sae, sparsity=0.01, attribution_sparsity=0.01, unexplained=0.01
    )
    trainer = ft.trainer(sae, objective, readouts=R, warm_up=100)
    state = trainer.init(jax.random.key(0), learning_rate=0.01)
    taps = draw(0, 256)
    step = lambda s, _: trainer.update(s, taps)  # noqa: E731
    _, told = jax.jit(lambda s: jax.lax.scan(step, s, None, 400))(state)
    assert told["fvu"][0] > 0.6
    assert told["fvu"][-1] < 0.2
    assert np.all(np.isfinite(told["loss"]))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["standard", "topk", "batch", "gated"])
def test_metrics_are_their_definitions(name):
    sae, trainer = make(name, **OFF)
    taps, start = draw(0, 50), trainer.init(jax.random.key(3))
    state, told = jax.jit(trainer.update)(start, taps)
    out = sae.forward(start.params, taps.acts, grads=taps.grads)
    acts, recon = np.asarray(taps.acts), np.asarray(out.recon)
    codes = np.asarray(out.codes)
    np.testing.assert_allclose(told["l0"], (codes != 0).sum(1).mean(), rtol=1e-5)
    fvu = np.sum((acts - recon) ** 2) / np.sum((acts - acts.mean(0)) ** 2)
    np.testing.assert_allclose(told["fvu"], fvu, rtol=1e-4)
    units = np.linalg.norm(start.params["W_dec"], axis=1)
    values = codes / units if sae.config.rescale_acts_by_decoder_norm else codes
    slopes = np.einsum("nkd,md->nkm", taps.grads, start.params["W_dec"])
    rest = np.einsum("nd,nkd->nk", acts - recon, taps.grads)
    count, share = ft.metrics.attribution_l0(
        single(values[:, None] * slopes), single(rest)
    )
    np.testing.assert_allclose(told["attribution_l0"], count.mean(), rtol=1e-4)
    np.testing.assert_allclose(told["unexplained_share"], share.mean(), rtol=1e-4)
    terms = {"reconstruction": 1.0, "sparsity": 0.1, "gate": 1.0, "dead_latents": 0.1}
    terms |= {"attribution_sparsity": 0.1, "unexplained": 0.1}
    total = sum(c * told[n] for n, c in terms.items() if n in told)
    np.testing.assert_allclose(told["loss"], total, rtol=1e-5)
    silent = np.where((codes != 0).any(0), 0, 1)
    np.testing.assert_array_equal(state.running["silent"], silent)


@pytest.mark.slow
def test_latents_are_dead_after_so_many_silent_steps():
    _, trainer = make("standard", dead_after=3)
    start = trainer.init(jax.random.key(0), learning_rate=0.0)
    bias = jnp.zeros(M).at[:5].set(-1e3)
    state = start._replace(params=start.params | {"b_enc": bias})
    update, told = jax.jit(trainer.update), []
    for i in range(5):
        if i == 4:  # one of them fires again
            state = state._replace(params=state.params | {"b_enc": bias.at[0].set(1e3)})
        state, metrics = update(state, draw(i))
        told.append((int(metrics["dead"]), float(metrics["dead_latents"])))
    assert [n for n, _ in told] == [0, 0, 5, 5, 4]
    assert [x > 0 for _, x in told] == [False, False, False, True, True]
    np.testing.assert_array_equal(state.running["silent"][:5], [0, 5, 5, 5, 5])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["batch", "matryoshka"])
def test_the_threshold_follows_the_smallest_code_that_is_kept(name):
    sae, trainer = make(name, threshold_rate=0.25, **OFF)
    state, update, want = trainer.init(jax.random.key(0)), jax.jit(trainer.update), 0.0
    assert sae.architecture.averaged_threshold == "topk_threshold"
    for i in range(3):
        taps = draw(i)
        codes = np.asarray(sae.encode(state.params, taps.acts, train=True))
        want = 0.75 * want + 0.25 * codes[codes > 0].min()
        state, _ = update(state, taps)
        np.testing.assert_allclose(state.params["topk_threshold"], want, rtol=1e-4)
    taps = ft.Taps(0 * taps.acts, 0 * taps.grads, taps.weights)
    dull = state.params | {"b_enc": jnp.full(M, -1.0), "b_dec": jnp.zeros(D)}
    state, _ = update(state._replace(params=dull), taps)  # nothing fires
    np.testing.assert_allclose(state.params["topk_threshold"], want, rtol=1e-4)


@pytest.mark.slow
def test_thresholds_stay_at_or_above_zero():
    sae = ALL["jump"]()
    objective = losses.default(sae, sparsity=0.0)
    trainer = ft.trainer(sae, objective)
    batches = [draw(i)._replace(grads=None) for i in range(10)]
    state, _ = trained(trainer, batches, learning_rate=0.1)
    assert np.all(state.params["threshold"] >= 0)
    assert np.any(state.params["threshold"] == 0)


def test_coefficients_grow_in_the_warm_up():
    _, trainer = make("standard", warm_up=4)
    _, told = trained(trainer, [draw(i) for i in range(7)], learning_rate=0.0)
    warm = np.minimum(np.arange(7) / 4, 1)
    rest = told["reconstruction"] + 0.1 * (told["unexplained"] + told["dead_latents"])
    grown = 0.1 * warm * (told["sparsity"] + told["attribution_sparsity"])
    np.testing.assert_allclose(told["loss"], rest + grown, rtol=1e-5)


def test_every_tensor_is_clipped_alone():
    sae = ALL["standard"]()
    objective = losses.default(sae, sparsity=0.3, dead_latents=0)
    taps = draw(0)._replace(grads=None)
    ends, slopes = {}, {}
    for clip in (np.inf, 0.01):
        options = OFF | {"clip": clip}
        trainer = ft.trainer(sae, objective, optax.sgd(1.0), **options)
        start = trainer.init(jax.random.key(0))
        state, metrics = jax.jit(trainer.update)(start, taps)
        ends[clip] = metrics["grad_norm"]
        slopes[clip] = {n: start.params[n] - x for n, x in state.params.items()}
    whole = np.sqrt(sum(np.sum(np.square(x)) for x in slopes[np.inf].values()))
    np.testing.assert_allclose(ends[np.inf], whole, rtol=1e-4)
    np.testing.assert_allclose(ends[0.01], whole, rtol=1e-4)  # before clipping
    for name, slope in slopes[np.inf].items():
        size = np.linalg.norm(slope)
        assert size > 0.01
        want = 0.01 * np.asarray(slope) / size
        np.testing.assert_allclose(slopes[0.01][name], want, atol=1e-6)


def test_a_schedule_is_a_factor_of_every_update():
    sae = ALL["standard"]()
    objective = losses.default(sae)
    decay = optax.linear_schedule(1.0, 0.0, 4)
    paced = ft.trainer(sae, objective, optax.sgd(0.01), schedule=decay)
    plain = ft.trainer(sae, objective, optax.sgd(0.01))
    state, _ = trained(plain, [draw(0)._replace(grads=None)] * 2)
    one, _ = jax.jit(plain.update)(state, draw(1)._replace(grads=None))
    two, _ = jax.jit(paced.update)(state, draw(1)._replace(grads=None))
    for name, x in state.params.items():
        same(two.params[name] - x, 0.5 * (one.params[name] - x), atol=1e-6)


@pytest.mark.slow
def test_all_switched_off_is_the_published_loss_in_a_loop_of_optax():
    sae = ALL["standard"]()
    objective = losses.attribution(
        sparsity=0.3,
        attribution_sparsity=2.0,
        unexplained=0.7,
        penalty="l1",
        form="signed",
    )
    trainer = ft.trainer(sae, objective, optax.adam(0.01), readouts=R, **OFF)
    batches = [draw(i) for i in range(6)]
    state, told = trained(trainer, batches)

    def loss(p, x, g):
        codes = jax.nn.relu((x - p["b_dec"][None]) @ p["W_enc"] + p["b_enc"][None])
        error = x - codes @ p["W_dec"] - p["b_dec"][None]
        effects = codes[:, None, :] * jnp.einsum("nkd,md->nkm", g, p["W_dec"])
        length = jnp.sqrt(jnp.sum(p["W_dec"] ** 2, axis=1))
        missed = jnp.abs(jnp.einsum("nd,nkd->nk", error, g))
        return (
            jnp.mean(jnp.sum(error**2, 1))
            + 0.3 * jnp.mean(codes @ length)
            + 2.0 * jnp.mean(jnp.sum(jnp.abs(effects), 2))
            + 0.7 * jnp.mean(missed)
        )

    adam, params = optax.adam(0.01), sae.init(jax.random.key(0))
    memory = adam.init(params)
    step = jax.jit(jax.value_and_grad(loss))
    for i, taps in enumerate(batches):
        value, slopes = step(params, taps.acts, taps.grads)
        with jax.numpy_dtype_promotion("standard"):
            changes, memory = adam.update(slopes, memory)
        params = optax.apply_updates(params, changes)
        np.testing.assert_allclose(told["loss"][i], value, rtol=1e-6)
    same(state.params, params, rtol=0, atol=1e-6)


@pytest.mark.slow
def test_a_controller_takes_over_after_the_warm_up_and_reaches_its_target():
    sae = ALL["standard"]()
    objective = losses.default(sae, sparsity=0.1)
    control = controllers.target_l0(2.0, integral=0.05, memory=5.0)
    trainer = ft.trainer(sae, objective, None, control, warm_up=50)
    state = trainer.init(jax.random.key(0), learning_rate=0.01)
    taps = draw(0, 256)._replace(grads=None)
    step = lambda s, _: trainer.update(s, taps)  # noqa: E731
    _, told = jax.jit(lambda s: jax.lax.scan(step, s, None, 1500))(state)
    np.testing.assert_array_equal(told["factor"][:50], 1)
    assert told["factor"][50] != 1
    np.testing.assert_allclose(np.mean(told["l0"][-100:]), 2.0, rtol=0.05)
    assert not np.any(told["saturated"])
    rest = told["reconstruction"] + told["dead_latents"]
    sparse = (told["loss"] - rest)[60:] / told["sparsity"][60:]
    np.testing.assert_allclose(sparse, 0.1 * told["factor"][59:-1], rtol=1e-2)


def test_a_controller_that_cannot_says_so():
    sae = ALL["topk"]()  # never more than k codes
    objective = losses.attribution(sae)
    control = controllers.target_attribution_l0(20.0, integral=0.5, limit=10.0)
    trainer = ft.trainer(sae, objective, None, control, readouts=R, warm_up=2)
    _, told = trained(trainer, 12 * [draw(0)])
    assert told["saturated"][0] == 0
    assert told["saturated"].dtype == np.float32


def test_a_loss_that_is_not_finite_is_told():
    _, trainer = make("standard")
    taps = draw(0)
    _, told = trained(
        trainer, [taps, taps._replace(acts=taps.acts.at[0, 0].set(np.nan))]
    )
    assert np.isfinite(told["loss"][0])
    assert not np.isfinite(told["loss"][1])


def test_errors_of_the_making():
    sae = ALL["standard"]()
    twice = (losses.sparsity(), losses.quadratic_l0(3.0))
    with pytest.raises(ValueError, match=r"different names, got \['sparsity', 'spars"):
        ft.trainer(sae, twice)
    other = controllers.target_l0(3.0, term="absent")
    with pytest.raises(ValueError, match="controller steers 'absent', the objective"):
        ft.trainer(sae, losses.default(sae), None, other)


def test_errors_of_hyper_parameters():
    sae, trainer = make("topk")
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"unknown hyper-parameters \['lambda'\]; kno"):
        trainer.init(key, **{"lambda": 1.0})
    for k in (K + 1, 0, -2, 1.5):
        with pytest.raises(ValueError, match=f"whole number in 1 .. {K}, .* got {k}"):
            trainer.init(key, k=k)
    fixed = ft.trainer(sae, losses.default(sae), optax.adam(1e-3))
    with pytest.raises(
        ValueError, match=r"wrap the optimizer in optax.inject_hyperpar"
    ):
        fixed.init(key, learning_rate=1.0)
    control = controllers.target_l0(3.0, term="reconstruction")
    steered = ft.trainer(sae, losses.default(sae), None, control)
    with pytest.raises(ValueError, match="target must be positive, got -1"):
        steered.init(key, target=-1.0)


@pytest.mark.parametrize(
    ("hyper", "kind", "match"),
    [
        ({"clip": 0.0}, ValueError, r"the clip must be positive, got 0\.0"),
        ({"clip": [1.0, np.nan]}, ValueError, "the clip must be positive"),
        ({"warm_up": -1}, ValueError, "warm_up must not be negative, got -1"),
        ({"learning_rate": -1e-3}, ValueError, "learning_rate must not be negative"),
        ({"sparsity": np.nan}, ValueError, "sparsity must be finite, got nan"),
        ({"learning_rate": np.inf}, ValueError, "learning_rate must be finite"),
        ({"sparsity": "0.1"}, TypeError, "sparsity must be a number, got '0.1'"),
        ({"sparsity": None}, TypeError, "sparsity must be a number, got None"),
    ],
)
def test_hyper_parameters_with_which_nothing_can_be_trained(hyper, kind, match):
    _, trainer = make("standard")
    with pytest.raises(kind, match=match):
        trainer.init(jax.random.key(0), **hyper)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"readouts": 0}, "readouts must be an int of at least 1, got 0"),
        ({"dead_after": -5}, "dead_after must be an int of at least 1, got -5"),
        ({"threshold_rate": 0.0}, r"threshold_rate must be .* in \(0, 1\], got 0"),
        ({"clip": -1.0}, "the clip must be positive, got -1"),
        ({"warm_up": -1}, "warm_up must not be negative"),
    ],
)
def test_settings_with_which_nothing_can_be_trained(settings, match):
    sae = ALL["standard"]()
    with pytest.raises(ValueError, match=match):
        ft.trainer(sae, losses.default(sae), **settings)
    with pytest.raises(ValueError, match="sparsity must be a finite number"):
        ft.trainer(sae, losses.default(sae, sparsity=np.nan))


@pytest.mark.parametrize(
    ("argument", "wrong"),
    [
        *(("objective", x) for x in ((), 5, None, (3,), losses.sparsity())),
        *(("revive", x) for x in ("a", 1.5, 0, True, np.nan)),
        *(("dead_after", x) for x in ("a", 1.5, None, True)),
        *(("readouts", x) for x in ("a", 1.5, None, True)),
        *(("threshold_rate", x) for x in ("a", None, np.nan, -1.0, True)),
        *(("normalize", x) for x in ("no", None, 2)),
        *(("center", x) for x in ("no", None, 2)),
        *(("schedule", x) for x in (3, "a")),
        *(("controller", x) for x in (3, "a")),
        *(("clip", x) for x in ("a", None, np.nan, True)),
        *(("dictionary", x) for x in (None, 3)),
    ],
)
def test_an_argument_of_another_kind_is_named(argument, wrong):
    sae = ALL["standard"]()
    arguments = {"dictionary": sae, "objective": losses.default(sae)}
    with pytest.raises((ValueError, TypeError), match=r"^trainer: .* got ") as error:
        ft.trainer(**(arguments | {argument: wrong}))
    assert argument in str(error.value)


def test_one_member_has_one_value_of_every_hyper_parameter():
    _, trainer = make("topk")
    with pytest.raises(ValueError, match=r"^trainer: k must be one number, .*populat"):
        trainer.init(jax.random.key(0), k=jnp.ones(3))
    with pytest.raises(TypeError, match=r"^trainer: k must be a number, got 'a'"):
        trainer.init(jax.random.key(0), k="a")


def test_a_controller_without_its_metric_is_told():
    sae = ALL["standard"]()
    control = controllers.target_attribution_l0(3.0, term="sparsity")
    trainer = ft.trainer(sae, losses.default(sae), controller=control)
    taps = ft.Taps(jnp.ones((N, D)), None, jnp.ones(N))
    with pytest.raises(ValueError, match=r"^update: .* 'attribution_l0', got .*; attr"):
        jax.eval_shape(trainer.update, trainer.init(jax.random.key(0)), taps)


def test_errors_of_taps():
    _, trainer = make("standard")
    state, taps = trainer.init(jax.random.key(0)), draw(0)
    update = lambda **change: trainer.update(state, taps._replace(**change))  # noqa: E731
    with pytest.raises(ValueError, match=rf"acts \[N, {D}\], got \({N}, 5\)"):
        update(acts=taps.acts[:, :5])
    with pytest.raises(ValueError, match=r"'unexplained'. need taps with gradients"):
        update(grads=None)
    with pytest.raises(ValueError, match=rf"\({N}, 1, {D}\); .* readouts=2"):
        update(grads=taps.grads[:, :1])
    with pytest.raises(ValueError, match=rf"targets \[{N}, {D}\], got \({N}, 4\)"):
        update(targets=taps.acts[:, :4])
    with pytest.raises(ValueError, match=rf"weights \[{N}\], got \(3,\)"):
        update(weights=jnp.ones(3))
    coder = ft.dictionaries.topk(D, M, K, target_dim=4)
    trainer = ft.trainer(coder, losses.default(coder))
    with pytest.raises(ValueError, match=r"transcoder needs .* \[N, 4\], got none"):
        trainer.update(trainer.init(jax.random.key(0)), taps._replace(grads=None))
