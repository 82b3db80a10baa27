"""Sixteen dictionaries in one program, their table, and their Pareto front.

    python examples/pareto_sweep.py

Four coefficients of the attribution loss by four learning rates, on a model whose
features are known: how many latents are active against how much of the activations is
left unexplained.
"""

# %% Activations and gradients of a model with known features
import tempfile

import jax

import toyfeat as ft

task = ft.planted.superposition(jax.random.key(0), steps=1000)
inputs = task.sample(jax.random.key(1), 8000)
readout = ft.readouts.half_squared_norm()
taps = ft.tap(task.probed, task.params, inputs, sites=task.site, readout=readout)
taps = taps[task.site]

# %% A grid of settings, trained side by side
sae = ft.dictionaries.standard(taps.acts.shape[1], 16)
trainer = ft.population(ft.trainer(sae, ft.losses.attribution(sae)))
settings = ft.sweeps.grid(
    sparsity=[0.03, 0.1, 0.3, 1.0], learning_rate=[1e-3, 3e-3, 1e-2, 3e-2]
)
settings["attribution_sparsity"] = settings["sparsity"]
state = trainer.init(settings.pop("keys"), **settings)
batches = ft.data.array_batches(taps, batch=512, seed=0)
with tempfile.TemporaryDirectory() as folder:
    state = ft.fit(trainer, state, batches, steps=800, directory=folder)
    metrics = ft.sweeps.final_metrics(folder)

# %% The table, and what no other member beats
members = ft.sweeps.table(state, metrics)
figures = sorted(members[0].figures)
print("figures:", ", ".join(figures))
front = ft.sweeps.pareto_front(members, "l0", "fvu")
for member in front:
    chosen = {name: f"{value:.3g}" for name, value in member.settings.items()}
    print(f"l0 {member.figures['l0']:.2f}, fvu {member.figures['fvu']:.3f}:", chosen)
