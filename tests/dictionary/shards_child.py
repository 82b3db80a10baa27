"""Child process of test_shards.py: eight virtual devices against one.

Run as ``python shards_child.py TASK '[ROWS, LATENTS, "TYPE"]' ...``, with 0 for an axis
that the mesh lacks; prints one line of JSON, a report for each mesh.
"""

import contextlib
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import toyfeat as ft
from toyfeat.dictionary.selection import cut_of_batch
from toyfeat.dictionary.shard_selection import best_of_shards
from toyfeat.dictionary.shards import Split, run_automatic, sharding

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from collectives import read_collectives

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")

DIM, LATENTS, K, EXAMPLES = 8, 512, 4, 160
STEPS = 4


def make_mesh(rows, latents, kind):
    """A mesh of eight devices; an axis of 0 is left out."""
    axes = {"data": rows, "latents": latents}
    axes = {name: size for name, size in axes.items() if size}
    types = (AxisType[kind],) * len(axes)
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=types)


def largest_mask(score, k, fewer):
    """The oracle of a choice: a stable sort of each row, with NumPy."""
    mask = np.zeros(score.shape, bool)
    for row, kept in zip(score, mask, strict=True):
        order = np.argsort(-row, kind="stable")[: fewer or k]
        kept[order] = np.isfinite(row[order])
    return mask


def scores():
    """Scores of six kinds, four rows each: ties, some across shards, and no numbers."""
    rng = np.random.default_rng(0)
    normal = rng.normal(size=(4, 64))
    ties = rng.integers(-2, 3, normal.shape)
    few = np.where(rng.uniform(size=normal.shape) < 0.1, ties, -np.inf)
    equal = np.zeros(normal.shape)
    equal[:, [7, 8, 40]] = 1  # 7 and 8 are on two shards of 8
    infinite = np.where(normal > 1.5, np.inf, normal)
    kinds = normal, ties, few, equal, infinite, np.zeros(normal.shape)
    return np.concatenate(kinds).astype(np.float32)


def check_choice(split):
    """Rows whose marks differ from the oracle, for each number of scores."""
    score, where = scores(), sharding(split, split.data, split.latents)
    laid, wrong = jax.device_put(score, where), {}
    for k, fewer in ((1, None), (2, None), (5, 3), (20, None), (20, 11), (64, None)):

        def choose(score, fewer, k=k):
            return best_of_shards(score, k, fewer, split)

        run = jax.jit(lambda *args, f=choose: run_automatic(split, f, where, *args))
        wanted = None if fewer is None else jnp.asarray(fewer, jnp.float32)
        differs = np.asarray(run(laid, wanted)) != largest_mask(score, k, fewer)
        wrong[f"{k}, {fewer}"] = np.flatnonzero(differs.any(axis=1)).tolist()
    return wrong


def check_cut(split):
    """Batches whose codes above the cut are not those of a sort."""
    rng, wrong = np.random.default_rng(1), []
    codes = np.maximum(rng.normal(size=(24, 64)), 0)
    kinds = {
        "plain": codes,
        "one row": codes + 100 * (np.arange(24) == 3)[:, None],
        "one shard": codes * (np.arange(64) < 8),
        "tiny": 1e-30 * codes,
        "ties": np.round(2 * codes),
    }

    def cut(codes):
        return cut_of_batch(codes, 2, None, None, split)

    run = jax.jit(lambda codes: run_automatic(split, cut, sharding(split), codes))
    for name, values in kinds.items():
        values = values.astype(np.float32)
        laid = jax.device_put(values, sharding(split, split.data, split.latents))
        least = np.sort(values.ravel())[::-1][2 * 24 - 1]
        if np.any((values >= np.asarray(run(laid))) != (values >= least)):
            wrong.append(name)
    return wrong


def dictionaries():
    make = ft.dictionaries
    return {
        "topk": make.topk(DIM, LATENTS, K),
        "signed": make.topk(DIM, LATENTS, K, signed=True),
        "k above a shard": make.topk(DIM, LATENTS, LATENTS // 4),
        "batchtopk": make.batch_topk(DIM, LATENTS, K),
        "matryoshka": make.matryoshka(DIM, LATENTS, K, widths=(30, 200, LATENTS)),
        "gradient_topk": make.gradient_topk(DIM, LATENTS, K),
        "paired": make.paired(DIM, LATENTS, K),
        "standard": make.standard(DIM, LATENTS),
    }


def batch_of(step, with_grads):
    """Taps of some directions, the first examples without weight."""
    key = jax.random.fold_in(jax.random.key(5), step)
    acts = jax.random.normal(key, (EXAMPLES, DIM)) ** 3
    shape = EXAMPLES, 2, DIM
    grads = jax.random.normal(jax.random.fold_in(key, 1), shape) if with_grads else None
    return ft.Taps(acts, grads, jnp.ones(EXAMPLES).at[:3].set(0))


def trainer_of(dictionary, with_grads):
    objective = ft.losses.default(dictionary)
    options = {"readouts": 2 if with_grads else 1, "dead_after": 2, "revive": 3}
    return ft.trainer(dictionary, objective, **options)


def train_alone(dictionary, start):
    """States and metrics of every step on one device."""
    with_grads, states = dictionary.architecture.reads_gradients, []
    trainer = trainer_of(dictionary, with_grads)
    state, update = trainer.init(**start), jax.jit(trainer.update)
    for step in range(STEPS):
        state, metrics = update(state, batch_of(step, with_grads))
        states.append((state, metrics))
    return states


def check_training(split, dictionary, start, alone):
    """Train on the mesh, and look at what was exchanged."""
    with_grads = dictionary.architecture.reads_gradients
    options = {"data": split.data, "latents": split.latents}
    many = ft.dictionaries.shard(dictionary, split.mesh, **options)
    trainer = trainer_of(many, with_grads)
    state = jax.jit(lambda key: trainer.init(**start | {"key": key}))(start["key"])
    by_example = NamedSharding(split.mesh, PartitionSpec(split.data))
    lay = jax.jit(lambda taps: taps, out_shardings=by_example)
    update = jax.jit(trainer.update)
    update = update.lower(state, lay(batch_of(0, with_grads))).compile()
    report = {"params": 0.0, "moments": 0.0, "metrics": 0.0, "silent": 0.0, "dead": 0.0}
    for step, (expected, metrics) in enumerate(alone):
        state, found = update(state, lay(batch_of(step, with_grads)))
        pairs = {
            "params": (expected.params, state.params),
            "moments": (expected.opt_state, state.opt_state),
            "metrics": (metrics, found),
            "silent": (expected.running["silent"], state.running["silent"]),
            "dead": (0 * metrics["dead"], metrics["dead"]),
        }
        for name, pair in pairs.items():
            report[name] = max(report[name], difference(*pair))
    report["specs"] = {
        "W_enc": spec_of(state.params["W_enc"]),
        "moment": spec_of(moment(state)["W_dec"]),
        "silent": spec_of(state.running["silent"]),
    }
    return report | {"exchanged": exchanged(update), "outputs": 0.0}, many, state


def check_outputs(dictionary, params, many, split_params):
    """Largest difference of codes and reconstructions, also of a ragged batch."""
    taps, sizes = batch_of(99, dictionary.architecture.reads_gradients), []
    encode, decode, forward = map(jax.jit, (many.encode, many.decode, many.forward))
    for num in (EXAMPLES, 7):
        acts = taps.acts[:num]
        grads = None if taps.grads is None else taps.grads[:num]
        wanted = dictionary.forward(params, acts, grads=grads)
        out = forward(split_params, acts, grads=grads)
        codes = encode(split_params, acts, grads=grads)
        pairs = [
            (wanted.codes, out.codes),
            (wanted.recon, out.recon),
            (wanted.grad_recon, out.grad_recon),
            (dictionary.encode(params, acts, grads=grads), codes),
            (dictionary.decode(params, np.asarray(codes)), decode(split_params, codes)),
        ]
        sizes += [difference(*pair) for pair in pairs]
    return max(sizes)


def check_task(task, splits):
    """Report of each mesh for one dictionary."""
    dictionary, reports = dictionaries()[task], []
    start = {"key": jax.random.key(0), "learning_rate": 1e-2}
    if dictionary.config.k == K:
        start["k"] = K - 1
    alone = train_alone(dictionary, start)
    for number, split in enumerate(splits):
        with enter(split.mesh):
            report, *end = check_training(split, dictionary, start, alone)
            if number == 0:  # the same functions on every mesh
                params = alone[-1][0].params
                report["outputs"] = check_outputs(
                    dictionary, params, end[0], end[1].params
                )
        reports.append(report)
    return reports


def spec_of(array):
    """Axes of the mesh that split an array, None for those that are whole."""
    return [*array.sharding.spec, *[None] * array.ndim][: array.ndim]


def moment(state):
    return state.opt_state.inner_state[0].mu


def difference(tree, other):
    """Largest difference in units of the largest entry, or of 1."""
    leaves = zip(jax.tree.leaves(tree), jax.tree.leaves(other), strict=True)
    sizes = [0.0]
    for x, y in leaves:
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        sizes.append(float(np.max(np.abs(x - y)) / max(np.max(np.abs(x)), 1)))
    return max(sizes)


def exchanged(compiled):
    exchanges = read_collectives(compiled.as_text())
    largest = max((max(x.sizes) for x in exchanges), default=0)
    return {
        "largest": largest,
        "kinds": sorted({x.kind for x in exchanges}),
        "sources": [(max(x.sizes), x.kind, x.source[-60:]) for x in exchanges],
    }


def check_plain(split):
    """What the plain dictionary exchanges where its batch lies on the mesh."""
    dictionary = dictionaries()["topk"]
    many = ft.dictionaries.shard(dictionary, split.mesh, latents=split.latents)
    state = jax.jit(trainer_of(many, False).init)(jax.random.key(0))
    by_example = NamedSharding(split.mesh, PartitionSpec(split.data))
    taps = jax.device_put(batch_of(0, False), by_example)
    update = jax.jit(trainer_of(dictionary, False).update)
    return exchanged(update.lower(state, taps).compile())


def check_fit(split):
    """Loops of ``fit``: one dictionary and a population, on the mesh and alone."""
    dictionary = dictionaries()["batchtopk"]
    many = ft.dictionaries.shard(dictionary, split.mesh)
    sizes = {}
    one, all_ = trainer_of(dictionary, False), trainer_of(many, False)
    key = jax.random.key(1)
    for name, wrap, keys in (
        ("one", lambda x: x, key),
        ("population", ft.population, jax.random.split(key, 3)),
    ):
        ends = [
            ft.fit(
                wrap(x), wrap(x).init(keys), lambda step: batch_of(step, False), steps=4
            )
            for x in (one, all_)
        ]
        sizes[name] = difference(ends[0].params, ends[1].params)
        sizes[f"{name} spec"] = spec_of(ends[1].params["W_enc"])
    return sizes


def enter(mesh):
    """The context of a mesh whose axes are explicit."""
    explicit = AxisType.Explicit in mesh.axis_types
    return jax.set_mesh(mesh) if explicit else contextlib.nullcontext()


def main(task, *meshes):
    splits, reports = [], []
    for rows, latents, kind in map(json.loads, meshes):
        mesh, names = make_mesh(rows, latents, kind), ("data", "latents")
        names = (name if name in mesh.axis_names else None for name in names)
        splits.append(Split(mesh, *names))
    if task in dictionaries():
        reports = check_task(task, splits)
    else:
        checks = {"choice": check_choice, "cut": check_cut}
        checks |= {"plain": check_plain, "fit": check_fit}
        for split in splits:
            with enter(split.mesh):
                reports.append(checks[task](split))
    print(json.dumps(reports))


if __name__ == "__main__":
    main(*sys.argv[1:])
