"""The same for flax nnx: from_nnx returns the probed model and its parameters.

    python examples/nnx_model.py

A small classifier of points in three rings.  Its gradients are those of labels that it
draws itself, whose second moment is its Fisher matrix.
"""

# %% A model of your own
import jax
import jax.numpy as jnp
import optax
from flax import nnx

import toyfeat as ft


class Classifier(nnx.Module):
    """An MLP with one hidden layer."""

    def __init__(self, rngs):
        self.hidden = nnx.Linear(2, 48, rngs=rngs)
        self.head = nnx.Linear(48, 3, rngs=rngs)

    def __call__(self, x):
        """Compute the three logits of points ``[B, 2]``."""
        return self.head(nnx.relu(self.hidden(x)))


keys = jax.random.split(jax.random.key(0), 3)
labels = jax.random.randint(keys[0], (1500,), 0, 3)
angle = jax.random.uniform(keys[1], (1500,), maxval=2 * jnp.pi)
radius = 1.0 + labels + 0.15 * jax.random.normal(keys[2], (1500,))
x = radius[:, None] * jnp.stack([jnp.cos(angle), jnp.sin(angle)], 1)
model = Classifier(nnx.Rngs(0))

# %% Train it as you train it
optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)


@nnx.jit
def train_step(model, optimizer):
    """Take one step of Adam on all points."""

    def loss(model):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), labels).mean()

    value, grads = nnx.value_and_grad(loss)(model)
    optimizer.update(model, grads)
    return value


for _ in range(300):
    value = train_step(model, optimizer)
print(f"cross-entropy {float(value):.3f}")

# %% Gradients of labels that the model draws
probed, params = ft.from_nnx(model)
readout = ft.readouts.sampled_labels(num=4, key=jax.random.key(1))
taps = ft.tap(probed, params, x, sites="hidden", readout=readout)["hidden"]
moments = ft.moments_of(taps)

# %% In how many dimensions does the site vary, and how many are read?
spectra = {
    "activations": ft.pca(moments, 6).spectrum,
    "gradients": ft.gradient_pca(moments, 6).spectrum,
}
for name, values in spectra.items():
    print(name, *(f"{share:.3f}" for share in values / values.sum()))
