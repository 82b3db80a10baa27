"""``randomized_svd`` with the rows split over devices, and over processes."""

import functools
import json
import math
import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
COMMON = """
import functools, json, re, sys
import numpy as np
import jax, jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from toyfeat.linalg import randomized_svd

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
N, D, K = 8000, 160, 4

def orthonormal(rng, n, k):
    return np.linalg.qr(rng.standard_normal((n, k)))[0]

def matrix():
    rng = np.random.default_rng(0)
    u, v = orthonormal(rng, N, D), orthonormal(rng, D, D)
    return ((u * 0.9 ** np.arange(D)) @ v.T).astype(np.float32)

def exact(a):
    u, s, vt = np.linalg.svd(a.astype(np.float64), full_matrices=False)
    sign = np.sign(vt[range(D), np.abs(vt).argmax(1)])[:K]
    return u[:, :K] * sign, s[:K], vt[:K] * sign[:, None]

def distance(out, want):
    scale = want[1][0]
    pairs = [(out[1] / scale, want[1] / scale), (out[0], want[0]), (out[2], want[2])]
    return max(float(np.abs(np.asarray(x) - np.asarray(y)).max()) for x, y in pairs)
"""
SHARDED = """
KINDS = "all-reduce|all-gather|reduce-scatter|all-to-all|collective-permute"
COLLECTIVE = re.compile(rf"= (.*?) (?:{KINDS}|collective-broadcast)(?:-start)?\\(")

def shapes(hlo):
    found = [re.findall(r"\\[([\\d,]*)\\]", x) for x in COLLECTIVE.findall(hlo)]
    return [[int(d) for d in s.split(",") if d] for line in found for s in line]

def message(f):
    try:
        f()
    except ValueError as error:
        return str(error)
    return None

a, key, report = matrix(), jax.random.key(0), {}
truth = exact(a)
gradient = 2 * (truth[0] * truth[1]) @ truth[2]  # of the sum of squares
cases = [case.split(":") for case in sys.argv[1:]]
single = {m: randomized_svd(key, a, K, method=m) for _, m in cases}
for kind in sorted({kind for kind, _ in cases}):
    mesh = jax.make_mesh((8,), ("rows",), axis_types=(getattr(AxisType, kind),))
    put = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))
    split = put(a, "rows", None)
    where = {"mesh": mesh, "axis": "rows"} if kind == "Auto" else {}
    svd = functools.partial(randomized_svd, rank=K, **where)
    with jax.set_mesh(mesh):
        for method in [m for k, m in cases if k == kind]:
            alone = single[method]
            one = jax.jit(functools.partial(svd, method=method))
            compiled = one.lower(key, split).compile()
            out = compiled(key, split)
            total = lambda x: (svd(key, x, method=method).s ** 2).sum()
            slope = jax.jit(jax.grad(total))(split)
            report[f"{kind}:{method}"] = {
                "devices": len(jax.devices()),
                "method": out.info.method,
                "fallback": bool(out.info.fallback),
                "from one device": distance(out[:3], alone[:3]),
                "from numpy": distance(out[:3], truth),
                "u": sorted({s.data.shape for s in out.u.addressable_shards}),
                "devices of u": len(out.u.sharding.device_set),
                "vt": sorted({s.data.shape for s in out.vt.addressable_shards}),
                "collectives": shapes(compiled.as_text()),
                "gradient": float(np.abs(np.asarray(slope) - gradient).max()),
                "rows of the gradient": slope.sharding.shard_shape(slope.shape)[0],
            }
        columns = put(a, None, "rows")
        report[f"{kind} columns"] = message(lambda: randomized_svd(key, columns, K))
    where = {"mesh": mesh, "axis": "rows"}
    uneven = lambda: randomized_svd(key, a[:-3], K, **where)
    report[f"{kind} uneven"] = message(uneven)
print(json.dumps(report))
"""
TWO_PROCESSES = """
address, index = sys.argv[1], int(sys.argv[2])
jax.distributed.initialize(
    coordinator_address=address, num_processes=2, process_id=index
)
a, key = matrix(), jax.random.key(0)
mesh = jax.make_mesh((2,), ("rows",), axis_types=(AxisType.Auto,))
sharding = NamedSharding(mesh, P("rows", None))
mine = a[index * N // 2 : (index + 1) * N // 2]
split = jax.make_array_from_process_local_data(sharding, mine, a.shape)
options = {"rank": K, "method": "subspace"}
f = functools.partial(randomized_svd, mesh=mesh, axis="rows", **options)
out = jax.jit(f)(key, split)
u, s, vt = exact(a)
alone = jax.tree.map(np.asarray, randomized_svd(key, a, **options)[:3])
got = [np.concatenate([x.data for x in out.u.addressable_shards])]
got += [np.asarray(x.addressable_data(0)) for x in (out.s, out.vt)]
half = slice(index * N // 2, (index + 1) * N // 2)
report = {
    "processes": jax.process_count(),
    "rows of u": got[0].shape[0],
    "from numpy": distance(got, (u[half], s, vt)),
    "from one process": distance(got, (alone[0][half], *alone[1:])),
}
print(json.dumps(report))
"""


def start(script, arguments, devices):
    flags = [os.environ.get("XLA_FLAGS", "")]
    flags += [f"--xla_force_host_platform_device_count={devices}"]
    env = {**os.environ, "XLA_FLAGS": " ".join(flags), "JAX_PLATFORMS": "cpu"}
    path = [str(ROOT), env.get("PYTHONPATH", "")]
    env["PYTHONPATH"] = os.pathsep.join(p for p in path if p)
    code = COMMON + textwrap.dedent(script)
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    )


def finish(processes, timeout):
    """The last line of each, as JSON; none outlives this call."""
    try:
        outs = [p.communicate(timeout=timeout) for p in processes]
    finally:
        for p in processes:
            if p.poll() is None:
                p.kill()
                p.communicate()
    for p, (_, err) in zip(processes, outs, strict=True):
        assert p.returncode == 0, err[-4000:]
    return [json.loads(out.splitlines()[-1]) for out, _ in outs]


QUICK = ["Auto:gram", "Auto:subspace", "Explicit:krylov"]
SLOW = ["Auto:krylov", "Explicit:gram", "Explicit:subspace"]
CASES = [*QUICK, *[pytest.param(case, marks=pytest.mark.slow) for case in SLOW]]
KINDS = ["Auto", "Explicit"]


@pytest.fixture(scope="module")
def report():
    """A function: case -> what eight devices say, in one process for many."""

    @functools.cache
    def of(cases):
        return finish([start(SHARDED, cases, 8)], timeout=300)[0]

    return lambda case: of(tuple(QUICK if case not in SLOW else SLOW))[case]


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_eight_devices_are_one(report, case):
    got = report(case)
    assert got["devices"] == 8
    assert (got["method"], got["fallback"]) == (case.split(":")[1], False)
    assert got["from one device"] <= 1e-5
    assert got["from numpy"] <= 2e-5


@pytest.mark.slow_cases
@pytest.mark.parametrize("case", CASES)
def test_u_stays_split(report, case):
    got = report(case)
    assert (got["u"], got["devices of u"]) == ([[1000, 4]], 8)
    assert got["vt"] == [[4, 160]]


@pytest.mark.parametrize("case", CASES)
def test_only_small_arrays_cross_devices(report, case):
    """``l x l``, ``l x D``, one ``D x D``, and eight ``l x l`` one on another."""
    shapes = report(case)["collectives"]
    assert shapes
    assert all(d < 1000 for shape in shapes for d in shape), shapes
    space = 3 * 24  # three blocks of a Krylov space; other methods have one
    most = 8 * space**2 if case.endswith("krylov") else 160 * 160
    assert all(math.prod(shape) <= most for shape in shapes), shapes
    squares = [shape for shape in shapes if shape.count(160) > 1]
    assert len(squares) <= (case.endswith("gram")), squares


@pytest.mark.parametrize("case", CASES)
def test_gradient(report, case):
    got = report(case)
    assert got["gradient"] <= 1e-5
    assert got["rows of the gradient"] == 1000


@pytest.mark.parametrize("what", ["uneven", "columns"])
@pytest.mark.parametrize("kind", KINDS)
def test_other_splits_are_refused(report, kind, what):
    assert report(f"{kind} {what}") is not None


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


@pytest.mark.slow
def test_two_processes_are_one():
    address = f"localhost:{free_port()}"
    both = [start(TWO_PROCESSES, [address, str(i)], 1) for i in range(2)]
    for got in finish(both, timeout=120):
        assert (got["processes"], got["rows of u"]) == (2, 4000)
        assert got["from one process"] <= 1e-5
        assert got["from numpy"] <= 2e-5
