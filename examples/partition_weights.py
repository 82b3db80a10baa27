"""Split the weight of a toy model into parts of which each input needs few.

    python examples/partition_weights.py

Five inputs in two dimensions (toy models of superposition).  A short training, which
takes fewer parts and a higher rate than the published one (docs/partition.md).
"""

# %% The target
import jax
import jax.numpy as jnp

import toyfeat as ft

P = ft.partition
task = ft.planted.superposition(jax.random.key(0), steps=2000)
x = task.sample(jax.random.key(1), 256)
preset = P.spd_2025("5-2")
split = P.decompose_weights(task.probed, task.params, ["weight"], 8, x)
print("sites:", [site.name for site in split.sites])

# %% Train its parts
trainer = preset.trainer(split, task.params, steps=3000)
state = trainer.init(jax.random.key(2), learning_rate=3e-3)
batches = P.sparse_batches(jax.random.key(3), 5, probability=0.05, batch=256)
state = ft.fit(trainer, state, batches, steps=3000)
parts = state.params["components"]["weight"]

# %% Does each input have a part of its own?
family = preset.importance_of(split)
alone = 0.75 * jnp.eye(5)
_, importances, _ = P.importances(split, family, task.params, state.params, alone)
print(importances["weight"].round(2))
scores = ft.metrics.mean_max_cosine(parts["V"], parts["U"], task.params["weight"])
print(f"MMCS {scores.mmcs:.3f}, ML2R {scores.ml2r:.3f}")
