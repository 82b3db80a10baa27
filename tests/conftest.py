import atexit
import builtins
import gc
import os
import shutil
import tempfile
from importlib.metadata import version
from pathlib import Path

# The threads of OpenBLAS, which does the small decompositions, wait by spinning: where
# every core runs a worker of the tests, that took thirty times the work itself.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The tests compile thousands of small programs and run most of them once.  Without
# optimization, and with one module per program for LLVM, compiling takes a quarter of
# the time; child processes inherit that.  XLA_FLAGS= tests what users run, in about
# twice the time.
if "XLA_FLAGS" not in os.environ:
    _JAXLIB = tuple(int(part) for part in version("jaxlib").split(".")[:2])
    _FLAGS = {  # to the first version that may not know it, and would end the process
        "--xla_backend_optimization_level=0": (0, 13),
        "--xla_llvm_disable_expensive_passes=true": (0, 13),
        "--xla_cpu_use_fusion_emitters=false": (0, 11),
        "--xla_cpu_parallel_codegen_split_count=1": (0, 13),
    }
    os.environ["XLA_FLAGS"] = " ".join(f for f, end in _FLAGS.items() if end > _JAXLIB)

# Tests after a cleared cache, and of the other worker, compile much the same.  Child
# processes do not: some are killed, which leaves half an entry.
if "TOYFEAT_TESTS_CACHE" not in os.environ:
    os.environ["TOYFEAT_TESTS_CACHE"] = tempfile.mkdtemp(prefix="toyfeat-tests-")
    atexit.register(shutil.rmtree, os.environ["TOYFEAT_TESTS_CACHE"], True)

import jax
import pytest

jax.config.update("jax_compilation_cache_dir", os.environ["TOYFEAT_TESTS_CACHE"])
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the slow tests too")


def pytest_collection_modifyitems(config, items):
    """Leave out slow tests, and all cases but the first of tests with slow cases."""
    if config.getoption("--slow"):
        return
    skip = pytest.mark.skip(reason="slow: pass --slow")
    have_a_case = set()
    for item in items:
        test = item.nodeid.split("[")[0]
        repeated = "slow_cases" in item.keywords and test in have_a_case
        if "slow" in item.keywords or repeated:
            item.add_marker(skip)
        else:
            have_a_case.add(test)


# Compiled programs are many objects that stay: to look through them all, as often as
# Python does by default, took 3 % of the time.
gc.set_threshold(100_000, 20, 20)

_MAPPINGS = Path("/proc/self/maps")


@pytest.fixture(autouse=True, scope="module")
def few_programs():
    """A process may map 65,530 pieces of memory, of which a program takes three."""
    yield
    if _MAPPINGS.exists() and _MAPPINGS.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture
def key():
    return jax.random.key(0)


def pytest_runtest_setup():
    """Take back the last value that a doctest leaves; tyro hashes all of builtins."""
    vars(builtins).pop("_", None)
