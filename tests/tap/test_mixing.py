import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import toyfeat as ft

# The adapters warn of the layers that these tests want to be found.
pytestmark = pytest.mark.filterwarnings("ignore:.*statistics over the batch")

KEY = jax.random.key(0)
RNG = np.random.default_rng(5)
X = jnp.asarray(RNG.standard_normal((6, 4)), jnp.float32)
EIGHT = jnp.asarray(RNG.standard_normal((8, 4)), jnp.float32)
TOKENS = jnp.asarray(RNG.integers(0, 7, (6, 3)))


class LinenNormed(nn.Module):
    train: bool = True

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(5, name="dense")(x)
        x = nn.BatchNorm(use_running_average=not self.train, name="norm")(x)
        return nn.Dense(2, name="out")(jnp.tanh(x))


class NnxNormed(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.dense = nnx.Linear(4, 5, rngs=rngs)
        self.norm = nnx.BatchNorm(5, rngs=rngs)
        self.out = nnx.Linear(5, 2, rngs=rngs)

    def __call__(self, x):
        return self.out(jnp.tanh(self.norm(self.dense(x))))


class Attention(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 4, name="embed")(tokens)
        x = nn.LayerNorm(name="norm")(x)
        scores = jax.nn.softmax(jnp.einsum("btd,bsd->bts", x, x))
        return nn.Dense(7, name="out")(jnp.einsum("bts,bsd->btd", scores, x))


class MixedAttention(nn.Module):
    @nn.compact
    def __call__(self, tokens):
        x = nn.Embed(7, 4, name="embed")(tokens)
        return nn.Dense(7, name="out")(x + x.mean(0, keepdims=True))


class Dropped(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dropout(0.5, deterministic=False)(nn.Dense(5)(x))


def linen(module, inputs=X, **options):
    rngs = {"params": KEY, "dropout": KEY}
    shapes = jax.eval_shape(module.init, rngs, inputs)
    rng = np.random.default_rng(0)
    variables = jax.tree.map(
        lambda leaf: jnp.asarray(0.2 + rng.random(leaf.shape), leaf.dtype), shapes
    )
    return ft.from_linen(module, **options), variables


def function(fn):
    def model(params, x, tap):
        return tap("out", fn(tap("in", 1.0 * x)))

    return ft.from_function(model), None


def prefix(fn):
    """Mixing before the only site."""
    return ft.from_split(lambda p, x: fn(x), lambda p, a: jnp.tanh(a)), None


def mlp(x):
    return jnp.tanh(x @ jnp.ones((4, 3)))


def pairs(x):
    """Rows 2i and 2i + 1 see each other."""
    couples = x.reshape(-1, 2, x.shape[-1])
    return jnp.concatenate([couples, jnp.flip(couples, 1)], -1).reshape(len(x), -1)


def half_normed(x):
    """Each half of the batch has statistics of its own (ghost batch norm)."""
    groups = x.reshape(2, -1, x.shape[-1])
    return (groups - groups.mean(1, keepdims=True)).reshape(x.shape)


def halves(x):
    """Rows i and i + B/2 see each other."""
    return x + jnp.roll(x, len(x) // 2, axis=0)


GOOD = {
    "function": lambda: (*function(mlp), X),
    "two_inputs": lambda: (*function(mlp), X[:2]),
    "three_inputs": lambda: (*function(mlp), X[:3]),
    "identical_rows": lambda: (*function(mlp), jnp.ones((4, 4))),
    "constant": lambda: (*function(lambda x: 0 * x), X),
    "large": lambda: (*function(mlp), 1e6 * X),
    "small": lambda: (*function(mlp), 1e-6 * X),
    "bfloat16": lambda: (*function(lambda x: x * x), X.astype(jnp.bfloat16)),
    "evaluating_batch_norm": lambda: (*linen(LinenNormed(train=False)), X),
    "attention_over_positions": lambda: (*linen(Attention(), TOKENS), TOKENS),
    "dropout": lambda: (*linen(Dropped(), rngs={"dropout": KEY}), X),
    "integer_outputs": lambda: (*function(lambda x: (x, x.argmax(-1))), X),
    "masked_logits": lambda: (*function(lambda x: x.at[:, 0].set(-jnp.inf)), X),
    "one_nan": lambda: (*function(lambda x: x.at[1, 0].set(jnp.nan)), X),
    "dict_inputs": lambda: (
        ft.from_split(lambda p, x: x["a"] * x["n"][:, None], lambda p, a: a),
        None,
        {"a": X, "n": jnp.arange(6.0)},
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", GOOD)
def test_models_of_single_examples_pass(name):
    probed, params, inputs = GOOD[name]()
    assert ft.check_no_mixing(probed, params, inputs) is None


def test_evaluating_nnx_models_pass():
    model = NnxNormed()
    model.eval()
    probed, params = ft.from_nnx(model)
    assert ft.check_no_mixing(probed, params, X) is None


MIXED = {
    "batch_mean": lambda: (*function(lambda x: x - x.mean(0, keepdims=True)), X),
    "earlier_to_later": lambda: (*function(lambda x: jnp.cumsum(x, axis=0)), X),
    "later_to_earlier": lambda: (
        *function(lambda x: jnp.flip(jnp.cumsum(jnp.flip(x, 0), axis=0), 0)),
        X,
    ),
    "neighbour": lambda: (*function(lambda x: x + jnp.roll(x, 1, axis=0)), X),
    "pairs": lambda: (*function(pairs), X),
    "pairs_of_eight": lambda: (*function(pairs), EIGHT),
    "batch_norm_of_each_half": lambda: (*function(half_normed), EIGHT),
    "halves": lambda: (*function(halves), X),
    "last_two_rows": lambda: (
        *function(lambda x: x.at[-1].add(x[-2])),
        X,
    ),
    "sorted": lambda: (*function(lambda x: jnp.sort(x, axis=0)), X),
    "max": lambda: (*function(lambda x: x - x.max(axis=0, keepdims=True)), X),
    "weak": lambda: (*function(lambda x: x + 1e-3 * x.mean(0, keepdims=True)), X),
    "two_inputs": lambda: (*function(lambda x: x + jnp.flip(x, 0)), X[:2]),
    "three_inputs": lambda: (*function(lambda x: x + x[:1]), X[:3]),
    "identical_rows": lambda: (
        *function(lambda x: x - x.mean(0, keepdims=True)),
        jnp.ones((4, 4)),
    ),
    "large": lambda: (*function(lambda x: x - x.mean(0, keepdims=True)), 1e6 * X),
    "small": lambda: (*function(lambda x: x - x.mean(0, keepdims=True)), 1e-6 * X),
    "bfloat16": lambda: (
        *function(lambda x: x - x.mean(0, keepdims=True)),
        X.astype(jnp.bfloat16),
    ),
    "masked_logits": lambda: (
        *function(lambda x: jnp.cumsum(x, axis=0).at[:, 0].set(-jnp.inf)),
        X,
    ),
    "prefix": lambda: (*prefix(lambda x: x - x.mean(0, keepdims=True)), X),
    "prefix_pairs": lambda: (*prefix(pairs), X),
    "prefix_of_two": lambda: (*prefix(lambda x: x + jnp.flip(x, 0)), X[:2]),
    "tokens": lambda: (*linen(MixedAttention(), TOKENS), TOKENS),
    "same_tokens": lambda: (*linen(MixedAttention(), 0 * TOKENS), 0 * TOKENS),
    "batch_norm": lambda: (*linen(LinenNormed(), mutable=["batch_stats"]), X),
    "batch_norm_of_identical_rows": lambda: (
        *linen(LinenNormed(), mutable=["batch_stats"]),
        jnp.ones((6, 4)),
    ),
    "nnx_batch_norm": lambda: (*ft.from_nnx(NnxNormed()), X),
    "nnx_batch_norm_of_identical_rows": lambda: (
        *ft.from_nnx(NnxNormed()),
        jnp.ones((6, 4)),
    ),
}


@pytest.mark.slow_cases
@pytest.mark.parametrize("name", MIXED)
def test_models_that_mix_examples_are_caught(name):
    probed, params, inputs = MIXED[name]()
    with pytest.raises(ValueError, match="examples of a batch influence each other"):
        ft.check_no_mixing(probed, params, inputs)


@pytest.mark.parametrize("seed", range(3))
def test_mixing_is_caught_with_any_key(seed):
    probed, params = function(lambda x: jnp.cumsum(x, axis=0))
    with pytest.raises(ValueError, match="influence each other"):
        ft.check_no_mixing(probed, params, X, key=jax.random.key(seed))


def test_first_mixed_site_is_named():
    def model(params, x, tap):
        x = tap("before", 2.0 * x)
        x = tap("centred", x - x.mean(0, keepdims=True))
        return tap("after", 3.0 * x)

    with pytest.raises(ValueError, match=r"at site 'centred'"):
        ft.check_no_mixing(ft.from_function(model), None, X)


@pytest.mark.slow_cases
@pytest.mark.parametrize("adapter", ["linen", "nnx"])
def test_mixing_module_is_named(adapter):
    if adapter == "linen":
        model = linen(LinenNormed(), mutable=["batch_stats"])
    else:
        model = ft.from_nnx(NnxNormed())
    with pytest.raises(ValueError, match=r"'norm'"):
        ft.check_no_mixing(*model, X)


def test_mixed_outputs_are_named():
    probed = ft.from_split(lambda p, x: x, lambda p, a: a - a.mean(0, keepdims=True))
    with pytest.raises(ValueError, match=r"influence each other .*outputs"):
        ft.check_no_mixing(probed, None, X)


def test_arrays_of_numpy_may_be_used_as_such():
    matrix = np.eye(X.shape[1], dtype=np.float32)
    probed = ft.from_split(lambda p, x: x @ np.asarray(p["w"]).T, lambda p, a: 2 * a)
    ft.check_no_mixing(probed, {"w": matrix}, X)


def test_one_input_is_not_enough():
    with pytest.raises(ValueError, match=r"at least two inputs .*got 1"):
        ft.check_no_mixing(*function(mlp), X[:1])


@pytest.mark.parametrize("axes", [(0,), (0, 1)])
def test_outputs_without_batch_axis_are_named(axes):
    probed = ft.from_split(lambda p, x: x, lambda p, a: a.sum(axes))
    with pytest.raises(ValueError, match=r"the outputs .*batch axis 6, got shape"):
        ft.check_no_mixing(probed, None, X)


# inside jit


def test_check_of_mixing_refuses_traced_inputs():
    with pytest.raises(TypeError, match=r"check_no_mixing: .*outside of jit"):
        jax.jit(lambda x: ft.check_no_mixing(*function(mlp), x))(X)


def test_check_of_mixing_refuses_traced_parameters():
    probed = ft.from_split(lambda p, x: x * p, lambda p, a: a)
    with pytest.raises(TypeError, match=r"check_no_mixing: .*outside of jit"):
        jax.jit(lambda p: ft.check_no_mixing(probed, p, X))(jnp.float32(1.0))


@pytest.mark.parametrize("where", ["parameters", "inputs", "outputs"])
def test_values_that_are_nan_do_not_pass_for_unmixed(where):
    nan, x = jnp.float32(jnp.nan), X
    if where == "inputs":
        x = X.at[3].set(nan)
    scale = nan if where == "parameters" else jnp.float32(1.0)
    suffix = (lambda p, a: nan * a) if where == "outputs" else (lambda p, a: a)
    probed = ft.from_split(lambda p, x: x * p, suffix)
    match = r"^check_no_mixing: wants finite values .*got .*NaN in \d of 6 .*; look"
    with pytest.raises(ValueError, match=match):
        ft.check_no_mixing(probed, scale, x)


@pytest.mark.parametrize(
    ("probed", "key"),
    [(None, None), (ft.from_split(mlp, mlp), 3)],
    ids=["probed", "key"],
)
def test_arguments_of_the_check_of_mixing_are_named(probed, key):
    with pytest.raises(TypeError, match=r"^check_no_mixing: .*got.*; "):
        ft.check_no_mixing(probed, None, X, key=key)
