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

# %% Train four seeds in one program
trainer = ft.population(preset.trainer(split, task.params, steps=3000))
keys = jax.random.split(jax.random.key(2), 4)
state = trainer.init(keys, learning_rate=jnp.full(4, 3e-3))
batches = P.sparse_batches(jax.random.key(3), 5, probability=0.05, batch=256)
means = {}
state = ft.fit(
    trainer,
    state,
    batches,
    steps=3000,
    on_chunk=lambda step, chunk: means.update(chunk),
)

# %% Does each input have a part of its own, in each seed?
family = preset.importance_of(split)
alone = 0.75 * jnp.eye(5)
scores = []
for seed in range(4):
    member = jax.tree.map(lambda leaf, seed=seed: leaf[seed], state.params)
    _, importances, _ = P.importances(split, family, task.params, member, alone)
    parts = member["components"]["weight"]
    cosines = ft.metrics.mean_max_cosine(parts["V"], parts["U"], task.params["weight"])
    scores.append(cosines.mmcs)
    wrong = ft.metrics.identity_ci_error(importances["weight"], tolerance=0.2)
    loss = float(means["loss"][seed])
    print(f"seed {seed}: loss {loss:.5f}, MMCS {cosines.mmcs:.4f}, wrong: {wrong}")
