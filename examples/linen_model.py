"""Which directions does a flax model of your own read?  PCA beside gradient PCA.

    python examples/linen_model.py

An MLP learns (a . x)^2 behind a layer of 24 dimensions, which carries all 12 inputs at
different loudness.  One direction of that layer matters.  PCA of activations finds loud
directions, PCA of gradients the one that is read; a probe then keeps one of either and
asks what is left of the output.  A share below 0 says that a constant would be nearer.
"""

# %% A model of your own, trained as you train it
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import toyfeat as ft

model = nn.Sequential([nn.Dense(24), nn.Dense(32), nn.relu, nn.Dense(1)])
loudness = jnp.linspace(0.5, 2.0, 12)
x = jax.random.normal(jax.random.key(0), (2000, 12)) * loudness
a = jnp.zeros(12).at[2].set(1.0)  # one of the quiet inputs
target = jnp.square(x @ a)
params = model.init(jax.random.key(1), x)


def mean_loss(params):
    """Return the mean squared error."""
    outputs = jnp.asarray(model.apply(params, x))  # [2000, 1]
    return jnp.mean(jnp.square(outputs[:, 0] - target))


optimizer = optax.adam(1e-2)


@jax.jit
def train_step(params, state):
    """Take one step of Adam on all examples."""
    updates, state = optimizer.update(jax.grad(mean_loss)(params), state)
    return optax.apply_updates(params, updates), state


state = optimizer.init(params)
for _ in range(500):
    params, state = train_step(params, state)
print(f"error of the model: {float(mean_loss(params) / jnp.var(target)):.4f}")

# %% Activations and gradients at a site
probed = ft.from_linen(model)
print("sites:", list(ft.site_shapes(probed, params, x)))
readout = ft.readouts.scalar(lambda output: output[0])
taps = ft.tap(probed, params, x, sites="layers_0", readout=readout)["layers_0"]
moments = ft.moments_of(taps)

# %% One direction of either kind
bases = {"PCA": ft.pca(moments, 1), "gradient PCA": ft.gradient_pca(moments, 1)}
for name, basis in bases.items():
    print(name, ft.describe(basis))

# %% What is left of the output if only that direction is kept?
outputs, _ = probed(params, x, {})
kept = {}
for name, basis in bases.items():

    def keep(acts, basis=basis):
        """Replace activations by what the basis keeps of them."""
        return ft.decode(basis, ft.encode(basis, acts))

    projected, _ = probed(params, x, {"layers_0": keep})
    left = jnp.mean(jnp.square(projected - outputs)) / jnp.var(outputs)
    kept[name] = 1 - float(left)
    print(f"{name}: {kept[name]:.0%} of the output's variance is kept")
