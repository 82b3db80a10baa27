"""Does gradient times activation say what leaving a latent out does?

    pip install "toyfeat[sae]"
    python examples/saelens_faithfulness.py

Writes a dictionary in SAELens' files, reads it as you would read anyone's, and compares
the attribution of each latent with the change of the output when the latent is left out
of the model.
"""

# %% A dictionary on disk, here trained in seconds
import tempfile

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft

task = ft.planted.ignored_structure(jax.random.key(0))
inputs = task.sample(jax.random.key(1), 6000)
readout = ft.readouts.half_squared_norm()
site = task.site
taps = ft.tap(task.probed, task.params, inputs, sites=site, readout=readout)[site]
sae = ft.dictionaries.topk(taps.acts.shape[1], 64, 6)
trainer = ft.trainer(sae, ft.losses.default(sae))
state = trainer.init(jax.random.key(2), learning_rate=3e-3)
batches = ft.data.array_batches(taps, batch=512, seed=0)
state = ft.fit(trainer, state, batches, steps=600)
folder = tempfile.TemporaryDirectory()
about = {"model_name": "toy", "hook_name": site}
ft.interop.save_saelens(folder.name, sae, ft.denormalized(sae, state), metadata=about)

# %% Read it
sae, params = ft.interop.load_saelens(folder.name)
acts, grads = taps.acts[:200], jnp.asarray(taps.grads)[:200, 0]
codes = sae.encode(params, acts)
attributions = codes * (grads @ params["W_dec"].T)  # [examples, latents]

# %% Leave out each active latent of each example, one after the other
examples, latents = np.nonzero(np.asarray(codes))
parts = codes[examples, latents, None] * params["W_dec"][latents]
repeated = jax.tree.map(lambda leaf: leaf[examples], inputs)


def output_size(probes):
    """Return half the squared norm of each output under probes."""
    outputs, _ = task.probed(task.params, repeated, probes)
    return 0.5 * jnp.sum(outputs.reshape(len(examples), -1) ** 2, axis=1)


change = output_size({site: lambda acts: acts - parts}) - output_size({})

# %% How well does the first order predict it?
predicted = -attributions[examples, latents]
score = ft.metrics.attribution_faithfulness(predicted, change)
print(f"{score.pairs} pairs, correlation {score.correlation:.3f}")
print(f"slope {score.slope:.2f}, squared error {score.error:.0%} of the true effects")
folder.cleanup()
