"""Child of test_several_processes.py: trains on a store, in one process or several.

Run as ``python several_child.py SETTINGS``, a JSON object: ``store``, ``mesh`` (devices
for examples and for latents) and what else is named below.  The first process prints a
line of JSON at the end.
"""

import json
import os
import signal
import sys

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType

import toyfeat as ft
from toyfeat import processes

DIM, LATENTS, K, BATCH = 8, 32, 4, 24


def build(settings, mesh):
    """Trainer and start of one dictionary, or of a population."""
    sae = ft.dictionaries.topk(DIM, LATENTS, K)
    if mesh is not None:
        sae = ft.dictionaries.shard(sae, mesh)
    trainer = ft.trainer(
        sae,
        ft.losses.default(sae),
        warm_up=settings.get("warm_up", 3),
        dead_after=5,
        revive=4,
        readouts=2,
    )
    if settings.get("members"):
        trainer = ft.population(trainer)
        keys = jax.random.split(jax.random.key(0), settings["members"])
        return trainer, jax.jit(trainer.init)(keys)
    key = jax.random.key(0)
    if settings.get("rate"):
        rate = settings["rate"]
        return trainer, jax.jit(lambda k: trainer.init(k, learning_rate=rate))(key)
    return trainer, jax.jit(trainer.init)(key)


def differ(settings, index):
    """Settings of this process, if they are to be different."""
    if index == 1:
        settings = settings | settings.get("second", {})
    return settings


def main(settings):
    several = processes.join_processes(heartbeat=10, timeout=60)
    index = processes.process_index()
    settings = differ(settings, index)
    mesh = None
    if settings.get("mesh"):
        shape, auto = tuple(settings["mesh"]), (AxisType.Auto,) * 2
        mesh = jax.make_mesh(shape, ("data", "latents"), axis_types=auto)
    store = ft.data.open_store(settings["store"])
    size = settings.get("batch", BATCH)
    batches = ft.data.store_batches(store, batch=size, seed=3, window=2, mesh=mesh)
    if settings.get("local"):
        batches = ft.data.store_batches(store, batch=size, seed=3, window=2)
    if settings.get("device"):
        acts = jax.random.normal(jax.random.key(settings.get("seed", 1)), (50, DIM))
        taps = ft.Taps(np.asarray(acts), np.ones((50, 2, DIM), np.float32), np.ones(50))
        taps = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), taps)
        batches = ft.data.array_batches(taps, batch=size, seed=0)
    trainer, state = build(settings, mesh)
    losses, hits = {}, settings.get("hits", {})

    def on_chunk(step, means):
        losses[step] = np.asarray(means["loss"]).tolist()
        if [index, step] in hits.get("kill", []):
            os.kill(os.getpid(), signal.SIGKILL)
        if [index, step] in hits.get("term", []):
            os.kill(os.getpid(), signal.SIGTERM)

    state = ft.fit(
        trainer,
        state,
        batches,
        steps=settings.get("steps", 12),
        chunk=2,
        checkpoint_every=2,
        directory=settings.get("folder"),
        on_chunk=on_chunk,
    )
    leaves = jax.tree.map(processes.to_host, (state.params, state.opt_state))
    key = processes.to_host(jax.random.key_data(state.running["key"]))
    if index == 0:
        report = {
            "params": jax.tree.map(np.ndarray.tolist, leaves[0]),
            "moments": [x.tolist() for x in jax.tree.leaves(leaves[1])],
            "key": key.tolist(),
            "losses": losses,
            "several": several,
            "split": str(state.params["W_enc"].sharding),
        }
        print("REPORT" + json.dumps(report), flush=True)


if __name__ == "__main__":
    try:
        main(json.loads(sys.argv[1]))
    except (ValueError, RuntimeError, OSError) as error:
        processes.leave(str(error))
