"""Runs our decompositions for the benchmark, in a process of its own.

The protocol is that of ``peers/worker.py``.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as tf
from toyfeat.linalg.gram import scaled_gram
from toyfeat.linalg.operators import dense


def svd(a: jax.Array, rank: int, **options: Any) -> tuple[Any, dict]:
    """``randomized_svd``, vmapped over a batch."""

    def one(key: jax.Array, a: jax.Array) -> Any:
        return tf.randomized_svd(key, a, rank, **options)

    key = jax.random.key(0)
    many = a.ndim == 3
    fn = jax.vmap(one) if many else one
    keys = jax.random.split(key, len(a)) if many else key
    start = time.perf_counter()
    compiled = jax.jit(fn).lower(keys, a).compile()
    seconds = time.perf_counter() - start
    out = compiled(keys, a)
    info = {
        "route": out.info.method,
        "width": out.info.width,
        "passes": out.info.passes,
        "fallback": bool(np.any(out.info.fallback)),
        "compile_s": seconds,
    }
    return lambda: jax.block_until_ready(compiled(keys, a)), info


def passes(a: jax.Array, rank: int, **options: Any) -> tuple[Any, dict]:
    """The products of a decomposition alone, in their fastest orientation."""
    plan = jax.eval_shape(
        lambda key: tf.randomized_svd(key, a, rank, **options).info, jax.random.key(0)
    )
    op, width = dense(a, len(a)), plan.width

    def chain(z: jax.Array) -> Any:
        if plan.method == "gram":
            gram = scaled_gram(a, jnp.ones(()))
            return gram, op.forward(z) if options.get("compute_u", True) else ()
        kept = []
        for index in range((plan.passes + 1) // 2):
            y = op.forward(z)
            kept.append(y)
            if 2 * index + 1 < plan.passes:
                z = op.backward(y) * 1e-3
        return kept

    z = jax.random.normal(jax.random.key(1), (min(width, a.shape[1]), a.shape[1]))
    compiled = jax.jit(chain).lower(z).compile()
    return lambda: jax.block_until_ready(compiled(z)), {"scored": False}


METHODS = {"toyfeat": svd, "toyfeat, its products alone": passes}


def main() -> None:
    """Answer until the input ends."""
    array, run, result = jnp.zeros(()), lambda: None, None
    for line in sys.stdin:
        order = json.loads(line)
        answer: dict = {}
        if order["op"] == "load":
            array = jnp.asarray(np.load(order["path"]))
        elif order["op"] == "prepare":
            run, answer = METHODS[order["method"]](
                array, order["rank"], **order["options"]
            )
            result = run()
        elif order["op"] == "run":
            start = time.perf_counter()
            result = run()
            answer["seconds"] = time.perf_counter() - start
        elif order["op"] == "save":
            assert isinstance(result, tf.SVD)
            v = np.swapaxes(np.asarray(result.vt), -1, -2)
            np.savez(order["path"], s=np.asarray(result.s), v=v)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
