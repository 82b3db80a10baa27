"""The same for equinox, whose models take one example: from_equinox maps them.

    pip install "toyfeat[equinox]"
    python examples/equinox_model.py

A residual network with one shared layer.  Its sites are the paths of its modules, and a
module that is called twice has a site for either call.
"""

# %% A model of your own
import equinox as eqx
import jax
import jax.numpy as jnp

import toyfeat as ft


class Residual(eqx.Module):
    """Two steps of a shared layer, and a head."""

    shared: eqx.nn.Linear
    head: eqx.nn.Linear

    def __init__(self, key):
        first, second = jax.random.split(key)
        self.shared = eqx.nn.Linear(8, 8, key=first)
        self.head = eqx.nn.Linear(8, 3, key=second)

    def __call__(self, x):
        """Compute the three outputs of one example ``[8]``."""
        for _ in range(2):
            x = x + jax.nn.gelu(self.shared(x))
        return self.head(x)


model = Residual(jax.random.key(0))
x = jax.random.normal(jax.random.key(1), (600, 8))

# %% Its sites
probed, params = ft.from_equinox(model)
for site, shape in ft.site_shapes(probed, params, x).items():
    print(site, shape.shape)

# %% Does one example see another?  Batch norm in training mode would
ft.check_no_mixing(probed, params, x[:8])

# %% Which directions of the second call's output tell the first label from the second?
labels = ft.readouts.logit_difference(0, 1)
taps = ft.tap(probed, params, x, sites="shared#1", readout=labels)["shared#1"]
basis = ft.gradient_pca(ft.moments_of(taps), 2)
difference = model.head.weight[0] - model.head.weight[1]
reader = basis.readers[:, 0] / jnp.linalg.norm(basis.readers[:, 0])
cosine = jnp.abs(reader @ difference) / jnp.linalg.norm(difference)
print(f"spectrum {basis.spectrum.round(4)}, |cos| with the head {float(cosine):.3f}")
