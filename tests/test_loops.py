import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from toyfeat.loops import train, train_in_chunks
from toyfeat.models.planted.targets import unexplained_variance

OPTIMIZER = optax.adamw(1e-2, weight_decay=0.1)
START = {"w": jnp.array([[0.5], [-1.0]]), "b": jnp.zeros(1)}


def loss(params, batch):
    x, scale = batch
    y = x @ params["w"] + params["b"][None, :]
    return scale * jnp.mean((y - x.sum(1, keepdims=True)) ** 2)


def sample(step):
    x = jax.random.normal(jax.random.fold_in(jax.random.key(3), step), (16, 2))
    return x, 1.0 / (1.0 + jnp.asarray(step, jnp.float32))


@pytest.mark.slow
def test_training_is_the_loop_that_one_would_write():
    params, state, losses = START, OPTIMIZER.init(START), []
    for step in range(5):
        value, grads = jax.value_and_grad(loss)(params, sample(jnp.asarray(step)))
        with jax.numpy_dtype_promotion("standard"):
            updates, state = OPTIMIZER.update(grads, state, params)
        params = optax.apply_updates(params, updates)
        losses.append(value)
    trained = train(loss, START, sample, steps=5, optimizer=OPTIMIZER)
    np.testing.assert_allclose(trained.losses, losses, rtol=1e-5)
    for name in START:
        np.testing.assert_allclose(trained.params[name], params[name], rtol=1e-5)


def test_chunks_train_as_one_go_does():
    reported = []

    @jax.jit
    def run(state, first):
        params, opt_state = state
        trained = train(
            loss,
            params,
            sample,
            steps=2,
            optimizer=OPTIMIZER,
            first=first,
            opt_state=opt_state,
        )
        return (trained.params, trained.opt_state), trained.losses.mean()

    (params, _), last = train_in_chunks(
        run,
        (START, OPTIMIZER.init(START)),
        steps=5,  # rounded up to whole chunks
        chunk=2,
        on_chunk=lambda steps, value: reported.append((steps, float(value))),
    )
    trained = train(loss, START, sample, steps=6, optimizer=OPTIMIZER)
    for name in START:
        np.testing.assert_allclose(params[name], trained.params[name], rtol=1e-5)
    assert [steps for steps, _ in reported] == [2, 4, 6]
    means = np.asarray(trained.losses).reshape(3, 2).mean(1)
    np.testing.assert_allclose([value for _, value in reported], means, rtol=1e-5)
    np.testing.assert_allclose(last, means[-1], rtol=1e-5)


@pytest.mark.slow
def test_training_can_be_mapped_over_keys():
    def run(key):
        params = {"w": jax.random.normal(key, (2, 1)), "b": jnp.zeros(1)}
        return train(loss, params, sample, steps=3, optimizer=OPTIMIZER).params["w"]

    keys = jax.random.split(jax.random.key(0), 2)
    for key, weight in zip(keys, jax.vmap(run)(keys), strict=True):
        np.testing.assert_allclose(weight, run(key), rtol=1e-5)


@pytest.mark.parametrize("name", ["steps", "chunk"])
def test_counts_are_positive(name):
    counts = {"steps": 1, "chunk": 1, name: 0}
    with pytest.raises(ValueError, match=f"^train: {name} must be an int of .*, got 0"):
        train_in_chunks(None, None, **counts)


def test_a_loss_that_is_not_finite_ends_the_training():
    def run(state, first):
        return state, jnp.where(first < 4, 1.0, jnp.array([1.0, jnp.nan]))

    match = "^train: the loss is not finite by step 6; lower learning_rate"
    with pytest.raises(FloatingPointError, match=match):
        train_in_chunks(run, None, steps=10, chunk=2)


def test_unexplained_variance_is_of_centred_targets():
    targets = jnp.array([[1.0, 5.0], [3.0, 5.0]])
    assert unexplained_variance(jnp.asarray(0.5), targets) == pytest.approx(0.25)
