"""Runs the peers' decompositions, on arrays and orders from the benchmark.

One JSON object per line on standard input, one answer per line on standard output:
``load`` an array, ``prepare`` a method, ``run`` it (seconds), ``save`` its result.
"""

import json
import sys
import time

import numpy as np
import scipy.linalg


def torch_svd(a, rank):
    """torch.svd_lowrank with its usual two iterations."""
    import torch

    tensor = torch.from_numpy(a)

    def run():
        u, s, v = torch.svd_lowrank(tensor, q=rank + 10, niter=2)
        return u[..., :rank].numpy(), s[..., :rank].numpy(), v[..., :rank].numpy()

    return run


def sklearn_svd(a, rank):
    """scikit-learn's randomized_svd with its defaults."""
    from sklearn.utils.extmath import randomized_svd

    def run():
        u, s, vt = randomized_svd(a, rank, random_state=0)
        return u, s, vt.T

    return run


def fbpca_svd(a, rank):
    """Fbpca with its defaults."""
    import fbpca

    def run():
        u, s, vt = fbpca.pca(a, rank, raw=True)
        return u, s, vt.T

    return run


def numpy_gram(a, rank):
    """The symmetric product of BLAS and the top of its spectrum."""
    dim = a.shape[1]

    def run():
        values, vectors = scipy.linalg.eigh(
            a.T @ a, subset_by_index=(dim - rank, dim - 1)
        )
        return None, np.sqrt(np.maximum(values[::-1], 0)), vectors[:, ::-1]

    return run


METHODS = {
    "torch.svd_lowrank(niter=2)": torch_svd,
    "sklearn randomized_svd": sklearn_svd,
    "fbpca": fbpca_svd,
    "numpy ssyrk + eigh": numpy_gram,
}


def main():
    """Answer until the input ends."""
    array, run, result = np.zeros(0), lambda: (), ()
    for line in sys.stdin:
        order = json.loads(line)
        answer = {}
        if order["op"] == "load":
            array = np.load(order["path"])
        elif order["op"] == "prepare":
            run = METHODS[order["method"]](array, order["rank"])
            result = run()
        elif order["op"] == "run":
            start = time.perf_counter()
            result = run()
            answer["seconds"] = time.perf_counter() - start
        elif order["op"] == "save":
            np.savez(order["path"], s=result[1], v=result[2])
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
