"""A trainer of linear regressions; also what the children of the tests run."""

import jax
import jax.numpy as jnp
import numpy as np
import optax

from toyfeat.data.batches import Batches
from toyfeat.train.types import Trainer, TrainState
from toyfeat.types import Taps

D, N = 6, 16


def tiny(*, hyper=(("rate", 0.05),), saturated=None):
    """Linear regression of ``acts`` on a fixed target by Adam."""
    target = jnp.arange(D, dtype=jnp.float32)
    adam = optax.scale_by_adam()

    def init(key, **changed):
        params = {"w": jax.random.normal(key, (D,)), "b": jnp.zeros(())}
        values = {n: jnp.asarray(v) for n, v in (dict(hyper) | changed).items()}
        running = {"seen": jnp.zeros(()), "key": key}
        step = jnp.zeros((), jnp.int32)
        return TrainState(step, params, adam.init(params), (), running, values)

    def one(state, taps):
        def loss_of(params):
            found = taps.acts @ params["w"] + params["b"]
            return jnp.mean(taps.weights * (found - taps.acts @ target) ** 2)

        key, use = jax.random.split(state.running["key"])
        loss, grads = jax.value_and_grad(loss_of)(state.params)
        noise = 1 + 0.1 * jax.random.normal(use)
        with jax.numpy_dtype_promotion("standard"):  # optax divides floats by ints
            updates, opt_state = adam.update(grads, state.opt_state)
        params = jax.tree.map(
            lambda p, u: p - state.hyper["rate"] * noise * u, state.params, updates
        )
        running = {"seen": state.running["seen"] + taps.weights.sum(), "key": key}
        metrics = {"loss": loss, "bias": params["b"]}
        if saturated is not None:
            metrics["saturated"] = state.hyper["rate"] > saturated
        state = state._replace(step=state.step + 1, params=params, running=running)
        return state._replace(opt_state=opt_state), metrics

    def update(state, taps):
        if state.step.ndim:
            return jax.vmap(one, (0, None))(state, taps)
        return one(state, taps)

    return Trainer(init, update)


def a_batch(step):
    rng = np.random.default_rng(step)
    acts = rng.standard_normal((N, D)).astype(np.float32)
    return Taps(acts, None, np.ones(N, np.float32))


def take(data, step):
    rows = jax.random.permutation(jax.random.fold_in(data["key"], step), len(data["x"]))
    return Taps(data["x"][rows[:N]], None, jnp.ones(N))


def on_device():
    x = jax.random.normal(jax.random.key(5), (64, D))
    return Batches(take, {"x": x, "key": jax.random.key(6)})


class Stream:
    """Batches that depend on all that were drawn before."""

    def __init__(self, hook=None):
        self.rng, self.hook = np.random.default_rng(0), hook

    def __call__(self, step):
        if self.hook is not None:
            self.hook(step)
        acts = self.rng.standard_normal((N, D)).astype(np.float32)
        return Taps(acts, None, np.ones(N, np.float32))

    def state(self):
        return self.rng.bit_generator.state

    def restore(self, state):
        self.rng.bit_generator.state = state


def bits(tree):
    def of(x):
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            x = jax.random.key_data(x)
        return str(x.dtype), x.shape, np.asarray(x).tobytes()

    return jax.tree.map(of, tree)
