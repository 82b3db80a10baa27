"""Child process of test_shards.py: eight virtual devices against one.

Run as ``python shards_child.py TASK ROWS LATENTS TYPE``; prints one line of JSON.
"""

import contextlib
import json
import math
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


def largest_mask(score, k):
    """The oracle of a choice: a stable sort of each row, with NumPy."""
    mask = np.zeros(score.shape, bool)
    for row, kept in zip(score, mask, strict=True):
        order = np.argsort(-row, kind="stable")[:k]
        kept[order] = np.isfinite(row[order])
    return mask


def scores():
    """Scores with ties within shards and across them, and with what is not finite."""
    rng = np.random.default_rng(0)
    ties = rng.integers(-2, 3, (24, 64)).astype(np.float32)
    few = np.where(rng.uniform(size=ties.shape) < 0.1, ties, -np.inf)
    equal = np.zeros_like(ties)
    equal[:, [7, 8, 40]] = 1  # 7 and 8 are on two shards of 8
    return {
        "normal": rng.normal(size=ties.shape).astype(np.float32),
        "ties": ties,
        "few finite": few.astype(np.float32),
        "equal on two shards": equal,
    }


def check_choice(split):
    """Numbers of marks that differ from the oracle, for each kind of scores and k."""
    wrong = {}
    for name, score in scores().items():
        laid = jax.device_put(score, sharding(split, split.data, split.latents))
        for k, fewer in (
            (1, None),
            (2, None),
            (5, 3),
            (20, None),
            (20, 11),
            (64, None),
        ):

            def choose(score, fewer, k=k):
                return best_of_shards(score, k, fewer, split)

            where = sharding(split, split.data, split.latents)
            run = jax.jit(lambda *a, f=choose, w=where: run_automatic(split, f, w, *a))
            wanted = None if fewer is None else jnp.asarray(fewer, jnp.float32)
            marks = np.asarray(run(laid, wanted))
            oracle = largest_mask(score, fewer or k)
            wrong[f"{name}, {k}, {fewer}"] = int(np.sum(marks != oracle))
    return wrong


def check_cut(split):
    """Whether the codes above a cut are those of a sort of the whole batch."""
    rng, right = np.random.default_rng(1), {}
    codes = np.maximum(rng.normal(size=(24, 64)), 0).astype(np.float32)
    kinds = {
        "plain": codes,
        "one row": codes + 100 * (np.arange(24) == 3)[:, None].astype(np.float32),
        "one shard": codes * (np.arange(64) < 8),
        "tiny": 1e-30 * codes,
        "ties": np.round(2 * codes),
    }
    for name, values in kinds.items():
        values = values.astype(np.float32)
        where = sharding(split, split.data, split.latents)
        run = jax.jit(
            lambda x: run_automatic(
                split,
                lambda x: cut_of_batch(x, 2, None, None, split),
                sharding(split),
                x,
            )
        )
        cut = np.asarray(run(jax.device_put(values, where)))
        least = np.sort(values.ravel())[::-1][2 * 24 - 1]
        right[name] = bool(np.all((values >= cut) == (values >= least)))
    return right


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


def check_training(split, name, dictionary):
    """Train on the mesh and on one device, and look at what was exchanged."""
    with_grads = dictionary.architecture.reads_gradients
    options = {"data": split.data, "latents": split.latents}
    many = ft.dictionaries.shard(dictionary, split.mesh, **options)
    one, all_ = trainer_of(dictionary, with_grads), trainer_of(many, with_grads)
    start = {"key": jax.random.key(0), "learning_rate": 1e-2, "k": K - 1}
    if dictionary.config.k is None:
        del start["k"]
    alone = one.init(**start)
    state = jax.jit(lambda key: all_.init(**start | {"key": key}))(start["key"])
    by_example = NamedSharding(split.mesh, PartitionSpec(split.data))
    lay = jax.jit(lambda taps: taps, out_shardings=by_example)
    update = jax.jit(all_.update).lower(state, lay(batch_of(0, with_grads))).compile()
    alone_update, dead = jax.jit(one.update), 0.0
    for step in range(STEPS):
        taps = batch_of(step, with_grads)
        alone, metrics = alone_update(alone, taps)
        state, split_metrics = update(state, lay(taps))
        dead = max(dead, float(metrics["dead"]))
    report = {
        "params": difference(alone.params, state.params),
        "moments": difference(alone.opt_state, state.opt_state),
        "metrics": difference(metrics, split_metrics),
        "silent": difference(alone.running["silent"], state.running["silent"]),
        "most dead": dead,
        "specs": {
            "W_enc": spec_of(state.params["W_enc"]),
            "moment": spec_of(moment(state)["W_dec"]),
            "silent": spec_of(state.running["silent"]),
        },
        "exchanged": exchanged(update),
    }
    # Codes after training, of a batch that the axis of the examples does not divide.
    taps = batch_of(99, with_grads)
    for num in (EXAMPLES, 7):
        acts = taps.acts[:num]
        grads = None if taps.grads is None else taps.grads[:num]
        wanted = dictionary.forward(alone.params, acts, grads=grads)
        out = jax.jit(many.forward)(state.params, acts, grads=grads)
        codes = jax.jit(many.encode)(state.params, acts, grads=grads)
        recon = jax.jit(many.decode)(state.params, codes)
        pairs = [
            (wanted.codes, out.codes),
            (wanted.recon, out.recon),
            (wanted.grad_recon, out.grad_recon),
            (dictionary.encode(alone.params, acts, grads=grads), codes),
            (dictionary.decode(alone.params, np.asarray(codes)), recon),
        ]
        report[f"outputs of {num}"] = max(difference(*pair) for pair in pairs)
    return report


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
    return {
        "largest": max((max(x.sizes) for x in exchanges), default=0),
        "kinds": sorted({x.kind for x in exchanges}),
        "sources": [(max(x.sizes), x.kind, x.source[-60:]) for x in exchanges],
    }


def check_plain(split):
    """What the plain dictionary exchanges where its arrays lie as the split one's."""
    dictionary = dictionaries()["topk"]
    many = ft.dictionaries.shard(dictionary, split.mesh)
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


def main(task, rows, latents, kind):
    mesh = make_mesh(int(rows), int(latents), kind)
    names = mesh.axis_names
    split = Split(
        mesh, *(name if name in names else None for name in ("data", "latents"))
    )
    explicit = jax.set_mesh(mesh) if kind == "Explicit" else contextlib.nullcontext()
    with explicit:
        if task == "choice":
            report = {"choice": check_choice(split), "cut": check_cut(split)}
        elif task == "plain":
            report = check_plain(split)
        elif task == "fit":
            report = check_fit(split)
        else:
            report = check_training(split, task, dictionaries()[task])
    shards = math.prod(mesh.shape.values())
    report["dense of a shard"] = EXAMPLES * LATENTS // shards
    print(json.dumps(report))


if __name__ == "__main__":
    main(*sys.argv[1:])
