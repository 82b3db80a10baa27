from functools import partial
from pathlib import Path

import dictionary_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import toyfeat as ft
from toyfeat import losses
from toyfeat.dictionary import Config, make_dictionary
from toyfeat.dictionary.attributions import PENALTIES
from toyfeat.dictionary.linear import LINEAR

# Written by benchmarks/peers/saelens_losses_golden.py.
GOLDEN = Path(__file__).parents[1] / "golden" / "saelens_losses"
D, M, K, N, R = 6, 16, 3, 11, 2
WIDTHS = (3, 8, M)
ALL = {
    "standard": lambda: ft.dictionaries.standard(D, M),
    "topk": lambda: ft.dictionaries.topk(D, M, K),
    "topk plain": lambda: ft.dictionaries.topk(
        D, M, K, rescale_acts_by_decoder_norm=False
    ),
    "signed": lambda: ft.dictionaries.topk(D, M, K, signed=True),
    "batch": lambda: ft.dictionaries.batch_topk(D, M, K),
    "matryoshka": lambda: ft.dictionaries.matryoshka(D, M, K, widths=WIDTHS),
    "jump": lambda: ft.dictionaries.jump_relu(D, M, bandwidth=0.8),
    "gated": lambda: ft.dictionaries.gated(D, M),
    "paired": lambda: ft.dictionaries.paired(D, M, K),
    "linear": lambda: make_dictionary(LINEAR, Config("linear", D, M)),
}
OWN = {
    "gated": {"gate": losses.gate},
    "paired": {"gradient_reconstruction": losses.gradient_reconstruction},
}
LOSSES = {
    "reconstruction": losses.reconstruction,
    "sparsity": losses.sparsity,
    "dead_latents": losses.dead_latents,
    "l1": losses.attribution_sparsity,
    "geman_mcclure": lambda: losses.attribution_sparsity("geman_mcclure"),
    "log": lambda: losses.attribution_sparsity("log", gamma=0.3),
    "signed": lambda: losses.unexplained("signed"),
    "positive": losses.unexplained,
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


def inputs_of(sae, params, data):
    out = sae.forward(params, data["acts"], grads=data["grads"])
    return losses.Inputs(
        dictionary=sae,
        params=params,
        acts=data["acts"],
        target=data["target"],
        out=out,
        grads=data["grads"],
        weights=data["weights"],
        dead=data["dead"],
        scale=data["scale"],
        coefficients={},
    )


def plain(name, loss, p, data, rest=None):
    """The losses as they are written, an example at a time, in float64."""
    codes, pre = oracle.values_and_pre(name, p, data["acts"], data["grads"], k=K)
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
        elif loss == "gradient_reconstruction":
            support = codes[n] != 0
            recon_g = (data["grads"][n] @ p["P"] * support) @ p["W_read"]
            value = np.sum((data["grads"][n] - recon_g) ** 2) / R
        elif loss == "dead_latents":
            dead = np.flatnonzero(data["dead"])
            score = pre[n, dead] * length[dead]
            score = np.abs(score) if name in ("signed", "linear") else score
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
    codes, _ = oracle.values_and_pre(name, p, data["acts"], data["grads"], k=K)
    rest = data["target"] - codes @ p["W_dec"] - p["b_dec"]

    def values_of(q):
        inputs = inputs_of(sae, q, given)
        return [term.loss(inputs) for term in terms.values()]

    rng, step, ways = np.random.default_rng(7), 1e-6, []
    for _ in range(3):
        ways.append({n: rng.normal(size=x.shape) for n, x in p.items()})
        if "threshold" in p:
            ways[-1]["threshold"] *= 0  # its derivative is an estimate
    with jax.enable_x64(True):
        given, params = jax.tree.map(jnp.asarray, (data, p))
        values, back = jax.jit(lambda q: jax.vjp(values_of, q))(params)
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


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ALL)
def test_values_and_slopes_are_those_of_the_written_losses(name):
    makers = LOSSES | OWN.get(name, {})
    check(name, {loss: make() for loss, make in makers.items()})


@pytest.mark.slow_cases
@pytest.mark.parametrize("num_dead", [1, 3, M])
def test_few_and_all_latents_dead(num_dead):
    for name in ("topk", "signed"):
        check(name, {"dead_latents": losses.dead_latents()}, 1, num_dead)


@pytest.mark.slow
def test_without_dead_latents_there_is_nothing_and_no_slope():
    sae = ALL["topk"]()
    p, data = single(*problem(sae, num_dead=0))
    run = lambda q: losses.dead_latents().loss(inputs_of(sae, q, data))  # noqa: E731
    value, slopes = jax.value_and_grad(run)(p)
    assert value == 0
    assert all(not np.any(x) for x in slopes.values())


def single(p, data):
    kind = lambda a: jnp.asarray(a, None if a.dtype == bool else jnp.float32)  # noqa: E731
    return jax.tree.map(kind, p), jax.tree.map(kind, data)


@pytest.mark.slow
def test_fewer_latents_than_half_the_width_are_a_share_of_it():
    sae = ft.dictionaries.topk(10, 3, 1)
    rng = np.random.default_rng(0)
    p = {n: 0.5 * rng.normal(size=x.shape) for n, x in sae.init(key()).items()}
    acts = rng.normal(size=(1, 10))
    data = {"acts": acts, "target": acts, "grads": np.zeros((1, 1, 10))}
    data |= {"weights": np.ones(1), "dead": np.ones(3, bool), "scale": np.ones(())}
    q, given = single(p, data)
    got = losses.dead_latents().loss(inputs_of(sae, q, given))
    pre = (acts - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    recon = sae.forward(q, given["acts"]).recon
    rest = acts - np.asarray(recon, np.float64)
    want = 3 / 5 * np.sum((rest - pre @ p["W_dec"]) ** 2)
    np.testing.assert_allclose(got, want, rtol=1e-4)


def key():
    return jax.random.key(0)


@pytest.mark.slow_cases
@pytest.mark.parametrize("target", [None, 4.0])
def test_jump_relu_s_estimates_of_the_threshold_s_slope(target):
    sae, eps = ALL["jump"](), 0.8
    p, data = problem(sae, 2)
    term = losses.quadratic_l0(target) if target else losses.sparsity()
    q, given = single(p, data)
    run = lambda q: term.loss(inputs_of(sae, q, given))  # noqa: E731
    value, slopes = jax.value_and_grad(run)(q)
    _, pre = oracle.values_and_pre("jump", p, data["acts"])
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
    run = lambda q: losses.reconstruction().loss(inputs_of(sae, q, given))  # noqa: E731
    got = jax.grad(run)(q)["threshold"]
    codes, pre = oracle.values_and_pre("jump", p, data["acts"])
    error = codes @ p["W_dec"] + p["b_dec"] - data["target"]
    by_codes = 2 * data["weights"][:, None] * (error @ p["W_dec"].T)
    near = np.abs(pre - p["threshold"]) < eps / 2
    want = (-(p["threshold"] / eps) * near * by_codes).sum(0)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)


def test_gradients_are_constants():
    sae = ALL["standard"]()
    _, data = single(*problem(sae))
    trainer = ft.trainer(sae, losses.attribution(), readouts=R)
    state = trainer.init(jax.random.key(0))

    @jax.jit
    @jax.grad
    def slope(grads):
        taps = ft.Taps(data["acts"], grads, data["weights"])
        return trainer.update(state, taps)[1]["loss"]

    assert not np.any(slope(data["grads"]))


def test_bounded_penalties_are_bounded_and_one_at_the_usual_size():
    sae = ALL["standard"]()
    p, data = single(*problem(sae))
    for scale in (0.5, 2.0):
        data["scale"] = jnp.asarray(scale)
        inputs = inputs_of(sae, p, data)
        one = jnp.zeros((N, M)).at[:, 3].set(1.0)
        out = inputs.out._replace(values=one)
        read = jnp.sum(p["W_dec"][3] ** 2)  # the attribution is then the scale
        grads = jnp.broadcast_to(p["W_dec"][3] * scale / read, (N, R, D))
        inputs = inputs._replace(out=out, grads=grads)
        log = losses.attribution_sparsity("log").loss(inputs)
        bounded = losses.attribution_sparsity("geman_mcclure")
        np.testing.assert_allclose(log, 1.0, rtol=1e-5)
        np.testing.assert_allclose(bounded.loss(inputs), 1 / 1.01, rtol=1e-5)
        inputs = inputs._replace(grads=1e6 * grads)
        np.testing.assert_allclose(bounded.loss(inputs), 1.0, rtol=1e-5)


CASES = {
    "standard": (lambda: ft.dictionaries.standard(D, M), {"sparsity": "l1_loss"}, 0.7),
    "topk": (lambda: ft.dictionaries.topk(D, M, K), {}, None),
    "topk_plain": (ALL["topk plain"], {}, None),
    "batchtopk": (ALL["batch"], {}, None),
    "matryoshka": (ALL["matryoshka"], {}, None),
    "gated": (
        ALL["gated"],
        {"sparsity": "l1_loss", "gate": "auxiliary_reconstruction_loss"},
        0.7,
    ),
    "jumprelu": (
        lambda: ft.dictionaries.jump_relu(D, M, bandwidth=1.0),
        {"sparsity": "l0_loss"},
        0.3,
    ),
    "jumprelu_quadratic": (
        lambda: ft.dictionaries.jump_relu(D, M, bandwidth=1.0),
        {"sparsity": "l0_loss"},
        0.3,
    ),
}
DEAD = {"topk": 0.5, "topk_plain": 1.0, "batchtopk": 1.0, "matryoshka": 1.0}


def golden(case):
    """Dictionary, objective, which of SAELens' losses its terms are, the file."""
    make, theirs, size = CASES[case]
    sae, file = make(), np.load(GOLDEN / f"{case}.npz")
    objective = losses.default(sae, sparsity=size or 0, dead_latents=DEAD.get(case, 0))
    if case == "jumprelu_quadratic":
        term = losses.quadratic_l0(4.0)._replace(coefficient=size)
        objective = (objective[0], term)
    inner = tuple(n[5:] for n in file if n.startswith("loss/inner_"))
    theirs = {n: (loss,) for n, loss in theirs.items()}
    theirs["reconstruction"] = ("mse_loss", *inner)
    if case in DEAD:
        theirs["dead_latents"] = ("auxiliary_reconstruction_loss",)
    start = {n[6:]: jnp.asarray(file[n]) for n in file if n.startswith("start/")}
    if "topk_threshold" in sae.init(jax.random.key(0)):
        start["topk_threshold"] = jnp.zeros(())
    return sae, objective, theirs, start, file


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CASES)
def test_terms_and_their_slopes_are_saelens(case):
    sae, objective, names, start, file = golden(case)
    acts = jnp.asarray(file["batches"][0])
    data = {"acts": acts, "target": acts, "grads": None}
    data |= {"weights": jnp.full(20, 1 / 20), "dead": jnp.asarray(file["dead"])}
    data["scale"] = jnp.ones(())
    assert sorted(t.name for t in objective) == sorted(names)
    for term in objective:
        run = lambda q, t=term: t.coefficient * t.loss(inputs_of(sae, q, data))  # noqa: E731
        value, slopes = jax.jit(jax.value_and_grad(run))(start)
        theirs = names[term.name]
        want = sum(file[f"loss/{n}"] for n in theirs)
        np.testing.assert_allclose(value, want, rtol=1e-5)
        slopes.pop("topk_threshold", None)
        for name, slope in slopes.items():
            want = sum(file[f"slope/{n}/{name}"] for n in theirs)
            size = 1e-5 * max(1, np.abs(want).max())
            np.testing.assert_allclose(slope, want, rtol=1e-5, atol=size, err_msg=name)


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CASES)
def test_a_few_steps_are_saelens(case):
    sae, objective, _, start, file = golden(case)
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-2))
    options = {"normalize": False, "center": False, "clip": np.inf}
    options |= {"warm_up": 3 if case == "standard" else 0, "dead_after": 2}
    trainer = ft.trainer(sae, objective, adam, **options)
    state = trainer.init(jax.random.key(0))._replace(params=start)
    update = jax.jit(trainer.update)
    for batch, loss in zip(file["batches"], file["steps"], strict=True):
        taps = ft.Taps(jnp.asarray(batch), None, jnp.ones(len(batch)))
        state, metrics = update(state, taps)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-5)
    for name, value in state.params.items():
        np.testing.assert_allclose(value, file[f"end/{name}"], atol=2e-5, err_msg=name)


def test_losses_by_name():
    names = lambda o: {t.name: t.coefficient for t in o}  # noqa: E731
    assert names(losses.default(ALL["topk"](), dead_latents=0)) == {
        "reconstruction": 1.0
    }
    published = losses.attribution(
        sparsity=5.0, attribution_sparsity=2.0, unexplained=0.5
    )
    assert names(published) == {
        "reconstruction": 1.0,
        "sparsity": 5.0,
        "attribution_sparsity": 2.0,
        "unexplained": 0.5,
    }
    off = {"sparsity": 0.0, "attribution_sparsity": 0.0, "unexplained": 0.0}
    assert names(losses.attribution(**off)) == {"reconstruction": 1.0}
    gate = losses.attribution(ALL["gated"](), dead_latents=0.3, **off)
    assert names(gate) == {"reconstruction": 1.0, "gate": 1.0, "dead_latents": 0.3}
    top = losses.attribution(ALL["topk"](), sparsity=3.0)
    assert "sparsity" not in names(top)


def test_errors():
    with pytest.raises(ValueError, match=r"penalty must be one of l1, .* got 'l2'"):
        losses.attribution_sparsity("l2")
    with pytest.raises(ValueError, match=r"form must be .* got 'absolute'"):
        losses.unexplained("absolute")
    sae = ALL["standard"]()
    inputs = inputs_of(sae, *single(*problem(sae)))
    with pytest.raises(ValueError, match="quadratic_l0: only of jump_relu"):
        losses.quadratic_l0(3.0).loss(inputs)
    with pytest.raises(ValueError, match="only of a paired dictionary"):
        losses.gradient_reconstruction().loss(inputs)


@pytest.mark.slow_cases
@pytest.mark.parametrize("gamma", [0.1, 0.5])
@pytest.mark.parametrize("name", ["l1", "geman_mcclure", "log"])
def test_the_slope_of_a_penalty_is_that_of_its_value(name, gamma):
    penalty = PENALTIES[name](gamma)
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
    with pytest.raises(ValueError, match="gamma must be a finite number above 0"):
        losses.attribution_sparsity("log", gamma=gamma)


@pytest.mark.parametrize("wrong", ["0.1", None, -1.0, np.nan, np.inf, [0.1], True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        *((losses.attribution, name) for name in ("sparsity", "unexplained")),
        (losses.attribution, "attribution_sparsity"),
        (losses.attribution, "dead_latents"),
        (partial(losses.default, ALL["topk"]()), "sparsity"),
        (partial(losses.default, ALL["topk"]()), "dead_latents"),
        (losses.attribution_sparsity, "gamma"),
    ],
)
def test_coefficients_that_are_none_are_refused(make, name, wrong):
    error = TypeError if not isinstance(wrong, float) else ValueError
    with pytest.raises(
        error, match=rf"^\w+: {name} must be a finite number .*, got .*;"
    ):
        make(**{name: wrong})


@pytest.mark.parametrize("value", [0, 0.5, -0.0, np.float32(2), np.int64(1)])
def test_coefficients_of_any_library_are_taken_as_they_are(value):
    terms = losses.attribution(sparsity=value, dead_latents=jnp.float32(0.5))
    by_name = {term.name: term.coefficient for term in terms}
    assert by_name.get("sparsity", 0) == value
    assert by_name["dead_latents"] == 0.5


@pytest.mark.parametrize("wrong", [None, "standard", {"W_dec": 1}])
def test_a_loss_is_made_for_a_dictionary(wrong):
    with pytest.raises(TypeError, match=r"^default: dictionary must be a Dictionary, "):
        losses.default(wrong)
    with pytest.raises(TypeError, match=r"^attribution: dictionary must be a Dict"):
        losses.attribution(wrong or 0)
