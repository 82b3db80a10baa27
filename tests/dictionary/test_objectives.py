from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import toyfeat as tf
from toyfeat import objectives
from toyfeat.types import Parts

# Written by benchmarks/peers/saelens_losses_golden.py.
GOLDEN = Path(__file__).parents[1] / "golden" / "saelens_losses"
D, M, K, N, R = 6, 16, 3, 11, 2
WIDTHS = (3, 8, M)
ALL = {
    "standard": lambda: tf.standard(D, M),
    "topk": lambda: tf.topk(D, M, K),
    "plain": lambda: tf.topk(D, M, K, rescale_acts_by_decoder_norm=False),
    "signed": lambda: tf.topk(D, M, K, signed=True),
    "batch": lambda: tf.batch_topk(D, M, K),
    "matryoshka": lambda: tf.matryoshka(D, M, K, widths=WIDTHS),
    "jump": lambda: tf.jump_relu(D, M, bandwidth=0.8),
    "gated": lambda: tf.gated(D, M),
}
LOSSES = {
    "reconstruction": objectives.reconstruction,
    "sparsity": objectives.sparsity,
    "dead_latents": objectives.dead_latents,
    "l1": objectives.attribution_sparsity,
    "geman_mcclure": lambda: objectives.attribution_sparsity("geman_mcclure"),
    "log": lambda: objectives.attribution_sparsity("log", gamma=0.3),
    "signed": lambda: objectives.unexplained("signed"),
    "positive": objectives.unexplained,
}


def problem(sae, seed=0, num_dead=5):
    """Random float64 parameters and data; some of the weights are 0."""
    rng = np.random.default_rng(seed)
    shapes = {n: x.shape for n, x in sae.init(jax.random.key(0)).items()}
    params = {n: 0.5 * rng.normal(size=s) for n, s in sorted(shapes.items())}
    if "threshold" in params:
        params["threshold"] = np.abs(params["threshold"]) + 0.05
    weights = rng.uniform(size=N) * (np.arange(N) != 4)
    return params, {
        "acts": rng.normal(size=(N, D)),
        "target": rng.normal(size=(N, D)),
        "grads": rng.normal(size=(N, R, D)),
        "weights": weights / weights.sum(),
        "dead": np.isin(np.arange(M), rng.permutation(M)[:num_dead]),
        "scale": np.asarray(0.7),
    }


def parts_of(sae, params, data):
    out = sae.forward(params, data["acts"], grads=data["grads"])
    return Parts(
        sae,
        params,
        data["acts"],
        data["target"],
        out,
        data["grads"],
        data["weights"],
        data["dead"],
        data["scale"],
        {},
    )


def kept(score, count):
    """Where the largest ``count`` of each row are."""
    order = np.argsort(-score, axis=1, kind="stable")[:, :count]
    out = np.zeros(score.shape, bool)
    np.put_along_axis(out, order, True, axis=1)
    return out


def textbook(name, p, acts):
    """Codes in units of rows, and pre-activations."""
    read = (acts - p["b_dec"]) @ p["W_enc"]
    length = np.linalg.norm(p["W_dec"], axis=1)
    if name == "gated":
        size = np.maximum(read * np.exp(p["r_mag"]) + p["b_mag"], 0)
        return size * (read + p["b_gate"] > 0), read + p["b_gate"]
    pre = read + p["b_enc"]
    codes = np.maximum(pre, 0)
    if name == "jump":
        return codes * (pre > p["threshold"]), pre
    if name == "signed":
        return pre * kept(np.abs(pre) * length, K), pre
    if name == "topk":
        return codes * kept(pre * length, K), pre
    if name == "plain":
        return codes * kept(pre, K), pre
    if name in ("batch", "matryoshka"):
        flat = kept((codes * length).reshape(1, -1), K * len(acts))
        return codes * flat.reshape(codes.shape), pre
    return codes, pre


def plain(name, loss, p, data, rest=None):
    """The losses as they are written, an example at a time, in float64."""
    codes, pre = textbook(name, p, data["acts"])
    length = np.linalg.norm(p["W_dec"], axis=1)
    recon = codes @ p["W_dec"] + p["b_dec"]
    if rest is None:
        rest = data["target"] - recon
    total = 0.0
    for n, weight in enumerate(data["weights"]):
        error = data["target"][n] - recon[n]
        effects = [codes[n] * (p["W_dec"] @ g) for g in data["grads"][n]]
        missed = [error @ g for g in data["grads"][n]]
        scale = data["scale"]
        if loss == "reconstruction":
            value = error @ error
            for width in WIDTHS[:-1] if name == "matryoshka" else ():
                inner = codes[n, :width] @ p["W_dec"][:width] + p["b_dec"]
                value += np.sum((data["target"][n] - inner) ** 2)
        elif loss == "sparsity" and name == "jump":
            value = np.sum(pre[n] > p["threshold"])
        elif loss == "sparsity" and name == "gated":
            value = np.maximum(pre[n], 0) @ length
        elif loss == "sparsity":
            value = np.abs(codes[n]) @ length
        elif loss == "gate":
            inner = np.maximum(pre[n], 0) @ p["W_dec"] + p["b_dec"]
            value = np.sum((data["target"][n] - inner) ** 2)
        elif loss == "dead_latents":
            dead = np.flatnonzero(data["dead"])
            score = pre[n, dead] * length[dead]
            score = np.abs(score) if name == "signed" else score
            best = dead[np.argsort(-score)[: D // 2]]
            value = np.sum((rest[n] - pre[n, best] @ p["W_dec"][best]) ** 2)
            value *= min(len(dead) / (D // 2), 1)
        elif loss == "l1":
            value = np.mean([np.abs(a).sum() for a in effects])
        elif loss == "geman_mcclure":
            square = [(a / scale) ** 2 for a in effects]
            value = np.mean([(s / (s + 0.01)).sum() for s in square])
        elif loss == "log":
            size = [np.log(1 + np.abs(a) / scale / 0.3) for a in effects]
            value = np.mean([s.sum() for s in size]) / np.log(1 + 1 / 0.3)
        elif loss == "signed":
            value = np.mean(np.abs(missed))
        elif loss == "positive":
            value = np.mean(np.square(missed))
        total += weight * value
    return total


def check(name, terms, seed=0, num_dead=5):
    """Values, and derivatives along a few ways by central differences."""
    sae = ALL[name]()
    p, data = problem(sae, seed, num_dead)
    codes, _ = textbook(name, p, data["acts"])
    rest = data["target"] - codes @ p["W_dec"] - p["b_dec"]

    def losses(q):
        parts = parts_of(sae, q, given)
        return [term.loss(parts) for term in terms.values()]

    rng, step, ways = np.random.default_rng(7), 1e-6, []
    for _ in range(3):
        ways.append({n: rng.normal(size=x.shape) for n, x in p.items()})
        if "threshold" in p:
            ways[-1]["threshold"] *= 0  # its derivative is an estimate
    with jax.enable_x64(True):
        given, params = jax.tree.map(jnp.asarray, (data, p))
        values, back = jax.jit(lambda q: jax.vjp(losses, q))(params)
        units = np.eye(len(values))
        slopes = jax.jit(jax.vmap(back))([jnp.asarray(u) for u in units.T])[0]
        slopes = {n: np.asarray(x) for n, x in slopes.items()}
    for i, loss in enumerate(terms):
        want = plain(name, loss, p, data)
        np.testing.assert_allclose(values[i], want, rtol=1e-9, err_msg=loss)
        for way in ways:
            ends = [{n: x + s * step * way[n] for n, x in p.items()} for s in (1, -1)]
            ends = [plain(name, loss, q, data, rest) for q in ends]
            got = sum(np.sum(slopes[n][i] * way[n]) for n in p)
            want = (ends[0] - ends[1]) / (2 * step)
            np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7, err_msg=loss)


@pytest.mark.parametrize("name", ALL)
def test_values_and_slopes_are_those_of_the_written_losses(name):
    more = {"gate": objectives.gate} if name == "gated" else {}
    check(name, {loss: make() for loss, make in (LOSSES | more).items()})


@pytest.mark.parametrize("num_dead", [1, 3, M])
def test_few_and_all_latents_dead(num_dead):
    for name in ("topk", "signed"):
        check(name, {"dead_latents": objectives.dead_latents()}, 1, num_dead)


def test_without_dead_latents_there_is_nothing_and_no_slope():
    sae = ALL["topk"]()
    p, data = single(*problem(sae, num_dead=0))
    run = lambda q: objectives.dead_latents().loss(parts_of(sae, q, data))  # noqa: E731
    value, slopes = jax.value_and_grad(run)(p)
    assert value == 0
    assert all(not np.any(x) for x in slopes.values())


def single(p, data):
    kind = lambda a: jnp.asarray(a, None if a.dtype == bool else jnp.float32)  # noqa: E731
    return jax.tree.map(kind, p), jax.tree.map(kind, data)


def test_fewer_latents_than_half_the_width_are_a_share_of_it():
    sae = tf.topk(10, 3, 1)
    rng = np.random.default_rng(0)
    p = {n: 0.5 * rng.normal(size=x.shape) for n, x in sae.init(key()).items()}
    acts = rng.normal(size=(1, 10))
    data = {"acts": acts, "target": acts, "grads": np.zeros((1, 1, 10))}
    data |= {"weights": np.ones(1), "dead": np.ones(3, bool), "scale": np.ones(())}
    q, given = single(p, data)
    got = objectives.dead_latents().loss(parts_of(sae, q, given))
    pre = (acts - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    recon = sae.forward(q, given["acts"]).recon
    rest = acts - np.asarray(recon, np.float64)
    want = 3 / 5 * np.sum((rest - pre @ p["W_dec"]) ** 2)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def key():
    return jax.random.key(0)


@pytest.mark.parametrize("target", [None, 4.0])
def test_jump_relu_s_estimates_of_the_threshold_s_slope(target):
    sae, eps = ALL["jump"](), 0.8
    p, data = problem(sae, 2)
    term = objectives.quadratic_l0(target) if target else objectives.sparsity()
    q, given = single(p, data)
    run = lambda q: term.loss(parts_of(sae, q, given))  # noqa: E731
    value, slopes = jax.value_and_grad(run)(q)
    _, pre = textbook("jump", p, data["acts"])
    l0 = (pre > p["threshold"]).sum(1)
    near = (np.abs(pre - p["threshold"]) < eps / 2) / eps
    loss, weight = l0, np.ones(N)
    if target:
        loss, weight = 2 / target * (l0 - target) ** 2, 4 / target * (l0 - target)
    np.testing.assert_allclose(value, data["weights"] @ loss, rtol=1e-5)
    want = -(data["weights"] * weight) @ near
    np.testing.assert_allclose(slopes.pop("threshold"), want, rtol=1e-5, atol=1e-7)
    assert all(not np.any(x) for x in slopes.values())


def test_jump_relu_s_threshold_hears_of_the_reconstruction():
    sae, eps = ALL["jump"](), 0.8
    p, data = problem(sae, 3)
    q, given = single(p, data)
    run = lambda q: objectives.reconstruction().loss(parts_of(sae, q, given))  # noqa: E731
    got = jax.grad(run)(q)["threshold"]
    codes, pre = textbook("jump", p, data["acts"])
    error = codes @ p["W_dec"] + p["b_dec"] - data["target"]
    by_codes = 2 * data["weights"][:, None] * (error @ p["W_dec"].T)
    near = np.abs(pre - p["threshold"]) < eps / 2
    want = (-(p["threshold"] / eps) * near * by_codes).sum(0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_gradients_are_constants():
    sae = ALL["standard"]()
    _, data = single(*problem(sae))
    init, update = tf.trainer(sae, tf.attribution_objective(), readouts=R)
    state = init(jax.random.key(0))

    @jax.jit
    @jax.grad
    def slope(grads):
        taps = tf.Taps(data["acts"], grads, data["weights"])
        return update(state, taps)[1]["loss"]

    assert not np.any(slope(data["grads"]))


def test_bounded_penalties_are_bounded_and_one_at_the_usual_size():
    sae = ALL["standard"]()
    p, data = single(*problem(sae))
    for scale in (0.5, 2.0):
        data["scale"] = jnp.asarray(scale)
        parts = parts_of(sae, p, data)
        one = jnp.zeros((N, M)).at[:, 3].set(1.0)
        out = parts.out._replace(values=one)
        read = jnp.sum(p["W_dec"][3] ** 2)  # the attribution is then the scale
        grads = jnp.broadcast_to(p["W_dec"][3] * scale / read, (N, R, D))
        parts = parts._replace(out=out, grads=grads)
        log = objectives.attribution_sparsity("log").loss(parts)
        bounded = objectives.attribution_sparsity("geman_mcclure")
        np.testing.assert_allclose(log, 1.0, rtol=1e-5)
        np.testing.assert_allclose(bounded.loss(parts), 1 / 1.01, rtol=1e-5)
        parts = parts._replace(grads=1e6 * grads)
        np.testing.assert_allclose(bounded.loss(parts), 1.0, rtol=1e-5)


CASES = {
    "standard": (lambda: tf.standard(D, M), {"sparsity": "l1_loss"}, 0.7),
    "topk": (lambda: tf.topk(D, M, K), {}, None),
    "topk_plain": (ALL["plain"], {}, None),
    "batchtopk": (ALL["batch"], {}, None),
    "matryoshka": (ALL["matryoshka"], {}, None),
    "gated": (
        ALL["gated"],
        {"sparsity": "l1_loss", "gate": "auxiliary_reconstruction_loss"},
        0.7,
    ),
    "jumprelu": (
        lambda: tf.jump_relu(D, M, bandwidth=1.0),
        {"sparsity": "l0_loss"},
        0.3,
    ),
    "jumprelu_quadratic": (
        lambda: tf.jump_relu(D, M, bandwidth=1.0),
        {"sparsity": "l0_loss"},
        0.3,
    ),
}
DEAD = {"topk": 0.5, "topk_plain": 1.0, "batchtopk": 1.0, "matryoshka": 1.0}


def golden(case):
    """Dictionary, objective, which of SAELens' losses its terms are, the file."""
    make, losses, size = CASES[case]
    sae, file = make(), np.load(GOLDEN / f"{case}.npz")
    objective = tf.dictionary_objective(
        sae, sparsity=size or 0, dead_latents=DEAD.get(case, 0)
    )
    if case == "jumprelu_quadratic":
        term = objectives.quadratic_l0(4.0)._replace(coefficient=size)
        objective = (objective[0], term)
    inner = tuple(n[5:] for n in file if n.startswith("loss/inner_"))
    losses = {n: (loss,) for n, loss in losses.items()}
    losses["reconstruction"] = ("mse_loss", *inner)
    if case in DEAD:
        losses["dead_latents"] = ("auxiliary_reconstruction_loss",)
    start = {n[6:]: jnp.asarray(file[n]) for n in file if n.startswith("start/")}
    if "topk_threshold" in sae.init(jax.random.key(0)):
        start["topk_threshold"] = jnp.zeros(())
    return sae, objective, losses, start, file


@pytest.mark.parametrize("case", CASES)
def test_terms_and_their_slopes_are_saelens(case):
    sae, objective, losses, start, file = golden(case)
    acts = jnp.asarray(file["batches"][0])
    data = {"acts": acts, "target": acts, "grads": None}
    data |= {"weights": jnp.full(20, 1 / 20), "dead": jnp.asarray(file["dead"])}
    data["scale"] = jnp.ones(())
    assert sorted(t.name for t in objective) == sorted(losses)
    for term in objective:
        run = lambda q, t=term: t.coefficient * t.loss(parts_of(sae, q, data))  # noqa: E731
        value, slopes = jax.jit(jax.value_and_grad(run))(start)
        theirs = losses[term.name]
        want = sum(file[f"loss/{n}"] for n in theirs)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        slopes.pop("topk_threshold", None)
        for name, slope in slopes.items():
            want = sum(file[f"slope/{n}/{name}"] for n in theirs)
            size = 1e-5 * max(1, np.abs(want).max())
            np.testing.assert_allclose(slope, want, rtol=1e-5, atol=size, err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_a_few_steps_are_saelens(case):
    sae, objective, _, start, file = golden(case)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    options = {"normalize": False, "center": False, "clip": np.inf}
    options |= {"warm_up": 3 if case == "standard" else 0, "dead_after": 2}
    init, update = tf.trainer(sae, objective, adam, **options)
    state, update = init(jax.random.key(0))._replace(params=start), jax.jit(update)
    for batch, loss in zip(file["batches"], file["steps"], strict=True):
        taps = tf.Taps(jnp.asarray(batch), None, jnp.ones(len(batch)))
        state, metrics = update(state, taps)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
    for name, value in state.params.items():
        np.testing.assert_allclose(value, file[f"end/{name}"], atol=2e-5, err_msg=name)


def test_objectives_by_name():
    names = lambda o: {t.name: t.coefficient for t in o}  # noqa: E731
    assert names(tf.dictionary_objective(ALL["topk"](), dead_latents=0)) == {
        "reconstruction": 1.0
    }
    published = tf.attribution_objective(
        sparsity=5.0, attribution_sparsity=2.0, unexplained=0.5
    )
    assert names(published) == {
        "reconstruction": 1.0,
        "sparsity": 5.0,
        "attribution_sparsity": 2.0,
        "unexplained": 0.5,
    }
    off = {"sparsity": 0.0, "attribution_sparsity": 0.0, "unexplained": 0.0}
    assert names(tf.attribution_objective(**off)) == {"reconstruction": 1.0}
    gate = tf.attribution_objective(ALL["gated"](), dead_latents=0.3, **off)
    assert names(gate) == {"reconstruction": 1.0, "gate": 1.0, "dead_latents": 0.3}
    top = tf.attribution_objective(ALL["topk"](), sparsity=3.0)
    assert "sparsity" not in names(top)


def test_errors():
    with pytest.raises(ValueError, match=r"penalty must be one of l1, .* got 'l2'"):
        objectives.attribution_sparsity("l2")
    with pytest.raises(ValueError, match=r"form must be .* got 'absolute'"):
        objectives.unexplained("absolute")
    sae = ALL["standard"]()
    parts = parts_of(sae, *single(*problem(sae)))
    with pytest.raises(ValueError, match="quadratic_l0: only of jump_relu"):
        objectives.quadratic_l0(3.0).loss(parts)
    with pytest.raises(ValueError, match="only of a paired dictionary"):
        objectives.gradient_reconstruction().loss(parts)


@pytest.mark.parametrize("gamma", [0.1, 0.5])
@pytest.mark.parametrize("name", ["l1", "geman_mcclure", "log"])
def test_the_slope_of_a_penalty_is_that_of_its_value(name, gamma):
    penalty = objectives._PENALTIES[name](gamma)
    sizes = np.concatenate([-np.geomspace(1e-3, 1e3, 40), np.geomspace(1e-3, 1e3, 40)])
    with jax.enable_x64(True):
        sizes = jnp.asarray(sizes)
        want = jax.vmap(jax.grad(penalty.value))(sizes)
        np.testing.assert_allclose(
            penalty.slope(sizes, penalty.value(sizes)), want, rtol=1e-7
        )
    assert (
        float(penalty.value(jnp.zeros(())))
        == float(penalty.slope(jnp.zeros(()), jnp.zeros(())))
        == 0
    )


@pytest.mark.parametrize("gamma", [0.0, -1.0, np.nan])
def test_a_bounded_penalty_needs_a_width(gamma):
    with pytest.raises(ValueError, match="gamma must be positive and finite"):
        objectives.attribution_sparsity("log", gamma=gamma)
