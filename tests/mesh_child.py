"""Child of test_meshes.py: all that takes batches, on a mesh or on one device.

Run as ``python mesh_child.py LAYOUTS FOLDER``: ``one`` lays nothing out, ``auto`` and
``explicit`` split the examples over all devices, those of other processes too.  For
each the first process writes the numbers of every case to ``FOLDER/LAYOUT.json``.
"""

import contextlib
import json
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import toyfeat as ft
from toyfeat import processes
from toyfeat.decompose import encode, interaction_edges
from toyfeat.meshes import copy_everywhere, is_explicit
from toyfeat.moments import sketched_moments
from toyfeat.partition import losses

sys.path.insert(0, str(Path(__file__).parent / "lens"))
import tiny_lens_model as tiny

BATCH, DIM = 16, 6
SITE = "layers_0"
MODEL = nn.Sequential([nn.Dense(DIM), nn.relu, nn.Dense(5)])


def draw(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


class Layout:
    """Puts arrays of the host on the devices of a mesh."""

    def __init__(self, name):
        self.name, self.mesh = name, None
        if name != "one":
            kind = {"auto": AxisType.Auto, "explicit": AxisType.Explicit}[name]
            shape = (jax.device_count(),)
            self.mesh = jax.make_mesh(shape, ("data",), axis_types=(kind,))

    def context(self):
        explicit = self.mesh is not None and is_explicit(self.mesh)
        return jax.set_mesh(self.mesh) if explicit else contextlib.nullcontext()

    def rows(self, tree):
        if self.mesh is None:
            return jax.tree.map(jnp.asarray, tree)
        where = NamedSharding(self.mesh, PartitionSpec("data"))

        def put(x):
            return jax.make_array_from_callback(x.shape, where, lambda at: x[at])

        return jax.tree.map(put, tree)

    def whole(self, tree):
        tree = jax.tree.map(jnp.asarray, tree)
        return tree if self.mesh is None else copy_everywhere(tree, self.mesh)


def linen(layout, positions=()):
    x = draw(BATCH, *positions, 4)
    params = MODEL.init(jax.random.key(1), x[:1])
    return ft.from_linen(MODEL), layout.whole(params), layout.rows(x)


def tap_one(layout, readout=None, **options):
    probed, params, x = linen(layout)
    readout = readout or ft.readouts.half_squared_norm()
    return ft.tap(probed, params, x, sites=SITE, readout=readout, **options)[SITE]


def case_tap(layout):
    labels = layout.rows(np.arange(BATCH) % 5)
    loss = optax.softmax_cross_entropy_with_integer_labels
    key = jax.random.key(3)
    readouts = [
        ft.readouts.half_squared_norm(),
        ft.readouts.jacobian(),
        ft.readouts.random_directions(key, 2),
        ft.readouts.loss(loss, labels, ignore=1),
        ft.readouts.along_path(ft.readouts.half_squared_norm(), jnp.array([0.5, 1.0])),
    ]
    taps = [tap_one(layout, readout) for readout in readouts]
    ft.check_taps(taps[0])
    return taps, tap_one(layout, batch_size=8), tap_one(layout, batch_size=3)


def case_compiled_tap(layout):
    probed, params, x = linen(layout, (3,))
    sites = ("layers_2", SITE)  # not in the order of their names

    @jax.jit
    def run(params, x):
        readout = ft.readouts.half_squared_norm()
        taps = ft.tap(probed, params, x, sites=sites, readout=readout)
        assert tuple(taps) == sites
        return taps

    return run(params, x)


def accumulated(layout, accumulator):
    taps = tap_one(layout)
    state = accumulator.update(accumulator.init(), taps)
    state = jax.jit(accumulator.update)(state, taps)
    return accumulator.finish(accumulator.merge(state, state))


def case_moments(layout):
    whole = accumulated(layout, ft.moments(DIM))
    return whole, ft.moments_of(tap_one(layout))


def case_bases(layout):
    # Subspaces and spectra of the sketch; its vectors have free signs.
    stats = accumulated(layout, ft.moments(DIM))
    sketch = accumulated(layout, sketched_moments(DIM, 3))
    bases = [find(stats, 3) for find in (ft.pca, ft.gradient_pca, ft.joint_pca)]
    codes = [encode(basis, tap_one(layout).acts) for basis in bases]
    return bases, codes, ft.joint_pca(sketch, 2).spectrum, sketch.mean


def case_interaction(layout):
    probed, params, x = linen(layout)

    def batches():
        return iter([x, x])

    bases = ft.local_interaction_basis(
        probed, params, batches, sites=[SITE, "layers_2"]
    )
    return bases, interaction_edges(probed, params, batches, bases)


def case_singular_values(layout):
    rows, key = layout.rows(draw(64, 12, seed=4)), jax.random.key(0)
    stream = ft.linalg.stream_svd(12, 3)
    state = stream.update(stream.init(), rows)
    return ft.linalg.randomized_svd(key, rows, rank=3).s, stream.finish(state).s


def case_many_rows(layout):
    """More rows than are summed at once, the scales of the devices far apart."""
    num = 8 * 640
    acts = (
        draw(num, DIM, seed=5) * np.geomspace(1e-3, 1e3, num, dtype=np.float32)[:, None]
    )
    weights = np.ones(num, np.float32)
    state = ft.moments_of(layout.rows(ft.Taps(acts, acts[:, None], weights)))
    stream = ft.linalg.stream_svd(DIM, 3)
    sums = stream.update(stream.init(), layout.rows(acts))
    return state.mean, state.scatter / 1e6, state.grad_second, stream.finish(sums).s


def fit_lens(layout, family=ft.lenses.mean_jacobian, **options):
    accumulator = family(tiny.model(), 8, **tiny.SKIP, **options)
    tokens, mask = tiny.windows(16), np.ones((16, 6), np.float32)
    mask[3, 5] = 0
    batches = [
        tuple(layout.rows(x[first : first + 8]) for x in (tokens, mask))
        for first in (0, 8)
    ]
    params = layout.whole(tiny.weights())
    state = ft.lenses.fit(tiny.model(), accumulator, params, batches)
    return accumulator.finish(state)


def case_lenses(layout):
    sites = tiny.model().sites[:-1]
    acts = layout.rows(draw(16, 8))
    centres = ft.lenses.cluster_centres(jax.random.key(2), acts, 2)
    return [
        fit_lens(layout),
        fit_lens(layout, chunk=3, cotangents=4, key=jax.random.key(5)),
        fit_lens(layout, chain=True),
        fit_lens(layout, ft.lenses.second_moment),
        fit_lens(layout, centres=dict.fromkeys(sites, centres)),
    ]


def case_lens_in_parts(layout):
    params = layout.whole(tiny.weights())
    inputs = layout.rows(tiny.windows(8))
    sketch = ft.lenses.sketched_jacobian(
        jax.random.key(0), tiny.model(), params, inputs, rank=3, **tiny.SKIP
    )
    tuned = ft.lenses.tuned_lens(tiny.model(), params, [(inputs, None)], steps=3)
    return sketch, tuned.maps


def case_lens_goes_on(layout):
    """The fit of twice the batches, stopped in the middle."""
    folder = Path(sys.argv[2]) / f"lens-{layout.name}"
    accumulator = ft.lenses.mean_jacobian(tiny.model(), 8, **tiny.SKIP)
    params = layout.whole(tiny.weights())
    batches = [(layout.rows(tiny.windows(8, seed=i)), None) for i in range(4)]
    reports = []
    for num in (2, 4):
        state = ft.lenses.fit(
            tiny.model(),
            accumulator,
            params,
            batches[:num],
            directory=folder,
            checkpoint_every=2,
            on_progress=lambda progress: reports.append(progress.prompts),
        )
    assert reports == [16, 32]
    return accumulator.finish(state)


def tied(params, x):
    return jax.nn.relu(x @ params["w"] @ params["w"].T)


def fit_rows(layout, trainer, keys, make_taps):
    """Parameters after some steps on batches of the host, and the last losses."""
    state = layout.whole(trainer.init(keys))
    end = {}

    def batches(step):
        return layout.rows(jax.tree.map(np.asarray, make_taps(int(step))))

    options = {"chunk": 2, "progress": False, "on_chunk": lambda step, x: end.update(x)}
    params = ft.fit(trainer, state, batches, steps=4, **options).params
    return params, end["loss"]


def case_parts_of_weights(layout):
    params = {"w": draw(3, 2, seed=7)}
    identity = np.eye(3, dtype=np.float32)
    split = ft.partition.decompose_weights(tied, params, "w", 4, identity)
    family = ft.partition.importance.per_component(split, 3)
    objective = (losses.importance(1e-2), losses.stochastic(), losses.layerwise())
    trainer = ft.partition.trainer(split, params, objective, family, steps=4, warm_up=2)
    batches = ft.partition.sparse_batches(
        jax.random.key(1), 3, probability=0.2, batch=16, join_zeros=False
    )
    keys = jax.random.split(jax.random.key(0), 2)
    return [
        fit_rows(layout, trainer, keys[0], batches),
        fit_rows(layout, ft.population(trainer), keys, batches),
        fit_rows(layout, ft.population(trainer, group=1), keys, batches),
    ]


def case_dictionary(layout):
    sae = ft.dictionaries.topk(DIM, 16, 3)
    trainer = ft.trainer(sae, ft.losses.default(sae))

    def make_taps(step):
        return ft.Taps(draw(16, DIM, seed=100 + step), None, np.ones(16, np.float32))

    return fit_rows(layout, trainer, jax.random.key(0), make_taps)


CASES = {name[5:]: fn for name, fn in globals().items() if name.startswith("case_")}


def run_cases(layout):
    """Leaves of the results of every case."""
    results = {}
    for name, run in CASES.items():
        try:
            with layout.context():
                leaves = jax.tree.leaves(run(layout))
        except Exception as error:
            error.add_note(f"in the case {name}")
            raise
        results[name] = [processes.to_host(x).tolist() for x in leaves]
    return results


def main(layouts, folder):
    processes.join_processes(heartbeat=10, timeout=60)
    for name in layouts.split(","):
        results = run_cases(Layout(name))
        if processes.process_index() == 0:
            Path(folder, f"{name}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
