"""Run our decompositions for a benchmark, in a process of its own.

The protocol is that of ``worker.py`` beside this file.
"""

import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import toyfeat as ft
from toyfeat.linalg.gram import unit_gram
from toyfeat.linalg.randomized.operators import from_array


def svd(a: jax.Array, rank: int, **options: Any) -> tuple[Any, dict]:
    """Compile ``randomized_svd``, mapped over a batch."""

    def decompose(key: jax.Array, a: jax.Array) -> Any:
        return ft.linalg.randomized_svd(key, a, rank, **options)

    key = jax.random.key(0)
    batched = a.ndim == 3
    fn = jax.vmap(decompose) if batched else decompose
    keys = jax.random.split(key, len(a)) if batched else key
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
    """Compile the products of a decomposition alone, in their fastest orientation."""
    plan = jax.eval_shape(
        lambda key: ft.linalg.randomized_svd(key, a, rank, **options).info,
        jax.random.key(0),
    )
    op, width, one = from_array(a, len(a)), plan.width, jnp.ones(())

    def chain(z: jax.Array) -> Any:
        if plan.method == "gram":
            gram = unit_gram(a)
            return gram, op.forward(z, one) if options.get("compute_u", True) else ()
        products = []
        for index in range((plan.passes + 1) // 2):
            y = op.forward(z, one)
            products.append(y)
            if 2 * index + 1 < plan.passes:
                z = op.backward(y, one) * 1e-3
        return products

    z = jax.random.normal(jax.random.key(1), (min(width, a.shape[1]), a.shape[1]))
    compiled = jax.jit(chain).lower(z).compile()
    return lambda: jax.block_until_ready(compiled(z)), {"scored": False}


METHODS = {"toyfeat": svd, "toyfeat, its products alone": passes}


def main() -> None:
    """Answer orders until the input ends."""
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
            if not isinstance(result, ft.linalg.SVD):
                raise TypeError(f"save: wanted a decomposition, got {type(result)}")
            v = np.swapaxes(np.asarray(result.vt), -1, -2)
            np.savez(order["path"], s=np.asarray(result.s), v=v)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
