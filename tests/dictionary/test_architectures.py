from functools import partial

import dictionary_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import toyfeat as ft
from toyfeat.dictionary import Config, make_dictionary
from toyfeat.dictionary.linear import LINEAR
from toyfeat.dictionary.table import ARCHITECTURES

D, M, K, N = 6, 20, 4, 15
ALL = {
    "standard": lambda **o: ft.dictionaries.standard(D, M, **o),
    "topk": lambda **o: ft.dictionaries.topk(D, M, K, **o),
    "topk plain": lambda **o: ft.dictionaries.topk(
        D, M, K, rescale_acts_by_decoder_norm=False, **o
    ),
    "signed": lambda **o: ft.dictionaries.topk(D, M, K, signed=True, **o),
    "gradient": lambda **o: ft.dictionaries.gradient_topk(
        D, M, K, weight=oracle.GRADIENT_WEIGHT, **o
    ),
    "batch": lambda **o: ft.dictionaries.batch_topk(D, M, K, **o),
    "matryoshka": lambda **o: ft.dictionaries.matryoshka(D, M, K, widths=(5, M), **o),
    "jump": lambda **o: ft.dictionaries.jump_relu(D, M, **o),
    "gated": lambda **o: ft.dictionaries.gated(D, M, **o),
    "paired": lambda **o: ft.dictionaries.paired(D, M, K, **o),
    "linear": lambda **o: make_dictionary(LINEAR, Config("linear", D, M), **o),
}
BY_K = ("topk", "signed", "gradient", "batch", "matryoshka", "paired")


def random_params(sae, seed=0):
    params = sae.init(jax.random.key(seed))
    rng = np.random.default_rng(seed)
    params = {
        k: np.asarray(v) + np.asarray(0.4 * rng.normal(size=v.shape), v.dtype)
        for k, v in params.items()
    }
    for name in ("threshold", "topk_threshold"):
        if name in params:
            params[name] = np.abs(params[name]) + np.float32(0.2)
    return jax.tree.map(jnp.asarray, params)


def data(seed=1):
    rng = np.random.default_rng(seed)
    acts, grads = rng.normal(size=(N, D)), rng.normal(size=(N, 3, D))
    return jnp.asarray(acts, jnp.float32), jnp.asarray(grads, jnp.float32)


def test_every_architecture_of_the_table_is_in_the_battery():
    names = {make().architecture.name for make in ALL.values()}
    assert names == set(ARCHITECTURES)
    for name, architecture in ARCHITECTURES.items():
        assert name == architecture.name


@pytest.mark.slow_cases
@pytest.mark.parametrize("train", [False, True])
@pytest.mark.parametrize("name", ALL)
def test_codes_and_reconstructions_are_the_textbook_s(name, train):
    sae, (acts, grads) = ALL[name](), data()
    params = random_params(sae)
    codes = sae.encode(params, acts, grads=grads, train=train)
    values, pre = oracle.values_and_pre(name, params, acts, grads, k=K, train=train)
    p = oracle.double(params)
    want = values * oracle.units(name, p)
    np.testing.assert_allclose(codes, want, rtol=2e-5, atol=2e-5)
    out = values @ p["W_dec"] + p["b_dec"]
    np.testing.assert_allclose(sae.decode(params, codes), out, rtol=1e-4, atol=1e-4)
    if not train:
        return
    got = sae.forward(params, acts, grads=grads)
    np.testing.assert_array_equal(got.codes, codes)
    np.testing.assert_allclose(got.hidden_pre, pre, rtol=2e-5, atol=2e-5)
    np.testing.assert_allclose(got.recon, out, rtol=1e-4, atol=1e-4)
    assert (got.index is None) == (sae.architecture.selects != "example")
    assert (got.grad_recon is None) == (name != "paired")


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ALL)
def test_eager_jit_and_vmap_agree(name):
    sae, (acts, grads) = ALL[name](), data()
    many = [random_params(sae, seed) for seed in range(3)]
    stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *many)
    run = lambda p: sae.encode(p, acts, grads=grads, train=True)  # noqa: E731
    batched = jax.jit(jax.vmap(run))(stacked)
    for params, codes in zip(many, np.asarray(batched), strict=True):
        np.testing.assert_allclose(codes, run(params), rtol=1e-5, atol=1e-5)


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", BY_K)
def test_fewer_codes_may_be_asked_for_under_a_trace(name):
    sae, (acts, grads) = ALL[name](), data()
    params = random_params(sae)
    run = jax.jit(lambda k: sae.encode(params, acts, grads=grads, train=True, k=k))
    most, two = (np.asarray(run(jnp.asarray(n))) for n in (K, 2))
    assert (two != 0).sum() <= 2 * N
    assert (two != 0).sum() < (most != 0).sum()
    np.testing.assert_array_equal(two, np.where(two != 0, most, 0))


def train_codes(sae, params, acts):
    """The codes as an array of numpy."""
    return np.asarray(sae.encode(params, acts, train=True))


def test_a_batch_keeps_k_codes_per_example_on_average():
    sae, (acts, _) = ALL["batch"](), data()
    counts = np.count_nonzero(train_codes(sae, random_params(sae), acts), axis=1)
    assert counts.sum() == K * N
    assert len(set(counts.tolist())) > 1


def test_equal_codes_of_a_batch_are_kept_or_left_together():
    sae, (acts, _) = ALL["batch"](), data()
    copies = jnp.asarray(np.repeat(np.asarray(acts)[:5], 3, axis=0))
    codes = train_codes(sae, random_params(sae), copies)
    np.testing.assert_array_equal(codes, np.repeat(codes[::3], 3, axis=0))
    count = int((codes != 0).sum())
    assert K * N <= count < K * N + 3  # of three equal ones perhaps one is wanted


def test_gradients_change_which_codes_are_kept_but_not_their_values():
    sae, (acts, grads) = ALL["gradient"](), data()
    params = random_params(sae)
    plain = np.asarray(sae.encode(params, acts))
    chosen = np.asarray(sae.encode(params, acts, grads=grads))
    assert ((plain != 0) != (chosen != 0)).any()
    both = (plain != 0) & (chosen != 0)
    np.testing.assert_array_equal(plain[both], chosen[both])
    np.testing.assert_array_equal(plain, ALL["topk"]().encode(params, acts))


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", ["topk", "topk plain", "signed", "batch", "paired"])
def test_derivatives_are_those_of_the_kept_codes(name):
    sae, (acts, _) = ALL[name](), data()
    params = random_params(sae)
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(N, M)), jnp.float32)

    def ours(params):
        codes = sae.encode(params, acts, train=True)
        return jnp.sum(weight * codes), codes

    def plain(params, codes):
        pre = (acts - params["b_dec"][None]) @ params["W_enc"] + params["b_enc"][None]
        if name in oracle.RESCALED:
            pre = pre * jnp.linalg.norm(params["W_dec"], axis=1)[None]
        return jnp.sum(weight * jnp.where(codes != 0, pre, 0.0))

    got, codes = jax.jit(jax.grad(ours, has_aux=True))(params)
    want = jax.jit(jax.grad(plain))(params, codes)
    for tensor in want:
        np.testing.assert_allclose(got[tensor], want[tensor], rtol=1e-4, atol=1e-4)


# Half the width above the threshold: codes that are off must not count as near it.
@pytest.mark.parametrize("bandwidth", [0.5, 2.0])
def test_a_threshold_s_derivative_is_the_kernel_estimate(bandwidth):
    sae, (acts, _) = ft.dictionaries.jump_relu(D, M, bandwidth=bandwidth), data()
    params = random_params(sae)
    weight = jnp.asarray(np.random.default_rng(5).normal(size=(N, M)), jnp.float32)
    loss = lambda p: jnp.sum(weight * sae.encode(p, acts))  # noqa: E731
    got = jax.jit(jax.grad(loss))(params)
    p = {k: np.asarray(v, np.float64) for k, v in params.items()}
    pre = (np.asarray(acts) - p["b_dec"]) @ p["W_enc"] + p["b_enc"]
    near = np.abs(pre - p["threshold"]) < bandwidth / 2
    want = -(p["threshold"] / bandwidth) * (near * np.asarray(weight)).sum(0)
    np.testing.assert_allclose(got["threshold"], want, rtol=1e-4, atol=1e-5)
    bias = ((pre > p["threshold"]) * np.asarray(weight)).sum(0)
    np.testing.assert_allclose(got["b_enc"], bias, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ALL)
def test_the_start_is_short_rows_and_their_transpose(name):
    sae = ALL[name](decoder_norm=0.3)
    params = sae.init(jax.random.key(0))
    params = {tensor: np.asarray(value) for tensor, value in params.items()}
    np.testing.assert_allclose(np.linalg.norm(params["W_dec"], axis=1), 0.3, rtol=1e-5)
    np.testing.assert_array_equal(params["W_enc"], params["W_dec"].T)
    assert all(not params[n].any() for n in params if n.startswith("b_"))


def test_a_transcoder_reads_one_width_and_writes_another():
    sae, (acts, _) = ft.dictionaries.standard(D, M, target_dim=9), data()
    params = random_params(sae)
    codes = sae.encode(params, acts)
    np.testing.assert_allclose(
        codes, jax.nn.relu(acts @ params["W_enc"] + params["b_enc"][None]), rtol=1e-5
    )
    assert sae.decode(params, codes).shape == (N, 9)


def test_a_zero_row_of_the_decoder_does_no_harm():
    sae, (acts, _) = ALL["topk"](), data()
    params = random_params(sae)
    rows = np.array(params["W_dec"])
    rows[0] = 0
    params["W_dec"] = jnp.asarray(rows)
    loss = lambda p: sae.decode(p, sae.encode(p, acts)).sum()  # noqa: E731
    slopes = jax.jit(jax.grad(loss))(params)
    assert all(np.isfinite(np.asarray(x)).all() for x in jax.tree.leaves(slopes))


@pytest.mark.parametrize(
    ("make", "match"),
    [
        (
            lambda: ft.dictionaries.standard(0, 4),
            r"dim must be an int in 1 \.\. 2147483647, what an axis has, got 0",
        ),
        (
            lambda: ft.dictionaries.standard(4, 2.5),
            r"latents must be an int in 1 \.\. .*, got 2.5",
        ),
        (
            lambda: ft.dictionaries.topk(4, 8, 9),
            "k must be an int in 1 .. 8, the latents, got 9",
        ),
        (
            lambda: ft.dictionaries.paired(4, 8, 9),
            "paired: k must be an int in 1 .. 8, the latents",
        ),
        (
            lambda: ft.dictionaries.batch_topk(4, 8, 0),
            "k must be an int in 1 .. 8, the latents, got 0",
        ),
        (
            lambda: ft.dictionaries.matryoshka(4, 8, 2, widths=(4, 6)),
            r"latents = 8, got \(4, 6\)",
        ),
        (
            lambda: ft.dictionaries.matryoshka(4, 8, 2, widths=(4, 4, 8)),
            "must increase",
        ),
        (
            lambda: ft.dictionaries.jump_relu(4, 8, threshold=0.0),
            "must be a finite number above 0, got 0.0",
        ),
        (
            lambda: make_dictionary(LINEAR, Config("gated", 4, 8)),
            "architecture is 'linear', the configuration is of 'gated'",
        ),
        (
            lambda: make_dictionary(LINEAR, Config("linear", 4, 8, d_out=3)),
            "a transcoder has no b_dec to subtract",
        ),
    ],
)
def test_wrong_sizes_are_named(make, match):
    with pytest.raises(ValueError, match=match):
        make()


def test_wrong_shapes_are_named():
    sae = ft.dictionaries.standard(D, M)
    params = sae.init(jax.random.key(0))
    with pytest.raises(ValueError, match=r"wanted acts \[N, 6\], got shape \(2, 5\)"):
        sae.encode(params, jnp.ones((2, 5)))
    with pytest.raises(ValueError, match=r"wanted codes \[N, 20\], got shape \(2, 6\)"):
        sae.decode(params, jnp.ones((2, 6)))


@pytest.mark.parametrize("wrong", [True, 2.0, "3", None, -1, np.nan, [2], np.bool_(1)])
@pytest.mark.parametrize("place", ["dim", "latents", "k"])
def test_a_size_that_is_no_int_is_refused(place, wrong):
    sizes = {"dim": 4, "latents": 8, "k": 2} | {place: wrong}
    for make in (ft.dictionaries.topk, ft.dictionaries.paired):
        with pytest.raises(ValueError, match=rf"^\w+: {place} must be an int .*; pass"):
            make(**sizes)
    with pytest.raises((ValueError, TypeError), match=r"^matryoshka\w*: .*, got "):
        ft.dictionaries.matryoshka(**sizes, widths=(4, 8))


@pytest.mark.parametrize(
    "widths", [8, "48", (4.0, 8), (True, 8), None, (-4, 8), (8, 4)]
)
def test_widths_that_are_none_are_refused(widths):
    with pytest.raises((ValueError, TypeError), match=r"^matryoshka\w*: .*, got "):
        ft.dictionaries.matryoshka(4, 8, 2, widths=widths)


@pytest.mark.parametrize("wrong", ["a", None, np.nan, -1.0, [1.0], True])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (partial(ft.dictionaries.standard, 4, 8), "decoder_norm"),
        (partial(ft.dictionaries.jump_relu, 4, 8), "threshold"),
        (partial(ft.dictionaries.jump_relu, 4, 8), "bandwidth"),
        (partial(ft.dictionaries.gradient_topk, 4, 8, 2), "weight"),
        (ft.losses.quadratic_l0, "target"),
        (ft.controllers.target_l0, "target"),
        (partial(ft.controllers.target_fvu, 0.1), "memory"),
    ],
)
def test_a_number_that_is_none_is_refused(make, name, wrong):
    with pytest.raises(
        (ValueError, TypeError), match=r"^\w+: .*number.*, got .*; pass"
    ):
        make(**{name: wrong})


def test_numbers_of_numpy_are_taken():
    sizes = {"dim": np.int64(4), "latents": np.int32(8), "k": np.uint8(2)}
    sae = ft.dictionaries.matryoshka(**sizes, widths=np.array([4, 8]))
    assert sae.config == ft.dictionaries.matryoshka(4, 8, 2, widths=(4, 8)).config
    assert type(sae.config.k) is int
    ft.dictionaries.jump_relu(4, 8, threshold=np.float32(1), bandwidth=1)
    ft.controllers.target_l0(np.int64(3))
    with pytest.raises(TypeError, match="rescale_acts_by_decoder_norm must be True or"):
        ft.dictionaries.topk(4, 8, 2, rescale_acts_by_decoder_norm="no")
